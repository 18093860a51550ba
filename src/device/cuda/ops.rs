//! Tensors in, tensors out: the calls of the launchers in `cuda/kernels.h`, without a tape.

use std::ffi::c_void;
use std::sync::Arc;

use cudarc::driver::{CudaSlice, DevicePtr};

use super::{CudaBuffer, CudaDevice, ffi};
use crate::grid::Quantized;
use crate::grid::{Clip, QuantSpec, Target};
use crate::hadamard::Hadamard;
use crate::ops::spread::Measure;
use crate::{DType, Error, Result, Tensor};

pub(super) fn device(t: &Tensor) -> Result<CudaDevice> {
    Ok(t.cuda()?.0.device().clone())
}

/// The address of a tensor's first value.
fn ptr(t: &Tensor) -> Result<*mut c_void> {
    let (buffer, start) = t.cuda()?;
    Ok(buffer.address(start))
}

/// Kernels read 16 bytes at a time: a slice that does not start on such a boundary is copied.
pub(super) fn aligned(t: Tensor) -> Result<Tensor> {
    if (ptr(&t)? as usize).is_multiple_of(16) {
        return Ok(t);
    }
    let y = device(&t)?.alloc(t.shape(), t.dtype())?;
    copy_into(&y, 0, &t)?;
    Ok(y)
}

/// Copies `from` to `y` from value number `start` on.
pub(super) fn copy_into(y: &Tensor, start: usize, from: &Tensor) -> Result<()> {
    let d = device(y)?;
    d.bind()?;
    let to = ptr(y)? as u64 + (start * y.dtype().size()) as u64;
    // SAFETY: both ranges are live tensors' and the copy is in stream order with their release.
    unsafe { cudarc::driver::result::memcpy_dtod_async(to, ptr(from)? as u64, from.bytes(), d.stream().cu_stream()) }
        .map_err(|e| Error::Cuda(format!("copy: {e:?}")))
}

/// See [`Tensor::stack`].
pub(crate) fn stack(parts: &[Tensor], shape: Vec<usize>) -> Result<Tensor> {
    let y = device(&parts[0])?.alloc(&shape, parts[0].dtype())?;
    let mut start = 0;
    for part in parts {
        if part.dtype() != y.dtype() {
            return Err(Error::dtype("stack", y.dtype(), part.dtype()));
        }
        copy_into(&y, start, part)?;
        start += part.len();
    }
    Ok(y)
}

/// A type as the launchers name it.
pub(crate) fn code(dtype: DType) -> Result<ffi::sq_dtype> {
    match dtype {
        DType::F32 => Ok(ffi::SQ_F32),
        DType::F16 => Ok(ffi::SQ_F16),
        DType::BF16 => Ok(ffi::SQ_BF16),
        other => Err(Error::dtype("a CUDA kernel", "f32, f16 or bf16", other)),
    }
}

/// Where to write a result of `x`'s shape and type: `x` itself when nobody else holds it.
fn in_place(x: &mut Tensor) -> Result<Tensor> {
    if x.is_unique() { Ok(x.clone()) } else { device(x)?.alloc(x.shape(), x.dtype()) }
}

/// A specification as the launchers take it.
pub(crate) fn quant(spec: &QuantSpec) -> ffi::sq_quant {
    ffi::sq_quant {
        bits: spec.bits as i32,
        symmetric: spec.symmetric.into(),
        weight: (spec.target == Target::Weight).into(),
        group: spec.group.unwrap_or(0) as i32,
        clip: match spec.clip {
            Clip::Ratio(r) => r as f32,
            Clip::Search => 1.0,
        },
    }
}

