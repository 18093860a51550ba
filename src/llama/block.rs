//! One decoder layer with its rotations and quantisers: the page to read first.
//!
//! Row vectors; a linear layer is `y = x Wᵀ + b` with `W: [out, in]`, and what there is to know of each is in a table ([`Linear`](crate::llama::Linear)). R1 is the basis of the residual stream, R2 that of every head's
//! values; both cancel between the layer that enters the basis and the one that leaves it. R3 and R4 are Hadamards that run online.

use std::sync::Arc;

use crate::hadamard::Hadamard;
use crate::llama::host::Parked;
use crate::llama::integers::Integers;
use crate::llama::rotate::{Around, LinearVars, RotatedWeights};
use crate::llama::{LayerWeights, Linears, LlamaConfig};
use crate::ops::attention::attention;
use crate::ops::log_scale::Along;
use crate::ops::rope::Rope;
use crate::profile::enter;
use crate::quant::{Site, Sites};
use crate::{Error, Result, Tensor, Var};

/// A layer's frozen weights, RMSNorm gains folded in, not rotated.
#[derive(Clone, Debug)]
pub struct Block {
    /// The seven linears.
    pub weights: LayerWeights,
    /// Which layer this is, from 0.
    pub index: usize,
    head_dim: usize,
    eps: f64,
    /// Queries and keys are turned by their positions.
    rope: bool,
    /// Keys that a query sees; `None`: all up to its own.
    window: Option<usize>,
    /// Gains of the two norms where they are not folded into the weights.
    gains: Option<[Tensor; 2]>,
    /// Logarithms of clip ratios, in the order of [`Site::ALL`].
    clips: [Option<Tensor>; Site::ALL.len()],
    /// Where the weights come from when the layer is at work, if they are in main memory.
    parked: Option<Parked>,
    /// The codes of the weights, of linears whose products are of integers.
    pub(super) integers: Option<Arc<Integers>>,
}

/// What the layers need besides their weights.
#[derive(Clone)]
pub struct Run {
    /// The quantisers and online rotations.
    pub sites: Sites,
    /// Rotary tables of `seq` positions.
    pub rope: Rope,
    /// Tokens of one sequence.
    pub seq: usize,
    /// Watches the activations.
    pub observer: Option<Arc<Observer>>,
    /// Changes them (activation patching). Gradients pass as if it had not.
    pub patch: Option<Arc<Patch>>,
    /// Computes attention in another way, without gradients; `None`: causal, over sequences of `seq` tokens.
    pub attend: Option<Arc<Attend>>,
}

impl Block {
    /// Runs the layer: `x` [tokens, C] in R1's basis, and out again. The last operation is not computed on a tape
    /// [for gradients](crate::Tape::for_gradients).
    ///
    /// The figure of the paper, line by line. Q quantises; every W and b holds its rotations ([`Block::rotate`]). Some families norm
    /// every head of q and k (`normed`), and some have layers without `rope` or with a sliding window.
    ///
    /// ```text
    /// h = Q(norm(x))
    /// q =   R3(rope(normed(h W_qᵀ + b_q)))
    /// k = Q(R3(rope(normed(h W_kᵀ + b_k))))
    /// v = Q(h W_vᵀ + b_v)                                 in R2's basis
    /// a = Q(attention(q, k, v))
    /// x = x + a W_oᵀ + b_o                                R2 undone, back in R1's basis
    ///
    /// h = Q(norm(x))
    /// m = silu(h W_gateᵀ + b_gate) · (h W_upᵀ + b_up)
    /// m = Q(R4(m))
    /// x = x + m W_downᵀ + b_down                          R4 undone, back in R1's basis
    /// ```
    ///
    /// # Errors
    /// Values of another shape than the layer's.
    pub fn forward<'t>(&self, x: Var<'t>, w: RotatedWeights<'t>, run: &Run) -> Result<Var<'t>> {
        if let Some(codes) = &self.integers {
            return self.forward_on_integers(x, w, codes, run);
        }
        let Linears([q, k, v, o, gate, up, down]) = w.linears;
        let part = enter("attention");
        let around = &w.around;
        let h = self.attention_input(x.clone(), around, run)?;
        let a = self.attend(h, [q, k, v], around, run)?;
        let x = o.add_to(x, a)?;
        drop(part);

        let _part = enter("mlp");
        let h = self.mlp_input(x.clone(), around, run)?;
        let h = match w.leave {
            Some(r1) => h.linear(r1)?,
            None => h,
        };
        let m = self.gated(h, [gate, up], around, run)?;
        down.add_to_last(x, m)
    }

