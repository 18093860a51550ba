//! Riemannian SGD and Adam on orthogonal matrices, with any [`Retraction`].
//!
//! With X the parameter and G = dL/dX, both `[n, n]`, the Riemannian gradient is XΩ with the skew `Ω = ½(XᵀG − GᵀX)` (Absil, Mahony &
//! Sepulchre 2008). Statistics are kept of Ω, the angular velocity in the body's frame, so that carrying them to the next point is
//! free: the transport `Y Xᵀ (XΩ) = YΩ` leaves Ω as it is. Every step ends on the manifold to max|RᵀR − I| ≤ 1e-6 (`f32`), audited.
//!
//! ```text
//! SGD    (Bonnabel 2013)          M ← β M + Ω                             X ← Retract_X(−α X M),  α = min(lr, 1/‖M‖₁)
//! Adam   (Bécigneul & Ganea 2019) M ← β₁ M + (1 − β₁) Ω,  v ← β₂ v + (1 − β₂) ‖Ω‖²_F / n
//!        X ← Retract_X(−α X M),   α = min(lr · M̂ / (√v̂ + ε) as a factor of M, 1/‖M‖₁)
//! ```
//! ‖·‖₁ is the largest column sum of |·|, ‖Ω‖²_F/n the mean square of the angles by which exp Ω turns its invariant planes. So
//! **the rate of SGD is that of [Cayley SGD](crate::optim::CayleySgd)**, and **the rate of Adam is an angle**: the root mean square,
//! in radians, by which a step turns when its gradients agree. The bound 1/‖M‖₁ keeps every angle of a step below 1, where all
//! retractions are defined.
//!
//! Adam's v is one number a matrix, as on a product of manifolds, so that a step is along the averaged gradient. The *elementwise*
//! variant divides every entry of M by its own `√v̂` (and by √n, so that its rate is an angle as well): that direction follows the signs
//! of the noise as much as the gradient, and depends on the basis.

use crate::linalg::{
    adam, add_scaled, inverse_norms, largest, mean_squares, orthonormalize, product, same, skew, step_size, tolerance,
};
use crate::manifold::{Polar, Qr, Retraction};
use crate::optim::{Audit, Optimizer, State, check_step};
use crate::{Error, Result, Tensor};

/// Ω = ½(XᵀG − GᵀX).
fn angular_gradient(x: &Tensor, g: &Tensor) -> Result<Tensor> {
    skew(&product(x, true, g, false)?)?.scale(0.5)
}

/// `Retract_X(−alpha[b] X M)` for every matrix b of the batch, re-orthonormalised; and its audited drift.
fn advance(x: &Tensor, m: &Tensor, alpha: &Tensor, retraction: &dyn Retraction) -> Result<(Tensor, f64)> {
    let tangent = add_scaled(None, alpha, -1.0, &product(x, false, m, false)?)?;
    let (x, errors) = orthonormalize(retraction.retract(x, &tangent)?, tolerance(x))?;
    Ok((x, largest(&errors)))
}

/// Loads and checks the tensors of a state for parameter i: a loaded state comes from the CPU.
fn kept(what: &str, list: &[Tensor], i: usize, x: &Tensor) -> Result<Option<Tensor>> {
    let Some(t) = list.get(i) else { return Ok(None) };
    let t = t.to_device(&x.device())?;
    same(what, x, &[&t])?;
    Ok(Some(t))
}

/// A number in [0, 1).
fn fraction(what: &str, x: f64) -> Result<f64> {
    if (0.0..1.0).contains(&x) { Ok(x) } else { Err(Error::argument(what, format!("expected a number in [0, 1), got {x}"))) }
}

/// Riemannian stochastic gradient descent; see the module's text for the formulas.
///
/// ```
/// use spinquant::optim::{Optimizer, RiemannianSgd};
/// use spinquant::{Tensor, manifold::Polar, ops};
/// let mut params = [Tensor::from_vec(vec![1f64, 0.0, 0.0, 1.0], [1, 2, 2])?];
/// let mut optimizer = RiemannianSgd::new(Box::new(Polar)).with_momentum(0.9)?;
/// optimizer.step(&mut params, vec![ops::randn([1, 2, 2], 0)], 1.5)?;
/// assert!(optimizer.orthogonality_error() <= 1e-12);
/// # Ok::<(), spinquant::Error>(())
/// ```
pub struct RiemannianSgd {
    name: String,
    momentum: f64,
    retraction: Box<dyn Retraction>,
    velocity: Vec<Tensor>,
    audit: Audit,
}

impl RiemannianSgd {
    /// Without momentum. Called `sgd-` and the retraction's name.
    pub fn new(retraction: Box<dyn Retraction>) -> Self {
        let name = format!("sgd-{}", retraction.name());
        Self { name, momentum: 0.0, retraction, velocity: vec![], audit: Audit::default() }
    }

