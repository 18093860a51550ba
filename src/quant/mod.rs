//! Quantisation: grids, schemes, weight quantisers.

mod clip;
mod clip_search;
mod gptq;
mod hessian;
mod pipeline;
mod rtn;
mod scheme;
mod spec;
mod weight;

pub use clip::ClipRatios;
pub use clip_search::{ClipFound, ClipGoal, search_clips};
pub use gptq::{Gptq, GroupScales, MAX_DAMPING};
pub use hessian::Hessian;
pub use pipeline::{Calibration, LayerReport, LayerStore, QuantizedLayer, quantize_layers, quantize_weights};
pub use rtn::Rtn;
pub use scheme::{Online, Scheme, Site, Sites};
pub use spec::{Clip, Grid, GridFloat, QuantSpec, SEARCH_NORM, SEARCH_STEPS, Target};
pub use weight::{QuantizedLinear, WeightQuantizer};
