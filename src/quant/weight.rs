//! The seam between the layer-by-layer pipeline and what quantises a weight: a quantiser is one file that implements
//! [`WeightQuantizer`].

use crate::grid::Quantized;
use crate::quant::{Moments, QuantSpec, Site};
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
    /// `tr((W − Ŵ) H (W − Ŵ)ᵀ)` with the damped H, where GPTQ made it as small as it could.
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

    /// True when it wants the drift of the inputs at a site too, and so a second stream of the text, in full precision.
    fn wants_drift(&self, _site: Site) -> bool {
        false
    }

    /// True when activations, K and V are to be quantised in the stream that Hessians are measured on, whatever the calibration says.
    fn reads_quantized(&self) -> bool {
        false
    }

    /// The type that files keep its scales in, where they are rounded to one ([`QuantSpec::stored`]).
    fn stores_scales_as(&self) -> Option<DType> {
        None
    }

    /// Quantises linears `[out, in]` that read one input, of which `moments` are the second moments. `spec` is active. The results are in
    /// the order of `weights`.
    ///
    /// # Errors
    /// Weights or moments of shapes that do not fit; a quantiser that needs moments and got none; a Hessian that cannot be factored.
    fn quantize(&self, weights: &[&Tensor], spec: &QuantSpec, moments: Option<&Moments>) -> Result<Vec<QuantizedLinear>>;

    /// The same on ranges that learned ratios clip in place of the specification's rule: `clips` has the logarithms `[kinds, 2]` of every
    /// weight, a pair for every row or group ([`WeightClips`](crate::rotation::WeightClips)), in the type that the weight is quantised in.
    ///
    /// # Errors
    /// Those of [`WeightQuantizer::quantize`]; ratios of other shapes; a quantiser that does not take any, as without an implementation.
    fn quantize_clipped(
        &self,
        _weights: &[&Tensor],
        _spec: &QuantSpec,
        _moments: Option<&Moments>,
        _clips: &[&Tensor],
    ) -> Result<Vec<QuantizedLinear>> {
        let message = "takes no clip ratios of weights, and the rotations have some that were learned";
        Err(Error::argument(self.name(), message))
    }
}

/// Quantises by ratios that were learned where there are some.
pub(crate) fn quantize_by(
    quantizer: &dyn WeightQuantizer,
    weights: &[&Tensor],
    spec: &QuantSpec,
    moments: Option<&Moments>,
    clips: Option<&[&Tensor]>,
) -> Result<Vec<QuantizedLinear>> {
    match clips {
        None => quantizer.quantize(weights, spec, moments),
        Some(clips) => quantizer.quantize_clipped(weights, spec, moments, clips),
    }
}

/// Checks that a weight's clip ratios are a pair for every row or group.
pub(crate) fn clips_for(name: &str, w: &Tensor, spec: &QuantSpec, clips: &Tensor) -> Result<()> {
    let expected = [w.len() / spec.group_size(w.cols())?.max(1), 2];
    if clips.shape() == expected {
        return Ok(());
    }
    Err(Error::shape(format!("{name}: clip ratios of the weight"), format!("{expected:?}"), clips.shape()))
}

/// Checks moments against the weights that they are for.
pub(crate) fn moments_for<'a>(name: &str, weights: &[&Tensor], moments: Option<&'a Moments>) -> Result<&'a Moments> {
    let moments = moments.ok_or_else(|| Error::argument(name, "needs the Hessian of the weights' input"))?;
    for w in weights {
        if w.shape().len() != 2 {
            return Err(Error::shape(format!("{name}: weight"), "[out, in]", w.shape()));
        }
        let square = [w.cols(), w.cols()];
        for (what, of) in [("Hessian", Some(&moments.hessian)), ("drift", moments.drift.as_ref())] {
            if let Some(of) = of.filter(|of| of.shape() != square) {
                return Err(Error::shape(format!("{name}: {what}"), format!("{square:?}"), of.shape()));
            }
        }
    }
    Ok(moments)
}
