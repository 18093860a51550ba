//! What learned rotations are compared with: the other methods of the paper's table, and a control.
//!
//! * [`smooth_quant`]: scales in closed form, no rotation (Xiao et al. 2023, arXiv 2211.10438).
//! * [`llm_qat`]: weights trained through their quantisers on text that the model generated (Liu et al. 2023, arXiv 2305.17888).
//! * [`adapted`]: the model in full precision with nothing but its norms' gains trained, as rotations are. What it wins on a text is won by
//!   adapting to the text, and says nothing of quantisation.
//!
//! Each says the [`Training`] that it needed.

mod adapted;
mod qat;
mod smooth;
mod train;

pub use adapted::adapted;
pub use qat::{QatOptions, generated_text, llm_qat, qat_bytes};
pub use smooth::{Smooth, smooth_quant};

use std::time::Instant;

use crate::llama::Merged;

/// What a row of a table needed besides the model: nothing by default.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Training {
    /// Tokens read to learn, to search or to calibrate: every time that they are read.
    pub tokens: usize,
    /// Optimiser steps.
    pub steps: usize,
    /// Wall-clock time of that, scoring not included.
    pub seconds: f64,
}

impl Training {
    /// What was read without optimiser steps, since a moment.
    pub fn since(begun: Instant, tokens: usize) -> Self {
        Self { tokens, steps: 0, seconds: begun.elapsed().as_secs_f64() }
    }

    /// One after the other.
    #[must_use]
    pub fn and(self, then: Self) -> Self {
        Self { tokens: self.tokens + then.tokens, steps: self.steps + then.steps, seconds: self.seconds + then.seconds }
    }

    /// Of one of several alike: mean seconds, and tokens and steps of the first.
    pub fn mean(all: &[Self]) -> Self {
        let first = all.first().copied().unwrap_or_default();
        Self { seconds: all.iter().map(|t| t.seconds).sum::<f64>() / all.len().max(1) as f64, ..first }
    }
}

/// A network whose ordinary parameters were trained.
#[derive(Clone, Debug)]
pub struct Trained {
    /// Ready to run.
    pub network: Merged,
    /// What it took.
    pub training: Training,
    /// The loss of the first step and of the last.
    pub losses: (f64, f64),
}
