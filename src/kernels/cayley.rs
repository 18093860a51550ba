//! What Cayley steps need besides matrix products, on batches of `n × n` matrices of `f32`.
//!
//! ```no_run
//! use spinquant::kernels::cayley;
//! let stream = cudarc::driver::CudaContext::new(0)?.default_stream();
//! // Two matrices of 64 × 64: w = g − gᵀ, and for each the largest step that keeps a Cayley map well conditioned.
//! let (n, g) = (64, stream.alloc_zeros::<f32>(2 * 64 * 64)?);
//! let (mut w, mut alpha) = (stream.alloc_zeros::<f32>(2 * n * n)?, stream.alloc_zeros::<f32>(2)?);
//! cayley::skew(&stream, &mut w, &g, n)?;
//! cayley::step_size(&stream, &mut alpha, &w, 1.5, n)?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Errors
//! As [`kernels`](super).

use cudarc::driver::{CudaStream, DevicePtr, DevicePtrMut};

use super::{read, write};
use crate::Result;
use crate::device::cuda::Queue;
use crate::linalg::gpu;

/// Every row divided by (its 2-norm + 1e-8).
///
/// # Errors
/// Slices that are not whole matrices, are of different lengths, not aligned to 16 bytes or of another device than the stream; a
/// failed launch.
pub fn normalize_rows(stream: &CudaStream, y: &mut impl DevicePtrMut<f32>, x: &impl DevicePtr<f32>, n: usize) -> Result<()> {
    let (y, x) = (write(stream, y), read(stream, x));
    gpu::launch_normalize_rows(Queue::of(stream), y.view, x.view, n)
}

/// `w = a − aᵀ`.
///
/// # Errors
/// Slices that are not whole matrices, are of different lengths, not aligned to 16 bytes or of another device than the stream; a
/// failed launch.
pub fn skew(stream: &CudaStream, w: &mut impl DevicePtrMut<f32>, a: &impl DevicePtr<f32>, n: usize) -> Result<()> {
    let (w, a) = (write(stream, w), read(stream, a));
    gpu::launch_skew(Queue::of(stream), w.view, a.view, n)
}

/// `y = alpha xᵀ + beta z`.
///
/// # Errors
/// Slices that are not whole matrices, are of different lengths, not aligned to 16 bytes or of another device than the stream; a
/// failed launch.
pub fn transpose_axpby(
    stream: &CudaStream,
    y: &mut impl DevicePtrMut<f32>,
    (alpha, x): (f32, &impl DevicePtr<f32>),
    (beta, z): (f32, &impl DevicePtr<f32>),
    n: usize,
) -> Result<()> {
    let (y, x, z) = (write(stream, y), read(stream, x), read(stream, z));
    gpu::launch_transpose_axpby(Queue::of(stream), y.view, (alpha, x.view), (beta, Some(z.view)), n)
}

/// `alpha[b] = min(lr, 1 / (‖w[b]‖₁ + 1e-8))`, ‖·‖₁ the largest column sum of |·|.
///
/// # Errors
/// Slices that are not whole matrices, are of different lengths, not aligned to 16 bytes or of another device than the stream; a
/// failed launch.
pub fn step_size(
    stream: &CudaStream,
    alpha: &mut impl DevicePtrMut<f32>,
    w: &impl DevicePtr<f32>,
    lr: f32,
    n: usize,
) -> Result<()> {
    let (alpha, w) = (write(stream, alpha), read(stream, w));
    gpu::launch_step_size(Queue::of(stream), alpha.view, w.view, lr, n)
}

/// `y[b] = a[b] + factor · alpha[b] · x[b]`.
///
/// # Errors
/// Slices that are not whole matrices, are of different lengths, not aligned to 16 bytes or of another device than the stream; a
/// failed launch.
pub fn add_scaled(
    stream: &CudaStream,
    y: &mut impl DevicePtrMut<f32>,
    a: &impl DevicePtr<f32>,
    (factor, alpha): (f32, &impl DevicePtr<f32>),
    x: &impl DevicePtr<f32>,
    n: usize,
) -> Result<()> {
    let (y, a, alpha, x) = (write(stream, y), read(stream, a), read(stream, alpha), read(stream, x));
    gpu::launch_add_scaled(Queue::of(stream), y.view, Some(a.view), (factor, alpha.view), x.view, n)
}

/// `residual = I − gram` and `error[b] = max|gram[b] − I|` of Gram matrices in `f64`.
///
/// # Errors
/// Slices that are not whole matrices, are of different lengths, not aligned to 16 bytes or of another device than the stream; a
/// failed launch.
pub fn gram_residual(
    stream: &CudaStream,
    residual: &mut impl DevicePtrMut<f32>,
    error: &mut impl DevicePtrMut<f64>,
    gram: &impl DevicePtr<f64>,
    n: usize,
) -> Result<()> {
    let (residual, error, gram) = (write(stream, residual), write(stream, error), read(stream, gram));
    gpu::launch_gram_residual(Queue::of(stream), residual.view, error.view, gram.view, n)
}

/// `y = x`, widened.
///
/// # Errors
/// Slices of different lengths, not aligned to 16 bytes or of another device than the stream; a failed launch.
pub fn widen(stream: &CudaStream, y: &mut impl DevicePtrMut<f64>, x: &impl DevicePtr<f32>) -> Result<()> {
    let (y, x) = (write(stream, y), read(stream, x));
    gpu::launch_widen(Queue::of(stream), y.view, x.view)
}
