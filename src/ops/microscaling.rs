//! Encoders of [MXFP4 and NVFP4](crate::grid::floating), of values as they are or of their Hadamard transforms in blocks: packed elements
//! and the bytes of scales, as files and tensor cores take them. [`Var::fake_quant`](crate::Var::fake_quant) of a
//! [`QuantSpec::floating`] gives the same elements times scales.

use std::rc::Rc;
use std::sync::Arc;

use rayon::prelude::*;

use crate::device::cuda::{CudaBuffer, CudaDevice, Queue};
use crate::device::ffi;
use crate::device::launch::{Check, Kind, View, Work};
use crate::grid::floating::{Format, e2m1, from_e2m1, from_e4m3};
use crate::grid::{Clip, Grid, QuantSpec, Target};
use crate::hadamard::Hadamard;
use crate::ops::{At, Call, Case, Place, Run, exact, hadamard, normals};
use crate::{DType, Device, Error, Result, Tensor};

/// A tensor in blocks.
#[derive(Clone, Debug, PartialEq)]
pub struct Encoded {
    /// How.
    pub format: Format,
    /// Shape of the tensor.
    pub shape: Vec<usize>,
    /// Two elements a byte, the first in the low half.
    pub codes: Vec<u8>,
    /// A byte a block: E8M0 of MXFP4, E4M3 of NVFP4.
    pub scales: Vec<u8>,
    /// What scales are multiples of; 1 for MXFP4.
    pub unit: f32,
}

impl Encoded {
    /// Elements times scales, in `f32`.
    ///
    /// # Errors
    /// Bytes whose numbers do not belong to the shape.
    pub fn decode(&self) -> Result<Tensor> {
        let block = self.format.block();
        let values: usize = self.shape.iter().product();
        for (what, got, expected) in [("elements", 2 * self.codes.len(), values), ("scales", self.scales.len(), values / block)] {
            if got != expected {
                return Err(Error::argument(self.format.name(), format!("expected {expected} {what}, got {got}")));
            }
        }
        let scale = |byte: u8| match self.format {
            Format::Mxfp4 => (f32::from(byte) - 127.0).exp2(),
            Format::Nvfp4 => from_e4m3(byte) * self.unit,
        };
        let element =
            |i: usize| f32::from(from_e2m1(if i.is_multiple_of(2) { self.codes[i / 2] & 15 } else { self.codes[i / 2] >> 4 }));
        let value = |i: usize| element(i) * (0.5 * scale(self.scales[i / block]));
        Tensor::from_vec((0..values).map(value).collect::<Vec<f32>>(), self.shape.clone())
    }
}

/// Encodes a tensor, its rows transformed in blocks of `rotated` values before where that is given. `f64` is rounded to `f32` first.
///
/// # Errors
/// Rows that blocks do not divide; a size of blocks that [`Hadamard::in_blocks`] does not know, or on a GPU that is not a power of two from
/// 16 to 512.
pub fn encode(x: &Tensor, format: Format, rotated: Option<usize>) -> Result<Encoded> {
    let spec = QuantSpec::floating(format, Target::Activation);
    spec.group_size(x.cols())?;
    let map = rotated.map(|size| Hadamard::in_blocks(x.cols(), size)).transpose()?;
    let x = if x.dtype() == DType::F64 { x.to_dtype(DType::F32)? } else { x.clone() };
    let shape = x.shape().to_vec();
    if let Device::Cuda(device) = x.device() {
        let x = x.aligned()?;
        let largest = if format == Format::Nvfp4 { Some(largest_encoded(&device, &x, rotated)?) } else { None };
        let bytes = |n: usize, what| device.buffer(n, Kind::U8, what);
        let (codes, scales) = (bytes(x.len() / 2, "elements")?, bytes(x.len() / format.block(), "scales")?);
        let out = Outputs { codes: Some(codes.view()), scales: Some(scales.view()), y: None };
        let view = largest.as_ref().map(Tensor::view).transpose()?;
        launch(device.queue(), out, view, x.view()?, (format, 1.0), rotated.unwrap_or(0))?;
        let unit = format.unit(|| largest.as_ref().map_or(Ok(0.0), |t| Ok(t.to_vec::<f32>()?[0])))?;
        return Ok(Encoded { format, shape, codes: downloaded(&codes)?, scales: downloaded(&scales)?, unit });
    }
    let x = x.to_dtype(DType::F32)?;
    let x = match &map {
        Some(map) => hadamard::transform(x, map, false)?,
        None => x,
    };
    let x = x.as_slice::<f32>()?;
    let most = |x: &[f32]| x.iter().fold(0f32, |m, x| m.max(x.abs()));
    let spec = spec.of_tensor(|| Ok(most(x)))?;
    let scales = x.par_chunks(format.block()).map(|block| format.scale_byte(most(block), spec.unit)).collect();
    let pairs = |block: &[f32]| {
        let grid: Grid<f32> = crate::grid::vector_grid(&spec, block);
        let bits = |x: f32| e2m1(grid.code(x) as i16);
        block.as_chunks::<2>().0.iter().map(|&[a, b]| bits(a) | bits(b) << 4).collect::<Vec<_>>()
    };
    let codes = x.par_chunks(format.block()).flat_map_iter(pairs).collect();
    Ok(Encoded { format, shape, codes, scales, unit: spec.unit })
}

