//! Mean Kullback–Leibler divergence of logits `x [rows, vocab]` from a teacher's `t`: `L = 1/rows Σ_r Σ_j p_rj (log p_rj − log q_rj)`,
//! p = softmax(t), q = softmax(x) (Hinton, Vinyals & Dean 2015, temperature 1). Zero exactly where both give the same probabilities.
//! Backward: `dx = dL (q − p)/rows`, made by forward in the logits' own memory. The teacher is a constant.

use std::rc::Rc;
use std::sync::Arc;

use rayon::prelude::*;

use crate::device::cuda::{CudaDevice, Queue};
use crate::device::launch::{Check, Kind, View, Work};
use crate::device::{Device, cpu, ffi};
use crate::ops::{At, Call, Case, Once, Pass, Place, Run, exact, kept_gradient, randn, repeated, sum};
use crate::tape::{Grads, Inputs, Op, Saved, Var, operands};
use crate::{DType, Error, Result, Tensor};

/// The operation; keeps the gradient.
#[derive(Clone, Debug)]
pub(crate) struct KlDivergence {
    /// Logits `[rows, vocab]`.
    pub teacher: Tensor,
}

impl Op for KlDivergence {
    fn name(&self) -> &'static str {
        "kl_divergence"
    }
    fn check(&self, inputs: &[Tensor]) -> Result<()> {
        let [x] = operands(inputs)?;
        if x.shape().len() != 2 || x.is_empty() {
            return Err(Error::shape("kl_divergence", "[rows, vocabulary]", x.shape()));
        }
        if self.teacher.shape() != x.shape() {
            let what = "kl_divergence: the teacher's logits";
            return Err(Error::shape(what, format!("{:?}", x.shape()), self.teacher.shape()));
        }
        if self.teacher.device() != x.device() {
            return Err(Error::device("kl_divergence", format!("operands on {} and {}", x.device(), self.teacher.device())));
        }
        Ok(())
    }
    fn cpu(&self, inputs: Inputs, save: &mut Saved) -> Result<Tensor> {
        let [x] = inputs.take()?;
        let (shape, rows, cols) = (x.shape().to_vec(), x.rows() as f64, x.cols());
        let teacher = self.teacher.to_dtype(x.dtype())?;
        let (loss, gradient) = if x.dtype() == DType::F64 {
            let (losses, gradient) = reference(x.as_slice()?, teacher.as_slice()?, cols);
            (Tensor::scalar(losses.iter().sum::<f64>() / rows), Tensor::from_vec(gradient, shape)?)
        } else {
            let mut x = x.into_owned::<f32>()?;
            let losses = fast(&mut x, teacher.as_slice()?, cols, (1.0 / rows) as f32);
            (Tensor::scalar((losses.iter().sum::<f64>() / rows) as f32), Tensor::from_vec(x, shape)?)
        };
        if save.wants(0) {
            save.push(gradient);
        }
        Ok(loss)
    }
    /// The gradient is made in the logits' memory when unshared.
    fn gpu(&self, device: &CudaDevice, inputs: Inputs, save: &mut Saved) -> Result<Tensor> {
        let [x] = inputs.take()?;
        let teacher = self.teacher.to_dtype(x.dtype())?.aligned()?;
        let gradient = x.alone(device)?;
        let losses = Tensor::on(device, &[gradient.rows()], DType::F32)?;
        let mean = 1.0 / gradient.rows() as f64;
        launch(device.queue(), gradient.view()?, losses.view()?, teacher.view()?, gradient.cols(), mean as f32)?;
        let loss = sum::scaled(device, mean, &losses)?;
        if save.wants(0) {
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

impl Var<'_> {
    /// The mean divergence of the probabilities of logits `[rows, vocab]` from those of the teacher's (a constant of the same shape, on
    /// the same device): a scalar, in `f64` for `f64` logits and in `f32` for all others.
    ///
    /// # Errors
    /// Those of [`Tape::record`](crate::Tape::record); a teacher of another shape or on another device.
    pub fn kl_divergence(self, teacher: Tensor) -> Result<Self> {
        self.tape().record(KlDivergence { teacher }, vec![self])
    }
}

/// The divergence of every row of logits `[rows, vocab]` from a teacher's, and whether both have their largest value in the same place
/// (of equal ones the first), without a tape; for evaluation.
///
/// # Errors
/// Those of [`Var::kl_divergence`].
pub fn token_divergences(logits: &Tensor, teacher: &Tensor) -> Result<(Vec<f64>, Vec<bool>)> {
    let op = KlDivergence { teacher: teacher.to_dtype(logits.dtype())? };
    op.check(std::slice::from_ref(logits))?;
    let (teacher, cols) = (&op.teacher, logits.cols());
    if let Device::Cuda(device) = logits.device() {
        let (logits, teacher) = (logits.clone().aligned()?, teacher.clone().aligned()?);
        let losses = Tensor::on(&device, &[logits.rows()], DType::F32)?;
        launch(device.queue(), logits.view()?, losses.view()?, teacher.view()?, cols, 0.0)?;
        let agree = device.buffer(logits.rows(), Kind::I32, "agreement")?;
        launch_agreement(device.queue(), agree.view(), logits.view()?, teacher.view()?, cols)?;
        let mut same = vec![0i32; logits.rows()];
        agree.download(0, bytemuck::cast_slice_mut(&mut same))?;
        return Ok((losses.to_f64_vec()?, same.into_iter().map(|same| same != 0).collect()));
    }
    if logits.dtype() == DType::F64 {
        let (x, t) = (logits.as_slice::<f64>()?, teacher.as_slice::<f64>()?);
        return Ok((reference(x, t, cols).0, agreement(x, t, cols)));
    }
    let (x, t) = (logits.to_dtype(DType::F32)?, teacher.to_dtype(DType::F32)?);
    let agree = agreement(x.as_slice::<f32>()?, t.as_slice::<f32>()?, cols);
    Ok((fast(&mut x.into_owned::<f32>()?, t.as_slice()?, cols, 0.0), agree))
}

/// Whether the largest values of two rows are in the same place, for all rows of `cols`.
fn agreement<T: PartialOrd + Sync>(a: &[T], b: &[T], cols: usize) -> Vec<bool> {
    let largest = |x: &[T]| (1..x.len()).fold(0, |most, i| if x[i] > x[most] { i } else { most });
    a.par_chunks(cols).zip(b.par_chunks(cols)).map(|(a, b)| largest(a) == largest(b)).collect()
}

/// 1 (`i32`) where the largest values of a row of `cols` of `a` and of `b` are in the same place, else 0.
pub(crate) fn launch_agreement(queue: Queue<'_>, agree: View<'_>, a: View<'_>, b: View<'_>, cols: usize) -> Result<()> {
    let c = Check::new("agreement", queue);
    let (n, kind) = (a.len(), a.kind());
    let rows = c.rows(n, cols)?;
    let (a, b) = (c.operand("a", a, kind, n)?, c.operand("b", b, kind, n)?);
    let agree = c.operand("agree", agree, Kind::I32, rows)?;
    let (rows, cols, dtype) = (c.long(rows)?, c.long(cols)?, c.code(kind)?);
    // SAFETY: a and b have rows · cols values of one kind; one i32 a row.
    c.launch(Work::of("agreement"), |s| unsafe { ffi!(sq_agreement(agree, a, b, rows, cols, dtype, s)) })
}

/// The divergence (`f32`) of every row of logits from the teacher's, and the logits overwritten by `scale (q − p)` unless it is 0.
fn launch(queue: Queue<'_>, logits: View<'_>, loss: View<'_>, teacher: View<'_>, vocab: usize, scale: f32) -> Result<()> {
    let c = Check::new("kl_divergence", queue);
    let (n, kind) = (logits.len(), logits.kind());
    let rows = c.rows(n, vocab)?;
    let (logits, teacher) = (c.operand("logits", logits, kind, n)?, c.operand("teacher", teacher, kind, n)?);
    let loss = c.operand("loss", loss, Kind::F32, rows)?;
    let (rows, vocab, dtype) = (c.long(rows)?, c.long(vocab)?, c.code(kind)?);
    // SAFETY: logits and teacher have rows · vocab values of one kind; one loss a row.
    c.launch(Work::of("kl_divergence"), |s| unsafe {
        ffi!(sq_kl_divergence(logits, loss, teacher, rows, vocab, scale, dtype, s))
    })
}

/// The divergence of every row and the gradient of their mean, by the definition.
pub fn reference(x: &[f64], teacher: &[f64], cols: usize) -> (Vec<f64>, Vec<f64>) {
    let log_softmax = |x: &[f64]| -> Vec<f64> {
        let max = x.iter().fold(f64::NEG_INFINITY, |m, &v| m.max(v));
        let sum: f64 = x.iter().map(|v| (v - max).exp()).sum();
        x.iter().map(|v| v - max - sum.ln()).collect()
    };
    let (mut losses, mut gradient) = (vec![], vec![]);
    let rows = (x.len() / cols) as f64;
    for (x, t) in x.chunks(cols).zip(teacher.chunks(cols)) {
        let (q, p) = (log_softmax(x), log_softmax(t));
        losses.push(p.iter().zip(&q).map(|(p, q)| p.exp() * (p - q)).sum());
        gradient.extend(p.iter().zip(&q).map(|(p, q)| (q.exp() - p.exp()) / rows));
    }
    (losses, gradient)
}

/// Overwrites logits with `scale · (q − p)`; returns the divergence of every row.
fn fast(x: &mut [f32], teacher: &[f32], cols: usize, scale: f32) -> Vec<f64> {
    let row = |p: &mut Vec<f32>, (x, t): (&mut [f32], &[f32])| {
        p.copy_from_slice(t);
        cpu::simd(
            #[inline(always)]
            || {
                let (max_t, max_x) = (cpu::max(t), cpu::max(x));
                let sum_t = cpu::exp_sum(p, max_t);
                // Σ p (t − x), relative to the maxima, so that nothing cancels but what is alike.
                let shift = max_t - max_x;
                let mut apart = 0f64;
                for ((p, t), x) in p.iter().zip(t).zip(x.iter()) {
                    apart += f64::from(p * (t - x - shift));
                }
                let sum_x = cpu::exp_sum(x, max_x);
                let (student, teacher) = (scale / sum_x, scale / sum_t);
                x.iter_mut().zip(p.iter()).for_each(|(x, p)| *x = student * *x - teacher * p);
                apart / f64::from(sum_t) + f64::from(sum_x).ln() - f64::from(sum_t).ln()
            },
        )
    };
    let rows = x.par_chunks_mut(cols).zip(teacher.par_chunks(cols)).with_min_len(cpu::rows_per_task(cols));
    rows.map_init(|| vec![0f32; cols], row).collect()
}

/// Worked cases: one row, one column, a teacher near and far.
pub(crate) fn cases() -> Vec<Case> {
    let case = |name: &str, rows: usize, vocab: usize, size: f64, apart: f64| {
        let scaled = move |seed: u64, size: f64| -> Vec<f64> {
            randn([rows, vocab], seed).into_vec::<f64>().expect("f64").into_iter().map(|x| x * size).collect()
        };
        let tensor = move |v: Vec<f64>| Tensor::from_vec(v, [rows, vocab]).expect("the same size");
        let teachers = Once::new();
        Case::new(
            "kl_divergence",
            name,
            move || vec![tensor(scaled(71, size))],
            move |mut v| {
                let x = v.remove(0);
                let like = x.value();
                let teacher = teachers.get(like, || {
                    // Exact in every type, so that every precision has the same teacher.
                    let teacher =
                        scaled(71, size).iter().zip(scaled(72, apart)).map(|(x, d)| ((x + d) * 8.0).round() / 8.0).collect();
                    tensor(teacher).to_dtype(like.dtype())?.to_device(&like.device())
                })?;
                x.kl_divergence(teacher)
            },
        )
    };
    let mut all = vec![
        case("one row", 1, 5, 1.0, 1.0),
        case("one column", 4, 1, 1.0, 1.0),
        case("odd", 5, 37, 1.0, 0.5),
        case("large logits", 7, 24, 8.0, 8.0),
        case("256x4096", 256, 4096, 3.0, 0.5).large(),
    ];
    all.extend(Case::table(timed, SIZES));
    all.extend(Case::table(timed_agreement, SIZES));
    all
}

const SIZES: &[At] = &[(Place::Cpu, 32000, 524, &[DType::F32]), (Place::Gpu, 32000, 8192, &[DType::BF16, DType::F32])];

fn timed(n: usize, rows: usize) -> Case {
    let what = ("kl_divergence", "kl-divergence", "Mean divergence of rows of n logits from a teacher's, the gradient included");
    let teacher = |like: &Tensor, rows, n| repeated([rows, n], 2, like.dtype(), &like.device());
    let teachers = Once::new();
    let graph = Run::graph(move |mut v| {
        let teacher = teachers.get(v[0].value(), || teacher(v[0].value(), rows, n))?;
        v.remove(0).kl_divergence(teacher)
    });
    Case::timed(what, (n, rows), vec![vec![rows, n]], graph, move |x, dx| {
        let both = [x[0].clone(), teacher(&x[0], rows, n)?];
        exact::rows(n, &both, &dx[0], |_, got, x| {
            let got: Vec<f64> = got.iter().map(|g| g * rows as f64).collect();
            exact::close("kl_divergence: dx", &got, &reference(&x[0], &x[1], n).1, dx[0].dtype(), 1.0)
        })
    })
    .pass(Pass::Recorded)
    .moves(3.0 * n as f64 * rows as f64)
}

/// Rows whose largest values are in the same place for about half of them.
fn timed_agreement(n: usize, rows: usize) -> Case {
    let run = Run::Call(Arc::new(|x: &[Tensor]| {
        let (a, b) = (x[0].clone(), x[1].clone());
        let (rows, n) = (a.rows(), a.cols());
        let as_floats = move |same: Vec<i32>| Tensor::from_vec(same.into_iter().map(|s| s as f32).collect(), [rows]);
        let Device::Cuda(device) = a.device() else {
            let [a, b] = [a.to_dtype(DType::F32)?, b.to_dtype(DType::F32)?];
            return Ok(Call::new(move || {
                let same = agreement(a.as_slice::<f32>()?, b.as_slice()?, n);
                Ok(vec![as_floats(same.into_iter().map(i32::from).collect())?])
            }));
        };
        let (a, b) = (a.aligned()?, b.aligned()?);
        let agree = Rc::new(device.buffer(rows, Kind::I32, "agreement")?);
        let result = agree.clone();
        Ok(Call {
            run: Box::new(move || launch_agreement(device.queue(), agree.view(), a.view()?, b.view()?, n)),
            results: Box::new(move || {
                let mut same = vec![0i32; rows];
                result.download(0, bytemuck::cast_slice_mut(&mut same))?;
                Ok(vec![as_floats(same)?])
            }),
        })
    }));
    let what = ("agreement", "agreement", "Whether the largest of rows of n logits are in the place of a teacher's");
    Case::timed(what, (n, rows), vec![], run, move |x, y| {
        let got = y[0].to_f64_vec()?;
        for r in exact::some(rows) {
            let want = agreement(&exact::row(&x[0], r, n)?, &exact::row(&x[1], r, n)?, n)[0];
            if got[r] != f64::from(u8::from(want)) {
                return Err(Error::numeric("wrong answer", format!("agreement: row {r} is {}, expected {want}", got[r])));
            }
        }
        let same = got.iter().sum::<f64>() / rows as f64;
        if rows >= 100 && n >= 100 && !(0.1..=0.95).contains(&same) {
            return Err(Error::numeric("wrong answer", format!("agreement: {same} of all rows, expected about half")));
        }
        Ok(())
    })
    .drawn(move |dtype, device| {
        let normal = |seed| repeated([rows, n], seed, dtype, device);
        let x = normal(1)?;
        Ok(vec![x.clone(), Tensor::axpby(1.0, x, 0.1, normal(2)?)?])
    })
    .moves(2.0 * n as f64 * rows as f64)
    .holds(4.0 * n as f64 * rows as f64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Tape;

    #[test]
    fn equal_logits_do_not_diverge() {
        for dtype in [DType::F64, DType::F32] {
            let x = randn([3, 50], 1).to_dtype(dtype).unwrap();
            let tape = Tape::new();
            let v = tape.variable(x.clone());
            // A constant added to all logits changes no probability.
            let moved = Tensor::from_vec(x.to_f64_vec().unwrap().into_iter().map(|x| x + 2.0).collect(), [3, 50]).unwrap();
            let loss = v.clone().kl_divergence(moved.to_dtype(dtype).unwrap()).unwrap();
            assert!(loss.value().item().unwrap().abs() < 4.0 * dtype.epsilon());
            let mut grads = tape.backward(loss).unwrap();
            let most = grads.take(&v).unwrap().to_f64_vec().unwrap().into_iter().fold(0f64, |m, g| m.max(g.abs()));
            assert!(most < 4.0 * dtype.epsilon());
        }
    }

    #[test]
    fn divergences_of_tokens() {
        let x = randn([40, 37], 1);
        let t = Tensor::axpby(1.0, x.clone(), 0.4, randn([40, 37], 2)).unwrap();
        let (want, _) = reference(x.as_slice().unwrap(), t.as_slice().unwrap(), 37);
        let (losses, agree) = token_divergences(&x, &t).unwrap();
        assert_eq!(losses, want);
        assert!(agree.contains(&true) && agree.contains(&false), "{agree:?}");
        let narrow = |x: &Tensor| x.to_dtype(DType::F32).unwrap();
        let (close, same) = token_divergences(&narrow(&x), &narrow(&t)).unwrap();
        assert!(close.iter().zip(&want).all(|(a, b)| (a - b).abs() < 1e-5));
        assert_eq!(same, agree);
        // Of equal ones the first.
        let row = |v: [f64; 3]| Tensor::from_vec(v.to_vec(), [1, 3]).unwrap();
        assert_eq!(token_divergences(&row([1.0, 2.0, 2.0]), &row([0.0, 3.0, 1.0])).unwrap().1, [true]);
        assert_eq!(token_divergences(&row([2.0, 1.0, 2.0]), &row([0.0, 1.0, 3.0])).unwrap().1, [false]);
        assert!(token_divergences(&x, &t.slice(1, 2).unwrap()).is_err());
    }

    #[test]
    fn teachers_that_do_not_fit_are_errors() {
        let tape = Tape::new();
        assert!(tape.constant(randn([2, 3], 1)).kl_divergence(randn([3, 2], 1)).is_err());
        assert!(tape.constant(randn([6], 1)).kl_divergence(randn([6], 1)).is_err());
    }
}