/// Another floating-point type.
pub(crate) fn cast(x: &Tensor, dtype: DType) -> Result<Tensor> {
    let d = device(x)?;
    let x = aligned(x.clone())?;
    let y = d.alloc(x.shape(), dtype)?;
    let wide = |t| if t == DType::F64 { Ok(ffi::SQ_F64) } else { code(t) };
    let (to, from) = (wide(dtype)?, wide(x.dtype())?);
    // SAFETY: both have x.len() values of the types named.
    d.launch_moving("cast", x.bytes() + y.bytes(), |s| unsafe {
        ffi::sq_cast(ptr_of(&y), to, ptr_of(&x), from, x.len() as i64, s)
    })?;
    Ok(y)
}

/// [`ptr`] of a tensor known to be on the GPU.
pub(crate) fn ptr_of(t: &Tensor) -> *mut c_void {
    ptr(t).expect("a tensor on the GPU")
}

/// `alpha a + beta b`, in place of `a` (or `b`) when unshared.
pub(crate) fn axpby(alpha: f64, a: Tensor, beta: f64, b: Option<Tensor>) -> Result<Tensor> {
    let d = device(&a)?;
    let mut a = aligned(a)?;
    let mut b = b.map(aligned).transpose()?;
    let dtype = code(a.dtype())?;
    let y = match &mut b {
        Some(b) if !a.is_unique() => in_place(b)?,
        _ => in_place(&mut a)?,
    };
    let n = a.len() as i64;
    let other = b.as_ref().map_or(std::ptr::null_mut(), ptr_of);
    // SAFETY: all have n values of one type; in place is allowed.
    let passes = 2 + usize::from(b.is_some());
    d.launch_moving("add", passes * a.bytes(), |s| unsafe {
        ffi::sq_axpby(ptr_of(&y), alpha as f32, ptr_of(&a), beta as f32, other, n, dtype, s)
    })?;
    Ok(y)
}

/// See [`crate::llama::synthetic`].
pub(crate) fn random_weights(
    d: &CudaDevice,
    shape: [usize; 2],
    key: (u64, u64),
    unit: f32,
    row: Option<&[f32]>,
    col: Option<&[f32]>,
    dtype: DType,
) -> Result<Tensor> {
    let upload = |v: Option<&[f32]>| v.map(|v| d.upload(bytemuck::cast_slice(v), DType::F32)).transpose();
    let (row, col) = (upload(row)?, upload(col)?);
    let at = |v: &Option<CudaBuffer>| v.as_ref().map_or(std::ptr::null(), |v| v.address(0).cast_const().cast());
    let y = d.alloc(&shape, dtype)?;
    let (rows, cols, code) = (shape[0] as i64, shape[1] as i64, code(dtype)?);
    // SAFETY: y is [rows, cols]; row and col are null or that long.
    d.launch("random weights", |s| unsafe {
        ffi::sq_random_weights(ptr_of(&y), rows, cols, key.0, key.1, unit, at(&row), at(&col), code, s)
    })?;
    Ok(y)
}

/// The bit-packed H_K on the device, uploaded once.
fn table(d: &CudaDevice, map: &Hadamard) -> Result<Option<Arc<CudaSlice<u8>>>> {
    if map.k() == 1 {
        return Ok(None);
    }
    let mut tables = d.0.tables.lock().unwrap_or_else(|e| e.into_inner());
    if let Some(t) = tables.get(&map.k()) {
        return Ok(Some(t.clone()));
    }
    let packed = map.packed();
    let t = Arc::new(d.upload(bytemuck::cast_slice(&packed), DType::U32)?.data);
    tables.insert(map.k(), t.clone());
    Ok(Some(t))
}

