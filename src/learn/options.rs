//! What a run of [`learn`](super::learn()) is told, and what that comes to for a model.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use crate::calibrate::ClipGoal;
use crate::data::{Sampler, Windows, split_held_out};
use crate::device::Card;
use crate::llama::{Llama, LlamaConfig, Placement, Recompute};
use crate::memory::{self, Budget, Needs, Planned, Room, Work};
use crate::objective::{CrossEntropy, Objective};
use crate::optim::{Optimizer, Schedule};
use crate::quant::{ClipRatios, Engine, Scheme};
use crate::ranks::Group;
use crate::rotation::{Rotations, Transforms};
use crate::{DType, Error, Result};

/// How to learn. The defaults are the paper's, and clip ratios searched by error; [`Recipe`](super::Recipe) has others, that of `spinquant
/// learn` among them.
#[derive(Clone, Debug)]
pub struct LearnOptions {
    /// What the network is quantised to while learning: weights too for RTN, not for GPTQ.
    pub scheme: Scheme,
    /// Optimiser steps.
    pub steps: usize,
    /// Sequences a step.
    pub batch: usize,
    /// Sequences that go through the network at once, at most `batch`; gradients are averaged. `None`: as planned on a GPU
    /// ([`LearnOptions::memory`]), the batch, or a rank's share of it, on the CPU.
    pub micro_batch: Option<usize>,
    /// Learning rate of the first step. `None`: the optimiser's ([`Optimizer::default_learning_rate`]), times the objective's factor
    /// ([`Objective::rate`]) unless the optimiser is scale-free.
    pub learning_rate: Option<f64>,
    /// How it falls. `None`: the optimiser's ([`Optimizer::default_schedule`]).
    pub schedule: Option<Schedule>,
    /// Decides which windows are held out and the order of the others, and the signs of heads' R2 where they get their own.
    pub seed: u64,
    /// Windows held out of training to score progress on. `None`: an eighth of them, at least 1 and at most 64.
    pub held_out: Option<usize>,
    /// Steps between scores (the start and the end are always scored).
    pub held_out_every: usize,
    /// What is computed again to save memory. `None`: as planned on a GPU, nothing on the CPU.
    pub recompute: Option<Recompute>,
    /// GPU memory that a plan stays within. A step is planned where neither `micro_batch` nor `recompute` is given.
    pub memory: Budget,
    /// Main memory that the same plan stays within, for layers that do not stay on the GPU.
    pub main_memory: Budget,
    /// Where the clip ratios of activations, K and V come from.
    pub clip: ClipChoice,
    /// Windows to search them on, spread evenly over the text; all where there are fewer.
    pub clip_windows: usize,
    /// What is learned, besides what the start has: R1 and R2 as published.
    pub transforms: Transforms,
    /// Adam's learning rate for logarithms of scales, of the first step; it falls as that of the rotations does.
    pub scale_rate: f64,
    /// Adam's learning rate for logarithms of clip ratios that are learned ([`ClipChoice::Learned`]), of the first step; it falls as that of
    /// the rotations does.
    pub clip_rate: f64,
    /// Where the clip ratios of weights come from.
    pub weight_clip: WeightClip,
    /// Adam's learning rate for logarithms of the clip ratios of weights that are learned ([`WeightClip::Learned`]), of the first step; it
    /// falls as that of the rotations does. `None`: [`LearnOptions::clip_rate`].
    pub weight_clip_rate: Option<f64>,
    /// Gradients pass straight through where a value was clamped by clip ratios that are learned, as they do by others.
    pub straight: bool,
    /// What is minimised. Held-out windows are scored by cross entropy whatever this is.
    pub objective: Arc<dyn Objective>,
    /// What clip ratios that are learned follow, those of weights too; rotations and scales then follow [`LearnOptions::objective`] alone.
    /// `None`: the one objective for all. It costs a second forward and backward pass a step.
    pub clip_objective: Option<Arc<dyn Objective>>,
    /// How products are computed whose operands are both quantised. The engines differ by rounding alone.
    pub engine: Engine,
    /// Where to keep a resumable state, and every how many steps.
    pub checkpoint: Option<(PathBuf, usize)>,
    /// Continue from that state if it exists.
    pub resume: bool,
    /// The processes that share the run: each takes its share of a step's sequences and of the held-out windows, and all of them learn the
    /// same rotations. All are given the same options, text and model; rank 0 alone writes the state. Equal runs give equal bits, as many
    /// ranks for as many; on another number of ranks gradients differ in the rounding of their sums.
    pub ranks: Group,
    /// Another thread sets this to end the run like a callback that breaks, while held-out windows are scored too. Those of the step in
    /// hand then stay without a score.
    pub stop: Option<Arc<AtomicBool>>,
}

