//! GPTQ on the GPU: the Hessian is summed in `f64` from products of 16-bit or `f32` inputs with sums in `f32`, its factor found in
//! `f64`, the sweep done in `f32`. What is computed, and why, is in [`crate::quant::Gptq`].

use std::ffi::c_void;
use std::sync::Arc;

use cudarc::driver::sys::{CUDA_MEMCPY2D_st, CUmemorytype, cuMemcpy2DAsync_v2};

use super::ops::{Outputs, code, device, ptr_of, quant, quantise};
use super::{CudaBuffer, CudaDevice, driver_error, ffi, solver};
use crate::grid::Quantized;
use crate::linalg::matmul;
use crate::quant::{QuantSpec, QuantizedLinear};
use crate::{DType, Device, Error, Result, Tensor};

/// Rows that one product sums over before it is added up in `f64`.
const ROWS: usize = 4096;
/// Columns that are swept on chip.
const COLUMNS: usize = 128;

/// `sum += xᵀ x` for sum `[n, n]` in `f64`.
pub(crate) fn add_gram(sum: &Tensor, x: &Tensor) -> Result<()> {
    let (d, rows) = (device(sum)?, x.rows());
    let x = x.clone().reshape([rows, x.cols()])?;
    for first in (0..rows).step_by(ROWS) {
        let part = x.slice(first, ROWS.min(rows - first))?;
        let part = matmul::product(&part, true, &part, false, false, DType::F32)?;
        let count = sum.len() as i64;
        // SAFETY: both have n² values.
        d.launch("hessian", |s| unsafe { ffi::sq_hessian_add(ptr_of(sum).cast(), ptr_of(&part).cast(), count, s) })?;
    }
    Ok(())
}

/// `scale · sum`, both triangles from the lower one; fails where the diagonal is not finite.
pub(crate) fn finish(sum: Tensor, scale: f64) -> Result<Tensor> {
    let (d, n) = (device(&sum)?, sum.cols() as i64);
    // SAFETY: n² values.
    d.launch("hessian", |s| unsafe { ffi::sq_hessian_finish(ptr_of(&sum).cast(), scale, n, s) })?;
    Ok(sum)
}

/// The diagonal, and whether every value is finite.
pub(crate) fn diagonal(h: &Tensor) -> Result<(Vec<f64>, bool)> {
    let (d, n) = (device(h)?, h.cols());
    let (diagonal, flag) = (d.alloc(&[n], DType::F64)?, d.zeros(1, DType::U32)?);
    // SAFETY: n² values, n values, one flag.
    d.launch("hessian", |s| unsafe {
        ffi::sq_hessian_diagonal(ptr_of(&diagonal).cast(), flag.address(0).cast(), ptr_of(h).cast(), n as i64, s)
    })?;
    let mut bad = [0u8; 4];
    flag.download(0, &mut bad)?;
    Ok((diagonal.to_vec()?, bad == [0; 4]))
}

/// The order of a sweep on the device; `None` where it is the columns' own.
#[derive(Clone)]
pub(crate) struct Order(Option<Arc<CudaBuffer>>);

impl Order {
    pub(crate) fn new(d: &CudaDevice, order: &[usize]) -> Result<Self> {
        if order.iter().enumerate().all(|(i, &j)| i == j) {
            return Ok(Self(None));
        }
        let order: Vec<u32> = order.iter().map(|&i| i as u32).collect();
        Ok(Self(Some(Arc::new(d.upload(bytemuck::cast_slice(&order), DType::U32)?))))
    }

    fn address(&self) -> *const u32 {
        self.0.as_ref().map_or(std::ptr::null(), |b| b.address(0).cast_const().cast())
    }
}

