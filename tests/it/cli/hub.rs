//! Models by name, from a server on loopback that speaks the hub's routes.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use sha2::{Digest, Sha256};

use super::*;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const EVAL_NAME: &str = "eval --model org/tiny --device cpu --seq-len 16 --text text.txt --json";

/// What the server holds and how it behaves.
#[derive(Default)]
struct State {
    files: HashMap<String, Vec<u8>>,
    /// Names that it lists besides its files.
    listed: Vec<String>,
    /// Answers every request so: status line, `x-error-code`.
    refuses: Option<(&'static str, &'static str)>,
    /// Closes connections for contents after as many bytes.
    cuts: Vec<usize>,
    ignores_range: bool,
    /// Method, path, range, token of every request.
    log: Vec<[String; 4]>,
}

/// The hub, until the end of the test program.
#[derive(Clone)]
struct Server {
    port: u16,
    state: Arc<Mutex<State>>,
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}

impl Server {
    /// Serves the files of a folder.
    fn of(folder: &Path) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let files = std::fs::read_dir(folder).unwrap().map(|entry| {
            let entry = entry.unwrap();
            (entry.file_name().into_string().unwrap(), std::fs::read(entry.path()).unwrap())
        });
        let state = State { files: files.collect(), ..State::default() };
        let server = Self { port: listener.local_addr().unwrap().port(), state: Arc::new(Mutex::new(state)) };
        let other = server.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let server = other.clone();
                std::thread::spawn(move || server.serve(&stream));
            }
        });
        server
    }

    fn serve(&self, mut stream: &TcpStream) -> Option<()> {
        let mut lines = BufReader::new(stream.try_clone().ok()?).lines();
        let first = lines.next()?.ok()?;
        let mut headers = HashMap::new();
        for line in lines.map_while(Result::ok).take_while(|line| !line.is_empty()) {
            let (name, value) = line.split_once(": ")?;
            headers.insert(name.to_ascii_lowercase(), value.to_string());
        }
        let mut words = first.split(' ');
        let (method, path) = (words.next()?.to_string(), words.next()?.to_string());
        let header = |name: &str| headers.get(name).cloned().unwrap_or_default();
        let (range, token) = (header("range"), header("authorization"));
        let mut state = self.state.lock().unwrap();
        state.log.push([method.clone(), path.clone(), range.clone(), token]);
        let mut answer = |status: &str, headers: &str, body: &[u8]| {
            let head = format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\nconnection: close\r\n{headers}\r\n", body.len());
            stream.write_all(head.as_bytes()).ok()?;
            stream.write_all(if method == "HEAD" { &[] } else { body }).ok()
        };
        if let Some((status, code)) = state.refuses {
            return answer(status, &format!("x-error-code: {code}\r\n"), b"no");
        }
        if let Some(revision) = path.strip_prefix("/api/models/org/tiny/revision/") {
            if !["main", "refs%2Fpr%2F1", COMMIT].contains(&revision) {
                return answer("404 Not Found", "x-error-code: RevisionNotFound\r\n", b"");
            }
            let names = state.files.keys().chain(&state.listed).map(|name| json!({"rfilename": name}));
            let info = json!({"sha": COMMIT, "siblings": names.collect::<Vec<_>>()});
            return answer("200 OK", "", info.to_string().as_bytes());
        }
        let commit = format!("x-repo-commit: {COMMIT}\r\n");
        if let Some(file) = path.strip_prefix(&format!("/org/tiny/resolve/{COMMIT}/")) {
            let Some(bytes) = state.files.get(file).cloned() else {
                return answer("404 Not Found", "x-error-code: EntryNotFound\r\n", b"");
            };
            if file.ends_with(".safetensors") {
                // In a store on another host. The redirect within the hub is what a renamed model gets.
                let to = format!("location: http://localhost:{}/store/{file}\r\n", self.port);
                let linked = format!("x-linked-etag: \"{}\"\r\nx-linked-size: {}\r\n", sha256(&bytes), bytes.len());
                return answer("302 Found", &format!("{commit}{to}{linked}"), b"");
            }
            return answer("200 OK", &format!("{commit}etag: W/\"{}\"\r\n", &sha256(&bytes)[..40]), &bytes);
        }
        let bytes = state.files.get(path.strip_prefix("/store/")?)?.clone();
        let from = range.strip_prefix("bytes=").and_then(|r| r.strip_suffix('-')?.parse().ok()).filter(|_| !state.ignores_range);
        let (status, from) = from.map_or(("200 OK", 0), |from: usize| ("206 Partial Content", from));
        let range = format!("content-range: bytes {from}-{}/{}\r\n", bytes.len() - 1, bytes.len());
        if let Some(cut) = state.cuts.pop() {
            let head = format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\n{range}\r\n", bytes.len() - from);
            stream.write_all(head.as_bytes()).ok()?;
            return stream.write_all(&bytes[from..][..cut]).ok();
        }
        answer(status, if from > 0 { &range } else { "" }, &bytes[from..])
    }

    fn set(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state.lock().unwrap());
    }

    /// What was asked for since the last call.
    fn log(&self) -> Vec<[String; 4]> {
        std::mem::take(&mut self.state.lock().unwrap().log)
    }

    /// A run against this server.
    fn run(&self, place: &Place, args: &str, token: Option<&str>) -> Output {
        let mut command = place.command(args);
        command.env("HF_HUB_OFFLINE", "0").env("HF_ENDPOINT", format!("http://127.0.0.1:{}", self.port));
        command.envs(token.map(|token| ("HF_TOKEN", token))).output().unwrap()
    }

    fn json(&self, place: &Place) -> Value {
        let out = self.run(place, EVAL_NAME, None);
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        serde_json::from_slice(&out.stdout).unwrap()
    }

    /// A run that fails with one line.
    fn fails(&self, place: &Place, model: &str, token: Option<&str>, parts: &[&str]) {
        let out = self.run(place, &EVAL_NAME.replace("org/tiny", model), token);
        let stderr = String::from_utf8_lossy(&out.stderr);
        let errors: Vec<_> = stderr.lines().filter(|line| line.starts_with("error: ")).collect();
        assert!(out.status.code() == Some(1) && out.stdout.is_empty() && errors.len() == 1, "{model}: {stderr}");
        assert!(parts.iter().all(|part| errors[0].contains(part)), "{model}: {:?} lacks one of {parts:?}", errors[0]);
    }
}

