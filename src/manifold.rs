//! The orthogonal group O(n), batched: tensors `[k, n, n]` of `f64` or `f32`, every matrix X with `XᵀX = I`.
//!
//! Tangent vectors at X are the matrices XΩ with Ω skew. The metric is the Euclidean one, `⟨A, B⟩ = tr(AᵀB)`, inherited from the
//! space of all matrices; with it the Riemannian gradient of a function with Euclidean gradient G is `X · ½(XᵀG − GᵀX)`: zero
//! exactly when XᵀG is symmetric. Absil, Mahony & Sepulchre 2008.
//!
//! Another way back to the manifold is another [`Retraction`]; another manifold is another [`Manifold`].

use rand::{RngExt, SeedableRng};
use rayon::prelude::*;

use crate::hadamard::Hadamard;
use crate::linalg::factor::{Lu, qr, transpose};
use crate::linalg::{self, dims, gram_residual, largest, orthonormalize, product, same, skew};
use crate::tensor::room;
use crate::{DType, Device, Error, Result, Tensor};

/// What first-order optimisers ask of a manifold of matrices, with the metric of the surrounding space.
pub trait Manifold {
    /// For messages.
    fn name(&self) -> &str;
    /// The nearest point of the manifold.
    ///
    /// # Errors
    /// `x` is not a batch of square matrices of floats, or a factorisation fails.
    fn project_point(&self, x: &Tensor) -> Result<Tensor>;
    /// The nearest tangent vector at x.
    ///
    /// # Errors
    /// Batches of different shapes, types or devices.
    fn project_tangent(&self, x: &Tensor, z: &Tensor) -> Result<Tensor>;
    /// The tangent vector whose inner products with tangents are those of the Euclidean gradient.
    ///
    /// # Errors
    /// Batches of different shapes, types or devices.
    fn riemannian_gradient(&self, x: &Tensor, gradient: &Tensor) -> Result<Tensor> {
        self.project_tangent(x, gradient)
    }
    /// Carries a tangent vector from x to y.
    ///
    /// # Errors
    /// Batches of different shapes, types or devices.
    fn transport(&self, x: &Tensor, y: &Tensor, tangent: &Tensor) -> Result<Tensor>;
    /// `count` random points `[count, n, n]` in `f64`.
    ///
    /// # Errors
    /// A size of 0, or one too large for memory.
    fn random_point(&self, count: usize, n: usize, seed: u64) -> Result<Tensor>;
    /// How far from the manifold the worst of a batch is.
    ///
    /// # Errors
    /// `x` is not a batch of square matrices of floats.
    fn distance(&self, x: &Tensor) -> Result<f64>;
}

/// A first-order way along a tangent vector and back to the manifold: `R(x, 0) = x`, `d/dt R(x, tξ) = ξ` at t = 0.
pub trait Retraction {
    /// What it is called on the command line.
    fn name(&self) -> &str;
    /// The point reached from x along `tangent`.
    ///
    /// # Errors
    /// Batches of different shapes, types or devices; a factorisation that fails; a device that the retraction does not run on.
    fn retract(&self, x: &Tensor, tangent: &Tensor) -> Result<Tensor>;
}

/// O(n).
#[derive(Clone, Copy, Debug, Default)]
pub struct Orthogonal;

impl Manifold for Orthogonal {
    fn name(&self) -> &str {
        "orthogonal"
    }

    /// The polar factor U of X = UP: the orthogonal matrix nearest in the Frobenius norm.
    ///
    /// Newton–Schulz near the manifold; elsewhere scaled Newton, `X ← ½(γX + X⁻ᵀ/γ)` (Higham 1986), until near. All in `f64`.
    ///
    /// # Errors
    /// [`Error::Numeric`] for a singular matrix or one that is not finite.
    fn project_point(&self, x: &Tensor) -> Result<Tensor> {
        let (_, n) = same("project_point", x, &[])?;
        let y = per_matrix(x, |x| {
            let mut x = x;
            for _ in 0..100 {
                let (e, _) = gram_residual(&Tensor::from_vec(x.clone(), [1, n, n])?)?;
                if row_sum(e.as_slice()?, n) < 0.5 {
                    return orthonormalize(Tensor::from_vec(x, [1, n, n])?, TOLERANCE)?.0.into_vec();
                }
                let lu = Lu::new(&transpose(&x, n), n);
                if lu.sign() == 0.0 {
                    return Err(Error::numeric(
                        "project_point",
                        "a singular matrix, or one that is not finite, has no nearest rotation",
                    ));
                }
                let inverse = lu.solve(&identity(n));
                let norms = |x: &[f64]| row_sum(x, n) * row_sum(&transpose(x, n), n);
                let gamma = (norms(&inverse) / norms(&x)).powf(0.25);
                x.iter_mut().zip(inverse).for_each(|(x, y)| *x = 0.5 * (gamma * *x + y / gamma));
            }
            Err(Error::numeric("project_point", "no convergence: a nearly singular matrix"))
        })?;
        y.to_dtype(x.dtype())
    }

