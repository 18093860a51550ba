//! What a run keeps to be continued, and how it knows its own.

use std::path::Path;

use serde_json::{Value, json};

use super::{Faithful, LearnOptions, Settings};
use crate::data::{self, Windows};
use crate::llama::Llama;
use crate::optim::{Product, State};
use crate::quant::{Engine, R4};
use crate::rotation::{Rotations, WeightClips};
use crate::{Device, Error, Result, Tensor};

/// Everything that changes from step to step.
pub(super) struct Progress {
    pub rotations: Rotations,
    pub step: usize,
    pub losses: (f64, f64),
    pub held_out: (f64, f64),
    /// At the start.
    pub fidelity: Faithful,
    pub orthogonality_error: f64,
    pub seconds: f64,
}

/// What must agree between a saved state and the run that continues it.
pub(super) fn fingerprint(
    (model, weights): (&Llama, &str),
    windows: &Windows,
    start: &Rotations,
    optimizer: &str,
    o: &LearnOptions,
    settings: &Settings,
) -> Result<Value> {
    let values = |t: &Tensor| Ok(t.to_f64_vec()?.into_iter().flat_map(f64::to_le_bytes));
    let second = start.r2b.as_ref().map(values).transpose()?.into_iter().flatten();
    let mut all = json!({
        "scheme": format!("{:?}", settings.scheme),
        "steps": o.steps,
        "batch": o.batch,
        // As asked for: what is planned depends on memory and on how many ranks there are, and changes the rounding of sums alone.
        "micro_batch": o.micro_batch.unwrap_or(o.batch),
        "learning_rate": settings.learning_rate,
        "schedule": format!("{:?}", settings.schedule),
        "seed": o.seed,
        "held_out": settings.held_out,
        "seq_len": windows.seq_len(),
        "windows": windows.len(),
        "text": windows.checksum(),
        "start": data::checksum(values(&start.r1)?.chain(values(&start.r2)?).chain(second)),
        "weights": weights,
        "optimizer": optimizer,
        "objective": o.objective.name(),
        "dtype": model.dtype().to_string(),
        "model": [model.config.hidden_size, model.config.layers, model.config.head_dim, model.config.vocab_size],
    });
    if let Some(objective) = &o.clip_objective {
        all["clip_objective"] = objective.name().into();
    }
    if o.engine != Engine::default() {
        all["engine"] = o.engine.name().into();
    }
    if !start.clips.is_empty() {
        let mut clips = serde_json::Map::new();
        for (site, t) in start.clips.iter() {
            clips.insert(site.name().to_string(), data::checksum(values(t)?).into());
        }
        all["clips"] = clips.into();
        all["clip_rate"] = o.clip_rate.into();
        all["straight"] = o.straight.into();
    }
    if let Some(of) = &start.weight_clips {
        let mut clips = serde_json::Map::new();
        for (linear, t) in of.iter() {
            clips.insert(linear.to_string(), data::checksum(values(t)?).into());
        }
        all["weight_clips"] = clips.into();
        all["weight_clip_rate"] = o.weight_clip_rate().into();
        all["straight"] = o.straight.into();
    }
    if !start.scales.is_empty() {
        let mut scales = serde_json::Map::new();
        for (kind, t) in start.scales.iter() {
            scales.insert(kind.to_string(), data::checksum(values(t)?).into());
        }
        all["scales"] = scales.into();
        all["scale_rate"] = o.scale_rate.into();
    }
    // A state of before maps were recorded, whose "whole" R4 was another, is not to be gone on from.
    let (r4, width) = (settings.scheme.online.r4, model.config.intermediate_size);
    if r4 == R4::Whole && r4.unrecorded(width)? != r4 {
        all["r4"] = r4.map(width)?.map(|map| map.to_string()).into();
    }
    Ok(all)
}

/// Writes a state: that of the optimiser, rotations, numbers, and whose run it is.
pub(super) fn save(now: &Progress, fingerprint: &Value, path: &Path, optimizer: &Product<'_>) -> Result<()> {
    let mut state = optimizer.state();
    let named = |name: &String| format!("optimizer.{name}");
    state.tensors = state.tensors.iter().map(|(k, v)| Ok((named(k), v.to_device(&Device::Cpu)?))).collect::<Result<_>>()?;
    state.scalars = state.scalars.iter().map(|(k, v)| (named(k), v.clone())).collect();
    let rotations = now.rotations.to_device(&Device::Cpu)?;
    state.tensors.extend(rotations.tensors().into_iter().map(|(name, t)| (name, t.clone())));
    let numbers = [
        ("step", now.step as f64),
        ("loss_first", now.losses.0),
        ("loss_last", now.losses.1),
        ("held_out_first", now.held_out.0),
        ("held_out_last", now.held_out.1),
        ("kl_first", now.fidelity.divergence),
        ("top1_first", now.fidelity.agreement),
        ("orthogonality_error", now.orthogonality_error),
        ("seconds", now.seconds),
    ];
    state.scalars.extend(numbers.map(|(name, x)| (name.to_string(), json!(x))));
    state.scalars.insert("run".into(), fingerprint.clone());
    state.save(path)
}

