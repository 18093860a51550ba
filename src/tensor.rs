//! Contiguous, row-major tensors with a run-time element type and device.
//!
//! There are no strides: a reshape is free, a slice of the first axis is free, a transpose is a flag of [`matmul`](crate::ops::matmul).
//! Cloning bumps a reference count; an operation that consumes the last reference may reuse the memory in place.

mod coded;
mod gpu;
mod host;

use std::fmt;
use std::sync::Arc;

use half::{bf16, f16};

use crate::device::cpu::CpuBuffer;
use crate::device::cuda::CudaBuffer;
use crate::device::{Device, cpu};
use crate::dtype::{DType, Element};
use crate::{Error, Result};
pub(crate) use coded::Coded;

#[derive(Debug)]
pub(crate) enum Storage {
    Cpu(CpuBuffer),
    Cuda(CudaBuffer),
    /// Values that only their codes are kept of.
    Coded(Box<dyn Coded>),
    /// No values: a shape and a type that stand for some that are read when they are needed.
    Nowhere(DType),
}

/// A contiguous, row-major array on one device.
///
/// ```
/// use spinquant::{DType, Tensor};
/// let x = Tensor::from_vec(vec![1f32, 2.0, 3.0, 4.0, 5.0, 6.0], [2, 3])?;
/// assert_eq!(x.shape(), [2, 3]);
/// assert_eq!(x.slice(1, 1)?.reshape([3])?.to_vec::<f32>()?, [4.0, 5.0, 6.0]);
/// assert_eq!(x.to_dtype(DType::F64)?.dtype(), DType::F64);
/// # Ok::<(), spinquant::Error>(())
/// ```
#[derive(Clone)]
pub struct Tensor {
    storage: Arc<Storage>,
    start: usize,
    shape: Vec<usize>,
}

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tensor({:?}, {}, {:?})", self.shape, self.dtype(), self.device())
    }
}

/// The number of values of a tensor of `shape`.
///
/// # Errors
/// A shape whose extents other than 0 multiply to more values of 8 bytes than memory has addresses. So products of any of a tensor's
/// extents never overflow, those of an empty tensor included.
pub(crate) fn count(what: &str, shape: &[usize]) -> Result<usize> {
    let most = isize::MAX as usize / size_of::<f64>();
    let values = shape.iter().try_fold(1usize, |n, &extent| n.checked_mul(extent.max(1)).filter(|&n| n <= most));
    let values = values.ok_or_else(|| Error::shape(what, format!("of at most {most} values"), shape))?;
    Ok(if shape.contains(&0) { 0 } else { values })
}

/// [`count`], where main memory has room for that many values of `dtype`. (An allocation that fails would end the process.)
///
/// # Errors
/// A shape that is too large: how many bytes it takes.
pub(crate) fn room(what: &str, shape: &[usize], dtype: DType) -> Result<usize> {
    /// Smaller allocations are not tried out first.
    const LARGE: usize = 1 << 28;
    let n = count(what, shape)?;
    let bytes = n * dtype.size();
    if bytes >= LARGE && Vec::<u8>::new().try_reserve_exact(bytes).is_err() {
        return Err(Error::shape(what, format!("that fits in memory ({bytes} bytes of {dtype} do not)"), shape));
    }
    Ok(n)
}

/// Values are asked for that are not in any memory.
fn nowhere(what: &'static str, t: &Tensor) -> Error {
    Error::argument(what, format!("expected values, got a shape {:?} whose values are read when they are needed", t.shape()))
}

impl Tensor {
    /// Takes a CPU vector of `shape.product()` values.
    ///
    /// # Errors
    /// Another number of values than the shape asks for.
    pub fn from_vec<T: Element>(values: Vec<T>, shape: impl Into<Vec<usize>>) -> Result<Self> {
        let shape = shape.into();
        if count("Tensor::from_vec", &shape)? != values.len() {
            return Err(Error::shape("Tensor::from_vec", format!("of {} values", values.len()), &shape));
        }
        Ok(Self { storage: Arc::new(Storage::Cpu(CpuBuffer::wrap(values))), start: 0, shape })
    }

    /// A 0-dimensional CPU tensor.
    pub fn scalar<T: Element>(value: T) -> Self {
        Self { storage: Arc::new(Storage::Cpu(CpuBuffer::wrap(vec![value]))), start: 0, shape: vec![] }
    }

