//! The GPU: one context, one stream and one stream-ordered memory pool per device.

mod clock;
mod copies;
mod gemm;
mod graphs;
mod nccl;
mod profile;
mod solver;

/// The C launchers of `cuda/kernels.h`, generated from it.
#[allow(non_camel_case_types, non_upper_case_globals, missing_docs, clippy::all)]
pub mod ffi {
    include!(concat!(env!("OUT_DIR"), "/kernels.rs"));
}

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

use cudarc::driver::{CudaContext, CudaSlice, CudaStream, DevicePtr, DriverError, result, sys};

use super::Card;
use super::launch::{Kind, View, Work};
use crate::dtype::DType;
use crate::{Error, Result};

pub use clock::{Event, Graph};
pub(crate) use copies::{Copies, Pinned};
pub(crate) use graphs::called;
pub use graphs::in_graphs;
pub(crate) use nccl::Communicator;
pub use nccl::check_nccl;
pub use profile::Phase;

/// The oldest driver that runs a statically linked CUDA 13 runtime, as the driver numbers itself.
const MIN_DRIVER: i32 = 13000;

/// A GPU; clones share it.
#[derive(Clone)]
pub struct CudaDevice(Arc<Inner>);

struct Inner {
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    blas: gemm::Blas,
    /// cuBLAS and cuSOLVER, opened when first needed.
    solver: OnceLock<solver::Solver>,
    /// Held while NVIDIA's libraries enqueue: a product may be several kernels that share the workspace, and another thread's must not
    /// come between them.
    libraries: Mutex<()>,
    /// Tables that were uploaded once, by name and key.
    constants: Mutex<HashMap<(&'static str, usize), Constant>>,
    /// Launches under watch, see [`CudaDevice::start_profile`].
    profile: Mutex<Option<Vec<profile::Launch>>>,
}

impl PartialEq for CudaDevice {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

fn driver_error(what: &str) -> impl FnOnce(DriverError) -> Error + '_ {
    move |e| Error::Cuda(format!("{what}: {e:?}"))
}

/// How many GPUs there are; opens none.
///
/// # Errors
/// No driver, or one that is too old.
pub fn count() -> Result<usize> {
    // cudarc panics when it cannot load a library, so look first.
    // SAFETY: loads a shared library and looks at it.
    if !unsafe { sys::is_culib_present() } {
        return Err(Error::Cuda("no NVIDIA driver (libcuda) was found on this machine; use --device cpu".into()));
    }
    result::init().map_err(|e| Error::Cuda(format!("the NVIDIA driver does not start ({e:?}): is there a GPU?")))?;
    let mut version = 0;
    // SAFETY: writes one int.
    unsafe { sys::cuDriverGetVersion(&mut version) }.result().map_err(driver_error("driver version"))?;
    if version < MIN_DRIVER {
        return Err(Error::Cuda(format!(
            "the NVIDIA driver supports CUDA {}.{}, this build needs {}.{} (driver 580) or later",
            version / 1000,
            version % 1000 / 10,
            MIN_DRIVER / 1000,
            MIN_DRIVER % 1000 / 10
        )));
    }
    let count = CudaContext::device_count().map_err(driver_error("counting GPUs"))?;
    Ok(count as usize)
}

impl CudaDevice {
    /// Opens GPU number `ordinal`; later calls return the same device.
    ///
    /// # Errors
    /// No driver, one that is too old, or no such GPU.
    pub fn new(ordinal: usize) -> Result<Self> {
        static OPEN: OnceLock<Mutex<HashMap<usize, CudaDevice>>> = OnceLock::new();
        let mut open = OPEN.get_or_init(Mutex::default).lock().unwrap_or_else(|e| e.into_inner());
        if let Some(device) = open.get(&ordinal) {
            return Ok(device.clone());
        }
        let device = Self::open(ordinal)?;
        open.insert(ordinal, device.clone());
        Ok(device)
    }

