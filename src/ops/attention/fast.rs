//! Attention on the CPU in `f32`: matrix products over blocks of queries, a group of heads at a time.

use std::ops::Range;

use rayon::prelude::*;

use crate::device::cpu::{self, Strides};
use crate::ops::attention::Sizes;

/// Scores of one block of queries (every head of a group) are kept below this many values, to stay in the cache.
const SCORES: usize = 1 << 18;
/// Queries of a block at most.
const MAX_TOKENS: usize = 64;

impl Sizes {
    /// The keys that the query at `t` reads, counted from key `low` on.
    #[inline(always)]
    fn read(self, t: usize, low: usize) -> Range<usize> {
        self.first_key(t) - low..t + 1 - low
    }
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

/// Parts of the scores of one query: keys in front of its window, those it reads, those behind it.
#[inline(always)]
pub(crate) fn row_parts(s: &mut [f32], read: Range<usize>) -> [&mut [f32]; 3] {
    let (s, after) = s.split_at_mut(read.end);
    let (before, read) = s.split_at_mut(read.start);
    [before, read, after]
}

/// `s [rows, keys] = q k[..keys]ᵀ` for packed queries, where k belongs to one head of one sequence.
fn scores(s: &mut [f32], q: &[f32], k: &[f32], n: Sizes, rows: usize, keys: usize) {
    let (across, down) = (Strides::new(n.dim, false), Strides { row: 1, col: n.kv_heads * n.dim });
    cpu::gemm((rows, keys, n.dim), s, Strides::new(keys, false), 0.0, q, across, k, down, 1.0, false);
}

/// Parallel over blocks of tokens; each has the queries of all heads, so that it owns its rows of o.
pub(super) fn forward(q: &[f32], k: &[f32], v: &[f32], n: Sizes) -> (Vec<f32>, Vec<f32>) {
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
            // The first key that any query of the block reads, and from there on.
            let low = n.first_key(first);
            let (rows, keys) = (group * tokens, first + tokens - low);
            let s = &mut s[..rows * keys];
            let (packed, out) = qo.split_at_mut(group * block * n.dim);
            let (packed, out) = (&mut packed[..rows * n.dim], &mut out[..rows * n.dim]);
            let mut lse = vec![0f32; n.heads * tokens];
            for kv in 0..n.kv_heads {
                let at = n.at(b, low, kv, n.kv_heads);
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
                            let [before, seen, after] = row_parts(s, n.read(first + token, low));
                            let max = cpu::max(seen);
                            let sum = cpu::exp_sum(seen, max);
                            before.fill(0.0);
                            after.fill(0.0);
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
pub(super) struct Kept<'a> {
    pub(super) q: &'a [f32],
    pub(super) k: &'a [f32],
    pub(super) v: &'a [f32],
    pub(super) o: &'a [f32],
    pub(super) lse: &'a [f32],
}

/// Parallel over the key-value heads of every sequence, so that dk and dv are summed in a fixed order.
pub(super) fn backward(dout: &[f32], x: Kept, n: Sizes) -> (Vec<f32>, Vec<f32>, Vec<f32>) {
    let (block, group) = (n.block(), n.group());
    // Head by head first: dq [batch, KV, seq, group, D], dk and dv [batch, KV, seq, D].
    let (mut dq, mut dk, mut dv) = (cpu::alloc(x.q.len()), cpu::alloc(x.k.len()), cpu::alloc(x.v.len()));
    let size = n.seq * n.dim;
    let tasks = dq.par_chunks_mut(group * size).zip(dk.par_chunks_mut(size)).zip(dv.par_chunks_mut(size));
    tasks.enumerate().with_max_len(1).for_each(|(task, ((dq, dk), dv))| {
        let (b, kv) = (task / n.kv_heads, task % n.kv_heads);
        let (mut s, mut dp) = (vec![0f32; group * block * n.seq], vec![0f32; group * block * n.seq]);
        let (mut q, mut dout_packed) = (vec![0f32; group * block * n.dim], vec![0f32; group * block * n.dim]);
        dk.fill(0.0);
        dv.fill(0.0);
        for (i, dq) in dq.chunks_mut(block * group * n.dim).enumerate() {
            let first = i * block;
            let low = n.first_key(first);
            let rows = dq.len() / n.dim;
            let keys = first + rows / group - low;
            let at = n.at(b, low, kv, n.kv_heads);
            let (k, v) = (&x.k[at..], &x.v[at..]);
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
                        let [s_before, s, s_after] = row_parts(s, n.read(token, low));
                        let [dp_before, dp, dp_after] = row_parts(dp, n.read(token, low));
                        for (s, dp) in s.iter_mut().zip(dp) {
                            *s = cpu::exp_f32(*s - lse);
                            *dp = *s * (*dp - mean);
                        }
                        [s_before, s_after, dp_before, dp_after].into_iter().for_each(|hidden| hidden.fill(0.0));
                    }
                },
            );
            let packed = Strides::new(n.dim, false);
            let (p, pt) = (Strides::new(keys, false), Strides::new(keys, true));
            let (dv, dk) = (&mut dv[low * n.dim..], &mut dk[low * n.dim..]);
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
