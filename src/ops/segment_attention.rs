//! Attention of sequences of any lengths that may share what they begin with, without gradients: for evaluation and generation.
//!
//! Queries are those of one segment after another. A query at place t of its segment reads the keys of the segment's prefix, if it
//! has one, then the segment's own keys 0 to t; with a window of w, the last w of these. `s = q kᵀ/√D`, `p = softmax(s)`, `o = p v`, query head h reads key-value head
//! h / (H/KV). Keys and values are rows of one table, in which a prefix may stand once for several segments.

mod cases;
mod fast;

use std::ops::Range;
use std::sync::Arc;

pub(crate) use cases::cases;
pub use cases::check_problems;

use crate::device::cuda::{CudaDevice, Queue};
use crate::device::ffi;
use crate::device::launch::{Check, Kind, View, Work};
use crate::ops::attention::{check_window, first_key};
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
    fn pairs(&self, window: Option<usize>) -> f64 {
        // Of the first n places of a sequence: min(w, 1) + … + min(w, n).
        let first = |n: usize| {
            let growing = window.unwrap_or(n).min(n) as f64;
            growing * (growing + 1.0) / 2.0 + (n as f64 - growing) * growing
        };
        let of = |s: &Segment| first(s.prefix.len() + s.tokens) - first(s.prefix.len());
        self.list.iter().map(of).sum()
    }
}

/// Attention of `q [tokens, H, D]` over `k, v [rows, KV, D]`: `[tokens, H·D]`. With a window of w, a query reads the last w keys up to
/// its own, the prefix's among them.
///
/// # Errors
/// Shapes that do not fit together or to the segments, H no multiple of KV, or a window of no key; on a GPU, D beyond 256, or segments for another device.
pub fn segment_attention(q: Tensor, k: Tensor, v: Tensor, segments: &Segments, window: Option<usize>) -> Result<Tensor> {
    run(&SegmentAttention { segments: segments.clone(), window }, vec![q, k, v], &mut Saved::default())
}

struct SegmentAttention {
    segments: Segments,
    window: Option<usize>,
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
        check_window("segment attention", self.window)?;
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
            return Tensor::from_vec(reference(q.as_slice()?, k.as_slice()?, v.as_slice()?, heads, list, self.window), shape);
        }
        Tensor::from_vec(fast::forward(q.as_slice()?, k.as_slice()?, v.as_slice()?, heads, list, self.window), shape)
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
        unsafe { launch(device.queue(), o.view()?, [q.view()?, k.view()?, v.view()?], &self.segments, heads, self.window)? };
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
unsafe fn launch(
    queue: Queue<'_>,
    o: View<'_>,
    [q, k, v]: [View<'_>; 3],
    segments: &Segments,
    heads: Heads,
    window: Option<usize>,
) -> Result<()> {
    let c = Check::new("segment attention", queue);
    let Heads { query, kv, dim } = heads;
    let (kind, scale) = (q.kind(), heads.scale() as f32);
    let queries = c.product(&[segments.tokens, query, dim])?;
    let keys = k.len();
    let (o, q) = (c.operand("o", o, kind, queries)?, c.operand("q", q, kind, queries)?);
    let (k, v) = (c.operand("k", k, kind, keys)?, c.operand("v", v, kind, keys)?);
    let count = segments.chunks.rows();
    let chunks = c.operand("chunks", segments.chunks.view()?, Kind::U32, count * FIELDS)?;
    let work = Work::computing("attention", 4.0 * segments.pairs(window) * (query * dim) as f64);
    // A window that 32 bits do not count hides nothing.
    let window = window.and_then(|w| i32::try_from(w).ok()).unwrap_or(0);
    let (count, query, kv, dim, dtype) = (c.long(count)?, c.int(query)?, c.int(kv)?, c.int(dim)?, c.code(kind)?);
    // SAFETY: the operands have the values that the sizes ask for; that chunks name rows of them is the caller's word.
    c.launch(work, |s| unsafe { ffi!(sq_segment_attention(o, q, k, v, chunks, count, query, kv, dim, window, scale, dtype, s)) })
}

/// The row of the j-th key that a segment reads.
fn row(segment: &Segment, j: usize) -> usize {
    let prefix = segment.prefix.len();
    if j < prefix { segment.prefix.start + j } else { segment.first_key + j - prefix }
}

/// o `[tokens, H·D]` by the definition.
fn reference(q: &[f64], k: &[f64], v: &[f64], heads: Heads, list: &[Segment], window: Option<usize>) -> Vec<f64> {
    let Heads { query, kv, dim } = heads;
    let mut o = Vec::with_capacity(q.len());
    for (segment, t) in list.iter().flat_map(|s| (0..s.tokens).map(move |t| (s, t))) {
        let rows: Vec<usize> =
            (first_key(window, segment.prefix.len() + t)..=segment.prefix.len() + t).map(|j| row(segment, j)).collect();
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
        let types = [(DType::F64, 1e-12), (DType::F32, 1e-5)];
        for ((dtype, tolerance), window) in types.into_iter().flat_map(|t| [None, Some(20), Some(50)].map(|w| (t, w))) {
            let [q, k, v] = [&q, &k, &v].map(|t| t.to_dtype(dtype).unwrap());
            let got = segment_attention(q.clone(), k.clone(), v.clone(), &segments, window).unwrap().to_f64_vec().unwrap();
            let mut first = prefix;
            for tokens in ends {
                let sequence = |t: &Tensor| {
                    Tensor::concat(&[t.slice(0, prefix).unwrap(), t.slice(first, tokens).unwrap()]).unwrap().to_f64_vec().unwrap()
                };
                let sizes = attention::Sizes { batch: 1, seq: prefix + tokens, heads: 6, kv_heads: 2, dim: 16, window };
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
        let ask = |q: [usize; 3], k: [usize; 3]| segment_attention(randn(q, 1), randn(k, 2), randn(k, 3), &segments, None);
        assert!(ask([2, 4, 8], [5, 2, 8]).is_ok());
        for (q, k) in [([3, 4, 8], [5, 2, 8]), ([2, 4, 8], [4, 2, 8]), ([2, 4, 8], [5, 3, 8]), ([2, 4, 8], [5, 2, 4])] {
            assert!(ask(q, k).is_err(), "{q:?} {k:?}");
        }
        let none = segment_attention(randn([2, 4, 8], 1), randn([5, 2, 8], 2), randn([5, 2, 8], 3), &segments, Some(0));
        assert!(none.unwrap_err().to_string().contains("a window of at least 1 key, got 0"));
        let tape = crate::Tape::new();
        let v = [([2, 4, 8], 1), ([5, 2, 8], 2), ([5, 2, 8], 3)].map(|(shape, seed)| tape.variable(randn(shape, seed)));
        let o = tape.record(SegmentAttention { segments, window: None }, v.to_vec()).unwrap();
        assert!(tape.backward_from(o, randn([2, 32], 4)).is_err());
    }
}
