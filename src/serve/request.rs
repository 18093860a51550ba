//! The body of `POST /v1/completions`: which parts of it are understood, and what is refused.

use std::collections::BTreeMap;

use serde::de::DeserializeOwned;
use serde_json::value::RawValue;

use super::Refusal;
use crate::io;

/// A request to score prompts.
#[derive(Clone, Debug, PartialEq)]
pub struct Completion {
    /// The prompts, at least one.
    pub prompts: Prompts,
    /// Whether the likeliest token behind each prompt is wanted as well: `max_tokens` 1, not 0.
    pub next: bool,
    /// The field of the same name: none where no log-probabilities are wanted, 1 for those of the likeliest tokens as well.
    pub logprobs: Option<u8>,
    /// The model that the request names.
    pub model: Option<String>,
    /// Whether the tokenizer adds its special tokens to text, where the request says so.
    pub special_tokens: Option<bool>,
}

/// What is to be scored.
#[derive(Clone, Debug, PartialEq)]
pub enum Prompts {
    /// Texts.
    Text(Vec<String>),
    /// Token ids.
    Tokens(Vec<Vec<u32>>),
}

/// The fields of a JSON object, each still text.
pub(super) struct Fields<'a>(BTreeMap<String, &'a RawValue>);

impl<'a> Fields<'a> {
    pub(super) fn read(body: &'a [u8]) -> Result<Self, Refusal> {
        let fields = serde_json::from_slice(body);
        fields.map(Self).map_err(|e| Refusal::bad(None, format!("expected a JSON object as the body: {}", io::short(e))))
    }

    /// A field of this type; none where it is absent or null.
    pub(super) fn get<T: DeserializeOwned>(&self, name: &'static str, expected: &str) -> Result<Option<T>, Refusal> {
        let Some(text) = self.0.get(name) else { return Ok(None) };
        let value = serde_json::from_str(text.get());
        value.map_err(|_| Refusal::bad(Some(name), format!("expected {expected}, got {}", io::short(text))))
    }

    /// Refuses whatever is neither null nor one of these, which have no effect on what is computed.
    fn only(&self, name: &'static str, allowed: &[&str], why: &str) -> Result<(), Refusal> {
        match self.0.get(name).map(|text| text.get()) {
            None | Some("null") => Ok(()),
            Some(text) if allowed.contains(&text) => Ok(()),
            Some(text) => {
                let expected = allowed.first().map_or_else(|| "nothing".into(), |first| (*first).to_string());
                Err(Refusal::bad(Some(name), format!("expected {expected}, got {}: {why}", io::short(text))))
            }
        }
    }
}

impl Completion {
    /// Reads the body of a request. Fields that change nothing in what is computed (`seed`, `user`, `stop`, `top_p`, unknown ones) are ignored.
    ///
    /// # Errors
    /// A body that is no JSON object; a field of the wrong type; a field that asks for more than scores.
    pub fn parse(body: &[u8]) -> Result<Self, Refusal> {
        let fields = Fields::read(body)?;
        let prompts = Prompts::parse(fields.0.get("prompt").map_or("null", |text| text.get()))?;
        let scores = "this server scores prompts and generates no text";
        fields.only("stream", &["false"], scores)?;
        fields.only("n", &["1"], scores)?;
        fields.only("best_of", &["1"], scores)?;
        fields.only("suffix", &["\"\""], scores)?;
        fields.only("temperature", &["0", "0.0"], "the token behind a prompt is the likeliest one")?;
        for (name, none) in [("presence_penalty", "0"), ("frequency_penalty", "0"), ("logit_bias", "{}")] {
            fields.only(name, &[none, "0.0"], "log-probabilities are those of the model")?;
        }
        if fields.get::<bool>("echo", "true")? != Some(true) {
            return Err(Refusal::bad(Some("echo"), format!("expected true: {scores}")));
        }
        let max_tokens = fields.get::<u64>("max_tokens", "0 or 1")?.unwrap_or(16);
        if max_tokens > 1 {
            let message = format!("expected 0 or 1, got {max_tokens} (16 where it is absent): {scores}");
            return Err(Refusal::bad(Some("max_tokens"), message));
        }
        let logprobs = fields.get::<u64>("logprobs", "0 or 1")?;
        if let Some(more) = logprobs.filter(|n| *n > 1) {
            return Err(Refusal::bad(Some("logprobs"), format!("expected 0 or 1, the likeliest token, got {more}")));
        }
        Ok(Self {
            prompts,
            next: max_tokens == 1,
            logprobs: logprobs.map(|n| n as u8),
            model: fields.get("model", "text")?,
            special_tokens: fields.get("add_special_tokens", "true or false")?,
        })
    }
}

