//! The GPU kernels without a tape and without [`Tensor`](crate::Tensor)s: cudarc slices in, cudarc slices out, on a stream of the
//! caller's. For microbenchmarks, and for engines that have their own tensors.
//!
//! Every function calls the one launch of its kernel, which stands beside the formula in [`ops`](crate::ops) or
//! [`linalg`](crate::linalg) and checks lengths, alignment (16 bytes: the start of an allocation always is) and that all slices and the
//! stream are of one context. Launches are asynchronous, and nothing is allocated. Rows are contiguous; 16-bit values are computed on in
//! `f32` and rounded once. What is not here is in [`device::cuda::ffi`](crate::device::cuda::ffi), unchecked.
//!
//! # Errors
//! Of every function: slices of other lengths than the others ask for, that do not start on a 16-byte boundary, or that belong to
//! another GPU than the stream; sizes that the kernel does not know; a failed launch.
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

pub mod cayley;
mod coded;
mod hadamard_choice;
mod learned;
mod microscaling;
mod turned;

use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DevicePtrMut, DeviceRepr, SyncOnDrop};
use half::{bf16, f16};

use crate::device::cuda::{Queue, context_of};
use crate::device::launch::{Kind, View};
use crate::grid::{Clip, QuantSpec};
use crate::hadamard::Hadamard;
pub use crate::ops::attention::Sizes;
use crate::ops::bias;
use crate::ops::fake_quant::Outputs;
use crate::ops::hadamard::Tables;
use crate::ops::{
    attention as attend, axpby_bf16 as mixed, cross_entropy as loss_of, fake_quant as quant, hadamard as transform,
};
use crate::ops::{rms_norm as norm, rope as rotary, swiglu as gated};
use crate::{DType, Element, Error, Result};
pub use coded::{Code, CodedRows, code_sums, hadamard_codes, integer_linear, quantize_codes};
pub use hadamard_choice::{Gpu, HadamardChoice, hadamard_choice};
pub use learned::{
    agreement, clipped_fake_quant, clipped_fake_quant_backward, log_scale, log_scale_sums, scaled_rms_norm,
    scaled_rms_norm_backward, scaled_swiglu, scaled_swiglu_backward,
};
pub use microscaling::{encode, largest};
pub use turned::{rope_pairs, rope_pairs_backward, swap_axes};

/// What the kernels read and write: `f32`, `f16`, `bf16`.
#[allow(private_bounds)]
pub trait Float: Element + DeviceRepr + Stored {}
impl Float for f32 {}
impl Float for f16 {}
impl Float for bf16 {}

/// The kind of a slice's values.
pub(crate) trait Stored {
    const KIND: Kind;
}

macro_rules! stored {
    ($($t:ty: $kind:ident),*) => { $(impl Stored for $t { const KIND: Kind = Kind::$kind; })* };
}
stored!(f64: F64, f32: F32, f16: F16, bf16: BF16, u32: U32, i32: I32, i16: I16, i8: I8, u8: U8);

/// A slice as launchers see it, and what tells other streams when its use ends.
struct Held<'a> {
    view: View<'a>,
    _until: SyncOnDrop<'a>,
}

impl<'a> Held<'a> {
    fn new<T: Stored>(context: usize, len: usize, (address, until): (u64, SyncOnDrop<'a>)) -> Self {
        // SAFETY: the slice is borrowed for 'a, of this length in this context; cudarc has the stream wait for those that write it, and
        // the guard has them wait for this one.
        Self { view: unsafe { View::new(address, len, T::KIND, context) }, _until: until }
    }
}

fn read<'a, T: Stored>(stream: &'a CudaStream, x: &'a impl DevicePtr<T>) -> Held<'a> {
    Held::new::<T>(context_of(x.stream()), x.len(), x.device_ptr(stream))
}

fn write<'a, T: Stored>(stream: &'a CudaStream, y: &'a mut impl DevicePtrMut<T>) -> Held<'a> {
    let (context, len) = (context_of(y.stream()), y.len());
    Held::new::<T>(context, len, y.device_ptr_mut(stream))
}

/// A Hadamard map of rows of n values, its tables on the device.
pub struct HadamardMap {
    map: Hadamard,
    table: Option<CudaSlice<u32>>,
    signs: Option<CudaSlice<i8>>,
}

impl HadamardMap {
    /// The map of [`Hadamard::new`].
    ///
    /// # Errors
    /// Those of [`Hadamard::new`]; a failing upload of the table.
    pub fn new(stream: &Arc<CudaStream>, n: usize) -> Result<Self> {
        Self::of(stream, Hadamard::new(n)?)
    }

