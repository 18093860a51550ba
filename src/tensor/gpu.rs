//! Tensors on a GPU: their memory as launchers see it, casts and linear combinations.

use super::coded::unread;
use super::{Storage, Tensor};
use crate::device::cuda::{CudaDevice, Queue};
use crate::device::ffi;
use crate::device::launch::{Check, Kind, View, Work};
use crate::dtype::DType;
use crate::{Error, Result};

impl Tensor {
    /// Uninitialised values: whoever asks for them writes all before anything reads them.
    ///
    /// # Errors
    /// More values than can be counted, or than fit into what is free.
    pub(crate) fn on(device: &CudaDevice, shape: &[usize], dtype: DType) -> Result<Self> {
        let what = format!("a {dtype} tensor of shape {shape:?}");
        let len = shape.iter().try_fold(1usize, |len, &n| len.checked_mul(n));
        let len = len.ok_or_else(|| Error::argument(&what, "is more values than can be counted"))?;
        Self::from_cuda(device.buffer(len, dtype.into(), &what)?, shape)
    }

    /// The values as a launcher sees them.
    ///
    /// # Errors
    /// A tensor on the CPU.
    pub(crate) fn view(&self) -> Result<View<'_>> {
        match &*self.storage {
            Storage::Cuda(buffer) => buffer.view().part(self.start, self.len()),
            Storage::Cpu(_) | Storage::Nowhere(_) => {
                Err(Error::device("cuda kernel", "expected a tensor on the GPU, got one on the CPU"))
            }
            Storage::Coded(_) => Err(unread("cuda kernel")),
        }
    }

    /// The same values where launchers can read them: a slice that starts between their boundaries is copied.
    ///
    /// # Errors
    /// A tensor on the CPU.
    pub(crate) fn aligned(self) -> Result<Self> {
        if self.view()?.is_aligned() {
            return Ok(self);
        }
        let Storage::Cuda(buffer) = &*self.storage else { return Ok(self) };
        let y = Self::on(buffer.device(), &self.shape, self.dtype())?;
        buffer.device().copy(y.view()?, self.view()?)?;
        Ok(y)
    }

    /// Where to write a result of this shape and type: here when nobody else holds this memory.
    ///
    /// # Errors
    /// As [`Tensor::on`].
    pub(crate) fn or_new(&mut self, device: &CudaDevice) -> Result<Self> {
        if self.is_unique() { Ok(self.clone()) } else { Self::on(device, &self.shape, self.dtype()) }
    }

    /// The same values in memory that nobody else holds, aligned.
    ///
    /// # Errors
    /// A tensor on the CPU.
    pub(crate) fn alone(self, device: &CudaDevice) -> Result<Self> {
        let mut x = self.aligned()?;
        if x.is_unique() { Ok(x) } else { axpby(device, 1.0, x, 0.0, None) }
    }
}

/// Tensors of one type behind one another.
pub(super) fn stack(device: &CudaDevice, parts: &[Tensor], shape: Vec<usize>) -> Result<Tensor> {
    let y = Tensor::on(device, &shape, parts[0].dtype())?;
    let mut start = 0;
    for part in parts {
        if part.dtype() != y.dtype() {
            return Err(Error::dtype("stack", y.dtype(), part.dtype()));
        }
        device.copy(y.view()?.part(start, part.len())?, part.view()?)?;
        start += part.len();
    }
    Ok(y)
}

/// Another floating-point type.
pub(super) fn cast(device: &CudaDevice, x: &Tensor, dtype: DType) -> Result<Tensor> {
    let x = x.clone().aligned()?;
    let y = Tensor::on(device, x.shape(), dtype)?;
    launch_cast(device.queue(), y.view()?, x.view()?)?;
    Ok(y)
}

/// `y = x`, of any floating-point kind, rounded once.
pub(crate) fn launch_cast(queue: Queue<'_>, y: View<'_>, x: View<'_>) -> Result<()> {
    let c = Check::new("cast", queue);
    let code = |kind| if kind == Kind::F64 { Ok(crate::device::cuda::ffi::SQ_F64) } else { c.code(kind) };
    let (to, from, n) = (code(y.kind())?, code(x.kind())?, x.len());
    let (count, work) = (c.long(n)?, Work::moving("cast", x.bytes() + y.bytes()));
    let (y, x) = (c.operand("y", y, y.kind(), n)?, c.operand("x", x, x.kind(), n)?);
    // SAFETY: both are n values of the kinds named.
    c.launch(work, |s| unsafe { ffi!(sq_cast(y, to, x, from, count, s)) })
}

/// `alpha a + beta b`, in place of `a` (or `b`) when unshared.
pub(super) fn axpby(device: &CudaDevice, alpha: f64, a: Tensor, beta: f64, b: Option<Tensor>) -> Result<Tensor> {
    let mut a = a.aligned()?;
    let mut b = b.map(Tensor::aligned).transpose()?;
    let y = match &mut b {
        Some(b) if !a.is_unique() => b.or_new(device)?,
        _ => a.or_new(device)?,
    };
    let other = b.as_ref().map(Tensor::view).transpose()?;
    launch_axpby(device.queue(), y.view()?, alpha as f32, a.view()?, beta as f32, other)?;
    Ok(y)
}

/// `y = alpha a + beta b` of one kind, 0 for no b; y may be a or b.
pub(crate) fn launch_axpby(queue: Queue<'_>, y: View<'_>, alpha: f32, a: View<'_>, beta: f32, b: Option<View<'_>>) -> Result<()> {
    let c = Check::new("add", queue);
    let (n, kind) = (a.len(), a.kind());
    let work = Work::moving("add", (2 + usize::from(b.is_some())) * a.bytes());
    let (count, dtype) = (c.long(n)?, c.code(kind)?);
    let (y, a, b) = (c.operand("y", y, kind, n)?, c.operand("a", a, kind, n)?, c.optional("b", b, kind, n)?);
    // SAFETY: all are n values of one kind, or null for no b; in place is allowed.
    c.launch(work, |s| unsafe { ffi!(sq_axpby(y, alpha, a, beta, b, count, dtype, s)) })
}
