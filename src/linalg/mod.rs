//! The few operations that steps on batches of square matrices `[k, n, n]` are made of, in `f64` or `f32`.
//!
//! This is the only part of an optimiser that knows the device; the CPU versions here are also the reference of the others.
//! Scalars that belong to a matrix of the batch stay on the device as a tensor `[k]`, so that a step never waits for the host.

pub(crate) mod factor;
pub(crate) mod gpu;
pub mod matmul;
mod matmul_gpu;

use rayon::prelude::*;

use self::factor::{cholesky, invert_lower, transpose};
use crate::device::Device;
use crate::device::cpu::{self, Real, Strides};
use crate::{DType, Error, Result, Tensor};

/// Guards the divisions of the published code.
const TINY: f64 = 1e-8;
/// Up to this size the matrices of a batch are multiplied side by side rather than each on all cores.
const SMALL: usize = 256;
/// max|XᵀX − I| that re-orthonormalised `f32` matrices are kept within.
pub(crate) const F32_TOLERANCE: f64 = 1e-6;
/// The same for `f64` matrices.
const F64_TOLERANCE: f64 = 1e-12;
/// Side of the tiles that transposes work in.
const TILE: usize = 32;

/// The batch count k and the size n of `[k, n, n]`.
///
/// # Errors
/// [`Error::Shape`] for another shape.
pub(crate) fn dims(what: &str, x: &Tensor) -> Result<(usize, usize)> {
    match *x.shape() {
        [k, n, m] if n == m && n > 0 => Ok((k, n)),
        _ => Err(Error::shape(what, "[k, n, n]", x.shape())),
    }
}

/// Checks that batches of square matrices belong together: one shape, type and device, and a supported type.
///
/// # Errors
/// [`Error::Shape`], [`Error::DType`] or [`Error::Device`], naming `what`.
pub fn same(what: &str, x: &Tensor, others: &[&Tensor]) -> Result<(usize, usize)> {
    let size = dims(what, x)?;
    alike(what, x, others)?;
    Ok(size)
}

/// The same for tensors of any shape.
///
/// # Errors
/// [`Error::Shape`], [`Error::DType`] or [`Error::Device`], naming `what`.
pub fn alike(what: &str, x: &Tensor, others: &[&Tensor]) -> Result<()> {
    if !matches!(x.dtype(), DType::F64 | DType::F32) {
        return Err(Error::dtype(what, "f64 or f32", x.dtype()));
    }
    for y in others {
        if y.shape() != x.shape() {
            return Err(Error::shape(what, format!("{:?}", x.shape()), y.shape()));
        }
        if y.dtype() != x.dtype() {
            return Err(Error::dtype(what, x.dtype(), y.dtype()));
        }
        if y.device() != x.device() {
            return Err(Error::device(what, format!("operands on {} and {}", x.device(), y.device())));
        }
    }
    Ok(())
}

/// Calls the generic CPU function for the element type of `$x`, or the GPU's where there is one.
macro_rules! on_cpu {
    ($what:expr, $x:expr, $f:ident($($arg:expr),*) $(, gpu: $gpu:ident($($on:expr),*))?) => {
        match ($x.device(), $x.dtype()) {
            $((Device::Cuda(device), DType::F32) => gpu::$gpu(&device, $($on),*),)?
            (Device::Cpu, DType::F64) => $f::<f64>($($arg),*),
            (Device::Cpu, DType::F32) => $f::<f32>($($arg),*),
            (device, dtype) => Err(Error::device($what, format!("not available for {dtype} on {device}"))),
        }
    };
}

/// `op(a) op(b)` for every matrix of the batch.
///
/// # Errors
/// Operands that are no batches of square matrices of one shape, type and device, in `f64`, `f32` or a type the device knows; a
/// failed launch.
pub fn product(a: &Tensor, ta: bool, b: &Tensor, tb: bool) -> Result<Tensor> {
    let (k, n) = same("product", a, &[b])?;
    if !a.device().is_cpu() || k == 1 || n > SMALL {
        return matmul::product(a, ta, b, tb, false, a.dtype());
    }
    fn go<T: Real>(a: &Tensor, ta: bool, b: &Tensor, tb: bool, n: usize) -> Result<Tensor> {
        let mut y = vec![T::ZERO; a.len()];
        let (sa, sb) = (Strides::new(n, ta), Strides::new(n, tb));
        let (x, z) = (a.as_slice::<T>()?, b.as_slice::<T>()?);
        y.par_chunks_mut(n * n).zip(x.par_chunks(n * n)).zip(z.par_chunks(n * n)).for_each(|((y, a), b)| {
            cpu::gemm((n, n, n), y, Strides::new(n, false), T::ZERO, a, sa, b, sb, T::ONE, false);
        });
        Tensor::from_vec(y, a.shape())
    }
    on_cpu!("product", a, go(a, ta, b, tb, n))
}

