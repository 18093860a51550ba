//! Round to nearest: every weight by itself, on the grid that its row or group spans.

use crate::ops::fake_quant::quantize;
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
}
