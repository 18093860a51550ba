//! What the CPU kernels share: buffers, threads, vector instructions, matrix products.

use std::any::Any;
use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Mutex, OnceLock};

use half::{bf16, f16};
use rayon::prelude::*;

use crate::device::shared::SharedPart;
use crate::dtype::{DType, Element};
use crate::{Error, Result};

/// Buffers below this many values are not worth keeping.
const POOL_MIN: usize = 1 << 16;
/// What the pool keeps at most, in bytes.
const POOL_MAX_BYTES: usize = 3 << 30;

#[derive(Default)]
struct Pool {
    free: HashMap<usize, Vec<Vec<f32>>>,
    bytes: usize,
}

fn pool() -> &'static Mutex<Pool> {
    static POOL: OnceLock<Mutex<Pool>> = OnceLock::new();
    POOL.get_or_init(Mutex::default)
}

/// A vector of `n` values of unspecified (but initialised) content, recycled where possible: a learning step asks for the
/// same sizes again and again, and fresh pages cost more than the arithmetic on them.
pub fn alloc(n: usize) -> Vec<f32> {
    if n >= POOL_MIN {
        let mut pool = pool().lock().unwrap_or_else(|e| e.into_inner());
        if let Some(v) = pool.free.get_mut(&n).and_then(Vec::pop) {
            pool.bytes -= n * 4;
            return v;
        }
    }
    vec![0.0; n]
}

/// Returns a buffer to the pool.
pub(crate) fn recycle(v: Vec<f32>) {
    if v.len() >= POOL_MIN && v.len() == v.capacity() {
        let mut pool = pool().lock().unwrap_or_else(|e| e.into_inner());
        if pool.bytes + v.len() * 4 <= POOL_MAX_BYTES {
            pool.bytes += v.len() * 4;
            pool.free.entry(v.len()).or_default().push(v);
        }
    }
}

/// Gives the pool's memory back to the system; worth calling between phases that use different shapes.
pub fn trim() {
    *pool().lock().unwrap_or_else(|e| e.into_inner()) = Pool::default();
}

/// Memory of a CPU tensor. Large `f32` buffers return to a pool when dropped ([`alloc`]).
#[derive(Debug)]
pub(crate) enum CpuBuffer {
    F64(Vec<f64>),
    F32(Vec<f32>),
    F16(Vec<f16>),
    BF16(Vec<bf16>),
    U32(Vec<u32>),
    /// Values that processes share, which nobody writes.
    Shared(SharedPart, DType),
}

impl CpuBuffer {
    /// Takes a vector.
    pub(crate) fn wrap<T: Element>(values: Vec<T>) -> Self {
        let mut buffer = match T::DTYPE {
            DType::F64 => Self::F64(vec![]),
            DType::F32 => Self::F32(vec![]),
            DType::F16 => Self::F16(vec![]),
            DType::BF16 => Self::BF16(vec![]),
            DType::U32 => Self::U32(vec![]),
        };
        *buffer.view_mut::<T>().expect("made of this type just now") = values;
        buffer
    }

    /// The values, where they are of this type.
    pub(crate) fn view<T: Element>(&self) -> Option<&[T]> {
        let values: &dyn Any = match self {
            Self::Shared(part, dtype) => return (*dtype == T::DTYPE).then(|| bytemuck::cast_slice(part.bytes())),
            Self::F64(v) => v,
            Self::F32(v) => v,
            Self::F16(v) => v,
            Self::BF16(v) => v,
            Self::U32(v) => v,
        };
        values.downcast_ref::<Vec<T>>().map(Vec::as_slice)
    }

    /// The vector, where it is one, and of this type.
    pub(crate) fn view_mut<T: Element>(&mut self) -> Option<&mut Vec<T>> {
        let values: &mut dyn Any = match self {
            Self::Shared(..) => return None,
            Self::F64(v) => v,
            Self::F32(v) => v,
            Self::F16(v) => v,
            Self::BF16(v) => v,
            Self::U32(v) => v,
        };
        values.downcast_mut::<Vec<T>>()
    }

    /// The element type.
    pub(crate) fn dtype(&self) -> DType {
        match self {
            Self::F64(_) => DType::F64,
            Self::F32(_) => DType::F32,
            Self::F16(_) => DType::F16,
            Self::BF16(_) => DType::BF16,
            Self::U32(_) => DType::U32,
            Self::Shared(_, dtype) => *dtype,
        }
    }
}

