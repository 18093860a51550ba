//! Multiple choice: how likely a model finds every candidate answer, and how often the likeliest one is right.
//!
//! The protocol is that of lm-evaluation-harness 0.4.13 (`lm_eval/api/model.py`, `lm_eval/api/task.py`), zero-shot. Three steps:
//! [`requests`] encodes questions, [`log_likelihoods`] asks a model, [`Marks::of`](super::marks::Marks::of) counts. Likelihoods of another
//! model go into the third.

use std::ops::ControlFlow;

use super::tasks::Question;
use super::tokens_at_once;
use crate::data::{Bos, Tokenizer};
use crate::llama::{Merged, Packed};
use crate::{Error, Result};

/// A continuation to score: the sum of the log-likelihoods of its tokens, each given all tokens before it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// Context and continuation, at least two tokens.
    pub tokens: Vec<u32>,
    /// How many of the last tokens are the continuation: from 1 to all but the first.
    pub continuation: usize,
}

impl Request {
    /// Encodes a context and its continuation together. Spaces at the end of the context move to the continuation. The continuation's
    /// tokens are those behind as many tokens as the context alone has.
    ///
    /// `bos` says what a text starts with; `empty` stands for a context without tokens. Tokens are dropped from the left
    /// until `context_length` of them are left to read (the last one is only predicted).
    ///
    /// # Errors
    /// The tokenizer's; a continuation without tokens; one that is longer than `context_length`; an empty context without `empty`.
    pub fn encode(
        tokenizer: &Tokenizer,
        (context, continuation): (&str, &str),
        bos: Bos,
        empty: Option<u32>,
        context_length: usize,
    ) -> Result<Self> {
        let trimmed = context.trim_end();
        let whole = tokenizer.encode_stream(&format!("{context}{continuation}"), bos)?;
        let mut tokens = tokenizer.encode_stream(trimmed, bos)?;
        let first = tokens.len().min(whole.len());
        if tokens.is_empty() {
            let none = || Error::argument("context", "expected text, got none, and the model has no token to start a text with");
            tokens.push(empty.ok_or_else(none)?);
        }
        tokens.extend(&whole[first..]);
        let continuation = whole.len() - first;
        if continuation == 0 {
            return Err(Error::argument("choice", format!("expected text that adds a token to its context, got {whole:?}")));
        }
        if continuation > context_length {
            let message = format!("expected at most {context_length} tokens, the model's context, got {continuation}");
            return Err(Error::argument("choice", message));
        }
        let extra = tokens.len().saturating_sub(context_length + 1);
        Ok(Self { tokens: tokens.split_off(extra), continuation })
    }

    /// What the model reads.
    fn input(&self) -> &[u32] {
        &self.tokens[..self.tokens.len() - 1]
    }
}

/// The requests of every candidate of every question, in order. One space stands between a context and a choice. The arguments are
/// those of [`Request::encode`].
///
/// # Errors
/// Those of [`Question::check`] and [`Request::encode`], with the question's number.
pub fn requests(
    tokenizer: &Tokenizer,
    questions: &[Question],
    bos: Bos,
    empty: Option<u32>,
    context_length: usize,
) -> Result<Vec<Request>> {
    let mut all = vec![];
    for (number, question) in questions.iter().enumerate() {
        let at = |e: Error| Error::argument(format!("question {number}"), e);
        question.check().map_err(at)?;
        for i in 0..question.candidates() {
            let (context, choice) = question.candidate(i);
            all.push(Request::encode(tokenizer, (context, &format!(" {choice}")), bos, empty, context_length).map_err(at)?);
        }
    }
    Ok(all)
}

