//! Rows or columns times exponentials of learned logarithms: `y[i, j] = x[i, j] exp(±a[j])` by columns, `x[i, j] exp(±a[i])` by rows. A
//! scale that is an exponential is never 0 and needs no bounds. Backward: `dx = dy exp(±a)`, `da = ± Σ y dy` over what shares an entry.
//! So it is y that is kept, unless told otherwise (`Keeps`): what comes next often keeps it too.

use rayon::prelude::*;

use crate::device::cuda::{CudaDevice, Queue};
use crate::device::launch::{Check, Kind, View, Work};
use crate::device::{cpu, ffi};
use crate::ops::{At, Case, Place, Run, bias, exact, normals};
use crate::tape::{Grads, Inputs, Op, Saved, Var, operands};
use crate::{DType, Error, Result, Tensor};

/// What an entry of the logarithms belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Along {
    /// A row of x.
    Rows,
    /// A column of x.
    Columns,
}

/// The operation: x `[.., cols]` as a matrix, and a, one entry a row or a column.
#[derive(Clone, Copy, Debug)]
pub struct LogScale {
    /// What is scaled by one entry.
    pub along: Along,
    /// Divides: the sign of the exponent is −.
    pub inverse: bool,
}

impl LogScale {
    fn entries(self, x: &Tensor) -> usize {
        match self.along {
            Along::Rows => x.rows(),
            Along::Columns => x.cols(),
        }
    }

    fn sign(self) -> f64 {
        if self.inverse { -1.0 } else { 1.0 }
    }

    /// `exp(±a)`.
    fn factors<T: cpu::Real>(self, a: &Tensor) -> Result<Vec<T>> {
        Ok(a.to_f64_vec()?.into_iter().map(|a| T::from_f64((self.sign() * a).exp())).collect())
    }

    /// `x exp(±a)`, in the memory of x.
    fn times<T: cpu::Real>(self, x: &mut [T], cols: usize, factors: &[T]) {
        let cols = cols.max(1);
        x.par_chunks_mut(cols).enumerate().with_min_len(cpu::rows_per_task(cols)).for_each(|(i, row)| match self.along {
            Along::Rows => row.iter_mut().for_each(|x| *x = *x * factors[i]),
            Along::Columns => row.iter_mut().zip(factors).for_each(|(x, &f)| *x = *x * f),
        });
    }

    /// `± Σ y dy`, summed in double and in a fixed order.
    fn sums<T: cpu::Real>(self, y: &[T], dy: &[T], cols: usize) -> Vec<T> {
        let (cols, sign) = (cols.max(1), self.sign());
        let rows = y.par_chunks(cols).zip(dy.par_chunks(cols));
        let sums: Vec<f64> = match self.along {
            Along::Rows => rows.map(|(y, dy)| y.iter().zip(dy).map(|(y, dy)| y.to_f64() * dy.to_f64()).sum()).collect(),
            Along::Columns => {
                let block = cols * cpu::rows_per_task(cols);
                let part = |(y, dy): (&[T], &[T])| {
                    let mut sum = vec![0f64; cols];
                    for (y, dy) in y.chunks(cols).zip(dy.chunks(cols)) {
                        sum.iter_mut().zip(y.iter().zip(dy)).for_each(|(s, (y, dy))| *s += y.to_f64() * dy.to_f64());
                    }
                    sum
                };
                let parts: Vec<Vec<f64>> = y.par_chunks(block).zip(dy.par_chunks(block)).map(part).collect();
                let mut sum = vec![0f64; cols];
                parts.iter().for_each(|p| sum.iter_mut().zip(p).for_each(|(s, p)| *s += p));
                sum
            }
        };
        sums.into_iter().map(|s| T::from_f64(sign * s)).collect()
    }

    fn forward<T: cpu::Real>(self, x: Tensor, a: &Tensor) -> Result<Tensor> {
        let (shape, cols) = (x.shape().to_vec(), x.cols());
        let mut y = x.into_owned::<T>()?;
        self.times(&mut y, cols, &self.factors(a)?);
        Tensor::from_vec(y, shape)
    }

