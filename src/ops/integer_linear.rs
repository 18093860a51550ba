//! A linear layer on integers: `y = x̂ Ŵᵀ` from the codes of both, exact up to the scales.
//!
//! With `x̂ = s_x (q_x − z_x)` and `ŵ = s_w q_w` ([`Codes`]; weights have no zero points), and g over the smaller of the two groups, of
//! which the other is a multiple:
//!
//! ```text
//! t[m, n, g] = Σ_{k ∈ g} q_x[m, k] q_w[n, k] − z_x[m, g] Σ_{k ∈ g} q_w[n, k]     in integers, exact
//! y[m, n]    = Σ_g (t s_x[m, g]) s_w[n, g]  (+ b[n])  (+ r[m, n])
//! ```
//!
//! y is computed in the type of the scales (`f32`, or `f64` of `f64` tensors) in the order that is written: t is rounded to it, multiplied
//! by s_x, then by s_w, groups are added in order, b and r last, nothing is fused. Every device has the same bits. A 16-bit result is
//! rounded once more, at the end. Backward, straight through the quantiser of x: `dx = dy Ŵ`, `dr = dy`.

use std::sync::Arc;

use rayon::prelude::*;

use super::codes::{Codes, Sums};
use crate::device::cuda::ffi::sq_codes;
use crate::device::cuda::{CudaDevice, Queue};
use crate::device::launch::{Check, Kind, View, Work};
use crate::device::{Device, cpu, ffi};
use crate::grid::{GridFloat, QuantSpec};
use crate::linalg::matmul::product;
use crate::ops::case::Call;
use crate::ops::{At, Case, Place, Run, exact, randn};
use crate::tape::{Grads, Inputs, Op, Saved, Var};
use crate::{DType, Error, Result, Tensor};

/// The most columns: sums of products, and zero points of a byte times sums of codes, then stay within 32 bits.
pub const MOST_COLUMNS: usize = 1 << 16;

/// Zero points beyond this are taken for it: t then stays within 64 bits.
const MOST_ZERO: f64 = (1u64 << 38) as f64;

/// `x̂ Ŵᵀ + b + r` `[rows of x, rows of w]` in `dtype`; without b and r, less.
///
/// # Errors
/// Weights with zero points; codes, bias and residual whose shapes, groups, types or devices do not fit; more than [`MOST_COLUMNS`]
/// columns; on a GPU, parts of rows that are no multiples of 32; a failed launch.
pub fn integer_linear(x: &Codes, w: &Codes, bias: Option<&Tensor>, residual: Option<Tensor>, dtype: DType) -> Result<Tensor> {
    let (part, shape) = (part(x, w)?, [x.rows(), w.rows()]);
    let beside = [("bias", bias, &shape[1..]), ("residual", residual.as_ref(), &shape[..])];
    for (name, t, shape) in beside {
        let Some(t) = t else { continue };
        if t.shape() != shape {
            return Err(Error::shape(format!("integer_linear: {name}"), format!("{shape:?}"), t.shape()));
        }
        if t.device() != x.device() {
            return Err(Error::device(
                "integer_linear",
                format!("expected the {name} on {}, it is on {}", x.device(), t.device()),
            ));
        }
    }
    match (x.device(), x.scale().dtype()) {
        (Device::Cuda(device), _) => on_gpu(&device, x, w, bias, residual, dtype, part),
        (_, DType::F64) => on_cpu::<f64>(x, w, bias, residual, part)?.to_dtype(dtype),
        _ => on_cpu::<f32>(x, w, bias, residual, part)?.to_dtype(dtype),
    }
}

