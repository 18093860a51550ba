//! Memory is planned, not hoped for: what a learning step of a model needs, and the fastest way of running it that fits.
//!
//! A step can keep all intermediate values of a layer for the backward pass or only its input ([`Plan`]); keep the rotated weights
//! between the passes or make them again; send a layer the whole batch or some sequences at a time; and, when even the layers' inputs
//! do not fit, send the network part of the batch at a time ([`LearnOptions::micro_batch`](crate::learn::LearnOptions)). Layers may
//! be in main memory and come to the card when it is their turn ([`Placement`]): they are then computed again, and their weights made
//! again. [`plan`] tries them all, and takes the one that its model of time says is fastest among those that its model of memory says fit.
//!
//! The model of time adds up additions and multiplications over the rate that large products reach on the card, and bytes over its
//! bandwidth, and waits for copies as far as no work hides them; the model of memory adds up every tensor that is alive at the worst moment. Both are compared with measurements in
//! `benches/record/`. Objectives that need something else say so ([`Needs`]); their times are rougher, and an objective that keeps more
//! than its [`Needs`] say (two networks on one tape, for instance) is not modelled. Nor are the searches before learning: clip ratios
//! by error need the model, a layer of it in `f64` twice, and the hidden states of their windows (on eight windows at 7B less than a
//! step within 24 GiB, measured).

mod budget;
mod layerwise;
mod search;
mod sizes;
mod time;

pub use budget::{Budget, Room, parse_bytes};
pub use layerwise::{Layerwise, OneLayer, codes, layerwise};
pub use search::{networks, plan};

use crate::device::Card;
use crate::llama::{LlamaConfig, Placement, Plan};
use crate::quant::{Engine, Scheme};
use crate::rotation::Transforms;
use crate::{DType, Error, Result};
use sizes::Sizes;

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
    /// How products are computed whose operands are both quantised.
    pub engine: Engine,
    /// Where the layers are, where that is given; otherwise a plan may have some in main memory.
    pub placement: Option<Placement>,
    /// Ranks that share the rows of weights, this one among them: 1 where it makes all.
    pub ranks: usize,
}

impl Work {
    /// The published recipe: cross entropy, R1 and R2 alone.
    pub fn new(scheme: Scheme, batch: usize, seq: usize, dtype: DType) -> Self {
        let transforms = Transforms::PUBLISHED;
        let needs = Needs::Network;
        let (clips, weight_clips) = (false, false);
        let (engine, placement, ranks) = (Engine::default(), None, 1);
        Self { needs, clip_needs: None, batch, seq, scheme, dtype, transforms, clips, weight_clips, engine, placement, ranks }
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
    /// Where the layers are.
    pub placement: Placement,
    /// What takes memory on the card at the worst moment.
    pub items: Vec<Item>,
    /// Bytes of main memory: of the layers that are there, and of buffers for those that are read.
    pub host: usize,
    /// Bytes that a step copies from there to the card.
    pub moved: usize,
    /// Those of them that it reads from the model's files before.
    pub read: usize,
    /// Predicted wall-clock time of a step.
    pub seconds: f64,
    /// Linears of a layer, of seven, whose products are of integers, on a GPU that has a fast kernel for them.
    pub on_integers: usize,
}

impl Planned {
    /// The sum of the items on the card.
    pub fn bytes(&self) -> usize {
        self.items.iter().map(|i| i.1).sum()
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
    let (placement, host) = (work.placement.unwrap_or_default(), sizes.host());
    let of = |needs| {
        let work = &Work { needs, ..*work };
        let seconds = penalty * sizes.seconds(config, work, &plan, micro_batch, card);
        let (items, moved) = (sizes.items(work, &plan, micro_batch), sizes.moved(work, micro_batch));
        let (on_integers, read) = (sizes.on_integers.len(), sizes.files(work, micro_batch));
        Planned { plan, micro_batch, placement, items, host, moved, read, seconds, on_integers }
    };
    let first = of(work.needs);
    // One pass after the other: the larger counts, and the times add up. Each wants fewer gradients than is counted here.
    let Some(second) = work.clip_needs.map(of) else { return first };
    let (seconds, moved) = (first.seconds + second.seconds, first.moved + second.moved);
    let read = first.read + second.read;
    let items = if second.bytes() > first.bytes() { second.items } else { first.items };
    Planned { items, moved, read, seconds, ..first }
}

/// How much less of a product's rate small parts reach, in steps of 2 %.
fn parts_penalty(micro: usize, sequences: usize) -> f64 {
    if sequences == 0 { 0.0 } else { (micro as f64 / sequences as f64).log2() }
}

#[cfg(test)]
mod tests;
