//! LLaMA models in the Hugging Face layout: configuration and weights.

mod block;
mod config;
mod load;
mod model;

pub use block::{Block, Observer, RotatedWeights, Run};
pub use config::{LlamaConfig, RopeScaling};
pub use load::{Checkpoint, LayerWeights, Source, Weights};
pub(crate) use load::{EMBEDDING, FINAL_NORM, HEAD, LINEARS, NORMS};
pub(crate) use model::Merger;
pub use model::{Llama, Merged, Recompute, RotationVars};
