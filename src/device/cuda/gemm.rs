//! A thin wrapper of cuBLASLt: mixed element types, explicit arithmetic, batches, and a cache of what the heuristic chose.
//!
//! cuBLASLt is column-major: the row-major `Y = op(A) op(B)` is computed as `Yᵀ = op(B)ᵀ op(A)ᵀ`.

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::{Arc, Mutex};

use cudarc::cublaslt::{result, sys};
use cudarc::driver::{CudaSlice, CudaStream, DevicePtr};

use crate::{DType, Error, Result};

const WORKSPACE: usize = 64 << 20;

/// How products of `f32` operands are rounded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Arithmetic {
    /// Operands as they are, sums in `f32` (`f64` for `f64`).
    Exact,
    /// Operands are 8-bit integers and results 32-bit ones, whatever the types say. A must not be transposed, B must.
    Integer,
}

/// Everything the heuristic looks at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Shape {
    pub m: usize,
    pub n: usize,
    pub k: usize,
    pub ta: bool,
    pub tb: bool,
    /// Batch count and whether A and B step through it.
    pub batch: usize,
    pub batch_a: bool,
    pub batch_b: bool,
    pub a: DType,
    pub b: DType,
    pub y: DType,
    pub arithmetic: Arithmetic,
    /// The two factors of [`Factors::Device`] rather than those of [`Factors::Host`].
    pub device_factors: bool,
}

/// `alpha` and `beta` of `y = alpha op(a) op(b) + beta c`.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Factors {
    Host(f64, f64),
    /// Two floats in device memory; for 16- and 32-bit products.
    Device(*const f32),
}

struct Plan {
    desc: sys::cublasLtMatmulDesc_t,
    a: sys::cublasLtMatrixLayout_t,
    b: sys::cublasLtMatrixLayout_t,
    y: sys::cublasLtMatrixLayout_t,
    algo: sys::cublasLtMatmulAlgo_t,
}

// SAFETY: descriptors are only read after they are built.
unsafe impl Send for Plan {}
// SAFETY: as above.
unsafe impl Sync for Plan {}

pub(crate) struct Blas {
    handle: sys::cublasLtHandle_t,
    stream: Arc<CudaStream>,
    workspace: CudaSlice<u8>,
    plans: Mutex<HashMap<Shape, Arc<Plan>>>,
}

// SAFETY: a cuBLASLt handle may be used from several threads.
unsafe impl Send for Blas {}
// SAFETY: as above.
unsafe impl Sync for Blas {}

fn failed(what: impl std::fmt::Debug) -> impl FnOnce(cudarc::cublaslt::result::CublasError) -> Error {
    move |e| Error::Cuda(format!("cuBLASLt: {what:?}: {e:?}"))
}

fn data_type(dtype: DType) -> sys::cudaDataType {
    match dtype {
        DType::F64 => sys::cudaDataType_t::CUDA_R_64F,
        DType::F32 => sys::cudaDataType_t::CUDA_R_32F,
        DType::F16 => sys::cudaDataType_t::CUDA_R_16F,
        DType::BF16 => sys::cudaDataType_t::CUDA_R_16BF,
        DType::U32 => unreachable!("checked by the caller"),
    }
}

impl Blas {
    pub(crate) fn new(stream: &Arc<CudaStream>) -> Result<Self> {
        let handle = result::create_handle().map_err(failed("handle"))?;
        // SAFETY: cuBLASLt writes the workspace before it reads it.
        let workspace = unsafe { stream.alloc(WORKSPACE) }.map_err(|e| Error::Cuda(format!("cuBLASLt workspace: {e:?}")))?;
        Ok(Self { handle, stream: stream.clone(), workspace, plans: Mutex::default() })
    }

    /// `y = alpha op(a) op(b) + beta c`; c has the type of y and may be y.
    ///
    /// # Safety
    /// The pointers address tensors of the sizes in `s` on this stream's device; c may be anything where beta is 0.
    pub(crate) unsafe fn run(
        &self,
        s: Shape,
        y: *mut c_void,
        a: *const c_void,
        b: *const c_void,
        c: *const c_void,
        factors: Factors,
    ) -> Result<()> {
        let plan = self.plan(s)?;
        let host = if let Factors::Host(alpha, beta) = factors { [alpha, beta] } else { [0.0; 2] };
        let (narrow, integer) = (host.map(|x| x as f32), host.map(|x| x as i32));
        let (alpha, beta): (*const c_void, *const c_void) = match (factors, s.arithmetic, s.y) {
            (Factors::Device(p), ..) => (p.cast(), p.wrapping_add(1).cast()),
            (_, Arithmetic::Integer, _) => ((&raw const integer[0]).cast(), (&raw const integer[1]).cast()),
            (.., DType::F64) => ((&raw const host[0]).cast(), (&raw const host[1]).cast()),
            _ => ((&raw const narrow[0]).cast(), (&raw const narrow[1]).cast()),
        };
        let (workspace, _) = self.workspace.device_ptr(&self.stream);
        // SAFETY: by the caller; the factors outlive the call (those of the host are read at once).
        unsafe {
            result::matmul(
                self.handle,
                plan.desc,
                alpha,
                beta,
                b,
                plan.a,
                a,
                plan.b,
                c,
                plan.y,
                y,
                plan.y,
                &plan.algo,
                workspace as *mut c_void,
                WORKSPACE,
                self.stream.cu_stream().cast(),
            )
        }
        .map_err(failed(s))
    }

