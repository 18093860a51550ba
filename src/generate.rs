//! Text from a network: which token follows, and where a text ends.

use std::ops::ControlFlow;
use std::path::Path;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use serde_json::Value;

use crate::llama::{Decoder, LlamaConfig, Merged};
use crate::{Error, Result, io};

/// How the next token is chosen from its logits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// Logits are divided by it; 0 takes the largest one, the first of equal ones.
    pub temperature: f64,
    /// Only so many of the likeliest tokens; 0: all.
    pub top_k: usize,
    /// Only the likeliest tokens that together have this probability, the one that reaches it included (nucleus sampling, Holtzman et
    /// al. 2020): above 0, at most 1.
    pub top_p: f64,
    /// Seed of the draws.
    pub seed: u64,
}

impl Sampling {
    /// The likeliest token, always.
    pub const GREEDY: Self = Self { temperature: 0.0, top_k: 0, top_p: 1.0, seed: 0 };

    /// Checks what the fields promise.
    ///
    /// # Errors
    /// The field that is out of range.
    pub fn check(&self) -> Result<()> {
        if !(self.temperature >= 0.0 && self.temperature.is_finite()) {
            return Err(Error::argument("temperature", format!("expected 0 or more, got {}", self.temperature)));
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return Err(Error::argument("top-p", format!("expected more than 0 and at most 1, got {}", self.top_p)));
        }
        Ok(())
    }

    /// A token of logits, none of which is NaN.
    fn choose(&self, logits: &[f64], random: &mut ChaCha8Rng) -> u32 {
        let largest = |best: usize, i: usize| if logits[i] > logits[best] { i } else { best };
        if self.temperature == 0.0 {
            return (0..logits.len()).fold(0, largest) as u32;
        }
        let mut order: Vec<usize> = (0..logits.len()).collect();
        order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
        order.truncate(if self.top_k == 0 { order.len() } else { self.top_k });
        let first = logits[order[0]];
        let mut weights: Vec<f64> = order.iter().map(|&i| ((logits[i] - first) / self.temperature).exp()).collect();
        let (all, mut sum) = (weights.iter().sum::<f64>(), 0.0);
        let enough = weights.iter().position(|w| {
            sum += w;
            sum >= self.top_p * all
        });
        weights.truncate(enough.map_or(weights.len(), |last| last + 1));
        let mut rest = random.random::<f64>() * weights.iter().sum::<f64>();
        let drawn = weights.iter().position(|w| {
            rest -= w;
            rest < 0.0
        });
        order[drawn.unwrap_or(weights.len() - 1)] as u32
    }
}

/// Continues `prompt` by at most `count` tokens, and shows each to `each` at once. A token of `ends` is the last, and is not shown.
///
/// # Errors
/// No prompt, or one that is longer than the model's context together with `count`; sampling out of range; logits that are NaN; those of
/// the network. [`Error::Interrupted`] with the number of tokens where `each` breaks.
pub fn generate(
    model: &Merged,
    prompt: &[u32],
    count: usize,
    sampling: &Sampling,
    ends: &[u32],
    mut each: impl FnMut(u32) -> Result<ControlFlow<()>>,
) -> Result<usize> {
    sampling.check()?;
    check_room(prompt.len(), count, model.config.max_position_embeddings)?;
    let mut random = ChaCha8Rng::seed_from_u64(sampling.seed);
    let mut decoder = Decoder::new(model, prompt.len() + count)?;
    let mut next = prompt.to_vec();
    for made in 0..count {
        let logits = decoder.feed(&next)?.to_f64_vec()?;
        if logits.iter().any(|l| l.is_nan()) {
            return Err(Error::numeric("generation", format!("a logit behind {} tokens is NaN", decoder.read())));
        }
        let token = sampling.choose(&logits, &mut random);
        if ends.contains(&token) {
            return Ok(made);
        }
        if each(token)?.is_break() {
            return Err(Error::Interrupted { step: made + 1 });
        }
        next = vec![token];
    }
    Ok(count)
}

