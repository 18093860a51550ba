//! The safetensors files of a model directory: tensors by name, read when asked for.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::SystemTime;

use half::{bf16, f16};
use memmap2::Mmap;
use rayon::prelude::*;
use safetensors::tensor::{Dtype, Metadata, TensorInfo};
use sha2::{Digest, Sha256};

use super::folder;
use crate::device::cpu;
use crate::dtype::Element;
use crate::{DType, Error, Result, Tensor, io};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// The first part of the name of every tensor but the head's, which files of a network without a head lack.
const PREFIX: &str = "model.";

/// The tensors of a model directory: `model.safetensors`, or the shards that `model.safetensors.index.json` names. Names may lack
/// their first part, `model.`, as in the files of a network without a head.
///
/// Files are memory-mapped; a tensor is read when asked for. A file that changed since it was opened is an error. One that is cut short in
/// the middle of a read is a SIGBUS.
#[derive(Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    shards: Vec<Shard>,
    /// Tensor name to shard.
    names: BTreeMap<String, usize>,
    /// Tensors that the index names and their shard lacks: wrong only where one of them is needed.
    absent: BTreeMap<String, PathBuf>,
}

/// A file's bytes.
#[derive(Debug)]
enum Bytes {
    Mapped(Mmap),
    /// Part of the program.
    Static(&'static [u8]),
}

impl std::ops::Deref for Bytes {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        match self {
            Self::Mapped(map) => map,
            Self::Static(bytes) => bytes,
        }
    }
}

#[derive(Debug)]
struct Shard {
    path: PathBuf,
    map: Bytes,
    metadata: Metadata,
    /// Where the data starts, after the header.
    start: usize,
    /// What the file was when it was mapped; none for what is part of the program.
    stamp: Option<Stamp>,
}

/// Length in bytes and time of the last change.
type Stamp = (u64, SystemTime);

fn stamp(path: &Path) -> Result<Stamp> {
    let of = |m: std::fs::Metadata| Ok((m.len(), m.modified()?));
    std::fs::metadata(path).and_then(of).map_err(Error::io(path))
}

/// One tensor's bytes, little-endian, still in the file.
pub(super) struct Entry<'a> {
    path: &'a Path,
    stamp: Option<Stamp>,
    name: &'a str,
    pub(super) dtype: DType,
    shape: &'a [usize],
    /// Rows of `bytes`: the first axis.
    count: usize,
    bytes: &'a [u8],
}

impl Shard {
    fn open(path: PathBuf) -> Result<Self> {
        let file = File::open(&path).map_err(Error::io(&path))?;
        if path.is_dir() {
            return Err(Error::format(&path, "expected a safetensors file, got a folder"));
        }
        let stamp = stamp(&path)?;
        // SAFETY: read-only; a file that another process shortens while mapped would fault, which the type's documentation rules out.
        let map = unsafe { Mmap::map(&file) }.map_err(Error::io(&path))?;
        Ok(Self { stamp: Some(stamp), ..Self::new(path, Bytes::Mapped(map))? })
    }

    fn new(path: PathBuf, map: Bytes) -> Result<Self> {
        let (start, metadata) = io::header(&map).map_err(|e| {
            if let Some(message) = io::lfs_pointer(&map) {
                return Error::format(&path, message);
            }
            let size = map.len();
            Error::format(&path, format!("expected a complete safetensors file: {e} (the file has {size} bytes)"))
        })?;
        Ok(Self { path, map, metadata, start, stamp: None })
    }
}

impl Checkpoint {
    /// Maps the files of a model directory and checks that every one is whole.
    ///
    /// # Errors
    /// Neither file is there (the message says what is there instead), a file is truncated or not safetensors, the index names an
    /// absent shard.
    pub fn open(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref();
        let (single, index) = (dir.join(SINGLE), dir.join(INDEX));
        if single.exists() {
            return Ok(Self::of(dir, Shard::open(single)?));
        }
        if index.exists() {
            let mut checkpoint = Self { dir: dir.to_path_buf(), shards: vec![], names: BTreeMap::new(), absent: BTreeMap::new() };
            checkpoint.open_shards(&index)?;
            return Ok(checkpoint);
        }
        let hint = folder::instead_of_weights(dir).map(|hint| format!("; {hint}")).unwrap_or_default();
        Err(Error::format(dir, format!("expected {SINGLE} or {INDEX} in this directory, found neither{hint}")))
    }

