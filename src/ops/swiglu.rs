//! The gated activation of the MLP: `y = silu(g) u`, `silu(g) = g s`, `s = 1/(1 + e^−g)` (Shazeer 2020).
//! Backward: `dg = dy u s (1 + g (1 − s))`, `du = dy g s`.

use rayon::prelude::*;

use crate::device::{Device, cpu};
use crate::ops::{Case, randn, unsupported, widened, widened_backward};
use crate::tape::{Grads, Inputs, Op, Saved, Var};
use crate::{DType, Error, Result, Tensor};

/// The operation; keeps both operands.
#[derive(Clone, Copy, Debug)]
pub struct Swiglu;

impl Op for Swiglu {
    fn name(&self) -> &'static str {
        "swiglu"
    }
    fn forward(&self, inputs: Inputs, save: &mut Saved) -> Result<Tensor> {
        let [gate, up] = inputs.take()?;
        if gate.shape() != up.shape() {
            return Err(Error::shape("swiglu", format!("{:?}", gate.shape()), up.shape()));
        }
        if gate.dtype() != up.dtype() {
            return Err(Error::dtype("swiglu", gate.dtype(), up.dtype()));
        }
        if gate.device().is_cpu() && gate.dtype().is_half() {
            return widened(self, vec![gate, up].into(), save);
        }
        if save.wants_any() {
            save.push(gate.clone());
            save.push(up.clone());
        }
        let shape = gate.shape().to_vec();
        match (gate.device(), gate.dtype()) {
            (Device::Cpu, DType::F64) => Tensor::from_vec(reference(gate.as_slice()?, up.as_slice()?), shape),
            (Device::Cpu, DType::F32) => {
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
            #[cfg(feature = "cuda")]
            (Device::Cuda(_), _) => crate::device::cuda::ops::swiglu_forward(gate, up),
            _ => Err(unsupported(self, &gate)),
        }
    }
    fn backward(&self, saved: Saved, dy: Tensor, want: &[bool]) -> Result<Grads> {
        if dy.device().is_cpu() && dy.dtype().is_half() {
            return widened_backward(self, saved, dy, want);
        }
        let [gate, up] = saved.take()?;
        let shape = dy.shape().to_vec();
        let (dgate, dup) = match (dy.device(), dy.dtype()) {
            (Device::Cpu, DType::F64) => {
                let (dgate, dup) = reference_backward(dy.as_slice()?, gate.as_slice()?, up.as_slice()?);
                (Tensor::from_vec(dgate, shape.clone())?, Tensor::from_vec(dup, shape)?)
            }
            (Device::Cpu, DType::F32) => {
                let (mut gate, mut up) = (gate.into_owned::<f32>()?, up.into_owned::<f32>()?);
                let dy = dy.as_slice::<f32>()?;
                gate.par_chunks_mut(CHUNK).zip(up.par_chunks_mut(CHUNK)).zip(dy.par_chunks(CHUNK)).for_each(|((g, u), dy)| {
                    cpu::simd(
                        #[inline(always)]
                        || g.iter_mut().zip(u).zip(dy).for_each(|((g, u), &dy)| (*g, *u) = gradients(dy, *g, *u)),
                    );
                });
                (Tensor::from_vec(gate, shape.clone())?, Tensor::from_vec(up, shape)?)
            }
            #[cfg(feature = "cuda")]
            (Device::Cuda(_), _) => crate::device::cuda::ops::swiglu_backward(dy, gate, up)?,
            _ => return Err(unsupported(self, &dy)),
        };
        Ok(vec![want[0].then_some(dgate), want[1].then_some(dup)])
    }
}

impl<'t> Var<'t> {
    /// `silu(self) · up`, elementwise; `self` is the gate.
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
pub fn cases() -> Vec<Case> {
    let case = |name: &str, shape: &[usize], size: f64| {
        let mut gate = randn(shape, 31).into_vec::<f64>().expect("f64");
        gate.iter_mut().for_each(|g| *g *= size);
        let gate = Tensor::from_vec(gate, shape).expect("the same size");
        Case::new("swiglu", name, vec![gate, randn(shape, 32)], |v| {
            let [gate, up]: [Var; 2] = v.try_into().map_err(|_| Error::Tape("two operands".into()))?;
            gate.swiglu(up)
        })
    };
    vec![
        case("one value", &[1], 1.0),
        case("odd", &[3, 7, 5], 1.0),
        case("wide", &[3, 37], 60.0),
        case("1024x1376", &[1024, 1376], 1.0).large(),
    ]
}