    fn open(ordinal: usize) -> Result<Self> {
        let count = count()?;
        if ordinal >= count {
            return Err(Error::Cuda(format!("GPU {ordinal} was asked for, this machine has {count}")));
        }
        // SAFETY: as above.
        if !unsafe { cudarc::cublaslt::sys::is_culib_present() } {
            return Err(Error::Cuda("cuBLASLt (libcublasLt) was not found; install the CUDA runtime libraries".into()));
        }
        let context = CudaContext::new(ordinal).map_err(driver_error("opening the GPU"))?;
        // SAFETY: one stream does all the work but copies from the host, which are ordered by events of their own (`copies`).
        unsafe { context.disable_event_tracking() };
        let stream = context.new_stream().map_err(driver_error("creating a stream"))?;
        // SAFETY: the device is valid; the attribute is a 64-bit integer.
        unsafe {
            let pool = result::device::get_mem_pool(context.cu_device()).map_err(driver_error("memory pool"))?;
            let mut keep = u64::MAX;
            let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
            result::mem_pool::set_attribute(pool, attribute, (&raw mut keep).cast()).map_err(driver_error("memory pool"))?;
        }
        let blas = gemm::Blas::new(&stream)?;
        Ok(Self(Arc::new(Inner {
            context,
            stream,
            blas,
            solver: OnceLock::new(),
            libraries: Mutex::default(),
            constants: Mutex::default(),
            profile: Mutex::default(),
        })))
    }

    /// Which GPU.
    pub fn ordinal(&self) -> usize {
        self.0.context.ordinal()
    }

    /// The card's name.
    ///
    /// # Errors
    /// A failing call of the driver.
    pub fn name(&self) -> Result<String> {
        self.0.context.name().map_err(driver_error("device name"))
    }

    /// The stream all work runs on. Its context records no events, so that other streams do not wait for it: for slices of your own take
    /// a stream of another `CudaContext` of the same GPU, whose memory every launcher takes too.
    ///
    /// # Safety
    /// What is allocated on this stream, or written on it, is used on no other.
    pub unsafe fn stream(&self) -> &Arc<CudaStream> {
        &self.0.stream
    }

    /// Waits for all work on the device.
    ///
    /// # Errors
    /// A kernel that failed, which is reported here at the latest.
    pub fn synchronize(&self) -> Result<()> {
        self.bind()?;
        self.0.stream.synchronize().map_err(driver_error("a kernel failed"))
    }

    /// Bytes (free, total) on the card; the pool's unused reserve counts as free.
    ///
    /// # Errors
    /// A failing call of the driver.
    pub fn memory(&self) -> Result<(usize, usize)> {
        self.bind()?;
        let (free, total) = self.0.context.mem_get_info().map_err(driver_error("memory information"))?;
        let kept = self.pool(sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT)?
            - self.pool(sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT)?;
        Ok((free + kept as usize, total))
    }

