//! Downloads from the hub: which files, each one resumed where an earlier download of it stopped.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;
use sha2::{Digest, Sha256};
use ureq::config::RedirectAuthHeaders;
use ureq::http::{Response, StatusCode};
use ureq::{Agent, Body};

use super::{Download, Hub, INDEX, Name, SINGLE, shards};
use crate::{Error, Result, io};

/// Small files that a model folder may hold and this crate reads; `config.json` must be there.
const SMALL: [&str; 6] = [
    "config.json",
    "tokenizer.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
];
/// Connections that bring nothing before a file is given up.
const ATTEMPTS: usize = 4;
/// How long the server may be silent.
const SILENCE: Duration = Duration::from_secs(30);
/// Redirects within the server before its answer about a file.
const REDIRECTS: usize = 5;
/// The longest list of files that is read, in bytes.
const LIST: u64 = 16 << 20;

/// What went wrong with one connection: worth another, or final.
enum Fault {
    Again(String),
    Final(Error),
}

impl From<Error> for Fault {
    fn from(e: Error) -> Self {
        Self::Final(e)
    }
}

/// Downloads what the cache lacks of a model, and returns its snapshot.
pub(super) fn model(hub: &Hub, name: &Name, progress: &mut dyn FnMut(&Download)) -> Result<PathBuf> {
    let mut client = Client { agent: agent(), hub, name, progress };
    let info = client.info()?;
    let text = |value: &Value, what: &str| {
        value.as_str().map(String::from).ok_or_else(|| name.fails(format!("the server names no {what}")))
    };
    let commit = text(&info["sha"], "commit")?;
    if commit.is_empty() || !commit.bytes().all(|b| b.is_ascii_alphanumeric()) {
        return Err(name.fails(format!("expected a commit from the server, got {:?}", io::short(commit))));
    }
    let listed = info["siblings"].as_array().ok_or_else(|| name.fails("the server lists no files"))?;
    let listed: Vec<&str> = listed.iter().filter_map(|file| file["rfilename"].as_str()).collect();
    if !listed.contains(&"config.json") {
        return Err(name.fails("expected a model, but there is no config.json among its files"));
    }
    let repository = hub.repository(name);
    let snapshot = repository.join("snapshots").join(&commit);
    fs::create_dir_all(&snapshot).map_err(Error::io(&snapshot))?;
    let mut get = |file: &str| client.file(&repository, &snapshot, &commit, file);
    for file in SMALL.into_iter().filter(|file| listed.contains(file)) {
        get(file)?;
    }
    if listed.contains(&SINGLE) {
        get(SINGLE)?;
    } else if listed.contains(&INDEX) {
        get(INDEX)?;
        let index = snapshot.join(INDEX);
        for shard in shards(&index).ok_or_else(|| Error::format(&index, "expected the names of shards under weight_map"))? {
            if !listed.contains(&shard.as_str()) || Path::new(&shard).file_name() != Some(shard.as_ref()) {
                return Err(name.fails(format!("{INDEX} names {:?}, which is not among its files", io::short(shard))));
            }
            get(&shard)?;
        }
    } else {
        return Err(name.fails(format!("it has neither {SINGLE} nor {INDEX}; other formats of weights are not read")));
    }
    if name.revision != commit {
        // Last, so that the revision means a whole snapshot.
        let reference = repository.join("refs").join(&name.revision);
        let folder = io::folder_of(&reference);
        fs::create_dir_all(folder).map_err(Error::io(folder))?;
        io::write_atomically(&reference, |out| out.write_all(commit.as_bytes()))?;
    }
    Ok(snapshot)
}

fn agent() -> Agent {
    let config = Agent::config_builder().user_agent(concat!("spinquant/", env!("CARGO_PKG_VERSION"))).http_status_as_error(false);
    // The token goes to the hub alone, not to the stores that it redirects to.
    let config = config.redirect_auth_headers(RedirectAuthHeaders::SameHost).timeout_connect(Some(SILENCE));
    config.timeout_recv_response(Some(SILENCE)).timeout_per_read(Some(SILENCE)).build().into()
}

/// A file as the hub describes it.
struct Description {
    etag: String,
    size: u64,
}

struct Client<'a> {
    agent: Agent,
    hub: &'a Hub,
    name: &'a Name,
    progress: &'a mut dyn FnMut(&Download),
}