/// The largest magnitude of a tensor on the CPU; `f64` is rounded to `f32`.
pub(crate) fn largest_magnitude(x: &Tensor) -> Result<f32> {
    match x.dtype() {
        DType::F64 => Ok(x.as_slice::<f64>()?.iter().fold(0f64, |m, x| m.max(x.abs())) as f32),
        _ => Ok(x.to_dtype(DType::F32)?.as_slice::<f32>()?.iter().fold(0f32, |m, x| m.max(x.abs()))),
    }
}

/// The same on a GPU, where it stays: `[1]` in `f32`.
fn largest(device: &CudaDevice, x: &Tensor) -> Result<Tensor> {
    let most = Tensor::on(device, &[1], DType::F32)?;
    launch_largest(device.queue(), most.view()?, x.view()?)?;
    Ok(most)
}

/// Fake quantisation by a floating-point format on a GPU, the rows transformed in blocks before where the map is one of the kernel's.
pub(crate) fn gpu(device: &CudaDevice, x: Tensor, spec: &QuantSpec, map: Option<&Hadamard>) -> Result<Tensor> {
    let Some(format) = spec.rule.floating() else {
        return Err(Error::argument("microscaling", "expected blocks of floating-point numbers"));
    };
    spec.group_size(x.cols())?;
    let Clip::Ratio(clip) = spec.clip else { return Err(Error::argument(format.name(), "expected a clip ratio")) };
    // The largest magnitude of what is transformed is only known when it is.
    let fused = |map: &Hadamard| format == Format::Mxfp4 && map.k() == 1 && (16..=512).contains(&(map.n() / map.blocks()));
    let (dtype, narrow) = (x.dtype(), x.dtype().is_half());
    let (x, rotated) = match map {
        Some(map) if fused(map) => (x, map.n() / map.blocks()),
        // What is transformed is not rounded before it is quantised.
        Some(map) => (hadamard::transform(if narrow { x.to_dtype(DType::F32)? } else { x }, map, false)?, 0),
        None => (x, 0),
    };
    let mut x = x.aligned()?;
    let most = if format == Format::Nvfp4 { Some(largest(device, &x)?) } else { None };
    let y = x.or_new(device)?;
    let out = Outputs { y: Some(y.view()?), ..Outputs::default() };
    let view = most.as_ref().map(Tensor::view).transpose()?;
    launch(device.queue(), out, view, x.view()?, (format, clip as f32), rotated)?;
    y.to_dtype(dtype)
}

/// What the kernel writes, each where wanted.
#[derive(Clone, Copy, Default)]
pub(crate) struct Outputs<'a> {
    /// Elements times scales, of x's kind; may be x.
    pub y: Option<View<'a>>,
    /// `u8`, two elements each.
    pub codes: Option<View<'a>>,
    /// `u8`, one a block.
    pub scales: Option<View<'a>>,
}

