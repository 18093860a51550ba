//! A worked case: of an operation, or of other work that is checked and timed.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::{Arc, Mutex};

use crate::random::{randn, repeated};
use crate::tape::Var;
use crate::{DType, Device, Error, Result, Tensor};

/// Builds a graph from variables or constants.
pub type Build = Arc<dyn for<'t> Fn(Vec<Var<'t>>) -> Result<Var<'t>> + Send + Sync>;
/// Makes ready what every call shares (tables, memory for the results), so that only the call itself is timed.
pub type Prepare = Arc<dyn Fn(&[Tensor]) -> Result<Call> + Send + Sync>;
/// A call made ready. What it needs between calls is shared by both functions.
pub struct Call {
    /// The call; this is timed.
    pub run: Box<dyn FnMut() -> Result<()>>,
    /// The results of the last call.
    pub results: Box<dyn FnMut() -> Result<Vec<Tensor>>>,
}
/// Compares results with the reference, given the operands (for [`Pass::Backward`] the gradient of the result is the last of them).
pub type Check = Arc<dyn Fn(&[Tensor], &[Tensor]) -> Result<()> + Send + Sync>;
type Draw = Arc<dyn Fn(DType, &Device) -> Result<Vec<Tensor>> + Send + Sync>;
/// Milliseconds of work that times itself.
pub type Whole = Arc<dyn Fn(DType, &Device) -> Result<f64> + Send + Sync>;

/// What a case runs.
#[derive(Clone)]
#[non_exhaustive]
pub enum Run {
    /// A graph on the tape.
    Graph(Build),
    /// A function without gradients.
    Call(Prepare),
    /// Work that draws its own operands, runs once, and says how many milliseconds it took, and of what in a few words; the case's
    /// operands are those of a small piece of the same work, whose results are checked.
    Whole(Prepare, Whole, &'static str),
}

/// What a case is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Size {
    /// Gradient check and parity.
    Small,
    /// Parity: too large for finite differences.
    Large,
    /// Benches: the size of a model, of which only some rows are compared with the reference.
    Timed,
}

/// Which machine a timed size is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// The CPU.
    Cpu,
    /// A GPU.
    Gpu,
}

impl Place {
    /// That of a device.
    pub fn of(device: &Device) -> Self {
        if device.is_cpu() { Self::Cpu } else { Self::Gpu }
    }
}

/// Which part of an operation is timed, and which results are checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass {
    /// The result for constants.
    Forward,
    /// The result for variables that nobody else holds, as an operation computes it that makes its gradient along with the result and in
    /// the operand's memory. The gradients of the result's sum are checked.
    Recorded,
    /// The gradients; the forward pass before them is not timed.
    Backward,
}

