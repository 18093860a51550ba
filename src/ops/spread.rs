//! How far values spread from zero, as one number to minimise: `L = mean φ(x)` over all values, `dx = dL φ′(x)/count`.
//!
//! | measure | φ(x) | source |
//! |---|---|---|
//! | Whip | `exp(−\|x\|)` | Shao et al. 2025 (arXiv 2511.04063): lifts values from near zero, so that, the norm fixed, outliers shrink |
//! | kurtosis | `x⁴` | of rows of mean square 1, which rotations keep: the kurtosis about zero, 3 for a Gaussian, 1.8 for a uniform row |

use rayon::prelude::*;

use crate::device::cuda::{CudaDevice, Queue};
use crate::device::launch::{Check, Kind, View, Work};
use crate::device::{cpu, ffi};
use crate::ops::{At, Case, Pass, Place, Run, exact, kept_gradient, randn, sum};
use crate::tape::{Grads, Inputs, Op, Saved, Var, operands};
use crate::{DType, Result, Tensor};

/// Which φ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Measure {
    /// `exp(−|x|)`
    Whip,
    /// `x⁴`
    Kurtosis,
}

impl Measure {
    /// (φ(x), φ′(x)); φ′(0) = 0.
    fn at(self, x: f64) -> (f64, f64) {
        match self {
            Self::Whip => {
                let e = (-x.abs()).exp();
                (
                    e,
                    if x > 0.0 {
                        -e
                    } else if x < 0.0 {
                        e
                    } else {
                        0.0
                    },
                )
            }
            Self::Kurtosis => (x * x * x * x, 4.0 * x * x * x),
        }
    }

    /// [`Measure::at`] in `f32`, vectorised; overwrites x with `scale · φ′(x)` and returns Σ φ(x).
    #[inline(always)]
    fn fast(self, x: &mut [f32], scale: f32) -> f64 {
        let mut sum = 0f64;
        for chunk in x.chunks_mut(256) {
            let mut part = 0f32;
            match self {
                Self::Whip => chunk.iter_mut().for_each(|x| {
                    let e = cpu::exp_f32(-x.abs());
                    part += e;
                    *x = if *x == 0.0 { 0.0 } else { -(scale * e).copysign(*x) };
                }),
                Self::Kurtosis => chunk.iter_mut().for_each(|x| {
                    let cube = *x * *x * *x;
                    part += cube * *x;
                    *x = 4.0 * scale * cube;
                }),
            }
            sum += f64::from(part);
        }
        sum
    }
}

/// The operation; keeps the gradient.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Spread(pub Measure);

impl Op for Spread {
    fn name(&self) -> &'static str {
        "spread"
    }
    fn check(&self, inputs: &[Tensor]) -> Result<()> {
        match operands(inputs)? {
            [x] if x.is_empty() => Err(crate::Error::shape("spread", "at least one value", x.shape())),
            [_] => Ok(()),
        }
    }
    fn cpu(&self, inputs: Inputs, save: &mut Saved) -> Result<Tensor> {
        let [x] = inputs.take()?;
        let (shape, count) = (x.shape().to_vec(), x.len() as f64);
        let (loss, gradient) = if x.dtype() == DType::F64 {
            let of = |x: &f64| self.0.at(*x);
            let (values, slopes): (Vec<f64>, Vec<f64>) = x.as_slice::<f64>()?.iter().map(of).unzip();
            let slopes = slopes.into_iter().map(|s| s / count).collect();
            (Tensor::scalar(values.iter().sum::<f64>() / count), Tensor::from_vec(slopes, shape)?)
        } else {
            let mut y = x.into_owned::<f32>()?;
            let scale = (1.0 / count) as f32;
            let of = |x: &mut [f32]| {
                cpu::simd(
                    #[inline(always)]
                    || self.0.fast(x, scale),
                )
            };
            // Collected first, so that the order of the sum does not depend on the threads.
            let sums: Vec<f64> = y.par_chunks_mut(1 << 14).map(of).collect();
            (Tensor::scalar((sums.iter().sum::<f64>() / count) as f32), Tensor::from_vec(y, shape)?)
        };
        if save.wants(0) {
            save.push(gradient);
        }
        Ok(loss)
    }
    /// The gradient is made in the values' memory when unshared.
    fn gpu(&self, device: &CudaDevice, inputs: Inputs, save: &mut Saved) -> Result<Tensor> {
        let [x] = inputs.take()?;
        let gradient = x.alone(device)?;
        let sums = Tensor::on(device, &[sums(gradient.len())?], DType::F32)?;
        let mean = 1.0 / gradient.len() as f64;
        launch(device.queue(), gradient.view()?, sums.view()?, self.0, mean as f32)?;
        let loss = sum::scaled(device, mean, &sums)?;
        if save.wants(0) {
            save.push(gradient);
        }
        Ok(loss)
    }
    fn rounds_to(&self, _: DType) -> DType {
        DType::F32
    }
    fn backward(&self, saved: Saved, dy: Tensor, _: &[bool]) -> Result<Grads> {
        kept_gradient(saved, dy)
    }
}

impl Var<'_> {
    /// The mean of a measure over all values: a scalar, in `f64` for `f64` values and in `f32` for all others.
    ///
    /// # Errors
    /// Those of [`Tape::record`](crate::Tape::record); no values.
    pub fn spread(self, measure: Measure) -> Result<Self> {
        self.tape().record(Spread(measure), vec![self])
    }
}

