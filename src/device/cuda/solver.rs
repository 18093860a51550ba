//! cuBLAS and cuSOLVER for what cuBLASLt does not do: products inside larger matrices, Cholesky factors. Only GPTQ needs them.
//!
//! Both are column-major: a row-major matrix is their transpose, so that its lower triangle is their upper one.

use std::ffi::c_void;

use cudarc::cublas;
use cudarc::cusolver::sys::{self, cublasDiagType_t, cublasFillMode_t, cusolverStatus_t};

use super::CudaDevice;
use crate::device::launch::{Kind, View};
use crate::{Error, Result};

/// Handles on one device's stream.
pub(crate) struct Solver {
    blas: cublas::sys::cublasHandle_t,
    /// `None` where the library is not installed.
    solver: Option<sys::cusolverDnHandle_t>,
}

// SAFETY: the handles are used by one thread at a time, under the device's lock of its libraries, and on one stream.
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
        let stream = d.0.stream.cu_stream();
        // Owned from here on, so that a failure further down frees what was made.
        let mut made = Self { blas: cublas::result::create_handle().map_err(blas_error("handle"))?, solver: None };
        // SAFETY: handle and stream were just made, or live as long as the device.
        unsafe { cublas::result::set_stream(made.blas, stream.cast()) }.map_err(blas_error("stream"))?;
        if solver {
            let mut handle = std::ptr::null_mut();
            // SAFETY: as above.
            unsafe {
                check("handle", sys::cusolverDnCreate(&mut handle))?;
                made.solver = Some(handle);
                check("stream", sys::cusolverDnSetStream(handle, stream.cast()))?;
            }
        }
        Ok(made)
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

fn int(what: &str, n: usize) -> Result<i32> {
    i32::try_from(n).map_err(|_| Error::argument(what, format!("{n} is too large")))
}

impl CudaDevice {
    /// `w[:, from..] += e u[.., from..]` for w [rows, n], e [rows, k], and u the k rows from `row` on of a matrix [n, n]; all `f32`,
    /// with sums and products in `f32` (no TF32).
    ///
    /// # Errors
    /// Operands of other sizes or kinds, or on another GPU; no cuBLAS.
    pub(crate) fn add_product(
        &self,
        w: View<'_>,
        from: usize,
        e: View<'_>,
        u: View<'_>,
        row: usize,
        [rows, n, k]: [usize; 3],
    ) -> Result<()> {
        let what = "product inside a matrix";
        if from >= n || rows == 0 {
            return Ok(());
        }
        let fits =
            |view: View<'_>, rows: usize, cols: usize| view.kind() == Kind::F32 && Some(view.len()) == rows.checked_mul(cols);
        if !fits(w, rows, n) || !fits(e, rows, k) || !fits(u, n, n) || row.checked_add(k).is_none_or(|end| end > n) {
            return Err(Error::argument(
                what,
                format!("operands do not fit {rows} rows, {n} columns and {k} from {row} on, in f32"),
            ));
        }
        self.owns(what, &[w, e, u])?;
        let (m, rows, n_, k) = (int(what, n - from)?, int(what, rows)?, int(what, n)?, int(what, k)?);
        let at = |view: View<'_>, values: usize| (view.address() as usize + 4 * values) as *mut f32;
        let none = cublas::sys::cublasOperation_t::CUBLAS_OP_N;
        let one = 1f32;
        self.bind()?;
        let _alone = self.libraries();
        let blas = Solver::of(self)?.blas;
        // SAFETY: as transposes, (n − from) × rows += ((n − from) × k) (k × rows), every one inside its operand, as checked above; the
        // lock is held.
        unsafe {
            let (a, b, c) = (at(u, row * n + from), at(e, 0), at(w, from));
            cublas::result::sgemm(blas, none, none, m, rows, k, &one, a, n_, b, k, &one, c, n_)
        }
        .map_err(blas_error("product"))
    }

    /// Replaces the lower triangle of a symmetric `f64` matrix `[n, n]` by L⁻¹, with `A = L Lᵀ`; what is above the diagonal is lost.
    /// False where A is not positive definite (and lost), `None` where cuSOLVER is not installed (and A as it was).
    ///
    /// # Errors
    /// Another size or kind, memory of another GPU, and what the libraries report.
    pub(crate) fn invert_cholesky(&self, a: View<'_>, n: usize) -> Result<Option<bool>> {
        let what = "Cholesky factor";
        if a.kind() != Kind::F64 || Some(a.len()) != n.checked_mul(n) {
            return Err(Error::argument(what, format!("expected {n}x{n} values in f64, got {} in {}", a.len(), a.kind())));
        }
        self.owns(what, &[a])?;
        self.bind()?;
        let _alone = self.libraries();
        let Some(handle) = Solver::of(self)?.solver else { return Ok(None) };
        let (values, size) = (a.address() as *mut f64, int(what, n)?);
        let lower = cublasFillMode_t::CUBLAS_FILL_MODE_UPPER; // the transpose's
        let info = self.zeros(1, Kind::I32)?;
        let pointer = info.view().address() as *mut i32;
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
        // SAFETY: A is n × n, as checked; the workspaces are as large as asked for and outlive the calls in stream order; the lock is
        // held.
        unsafe {
            check("potrf workspace", sys::cusolverDnDpotrf_bufferSize(handle, lower, size, values, size, &mut count))?;
            let space = self.buffer(count.max(1) as usize, Kind::F64, "cuSOLVER's workspace")?;
            let at = space.view().address() as *mut f64;
            check("potrf", sys::cusolverDnDpotrf(handle, lower, size, values, size, at, count, pointer))?;
            if failed()? {
                return Ok(Some(false));
            }
            let (kind, general) = (sys::cudaDataType_t::CUDA_R_64F, cublasDiagType_t::CUBLAS_DIAG_NON_UNIT);
            let (n, data, mut on_device, mut on_host) = (n as i64, values.cast::<c_void>(), 0, 0);
            let status = sys::cusolverDnXtrtri_bufferSize(handle, lower, general, n, kind, data, n, &mut on_device, &mut on_host);
            check("trtri workspace", status)?;
            let space = self.buffer(on_device.div_ceil(8).max(1), Kind::F64, "cuSOLVER's workspace")?;
            let mut host = vec![0u8; on_host.max(1)];
            let (at, host) = (space.view().address() as *mut c_void, host.as_mut_ptr().cast());
            let status = sys::cusolverDnXtrtri(handle, lower, general, n, kind, data, n, at, on_device, host, on_host, pointer);
            check("trtri", status)?;
            // Waits, so that the host's workspace is no longer read.
            Ok(Some(!failed()?))
        }
    }
}
