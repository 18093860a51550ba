//! LLaMA models and their relatives ([`Family`]) in the Hugging Face layout: configuration and weights.

mod block;
mod checkpoint;
mod compressed;
mod config;
mod decoder;
mod fit;
mod folder;
mod inventory;
mod layer;
mod linear;
mod load;
mod merge;
mod model;
mod packed;
mod rotate;
pub mod synthetic;
mod turn;
mod walk;

pub(crate) use block::plus;
pub use block::{Attend, Block, Observer, Patch, Run};
pub use checkpoint::Checkpoint;
pub use compressed::Compressed;
pub use config::{Absent, Biases, Facts, Family, Frequencies, LlamaConfig, Multipliers, RopeScaling, Windows};
pub use decoder::Decoder;
pub use layer::Plan;
pub use linear::{Affine, Basis, LayerWeights, Linear, Linears, Row, Rows};
pub(crate) use load::{EMBEDDING, FINAL_NORM, HEAD, NORMS};
pub use load::{Source, Weights};
pub use merge::Rotated;
pub(crate) use merge::{layer_clips, norm_gains};
pub use model::{Llama, Merged, Recompute, RotationVars};
pub use packed::Packed;
pub use rotate::{Around, LayerClips, LayerScales, LayerTransforms, LinearVars, RotatedWeights};
pub use walk::Walk;
