//! How a command says what is learned, by which objective, and within which memory.

use std::str::FromStr;
use std::sync::Arc;

use spinquant::device::Card;
use spinquant::learn::{self, ClipChoice, LearnOptions, WeightClip};
use spinquant::llama::{LlamaConfig, Placement, Recompute};
use spinquant::memory::{Budget, Needs, Planned, Room, parse_bytes};
use spinquant::objective::{self, Objective};
use spinquant::optim::{self, Optimizer, Schedule};
use spinquant::quant::{Engine, Scheme};
use spinquant::rotation::Transforms;
use spinquant::{DType, Error, Result};

use crate::common::ModelArgs;

/// How rotations are learned, and what with them.
#[derive(clap::Args, Clone)]
pub struct Recipe {
    #[arg(long, value_name = "NAME", help = recipes())]
    recipe: Option<learn::Recipe>,
    /// Optimiser steps (default: the recipe's).
    #[arg(long)]
    steps: Option<usize>,
    /// Sequences a step.
    #[arg(long, default_value_t = 8)]
    batch: usize,
    /// Sequences that go through the network at once (default: the batch).
    #[arg(long, value_name = "N")]
    micro_batch: Option<usize>,
    /// Learning rate of the first step (default: by optimiser and objective; 1.5 for cayley and cross-entropy).
    #[arg(long)]
    lr: Option<f64>,
    /// constant, linear or cosine (default: by optimiser; cosine for all of these).
    #[arg(long)]
    schedule: Option<Schedule>,
    #[arg(long, value_name = "NAME", default_value = "cayley", value_parser = optimizer_name, help = optimizers())]
    pub optimizer: String,
    #[arg(long, value_name = "NAME", value_parser = objective::by_name, help = objectives())]
    objective: Option<Arc<dyn Objective>>,
    /// What clip ratios that are learned minimise (--clip learned, --weight-clip learned), which change the network's function; what leaves
    /// it alone minimises --objective. A second forward and backward pass a step (default: --objective for all).
    #[arg(long, value_name = "NAME", value_parser = objective::by_name)]
    clip_objective: Option<Arc<dyn Objective>>,
    /// What is learned and leaves the full-precision network alone: published (r1,r2), all, or a list of r1, r2 or r2-heads, up-down,
    /// values, norms, rope-pairs, values-general (docs/cli.md) (default: the recipe's).
    #[arg(long, value_name = "LIST")]
    transforms: Option<Transforms>,
    /// Learning rate of the first step for logarithms of scales, and angles; it falls as --lr does (default: the recipe's).
    #[arg(long, value_name = "RATE")]
    scale_lr: Option<f64>,
    /// Learning rate of the first step for logarithms of clip ratios that are learned (--clip learned); it falls as --lr does (default:
    /// the recipe's).
    #[arg(long, value_name = "RATE")]
    clip_lr: Option<f64>,
    /// Clip ratios of weights: search (found anew in every step) or learned (found on the start, then learned with the rotations, one for
    /// every row or group of every weight, for the grid of --scheme alone).
    /// Default: learned where a --start file has some, else the recipe's, which learns none with --no-clip-search.
    #[arg(long, value_name = "search|learned")]
    pub weight_clip: Option<WeightClip>,
    /// Learning rate of the first step for logarithms of clip ratios of weights that are learned (--weight-clip learned); it falls as --lr
    /// does (default: that of --clip-lr).
    #[arg(long, value_name = "RATE")]
    weight_clip_lr: Option<f64>,
    /// What clip ratios that are learned do to the gradient of a value they clamp: blocked, or straight-through as others do.
    #[arg(long, value_name = "WHICH", default_value = "blocked")]
    clip_gradient: ClipGradient,
    /// Windows held out of training to score progress on (default: an eighth of them, at most 64).
    #[arg(long, value_name = "N")]
    held_out: Option<usize>,
    /// Steps between scores.
    #[arg(long, default_value_t = 25)]
    held_out_every: usize,
    /// How linears are computed whose weights and inputs are both quantised: simulated (products of the values that codes stand for) or integer
    /// (of the codes, wherever that is possible and no slower). They differ by rounding alone.
    #[arg(long, value_name = "simulated|integer", default_value_t = Engine::default())]
    engine: Engine,
    /// Keep only each layer's input and compute the rest again: less memory, more time.
    #[arg(long)]
    recompute: bool,
    /// GPU memory to stay within, such as 24GiB: the fastest way of running a step that fits is planned, perhaps with layers in main memory,
    /// unless --micro-batch or --recompute say how to. auto: what is free.
    #[arg(long, value_name = "auto|SIZE", default_value = "auto")]
    memory: Budget,
    /// Main memory that such a plan may use for layers that do not stay on the GPU. auto: what is free.
    #[arg(long, value_name = "auto|SIZE", default_value = "auto")]
    main_memory: Budget,
    /// Bytes a second at which layers come from the model's files, such as 3GB: a plan may read those that main memory has no room for
    /// either, again in every pass. auto: as one is read at the start; none: no layer is read again.
    #[arg(long, value_name = "auto|none|SIZE", default_value = "auto")]
    read_rate: ReadRate,
}

/// How fast layers are read again, if they are.
#[derive(Clone, Copy, Debug, PartialEq)]
enum ReadRate {
    Measured,
    Never,
    Given(usize),
}

impl FromStr for ReadRate {
    type Err = Error;
    fn from_str(s: &str) -> Result<Self> {
        match s {
            "auto" => Ok(Self::Measured),
            "none" => Ok(Self::Never),
            _ => parse_bytes(s).map(Self::Given).map_err(|_| {
                Error::argument("read rate", format!("expected auto, none or the bytes of a second such as 3GB, got {s:?}"))
            }),
        }
    }
}