impl Drop for CpuBuffer {
    fn drop(&mut self) {
        if let Self::F32(v) = self {
            recycle(std::mem::take(v));
        }
    }
}

/// Runs `f` compiled for the best vector instructions of this machine. `f` and what it calls must be `#[inline(always)]`.
#[inline(always)]
pub fn simd<R>(f: impl FnOnce() -> R) -> R {
    struct Wrap<F>(F);
    impl<R, F: FnOnce() -> R> pulp::WithSimd for Wrap<F> {
        type Output = R;
        #[inline(always)]
        fn with_simd<S: pulp::Simd>(self, _: S) -> R {
            (self.0)()
        }
    }
    pulp::Arch::new().dispatch(Wrap(f))
}

/// Rows handed to one task at a time, so that a task is about 16k values.
pub fn rows_per_task(cols: usize) -> usize {
    (16384 / cols.max(1)).max(1)
}

/// Calls `f(first_row, rows_of_y, rows_of_x)` over blocks of rows in parallel, inside [`simd`].
pub fn map_rows<A: Sync, B: Send>(y: &mut [B], x: &[A], ycols: usize, xcols: usize, f: impl Fn(usize, &mut [B], &[A]) + Sync) {
    let step = rows_per_task(xcols.max(ycols));
    y.par_chunks_mut(step * ycols.max(1))
        .zip(x.par_chunks(step * xcols.max(1)))
        .enumerate()
        .for_each(|(i, (y, x))| simd(|| f(i * step, y, x)));
}

/// `y ← x`, on all cores.
pub(crate) fn copy<T: Copy + Sync + Send>(y: &mut [T], x: &[T]) {
    y.par_chunks_mut(1 << 16).zip(x.par_chunks(1 << 16)).for_each(|(y, x)| y.copy_from_slice(x));
}

/// Elementwise `y[i] = f(y[i], x[i])` in parallel, inside [`simd`].
pub fn zip_in_place<T: Copy + Sync + Send>(y: &mut [T], x: &[T], f: impl Fn(T, T) -> T + Sync + Copy) {
    map_rows(y, x, 1, 1, |_, y, x| y.iter_mut().zip(x).for_each(|(y, &x)| *y = f(*y, x)));
}

/// Lanes the inner loops are written in, for the compiler to turn into vector instructions.
pub(crate) const LANES: usize = 16;

/// eˣ with a relative error below 2·10⁻⁷: 0 below −87, infinite above 88, in code that vectorises.
#[inline(always)]
pub fn exp_f32(x: f32) -> f32 {
    const SHIFT: f32 = 12_582_912.0; // 1.5·2²³: adding it rounds to an integer, left in the low bits
    const LN2_HIGH: f32 = 355.0 / 512.0; // exact in 9 bits, so that whole · LN2_HIGH is exact
    const LN2_LOW: f32 = -2.121_944_4e-4;
    // x = whole ln 2 + r, |r| ≤ ½ ln 2; e^r by a minimax polynomial of relative error 3·10⁻⁹.
    let shifted = x.mul_add(std::f32::consts::LOG2_E, SHIFT);
    let whole = shifted - SHIFT;
    let r = whole.mul_add(-LN2_LOW, whole.mul_add(-LN2_HIGH, x));
    let p = 1.381_456e-3f32.mul_add(r, 8.368_736e-3).mul_add(r, 4.166_839e-2).mul_add(r, 1.666_652e-1).mul_add(r, 4.999_999_4e-1);
    let y = p.mul_add(r * r, r) + 1.0;
    let y = y * f32::from_bits((shifted.to_bits() << 23).wrapping_add(1.0f32.to_bits()));
    let y = if x < -87.0 { 0.0 } else { y };
    if x > 88.0 { f32::INFINITY } else { y }
}

