//! Learned scales and clip ratios, and how two networks' likeliest tokens compare.

use cudarc::driver::{CudaStream, DevicePtr, DevicePtrMut};

use super::{Float, read, write};
use crate::Result;
use crate::device::cuda::Queue;
use crate::ops::clipped_fake_quant::{self as clipped, ClippedFakeQuant};
use crate::ops::kl_divergence as divergence;
use crate::ops::log_scale::{self as scale, LogScale};
use crate::ops::{scaled_rms_norm as norm, scaled_swiglu as gated};

/// `y = x exp(±a)` of rows of `cols` values, a one `f32` a row or a column of x.
///
/// ```no_run
/// use spinquant::kernels;
/// use spinquant::ops::log_scale::{Along, LogScale};
/// let stream = cudarc::driver::CudaContext::new(0)?.default_stream();
/// let (x, a) = (stream.alloc_zeros::<f32>(3 * 64)?, stream.alloc_zeros::<f32>(64)?);
/// let mut y = stream.alloc_zeros::<f32>(3 * 64)?;
/// kernels::log_scale(&stream, &mut y, &x, &a, LogScale { along: Along::Columns, inverse: false }, 64)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// Slices that are too short, not aligned to 16 bytes or of another device than the stream; sizes that the kernel does not know;
/// a failed launch.
pub fn log_scale<T: Float>(
    stream: &CudaStream,
    y: &mut impl DevicePtrMut<T>,
    x: &impl DevicePtr<T>,
    a: &impl DevicePtr<f32>,
    op: LogScale,
    cols: usize,
) -> Result<()> {
    let (y, x, a) = (write(stream, y), read(stream, x), read(stream, a));
    scale::launch(Queue::of(stream), op, y.view, x.view, a.view, cols)
}

/// da of [`log_scale`], one `f32` a row or a column, from dy and what went in. (dx is [`log_scale`] of dy.)
///
/// # Errors
/// Slices that are too short, not aligned to 16 bytes or of another device than the stream; sizes that the kernel does not know;
/// a failed launch.
pub fn log_scale_sums<T: Float>(
    stream: &CudaStream,
    da: &mut impl DevicePtrMut<f32>,
    (dy, x): (&impl DevicePtr<T>, &impl DevicePtr<T>),
    a: &impl DevicePtr<f32>,
    op: LogScale,
    cols: usize,
) -> Result<()> {
    let (da, dy, x, a) = (write(stream, da), read(stream, dy), read(stream, x), read(stream, a));
    scale::launch_sums(Queue::of(stream), op, da.view, (dy.view, x.view), Some(a.view), cols)
}

/// RMSNorm of rows of as many values as a, the columns of the result divided by `exp(a)`; `inverse` receives the factor of every row.
///
/// # Errors
/// Slices that are too short, not aligned to 16 bytes or of another device than the stream; sizes that the kernel does not know;
/// a failed launch.
pub fn scaled_rms_norm<T: Float>(
    stream: &CudaStream,
    y: &mut impl DevicePtrMut<T>,
    inverse: &mut impl DevicePtrMut<f32>,
    x: &impl DevicePtr<T>,
    a: &impl DevicePtr<f32>,
    eps: f32,
) -> Result<()> {
    let (y, inverse, x, a) = (write(stream, y), write(stream, inverse), read(stream, x), read(stream, a));
    norm::launch(Queue::of(stream), [y.view, inverse.view], x.view, a.view, eps)
}

/// dx of [`scaled_rms_norm`] from dy, what went in and the factors of its rows; the rows of `parts` `[any number, cols]` add up to da.
///
/// # Errors
/// Slices that are too short, not aligned to 16 bytes or of another device than the stream; sizes that the kernel does not know;
/// a failed launch.
pub fn scaled_rms_norm_backward<T: Float>(
    stream: &CudaStream,
    dx: &mut impl DevicePtrMut<T>,
    parts: &mut impl DevicePtrMut<f32>,
    (dy, x): (&impl DevicePtr<T>, &impl DevicePtr<T>),
    a: &impl DevicePtr<f32>,
    inverse: &impl DevicePtr<f32>,
) -> Result<()> {
    let (dx, parts) = (write(stream, dx), write(stream, parts));
    let (dy, x, a, inverse) = (read(stream, dy), read(stream, x), read(stream, a), read(stream, inverse));
    norm::launch_backward(Queue::of(stream), dx.view, parts.view, [dy.view, x.view], a.view, inverse.view)
}

