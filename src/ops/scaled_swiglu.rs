//! The gated activation with the columns of up divided by exponentials of learned logarithms: `y = silu(g) u exp(−a)`
//! ([`swiglu`], then [`log_scale`], in one pass). Backward, with `e = exp(−a)` and s the logistic function of g:
//! `dg = dy u e s (1 + g (1 − s))`, `du = dy e g s`, `da[j] = −Σ_i y[i, j] dy[i, j]`.

use crate::device::cuda::{CudaDevice, Queue};
use crate::device::ffi;
use crate::device::launch::{Check, Kind, View, Work};
use crate::ops::log_scale::{self, Along, LogScale};
use crate::ops::{At, Case, Pass, Place, Run, bias, exact, normals, swiglu};
use crate::tape::{Grads, Inputs, Op, Saved, Var, operands};
use crate::{DType, Error, Result, Tensor};

/// The operation: gate and up `[.., cols]`, a `[cols]`, in `f32` where they have 16 bits. It keeps all three.
struct ScaledSwiglu;

const DIVIDED: LogScale = LogScale { along: Along::Columns, inverse: true };

impl Op for ScaledSwiglu {
    fn name(&self) -> &'static str {
        "scaled_swiglu"
    }
    fn check(&self, inputs: &[Tensor]) -> Result<()> {
        let [gate, up, a] = operands(inputs)?;
        if gate.shape() != up.shape() {
            return Err(Error::shape("scaled_swiglu", format!("{:?}", gate.shape()), up.shape()));
        }
        if gate.dtype() != up.dtype() {
            return Err(Error::dtype("scaled_swiglu", gate.dtype(), up.dtype()));
        }
        log_scale::check_logarithms("scaled_swiglu: logarithms", up, a, up.cols())
    }
    fn cpu(&self, inputs: Inputs, save: &mut Saved) -> Result<Tensor> {
        let [gate, up, a] = inputs.take()?;
        keep(save, [&gate, &up, &a]);
        let y = swiglu::forward_on_cpu(&gate, &up)?;
        DIVIDED.on_cpu(y, &a)
    }
    fn gpu(&self, device: &CudaDevice, inputs: Inputs, save: &mut Saved) -> Result<Tensor> {
        let [gate, up, a] = inputs.take()?;
        keep(save, [&gate, &up, &a]);
        let (mut gate, mut up, a) = (gate.aligned()?, up.aligned()?, a.aligned()?);
        let y = if up.is_unique() { up.clone() } else { gate.or_new(device)? };
        launch(device.queue(), y.view()?, gate.view()?, up.view()?, a.view()?)?;
        Ok(y)
    }
    fn backward(&self, saved: Saved, dy: Tensor, want: &[bool]) -> Result<Grads> {
        let [gate, up, a] = saved.take()?;
        let da = match want[2] {
            true => {
                let y = DIVIDED.on_cpu(swiglu::forward_on_cpu(&gate, &up)?, &a)?;
                Some(DIVIDED.sums_on_cpu(&y, &dy, &a)?)
            }
            false => None,
        };
        // What reaches silu(g) u has met the scale.
        let [dgate, dup] = swiglu::backward_on_cpu(gate, up, DIVIDED.on_cpu(dy, &a)?)?;
        Ok(vec![want[0].then_some(dgate), want[1].then_some(dup), da])
    }
    fn gpu_backward(&self, device: &CudaDevice, saved: Saved, dy: Tensor, want: &[bool]) -> Result<Grads> {
        let [gate, up, a] = saved.take()?;
        let (dy, gate, up, a) = (dy.aligned()?, gate.aligned()?, up.aligned()?, a.aligned()?);
        let new = |t: &Tensor| Tensor::on(device, t.shape(), t.dtype());
        let (dgate, dup) = (new(&gate)?, new(&up)?);
        let parts = Tensor::on(device, &[log_scale::groups_of(gate.rows()), gate.cols()], DType::F32)?;
        let operands = [dy.view()?, gate.view()?, up.view()?];
        launch_backward(device.queue(), [dgate.view()?, dup.view()?], parts.view()?, operands, a.view()?)?;
        let da = want[2].then(|| bias::sums_of_rows(device, &parts)).transpose()?;
        Ok(vec![want[0].then_some(dgate), want[1].then_some(dup), da])
    }
}

