//! The steps of optimisers on batches of square `f32` matrices; see [`linalg`](super) for what each computes.

use super::{Digits, matmul};
use crate::device::cuda::{CudaDevice, Queue};
use crate::device::ffi;
use crate::device::launch::{Check, Factors, Kind, Shape, View, Work};
use crate::{DType, Device, Error, Result, Tensor};

/// From this size on products and Gram matrices are made of split operands; smaller ones take no time as they are.
const SPLIT_FROM: usize = 1024;
/// Side that 8-bit products ask to be a multiple of.
const SPLIT_STEP: usize = 16;
/// Side up to which sums of products of 8-bit integers stay within 32 bits.
const SPLIT_UP_TO: usize = 32768;

/// The sizes of a batch of matrices `[k, n, n]`, as the launchers take them.
#[derive(Clone, Copy)]
struct Batch {
    k: usize,
    len: usize,
    batch: i64,
    n: i64,
}

impl Batch {
    /// That of `len` values with matrices of n×n.
    fn new(c: &Check<'_>, len: usize, n: usize) -> Result<Self> {
        let k = c.rows(len, c.product(&[n, n])?)?;
        Ok(Self { k, len, batch: c.long(k)?, n: c.long(n)? })
    }
}

fn like(d: &CudaDevice, x: &Tensor) -> Result<Tensor> {
    Tensor::on(d, x.shape(), DType::F32)
}

pub(super) fn transpose_axpby(d: &CudaDevice, alpha: f64, x: &Tensor, beta: f64, z: Option<&Tensor>) -> Result<Tensor> {
    let (y, x, z) = (like(d, x)?, x.clone().aligned()?, z.cloned().map(Tensor::aligned).transpose()?);
    let z = z.as_ref().map(Tensor::view).transpose()?;
    launch_transpose_axpby(d.queue(), y.view()?, (alpha as f32, x.view()?), (beta as f32, z), x.cols())?;
    Ok(y)
}