/// Columns that share all scales.
fn part(x: &Codes, w: &Codes) -> Result<usize> {
    if x.cols() != w.cols() || x.cols() == 0 || x.cols() > MOST_COLUMNS {
        let expected = format!("rows of 1 to {MOST_COLUMNS} codes, as many in x and w");
        return Err(Error::argument("integer_linear", format!("expected {expected}, got {} and {}", x.cols(), w.cols())));
    }
    if w.zero().is_some() {
        return Err(Error::argument("integer_linear", "expected symmetric weights, got some with zero points"));
    }
    if x.device() != w.device() || x.scale().dtype() != w.scale().dtype() {
        let of = |c: &Codes| format!("{} scales on {}", c.scale().dtype(), c.device());
        return Err(Error::device("integer_linear", format!("expected w as x, {}, got {}", of(x), of(w))));
    }
    let (least, most) = (x.group().min(w.group()), x.group().max(w.group()));
    if !most.is_multiple_of(least) {
        return Err(Error::argument("integer_linear", format!("of the groups {most} and {least} one must divide the other")));
    }
    Ok(least)
}

// ---- CPU. ----

/// Types that a sum of integers is rounded to.
trait Total: GridFloat {
    /// To nearest, ties to even.
    fn rounded(t: i64) -> Self;
}
impl Total for f32 {
    #[inline(always)]
    fn rounded(t: i64) -> Self {
        t as f32
    }
}
impl Total for f64 {
    #[inline(always)]
    fn rounded(t: i64) -> Self {
        t as f64
    }
}

/// Rows of x that read a row of w while it is near.
const ROWS: usize = 16;

fn on_cpu<T: Total>(x: &Codes, w: &Codes, bias: Option<&Tensor>, residual: Option<Tensor>, part: usize) -> Result<Tensor> {
    let dtype = x.scale().dtype();
    let wide = |t: &Tensor| t.to_dtype(dtype);
    let (bias, residual) = (bias.map(wide).transpose()?, residual.as_ref().map(wide).transpose()?);
    let values = |t: &Option<Tensor>| t.as_ref().map(Tensor::to_vec::<T>).transpose();
    let (bias, residual) = (values(&bias)?, values(&residual)?);
    let (k, n) = (x.cols(), w.rows());
    let sums = match x.zero().map(|_| w.sums(part)).transpose()? {
        Some(Sums::Cpu(sums)) => Some(sums),
        _ => None,
    };
    let (q_x, q_w) = (x.as_slice()?, w.as_slice()?);
    let (s_x, s_w) = (x.scale().as_slice::<T>()?, w.scale().as_slice::<T>()?);
    let z_x = x.zero().map(Tensor::as_slice::<T>).transpose()?;
    let (x_group, w_group) = (x.group(), w.group());
    let (parts, groups_x, groups_w) = (k / part, k / x_group, k / w_group);
    let one = |i: usize, j: usize| {
        let (x, w) = (&q_x[i * k..][..k], &q_w[j * k..][..k]);
        let mut y = T::ZERO;
        for (g, (x, w)) in x.chunks(part).zip(w.chunks(part)).enumerate() {
            let (at_x, at_w) = (i * groups_x + g * part / x_group, j * groups_w + g * part / w_group);
            let mut t = i64::from(dot(x, w));
            if let (Some(z), Some(sums)) = (z_x, &sums) {
                t -= z[at_x].to_f64().clamp(-MOST_ZERO, MOST_ZERO) as i64 * i64::from(sums[j * parts + g]);
            }
            let share = T::rounded(t) * s_x[at_x] * s_w[at_w];
            y = if g == 0 { share } else { y + share };
        }
        y = bias.as_ref().map_or(y, |b| y + b[j]);
        residual.as_ref().map_or(y, |r| y + r[i * n + j])
    };
    let mut y = vec![T::ZERO; x.rows() * n];
    if x.rows() < ROWS {
        for (i, row) in y.chunks_mut(n.max(1)).enumerate() {
            let columns = |(b, part): (usize, &mut [T])| {
                cpu::simd(
                    #[inline(always)]
                    || part.iter_mut().enumerate().for_each(|(j, y)| *y = one(i, b * ROWS + j)),
                );
            };
            row.par_chunks_mut(ROWS).enumerate().for_each(columns);
        }
    } else {
        y.par_chunks_mut(n.max(1) * ROWS).enumerate().for_each(|(b, rows)| {
            cpu::simd(
                #[inline(always)]
                || {
                    for j in 0..n {
                        rows.chunks_mut(n).enumerate().for_each(|(i, row)| row[j] = one(b * ROWS + i, j));
                    }
                },
            );
        });
    }
    Tensor::from_vec(y, [x.rows(), n])
}

