//! Causal attention with grouped queries: query head h reads key-value head h / (H/KV), at position t the keys 0 to t.
//!
//! `s = q kᵀ/√D`, `p = softmax(s)`, `o = p v`. Forward keeps q, k, v, o and `lse = log Σ exp s` of every row, never an S×S matrix
//! (Dao et al. 2022); backward recomputes `p = exp(s − lse)`:
//! `dv = pᵀ do`, `ds = p (do vᵀ − Σ_D do o)`, `dq = ds k/√D`, `dk = dsᵀ q/√D`, dk and dv summed over the heads of the group.

use rayon::prelude::*;

use crate::device::cpu::{self, Strides};
use crate::device::cuda::{CudaDevice, Queue};
use crate::device::ffi;
use crate::device::launch::{Check, Kind, View, Work, code};
use crate::ops::{At, Case, Pass, Place, Run, exact, normals, repeated};
use crate::tape::{Grads, Inputs, Op, Saved, Var, operands};
use crate::{DType, Error, Result, Tensor};

/// The operation on q `[tokens, H, D]` and k, v `[tokens, KV, D]`.
#[derive(Clone, Copy, Debug)]
pub struct Attention {
    /// Tokens of one sequence.
    pub seq: usize,
}

/// Causal attention of `q [tokens, H, D]` over `k, v [tokens, KV, D]`, where tokens are whole sequences of `seq`: `[tokens, H·D]`.
///
/// # Errors
/// Shapes that do not fit together, or H no multiple of KV.
pub fn attention<'t>(q: Var<'t>, k: Var<'t>, v: Var<'t>, seq: usize) -> Result<Var<'t>> {
    q.tape().record(Attention { seq }, vec![q, k, v])
}

/// The sizes of one problem.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    /// Sequences.
    pub batch: usize,
    /// Tokens of each.
    pub seq: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Values per head.
    pub dim: usize,
}

