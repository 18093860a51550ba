//! GPTQ on the GPU: the Hessian is summed in `f64` from products of 16-bit or `f32` inputs with sums in `f32`, its factor found in
//! `f64`, the sweep done in `f32`. What is computed, and why, is in [`Gptq`](super::Gptq).

use std::sync::Arc;

use crate::device::cuda::{CudaBuffer, CudaDevice, Queue};
use crate::device::ffi;
use crate::device::launch::{Check, Kind, View, Work};
use crate::grid::{QuantSpec, Quantized};
use crate::linalg::{factor as cpu_factor, matmul};
use crate::ops::clipped_fake_quant::gpu_grids as clipped_grids;
use crate::ops::fake_quant::{gpu_grids, launch_spec};
use crate::quant::correction::Terms;
use crate::quant::{QuantizedLinear, correction_gpu};
use crate::{DType, Device, Error, Result, Tensor};

/// Rows that one product sums over before it is added up in `f64`.
const ROWS: usize = 4096;
/// Columns that are swept on chip.
const COLUMNS: usize = 128;
/// The same with a correction, whose terms need their room too.
const CORRECTED_COLUMNS: usize = 64;

/// `sum += aᵀ b` for sum `[n, n]` in `f64`.
pub(super) fn add_products(d: &CudaDevice, sum: &Tensor, a: &Tensor, b: &Tensor) -> Result<()> {
    let rows = a.rows();
    let [a, b] = [a, b].map(|t| t.clone().reshape([rows, t.cols()]));
    let (a, b) = (a?, b?);
    for first in (0..rows).step_by(ROWS) {
        let [a, b] = [&a, &b].map(|t| t.slice(first, ROWS.min(rows - first)));
        let part = matmul::product(&a?, true, &b?, false, false, DType::F32)?;
        launch_add(d.queue(), sum.view()?, part.view()?)?;
    }
    Ok(())
}

/// `sum` (`f64`) `+= part` (`f32`).
fn launch_add(queue: Queue<'_>, sum: View<'_>, part: View<'_>) -> Result<()> {
    let c = Check::new("hessian", queue);
    let n = sum.len();
    let (sum, part) = (c.operand("sum", sum, Kind::F64, n)?, c.operand("part", part, Kind::F32, n)?);
    let count = c.long(n)?;
    // SAFETY: both are n values.
    c.launch(Work::of("hessian"), |s| unsafe { ffi!(sq_hessian_add(sum, part, count, s)) })
}

/// `scale · sum`, both triangles from the lower one, in its own memory.
pub(super) fn finish(d: &CudaDevice, sum: Tensor, scale: f64) -> Result<Tensor> {
    launch_finish(d.queue(), sum.view()?, scale, sum.cols())?;
    Ok(sum)
}

/// `h` (`f64`, n×n) = scale times its lower triangle, mirrored.
fn launch_finish(queue: Queue<'_>, h: View<'_>, scale: f64, n: usize) -> Result<()> {
    let c = Check::new("hessian", queue);
    let (h, n) = (c.operand("H", h, Kind::F64, c.product(&[n, n])?)?, c.long(n)?);
    // SAFETY: n · n values.
    c.launch(Work::of("hessian"), |s| unsafe { ffi!(sq_hessian_finish(h, scale, n, s)) })
}

/// `scale · sum`, in its own memory.
pub(super) fn scaled(d: &CudaDevice, sum: Tensor, scale: f64) -> Result<Tensor> {
    launch_scale(d.queue(), sum.view()?, scale)?;
    Ok(sum)
}

/// `x` (`f64`) = scale times it.
fn launch_scale(queue: Queue<'_>, x: View<'_>, scale: f64) -> Result<()> {
    let c = Check::new("drift", queue);
    let n = x.len();
    let (x, count) = (c.operand("D", x, Kind::F64, n)?, c.long(n)?);
    // SAFETY: n values.
    c.launch(Work::of("drift"), |s| unsafe { ffi!(sq_drift_scale(x, scale, count, s)) })
}

/// The diagonal, and whether every value is finite.
pub(super) fn diagonal(d: &CudaDevice, h: &Tensor) -> Result<(Vec<f64>, bool)> {
    let (h, n) = (h.clone().aligned()?, h.cols());
    let (diagonal, flag) = (Tensor::on(d, &[n], DType::F64)?, d.zeros(1, Kind::I32)?);
    launch_diagonal(d.queue(), diagonal.view()?, flag.view(), h.view()?, n)?;
    Ok((diagonal.to_vec()?, !raised(&flag)?))
}

