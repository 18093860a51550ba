//! Blocks of 4-bit floating-point numbers.

use cudarc::driver::{CudaStream, DevicePtr, DevicePtrMut};

use super::{Float, read, write};
use crate::Result;
use crate::device::cuda::Queue;
use crate::grid::floating::Format;
use crate::ops::microscaling::{self as blocks, Outputs};

/// Encodes x in blocks of [MXFP4 or NVFP4](crate::grid::floating), as it is or Hadamard-transformed in blocks of `rotated` values (16, 32, 64
/// … 512; 0: not), which are not rounded in between: two elements a byte, the first in the low half, and a byte a block for its scale.
/// `largest` is the largest magnitude of what is encoded ([`largest`]), of which NVFP4's scales are fractions; `None`: of 1.
///
/// ```no_run
/// use half::bf16;
/// use spinquant::{grid::floating::Format, kernels};
/// let stream = cudarc::driver::CudaContext::new(0)?.default_stream();
/// let x = stream.alloc_zeros::<bf16>(1024 * 4096)?;
/// let (mut codes, mut scales) = (stream.alloc_zeros::<u8>(512 * 4096)?, stream.alloc_zeros::<u8>(32 * 4096)?);
/// kernels::encode(&stream, &mut codes, &mut scales, &x, None::<&cudarc::driver::CudaSlice<f32>>, Format::Mxfp4, 32)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// Slices of other lengths than the format asks for, not aligned to 16 bytes or of another device than the stream; another size of
/// Hadamard matrices; a failed launch.
pub fn encode<T: Float>(
    stream: &CudaStream,
    codes: &mut impl DevicePtrMut<u8>,
    scales: &mut impl DevicePtrMut<u8>,
    x: &impl DevicePtr<T>,
    largest: Option<&impl DevicePtr<f32>>,
    format: Format,
    rotated: usize,
) -> Result<()> {
    let (codes, scales, x) = (write(stream, codes), write(stream, scales), read(stream, x));
    let largest = largest.map(|l| read(stream, l));
    let out = Outputs { y: None, codes: Some(codes.view), scales: Some(scales.view) };
    blocks::launch(Queue::of(stream), out, largest.as_ref().map(|l| l.view), x.view, (format, 1.0), rotated)
}

/// The largest magnitude of x, one `f32`.
///
/// # Errors
/// Those of [`encode`].
pub fn largest<T: Float>(stream: &CudaStream, largest: &mut impl DevicePtrMut<f32>, x: &impl DevicePtr<T>) -> Result<()> {
    let (largest, x) = (write(stream, largest), read(stream, x));
    blocks::launch_largest(Queue::of(stream), largest.view, x.view)
}
