//! `spinquant serve`: what it answers, what it refuses, and what cannot bring it down.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::process::{Child, ChildStdout};
use std::time::Instant;

use spinquant::llama::{Llama, Merged};
use spinquant::quant::Scheme;
use spinquant::{DType, Device};

use super::*;

const SERVE: &str = "serve --model model --device cpu --scheme W4A4KV4 --rotations hadamard --port 0";

/// A server, ended with the test.
struct Server {
    child: Child,
    stdout: BufReader<ChildStdout>,
    /// `127.0.0.1:PORT`.
    address: String,
}

struct Answer {
    status: u16,
    headers: HashMap<String, String>,
    body: Value,
}

impl Server {
    fn start(place: &Place, args: &str) -> Self {
        let mut child = place.command(args).spawn().unwrap();
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        stdout.read_line(&mut line).unwrap();
        let address = line.trim().strip_prefix("http://").unwrap_or_else(|| panic!("{line:?}, {:?}", child.wait())).to_string();
        Self { child, stdout, address }
    }

    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(&self.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(120))).unwrap();
        stream
    }

    /// One request on a connection of its own.
    fn ask(&self, method: &str, path: &str, body: &str) -> Answer {
        let mut stream = self.connect();
        send(&mut stream, method, path, body);
        receive(&stream)
    }

    /// Completions that must be answered.
    fn completions(&self, body: &Value) -> Value {
        let answer = self.ask("POST", "/v1/completions", &body.to_string());
        assert_eq!(answer.status, 200, "{body}: {}", answer.body);
        answer.body
    }

    /// Ends the server as Ctrl-C does, and returns what it said on standard error.
    #[cfg(unix)]
    fn stop(mut self) -> (Option<i32>, String) {
        self.signal();
        let mut said = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        let mut rest = String::new();
        self.stdout.read_to_string(&mut rest).unwrap();
        assert!(rest.is_empty(), "{rest}");
        (self.child.wait().unwrap().code(), said)
    }

    #[cfg(unix)]
    fn signal(&self) {
        let kill = Command::new("kill").args(["-TERM", &self.child.id().to_string()]).status().unwrap();
        assert!(kill.success());
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn send(stream: &mut TcpStream, method: &str, path: &str, body: &str) {
    let head = format!("{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n", body.len());
    stream.write_all((head + body).as_bytes()).unwrap();
}

/// The next answer on a connection.
fn receive(stream: &TcpStream) -> Answer {
    let mut reader = BufReader::new(stream);
    let mut line = || {
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        line.trim_end().to_string()
    };
    let first = line();
    let status = first.split(' ').nth(1).unwrap_or_else(|| panic!("{first:?}")).parse().unwrap();
    let mut headers = HashMap::new();
    loop {
        let header = line();
        let Some((name, value)) = header.split_once(": ") else { break };
        headers.insert(name.to_ascii_lowercase(), value.to_string());
    }
    let mut body = vec![0; headers["content-length"].parse().unwrap()];
    reader.read_exact(&mut body).unwrap();
    Answer { status, headers, body: serde_json::from_slice(&body).unwrap() }
}

/// What harnesses ask.
fn scoring(prompt: Value) -> Value {
    json!({"model": "model", "prompt": prompt, "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": true})
}

/// The network that is served.
fn network(place: &Place) -> Merged {
    let model = Llama::load(place.path("model"), DType::F32, &Device::Cpu).unwrap();
    let config = &model.config;
    let rotations = Rotations::random_hadamard(config.hidden_size, config.head_dim, config.layers, 0).unwrap();
    model.merge(Some(&rotations), &Scheme::new(4, 4, 4)).unwrap()
}

/// A request that takes long: its body and the number of its choices.
fn long() -> (String, usize) {
    let prompt: Vec<u32> = (0..500).map(|i| i * 7 % 32).collect();
    (scoring(json!(vec![prompt; 400])).to_string(), 400)
}

/// Each score is that of the library, in the form that harnesses read.
fn check(choice: &Value, network: &Merged, prompt: &[u32]) {
    let losses = network.token_losses(prompt, prompt.len()).unwrap();
    let list = |name: &str| choice["logprobs"][name].as_array().unwrap();
    let (scores, tops) = (list("token_logprobs"), list("top_logprobs"));
    assert_eq!((scores.len(), tops.len(), list("tokens").len()), (prompt.len() + 1, prompt.len() + 1, prompt.len() + 1));
    assert!(scores[0].is_null() && tops[0].is_null());
    for (i, loss) in losses[..prompt.len() - 1].iter().enumerate() {
        let score = scores[i + 1].as_f64().unwrap();
        assert!((score + loss).abs() < 1e-3, "{i}: {score} {loss}");
        // The token's own value and the largest one, exactly.
        let top: Vec<f64> = tops[i + 1].as_object().unwrap().values().map(|v| v.as_f64().unwrap()).collect();
        assert!(top.contains(&score) && top.iter().all(|t| *t <= 0.0) && (1..=2).contains(&top.len()), "{i}: {score} {top:?}");
        assert!(top.len() == 1 || top.iter().any(|t| *t >= score), "{i}: {score} {top:?}");
    }
}

#[test]
fn scores_for_a_harness() {
    let place = Place::new();
    let (server, network) = (Server::start(&place, SERVE), network(&place));
    let prompts: [&[u32]; 4] = [&[0, 5, 9, 31, 2], &[7], &[3, 3], &[0, 12, 13, 14, 15, 16, 17]];
    let all = server.completions(&scoring(json!(prompts)));
    let choices = all["choices"].as_array().unwrap();
    assert_eq!(choices.len(), 4);
    for (i, (choice, prompt)) in choices.iter().zip(prompts).enumerate() {
        assert_eq!(choice["index"], i);
        check(choice, &network, prompt);
        // Alone as in company.
        check(&server.completions(&scoring(json!([prompt])))["choices"][0], &network, prompt);
    }
    assert_eq!(all["usage"], json!({"prompt_tokens": 15, "completion_tokens": 4, "total_tokens": 19}));
    let (model, object) = (&all["model"], &all["object"]);
    assert_eq!((model, object), (&json!("model"), &json!("text_completion")));

    // Text: the tokenizer adds <s>, or does not.
    let text = server.completions(&scoring(json!("w3 w7 w29")));
    check(&text["choices"][0], &network, &[0, 5, 9, 31]);
    assert_eq!(text["choices"][0]["logprobs"]["tokens"].as_array().unwrap()[..4], ["<s>", "w3", "w7", "w29"].map(Value::from));
    assert!(text["choices"][0]["text"].as_str().unwrap().starts_with("w3 w7 w29"));
    let mut body = scoring(json!(["w3 w7", "w29 w1 w0"]));
    body["add_special_tokens"] = json!(false);
    let texts = server.completions(&body);
    check(&texts["choices"][0], &network, &[5, 9]);
    check(&texts["choices"][1], &network, &[31, 3, 2]);
    // One list of ids is one prompt.
    check(&server.completions(&scoring(json!([0, 5, 9])))["choices"][0], &network, &[0, 5, 9]);

    // Without the token behind the prompt, and without log-probabilities.
    let mut body = scoring(json!([[0, 5, 9]]));
    body["max_tokens"] = json!(0);
    let short = server.completions(&body);
    assert_eq!(short["choices"][0]["logprobs"]["token_logprobs"].as_array().unwrap().len(), 3);
    assert_eq!(short["usage"]["completion_tokens"], 0);
    body["logprobs"] = json!(0);
    let own = server.completions(&body);
    assert!(own["choices"][0]["logprobs"]["top_logprobs"][1].as_object().unwrap().len() == 1);
    body["logprobs"] = Value::Null;
    assert!(server.completions(&body)["choices"][0]["logprobs"].is_null());

    let models = server.ask("GET", "/v1/models", "").body;
    assert_eq!((&models["object"], &models["data"][0]["id"]), (&json!("list"), &json!("model")));
    let tokenize = |body: Value| server.ask("POST", "/tokenize", &body.to_string()).body["tokens"].clone();
    assert_eq!(tokenize(json!({"prompt": "w3 w7"})), json!([0, 5, 9]));
    assert_eq!(tokenize(json!({"prompt": "w3 w7", "add_special_tokens": false})), json!([5, 9]));
    assert_eq!(server.ask("POST", "/detokenize", "{\"tokens\": [5, 9]}").body, json!({"prompt": "w3 w7"}));
    std::fs::write(place.path("model/tokenizer_config.json"), r#"{"bos_token": {"content": "<s>"}, "eos_token": "</s>"}"#)
        .unwrap();
    let again = Server::start(&place, SERVE);
    assert_eq!(again.ask("GET", "/tokenizer_info", "").body, json!({"bos_token": "<s>", "eos_token": "</s>"}));
}

#[test]
fn what_it_cannot_do_is_refused_by_name() {
    let place = Place::new();
    let mut small = config();
    small["max_position_embeddings"] = json!(64);
    place.config(small);
    let server = Server::start(&place, SERVE);
    let refused = |answer: &Answer, status: u16, param: Option<&str>, part: &str| {
        let error = &answer.body["error"];
        assert!(error["message"].as_str().unwrap().contains(part), "{error}");
        assert_eq!((answer.status, &error["param"]), (status, &json!(param)), "{error}");
        assert_eq!(error["type"], "invalid_request_error");
    };
    let post = |change: Value, status: u16, param: &str, part: &str| {
        let mut body = scoring(json!([[0, 5]]));
        change.as_object().unwrap().iter().for_each(|(k, v)| body[k] = v.clone());
        refused(&server.ask("POST", "/v1/completions", &body.to_string()), status, Some(param), part);
    };
    post(json!({"max_tokens": 2}), 400, "max_tokens", "max_tokens: expected 0 or 1, got 2");
    post(json!({"stream": true}), 400, "stream", "generates no text");
    post(json!({"n": 2}), 400, "n", "expected 1, got 2");
    post(json!({"echo": false}), 400, "echo", "expected true");
    post(json!({"logprobs": 9}), 400, "logprobs", "expected 0 or 1");
    post(json!({"temperature": 1}), 400, "temperature", "expected 0, got 1");
    post(json!({"prompt": {"text": "w1"}}), 400, "prompt", "expected text, a list of texts");
    post(json!({"prompt": [[0, "w1"]]}), 400, "prompt", "expected text, a list of texts");
    post(json!({"prompt": [[0, 5], [0, 32]]}), 400, "prompt", "expected token ids below 32, got 32 in prompt 1");
    post(json!({"prompt": [[0], []]}), 400, "prompt", "expected at least one token, got none in prompt 1");
    post(json!({"prompt": [vec![1; 65]]}), 400, "prompt", "expected at most 64 tokens, the model's context, got 65 in prompt 0");
    post(json!({"prompt": "w1 ".repeat(64)}), 400, "prompt", "expected at most 64 tokens, the model's context, got 65");
    post(json!({"model": "gpt"}), 404, "model", "there is no model \"gpt\" here, only \"model\"");
    refused(&server.ask("POST", "/v1/completions", "{"), 400, None, "expected a JSON object as the body");
    refused(
        &server.ask("POST", "/v1/chat/completions", "{}"),
        404,
        None,
        "there is no /v1/chat/completions, only POST /v1/completions",
    );
    let wrong = server.ask("GET", "/v1/completions", "");
    refused(&wrong, 405, None, "expected POST /v1/completions, got GET");
    assert!(wrong.headers.contains_key("allow"));
    refused(&server.ask("POST", "/tokenize", "{}"), 400, Some("prompt"), "expected text, got nothing");
    refused(&server.ask("POST", "/detokenize", "{\"tokens\": \"x\"}"), 400, Some("tokens"), "expected a list of token ids");
    // What is no request, or too much of one: answered, and the connection closed.
    let raw = |bytes: &[u8]| {
        let mut stream = server.connect();
        stream.write_all(bytes).unwrap();
        let answer = receive(&stream);
        assert_eq!(stream.read(&mut [0]).unwrap(), 0);
        answer
    };
    refused(&raw(b"hello\r\n\r\n"), 400, None, "expected an HTTP request");
    refused(&raw(b"POST /v1/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"), 411, None, "Content-Length");
    refused(
        &raw(b"POST /v1/completions HTTP/1.1\r\nContent-Length: 99999999\r\n\r\n"),
        413,
        None,
        "at most 4194304 bytes, got 99999999",
    );
    refused(&raw(format!("GET /{} HTTP/1.1\r\n", "a".repeat(20_000)).as_bytes()), 431, None, "at most 16384 bytes");
    // It is as well as before.
    check(&server.completions(&scoring(json!([[0, 5]])))["choices"][0], &network(&place), &[0, 5]);
}

#[test]
fn connections_that_last_pause_and_wait() {
    let place = Place::new();
    let (server, network) = (Server::start(&place, SERVE), network(&place));
    let body = scoring(json!([[0, 5, 9]])).to_string();
    let mut stream = server.connect();
    for _ in 0..3 {
        send(&mut stream, "POST", "/v1/completions", &body);
        let answer = receive(&stream);
        assert_eq!(answer.headers["connection"], "keep-alive");
        check(&answer.body["choices"][0], &network, &[0, 5, 9]);
    }
    // A refusal does not end it.
    send(&mut stream, "POST", "/v1/completions", "[]");
    assert_eq!(receive(&stream).status, 400);
    // In pieces; told to go on.
    let head = format!("POST /v1/completions HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: {}\r\n\r\n", body.len());
    for part in head.as_bytes().chunks(20) {
        stream.write_all(part).unwrap();
        std::thread::sleep(Duration::from_millis(5));
    }
    let mut go_on = [0; 25];
    stream.read_exact(&mut go_on).unwrap();
    assert_eq!(&go_on, b"HTTP/1.1 100 Continue\r\n\r\n");
    for part in body.as_bytes().chunks(30) {
        stream.write_all(part).unwrap();
        std::thread::sleep(Duration::from_millis(5));
    }
    check(&receive(&stream).body["choices"][0], &network, &[0, 5, 9]);
    // Closed where that is asked.
    stream.write_all(b"GET /v1/models HTTP/1.1\r\nConnection: close\r\n\r\n").unwrap();
    assert_eq!(receive(&stream).headers["connection"], "close");
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
}

#[test]
fn a_thousand_at_once() {
    let place = Place::new();
    let (server, network) = (Server::start(&place, SERVE), network(&place));
    let resident = || {
        let status = std::fs::read_to_string(format!("/proc/{}/status", server.child.id())).unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).map(str::trim);
        line.and_then(|line| line.split(' ').next()?.parse::<usize>().ok()).unwrap_or(0)
    };
    server.completions(&scoring(json!([[0, 5, 9]])));
    let before = resident();
    let answers = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..1000_u32)
            .map(|i| {
                let server = &server;
                let ask = move || (i, server.completions(&scoring(json!([[0, i % 32, i / 32], [i % 31]]))));
                std::thread::Builder::new().stack_size(256 << 10).spawn_scoped(scope, ask).unwrap()
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
    });
    assert_eq!(answers.len(), 1000);
    // Each got its own.
    for (i, answer) in &answers {
        let tokens = answer["choices"][0]["logprobs"]["tokens"].as_array().unwrap();
        let word = |id: u32| if id < 2 { ["<s>", "?"][id as usize].to_string() } else { format!("w{}", id - 2) };
        assert_eq!(tokens[1..3], [word(i % 32), word(i / 32)].map(Value::from));
        if i % 100 == 0 {
            check(&answer["choices"][0], &network, &[0, i % 32, i / 32]);
        }
    }
    let grown = resident().saturating_sub(before);
    assert!(grown < 256 << 10, "{grown} KiB more");
}

