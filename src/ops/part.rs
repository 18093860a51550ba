//! Rows that ranks share: a part of a tensor's rows or columns, and parts of all ranks behind one another.
//!
//! y = some entries of the first axis of x, or of the last of a matrix; backward dx is dy there and 0 elsewhere. Gathered, y is every rank's x
//! in their order (codes where codes are kept of it), and dx this rank's part of the sum over ranks of dy: a rank then has the gradient of its own part by all ranks'
//! outputs.

use crate::ops::{Case, coded, normals};
use crate::ranks::Group;
use crate::tape::{Grads, Inputs, Op, Saved, Takes, Var, operands};
use crate::{Device, Error, Result, Tensor};

/// Which axis is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Axis {
    First,
    /// Of a matrix.
    Columns,
}

/// `count` entries from `first` on, of `of`. Keeps nothing.
#[derive(Clone, Copy, Debug)]
struct Part {
    axis: Axis,
    first: usize,
    count: usize,
    of: usize,
}

impl Op for Part {
    fn name(&self) -> &'static str {
        "part"
    }
    fn takes(&self) -> Takes {
        Takes::Anything
    }
    fn check(&self, inputs: &[Tensor]) -> Result<()> {
        let [x] = operands(inputs)?;
        let fits = match (self.axis, x.shape()) {
            (Axis::First, [extent, ..]) | (Axis::Columns, [_, extent]) => *extent == self.of,
            _ => false,
        };
        if !fits || self.first.checked_add(self.count).is_none_or(|end| end > self.of) {
            let axis = if self.axis == Axis::First { "a first axis" } else { "two axes, the last" };
            let expected = format!("{axis} of {}, at least {} + {}", self.of, self.first, self.count);
            return Err(Error::shape("part", expected, x.shape()));
        }
        Ok(())
    }
    fn cpu(&self, inputs: Inputs, _: &mut Saved) -> Result<Tensor> {
        let [x] = inputs.take()?;
        if self.axis == Axis::First {
            let y = x.slice(self.first, self.count)?;
            return if y.device().is_cpu() { Ok(y) } else { y.aligned() };
        }
        let mut y = Tensor::zeros([x.rows(), self.count], x.dtype(), &x.device())?;
        copy_columns((&mut y, 0), (&x, self.first), self.count)?;
        Ok(y)
    }
    fn backward(&self, _: Saved, dy: Tensor, _: &[bool]) -> Result<Grads> {
        let mut shape = dy.shape().to_vec();
        let axis = if self.axis == Axis::First { 0 } else { 1 };
        shape[axis] = self.of;
        let mut dx = Tensor::zeros(shape, dy.dtype(), &dy.device())?;
        match self.axis {
            Axis::First => dx.put(self.first, &dy)?,
            Axis::Columns => copy_columns((&mut dx, self.first), (&dy, 0), self.count)?,
        }
        Ok(vec![Some(dx)])
    }
}

/// Copies columns of a matrix to another one, each from its given column on; `to` is memory that nobody else holds.
fn copy_columns((to, a): (&mut Tensor, usize), (from, b): (&Tensor, usize), count: usize) -> Result<()> {
    let (to_cols, from_cols, size) = (to.cols(), from.cols(), to.dtype().size());
    if let Device::Cuda(device) = to.device() {
        return device.copy_columns((to.view()?, to_cols, a), (from.view()?, from_cols, b), count);
    }
    let from = from.as_bytes()?.chunks_exact((from_cols * size).max(1));
    for (to, from) in to.bytes_mut()?.chunks_exact_mut((to_cols * size).max(1)).zip(from) {
        to[a * size..][..count * size].copy_from_slice(&from[b * size..][..count * size]);
    }
    Ok(())
}

/// The parts of all ranks behind one another.
struct Gather(Group);