    /// `x exp(±a)` on the CPU, in `f64` or `f32`.
    pub(super) fn on_cpu(self, x: Tensor, a: &Tensor) -> Result<Tensor> {
        if x.dtype() == DType::F64 { self.forward::<f64>(x, a) } else { self.forward::<f32>(x, a) }
    }

    /// da on the CPU, from what came out.
    pub(super) fn sums_on_cpu(self, y: &Tensor, dy: &Tensor, a: &Tensor) -> Result<Tensor> {
        if dy.dtype() == DType::F64 {
            Tensor::from_vec(self.sums::<f64>(y.as_slice()?, dy.as_slice()?, dy.cols()), a.shape())
        } else {
            Tensor::from_vec(self.sums::<f32>(y.as_slice()?, dy.as_slice()?, dy.cols()), a.shape())
        }
    }
}

/// Refuses logarithms of another number or type than what scales x has.
pub(super) fn check_logarithms(what: &str, x: &Tensor, a: &Tensor, entries: usize) -> Result<()> {
    if a.shape() != [entries] {
        return Err(Error::shape(what, format!("[{entries}]"), a.shape()));
    }
    let wide = if x.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
    if a.dtype() != wide {
        return Err(Error::dtype(what, wide, a.dtype()));
    }
    Ok(())
}

/// What is kept for the gradient of the logarithms.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Keeps {
    /// x, which costs nothing where others keep it too.
    Input,
    /// y, likewise.
    Output,
    /// y rounded to this type, where nobody else keeps it.
    Rounded(DType),
}

/// The operation on a tape: keeps a, and x or y where the gradient of a is wanted.
struct Recorded {
    op: LogScale,
    keeps: Keeps,
}

impl Op for Recorded {
    fn name(&self) -> &'static str {
        "log_scale"
    }
    fn check(&self, inputs: &[Tensor]) -> Result<()> {
        let [x, a] = operands(inputs)?;
        check_logarithms("log_scale: logarithms", x, a, self.op.entries(x))
    }
    fn cpu(&self, inputs: Inputs, save: &mut Saved) -> Result<Tensor> {
        let [x, a] = inputs.take()?;
        let input = self.input(&x);
        let y = self.op.on_cpu(x, &a)?;
        self.keep(save, a, input, &y)?;
        Ok(y)
    }
    fn gpu(&self, device: &CudaDevice, inputs: Inputs, save: &mut Saved) -> Result<Tensor> {
        let [x, a] = inputs.take()?;
        let (mut x, a) = (x.aligned()?, a.aligned()?);
        let input = self.input(&x);
        let y = x.or_new(device)?;
        launch(device.queue(), self.op, y.view()?, x.view()?, a.view()?, x.cols())?;
        self.keep(save, a, input, &y)?;
        Ok(y)
    }
    fn backward(&self, saved: Saved, dy: Tensor, want: &[bool]) -> Result<Grads> {
        let (a, kept) = kept(saved, want)?;
        let kept = kept.map(|t| t.to_dtype(dy.dtype())).transpose()?;
        let kept = kept.as_ref();
        if dy.dtype() == DType::F64 {
            self.gradients::<f64>(kept, &a, dy, want)
        } else {
            self.gradients::<f32>(kept, &a, dy, want)
        }
    }
    fn gpu_backward(&self, device: &CudaDevice, saved: Saved, dy: Tensor, want: &[bool]) -> Result<Grads> {
        let (a, kept) = kept(saved, want)?;
        let (a, mut dy) = (a.aligned()?, dy.aligned()?);
        let input = self.keeps == Keeps::Input;
        // A narrower type is read as it is.
        let readable = |kept: Tensor| if dy.dtype() == DType::F32 { Ok(kept) } else { kept.to_dtype(dy.dtype()) };
        let kept = kept.map(|kept| readable(kept)?.aligned()).transpose()?;
        Ok(match (want[0], kept) {
            (true, Some(kept)) => {
                let (dx, rows) = (dy.or_new(device)?, dy.rows());
                let by_rows = self.op.along == Along::Rows;
                let sums = Tensor::on(device, &if by_rows { vec![rows] } else { vec![groups_of(rows), dy.cols()] }, DType::F32)?;
                let operands = [dy.view()?, kept.view()?, a.view()?];
                launch_backward(device.queue(), self.op, [dx.view()?, sums.view()?], operands, input, dy.cols())?;
                let da = if by_rows { sums } else { bias::sums_of_rows(device, &sums)? };
                vec![Some(dx), Some(da)]
            }
            (true, None) => {
                let dx = dy.or_new(device)?;
                launch(device.queue(), self.op, dx.view()?, dy.view()?, a.view()?, dy.cols())?;
                vec![Some(dx), None]
            }
            (false, Some(kept)) => {
                let (da, kept) = (Tensor::on(device, a.shape(), DType::F32)?, kept.to_dtype(dy.dtype())?.aligned()?);
                let factors = if input { Some(a.view()?) } else { None };
                launch_sums(device.queue(), self.op, da.view()?, (dy.view()?, kept.view()?), factors, dy.cols())?;
                vec![None, Some(da)]
            }
            (false, None) => vec![None, None],
        })
    }
}

