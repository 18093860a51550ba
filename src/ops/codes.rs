//! A matrix as the integers that it is quantised to: signed bytes, a scale and a zero point for every row or group of a row.
//!
//! `x̂[i, j] = s[i, g] (q[i, j] − z[i, g])`, g the group of column j, on the grids of [`QuantSpec`]. Unsigned codes are held less
//! `2^(bits−1)`, which makes them signed, and zero points with them.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::{Arc, Mutex};

use rayon::prelude::*;

use super::fake_quant::{launch_spec, quantize};
use crate::device::cuda::{CudaBuffer, Queue};
use crate::device::launch::{Check, Kind, View, Work};
use crate::device::{Device, ffi};
use crate::grid::{Clip, QuantSpec, Quantized};
use crate::ops::{At, Call, Case, Place, Run, exact};
use crate::ranks::Group;
use crate::{DType, Error, Result, Tensor};

/// Codes `[rows, cols]` of at most 8 bits, with their grids. Clones share the memory.
#[derive(Clone, Debug)]
pub struct Codes {
    rows: usize,
    cols: usize,
    /// Columns that share a scale.
    group: usize,
    values: Values,
    /// `[rows, cols / group]`, `f32`; `f64` of the codes of an `f64` tensor.
    scale: Tensor,
    /// Whole numbers, as many and of the same type; `None`: all are 0.
    zero: Option<Tensor>,
    /// Sums of codes over parts of a row: the length of the parts, and the sums, the last that were asked for.
    sums: Arc<Mutex<Option<(usize, Sums)>>>,
}

#[derive(Clone, Debug)]
enum Values {
    Cpu(Arc<Vec<i8>>),
    Cuda(Arc<CudaBuffer>),
}

/// Sums of codes over parts of rows, `[rows, cols / part]`.
#[derive(Clone, Debug)]
pub(crate) enum Sums {
    Cpu(Arc<Vec<i32>>),
    Cuda(Arc<CudaBuffer>),
}

impl Codes {
    /// The codes that [`Var::fake_quant`](crate::Var::fake_quant) would use, on the device of x. The leading axes of x are rows.
    ///
    /// # Errors
    /// A grid without equal steps; a group that does not divide the columns; bits that a byte has no room for; a failed launch.
    pub fn quantize(x: &Tensor, spec: &QuantSpec) -> Result<Self> {
        uniform(spec)?;
        let group = spec.group_size(x.cols())?;
        match x.device() {
            Device::Cuda(device) if spec.stored.is_none() => {
                let x = x.clone().aligned()?;
                let shape = [x.rows(), x.cols().div_ceil(group)];
                let values = device.buffer(x.len(), Kind::I8, "codes")?;
                let scale = Tensor::on(&device, &shape, DType::F32)?;
                let zero = (!spec.symmetric).then(|| Tensor::on(&device, &shape, DType::F32)).transpose()?;
                let zeros = zero.as_ref().map(Tensor::view).transpose()?;
                launch_quantize(device.queue(), values.view(), scale.view()?, zeros, x.view()?, x.cols(), spec)?;
                Ok(Self::on_device(values, scale, zero, [x.rows(), x.cols()], group))
            }
            device => Self::new(&quantize(x, spec)?, spec)?.to_device(&device),
        }
    }

    /// Those that a kernel wrote, `[rows, cols]` in bytes.
    pub(super) fn on_device(
        values: CudaBuffer,
        scale: Tensor,
        zero: Option<Tensor>,
        [rows, cols]: [usize; 2],
        group: usize,
    ) -> Self {
        Self { rows, cols, group, values: Values::Cuda(Arc::new(values)), scale, zero, sums: Arc::default() }
    }

    /// The same that were brought to the CPU; scales and zero points are brought there.
    pub(super) fn on_cpu(
        values: Vec<i8>,
        scale: &Tensor,
        zero: Option<&Tensor>,
        [rows, cols]: [usize; 2],
        group: usize,
    ) -> Result<Self> {
        let cpu = |t: &Tensor| t.to_device(&Device::Cpu);
        let (scale, zero) = (cpu(scale)?, zero.map(cpu).transpose()?);
        Ok(Self { rows, cols, group, values: Values::Cpu(Arc::new(values)), scale, zero, sums: Arc::default() })
    }