    /// With the QR retraction: `sgd-qr`.
    pub fn qr() -> Self {
        Self::new(Box::new(Qr))
    }

    /// With the polar retraction: `sgd-polar`.
    pub fn polar() -> Self {
        Self::new(Box::new(Polar))
    }

    /// With momentum β in [0, 1). A constant gradient then moves 1/(1 − β) times as far at the same rate.
    ///
    /// # Errors
    /// [`Error::Argument`] for a momentum outside [0, 1).
    pub fn with_momentum(self, momentum: f64) -> Result<Self> {
        Ok(Self { momentum: fraction("momentum", momentum)?, ..self })
    }
}

impl Optimizer for RiemannianSgd {
    fn name(&self) -> &str {
        &self.name
    }

    fn step(&mut self, params: &mut [Tensor], grads: Vec<Tensor>, lr: f64) -> Result<()> {
        check_step(&self.name, params, &grads, lr, self.velocity.len())?;
        let (mut points, mut velocity, mut errors) = (vec![], vec![], vec![]);
        for (i, (x, g)) in params.iter().zip(&grads).enumerate() {
            let omega = angular_gradient(x, g)?;
            let m = match kept(&self.name, &self.velocity, i, x)? {
                Some(m) => Tensor::axpby(self.momentum, m, 1.0, omega)?,
                None => omega,
            };
            let (x, error) = advance(x, &m, &step_size(&m, lr)?, &*self.retraction)?;
            points.push(x);
            velocity.push(m);
            errors.push(error);
        }
        params.clone_from_slice(&points);
        self.velocity = if self.momentum > 0.0 { velocity } else { vec![] };
        self.audit.stepped(&errors);
        Ok(())
    }

    fn state(&self) -> State {
        let tensors = self.velocity.iter().enumerate().map(|(i, v)| (format!("velocity.{i}"), v.clone())).collect();
        self.audit.state(&self.name, tensors, &[("momentum", self.momentum)])
    }

    fn load_state(&mut self, state: State) -> Result<()> {
        self.audit = Audit::load(&state, &self.name, &[("momentum", self.momentum)])?;
        self.velocity = state.list("velocity");
        Ok(())
    }

    fn orthogonality_error(&self) -> f64 {
        self.audit.error()
    }

    fn default_learning_rate(&self) -> f64 {
        1.5
    }
}

/// Riemannian Adam; see the module's text for the formulas.
///
/// ```
/// use spinquant::optim::{Optimizer, RiemannianAdam};
/// use spinquant::{Tensor, ops};
/// let mut params = [Tensor::from_vec(vec![1f64, 0.0, 0.0, 1.0], [1, 2, 2])?];
/// RiemannianAdam::polar().step(&mut params, vec![ops::randn([1, 2, 2], 0)], 0.02)?;
/// let sine = params[0].to_vec::<f64>()?[1];
/// assert!((sine.abs() - 0.02).abs() < 1e-4, "the first step turns by the learning rate");
/// # Ok::<(), spinquant::Error>(())
/// ```
pub struct RiemannianAdam {
    name: String,
    betas: [f64; 2],
    epsilon: f64,
    elementwise: bool,
    retraction: Box<dyn Retraction>,
    first: Vec<Tensor>,
    /// Of every parameter: `[k]` in `f64` on the CPU, or `[k, n, n]` beside it where elementwise.
    second: Vec<Tensor>,
    audit: Audit,
}

impl RiemannianAdam {
    /// With β₁ = 0.9, β₂ = 0.99 and one second moment a matrix. Called `adam-` and the retraction's name.
    ///
    /// β₂ is less than the usual 0.999, which remembers longer than the 100 steps of a run.
    pub fn new(retraction: Box<dyn Retraction>) -> Self {
        let name = format!("adam-{}", retraction.name());
        let (first, second) = (vec![], vec![]);
        Self { name, betas: [0.9, 0.99], epsilon: 1e-10, elementwise: false, retraction, first, second, audit: Audit::default() }
    }

    /// With the QR retraction: `adam-qr`.
    pub fn qr() -> Self {
        Self::new(Box::new(Qr))
    }

    /// With the polar retraction: `adam-polar`.
    pub fn polar() -> Self {
        Self::new(Box::new(Polar))
    }

    /// With a second moment for every entry of Ω: `-elementwise` joins the name.
    pub fn elementwise(self) -> Self {
        Self { name: format!("{}-elementwise", self.name), elementwise: true, ..self }
    }