/// `Σ a b`.
#[inline(always)]
fn dot(a: &[i8], b: &[i8]) -> i32 {
    a.iter().zip(b).map(|(&a, &b)| i32::from(a) * i32::from(b)).sum()
}

// ---- GPU. ----

/// True where products by a weight `[rows, cols]` with a scale a row are fast: there is a kernel for such on this card, and not only one that
/// takes everything. The CPU has one for all.
///
/// # Errors
/// A card that cannot be asked.
pub(crate) fn is_fast(device: &Device, [rows, cols]: [usize; 2], [group_x, group_w]: [usize; 2]) -> Result<bool> {
    let Device::Cuda(device) = device else { return Ok(true) };
    let whole = group_x == cols && group_w == cols && cols.is_multiple_of(16) && rows.is_multiple_of(8);
    Ok(whole && device.warpgroups()?)
}

fn on_gpu(
    device: &CudaDevice,
    x: &Codes,
    w: &Codes,
    bias: Option<&Tensor>,
    residual: Option<Tensor>,
    dtype: DType,
    part: usize,
) -> Result<Tensor> {
    let wide = |t: &Tensor| t.to_dtype(dtype)?.aligned();
    let (bias, residual) = (bias.map(wide).transpose()?, residual.as_ref().map(wide).transpose()?);
    let y = Tensor::on(device, &[x.rows(), w.rows()], dtype)?;
    let sums = match x.zero().map(|_| w.sums(part)).transpose()? {
        Some(Sums::Cuda(sums)) => Some(sums),
        _ => None,
    };
    fn view(t: &Option<Tensor>) -> Result<Option<View<'_>>> {
        t.as_ref().map(Tensor::view).transpose()
    }
    let operands = Operands {
        x: coded(x)?,
        w: coded(w)?,
        sums: sums.as_ref().map(|s| s.view()),
        bias: view(&bias)?,
        residual: view(&residual)?,
    };
    launch(device.queue(), y.view()?, &operands, x.cols())?;
    Ok(y)
}

fn coded(codes: &Codes) -> Result<Coded<'_>> {
    let zero = codes.zero().map(Tensor::view).transpose()?;
    Ok(Coded { codes: codes.view()?, scale: codes.scale().view()?, zero, group: codes.group() })
}

/// Codes as the kernel sees them.
#[derive(Clone, Copy)]
pub(crate) struct Coded<'a> {
    /// `i8`, rows of k.
    pub codes: View<'a>,
    /// `f32`, one a group.
    pub scale: View<'a>,
    /// `f32`, one a group; `None`: all are 0.
    pub zero: Option<View<'a>>,
    /// Columns that share a scale.
    pub group: usize,
}

/// What the kernel reads.
#[derive(Clone, Copy)]
pub(crate) struct Operands<'a> {
    /// m rows.
    pub x: Coded<'a>,
    /// n rows, without zero points.
    pub w: Coded<'a>,
    /// `i32`: sums of w's codes over the smaller of the two groups; needed where x has zero points.
    pub sums: Option<View<'a>>,
    /// n values of y's kind.
    pub bias: Option<View<'a>>,
    /// m · n values of y's kind; may be y.
    pub residual: Option<View<'a>>,
}