/// Parts that the sums over so many rows are made of: enough to fill a card, few beside the rows. The same on every card.
pub(super) fn groups_of(rows: usize) -> usize {
    rows.div_ceil(64).clamp(1, 64)
}

impl Recorded {
    /// x, where it is to be kept.
    fn input(&self, x: &Tensor) -> Option<Tensor> {
        (self.keeps == Keeps::Input).then(|| x.clone())
    }

    /// Keeps the logarithms, and x or y where their gradient is wanted.
    fn keep(&self, save: &mut Saved, a: Tensor, input: Option<Tensor>, y: &Tensor) -> Result<()> {
        if save.wants_any() {
            save.push(a);
        }
        if save.wants(1) {
            save.push(match (input, self.keeps) {
                (Some(x), _) => x,
                (None, Keeps::Rounded(dtype)) => y.to_dtype(dtype)?,
                (None, _) => y.clone(),
            });
        }
        Ok(())
    }

    fn gradients<T: cpu::Real>(&self, kept: Option<&Tensor>, a: &Tensor, dy: Tensor, want: &[bool]) -> Result<Grads> {
        let (op, shape, cols) = (self.op, dy.shape().to_vec(), dy.cols());
        let da = match kept {
            Some(kept) => {
                let mut sums = op.sums::<T>(kept.as_slice()?, dy.as_slice()?, cols);
                if self.keeps == Keeps::Input {
                    sums.iter_mut().zip(op.factors::<T>(a)?).for_each(|(sum, factor)| *sum = *sum * factor);
                }
                Some(Tensor::from_vec(sums, a.shape())?)
            }
            None => None,
        };
        let dx = match want[0] {
            true => {
                let mut dx = dy.into_owned::<T>()?;
                op.times(&mut dx, cols, &op.factors(a)?);
                Some(Tensor::from_vec(dx, shape)?)
            }
            false => None,
        };
        Ok(vec![dx, da])
    }
}

/// Back from [`Recorded::keep`].
fn kept(saved: Saved, want: &[bool]) -> Result<(Tensor, Option<Tensor>)> {
    if want[1] {
        let [a, y] = saved.take()?;
        return Ok((a, Some(y)));
    }
    let [a] = saved.take()?;
    Ok((a, None))
}

/// `y = x exp(±a)` for rows of `cols` values, a in `f32`, or `f64` where x is; y may be x.
pub(crate) fn launch(queue: Queue<'_>, op: LogScale, y: View<'_>, x: View<'_>, a: View<'_>, cols: usize) -> Result<()> {
    let c = Check::new("log_scale", queue);
    let (n, kind, work) = (x.len(), x.kind(), Work::moving("scale", 2 * x.bytes()));
    let rows = c.rows(n, cols)?;
    let entries = if op.along == Along::Rows { rows } else { cols };
    let of_a = if kind == Kind::F64 { kind } else { Kind::F32 };
    let (y, x, a) = (c.operand("y", y, kind, n)?, c.operand("x", x, kind, n)?, c.operand("a", a, of_a, entries)?);
    let (rows, cols, by_rows) = (c.long(rows)?, c.long(cols)?, i32::from(op.along == Along::Rows));
    if kind == Kind::F64 {
        // SAFETY: x and y have rows · cols values of f64 and may be the same; a has one f64 a row or a column.
        return c.launch(work, |s| unsafe { ffi!(sq_log_scale_f64(y, x, a, rows, cols, by_rows, op.sign(), s)) });
    }
    let (dtype, sign) = (c.code(kind)?, op.sign() as f32);
    // SAFETY: x and y have rows · cols values of one kind and may be the same; a has one f32 a row or a column.
    c.launch(work, |s| unsafe { ffi!(sq_log_scale(y, x, a, rows, cols, by_rows, sign, dtype, s)) })
}

