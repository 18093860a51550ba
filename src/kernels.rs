//! The GPU kernels without a tape and without [`Tensor`](crate::Tensor)s: cudarc slices in, cudarc slices out, on a stream of the
//! caller's. For microbenchmarks, and for engines that have their own tensors.
//!
//! Every function checks lengths, alignment (16 bytes: the start of an allocation always is) and that all slices and the stream
//! are of one context, launches asynchronously, and allocates nothing. Rows are contiguous; 16-bit values are computed on in `f32`
//! and rounded once. What is not here is in [`device::cuda::ffi`](crate::device::cuda::ffi), unchecked.
//!
//! ```no_run
//! use half::bf16;
//! use spinquant::kernels::{self, HadamardMap};
//! let stream = cudarc::driver::CudaContext::new(0)?.default_stream();
//! let map = HadamardMap::new(&stream, 4096)?;
//! let x = stream.alloc_zeros::<bf16>(1024 * 4096)?;
//! let mut y = stream.alloc_zeros::<bf16>(1024 * 4096)?;
//! kernels::hadamard(&stream, &mut y, &x, &map, false)?;
//! stream.synchronize()?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

use std::ffi::c_void;
use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DevicePtrMut, DeviceRepr, DeviceSlice, SyncOnDrop};
use half::{bf16, f16};

use crate::device::cuda::ops::{code, quant};
use crate::device::cuda::{ffi, launch};
use crate::grid::{Clip, QuantSpec};
use crate::hadamard::Hadamard;
pub use crate::ops::attention::Sizes;
use crate::{DType, Element, Error, Result};

/// What the kernels read and write: `f32`, `f16`, `bf16`.
pub trait Float: Element + DeviceRepr {}
impl Float for f32 {}
impl Float for f16 {}
impl Float for bf16 {}

/// A pointer, and what tells other streams when its use ends.
type Pointer<'a> = (*mut c_void, SyncOnDrop<'a>);

fn check<T>(what: &str, stream: &CudaStream, x: &impl DeviceSlice<T>, len: usize) -> Result<()> {
    if x.len() != len {
        return Err(Error::shape(what, format!("of {len} values"), &[x.len()]));
    }
    if x.stream().context() != stream.context() {
        return Err(Error::device(what, "the slices and the stream belong to different contexts"));
    }
    Ok(())
}

fn aligned<'a>(what: &str, (address, guard): (u64, SyncOnDrop<'a>)) -> Result<Pointer<'a>> {
    if !address.is_multiple_of(16) {
        return Err(Error::argument(what, "a slice does not start on a 16-byte boundary"));
    }
    Ok((address as *mut c_void, guard))
}

fn read<'a, T>(what: &str, stream: &'a CudaStream, x: &'a impl DevicePtr<T>, len: usize) -> Result<Pointer<'a>> {
    check(what, stream, x, len)?;
    aligned(what, x.device_ptr(stream))
}

fn write<'a, T>(what: &str, stream: &'a CudaStream, y: &'a mut impl DevicePtrMut<T>, len: usize) -> Result<Pointer<'a>> {
    check(what, stream, y, len)?;
    aligned(what, y.device_ptr_mut(stream))
}

/// The rows of a tensor of `len` values with `cols` in each.
fn rows(what: &str, len: usize, cols: usize) -> Result<i64> {
    match len.checked_rem(cols) {
        Some(0) => Ok((len / cols) as i64),
        _ => Err(Error::shape(what, format!("of whole rows of {cols}"), &[len])),
    }
}

fn int(what: &str, n: usize) -> Result<i32> {
    i32::try_from(n).map_err(|_| Error::argument(what, format!("{n} is too large")))
}

/// A Hadamard map of rows of n values, its tables on the device.
pub struct HadamardMap {
    map: Hadamard,
    table: Option<CudaSlice<u32>>,
    signs: Option<CudaSlice<i8>>,
}

impl HadamardMap {
    /// The map of [`Hadamard::new`].
    pub fn new(stream: &Arc<CudaStream>, n: usize) -> Result<Self> {
        let map = Hadamard::new(n)?;
        let upload = || stream.clone_htod(&map.packed()).map_err(|e| Error::Cuda(format!("the table of H_{}: {e:?}", map.k())));
        let table = (map.k() > 1).then(upload).transpose()?;
        Ok(Self { map, table, signs: None })
    }