impl Attention {
    fn sizes(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Sizes> {
        let ([tokens, heads, dim], [kv_tokens, kv_heads, kv_dim]) = (q.shape(), k.shape()) else {
            return Err(Error::shape(
                "attention",
                "[tokens, heads, dim]",
                if q.shape().len() == 3 { k.shape() } else { q.shape() },
            ));
        };
        let (seq, heads, dim) = (self.seq, *heads, *dim);
        if seq == 0 || dim == 0 || heads == 0 || !tokens.is_multiple_of(seq) {
            return Err(Error::shape("attention: q", format!("[multiple of {seq}, heads, dim]"), q.shape()));
        }
        if kv_tokens != tokens || *kv_dim != dim || *kv_heads == 0 || !heads.is_multiple_of(*kv_heads) {
            return Err(Error::shape("attention: k", format!("[{tokens}, divisor of {heads}, {dim}]"), k.shape()));
        }
        if v.shape() != k.shape() {
            return Err(Error::shape("attention: v", format!("{:?}", k.shape()), v.shape()));
        }
        if let Some(t) = [k, v].into_iter().find(|t| t.dtype() != q.dtype()) {
            return Err(Error::dtype("attention", q.dtype(), t.dtype()));
        }
        Ok(Sizes { batch: tokens / seq, seq, heads, kv_heads: *kv_heads, dim })
    }
}

impl Op for Attention {
    fn name(&self) -> &'static str {
        "attention"
    }
    fn check(&self, inputs: &[Tensor]) -> Result<()> {
        let [q, k, v] = operands(inputs)?;
        self.sizes(q, k, v).map(|_| ())
    }
    fn cpu(&self, inputs: Inputs, save: &mut Saved) -> Result<Tensor> {
        let [q, k, v] = inputs.take()?;
        let n = self.sizes(&q, &k, &v)?;
        let (o, lse) = if q.dtype() == DType::F64 {
            let (o, lse) = reference(q.as_slice()?, k.as_slice()?, v.as_slice()?, n);
            (Tensor::from_vec(o, n.rows())?, Tensor::from_vec(lse, n.scores())?)
        } else {
            let (o, lse) = fast(q.as_slice()?, k.as_slice()?, v.as_slice()?, n);
            (Tensor::from_vec(o, n.rows())?, Tensor::from_vec(lse, n.scores())?)
        };
        keep(save, [q, k, v], &o, lse);
        Ok(o)
    }
    fn gpu(&self, device: &CudaDevice, inputs: Inputs, save: &mut Saved) -> Result<Tensor> {
        let [q, k, v] = inputs.take()?;
        let n = self.sizes(&q, &k, &v)?;
        let (o, lse) = (Tensor::on(device, &n.rows(), q.dtype())?, Tensor::on(device, &n.scores(), DType::F32)?);
        let from = [q.clone().aligned()?, k.clone().aligned()?, v.clone().aligned()?];
        let views = [from[0].view()?, from[1].view()?, from[2].view()?];
        launch(device.queue(), o.view()?, lse.view()?, views, &n)?;
        keep(save, [q, k, v], &o, lse);
        Ok(o)
    }
    fn backward(&self, saved: Saved, dy: Tensor, want: &[bool]) -> Result<Grads> {
        let [q, k, v, o, lse] = saved.take()?;
        let n = self.sizes(&q, &k, &v)?;
        let (q_shape, k_shape) = (q.shape().to_vec(), k.shape().to_vec());
        let grads = if dy.dtype() == DType::F64 {
            let (dq, dk, dv) = reference_backward(dy.as_slice()?, q.as_slice()?, k.as_slice()?, v.as_slice()?, n);
            [Tensor::from_vec(dq, q_shape)?, Tensor::from_vec(dk, k_shape.clone())?, Tensor::from_vec(dv, k_shape)?]
        } else {
            let saved = Kept { q: q.as_slice()?, k: k.as_slice()?, v: v.as_slice()?, o: o.as_slice()?, lse: lse.as_slice()? };
            let (dq, dk, dv) = fast_backward(dy.as_slice()?, saved, n);
            [Tensor::from_vec(dq, q_shape)?, Tensor::from_vec(dk, k_shape.clone())?, Tensor::from_vec(dv, k_shape)?]
        };
        Ok(wanted(grads, want))
    }
    fn gpu_backward(&self, device: &CudaDevice, saved: Saved, dy: Tensor, want: &[bool]) -> Result<Grads> {
        let [q, k, v, o, lse] = saved.take()?;
        let n = self.sizes(&q, &k, &v)?;
        let (q, k, v, dy, o) = (q.aligned()?, k.aligned()?, v.aligned()?, dy.aligned()?, o.aligned()?);
        let like = |t: &Tensor| Tensor::on(device, t.shape(), t.dtype());
        let grads = [like(&q)?, like(&k)?, like(&v)?];
        let workspace = Tensor::on(device, &[workspace(&n, Kind::from(q.dtype()))?.div_ceil(4)], DType::F32)?;
        let to = [grads[0].view()?, grads[1].view()?, grads[2].view()?];
        let from = [q.view()?, k.view()?, v.view()?];
        launch_backward(device.queue(), to, workspace.view()?, dy.view()?, from, o.view()?, lse.view()?, &n)?;
        Ok(wanted(grads, want))
    }
}

fn keep(save: &mut Saved, [q, k, v]: [Tensor; 3], o: &Tensor, lse: Tensor) {
    if save.wants_any() {
        [q, k, v, o.clone(), lse].into_iter().for_each(|t| save.push(t));
    }
}

fn wanted(grads: [Tensor; 3], want: &[bool]) -> Grads {
    grads.into_iter().zip(want).map(|(g, &w)| w.then_some(g)).collect()
}

/// [`Sizes`] as the launchers take them, and the values of q, k and lse.
struct Extents {
    batch: i64,
    seq: i64,
    heads: i32,
    kv_heads: i32,
    dim: i32,
    scale: f32,
    q: usize,
    k: usize,
    lse: usize,
    /// Additions and multiplications of one product of a causal attention: half of B·H·T²·D times 2.
    flops: f64,
}

