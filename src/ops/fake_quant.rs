//! Quantise and dequantise along the last axis, with a straight-through gradient.
//!
//! Formulas in [`QuantSpec`]. Backward: `dx = dy` everywhere, clamped values included; scale and zero point are constants
//! (Bengio et al. 2013), so nothing is saved.

use half::{bf16, f16};
use rayon::prelude::*;

use crate::device::cuda::ffi::sq_quant;
use crate::device::cuda::{CudaDevice, Queue};
use crate::device::launch::{Check, Kind, View, Work, int};
use crate::device::{Device, cpu, ffi};
use crate::grid::{Clip, Grid, GridFloat, QuantSpec, Quantized, Rule, SEARCH_NORM, Target, fast_grid, reference_grid};
use crate::ops::microscaling::{self, largest_magnitude};
use crate::ops::{At, Case, Place, Run, exact, few_rows, randn};
use crate::tape::{Grads, Inputs, Op, Saved, Var, operands};
use crate::{DType, Error, Result, Tensor};

/// The operation.
#[derive(Clone, Copy, Debug)]
pub(crate) struct FakeQuant(pub QuantSpec);

impl Op for FakeQuant {
    fn name(&self) -> &'static str {
        "fake_quant"
    }
    fn check(&self, inputs: &[Tensor]) -> Result<()> {
        let [x] = operands(inputs)?;
        self.0.group_size(x.cols()).map(|_| ())
    }
    fn cpu(&self, inputs: Inputs, _: &mut Saved) -> Result<Tensor> {
        let [x] = inputs.take()?;
        let group = self.0.group_size(x.cols())?;
        let shape = x.shape().to_vec();
        let spec = self.0.of_tensor(|| largest_magnitude(&x))?;
        if x.dtype() == DType::F64 {
            let mut y = x.into_owned::<f64>()?;
            for g in y.chunks_mut(group) {
                let grid = reference_grid(&spec, g);
                g.iter_mut().for_each(|v| *v = grid.nearest(*v));
            }
            return Tensor::from_vec(y, shape);
        }
        let mut y = x.into_owned::<f32>()?;
        fast(&spec, group, &mut y);
        Tensor::from_vec(y, shape)
    }
    fn gpu(&self, device: &CudaDevice, inputs: Inputs, _: &mut Saved) -> Result<Tensor> {
        let [x] = inputs.take()?;
        if self.0.rule.floating().is_some() {
            return microscaling::gpu(device, x, &self.0, None);
        }
        let mut x = x.aligned()?;
        let y = x.or_new(device)?;
        launch(device.queue(), Outputs { y: Some(y.view()?), ..Outputs::default() }, x.view()?, x.cols(), &self.0)?;
        Ok(y)
    }
    fn backward(&self, _: Saved, dy: Tensor, _: &[bool]) -> Result<Grads> {
        Ok(vec![Some(dy)])
    }
    fn surrogate(&self, inputs: &[Tensor]) -> Option<Result<Tensor>> {
        inputs.first().cloned().map(Ok)
    }
}

impl Var<'_> {
    /// Fake quantisation along the last axis; 16 bits returns `self`.
    ///
    /// # Errors
    /// Those of [`Tape::record`](crate::Tape::record); a group that does not divide the columns.
    pub fn fake_quant(self, spec: &QuantSpec) -> Result<Self> {
        if spec.is_active() { self.tape().record(FakeQuant(*spec), vec![self]) } else { Ok(self) }
    }
}

/// The codes and grids that [`Var::fake_quant`] would use. 16-bit tensors are widened first.
///
/// # Errors
/// A group that does not divide the columns; a type that is not floating-point; a failed launch.
pub fn quantize(x: &Tensor, spec: &QuantSpec) -> Result<Quantized> {
    let group = spec.group_size(x.cols())?;
    if spec.rule.floating().is_some() && !x.device().is_cpu() {
        return quantize(&x.to_device(&Device::Cpu)?, spec);
    }
    if let Device::Cuda(device) = x.device() {
        return gpu_codes(&device, x, spec, group);
    }
    let spec = &spec.of_tensor(|| largest_magnitude(x))?;
    match x.dtype() {
        DType::F64 => on_grids::<f64>(x, group, |_, g| f64::grid(spec, g)),
        _ => on_grids::<f32>(&x.to_dtype(DType::F32)?, group, |_, g| f32::grid(spec, g)),
    }
}

