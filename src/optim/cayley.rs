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
//! **Default** differs in four ways. The iterate is re-orthonormalised after every step (Newton–Schulz on a Gram matrix in `f64`
//! or in exact integers) to max|RᵀR − I| ≤ 1e-6. X being orthogonal, Ŵ = ½M. With A = ½αW the fixed point is a series,
//! `(I − A)⁻¹ (I + A) = I + 2 (A + A² + A³ + …)`, taken to A⁶ in four products, `S = A + A² + A³`, `S ← S + A³ S`,
//! `X ← X + 2 X Sᵀ`: one order more than the published five iterations from `Xᵀ + αV` in two products less, and right whatever
//! V's part normal to the manifold. And momentum works: `V ← W Xᵀ` is kept, for one product more. β is 0 all the same unless
//! asked for: α is capped by the norm of W, so a velocity that grows by 1/(1 − β) mostly shortens the step by as much, and the
//! published results were all obtained without. Products of large matrices on a GPU are of operands rounded to 22 bits
//! ([`Digits::Most`]).

use crate::linalg::{
    Digits, add_scaled, gram_residual, largest, normalize_rows, orthonormalize, product, rounded_product, same, skew, step_size,
    tolerance, transpose_axpby,
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
    ///
    /// # Errors
    /// [`Error::Argument`] for a momentum outside [0, 1).
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
        let w = skew(&Tensor::axpby(1.0, m, -0.5, xtxm)?)?;
        let alpha = step_size(&w, lr)?;
        let xt = transpose_axpby(1.0, &x, 0.0, None)?;
        let mut y = add_scaled(Some(xt.clone()), &alpha, 1.0, &v)?;
        for _ in 0..ITERATIONS {
            let sum = Tensor::axpby(1.0, y, 1.0, xt.clone())?;
            y = add_scaled(Some(xt.clone()), &alpha, 0.5, &product(&w, false, &sum, false)?)?;
        }
        let x = transpose_axpby(1.0, &y, 0.0, None)?;
        let error = largest(&gram_residual(&x)?.1);
        finite(error)?;
        Ok((x, error))
    }

    /// One step of ours: the new X, its drift, and with momentum the transported V. `v` is the old V, transported.
    fn default_step(&self, x: &Tensor, g: Tensor, v: Option<&Tensor>, lr: f64) -> Result<(Tensor, f64, Option<Tensor>)> {
        let times = |a: &Tensor, ta: bool, b: &Tensor, tb: bool| rounded_product(a, ta, b, tb, Digits::Most);
        // W = ½ (M − Mᵀ); without a V of before M = −Gᵀ X needs no transpose.
        let w = match v {
            Some(v) => {
                let m = times(&transpose_axpby(-1.0, &g, self.momentum, Some(v))?, false, x, false)?;
                transpose_axpby(-0.5, &m, 0.5, Some(&m))?
            }
            None => {
                let m = times(&g, true, x, false)?;
                transpose_axpby(0.5, &m, -0.5, Some(&m))?
            }
        };
        let alpha = step_size(&w, lr)?;
        let v = if self.momentum > 0.0 { Some(times(&w, false, x, true)?) } else { None };
        let a = add_scaled(None, &alpha, 0.5, &w)?;
        drop(w);
        let a2 = times(&a, false, &a, false)?;
        let a3 = times(&a, false, &a2, false)?;
        let s = Tensor::axpby(1.0, Tensor::axpby(1.0, a, 1.0, a2)?, 1.0, a3.clone())?;
        let rest = times(&a3, false, &s, false)?;
        let s = Tensor::axpby(1.0, s, 1.0, rest)?;
        let x = Tensor::axpby(2.0, times(x, false, &s, true)?, 1.0, x.clone())?;
        let most = tolerance(&x);
        let (x, errors) = orthonormalize(x, most)?;
        Ok((x, largest(&errors), v))
    }
}

fn finite(error: f64) -> Result<()> {
    if error.is_finite() { Ok(()) } else { Err(Error::numeric("Cayley SGD", "the gradient or the rotation is not finite")) }
}

impl Optimizer for CayleySgd {
    fn clips_by_default(&self) -> bool {
        self.mode != Mode::Parity
    }
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
                    // A loaded state comes from the CPU.
                    let v = self.velocity.get(i).map(|v| v.to_device(&x.device())).transpose()?;
                    same("Cayley SGD: saved velocity", x, v.as_ref().as_slice())?;
                    let (x, drift, v) = self.default_step(x, g, v.as_ref(), lr)?;
                    points.push(x);
                    velocity.extend(v);
                    drift
                }
            };
            errors.push(drift);
        }
        params.clone_from_slice(&points);
        self.velocity = velocity;
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