    /// Free memory, product rate and bandwidth of the card, computed from what the driver reports. The product rate is two thirds of the
    /// tensor cores' peak, the bandwidth nine tenths of the memory's: large products and copies reach that on an H100.
    ///
    /// # Errors
    /// A failing call of the driver.
    pub fn card(&self) -> Result<Card> {
        use sys::CUdevice_attribute_enum as Attribute;
        let get = |attribute| self.0.context.attribute(attribute).map(f64::from).map_err(driver_error("device attribute"));
        let clock = 1e3 * get(Attribute::CU_DEVICE_ATTRIBUTE_CLOCK_RATE)?;
        let memory_clock = 1e3 * get(Attribute::CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE)?;
        let bus = get(Attribute::CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH)? / 8.0;
        let processors = get(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        let major = get(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = get(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        // Additions and multiplications of bf16 a clock and multiprocessor.
        let per_clock = match (major as i32, minor as i32) {
            (..=7, _) => 1024.0,
            (8, 0) => 2048.0,
            (8, 9) | (12.., _) => 1024.0,
            (8, _) => 512.0,
            _ => 4096.0,
        };
        Ok(Card {
            name: self.name()?,
            free: self.memory()?.0,
            products: 0.64 * processors * clock * per_clock,
            bandwidth: 0.9 * 2.0 * memory_clock * bus,
            uploads: super::UPLOADS,
            reads: super::READS,
        })
    }

    /// Whether kernels may use the products of warpgroups here: the code is for `sm_90a`, and so is the card.
    ///
    /// # Errors
    /// A failing call of the driver.
    pub(crate) fn warpgroups(&self) -> Result<bool> {
        self.bind()?;
        Ok(current_gpu()?.warpgroups != 0)
    }

    /// The most bytes of tensors that ever lived at once.
    ///
    /// # Errors
    /// A failing call of the driver.
    pub fn peak_bytes(&self) -> Result<u64> {
        self.pool(sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH)
    }

    /// Lets [`CudaDevice::peak_bytes`] begin anew with what lives now.
    ///
    /// # Errors
    /// A failing call of the driver.
    pub fn reset_peak(&self) -> Result<()> {
        let mut zero = 0u64;
        // SAFETY: the device is valid; the attribute is a 64-bit integer.
        unsafe {
            let pool = result::device::get_mem_pool(self.0.context.cu_device()).map_err(driver_error("memory pool"))?;
            let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH;
            result::mem_pool::set_attribute(pool, attribute, (&raw mut zero).cast()).map_err(driver_error("memory pool"))
        }
    }

    fn pool(&self, attribute: sys::CUmemPool_attribute) -> Result<u64> {
        let mut value = 0u64;
        // SAFETY: the device is valid; the attribute is a 64-bit integer.
        unsafe {
            let pool = result::device::get_mem_pool(self.0.context.cu_device()).map_err(driver_error("memory pool"))?;
            result::mem_pool::get_attribute(pool, attribute, (&raw mut value).cast()).map_err(driver_error("memory pool"))?;
        }
        Ok(value)
    }

    fn bind(&self) -> Result<()> {
        self.0.context.bind_to_thread().map_err(driver_error("binding the context"))
    }

    /// This device's stream, watched by its profile.
    pub(crate) fn queue(&self) -> Queue<'_> {
        Queue { stream: Stream::Ours(&self.0.stream), device: Some(self) }
    }

    /// Nobody else calls into NVIDIA's libraries while this is held.
    fn libraries(&self) -> MutexGuard<'_, ()> {
        self.0.libraries.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Uninitialised values; whoever asks for them writes all before anything reads them.
    ///
    /// # Errors
    /// More bytes than can be counted, or than are free.
    pub(crate) fn buffer(&self, len: usize, kind: Kind, what: &str) -> Result<CudaBuffer> {
        let bytes = len.checked_mul(kind.size()).ok_or_else(|| {
            Error::argument(what, format!("{len} values of {} bytes are more than can be addressed", kind.size()))
        })?;
        // SAFETY: every kernel and copy that is given this memory writes all of it before anything reads it.
        let data = unsafe { self.0.stream.alloc(bytes.max(1)) }.map_err(|e| match e.0 {
            sys::cudaError_enum::CUDA_ERROR_OUT_OF_MEMORY => {
                let (free, total) = self.memory().unwrap_or_default();
                Error::OutOfMemory { what: what.into(), needed: bytes, free, total }
            }
            _ => driver_error("allocation")(e),
        })?;
        Ok(CudaBuffer { data, len, kind, device: self.clone() })
    }

    /// Zeros.
    ///
    /// # Errors
    /// As [`CudaDevice::buffer`].
    pub(crate) fn zeros(&self, len: usize, kind: Kind) -> Result<CudaBuffer> {
        let mut buffer = self.buffer(len, kind, "a tensor of zeros")?;
        self.0.stream.memset_zeros(&mut buffer.data).map_err(driver_error("memset"))?;
        Ok(buffer)
    }

    /// Values from the host.
    ///
    /// # Errors
    /// As [`CudaDevice::buffer`].
    pub(crate) fn upload(&self, bytes: &[u8], kind: Kind) -> Result<CudaBuffer> {
        let mut buffer = self.buffer(bytes.len() / kind.size(), kind, "an upload")?;
        if !bytes.is_empty() {
            self.0.stream.memcpy_htod(bytes, &mut buffer.data).map_err(driver_error("copy to the GPU"))?;
        }
        Ok(buffer)
    }

    /// A table that is uploaded when it is first asked for, and kept.
    ///
    /// # Errors
    /// As [`CudaDevice::buffer`].
    pub(crate) fn constant(&self, name: &'static str, key: usize, bytes: &dyn Fn() -> Vec<u8>) -> Result<Constant> {
        let mut constants = self.0.constants.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(constant) = constants.get(&(name, key)) {
            return Ok(constant.clone());
        }
        let constant = Constant(Arc::new(self.upload(&bytes(), Kind::U8)?.data));
        constants.insert((name, key), constant.clone());
        Ok(constant)
    }

    /// `to ← from`, as many bytes, in stream order.
    ///
    /// # Errors
    /// Different sizes, or memory of another GPU.
    pub(crate) fn copy(&self, to: View<'_>, from: View<'_>) -> Result<()> {
        if to.bytes() != from.bytes() {
            return Err(Error::argument("copy", format!("{} bytes into {}", from.bytes(), to.bytes())));
        }
        self.owns("copy", &[to, from])?;
        self.bind()?;
        // SAFETY: both ranges are live, of one size and on this GPU, and the copy is in stream order with their release.
        unsafe { result::memcpy_dtod_async(to.address(), from.address(), from.bytes(), self.0.stream.cu_stream()) }
            .map_err(driver_error("copy"))
    }

    /// `to[:, a..a + count] ← from[:, b..b + count]` for row-major matrices of one kind with the same rows.
    ///
    /// # Errors
    /// Columns or rows that are not there, or memory of another GPU.
    pub(crate) fn copy_columns(
        &self,
        (to, to_cols, a): Columns<'_>,
        (from, from_cols, b): Columns<'_>,
        count: usize,
    ) -> Result<()> {
        let inside = |first: usize, cols: usize| cols > 0 && first.checked_add(count).is_some_and(|end| end <= cols);
        let rows = to.len() / to_cols.max(1);
        let fit = to.len() == rows * to_cols && from.len() == rows * from_cols && to.kind() == from.kind();
        if !fit || !inside(a, to_cols) || !inside(b, from_cols) {
            return Err(Error::argument(
                "copy of columns",
                format!("{count} columns from {b} of {from_cols} to {a} of {to_cols}"),
            ));
        }
        if rows == 0 || count == 0 {
            return Ok(());
        }
        self.owns("copy of columns", &[to, from])?;
        let size = to.kind().size();
        let copy = sys::CUDA_MEMCPY2D_st {
            srcMemoryType: sys::CUmemorytype::CU_MEMORYTYPE_DEVICE,
            srcDevice: from.address() + (b * size) as u64,
            srcPitch: size * from_cols,
            dstMemoryType: sys::CUmemorytype::CU_MEMORYTYPE_DEVICE,
            dstDevice: to.address() + (a * size) as u64,
            dstPitch: size * to_cols,
            WidthInBytes: size * count,
            Height: rows,
            srcXInBytes: 0,
            srcY: 0,
            srcHost: std::ptr::null::<c_void>(),
            srcArray: std::ptr::null_mut(),
            dstXInBytes: 0,
            dstY: 0,
            dstHost: std::ptr::null_mut(),
            dstArray: std::ptr::null_mut(),
        };
        self.bind()?;
        // SAFETY: both ranges are inside live matrices of this GPU, and the copy is in stream order with their release.
        unsafe { sys::cuMemcpy2DAsync_v2(&copy, self.0.stream.cu_stream()) }.result().map_err(driver_error("copy of columns"))
    }

    /// An error unless all of this memory is this GPU's.
    fn owns(&self, what: &str, views: &[View<'_>]) -> Result<()> {
        let context = self.queue().context();
        if views.iter().any(|v| v.context() != context) {
            return Err(Error::device(what, format!("an operand is not in the memory of cuda:{}", self.ordinal())));
        }
        Ok(())
    }
}

/// Columns of a row-major matrix: the matrix, its width, and the first of them.
pub(crate) type Columns<'a> = (View<'a>, usize, usize);

/// Where a launcher runs: a stream, and the profile that watches it, where one does.
#[derive(Clone, Copy)]
pub(crate) struct Queue<'a> {
    stream: Stream<'a>,
    device: Option<&'a CudaDevice>,
}

#[derive(Clone, Copy)]
enum Stream<'a> {
    Ours(&'a CudaStream),
    /// Of the context that is current.
    #[cfg_attr(not(feature = "capi"), allow(dead_code))]
    Raw(ffi::sq_stream),
}

impl<'a> Queue<'a> {
    /// A stream of the caller's, which no profile watches.
    pub(crate) fn of(stream: &'a CudaStream) -> Self {
        Self { stream: Stream::Ours(stream), device: None }
    }

