//! What learning minimises: a scalar function of R1 and every R2, built on a tape from a batch of tokens.
//!
//! [`all`] lists those of this crate: [`CrossEntropy`], the paper's; divergences from the full-precision model, which cost one more
//! forward pass; the [`Reconstruction`] of its hidden states; and [`Local`] measures of rotated activations, which need a forward pass in full
//! precision and none back. The first two kinds can be mixed ([`Mixture`]), for they are functions of the network's [`Predictions`].
//!
//! To add one, inside the crate or outside: implement [`Objective`] and give it to
//! [`LearnOptions::objective`](crate::learn::LearnOptions::objective).
//!
//! ```
//! use spinquant::objective::{Batch, CrossEntropy, Kl, Objective};
//! use spinquant::{Result, Var, llama::RotationVars};
//!
//! /// Cross entropy plus a little of the divergence from the full-precision model.
//! #[derive(Debug)]
//! struct Both(f64);
//! impl Objective for Both {
//!     fn name(&self) -> String {
//!         format!("cross-entropy + {} kl", self.0)
//!     }
//!     fn loss<'t>(&self, rotations: &RotationVars<'t>, batch: &Batch<'_>) -> Result<Var<'t>> {
//!         CrossEntropy.loss(rotations, batch)?.add(Kl.loss(rotations, batch)?.scale(self.0)?)
//!     }
//! }
//! ```

mod kl_top;
mod local;
mod mixture;
mod predictions;
mod reconstruction;

pub use crate::ops::kl_top::Rest;
pub use kl_top::KlTop;
pub use local::Local;
pub use mixture::Mixture;
pub use predictions::Predictions;
use predictions::of_network;
pub use reconstruction::Reconstruction;

use std::fmt::Debug;
use std::sync::Arc;

use crate::llama::{Llama, Recompute, RotationVars};
use crate::memory::Needs;
use crate::ops::spread::Measure;
use crate::quant::{Online, Scheme};
use crate::{Error, Result, Tensor, Var};

/// What an objective is evaluated on: whole sequences of `seq` tokens, and the network as it is being learned.
#[derive(Clone, Copy, Debug)]
pub struct Batch<'a> {
    /// The frozen model.
    pub model: &'a Llama,
    /// Token ids, a multiple of `seq` of them.
    pub tokens: &'a [u32],
    /// Tokens of a sequence.
    pub seq: usize,
    /// What the network is quantised to.
    pub scheme: &'a Scheme,
    /// Memory against time.
    pub recompute: Recompute,
}

impl Batch<'_> {
    /// Logits `[tokens, V]` of the model in full precision, unrotated.
    ///
    /// # Errors
    /// Those of the network.
    pub fn teacher(&self) -> Result<Tensor> {
        self.model.merge_exact(None, &full_precision())?.logits(self.tokens, self.seq)
    }
}

/// Nothing quantised and nothing online: R3 would cancel.
fn full_precision() -> Scheme {
    Scheme::FULL_PRECISION.online(Online::NONE)
}

/// Something for [`learn`](crate::learn::learn) to minimise.
pub trait Objective: Debug + Send + Sync {
    /// What it is called on the command line, with any constants: runs of objectives of different names cannot resume one another.
    fn name(&self) -> String;

    /// What it is, in a few words, for help texts.
    fn about(&self) -> String {
        String::new()
    }

    /// The same with its constant read from text, as in `kl-top:50`; by default it has none.
    ///
    /// # Errors
    /// [`Error::Argument`]: a constant that is none.
    fn with(&self, constant: &str) -> Result<Arc<dyn Objective>> {
        Err(Error::argument("objective", format!("{} has no constant, got {constant:?}", self.name())))
    }

    /// The loss of a batch, a scalar whose gradients flow to the rotations. Micro-batches are averaged.
    ///
    /// # Errors
    /// Those of the network and of the operations that the loss is made of.
    fn loss<'t>(&self, rotations: &RotationVars<'t>, batch: &Batch<'_>) -> Result<Var<'t>>;