impl Op for Gather {
    fn name(&self) -> &'static str {
        "gather"
    }
    fn takes(&self) -> Takes {
        Takes::Anything
    }
    fn cpu(&self, inputs: Inputs, _: &mut Saved) -> Result<Tensor> {
        let [x] = inputs.take()?;
        let what = "rows of all ranks";
        coded::gathered(&x, &self.0, what).unwrap_or_else(|| self.0.all_gather(what, x))
    }
    fn backward(&self, _: Saved, dy: Tensor, _: &[bool]) -> Result<Grads> {
        Ok(vec![Some(self.0.reduce_scatter("gradients of the rows of a rank", dy)?)])
    }
}

impl Var<'_> {
    /// `count` entries of the first axis from `first` on, of any type.
    ///
    /// # Errors
    /// Entries beyond the first axis; those of [`Tape::record`](crate::Tape::record).
    pub fn part(self, first: usize, count: usize) -> Result<Self> {
        let of = self.shape().first().copied().unwrap_or(0);
        self.tape().record(Part { axis: Axis::First, first, count, of }, vec![self])
    }

    /// `count` columns of a matrix from `first` on, of any type.
    ///
    /// # Errors
    /// No matrix, or columns beyond its last; those of [`Tape::record`](crate::Tape::record).
    pub fn part_of_columns(self, first: usize, count: usize) -> Result<Self> {
        let of = self.value().cols();
        self.tape().record(Part { axis: Axis::Columns, first, count, of }, vec![self])
    }

    /// The entries of the first axis that every rank gives, in the ranks' order. All ranks call this in the same order, and play their tapes
    /// back in the same order.
    ///
    /// # Errors
    /// Those of [`Group::all_gather`] and, when the tape is played back, [`Group::reduce_scatter`].
    pub fn gathered(self, ranks: &Group) -> Result<Self> {
        if ranks.world() == 1 {
            return Ok(self);
        }
        self.tape().record(Gather(ranks.clone()), vec![self])
    }
}

/// Worked cases.
pub(crate) fn cases() -> Vec<Case> {
    let case = |name: &str, shape: &[usize], columns: bool, first: usize, count: usize| {
        Case::new("part", name, normals(&[(shape, 91)]), move |mut v| {
            let x = v.remove(0);
            if columns { x.part_of_columns(first, count) } else { x.part(first, count) }
        })
    };
    vec![
        case("one value", &[1], false, 0, 1),
        case("rows between boundaries", &[5, 3], false, 1, 3),
        case("matrices", &[4, 3, 3], false, 2, 2),
        case("columns", &[5, 9], true, 3, 5),
        case("all columns", &[3, 7], true, 0, 7),
        case("the last columns, 512x768", &[512, 768], true, 384, 384).large(),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DType, Tape};

    #[test]
    fn parts_are_those_of_the_matrix_and_what_is_beyond_is_refused() {
        let tape = Tape::new();
        let x =
            |dtype| tape.constant(Tensor::from_vec((0..12).map(f64::from).collect(), [3, 4]).unwrap().to_dtype(dtype).unwrap());
        for dtype in [DType::F64, DType::F32, DType::F16, DType::BF16] {
            let values = |v: Var<'_>| v.value().to_f64_vec().unwrap();
            assert_eq!(values(x(dtype).part(1, 2).unwrap()), [4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0]);
            assert_eq!(values(x(dtype).part_of_columns(1, 2).unwrap()), [1.0, 2.0, 5.0, 6.0, 9.0, 10.0]);
        }
        for odd in [x(DType::F64).part(2, 2), x(DType::F64).part_of_columns(4, 1), x(DType::F64).part(usize::MAX, 2)] {
            assert!(odd.is_err_and(|e| e.to_string().contains("part")));
        }
        let flat = tape.constant(Tensor::from_vec(vec![1.0, 2.0], [2]).unwrap());
        assert!(flat.part_of_columns(0, 1).is_err_and(|e| e.to_string().contains("two axes")));
    }
}
