//! What a network says of every token of a prompt: its log-probability, and the likeliest token in its place.

use rayon::prelude::*;

use super::tokens_at_once;
use crate::llama::{Merged, Packed};
use crate::{DType, Device, Error, Result};

/// Logits that exist at once: 64 MiB of f32.
const LOGITS: usize = 1 << 24;

/// The prediction of one token from all before it, log-probabilities in nats.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TokenScore {
    /// Log-probability of the token that stands there: of the likeliest one behind the prompt's end.
    pub log_probability: f32,
    /// The likeliest token; the first of equal ones.
    pub likeliest: u32,
    /// Its log-probability, equal to [`TokenScore::log_probability`] where it is the token that stands there.
    pub likeliest_log_probability: f32,
}

/// Scores prompts. Entry `i` of an answer is the prediction of token `i + 1` of its prompt, so the first token is not scored, and the last
/// entry is that of the token that follows the prompt: as many entries as tokens.
///
/// Prompts go through the network together, without padding; logits are made a few rows at a time. From a GPU they are copied to the host.
///
/// # Errors
/// A prompt without tokens, or with one outside the vocabulary; [`Error::Numeric`] where logits are not finite; those of the network.
pub fn token_scores(model: &Merged, prompts: &[&[u32]]) -> Result<Vec<Vec<TokenScore>>> {
    for (i, prompt) in prompts.iter().enumerate() {
        let vocabulary = model.config.vocab_size;
        if prompt.is_empty() {
            return Err(Error::argument(format!("prompt {i}"), "expected at least one token, got none"));
        }
        if let Some(token) = prompt.iter().find(|token| **token as usize >= vocabulary) {
            return Err(Error::argument(format!("prompt {i}"), format!("expected tokens below {vocabulary}, got {token}")));
        }
    }
    let mut answers = Vec::with_capacity(prompts.len());
    let mut rest = prompts;
    while !rest.is_empty() {
        let (now, later) = rest.split_at(at_once(model, rest.iter().map(|prompt| prompt.len())));
        answers.extend(together(model, now)?);
        rest = later;
    }
    Ok(answers)
}

/// How many of the first prompts, of these lengths, go through the network together: at least one.
pub(crate) fn at_once(model: &Merged, lengths: impl Iterator<Item = usize>) -> usize {
    let mut room = tokens_at_once(&model.embedding.device());
    let fits = |length: &usize| {
        let fits = *length <= room;
        room = room.saturating_sub(*length);
        fits
    };
    lengths.take_while(fits).count().max(1)
}

fn together(model: &Merged, prompts: &[&[u32]]) -> Result<Vec<Vec<TokenScore>>> {
    let mut packed = Packed::default();
    for prompt in prompts {
        packed.push(prompt);
    }
    // The token that follows each one, none behind an end.
    let next = |prompt: &&[u32]| prompt[1..].iter().copied().map(Some).chain([None]).collect::<Vec<_>>();
    let targets: Vec<Option<u32>> = prompts.iter().flat_map(next).collect();
    let vocabulary = model.config.vocab_size;
    let mut scores: Vec<TokenScore> = Vec::with_capacity(targets.len());
    model.packed_logits(&packed, (LOGITS / vocabulary).max(1), |logits| {
        let logits = logits.to_device(&Device::Cpu)?;
        // Sums in f32 would round away what the comparison of answers needs.
        let logits = if logits.dtype() == DType::F64 { logits } else { logits.to_dtype(DType::F32)? };
        let targets = &targets[scores.len()..][..logits.rows()];
        let part: Vec<TokenScore> = match logits.dtype() {
            DType::F64 => logits.as_slice::<f64>()?.par_chunks(vocabulary).zip(targets).map(|(x, t)| score(x, *t)).collect(),
            _ => logits.as_slice::<f32>()?.par_chunks(vocabulary).zip(targets).map(|(x, t)| score(x, *t)).collect(),
        };
        scores.extend(part);
        Ok(())
    })?;
    if let Some(at) = scores.iter().position(|s| !s.log_probability.is_finite() || !s.likeliest_log_probability.is_finite()) {
        return Err(Error::numeric(
            "evaluation",
            format!("the log-probabilities of row {at} of {} are not finite", scores.len()),
        ));
    }
    let mut scores = scores.into_iter();
    Ok(prompts.iter().map(|prompt| scores.by_ref().take(prompt.len()).collect()).collect())
}

