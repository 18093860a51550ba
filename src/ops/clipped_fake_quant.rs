//! Fake quantisation whose clip ratios are learned: one for the lower and one for the upper end of every row's range, shared by rows of one
//! kind (all rows, or those of one head). They are `exp(a)`, so the grid of a row that spans [lo, hi] covers `[exp(a₀) lo, exp(a₁) hi]`; a
//! symmetric grid covers `exp(a₁) max|x|`.
//!
//! Backward, with G = dL/dy, s the scale, z the zero point, q the code and Q the largest one (FlatQuant, arXiv 2410.09426; the formulas are those of the
//! straight-through rounding, z without a gradient):
//!
//! | x/s + z | dy/dx | dy/ds |
//! |---|---|---|
//! | within the codes | 1 | (q − z) − x/s |
//! | above | 1, or 0 where blocked | Q − z |
//! | below | 1, or 0 where blocked | −z (symmetric: the smallest code) |
//!
//! `da₁ = Σ G dy/ds · exp(a₁) hi / Q`, `da₀ = −Σ G dy/ds · exp(a₀) lo / Q`; symmetric: `da₁ = Σ G dy/ds · s`. The ends of the range themselves
//! get no gradient through the scale.

mod codes;

use rayon::prelude::*;

pub(crate) use codes::gpu_grids;
pub use codes::quantize_clipped;

use crate::device::cpu;
use crate::device::cuda::{CudaDevice, Queue};
use crate::device::ffi;
use crate::device::launch::{Check, Kind, View, Work};
use crate::grid::{Grid, GridFloat, QuantSpec};
use crate::ops::fake_quant::launch_spec;
use crate::ops::{At, Case, Place, Run, bias, exact, randn};
use crate::tape::{Grads, Inputs, Op, Saved, Var, operands};
use crate::{DType, Error, Result, Tensor};

/// The operation: x `[.., cols]` and a `[kinds, 2]`. Rows, or groups of them, are of kinds 0, 1, … kinds − 1, 0, … in turn. The clip rule of
/// the specification does not count.
#[derive(Clone, Copy, Debug)]
pub struct ClippedFakeQuant {
    /// The grid.
    pub spec: QuantSpec,
    /// No gradient passes where a value was clamped. (Straight through is the published code's rule.)
    pub blocked: bool,
}

/// The range of a row after clipping, and its grid.
struct Clipped<T> {
    lo: T,
    hi: T,
    grid: Grid<T>,
}

impl ClippedFakeQuant {
    fn row<T: GridFloat>(&self, x: &[T], ratios: [T; 2]) -> Clipped<T> {
        let (lo, hi, grid) = Grid::clipped(&self.spec, x, ratios);
        Clipped { lo, hi, grid }
    }

    fn forward<T: GridFloat>(&self, x: Tensor, a: &Tensor, group: usize) -> Result<Tensor> {
        let (shape, ratios) = (x.shape().to_vec(), ratios::<T>(a)?);
        let mut y = x.into_owned::<T>()?;
        y.par_chunks_mut(group).enumerate().with_min_len(cpu::rows_per_task(group)).for_each(|(i, row)| {
            let grid = self.row(row, ratios[i % ratios.len()]).grid;
            row.iter_mut().for_each(|v| *v = grid.nearest(*v));
        });
        Tensor::from_vec(y, shape)
    }

    fn gradients<T: GridFloat>(&self, x: &Tensor, a: &Tensor, dy: Tensor, want: &[bool]) -> Result<Grads> {
        let (shape, ratios) = (dy.shape().to_vec(), ratios::<T>(a)?);
        let group = self.spec.group_size(x.cols())?;
        let mut dx = dy.into_owned::<T>()?;
        let x = x.as_slice::<T>()?;
        let rows = dx.par_chunks_mut(group).zip(x.par_chunks(group)).enumerate().with_min_len(cpu::rows_per_task(group));
        let sums: Vec<[f64; 2]> = rows.map(|(i, (dy, x))| self.row_gradient(dy, x, ratios[i % ratios.len()])).collect();
        let mut da = vec![0f64; 2 * ratios.len()];
        for (i, sum) in sums.iter().enumerate() {
            let at = 2 * (i % ratios.len());
            da[at] += sum[0];
            da[at + 1] += sum[1];
        }
        let da = || Tensor::from_vec(da.into_iter().map(T::from_f64).collect(), a.shape());
        Ok(vec![want[0].then(|| Tensor::from_vec(dx, shape)).transpose()?, want[1].then(da).transpose()?])
    }

