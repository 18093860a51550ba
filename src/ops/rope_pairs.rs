//! Pairs of rows turned and scaled by learned angles and logarithms: what queries and keys can be multiplied by in front of the rotary
//! embedding ([`rope`](super::rope)) without changing their products, as it stands in the weights that make them.
//!
//! x `[H·D, cols]` has heads of D rows. Rows i and P + i of a head, `(a, b)`, become
//! `e^{±σ} (a cos θ − b sin θ, a sin θ + b cos θ)`, with `σ, θ` `[K, 2, P]` those of i and of key head h / (H/K); rows from 2P on stay.
//! Such a map commutes with the rotary embedding, which turns the same pairs; queries take the one sign and keys the other.
//!
//! Backward turns back: `dx = e^{±σ} (da cos θ + db sin θ, db cos θ − da sin θ)`, and with the sums over the row and over the heads of a
//! key head `dσ = ± Σ a dx_a + b dx_b`, `dθ = Σ a dx_b − b dx_a`.

use rayon::prelude::*;

use crate::device::cpu;
use crate::device::cuda::{CudaDevice, Queue};
use crate::device::ffi;
use crate::device::launch::{Check, Kind, View, Work};
use crate::ops::{At, Case, Pass, Place, Run, exact, normals};
use crate::tape::{Grads, Inputs, Op, Saved, Var, operands};
use crate::{DType, Error, Result, Tensor};

/// The operation: x `[H·D, cols]` as a matrix and the logarithms and angles `[K, 2, P]`. Keeps both.
#[derive(Clone, Copy, Debug)]
pub struct RopePairs {
    /// Rows of a head, D.
    pub dim: usize,
    /// Divides by the scales: the sign of σ is −.
    pub inverse: bool,
}

/// The sizes of a problem.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    /// Rows of a head.
    pub dim: usize,
    /// Heads that share their angles.
    pub group: usize,
    /// Pairs of a head.
    pub pairs: usize,
    /// Values of a row.
    pub cols: usize,
}

impl RopePairs {
    fn sign(self) -> f64 {
        if self.inverse { -1.0 } else { 1.0 }
    }

    fn sizes(self, x: &Tensor, p: &Tensor) -> Sizes {
        let kinds = p.shape()[0].max(1);
        Sizes { dim: self.dim, group: (x.rows() / self.dim / kinds).max(1), pairs: p.cols(), cols: x.cols() }
    }

    /// `(e^{±σ} cos θ, e^{±σ} sin θ)` of every key head's pairs.
    fn factors<T: cpu::Real>(self, p: &Tensor) -> Result<Vec<(T, T)>> {
        let (p, pairs) = (p.to_f64_vec()?, p.cols());
        let of = |p: &[f64]| {
            let (logs, angles) = p.split_at(pairs);
            let one = |(log, angle): (&f64, &f64)| {
                let s = (self.sign() * log).exp();
                (T::from_f64(s * angle.cos()), T::from_f64(s * angle.sin()))
            };
            logs.iter().zip(angles).map(one).collect::<Vec<_>>()
        };
        Ok(p.chunks(2 * pairs).flat_map(of).collect())
    }

    fn forward<T: cpu::Real>(self, x: Tensor, p: &Tensor) -> Result<Tensor> {
        let (shape, sizes) = (x.shape().to_vec(), self.sizes(&x, p));
        let mut y = x.into_owned::<T>()?;
        turn(&mut y, &self.factors(p)?, sizes, false);
        Tensor::from_vec(y, shape)
    }

    fn gradients<T: cpu::Real>(self, x: &Tensor, p: &Tensor, dy: Tensor, want: &[bool]) -> Result<Grads> {
        let (shape, sizes) = (dy.shape().to_vec(), self.sizes(&dy, p));
        let mut dx = dy.into_owned::<T>()?;
        turn(&mut dx, &self.factors(p)?, sizes, true);
        let dp = match want[1] {
            true => {
                let sums = sums(x.as_slice::<T>()?, &dx, p.shape()[0], sizes, self.sign());
                Some(Tensor::from_vec(sums.into_iter().map(T::from_f64).collect::<Vec<T>>(), p.shape())?)
            }
            false => None,
        };
        Ok(vec![want[0].then(|| Tensor::from_vec(dx, shape)).transpose()?, dp])
    }
}

