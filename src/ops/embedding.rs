//! Rows of a table: `y[t, :] = table[ids[t], :]`. Backward: `dtable[i, :] = Σ_{t: ids[t] = i} dy[t, :]`, in token order.

use std::sync::Arc;

use half::{bf16, f16};
use rayon::prelude::*;

use crate::device::cuda::{CudaDevice, Queue};
use crate::device::launch::{Check, Kind, View, Work};
use crate::device::{cpu, ffi};
use crate::ops::{At, Case, Once, Place, Run, exact, normals, scattered};
use crate::tape::{Grads, Inputs, Op, Saved, Takes, Var, operands};
use crate::{DType, Element, Error, Result, Tensor};

/// The operation; keeps nothing but the ids.
#[derive(Clone, Debug)]
pub(crate) struct Embedding {
    /// Row of the table for every token.
    pub ids: Arc<[u32]>,
    /// Rows of the table.
    pub vocab: usize,
}

impl Op for Embedding {
    fn name(&self) -> &'static str {
        "embedding"
    }
    fn takes(&self) -> Takes {
        Takes::AnyType
    }
    fn check(&self, inputs: &[Tensor]) -> Result<()> {
        let [table] = operands(inputs)?;
        if table.shape().len() != 2 || table.rows() != self.vocab {
            return Err(Error::shape("embedding", format!("[{}, columns]", self.vocab), table.shape()));
        }
        match self.ids.iter().find(|&&id| id as usize >= self.vocab) {
            Some(id) => Err(Error::argument("embedding", format!("token id {id} in a vocabulary of {}", self.vocab))),
            None => Ok(()),
        }
    }
    fn cpu(&self, inputs: Inputs, _: &mut Saved) -> Result<Tensor> {
        fn gather<T: Element>(table: &Tensor, ids: &[u32], mut y: Vec<T>) -> Result<Tensor> {
            let cols = table.cols();
            let values = table.as_slice::<T>()?;
            y.par_chunks_mut(cols.max(1)).zip(ids).for_each(|(y, &id)| y.copy_from_slice(&values[id as usize * cols..][..cols]));
            Tensor::from_vec(y, [ids.len(), cols])
        }
        let [table] = inputs.take()?;
        let n = self.ids.len() * table.cols();
        match table.dtype() {
            DType::F64 => Tensor::from_vec(reference(table.as_slice()?, &self.ids, table.cols()), [self.ids.len(), table.cols()]),
            DType::F16 => gather(&table, &self.ids, vec![f16::ZERO; n]),
            DType::BF16 => gather(&table, &self.ids, vec![bf16::ZERO; n]),
            _ => gather(&table, &self.ids, cpu::alloc(n)),
        }
    }
    fn gpu(&self, device: &CudaDevice, inputs: Inputs, _: &mut Saved) -> Result<Tensor> {
        let [table] = inputs.take()?;
        let table = table.aligned()?;
        let ids = device.upload(bytemuck::cast_slice(&self.ids), Kind::U32)?;
        let y = Tensor::on(device, &[self.ids.len(), table.cols()], table.dtype())?;
        // SAFETY: `check` found every id in the table.
        unsafe { launch(device.queue(), y.view()?, table.view()?, ids.view(), table.cols())? };
        Ok(y)
    }
    fn backward(&self, _: Saved, dy: Tensor, _: &[bool]) -> Result<Grads> {
        let shape = [self.vocab, dy.cols()];
        let dtable = if dy.dtype() == DType::F64 {
            Tensor::from_vec(reference_backward(dy.as_slice()?, &self.ids, shape), shape)?
        } else {
            let wide = dy.to_dtype(DType::F32)?;
            Tensor::from_vec(fast_backward(wide.as_slice()?, &self.ids, shape), shape)?
        };
        Ok(vec![Some(dtable.to_dtype(dy.dtype())?)])
    }
    fn gpu_backward(&self, device: &CudaDevice, _: Saved, dy: Tensor, _: &[bool]) -> Result<Grads> {
        let dy = dy.aligned()?;
        let (order, start) = runs(&self.ids, self.vocab);
        let upload = |ids: &[u32]| device.upload(bytemuck::cast_slice(ids), Kind::U32);
        let (order, start) = (upload(&order)?, upload(&start)?);
        let table = Tensor::on(device, &[self.vocab, dy.cols()], DType::F32)?;
        // SAFETY: order and start are the runs of ids that the forward pass found in the table.
        unsafe { launch_backward(device.queue(), table.view()?, dy.view()?, order.view(), start.view(), dy.cols())? };
        Ok(vec![Some(table.to_dtype(dy.dtype())?)])
    }
}