    /// `X · ½(XᵀZ − ZᵀX)`
    fn project_tangent(&self, x: &Tensor, z: &Tensor) -> Result<Tensor> {
        same("project_tangent", x, &[z])?;
        product(x, false, &angle(x, z)?, false)
    }

    /// `Y XᵀV`: the same angular velocity at Y; an isometry.
    fn transport(&self, x: &Tensor, y: &Tensor, tangent: &Tensor) -> Result<Tensor> {
        same("transport", x, &[y, tangent])?;
        product(y, false, &product(x, true, tangent, false)?, false)
    }

    /// Uniform (Haar) on O(n), determinants of both signs: the Q of Gaussian matrices, R's diagonal positive (Mezzadri 2007).
    /// Matrix i depends on the seed and i only.
    fn random_point(&self, count: usize, n: usize, seed: u64) -> Result<Tensor> {
        sizes(count, n)?;
        let values = (0..count as u64).map(|i| haar(n, seed, i)).collect::<Result<Vec<_>>>()?;
        Tensor::from_vec(values.concat(), [count, n, n])
    }

    /// [`Orthogonal::orthogonality_error`]
    fn distance(&self, x: &Tensor) -> Result<f64> {
        self.orthogonality_error(x)
    }
}

/// max|XᵀX − I| of what this file calls orthogonal in `f64`.
const TOLERANCE: f64 = 1e-13;

impl Orthogonal {
    /// max|XᵀX − I| over the batch, in `f64`.
    ///
    /// # Errors
    /// `x` is not a batch of square matrices of floats.
    pub fn orthogonality_error(&self, x: &Tensor) -> Result<f64> {
        Ok(largest(&gram_residual(&x.to_dtype(DType::F64)?)?.1))
    }

    /// X = QR by Householder reflections in `f64`, R upper triangular with a non-negative diagonal.
    ///
    /// # Errors
    /// `x` is not a batch of square matrices of floats.
    pub fn qr(&self, x: &Tensor) -> Result<(Tensor, Tensor)> {
        let (_, n) = same("qr", x, &[])?;
        if x.to_f64_vec()?.iter().any(|x| !x.is_finite()) {
            return Err(Error::numeric("qr", "the matrix is not finite"));
        }
        let mut r = vec![];
        let q = per_matrix_serial(x, |x| {
            let (q, upper) = qr(&x, n);
            r.extend(upper);
            Ok(q)
        })?;
        Ok((q.to_dtype(x.dtype())?, Tensor::from_vec(r, x.shape())?.to_dtype(x.dtype())?))
    }

    /// The sign of every determinant: 1 for rotations, −1 for reflections, 0 for singular matrices.
    ///
    /// # Errors
    /// `x` is not a batch of square matrices of floats.
    pub fn determinant_signs(&self, x: &Tensor) -> Result<Vec<f64>> {
        let (_, n) = dims("determinant_signs", x)?;
        let x = x.to_f64_vec()?;
        Ok(x.par_chunks(n * n).map(|x| Lu::new(x, n).sign()).collect())
    }

    /// `count` random Hadamard matrices `diag(±1) Hᵀ` in `f64`; block-diagonal where no Hadamard matrix of size n is known.
    ///
    /// # Errors
    /// A size of 0, or one too large for memory.
    pub fn random_hadamard(&self, count: usize, n: usize, seed: u64) -> Result<Tensor> {
        sizes(count, n)?;
        let values = (0..count as u64).map(|i| signed_hadamard(n, seed, i)).collect::<Result<Vec<_>>>()?;
        Tensor::from_vec(values.concat(), [count, n, n])
    }

    /// Moves from x along a tangent vector.
    ///
    /// # Errors
    /// Those of [`Retraction::retract`].
    pub fn retract(&self, x: &Tensor, tangent: &Tensor, retraction: &dyn Retraction) -> Result<Tensor> {
        retraction.retract(x, tangent)
    }
}

/// Ω = ½(XᵀZ − ZᵀX): the skew matrix with XΩ the tangent part of Z.
fn angle(x: &Tensor, z: &Tensor) -> Result<Tensor> {
    skew(&product(x, true, z, false)?)?.scale(0.5)
}

/// The exact Cayley transform `X (I − ½Ω)⁻¹ (I + ½Ω)`, by LU in `f64`.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cayley;

