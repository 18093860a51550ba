//! Mean divergence of logits `x [rows, vocab]` from a teacher's `t` over the K tokens S that the teacher finds likeliest, of equally likely
//! ones those with smaller ids. With p = softmax(t), q = softmax(x), m = Σ_S p, `p_* = 1 − m` and `q_* = 1 − Σ_S q`, a row is
//!
//! | [`Rest`] | L | ∂L/∂x_j in S | outside |
//! |---|---|---|---|
//! | [`Rest::Event`] | `Σ_S p (log p − log q) + p_* log(p_*/q_*)` | `q_j − p_j` | `q_j (1 − p_*/q_*)` |
//! | [`Rest::Partial`] | `Σ_S p (log p − log q)` | `m q_j − p_j` | `m q_j` |
//! | [`Rest::Gathered`] | `Σ_S p̂ (log p̂ − log q̂)`, softmaxes over S alone | `q̂_j − p̂_j` | 0 |
//!
//! The second and third are those of OSTQuant (arXiv 2501.13987); the second can be negative. Where S is all tokens the three are
//! [`kl_divergence`](crate::ops::kl_divergence). The gradient is made by forward in the logits' own memory. The teacher is a constant.

use rayon::prelude::*;

use crate::device::cuda::{CudaDevice, Queue};
use crate::device::launch::{Check, Kind, View, Work};
use crate::device::{cpu, ffi};
use crate::ops::{At, Case, Once, Pass, Place, Run, exact, kept_gradient, randn, repeated, sum};
use crate::tape::{Grads, Inputs, Op, Saved, Var, operands};
use crate::{DType, Error, Result, Tensor};

/// What becomes of the tokens outside S.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Rest {
    /// Together they are one event more.
    #[default]
    Event,
    /// They count in both softmaxes, and not in the sum.
    Partial,
    /// They count nowhere.
    Gathered,
}

/// The operation; keeps the gradient.
#[derive(Clone, Debug)]
pub(crate) struct KlTop {
    /// Logits `[rows, vocab]`.
    pub teacher: Tensor,
    /// K, at least 1.
    pub top: usize,
    pub rest: Rest,
}

