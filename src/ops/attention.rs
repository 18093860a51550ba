//! Causal attention with grouped queries: query head h reads key-value head h / (H/KV), at position t the keys 0 to t, or with a
//! window of w (Beltagy et al. 2020) the last w of them, t − w + 1 to t.
//!
//! `s = q kᵀ/√D`, `p = softmax(s)`, `o = p v`. Forward keeps q, k, v, o and `lse = log Σ exp s` of every row, never an S×S matrix
//! (Dao et al. 2022); backward recomputes `p = exp(s − lse)`:
//! `dv = pᵀ do`, `ds = p (do vᵀ − Σ_D do o)`, `dq = ds k/√D`, `dk = dsᵀ q/√D`, dk and dv summed over the heads of the group.

mod cases;
mod fast;
pub(crate) mod launch;
mod reference;

pub(crate) use cases::cases;
pub use reference::{reference, reference_backward};

use fast::Kept;
pub(crate) use fast::row_parts;

use crate::device::cuda::CudaDevice;
use crate::device::launch::Kind;
use crate::tape::{Grads, Inputs, Op, Saved, Var, operands};
use crate::{DType, Error, Result, Tensor};

/// The operation on q `[tokens, H, D]` and k, v `[tokens, KV, D]`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Attention {
    /// Tokens of one sequence.
    pub seq: usize,
    /// Keys that a query reads at most, the last of them its own; `None`: all up to its own.
    pub window: Option<usize>,
}

/// Causal attention of `q [tokens, H, D]` over `k, v [tokens, KV, D]`, where tokens are whole sequences of `seq`: `[tokens, H·D]`. With a
/// window of w, position t reads the keys max(0, t − w + 1) to t.
///
/// # Errors
/// Shapes that do not fit together, H no multiple of KV, or a window of no key.
pub fn attention<'t>(q: Var<'t>, k: Var<'t>, v: Var<'t>, seq: usize, window: Option<usize>) -> Result<Var<'t>> {
    q.tape().record(Attention { seq, window }, vec![q, k, v])
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
    /// Keys that a query reads at most, the last of them its own; `None`: all up to its own.
    pub window: Option<usize>,
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
        check_window("attention", self.window)?;
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
        Ok(Sizes { batch: tokens / seq, seq, heads, kv_heads: *kv_heads, dim, window: self.window })
    }
}

/// The first key that the query at `t` reads.
pub(crate) fn first_key(window: Option<usize>, t: usize) -> usize {
    window.map_or(0, |w| (t + 1).saturating_sub(w))
}

/// A window of no key would leave a query without any.
pub(crate) fn check_window(what: &'static str, window: Option<usize>) -> Result<()> {
    match window {
        Some(0) => Err(Error::argument(what, "expected a window of at least 1 key, got 0")),
        _ => Ok(()),
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
            let (o, lse) = fast::forward(q.as_slice()?, k.as_slice()?, v.as_slice()?, n);
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
        launch::forward(device.queue(), o.view()?, lse.view()?, views, &n)?;
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
            let (dq, dk, dv) = fast::backward(dy.as_slice()?, saved, n);
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
        let workspace = Tensor::on(device, &[launch::workspace(&n, Kind::from(q.dtype()))?.div_ceil(4)], DType::F32)?;
        let to = [grads[0].view()?, grads[1].view()?, grads[2].view()?];
        let from = [q.view()?, k.view()?, v.view()?];
        launch::backward(device.queue(), to, workspace.view()?, dy.view()?, from, o.view()?, lse.view()?, &n)?;
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
    /// The first key that the query at `t` reads.
    fn first_key(self, t: usize) -> usize {
        first_key(self.window, t)
    }
    /// Where head `h` of `heads` of token `t` of sequence `b` starts.
    fn at(self, b: usize, t: usize, h: usize, heads: usize) -> usize {
        ((b * self.seq + t) * heads + h) * self.dim
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::randn;

    #[test]
    fn threads_change_no_bit() {
        let x = |heads: usize, seed| randn([2 * 67, heads, 16], seed).to_dtype(DType::F32).unwrap();
        let run = |threads, window| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let mut save = Saved::new(vec![true; 3]);
                let inputs = vec![x(6, 1), x(2, 2), x(2, 3)];
                let o = crate::tape::run(&Attention { seq: 67, window }, inputs, &mut save).unwrap();
                let dy = randn(o.shape(), 4).to_dtype(DType::F32).unwrap();
                let grads = Attention { seq: 67, window }.backward(save, dy, &[true; 3]).unwrap();
                let bits = |t: Tensor| t.to_vec::<f32>().unwrap().iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                [vec![bits(o)], grads.into_iter().map(|g| bits(g.unwrap())).collect()].concat()
            })
        };
        for window in [None, Some(11)] {
            assert!(run(1, window) == run(3, window));
        }
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
            assert!(attention(q, k, v, seq, None).is_err());
        }
        let tape = crate::Tape::new();
        let [q, k, v] = [1, 2, 3].map(|seed| tape.constant(randn([4, 2, 8], seed)));
        let error = attention(q, k, v, 4, Some(0)).err().unwrap().to_string();
        assert!(error.contains("a window of at least 1 key, got 0"), "{error}");
    }
}
