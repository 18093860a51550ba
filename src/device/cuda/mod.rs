//! The GPU: one context, one stream and one stream-ordered memory pool per device.

mod gemm;
pub(crate) mod gptq;
pub(crate) mod linalg;
pub(crate) mod matmul;
pub(crate) mod ops;
mod profile;
mod solver;

/// The C launchers of `cuda/kernels.h`, generated from it.
#[allow(non_camel_case_types, non_upper_case_globals, missing_docs, clippy::all)]
pub mod ffi {
    include!(concat!(env!("OUT_DIR"), "/kernels.rs"));
}

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::{Arc, Mutex, OnceLock};

use cudarc::driver::{CudaContext, CudaSlice, CudaStream, DevicePtr, DriverError, result, sys};

use crate::{DType, Device, Error, Result, Tensor};

pub(crate) use ops::cast;
pub use profile::Phase;
use profile::Work;

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
    /// Bit-packed H_K by K.
    tables: Mutex<HashMap<usize, Arc<CudaSlice<u8>>>>,
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
        if ordinal >= count as usize {
            return Err(Error::Cuda(format!("GPU {ordinal} was asked for, this machine has {count}")));
        }
        // SAFETY: as above.
        if !unsafe { cudarc::cublaslt::sys::is_culib_present() } {
            return Err(Error::Cuda("cuBLASLt (libcublasLt) was not found; install the CUDA runtime libraries".into()));
        }
        let context = CudaContext::new(ordinal).map_err(driver_error("opening the GPU"))?;
        // SAFETY: one stream does all the work, so events between streams have nothing to order.
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
            tables: Mutex::default(),
            profile: Mutex::default(),
        })))
    }

    /// Which GPU.
    pub fn ordinal(&self) -> usize {
        self.0.context.ordinal()
    }

    /// The card's name.
    pub fn name(&self) -> Result<String> {
        self.0.context.name().map_err(driver_error("device name"))
    }

    /// The stream all work runs on.
    pub fn stream(&self) -> &Arc<CudaStream> {
        &self.0.stream
    }

    /// Waits for all work on the device.
    pub fn synchronize(&self) -> Result<()> {
        self.bind()?;
        self.0.stream.synchronize().map_err(driver_error("a kernel failed"))
    }

    /// Bytes (free, total) on the card; the pool's unused reserve counts as free.
    pub fn memory(&self) -> Result<(usize, usize)> {
        self.bind()?;
        let (free, total) = self.0.context.mem_get_info().map_err(driver_error("memory information"))?;
        let kept = self.pool(sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT)?
            - self.pool(sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT)?;
        Ok((free + kept as usize, total))
    }

    /// What the card can do, from what the driver says about it. Of the peak of its tensor cores two thirds are reckoned with, and
    /// nine tenths of its bandwidth, which is what large products and copies reach on an H100.
    pub fn card(&self) -> Result<crate::device::Card> {
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
        Ok(crate::device::Card {
            name: self.name()?,
            free: self.memory()?.0,
            products: 0.64 * processors * clock * per_clock,
            bandwidth: 0.9 * 2.0 * memory_clock * bus,
        })
    }

    /// The most bytes of tensors that ever lived at once.
    pub fn peak_bytes(&self) -> Result<u64> {
        self.pool(sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH)
    }

    /// Lets [`CudaDevice::peak_bytes`] begin anew with what lives now.
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

    /// Uninitialised bytes.
    pub(crate) fn alloc_bytes(&self, bytes: usize, what: &str) -> Result<CudaSlice<u8>> {
        // SAFETY: every kernel that is given this memory writes all of it before anything reads it.
        unsafe { self.0.stream.alloc(bytes.max(1)) }.map_err(|e| match e.0 {
            sys::cudaError_enum::CUDA_ERROR_OUT_OF_MEMORY => {
                let (free, total) = self.memory().unwrap_or_default();
                Error::OutOfMemory { what: what.into(), needed: bytes, free, total }
            }
            _ => driver_error("allocation")(e),
        })
    }

    /// Uninitialised values.
    pub(crate) fn alloc(&self, shape: &[usize], dtype: DType) -> Result<Tensor> {
        // At most isize::MAX bytes.
        let len = crate::tensor::count("a tensor on the GPU", shape)?;
        let data = self.alloc_bytes(len * dtype.size(), &format!("a {dtype} tensor of shape {shape:?}"))?;
        Tensor::from_cuda(CudaBuffer { data, len, dtype, device: self.clone() }, shape)
    }

    pub(crate) fn zeros(&self, len: usize, dtype: DType) -> Result<CudaBuffer> {
        let bytes = len.checked_mul(dtype.size());
        let bytes =
            bytes.ok_or_else(|| Error::argument("a tensor of zeros", format!("{len} values of {dtype} have no address")))?;
        let mut data = self.alloc_bytes(bytes, "a tensor of zeros")?;
        self.0.stream.memset_zeros(&mut data).map_err(driver_error("memset"))?;
        Ok(CudaBuffer { data, len, dtype, device: self.clone() })
    }

    pub(crate) fn upload(&self, bytes: &[u8], dtype: DType) -> Result<CudaBuffer> {
        let mut data = self.alloc_bytes(bytes.len(), "an upload")?;
        if !bytes.is_empty() {
            self.0.stream.memcpy_htod(bytes, &mut data).map_err(driver_error("copy to the GPU"))?;
        }
        Ok(CudaBuffer { data, len: bytes.len() / dtype.size(), dtype, device: self.clone() })
    }

    /// Calls a launcher of `kernels.h` with this device's stream, the context bound.
    fn launch(&self, what: &'static str, f: impl FnOnce(ffi::sq_stream) -> i32) -> Result<()> {
        self.profiled(Work { what, ..Work::default() }, || launch(&self.0.stream, what, f))
    }

    /// The same for a kernel that must move so many bytes.
    fn launch_moving(&self, what: &'static str, bytes: usize, f: impl FnOnce(ffi::sq_stream) -> i32) -> Result<()> {
        self.profiled(Work { what, bytes: bytes as f64, flops: 0.0 }, || launch(&self.0.stream, what, f))
    }

    /// The same for a kernel that is limited by its arithmetic.
    fn launch_computing(&self, what: &'static str, flops: f64, f: impl FnOnce(ffi::sq_stream) -> i32) -> Result<()> {
        self.profiled(Work { what, bytes: 0.0, flops }, || launch(&self.0.stream, what, f))
    }

    /// See [`gemm::Blas::run`].
    ///
    /// # Safety
    /// As there.
    unsafe fn gemm(
        &self,
        s: gemm::Shape,
        y: *mut c_void,
        a: *const c_void,
        b: *const c_void,
        c: *const c_void,
        factors: gemm::Factors,
    ) -> Result<()> {
        self.bind()?;
        let flops = 2.0 * (s.m * s.n) as f64 * (s.k * s.batch) as f64;
        // SAFETY: by the caller.
        self.profiled(Work { what: "product", bytes: 0.0, flops }, || unsafe { self.0.blas.run(s, y, a, b, c, factors) })
    }
}

