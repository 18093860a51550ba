//! Segment attention on the CPU in `f32`: matrix products over blocks of queries, a group of heads at a time.

use rayon::prelude::*;

use super::{Heads, Segment};
use crate::device::cpu::{self, Strides};
use crate::ops::attention::{first_key, row_parts};

/// Queries that go through the CPU's matrix products together.
const BLOCK: usize = 64;

/// Parallel over blocks of queries, which own their rows of o.
pub(super) fn forward(q: &[f32], k: &[f32], v: &[f32], heads: Heads, list: &[Segment], window: Option<usize>) -> Vec<f32> {
    let width = heads.query * heads.dim;
    let mut o = cpu::alloc(q.len());
    let (mut rest, mut tasks) = (&mut o[..], vec![]);
    for segment in list {
        let (own, behind) = rest.split_at_mut(segment.tokens * width);
        rest = behind;
        tasks.extend(own.chunks_mut(BLOCK * width).enumerate().map(|(i, o)| (segment, i * BLOCK, o)));
    }
    let mut q = q;
    let with_queries: Vec<_> = tasks
        .into_iter()
        .map(|(segment, first, o)| {
            let (own, behind) = q.split_at(o.len());
            q = behind;
            (segment, first, o, own)
        })
        .collect();
    let scratch = || (vec![], vec![], vec![]);
    with_queries.into_par_iter().with_max_len(1).for_each_init(scratch, |scratch, (segment, first, o, q)| {
        for h in 0..heads.kv {
            block(o, q, (k, v), heads, (segment, window), (first, h), scratch);
        }
    });
    o
}

/// One block of a segment's queries, one key-value head: o and q are the block's rows.
fn block(
    o: &mut [f32],
    q: &[f32],
    (k, v): (&[f32], &[f32]),
    heads: Heads,
    (segment, window): (&Segment, Option<usize>),
    (first, kv): (usize, usize),
    (packed, scores, out): &mut (Vec<f32>, Vec<f32>, Vec<f32>),
) {
    let (group, dim, width) = (heads.group(), heads.dim, heads.query * heads.dim);
    let tokens = o.len() / width;
    let (rows, prefix) = (group * tokens, segment.prefix.len());
    // The first key that any query of the block reads; columns of the scores are counted from there.
    let low = first_key(window, prefix + first);
    let keys = prefix + first + tokens - low;
    packed.clear();
    packed.extend(q.chunks(width).flat_map(|q| &q[kv * group * dim..][..group * dim]).map(|q| q * heads.scale() as f32));
    scores.resize(rows * keys, 0.0);
    out.resize(rows * dim, 0.0);
    // The prefix's columns of the scores, then the segment's own.
    let shared = prefix.saturating_sub(low);
    let own = low.saturating_sub(prefix);
    let parts = [(0, shared, segment.prefix.start + low), (shared, keys - shared, segment.first_key + own)];
    let at = |row: usize| (row * heads.kv + kv) * dim;
    let table = heads.kv * dim;
    for (column, count, row) in parts.into_iter().filter(|p| p.1 > 0) {
        let down = Strides { row: 1, col: table };
        let (s, across) = (&mut scores[column..], Strides::new(dim, false));
        cpu::gemm((rows, count, dim), s, Strides::new(keys, false), 0.0, packed, across, &k[at(row)..], down, 1.0, false);
    }
    let sums = &mut packed[..rows];
    cpu::simd(
        #[inline(always)]
        || {
            for (r, (s, sum)) in scores.chunks_mut(keys).zip(sums).enumerate() {
                let place = prefix + first + r / group;
                let [before, seen, after] = row_parts(s, first_key(window, place) - low..place + 1 - low);
                let max = cpu::max(seen);
                *sum = cpu::exp_sum(seen, max);
                before.fill(0.0);
                after.fill(0.0);
            }
        },
    );
    for (i, (column, count, row)) in parts.into_iter().filter(|p| p.1 > 0).enumerate() {
        let beta = if i == 0 { 0.0 } else { 1.0 };
        let (p, v) = (&scores[column..], &v[at(row)..]);
        let (ps, vs) = (Strides::new(keys, false), Strides::new(table, false));
        cpu::gemm((rows, dim, count), out, Strides::new(dim, false), beta, p, ps, v, vs, 1.0, false);
    }
    for (r, (out, sum)) in out.chunks(dim).zip(&packed[..rows]).enumerate() {
        let o = &mut o[r / group * width + (kv * group + r % group) * dim..][..dim];
        o.iter_mut().zip(out).for_each(|(o, x)| *o = x / sum);
    }
}