#[test]
fn a_client_that_hangs_up_costs_a_line() {
    let place = Place::new();
    let server = Server::start(&place, SERVE);
    let (body, count) = long();
    let mut first = server.connect();
    send(&mut first, "POST", "/v1/completions", &body);
    // While that is computed: one leaves without its answer, one in the middle of its request, one without a word.
    let mut waits = server.connect();
    send(&mut waits, "POST", "/v1/completions", &body);
    waits.shutdown(Shutdown::Both).unwrap();
    let mut half = server.connect();
    half.write_all(b"POST /v1/completions HTTP/1.1\r\nContent-Length: 100\r\n\r\n{").unwrap();
    drop((waits, half, server.connect()));
    assert_eq!(receive(&first).body["choices"].as_array().unwrap().len(), count);
    server.completions(&scoring(json!([[0, 5]])));
    #[cfg(unix)]
    {
        let (code, said) = server.stop();
        assert_eq!(code, Some(0), "{said}");
        assert_eq!(said.matches("a client was lost: it left before its answer").count(), 1, "{said}");
        assert_eq!(said.matches("a client was lost: ").count(), 2, "{said}");
        assert!(said.contains("answered 2 requests in "), "{said}");
    }
}

#[test]
fn a_port_in_use_is_one_line() {
    let place = Place::new();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let args = SERVE.replace("--port 0", &format!("--port {port}"));
    place.fails(&args, &[&format!("cannot listen on 127.0.0.1 port {port}: "), "something else listens there"]);
    place.fails(&format!("{SERVE} --host 192.0.2.1"), &["cannot listen on 192.0.2.1 port 0: "]);
    std::fs::remove_file(place.path("model/tokenizer.json")).unwrap();
    place.fails(SERVE, &["tokenizer.json", "No such file"]);
}

#[cfg(unix)]
#[test]
fn sigterm_lets_what_waits_be_answered() {
    let place = Place::new();
    let server = Server::start(&place, SERVE);
    let (body, count) = long();
    let idle = server.connect();
    let mut streams: Vec<_> = (0..3).map(|_| server.connect()).collect();
    streams.iter_mut().for_each(|stream| send(stream, "POST", "/v1/completions", &body));
    std::thread::sleep(Duration::from_millis(300));
    server.signal();
    for stream in &streams {
        let answer = receive(stream);
        assert_eq!(answer.body["choices"].as_array().unwrap().len(), count);
        assert_eq!(answer.headers["connection"], "close");
    }
    let start = Instant::now();
    let mut server = server;
    let code = server.child.wait().unwrap().code();
    let mut said = String::new();
    server.child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    assert!(code == Some(0) && said.contains("answered 3 requests in "), "{code:?} {said}");
    assert!(start.elapsed() < Duration::from_secs(10));
    drop(idle);
}