/// Rows `ids` (`u32`) of a table of `cols` columns.
///
/// # Safety
/// Every id is a row of the table: the kernel does not look.
unsafe fn launch(queue: Queue<'_>, y: View<'_>, table: View<'_>, ids: View<'_>, cols: usize) -> Result<()> {
    let c = Check::new("embedding", queue);
    let (tokens, kind) = (ids.len(), table.kind());
    c.rows(table.len(), cols)?;
    let y = c.operand("y", y, kind, c.product(&[tokens, cols])?)?;
    let table = c.operand("table", table, kind, table.len())?;
    let ids = c.operand("ids", ids, Kind::U32, tokens)?;
    let (tokens, cols, dtype) = (c.long(tokens)?, c.long(cols)?, c.code(kind)?);
    // SAFETY: y has a row of cols values for every id; that ids are rows of the table is the caller's word.
    c.launch(Work::of("embedding"), |s| unsafe { ffi!(sq_embedding_forward(y, table, ids, tokens, cols, dtype, s)) })
}

/// The gradient (`f32`) of a table, from dy and the [`runs`] of its ids.
///
/// # Safety
/// `order` and `start` are such runs of as many ids as dy has rows: the kernel does not look.
unsafe fn launch_backward(
    queue: Queue<'_>,
    dtable: View<'_>,
    dy: View<'_>,
    order: View<'_>,
    start: View<'_>,
    cols: usize,
) -> Result<()> {
    let c = Check::new("embedding backward", queue);
    let (tokens, kind) = (order.len(), dy.kind());
    let vocab = c.rows(dtable.len(), cols)?;
    let dtable = c.operand("dtable", dtable, Kind::F32, dtable.len())?;
    let dy = c.operand("dy", dy, kind, c.product(&[tokens, cols])?)?;
    let order = c.operand("order", order, Kind::U32, tokens)?;
    let start = c.operand("start", start, Kind::U32, vocab + 1)?;
    let (vocab, cols, dtype) = (c.long(vocab)?, c.long(cols)?, c.code(kind)?);
    // SAFETY: sizes as kernels.h asks; that the runs name rows of dy is the caller's word.
    c.launch(Work::of("embedding backward"), |s| unsafe {
        ffi!(sq_embedding_backward(dtable, dy, order, start, vocab, cols, dtype, s))
    })
}

impl Var<'_> {
    /// Row `ids[t]` of this table `[vocab, columns]` for every token t: `[tokens, columns]`.
    ///
    /// # Errors
    /// An id that is no row of the table.
    pub fn embedding(self, ids: Arc<[u32]>) -> Result<Self> {
        let vocab = self.value().rows();
        self.tape().record(Embedding { ids, vocab }, vec![self])
    }
}

/// y by the definition.
pub fn reference(table: &[f64], ids: &[u32], cols: usize) -> Vec<f64> {
    ids.iter().flat_map(|&id| table[id as usize * cols..][..cols].iter().copied()).collect()
}

/// dtable by the definition.
pub fn reference_backward(dy: &[f64], ids: &[u32], [vocab, cols]: [usize; 2]) -> Vec<f64> {
    let mut dtable = vec![0.0; vocab * cols];
    for (t, &id) in ids.iter().enumerate() {
        for j in 0..cols {
            dtable[id as usize * cols + j] += dy[t * cols + j];
        }
    }
    dtable
}

