//! Divergence from the full-precision model over its likeliest tokens, all others counted as one.

use std::cmp::Ordering;
use std::sync::Arc;

use rayon::prelude::*;

use crate::llama::RotationVars;
use crate::memory::Needs;
use crate::objective::{Batch, Kl, Objective};
use crate::{DType, Device, Element, Error, Result, Tensor, Var};

/// Mean divergence, over all positions, of the fake-quantised network's next-token probabilities q from the full-precision model's p,
/// where only the K tokens that p finds likeliest stand alone (the set S) and all others are one event:
///
/// `L = Σ_{j∈S} p_j log(p_j / q_j) + p_* log(p_* / q_*)`, with `p_* = 1 − Σ_{j∈S} p_j` and `q_* = 1 − Σ_{j∈S} q_j`.
///
/// Both sides are whole distributions on K + 1 events, so L is at least 0, at most [`Kl`], and falls with K: what the network makes of
/// unlikely tokens among themselves does not count. With K + 1 tokens or fewer in the vocabulary it is [`Kl`].
///
/// The gradient by a logit is `q_j − p_j` in S and `q_j (1 − p_*/q_*)` outside: that of the divergence from p′, which is p in S and shares
/// p_* like q outside. The values agree too. So p′ is made from the logits of both networks, on the CPU, and
/// [`Var::kl_divergence`] does the rest; on a GPU the logits travel to the host and back, `3·tokens·V` values. With 16-bit logits p′ is
/// rounded to their type, as the full-precision model's own logits are.
///
/// Of tokens that are equally likely, those with smaller ids come first.
#[derive(Clone, Copy, Debug)]
pub struct KlTop {
    /// K, at least 1.
    pub tokens: usize,
}

impl Default for KlTop {
    fn default() -> Self {
        Self { tokens: 1000 }
    }
}

impl Objective for KlTop {
    fn name(&self) -> String {
        if self.tokens == Self::default().tokens { "kl-top".into() } else { format!("kl-top:{}", self.tokens) }
    }
    fn about(&self) -> String {
        let k = Self::default().tokens;
        format!("kl over that model's {k} likeliest tokens (kl-top:K for K), the others as one")
    }
    fn with(&self, constant: &str) -> Result<Arc<dyn Objective>> {
        match constant.parse() {
            Ok(tokens) if tokens > 0 => Ok(Arc::new(Self { tokens })),
            _ => {
                Err(Error::argument("objective", format!("expected kl-top:K with a number of tokens above 0, got {constant:?}")))
            }
        }
    }
    fn loss<'t>(&self, rotations: &RotationVars<'t>, batch: &Batch<'_>) -> Result<Var<'t>> {
        if self.tokens == 0 {
            return Err(Error::argument("objective", "kl-top: expected at least one token to stand alone, got 0"));
        }
        let teacher = batch.teacher()?;
        let run = Arc::new(batch.model.run(batch.scheme, batch.seq)?);
        let logits = batch.model.logits(rotations, batch.tokens, run, batch.recompute)?;
        let teacher = merged(teacher, logits.value(), self.tokens)?;
        logits.kl_divergence(teacher)
    }
    fn rate(&self) -> f64 {
        Kl.rate()
    }
    fn needs(&self) -> Needs {
        Needs::Logits
    }
}

/// Logits `[rows, V]` of p′, in the type and on the device of `teacher`.
fn merged(teacher: Tensor, student: &Tensor, top: usize) -> Result<Tensor> {
    let vocabulary = teacher.cols();
    if top >= vocabulary {
        return Ok(teacher);
    }
    if teacher.dtype() == DType::F64 { on_host::<f64>(teacher, student, top) } else { on_host::<f32>(teacher, student, top) }
}

fn on_host<T: Element>(teacher: Tensor, student: &Tensor, top: usize) -> Result<Tensor> {
    let (shape, dtype, device, cols) = (teacher.shape().to_vec(), teacher.dtype(), teacher.device(), teacher.cols());
    let host = |x: Tensor| x.to_device(&Device::Cpu)?.to_dtype(T::DTYPE)?.into_vec::<T>();
    let (mut t, x) = (host(teacher)?, host(student.clone())?);
    t.par_chunks_mut(cols)
        .zip(x.par_chunks(cols))
        .for_each_init(|| (0..cols).collect::<Vec<_>>(), |order, (t, x)| row(t, x, top, order));
    Tensor::from_vec(t, shape)?.to_dtype(dtype)?.to_device(&device)
}