impl Client<'_> {
    /// Runs `attempt` again as long as it fails in a way that may pass.
    fn repeat<T>(&mut self, mut attempt: impl FnMut(&mut Self, &mut bool) -> Result<T, Fault>) -> Result<T> {
        let mut failures = 0;
        loop {
            let mut advanced = false;
            match attempt(self, &mut advanced) {
                Ok(value) => return Ok(value),
                Err(Fault::Final(e)) => return Err(e),
                Err(Fault::Again(message)) => {
                    failures = if advanced { 1 } else { failures + 1 };
                    if failures >= ATTEMPTS {
                        return Err(self.name.fails(message));
                    }
                    std::thread::sleep(Duration::from_millis(200 << failures));
                }
            }
        }
    }

    /// One request; `redirected` follows redirects to other servers.
    fn send(&self, method: &str, url: &str, from: u64, redirected: bool) -> Result<Response<Body>, Fault> {
        let build = || {
            let request = ureq::http::Request::builder().method(method).uri(url).header("accept-encoding", "identity");
            let request = if from > 0 { request.header("range", format!("bytes={from}-")) } else { request };
            let token = self.hub.token.iter().fold(request, |r, token| r.header("authorization", format!("Bearer {token}")));
            token.body(())
        };
        let request = build().map_err(|e| Fault::Final(self.name.fails(format!("no request can be made to {url}: {e}"))))?;
        let agent = &self.agent;
        let result = match redirected {
            true => agent.run(request),
            false => agent.run(agent.configure_request(request).max_redirects(0).max_redirects_will_error(false).build()),
        };
        result.map_err(|e| Fault::Again(format!("{} cannot be reached: {}", self.hub.endpoint, io::short(e))))
    }

    /// The answer itself, or what its status means.
    fn checked(&self, response: Response<Body>, what: &str) -> Result<Response<Body>, Fault> {
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let Hub { endpoint, token, .. } = self.hub;
        let Name { model, revision } = self.name;
        let code = header(&response, "x-error-code").unwrap_or_default();
        let account = if token.is_some() { "the account of this token" } else { "HF_TOKEN, which is not set" };
        let message = match (status, code) {
            (StatusCode::NOT_FOUND, "RevisionNotFound") => format!("there is no revision {revision:?} on {endpoint}"),
            (StatusCode::NOT_FOUND, "EntryNotFound") => format!("there is no {what} in it on {endpoint}"),
            (StatusCode::FORBIDDEN, _) | (StatusCode::UNAUTHORIZED, "GatedRepo") => {
                format!("it is gated: {endpoint}/{model} says how to get access; then it needs {account} ({status})")
            }
            (StatusCode::UNAUTHORIZED | StatusCode::NOT_FOUND, _) => format!(
                "there is no such folder, and {endpoint} shows no such model ({status}); a private or gated one needs {account}"
            ),
            _ if status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS => {
                return Err(Fault::Again(format!("{endpoint} answers {status} for {what}")));
            }
            _ => format!("{endpoint} answers {status} for {what}"),
        };
        Err(Fault::Final(self.name.fails(message)))
    }

    /// The commit of the revision, and the names of its files.
    fn info(&mut self) -> Result<Value> {
        let Name { model, revision } = self.name;
        let url = format!("{}/api/models/{model}/revision/{}", self.hub.endpoint, revision.replace('/', "%2F"));
        self.repeat(|client, _| {
            let response = client.checked(client.send("GET", &url, 0, true)?, "its list of files")?;
            let mut text = vec![];
            let read = response.into_body().into_reader().take(LIST).read_to_end(&mut text);
            read.map_err(|e| Fault::Again(format!("its list of files: {e}")))?;
            let value = serde_json::from_slice(&text);
            value.map_err(|e| Fault::Final(client.name.fails(format!("{url} answers no JSON: {}", io::short(e)))))
        })
    }

    /// What the hub itself says of a file, whichever store it redirects to.
    fn describe(&mut self, url: &str, file: &str) -> Result<Description> {
        self.repeat(|client, _| {
            let mut url = url.to_string();
            for _ in 0..REDIRECTS {
                let response = client.send("HEAD", &url, 0, false)?;
                let redirect = header(&response, "location").filter(|_| response.status().is_redirection());
                // Relative: another name on the same server. Otherwise this answer describes the file.
                if let Some(path) = redirect.filter(|to| to.starts_with('/')) {
                    url = format!("{}{path}", client.hub.endpoint);
                    continue;
                }
                let response = if redirect.is_some() { response } else { client.checked(response, file)? };
                let etag = header(&response, "x-linked-etag").or_else(|| header(&response, "etag")).unwrap_or_default();
                let etag = etag.trim_start_matches("W/").trim_matches('"').to_string();
                let size = header(&response, "x-linked-size").or_else(|| header(&response, "content-length"));
                let size = size.and_then(|text| text.parse().ok());
                let named = !etag.is_empty() && etag.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
                let (Some(size), true) = (size, named) else {
                    return Err(Fault::Final(client.name.fails(format!("expected the size and the ETag of {file} from {url}"))));
                };
                return Ok(Description { etag, size });
            }
            Err(Fault::Final(client.name.fails(format!("{url} redirects without an end"))))
        })
    }

    /// Makes sure that a file of the snapshot is there.
    fn file(&mut self, repository: &Path, snapshot: &Path, commit: &str, file: &str) -> Result<()> {
        let pointer = snapshot.join(file);
        if pointer.exists() {
            return Ok(());
        }
        let url = format!("{}/{}/resolve/{commit}/{file}", self.hub.endpoint, self.name.model);
        let Description { etag, size } = self.describe(&url, file)?;
        let blob = repository.join("blobs").join(&etag);
        let make = |path: &Path| fs::create_dir_all(io::folder_of(path)).map_err(Error::io(path));
        make(&blob)?;
        // The lock of Hugging Face's own client: one download of a file at a time.
        let folder = repository.file_name().unwrap_or_default();
        let lock = self.hub.cache.join(".locks").join(folder).join(format!("{etag}.lock"));
        make(&lock)?;
        let held = OpenOptions::new().create(true).truncate(false).write(true).open(&lock).map_err(Error::io(&lock))?;
        held.lock().map_err(Error::io(&lock))?;
        if !blob.exists() {
            let part = blob.with_file_name(format!("{etag}.incomplete"));
            self.repeat(|client, advanced| client.continued(&url, file, size, &part, advanced))?;
            check(self.name, file, &part, &etag, size)?;
            fs::rename(&part, &blob).map_err(Error::io(&blob))?;
        }
        link(&blob, &pointer).map_err(Error::io(&pointer))
    }

    /// Appends to what is there of a file until it is whole.
    fn continued(&mut self, url: &str, file: &str, size: u64, part: &Path, advanced: &mut bool) -> Result<(), Fault> {
        let mut out = OpenOptions::new().append(true).create(true).open(part).map_err(Error::io(part))?;
        let mut done = out.metadata().map_err(Error::io(part))?.len();
        if done > size {
            restart(&mut out, part)?;
            done = 0;
        }
        let mut told = Download { file: file.into(), done, total: size };
        (self.progress)(&told);
        if done == size {
            return Ok(());
        }
        let response = self.checked(self.send("GET", url, done, true)?, file)?;
        let starts = header(&response, "content-range").is_some_and(|range| range.starts_with(&format!("bytes {done}-")));
        if done > 0 && !(response.status() == StatusCode::PARTIAL_CONTENT && starts) {
            restart(&mut out, part)?; // a server that sends the whole
            told.done = 0;
        }
        let mut reader = response.into_body().into_reader();
        let mut buffer = vec![0; 1 << 18];
        loop {
            let read = reader.read(&mut buffer).map_err(|e| Fault::Again(format!("the download of {file} broke off: {e}")))?;
            if read == 0 {
                break;
            }
            out.write_all(&buffer[..read]).map_err(Error::io(part))?;
            *advanced = true;
            told.done += read as u64;
            (self.progress)(&told);
        }
        if told.done < size {
            return Err(Fault::Again(format!("the download of {file} broke off: expected {size} bytes, got {}", told.done)));
        }
        out.sync_all().map_err(Error::io(part))?;
        Ok(())
    }
}

