//! Quantisation: grids, schemes, weight quantisers.

mod clip;
mod correction;
mod correction_gpu;
mod drift;
mod engine;
mod gptq;
mod gptq_gpu;
mod hessian;
mod online;
mod rtn;
mod scheme;
mod sweep;
mod weight;

pub use crate::grid::{Clip, Grid, GridFloat, QuantSpec, Quantized, Rule, SEARCH_NORM, SEARCH_STEPS, Target};
pub use clip::ClipRatios;
pub use correction::Correction;
pub use drift::{Drift, Moments};
pub use engine::Engine;
pub use gptq::{Gptq, GroupScales, MAX_DAMPING};
pub use hessian::Hessian;
pub use online::{Online, R4};
pub use rtn::Rtn;
pub use scheme::{Scheme, Site, Sites};
pub(crate) use weight::quantize_by;
pub use weight::{QuantizedLinear, WeightQuantizer};