    /// Overwrites dy with dx; the gradients of both logarithms.
    fn row_gradient<T: GridFloat>(&self, dy: &mut [T], x: &[T], ratios: [T; 2]) -> [f64; 2] {
        let Clipped { lo, hi, grid } = self.row(x, ratios);
        let mut ds = 0f64;
        for (dy, &x) in dy.iter_mut().zip(x) {
            let unclamped = (x / grid.scale).round() + grid.zero;
            let (per_scale, inside) = if unclamped > grid.max {
                (grid.max - grid.zero, false)
            } else if unclamped < grid.min {
                (grid.min - grid.zero, false)
            } else {
                ((unclamped - grid.zero) - x / grid.scale, true)
            };
            ds += (*dy * per_scale).to_f64();
            if self.blocked && !inside {
                *dy = T::ZERO;
            }
        }
        if self.spec.symmetric {
            let clipped = if hi == T::ZERO { 0.0 } else { grid.scale.to_f64() };
            return [0.0, ds * clipped];
        }
        if hi == lo {
            return [0.0, 0.0]; // the scale of a degenerate range is a constant
        }
        let levels = grid.max.to_f64();
        [-ds * lo.to_f64() / levels, ds * hi.to_f64() / levels]
    }
}

/// exp(a) of every kind.
pub(crate) fn ratios<T: GridFloat>(a: &Tensor) -> Result<Vec<[T; 2]>> {
    let a = a.to_f64_vec()?;
    Ok(a.as_chunks::<2>().0.iter().map(|pair| pair.map(|a| T::of(a.exp()))).collect())
}

impl Op for ClippedFakeQuant {
    fn name(&self) -> &'static str {
        "clipped_fake_quant"
    }
    fn check(&self, inputs: &[Tensor]) -> Result<()> {
        let [x, a] = operands(inputs)?;
        if let Some(format) = self.spec.rule.floating() {
            return Err(Error::argument("clipped_fake_quant", format!("expected integer codes, got {format}")));
        }
        let rows = x.len() / self.spec.group_size(x.cols())?.max(1);
        match *a.shape() {
            [kinds, 2] if kinds > 0 && rows.is_multiple_of(kinds) => {}
            _ => {
                let expected = format!("[kinds, 2], kinds a divisor of {rows} rows");
                return Err(Error::shape("clipped_fake_quant: logarithms", expected, a.shape()));
            }
        }
        let wide = if x.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
        if a.dtype() != wide {
            return Err(Error::dtype("clipped_fake_quant: logarithms", wide, a.dtype()));
        }
        Ok(())
    }
    fn cpu(&self, inputs: Inputs, save: &mut Saved) -> Result<Tensor> {
        let [x, a] = inputs.take()?;
        let group = self.spec.group_size(x.cols())?;
        self.keep(save, &x, &a);
        if x.dtype() == DType::F64 { self.forward::<f64>(x, &a, group) } else { self.forward::<f32>(x, &a, group) }
    }
    fn gpu(&self, device: &CudaDevice, inputs: Inputs, save: &mut Saved) -> Result<Tensor> {
        let [x, a] = inputs.take()?;
        self.keep(save, &x, &a);
        let (mut x, a) = (x.aligned()?, a.aligned()?);
        let y = x.or_new(device)?;
        launch(device.queue(), self, y.view()?, x.view()?, a.view()?, x.cols())?;
        Ok(y)
    }
    fn backward(&self, saved: Saved, dy: Tensor, want: &[bool]) -> Result<Grads> {
        if !self.blocked && !want[1] {
            return Ok(vec![Some(dy), None]);
        }
        let [x, a] = saved.take()?;
        if dy.dtype() == DType::F64 { self.gradients::<f64>(&x, &a, dy, want) } else { self.gradients::<f32>(&x, &a, dy, want) }
    }
    fn surrogate_near(&self, inputs: &[Tensor], base: &[Tensor]) -> Option<Result<Tensor>> {
        match (inputs, base) {
            ([x, a], [x0, a0]) => Some(self.frozen([x, a], [x0, a0])),
            _ => None,
        }
    }
    fn gpu_backward(&self, device: &CudaDevice, saved: Saved, dy: Tensor, want: &[bool]) -> Result<Grads> {
        if !self.blocked && !want[1] {
            return Ok(vec![Some(dy), None]);
        }
        let [x, a] = saved.take()?;
        let (x, a, mut dy) = (x.aligned()?, a.aligned()?, dy.aligned()?);
        let rows = x.len() / self.spec.group_size(x.cols())?;
        let sums = Tensor::on(device, &[rows, 2], DType::F32)?;
        let dx = dy.or_new(device)?;
        let (shape, cols) = (a.shape().to_vec(), x.cols());
        launch_backward(device.queue(), self, (dx.view()?, dy.view()?, x.view()?), a.view()?, sums.view()?, cols)?;
        let da = match want[1] {
            // Every row is a kind of its own: there is nothing to sum.
            true if shape[0] == rows => Some(sums.reshape(shape)?),
            // One row of sums for each of the kinds in turn.
            true => Some(bias::sums_of_rows(device, &sums.reshape([rows / shape[0], 2 * shape[0]])?)?.reshape(shape)?),
            false => None,
        };
        Ok(vec![want[0].then_some(dx), da])
    }
}