/// The codes of every group of x, on the grid that it is given by its number and values.
pub(crate) fn on_grids<T: GridFloat>(
    x: &Tensor,
    group: usize,
    grid: impl Fn(usize, &[T]) -> Grid<T> + Sync,
) -> Result<Quantized> {
    let codes = |(i, g): (usize, &[T])| {
        let grid = grid(i, g);
        (grid, g.iter().map(|&v| grid.code(v).to_f64() as i16).collect::<Vec<_>>())
    };
    let groups: Vec<_> = x.as_slice::<T>()?.par_chunks(group).enumerate().map(codes).collect();
    let shape = [x.rows(), x.cols().div_ceil(group)];
    Ok(Quantized {
        shape: x.shape().to_vec(),
        group,
        scale: Tensor::from_vec(groups.iter().map(|g| g.0.scale).collect(), shape)?,
        zero: Tensor::from_vec(groups.iter().map(|g| g.0.zero).collect(), shape)?,
        codes: groups.into_iter().flat_map(|g| g.1).collect(),
    })
}

/// The scale of every group that [`Var::fake_quant`] would use, `[rows, cols/group]`.
///
/// # Errors
/// Those of [`quantize`].
pub(crate) fn scales(x: &Tensor, spec: &QuantSpec) -> Result<Tensor> {
    fn go<T: GridFloat>(x: &Tensor, group: usize, spec: &QuantSpec) -> Result<Tensor> {
        let spec = &spec.of_tensor(|| largest_magnitude(x))?;
        let scales: Vec<T> = x.as_slice::<T>()?.par_chunks(group).map(|g| T::grid(spec, g).scale).collect();
        Tensor::from_vec(scales, [x.rows(), x.cols().div_ceil(group)])
    }
    let group = spec.group_size(x.cols())?;
    if spec.rule.floating().is_some() && !x.device().is_cpu() {
        return scales(&x.to_device(&Device::Cpu)?, spec)?.to_device(&x.device());
    }
    match (x.device(), x.dtype()) {
        (Device::Cuda(device), _) => gpu_grids(&device, &x.clone().aligned()?, spec).map(|[scale, _]| scale),
        (_, DType::F64) => go::<f64>(x, group, spec),
        _ => go::<f32>(&x.to_dtype(DType::F32)?, group, spec),
    }
}

/// Codes and grids, brought to the CPU.
fn gpu_codes(device: &CudaDevice, x: &Tensor, spec: &QuantSpec, group: usize) -> Result<Quantized> {
    let x = x.clone().aligned()?;
    let cpu = Device::Cpu;
    if spec.stored.is_some() {
        let [scale, zero] = gpu_grids(device, &x, spec)?;
        return with_grids(&x.to_device(&cpu)?, spec, group, [scale.to_device(&cpu)?, zero.to_device(&cpu)?]);
    }
    let shape = [x.rows(), x.cols().div_ceil(group)];
    let (scale, zero) = (Tensor::on(device, &shape, DType::F32)?, Tensor::on(device, &shape, DType::F32)?);
    let raw = device.buffer(x.len(), Kind::I16, "quantised codes")?;
    let out = Outputs { codes: Some(raw.view()), scale: Some(scale.view()?), zero: Some(zero.view()?), ..Outputs::default() };
    launch(device.queue(), out, x.view()?, x.cols(), spec)?;
    let mut codes = vec![0i16; x.len()];
    raw.download(0, bytemuck::cast_slice_mut(&mut codes))?;
    Ok(Quantized { shape: x.shape().to_vec(), group, codes, scale: scale.to_device(&cpu)?, zero: zero.to_device(&cpu)? })
}