impl Extents {
    fn new(n: &Sizes) -> Result<Self> {
        let error = |message: &str| Error::argument("attention", format!("{message}: {n:?}"));
        if n.heads == 0 || n.kv_heads == 0 || n.dim == 0 || !n.heads.is_multiple_of(n.kv_heads) {
            return Err(error("unusable sizes"));
        }
        let product = |extents: [usize; 4]| {
            let product = extents.iter().try_fold(1usize, |product, &n| product.checked_mul(n));
            product.filter(|&n| n <= i64::MAX as usize).ok_or_else(|| error("more values than can be counted"))
        };
        let int = |n: usize| i32::try_from(n).map_err(|_| error("too large"));
        Ok(Self {
            batch: n.batch as i64,
            seq: n.seq as i64,
            heads: int(n.heads)?,
            kv_heads: int(n.kv_heads)?,
            dim: int(n.dim)?,
            scale: n.scale() as f32,
            q: product([n.batch, n.seq, n.heads, n.dim])?,
            k: product([n.batch, n.seq, n.kv_heads, n.dim])?,
            lse: product([n.batch, n.seq, n.heads, 1])?,
            flops: n.batch as f64 * n.heads as f64 * (n.seq as f64 * n.seq as f64) * n.dim as f64,
        })
    }
}

/// o and lse (`f32`) from q, k and v.
pub(crate) fn launch(queue: Queue<'_>, o: View<'_>, lse: View<'_>, [q, k, v]: [View<'_>; 3], sizes: &Sizes) -> Result<()> {
    let c = Check::new("attention", queue);
    let (n, kind) = (Extents::new(sizes)?, q.kind());
    let (o, lse) = (c.operand("o", o, kind, n.q)?, c.operand("lse", lse, Kind::F32, n.lse)?);
    let (q, k, v) = (c.operand("q", q, kind, n.q)?, c.operand("k", k, kind, n.k)?, c.operand("v", v, kind, n.k)?);
    let Extents { batch, seq, heads, kv_heads, dim, scale, .. } = n;
    let dtype = c.code(kind)?;
    // SAFETY: every operand has the values that the sizes ask for.
    c.launch(Work::computing("attention", 2.0 * n.flops), |s| unsafe {
        ffi!(sq_attention_forward(o, lse, q, k, v, batch, seq, heads, kv_heads, dim, scale, dtype, s))
    })
}

/// Bytes of workspace that [`launch_backward`] needs.
pub(crate) fn workspace(sizes: &Sizes, kind: Kind) -> Result<usize> {
    let Extents { batch, seq, heads, kv_heads, dim, .. } = Extents::new(sizes)?;
    let dtype = code(kind)?;
    // SAFETY: a pure function of its arguments.
    let bytes: i64 = unsafe { ffi!(sq_attention_workspace(batch, seq, heads, kv_heads, dim, dtype)) };
    usize::try_from(bytes).map_err(|_| Error::argument("attention", format!("a workspace of {bytes} bytes for {sizes:?}")))
}