    /// With a diagonal of ±1 applied first: `y = H (signs · x)`, transposed `y = signs · (Hᵀ x)`.
    ///
    /// # Errors
    /// Unless there are n signs, all ±1, and the map has one block.
    pub fn with_signs(mut self, stream: &Arc<CudaStream>, signs: &[i8]) -> Result<Self> {
        if self.map.blocks() > 1 || signs.len() != self.map.n() || signs.iter().any(|s| s.abs() != 1) {
            let message = format!("expected {} values of ±1 and a map of one block", self.map.n());
            return Err(Error::argument("Hadamard signs", message));
        }
        self.signs = Some(stream.clone_htod(signs).map_err(|e| Error::Cuda(format!("Hadamard signs: {e:?}")))?);
        Ok(self)
    }

    /// The matrix.
    pub fn map(&self) -> &Hadamard {
        &self.map
    }

    fn size(&self) -> usize {
        self.map.n() / self.map.blocks()
    }

    /// Calls `f` with the launcher's struct.
    fn with<R>(&self, stream: &CudaStream, transpose: bool, f: impl FnOnce(ffi::sq_hadamard_map) -> Result<R>) -> Result<R> {
        let what = "Hadamard tables";
        let table = self.table.as_ref().map(|t| read(what, stream, t, t.len())).transpose()?;
        let signs = self.signs.as_ref().map(|s| read(what, stream, s, s.len())).transpose()?;
        f(ffi::sq_hadamard_map {
            n: int(what, self.size())?,
            k: int(what, self.map.k())?,
            transpose: transpose.into(),
            table: table.as_ref().map_or(std::ptr::null(), |t| t.0.cast()),
            signs: signs.as_ref().map_or(std::ptr::null(), |s| s.0.cast()),
        })
    }
}

/// `y = H x` of every row, or `Hᵀ x`.
pub fn hadamard<T: Float>(
    stream: &CudaStream,
    y: &mut impl DevicePtrMut<T>,
    x: &impl DevicePtr<T>,
    map: &HadamardMap,
    transpose: bool,
) -> Result<()> {
    let (what, len) = ("hadamard", x.len());
    rows(what, len, map.map.n())?;
    let ((y, _y), (x, _x)) = (write(what, stream, y, len)?, read(what, stream, x, len)?);
    hadamard_raw(stream, y, x, len, map, transpose, T::DTYPE)
}

/// [`hadamard`] in place.
pub fn hadamard_in_place<T: Float>(
    stream: &CudaStream,
    x: &mut impl DevicePtrMut<T>,
    map: &HadamardMap,
    transpose: bool,
) -> Result<()> {
    let (what, len) = ("hadamard", x.len());
    rows(what, len, map.map.n())?;
    let (x, _x) = write(what, stream, x, len)?;
    hadamard_raw(stream, x, x, len, map, transpose, T::DTYPE)
}

fn hadamard_raw(
    stream: &CudaStream,
    y: *mut c_void,
    x: *mut c_void,
    len: usize,
    map: &HadamardMap,
    transpose: bool,
    dtype: DType,
) -> Result<()> {
    let (rows, dtype) = ((len / map.size()) as i64, code(dtype)?);
    // SAFETY: y and x have rows × size values; they may be equal; the tables fit the map.
    map.with(stream, transpose, |m| launch(stream, "hadamard", |s| unsafe { ffi::sq_hadamard(y, x, rows, m, dtype, s) }))
}

/// `y = fake_quant(H x)` of every row in one pass; the transformed row is not rounded in between.
///
/// # Errors
/// Clip search, which needs the whole row twice, and block-diagonal maps are not available.
pub fn hadamard_fake_quant<T: Float>(
    stream: &CudaStream,
    y: &mut impl DevicePtrMut<T>,
    x: &impl DevicePtr<T>,
    map: &HadamardMap,
    spec: &QuantSpec,
) -> Result<()> {
    let (what, len) = ("hadamard_fake_quant", x.len());
    let _ = spec.group_size(map.map.n())?;
    if spec.clip == Clip::Search || map.map.blocks() > 1 {
        return Err(Error::argument(what, "neither clip search nor block-diagonal maps are available"));
    }
    let (rows, q, dtype) = (rows(what, len, map.map.n())?, quant(spec), code(T::DTYPE)?);
    let ((y, _y), (x, _x)) = (write(what, stream, y, len)?, read(what, stream, x, len)?);
    map.with(stream, false, |m| {
        // SAFETY: y and x have rows × n values; the tables fit the map.
        launch(stream, what, |s| unsafe { ffi::sq_hadamard_fake_quant(y, x, rows, m, q, dtype, s) })
    })
}