/// `da = ± exp(±a) Σ x dy` for rows of `cols` values, a and da in `f32`; without a, x is what came out, and `da = ± Σ x dy`.
pub(crate) fn launch_sums(
    queue: Queue<'_>,
    op: LogScale,
    da: View<'_>,
    (dy, x): (View<'_>, View<'_>),
    a: Option<View<'_>>,
    cols: usize,
) -> Result<()> {
    let c = Check::new("log_scale backward", queue);
    let (n, kind, work) = (x.len(), x.kind(), Work::moving("scale", 2 * x.bytes()));
    let rows = c.rows(n, cols)?;
    let entries = if op.along == Along::Rows { rows } else { cols };
    let (dy, x) = (c.operand("dy", dy, kind, n)?, c.operand("x", x, kind, n)?);
    let (a, da) = (c.optional("a", a, Kind::F32, entries)?, c.operand("da", da, Kind::F32, entries)?);
    let (rows, cols, dtype) = (c.long(rows)?, c.long(cols)?, c.code(kind)?);
    let (by_rows, sign) = (i32::from(op.along == Along::Rows), op.sign() as f32);
    // SAFETY: x and dy have rows · cols values of one kind; a (or none) and da have one f32 a row or a column.
    c.launch(work, |s| unsafe { ffi!(sq_log_scale_sums(da, dy, x, a, rows, cols, by_rows, sign, dtype, s)) })
}

