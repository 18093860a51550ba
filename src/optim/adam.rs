//! Adam (Kingma & Ba 2015) with decoupled weight decay (Loshchilov & Hutter 2019), for ordinary parameters: weights, not rotations.
//!
//! With g the gradient of a parameter x and t the step, counted from 1, element by element:
//! ```text
//! m ← β₁ m + (1 − β₁) g        v ← β₂ v + (1 − β₂) g²
//! x ← x − lr (m/(1 − β₁ᵗ) / (√(v/(1 − β₂ᵗ)) + ε) + λ x)
//! ```

use crate::io::is_finite;
use crate::linalg::{self, alike};
use crate::optim::{Audit, Optimizer, State};
use crate::{Error, Result, Tensor};

/// The optimiser. Parameters are `f32` or `f64` tensors of any shape on the CPU; they leave every manifold, so rotations are not for
/// it.
///
/// ```
/// use spinquant::Tensor;
/// use spinquant::optim::{Adam, Optimizer};
/// let mut x = [Tensor::from_vec(vec![3f64, -2.0], [2])?];
/// let mut adam = Adam::default();
/// for _ in 0..400 {
///     let gradient = x[0].clone(); // of ½|x|²
///     adam.step(&mut x, vec![gradient], 0.05)?;
/// }
/// assert!(x[0].to_vec::<f64>()?.iter().all(|x| x.abs() < 1e-3));
/// # Ok::<(), spinquant::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Adam {
    /// β₁, β₂: how much of the two moments is kept in a step.
    pub betas: (f64, f64),
    /// ε, added to the root.
    pub epsilon: f64,
    /// λ: the part of a parameter that is taken off, times the learning rate.
    pub weight_decay: f64,
    /// m and v of every parameter; empty before the first step.
    moments: Vec<[Tensor; 2]>,
    audit: Audit,
}

impl Default for Adam {
    /// The constants of the paper: β 0.9 and 0.999, ε 1e-8; no weight decay.
    fn default() -> Self {
        Self { betas: (0.9, 0.999), epsilon: 1e-8, weight_decay: 0.0, moments: vec![], audit: Audit::default() }
    }
}

impl Adam {
    /// With other β₁ and β₂, in [0, 1).
    ///
    /// # Errors
    /// [`Error::Argument`] for a rate outside [0, 1).
    pub fn with_betas(self, first: f64, second: f64) -> Result<Self> {
        if ![first, second].iter().all(|b| (0.0..1.0).contains(b)) {
            return Err(Error::argument("betas", format!("expected numbers in [0, 1), got {first} and {second}")));
        }
        Ok(Self { betas: (first, second), ..self })
    }

    /// With weight decay λ of at least 0.
    ///
    /// # Errors
    /// [`Error::Argument`] for a decay that is negative or not finite.
    pub fn with_weight_decay(self, decay: f64) -> Result<Self> {
        if !(decay >= 0.0 && decay.is_finite()) {
            return Err(Error::argument("weight decay", format!("expected a finite number of at least 0, got {decay}")));
        }
        Ok(Self { weight_decay: decay, ..self })
    }

    /// What a state must agree on.
    fn constants(&self) -> [(&'static str, f64); 4] {
        [("beta1", self.betas.0), ("beta2", self.betas.1), ("epsilon", self.epsilon), ("weight_decay", self.weight_decay)]
    }

    /// Steps taken so far.
    pub fn steps(&self) -> u64 {
        self.audit.steps
    }
}

impl Optimizer for Adam {
    fn name(&self) -> &str {
        "adam"
    }