/// y [m, n] of codes in rows of k.
pub(crate) fn launch(queue: Queue<'_>, y: View<'_>, of: &Operands<'_>, k: usize) -> Result<()> {
    let c = Check::new("integer_linear", queue);
    let (m, n, kind) = (c.rows(of.x.codes.len(), k)?, c.rows(of.w.codes.len(), k)?, y.kind());
    if k == 0 || k > MOST_COLUMNS || of.w.zero.is_some() || (of.x.zero.is_some() && of.sums.is_none()) {
        let message = format!("expected 1 to {MOST_COLUMNS} columns, no zero points of w, and sums where x has some, got {k}");
        return Err(Error::argument("integer_linear", message));
    }
    let (least, most) = (of.x.group.min(of.w.group), of.x.group.max(of.w.group));
    if least == 0 || !k.is_multiple_of(most) || !most.is_multiple_of(least) || (least < k && !least.is_multiple_of(32)) {
        let message = format!("expected groups that divide {k} and one another, in 32s, got {} and {}", of.x.group, of.w.group);
        return Err(Error::argument("integer_linear", message));
    }
    let flops = 2.0 * m as f64 * n as f64 * k as f64;
    let operand = |name: &'static str, of: &Coded<'_>, rows: usize| {
        let grids = c.product(&[rows, k / of.group])?;
        Ok::<_, Error>(sq_codes {
            codes: c.operand(name, of.codes, Kind::I8, rows * k)?.cast(),
            scale: c.operand("scale", of.scale, Kind::F32, grids)?.cast(),
            zero: c.optional("zero", of.zero, Kind::F32, grids)?.cast(),
            group: c.int(of.group)?,
        })
    };
    let (x, w) = (operand("x", &of.x, m)?, operand("w", &of.w, n)?);
    let sums = c.optional("sums", of.sums, Kind::I32, c.product(&[n, k / least])?)?;
    let size = c.product(&[m, n])?;
    let (bias, residual) = (c.optional("bias", of.bias, kind, n)?, c.optional("residual", of.residual, kind, size)?);
    let (y, dtype) = (c.operand("y", y, kind, size)?, c.code(kind)?);
    if n == 0 {
        return Ok(());
    }
    let (m, n, k) = (c.long(m)?, c.long(n)?, c.long(k)?);
    // SAFETY: x is m rows of k codes and w n, with a scale (and a zero point, or null) a group; sums (or null) one a part of w's rows;
    // y, and residual unless null, m · n values of one kind, bias (or null) n; y may be the residual.
    c.launch(Work::computing("integer linear", flops), |s| unsafe {
        ffi!(sq_integer_linear(y, x, w, sums, bias, residual, m, n, k, dtype, s))
    })
}

// ---- On the tape. ----

/// `x̂ Ŵᵀ + b`, and plus a second operand where there is one. Quantises x; w and b are constants.
#[derive(Clone, Debug)]
pub(crate) struct IntegerLinear {
    /// How x is quantised.
    pub spec: QuantSpec,
    /// Ŵ.
    pub weight: Codes,
    /// b.
    pub bias: Option<Tensor>,
}

impl Op for IntegerLinear {
    fn name(&self) -> &'static str {
        "integer_linear"
    }
    fn check(&self, inputs: &[Tensor]) -> Result<()> {
        let (Some(x), true) = (inputs.first(), inputs.len() <= 2) else {
            return Err(Error::Tape(format!("integer_linear: expected one or two operands, got {}", inputs.len())));
        };
        if x.cols() != self.weight.cols() {
            return Err(Error::shape(self.name(), format!("[.., {}]", self.weight.cols()), x.shape()));
        }
        self.spec.group_size(x.cols()).map(|_| ())
    }
    fn cpu(&self, inputs: Inputs, _: &mut Saved) -> Result<Tensor> {
        self.run(inputs)
    }
    fn gpu(&self, _: &CudaDevice, inputs: Inputs, _: &mut Saved) -> Result<Tensor> {
        self.run(inputs)
    }
    fn backward(&self, _: Saved, dy: Tensor, want: &[bool]) -> Result<Grads> {
        let dx = || {
            let w = self.weight.dequantize()?.to_dtype(dy.dtype())?.to_device(&dy.device())?;
            let mut shape = dy.shape().to_vec();
            shape.iter_mut().last().into_iter().for_each(|n| *n = w.cols());
            product(&dy.clone().reshape([dy.rows(), dy.cols()])?, false, &w, false, false, dy.dtype())?.reshape(shape)
        };
        let mut grads = vec![want[0].then(dx).transpose()?];
        grads.extend(want.get(1).map(|want| want.then(|| dy.clone())));
        Ok(grads)
    }
    fn surrogate(&self, inputs: &[Tensor]) -> Option<Result<Tensor>> {
        Some(self.smooth(inputs))
    }
}

