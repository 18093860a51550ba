//! The steps of optimisers on batches of square `f32` matrices; see [`crate::linalg`] for what each computes.

use std::ffi::c_void;

use super::gemm::{Arithmetic, Factors, Shape};
use super::ops::ptr_of;
use super::{CudaDevice, ffi};
use crate::linalg::Digits;
use crate::linalg::matmul;
use crate::{DType, Device, Result, Tensor};

/// From this size on products and Gram matrices are made of split operands; smaller ones take no time as they are.
const SPLIT_FROM: usize = 1024;
/// Side that 8-bit products ask to be a multiple of.
const SPLIT_STEP: usize = 16;
/// Side up to which sums of products of 8-bit integers stay within 32 bits.
const SPLIT_UP_TO: usize = 32768;

/// Device, batch count and size of `[k, n, n]`.
fn parts(x: &Tensor) -> Result<(CudaDevice, i64, i64)> {
    Ok((x.cuda()?.0.device().clone(), x.shape()[0] as i64, x.cols() as i64))
}

fn float(t: &Tensor) -> *mut f32 {
    ptr_of(t).cast()
}

pub(crate) fn transpose_axpby(alpha: f64, x: &Tensor, beta: f64, z: Option<&Tensor>) -> Result<Tensor> {
    let (d, k, n) = parts(x)?;
    let y = d.alloc(x.shape(), DType::F32)?;
    let z = z.map_or(std::ptr::null_mut(), float);
    // SAFETY: all are [k, n, n] of f32; y is neither x nor z.
    d.launch("transpose", |s| unsafe { ffi::sq_transpose_axpby(float(&y), alpha as f32, float(x), beta as f32, z, k, n, s) })?;
    Ok(y)
}

pub(crate) fn normalize_rows(x: &Tensor) -> Result<Tensor> {
    let (d, k, n) = parts(x)?;
    let y = d.alloc(x.shape(), DType::F32)?;
    // SAFETY: both are [k, n, n] of f32.
    d.launch("normalize_rows", |s| unsafe { ffi::sq_normalize_rows(float(&y), float(x), k, n, s) })?;
    Ok(y)
}

pub(crate) fn step_size(w: &Tensor, lr: f64) -> Result<Tensor> {
    let (d, k, n) = parts(w)?;
    let alpha = d.alloc(&[k as usize], DType::F32)?;
    // SAFETY: w is [k, n, n] of f32, alpha [k].
    d.launch("step_size", |s| unsafe { ffi::sq_cayley_step_size(float(&alpha), float(w), lr as f32, k, n, s) })?;
    Ok(alpha)
}

pub(crate) fn add_scaled(a: Option<&Tensor>, alpha: &Tensor, factor: f64, x: &Tensor) -> Result<Tensor> {
    let (d, k, n) = parts(x)?;
    let y = d.alloc(x.shape(), DType::F32)?;
    let a = a.map_or(std::ptr::null_mut(), float);
    // SAFETY: all are [k, n, n] of f32, alpha [k].
    d.launch("add_scaled", |s| unsafe { ffi::sq_add_scaled(float(&y), a, float(alpha), factor as f32, float(x), k, n, s) })?;
    Ok(y)
}

/// Whether products of this size are made of split operands.
pub(crate) fn splits(n: usize) -> bool {
    (SPLIT_FROM..=SPLIT_UP_TO).contains(&n) && n.is_multiple_of(SPLIT_STEP)
}

/// `op(a) op(b)` of `f32` operands rounded to two terms of f16 (or one): 22 bits (or 11) below the largest value. The terms are
/// stacked along the summed axis, so that one product in f16 with sums in `f32` does it; small terms come first.
pub(crate) fn split_product(a: &Tensor, ta: bool, b: &Tensor, tb: bool, digits: Digits) -> Result<Tensor> {
    let (d, k, n) = parts(a)?;
    // The left operand is low, high, high, the right one high, low, high.
    let (terms, low_a, low_b) = match digits {
        Digits::Most => (3, 0, 1),
        Digits::Few => (1, -1, -1),
    };
    let split = |x: &Tensor, transpose: bool, low: i32| -> Result<(Tensor, Tensor)> {
        let planes = d.alloc(&[k as usize, terms, n as usize, n as usize], DType::F16)?;
        let largest = d.alloc(&[1], DType::F32)?;
        // SAFETY: sizes as declared.
        d.launch("split", |s| unsafe {
            ffi::sq_split(ptr_of(&planes), float(&largest), float(x), k, n, transpose.into(), low, terms as i32, s)
        })?;
        Ok((planes, largest))
    };
    // Both with the summed axis first.
    let ((a, largest_a), (b, largest_b)) = (split(a, !ta, low_a)?, split(b, tb, low_b)?);
    let factor = d.alloc(&[2], DType::F32)?;
    // SAFETY: two floats from one each.
    d.launch("split_factor", |s| unsafe { ffi::sq_split_factor(float(&factor), float(&largest_a), float(&largest_b), 1.0, s) })?;
    let y = d.alloc(&[k as usize, n as usize, n as usize], DType::F32)?;
    let (batch, n) = (k as usize, n as usize);
    let shape = Shape {
        m: n,
        n,
        k: terms * n,
        ta: true,
        tb: false,
        batch,
        batch_a: true,
        batch_b: true,
        a: DType::F16,
        b: DType::F16,
        y: DType::F32,
        arithmetic: Arithmetic::Exact,
        device_factors: true,
    };
    d.bind()?;
    // SAFETY: operands are [batch, terms n, n] of f16, y [batch, n, n] of f32, factor two floats.
    unsafe { d.gemm(shape, ptr_of(&y), ptr_of(&a), ptr_of(&b), ptr_of(&y), Factors::Device(float(&factor)))? };
    Ok(y)
}

