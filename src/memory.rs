//! Memory is planned, not hoped for: what a learning step of a model needs, and the fastest way of running it that fits.
//!
//! A step can keep all intermediate values of a layer for the backward pass or only its input ([`Plan`]); keep the rotated weights
//! between the passes or make them again; send a layer the whole batch or some sequences at a time; and, when even the layers' inputs
//! do not fit, send the network part of the batch at a time ([`LearnOptions::micro_batch`](crate::learn::LearnOptions)). [`plan`] tries
//! them all, and takes the one that its model of time says is fastest among those that its model of memory says fit.
//!
//! The model of time adds up additions and multiplications over the rate that large products reach on the card, and bytes over its
//! bandwidth; the model of memory adds up every tensor that is alive at the worst moment. Both are compared with measurements in
//! `benches/record/`. Objectives that need something else say so ([`Needs`]); their times are rougher, and an objective that keeps more
//! than its [`Needs`] say (two networks on one tape, for instance) is not modelled. Nor are the searches before learning: clip ratios
//! by error need the model, a layer of it in `f64` twice, and the hidden states of their windows (on eight windows at 7B less than a
//! step within 24 GiB, measured).

mod budget;

pub use budget::{Budget, parse_bytes};

use crate::device::Card;
use crate::llama::{Linear, LlamaConfig, Plan};
use crate::ops::linear_cross_entropy::rows_at_once;
use crate::quant::{Scheme, Site};
use crate::rotation::{Scale, Transforms};
use crate::{DType, Error, Result};

/// What an objective keeps besides the model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Needs {
    /// The quantised network's values for its backward pass, and few logits at a time: cross entropy.
    #[default]
    Network,
    /// The same with whole logits `[tokens, V]`, and as many of the full-precision model, which runs first: divergences.
    Logits,
    /// No backward pass through the network: the rows that R1 and R2 turn, `tokens·(2·C + K·D + H·D)` values a layer, captured from the
    /// full-precision model, and their gradients, both in `f32`.
    Rows,
    /// As [`Needs::Network`] without logits, and behind every layer two hidden states `[tokens, C]` more: the full-precision model's, which
    /// runs first, and the difference.
    States,
}

impl Needs {
    /// True where a loss may be a function of the network's predictions.
    pub fn of_predictions(self) -> bool {
        matches!(self, Self::Network | Self::Logits)
    }
}

/// A step's sizes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Work {
    /// What is kept besides the model.
    pub needs: Needs,
    /// The same of a second pass, where clip ratios follow an objective of their own.
    pub clip_needs: Option<Needs>,
    /// Sequences a step.
    pub batch: usize,
    /// Tokens of each.
    pub seq: usize,
    /// What the network is quantised to.
    pub scheme: Scheme,
    /// Of weights and activations.
    pub dtype: DType,
    /// What is learned.
    pub transforms: Transforms,
    /// Clip ratios of activations, K and V are learned.
    pub clips: bool,
    /// Those of weights are.
    pub weight_clips: bool,
}

impl Work {
    /// The published recipe: cross entropy, R1 and R2 alone.
    pub fn new(scheme: Scheme, batch: usize, seq: usize, dtype: DType) -> Self {
        let transforms = Transforms::PUBLISHED;
        let needs = Needs::Network;
        Self { needs, clip_needs: None, batch, seq, scheme, dtype, transforms, clips: false, weight_clips: false }
    }

    /// Checks that every number of bytes that a plan may add up fits a machine word.
    fn check(&self, config: &LlamaConfig, micro_batch: usize) -> Result<()> {
        if self.batch == 0 || self.seq == 0 || micro_batch == 0 {
            let got = format!("{} and {micro_batch} sequences of {} tokens", self.batch, self.seq);
            return Err(Error::argument(
                "plan",
                format!("expected a batch, a micro-batch and a length of at least 1, got {got}"),
            ));
        }
        let wide = |x: usize| x as u128;
        let (c, f, vocab) = (wide(config.hidden_size), wide(config.intermediate_size), wide(config.vocab_size));
        let heads = (wide(config.heads) + wide(config.kv_heads)).saturating_mul(wide(config.head_dim));
        let (layers, widths) = (wide(config.layers) + 4, c.saturating_add(f).saturating_add(heads));
        // More than any sum of items: 64 values of 8 bytes for every channel of every layer and token.
        let values = layers.saturating_mul(widths).saturating_mul(64).saturating_add(vocab.saturating_mul(8)).saturating_mul(8);
        let tokens = wide(micro_batch).saturating_mul(wide(self.seq));
        let weights = widths.saturating_add(vocab).saturating_mul(c).saturating_mul(layers).saturating_mul(64);
        let bytes = values.saturating_mul(tokens).saturating_add(weights);
        // Token ids of the whole batch are 4 bytes each.
        let ids = wide(self.batch).saturating_mul(wide(self.seq)).saturating_mul(4);
        if bytes.max(ids) > isize::MAX as u128 {
            let message = format!(
                "{} sequences of {} tokens a step, {micro_batch} at once, need more bytes than can be counted",
                self.batch, self.seq
            );
            return Err(Error::argument("plan", message));
        }
        Ok(())
    }
}