/// `y`: every row of `cols` values quantised and dequantised, whatever [`Clip`] the spec asks for.
pub fn fake_quant<T: Float>(
    stream: &CudaStream,
    y: &mut impl DevicePtrMut<T>,
    x: &impl DevicePtr<T>,
    cols: usize,
    spec: &QuantSpec,
) -> Result<()> {
    let (what, len) = ("fake_quant", x.len());
    let _ = spec.group_size(cols)?;
    let rows = rows(what, len, cols)?;
    let ((y, _y), (x, _x)) = (write(what, stream, y, len)?, read(what, stream, x, len)?);
    fake_quant_raw(stream, [y, null(), null(), null(), null()], x, (rows, cols), spec, T::DTYPE)
}

/// The codes of every value, and scale and zero point of every group, without the dequantised values.
#[allow(clippy::too_many_arguments)]
pub fn quantize<T: Float>(
    stream: &CudaStream,
    codes: &mut impl DevicePtrMut<i16>,
    scale: &mut impl DevicePtrMut<f32>,
    zero: &mut impl DevicePtrMut<f32>,
    x: &impl DevicePtr<T>,
    cols: usize,
    spec: &QuantSpec,
) -> Result<()> {
    let (what, len) = ("quantize", x.len());
    let groups = len / spec.group_size(cols)?;
    let rows = rows(what, len, cols)?;
    let ((codes, _c), (x, _x)) = (write(what, stream, codes, len)?, read(what, stream, x, len)?);
    let ((scale, _s), (zero, _z)) = (write(what, stream, scale, groups)?, write(what, stream, zero, groups)?);
    fake_quant_raw(stream, [null(), codes, scale, zero, null()], x, (rows, cols), spec, T::DTYPE)
}

/// [`fake_quant`] with every group's clip ratio searched, and `best`: the candidate i that each group chose, ratio 1 − i/100.
pub fn fake_quant_search<T: Float>(
    stream: &CudaStream,
    y: &mut impl DevicePtrMut<T>,
    best: &mut impl DevicePtrMut<i32>,
    x: &impl DevicePtr<T>,
    cols: usize,
    spec: &QuantSpec,
) -> Result<()> {
    let (what, len) = ("fake_quant_search", x.len());
    let spec = spec.clipped(Clip::Search);
    let groups = len / spec.group_size(cols)?;
    let rows = rows(what, len, cols)?;
    let ((y, _y), (x, _x)) = (write(what, stream, y, len)?, read(what, stream, x, len)?);
    let (best, _b) = write(what, stream, best, groups)?;
    fake_quant_raw(stream, [y, null(), null(), null(), best], x, (rows, cols), &spec, T::DTYPE)
}

fn null() -> *mut c_void {
    std::ptr::null_mut()
}

fn fake_quant_raw(
    stream: &CudaStream,
    [y, codes, scale, zero, best]: [*mut c_void; 5],
    x: *mut c_void,
    (rows, cols): (i64, usize),
    spec: &QuantSpec,
    dtype: DType,
) -> Result<()> {
    let (codes, scale, zero, best) = (codes.cast(), scale.cast(), zero.cast(), best.cast());
    let (cols, q, dtype) = (cols as i64, quant(spec), code(dtype)?);
    // SAFETY: x has rows × cols values; every output is null or as large as kernels.h asks.
    launch(stream, "fake_quant", |s| unsafe {
        match spec.clip {
            Clip::Ratio(_) => ffi::sq_fake_quant(y, codes, scale, zero, x, rows, cols, q, dtype, s),
            Clip::Search => ffi::sq_fake_quant_search(y, codes, scale, zero, best, x, rows, cols, q, dtype, s),
        }
    })
}

