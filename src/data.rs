//! Text to token windows: one stream, windows of the context length, and which windows a step uses.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

use crate::{Error, Result, io};

/// Reads a UTF-8 text file.
///
/// # Errors
/// [`Error::Io`], or [`Error::Format`] with the position of the first byte that is not UTF-8.
pub fn read_text(path: impl AsRef<Path>) -> Result<String> {
    let path = path.as_ref();
    let bytes = std::fs::read(path).map_err(Error::io(path))?;
    String::from_utf8(bytes).map_err(|e| {
        Error::format(path, format!("expected UTF-8 text, got something else at byte {}", e.utf8_error().valid_up_to()))
    })
}

/// The token that a text starts with, before its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Bos {
    /// Whatever the tokenizer's post-processor adds, as in transformers; `bos_token_id` of `config.json` plays no part.
    #[default]
    Auto,
    /// None.
    None,
    /// Exactly one of this id, whatever the tokenizer would add.
    Id(u32),
}

impl From<Option<u32>> for Bos {
    fn from(id: Option<u32>) -> Self {
        id.map_or(Self::None, Self::Id)
    }
}

impl FromStr for Bos {
    type Err = Error;
    fn from_str(s: &str) -> Result<Self> {
        match s {
            "auto" => Ok(Self::Auto),
            "none" => Ok(Self::None),
            id => id
                .parse()
                .map(Self::Id)
                .map_err(|_| Error::argument("bos", format!("expected auto, none or a token id, got {s:?}"))),
        }
    }
}

impl fmt::Display for Bos {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.pad("auto"),
            Self::None => f.pad("none"),
            Self::Id(id) => f.pad(&id.to_string()),
        }
    }
}

/// The first token of a text: scores depend on it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct FirstToken {
    /// Its id.
    pub id: u32,
    /// Its string in the vocabulary, where a tokenizer made the text.
    pub token: Option<String>,
}

impl fmt::Display for FirstToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.token {
            Some(token) => write!(f, "{token} (id {})", self.id),
            None => write!(f, "id {}", self.id),
        }
    }
}

/// A model's tokenizer.
#[derive(Debug)]
pub struct Tokenizer {
    tokenizer: tokenizers::Tokenizer,
    /// For messages.
    path: PathBuf,
}

impl Tokenizer {
    /// Reads the `tokenizer.json` of a model directory. Truncation and padding that it asks for are off.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Format`] when it is not there but another kind of tokenizer is, and when it is not a tokenizer.
    pub fn from_dir(dir: impl AsRef<Path>) -> Result<Self> {
        let path = dir.as_ref().join("tokenizer.json");
        match std::fs::read(&path) {
            Ok(bytes) => Self::from_bytes(&bytes, &path),
            Err(e) => match instead_of_tokenizer(dir.as_ref()) {
                Some(hint) if e.kind() == std::io::ErrorKind::NotFound => {
                    Err(Error::format(&path, format!("No such file or directory: {hint}")))
                }
                _ => Err(Error::io(&path)(e)),
            },
        }
    }

    /// The same from the file's bytes; `path` is for messages.
    ///
    /// # Errors
    /// [`Error::Format`] when they are not a tokenizer.
    pub fn from_bytes(bytes: &[u8], path: &Path) -> Result<Self> {
        if let Some(message) = io::lfs_pointer(bytes) {
            return Err(Error::format(path, message));
        }
        let bad = |e: tokenizers::Error| Error::format(path, format!("expected a tokenizer: {}", io::short(e)));
        let mut tokenizer = tokenizers::Tokenizer::from_bytes(bytes).map_err(bad)?;
        tokenizer.with_truncation(None).map_err(bad)?.with_padding(None);
        Ok(Self { tokenizer, path: path.to_path_buf() })
    }

    /// Number of token ids, added tokens included; a model's `vocab_size` is at least this.
    pub fn vocab_size(&self) -> usize {
        self.tokenizer.get_vocab_size(true)
    }