    /// What a quantiser found, as bytes, on the CPU. The specification says which codes there are.
    ///
    /// # Errors
    /// A grid without equal steps; codes that the specification does not have, or as many scales as do not belong to them.
    pub fn new(q: &Quantized, spec: &QuantSpec) -> Result<Self> {
        uniform(spec)?;
        let cols = q.shape.last().copied().unwrap_or(1);
        let (rows, shift) = (q.codes.len() / cols.max(1), if spec.symmetric { 0 } else { spec.max_code() / 2 + 1 });
        let (min, max, grids) = (spec.min_code(), spec.max_code(), rows * cols.div_ceil(q.group.max(1)));
        if spec.group_size(cols)? != q.group || q.scale.len() != grids || q.zero.len() != grids {
            let message = format!("expected {rows} rows of {cols} with a scale for each {}, got {}", q.group, q.scale.len());
            return Err(Error::argument("codes", message));
        }
        if let Some(odd) = q.codes.iter().find(|&&c| i32::from(c) < min || i32::from(c) > max) {
            return Err(Error::argument("codes", format!("expected {min} to {max}, got {odd}")));
        }
        let values = q.codes.par_iter().map(|&c| (i32::from(c) - shift) as i8).collect();
        let (shape, cpu) = ([rows, cols.div_ceil(q.group)], Device::Cpu);
        let scale = q.scale.to_device(&cpu)?.reshape(shape)?;
        let zero = if spec.symmetric { None } else { Some(shifted(&q.zero.to_device(&cpu)?, shift)?.reshape(shape)?) };
        Ok(Self { rows, cols, group: q.group, values: Values::Cpu(Arc::new(values)), scale, zero, sums: Arc::default() })
    }

    /// Rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Columns that share a scale.
    pub fn group(&self) -> usize {
        self.group
    }

    /// Scales, `[rows, cols / group]`.
    pub fn scale(&self) -> &Tensor {
        &self.scale
    }

    /// Zero points of the signed codes, `[rows, cols / group]`; `None`: all are 0.
    pub fn zero(&self) -> Option<&Tensor> {
        self.zero.as_ref()
    }

    /// Where they are.
    pub fn device(&self) -> Device {
        self.scale.device()
    }

    /// Bytes of codes, scales and zero points.
    pub fn bytes(&self) -> usize {
        self.rows * self.cols + self.scale.bytes() + self.zero.as_ref().map_or(0, Tensor::bytes)
    }

    /// The codes, row by row, brought to the CPU.
    ///
    /// # Errors
    /// A failing copy.
    pub fn to_vec(&self) -> Result<Vec<i8>> {
        match &self.values {
            Values::Cpu(v) => Ok(v.to_vec()),
            Values::Cuda(buffer) => {
                let mut v = vec![0i8; buffer.len()];
                buffer.download(0, bytemuck::cast_slice_mut(&mut v))?;
                Ok(v)
            }
        }
    }

    /// The same on another device, where scales are `f32`.
    ///
    /// # Errors
    /// A failing copy, or no memory on the device.
    pub fn to_device(&self, device: &Device) -> Result<Self> {
        if self.device() == *device {
            return Ok(self.clone());
        }
        let values = match device {
            Device::Cpu => Values::Cpu(Arc::new(self.to_vec()?)),
            Device::Cuda(cuda) => {
                let host = if let Values::Cpu(v) = &self.values { v.clone() } else { Arc::new(self.to_vec()?) };
                Values::Cuda(Arc::new(cuda.upload(bytemuck::cast_slice(&host), Kind::I8)?))
            }
        };
        let place = |t: &Tensor| t.to_dtype(DType::F32)?.to_device(device);
        let zero = self.zero.as_ref().map(place).transpose()?;
        Ok(Self { values, scale: place(&self.scale)?, zero, sums: Arc::default(), ..*self })
    }

    /// The rows of all ranks behind one another, as many from each.
    ///
    /// # Errors
    /// Those of [`Group::all_gather`].
    pub(crate) fn gathered(&self, ranks: &Group, what: &str) -> Result<Self> {
        let values = match &self.values {
            Values::Cpu(own) => {
                let all = ranks.gather_equal(what, bytemuck::cast_slice(own))?;
                Values::Cpu(Arc::new(bytemuck::cast_vec(all)))
            }
            Values::Cuda(own) => {
                let all = own.device().buffer(ranks.world() * own.len(), Kind::I8, "codes of all ranks")?;
                ranks.gpus(what)?.gather(all.view(), own.view())?;
                Values::Cuda(Arc::new(all))
            }
        };
        let all = |t: &Tensor| ranks.all_gather(what, t.clone());
        let (scale, zero) = (all(&self.scale)?, self.zero.as_ref().map(all).transpose()?);
        Ok(Self { rows: ranks.world() * self.rows, values, scale, zero, sums: Arc::default(), ..*self })
    }

