//! Laws that every retraction, optimiser, quantiser and Hadamard map must obey, as functions of plain sizes and seeds: run them on
//! your own types.
//!
//! ```
//! use spinquant::{laws, manifold::{Orthogonal, Retraction}, Result, Tensor};
//!
//! struct Mine; // the QR retraction, say
//! impl Retraction for Mine {
//!     fn name(&self) -> &str { "mine" }
//!     fn retract(&self, x: &Tensor, tangent: &Tensor) -> Result<Tensor> {
//!         let sum = Tensor::axpby(1.0, x.clone(), 1.0, tangent.clone())?;
//!         Ok(Orthogonal.qr(&sum)?.0)
//!     }
//! }
//! laws::retraction(&Mine, 7, 0)?;
//! # Ok::<(), spinquant::Error>(())
//! ```

use crate::hadamard::Hadamard;
use crate::linalg::matmul;
use crate::linalg::{product, skew};
use crate::manifold::{Manifold, Orthogonal, Retraction};
use crate::ops::{fake_quant, hadamard, randn};
use crate::optim::{Optimizer, Schedule, State};
use crate::quant::QuantSpec;
use crate::{DType, Error, Result, Tensor};

/// An error unless `value <= bound`; NaN breaks every law.
fn at_most(law: &str, what: impl std::fmt::Display, value: f64, bound: f64) -> Result<()> {
    if value <= bound { Ok(()) } else { Err(Error::numeric(law, format!("{what}: {value:e}, at most {bound:e} is allowed"))) }
}

fn norm(x: &Tensor) -> Result<f64> {
    Ok(inner(x, x)?.sqrt())
}

fn inner(x: &Tensor, y: &Tensor) -> Result<f64> {
    Ok(x.to_f64_vec()?.iter().zip(y.to_f64_vec()?).map(|(x, y)| x * y).sum())
}

fn minus(x: &Tensor, y: &Tensor) -> Result<Tensor> {
    Tensor::axpby(1.0, x.clone(), -1.0, y.clone())
}

/// A random point and a tangent vector of norm 1 there (0 on O(1)).
fn tangent(n: usize, seed: u64) -> Result<(Tensor, Tensor)> {
    let x = Orthogonal.random_point(1, n, seed)?;
    let v = Orthogonal.project_tangent(&x, &randn([1, n, n], seed ^ 0x7a9))?;
    let length = norm(&v)?;
    Ok((x, if length > 0.0 { v.scale(1.0 / length)? } else { v }))
}

/// A retraction on O(n) stays on it, keeps the determinant, fixes x along 0, and moves along its tangent to first order.
///
/// # Errors
/// [`Error::Numeric`] naming the property that does not hold, and by how much; those of the retraction.
pub fn retraction(r: &dyn Retraction, n: usize, seed: u64) -> Result<()> {
    let law = format!("retraction {} at n = {n}, seed {seed}", r.name());
    let (x, v) = tangent(n, seed)?;
    for length in [0.0, 1e-3, 0.5, 0.9] {
        let y = r.retract(&x, &v.clone().scale(length)?)?;
        at_most(&law, format!("max|YᵀY − I| after {length}"), Orthogonal.orthogonality_error(&y)?, 1e-11)?;
        let signs = [&x, &y].map(|x| Orthogonal.determinant_signs(x));
        let [before, after] = signs;
        if before? != after? {
            return Err(Error::numeric(law, format!("the determinant changes sign after {length}")));
        }
        // ‖R(x, tv) − x − tv‖ ≤ t² for ‖v‖ = 1: the second fundamental form has ½‖v‖², tangential curvature at most as much.
        let straight = Tensor::axpby(1.0, x.clone(), length, v.clone())?;
        at_most(
            &law,
            format!("distance from the tangent after {length}"),
            norm(&minus(&y, &straight)?)?,
            1.5 * length * length + 1e-11,
        )?;
    }
    Ok(())
}

