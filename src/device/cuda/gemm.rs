//! A thin wrapper of cuBLASLt: mixed element types, explicit arithmetic, batches, and a cache of what the heuristic chose.
//!
//! cuBLASLt is column-major: the row-major `Y = op(A) op(B)` is computed as `Yᵀ = op(B)ᵀ op(A)ᵀ`.

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::{Arc, Mutex};

use cudarc::cublaslt::{result, sys};
use cudarc::driver::{CudaSlice, CudaStream, DevicePtr};

use super::CudaDevice;
use crate::device::launch::{ALIGNMENT, Factors, Kind, Shape, View, Work};
use crate::{Error, Result};

/// Bytes that one product may use besides its operands.
const WORKSPACE: usize = 64 << 20;
/// What the heuristic takes for granted of every address, unless it is told otherwise; what the allocator gives.
const GENEROUS: u64 = 256;

/// Everything the heuristic looks at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    shape: Shape,
    a: Kind,
    b: Kind,
    y: Kind,
    /// The two factors of [`Factors::Device`] rather than those of [`Factors::Host`].
    device_factors: bool,
    /// Every address is a multiple of it: [`GENEROUS`] or [`ALIGNMENT`].
    alignment: u64,
}

/// A cuBLASLt object that is destroyed with its owner.
struct Owned<T: Copy>(T, unsafe fn(T) -> Result<(), result::CublasError>);

impl<T: Copy> Drop for Owned<T> {
    fn drop(&mut self) {
        // SAFETY: it was made once and is destroyed once; an error has nobody to go to.
        let _ = unsafe { (self.1)(self.0) };
    }
}

struct Plan {
    desc: Owned<sys::cublasLtMatmulDesc_t>,
    a: Owned<sys::cublasLtMatrixLayout_t>,
    b: Owned<sys::cublasLtMatrixLayout_t>,
    y: Owned<sys::cublasLtMatrixLayout_t>,
    algo: sys::cublasLtMatmulAlgo_t,
}

// SAFETY: descriptors are only read after they are built.
unsafe impl Send for Plan {}
// SAFETY: as above.
unsafe impl Sync for Plan {}

pub(super) struct Blas {
    handle: sys::cublasLtHandle_t,
    stream: Arc<CudaStream>,
    workspace: CudaSlice<u8>,
    plans: Mutex<HashMap<Key, Arc<Plan>>>,
}

// SAFETY: a cuBLASLt handle may be used from several threads; the workspace is used under the device's lock of its libraries.
unsafe impl Send for Blas {}
// SAFETY: as above.
unsafe impl Sync for Blas {}

fn failed(what: impl std::fmt::Debug) -> impl FnOnce(result::CublasError) -> Error {
    move |e| Error::Cuda(format!("cuBLASLt: {what:?}: {e:?}"))
}

fn data_type(kind: Kind) -> Result<sys::cudaDataType> {
    Ok(match kind {
        Kind::F64 => sys::cudaDataType_t::CUDA_R_64F,
        Kind::F32 => sys::cudaDataType_t::CUDA_R_32F,
        Kind::F16 => sys::cudaDataType_t::CUDA_R_16F,
        Kind::BF16 => sys::cudaDataType_t::CUDA_R_16BF,
        Kind::I8 => sys::cudaDataType_t::CUDA_R_8I,
        Kind::I32 => sys::cudaDataType_t::CUDA_R_32I,
        other => return Err(Error::argument("matmul on a GPU", format!("no products of {other}"))),
    })
}

