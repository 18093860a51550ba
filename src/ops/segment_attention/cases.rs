//! Worked cases of segment attention, problems for parity, and sizes to time it at.

use std::ops::Range;
use std::sync::Arc;

use super::{Heads, Segment, Segments, reference, segment_attention};
use crate::ops::{At, Call, Case, Place, Run, exact, repeated};
use crate::{DType, Device, Result, Tensor};

/// Problems for parity: segments without and behind prefixes, one token, several chunks and blocks, groups, a table with rows that
/// nobody reads. Heads of queries, of keys, values of each; segments.
pub(crate) fn problems() -> Vec<(&'static str, [usize; 3], Vec<Segment>)> {
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
pub(crate) fn cases() -> Vec<Case> {
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
        Ok(Call::new(move || Ok(vec![segment_attention(x[0].clone(), x[1].clone(), x[2].clone(), &segments, None)?])))
    }));
    let keys = n.saturating_add(1).saturating_mul(rows);
    let shapes = [vec![rows, HEADS[0], DIM], vec![keys, HEADS[1], DIM], vec![keys, HEADS[1], DIM]];
    let values = 2.0 * keys as f64 * (HEADS[1] * DIM) as f64;
    Case::timed(what, (n, rows), shapes.to_vec(), call, move |x, o| {
        let [q, k, v] = [&x[0], &x[1], &x[2]].map(Tensor::to_f64_vec);
        let want = reference(&q?, &k?, &v?, Heads { query: HEADS[0], kv: HEADS[1], dim: DIM }, &segments(), None);
        let tolerance = if o[0].dtype() == DType::F32 { 1e-4 } else { 4.0 * o[0].dtype().epsilon() };
        exact::close_to_largest("segment attention", &o[0].to_f64_vec()?, &want, tolerance)
    })
    .moves(values)
    .drawn(move |dtype, device| {
        shapes.iter().enumerate().map(|(i, shape)| repeated(shape.clone(), 1 + i as u64, dtype, device)).collect()
    })
}

/// Segments with and without prefixes, of several head sizes, on a device, in a type, without a window and with some, against the definition in `f64`.
///
/// # Errors
/// Values that differ by more than rounding.
pub fn check_problems(dtype: DType, device: &Device) -> Result<()> {
    let windows = [None, Some(1), Some(7), Some(32), Some(64), Some(100), Some(1000)];
    for ((name, [query, kv, dim], list), window) in problems().into_iter().flat_map(|p| windows.map(|w| (p.clone(), w))) {
        let segments = Segments::new(list.clone(), device)?;
        let shapes = [[segments.tokens, query, dim], [segments.keys + 3, kv, dim], [segments.keys + 3, kv, dim]];
        // Rounded to the type first, so that all see the same.
        let draw = |(i, shape): (usize, [usize; 3])| crate::ops::randn(shape, 50 + i as u64).to_dtype(dtype);
        let x = shapes.into_iter().enumerate().map(draw).collect::<Result<Vec<_>>>()?;
        let [q, k, v] = [0, 1, 2].map(|i: usize| x[i].to_f64_vec());
        let want = reference(&q?, &k?, &v?, Heads { query, kv, dim }, &list, window);
        let on = |i: usize| x[i].to_device(device);
        let o = segment_attention(on(0)?, on(1)?, on(2)?, &segments, window)?;
        let tolerance = if dtype == DType::F32 { 1e-5 } else { 2.0 * dtype.epsilon() };
        exact::close_to_largest(
            &format!("segment attention, {name}, window {window:?}, {dtype}"),
            &o.to_f64_vec()?,
            &want,
            tolerance,
        )?;
    }
    Ok(())
}