/// `y = alpha xᵀ + beta z` for every n×n matrix; y may be z, not x. All `f32`.
pub(crate) fn launch_transpose_axpby(
    queue: Queue<'_>,
    y: View<'_>,
    (alpha, x): (f32, View<'_>),
    (beta, z): (f32, Option<View<'_>>),
    n: usize,
) -> Result<()> {
    let c = Check::new("transpose_axpby", queue);
    let Batch { len, batch, n, .. } = Batch::new(&c, x.len(), n)?;
    let (y, x) = (c.operand("y", y, Kind::F32, len)?, c.operand("x", x, Kind::F32, len)?);
    let z = c.optional("z", z, Kind::F32, len)?;
    // SAFETY: all are batch · n · n values, or null for no z; whoever made the views sees that y is not x.
    c.launch(Work::of("transpose"), |s| unsafe { ffi!(sq_transpose_axpby(y, alpha, x, beta, z, batch, n, s)) })
}

pub(super) fn normalize_rows(d: &CudaDevice, x: &Tensor) -> Result<Tensor> {
    let (y, x) = (like(d, x)?, x.clone().aligned()?);
    launch_normalize_rows(d.queue(), y.view()?, x.view()?, x.cols())?;
    Ok(y)
}

/// Every row of every n×n matrix divided by (its 2-norm + 1e-8); y may be x. Both `f32`.
pub(crate) fn launch_normalize_rows(queue: Queue<'_>, y: View<'_>, x: View<'_>, n: usize) -> Result<()> {
    let c = Check::new("normalize_rows", queue);
    let Batch { len, batch, n, .. } = Batch::new(&c, x.len(), n)?;
    let (y, x) = (c.operand("y", y, Kind::F32, len)?, c.operand("x", x, Kind::F32, len)?);
    // SAFETY: both are batch · n · n values; in place is allowed.
    c.launch(Work::of("normalize_rows"), |s| unsafe { ffi!(sq_normalize_rows(y, x, batch, n, s)) })
}

/// `w = a − aᵀ` for every n×n matrix; w may not be a. Both `f32`.
#[allow(dead_code)] // for slices alone, which only a build with GPU support has: tensors take transpose_axpby
pub(crate) fn launch_skew(queue: Queue<'_>, w: View<'_>, a: View<'_>, n: usize) -> Result<()> {
    let c = Check::new("skew", queue);
    let Batch { len, batch, n, .. } = Batch::new(&c, a.len(), n)?;
    let (w, a) = (c.operand("w", w, Kind::F32, len)?, c.operand("a", a, Kind::F32, len)?);
    // SAFETY: both are batch · n · n values; whoever made the views sees that they are apart.
    c.launch(Work::of("skew"), |s| unsafe { ffi!(sq_skew(w, a, batch, n, s)) })
}

pub(super) fn step_size(d: &CudaDevice, w: &Tensor, lr: f64) -> Result<Tensor> {
    let (alpha, w) = (Tensor::on(d, &w.shape()[..1], DType::F32)?, w.clone().aligned()?);
    launch_step_size(d.queue(), alpha.view()?, w.view()?, lr as f32, w.cols())?;
    Ok(alpha)
}

/// `alpha[b] = min(lr, 1 / (‖w[b]‖₁ + 1e-8))` for every n×n matrix. Both `f32`.
pub(crate) fn launch_step_size(queue: Queue<'_>, alpha: View<'_>, w: View<'_>, lr: f32, n: usize) -> Result<()> {
    let c = Check::new("step_size", queue);
    let Batch { k, len, batch, n } = Batch::new(&c, w.len(), n)?;
    let (alpha, w) = (c.operand("alpha", alpha, Kind::F32, k)?, c.operand("w", w, Kind::F32, len)?);
    // SAFETY: w is batch · n · n values, alpha batch.
    c.launch(Work::of("step_size"), |s| unsafe { ffi!(sq_cayley_step_size(alpha, w, lr, batch, n, s)) })
}

pub(super) fn add_scaled(d: &CudaDevice, a: Option<&Tensor>, alpha: &Tensor, factor: f64, x: &Tensor) -> Result<Tensor> {
    let (y, x, alpha) = (like(d, x)?, x.clone().aligned()?, alpha.clone().aligned()?);
    let a = a.cloned().map(Tensor::aligned).transpose()?;
    let from = a.as_ref().map(Tensor::view).transpose()?;
    launch_add_scaled(d.queue(), y.view()?, from, (factor as f32, alpha.view()?), x.view()?, x.cols())?;
    Ok(y)
}

/// `y[b] = a[b] + factor · alpha[b] · x[b]` for every n×n matrix, 0 for no a; y may be a or x. All `f32`.
pub(crate) fn launch_add_scaled(
    queue: Queue<'_>,
    y: View<'_>,
    a: Option<View<'_>>,
    (factor, alpha): (f32, View<'_>),
    x: View<'_>,
    n: usize,
) -> Result<()> {
    let c = Check::new("add_scaled", queue);
    let Batch { k, len, batch, n } = Batch::new(&c, x.len(), n)?;
    let (y, x) = (c.operand("y", y, Kind::F32, len)?, c.operand("x", x, Kind::F32, len)?);
    let (a, alpha) = (c.optional("a", a, Kind::F32, len)?, c.operand("alpha", alpha, Kind::F32, k)?);
    // SAFETY: y, a (or null) and x are batch · n · n values, alpha batch; in place is allowed.
    c.launch(Work::of("add_scaled"), |s| unsafe { ffi!(sq_add_scaled(y, a, alpha, factor, x, batch, n, s)) })
}

/// Whether products of this size are made of split operands.
pub(super) fn splits(n: usize) -> bool {
    (SPLIT_FROM..=SPLIT_UP_TO).contains(&n) && n.is_multiple_of(SPLIT_STEP)
}

/// `op(a) op(b)` of `f32` operands rounded to two terms of f16 (or one): 22 bits (or 11) below the largest value. The terms are
/// stacked along the summed axis, so that one product in f16 with sums in `f32` does it; small terms come first.
pub(super) fn split_product(d: &CudaDevice, a: &Tensor, ta: bool, b: &Tensor, tb: bool, digits: Digits) -> Result<Tensor> {
    let (batch, n) = (a.shape()[0], a.cols());
    // The left operand is low, high, high, the right one high, low, high.
    let (terms, low_a, low_b) = match digits {
        Digits::Most => (3, 0, 1),
        Digits::Few => (1, -1, -1),
    };
    let split = |x: &Tensor, transpose: bool, low: i32| -> Result<(Tensor, Tensor)> {
        let x = x.clone().aligned()?;
        let planes = Tensor::on(d, &[batch, terms, n, n], DType::F16)?;
        let largest = Tensor::on(d, &[1], DType::F32)?;
        launch_split(d.queue(), planes.view()?, largest.view()?, x.view()?, (n, terms), transpose, low)?;
        Ok((planes, largest))
    };
    // Both with the summed axis first.
    let ((a, largest_a), (b, largest_b)) = (split(a, !ta, low_a)?, split(b, tb, low_b)?);
    let factor = Tensor::on(d, &[2], DType::F32)?;
    launch_split_factor(d.queue(), factor.view()?, [largest_a.view()?, largest_b.view()?], 1.0)?;
    let y = Tensor::on(d, &[batch, n, n], DType::F32)?;
    let shape = Shape { m: n, n, k: terms * n, ta: true, tb: false, batch, batch_a: true, batch_b: true };
    d.multiply(shape, y.view()?, a.view()?, b.view()?, None, Factors::Device(factor.view()?))?;
    Ok(y)
}

/// x (`f32`, n×n matrices), or its transposes, as `terms` planes of f16 a matrix, and the largest |x| (one `f32`).
fn launch_split(
    queue: Queue<'_>,
    planes: View<'_>,
    largest: View<'_>,
    x: View<'_>,
    (n, terms): (usize, usize),
    transpose: bool,
    low: i32,
) -> Result<()> {
    let c = Check::new("split", queue);
    let b = Batch::new(&c, x.len(), n)?;
    if !n.is_multiple_of(4) {
        return Err(Error::argument("split", format!("sides are multiples of 4, got {n}")));
    }
    let planes = c.operand("planes", planes, Kind::F16, c.product(&[b.len, terms])?)?;
    let largest = c.operand("largest", largest, Kind::F32, 1)?;
    let x = c.operand("x", x, Kind::F32, b.len)?;
    let (Batch { batch, n, .. }, terms, transpose) = (b, c.int(terms)?, i32::from(transpose));
    // SAFETY: terms planes for every matrix of x, and one float.
    c.launch(Work::of("split"), |s| unsafe { ffi!(sq_split(planes, largest, x, batch, n, transpose, low, terms, s)) })
}

/// What a product of two split operands is to be multiplied by, and 0.
fn launch_split_factor(queue: Queue<'_>, factor: View<'_>, [a, b]: [View<'_>; 2], alpha: f32) -> Result<()> {
    let c = Check::new("split_factor", queue);
    let factor = c.operand("factors", factor, Kind::F32, 2)?;
    let (a, b) = (c.operand("largest of a", a, Kind::F32, 1)?, c.operand("largest of b", b, Kind::F32, 1)?);
    // SAFETY: two floats from one each.
    c.launch(Work::of("split_factor"), |s| unsafe { ffi!(sq_split_factor(factor, a, b, alpha, s)) })
}

/// [`gram_residual`] by products of 8-bit integers, which are exact: columns are rounded to 30 bits below their largest value.
fn gram_residual_of_digits(d: &CudaDevice, x: &Tensor) -> Result<(Tensor, Vec<f64>)> {
    let (batch, side) = (x.shape()[0], x.cols());
    let plane = x.len();
    // Four planes of bytes, five of 32-bit integers.
    let digits = d.buffer(4 * plane, Kind::I8, "the digits of a matrix")?;
    let products = d.buffer(5 * plane, Kind::I32, "products of digits")?;
    let largest = Tensor::on(d, &[batch, side], DType::F32)?;
    let squares = Tensor::on(d, &[batch, side], DType::F64)?;
    launch_digits(d.queue(), digits.view(), largest.view()?, squares.view()?, x.view()?, side)?;
    let shape = Shape { m: side, n: side, k: side, ta: false, tb: true, batch, batch_a: true, batch_b: true };
    for (to, a, b, beta) in [(0, 0, 0, 0.0), (1, 0, 1, 0.0), (2, 0, 2, 0.0), (3, 1, 1, 0.0), (4, 0, 3, 0.0), (4, 1, 2, 1.0)] {
        let y = products.view().part(to * plane, plane)?;
        let digit = |i: usize| digits.view().part(i * plane, plane);
        d.multiply(shape, y, digit(a)?, digit(b)?, None, Factors::Host(1.0, beta))?;
    }
    let (e, errors) = (like(d, x)?, Tensor::on(d, &[batch], DType::F64)?);
    let from = [largest.view()?, squares.view()?];
    launch_digits_residual(d.queue(), e.view()?, errors.view()?, products.view(), from, side)?;
    Ok((e, errors.to_device(&Device::Cpu)?.into_vec()?))
}

/// The columns of x (`f32`, n×n matrices) as four digits (`i8`), each column's largest |x| (`f32`) and sum of squares (`f64`).
fn launch_digits(queue: Queue<'_>, digits: View<'_>, largest: View<'_>, squares: View<'_>, x: View<'_>, n: usize) -> Result<()> {
    let c = Check::new("digits", queue);
    let (b, columns) = (Batch::new(&c, x.len(), n)?, x.len() / n.max(1));
    let digits = c.operand("digits", digits, Kind::I8, c.product(&[4, b.len])?)?;
    let largest = c.operand("largest", largest, Kind::F32, columns)?;
    let squares = c.operand("squares", squares, Kind::F64, columns)?;
    let (x, Batch { batch, n, .. }) = (c.operand("x", x, Kind::F32, b.len)?, b);
    // SAFETY: four planes of digits for every matrix of x, and a float and a double for every column.
    c.launch(Work::of("digits"), |s| unsafe { ffi!(sq_digits(digits, largest, squares, x, batch, n, s)) })
}

/// `I − xᵀx` (`f32`) and its largest value of every matrix (`f64`), from the five products of digits (`i32`).
fn launch_digits_residual(
    queue: Queue<'_>,
    residual: View<'_>,
    error: View<'_>,
    products: View<'_>,
    [largest, squares]: [View<'_>; 2],
    n: usize,
) -> Result<()> {
    let c = Check::new("digits_residual", queue);
    let (b, columns) = (Batch::new(&c, residual.len(), n)?, residual.len() / n.max(1));
    if n > SPLIT_UP_TO {
        return Err(Error::argument("digits_residual", format!("sides are at most {SPLIT_UP_TO}, got {n}")));
    }
    let residual = c.operand("residual", residual, Kind::F32, b.len)?;
    let error = c.operand("error", error, Kind::F64, b.k)?;
    let products = c.operand("products", products, Kind::I32, c.product(&[5, b.len])?)?;
    let largest = c.operand("largest", largest, Kind::F32, columns)?;
    let squares = c.operand("squares", squares, Kind::F64, columns)?;
    let Batch { batch, n, .. } = b;
    // SAFETY: five products for every matrix, a float and a double for every column, a double for every matrix.
    c.launch(Work::of("digits_residual"), |s| unsafe {
        ffi!(sq_digits_residual(residual, error, products, largest, squares, batch, n, s))
    })
}

pub(super) fn gram_residual(d: &CudaDevice, x: &Tensor) -> Result<(Tensor, Vec<f64>)> {
    let x = x.clone().aligned()?;
    if splits(x.cols()) {
        return gram_residual_of_digits(d, &x);
    }
    let wide = Tensor::on(d, x.shape(), DType::F64)?;
    launch_widen(d.queue(), wide.view()?, x.view()?)?;
    let gram = matmul::product(&wide, true, &wide, false, false, DType::F64)?;
    let (e, errors) = (like(d, &x)?, Tensor::on(d, &x.shape()[..1], DType::F64)?);
    launch_gram_residual(d.queue(), e.view()?, errors.view()?, gram.view()?, x.cols())?;
    Ok((e, errors.to_device(&Device::Cpu)?.into_vec()?))
}

/// `y` (`f64`) = x (`f32`).
pub(crate) fn launch_widen(queue: Queue<'_>, y: View<'_>, x: View<'_>) -> Result<()> {
    let c = Check::new("widen", queue);
    let n = x.len();
    let (y, x) = (c.operand("y", y, Kind::F64, n)?, c.operand("x", x, Kind::F32, n)?);
    let count = c.long(n)?;
    // SAFETY: both are n values.
    c.launch(Work::of("widen"), |s| unsafe { ffi!(sq_widen(y, x, count, s)) })
}

/// `residual = I − gram` (`f32`) and `error[b] = max|gram[b] − I|` (`f64`) of n×n Gram matrices in `f64`.
pub(crate) fn launch_gram_residual(
    queue: Queue<'_>,
    residual: View<'_>,
    error: View<'_>,
    gram: View<'_>,
    n: usize,
) -> Result<()> {
    let c = Check::new("gram_residual", queue);
    let Batch { k, len, batch, n } = Batch::new(&c, gram.len(), n)?;
    let residual = c.operand("residual", residual, Kind::F32, len)?;
    let (error, gram) = (c.operand("error", error, Kind::F64, k)?, c.operand("gram", gram, Kind::F64, len)?);
    // SAFETY: residual and gram are batch · n · n values, error batch.
    c.launch(Work::of("gram_residual"), |s| unsafe { ffi!(sq_gram_residual(residual, error, gram, batch, n, s)) })
}

pub(super) fn mean_squares(d: &CudaDevice, x: &Tensor) -> Result<Vec<f64>> {
    let (means, x) = (Tensor::on(d, &x.shape()[..1], DType::F64)?, x.clone().aligned()?);
    launch_mean_squares(d.queue(), means.view()?, x.view()?, x.cols())?;
    means.to_device(&Device::Cpu)?.into_vec()
}

/// The mean square (`f64`) of every n×n matrix of x (`f32`).
fn launch_mean_squares(queue: Queue<'_>, mean: View<'_>, x: View<'_>, n: usize) -> Result<()> {
    let c = Check::new("mean_squares", queue);
    let Batch { k, len, batch, n } = Batch::new(&c, x.len(), n)?;
    let (mean, x) = (c.operand("mean", mean, Kind::F64, k)?, c.operand("x", x, Kind::F32, len)?);
    // SAFETY: x is batch · n · n values, mean batch.
    c.launch(Work::of("mean_squares"), |s| unsafe { ffi!(sq_mean_squares(mean, x, batch, n, s)) })
}

pub(super) fn strictly_lower(d: &CudaDevice, x: &Tensor) -> Result<Tensor> {
    let (y, x) = (like(d, x)?, x.clone().aligned()?);
    launch_strictly_lower(d.queue(), y.view()?, x.view()?, x.cols())?;
    Ok(y)
}

/// What is below the diagonal of every n×n matrix, 0 elsewhere; y may be x. Both `f32`.
fn launch_strictly_lower(queue: Queue<'_>, y: View<'_>, x: View<'_>, n: usize) -> Result<()> {
    let c = Check::new("strictly_lower", queue);
    let Batch { len, batch, n, .. } = Batch::new(&c, x.len(), n)?;
    let (y, x) = (c.operand("y", y, Kind::F32, len)?, c.operand("x", x, Kind::F32, len)?);
    // SAFETY: both are batch · n · n values; in place is allowed.
    c.launch(Work::of("strictly_lower"), |s| unsafe { ffi!(sq_strictly_lower(y, x, batch, n, s)) })
}

#[allow(clippy::too_many_arguments)]
pub(super) fn adam(
    d: &CudaDevice,
    m: &Tensor,
    v: &Tensor,
    g: &Tensor,
    b: [f64; 2],
    c: [f64; 2],
    epsilon: f64,
) -> Result<[Tensor; 3]> {
    let from = [m.clone().aligned()?, v.clone().aligned()?, g.clone().aligned()?];
    let to = [like(d, m)?, like(d, m)?, like(d, m)?];
    let constants = [b[0], b[1], c[0], c[1], epsilon].map(|x| x as f32);
    let views_to = [to[0].view()?, to[1].view()?, to[2].view()?];
    let views_from = [from[0].view()?, from[1].view()?, from[2].view()?];
    launch_adam(d.queue(), views_to, views_from, constants)?;
    Ok(to)
}

/// Adam's statistics and direction (m, v, d) from (m, v, g), all `f32`, with β₁, β₂, c₁, c₂ and ε; each may be in place.
fn launch_adam(queue: Queue<'_>, to: [View<'_>; 3], from: [View<'_>; 3], constants: [f32; 5]) -> Result<()> {
    let c = Check::new("adam", queue);
    let n = from[0].len();
    let [ym, yv, yd] =
        [c.operand("m", to[0], Kind::F32, n)?, c.operand("v", to[1], Kind::F32, n)?, c.operand("d", to[2], Kind::F32, n)?];
    let [m, v, g] =
        [c.operand("m", from[0], Kind::F32, n)?, c.operand("v", from[1], Kind::F32, n)?, c.operand("g", from[2], Kind::F32, n)?];
    let ([b1, b2, c1, c2, epsilon], count) = (constants, c.long(n)?);
    // SAFETY: all six are n values.
    c.launch(Work::of("adam"), |s| unsafe { ffi!(sq_adam(ym, yv, yd, m, v, g, b1, b2, c1, c2, epsilon, count, s)) })
}
