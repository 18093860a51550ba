//! GPTQ (Frantar et al. 2022, arXiv 2210.17323): a row's weights are rounded one by one, and the error of each is made up for by the
//! weights not yet rounded, as well as they can.
//!
//! With the Hessian H of the input ([`Hessian`](crate::quant::Hessian)), damped, and U upper triangular such that `H⁻¹ = UᵀU`, for
//! every column j of W `[out, in]`:
//! ```text
//! q = Q(w_j)     e = (w_j − q) / U[j,j]     W[:, j..] −= e · U[j, j..]
//! ```
//! so that `tr((W − Ŵ) H (W − Ŵ)ᵀ) = Σ e²`, which is reported. The update is exact inside a block of columns, and reaches those behind
//! it once for the whole block, by one matrix product. Rows are independent of one another.
//!
//! H and its factor are `f64`; the sweep is in the type of the weight (`f32` for 16-bit ones). Weights on a GPU are quantised there:
//! the factor by cuSOLVER (on the CPU where it is not installed), blocks of at most 128 columns on chip, the rest by products in
//! `f32`. Rounding apart, the results are the same.

use rayon::prelude::*;

use crate::device::cpu::{self, Strides};
use crate::device::cuda::CudaDevice;
use crate::grid::Quantized;
use crate::linalg::factor;
use crate::quant::gptq_gpu as gpu;
use crate::quant::weight::hessian_for;
use crate::quant::{Grid, GridFloat, QuantSpec, QuantizedLinear, WeightQuantizer};
use crate::{DType, Device, Error, Result, Tensor};

/// A Hessian that is not positive definite with this times its mean diagonal added is refused.
pub const MAX_DAMPING: f64 = 100.0;
/// What no damping at all is raised to.
const LEAST_DAMPING: f64 = 1e-6;
/// Rows of W that go through the sweep together.
const ROWS: usize = 32;

/// From which weights a group's grid is found when the sweep comes to it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum GroupScales {
    /// With the errors of all columns before it made up for. Blocks end where groups start, so that they are.
    #[default]
    Updated,
    /// With those of finished blocks only, as published: a group that starts inside a block sees older values, and the result
    /// depends on the block size.
    FinishedBlocks,
}

/// GPTQ and its settings. The defaults are the published ones, but for [`GroupScales`].
///
/// Grids: one per row is found before the sweep. Those of groups are found when the sweep comes to them; with `act_order`, where a
/// group's columns are far apart in the sweep, before it. Either way the codes are in the columns' own order and
/// [`Quantized`] holds them. Columns that the input never uses (a zero on H's diagonal) become 0 beforehand.
///
/// ```
/// use spinquant::quant::{Gptq, Hessian, QuantSpec};
/// let (x, w) = (spinquant::ops::randn([64, 8], 1), spinquant::ops::randn([3, 8], 2));
/// let mut hessian = Hessian::new(8);
/// hessian.add(&x)?;
/// let q = Gptq::default().quantize_one(&w, &QuantSpec::weight(4, true), &hessian.finish(1)?)?;
/// assert_eq!((q.weight.shape(), q.damping), (w.shape(), Some(0.01)));
/// # Ok::<(), spinquant::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Gptq {
    /// Part of H's mean diagonal that is added to its diagonal. It grows tenfold, up to [`MAX_DAMPING`], while the result is not positive
    /// definite. [`QuantizedLinear::damping`] tells what was used.
    pub damping: f64,
    /// Sweep columns in descending order of H's diagonal.
    pub act_order: bool,
    /// Columns whose updates reach the columns behind them at once.
    pub block: usize,
    /// Where the grids of groups come from, without `act_order`.
    pub group_scales: GroupScales,
}

impl Default for Gptq {
    fn default() -> Self {
        Self { damping: 0.01, act_order: false, block: 128, group_scales: GroupScales::default() }
    }
}