/// What a product of `f32` matrices keeps of its operands where that makes it faster (large matrices on a GPU).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Digits {
    /// 22 bits below the largest value: normwise errors near those of `f32` sums.
    Most,
    /// 11 bits: for corrections, whose own errors are corrected again or do not matter.
    Few,
}

/// [`product`], of rounded operands where that makes it faster.
///
/// # Errors
/// Operands that are no batches of square matrices of one shape, type and device, in `f64`, `f32` or a type the device knows; a
/// failed launch.
pub fn rounded_product(a: &Tensor, ta: bool, b: &Tensor, tb: bool, digits: Digits) -> Result<Tensor> {
    let (_, n) = same("product", a, &[b])?;
    match a.device() {
        Device::Cuda(device) if a.dtype() == DType::F32 && gpu::splits(n) => gpu::split_product(&device, a, ta, b, tb, digits),
        _ => product(a, ta, b, tb),
    }
}

/// `alpha xᵀ + beta z` for every matrix of the batch.
///
/// # Errors
/// Operands that are no batches of square matrices of one shape, type and device, in `f64`, `f32` or a type the device knows; a
/// failed launch.
pub fn transpose_axpby(alpha: f64, x: &Tensor, beta: f64, z: Option<&Tensor>) -> Result<Tensor> {
    let (_, n) = same("transpose_axpby", x, z.as_slice())?;
    fn go<T: Real>(alpha: f64, x: &Tensor, beta: f64, z: Option<&Tensor>, n: usize) -> Result<Tensor> {
        let (alpha, beta) = (T::from_f64(alpha), T::from_f64(beta));
        let shape = x.shape();
        let x = x.as_slice::<T>()?;
        let mut y = match z {
            Some(z) => z.to_vec::<T>()?,
            None => vec![T::ZERO; x.len()],
        };
        // A band of rows at a time, read in tiles.
        y.par_chunks_mut(TILE * n).enumerate().for_each(|(band, y)| {
            // Bands may straddle two matrices: every row finds its own.
            for first in (0..n).step_by(TILE) {
                for (i, row) in y.chunks_mut(n).enumerate() {
                    let (matrix, i) = ((band * TILE + i) / n, (band * TILE + i) % n);
                    let x = &x[matrix * n * n..][..n * n];
                    for j in first..(first + TILE).min(n) {
                        row[j] = alpha * x[j * n + i] + beta * row[j];
                    }
                }
            }
        });
        Tensor::from_vec(y, shape)
    }
    on_cpu!("transpose_axpby", x, go(alpha, x, beta, z, n), gpu: transpose_axpby(alpha, x, beta, z))
}

/// `a − aᵀ` for every matrix of the batch: exactly skew.
///
/// # Errors
/// Operands that are no batches of square matrices of one shape, type and device, in `f64`, `f32` or a type the device knows; a
/// failed launch.
pub fn skew(a: &Tensor) -> Result<Tensor> {
    transpose_axpby(-1.0, a, 1.0, Some(a))
}

/// Every row divided by (its 2-norm + 1e-8).
///
/// # Errors
/// Operands that are no batches of square matrices of one shape, type and device, in `f64`, `f32` or a type the device knows; a
/// failed launch.
pub fn normalize_rows(x: Tensor) -> Result<Tensor> {
    let (_, n) = same("normalize_rows", &x, &[])?;
    fn go<T: Real>(x: Tensor, n: usize) -> Result<Tensor> {
        let shape = x.shape().to_vec();
        let mut y = x.into_vec::<T>()?;
        y.par_chunks_mut(n).for_each(|row| {
            let norm = row.iter().map(|x| x.to_f64() * x.to_f64()).sum::<f64>().sqrt();
            row.iter_mut().for_each(|x| *x = T::from_f64(x.to_f64() / (norm + TINY)));
        });
        Tensor::from_vec(y, shape)
    }
    on_cpu!("normalize_rows", x, go(x, n), gpu: normalize_rows(&x))
}