    /// The whole text as one stream of token ids that starts as `bos` says. Encoded in one go: a cut, at a newline say, can change
    /// the tokens around it. With [`Bos::Auto`] the stream is what transformers makes of the text, every special token of the
    /// post-processor included.
    ///
    /// # Errors
    /// [`Error::Format`] when the tokenizer fails.
    pub fn encode_stream(&self, text: &str, bos: impl Into<Bos>) -> Result<Vec<u32>> {
        let bos = bos.into();
        let encoding = self.tokenizer.encode_fast(text, bos == Bos::Auto);
        let encoding = encoding.map_err(|e| Error::format(&self.path, format!("while encoding: {}", io::short(e))))?;
        let ids = encoding.get_ids();
        let added = match bos {
            Bos::Id(id) if ids.first() != Some(&id) => Some(id),
            _ => None,
        };
        Ok(added.into_iter().chain(ids.iter().copied()).collect())
    }

    /// The text of token ids, with the special tokens among them or without.
    ///
    /// # Errors
    /// [`Error::Format`] when the tokenizer fails.
    pub fn decode(&self, ids: &[u32], special: bool) -> Result<String> {
        let failed = |e: tokenizers::Error| Error::format(&self.path, format!("while decoding: {}", io::short(e)));
        self.tokenizer.decode(ids, !special).map_err(failed)
    }

    /// How a token is written in the vocabulary.
    pub fn token(&self, id: u32) -> Option<String> {
        self.tokenizer.id_to_token(id)
    }

    /// A text as windows of `seq_len` tokens, whose [`Windows::first_token`] has a name.
    ///
    /// # Errors
    /// Those of [`Tokenizer::encode_stream`] and [`Windows::new`].
    pub fn windows(&self, text: &str, bos: impl Into<Bos>, seq_len: usize) -> Result<Windows> {
        let mut windows = Windows::new(self.encode_stream(text, bos)?, seq_len)?;
        windows.first = self.tokenizer.id_to_token(windows.tokens[0]).map(Into::into);
        Ok(windows)
    }
}

/// What a folder without `tokenizer.json` holds, and what to do about it.
fn instead_of_tokenizer(dir: &Path) -> Option<String> {
    let found = ["tokenizer.model", "vocab.json"].into_iter().find(|name| dir.join(name).is_file())?;
    Some(format!(
        "only {found} is there; AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR) in transformers writes tokenizer.json"
    ))
}

/// A token stream cut into consecutive windows; the partial one at the end is dropped. Clones share the tokens.
#[derive(Clone, Debug)]
pub struct Windows {
    tokens: Arc<[u32]>,
    seq_len: usize,
    /// The string of the first token.
    first: Option<Arc<str>>,
}

impl Windows {
    /// Windows of `seq_len` tokens.
    ///
    /// # Errors
    /// [`Error::Argument`] when there is not one whole window, or a window has fewer than two tokens (nothing to predict).
    pub fn new(tokens: impl Into<Arc<[u32]>>, seq_len: usize) -> Result<Self> {
        let tokens = tokens.into();
        if seq_len < 2 {
            return Err(Error::argument("window length", format!("expected at least 2 tokens, got {seq_len}")));
        }
        if tokens.len() < seq_len {
            let message = format!("shorter than one window: {} tokens, {seq_len} are needed", tokens.len());
            return Err(Error::argument("text", message));
        }
        Ok(Self { tokens, seq_len, first: None })
    }

    /// The first `count` windows, or all where there are fewer.
    ///
    /// # Errors
    /// [`Error::Argument`] when `count` is 0.
    pub fn limited(&self, count: usize) -> Result<Self> {
        if count == 0 {
            return Err(Error::argument("windows", "expected at least 1, got 0"));
        }
        let tokens = if count < self.len() { self.tokens[..count * self.seq_len].into() } else { self.tokens.clone() };
        Ok(Self { tokens, ..self.clone() })
    }

    /// The token that the text starts with.
    pub fn first_token(&self) -> FirstToken {
        FirstToken { id: self.tokens[0], token: self.first.as_deref().map(str::to_string) }
    }

    /// The largest token id.
    pub fn largest_token(&self) -> u32 {
        self.tokens.iter().copied().max().expect("there is a window")
    }

    /// Number of windows.
    #[expect(clippy::len_without_is_empty, reason = "there is always one")]
    pub fn len(&self) -> usize {
        self.tokens.len() / self.seq_len
    }

