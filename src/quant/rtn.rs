//! Round to nearest: every weight by itself, on the grid that its row or group spans.

use crate::ops::clipped_fake_quant::quantize_clipped;
use crate::ops::fake_quant::quantize;
use crate::quant::weight::clips_for;
use crate::quant::{Moments, QuantSpec, QuantizedLinear, WeightQuantizer};
use crate::{Result, Tensor};

/// Round to nearest.
#[derive(Clone, Copy, Debug, Default)]
pub struct Rtn;

impl WeightQuantizer for Rtn {
    fn name(&self) -> &'static str {
        "rtn"
    }
    fn needs_hessian(&self) -> bool {
        false
    }
    fn quantize(&self, weights: &[&Tensor], spec: &QuantSpec, _: Option<&Moments>) -> Result<Vec<QuantizedLinear>> {
        weights.iter().map(|w| QuantizedLinear::from_codes(quantize(w, spec)?, w.dtype(), &w.device())).collect()
    }
    fn quantize_clipped(
        &self,
        weights: &[&Tensor],
        spec: &QuantSpec,
        _: Option<&Moments>,
        clips: &[&Tensor],
    ) -> Result<Vec<QuantizedLinear>> {
        let one = |(w, a): (&&Tensor, &&Tensor)| {
            clips_for("RTN", w, spec, a)?;
            QuantizedLinear::from_codes(quantize_clipped(w, spec, a)?, w.dtype(), &w.device())
        };
        weights.iter().zip(clips).map(one).collect()
    }
}