/// `min(lr, 1 / (‖w‖₁ + 1e-8))` for every matrix of the batch, `[k]`; ‖·‖₁ is the largest column sum of |·|. NaN where w has one.
///
/// # Errors
/// Operands that are no batches of square matrices of one shape, type and device, in `f64`, `f32` or a type the device knows; a
/// failed launch.
pub fn step_size(w: &Tensor, lr: f64) -> Result<Tensor> {
    let (k, n) = same("step_size", w, &[])?;
    fn go<T: Real>(w: &Tensor, lr: f64, k: usize, n: usize) -> Result<Tensor> {
        let of = |w: &[T]| {
            let mut sums = vec![0f64; n];
            w.chunks(n).for_each(|row| sums.iter_mut().zip(row).for_each(|(s, w)| *s += w.to_f64().abs()));
            let norm = sums.into_iter().fold(0f64, |m, s| if s > m || s.is_nan() { s } else { m });
            let bound = 1.0 / (norm + TINY);
            T::from_f64(if bound > lr { lr } else { bound })
        };
        Tensor::from_vec(w.as_slice::<T>()?.par_chunks(n * n).map(of).collect(), [k])
    }
    on_cpu!("step_size", w, go(w, lr, k, n), gpu: step_size(w, lr))
}

/// `a + factor · alpha[b] · x` for every matrix b of the batch; 0 for no `a`.
///
/// # Errors
/// Operands that are no batches of square matrices of one shape, type and device, in `f64`, `f32` or a type the device knows; a
/// failed launch.
pub fn add_scaled(a: Option<Tensor>, alpha: &Tensor, factor: f64, x: &Tensor) -> Result<Tensor> {
    let (k, n) = same("add_scaled", x, a.as_ref().as_slice())?;
    if alpha.shape() != [k] || alpha.dtype() != x.dtype() {
        return Err(Error::shape("add_scaled: alpha", format!("[{k}] of {}", x.dtype()), alpha.shape()));
    }
    fn go<T: Real>(a: Option<Tensor>, alpha: &Tensor, factor: f64, x: &Tensor, n: usize) -> Result<Tensor> {
        let mut y = match a {
            Some(a) => a.into_vec::<T>()?,
            None => vec![T::ZERO; x.len()],
        };
        let shape = x.shape();
        let alpha = alpha.as_slice::<T>()?;
        let x = x.as_slice::<T>()?;
        y.par_chunks_mut(n).zip(x.par_chunks(n)).enumerate().for_each(|(row, (y, x))| {
            let s = T::from_f64(factor * alpha[row / n].to_f64());
            y.iter_mut().zip(x).for_each(|(y, &x)| *y = *y + s * x);
        });
        Tensor::from_vec(y, shape)
    }
    on_cpu!("add_scaled", x, go(a, alpha, factor, x, n), gpu: add_scaled(a.as_ref(), alpha, factor, x))
}

/// The residual `E = I − xᵀx`, computed in `f64` and rounded to the type of x, and max|E| of every matrix of the batch.
///
/// Rows or columns would do as well; in `f32` a perfect rotation already reads 2.7e-6 at n = 4096, hence the `f64`.
///
/// # Errors
/// Operands that are no batches of square matrices of one shape, type and device, in `f64`, `f32` or a type the device knows; a
/// failed launch.
pub fn gram_residual(x: &Tensor) -> Result<(Tensor, Vec<f64>)> {
    let (_, n) = same("gram_residual", x, &[])?;
    if let Device::Cuda(device) = x.device() {
        return gpu::gram_residual(&device, x);
    }
    let wide = x.to_dtype(DType::F64)?;
    let mut e = product(&wide, true, &wide, false)?.into_vec::<f64>()?;
    let of = |(i, row): (usize, &mut [f64])| {
        row.iter_mut().for_each(|g| *g = -*g);
        row[i % n] += 1.0;
        // NaN must not hide behind a maximum.
        row.iter().fold(0f64, |m, e| if e.abs() > m || e.is_nan() { e.abs() } else { m })
    };
    let rows: Vec<f64> = e.par_chunks_mut(n).enumerate().map(of).collect();
    let largest = |m: f64, &e: &f64| if e > m || e.is_nan() { e } else { m };
    let errors = rows.chunks(n).map(|rows| rows.iter().fold(0f64, largest)).collect();
    Ok((Tensor::from_vec(e, x.shape())?.to_dtype(x.dtype())?, errors))
}

