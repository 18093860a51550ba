//! Scores prompts over HTTP, so that an evaluation harness can judge a quantised network: the part of OpenAI's `/v1/completions` that
//! returns the log-probabilities of a prompt (`echo`, `logprobs`, `max_tokens` 0 or 1), with `/v1/models` and a tokenizer beside it. It
//! generates no text.
//!
//! [`Server::run`] holds the network on the calling thread. Every connection has a thread that reads requests and waits for answers; what
//! waits goes through the network together. Memory is bounded: by the number of connections, beyond which new ones wait to be accepted,
//! and by the bytes of request bodies that are held at once. Nothing that was accepted is dropped.
//!
//! The protocol's framing is read by `httparse`; the rest of HTTP that is needed is in `http.rs`. A synchronous server crate that is kept
//! up was not found (tiny_http has had no release since 2022), and an asynchronous one would bring a runtime for one thread of work.

mod answer;
mod http;
mod queue;
mod request;

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use serde_json::{Value, json};

pub use request::{Completion, Prompts};

use crate::data::{Bos, Tokenizer};
use crate::eval::scores::token_scores;
use crate::llama::Merged;
use crate::{Error, Result};
use answer::Words;
use http::{Connection, Head, Next};
use queue::{Queue, Room};
use request::Fields;

/// Connections that are open at once: fewer than the 1024 files that a process may usually open.
const MAX_CONNECTIONS: usize = 512;
/// Bytes of the longest body, and of all bodies that are held at once: an answer takes up to fifty times as much.
const MAX_BODY: usize = 4 << 20;
const BODIES: usize = 16 << 20;
/// Stack of a connection's thread: tokenizers recurse little, JSON at most 128 levels.
const STACK: usize = 1 << 20;
/// How often a thread that waits looks around.
const LOOK: Duration = Duration::from_millis(20);

/// A request that is not answered with scores, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// The HTTP status: 4xx where the request is at fault.
    pub status: u16,
    /// The field at fault.
    pub field: Option<&'static str>,
    /// What was expected and what came, the field first.
    pub message: String,
}

impl Refusal {
    fn new(status: u16, field: Option<&'static str>, message: impl Into<String>) -> Self {
        let message = message.into();
        Self { status, field, message: field.map_or_else(|| message.clone(), |field| format!("{field}: {message}")) }
    }

    fn bad(field: Option<&'static str>, message: impl Into<String>) -> Self {
        Self::new(400, field, message)
    }

    /// In OpenAI's form.
    fn body(&self) -> Vec<u8> {
        let kind = if self.status < 500 { "invalid_request_error" } else { "server_error" };
        let error = json!({"message": self.message, "type": kind, "param": self.field, "code": null});
        json!({ "error": error }).to_string().into_bytes()
    }
}

impl From<Error> for Refusal {
    fn from(e: Error) -> Self {
        Self::new(500, None, e.to_string())
    }
}

/// What is served besides the network itself.
#[derive(Debug)]
pub struct Service {
    /// What the model is called.
    pub name: String,
    /// Turns text into tokens; without it only tokens are scored.
    pub tokenizer: Option<Tokenizer>,
    /// The token that text starts with.
    pub bos: Bos,
    /// Special tokens by their role, `bos_token` for example.
    pub special_tokens: Vec<(String, String)>,
    /// Tokens of the longest prompt.
    pub context: usize,
    /// Number of token ids.
    pub vocabulary: usize,
}

impl Service {
    /// The names of special tokens in the `tokenizer_config.json` of a model's folder; none where there is no such file.
    pub fn special_tokens_of(dir: &Path) -> Vec<(String, String)> {
        let file = std::fs::read(dir.join("tokenizer_config.json")).unwrap_or_default();
        let config: Value = serde_json::from_slice(&file).unwrap_or_default();
        let text = |value: &Value| value.as_str().or_else(|| value["content"].as_str()).map(String::from);
        let roles = ["bos_token", "eos_token", "pad_token", "unk_token"];
        roles.into_iter().filter_map(|role| Some((role.to_string(), text(&config[role])?))).collect()
    }

    fn encode(&self, text: &str, bos: Bos) -> Result<Vec<u32>, Refusal> {
        let none = || Refusal::bad(Some("prompt"), "expected token ids, got text: this model has no tokenizer");
        Ok(self.tokenizer.as_ref().ok_or_else(none)?.encode_stream(text, bos)?)
    }