/// Every pair times its factor, a complex number, or its conjugate; in place.
fn turn<T: cpu::Real>(x: &mut [T], factors: &[(T, T)], n: Sizes, back: bool) {
    let Sizes { dim, group, pairs, cols } = n;
    x.par_chunks_mut((dim * cols).max(1)).enumerate().for_each(|(head, x)| {
        let factors = &factors[head / group * pairs..][..pairs];
        let (first, second) = x[..2 * pairs * cols].split_at_mut(pairs * cols);
        for ((a, b), &(c, s)) in first.chunks_mut(cols.max(1)).zip(second.chunks_mut(cols.max(1))).zip(factors) {
            let s = if back { T::ZERO - s } else { s };
            a.iter_mut().zip(b).for_each(|(a, b)| (*a, *b) = (*a * c - *b * s, *a * s + *b * c));
        }
    });
}

/// The gradient of logarithms and angles, summed in double and in a fixed order.
fn sums<T: cpu::Real>(x: &[T], dx: &[T], kinds: usize, n: Sizes, sign: f64) -> Vec<f64> {
    let Sizes { dim, group, pairs, cols } = n;
    let size = (dim * cols).max(1);
    let head = |(x, dx): (&[T], &[T])| {
        let row = |t: &[T], i: usize| -> Vec<f64> { t[i * cols..][..cols].iter().map(|v| v.to_f64()).collect() };
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        let mut sums = vec![0.0; 2 * pairs];
        for i in 0..pairs {
            let ([a, b], [da, db]) = ([row(x, i), row(x, pairs + i)], [row(dx, i), row(dx, pairs + i)]);
            sums[i] = sign * (dot(&a, &da) + dot(&b, &db));
            sums[pairs + i] = dot(&a, &db) - dot(&b, &da);
        }
        sums
    };
    let heads: Vec<Vec<f64>> = x.par_chunks(size).zip(dx.par_chunks(size)).map(head).collect();
    let mut total = vec![0.0; kinds * 2 * pairs];
    for (total, heads) in total.chunks_mut((2 * pairs).max(1)).zip(heads.chunks(group)) {
        heads.iter().for_each(|sums| total.iter_mut().zip(sums).for_each(|(t, s)| *t += s));
    }
    total
}

impl Op for RopePairs {
    fn name(&self) -> &'static str {
        "rope_pairs"
    }
    fn check(&self, inputs: &[Tensor]) -> Result<()> {
        let [x, p] = operands(inputs)?;
        let [kinds, 2, pairs] = *p.shape() else {
            return Err(Error::shape("rope_pairs: logarithms and angles", "[key heads, 2, pairs]", p.shape()));
        };
        if kinds == 0 || pairs == 0 || 2 * pairs > self.dim {
            let expected = format!("[at least 1, 2, from 1 to {}]", self.dim / 2);
            return Err(Error::shape("rope_pairs: logarithms and angles", expected, p.shape()));
        }
        if x.cols() == 0 || !x.rows().is_multiple_of(self.dim * kinds) {
            return Err(Error::shape("rope_pairs", format!("[multiple of {}, at least 1]", self.dim * kinds), x.shape()));
        }
        let wide = if x.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
        if p.dtype() != wide {
            return Err(Error::dtype("rope_pairs: logarithms and angles", wide, p.dtype()));
        }
        Ok(())
    }
    fn cpu(&self, inputs: Inputs, save: &mut Saved) -> Result<Tensor> {
        let [x, p] = inputs.take()?;
        keep(save, &x, &p);
        if x.dtype() == DType::F64 { self.forward::<f64>(x, &p) } else { self.forward::<f32>(x, &p) }
    }
    /// In place when unshared.
    fn gpu(&self, device: &CudaDevice, inputs: Inputs, save: &mut Saved) -> Result<Tensor> {
        let [x, p] = inputs.take()?;
        keep(save, &x, &p);
        let (mut x, p) = (x.aligned()?, p.aligned()?);
        let (y, sizes) = (x.or_new(device)?, self.sizes(&x, &p));
        launch(device.queue(), *self, y.view()?, x.view()?, p.view()?, sizes)?;
        Ok(y)
    }
    fn backward(&self, saved: Saved, dy: Tensor, want: &[bool]) -> Result<Grads> {
        let (x, p) = kept(saved, want)?;
        if dy.dtype() == DType::F64 { self.gradients::<f64>(&x, &p, dy, want) } else { self.gradients::<f32>(&x, &p, dy, want) }
    }
    fn gpu_backward(&self, device: &CudaDevice, saved: Saved, dy: Tensor, want: &[bool]) -> Result<Grads> {
        let (x, p) = kept(saved, want)?;
        let (x, p, mut dy) = (x.aligned()?, p.aligned()?, dy.aligned()?);
        let sizes = self.sizes(&dy, &p);
        let dp = want[1].then(|| Tensor::on(device, p.shape(), DType::F32)).transpose()?;
        let dx = want[0].then(|| dy.or_new(device)).transpose()?;
        let x = want[1].then(|| x.view()).transpose()?;
        let outputs = [dx.as_ref().map(Tensor::view).transpose()?, dp.as_ref().map(Tensor::view).transpose()?];
        launch_backward(device.queue(), *self, outputs, (dy.view()?, x), p.view()?, sizes)?;
        Ok(vec![dx, dp])
    }
}

