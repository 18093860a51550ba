//! The seam between the layer-by-layer pipeline and what quantises a weight: a quantiser is one file that implements
//! [`WeightQuantizer`].

use crate::grid::Quantized;
use crate::quant::QuantSpec;
use crate::{DType, Device, Error, Result, Tensor};

/// One linear layer, quantised.
#[derive(Clone, Debug)]
pub struct QuantizedLinear {
    /// The weight the network runs with `[out, in]`: `scale · (code − zero)` in the type and on the device of the original.
    pub weight: Tensor,
    /// Codes and grids, in the columns' own order, so that `codes.dequantize()` rounded to the weight's type is `weight`, bit for
    /// bit; `None` where the weight was left alone.
    pub codes: Option<Quantized>,
    /// The damping that GPTQ used, where it did.
    pub damping: Option<f64>,
    /// `tr((W − Ŵ) H (W − Ŵ)ᵀ)` with the damped H, where one was used.
    pub loss: Option<f64>,
}

impl QuantizedLinear {
    /// A weight that is not quantised.
    pub fn exact(weight: &Tensor) -> Self {
        Self { weight: weight.clone(), codes: None, damping: None, loss: None }
    }

    /// A weight of given codes, in this type and on this device.
    ///
    /// # Errors
    /// Codes and grids that do not fit together; a `dtype` that is not floating-point.
    pub fn from_codes(codes: Quantized, dtype: DType, device: &Device) -> Result<Self> {
        let weight = codes.dequantize()?.to_dtype(dtype)?.to_device(device)?;
        Ok(Self { weight, codes: Some(codes), damping: None, loss: None })
    }
}

/// Turns weights into weights on a grid.
pub trait WeightQuantizer {
    /// A short name, for records.
    fn name(&self) -> &'static str;

    /// True when [`WeightQuantizer::quantize`] wants a Hessian, and so calibration text.
    fn needs_hessian(&self) -> bool;

    /// Quantises linears `[out, in]` that read one input; `hessian` is that input's `[in, in]` in `f64` ([`Hessian`](crate::quant::Hessian)).
    /// `spec` is active. The results are in the order of `weights`.
    ///
    /// # Errors
    /// Weights or a Hessian of shapes that do not fit; a quantiser that needs a Hessian and got none; a Hessian that cannot be
    /// factored.
    fn quantize(&self, weights: &[&Tensor], spec: &QuantSpec, hessian: Option<&Tensor>) -> Result<Vec<QuantizedLinear>>;
}

/// Checks a Hessian against the weights that it is for.
pub(crate) fn hessian_for<'a>(name: &str, weights: &[&Tensor], hessian: Option<&'a Tensor>) -> Result<&'a Tensor> {
    let hessian = hessian.ok_or_else(|| Error::argument(name, "needs the Hessian of the weights' input"))?;
    for w in weights {
        if w.shape().len() != 2 {
            return Err(Error::shape(format!("{name}: weight"), "[out, in]", w.shape()));
        }
        if hessian.shape() != [w.cols(), w.cols()] {
            return Err(Error::shape(format!("{name}: Hessian"), format!("[{n}, {n}]", n = w.cols()), hessian.shape()));
        }
    }
    Ok(hessian)
}