    /// The input of q, k and v, `[tokens, C]`; the norm's output divided by a scale where there is one.
    ///
    /// # Errors
    /// Values of another shape than the layer's.
    pub fn attention_input<'t>(&self, x: Var<'t>, around: &Around<'t>, run: &Run) -> Result<Var<'t>> {
        self.quantized(Site::AttentionInput, self.norm(x, 0, around)?, around, run)
    }

    /// The input of o `[tokens, H·D]`, values in R2's basis.
    ///
    /// # Errors
    /// Values of another shape than the layer's.
    pub fn attend<'t>(&self, h: Var<'t>, [q, k, v]: [LinearVars<'t>; 3], around: &Around<'t>, run: &Run) -> Result<Var<'t>> {
        let norms = [q.norm.clone(), k.norm.clone()];
        let (to_q, to_k) = (h.clone(), h.clone());
        let a = self.attend_by(norms, || q.of(to_q), || k.of(to_k), || v.of(h), around, run)?;
        self.quantized(Site::AttentionOutput, a, around, run)
    }

    /// Attention of the outputs of q, k and v, each made when it is its turn; `norms` are the gains of q's and k's heads.
    pub(super) fn attend_by<'t>(
        &self,
        [q_norm, k_norm]: [Option<Var<'t>>; 2],
        q: impl FnOnce() -> Result<Var<'t>>,
        k: impl FnOnce() -> Result<Var<'t>>,
        v: impl FnOnce() -> Result<Var<'t>>,
        around: &Around<'t>,
        run: &Run,
    ) -> Result<Var<'t>> {
        let Run { sites: Sites { online, .. }, seq, .. } = run;
        let r3 = if online.r3 { Some(Hadamard::new(self.head_dim)?) } else { None };
        let q = self.heads(q()?, q_norm, run)?;
        let q = if let Some(r3) = &r3 { q.hadamard_by(r3)? } else { q };
        let k = self.rotated(Site::Key, r3, self.heads(k()?, k_norm, run)?, around, run)?; // R3
        let v = self.quantized(Site::Value, v()?, around, run)?.heads(self.head_dim)?; // in R2's basis
        match &run.attend {
            None => attention(q, k, v, *seq, self.window.filter(|w| w < seq)),
            Some(attend) => without_gradient(self.index, [q, k, v], attend.as_ref()),
        }
    }

    /// `rope(normed(x))` `[tokens, heads, D]`, as far as this layer has them.
    fn heads<'t>(&self, x: Var<'t>, norm: Option<Var<'t>>, run: &Run) -> Result<Var<'t>> {
        let x = x.heads(self.head_dim)?;
        let x = match norm {
            Some(gain) => x.rms_norm_gain(self.eps, Some(gain.value()))?,
            None => x,
        };
        if self.rope { x.rope(&run.rope) } else { Ok(x) }
    }

    /// The input of gate and up, `[tokens, C]`, scaled as [`attention_input`](Self::attention_input) is.
    ///
    /// # Errors
    /// Values of another shape than the layer's.
    pub fn mlp_input<'t>(&self, x: Var<'t>, around: &Around<'t>, run: &Run) -> Result<Var<'t>> {
        self.quantized(Site::MlpInput, self.norm(x, 1, around)?, around, run)
    }

    /// The input of down `[tokens, F]`, after R4; the output of up divided by scales where its rows are not.
    ///
    /// # Errors
    /// Values of another shape than the layer's.
    pub fn gated<'t>(&self, h: Var<'t>, [gate, up]: [LinearVars<'t>; 2], around: &Around<'t>, run: &Run) -> Result<Var<'t>> {
        let (gate, up) = (gate.of(h.clone())?, up.of(h)?);
        let m = self.gate(gate, up, around)?;
        let r4 = run.sites.online.r4.map(m.value().cols())?;
        self.rotated(Site::DownInput, r4, m, around, run) // R4
    }

    /// `silu(gate) · up`, up divided by scales where its rows are not.
    pub(super) fn gate<'t>(&self, gate: Var<'t>, up: Var<'t>, around: &Around<'t>) -> Result<Var<'t>> {
        match &around.up {
            Some(a) => gate.scaled_swiglu(up, a.clone()),
            None => gate.swiglu(up),
        }
    }
}

