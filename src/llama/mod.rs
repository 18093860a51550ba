//! LLaMA models in the Hugging Face layout: configuration and weights.

mod block;
mod config;
mod layer;
mod load;
mod merge;
mod model;
pub mod synthetic;
mod walk;

pub use block::{Block, Observer, Patch, RotatedWeights, Run};
pub use config::{LlamaConfig, RopeScaling};
pub use layer::Plan;
pub use load::{Checkpoint, LayerWeights, Source, Weights};
pub(crate) use load::{EMBEDDING, FINAL_NORM, HEAD, LINEARS, NORMS};
pub use merge::Rotated;
pub use model::{Llama, Merged, Recompute, RotationVars};
pub use walk::Walk;