fn repository(place: &Place) -> PathBuf {
    place.path("huggingface/hub/models--org--tiny")
}

/// A run whose model is there in whole: nothing is asked of anybody.
fn offline(place: &Place) -> Value {
    place.json(EVAL_NAME)
}

#[test]
fn a_model_is_downloaded_once() {
    let place = Place::new();
    let server = Server::of(&place.path("model"));
    for file in ["pytorch_model.bin", "onnx/model.onnx", "README.md", "model-00001-of-00002.safetensors"] {
        server.set(|state| drop(state.files.insert(file.into(), b"not needed".to_vec())));
    }
    let want = number(&place.json(&EVAL_NAME.replace("org/tiny", "model")), "perplexity");
    let out = server.run(&place, EVAL_NAME, Some("secret"));
    let stderr = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success() && stderr.contains("downloaded org/tiny to "), "{stderr}");
    assert_eq!(number(&serde_json::from_slice(&out.stdout).unwrap(), "perplexity"), want);

    let log = server.log();
    let files: Vec<_> =
        log.iter().filter(|[method, ..]| method == "GET").map(|[_, path, ..]| path.rsplit('/').next().unwrap()).collect();
    assert_eq!(files[..3], ["main", "config.json", "tokenizer.json"]);
    assert!(files[3..].iter().all(|file| *file == "model.safetensors"), "{files:?}");
    // The token is for the hub alone.
    for [_, path, _, token] in &log {
        assert_eq!(token, if path.starts_with("/store/") { "" } else { "Bearer secret" }, "{path}");
    }
    assert!(log.iter().any(|[_, path, ..]| path.starts_with("/store/")), "{log:?}");

    // The layout of Hugging Face's own client.
    let (repository, sha) = (repository(&place), sha256(&place.read("model/model.safetensors")));
    assert_eq!(std::fs::read_to_string(repository.join("refs/main")).unwrap(), COMMIT);
    assert_eq!(std::fs::read(repository.join("blobs").join(&sha)).unwrap(), place.read("model/model.safetensors"));
    #[cfg(unix)]
    {
        let link = std::fs::read_link(repository.join("snapshots").join(COMMIT).join("model.safetensors")).unwrap();
        assert_eq!(link, Path::new("../../blobs").join(&sha));
    }
    assert_eq!(number(&server.json(&place), "perplexity"), want);
    assert!(server.log().is_empty(), "a model that is there in whole was asked for");
    assert_eq!(number(&offline(&place), "perplexity"), want);
    place.json(&EVAL_NAME.replace("org/tiny", &format!("org/tiny@{COMMIT}")));
    // A folder of that name is meant first.
    std::fs::create_dir_all(place.path("org/tiny")).unwrap();
    place.fails(EVAL_NAME, &["org/tiny/config.json", "expected the folder of a model"]);
}