/// [`gram_residual`] by products of 8-bit integers, which are exact: columns are rounded to 30 bits below their largest value.
fn gram_residual_of_digits(x: &Tensor) -> Result<(Tensor, Vec<f64>)> {
    let (d, k, n) = parts(x)?;
    let (batch, side) = (k as usize, n as usize);
    // Four planes of bytes, five of 32-bit integers.
    let digits = d.alloc(&[batch, side, side], DType::U32)?;
    let products = d.alloc(&[5, batch, side, side], DType::U32)?;
    let (largest, squares) = (d.alloc(&[batch, side], DType::F32)?, d.alloc(&[batch, side], DType::F64)?);
    // SAFETY: sizes as declared.
    d.launch("digits", |s| unsafe {
        ffi::sq_digits(ptr_of(&digits).cast(), float(&largest), ptr_of(&squares).cast(), float(x), k, n, s)
    })?;
    let shape = Shape {
        m: side,
        n: side,
        k: side,
        ta: false,
        tb: true,
        batch,
        batch_a: true,
        batch_b: true,
        a: DType::U32,
        b: DType::U32,
        y: DType::U32,
        arithmetic: Arithmetic::Integer,
        device_factors: false,
    };
    d.bind()?;
    let plane = |t: &Tensor, i: usize, bytes: usize| (ptr_of(t) as usize + i * bytes * batch * side * side) as *mut c_void;
    for (to, a, b, beta) in [(0, 0, 0, 0.0), (1, 0, 1, 0.0), (2, 0, 2, 0.0), (3, 1, 1, 0.0), (4, 0, 3, 0.0), (4, 1, 2, 1.0)] {
        let y = plane(&products, to, 4);
        // SAFETY: planes of batch side² bytes and integers.
        unsafe { d.gemm(shape, y, plane(&digits, a, 1), plane(&digits, b, 1), y, Factors::Host(1.0, beta))? };
    }
    let (e, errors) = (d.alloc(x.shape(), DType::F32)?, d.alloc(&[batch], DType::F64)?);
    // SAFETY: sizes as declared.
    d.launch("digits_residual", |s| unsafe {
        let (products, squares) = (ptr_of(&products).cast(), ptr_of(&squares).cast());
        ffi::sq_digits_residual(float(&e), ptr_of(&errors).cast(), products, float(&largest), squares, k, n, s)
    })?;
    Ok((e, errors.to_device(&Device::Cpu)?.into_vec()?))
}

pub(crate) fn gram_residual(x: &Tensor) -> Result<(Tensor, Vec<f64>)> {
    let (d, k, n) = parts(x)?;
    if splits(n as usize) {
        return gram_residual_of_digits(x);
    }
    let wide = d.alloc(x.shape(), DType::F64)?;
    // SAFETY: both have x.len() values.
    d.launch("widen", |s| unsafe { ffi::sq_widen(ptr_of(&wide).cast(), float(x), x.len() as i64, s) })?;
    let gram = matmul::product(&wide, true, &wide, false, false, DType::F64)?;
    let (e, errors) = (d.alloc(x.shape(), DType::F32)?, d.alloc(&[k as usize], DType::F64)?);
    // SAFETY: sizes as declared.
    d.launch("gram_residual", |s| unsafe {
        ffi::sq_gram_residual(float(&e), ptr_of(&errors).cast(), ptr_of(&gram).cast(), k, n, s)
    })?;
    Ok((e, errors.to_device(&Device::Cpu)?.into_vec()?))
}

pub(crate) fn mean_squares(x: &Tensor) -> Result<Vec<f64>> {
    let (d, k, n) = parts(x)?;
    let means = d.alloc(&[k as usize], DType::F64)?;
    // SAFETY: x is [k, n, n] of f32, means [k] of f64.
    d.launch("mean_squares", |s| unsafe { ffi::sq_mean_squares(ptr_of(&means).cast(), float(x), k, n, s) })?;
    means.to_device(&Device::Cpu)?.into_vec()
}

pub(crate) fn strictly_lower(x: &Tensor) -> Result<Tensor> {
    let (d, k, n) = parts(x)?;
    let y = d.alloc(x.shape(), DType::F32)?;
    // SAFETY: both are [k, n, n] of f32.
    d.launch("strictly_lower", |s| unsafe { ffi::sq_strictly_lower(float(&y), float(x), k, n, s) })?;
    Ok(y)
}

pub(crate) fn adam(m: &Tensor, v: &Tensor, g: &Tensor, b: [f64; 2], c: [f64; 2], epsilon: f64) -> Result<[Tensor; 3]> {
    let d = parts(m)?.0;
    let new = || d.alloc(m.shape(), DType::F32);
    let (to_m, to_v, to_d, count) = (new()?, new()?, new()?, m.len() as i64);
    let [b1, b2, c1, c2, epsilon] = [b[0], b[1], c[0], c[1], epsilon].map(|x| x as f32);
    // SAFETY: all six have m.len() values of f32.
    d.launch("adam", |s| unsafe {
        let (ym, yv, yd) = (float(&to_m), float(&to_v), float(&to_d));
        ffi::sq_adam(ym, yv, yd, float(m), float(v), float(g), b1, b2, c1, c2, epsilon, count, s)
    })?;
    Ok([to_m, to_v, to_d])
}
