//! The differentiable operations, one file each, and their worked cases.
//!
//! Every file has the formula, a naive `f64` reference that is never optimised, a fast `f32` CPU kernel, the one call of its CUDA
//! launcher, the backward pass, and `cases()`. The tape picks the side ([`Op`](crate::tape::Op)): on the CPU 16-bit tensors are widened to
//! `f32`, computed on, and rounded once. A file's `launch` functions take untyped device memory; `kernels` offers them for bare slices.

pub mod add;
pub mod attention;
pub mod axpby_bf16;
pub mod bias;
mod case;
pub mod cast;
pub mod clipped_fake_quant;
pub mod coded;
pub mod codes;
pub mod cross_entropy;
pub mod embedding;
pub mod exact;
pub mod fake_quant;
pub mod hadamard;
pub mod hadamard_codes;
pub mod hadamard_fake_quant;
pub mod integer_linear;
pub mod kl_divergence;
pub mod kl_top;
pub mod linear_cross_entropy;
pub mod log_scale;
pub mod matmul;
pub mod mean_square;
pub mod microscaling;
mod part;
pub mod rms_norm;
pub mod rope;
pub mod rope_pairs;
pub mod scaled_rms_norm;
pub mod scaled_swiglu;
pub mod segment_attention;
pub mod spread;
mod sum;
pub mod swap_axes;
pub mod swiglu;

pub use crate::random::{normal, randn, repeated};
use crate::tape::{Grads, Saved};
use crate::{DType, Error, Result, Tensor};

pub use case::{At, Build, Call, Case, Check, Pass, Place, Prepare, Run, Size, Timing, Whole};
pub(crate) use case::{Once, few_rows, normals, scattered};

/// Every operation's cases.
pub fn cases() -> Vec<Case> {
    [
        add::cases(),
        attention::cases(),
        axpby_bf16::cases(),
        bias::cases(),
        clipped_fake_quant::cases(),
        coded::cases(),
        codes::cases(),
        cross_entropy::cases(),
        embedding::cases(),
        fake_quant::cases(),
        hadamard::cases(),
        hadamard_codes::cases(),
        hadamard_fake_quant::cases(),
        integer_linear::cases(),
        kl_divergence::cases(),
        kl_top::cases(),
        linear_cross_entropy::cases(),
        log_scale::cases(),
        matmul::cases(),
        mean_square::cases(),
        microscaling::cases(),
        part::cases(),
        rms_norm::cases(),
        rope::cases(),
        rope_pairs::cases(),
        scaled_rms_norm::cases(),
        scaled_swiglu::cases(),
        segment_attention::cases(),
        spread::cases(),
        swap_axes::cases(),
        swiglu::cases(),
    ]
    .concat()
}

/// The 16-bit type among the operands, if any; else that of the first.
///
/// # Errors
/// No operands.
pub fn narrowest(inputs: &[Tensor]) -> Result<DType> {
    let mut types = inputs.iter().map(Tensor::dtype);
    let first = types.next().ok_or_else(|| Error::argument("narrowest", "expected at least one operand, got none"))?;
    Ok(if first.is_half() { first } else { types.find(|d| d.is_half()).unwrap_or(first) })
}

/// The backward pass of a scalar whose forward pass kept its gradient.
pub(crate) fn kept_gradient(saved: Saved, dy: Tensor) -> Result<Grads> {
    let [gradient] = saved.take()?;
    let factor = dy.item()?;
    Ok(vec![Some(if factor == 1.0 { gradient } else { gradient.scale(factor)? })])
}
