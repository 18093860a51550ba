//! Root-mean-square normalisation of every row: `y = x r`, `r = 1/√(mean(x²) + ε)` (Zhang & Sennrich 2019). Backward:
//! `dx = r (dy − y mean(dy · y))`. Gains are usually folded into the linear layers that follow; a constant gain g, `y = x r g`, is there
//! for networks that are to run as they are.

use crate::device::cuda::{CudaDevice, Queue};
use crate::device::launch::{Check, Kind, View, Work};
use crate::device::{cpu, ffi};
use crate::ops::{At, Case, Pass, Place, Run, exact, normals, randn};
use crate::tape::{Grads, Inputs, Op, Saved, Var, operands};
use crate::{DType, Error, Result, Tensor};

/// The operation; keeps x and r of every row.
#[derive(Clone, Debug)]
pub(crate) struct RmsNorm {
    /// Added to the mean square, inside the root.
    pub eps: f64,
    /// Multiplies every row, `[cols]` in the type and on the device of the operand; it gets no gradient.
    pub gain: Option<Tensor>,
}

impl Op for RmsNorm {
    fn name(&self) -> &'static str {
        "rms_norm"
    }
    fn check(&self, inputs: &[Tensor]) -> Result<()> {
        let [x] = operands(inputs)?;
        match &self.gain {
            Some(g) if g.shape() != [x.cols()] => Err(Error::shape("rms_norm: gain", format!("[{}]", x.cols()), g.shape())),
            _ => Ok(()),
        }
    }
    fn cpu(&self, inputs: Inputs, save: &mut Saved) -> Result<Tensor> {
        let [x] = inputs.take()?;
        let (y, inverse) = self.forward_on_cpu(&x)?;
        keep(save, x, inverse);
        Ok(y)
    }
    fn gpu(&self, device: &CudaDevice, inputs: Inputs, save: &mut Saved) -> Result<Tensor> {
        let [x] = inputs.take()?;
        let (from, gain) = (x.clone().aligned()?, self.aligned_gain()?);
        let (y, inverse) = (Tensor::on(device, x.shape(), x.dtype())?, Tensor::on(device, &[x.rows()], DType::F32)?);
        let gain = gain.as_ref().map(Tensor::view).transpose()?;
        launch(device.queue(), y.view()?, inverse.view()?, from.view()?, gain, x.cols(), self.eps as f32)?;
        keep(save, x, inverse);
        Ok(y)
    }
    fn backward(&self, saved: Saved, dy: Tensor, _: &[bool]) -> Result<Grads> {
        let [x, inverse] = saved.take()?;
        Ok(vec![Some(self.backward_on_cpu(&x, &inverse, dy)?)])
    }
    /// In place of dy when unshared.
    fn gpu_backward(&self, device: &CudaDevice, saved: Saved, dy: Tensor, _: &[bool]) -> Result<Grads> {
        let [x, inverse] = saved.take()?;
        let (mut dy, x, gain) = (dy.aligned()?, x.aligned()?, self.aligned_gain()?);
        let dx = dy.or_new(device)?;
        let gain = gain.as_ref().map(Tensor::view).transpose()?;
        launch_backward(device.queue(), dx.view()?, dy.view()?, x.view()?, gain, inverse.view()?, x.cols())?;
        Ok(vec![Some(dx)])
    }
}

fn keep(save: &mut Saved, x: Tensor, inverse: Tensor) {
    if save.wants(0) {
        save.push(x);
        save.push(inverse);
    }
}

/// y and the factor of every row of `cols` values (`inverse`, `f32`), with a gain of x's kind where there is one; y may be x.
pub(crate) fn launch(
    queue: Queue<'_>,
    y: View<'_>,
    inverse: View<'_>,
    x: View<'_>,
    gain: Option<View<'_>>,
    cols: usize,
    eps: f32,
) -> Result<()> {
    let c = Check::new("rms_norm", queue);
    let (n, kind, work) = (x.len(), x.kind(), Work::moving("norm", 2 * x.bytes()));
    let rows = c.rows(n, cols)?;
    let (y, x, gain) = (c.operand("y", y, kind, n)?, c.operand("x", x, kind, n)?, c.optional("gain", gain, kind, cols)?);
    let inverse = c.operand("inverse", inverse, Kind::F32, rows)?;
    let (rows, cols, dtype) = (c.long(rows)?, c.long(cols)?, c.code(kind)?);
    // SAFETY: x and y have rows · cols values and may be the same, the gain cols or none, inverse one value a row.
    c.launch(work, |s| unsafe { ffi!(sq_rms_norm_forward(y, inverse, x, gain, rows, cols, eps, dtype, s)) })
}