/// The diagonal of h (both `f64`), and a flag (`i32`, not cleared first) raised where any value of h is not finite.
fn launch_diagonal(queue: Queue<'_>, diagonal: View<'_>, flag: View<'_>, h: View<'_>, n: usize) -> Result<()> {
    let c = Check::new("hessian", queue);
    let diagonal = c.operand("diagonal", diagonal, Kind::F64, n)?;
    let flag = c.operand("flag", flag, Kind::I32, 1)?;
    let h = c.operand("H", h, Kind::F64, c.product(&[n, n])?)?;
    let n = c.long(n)?;
    // SAFETY: n · n values, n values, one flag.
    c.launch(Work::of("hessian"), |s| unsafe { ffi!(sq_hessian_diagonal(diagonal, flag, h, n, s)) })
}

/// Whether a kernel raised its flag.
fn raised(flag: &CudaBuffer) -> Result<bool> {
    let mut raised = [0u8; 4];
    flag.download(0, &mut raised)?;
    Ok(raised != [0; 4])
}

/// The order of a sweep on the device; `None` where it is the columns' own.
#[derive(Clone)]
pub(super) struct Order(Option<Arc<CudaBuffer>>);

impl Order {
    pub(super) fn new(d: &CudaDevice, order: &[usize]) -> Result<Self> {
        if order.iter().enumerate().all(|(i, &j)| i == j) {
            return Ok(Self(None));
        }
        let order: Vec<u32> = order.iter().map(|&i| i as u32).collect();
        Ok(Self(Some(Arc::new(d.upload(bytemuck::cast_slice(&order), Kind::U32)?))))
    }

    pub(super) fn view(&self) -> Option<View<'_>> {
        self.0.as_ref().map(|b| b.view())
    }
}

/// U in `f32`, of H with `add` on its diagonal (dead columns at 1), in the order of the sweep, and the same in `f64`, reversed: L⁻¹ below the
/// diagonal, and nothing of use above. `None` where that is not positive definite.
pub(super) fn factor(d: &CudaDevice, h: &Tensor, order: &Order, add: f64) -> Result<Option<(Tensor, Tensor)>> {
    let (h, n) = (h.clone().aligned()?, h.cols());
    let a = Tensor::on(d, h.shape(), DType::F64)?;
    // SAFETY: the order is one of the columns.
    unsafe { launch_damp(d.queue(), a.view()?, h.view()?, order.view(), add, n)? };
    let Some(inverse) = invert_cholesky(d, a)? else { return Ok(None) };
    let u = Tensor::on(d, h.shape(), DType::F32)?;
    launch_upper(d.queue(), u.view()?, inverse.view()?, n)?;
    Ok(is_finite(d, &u)?.then_some((u, inverse)))
}

/// L⁻¹ below the diagonal, with `A = L Lᵀ`, in the memory of A; without cuSOLVER the CPU does it. `None` where A is not positive definite.
fn invert_cholesky(d: &CudaDevice, a: Tensor) -> Result<Option<Tensor>> {
    let n = a.cols();
    if let Some(definite) = d.invert_cholesky(a.view()?, n)? {
        return Ok(definite.then_some(a));
    }
    let a = a.to_device(&Device::Cpu)?.into_vec()?;
    let Some(l) = cpu_factor::cholesky(&a, n) else { return Ok(None) };
    let inverse = cpu_factor::invert_lower(&l, n);
    Ok(Some(Tensor::from_vec(inverse, [n, n])?.to_device(&Device::Cuda(d.clone()))?))
}

/// What is factored (`f64`, n×n), from H in an order of its columns (`u32`; their own for none).
///
/// # Safety
/// The order names columns below n: the kernel does not look.
unsafe fn launch_damp(queue: Queue<'_>, a: View<'_>, h: View<'_>, order: Option<View<'_>>, add: f64, n: usize) -> Result<()> {
    let c = Check::new("damping", queue);
    let square = c.product(&[n, n])?;
    let (a, h) = (c.operand("a", a, Kind::F64, square)?, c.operand("H", h, Kind::F64, square)?);
    let order = c.optional("order", order, Kind::U32, n)?;
    let n = c.long(n)?;
    // SAFETY: both are n · n values, the order n; that it names columns is the caller's word.
    c.launch(Work::of("damping"), |s| unsafe { ffi!(sq_gptq_damp(a, h, order, add, n, s)) })
}