    /// Any map: that of [`Hadamard::in_blocks`], say.
    ///
    /// # Errors
    /// A failing upload of the table.
    pub fn of(stream: &Arc<CudaStream>, map: Hadamard) -> Result<Self> {
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

    fn held<'a>(&'a self, stream: &'a CudaStream) -> [Option<Held<'a>>; 2] {
        [self.table.as_ref().map(|t| read(stream, t)), self.signs.as_ref().map(|s| read(stream, s))]
    }

    fn tables<'a>(&'a self, [table, signs]: &'a [Option<Held<'a>>; 2]) -> Tables<'a> {
        Tables { map: &self.map, table: table.as_ref().map(|t| t.view), signs: signs.as_ref().map(|s| s.view) }
    }
}

/// `y = H x` of every row, or `Hᵀ x`.
///
/// # Errors
/// Slices that are too short, not aligned to 16 bytes or of another device than the stream; sizes that the kernel does not know;
/// a failed launch.
pub fn hadamard<T: Float>(
    stream: &CudaStream,
    y: &mut impl DevicePtrMut<T>,
    x: &impl DevicePtr<T>,
    map: &HadamardMap,
    transpose: bool,
) -> Result<()> {
    let (y, x, held) = (write(stream, y), read(stream, x), map.held(stream));
    transform::launch(Queue::of(stream), y.view, x.view, &map.tables(&held), transpose, None)
}

/// [`hadamard`] in place.
///
/// # Errors
/// Slices that are too short, not aligned to 16 bytes or of another device than the stream; sizes that the kernel does not know;
/// a failed launch.
pub fn hadamard_in_place<T: Float>(
    stream: &CudaStream,
    x: &mut impl DevicePtrMut<T>,
    map: &HadamardMap,
    transpose: bool,
) -> Result<()> {
    let (x, held) = (write(stream, x), map.held(stream));
    transform::launch(Queue::of(stream), x.view, x.view, &map.tables(&held), transpose, None)
}

/// `y = fake_quant(H x)` of every row in one pass; the transformed row is not rounded in between. Scales are those of the whole row or
/// of the spec's groups, also where the map is in blocks.
///
/// # Errors
/// Clip search, which needs the whole row twice, is not available; a group that does not divide the row; slices that are too short, not
/// aligned to 16 bytes or of another device than the stream; sizes that the kernel does not know; a failed launch.
pub fn hadamard_fake_quant<T: Float>(
    stream: &CudaStream,
    y: &mut impl DevicePtrMut<T>,
    x: &impl DevicePtr<T>,
    map: &HadamardMap,
    spec: &QuantSpec,
) -> Result<()> {
    let (y, x, held) = (write(stream, y), read(stream, x), map.held(stream));
    transform::launch(Queue::of(stream), y.view, x.view, &map.tables(&held), false, Some(spec))
}

/// `y`: every row of `cols` values quantised and dequantised, whatever [`Clip`] the spec asks for.
///
/// # Errors
/// Slices that are too short, not aligned to 16 bytes or of another device than the stream; sizes that the kernel does not know;
/// a failed launch.
pub fn fake_quant<T: Float>(
    stream: &CudaStream,
    y: &mut impl DevicePtrMut<T>,
    x: &impl DevicePtr<T>,
    cols: usize,
    spec: &QuantSpec,
) -> Result<()> {
    let (y, x) = (write(stream, y), read(stream, x));
    quant::launch(Queue::of(stream), Outputs { y: Some(y.view), ..Outputs::default() }, x.view, cols, spec)
}