impl Retraction for Cayley {
    fn name(&self) -> &str {
        "cayley"
    }
    fn retract(&self, x: &Tensor, tangent: &Tensor) -> Result<Tensor> {
        let (_, n) = same("Cayley retraction", x, &[tangent])?;
        let (wide, tangent) = (x.to_dtype(DType::F64)?, tangent.to_dtype(DType::F64)?);
        let z = per_matrix(&angle(&wide, &tangent)?, |omega| {
            let shifted = |sign: f64| -> Vec<f64> { omega.iter().zip(identity(n)).map(|(w, i)| i + sign * 0.5 * w).collect() };
            Ok(Lu::new(&shifted(-1.0), n).solve(&shifted(1.0))) // I − ½Ω has no eigenvalue below 1 in modulus
        })?;
        product(&wide, false, &z, false)?.to_dtype(x.dtype())
    }
}

/// The Cayley transform by fixed-point iterations `Y ← X + ½(X + Y)Ω` from `Y = X + XΩ`, then Newton–Schulz back to the manifold.
/// For ‖Ω‖₂ below about 1; products only.
#[derive(Clone, Copy, Debug)]
pub struct CayleyFixedPoint {
    /// Number of iterations.
    pub iterations: usize,
}

impl Retraction for CayleyFixedPoint {
    fn name(&self) -> &str {
        "cayley-fixed-point"
    }
    fn retract(&self, x: &Tensor, tangent: &Tensor) -> Result<Tensor> {
        same("Cayley fixed point", x, &[tangent])?;
        let half = angle(x, tangent)?.scale(0.5)?;
        let mut y = x.clone();
        for _ in 0..self.iterations + 1 {
            let sum = Tensor::axpby(1.0, x.clone(), 1.0, y)?;
            y = Tensor::axpby(1.0, x.clone(), 1.0, product(&sum, false, &half, false)?)?;
        }
        Ok(orthonormalize(y, tolerance(x))?.0)
    }
}

/// What re-orthonormalisation aims at in the type of x.
fn tolerance(x: &Tensor) -> f64 {
    if x.dtype() == DType::F64 { TOLERANCE } else { linalg::F32_TOLERANCE }
}

/// The Q factor of X + ξ, R's diagonal positive: by Householder reflections on the CPU, by [`linalg::cholesky_qr`] on a GPU.
#[derive(Clone, Copy, Debug, Default)]
pub struct Qr;

impl Retraction for Qr {
    fn name(&self) -> &str {
        "qr"
    }
    fn retract(&self, x: &Tensor, tangent: &Tensor) -> Result<Tensor> {
        same("QR retraction", x, &[tangent])?;
        let y = Tensor::axpby(1.0, x.clone(), 1.0, tangent.clone())?;
        if y.device().is_cpu() { Ok(Orthogonal.qr(&y)?.0) } else { Ok(linalg::cholesky_qr(&y)?.0) }
    }
}

/// The polar factor of X + ξ: the nearest orthogonal matrix. By Newton–Schulz, which is products only and runs where x is, unless ξ is
/// too long for it (‖ξ‖₂ ≥ √2): then by [`Orthogonal::project_point`], on the CPU.
#[derive(Clone, Copy, Debug, Default)]
pub struct Polar;

impl Retraction for Polar {
    fn name(&self) -> &str {
        "polar"
    }
    fn retract(&self, x: &Tensor, tangent: &Tensor) -> Result<Tensor> {
        same("polar retraction", x, &[tangent])?;
        let y = Tensor::axpby(1.0, x.clone(), 1.0, tangent.clone())?;
        // Singular values σ converge to 1 where |1 − σ²| < 2; beyond √3 some reach −1.
        let near = linalg::inverse_norms(&gram_residual(&y)?.0)?.into_iter().all(|inverse| inverse > 1.0 / 1.9);
        match near {
            true => Ok(orthonormalize(y, tolerance(x))?.0),
            false => Orthogonal.project_point(&y.to_device(&Device::Cpu)?)?.to_device(&x.device()),
        }
    }
}

/// The geodesic `X exp(Ω)`: what the others approximate. By Taylor's series of order 12 on `Ω/2ˢ`, s so that a row of it sums to at
/// most ¼, and s squarings; products only.
#[derive(Clone, Copy, Debug, Default)]
pub struct Exponential;

impl Retraction for Exponential {
    fn name(&self) -> &str {
        "exponential"
    }
    fn retract(&self, x: &Tensor, tangent: &Tensor) -> Result<Tensor> {
        let (count, n) = same("exponential retraction", x, &[tangent])?;
        let omega = angle(x, tangent)?;
        let longest = row_sum(&omega.to_f64_vec()?, n);
        if !longest.is_finite() {
            return Err(Error::numeric("exponential retraction", "the tangent vector is not finite"));
        }
        let halvings = (4.0 * longest).log2().ceil().max(0.0) as i32;
        let one = Tensor::from_vec(identity(n).repeat(count), x.shape())?.to_dtype(x.dtype())?.to_device(&x.device())?;
        let part = omega.scale(0.5f64.powi(halvings))?;
        let mut e = one.clone(); // 1 + A(1 + A/2(1 + A/3(…)))
        for k in (1..=12).rev() {
            e = Tensor::axpby(1.0, one.clone(), 1.0 / f64::from(k), product(&part, false, &e, false)?)?;
        }
        for _ in 0..halvings {
            e = product(&e, false, &e, false)?;
        }
        Ok(orthonormalize(product(x, false, &e, false)?, tolerance(x))?.0)
    }
}