/// Every row of `cols` values divided by its root mean square (plus `eps`); `inverse` receives one factor a row.
pub fn rms_norm<T: Float>(
    stream: &CudaStream,
    y: &mut impl DevicePtrMut<T>,
    inverse: &mut impl DevicePtrMut<f32>,
    x: &impl DevicePtr<T>,
    cols: usize,
    eps: f32,
) -> Result<()> {
    let (what, len) = ("rms_norm", x.len());
    let (rows, dtype) = (rows(what, len, cols)?, code(T::DTYPE)?);
    let ((y, _y), (x, _x)) = (write(what, stream, y, len)?, read(what, stream, x, len)?);
    let (inverse, _i) = write(what, stream, inverse, rows as usize)?;
    // SAFETY: sizes as checked; no gain.
    launch(stream, what, |s| unsafe { ffi::sq_rms_norm_forward(y, inverse.cast(), x, null(), rows, cols as i64, eps, dtype, s) })
}

/// dx of [`rms_norm`] from dy and what went in and came out of it.
pub fn rms_norm_backward<T: Float>(
    stream: &CudaStream,
    dx: &mut impl DevicePtrMut<T>,
    dy: &impl DevicePtr<T>,
    x: &impl DevicePtr<T>,
    inverse: &impl DevicePtr<f32>,
    cols: usize,
) -> Result<()> {
    let (what, len) = ("rms_norm backward", x.len());
    let (rows, dtype) = (rows(what, len, cols)?, code(T::DTYPE)?);
    let ((dx, _d), (dy, _y), (x, _x)) =
        (write(what, stream, dx, len)?, read(what, stream, dy, len)?, read(what, stream, x, len)?);
    let (inverse, _i) = read(what, stream, inverse, rows as usize)?;
    let cols = cols as i64;
    // SAFETY: sizes as checked; no gain.
    launch(stream, what, |s| unsafe { ffi::sq_rms_norm_backward(dx, dy, x, null(), inverse.cast(), rows, cols, dtype, s) })
}

/// Rotary embedding of x `[tokens, heads, dim]` by the tables `cosine`, `sine` `[seq, dim/2]`, token t at position t mod seq;
/// `transpose` rotates back, which is the gradient.
#[allow(clippy::too_many_arguments)]
pub fn rope<T: Float>(
    stream: &CudaStream,
    y: &mut impl DevicePtrMut<T>,
    x: &impl DevicePtr<T>,
    cosine: &impl DevicePtr<f32>,
    sine: &impl DevicePtr<f32>,
    (heads, dim): (usize, usize),
    transpose: bool,
) -> Result<()> {
    let (what, len) = ("rope", x.len());
    let (tokens, angles) = (rows(what, len, heads * dim)?, cosine.len());
    let seq = rows(what, angles, dim / 2)?;
    if !dim.is_multiple_of(2) || seq == 0 || tokens % seq != 0 {
        return Err(Error::argument(what, format!("{tokens} tokens, {seq} positions and heads of {dim} do not fit together")));
    }
    let ((y, _y), (x, _x)) = (write(what, stream, y, len)?, read(what, stream, x, len)?);
    let ((cosine, _c), (sine, _s)) = (read(what, stream, cosine, angles)?, read(what, stream, sine, angles)?);
    let (heads, dim, dtype) = (int(what, heads)?, int(what, dim)?, code(T::DTYPE)?);
    // SAFETY: sizes as checked.
    launch(stream, what, |s| unsafe {
        ffi::sq_rope(y, x, cosine.cast(), sine.cast(), tokens, seq, heads, dim, transpose.into(), dtype, s)
    })
}

/// `y = silu(gate) · up`.
pub fn swiglu<T: Float>(
    stream: &CudaStream,
    y: &mut impl DevicePtrMut<T>,
    gate: &impl DevicePtr<T>,
    up: &impl DevicePtr<T>,
) -> Result<()> {
    let (what, len) = ("swiglu", gate.len());
    let ((y, _y), (gate, _g), (up, _u)) =
        (write(what, stream, y, len)?, read(what, stream, gate, len)?, read(what, stream, up, len)?);
    let dtype = code(T::DTYPE)?;
    // SAFETY: all have len values.
    launch(stream, what, |s| unsafe { ffi::sq_swiglu_forward(y, gate, up, len as i64, dtype, s) })
}

