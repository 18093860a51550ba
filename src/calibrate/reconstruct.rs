//! What is left free in a layer whose weights have their codes, learned so that the layer's output comes back to that in full precision.
//!
//! With x̃ the hidden states in front of the layer in the quantised network, x those in the full-precision one, and θ the free numbers:
//! ```text
//! L(θ) = mean (Layer(x̃; θ) − Layer₀(x))² / L(θ₀)
//! ```
//! so that errors of the layers before are corrected too. θ are the clip constants of the layer's activations, K and V (both ends, K and V head by
//! head), as InfoQuant learns them after GPTQ (arXiv 2605.26175, there on the full-precision x), and a factor `exp(a)` on the scale of every
//! row or group of a weight. Codes and zero points stay. Adam, the rate falling by a cosine to a thousandth; a step reads one part of the
//! calibration text, in an order drawn by the seed.

use std::fmt;
use std::str::FromStr;

use super::QuantizedLayer;
use crate::data::Sampler;
use crate::grid::{QuantSpec, Quantized};
use crate::llama::{Block, Linear, LlamaConfig, RotatedWeights, Run};
use crate::ops::log_scale::Along;
use crate::ops::mean_square::square;
use crate::optim::{Adam, Optimizer, Schedule};
use crate::quant::{QuantizedLinear, Scheme, Site};
use crate::rotation::ClipEnds;
use crate::{DType, Device, Error, Result, Tape, Tensor, Var};

/// What is learned of every layer once its weights are quantised, and how.
///
/// ```
/// use spinquant::calibrate::Reconstruct;
/// let both: Reconstruct = "clips,scales".parse()?;
/// assert_eq!((both.clips, both.scales, both.steps), (true, true, 100));
/// assert_eq!(Reconstruct { clips: false, ..both }.to_string(), "scales");
/// assert!("clips,codes".parse::<Reconstruct>().is_err());
/// # Ok::<(), spinquant::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Reconstruct {
    /// The clip constants of what the scheme quantises beside weights.
    pub clips: bool,
    /// The scales of the weights.
    pub scales: bool,
    /// Steps a layer.
    pub steps: usize,
    /// Adam's rate for logarithms of clip ratios in the first step; those of scales have a fifth of it.
    pub rate: f64,
    /// Of the order in which the text is read.
    pub seed: u64,
}

/// The rate for logarithms of scales over that for logarithms of clip ratios: a scale moves every weight of its row.
const SCALE_RATE: f64 = 0.2;
/// The largest change of a scale's logarithm: to the half or to twice.
const LARGEST_CHANGE: f64 = std::f64::consts::LN_2;
/// The part of the rate that is left in the end.
const LAST_RATE: f64 = 1e-3;

impl Default for Reconstruct {
    /// Both, in 100 steps from a rate of 0.005.
    fn default() -> Self {
        Self { clips: true, scales: true, steps: 100, rate: 5e-3, seed: 0 }
    }
}

impl FromStr for Reconstruct {
    type Err = Error;
    fn from_str(s: &str) -> Result<Self> {
        let none = Self { clips: false, scales: false, ..Self::default() };
        s.split(',').try_fold(none, |so_far, part| match part.trim() {
            "clips" => Ok(Self { clips: true, ..so_far }),
            "scales" => Ok(Self { scales: true, ..so_far }),
            _ => Err(Error::argument("reconstruct", format!("expected clips, scales or clips,scales, got {s:?}"))),
        })
    }
}

impl fmt::Display for Reconstruct {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match (self.clips, self.scales) {
            (true, true) => "clips,scales",
            (true, false) => "clips",
            (false, true) => "scales",
            (false, false) => "nothing",
        })
    }
}