/// dq, dk and dv; the workspace is of any kind and at least [`workspace`] bytes.
#[allow(clippy::too_many_arguments)]
pub(crate) fn launch_backward(
    queue: Queue<'_>,
    [dq, dk, dv]: [View<'_>; 3],
    space: View<'_>,
    dout: View<'_>,
    [q, k, v]: [View<'_>; 3],
    o: View<'_>,
    lse: View<'_>,
    sizes: &Sizes,
) -> Result<()> {
    let c = Check::new("attention backward", queue);
    let (n, kind, needed) = (Extents::new(sizes)?, q.kind(), workspace(sizes, q.kind())?);
    if space.bytes() < needed {
        let message = format!("a workspace of {} bytes, {needed} are needed", space.bytes());
        return Err(Error::argument("attention backward", message));
    }
    let (dq, dk, dv) = (c.operand("dq", dq, kind, n.q)?, c.operand("dk", dk, kind, n.k)?, c.operand("dv", dv, kind, n.k)?);
    let (q, k, v) = (c.operand("q", q, kind, n.q)?, c.operand("k", k, kind, n.k)?, c.operand("v", v, kind, n.k)?);
    let (dout, o) = (c.operand("do", dout, kind, n.q)?, c.operand("o", o, kind, n.q)?);
    let lse = c.operand("lse", lse, Kind::F32, n.lse)?;
    let work = c.operand("workspace", space, space.kind(), space.len())?;
    let Extents { batch, seq, heads, kv_heads, dim, scale, .. } = n;
    let dtype = c.code(kind)?;
    // SAFETY: every operand has the values that the sizes ask for, the workspace its bytes.
    c.launch(Work::computing("attention", 5.0 * n.flops), |s| unsafe {
        ffi!(sq_attention_backward(dq, dk, dv, work, dout, q, k, v, o, lse, batch, seq, heads, kv_heads, dim, scale, dtype, s))
    })
}

impl Sizes {
    /// The shape of o.
    fn rows(self) -> [usize; 2] {
        [self.batch * self.seq, self.heads * self.dim]
    }
    /// The shape of lse.
    fn scores(self) -> [usize; 3] {
        [self.batch, self.heads, self.seq]
    }
    fn scale(self) -> f64 {
        1.0 / (self.dim as f64).sqrt()
    }
    fn group(self) -> usize {
        self.heads / self.kv_heads
    }
    /// Where head `h` of `heads` of token `t` of sequence `b` starts.
    fn at(self, b: usize, t: usize, h: usize, heads: usize) -> usize {
        ((b * self.seq + t) * heads + h) * self.dim
    }
}

/// o `[tokens, H, D]` and lse `[batch, H, seq]` by the definition.
pub fn reference(q: &[f64], k: &[f64], v: &[f64], n: Sizes) -> (Vec<f64>, Vec<f64>) {
    let (mut o, mut lse) = (vec![0.0; q.len()], vec![]);
    for (b, h) in pairs(n) {
        for t in 0..n.seq {
            let (p, l) = probabilities(q, k, n, b, h, t);
            for (j, p) in p.iter().enumerate() {
                for d in 0..n.dim {
                    o[n.at(b, t, h, n.heads) + d] += p * v[n.at(b, j, h / n.group(), n.kv_heads) + d];
                }
            }
            lse.push(l);
        }
    }
    (o, lse)
}

/// dq, dk, dv by the formulas above.
pub fn reference_backward(dout: &[f64], q: &[f64], k: &[f64], v: &[f64], n: Sizes) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
    let (mut dq, mut dk, mut dv) = (vec![0.0; q.len()], vec![0.0; k.len()], vec![0.0; v.len()]);
    for (b, h) in pairs(n) {
        for t in 0..n.seq {
            let (p, _) = probabilities(q, k, n, b, h, t);
            let at_q = n.at(b, t, h, n.heads);
            let at_k = |j| n.at(b, j, h / n.group(), n.kv_heads);
            let dp: Vec<f64> = (0..=t).map(|j| (0..n.dim).map(|d| dout[at_q + d] * v[at_k(j) + d]).sum()).collect();
            let mean: f64 = p.iter().zip(&dp).map(|(p, dp)| p * dp).sum();
            for j in 0..=t {
                let ds = p[j] * (dp[j] - mean) * n.scale();
                for d in 0..n.dim {
                    dv[at_k(j) + d] += p[j] * dout[at_q + d];
                    dq[at_q + d] += ds * k[at_k(j) + d];
                    dk[at_k(j) + d] += ds * q[at_q + d];
                }
            }
        }
    }
    (dq, dk, dv)
}

fn pairs(n: Sizes) -> impl Iterator<Item = (usize, usize)> {
    (0..n.batch).flat_map(move |b| (0..n.heads).map(move |h| (b, h)))
}

/// The probabilities of the keys 0 to t and the log-sum-exp of their scores.
fn probabilities(q: &[f64], k: &[f64], n: Sizes, b: usize, h: usize, t: usize) -> (Vec<f64>, f64) {
    let score = |j| {
        let (q, k) = (&q[n.at(b, t, h, n.heads)..], &k[n.at(b, j, h / n.group(), n.kv_heads)..]);
        (0..n.dim).map(|d| q[d] * k[d]).sum::<f64>() * n.scale()
    };
    let s: Vec<f64> = (0..=t).map(score).collect();
    let max = s.iter().fold(f64::NEG_INFINITY, |m, &s| m.max(s));
    let lse = max + s.iter().map(|s| (s - max).exp()).sum::<f64>().ln();
    (s.iter().map(|s| (s - lse).exp()).collect(), lse)
}

/// Scores of one block of queries (every head of a group) are kept below this many values, to stay in the cache.
const SCORES: usize = 1 << 18;
/// Queries of a block at most.
const MAX_TOKENS: usize = 64;

impl Sizes {
    /// Tokens whose queries are worked on together; depends on the shape alone, so results do not depend on the threads.
    fn block(self) -> usize {
        (SCORES / (self.group() * self.seq)).clamp(8, MAX_TOKENS).min(self.seq)
    }
}

/// Copies the rows of one group's heads, tokens `first..first + count` of sequence `b`, together: row `i·group + g`, times `scale`.
#[inline(always)]
fn pack(to: &mut [f32], x: &[f32], n: Sizes, (b, kv, first): (usize, usize, usize), scale: f32) {
    let width = n.group() * n.dim;
    for (i, to) in to.chunks_mut(width).enumerate() {
        let from = &x[n.at(b, first + i, kv * n.group(), n.heads)..][..width];
        to.iter_mut().zip(from).for_each(|(to, x)| *to = scale * x);
    }
}

/// `s [rows, keys] = q k[..keys]ᵀ` for packed queries, where k belongs to one head of one sequence.
fn scores(s: &mut [f32], q: &[f32], k: &[f32], n: Sizes, rows: usize, keys: usize) {
    let (across, down) = (Strides::new(n.dim, false), Strides { row: 1, col: n.kv_heads * n.dim });
    cpu::gemm((rows, keys, n.dim), s, Strides::new(keys, false), 0.0, q, across, k, down, 1.0, false);
}

/// Parallel over blocks of tokens; each has the queries of all heads, so that it owns its rows of o.
fn fast(q: &[f32], k: &[f32], v: &[f32], n: Sizes) -> (Vec<f32>, Vec<f32>) {
    let (block, group, width) = (n.block(), n.group(), n.heads * n.dim);
    let mut o = cpu::alloc(q.len());
    // Chunks that end with their sequence; the long ones first, for balance.
    let mut tasks: Vec<_> = o
        .chunks_mut(n.seq * width)
        .enumerate()
        .flat_map(|(b, o)| o.chunks_mut(block * width).enumerate().map(move |(i, o)| (b, i, o)))
        .collect();
    tasks.sort_by_key(|&(b, i, _)| (std::cmp::Reverse(i), b));
    let scratch = || (vec![0f32; group * block * n.seq], vec![0f32; 2 * group * block * n.dim]);
    let done: Vec<_> = tasks
        .into_par_iter()
        .with_max_len(1)
        .map_init(scratch, |(s, qo), (b, i, o)| {
            let first = i * block;
            let tokens = o.len() / width;
            let (rows, keys) = (group * tokens, first + tokens);
            let s = &mut s[..rows * keys];
            let (packed, out) = qo.split_at_mut(group * block * n.dim);
            let (packed, out) = (&mut packed[..rows * n.dim], &mut out[..rows * n.dim]);
            let mut lse = vec![0f32; n.heads * tokens];
            for kv in 0..n.kv_heads {
                let at = n.at(b, 0, kv, n.kv_heads);
                cpu::simd(
                    #[inline(always)]
                    || pack(packed, q, n, (b, kv, first), n.scale() as f32),
                );
                scores(s, packed, &k[at..], n, rows, keys);
                cpu::simd(
                    #[inline(always)]
                    || {
                        for (r, s) in s.chunks_mut(keys).enumerate() {
                            let (token, head) = (r / group, kv * group + r % group);
                            let (seen, masked) = s.split_at_mut(first + token + 1);
                            let max = cpu::max(seen);
                            let sum = cpu::exp_sum(seen, max);
                            masked.fill(0.0);
                            lse[head * tokens + token] = max + sum.ln();
                            // o is divided once it is there.
                            packed[r * n.dim] = 1.0 / sum;
                        }
                    },
                );
                let (across, down) = (Strides::new(n.dim, false), Strides::new(n.kv_heads * n.dim, false));
                cpu::gemm((rows, n.dim, keys), out, across, 0.0, s, Strides::new(keys, false), &v[at..], down, 1.0, false);
                cpu::simd(
                    #[inline(always)]
                    || {
                        for (r, out) in out.chunks(n.dim).enumerate() {
                            let factor = packed[r * n.dim];
                            let o = &mut o[(r / group * n.heads + kv * group + r % group) * n.dim..][..n.dim];
                            o.iter_mut().zip(out).for_each(|(o, x)| *o = factor * x);
                        }
                    },
                );
            }
            (b, i, lse)
        })
        .collect();
    let mut lse = vec![0f32; n.batch * n.heads * n.seq];
    for (b, i, block_lse) in done {
        let tokens = block_lse.len() / n.heads;
        for (h, from) in block_lse.chunks(tokens).enumerate() {
            lse[(b * n.heads + h) * n.seq + i * block..][..tokens].copy_from_slice(from);
        }
    }
    (o, lse)
}

/// What forward kept.
#[derive(Clone, Copy)]
struct Kept<'a> {
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
    o: &'a [f32],
    lse: &'a [f32],
}

