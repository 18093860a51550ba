//! The Hessian of a linear layer's squared output error in its weights: `H = (2/n) Σ xᵀ x`.

use crate::device::cpu::{self, Real, Strides};
use crate::device::cuda::CudaDevice;
use crate::quant::gptq_gpu as gpu;
use crate::ranks::Group;
use crate::tensor::room;
use crate::{DType, Device, Error, Result, Tensor};

/// Rows that one `f32` product sums over before it is added up in `f64`.
pub(super) const ROWS: usize = 1024;
/// Rows of H computed at once; what lies right of the diagonal is left out in steps of this.
const STRIPE: usize = 128;

/// `H = (2/n) Σ xᵀ x [in, in]` over the inputs of a linear layer, added up in `f64`, where the inputs are.
///
/// For `f64` inputs everything is; for others, `f32` products of at most 1024 rows are (4096 on a GPU, where products of 16-bit
/// inputs are exact and summed in `f32`). The sum does not depend on the number of threads.
///
/// ```
/// use spinquant::{Tensor, quant::Hessian};
/// let mut h = Hessian::new(2);
/// h.add(&Tensor::from_vec(vec![1f32, 2.0, 3.0, 4.0], [2, 2])?)?;
/// assert_eq!(h.finish(1)?.to_vec::<f64>()?, [20.0, 28.0, 28.0, 40.0]);
/// # Ok::<(), spinquant::Error>(())
/// ```
#[derive(Clone)]
pub struct Hessian {
    cols: usize,
    sum: Sum,
}

/// A sum of products of inputs `[in, in]` in `f64`. Here Σ xᵀ x: the lower triangle, and some or all of the upper.
#[derive(Clone)]
pub(super) enum Sum {
    /// No inputs yet.
    Empty,
    Host(Vec<f64>),
    Gpu(CudaDevice, Tensor),
}

impl Sum {
    /// Where inputs are, if there is none yet.
    pub(super) fn begin(&mut self, what: &str, n: usize, x: &Tensor) -> Result<()> {
        if x.cols() != n {
            return Err(Error::shape(what, format!("[.., {n}]"), x.shape()));
        }
        if let Self::Empty = self {
            *self = match x.device() {
                Device::Cuda(d) if x.dtype() != DType::F64 => {
                    let sum = Tensor::zeros([n, n], DType::F64, &Device::Cuda(d.clone()))?;
                    Self::Gpu(d, sum)
                }
                _ => Self::Host(vec![0.0; room(what, &[n, n], DType::F64)?]),
            };
        }
        Ok(())
    }
}

impl Sum {
    /// The sum of what all ranks have.
    pub(super) fn over(self, ranks: &Group, what: &str, n: usize) -> Result<Self> {
        match self {
            _ if ranks.world() == 1 => Ok(self),
            Self::Host(sum) => Ok(Self::Host(ranks.all_reduce(what, Tensor::from_vec(sum, [n, n])?)?.into_vec()?)),
            Self::Gpu(device, sum) => Ok(Self::Gpu(device, ranks.all_reduce(what, sum)?)),
            Self::Empty => Err(Error::argument(what, "expected inputs at every rank, got none")),
        }
    }
}

impl std::fmt::Debug for Hessian {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Hessian of {} channels", self.cols)
    }
}

impl Hessian {
    /// For inputs of `cols` channels.
    pub fn new(cols: usize) -> Self {
        Self { cols, sum: Sum::Empty }
    }

    /// Adds inputs `[.., in]`. The first ones say where H is.
    ///
    /// # Errors
    /// Inputs of another width or on another device than the first; a type that is not floating-point.
    pub fn add(&mut self, x: &Tensor) -> Result<()> {
        let n = self.cols;
        self.sum.begin("Hessian", n, x)?;
        match &mut self.sum {
            Sum::Host(sum) => add(sum, n, &x.to_device(&Device::Cpu)?),
            Sum::Gpu(d, sum) => {
                let x = x.to_device(&sum.device())?;
                gpu::add_products(d, sum, &x, &x)
            }
            Sum::Empty => unreachable!("just begun"),
        }
    }

    /// With the inputs of all ranks, which each have added some.
    ///
    /// # Errors
    /// A rank without inputs; those of [`Group::all_reduce`].
    pub fn over(self, ranks: &Group) -> Result<Self> {
        Ok(Self { sum: self.sum.over(ranks, "Hessian", self.cols)?, ..self })
    }

    /// H `[in, in]` in `f64`, both triangles, for inputs from `sequences` sequences (of any length; it is only a scale), on the
    /// device of the inputs.
    ///
    /// # Errors
    /// Inputs that were not finite.
    pub fn finish(self, sequences: usize) -> Result<Tensor> {
        let (n, scale) = (self.cols, 2.0 / sequences.max(1) as f64);
        let mut sum = match self.sum {
            Sum::Host(sum) => sum,
            Sum::Empty => vec![0.0; room("Hessian", &[n, n], DType::F64)?],
            Sum::Gpu(d, sum) => {
                let h = gpu::finish(&d, sum, scale)?;
                // An input that is not finite makes its own square so.
                let diagonal = gpu::diagonal(&d, &h)?.0;
                diagonal.iter().enumerate().try_for_each(|(i, &x)| finite(x, i, i))?;
                return Ok(h);
            }
        };
        for i in 0..n {
            for j in 0..=i {
                let h = scale * sum[i * n + j];
                finite(h, i, j)?;
                (sum[i * n + j], sum[j * n + i]) = (h, h);
            }
        }
        Tensor::from_vec(sum, [n, n])
    }
}

fn finite(h: f64, i: usize, j: usize) -> Result<()> {
    if h.is_finite() {
        return Ok(());
    }
    Err(Error::numeric("Hessian", format!("is {h} at ({i}, {j}): an input is not finite or too large")))
}

/// Adds inputs on the CPU.
fn add(sum: &mut [f64], n: usize, x: &Tensor) -> Result<()> {
    if x.dtype() == DType::F64 {
        x.as_slice::<f64>()?.chunks(ROWS * n.max(1)).for_each(|x| gram(x, n, sum, 1.0));
        return Ok(());
    }
    let x = x.to_dtype(DType::F32)?;
    let mut part = cpu::alloc(n * n);
    for x in x.as_slice::<f32>()?.chunks(ROWS * n.max(1)) {
        gram(x, n, &mut part, 0.0);
        cpu::map_rows(sum, &part, n, n, |first, sum, part| {
            for (i, (sum, part)) in sum.chunks_mut(n).zip(part.chunks(n)).enumerate() {
                let lower = ..=first + i;
                sum[lower].iter_mut().zip(&part[lower]).for_each(|(s, p)| *s += f64::from(*p));
            }
        });
    }
    cpu::recycle(part);
    Ok(())
}

/// The lower triangle of `c ← beta c + xᵀ x`, in stripes of rows.
fn gram<T: Real>(x: &[T], n: usize, c: &mut [T], beta: T) {
    let rows = x.len() / n.max(1);
    for i in (0..n).step_by(STRIPE) {
        let m = STRIPE.min(n - i);
        let (c, transposed) = (&mut c[i * n..], Strides::new(n, true));
        cpu::gemm(
            (m, i + m, rows),
            c,
            Strides::new(n, false),
            beta,
            &x[i..],
            transposed,
            x,
            Strides::new(n, false),
            T::ONE,
            true,
        );
    }
}