/// U (`f32`) from the inverse (`f64`) of a lower factor; both n×n.
fn launch_upper(queue: Queue<'_>, u: View<'_>, inverse: View<'_>, n: usize) -> Result<()> {
    let c = Check::new("factor", queue);
    let square = c.product(&[n, n])?;
    let u = c.operand("U", u, Kind::F32, square)?;
    let inverse = c.operand("inverse", inverse, Kind::F64, square)?;
    let n = c.long(n)?;
    // SAFETY: both are n · n values.
    c.launch(Work::of("factor"), |s| unsafe { ffi!(sq_gptq_upper(u, inverse, n, s)) })
}

fn is_finite(d: &CudaDevice, t: &Tensor) -> Result<bool> {
    let flag = d.zeros(1, Kind::I32)?;
    launch_not_finite(d.queue(), flag.view(), t.view()?)?;
    Ok(!raised(&flag)?)
}

/// A flag (`i32`, not cleared first) raised where any value is not finite.
fn launch_not_finite(queue: Queue<'_>, flag: View<'_>, x: View<'_>) -> Result<()> {
    let c = Check::new("not_finite", queue);
    let (n, kind) = (x.len(), x.kind());
    let (flag, x) = (c.operand("flag", flag, Kind::I32, 1)?, c.operand("x", x, kind, n)?);
    let (count, dtype) = (c.long(n)?, c.code(kind)?);
    // SAFETY: n values, one flag.
    c.launch(Work::of("not_finite"), |s| unsafe { ffi!(sq_not_finite(flag, x, count, dtype, s)) })
}

/// What a sweep needs besides the weight.
pub(super) struct Sweep<'a> {
    pub u: &'a Tensor,
    pub order: &'a Order,
    /// Columns that the input never uses.
    pub dead: &'a [usize],
    /// Columns at which blocks end, in order.
    pub ends: &'a [usize],
    /// Grids of groups are found when the sweep comes to them.
    pub grids_on_the_way: bool,
    /// C and P of a correction.
    pub terms: &'a Terms<Tensor>,
    /// β of FOEM.
    pub pull: Option<f64>,
    /// Logarithms `[groups of all rows, 2]` of learned clip ratios.
    pub clips: Option<&'a Tensor>,
}