impl ClippedFakeQuant {
    /// What the gradient is that of: ranges, zero points, codes and residuals of rounding are those at x₀ and a₀, the scale follows a.
    fn frozen(&self, [x, a]: [&Tensor; 2], [x0, a0]: [&Tensor; 2]) -> Result<Tensor> {
        let group = self.spec.group_size(x.cols())?;
        let (now, then) = (ratios::<f64>(a)?, ratios::<f64>(a0)?);
        let (xs, x0s) = (x.as_slice::<f64>()?, x0.as_slice::<f64>()?);
        let mut y = Vec::with_capacity(xs.len());
        for (i, (x, x0)) in xs.chunks(group).zip(x0s.chunks(group)).enumerate() {
            let base = self.row(x0, then[i % then.len()]).grid;
            let scale = self.row(x0, now[i % now.len()]).grid.scale;
            y.extend(x.iter().zip(x0).map(|(x, x0)| {
                let code = (x0 / base.scale).round_ties_even() + base.zero;
                let clamped = code.clamp(base.min, base.max);
                let through = if code == clamped || !self.blocked { *x } else { 0.0 };
                let residual = if code == clamped { clamped - base.zero - x0 / base.scale } else { clamped - base.zero };
                through + scale * residual
            }));
        }
        Tensor::from_vec(y, x.shape())
    }

    pub(super) fn keep(&self, save: &mut Saved, x: &Tensor, a: &Tensor) {
        if save.wants(1) || self.blocked && save.wants(0) {
            save.push(x.clone());
            save.push(a.clone());
        }
    }
}

/// Quantises rows of `cols` values of x, the ends of a row's range clipped by the ratios of its kind; y may be x.
pub(crate) fn launch(queue: Queue<'_>, op: &ClippedFakeQuant, y: View<'_>, x: View<'_>, a: View<'_>, cols: usize) -> Result<()> {
    let c = Check::new("clipped_fake_quant", queue);
    if let Some(dtype) = op.spec.stored {
        let message = format!("expected scales as computed, got scales stored as {dtype}");
        return Err(Error::argument("clipped_fake_quant", message));
    }
    let (n, kind, work) = (x.len(), x.kind(), Work::moving("quantise", 2 * x.bytes()));
    let (rows, kinds) = (c.rows(n, cols)?, a.len() / 2);
    let (y, x, a) = (c.operand("y", y, kind, n)?, c.operand("x", x, kind, n)?, c.operand("a", a, Kind::F32, 2 * kinds)?);
    let (rows, cols, kinds) = (c.long(rows)?, c.long(cols)?, c.long(kinds)?);
    let (quant, dtype) = (launch_spec(&op.spec)?, c.code(kind)?);
    // SAFETY: x and y have rows · cols values of one kind and may be the same; a has two f32 a kind.
    c.launch(work, |s| unsafe { ffi!(sq_clipped_fake_quant(y, x, a, rows, cols, kinds, quant, dtype, s)) })
}

