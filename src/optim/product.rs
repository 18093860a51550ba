//! A step over a product of manifolds: rotations by an optimiser of orthogonal matrices, logarithms of scales by [`Adam`], each at a rate of
//! its own.

use crate::optim::{Adam, Optimizer, State};
use crate::rotation::{Rotations, Scale, Scales};
use crate::{DType, Device, Error, Result, Tensor};

/// The two optimisers. The one of rotations may come from outside this crate.
pub struct Product<'a> {
    rotations: &'a mut dyn Optimizer,
    scales: Adam,
}

/// What states have in front of the names of the second optimiser.
const SCALES: &str = "scales.";

impl<'a> Product<'a> {
    /// Rotations by this optimiser, scales by Adam with its published constants.
    pub fn new(rotations: &'a mut dyn Optimizer) -> Self {
        Self { rotations, scales: Adam::default() }
    }

    /// The optimiser of the rotations.
    pub fn rotations(&self) -> &dyn Optimizer {
        self.rotations
    }

    /// Moves R1 and R2 at the first rate along their gradients `[1, C, C]`, `[L, D, D]`, and the scales at the second along theirs.
    ///
    /// # Errors
    /// Those of either optimiser, gradients of scales that there are not; nothing has moved then.
    pub fn step(&mut self, x: &Rotations, grads: (Vec<Tensor>, &Scales), rates: (f64, f64)) -> Result<Rotations> {
        let kinds: Vec<Scale> = x.scales.iter().map(|(kind, _)| kind).collect();
        let mut moved = Scales::default();
        // Scales first: Adam can be put back.
        let before = self.scales.clone();
        if !kinds.is_empty() {
            // A few numbers a channel, stepped on the CPU.
            let host = |t: &Tensor| -> Result<Tensor> {
                let wide = if t.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
                t.to_device(&Device::Cpu)?.to_dtype(wide)
            };
            let missing = |kind: Scale| Error::argument("gradients", format!("expected those of scales {kind}, got none"));
            let gradient = |&kind: &Scale| host(grads.1.get(kind).ok_or_else(|| missing(kind))?);
            let mut params = x.scales.iter().map(|(_, t)| host(t)).collect::<Result<Vec<_>>>()?;
            self.scales.step(&mut params, kinds.iter().map(gradient).collect::<Result<_>>()?, rates.1)?;
            for (kind, t) in kinds.into_iter().zip(params) {
                moved.set(kind, Some(t.to_device(&x.r1.device())?));
            }
        }
        let mut params = x.as_params()?;
        if let Err(e) = self.rotations.step(&mut params, grads.0, rates.0) {
            self.scales = before;
            return Err(e);
        }
        Ok(Rotations::from_params(&params)?.with_scales(moved))
    }

    /// The states of both.
    pub fn state(&self) -> State {
        let mut state = self.rotations.state();
        if self.scales.steps() > 0 {
            let of = self.scales.state();
            state.tensors.extend(of.tensors.into_iter().map(|(k, v)| (format!("{SCALES}{k}"), v)));
            state.scalars.extend(of.scalars.into_iter().map(|(k, v)| (format!("{SCALES}{k}"), v)));
        }
        state
    }

    /// Continues from [`Product::state`].
    ///
    /// # Errors
    /// Those of either optimiser.
    pub fn load_state(&mut self, mut state: State) -> Result<()> {
        let (mut scales, inner) = (State::default(), |k: &String| k.strip_prefix(SCALES).map(str::to_string));
        scales.tensors = state.tensors.iter().filter_map(|(k, v)| Some((inner(k)?, v.clone()))).collect();
        scales.scalars = state.scalars.iter().filter_map(|(k, v)| Some((inner(k)?, v.clone()))).collect();
        state.tensors.retain(|k, _| !k.starts_with(SCALES));
        state.scalars.retain(|k, _| !k.starts_with(SCALES));
        self.rotations.load_state(state)?;
        if scales.scalars.is_empty() { Ok(()) } else { self.scales.load_state(scales) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::optim::by_name;
    use crate::rotation::Sizes;
    use crate::{io, ops};

    fn start() -> Rotations {
        let sizes = Sizes { layers: 2, hidden: 8, intermediate: 12, values: 4 };
        let scales = Scales::ones(&[Scale::UpDown, Scale::Norms], &sizes).unwrap();
        Rotations::random_hadamard(8, 4, 2, 0).unwrap().with_scales(scales)
    }

    fn gradients(x: &Rotations, seed: u64) -> (Vec<Tensor>, Scales) {
        let r = vec![ops::randn([1, 8, 8], seed), ops::randn([2, 4, 4], seed + 1)];
        (r, x.scales.map(|_, t| Ok(ops::randn(t.shape(), seed + 2))).unwrap())
    }

    fn run(x: &mut Rotations, product: &mut Product<'_>, steps: std::ops::Range<u64>) {
        for i in steps {
            let (r, s) = gradients(x, 10 * i);
            *x = product.step(x, (r, &s), (0.5, 0.01)).unwrap();
        }
    }

    fn bits(x: &Rotations) -> Vec<u8> {
        let scales = x.scales.iter().map(|(_, t)| t);
        [&x.r1, &x.r2].into_iter().chain(scales).flat_map(|t| io::bytes(t).unwrap().to_vec()).collect()
    }

    #[test]
    fn it_resumes_to_the_same_bits_and_both_move() {
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
        let largest = x.scales.get(Scale::UpDown).unwrap().to_f64_vec().unwrap().into_iter().fold(0f64, |m, a| m.max(a.abs()));
        assert!(largest > 0.005 && largest <= 0.05 + 1e-9, "{largest}: Adam moves an entry by about its rate");
    }

    #[test]
    fn a_refused_step_moves_nothing() {
        let (mut a, x) = (by_name("cayley").unwrap(), start());
        let mut product = Product::new(a.as_mut());
        let (r, s) = gradients(&x, 1);
        assert!(product.step(&x, (vec![r[0].clone()], &s), (0.5, 0.01)).is_err());
        assert!(product.step(&x, (r.clone(), &Scales::default()), (0.5, 0.01)).is_err());
        assert_eq!(product.scales.steps(), 0);
        product.step(&x, (r, &s), (0.5, 0.01)).unwrap();
        assert_eq!(product.scales.steps(), 1);
    }
}