    /// The prompts of a request as tokens, each within the vocabulary and the context.
    fn tokens(&self, completion: &Completion) -> Result<Vec<Vec<u32>>, Refusal> {
        if let Some(name) = completion.model.as_deref().filter(|name| *name != self.name) {
            let message = format!("there is no model {:?} here, only {:?}", crate::io::short(name), self.name);
            return Err(Refusal::new(404, Some("model"), message));
        }
        let bos = match completion.special_tokens {
            None => self.bos,
            Some(true) => Bos::Auto,
            Some(false) => Bos::None,
        };
        let prompts = match &completion.prompts {
            Prompts::Text(texts) => texts.iter().map(|text| self.encode(text, bos)).collect::<Result<Vec<_>, _>>()?,
            Prompts::Tokens(lists) => lists.clone(),
        };
        let bad = |message: String| Err(Refusal::bad(Some("prompt"), message));
        for (i, prompt) in prompts.iter().enumerate() {
            if prompt.is_empty() {
                return bad(format!("expected at least one token, got none in prompt {i}"));
            }
            if prompt.len() > self.context {
                let Self { context, .. } = self;
                return bad(format!(
                    "expected at most {context} tokens, the model's context, got {} in prompt {i}",
                    prompt.len()
                ));
            }
            if let Some(token) = prompt.iter().find(|token| **token as usize >= self.vocabulary) {
                return bad(format!("expected token ids below {}, got {token} in prompt {i}", self.vocabulary));
            }
        }
        Ok(prompts)
    }
}

/// A socket that is listened to, not yet answered on.
#[derive(Debug)]
pub struct Server {
    listener: TcpListener,
    address: SocketAddr,
}

/// What threads share.
struct Shared<'a> {
    service: &'a Service,
    queue: Queue,
    connections: Room,
    bodies: Room,
    stop: &'a AtomicBool,
    answered: AtomicU64,
    log: &'a (dyn Fn(&str) + Sync),
}

impl Server {
    /// Listens; port 0 is any free one.
    ///
    /// # Errors
    /// [`Error::Argument`] where the address cannot be had: the port is in use, the host is not this machine.
    pub fn bind(host: &str, port: u16) -> Result<Self> {
        let fails = |e: std::io::Error| {
            let hint = if e.kind() == std::io::ErrorKind::AddrInUse { "; something else listens there" } else { "" };
            Error::argument("address", format!("cannot listen on {host} port {port}: {e}{hint}"))
        };
        let listener = TcpListener::bind((host, port)).map_err(fails)?;
        listener.set_nonblocking(true).map_err(fails)?;
        Ok(Self { address: listener.local_addr().map_err(fails)?, listener })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Answers until `stop` is set, and then what was asked before; `log` is told of what goes wrong. Returns the number of answers.
    ///
    /// # Errors
    /// A thread that cannot be started.
    pub fn run(&self, model: &Merged, service: &Service, stop: &AtomicBool, log: &(dyn Fn(&str) + Sync)) -> Result<u64> {
        let shared = Shared {
            service,
            queue: Queue::default(),
            connections: Room::new(MAX_CONNECTIONS),
            bodies: Room::new(BODIES),
            stop,
            answered: AtomicU64::new(0),
            log,
        };
        std::thread::scope(|scope| {
            let accept = std::thread::Builder::new().spawn_scoped(scope, || accept(scope, &self.listener, &shared));
            accept.map_err(|e| Error::argument("server", format!("no thread can be started: {e}")))?;
            let over = || stop.load(Ordering::SeqCst) && shared.connections.is_unused();
            while let Some(jobs) = shared.queue.take(|lengths| crate::eval::scores::at_once(model, lengths), over) {
                queue::answer(jobs, &|prompts| token_scores(model, prompts));
            }
            Ok(shared.answered.load(Ordering::SeqCst))
        })
    }
}

/// Accepts connections until the server stops, each as soon as there is room for it.
fn accept<'s>(scope: &'s std::thread::Scope<'s, '_>, listener: &TcpListener, shared: &'s Shared<'s>) {
    while !shared.stop.load(Ordering::SeqCst) {
        let Some(place) = shared.connections.enter_within(1, LOOK) else { continue };
        match listener.accept() {
            Ok((stream, _)) => {
                let run = move || {
                    // The other connections go on, whatever a tokenizer does with a text.
                    if catch_unwind(AssertUnwindSafe(|| serve(shared, stream))).is_err() {
                        (shared.log)("a connection was closed: its thread panicked");
                    }
                    drop(place);
                };
                if let Err(e) = std::thread::Builder::new().stack_size(STACK).spawn_scoped(scope, run) {
                    (shared.log)(&format!("a connection was closed: no thread can be started: {e}"));
                }
            }
            Err(e) => {
                if e.kind() != std::io::ErrorKind::WouldBlock {
                    (shared.log)(&format!("a connection was not accepted: {e}"));
                }
                std::thread::sleep(LOOK);
            }
        }
    }
}

