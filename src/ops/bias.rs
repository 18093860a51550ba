//! A row added to every row: `y[i, j] = x[i, j] + b[j]`, the bias of a linear layer. Backward: `dx = dy`, `db[j] = Σ_i dy[i, j]`.

use rayon::prelude::*;

use crate::device::cuda::{CudaDevice, Queue};
use crate::device::launch::{Check, View, Work};
use crate::device::{cpu, ffi};
use crate::ops::{At, Case, Place, Run, exact, normals};
use crate::tape::{Grads, Inputs, Op, Saved, Var, operands};
use crate::{DType, Error, Result, Tensor};

/// The operation: x `[.., n]` and b `[n]`, of one type. It keeps nothing, and overwrites x where that is unshared.
pub(crate) struct AddBias;

impl Op for AddBias {
    fn name(&self) -> &'static str {
        "add_bias"
    }
    fn check(&self, inputs: &[Tensor]) -> Result<()> {
        let [x, b] = operands(inputs)?;
        if b.shape() != [x.cols()] {
            return Err(Error::shape("add_bias: bias", format!("[{}]", x.cols()), b.shape()));
        }
        if b.dtype() != x.dtype() {
            return Err(Error::dtype("add_bias: bias", x.dtype(), b.dtype()));
        }
        Ok(())
    }
    fn cpu(&self, inputs: Inputs, _: &mut Saved) -> Result<Tensor> {
        let [x, b] = inputs.take()?;
        let shape = x.shape().to_vec();
        if x.dtype() == DType::F64 {
            return Tensor::from_vec(reference(x.as_slice()?, b.as_slice()?), shape);
        }
        let mut y = x.into_owned::<f32>()?;
        fast(&mut y, b.as_slice()?);
        Tensor::from_vec(y, shape)
    }
    /// In place of x when unshared.
    fn gpu(&self, device: &CudaDevice, inputs: Inputs, _: &mut Saved) -> Result<Tensor> {
        let [x, b] = inputs.take()?;
        let (mut x, b) = (x.aligned()?, b.aligned()?);
        let y = x.or_new(device)?;
        launch(device.queue(), y.view()?, x.view()?, b.view()?)?;
        Ok(y)
    }
    fn backward(&self, _: Saved, dy: Tensor, want: &[bool]) -> Result<Grads> {
        let n = dy.cols();
        let db = match want[1] {
            false => None,
            true if dy.dtype() == DType::F64 => Some(Tensor::from_vec(reference_backward(dy.as_slice()?, n), [n])?),
            true => Some(Tensor::from_vec(fast_backward(dy.as_slice()?, n), [n])?),
        };
        Ok(vec![want[0].then_some(dy), db])
    }
    fn gpu_backward(&self, device: &CudaDevice, _: Saved, dy: Tensor, want: &[bool]) -> Result<Grads> {
        let db = if want[1] { Some(sums_of_rows(device, &dy.clone().aligned()?)?) } else { None };
        Ok(vec![want[0].then_some(dy), db])
    }
}

/// `y = x + b` for every row of x, of as many values as b; y may be x.
pub(crate) fn launch(queue: Queue<'_>, y: View<'_>, x: View<'_>, b: View<'_>) -> Result<()> {
    let c = Check::new("add_bias", queue);
    let (n, cols, kind, work) = (x.len(), b.len(), x.kind(), Work::moving("bias", 2 * x.bytes()));
    let (rows, dtype) = (c.long(c.rows(n, cols)?)?, c.code(kind)?);
    let (y, x, b) = (c.operand("y", y, kind, n)?, c.operand("x", x, kind, n)?, c.operand("b", b, kind, cols)?);
    let cols = c.long(cols)?;
    // SAFETY: x and y are rows · cols values of one kind and may be the same, b is cols values.
    c.launch(work, |s| unsafe { ffi!(sq_add_bias(y, x, b, rows, cols, dtype, s)) })
}

/// `db = Σ dy` over the rows of dy, of as many values as db.
pub(crate) fn launch_sums(queue: Queue<'_>, db: View<'_>, dy: View<'_>) -> Result<()> {
    let c = Check::new("add_bias backward", queue);
    let (n, cols, kind, work) = (dy.len(), db.len(), dy.kind(), Work::moving("bias", dy.bytes()));
    let (rows, dtype) = (c.long(c.rows(n, cols)?)?, c.code(kind)?);
    let (db, dy) = (c.operand("db", db, kind, cols)?, c.operand("dy", dy, kind, n)?);
    let cols = c.long(cols)?;
    // SAFETY: dy is rows · cols values of one kind, db is cols values.
    c.launch(work, |s| unsafe { ffi!(sq_column_sums(db, dy, rows, cols, dtype, s)) })
}

