//! Matrix products of tensors: which arithmetic, and what to do with a batch. See [`crate::ops::matmul`].

use super::ffi;
use super::gemm::{Arithmetic, Factors, Shape};
use super::ops::{aligned, code, copy_into, device, ptr_of};
use crate::linalg::matmul::Problem;
use crate::{DType, Error, Result, Tensor};

/// See [`crate::linalg::matmul::product`].
pub(crate) fn matmul(a: &Tensor, b: &Tensor, p: &Problem, shape: Vec<usize>, dtype: DType) -> Result<Tensor> {
    let d = device(a)?;
    let (a, b) = (aligned(a.clone())?, aligned(b.clone())?);
    if a.dtype().is_half() != b.dtype().is_half() && a.dtype() != DType::F64 && b.dtype() != DType::F64 {
        return mixed_matmul(&a, &b, p, shape, dtype);
    }
    if a.dtype() != b.dtype() || a.dtype() == DType::U32 || (a.dtype() == DType::F64) != (dtype == DType::F64) {
        return Err(Error::dtype("matmul on a GPU", format!("{} (mixed only with f32)", a.dtype()), b.dtype()));
    }
    let y = d.alloc(&shape, dtype)?;
    multiply(p, &y, &a, &b, None, Factors::Host(1.0, 0.0))?;
    Ok(y)
}

/// A matrix in `f32`, such as a rotation, times a 16-bit one. Both go through the tensor cores as halves of 11 bits, each scaled by
/// a power of two that uses their range. A weight in bf16 loses nothing; R loses 12 of its 24 bits, an error of an eighth of the bf16
/// rounding that follows (rounding R to bf16 would double the error).
fn mixed_matmul(a: &Tensor, b: &Tensor, p: &Problem, shape: Vec<usize>, dtype: DType) -> Result<Tensor> {
    let d = device(a)?;
    let wide = if dtype == DType::F16 && !p.reduce { DType::F16 } else { DType::F32 };
    let (a, size_a) = halved(a)?;
    let (b, size_b) = halved(b)?;
    let factors = d.alloc(&[2], DType::F32)?;
    let bits = |t: &Option<Tensor>| t.as_ref().map_or(std::ptr::null(), |t| ptr_of(t).cast_const().cast());
    // SAFETY: the sizes of absolute maxima are one word each.
    d.launch("unscale", |s| unsafe { ffi::sq_unscale(ptr_of(&factors).cast(), bits(&size_a), bits(&size_b), s) })?;
    let y = d.alloc(&shape, wide)?;
    multiply(p, &y, &a, &b, None, Factors::Device(ptr_of(&factors).cast_const().cast()))?;
    y.to_dtype(dtype)
}

/// The tensor as halves, with the absolute maximum that their scale follows from; f16 as it is.
fn halved(t: &Tensor) -> Result<(Tensor, Option<Tensor>)> {
    if t.dtype() == DType::F16 {
        return Ok((t.clone(), None));
    }
    let d = device(t)?;
    let (most, y) = (d.alloc(&[1], DType::U32)?, d.alloc(t.shape(), DType::F16)?);
    let (n, dtype, bits) = (t.len() as i64, code(t.dtype())?, ptr_of(&most).cast());
    // SAFETY: t and y have n values, most is one word.
    d.launch_moving("absmax", t.bytes(), |s| unsafe { ffi::sq_absmax(bits, ptr_of(t), n, dtype, s) })?;
    d.launch_moving("cast", t.bytes() + y.bytes(), |s| unsafe {
        ffi::sq_scale_to_half(ptr_of(&y), ptr_of(t), bits, n, dtype, s)
    })?;
    Ok((y, Some(most)))
}

/// `alpha op(a) op(b) + beta c` into y, summed over the batch where the problem says so.
fn multiply(p: &Problem, y: &Tensor, a: &Tensor, b: &Tensor, c: Option<&Tensor>, factors: Factors) -> Result<()> {
    let d = device(y)?;
    let shape = |batch, batch_a, batch_b, y: &Tensor| Shape {
        m: p.m,
        n: p.n,
        k: p.k,
        ta: p.ta,
        tb: p.tb,
        batch,
        batch_a,
        batch_b,
        a: a.dtype(),
        b: b.dtype(),
        y: y.dtype(),
        arithmetic: Arithmetic::Exact,
        device_factors: matches!(factors, Factors::Device(_)),
    };
    if !p.reduce || p.batch == 1 {
        let s = shape(p.batch, p.batch_a, p.batch_b, y);
        // SAFETY: sizes were checked by `product`.
        return unsafe { d.gemm(s, ptr_of(y), ptr_of(a), ptr_of(b), ptr_of(c.unwrap_or(y)), factors) };
    }
    // Every product of the batch on its own, then their sum as a product with a row of ones, in a fixed order.
    let wide = if y.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
    let parts = d.alloc(&[p.batch, p.m * p.n], wide)?;
    let s = shape(p.batch, p.batch_a, p.batch_b, &parts);
    // SAFETY: as above; `parts` has room for every product.
    unsafe { d.gemm(s, ptr_of(&parts), ptr_of(a), ptr_of(b), ptr_of(&parts), factors)? };
    let ones = Tensor::from_vec(vec![1f64; p.batch], [1, p.batch])?.to_dtype(wide)?.to_device(&crate::Device::Cuda(d))?;
    let sum = crate::linalg::matmul::product(&ones, false, &parts, false, false, wide)?;
    copy_into(y, 0, &sum.to_dtype(y.dtype())?)
}

/// `c + x wᵀ` for x [tokens, in], w [out, in], all of one type; c has the shape of the result.
pub(crate) fn linear_add(c: &Tensor, x: &Tensor, w: &Tensor) -> Result<Tensor> {
    let d = device(x)?;
    let (c, x, w) = (aligned(c.clone())?, aligned(x.clone())?, aligned(w.clone())?);
    let (m, n, k) = (x.rows(), w.rows(), x.cols());
    let p = Problem { m, n, k, batch: 1, batch_a: false, batch_b: false, ta: false, tb: true, reduce: false };
    let y = d.alloc(c.shape(), c.dtype())?;
    multiply(&p, &y, &x, &w, Some(&c), Factors::Host(1.0, 1.0))?;
    Ok(y)
}
