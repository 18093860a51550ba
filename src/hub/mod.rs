//! Models by name: `org/name[@revision]` becomes a folder of the local Hugging Face cache. With the feature `hub`, files that the
//! cache lacks are downloaded.
//!
//! The cache is the one that Hugging Face's own libraries use: `models--ORG--NAME/` with `refs/REVISION` (a file that holds a commit),
//! `snapshots/COMMIT/FILE` (links) and `blobs/ETAG` (contents). A model that is there in whole needs no network. Downloads read and
//! write that layout without a client library: hf-hub 1.0 starts an interrupted file from its first byte and depends on an
//! asynchronous runtime; its last synchronous release, 0.5, appends whatever the server answers to what it has and verifies no checksum.

#[cfg(feature = "hub")]
mod download;

use std::fmt::{Display, Formatter};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use crate::{Error, Result};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// Files without which most commands fail.
const NEEDED: [&str; 2] = ["config.json", "tokenizer.json"];

/// A model as the hub calls it: `org/name`, or `org/name@revision`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Name {
    /// `org/name`.
    pub model: String,
    /// A branch, a tag or a commit: `main` unless one was given.
    pub revision: String,
}

impl FromStr for Name {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let (model, revision) = text.split_once('@').unwrap_or((text, "main"));
        let plain = |s: &str| {
            let allowed = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
            !s.is_empty() && !s.starts_with('.') && !s.contains("..") && s.chars().all(allowed)
        };
        let named = model.split_once('/').is_some_and(|(org, name)| plain(org) && plain(name));
        // Branches may have slashes.
        if named && revision.split('/').all(plain) {
            return Ok(Self { model: model.into(), revision: revision.into() });
        }
        Err(Error::argument("model", format!("expected org/name or org/name@revision, got {text:?}")))
    }
}

impl Display for Name {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        match self.revision.as_str() {
            "main" => f.write_str(&self.model),
            revision => write!(f, "{}@{revision}", self.model),
        }
    }
}

impl Name {
    fn fails(&self, message: impl Display) -> Error {
        Error::Hub { model: self.to_string(), message: message.to_string() }
    }
}

/// How far the download of a file is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Download {
    /// Its name in the model's folder.
    pub file: String,
    /// Bytes that are on the disk.
    pub done: u64,
    /// Bytes of the whole file.
    pub total: u64,
}

/// Where models are looked for.
#[derive(Clone, Debug)]
pub struct Hub {
    /// The folder of `models--ORG--NAME`.
    pub cache: PathBuf,
    /// The server, such as `https://huggingface.co`.
    pub endpoint: String,
    /// The access token, for gated and private models.
    pub token: Option<String>,
    /// Nothing is downloaded.
    pub offline: bool,
}

impl Hub {
    /// As the environment says, with the variables of Hugging Face's libraries: `HF_HUB_CACHE`, else `HF_HOME/hub`, else
    /// `XDG_CACHE_HOME/huggingface/hub`, else `~/.cache/huggingface/hub`; `HF_ENDPOINT`; `HF_TOKEN`, else the file `HF_TOKEN_PATH`, else
    /// `HF_HOME/token`; `HF_HUB_OFFLINE`. An empty variable counts as absent.
    pub fn from_env() -> Self {
        Self::from(|name| std::env::var(name).ok())
    }

    fn from(variable: impl Fn(&str) -> Option<String>) -> Self {
        let get = |name: &str| variable(name).map(|text| text.trim().to_string()).filter(|text| !text.is_empty());
        let path = |name: &str| get(name).map(PathBuf::from);
        let user = || std::env::home_dir().unwrap_or_default().join(".cache");
        let home = path("HF_HOME").unwrap_or_else(|| path("XDG_CACHE_HOME").unwrap_or_else(user).join("huggingface"));
        let token_file = path("HF_TOKEN_PATH").unwrap_or_else(|| home.join("token"));
        let stored = || Some(std::fs::read_to_string(token_file).ok()?.trim().to_string()).filter(|token| !token.is_empty());
        Self {
            cache: path("HF_HUB_CACHE").unwrap_or_else(|| home.join("hub")),
            endpoint: get("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".into()).trim_end_matches('/').into(),
            token: get("HF_TOKEN").or_else(stored),
            offline: get("HF_HUB_OFFLINE")
                .is_some_and(|text| ["1", "true", "yes", "on"].contains(&text.to_ascii_lowercase().as_str())),
        }
    }