impl IntegerLinear {
    fn run(&self, inputs: Inputs) -> Result<Tensor> {
        let mut inputs = inputs.into_vec().into_iter();
        let (Some(x), residual) = (inputs.next(), inputs.next()) else {
            return Err(Error::Tape("integer_linear: no operand".into()));
        };
        let shape = [&x.shape()[..x.shape().len().saturating_sub(1)], &[self.weight.rows()]].concat();
        let flat = residual.map(|r| r.reshape([x.rows(), self.weight.rows()])).transpose()?;
        let codes = Codes::quantize(&x, &self.spec)?;
        integer_linear(&codes, &self.weight, self.bias.as_ref(), flat, x.dtype())?.reshape(shape)
    }

    /// Without the quantiser of x.
    fn smooth(&self, inputs: &[Tensor]) -> Result<Tensor> {
        let x = inputs.first().ok_or_else(|| Error::Tape("integer_linear: no operand".into()))?;
        let w = self.weight.dequantize()?.to_dtype(x.dtype())?;
        let shape = [&x.shape()[..x.shape().len().saturating_sub(1)], &[w.rows()]].concat();
        let y = product(&x.clone().reshape([x.rows(), x.cols()])?, false, &w, true, false, x.dtype())?.reshape(shape)?;
        inputs.get(1).map_or(Ok(y.clone()), |r| Tensor::axpby(1.0, y, 1.0, r.clone()))
    }
}

impl Var<'_> {
    /// `x̂ Ŵᵀ + b` [.., out] of self [.., in], which is quantised as `spec` says; the product is of integers. 16 bits are not integers.
    ///
    /// # Errors
    /// Those of [`integer_linear`] and [`Codes::quantize`].
    pub fn integer_linear(self, spec: &QuantSpec, weight: &Codes, bias: Option<&Tensor>) -> Result<Self> {
        self.tape().record(IntegerLinear { spec: *spec, weight: weight.clone(), bias: bias.cloned() }, vec![self])
    }

    /// `self + x̂ Ŵᵀ + b` with self [.., out] and x [.., in].
    ///
    /// # Errors
    /// Those of [`Var::integer_linear`].
    pub fn add_integer_linear(self, x: Self, spec: &QuantSpec, weight: &Codes, bias: Option<&Tensor>) -> Result<Self> {
        self.tape().record(IntegerLinear { spec: *spec, weight: weight.clone(), bias: bias.cloned() }, vec![x, self])
    }
}

/// y in `f64` by the definition, of codes on the CPU, without b and r; no rounding on the way but that of `f64`.
///
/// # Errors
/// Codes whose shapes and groups do not fit.
pub fn reference(x: &Codes, w: &Codes) -> Result<Vec<f64>> {
    part(x, w)?;
    let (x_hat, w_hat, k) = (x.dequantize()?.to_f64_vec()?, w.dequantize()?.to_f64_vec()?, x.cols());
    let dot = |x: &[f64], w: &[f64]| x.iter().zip(w).map(|(x, w)| x * w).sum();
    Ok(x_hat.chunks(k).flat_map(|x| w_hat.chunks(k).map(move |w| dot(x, w))).collect())
}

