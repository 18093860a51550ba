//! The mean of squares, `L = mean x²` over all values, `dx = dL · 2x/count`: how far two networks' hidden states are apart. Keeps x. Made of
//! products, a row at a time, so it runs wherever they do.

use crate::linalg::matmul;
use crate::ops::{Case, normals};
use crate::tape::{Grads, Inputs, Op, Saved, Takes, Var, operands};
use crate::{DType, Error, Result, Tensor};

/// The operation.
#[derive(Clone, Copy, Debug)]
pub(crate) struct MeanSquare;

/// Σ x², in `f64` on the CPU.
///
/// # Errors
/// A failing copy or product.
pub(crate) fn square(x: &Tensor) -> Result<f64> {
    if x.device().is_cpu() {
        return Ok(x.to_f64_vec()?.into_iter().map(|x| x * x).sum());
    }
    // Row by row, so that no sum in f32 is long.
    let x = x.to_dtype(DType::F32)?.reshape([x.rows(), 1, x.cols()])?;
    Ok(matmul::product(&x, false, &x, true, false, DType::F32)?.to_f64_vec()?.into_iter().sum())
}

impl Op for MeanSquare {
    fn name(&self) -> &'static str {
        "mean_square"
    }
    fn takes(&self) -> Takes {
        Takes::Anything
    }
    fn check(&self, inputs: &[Tensor]) -> Result<()> {
        match operands(inputs)? {
            [x] if x.is_empty() => Err(Error::shape("mean_square", "at least one value", x.shape())),
            [_] => Ok(()),
        }
    }
    fn cpu(&self, inputs: Inputs, save: &mut Saved) -> Result<Tensor> {
        let [x] = inputs.take()?;
        let wide = if x.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
        let mean = Tensor::scalar(square(&x)? / x.len() as f64).to_dtype(wide)?.to_device(&x.device())?;
        if save.wants(0) {
            save.push(x);
        }
        Ok(mean)
    }
    fn backward(&self, saved: Saved, dy: Tensor, _: &[bool]) -> Result<Grads> {
        let [x] = saved.take()?;
        let factor = 2.0 * dy.item()? / x.len() as f64;
        Ok(vec![Some(x.scale(factor)?)])
    }
}

impl Var<'_> {
    /// The mean of squares of all values: a scalar, in `f64` for `f64` values and in `f32` for all others.
    ///
    /// # Errors
    /// Those of [`Tape::record`](crate::Tape::record); no values.
    pub fn mean_square(self) -> Result<Self> {
        self.tape().record(MeanSquare, vec![self])
    }
}

/// Worked cases.
pub(crate) fn cases() -> Vec<Case> {
    let case =
        |name: &str, shape: &[usize]| Case::new("mean_square", name, normals(&[(shape, 91)]), |mut v| v.remove(0).mean_square());
    vec![case("one value", &[1, 1]), case("odd", &[5, 37]), case("1024x384", &[1024, 384]).large()]
}
