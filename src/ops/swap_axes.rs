//! Values with their first two axes swapped, `[a, b, d]` → `[b, a, d]`: heads in front, so that each can be multiplied by a matrix of
//! its own. Backward swaps them back.

use rayon::prelude::*;

use crate::device::cuda::{CudaDevice, Queue};
use crate::device::ffi;
use crate::device::launch::{Check, View, Work};
use crate::ops::{At, Case, Place, Run, exact, normals};
use crate::tape::{Grads, Inputs, Op, Saved, Var, operands, run};
use crate::{DType, Element, Error, Result, Tensor};

/// The operation. Keeps nothing.
#[derive(Clone, Copy, Debug)]
struct SwapAxes;

fn shape(x: &Tensor) -> Result<[usize; 3]> {
    <[usize; 3]>::try_from(x.shape()).map_err(|_| Error::shape("swap_axes", "[a, b, d]", x.shape()))
}

fn swapped<T: Element>(x: &Tensor) -> Result<Tensor> {
    let ([a, b, d], x) = (shape(x)?, x.as_slice::<T>()?);
    let mut y = x.to_vec();
    y.par_chunks_mut((a * d).max(1)).enumerate().for_each(|(j, y)| {
        for (i, y) in y.chunks_mut(d.max(1)).enumerate() {
            y.copy_from_slice(&x[(i * b + j) * d..][..d]);
        }
    });
    Tensor::from_vec(y, [b, a, d])
}

impl Op for SwapAxes {
    fn name(&self) -> &'static str {
        "swap_axes"
    }
    fn check(&self, inputs: &[Tensor]) -> Result<()> {
        let [x] = operands(inputs)?;
        shape(x).map(drop)
    }
    fn cpu(&self, inputs: Inputs, _: &mut Saved) -> Result<Tensor> {
        let [x] = inputs.take()?;
        if x.dtype() == DType::F64 { swapped::<f64>(&x) } else { swapped::<f32>(&x) }
    }
    fn gpu(&self, device: &CudaDevice, inputs: Inputs, _: &mut Saved) -> Result<Tensor> {
        let [x] = inputs.take()?;
        let (x, [a, b, d]) = (x.clone().aligned()?, shape(&x)?);
        let y = Tensor::on(device, &[b, a, d], x.dtype())?;
        launch(device.queue(), y.view()?, x.view()?, [a, b, d], x.dtype().size())?;
        Ok(y)
    }
    fn backward(&self, _: Saved, dy: Tensor, _: &[bool]) -> Result<Grads> {
        Ok(vec![Some(run(&Self, vec![dy], &mut Saved::default())?)])
    }
}

/// y `[b, a, d]` of x `[a, b, d]`, values of any type with `size` bytes each; y is not x.
pub(crate) fn launch(queue: Queue<'_>, y: View<'_>, x: View<'_>, [a, b, d]: [usize; 3], size: usize) -> Result<()> {
    let c = Check::new("swap_axes", queue);
    let (n, kind, work) = (c.product(&[a, b, d])?, x.kind(), Work::moving("move", 2 * x.bytes()));
    let (y, x) = (c.operand("y", y, kind, n)?, c.operand("x", x, kind, n)?);
    let (a, b, bytes) = (c.long(a)?, c.long(b)?, c.long(c.product(&[d, size])?)?);
    // SAFETY: x and y have a · b rows of `bytes` bytes each, and whoever made the views sees that y is not x.
    c.launch(work, |s| unsafe { ffi!(sq_swap_axes(y, x, a, b, bytes, s)) })
}

impl Var<'_> {
    /// `[a, b, d]` → `[b, a, d]`.
    ///
    /// # Errors
    /// Those of [`Tape::record`](crate::Tape::record); another number of axes.
    pub fn swap_axes(self) -> Result<Self> {
        self.tape().record(SwapAxes, vec![self])
    }
}

/// y by the definition.
pub fn reference(x: &[f64], [a, b, d]: [usize; 3]) -> Vec<f64> {
    let at = |y: usize| (y / d % a * b + y / d / a) * d + y % d;
    (0..a * b * d).map(|y| x[at(y)]).collect()
}

/// Worked cases.
pub fn cases() -> Vec<Case> {
    let case =
        |name: &str, shape: [usize; 3]| Case::new("swap_axes", name, normals(&[(&shape, 71)]), |mut v| v.remove(0).swap_axes());
    let mut all = vec![
        case("one value", [1, 1, 1]),
        case("odd", [3, 5, 7]),
        case("one axis of 1", [4, 1, 6]),
        case("whole packs", [5, 3, 16]),
        case("513x12x64", [513, 12, 64]).large(),
    ];
    all.extend(Case::table(timed, SIZES));
    all
}

const SIZES: &[At] = &[(Place::Cpu, 4096, 4096, &[DType::F32]), (Place::Gpu, 4096, 4096, &[DType::F32])];
/// Values of a head of the timed cases.
const DIM: usize = 128;

fn timed(n: usize, rows: usize) -> Case {
    let what = ("swap_axes", "swap-axes", "Rows of n / 128 heads, heads first");
    let graph = Run::graph(move |mut v| v.remove(0).reshape([rows, n / DIM, DIM])?.swap_axes()?.reshape([rows, n]));
    Case::timed(what, (n, rows), vec![vec![rows, n]], graph, move |x, y| {
        let heads = n / DIM;
        // Head h of row r is row h · rows + r of heads.
        for (r, h) in exact::some(rows).into_iter().flat_map(|r| [(r, 0), (r, heads - 1)]) {
            let want = &exact::row(&x[0], r, n)?[h * DIM..][..DIM];
            exact::close("swap_axes", &exact::row(&y[0], h * rows + r, DIM)?, want, y[0].dtype(), 1.0)?;
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Tape;
    use crate::ops::randn;

    #[test]
    fn it_is_its_definition_and_its_own_inverse() {
        let x = randn([3, 4, 5], 1);
        let tape = Tape::new();
        let y = tape.constant(x.clone()).swap_axes().unwrap();
        assert_eq!(y.shape(), [4, 3, 5]);
        assert_eq!(y.value().to_f64_vec().unwrap(), reference(x.as_slice().unwrap(), [3, 4, 5]));
        assert_eq!(y.swap_axes().unwrap().value().to_f64_vec().unwrap(), x.to_f64_vec().unwrap());
        assert!(tape.constant(randn([3, 4], 1)).swap_axes().err().unwrap().to_string().contains("[a, b, d]"));
    }
}
