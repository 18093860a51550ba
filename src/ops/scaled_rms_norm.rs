//! Root-mean-square normalisation with the columns of the output divided by exponentials of learned logarithms: `y = x r exp(−a)`,
//! `r = 1/√(mean(x²) + ε)` ([`rms_norm`], then [`log_scale`], in one pass). Backward, with `g = dy exp(−a)`:
//! `dx = r (g − x r² mean(g x))`, `da[j] = −Σ_i y[i, j] dy[i, j]`.

use crate::device::cuda::{CudaDevice, Queue};
use crate::device::ffi;
use crate::device::launch::{Check, Kind, View, Work};
use crate::ops::log_scale::{self, Along, LogScale};
use crate::ops::rms_norm::{self, RmsNorm};
use crate::ops::{At, Case, Pass, Place, Run, bias, exact, normals};
use crate::tape::{Grads, Inputs, Op, Saved, Var, operands};
use crate::{DType, Error, Result, Tensor};

/// The operation: x `[.., cols]` and a `[cols]`, in `f32` where x has 16 bits. It keeps both, and r of every row.
struct ScaledRmsNorm {
    eps: f64,
}

const DIVIDED: LogScale = LogScale { along: Along::Columns, inverse: true };

impl ScaledRmsNorm {
    fn plain(&self) -> RmsNorm {
        RmsNorm { eps: self.eps, gain: None }
    }
}

impl Op for ScaledRmsNorm {
    fn name(&self) -> &'static str {
        "scaled_rms_norm"
    }
    fn check(&self, inputs: &[Tensor]) -> Result<()> {
        let [x, a] = operands(inputs)?;
        log_scale::check_logarithms("scaled_rms_norm: logarithms", x, a, x.cols())
    }
    fn cpu(&self, inputs: Inputs, save: &mut Saved) -> Result<Tensor> {
        let [x, a] = inputs.take()?;
        let (y, inverse) = self.plain().forward_on_cpu(&x)?;
        let y = DIVIDED.on_cpu(y, &a)?;
        keep(save, [x, a, inverse]);
        Ok(y)
    }
    fn gpu(&self, device: &CudaDevice, inputs: Inputs, save: &mut Saved) -> Result<Tensor> {
        let [x, a] = inputs.take()?;
        let (from, a) = (x.clone().aligned()?, a.aligned()?);
        let (y, inverse) = (Tensor::on(device, x.shape(), x.dtype())?, Tensor::on(device, &[x.rows()], DType::F32)?);
        launch(device.queue(), [y.view()?, inverse.view()?], from.view()?, a.view()?, self.eps as f32)?;
        keep(save, [x, a, inverse]);
        Ok(y)
    }
    fn backward(&self, saved: Saved, dy: Tensor, want: &[bool]) -> Result<Grads> {
        let [x, a, inverse] = saved.take()?;
        let da = match want[1] {
            true => {
                let y = DIVIDED.on_cpu(self.plain().forward_on_cpu(&x)?.0, &a)?;
                Some(DIVIDED.sums_on_cpu(&y, &dy, &a)?)
            }
            false => None,
        };
        let dx = want[0].then(|| self.plain().backward_on_cpu(&x, &inverse, DIVIDED.on_cpu(dy, &a)?)).transpose()?;
        Ok(vec![dx, da])
    }
    /// In place of dy when unshared.
    fn gpu_backward(&self, device: &CudaDevice, saved: Saved, dy: Tensor, want: &[bool]) -> Result<Grads> {
        let [x, a, inverse] = saved.take()?;
        let (mut dy, x) = (dy.aligned()?, x.aligned()?);
        let parts = Tensor::on(device, &[workers_of(x.rows()), x.cols()], DType::F32)?;
        let dx = dy.or_new(device)?;
        let operands = [dy.view()?, x.view()?];
        launch_backward(device.queue(), dx.view()?, parts.view()?, operands, a.view()?, inverse.view()?)?;
        let da = want[1].then(|| bias::sums_of_rows(device, &parts)).transpose()?;
        Ok(vec![want[0].then_some(dx), da])
    }
}

fn keep(save: &mut Saved, operands: [Tensor; 3]) {
    if save.wants_any() {
        operands.into_iter().for_each(|t| save.push(t));
    }
}

/// Parts that the sums over so many rows are made of: enough to fill a card. The same on every card.
pub(crate) fn workers_of(rows: usize) -> usize {
    rows.clamp(1, 528)
}

