//! `y = α a + β b` of `f32` values, rounded once to bf16: a sum on its way into 16-bit memory, without a pass for the cast. Backward:
//! `da = α dy`, `db = β dy`, in the type of the operands. In `f64` nothing is rounded.

use half::bf16;

use crate::device::cuda::{CudaDevice, Queue};
use crate::device::ffi;
use crate::device::launch::{Check, Kind, View, Work};
use crate::ops::{At, Case, Place, Run, exact, randn};
use crate::tape::{Grads, Inputs, Op, Saved, Var, operands};
use crate::{DType, Error, Result, Tensor};

/// The operation on two tensors of one shape; keeps nothing.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AxpbyBf16 {
    /// Factor of the first operand.
    pub alpha: f64,
    /// Factor of the second operand.
    pub beta: f64,
    /// Type of both operands, and of their gradients.
    pub from: DType,
}

impl Op for AxpbyBf16 {
    fn name(&self) -> &'static str {
        "axpby_bf16"
    }
    fn check(&self, inputs: &[Tensor]) -> Result<()> {
        let [a, b] = operands(inputs)?;
        if a.shape() != b.shape() {
            return Err(Error::shape(self.name(), format!("{:?}", a.shape()), b.shape()));
        }
        match inputs.iter().find(|x| x.dtype() != self.from) {
            Some(odd) => Err(Error::dtype(self.name(), self.from, odd.dtype())),
            None => Ok(()),
        }
    }
    fn cpu(&self, inputs: Inputs, _: &mut Saved) -> Result<Tensor> {
        let [a, b] = inputs.take()?;
        if a.dtype() == DType::F64 {
            return Tensor::from_vec(reference(self.alpha, a.as_slice()?, self.beta, b.as_slice()?), a.shape());
        }
        Tensor::axpby(self.alpha, a, self.beta, b)?.to_dtype(DType::BF16)
    }
    fn gpu(&self, device: &CudaDevice, inputs: Inputs, _: &mut Saved) -> Result<Tensor> {
        let [a, b] = inputs.take()?;
        if self.from == DType::F64 {
            return Err(Error::dtype("axpby_bf16 on a GPU", "f32, f16 or bf16", self.from));
        }
        let (a, b) = (a.to_dtype(DType::F32)?.aligned()?, b.to_dtype(DType::F32)?.aligned()?);
        let y = Tensor::on(device, a.shape(), DType::BF16)?;
        launch(device.queue(), y.view()?, (self.alpha as f32, a.view()?), (self.beta as f32, b.view()?))?;
        Ok(y)
    }
    fn backward(&self, _: Saved, dy: Tensor, want: &[bool]) -> Result<Grads> {
        let wide = if self.from == DType::F64 { DType::F64 } else { DType::F32 };
        let gradient = |factor: f64| dy.to_dtype(wide)?.scale(factor)?.to_dtype(self.from);
        let factors = [self.alpha, self.beta];
        factors.into_iter().zip(want).map(|(f, &want)| want.then(|| gradient(f)).transpose()).collect()
    }
    fn rounds_to(&self, _: DType) -> DType {
        DType::BF16
    }
}

/// `y` (bf16) `= alpha a + beta b` (`f32`).
pub(crate) fn launch(queue: Queue<'_>, y: View<'_>, (alpha, a): (f32, View<'_>), (beta, b): (f32, View<'_>)) -> Result<()> {
    let c = Check::new("axpby_bf16", queue);
    let (n, work) = (a.len(), Work::moving("add", a.bytes() + b.bytes() + y.bytes()));
    let (y, a, b) = (c.operand("y", y, Kind::BF16, n)?, c.operand("a", a, Kind::F32, n)?, c.operand("b", b, Kind::F32, n)?);
    let count = c.long(n)?;
    // SAFETY: all are n values; y is apart from a and b, whose values are wider.
    c.launch(work, |s| unsafe { ffi!(sq_axpby_bf16(y, alpha, a, beta, b, count, s)) })
}

impl<'t> Var<'t> {
    /// `alpha self + beta other` of one shape and type, rounded to bf16 (in `f64` not rounded).
    ///
    /// # Errors
    /// Another shape or type of `other`.
    pub fn axpby_bf16(self, alpha: f64, beta: f64, other: Var<'t>) -> Result<Self> {
        let from = self.value().dtype();
        self.tape().record(AxpbyBf16 { alpha, beta, from }, vec![self, other])
    }
}

/// y by the definition, not rounded.
pub fn reference(alpha: f64, a: &[f64], beta: f64, b: &[f64]) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| alpha * a + beta * b).collect()
}

/// Worked cases, of values whose results bf16 holds exactly, so that every precision has the same.
pub(crate) fn cases() -> Vec<Case> {
    let case = |name: &str, shape: &[usize]| {
        let shape = shape.to_vec();
        let whole = move |seed: u64| {
            let mut x = randn(shape.clone(), seed).into_vec::<f64>().expect("f64");
            x.iter_mut().for_each(|x| *x = bf16::from_f64(x.round()).to_f64().clamp(-8.0, 8.0));
            Tensor::from_vec(x, shape.clone()).expect("the same size")
        };
        Case::new(
            "axpby_bf16",
            name,
            move || vec![whole(91), whole(92)],
            |v| {
                let [a, b]: [Var; 2] = v.try_into().map_err(|_| Error::Tape("two operands".into()))?;
                a.axpby_bf16(2.0, -0.5, b)
            },
        )
    };
    let mut all = vec![case("one value", &[1]), case("odd", &[3, 7, 5]), case("1024x1376", &[1024, 1376]).large()];
    all.extend(Case::table(timed, SIZES));
    all
}

const SIZES: &[At] = &[(Place::Cpu, 4096, 4096, &[DType::F32]), (Place::Gpu, 4096, 16384, &[DType::F32])];

fn timed(n: usize, rows: usize) -> Case {
    let graph = Run::graph(|v| {
        let [a, b]: [Var; 2] = v.try_into().map_err(|_| Error::Tape("two operands".into()))?;
        a.axpby_bf16(2.0, -0.5, b)
    });
    let what = ("axpby_bf16", "axpby-bf16", "Sum of two tensors of rows of n with factors, rounded to bf16");
    Case::timed(what, (n, rows), vec![vec![rows, n]; 2], graph, move |x, y| {
        exact::rows(n, x, &y[0], |_, got, x| {
            exact::close("axpby_bf16", got, &reference(2.0, &x[0], -0.5, &x[1]), y[0].dtype(), 1.0)
        })
    })
    // Of f32; the result has half the bytes.
    .moves(2.5 * n as f64 * rows as f64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Tape;

    #[test]
    fn the_sum_is_rounded_once() {
        let [a, b] = [randn([37], 1), randn([37], 2)].map(|t| t.to_dtype(DType::F32).unwrap());
        let tape = Tape::new();
        let y = tape.constant(a.clone()).axpby_bf16(0.3, -1.7, tape.constant(b.clone())).unwrap();
        assert_eq!(y.value().dtype(), DType::BF16);
        let want = Tensor::axpby(0.3, a.clone(), -1.7, b).unwrap().to_dtype(DType::BF16).unwrap();
        assert_eq!(y.value().to_f64_vec().unwrap(), want.to_f64_vec().unwrap());
        let short = tape.constant(a.slice(0, 5).unwrap());
        assert!(tape.constant(a).axpby_bf16(1.0, 1.0, short).is_err());
    }
}