/// A size in an operation's table: where, row length n, rows, element types.
pub type At = (Place, usize, usize, &'static [DType]);

/// What a bench has to know of a case.
#[derive(Clone)]
pub struct Timing {
    /// What `spinquant bench --kernel` and the records call it.
    pub kernel: &'static str,
    /// What n and rows are, in a few words.
    pub about: &'static str,
    /// Values of a row.
    pub n: usize,
    /// Number of rows.
    pub rows: usize,
    /// Where this size is timed.
    pub place: Place,
    /// Element types in the table; none of a size that is timed only where it is named.
    pub dtypes: &'static [DType],
    /// Which part is timed.
    pub pass: Pass,
    /// Values that must be moved, every operand read once and every result written once; 0 where arithmetic limits.
    pub moved: f64,
    /// Additions and multiplications; 0 where memory limits.
    pub flops: f64,
    /// Values alive at once, about.
    pub held: f64,
    /// The same case with another n and other rows.
    pub at: fn(usize, usize) -> Case,
    check: Check,
}

/// A worked case of an operation: feeds the gradient check, CPU and GPU parity, and the benches.
#[derive(Clone)]
pub struct Case {
    /// The operation.
    pub op: &'static str,
    /// What is particular about this case.
    pub name: String,
    /// What it runs.
    pub run: Run,
    /// What it is for.
    pub size: Size,
    /// Rounds its result to a grid, so that parity is a matter of codes and not of small differences.
    pub rounds: bool,
    /// The size of the terms that the value is a sum of, where they cancel: a device may round the value as it rounds them in `f32`.
    pub terms: f64,
    /// The same of its gradients.
    pub gradient_terms: f64,
    /// How to time it: of cases of [`Size::Timed`].
    pub timing: Option<Timing>,
    draw: Draw,
}

impl Case {
    /// A small case of `op` with the `f64` operands that `operands` makes.
    pub fn new(
        op: &'static str,
        name: impl Into<String>,
        operands: impl Fn() -> Vec<Tensor> + Send + Sync + 'static,
        build: impl for<'t> Fn(Vec<Var<'t>>) -> Result<Var<'t>> + Send + Sync + 'static,
    ) -> Self {
        let draw: Draw = Arc::new(move |dtype, device| operands().iter().map(|x| x.to_dtype(dtype)?.to_device(device)).collect());
        Self {
            op,
            name: name.into(),
            run: Run::Graph(Arc::new(build)),
            size: Size::Small,
            rounds: false,
            terms: 0.0,
            gradient_terms: 0.0,
            timing: None,
            draw,
        }
    }

    /// A case of the benches with rows of n, on normal values of `shapes`. `checks` compares some rows of the results with the
    /// reference. It must move what its operands and a result of `[rows, n]` hold, unless [`Case::moves`] or [`Case::computes`] says
    /// otherwise.
    pub fn timed(
        (op, kernel, about): (&'static str, &'static str, &'static str),
        (n, rows): (usize, usize),
        shapes: Vec<Vec<usize>>,
        run: Run,
        checks: impl Fn(&[Tensor], &[Tensor]) -> Result<()> + Send + Sync + 'static,
    ) -> Self {
        let size = |shape: &Vec<usize>| shape.iter().map(|&n| n as f64).product::<f64>();
        let (operands, result) = (shapes.iter().map(size).sum::<f64>(), n as f64 * rows as f64);
        let timing = Timing {
            kernel,
            about,
            n,
            rows,
            place: Place::Cpu,
            dtypes: &[],
            pass: Pass::Forward,
            moved: operands + result,
            flops: 0.0,
            held: operands + 3.0 * result,
            at: |_, _| unreachable!("a case that is in no table"),
            check: Arc::new(checks),
        };
        let draw: Draw = Arc::new(move |dtype, device| {
            let one = |(i, shape): (usize, &Vec<usize>)| repeated(shape.clone(), 1 + i as u64, dtype, device);
            shapes.iter().enumerate().map(one).collect()
        });
        let name = format!("{rows} rows of {n}");
        let timing = Some(timing);
        Self { op, name, run, size: Size::Timed, rounds: false, terms: 0.0, gradient_terms: 0.0, timing, draw }
    }

    /// The case at every size of a table.
    pub fn table(make: fn(usize, usize) -> Self, sizes: &[At]) -> Vec<Self> {
        let one = |&(place, n, rows, dtypes): &At| make(n, rows).timing(|t| Timing { place, dtypes, at: make, ..t });
        sizes.iter().map(one).collect()
    }

    fn timing(self, change: impl FnOnce(Timing) -> Timing) -> Self {
        Self { timing: self.timing.map(change), ..self }
    }

    /// Marks the case as one for parity only.
    pub fn large(self) -> Self {
        Self { size: Size::Large, ..self }
    }
    /// Marks the result as rounded to a grid.
    pub fn rounds(self) -> Self {
        Self { rounds: true, ..self }
    }
    /// Says how large the terms of the value are, and those of the gradients.
    pub fn of_terms(self, terms: f64, gradient_terms: f64) -> Self {
        Self { terms, gradient_terms, ..self }
    }
    /// Times another part than the forward pass.
    pub fn pass(self, pass: Pass) -> Self {
        self.timing(|t| Timing { pass, ..t })
    }
    /// Must move so many values.
    pub fn moves(self, moved: f64) -> Self {
        self.timing(|t| Timing { moved, held: t.held + (moved - t.moved).max(0.0), ..t })
    }
    /// Is limited by so many additions and multiplications.
    pub fn computes(self, flops: f64) -> Self {
        self.timing(|t| Timing { flops, moved: 0.0, ..t })
    }
    /// Has so many values alive at once.
    pub fn holds(self, held: f64) -> Self {
        self.timing(|t| Timing { held, ..t })
    }
    /// Takes its operands from elsewhere.
    pub fn drawn(self, draw: impl Fn(DType, &Device) -> Result<Vec<Tensor>> + Send + Sync + 'static) -> Self {
        Self { draw: Arc::new(draw), ..self }
    }

    /// The operands, drawn anew, in `dtype` on `device`.
    ///
    /// # Errors
    /// No memory for them, or sizes that the case cannot have.
    pub fn operands(&self, dtype: DType, device: &Device) -> Result<Vec<Tensor>> {
        (self.draw)(dtype, device)
    }

    /// The graph's result.
    ///
    /// # Errors
    /// Those of the operation, and of a case that is no graph.
    pub fn build<'t>(&self, operands: Vec<Var<'t>>) -> Result<Var<'t>> {
        match &self.run {
            Run::Graph(build) => build(operands),
            _ => Err(Error::argument("case", format!("{self:?} is no graph on the tape"))),
        }
    }

    /// Compares results with the reference.
    ///
    /// # Errors
    /// [`Error::Numeric`] that names the first value found wrong; a case without [`Timing`].
    pub fn check(&self, operands: &[Tensor], results: &[Tensor]) -> Result<()> {
        let timing = self.timing.as_ref().ok_or_else(|| Error::argument("case", format!("{self:?} is not one for benches")))?;
        (timing.check)(operands, results)
    }
}