/// On O(n): the tangent projection is an orthogonal projection, the Riemannian gradient gives every directional derivative along
/// the manifold and vanishes for `G = X S` with S symmetric, and transport is an isometry between tangent spaces.
///
/// # Errors
/// [`Error::Numeric`] naming the property that does not hold, and by how much.
pub fn orthogonal_geometry(n: usize, seed: u64) -> Result<()> {
    let law = format!("geometry of O({n}), seed {seed}");
    let x = Orthogonal.random_point(1, n, seed)?;
    let [z, g, a] = [1, 2, 3].map(|i| randn([1, n, n], seed.wrapping_add(i)));
    let (v, tiny) = (Orthogonal.project_tangent(&x, &z)?, 1e-11 * (n * n) as f64);
    at_most(&law, "projecting twice", norm(&minus(&Orthogonal.project_tangent(&x, &v)?, &v)?)?, tiny)?;
    let grad = Orthogonal.riemannian_gradient(&x, &g)?;
    at_most(&law, "⟨grad, v⟩ − ⟨G, v⟩", (inner(&grad, &v)? - inner(&g, &v)?).abs(), tiny)?;
    let s = Tensor::axpby(2.0, a.clone(), -1.0, skew(&a)?)?; // A + Aᵀ
    let still = Orthogonal.riemannian_gradient(&x, &product(&x, false, &s, false)?)?;
    at_most(&law, "gradient for G = XS", norm(&still)?, tiny)?;
    let y = Orthogonal.random_point(1, n, seed ^ 0xff)?;
    let w = Orthogonal.transport(&x, &y, &v)?;
    at_most(&law, "length after transport", (norm(&w)? - norm(&v)?).abs(), tiny)?;
    at_most(&law, "tangency after transport", norm(&minus(&Orthogonal.project_tangent(&y, &w)?, &w)?)?, tiny)?;
    // The projection of X + small normal part is X again; of any matrix, orthogonal and nearest by the first-order condition.
    let u = Orthogonal.project_point(&z)?;
    at_most(&law, "max|UᵀU − I| of a projected point", Orthogonal.orthogonality_error(&u)?, 1e-11)?;
    let p = product(&u, true, &z, false)?;
    at_most(&law, "symmetry of UᵀZ", norm(&skew(&p)?)?, tiny)
}

/// `H Hᵀ = I` for the fast map of rows of n in a type, and its transpose undoes it.
///
/// # Errors
/// [`Error::Numeric`] where it is not; a size or type without a transform.
pub fn hadamard_is_orthonormal(n: usize, dtype: DType) -> Result<()> {
    let map = Hadamard::new(n)?;
    let worst = |x: &Tensor, y: &Tensor| -> Result<f64> {
        let d = minus(&x.to_dtype(DType::F64)?, &y.to_dtype(DType::F64)?)?.to_f64_vec()?;
        Ok(d.into_iter().fold(0f64, |m, e| if e.abs() > m || e.is_nan() { e.abs() } else { m }))
    };
    let rows = hadamard::transform(Tensor::eye(n, dtype)?, &map, false)?.to_dtype(DType::F64)?;
    let gram = matmul::product(&rows, false, &rows, true, false, DType::F64)?;
    let error = worst(&gram, &Tensor::eye(n, DType::F64)?)?;
    let law = format!("Hadamard map of {n} in {dtype}");
    at_most(&law, "max|H Hᵀ − I|", error, 8.0 * dtype.epsilon() + n as f64 * f64::EPSILON)?;
    let x = randn([3, n], n as u64).to_dtype(dtype)?;
    let back = hadamard::transform(hadamard::transform(x.clone(), &map, false)?, &map, true)?;
    at_most(&law, "max|HᵀH x − x|", worst(&back, &x)?, 32.0 * dtype.epsilon() * (n as f64).sqrt().max(4.0))
}

/// Quantising what was quantised returns the same codes on the same grid, and moves no value inside the range by more than s/2.
///
/// # Errors
/// [`Error::Numeric`] naming the value that breaks the law; those of quantising `x`.
pub fn quantizer(x: &Tensor, spec: &QuantSpec) -> Result<()> {
    let law = format!("quantiser {spec:?}");
    let q = fake_quant::quantize(x, spec)?;
    let (y, original) = (q.dequantize()?.to_f64_vec()?, x.to_f64_vec()?);
    let (scale, zero) = (q.scale.to_f64_vec()?, q.zero.to_f64_vec()?);
    let (min, max) = (f64::from(spec.min_code()), f64::from(spec.max_code()));
    let epsilon = q.scale.dtype().epsilon();
    for (i, (&y, x)) in y.iter().zip(original).enumerate() {
        let (s, z, code) = (scale[i / q.group], zero[i / q.group], f64::from(q.codes[i]));
        let again = ((y / s).round_ties_even() + z).clamp(min, max);
        at_most(&law, format!("codes of value {i} ({x:e})"), (again - code).abs(), 0.0)?;
        if (s * (min - z)..=s * (max - z)).contains(&x) {
            // z is of the size of x/s at most where 0 is in the range; elsewhere it is what the rounding is relative to.
            let rounding = 4.0 * epsilon * (x.abs() + s * (z.abs() + max));
            at_most(&law, format!("error of value {i} ({x:e}) with scale {s:e}"), (x - y).abs(), 0.5 * s + rounding)?;
        }
    }
    Ok(())
}

