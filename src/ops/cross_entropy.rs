//! Mean cross entropy of logits `[rows, vocab]` against one target a row: `L = 1/n Σ_r (log Σ_j exp x_rj − x_r,target)` over the n
//! rows whose target is not −1. Backward: `dx = dL (softmax(x) − onehot)/n`, made by forward in the logits' own memory.

use std::sync::Arc;

use rayon::prelude::*;

use crate::device::cuda::{CudaDevice, Queue};
use crate::device::launch::{Check, Kind, View, Work};
use crate::device::{Device, cpu, ffi};
use crate::ops::{At, Case, Once, Pass, Place, Run, exact, kept_gradient, randn, scattered, sum};
use crate::tape::{Grads, Inputs, Op, Saved, Var, operands};
use crate::{DType, Error, Result, Tensor};

/// The operation; keeps the gradient.
#[derive(Clone, Debug)]
pub(crate) struct CrossEntropy {
    /// The right column of every row; −1 for rows that do not count.
    pub targets: Arc<[i32]>,
}

impl Op for CrossEntropy {
    fn name(&self) -> &'static str {
        "cross_entropy"
    }
    fn check(&self, inputs: &[Tensor]) -> Result<()> {
        let [x] = operands(inputs)?;
        check(x, &self.targets)?;
        match self.count() {
            0 => Err(Error::argument("cross_entropy", "no row has a target")),
            _ => Ok(()),
        }
    }
    fn cpu(&self, inputs: Inputs, save: &mut Saved) -> Result<Tensor> {
        let [x] = inputs.take()?;
        let (shape, count) = (x.shape().to_vec(), self.count() as f64);
        if x.dtype() == DType::F64 {
            let (losses, gradient) = reference(x.as_slice()?, &self.targets, x.cols());
            if save.wants(0) {
                save.push(Tensor::from_vec(gradient, shape)?);
            }
            return Ok(Tensor::scalar(losses.iter().sum::<f64>() / count));
        }
        let losses = if save.wants(0) {
            let cols = x.cols();
            let mut x = x.into_owned::<f32>()?;
            let losses = fast(&mut x, &self.targets, cols, 1.0 / count as f32);
            save.push(Tensor::from_vec(x, shape)?);
            losses
        } else {
            token_losses(&x, &self.targets)?
        };
        Ok(Tensor::scalar((losses.iter().sum::<f64>() / count) as f32))
    }
    /// The gradient is made in the logits' memory when unshared.
    fn gpu(&self, device: &CudaDevice, inputs: Inputs, save: &mut Saved) -> Result<Tensor> {
        let [x] = inputs.take()?;
        let want = save.wants(0);
        let gradient = if want { x.alone(device)? } else { x.aligned()? };
        let mean = 1.0 / self.count().max(1) as f64;
        let losses = rows_on_gpu(device, &gradient, &self.targets, if want { mean } else { 0.0 })?;
        let loss = sum::scaled(device, mean, &losses)?;
        if want {
            save.push(gradient);
        }
        Ok(loss)
    }
    fn rounds_to(&self, _: DType) -> DType {
        DType::F32
    }
    fn backward(&self, saved: Saved, dy: Tensor, _: &[bool]) -> Result<Grads> {
        kept_gradient(saved, dy)
    }
}

impl CrossEntropy {
    /// Rows that count.
    fn count(&self) -> usize {
        self.targets.iter().filter(|&&t| t >= 0).count()
    }
}

impl Var<'_> {
    /// The mean cross entropy of logits `[rows, vocab]` with one target a row, over rows whose target is not −1: a scalar, in `f64`
    /// for `f64` logits and in `f32` for all others.
    ///
    /// # Errors
    /// A target that is neither −1 nor a column; as many targets as rows are needed, and one that counts.
    pub fn cross_entropy(self, targets: Arc<[i32]>) -> Result<Self> {
        self.tape().record(CrossEntropy { targets }, vec![self])
    }
}

/// `log Σ exp x − x[target]` of every row (0 where the target is −1), without a tape; for evaluation.
///
/// # Errors
/// As [`Var::cross_entropy`], except that no target needs to count.
pub fn token_losses(logits: &Tensor, targets: &[i32]) -> Result<Vec<f64>> {
    check(logits, targets)?;
    let cols = logits.cols();
    if let Device::Cuda(device) = logits.device() {
        return rows_on_gpu(&device, &logits.clone().aligned()?, targets, 0.0)?.to_f64_vec();
    }
    if logits.dtype() == DType::F64 {
        return Ok(reference(logits.as_slice()?, targets, cols).0);
    }
    let wide = logits.to_dtype(DType::F32)?;
    let row = |(x, &target): (&[f32], &i32)| if target < 0 { 0.0 } else { cpu::simd(|| row_loss(x, target as usize)) };
    Ok(wide.as_slice::<f32>()?.par_chunks(cols).zip(targets).with_min_len(cpu::rows_per_task(cols)).map(row).collect())
}