/// Gradients of [`swiglu`].
pub fn swiglu_backward<T: Float>(
    stream: &CudaStream,
    dgate: &mut impl DevicePtrMut<T>,
    dup: &mut impl DevicePtrMut<T>,
    dy: &impl DevicePtr<T>,
    gate: &impl DevicePtr<T>,
    up: &impl DevicePtr<T>,
) -> Result<()> {
    let (what, len) = ("swiglu backward", gate.len());
    let ((dgate, _d), (dup, _e)) = (write(what, stream, dgate, len)?, write(what, stream, dup, len)?);
    let ((dy, _y), (gate, _g), (up, _u)) =
        (read(what, stream, dy, len)?, read(what, stream, gate, len)?, read(what, stream, up, len)?);
    let dtype = code(T::DTYPE)?;
    // SAFETY: all have len values.
    launch(stream, what, |s| unsafe { ffi::sq_swiglu_backward(dgate, dup, dy, gate, up, len as i64, dtype, s) })
}

/// [`Sizes`] as the launchers take them, and the lengths of q, k and lse.
struct Heads {
    batch: i64,
    seq: i64,
    heads: i32,
    kv_heads: i32,
    dim: i32,
    scale: f32,
    q: usize,
    k: usize,
    lse: usize,
}

fn heads(n: &Sizes) -> Result<Heads> {
    let (what, int) = ("attention", |n| int("attention", n));
    if n.heads == 0 || n.kv_heads == 0 || n.dim == 0 || !n.heads.is_multiple_of(n.kv_heads) {
        return Err(Error::argument(what, format!("unusable sizes: {n:?}")));
    }
    let rows = n.batch * n.seq;
    Ok(Heads {
        batch: n.batch as i64,
        seq: n.seq as i64,
        heads: int(n.heads)?,
        kv_heads: int(n.kv_heads)?,
        dim: int(n.dim)?,
        scale: (1.0 / (n.dim as f64).sqrt()) as f32,
        q: rows * n.heads * n.dim,
        k: rows * n.kv_heads * n.dim,
        lse: rows * n.heads,
    })
}

/// Causal attention of q `[batch·seq, heads, dim]` over k, v `[batch·seq, kv_heads, dim]` with the scale 1/√dim; `lse`
/// `[batch, heads, seq]` receives the log-sum-exp of every row's scaled scores.
pub fn attention<T: Float>(
    stream: &CudaStream,
    o: &mut impl DevicePtrMut<T>,
    lse: &mut impl DevicePtrMut<f32>,
    q: &impl DevicePtr<T>,
    k: &impl DevicePtr<T>,
    v: &impl DevicePtr<T>,
    sizes: &Sizes,
) -> Result<()> {
    let (what, n, dtype) = ("attention", heads(sizes)?, code(T::DTYPE)?);
    let ((o, _o), (lse, _l)) = (write(what, stream, o, n.q)?, write(what, stream, lse, n.lse)?);
    let ((q, _q), (k, _k), (v, _v)) = (read(what, stream, q, n.q)?, read(what, stream, k, n.k)?, read(what, stream, v, n.k)?);
    // SAFETY: sizes as checked.
    launch(stream, what, |s| unsafe {
        ffi::sq_attention_forward(o, lse.cast(), q, k, v, n.batch, n.seq, n.heads, n.kv_heads, n.dim, n.scale, dtype, s)
    })
}

/// Bytes of workspace that [`attention_backward`] needs.
pub fn attention_workspace(sizes: &Sizes, dtype: DType) -> Result<usize> {
    let (n, dtype) = (heads(sizes)?, code(dtype)?);
    // SAFETY: a pure function of its arguments.
    Ok(unsafe { ffi::sq_attention_workspace(n.batch, n.seq, n.heads, n.kv_heads, n.dim, dtype) } as usize)
}

