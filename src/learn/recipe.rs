//! Options of learning that go together, by name.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use super::{ClipChoice, LearnOptions, WeightClip};
use crate::objective::{CrossEntropy, Kl};
use crate::quant::{Clip, Scheme};
use crate::rotation::{Scale, Transforms};
use crate::{Error, Result};

/// What is learned, by which objective and how fast.
///
/// ```
/// use spinquant::{learn::Recipe, quant::Scheme};
/// let recipe: Recipe = "faithful".parse()?;
/// assert_eq!(recipe, Recipe::default());
/// let options = recipe.options(Scheme::new(4, 4, 4));
/// assert_eq!(options.objective.name(), "kl");
/// # Ok::<(), spinquant::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Recipe {
    /// What stays nearest to the model in full precision, on text of any kind: its divergence is minimised; scales, rotary pairs and clip
    /// ratios are learned with the rotations. What `spinquant learn` does.
    #[default]
    Faithful,
    /// The same by cross entropy: the lowest perplexity on text of the kind that is learned on, part of which is adaptation to it.
    Perplexity,
    /// The paper's (arXiv 2405.16406): R1 and R2 by cross entropy, nothing clipped.
    Published,
}

impl Recipe {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Faithful, Self::Perplexity, Self::Published];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Faithful => "faithful",
            Self::Perplexity => "perplexity",
            Self::Published => "published",
        }
    }

    /// What it is, in a few words, for help texts.
    pub fn about(self) -> &'static str {
        match self {
            Self::Faithful => {
                "nearest to the model in full precision: by its divergence, with scales, rotary pairs and clip ratios"
            }
            Self::Perplexity => {
                "the same by cross entropy: lowest perplexity on text of that kind, part of which is adaptation to it"
            }
            Self::Published => "the paper's: R1 and R2 by cross entropy, nothing clipped",
        }
    }

    /// The recipe for a scheme. Clip ratios of weights are learned where the scheme searches some, and kept where it does not.
    pub fn options(self, scheme: Scheme) -> LearnOptions {
        let published =
            LearnOptions { scheme, clip: ClipChoice::Keep, transforms: Transforms::PUBLISHED, ..LearnOptions::default() };
        let transforms = Transforms::new(&[Scale::UpDown, Scale::Values, Scale::RopePairs]).with_heads(true).where_possible();
        // What is told to keep the whole range of weights keeps it.
        let searches = scheme.weight_bits < 16 && scheme.weight_clip == Clip::Search;
        let weight_clip = if searches { WeightClip::Learned } else { WeightClip::Search };
        // Ratios are learned of integer grids.
        let clip = if scheme.activation_format.is_some() { ClipChoice::Keep } else { ClipChoice::Learned };
        let learned =
            LearnOptions { clip, weight_clip, steps: 300, transforms, scale_rate: 1e-2, clip_rate: 3e-2, ..published.clone() };
        match self {
            Self::Faithful => LearnOptions { objective: Arc::new(Kl), ..learned },
            Self::Perplexity => LearnOptions { objective: Arc::new(CrossEntropy), ..learned },
            Self::Published => published,
        }
    }
}

impl fmt::Display for Recipe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Recipe {
    type Err = Error;
    fn from_str(s: &str) -> Result<Self> {
        Self::ALL
            .into_iter()
            .find(|recipe| recipe.name() == s)
            .ok_or_else(|| Error::argument("recipe", format!("expected {}, got {s:?}", Self::ALL.map(Self::name).join(", "))))
    }
}