    /// The folder of a model: from the cache where it is there in whole, otherwise downloaded. `progress` is told of downloads.
    ///
    /// # Errors
    /// [`Error::Hub`]: a model or a revision that is not there, one that is gated, files that are missing while nothing may be
    /// downloaded, a server that cannot be reached, contents of another checksum. [`Error::Io`] where the cache cannot be written.
    pub fn folder(&self, name: &Name, progress: &mut dyn FnMut(&Download)) -> Result<PathBuf> {
        let found = self.cached(name);
        let missing = match &found {
            Some(folder) => missing(folder),
            None => vec![],
        };
        if let Some(folder) = found.as_ref().filter(|_| missing.is_empty()) {
            return Ok(folder.clone());
        }
        // What is there may be all that the model has: some have no tokenizer.json.
        let usable = found.filter(|_| !missing.iter().any(|file| file != "tokenizer.json"));
        if self.offline || cfg!(not(feature = "hub")) {
            let lacks = if missing.is_empty() { String::new() } else { format!(" in whole (it lacks {})", missing.join(", ")) };
            let why =
                if self.offline { "HF_HUB_OFFLINE is set" } else { "this build cannot download (it lacks the feature hub)" };
            let message =
                format!("there is no such folder, the cache {} does not hold it{lacks}, and {why}", self.cache.display());
            return usable.ok_or_else(|| name.fails(message));
        }
        #[cfg(feature = "hub")]
        return match (download::model(self, name, progress), usable) {
            (Err(Error::Hub { .. }), Some(folder)) => Ok(folder),
            (result, _) => result,
        };
        #[cfg(not(feature = "hub"))]
        {
            let _ = progress;
            unreachable!("nothing is downloaded without the feature")
        }
    }

    fn repository(&self, name: &Name) -> PathBuf {
        self.cache.join(format!("models--{}", name.model.replace('/', "--")))
    }

    /// The snapshot of a revision, which may lack files.
    fn cached(&self, name: &Name) -> Option<PathBuf> {
        let repository = self.repository(name);
        let commit = std::fs::read_to_string(repository.join("refs").join(&name.revision)).ok();
        let commit = commit.map_or_else(|| name.revision.clone(), |text| text.trim().to_string());
        let folder = repository.join("snapshots").join(commit);
        folder.is_dir().then_some(folder)
    }
}

/// The files that a snapshot lacks. A link without its target counts as absent.
fn missing(folder: &Path) -> Vec<String> {
    let absent = |file: &str| !folder.join(file).exists();
    let mut missing: Vec<String> = NEEDED.into_iter().filter(|file| absent(file)).map(Into::into).collect();
    if absent(SINGLE) {
        match shards(&folder.join(INDEX)) {
            Some(shards) => missing.extend(shards.into_iter().filter(|file| absent(file))),
            None => missing.push(SINGLE.into()),
        }
    }
    missing
}

/// The files that an index names, each once; none where there is no index, or one without names.
fn shards(index: &Path) -> Option<Vec<String>> {
    let index: serde_json::Value = serde_json::from_slice(&std::fs::read(index).ok()?).ok()?;
    let files = index["weight_map"].as_object()?.values().map(|file| file.as_str().map(Into::into));
    let mut files: Vec<String> = files.collect::<Option<_>>()?;
    files.sort();
    files.dedup();
    (!files.is_empty()).then_some(files)
}

