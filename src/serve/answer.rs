//! Scores in the form of OpenAI's completions.

use std::collections::BTreeMap;

use serde::Serialize;

use super::{Completion, Prompts, Refusal};
use crate::data::Tokenizer;
use crate::eval::scores::TokenScore;

/// How tokens are written.
pub(super) struct Words<'a> {
    pub(super) tokenizer: Option<&'a Tokenizer>,
}

impl Words<'_> {
    /// A token as the vocabulary writes it, which tells tokens apart whose text alone would not.
    fn token(&self, id: u32) -> String {
        self.tokenizer.and_then(|t| t.token(id)).unwrap_or_else(|| format!("token_id:{id}"))
    }

    fn text(&self, ids: &[u32]) -> Result<String, Refusal> {
        Ok(self.tokenizer.map_or_else(|| Ok(String::new()), |t| t.decode(ids, true))?)
    }
}

#[derive(Serialize)]
struct Choice {
    index: usize,
    text: String,
    logprobs: Option<LogProbs>,
    finish_reason: &'static str,
}

/// Each list has an entry a token, of the prompt and then of the one behind it.
#[derive(Default, Serialize)]
struct LogProbs {
    tokens: Vec<String>,
    token_logprobs: Vec<Option<f32>>,
    top_logprobs: Vec<Option<BTreeMap<String, f32>>>,
}

#[derive(Serialize)]
struct Answer<'a> {
    id: &'static str,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: Vec<Choice>,
    usage: BTreeMap<&'static str, usize>,
}

/// The body of the answer: a choice a prompt, in order.
pub(super) fn completions(
    model: &str,
    completion: &Completion,
    words: &Words<'_>,
    prompts: &[Vec<u32>],
    scores: &[Vec<TokenScore>],
) -> Result<Vec<u8>, Refusal> {
    let mut choices = vec![];
    for (index, (prompt, scores)) in prompts.iter().zip(scores).enumerate() {
        // What stands at each place: the prompt, and the likeliest token behind it.
        let next = scores.last().filter(|_| completion.next).map(|score| score.likeliest);
        let ids: Vec<u32> = prompt.iter().copied().chain(next).collect();
        let text = match &completion.prompts {
            Prompts::Text(texts) => texts[index].clone() + &words.text(&ids[prompt.len()..])?,
            Prompts::Tokens(_) => words.text(&ids)?,
        };
        let logprobs = completion.logprobs.map(|most| log_probs(words, &ids, scores, most));
        choices.push(Choice { index, text, logprobs, finish_reason: "length" });
    }
    let read: usize = prompts.iter().map(Vec::len).sum();
    let made = if completion.next { prompts.len() } else { 0 };
    let usage = [("prompt_tokens", read), ("completion_tokens", made), ("total_tokens", read + made)].into();
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let created = now.map_or(0, |time| time.as_secs());
    let answer = Answer { id: "cmpl-0", object: "text_completion", created, model, choices, usage };
    serde_json::to_vec(&answer).map_err(|e| Refusal::new(500, None, format!("no JSON can be made of the answer: {e}")))
}

/// The log-probabilities of `ids`: none for the first, which nothing predicts.
fn log_probs(words: &Words<'_>, ids: &[u32], scores: &[TokenScore], most: u8) -> LogProbs {
    let mut all = LogProbs { tokens: vec![words.token(ids[0])], token_logprobs: vec![None], top_logprobs: vec![None] };
    for (&id, score) in ids[1..].iter().zip(scores) {
        let token = words.token(id);
        let mut top: BTreeMap<String, f32> = [(token.clone(), score.log_probability)].into();
        if most > 0 && score.likeliest != id {
            let mut likeliest = words.token(score.likeliest);
            if likeliest == token {
                likeliest += &format!(" (token_id:{})", score.likeliest);
            }
            top.insert(likeliest, score.likeliest_log_probability);
        }
        all.tokens.push(token);
        all.token_logprobs.push(Some(score.log_probability));
        all.top_logprobs.push(Some(top));
    }
    all
}
