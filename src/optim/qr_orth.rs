//! QR-Orth: descent on a latent matrix whose Q factor is the rotation (Shao et al. 2025, arXiv 2511.04063).
//!
//! `Z = X R` with R upper triangular and a positive diagonal, so that X depends on Z smoothly wherever Z is not singular. With
//! G = dL/dX the gradient through the factorisation (Seeger et al. 2017; Liao et al. 2019), for a square Z, is
//! ```text
//! dL/dZ = X · tril₋(XᵀG − GᵀX) · R⁻ᵀ        tril₋: what is strictly below the diagonal
//! V ← β V + dL/dZ       Z ← Z − α V,  α = min(lr, ½/‖V Z⁻¹‖₁)       X = qr(Z).Q
//! ```
//! Any Euclidean descent would do for Z; this is gradient descent with momentum. The bound on α keeps Z away from singular matrices,
//! where X would jump. At R = I a step moves X by `−2α XΩ`, twice as far as [Cayley SGD](crate::optim::CayleySgd) at the same rate. L
//! does not depend on R, so dL/dZ is normal to what changes R alone: Z grows, and its steps shorten by themselves. Where Z has become so
//! skewed that its factors would be inexact in `f32`, a step starts anew from Z = X, which moves nothing.
//!
//! The factorisation is Cholesky–QR, twice: matrix products on the device, the triangular factors on the host in `f64`
//! ([`linalg::cholesky_qr`](crate::linalg::cholesky_qr)). X is then re-orthonormalised to max|RᵀR − I| ≤ 1e-6 in `f32`.

use crate::linalg::{
    add_scaled, cholesky_qr, largest, mean_squares, orthonormalize, product, same, skew, step_size, strictly_lower, tolerance,
};
use crate::optim::{Audit, Optimizer, State, check_step};
use crate::{Error, Result, Tensor};

/// The optimiser; see the module's text for the formulas. It keeps Z, so a run's parameters must be stepped by one instance only.
#[derive(Clone, Debug, Default)]
pub struct QrOrth {
    momentum: f64,
    /// Z, R⁻¹ and V of every parameter; V only with momentum.
    latent: Vec<Tensor>,
    inverse: Vec<Tensor>,
    velocity: Vec<Tensor>,
    audit: Audit,
}

/// dL/dZ for `Z = X R`, given dL/dX and R⁻¹; all `[k, n, n]`.
///
/// # Errors
/// Batches of different shapes, types or devices.
pub fn gradient_through_qr(x: &Tensor, g: &Tensor, r_inverse: &Tensor) -> Result<Tensor> {
    let lower = strictly_lower(&skew(&product(x, true, g, false)?)?)?;
    product(x, false, &product(&lower, false, r_inverse, true)?, false)
}

/// Identities of the shape, type and device of x.
fn identity(x: &Tensor) -> Result<Tensor> {
    let (k, n) = same("QR-Orth", x, &[])?;
    Tensor::stack(&vec![Tensor::eye(n, x.dtype())?; k])?.to_device(&x.device())
}

/// True of a batch with a Z whose singular values span more than about 100, or that has grown 1000 times: `‖Z‖²_F ‖R⁻¹‖²_F / n` is n where
/// all are equal, and grows by the square of the ratio of a small one to the rest.
fn is_skewed(z: &Tensor, r_inverse: &Tensor) -> Result<bool> {
    let n = z.cols() as f64;
    let pairs = mean_squares(z)?.into_iter().zip(mean_squares(r_inverse)?);
    Ok(pairs.into_iter().any(|(z, inverse)| z * n * inverse * n * n > n + 1e4 || z * n > 1e6))
}

impl QrOrth {
    /// Without momentum.
    pub fn new() -> Self {
        Self::default()
    }