/// Newton–Schulz steps `x ← x + ½ x (I − xᵀx)` until max|xᵀx − I| ≤ `tolerance` for every matrix; returns the audited errors.
/// Converges quadratically from any x with singular values in (0, √3) (Björck & Bowie 1971).
///
/// # Errors
/// [`Error::Numeric`] when it does not get there: x is far from orthogonal or not finite.
pub fn orthonormalize(x: Tensor, tolerance: f64) -> Result<(Tensor, Vec<f64>)> {
    const MOST: usize = 30;
    let mut x = x;
    let half = Tensor::from_vec(vec![0.5; dims("orthonormalize", &x)?.0], [x.shape()[0]])?;
    let half = half.to_dtype(x.dtype())?.to_device(&x.device())?;
    let mut steps = 0;
    loop {
        let (e, errors) = gram_residual(&x)?;
        if errors.iter().all(|&e| e <= tolerance) {
            return Ok((x, errors));
        }
        let worst = largest(&errors);
        if steps == MOST || !worst.is_finite() {
            let message = format!("max|RᵀR − I| = {worst:.1e} after {steps} Newton–Schulz steps");
            return Err(Error::numeric("re-orthonormalisation", message));
        }
        let correction = rounded_product(&x, false, &e, false, Digits::Few)?;
        x = add_scaled(Some(x), &half, 1.0, &correction)?;
        steps += 1;
    }
}

/// The mean of the squares of every matrix of the batch, summed in `f64`, on the host.
///
/// # Errors
/// Operands that are no batches of square matrices of one shape, type and device, in `f64`, `f32` or a type the device knows; a
/// failed launch.
pub fn mean_squares(x: &Tensor) -> Result<Vec<f64>> {
    let (_, n) = same("mean_squares", x, &[])?;
    fn go<T: Real>(x: &Tensor, n: usize) -> Result<Vec<f64>> {
        let of = |x: &[T]| x.iter().map(|x| x.to_f64() * x.to_f64()).sum::<f64>() / (n * n) as f64;
        Ok(x.as_slice::<T>()?.par_chunks(n * n).map(of).collect())
    }
    on_cpu!("mean_squares", x, go(x, n), gpu: mean_squares(x))
}

/// What is below the diagonal of every matrix of the batch; zeros elsewhere.
///
/// # Errors
/// Operands that are no batches of square matrices of one shape, type and device, in `f64`, `f32` or a type the device knows; a
/// failed launch.
pub fn strictly_lower(x: &Tensor) -> Result<Tensor> {
    let (_, n) = same("strictly_lower", x, &[])?;
    fn go<T: Real>(x: &Tensor, n: usize) -> Result<Tensor> {
        let mut y = x.to_vec::<T>()?;
        y.par_chunks_mut(n).enumerate().for_each(|(row, y)| y[row % n..].fill(T::ZERO));
        Tensor::from_vec(y, x.shape())
    }
    on_cpu!("strictly_lower", x, go(x, n), gpu: strictly_lower(x))
}

/// Adam's statistics of one step (Kingma & Ba 2015), elementwise: `m ← β₁m + (1 − β₁)g`, `v ← β₂v + (1 − β₂)g²`; returns m, v and the
/// direction `(m / c₁) / (√(v / c₂) + ε)`. `betas` are β₁ and β₂, `corrections` c₁ and c₂.
///
/// # Errors
/// Tensors of different shapes, types or devices; a failed launch.
pub fn adam(m: &Tensor, v: &Tensor, g: &Tensor, betas: [f64; 2], corrections: [f64; 2], epsilon: f64) -> Result<[Tensor; 3]> {
    alike("adam", m, &[v, g])?;
    type Constants = ([f64; 2], [f64; 2], f64);
    fn go<T: Real>(m: &Tensor, v: &Tensor, g: &Tensor, (b, c, epsilon): Constants) -> Result<[Tensor; 3]> {
        let shape = m.shape().to_vec();
        let (mut m, mut v, mut d) = (m.to_vec::<T>()?, v.to_vec::<T>()?, g.to_vec::<T>()?);
        m.par_iter_mut().zip(&mut v).zip(&mut d).for_each(|((m, v), d)| {
            let g = d.to_f64();
            *m = T::from_f64(b[0] * m.to_f64() + (1.0 - b[0]) * g);
            *v = T::from_f64(b[1] * v.to_f64() + (1.0 - b[1]) * g * g);
            *d = T::from_f64(m.to_f64() / c[0] / ((v.to_f64() / c[1]).sqrt() + epsilon));
        });
        Ok([Tensor::from_vec(m, shape.clone())?, Tensor::from_vec(v, shape.clone())?, Tensor::from_vec(d, shape)?])
    }
    let constants = (betas, corrections, epsilon);
    on_cpu!("adam", m, go(m, v, g, constants), gpu: adam(m, v, g, betas, corrections, epsilon))
}

