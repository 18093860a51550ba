//! Chat templates: a conversation as the text that an instruction model was trained on.
//!
//! A template is Jinja, as transformers renders it (`apply_chat_template`): blocks are trimmed, `raise_exception` refuses a
//! conversation, and values have the methods of Python's strings and dicts that templates use. `strftime_now` is not defined;
//! templates that ask whether it is use a fixed date instead.

use std::path::{Path, PathBuf};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde};
use minijinja::{Environment, ErrorKind, context};
use minijinja_contrib::pycompat::unknown_method_callback;
use serde::Serialize;
use serde_json::Value;

use crate::{Error, Result, io};

/// One turn of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Message {
    /// `system`, `user` or `assistant`; some templates know others.
    pub role: String,
    /// What was said.
    pub content: String,
}

impl Message {
    /// A turn.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into() }
    }
}

/// A model's chat template.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    /// Names such as `bos_token`, with their texts.
    tokens: Vec<(&'static str, String)>,
    /// For messages.
    path: PathBuf,
}

const NAME: &str = "chat";

impl ChatTemplate {
    /// That of a model's folder: `chat_template.jinja`, or `chat_template` of `tokenizer_config.json`, which is a text or a list
    /// of named ones, of which `default` counts.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Format`] where there is no template, or one that is not Jinja.
    pub fn from_dir(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref();
        let (config_path, file) = (dir.join("tokenizer_config.json"), dir.join("chat_template.jinja"));
        let config: Value = match std::fs::read(&config_path) {
            Ok(bytes) => serde_json::from_slice(&bytes)
                .map_err(|e| Error::format(&config_path, format!("expected JSON: {}", io::short(e))))?,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound && file.exists() => Value::Null,
            Err(e) => return Err(Error::io(&config_path)(e)),
        };
        if file.exists() {
            return Self::new(crate::data::read_text(&file)?, &config, &file);
        }
        let source = match &config["chat_template"] {
            Value::String(source) => Some(source),
            Value::Array(named) => named.iter().find(|t| t["name"] == "default").and_then(|t| match &t["template"] {
                Value::String(source) => Some(source),
                _ => None,
            }),
            _ => None,
        };
        match source {
            Some(source) => Self::new(source.clone(), &config, &config_path),
            None => Err(Error::format(
                &config_path,
                "expected chat_template, got none (a base model continues text: use --prompt without --chat)",
            )),
        }
    }

    /// A template of its source; special tokens are those of a `tokenizer_config.json`, and `path` is for messages.
    ///
    /// # Errors
    /// [`Error::Format`] for what is not Jinja.
    pub fn new(source: String, config: &Value, path: &Path) -> Result<Self> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|e| Error::format(path, io::short(e)))?);
        environment.set_unknown_method_callback(unknown_method_callback);
        environment.add_function("raise_exception", |message: String| -> Result<String, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_filter("tojson", to_json);
        environment
            .add_template_owned(NAME, source)
            .map_err(|e| Error::format(path, format!("expected a chat template in Jinja: {}", io::short(e))))?;
        let text = |name: &'static str| {
            let token = &config[name];
            let token = if token.is_object() { &token["content"] } else { token };
            Some((name, token.as_str()?.to_string()))
        };
        let tokens = ["bos_token", "eos_token", "unk_token", "pad_token"].into_iter().filter_map(text).collect();
        Ok(Self { environment, tokens, path: path.to_path_buf() })
    }

    /// The conversation as text, up to where the assistant's next turn begins. The text has its own special tokens: encode it without a
    /// first token ([`Bos::None`](crate::data::Bos::None)).
    ///
    /// # Errors
    /// [`Error::Format`] with what the template said, where it refuses the conversation or cannot be rendered.
    pub fn render(&self, messages: &[Message]) -> Result<String> {
        let failed = |e: minijinja::Error| {
            let message = e.detail().map_or_else(|| e.to_string(), str::to_string);
            Error::format(&self.path, format!("the chat template refused the conversation: {message}"))
        };
        let tokens = minijinja::Value::from_pairs(self.tokens.iter().map(|(name, text)| (*name, text.as_str())));
        let conversation = context! { messages => minijinja::Value::from(Serde(messages)), add_generation_prompt => true, tools => (), ..tokens };
        self.environment.get_template(NAME).and_then(|t| t.render(conversation)).map_err(failed)
    }
}

