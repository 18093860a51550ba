//! Reverse-mode automatic differentiation on a Wengert list.
//!
//! Operations append themselves to a [`Tape`] as they run, so execution order is a topological order and the backward pass
//! simply pops nodes: memory only falls. Nothing is recorded for operations on constants. A value used twice is `.clone()`d,
//! and that is where its gradients add.

mod checkpoint;
mod op;

use std::cell::{Cell, RefCell};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::profile::{enter, enter_pass, part};
use crate::{Error, Result, Tensor};

pub use checkpoint::checkpoint;
pub(crate) use op::run_backward;
pub use op::{Grads, Inputs, Op, Saved, Takes, operands, run};

struct Node {
    /// `None` for a variable.
    op: Option<Box<dyn Op>>,
    inputs: Vec<Option<usize>>,
    shape: Vec<usize>,
    saved: Saved,
    part: &'static str,
}

/// How operations with a surrogate behave; see [`crate::check`].
#[derive(Default)]
pub(crate) enum Residuals {
    #[default]
    Off,
    Record(Vec<Residual>),
    Replay(std::vec::IntoIter<Residual>),
}

/// An operation less its surrogate, and the operands that both were computed of.
#[derive(Clone)]
pub(crate) struct Residual {
    difference: Tensor,
    base: Vec<Tensor>,
}

/// The list of recorded operations.
///
/// ```
/// use spinquant::{Tape, Tensor};
/// let tape = Tape::new();
/// let x = tape.variable(Tensor::from_vec(vec![1f64, 2.0], [1, 2])?);
/// let y = tape.variable(Tensor::from_vec(vec![3f64, 4.0], [2, 1])?);
/// let dot = x.clone().matmul(y.clone())?.reshape([])?;
/// let mut grads = tape.backward(dot)?;
/// assert_eq!(grads.take(&x)?.to_vec::<f64>()?, [3.0, 4.0]);
/// # Ok::<(), spinquant::Error>(())
/// ```
pub struct Tape {
    /// No two tapes of a process have the same.
    id: u64,
    nodes: RefCell<Option<Vec<Node>>>,
    pub(crate) residuals: RefCell<Residuals>,
    /// The result is not wanted, only gradients.
    replay: Cell<bool>,
}

/// A tensor on a tape: a variable, a constant, or the result of an operation. Cloning shares the memory.
#[derive(Clone)]
pub struct Var<'t> {
    tape: &'t Tape,
    node: Option<usize>,
    value: Tensor,
}

impl Default for Tape {
    fn default() -> Self {
        Self::new()
    }
}

impl Tape {
    /// An empty tape.
    pub fn new() -> Self {
        static TAPES: AtomicU64 = AtomicU64::new(0);
        Self {
            id: TAPES.fetch_add(1, Ordering::Relaxed),
            nodes: RefCell::new(Some(vec![])),
            residuals: RefCell::default(),
            replay: Cell::new(false),
        }
    }

    /// A tape for running a function again for its gradients alone: see [`Tape::record_last`].
    pub fn for_gradients() -> Self {
        let tape = Self::new();
        tape.replay.set(true);
        tape
    }

