//! A layer on integers: the page of `block.rs` with products of codes ([`integer_linear`]) in place of those of the values that codes stand
//! for. Attention, norms and what is quantised without a linear behind it (K, V) stay as they are.

use std::sync::Arc;

use crate::hadamard::Hadamard;
use crate::llama::rotate::{Around, LayerClips, LinearVars, RotatedWeights};
use crate::llama::{Block, Linear, Linears, Merged, Run};
use crate::ops::clipped_fake_quant::quantize_clipped;
use crate::ops::codes::Codes;
use crate::ops::integer_linear::{MOST_COLUMNS, integer_linear, is_fast};
use crate::profile::enter;
use crate::quant::{Engine, QuantSpec, Site, Sites};
use crate::{DType, Error, Result, Var};

/// The codes of a layer's weights; `None` where the product stays one of values.
pub(super) type Integers = Linears<Option<Codes>>;

impl Merged {
    /// The same network with integer products: `codes` are those of its weights, layer by layer. On a GPU a linear whose input has several
    /// scales a row (o, a scale a head) keeps products of values, which are faster there; [`Merged::integer_linears`] says which.
    ///
    /// Results differ from those of products of values by rounding alone: there the operands are rounded to the element type, and every
    /// sum; here the scales' products.
    ///
    /// # Errors
    /// Weights or activations that are not quantised; weights with zero points; codes of other shapes or on another device, groups of
    /// which none divides the other; layers in main memory.
    pub fn on_integers(mut self, codes: Vec<Linears<Codes>>) -> Result<Self> {
        fn wrong<T>(message: String) -> Result<T> {
            Err(Error::argument("integer products", message))
        }
        if self.blocks.iter().any(Block::is_streamed) {
            return wrong("expected all layers on the device, some are in main memory".into());
        }
        if codes.len() != self.blocks.len() {
            return wrong(format!("expected codes of {} layers, got {}", self.blocks.len(), codes.len()));
        }
        let (sites, device) = (self.scheme.sites(self.config.head_dim), self.embedding.device());
        for (block, codes) in self.blocks.iter_mut().zip(codes) {
            let index = block.index;
            let checked = codes.each(|linear, w| {
                let (name, [rows, cols]) = (linear.path(index), linear.shape(&self.config));
                let spec = sites.at(linear.row().site);
                if !spec.is_active() {
                    return wrong(format!("expected inputs of {name} in 2 to 8 bits, got {} bits", spec.bits));
                }
                if w.zero().is_some() {
                    return wrong(format!("expected symmetric weights, {name} has zero points"));
                }
                if [w.rows(), w.cols()] != [rows, cols] || w.device() != device {
                    let got = format!("[{}, {}] on {}", w.rows(), w.cols(), w.device());
                    return wrong(format!("{name}: expected codes [{rows}, {cols}] on {device}, got {got}"));
                }
                let group = spec.group_size(cols)?;
                if !group.max(w.group()).is_multiple_of(group.min(w.group())) {
                    return wrong(format!("{name}: of the groups {group} and {} one must divide the other", w.group()));
                }
                Ok((device.is_cpu() || (group == cols && w.group() == cols)).then(|| w.clone()))
            })?;
            block.integers = Some(Arc::new(checked));
        }
        Ok(self)
    }

    /// How many linears have products of integers, and how many there are.
    pub fn integer_linears(&self) -> [usize; 2] {
        let of = |b: &Block| b.integers.as_ref().map_or(0, |codes| codes.iter().filter(|(_, c)| c.is_some()).count());
        [self.blocks.iter().map(of).sum(), self.blocks.len() * Linear::ALL.len()]
    }
}

impl Block {
    /// The linears that are to multiply codes while rotations are learned: those that can, and whose products are no slower for it. Their
    /// weights then keep codes, and what they read does where all its linears are among them.
    ///
    /// On a GPU clip ratios that are learned leave no codes behind.
    ///
    /// # Errors
    /// Groups that do not divide rows; a card that cannot be asked.
    pub(super) fn coded(&self, s: &Sites, clips: &LayerClips<'_>, weight_clips: bool) -> Result<Linears<bool>> {
        let uniform = |spec: &QuantSpec| spec.is_active() && spec.rule.floating().is_none();
        let on_cpu = self.weights[Linear::Q].weight.device().is_cpu();
        Linears::try_from_fn(|linear| {
            let (w, site) = (&self.weights[linear].weight, linear.row().site);
            let spec = s.at(site);
            if s.engine == Engine::Simulated || !uniform(&s.weight) || !uniform(spec) || !s.weight.symmetric {
                return Ok(false);
            }
            let groups = [spec.group_size(w.cols())?, s.weight.group_size(w.cols())?];
            let whole = groups[0].max(groups[1]).is_multiple_of(groups[0].min(groups[1]));
            if !whole || w.cols() > MOST_COLUMNS {
                return Ok(false);
            }
            let clipped = weight_clips || clips[site as usize].is_some() || self.clip_constants(site).is_some();
            Ok(on_cpu || (!clipped && is_fast(&w.device(), [w.rows(), w.cols()], groups)?))
        })
    }
}

