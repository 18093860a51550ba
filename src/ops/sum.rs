//! `s = factor Σ x` over all values, in a fixed order and in double: how a loss gets from its rows to its mean on a GPU.

use crate::device::cuda::{CudaDevice, Queue, ffi};
use crate::device::ffi;
use crate::device::launch::{Check, Kind, View, Work};
use crate::{DType, Result, Tensor};

/// Doubles that the kernel works in.
const WORKSPACE: usize = 1024;

/// `factor Σ x` of `f32` values, as an f32 scalar.
pub(super) fn scaled(device: &CudaDevice, factor: f64, x: &Tensor) -> Result<Tensor> {
    let sum = Tensor::on(device, &[], DType::F32)?;
    let workspace = device.buffer(WORKSPACE, Kind::F64, "the workspace of a sum")?;
    launch(device.queue(), sum.view()?, workspace.view(), x.view()?)?;
    sum.scale(factor)
}

/// `sum = Σ x` for one `f32` and x in `f32`.
fn launch(queue: Queue<'_>, sum: View<'_>, workspace: View<'_>, x: View<'_>) -> Result<()> {
    let c = Check::new("sum", queue);
    let n = x.len();
    let (sum, x) = (c.operand("sum", sum, Kind::F32, 1)?, c.operand("x", x, Kind::F32, n)?);
    let workspace = c.operand("workspace", workspace, Kind::F64, WORKSPACE)?;
    let count = c.long(n)?;
    // SAFETY: one sum of n values of f32, and the workspace that kernels.h asks for.
    c.launch(Work::of("sum"), |s| unsafe { ffi!(sq_sum(sum, workspace, x, count, ffi::SQ_F32, s)) })
}
