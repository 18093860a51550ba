//! Integer codes, and linear layers on them.

use cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DevicePtrMut, DeviceRepr};

use super::{Float, HadamardMap, Held, Stored, read, write};
use crate::Result;
use crate::device::cuda::Queue;
use crate::grid::QuantSpec;
use crate::ops::integer_linear::{self as linear, Coded, Operands};
use crate::ops::{codes, hadamard_codes};

/// Codes of rows of k columns, with their grids: values `scale (code − zero)`.
#[derive(Clone, Copy)]
pub struct CodedRows<'a> {
    /// The codes, row by row; unsigned ones less `2^(bits−1)`.
    pub codes: &'a CudaSlice<i8>,
    /// A scale for every group of every row.
    pub scale: &'a CudaSlice<f32>,
    /// As many zero points, whole numbers, less what codes are; `None`: all are 0.
    pub zero: Option<&'a CudaSlice<f32>>,
    /// Columns that share a scale.
    pub group: usize,
}

/// The codes of every row of `cols` values of x as bytes, unsigned ones less `2^(bits−1)`, with a scale for every group, and a zero point, less
/// as much, where the spec has some.
///
/// ```no_run
/// use half::bf16;
/// use spinquant::grid::QuantSpec;
/// use spinquant::kernels::{self, CodedRows};
/// let stream = cudarc::driver::CudaContext::new(0)?.default_stream();
/// let (m, n, k) = (512, 256, 4096);
/// let (x, w) = (stream.alloc_zeros::<bf16>(m * k)?, stream.alloc_zeros::<bf16>(n * k)?);
/// let (mut q_x, mut s_x, mut z_x) = (stream.alloc_zeros::<i8>(m * k)?, stream.alloc_zeros(m)?, stream.alloc_zeros(m)?);
/// let (mut q_w, mut s_w, mut sums) = (stream.alloc_zeros::<i8>(n * k)?, stream.alloc_zeros(n)?, stream.alloc_zeros(n)?);
/// kernels::quantize_codes(&stream, &mut q_w, &mut s_w, None, &w, k, &QuantSpec::weight(4, true))?;
/// kernels::code_sums(&stream, &mut sums, &q_w, k, k)?; // once for a weight
/// kernels::quantize_codes(&stream, &mut q_x, &mut s_x, Some(&mut z_x), &x, k, &QuantSpec::activation(4, false))?;
/// let x = CodedRows { codes: &q_x, scale: &s_x, zero: Some(&z_x), group: k };
/// let w = CodedRows { codes: &q_w, scale: &s_w, zero: None, group: k };
/// let mut y = stream.alloc_zeros::<bf16>(m * n)?;
/// kernels::integer_linear(&stream, &mut y, x, w, Some(&sums), None, None, k)?; // y = x̂ Ŵᵀ
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// Clip search; slices that are too short, not aligned to 16 bytes or of another device than the stream; a failed launch.
pub fn quantize_codes<T: Float>(
    stream: &CudaStream,
    codes: &mut CudaSlice<i8>,
    scale: &mut CudaSlice<f32>,
    zero: Option<&mut CudaSlice<f32>>,
    x: &impl DevicePtr<T>,
    cols: usize,
    spec: &QuantSpec,
) -> Result<()> {
    let zero = zero.map(|z| write::<f32>(stream, z));
    let (codes, scale, x) = (write::<i8>(stream, codes), write::<f32>(stream, scale), read(stream, x));
    codes::launch_quantize(Queue::of(stream), codes.view, scale.view, zero.as_ref().map(|z| z.view), x.view, cols, spec)
}