/// dx from dy, what went in, and the factors of [`launch`]; dx may be dy.
pub(crate) fn launch_backward(
    queue: Queue<'_>,
    dx: View<'_>,
    dy: View<'_>,
    x: View<'_>,
    gain: Option<View<'_>>,
    inverse: View<'_>,
    cols: usize,
) -> Result<()> {
    let c = Check::new("rms_norm backward", queue);
    let (n, kind, work) = (x.len(), x.kind(), Work::moving("norm", 3 * x.bytes()));
    let rows = c.rows(n, cols)?;
    let (dx, dy, x) = (c.operand("dx", dx, kind, n)?, c.operand("dy", dy, kind, n)?, c.operand("x", x, kind, n)?);
    let gain = c.optional("gain", gain, kind, cols)?;
    let inverse = c.operand("inverse", inverse, Kind::F32, rows)?;
    let (rows, cols, dtype) = (c.long(rows)?, c.long(cols)?, c.code(kind)?);
    // SAFETY: dx, dy and x have rows · cols values, of which dx may be dy; the gain cols or none, inverse one value a row.
    c.launch(work, |s| unsafe { ffi!(sq_rms_norm_backward(dx, dy, x, gain, inverse, rows, cols, dtype, s)) })
}

impl RmsNorm {
    /// y, and r of every row.
    pub(super) fn forward_on_cpu(&self, x: &Tensor) -> Result<(Tensor, Tensor)> {
        let (y, inverse) = if x.dtype() == DType::F64 {
            let (y, inverse) = reference(x.as_slice()?, x.cols(), self.eps);
            (self.times_gain::<f64>(y)?, Tensor::from_vec(inverse, [x.rows()])?)
        } else {
            let (y, inverse) = fast(x.as_slice()?, x.cols(), self.eps as f32);
            (self.times_gain::<f32>(y)?, Tensor::from_vec(inverse, [x.rows()])?)
        };
        Ok((y.reshape(x.shape())?, inverse))
    }

    pub(super) fn backward_on_cpu(&self, x: &Tensor, inverse: &Tensor, dy: Tensor) -> Result<Tensor> {
        let (shape, cols) = (dy.shape().to_vec(), dy.cols());
        if dy.dtype() == DType::F64 {
            let dy = self.times_gain::<f64>(dy.into_owned()?)?;
            return Tensor::from_vec(reference_backward(dy.as_slice()?, x.as_slice()?, inverse.as_slice()?, cols), shape);
        }
        let mut dx = self.times_gain::<f32>(dy.into_owned()?)?.into_owned::<f32>()?;
        fast_backward(&mut dx, x.as_slice()?, inverse.as_slice()?, cols);
        Tensor::from_vec(dx, shape)
    }

    fn aligned_gain(&self) -> Result<Option<Tensor>> {
        self.gain.clone().map(Tensor::aligned).transpose()
    }

    /// Rows of values times the gain, as one flat tensor.
    fn times_gain<T: cpu::Real>(&self, mut y: Vec<T>) -> Result<Tensor> {
        if let Some(gain) = &self.gain {
            let gain = gain.to_dtype(T::DTYPE)?;
            let g = gain.as_slice::<T>()?;
            y.chunks_mut(g.len().max(1)).for_each(|row| row.iter_mut().zip(g).for_each(|(y, &g)| *y = *y * g));
        }
        let n = y.len();
        Tensor::from_vec(y, [n])
    }
}

impl Var<'_> {
    /// Divides every row (last axis) by the root of its mean square plus `eps`.
    ///
    /// # Errors
    /// Those of [`Tape::record`](crate::Tape::record).
    pub fn rms_norm(self, eps: f64) -> Result<Self> {
        self.tape().record(RmsNorm { eps, gain: None }, vec![self])
    }
    /// The same times a constant gain `[cols]`, where there is one.
    ///
    /// # Errors
    /// Those of [`Tape::record`](crate::Tape::record); a gain of another length, type or device.
    pub fn rms_norm_gain(self, eps: f64, gain: Option<&Tensor>) -> Result<Self> {
        self.tape().record(RmsNorm { eps, gain: gain.cloned() }, vec![self])
    }
}

/// y and r by the definition.
pub fn reference(x: &[f64], cols: usize, eps: f64) -> (Vec<f64>, Vec<f64>) {
    let row = |x: &[f64]| 1.0 / (x.iter().map(|x| x * x).sum::<f64>() / cols as f64 + eps).sqrt();
    let inverse: Vec<_> = x.chunks(cols.max(1)).map(row).collect();
    (x.iter().enumerate().map(|(i, x)| x * inverse[i / cols]).collect(), inverse)
}

