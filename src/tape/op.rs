//! What an operation is.

use crate::{Error, Result, Tensor};

/// The operands of an operation, owned: an operation may reuse their memory.
pub struct Inputs(pub(super) Vec<Tensor>);

impl Inputs {
    /// Exactly `N` operands, or an error.
    pub fn take<const N: usize>(self) -> Result<[Tensor; N]> {
        self.0.try_into().map_err(|v: Vec<Tensor>| Error::Tape(format!("expected {N} operands, got {}", v.len())))
    }
    /// All of them.
    pub fn into_vec(self) -> Vec<Tensor> {
        self.0
    }
}

impl From<Vec<Tensor>> for Inputs {
    fn from(v: Vec<Tensor>) -> Self {
        Self(v)
    }
}

/// What an operation keeps for its backward pass, and which gradients will be asked for.
#[derive(Default)]
pub struct Saved {
    tensors: Vec<Tensor>,
    want: Vec<bool>,
}

impl Saved {
    /// An empty store whose backward pass will want these gradients; for calling an [`Op`] without a tape.
    pub fn new(want: Vec<bool>) -> Self {
        Self { tensors: vec![], want }
    }
    /// True when the gradient of operand `i` will be asked for: only then is anything worth keeping.
    pub fn wants(&self, i: usize) -> bool {
        self.want.get(i).copied().unwrap_or(false)
    }
    /// True when any gradient will be asked for.
    pub fn wants_any(&self) -> bool {
        self.want.contains(&true)
    }
    /// Keeps a tensor alive until the backward pass.
    pub fn push(&mut self, t: Tensor) {
        self.tensors.push(t);
    }
    /// Exactly the `N` tensors that forward kept.
    pub fn take<const N: usize>(self) -> Result<[Tensor; N]> {
        Inputs(self.tensors).take()
    }
    /// All tensors that forward kept, in order.
    pub fn into_vec(self) -> Vec<Tensor> {
        self.tensors
    }
}

/// Gradients of an operation, one per operand; `None` where it was not wanted.
pub type Grads = Vec<Option<Tensor>>;

/// A differentiable operation. Implement it to add one, inside or outside this crate, and run it with
/// [`Tape::record`](crate::Tape::record).
pub trait Op {
    /// For messages.
    fn name(&self) -> &'static str;
    /// Computes the result; keeps in `save` what [`Op::backward`] needs, and only when [`Saved::wants`] says so.
    fn forward(&self, inputs: Inputs, save: &mut Saved) -> Result<Tensor>;
    /// The gradients of the operands flagged in `want`, given that of the result.
    fn backward(&self, saved: Saved, dy: Tensor, want: &[bool]) -> Result<Grads>;
    /// Keeps what [`Op::backward`] needs without computing the result; `None` where that is not possible. For the last operation of
    /// a function that is run again only for its gradients ([`Tape::record_last`](crate::Tape::record_last)).
    fn save_only(&self, inputs: &[Tensor], save: &mut Saved) -> Option<Result<()>> {
        let _ = (inputs, save);
        None
    }
    /// For operations that round: the smooth function of the operands whose derivative [`Op::backward`] is *defined* to be (that of
    /// the identity, straight through). Gradient checks differentiate it plus a constant in place of the operation.
    fn surrogate(&self, inputs: &[Tensor]) -> Option<Result<Tensor>> {
        let _ = inputs;
        None
    }
}