/// `H x` of every row (or `Hᵀ x`), then fake quantisation in the same pass where a spec is given.
pub(crate) fn hadamard(x: Tensor, map: &Hadamard, transpose: bool, spec: Option<&QuantSpec>) -> Result<Tensor> {
    let d = device(&x)?;
    let mut x = aligned(x)?;
    let y = in_place(&mut x)?;
    let size = map.n() / map.blocks();
    let rows = (x.len() / size.max(1)) as i64;
    let table = table(&d, map)?;
    let m = ffi::sq_hadamard_map {
        n: size as i32,
        k: map.k() as i32,
        transpose: transpose.into(),
        table: table.as_ref().map_or(std::ptr::null(), |t| t.device_ptr(d.stream()).0 as *const u32),
        signs: std::ptr::null(),
    };
    let dtype = code(x.dtype())?;
    // SAFETY: x and y have rows × size values; the table has K rows of ceil(K/32) words.
    let what = if spec.is_some() { "hadamard + quantise" } else { "hadamard" };
    d.launch_moving(what, 2 * x.bytes(), |s| unsafe {
        match spec {
            None => ffi::sq_hadamard(ptr_of(&y), ptr_of(&x), rows, m, dtype, s),
            Some(q) => ffi::sq_hadamard_fake_quant(ptr_of(&y), ptr_of(&x), rows, m, quant(q), dtype, s),
        }
    })?;
    Ok(y)
}

/// Quantise and dequantise.
pub(crate) fn fake_quant(x: Tensor, spec: &QuantSpec) -> Result<Tensor> {
    let mut x = aligned(x)?;
    let y = in_place(&mut x)?;
    quantise(&x, spec, ptr_of(&y), Outputs::default())?;
    Ok(y)
}

/// Optional outputs of the quantisation kernels.
#[derive(Clone, Copy)]
pub(super) struct Outputs {
    pub codes: *mut i16,
    pub scale: *mut f32,
    pub zero: *mut f32,
}

impl Default for Outputs {
    fn default() -> Self {
        Self { codes: std::ptr::null_mut(), scale: std::ptr::null_mut(), zero: std::ptr::null_mut() }
    }
}

/// Values to y and the rest to `out`, each where wanted (not null).
pub(super) fn quantise(x: &Tensor, spec: &QuantSpec, y: *mut c_void, out: Outputs) -> Result<()> {
    let (rows, cols, dtype, q) = (x.rows() as i64, x.cols() as i64, code(x.dtype())?, quant(spec));
    // SAFETY: every output is null or as large as kernels.h asks.
    let what = if spec.clip == Clip::Search { "clip search" } else { "quantise" };
    device(x)?.launch_moving(what, 2 * x.bytes(), |s| unsafe {
        let Outputs { codes, scale, zero } = out;
        match spec.clip {
            Clip::Ratio(_) => ffi::sq_fake_quant(y, codes, scale, zero, ptr_of(x), rows, cols, q, dtype, s),
            Clip::Search => {
                ffi::sq_fake_quant_search(y, codes, scale, zero, std::ptr::null_mut(), ptr_of(x), rows, cols, q, dtype, s)
            }
        }
    })
}

/// Codes and grids, brought to the CPU.
pub(crate) fn quantize(x: &Tensor, spec: &QuantSpec, group: usize) -> Result<Quantized> {
    let d = device(x)?;
    let x = aligned(x.clone())?;
    let shape = [x.rows(), x.cols().div_ceil(group)];
    let (scale, zero) = (d.alloc(&shape, DType::F32)?, d.alloc(&shape, DType::F32)?);
    let raw =
        CudaBuffer { data: d.alloc_bytes(2 * x.len(), "quantised codes")?, len: x.len(), dtype: DType::F16, device: d.clone() };
    let out = Outputs { codes: raw.address(0).cast(), scale: ptr_of(&scale).cast(), zero: ptr_of(&zero).cast() };
    quantise(&x, spec, std::ptr::null_mut(), out)?;
    let mut codes = vec![0i16; x.len()];
    raw.download(0, bytemuck::cast_slice_mut(&mut codes))?;
    let cpu = crate::Device::Cpu;
    Ok(Quantized { shape: x.shape().to_vec(), group, codes, scale: scale.to_device(&cpu)?, zero: zero.to_device(&cpu)? })
}

