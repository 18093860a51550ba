//! Worked cases of attention, and sizes to time it at.

use crate::ops::attention::{Sizes, attention, reference, reference_backward};
use crate::ops::{At, Case, Pass, Place, Run, exact, normals, repeated};
use crate::{DType, Error, Result, Tensor, Var};

/// A case of `batch` sequences of `seq` tokens.
fn case(name: &str, (batch, seq): (usize, usize), (heads, kv_heads): (usize, usize), dim: usize, window: Option<usize>) -> Case {
    let t = batch * seq;
    let operands = normals(&[(&[t, heads, dim], 71), (&[t, kv_heads, dim], 72), (&[t, kv_heads, dim], 73)]);
    let name = window.map_or(name.into(), |w| format!("{name}, a window of {w}"));
    Case::new("attention", name, operands, move |v| {
        let [q, k, v]: [Var; 3] = v.try_into().map_err(|_| Error::Tape("three operands".into()))?;
        attention(q, k, v, seq, window)
    })
}

/// Attention plus q and k: of one key, its gradients of q and k are zero but for rounding, so let there be something to measure them
/// by.
fn of_one_key(name: &str, seq: usize, window: Option<usize>) -> Case {
    let operands = normals(&[(&[seq, 2, 8], 74), (&[seq, 2, 8], 75), (&[seq, 2, 8], 76)]);
    Case::new("attention", format!("{name}, plus q and k"), operands, move |v| {
        let [q, k, v]: [Var; 3] = v.try_into().map_err(|_| Error::Tape("three operands".into()))?;
        attention(q.clone(), k.clone(), v, seq, window)?.add(q.reshape([seq, 16])?)?.add(k.reshape([seq, 16])?)
    })
}

/// Windows smaller than a tile of the kernels, equal to one, larger; equal to the sequence, and larger.
fn windows() -> Vec<Case> {
    let small = |window| case("several blocks", (1, 67), (2, 1), 8, Some(window));
    let large = |dim, window| case(&format!("300 tokens, 2 heads of {dim} on 1"), (1, 300), (2, 1), dim, Some(window)).large();
    let of_64 = [2, 20, 32, 64, 65, 128, 129, 200, 299, 300].map(|w| large(64, w));
    // A head of 72 is padded to 128, one of 20 and one of 136 are computed in `float`.
    let others = [(128, 100), (128, 128), (128, 300), (72, 130), (20, 50), (136, 70)].map(|(dim, w)| large(dim, w));
    let odd = case("two sequences", (2, 9), (4, 2), 8, Some(4));
    [2, 7, 64, 66, 67, 1000].map(small).into_iter().chain([odd]).chain(of_64).chain(others).collect()
}

/// Worked cases: one token, one group or several, a sequence longer than a block, windows.
pub(crate) fn cases() -> Vec<Case> {
    let case = |name: &str, tokens, heads, dim| case(name, tokens, heads, dim, None);
    let mut all = vec![
        of_one_key("one token", 1, None),
        of_one_key("70 tokens, a window of 1", 70, Some(1)),
        case("odd, one head", (2, 5), (1, 1), 8),
        case("groups of two", (1, 7), (4, 2), 16),
        case("one group of three", (3, 3), (3, 1), 8),
        case("a head for each", (2, 9), (2, 2), 8),
        case("several blocks", (1, 67), (2, 1), 8),
        case("2x257 tokens, 6 heads of 64 on 2", (2, 257), (6, 2), 64).large(),
    ];
    all.extend(windows());
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
        attention(q, k, v, seq, None)
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
        let one = Sizes { batch: 1, seq, heads: 1, kv_heads: 1, dim: DIM, window: None };
        let at = |x| last_head(x, seq);
        let (want, _) = reference(&at(&x[0])?, &at(&x[1])?, &at(&x[2])?, one);
        exact::close_to_largest("attention", &at(&o[0])?, &want, tolerance(o[0].dtype()))
    })
}

fn timed_backward(seq: usize, batch: usize) -> Case {
    timed_case(("attention", "attention-backward", "Its gradients"), (seq, batch), move |x, dx| {
        let one = Sizes { batch: 1, seq, heads: 1, kv_heads: 1, dim: DIM, window: None };
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