/// Parallel over the key-value heads of every sequence, so that dk and dv are summed in a fixed order.
fn fast_backward(dout: &[f32], x: Kept, n: Sizes) -> (Vec<f32>, Vec<f32>, Vec<f32>) {
    let (block, group) = (n.block(), n.group());
    // Head by head first: dq [batch, KV, seq, group, D], dk and dv [batch, KV, seq, D].
    let (mut dq, mut dk, mut dv) = (cpu::alloc(x.q.len()), cpu::alloc(x.k.len()), cpu::alloc(x.v.len()));
    let size = n.seq * n.dim;
    let tasks = dq.par_chunks_mut(group * size).zip(dk.par_chunks_mut(size)).zip(dv.par_chunks_mut(size));
    tasks.enumerate().with_max_len(1).for_each(|(task, ((dq, dk), dv))| {
        let (b, kv) = (task / n.kv_heads, task % n.kv_heads);
        let at = n.at(b, 0, kv, n.kv_heads);
        let (k, v) = (&x.k[at..], &x.v[at..]);
        let (mut s, mut dp) = (vec![0f32; group * block * n.seq], vec![0f32; group * block * n.seq]);
        let (mut q, mut dout_packed) = (vec![0f32; group * block * n.dim], vec![0f32; group * block * n.dim]);
        dk.fill(0.0);
        dv.fill(0.0);
        for (i, dq) in dq.chunks_mut(block * group * n.dim).enumerate() {
            let first = i * block;
            let rows = dq.len() / n.dim;
            let keys = first + rows / group;
            let (s, dp) = (&mut s[..rows * keys], &mut dp[..rows * keys]);
            let (q, dout_packed) = (&mut q[..rows * n.dim], &mut dout_packed[..rows * n.dim]);
            cpu::simd(
                #[inline(always)]
                || {
                    pack(q, x.q, n, (b, kv, first), n.scale() as f32);
                    pack(dout_packed, dout, n, (b, kv, first), 1.0);
                },
            );
            scores(s, q, k, n, rows, keys);
            scores(dp, dout_packed, v, n, rows, keys);
            cpu::simd(
                #[inline(always)]
                || {
                    for (r, ((s, dp), dout)) in
                        s.chunks_mut(keys).zip(dp.chunks_mut(keys)).zip(dout_packed.chunks(n.dim)).enumerate()
                    {
                        let (token, head) = (first + r / group, kv * group + r % group);
                        let lse = x.lse[(b * n.heads + head) * n.seq + token];
                        let mean = cpu::sum2(dout, &x.o[n.at(b, token, head, n.heads)..][..n.dim], |a, b| a * b);
                        let (s, masked) = s.split_at_mut(token + 1);
                        let (dp, dp_masked) = dp.split_at_mut(token + 1);
                        for (s, dp) in s.iter_mut().zip(dp) {
                            *s = cpu::exp_f32(*s - lse);
                            *dp = *s * (*dp - mean);
                        }
                        masked.fill(0.0);
                        dp_masked.fill(0.0);
                    }
                },
            );
            let packed = Strides::new(n.dim, false);
            let (p, pt) = (Strides::new(keys, false), Strides::new(keys, true));
            cpu::gemm((keys, n.dim, rows), dv, packed, 1.0, s, pt, dout_packed, packed, 1.0, false);
            cpu::gemm((keys, n.dim, rows), dk, packed, 1.0, dp, pt, q, packed, 1.0, false);
            let heads = Strides::new(n.kv_heads * n.dim, false);
            cpu::gemm((rows, n.dim, keys), dq, packed, 0.0, dp, p, k, heads, n.scale() as f32, false);
        }
    });
    (interleave(dq, n, group), interleave(dk, n, 1), interleave(dv, n, 1))
}