/// Scale and zero point of every group of x on a GPU, `[rows, cols/group]` each in `f32`, there too.
pub(crate) fn gpu_grids(device: &CudaDevice, x: &Tensor, spec: &QuantSpec) -> Result<[Tensor; 2]> {
    let group = spec.group_size(x.cols())?;
    let shape = [x.rows(), x.cols().div_ceil(group)];
    let [scale, zero] = [Tensor::on(device, &shape, DType::F32)?, Tensor::on(device, &shape, DType::F32)?];
    let out = Outputs { scale: Some(scale.view()?), zero: Some(zero.view()?), ..Outputs::default() };
    if spec.stored.is_none() {
        launch(device.queue(), out, x.view()?, x.cols(), spec)?;
        return Ok([scale, zero]);
    }
    // As rows of their own, groups have ranges that include 0.
    launch(device.queue(), out, x.view()?, group, &QuantSpec { group: None, stored: None, ..*spec })?;
    let rounded = scale.to_vec::<f32>()?.into_iter().map(|s| spec.scale(s)).collect();
    Ok([Tensor::from_vec(rounded, shape)?.to_device(&Device::Cuda(device.clone()))?, zero])
}

/// The codes of x on the CPU, on grids of given scales and zero points (`f32`, one a group).
pub(crate) fn with_grids(x: &Tensor, spec: &QuantSpec, group: usize, [scale, zero]: [Tensor; 2]) -> Result<Quantized> {
    let (min, max) = (spec.min_code() as f32, spec.max_code() as f32);
    let wide = x.to_dtype(DType::F32)?;
    let grids = scale.as_slice::<f32>()?.par_iter().zip(zero.as_slice::<f32>()?);
    let codes = wide.as_slice::<f32>()?.par_chunks(group).zip(grids).flat_map_iter(|(x, (&scale, &zero))| {
        let grid = Grid { scale, zero, min, max, floating: false };
        x.iter().map(move |&v| grid.code(v) as i16)
    });
    let codes = codes.collect();
    Ok(Quantized { shape: x.shape().to_vec(), group, codes, scale, zero })
}

/// What the kernel writes, each where wanted: as many values as x, or one a group of a row.
#[derive(Clone, Copy, Default)]
pub(crate) struct Outputs<'a> {
    /// Quantised and dequantised, of x's kind; may be x.
    pub y: Option<View<'a>>,
    /// `i16`.
    pub codes: Option<View<'a>>,
    /// `f32`, one a group.
    pub scale: Option<View<'a>>,
    /// `f32`, one a group.
    pub zero: Option<View<'a>>,
    /// `i32`, one a group: the candidate that a search chose. Searches only.
    pub best: Option<View<'a>>,
}

/// Quantises every row of `cols` values of x, its grids found as the specification says.
pub(crate) fn launch(queue: Queue<'_>, out: Outputs<'_>, x: View<'_>, cols: usize, spec: &QuantSpec) -> Result<()> {
    let search = spec.clip == Clip::Search;
    let c = Check::new("fake_quant", queue);
    if let Some(dtype) = spec.stored {
        return Err(Error::argument("fake_quant", format!("expected scales as computed, got scales stored as {dtype}")));
    }
    let (n, kind) = (x.len(), x.kind());
    // Ranges that include 0 are those of whole rows to the kernel: every group is one.
    let (cols, spec) = match spec.group {
        Some(_) if spec.includes_zero() => (spec.group_size(cols)?, &QuantSpec { group: None, ..*spec }),
        _ => (cols, spec),
    };
    let rows = c.rows(n, cols)?;
    let groups = c.product(&[rows, cols.div_ceil(spec.group_size(cols)?)])?;
    let work = Work::moving(if search { "clip search" } else { "quantise" }, 2 * x.bytes());
    let (y, x) = (c.optional("y", out.y, kind, n)?, c.operand("x", x, kind, n)?);
    let codes = c.optional("codes", out.codes, Kind::I16, n)?;
    let scale = c.optional("scale", out.scale, Kind::F32, groups)?;
    let zero = c.optional("zero", out.zero, Kind::F32, groups)?;
    let best = c.optional("best", out.best, Kind::I32, groups)?;
    if !search && out.best.is_some() {
        return Err(Error::argument("fake_quant", "no search, and so no chosen candidates"));
    }
    let (rows, cols, quant, dtype) = (c.long(rows)?, c.long(cols)?, launch_spec(spec)?, c.code(kind)?);
    // SAFETY: x has rows · cols values, every output is null or as large as kernels.h asks; y may be x.
    c.launch(work, |s| unsafe {
        if search {
            ffi!(sq_fake_quant_search(y, codes, scale, zero, best, x, rows, cols, quant, dtype, s))
        } else {
            ffi!(sq_fake_quant(y, codes, scale, zero, x, rows, cols, quant, dtype, s))
        }
    })
}