/// U in `f32`, of H with `add` on its diagonal (dead columns at 1), in the order of the sweep; `None` where that is not positive
/// definite.
pub(crate) fn factor(h: &Tensor, order: &Order, add: f64) -> Result<Option<Tensor>> {
    let (d, n) = (device(h)?, h.cols() as i64);
    let a = d.alloc(h.shape(), DType::F64)?;
    // SAFETY: all have n² values, the order n.
    d.launch("damping", |s| unsafe { ffi::sq_gptq_damp(ptr_of(&a).cast(), ptr_of(h).cast(), order.address(), add, n, s) })?;
    let Some(inverse) = solver::invert_cholesky(&d, a)? else { return Ok(None) };
    let u = d.alloc(h.shape(), DType::F32)?;
    // SAFETY: both have n² values.
    d.launch("factor", |s| unsafe { ffi::sq_gptq_upper(ptr_of(&u).cast(), ptr_of(&inverse).cast(), n, s) })?;
    Ok(is_finite(&u)?.then_some(u))
}

fn is_finite(t: &Tensor) -> Result<bool> {
    let d = device(t)?;
    let flag = d.zeros(1, DType::U32)?;
    let (count, dtype) = (t.len() as i64, code(t.dtype())?);
    // SAFETY: as many values as said, one flag.
    d.launch("not_finite", |s| unsafe { ffi::sq_not_finite(flag.address(0).cast(), ptr_of(t), count, dtype, s) })?;
    let mut bad = [0u8; 4];
    flag.download(0, &mut bad)?;
    Ok(bad == [0; 4])
}

/// What a sweep needs besides the weight.
pub(crate) struct Sweep<'a> {
    pub u: &'a Tensor,
    pub order: &'a Order,
    /// Columns that the input never uses.
    pub dead: &'a [usize],
    /// Columns at which blocks end, in order.
    pub ends: &'a [usize],
    /// Grids of groups are found when the sweep comes to them.
    pub grids_on_the_way: bool,
}