/// Loss of every row, and logits overwritten by `scale (softmax − onehot)` unless `scale` is 0.
fn rows_on_gpu(device: &CudaDevice, logits: &Tensor, targets: &[i32], scale: f64) -> Result<Tensor> {
    let ids = device.upload(bytemuck::cast_slice(targets), Kind::I32)?;
    let losses = Tensor::on(device, &[logits.rows()], DType::F32)?;
    launch(device.queue(), logits.view()?, losses.view()?, ids.view(), logits.cols(), scale as f32)?;
    Ok(losses)
}

/// The loss (`f32`) of every row of logits for its target (`i32`; one outside the vocabulary marks a row that does not count), and the
/// logits overwritten by `scale (softmax − onehot)` unless `scale` is 0.
pub(crate) fn launch(
    queue: Queue<'_>,
    logits: View<'_>,
    loss: View<'_>,
    targets: View<'_>,
    vocab: usize,
    scale: f32,
) -> Result<()> {
    let c = Check::new("cross_entropy", queue);
    let (n, kind, work) = (logits.len(), logits.kind(), Work::moving("loss", 2 * logits.bytes()));
    let rows = c.rows(n, vocab)?;
    let logits = c.operand("logits", logits, kind, n)?;
    let loss = c.operand("loss", loss, Kind::F32, rows)?;
    let targets = c.operand("targets", targets, Kind::I32, rows)?;
    let (rows, vocab, dtype) = (c.long(rows)?, c.long(vocab)?, c.code(kind)?);
    // SAFETY: rows · vocab logits, one loss and one target a row, which the kernel tests against vocab.
    c.launch(work, |s| unsafe { ffi!(sq_cross_entropy(logits, loss, targets, rows, vocab, scale, dtype, s)) })
}

fn check(logits: &Tensor, targets: &[i32]) -> Result<()> {
    let vocab = logits.cols();
    if logits.shape().len() != 2 || logits.rows() != targets.len() || vocab == 0 {
        return Err(Error::shape("cross_entropy", format!("[{}, vocabulary]", targets.len()), logits.shape()));
    }
    if let Some(t) = targets.iter().find(|&&t| t < -1 || t >= 0 && t as usize >= vocab) {
        return Err(Error::argument("cross_entropy", format!("expected a target in 0..{vocab}, or -1, got {t}")));
    }
    Ok(())
}

/// The loss of every row and the gradient of their mean, by the definition.
pub fn reference(x: &[f64], targets: &[i32], cols: usize) -> (Vec<f64>, Vec<f64>) {
    let count = targets.iter().filter(|&&t| t >= 0).count() as f64;
    let (mut losses, mut gradient) = (vec![0.0; targets.len()], vec![0.0; x.len()]);
    for (r, x) in x.chunks(cols).enumerate().filter(|&(r, _)| targets[r] >= 0) {
        let target = targets[r] as usize;
        let max = x.iter().fold(f64::NEG_INFINITY, |m, &v| m.max(v));
        let sum: f64 = x.iter().map(|v| (v - max).exp()).sum();
        losses[r] = max + sum.ln() - x[target];
        for j in 0..cols {
            let onehot = if j == target { 1.0 } else { 0.0 };
            gradient[r * cols + j] = ((x[j] - max).exp() / sum - onehot) / count;
        }
    }
    (losses, gradient)
}

/// Overwrites logits with `scale · (softmax − onehot)`; returns the loss of every row.
fn fast(x: &mut [f32], targets: &[i32], cols: usize, scale: f32) -> Vec<f64> {
    let row = |(x, &target): (&mut [f32], &i32)| {
        if target < 0 {
            x.fill(0.0);
            return 0.0;
        }
        cpu::simd(
            #[inline(always)]
            || {
                let max = cpu::max(x);
                let at = f64::from(x[target as usize]);
                let sum = cpu::exp_sum(x, max);
                let factor = scale / sum;
                x.iter_mut().for_each(|x| *x *= factor);
                x[target as usize] -= scale;
                f64::from(max) + f64::from(sum).ln() - at
            },
        )
    };
    x.par_chunks_mut(cols).zip(targets).with_min_len(cpu::rows_per_task(cols)).map(row).collect()
}