/// A specification as the launchers take it.
pub(crate) fn launch_spec(spec: &QuantSpec) -> Result<sq_quant> {
    if let Some(format) = spec.rule.floating() {
        return Err(Error::argument("quantiser", format!("expected integer codes, got {format}")));
    }
    Ok(sq_quant {
        bits: spec.bits as i32,
        symmetric: spec.symmetric.into(),
        weight: (spec.target == Target::Weight).into(),
        group: int("quantisation group", spec.group.unwrap_or(0))?,
        clip: match spec.clip {
            // Kernels divide by the largest code.
            Clip::Ratio(r) if spec.symmetric && spec.rule != Rule::Published => {
                (r * f64::from(spec.max_code()) / spec.steps()) as f32
            }
            Clip::Ratio(r) => r as f32,
            Clip::Search => 1.0,
        },
    })
}

fn fast(spec: &QuantSpec, group: usize, y: &mut [f32]) {
    let rows = if spec.clip == Clip::Search { 1 } else { cpu::rows_per_task(group) };
    y.par_chunks_mut(rows * group).for_each(|rows| {
        cpu::simd(
            #[inline(always)]
            || {
                for g in rows.chunks_mut(group) {
                    let grid = fast_grid(spec, g);
                    g.iter_mut().for_each(|v| *v = grid.nearest(*v));
                }
            },
        );
    });
}

/// Worked cases: bits, groups, ties, all-zero rows, an outlier row, clip search.
pub(crate) fn cases() -> Vec<Case> {
    let awkward = |rows: usize, cols: usize| {
        let mut v = randn([rows, cols], (rows * cols) as u64).into_vec::<f64>().expect("f64");
        // Values of a 16-bit type, so that every precision quantises the same numbers.
        v.iter_mut().for_each(|x| *x = bf16::from_f64(*x).to_f64());
        if rows > 2 {
            v[..cols].fill(0.0);
            v[cols..2 * cols].iter_mut().enumerate().for_each(|(i, x)| *x = f16::from_f64((i % 16) as f64 - 7.5).to_f64());
            v[2 * cols] = 100.0;
        }
        Tensor::from_vec(v, [rows, cols]).expect("rows x cols")
    };
    type Make = Box<dyn Fn() -> Tensor + Send + Sync>;
    let case = |name: &str, x: Make, spec: QuantSpec| {
        Case::new("fake_quant", name, move || vec![x()], move |mut v| v.remove(0).fake_quant(&spec)).rounds()
    };
    let awkward = |rows, cols| -> Make { Box::new(move || awkward(rows, cols)) };
    let normal = |shape: [usize; 2], seed| -> Make { Box::new(move || randn(shape, seed)) };
    let (act, weight) = (QuantSpec::activation, QuantSpec::weight);
    let mut all = vec![case("one value", normal([1, 1], 1), act(4, false))];
    for (bits, symmetric) in [(2, true), (2, false), (4, true), (4, false), (8, true), (8, false)] {
        let name = format!("{bits} bits {}", if symmetric { "symmetric" } else { "asymmetric" });
        all.push(case(&name, awkward(5, 24), act(bits, symmetric)));
        all.push(case(&format!("{name} grouped"), awkward(5, 24), act(bits, symmetric).grouped(8)));
        all.push(case(&format!("{name} odd columns, clipped"), awkward(3, 37), act(bits, symmetric).clipped(Clip::Ratio(0.9))));
        all.push(case(&format!("{name} searched"), awkward(4, 40), weight(bits, symmetric).clipped(Clip::Search)));
        all.push(case(
            &format!("{name} searched in groups"),
            awkward(4, 32),
            weight(bits, symmetric).grouped(8).clipped(Clip::Search),
        ));
    }
    all.push(case("4 bits, 256x1376", normal([256, 1376], 3), act(4, false)).large());
    all.push(case("4 bits searched, 384x384", normal([384, 384], 4), weight(4, true).clipped(Clip::Search)).large());
    let mut sizes: Vec<At> = vec![(Place::Cpu, 4096, 4096, &[DType::F32]), (Place::Cpu, 11008, 1524, &[DType::F32])];
    sizes.extend([4096, 8192, 11008, 14336, 28672].map(|n| (Place::Gpu, n, (1 << 28) / n, &[DType::BF16][..])));
    sizes.push((Place::Gpu, 4096, 1 << 16, &[DType::F16, DType::F32]));
    sizes.extend(few_rows());
    all.extend(Case::table(timed, &sizes));
    all.extend(Case::table(timed_search, &[(Place::Cpu, 4096, 64, &[DType::F32]), (Place::Gpu, 4096, 4096, &[DType::BF16])]));
    all
}

