//! What an operation is.

use crate::device::cuda::CudaDevice;
use crate::{DType, Device, Error, Result, Tensor};

/// The operands of an operation, owned: an operation may reuse their memory.
pub struct Inputs(pub(super) Vec<Tensor>);

impl Inputs {
    /// Exactly `N` operands, or an error.
    ///
    /// # Errors
    /// [`Error::Tape`] for another number of operands.
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

/// Exactly `N` operands, or an error: for [`Op::check`].
///
/// # Errors
/// Another number of operands.
pub fn operands<const N: usize>(inputs: &[Tensor]) -> Result<&[Tensor; N]> {
    inputs.try_into().map_err(|_| Error::Tape(format!("expected {N} operands, got {}", inputs.len())))
}

/// What an operation keeps for its backward pass, and which gradients will be asked for.
#[derive(Clone, Default)]
pub struct Saved {
    tensors: Vec<Tensor>,
    want: Vec<bool>,
    /// The types of the operands, where they were widened to `f32` for the operation.
    narrow: Option<Vec<DType>>,
}

impl Saved {
    /// An empty store whose backward pass will want these gradients; for calling an [`Op`] without a tape.
    pub fn new(want: Vec<bool>) -> Self {
        Self { tensors: vec![], want, narrow: None }
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
    ///
    /// # Errors
    /// [`Error::Tape`] where another number was kept.
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

/// What the CPU side of an operation is given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Takes {
    /// `f64` and `f32`, on the CPU. 16-bit operands are widened to `f32` before, and what comes out is rounded once.
    Wide,
    /// Any type, on the CPU: the operation moves values, or knows better what to do with narrow ones.
    AnyType,
    /// Any type on any device: the operation is made of others and has no GPU side of its own.
    Anything,
}

/// A differentiable operation. Implement it to add one, inside or outside this crate, and run it with
/// [`Tape::record`](crate::Tape::record).
///
/// The tape picks the side by where the operands are, and widens 16-bit types for the CPU ([`Takes`]); operands of one operation are on
/// one device.
pub trait Op {
    /// For messages.
    fn name(&self) -> &'static str;
    /// What [`Op::cpu`] and [`Op::backward`] are given.
    fn takes(&self) -> Takes {
        Takes::Wide
    }
    /// Looks at the operands as they come, before either side runs: shapes, types, values of arguments.
    ///
    /// # Errors
    /// What does not fit.
    fn check(&self, inputs: &[Tensor]) -> Result<()> {
        let _ = inputs;
        Ok(())
    }
    /// Computes the result; keeps in `save` what [`Op::backward`] needs, and only when [`Saved::wants`] says so.
    ///
    /// # Errors
    /// What [`Op::check`] could not know.
    fn cpu(&self, inputs: Inputs, save: &mut Saved) -> Result<Tensor>;
    /// The same on a GPU, of any type that its kernel knows.
    ///
    /// # Errors
    /// That there is no such side; types and sizes that the kernel does not know; a failed launch.
    fn gpu(&self, device: &CudaDevice, inputs: Inputs, save: &mut Saved) -> Result<Tensor> {
        let _ = (inputs, save);
        Err(Error::device(self.name(), format!("has no GPU side, and its operands are on cuda:{}", device.ordinal())))
    }
    /// The gradients of the operands flagged in `want`, given that of the result.
    ///
    /// # Errors
    /// What was kept does not fit.
    fn backward(&self, saved: Saved, dy: Tensor, want: &[bool]) -> Result<Grads>;
    /// The same on a GPU; [`Op::backward`] unless that computes on the CPU.
    ///
    /// # Errors
    /// As [`Op::gpu`].
    fn gpu_backward(&self, device: &CudaDevice, saved: Saved, dy: Tensor, want: &[bool]) -> Result<Grads> {
        let _ = device;
        self.backward(saved, dy, want)
    }
    /// The type of the result of operands whose narrowest type is `narrowest`, where they were widened. A loss keeps its `f32`.
    fn rounds_to(&self, narrowest: DType) -> DType {
        narrowest
    }
    /// Keeps what [`Op::backward`] needs without computing the result; `None` where that is not possible. For the last operation of
    /// a function that is run again only for its gradients ([`Tape::record_last`](crate::Tape::record_last)).
    ///
    /// # Errors
    /// As [`Op::cpu`].
    fn save_only(&self, inputs: &[Tensor], save: &mut Saved) -> Option<Result<()>> {
        let _ = (inputs, save);
        None
    }
    /// For operations that round: the smooth function of the operands whose derivative [`Op::backward`] is *defined* to be (that of
    /// the identity, straight through). Gradient checks differentiate it plus a constant in place of the operation.
    ///
    /// # Errors
    /// As [`Op::cpu`].
    fn surrogate(&self, inputs: &[Tensor]) -> Option<Result<Tensor>> {
        let _ = inputs;
        None
    }
    /// The same for operations whose gradient depends on what was rounded and clamped: those decisions are taken at the operands `base`,
    /// where the gradient is checked, and `inputs` are near them. By default [`Op::surrogate`].
    ///
    /// # Errors
    /// As [`Op::cpu`].
    fn surrogate_near(&self, inputs: &[Tensor], base: &[Tensor]) -> Option<Result<Tensor>> {
        let _ = base;
        self.surrogate(inputs)
    }
}

/// Runs an operation without a tape, on the side its operands are on.
///
/// # Errors
/// Operands on different devices, of a type the operation does not know, and whatever `op` reports.
pub fn run(op: &dyn Op, inputs: impl Into<Inputs>, save: &mut Saved) -> Result<Tensor> {
    let inputs = inputs.into();
    op.check(&inputs.0)?;
    if op.takes() == Takes::Anything {
        return op.cpu(inputs, save);
    }
    let device = one_device(op.name(), &inputs.0)?;
    if let Some(x) = inputs.0.iter().find(|x| !x.dtype().is_float()) {
        return Err(Error::dtype(op.name(), "f64, f32, f16 or bf16", x.dtype()));
    }
    if let Device::Cuda(device) = device {
        return op.gpu(&device, inputs, save);
    }
    let Some(narrow) = inputs.0.iter().map(Tensor::dtype).find(|d| d.is_half()) else {
        return op.cpu(inputs, save);
    };
    if op.takes() == Takes::AnyType {
        return op.cpu(inputs, save);
    }
    save.narrow = Some(inputs.0.iter().map(Tensor::dtype).collect());
    let wide = inputs.0.into_iter().map(|x| x.to_dtype(DType::F32)).collect::<Result<Vec<_>>>()?;
    op.cpu(Inputs(wide), save)?.to_dtype(op.rounds_to(narrow))
}

/// The backward pass of [`run`], with what that kept.
///
/// # Errors
/// Whatever `op` reports.
pub(crate) fn run_backward(op: &dyn Op, mut saved: Saved, dy: Tensor, want: &[bool]) -> Result<Grads> {
    if let (Device::Cuda(device), false) = (dy.device(), op.takes() == Takes::Anything) {
        return op.gpu_backward(&device, saved, dy, want);
    }
    let Some(narrow) = saved.narrow.take() else { return op.backward(saved, dy, want) };
    let grads = op.backward(saved, dy.to_dtype(DType::F32)?, want)?;
    grads.into_iter().zip(narrow).map(|(g, dtype)| g.map(|g| g.to_dtype(dtype)).transpose()).collect()
}

/// The device of all operands; the CPU for none.
fn one_device(what: &str, inputs: &[Tensor]) -> Result<Device> {
    let device = inputs.first().map_or(Device::Cpu, Tensor::device);
    match inputs.iter().find(|x| x.device() != device) {
        Some(other) => Err(Error::device(what, format!("operands on {device} and {}", other.device()))),
        None => Ok(device),
    }
}
