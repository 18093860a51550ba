//! One LLaMA layer with its rotations and quantisers: the page to read first.
//!
//! Row vectors; a linear layer is `y = x Wᵀ` with `W: [out, in]`. R1 is the basis of the residual stream, R2 that of every head's
//! values; both cancel between the layer that enters the basis and the one that leaves it. R3 and R4 are Hadamards that run online.

use std::sync::Arc;

use crate::llama::{LayerWeights, LlamaConfig};
use crate::ops::attention::attention;
use crate::ops::rope::Rope;
use crate::profile::enter;
use crate::quant::{Site, Sites};
use crate::{DType, Error, Result, Tensor, Var};

/// A layer's frozen weights, RMSNorm gains folded in, not rotated.
#[derive(Clone, Debug)]
pub struct Block {
    /// The seven linears, in the Hugging Face shapes `[out, in]`.
    pub weights: LayerWeights,
    /// Which layer this is, from 0.
    pub index: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    eps: f64,
    /// Gains of the two norms where they are not folded into the weights.
    gains: Option<[Tensor; 2]>,
}

/// The weights a layer runs with: rotated and quantised, on a tape.
#[derive(Clone)]
pub struct RotatedWeights<'t> {
    /// `Q(W_q R1)`.
    pub q: Var<'t>,
    /// `Q(W_k R1)`.
    pub k: Var<'t>,
    /// `Q(R2ᵀ W_v R1)`, head by head.
    pub v: Var<'t>,
    /// `Q(R1ᵀ W_o R2)`, head by head.
    pub o: Var<'t>,
    /// `Q(W_gate R1)`.
    pub gate: Var<'t>,
    /// `Q(W_up R1)`.
    pub up: Var<'t>,
    /// `Q(R1ᵀ W_down R4)`.
    pub down: Var<'t>,
    /// R1 where gate and up were left unrotated: their input is taken out of R1's basis instead, `x̂ (W R1)ᵀ = (x̂ R1ᵀ) Wᵀ`.
    pub leave: Option<Var<'t>>,
}

impl<'t> RotatedWeights<'t> {
    /// The seven linears in the order of the fields, then R1 where some were left unrotated.
    pub fn into_vec(self) -> Vec<Var<'t>> {
        let Self { q, k, v, o, gate, up, down, leave } = self;
        [q, k, v, o, gate, up, down].into_iter().chain(leave).collect()
    }

    /// Back from [`RotatedWeights::into_vec`].
    pub fn from_vec(mut vars: Vec<Var<'t>>) -> Result<Self> {
        let leave = if vars.len() == 8 { vars.pop() } else { None };
        let [q, k, v, o, gate, up, down] = <[_; 7]>::try_from(vars)
            .map_err(|v| Error::argument("weights", format!("expected those of seven linears, got {}", v.len())))?;
        Ok(Self { q, k, v, o, gate, up, down, leave })
    }
}

/// Is shown the input of every quantiser: layer, site, values.
pub type Observer = dyn Fn(usize, Site, &Tensor) + Send + Sync;

/// Is shown the input of every quantiser, and may put other values of the same shape in its place.
pub type Patch = dyn Fn(usize, Site, &Tensor) -> Result<Option<Tensor>> + Send + Sync;

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
}

impl Block {
    /// Layer `index` of a model of this configuration.
    pub fn new(config: &LlamaConfig, index: usize, weights: LayerWeights) -> Self {
        let LlamaConfig { heads, kv_heads, head_dim, rms_norm_eps: eps, .. } = *config;
        Self { weights, index, heads, kv_heads, head_dim, eps, gains: None }
    }

    /// The same layer with other weights.
    pub fn with_weights(&self, weights: LayerWeights) -> Self {
        Self { weights, ..self.clone() }
    }

    /// The same layer with gains `[C]` of its two norms that are *not* folded into the weights. It cannot be rotated: a gain does not
    /// commute with R1.
    pub fn with_gains(self, gains: [Tensor; 2]) -> Self {
        Self { gains: Some(gains), ..self }
    }

    /// The same layer with its weights on another device.
    pub fn to_device(&self, device: &crate::Device) -> Result<Self> {
        let block = self.with_weights(self.weights.map(|w| w.to_device(device))?);
        Ok(match &self.gains {
            Some([first, second]) => block.with_gains([first.to_device(device)?, second.to_device(device)?]),
            None => block,
        })
    }

    /// Gains of the two norms where they are not folded into the weights.
    pub fn gains(&self) -> Option<&[Tensor; 2]> {
        self.gains.as_ref()
    }