/// The sum of the rows of x, on a GPU. Few columns keep few blocks busy: many rows of these in `f32` are summed as fewer and longer ones first.
pub(super) fn sums_of_rows(device: &CudaDevice, x: &Tensor) -> Result<Tensor> {
    let (rows, cols, mut folded) = (x.rows(), x.cols(), 1);
    while x.dtype() == DType::F32 && rows.is_multiple_of(2 * folded) && rows / (2 * folded) >= 64 && 2 * folded * cols <= 8192 {
        folded *= 2;
    }
    let summed = |x: &Tensor, cols: usize| {
        let sums = Tensor::on(device, &[cols], x.dtype())?;
        launch_sums(device.queue(), sums.view()?, x.view()?)?;
        Ok::<_, Error>(sums)
    };
    if folded == 1 { summed(x, cols) } else { summed(&summed(x, folded * cols)?, cols) }
}

impl Var<'_> {
    /// `self + b` with self [.., n] and b `[n]`.
    ///
    /// # Errors
    /// Another length or another type of b.
    pub fn add_bias(self, bias: Self) -> Result<Self> {
        self.tape().record(AddBias, vec![self, bias])
    }
}

/// y by the formula above.
pub fn reference(x: &[f64], b: &[f64]) -> Vec<f64> {
    x.iter().enumerate().map(|(i, x)| x + b[i % b.len()]).collect()
}

/// db by the formula above.
pub fn reference_backward(dy: &[f64], n: usize) -> Vec<f64> {
    (0..n).map(|j| dy.iter().skip(j).step_by(n).sum()).collect()
}

fn fast(x: &mut [f32], b: &[f32]) {
    let n = b.len().max(1);
    x.par_chunks_mut(n * cpu::rows_per_task(n)).for_each(|rows| {
        cpu::simd(
            #[inline(always)]
            || rows.chunks_mut(n).for_each(|row| row.iter_mut().zip(b).for_each(|(x, b)| *x += b)),
        );
    });
}

/// Sums of blocks of rows, added up in order: the same for every number of threads.
fn fast_backward(dy: &[f32], n: usize) -> Vec<f32> {
    let add = |sum: &mut Vec<f32>, row: &[f32]| sum.iter_mut().zip(row).for_each(|(s, x)| *s += x);
    let block = |rows: &[f32]| {
        let mut sum = vec![0.0; n];
        rows.chunks(n.max(1)).for_each(|row| add(&mut sum, row));
        sum
    };
    let blocks: Vec<_> = dy.par_chunks(n.max(1) * cpu::rows_per_task(n)).map(block).collect();
    let mut sum = vec![0.0; n];
    blocks.iter().for_each(|block| add(&mut sum, block));
    sum
}

/// Worked cases.
pub(crate) fn cases() -> Vec<Case> {
    let case = |name: &str, shape: &[usize]| {
        let n = shape[shape.len() - 1];
        Case::new("add_bias", name, normals(&[(shape, 41), (&[n], 42)]), |v| {
            let [x, b]: [Var; 2] = v.try_into().map_err(|_| Error::Tape("two operands".into()))?;
            x.add_bias(b)
        })
    };
    let mut all = vec![
        case("one value", &[1, 1]),
        case("one row", &[1, 24]),
        case("odd", &[3, 7, 5]),
        case("many rows", &[257, 3]),
        case("2048x4096", &[2048, 4096]).large(),
    ];
    all.extend(Case::table(timed, SIZES));
    all
}

const SIZES: &[At] = &[(Place::Cpu, 4096, 4096, &[DType::F32]), (Place::Gpu, 4096, 16384, &[DType::BF16, DType::F32])];

fn timed(n: usize, rows: usize) -> Case {
    let graph = Run::graph(|v| {
        let [x, b]: [Var; 2] = v.try_into().map_err(|_| Error::Tape("two operands".into()))?;
        x.add_bias(b)
    });
    let what = ("add_bias", "add-bias", "A row of n added to every row");
    Case::timed(what, (n, rows), vec![vec![rows, n], vec![n]], graph, move |x, y| {
        let bias = x[1].to_f64_vec()?;
        exact::rows(n, &x[..1], &y[0], |_, got, x| exact::close("add_bias", got, &reference(&x[0], &bias), y[0].dtype(), 1.0))
    })
}
