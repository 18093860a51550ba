//! What weights are quantised on: the second moments of a linear's input over calibration text.
//!
//! Two streams of the text run through the network. x is a linear's input in full precision, x̃ the same where all that comes before
//! is quantised. H ([`Hessian`](crate::quant::Hessian)) is that of x̃, D is how the two differ.

use crate::device::cpu::{self, Real, Strides};
use crate::quant::gptq_gpu as gpu;
use crate::quant::hessian::{ROWS, Sum};
use crate::ranks::Group;
use crate::tensor::room;
use crate::{DType, Device, Error, Result, Tensor};

/// H, and D where the full-precision stream was there.
#[derive(Clone, Debug)]
pub struct Moments {
    /// `H = (2/n) Σ x̃ᵀ x̃ [in, in]` in `f64`.
    pub hessian: Tensor,
    /// `D = (2/n) Σ (x − x̃)ᵀ x̃ [in, in]` in `f64`, not symmetric: rows are differences.
    pub drift: Option<Tensor>,
}

impl From<Tensor> for Moments {
    /// A Hessian alone.
    fn from(hessian: Tensor) -> Self {
        Self { hessian, drift: None }
    }
}

/// `D = (2/n) Σ (x − x̃)ᵀ x̃ [in, in]`, added up in `f64`, where the inputs are.
///
/// For `f64` inputs everything is; for others, the difference is rounded to the inputs' type and products are summed as those of
/// [`Hessian`](crate::quant::Hessian) are.
///
/// ```
/// use spinquant::{Tensor, quant::Drift};
/// let tensor = |v: [f32; 4]| Tensor::from_vec(v.to_vec(), [2, 2]);
/// let mut d = Drift::new(2);
/// d.add(&tensor([1.5, 2.0, 3.0, 5.0])?, &tensor([1.0, 2.0, 3.0, 4.0])?)?;
/// assert_eq!(d.finish(1)?.to_vec::<f64>()?, [1.0, 2.0, 6.0, 8.0]);
/// # Ok::<(), spinquant::Error>(())
/// ```
#[derive(Clone)]
pub struct Drift {
    cols: usize,
    sum: Sum,
}

impl std::fmt::Debug for Drift {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Drift of {} channels", self.cols)
    }
}

impl Drift {
    /// For inputs of `cols` channels.
    pub fn new(cols: usize) -> Self {
        Self { cols, sum: Sum::Empty }
    }

    /// Adds inputs `[.., in]` of the full-precision stream and the same of the quantised one. The first ones say where D is.
    ///
    /// # Errors
    /// Inputs of different shapes, types or devices, of another width or on another device than the first; a type that is not
    /// floating-point.
    pub fn add(&mut self, exact: &Tensor, quantized: &Tensor) -> Result<()> {
        let n = self.cols;
        if exact.device() != quantized.device() {
            let message = format!("inputs on {} and {}", exact.device(), quantized.device());
            return Err(Error::device("drift", message));
        }
        self.sum.begin("drift", n, quantized)?;
        match &mut self.sum {
            Sum::Host(sum) => add(sum, n, &exact.to_device(&Device::Cpu)?, &quantized.to_device(&Device::Cpu)?),
            Sum::Gpu(d, sum) => {
                let quantized = quantized.to_device(&sum.device())?;
                let difference = Tensor::axpby(1.0, exact.to_device(&sum.device())?, -1.0, quantized.clone())?;
                gpu::add_products(d, sum, &difference, &quantized)
            }
            Sum::Empty => unreachable!("just begun"),
        }
    }

    /// With the inputs of all ranks, which each have added some.
    ///
    /// # Errors
    /// A rank without inputs; those of [`Group::all_reduce`].
    pub fn over(self, ranks: &Group) -> Result<Self> {
        Ok(Self { sum: self.sum.over(ranks, "drift", self.cols)?, ..self })
    }

    /// D `[in, in]` in `f64`, for inputs from `sequences` sequences (the same as for the Hessian), on the device of the inputs.
    ///
    /// # Errors
    /// Inputs that were not finite.
    pub fn finish(self, sequences: usize) -> Result<Tensor> {
        let (n, scale) = (self.cols, 2.0 / sequences.max(1) as f64);
        let not_finite = || Error::numeric("drift", "an input is not finite or too large");
        match self.sum {
            Sum::Empty => Tensor::from_vec(vec![0f64; room("drift", &[n, n], DType::F64)?], [n, n]),
            Sum::Host(mut sum) => {
                sum.iter_mut().for_each(|d| *d *= scale);
                if sum.iter().all(|d| d.is_finite()) { Tensor::from_vec(sum, [n, n]) } else { Err(not_finite()) }
            }
            Sum::Gpu(d, sum) => {
                let drift = gpu::scaled(&d, sum, scale)?;
                if gpu::diagonal(&d, &drift)?.1 { Ok(drift) } else { Err(not_finite()) }
            }
        }
    }
}

/// Adds inputs on the CPU.
fn add(sum: &mut [f64], n: usize, exact: &Tensor, quantized: &Tensor) -> Result<()> {
    let wide = if quantized.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
    let quantized = quantized.to_dtype(wide)?;
    let difference = Tensor::axpby(1.0, exact.to_dtype(wide)?, -1.0, quantized.clone())?;
    if wide == DType::F64 {
        product(difference.as_slice()?, quantized.as_slice()?, n, sum, 1.0);
        return Ok(());
    }
    let (mut part, rows) = (cpu::alloc(n * n), ROWS * n.max(1));
    for (d, q) in difference.as_slice::<f32>()?.chunks(rows).zip(quantized.as_slice::<f32>()?.chunks(rows)) {
        product(d, q, n, &mut part, 0.0);
        sum.iter_mut().zip(&part).for_each(|(s, p)| *s += f64::from(*p));
    }
    cpu::recycle(part);
    Ok(())
}

/// `c ← beta c + aᵀ b` for rows of n values.
fn product<T: Real>(a: &[T], b: &[T], n: usize, c: &mut [T], beta: T) {
    let rows = a.len() / n.max(1);
    cpu::gemm((n, n, rows), c, Strides::new(n, false), beta, a, Strides::new(n, true), b, Strides::new(n, false), T::ONE, true);
}