/// Encodes x, Hadamard-transformed in blocks of `rotated` values unless that is 0; `largest` is the largest magnitude of what is encoded
/// (one `f32`; none: scales are multiples of 1).
pub(crate) fn launch(
    queue: Queue<'_>,
    out: Outputs<'_>,
    largest: Option<View<'_>>,
    x: View<'_>,
    (format, clip): (Format, f32),
    rotated: usize,
) -> Result<()> {
    let c = Check::new("microscaling", queue);
    let (n, kind, nvfp4) = (x.len(), x.kind(), i32::from(format == Format::Nvfp4));
    if !n.is_multiple_of(format.block().max(rotated)) {
        let message = format!("expected blocks of {}, got {n} values", format.block().max(rotated));
        return Err(Error::argument(format.name(), message));
    }
    let work = Work::moving("quantise", 2 * x.bytes());
    let (y, x) = (c.optional("y", out.y, kind, n)?, c.operand("x", x, kind, n)?);
    let codes = c.optional("codes", out.codes, Kind::U8, n / 2)?;
    let scales = c.optional("scales", out.scales, Kind::U8, n / format.block())?;
    let largest = c.optional("largest", largest, Kind::F32, 1)?;
    let (n, rotated, dtype) = (c.long(n)?, crate::device::launch::int("rotated", rotated)?, c.code(kind)?);
    // SAFETY: x has n values, every output is null or as large as kernels.h asks; y may be x.
    c.launch(work, |s| unsafe { ffi!(sq_microscale(y, codes, scales, largest, x, n, rotated, nvfp4, clip, dtype, s)) })
}

/// The largest magnitude of x, one `f32`.
pub(crate) fn launch_largest(queue: Queue<'_>, largest: View<'_>, x: View<'_>) -> Result<()> {
    let c = Check::new("largest", queue);
    let (n, kind, work) = (x.len(), x.kind(), Work::moving("quantise", x.bytes()));
    let (largest, x) = (c.operand("largest", largest, Kind::F32, 1)?, c.operand("x", x, kind, n)?);
    let (n, dtype) = (c.long(n)?, c.code(kind)?);
    // SAFETY: x has n values, largest one float.
    c.launch(work, |s| unsafe { ffi!(sq_largest(largest, x, n, dtype, s)) })
}

/// Worked cases: both formats, one block and many, clipped, zeros, tiny blocks beside large ones, behind Hadamard matrices in blocks.
pub(crate) fn cases() -> Vec<Case> {
    let spec = |format| QuantSpec::floating(format, Target::Activation);
    let case = |name: String, [rows, cols]: [usize; 2], spec: QuantSpec, spread: f64| {
        let make = move || {
            let mut v = crate::ops::randn([rows, cols], 71).into_vec::<f64>().expect("f64");
            v.iter_mut().enumerate().for_each(|(i, x)| *x *= (-spread * (i / 16 % 8) as f64).exp2());
            if rows > 2 {
                v[..cols].fill(0.0);
            }
            vec![Tensor::from_vec(v, [rows, cols]).expect("rows x cols")]
        };
        Case::new("microscaling", name, make, move |mut v| v.remove(0).fake_quant(&spec)).rounds()
    };
    let mut all = vec![];
    for format in Format::ALL {
        let block = format.block();
        all.push(case(format!("{format}, one block"), [1, block], spec(format), 0.0));
        all.push(case(format!("{format}, zeros and small blocks"), [5, 6 * block], spec(format), 2.0));
        all.push(case(format!("{format}, clipped"), [3, 2 * block], spec(format).clipped(Clip::Ratio(0.8)), 0.5));
        all.push(case(format!("{format}, 257x1056"), [257, 1056], spec(format), 1.0).large());
        for size in [16, 32, 64, 128, 256, 512] {
            let cols = 3 * size.max(32);
            let name = format!("{format} behind Hadamard matrices of {size}");
            let rotated = Case::new("microscaling", name, normals(&[(&[7, cols], size as u64)]), move |mut v| {
                let map = Hadamard::in_blocks(cols, size)?;
                v.remove(0).hadamard_fake_quant_by(&map, &QuantSpec::floating(format, Target::Activation))
            });
            all.push(rotated.rounds());
        }
    }
    all.extend(Case::table(|n, rows| timed(Format::Mxfp4, n, rows), SIZES));
    all.extend(Case::table(|n, rows| timed(Format::Nvfp4, n, rows), SIZES));
    for make in ENCODERS {
        all.extend(Case::table(*make, SIZES));
    }
    all
}