    /// The values that the codes stand for, `[rows, cols]` in the type of the scales, on the CPU.
    ///
    /// # Errors
    /// A failing copy.
    pub fn dequantize(&self) -> Result<Tensor> {
        let (codes, cpu) = (self.to_vec()?, Device::Cpu);
        let scale = self.scale.to_device(&cpu)?;
        let zero = match &self.zero {
            Some(zero) => zero.to_device(&cpu)?,
            None => Tensor::zeros(scale.shape(), scale.dtype(), &cpu)?,
        };
        let quantized = Quantized {
            shape: vec![self.rows, self.cols],
            group: self.group,
            codes: codes.into_iter().map(i16::from).collect(),
            scale,
            zero,
        };
        quantized.dequantize()
    }

    /// The values that the codes stand for, `[rows, cols]` in a type, where the codes are: those of [`Var::fake_quant`](crate::Var::fake_quant).
    ///
    /// # Errors
    /// No memory for them; a failed launch.
    pub(crate) fn values(&self, dtype: DType) -> Result<Tensor> {
        let Device::Cuda(device) = self.device() else { return self.dequantize()?.to_dtype(dtype) };
        let y = Tensor::on(&device, &[self.rows, self.cols], dtype)?;
        let zero = self.zero.as_ref().map(Tensor::view).transpose()?;
        launch_dequantize(device.queue(), y.view()?, self.view()?, self.scale.view()?, zero, self.group)?;
        Ok(y)
    }

    /// The codes on the CPU.
    pub(crate) fn as_slice(&self) -> Result<&[i8]> {
        match &self.values {
            Values::Cpu(v) => Ok(v),
            Values::Cuda(_) => Err(Error::device("codes", format!("expected them on the CPU, they are on {}", self.device()))),
        }
    }

    /// The codes on a GPU.
    pub(crate) fn view(&self) -> Result<View<'_>> {
        match &self.values {
            Values::Cuda(buffer) => Ok(buffer.view()),
            Values::Cpu(_) => Err(Error::device("codes", "expected them on a GPU, they are on the CPU")),
        }
    }

    /// Sums of the codes over parts of `part` columns, which divides a row.
    pub(crate) fn sums(&self, part: usize) -> Result<Sums> {
        let mut last = self.sums.lock().unwrap_or_else(|e| e.into_inner());
        if let Some((_, sums)) = last.as_ref().filter(|(length, _)| *length == part) {
            return Ok(sums.clone());
        }
        let sums = match &self.values {
            Values::Cpu(v) => {
                let sum = |codes: &[i8]| codes.iter().map(|&c| i32::from(c)).sum::<i32>();
                Sums::Cpu(Arc::new(v.par_chunks(part).map(sum).collect()))
            }
            Values::Cuda(codes) => {
                let device = codes.device();
                let sums = device.buffer(codes.len() / part.max(1), Kind::I32, "sums of codes")?;
                launch_sums(device.queue(), sums.view(), codes.view(), self.cols, part)?;
                Sums::Cuda(Arc::new(sums))
            }
        };
        *last = Some((part, sums.clone()));
        Ok(sums)
    }
}

/// Floating-point codes have no products of integers.
fn uniform(spec: &QuantSpec) -> Result<()> {
    match spec.rule.floating() {
        Some(format) => Err(Error::argument("codes", format!("expected a grid of equal steps, got {}", format.name()))),
        None => Ok(()),
    }
}

/// Zero points of codes that are `shift` less.
fn shifted(zero: &Tensor, shift: i32) -> Result<Tensor> {
    match zero.dtype() {
        DType::F64 => {
            let less = zero.as_slice::<f64>()?.iter().map(|z| z - f64::from(shift)).collect();
            Tensor::from_vec::<f64>(less, zero.shape())
        }
        _ => Tensor::from_vec(zero.as_slice::<f32>()?.iter().map(|z| z - shift as f32).collect(), zero.shape()),
    }
}