fn header<'a>(response: &'a Response<Body>, name: &str) -> Option<&'a str> {
    response.headers().get(name)?.to_str().ok()
}

fn restart(out: &mut File, part: &Path) -> Result<()> {
    out.set_len(0).map_err(Error::io(part))
}

/// Holds a file against its length, and against its SHA-256 where that is its ETag, as it is for large files.
fn check(name: &Name, file: &str, part: &Path, etag: &str, size: u64) -> Result<()> {
    let length = fs::metadata(part).map_err(Error::io(part))?.len();
    let mut wrong = (length != size).then(|| format!("expected {size} bytes of {file}, got {length}"));
    if wrong.is_none() && etag.len() == 64 {
        let mut digest = Sha256::new();
        let mut reader = File::open(part).map_err(Error::io(part))?;
        let mut buffer = vec![0; 1 << 20];
        loop {
            match reader.read(&mut buffer).map_err(Error::io(part))? {
                0 => break,
                read => digest.update(&buffer[..read]),
            }
        }
        let got = io::hex(&digest.finalize());
        wrong = (got != etag).then(|| format!("expected SHA-256 {etag} of {file}, got {got}"));
    }
    let Some(message) = wrong else { return Ok(()) };
    fs::remove_file(part).map_err(Error::io(part))?;
    Err(name.fails(format!("{message}; it was removed, and the next start downloads it again")))
}

/// Makes `pointer` show the blob: by a relative link, or by moving the blob where there are no links. What is there already, a link whose
/// blob was gone, is right again.
fn link(blob: &Path, pointer: &Path) -> std::io::Result<()> {
    if pointer.exists() {
        return Ok(());
    }
    #[cfg(unix)]
    {
        let target = Path::new("../../blobs").join(blob.file_name().unwrap_or_default());
        if pointer.symlink_metadata().is_ok() {
            fs::remove_file(pointer)?;
        }
        std::os::unix::fs::symlink(target, pointer)
    }
    #[cfg(not(unix))]
    fs::rename(blob, pointer)
}
