//! Matrix products of tensors, without a tape: which arithmetic, and what to do with a batch.

use super::matmul_gpu;
use crate::device::Device;
use crate::device::cpu::{self, Real, Strides};
use crate::tensor::{count, room};
use crate::{DType, Error, Result, Tensor};

/// Batch count (`None` without a batch axis), rows and columns of an operand read with its flag.
fn dims(t: &Tensor, transposed: bool) -> Result<(Option<usize>, usize, usize)> {
    let (batch, r, c) = match *t.shape() {
        [r, c] => (None, r, c),
        [b, r, c] => (Some(b), r, c),
        _ => return Err(Error::shape("matmul", "with two axes, or three with a batch", t.shape())),
    };
    Ok(if transposed { (batch, c, r) } else { (batch, r, c) })
}

/// `op(a) op(b)` without a tape. `a` and `b` have two axes, or three with the batch first; `reduce` sums over the batch.
///
/// # Errors
/// Shapes that do not fit, operands of different types or devices, a type without products; a failed launch.
pub fn product(a: &Tensor, ta: bool, b: &Tensor, tb: bool, reduce: bool, dtype: DType) -> Result<Tensor> {
    let (batch_a, m, k) = dims(a, ta)?;
    let (batch_b, k2, n) = dims(b, tb)?;
    let batch = batch_a.or(batch_b);
    if k != k2 || (batch_a.is_some() && batch_b.is_some() && batch_a != batch_b) {
        let flag = |t: bool| if t { "ᵀ" } else { "" };
        let message = format!("{:?}{} for {:?}{}: inner sizes {k2} and {k}", b.shape(), flag(tb), a.shape(), flag(ta));
        return Err(Error::shape("matmul", message, b.shape()));
    }
    let shape = match batch {
        Some(count) if !reduce => vec![count, m, n],
        _ => vec![m, n],
    };
    if a.device().is_cpu() {
        room("matmul", &shape, dtype)?;
    } else {
        count("matmul", &shape)?;
    }
    let (a, b) = (&a.decoded()?, &b.decoded()?);
    let p =
        Problem { m, n, k, batch: batch.unwrap_or(1), batch_a: batch_a.is_some(), batch_b: batch_b.is_some(), ta, tb, reduce };
    if let Device::Cuda(device) = one_device("matmul", &[a, b])? {
        return matmul_gpu::matmul(&device, a, b, &p, &shape, dtype);
    }
    match dtype {
        DType::F64 => Tensor::from_vec(p.run(a.as_slice::<f64>()?, b.as_slice::<f64>()?, vec![0.0; p.size()]), shape),
        DType::F32 | DType::F16 | DType::BF16 => {
            let (a, b) = (a.to_dtype(DType::F32)?, b.to_dtype(DType::F32)?);
            Tensor::from_vec(p.run(a.as_slice::<f32>()?, b.as_slice::<f32>()?, cpu::alloc(p.size())), shape)?.to_dtype(dtype)
        }
        DType::U32 => Err(Error::dtype("matmul", "f64, f32, f16 or bf16", dtype)),
    }
}

/// `c + x wᵀ` without a tape, for x [.., in], w [out, in] and c [tokens, out]; rounded once on a GPU where all are of one type, and
/// made in c's memory on the CPU when unshared.
///
/// # Errors
/// Shapes that do not fit together, or operands on different devices.
pub(crate) fn linear_add(c: Tensor, x: &Tensor, w: &Tensor) -> Result<Tensor> {
    let (x, w) = (&x.decoded()?, &w.decoded()?);
    let alike = c.dtype() == x.dtype() && c.dtype() == w.dtype() && x.cols() == w.cols();
    match one_device("linear_add", &[&c, x, w])? {
        Device::Cuda(device) if alike => matmul_gpu::linear_add(&device, &c, x, w),
        _ => {
            let narrow = [x.dtype(), w.dtype()].into_iter().find(|d| d.is_half()).unwrap_or(x.dtype());
            Tensor::axpby(1.0, c, 1.0, product(x, false, w, true, false, narrow)?)
        }
    }
}

fn one_device(what: &str, operands: &[&Tensor]) -> Result<Device> {
    let device = operands[0].device();
    match operands.iter().find(|t| t.device() != device) {
        Some(other) => Err(Error::device(what, format!("operands on {device} and {}", other.device()))),
        None => Ok(device),
    }
}

/// The sizes of one (batched) product.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Problem {
    pub m: usize,
    pub n: usize,
    pub k: usize,
    pub batch: usize,
    pub batch_a: bool,
    pub batch_b: bool,
    pub ta: bool,
    pub tb: bool,
    pub reduce: bool,
}

impl Problem {
    fn size(&self) -> usize {
        self.m * self.n * if self.reduce { 1 } else { self.batch }
    }

    fn run<T: Real>(&self, a: &[T], b: &[T], mut y: Vec<T>) -> Vec<T> {
        let Self { m, n, k, .. } = *self;
        let (ca, cb) = (if self.ta { m } else { k }, if self.tb { k } else { n });
        if k == 0 || self.batch == 0 {
            y.fill(T::ZERO);
        }
        for i in 0..self.batch {
            let a = if self.batch_a { &a[i * m * k..][..m * k] } else { a };
            let b = if self.batch_b { &b[i * k * n..][..k * n] } else { b };
            let (y, beta) = if self.reduce {
                (&mut y[..], if i == 0 { T::ZERO } else { T::ONE })
            } else {
                (&mut y[i * m * n..][..m * n], T::ZERO)
            };
            let (sa, sb) = (Strides::new(ca, self.ta), Strides::new(cb, self.tb));
            cpu::gemm((m, n, k), y, Strides::new(n, false), beta, a, sa, b, sb, T::ONE, true);
        }
        y
    }
}

/// The definition, three loops; kept as the oracle of the fast paths.
pub fn reference(a: &[f64], ta: bool, b: &[f64], tb: bool, (m, n, k): (usize, usize, usize)) -> Vec<f64> {
    let mut y = vec![0.0; m * n];
    for i in 0..m {
        for j in 0..n {
            for l in 0..k {
                y[i * n + j] += if ta { a[l * m + i] } else { a[i * k + l] } * if tb { b[j * k + l] } else { b[l * n + j] };
            }
        }
    }
    y
}