/// One thing that takes memory, in bytes.
pub type Item = (&'static str, usize);

/// How to run a step.
#[derive(Clone, Debug, PartialEq)]
pub struct Planned {
    /// What is kept and what is computed again.
    pub plan: Plan,
    /// Sequences that go through the network at once.
    pub micro_batch: usize,
    /// What takes memory at the worst moment.
    pub items: Vec<Item>,
    /// Predicted wall-clock time of a step.
    pub seconds: f64,
}

impl Planned {
    /// The sum of the items.
    pub fn bytes(&self) -> usize {
        self.items.iter().map(|i| i.1).sum()
    }
}

struct Sizes {
    c: usize,
    f: usize,
    vocab: usize,
    layers: usize,
    /// Width of all query heads, of all key heads.
    q: usize,
    kv: usize,
    /// Bytes of a value.
    e: usize,
    /// Weights of a layer.
    layer: usize,
    /// Biases of a layer, and gains of norms of its heads.
    biases: usize,
    /// Heads of q and k have norms.
    head_norms: bool,
    quantized: bool,
    /// Norms are scaled.
    scaled_norms: bool,
    /// The output of up is scaled, as up stays unrotated.
    scaled_up: bool,
    /// Bytes of what is kept of a layer's weights and of R1 for the gradients of its scales alone.
    scaled: usize,
    /// Bytes in `f32` of what a layer's scales multiply of weights and of R1.
    multiplied: usize,
    /// Values of a token and layer in front of quantisers whose clip ratios are learned.
    clipping: usize,
    /// Those of them that nothing else keeps.
    clipped: usize,
    /// Values of R2 and R2b where there is more than one R2 a layer.
    r2: usize,
    /// Rows of a layer's weights, or groups of all rows, whose clip ratios are learned.
    weight_rows: usize,
}

impl Sizes {
    fn new(config: &LlamaConfig, work: &Work) -> Self {
        let (c, f) = (config.hidden_size, config.intermediate_size);
        let (q, kv) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
        let layer = Linear::ALL.map(|l| l.shape(config)[0] * l.shape(config)[1]).iter().sum();
        let biases: usize = Linear::ALL.into_iter().filter(|l| l.has_bias(config)).map(|l| l.shape(config)[0]).sum();
        let gains = Linear::ALL.into_iter().filter(|l| l.has_norm(config)).count() * config.head_dim;
        let (quantized, head_norms) = (work.scheme.weight_bits < 16, config.family.facts().head_norms);
        let (vocab, layers, e) = (config.vocab_size, config.layers, work.dtype.size());
        let is = |kind: Scale| work.transforms.has(kind) && kind.refused(&config.scale_sizes()).is_none();
        let (up_down, values, scaled_norms) = (is(Scale::UpDown), is(Scale::Values), is(Scale::Norms));
        let of = |scaled: bool, rows: usize| if scaled { 4 * c * rows } else { 0 };
        let (heads, general) = (work.transforms.heads(), is(Scale::ValuesGeneral));
        // Unquantised up stays as it is; the scales of a norm multiply R1, once for each norm.
        let rows = if quantized { 2 * f } else { f };
        let turned = of(is(Scale::RopePairs), q + kv);
        let multiplied = of(up_down, rows) + of(scaled_norms, 2 * c) + turned + of(values, q + kv) + of(general, q + kv);
        // What scales of values multiply is what R2 and R2b multiply next, and kept for them, but for heads of o that change places.
        let swapped = if heads { usize::from(values) + usize::from(general) } else { 0 };
        // What those of up and down multiply is kept in the weights' type. R1 times those of a norm is kept where it stands for gate and up.
        let kept = if up_down { e * c * rows } else { 0 } + of(scaled_norms && !quantized, c);
        let scaled = kept + turned + of(general, q + kv) + 4 * c * q * swapped;
        // Those of every head; one R2 a layer is little beside R1.
        let (d, each) = (config.head_dim, if heads { config.kv_heads } else { 1 });
        let r2 = d * d * layers * each;
        let r2 = if heads { r2 } else { 0 } + if general { r2 } else { 0 };
        let width = |site| match site {
            Site::AttentionInput | Site::MlpInput => c,
            Site::Key | Site::Value => kv,
            Site::AttentionOutput => q,
            Site::DownInput => f,
        };
        let sites = if work.clips { work.scheme.active_sites() } else { vec![] };
        // Attention keeps its own output, and scales of norms keep what they made.
        let twice = |site| match site {
            Site::AttentionInput | Site::MlpInput => scaled_norms,
            site => site == Site::AttentionOutput,
        };
        let clipped = sites.iter().copied().filter(|&site| !twice(site)).map(width).sum();
        let clipping = sites.into_iter().map(width).sum();
        let rows = |l: Linear| {
            let [out, inputs] = l.shape(config);
            out * (inputs / work.scheme.weight_group.unwrap_or(inputs).max(1))
        };
        let weight_rows = if quantized && work.weight_clips { Linear::ALL.map(rows).iter().sum() } else { 0 };
        Self {
            c,
            f,
            vocab,
            layers,
            q,
            kv,
            e,
            layer,
            biases: biases + gains,
            head_norms,
            quantized,
            scaled_norms,
            scaled_up: up_down && !quantized,
            scaled,
            multiplied,
            clipping,
            clipped,
            r2,
            weight_rows,
        }
    }

    /// Bytes of the model.
    fn weights(&self) -> usize {
        (2 * self.vocab * self.c + self.layers * (self.layer + self.biases)) * self.e
    }

    /// Bytes kept of a layer by its forward pass, for so many tokens: inputs of both norms, quantised inputs of the linears, q, k, v
    /// and the output of attention, gate and up; q and k in front of their norms, everything in front of quantisers that are learned.
    fn kept(&self, tokens: usize) -> usize {
        let normed = if self.head_norms { self.q + self.kv } else { 0 } + if self.scaled_norms { 2 * self.c } else { 0 };
        tokens * self.e * (4 * self.c + 3 * self.q + 2 * self.kv + 3 * self.f + normed + self.clipped)
    }

    /// Bytes of a layer's rotated weights and biases, with the products in `f32` that the gradients of R2 and of scales need, and the
    /// unquantised weights that those of their clip ratios do.
    fn rotated(&self) -> usize {
        // Unquantised gate and up stay as they are.
        let rotated = self.layer - if self.quantized { 0 } else { 2 * self.c * self.f };
        // In front of their quantisers too, where these are learned.
        let twice = if self.weight_rows > 0 { self.layer } else { 0 };
        (rotated + twice + self.biases) * self.e + 4 * self.c * (self.q + self.kv) + self.scaled
    }

    /// Bytes of a layer's forward pass of the full-precision model, for so many tokens: the stream and its norm, gate, up and their
    /// product, or q, k, v and the output of attention.
    fn forward(&self, tokens: usize) -> usize {
        tokens * self.e * (3 * self.c + (3 * self.f).max(2 * (self.q + self.kv)))
    }

    /// Values of a token and layer that R1 and R2 turn: the inputs of q, k, v and of gate, up; V and the input of o.
    fn turned(&self) -> usize {
        2 * self.c + self.kv + self.q
    }

    /// What rotations, their gradients and the optimiser take.
    fn rotations(&self) -> Item {
        // Clip ratios of weights, a layer's twice, and their gradients, stacked too; Adam's moments are on the host.
        let clips = 2 * 4 * 4 * self.layers * self.weight_rows;
        ("rotations, their gradients and the optimiser", (9 * 4 + 16) * (self.c * self.c + self.r2) + clips)
    }

    /// Every item of a step of a local objective that captures rows of `micro` sequences at once.
    fn items_of_rows(&self, work: &Work, micro: usize) -> Vec<Item> {
        let tokens = micro * work.seq;
        // In f32 once normalised, beside the slope of what is minimised; before that in the model's type, while it runs.
        let (rows, captured) = (self.layers * tokens * self.turned() * 8, self.layers * tokens * self.turned() * self.e);
        let turning = 8 * tokens * self.c.max(self.q);
        // Held-out windows are scored by cross entropy in between.
        let scoring = self.forward(tokens) + self.rotated() + rows_at_once(self.vocab).min(tokens) * self.vocab * self.e;
        let running = (captured + self.forward(tokens)).max(scoring).saturating_sub(rows);
        vec![
            ("weights", self.weights()),
            self.rotations(),
            ("captured rows and their gradients", rows),
            ("a layer at work", turning.max(running)),
            ("workspace", 192 << 20),
        ]
    }

    /// Every item of a step that runs `micro` sequences at once as planned.
    fn items(&self, work: &Work, plan: &Plan, micro: usize) -> Vec<Item> {
        if work.needs == Needs::Rows {
            return self.items_of_rows(work, micro);
        }
        let (tokens, c, e) = (micro * work.seq, self.c, self.e);
        let part = if plan.sequences == 0 { micro } else { plan.sequences.min(micro) } * work.seq;
        let recomputed = plan.recompute.min(self.layers);
        let kept = self.layers - recomputed;
        // Gradients of the parts add up in f32, beside one part's own.
        let gradients = self.layer * if part < tokens { e + 4 } else { e };
        let wide = if e == 2 { c * self.f.max(self.q) * (4 + 2 + 2) } else { 0 };
        // Gradients of scaled weights are in f32 on their way to the scales.
        let wide = wide + if self.scaled > 0 { 2 * 4 * c * self.f.max(self.q) } else { 0 };
        // The backward pass of a layer: gradients of gate, up and their product, and of the stream.
        let backward = |tokens: usize| tokens * e * (3 * self.f + 4 * c);
        // The layers that keep their values are last, and gone when the others' turn comes.
        let again = if recomputed > 0 { self.kept(part) + backward(part) } else { 0 };
        let values = kept * self.kept(tokens);
        let live = if kept > 0 { backward(tokens).max(again.saturating_sub(values)) } else { again };
        let inputs = recomputed * tokens * c * e;
        let rotated = if plan.keep_weights { self.layers } else { kept + 1 } * self.rotated();
        let layer = live + gradients + wide + 2 * tokens * c * e;
        let whole = tokens * self.vocab * e;
        let (logits, layer) = match work.needs {
            Needs::Logits => {
                // Both models' are there between the passes through the layers, the full-precision model's already during the first;
                // before that it runs itself. What is larger counts: the items add up to it.
                // Of a mixture, the gradient of cross entropy by what the head reads is kept beside them.
                let both = 2 * whole + 4 * tokens * c * e;
                let forward = whole + self.forward(part) + wide;
                let teacher = (whole + self.forward(tokens)).saturating_sub(inputs + values + rotated);
                (("logits of both models", both), layer.max(forward).max(teacher).saturating_sub(both))
            }
            Needs::States => {
                let teacher = self.forward(tokens).saturating_sub(inputs + values + rotated);
                (("hidden states of both models", (2 * self.layers + 3) * tokens * c * e), layer.max(teacher))
            }
            _ => (("logits", rows_at_once(self.vocab).min(tokens) * self.vocab * e + 3 * tokens * c * e), layer),
        };
        vec![
            ("weights", self.weights()),
            self.rotations(),
            ("inputs of recomputed layers", inputs),
            ("values of the other layers", values),
            ("rotated weights", rotated),
            ("a layer at work", layer),
            logits,
            ("workspace", 192 << 20),
        ]
    }

    /// Seconds of a step.
    fn seconds(&self, config: &LlamaConfig, work: &Work, plan: &Plan, micro: usize, card: &Card) -> f64 {
        if work.needs == Needs::Rows {
            return self.seconds_of_rows(config, work, card);
        }
        let tokens = (work.batch * work.seq) as f64;
        let rounds = work.batch.div_ceil(micro) as f64;
        let (layers, c) = (self.layers as f64, self.c as f64);
        let recomputed = plan.recompute.min(self.layers) as f64;
        let layer = self.layer as f64;
        let linear = 2.0 * tokens * layer;
        let attention = 2.0 * work.batch as f64 * (work.seq as f64).powi(2) * (config.heads * config.head_dim) as f64;
        let rotation = 2.0 * layer * c;
        // Unquantised gate and up are left alone; their input is rotated instead.
        let inside = if self.quantized { 1.0 } else { 1.0 - 2.0 * (self.c * self.f) as f64 / layer };
        let outside = if self.quantized { 0.0 } else { 2.0 * tokens * c * c };
        let again = if plan.keep_weights { 0.0 } else { recomputed };
        let products = layers * (linear * (2.0 + inside) + 3.0 * outside)
            + recomputed * (linear * (1.0 - (self.c * self.f) as f64 / layer) + outside)
            + rounds * (2.0 * layers + again) * rotation * inside
            + 4.0 * tokens * c * self.vocab as f64
            + 8.0 * tokens * c * c;
        let scores = attention * (layers * 3.5 + recomputed) * 1.4;
        // Activations read and written around the products: so many passes over [tokens, C] and [tokens, F] a layer.
        let passes = |c: f64, f: f64| tokens * self.e as f64 * (c * self.c as f64 + f * self.f as f64);
        let moved = layers * (passes(34.0, 6.0) + passes(36.0, 11.0)) + recomputed * passes(32.0, 6.0);
        let weights = rounds * (layers + again) * layer * (14.0 + 8.0) + rounds * layers * 7.0 * 16.0 * c * c;
        // Products in f32 written, scaled, and read twice on the way back; outputs of norms and of up likewise.
        let weights = weights + rounds * (layers + again) * 4.0 * self.multiplied as f64;
        let moved = moved + if self.scaled_norms { layers * passes(10.0, 0.0) } else { 0.0 };
        let moved = moved + if self.scaled_up { layers * passes(0.0, 6.0) + recomputed * passes(0.0, 2.0) } else { 0.0 };
        // Quantised by a pass of their own, and read again on the way back.
        let moved = moved + (5.0 * layers + 2.0 * recomputed) * tokens * (self.e * self.clipping) as f64;
        // 80 candidates a value, or by ratios that are learned one, and the unquantised weights read again on the way back.
        let weights =
            weights + if self.weight_rows > 0 { rounds * (2.0 * layers + again) * 3.0 * layer * self.e as f64 } else { 0.0 };
        let search = if self.quantized && self.weight_rows == 0 {
            rounds * (layers + again) * layer * 1.8e-11 * (2.8e12 / card.bandwidth)
        } else {
            0.0
        };
        let more = match work.needs {
            Needs::Logits => {
                let vocab = self.vocab as f64;
                // The full-precision model's pass; logits of both are written, read, and their gradient written and read.
                let products = layers * (linear + 1.4 * attention) + 2.0 * tokens * c * vocab;
                let moved = layers * passes(20.0, 5.0) + 6.0 * tokens * vocab * self.e as f64;
                products / card.products + moved / card.bandwidth
            }
            Needs::States => {
                // The same pass, and of each layer a product by R1 with its two gradients; states written, subtracted, squared, and back.
                let products = layers * (linear + 1.4 * attention + 4.0 * tokens * c * c);
                products / card.products + layers * (passes(30.0, 5.0)) / card.bandwidth
            }
            _ => 0.0,
        };
        (products + scores) / card.products + (moved + weights) / card.bandwidth + search + more
    }

    /// Seconds of a step of a local objective: a pass of the full-precision model, and every row turned once and multiplied by its
    /// slope once, in `f32`, which large GPUs multiply about thirteen times slower than 16-bit types.
    fn seconds_of_rows(&self, config: &LlamaConfig, work: &Work, card: &Card) -> f64 {
        let (tokens, layers, c) = ((work.batch * work.seq) as f64, self.layers as f64, self.c as f64);
        let attention = 2.0 * work.batch as f64 * (work.seq as f64).powi(2) * (config.heads * config.head_dim) as f64;
        let pass = layers * (2.0 * tokens * self.layer as f64 + 1.4 * attention);
        let heads = ((self.q + self.kv) * config.head_dim) as f64;
        let turning = layers * 4.0 * tokens * (2.0 * c * c + heads);
        // Captured, widened, normalised, turned, measured, multiplied.
        let moved = layers * tokens * (self.turned() * (2 * self.e + 10 * 4) + self.e * (20 * self.c + 5 * self.f)) as f64;
        (pass + 13.0 * turning) / card.products + moved / card.bandwidth
    }
}

/// What a step needs and how long it takes if it is run this way.
///
/// # Errors
/// No sequence, token or micro-batch; sizes whose bytes a machine word cannot count.
pub fn predict(config: &LlamaConfig, work: &Work, plan: Plan, micro_batch: usize, card: &Card) -> Result<Planned> {
    work.check(config, micro_batch)?;
    Ok(predict_checked(config, work, plan, micro_batch, card))
}

fn predict_checked(config: &LlamaConfig, work: &Work, plan: Plan, micro_batch: usize, card: &Card) -> Planned {
    let sizes = Sizes::new(config, work);
    let penalty = 1.0 + 0.02 * parts_penalty(micro_batch, plan.sequences);
    let of = |needs| {
        let work = &Work { needs, ..*work };
        let seconds = penalty * sizes.seconds(config, work, &plan, micro_batch, card);
        Planned { plan, micro_batch, items: sizes.items(work, &plan, micro_batch), seconds }
    };
    let first = of(work.needs);
    // One pass after the other: the larger counts, and the times add up. Each wants fewer gradients than is counted here.
    let Some(second) = work.clip_needs.map(of) else { return first };
    let seconds = first.seconds + second.seconds;
    let items = if second.bytes() > first.bytes() { second.items } else { first.items };
    Planned { items, seconds, ..first }
}

/// The fastest way to run a step within `budget` bytes on this card.
///
/// # Errors
/// Nothing fits: says what the leanest plan needs and which setting would help. No sequence or token, or sizes whose bytes a machine
/// word cannot count.
pub fn plan(config: &LlamaConfig, work: &Work, budget: usize, card: &Card) -> Result<Planned> {
    work.check(config, 1)?;
    let mut best: Option<Planned> = None;
    let mut leanest: Option<Planned> = None;
    // More at once than the budget has room for one row of the stream a token cannot fit.
    let most = (budget / work.seq.saturating_mul(config.hidden_size * work.dtype.size())).clamp(1, MOST_AT_ONCE);
    for micro in divisors(work.batch, most).into_iter().filter(|&micro| work.check(config, micro).is_ok()) {
        for keep_weights in [true, false] {
            for sequences in std::iter::once(0).chain(divisors(micro, micro).into_iter().skip(1)) {
                for recompute in 0..=config.layers {
                    let plan = Plan { recompute, keep_weights, sequences };
                    let planned = predict_checked(config, work, plan, micro, card);
                    let bytes = planned.bytes();
                    if leanest.as_ref().is_none_or(|p| bytes < p.bytes()) {
                        leanest = Some(planned.clone());
                    }
                    if bytes <= budget && best.as_ref().is_none_or(|p| planned.seconds < p.seconds) {
                        best = Some(planned);
                    }
                }
            }
        }
    }
    if let Some(best) = best {
        return Ok(best);
    }
    let gib = |bytes: usize| bytes as f64 / f64::from(1 << 30);
    let needed = leanest.map_or(0, |p| p.bytes());
    let weights = Sizes::new(config, work).weights();
    let help = if weights > budget {
        format!("the weights alone are {:.1} GiB; use a smaller model or a card with more memory", gib(weights))
    } else {
        format!("a shorter --seq-len than {} would help, or --memory {}GiB if the card has it", work.seq, gib(needed).ceil())
    };
    Err(Error::argument(
        "memory",
        format!("the leanest plan needs {:.1} GiB, {:.1} are allowed: {help}", gib(needed), gib(budget)),
    ))
}

/// How much less of a product's rate small parts reach, in steps of 2 %.
fn parts_penalty(micro: usize, sequences: usize) -> f64 {
    if sequences == 0 { 0.0 } else { (micro as f64 / sequences as f64).log2() }
}

/// Sequences at once beyond which nothing gets faster.
const MOST_AT_ONCE: usize = 1 << 16;

/// The divisors of n up to `most`, the largest first.
fn divisors(n: usize, most: usize) -> Vec<usize> {
    (1..=n.min(most)).rev().filter(|d| n.is_multiple_of(*d)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::llama::synthetic::shape;

    fn work(scheme: Scheme) -> Work {
        Work::new(scheme, 8, 2048, DType::BF16)
    }

    #[test]
    fn no_size_hangs_or_overflows() {
        let (card, start) = (Card::h100(), std::time::Instant::now());
        let sizes = [1, 2, 3, 2048, 1 << 20, 1 << 32, (1 << 53) - 111, usize::MAX - 1, usize::MAX];
        for name in ["tiny", "llama-2-7b"] {
            let config = shape(name).unwrap();
            for needs in [Needs::Network, Needs::Logits, Needs::Rows, Needs::States] {
                for (batch, seq) in sizes.iter().flat_map(|&b| sizes.iter().map(move |&s| (b, s))) {
                    let work = Work { needs, batch, seq, ..work(Scheme::new(4, 4, 4)) };
                    for budget in [1, 24 << 30, usize::MAX] {
                        let planned = plan(&config, &work, budget, &card);
                        assert!(planned.is_err() || planned.unwrap().bytes() <= budget, "{batch} x {seq}");
                    }
                }
            }
        }
        assert!(start.elapsed().as_secs() < 20);
        let huge = Work { batch: usize::MAX, ..work(Scheme::new(4, 4, 4)) };
        let message = plan(&shape("llama-2-7b").unwrap(), &huge, 79 << 30, &card).unwrap_err().to_string();
        assert!(message.contains("18446744073709551615 sequences of 2048 tokens a step"), "{message}");
        let none = Work { seq: 0, ..huge };
        assert!(plan(&shape("tiny").unwrap(), &none, 1 << 30, &card).unwrap_err().to_string().contains("at least 1"));
        assert_eq!(divisors(12, 12), [12, 6, 4, 3, 2, 1]);
        assert_eq!(divisors(usize::MAX, 20), [17, 15, 5, 3, 1]);
    }

    #[test]
    fn less_memory_takes_longer_until_nothing_fits() {
        let config = shape("llama-2-7b").unwrap();
        for scheme in [Scheme::new(4, 4, 4), Scheme::new(16, 4, 4)] {
            let at = |gib: usize| plan(&config, &work(scheme), gib << 30, &Card::h100());
            let (rich, lean) = (at(76).unwrap(), at(22).unwrap());
            assert!(rich.plan.recompute < 32 && rich.plan.keep_weights, "{rich:?}");
            assert!(lean.plan.recompute == 32 && !lean.plan.keep_weights, "{lean:?}");
            let mut last = f64::INFINITY;
            for gib in [20, 22, 24, 32, 40, 48, 64, 80] {
                let Ok(p) = at(gib) else { continue };
                assert!(p.bytes() <= gib << 30 && p.seconds <= last, "{gib} GiB: {p:?}");
                last = p.seconds;
            }
            let message = at(12).unwrap_err().to_string();
            assert!(message.contains("the weights alone"), "{message}");
            let message = at(14).unwrap_err().to_string();
            assert!(message.contains("--seq-len"), "{message}");
        }
    }

    #[test]
    fn objectives_need_different_things() {
        let (card, scheme) = (Card::h100(), Scheme::new(4, 4, 4));
        for name in ["llama-2-7b", "llama-3-8b", "llama-3.2-1b"] {
            let config = shape(name).unwrap();
            for (recompute, micro) in [(0, 1), (config.layers, 1), (config.layers, 8)] {
                let step = Plan { recompute, keep_weights: true, sequences: 1 };
                let at = |needs| predict(&config, &Work { needs, ..work(scheme) }, step, micro, &card).unwrap();
                let [network, logits, rows, states] = [Needs::Network, Needs::Logits, Needs::Rows, Needs::States].map(at);
                let tokens = micro * 2048;
                // Both models' logits in 16 bits. A layer at work is not there beside them, and a few logits are there anyway.
                let both = 2 * 2 * tokens * config.vocab_size;
                let item = |p: &Planned, what: &str| p.items.iter().find(|i| i.0 == what).map_or(0, |i| i.1);
                assert!(item(&logits, "logits of both models") >= both, "{logits:?}");
                let without: usize =
                    network.items.iter().filter(|i| !["a layer at work", "logits"].contains(&i.0)).map(|i| i.1).sum();
                assert!(logits.bytes() >= without + both, "{name}: {network:?} {logits:?}");
                let layer = without + item(&network, "a layer at work");
                assert!(logits.bytes() >= layer, "{name}: {network:?} {logits:?}");
                // Rows in f32 and their gradients, of every layer at once; no values, no rotated weights.
                let turned = 2 * config.hidden_size + (config.heads + config.kv_heads) * config.head_dim;
                assert_eq!(item(&rows, "captured rows and their gradients"), config.layers * tokens * turned * 8);
                assert_eq!(item(&rows, "weights"), item(&network, "weights"));
                assert_eq!(item(&rows, "values of the other layers") + item(&rows, "rotated weights"), 0);
                // Two hidden states of every layer in 16 bits.
                let both = 2 * 2 * config.layers * tokens * config.hidden_size;
                assert!(item(&states, "hidden states of both models") >= both, "{states:?}");
                assert!(states.bytes() >= layer + both, "{name}: {network:?} {states:?}");
                assert!(network.seconds < states.seconds && states.seconds < 2.0 * network.seconds, "{name}: {states:?}");
                assert!(network.seconds < logits.seconds && logits.seconds < 2.0 * network.seconds, "{name}: {logits:?}");
                assert!(rows.seconds > 0.05 * network.seconds && rows.seconds < 2.0 * network.seconds, "{name}: {rows:?}");
            }
        }
    }

    #[test]
    fn every_objective_is_planned_within_the_budget() {
        let (config, card) = (shape("llama-2-7b").unwrap(), Card::h100());
        let at = |needs, gib: usize| plan(&config, &Work { needs, ..work(Scheme::new(4, 4, 4)) }, gib << 30, &card);
        for needs in [Needs::Network, Needs::Logits, Needs::Rows, Needs::States] {
            let mut last = f64::INFINITY;
            for gib in [24, 32, 48, 76] {
                let p = at(needs, gib).unwrap();
                assert!(p.bytes() <= gib << 30 && p.seconds <= last, "{needs:?}, {gib} GiB: {p:?}");
                last = p.seconds;
            }
            assert!(at(needs, 12).unwrap_err().to_string().contains("the weights alone"));
        }
        // Whole logits leave less for the rest; captured rows have nothing to be computed again, only fewer sequences at once.
        assert!(at(Needs::Logits, 32).unwrap().seconds > at(Needs::Network, 32).unwrap().seconds);
        let micro: Vec<usize> = [24, 48, 76].into_iter().map(|gib| at(Needs::Rows, gib).unwrap().micro_batch).collect();
        assert_eq!(micro, [1, 4, 4]);
        assert_eq!(at(Needs::Rows, 96).unwrap().micro_batch, 8);
        assert!(at(Needs::Rows, 18).unwrap_err().to_string().contains("--seq-len"));
    }

    /// Two passes take the time of both and the memory of the larger.
    #[test]
    fn an_objective_of_clip_ratios_is_planned() {
        let (config, card) = (shape("llama-2-7b").unwrap(), Card::h100());
        let step = Plan { recompute: config.layers, keep_weights: true, sequences: 1 };
        let at = |needs, clip_needs| {
            let work = Work { needs, clip_needs, clips: true, ..work(Scheme::new(4, 4, 4)) };
            predict(&config, &work, step, 4, &card).unwrap()
        };
        let all = [Needs::Network, Needs::Logits, Needs::Rows, Needs::States];
        for (first, second) in all.iter().flat_map(|&a| all[..2].iter().map(move |&b| (a, b))) {
            let (both, a, b) = (at(first, Some(second)), at(first, None), at(second, None));
            assert_eq!(both.bytes(), a.bytes().max(b.bytes()), "{first:?} {second:?}");
            assert_eq!(both.seconds, a.seconds + b.seconds, "{first:?} {second:?}");
        }
    }

    /// Each kind of scales takes memory and time, so that less is kept within a budget; so do clip ratios that are learned.
    #[test]
    fn scales_are_planned() {
        let (config, card) = (shape("llama-2-7b").unwrap(), Card::h100());
        for bits in [4, 16] {
            let none = work(Scheme::new(bits, 4, 4));
            let at = |transforms| {
                let step = Plan { recompute: config.layers, keep_weights: true, sequences: 1 };
                predict(&config, &Work { transforms, ..none }, step, 1, &card).unwrap()
            };
            let without = at(Transforms::PUBLISHED);
            assert!(at(Transforms::PUBLISHED.with_heads(true)).bytes() > without.bytes());
            for kind in Scale::ALL {
                let (one, all) = (at(Transforms::new(&[kind])), at(Transforms::ALL));
                // What scales of values multiply is kept already, for R2.
                let more = if kind == Scale::Values { 0 } else { 1 };
                assert!(one.bytes() >= without.bytes() + more && one.seconds > without.seconds, "{kind}");
                assert!(all.bytes() > one.bytes() && all.seconds > one.seconds, "{kind}");
            }
        }
        let at = |clips| {
            let step = Plan { recompute: config.layers, keep_weights: true, sequences: 1 };
            predict(&config, &Work { clips, ..work(Scheme::new(4, 4, 4)) }, step, 1, &card).unwrap()
        };
        assert!(at(true).bytes() > at(false).bytes() && at(true).seconds > at(false).seconds);
        // Clip ratios of weights keep the weights in front of their quantisers, and end the search; of unquantised weights there are none.
        let at = |bits, weight_clips| {
            let step = Plan { recompute: config.layers, keep_weights: true, sequences: 1 };
            predict(&config, &Work { weight_clips, ..work(Scheme::new(bits, 4, 4)) }, step, 1, &card).unwrap()
        };
        let layers: usize =
            Linear::ALL.map(|l| l.shape(&config)).map(|[out, inputs]| 2 * config.layers * out * inputs).iter().sum();
        let more = at(4, true).bytes() - at(4, false).bytes();
        assert!(more > layers && more < layers + layers / 100 && at(4, true).seconds < at(4, false).seconds, "{more} {layers}");
        assert_eq!(at(16, true), at(16, false));
        let planned = |transforms| {
            let work = Work { transforms, ..work(Scheme::new(4, 4, 4)) };
            plan(&config, &work, 70 << 30, &card).unwrap()
        };
        let (without, with) = (planned(Transforms::PUBLISHED), planned(Transforms::ALL));
        assert!(with.bytes() <= 70 << 30 && with.seconds > without.seconds);
    }
}
