//! What networks are scored on, and what they scored.

use crate::baselines::Training;
use crate::data::Windows;
use crate::eval::exam::Exam;
use crate::eval::fidelity::{self, Fidelity};
use crate::eval::marks::Marks;
use crate::eval::perplexity_among;
use crate::learn::Watch;
use crate::llama::Merged;
use crate::quant::Scheme;
use crate::ranks::Group;
use crate::{Error, Result};

/// What a network scored, or several on average.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Judged {
    /// Perplexity on the text.
    pub perplexity: f64,
    /// Fidelity on the text to the model in full precision, where that was at hand.
    pub fidelity: Option<Fidelity>,
    /// The same on text of another kind.
    pub other: Option<Fidelity>,
    /// The marks of every task of the exam; none without one.
    pub marks: Vec<Marks>,
}

impl Judged {
    /// The mean of several networks' perplexities, and of their fidelities window by window and marks question by question.
    ///
    /// # Errors
    /// No network; networks that read different windows or were asked different questions.
    pub fn mean(all: &[Self]) -> Result<Self> {
        if all.is_empty() {
            return Err(Error::argument("scores", "expected those of at least one network, got none"));
        }
        let perplexity = all.iter().map(|j| j.perplexity).sum::<f64>() / all.len() as f64;
        let tasks = all.iter().map(|j| j.marks.len()).min().unwrap_or(0);
        let task = |t: usize| Marks::mean(&all.iter().map(|j| j.marks[t].clone()).collect::<Vec<_>>());
        let fidelity = |of: fn(&Self) -> &Option<Fidelity>| -> Result<Option<Fidelity>> {
            let known: Option<Vec<Fidelity>> = all.iter().map(|j| of(j).clone()).collect();
            known.map(|known| Fidelity::mean(&known)).transpose()
        };
        let (fidelity, other) = (fidelity(|j| &j.fidelity)?, fidelity(|j| &j.other)?);
        Ok(Self { perplexity, fidelity, other, marks: (0..tasks).map(task).collect::<Result<_>>()? })
    }
}

/// What networks are scored on.
#[derive(Clone, Copy, Debug)]
pub struct Test<'a> {
    /// Text, for perplexity and fidelity.
    pub text: &'a Windows,
    /// Text of another kind, for fidelity.
    pub other: Option<&'a Windows>,
    /// Tasks.
    pub exam: Option<&'a Exam>,
    /// The processes that share the windows of the texts; all of them judge the same networks, and answer all questions.
    pub ranks: &'a Group,
}

impl<'a> Test<'a> {
    /// A text alone.
    pub fn on(text: &'a Windows) -> Self {
        Self { text, other: None, exam: None, ranks: Group::nobody() }
    }
}

/// One line of the table.
#[derive(Clone, Debug)]
pub struct Row {
    /// What it is called.
    pub name: String,
    /// What the network is quantised to.
    pub scheme: Scheme,
    /// Which rotations, in words.
    pub rotations: String,
    /// How weights are quantised: `full`, `rtn`, `qat`, or a [`Correction`](crate::quant::Correction): `gptq`, `gptaq:0.25`, ….
    pub weights: String,
    /// What it took besides the model; of several seeds, on average.
    pub training: Training,
    /// Its scores.
    pub judged: Judged,
}

/// Perplexity, fidelity to `full` (the model in full precision) where that is given, and marks, told to a watch.
///
/// # Errors
/// Those of [`perplexity_among`] and [`Exam::take`].
pub fn judge(
    network: &Merged,
    full: Option<&Merged>,
    Test { text, other, exam, ranks }: Test<'_>,
    watch: &mut dyn Watch,
    what: &str,
) -> Result<Judged> {
    watch.begin(what, text.len());
    let (score, fidelity) = perplexity_among(ranks, network, full, text, |done| watch.at(done))?;
    let other = match (full, other) {
        (Some(full), Some(other)) => {
            watch.begin(&format!("{what}, other text"), other.len());
            Some(fidelity::fidelity_among(ranks, network, full, other, |done| watch.at(done))?)
        }
        _ => None,
    };
    let marks = match exam {
        Some(exam) => {
            watch.begin(&format!("{what}, answers"), exam.requests().len());
            exam.take(network, |done| watch.at(done))?
        }
        None => vec![],
    };
    Ok(Judged { perplexity: score.perplexity, fidelity, other, marks })
}