/// What a sweep needs to know of the input.
struct Factor {
    n: usize,
    /// The column swept at each position.
    order: Vec<usize>,
    /// Columns that the input never uses.
    dead: Vec<usize>,
    /// U, in the order of the sweep.
    u: Upper,
    damping: f64,
}

/// U where the sweep is done.
enum Upper {
    Host(Vec<f64>),
    Gpu(CudaDevice, Tensor, gpu::Order),
}

impl WeightQuantizer for Gptq {
    fn name(&self) -> &'static str {
        "gptq"
    }
    fn needs_hessian(&self) -> bool {
        true
    }
    fn quantize(&self, weights: &[&Tensor], spec: &QuantSpec, hessian: Option<&Tensor>) -> Result<Vec<QuantizedLinear>> {
        let hessian = hessian_for("GPTQ", weights, hessian)?;
        // On the GPU where the weights are; in f64 it has no kernels.
        let device = weights.first().map_or(Device::Cpu, |w| w.device());
        let narrow = weights.iter().all(|w| w.device() == device && w.dtype() != DType::F64);
        let factor = self.factor(&hessian.to_device(if narrow { &device } else { &Device::Cpu })?)?;
        let sweep = |w: &&Tensor| match &factor.u {
            Upper::Host(u) if w.dtype() == DType::F64 => self.sweep::<f64>(w, spec, &factor, u),
            Upper::Host(u) => self.sweep::<f32>(w, spec, &factor, u),
            Upper::Gpu(d, u, order) => {
                let on_the_way = self.grids_on_the_way(spec);
                let ends = self.block_ends(factor.n, spec.group_size(factor.n)?, on_the_way);
                let s = gpu::Sweep { u, order, dead: &factor.dead, ends: &ends, grids_on_the_way: on_the_way };
                Ok(QuantizedLinear { damping: Some(factor.damping), ..gpu::sweep(d, w, spec, &s)? })
            }
        };
        weights.iter().map(sweep).collect()
    }
}

impl Gptq {
    /// Checks the settings.
    ///
    /// # Errors
    /// [`Error::Argument`]: a damping outside 0 to 10, or blocks of no column.
    pub fn check(&self) -> Result<()> {
        if self.block == 0 || !(0.0..=MAX_DAMPING).contains(&self.damping) {
            let got = format!("got {} and {}", self.damping, self.block);
            return Err(Error::argument("GPTQ", format!("damping is 0 to {MAX_DAMPING} and a block at least 1 column, {got}")));
        }
        Ok(())
    }

    /// Quantises one linear `[out, in]` with the Hessian `[in, in]` of its input, on the weight's device.
    ///
    /// # Errors
    /// Shapes that do not fit, values that are not finite, a Hessian that no damping makes positive definite, and what
    /// [`QuantSpec::group_size`] refuses.
    pub fn quantize_one(&self, weight: &Tensor, spec: &QuantSpec, hessian: &Tensor) -> Result<QuantizedLinear> {
        Ok(self.quantize(&[weight], spec, Some(hessian))?.remove(0))
    }

    fn factor(&self, hessian: &Tensor) -> Result<Factor> {
        self.check()?;
        let n = hessian.cols();
        let (mut diagonal, finite) = diagonal(hessian)?;
        if !finite {
            return Err(Error::numeric("GPTQ", "the Hessian holds NaN or infinite values"));
        }
        let dead: Vec<usize> = (0..n).filter(|&i| diagonal[i] == 0.0).collect();
        dead.iter().for_each(|&i| diagonal[i] = 1.0);
        let mut order: Vec<usize> = (0..n).collect();
        if self.act_order {
            order.sort_by(|&i, &j| diagonal[j].total_cmp(&diagonal[i])); // stable
        }
        let mean = diagonal.iter().sum::<f64>() / n.max(1) as f64;
        let mut factor = factoring(hessian, &order, &dead)?;
        let mut damping = self.damping;
        loop {
            if let Some(u) = factor(damping * mean)? {
                return Ok(Factor { n, order, dead, u, damping });
            }
            damping = if damping == 0.0 { LEAST_DAMPING } else { 10.0 * damping };
            if damping > MAX_DAMPING {
                let message =
                    format!("the Hessian is not positive definite, not even with {MAX_DAMPING} times its mean diagonal added");
                return Err(Error::numeric("GPTQ", message));
            }
        }
    }