/// What a linear reads.
enum Input<'t> {
    /// Codes, and the type of the result.
    Codes(Codes, DType),
    Values(Var<'t>),
}

impl<'t> Input<'t> {
    /// `x Wᵀ + b`, plus a residual.
    fn linear(&self, w: Option<&Codes>, l: LinearVars<'t>, residual: Option<Var<'t>>) -> Result<Var<'t>> {
        match (self, w, residual) {
            (Self::Codes(x, dtype), Some(w), residual) => {
                let bias = l.bias.as_ref().map(Var::value);
                let y = integer_linear(x, w, bias, residual.map(Var::into_value), *dtype)?;
                Ok(l.weight.tape().constant(y))
            }
            (Self::Values(x), _, Some(residual)) => l.add_to(residual, x.clone()),
            (Self::Values(x), _, None) => l.of(x.clone()),
            (Self::Codes(..), None, _) => Err(Error::Tape("a linear on values behind a quantiser for integers".into())),
        }
    }
}

impl Block {
    /// [`Block::forward`] with products of integers where there are codes.
    ///
    /// # Errors
    /// Those of [`Block::forward`]; a gradient that is wanted; activation patching.
    pub(super) fn forward_on_integers<'t>(
        &self,
        x: Var<'t>,
        w: RotatedWeights<'t>,
        codes: &Integers,
        run: &Run,
    ) -> Result<Var<'t>> {
        if x.requires_grad() || run.patch.is_some() || w.leave.is_some() {
            return Err(Error::Tape("products of integers have no gradient and no patched inputs, and one is wanted".into()));
        }
        let Linears([q, k, v, o, gate, up, down]) = w.linears;
        let code = |linear: Linear| codes[linear].as_ref();
        let part = enter("attention");
        let around = &w.around;
        let h = self.input(Site::AttentionInput, self.norm(x.clone(), 0, around)?, None, codes, (around, run))?;
        let norms = [q.norm.clone(), k.norm.clone()];
        let (to_q, to_k) = (|| h.linear(code(Linear::Q), q, None), || h.linear(code(Linear::K), k, None));
        let a = self.attend_by(norms, to_q, to_k, || h.linear(code(Linear::V), v, None), around, run)?;
        let a = self.input(Site::AttentionOutput, a, None, codes, (around, run))?;
        let x = a.linear(code(Linear::O), o, Some(x))?;
        drop(part);

        let _part = enter("mlp");
        let h = self.input(Site::MlpInput, self.norm(x.clone(), 1, around)?, None, codes, (around, run))?;
        let (gate, up) = (h.linear(code(Linear::Gate), gate, None)?, h.linear(code(Linear::Up), up, None)?);
        let m = self.gate(gate, up, around)?;
        let r4 = run.sites.online.r4.map(m.value().cols())?;
        let m = self.input(Site::DownInput, m, r4, codes, (around, run))?; // R4
        m.linear(code(Linear::Down), down, Some(x))
    }

    /// The input of a site's linears: transformed where there is a map, then quantised; codes, where all of them read codes.
    fn input<'t>(
        &self,
        site: Site,
        x: Var<'t>,
        map: Option<Hadamard>,
        codes: &Integers,
        (around, run): (&Around<'t>, &Run),
    ) -> Result<Input<'t>> {
        if !Linear::at(site).all(|l| codes[l].is_some()) {
            return Ok(Input::Values(self.rotated(site, map, x, around, run)?));
        }
        let (dtype, spec) = (x.value().dtype(), run.sites.at(site));
        let x = match map {
            // The transformed row is not rounded to 16 bits before it is quantised.
            Some(map) if dtype.is_half() => x.to_dtype(DType::F32)?.hadamard_by(&map)?,
            Some(map) => x.hadamard_by(&map)?,
            None => x,
        };
        run.observer.iter().for_each(|see| see(self.index, site, x.value()));
        let codes = match self.clips(site, around, &x) {
            // Found on the CPU, wherever x is.
            Some(a) => Codes::new(&quantize_clipped(x.value(), spec, a.value())?, spec)?.to_device(&x.value().device())?,
            None => Codes::quantize(x.value(), spec)?,
        };
        Ok(Input::Codes(codes, dtype))
    }
}