    fn plan(&self, s: Shape) -> Result<Arc<Plan>> {
        let mut plans = self.plans.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(plan) = plans.get(&s) {
            return Ok(plan.clone());
        }
        let plan = Arc::new(self.build(s)?);
        plans.insert(s, plan.clone());
        Ok(plan)
    }

    fn build(&self, s: Shape) -> Result<Plan> {
        use sys::cublasComputeType_t as Compute;
        let integer = s.arithmetic == Arithmetic::Integer;
        let compute = match (s.y, s.arithmetic) {
            (_, Arithmetic::Integer) => Compute::CUBLAS_COMPUTE_32I,
            (DType::F64, _) => Compute::CUBLAS_COMPUTE_64F,
            (_, Arithmetic::Exact) => Compute::CUBLAS_COMPUTE_32F,
        };
        let of = |dtype, whole| if integer { whole } else { data_type(dtype) };
        let (operand, result_type) = (sys::cudaDataType_t::CUDA_R_8I, sys::cudaDataType_t::CUDA_R_32I);
        let scale = of(if s.y == DType::F64 { DType::F64 } else { DType::F32 }, result_type);
        let desc = result::create_matmul_desc(compute, scale).map_err(failed(s))?;
        // Their A is our B and the other way round.
        let layout = |rows: usize, cols: usize, element, stride: usize| -> Result<_> {
            let layout =
                result::create_matrix_layout(element, rows as u64, cols as u64, rows.max(1) as i64).map_err(failed(s))?;
            let (count, stride) = (s.batch as i32, stride as i64);
            use sys::cublasLtMatrixLayoutAttribute_t as Attribute;
            // SAFETY: the layout was just made; the attributes have these types.
            unsafe {
                let attribute = Attribute::CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT;
                result::set_matrix_layout_attribute(layout, attribute, (&raw const count).cast(), 4).map_err(failed(s))?;
                let attribute = Attribute::CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET;
                result::set_matrix_layout_attribute(layout, attribute, (&raw const stride).cast(), 8).map_err(failed(s))?;
            }
            Ok(layout)
        };
        let step = |batched: bool, size: usize| if batched { size } else { 0 };
        let (b_rows, b_cols) = if s.tb { (s.k, s.n) } else { (s.n, s.k) };
        let (a_rows, a_cols) = if s.ta { (s.m, s.k) } else { (s.k, s.m) };
        let a = layout(b_rows, b_cols, of(s.b, operand), step(s.batch_b, s.k * s.n))?;
        let b = layout(a_rows, a_cols, of(s.a, operand), step(s.batch_a, s.m * s.k))?;
        let y = layout(s.n, s.m, of(s.y, result_type), step(s.batch > 1, s.m * s.n))?;
        use sys::cublasLtMatmulDescAttributes_t as Attribute;
        let op = i32::from; // CUBLAS_OP_N is 0, CUBLAS_OP_T is 1
        let (op_a, op_b): (i32, i32) = (op(s.tb), op(s.ta));
        let pointer_mode = i32::from(s.device_factors); // CUBLASLT_POINTER_MODE_HOST is 0, _DEVICE is 1
        let preference = result::create_matmul_pref().map_err(failed(s))?;
        let bytes = WORKSPACE;
        // SAFETY: everything passed was made above and has the type the attribute asks for.
        let heuristic = unsafe {
            result::set_matmul_desc_attribute(desc, Attribute::CUBLASLT_MATMUL_DESC_TRANSA, (&raw const op_a).cast(), 4)
                .map_err(failed(s))?;
            result::set_matmul_desc_attribute(desc, Attribute::CUBLASLT_MATMUL_DESC_TRANSB, (&raw const op_b).cast(), 4)
                .map_err(failed(s))?;
            let attribute = Attribute::CUBLASLT_MATMUL_DESC_POINTER_MODE;
            result::set_matmul_desc_attribute(desc, attribute, (&raw const pointer_mode).cast(), 4).map_err(failed(s))?;
            let attribute = sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
            result::set_matmul_pref_attribute(preference, attribute, (&raw const bytes).cast(), size_of::<usize>())
                .map_err(failed(s))?;
            let heuristic = result::get_matmul_algo_heuristic(self.handle, desc, a, b, y, y, preference);
            result::destroy_matmul_pref(preference).map_err(failed(s))?;
            heuristic.map_err(failed(s))?
        };
        Ok(Plan { desc, a, b, y, algo: heuristic.algo })
    }
}

impl Drop for Blas {
    fn drop(&mut self) {
        let plans = std::mem::take(&mut *self.plans.lock().unwrap_or_else(|e| e.into_inner()));
        // SAFETY: each was made once and is destroyed once; errors at exit have nobody to go to.
        unsafe {
            for plan in plans.into_values() {
                let _ = result::destroy_matmul_desc(plan.desc);
                let _ = result::destroy_matrix_layout(plan.a);
                let _ = result::destroy_matrix_layout(plan.b);
                let _ = result::destroy_matrix_layout(plan.y);
            }
            let _ = result::destroy_handle(self.handle);
        }
    }
}