/// Log-softmax of one row at two places. Exponentials in the row's type, their sum in f64.
fn score<T>(logits: &[T], target: Option<u32>) -> TokenScore
where
    T: Exp + Copy + Into<f64> + PartialOrd + std::ops::Sub<Output = T>,
{
    let mut likeliest = 0;
    for (i, x) in logits.iter().enumerate() {
        if *x > logits[likeliest] {
            likeliest = i;
        }
    }
    let top = logits[likeliest];
    // Eight sums that do not wait for one another.
    let mut sums = [0.0; 8];
    for part in logits.chunks(8) {
        part.iter().zip(&mut sums).for_each(|(x, sum)| *sum += (*x - top).exp_wide());
    }
    let log_sum = sums.iter().sum::<f64>().ln();
    let at = |i: usize| (logits[i].into() - top.into() - log_sum) as f32;
    let likeliest_log_probability = at(likeliest);
    let log_probability = target.map_or(likeliest_log_probability, |t| at(t as usize));
    TokenScore { log_probability, likeliest: likeliest as u32, likeliest_log_probability }
}

/// An exponential in the type's own precision, as f64.
trait Exp {
    fn exp_wide(self) -> f64;
}

impl Exp for f32 {
    fn exp_wide(self) -> f64 {
        f64::from(self.exp())
    }
}

impl Exp for f64 {
    fn exp_wide(self) -> f64 {
        self.exp()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::Scheme;
    use crate::{DType, demo};

    #[test]
    fn one_row() {
        let want = |x: f64| (x - (1f64.exp() + 3f64.exp() + 2.5f64.exp()).ln()) as f32;
        let got = score(&[1.0f64, 3.0, 2.5], Some(0));
        assert_eq!((got.log_probability, got.likeliest, got.likeliest_log_probability), (want(1.0), 1, want(3.0)));
        let behind = score(&[1.0f32, 3.0, 3.0], None);
        assert_eq!((behind.likeliest, behind.log_probability), (1, behind.likeliest_log_probability)); // the first of equal ones
        assert_eq!(score(&[1e4f32, -1e4], Some(1)).log_probability, -2e4);
    }

    #[test]
    fn scores_are_those_of_the_losses() {
        let windows = demo::windows(demo::TEST, 64).unwrap();
        // More than one batch, lengths from 1.
        let prompts: Vec<&[u32]> = (0..150).map(|i| &windows.get(i)[..1 + i * 7 % 64]).collect();
        let model = demo::model_in(DType::F64).unwrap();
        // In f64 attention of packed prompts and of one give the same codes. Not of activations and cache at once: a mixture of few
        // values of 4 bits can reach equally far on both sides of 0, and its zero point is then an exact tie.
        for scheme in [Scheme::new(16, 4, 16), Scheme::new(16, 16, 4)] {
            let merged = model.merge(None, &scheme).unwrap();
            let answers = token_scores(&merged, &prompts).unwrap();
            assert_eq!(answers.len(), prompts.len());
            for (prompt, scores) in prompts.iter().zip(&answers) {
                assert_eq!(scores.len(), prompt.len());
                let losses = merged.token_losses(prompt, prompt.len()).unwrap();
                let logits = merged.logits(prompt, prompt.len()).unwrap();
                for (i, score) in scores.iter().enumerate() {
                    let row = &logits.as_slice::<f64>().unwrap()[i * merged.config.vocab_size..][..merged.config.vocab_size];
                    assert!(row.iter().all(|x| *x <= row[score.likeliest as usize] + 1e-4), "{i}");
                    if let Some(&token) = prompt.get(i + 1) {
                        let got = f64::from(score.log_probability);
                        assert!((got + losses[i]).abs() < 1e-4 * losses[i].max(1.0), "{i}: {got} {}", losses[i]);
                        let greedy = score.log_probability == score.likeliest_log_probability;
                        assert!(score.likeliest != token || greedy, "{i}");
                        assert!(score.log_probability <= score.likeliest_log_probability, "{i}");
                    } else {
                        assert_eq!(score.log_probability, score.likeliest_log_probability);
                    }
                }
            }
        }
        let merged = model.merge(None, &Scheme::FULL_PRECISION).unwrap();
        assert!(token_scores(&merged, &[&[]]).is_err() && token_scores(&merged, &[&[merged.config.vocab_size as u32]]).is_err());
    }
}
