//! Rotary position embedding (Su et al. 2021), half-split: the first D values `(a, b)` of a head, cut in halves, at position p become
//! `(a c − b s, b c + a s)` with `c, s = cos, sin(p f_i)` and f the D/2 inverse frequencies; the others stay. Backward is the transpose:
//! the rotation back. Some models scale c and s.

use std::sync::Arc;

use crate::device::cuda::{CudaDevice, Queue};
use crate::device::launch::{Check, Kind, View, Work};
use crate::device::{Device, cpu, ffi};
use crate::ops::embedding::Embedding;
use crate::ops::{At, Case, Once, Pass, Place, Run, exact, normals};
use crate::tape::{Grads, Inputs, Op, Saved, Var, operands, run};
use crate::tensor::room;
use crate::{DType, Error, Result, Tensor};

/// Cosines and sines of every position, `[seq, D/2]`; cheap to clone.
#[derive(Clone, Debug)]
pub struct Rope {
    cos: Tensor,
    sin: Tensor,
}

impl Rope {
    /// The tables of positions 0 to `seq − 1`, for values of `dtype`: `f64` for `f64`, `f32` for everything narrower.
    /// Angles are computed in `f64`.
    ///
    /// # Errors
    /// No positions, or more than memory has room for.
    pub fn new(inverse_frequencies: &[f64], seq: usize, dtype: DType, device: &Device) -> Result<Self> {
        Self::scaled(inverse_frequencies, 1.0, seq, dtype, device)
    }
    /// The same with cosines and sines multiplied by a factor.
    ///
    /// # Errors
    /// Those of [`Rope::new`].
    pub fn scaled(inverse_frequencies: &[f64], factor: f64, seq: usize, dtype: DType, device: &Device) -> Result<Self> {
        let dtype = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
        if seq == 0 {
            return Err(Error::argument("rope", "expected at least one position, got 0"));
        }
        room("rope", &[seq, inverse_frequencies.len()], DType::F64)?;
        let table = |f: fn(f64) -> f64| {
            let values = (0..seq).flat_map(|p| inverse_frequencies.iter().map(move |w| factor * f(p as f64 * w))).collect();
            Tensor::from_vec(values, [seq, inverse_frequencies.len()])?.to_dtype(dtype)?.to_device(device)
        };
        Ok(Self { cos: table(f64::cos)?, sin: table(f64::sin)? })
    }
    /// The tables of some of the positions, one a token, in any order.
    ///
    /// # Errors
    /// No positions, or one that is not in the tables.
    pub fn at(&self, positions: Arc<[u32]>) -> Result<Self> {
        if positions.is_empty() {
            return Err(Error::argument("rope", "expected at least one position, got 0"));
        }
        let rows = |table: &Tensor| {
            let gather = Embedding { ids: positions.clone(), vocab: table.rows() };
            run(&gather, vec![table.clone()], &mut Saved::default())
        };
        Ok(Self { cos: rows(&self.cos)?, sin: rows(&self.sin)? })
    }
    /// Number of positions.
    pub fn seq(&self) -> usize {
        self.cos.rows()
    }
    /// Values of a head that are turned, the first ones.
    pub fn dim(&self) -> usize {
        2 * self.cos.cols()
    }
}

/// The rotation of `[tokens, heads, dim]`, dim at least D, token t at position t mod seq, or its transpose.
#[derive(Clone, Debug)]
pub(crate) struct Rotate {
    /// The angles.
    pub rope: Rope,
    /// Rotate back.
    pub transpose: bool,
}

impl Op for Rotate {
    fn name(&self) -> &'static str {
        "rope"
    }
    fn check(&self, inputs: &[Tensor]) -> Result<()> {
        let [x] = operands(inputs)?;
        let (seq, dim) = (self.rope.seq(), self.rope.dim());
        let [tokens, _, d] = *x.shape() else {
            return Err(Error::shape("rope", "[tokens, heads, dim]", x.shape()));
        };
        if d < dim || !tokens.is_multiple_of(seq.max(1)) {
            return Err(Error::shape("rope", format!("[multiple of {seq}, heads, at least {dim}]"), x.shape()));
        }
        Ok(())
    }
    fn cpu(&self, inputs: Inputs, _: &mut Saved) -> Result<Tensor> {
        let [x] = inputs.take()?;
        let Rope { cos, sin } = &self.rope;
        let shape = x.shape().to_vec();
        let sizes = Sizes { seq: self.rope.seq(), heads: shape[1], dim: shape[2], turned: self.rope.dim() };
        if x.dtype() == DType::F64 {
            let mut y = x.into_owned::<f64>()?;
            reference(&mut y, cos.as_slice()?, sin.as_slice()?, sizes, self.transpose);
            return Tensor::from_vec(y, shape);
        }
        let mut y = x.into_owned::<f32>()?;
        fast(&mut y, cos.as_slice()?, sin.as_slice()?, sizes, self.transpose);
        Tensor::from_vec(y, shape)
    }
    /// In place when unshared.
    fn gpu(&self, device: &CudaDevice, inputs: Inputs, _: &mut Saved) -> Result<Tensor> {
        let [x] = inputs.take()?;
        let mut x = x.aligned()?;
        let y = x.or_new(device)?;
        let angles = [self.rope.cos.view()?, self.rope.sin.view()?];
        let heads = (x.shape()[1], x.cols(), self.rope.dim());
        launch(device.queue(), y.view()?, x.view()?, angles, heads, self.transpose)?;
        Ok(y)
    }
    fn backward(&self, _: Saved, dy: Tensor, _: &[bool]) -> Result<Grads> {
        let back = Self { rope: self.rope.clone(), transpose: !self.transpose };
        Ok(vec![Some(run(&back, vec![dy], &mut Saved::default())?)])
    }
}