    fn step(&mut self, params: &mut [Tensor], grads: Vec<Tensor>, lr: f64) -> Result<()> {
        if grads.len() != params.len() {
            return Err(Error::argument("Adam", format!("{} gradients for {} parameters", grads.len(), params.len())));
        }
        if !(lr >= 0.0 && lr.is_finite()) {
            return Err(Error::argument("learning rate", format!("expected a finite number of at least 0, got {lr}")));
        }
        if !self.moments.is_empty() && self.moments.len() != params.len() {
            let message = format!("the state is of {} parameters, not {}", self.moments.len(), params.len());
            return Err(Error::argument("Adam", message));
        }
        let t = (self.audit.steps + 1) as i32;
        let corrections = [1.0 - self.betas.0.powi(t), 1.0 - self.betas.1.powi(t)];
        // Nothing of self or params changes before every parameter has been stepped.
        let (mut points, mut moments) = (vec![], vec![]);
        for (i, (x, g)) in params.iter().zip(grads).enumerate() {
            if !x.device().is_cpu() {
                return Err(Error::device("Adam", format!("expected parameters on the CPU, got some on {}", x.device())));
            }
            alike("Adam", x, &[&g])?;
            if !is_finite(&g)? {
                return Err(Error::numeric("Adam", "a gradient is not finite"));
            }
            let [m, v] = match self.moments.get(i) {
                Some(moments) => moments.clone(),
                None => [Tensor::zeros(x.shape(), x.dtype(), &x.device())?, Tensor::zeros(x.shape(), x.dtype(), &x.device())?],
            };
            alike("Adam: saved moments", x, &[&m, &v])?;
            let [m, v, direction] = linalg::adam(&m, &v, &g, [self.betas.0, self.betas.1], corrections, self.epsilon)?;
            points.push(Tensor::axpby(1.0 - lr * self.weight_decay, x.clone(), -lr, direction)?);
            moments.push([m, v]);
        }
        params.clone_from_slice(&points);
        self.moments = moments;
        self.audit.steps += 1;
        Ok(())
    }

    fn state(&self) -> State {
        let named = |(i, [m, v]): (usize, &[Tensor; 2])| [(format!("m.{i}"), m.clone()), (format!("v.{i}"), v.clone())];
        self.audit.state(self.name(), self.moments.iter().enumerate().flat_map(named).collect(), &self.constants())
    }

    fn load_state(&mut self, state: State) -> Result<()> {
        self.audit = Audit::load(&state, self.name(), &self.constants())?;
        let (m, v) = (state.list("m"), state.list("v"));
        if m.len() != v.len() {
            return Err(Error::argument("optimiser state", format!("{} first moments, {} second ones", m.len(), v.len())));
        }
        self.moments = m.into_iter().zip(v).map(|(m, v)| [m, v]).collect();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DType, laws, ops};

    #[test]
    fn two_steps_by_hand() {
        let mut adam = Adam::default().with_weight_decay(0.1).unwrap();
        let mut x = [Tensor::from_vec(vec![1f64], [1]).unwrap()];
        let step = |adam: &mut Adam, x: &mut [Tensor; 1], g: f64| {
            adam.step(x, vec![Tensor::from_vec(vec![g], [1]).unwrap()], 0.01).unwrap();
            x[0].item().unwrap()
        };
        // t = 1: m/c1 = g, v/c2 = g².
        let first = 1.0 - 0.01 * (2.0 / (2.0 + 1e-8) + 0.1);
        assert!((step(&mut adam, &mut x, 2.0) - first).abs() < 1e-15);
        let (m, v) = ((0.9 * 0.2 - 0.1) / (1.0 - 0.81), (0.999 * 0.004 + 0.001) / (1.0 - 0.999f64.powi(2)));
        let second = first - 0.01 * (m / (f64::sqrt(v) + 1e-8) + 0.1 * first);
        assert!((step(&mut adam, &mut x, -1.0) - second).abs() < 1e-14);
        assert_eq!(adam.steps(), 2);
    }

    #[test]
    fn it_resumes_and_refuses_what_does_not_fit() {
        laws::resumes(&|| Ok(Box::new(Adam::default())), DType::F32, 1, 3).unwrap();
        laws::resumes(&|| Ok(Box::new(Adam::default().with_weight_decay(0.1)?)), DType::F64, 1, 3).unwrap();
        let mut adam = Adam::default();
        let mut x = [ops::randn([2, 3], 0)];
        let before = x[0].to_vec::<f64>().unwrap();
        assert!(adam.step(&mut x, vec![], 0.1).is_err());
        assert!(adam.step(&mut x, vec![ops::randn([3, 2], 0)], 0.1).is_err());
        assert!(adam.step(&mut x, vec![ops::randn([2, 3], 0).to_dtype(DType::F32).unwrap()], 0.1).is_err());
        assert!(adam.step(&mut x, vec![ops::randn([2, 3], 0)], f64::NAN).is_err());
        assert!(adam.step(&mut x, vec![Tensor::from_vec(vec![f64::NAN; 6], [2, 3]).unwrap()], 0.1).is_err());
        assert_eq!(x[0].to_vec::<f64>().unwrap(), before, "a refused step changes nothing");
        assert!(adam.load_state(State::default()).is_err());
        assert!(adam.load_state(Adam::default().with_betas(0.5, 0.9).unwrap().state()).is_err());
        assert!(Adam::default().with_betas(0.5, 1.0).is_err() && Adam::default().with_weight_decay(f64::NAN).is_err());
    }
}