/// The orthogonal Procrustes problem on O(n), batch of one: `f(X) = ‖X A − B‖²_F` with known minimum (Schönemann 1966).
struct Procrustes {
    a: Tensor,
    b: Tensor,
    optimum: Tensor,
    start: Tensor,
}

impl Procrustes {
    /// Random A and a B that is a rotation of A plus a little noise; the polar factor of `B Aᵀ` is the minimiser. The start is random
    /// in its component of O(n).
    fn new(n: usize, seed: u64) -> Result<Self> {
        // A Aᵀ = D with D near 1: the rate of convergence should test the optimiser and not the problem.
        let basis = Orthogonal.random_point(1, n, seed)?;
        let diagonal: Vec<f64> =
            (0..n * n).map(|i| if i % (n + 1) == 0 { 0.8 + 0.4 * (i / n) as f64 / n as f64 } else { 0.0 }).collect();
        let a = product(&basis, false, &Tensor::from_vec(diagonal, [1, n, n])?, false)?;
        let target = Orthogonal.random_point(1, n, seed ^ 0xb0b)?;
        let b = Tensor::axpby(1.0, product(&target, false, &a, false)?, 0.02, randn([1, n, n], seed ^ 0xe))?;
        let optimum = Orthogonal.project_point(&product(&b, false, &a, true)?)?;
        let mut start = Orthogonal.random_point(1, n, seed ^ 0x57a7)?.into_vec::<f64>()?;
        let sign = |x: &Tensor| Ok::<_, Error>(Orthogonal.determinant_signs(x)?[0]);
        if sign(&Tensor::from_vec(start.clone(), [1, n, n])?)? != sign(&optimum)? {
            start[..n].iter_mut().for_each(|x| *x = -*x);
        }
        Ok(Self { a, b, optimum, start: Tensor::from_vec(start, [1, n, n])? })
    }

    fn residual(&self, x: &Tensor) -> Result<Tensor> {
        minus(&product(x, false, &self.a, false)?, &self.b)
    }

    fn value(&self, x: &Tensor) -> Result<f64> {
        Ok(norm(&self.residual(x)?)?.powi(2))
    }

    fn gradient(&self, x: &Tensor) -> Result<Tensor> {
        product(&self.residual(x)?, false, &self.a, true)?.scale(2.0)
    }
}

/// An optimiser reaches the global minimum of `‖X A − B‖²` over the component of O(n) that it starts in, for random A and a B that
/// is a rotation of A plus a little noise: the polar factor of `B Aᵀ` (Schönemann 1966). At a constant learning rate.
///
/// # Errors
/// [`Error::Numeric`] where it ends elsewhere; those of the optimiser.
pub fn procrustes(optimizer: &mut dyn Optimizer, n: usize, seed: u64, lr: f64, steps: usize) -> Result<()> {
    procrustes_scheduled(optimizer, n, seed, lr, Schedule::Constant, steps)
}

/// [`procrustes`] with a learning rate that falls: for optimisers whose steps do not shorten with the gradient.
///
/// # Errors
/// [`Error::Numeric`] where it ends elsewhere; those of the optimiser.
pub fn procrustes_scheduled(
    optimizer: &mut dyn Optimizer,
    n: usize,
    seed: u64,
    lr: f64,
    schedule: Schedule,
    steps: usize,
) -> Result<()> {
    let law = format!("Procrustes by {} at n = {n}, seed {seed}", optimizer.name());
    let problem = Procrustes::new(n, seed)?;
    let mut params = [problem.start.clone()];
    for step in 0..steps {
        if step % 50 == 0 && norm(&minus(&params[0], &problem.optimum)?)? < 1e-6 {
            break;
        }
        let gradient = problem.gradient(&params[0])?;
        optimizer.step(&mut params, vec![gradient], schedule.at(step, steps, lr))?;
    }
    let (reached, best) = (problem.value(&params[0])?, problem.value(&problem.optimum)?);
    at_most(&law, format!("minimum {best:e}, reached {reached:e}, excess"), reached - best, 1e-8 * (1.0 + best))?;
    at_most(&law, "distance from the minimiser", norm(&minus(&params[0], &problem.optimum)?)?, 1e-3)
}