impl Reconstruct {
    /// Checks the numbers, and that a scheme leaves something to learn of everything that is asked for.
    ///
    /// # Errors
    /// [`Error::Argument`]: no steps, a rate that is not above 0, clips where only weights are quantised, scales where weights are not;
    /// either of blocks of floating-point numbers.
    pub fn check(&self, scheme: &Scheme) -> Result<()> {
        let wrong = |message: String| Err(Error::argument("reconstruct", message));
        if self.steps == 0 || !(self.rate > 0.0 && self.rate.is_finite()) {
            return wrong(format!("expected at least 1 step and a finite rate above 0, got {} and {}", self.steps, self.rate));
        }
        if !self.clips && !self.scales {
            return wrong("expected clips, scales or both, got neither".into());
        }
        if self.clips && !scheme.quantizes_activations() {
            return wrong(format!("clips: expected activations, K or V of less than 16 bits, got {scheme}"));
        }
        if self.scales && scheme.weight_bits >= 16 {
            return wrong(format!("scales: expected weights of less than 16 bits, got {scheme}"));
        }
        for (what, asked, format) in [
            ("clips: expected activations", self.clips, scheme.activation_format),
            ("scales: expected weights", self.scales, scheme.weight_format),
        ] {
            if let (true, Some(_)) = (asked, format) {
                return wrong(format!("{what} of integers, whose scales have no steps of their own, got {scheme}"));
            }
        }
        Ok(())
    }

    /// Adam's rate for clip constants in a step.
    fn rate_at(&self, step: usize) -> f64 {
        let last = LAST_RATE * self.rate;
        last + Schedule::Cosine.at(step, self.steps, self.rate - last)
    }
}

/// A quantised layer that learns, with its text: hidden states in front of it, and those that should be behind it, part by part.
pub(super) struct Student<'a> {
    pub block: &'a Block,
    pub run: &'a Run,
    pub inputs: &'a [Tensor],
    pub targets: &'a [Tensor],
    grids: Vec<WeightGrid>,
    sites: Vec<Site>,
}

/// A weight as its scales see it.
struct WeightGrid {
    linear: Linear,
    /// `code − zero`, a row a scale.
    steps: Tensor,
    /// Logarithms of the scales.
    logarithms: Tensor,
}

/// The numbers that are learned, on the CPU.
#[derive(Clone)]
pub(super) struct Free {
    /// `[kinds, 2]` a site.
    clips: Vec<Tensor>,
    /// Changes of logarithms, one a scale.
    scales: Vec<Tensor>,
}

