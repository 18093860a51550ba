//! Codes and grids of what learned clip ratios quantise, for outputs and for quantisers that need grids alone.

use super::{ClippedFakeQuant, ratios};
use crate::device::cuda::{CudaDevice, Queue};
use crate::device::ffi;
use crate::device::launch::{Check, Kind, View, Work};
use crate::grid::{Grid, GridFloat, QuantSpec, Quantized};
use crate::ops::fake_quant::{launch_spec, on_grids, with_grids};
use crate::tape::Op;
use crate::{DType, Device, Result, Tensor};

/// The codes and grids that [`Var::clipped_fake_quant`](crate::Var::clipped_fake_quant) would use. 16-bit tensors are widened first.
///
/// # Errors
/// A group that does not divide the columns; kinds that do not divide the rows; logarithms of another type than `f64` beside `f64`, else
/// `f32`; a failed launch.
pub fn quantize_clipped(x: &Tensor, spec: &QuantSpec, a: &Tensor) -> Result<Quantized> {
    fn go<T: GridFloat>(x: &Tensor, group: usize, spec: &QuantSpec, a: &Tensor) -> Result<Quantized> {
        let ratios = ratios::<T>(a)?;
        on_grids(x, group, |i, g| Grid::clipped(spec, g, ratios[i % ratios.len()]).2)
    }
    ClippedFakeQuant { spec: *spec, blocked: false }.check(&[x.clone(), a.clone()])?;
    let group = spec.group_size(x.cols())?;
    if let Device::Cuda(device) = x.device() {
        let [scale, zero] = gpu_grids(&device, &x.clone().aligned()?, spec, a)?;
        let cpu = Device::Cpu;
        return with_grids(&x.to_device(&cpu)?, spec, group, [scale.to_device(&cpu)?, zero.to_device(&cpu)?]);
    }
    match x.dtype() {
        DType::F64 => go::<f64>(x, group, spec, a),
        _ => go::<f32>(&x.to_dtype(DType::F32)?, group, spec, a),
    }
}

/// Scale and zero point of every group of x on a GPU, `[rows, cols/group]` each in `f32`, there too.
///
/// # Errors
/// Those of [`quantize_clipped`].
pub(crate) fn gpu_grids(device: &CudaDevice, x: &Tensor, spec: &QuantSpec, a: &Tensor) -> Result<[Tensor; 2]> {
    let group = spec.group_size(x.cols())?;
    let shape = [x.rows(), x.cols().div_ceil(group)];
    let [scale, zero] = [Tensor::on(device, &shape, DType::F32)?, Tensor::on(device, &shape, DType::F32)?];
    let a = a.to_device(&Device::Cuda(device.clone()))?.aligned()?;
    launch_grids(device.queue(), (scale.view()?, zero.view()?), x.view()?, a.view()?, x.cols(), spec)?;
    if spec.stored.is_none() {
        return Ok([scale, zero]);
    }
    let rounded = scale.to_vec::<f32>()?.into_iter().map(|s| spec.scale(s)).collect();
    Ok([Tensor::from_vec(rounded, shape)?.to_device(&Device::Cuda(device.clone()))?, zero])
}

/// The grid of every group of rows of `cols` values of x, the ends of its range clipped by the ratios of its kind.
fn launch_grids(
    queue: Queue<'_>,
    (scale, zero): (View<'_>, View<'_>),
    x: View<'_>,
    a: View<'_>,
    cols: usize,
    spec: &QuantSpec,
) -> Result<()> {
    let c = Check::new("grids of clipped_fake_quant", queue);
    let (n, kind, work) = (x.len(), x.kind(), Work::moving("quantise", x.bytes()));
    // Ranges that include 0 are those of whole rows to the kernel: every group is one.
    let (cols, spec) = match spec.group {
        Some(_) if spec.includes_zero() => (spec.group_size(cols)?, &QuantSpec { group: None, ..*spec }),
        _ => (cols, spec),
    };
    let (rows, kinds) = (c.rows(n, cols)?, a.len() / 2);
    let groups = c.product(&[rows, cols.div_ceil(spec.group_size(cols)?)])?;
    let (scale, zero) = (c.operand("scale", scale, Kind::F32, groups)?, c.operand("zero", zero, Kind::F32, groups)?);
    let (x, a) = (c.operand("x", x, kind, n)?, c.operand("a", a, Kind::F32, 2 * kinds)?);
    let (rows, cols, kinds) = (c.long(rows)?, c.long(cols)?, c.long(kinds)?);
    let (quant, dtype) = (launch_spec(spec)?, c.code(kind)?);
    // SAFETY: x has rows · cols values of one kind, a two f32 a kind, scale and zero one a group.
    c.launch(work, |s| unsafe { ffi!(sq_clipped_grids(scale, zero, x, a, rows, cols, kinds, quant, dtype, s)) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Tape;
    use crate::ops::randn;

    /// What the codes stand for is what the operation makes, bit for bit, and scales are of the type that stores them.
    #[test]
    fn codes_are_those_of_the_operation() {
        for (symmetric, group) in [(true, None), (false, None), (true, Some(8)), (false, Some(8))] {
            let spec = QuantSpec { group, ..QuantSpec::weight(4, symmetric) };
            let kinds = 6 * 24 / group.unwrap_or(24);
            for dtype in [DType::F64, DType::F32] {
                let x = randn([6, 24], 1).to_dtype(dtype).unwrap();
                let a: Vec<f64> = (0..2 * kinds).map(|i| -0.05 * (i % 7) as f64).collect();
                let a = Tensor::from_vec(a, [kinds, 2]).unwrap().to_dtype(dtype).unwrap();
                let tape = Tape::new();
                let want = tape.constant(x.clone()).clipped_fake_quant(&spec, tape.constant(a.clone()), false).unwrap();
                let got = quantize_clipped(&x, &spec, &a).unwrap();
                assert_eq!(got.dequantize().unwrap().to_f64_vec().unwrap(), want.value().to_f64_vec().unwrap());
                let stored = quantize_clipped(&x, &spec.stored(DType::BF16), &a).unwrap();
                let scales = stored.scale.to_f64_vec().unwrap();
                assert!(scales.iter().all(|s| DType::BF16.round(*s) == *s));
                assert_ne!(scales, got.scale.to_f64_vec().unwrap());
            }
            let wrong = Tensor::zeros([5, 2], DType::F32, &Device::Cpu).unwrap();
            assert!(quantize_clipped(&randn([6, 24], 1).to_dtype(DType::F32).unwrap(), &spec, &wrong).is_err());
        }
    }
}