impl Op for KlTop {
    fn name(&self) -> &'static str {
        "kl_top"
    }
    fn check(&self, inputs: &[Tensor]) -> Result<()> {
        let [x] = operands(inputs)?;
        if x.shape().len() != 2 || x.is_empty() {
            return Err(Error::shape("kl_top", "[rows, vocabulary]", x.shape()));
        }
        if self.top == 0 {
            return Err(Error::argument("kl_top", "expected at least one token to stand alone, got 0"));
        }
        if self.teacher.shape() != x.shape() {
            return Err(Error::shape("kl_top: the teacher's logits", format!("{:?}", x.shape()), self.teacher.shape()));
        }
        if self.teacher.device() != x.device() {
            return Err(Error::device("kl_top", format!("operands on {} and {}", x.device(), self.teacher.device())));
        }
        Ok(())
    }
    fn cpu(&self, inputs: Inputs, save: &mut Saved) -> Result<Tensor> {
        let [x] = inputs.take()?;
        let (shape, rows, cols) = (x.shape().to_vec(), x.rows() as f64, x.cols());
        let teacher = self.teacher.to_dtype(x.dtype())?;
        let (loss, gradient) = if x.dtype() == DType::F64 {
            let (losses, gradient) = reference(x.as_slice()?, teacher.as_slice()?, cols, self.top, self.rest);
            (Tensor::scalar(losses.iter().sum::<f64>() / rows), Tensor::from_vec(gradient, shape)?)
        } else {
            let mut x = x.into_owned::<f32>()?;
            let losses = fast(&mut x, teacher.as_slice()?, cols, (self.top, self.rest), 1.0 / rows);
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
        launch(device.queue(), gradient.view()?, losses.view()?, teacher.view()?, gradient.cols(), self, mean as f32)?;
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
    /// the same device) over the teacher's `top` likeliest tokens: a scalar, in `f64` for `f64` logits and in `f32` for all others.
    ///
    /// # Errors
    /// Those of [`Tape::record`](crate::Tape::record); no token; a teacher of another shape or on another device.
    pub fn kl_top(self, teacher: Tensor, top: usize, rest: Rest) -> Result<Self> {
        self.tape().record(KlTop { teacher, top, rest }, vec![self])
    }
}

/// The divergence (`f32`) of every row of logits from the teacher's, and the logits overwritten by `scale` times its gradient unless
/// that is 0.
fn launch(
    queue: Queue<'_>,
    logits: View<'_>,
    loss: View<'_>,
    teacher: View<'_>,
    vocab: usize,
    op: &KlTop,
    scale: f32,
) -> Result<()> {
    let c = Check::new("kl_top", queue);
    let (n, kind) = (logits.len(), logits.kind());
    let rows = c.rows(n, vocab)?;
    let (logits, teacher) = (c.operand("logits", logits, kind, n)?, c.operand("teacher", teacher, kind, n)?);
    let loss = c.operand("loss", loss, Kind::F32, rows)?;
    let (top, rest) = (c.long(op.top.min(vocab))?, op.rest as i32);
    let (rows, vocab, dtype) = (c.long(rows)?, c.long(vocab)?, c.code(kind)?);
    // SAFETY: logits and teacher have rows · vocab values of one kind; one loss a row.
    c.launch(Work::of("kl_top"), |s| unsafe { ffi!(sq_kl_top(logits, loss, teacher, rows, vocab, top, rest, scale, dtype, s)) })
}

/// The divergence of every row and the gradient of their mean, by the definition.
pub fn reference(x: &[f64], teacher: &[f64], cols: usize, top: usize, rest: Rest) -> (Vec<f64>, Vec<f64>) {
    let rows = (x.len() / cols) as f64;
    let (mut losses, mut gradient) = (vec![], vec![0.0; x.len()]);
    for ((x, t), dx) in x.chunks(cols).zip(teacher.chunks(cols)).zip(gradient.chunks_mut(cols)) {
        let mut order: Vec<usize> = (0..cols).collect();
        order.sort_by(|&a, &b| t[b].partial_cmp(&t[a]).unwrap_or(std::cmp::Ordering::Equal)); // stable: smaller ids first
        let (s, others) = order.split_at(top.min(cols));
        let log_sum = |x: &[f64], of: &[usize]| {
            let max = of.iter().fold(f64::NEG_INFINITY, |m, &j| m.max(x[j]));
            if of.is_empty() { max } else { max + of.iter().map(|&j| (x[j] - max).exp()).sum::<f64>().ln() }
        };
        let counted = if rest == Rest::Gathered { s } else { &order };
        let (all_p, all_q) = (log_sum(t, counted), log_sum(x, counted));
        let (p, q) = (|j: usize| t[j] - all_p, |j: usize| x[j] - all_q);
        let (rest_p, sum_x) = (log_sum(t, others) - all_p, log_sum(x, others));
        let rest_q = sum_x - all_q;
        let mut loss: f64 = s.iter().map(|&j| p(j).exp() * (p(j) - q(j))).sum();
        let mass: f64 = if rest == Rest::Partial { s.iter().map(|&j| p(j).exp()).sum() } else { 1.0 };
        s.iter().for_each(|&j| dx[j] = (mass * q(j).exp() - p(j).exp()) / rows);
        for &j in others {
            dx[j] = match rest {
                Rest::Event => q(j).exp() - (rest_p + x[j] - sum_x).exp(),
                Rest::Partial => mass * q(j).exp(),
                Rest::Gathered => 0.0,
            } / rows;
        }
        if rest == Rest::Event && rest_p > f64::NEG_INFINITY {
            loss += rest_p.exp() * (rest_p - rest_q);
        }
        losses.push(loss);
    }
    (losses, gradient)
}

/// A value and its id as one integer: larger values first, then smaller ids. −0 is 0.
fn placed(x: f32, id: usize) -> u64 {
    let bits = (x + 0.0).to_bits();
    let ordered = if bits >> 31 == 1 { !bits } else { bits | 0x8000_0000 };
    (u64::from(ordered) << 32) | u64::from(u32::MAX - id as u32)
}

/// A running maximum and the sum of exponentials relative to it.
#[derive(Clone, Copy)]
struct LogSum {
    most: f64,
    sum: f64,
}

impl LogSum {
    /// Of values that are 0 where they do not belong to it.
    fn of(x: impl Iterator<Item = f64> + Clone) -> Self {
        let most = x.clone().fold(f64::NEG_INFINITY, f64::max);
        Self { most, sum: x.map(|x| (x - most).exp()).sum() }
    }
    fn log(self) -> f64 {
        if self.sum == 0.0 { f64::NEG_INFINITY } else { self.most + self.sum.ln() }
    }
}

/// `log(eᵃ + eᵇ)`; a is finite.
fn log_add(a: f64, b: f64) -> f64 {
    let most = a.max(b);
    most + ((a - most).exp() + (b - most).exp()).ln()
}

/// Overwrites logits with `scale` times the gradient of their divergence; returns that of every row. Sums are in double.
fn fast(x: &mut [f32], teacher: &[f32], cols: usize, (top, rest): (usize, Rest), scale: f64) -> Vec<f64> {
    let row = |(keys, order): &mut (Vec<u64>, Vec<u64>), (x, t): (&mut [f32], &[f32])| {
        keys.clear();
        keys.extend(t.iter().enumerate().map(|(j, &t)| placed(t, j)));
        let mut least = 0;
        if top < cols {
            order.clone_from(keys);
            least = *order.select_nth_unstable_by(top - 1, |a, b| b.cmp(a)).1;
        }
        let sums = |x: &[f32], member: bool| {
            LogSum::of(x.iter().zip(&*keys).filter(move |(_, k)| (**k >= least) == member).map(|(x, _)| f64::from(*x)))
        };
        let [p, q] = [sums(t, true), sums(x, true)];
        let (p_rest, q_rest) = if rest == Rest::Gathered || top >= cols {
            (f64::NEG_INFINITY, f64::NEG_INFINITY)
        } else {
            (sums(t, false).log(), sums(x, false).log())
        };
        let (all_p, all_q) = (log_add(p.log(), p_rest), log_add(q.log(), q_rest));
        let mass = if rest == Rest::Partial { (p.log() - all_p).exp() } else { 1.0 };
        let event = if rest == Rest::Event { (p_rest - all_p).exp() } else { 0.0 };
        let mut loss = if event > 0.0 { event * ((p_rest - all_p) - (q_rest - all_q)) } else { 0.0 };
        for ((x, &t), key) in x.iter_mut().zip(t).zip(&*keys) {
            let at = f64::from(*x);
            let dx = if *key >= least {
                let (p, q) = (f64::from(t) - all_p, at - all_q);
                let share = p.exp();
                loss += share * (p - q);
                mass * q.exp() - share
            } else {
                match rest {
                    Rest::Event => (at - all_q).exp() - event * (at - q_rest).exp(),
                    Rest::Partial => mass * (at - all_q).exp(),
                    Rest::Gathered => 0.0,
                }
            };
            *x = (scale * dx) as f32;
        }
        loss
    };
    let rows = x.par_chunks_mut(cols).zip(teacher.par_chunks(cols)).with_min_len(cpu::rows_per_task(cols));
    rows.map_init(Default::default, row).collect()
}

/// Worked cases: one row, one column, a teacher near and far, tokens that are equally likely, all tokens alone.
pub(crate) fn cases() -> Vec<Case> {
    let case = |name: &str, [rows, vocab, top]: [usize; 3], rest: Rest, size: f64, apart: f64| {
        let scaled = move |seed: u64, size: f64| -> Vec<f64> {
            randn([rows, vocab], seed).into_vec::<f64>().expect("f64").into_iter().map(|x| x * size).collect()
        };
        let tensor = move |v: Vec<f64>| Tensor::from_vec(v, [rows, vocab]).expect("the same size");
        let teachers = Once::new();
        Case::new(
            "kl_top",
            format!("{name}, {rest:?}"),
            move || vec![tensor(scaled(81, size))],
            move |mut v| {
                let x = v.remove(0);
                let like = x.value();
                let teacher = teachers.get(like, || {
                    // Exact in every type, so that every precision has the same teacher, and the same tokens of equal likelihood.
                    let teacher =
                        scaled(81, size).iter().zip(scaled(82, apart)).map(|(x, d)| ((x + d) * 8.0).round() / 8.0).collect();
                    tensor(teacher).to_dtype(like.dtype())?.to_device(&like.device())
                })?;
                x.kl_top(teacher, top, rest)
            },
        )
        .of_terms(1.0, 1.0 / rows as f64) // logarithms of probabilities; probabilities over rows
    };
    let mut all = vec![];
    for rest in [Rest::Event, Rest::Partial, Rest::Gathered] {
        all.extend([
            case("one row", [1, 5, 2], rest, 1.0, 1.0),
            case("one column", [4, 1, 3], rest, 1.0, 1.0),
            case("one token", [3, 19, 1], rest, 1.0, 0.5),
            case("odd", [5, 37, 11], rest, 1.0, 0.5),
            case("all tokens", [5, 37, 37], rest, 1.0, 0.5),
            case("large logits", [7, 24, 6], rest, 8.0, 8.0),
            case("many equal", [6, 700, 300], rest, 0.3, 0.1),
            case("256x4096", [256, 4096, 1000], rest, 3.0, 0.5).large(),
        ]);
    }
    all.extend(Case::table(timed, SIZES));
    all
}

const SIZES: &[At] = &[(Place::Cpu, 32000, 64, &[DType::F32]), (Place::Gpu, 32000, 8192, &[DType::BF16, DType::F32])];

/// K of the timed case.
const TOP: usize = 1000;

fn timed(n: usize, rows: usize) -> Case {
    let what = ("kl_top", "kl-top", "Mean divergence of rows of n logits over a teacher's 1000 likeliest, the gradient included");
    let teacher = |like: &Tensor, rows, n| repeated([rows, n], 2, like.dtype(), &like.device());
    let teachers = Once::new();
    let graph = Run::graph(move |mut v| {
        let teacher = teachers.get(v[0].value(), || teacher(v[0].value(), rows, n))?;
        v.remove(0).kl_top(teacher, TOP, Rest::Event)
    });
    Case::timed(what, (n, rows), vec![vec![rows, n]], graph, move |x, dx| {
        let both = [x[0].clone(), teacher(&x[0], rows, n)?];
        exact::rows(n, &both, &dx[0], |_, got, x| {
            let got: Vec<f64> = got.iter().map(|g| g * rows as f64).collect();
            exact::close("kl_top: dx", &got, &reference(&x[0], &x[1], n, TOP, Rest::Event).1, dx[0].dtype(), 1.0)
        })
    })
    .pass(Pass::Recorded)
    .moves(3.0 * n as f64 * rows as f64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Tape;

    const ALL: [Rest; 3] = [Rest::Event, Rest::Partial, Rest::Gathered];

    fn logits(seed: u64) -> Tensor {
        let x = randn([4, 23], seed).into_vec::<f64>().unwrap();
        Tensor::from_vec(x.into_iter().map(|x| 2.0 * x).collect(), [4, 23]).unwrap()
    }

    fn loss(teacher: &Tensor, student: Tensor, top: usize, rest: Rest) -> f64 {
        Tape::new().constant(student).kl_top(teacher.clone(), top, rest).unwrap().value().item().unwrap()
    }

    /// The definitions with probabilities, for one row.
    fn definition(t: &[f64], x: &[f64], top: usize, rest: Rest) -> f64 {
        let softmax = |x: Vec<f64>| -> Vec<f64> {
            let sum: f64 = x.iter().map(|v| v.exp()).sum();
            x.iter().map(|v| v.exp() / sum).collect()
        };
        let mut order: Vec<usize> = (0..t.len()).collect();
        order.sort_by(|&a, &b| t[b].total_cmp(&t[a]));
        let of = |x: &[f64], ids: &[usize]| ids.iter().map(|&j| x[j]).collect::<Vec<_>>();
        let kl = |p: &[f64], q: &[f64]| p.iter().zip(q).map(|(p, q)| p * (p / q).ln()).sum::<f64>();
        let (s, others) = order.split_at(top);
        if rest == Rest::Gathered {
            return kl(&softmax(of(t, s)), &softmax(of(x, s)));
        }
        let (p, q) = (softmax(t.to_vec()), softmax(x.to_vec()));
        let alone = kl(&of(&p, s), &of(&q, s));
        let (p, q) = (of(&p, others).iter().sum::<f64>(), of(&q, others).iter().sum::<f64>());
        if rest == Rest::Event && !others.is_empty() { alone + p * (p / q).ln() } else { alone }
    }

    #[test]
    fn is_its_definition_up_to_the_whole_divergence() {
        let (t, x) = (logits(1), logits(2));
        let (rows_t, rows_x) = (t.to_f64_vec().unwrap(), x.to_f64_vec().unwrap());
        let whole = Tape::new().constant(x.clone()).kl_divergence(t.clone()).unwrap().value().item().unwrap();
        for rest in ALL {
            let mut before = 0.0;
            for top in 1..=30 {
                let rows = rows_t.chunks(23).zip(rows_x.chunks(23));
                let want = rows.map(|(t, x)| definition(t, x, top.min(23), rest)).sum::<f64>() / 4.0;
                let got = loss(&t, x.clone(), top, rest);
                assert!((got - want).abs() < 1e-13, "{rest:?} {top}: {got}, {want}");
                if rest == Rest::Event {
                    assert!(got >= before, "{top}: {got} after {before}");
                }
                before = got;
                let narrow = |x: &Tensor| x.to_dtype(DType::F32).unwrap();
                assert!((loss(&narrow(&t), narrow(&x), top, rest) - want).abs() < 1e-5, "{rest:?} {top}");
            }
            assert!((before - whole).abs() < 1e-14, "{rest:?}: {before}, {whole}");
            assert!((loss(&t, x.clone(), usize::MAX, rest) - whole).abs() < 1e-14);
            assert!(loss(&t, t.clone(), 5, rest).abs() < 1e-14);
        }
        let row = |v: [f64; 2]| Tensor::from_vec(v.to_vec(), [1, 2]).unwrap();
        let negative = loss(&row([1.0, 0.5]), row([3.0, 0.0]), 1, Rest::Partial);
        assert!(negative < -0.2, "a partial sum can be negative: {negative}");
    }

    /// In `f32`, gradients too, where the student's likeliest tokens are far from the teacher's and where the rest is next to nothing.
    #[test]
    fn narrow_values_and_gradients_follow_far_from_the_teacher() {
        let t: Vec<f64> = vec![9.0, 8.0, 8.0, 8.0, -60.0, -90.0];
        for x in [vec![-95.0, 0.0, 0.5, 0.0, 90.0, 4.0], vec![3.0, 90.0, -90.0, 5.0, -100.0, -120.0]] {
            for rest in ALL {
                for top in 1..=6 {
                    let (losses, want) = reference(&x, &t, 6, top, rest);
                    let mut got: Vec<f32> = x.iter().map(|x| *x as f32).collect();
                    let narrow: Vec<f32> = t.iter().map(|t| *t as f32).collect();
                    let loss = fast(&mut got, &narrow, 6, (top, rest), 1.0);
                    assert!((loss[0] - losses[0]).abs() < 1e-9 * losses[0].abs().max(1.0), "{rest:?} {top}: {loss:?} {losses:?}");
                    let worst = got.iter().zip(&want).map(|(a, b)| (f64::from(*a) - b).abs()).fold(0.0, f64::max);
                    assert!(worst < 1e-7, "{rest:?} {top}: {got:?} {want:?}");
                }
            }
        }
    }

    #[test]
    fn equally_likely_tokens_go_by_their_ids() {
        let t = [1.0, 3.0, -0.0, 0.0, 1.0, 1.0];
        for dtype in [DType::F64, DType::F32] {
            for (top, alone) in [(1, vec![1]), (2, vec![0, 1]), (3, vec![0, 1, 4]), (5, vec![0, 1, 2, 4, 5])] {
                let tape = Tape::new();
                let x =
                    tape.variable(Tensor::from_vec(vec![0.0, 0.5, 1.0, 0.1, 0.2, 5.0], [1, 6]).unwrap().to_dtype(dtype).unwrap());
                let teacher = Tensor::from_vec(t.to_vec(), [1, 6]).unwrap().to_dtype(dtype).unwrap();
                let y = x.clone().kl_top(teacher, top, Rest::Gathered).unwrap();
                let dx = tape.backward(y).unwrap().take(&x).unwrap().to_f64_vec().unwrap();
                let moved: Vec<usize> = (0..6).filter(|&j| dx[j] != 0.0).collect();
                assert_eq!(moved, if top == 1 { vec![] } else { alone }, "{top}");
            }
        }
    }

    #[test]
    fn what_does_not_fit_is_an_error() {
        let tape = Tape::new();
        let x = || tape.constant(randn([2, 3], 1));
        assert!(x().kl_top(randn([3, 2], 1), 1, Rest::Event).is_err());
        let message = x().kl_top(randn([2, 3], 1), 0, Rest::Event).err().unwrap().to_string();
        assert!(message.contains("at least one token"), "{message}");
        assert!(tape.constant(randn([6], 1)).kl_top(randn([6], 1), 1, Rest::Event).is_err());
    }
}