/// The codes of every row of `cols` values of x, as bytes, and their grids; `zero` for specifications that have zero points.
pub(crate) fn launch_quantize(
    queue: Queue<'_>,
    codes: View<'_>,
    scale: View<'_>,
    zero: Option<View<'_>>,
    x: View<'_>,
    cols: usize,
    spec: &QuantSpec,
) -> Result<()> {
    let c = Check::new("quantise to codes", queue);
    uniform(spec)?;
    if let Some(dtype) = spec.stored {
        return Err(Error::argument("quantise to codes", format!("expected scales as computed, got scales stored as {dtype}")));
    }
    let search = spec.clip == Clip::Search;
    let (n, kind) = (x.len(), x.kind());
    let work = Work::moving(if search { "clip search" } else { "quantise" }, x.bytes() + codes.bytes());
    // Ranges that include 0 are those of whole rows to the kernel: every group is one.
    let (cols, spec) = match spec.group {
        Some(_) if spec.includes_zero() => (spec.group_size(cols)?, &QuantSpec { group: None, ..*spec }),
        _ => (cols, spec),
    };
    let rows = c.rows(n, cols)?;
    let groups = c.product(&[rows, cols.div_ceil(spec.group_size(cols)?)])?;
    let (codes, x) = (c.operand("codes", codes, Kind::I8, n)?, c.operand("x", x, kind, n)?);
    let (scale, zero) = (c.operand("scale", scale, Kind::F32, groups)?, c.optional("zero", zero, Kind::F32, groups)?);
    let (rows, cols, quant, dtype) = (c.long(rows)?, c.long(cols)?, launch_spec(spec)?, c.code(kind)?);
    // SAFETY: x and codes have rows · cols values, scale and zero (or null) one a group.
    c.launch(work, |s| unsafe {
        match search {
            true => ffi!(sq_quantise_search(codes, scale, zero, x, rows, cols, quant, dtype, s)),
            false => ffi!(sq_quantise(codes, scale, zero, x, rows, cols, quant, dtype, s)),
        }
    })
}

/// The values that codes stand for, y of as many; a scale for every `group` of them in turn, and a zero point where there are some.
pub(crate) fn launch_dequantize(
    queue: Queue<'_>,
    y: View<'_>,
    codes: View<'_>,
    scale: View<'_>,
    zero: Option<View<'_>>,
    group: usize,
) -> Result<()> {
    let c = Check::new("dequantise", queue);
    let (n, kind, work) = (codes.len(), y.kind(), Work::moving("dequantise", y.bytes() + codes.bytes()));
    let groups = c.rows(n, group)?;
    let (y, codes) = (c.operand("y", y, kind, n)?, c.operand("codes", codes, Kind::I8, n)?);
    let (scale, zero) = (c.operand("scale", scale, Kind::F32, groups)?, c.optional("zero", zero, Kind::F32, groups)?);
    let (groups, group, dtype) = (c.long(groups)?, c.long(group)?, c.code(kind)?);
    // SAFETY: y and codes have groups · group values, scale and zero (or null) one a group.
    c.launch(work, |s| unsafe { ffi!(sq_dequantise(y, codes, scale, zero, groups, group, dtype, s)) })
}

/// Sums of codes in rows of `cols` over parts of `part` of them.
pub(crate) fn launch_sums(queue: Queue<'_>, sums: View<'_>, codes: View<'_>, cols: usize, part: usize) -> Result<()> {
    let c = Check::new("sums of codes", queue);
    let (n, work) = (codes.len(), Work::moving("sums of codes", codes.bytes()));
    let (rows, parts) = (c.rows(n, cols)?, c.rows(cols, part)?);
    let (sums, codes) =
        (c.operand("sums", sums, Kind::I32, c.product(&[rows, parts])?)?, c.operand("codes", codes, Kind::I8, n)?);
    let (rows, cols, part) = (c.long(rows)?, c.long(cols)?, c.int(part)?);
    // SAFETY: codes has rows · cols values, sums one a part.
    c.launch(work, |s| unsafe { ffi!(sq_code_sums(sums, codes, rows, cols, part, s)) })
}

/// Worked cases: sizes for benches.
pub(crate) fn cases() -> Vec<Case> {
    Case::table(timed, SIZES)
}