/// The logarithms and angles, and x where their gradient is wanted.
fn keep(save: &mut Saved, x: &Tensor, p: &Tensor) {
    if save.wants_any() {
        save.push(p.clone());
    }
    if save.wants(1) {
        save.push(x.clone());
    }
}

/// Back from [`keep`]: x (the logarithms and angles again where it was not kept) and those.
fn kept(saved: Saved, want: &[bool]) -> Result<(Tensor, Tensor)> {
    if want[1] {
        let [p, x] = saved.take()?;
        return Ok((x, p));
    }
    let [p] = saved.take()?;
    Ok((p.clone(), p))
}

/// How many heads so many values are, and logarithms and angles of theirs.
fn counts(c: &Check<'_>, len: usize, n: Sizes) -> Result<[usize; 2]> {
    let heads = c.rows(len, c.product(&[n.dim, n.cols])?)?;
    if n.group == 0 || !heads.is_multiple_of(n.group) || n.pairs == 0 || c.product(&[2, n.pairs])? > n.dim {
        let Sizes { dim, group, pairs, .. } = n;
        let message = format!("{heads} heads of {dim} rows, {group} alike, and {pairs} pairs of each do not fit together");
        return Err(Error::argument("rope_pairs", message));
    }
    Ok([heads, c.product(&[heads / n.group, 2, n.pairs])?])
}

/// The operation on the rows of heads, logarithms and angles in `f32`, or `f64` where x is; y may be x.
pub(crate) fn launch(queue: Queue<'_>, op: RopePairs, y: View<'_>, x: View<'_>, p: View<'_>, n: Sizes) -> Result<()> {
    let c = Check::new("rope_pairs", queue);
    let (len, kind, work) = (x.len(), x.kind(), Work::moving("scale", 2 * x.bytes()));
    let [heads, entries] = counts(&c, len, n)?;
    let of_p = if kind == Kind::F64 { kind } else { Kind::F32 };
    let (y, x, p) = (c.operand("y", y, kind, len)?, c.operand("x", x, kind, len)?, c.operand("angles", p, of_p, entries)?);
    let (heads, group, dim, pairs) = (c.int(heads)?, c.int(n.group)?, c.int(n.dim)?, c.int(n.pairs)?);
    let (cols, sign) = (c.long(n.cols)?, op.sign());
    if kind == Kind::F64 {
        // SAFETY: x and y have heads · dim · cols values of f64 and may be the same; p has 2 · pairs for every `group` heads.
        return c.launch(work, |s| unsafe { ffi!(sq_rope_pairs_f64(y, x, p, heads, group, dim, pairs, cols, sign, s)) });
    }
    let (dtype, sign) = (c.code(kind)?, sign as f32);
    // SAFETY: x and y have heads · dim · cols values of one kind and may be the same; p has 2 · pairs floats for every `group` heads.
    c.launch(work, |s| unsafe { ffi!(sq_rope_pairs(y, x, p, heads, group, dim, pairs, cols, sign, dtype, s)) })
}