/// The folder that `model` means: a path that exists is that path, and so is what cannot be a name; `org/name` and
/// `org/name@revision` are looked up by [`Hub::folder`], as the environment says ([`Hub::from_env`]).
///
/// # Errors
/// Those of [`Hub::folder`].
pub fn folder(model: &Path, progress: &mut dyn FnMut(&Download)) -> Result<PathBuf> {
    match model.to_str().and_then(|text| text.parse().ok()) {
        Some(name) if !model.exists() => Hub::from_env().folder(&name, progress),
        _ => Ok(model.to_path_buf()),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn hub(variables: &[(&str, &str)]) -> Hub {
        Hub::from(|name| variables.iter().find(|(n, _)| *n == name).map(|(_, value)| (*value).to_string()))
    }

    #[test]
    fn names() {
        let name = |text: &str| text.parse::<Name>();
        assert_eq!(name("a/b.c-1").unwrap(), Name { model: "a/b.c-1".into(), revision: "main".into() });
        assert_eq!(name("a/b@refs/pr/1").unwrap().revision, "refs/pr/1");
        for text in ["a/b", "a/b@v1"] {
            assert_eq!(name(text).unwrap().to_string(), text);
        }
        for text in
            ["", "a", "a/", "/b", "a/b/c", "./a", "a/.b", "a b/c", "a/b@", "a/b@../../c", "a/b@x/", "a/b@c@d", "synthetic:a/b"]
        {
            assert!(name(text).is_err(), "{text}");
        }
    }

    #[test]
    fn the_environment() {
        let hub_of = |variables| {
            let Hub { cache, endpoint, offline, .. } = hub(variables);
            (cache.display().to_string(), endpoint, offline)
        };
        let official = "https://huggingface.co".to_string();
        assert_eq!(hub_of(&[("HF_HOME", "/h"), ("HF_HUB_OFFLINE", "0")]), ("/h/hub".into(), official.clone(), false));
        assert_eq!(hub_of(&[("XDG_CACHE_HOME", "/x"), ("HF_HUB_OFFLINE", "ON")]), ("/x/huggingface/hub".into(), official, true));
        let all = [("HF_HOME", "/h"), ("HF_HUB_CACHE", "/c"), ("HF_ENDPOINT", "http://e/"), ("HF_HUB_OFFLINE", "")];
        assert_eq!(hub_of(&all), ("/c".into(), "http://e".into(), false));
        assert!(hub(&[]).cache.ends_with(".cache/huggingface/hub"));

        let place = tempfile::tempdir().unwrap();
        let home = place.path().to_str().unwrap();
        assert_eq!(hub(&[("HF_HOME", home)]).token, None);
        fs::write(place.path().join("token"), "stored\n").unwrap();
        fs::write(place.path().join("other"), "other").unwrap();
        assert_eq!(hub(&[("HF_HOME", home)]).token.as_deref(), Some("stored"));
        let other = place.path().join("other");
        assert_eq!(hub(&[("HF_HOME", home), ("HF_TOKEN_PATH", other.to_str().unwrap())]).token.as_deref(), Some("other"));
        assert_eq!(hub(&[("HF_HOME", home), ("HF_TOKEN", "given")]).token.as_deref(), Some("given"));
    }

    #[test]
    fn a_whole_model_of_the_cache_needs_no_network() {
        let place = tempfile::tempdir().unwrap();
        let hub = hub(&[("HF_HUB_CACHE", place.path().to_str().unwrap()), ("HF_HUB_OFFLINE", "1")]);
        let repository = place.path().join("models--a--b");
        let snapshot = repository.join("snapshots/0123");
        let folder = |name: &str| hub.folder(&name.parse().unwrap(), &mut |_| panic!("a download"));
        let fails = |name: &str, parts: &[&str]| {
            let message = folder(name).unwrap_err().to_string();
            assert!(parts.iter().all(|part| message.contains(part)), "{message}");
        };
        fails("a/b", &["a/b: there is no such folder", "does not hold it, and HF_HUB_OFFLINE is set"]);
        fs::create_dir_all(&snapshot).unwrap();
        fs::create_dir_all(repository.join("refs")).unwrap();
        fs::write(repository.join("refs/main"), "0123").unwrap();
        fails("a/b", &["lacks config.json, tokenizer.json, model.safetensors)"]);
        fs::write(snapshot.join("config.json"), "{}").unwrap();
        let index = r#"{"weight_map": {"x": "2.safetensors", "y": "1.safetensors", "z": "2.safetensors"}}"#;
        fs::write(snapshot.join(INDEX), index).unwrap();
        fails("a/b", &["lacks tokenizer.json, 1.safetensors, 2.safetensors)"]);
        for shard in ["1.safetensors", "2.safetensors"] {
            fs::write(snapshot.join(shard), "").unwrap();
        }
        assert_eq!(folder("a/b").unwrap(), snapshot); // who has no tokenizer.json hears so from whatever needs it
        assert_eq!(folder("a/b@0123").unwrap(), snapshot);
        fails("a/b@v2", &["a/b@v2: ", "does not hold it, and"]);
        // A link whose blob is gone is not there.
        #[cfg(unix)]
        {
            fs::remove_file(snapshot.join("2.safetensors")).unwrap();
            std::os::unix::fs::symlink("../../blobs/gone", snapshot.join("2.safetensors")).unwrap();
            fails("a/b", &["lacks tokenizer.json, 2.safetensors)"]);
        }
    }
}