    /// The context of a [`Queue::raw`] and of what it works on.
    #[cfg(feature = "capi")]
    pub(crate) const CURRENT: usize = 0;

    /// A `cudaStream_t` of the context that is current.
    #[cfg(feature = "capi")]
    pub(crate) fn raw(stream: ffi::sq_stream) -> Self {
        Self { stream: Stream::Raw(stream), device: None }
    }

    /// What tells the memory of one GPU from another's.
    pub(crate) fn context(&self) -> usize {
        match self.stream {
            Stream::Ours(stream) => context_of(stream),
            Stream::Raw(_) => 0,
        }
    }

    /// Calls a launcher of `kernels.h` with the stream, its context bound.
    pub(crate) fn launch(&self, what: &'static str, work: Work, f: impl FnOnce(ffi::sq_stream) -> i32) -> Result<()> {
        let launch = || {
            let status = match self.stream {
                Stream::Ours(stream) => {
                    stream.context().bind_to_thread().map_err(driver_error("binding the context"))?;
                    if graphs::wanted() { graphs::captured(stream, f)? } else { f(stream.cu_stream().cast()) }
                }
                Stream::Raw(stream) => f(stream),
            };
            match status {
                0 => Ok(()),
                1 => Err(Error::Cuda(format!("{what}: the kernel does not support these sizes"))),
                code => Err(Error::Cuda(format!("{what}: launch failed with cudaError {code}"))),
            }
        };
        match self.device {
            Some(device) => device.profiled(work, launch),
            None => launch(),
        }
    }
}

/// What the choice of kernels depends on, of the current device.
pub(crate) fn current_gpu() -> Result<ffi::sq_gpu> {
    let mut gpu = ffi::sq_gpu { shared_bytes: 0, warpgroups: 0 };
    // SAFETY: gpu is valid for writes.
    match unsafe { ffi::sq_current_gpu(&raw mut gpu) } {
        0 => Ok(gpu),
        status => Err(Error::Cuda(format!("the current device cannot be asked: CUDA error {status}"))),
    }
}

/// The context of a stream, as [`View`]s name it.
pub(crate) fn context_of(stream: &CudaStream) -> usize {
    stream.context().cu_ctx() as usize
}

/// A table on a device.
#[derive(Clone)]
pub(crate) struct Constant(Arc<CudaSlice<u8>>);

impl Constant {
    /// As values of a kind.
    pub(crate) fn view(&self, kind: Kind) -> View<'_> {
        view(&self.0, self.0.num_bytes() / kind.size(), kind)
    }
}

/// `len` values of the memory of a device's own stream.
fn view(data: &CudaSlice<u8>, len: usize, kind: Kind) -> View<'_> {
    let (address, _) = data.device_ptr(data.stream());
    // SAFETY: the slice is borrowed as long as the view lives, and is released in the order of its own stream, the device's.
    unsafe { View::new(address, len, kind, context_of(data.stream())) }
}