    /// A value whose gradient will be asked for.
    pub fn variable(&self, value: Tensor) -> Var<'_> {
        let node = Node { op: None, inputs: vec![], shape: value.shape().to_vec(), saved: Saved::default(), part: "" };
        Var { tape: self, node: self.push(node), value }
    }

    /// A value without a gradient.
    pub fn constant(&self, value: Tensor) -> Var<'_> {
        Var { tape: self, node: None, value }
    }

    /// Runs `op` and records it, unless every operand is a constant.
    ///
    /// # Errors
    /// Operands of another tape, or a tape already played back; and whatever `op` reports.
    pub fn record<'t>(&'t self, op: impl Op + 'static, operands: Vec<Var<'t>>) -> Result<Var<'t>> {
        self.check(op.name(), &operands)?;
        let inputs: Vec<_> = operands.iter().map(|v| v.node).collect();
        let mut saved = Saved::new(inputs.iter().map(Option::is_some).collect());
        let values = Inputs(operands.into_iter().map(|v| v.value).collect());
        let value = self.run(&op, values, &mut saved)?;
        let node = if saved.wants_any() {
            self.push(Node { op: Some(Box::new(op)), inputs, shape: value.shape().to_vec(), saved, part: part().1 })
        } else {
            None
        };
        Ok(Var { tape: self, node, value })
    }

    /// [`Tape::record`] for the last operation of a function, with a result of `shape`. On a tape that was made
    /// [for gradients](Tape::for_gradients) the result is not computed ([`Op::save_only`]) and the value is empty: it is good for
    /// [`Tape::backward_from`] and nothing else.
    ///
    /// # Errors
    /// As [`Tape::record`].
    pub fn record_last<'t>(&'t self, op: impl Op + 'static, operands: Vec<Var<'t>>, shape: &[usize]) -> Result<Var<'t>> {
        self.check(op.name(), &operands)?;
        let exact = matches!(*self.residuals.borrow(), Residuals::Off);
        let inputs: Vec<_> = operands.iter().map(|v| v.node).collect();
        let mut saved = Saved::new(inputs.iter().map(Option::is_some).collect());
        if self.replay.get() && exact && saved.wants_any() {
            let values: Vec<_> = operands.iter().map(|v| v.value.clone()).collect();
            if let Some(done) = op.save_only(&values, &mut saved) {
                done?;
                let node = Node { op: Some(Box::new(op)), inputs, shape: shape.to_vec(), saved, part: part().1 };
                let empty = Tensor::zeros([0], values[0].dtype(), &crate::Device::Cpu)?;
                return Ok(Var { tape: self, node: self.push(node), value: empty });
            }
        }
        self.record(op, operands)
    }

    fn check(&self, what: &str, operands: &[Var<'_>]) -> Result<()> {
        if operands.iter().any(|v| !std::ptr::eq(v.tape, self)) {
            return Err(Error::Tape(format!("{what}: an operand belongs to another tape")));
        }
        if self.nodes.borrow().is_none() {
            return Err(Error::Tape(format!("{what}: this tape has been played back; start a new one")));
        }
        Ok(())
    }

    fn run(&self, op: &impl Op, values: Inputs, saved: &mut Saved) -> Result<Tensor> {
        let mut residuals = self.residuals.borrow_mut();
        if matches!(*residuals, Residuals::Off) {
            return run(op, values, saved);
        }
        let inputs = values.0.clone();
        match &mut *residuals {
            Residuals::Record(list) => {
                let smooth = op.surrogate_near(&inputs, &inputs).transpose()?;
                let y = run(op, values, saved)?;
                if let Some(smooth) = smooth {
                    list.push(Residual { difference: Tensor::axpby(1.0, y.clone(), -1.0, smooth)?, base: inputs });
                }
                Ok(y)
            }
            Residuals::Replay(list) if op.surrogate_near(&inputs, &inputs).is_some() => {
                let known = list.next().ok_or_else(|| Error::Tape("the graph changed between evaluations".into()))?;
                run(op, values, saved)?; // for what it saves
                let none = || Error::Tape(format!("{}: a surrogate at one point and none at another", op.name()));
                let smooth = op.surrogate_near(&inputs, &known.base).ok_or_else(none)??;
                Tensor::axpby(1.0, smooth, 1.0, known.difference)
            }
            Residuals::Off | Residuals::Replay(_) => run(op, values, saved),
        }
    }

    fn push(&self, node: Node) -> Option<usize> {
        let mut nodes = self.nodes.borrow_mut();
        let nodes = nodes.as_mut()?;
        nodes.push(node);
        Some(nodes.len() - 1)
    }

    /// Gradients of a scalar with respect to every variable. The tape is spent.
    ///
    /// # Errors
    /// A value that is no scalar, or of another tape; a tape already played back; and whatever an operation reports.
    pub fn backward(&self, loss: Var<'_>) -> Result<Gradients> {
        if loss.value.len() != 1 {
            return Err(Error::shape("backward", "of one value (use backward_from for others)", loss.shape()));
        }
        let one = Tensor::from_vec(vec![1f64], loss.shape())?.to_dtype(loss.value.dtype())?.to_device(&loss.value.device())?;
        self.backward_from(loss, one)
    }

    /// Gradients of `⟨dy, y⟩` with respect to every variable. The tape is spent.
    ///
    /// # Errors
    /// `dy` of another shape than y, y of another tape; a tape already played back; and whatever an operation reports.
    pub fn backward_from(&self, y: Var<'_>, dy: Tensor) -> Result<Gradients> {
        self.backward_from_all(vec![(y, dy)])
    }

    /// Gradients of `Σ ⟨dy, y⟩` over several values with respect to every variable. The tape is spent.
    ///
    /// # Errors
    /// As [`Tape::backward_from`].
    pub fn backward_from_all(&self, values: Vec<(Var<'_>, Tensor)>) -> Result<Gradients> {
        let mut nodes = self.nodes.borrow_mut().take().ok_or_else(|| Error::Tape("played back a second time".into()))?;
        let mut grads: Vec<Option<Tensor>> = vec![];
        grads.resize_with(nodes.len(), || None);
        for (y, dy) in values {
            if !std::ptr::eq(y.tape, self) {
                return Err(Error::Tape("backward: the value belongs to another tape".into()));
            }
            let shape = y.node.map_or(y.shape(), |n| &nodes[n].shape);
            if dy.shape() != shape {
                return Err(Error::shape("backward: gradient of the output", format!("{shape:?}"), dy.shape()));
            }
            if let Some(node) = y.node {
                accumulate(&mut grads[node], dy)?;
            }
        }
        let _pass = enter_pass("backward");
        let slot = |n: &Node| if n.op.is_none() { Slot::Gradient(None) } else { Slot::Intermediate };
        let mut variables = Gradients { tape: self.id, of: nodes.iter().map(slot).collect() };
        while let Some(Node { op, inputs, saved, part, .. }) = nodes.pop() {
            let Some(dy) = grads.pop().flatten() else { continue };
            let Some(op) = op else {
                variables.of[nodes.len()] = Slot::Gradient(Some(dy));
                continue;
            };
            let _part = enter(part);
            let want: Vec<_> = inputs.iter().map(Option::is_some).collect();
            let dx = run_backward(&*op, saved, dy, &want)?;
            if dx.len() != inputs.len() {
                return Err(Error::Tape(format!("{}: {} gradients for {} operands", op.name(), dx.len(), inputs.len())));
            }
            for (input, dx) in inputs.into_iter().zip(dx) {
                let (Some(i), Some(dx)) = (input, dx) else { continue };
                if dx.shape() != nodes[i].shape {
                    return Err(Error::shape(format!("{}: gradient", op.name()), format!("{:?}", nodes[i].shape), dx.shape()));
                }
                accumulate(&mut grads[i], dx)?;
            }
        }
        Ok(variables)
    }
}

/// The one place where gradients add.
fn accumulate(sum: &mut Option<Tensor>, dx: Tensor) -> Result<()> {
    *sum = Some(match sum.take() {
        Some(sum) => Tensor::axpby(1.0, sum, 1.0, dx)?,
        None => dx,
    });
    Ok(())
}

/// Gradients of the variables of a tape.
pub struct Gradients {
    tape: u64,
    /// Of every node.
    of: Vec<Slot>,
}

enum Slot {
    /// Of a variable; `None`: the output does not depend on it.
    Gradient(Option<Tensor>),
    Taken,
    /// Of a result of an operation, which is not kept.
    Intermediate,
}

impl Gradients {
    /// Moves out the gradient of a variable: zero where the output does not depend on it.
    ///
    /// # Errors
    /// If `x` is a constant, the result of an operation, or of another tape; and the second time.
    pub fn take(&mut self, x: &Var<'_>) -> Result<Tensor> {
        let wrong = |what: &str| Err(Error::Tape(format!("asked for the gradient of {what}")));
        let Some(node) = x.node else { return wrong("a constant") };
        if x.tape.id != self.tape {
            return wrong("a variable of another tape");
        }
        match self.of.get_mut(node) {
            Some(slot @ Slot::Gradient(_)) => match std::mem::replace(slot, Slot::Taken) {
                Slot::Gradient(Some(gradient)) => Ok(gradient),
                _ => Tensor::zeros(x.shape(), x.value.dtype(), &x.value.device()),
            },
            Some(Slot::Taken) => wrong("a variable a second time: it was moved out"),
            Some(Slot::Intermediate) | None => wrong("the result of an operation: only those of variables are kept"),
        }
    }
}

impl<'t> Var<'t> {
    /// The tape this value is on.
    pub fn tape(&self) -> &'t Tape {
        self.tape
    }
    /// The numbers.
    pub fn value(&self) -> &Tensor {
        &self.value
    }
    /// The numbers, given up by the tape's user.
    pub fn into_value(self) -> Tensor {
        self.value
    }
    /// The extent of every axis.
    pub fn shape(&self) -> &[usize] {
        self.value.shape()
    }
    /// True when gradients flow to this value.
    pub fn requires_grad(&self) -> bool {
        self.node.is_some()
    }
    /// The same value as a node of its own, at which gradients add before they flow on; free.
    ///
    /// # Errors
    /// Those of [`Tape::record`].
    pub fn fork(self) -> Result<Self> {
        let shape = self.shape().to_vec();
        self.reshape(shape)
    }
    /// The same values under another shape; free.
    ///
    /// # Errors
    /// Those of [`Tape::record`]; a shape of another number of values.
    pub fn reshape(self, shape: impl Into<Vec<usize>>) -> Result<Self> {
        let shape = shape.into();
        let from = self.shape().to_vec();
        self.tape.record(Reshape { from, to: shape }, vec![self])
    }
}

struct Reshape {
    from: Vec<usize>,
    to: Vec<usize>,
}

impl Op for Reshape {
    fn name(&self) -> &'static str {
        "reshape"
    }
    fn takes(&self) -> Takes {
        Takes::Anything
    }
    fn cpu(&self, inputs: Inputs, _: &mut Saved) -> Result<Tensor> {
        let [x] = inputs.take()?;
        x.reshape(self.to.clone())
    }
    fn backward(&self, _: Saved, dy: Tensor, _: &[bool]) -> Result<Grads> {
        Ok(vec![Some(dy.reshape(self.from.clone())?)])
    }
}