    /// All zeros.
    ///
    /// # Errors
    /// A shape that memory has no room for.
    pub fn zeros(shape: impl Into<Vec<usize>>, dtype: DType, device: &Device) -> Result<Self> {
        let shape = shape.into();
        match device {
            Device::Cpu => {
                let n = room("Tensor::zeros", &shape, dtype)?;
                Ok(Self {
                    storage: Arc::new(Storage::Cpu(match dtype {
                        DType::F64 => CpuBuffer::F64(vec![0.0; n]),
                        DType::F32 => CpuBuffer::F32(vec![0.0; n]),
                        DType::F16 => CpuBuffer::F16(bytemuck::zeroed_vec(n)),
                        DType::BF16 => CpuBuffer::BF16(bytemuck::zeroed_vec(n)),
                        DType::U32 => CpuBuffer::U32(vec![0; n]),
                    })),
                    start: 0,
                    shape,
                })
            }
            Device::Cuda(device) => Self::from_cuda(device.zeros(count("Tensor::zeros", &shape)?, dtype.into())?, shape),
        }
    }

    /// The n×n identity.
    ///
    /// # Errors
    /// A size that memory has no room for, or an integer type.
    pub fn eye(n: usize, dtype: DType) -> Result<Self> {
        let mut v = vec![0f64; room("Tensor::eye", &[n, n], DType::F64)?];
        v.iter_mut().step_by(n + 1).for_each(|x| *x = 1.0);
        Self::from_vec(v, [n, n])?.to_dtype(dtype)
    }