/// The gradients of x and of the logarithms and angles, those that there is room for; x is read for the second alone. dx may be dy.
pub(crate) fn launch_backward(
    queue: Queue<'_>,
    op: RopePairs,
    [dx, dp]: [Option<View<'_>>; 2],
    (dy, x): (View<'_>, Option<View<'_>>),
    p: View<'_>,
    n: Sizes,
) -> Result<()> {
    let c = Check::new("rope_pairs backward", queue);
    let (len, kind) = (dy.len(), dy.kind());
    let work = Work::moving("scale", dy.bytes() * (1 + usize::from(dx.is_some()) + usize::from(dp.is_some())));
    let [heads, entries] = counts(&c, len, n)?;
    if dp.is_some() && x.is_none() {
        return Err(Error::argument("rope_pairs backward", "expected x for the gradient of the angles, got none"));
    }
    let (dx, x) = (c.optional("dx", dx, kind, len)?, c.optional("x", x, kind, len)?);
    let dp = c.optional("their gradient", dp, Kind::F32, entries)?;
    let (dy, p) = (c.operand("dy", dy, kind, len)?, c.operand("angles", p, Kind::F32, entries)?);
    let (heads, group, dim, pairs) = (c.int(heads)?, c.int(n.group)?, c.int(n.dim)?, c.int(n.pairs)?);
    let (cols, sign, dtype) = (c.long(n.cols)?, op.sign() as f32, c.code(kind)?);
    // SAFETY: dy, dx and x have heads · dim · cols values of one kind, and p and dp 2 · pairs floats for every `group` heads; dx, dp
    // and x may be null, x only where dp is; dx may be dy.
    c.launch(work, |s| unsafe { ffi!(sq_rope_pairs_backward(dx, dp, dy, x, p, heads, group, dim, pairs, cols, sign, dtype, s)) })
}

impl Var<'_> {
    /// Turns and scales pairs of the rows of heads of `dim` in self `[H·D, cols]`, the first rows of every head, by logarithms and
    /// angles `[K, 2, P]`: see [the module](crate::ops::rope_pairs). `inverse` changes the sign of the logarithms. They are `f64` for
    /// `f64` values, else `f32`.
    ///
    /// # Errors
    /// Those of [`Tape::record`](crate::Tape::record); rows that are not heads of all key heads, more pairs than heads have, another
    /// type.
    pub fn rope_pairs(self, by: Self, dim: usize, inverse: bool) -> Result<Self> {
        self.tape().record(RopePairs { dim, inverse }, vec![self, by])
    }
}

/// y by the formula above.
pub fn reference(op: RopePairs, x: &[f64], p: &[f64], n: Sizes) -> Vec<f64> {
    let mut y = x.to_vec();
    for (row, y) in y.chunks_mut(n.cols).enumerate() {
        let (head, i) = (row / n.dim, row % n.dim);
        if i >= 2 * n.pairs {
            continue;
        }
        let at = head / n.group * 2 * n.pairs + i % n.pairs;
        let (s, angle) = ((op.sign() * p[at]).exp(), p[at + n.pairs]);
        let pair = |second: usize| &x[(head * n.dim + i % n.pairs + second * n.pairs) * n.cols..][..n.cols];
        for (y, (a, b)) in y.iter_mut().zip(pair(0).iter().zip(pair(1))) {
            *y = s * if i < n.pairs { a * angle.cos() - b * angle.sin() } else { a * angle.sin() + b * angle.cos() };
        }
    }
    y
}

fn graph(dim: usize, inverse: bool) -> impl for<'t> Fn(Vec<Var<'t>>) -> Result<Var<'t>> + Send + Sync + 'static {
    move |v| {
        let [x, p]: [Var; 2] = v.try_into().map_err(|_| Error::Tape("two operands".into()))?;
        let wide = if x.value().dtype().is_half() { DType::F32 } else { x.value().dtype() };
        x.rope_pairs(p.to_dtype(wide)?, dim, inverse)
    }
}

/// Worked cases.
pub fn cases() -> Vec<Case> {
    let case = |name: &str, [heads, kinds]: [usize; 2], [dim, pairs]: [usize; 2], cols: usize, inverse: bool| {
        let operands = normals(&[(&[heads * dim, cols], 61), (&[kinds, 2, pairs], 62)]);
        Case::new("rope_pairs", name, operands, graph(dim, inverse))
    };
    let mut all = vec![
        case("one pair", [1, 1], [2, 1], 1, false),
        case("a bias", [4, 2], [8, 4], 1, true),
        case("keys", [3, 3], [6, 3], 24, false),
        case("queries, odd columns", [6, 2], [4, 2], 13, true),
        case("three quarters of a head", [4, 1], [8, 3], 16, true),
        case("32 heads of 64, 8 of keys, 257 columns", [32, 8], [64, 32], 257, true).large(),
        case("8 heads of 128, 96 of them turned, 1376 columns", [8, 8], [128, 48], 1376, false).large(),
    ];
    all.extend(Case::table(timed, SIZES));
    all.extend(Case::table(timed_backward, SIZES));
    all
}

