//! The published rotation file `R.bin`: what `torch.save` makes of a dictionary with the keys `R1` and
//! `model.layers.N.self_attn.R2`.
//!
//! Such a file is a zip archive of stored entries: `NAME/data.pkl`, a pickle that describes the dictionary, and one
//! `NAME/data/KEY` for the values of every storage. Every size is held against the size of the archive's entry before anything of
//! that size is allocated.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{BufReader, Cursor, Read, Write};
use std::path::Path;

use half::{bf16, f16};
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipArchive, ZipWriter};

use super::Rotations;
use super::pickle::{Parsed, Unpickler, Value, View, pickle};
use crate::{DType, Error, Result, Tensor, io};

/// The largest pickle that is read; thousands of layers need a tenth of it.
const MAX_PICKLE: u64 = 8 << 20;
/// Entries of the archive that are looked at.
const MAX_ENTRIES: usize = 1 << 16;
/// Tensors may share storages; together they may take what the file holds, and at least this many bytes.
const SHARED_BYTES: u64 = 256 << 20;
/// As many layers as a configuration may have.
const MAX_LAYERS: usize = 1 << 12;

impl Rotations {
    /// Reads a published `R.bin`, checks that every matrix is orthogonal within 1e-4, and projects what is left in `f64`
    /// ([`Rotations::projected`]). [`Rotations::read_torch`] gives the file's own values.
    ///
    /// # Errors
    /// Those of [`Rotations::read_torch`] and [`Rotations::projected`].
    pub fn load_torch(path: &Path) -> Result<Self> {
        Self::read_torch(path)?.projected(super::TOLERANCE)
    }