/// The codes of `H x` of every row, as [`quantize_codes`] gives those of x, in one pass: the transformed row is not rounded in between. Codes in
/// `i8`, or of at most 4 bits in `u8`, two a byte and the first in the low half.
///
/// ```no_run
/// use half::bf16;
/// use spinquant::grid::QuantSpec;
/// use spinquant::kernels::{self, HadamardMap};
/// let stream = cudarc::driver::CudaContext::new(0)?.default_stream();
/// let (rows, n) = (512, 11008);
/// let (map, x) = (HadamardMap::new(&stream, n)?, stream.alloc_zeros::<bf16>(rows * n)?);
/// let (mut scale, mut zero) = (stream.alloc_zeros(rows)?, stream.alloc_zeros(rows)?);
/// let mut packed = stream.alloc_zeros::<u8>(rows * n / 2)?;
/// let spec = QuantSpec::activation(4, false);
/// kernels::hadamard_codes(&stream, &mut packed, &mut scale, Some(&mut zero), &x, &map, &spec)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// Clip search; more than 4 bits or odd groups in `u8`; slices that are too short, not aligned to 16 bytes or of another device than the
/// stream; rows that the card does not hold on chip; a failed launch.
pub fn hadamard_codes<T: Float, C: Code>(
    stream: &CudaStream,
    codes: &mut CudaSlice<C>,
    scale: &mut CudaSlice<f32>,
    zero: Option<&mut CudaSlice<f32>>,
    x: &impl DevicePtr<T>,
    map: &HadamardMap,
    spec: &QuantSpec,
) -> Result<()> {
    let zero = zero.map(|z| write::<f32>(stream, z));
    let (codes, scale, x, held) = (write::<C>(stream, codes), write::<f32>(stream, scale), read(stream, x), map.held(stream));
    let out = (codes.view, scale.view, zero.as_ref().map(|z| z.view));
    hadamard_codes::launch(Queue::of(stream), out, x.view, &map.tables(&held), spec)
}

/// What codes are written in: `i8`, one each, or `u8`, two each.
#[allow(private_bounds)]
pub trait Code: DeviceRepr + Stored {}
impl Code for i8 {}
impl Code for u8 {}

/// Sums of the codes of rows of `cols` over parts of `part` columns.
///
/// # Errors
/// Slices that are too short, not aligned to 16 bytes or of another device than the stream; parts that do not divide rows; a failed
/// launch.
pub fn code_sums(
    stream: &CudaStream,
    sums: &mut impl DevicePtrMut<i32>,
    codes: &impl DevicePtr<i8>,
    cols: usize,
    part: usize,
) -> Result<()> {
    let (sums, codes) = (write(stream, sums), read(stream, codes));
    codes::launch_sums(Queue::of(stream), sums.view, codes.view, cols, part)
}

/// `y = x̂ ŵᵀ + bias + residual` of codes in rows of k: the product of integers, exact, then scales in `f32`
/// ([`ops::integer_linear`](crate::ops::integer_linear) says in which order). `sums` are those of w's codes over the smaller of the two
/// groups, needed where x has zero points.
///
/// # Errors
/// Zero points of w; groups that do not divide k and one another, or are no multiples of 32; more than 65536 columns; slices that are too
/// short, not aligned to 16 bytes or of another device than the stream; a failed launch.
#[allow(clippy::too_many_arguments)]
pub fn integer_linear<T: Float>(
    stream: &CudaStream,
    y: &mut impl DevicePtrMut<T>,
    x: CodedRows<'_>,
    w: CodedRows<'_>,
    sums: Option<&CudaSlice<i32>>,
    bias: Option<&CudaSlice<T>>,
    residual: Option<&CudaSlice<T>>,
    k: usize,
) -> Result<()> {
    let (x_held, w_held) = (HeldRows::new(stream, &x), HeldRows::new(stream, &w));
    let (sums, y) = (sums.map(|s| read(stream, s)), write(stream, y));
    let (bias, residual) = (bias.map(|b| read(stream, b)), residual.map(|r| read(stream, r)));
    let operands = Operands {
        x: x_held.view(x.group),
        w: w_held.view(w.group),
        sums: sums.as_ref().map(|s| s.view),
        bias: bias.as_ref().map(|b| b.view),
        residual: residual.as_ref().map(|r| r.view),
    };
    linear::launch(Queue::of(stream), y.view, &operands, k)
}

struct HeldRows<'a> {
    codes: Held<'a>,
    scale: Held<'a>,
    zero: Option<Held<'a>>,
}

impl<'a> HeldRows<'a> {
    fn new(stream: &'a CudaStream, rows: &CodedRows<'a>) -> Self {
        Self { codes: read(stream, rows.codes), scale: read(stream, rows.scale), zero: rows.zero.map(|z| read(stream, z)) }
    }
    fn view(&self, group: usize) -> Coded<'_> {
        Coded { codes: self.codes.view, scale: self.scale.view, zero: self.zero.as_ref().map(|z| z.view), group }
    }
}