    fn grids_on_the_way(&self, spec: &QuantSpec) -> bool {
        spec.group.is_some() && !self.act_order
    }

    /// The columns at which blocks end.
    fn block_ends(&self, n: usize, group: usize, grids_on_the_way: bool) -> Vec<usize> {
        let cut = grids_on_the_way && self.group_scales == GroupScales::Updated;
        let (mut ends, mut at) = (vec![], 0);
        while at < n {
            let group_end = if cut { (at / group + 1) * group } else { n };
            at = n.min(at + self.block).min(group_end);
            ends.push(at);
        }
        ends
    }

    fn sweep<T: GridFloat>(&self, weight: &Tensor, spec: &QuantSpec, factor: &Factor, u: &[f64]) -> Result<QuantizedLinear> {
        let Factor { n, order, dead, damping, .. } = factor;
        let n = *n;
        let group = spec.group_size(n)?;
        let groups = n.div_ceil(group);
        let mut w = weight.to_device(&Device::Cpu)?.to_dtype(T::DTYPE)?.into_vec::<T>()?;
        if w.iter().any(|x| !x.to_f64().is_finite()) {
            return Err(Error::numeric("GPTQ", "the weight holds NaN or infinite values"));
        }
        w.chunks_mut(n.max(1)).for_each(|row| dead.iter().for_each(|&i| row[i] = T::ZERO));
        let rows = weight.rows();

        let on_the_way = self.grids_on_the_way(spec);
        let mut grids = if on_the_way {
            vec![Grid { scale: T::ONE, zero: T::ZERO, min: T::ZERO, max: T::ZERO }; rows * groups]
        } else {
            w.par_chunks(group).map(|g| T::grid(spec, g)).collect()
        };
        if self.act_order {
            w = w.par_chunks(n.max(1)).flat_map_iter(|row| order.iter().map(|&i| row[i])).collect();
        }
        let ends = self.block_ends(n, group, on_the_way);
        let u: Vec<T> = u.iter().map(|&x| T::of(x)).collect();
        let mut codes = vec![0i16; rows * n];
        let chunk = ROWS * n.max(1);
        let losses: Vec<f64> = w
            .par_chunks_mut(chunk)
            .zip(codes.par_chunks_mut(chunk))
            .zip(grids.par_chunks_mut(ROWS * groups.max(1)))
            .map(|((w, codes), grids)| {
                let mut rows =
                    Rows { n, group, order, on_the_way: on_the_way.then_some(spec), u: &u, w, codes, grids, loss: 0.0 };
                let mut start = 0;
                for &end in &ends {
                    rows.block(start, end);
                    start = end;
                }
                rows.loss
            })
            .collect();
        let shape = [rows, groups];
        let codes = Quantized {
            shape: weight.shape().to_vec(),
            group,
            codes,
            scale: Tensor::from_vec(grids.iter().map(|g| g.scale).collect(), shape)?,
            zero: Tensor::from_vec(grids.iter().map(|g| g.zero).collect(), shape)?,
        };
        Ok(QuantizedLinear {
            damping: Some(*damping),
            loss: Some(losses.iter().sum()),
            ..QuantizedLinear::from_codes(codes, weight.dtype(), &weight.device())?
        })
    }
}

/// The diagonal of a Hessian, and whether all of it is finite.
fn diagonal(hessian: &Tensor) -> Result<(Vec<f64>, bool)> {
    if let Device::Cuda(d) = hessian.device() {
        return gpu::diagonal(&d, hessian);
    }
    let h = hessian.to_f64_vec()?;
    Ok((h.iter().step_by(hessian.cols() + 1).copied().collect(), h.iter().all(|x| x.is_finite())))
}