const SIZES: &[At] = &[(Place::Cpu, 4096, 4096, &[DType::F32]), (Place::Gpu, 4096, 4096, &[DType::BF16, DType::F32])];
/// Rows of a head of the timed cases.
const DIM: usize = 128;

fn shapes(n: usize, rows: usize) -> Vec<Vec<usize>> {
    vec![vec![rows, n], vec![(rows / DIM).max(1), 2, DIM / 2]]
}

fn timed(n: usize, rows: usize) -> Case {
    let what = ("rope_pairs", "rope-pairs", "Pairs of rows of n, of rows / 128 heads, turned and scaled");
    Case::timed(what, (n, rows), shapes(n, rows), Run::graph(graph(DIM, false)), move |x, y| {
        let p = x[1].to_f64_vec()?;
        for r in exact::some(rows) {
            // The row and the other one of its pair are a problem of their own.
            let (head, i) = (r / DIM, r % (DIM / 2));
            let pair = [i, i + DIM / 2].map(|i| exact::row(&x[0], head * DIM + i, n));
            let [a, b] = pair;
            let at = head * DIM + i;
            let sizes = Sizes { dim: 2, group: 1, pairs: 1, cols: n };
            let want = reference(RopePairs { dim: 2, inverse: false }, &[a?, b?].concat(), &[p[at], p[at + DIM / 2]], sizes);
            let second = usize::from(r % DIM >= DIM / 2);
            exact::close("rope_pairs", &exact::row(&y[0], r, n)?, &want[second * n..][..n], y[0].dtype(), 1.0)?;
        }
        Ok(())
    })
}

