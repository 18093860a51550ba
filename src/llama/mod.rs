//! LLaMA models in the Hugging Face layout: configuration and weights.

mod config;
mod load;

pub use config::{LlamaConfig, RopeScaling};
pub use load::{Checkpoint, LayerWeights, Weights};