/// Device memory of one tensor; freed in stream order.
pub struct CudaBuffer {
    data: CudaSlice<u8>,
    len: usize,
    kind: Kind,
    device: CudaDevice,
}

impl std::fmt::Debug for CudaBuffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "CudaBuffer({} x {}, cuda:{})", self.len, self.kind, self.device.ordinal())
    }
}

impl CudaBuffer {
    /// The type of a tensor of these values.
    pub(crate) fn dtype(&self) -> DType {
        self.kind.dtype().expect("a tensor's memory holds values of a tensor's type")
    }
    pub(crate) fn len(&self) -> usize {
        self.len
    }
    pub(crate) fn device(&self) -> &CudaDevice {
        &self.device
    }

    /// All of it.
    pub(crate) fn view(&self) -> View<'_> {
        view(&self.data, self.len, self.kind)
    }

    /// Copies values from `start` on to host memory and waits for them.
    ///
    /// # Errors
    /// Values that are not there.
    pub(crate) fn download(&self, start: usize, bytes: &mut [u8]) -> Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        let first = start * self.kind.size();
        let stream = &self.device.0.stream;
        self.device.bind()?;
        stream.memcpy_dtoh(&self.data.slice(first..first + bytes.len()), bytes).map_err(driver_error("copy from the GPU"))?;
        self.device.synchronize()
    }
}
