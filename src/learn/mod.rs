//! Learning rotations: the loop of the paper (arXiv 2405.16406 §3), for any optimiser and any objective.

mod gradients;
mod held_out;
mod options;
mod recipe;
mod shared;
mod state;
mod watch;

use gradients::gradients;
use held_out::Set;
pub use held_out::held_out_loss;
pub use options::{ClipChoice, LearnOptions, Settings, WeightClip};
pub use recipe::Recipe;
use shared::{after_step, agree, alike};
use state::{Progress, fingerprint, resume, save};
pub(crate) use watch::Named;
use watch::Steps;
pub use watch::{Point, Watch};

use std::cell::OnceCell;
use std::ops::ControlFlow;
use std::sync::atomic::Ordering;
use std::time::Instant;

use serde_json::Value;

use crate::calibrate::{ClipFound, ClipGoal, search_clips_among, search_weight_clips_among};
use crate::data::{Sampler, Windows, split_held_out};
use crate::llama::{Llama, LlamaConfig, check_weight_clips};
use crate::optim::{Optimizer, Product, Rates, State};
use crate::profile::{enter, enter_pass};
use crate::quant::{ClipRatios, Scheme};
use crate::ranks::Group;
use crate::rotation::{ClipEnds, RotationFile, Rotations, WeightClips};
use crate::{DType, Device, Error, Result};

/// What happened in one step, as told to the callback.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepReport {
    /// Steps done, this one included.
    pub step: usize,
    /// The objective on the step's batch, before the update.
    pub loss: f64,
    /// Learning rate used.
    pub learning_rate: f64,
    /// Mean cross entropy on the held-out windows after the update, when it was scored.
    pub held_out: Option<f64>,
    /// max|RᵀR − I| over all rotations after the update.
    pub orthogonality_error: f64,
    /// Wall-clock time of the step, scoring not included.
    pub seconds: f64,
}

/// The outcome of [`learn`].
#[derive(Clone, Debug)]
pub struct Learned {
    /// What was learned.
    pub rotations: Rotations,
    /// What the options came to: the scheme with the clip ratios that belong to the rotations, the rate, how a step ran.
    pub settings: Settings,
    /// The search for clip ratios and what it was by, where there was one.
    pub clip: Option<(ClipFound, ClipGoal)>,
    /// The objective on the first step's batch at the start.
    pub loss_first: f64,
    /// The objective on the last step's batch.
    pub loss_last: f64,
    /// Held-out cross entropy at the start.
    pub held_out_first: f64,
    /// Held-out cross entropy at the end.
    pub held_out_last: f64,
    /// Fidelity on the held-out windows to the model in full precision, at the start.
    pub fidelity_first: Faithful,
    /// The same at the end.
    pub fidelity_last: Faithful,
    /// The largest max|RᵀR − I| after any step.
    pub orthogonality_error: f64,
    /// Mean wall-clock time of a step, scoring not included.
    pub seconds_per_step: f64,
}

/// Fidelity of a network to the model in full precision: means over the tokens of held-out windows, NaN where there are none.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Faithful {
    /// KL(full precision ‖ network), in nats a token.
    pub divergence: f64,
    /// The part of tokens after which both find the same token likeliest.
    pub agreement: f64,
}

impl Faithful {
    const UNKNOWN: Self = Self { divergence: f64::NAN, agreement: f64::NAN };
}

/// Searches clip ratios on `count` windows spread over a text, which ranks share ([`search_clips_among`]).
///
/// # Errors
/// Those of [`search_clips_among`].
pub fn search_clips_watched(
    ranks: &Group,
    model: &Llama,
    rotations: &Rotations,
    scheme: &Scheme,
    windows: &Windows,
    (goal, count): (ClipGoal, usize),
    watch: &mut dyn Watch,
) -> Result<ClipFound> {
    let mut begun = false;
    let text = (windows, &windows.spread(count)[..]);
    search_clips_among(ranks, model, Some(rotations), scheme, text, goal, |done, total| {
        if !std::mem::replace(&mut begun, true) {
            watch.begin("searching clip ratios", total);
        }
        watch.at(done)
    })
}