/// `x = Q R` with R upper triangular and a positive diagonal: (Q, R⁻¹). Cholesky–QR done twice (Yamamoto et al. 2015): R from
/// `xᵀx = RᵀR`. Products run where x is, with the Gram matrix in `f64`; the triangular factor is found on the host in `f64`.
///
/// # Errors
/// [`Error::Numeric`] where x is singular, not finite, or of a condition number beyond about 1e3 in `f32`, 1e7 in `f64`.
pub fn cholesky_qr(x: &Tensor) -> Result<(Tensor, Tensor)> {
    let (_, n) = same("cholesky_qr", x, &[])?;
    let once = |x: &Tensor| -> Result<(Tensor, Tensor)> {
        let residual = gram_residual(x)?.0.to_f64_vec()?;
        let invert = |e: &[f64]| -> Result<Vec<f64>> {
            let gram = e.iter().enumerate().map(|(i, e)| f64::from(u8::from(i % (n + 1) == 0)) - e).collect::<Vec<_>>();
            let lower = cholesky(&gram, n).ok_or_else(|| {
                Error::numeric("QR factorisation", "the matrix is not finite, or too near a singular one for its type")
            })?;
            Ok(transpose(&invert_lower(&lower, n), n))
        };
        let inverse = residual.par_chunks(n * n).map(invert).collect::<Result<Vec<_>>>()?.concat();
        let inverse = Tensor::from_vec(inverse, x.shape())?.to_dtype(x.dtype())?.to_device(&x.device())?;
        Ok((product(x, false, &inverse, false)?, inverse))
    };
    let (q, first) = once(x)?;
    let (q, second) = once(&q)?;
    Ok((q, product(&first, false, &second, false)?))
}

/// `1 / ‖x‖₁` of every matrix of the batch on the host, ‖·‖₁ the largest column sum of |·|; NaN where x has one.
///
/// # Errors
/// Operands that are no batches of square matrices of one shape, type and device, in `f64`, `f32` or a type the device knows; a
/// failed launch.
pub fn inverse_norms(x: &Tensor) -> Result<Vec<f64>> {
    step_size(x, f64::from(f32::MAX))?.to_f64_vec()
}

/// What steps keep max|XᵀX − I| within for parameters of the type of x: 1e-6, or 1e-12 in `f64`.
pub fn tolerance(x: &Tensor) -> f64 {
    if x.dtype() == DType::F64 { F64_TOLERANCE } else { F32_TOLERANCE }
}