/// dx and the sums that da is made of ([`groups_of`] rows of them by columns, da itself by rows) in one pass, from [dy, what was kept, a];
/// kept is x (`input`) or y, in the type of dy, or a narrower one where that is `f32`. dx may be dy.
fn launch_backward(
    queue: Queue<'_>,
    op: LogScale,
    [dx, sums]: [View<'_>; 2],
    [dy, kept, a]: [View<'_>; 3],
    input: bool,
    cols: usize,
) -> Result<()> {
    let c = Check::new("log_scale backward", queue);
    let (n, kind, of_kept, work) = (dy.len(), dy.kind(), kept.kind(), Work::moving("scale", 2 * dy.bytes() + kept.bytes()));
    let (rows, by_rows) = (c.rows(n, cols)?, op.along == Along::Rows);
    let (entries, groups) = if by_rows { (rows, 1) } else { (cols, c.rows(sums.len(), cols)?) };
    let (dx, dy, kept) = (c.operand("dx", dx, kind, n)?, c.operand("dy", dy, kind, n)?, c.operand("kept", kept, of_kept, n)?);
    let sums = c.operand("sums", sums, Kind::F32, c.product(&[groups, entries])?)?;
    let a = c.operand("a", a, Kind::F32, entries)?;
    let (rows, cols, groups) = (c.long(rows)?, c.long(cols)?, c.long(groups)?);
    let (dtype, kept_dtype, sign) = (c.code(kind)?, c.code(of_kept)?, op.sign() as f32);
    let (input, by_rows) = (i32::from(input), i32::from(by_rows));
    // SAFETY: dx and dy have rows · cols values of one kind, kept of another; a has one f32 a row or a column, sums groups of these.
    c.launch(work, |s| unsafe {
        ffi!(sq_log_scale_backward(dx, sums, dy, kept, a, input, rows, cols, groups, by_rows, sign, dtype, kept_dtype, s))
    })
}

impl Var<'_> {
    /// `self exp(a)` row by row or column by column of self [.., cols], or `self exp(−a)` where `inverse`. a is `f64` for `f64` values,
    /// else `f32`.
    ///
    /// # Errors
    /// Those of [`Tape::record`](crate::Tape::record); another number of logarithms, or another type.
    pub fn log_scale(self, a: Self, along: Along, inverse: bool) -> Result<Self> {
        self.log_scale_keeping(a, along, inverse, Keeps::Output)
    }

    /// The same, and what is kept for the gradient of a.
    pub(crate) fn log_scale_keeping(self, a: Self, along: Along, inverse: bool, keeps: Keeps) -> Result<Self> {
        self.tape().record(Recorded { op: LogScale { along, inverse }, keeps }, vec![self, a])
    }
}

/// y by the formula above.
pub fn reference(op: LogScale, x: &[f64], a: &[f64], cols: usize) -> Vec<f64> {
    let entry = |i: usize| if op.along == Along::Rows { i / cols } else { i % cols };
    x.iter().enumerate().map(|(i, x)| x * (op.sign() * a[entry(i)]).exp()).collect()
}

/// An error unless da, of columns divided by `exp(a)`, is minus the sums of y dy over rows; `y` makes a row of it of those of the operands, of which dy
/// is the last.
pub(super) fn check_column_sums(
    what: &str,
    da: &Tensor,
    operands: &[Tensor],
    y: impl Fn(&[Vec<f64>]) -> Vec<f64> + Sync,
) -> Result<()> {
    const ROWS: usize = 512; // at once
    let (rows, cols) = (operands[0].rows(), operands[0].cols());
    let (mut want, mut size) = (vec![0f64; cols], vec![0f64; cols]);
    for first in (0..rows).step_by(ROWS) {
        let count = ROWS.min(rows - first);
        let part = |t: &Tensor| t.clone().reshape([rows, cols])?.slice(first, count)?.to_f64_vec();
        let parts = operands.iter().map(part).collect::<Result<Vec<_>>>()?;
        let terms: Vec<Vec<f64>> = (0..count)
            .into_par_iter()
            .map(|r| {
                let of: Vec<Vec<f64>> = parts.iter().map(|t| t[r * cols..][..cols].to_vec()).collect();
                let dy = &of[of.len() - 1];
                y(&of).iter().zip(dy).map(|(y, dy)| y * dy).collect()
            })
            .collect();
        for row in terms {
            row.iter()
                .zip(want.iter_mut().zip(&mut size))
                .for_each(|(t, (want, size))| (*want, *size) = (*want - t, *size + t.abs()));
        }
    }
    for (j, ((got, want), size)) in da.to_f64_vec()?.iter().zip(&want).zip(&size).enumerate() {
        let allowed = 1e-5 * size + da.dtype().epsilon() * want.abs() + f64::MIN_POSITIVE;
        if !((got - want).abs() <= allowed) {
            return Err(Error::numeric(
                "wrong answer",
                format!("{what}: column {j}: {got:e}, expected {want:e} within {allowed:e}"),
            ));
        }
    }
    Ok(())
}

/// Worked cases.
pub fn cases() -> Vec<Case> {
    fn wide(x: &Var<'_>) -> DType {
        if x.value().dtype().is_half() { DType::F32 } else { x.value().dtype() }
    }
    let case = |name: &str, along: Along, inverse: bool, rows: usize, cols: usize| {
        let entries = if along == Along::Rows { rows } else { cols };
        Case::new("log_scale", name, normals(&[(&[rows, cols], 51), (&[entries], 52)]), move |v| {
            let [x, a]: [Var; 2] = v.try_into().map_err(|_| Error::Tape("two operands".into()))?;
            let wide = wide(&x);
            x.log_scale(a.to_dtype(wide)?, along, inverse)
        })
    };
    let keeping = |name: &str, along: Along, keeps: Keeps| {
        let entries = if along == Along::Rows { 5 } else { 24 };
        Case::new("log_scale", name, normals(&[(&[5, 24], 53), (&[entries], 54)]), move |v| {
            let [x, a]: [Var; 2] = v.try_into().map_err(|_| Error::Tape("two operands".into()))?;
            let wide = wide(&x);
            x.log_scale_keeping(a.to_dtype(wide)?, along, true, keeps)
        })
    };
    let mut all = vec![
        case("one value", Along::Columns, false, 1, 1),
        case("columns", Along::Columns, false, 5, 24),
        case("columns, inverse, odd", Along::Columns, true, 7, 13),
        case("rows", Along::Rows, false, 5, 24),
        case("rows, inverse, odd", Along::Rows, true, 33, 7),
        keeping("columns, x kept", Along::Columns, Keeps::Input),
        keeping("rows, x kept", Along::Rows, Keeps::Input),
        case("columns, 513x1376", Along::Columns, true, 513, 1376).large(),
        case("rows, 513x1376", Along::Rows, false, 513, 1376).large(),
    ];
    all.extend(Case::table(timed, SIZES));
    all
}

const SIZES: &[At] = &[(Place::Cpu, 4096, 4096, &[DType::F32]), (Place::Gpu, 4096, 16384, &[DType::BF16, DType::F32])];

fn timed(n: usize, rows: usize) -> Case {
    let op = LogScale { along: Along::Columns, inverse: true };
    let graph = Run::graph(move |v| {
        let [x, a]: [Var; 2] = v.try_into().map_err(|_| Error::Tape("two operands".into()))?;
        let wide = if x.value().dtype().is_half() { DType::F32 } else { x.value().dtype() };
        x.log_scale(a.to_dtype(wide)?, op.along, op.inverse)
    });
    let what = ("log_scale", "log-scale", "Columns of rows of n times exponentials");
    Case::timed(what, (n, rows), vec![vec![rows, n], vec![n]], graph, move |x, y| {
        let a = x[1].to_f64_vec()?;
        exact::rows(n, &x[..1], &y[0], |_, got, x| {
            exact::close("log_scale", got, &reference(op, &x[0], &a, n), y[0].dtype(), 1.0)
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Tape, ops::randn};

    #[test]
    fn scales_undo_each_other_and_are_their_definition() {
        let x = randn([3, 4], 1);
        for along in [Along::Rows, Along::Columns] {
            let a = randn([if along == Along::Rows { 3 } else { 4 }], 2);
            let tape = Tape::new();
            let y = tape.constant(x.clone()).log_scale(tape.constant(a.clone()), along, false).unwrap();
            let want = reference(LogScale { along, inverse: false }, x.as_slice().unwrap(), a.as_slice().unwrap(), 4);
            assert_eq!(y.value().to_vec::<f64>().unwrap(), want);
            let back = y.log_scale(tape.constant(a), along, true).unwrap();
            let close = |(x, y): (f64, f64)| (x - y).abs() < 1e-14;
            assert!(back.value().to_f64_vec().unwrap().into_iter().zip(x.to_f64_vec().unwrap()).all(close));
        }
    }

    /// The gradient of the logarithms from y in bf16 is that from y, but for the rounding of y.
    #[test]
    fn what_is_kept_may_be_rounded() {
        let (x, dy) = (randn([64, 48], 1).to_dtype(DType::F32).unwrap(), randn([64, 48], 3).to_dtype(DType::F32).unwrap());
        for (along, entries) in [(Along::Rows, 64), (Along::Columns, 48)] {
            let gradient = |keeps: Keeps| {
                let tape = Tape::new();
                let a = tape.variable(randn([entries], 2).to_dtype(DType::F32).unwrap());
                let y = tape.constant(x.clone()).log_scale_keeping(a.clone(), along, true, keeps).unwrap();
                tape.backward_from(y, dy.clone()).unwrap().take(&a).unwrap().to_f64_vec().unwrap()
            };
            let (exact, rounded, input) =
                (gradient(Keeps::Output), gradient(Keeps::Rounded(DType::BF16)), gradient(Keeps::Input));
            let distance = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum::<f64>().sqrt();
            let size = distance(&exact, &vec![0.0; entries]);
            assert!(distance(&exact, &input) < 1e-6 * size);
            let off = distance(&exact, &rounded) / size;
            assert!(1e-5 < off && off < DType::BF16.epsilon(), "{off:e}");
        }
    }

    #[test]
    fn logarithms_that_do_not_fit_are_errors() {
        let tape = Tape::new();
        let x = || tape.constant(randn([3, 4], 1));
        assert!(x().log_scale(tape.constant(randn([3], 1)), Along::Columns, false).is_err());
        assert!(x().log_scale(tape.constant(randn([4], 1)), Along::Rows, false).is_err());
        assert!(x().log_scale(tape.constant(randn([4], 1).to_dtype(DType::F32).unwrap()), Along::Columns, false).is_err());
    }
}