impl Call {
    /// Of a function that makes its results anew in every call.
    pub fn new(mut f: impl FnMut() -> Result<Vec<Tensor>> + 'static) -> Self {
        let last = Rc::new(RefCell::new(vec![]));
        let results = last.clone();
        Self {
            run: Box::new(move || {
                *last.borrow_mut() = f()?;
                Ok(())
            }),
            results: Box::new(move || Ok(results.borrow().clone())),
        }
    }
}

impl Run {
    /// A graph.
    pub fn graph(build: impl for<'t> Fn(Vec<Var<'t>>) -> Result<Var<'t>> + Send + Sync + 'static) -> Self {
        Self::Graph(Arc::new(build))
    }
}

impl std::fmt::Debug for Case {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}", self.timing.as_ref().map_or(self.op, |t| t.kernel), self.name)
    }
}

/// A value that a case makes once for each element type and device: a table that every call reads.
pub(crate) struct Once<T>(Mutex<Vec<(DType, Device, T)>>);

impl<T: Clone> Once<T> {
    pub(crate) const fn new() -> Self {
        Self(Mutex::new(vec![]))
    }
    pub(crate) fn get(&self, like: &Tensor, make: impl FnOnce() -> Result<T>) -> Result<T> {
        let mut made = self.0.lock().unwrap_or_else(|e| e.into_inner());
        let (dtype, device) = (like.dtype(), like.device());
        if let Some((.., value)) = made.iter().find(|(t, d, _)| *t == dtype && *d == device) {
            return Ok(value.clone());
        }
        let value = make()?;
        made.push((dtype, device, value.clone()));
        Ok(value)
    }
}

/// Indices spread over `0..count`, one for each row.
pub(crate) fn scattered(rows: usize, count: usize) -> impl Iterator<Item = usize> {
    (0..rows).map(move |i| (i * 7919 + 13) % count)
}

/// Small operands of these shapes and seeds.
pub(crate) fn normals(shapes: &[(&[usize], u64)]) -> impl Fn() -> Vec<Tensor> + Send + Sync + 'static {
    let shapes: Vec<(Vec<usize>, u64)> = shapes.iter().map(|(shape, seed)| (shape.to_vec(), *seed)).collect();
    move || shapes.iter().map(|(shape, seed)| randn(shape.clone(), *seed)).collect()
}

/// One token of a network that generates, and a few.
pub(crate) fn few_rows() -> impl Iterator<Item = At> {
    const BF16: &[DType] = &[DType::BF16];
    [4096, 11008].into_iter().flat_map(|n| [1, 8, 64].map(|rows| (Place::Gpu, n, rows, BF16)))
}