fn timed_backward(n: usize, rows: usize) -> Case {
    let what = ("rope_pairs", "rope-pairs-backward", "Its gradients, of the rows and of the angles");
    Case::timed(what, (n, rows), shapes(n, rows), Run::graph(graph(DIM, false)), move |x, dx| {
        let p = x[1].to_f64_vec()?;
        for r in exact::some(rows) {
            let (head, i) = (r / DIM, r % (DIM / 2));
            let pair = [i, i + DIM / 2].map(|i| exact::row(&x[2], head * DIM + i, n));
            let [a, b] = pair;
            let at = head * DIM + i;
            // The transpose of a rotation is the rotation by the opposite angle.
            let sizes = Sizes { dim: 2, group: 1, pairs: 1, cols: n };
            let want = reference(RopePairs { dim: 2, inverse: false }, &[a?, b?].concat(), &[p[at], -p[at + DIM / 2]], sizes);
            let second = usize::from(r % DIM >= DIM / 2);
            exact::close("rope_pairs: dx", &exact::row(&dx[0], r, n)?, &want[second * n..][..n], dx[0].dtype(), 1.0)?;
            // The pair's scale and angle: Σ dy·y, and Σ dy·y' with y' = y turned by a right angle.
            let [x, dy] = [&x[0], &x[2]].map(|t| [i, i + DIM / 2].map(|i| exact::row(t, head * DIM + i, n)));
            let ([x0, x1], [dy0, dy1]) = (x, dy);
            let y = reference(RopePairs { dim: 2, inverse: false }, &[x0?, x1?].concat(), &[p[at], p[at + DIM / 2]], sizes);
            let (y0, y1) = y.split_at(n);
            let terms: Vec<[f64; 4]> =
                (0..n).zip(dy0?.into_iter().zip(dy1?)).map(|(j, (a, b))| [a * y0[j], b * y1[j], -a * y1[j], b * y0[j]]).collect();
            let sum = |f: &dyn Fn(&[f64; 4]) -> f64| terms.iter().map(f).sum::<f64>();
            let want = [sum(&|t| t[0] + t[1]), sum(&|t| t[2] + t[3]), sum(&|t| t.iter().map(|t| t.abs()).sum())];
            let dp = dx[1].to_f64_vec()?;
            // Of sums that may cancel: as far off as their terms allow.
            exact::close_to_largest(
                "rope_pairs: dp",
                &[dp[at], dp[at + DIM / 2], want[2]],
                &want,
                1e-5 + dx[1].dtype().epsilon(),
            )?;
        }
        Ok(())
    })
    .pass(Pass::Backward)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::randn;
    use crate::ops::rope::Rope;
    use crate::{Device, Tape};

    #[test]
    fn it_is_its_definition_and_undone_by_the_inverse_turned_back() {
        let (x, p) = (randn([2 * 3 * 8, 5], 1), randn([2, 2, 3], 2));
        let tape = Tape::new();
        for inverse in [false, true] {
            let op = RopePairs { dim: 8, inverse };
            let y = tape.constant(x.clone()).rope_pairs(tape.constant(p.clone()), 8, inverse).unwrap();
            let sizes = Sizes { dim: 8, group: 3, pairs: 3, cols: 5 };
            let want = reference(op, x.as_slice().unwrap(), p.as_slice().unwrap(), sizes);
            let close = |(a, b): (&f64, &f64)| (a - b).abs() < 1e-14 * (1.0 + b.abs());
            assert!(y.value().to_f64_vec().unwrap().iter().zip(&want).all(close), "inverse {inverse}");
            // The other sign and the opposite angles.
            let mut back = p.to_f64_vec().unwrap();
            back.chunks_mut(6).for_each(|p| p[3..].iter_mut().for_each(|angle| *angle = -*angle));
            let back = tape.constant(Tensor::from_vec(back, [2, 2, 3]).unwrap());
            let again = y.rope_pairs(back, 8, !inverse).unwrap();
            assert!(again.value().to_f64_vec().unwrap().iter().zip(x.as_slice().unwrap()).all(close));
        }
    }

    /// Scores of queries and keys behind the rotary embedding stay: the map commutes with it.
    #[test]
    fn scores_behind_the_rotary_embedding_stay() {
        let (dim, tokens) = (8, 4);
        for turned in [8, 6] {
            let (q, k) = (randn([4 * dim, tokens], 1), randn([2 * dim, tokens], 2));
            let frequencies: Vec<f64> = (0..turned / 2).map(|i| 0.3 + i as f64).collect();
            let rope = Rope::new(&frequencies, tokens, DType::F64, &Device::Cpu).unwrap();
            let scores = |p: Option<Tensor>| {
                let tape = Tape::new();
                // [H·D, tokens] as a weight makes them, transposed to rows of heads.
                let rows = |x: &Tensor, inverse: bool| {
                    let x = tape.constant(x.clone());
                    let x = match &p {
                        Some(p) => x.rope_pairs(tape.constant(p.clone()), dim, inverse).unwrap(),
                        None => x,
                    };
                    let one = tape.constant(identity(tokens));
                    one.linear(x).unwrap().heads(dim).unwrap().rope(&rope).unwrap().value().to_f64_vec().unwrap()
                };
                let (q, k) = (rows(&q, true), rows(&k, false));
                let mut scores = vec![];
                for (t, u, h) in (0..tokens).flat_map(|t| (0..tokens).flat_map(move |u| (0..4).map(move |h| (t, u, h)))) {
                    let (q, k) = (&q[(t * 4 + h) * dim..][..dim], &k[(u * 2 + h / 2) * dim..][..dim]);
                    scores.push(q.iter().zip(k).map(|(q, k)| q * k).sum::<f64>());
                }
                scores
            };
            let (want, got) = (scores(None), scores(Some(randn([2, 2, turned / 2], 3))));
            assert!(want.iter().zip(&got).all(|(a, b)| (a - b).abs() < 1e-12), "{turned}: {want:?} {got:?}");
        }
    }

    fn identity(n: usize) -> Tensor {
        let values = (0..n * n).map(|i| if i % (n + 1) == 0 { 1.0 } else { 0.0 }).collect::<Vec<f64>>();
        Tensor::from_vec(values, [n, n]).unwrap()
    }

    #[test]
    fn what_does_not_fit_is_an_error() {
        let tape = Tape::new();
        let says = |x: &[usize], p: Tensor, parts: &[&str]| {
            let message = tape.constant(randn(x.to_vec(), 1)).rope_pairs(tape.constant(p), 4, false).err().unwrap().to_string();
            assert!(parts.iter().all(|part| message.contains(part)), "{message}");
        };
        says(&[8, 3], randn([2, 2], 1), &["[key heads, 2, pairs]"]);
        says(&[8, 3], randn([1, 2, 3], 1), &["from 1 to 2", "[1, 2, 3]"]);
        says(&[12, 3], randn([2, 2, 2], 1), &["multiple of 8", "[12, 3]"]);
        says(&[8, 3], randn([2, 2, 2], 1).to_dtype(DType::F32).unwrap(), &["f64", "f32"]);
    }
}