#[test]
fn a_download_continues_where_it_broke_off() {
    let place = Place::new();
    let server = Server::of(&place.path("model"));
    let bytes = place.read("model/model.safetensors");
    let part = repository(&place).join("blobs").join(format!("{}.incomplete", sha256(&bytes)));
    let ranges = || -> Vec<String> {
        let stored = server.log().into_iter().filter(|[_, path, ..]| path.starts_with("/store/"));
        stored.map(|[_, _, range, _]| range).collect()
    };
    // Within a run.
    server.set(|state| state.cuts = vec![500, 1000]);
    server.json(&place);
    assert_eq!(ranges(), ["", "bytes=1000-", "bytes=1500-"]);
    let start_again = |first: &[u8]| {
        std::fs::remove_dir_all(place.path("huggingface")).unwrap();
        std::fs::create_dir_all(part.parent().unwrap()).unwrap();
        std::fs::write(&part, first).unwrap();
    };
    // From an earlier run; all of it; from a server that cannot; more than there is.
    for (first, ignores, asked) in [
        (&bytes[..2000], false, vec!["bytes=2000-"]),
        (&bytes, false, vec![]),
        (&bytes[..2000], true, vec!["bytes=2000-"]),
        (&[&bytes[..], b"more"].concat(), false, vec![""]),
    ] {
        start_again(first);
        server.set(|state| state.ignores_range = ignores);
        server.json(&place);
        assert_eq!(ranges(), asked);
        assert!(!part.exists());
    }
    server.set(|state| state.ignores_range = false);
    // What was there is something else: said, removed, and then right.
    start_again(b"something else");
    server.fails(&place, "org/tiny", None, &["org/tiny: expected SHA-256", "of model.safetensors, got", "was removed"]);
    assert!(!part.exists());
    server.json(&place);
    // A store that sends nothing is given up, and what is there stays.
    start_again(&bytes[..2000]);
    server.set(|state| state.cuts = vec![0; 99]);
    server.fails(&place, "org/tiny", None, &["org/tiny: the download of model.safetensors broke off"]);
    assert_eq!(std::fs::read(&part).unwrap(), bytes[..2000]);
    assert!(!repository(&place).join("refs/main").exists());
    server.set(|state| state.cuts = vec![]);
    server.json(&place);
}

#[test]
fn shards_and_revisions() {
    let place = Place::new();
    let want = number(&place.json(&EVAL_NAME.replace("org/tiny", "model")), "perplexity");
    let (first, second): (Tensors, Tensors) = tensors().into_iter().partition(|(name, _)| name.contains("layers.0"));
    std::fs::remove_file(place.path("model/model.safetensors")).unwrap();
    let mut names = serde_json::Map::new();
    for (file, tensors) in [("a.safetensors", &first), ("b.safetensors", &second)] {
        write(&place.path("model").join(file), tensors, Dtype::F32);
        names.extend(tensors.keys().map(|name| (name.clone(), json!(file))));
    }
    let index = |names: &serde_json::Map<String, Value>| json!({"weight_map": names}).to_string().into_bytes();
    std::fs::write(place.path("model/model.safetensors.index.json"), index(&names)).unwrap();
    let server = Server::of(&place.path("model"));
    let out = server.run(&place, &EVAL_NAME.replace("org/tiny", "org/tiny@refs/pr/1"), None);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    assert_eq!(number(&serde_json::from_slice(&out.stdout).unwrap(), "perplexity"), want);
    assert_eq!(std::fs::read_to_string(repository(&place).join("refs/refs/pr/1")).unwrap(), COMMIT);
    assert!(!repository(&place).join("refs/main").exists());
    // Nothing outside the model's folder is written.
    for shard in ["../../../evil.safetensors", "absent.safetensors"] {
        std::fs::remove_dir_all(place.path("huggingface")).unwrap();
        names.insert("lm_head.weight".into(), json!(shard));
        server.set(|state| {
            state.files.insert("model.safetensors.index.json".into(), index(&names));
            state.listed = vec!["../../../evil.safetensors".into()];
        });
        server.fails(&place, "org/tiny", None, &["org/tiny: model.safetensors.index.json names", shard, "not among its files"]);
    }
}