const ENCODERS: &[fn(usize, usize) -> Case] = &[
    |n, rows| timed_encoder("mxfp4-encode", "The same into packed elements and bytes of scales", Format::Mxfp4, None, (n, rows)),
    |n, rows| {
        let about = "The same into packed elements and bytes of scales, the largest magnitude known";
        timed_encoder("nvfp4-encode", about, Format::Nvfp4, None, (n, rows))
    },
    |n, rows| {
        let about = "Hadamard matrices of 32 before MXFP4, in one pass on a GPU";
        timed_encoder("hadamard-mxfp4-encode", about, Format::Mxfp4, Some(32), (n, rows))
    },
    |n, rows| {
        let about = "Hadamard matrices of 16 before NVFP4, in one pass on a GPU, the largest magnitude known";
        timed_encoder("hadamard-nvfp4-encode", about, Format::Nvfp4, Some(16), (n, rows))
    },
];

/// Encodes into memory that is there already.
fn timed_encoder(
    kernel: &'static str,
    about: &'static str,
    format: Format,
    rotated: Option<usize>,
    (n, rows): (usize, usize),
) -> Case {
    let run = Run::Call(Arc::new(move |x: &[Tensor]| {
        let x = x[0].clone();
        let Device::Cuda(device) = x.device() else {
            return Ok(Call::new(move || Ok(vec![encode(&x, format, rotated)?.decode()?])));
        };
        let x = x.aligned()?;
        let most = match format {
            Format::Mxfp4 => None,
            Format::Nvfp4 => Some(largest_encoded(&device, &x, rotated)?),
        };
        let bytes = |n: usize, what| device.buffer(n, Kind::U8, what);
        let codes = Rc::new((bytes(x.len() / 2, "elements")?, bytes(x.len() / format.block(), "scales")?));
        let (written, shape, on) = (codes.clone(), x.shape().to_vec(), device.clone());
        let largest = most.clone();
        Ok(Call {
            run: Box::new(move || {
                let out = Outputs { codes: Some(written.0.view()), scales: Some(written.1.view()), y: None };
                let largest = largest.as_ref().map(Tensor::view).transpose()?;
                launch(on.queue(), out, largest, x.view()?, (format, 1.0), rotated.unwrap_or(0))
            }),
            results: Box::new(move || {
                let unit = format.unit(|| most.as_ref().map_or(Ok(0.0), |t| Ok(t.to_vec::<f32>()?[0])))?;
                let (codes, scales) = (downloaded(&codes.0)?, downloaded(&codes.1)?);
                Ok(vec![Encoded { format, shape: shape.clone(), codes, scales, unit }.decode()?])
            }),
        })
    }));
    let spec = QuantSpec::floating(format, Target::Activation);
    let written = 0.25 + 0.5 / format.block() as f64; // of a value of 16 bits
    Case::timed(("microscaling", kernel, about), (n, rows), vec![vec![rows, n]], run, move |x, y| {
        let map = rotated.map(|size| Hadamard::in_blocks(n, size)).transpose()?;
        // In f32, as it is encoded: NVFP4's unit is that of the largest magnitude before any rounding.
        let whole = x[0].to_device(&Device::Cpu)?.to_dtype(DType::F32)?;
        let turned = map.as_ref().map_or(Ok(whole.clone()), |map| hadamard::transform(whole, map, false))?;
        let spec = spec.of_tensor(|| largest_magnitude(&turned))?;
        exact::rows(n, x, &y[0], |_, got, x| {
            let x = map.as_ref().map_or_else(|| x[0].to_vec(), |map| exact::hadamard(&x[0], map));
            exact::quantised("microscaling", got, &x, &spec, DType::F32)
        })
    })
    .moves((1.0 + written) * n as f64 * rows as f64)
}

