//! Optimisers of orthogonal matrices, and learning-rate schedules.
//!
//! Parameters are batches of square matrices, `[k, n, n]`: R1 as `[1, C, C]`, R2 as `[L, D, D]`. Every matrix of a batch is stepped
//! on its own.
//!
//! | name | what | rate |
//! |---|---|---|
//! | `cayley` | [`CayleySgd`]: the paper's, kept on the manifold | 1.5 |
//! | `cayley-parity` | the published code's arithmetic, drift included | 1.5 |
//! | `sgd-qr`, `sgd-polar` | [`RiemannianSgd`] with a QR or a polar retraction | 1.5 |
//! | `adam-qr`, `adam-polar` | [`RiemannianAdam`], one second moment a matrix; the rate is an angle | 0.02 |
//! | `adam-polar-elementwise` | the same with a second moment for every entry | 0.02 |
//! | `qr-orth` | [`QrOrth`]: descent on a latent matrix whose Q factor is the rotation | 0.75 |
//!
//! To add one: a file here that implements [`Optimizer`], a line in [`all`], a call of the laws ([`crate::laws`]) in
//! `tests/it/properties.rs`.

mod adam;
mod cayley;
mod product;
mod qr_orth;
mod riemannian;
mod schedule;
mod timed;

pub use adam::Adam;
pub use cayley::{CayleySgd, Mode};
pub use product::{Gradients, Product, Rates};
pub use qr_orth::{QrOrth, gradient_through_qr};
pub use riemannian::{RiemannianAdam, RiemannianSgd};
pub use schedule::Schedule;
pub use timed::cases;

use std::collections::BTreeMap;
use std::path::Path;

use crate::{Error, Result, Tensor, io, linalg};

/// Something that moves rotations downhill and can be stopped and resumed to the same bits.
pub trait Optimizer {
    /// What it is called on the command line and in saved states.
    fn name(&self) -> &str;

    /// Moves `params` along their Euclidean gradients `dL/dparam` (same shapes, type and device) at learning rate `lr`.
    ///
    /// # Errors
    /// Shapes that do not belong together, or numbers that are not finite; `params` are then as they were.
    fn step(&mut self, params: &mut [Tensor], grads: Vec<Tensor>, lr: f64) -> Result<()>;

    /// Everything the next step depends on besides its arguments.
    fn state(&self) -> State;

    /// Continues from a state that an optimiser of the same kind returned.
    ///
    /// # Errors
    /// A state of another optimiser, of other constants, or of parameters of another shape; the optimiser is then unchanged.
    fn load_state(&mut self, state: State) -> Result<()>;

    /// max|RᵀR − I| over all parameters after the last step, where the optimiser audits it; NaN before the first step.
    fn orthogonality_error(&self) -> f64 {
        f64::NAN
    }

    /// The learning rate of the first step where none is given, for cross entropy.
    fn default_learning_rate(&self) -> f64 {
        1.5
    }

    /// How the rate falls where nothing else is said.
    fn default_schedule(&self) -> Schedule {
        Schedule::Cosine
    }

    /// False of an optimiser that repeats a published run, which clips nothing: clip ratios are then searched only on demand.
    fn clips_by_default(&self) -> bool {
        true
    }

    /// True when a step's length does not depend on the gradient's, so that one rate suits every objective.
    fn is_scale_free(&self) -> bool {
        false
    }
}

/// Every optimiser of this crate, new.
pub fn all() -> Vec<Box<dyn Optimizer>> {
    vec![
        Box::new(CayleySgd::new(Mode::Default)),
        Box::new(CayleySgd::new(Mode::Parity)),
        Box::new(RiemannianSgd::qr()),
        Box::new(RiemannianSgd::polar()),
        Box::new(RiemannianAdam::qr()),
        Box::new(RiemannianAdam::polar()),
        Box::new(RiemannianAdam::polar().elementwise()),
        Box::new(QrOrth::new()),
    ]
}

/// An optimiser by its name on the command line; the names are in this module's table.
///
/// # Errors
/// Any other name: lists them all.
pub fn by_name(name: &str) -> Result<Box<dyn Optimizer>> {
    let names: Vec<String> = all().iter().map(|o| o.name().to_string()).collect();
    let found = all().into_iter().find(|o| o.name() == name);
    found.ok_or_else(|| Error::argument("optimizer", format!("expected one of {}, got {name:?}", names.join(", "))))
}

/// What every step refuses: gradients that do not belong to the parameters, a rate that is none, a state of other parameters (`kept`
/// is how many it knows, 0 for none).
pub(crate) fn check_step(what: &str, params: &[Tensor], grads: &[Tensor], lr: f64, kept: usize) -> Result<()> {
    if grads.len() != params.len() {
        return Err(Error::argument(what, format!("{} gradients for {} parameters", grads.len(), params.len())));
    }
    if !(lr >= 0.0 && lr.is_finite()) {
        return Err(Error::argument("learning rate", format!("expected a finite number of at least 0, got {lr}")));
    }
    if kept != 0 && kept != params.len() {
        return Err(Error::argument(what, format!("the state is of {kept} parameters, not {}", params.len())));
    }
    params.iter().zip(grads).try_for_each(|(x, g)| linalg::same(what, x, &[g]).map(drop))
}