/// Gradients of [`attention`], deterministic.
#[allow(clippy::too_many_arguments)]
pub fn attention_backward<T: Float>(
    stream: &CudaStream,
    [dq, dk, dv]: [&mut CudaSlice<T>; 3],
    workspace: &mut CudaSlice<u8>,
    dout: &impl DevicePtr<T>,
    [q, k, v]: [&CudaSlice<T>; 3],
    o: &impl DevicePtr<T>,
    lse: &impl DevicePtr<f32>,
    sizes: &Sizes,
) -> Result<()> {
    let (what, n, dtype) = ("attention backward", heads(sizes)?, code(T::DTYPE)?);
    let needed = attention_workspace(sizes, T::DTYPE)?;
    if workspace.len() < needed {
        return Err(Error::argument(what, format!("a workspace of {} bytes, {needed} are needed", workspace.len())));
    }
    let bytes = workspace.len();
    let ((dq, _a), (dk, _b), (dv, _c)) =
        (write(what, stream, dq, n.q)?, write(what, stream, dk, n.k)?, write(what, stream, dv, n.k)?);
    let ((work, _w), (dout, _d)) = (write(what, stream, workspace, bytes)?, read(what, stream, dout, n.q)?);
    let ((q, _q), (k, _k), (v, _v)) = (read(what, stream, q, n.q)?, read(what, stream, k, n.k)?, read(what, stream, v, n.k)?);
    let ((o, _o), (lse, _l)) = (read(what, stream, o, n.q)?, read(what, stream, lse, n.lse)?);
    // SAFETY: sizes as checked.
    launch(stream, what, |s| unsafe {
        ffi::sq_attention_backward(
            dq,
            dk,
            dv,
            work,
            dout,
            q,
            k,
            v,
            o,
            lse.cast(),
            n.batch,
            n.seq,
            n.heads,
            n.kv_heads,
            n.dim,
            n.scale,
            dtype,
            s,
        )
    })
}

/// The loss of every row of logits `[rows, vocab]`; unless `scale` is 0 the logits become `scale (softmax − onehot)`. A target
/// outside the vocabulary, such as −1, marks a row that does not count.
pub fn cross_entropy<T: Float>(
    stream: &CudaStream,
    logits: &mut impl DevicePtrMut<T>,
    loss: &mut impl DevicePtrMut<f32>,
    targets: &impl DevicePtr<i32>,
    vocab: usize,
    scale: f32,
) -> Result<()> {
    let (what, len) = ("cross_entropy", logits.len());
    let (rows, dtype) = (rows(what, len, vocab)?, code(T::DTYPE)?);
    let (logits, _x) = write(what, stream, logits, len)?;
    let ((loss, _l), (targets, _t)) = (write(what, stream, loss, rows as usize)?, read(what, stream, targets, rows as usize)?);
    // SAFETY: sizes as checked; the kernel tests targets against vocab.
    launch(stream, what, |s| unsafe {
        ffi::sq_cross_entropy(logits, loss.cast(), targets.cast(), rows, vocab as i64, scale, dtype, s)
    })
}

/// What Cayley steps need besides matrix products, on batches of `n × n` matrices of `f32`.
pub mod cayley {
    use super::{CudaStream, DevicePtr, DevicePtrMut, Error, Result, ffi, launch, read, write};

    /// The number of n×n matrices.
    fn batch(what: &str, len: usize, n: usize) -> Result<(i64, i64)> {
        match len.checked_rem(n * n) {
            Some(0) => Ok(((len / (n * n)) as i64, n as i64)),
            _ => Err(Error::shape(what, format!("of whole matrices of {n}x{n}"), &[len])),
        }
    }

    /// Every row divided by (its 2-norm + 1e-8).
    pub fn normalize_rows(stream: &CudaStream, y: &mut impl DevicePtrMut<f32>, x: &impl DevicePtr<f32>, n: usize) -> Result<()> {
        let (what, len) = ("normalize_rows", x.len());
        let (batch, n) = batch(what, len, n)?;
        let ((y, _y), (x, _x)) = (write(what, stream, y, len)?, read(what, stream, x, len)?);
        // SAFETY: both have batch × n × n values.
        launch(stream, what, |s| unsafe { ffi::sq_normalize_rows(y.cast(), x.cast(), batch, n, s) })
    }

    /// `w = a − aᵀ`.
    pub fn skew(stream: &CudaStream, w: &mut impl DevicePtrMut<f32>, a: &impl DevicePtr<f32>, n: usize) -> Result<()> {
        let (what, len) = ("skew", a.len());
        let (batch, n) = batch(what, len, n)?;
        let ((w, _w), (a, _a)) = (write(what, stream, w, len)?, read(what, stream, a, len)?);
        // SAFETY: both have batch × n × n values.
        launch(stream, what, |s| unsafe { ffi::sq_skew(w.cast(), a.cast(), batch, n, s) })
    }