const SIZES: &[At] = &[
    (Place::Cpu, 4096, 4096, &[DType::F32]),
    (Place::Gpu, 4096, 1 << 16, &[DType::BF16]),
    (Place::Gpu, 11008, (1 << 28) / 11008, &[DType::BF16]),
];

fn timed(n: usize, rows: usize) -> Case {
    let spec = QuantSpec::activation(4, false);
    let call = move |x: &[Tensor]| {
        let (x, last) = (x[0].clone(), Rc::new(RefCell::new(None)));
        let codes = last.clone();
        Ok(Call {
            run: Box::new(move || {
                *last.borrow_mut() = Some(Codes::quantize(&x, &spec)?);
                Ok(())
            }),
            results: Box::new(move || codes.borrow().iter().map(Codes::dequantize).collect()),
        })
    };
    let what =
        ("codes", "quantize-codes", "Asymmetric 4-bit quantisation of rows of n to codes of a byte, scales and zero points");
    Case::timed(what, (n, rows), vec![vec![rows, n]], Run::Call(Arc::new(call)), move |x, y| {
        exact::rows(n, x, &y[0], |_, got, x| exact::quantised("quantize-codes", got, &x[0], &spec, y[0].dtype()))
    })
    // Of 16 bits; codes have half the bytes.
    .moves(1.5 * n as f64 * rows as f64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::randn;
    use crate::{Tape, grid};

    /// What the codes stand for is what the operation makes, bit for bit, whatever the specification.
    #[test]
    fn codes_are_those_of_fake_quantisation() {
        for (bits, symmetric) in [(2, true), (4, false), (4, true), (8, false), (8, true)] {
            for group in [None, Some(8)] {
                let spec = QuantSpec { group, ..QuantSpec::activation(bits, symmetric) };
                for dtype in [DType::F64, DType::F32, DType::BF16] {
                    let x = randn([2, 3, 24], 1).to_dtype(dtype).unwrap();
                    let wide = if dtype == DType::BF16 { x.to_dtype(DType::F32).unwrap() } else { x.clone() };
                    let want = Tape::new().constant(wide).fake_quant(&spec).unwrap().into_value();
                    let got = Codes::quantize(&x, &spec).unwrap();
                    assert_eq!((got.rows(), got.cols(), got.group()), (6, 24, group.unwrap_or(24)));
                    assert_eq!(got.dequantize().unwrap().to_f64_vec().unwrap(), want.to_f64_vec().unwrap());
                    assert_eq!(got.zero().is_none(), symmetric);
                    let codes = got.to_vec().unwrap();
                    let (min, max) = (codes.iter().min().unwrap(), codes.iter().max().unwrap());
                    assert!(i32::from(*min) >= -(1 << (bits - 1)) && i32::from(*max) < 1 << (bits - 1), "{min} {max}");
                }
            }
        }
    }

    #[test]
    fn sums_are_those_of_the_parts_asked_for() {
        let codes = Codes::quantize(&randn([3, 24], 2), &QuantSpec::weight(4, true)).unwrap();
        let all = codes.to_vec().unwrap();
        for part in [24, 8, 24] {
            let Sums::Cpu(sums) = codes.sums(part).unwrap() else { panic!("on the CPU") };
            let want: Vec<i32> = all.chunks(part).map(|c| c.iter().map(|&c| i32::from(c)).sum()).collect();
            assert_eq!(*sums, want);
        }
    }

    #[test]
    fn codes_that_do_not_fit_are_refused() {
        let spec = QuantSpec::weight(4, true);
        let mut q = grid::Quantized {
            shape: vec![1, 2],
            group: 2,
            codes: vec![-8, 7],
            scale: Tensor::from_vec(vec![1f32], [1]).unwrap(),
            zero: Tensor::from_vec(vec![0f32], [1]).unwrap(),
        };
        Codes::new(&q, &spec).unwrap();
        q.codes[1] = 8;
        assert!(Codes::new(&q, &spec).unwrap_err().to_string().contains("expected -8 to 7, got 8"));
        q.codes[1] = 7;
        assert!(Codes::new(&q, &spec.grouped(1)).is_err());
        let floating = spec.by(grid::Rule::Floating(grid::floating::Format::Mxfp4));
        assert!(Codes::quantize(&randn([1, 32], 1), &floating).unwrap_err().to_string().contains("equal steps"));
    }
}
