//! A step over a product of manifolds: rotations by an optimiser of orthogonal matrices; logarithms of scales, of clip ratios and of
//! those of weights by an [`Adam`] each. Every group has a rate of its own.

use crate::optim::{Adam, Optimizer, State};
use crate::rotation::{ClipEnds, Rotations, Scales, WeightClips};
use crate::{DType, Device, Error, Result, Tensor};

/// The gradients of everything that is learned.
#[derive(Clone, Debug, Default)]
pub struct Gradients {
    /// Of R1, R2 and R2b, as [`Rotations::as_params`] has them.
    pub rotations: Vec<Tensor>,
    /// Of the logarithms of scales.
    pub scales: Scales,
    /// Of the logarithms of clip ratios.
    pub clips: ClipEnds,
    /// Of the logarithms of the clip ratios of weights.
    pub weight_clips: Option<WeightClips>,
}

impl Gradients {
    /// What `f` makes of each, in a fixed order.
    ///
    /// # Errors
    /// The first of `f`.
    pub fn map(&self, mut f: impl FnMut(&Tensor) -> Result<Tensor>) -> Result<Self> {
        let rotations = self.rotations.iter().map(&mut f).collect::<Result<_>>()?;
        let (scales, clips) = (self.scales.map(|_, t| f(t))?, self.clips.map(|_, t| f(t))?);
        Ok(Self { rotations, scales, clips, weight_clips: self.weight_clips.as_ref().map(|w| w.map(&mut f)).transpose()? })
    }

    /// The sum of two.
    ///
    /// # Errors
    /// Shapes that differ.
    pub fn plus(self, other: Self) -> Result<Self> {
        let sum = |a: Tensor, b: Tensor| Tensor::axpby(1.0, a, 1.0, b);
        let either = |a: &Tensor, b: Option<&Tensor>| b.map_or(Ok(a.clone()), |b| sum(a.clone(), b.clone()));
        let weight_clips = match (self.weight_clips, other.weight_clips) {
            (Some(a), Some(b)) => Some(a.with_each(&b, |a, b| sum(a.clone(), b.clone()))?),
            (a, b) => a.or(b),
        };
        Ok(Self {
            weight_clips,
            rotations: self.rotations.into_iter().zip(other.rotations).map(|(a, b)| sum(a, b)).collect::<Result<_>>()?,
            scales: self.scales.map(|kind, a| either(a, other.scales.get(kind)))?,
            clips: self.clips.map(|site, a| either(a, other.clips.get(site)))?,
        })
    }
}

/// The learning rates of a step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rates {
    /// Of the rotations.
    pub rotations: f64,
    /// Of the logarithms of scales.
    pub scales: f64,
    /// Of the logarithms of clip ratios.
    pub clips: f64,
    /// Of the logarithms of the clip ratios of weights.
    pub weight_clips: f64,
}

/// Parameters in Euclidean space, and the optimiser that moves them.
#[derive(Clone)]
struct Euclidean {
    /// What its state has in front of its names.
    prefix: &'static str,
    adam: Adam,
}

impl Euclidean {
    fn new(prefix: &'static str) -> Self {
        Self { prefix, adam: Adam::default() }
    }

    /// Moves parameters, a few numbers a channel, on the CPU, where `bound` sees them too. Each comes with its name and gradient.
    fn step(
        &mut self,
        of: &[(String, &Tensor, Option<&Tensor>)],
        rate: f64,
        bound: impl Fn(Tensor) -> Result<Tensor>,
    ) -> Result<std::vec::IntoIter<Tensor>> {
        let host = |t: &Tensor| -> Result<Tensor> {
            let wide = if t.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
            t.to_device(&Device::Cpu)?.to_dtype(wide)
        };
        let missing = |name: &str| Error::argument("gradients", format!("expected those of {name}, got none"));
        let gradient = |(name, _, g): &(String, &Tensor, Option<&Tensor>)| host(g.ok_or_else(|| missing(name))?);
        let mut params = of.iter().map(|(_, t, _)| host(t)).collect::<Result<Vec<_>>>()?;
        if !params.is_empty() {
            self.adam.step(&mut params, of.iter().map(gradient).collect::<Result<_>>()?, rate)?;
        }
        let moved = params.into_iter().zip(of).map(|(moved, (_, t, _))| bound(moved)?.to_device(&t.device()));
        Ok(moved.collect::<Result<Vec<_>>>()?.into_iter())
    }

    /// Adds its state to another's.
    fn add_to(&self, state: &mut State) {
        if self.adam.steps() > 0 {
            let (of, named) = (self.adam.state(), |k: String| format!("{}{k}", self.prefix));
            state.tensors.extend(of.tensors.into_iter().map(|(k, v)| (named(k), v)));
            state.scalars.extend(of.scalars.into_iter().map(|(k, v)| (named(k), v)));
        }
    }

