//! `y = a + b`, and the linear combinations that gradients are summed with.

use crate::device::{Device, cpu};
use crate::ops::{Case, randn, unsupported, widened};
use crate::tape::{Grads, Inputs, Op, Saved, Var};
use crate::{DType, Error, Result, Tensor};

/// Elementwise sum of two tensors of one shape; `dA = dB = dY`.
pub struct Add;

impl Op for Add {
    fn name(&self) -> &'static str {
        "add"
    }
    fn forward(&self, inputs: Inputs, _: &mut Saved) -> Result<Tensor> {
        let [a, b] = inputs.take()?;
        linear_combination(1.0, a, 1.0, b)
    }
    fn backward(&self, _: Saved, dy: Tensor, want: &[bool]) -> Result<Grads> {
        Ok(want.iter().map(|&w| w.then(|| dy.clone())).collect())
    }
}

/// `c x` for a constant c.
pub struct Scale(pub f64);

impl Op for Scale {
    fn name(&self) -> &'static str {
        "scale"
    }
    fn forward(&self, inputs: Inputs, _: &mut Saved) -> Result<Tensor> {
        let [x] = inputs.take()?;
        scale(self.0, x)
    }
    fn backward(&self, _: Saved, dy: Tensor, _: &[bool]) -> Result<Grads> {
        Ok(vec![Some(scale(self.0, dy)?)])
    }
}

impl<'t> Var<'t> {
    /// `self + other`, of one shape.
    #[allow(clippy::should_implement_trait)] // fallible
    pub fn add(self, other: Self) -> Result<Self> {
        self.tape().record(Add, vec![self, other])
    }
    /// `factor · self`.
    pub fn scale(self, factor: f64) -> Result<Self> {
        self.tape().record(Scale(factor), vec![self])
    }
}

/// `alpha a + beta b`, without a tape, in place of whichever is unshared.
pub fn linear_combination(alpha: f64, a: Tensor, beta: f64, b: Tensor) -> Result<Tensor> {
    if a.shape() != b.shape() {
        return Err(Error::shape("add", format!("{:?}", a.shape()), b.shape()));
    }
    if a.dtype() != b.dtype() {
        return Err(Error::dtype("add", a.dtype(), b.dtype()));
    }
    let shape = a.shape().to_vec();
    match (a.device(), a.dtype()) {
        (Device::Cpu, DType::F64) => {
            let mut y = a.into_owned::<f64>()?;
            cpu::zip_in_place(&mut y, b.as_slice()?, |a, b| alpha * a + beta * b);
            Tensor::from_vec(y, shape)
        }
        (Device::Cpu, DType::F32) => {
            let (alpha, beta) = (alpha as f32, beta as f32);
            let mut y = a.into_owned::<f32>()?;
            cpu::zip_in_place(&mut y, b.as_slice()?, |a, b| alpha * a + beta * b);
            Tensor::from_vec(y, shape)
        }
        (Device::Cpu, DType::F16 | DType::BF16) => {
            struct Both(f64, f64);
            impl Op for Both {
                fn name(&self) -> &'static str {
                    "add"
                }
                fn forward(&self, inputs: Inputs, _: &mut Saved) -> Result<Tensor> {
                    let [a, b] = inputs.take()?;
                    linear_combination(self.0, a, self.1, b)
                }
                fn backward(&self, _: Saved, _: Tensor, _: &[bool]) -> Result<Grads> {
                    Ok(vec![])
                }
            }
            widened(&Both(alpha, beta), vec![a, b].into(), &mut Saved::default())
        }
        #[cfg(feature = "cuda")]
        (Device::Cuda(_), _) => crate::device::cuda::ops::axpby(alpha, a, beta, Some(b)),
        _ => Err(unsupported(&Add, &a)),
    }
}

/// `alpha x`, without a tape.
pub fn scale(alpha: f64, x: Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if !x.device().is_cpu() {
        return crate::device::cuda::ops::axpby(alpha, x, 0.0, None);
    }
    linear_combination(alpha, x.clone(), 0.0, x)
}

/// Worked cases.
pub fn cases() -> Vec<Case> {
    let case = |name: &str, shape: &[usize]| {
        Case::new("add", name, vec![randn(shape, 1), randn(shape, 2)], |v| {
            let [a, b]: [Var; 2] = v.try_into().map_err(|_| Error::Tape("two operands".into()))?;
            a.add(b)?.scale(0.7)
        })
    };
    vec![case("one value", &[1]), case("odd", &[3, 7, 5]), case("large", &[512, 1024]).large()]
}
