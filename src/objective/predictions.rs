//! What a network predicts of a batch: all that cross entropy and divergences depend on.

use std::sync::Arc;

use crate::llama::RotationVars;
use crate::memory::Needs;
use crate::objective::{Batch, Objective};
use crate::profile::enter;
use crate::{Error, Result, Tensor, Var, data};

/// The predictions of a network, whatever it is learned by.
#[derive(Clone)]
pub struct Predictions<'t, 'a> {
    /// What the head reads, `[tokens, C]`.
    pub hidden: Var<'t>,
    /// `[V, C]`, a constant unless it is learned.
    pub head: Var<'t>,
    /// Token ids, whole sequences of `seq`.
    pub tokens: &'a [u32],
    /// Tokens of a sequence.
    pub seq: usize,
    /// Logits `[tokens, V]` of the full-precision model, for objectives that need them ([`Needs::Logits`]).
    pub teacher: Option<Tensor>,
}

impl<'t> Predictions<'t, '_> {
    /// Logits `[tokens, V]`.
    ///
    /// # Errors
    /// A head of another size.
    pub fn logits(&self) -> Result<Var<'t>> {
        self.hidden.clone().linear(self.head.clone())
    }

    /// Mean cross entropy of the next token; few logits exist at a time.
    ///
    /// # Errors
    /// A head of another size; a token outside the vocabulary.
    pub fn cross_entropy(&self) -> Result<Var<'t>> {
        let _part = enter("head");
        self.hidden.clone().linear_cross_entropy(self.head.clone(), data::targets(self.tokens, self.seq).into())
    }

    /// The teacher's logits.
    ///
    /// # Errors
    /// There are none.
    pub fn teacher(&self) -> Result<Tensor> {
        let missing = || Error::argument("objective", "expected the logits of the full-precision model, got none");
        self.teacher.clone().ok_or_else(missing)
    }
}

/// The loss of a batch by its predictions. The full-precision model runs first, where it is needed: nothing of the other network is kept yet.
pub(super) fn of_network<'t>(objective: &dyn Objective, rotations: &RotationVars<'t>, batch: &Batch<'_>) -> Result<Var<'t>> {
    let teacher = if objective.needs() == Needs::Logits { Some(batch.teacher()?) } else { None };
    let Batch { model, tokens, seq, scheme, recompute } = *batch;
    let hidden = model.hidden(rotations, tokens, Arc::new(model.run(scheme, seq)?), recompute)?;
    let head = rotations.r1.tape().constant(model.head.clone());
    objective.of_predictions(&Predictions { hidden, head, tokens, seq, teacher })
}