    /// The bytes of one safetensors file that is part of the program; `name` is for messages.
    ///
    /// # Errors
    /// They are not a whole safetensors file.
    pub fn from_static(name: &str, bytes: &'static [u8]) -> Result<Self> {
        Ok(Self::of(Path::new(name), Shard::new(name.into(), Bytes::Static(bytes))?))
    }

    fn of(dir: &Path, shard: Shard) -> Self {
        let names = shard.metadata.offset_keys().into_iter().map(|name| (name, 0)).collect();
        Self { dir: dir.to_path_buf(), shards: vec![shard], names, absent: BTreeMap::new() }
    }

    fn open_shards(&mut self, index: &Path) -> Result<()> {
        #[derive(serde::Deserialize)]
        struct Index {
            weight_map: BTreeMap<String, String>,
        }
        let bytes = std::fs::read(index).map_err(Error::io(index))?;
        let Index { weight_map } = serde_json::from_slice(&bytes)
            .map_err(|e| Error::format(index, format!("expected a weight_map of tensor to file names: {}", io::short(e))))?;
        let mut opened = HashMap::new();
        for (name, file) in weight_map {
            let shard = match opened.get(&file) {
                Some(&shard) => shard,
                None => {
                    let path = self.dir.join(&file);
                    if Path::new(&file).file_name() != Some(file.as_ref()) {
                        return Err(Error::format(
                            index,
                            format!("{name}: expected the name of a file in this directory, got {file:?}"),
                        ));
                    }
                    if !path.exists() {
                        return Err(Error::format(index, format!("{name}: names the shard {file}, which does not exist")));
                    }
                    self.shards.push(Shard::open(path)?);
                    opened.insert(file, self.shards.len() - 1);
                    self.shards.len() - 1
                }
            };
            let Shard { path, metadata, .. } = &self.shards[shard];
            if metadata.info(&name).is_none() {
                self.absent.insert(name, path.clone());
                continue;
            }
            self.names.insert(name, shard);
        }
        Ok(())
    }

