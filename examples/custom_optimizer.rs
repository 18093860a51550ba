//! A new optimiser from outside the crate, learning rotations with checkpoints and resumption: descent by a fixed angle.
//!
//! `cargo run --release --example custom_optimizer`
//!
//! With Ω = ½(XᵀG − GᵀX) the Riemannian gradient in X's own frame (skew), each matrix moves along −XΩ so far that its fastest plane turns
//! by about `lr` radians, whatever the size of the gradient: ‖Ω‖₂ is at most ‖Ω‖_F/√2, which is what the step is measured by. The
//! previous direction is kept with weight β; both live in frames of their own, so no transport is needed.

use std::ops::ControlFlow::{Break, Continue};

use spinquant::learn::{LearnOptions, learn};
use spinquant::linalg::product;
use spinquant::manifold::{Manifold, Orthogonal, Polar, Retraction};
use spinquant::optim::{Optimizer, State};
use spinquant::quant::Scheme;
use spinquant::rotation::Rotations;
use spinquant::{Error, Result, Tensor, demo};

/// Descent by a fixed angle.
struct FixedAngle {
    beta: f64,
    /// Ω of every parameter, smoothed; empty before the first step.
    directions: Vec<Tensor>,
}

impl Optimizer for FixedAngle {
    fn name(&self) -> &str {
        "fixed-angle"
    }

    fn step(&mut self, params: &mut [Tensor], grads: Vec<Tensor>, lr: f64) -> Result<()> {
        if grads.len() != params.len() {
            return Err(Error::argument("fixed-angle", format!("{} gradients for {} parameters", grads.len(), params.len())));
        }
        let (mut points, mut directions) = (vec![], vec![]);
        for (i, (x, g)) in params.iter().zip(grads).enumerate() {
            let mut omega = product(x, true, &Orthogonal.riemannian_gradient(x, &g)?, false)?;
            if let Some(old) = self.directions.get(i) {
                omega = Tensor::axpby(1.0 - self.beta, omega, self.beta, old.clone())?;
            }
            let (batch, n) = (x.shape()[0], x.cols());
            let values = omega.to_f64_vec()?;
            let lengths: Vec<f64> = values.chunks(n * n).map(|m| (m.iter().map(|v| v * v).sum::<f64>() / 2.0).sqrt()).collect();
            let steps =
                (0..batch).map(|b| omega.index(b)?.scale(-lr / lengths[b].max(f64::MIN_POSITIVE))).collect::<Result<Vec<_>>>()?;
            let tangent = product(x, false, &Tensor::stack(&steps)?, false)?;
            points.push(Polar.retract(x, &tangent)?);
            directions.push(omega);
        }
        // Nothing changes unless everything went well.
        params.clone_from_slice(&points);
        self.directions = directions;
        Ok(())
    }

    fn state(&self) -> State {
        let tensors = self.directions.iter().enumerate().map(|(i, t)| (format!("direction.{i}"), t.clone())).collect();
        State { tensors, scalars: [("optimizer".to_string(), self.name().into()), ("beta".into(), self.beta.into())].into() }
    }

    fn load_state(&mut self, state: State) -> Result<()> {
        if state.text("optimizer")? != self.name() || state.number("beta")? != self.beta {
            return Err(Error::argument("optimiser state", "was saved by another optimiser, or with another beta"));
        }
        self.directions = state.list("direction");
        Ok(())
    }
}

fn main() -> Result<()> {
    let make = || FixedAngle { beta: 0.5, directions: vec![] };
    let model = demo::model()?;
    let text = demo::windows(&demo::CALIBRATION[..100_000], 64)?;
    let c = &model.config;
    let start = || Rotations::random_hadamard(c.hidden_size, c.head_dim, c.layers, 0);
    let folder = tempfile::tempdir().map_err(|e| Error::io("a temporary folder".as_ref())(e))?;
    let options = LearnOptions {
        scheme: Scheme::new(4, 4, 4),
        steps: 8,
        batch: 8,
        learning_rate: Some(0.1),
        checkpoint: Some((folder.path().join("whole.state"), 100)),
        ..LearnOptions::default()
    };
    let whole = learn(&model, &text, start()?, &mut make(), &options, |step| {
        println!("step {}: loss {:.4}, max|RᵀR − I| {:.1e}", step.step, step.loss, step.orthogonality_error);
        Continue(())
    })?;
    println!("held-out loss {:.4} -> {:.4}", whole.held_out_first, whole.held_out_last);

    // The same run, stopped after three steps and continued by another instance.
    let options = LearnOptions { checkpoint: Some((folder.path().join("stopped.state"), 100)), resume: true, ..options };
    let stopped =
        learn(&model, &text, start()?, &mut make(), &options, |step| if step.step == 3 { Break(()) } else { Continue(()) });
    assert!(matches!(stopped, Err(Error::Interrupted { step: 3 })));
    let resumed = learn(&model, &text, start()?, &mut make(), &options, |_| Continue(()))?;
    let same = resumed.rotations.r1.to_vec::<f32>()? == whole.rotations.r1.to_vec::<f32>()?;
    println!("stopped and resumed: {}", if same { "the same bits" } else { "different" });
    if same { Ok(()) } else { Err(Error::numeric("resumption", "the rotations differ")) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use spinquant::{DType, laws};

    #[test]
    fn it_runs() {
        main().unwrap();
    }

    #[test]
    fn it_obeys_the_laws() {
        let make = || FixedAngle { beta: 0.5, directions: vec![] };
        laws::resumes(&|| Ok(Box::new(make())), DType::F64, 1, 3).unwrap();
        laws::stays_orthogonal(&mut make(), 24, 1, 1.0, 0.1, 20, 1e-6).unwrap();
    }
}