/// Sweeps one weight.
pub(super) fn sweep(d: &CudaDevice, weight: &Tensor, spec: &QuantSpec, s: &Sweep<'_>) -> Result<QuantizedLinear> {
    let weight = &weight.clone().aligned()?;
    let (rows, n) = (weight.rows(), weight.cols());
    let group = spec.group_size(n)?;
    let groups = n.div_ceil(group);
    if !is_finite(d, weight)? {
        return Err(Error::numeric("GPTQ", "the weight holds NaN or infinite values"));
    }
    let (shape, dtype) = (weight.shape().to_vec(), weight.dtype());
    let corrected = s.terms.target.as_ref().map(|c| correction_gpu::target(d, weight, c)).transpose()?;
    let weight = corrected.as_ref().unwrap_or(weight);
    let mut dead = vec![0u8; if s.dead.is_empty() { 0 } else { n }];
    s.dead.iter().for_each(|&i| dead[i] = 1);
    let dead = (!dead.is_empty()).then(|| d.upload(&dead, Kind::U8)).transpose()?;
    let dead = dead.as_ref().map(|b| b.view());

    let new = |shape: [usize; 2]| Tensor::on(d, &shape, DType::F32);
    let (mut scale, mut zero) = (new([rows, groups])?, new([rows, groups])?);
    let gather = |order: Option<View<'_>>| -> Result<Tensor> {
        let w = new([rows, n])?;
        // SAFETY: the order is one of the columns.
        unsafe { launch_gather(d.queue(), w.view()?, weight.view()?, dead, order, n)? };
        Ok(w)
    };
    let mut w = None;
    if !s.grids_on_the_way {
        let own = gather(None)?;
        [scale, zero] = match s.clips {
            None => gpu_grids(d, &own, spec)?,
            Some(a) => clipped_grids(d, &own, spec, a)?,
        };
        w = s.order.0.is_none().then_some(own);
    }
    let w = w.map_or_else(|| gather(s.order.view()), Ok)?;

    // What FOEM pulls back to.
    let original = s.pull.map(|_| -> Result<Tensor> {
        let copy = new([rows, n])?;
        d.copy(copy.view()?, w.view()?)?;
        Ok(copy)
    });
    let original = original.transpose()?;
    let is_corrected = original.is_some() || s.terms.forward.is_some();
    let columns = if is_corrected { CORRECTED_COLUMNS } else { COLUMNS };
    let y = Tensor::on(d, &shape, dtype)?;
    let codes = d.buffer(rows * n, Kind::I16, "quantised codes")?;
    let loss = Tensor::zeros([rows], DType::F64, &Device::Cuda(d.clone()))?;
    let mut start = 0usize;
    for &end in s.ends {
        if s.grids_on_the_way {
            let first = start.next_multiple_of(group);
            let count = end.saturating_sub(first).div_ceil(group);
            if count > 0 {
                let tile = new([rows, count * group])?;
                d.copy_columns((tile.view()?, count * group, 0), (w.view()?, n, first), count * group)?;
                let part = match s.clips {
                    None => gpu_grids(d, &tile, spec)?,
                    Some(a) => {
                        let (a, these) = (a.to_device(&Device::Cuda(d.clone()))?.aligned()?, new([rows, 2 * count])?);
                        d.copy_columns((these.view()?, 2 * count, 0), (a.view()?, 2 * groups, 2 * (first / group)), 2 * count)?;
                        clipped_grids(d, &tile, spec, &these.reshape([rows * count, 2])?)?
                    }
                };
                for (whole, part) in [&scale, &zero].into_iter().zip(&part) {
                    d.copy_columns((whole.view()?, groups, first / group), (part.view()?, count, 0), count)?;
                }
            }
        }
        while start < end {
            let width = columns.min(end - start);
            let errors = new([rows, width])?;
            let latent = s.terms.forward.as_ref().map(|_| new([rows, width])).transpose()?;
            let to = Swept {
                y: y.view()?,
                codes: codes.view(),
                errors: errors.view()?,
                latent: latent.as_ref().map(Tensor::view).transpose()?,
                loss: loss.view()?,
            };
            let from = Sweeping {
                w: w.view()?,
                u: s.u.view()?,
                forward: s.terms.forward.as_ref().map(Tensor::view).transpose()?,
                original: original.as_ref().map(Tensor::view).transpose()?,
                pull: s.pull.unwrap_or(0.0) as f32,
                scale: scale.view()?,
                zero: zero.view()?,
                order: s.order.view(),
                n,
                columns: start..start + width,
            };
            // SAFETY: the order is one of the columns.
            unsafe { launch_sweep(d.queue(), &to, &from, spec)? };
            d.add_product(w.view()?, start + width, errors.view()?, s.u.view()?, start, [rows, n, width])?;
            if let (Some(latent), Some(p)) = (&latent, &s.terms.forward) {
                d.add_product(w.view()?, start + width, latent.view()?, p.view()?, start, [rows, n, width])?;
            }
            start += width;
        }
    }
    let mut host = vec![0i16; rows * n];
    codes.download(0, bytemuck::cast_slice_mut(&mut host))?;
    let cpu = Device::Cpu;
    let (scale, zero) = (scale.to_device(&cpu)?, zero.to_device(&cpu)?);
    let loss = loss.to_vec::<f64>()?.iter().sum();
    let codes = Quantized { shape, group, codes: host, scale, zero };
    Ok(QuantizedLinear { weight: y, codes: Some(codes), damping: None, loss: Some(loss) })
}