impl Default for LearnOptions {
    fn default() -> Self {
        Self {
            scheme: Scheme::new(4, 4, 4),
            steps: 100,
            batch: 8,
            micro_batch: None,
            learning_rate: None,
            schedule: None,
            seed: 0,
            held_out: None,
            held_out_every: 25,
            recompute: None,
            memory: Budget::Free,
            main_memory: Budget::Free,
            clip: ClipChoice::Auto,
            clip_windows: 8,
            transforms: Transforms::PUBLISHED,
            scale_rate: 3e-3,
            clip_rate: 1e-2,
            weight_clip: WeightClip::Search,
            weight_clip_rate: None,
            straight: false,
            objective: Arc::new(CrossEntropy),
            clip_objective: None,
            engine: Engine::default(),
            checkpoint: None,
            resume: false,
            ranks: Group::alone(),
            stop: None,
        }
    }
}

/// Where the clip ratios that rotations are learned with come from.
///
/// ```
/// use spinquant::calibrate::ClipGoal;
/// use spinquant::learn::ClipChoice;
/// assert_eq!("loss".parse::<ClipChoice>()?, ClipChoice::Search(ClipGoal::Loss));
/// assert_eq!("none".parse::<ClipChoice>()?, ClipChoice::Keep);
/// # Ok::<(), spinquant::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ClipChoice {
    /// Searched by error on the start, unless the scheme has ratios or the optimiser clips nothing by default
    /// ([`Optimizer::clips_by_default`]).
    #[default]
    Auto,
    /// Those of the scheme, 1 unless set otherwise: what the paper does.
    Keep,
    /// Searched on the start.
    Search(ClipGoal),
    /// Searched by error on the start unless there are some, then learned with the rotations: for every layer and site, and for every head of K
    /// and V, both ends of the range apart ([`ClipEnds`](crate::rotation::ClipEnds)). They change the network's function.
    Learned,
}

impl ClipChoice {
    /// What is searched by; `None` where nothing is searched, as where neither activations nor K nor V are quantised.
    pub fn goal(self, scheme: &Scheme, optimizer: &dyn Optimizer) -> Option<ClipGoal> {
        let goal = match self {
            Self::Keep => None,
            Self::Search(goal) => Some(goal),
            Self::Learned => (scheme.activation_clip == ClipRatios::NONE).then_some(ClipGoal::Error),
            Self::Auto => (scheme.activation_clip == ClipRatios::NONE && optimizer.clips_by_default()).then_some(ClipGoal::Error),
        };
        goal.filter(|_| scheme.quantizes_activations())
    }
}

impl FromStr for ClipChoice {
    type Err = Error;
    /// `none`, `learned`, or a [`ClipGoal`]; `auto` is what it is without being given.
    fn from_str(s: &str) -> Result<Self> {
        match s {
            "none" => Ok(Self::Keep),
            "auto" => Ok(Self::Auto),
            "learned" => Ok(Self::Learned),
            _ => s
                .parse()
                .map(Self::Search)
                .map_err(|_| Error::argument("clip", format!("expected error, loss, learned or none, got {s:?}"))),
        }
    }
}

impl fmt::Display for ClipChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.pad("auto"),
            Self::Keep => f.pad("none"),
            Self::Learned => f.pad("learned"),
            Self::Search(goal) => goal.fmt(f),
        }
    }
}

/// Where the clip ratios of weights come from while rotations are learned.
///
/// ```
/// use spinquant::learn::WeightClip;
/// assert_eq!("learned".parse::<WeightClip>()?, WeightClip::Learned);
/// assert_eq!(WeightClip::default().to_string(), "search");
/// # Ok::<(), spinquant::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WeightClip {
    /// Found anew in every step by the scheme's rule ([`Scheme::weight_clip`]).
    #[default]
    Search,
    /// Found by it on the start, then learned with the rotations: one for every row of every weight, or every group of a row
    /// ([`WeightClips`](crate::rotation::WeightClips)). They change the network's function.
    Learned,
}

