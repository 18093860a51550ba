//! The gated activation of the MLP: `y = silu(g) u`, `silu(g) = g s`, `s = 1/(1 + e^−g)` (Shazeer 2020).
//! Backward: `dg = dy u s (1 + g (1 − s))`, `du = dy g s`.

use rayon::prelude::*;

use crate::device::cuda::{CudaDevice, Queue};
use crate::device::launch::{Check, View, Work};
use crate::device::{cpu, ffi};
use crate::ops::{At, Case, Pass, Place, Run, exact, randn};
use crate::tape::{Grads, Inputs, Op, Saved, Var, operands};
use crate::{DType, Error, Result, Tensor};

/// The operation; keeps both operands.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Swiglu;

impl Op for Swiglu {
    fn name(&self) -> &'static str {
        "swiglu"
    }
    fn check(&self, inputs: &[Tensor]) -> Result<()> {
        let [gate, up] = operands(inputs)?;
        if gate.shape() != up.shape() {
            return Err(Error::shape("swiglu", format!("{:?}", gate.shape()), up.shape()));
        }
        if gate.dtype() != up.dtype() {
            return Err(Error::dtype("swiglu", gate.dtype(), up.dtype()));
        }
        Ok(())
    }
    fn cpu(&self, inputs: Inputs, save: &mut Saved) -> Result<Tensor> {
        let [gate, up] = inputs.take()?;
        keep(save, &gate, &up);
        forward_on_cpu(&gate, &up)
    }
    /// In place of an operand when unshared.
    fn gpu(&self, device: &CudaDevice, inputs: Inputs, save: &mut Saved) -> Result<Tensor> {
        let [gate, up] = inputs.take()?;
        keep(save, &gate, &up);
        let (mut gate, mut up) = (gate.aligned()?, up.aligned()?);
        let y = if up.is_unique() { up.clone() } else { gate.or_new(device)? };
        launch(device.queue(), y.view()?, gate.view()?, up.view()?)?;
        Ok(y)
    }
    fn backward(&self, saved: Saved, dy: Tensor, want: &[bool]) -> Result<Grads> {
        let [gate, up] = saved.take()?;
        let [dgate, dup] = backward_on_cpu(gate, up, dy)?;
        Ok(vec![want[0].then_some(dgate), want[1].then_some(dup)])
    }
    fn gpu_backward(&self, device: &CudaDevice, saved: Saved, dy: Tensor, want: &[bool]) -> Result<Grads> {
        let [gate, up] = saved.take()?;
        let (dy, gate, up) = (dy.aligned()?, gate.aligned()?, up.aligned()?);
        let new = |t: &Tensor| Tensor::on(device, t.shape(), t.dtype());
        let (dgate, dup) = (new(&gate)?, new(&up)?);
        launch_backward(device.queue(), [dgate.view()?, dup.view()?], dy.view()?, gate.view()?, up.view()?)?;
        Ok(vec![want[0].then_some(dgate), want[1].then_some(dup)])
    }
}

/// y on the CPU, in `f64` or `f32`.
pub(super) fn forward_on_cpu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    let shape = gate.shape().to_vec();
    if gate.dtype() == DType::F64 {
        return Tensor::from_vec(reference(gate.as_slice()?, up.as_slice()?), shape);
    }
    let (gate, up) = (gate.as_slice::<f32>()?, up.as_slice::<f32>()?);
    let mut y = cpu::alloc(gate.len());
    y.par_chunks_mut(CHUNK).zip(gate.par_chunks(CHUNK)).zip(up.par_chunks(CHUNK)).for_each(|((y, g), u)| {
        cpu::simd(
            #[inline(always)]
            || y.iter_mut().zip(g).zip(u).for_each(|((y, &g), &u)| *y = g * sigmoid(g) * u),
        );
    });
    Tensor::from_vec(y, shape)
}

/// The gradients of gate and up on the CPU.
pub(super) fn backward_on_cpu(gate: Tensor, up: Tensor, dy: Tensor) -> Result<[Tensor; 2]> {
    let shape = dy.shape().to_vec();
    let (dgate, dup) = if dy.dtype() == DType::F64 {
        let (dgate, dup) = reference_backward(dy.as_slice()?, gate.as_slice()?, up.as_slice()?);
        (Tensor::from_vec(dgate, shape.clone())?, Tensor::from_vec(dup, shape)?)
    } else {
        let (mut gate, mut up) = (gate.into_owned::<f32>()?, up.into_owned::<f32>()?);
        let dy = dy.as_slice::<f32>()?;
        gate.par_chunks_mut(CHUNK).zip(up.par_chunks_mut(CHUNK)).zip(dy.par_chunks(CHUNK)).for_each(|((g, u), dy)| {
            cpu::simd(
                #[inline(always)]
                || g.iter_mut().zip(u).zip(dy).for_each(|((g, u), &dy)| (*g, *u) = gradients(dy, *g, *u)),
            );
        });
        (Tensor::from_vec(gate, shape.clone())?, Tensor::from_vec(up, shape)?)
    };
    Ok([dgate, dup])
}

fn keep(save: &mut Saved, gate: &Tensor, up: &Tensor) {
    if save.wants_any() {
        save.push(gate.clone());
        save.push(up.clone());
    }
}