/// The sizes of a problem.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    /// Positions.
    pub seq: usize,
    /// Heads of a token.
    pub heads: usize,
    /// Values of a head.
    pub dim: usize,
    /// Values of a head that are turned, the first ones.
    pub turned: usize,
}

/// Rotates the first values of every head of x `[tokens, heads, dim]` by the cosines and sines `[seq, turned/2]` of its positions, or
/// back; y may be x.
pub(crate) fn launch(
    queue: Queue<'_>,
    y: View<'_>,
    x: View<'_>,
    [cos, sin]: [View<'_>; 2],
    (heads, dim, turned): (usize, usize, usize),
    transpose: bool,
) -> Result<()> {
    let c = Check::new("rope", queue);
    let (n, kind, work) = (x.len(), x.kind(), Work::moving("rope", 2 * x.bytes()));
    let (tokens, seq) = (c.rows(n, c.product(&[heads, dim])?)?, c.rows(cos.len(), turned / 2)?);
    let fits = turned >= 2 && turned.is_multiple_of(2) && turned <= dim;
    if !fits || (tokens > 0 && (seq == 0 || !tokens.is_multiple_of(seq))) {
        let message = format!("{tokens} tokens, {seq} positions and {turned} of heads of {dim} do not fit together");
        return Err(Error::argument("rope", message));
    }
    let angles = cos.len();
    let (y, x) = (c.operand("y", y, kind, n)?, c.operand("x", x, kind, n)?);
    let cos = c.operand("cosines", cos, Kind::F32, angles)?;
    let sin = c.operand("sines", sin, Kind::F32, angles)?;
    let (tokens, seq, heads, dim, dtype) = (c.long(tokens)?, c.long(seq)?, c.int(heads)?, c.int(dim)?, c.code(kind)?);
    let (turned, transpose) = (c.int(turned)?, i32::from(transpose));
    // SAFETY: x and y have tokens · heads · dim values and may be the same; both tables have seq rows of turned/2, at most dim/2.
    c.launch(work, |s| unsafe { ffi!(sq_rope(y, x, cos, sin, tokens, seq, heads, dim, turned, transpose, dtype, s)) })
}

impl Var<'_> {
    /// Splits rows into heads, `[.., heads · dim]` → `[tokens, heads, dim]`; free.
    ///
    /// # Errors
    /// [`Error::Shape`] where the columns are no multiple of `dim`, or `dim` is 0.
    pub fn heads(self, dim: usize) -> Result<Self> {
        let (rows, cols) = (self.value().rows(), self.value().cols());
        if dim == 0 || !cols.is_multiple_of(dim) {
            return Err(Error::shape("heads", format!("[.., a multiple of {dim}]"), self.shape()));
        }
        self.reshape([rows, cols / dim, dim])
    }
    /// Rotates the first [`Rope::dim`] values of every head of `[tokens, heads, dim]` by the angles of its position,
    /// `token mod rope.seq()`.
    ///
    /// # Errors
    /// If the heads have fewer values, or the tokens are not whole sequences.
    pub fn rope(self, rope: &Rope) -> Result<Self> {
        self.tape().record(Rotate { rope: rope.clone(), transpose: false }, vec![self])
    }
}

/// The rotation by the definition, in place.
pub fn reference(x: &mut [f64], cos: &[f64], sin: &[f64], n: Sizes, transpose: bool) {
    let Sizes { seq, heads, dim, turned } = n;
    let half = turned / 2;
    for (row, x) in x.chunks_mut(dim.max(1)).enumerate() {
        let position = row / heads % seq;
        for i in 0..half {
            let (c, s) = (cos[position * half + i], sin[position * half + i]);
            let s = if transpose { -s } else { s };
            let (a, b) = (x[i], x[half + i]);
            (x[i], x[half + i]) = (a * c - b * s, b * c + a * s);
        }
    }
}

