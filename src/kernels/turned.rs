//! Learned turns of pairs of rows, and heads in front.

use cudarc::driver::{CudaStream, DevicePtr, DevicePtrMut};

use super::{Float, read, write};
use crate::Result;
use crate::device::cuda::Queue;
use crate::ops::rope_pairs::{self as pairs, RopePairs};
use crate::ops::swap_axes as axes;

/// Pairs of the rows of heads turned and scaled: see [`ops::rope_pairs`](crate::ops::rope_pairs). `angles` are the logarithms and the
/// angles, `2 · pairs` numbers for every `group` heads.
///
/// ```no_run
/// use spinquant::kernels;
/// use spinquant::ops::rope_pairs::{RopePairs, Sizes};
/// let stream = cudarc::driver::CudaContext::new(0)?.default_stream();
/// // Four query heads of 64 rows of 96 values; two share their angles.
/// let (x, angles) = (stream.alloc_zeros::<f32>(4 * 64 * 96)?, stream.alloc_zeros::<f32>(2 * 2 * 32)?);
/// let mut y = stream.alloc_zeros::<f32>(4 * 64 * 96)?;
/// let sizes = Sizes { dim: 64, group: 2, pairs: 32, cols: 96 };
/// kernels::rope_pairs(&stream, &mut y, &x, &angles, RopePairs { dim: 64, inverse: true }, sizes)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// Slices that are too short, not aligned to 16 bytes or of another device than the stream; sizes that do not fit together; a failed
/// launch.
pub fn rope_pairs<T: Float>(
    stream: &CudaStream,
    y: &mut impl DevicePtrMut<T>,
    x: &impl DevicePtr<T>,
    angles: &impl DevicePtr<f32>,
    op: RopePairs,
    sizes: pairs::Sizes,
) -> Result<()> {
    let (y, x, angles) = (write(stream, y), read(stream, x), read(stream, angles));
    pairs::launch(Queue::of(stream), op, y.view, x.view, angles.view, sizes)
}

/// dx of [`rope_pairs`], and the gradient of its logarithms and angles, from dy and what went in.
///
/// # Errors
/// Slices that are too short, not aligned to 16 bytes or of another device than the stream; sizes that do not fit together; a failed
/// launch.
#[allow(clippy::too_many_arguments)]
pub fn rope_pairs_backward<T: Float>(
    stream: &CudaStream,
    dx: &mut impl DevicePtrMut<T>,
    dangles: &mut impl DevicePtrMut<f32>,
    (dy, x): (&impl DevicePtr<T>, &impl DevicePtr<T>),
    angles: &impl DevicePtr<f32>,
    op: RopePairs,
    sizes: pairs::Sizes,
) -> Result<()> {
    let (dx, dangles) = (write(stream, dx), write(stream, dangles));
    let (dy, x, angles) = (read(stream, dy), read(stream, x), read(stream, angles));
    let outputs = [Some(dx.view), Some(dangles.view)];
    pairs::launch_backward(Queue::of(stream), op, outputs, (dy.view, Some(x.view)), angles.view, sizes)
}

/// `y [b, a, d]` of `x [a, b, d]`: the first two axes swapped.
///
/// # Errors
/// Slices of another length than a · b · d, not aligned to 16 bytes or of another device than the stream; a failed launch.
pub fn swap_axes<T: Float>(
    stream: &CudaStream,
    y: &mut impl DevicePtrMut<T>,
    x: &impl DevicePtr<T>,
    shape: [usize; 3],
) -> Result<()> {
    let (y, x) = (write(stream, y), read(stream, x));
    axes::launch(Queue::of(stream), y.view, x.view, shape, size_of::<T>())
}
