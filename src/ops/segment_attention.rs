//! Attention of sequences of any lengths that may share what they begin with, without gradients: for evaluation and generation.
//!
//! Queries are those of one segment after another. A query at place t of its segment reads the keys of the segment's prefix, if it
//! has one, then the segment's own keys 0 to t; `s = q kᵀ/√D`, `p = softmax(s)`, `o = p v`, query head h reads key-value head
//! h / (H/KV). Keys and values are rows of one table, in which a prefix may stand once for several segments.

use std::ops::Range;
use std::sync::Arc;

use rayon::prelude::*;

use crate::device::cpu::{self, Strides};
use crate::device::cuda::{CudaDevice, Queue};
use crate::device::ffi;
use crate::device::launch::{Check, Kind, View, Work};
use crate::ops::{At, Call, Case, Place, Run, exact, repeated};
use crate::tape::{Grads, Inputs, Op, Saved, operands, run};
use crate::{DType, Device, Error, Result, Tensor};

/// Queries that the kernel works on together, a row of its table.
const CHUNK: usize = 8;
/// Numbers that describe a chunk: first query, queries, first key of the prefix, keys of the prefix, first own key, queries of the
/// segment before the chunk.
const FIELDS: usize = 6;

/// One sequence, or the part of one behind its prefix.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Number of queries, and of own keys: at least 1.
    pub tokens: usize,
    /// The rows of keys and values that every query reads; may be empty.
    pub prefix: Range<usize>,
    /// The row of the first own key; the others follow.
    pub first_key: usize,
}

/// The segments of one call, for a device. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Segments {
    list: Arc<[Segment]>,
    /// Queries of all segments.
    tokens: usize,
    /// Rows of keys and values that must be there.
    keys: usize,
    /// `[chunks, FIELDS]` of `u32`, on the device.
    chunks: Tensor,
}

impl Segments {
    /// Segments whose queries follow one another, in this order.
    ///
    /// # Errors
    /// No segment, one without tokens, or more rows than 32 bits count; no memory on the device.
    pub fn new(list: impl Into<Arc<[Segment]>>, device: &Device) -> Result<Self> {
        let list = list.into();
        let bad = |message: String| Error::argument("segments", message);
        let (mut tokens, mut keys, mut chunks) = (0usize, 0usize, vec![]);
        for (i, Segment { tokens: count, prefix, first_key }) in list.iter().enumerate() {
            if *count == 0 || prefix.start > prefix.end {
                return Err(bad(format!("expected tokens and a prefix, got {count} tokens behind {prefix:?} in segment {i}")));
            }
            let ends = [tokens.checked_add(*count), first_key.checked_add(*count), Some(prefix.end)];
            if ends.iter().any(|end| end.is_none_or(|end| end > i32::MAX as usize)) {
                return Err(bad(format!("expected at most {} rows, got more in segment {i}", i32::MAX)));
            }
            for offset in (0..*count).step_by(CHUNK) {
                let fields = [tokens + offset, CHUNK.min(count - offset), prefix.start, prefix.len(), *first_key, offset];
                chunks.extend(fields.map(|n| n as u32));
            }
            tokens += count;
            keys = keys.max(first_key + count).max(prefix.end);
        }
        if tokens == 0 {
            return Err(bad("expected at least one, got none".into()));
        }
        let rows = chunks.len() / FIELDS;
        let chunks = Tensor::from_vec(chunks, [rows, FIELDS])?.to_device(device)?;
        Ok(Self { list, tokens, keys, chunks })
    }

    /// Queries of all segments.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// The segments.
    pub fn list(&self) -> &[Segment] {
        &self.list
    }

    /// Products of queries and keys.
    fn pairs(&self) -> f64 {
        let of = |s: &Segment| s.tokens as f64 * (s.prefix.len() as f64 + (s.tokens as f64 + 1.0) / 2.0);
        self.list.iter().map(of).sum()
    }
}

/// Attention of `q [tokens, H, D]` over `k, v [rows, KV, D]`: `[tokens, H·D]`.
///
/// # Errors
/// Shapes that do not fit together or to the segments, or H no multiple of KV; on a GPU, D beyond 256, or segments for another device.
pub fn segment_attention(q: Tensor, k: Tensor, v: Tensor, segments: &Segments) -> Result<Tensor> {
    run(&SegmentAttention { segments: segments.clone() }, vec![q, k, v], &mut Saved::default())
}