#[test]
fn what_cannot_be_had_is_one_line() {
    let place = Place::new();
    let server = Server::of(&place.path("model"));
    let refuses = |status, code| server.set(|state| state.refuses = Some((status, code)));
    let here = format!("http://127.0.0.1:{}", server.port);
    server.fails(&place, "org/tiny@v9", None, &["org/tiny@v9: there is no revision \"v9\" on", &here]);
    let access = "it is gated: http://127.0.0.1:";
    refuses("403 Forbidden", "GatedRepo");
    server.fails(&place, "org/tiny", Some("x"), &["org/tiny: ", access, "then it needs the account of this token (403"]);
    refuses("401 Unauthorized", "GatedRepo");
    server.fails(&place, "org/tiny", None, &[access, "/org/tiny says how", "then it needs HF_TOKEN, which is not set (401"]);
    let absent = "there is no such folder, and http://127.0.0.1:";
    refuses("401 Unauthorized", "RepoNotFound");
    server.fails(&place, "org/absent", None, &["org/absent: ", absent, "shows no such model (401", "HF_TOKEN"]);
    refuses("404 Not Found", "RepoNotFound");
    server.fails(&place, "org/absent", Some("x"), &[absent, "shows no such model (404"]);
    refuses("503 Service Unavailable", "");
    server.fails(&place, "org/tiny", None, &["answers 503 Service Unavailable for its list of files"]);
    server.set(|state| state.refuses = None);
    let weights = server.state.lock().unwrap().files.remove("model.safetensors").unwrap();
    server.fails(&place, "org/tiny", None, &["it has neither model.safetensors nor model.safetensors.index.json"]);
    server.set(|state| state.listed.push("model.safetensors".into()));
    server.fails(&place, "org/tiny", None, &["there is no model.safetensors in it"]);
    // Offline, what is missing of what is there.
    place.fails(EVAL_NAME, &["org/tiny: there is no such folder, the cache ", "does not hold it, and HF_HUB_OFFLINE is set"]);
    std::fs::create_dir_all(repository(&place).join("refs")).unwrap();
    std::fs::write(repository(&place).join("refs/main"), COMMIT).unwrap();
    place.fails(EVAL_NAME, &["does not hold it in whole (it lacks model.safetensors), and HF_HUB_OFFLINE is set"]);
    server.set(|state| drop(state.files.insert("model.safetensors".into(), weights)));
    server.json(&place);
    // Nobody there.
    std::fs::remove_dir_all(place.path("huggingface")).unwrap();
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let nobody = Server { port: closed, state: server.state.clone() };
    nobody.fails(&place, "org/tiny", None, &["org/tiny: http://127.0.0.1:", "cannot be reached: "]);
    // What is no name is a path.
    server.fails(&place, "./org/tiny", None, &["org/tiny/config.json", "No such file or directory"]);
}

#[test]
fn a_kill_in_the_middle_keeps_what_came() {
    let place = Place::new();
    let server = Server::of(&place.path("model"));
    let bytes = place.read("model/model.safetensors");
    // A store that sends a part and is silent then.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let to = format!("http://127.0.0.1:{}", silent.local_addr().unwrap().port());
    let (hub, sent) = (server.clone(), bytes.clone());
    std::thread::spawn(move || {
        let mut held = vec![];
        for mut stream in silent.incoming().flatten() {
            let mut head = vec![0; 4096];
            let read = stream.read(&mut head).unwrap();
            let head = String::from_utf8_lossy(&head[..read]).into_owned();
            if head.starts_with("GET") && head.contains("model.safetensors ") {
                let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", sent.len());
                stream.write_all(answer.as_bytes()).unwrap();
                stream.write_all(&sent[..3000]).unwrap();
                held.push(stream);
                continue;
            }
            // Everything else is the other server's.
            let mut other = TcpStream::connect(("127.0.0.1", hub.port)).unwrap();
            other.write_all(head.as_bytes()).unwrap();
            let _ = std::io::copy(&mut other, &mut stream);
        }
    });
    let mut command = place.command(EVAL_NAME);
    let mut child = command.env("HF_HUB_OFFLINE", "0").env("HF_ENDPOINT", to).spawn().unwrap();
    let part = repository(&place).join("blobs").join(format!("{}.incomplete", sha256(&bytes)));
    while part.metadata().map_or(0, |m| m.len()) < 3000 {
        assert!(child.try_wait().unwrap().is_none(), "it ended early");
        std::thread::sleep(Duration::from_millis(10));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    server.log();
    server.json(&place);
    assert!(server.log().iter().any(|[_, path, range, _]| path.starts_with("/store/") && range == "bytes=3000-"));
}