impl Block {
    /// Layer `index` of a model of this configuration.
    pub fn new(config: &LlamaConfig, index: usize, weights: LayerWeights) -> Self {
        let LlamaConfig { head_dim, rms_norm_eps: eps, .. } = *config;
        let (rope, window) = (config.has_rope(index), config.window(index));
        Self { weights, index, head_dim, eps, rope, window, gains: None, clips: Default::default(), parked: None, integers: None }
    }

    /// The same layer with other weights.
    pub fn with_weights(&self, weights: LayerWeights) -> Self {
        Self { weights, parked: None, integers: None, ..self.clone() }
    }

    /// The same layer, whose weights are in main memory.
    pub(crate) fn parked(self, parked: Parked) -> Self {
        Self { parked: Some(parked), ..self }
    }

    pub(crate) fn parking(&self) -> Option<&Parked> {
        self.parked.as_ref()
    }

    /// True where the weights are in main memory and come to the device when the layer is at work ([`Llama::streamed`](crate::llama::Llama::streamed)).
    pub fn is_streamed(&self) -> bool {
        self.parked.is_some()
    }

    /// The same layer with gains `[C]` of its two norms that are *not* folded into the weights. It cannot be rotated: a gain does not
    /// commute with R1.
    pub fn with_gains(self, gains: [Tensor; 2]) -> Self {
        Self { gains: Some(gains), ..self }
    }

    /// The same layer with clip constants of its own: logarithms `[kinds, 2]` of the ratios of both ends, in the order of [`Site::ALL`]
    /// ([`ClipEnds`](crate::rotation::ClipEnds)).
    pub fn with_clips(self, clips: [Option<Tensor>; Site::ALL.len()]) -> Self {
        Self { clips, ..self }
    }

    /// Its own clip constants at a site, `[kinds, 2]`.
    pub fn clip_constants(&self, site: Site) -> Option<&Tensor> {
        self.clips[site as usize].as_ref()
    }

    /// The same layer with its weights on another device.
    ///
    /// # Errors
    /// A failing copy, or no memory on the device.
    pub fn to_device(&self, device: &crate::Device) -> Result<Self> {
        self.to_device_with(device, self.fetched()?.map(|w| w.to_device(device))?)
    }

    /// The same layer with other weights and everything else on another device.
    pub(crate) fn to_device_with(&self, device: &crate::Device, weights: LayerWeights) -> Result<Self> {
        let mut block = self.with_weights(weights);
        for t in block.clips.iter_mut().flatten() {
            *t = t.to_device(device)?;
        }
        Ok(match &self.gains {
            Some([first, second]) => block.with_gains([first.to_device(device)?, second.to_device(device)?]),
            None => block,
        })
    }

    /// Gains of the two norms where they are not folded into the weights.
    pub fn gains(&self) -> Option<&[Tensor; 2]> {
        self.gains.as_ref()
    }

    pub(super) fn norm<'t>(&self, x: Var<'t>, which: usize, around: &Around<'t>) -> Result<Var<'t>> {
        let gain = self.gains.as_ref().map(|g| &g[which]);
        match (&around.norms[which], gain) {
            (Some(a), None) => x.scaled_rms_norm(self.eps, a.clone()),
            (Some(a), gain) => x.rms_norm_gain(self.eps, gain)?.log_scale(a.clone(), Along::Columns, true),
            (None, gain) => x.rms_norm_gain(self.eps, gain),
        }
    }

    /// The clip constants of a site, learned ones first.
    pub(super) fn clips<'t>(&self, site: Site, around: &Around<'t>, x: &Var<'t>) -> Option<Var<'t>> {
        let own = || self.clips[site as usize].as_ref().map(|t| x.tape().constant(t.clone()));
        around.clips[site as usize].clone().or_else(own)
    }