    /// Takes its state out of another's.
    fn take_from(&mut self, state: &mut State) -> Result<()> {
        let (mut own, inner) = (State::default(), |k: &String| k.strip_prefix(self.prefix).map(str::to_string));
        own.tensors = state.tensors.iter().filter_map(|(k, v)| Some((inner(k)?, v.clone()))).collect();
        own.scalars = state.scalars.iter().filter_map(|(k, v)| Some((inner(k)?, v.clone()))).collect();
        state.tensors.retain(|k, _| !k.starts_with(self.prefix));
        state.scalars.retain(|k, _| !k.starts_with(self.prefix));
        if own.scalars.is_empty() { Ok(()) } else { self.adam.load_state(own) }
    }
}

/// The optimisers of all groups. The one of rotations may come from outside this crate.
pub struct Product<'a> {
    rotations: &'a mut dyn Optimizer,
    scales: Euclidean,
    clips: Euclidean,
    weight_clips: Euclidean,
}

impl<'a> Product<'a> {
    /// Rotations by this optimiser, scales and clip ratios by Adam with its published constants.
    pub fn new(rotations: &'a mut dyn Optimizer) -> Self {
        let [scales, clips, weight_clips] = ["scales.", "clips.", "weight_clips."].map(Euclidean::new);
        Self { rotations, scales, clips, weight_clips }
    }

    /// The optimiser of the rotations.
    pub fn rotations(&self) -> &dyn Optimizer {
        self.rotations
    }

    /// Moves everything along its gradient, each group at its rate.
    ///
    /// # Errors
    /// Those of any optimiser, gradients that are missing; nothing has moved then.
    pub fn step(&mut self, x: &Rotations, grads: Gradients, rates: Rates) -> Result<Rotations> {
        // The optimiser of rotations comes last: the others can be put back.
        let before = (self.scales.clone(), self.clips.clone(), self.weight_clips.clone());
        let moved = self.stepped(x, grads, rates);
        if moved.is_err() {
            (self.scales, self.clips, self.weight_clips) = before;
        }
        moved
    }

    fn stepped(&mut self, x: &Rotations, grads: Gradients, rates: Rates) -> Result<Rotations> {
        let scales: Vec<_> = x.scales.iter().map(|(kind, t)| (format!("scales {kind}"), t, grads.scales.get(kind))).collect();
        let mut moved = self.scales.step(&scales, rates.scales, Ok)?;
        let scales = x.scales.map(|_, _| Ok(moved.next().expect("one for each")))?;
        let clips: Vec<_> =
            x.clips.iter().map(|(site, t)| (format!("clips {}", site.name()), t, grads.clips.get(site))).collect();
        let mut moved = self.clips.step(&clips, rates.clips, ClipEnds::bounded)?;
        let clips = x.clips.map(|_, _| Ok(moved.next().expect("one for each")))?;
        let moved = x.weight_clips.as_ref().map(|clips| {
            let of = |(i, (name, t))| {
                (format!("clip ratios of weights, {name}"), t, grads.weight_clips.as_ref().and_then(|g| g.get(i)))
            };
            let all: Vec<_> = clips.iter().enumerate().map(of).collect();
            let mut moved = self.weight_clips.step(&all, rates.weight_clips, ClipEnds::bounded)?;
            clips.map(|_| Ok(moved.next().expect("one for each")))
        });
        let weight_clips = moved.transpose()?;
        let mut params = x.as_params()?;
        self.rotations.step(&mut params, grads.rotations, rates.rotations)?;
        Ok(x.with_params(&params)?.with_scales(scales).with_clips(clips).with_weight_clips(weight_clips))
    }

    /// The states of all.
    pub fn state(&self) -> State {
        let mut state = self.rotations.state();
        self.scales.add_to(&mut state);
        self.clips.add_to(&mut state);
        self.weight_clips.add_to(&mut state);
        state
    }

