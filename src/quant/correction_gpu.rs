//! Corrections on the GPU: their matrices in `f64`, rounded to `f32` once for the sweep. What is computed is in
//! [`Correction`](super::Correction).

use super::correction::Terms;
use super::gptq_gpu::Order;
use crate::device::cuda::{CudaDevice, Queue};
use crate::device::ffi;
use crate::device::launch::{Check, Kind, View, Work};
use crate::linalg::matmul;
use crate::quant::Correction;
use crate::{DType, Result, Tensor};

/// The terms from D in its own order and the reversed factor (lost above its diagonal, which becomes 0), both `f64` `[n, n]`.
pub(super) fn terms(
    correction: &Correction,
    d: &CudaDevice,
    drift: &Tensor,
    inverse: &Tensor,
    order: &Order,
    first: f64,
) -> Result<Terms<Tensor>> {
    if !matches!(correction, Correction::Qep(_) | Correction::Qronos | Correction::Gptaq(_)) {
        return Ok(Terms::NONE);
    }
    let (drift, n) = (drift.clone().aligned()?, drift.cols());
    let reversed = Tensor::on(d, &[n, n], DType::F64)?;
    // SAFETY: the order is one of the columns.
    unsafe { launch_gather(d.queue(), reversed.view()?, drift.view()?, order.view(), n)? };
    launch_lower(d.queue(), inverse.view()?, false, n)?;
    // D Uᵀ, then the product of that with U.
    let left = matmul::product(&reversed, false, inverse, true, false, DType::F64)?;
    if let Correction::Gptaq(_) = correction {
        launch_lower(d.queue(), left.view()?, true, n)?;
    }
    let c = matmul::product(&left, false, inverse, false, false, DType::F64)?;
    let y = Tensor::on(d, &[n, n], DType::F32)?;
    let views = Turned { c: c.view()?, column: None, order: order.view() };
    // SAFETY: the order is one of the columns.
    unsafe {
        match *correction {
            Correction::Qronos => {
                let column = Some((reversed.view()?, inverse.view()?));
                launch_finish(d.queue(), y.view()?, &Turned { column, ..views }, first, 1.0, n)?;
            }
            Correction::Gptaq(strength) => {
                launch_finish(d.queue(), y.view()?, &Turned { order: None, ..views }, first, strength, n)?;
                return Ok(Terms { target: None, forward: Some(y) });
            }
            _ => launch_finish(d.queue(), y.view()?, &views, first, correction.constant().unwrap_or(1.0), n)?,
        }
    }
    Ok(Terms { target: Some(y), forward: None })
}

/// `W + W C` in `f32`, both in their own order.
pub(super) fn target(d: &CudaDevice, weight: &Tensor, c: &Tensor) -> Result<Tensor> {
    let n = weight.cols();
    let original = weight.to_dtype(DType::F32)?.reshape([weight.rows(), n])?;
    let sum = Tensor::on(d, &[weight.rows(), n], DType::F32)?;
    d.copy(sum.view()?, original.view()?)?;
    d.add_product(sum.view()?, 0, original.view()?, c.view()?, 0, [weight.rows(), n, n])?;
    Ok(sum)
}

/// `a` = D reversed, in an order of its columns (`u32`; their own for none); both `f64`, n×n.
///
/// # Safety
/// The order names columns below n: the kernel does not look.
unsafe fn launch_gather(queue: Queue<'_>, a: View<'_>, drift: View<'_>, order: Option<View<'_>>, n: usize) -> Result<()> {
    let c = Check::new("drift", queue);
    let square = c.product(&[n, n])?;
    let (a, drift) = (c.operand("a", a, Kind::F64, square)?, c.operand("D", drift, Kind::F64, square)?);
    let order = c.optional("order", order, Kind::U32, n)?;
    let n = c.long(n)?;
    // SAFETY: both are n · n values, the order n; that it names columns is the caller's word.
    c.launch(Work::of("correction"), |s| unsafe { ffi!(sq_correction_gather(a, drift, order, n, s)) })
}

/// `a` (`f64`, n×n) = 0 above its diagonal, and on it where `strict`.
fn launch_lower(queue: Queue<'_>, a: View<'_>, strict: bool, n: usize) -> Result<()> {
    let c = Check::new("triangle", queue);
    let a = c.operand("a", a, Kind::F64, c.product(&[n, n])?)?;
    let n = c.long(n)?;
    // SAFETY: n · n values.
    c.launch(Work::of("correction"), |s| unsafe { ffi!(sq_correction_lower(a, n, i32::from(strict), s)) })
}

/// What [`launch_finish`] reads, all reversed.
struct Turned<'a> {
    c: View<'a>,
    /// D and the factor, where the first column is one for itself.
    column: Option<(View<'a>, View<'a>)>,
    /// The order of rows and columns of the result.
    order: Option<View<'a>>,
}

/// `y` (`f32`, n×n) = `factor` times C, in an order (`u32`), less what makes its first column D's divided by `first`; C, D and the factor
/// are `f64`, n×n.
///
/// # Safety
/// The order names columns below n: the kernel does not look.
unsafe fn launch_finish(queue: Queue<'_>, y: View<'_>, from: &Turned<'_>, first: f64, factor: f64, n: usize) -> Result<()> {
    let c = Check::new("correction", queue);
    let square = c.product(&[n, n])?;
    let (y, matrix) = (c.operand("y", y, Kind::F32, square)?, c.operand("C", from.c, Kind::F64, square)?);
    let drift = c.optional("D", from.column.map(|(drift, _)| drift), Kind::F64, square)?;
    let inverse = c.optional("inverse", from.column.map(|(_, inverse)| inverse), Kind::F64, square)?;
    let order = c.optional("order", from.order, Kind::U32, n)?;
    let n = c.long(n)?;
    // SAFETY: all are n · n values, the order n; that it names each column once is the caller's word.
    c.launch(Work::of("correction"), |s| unsafe {
        ffi!(sq_correction_finish(y, matrix, drift, inverse, first, factor, order, n, s))
    })
}