    /// The folder.
    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Every tensor's name, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.names.keys().map(String::as_str)
    }

    /// Reads a tensor in the file's own element type (f64, f32, f16 or bf16).
    ///
    /// # Errors
    /// Naming file and tensor: it is absent, of another shape or element type, or holds values that are not finite.
    pub fn tensor(&self, name: &str, expected_shape: &[usize]) -> Result<Tensor> {
        let entry = self.entry(name, expected_shape)?;
        entry.read(entry.dtype, None)
    }

    /// SHA-256 of every tensor's name, type, shape and bytes.
    pub(super) fn sha256(&self) -> String {
        let digest = |(name, &shard): (&String, &usize)| -> [u8; 32] {
            let Shard { map, metadata, start, .. } = &self.shards[shard];
            let info = metadata.info(name).expect("checked when opened");
            let (from, to) = info.data_offsets;
            let head = format!("{name} {} {:?}\n", info.dtype, info.shape);
            Sha256::new().chain_update(head).chain_update(&map[start + from..start + to]).finalize().into()
        };
        // Tensors in parallel; the digest of their digests.
        let digests: Vec<_> = self.names.par_iter().map(digest).collect();
        io::hex(&Sha256::digest(digests.concat()))
    }

    /// The name in the files and the shard of a tensor.
    fn find<'a>(&'a self, name: &str) -> Option<(&'a str, usize)> {
        let found = |name: &str| self.names.get_key_value(name).map(|(name, &shard)| (name.as_str(), shard));
        found(name).or_else(|| found(name.strip_prefix(PREFIX)?))
    }

    /// The name in the files of a tensor, if it is there.
    pub(super) fn resolve(&self, name: &str) -> Option<&str> {
        self.find(name).map(|(name, _)| name)
    }

    /// A tensor's name in the files, its shard and what the header says of it.
    fn locate(&self, name: &str) -> Result<(&str, &Shard, &TensorInfo)> {
        let Some((name, shard)) = self.find(name) else {
            if let Some(path) = self.absent.get(name) {
                return Err(Error::format(path, format!("lacks the tensor {name}, which {INDEX} says is here")));
            }
            return Err(Error::format(&self.dir, format!("the tensor {name} is missing from the model's safetensors")));
        };
        let shard = &self.shards[shard];
        Ok((name, shard, shard.metadata.info(name).expect("checked when opened")))
    }

    pub(super) fn entry(&self, name: &str, expected_shape: &[usize]) -> Result<Entry<'_>> {
        let (name, Shard { path, map, start, stamp, .. }, info) = self.locate(name)?;
        let bad = |message: String| Error::format(path, format!("{name}: {message}"));
        let dtype = match info.dtype {
            Dtype::F64 => DType::F64,
            Dtype::F32 => DType::F32,
            Dtype::F16 => DType::F16,
            Dtype::BF16 => DType::BF16,
            other => return Err(bad(format!("expected dtype F64, F32, F16 or BF16, got {other}"))),
        };
        if info.shape != expected_shape {
            return Err(bad(format!("expected shape {expected_shape:?}, got {:?}", info.shape)));
        }
        let (from, to) = info.data_offsets;
        // The header was checked against the file's length and every shape against its bytes.
        let (count, bytes) = (info.shape.first().copied().unwrap_or(1), &map[start + from..start + to]);
        Ok(Entry { path, stamp: *stamp, name, dtype, shape: &info.shape, count, bytes })
    }

    /// The bytes of a tensor of whole numbers.
    ///
    /// # Errors
    /// Naming file and tensor: it is absent, of another shape or element type, or its file changed since it was opened.
    pub(super) fn integers(&self, name: &str, dtype: Dtype, expected_shape: &[usize]) -> Result<&[u8]> {
        let (name, shard, info) = self.locate(name)?;
        if info.dtype != dtype || info.shape != expected_shape {
            let message = format!("{name}: expected {dtype} {expected_shape:?}, got {} {:?}", info.dtype, info.shape);
            return Err(Error::format(&shard.path, message));
        }
        unchanged(&shard.path, shard.stamp, name)?;
        let (from, to) = info.data_offsets;
        Ok(&shard.map[shard.start + from..shard.start + to])
    }
}