/// Overwrites all logits of a row but the largest `top` by the student's, shifted so that the sum of their exponentials stays.
fn row<T: Element>(t: &mut [T], x: &[T], top: usize, order: &mut [usize]) {
    let likelier = |a: &usize, b: &usize| -> Ordering { t[*b].to_f64().total_cmp(&t[*a].to_f64()).then(a.cmp(b)) };
    order.select_nth_unstable_by(top, likelier);
    let rest = &mut order[top..];
    rest.sort_unstable(); // sums in a fixed order
    let log_sum = |x: &[T]| {
        let values = || rest.iter().map(|&j| x[j].to_f64());
        let max = values().fold(f64::NEG_INFINITY, f64::max);
        max + values().map(|v| (v - max).exp()).sum::<f64>().ln()
    };
    let shift = log_sum(t) - log_sum(x);
    for &j in rest.iter() {
        t[j] = T::from_f64(x[j].to_f64() + shift);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Tape, check, ops};

    /// The definition, for one row.
    fn definition(t: &[f64], x: &[f64], top: usize) -> f64 {
        let softmax = |x: &[f64]| -> Vec<f64> {
            let sum: f64 = x.iter().map(|v| v.exp()).sum();
            x.iter().map(|v| v.exp() / sum).collect()
        };
        let (p, q) = (softmax(t), softmax(x));
        let mut order: Vec<usize> = (0..p.len()).collect();
        order.sort_by(|&a, &b| p[b].total_cmp(&p[a]));
        let (alone, rest) = order.split_at(top);
        let sum = |x: &[f64]| rest.iter().map(|&j| x[j]).sum::<f64>();
        let (p_rest, q_rest) = (sum(&p), sum(&q));
        let rest = if rest.is_empty() { 0.0 } else { p_rest * (p_rest / q_rest).ln() };
        alone.iter().map(|&j| p[j] * (p[j] / q[j]).ln()).sum::<f64>() + rest
    }

    fn logits(seed: u64) -> Tensor {
        let x = ops::randn([4, 23], seed).into_vec::<f64>().unwrap();
        Tensor::from_vec(x.into_iter().map(|x| 2.0 * x).collect(), [4, 23]).unwrap()
    }

    fn loss(teacher: &Tensor, student: Tensor, top: usize) -> f64 {
        let teacher = merged(teacher.clone(), &student, top).unwrap();
        Tape::new().constant(student).kl_divergence(teacher).unwrap().value().item().unwrap()
    }

    #[test]
    fn is_its_definition_between_none_and_the_whole_divergence() {
        let (t, x) = (logits(1), logits(2));
        let (rows_t, rows_x) = (t.to_f64_vec().unwrap(), x.to_f64_vec().unwrap());
        let mut before = 0.0;
        for top in 1..=30 {
            let rows = rows_t.chunks(23).zip(rows_x.chunks(23));
            let want = rows.map(|(t, x)| definition(t, x, top.min(23))).sum::<f64>() / 4.0;
            let got = loss(&t, x.clone(), top);
            assert!((got - want).abs() < 1e-13, "{top}: {got}, {want}");
            assert!(got >= before, "{top}: {got} after {before}");
            before = got;
            let narrow = |x: &Tensor| x.to_dtype(DType::F32).unwrap();
            assert!((loss(&narrow(&t), narrow(&x), top) - want).abs() < 1e-5, "{top}");
        }
        assert!((before - loss(&t, x, usize::MAX)).abs() < 1e-15);
        assert!(loss(&t, t.clone(), 5).abs() < 1e-14);
    }

    /// The teacher is made from the logits, and the gradient is the whole one all the same.
    #[test]
    fn gradients_are_those_of_the_value() {
        for top in [1, 5, 22] {
            check::gradients(&[logits(3)], |mut v| {
                let x = v.remove(0);
                let teacher = merged(logits(4), x.value(), top)?;
                x.kl_divergence(teacher)
            })
            .unwrap();
        }
    }

    #[test]
    fn equally_likely_tokens_go_by_their_ids() {
        let mut t = [1.0f64, 3.0, 1.0, 1.0];
        row(&mut t, &[0.0, 0.0, 0.0, 5.0], 2, &mut [3, 2, 1, 0]);
        assert_eq!(t[..2], [1.0, 3.0]);
        assert!((t[2].exp() + t[3].exp() - 2.0 * 1f64.exp()).abs() < 1e-14 && (t[3] - t[2] - 5.0).abs() < 1e-14);
    }

    #[test]
    fn a_constant_is_a_number_of_tokens() {
        assert_eq!(KlTop::default().with("50").unwrap().name(), "kl-top:50");
        assert_eq!(KlTop::default().with("1000").unwrap().name(), "kl-top");
        for bad in ["0", "-1", "many", ""] {
            let message = KlTop::default().with(bad).unwrap_err().to_string();
            assert!(message.contains("expected kl-top:K"), "{message}");
        }
    }
}