/// Every retraction of this crate.
pub fn retractions() -> Vec<Box<dyn Retraction>> {
    vec![Box::new(Cayley), Box::new(CayleyFixedPoint { iterations: 8 }), Box::new(Qr), Box::new(Polar), Box::new(Exponential)]
}

/// A retraction by its name.
///
/// # Errors
/// [`Error::Argument`] with the names there are, for another one.
pub fn retraction(name: &str) -> Result<Box<dyn Retraction>> {
    let names: Vec<String> = retractions().iter().map(|r| r.name().to_string()).collect();
    let found = retractions().into_iter().find(|r| r.name() == name);
    found.ok_or_else(|| Error::argument("retraction", format!("expected one of {}, got {name:?}", names.join(", "))))
}

/// Checks the sizes of random points before any is made.
fn sizes(count: usize, n: usize) -> Result<()> {
    if n == 0 {
        return Err(Error::argument("random point", "expected matrices of at least 1 x 1, got n = 0"));
    }
    room("random point", &[count, n, n], DType::F64).map(drop)
}

/// Random numbers for matrix `index` of a seed: streams of one generator, so that matrices are independent.
pub(crate) fn generator(seed: u64, index: u64) -> rand_chacha::ChaCha8Rng {
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(index);
    rng
}

/// A uniformly random orthogonal matrix.
pub(crate) fn haar(n: usize, seed: u64, index: u64) -> Result<Vec<f64>> {
    let mut rng = generator(seed, index);
    let gaussian: Vec<f64> = (0..n * n).map(|_| crate::random::normal(&mut rng)).collect();
    Ok(qr(&gaussian, n).0)
}

/// `diag(±1) Hᵀ` with random signs.
pub(crate) fn signed_hadamard(n: usize, seed: u64, index: u64) -> Result<Vec<f64>> {
    let mut rng = generator(seed, index);
    let mut r = transpose(&Hadamard::new(n)?.dense()?, n);
    for row in r.chunks_mut(n) {
        if rng.random::<bool>() {
            row.iter_mut().for_each(|x| *x = -*x);
        }
    }
    Ok(r)
}

/// [`signed_hadamard`] of `width`, as often as it fits, along the diagonal of an n×n matrix; each block has signs of its own.
pub(crate) fn signed_block_hadamard(n: usize, width: usize, seed: u64, index: u64) -> Result<Vec<f64>> {
    let mut r = vec![0.0; n * n];
    for at in (0..n).step_by(width) {
        let block = signed_hadamard(width, seed, (index << 32) + at as u64)?;
        for (row, block) in r[at * n..].chunks_mut(n).zip(block.chunks(width)) {
            row[at..at + width].copy_from_slice(block);
        }
    }
    Ok(r)
}

fn identity(n: usize) -> Vec<f64> {
    let mut v = vec![0.0; n * n];
    v.iter_mut().step_by(n + 1).for_each(|x| *x = 1.0);
    v
}

/// Largest row sum of |·|: a bound of the 2-norm of a symmetric matrix.
fn row_sum(x: &[f64], n: usize) -> f64 {
    let sums: Vec<f64> = x.chunks(n).map(|row| row.iter().map(|x| x.abs()).sum()).collect();
    largest(&sums)
}

/// `f` of every matrix, widened to `f64`, side by side.
fn per_matrix(x: &Tensor, f: impl Fn(Vec<f64>) -> Result<Vec<f64>> + Sync) -> Result<Tensor> {
    let (_, n) = dims("manifold", x)?;
    let wide = x.to_f64_vec()?;
    let parts = wide.par_chunks(n * n).map(|x| f(x.to_vec())).collect::<Result<Vec<_>>>()?;
    Tensor::from_vec(parts.concat(), x.shape())
}

/// [`per_matrix`] one after the other.
fn per_matrix_serial(x: &Tensor, mut f: impl FnMut(Vec<f64>) -> Result<Vec<f64>>) -> Result<Tensor> {
    let (_, n) = dims("manifold", x)?;
    let wide = x.to_f64_vec()?;
    let parts = wide.chunks(n * n).map(|x| f(x.to_vec())).collect::<Result<Vec<_>>>()?;
    Tensor::from_vec(parts.concat(), x.shape())
}