impl Prompts {
    fn parse(text: &str) -> Result<Self, Refusal> {
        const EXPECTED: &str = "expected text, a list of texts, a list of token ids or a list of such lists";
        let begin = |text: &str| text.trim_start().chars().next();
        let bad = |got: &dyn std::fmt::Display| Refusal::bad(Some("prompt"), format!("{EXPECTED}, got {}", io::short(got)));
        let first = begin(text);
        // A list is what its first element is.
        let inner = (first == Some('[')).then(|| begin(&text.trim_start()[1..])).flatten();
        let wrong = |e: serde_json::Error| Refusal::bad(Some("prompt"), format!("{EXPECTED}: {}", io::short(e)));
        let read = match (first, inner) {
            (Some('"'), _) => serde_json::from_str(text).map(|text| Self::Text(vec![text])),
            (_, Some('"')) => serde_json::from_str(text).map(Self::Text),
            (_, Some('[')) => serde_json::from_str(text).map(Self::Tokens),
            (_, Some('0'..='9' | '-')) => serde_json::from_str(text).map(|tokens| Self::Tokens(vec![tokens])),
            _ => return Err(bad(&text)),
        };
        read.map_err(wrong)
    }

    /// Number of prompts.
    pub fn len(&self) -> usize {
        match self {
            Self::Text(texts) => texts.len(),
            Self::Tokens(lists) => lists.len(),
        }
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_evaluation_harnesses_send() {
        let body = r#"{"model": "m", "prompt": [[1, 450], [7]], "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": true}"#;
        let want = Completion {
            prompts: Prompts::Tokens(vec![vec![1, 450], vec![7]]),
            next: true,
            logprobs: Some(1),
            model: Some("m".into()),
            special_tokens: None,
        };
        assert_eq!(Completion::parse(body.as_bytes()).unwrap(), want);
        let prompts = |prompt: &str| {
            let body = format!(r#"{{"prompt": {prompt}, "echo": true, "max_tokens": 0}}"#);
            Completion::parse(body.as_bytes()).map(|c| (c.prompts, c.next))
        };
        assert_eq!(prompts(r#""a""#).unwrap(), (Prompts::Text(vec!["a".into()]), false));
        assert_eq!(prompts(r#" [ "a", "b" ] "#).unwrap().0, Prompts::Text(vec!["a".into(), "b".into()]));
        assert_eq!(prompts("[3,\n4]").unwrap().0, Prompts::Tokens(vec![vec![3, 4]]));
        for bad in
            ["null", "7", "true", "{}", "[]", "[null]", r#"["a", 1]"#, r#"[1, "a"]"#, "[[1], 2]", "[-1]", "[1.5]", "[4294967296]"]
        {
            let refusal = prompts(bad).unwrap_err();
            assert!(
                refusal.message.starts_with("prompt: expected text, a list of texts") && refusal.status == 400,
                "{bad}: {refusal:?}"
            );
        }
    }

    #[test]
    fn what_is_refused_names_its_field() {
        let with = |change: &str| format!(r#"{{"prompt": "a", "echo": true, "max_tokens": 0, {change}}}"#);
        for (change, part) in [
            (r#""max_tokens": 2"#, "max_tokens: expected 0 or 1, got 2"),
            (r#""max_tokens": null"#, "max_tokens: expected 0 or 1, got 16 (16 where it is absent)"),
            (r#""max_tokens": "1""#, "max_tokens: expected 0 or 1, got \"1\""),
            (r#""max_tokens": -1"#, "max_tokens: expected 0 or 1, got -1"),
            (r#""echo": false"#, "echo: expected true: this server scores prompts"),
            (r#""echo": 1"#, "echo: expected true, got 1"),
            (r#""stream": true"#, "stream: expected false, got true"),
            (r#""n": 2"#, "n: expected 1, got 2"),
            (r#""best_of": 3"#, "best_of: expected 1, got 3"),
            (r#""suffix": "x""#, "suffix: expected \"\", got \"x\""),
            (r#""temperature": 0.7"#, "temperature: expected 0, got 0.7"),
            (r#""logit_bias": {"1": 2}"#, "logit_bias: expected {}, got"),
            (r#""logprobs": 5"#, "logprobs: expected 0 or 1, the likeliest token, got 5"),
            (r#""logprobs": true"#, "logprobs: expected 0 or 1, got true"),
            (r#""model": 7"#, "model: expected text, got 7"),
            (r#""add_special_tokens": 0"#, "add_special_tokens: expected true or false, got 0"),
        ] {
            let refusal = Completion::parse(with(change).as_bytes()).unwrap_err();
            assert!(refusal.message.starts_with(part), "{change}: {}", refusal.message);
            assert_eq!((refusal.status, refusal.field), (400, part.split(':').next()));
        }
        for harmless in [r#""stream": false"#, r#""n": 1"#, r#""logit_bias": null"#, r#""stop": ["x"]"#, r#""unknown": {}"#] {
            assert!(Completion::parse(with(harmless).as_bytes()).is_ok(), "{harmless}");
        }
        for body in [&b""[..], b"[]", b"{", b"\"a\"", b"{\"prompt\": \"a\"", b"{} {}", b"\xff"] {
            assert!(Completion::parse(body).unwrap_err().message.starts_with("expected a JSON object as the body"), "{body:?}");
        }
    }
}