impl CudaDevice {
    /// `y = alpha op(a) op(b) + beta c`, row-major; c has the kind and size of y and may be y, which is taken for none. Sums are in
    /// `f32` (`f64` for `f64`, integers for integers, of which a must not be transposed and b must).
    ///
    /// # Errors
    /// Operands of other sizes, misaligned or on another GPU, and what cuBLASLt has no product of.
    pub(crate) fn multiply(
        &self,
        s: Shape,
        y: View<'_>,
        a: View<'_>,
        b: View<'_>,
        c: Option<View<'_>>,
        factors: Factors<'_>,
    ) -> Result<()> {
        let what = "matmul on a GPU";
        let size = |extents: [usize; 3]| {
            let size = extents.iter().try_fold(1usize, |size, &n| size.checked_mul(n));
            size.ok_or_else(|| Error::argument(what, format!("{extents:?} is more values than can be counted")))
        };
        let of = |batched: bool| if batched { s.batch } else { 1 };
        let c = c.unwrap_or(y);
        let operands = [
            (a, size([of(s.batch_a), s.m, s.k])?),
            (b, size([of(s.batch_b), s.k, s.n])?),
            (y, size([s.batch, s.m, s.n])?),
            (c, y.len()),
        ];
        if let Some((view, want)) = operands.iter().find(|(view, want)| view.len() != *want) {
            return Err(Error::shape(what, format!("of {want} values"), &[view.len()]));
        }
        if c.kind() != y.kind() {
            return Err(Error::argument(what, format!("adds {} to {}", c.kind(), y.kind())));
        }
        let views = operands.map(|(view, _)| view);
        self.owns(what, &views)?;
        if views.iter().any(|v| !v.is_aligned() && v.len() > 0) {
            return Err(Error::argument(what, format!("an operand does not start on a {ALIGNMENT}-byte boundary")));
        }
        if let Factors::Device(factors) = factors {
            self.owns(what, &[factors])?;
            if factors.kind() != Kind::F32 || factors.len() != 2 || y.kind() == Kind::F64 {
                return Err(Error::argument(what, "expected two factors in f32 for a result of no more than 32 bits"));
            }
        }
        let generous = views.iter().all(|v| v.address().is_multiple_of(GENEROUS));
        let key = Key {
            shape: s,
            a: a.kind(),
            b: b.kind(),
            y: y.kind(),
            device_factors: matches!(factors, Factors::Device(_)),
            alignment: if generous { GENEROUS } else { ALIGNMENT },
        };
        self.bind()?;
        let flops = 2.0 * (s.m * s.n) as f64 * (s.k * s.batch) as f64;
        self.profiled(Work::computing("product", flops), || {
            let _alone = self.libraries();
            let blas = &self.0.blas;
            // SAFETY: sizes, alignment and device were checked just above; the views borrow their memory; the lock is held.
            unsafe { blas.run(&key, y.address(), a.address(), b.address(), c.address(), factors) }
        })
    }
}

impl Blas {
    pub(super) fn new(stream: &Arc<CudaStream>) -> Result<Self> {
        let handle = result::create_handle().map_err(failed("handle"))?;
        // SAFETY: cuBLASLt writes the workspace before it reads it.
        let workspace = unsafe { stream.alloc(WORKSPACE) }.map_err(|e| Error::Cuda(format!("cuBLASLt workspace: {e:?}")))?;
        Ok(Self { handle, stream: stream.clone(), workspace, plans: Mutex::default() })
    }

    /// `y = alpha op(a) op(b) + beta c`; c has the kind of y and may be y.
    ///
    /// # Safety
    /// The addresses are those of operands of the sizes, kinds and alignment in the key, on this stream's device, and nobody else is in
    /// this function: the workspace is shared.
    unsafe fn run(&self, key: &Key, y: u64, a: u64, b: u64, c: u64, factors: Factors<'_>) -> Result<()> {
        let plan = self.plan(key)?;
        let host = if let Factors::Host(alpha, beta) = factors { [alpha, beta] } else { [0.0; 2] };
        let (narrow, integer) = (host.map(|x| x as f32), host.map(|x| x as i32));
        let (alpha, beta): (*const c_void, *const c_void) = match (factors, key.y) {
            (Factors::Device(f), _) => (f.address() as *const c_void, (f.address() + 4) as *const c_void),
            (_, Kind::I32) => ((&raw const integer[0]).cast(), (&raw const integer[1]).cast()),
            (_, Kind::F64) => ((&raw const host[0]).cast(), (&raw const host[1]).cast()),
            _ => ((&raw const narrow[0]).cast(), (&raw const narrow[1]).cast()),
        };
        let (workspace, _) = self.workspace.device_ptr(&self.stream);
        // SAFETY: by the caller; the factors outlive the call (those of the host are read at once).
        unsafe {
            result::matmul(
                self.handle,
                plan.desc.0,
                alpha,
                beta,
                b as *const c_void,
                plan.a.0,
                a as *const c_void,
                plan.b.0,
                c as *const c_void,
                plan.y.0,
                y as *mut c_void,
                plan.y.0,
                &plan.algo,
                workspace as *mut c_void,
                WORKSPACE,
                self.stream.cu_stream().cast(),
            )
        }
        .map_err(failed(key))
    }

    fn plan(&self, key: &Key) -> Result<Arc<Plan>> {
        let mut plans = self.plans.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(plan) = plans.get(key) {
            return Ok(plan.clone());
        }
        let plan = Arc::new(self.build(key)?);
        plans.insert(*key, plan.clone());
        Ok(plan)
    }