struct SegmentAttention {
    segments: Segments,
}

/// Heads: of queries, of keys and values, and values of each.
#[derive(Clone, Copy)]
struct Heads {
    query: usize,
    kv: usize,
    dim: usize,
}

impl Heads {
    fn group(self) -> usize {
        self.query / self.kv
    }
    fn scale(self) -> f64 {
        1.0 / (self.dim as f64).sqrt()
    }
}

impl SegmentAttention {
    fn heads(&self, [q, k, v]: [&Tensor; 3]) -> Result<Heads> {
        let (tokens, keys) = (self.segments.tokens, self.segments.keys);
        let [q_rows, query, dim] = *q.shape() else {
            return Err(Error::shape("segment attention: q", "[tokens, heads, dim]", q.shape()));
        };
        if q_rows != tokens || query == 0 || dim == 0 {
            return Err(Error::shape("segment attention: q", format!("[{tokens}, heads, dim]"), q.shape()));
        }
        let [k_rows, kv, k_dim] = *k.shape() else {
            return Err(Error::shape("segment attention: k", "[rows, heads, dim]", k.shape()));
        };
        if k_rows < keys || k_dim != dim || kv == 0 || !query.is_multiple_of(kv) {
            let expected = format!("[at least {keys}, divisor of {query}, {dim}]");
            return Err(Error::shape("segment attention: k", expected, k.shape()));
        }
        if v.shape() != k.shape() {
            return Err(Error::shape("segment attention: v", format!("{:?}", k.shape()), v.shape()));
        }
        match [k, v].into_iter().find(|t| t.dtype() != q.dtype()) {
            Some(odd) => Err(Error::dtype("segment attention", q.dtype(), odd.dtype())),
            None => Ok(Heads { query, kv, dim }),
        }
    }
}

impl Op for SegmentAttention {
    fn name(&self) -> &'static str {
        "segment_attention"
    }
    fn check(&self, inputs: &[Tensor]) -> Result<()> {
        let [q, k, v] = operands(inputs)?;
        self.heads([q, k, v]).map(drop)
    }
    fn cpu(&self, inputs: Inputs, _: &mut Saved) -> Result<Tensor> {
        let [q, k, v] = inputs.take()?;
        let (heads, list) = (self.heads([&q, &k, &v])?, &self.segments.list);
        let shape = [self.segments.tokens, heads.query * heads.dim];
        if q.dtype() == DType::F64 {
            return Tensor::from_vec(reference(q.as_slice()?, k.as_slice()?, v.as_slice()?, heads, list), shape);
        }
        Tensor::from_vec(fast(q.as_slice()?, k.as_slice()?, v.as_slice()?, heads, list), shape)
    }
    fn gpu(&self, device: &CudaDevice, inputs: Inputs, _: &mut Saved) -> Result<Tensor> {
        let [q, k, v] = inputs.take()?;
        let heads = self.heads([&q, &k, &v])?;
        if self.segments.chunks.device() != q.device() {
            let message = format!("expected segments made for {}, got some for {}", q.device(), self.segments.chunks.device());
            return Err(Error::argument("segment attention", message));
        }
        let o = Tensor::on(device, &[self.segments.tokens, heads.query * heads.dim], q.dtype())?;
        let (q, k, v) = (q.aligned()?, k.aligned()?, v.aligned()?);
        // SAFETY: `check` found that q has the rows that the chunks name, k and v at least the keys.
        unsafe { launch(device.queue(), o.view()?, [q.view()?, k.view()?, v.view()?], &self.segments, heads)? };
        Ok(o)
    }
    fn backward(&self, _: Saved, _: Tensor, _: &[bool]) -> Result<Grads> {
        Err(Error::Tape("segment attention has no gradient: it is for networks that run, not for those that learn".into()))
    }
}