impl FromStr for WeightClip {
    type Err = Error;
    fn from_str(s: &str) -> Result<Self> {
        match s {
            "search" => Ok(Self::Search),
            "learned" => Ok(Self::Learned),
            _ => Err(Error::argument("weight clip", format!("expected search or learned, got {s:?}"))),
        }
    }
}

impl fmt::Display for WeightClip {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Search => "search",
            Self::Learned => "learned",
        })
    }
}

/// What [`LearnOptions`] come to for one model, text and optimiser.
#[derive(Clone, Debug)]
pub struct Settings {
    /// What the network is quantised to, clip ratios that were searched included.
    pub scheme: Scheme,
    /// Sequences through the network at once.
    pub micro_batch: usize,
    /// Learning rate of the first step.
    pub learning_rate: f64,
    /// How it falls.
    pub schedule: Schedule,
    /// Windows held out.
    pub held_out: usize,
    /// What is computed again.
    pub recompute: Recompute,
    /// Ranks make the rows of rotated, quantised weights together, which otherwise each of them makes for itself: where they have as many
    /// sequences of a step ([`LearnOptions::shares_rows`]) and all run it in the same way.
    pub share_rows: bool,
}

impl LearnOptions {
    /// The learning rate of the first step with an optimiser.
    pub fn rate(&self, optimizer: &dyn Optimizer) -> f64 {
        let factor = if optimizer.is_scale_free() { 1.0 } else { self.objective.rate() };
        self.learning_rate.unwrap_or_else(|| factor * optimizer.default_learning_rate())
    }

    /// How many of so many windows are held out.
    pub fn held_out_of(&self, windows: usize) -> usize {
        self.held_out.unwrap_or((windows / 8).clamp(1, 64))
    }

    /// Checks that a step has a sequence for each of so many ranks.
    ///
    /// # Errors
    /// [`Error::Argument`] with both numbers.
    pub fn check_batch(&self, ranks: usize) -> Result<()> {
        if self.batch >= ranks {
            return Ok(());
        }
        Err(Error::argument("batch", format!("expected at least a sequence for each of {ranks} ranks, got {}", self.batch)))
    }

    /// Checks what needs neither text nor model: [`learn`](super::learn()) does it first, a program may do it before it loads anything.
    ///
    /// # Errors
    /// [`Error::Argument`]: no steps, sequences or windows to search on; fewer sequences than ranks; a learning rate that is not finite and above 0; scales, or clip
    /// ratios that are learned, with a local objective.
    pub fn check(&self, optimizer: &dyn Optimizer) -> Result<()> {
        if self.steps == 0 || self.batch == 0 || self.micro_batch == Some(0) {
            return Err(Error::argument("learn", "steps, batch and micro-batch must be at least 1"));
        }
        self.check_batch(self.ranks.world())?;
        let rate = self.rate(optimizer);
        if !(rate > 0.0 && rate.is_finite()) {
            return Err(Error::argument("learning rate", format!("expected a finite number above 0, got {rate}")));
        }
        if let (Needs::Rows, Some(kind)) = (self.objective.needs(), self.transforms.scales().next()) {
            let message = format!("{} does not depend on scales, got {kind}: learn R1 and R2 alone", self.objective.name());
            return Err(Error::argument("transforms", message));
        }
        if !(self.scale_rate > 0.0 && self.scale_rate.is_finite()) {
            let message = format!("expected a finite number above 0, got {}", self.scale_rate);
            return Err(Error::argument("learning rate of scales", message));
        }
        if !(self.clip_rate > 0.0 && self.clip_rate.is_finite()) {
            let message = format!("expected a finite number above 0, got {}", self.clip_rate);
            return Err(Error::argument("learning rate of clip ratios", message));
        }
        let learned = [
            ("clip", self.clip == ClipChoice::Learned, self.scheme.activation_format),
            ("weight clip", self.weight_clip == WeightClip::Learned, self.scheme.weight_format),
        ];
        if let Some((name, _, Some(format))) = learned.into_iter().find(|(_, learned, format)| *learned && format.is_some()) {
            return Err(Error::argument(name, format!("ratios are learned of grids of integers, got {format}")));
        }
        if let Some(objective) = self.clip_objective.as_ref().filter(|o| o.needs() == Needs::Rows) {
            let message =
                format!("expected one of the whole network, got {}, which does not depend on clip ratios", objective.name());
            return Err(Error::argument("clip objective", message));
        }
        let of_clips = self.objective_of_clips();
        if let (Needs::Rows, ClipChoice::Learned) = (of_clips.needs(), self.clip) {
            let message = format!("{} does not depend on clip ratios: search them (error, loss) or give none", of_clips.name());
            return Err(Error::argument("clip", message));
        }
        self.check_weight_clip()?;
        if self.clip_windows == 0 && self.clip.goal(&self.scheme, optimizer).is_some() {
            return Err(Error::argument("clip search", "expected at least one window to search on, got 0"));
        }
        Ok(())
    }