/// The codes of every value, and scale and zero point of every group, without the dequantised values.
///
/// # Errors
/// Slices that are too short, not aligned to 16 bytes or of another device than the stream; sizes that the kernel does not know;
/// a failed launch.
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
    let (codes, scale, zero, x) = (write(stream, codes), write(stream, scale), write(stream, zero), read(stream, x));
    let out = Outputs { codes: Some(codes.view), scale: Some(scale.view), zero: Some(zero.view), ..Outputs::default() };
    quant::launch(Queue::of(stream), out, x.view, cols, spec)
}

/// [`fake_quant`] with every group's clip ratio searched, and `best`: the candidate i that each group chose, ratio 1 − i/100.
///
/// # Errors
/// Slices that are too short, not aligned to 16 bytes or of another device than the stream; sizes that the kernel does not know;
/// a failed launch.
pub fn fake_quant_search<T: Float>(
    stream: &CudaStream,
    y: &mut impl DevicePtrMut<T>,
    best: &mut impl DevicePtrMut<i32>,
    x: &impl DevicePtr<T>,
    cols: usize,
    spec: &QuantSpec,
) -> Result<()> {
    let (y, best, x) = (write(stream, y), write(stream, best), read(stream, x));
    let out = Outputs { y: Some(y.view), best: Some(best.view), ..Outputs::default() };
    quant::launch(Queue::of(stream), out, x.view, cols, &spec.clipped(Clip::Search))
}

/// Every row of `cols` values divided by its root mean square (plus `eps`); `inverse` receives one factor a row.
///
/// # Errors
/// Slices that are too short, not aligned to 16 bytes or of another device than the stream; sizes that the kernel does not know;
/// a failed launch.
pub fn rms_norm<T: Float>(
    stream: &CudaStream,
    y: &mut impl DevicePtrMut<T>,
    inverse: &mut impl DevicePtrMut<f32>,
    x: &impl DevicePtr<T>,
    cols: usize,
    eps: f32,
) -> Result<()> {
    let (y, inverse, x) = (write(stream, y), write(stream, inverse), read(stream, x));
    norm::launch(Queue::of(stream), y.view, inverse.view, x.view, None, cols, eps)
}

/// dx of [`rms_norm`] from dy and what went in and came out of it.
///
/// # Errors
/// Slices that are too short, not aligned to 16 bytes or of another device than the stream; sizes that the kernel does not know;
/// a failed launch.
pub fn rms_norm_backward<T: Float>(
    stream: &CudaStream,
    dx: &mut impl DevicePtrMut<T>,
    dy: &impl DevicePtr<T>,
    x: &impl DevicePtr<T>,
    inverse: &impl DevicePtr<f32>,
    cols: usize,
) -> Result<()> {
    let (dx, dy, x, inverse) = (write(stream, dx), read(stream, dy), read(stream, x), read(stream, inverse));
    norm::launch_backward(Queue::of(stream), dx.view, dy.view, x.view, None, inverse.view, cols)
}

/// Rotary embedding of x `[tokens, heads, dim]` by the tables `cosine`, `sine` `[seq, dim/2]`, token t at position t mod seq;
/// `transpose` rotates back, which is the gradient.
///
/// # Errors
/// Slices that are too short, not aligned to 16 bytes or of another device than the stream; sizes that the kernel does not know;
/// a failed launch.
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
    let (y, x, cosine, sine) = (write(stream, y), read(stream, x), read(stream, cosine), read(stream, sine));
    rotary::launch(Queue::of(stream), y.view, x.view, [cosine.view, sine.view], (heads, dim, dim), transpose)
}