fn timed(n: usize, rows: usize) -> Case {
    let spec = QuantSpec::activation(4, false);
    let graph = Run::graph(move |mut v| v.remove(0).fake_quant(&spec));
    let what = ("fake_quant", "fake-quant", "Asymmetric 4-bit quantisation of rows of n");
    Case::timed(what, (n, rows), vec![vec![rows, n]], graph, move |x, y| {
        exact::rows(n, x, &y[0], |_, got, x| exact::quantised("fake_quant", got, &x[0], &spec, y[0].dtype()))
    })
    .rounds()
}

fn timed_search(n: usize, rows: usize) -> Case {
    let spec = QuantSpec::weight(4, true).clipped(Clip::Search);
    let graph = Run::graph(move |mut v| v.remove(0).fake_quant(&spec));
    let what = ("fake_quant", "clip-search", "Symmetric 4-bit weights with the clip ratio searched, rows of n");
    Case::timed(what, (n, rows), vec![vec![rows, n]], graph, move |x, y| {
        exact::rows(n, x, &y[0], |r, got, x| {
            let x = &x[0];
            // Any candidate that is as good will do, so the errors are compared; the result was rounded to its type.
            let error = |y: &dyn Fn(usize) -> f64| (0..x.len()).map(|i| (x[i] - y(i)).abs().powf(SEARCH_NORM)).sum::<f64>();
            let grid = reference_grid(&spec, x);
            let (ours, best) = (error(&|i| got[i]), error(&|i| grid.nearest(x[i])));
            let slack = 1e-4 + 4.0 * y[0].dtype().epsilon();
            if !(ours <= best * (1.0 + slack)) {
                return Err(Error::numeric(
                    "wrong answer",
                    format!("clip search: row {r}: error {ours:e}, the best is {best:e}"),
                ));
            }
            Ok(())
        })
    })
    .rounds()
}

/// Elements whose codes differ between two tensors on one grid of this spec, with both tensors' codes on the first one's grid.
///
/// # Errors
/// Tensors of different sizes; those of [`quantize`].
pub fn code_differences(spec: &QuantSpec, x: &Tensor, a: &Tensor, b: &Tensor) -> Result<Vec<(usize, f64, f64)>> {
    let q = quantize(&x.to_dtype(DType::F64)?, spec)?;
    let (scale, zero) = (q.scale.as_slice::<f64>()?, q.zero.as_slice::<f64>()?);
    let (a, b) = (a.to_f64_vec()?, b.to_f64_vec()?);
    if a.len() != b.len() || a.len() != q.codes.len() {
        return Err(Error::argument("code_differences", "tensors of different sizes"));
    }
    let code = |v: f64, i: usize| v / scale[i / q.group] + zero[i / q.group];
    Ok((0..a.len()).map(|i| (i, code(a[i], i), code(b[i], i))).filter(|(_, a, b)| (a - b).abs() > 0.5).collect())
}