/// dx from dy, what went in and the logarithms, and the gradients of both logarithms (`sums`, two `f32` a row or group); dx may be dy.
pub(crate) fn launch_backward(
    queue: Queue<'_>,
    op: &ClippedFakeQuant,
    (dx, dy, x): (View<'_>, View<'_>, View<'_>),
    a: View<'_>,
    sums: View<'_>,
    cols: usize,
) -> Result<()> {
    let c = Check::new("clipped_fake_quant backward", queue);
    let (n, kind, work) = (x.len(), x.kind(), Work::moving("quantise", 3 * x.bytes()));
    let (rows, kinds) = (c.rows(n, cols)?, a.len() / 2);
    let groups = c.product(&[rows, cols / op.spec.group_size(cols)?, 2])?;
    let (dx, dy, x) = (c.operand("dx", dx, kind, n)?, c.operand("dy", dy, kind, n)?, c.operand("x", x, kind, n)?);
    let (a, sums) = (c.operand("a", a, Kind::F32, 2 * kinds)?, c.operand("sums", sums, Kind::F32, groups)?);
    let (rows, cols, kinds) = (c.long(rows)?, c.long(cols)?, c.long(kinds)?);
    let (quant, dtype, blocked) = (launch_spec(&op.spec)?, c.code(kind)?, i32::from(op.blocked));
    // SAFETY: dx, dy and x have rows · cols values of one kind, of which dx may be dy; a has two f32 a kind, sums two a group.
    c.launch(work, |s| unsafe {
        ffi!(sq_clipped_fake_quant_backward(dx, sums, dy, x, a, rows, cols, kinds, quant, blocked, dtype, s))
    })
}

impl Var<'_> {
    /// Fake quantisation along the last axis, the ends of every row's (or group's) range clipped by `exp(a)` of its kind, a `[kinds, 2]`; 16
    /// bits returns `self`. `blocked`: no gradient passes where a value was clamped.
    ///
    /// # Errors
    /// Those of [`Tape::record`](crate::Tape::record); a group that does not divide the columns; kinds that do not divide the rows.
    pub fn clipped_fake_quant(self, spec: &QuantSpec, a: Self, blocked: bool) -> Result<Self> {
        let op = ClippedFakeQuant { spec: *spec, blocked };
        if spec.is_active() { self.tape().record(op, vec![self, a]) } else { Ok(self) }
    }
}

/// Worked cases: bits, groups, kinds, both rules of the gradient.
pub fn cases() -> Vec<Case> {
    let case = |name: &str, [rows, cols]: [usize; 2], kinds: usize, spec: QuantSpec, blocked: bool| {
        let make = move || {
            let a = randn([kinds, 2], 62).into_vec::<f64>().expect("f64").into_iter().map(|a| -0.1 - 0.2 * a.abs()).collect();
            vec![randn([rows, cols], 61), Tensor::from_vec(a, [kinds, 2]).expect("kinds x 2")]
        };
        Case::new("clipped_fake_quant", name, make, move |v| {
            let [x, a]: [Var; 2] = v.try_into().map_err(|_| Error::Tape("two operands".into()))?;
            let wide = if x.value().dtype().is_half() { DType::F32 } else { x.value().dtype() };
            x.clipped_fake_quant(&spec, a.to_dtype(wide)?, blocked)
        })
        .rounds()
    };
    let spec = QuantSpec::activation;
    let mut all = vec![
        case("one row", [1, 24], 1, spec(4, false), false),
        case("asymmetric, blocked", [6, 40], 1, spec(4, false), true),
        case("symmetric", [6, 40], 1, spec(4, true), false),
        case("a kind a head", [12, 16], 3, spec(4, false), true),
        case("groups, a kind a group", [5, 24], 3, spec(4, false).grouped(8), false),
        case("groups, one kind, 8 bits", [5, 24], 1, spec(8, false).grouped(8), true),
        case("weights, a kind a row", [12, 40], 12, QuantSpec::weight(4, true), true),
        case("weights in groups, a kind a group", [6, 24], 18, QuantSpec::weight(4, false).grouped(8), true),
        case("weights, long rows", [5, 1200], 5, QuantSpec::weight(3, true), false),
        case("odd", [7, 37], 7, spec(3, false), false),
        case("256x1376", [256, 1376], 1, spec(4, false), true).large(),
        case("512x768 weights", [512, 768], 512, QuantSpec::weight(4, true), true).large(),
        case("1024x64 in heads", [1024, 64], 8, spec(4, false), false).large(),
    ];
    all.extend(Case::table(timed, SIZES));
    all
}