/// The address of a gain of the right type, or null.
fn gain_of(gain: Option<&Tensor>, dtype: DType) -> Result<*const c_void> {
    match gain {
        None => Ok(std::ptr::null()),
        Some(g) if g.dtype() == dtype => Ok(ptr(g)?),
        Some(g) => Err(Error::dtype("rms_norm: gain", dtype, g.dtype())),
    }
}

/// y and 1/rms of every row.
pub(crate) fn rms_norm_forward(x: &Tensor, gain: Option<&Tensor>, eps: f64) -> Result<(Tensor, Tensor)> {
    let d = device(x)?;
    let x = aligned(x.clone())?;
    let (y, inverse) = (d.alloc(x.shape(), x.dtype())?, d.alloc(&[x.rows()], DType::F32)?);
    let (rows, cols, dtype) = (x.rows() as i64, x.cols() as i64, code(x.dtype())?);
    let gain = gain_of(gain, x.dtype())?;
    // SAFETY: sizes as declared.
    d.launch_moving("norm", 2 * x.bytes(), |s| unsafe {
        ffi::sq_rms_norm_forward(ptr_of(&y), ptr_of(&inverse).cast(), ptr_of(&x), gain, rows, cols, eps as f32, dtype, s)
    })?;
    Ok((y, inverse))
}

/// dx, in place of dy when unshared.
pub(crate) fn rms_norm_backward(dy: Tensor, x: &Tensor, gain: Option<&Tensor>, inverse: &Tensor) -> Result<Tensor> {
    let d = device(x)?;
    let (mut dy, x) = (aligned(dy)?, aligned(x.clone())?);
    let dx = in_place(&mut dy)?;
    let (rows, cols, dtype) = (x.rows() as i64, x.cols() as i64, code(x.dtype())?);
    let gain = gain_of(gain, x.dtype())?;
    // SAFETY: sizes as declared; in place is allowed.
    d.launch_moving("norm", 3 * x.bytes(), |s| unsafe {
        ffi::sq_rms_norm_backward(ptr_of(&dx), ptr_of(&dy), ptr_of(&x), gain, ptr_of(inverse).cast(), rows, cols, dtype, s)
    })?;
    Ok(dx)
}

/// Rotary embedding of x [tokens, heads, dim] by tables [seq, dim/2].
pub(crate) fn rope(x: Tensor, cos: &Tensor, sin: &Tensor, transpose: bool) -> Result<Tensor> {
    let d = device(&x)?;
    let mut x = aligned(x)?;
    let y = in_place(&mut x)?;
    let &[tokens, heads, dim] = x.shape() else {
        return Err(Error::shape("rope", "[tokens, heads, dim]", x.shape()));
    };
    let (seq, dtype) = (cos.rows() as i64, code(x.dtype())?);
    let (c, sn) = (ptr_of(cos).cast(), ptr_of(sin).cast());
    // SAFETY: sizes as declared; in place is allowed.
    d.launch_moving("rope", 2 * x.bytes(), |s| unsafe {
        ffi::sq_rope(ptr_of(&y), ptr_of(&x), c, sn, tokens as i64, seq, heads as i32, dim as i32, transpose.into(), dtype, s)
    })?;
    Ok(y)
}

/// Batch, heads, KV heads and head size of q [tokens, heads, dim], k [tokens, kv_heads, dim].
fn heads(q: &Tensor, k: &Tensor, seq: usize) -> Result<(i64, i32, i32, i32)> {
    match (q.shape(), k.shape()) {
        (&[tokens, heads, dim], &[_, kv, _]) => Ok(((tokens / seq) as i64, heads as i32, kv as i32, dim as i32)),
        _ => Err(Error::shape("attention", "[tokens, heads, dim]", q.shape())),
    }
}

/// Additions and multiplications of one product of a causal attention, half of B·H·T²·D times 2.
fn causal_flops(batch: i64, heads: i32, seq: usize, dim: i32) -> f64 {
    batch as f64 * f64::from(heads) * (seq * seq) as f64 * f64::from(dim)
}