/// Python's `json.dumps` as templates call it: not escaped for HTML, with a space behind colons and commas unless it is indented.
fn to_json(value: &minijinja::Value, options: Kwargs) -> Result<String, minijinja::Error> {
    let indent: Option<usize> = options.get("indent")?;
    options.assert_all_used()?;
    let bad = |e: serde_json::Error| minijinja::Error::new(ErrorKind::BadSerialization, e.to_string());
    let mut bytes = vec![];
    match indent {
        Some(n) => {
            let indent = " ".repeat(n);
            let format = serde_json::ser::PrettyFormatter::with_indent(indent.as_bytes());
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut bytes, format)).map_err(bad)?;
        }
        None => value.serialize(&mut serde_json::Serializer::with_formatter(&mut bytes, Spaced)).map_err(bad)?,
    }
    String::from_utf8(bytes).map_err(|e| minijinja::Error::new(ErrorKind::BadSerialization, e.to_string()))
}

/// JSON with a space behind colons and commas.
struct Spaced;

impl serde_json::ser::Formatter for Spaced {
    fn begin_array_value<W: ?Sized + std::io::Write>(&mut self, to: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { to.write_all(b", ") }
    }
    fn begin_object_key<W: ?Sized + std::io::Write>(&mut self, to: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { to.write_all(b", ") }
    }
    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, to: &mut W) -> std::io::Result<()> {
        to.write_all(b": ")
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn template(source: &str, config: &Value) -> Result<ChatTemplate> {
        ChatTemplate::new(source.into(), config, Path::new("model/tokenizer_config.json"))
    }

    /// What templates of published models do: conditions, loops with `loop.first`, Python's methods, `namespace`, slices. The texts
    /// are what Jinja2 3.1.6 makes of the same templates.
    #[test]
    fn a_conversation() {
        let messages = [Message::new("user", " Hello, \"you\" "), Message::new("assistant", "Yes?"), Message::new("user", "é")];
        let source = "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}\
            {{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}\n\
            {{ '<|im_start|>' + message['role'] + '\n' + message['content'].strip() + eos_token + '\n' }}\n\
            {% endfor %}\n\
            {% if add_generation_prompt %}\n    {{- '<|im_start|>assistant\n' }}\n{% endif %}";
        let config = json!({"eos_token": {"content": "<|im_end|>"}, "bos_token": null});
        let text = template(source, &config).unwrap().render(&messages).unwrap();
        let want = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHello, \"you\"<|im_end|>\n\n<|im_start|>assistant\nYes?\
            <|im_end|>\n\n<|im_start|>user\né<|im_end|>\n\n<|im_start|>assistant\n\n";
        assert_eq!(text, want);
        let source = "{%- set ns = namespace(n=0) %}{% for m in messages[::-1] %}{% set ns.n = ns.n + 1 %}{% if loop.index > 1 %}{% break %}\
            {% endif %}{% endfor %}{{ ns.n }} {{ messages[0].content | tojson }} {{ messages[1] | tojson }} {{ tools is none }}\
            {{ messages[1].content.split('?')[0] }}{% if strftime_now is defined %}!{% endif %}";
        let text = template(source, &json!({})).unwrap().render(&messages).unwrap();
        assert_eq!(text, "2 \" Hello, \\\"you\\\" \" {\"role\": \"assistant\", \"content\": \"Yes?\"} TrueYes");
    }

    #[test]
    fn what_is_wrong() {
        let config = json!({});
        let error = template("{% if %}", &config).unwrap_err().to_string();
        assert!(error.contains("tokenizer_config.json") && error.contains("expected a chat template in Jinja"), "{error}");
        let refuses = template("{{ raise_exception('Roles must alternate') }}", &config).unwrap();
        let error = refuses.render(&[]).unwrap_err().to_string();
        assert!(error.contains("refused the conversation: Roles must alternate"), "{error}");
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tokenizer_config.json");
        assert!(ChatTemplate::from_dir(dir.path()).unwrap_err().to_string().contains("tokenizer_config.json"));
        std::fs::write(&path, "{}").unwrap();
        assert!(ChatTemplate::from_dir(dir.path()).unwrap_err().to_string().contains("expected chat_template, got none"));
        std::fs::write(
            &path,
            r#"{"chat_template": [{"name": "rag", "template": "no"}, {"name": "default", "template": "yes"}]}"#,
        )
        .unwrap();
        assert_eq!(ChatTemplate::from_dir(dir.path()).unwrap().render(&[]).unwrap(), "yes");
        std::fs::write(dir.path().join("chat_template.jinja"), "own").unwrap();
        assert_eq!(ChatTemplate::from_dir(dir.path()).unwrap().render(&[]).unwrap(), "own");
    }
}
