//! The rotations R1 … R4 of the paper, and the Hadamard matrices they start from.

mod hadamard;

pub use hadamard::{Hadamard, MAX_K};