    /// With momentum β in [0, 1).
    ///
    /// # Errors
    /// [`Error::Argument`] for a momentum outside [0, 1).
    pub fn with_momentum(self, momentum: f64) -> Result<Self> {
        if !(0.0..1.0).contains(&momentum) {
            return Err(Error::argument("momentum", format!("expected a number in [0, 1), got {momentum}")));
        }
        Ok(Self { momentum, ..self })
    }

    /// Z, R⁻¹ and V of parameter i, on its device: as they were left, or Z = X.
    fn factors(&self, i: usize, x: &Tensor) -> Result<(Tensor, Tensor, Option<Tensor>)> {
        let place = |list: &[Tensor]| list.get(i).map(|t| t.to_device(&x.device())).transpose();
        let (latent, inverse, velocity) = (place(&self.latent)?, place(&self.inverse)?, place(&self.velocity)?);
        let (z, r_inverse) = match (latent, inverse) {
            (Some(z), Some(r_inverse)) => (z, r_inverse),
            _ => (x.clone(), identity(x)?),
        };
        same("QR-Orth: saved latent matrices", x, &[&z, &r_inverse])?;
        velocity.iter().try_for_each(|v| same("QR-Orth: saved velocity", x, &[v]).map(drop))?;
        Ok((z, r_inverse, velocity))
    }
}

impl Optimizer for QrOrth {
    fn name(&self) -> &str {
        "qr-orth"
    }

    fn step(&mut self, params: &mut [Tensor], grads: Vec<Tensor>, lr: f64) -> Result<()> {
        check_step("QR-Orth", params, &grads, lr, self.latent.len())?;
        let (mut points, mut latent, mut inverse, mut velocity, mut errors) = (vec![], vec![], vec![], vec![], vec![]);
        for (i, (x, g)) in params.iter().zip(&grads).enumerate() {
            let (z, r_inverse, v) = self.factors(i, x)?;
            let slope = gradient_through_qr(x, g, &r_inverse)?;
            let v = match v {
                Some(v) => Tensor::axpby(self.momentum, v, 1.0, slope)?,
                None => slope,
            };
            // ‖V Z⁻¹‖, with Z⁻¹ = R⁻¹ Xᵀ
            let relative = product(&product(&v, false, &r_inverse, false)?, false, x, true)?;
            let z = add_scaled(Some(z), &step_size(&relative.scale(2.0)?, lr)?, -1.0, &v)?;
            let (q, r_inverse) = cholesky_qr(&z)?;
            let (q, error) = orthonormalize(q, tolerance(x))?;
            if is_skewed(&z, &r_inverse)? {
                latent.push(q.clone());
                inverse.push(identity(x)?);
                velocity.push(product(&q, false, &product(x, true, &v, false)?, false)?);
            } else {
                latent.push(z);
                inverse.push(r_inverse);
                velocity.push(v);
            }
            points.push(q);
            errors.push(largest(&error));
        }
        params.clone_from_slice(&points);
        (self.latent, self.inverse) = (latent, inverse);
        self.velocity = if self.momentum > 0.0 { velocity } else { vec![] };
        self.audit.stepped(&errors);
        Ok(())
    }

    fn state(&self) -> State {
        let lists = [("latent", &self.latent), ("inverse", &self.inverse), ("velocity", &self.velocity)];
        let tensors = lists.into_iter().flat_map(|(name, list)| {
            list.iter().enumerate().map(move |(i, t)| (format!("{name}.{i}"), t.clone())).collect::<Vec<_>>()
        });
        self.audit.state("qr-orth", tensors.collect(), &[("momentum", self.momentum)])
    }

    fn load_state(&mut self, state: State) -> Result<()> {
        self.audit = Audit::load(&state, "qr-orth", &[("momentum", self.momentum)])?;
        (self.latent, self.inverse, self.velocity) = (state.list("latent"), state.list("inverse"), state.list("velocity"));
        Ok(())
    }

    fn orthogonality_error(&self) -> f64 {
        self.audit.error()
    }

    fn default_learning_rate(&self) -> f64 {
        0.75
    }
}