/// The log-likelihood of every request's continuation. `known` holds one place a request: requests whose place is filled are not asked
/// again, and every answer is put there at once, so that an interrupted call continues.
///
/// Requests go through the network many at once, long ones first, without padding. What several of them begin with is read once, and so
/// are requests that differ in the last token alone.
///
/// # Errors
/// `known` of another length; a request without tokens to read or to score; those of the network. [`Error::Interrupted`] with the
/// number of answers where `progress`, which is told that number, breaks.
pub fn log_likelihoods(
    model: &Merged,
    requests: &[Request],
    known: &mut [Option<f64>],
    mut progress: impl FnMut(usize) -> ControlFlow<()>,
) -> Result<()> {
    if known.len() != requests.len() {
        return Err(Error::argument("known answers", format!("expected {} places, got {}", requests.len(), known.len())));
    }
    if let Some(i) = requests.iter().position(|r| r.continuation == 0 || r.tokens.len() <= r.continuation) {
        let Request { tokens, continuation } = &requests[i];
        let message = format!("expected a context and a continuation, got {} tokens, {continuation} to score", tokens.len());
        return Err(Error::argument(format!("request {i}"), message));
    }
    let mut done = known.iter().flatten().count();
    let asked: Vec<usize> = (0..requests.len()).filter(|i| known[*i].is_none()).collect();
    for batch in batches(requests, asked, tokens_at_once(&model.embedding.device())) {
        let mut packed = Packed::default();
        let (mut rows, mut targets, mut spans) = (vec![], vec![], vec![]);
        for group in &batch {
            let first = &requests[group.requests[0]];
            let prefix = packed.push(&first.tokens[..group.shared]);
            let mut before: Option<(&[u32], usize)> = None;
            for &request in &group.requests {
                let Request { tokens, continuation } = &requests[request];
                let own = &requests[request].input()[group.shared..];
                let start = match before {
                    Some((same, start)) if same == own => start,
                    _ => packed.push_behind(prefix, group.shared, own)?,
                };
                before = Some((own, start));
                let row = |t: usize| if t < group.shared { prefix + t } else { start + t - group.shared };
                rows.extend((tokens.len() - continuation..tokens.len()).map(|t| row(t - 1) as u32));
                targets.extend(&tokens[tokens.len() - continuation..]);
                spans.push((request, *continuation));
            }
        }
        let mut losses = model.packed_losses(&packed, &rows, &targets)?.into_iter();
        for (request, length) in spans {
            let sum: f64 = losses.by_ref().take(length).sum();
            if !sum.is_finite() {
                return Err(Error::numeric("evaluation", format!("the log-likelihood of request {request} is {}", -sum)));
            }
            known[request] = Some(-sum);
            done += 1;
        }
        if progress(done).is_break() {
            return Err(Error::Interrupted { step: done });
        }
    }
    Ok(())
}

/// Requests that begin with the same tokens.
struct Group {
    /// Number of these tokens: at least 1, at most all that the shortest request reads.
    shared: usize,
    /// Requests, those that read the same next to one another.
    requests: Vec<usize>,
    /// Tokens that are read.
    tokens: usize,
}

