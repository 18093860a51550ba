//! What is found by running a model over calibration text: clip ratios, weights quantised layer by layer, and what is then still free in a layer.

mod clip_search;
mod pipeline;
mod reconstruct;
mod stream;
mod timed;
mod weight_clips;

pub use clip_search::{ClipFound, ClipGoal, search_clips, search_clips_among};
pub use pipeline::{Calibration, LayerReport, LayerStore, QuantizedLayer, quantize_layers, quantize_weights};
pub use reconstruct::Reconstruct;
pub use timed::cases;
pub use weight_clips::{search_weight_clips, search_weight_clips_among};