const SIZES: &[At] = &[(Place::Cpu, 4096, 4096, &[DType::F32]), (Place::Gpu, 4096, 16384, &[DType::BF16, DType::F32])];

fn timed(n: usize, rows: usize) -> Case {
    let op = ClippedFakeQuant { spec: QuantSpec::activation(4, false), blocked: true };
    let graph = Run::graph(move |v| {
        let [x, a]: [Var; 2] = v.try_into().map_err(|_| Error::Tape("two operands".into()))?;
        let wide = if x.value().dtype().is_half() { DType::F32 } else { x.value().dtype() };
        x.clipped_fake_quant(&op.spec, a.to_dtype(wide)?, op.blocked)
    });
    let what = (
        "clipped_fake_quant",
        "clipped-fake-quant",
        "Asymmetric 4-bit quantisation of rows of n, both ends of the range clipped",
    );
    Case::timed(what, (n, rows), vec![vec![rows, n], vec![1, 2]], graph, move |x, y| {
        let a = x[1].to_f64_vec()?;
        exact::rows(n, &x[..1], &y[0], |_, got, x| {
            let grid = op.row(&x[0], [a[0].exp(), a[1].exp()]).grid;
            exact::on_grid("clipped_fake_quant", got, &x[0], &grid, y[0].dtype())
        })
    })
    .rounds()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Tape;
    use crate::quant::Clip;

    fn gradients(op: ClippedFakeQuant, x: &Tensor, a: &Tensor, dy: &Tensor) -> (Tensor, Tensor, Tensor) {
        let tape = Tape::new();
        let (vx, va) = (tape.variable(x.clone()), tape.variable(a.clone()));
        let y = vx.clone().clipped_fake_quant(&op.spec, va.clone(), op.blocked).unwrap();
        let value = y.value().clone();
        let mut grads = tape.backward_from(y, dy.clone()).unwrap();
        (value, grads.take(&vx).unwrap(), grads.take(&va).unwrap())
    }

    #[test]
    fn equal_ends_are_a_clip_ratio() {
        for spec in [QuantSpec::activation(4, false), QuantSpec::activation(4, true), QuantSpec::activation(4, false).grouped(8)]
        {
            let x = randn([6, 24], 1);
            let tape = Tape::new();
            let want = tape.constant(x.clone()).fake_quant(&spec.clipped(Clip::Ratio(0.9))).unwrap();
            let a = tape.constant(Tensor::from_vec(vec![0.9f64.ln(); 2], [1, 2]).unwrap());
            let got = tape.constant(x).clipped_fake_quant(&spec, a, false).unwrap();
            let apart = got.value().to_f64_vec().unwrap().into_iter().zip(want.value().to_f64_vec().unwrap());
            assert!(apart.map(|(a, b)| (a - b).abs()).fold(0.0, f64::max) < 1e-12);
        }
    }

    /// The derivative by the scale is that of a rounding whose residual stays: y = s (x/s + r), r frozen inside, s (Q − z) outside. So
    /// differentiate that, with codes and zero points frozen, by finite differences.
    #[test]
    fn gradients_are_those_of_frozen_residuals() {
        let spec = QuantSpec::activation(4, false);
        let (x, dy) = (randn([4, 30], 3), randn([4, 30], 4));
        let a = Tensor::from_vec(vec![-0.3f64, -0.4, -0.2, -0.5], [2, 2]).unwrap();
        for blocked in [false, true] {
            let (_, dx, da) = gradients(ClippedFakeQuant { spec, blocked }, &x, &a, &dy);
            let (xs, dys, a0) = (x.to_f64_vec().unwrap(), dy.to_f64_vec().unwrap(), a.to_f64_vec().unwrap());
            let row = |i: usize| &xs[30 * i..][..30];
            let scale = |a: &[f64], i: usize| {
                let (lo, hi) = row(i).iter().fold((0f64, 0f64), |(l, h), &v| (l.min(v), h.max(v)));
                let (lo, hi) = (a[2 * (i % 2)].exp() * lo, a[2 * (i % 2) + 1].exp() * hi);
                ((hi - lo) / 15.0, (-lo / ((hi - lo) / 15.0)).round_ties_even())
            };
            let loss = |a: &[f64]| -> f64 {
                (0..4)
                    .map(|i| {
                        let ((s, _), (s0, z)) = (scale(a, i), scale(&a0, i));
                        row(i)
                            .iter()
                            .zip(&dys[30 * i..])
                            .map(|(&x, dy)| {
                                let q = (x / s0).round_ties_even() + z;
                                let y = if q > 15.0 {
                                    s * (15.0 - z)
                                } else if q < 0.0 {
                                    s * -z
                                } else {
                                    x + s * ((q - z) - x / s0)
                                };
                                dy * y
                            })
                            .sum::<f64>()
                    })
                    .sum()
            };
            for (j, got) in da.to_f64_vec().unwrap().into_iter().enumerate() {
                let moved = |by: f64| {
                    let mut a = a0.clone();
                    a[j] += by;
                    loss(&a)
                };
                let want = (moved(1e-6) - moved(-1e-6)) / 2e-6;
                assert!((got - want).abs() < 1e-6 * (1.0 + want.abs()), "{j}: {got} {want}");
            }
            let clamped = (0..120).filter(|&i| {
                let (s, z) = scale(&a0, i / 30);
                !(0.0..=15.0).contains(&((xs[i] / s).round_ties_even() + z))
            });
            let dx = dx.to_f64_vec().unwrap();
            let mut want = dys.clone();
            let clamped: Vec<usize> = clamped.collect();
            assert!(clamped.len() > 4);
            if blocked {
                clamped.iter().for_each(|&i| want[i] = 0.0);
            }
            assert_eq!(dx, want);
        }
    }

    #[test]
    fn symmetric_gradients_by_hand() {
        // max|x| = 4, ratio ½: s = 2/7; 4 is clamped to 7 (dy/ds = 7); 0.3/s = 1.05: q = 1, residual −0.05.
        let x = Tensor::from_vec(vec![0.3f64, 4.0], [1, 2]).unwrap();
        let a = Tensor::from_vec(vec![0.0, 0.5f64.ln()], [1, 2]).unwrap();
        let dy = Tensor::from_vec(vec![1.0f64, 1.0], [1, 2]).unwrap();
        let op = ClippedFakeQuant { spec: QuantSpec::activation(4, true), blocked: true };
        let (y, dx, da) = gradients(op, &x, &a, &dy);
        let s = 2.0 / 7.0;
        assert_eq!(y.to_vec::<f64>().unwrap(), [s, 2.0]);
        assert_eq!(dx.to_vec::<f64>().unwrap(), [1.0, 0.0]);
        let da = da.to_vec::<f64>().unwrap();
        assert!(da[0] == 0.0 && (da[1] - s * (7.0 + 1.0 - 0.3 / s)).abs() < 1e-12, "{da:?}");
    }

    #[test]
    fn degenerate_rows_give_no_gradient() {
        let x = Tensor::from_vec(vec![0f64; 8], [2, 4]).unwrap();
        let a = Tensor::from_vec(vec![-0.1f64, -0.1], [1, 2]).unwrap();
        for symmetric in [false, true] {
            let op = ClippedFakeQuant { spec: QuantSpec::activation(4, symmetric), blocked: false };
            let (y, _, da) = gradients(op, &x, &a, &randn([2, 4], 5));
            assert!(y.to_f64_vec().unwrap().iter().chain(&da.to_f64_vec().unwrap()).all(|v| *v == 0.0));
        }
    }

    #[test]
    fn kinds_must_divide_the_rows() {
        let tape = Tape::new();
        let a = |kinds: usize| tape.constant(Tensor::zeros([kinds, 2], DType::F64, &crate::Device::Cpu).unwrap());
        let x = || tape.constant(randn([6, 8], 1));
        let spec = QuantSpec::activation(4, false);
        assert!(x().clipped_fake_quant(&spec, a(4), false).is_err());
        assert!(x().clipped_fake_quant(&spec.grouped(4), a(4), false).is_ok());
        assert!(x().clipped_fake_quant(&spec.grouped(3), a(1), false).is_err());
    }
}