impl<'a> Student<'a> {
    /// Of a layer whose quantised weights `block` runs with.
    ///
    /// # Errors
    /// Scales that are not above 0; a failing copy.
    pub fn new(
        by: &Reconstruct,
        (block, layer): (&'a Block, &QuantizedLayer),
        run: &'a Run,
        inputs: &'a [Tensor],
        targets: &'a [Tensor],
    ) -> Result<Self> {
        let mut grids = vec![];
        for (linear, l) in layer.linears.iter().filter(|_| by.scales) {
            let Some(codes) = &l.weight.codes else { continue };
            let w = &l.weight.weight;
            let ones = Tensor::from_vec(vec![1f64; codes.scale.len()], codes.scale.shape())?.to_dtype(codes.scale.dtype())?;
            let steps = Quantized { scale: ones, ..codes.clone() }.dequantize()?.to_dtype(w.dtype())?.to_device(&w.device())?;
            let logarithms: Vec<f64> = codes.scale.to_f64_vec()?.into_iter().map(f64::ln).collect();
            if logarithms.iter().any(|a| !a.is_finite()) {
                return Err(Error::numeric(format!("scales of {linear}"), "expected finite numbers above 0"));
            }
            let n = logarithms.len();
            grids.push(WeightGrid {
                linear,
                steps: steps.reshape([n, codes.group])?,
                logarithms: Tensor::from_vec(logarithms, [n])?.to_dtype(wide(w.dtype()))?.to_device(&w.device())?,
            });
        }
        let active = |site: &Site| by.clips && run.sites.at(*site).is_active();
        Ok(Self { block, run, inputs, targets, grids, sites: Site::ALL.into_iter().filter(active).collect() })
    }

    /// Where learning starts: the layer's own clip constants, else the scheme's ratios; the scales as they are.
    ///
    /// # Errors
    /// A failing copy.
    pub fn start(&self, config: &LlamaConfig, scheme: &Scheme) -> Result<Free> {
        let dtype = wide(self.inputs.first().map_or(DType::F32, Tensor::dtype));
        let clips = self.sites.iter().map(|&site| match self.block.clip_constants(site) {
            Some(own) => own.to_device(&Device::Cpu)?.to_dtype(dtype),
            None => {
                let kinds = ClipEnds::kinds(site, config.kv_heads);
                Tensor::from_vec(vec![scheme.activation_clip.at(site).ln(); 2 * kinds], [kinds, 2])?.to_dtype(dtype)
            }
        });
        let scales = self.grids.iter().map(|grid| Tensor::zeros(grid.logarithms.shape(), dtype, &Device::Cpu));
        Ok(Free { clips: clips.collect::<Result<_>>()?, scales: scales.collect::<Result<_>>()? })
    }

    /// The layer's output, as a function of the input and the free numbers on one tape.
    ///
    /// # Errors
    /// Those of the operations.
    fn output<'t>(&self, x: Var<'t>, clips: &[Var<'t>], scales: &[Var<'t>]) -> Result<Var<'t>> {
        let tape = x.tape();
        let mut w = RotatedWeights::constants(tape, &self.block.weights);
        for (site, a) in self.sites.iter().zip(clips) {
            w.around.clips[*site as usize] = Some(a.clone());
        }
        for (grid, a) in self.grids.iter().zip(scales) {
            let shape = self.block.weights[grid.linear].weight.shape().to_vec();
            let logarithms = tape.constant(grid.logarithms.clone()).add(a.clone())?;
            let weight = tape.constant(grid.steps.clone()).log_scale(logarithms, Along::Rows, false)?;
            w.linears[grid.linear].weight = weight.reshape(shape)?;
        }
        self.block.forward(x, w, self.run)
    }

    /// Gradients of `mean (output − target)² / first` on part `i`: of the clip constants, then of the scales, on the CPU.
    ///
    /// # Errors
    /// Those of the operations.
    fn gradients(&self, free: &Free, i: usize, first: f64) -> Result<[Vec<Tensor>; 2]> {
        let (x, target) = (&self.inputs[i], &self.targets[i]);
        let tape = Tape::new();
        let enter = |t: &Tensor| Ok(tape.variable(t.to_device(&x.device())?));
        let clips = free.clips.iter().map(enter).collect::<Result<Vec<_>>>()?;
        let scales = free.scales.iter().map(enter).collect::<Result<Vec<_>>>()?;
        let y = self.output(tape.constant(x.clone()), &clips, &scales)?;
        // dy is brought to a size that 16-bit types hold, also when it is summed over tokens; the gradients get the rest of the factor.
        let size = 1.0 / (first * x.rows() as f64).sqrt();
        let rest = 2.0 / (x.len() as f64 * first * size);
        let dy = Tensor::axpby(size, y.value().clone(), -size, target.clone())?;
        let mut grads = tape.backward_from(y, dy)?;
        let mut host = |v: &Var<'_>| grads.take(v)?.to_device(&Device::Cpu)?.scale(rest);
        Ok([clips.iter().map(&mut host).collect::<Result<_>>()?, scales.iter().map(&mut host).collect::<Result<_>>()?])
    }

    /// Learns from `free` on; `first` is the mean square error there.
    ///
    /// # Errors
    /// A gradient that is not finite; those of the operations.
    pub fn learn(&self, by: &Reconstruct, mut free: Free, first: f64) -> Result<Free> {
        let order = Sampler::new((0..self.inputs.len()).collect(), 1, by.seed)?;
        let (mut of_clips, mut of_scales) = (Adam::default(), Adam::default());
        for step in 0..by.steps {
            let [clips, scales] = self.gradients(&free, order.step(step)[0], first)?;
            let rate = by.rate_at(step);
            of_clips.step(&mut free.clips, clips, rate)?;
            of_scales.step(&mut free.scales, scales, SCALE_RATE * rate)?;
            for t in &mut free.clips {
                *t = ClipEnds::bounded(t.clone())?;
            }
            for t in &mut free.scales {
                let bounded: Vec<f64> = t.to_f64_vec()?.into_iter().map(|a| a.clamp(-LARGEST_CHANGE, LARGEST_CHANGE)).collect();
                *t = Tensor::from_vec(bounded, t.shape())?.to_dtype(t.dtype())?;
            }
        }
        Ok(free)
    }

    /// A layer with what was learned of it; scales are rounded to the type `stored`, where files keep them in one.
    ///
    /// # Errors
    /// A failing copy.
    pub fn finish(&self, free: &Free, mut layer: QuantizedLayer, stored: Option<DType>) -> Result<QuantizedLayer> {
        for (site, a) in self.sites.iter().zip(&free.clips) {
            layer.clips[*site as usize] = Some(a.to_device(&self.inputs[0].device())?);
        }
        let spec = QuantSpec { stored, ..QuantSpec::NONE };
        for (grid, a) in self.grids.iter().zip(&free.scales) {
            let l = &mut layer.linears[grid.linear].weight;
            let Some(codes) = l.codes.take() else { continue };
            let scaled = codes.scale.to_f64_vec()?.into_iter().zip(a.to_f64_vec()?).map(|(s, a)| spec.scale(s * a.exp()));
            let scale = Tensor::from_vec(scaled.collect::<Vec<f64>>(), codes.scale.shape())?.to_dtype(codes.scale.dtype())?;
            let codes = Quantized { scale, ..codes };
            let damping = l.damping;
            *l = QuantizedLinear { damping, ..QuantizedLinear::from_codes(codes, l.weight.dtype(), &l.weight.device())? };
        }
        Ok(layer)
    }
}