    /// Tokens in each.
    pub fn seq_len(&self) -> usize {
        self.seq_len
    }

    /// A checksum of the whole stream (64-bit FNV-1a of the little-endian ids, in hex), to tell texts apart.
    pub fn checksum(&self) -> String {
        checksum(self.tokens.iter().flat_map(|t| t.to_le_bytes()))
    }

    /// `count` windows spread evenly over the text; all where there are fewer.
    pub fn spread(&self, count: usize) -> Vec<usize> {
        let count = count.min(self.len());
        (0..count).map(|i| (i as u128 * self.len() as u128 / count as u128) as usize).collect()
    }

    /// Window `i`.
    ///
    /// # Panics
    /// When `i` is not below [`len`](Self::len).
    pub fn get(&self, i: usize) -> &[u32] {
        assert!(i < self.len(), "window {i} of {}", self.len());
        &self.tokens[i * self.seq_len..][..self.seq_len]
    }

    /// The windows of `indices`, one after the other.
    ///
    /// # Panics
    /// When an index is not below [`len`](Self::len).
    pub fn batch(&self, indices: &[usize]) -> Vec<u32> {
        indices.iter().flat_map(|&i| self.get(i)).copied().collect()
    }
}

/// 64-bit FNV-1a in hex.
pub(crate) fn checksum(bytes: impl Iterator<Item = u8>) -> String {
    let step = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    format!("{:016x}", bytes.fold(0xcbf2_9ce4_8422_2325, step))
}

/// What each position should predict: the next token of its window of `seq` tokens; −1 (nothing) at each window's last.
pub fn targets(tokens: &[u32], seq: usize) -> Vec<i32> {
    let window = |w: &[u32]| w[1..].iter().map(|&t| t as i32).chain([-1]).collect::<Vec<_>>();
    tokens.chunks(seq.max(1)).flat_map(window).collect()
}

/// Which windows each step uses: a new permutation every epoch, so that every window has been used `k` times before any is used
/// for the `k + 1`st time. A step's windows depend only on the seed and the step: a resumed run sees what the killed one would have.
#[derive(Clone, Debug)]
pub struct Sampler {
    windows: Vec<usize>,
    batch: usize,
    seed: u64,
}

impl Sampler {
    /// Draws batches of `batch` out of the indices in `windows`.
    ///
    /// # Errors
    /// [`Error::Argument`] when `batch` is 0 or there are fewer windows than that.
    pub fn new(windows: Vec<usize>, batch: usize, seed: u64) -> Result<Self> {
        if batch == 0 || windows.len() < batch {
            let message =
                format!("expected at least one and at most as many as there are windows ({}), got {batch}", windows.len());
            return Err(Error::argument("batch", message));
        }
        Ok(Self { windows, batch, seed })
    }

    /// The windows of step `step`, counted from 0.
    pub fn step(&self, step: usize) -> Vec<usize> {
        let n = self.windows.len();
        let (first, mut indices) = (step as u128 * self.batch as u128, Vec::with_capacity(self.batch));
        let (mut epoch, mut at) = ((first / n as u128) as u64, (first % n as u128) as usize);
        while indices.len() < self.batch {
            let order = permutation(n, self.seed, epoch);
            let take = (self.batch - indices.len()).min(n - at);
            indices.extend(order[at..at + take].iter().map(|&i| self.windows[i]));
            (epoch, at) = (epoch + 1, 0);
        }
        indices
    }
}

/// Sets `count` windows aside: (the rest, those), each ascending. Depends on the seed only.
///
/// # Errors
/// [`Error::Argument`] when no window would be left.
pub fn split_held_out(windows: &Windows, count: usize, seed: u64) -> Result<(Vec<usize>, Vec<usize>)> {
    let n = windows.len();
    if count >= n {
        return Err(Error::argument("held-out windows", format!("expected fewer than the text has ({n}), got {count}")));
    }
    // A stream that no epoch reaches.
    let mut held_out = permutation(n, seed, u64::MAX);
    let mut rest = held_out.split_off(count);
    held_out.sort_unstable();
    rest.sort_unstable();
    Ok((rest, held_out))
}