    /// `y = alpha xᵀ + beta z`.
    pub fn transpose_axpby(
        stream: &CudaStream,
        y: &mut impl DevicePtrMut<f32>,
        (alpha, x): (f32, &impl DevicePtr<f32>),
        (beta, z): (f32, &impl DevicePtr<f32>),
        n: usize,
    ) -> Result<()> {
        let (what, len) = ("transpose_axpby", x.len());
        let (batch, n) = batch(what, len, n)?;
        let ((y, _y), (x, _x), (z, _z)) =
            (write(what, stream, y, len)?, read(what, stream, x, len)?, read(what, stream, z, len)?);
        // SAFETY: all have batch × n × n values.
        launch(stream, what, |s| unsafe { ffi::sq_transpose_axpby(y.cast(), alpha, x.cast(), beta, z.cast(), batch, n, s) })
    }

    /// `alpha[b] = min(lr, 1 / (‖w[b]‖₁ + 1e-8))`, ‖·‖₁ the largest column sum of |·|.
    pub fn step_size(
        stream: &CudaStream,
        alpha: &mut impl DevicePtrMut<f32>,
        w: &impl DevicePtr<f32>,
        lr: f32,
        n: usize,
    ) -> Result<()> {
        let (what, len) = ("step_size", w.len());
        let (batch, n) = batch(what, len, n)?;
        let ((alpha, _a), (w, _w)) = (write(what, stream, alpha, batch as usize)?, read(what, stream, w, len)?);
        // SAFETY: w has batch × n × n values, alpha batch.
        launch(stream, what, |s| unsafe { ffi::sq_cayley_step_size(alpha.cast(), w.cast(), lr, batch, n, s) })
    }

    /// `y[b] = a[b] + factor · alpha[b] · x[b]`.
    pub fn add_scaled(
        stream: &CudaStream,
        y: &mut impl DevicePtrMut<f32>,
        a: &impl DevicePtr<f32>,
        (factor, alpha): (f32, &impl DevicePtr<f32>),
        x: &impl DevicePtr<f32>,
        n: usize,
    ) -> Result<()> {
        let (what, len) = ("add_scaled", x.len());
        let (batch, n) = batch(what, len, n)?;
        let ((y, _y), (a, _a), (x, _x)) =
            (write(what, stream, y, len)?, read(what, stream, a, len)?, read(what, stream, x, len)?);
        let (alpha, _l) = read(what, stream, alpha, batch as usize)?;
        // SAFETY: all have batch × n × n values, alpha batch.
        launch(stream, what, |s| unsafe { ffi::sq_add_scaled(y.cast(), a.cast(), alpha.cast(), factor, x.cast(), batch, n, s) })
    }

    /// `residual = I − gram` and `error[b] = max|gram[b] − I|` of Gram matrices in `f64`.
    pub fn gram_residual(
        stream: &CudaStream,
        residual: &mut impl DevicePtrMut<f32>,
        error: &mut impl DevicePtrMut<f64>,
        gram: &impl DevicePtr<f64>,
        n: usize,
    ) -> Result<()> {
        let (what, len) = ("gram_residual", gram.len());
        let (batch, n) = batch(what, len, n)?;
        let ((residual, _r), (gram, _g)) = (write(what, stream, residual, len)?, read(what, stream, gram, len)?);
        let (error, _e) = write(what, stream, error, batch as usize)?;
        // SAFETY: residual and gram have batch × n × n values, error batch.
        launch(stream, what, |s| unsafe { ffi::sq_gram_residual(residual.cast(), error.cast(), gram.cast(), batch, n, s) })
    }

    /// `y = x`, widened.
    pub fn widen(stream: &CudaStream, y: &mut impl DevicePtrMut<f64>, x: &impl DevicePtr<f32>) -> Result<()> {
        let (what, len) = ("widen", x.len());
        let ((y, _y), (x, _x)) = (write(what, stream, y, len)?, read(what, stream, x, len)?);
        // SAFETY: both have len values.
        launch(stream, what, |s| unsafe { ffi::sq_widen(y.cast(), x.cast(), len as i64, s) })
    }
}
