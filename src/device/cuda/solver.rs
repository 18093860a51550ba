//! cuBLAS and cuSOLVER for what cuBLASLt does not do: products inside larger matrices, Cholesky factors. Only GPTQ needs them.
//!
//! Both are column-major: a row-major matrix is their transpose, so that its lower triangle is their upper one.

use std::ffi::c_void;

use cudarc::cublas;
use cudarc::cusolver::sys::{self, cublasDiagType_t, cublasFillMode_t, cusolverStatus_t};

use super::CudaDevice;
use super::ops::ptr_of;
use crate::{DType, Device, Error, Result, Tensor};

/// Handles on one device's stream.
pub(crate) struct Solver {
    blas: cublas::sys::cublasHandle_t,
    /// `None` where the library is not installed.
    solver: Option<sys::cusolverDnHandle_t>,
}

// SAFETY: all calls go through one stream, and each handle is used under `CudaDevice::launch`'s rules: nothing is kept on the host
// between calls.
unsafe impl Send for Solver {}
// SAFETY: as above.
unsafe impl Sync for Solver {}

fn blas_error(what: &'static str) -> impl FnOnce(cublas::result::CublasError) -> Error {
    move |e| Error::Cuda(format!("cuBLAS: {what}: {e:?}"))
}

fn check(what: &'static str, status: cusolverStatus_t) -> Result<()> {
    match status {
        cusolverStatus_t::CUSOLVER_STATUS_SUCCESS => Ok(()),
        other => Err(Error::Cuda(format!("cuSOLVER: {what}: {other:?}"))),
    }
}

impl Solver {
    fn open(d: &CudaDevice) -> Result<Self> {
        d.bind()?;
        // cudarc panics when it cannot load a library, so look first.
        // SAFETY: load shared libraries and look at them.
        let (blas, solver) = unsafe { (cublas::sys::is_culib_present(), sys::is_culib_present()) };
        if !blas {
            return Err(Error::Cuda("cuBLAS (libcublas) was not found; install the CUDA runtime libraries".into()));
        }
        let stream = d.stream().cu_stream();
        let blas = cublas::result::create_handle().map_err(blas_error("handle"))?;
        // SAFETY: handle and stream were just made, or live as long as the device.
        unsafe { cublas::result::set_stream(blas, stream.cast()) }.map_err(blas_error("stream"))?;
        let mut handle = std::ptr::null_mut();
        if solver {
            // SAFETY: as above.
            unsafe {
                check("handle", sys::cusolverDnCreate(&mut handle))?;
                check("stream", sys::cusolverDnSetStream(handle, stream.cast()))?;
            }
        }
        Ok(Self { blas, solver: solver.then_some(handle) })
    }

    fn of(d: &CudaDevice) -> Result<&Self> {
        if let Some(solver) = d.0.solver.get() {
            return Ok(solver);
        }
        let solver = Self::open(d)?;
        Ok(d.0.solver.get_or_init(|| solver))
    }
}

impl Drop for Solver {
    fn drop(&mut self) {
        // SAFETY: each was made once and is destroyed once; errors at exit have nobody to go to.
        unsafe {
            let _ = cublas::result::destroy_handle(self.blas);
            if let Some(handle) = self.solver {
                let _ = sys::cusolverDnDestroy(handle);
            }
        }
    }
}

