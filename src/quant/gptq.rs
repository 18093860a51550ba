//! GPTQ (Frantar et al. 2022, arXiv 2210.17323): a row's weights are rounded one by one, and the error of each is made up for by the
//! weights not yet rounded, as well as they can.
//!
//! With the Hessian H of the input ([`Hessian`](crate::quant::Hessian)), damped, and U upper triangular such that `H⁻¹ = UᵀU`, for
//! every column j of W `[out, in]`:
//! ```text
//! q = Q(w_j)     e = (w_j − q) / U[j,j]     W[:, j..] −= e · U[j, j..]
//! ```
//! so that `tr((W − Ŵ) H (W − Ŵ)ᵀ) = Σ e²`, which is reported. The update is exact inside a block of columns, and reaches those behind
//! it once for the whole block, by one matrix product. Rows are independent of one another. A [`Correction`] changes what W is, or adds a
//! term to the update.
//!
//! H and its factor are `f64`; the sweep is in the type of the weight (`f32` for 16-bit ones). Weights on a GPU are quantised there:
//! the factor by cuSOLVER (on the CPU where it is not installed), blocks of at most 128 columns on chip, the rest by products in
//! `f32`. Rounding apart, the results are the same.

use rayon::prelude::*;

use crate::device::cpu::{self, Strides};
use crate::device::cuda::CudaDevice;
use crate::grid::Quantized;
use crate::linalg::factor;
use crate::ops::microscaling::largest_magnitude;
use crate::quant::correction::Terms;
use crate::quant::sweep::{GridRule, Rows};
use crate::quant::weight::{clips_for, moments_for};
use crate::quant::{Correction, Grid, GridFloat, Moments, QuantSpec, QuantizedLinear, Site, WeightQuantizer};
use crate::quant::{correction_gpu, gptq_gpu as gpu};
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
    /// What is done about inputs that are not those of the full-precision network. With one, grids are found on the weight that is swept.
    pub correction: Correction,
}

impl Default for Gptq {
    fn default() -> Self {
        Self { damping: 0.01, act_order: false, block: 128, group_scales: GroupScales::default(), correction: Correction::None }
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

/// U where the sweep is done, and what goes with it.
enum Upper {
    Host(Vec<f64>, Terms<Vec<f64>>),
    Gpu(CudaDevice, Tensor, gpu::Order, Terms<Tensor>),
}

impl WeightQuantizer for Gptq {
    fn name(&self) -> &'static str {
        self.correction.name()
    }
    fn needs_hessian(&self) -> bool {
        true
    }
    fn wants_drift(&self, site: Site) -> bool {
        self.correction.wants_drift(site)
    }
    fn reads_quantized(&self) -> bool {
        self.correction != Correction::None
    }
    fn quantize(&self, weights: &[&Tensor], spec: &QuantSpec, moments: Option<&Moments>) -> Result<Vec<QuantizedLinear>> {
        self.swept(weights, spec, moments, None)
    }
    fn quantize_clipped(
        &self,
        weights: &[&Tensor],
        spec: &QuantSpec,
        moments: Option<&Moments>,
        clips: &[&Tensor],
    ) -> Result<Vec<QuantizedLinear>> {
        self.swept(weights, spec, moments, Some(clips))
    }
}

impl Gptq {
    /// Sweeps weights that read one input, on grids that their clip ratios say where there are some.
    fn swept(
        &self,
        weights: &[&Tensor],
        spec: &QuantSpec,
        moments: Option<&Moments>,
        clips: Option<&[&Tensor]>,
    ) -> Result<Vec<QuantizedLinear>> {
        let moments = moments_for("GPTQ", weights, moments)?;
        for (w, a) in weights.iter().zip(clips.unwrap_or_default()) {
            clips_for("GPTQ", w, spec, a)?;
        }
        // On the GPU where the weights are; in f64 and on grids of floating-point numbers it has no kernels.
        let device = weights.first().map_or(Device::Cpu, |w| w.device());
        let integers = spec.rule.floating().is_none();
        let narrow = integers && weights.iter().all(|w| w.device() == device && w.dtype() != DType::F64);
        let place = |t: &Tensor| t.to_device(if narrow { &device } else { &Device::Cpu });
        let hessian = place(&moments.hessian)?;
        let factor = self.factor(&Moments { hessian, drift: moments.drift.as_ref().map(place).transpose()? })?;
        let sweep = |(i, w): (usize, &&Tensor)| {
            let spec = &spec.of_tensor(|| largest_magnitude(&w.to_device(&Device::Cpu)?))?;
            self.swept_one(w, spec, clips.map(|clips| clips[i]), &factor)
        };
        weights.iter().enumerate().map(sweep).collect()
    }