/// `[batch, KV, seq, per · D]` to `[batch, seq, KV, per · D]`.
fn interleave(x: Vec<f32>, n: Sizes, per: usize) -> Vec<f32> {
    if n.kv_heads == 1 {
        return x;
    }
    let width = per * n.dim;
    let mut y = cpu::alloc(x.len());
    y.par_chunks_mut(n.kv_heads * width).with_min_len(16).enumerate().for_each(|(token, y)| {
        let (b, t) = (token / n.seq, token % n.seq);
        for (kv, y) in y.chunks_mut(width).enumerate() {
            y.copy_from_slice(&x[((b * n.kv_heads + kv) * n.seq + t) * width..][..width]);
        }
    });
    cpu::recycle(x);
    y
}

/// Worked cases: one token, one group or several, a sequence longer than a block.
pub fn cases() -> Vec<Case> {
    let case = |name: &str, (batch, seq): (usize, usize), (heads, kv_heads): (usize, usize), dim: usize| {
        let t = batch * seq;
        let operands = normals(&[(&[t, heads, dim], 71), (&[t, kv_heads, dim], 72), (&[t, kv_heads, dim], 73)]);
        Case::new("attention", name, operands, move |v| {
            let [q, k, v]: [Var; 3] = v.try_into().map_err(|_| Error::Tape("three operands".into()))?;
            attention(q, k, v, seq)
        })
    };
    // The gradients of q and k are zero but for rounding, so let there be something to measure them by.
    let operands = normals(&[(&[1, 2, 8], 74), (&[1, 2, 8], 75), (&[1, 2, 8], 76)]);
    let one = Case::new("attention", "one token, plus q and k", operands, |v| {
        let [q, k, v]: [Var; 3] = v.try_into().map_err(|_| Error::Tape("three operands".into()))?;
        attention(q.clone(), k.clone(), v, 1)?.add(q.reshape([1, 16])?)?.add(k.reshape([1, 16])?)
    });
    let mut all = vec![
        one,
        case("odd, one head", (2, 5), (1, 1), 8),
        case("groups of two", (1, 7), (4, 2), 16),
        case("one group of three", (3, 3), (3, 1), 8),
        case("a head for each", (2, 9), (2, 2), 8),
        case("several blocks", (1, 67), (2, 1), 8),
        case("2x257 tokens, 6 heads of 64 on 2", (2, 257), (6, 2), 64).large(),
    ];
    all.extend(Case::table(timed, SIZES));
    all.extend(Case::table(timed_backward, SIZES));
    all
}