/// o [tokens, heads·dim] and the log-sum-exp [batch, heads, seq].
pub(crate) fn attention_forward(q: &Tensor, k: &Tensor, v: &Tensor, seq: usize, scale: f64) -> Result<(Tensor, Tensor)> {
    let d = device(q)?;
    let (q, k, v) = (aligned(q.clone())?, aligned(k.clone())?, aligned(v.clone())?);
    let (batch, h, kv, dim) = heads(&q, &k, seq)?;
    let dtype = code(q.dtype())?;
    let o = d.alloc(&[q.shape()[0], (h * dim) as usize], q.dtype())?;
    let lse = d.alloc(&[batch as usize, h as usize, seq], DType::F32)?;
    let (pq, pk, pv) = (ptr_of(&q), ptr_of(&k), ptr_of(&v));
    // SAFETY: sizes as declared.
    d.launch_computing("attention", 2.0 * causal_flops(batch, h, seq, dim), |s| unsafe {
        ffi::sq_attention_forward(
            ptr_of(&o),
            ptr_of(&lse).cast(),
            pq,
            pk,
            pv,
            batch,
            seq as i64,
            h,
            kv,
            dim,
            scale as f32,
            dtype,
            s,
        )
    })?;
    Ok((o, lse))
}

/// dq, dk, dv.
#[allow(clippy::too_many_arguments)]
pub(crate) fn attention_backward(
    dout: Tensor,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    o: &Tensor,
    lse: &Tensor,
    seq: usize,
    scale: f64,
) -> Result<(Tensor, Tensor, Tensor)> {
    let d = device(q)?;
    let (q, k, v, dout) = (aligned(q.clone())?, aligned(k.clone())?, aligned(v.clone())?, aligned(dout)?);
    let (batch, h, kv, dim) = heads(&q, &k, seq)?;
    let dtype = code(q.dtype())?;
    let like = |t: &Tensor| d.alloc(t.shape(), t.dtype());
    let (dq, dk, dv) = (like(&q)?, like(&k)?, like(&v)?);
    // SAFETY: a pure function of its arguments.
    let bytes = unsafe { ffi::sq_attention_workspace(batch, seq as i64, h, kv, dim, dtype) } as usize;
    let workspace = d.alloc(&[bytes.div_ceil(4)], DType::F32)?;
    let (pq, pk, pv, po) = (ptr_of(&q), ptr_of(&k), ptr_of(&v), ptr_of(o));
    // SAFETY: sizes as declared.
    d.launch_computing("attention", 5.0 * causal_flops(batch, h, seq, dim), |s| unsafe {
        let (dq, dk, dv) = (ptr_of(&dq), ptr_of(&dk), ptr_of(&dv));
        let (work, dout, lse) = (ptr_of(&workspace), ptr_of(&dout), ptr_of(lse).cast());
        ffi::sq_attention_backward(
            dq,
            dk,
            dv,
            work,
            dout,
            pq,
            pk,
            pv,
            po,
            lse,
            batch,
            seq as i64,
            h,
            kv,
            dim,
            scale as f32,
            dtype,
            s,
        )
    })?;
    Ok((dq, dk, dv))
}

/// silu(gate) · up, in place of one of them when unshared.
pub(crate) fn swiglu_forward(gate: Tensor, up: Tensor) -> Result<Tensor> {
    let d = device(&gate)?;
    let (mut gate, mut up) = (aligned(gate)?, aligned(up)?);
    let y = if up.is_unique() { up.clone() } else { in_place(&mut gate)? };
    let (n, dtype) = (gate.len() as i64, code(gate.dtype())?);
    // SAFETY: all have n values; in place is allowed.
    d.launch_moving("swiglu", 3 * y.bytes(), |s| unsafe {
        ffi::sq_swiglu_forward(ptr_of(&y), ptr_of(&gate), ptr_of(&up), n, dtype, s)
    })?;
    Ok(y)
}