    /// One of them.
    fn swept_one(&self, w: &Tensor, spec: &QuantSpec, clips: Option<&Tensor>, factor: &Factor) -> Result<QuantizedLinear> {
        match &factor.u {
            Upper::Host(u, terms) if w.dtype() == DType::F64 => {
                self.sweep(w, &GridRule::<f64>::new(spec, clips)?, factor, u, terms)
            }
            Upper::Host(u, terms) => self.sweep(w, &GridRule::<f32>::new(spec, clips)?, factor, u, terms),
            Upper::Gpu(d, u, order, terms) => {
                let on_the_way = self.grids_on_the_way(spec);
                let ends = self.block_ends(factor.n, spec.group_size(factor.n)?, on_the_way);
                let (dead, pull) = (&factor.dead[..], self.correction.pull());
                let s = gpu::Sweep { u, order, dead, ends: &ends, grids_on_the_way: on_the_way, terms, pull, clips };
                let swept = gpu::sweep(d, w, spec, &s)?;
                Ok(QuantizedLinear {
                    damping: Some(factor.damping),
                    loss: swept.loss.filter(|_| self.correction.is_none()),
                    ..swept
                })
            }
        }
    }

    /// Checks the settings.
    ///
    /// # Errors
    /// [`Error::Argument`]: a damping outside 0 to 100, blocks of no column, or what [`Correction::check`] refuses.
    pub fn check(&self) -> Result<()> {
        self.correction.check()?;
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
    /// [`QuantSpec::group_size`] refuses; a correction that needs more than a Hessian.
    pub fn quantize_one(&self, weight: &Tensor, spec: &QuantSpec, hessian: &Tensor) -> Result<QuantizedLinear> {
        Ok(self.quantize(&[weight], spec, Some(&hessian.clone().into()))?.remove(0))
    }

    fn factor(&self, moments: &Moments) -> Result<Factor> {
        self.check()?;
        let Moments { hessian, drift } = moments;
        if drift.is_none() && self.correction.wants_drift(Site::DownInput) {
            let message = "needs the drift of the weights' input beside its Hessian, got none";
            return Err(Error::argument(self.correction.name(), message));
        }
        let n = hessian.cols();
        let (mut diagonal, finite) = diagonal(hessian)?;
        if !finite {
            return Err(Error::numeric("GPTQ", "the Hessian holds NaN or infinite values"));
        }
        if let Some(drift) = drift.as_ref().filter(|_| !self.correction.is_none())
            && !self::diagonal(drift)?.1
        {
            return Err(Error::numeric(self.correction.name(), "the drift holds NaN or infinite values"));
        }
        let dead: Vec<usize> = (0..n).filter(|&i| diagonal[i] == 0.0).collect();
        dead.iter().for_each(|&i| diagonal[i] = 1.0);
        let mut order: Vec<usize> = (0..n).collect();
        if self.act_order {
            order.sort_by(|&i, &j| diagonal[j].total_cmp(&diagonal[i])); // stable
        }
        let mean = diagonal.iter().sum::<f64>() / n.max(1) as f64;
        let first = order.first().map_or(1.0, |&i| diagonal[i]);
        let mut factor = factoring(moments, &self.correction, first, &order, &dead)?;
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

    fn sweep<T: GridFloat>(
        &self,
        weight: &Tensor,
        rule: &GridRule<'_, T>,
        factor: &Factor,
        u: &[f64],
        terms: &Terms<Vec<f64>>,
    ) -> Result<QuantizedLinear> {
        let Factor { n, order, dead, damping, .. } = factor;
        let n = *n;
        let group = rule.spec.group_size(n)?;
        let groups = n.div_ceil(group);
        let mut w = weight.to_device(&Device::Cpu)?.to_dtype(T::DTYPE)?.into_vec::<T>()?;
        if w.iter().any(|x| !x.to_f64().is_finite()) {
            return Err(Error::numeric("GPTQ", "the weight holds NaN or infinite values"));
        }
        let (rows, narrow) = (weight.rows(), |m: &[f64]| m.iter().map(|&x| T::of(x)).collect::<Vec<T>>());
        if let Some(c) = &terms.target {
            let (original, c, plain) = (w.clone(), narrow(c), Strides::new(n, false));
            cpu::gemm((rows, n, n), &mut w, plain, T::ONE, &original, plain, &c, plain, T::ONE, true);
        }
        w.chunks_mut(n.max(1)).for_each(|row| dead.iter().for_each(|&i| row[i] = T::ZERO));

        let on_the_way = self.grids_on_the_way(rule.spec);
        let mut grids = if on_the_way {
            vec![Grid { scale: T::ONE, zero: T::ZERO, min: T::ZERO, max: T::ZERO, floating: false }; rows * groups]
        } else {
            w.par_chunks(group).enumerate().map(|(i, g)| rule.grid(i, g)).collect()
        };
        if self.act_order {
            w = w.par_chunks(n.max(1)).flat_map_iter(|row| order.iter().map(|&i| row[i])).collect();
        }
        let ends = self.block_ends(n, group, on_the_way);
        let (u, forward) = (narrow(u), terms.forward.as_deref().map(narrow));
        // What FOEM pulls back to.
        let original = self.correction.pull().map(|beta| (T::of(beta), w.clone()));
        let mut codes = vec![0i16; rows * n];
        let chunk = ROWS * n.max(1);
        let losses: Vec<f64> = w
            .par_chunks_mut(chunk)
            .zip(codes.par_chunks_mut(chunk))
            .zip(grids.par_chunks_mut(ROWS * groups.max(1)))
            .enumerate()
            .map(|(i, ((w, codes), grids))| {
                let mut rows = Rows {
                    n,
                    group,
                    order,
                    on_the_way: on_the_way.then_some((rule, i * ROWS * groups)),
                    u: &u,
                    forward: forward.as_deref(),
                    pull: original.as_ref().map(|(beta, original)| (*beta, &original[i * chunk..][..w.len()])),
                    w,
                    codes,
                    grids,
                    loss: 0.0,
                };
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
            loss: self.correction.is_none().then(|| losses.iter().sum()),
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

fn factoring<'a>(
    moments: &'a Moments,
    correction: &'a Correction,
    first: f64,
    order: &[usize],
    dead: &[usize],
) -> Result<Factoring<'a>> {
    let hessian = &moments.hessian;
    let drift = moments.drift.as_ref().filter(|_| !correction.is_none());
    if let Device::Cuda(d) = hessian.device() {
        let order = gpu::Order::new(&d, order)?;
        return Ok(Box::new(move |add| {
            let Some((u, inverse)) = gpu::factor(&d, hessian, &order, add)? else { return Ok(None) };
            let terms = match drift {
                Some(drift) => correction_gpu::terms(correction, &d, drift, &inverse, &order, first)?,
                None => Terms::NONE,
            };
            Ok(Some(Upper::Gpu(d.clone(), u, order.clone(), terms)))
        }));
    }
    let (n, order) = (hessian.cols(), order.to_vec());
    let in_order = order.iter().enumerate().all(|(i, &j)| i == j);
    let indices = move || order.iter().flat_map(|&i| order.iter().map(move |&j| i * n + j)).collect::<Vec<_>>();
    let indices = if in_order { None } else { Some(indices()) };
    let arranged = |m: Vec<f64>| match &indices {
        Some(indices) => indices.iter().map(|&at| m[at]).collect(),
        None => m,
    };
    let mut h = hessian.to_f64_vec()?;
    dead.iter().for_each(|&i| h[i * n + i] = 1.0);
    let h = arranged(h);
    let drift = drift.map(|d| Ok::<_, Error>(arranged(d.to_f64_vec()?))).transpose()?;
    Ok(Box::new(move |add| {
        let mut damped = h.clone();
        damped.iter_mut().step_by(n + 1).for_each(|x| *x += add);
        let Some(u) = factor::inverse_factor(damped, n) else { return Ok(None) };
        let Some(drift) = &drift else { return Ok(Some(Upper::Host(u, Terms::NONE))) };
        let Terms { target, forward } = correction.terms(drift, &u, first, n);
        // W is in its own order where it is corrected.
        let target = target.map(|c| match &indices {
            None => c,
            Some(indices) => {
                let mut own = vec![0.0; n * n];
                indices.iter().zip(c).for_each(|(&at, c)| own[at] = c);
                own
            }
        });
        Ok(Some(Upper::Host(u, Terms { target, forward })))
    }))
}