const SIZES: &[At] = &[(Place::Cpu, 512, 1, &[DType::F32]), (Place::Gpu, 2048, 16, &[DType::BF16])];
/// Heads of the timed cases, and values of each.
const HEADS: usize = 32;
const DIM: usize = 128;
/// The longest sequence whose f64 reference is computed within seconds.
const LONGEST: usize = 1 << 14;

/// Products of one pass over the causal triangle, twice: q kᵀ and p v.
fn flops(seq: usize, batch: usize) -> f64 {
    4.0 * batch as f64 * HEADS as f64 * (seq as f64).powi(2) * DIM as f64 / 2.0
}

/// The last head of the last sequence of `[tokens, heads, dim]`.
fn last_head(x: &Tensor, seq: usize) -> Result<Vec<f64>> {
    let width = HEADS * DIM;
    let batch = x.len() / (seq * width).max(1);
    let x = x.clone().reshape([batch, seq * width])?.index(batch.saturating_sub(1))?.to_f64_vec()?;
    Ok(x.chunks(width).flat_map(|t| t[width - DIM..].to_vec()).collect())
}

/// How far attention may be from the reference: tensor cores round probabilities to the operands' type.
fn tolerance(dtype: DType) -> f64 {
    if dtype == DType::F32 { 1e-4 } else { 4.0 * dtype.epsilon() }
}

