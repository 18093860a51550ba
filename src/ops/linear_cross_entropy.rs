//! A linear layer and the cross entropy of its result, [`Var::cross_entropy`]'s L of `x Wᵀ`, without ever holding all logits: they are made a
//! few rows at a time, and their gradient is used up at once for `dx = dlogits W` and `dW = dlogitsᵀ x`, which are all that is kept.

use std::sync::Arc;

use crate::linalg::matmul;
use crate::ops::cross_entropy::{CrossEntropy, token_losses};
use crate::ops::{Case, normals};
use crate::tape::{Grads, Inputs, Op, Saved, Takes, Var, run};
use crate::{Error, Result, Tensor};

/// Logits that exist at once: 256 MiB of bf16.
const LOGITS: usize = 1 << 27;

/// The operation; keeps the gradients.
#[derive(Clone, Debug)]
pub(crate) struct LinearCrossEntropy {
    /// The right column of every row; −1 for rows that do not count.
    pub targets: Arc<[i32]>,
    /// Rows of logits made at once.
    pub rows: usize,
}

/// Rows of logits of `vocab` values that are made at once.
pub(crate) fn rows_at_once(vocab: usize) -> usize {
    (LOGITS / vocab.max(1)).next_multiple_of(128).max(128)
}

fn check(x: &Tensor, w: &Tensor, targets: &[i32]) -> Result<()> {
    if x.shape() != [targets.len(), w.cols()] || w.shape().len() != 2 {
        return Err(Error::shape("linear_cross_entropy", format!("[{}, {}]", targets.len(), w.cols()), x.shape()));
    }
    Ok(())
}

impl Op for LinearCrossEntropy {
    fn name(&self) -> &'static str {
        "linear_cross_entropy"
    }
    fn takes(&self) -> Takes {
        Takes::Anything
    }
    fn cpu(&self, inputs: Inputs, save: &mut Saved) -> Result<Tensor> {
        let [x, w] = inputs.take()?;
        check(&x, &w, &self.targets)?;
        let count = |targets: &[i32]| targets.iter().filter(|t| **t >= 0).count();
        let total = count(&self.targets);
        if total == 0 {
            return Err(Error::argument("linear_cross_entropy", "no row has a target"));
        }
        let (mut loss, mut dx, mut dw): (Option<Tensor>, Vec<Tensor>, Option<Tensor>) = (None, vec![], None);
        for (i, targets) in self.targets.chunks(self.rows.max(1)).enumerate() {
            let x = x.slice(i * self.rows.max(1), targets.len())?;
            // The mean over these rows, to weigh with their share.
            let share = count(targets) as f64 / total as f64;
            if share == 0.0 {
                if save.wants(0) {
                    dx.push(Tensor::zeros(x.shape(), x.dtype(), &x.device())?);
                }
                continue;
            }
            let logits = matmul::product(&x, false, &w, true, false, x.dtype())?;
            let mut kept = Saved::new(vec![save.wants_any()]);
            let part = run(&CrossEntropy { targets: targets.into() }, vec![logits], &mut kept)?;
            loss = Some(match loss {
                Some(sum) => Tensor::axpby(1.0, sum, share, part)?,
                None => part.scale(share)?,
            });
            let Some(gradient) = kept.into_vec().pop() else { continue };
            // Rounded where the logits were widened.
            let gradient = gradient.to_dtype(x.dtype())?;
            let scaled = |t: Tensor| if share == 1.0 { Ok(t) } else { t.scale(share) };
            if save.wants(0) {
                dx.push(scaled(matmul::product(&gradient, false, &w, false, false, x.dtype())?)?);
            }
            if save.wants(1) {
                let part = scaled(matmul::product(&gradient, true, &x, false, false, w.dtype())?)?;
                dw = Some(match dw {
                    Some(sum) => Tensor::axpby(1.0, sum, 1.0, part)?,
                    None => part,
                });
            }
        }
        if save.wants(0) {
            save.push(Tensor::concat(&dx)?);
        }
        dw.into_iter().for_each(|t| save.push(t));
        loss.ok_or_else(|| Error::argument("linear_cross_entropy", "no rows"))
    }
    fn backward(&self, saved: Saved, dy: Tensor, want: &[bool]) -> Result<Grads> {
        let factor = dy.item()?;
        let mut kept = saved.into_vec().into_iter();
        let mut next = || {
            let t = kept.next().ok_or_else(|| Error::Tape("linear_cross_entropy: a gradient was not kept".into()))?;
            if factor == 1.0 { Ok(t) } else { t.scale(factor) }
        };
        want.iter().map(|&w| w.then(&mut next).transpose()).collect()
    }
}

impl<'t> Var<'t> {
    /// The mean cross entropy of `self · Wᵀ` with self [rows, in], W [vocab, in] and one target a row, over rows whose target is not
    /// −1: what [`Var::linear`] and [`Var::cross_entropy`] give, in less memory.
    ///
    /// # Errors
    /// As [`Var::cross_entropy`].
    pub fn linear_cross_entropy(self, weight: Self, targets: Arc<[i32]>) -> Result<Self> {
        let rows = rows_at_once(weight.value().rows());
        self.tape().record(LinearCrossEntropy { targets, rows }, vec![self, weight])
    }
}

/// `log Σ exp − x[target]` of every row of `x Wᵀ` (0 where the target is −1), without a tape; for evaluation.
///
/// # Errors
/// As [`token_losses`].
pub fn linear_token_losses(x: &Tensor, w: &Tensor, targets: &[i32]) -> Result<Vec<f64>> {
    check(x, w, targets)?;
    let rows = rows_at_once(w.rows());
    let mut losses = Vec::with_capacity(targets.len());
    for (i, targets) in targets.chunks(rows).enumerate() {
        let logits = matmul::product(&x.slice(i * rows, targets.len())?, false, w, true, false, x.dtype())?;
        losses.extend(token_losses(&logits, targets)?);
    }
    Ok(losses)
}

/// Worked cases: one part, several, a part in which nothing counts.
pub(crate) fn cases() -> Vec<Case> {
    let case = |name: &str, tokens: usize, width: usize, vocab: usize, rows: usize| {
        let targets: Arc<[i32]> = (0..tokens).map(|r| if r / 2 == 1 { -1 } else { (r * 7 % vocab) as i32 }).collect();
        let operands = normals(&[(&[tokens, width], 71), (&[vocab, width], 72)]);
        Case::new("linear_cross_entropy", name, operands, move |v| {
            v[0].tape().record(LinearCrossEntropy { targets: targets.clone(), rows }, v)
        })
    };
    vec![
        case("one part", 5, 7, 11, 8),
        case("parts of 2", 7, 7, 11, 2),
        case("one row", 1, 3, 5, 1),
        case("large", 256, 128, 512, 96).large(),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DType;
    use crate::ops::randn;

    #[test]
    fn losses_of_tokens() {
        let (x, w) = (randn([5, 6], 1), randn([9, 6], 2));
        let targets = [3, -1, 8, 0, 2];
        let logits = matmul::product(&x, false, &w, true, false, DType::F64).unwrap();
        assert_eq!(linear_token_losses(&x, &w, &targets).unwrap(), token_losses(&logits, &targets).unwrap());
        assert!(linear_token_losses(&x, &w, &targets[1..]).is_err());
        assert!(rows_at_once(32_000) >= 4096 && rows_at_once(1 << 30) == 128);
    }
}