    /// With other decay rates, both in [0, 1).
    ///
    /// # Errors
    /// [`Error::Argument`] for a rate outside [0, 1).
    pub fn with_betas(self, first: f64, second: f64) -> Result<Self> {
        Ok(Self { betas: [fraction("beta 1", first)?, fraction("beta 2", second)?], ..self })
    }

    /// New statistics of parameter i and what it moves along: M (or the elementwise direction) and its factors `[k]`.
    fn direction(&self, i: usize, x: &Tensor, omega: Tensor, lr: f64) -> Result<Statistics> {
        let (k, n) = same(&self.name, x, &[&omega])?;
        let [b1, b2] = self.betas;
        let step = (self.audit.steps + 1) as i32;
        let corrections = [1.0 - b1.powi(step), 1.0 - b2.powi(step)];
        let zero = || Tensor::zeros(x.shape(), x.dtype(), &x.device());
        let first = kept(&self.name, &self.first, i, x)?.map_or_else(zero, Ok)?;
        let (first, second, along, factors) = if self.elementwise {
            let second = kept(&self.name, &self.second, i, x)?.map_or_else(zero, Ok)?;
            let [first, second, along] = adam(&first, &second, &omega, self.betas, corrections, self.epsilon)?;
            (first, second, along, vec![lr / (n as f64).sqrt(); k])
        } else {
            let squares: Vec<f64> = mean_squares(&omega)?.into_iter().map(|s| s * n as f64).collect();
            let old = match self.second.get(i) {
                Some(v) if v.shape() == [k] => v.to_f64_vec()?,
                Some(v) => return Err(Error::shape(&self.name, format!("second moments [{k}]"), v.shape())),
                None => vec![0.0; k],
            };
            let second: Vec<f64> = old.into_iter().zip(squares).map(|(v, s)| b2 * v + (1.0 - b2) * s).collect();
            let first = Tensor::axpby(b1, first, 1.0 - b1, omega)?;
            let factor = |v: &f64| lr / corrections[0] / ((v / corrections[1]).sqrt() + self.epsilon);
            let factors = second.iter().map(factor).collect();
            (first.clone(), Tensor::from_vec(second, [k])?, first, factors)
        };
        // A NaN must not be replaced by the bound.
        let bounded = |(f, b): (f64, f64)| if f > b { b } else { f };
        let alpha: Vec<f64> = factors.into_iter().zip(inverse_norms(&along)?).map(bounded).collect();
        let alpha = Tensor::from_vec(alpha, [k])?.to_dtype(x.dtype())?.to_device(&x.device())?;
        Ok(Statistics { first, second, along, alpha })
    }
}

struct Statistics {
    first: Tensor,
    second: Tensor,
    along: Tensor,
    alpha: Tensor,
}

impl Optimizer for RiemannianAdam {
    fn name(&self) -> &str {
        &self.name
    }

    fn step(&mut self, params: &mut [Tensor], grads: Vec<Tensor>, lr: f64) -> Result<()> {
        check_step(&self.name, params, &grads, lr, self.first.len())?;
        let (mut points, mut first, mut second, mut errors) = (vec![], vec![], vec![], vec![]);
        for (i, (x, g)) in params.iter().zip(&grads).enumerate() {
            let s = self.direction(i, x, angular_gradient(x, g)?, lr)?;
            let (x, error) = advance(x, &s.along, &s.alpha, &*self.retraction)?;
            points.push(x);
            first.push(s.first);
            second.push(s.second);
            errors.push(error);
        }
        params.clone_from_slice(&points);
        (self.first, self.second) = (first, second);
        self.audit.stepped(&errors);
        Ok(())
    }

    fn state(&self) -> State {
        let named = |name: &'static str, list: &[Tensor]| {
            list.iter().enumerate().map(move |(i, t)| (format!("{name}.{i}"), t.clone())).collect::<Vec<_>>()
        };
        let tensors = named("first", &self.first).into_iter().chain(named("second", &self.second)).collect();
        self.audit.state(&self.name, tensors, &[("beta1", self.betas[0]), ("beta2", self.betas[1])])
    }

    fn load_state(&mut self, state: State) -> Result<()> {
        self.audit = Audit::load(&state, &self.name, &[("beta1", self.betas[0]), ("beta2", self.betas[1])])?;
        (self.first, self.second) = (state.list("first"), state.list("second"));
        if self.first.len() != self.second.len() {
            let message = format!("{} first moments and {} second moments", self.first.len(), self.second.len());
            return Err(Error::argument("optimiser state", message));
        }
        Ok(())
    }

    fn orthogonality_error(&self) -> f64 {
        self.audit.error()
    }

    fn default_learning_rate(&self) -> f64 {
        0.02
    }

    fn is_scale_free(&self) -> bool {
        true
    }
}
