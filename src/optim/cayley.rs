//! Cayley SGD on orthogonal matrices (Li, Fuxin & Todorovic 2020).
//!
//! With X the parameter and G = dL/dX, both `[n, n]`:
//! ```text
//! V = β V − Gᵀ          M = V X          Ŵ = M − ½ Xᵀ(X M)          W = Ŵ − Ŵᵀ
//! α = min(lr, 1/(‖W‖₁ + 1e-8))                                      ‖·‖₁: largest column sum of |·|
//! Y ≈ (I − ½αW)⁻¹ (I + ½αW) Xᵀ   by the fixed point  Y ← Xᵀ + ½αW (Xᵀ + Y)
//! X ← Yᵀ                V ← W Xᵀ_old
//! ```
//! `α‖W‖₂ ≤ 1`, so every iteration halves the fixed point's error at least.
//!
//! **Parity** is the published code, to the operation: rows normalised first; Ŵ with both of its products, since published iterates
//! drift off the manifold and `Xᵀ(X M) ≠ M` there; Y started from `Xᵀ + αV` and iterated five times; no re-orthonormalisation (the
//! published QR, drawn with probability 1/101, is left out). Momentum is inert there: the published code rebinds V to a temporary
//! and its stored buffer stays zero, so neither β nor the ninth product, `W Xᵀ`, has any effect, and we do without both.
//!
//! **Default** differs in four ways. The iterate is re-orthonormalised after every step (Newton–Schulz on a Gram matrix in `f64`)
//! to max|RᵀR − I| ≤ 1e-6. X being orthogonal, Ŵ = ½M. The fixed point starts from `Xᵀ + αW Xᵀ`: one product, which is also the
//! transported V, and unlike `Xᵀ + αV` it is right to first order whatever V's part normal to the manifold. And momentum works:
//! `V ← W Xᵀ` is kept. β is 0 all the same unless asked for: α is capped by the norm of W, so a velocity that grows by 1/(1 − β)
//! mostly shortens the step by as much, and the published results were all obtained without.

use crate::ops::add::linear_combination;
use crate::optim::linalg::{
    add_scaled, gram_residual, largest, normalize_rows, orthonormalize, product, same, skew, step_size, tolerance,
    transpose_axpby,
};
use crate::optim::{Audit, Optimizer, State, check_step};
use crate::{Error, Result, Tensor};

/// Fixed-point iterations of the published code.
const ITERATIONS: usize = 5;

/// Which Cayley SGD.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// The published code's numbers, drift included.
    Parity,
    /// Stays on the manifold; momentum works.
    #[default]
    Default,
}

impl Mode {
    fn name(self) -> &'static str {
        match self {
            Self::Parity => "parity",
            Self::Default => "default",
        }
    }
}

/// The optimiser; see the module's text for the formulas.
///
/// ```
/// use spinquant::optim::{CayleySgd, Mode, Optimizer};
/// use spinquant::{Tensor, ops};
/// let mut params = [Tensor::from_vec(vec![1f32, 0.0, 0.0, 1.0], [1, 2, 2])?];
/// let mut optimizer = CayleySgd::new(Mode::Default);
/// for seed in 0..10 {
///     let gradient = ops::randn([1, 2, 2], seed).to_dtype(spinquant::DType::F32)?;
///     optimizer.step(&mut params, vec![gradient], 1.5)?;
///     assert!(optimizer.orthogonality_error() <= 1e-6);
/// }
/// # Ok::<(), spinquant::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct CayleySgd {
    /// β: how much of the transported velocity is kept. Ignored in parity mode.
    pub momentum: f64,
    mode: Mode,
    /// V of every parameter; empty before the first step and without momentum.
    velocity: Vec<Tensor>,
    audit: Audit,
}

impl CayleySgd {
    /// Without momentum.
    pub fn new(mode: Mode) -> Self {
        Self { momentum: 0.0, mode, velocity: vec![], audit: Audit::default() }
    }

    /// With momentum β in [0, 1).
    pub fn with_momentum(self, momentum: f64) -> Result<Self> {
        if !(0.0..1.0).contains(&momentum) {
            return Err(Error::argument("momentum", format!("expected a number in [0, 1), got {momentum}")));
        }
        if momentum > 0.0 && self.mode == Mode::Parity {
            return Err(Error::argument("momentum", "has no effect in parity mode, as in the published code; leave it 0"));
        }
        Ok(Self { momentum, ..self })
    }

    /// Parity or default.
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// Steps taken so far.
    pub fn steps(&self) -> u64 {
        self.audit.steps
    }

