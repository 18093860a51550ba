//! Products of tensors on a GPU: which arithmetic, and what to do with a batch.

use super::matmul::{Problem, product};
use crate::device::cuda::{CudaDevice, Queue};
use crate::device::ffi;
use crate::device::launch::{Check, Factors, Kind, Shape, View, Work};
use crate::{DType, Device, Error, Result, Tensor};

/// See [`product`].
pub(super) fn matmul(d: &CudaDevice, a: &Tensor, b: &Tensor, p: &Problem, shape: &[usize], dtype: DType) -> Result<Tensor> {
    let (a, b) = (a.clone().aligned()?, b.clone().aligned()?);
    if a.dtype().is_half() != b.dtype().is_half() && a.dtype() != DType::F64 && b.dtype() != DType::F64 {
        return mixed_matmul(d, &a, &b, p, shape, dtype);
    }
    if a.dtype() != b.dtype() || a.dtype() == DType::U32 || (a.dtype() == DType::F64) != (dtype == DType::F64) {
        return Err(Error::dtype("matmul on a GPU", format!("{} (mixed only with f32)", a.dtype()), b.dtype()));
    }
    let y = Tensor::on(d, shape, dtype)?;
    multiply(d, p, &y, &a, &b, None, Factors::Host(1.0, 0.0))?;
    Ok(y)
}

/// A matrix in `f32`, such as a rotation, times a 16-bit one. Both go through the tensor cores as halves of 11 bits, each scaled by
/// a power of two that uses their range. A weight in bf16 loses nothing; R loses 12 of its 24 bits, an error of an eighth of the bf16
/// rounding that follows (rounding R to bf16 would double the error).
fn mixed_matmul(d: &CudaDevice, a: &Tensor, b: &Tensor, p: &Problem, shape: &[usize], dtype: DType) -> Result<Tensor> {
    let wide = if dtype == DType::F16 && !p.reduce { DType::F16 } else { DType::F32 };
    let (a, size_a) = halved(d, a)?;
    let (b, size_b) = halved(d, b)?;
    let factors = Tensor::on(d, &[2], DType::F32)?;
    let (bits_a, bits_b) = (size_a.as_ref().map(Tensor::view).transpose()?, size_b.as_ref().map(Tensor::view).transpose()?);
    launch_unscale(d.queue(), factors.view()?, bits_a, bits_b)?;
    let y = Tensor::on(d, shape, wide)?;
    multiply(d, p, &y, &a, &b, None, Factors::Device(factors.view()?))?;
    y.to_dtype(dtype)
}

/// The tensor as halves, with the absolute maximum that their scale follows from; f16 as it is.
fn halved(d: &CudaDevice, t: &Tensor) -> Result<(Tensor, Option<Tensor>)> {
    if t.dtype() == DType::F16 {
        return Ok((t.clone(), None));
    }
    let (most, y) = (Tensor::on(d, &[1], DType::U32)?, Tensor::on(d, t.shape(), DType::F16)?);
    launch_absmax(d.queue(), most.view()?, t.view()?)?;
    launch_scale_to_half(d.queue(), y.view()?, t.view()?, most.view()?)?;
    Ok((y, Some(most)))
}

/// The largest |x|, as the bits of a float (`u32`).
fn launch_absmax(queue: Queue<'_>, bits: View<'_>, x: View<'_>) -> Result<()> {
    let c = Check::new("absmax", queue);
    let (n, kind, work) = (x.len(), x.kind(), Work::moving("absmax", x.bytes()));
    let (bits, x) = (c.operand("absmax", bits, Kind::U32, 1)?, c.operand("x", x, kind, n)?);
    let (count, dtype) = (c.long(n)?, c.code(kind)?);
    // SAFETY: x has n values, the maximum is one word.
    c.launch(work, |s| unsafe { ffi!(sq_absmax(bits, x, count, dtype, s)) })
}

/// `y` (f16) = x times the power of two that follows from its absolute maximum.
fn launch_scale_to_half(queue: Queue<'_>, y: View<'_>, x: View<'_>, bits: View<'_>) -> Result<()> {
    let c = Check::new("scale to half", queue);
    let (n, kind, work) = (x.len(), x.kind(), Work::moving("cast", x.bytes() + y.bytes()));
    let (y, x) = (c.operand("y", y, Kind::F16, n)?, c.operand("x", x, kind, n)?);
    let bits = c.operand("absmax", bits, Kind::U32, 1)?;
    let (count, dtype) = (c.long(n)?, c.code(kind)?);
    // SAFETY: x and y have n values, the maximum is one word.
    c.launch(work, |s| unsafe { ffi!(sq_scale_to_half(y, x, bits, count, dtype, s)) })
}

/// What undoes the scaling of both factors of a product, and 0: two floats.
fn launch_unscale(queue: Queue<'_>, scale: View<'_>, a: Option<View<'_>>, b: Option<View<'_>>) -> Result<()> {
    let c = Check::new("unscale", queue);
    let scale = c.operand("factors", scale, Kind::F32, 2)?;
    let a = c.optional("absmax of a", a, Kind::U32, 1)?;
    let b = c.optional("absmax of b", b, Kind::U32, 1)?;
    // SAFETY: two floats, and a word for each operand that was scaled.
    c.launch(Work::of("unscale"), |s| unsafe { ffi!(sq_unscale(scale, a, b, s)) })
}

/// `alpha op(a) op(b) + beta c` into y, summed over the batch where the problem says so.
fn multiply(
    d: &CudaDevice,
    p: &Problem,
    y: &Tensor,
    a: &Tensor,
    b: &Tensor,
    c: Option<&Tensor>,
    factors: Factors<'_>,
) -> Result<()> {
    let Problem { m, n, k, batch, batch_a, batch_b, ta, tb, reduce } = *p;
    let shape = Shape { m, n, k, ta, tb, batch, batch_a, batch_b };
    if !reduce || batch == 1 {
        return d.multiply(shape, y.view()?, a.view()?, b.view()?, c.map(Tensor::view).transpose()?, factors);
    }
    // Every product of the batch on its own, then their sum as a product with a row of ones, in a fixed order.
    let wide = if y.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
    let parts = Tensor::on(d, &[batch, m * n], wide)?;
    d.multiply(shape, parts.view()?, a.view()?, b.view()?, None, factors)?;
    let ones = Tensor::from_vec(vec![1f64; batch], [1, batch])?.to_dtype(wide)?.to_device(&Device::Cuda(d.clone()))?;
    let sum = product(&ones, false, &parts, false, false, wide)?.to_dtype(y.dtype())?;
    d.copy(y.view()?, sum.view()?)
}

/// `c + x wᵀ` for x [tokens, in], w [out, in], all of one type; c has the shape of the result.
pub(super) fn linear_add(d: &CudaDevice, c: &Tensor, x: &Tensor, w: &Tensor) -> Result<Tensor> {
    let (c, x, w) = (c.clone().aligned()?, x.clone().aligned()?, w.clone().aligned()?);
    let (m, n, k) = (x.rows(), w.rows(), x.cols());
    let p = Problem { m, n, k, batch: 1, batch_a: false, batch_b: false, ta: false, tb: true, reduce: false };
    let y = Tensor::on(d, c.shape(), c.dtype())?;
    multiply(d, &p, &y, &x, &w, Some(&c), Factors::Host(1.0, 1.0))?;
    Ok(y)
}