/// `w` (`f32`) = rows of n values of x in an order of their columns (`u32`; their own for none), 0 in dead ones (`u8`, 1 where dead).
///
/// # Safety
/// The order names columns below n: the kernel does not look.
unsafe fn launch_gather(
    queue: Queue<'_>,
    w: View<'_>,
    x: View<'_>,
    dead: Option<View<'_>>,
    order: Option<View<'_>>,
    n: usize,
) -> Result<()> {
    let c = Check::new("gather", queue);
    let (len, kind) = (x.len(), x.kind());
    let rows = c.rows(len, n)?;
    let (w, x) = (c.operand("w", w, Kind::F32, len)?, c.operand("x", x, kind, len)?);
    let dead = c.optional("dead columns", dead, Kind::U8, n)?;
    let order = c.optional("order", order, Kind::U32, n)?;
    let (rows, n, dtype) = (c.long(rows)?, c.long(n)?, c.code(kind)?);
    // SAFETY: both have rows · n values, the others n or none; that the order names columns is the caller's word.
    c.launch(Work::of("gather"), |s| unsafe { ffi!(sq_gptq_gather(w, x, dead, order, rows, n, dtype, s)) })
}

/// What a sweep over some columns writes.
struct Swept<'a> {
    /// `[rows, n]` of the weight's kind, in its own columns.
    y: View<'a>,
    /// The same in `i16`.
    codes: View<'a>,
    /// `[rows, width]` in `f32`.
    errors: View<'a>,
    /// The same: weights before rounding, within their grids; only with P.
    latent: Option<View<'a>>,
    /// One a row in `f64`, added to.
    loss: View<'a>,
}

/// What it reads: all `f32`, but the order in `u32`.
struct Sweeping<'a> {
    /// `[rows, n]` in the order of the sweep.
    w: View<'a>,
    /// `[n, n]`.
    u: View<'a>,
    /// P `[n, n]`.
    forward: Option<View<'a>>,
    /// `[rows, n]` in the order of the sweep, what β pulls back to.
    original: Option<View<'a>>,
    /// β.
    pull: f32,
    /// `[rows, groups]`.
    scale: View<'a>,
    /// `[rows, groups]`.
    zero: View<'a>,
    /// n columns; their own for none.
    order: Option<View<'a>>,
    n: usize,
    columns: std::ops::Range<usize>,
}

/// Sweeps at most 128 columns, 64 with P or β.
///
/// # Safety
/// The order names columns below n: the kernel does not look.
unsafe fn launch_sweep(queue: Queue<'_>, to: &Swept<'_>, from: &Sweeping<'_>, spec: &QuantSpec) -> Result<()> {
    let c = Check::new("gptq sweep", queue);
    let (n, start, width, len, kind) = (from.n, from.columns.start, from.columns.len(), from.w.len(), to.y.kind());
    let rows = c.rows(len, n)?;
    let groups = c.product(&[rows, n.div_ceil(spec.group_size(n)?)])?;
    let most = if from.forward.is_some() || from.original.is_some() { CORRECTED_COLUMNS } else { COLUMNS };
    if from.columns.end > n || width > most || from.forward.is_some() != to.latent.is_some() {
        return Err(Error::argument("gptq sweep", format!("columns {:?} of {n}, at most {most}", from.columns)));
    }
    let (y, codes) = (c.operand("y", to.y, kind, len)?, c.operand("codes", to.codes, Kind::I16, len)?);
    let errors = c.operand("errors", to.errors, Kind::F32, c.product(&[rows, width])?)?;
    let latent = c.optional("latent weights", to.latent, Kind::F32, c.product(&[rows, width])?)?;
    let loss = c.operand("loss", to.loss, Kind::F64, rows)?;
    let w = c.operand("w", from.w, Kind::F32, len)?;
    let u = c.operand("U", from.u, Kind::F32, c.product(&[n, n])?)?;
    let forward = c.optional("P", from.forward, Kind::F32, c.product(&[n, n])?)?;
    let (original, pull) = (c.optional("original weight", from.original, Kind::F32, len)?, from.pull);
    let scale = c.operand("scale", from.scale, Kind::F32, groups)?;
    let zero = c.operand("zero", from.zero, Kind::F32, groups)?;
    let order = c.optional("order", from.order, Kind::U32, n)?;
    let (rows, n, start, width) = (c.long(rows)?, c.long(n)?, c.long(start)?, c.long(width)?);
    let (quant, dtype) = (launch_spec(spec)?, c.code(kind)?);
    // SAFETY: sizes as kernels.h asks; that the order names columns is the caller's word.
    c.launch(Work::of("gptq sweep"), |s| unsafe {
        ffi!(sq_gptq_sweep(
            y, codes, errors, latent, loss, w, u, forward, original, pull, scale, zero, order, rows, n, start, width, quant,
            dtype, s
        ))
    })
}