/// Whole multiples of a power of two that reach both ends of the grid in every group, so that every precision finds the same codes.
pub(super) fn on_grid(rows: usize, cols: usize, spec: &QuantSpec, seed: u64) -> Tensor {
    let group = spec.group.unwrap_or(cols);
    let (min, max) = if spec.symmetric {
        (-spec.max_code(), spec.max_code())
    } else {
        (-spec.max_code() / 3, spec.max_code() - spec.max_code() / 3)
    };
    let mut v = randn([rows, cols], seed).into_vec::<f64>().expect("f64");
    v.iter_mut().for_each(|x| *x = (*x * f64::from(max) / 2.0).round().clamp(f64::from(min), f64::from(max)) / 8.0);
    for g in v.chunks_mut(group) {
        g[0] = f64::from(max) / 8.0;
        g[group / 2] = f64::from(if group > 1 { min } else { max }) / 8.0;
    }
    Tensor::from_vec(v, [rows, cols]).expect("rows x cols")
}

/// Worked cases.
pub(crate) fn cases() -> Vec<Case> {
    let case = |name: &str, [m, n, k]: [usize; 3], spec: QuantSpec, w_spec: QuantSpec, with_bias: bool, with_residual: bool| {
        let name = format!("{m}x{n}x{k} {name}");
        let operands = move || {
            let mut all = vec![on_grid(m, k, &spec, 1)];
            all.extend(with_residual.then(|| randn([m, n], 3)));
            all
        };
        Case::new("integer_linear", name, operands, move |mut v| {
            let x = v.remove(0);
            let place = |t: Tensor| t.to_dtype(x.value().dtype())?.to_device(&x.value().device());
            let w = Codes::quantize(&place(on_grid(n, k, &w_spec, 2))?, &w_spec)?;
            let bias = with_bias.then(|| place(randn([n], 4))).transpose()?;
            match v.pop() {
                Some(r) => r.add_integer_linear(x, &spec, &w, bias.as_ref()),
                None => x.integer_linear(&spec, &w, bias.as_ref()),
            }
        })
    };
    let (act, weight) = (QuantSpec::activation, QuantSpec::weight);
    let mut all = vec![
        case("one value", [1, 1, 1], act(4, true), weight(4, true), false, false),
        case("4 bits", [5, 8, 16], act(4, false), weight(4, true), false, false),
        case("8 bits, symmetric", [5, 8, 48], act(8, true), weight(8, true), false, false),
        case("8 bits, bias and residual", [17, 24, 48], act(8, false), weight(4, true), true, true),
        case("odd", [3, 7, 37], act(4, false), weight(4, true), true, true),
        case("groups", [3, 8, 96], act(4, false).grouped(32), weight(4, true), true, false),
        case("groups of both", [4, 8, 128], act(8, false).grouped(32), weight(4, true).grouped(64), false, true),
        case("4 bits", [256, 384, 1376], act(4, false), weight(4, true), false, false).large(),
        case("8 bits, bias and residual", [300, 520, 1040], act(8, false), weight(8, true), true, true).large(),
        case("groups", [130, 200, 1024], act(4, false).grouped(128), weight(4, true), true, false).large(),
    ];
    all.extend(Case::table(timed, SIZES));
    all
}

const SIZES: &[At] = &[
    (Place::Cpu, 1024, 256, &[DType::F32]),
    (Place::Gpu, 4096, 16384, &[DType::BF16]),
    (Place::Gpu, 11008, 16384, &[DType::BF16]),
];