impl Learned {
    /// The rotations of a model of this configuration with their clip ratios and the online Hadamards that they are for, to be written.
    ///
    /// # Errors
    /// Those of [`RotationFile::with_online`], of a model that these were not learned on.
    pub fn file(&self, config: &LlamaConfig) -> Result<RotationFile> {
        let scheme = &self.settings.scheme;
        let file = RotationFile::new(self.rotations.clone());
        let file = file.with_online(scheme.online, config.head_dim, config.intermediate_size)?;
        let none = scheme.activation_clip == ClipRatios::NONE && self.rotations.clips.is_empty();
        Ok(if none { file } else { file.with_clips_of(scheme) })
    }
}

/// A loss above so many times the first one, and so much more, is not coming back.
const DIVERGED: f64 = 3.0;

/// Learns rotations for `model` from `rotations`, and what else the options ask for from a start of its own
/// ([`Rotations::with_transforms`]), on windows of calibration text, with clip ratios that are searched on the start where
/// [`LearnOptions::clip`] says so. `callback` hears of every step and may stop the run, which then leaves a checkpoint (if one was
/// asked for) and returns [`Error::Interrupted`]. [`learn_watched`] hears of the search too.
///
/// # Errors
/// Those of [`LearnOptions::check`], [`LearnOptions::check_clip_objective`], [`LearnOptions::check_text`] and [`LearnOptions::settle`],
/// before any work; rotations that do not
/// fit the model; a loss, gradient or rotation that is not finite (names the step, and of a loss the layer), or a loss that diverges
/// (names the step): the checkpoint stays as it was; a state of another run; and whatever the optimiser reports.
pub fn learn(
    model: &Llama,
    windows: &Windows,
    rotations: Rotations,
    optimizer: &mut dyn Optimizer,
    options: &LearnOptions,
    callback: impl FnMut(&StepReport) -> ControlFlow<()>,
) -> Result<Learned> {
    learn_watched(model, windows, rotations, optimizer, options, &mut Steps(callback))
}

/// [`learn`], told to a [`Watch`].
///
/// # Errors
/// Those of [`learn`]; [`Error::Rank`] of another of [`LearnOptions::ranks`], or where they do not agree.
pub fn learn_watched(
    model: &Llama,
    windows: &Windows,
    rotations: Rotations,
    optimizer: &mut dyn Optimizer,
    options: &LearnOptions,
    watch: &mut dyn Watch,
) -> Result<Learned> {
    let learned = learn_among(model, windows, rotations, optimizer, options, watch);
    learned.inspect_err(|e| options.ranks.fail(e))
}