    fn build(&self, key: &Key) -> Result<Plan> {
        use sys::cublasComputeType_t as Compute;
        let s = key.shape;
        let (compute, scale) = match key.y {
            Kind::I32 => (Compute::CUBLAS_COMPUTE_32I, Kind::I32),
            Kind::F64 => (Compute::CUBLAS_COMPUTE_64F, Kind::F64),
            _ => (Compute::CUBLAS_COMPUTE_32F, Kind::F32),
        };
        let desc = result::create_matmul_desc(compute, data_type(scale)?).map_err(failed(key))?;
        let desc = Owned(desc, result::destroy_matmul_desc);
        // Their A is our B and the other way round.
        let layout = |rows: usize, cols: usize, kind: Kind, stride: usize| -> Result<_> {
            let layout = result::create_matrix_layout(data_type(kind)?, rows as u64, cols as u64, rows.max(1) as i64);
            let layout = Owned(layout.map_err(failed(key))?, result::destroy_matrix_layout);
            let (count, stride) = (s.batch as i32, stride as i64);
            use sys::cublasLtMatrixLayoutAttribute_t as Attribute;
            // SAFETY: the layout was just made; the attributes have these types.
            unsafe {
                let attribute = Attribute::CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT;
                result::set_matrix_layout_attribute(layout.0, attribute, (&raw const count).cast(), 4).map_err(failed(key))?;
                let attribute = Attribute::CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET;
                result::set_matrix_layout_attribute(layout.0, attribute, (&raw const stride).cast(), 8).map_err(failed(key))?;
            }
            Ok(layout)
        };
        let step = |batched: bool, size: usize| if batched { size } else { 0 };
        let (b_rows, b_cols) = if s.tb { (s.k, s.n) } else { (s.n, s.k) };
        let (a_rows, a_cols) = if s.ta { (s.m, s.k) } else { (s.k, s.m) };
        let a = layout(b_rows, b_cols, key.b, step(s.batch_b, s.k * s.n))?;
        let b = layout(a_rows, a_cols, key.a, step(s.batch_a, s.m * s.k))?;
        let y = layout(s.n, s.m, key.y, step(s.batch > 1, s.m * s.n))?;
        use sys::cublasLtMatmulDescAttributes_t as Attribute;
        let op = i32::from; // CUBLAS_OP_N is 0, CUBLAS_OP_T is 1
        let (op_a, op_b): (i32, i32) = (op(s.tb), op(s.ta));
        let pointer_mode = i32::from(key.device_factors); // CUBLASLT_POINTER_MODE_HOST is 0, _DEVICE is 1
        let preference = Owned(result::create_matmul_pref().map_err(failed(key))?, result::destroy_matmul_pref);
        let (bytes, alignment) = (WORKSPACE, key.alignment as u32);
        use sys::cublasLtMatmulPreferenceAttributes_t as Preference;
        // SAFETY: everything passed was made above and has the type the attribute asks for.
        let heuristic = unsafe {
            for (attribute, value) in [
                (Attribute::CUBLASLT_MATMUL_DESC_TRANSA, &op_a),
                (Attribute::CUBLASLT_MATMUL_DESC_TRANSB, &op_b),
                (Attribute::CUBLASLT_MATMUL_DESC_POINTER_MODE, &pointer_mode),
            ] {
                result::set_matmul_desc_attribute(desc.0, attribute, (&raw const *value).cast(), 4).map_err(failed(key))?;
            }
            let attribute = Preference::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
            result::set_matmul_pref_attribute(preference.0, attribute, (&raw const bytes).cast(), size_of::<usize>())
                .map_err(failed(key))?;
            for attribute in [
                Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
                Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
                Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
                Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
            ] {
                result::set_matmul_pref_attribute(preference.0, attribute, (&raw const alignment).cast(), 4)
                    .map_err(failed(key))?;
            }
            result::get_matmul_algo_heuristic(self.handle, desc.0, a.0, b.0, y.0, y.0, preference.0).map_err(failed(key))?
        };
        Ok(Plan { desc, a, b, y, algo: heuristic.algo })
    }
}

impl Drop for Blas {
    fn drop(&mut self) {
        self.plans.lock().unwrap_or_else(|e| e.into_inner()).clear();
        // SAFETY: it was made once and is destroyed once, after the plans; an error at exit has nobody to go to.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}