/// `y = silu(gate) · up exp(−a)` for rows of as many values as a.
///
/// # Errors
/// Slices that are too short, not aligned to 16 bytes or of another device than the stream; sizes that the kernel does not know;
/// a failed launch.
pub fn scaled_swiglu<T: Float>(
    stream: &CudaStream,
    y: &mut impl DevicePtrMut<T>,
    (gate, up): (&impl DevicePtr<T>, &impl DevicePtr<T>),
    a: &impl DevicePtr<f32>,
) -> Result<()> {
    let (y, gate, up, a) = (write(stream, y), read(stream, gate), read(stream, up), read(stream, a));
    gated::launch(Queue::of(stream), y.view, gate.view, up.view, a.view)
}

/// Gradients of [`scaled_swiglu`]; the rows of `parts` `[up to 65535, cols]` add up to da.
///
/// # Errors
/// Slices that are too short, not aligned to 16 bytes or of another device than the stream; sizes that the kernel does not know;
/// a failed launch.
pub fn scaled_swiglu_backward<T: Float>(
    stream: &CudaStream,
    (dgate, dup): (&mut impl DevicePtrMut<T>, &mut impl DevicePtrMut<T>),
    parts: &mut impl DevicePtrMut<f32>,
    (dy, gate, up): (&impl DevicePtr<T>, &impl DevicePtr<T>, &impl DevicePtr<T>),
    a: &impl DevicePtr<f32>,
) -> Result<()> {
    let (dgate, dup, parts) = (write(stream, dgate), write(stream, dup), write(stream, parts));
    let (dy, gate, up, a) = (read(stream, dy), read(stream, gate), read(stream, up), read(stream, a));
    gated::launch_backward(Queue::of(stream), [dgate.view, dup.view], parts.view, [dy.view, gate.view, up.view], a.view)
}

/// Every row of `cols` values quantised and dequantised, the ends of its range clipped by `exp(a)` of its kind; a is `[kinds, 2]`, and
/// rows (or groups) are of the kinds in turn.
///
/// # Errors
/// Slices that are too short, not aligned to 16 bytes or of another device than the stream; sizes that the kernel does not know;
/// a failed launch.
pub fn clipped_fake_quant<T: Float>(
    stream: &CudaStream,
    y: &mut impl DevicePtrMut<T>,
    x: &impl DevicePtr<T>,
    a: &impl DevicePtr<f32>,
    op: &ClippedFakeQuant,
    cols: usize,
) -> Result<()> {
    let (y, x, a) = (write(stream, y), read(stream, x), read(stream, a));
    clipped::launch(Queue::of(stream), op, y.view, x.view, a.view, cols)
}

/// dx of [`clipped_fake_quant`] from dy and what went in, and what every row (or group) adds to the gradients of its kind's two
/// logarithms: `sums`, two `f32` each.
///
/// # Errors
/// Slices that are too short, not aligned to 16 bytes or of another device than the stream; sizes that the kernel does not know;
/// a failed launch.
#[allow(clippy::too_many_arguments)]
pub fn clipped_fake_quant_backward<T: Float>(
    stream: &CudaStream,
    dx: &mut impl DevicePtrMut<T>,
    sums: &mut impl DevicePtrMut<f32>,
    (dy, x): (&impl DevicePtr<T>, &impl DevicePtr<T>),
    a: &impl DevicePtr<f32>,
    op: &ClippedFakeQuant,
    cols: usize,
) -> Result<()> {
    let (dx, sums) = (write(stream, dx), write(stream, sums));
    let (dy, x, a) = (read(stream, dy), read(stream, x), read(stream, a));
    clipped::launch_backward(Queue::of(stream), op, (dx.view, dy.view, x.view), a.view, sums.view, cols)
}

/// 1 for every row of `cols` values whose largest is in the same place in `a` and in `b` (of equal ones the first), else 0.
///
/// ```no_run
/// use spinquant::kernels;
/// let stream = cudarc::driver::CudaContext::new(0)?.default_stream();
/// let (a, b) = (stream.clone_htod(&[1f32, 2.0, 0.0, 3.0, 0.0, 0.0])?, stream.clone_htod(&[0f32, 9.0, 0.0, 0.0, 0.0, 3.0])?);
/// let mut agree = stream.alloc_zeros::<i32>(2)?;
/// kernels::agreement(&stream, &mut agree, &a, &b, 3)?; // 1, 0
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// Slices that are too short, not aligned to 16 bytes or of another device than the stream; sizes that the kernel does not know;
/// a failed launch.
pub fn agreement<T: Float>(
    stream: &CudaStream,
    agree: &mut impl DevicePtrMut<i32>,
    a: &impl DevicePtr<T>,
    b: &impl DevicePtr<T>,
    cols: usize,
) -> Result<()> {
    let (agree, a, b) = (write(stream, agree), read(stream, a), read(stream, b));
    divergence::launch_agreement(Queue::of(stream), agree.view, a.view, b.view, cols)
}
