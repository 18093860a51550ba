//! Another floating-point type: rounds to nearest even when narrowing. Backward casts the gradient to the operand's type.

use crate::tape::{Grads, Inputs, Op, Saved, Takes, Var};
use crate::{DType, Result, Tensor};

/// The operation.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cast {
    /// Of the operand.
    pub from: DType,
    /// Of the result.
    pub to: DType,
}

impl Op for Cast {
    fn name(&self) -> &'static str {
        "cast"
    }
    fn takes(&self) -> Takes {
        Takes::Anything
    }
    fn cpu(&self, inputs: Inputs, _: &mut Saved) -> Result<Tensor> {
        let [x] = inputs.take()?;
        x.to_dtype(self.to)
    }
    fn backward(&self, _: Saved, dy: Tensor, _: &[bool]) -> Result<Grads> {
        Ok(vec![Some(dy.to_dtype(self.from)?)])
    }
}

impl Var<'_> {
    /// The same values in another floating-point type; `self` where it is the same.
    ///
    /// # Errors
    /// Those of [`Tape::record`](crate::Tape::record); a type that is not floating-point.
    pub fn to_dtype(self, to: DType) -> Result<Self> {
        let from = self.value().dtype();
        if from == to { Ok(self) } else { self.tape().record(Cast { from, to }, vec![self]) }
    }
}

#[cfg(test)]
mod tests {
    use crate::{DType, Tape, Tensor};

    #[test]
    fn gradients_have_the_type_of_their_value() {
        let tape = Tape::new();
        let x = tape.variable(Tensor::from_vec(vec![1.001f64, -3.0], [1, 2]).unwrap().to_dtype(DType::BF16).unwrap());
        let y = x.clone().to_dtype(DType::F32).unwrap();
        assert_eq!(y.value().to_vec::<f32>().unwrap(), [1.0, -3.0]);
        let dy = Tensor::from_vec(vec![0.1f32, 2.0], [1, 2]).unwrap();
        let dx = tape.backward_from(y, dy.clone()).unwrap().take(&x).unwrap();
        assert_eq!(dx.dtype(), DType::BF16);
        assert_eq!(dx.to_f64_vec().unwrap(), dy.to_dtype(DType::BF16).unwrap().to_f64_vec().unwrap());
    }
}