/// What a run is told to do: of things that differ these are named first, and what follows from them is not.
const CHOSEN: [&str; 7] = ["optimizer", "objective", "scheme", "steps", "scales", "clips", "weight_clips"];

/// A part of a fingerprint in words: of several checksums what they are of.
fn shown(value: Option<&Value>) -> String {
    match value {
        None | Some(Value::Null) => "none".into(),
        Some(Value::Object(parts)) => parts.keys().map(String::as_str).collect::<Vec<_>>().join(", "),
        Some(value) => value.to_string(),
    }
}

/// What clip ratios that are searched decide, beside what was chosen.
const SEARCHED: [&str; 5] = ["clips", "clip_rate", "straight", "weight_clips", "weight_clip_rate"];

/// Checks a state before clip ratios are searched: all that no search decides.
///
/// # Errors
/// A state of another run.
pub(super) fn check_early(state: &State, fingerprint: &Value, path: &Path) -> Result<()> {
    same(state, fingerprint, path, |name| name != "scheme" && !SEARCHED.contains(&name))?;
    // A scheme is written with its clip ratios, behind its bits and grids.
    let front = |run: Option<&Value>| Some(run?.get("scheme")?.as_str()?.split(", activation_clip").next()?.to_string());
    match [front(state.scalars.get("run")), front(Some(fingerprint))] {
        [Some(saved), Some(ours)] if saved != ours => Err(of_another(path, &format!("scheme was {saved} …, now {ours} …"))),
        _ => Ok(()),
    }
}

fn of_another(path: &Path, differs: &str) -> Error {
    Error::format(path, format!("saved by another run: {differs}; delete it or change back"))
}

/// Checks what a state says of its run, as far as it is `asked` for.
fn same(state: &State, fingerprint: &Value, path: &Path, asked: impl Fn(&str) -> bool) -> Result<()> {
    let run = state.scalars.get("run").ok_or_else(|| Error::format(path, "not a state saved while learning"))?;
    let (Some(saved), Some(ours)) = (run.as_object(), fingerprint.as_object()) else { return Ok(()) };
    let names = CHOSEN.into_iter().chain(ours.keys().chain(saved.keys()).map(String::as_str)).filter(|name| asked(name));
    let Some(name) = names.into_iter().find(|name| saved.get(*name) != ours.get(*name)) else { return Ok(()) };
    Err(match [saved, ours].map(|run| shown(run.get(name))) {
        [saved, ours] if saved == ours => of_another(path, &format!("{name} had other values")),
        [saved, ours] => of_another(path, &format!("{name} was {saved}, now {ours}")),
    })
}

/// Continues from a state of the same run.
pub(super) fn resume(
    mut state: State,
    fingerprint: &Value,
    path: &Path,
    weight_grid: Option<&str>,
    optimizer: &mut Product<'_>,
) -> Result<Progress> {
    same(&state, fingerprint, path, |_| true)?;
    let mut take = |name: &str| state.tensors.remove(name).ok_or_else(|| Error::format(path, format!("no tensor {name}")));
    let mut rotations = Rotations::new(take("R1")?, take("R2")?);
    rotations.set_extras(|name| Ok(take(name).ok()))?; // of the kinds that the fingerprint names
    rotations.weight_clips = WeightClips::take(weight_grid, |name| Ok(take(name).ok()))?;
    // A loss that was never scored is null in the file.
    let number = |name: &str| state.scalars.get(name).and_then(Value::as_f64).unwrap_or(f64::NAN);
    let progress = Progress {
        rotations,
        step: state.number("step")? as usize,
        losses: (number("loss_first"), number("loss_last")),
        held_out: (number("held_out_first"), number("held_out_last")),
        fidelity: Faithful { divergence: number("kl_first"), agreement: number("top1_first") },
        orthogonality_error: number("orthogonality_error"),
        seconds: number("seconds"),
    };
    let inner = |name: &String| name.strip_prefix("optimizer.").map(str::to_string);
    optimizer.load_state(State {
        tensors: state.tensors.iter().filter_map(|(k, v)| Some((inner(k)?, v.clone()))).collect(),
        scalars: state.scalars.iter().filter_map(|(k, v)| Some((inner(k)?, v.clone()))).collect(),
    })?;
    Ok(progress)
}