/// A 4-bit linear of `[rows, n]` and `[n, n]`, the codes made beforehand.
fn timed(n: usize, rows: usize) -> Case {
    let (spec, w_spec) = (QuantSpec::activation(4, false), QuantSpec::weight(4, true));
    let call = move |x: &[Tensor]| {
        let codes = Codes::quantize(&x[0], &spec)?;
        let w = Codes::quantize(&x[1], &w_spec)?;
        let dtype = x[0].dtype();
        Ok(Call::new(move || Ok(vec![integer_linear(&codes, &w, None, None, dtype)?])))
    };
    let what = ("integer_linear", "integer-linear", "[rows, n] times [n, n] in 4-bit integers, scales and zero points applied");
    Case::timed(what, (n, rows), vec![vec![rows, n], vec![n, n]], Run::Call(Arc::new(call)), move |x, y| {
        let columns = exact::some(n);
        let cpu = |t: Tensor| t.to_device(&Device::Cpu);
        for r in exact::some(rows) {
            let codes = Codes::quantize(&cpu(x[0].slice(r, 1)?)?, &spec)?;
            let got = exact::row(&y[0], r, n)?;
            for &c in &columns {
                let w = Codes::quantize(&cpu(x[1].slice(c, 1)?)?, &w_spec)?;
                let want = on_cpu::<f32>(&codes, &w, None, None, n)?.to_dtype(y[0].dtype())?.item()?;
                if got[c] != want {
                    return Err(Error::numeric(
                        "wrong answer",
                        format!("integer-linear: [{r}, {c}] is {}, should be {want}", got[c]),
                    ));
                }
            }
        }
        Ok(())
    })
    .computes(2.0 * rows as f64 * (n as f64).powi(2))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The definition in 64-bit integers and `f32`, in the order that the module states.
    fn naive(x: &Codes, w: &Codes, bias: Option<&[f32]>, residual: Option<&[f32]>) -> Vec<f32> {
        let (q_x, q_w, k, n) = (x.to_vec().unwrap(), w.to_vec().unwrap(), x.cols(), w.rows());
        let part = x.group().min(w.group());
        let (s_x, s_w) = (x.scale().to_vec::<f32>().unwrap(), w.scale().to_vec::<f32>().unwrap());
        let zero = x.zero().map_or(vec![0.0; s_x.len()], |z| z.to_vec::<f32>().unwrap());
        let mut all = vec![];
        for m in 0..x.rows() {
            for j in 0..n {
                let mut shares = vec![];
                for g in 0..k / part {
                    let (at_x, at_w) = (m * (k / x.group()) + g * part / x.group(), j * (k / w.group()) + g * part / w.group());
                    let terms = (g * part..(g + 1) * part)
                        .map(|i| (i64::from(q_x[m * k + i]) - zero[at_x] as i64) * i64::from(q_w[j * k + i]));
                    shares.push(terms.sum::<i64>() as f32 * s_x[at_x] * s_w[at_w]);
                }
                let y = shares.into_iter().reduce(|a, b| a + b).unwrap();
                let y = bias.map_or(y, |b| y + b[j]);
                all.push(residual.map_or(y, |r| y + r[m * n + j]));
            }
        }
        all
    }

    /// Values far from 0 in every row, so that zero points are too, and |z| Σ|q_w| passes what `f32` counts.
    fn far(rows: usize, cols: usize, seed: u64) -> Tensor {
        let x = randn([rows, cols], seed).into_vec::<f64>().unwrap();
        let x = x.into_iter().enumerate().map(|(i, x)| (x / 64.0 + 40.0 * (1.0 + (i / cols) as f64)) as f32).collect();
        Tensor::from_vec::<f32>(x, [rows, cols]).unwrap()
    }

    #[test]
    fn bits_are_those_of_the_definition() {
        let (act, weight) = (QuantSpec::activation, QuantSpec::weight);
        let f32s = |shape: &[usize], seed| randn(shape.to_vec(), seed).to_dtype(DType::F32).unwrap();
        for (m, n, k) in [(1, 1, 1), (3, 5, 64), (17, 9, 192), (33, 4, 96)] {
            for bits in [4, 8] {
                for symmetric in [false, true] {
                    for (group, w_group) in [(None, None), (Some(32), None), (Some(32), Some(64)), (None, Some(32))] {
                        let grouped =
                            |spec: QuantSpec, group: Option<usize>| QuantSpec { group: group.filter(|_| k % 64 == 0), ..spec };
                        let w = Codes::quantize(&f32s(&[n, k], 2), &grouped(weight(bits, true), w_group)).unwrap();
                        for x in [f32s(&[m, k], 1), far(m, k, 1)] {
                            let x = Codes::quantize(&x, &grouped(act(bits, symmetric), group)).unwrap();
                            let (b, r) = (f32s(&[n], 3), f32s(&[m, n], 4));
                            for beside in [false, true] {
                                let (b, r) = if beside { (Some(b.clone()), Some(r.clone())) } else { (None, None) };
                                let slice = |t: &Option<Tensor>| t.as_ref().map(|t| t.to_vec::<f32>().unwrap());
                                let want = naive(&x, &w, slice(&b).as_deref(), slice(&r).as_deref());
                                let got = integer_linear(&x, &w, b.as_ref(), r.clone(), DType::F32).unwrap();
                                let bits = |v: &[f32]| v.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                                assert_eq!(bits(&got.to_vec::<f32>().unwrap()), bits(&want), "{m}x{n}x{k}");
                                let want = Tensor::from_vec(want, [m, n]).unwrap().to_dtype(DType::BF16).unwrap();
                                let got = integer_linear(&x, &w, b.as_ref(), r, DType::BF16).unwrap();
                                assert_eq!(got.to_f64_vec().unwrap(), want.to_f64_vec().unwrap());
                            }
                        }
                    }
                }
            }
        }
    }

    /// Zero points of 8-bit groups far from 0: more than `f32` counts, and more than 32 bits hold.
    #[test]
    fn large_zero_points_are_exact() {
        let k = 64;
        let mut x = vec![3.0e4f32; k];
        x[0] = 3.0e4 + 0.01;
        let x = Codes::quantize(&Tensor::from_vec(x, [1, k]).unwrap(), &QuantSpec::activation(8, false).grouped(k)).unwrap();
        assert!(x.zero().unwrap().item().unwrap().abs() > f64::from(1 << 24), "{:?}", x.zero());
        let w = Codes::quantize(&Tensor::from_vec(vec![1f32; k], [1, k]).unwrap(), &QuantSpec::weight(8, true)).unwrap();
        let got = integer_linear(&x, &w, None, None, DType::F32).unwrap();
        assert_eq!(got.to_vec::<f32>().unwrap(), naive(&x, &w, None, None));
        let exact = reference(&x, &w).unwrap()[0];
        assert!((got.item().unwrap() / exact - 1.0).abs() < 1e-6, "{got:?} {exact}");
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let codes = |rows: usize, cols: usize, spec: QuantSpec| {
            Codes::quantize(&randn([rows, cols], 1).to_dtype(DType::F32).unwrap(), &spec).unwrap()
        };
        let (act, weight) = (QuantSpec::activation(4, false), QuantSpec::weight(4, true));
        let (x, w) = (codes(2, 96, act), codes(3, 96, weight));
        let refuses = |x: &Codes, w: &Codes, b: Option<&Tensor>, r: Option<Tensor>, part: &str| {
            let error = integer_linear(x, w, b, r, DType::F32).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        };
        refuses(&x, &codes(3, 64, weight), None, None, "got 96 and 64");
        refuses(&x, &codes(3, 96, QuantSpec::weight(4, false)), None, None, "symmetric weights");
        refuses(&codes(2, 96, act.grouped(32)), &codes(3, 96, weight.grouped(48)), None, None, "48 and 32");
        refuses(&x, &w, Some(&randn([2], 1)), None, "bias");
        refuses(&x, &w, None, Some(randn([3, 2], 1)), "residual");
        let double = Codes::quantize(&randn([3, 96], 1), &weight).unwrap();
        refuses(&x, &double, None, None, "expected w as x");
    }
}