/// `w[:, from..] += e u[.., from..]` for w [rows, n], e [rows, k], and u the k rows from `row` on of a matrix [n, n]; all `f32`, with
/// sums and products in `f32` (no TF32).
pub(crate) fn add_product(d: &CudaDevice, w: &Tensor, from: usize, e: &Tensor, u: &Tensor, row: usize) -> Result<()> {
    let (rows, n, k) = (w.rows(), w.cols(), e.cols());
    if from >= n || rows == 0 {
        return Ok(());
    }
    let blas = Solver::of(d)?.blas;
    let at = |t: &Tensor, values: usize| (ptr_of(t) as usize + 4 * values) as *mut f32;
    let none = cublas::sys::cublasOperation_t::CUBLAS_OP_N;
    let (size, one) = (|n: usize| n as i32, 1f32);
    d.bind()?;
    // SAFETY: as transposes, (n − from) × rows += ((n − from) × k) (k × rows), every one inside its tensor.
    unsafe {
        let (a, b, c) = (at(u, row * n + from), at(e, 0), at(w, from));
        let m = size(n - from);
        cublas::result::sgemm(blas, none, none, m, size(rows), size(k), &one, a, size(n), b, size(k), &one, c, size(n))
    }
    .map_err(blas_error("product"))
}

/// Replaces the lower triangle of a symmetric `f64` matrix `[n, n]` by L⁻¹, with `A = L Lᵀ`; what is above the diagonal is lost.
/// False where A is not positive definite. Without cuSOLVER the CPU does it.
pub(crate) fn invert_cholesky(d: &CudaDevice, a: Tensor) -> Result<Option<Tensor>> {
    let Some(handle) = Solver::of(d)?.solver else { return on_the_cpu(d, a) };
    d.bind()?;
    let n = a.cols();
    let (values, size) = (ptr_of(&a).cast::<f64>(), n as i32);
    let lower = cublasFillMode_t::CUBLAS_FILL_MODE_UPPER; // the transpose's
    let info = d.zeros(1, DType::U32)?;
    let pointer = info.address(0).cast::<i32>();
    let failed = || -> Result<bool> {
        let mut bytes = [0u8; 4];
        info.download(0, &mut bytes)?;
        match i32::from_le_bytes(bytes) {
            0 => Ok(false),
            bad if bad > 0 => Ok(true),
            bad => Err(Error::Cuda(format!("cuSOLVER: argument {} is wrong", -bad))),
        }
    };
    let mut count = 0;
    // SAFETY: A is n × n; the workspaces are as large as asked for and outlive the calls in stream order.
    unsafe {
        check("potrf workspace", sys::cusolverDnDpotrf_bufferSize(handle, lower, size, values, size, &mut count))?;
        let space = d.alloc(&[count.max(1) as usize], DType::F64)?;
        check("potrf", sys::cusolverDnDpotrf(handle, lower, size, values, size, ptr_of(&space).cast(), count, pointer))?;
        if failed()? {
            return Ok(None);
        }
        let (kind, general) = (sys::cudaDataType_t::CUDA_R_64F, cublasDiagType_t::CUBLAS_DIAG_NON_UNIT);
        let (n, data, mut on_device, mut on_host) = (n as i64, values.cast::<c_void>(), 0, 0);
        let status = sys::cusolverDnXtrtri_bufferSize(handle, lower, general, n, kind, data, n, &mut on_device, &mut on_host);
        check("trtri workspace", status)?;
        let (space, mut host) = (d.alloc(&[on_device.div_ceil(8).max(1)], DType::F64)?, vec![0u8; on_host.max(1)]);
        let (space, host) = (ptr_of(&space), host.as_mut_ptr().cast());
        let status = sys::cusolverDnXtrtri(handle, lower, general, n, kind, data, n, space, on_device, host, on_host, pointer);
        check("trtri", status)?;
        // Waits, so that the host's workspace is no longer read.
        if failed()? {
            return Ok(None);
        }
    }
    Ok(Some(a))
}

fn on_the_cpu(d: &CudaDevice, a: Tensor) -> Result<Option<Tensor>> {
    let n = a.cols();
    let a = a.to_device(&Device::Cpu)?.into_vec()?;
    let Some(l) = crate::linalg::factor::cholesky(&a, n) else { return Ok(None) };
    let inverse = crate::linalg::factor::invert_lower(&l, n);
    Ok(Some(Tensor::from_vec(inverse, [n, n])?.to_device(&Device::Cuda(d.clone()))?))
}