    /// The learning rate of clip ratios of weights, of the first step.
    pub fn weight_clip_rate(&self) -> f64 {
        self.weight_clip_rate.unwrap_or(self.clip_rate)
    }

    /// What clip ratios that are learned follow.
    fn objective_of_clips(&self) -> &dyn Objective {
        self.clip_objective.as_ref().unwrap_or(&self.objective).as_ref()
    }

    /// Clip ratios of activations, K and V are learned.
    fn learns_clips(&self) -> bool {
        self.clip == ClipChoice::Learned && self.scheme.quantizes_activations()
    }

    /// The same options for a start, whose clip ratios are learned on where it has some that the scheme uses.
    ///
    /// # Errors
    /// Those of [`Rotations::weight_clips_for`].
    pub fn with_clips_of(self, start: &Rotations) -> Result<Self> {
        let clip = if start.clips.is_empty() { self.clip } else { ClipChoice::Learned };
        let weights = start.weight_clips_for(&self.scheme)?.is_some();
        let weight_clip = if weights { WeightClip::Learned } else { self.weight_clip };
        Ok(Self { clip, weight_clip, ..self })
    }

    /// Checks that an objective of clip ratios has some to move, those of a start included ([`LearnOptions::with_clips_of`]).
    /// [`learn`](super::learn()) does it before any search.
    ///
    /// # Errors
    /// [`Error::Argument`]: such an objective where no clip ratio is learned.
    pub fn check_clip_objective(&self) -> Result<()> {
        match &self.clip_objective {
            Some(objective) if !self.learns_clips() && self.weight_clip == WeightClip::Search => {
                let message = format!("{} has nothing to move: no clip ratio is learned at {}", objective.name(), self.scheme);
                Err(Error::argument("clip objective", message))
            }
            _ => Ok(()),
        }
    }

    fn check_weight_clip(&self) -> Result<()> {
        let rate = self.weight_clip_rate();
        if !(rate > 0.0 && rate.is_finite()) {
            let message = format!("expected a finite number above 0, got {rate}");
            return Err(Error::argument("learning rate of clip ratios of weights", message));
        }
        if self.weight_clip == WeightClip::Search {
            return Ok(());
        }
        if self.objective_of_clips().needs() == Needs::Rows {
            let message = format!("{} does not depend on those of weights: search them", self.objective_of_clips().name());
            return Err(Error::argument("weight clip", message));
        }
        if self.scheme.weight_bits >= 16 {
            let message = format!("expected weights of 2 to 8 bits to learn clip ratios of, got {}", self.scheme);
            return Err(Error::argument("weight clip", message));
        }
        Ok(())
    }

    /// Checks that a text is long enough.
    ///
    /// # Errors
    /// [`Error::Argument`]: not fewer windows held out than there are, or a batch of more than the others.
    pub fn check_text(&self, windows: &Windows) -> Result<()> {
        let (train, _) = split_held_out(windows, self.held_out_of(windows.len()), self.seed)?;
        Sampler::new(train, self.batch, self.seed).map(drop)
    }

    /// How a step runs within what there is room for ([`LearnOptions::room`]), at all ranks within the least that one has; `None` where `micro_batch` or `recompute` says how.
    ///
    /// # Errors
    /// Those of [`Transforms::of`], [`memory::plan`] and [`Group::gather`].
    pub fn plan(&self, config: &LlamaConfig, seq: usize, dtype: DType, room: Room, card: &Card) -> Result<Option<Planned>> {
        self.plan_among(self.ranks.world(), config, (seq, dtype), None, self.agreed(room)?, card)
    }