fn keep(save: &mut Saved, operands: [&Tensor; 3]) {
    if save.wants_any() {
        operands.into_iter().for_each(|t| save.push(t.clone()));
    }
}

/// `y = silu(gate) up exp(−a)` for rows of as many values as a; y may be gate or up.
pub(crate) fn launch(queue: Queue<'_>, y: View<'_>, gate: View<'_>, up: View<'_>, a: View<'_>) -> Result<()> {
    let c = Check::new("scaled_swiglu", queue);
    let (n, cols, kind, work) = (gate.len(), a.len(), gate.kind(), Work::moving("swiglu", 3 * gate.bytes()));
    let (rows, dtype) = (c.long(c.rows(n, cols)?)?, c.code(kind)?);
    let (y, gate, up) = (c.operand("y", y, kind, n)?, c.operand("gate", gate, kind, n)?, c.operand("up", up, kind, n)?);
    let (a, cols) = (c.operand("a", a, Kind::F32, cols)?, c.long(cols)?);
    // SAFETY: y, gate and up are rows · cols values of one kind, in place is allowed; a is cols f32.
    c.launch(work, |s| unsafe { ffi!(sq_scaled_swiglu(y, gate, up, a, rows, cols, dtype, s)) })
}

/// The gradients of gate and up from [dy, gate, up], and parts `[parts, cols]` in `f32` that add up to that of a.
pub(crate) fn launch_backward(
    queue: Queue<'_>,
    [dgate, dup]: [View<'_>; 2],
    parts: View<'_>,
    [dy, gate, up]: [View<'_>; 3],
    a: View<'_>,
) -> Result<()> {
    let c = Check::new("scaled_swiglu backward", queue);
    let (n, cols, kind, work) = (gate.len(), a.len(), gate.kind(), Work::moving("swiglu", 5 * gate.bytes()));
    let (rows, dtype) = (c.long(c.rows(n, cols)?)?, c.code(kind)?);
    let groups = c.rows(parts.len(), cols)?;
    let (dgate, dup) = (c.operand("dgate", dgate, kind, n)?, c.operand("dup", dup, kind, n)?);
    let (dy, gate, up) = (c.operand("dy", dy, kind, n)?, c.operand("gate", gate, kind, n)?, c.operand("up", up, kind, n)?);
    let parts = c.operand("parts", parts, Kind::F32, c.product(&[groups, cols])?)?;
    let (a, cols, groups) = (c.operand("a", a, Kind::F32, cols)?, c.long(cols)?, c.long(groups)?);
    // SAFETY: all but a and parts are rows · cols values of one kind; a is cols f32, parts groups · cols.
    c.launch(work, |s| unsafe {
        ffi!(sq_scaled_swiglu_backward(dgate, dup, parts, dy, gate, up, a, rows, cols, groups, dtype, s))
    })
}

impl<'t> Var<'t> {
    /// `silu(self) · up exp(−a)`, elementwise; `self` is the gate, a has an entry a column, in `f64` for `f64` values, else in `f32`.
    ///
    /// # Errors
    /// Those of [`Tape::record`](crate::Tape::record); operands of different shapes, types or devices; another number of logarithms.
    pub fn scaled_swiglu(self, up: Var<'t>, a: Var<'t>) -> Result<Self> {
        self.tape().record(ScaledSwiglu, vec![self, up, a])
    }
}

/// y by the definition, for rows of as many values as a.
pub fn reference(gate: &[f64], up: &[f64], a: &[f64]) -> Vec<f64> {
    log_scale::reference(DIVIDED, &swiglu::reference(gate, up), a, a.len())
}

/// dgate, dup and da by the formulas above.
pub fn reference_backward(dy: &[f64], gate: &[f64], up: &[f64], a: &[f64]) -> [Vec<f64>; 3] {
    let y = reference(gate, up, a);
    let mut da = vec![0f64; a.len()];
    y.iter().zip(dy).enumerate().for_each(|(i, (y, dy))| da[i % a.len()] -= y * dy);
    let met = log_scale::reference(DIVIDED, dy, a, a.len());
    let (dgate, dup) = swiglu::reference_backward(&met, gate, up);
    [dgate, dup, da]
}

/// Worked cases.
pub(crate) fn cases() -> Vec<Case> {
    let case = |name: &str, shape: &[usize]| {
        let cols = shape[shape.len() - 1];
        Case::new("scaled_swiglu", name, normals(&[(shape, 31), (shape, 32), (&[cols], 33)]), build)
    };
    let mut all = vec![
        case("one value", &[1, 1]),
        case("odd", &[3, 7, 5]),
        case("one row", &[1, 24]),
        case("whole packs", &[70, 264]),
        case("513x1376", &[513, 1376]).large(),
    ];
    all.extend(Case::table(timed, SIZES));
    all.extend(Case::table(timed_backward, SIZES));
    all
}

fn build(v: Vec<Var<'_>>) -> Result<Var<'_>> {
    let [gate, up, a]: [Var; 3] = v.try_into().map_err(|_| Error::Tape("three operands".into()))?;
    let wide = if gate.value().dtype().is_half() { DType::F32 } else { gate.value().dtype() };
    gate.scaled_swiglu(up, a.to_dtype(wide)?)
}

const SIZES: &[At] = &[(Place::Cpu, 4096, 4096, &[DType::F32]), (Place::Gpu, 11008, 16384, &[DType::BF16, DType::F32])];

fn drawn(n: usize, rows: usize) -> Vec<Vec<usize>> {
    vec![vec![rows, n], vec![rows, n], vec![n]]
}

fn timed(n: usize, rows: usize) -> Case {
    let what = ("scaled_swiglu", "scaled-swiglu", "SwiGLU of rows of n, columns divided by exponentials");
    Case::timed(what, (n, rows), drawn(n, rows), Run::graph(build), move |x, y| {
        let a = x[2].to_f64_vec()?;
        exact::every(&["scaled_swiglu"], n, &x[..2], y, |x| vec![reference(&x[0], &x[1], &a)])
    })
    .moves(3.0 * n as f64 * rows as f64)
}

fn timed_backward(n: usize, rows: usize) -> Case {
    let what = ("scaled_swiglu", "scaled-swiglu-backward", "Its gradients");
    Case::timed(what, (n, rows), drawn(n, rows), Run::graph(build), move |x, dx| {
        let a = x[2].to_f64_vec()?;
        let of = [x[0].clone(), x[1].clone(), x[3].clone()];
        exact::every(&["scaled_swiglu: dgate", "scaled_swiglu: dup"], n, &of, &dx[..2], |x| {
            let [dgate, dup, _] = reference_backward(&x[2], &x[0], &x[1], &a);
            vec![dgate, dup]
        })?;
        log_scale::check_column_sums("scaled_swiglu: da", &dx[2], &of, |x| reference(&x[0], &x[1], &a))
    })
    .pass(Pass::Backward)
    .moves(5.0 * n as f64 * rows as f64)
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
            let [gate, up, a] =
                [([9, 20].as_slice(), 1), (&[9, 20], 2), (&[20], 3)].map(|(shape, seed)| tape.variable(randn(shape, seed)));
            let y = match fused {
                true => gate.clone().scaled_swiglu(up.clone(), a.clone()),
                false => gate.clone().swiglu(up.clone().log_scale(a.clone(), Along::Columns, true).unwrap()),
            }
            .unwrap();
            let value = y.value().clone();
            let mut grads = tape.backward_from(y, randn([9, 20], 4)).unwrap();
            let mut all = vec![value];
            all.extend([gate, up, a].iter().map(|v| grads.take(v).unwrap()));
            all.iter().flat_map(|t| t.to_f64_vec().unwrap()).collect::<Vec<_>>()
        };
        let far = of(true).into_iter().zip(of(false)).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        assert!(far < 1e-12, "{far:e}");
    }

    #[test]
    fn logarithms_that_do_not_fit_are_errors() {
        let tape = Tape::new();
        let x = || tape.constant(randn([3, 4], 1));
        assert!(x().scaled_swiglu(x(), tape.constant(randn([3], 1))).is_err());
        assert!(x().scaled_swiglu(x(), tape.constant(randn([4], 1).to_dtype(DType::F32).unwrap())).is_err());
        assert!(x().scaled_swiglu(tape.constant(randn([4, 3], 1)), tape.constant(randn([4], 1))).is_err());
    }
}
