//! Rows of a table: `y[t, :] = table[ids[t], :]`. Backward: `dtable[i, :] = Σ_{t: ids[t] = i} dy[t, :]`, in token order.

use std::sync::Arc;

use half::{bf16, f16};
use rayon::prelude::*;

use crate::device::{Device, cpu};
use crate::ops::{Case, randn, unsupported, widened_backward};
use crate::tape::{Grads, Inputs, Op, Saved, Var};
use crate::{DType, Element, Error, Result, Tensor};

/// The operation; keeps nothing but the ids.
#[derive(Clone, Debug)]
pub struct Embedding {
    /// Row of the table for every token.
    pub ids: Arc<[u32]>,
    /// Rows of the table.
    pub vocab: usize,
}

impl Op for Embedding {
    fn name(&self) -> &'static str {
        "embedding"
    }
    fn forward(&self, inputs: Inputs, _: &mut Saved) -> Result<Tensor> {
        fn gather<T: Element>(table: &Tensor, ids: &[u32], mut y: Vec<T>) -> Result<Tensor> {
            let cols = table.cols();
            let values = table.as_slice::<T>()?;
            y.par_chunks_mut(cols.max(1)).zip(ids).for_each(|(y, &id)| y.copy_from_slice(&values[id as usize * cols..][..cols]));
            Tensor::from_vec(y, [ids.len(), cols])
        }
        let [table] = inputs.take()?;
        if table.shape().len() != 2 || table.rows() != self.vocab {
            return Err(Error::shape("embedding", format!("[{}, columns]", self.vocab), table.shape()));
        }
        if let Some(id) = self.ids.iter().find(|&&id| id as usize >= self.vocab) {
            return Err(Error::argument("embedding", format!("token id {id} in a vocabulary of {}", self.vocab)));
        }
        let n = self.ids.len() * table.cols();
        match (table.device(), table.dtype()) {
            (Device::Cpu, DType::F64) => {
                Tensor::from_vec(reference(table.as_slice()?, &self.ids, table.cols()), [self.ids.len(), table.cols()])
            }
            (Device::Cpu, DType::F32) => gather(&table, &self.ids, cpu::alloc(n)),
            (Device::Cpu, DType::F16) => gather(&table, &self.ids, vec![f16::ZERO; n]),
            (Device::Cpu, DType::BF16) => gather(&table, &self.ids, vec![bf16::ZERO; n]),
            #[cfg(feature = "cuda")]
            (Device::Cuda(_), _) => crate::device::cuda::ops::embedding_forward(&table, &self.ids),
            _ => Err(unsupported(self, &table)),
        }
    }
    fn backward(&self, saved: Saved, dy: Tensor, want: &[bool]) -> Result<Grads> {
        if dy.device().is_cpu() && dy.dtype().is_half() {
            return widened_backward(self, saved, dy, want);
        }
        let shape = [self.vocab, dy.cols()];
        Ok(vec![Some(match (dy.device(), dy.dtype()) {
            (Device::Cpu, DType::F64) => Tensor::from_vec(reference_backward(dy.as_slice()?, &self.ids, shape), shape)?,
            (Device::Cpu, DType::F32) => Tensor::from_vec(fast_backward(dy.as_slice()?, &self.ids, shape), shape)?,
            #[cfg(feature = "cuda")]
            (Device::Cuda(_), _) => crate::device::cuda::ops::embedding_backward(dy, &self.ids, self.vocab)?,
            _ => return Err(unsupported(self, &dy)),
        })])
    }
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
pub fn cases() -> Vec<Case> {
    let case = |name: &str, vocab: usize, cols: usize, tokens: usize| {
        let ids: Arc<[u32]> = (0..tokens).map(|t| ((t * t + 3 * t) % vocab) as u32).collect();
        Case::new("embedding", name, vec![randn([vocab, cols], 51)], move |mut v| v.remove(0).embedding(ids.clone()))
    };
    vec![
        case("one token", 3, 5, 1),
        case("odd", 7, 5, 11),
        case("repeated", 2, 24, 9),
        case("4096x384, 1024 tokens", 4096, 384, 1024).large(),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_id_is_an_error() {
        let tape = crate::Tape::new();
        assert!(tape.constant(randn([3, 2], 1)).embedding(Arc::from([0, 3])).is_err());
    }
}
