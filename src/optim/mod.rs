//! Optimisers of orthogonal matrices, and learning-rate schedules.
//!
//! Parameters are batches of square matrices, `[k, n, n]`: R1 as `[1, C, C]`, R2 as `[L, D, D]`. Every matrix of a batch is stepped
//! on its own.

mod cayley;
pub mod linalg;
mod schedule;

pub use cayley::{CayleySgd, Mode};
pub use schedule::Schedule;

use std::collections::BTreeMap;
use std::path::Path;

use crate::{Error, Result, Tensor, io};

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
    fn load_state(&mut self, state: State) -> Result<()>;

    /// max|RᵀR − I| over all parameters after the last step, where the optimiser audits it; NaN before the first step.
    fn orthogonality_error(&self) -> f64 {
        f64::NAN
    }
}

/// An optimiser by its name on the command line: `cayley`, or `cayley-parity` for the published code's arithmetic.
pub fn by_name(name: &str) -> Result<Box<dyn Optimizer>> {
    match name {
        "cayley" => Ok(Box::new(CayleySgd::new(Mode::Default))),
        "cayley-parity" => Ok(Box::new(CayleySgd::new(Mode::Parity))),
        _ => Err(Error::argument("optimizer", format!("expected cayley or cayley-parity, got {name:?}"))),
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
    pub fn save(&self, path: &Path) -> Result<()> {
        let scalars = serde_json::to_string(&self.scalars).map_err(|e| Error::format(path, e))?;
        io::save_tensors(path, &self.tensors, &[(Self::SCALARS.to_string(), scalars)].into())
    }

    /// Reads what [`State::save`] wrote.
    pub fn load(path: &Path) -> Result<Self> {
        let (tensors, metadata) = io::load_tensors(path)?;
        let text = metadata.get(Self::SCALARS).ok_or_else(|| Error::format(path, "not a saved optimiser state"))?;
        let scalars = serde_json::from_str(text).map_err(|e| Error::format(path, format!("metadata 'scalars': {e}")))?;
        Ok(Self { tensors, scalars })
    }

    /// A number by name.
    pub fn number(&self, name: &str) -> Result<f64> {
        self.scalars.get(name).and_then(serde_json::Value::as_f64).ok_or_else(|| self.missing("number", name))
    }

    /// A string by name.
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