#[inline(always)]
fn row_loss(x: &[f32], target: usize) -> f64 {
    let max = cpu::max(x);
    let sum = cpu::sum2(x, x, |x, _| cpu::exp_f32(x - max));
    f64::from(max) + f64::from(sum).ln() - f64::from(x[target])
}

/// Worked cases: rows that do not count, large logits, one row.
pub(crate) fn cases() -> Vec<Case> {
    let case = |name: &str, rows: usize, vocab: usize, size: f64| {
        let targets: Arc<[i32]> = (0..rows).map(|r| if r % 3 == 1 { -1 } else { (r * 7 % vocab) as i32 }).collect();
        let operands = move || {
            let mut x = randn([rows, vocab], 61).into_vec::<f64>().expect("f64");
            x.iter_mut().for_each(|x| *x *= size);
            vec![Tensor::from_vec(x, [rows, vocab]).expect("the same size")]
        };
        Case::new("cross_entropy", name, operands, move |mut v| v.remove(0).cross_entropy(targets.clone()))
    };
    let mut all = vec![
        case("one row", 1, 5, 1.0),
        case("one column", 4, 1, 1.0),
        case("odd", 5, 37, 1.0),
        case("large logits", 7, 24, 50.0),
        case("256x4096", 256, 4096, 3.0).large(),
    ];
    all.extend(Case::table(timed, SIZES));
    all
}

const SIZES: &[At] = &[
    (Place::Cpu, 32000, 524, &[DType::F32]),
    (Place::Gpu, 32000, 8192, &[DType::BF16, DType::F32]),
    (Place::Gpu, 128_256, 2048, &[DType::BF16, DType::F32]),
];

fn timed(n: usize, rows: usize) -> Case {
    let what = ("cross_entropy", "cross-entropy", "Mean cross entropy of rows of n logits, the gradient included");
    let targets = Once::new();
    let graph = Run::graph(move |mut v| {
        let targets = targets.get(v[0].value(), || Ok(scattered(rows, n).map(|t| t as i32).collect::<Arc<[i32]>>()))?;
        v.remove(0).cross_entropy(targets)
    });
    Case::timed(what, (n, rows), vec![vec![rows, n]], graph, move |x, dx| {
        exact::rows(n, x, &dx[0], |r, got, x| {
            let target = scattered(rows, n).nth(r).map_or(-1, |t| t as i32);
            // Gradients near the smallest numbers of f16 would be measured by those: multiplied by what they were divided by.
            let got: Vec<f64> = got.iter().map(|g| g * rows as f64).collect();
            exact::close("cross_entropy: dx", &got, &reference(&x[0], &[target], n).1, dx[0].dtype(), 1.0)
        })
    })
    .pass(Pass::Recorded)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Tape;

    #[test]
    fn losses_of_tokens() {
        let case = randn([5, 4096], 61).scale(3.0).unwrap();
        let targets = [3, -1, 4095, 0, 7];
        let exact = token_losses(&case, &targets).unwrap();
        assert_eq!(exact[1], 0.0);
        for dtype in [DType::F32, DType::BF16] {
            let x = case.to_dtype(dtype).unwrap();
            let losses = token_losses(&x, &targets).unwrap();
            for (a, b) in losses.iter().zip(&exact) {
                assert!((a - b).abs() < 4.0 * dtype.epsilon() * b.max(1.0), "{dtype}: {a} and {b}");
            }
            let tape = Tape::new();
            for x in [tape.constant(x.clone()), tape.variable(x)] {
                let mean = x.cross_entropy(targets.into()).unwrap();
                assert_eq!(mean.value().dtype(), DType::F32);
                assert!((mean.value().item().unwrap() - losses.iter().sum::<f64>() / 4.0).abs() < 1e-5);
            }
        }
    }

    #[test]
    fn wrong_targets_are_errors() {
        let x = randn([2, 3], 1);
        for targets in [vec![0, 3], vec![-2, 0], vec![0], vec![-1, -1]] {
            let tape = Tape::new();
            assert!(tape.constant(x.clone()).cross_entropy(targets.into()).is_err());
        }
        assert!(token_losses(&x, &[-1, -1]).is_ok());
    }
}