/// The requests `asked` in groups, and the groups in batches of about `limit` tokens, longest groups first.
fn batches(requests: &[Request], mut asked: Vec<usize>, limit: usize) -> Vec<Vec<Group>> {
    asked.sort_by(|&a, &b| requests[a].input().cmp(requests[b].input()).then(a.cmp(&b)));
    let common = |a: &[u32], b: &[u32]| a.iter().zip(b).take_while(|(a, b)| a == b).count();
    let mut groups: Vec<Group> = vec![];
    for (i, &request) in asked.iter().enumerate() {
        let input = requests[request].input();
        if let Some(group) = groups.last_mut() {
            let others = group.requests.len();
            let common_next = asked.get(i + 1).map_or(0, |&next| common(input, requests[next].input()));
            let common = common(&requests[group.requests[0]].input()[..group.shared], input);
            let tokens = group.tokens + (others - 1) * (group.shared - common) + input.len() - common;
            // A beginning is read once instead of once a request: a group grows where that saves more than before. The second request
            // does not join where it begins like the third much more than like the first.
            let saves = others * common > (others - 1) * group.shared;
            if saves && (others > 1 || 2 * common >= common_next) && tokens <= limit {
                group.requests.push(request);
                (group.shared, group.tokens) = (common, tokens);
                continue;
            }
        }
        groups.push(Group { shared: input.len(), requests: vec![request], tokens: input.len() });
    }
    groups.sort_by_key(|g| (std::cmp::Reverse(g.tokens), g.requests[0]));
    let mut batches: Vec<Vec<Group>> = vec![];
    let mut room = 0;
    for group in groups {
        if group.tokens > room {
            batches.push(vec![]);
            room = limit;
        }
        room = room.saturating_sub(group.tokens);
        batches.last_mut().expect("pushed for the first group").push(group);
    }
    batches
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DType;
    use crate::demo;
    use crate::quant::Scheme;

    #[test]
    fn shared_beginnings_are_read_once() {
        let question = |context: &[u32], ends: &[&[u32]]| -> Vec<Request> {
            ends.iter().map(|end| Request { tokens: [context, end].concat(), continuation: end.len() }).collect()
        };
        let long: Vec<u32> = (100..160).collect();
        let all = [
            question(&[1, 2, 3, 4], &[&[5, 6, 7], &[5, 8, 9, 9], &[6, 1]]),
            question(&[1, 9], &[&[3, 3, 3, 3], &[2]]),
            question(&long, &[&[7], &[8], &[7, 8, 9]]),
        ]
        .concat();
        let of = |limit: usize| batches(&all, (0..all.len()).collect(), limit);
        let lists = |batches: &[Vec<Group>]| -> Vec<Vec<usize>> {
            batches
                .iter()
                .flatten()
                .map(|g| {
                    let mut requests = g.requests.clone();
                    requests.sort();
                    requests
                })
                .collect()
        };
        let one = of(1000);
        assert_eq!((one.len(), lists(&one)), (1, vec![vec![5, 6, 7], vec![0, 1, 2], vec![3, 4]]));
        // The long context once, and what one candidate reads of its own.
        assert_eq!(one[0][0].tokens, 60 + 2);
        assert_eq!(of(64).len(), 2);
        // A limit below one question: nobody is lost.
        let mut alone: Vec<usize> = lists(&of(1)).concat();
        alone.sort();
        assert_eq!(alone, (0..all.len()).collect::<Vec<_>>());
    }

    #[test]
    fn batches_are_as_single_requests() {
        // In f64 both ways give the same codes.
        let model = demo::model_in(DType::F64).unwrap();
        let merged = model.merge(None, &Scheme::new(16, 4, 4)).unwrap();
        let tokens = demo::windows(demo::TEST, 64).unwrap();
        let mut all: Vec<Request> =
            (0..40).map(|i| Request { tokens: tokens.get(i)[..2 + i].to_vec(), continuation: 1 + i % 3 * i / 2 }).collect();
        // What differs in the last token alone is read once.
        let mut twin = all[7].clone();
        *twin.tokens.last_mut().unwrap() += 1;
        all.push(twin);
        all.iter_mut().for_each(|r| r.continuation = r.continuation.min(r.tokens.len() - 1));
        let mut known = vec![None; all.len()];
        log_likelihoods(&merged, &all, &mut known, |_| ControlFlow::Continue(())).unwrap();
        for (request, got) in all.iter().zip(&known) {
            // Logits of the sequence alone.
            let n = request.tokens.len();
            let losses = merged.token_losses(&request.tokens, n).unwrap();
            let want: f64 = losses[n - 1 - request.continuation..n - 1].iter().sum();
            assert!((got.unwrap() + want).abs() < 1e-9 * want.max(1.0), "{request:?}: {got:?} {want}");
        }
        // Interrupted, then continued: nothing is asked twice.
        let mut again = vec![None; all.len()];
        assert!(log_likelihoods(&merged, &all, &mut again, |_| ControlFlow::Break(())).is_err());
        let first = again.iter().flatten().count();
        assert!(first > 0);
        again[0] = Some(5.0);
        log_likelihoods(&merged, &all, &mut again, |_| ControlFlow::Continue(())).unwrap();
        assert_eq!(again[0], Some(5.0));
        assert!(again.iter().all(Option::is_some));
        let bad = Request { tokens: vec![1, 2], continuation: 2 };
        assert!(log_likelihoods(&merged, &[bad], &mut [None], |_| ControlFlow::Continue(())).is_err());
    }
}