/// y and the factor of every row (`inverse`, `f32`), for rows of as many values as a; y may be x.
pub(crate) fn launch(queue: Queue<'_>, [y, inverse]: [View<'_>; 2], x: View<'_>, a: View<'_>, eps: f32) -> Result<()> {
    let c = Check::new("scaled_rms_norm", queue);
    let (n, cols, kind, work) = (x.len(), a.len(), x.kind(), Work::moving("norm", 2 * x.bytes()));
    let rows = c.rows(n, cols)?;
    let (y, x, a) = (c.operand("y", y, kind, n)?, c.operand("x", x, kind, n)?, c.operand("a", a, Kind::F32, cols)?);
    let inverse = c.operand("inverse", inverse, Kind::F32, rows)?;
    let (rows, cols, dtype) = (c.long(rows)?, c.long(cols)?, c.code(kind)?);
    // SAFETY: x and y have rows · cols values of one kind and may be the same; a is cols f32, inverse one f32 a row.
    c.launch(work, |s| unsafe { ffi!(sq_scaled_rms_norm(y, inverse, x, a, rows, cols, eps, dtype, s)) })
}

/// dx from [dy, x] and the factors of [`launch`], and parts `[workers, cols]` in `f32` that add up to the gradient of a; dx may be dy.
pub(crate) fn launch_backward(
    queue: Queue<'_>,
    dx: View<'_>,
    parts: View<'_>,
    [dy, x]: [View<'_>; 2],
    a: View<'_>,
    inverse: View<'_>,
) -> Result<()> {
    let c = Check::new("scaled_rms_norm backward", queue);
    let (n, cols, kind, work) = (x.len(), a.len(), x.kind(), Work::moving("norm", 3 * x.bytes()));
    let (rows, workers) = (c.rows(n, cols)?, c.rows(parts.len(), cols)?);
    let (dx, dy, x) = (c.operand("dx", dx, kind, n)?, c.operand("dy", dy, kind, n)?, c.operand("x", x, kind, n)?);
    let parts = c.operand("parts", parts, Kind::F32, c.product(&[workers, cols])?)?;
    let (a, inverse) = (c.operand("a", a, Kind::F32, cols)?, c.operand("inverse", inverse, Kind::F32, rows)?);
    let (rows, cols, workers, dtype) = (c.long(rows)?, c.long(cols)?, c.long(workers)?, c.code(kind)?);
    // SAFETY: dx, dy and x have rows · cols values of one kind, of which dx may be dy; a is cols f32, inverse rows, parts workers · cols.
    c.launch(work, |s| unsafe { ffi!(sq_scaled_rms_norm_backward(dx, parts, dy, x, a, inverse, rows, cols, workers, dtype, s)) })
}

impl Var<'_> {
    /// [`rms_norm`](Var::rms_norm) with the columns of the output divided by `exp(a)`; a has an entry a column, in `f64` for `f64` values, else
    /// in `f32`.
    ///
    /// # Errors
    /// Those of [`Tape::record`](crate::Tape::record); another number of logarithms, or another type.
    pub fn scaled_rms_norm(self, eps: f64, a: Self) -> Result<Self> {
        self.tape().record(ScaledRmsNorm { eps }, vec![self, a])
    }
}

/// y by the definition, for rows of as many values as a.
pub fn reference(x: &[f64], a: &[f64], eps: f64) -> Vec<f64> {
    log_scale::reference(DIVIDED, &rms_norm::reference(x, a.len(), eps).0, a, a.len())
}

/// dx and da by the formulas above.
pub fn reference_backward(dy: &[f64], x: &[f64], a: &[f64], eps: f64) -> [Vec<f64>; 2] {
    let (cols, y) = (a.len(), reference(x, a, eps));
    let mut da = vec![0f64; cols];
    y.iter().zip(dy).enumerate().for_each(|(i, (y, dy))| da[i % cols] -= y * dy);
    let met = log_scale::reference(DIVIDED, dy, a, cols);
    let inverse = rms_norm::reference(x, cols, eps).1;
    [rms_norm::reference_backward(&met, x, &inverse, cols), da]
}