    /// Rotates and quantises the weights. Gradients flow to `r1` [C, C] and `r2` [D, D]. Given the number of input rows, unquantised
    /// weights may be left unrotated where rotating the input instead is cheaper ([`RotatedWeights::leave`]).
    ///
    /// What is rotated twice (v and o by R1 and R2, down by R1 and R4) is kept in `f32` in between where weights have 16 bits.
    pub fn rotate<'t>(&self, r1: &Var<'t>, r2: &Var<'t>, s: &Sites, tokens: Option<usize>) -> Result<RotatedWeights<'t>> {
        if self.gains.is_some() {
            return Err(Error::argument("rotation", "the gains of this layer's norms are not folded into its weights"));
        }
        let _part = enter("weights");
        let tape = r1.tape();
        let constant = |w: &Tensor| tape.constant(w.clone());
        let w = &self.weights;
        let (c, d, dtype) = (w.q.cols(), self.head_dim, w.q.dtype());
        let wide = if dtype.is_half() { DType::F32 } else { dtype };
        let into = |w: Var<'t>| w.matmul(r1.clone());
        let quantized = |w: Var<'t>| w.to_dtype(dtype)?.fake_quant(&s.weight);

        let v = constant(&w.v).matmul_as(r1.clone(), wide)?.reshape([self.kv_heads, d, c])?;
        let v = r2.clone().transpose_matmul(v)?.reshape([self.kv_heads * d, c])?;
        let o = r1.clone().transpose_matmul_as(constant(&w.o), wide)?.reshape([c * self.heads, d])?;
        let o = o.matmul(r2.clone())?.reshape([c, self.heads * d])?;
        let down = if s.online.r4 {
            r1.clone().transpose_matmul_as(constant(&w.down), wide)?.hadamard()?
        } else {
            r1.clone().transpose_matmul(constant(&w.down))?
        };
        let outside = |tokens| cheaper_outside(w.gate.rows() + w.up.rows(), c, tokens);
        let leave = !s.weight.is_active() && tokens.is_some_and(outside);
        let mlp = |w: &Tensor| if leave { Ok(constant(w)) } else { quantized(into(constant(w))?) };
        Ok(RotatedWeights {
            q: quantized(into(constant(&w.q))?)?,
            k: quantized(into(constant(&w.k))?)?,
            v: quantized(v)?,
            o: quantized(o)?,
            gate: mlp(&w.gate)?,
            up: mlp(&w.up)?,
            down: quantized(down)?,
            leave: leave.then(|| r1.clone()),
        })
    }

    /// Runs the layer: `x` [tokens, C] in R1's basis, and out again. The last operation is not computed on a tape
    /// [for gradients](crate::Tape::for_gradients).
    pub fn forward<'t>(&self, x: Var<'t>, w: RotatedWeights<'t>, run: &Run) -> Result<Var<'t>> {
        let part = enter("attention");
        let h = self.attention_input(x.clone(), run)?;
        let a = self.attend(h, w.q, w.k, w.v, run)?;
        let x = x.add_linear(a, w.o)?; // R2 undone, back in R1's basis
        drop(part);

        let _part = enter("mlp");
        let h = self.mlp_input(x.clone(), run)?;
        let h = match w.leave {
            Some(r1) => h.linear(r1)?,
            None => h,
        };
        let m = self.gated(h, w.gate, w.up, run)?;
        x.add_linear_last(m, w.down)
    }

    /// The input of q, k and v.
    pub fn attention_input<'t>(&self, x: Var<'t>, run: &Run) -> Result<Var<'t>> {
        self.quantized(Site::AttentionInput, self.norm(x, 0)?, run)
    }

    /// The input of o `[tokens, H·D]`, values in R2's basis.
    pub fn attend<'t>(&self, h: Var<'t>, q: Var<'t>, k: Var<'t>, v: Var<'t>, run: &Run) -> Result<Var<'t>> {
        let Run { sites: s, rope, seq, .. } = run;
        let d = self.head_dim;
        let r3 = |x: Var<'t>| if s.online.r3 { x.hadamard() } else { Ok(x) };
        let q = r3(h.clone().linear(q)?.heads(d)?.rope(rope)?)?;
        let k = self.rotated(Site::Key, s.online.r3, h.clone().linear(k)?.heads(d)?.rope(rope)?, run)?; // R3
        let v = self.quantized(Site::Value, h.linear(v)?, run)?.heads(d)?; // in R2's basis
        self.quantized(Site::AttentionOutput, attention(q, k, v, *seq)?, run)
    }

    /// The input of gate and up.
    pub fn mlp_input<'t>(&self, x: Var<'t>, run: &Run) -> Result<Var<'t>> {
        self.quantized(Site::MlpInput, self.norm(x, 1)?, run)
    }

    /// The input of down `[tokens, F]`, after R4.
    pub fn gated<'t>(&self, h: Var<'t>, gate: Var<'t>, up: Var<'t>, run: &Run) -> Result<Var<'t>> {
        let m = h.clone().linear(gate)?.swiglu(h.linear(up)?)?;
        self.rotated(Site::DownInput, run.sites.online.r4, m, run) // R4
    }

    fn norm<'t>(&self, x: Var<'t>, which: usize) -> Result<Var<'t>> {
        x.rms_norm_gain(self.eps, self.gains.as_ref().map(|g| &g[which]))
    }

    fn quantized<'t>(&self, site: Site, x: Var<'t>, run: &Run) -> Result<Var<'t>> {
        run.observer.iter().for_each(|see| see(self.index, site, x.value()));
        let other = run.patch.as_ref().map_or(Ok(None), |patch| patch(self.index, site, x.value()))?;
        let x = match other {
            Some(other) => {
                let difference = Tensor::axpby(1.0, other, -1.0, x.value().clone())?;
                x.clone().add(x.tape().constant(difference))?
            }
            None => x,
        };
        x.fake_quant(run.sites.at(site))
    }

    /// Transformed if `online`, then quantised; in one pass when nobody watches.
    fn rotated<'t>(&self, site: Site, online: bool, x: Var<'t>, run: &Run) -> Result<Var<'t>> {
        let alone = run.observer.is_none() && run.patch.is_none();
        match (online, alone) {
            (true, true) => x.hadamard_fake_quant(run.sites.at(site)),
            (true, false) => self.quantized(site, x.hadamard()?, run),
            (false, _) => self.quantized(site, x, run),
        }
    }
}

/// True when rotating `tokens` rows of input costs less than rotating a weight of `out` rows. Inside (`W R1`): 2·out·C² to rotate,
/// 2·tokens·out·C for dW̃ and 2·out·C² for dR1. Outside (`x R1ᵀ`): 2·tokens·C² each for the rotation, its dx and dR1.
fn cheaper_outside(out: usize, c: usize, tokens: usize) -> bool {
    3 * tokens * c < out * (tokens + 2 * c)
}