/// `y = x + b` for every row of x, of as many values as b.
///
/// ```no_run
/// use spinquant::kernels;
/// let stream = cudarc::driver::CudaContext::new(0)?.default_stream();
/// let (x, b) = (stream.alloc_zeros::<f32>(3 * 64)?, stream.alloc_zeros::<f32>(64)?);
/// let mut y = stream.alloc_zeros::<f32>(3 * 64)?;
/// kernels::add_bias(&stream, &mut y, &x, &b)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// Slices that are too short, not aligned to 16 bytes or of another device than the stream; sizes that the kernel does not know;
/// a failed launch.
pub fn add_bias<T: Float>(
    stream: &CudaStream,
    y: &mut impl DevicePtrMut<T>,
    x: &impl DevicePtr<T>,
    b: &impl DevicePtr<T>,
) -> Result<()> {
    let (y, x, b) = (write(stream, y), read(stream, x), read(stream, b));
    bias::launch(Queue::of(stream), y.view, x.view, b.view)
}

/// The sum of all rows of x, of as many values as there are sums: the gradient of b in [`add_bias`].
///
/// ```no_run
/// use spinquant::kernels;
/// let stream = cudarc::driver::CudaContext::new(0)?.default_stream();
/// let x = stream.alloc_zeros::<f32>(3 * 64)?;
/// let mut sums = stream.alloc_zeros::<f32>(64)?;
/// kernels::column_sums(&stream, &mut sums, &x)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// Slices that are too short, not aligned to 16 bytes or of another device than the stream; sizes that the kernel does not know;
/// a failed launch.
pub fn column_sums<T: Float>(stream: &CudaStream, sums: &mut impl DevicePtrMut<T>, x: &impl DevicePtr<T>) -> Result<()> {
    let (sums, x) = (write(stream, sums), read(stream, x));
    bias::launch_sums(Queue::of(stream), sums.view, x.view)
}

/// `y = silu(gate) · up`.
///
/// # Errors
/// Slices that are too short, not aligned to 16 bytes or of another device than the stream; sizes that the kernel does not know;
/// a failed launch.
pub fn swiglu<T: Float>(
    stream: &CudaStream,
    y: &mut impl DevicePtrMut<T>,
    gate: &impl DevicePtr<T>,
    up: &impl DevicePtr<T>,
) -> Result<()> {
    let (y, gate, up) = (write(stream, y), read(stream, gate), read(stream, up));
    gated::launch(Queue::of(stream), y.view, gate.view, up.view)
}

/// Gradients of [`swiglu`].
///
/// ```no_run
/// use spinquant::kernels;
/// let stream = cudarc::driver::CudaContext::new(0)?.default_stream();
/// let (gate, up, dy) = (stream.alloc_zeros::<f32>(64)?, stream.alloc_zeros::<f32>(64)?, stream.alloc_zeros::<f32>(64)?);
/// let (mut dgate, mut dup) = (stream.alloc_zeros::<f32>(64)?, stream.alloc_zeros::<f32>(64)?);
/// kernels::swiglu_backward(&stream, &mut dgate, &mut dup, &dy, &gate, &up)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// Slices that are too short, not aligned to 16 bytes or of another device than the stream; sizes that the kernel does not know;
/// a failed launch.
pub fn swiglu_backward<T: Float>(
    stream: &CudaStream,
    dgate: &mut impl DevicePtrMut<T>,
    dup: &mut impl DevicePtrMut<T>,
    dy: &impl DevicePtr<T>,
    gate: &impl DevicePtr<T>,
    up: &impl DevicePtr<T>,
) -> Result<()> {
    let (dgate, dup) = (write(stream, dgate), write(stream, dup));
    let (dy, gate, up) = (read(stream, dy), read(stream, gate), read(stream, up));
    gated::launch_backward(Queue::of(stream), [dgate.view, dup.view], dy.view, gate.view, up.view)
}