    /// The values of a published `R.bin`, bit for bit: `f64` where the file has it, else `f32` (16-bit values are widened).
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Format`] for anything but a zip archive of stored entries whose pickle is a dictionary of finite
    /// square matrices with R1 and R2 of layers 0, 1, …
    pub fn read_torch(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(Error::io(path))?;
        let size = file.metadata().map_err(Error::io(path))?.len();
        read(BufReader::new(file), size, path)
    }

    /// [`Rotations::read_torch`] of a file's bytes; `path` is for messages.
    ///
    /// # Errors
    /// [`Error::Format`] with `path`.
    pub fn from_torch_bytes(bytes: &[u8], path: &Path) -> Result<Self> {
        read(Cursor::new(bytes), bytes.len() as u64, path)
    }

    /// Writes an `R.bin` that `torch.load(path, weights_only=True)` and the published code read; whole or not at all, equal
    /// rotations to equal bytes.
    ///
    /// # Errors
    /// [`Error::Io`] with the path; scales or an R2 for every head, which an `R.bin` cannot hold; a failing copy from a GPU.
    pub fn save_torch(&self, path: &Path) -> Result<()> {
        let bytes = self.to_torch_bytes().map_err(|e| Error::format(path, e))?;
        io::write_atomically(path, |out| out.write_all(&bytes))
    }

    fn to_torch_bytes(&self) -> Result<Vec<u8>> {
        if let Some(more) = self.transforms().more() {
            let message =
                format!("an R.bin holds R1 and R2 only, one a layer, got {more}; write safetensors, or learn without it");
            return Err(Error::argument("R.bin", message));
        }
        let mut tensors = vec![("R1".to_string(), self.r1.to_device(&crate::Device::Cpu)?)];
        let r2 = self.r2.to_device(&crate::Device::Cpu)?;
        for l in 0..self.layers() {
            tensors.push((format!("model.layers.{l}.self_attn.R2"), r2.index(l)?));
        }
        let mut zip = ZipWriter::new(Cursor::new(vec![]));
        let mut entry = |name: String, bytes: &[u8]| -> std::io::Result<()> {
            let options = SimpleFileOptions::default()
                .compression_method(CompressionMethod::Stored)
                .last_modified_time(zip::DateTime::default())
                .large_file(bytes.len() as u64 >= u64::from(u32::MAX))
                .with_alignment(64);
            zip.start_file(name, options)?;
            zip.write_all(bytes)
        };
        let mut write = || -> Result<std::io::Result<()>> {
            let mut result = entry("R/data.pkl".into(), &pickle(&tensors)?);
            result = result.and_then(|()| entry("R/byteorder".into(), b"little"));
            for (i, (_, t)) in tensors.iter().enumerate() {
                let bytes = io::bytes(t)?;
                result = result.and_then(|()| entry(format!("R/data/{i}"), bytes));
            }
            Ok(result.and_then(|()| entry("R/version".into(), b"3\n")))
        };
        let failed = |e: std::io::Error| Error::argument("R.bin", e);
        write()?.map_err(failed)?;
        Ok(zip.finish().map_err(|e| failed(e.into()))?.into_inner())
    }
}

/// The part of a storage that a matrix takes, checked against the storage's length.
struct Matrix {
    n: usize,
    offset: usize,
    transposed: bool,
}

fn matrix(view: &View, len: u64) -> Parsed<Matrix> {
    let &[rows, cols] = &view.size[..] else {
        return Err(format!("expected a square matrix, got {} axes", view.size.len()));
    };
    if rows != cols || rows == 0 {
        return Err(format!("expected a square matrix, got {rows}x{cols}"));
    }
    let transposed = match view.stride[..] {
        [a, b] if (a, b) == (rows, 1) => false,
        [a, b] if (a, b) == (1, rows) => true,
        _ => return Err(format!("expected contiguous rows or columns of {rows}, got strides {:?}", view.stride)),
    };
    let end = rows.checked_mul(rows).and_then(|n| n.checked_add(view.offset));
    if end.is_none_or(|end| end > len) {
        return Err(format!("its {rows}x{rows} values at {} do not fit its storage of {len}", view.offset));
    }
    Ok(Matrix { n: rows as usize, offset: view.offset as usize, transposed })
}

/// The archive, its entries by name.
struct Archive<'a, R> {
    zip: ZipArchive<R>,
    entries: HashMap<String, usize>,
    /// Bytes of the file: no entry can hold more.
    size: u64,
    path: &'a Path,
}

impl<R: Read + std::io::Seek> Archive<'_, R> {
    fn bad(&self, message: impl std::fmt::Display) -> Error {
        Error::format(self.path, message)
    }

    /// The number and size of an entry that is stored as it is.
    fn stored(&mut self, name: &str) -> Result<(usize, u64)> {
        let index =
            *self.entries.get(name).ok_or_else(|| Error::format(self.path, format!("the archive lacks the entry {name}")))?;
        let entry = self.zip.by_index_raw(index).map_err(|e| Error::format(self.path, format!("{name}: {e}")))?;
        let (size, packed, method, encrypted) = (entry.size(), entry.compressed_size(), entry.compression(), entry.encrypted());
        drop(entry);
        if encrypted {
            return Err(self.bad(format!("{name}: expected a plain entry, got an encrypted one")));
        }
        if method != CompressionMethod::Stored || size != packed {
            return Err(
                self.bad(format!("{name}: expected a stored entry, got a compressed one ({method}, {packed} bytes for {size})"))
            );
        }
        if size > self.size {
            return Err(self.bad(format!("{name}: claims {size} bytes, the whole file has {}", self.size)));
        }
        Ok((index, size))
    }

    /// The bytes of an entry of at most `limit` bytes.
    fn read(&mut self, name: &str, limit: u64) -> Result<Vec<u8>> {
        let (index, size) = self.stored(name)?;
        if size > limit {
            return Err(self.bad(format!("{name}: expected at most {limit} bytes, got {size}")));
        }
        let mut bytes = Vec::with_capacity(size as usize);
        let entry = self.zip.by_index(index).map_err(|e| Error::format(self.path, format!("{name}: {e}")))?;
        entry.take(size + 1).read_to_end(&mut bytes).map_err(|e| Error::format(self.path, format!("{name}: {e}")))?;
        if bytes.len() as u64 != size {
            return Err(self.bad(format!("{name}: expected {size} bytes, got {}", bytes.len())));
        }
        Ok(bytes)
    }
}

fn read<R: Read + std::io::Seek>(reader: R, size: u64, path: &Path) -> Result<Rotations> {
    let bad = |message: String| Error::format(path, message);
    let zip = ZipArchive::new(reader).map_err(|e| {
        bad(format!("expected a zip archive, as torch.save has written since 1.6: {e} (the file has {size} bytes)"))
    })?;
    if zip.len() > MAX_ENTRIES {
        return Err(bad(format!("expected at most {MAX_ENTRIES} entries, got {}", zip.len())));
    }
    let mut entries = HashMap::new();
    for i in 0..zip.len() {
        if let Some(Ok(name)) = zip.name_for_index(i)
            && entries.insert(name.to_string(), i).is_some()
        {
            return Err(bad(format!("two entries are called {name:.80}")));
        }
    }
    let mut pickles = entries.keys().filter_map(|name| name.strip_suffix("/data.pkl"));
    let root = match (pickles.next(), pickles.next()) {
        (Some(root), None) => root.to_string(),
        _ => return Err(bad("expected one entry NAME/data.pkl in the archive, as torch.save writes".into())),
    };
    let mut archive = Archive { zip, entries, size, path };
    if archive.entries.contains_key(&format!("{root}/byteorder")) && archive.read(&format!("{root}/byteorder"), 16)? != b"little"
    {
        return Err(bad("expected little-endian values".into()));
    }
    let pickle = archive.read(&format!("{root}/data.pkl"), MAX_PICKLE)?;
    let mut un = Unpickler::new(&pickle);
    let top = un.run().map_err(|e| bad(format!("data.pkl: {e}")))?;
    let Value::Dict(items) = &un.values[top] else {
        return Err(bad(format!("data.pkl: expected a dictionary of tensors, got {}", un.values[top].kind())));
    };

    // Everything is checked before any value is read.
    let mut found = BTreeMap::new();
    let mut total = 0u64;
    for &(key, value) in items {
        let key = un.text(key).map_err(|e| bad(format!("data.pkl: a key: {e}")))?;
        let layer = match key {
            "R1" => None,
            _ => {
                let number = key.strip_prefix("model.layers.").and_then(|k| k.strip_suffix(".self_attn.R2"));
                let layer = number.and_then(|n| n.parse::<usize>().ok()).filter(|l| *l < MAX_LAYERS);
                let expected = "expected R1 and model.layers.N.self_attn.R2";
                Some(layer.ok_or_else(|| bad(format!("{expected}, got the key {key:.80?}")))?)
            }
        };
        let Value::Tensor(view) = &un.values[value] else {
            return Err(bad(format!("{key}: expected a tensor, got {}", un.values[value].kind())));
        };
        let Value::Storage { dtype, key: name, len } = &un.values[view.storage] else {
            unreachable!("checked when the tensor was made")
        };
        let m = matrix(view, *len).map_err(|e| bad(format!("{key}: {e}")))?;
        let name = format!("{root}/data/{name}");
        let (_, bytes) = archive.stored(&name)?;
        if len.checked_mul(dtype.size() as u64) != Some(bytes) {
            return Err(bad(format!("{key}: claims a storage of {len} {dtype} values, {name} has {bytes} bytes")));
        }
        total = total.saturating_add((m.n * m.n * dtype.size()) as u64);
        if total > size.max(SHARED_BYTES) {
            return Err(bad(format!("its tensors ask for more than the {size} bytes of the file")));
        }
        if found.insert(layer, (m, *dtype, name)).is_some() {
            return Err(bad(format!("the key {key} occurs twice")));
        }
    }
    let Some((r1, ..)) = found.get(&None) else { return Err(bad("the key R1 is missing".into())) };
    let (hidden, layers) = (r1.n, found.len() - 1);
    if let Some(gap) = (0..layers).find(|l| !found.contains_key(&Some(*l))) {
        return Err(bad(format!("the key model.layers.{gap}.self_attn.R2 is missing")));
    }
    let Some((first, ..)) = found.get(&Some(0)) else { return Err(bad("the key model.layers.0.self_attn.R2 is missing".into())) };
    let head_dim = first.n;
    if let Some((layer, (m, ..))) = found.iter().find(|(l, (m, ..))| l.is_some() && m.n != head_dim) {
        let layer = layer.expect("not R1");
        return Err(bad(format!(
            "model.layers.{layer}.self_attn.R2: expected {head_dim}x{head_dim} as in layer 0, got {0}x{0}",
            m.n
        )));
    }

    let dtype = if found.values().any(|(_, dtype, _)| *dtype == DType::F64) { DType::F64 } else { DType::F32 };
    let mut last: (String, Vec<u8>) = Default::default(); // one storage may serve every layer
    let mut tensors = vec![];
    for (layer, (m, stored, name)) in found {
        if last.0 != name {
            last = (name.clone(), archive.read(&name, size)?);
        }
        let size = stored.size();
        let bytes = &last.1[m.offset * size..][..m.n * m.n * size];
        let t = tensor(bytes, stored, &m)?;
        if !io::is_finite(&t)? {
            let name = layer.map_or("R1".into(), |l| format!("model.layers.{l}.self_attn.R2"));
            return Err(bad(format!("{name} holds NaN or infinite values")));
        }
        tensors.push(t.to_dtype(dtype)?);
    }
    let r1 = tensors.remove(0).reshape([hidden, hidden])?; // None sorts first
    Ok(Rotations::new(r1, Tensor::stack(&tensors)?))
}

/// A matrix from its bytes.
fn tensor(bytes: &[u8], dtype: DType, m: &Matrix) -> Result<Tensor> {
    fn go<T: crate::Element>(bytes: &[u8], m: &Matrix) -> Result<Tensor> {
        let mut values: Vec<T> = bytemuck::pod_collect_to_vec(bytes);
        if m.transposed {
            values = (0..m.n * m.n).map(|i| values[i % m.n * m.n + i / m.n]).collect();
        }
        Tensor::from_vec(values, [m.n, m.n])
    }
    match dtype {
        DType::F64 => go::<f64>(bytes, m),
        DType::F32 => go::<f32>(bytes, m),
        DType::F16 => go::<f16>(bytes, m),
        DType::BF16 => go::<bf16>(bytes, m),
        DType::U32 => Err(Error::dtype("R.bin", "f64, f32, f16 or bf16", dtype)),
    }
}