/// Tokens sorted by id, stably, and where each id's run starts: `order [tokens]`, `start [vocab + 1]`.
pub(crate) fn runs(ids: &[u32], vocab: usize) -> (Vec<u32>, Vec<u32>) {
    let mut start = vec![0u32; vocab + 1];
    ids.iter().for_each(|&id| start[id as usize + 1] += 1);
    (0..vocab).for_each(|i| start[i + 1] += start[i]);
    let mut next = start.clone();
    let mut order = vec![0u32; ids.len()];
    for (t, &id) in ids.iter().enumerate() {
        order[next[id as usize] as usize] = t as u32;
        next[id as usize] += 1;
    }
    (order, start)
}

/// Parallel over rows of the table, each summed in token order.
fn fast_backward(dy: &[f32], ids: &[u32], [vocab, cols]: [usize; 2]) -> Vec<f32> {
    let (order, start) = runs(ids, vocab);
    let mut dtable = cpu::alloc(vocab * cols);
    let rows = cpu::rows_per_task(cols);
    dtable.par_chunks_mut(rows * cols.max(1)).enumerate().for_each(|(task, dtable)| {
        cpu::simd(
            #[inline(always)]
            || {
                for (i, sum) in dtable.chunks_mut(cols).enumerate() {
                    let id = task * rows + i;
                    sum.fill(0.0);
                    for &t in &order[start[id] as usize..start[id + 1] as usize] {
                        sum.iter_mut().zip(&dy[t as usize * cols..][..cols]).for_each(|(s, d)| *s += d);
                    }
                }
            },
        );
    });
    dtable
}

/// Worked cases: repeated and unused ids, one token.
pub(crate) fn cases() -> Vec<Case> {
    let case = |name: &str, vocab: usize, cols: usize, tokens: usize| {
        let ids: Arc<[u32]> = (0..tokens).map(|t| ((t * t + 3 * t) % vocab) as u32).collect();
        let operands = normals(&[(&[vocab, cols], 51)]);
        Case::new("embedding", name, operands, move |mut v| v.remove(0).embedding(ids.clone()))
    };
    let mut all = vec![
        case("one token", 3, 5, 1),
        case("odd", 7, 5, 11),
        case("repeated", 2, 24, 9),
        case("4096x384, 1024 tokens", 4096, 384, 1024).large(),
    ];
    all.extend(Case::table(timed, SIZES));
    all
}

const SIZES: &[At] = &[(Place::Cpu, 4096, 4096, &[DType::F32]), (Place::Gpu, 4096, 16384, &[DType::BF16, DType::F32])];
/// Rows of the table of the timed cases.
const TIMED_VOCAB: usize = 32000;

fn timed(n: usize, rows: usize) -> Case {
    let what = ("embedding", "embedding", "Rows of n of a table of 32000, for so many tokens");
    let ids = Once::new();
    let graph = Run::graph(move |mut v| {
        let make = || Ok(scattered(rows, TIMED_VOCAB).map(|id| id as u32).collect::<Arc<[u32]>>());
        let ids = ids.get(v[0].value(), make)?;
        v.remove(0).embedding(ids)
    });
    Case::timed(what, (n, rows), vec![vec![TIMED_VOCAB, n]], graph, move |x, y| {
        exact::rows(n, &[], &y[0], |r, got, _| {
            let id = (scattered(rows, TIMED_VOCAB).nth(r)).expect("one for each row");
            exact::close("embedding", got, &exact::row(&x[0], id, n)?, y[0].dtype(), 1.0)
        })
    })
    // It reads of its table what it returns.
    .moves(2.0 * n as f64 * rows as f64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::randn;

    #[test]
    fn an_unknown_id_is_an_error() {
        let tape = crate::Tape::new();
        assert!(tape.constant(randn([3, 2], 1)).embedding(Arc::from([0, 3])).is_err());
    }
}