    /// The extent of every axis.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Number of values.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// True when there are no values.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Extent of the last axis (1 for a scalar): the row length of row-wise operations.
    pub fn cols(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    /// Number of rows: the product of all axes but the last.
    pub fn rows(&self) -> usize {
        self.shape.split_last().map_or(1, |(_, rest)| rest.iter().product())
    }

    /// Bytes the values take.
    pub fn bytes(&self) -> usize {
        self.len() * self.dtype().size()
    }

    /// The element type.
    pub fn dtype(&self) -> DType {
        match &*self.storage {
            Storage::Cpu(b) => b.dtype(),
            Storage::Cuda(b) => b.dtype(),
            Storage::Coded(c) => c.dtype(),
            Storage::Nowhere(dtype) => *dtype,
        }
    }

    /// Where the values are.
    pub fn device(&self) -> Device {
        match &*self.storage {
            Storage::Cpu(_) | Storage::Nowhere(_) => Device::Cpu,
            Storage::Cuda(b) => Device::Cuda(b.device().clone()),
            Storage::Coded(c) => c.device(),
        }
    }

    /// The same values under another shape of equal size; free.
    ///
    /// # Errors
    /// A shape of another number of values.
    pub fn reshape(mut self, shape: impl Into<Vec<usize>>) -> Result<Self> {
        let shape = shape.into();
        if count("reshape", &shape)? != self.len() {
            return Err(Error::shape("reshape", format!("of {} values (from {:?})", self.len(), self.shape), &shape));
        }
        self.shape = shape;
        Ok(self)
    }

    /// `count` entries of the first axis from `first` on; free, shares memory.
    ///
    /// # Errors
    /// A tensor without axes, or entries beyond the first one's extent.
    pub fn slice(&self, first: usize, count: usize) -> Result<Self> {
        let Some((&extent, rest)) = self.shape.split_first() else {
            return Err(Error::shape("slice", "with at least one axis", &self.shape));
        };
        if first.checked_add(count).is_none_or(|end| end > extent) {
            return Err(Error::argument("slice", format!("{count} entries from {first} on, of a first axis of {extent}")));
        }
        let inner: usize = rest.iter().product();
        let mut shape = self.shape.clone();
        shape[0] = count;
        Ok(Self { storage: self.storage.clone(), start: self.start + first * inner, shape })
    }

    /// Entry `index` of the first axis, that axis dropped; free.
    ///
    /// # Errors
    /// A tensor without axes, or an index beyond the first one's extent.
    pub fn index(&self, index: usize) -> Result<Self> {
        let shape = self.shape.get(1..).unwrap_or_default().to_vec();
        self.slice(index, 1)?.reshape(shape)
    }

    /// Tensors of one shape, type and device behind one another along a new first axis.
    ///
    /// # Errors
    /// No tensors, or tensors that differ in shape, type or device.
    pub fn stack(parts: &[Self]) -> Result<Self> {
        let Some(first) = parts.first() else {
            return Err(Error::argument("stack", "expected at least one tensor, got none"));
        };
        if let Some(odd) = parts.iter().find(|p| p.shape() != first.shape()) {
            return Err(Error::shape("stack", format!("{:?}", first.shape()), odd.shape()));
        }
        let shape = [&[parts.len()], first.shape()].concat();
        count("stack", &shape)?;
        if parts.iter().any(Self::is_coded) {
            return Err(coded::unread("stack"));
        }
        if let Device::Cuda(device) = first.device() {
            return gpu::stack(&device, parts, shape);
        }
        Self::join(parts, shape)
    }

    /// Tensors of one type and device, whose shapes differ in the first axis only, behind one another along it.
    ///
    /// # Errors
    /// No tensors, or tensors that differ in another axis, in type or in device.
    pub fn concat(parts: &[Self]) -> Result<Self> {
        let first = parts.first().ok_or_else(|| Error::argument("concat", "expected at least one tensor, got none"))?;
        let inner = first.shape.get(1..).unwrap_or_default();
        if let Some(odd) = parts.iter().find(|p| p.shape.is_empty() || p.shape[1..] != *inner) {
            return Err(Error::shape("concat", format!("[.., {inner:?}]"), odd.shape()));
        }
        if parts.len() == 1 {
            return Ok(first.clone());
        }
        let entries = parts.iter().try_fold(0usize, |sum, p| sum.checked_add(p.shape[0]));
        let shape = [&[entries.unwrap_or(usize::MAX)], inner].concat();
        count("concat", &shape)?;
        if parts.iter().any(Self::is_coded) {
            return Err(coded::unread("stack"));
        }
        if let Device::Cuda(device) = first.device() {
            return gpu::stack(&device, parts, shape);
        }
        Self::join(parts, shape)
    }

    /// The values of CPU tensors behind one another.
    fn join(parts: &[Self], shape: Vec<usize>) -> Result<Self> {
        fn go<T: Element>(parts: &[Tensor], shape: Vec<usize>) -> Result<Tensor> {
            let parts = parts.iter().map(|p| p.as_slice::<T>()).collect::<Result<Vec<_>>>()?;
            Tensor::from_vec(parts.concat(), shape)
        }
        match parts[0].dtype() {
            DType::F64 => go::<f64>(parts, shape),
            DType::F32 => go::<f32>(parts, shape),
            DType::F16 => go::<f16>(parts, shape),
            DType::BF16 => go::<bf16>(parts, shape),
            DType::U32 => go::<u32>(parts, shape),
        }
    }

    /// Borrows the values of a CPU tensor of element type `T`.
    ///
    /// # Errors
    /// [`Error::DType`] for another type, [`Error::Device`] for a tensor on a GPU.
    pub fn as_slice<T: Element>(&self) -> Result<&[T]> {
        match &*self.storage {
            Storage::Cpu(b) => b
                .view::<T>()
                .map(|v| &v[self.start..self.start + self.len()])
                .ok_or_else(|| Error::dtype("as_slice", T::DTYPE, self.dtype())),
            Storage::Cuda(_) => Err(Error::device("as_slice", "expected a CPU tensor, got one on a GPU (use to_device)")),
            Storage::Coded(_) => Err(coded::unread("as_slice")),
            Storage::Nowhere(_) => Err(nowhere("as_slice", self)),
        }
    }

    /// Copies the values to a vector, from any device.
    ///
    /// # Errors
    /// [`Error::DType`] for another type; a failing copy from a GPU.
    pub fn to_vec<T: Element>(&self) -> Result<Vec<T>> {
        if self.is_coded() {
            return self.decoded()?.to_vec();
        }
        match self.device() {
            Device::Cpu => Ok(self.as_slice::<T>()?.to_vec()),
            Device::Cuda(_) => self.to_device(&Device::Cpu)?.into_vec(),
        }
    }

    /// Moves the values out, without a copy where this is the only reference.
    ///
    /// # Errors
    /// [`Error::DType`] for another type; a failing copy from a GPU.
    pub fn into_vec<T: Element>(mut self) -> Result<Vec<T>> {
        let n = self.len();
        if self.start == 0
            && let Some(Storage::Cpu(b)) = Arc::get_mut(&mut self.storage)
            && let Some(v) = b.view_mut::<T>()
            && v.len() == n
        {
            return Ok(std::mem::take(v));
        }
        self.to_vec()
    }

    /// Widens every value to `f64`, from any type and device.
    ///
    /// # Errors
    /// A failing copy from a GPU.
    pub fn to_f64_vec(&self) -> Result<Vec<f64>> {
        self.to_dtype(DType::F64)?.into_vec()
    }

    /// The only value, widened.
    ///
    /// # Errors
    /// [`Error::Shape`] where there is another number of values than one; a failing copy from a GPU.
    pub fn item(&self) -> Result<f64> {
        if self.len() != 1 {
            return Err(Error::shape("item", "of one value", &self.shape));
        }
        Ok(self.to_f64_vec()?[0])
    }

    /// The values in another element type (exact when widening, to nearest-even when narrowing); free when it is the same.
    ///
    /// # Errors
    /// [`Error::DType`] where either type is not floating-point; on a GPU a failed launch or no memory.
    pub fn to_dtype(&self, dtype: DType) -> Result<Self> {
        if dtype == self.dtype() {
            return Ok(self.clone());
        }
        if !dtype.is_float() || !self.dtype().is_float() {
            return Err(Error::dtype("to_dtype", "a floating-point type", if dtype.is_float() { self.dtype() } else { dtype }));
        }
        match &*self.storage {
            Storage::Cpu(b) => {
                let values = self.start..self.start + self.len();
                Self::from_buffer(
                    match dtype {
                        DType::F64 => cpu::cast::<f64>(b, values)?,
                        DType::F32 => cpu::cast::<f32>(b, values)?,
                        DType::F16 => cpu::cast::<f16>(b, values)?,
                        DType::BF16 => cpu::cast::<bf16>(b, values)?,
                        DType::U32 => unreachable!("checked above"),
                    },
                    &self.shape,
                )
            }
            Storage::Cuda(b) => gpu::cast(b.device(), self, dtype),
            Storage::Coded(_) => self.decoded()?.to_dtype(dtype),
            Storage::Nowhere(_) => Err(nowhere("to_dtype", self)),
        }
    }

    /// `alpha a + beta b` of one shape and type, in place of whichever is unshared.
    ///
    /// # Errors
    /// Operands of different shapes or types, or integers.
    pub fn axpby(alpha: f64, a: Self, beta: f64, b: Self) -> Result<Self> {
        if a.shape() != b.shape() {
            return Err(Error::shape("axpby", format!("{:?}", a.shape()), b.shape()));
        }
        if a.dtype() != b.dtype() {
            return Err(Error::dtype("axpby", a.dtype(), b.dtype()));
        }
        let (a, b) = (a.decoded()?, b.decoded()?);
        let shape = a.shape().to_vec();
        match (a.device(), a.dtype()) {
            (Device::Cpu, DType::F64) => {
                let mut y = a.into_owned::<f64>()?;
                cpu::zip_in_place(&mut y, b.as_slice()?, |a, b| alpha * a + beta * b);
                Self::from_vec(y, shape)
            }
            (Device::Cpu, DType::F32) => {
                let (alpha, beta) = (alpha as f32, beta as f32);
                let mut y = a.into_owned::<f32>()?;
                cpu::zip_in_place(&mut y, b.as_slice()?, |a, b| alpha * a + beta * b);
                Self::from_vec(y, shape)
            }
            (Device::Cpu, dtype @ (DType::F16 | DType::BF16)) => {
                Self::axpby(alpha, a.to_dtype(DType::F32)?, beta, b.to_dtype(DType::F32)?)?.to_dtype(dtype)
            }
            (Device::Cuda(device), _) => gpu::axpby(&device, alpha, a, beta, Some(b)),
            (Device::Cpu, DType::U32) => Err(Error::dtype("axpby", "f64, f32, f16 or bf16", DType::U32)),
        }
    }

    /// `factor self`, in place when unshared.
    ///
    /// # Errors
    /// Integers.
    pub fn scale(self, factor: f64) -> Result<Self> {
        if let Device::Cuda(device) = self.device() {
            return gpu::axpby(&device, factor, self.decoded()?, 0.0, None);
        }
        Self::axpby(factor, self.clone(), 0.0, self)
    }

    /// The values on another device; free when they are there.
    ///
    /// # Errors
    /// A failing copy, or no memory on the device.
    pub fn to_device(&self, device: &Device) -> Result<Self> {
        match (&*self.storage, device) {
            (Storage::Coded(c), device) if c.device() == *device => Ok(self.clone()),
            (Storage::Coded(_), device) => self.decoded()?.to_device(device),
            (Storage::Cpu(_), Device::Cpu) => Ok(self.clone()),
            (Storage::Nowhere(_), _) => Err(nowhere("to_device", self)),
            (Storage::Cpu(_), Device::Cuda(device)) => {
                Self::from_cuda(device.upload(self.as_bytes()?, self.dtype().into())?, self.shape.clone())
            }
            (Storage::Cuda(b), Device::Cpu) => {
                macro_rules! download {
                    ($t:ty) => {{
                        let mut v = vec![<$t>::default(); self.len()];
                        b.download(self.start, bytemuck::cast_slice_mut(&mut v))?;
                        Self::from_vec(v, self.shape.clone())
                    }};
                }
                match b.dtype() {
                    DType::F64 => download!(f64),
                    DType::F32 => download!(f32),
                    DType::F16 => download!(f16),
                    DType::BF16 => download!(bf16),
                    DType::U32 => download!(u32),
                }
            }
            (Storage::Cuda(b), Device::Cuda(device)) => {
                if b.device() == device {
                    Ok(self.clone())
                } else {
                    self.to_device(&Device::Cpu)?.to_device(&Device::Cuda(device.clone()))
                }
            }
        }
    }

    /// The values as a vector this call may overwrite: moved out when unshared, copied otherwise.
    pub(crate) fn into_owned<T: Element>(mut self) -> Result<Vec<T>> {
        let n = self.len();
        if T::DTYPE == DType::F32 && !(self.start == 0 && Arc::get_mut(&mut self.storage).is_some()) {
            // A copy into pooled memory, for fresh pages cost more than the copy.
            let mut buffer = CpuBuffer::F32(cpu::alloc(n));
            if let Some(v) = buffer.view_mut::<T>() {
                cpu::copy(v, self.as_slice()?);
                return Ok(std::mem::take(v));
            }
        }
        self.into_vec()
    }

    /// Overwrites entries `first..` of the first axis by those of `rows`, in place.
    ///
    /// # Errors
    /// Entries that do not fit, in number, shape, type or device; memory that somebody else holds too.
    pub(crate) fn put(&mut self, first: usize, rows: &Self) -> Result<()> {
        fn go<T: Element>(to: &mut CpuBuffer, start: usize, rows: &Tensor) -> Result<()> {
            let to = to.view_mut::<T>().ok_or_else(|| Error::argument("put", "expected values of one type"))?;
            to[start..][..rows.len()].copy_from_slice(rows.as_slice()?);
            Ok(())
        }
        let place = self.slice(first, rows.shape.first().copied().unwrap_or(0))?;
        if place.shape != rows.shape {
            return Err(Error::shape("put", format!("{:?}", place.shape), &rows.shape));
        }
        if self.dtype() != rows.dtype() {
            return Err(Error::dtype("put", self.dtype(), rows.dtype()));
        }
        let start = place.start;
        drop(place);
        if let Device::Cuda(device) = self.device() {
            if Arc::get_mut(&mut self.storage).is_none() {
                return Err(Error::argument("put", "expected memory that nobody else holds"));
            }
            return device.copy(self.view()?.part(start - self.start, rows.len())?, rows.view()?);
        }
        let dtype = self.dtype();
        let Some(Storage::Cpu(to)) = Arc::get_mut(&mut self.storage) else {
            return Err(Error::argument("put", "expected memory that nobody else holds"));
        };
        match dtype {
            DType::F64 => go::<f64>(to, start, rows),
            DType::F32 => go::<f32>(to, start, rows),
            DType::F16 => go::<f16>(to, start, rows),
            DType::BF16 => go::<bf16>(to, start, rows),
            DType::U32 => go::<u32>(to, start, rows),
        }
    }

    pub(crate) fn from_buffer(buffer: CpuBuffer, shape: &[usize]) -> Result<Self> {
        Ok(Self { storage: Arc::new(Storage::Cpu(buffer)), start: 0, shape: shape.to_vec() })
    }

    /// A shape without values, for what is read when it is needed. Whoever asks for its values gets an error.
    pub(crate) fn nowhere(shape: &[usize], dtype: DType) -> Self {
        Self { storage: Arc::new(Storage::Nowhere(dtype)), start: 0, shape: shape.to_vec() }
    }

    pub(crate) fn from_cuda(buffer: CudaBuffer, shape: impl Into<Vec<usize>>) -> Result<Self> {
        Ok(Self { storage: Arc::new(Storage::Cuda(buffer)), start: 0, shape: shape.into() })
    }

    /// True when nobody else holds this memory and it is whole, so that an operation may write into it.
    pub(crate) fn is_unique(&mut self) -> bool {
        let n = self.len();
        self.start == 0
            && Arc::get_mut(&mut self.storage).is_some_and(|s| match s {
                Storage::Cuda(b) => b.len() == n,
                Storage::Cpu(_) => true,
                Storage::Coded(_) => false,
                Storage::Nowhere(_) => false,
            })
    }
}