/// The gradient of a value that is clamped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum ClipGradient {
    Blocked,
    StraightThrough,
}

fn recipes() -> String {
    let each: Vec<String> = learn::Recipe::ALL.iter().map(|r| format!("{r} ({})", r.about())).collect();
    format!(
        "Options that go together, of which those that are given count more: {} [default: {}; of demo: {}]",
        each.join("; "),
        learn::Recipe::default(),
        learn::Recipe::Published
    )
}

/// An optimiser's name, known before anything is loaded.
fn optimizer_name(name: &str) -> Result<String> {
    optim::by_name(name).map(|optimizer| optimizer.name().to_string())
}

fn optimizers() -> String {
    let names: Vec<String> = optim::all().iter().map(|o| o.name().to_string()).collect();
    format!("{} (cayley-parity: the published code's arithmetic, drift included)", names.join(", "))
}

fn objectives() -> String {
    let each: Vec<String> = objective::all().iter().map(|o| format!("{} ({})", o.name(), o.about())).collect();
    format!("What to minimise: {}; or a mixture, as 0.5*cross-entropy+0.5*kl (default: the recipe's)", each.join(", "))
}

impl Recipe {
    /// The options of the recipe that is named. Where none is it is the default one, but the paper's with an optimiser that repeats a published
    /// run, and the paper's with clip ratios by error with an objective that sees R1 and R2 alone.
    pub fn named(&self, scheme: Scheme) -> LearnOptions {
        let local = self.objective.as_ref().is_some_and(|objective| objective.needs() == Needs::Rows);
        let repeats = !optim::by_name(&self.optimizer).is_ok_and(|optimizer| optimizer.clips_by_default());
        match self.recipe {
            Some(recipe) => recipe.options(scheme),
            None if local || repeats => LearnOptions { clip: ClipChoice::Auto, ..learn::Recipe::Published.options(scheme) },
            None => learn::Recipe::default().options(scheme),
        }
    }

    /// True where clip ratios of weights are to be learned by name, and not by a recipe.
    pub fn asks_for_weight_clips(&self) -> bool {
        self.weight_clip == Some(WeightClip::Learned)
    }

    /// The same with the paper's recipe where none is named.
    pub fn or_published(self) -> Self {
        Self { recipe: Some(self.recipe.unwrap_or(learn::Recipe::Published)), ..self }
    }

    /// What is asked for.
    pub fn options(&self, scheme: Scheme, seed: u64) -> LearnOptions {
        let named = self.named(scheme);
        LearnOptions {
            steps: self.steps.unwrap_or(named.steps),
            batch: self.batch,
            micro_batch: self.micro_batch,
            learning_rate: self.lr,
            schedule: self.schedule,
            seed,
            held_out: self.held_out,
            held_out_every: self.held_out_every,
            recompute: self.recompute.then_some(Recompute::All),
            memory: self.memory,
            main_memory: self.main_memory,
            transforms: self.transforms.unwrap_or(named.transforms),
            scale_rate: self.scale_lr.unwrap_or(named.scale_rate),
            clip_rate: self.clip_lr.unwrap_or(named.clip_rate),
            weight_clip: self.weight_clip.unwrap_or(named.weight_clip),
            weight_clip_rate: self.weight_clip_lr,
            straight: self.clip_gradient == ClipGradient::StraightThrough,
            objective: self.objective.clone().unwrap_or_else(|| named.objective.clone()),
            clip_objective: self.clip_objective.clone(),
            engine: self.engine,
            ..named
        }
    }

    /// A new optimiser.
    pub fn optimizer(&self) -> Result<Box<dyn Optimizer>> {
        optim::by_name(&self.optimizer)
    }

    /// Where the layers of a model are for learning, once the options are complete; of those in main memory there are so many copies.
    pub fn placement(
        &self,
        copies: usize,
        model: &ModelArgs,
        options: &LearnOptions,
        config: &LlamaConfig,
        seq_len: usize,
    ) -> Result<Placement> {
        model.placement(|card, dtype| {
            let room = options.room(free(card));
            let room = Room { host: room.host / copies, ..room };
            let (ranks, room) = (options.ranks.world(), options.agreed(room)?);
            let (planned, _) = self.planned(model, options, config, (seq_len, dtype), ranks, room, card)?;
            Ok(planned.map_or(Placement::RESIDENT, |planned| planned.placement))
        })
    }

    /// The plan of a step at so many ranks, and the card that it was made for, with the rate at which layers are read.
    #[allow(clippy::too_many_arguments)]
    pub fn planned(
        &self,
        model: &ModelArgs,
        options: &LearnOptions,
        config: &LlamaConfig,
        text: (usize, DType),
        ranks: usize,
        room: Room,
        card: &Card,
    ) -> Result<(Option<Planned>, Card)> {
        // Every rank would read for itself, from one disk into buffers of its own.
        let files = self.read_rate != ReadRate::Never && ranks == 1;
        let (mut card, room) = (card.clone(), Room { files, ..room });
        if let ReadRate::Given(rate) = self.read_rate {
            card.reads = rate as f64;
        }
        let plan = |card: &Card| options.plan_among(ranks, config, text, model.given_placement(), room, card);
        let planned = plan(&card)?;
        if self.read_rate != ReadRate::Measured || planned.as_ref().is_none_or(|planned| planned.read == 0) {
            return Ok((planned, card));
        }
        if model.is_synthetic() {
            return Ok((planned, card)); // is made for nothing but measurements
        }
        card.reads = model.read_rate(text.1)?;
        Ok((plan(&card)?, card))
    }
}

/// Bytes to plan with before a model is loaded; some go to what the driver loads with the first kernels.
pub fn free(card: &Card) -> usize {
    card.free - card.free / 50
}
