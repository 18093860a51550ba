//! SpinQuant.
#![warn(missing_docs)]

pub mod check;
pub mod data;
pub mod device;
mod dtype;
mod error;
pub mod eval;
mod factor;
pub mod io;
pub mod laws;
pub mod learn;
pub mod llama;
pub mod manifold;
pub mod ops;
pub mod optim;
pub mod quant;
pub mod rotation;
pub mod tape;
mod tensor;

pub use device::Device;
pub use dtype::{DType, Element};
pub use error::{Error, Result};
pub use tape::{Tape, Var};
pub use tensor::Tensor;