    /// One published step: the new X and its drift.
    fn parity_step(x: Tensor, g: Tensor, lr: f64) -> Result<(Tensor, f64)> {
        let x = normalize_rows(x)?;
        let v = transpose_axpby(-1.0, &g, 0.0, None)?;
        let m = product(&v, false, &x, false)?;
        let xtxm = product(&x, true, &product(&x, false, &m, false)?, false)?;
        let w = skew(&linear_combination(1.0, m, -0.5, xtxm)?)?;
        let alpha = step_size(&w, lr)?;
        let xt = transpose_axpby(1.0, &x, 0.0, None)?;
        let y = add_scaled(xt.clone(), &alpha, 1.0, &v)?;
        let y = Self::iterate(y, &xt, &w, &alpha, ITERATIONS)?;
        let x = transpose_axpby(1.0, &y, 0.0, None)?;
        let error = largest(&gram_residual(&x)?.1);
        finite(error)?;
        Ok((x, error))
    }

    /// One step of ours: the new X, its drift, and the transported V.
    fn default_step(x: &Tensor, v: &Tensor, lr: f64) -> Result<(Tensor, f64, Tensor)> {
        let m = product(v, false, x, false)?;
        let w = transpose_axpby(-0.5, &m, 0.5, Some(&m))?;
        let alpha = step_size(&w, lr)?;
        let xt = transpose_axpby(1.0, x, 0.0, None)?;
        let v = product(&w, false, &xt, false)?;
        let y = add_scaled(xt.clone(), &alpha, 1.0, &v)?;
        let y = Self::iterate(y, &xt, &w, &alpha, ITERATIONS - 1)?;
        let (x, errors) = orthonormalize(transpose_axpby(1.0, &y, 0.0, None)?, tolerance(x))?;
        Ok((x, largest(&errors), v))
    }

    /// `count` times `Y ← Xᵀ + ½αW (Xᵀ + Y)`.
    fn iterate(mut y: Tensor, xt: &Tensor, w: &Tensor, alpha: &Tensor, count: usize) -> Result<Tensor> {
        for _ in 0..count {
            let sum = linear_combination(1.0, y, 1.0, xt.clone())?;
            y = add_scaled(xt.clone(), alpha, 0.5, &product(w, false, &sum, false)?)?;
        }
        Ok(y)
    }
}

fn finite(error: f64) -> Result<()> {
    if error.is_finite() { Ok(()) } else { Err(Error::numeric("Cayley SGD", "the gradient or the rotation is not finite")) }
}

impl Optimizer for CayleySgd {
    fn name(&self) -> &str {
        match self.mode {
            Mode::Parity => "cayley-parity",
            Mode::Default => "cayley",
        }
    }

    fn step(&mut self, params: &mut [Tensor], grads: Vec<Tensor>, lr: f64) -> Result<()> {
        check_step("Cayley SGD", params, &grads, lr, self.velocity.len())?;
        // Nothing of self or params changes before every parameter has been stepped.
        let (mut points, mut velocity, mut errors) = (vec![], vec![], vec![]);
        for (i, (x, g)) in params.iter().zip(grads).enumerate() {
            let drift = match self.mode {
                Mode::Parity => {
                    let (x, drift) = Self::parity_step(x.clone(), g, lr)?;
                    points.push(x);
                    drift
                }
                Mode::Default => {
                    let v = match self.velocity.get(i) {
                        Some(v) => {
                            // A loaded state comes from the CPU.
                            let v = v.to_device(&x.device())?;
                            same("Cayley SGD: saved velocity", x, &[&v])?;
                            transpose_axpby(-1.0, &g, self.momentum, Some(&v))?
                        }
                        None => transpose_axpby(-1.0, &g, 0.0, None)?,
                    };
                    let (x, drift, v) = Self::default_step(x, &v, lr)?;
                    points.push(x);
                    velocity.push(v);
                    drift
                }
            };
            errors.push(drift);
        }
        params.clone_from_slice(&points);
        self.velocity = if self.momentum > 0.0 { velocity } else { vec![] };
        self.audit.stepped(&errors);
        Ok(())
    }

    fn state(&self) -> State {
        let tensors = self.velocity.iter().enumerate().map(|(i, v)| (format!("velocity.{i}"), v.clone())).collect();
        let mut state = self.audit.state("cayley", tensors, &[("momentum", self.momentum)]);
        state.scalars.insert("mode".into(), self.mode.name().into());
        state
    }

    fn load_state(&mut self, state: State) -> Result<()> {
        let (kind, mode) = (state.text("optimizer")?, state.text("mode")?);
        if kind != "cayley" || mode != self.mode.name() {
            let message = format!("expected that of cayley in {} mode, got {kind} in {mode} mode", self.mode.name());
            return Err(Error::argument("optimiser state", message));
        }
        self.audit = Audit::load(&state, "cayley", &[("momentum", self.momentum)])?;
        self.velocity = state.list("velocity");
        Ok(())
    }

    fn orthogonality_error(&self) -> f64 {
        self.audit.error()
    }
}