/// Each of the first steps of an optimiser at a small learning rate goes down: on `‖X A − B‖²` it turns by an angle θ > 0 (the length
/// of the step over √n) and lowers the value, the first by at least a quarter of what steepest descent would over that length. `lr`
/// should be such that θ is well below 1; nothing is asked near the minimum, where the slope is no longer along the gradient.
///
/// # Errors
/// [`Error::Numeric`] with the step that does not go down; those of the optimiser.
pub fn descends(optimizer: &mut dyn Optimizer, n: usize, seed: u64, lr: f64, steps: usize) -> Result<()> {
    let law = format!("descent by {} at n = {n}, seed {seed}, lr {lr}", optimizer.name());
    let problem = Procrustes::new(n, seed)?;
    let mut params = [problem.start.clone()];
    for step in 0..steps {
        let (x, before) = (params[0].clone(), problem.value(&params[0])?);
        let gradient = problem.gradient(&x)?;
        let steepest = norm(&Orthogonal.riemannian_gradient(&x, &gradient)?)?;
        optimizer.step(&mut params, vec![gradient], lr)?;
        let (after, length) = (problem.value(&params[0])?, norm(&minus(&params[0], &x)?)?);
        let tiny = 1e-12 * (1.0 + before);
        if steepest <= 1e-3 * before.sqrt() {
            break; // there, or at a critical point: O(1) is one
        }
        // The slope is about twice the distance from the minimum: steps of a fixed angle go past it.
        if steepest <= 8.0 * length {
            break;
        }
        at_most(&law, format!("the value after step {step} ({after:e}) less that before ({before:e})"), after - before, tiny)?;
        at_most(&law, format!("the length of step {step} is {length:e}; its opposite"), -length, -f64::MIN_POSITIVE)?;
        if step == 0 {
            let (fell, least) = (before - after, 0.25 * steepest * length);
            at_most(&law, format!("fell by {fell:e}, short of a quarter of steepest descent by"), least - fell, tiny)?;
        }
    }
    Ok(())
}

/// After every step along random gradients of a given size, max|RᵀR − I| of `f32` parameters `[2, n, n]` is at most `tolerance`,
/// and the optimiser says so itself where it audits.
///
/// # Errors
/// [`Error::Numeric`] with the step that leaves the manifold; those of the optimiser.
pub fn stays_orthogonal(
    o: &mut dyn Optimizer,
    n: usize,
    seed: u64,
    size: f64,
    lr: f64,
    steps: u64,
    tolerance: f64,
) -> Result<()> {
    let law = format!("{} at n = {n}, lr {lr}, gradients of {size:e}", o.name());
    let mut params = [Orthogonal.random_point(2, n, seed)?.to_dtype(DType::F32)?];
    for step in 0..steps {
        let gradient = randn([2, n, n], seed ^ (step + 1)).scale(size)?.to_dtype(DType::F32)?;
        o.step(&mut params, vec![gradient], lr)?;
        let error = Orthogonal.orthogonality_error(&params[0])?;
        at_most(&law, format!("max|RᵀR − I| after step {step}"), error, tolerance)?;
        if !o.orthogonality_error().is_nan() {
            at_most(&law, "the optimiser's own audit is off by", (o.orthogonality_error() - error).abs(), 1e-12)?;
        }
    }
    Ok(())
}

/// An optimiser whose state went through a file after `steps` steps continues to the same bits. `make` makes equal optimisers.
///
/// # Errors
/// [`Error::Numeric`] where the continued run differs; those of the optimiser and of its file.
pub fn resumes(make: &dyn Fn() -> Result<Box<dyn Optimizer>>, dtype: DType, seed: u64, steps: u64) -> Result<()> {
    let start = || -> Result<Vec<Tensor>> {
        [(1, 12), (3, 4)].iter().map(|&(k, n)| Orthogonal.random_point(k, n, seed)?.to_dtype(dtype)).collect()
    };
    let advance = |o: &mut dyn Optimizer, params: &mut [Tensor], steps: std::ops::Range<u64>| -> Result<()> {
        for step in steps {
            let grads = params.iter().map(|p| randn(p.shape(), seed ^ (step << 8)).to_dtype(dtype)).collect::<Result<_>>()?;
            o.step(params, grads, 0.1)?;
        }
        Ok(())
    };
    let (mut whole, mut expected) = (make()?, start()?);
    advance(&mut *whole, &mut expected, 0..2 * steps)?;

    let (mut first, mut params) = (make()?, start()?);
    advance(&mut *first, &mut params, 0..steps)?;
    let file = tempfile::NamedTempFile::new().map_err(Error::io(std::path::Path::new("a temporary file")))?;
    first.state().save(file.path())?;
    let mut second = make()?;
    second.load_state(State::load(file.path())?)?;
    advance(&mut *second, &mut params, steps..2 * steps)?;
    for (i, (ours, want)) in params.iter().zip(&expected).enumerate() {
        let bits = |t: &Tensor| Ok::<_, Error>(t.to_f64_vec()?.into_iter().map(f64::to_bits).collect::<Vec<_>>());
        if bits(ours)? != bits(want)? {
            return Err(Error::numeric(format!("resuming {}", second.name()), format!("parameter {i} differs")));
        }
    }
    Ok(())
}