/// Σ f(a, b) of two slices of one length, in lanes and so in a fixed order.
#[inline(always)]
pub(crate) fn sum2(a: &[f32], b: &[f32], f: impl Fn(f32, f32) -> f32) -> f32 {
    let (a_chunks, a_tail) = a.as_chunks::<LANES>();
    let (b_chunks, b_tail) = b.as_chunks::<LANES>();
    let mut sum = [0f32; LANES];
    for (a, b) in a_chunks.iter().zip(b_chunks) {
        for i in 0..LANES {
            sum[i] += f(a[i], b[i]);
        }
    }
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            sum[i] += sum[i + half];
        }
        half /= 2;
    }
    a_tail.iter().zip(b_tail).fold(sum[0], |s, (&a, &b)| s + f(a, b))
}

/// Largest value (−∞ of none), in lanes.
#[inline(always)]
pub(crate) fn max(x: &[f32]) -> f32 {
    let (chunks, tail) = x.as_chunks::<LANES>();
    let mut max = [f32::NEG_INFINITY; LANES];
    for c in chunks {
        for i in 0..LANES {
            max[i] = if c[i] > max[i] { c[i] } else { max[i] };
        }
    }
    max.iter().chain(tail).fold(f32::NEG_INFINITY, |m, &v| if v > m { v } else { m })
}

/// `x ← exp(x − shift)`; returns their sum, added up in lanes.
#[inline(always)]
pub(crate) fn exp_sum(x: &mut [f32], shift: f32) -> f32 {
    let (chunks, tail) = x.as_chunks_mut::<LANES>();
    let mut sum = [0f32; LANES];
    for c in chunks {
        for i in 0..LANES {
            c[i] = exp_f32(c[i] - shift);
            sum[i] += c[i];
        }
    }
    let mut total = sum.iter().sum::<f32>();
    for v in tail {
        *v = exp_f32(*v - shift);
        total += *v;
    }
    total
}

/// Some values of a buffer in another floating-point type, rounded once.
pub(crate) fn cast<T: Element>(x: &CpuBuffer, values: Range<usize>) -> Result<CpuBuffer> {
    fn go<S: Element, T: Element>(x: &[S]) -> Vec<T> {
        x.par_chunks(1 << 14).flat_map_iter(|c| c.iter().map(|v| T::from_f64(v.to_f64()))).collect()
    }
    fn all<T: Element>(x: &CpuBuffer) -> &[T] {
        x.view().expect("values of the type that they are said to have")
    }
    Ok(CpuBuffer::wrap(match x.dtype() {
        DType::F64 => go::<f64, T>(&all(x)[values]),
        DType::F32 => go::<f32, T>(&all(x)[values]),
        DType::F16 => go::<f16, T>(&all(x)[values]),
        DType::BF16 => go::<bf16, T>(&all(x)[values]),
        DType::U32 => return Err(Error::dtype("cast", "a floating-point type", DType::U32)),
    }))
}

/// The floating-point types CPU arithmetic is done in.
pub trait Real: Element + std::ops::Add<Output = Self> + std::ops::Mul<Output = Self> + std::ops::Sub<Output = Self> {
    /// Zero.
    const ZERO: Self;
    /// One.
    const ONE: Self;
}
impl Real for f32 {
    const ZERO: Self = 0.0;
    const ONE: Self = 1.0;
}
impl Real for f64 {
    const ZERO: Self = 0.0;
    const ONE: Self = 1.0;
}

/// A matrix seen through strides: element (i, j) at `i * row + j * col`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Strides {
    /// Distance of vertically adjacent elements.
    pub row: usize,
    /// Distance of horizontally adjacent elements.
    pub col: usize,
}

impl Strides {
    /// Row-major with `cols` columns; transposed: the same memory read as its transpose.
    pub fn new(cols: usize, transposed: bool) -> Self {
        if transposed { Self { row: 1, col: cols } } else { Self { row: cols, col: 1 } }
    }
    /// Where the last element is; `None` beyond any address.
    fn last(self, rows: usize, cols: usize) -> Option<usize> {
        let down = (rows.max(1) - 1).checked_mul(self.row)?;
        let last = down.checked_add((cols.max(1) - 1).checked_mul(self.col)?)?;
        isize::try_from(last).is_ok().then_some(last)
    }

    /// Whether a slice of `len` values holds every element.
    fn within(self, len: usize, rows: usize, cols: usize) -> bool {
        self.last(rows, cols).is_some_and(|last| last < len)
    }