fn timed_case(
    what: (&'static str, &'static str, &'static str),
    (seq, batch): (usize, usize),
    checks: impl Fn(&[Tensor], &[Tensor]) -> Result<()> + Send + Sync + 'static,
) -> Case {
    let graph = Run::graph(move |v| {
        let [q, k, v]: [Var; 3] = v.try_into().map_err(|_| Error::Tape("three operands".into()))?;
        attention(q, k, v, seq)
    });
    let values = seq as f64 * batch as f64 * (HEADS * DIM) as f64;
    Case::timed(what, (seq, batch), vec![], graph, checks).computes(flops(seq, batch)).holds(10.0 * values).drawn(
        move |dtype, device| {
            if seq > LONGEST {
                let message = format!("expected at most {LONGEST} tokens, which the f64 reference is computed for, got {seq}");
                return Err(Error::argument("attention", message));
            }
            (1..=3).map(|seed| repeated([batch * seq, HEADS, DIM], seed, dtype, device)).collect()
        },
    )
}

fn timed(seq: usize, batch: usize) -> Case {
    let what = ("attention", "attention", "Causal attention of so many sequences of n tokens, 32 heads of 128");
    timed_case(what, (seq, batch), move |x, o| {
        let one = Sizes { batch: 1, seq, heads: 1, kv_heads: 1, dim: DIM };
        let at = |x| last_head(x, seq);
        let (want, _) = reference(&at(&x[0])?, &at(&x[1])?, &at(&x[2])?, one);
        exact::close_to_largest("attention", &at(&o[0])?, &want, tolerance(o[0].dtype()))
    })
}

fn timed_backward(seq: usize, batch: usize) -> Case {
    timed_case(("attention", "attention-backward", "Its gradients"), (seq, batch), move |x, dx| {
        let one = Sizes { batch: 1, seq, heads: 1, kv_heads: 1, dim: DIM };
        let at = |x| last_head(x, seq);
        let want = reference_backward(&at(&x[3])?, &at(&x[0])?, &at(&x[1])?, &at(&x[2])?, one);
        for (name, got, want) in [("dq", &dx[0], want.0), ("dk", &dx[1], want.1), ("dv", &dx[2], want.2)] {
            exact::close_to_largest(name, &at(got)?, &want, 2.0 * tolerance(got.dtype()))?;
        }
        Ok(())
    })
    .pass(Pass::Backward)
    .computes(2.5 * flops(seq, batch))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::randn;

    #[test]
    fn threads_change_no_bit() {
        let x = |heads: usize, seed| randn([2 * 67, heads, 16], seed).to_dtype(DType::F32).unwrap();
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let mut save = Saved::new(vec![true; 3]);
                let inputs = vec![x(6, 1), x(2, 2), x(2, 3)];
                let o = crate::tape::run(&Attention { seq: 67 }, inputs, &mut save).unwrap();
                let dy = randn(o.shape(), 4).to_dtype(DType::F32).unwrap();
                let grads = Attention { seq: 67 }.backward(save, dy, &[true; 3]).unwrap();
                let bits = |t: Tensor| t.to_vec::<f32>().unwrap().iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                [vec![bits(o)], grads.into_iter().map(|g| bits(g.unwrap())).collect()].concat()
            })
        };
        assert!(run(1) == run(3));
    }

    #[test]
    fn shapes_that_do_not_fit_are_errors() {
        let wrong: [([usize; 3], [usize; 3], usize); 5] = [
            ([4, 3, 8], [4, 2, 8], 4),
            ([4, 2, 8], [4, 2, 4], 4),
            ([4, 2, 8], [2, 2, 8], 2),
            ([4, 2, 8], [4, 2, 8], 3),
            ([4, 2, 8], [4, 2, 8], 0),
        ];
        for (q, k, seq) in wrong {
            let tape = crate::Tape::new();
            let [q, k, v] = [q, k, k].map(|shape| tape.constant(randn(shape, 1)));
            assert!(attention(q, k, v, seq).is_err());
        }
    }
}
