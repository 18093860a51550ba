//! The steps of optimisers on batches of square `f32` matrices; see [`crate::optim::linalg`] for what each computes.

use super::ops::ptr_of;
use super::{CudaDevice, ffi};
use crate::ops::matmul;
use crate::{DType, Device, Result, Tensor};

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

pub(crate) fn add_scaled(a: &Tensor, alpha: &Tensor, factor: f64, x: &Tensor) -> Result<Tensor> {
    let (d, k, n) = parts(a)?;
    let y = d.alloc(a.shape(), DType::F32)?;
    // SAFETY: all are [k, n, n] of f32, alpha [k].
    d.launch("add_scaled", |s| unsafe {
        ffi::sq_add_scaled(float(&y), float(a), float(alpha), factor as f32, float(x), k, n, s)
    })?;
    Ok(y)
}

pub(crate) fn gram_residual(x: &Tensor) -> Result<(Tensor, Vec<f64>)> {
    let (d, k, n) = parts(x)?;
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