    /// The least that any rank has, so that all of them plan the same.
    ///
    /// # Errors
    /// Those of [`Group::gather`].
    pub fn agreed(&self, room: Room) -> Result<Room> {
        let here = [room.card, room.host].map(|bytes| (bytes as u64).to_le_bytes()).concat();
        let all = self.ranks.gather("memory to plan with", here)?;
        let least = |of: usize| {
            let bytes = |rank: &Vec<u8>| rank.get(of..)?.first_chunk().map(|bytes| u64::from_le_bytes(*bytes) as usize);
            all.iter().filter_map(bytes).min().unwrap_or(0)
        };
        Ok(Room { card: least(0), host: least(8), ..room })
    }

    /// What a plan may use of a card with so many bytes free, and of main memory, which ranks of a machine have in common.
    pub fn room(&self, free: usize) -> Room {
        Room::here(self.memory, free, self.main_memory)
    }

    /// The same, for each of so many ranks, with the layers where a model has them, or where that is best.
    ///
    /// # Errors
    /// Those of [`Transforms::of`] and [`memory::plan`].
    pub fn plan_among(
        &self,
        ranks: usize,
        config: &LlamaConfig,
        (seq, dtype): (usize, DType),
        placement: Option<Placement>,
        room: Room,
        card: &Card,
    ) -> Result<Option<Planned>> {
        if self.recompute.is_some() || self.micro_batch.is_some() {
            return Ok(None);
        }
        memory::plan(config, &Work { placement, ..self.work_among(ranks, config, seq, dtype)? }, room, card).map(Some)
    }

    /// What a step of a model is for a plan, of the rank with the largest share.
    ///
    /// # Errors
    /// Those of [`Transforms::of`].
    pub fn work(&self, config: &LlamaConfig, seq: usize, dtype: DType) -> Result<Work> {
        self.work_among(self.ranks.world(), config, seq, dtype)
    }

    /// Whether so many ranks can share the rows of weights in a step: those run it alike who have as many sequences.
    pub fn shares_rows(&self, ranks: usize) -> bool {
        ranks > 1 && self.batch.is_multiple_of(ranks)
    }

    fn work_among(&self, ranks: usize, config: &LlamaConfig, seq: usize, dtype: DType) -> Result<Work> {
        let transforms = self.transforms.of(&config.scale_sizes())?;
        let (clips, weight_clips) = (self.learns_clips(), self.weight_clip == WeightClip::Learned);
        Ok(Work {
            needs: self.objective.needs(),
            clip_needs: self.clip_objective.as_ref().filter(|_| clips || weight_clips).map(|objective| objective.needs()),
            transforms,
            clips,
            weight_clips,
            engine: self.engine,
            ranks: if self.shares_rows(ranks) { ranks } else { 1 },
            ..Work::new(self.scheme, self.batch.div_ceil(ranks), seq, dtype)
        })
    }

    /// What the options come to, clip ratios aside: those are searched by [`learn`](super::learn()).
    ///
    /// # Errors
    /// Those of [`LearnOptions::plan`], on a GPU.
    pub fn settle(&self, model: &Llama, windows: &Windows, optimizer: &dyn Optimizer) -> Result<Settings> {
        let planned = match model.device().card()? {
            // The model is there already, on the card and in main memory.
            Some(card) => {
                let placement = model.placement();
                let room = Room { card: self.memory.bytes(card.free + model.bytes_on_device()), host: usize::MAX, files: true };
                let (sizes, room) = ((windows.seq_len(), model.dtype()), self.agreed(room)?);
                self.plan_among(self.ranks.world(), &model.config, sizes, Some(placement), room, &card)?
            }
            None => None,
        };
        Ok(Settings {
            scheme: self.scheme,
            micro_batch: self
                .micro_batch
                .or(planned.as_ref().map(|p| p.micro_batch))
                .unwrap_or(self.ranks.largest_share(self.batch)),
            learning_rate: self.rate(optimizer),
            schedule: self.schedule.unwrap_or_else(|| optimizer.default_schedule()),
            held_out: self.held_out_of(windows.len()),
            recompute: self.recompute.or(planned.map(|p| Recompute::Planned(p.plan))).unwrap_or(Recompute::None),
            share_rows: false,
        })
    }
}