/// Calls a launcher of `kernels.h` with a stream, its context bound.
pub(crate) fn launch(stream: &CudaStream, what: &str, f: impl FnOnce(ffi::sq_stream) -> i32) -> Result<()> {
    stream.context().bind_to_thread().map_err(driver_error("binding the context"))?;
    match f(stream.cu_stream().cast()) {
        0 => Ok(()),
        1 => Err(Error::Cuda(format!("{what}: the kernel does not support these sizes"))),
        code => Err(Error::Cuda(format!("{what}: launch failed with cudaError {code}"))),
    }
}

/// Device memory of one tensor; freed in stream order.
pub struct CudaBuffer {
    data: CudaSlice<u8>,
    len: usize,
    dtype: DType,
    device: CudaDevice,
}

impl std::fmt::Debug for CudaBuffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "CudaBuffer({} x {}, {:?})", self.len, self.dtype, Device::Cuda(self.device.clone()))
    }
}

impl CudaBuffer {
    pub(crate) fn dtype(&self) -> DType {
        self.dtype
    }
    pub(crate) fn len(&self) -> usize {
        self.len
    }
    pub(crate) fn device(&self) -> &CudaDevice {
        &self.device
    }

    /// The address of value number `start`.
    fn address(&self, start: usize) -> *mut c_void {
        let (pointer, _) = self.data.device_ptr(&self.device.0.stream);
        (pointer as usize + start * self.dtype.size()) as *mut c_void
    }

    /// Copies values from `start` on to host memory and waits for them.
    pub(crate) fn download(&self, start: usize, bytes: &mut [u8]) -> Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        let first = start * self.dtype.size();
        let stream = &self.device.0.stream;
        self.device.bind()?;
        stream.memcpy_dtoh(&self.data.slice(first..first + bytes.len()), bytes).map_err(driver_error("copy from the GPU"))?;
        self.device.synchronize()
    }
}
