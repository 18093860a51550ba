//! A new operation from outside the crate, with its gradient checked: the learnable gain that a RMSNorm has while it is trained
//! (here gains are folded into the linears that follow, so the crate itself needs none).
//!
//! `cargo run --release --example custom_op`

use spinquant::tape::{Grads, Inputs, Op, Saved};
use spinquant::{Error, Result, Tape, Tensor, Var, check, ops};

/// `y[r, c] = x[r, c] g[c]` for rows of x and one gain a column. Backward: `dx = dy g`, `dg[c] = Σ_r dy[r, c] x[r, c]`.
struct Gain;

impl Op for Gain {
    fn name(&self) -> &'static str {
        "gain"
    }

    fn cpu(&self, inputs: Inputs, save: &mut Saved) -> Result<Tensor> {
        let [x, g] = inputs.take()?;
        if g.shape() != [x.cols()] {
            return Err(Error::shape("gain", format!("[{}]", x.cols()), g.shape()));
        }
        let y = rows_times(&x, &g)?;
        // Only what the gradients that will be asked for need: a gain that is a constant keeps no activations alive.
        save.push(if save.wants(1) { x } else { Tensor::scalar(0f64) });
        save.push(g);
        Ok(y)
    }

    fn backward(&self, saved: Saved, dy: Tensor, want: &[bool]) -> Result<Grads> {
        let [x, g] = saved.take()?;
        let dx = want[0].then(|| rows_times(&dy, &g)).transpose()?;
        let dg = want[1].then(|| {
            let mut sum = vec![0f64; g.len()];
            for (x, dy) in x.as_slice::<f64>()?.chunks(g.len()).zip(dy.as_slice::<f64>()?.chunks(g.len())) {
                sum.iter_mut().zip(x).zip(dy).for_each(|((s, x), dy)| *s += x * dy);
            }
            Tensor::from_vec(sum, g.shape())
        });
        Ok(vec![dx, dg.transpose()?])
    }
}

fn rows_times(x: &Tensor, g: &Tensor) -> Result<Tensor> {
    let (shape, g) = (x.shape().to_vec(), g.as_slice::<f64>()?);
    Tensor::from_vec(x.as_slice::<f64>()?.iter().enumerate().map(|(i, x)| x * g[i % g.len()]).collect(), shape)
}

fn rms_norm<'t>(x: Var<'t>, gain: Var<'t>) -> Result<Var<'t>> {
    let tape = x.tape();
    tape.record(Gain, vec![x.rms_norm(1e-5)?, gain])
}

fn main() -> Result<()> {
    let (x, gain) = (ops::randn([6, 16], 0), ops::randn([16], 1));
    // Both operands, each alone and together, against central differences.
    check::gradients(&[x.clone(), gain.clone()], |v| {
        let [x, gain] = v.try_into().map_err(|_| Error::Tape("two operands".into()))?;
        rms_norm(x, gain)
    })?;
    println!("the tape's gradients agree with finite differences");

    let tape = Tape::new();
    let (x, gain) = (tape.constant(x), tape.variable(gain));
    let y = rms_norm(x, gain.clone())?;
    let dy = ops::randn(y.shape(), 2);
    let mut grads = tape.backward_from(y, dy)?;
    println!("dL/dgain: {:.3?}", &grads.take(&gain)?.to_vec::<f64>()?[..4]);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_runs() {
        main().unwrap();
    }

    #[test]
    fn a_wrong_gradient_is_noticed() {
        struct Wrong;
        impl Op for Wrong {
            fn name(&self) -> &'static str {
                "wrong"
            }
            fn cpu(&self, inputs: Inputs, save: &mut Saved) -> Result<Tensor> {
                Gain.cpu(inputs, save)
            }
            fn backward(&self, saved: Saved, dy: Tensor, want: &[bool]) -> Result<Grads> {
                let mut grads = Gain.backward(saved, dy, want)?;
                grads[1] = grads[1].take().map(|g| g.scale(1.01)).transpose()?;
                Ok(grads)
            }
        }
        let inputs = [ops::randn([6, 16], 0), ops::randn([16], 1)];
        let check = check::gradients(&inputs, |v| v[0].tape().record(Wrong, v));
        assert!(check.unwrap_err().to_string().contains("operand 1"));
        let tape = Tape::new();
        assert!(tape.record(Gain, inputs.map(|t| tape.constant(t)).into_iter().rev().collect()).is_err());
    }
}