/// o from q, k and v.
///
/// # Safety
/// Every chunk's queries are rows of q and o, its keys rows of k and v: the kernel does not look.
unsafe fn launch(queue: Queue<'_>, o: View<'_>, [q, k, v]: [View<'_>; 3], segments: &Segments, heads: Heads) -> Result<()> {
    let c = Check::new("segment attention", queue);
    let Heads { query, kv, dim } = heads;
    let (kind, scale) = (q.kind(), heads.scale() as f32);
    let queries = c.product(&[segments.tokens, query, dim])?;
    let keys = k.len();
    let (o, q) = (c.operand("o", o, kind, queries)?, c.operand("q", q, kind, queries)?);
    let (k, v) = (c.operand("k", k, kind, keys)?, c.operand("v", v, kind, keys)?);
    let count = segments.chunks.rows();
    let chunks = c.operand("chunks", segments.chunks.view()?, Kind::U32, count * FIELDS)?;
    let work = Work::computing("attention", 4.0 * segments.pairs() * (query * dim) as f64);
    let (count, query, kv, dim, dtype) = (c.long(count)?, c.int(query)?, c.int(kv)?, c.int(dim)?, c.code(kind)?);
    // SAFETY: the operands have the values that the sizes ask for; that chunks name rows of them is the caller's word.
    c.launch(work, |s| unsafe { ffi!(sq_segment_attention(o, q, k, v, chunks, count, query, kv, dim, scale, dtype, s)) })
}

/// The row of the j-th key that a segment reads.
fn row(segment: &Segment, j: usize) -> usize {
    let prefix = segment.prefix.len();
    if j < prefix { segment.prefix.start + j } else { segment.first_key + j - prefix }
}

/// o `[tokens, H·D]` by the definition.
fn reference(q: &[f64], k: &[f64], v: &[f64], heads: Heads, list: &[Segment]) -> Vec<f64> {
    let Heads { query, kv, dim } = heads;
    let mut o = Vec::with_capacity(q.len());
    for (segment, t) in list.iter().flat_map(|s| (0..s.tokens).map(move |t| (s, t))) {
        let rows: Vec<usize> = (0..=segment.prefix.len() + t).map(|j| row(segment, j)).collect();
        for h in 0..query {
            let q = &q[o.len()..][..dim];
            let at = |row: usize| (row * kv + h / heads.group()) * dim;
            let score = |&row: &usize| q.iter().zip(&k[at(row)..]).map(|(q, k)| q * k).sum::<f64>() * heads.scale();
            let s: Vec<f64> = rows.iter().map(score).collect();
            let max = s.iter().fold(f64::NEG_INFINITY, |m, &s| m.max(s));
            let p: Vec<f64> = s.iter().map(|s| (s - max).exp()).collect();
            let sum: f64 = p.iter().sum();
            o.extend((0..dim).map(|d| rows.iter().zip(&p).map(|(&row, p)| p * v[at(row) + d]).sum::<f64>() / sum));
        }
    }
    o
}

/// Queries that go through the CPU's matrix products together.
const BLOCK: usize = 64;

/// Parallel over blocks of queries, which own their rows of o.
fn fast(q: &[f32], k: &[f32], v: &[f32], heads: Heads, list: &[Segment]) -> Vec<f32> {
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
            block(o, q, (k, v), heads, segment, (first, h), scratch);
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
    segment: &Segment,
    (first, kv): (usize, usize),
    (packed, scores, out): &mut (Vec<f32>, Vec<f32>, Vec<f32>),
) {
    let (group, dim, width) = (heads.group(), heads.dim, heads.query * heads.dim);
    let tokens = o.len() / width;
    let (rows, prefix) = (group * tokens, segment.prefix.len());
    let keys = prefix + first + tokens;
    packed.clear();
    packed.extend(q.chunks(width).flat_map(|q| &q[kv * group * dim..][..group * dim]).map(|q| q * heads.scale() as f32));
    scores.resize(rows * keys, 0.0);
    out.resize(rows * dim, 0.0);
    // The prefix's columns of the scores, then the segment's own.
    let parts = [(0, prefix, segment.prefix.start), (prefix, keys - prefix, segment.first_key)];
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
                let (seen, masked) = s.split_at_mut(prefix + first + r / group + 1);
                let max = cpu::max(seen);
                *sum = cpu::exp_sum(seen, max);
                masked.fill(0.0);
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

/// Problems for parity: segments without and behind prefixes, one token, several chunks and blocks, groups, a table with rows that
/// nobody reads. Heads of queries, of keys, values of each; segments.
pub fn problems() -> Vec<(&'static str, [usize; 3], Vec<Segment>)> {
    let segment = |tokens, prefix: Range<usize>, first_key| Segment { tokens, prefix, first_key };
    vec![
        ("one token", [1, 1, 8], vec![segment(1, 0..0, 0)]),
        ("one token behind many", [6, 2, 64], vec![segment(1, 0..150, 150)]),
        ("alone, of all lengths", [3, 1, 32], vec![segment(5, 0..0, 0), segment(8, 0..0, 5), segment(71, 0..0, 13)]),
        ("two endings", [9, 3, 64], vec![segment(40, 0..0, 0), segment(9, 0..40, 40), segment(3, 0..40, 49)]),
        ("far apart", [4, 4, 80], vec![segment(17, 3..36, 100), segment(2, 40..41, 60)]),
        ("heads of 128", [8, 1, 128], vec![segment(33, 0..0, 0), segment(70, 0..33, 33)]),
        ("heads of 256, odd", [2, 1, 256], vec![segment(13, 0..35, 35)]),
        ("heads of 5", [12, 1, 5], vec![segment(11, 0..2, 2)]),
    ]
}

/// Worked cases: of the benches alone, since there is no gradient to check; [`problems`] are for parity.
pub fn cases() -> Vec<Case> {
    Case::table(timed, SIZES)
}

const SIZES: &[At] = &[
    (Place::Cpu, 256, 8, &[DType::F32]),
    (Place::Gpu, 64, 256, &[DType::F32, DType::BF16]),
    (Place::Gpu, 2048, 1, &[DType::BF16]),
];
const HEADS: [usize; 2] = [9, 3];
const DIM: usize = 64;

/// One token behind n others, `rows` times, each with a prefix of its own.
fn timed(n: usize, rows: usize) -> Case {
    let what = ("segment_attention", "segment-attention", "One token behind n others, so many times, 9 heads of 64 on 3");
    let segments = move || -> Vec<Segment> {
        (0..rows).map(|i| Segment { tokens: 1, prefix: i * (n + 1)..i * (n + 1) + n, first_key: i * (n + 1) + n }).collect()
    };
    let call = Run::Call(Arc::new(move |x: &[Tensor]| {
        let (x, segments) = (x.to_vec(), Segments::new(segments(), &x[0].device())?);
        Ok(Call::new(move || Ok(vec![segment_attention(x[0].clone(), x[1].clone(), x[2].clone(), &segments)?])))
    }));
    let keys = n.saturating_add(1).saturating_mul(rows);
    let shapes = [vec![rows, HEADS[0], DIM], vec![keys, HEADS[1], DIM], vec![keys, HEADS[1], DIM]];
    let values = 2.0 * keys as f64 * (HEADS[1] * DIM) as f64;
    Case::timed(what, (n, rows), shapes.to_vec(), call, move |x, o| {
        let [q, k, v] = [&x[0], &x[1], &x[2]].map(Tensor::to_f64_vec);
        let want = reference(&q?, &k?, &v?, Heads { query: HEADS[0], kv: HEADS[1], dim: DIM }, &segments());
        let tolerance = if o[0].dtype() == DType::F32 { 1e-4 } else { 4.0 * o[0].dtype().epsilon() };
        exact::close_to_largest("segment attention", &o[0].to_f64_vec()?, &want, tolerance)
    })
    .moves(values)
    .drawn(move |dtype, device| {
        shapes.iter().enumerate().map(|(i, shape)| repeated(shape.clone(), 1 + i as u64, dtype, device)).collect()
    })
}

/// Every one of [`problems`] on a device, in a type, against the definition in `f64`.
///
/// # Errors
/// Values that differ by more than rounding.
pub fn check_problems(dtype: DType, device: &Device) -> Result<()> {
    for (name, [query, kv, dim], list) in problems() {
        let segments = Segments::new(list.clone(), device)?;
        let shapes = [[segments.tokens, query, dim], [segments.keys + 3, kv, dim], [segments.keys + 3, kv, dim]];
        // Rounded to the type first, so that all see the same.
        let draw = |(i, shape): (usize, [usize; 3])| crate::ops::randn(shape, 50 + i as u64).to_dtype(dtype);
        let x = shapes.into_iter().enumerate().map(draw).collect::<Result<Vec<_>>>()?;
        let [q, k, v] = [0, 1, 2].map(|i: usize| x[i].to_f64_vec());
        let want = reference(&q?, &k?, &v?, Heads { query, kv, dim }, &list);
        let on = |i: usize| x[i].to_device(device);
        let o = segment_attention(on(0)?, on(1)?, on(2)?, &segments)?;
        let tolerance = if dtype == DType::F32 { 1e-5 } else { 2.0 * dtype.epsilon() };
        exact::close_to_largest(&format!("segment attention, {name}, {dtype}"), &o.to_f64_vec()?, &want, tolerance)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::attention;
    use crate::ops::randn;

    #[test]
    fn problems_on_the_cpu() {
        for dtype in [DType::F64, DType::F32, DType::F16, DType::BF16] {
            check_problems(dtype, &Device::Cpu).unwrap();
        }
    }

    /// A sequence cut into a prefix and two continuations is two sequences.
    #[test]
    fn a_shared_prefix_changes_nothing() {
        let (prefix, ends) = (37, [5, 90]);
        let x = |heads: usize, seed| randn([prefix + 95, heads, 16], seed);
        let (q, k, v) = (x(6, 1), x(2, 2), x(2, 3));
        let mut list = vec![Segment { tokens: prefix, prefix: 0..0, first_key: 0 }];
        for tokens in ends {
            let first_key = list.iter().map(|s| s.tokens).sum();
            list.push(Segment { tokens, prefix: 0..prefix, first_key });
        }
        let segments = Segments::new(list, &Device::Cpu).unwrap();
        for (dtype, tolerance) in [(DType::F64, 1e-12), (DType::F32, 1e-5)] {
            let [q, k, v] = [&q, &k, &v].map(|t| t.to_dtype(dtype).unwrap());
            let got = segment_attention(q.clone(), k.clone(), v.clone(), &segments).unwrap().to_f64_vec().unwrap();
            let mut first = prefix;
            for tokens in ends {
                let sequence = |t: &Tensor| {
                    Tensor::concat(&[t.slice(0, prefix).unwrap(), t.slice(first, tokens).unwrap()]).unwrap().to_f64_vec().unwrap()
                };
                let sizes = attention::Sizes { batch: 1, seq: prefix + tokens, heads: 6, kv_heads: 2, dim: 16 };
                let (want, _) = attention::reference(&sequence(&q), &sequence(&k), &sequence(&v), sizes);
                let got = &got[first * 96..][..tokens * 96];
                for (a, b) in got.iter().zip(&want[prefix * 96..]) {
                    assert!((a - b).abs() <= tolerance, "{a} {b}");
                }
                first += tokens;
            }
        }
    }

    #[test]
    fn what_does_not_fit_is_an_error() {
        let segment = |tokens, prefix: Range<usize>, first_key| Segment { tokens, prefix, first_key };
        let new = |list: Vec<Segment>| Segments::new(list, &Device::Cpu);
        #[allow(clippy::reversed_empty_ranges)]
        let reversed = 3..1;
        assert!(new(vec![]).is_err() && new(vec![segment(0, 0..1, 1)]).is_err() && new(vec![segment(1, reversed, 1)]).is_err());
        assert!(new(vec![segment(usize::MAX, 0..0, 0)]).is_err() && new(vec![segment(1, 0..0, usize::MAX)]).is_err());
        let segments = new(vec![segment(2, 0..3, 3)]).unwrap();
        let ask = |q: [usize; 3], k: [usize; 3]| segment_attention(randn(q, 1), randn(k, 2), randn(k, 3), &segments);
        assert!(ask([2, 4, 8], [5, 2, 8]).is_ok());
        for (q, k) in [([3, 4, 8], [5, 2, 8]), ([2, 4, 8], [4, 2, 8]), ([2, 4, 8], [5, 3, 8]), ([2, 4, 8], [5, 2, 4])] {
            assert!(ask(q, k).is_err(), "{q:?} {k:?}");
        }
        let tape = crate::Tape::new();
        let v = [([2, 4, 8], 1), ([5, 2, 8], 2), ([5, 2, 8], 3)].map(|(shape, seed)| tape.variable(randn(shape, seed)));
        let o = tape.record(SegmentAttention { segments }, v.to_vec()).unwrap();
        assert!(tape.backward_from(o, randn([2, 32], 4)).is_err());
    }
}
