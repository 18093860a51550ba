//! Options of learning that go together by name.

use std::sync::Arc;

use spinquant::learn::{ClipChoice, LearnOptions};
use spinquant::objective::{self, CrossEntropy, Objective};
use spinquant::rotation::{Scale, Transforms};

/// A recipe by its name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Named {
    /// The paper's, and clip ratios searched by error.
    #[default]
    Default,
    /// The paper's: R1 and R2 by cross entropy, nothing clipped.
    Published,
    /// What stays nearest to the model in full precision, in benches/record/clips-smollm2-h100.md: its divergence is minimised, clip ratios and
    /// scales are learned too.
    Faithful,
}

impl Named {
    /// What is minimised.
    pub fn objective(self) -> Arc<dyn Objective> {
        match self {
            Self::Default | Self::Published => Arc::new(CrossEntropy),
            Self::Faithful => objective::by_name("kl").expect("an objective of this crate"),
        }
    }

    /// What is learned and leaves the full-precision network alone.
    pub fn transforms(self) -> Transforms {
        match self {
            Self::Default | Self::Published => Transforms::PUBLISHED,
            Self::Faithful => Transforms::new(&[Scale::UpDown, Scale::Values]),
        }
    }

    /// Where clip ratios come from; `None`: as without a recipe.
    pub fn clip(self) -> Option<ClipChoice> {
        match self {
            Self::Default => None,
            Self::Published => Some(ClipChoice::Keep),
            Self::Faithful => Some(ClipChoice::Learned),
        }
    }

    /// Learning rates of logarithms of scales and of clip ratios.
    pub fn rates(self) -> (f64, f64) {
        let LearnOptions { scale_rate, clip_rate, .. } = LearnOptions::default();
        match self {
            Self::Default | Self::Published => (scale_rate, clip_rate),
            Self::Faithful => (3e-2, 3e-2),
        }
    }
}