/// Σ (a − b)² and Σ b² over parts of hidden states.
///
/// # Errors
/// Parts of other shapes.
pub(super) fn squares(a: &[Tensor], b: &[Tensor]) -> Result<[f64; 2]> {
    a.iter().zip(b).try_fold([0.0, 0.0], |[error, size], (a, b)| {
        Ok([error + square(&Tensor::axpby(1.0, a.clone(), -1.0, b.clone())?)?, size + square(b)?])
    })
}

/// The type of free numbers beside values of `dtype`.
fn wide(dtype: DType) -> DType {
    if dtype == DType::F64 { DType::F64 } else { DType::F32 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check;
    use crate::llama::{Rotated, synthetic};
    use crate::ops::randn;
    use crate::quant::{Clip, Rtn, WeightQuantizer};
    use crate::rotation::Rotations;

    /// The gradient is that of the network with frozen roundings, and its factors are those of the loss.
    #[test]
    fn gradients_are_those_of_the_loss() {
        let config = LlamaConfig { attention_bias: true, ..synthetic::shape("tiny:1").unwrap() };
        let model = synthetic::model(&config, 3, DType::F64, &Device::Cpu).unwrap();
        let rotations = Rotations::random_hadamard(config.hidden_size, config.head_dim, 1, 4).unwrap();
        for (symmetric_weights, weight_group) in [(true, None), (false, Some(8))] {
            let scheme = Scheme { symmetric_weights, weight_group, weight_clip: Clip::Ratio(0.9), ..Scheme::new(4, 4, 4) };
            let rotated = Rotated::new(&model, Some(&rotations), &scheme).unwrap();
            let exact = rotated.block(0).unwrap();
            let spec = scheme.sites(config.head_dim).weight;
            let linears =
                exact.weights.each(|_, l| Ok(l.with_weight(Rtn.quantize(&[&l.weight], &spec, None)?.remove(0)))).unwrap();
            let layer = QuantizedLayer { index: 0, linears, clips: Default::default() };
            let block = layer.block(&exact);
            let run = model.run(&scheme, 5).unwrap();
            let x = [randn([10, config.hidden_size], 5)];
            let target = [randn([10, config.hidden_size], 6)];
            let by = Reconstruct::default();
            let student = Student::new(&by, (&block, &layer), &run, &x, &target).unwrap();
            let start = student.start(&config, &Scheme { activation_clip: "0.8".parse().unwrap(), ..scheme }).unwrap();
            let (sites, weights) = (start.clips.len(), start.scales.len());
            assert_eq!((sites, weights), (6, 7));
            assert_eq!(start.clips[1].shape(), [config.kv_heads, 2]);
            let moved = |(i, t): (usize, &Tensor)| Tensor::axpby(1.0, t.clone(), 0.05, randn(t.shape(), 40 + i as u64)).unwrap();
            let free = Free {
                clips: start.clips.iter().enumerate().map(moved).collect(),
                scales: start.scales.iter().enumerate().map(moved).collect(),
            };
            let inputs: Vec<Tensor> = free.clips.iter().chain(&free.scales).cloned().collect();
            check::gradients(&inputs, |v| {
                let x = v[0].tape().constant(x[0].clone());
                student.output(x, &v[..sites], &v[sites..])
            })
            .unwrap();

            let first = 0.7;
            let got = student.gradients(&free, 0, first).unwrap().concat();
            let tape = Tape::new();
            let vars: Vec<Var<'_>> = inputs.iter().map(|t| tape.variable(t.clone())).collect();
            let y = student.output(tape.constant(x[0].clone()), &vars[..sites], &vars[sites..]).unwrap();
            let n = y.value().len();
            let off = y.add(tape.constant(target[0].clone().scale(-1.0).unwrap())).unwrap().reshape([1, n]).unwrap();
            let loss = off.clone().linear(off).unwrap().reshape([]).unwrap().scale(1.0 / (n as f64 * first)).unwrap();
            let mut grads = tape.backward(loss).unwrap();
            for (got, var) in got.iter().zip(&vars) {
                let (got, want) = (got.to_f64_vec().unwrap(), grads.take(var).unwrap().to_f64_vec().unwrap());
                let size = want.iter().fold(0f64, |m, x| m.max(x.abs()));
                assert!(size > 0.0 && got.iter().zip(&want).all(|(a, b)| (a - b).abs() <= 1e-12 * size));
            }
        }
    }

    #[test]
    fn rates_fall_to_a_thousandth() {
        let by = Reconstruct { steps: 1000, rate: 2.0, ..Reconstruct::default() };
        assert_eq!(by.rate_at(0), 2.0);
        assert!((by.rate_at(1000) - 2e-3).abs() < 1e-15 && by.rate_at(999) < 2.1e-3);
    }

    #[test]
    fn what_leaves_nothing_to_learn_is_refused() {
        let check = |what: &str, scheme: &str| what.parse::<Reconstruct>().unwrap().check(&scheme.parse().unwrap());
        check("clips,scales", "W4A4KV4").unwrap();
        check("clips", "W16A4KV4").unwrap();
        check("scales", "W4A16KV16").unwrap();
        for (what, scheme, said) in [
            ("clips,scales", "W4A16KV16", "less than 16 bits, got W4A16KV16"),
            ("clips,scales", "W16A4KV4", "weights of less than 16 bits, got W16A4KV4"),
        ] {
            let message = check(what, scheme).unwrap_err().to_string();
            assert!(message.contains(said), "{message}");
        }
        for odd in [
            Reconstruct { steps: 0, ..Reconstruct::default() },
            Reconstruct { rate: f64::NAN, ..Reconstruct::default() },
            Reconstruct { clips: false, scales: false, ..Reconstruct::default() },
        ] {
            assert!(odd.check(&Scheme::new(4, 4, 4)).is_err(), "{odd:?}");
        }
        assert!("".parse::<Reconstruct>().unwrap_err().to_string().contains("expected clips, scales or clips,scales"));
    }
}
