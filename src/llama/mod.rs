//! LLaMA models in the Hugging Face layout: configuration and weights.

mod block;
mod checkpoint;
mod config;
mod folder;
mod inventory;
mod layer;
mod load;
mod merge;
mod model;
pub mod synthetic;
mod walk;

pub use block::{Block, Observer, Patch, RotatedWeights, Run};
pub use checkpoint::Checkpoint;
pub use config::{LlamaConfig, RopeScaling};
pub use layer::Plan;
pub(crate) use load::{EMBEDDING, FINAL_NORM, HEAD, LINEARS, NORMS};
pub use load::{LayerWeights, Source, Weights};
pub use merge::Rotated;
pub use model::{Llama, Merged, Recompute, RotationVars};
pub use walk::Walk;