/// The largest magnitude of what is encoded.
fn largest_encoded(device: &CudaDevice, x: &Tensor, rotated: Option<usize>) -> Result<Tensor> {
    match rotated {
        None => largest(device, x),
        Some(size) => {
            let map = Hadamard::in_blocks(x.cols(), size)?;
            largest(device, &hadamard::transform(x.to_dtype(DType::F32)?, &map, false)?)
        }
    }
}

/// All bytes of a buffer.
fn downloaded(buffer: &CudaBuffer) -> Result<Vec<u8>> {
    let mut bytes = vec![0; buffer.len()];
    buffer.download(0, &mut bytes)?;
    Ok(bytes)
}

const SIZES: &[At] = &[(Place::Cpu, 4096, 1024, &[DType::F32]), (Place::Gpu, 4096, 1 << 16, &[DType::BF16])];

fn timed(format: Format, n: usize, rows: usize) -> Case {
    let spec = QuantSpec::floating(format, Target::Activation);
    let graph = Run::graph(move |mut v| v.remove(0).fake_quant(&spec));
    let what = match format {
        Format::Mxfp4 => ("microscaling", "mxfp4", "Blocks of 32 numbers E2M1 with a scale E8M0 each, and back"),
        Format::Nvfp4 => {
            ("microscaling", "nvfp4", "Blocks of 16 numbers E2M1 with a scale E4M3 each, and back; the largest magnitude first")
        }
    };
    let moved = if format == Format::Nvfp4 { 3.0 } else { 2.0 };
    Case::timed(what, (n, rows), vec![vec![rows, n]], graph, move |x, y| {
        let spec = spec.of_tensor(|| largest_magnitude(&x[0].to_device(&Device::Cpu)?))?;
        exact::rows(n, x, &y[0], |_, got, x| exact::quantised("microscaling", got, &x[0], &spec, y[0].dtype()))
    })
    .rounds()
    .moves(moved * n as f64 * rows as f64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Tape;
    use crate::ops::randn;

    /// Packed bytes hold what fake quantisation gives, rotated or not, and a second encoding changes nothing.
    #[test]
    fn bytes_hold_the_values_of_fake_quantisation() {
        for format in Format::ALL {
            for rotated in [None, Some(16), Some(64)] {
                let x = randn([5, 128], 3).to_dtype(DType::F32).unwrap();
                let encoded = encode(&x, format, rotated).unwrap();
                assert_eq!((encoded.codes.len(), encoded.scales.len()), (5 * 64, 5 * 128 / format.block()));
                let tape = Tape::new();
                let spec = QuantSpec::floating(format, Target::Activation);
                let x = tape.constant(x);
                let y = match rotated {
                    Some(size) => x.hadamard_fake_quant_by(&Hadamard::in_blocks(128, size).unwrap(), &spec),
                    None => x.fake_quant(&spec),
                };
                let (want, got) = (y.unwrap().into_value(), encoded.decode().unwrap());
                assert_eq!(got.to_f64_vec().unwrap(), want.to_f64_vec().unwrap(), "{format} {rotated:?}");
                // The largest magnitude may be rounded away, and NVFP4's unit with it.
                if format == Format::Mxfp4 {
                    let again = encode(&got, format, None).unwrap().decode().unwrap();
                    assert_eq!(again.to_f64_vec().unwrap(), got.to_f64_vec().unwrap());
                }
            }
        }
        let short = Encoded { scales: vec![], ..encode(&randn([1, 32], 1), Format::Mxfp4, None).unwrap() };
        assert!(short.decode().unwrap_err().to_string().contains("expected 1 scales, got 0"));
        assert!(
            encode(&randn([2, 24], 1), Format::Mxfp4, None).unwrap_err().to_string().contains("32 does not divide rows of 24")
        );
    }
}