/// A random order of 0..n (Fisher & Yates), its own for every seed and stream.
fn permutation(n: usize, seed: u64, stream: u64) -> Vec<usize> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(stream);
    let mut order: Vec<usize> = (0..n).collect();
    for i in (1..n).rev() {
        // Written out, so that the order does not hang on a library's way of drawing integers.
        order.swap(i, ((u128::from(rng.next_u64()) * (i as u128 + 1)) >> 64) as usize);
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_are_consecutive_and_whole() {
        let w = Windows::new((0..23).collect::<Vec<u32>>(), 5).unwrap();
        assert_eq!((w.len(), w.seq_len(), w.get(3)), (4, 5, &[15, 16, 17, 18, 19][..]));
        assert_eq!(w.batch(&[1, 0]), [5, 6, 7, 8, 9, 0, 1, 2, 3, 4]);
        assert_eq!(targets(&w.batch(&[1, 0]), 5), [6, 7, 8, 9, -1, 1, 2, 3, 4, -1]);
        let message = Windows::new(vec![1, 2, 3], 5).unwrap_err().to_string();
        assert_eq!(message, "text: shorter than one window: 3 tokens, 5 are needed");
        assert!(Windows::new(vec![1, 2, 3], 1).is_err() && Windows::new(vec![], 0).is_err());
        assert_eq!(Windows::new(vec![1, 2, 3], 3).unwrap().len(), 1);
    }

    #[test]
    fn every_epoch_visits_every_window_once() {
        let windows: Vec<usize> = (0..10).map(|i| i * 3).collect();
        for batch in [1, 3, 4, 10] {
            let s = Sampler::new(windows.clone(), batch, 5).unwrap();
            let stream: Vec<usize> = (0..30).flat_map(|i| s.step(i)).collect();
            for epoch in stream.chunks_exact(10) {
                let mut epoch = epoch.to_vec();
                epoch.sort_unstable();
                assert_eq!(epoch, windows, "batch {batch}");
            }
            assert_ne!(stream[..10], stream[10..20]);
        }
        let step = |seed, i| Sampler::new(windows.clone(), 4, seed).unwrap().step(i);
        assert_eq!(step(1, 7), step(1, 7));
        assert_ne!(step(1, 7), step(2, 7));
        assert_eq!(step(1, usize::MAX).len(), 4);
        assert!(Sampler::new(windows.clone(), 11, 0).is_err() && Sampler::new(windows.clone(), 0, 0).is_err());
    }

    #[test]
    fn the_order_never_changes() {
        // A checkpoint of an older build must resume to the same windows.
        assert_eq!(permutation(8, 0, 0), [7, 2, 1, 6, 0, 4, 3, 5]);
    }

    #[test]
    fn held_out_windows_are_apart() {
        let w = Windows::new(vec![0; 100], 10).unwrap();
        let (rest, held_out) = split_held_out(&w, 3, 9).unwrap();
        let mut all = [rest.clone(), held_out.clone()].concat();
        all.sort_unstable();
        assert_eq!((held_out.len(), all), (3, (0..10).collect::<Vec<_>>()));
        assert_eq!(split_held_out(&w, 3, 9).unwrap(), (rest, held_out));
        assert!(split_held_out(&w, 0, 9).unwrap().1.is_empty());
        let message = split_held_out(&w, 10, 9).unwrap_err().to_string();
        assert_eq!(message, "held-out windows: expected fewer than the text has (10), got 10");
    }

    #[test]
    fn unreadable_text() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("text.txt");
        assert!(read_text(&path).unwrap_err().to_string().contains("text.txt"));
        std::fs::write(&path, b"fine so far\xff").unwrap();
        assert!(read_text(&path).unwrap_err().to_string().ends_with("expected UTF-8 text, got something else at byte 11"));
        assert!(read_text(dir.path()).is_err());
        assert!(Tokenizer::from_dir(dir.path()).unwrap_err().to_string().contains("tokenizer.json"));
        std::fs::write(dir.path().join("tokenizer.json"), "{}").unwrap();
        assert!(Tokenizer::from_dir(dir.path()).unwrap_err().to_string().contains("expected a tokenizer"));
    }
}