/// The same; an error is still to be told to the other ranks.
fn learn_among(
    model: &Llama,
    windows: &Windows,
    rotations: Rotations,
    optimizer: &mut dyn Optimizer,
    options: &LearnOptions,
    watch: &mut dyn Watch,
) -> Result<Learned> {
    options.check(optimizer)?;
    options.check_text(windows)?;
    let LearnOptions { steps, batch, ref ranks, .. } = *options;
    let model = &model.clone().by(options.engine);
    ranks.attach(&model.device())?;
    let config = &model.config;
    let rotations = rotations.with_transforms(&options.transforms, &config.scale_sizes(), Some(options.seed))?;
    // Those of the start are learned too, and planned for.
    let options = options.clone().with_clips_of(&rotations)?;
    let clips = rotations.weight_clips_for(&options.scheme)?.cloned();
    let rotations = rotations.with_weight_clips(clips);
    let options = &LearnOptions { transforms: rotations.transforms(), ..options };
    options.check(optimizer)?;
    options.check_clip_objective()?;
    rotations.to_device(&model.device())?.check_for(&config.scale_sizes(), 1e-4)?;
    let dtype = if model.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
    let mut scheme = options.scheme;
    let mut clip = None;
    let name = optimizer.name().to_string();
    // Reads the whole model, so only where there is a state to read or to write.
    let weights = OnceCell::new();
    let weights = || -> Result<&str> {
        if weights.get().is_none() {
            let _ = weights.set(model.sha256()?);
        }
        Ok(weights.get().map(String::as_str).expect("just set"))
    };
    let saved = match &options.checkpoint {
        Some((path, _)) if options.resume && path.exists() => Some((path, State::load(path)?)),
        _ => None,
    };
    if let Some((path, state)) = &saved {
        let asked = options.settle(model, windows, optimizer)?;
        state::check_early(state, &fingerprint((model, weights()?), windows, &rotations, &name, options, &asked)?, path)?;
    }
    // Searched again when a run is resumed: equal inputs give equal ratios, and the state refuses others.
    if let Some(goal) = options.clip.goal(&scheme, optimizer).filter(|_| rotations.clips.is_empty()) {
        let found = search_clips_watched(ranks, model, &rotations, &scheme, windows, (goal, options.clip_windows), watch)?;
        watch.clipped(&found, goal);
        scheme.activation_clip = found.ratios;
        clip = Some((found, goal));
    }
    let rotations = match options.clip {
        ClipChoice::Learned if rotations.clips.is_empty() => {
            let layers =
                clip.as_ref().map_or_else(|| vec![scheme.activation_clip; config.layers], |(found, _)| found.layers.clone());
            rotations.with_clips(ClipEnds::of_ratios(&scheme.active_sites(), &layers, config.kv_heads)?)
        }
        _ => rotations,
    };
    let rotations = match options.weight_clip {
        WeightClip::Learned if rotations.weight_clips.is_none() => {
            watch.begin("searching clip ratios of weights", ranks.share(config.layers).len());
            let found = search_weight_clips_among(ranks, model, &rotations, &scheme, |done, _| watch.at(done))?;
            rotations.with_weight_clips(Some(found))
        }
        _ => rotations,
    };
    check_weight_clips(&rotations, config, &scheme)?;
    let settings = Settings { scheme, ..options.settle(model, windows, optimizer)? };
    let settings = Settings { share_rows: alike(options, model, &settings)?, ..settings };
    let (train, held_out) = split_held_out(windows, settings.held_out, options.seed)?;
    let sampler = Sampler::new(train, batch, options.seed)?;
    let known = OnceCell::new();
    let fingerprint = || -> Result<&Value> {
        if known.get().is_none() {
            let _ = known.set(fingerprint((model, weights()?), windows, &rotations, &name, options, &settings)?);
        }
        Ok(known.get().expect("just set"))
    };

    let mut optimizer = Product::new(optimizer);
    let mut now = match saved {
        Some((path, state)) => {
            let grid = rotations.weight_clips.as_ref().map(WeightClips::grid);
            resume(state, fingerprint()?, path, grid, &mut optimizer)?
        }
        None => Progress {
            rotations: rotations.to_device(&model.device())?.to_dtype(dtype)?,
            step: 0,
            losses: (f64::NAN, f64::NAN),
            held_out: (f64::NAN, f64::NAN),
            fidelity: Faithful::UNKNOWN,
            orthogonality_error: 0.0,
            seconds: 0.0,
        },
    };
    now.rotations = now.rotations.to_device(&model.device())?;
    agree(ranks, windows, &settings, &now)?;
    let stopped = || options.stop.as_ref().is_some_and(|stop| stop.load(Ordering::Relaxed));
    let set = Set { model, windows, held_out: &held_out, scheme: &scheme, at_once: settings.micro_batch, ranks };
    let (faithful, score) = (|r: &Rotations| set.fidelity(r, &stopped), |r: &Rotations| set.loss(r, &stopped));
    if now.step == 0 {
        now.held_out.0 = score(&now.rotations)?.ok_or(Error::Interrupted { step: 0 })?;
        now.held_out.1 = now.held_out.0;
        now.fidelity = faithful(&now.rotations)?.ok_or(Error::Interrupted { step: 0 })?;
    }
    watch.begin("learning", steps);
    while now.step < steps {
        let start = Instant::now();
        let failed = |e: Error| match e {
            Error::Rank { .. } => e,
            e => Error::numeric(format!("step {}", now.step + 1), e),
        };
        let (loss, grads) =
            gradients(model, windows, &sampler.step(now.step), &now.rotations, (options, &settings)).map_err(failed)?;
        if loss > DIVERGED * now.losses.0.abs() + DIVERGED {
            let message = format!("diverges: {loss:.3}, after {:.3} in the first step; try a lower learning rate", now.losses.0);
            return Err(failed(Error::numeric("loss", message)));
        }
        let learning_rate = settings.schedule.at(now.step, steps, settings.learning_rate);
        let (update, part) = (enter_pass("update"), enter("optimiser"));
        let fallen = learning_rate / settings.learning_rate;
        let rates = Rates {
            rotations: learning_rate,
            scales: options.scale_rate * fallen,
            clips: options.clip_rate * fallen,
            weight_clips: options.weight_clip_rate() * fallen,
        };
        let rotations = optimizer.step(&now.rotations, grads, rates).map_err(failed)?;
        let orthogonality_error = audit(&rotations, optimizer.rotations()).map_err(failed)?;
        drop((part, update));
        now.rotations = rotations;
        let seconds = start.elapsed().as_secs_f64();

        now.step += 1;
        if now.step == 1 {
            now.losses.0 = loss;
        }
        now.losses.1 = loss;
        now.seconds += seconds;
        now.orthogonality_error = now.orthogonality_error.max(orthogonality_error);
        let scored = now.step == steps || now.step.is_multiple_of(options.held_out_every.max(1));
        let held_out = if scored { score(&now.rotations)? } else { None };
        now.held_out.1 = held_out.unwrap_or(now.held_out.1);
        let report = StepReport { step: now.step, loss, learning_rate, held_out, orthogonality_error, seconds };
        let stop = watch.step(&report).is_break() || stopped();
        let stop = after_step(ranks, &now, steps, stop)?;
        if let Some((path, every)) = &options.checkpoint
            && now.step < steps
            && (stop || now.step.is_multiple_of((*every).max(1)))
            && ranks.is_first()
        {
            save(&now, fingerprint()?, path, &optimizer)?;
        }
        if stop && now.step < steps {
            return Err(Error::Interrupted { step: now.step });
        }
    }
    // Of a run that ended: nothing is lost where scoring it was stopped.
    let fidelity_last = faithful(&now.rotations)?.unwrap_or(Faithful::UNKNOWN);
    Ok(Learned {
        rotations: now.rotations.to_device(&Device::Cpu)?,
        settings,
        clip,
        loss_first: now.losses.0,
        loss_last: now.losses.1,
        held_out_first: now.held_out.0,
        held_out_last: now.held_out.1,
        fidelity_first: now.fidelity,
        fidelity_last,
        orthogonality_error: now.orthogonality_error,
        seconds_per_step: now.seconds / steps as f64,
    })
}

/// max|RᵀR − I|: the optimiser's word for it, or measured where it gives none.
fn audit(rotations: &Rotations, optimizer: &dyn Optimizer) -> Result<f64> {
    let error = optimizer.orthogonality_error();
    if error.is_finite() {
        return Ok(error);
    }
    rotations.check(rotations.hidden(), rotations.head_dim(), rotations.layers(), f64::MAX)?;
    let (r1, r2) = rotations.orthogonality_errors()?;
    Ok(r2.into_iter().fold(r1, f64::max))
}