/// What every optimiser keeps count of: steps, and the drift it measured after the last one.
#[derive(Clone, Debug, Default)]
pub(crate) struct Audit {
    pub(crate) steps: u64,
    error: Option<f64>,
}

impl Audit {
    /// After a step, given the drift of every parameter.
    pub(crate) fn stepped(&mut self, errors: &[f64]) {
        self.steps += 1;
        self.error = Some(linalg::largest(errors));
    }

    /// The drift after the last step; NaN before the first.
    pub(crate) fn error(&self) -> f64 {
        self.error.unwrap_or(f64::NAN)
    }

    /// A state to save: these tensors, the optimiser's name and constants, and the counters.
    pub(crate) fn state(&self, name: &str, tensors: BTreeMap<String, Tensor>, constants: &[(&str, f64)]) -> State {
        let own = [
            ("optimizer", name.into()),
            ("steps", self.steps.into()),
            ("orthogonality_error", self.error.map_or(serde_json::Value::Null, Into::into)),
        ];
        let constants = constants.iter().map(|&(k, v)| (k, v.into()));
        State { tensors, scalars: own.into_iter().chain(constants).map(|(k, v)| (k.to_string(), v)).collect() }
    }

    /// The counters of a saved state.
    ///
    /// # Errors
    /// A state of another optimiser, or saved with other constants.
    pub(crate) fn load(state: &State, name: &str, constants: &[(&str, f64)]) -> Result<Self> {
        let kind = state.text("optimizer")?;
        if kind != name {
            return Err(Error::argument("optimiser state", format!("expected that of {name}, got that of {kind}")));
        }
        for &(constant, ours) in constants {
            let saved = state.number(constant)?;
            if saved != ours {
                let message = format!("was saved with {constant} {saved}, this run has {ours}");
                return Err(Error::argument("optimiser state", message));
            }
        }
        Ok(Self { steps: state.number("steps")? as u64, error: state.number("orthogonality_error").ok() })
    }
}

/// An optimiser's memory: tensors by name, and JSON scalars by name.
#[derive(Clone, Debug, Default)]
pub struct State {
    /// Buffers, such as a velocity for every parameter.
    pub tensors: BTreeMap<String, Tensor>,
    /// Constants and counters. Numbers come back from a file to the same bits.
    pub scalars: BTreeMap<String, serde_json::Value>,
}

impl State {
    /// The key of the file's metadata that holds the scalars.
    const SCALARS: &'static str = "scalars";

    /// Writes a safetensors file, whole or not at all.
    ///
    /// # Errors
    /// [`Error::Io`]; a failing copy from a GPU.
    pub fn save(&self, path: &Path) -> Result<()> {
        let scalars = serde_json::to_string(&self.scalars).map_err(|e| Error::format(path, e))?;
        io::save_tensors(path, &self.tensors, &[(Self::SCALARS.to_string(), scalars)].into())
    }

    /// Reads what [`State::save`] wrote.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Format`] when the file is not a state.
    pub fn load(path: &Path) -> Result<Self> {
        let (tensors, metadata) = io::load_tensors(path)?;
        let text = metadata.get(Self::SCALARS).ok_or_else(|| Error::format(path, "not a saved optimiser state"))?;
        let scalars = serde_json::from_str(text).map_err(|e| Error::format(path, format!("metadata 'scalars': {e}")))?;
        Ok(Self { tensors, scalars })
    }

    /// A number by name.
    ///
    /// # Errors
    /// [`Error::Argument`] where the state has no such number.
    pub fn number(&self, name: &str) -> Result<f64> {
        self.scalars.get(name).and_then(serde_json::Value::as_f64).ok_or_else(|| self.missing("number", name))
    }

    /// A string by name.
    ///
    /// # Errors
    /// [`Error::Argument`] where the state has no such text.
    pub fn text(&self, name: &str) -> Result<&str> {
        self.scalars.get(name).and_then(serde_json::Value::as_str).ok_or_else(|| self.missing("string", name))
    }

    /// The tensors `prefix.0`, `prefix.1`, …
    pub fn list(&self, prefix: &str) -> Vec<Tensor> {
        (0..).map_while(|i| self.tensors.get(&format!("{prefix}.{i}")).cloned()).collect()
    }

    fn missing(&self, kind: &str, name: &str) -> Error {
        Error::argument("optimiser state", format!("no {kind} {name:?}; it has {:?}", self.scalars.keys().collect::<Vec<_>>()))
    }
}