/// Sweeps one weight.
pub(crate) fn sweep(weight: &Tensor, spec: &QuantSpec, s: &Sweep<'_>) -> Result<QuantizedLinear> {
    let d = device(weight)?;
    let (rows, n) = (weight.rows(), weight.cols());
    let group = spec.group_size(n)?;
    let groups = n.div_ceil(group);
    if !is_finite(weight)? {
        return Err(Error::numeric("GPTQ", "the weight holds NaN or infinite values"));
    }
    let mut dead = vec![0u8; if s.dead.is_empty() { 0 } else { n }];
    s.dead.iter().for_each(|&i| dead[i] = 1);
    let dead = (!dead.is_empty()).then(|| d.upload(&dead, DType::F16)).transpose()?;
    let dead = dead.as_ref().map_or(std::ptr::null(), |b| b.address(0).cast_const().cast());

    let (scale, zero) = (d.alloc(&[rows, groups], DType::F32)?, d.alloc(&[rows, groups], DType::F32)?);
    let grids = |from: &Tensor, scale: &Tensor, zero: &Tensor| {
        let out = Outputs { codes: std::ptr::null_mut(), scale: ptr_of(scale).cast(), zero: ptr_of(zero).cast() };
        quantise(from, spec, std::ptr::null_mut(), out)
    };
    let gather = |order: *const u32| -> Result<Tensor> {
        let (w, dtype) = (d.alloc(&[rows, n], DType::F32)?, code(weight.dtype())?);
        // SAFETY: both have rows · n values, the others n or none.
        d.launch("gather", |st| unsafe {
            ffi::sq_gptq_gather(ptr_of(&w).cast(), ptr_of(weight), dead, order, rows as i64, n as i64, dtype, st)
        })?;
        Ok(w)
    };
    let mut w = None;
    if !s.grids_on_the_way {
        let own = gather(std::ptr::null())?;
        grids(&own, &scale, &zero)?;
        w = s.order.0.is_none().then_some(own);
    }
    let w = w.map_or_else(|| gather(s.order.address()), Ok)?;

    let y = d.alloc(weight.shape(), weight.dtype())?;
    let codes =
        CudaBuffer { data: d.alloc_bytes(2 * rows * n, "quantised codes")?, len: rows * n, dtype: DType::F16, device: d.clone() };
    let loss = Tensor::zeros([rows], DType::F64, &Device::Cuda(d.clone()))?;
    let mut start = 0usize;
    for &end in s.ends {
        if s.grids_on_the_way {
            let first = start.next_multiple_of(group);
            let count = end.saturating_sub(first).div_ceil(group);
            if count > 0 {
                let tile = d.alloc(&[rows, count * group], DType::F32)?;
                let part = [d.alloc(&[rows, count], DType::F32)?, d.alloc(&[rows, count], DType::F32)?];
                copy_columns(&d, &tile, 0, &w, first, count * group)?;
                grids(&tile, &part[0], &part[1])?;
                for (whole, part) in [&scale, &zero].into_iter().zip(&part) {
                    copy_columns(&d, whole, first / group, part, 0, count)?;
                }
            }
        }
        while start < end {
            let width = COLUMNS.min(end - start);
            let errors = d.alloc(&[rows, width], DType::F32)?;
            let (dtype, grid) = (code(weight.dtype())?, quant(spec));
            let f = |t: &Tensor| ptr_of(t).cast::<f32>();
            // SAFETY: sizes as kernels.h asks.
            d.launch("gptq sweep", |st| unsafe {
                ffi::sq_gptq_sweep(
                    ptr_of(&y),
                    codes.address(0).cast(),
                    f(&errors),
                    ptr_of(&loss).cast(),
                    f(&w),
                    f(s.u),
                    f(&scale),
                    f(&zero),
                    s.order.address(),
                    rows as i64,
                    n as i64,
                    start as i64,
                    width as i64,
                    grid,
                    dtype,
                    st,
                )
            })?;
            solver::add_product(&d, &w, start + width, &errors, s.u, start)?;
            start += width;
        }
    }
    let mut host = vec![0i16; rows * n];
    codes.download(0, bytemuck::cast_slice_mut(&mut host))?;
    let (cpu, shape) = (Device::Cpu, weight.shape().to_vec());
    let (scale, zero) = (scale.to_device(&cpu)?, zero.to_device(&cpu)?);
    let loss = loss.to_vec::<f64>()?.iter().sum();
    let codes = Quantized { shape, group, codes: host, scale, zero };
    Ok(QuantizedLinear { weight: y, codes: Some(codes), damping: None, loss: Some(loss) })
}

/// `to[:, a..a + count] = from[:, b..b + count]`, both `f32` with the same rows.
fn copy_columns(d: &CudaDevice, to: &Tensor, a: usize, from: &Tensor, b: usize, count: usize) -> Result<()> {
    if to.rows() == 0 {
        return Ok(());
    }
    let at = |t: &Tensor, column: usize| ptr_of(t) as u64 + 4 * column as u64;
    let copy = CUDA_MEMCPY2D_st {
        srcMemoryType: CUmemorytype::CU_MEMORYTYPE_DEVICE,
        srcDevice: at(from, b),
        srcPitch: 4 * from.cols(),
        dstMemoryType: CUmemorytype::CU_MEMORYTYPE_DEVICE,
        dstDevice: at(to, a),
        dstPitch: 4 * to.cols(),
        WidthInBytes: 4 * count,
        Height: to.rows(),
        srcXInBytes: 0,
        srcY: 0,
        srcHost: std::ptr::null::<c_void>(),
        srcArray: std::ptr::null_mut(),
        dstXInBytes: 0,
        dstY: 0,
        dstHost: std::ptr::null_mut(),
        dstArray: std::ptr::null_mut(),
    };
    d.bind()?;
    // SAFETY: both ranges are inside live tensors, and the copy is in stream order with their release.
    unsafe { cuMemcpy2DAsync_v2(&copy, d.stream().cu_stream()) }.result().map_err(driver_error("copy of columns"))
}