/// (dgate, dup).
pub(crate) fn swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> Result<(Tensor, Tensor)> {
    let d = device(&gate)?;
    let (dy, gate, up) = (aligned(dy)?, aligned(gate)?, aligned(up)?);
    let (dgate, dup) = (d.alloc(gate.shape(), gate.dtype())?, d.alloc(up.shape(), up.dtype())?);
    let (n, dtype) = (gate.len() as i64, code(gate.dtype())?);
    // SAFETY: all have n values.
    d.launch_moving("swiglu", 5 * dy.bytes(), |s| unsafe {
        ffi::sq_swiglu_backward(ptr_of(&dgate), ptr_of(&dup), ptr_of(&dy), ptr_of(&gate), ptr_of(&up), n, dtype, s)
    })?;
    Ok((dgate, dup))
}

/// Loss of every row, and logits overwritten by `scale (softmax − onehot)` unless `scale` is 0.
fn rows_of_cross_entropy(logits: &Tensor, targets: &[i32], scale: f64) -> Result<Tensor> {
    let d = device(logits)?;
    let ids = d.upload(bytemuck::cast_slice(targets), DType::U32)?;
    let losses = d.alloc(&[logits.rows()], DType::F32)?;
    let (rows, vocab, dtype) = (logits.rows() as i64, logits.cols() as i64, code(logits.dtype())?);
    // SAFETY: sizes as declared; targets were checked on the host.
    d.launch_moving("loss", 2 * logits.bytes(), |s| unsafe {
        let (loss, ids) = (ptr_of(&losses).cast(), ids.address(0).cast());
        ffi::sq_cross_entropy(ptr_of(logits), loss, ids, rows, vocab, scale as f32, dtype, s)
    })?;
    Ok(losses)
}

/// Mean loss over `count` rows as an f32 scalar, and the gradient of the logits where wanted (in their memory when unshared).
pub(crate) fn cross_entropy(logits: Tensor, targets: &[i32], count: usize, want: bool) -> Result<(Tensor, Option<Tensor>)> {
    let gradient = if want { owned(logits)? } else { aligned(logits)? };
    let mean = 1.0 / count.max(1) as f64;
    let losses = rows_of_cross_entropy(&gradient, targets, if want { mean } else { 0.0 })?;
    Ok((sum_scaled(mean, &losses)?, want.then_some(gradient)))
}

/// `factor Σ x` of `f32` values, as an f32 scalar.
fn sum_scaled(factor: f64, x: &Tensor) -> Result<Tensor> {
    let d = device(x)?;
    let sum = d.alloc(&[], DType::F32)?;
    let workspace = d.alloc(&[2 * 1024], DType::F32)?;
    let n = x.len() as i64;
    // SAFETY: the workspace holds 1024 doubles.
    d.launch("sum", |s| unsafe { ffi::sq_sum(ptr_of(&sum).cast(), ptr_of(&workspace).cast(), ptr_of(x), n, ffi::SQ_F32, s) })?;
    axpby(factor, sum, 0.0, None)
}

/// `x` in memory of its own.
fn owned(x: Tensor) -> Result<Tensor> {
    let mut x = aligned(x)?;
    if x.is_unique() { Ok(x) } else { axpby(1.0, x, 0.0, None) }
}