/// Parts that the kernel sums `count` values in.
fn sums(count: usize) -> Result<usize> {
    let count = i64::try_from(count).map_err(|_| crate::Error::argument("spread", format!("{count} values are too many")))?;
    // SAFETY: arithmetic.
    let sums: i64 = unsafe { ffi!(sq_spread_sums(count)) };
    Ok(sums as usize)
}

/// Parts (`f32`) of Σ φ(x), in order, and the values overwritten by `scale · φ′(x)`.
fn launch(queue: Queue<'_>, values: View<'_>, parts: View<'_>, measure: Measure, scale: f32) -> Result<()> {
    let c = Check::new("spread", queue);
    let (n, kind) = (values.len(), values.kind());
    let (values, parts) = (c.operand("values", values, kind, n)?, c.operand("sums", parts, Kind::F32, sums(n)?)?);
    let (count, dtype) = (c.long(n)?, c.code(kind)?);
    let which = match measure {
        Measure::Whip => 0,
        Measure::Kurtosis => 1,
    };
    // SAFETY: n values, and as many sums as the kernel says it writes.
    c.launch(Work::of("spread"), |s| unsafe { ffi!(sq_spread(values, parts, which, count, scale, dtype, s)) })
}

/// Worked cases: zeros, outliers, odd sizes.
pub(crate) fn cases() -> Vec<Case> {
    let case = |measure: Measure, name: &str, shape: &[usize]| {
        let shape = shape.to_vec();
        let operands = move || {
            let mut x = randn(shape.clone(), 81).into_vec::<f64>().expect("f64");
            if let Some(first) = x.first_mut() {
                *first *= 8.0; // an outlier
            }
            vec![Tensor::from_vec(x, shape.clone()).expect("the same size")]
        };
        Case::new("spread", format!("{name} {measure:?}"), operands, move |mut v| v.remove(0).spread(measure))
    };
    let both = |measure| {
        [case(measure, "one value", &[1, 1]), case(measure, "odd", &[5, 37]), case(measure, "1024x384", &[1024, 384]).large()]
    };
    let mut all = [both(Measure::Whip), both(Measure::Kurtosis)].concat();
    all.extend(Case::table(timed_whip, SIZES));
    all.extend(Case::table(timed_kurtosis, SIZES));
    all
}

const SIZES: &[At] = &[(Place::Cpu, 4096, 4096, &[DType::F32]), (Place::Gpu, 4096, 16384, &[DType::BF16, DType::F32])];

fn timed_whip(n: usize, rows: usize) -> Case {
    timed(("spread", "whip", "Whip of rows of n, the gradient included"), Measure::Whip, n, rows)
}

fn timed_kurtosis(n: usize, rows: usize) -> Case {
    timed(("spread", "kurtosis", "Fourth power of rows of n, the gradient included"), Measure::Kurtosis, n, rows)
}

fn timed(what: (&'static str, &'static str, &'static str), measure: Measure, n: usize, rows: usize) -> Case {
    let graph = Run::graph(move |mut v| v.remove(0).spread(measure));
    Case::timed(what, (n, rows), vec![vec![rows, n]], graph, move |x, dx| {
        exact::rows(n, x, &dx[0], |_, got, x| {
            let got: Vec<f64> = got.iter().map(|g| g * (n * rows) as f64).collect();
            let want: Vec<f64> = x[0].iter().map(|x| measure.at(*x).1).collect();
            exact::close("spread: dx", &got, &want, dx[0].dtype(), 1.0)
        })
    })
    .pass(Pass::Recorded)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Device, Tape};

    #[test]
    fn spread_values_measure_less() {
        // Rows of one norm: all of it in one channel, Gaussian, evenly spread.
        let n = 64;
        let mut spike = vec![0f64; n];
        spike[3] = (n as f64).sqrt();
        let gaussian = randn([n], 1).into_vec::<f64>().unwrap();
        let norm = (gaussian.iter().map(|x| x * x).sum::<f64>() / n as f64).sqrt();
        let rows = [spike, gaussian.into_iter().map(|x| x / norm).collect(), vec![1.0; n]];
        for measure in [Measure::Whip, Measure::Kurtosis] {
            for dtype in [DType::F64, DType::F32, DType::BF16] {
                let of = |row: &Vec<f64>| {
                    let tape = Tape::new();
                    let x = Tensor::from_vec(row.clone(), [1, n]).unwrap().to_dtype(dtype).unwrap();
                    tape.constant(x).spread(measure).unwrap().value().item().unwrap()
                };
                let [spike, gaussian, even] = [of(&rows[0]), of(&rows[1]), of(&rows[2])];
                assert!(spike > gaussian && gaussian > even, "{measure:?} {dtype}: {spike} {gaussian} {even}");
            }
        }
        let tape = Tape::new();
        let zero = tape.variable(Tensor::zeros([2, 2], DType::F32, &Device::Cpu).unwrap());
        let loss = zero.clone().spread(Measure::Whip).unwrap();
        let mut grads = tape.backward(loss).unwrap();
        assert_eq!(grads.take(&zero).unwrap().to_f64_vec().unwrap(), [0.0; 4]);
    }
}