fn fast(x: &mut [f32], cos: &[f32], sin: &[f32], n: Sizes, transpose: bool) {
    use rayon::prelude::*;
    let Sizes { seq, heads, dim, turned } = n;
    let (half, width) = (turned / 2, heads * dim);
    if width == 0 {
        return;
    }
    let sign = if transpose { -1.0 } else { 1.0 };
    let tokens = cpu::rows_per_task(width);
    x.par_chunks_mut(tokens * width).enumerate().for_each(|(task, x)| {
        cpu::simd(
            #[inline(always)]
            || {
                for (i, x) in x.chunks_mut(width).enumerate() {
                    let position = (task * tokens + i) % seq;
                    let (cos, sin) = (&cos[position * half..][..half], &sin[position * half..][..half]);
                    for x in x.chunks_mut(dim) {
                        let (a, b) = x[..turned].split_at_mut(half);
                        for (((a, b), &c), &s) in a.iter_mut().zip(b).zip(cos).zip(sin) {
                            let s = sign * s;
                            (*a, *b) = (*a * c - *b * s, *b * c + *a * s);
                        }
                    }
                }
            },
        );
    });
}

/// Worked cases.
pub(crate) fn cases() -> Vec<Case> {
    let scaled = |name: &str, (batch, seq): (usize, usize), heads: usize, [dim, turned]: [usize; 2], factor: f64| {
        Case::new("rope", name, normals(&[(&[batch * seq, heads * dim], 41)]), move |mut v| {
            let x = v.remove(0);
            let rope = Rope::scaled(&frequencies(turned), factor, seq, x.value().dtype(), &x.value().device())?;
            x.heads(dim)?.rope(&rope)
        })
    };
    let case = |name: &str, batch, heads, dim: usize| scaled(name, batch, heads, [dim, dim], 1.0);
    let mut all = vec![
        case("one token", (1, 1), 2, 8),
        case("odd", (3, 5), 3, 8),
        case("one pair a head", (2, 7), 1, 2),
        case("head of 80", (2, 3), 2, 80),
        scaled("three quarters of a head", (2, 5), 3, [32, 24], 1.0),
        scaled("a part of an odd head", (2, 3), 2, [9, 6], 1.25),
        scaled("scaled", (2, 7), 3, [16, 16], 1.19),
        case("8x128 tokens, 6 heads of 64", (8, 128), 6, 64).large(),
        scaled("8x128 tokens, 96 of 6 heads of 128", (8, 128), 6, [128, 96], 1.0).large(),
    ];
    all.extend(Case::table(timed, SIZES));
    all.extend(Case::table(timed_backward, SIZES));
    all
}

fn frequencies(dim: usize) -> Vec<f64> {
    (0..dim / 2).map(|i| 1e4f64.powf(-2.0 * i as f64 / dim as f64)).collect()
}

const SIZES: &[At] = &[(Place::Cpu, 4096, 4096, &[DType::F32]), (Place::Gpu, 4096, 16384, &[DType::BF16, DType::F32])];
/// Values of a head of the timed cases.
const DIM: usize = 128;

/// Tokens of a sequence of the timed cases: 2048, or all rows where they are no multiple of that.
fn timed_seq(rows: usize) -> usize {
    if rows.is_multiple_of(2048) { 2048 } else { rows }
}

fn graph(rows: usize) -> Run {
    let tables = Once::new();
    Run::graph(move |mut v| {
        let x = v.remove(0);
        let like = x.value();
        let rope = tables.get(like, || Rope::new(&frequencies(DIM), timed_seq(rows), like.dtype(), &like.device()))?;
        x.heads(DIM)?.rope(&rope)
    })
}

/// Row r rotated by the definition.
fn rotated(x: &[f64], r: usize, rows: usize, transpose: bool) -> Vec<f64> {
    let position = (r % timed_seq(rows)) as f64;
    let angles = |f: fn(f64) -> f64| frequencies(DIM).iter().map(|w| f(position * w)).collect::<Vec<_>>();
    let mut want = x.to_vec();
    reference(
        &mut want,
        &angles(f64::cos),
        &angles(f64::sin),
        Sizes { seq: 1, heads: x.len() / DIM, dim: DIM, turned: DIM },
        transpose,
    );
    want
}

fn timed(n: usize, rows: usize) -> Case {
    let what = ("rope", "rope", "Rotary embedding of rows of n / 128 heads");
    Case::timed(what, (n, rows), vec![vec![rows, n]], graph(rows), move |x, y| {
        exact::rows(n, x, &y[0], |r, got, x| exact::close("rope", got, &rotated(&x[0], r, rows, false), y[0].dtype(), 1.0))
    })
}

fn timed_backward(n: usize, rows: usize) -> Case {
    let what = ("rope", "rope-backward", "Its gradient: the rotation back");
    Case::timed(what, (n, rows), vec![vec![rows, n]], graph(rows), move |x, dx| {
        // The gradient of the result has the shape of the heads.
        exact::rows(n, &x[1..], &dx[0], |r, got, x| {
            exact::close("rope: dx", got, &rotated(&x[0], r, rows, true), dx[0].dtype(), 1.0)
        })
    })
    .pass(Pass::Backward)
}