    /// Whether no two elements are one: rows, or columns, lie behind one another.
    fn distinct(self, rows: usize, cols: usize) -> bool {
        let apart = |far: usize, many: usize, near: usize, few: usize| {
            (few <= 1 || near > 0) && (many <= 1 || (few - 1).checked_mul(near).is_some_and(|extent| far > extent))
        };
        apart(self.row, rows, self.col, cols) || apart(self.col, cols, self.row, rows)
    }
}

/// `c[m, n] = beta c + alpha a[m, k] b[k, n]`, on all cores when `parallel`.
///
/// # Panics
/// Where a slice is too short for its strides, or two elements of c would be one.
#[allow(clippy::too_many_arguments)]
pub(crate) fn gemm<T: Real>(
    (m, n, k): (usize, usize, usize),
    c: &mut [T],
    cs: Strides,
    beta: T,
    a: &[T],
    sa: Strides,
    b: &[T],
    sb: Strides,
    alpha: T,
    parallel: bool,
) {
    if m == 0 || n == 0 {
        return;
    }
    assert!(cs.within(c.len(), m, n), "gemm: output of {} values is too short", c.len());
    assert!(cs.distinct(m, n), "gemm: elements of the output coincide: {cs:?} of {m} x {n}");
    assert!(k == 0 || sa.within(a.len(), m, k) && sb.within(b.len(), k, n), "gemm: an operand is too short");
    let threads = if parallel && m.saturating_mul(n).saturating_mul(k) > 1 << 16 {
        gemm::Parallelism::Rayon(0)
    } else {
        gemm::Parallelism::None
    };
    // SAFETY: the three accesses were bounds-checked just above, without overflow, and every element of c is its own; c is borrowed
    // mutably, so it overlaps neither a nor b. Strides fit in an isize where they are used: the last element does. Where they are not
    // (one row, one column) the library multiplies them by 0.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            c.as_mut_ptr(),
            cs.col as isize,
            cs.row as isize,
            beta != T::ZERO,
            a.as_ptr(),
            sa.col as isize,
            sa.row as isize,
            b.as_ptr(),
            sb.col as isize,
            sb.row as isize,
            beta,
            alpha,
            false,
            false,
            false,
            threads,
        );
    }
}

/// Peak resident memory of this process in bytes, where the system tells.
pub fn peak_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|l| l.starts_with("VmHWM:"))?;
    Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? * 1024)
}

/// Bytes that can still be allocated without swapping, where the system tells.
pub fn available_bytes() -> Option<u64> {
    let memory = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = memory.lines().find(|l| l.starts_with("MemAvailable:"))?;
    Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Strides whose products wrap around, and outputs whose rows coincide, are refused in every build.
    #[test]
    fn strides_beyond_their_slices_are_refused() {
        let half = 1 << (usize::BITS - 1);
        let row = |row| Strides { row, col: 1 };
        let plain = Strides::new(2, false);
        for (cs, sa, sb) in [
            (row(half), plain, plain),
            (row(0), plain, plain),
            (row(1), plain, plain),
            (plain, row(usize::MAX), plain),
            (plain, plain, Strides { row: half, col: half }),
            (plain, row(half + 1), row(half)),
        ] {
            let call = || {
                let (mut c, a) = ([0f64; 6], [1f64; 6]);
                gemm((3, 2, 2), &mut c, cs, 0.0, &a, sa, &a, sb, 1.0, true);
            };
            assert!(std::panic::catch_unwind(call).is_err(), "{cs:?} {sa:?} {sb:?}");
        }
        let (mut c, a) = ([0f64; 6], [1f64; 6]);
        gemm((3, 2, 2), &mut c, Strides { row: 1, col: 3 }, 0.0, &a, plain, &a, plain, 1.0, true);
        assert_eq!(c, [2.0; 6]);
    }

    #[test]
    fn exp_is_accurate() {
        for i in -870_000..=880_000 {
            let x = i as f32 * 1e-4;
            let exact = f64::from(x).exp();
            let y = f64::from(simd(|| exp_f32(x)));
            assert!((y - exact).abs() <= 2e-7 * exact, "exp({x}) = {y}, not {exact}");
        }
        assert_eq!(exp_f32(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp_f32(f32::INFINITY), f32::INFINITY);
        assert_eq!(exp_f32(0.0), 1.0);
        assert!(exp_f32(f32::NAN).is_nan());
    }
}