/// The largest of some errors; NaN if any is.
pub fn largest(errors: &[f64]) -> f64 {
    errors.iter().fold(0f64, |m, &e| if e > m || e.is_nan() { e } else { m })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::randn;

    #[test]
    fn primitives_by_their_definition() {
        for (k, n) in [(1, 1), (3, 5), (2, 33), (5, 64)] {
            let (a, b) = (randn([k, n, n], 1), randn([k, n, n], 2));
            let at = |t: &Tensor, b: usize, i: usize, j: usize| t.as_slice::<f64>().unwrap()[(b * n + i) * n + j];
            let w = skew(&a).unwrap();
            let t = transpose_axpby(0.5, &a, 2.0, Some(&b)).unwrap();
            let p = product(&a, true, &b, false).unwrap();
            let alpha = step_size(&a, 0.01).unwrap();
            let s = add_scaled(Some(a.clone()), &alpha, 0.5, &b).unwrap();
            let (e, errors) = gram_residual(&a).unwrap();
            for (m, error) in errors.iter().enumerate() {
                let norm = (0..n).map(|j| (0..n).map(|i| at(&a, m, i, j).abs()).sum::<f64>()).fold(0.0, f64::max);
                let step = alpha.as_slice::<f64>().unwrap()[m];
                assert!((step - 0.01f64.min(1.0 / (norm + 1e-8))).abs() < 1e-15);
                let mut worst = 0f64;
                for i in 0..n {
                    for j in 0..n {
                        assert_eq!(at(&w, m, i, j), at(&a, m, i, j) - at(&a, m, j, i));
                        assert!((at(&t, m, i, j) - (0.5 * at(&a, m, j, i) + 2.0 * at(&b, m, i, j))).abs() < 1e-14);
                        let dot: f64 = (0..n).map(|l| at(&a, m, l, i) * at(&b, m, l, j)).sum();
                        assert!((at(&p, m, i, j) - dot).abs() < 1e-12);
                        assert!((at(&s, m, i, j) - (at(&a, m, i, j) + 0.5 * step * at(&b, m, i, j))).abs() < 1e-14);
                        let gram: f64 = (0..n).map(|l| at(&a, m, l, i) * at(&a, m, l, j)).sum();
                        let r = f64::from(u8::from(i == j)) - gram;
                        assert!((at(&e, m, i, j) - r).abs() < 1e-12);
                        worst = worst.max(r.abs());
                    }
                }
                assert!((error - worst).abs() < 1e-12);
            }
        }
    }

    #[test]
    fn statistics_by_their_definition() {
        for (k, n) in [(1, 1), (3, 5), (2, 33)] {
            let (a, b) = (randn([k, n, n], 1), randn([k, n, n], 2));
            let lower = strictly_lower(&a).unwrap();
            for (i, (l, a)) in lower.to_f64_vec().unwrap().iter().zip(a.to_f64_vec().unwrap()).enumerate() {
                assert_eq!(*l, if i % n < i / n % n { a } else { 0.0 });
            }
            for (mean, a) in mean_squares(&a).unwrap().iter().zip(a.to_f64_vec().unwrap().chunks(n * n)) {
                assert!((mean - a.iter().map(|a| a * a).sum::<f64>() / (n * n) as f64).abs() < 1e-12);
            }
            let v = Tensor::from_vec(vec![0.25; k * n * n], [k, n, n]).unwrap();
            let [m, v, d] = adam(&b, &v, &a, [0.9, 0.99], [0.5, 0.75], 1e-3).unwrap().map(|t| t.to_f64_vec().unwrap());
            for (i, (a, b)) in a.to_f64_vec().unwrap().iter().zip(b.to_f64_vec().unwrap()).enumerate() {
                assert!((m[i] - (0.9 * b + 0.1 * a)).abs() < 1e-14);
                assert!((v[i] - (0.2475 + 0.01 * a * a)).abs() < 1e-14);
                assert!((d[i] - (m[i] / 0.5) / ((v[i] / 0.75).sqrt() + 1e-3)).abs() < 1e-13);
            }
        }
    }

    #[test]
    fn cholesky_qr_is_householder_qr() {
        for (k, n) in [(1, 1), (3, 5), (2, 64)] {
            let mut x = randn([k, n, n], 3).into_vec::<f64>().unwrap();
            x.iter_mut().enumerate().for_each(|(i, x)| *x = *x / n as f64 + if i % (n * n) % (n + 1) == 0 { 1.5 } else { 0.0 });
            let x = Tensor::from_vec(x, [k, n, n]).unwrap();
            for (dtype, bound) in [(DType::F64, 1e-13), (DType::F32, 2e-6)] {
                let (q, inverse) = cholesky_qr(&x.to_dtype(dtype).unwrap()).unwrap();
                for (i, x) in x.to_f64_vec().unwrap().chunks(n * n).enumerate() {
                    let (want, r) = factor::qr(x, n);
                    let eye = Tensor::eye(n, DType::F64).unwrap().into_vec::<f64>().unwrap();
                    let rr = matmul::reference(&r, false, &inverse.index(i).unwrap().to_f64_vec().unwrap(), false, (n, n, n));
                    let off = |a: &[f64], b: &[f64]| a.iter().zip(b).fold(0f64, |m, (a, b)| m.max((a - b).abs()));
                    assert!(off(&q.index(i).unwrap().to_f64_vec().unwrap(), &want) < bound, "Q of {n} in {dtype}");
                    assert!(off(&rr, &eye) < bound, "R R⁻¹ of {n} in {dtype}");
                }
            }
        }
        assert!(cholesky_qr(&Tensor::from_vec(vec![1.0, 2.0, 2.0, 4.0], [1, 2, 2]).unwrap()).is_err());
        assert!(cholesky_qr(&Tensor::from_vec(vec![f64::NAN; 4], [1, 2, 2]).unwrap()).is_err());
    }

    #[test]
    fn nan_is_seen() {
        let x = Tensor::from_vec(vec![1.0, f64::NAN, 0.0, 1.0], [1, 2, 2]).unwrap();
        assert!(step_size(&x, 1.0).unwrap().item().unwrap().is_nan());
        assert!(gram_residual(&x).unwrap().1[0].is_nan());
        assert!(orthonormalize(x, 1e-6).is_err());
    }
}