/// Checks that a prompt of so many tokens and `count` more fit into a model's context.
///
/// # Errors
/// [`Error::Argument`]: no token; more than fit, with how many.
pub fn check_room(prompt: usize, count: usize, context: usize) -> Result<()> {
    let message = match context.saturating_sub(prompt) {
        _ if prompt == 0 => "expected at least a token, got none".into(),
        0 => format!("expected fewer tokens than the model's context of {context}, got {prompt}: none more fits"),
        room if count > room => {
            format!(
                "its {prompt} tokens leave room for {room} more in the model's context of {context}, and {count} are asked for"
            )
        }
        _ => return Ok(()),
    };
    Err(Error::argument("prompt", message))
}

/// The tokens that end a text: those of `generation_config.json` where that names some, else those of the configuration.
///
/// # Errors
/// [`Error::Io`] or [`Error::Format`] for a file that cannot be read.
pub fn end_tokens(dir: impl AsRef<Path>, config: &LlamaConfig) -> Result<Vec<u32>> {
    let path = dir.as_ref().join("generation_config.json");
    let json: Value = match std::fs::read(&path) {
        Ok(bytes) => {
            serde_json::from_slice(&bytes).map_err(|e| Error::format(&path, format!("expected JSON: {}", io::short(e))))?
        }
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(config.eos_token_ids.clone()),
        Err(e) => return Err(Error::io(&path)(e)),
    };
    let id = |value: &Value| {
        let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
        id.ok_or_else(|| Error::format(&path, format!("eos_token_id: expected a token id or a list of them, got {value}")))
    };
    match &json["eos_token_id"] {
        Value::Null => Ok(config.eos_token_ids.clone()),
        Value::Array(ids) => ids.iter().map(id).collect(),
        one => Ok(vec![id(one)?]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::demo;
    use crate::quant::Scheme;

    #[test]
    fn what_has_no_room_says_so() {
        let says = |prompt, count| check_room(prompt, count, 8).map_err(|e| e.to_string());
        assert!(says(1, 7).is_ok() && says(7, 1).is_ok() && says(7, 0).is_ok());
        for (prompt, count, part) in [
            (0, 1, "at least a token, got none"),
            (8, 1, "fewer tokens than the model's context of 8, got 8: none more fits"),
            (9, 1, "got 9: none more fits"),
            (6, 3, "its 6 tokens leave room for 2 more in the model's context of 8, and 3 are asked for"),
        ] {
            let message = says(prompt, count).unwrap_err();
            assert!(message.contains(part), "{message}");
        }
    }

    fn draws(sampling: Sampling, logits: &[f64]) -> Vec<usize> {
        let mut random = ChaCha8Rng::seed_from_u64(1);
        let mut counts = vec![0; logits.len()];
        (0..20_000).for_each(|_| counts[sampling.choose(logits, &mut random) as usize] += 1);
        counts
    }

    #[test]
    fn choices_have_their_probabilities() {
        // Probabilities 0.5, 0.3, 0.2 out of order.
        let logits = [0.3f64.ln(), 0.5f64.ln(), 0.2f64.ln()];
        let near = |got: &[usize], want: [f64; 3]| {
            for (got, want) in got.iter().zip(want) {
                let deviation = (want * (1.0 - want) / 20_000.0).sqrt();
                assert!((*got as f64 / 20_000.0 - want).abs() <= 4.0 * deviation, "{got} {want}");
            }
        };
        let plain = Sampling { temperature: 1.0, ..Sampling::GREEDY };
        near(&draws(plain, &logits), [0.3, 0.5, 0.2]);
        near(&draws(Sampling { top_k: 2, ..plain }, &logits), [0.375, 0.625, 0.0]);
        near(&draws(Sampling { top_p: 0.6, ..plain }, &logits), [0.375, 0.625, 0.0]);
        near(&draws(Sampling { top_p: 0.4, ..plain }, &logits), [0.0, 1.0, 0.0]);
        // The square root of the probabilities, normalised.
        let roots = [0.3f64, 0.5, 0.2].map(f64::sqrt);
        let sum: f64 = roots.iter().sum();
        near(&draws(Sampling { temperature: 2.0, ..plain }, &logits), roots.map(|r| r / sum));
        assert_eq!(draws(Sampling::GREEDY, &[1.0, 3.0, 3.0]), [0, 20_000, 0]);
        for bad in [Sampling { temperature: -1.0, ..plain }, Sampling { top_p: 0.0, ..plain }, Sampling { top_p: 1.1, ..plain }] {
            assert!(bad.check().is_err(), "{bad:?}");
        }
        assert!(Sampling { temperature: f64::NAN, ..plain }.check().is_err());
    }

    #[test]
    fn ends_of_a_text() {
        let config = demo::config().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let with = |text: &str| {
            std::fs::write(dir.path().join("generation_config.json"), text).unwrap();
            end_tokens(dir.path(), &config)
        };
        assert_eq!(end_tokens(dir.path(), &config).unwrap(), config.eos_token_ids);
        assert_eq!(with("{}").unwrap(), config.eos_token_ids);
        assert_eq!(with(r#"{"eos_token_id": 7}"#).unwrap(), [7]);
        assert_eq!(with(r#"{"eos_token_id": [7, 9]}"#).unwrap(), [7, 9]);
        assert!(with(r#"{"eos_token_id": "</s>"}"#).unwrap_err().to_string().contains("expected a token id"));
        assert!(with("[").unwrap_err().to_string().contains("generation_config.json"));
    }

    #[test]
    fn greedy_text_is_what_the_whole_network_says() {
        let merged = demo::model().unwrap().merge(None, &Scheme::FULL_PRECISION).unwrap();
        let prompt = demo::windows(demo::TEST, 16).unwrap().get(0).to_vec();
        let mut text = vec![];
        let go = |_: u32| Ok(ControlFlow::Continue(()));
        let keep = |text: &mut Vec<u32>, token| {
            text.push(token);
            Ok(ControlFlow::Continue(()))
        };
        let made = generate(&merged, &prompt, 20, &Sampling::GREEDY, &[], |token| keep(&mut text, token)).unwrap();
        assert_eq!((made, text.len()), (20, 20));
        let whole = [&prompt[..], &text].concat();
        let logits = merged.logits(&whole, whole.len()).unwrap();
        for (i, token) in text.iter().enumerate() {
            let row = logits.index(prompt.len() + i - 1).unwrap().to_f64_vec().unwrap();
            let best = row.iter().fold(f64::NEG_INFINITY, |m, x| m.max(*x));
            assert!(row[*token as usize] >= best - 1e-4, "token {i}");
        }
        // The same seed, the same text; an end that is met; nothing to begin with; too long.
        let sampling = Sampling { temperature: 1.0, seed: 3, ..Sampling::GREEDY };
        let draw = || {
            let mut text = vec![];
            generate(&merged, &prompt, 12, &sampling, &[], |token| keep(&mut text, token)).unwrap();
            text
        };
        assert_eq!(draw(), draw());
        let end = text.iter().position(|t| *t == text[2]).unwrap();
        assert_eq!(generate(&merged, &prompt, 20, &Sampling::GREEDY, &[text[2]], go).unwrap(), end);
        assert!(generate(&merged, &[], 1, &Sampling::GREEDY, &[], go).is_err());
        let long = merged.config.max_position_embeddings;
        assert!(generate(&merged, &prompt, long, &Sampling::GREEDY, &[], go).is_err());
        let stop = |_: u32| Ok(ControlFlow::Break(()));
        assert!(matches!(generate(&merged, &prompt, 9, &Sampling::GREEDY, &[], stop), Err(Error::Interrupted { step: 1 })));
    }
}