    /// Continues from [`Product::state`].
    ///
    /// # Errors
    /// Those of any optimiser.
    pub fn load_state(&mut self, mut state: State) -> Result<()> {
        self.scales.take_from(&mut state)?;
        self.clips.take_from(&mut state)?;
        self.weight_clips.take_from(&mut state)?;
        self.rotations.load_state(state)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::optim::by_name;
    use crate::quant::{ClipRatios, Site};
    use crate::rotation::{Scale, Sizes};
    use crate::{io, ops};

    const RATES: Rates = Rates { rotations: 0.5, scales: 0.01, clips: 0.02, weight_clips: 0.03 };

    fn start() -> Rotations {
        let sizes = Sizes { layers: 2, hidden: 8, intermediate: 12, kv_heads: 1, head_dim: 4, pairs: 2, head_norms: false };
        let scales = Scales::ones(&[Scale::UpDown, Scale::Norms, Scale::RopePairs], &sizes).unwrap();
        let clips = ClipEnds::of_ratios(&[Site::Key, Site::DownInput], &[ClipRatios::uniform(0.9).unwrap(); 2], 2).unwrap();
        let ratios = |rows: usize| Tensor::from_vec(vec![-0.1; 2 * 2 * rows], [2, rows, 2]).unwrap();
        let weights = WeightClips::new("W4 symmetric", [8, 4, 4, 8, 12, 12, 8].map(ratios));
        let start = Rotations::random_hadamard(8, 4, 2, 0).unwrap();
        start.with_scales(scales).with_clips(clips).with_weight_clips(Some(weights))
    }

    fn gradients(x: &Rotations, seed: u64) -> Gradients {
        Gradients {
            rotations: vec![ops::randn([1, 8, 8], seed), ops::randn([2, 4, 4], seed + 1)],
            scales: x.scales.map(|_, t| Ok(ops::randn(t.shape(), seed + 2))).unwrap(),
            clips: x.clips.map(|_, t| Ok(ops::randn(t.shape(), seed + 3))).unwrap(),
            weight_clips: x.weight_clips.as_ref().map(|w| w.map(|t| Ok(ops::randn(t.shape(), seed + 4))).unwrap()),
        }
    }

    fn run(x: &mut Rotations, product: &mut Product<'_>, steps: std::ops::Range<u64>) {
        for i in steps {
            *x = product.step(x, gradients(x, 10 * i), RATES).unwrap();
        }
    }

    fn bits(x: &Rotations) -> Vec<u8> {
        x.tensors().into_iter().flat_map(|(_, t)| io::bytes(t).unwrap().to_vec()).collect()
    }

    #[test]
    fn it_resumes_to_the_same_bits_and_all_move() {
        let (mut a, mut whole) = (by_name("cayley").unwrap(), start());
        run(&mut whole, &mut Product::new(a.as_mut()), 0..5);
        let (mut b, mut x) = (by_name("cayley").unwrap(), start());
        let mut first = Product::new(b.as_mut());
        run(&mut x, &mut first, 0..2);
        let state = first.state();
        let mut c = by_name("cayley").unwrap();
        let mut second = Product::new(c.as_mut());
        second.load_state(state).unwrap();
        run(&mut x, &mut second, 2..5);
        assert_eq!(bits(&x), bits(&whole));
        assert_ne!(bits(&x), bits(&start()));
        let furthest = |a: &Tensor, b: &Tensor| {
            let pairs = a.to_f64_vec().unwrap().into_iter().zip(b.to_f64_vec().unwrap());
            pairs.fold(0f64, |m, (a, b)| m.max((a - b).abs()))
        };
        // Adam moves an entry by about its rate a step.
        let scales = furthest(whole.scales.get(Scale::UpDown).unwrap(), start().scales.get(Scale::UpDown).unwrap());
        assert!(scales > 0.005 && scales <= 0.05 + 1e-9, "{scales}");
        let clips = furthest(whole.clips.get(Site::Key).unwrap(), start().clips.get(Site::Key).unwrap());
        assert!(clips > 0.01 && clips <= 0.1 + 1e-9, "{clips}");
        let of = |x: &Rotations| x.weight_clips.as_ref().unwrap().get(6).unwrap().clone();
        let weights = furthest(&of(&whole), &of(&start()));
        assert!(weights > 0.02 && weights <= 0.15 + 1e-9, "{weights}");
    }

    #[test]
    fn clip_ratios_stay_within_what_files_hold() {
        let (mut a, mut x) = (by_name("cayley").unwrap(), start());
        let mut product = Product::new(a.as_mut());
        for i in 0..30 {
            let mut grads = gradients(&x, i);
            let down = |t: &Tensor| Tensor::from_vec(vec![1f64; t.len()], t.shape());
            grads.clips = x.clips.map(|_, t| down(t)).unwrap();
            grads.weight_clips = x.weight_clips.as_ref().map(|w| w.map(down).unwrap());
            x = product.step(&x, grads, Rates { clips: 1.0, weight_clips: 1.0, ..RATES }).unwrap();
        }
        x.clips.check(2, 2).unwrap();
        x.weight_clips.unwrap().check(2).unwrap();
    }

    #[test]
    fn a_refused_step_moves_nothing() {
        let (mut a, x) = (by_name("cayley").unwrap(), start());
        let mut product = Product::new(a.as_mut());
        let whole = gradients(&x, 1);
        let refused = [
            Gradients { rotations: whole.rotations[..1].to_vec(), ..whole.clone() },
            Gradients { scales: Scales::default(), ..whole.clone() },
            Gradients { clips: ClipEnds::default(), ..whole.clone() },
            Gradients { weight_clips: None, ..whole.clone() },
        ];
        for grads in refused {
            assert!(product.step(&x, grads, RATES).is_err());
            let steps = [&product.scales, &product.clips, &product.weight_clips].map(|group| group.adam.steps());
            assert_eq!(steps, [0; 3]);
        }
        product.step(&x, whole, RATES).unwrap();
        assert_eq!([&product.scales, &product.clips, &product.weight_clips].map(|group| group.adam.steps()), [1; 3]);
    }
}