/// dx by the formula above.
pub fn reference_backward(dy: &[f64], x: &[f64], inverse: &[f64], cols: usize) -> Vec<f64> {
    let rows = dy.chunks(cols.max(1)).zip(x.chunks(cols.max(1))).zip(inverse);
    rows.flat_map(|((dy, x), &r)| {
        let mean = dy.iter().zip(x).map(|(dy, x)| dy * x * r).sum::<f64>() / cols as f64;
        dy.iter().zip(x).map(move |(dy, x)| r * (dy - x * r * mean)).collect::<Vec<_>>()
    })
    .collect()
}

fn fast(x: &[f32], cols: usize, eps: f32) -> (Vec<f32>, Vec<f32>) {
    use rayon::prelude::*;
    let rows = cpu::rows_per_task(cols);
    let cols = cols.max(1);
    let (mut y, mut inverse) = (cpu::alloc(x.len()), vec![0f32; x.len() / cols]);
    y.par_chunks_mut(rows * cols).zip(x.par_chunks(rows * cols)).zip(inverse.par_chunks_mut(rows)).for_each(
        |((y, x), inverse)| {
            cpu::simd(
                #[inline(always)]
                || {
                    for ((y, x), inverse) in y.chunks_mut(cols).zip(x.chunks(cols)).zip(inverse) {
                        let r = 1.0 / (cpu::sum2(x, x, |a, b| a * b) / cols as f32 + eps).sqrt();
                        y.iter_mut().zip(x).for_each(|(y, x)| *y = x * r);
                        *inverse = r;
                    }
                },
            );
        },
    );
    (y, inverse)
}

/// Overwrites dy with dx.
fn fast_backward(dy: &mut [f32], x: &[f32], inverse: &[f32], cols: usize) {
    let cols = cols.max(1);
    cpu::map_rows(
        dy,
        x,
        cols,
        cols,
        #[inline(always)]
        |first, dy, x| {
            for ((dy, x), &r) in dy.chunks_mut(cols).zip(x.chunks(cols)).zip(&inverse[first..]) {
                let mean = cpu::sum2(dy, x, |a, b| a * b) * r / cols as f32;
                dy.iter_mut().zip(x).for_each(|(dy, x)| *dy = r * (*dy - x * (r * mean)));
            }
        },
    );
}

/// Worked cases.
pub(crate) fn cases() -> Vec<Case> {
    let case = |name: &str, shape: &[usize], eps: f64| {
        Case::new("rms_norm", name, normals(&[(shape, 21)]), move |mut v| v.remove(0).rms_norm(eps))
    };
    let gain = |name: &str, shape: &[usize]| {
        let g = randn([shape[shape.len() - 1]], 22).to_dtype(DType::BF16).expect("a float type");
        Case::new("rms_norm", name, normals(&[(shape, 23)]), move |mut v| {
            let x = v.remove(0);
            // The gain of the precision and device under test, rounded alike for all of them.
            let g = g.to_dtype(x.value().dtype())?.to_device(&x.value().device())?;
            x.rms_norm_gain(1e-5, Some(&g))
        })
    };
    let mut all = vec![
        gain("gain", &[5, 24]),
        gain("gain, one odd row", &[1, 37]),
        case("one value", &[1], 0.5),
        case("one row", &[1, 24], 1e-5),
        case("odd", &[3, 37], 1e-6),
        case("three axes", &[2, 3, 16], 1e-5),
        case("1024x384", &[1024, 384], 1e-5).large(),
    ];
    all.extend(Case::table(timed, SIZES));
    all.extend(Case::table(timed_backward, SIZES));
    all
}

const SIZES: &[At] = &[
    (Place::Cpu, 4096, 4096, &[DType::F32]),
    (Place::Cpu, 11008, 1524, &[DType::F32]),
    (Place::Gpu, 4096, 16384, &[DType::BF16, DType::F32]),
];
const TIMED_EPS: f64 = 1e-5;

fn graph() -> Run {
    Run::graph(|mut v| v.remove(0).rms_norm(TIMED_EPS))
}

fn timed(n: usize, rows: usize) -> Case {
    Case::timed(("rms_norm", "rms-norm", "RMSNorm of rows of n"), (n, rows), vec![vec![rows, n]], graph(), move |x, y| {
        exact::every(&["rms_norm"], n, x, y, |x| vec![reference(&x[0], n, TIMED_EPS).0])
    })
}

fn timed_backward(n: usize, rows: usize) -> Case {
    let what = ("rms_norm", "rms-norm-backward", "Its gradient");
    Case::timed(what, (n, rows), vec![vec![rows, n]], graph(), move |x, dx| {
        exact::every(&["rms_norm: dx"], n, x, dx, |x| {
            let inverse = reference(&x[0], n, TIMED_EPS).1;
            vec![reference_backward(&x[1], &x[0], &inverse, n)]
        })
    })
    .pass(Pass::Backward)
    .moves(3.0 * n as f64 * rows as f64)
}
