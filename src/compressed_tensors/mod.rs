//! The format of the compressed-tensors library (0.20), which transformers and vLLM read: quantised weights as packed integers, and
//! how to use them in `config.json`. Here is what the files say; [`export`](crate::export) writes them, [`llama`](crate::llama) reads
//! them.
//!
//! A linear `P` of a `pack-quantized` model, `[out, in]`, at `bits` of 2 to 8:
//!
//! | tensor | type, shape | what it is |
//! |---|---|---|
//! | `P.weight_packed` | I32, `[out, ⌈in·bits/32⌉]` | codes of a row one behind another, from the lowest bit of the first word |
//! | `P.weight_scale` | the model's, `[out, groups]` | one group: the whole row |
//! | `P.weight_zero_point` | I32, `[⌈out·bits/32⌉, groups]` | zero points, packed like codes but down the columns; only where asymmetric |
//! | `P.weight_shape` | I64, `[2]` | `[out, in]` |
//!
//! A stored code is the code less the smallest that its width has, and so is a zero point. A weight is `scale · (code − zero)`, rounded
//! to the type of the scale.

mod config;
mod pack;

pub use config::{Activations, Place, Quantization, Weights};
pub use pack::{Packed, words};