    /// The loss as a function of the network's predictions alone, where it is one: what a [`Mixture`] and networks that are learned otherwise
    /// than by rotations need.
    ///
    /// # Errors
    /// Those of the operations; an objective of something else, which is what it says unless overridden.
    fn of_predictions<'t>(&self, _: &Predictions<'t, '_>) -> Result<Var<'t>> {
        let message = format!("{} does not depend on the network's predictions alone", self.name());
        Err(Error::argument("objective", message))
    }

    /// Factor on the default learning rate of optimisers whose steps grow with the gradient.
    fn rate(&self) -> f64 {
        1.0
    }

    /// What it keeps in memory besides the model, which a step is planned by ([`memory::plan`](crate::memory::plan)); unless it says
    /// otherwise, what cross entropy keeps.
    fn needs(&self) -> Needs {
        Needs::Network
    }
}

/// Mean next-token cross entropy of the fake-quantised network.
#[derive(Clone, Copy, Debug, Default)]
pub struct CrossEntropy;

impl Objective for CrossEntropy {
    fn name(&self) -> String {
        "cross-entropy".into()
    }
    fn about(&self) -> String {
        "of the next token, as published".into()
    }
    fn loss<'t>(&self, rotations: &RotationVars<'t>, batch: &Batch<'_>) -> Result<Var<'t>> {
        batch.model.loss(rotations, batch.tokens, batch.seq, batch.scheme, batch.recompute)
    }
    fn of_predictions<'t>(&self, predictions: &Predictions<'t, '_>) -> Result<Var<'t>> {
        predictions.cross_entropy()
    }
}

/// Mean divergence, over all positions, of the fake-quantised network's next-token probabilities from the full-precision model's:
/// zero for a quantisation that does no harm, whatever the text.
#[derive(Clone, Copy, Debug, Default)]
pub struct Kl;

impl Objective for Kl {
    fn name(&self) -> String {
        "kl".into()
    }
    fn about(&self) -> String {
        "divergence from the full-precision model".into()
    }
    fn loss<'t>(&self, rotations: &RotationVars<'t>, batch: &Batch<'_>) -> Result<Var<'t>> {
        of_network(self, rotations, batch)
    }
    fn of_predictions<'t>(&self, predictions: &Predictions<'t, '_>) -> Result<Var<'t>> {
        let teacher = predictions.teacher()?;
        predictions.logits()?.kl_divergence(teacher)
    }
    fn rate(&self) -> f64 {
        6.5
    }
    fn needs(&self) -> Needs {
        Needs::Logits
    }
}

/// Every objective of this crate.
pub fn all() -> Vec<Arc<dyn Objective>> {
    vec![
        Arc::new(CrossEntropy),
        Arc::new(Kl),
        Arc::new(KlTop::default()),
        Arc::new(KlTop { rest: Rest::Partial, ..KlTop::default() }),
        Arc::new(KlTop { rest: Rest::Gathered, ..KlTop::default() }),
        Arc::new(Reconstruction),
        Arc::new(Local(Measure::Whip)),
        Arc::new(Local(Measure::Kurtosis)),
    ]
}

/// An objective by its name on the command line: one of [`all`], perhaps with a constant ([`Objective::with`]) behind a colon; or a
/// [`Mixture`] of them, `W*NAME+W*NAME`.
///
/// # Errors
/// Any other name: lists them all. A constant that the objective refuses; those of [`Mixture::new`].
pub fn by_name(name: &str) -> Result<Arc<dyn Objective>> {
    if name.contains(['+', '*']) {
        return Ok(Arc::new(Mixture::parse(name)?));
    }
    let (known, constant) = name.split_once(':').map_or((name, None), |(known, constant)| (known, Some(constant)));
    let Some(found) = all().into_iter().find(|o| o.name() == known) else {
        let names: Vec<String> = all().iter().map(|o| o.name()).collect();
        return Err(Error::argument("objective", format!("expected one of {}, got {name:?}", names.join(", "))));
    };
    constant.map_or(Ok(found.clone()), |constant| found.with(constant))
}