/// Mean divergence of logits from a teacher's as an f32 scalar, and the gradient of the logits (in their memory when unshared).
pub(crate) fn kl_divergence(logits: Tensor, teacher: &Tensor) -> Result<(Tensor, Tensor)> {
    let d = device(&logits)?;
    let (gradient, teacher) = (owned(logits)?, aligned(teacher.clone())?);
    let losses = d.alloc(&[gradient.rows()], DType::F32)?;
    let (rows, vocab, dtype) = (gradient.rows() as i64, gradient.cols() as i64, code(gradient.dtype())?);
    let mean = 1.0 / rows as f64;
    // SAFETY: logits and teacher have one shape and type, which the caller checked; one loss a row.
    d.launch("kl_divergence", |s| unsafe {
        let (x, loss, t) = (ptr_of(&gradient), ptr_of(&losses).cast(), ptr_of(&teacher));
        ffi::sq_kl_divergence(x, loss, t, rows, vocab, mean as f32, dtype, s)
    })?;
    Ok((sum_scaled(mean, &losses)?, gradient))
}

/// Mean of a measure as an f32 scalar, and the gradient of the values (in their memory when unshared).
pub(crate) fn spread(x: Tensor, measure: Measure) -> Result<(Tensor, Tensor)> {
    let d = device(&x)?;
    let gradient = owned(x)?;
    let (count, dtype) = (gradient.len(), code(gradient.dtype())?);
    // SAFETY: arithmetic.
    let sums = d.alloc(&[unsafe { ffi::sq_spread_sums(count as i64) } as usize], DType::F32)?;
    let mean = 1.0 / count as f64;
    let which = match measure {
        Measure::Whip => 0,
        Measure::Kurtosis => 1,
    };
    // SAFETY: as many sums as it asks for.
    d.launch("spread", |s| unsafe {
        ffi::sq_spread(ptr_of(&gradient), ptr_of(&sums).cast(), which, count as i64, mean as f32, dtype, s)
    })?;
    Ok((sum_scaled(mean, &sums)?, gradient))
}

/// Loss of every row, on the host.
pub(crate) fn token_losses(logits: &Tensor, targets: &[i32]) -> Result<Vec<f64>> {
    rows_of_cross_entropy(&aligned(logits.clone())?, targets, 0.0)?.to_f64_vec()
}

/// Rows of a table.
pub(crate) fn embedding_forward(table: &Tensor, ids: &[u32]) -> Result<Tensor> {
    let d = device(table)?;
    let table = aligned(table.clone())?;
    let ids = d.upload(bytemuck::cast_slice(ids), DType::U32)?;
    let (tokens, cols, dtype) = (ids.len(), table.cols(), code(table.dtype())?);
    let y = d.alloc(&[tokens, cols], table.dtype())?;
    // SAFETY: ids were checked on the host.
    d.launch("embedding", |s| unsafe {
        ffi::sq_embedding_forward(ptr_of(&y), ptr_of(&table), ids.address(0).cast(), tokens as i64, cols as i64, dtype, s)
    })?;
    Ok(y)
}

/// Gradient of a table of `vocab` rows.
pub(crate) fn embedding_backward(dy: Tensor, ids: &[u32], vocab: usize) -> Result<Tensor> {
    let d = device(&dy)?;
    let dy = aligned(dy)?;
    let mut order: Vec<u32> = (0..ids.len() as u32).collect();
    order.sort_by_key(|&t| ids[t as usize]);
    let mut start = vec![0u32; vocab + 1];
    ids.iter().for_each(|&id| start[id as usize + 1] += 1);
    (0..vocab).for_each(|i| start[i + 1] += start[i]);
    let (order, start) =
        (d.upload(bytemuck::cast_slice(&order), DType::U32)?, d.upload(bytemuck::cast_slice(&start), DType::U32)?);
    let table = d.alloc(&[vocab, dy.cols()], DType::F32)?;
    let (cols, dtype) = (dy.cols() as i64, code(dy.dtype())?);
    // SAFETY: order and start were built from checked ids.
    d.launch("embedding backward", |s| unsafe {
        let (order, start) = (order.address(0).cast(), start.address(0).cast());
        ffi::sq_embedding_backward(ptr_of(&table).cast(), ptr_of(&dy), order, start, vocab as i64, cols, dtype, s)
    })?;
    table.to_dtype(dy.dtype())
}
