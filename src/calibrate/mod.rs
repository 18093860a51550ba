//! What is found by running a model over calibration text: clip ratios, and weights quantised layer by layer.

mod clip_search;
mod pipeline;
mod stream;
mod timed;
mod weight_clips;

pub use clip_search::{ClipFound, ClipGoal, search_clips};
pub use pipeline::{Calibration, LayerReport, LayerStore, QuantizedLayer, quantize_layers, quantize_weights};
pub use timed::cases;
pub use weight_clips::search_weight_clips;
