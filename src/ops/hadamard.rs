//! The fast Walsh–Hadamard transform of every row: `y = H x`, `dx = Hᵀ dy`, with H orthonormal ([`Hadamard`]).
//!
//! n log n additions for the power-of-two part, a K×K product of ±1 for the rest.

use crate::device::{Device, cpu};
use crate::ops::{Case, randn, unsupported, widened, widened_backward};
use crate::rotation::Hadamard;
use crate::tape::{Grads, Inputs, Op, Saved, Var};
use crate::{DType, Error, Result, Tensor};

/// The transform of the last axis, or its transpose.
#[derive(Clone, Debug)]
pub struct Transform {
    /// The matrix.
    pub map: Hadamard,
    /// Apply Hᵀ.
    pub transpose: bool,
}

impl Op for Transform {
    fn name(&self) -> &'static str {
        "hadamard"
    }
    fn forward(&self, inputs: Inputs, save: &mut Saved) -> Result<Tensor> {
        let [x] = inputs.take()?;
        if x.cols() != self.map.n() {
            return Err(Error::shape("hadamard", format!("[.., {}]", self.map.n()), x.shape()));
        }
        let shape = x.shape().to_vec();
        match (x.device(), x.dtype()) {
            (Device::Cpu, DType::F64) => {
                let mut y = x.into_owned::<f64>()?;
                y.chunks_mut(self.map.n()).for_each(|row| self.map.reference(row, self.transpose));
                Tensor::from_vec(y, shape)
            }
            (Device::Cpu, DType::F32) => {
                let mut y = x.into_owned::<f32>()?;
                fast(&mut y, &self.map, self.transpose);
                Tensor::from_vec(y, shape)
            }
            (Device::Cpu, DType::F16 | DType::BF16) => widened(self, vec![x].into(), save),
            #[cfg(feature = "cuda")]
            (Device::Cuda(_), _) => crate::device::cuda::ops::hadamard(x, &self.map, self.transpose, None),
            _ => Err(unsupported(self, &x)),
        }
    }
    fn backward(&self, saved: Saved, dy: Tensor, want: &[bool]) -> Result<Grads> {
        let back = Self { map: self.map.clone(), transpose: !self.transpose };
        if dy.device().is_cpu() && dy.dtype().is_half() {
            return widened_backward(self, saved, dy, want);
        }
        Ok(vec![Some(back.forward(vec![dy].into(), &mut Saved::default())?)])
    }
}

impl Var<'_> {
    /// The orthonormal Hadamard transform of the last axis.
    pub fn hadamard(self) -> Result<Self> {
        let map = Hadamard::new(self.value().cols())?;
        self.tape().record(Transform { map, transpose: false }, vec![self])
    }
}

/// `x ← H x` for every row, without a tape; in place when unshared.
pub fn transform(x: Tensor, map: &Hadamard, transpose: bool) -> Result<Tensor> {
    Transform { map: map.clone(), transpose }.forward(vec![x].into(), &mut Saved::default())
}

fn fast(x: &mut [f32], map: &Hadamard, transpose: bool) {
    let k = map.k();
    let size = map.n() / map.blocks();
    let scale = 1.0 / (size as f64).sqrt() as f32;
    // H_K as floats, its rows as they will be read.
    let h: Vec<f32> = match map.signs() {
        [] => vec![1.0],
        s => (0..k * k).map(|i| f32::from(if transpose { s[i % k * k + i / k] } else { s[i] })).collect(),
    };
    use rayon::prelude::*;
    x.par_chunks_mut(cpu::rows_per_task(size) * size).for_each_init(
        || vec![0f32; if k > 1 { size } else { 0 }],
        |scratch, rows| {
            cpu::simd(
                #[inline(always)]
                || {
                    for row in rows.chunks_mut(size) {
                        row.chunks_mut(size / k).for_each(sylvester);
                        if k > 1 {
                            mix(scratch, row, &h, k, scale);
                            row.copy_from_slice(scratch);
                        } else {
                            row.iter_mut().for_each(|x| *x *= scale);
                        }
                    }
                },
            )
        },
    );
}

/// Unnormalised natural-order butterflies in place.
#[inline(always)]
fn sylvester(x: &mut [f32]) {
    let mut half = 1;
    while half < x.len() {
        for pair in x.chunks_mut(2 * half) {
            let (a, b) = pair.split_at_mut(half);
            for (a, b) in a.iter_mut().zip(b) {
                (*a, *b) = (*a + *b, *a - *b);
            }
        }
        half *= 2;
    }
}

/// `y[i, :] = scale Σ_j h[i, j] x[j, :]` with x, y `[k, m]`.
#[inline(always)]
fn mix(y: &mut [f32], x: &[f32], h: &[f32], k: usize, scale: f32) {
    const LANES: usize = 16;
    const ROWS: usize = 4; // K is a multiple of 4
    let m = x.len() / k;
    for (y, h) in y.chunks_mut(ROWS * m).zip(h.chunks(ROWS * k)) {
        let mut first = 0;
        while first < m {
            // Narrower columns (m = 1, 2, 4, 8) run the same loop over fewer lanes.
            let lanes = LANES.min(m - first);
            let mut sum = [[0f32; LANES]; ROWS];
            for j in 0..k {
                let mut v = [0f32; LANES];
                v[..lanes].copy_from_slice(&x[j * m + first..][..lanes]);
                for (r, sum) in sum.iter_mut().enumerate() {
                    let sign = h[r * k + j];
                    sum.iter_mut().zip(v).for_each(|(s, v)| *s += sign * v);
                }
            }
            for (r, sum) in sum.iter().enumerate() {
                y[r * m + first..][..lanes].iter_mut().zip(sum).for_each(|(y, s)| *y = scale * s);
            }
            first += lanes;
        }
    }
}

/// Worked cases.
pub fn cases() -> Vec<Case> {
    let case = |rows: usize, n: usize, transpose: bool| {
        let name = format!("{rows}x{n}{}", if transpose { " transposed" } else { "" });
        Case::new("hadamard", name, vec![randn([rows, n], n as u64)], move |mut v| {
            let op = Transform { map: Hadamard::new(n)?, transpose };
            v[0].tape().record(op, vec![v.remove(0)])
        })
    };
    let mut all = vec![];
    // Powers of two; K·2^m with symmetric (28, 36) and unsymmetric H_K; Paley; block-diagonal.
    for n in [1, 2, 8, 64, 12, 24, 28, 36, 40, 80, 148, 172, 344, 107, 214] {
        all.extend([case(3, n, false), case(1, n, true)]);
    }
    for n in [256, 1024, 1376, 2048, 4096, 5120, 11008, 14336] {
        all.push(case(9, n, false).large());
    }
    all
}