/// Worked cases.
pub(crate) fn cases() -> Vec<Case> {
    let case = |name: &str, shape: &[usize], eps: f64| {
        let cols = shape[shape.len() - 1];
        Case::new("scaled_rms_norm", name, normals(&[(shape, 25), (&[cols], 26)]), move |v| build(v, eps))
    };
    let mut all = vec![
        case("one value", &[1, 1], 0.5),
        case("one row", &[1, 24], 1e-5),
        case("odd", &[3, 37], 1e-6),
        case("three axes", &[2, 3, 16], 1e-5),
        case("1024x384", &[1024, 384], 1e-5).large(),
        case("1300x4104", &[1300, 4104], 1e-5).large(),
        case("3x33000", &[3, 33000], 1e-5).large(),
    ];
    all.extend(Case::table(timed, SIZES));
    all.extend(Case::table(timed_backward, SIZES));
    all
}

const TIMED_EPS: f64 = 1e-5;

fn build(v: Vec<Var<'_>>, eps: f64) -> Result<Var<'_>> {
    let [x, a]: [Var; 2] = v.try_into().map_err(|_| Error::Tape("two operands".into()))?;
    let wide = if x.value().dtype().is_half() { DType::F32 } else { x.value().dtype() };
    x.scaled_rms_norm(eps, a.to_dtype(wide)?)
}

const SIZES: &[At] = &[(Place::Cpu, 4096, 4096, &[DType::F32]), (Place::Gpu, 4096, 16384, &[DType::BF16, DType::F32])];

fn timed(n: usize, rows: usize) -> Case {
    let what = ("scaled_rms_norm", "scaled-rms-norm", "RMSNorm of rows of n, columns divided by exponentials");
    Case::timed(what, (n, rows), vec![vec![rows, n], vec![n]], Run::graph(|v| build(v, TIMED_EPS)), move |x, y| {
        let a = x[1].to_f64_vec()?;
        exact::every(&["scaled_rms_norm"], n, &x[..1], y, |x| vec![reference(&x[0], &a, TIMED_EPS)])
    })
    .moves(2.0 * n as f64 * rows as f64)
}

fn timed_backward(n: usize, rows: usize) -> Case {
    let what = ("scaled_rms_norm", "scaled-rms-norm-backward", "Its gradients");
    Case::timed(what, (n, rows), vec![vec![rows, n], vec![n]], Run::graph(|v| build(v, TIMED_EPS)), move |x, dx| {
        let a = x[1].to_f64_vec()?;
        let of = [x[0].clone(), x[2].clone()];
        exact::every(&["scaled_rms_norm: dx"], n, &of, &dx[..1], |x| {
            let [dx, _] = reference_backward(&x[1], &x[0], &a, TIMED_EPS);
            vec![dx]
        })?;
        log_scale::check_column_sums("scaled_rms_norm: da", &dx[1], &of, |x| reference(&x[0], &a, TIMED_EPS))
    })
    .pass(Pass::Backward)
    .moves(3.0 * n as f64 * rows as f64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Tape, ops::randn};

    /// One pass is the two operations after one another, values and gradients.
    #[test]
    fn one_pass_is_both_operations() {
        let of = |fused: bool| {
            let tape = Tape::new();
            let [x, a] = [([9, 20].as_slice(), 1), (&[20], 3)].map(|(shape, seed)| tape.variable(randn(shape, seed)));
            let y = match fused {
                true => x.clone().scaled_rms_norm(1e-5, a.clone()),
                false => x.clone().rms_norm(1e-5).unwrap().log_scale(a.clone(), Along::Columns, true),
            }
            .unwrap();
            let value = y.value().clone();
            let mut grads = tape.backward_from(y, randn([9, 20], 4)).unwrap();
            let mut all = vec![value];
            all.extend([x, a].iter().map(|v| grads.take(v).unwrap()));
            all.iter().flat_map(|t| t.to_f64_vec().unwrap()).collect::<Vec<_>>()
        };
        let far = of(true).into_iter().zip(of(false)).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        assert!(far < 1e-12, "{far:e}");
    }

    #[test]
    fn logarithms_that_do_not_fit_are_errors() {
        let tape = Tape::new();
        let x = || tape.constant(randn([3, 4], 1));
        assert!(x().scaled_rms_norm(1e-5, tape.constant(randn([3], 1))).is_err());
        assert!(x().scaled_rms_norm(1e-5, tape.constant(randn([4], 1).to_dtype(DType::F32).unwrap())).is_err());
    }
}