    fn quantized<'t>(&self, site: Site, x: Var<'t>, around: &Around<'t>, run: &Run) -> Result<Var<'t>> {
        run.observer.iter().for_each(|see| see(self.index, site, x.value()));
        let other = run.patch.as_ref().map_or(Ok(None), |patch| patch(self.index, site, x.value()))?;
        let x = match other {
            Some(other) => {
                let difference = Tensor::axpby(1.0, other, -1.0, x.value().clone())?;
                x.clone().add(x.tape().constant(difference))?
            }
            None => x,
        };
        let (spec, coded) = (run.sites.at(site), around.coded[site as usize]);
        match self.clips(site, around, &x) {
            Some(a) if coded => x.clipped_coded(spec, a, !around.straight),
            Some(a) => x.clipped_fake_quant(spec, a, !around.straight),
            None if coded => x.coded(spec),
            None => x.fake_quant(spec),
        }
    }

    /// Transformed where there is a map, then quantised; in one pass when nobody watches and no clip constants are the layer's own.
    pub(super) fn rotated<'t>(
        &self,
        site: Site,
        map: Option<Hadamard>,
        x: Var<'t>,
        around: &Around<'t>,
        run: &Run,
    ) -> Result<Var<'t>> {
        let alone = run.observer.is_none() && run.patch.is_none() && self.clips(site, around, &x).is_none();
        match map {
            Some(map) if alone && around.coded[site as usize] => x.hadamard_coded_by(&map, run.sites.at(site)),
            Some(map) if alone => x.hadamard_fake_quant_by(&map, run.sites.at(site)),
            Some(map) => self.quantized(site, x.hadamard_by(&map)?, around, run),
            None => self.quantized(site, x, around, run),
        }
    }
}

/// Is shown the input of every quantiser: layer, site, values.
pub type Observer = dyn Fn(usize, Site, &Tensor) + Send + Sync;

/// Is shown the input of every quantiser, and may put other values of the same shape in its place.
pub type Patch = dyn Fn(usize, Site, &Tensor) -> Result<Option<Tensor>> + Send + Sync;

/// Attention of a layer in another way: layer, and q `[tokens, H, D]`, k, v `[tokens, KV, D]` as attention reads them, to `[tokens, H·D]`.
pub type Attend = dyn Fn(usize, [&Tensor; 3]) -> Result<Tensor> + Send + Sync;

fn without_gradient<'t>(layer: usize, qkv: [Var<'t>; 3], attend: &Attend) -> Result<Var<'t>> {
    if qkv.iter().any(Var::requires_grad) {
        return Err(Error::Tape("attention over segments or a cache has no gradient, and one is wanted".into()));
    }
    let [q, k, v] = &qkv;
    Ok(q.tape().constant(attend(layer, [q.value(), k.value(), v.value()])?))
}

impl<'t> LinearVars<'t> {
    /// `x Wᵀ + b` with x [.., in].
    ///
    /// # Errors
    /// Operands whose shapes do not fit.
    pub fn of(self, x: Var<'t>) -> Result<Var<'t>> {
        plus(x.linear(self.weight)?, self.bias)
    }

    /// `x + a Wᵀ + b` with x [tokens, out] and a [tokens, in].
    ///
    /// # Errors
    /// Operands whose shapes do not fit.
    pub fn add_to(self, x: Var<'t>, a: Var<'t>) -> Result<Var<'t>> {
        plus(x, self.bias)?.add_linear(a, self.weight)
    }

    /// The same as the last operation of a checkpointed function, where it is not computed a second time.
    ///
    /// # Errors
    /// Operands whose shapes do not fit.
    pub fn add_to_last(self, x: Var<'t>, a: Var<'t>) -> Result<Var<'t>> {
        plus(x, self.bias)?.add_linear_last(a, self.weight)
    }
}

/// `x + b`, where there is a bias.
pub(crate) fn plus<'t>(x: Var<'t>, bias: Option<Var<'t>>) -> Result<Var<'t>> {
    match bias {
        Some(b) => x.add_bias(b),
        None => Ok(x),
    }
}