impl Entry<'_> {
    /// Rows `first..first + count` of the same tensor.
    pub(super) fn rows(self, first: usize, count: usize) -> Self {
        let row = self.shape[1..].iter().product::<usize>() * self.dtype.size();
        Self { count, bytes: &self.bytes[first * row..][..count * row], ..self }
    }

    /// True when another tensor of the same shape holds the same values, whatever types they are stored in.
    pub(super) fn equals(&self, other: &Self) -> bool {
        if self.dtype == other.dtype && self.bytes == other.bytes {
            return true;
        }
        const STEP: usize = 1 << 14;
        let parts = |e: &Self| (e.dtype, e.dtype.size());
        let ((a, wide_a), (b, wide_b)) = (parts(self), parts(other));
        let same = |(x, y): (&[u8], &[u8])| {
            let (mut left, mut right) = (vec![0f64; x.len() / wide_a], vec![0f64; y.len() / wide_b]);
            decode(a, x, &mut left);
            decode(b, y, &mut right);
            left == right
        };
        self.shape == other.shape && self.bytes.par_chunks(STEP * wide_a).zip(other.bytes.par_chunks(STEP * wide_b)).all(same)
    }

    /// The values in `dtype`, each row multiplied by `gain` (as long as a row) in `f64` and rounded once.
    ///
    /// The file is looked at before and behind: one that was written to since it was opened holds another model, and one that was cut
    /// short has no bytes where the map says so.
    pub(super) fn read(&self, dtype: DType, gain: Option<&[f64]>) -> Result<Tensor> {
        unchanged(self.path, self.stamp, self.name)?;
        let values = match dtype {
            DType::F64 => self.read_as::<f64>(gain),
            DType::F32 => self.read_as::<f32>(gain),
            DType::F16 => self.read_as::<f16>(gain),
            DType::BF16 => self.read_as::<bf16>(gain),
            DType::U32 => Err(Error::dtype("weights", "f64, f32, f16 or bf16", dtype)),
        };
        unchanged(self.path, self.stamp, self.name)?;
        values
    }

    fn read_as<T: Element>(&self, gain: Option<&[f64]>) -> Result<Tensor> {
        let cols = self.shape.last().copied().unwrap_or(1).max(1);
        let size = self.dtype.size();
        let mut values = vec![T::default(); self.bytes.len() / size];
        let (bad, overflow) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let step = cols * cpu::rows_per_task(cols);
        values.par_chunks_mut(step).zip(self.bytes.par_chunks(step * size)).for_each_init(
            || vec![0f64; cols],
            |wide, (values, bytes)| {
                for (row, bytes) in values.chunks_mut(cols).zip(bytes.chunks(cols * size)) {
                    decode(self.dtype, bytes, wide);
                    let not_finite = wide.iter().filter(|x| !x.is_finite()).count();
                    if not_finite > 0 {
                        bad.fetch_add(not_finite, Ordering::Relaxed);
                    }
                    if let Some(gain) = gain {
                        wide.iter_mut().zip(gain).for_each(|(x, g)| *x *= g);
                    }
                    row.iter_mut().zip(&*wide).for_each(|(y, x)| *y = T::from_f64(*x));
                    let lost = row.iter().filter(|y| !y.to_f64().is_finite()).count();
                    if lost > 0 {
                        overflow.fetch_add(lost, Ordering::Relaxed);
                    }
                }
            },
        );
        let (bad, overflow) = (bad.into_inner(), overflow.into_inner());
        let count = values.len();
        let fail = |message: String| Err(Error::format(self.path, format!("{}: {message}", self.name)));
        if bad > 0 {
            return fail(format!("expected finite values, got {bad} of {count} that are NaN or infinite"));
        }
        if overflow > 0 {
            return fail(format!("{overflow} of {count} values are too large for {}", T::DTYPE));
        }
        let mut shape = self.shape.to_vec();
        shape.iter_mut().take(1).for_each(|rows| *rows = self.count);
        Tensor::from_vec(values, shape)
    }
}

/// Fails where a file is another than when it was opened; `name` is the tensor that is read.
fn unchanged(path: &Path, then: Option<Stamp>, name: &str) -> Result<()> {
    let Some(then) = then else { return Ok(()) };
    let now = stamp(path)?;
    if now == then {
        return Ok(());
    }
    let what = if now.0 < then.0 { "was cut short" } else { "was written to" };
    let (before, after) = (then.0, now.0);
    Err(Error::format(path, format!("{name}: the file {what} after it was opened ({before} bytes then, {after} now)")))
}

/// Widens little-endian values, exactly.
fn decode(dtype: DType, bytes: &[u8], wide: &mut [f64]) {
    fn each<const N: usize>(bytes: &[u8], wide: &mut [f64], f: impl Fn([u8; N]) -> f64) {
        wide.iter_mut().zip(bytes.as_chunks().0).for_each(|(x, b)| *x = f(*b));
    }
    match dtype {
        DType::F64 => each(bytes, wide, f64::from_le_bytes),
        DType::F32 => each(bytes, wide, |b| f32::from_le_bytes(b).into()),
        DType::F16 => each(bytes, wide, |b| f16::from_le_bytes(b).into()),
        DType::BF16 => each(bytes, wide, |b| bf16::from_le_bytes(b).into()),
        DType::U32 => unreachable!("entries are floating-point"),
    }
}