/// Causal attention of q `[batch·seq, heads, dim]` over k, v `[batch·seq, kv_heads, dim]` with the scale 1/√dim, each query over its
/// window of keys where [`Sizes::window`] is set; `lse`
/// `[batch, heads, seq]` receives the log-sum-exp of every row's scaled scores.
///
/// # Errors
/// Slices that are too short, not aligned to 16 bytes or of another device than the stream; sizes that the kernel does not know;
/// a failed launch.
pub fn attention<T: Float>(
    stream: &CudaStream,
    o: &mut impl DevicePtrMut<T>,
    lse: &mut impl DevicePtrMut<f32>,
    q: &impl DevicePtr<T>,
    k: &impl DevicePtr<T>,
    v: &impl DevicePtr<T>,
    sizes: &Sizes,
) -> Result<()> {
    let (o, lse) = (write(stream, o), write(stream, lse));
    let (q, k, v) = (read(stream, q), read(stream, k), read(stream, v));
    attend::launch::forward(Queue::of(stream), o.view, lse.view, [q.view, k.view, v.view], sizes)
}

/// Bytes of workspace that [`attention_backward`] needs.
///
/// # Errors
/// Sizes that do not fit together, and types other than `f32`, `f16`, `bf16`.
pub fn attention_workspace(sizes: &Sizes, dtype: DType) -> Result<usize> {
    attend::launch::workspace(sizes, dtype.into())
}

/// Gradients of [`attention`], deterministic.
///
/// # Errors
/// Slices that are too short, not aligned to 16 bytes or of another device than the stream; sizes that the kernel does not know;
/// a failed launch.
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
    let (dq, dk, dv, workspace) = (write(stream, dq), write(stream, dk), write(stream, dv), write(stream, workspace));
    let (dout, q, k, v) = (read(stream, dout), read(stream, q), read(stream, k), read(stream, v));
    let (o, lse) = (read(stream, o), read(stream, lse));
    let (to, from) = ([dq.view, dk.view, dv.view], [q.view, k.view, v.view]);
    attend::launch::backward(Queue::of(stream), to, workspace.view, dout.view, from, o.view, lse.view, sizes)
}

/// The loss of every row of logits `[rows, vocab]`; unless `scale` is 0 the logits become `scale (softmax − onehot)`. A target
/// outside the vocabulary, such as −1, marks a row that does not count.
///
/// # Errors
/// Slices that are too short, not aligned to 16 bytes or of another device than the stream; sizes that the kernel does not know;
/// a failed launch.
pub fn cross_entropy<T: Float>(
    stream: &CudaStream,
    logits: &mut impl DevicePtrMut<T>,
    loss: &mut impl DevicePtrMut<f32>,
    targets: &impl DevicePtr<i32>,
    vocab: usize,
    scale: f32,
) -> Result<()> {
    let (logits, loss, targets) = (write(stream, logits), write(stream, loss), read(stream, targets));
    loss_of::launch(Queue::of(stream), logits.view, loss.view, targets.view, vocab, scale)
}

/// `y = alpha a + beta b` of `f32` values, rounded once to bf16.
///
/// ```no_run
/// use half::bf16;
/// use spinquant::kernels;
/// let stream = cudarc::driver::CudaContext::new(0)?.default_stream();
/// let (a, b) = (stream.clone_htod(&[1f32, 2.0])?, stream.clone_htod(&[4f32, 8.0])?);
/// let mut y = stream.alloc_zeros::<bf16>(2)?;
/// kernels::axpby_bf16(&stream, &mut y, (0.5, &a), (0.25, &b))?; // 1.5, 3
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// Slices that are too short, not aligned to 16 bytes or of another device than the stream; a failed launch.
pub fn axpby_bf16(
    stream: &CudaStream,
    y: &mut impl DevicePtrMut<bf16>,
    (alpha, a): (f32, &impl DevicePtr<f32>),
    (beta, b): (f32, &impl DevicePtr<f32>),
) -> Result<()> {
    let (y, a, b) = (write(stream, y), read(stream, a), read(stream, b));
    mixed::launch(Queue::of(stream), y.view, (alpha, a.view), (beta, b.view))
}