/// Factors H, in the order of the sweep, with dead columns at 1 and a number added to its diagonal; `None` where that is not
/// positive definite.
type Factoring<'a> = Box<dyn FnMut(f64) -> Result<Option<Upper>> + 'a>;

fn factoring<'a>(hessian: &'a Tensor, order: &[usize], dead: &[usize]) -> Result<Factoring<'a>> {
    if let Device::Cuda(d) = hessian.device() {
        let order = gpu::Order::new(&d, order)?;
        return Ok(Box::new(move |add| {
            Ok(gpu::factor(&d, hessian, &order, add)?.map(|u| Upper::Gpu(d.clone(), u, order.clone())))
        }));
    }
    let n = hessian.cols();
    let mut h = hessian.to_f64_vec()?;
    dead.iter().for_each(|&i| h[i * n + i] = 1.0);
    if order.iter().enumerate().any(|(i, &j)| i != j) {
        h = order.iter().flat_map(|&i| order.iter().map(move |&j| i * n + j)).map(|at| h[at]).collect();
    }
    Ok(Box::new(move |add| {
        let mut damped = h.clone();
        damped.iter_mut().step_by(n + 1).for_each(|x| *x += add);
        Ok(factor::inverse_factor(damped, n).map(Upper::Host))
    }))
}

/// A few rows of W on their way through the sweep.
struct Rows<'a, T> {
    n: usize,
    group: usize,
    order: &'a [usize],
    /// The specification, where grids are found on the way.
    on_the_way: Option<&'a QuantSpec>,
    u: &'a [T],
    /// `[rows, n]` in the order of the sweep: columns behind the current block hold the effect of all finished blocks.
    w: &'a mut [T],
    /// `[rows, n]` in the columns' own order.
    codes: &'a mut [i16],
    /// `[rows, groups]`.
    grids: &'a mut [Grid<T>],
    loss: f64,
}

impl<T: GridFloat> Rows<'_, T> {
    /// Sweeps columns `start..end` and makes up for their errors behind them.
    fn block(&mut self, start: usize, end: usize) {
        let (n, group, width) = (self.n, self.group, end - start);
        let rows = self.w.len() / n;
        let groups = n.div_ceil(group);
        // Every row's part of this block, up to date, turns into its errors column by column.
        let mut errors: Vec<T> = self.w.chunks(n).flat_map(|row| &row[start..end]).copied().collect();
        for (r, part) in errors.chunks_mut(width).enumerate() {
            if let Some(spec) = self.on_the_way {
                for first in (start.next_multiple_of(group)..end).step_by(group) {
                    self.grids[r * groups + first / group] = T::grid(spec, &self.w[r * n + first..][..group]);
                }
            }
            let (grids, codes) = (&self.grids[r * groups..][..groups], &mut self.codes[r * n..][..n]);
            let (order, u) = (&self.order[start..end], self.u);
            self.loss += cpu::simd(
                #[inline(always)]
                || {
                    let mut loss = 0.0;
                    for (j, &column) in order.iter().enumerate() {
                        let u = &u[(start + j) * n + start..][..width];
                        let grid = grids[column / group];
                        let code = grid.code(part[j]);
                        codes[column] = code.to_f64() as i16;
                        let e = (part[j] - grid.value(code)) / u[j];
                        part[j] = e;
                        part[j + 1..].iter_mut().zip(&u[j + 1..]).for_each(|(w, &u)| *w = *w - e * u);
                        loss += e.to_f64() * e.to_f64();
                    }
                    loss
                },
            );
        }
        if end < n {
            let (c, s) = (&mut self.w[end..], |cols| Strides::new(cols, false));
            let u = &self.u[start * n + end..];
            cpu::gemm((rows, n - end, width), c, s(n), T::ONE, &errors, s(width), u, s(n), T::of(-1.0), false);
        }
    }
}