/// Answers one connection's requests until it ends.
fn serve(shared: &Shared<'_>, stream: TcpStream) {
    let run = || -> std::io::Result<()> {
        stream.set_nonblocking(false)?; // some systems hand it down from the listener
        let mut connection = Connection::new(stream)?;
        loop {
            let stops = || shared.stop.load(Ordering::SeqCst);
            let head = match connection.next(stops, || shared.connections.is_full())? {
                Next::Request(head) => head,
                Next::Bad(refusal) => return connection.refuse(&refusal),
                Next::End => return Ok(()),
            };
            if head.length > MAX_BODY {
                let message = format!("expected a body of at most {MAX_BODY} bytes, got {}", head.length);
                return connection.refuse(&Refusal::new(413, None, message));
            }
            let _held = shared.bodies.enter(head.length);
            let body = connection.body(&head)?;
            let answer = respond(shared, &connection, &head, &body);
            drop(body);
            let Some(answer) = answer else { return Err(std::io::Error::other("it left before its answer")) };
            let keep = head.keep && !stops();
            match answer {
                Ok(body) => connection.answer(200, "", keep, &body)?,
                Err(refusal) => {
                    let extra = if refusal.status == 405 { "Allow: GET, POST\r\n" } else { "" };
                    if refusal.status >= 500 {
                        (shared.log)(&format!("a request failed: {}", refusal.message));
                    }
                    connection.answer(refusal.status, extra, keep, &refusal.body())?;
                }
            }
            shared.answered.fetch_add(1, Ordering::SeqCst);
            if !keep {
                return Ok(());
            }
        }
    };
    if let Err(e) = run() {
        (shared.log)(&format!("a client was lost: {e}"));
    }
}

/// The answer to a request; none where the client left while it waited.
fn respond(shared: &Shared<'_>, connection: &Connection, head: &Head, body: &[u8]) -> Option<Result<Vec<u8>, Refusal>> {
    let service = shared.service;
    let json = |value: Value| Ok(value.to_string().into_bytes());
    let (path, method) = (head.path.as_str(), head.method.as_str());
    Some(match (path, method) {
        ("/v1/completions", "POST") => return completion(shared, connection, body).transpose(),
        ("/v1/models", "GET") => {
            let model = json!({"id": service.name, "object": "model", "created": 0, "owned_by": "spinquant", "max_model_len": service.context});
            json(json!({"object": "list", "data": [model]}))
        }
        ("/tokenizer_info", "GET") if service.tokenizer.is_some() => {
            json(service.special_tokens.iter().map(|(role, token)| (role.clone(), Value::from(token.as_str()))).collect())
        }
        ("/tokenize", "POST") => tokenize(service, body).and_then(json),
        ("/detokenize", "POST") => detokenize(service, body).and_then(json),
        ("/v1/completions" | "/v1/models" | "/tokenizer_info" | "/tokenize" | "/detokenize", _) => {
            let other = if method == "GET" { "POST" } else { "GET" };
            Err(Refusal::new(405, None, format!("expected {other} {path}, got {}", crate::io::short(method))))
        }
        _ => {
            let here = "POST /v1/completions and GET /v1/models: this server scores prompts and generates no text";
            Err(Refusal::new(404, None, format!("there is no {}, only {here}", crate::io::short(path))))
        }
    })
}

fn completion(shared: &Shared<'_>, connection: &Connection, body: &[u8]) -> Result<Option<Vec<u8>>, Refusal> {
    let service = shared.service;
    let completion = Completion::parse(body)?;
    let prompts = service.tokens(&completion)?;
    let waiting = shared.queue.put(prompts);
    let scored = loop {
        match waiting.answer_within(LOOK * 5) {
            Some(scored) => break scored?,
            None if connection.is_gone() => {
                waiting.give_up();
                return Ok(None);
            }
            None => {}
        }
    };
    let words = Words { tokenizer: service.tokenizer.as_ref() };
    Ok(Some(answer::completions(&service.name, &completion, &words, &waiting.prompts, &scored)?))
}

fn tokenize(service: &Service, body: &[u8]) -> Result<Value, Refusal> {
    let fields = Fields::read(body)?;
    let text: String = fields.get("prompt", "text")?.ok_or_else(|| Refusal::bad(Some("prompt"), "expected text, got nothing"))?;
    let special = fields.get("add_special_tokens", "true or false")?.unwrap_or(true);
    let tokens = service.encode(&text, if special { Bos::Auto } else { Bos::None })?;
    Ok(json!({"count": tokens.len(), "max_model_len": service.context, "tokens": tokens}))
}

fn detokenize(service: &Service, body: &[u8]) -> Result<Value, Refusal> {
    let tokens: Option<Vec<u32>> = Fields::read(body)?.get("tokens", "a list of token ids")?;
    let tokens = tokens.ok_or_else(|| Refusal::bad(Some("tokens"), "expected a list of token ids, got nothing"))?;
    let none = || Refusal::new(404, None, "this model has no tokenizer");
    Ok(json!({"prompt": service.tokenizer.as_ref().ok_or_else(none)?.decode(&tokens, true)?}))
}
