//! `y = a + b` and `y = c x`.

use crate::ops::{At, Case, Place, Run, exact, normals};
use crate::tape::{Grads, Inputs, Op, Saved, Takes, Var};
use crate::{DType, Error, Result, Tensor};

/// Elementwise sum of two tensors of one shape; `dA = dB = dY`.
pub(crate) struct Add;

impl Op for Add {
    fn name(&self) -> &'static str {
        "add"
    }
    fn takes(&self) -> Takes {
        Takes::Anything
    }
    fn cpu(&self, inputs: Inputs, _: &mut Saved) -> Result<Tensor> {
        let [a, b] = inputs.take()?;
        Tensor::axpby(1.0, a, 1.0, b)
    }
    fn backward(&self, _: Saved, dy: Tensor, want: &[bool]) -> Result<Grads> {
        Ok(want.iter().map(|&w| w.then(|| dy.clone())).collect())
    }
}

/// `c x` for a constant c.
pub(crate) struct Scale(pub f64);

impl Op for Scale {
    fn name(&self) -> &'static str {
        "scale"
    }
    fn takes(&self) -> Takes {
        Takes::Anything
    }
    fn cpu(&self, inputs: Inputs, _: &mut Saved) -> Result<Tensor> {
        let [x] = inputs.take()?;
        x.scale(self.0)
    }
    fn backward(&self, _: Saved, dy: Tensor, _: &[bool]) -> Result<Grads> {
        Ok(vec![Some(dy.scale(self.0)?)])
    }
}

impl<'t> Var<'t> {
    /// `self + other`, of one shape.
    ///
    /// # Errors
    /// Those of [`Tape::record`](crate::Tape::record); operands of different shapes, types or devices.
    #[allow(clippy::should_implement_trait)] // fallible
    pub fn add(self, other: Self) -> Result<Self> {
        self.tape().record(Add, vec![self, other])
    }
    /// `factor · self`.
    ///
    /// # Errors
    /// Those of [`Tape::record`](crate::Tape::record).
    pub fn scale(self, factor: f64) -> Result<Self> {
        self.tape().record(Scale(factor), vec![self])
    }
}

/// Worked cases.
pub(crate) fn cases() -> Vec<Case> {
    let case = |name: &str, shape: &[usize]| {
        Case::new("add", name, normals(&[(shape, 1), (shape, 2)]), |v| {
            let [a, b]: [Var; 2] = v.try_into().map_err(|_| Error::Tape("two operands".into()))?;
            a.add(b)?.scale(0.7)
        })
    };
    let mut all = vec![case("one value", &[1]), case("odd", &[3, 7, 5]), case("large", &[512, 1024]).large()];
    all.extend(Case::table(timed, SIZES));
    all
}

const SIZES: &[At] = &[(Place::Cpu, 4096, 4096, &[DType::F32]), (Place::Gpu, 4096, 16384, &[DType::BF16, DType::F32])];

fn timed(n: usize, rows: usize) -> Case {
    let graph = Run::graph(|v| {
        let [a, b]: [Var; 2] = v.try_into().map_err(|_| Error::Tape("two operands".into()))?;
        a.add(b)
    });
    Case::timed(("add", "add", "Sum of two tensors of rows of n"), (n, rows), vec![vec![rows, n]; 2], graph, move |x, y| {
        exact::every(&["add"], n, x, y, |x| vec![x[0].iter().zip(&x[1]).map(|(a, b)| a + b).collect()])
    })
}