/// `y = silu(gate) · up`; y may be gate or up.
pub(crate) fn launch(queue: Queue<'_>, y: View<'_>, gate: View<'_>, up: View<'_>) -> Result<()> {
    let c = Check::new("swiglu", queue);
    let (n, kind, work) = (gate.len(), gate.kind(), Work::moving("swiglu", 3 * gate.bytes()));
    let (count, dtype) = (c.long(n)?, c.code(kind)?);
    let (y, gate, up) = (c.operand("y", y, kind, n)?, c.operand("gate", gate, kind, n)?, c.operand("up", up, kind, n)?);
    // SAFETY: all are n values of one kind; in place is allowed.
    c.launch(work, |s| unsafe { ffi!(sq_swiglu_forward(y, gate, up, count, dtype, s)) })
}

/// The gradients of gate and up.
pub(crate) fn launch_backward(
    queue: Queue<'_>,
    [dgate, dup]: [View<'_>; 2],
    dy: View<'_>,
    gate: View<'_>,
    up: View<'_>,
) -> Result<()> {
    let c = Check::new("swiglu backward", queue);
    let (n, kind, work) = (gate.len(), gate.kind(), Work::moving("swiglu", 5 * gate.bytes()));
    let (count, dtype) = (c.long(n)?, c.code(kind)?);
    let (dgate, dup) = (c.operand("dgate", dgate, kind, n)?, c.operand("dup", dup, kind, n)?);
    let (dy, gate, up) = (c.operand("dy", dy, kind, n)?, c.operand("gate", gate, kind, n)?, c.operand("up", up, kind, n)?);
    // SAFETY: all are n values of one kind.
    c.launch(work, |s| unsafe { ffi!(sq_swiglu_backward(dgate, dup, dy, gate, up, count, dtype, s)) })
}

impl<'t> Var<'t> {
    /// `silu(self) · up`, elementwise; `self` is the gate.
    ///
    /// # Errors
    /// Those of [`Tape::record`](crate::Tape::record); operands of different shapes, types or devices.
    pub fn swiglu(self, up: Var<'t>) -> Result<Self> {
        self.tape().record(Swiglu, vec![self, up])
    }
}

/// y by the definition.
pub fn reference(gate: &[f64], up: &[f64]) -> Vec<f64> {
    gate.iter().zip(up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect()
}

/// dgate and dup by the formulas above.
pub fn reference_backward(dy: &[f64], gate: &[f64], up: &[f64]) -> (Vec<f64>, Vec<f64>) {
    let one = |((dy, g), u): ((&f64, &f64), &f64)| {
        let s = 1.0 / (1.0 + (-g).exp());
        (dy * u * s * (1.0 + g * (1.0 - s)), dy * g * s)
    };
    dy.iter().zip(gate).zip(up).map(one).unzip()
}

/// Values handed to one task.
const CHUNK: usize = 1 << 14;

#[inline(always)]
fn sigmoid(g: f32) -> f32 {
    1.0 / (1.0 + cpu::exp_f32(-g))
}

#[inline(always)]
fn gradients(dy: f32, g: f32, u: f32) -> (f32, f32) {
    let s = sigmoid(g);
    (dy * u * s * (1.0 + g * (1.0 - s)), dy * g * s)
}

/// Worked cases: the wide one reaches where e^−g over- and underflows.
pub(crate) fn cases() -> Vec<Case> {
    let case = |name: &str, shape: &[usize], size: f64| {
        let shape = shape.to_vec();
        let operands = move || {
            let mut gate = randn(shape.clone(), 31).into_vec::<f64>().expect("f64");
            gate.iter_mut().for_each(|g| *g *= size);
            vec![Tensor::from_vec(gate, shape.clone()).expect("the same size"), randn(shape.clone(), 32)]
        };
        Case::new("swiglu", name, operands, |v| {
            let [gate, up]: [Var; 2] = v.try_into().map_err(|_| Error::Tape("two operands".into()))?;
            gate.swiglu(up)
        })
    };
    let mut all = vec![
        case("one value", &[1], 1.0),
        case("odd", &[3, 7, 5], 1.0),
        case("wide", &[3, 37], 60.0),
        case("1024x1376", &[1024, 1376], 1.0).large(),
    ];
    all.extend(Case::table(timed, SIZES));
    all.extend(Case::table(timed_backward, SIZES));
    all
}

const SIZES: &[At] = &[
    (Place::Cpu, 4096, 4096, &[DType::F32]),
    (Place::Cpu, 11008, 1524, &[DType::F32]),
    (Place::Gpu, 11008, 16384, &[DType::BF16, DType::F32]),
];

fn graph() -> Run {
    Run::graph(|v| {
        let [gate, up]: [Var; 2] = v.try_into().map_err(|_| Error::Tape("two operands".into()))?;
        gate.swiglu(up)
    })
}

fn timed(n: usize, rows: usize) -> Case {
    Case::timed(("swiglu", "swiglu", "SwiGLU of rows of n"), (n, rows), vec![vec![rows, n]; 2], graph(), move |x, y| {
        exact::every(&["swiglu"], n, x, y, |x| vec![reference(&x[0], &x[1])])
    })
}

fn timed_backward(n: usize, rows: usize) -> Case {
    let what = ("swiglu", "swiglu-backward", "Its gradients");
    Case::timed(what, (n, rows), vec![vec![rows, n]; 2], graph(), move |x, dx| {
        exact::every(&["swiglu: dgate", "swiglu: dup"], n, x, dx, |x| {
            let (dgate, dup) = reference_backward(&x[2], &x[0], &x[1]);
            vec![dgate, dup]
        })
    })
    .pass(Pass::Backward)
    .moves(5.0 * n as f64 * rows as f64)
}
