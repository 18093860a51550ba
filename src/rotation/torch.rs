//! The published rotation file `R.bin`: what `torch.save` makes of a dictionary with the keys `R1` and
//! `model.layers.N.self_attn.R2`.
//!
//! Such a file is a zip archive of stored entries: `NAME/data.pkl`, a pickle that describes the dictionary, and one
//! `NAME/data/KEY` for the values of every storage. A pickle is a program; this reader knows only the few instructions that
//! dictionaries of tensors need, refuses every other one and every name outside [`GLOBALS`], and executes nothing. Every size is
//! held against the size of the archive's entry before anything of that size is allocated.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{BufReader, Cursor, Read, Write};
use std::path::Path;

use half::{bf16, f16};
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipArchive, ZipWriter};

use super::Rotations;
use crate::{DType, Error, Result, Tensor, io};

/// The Python names that a file may mention, and what they stand for here.
const GLOBALS: [(&str, Global); 7] = [
    ("collections.OrderedDict", Global::Dict),
    ("torch._utils._rebuild_tensor_v2", Global::Tensor),
    ("torch._utils._rebuild_parameter", Global::Parameter),
    ("torch.DoubleStorage", Global::Storage(DType::F64)),
    ("torch.FloatStorage", Global::Storage(DType::F32)),
    ("torch.HalfStorage", Global::Storage(DType::F16)),
    ("torch.BFloat16Storage", Global::Storage(DType::BF16)),
];
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
    pub fn from_torch_bytes(bytes: &[u8], path: &Path) -> Result<Self> {
        read(Cursor::new(bytes), bytes.len() as u64, path)
    }

    /// Writes an `R.bin` that `torch.load(path, weights_only=True)` and the published code read; whole or not at all, equal
    /// rotations to equal bytes.
    pub fn save_torch(&self, path: &Path) -> Result<()> {
        let bytes = self.to_torch_bytes().map_err(|e| Error::format(path, e))?;
        io::write_atomically(path, |out| out.write_all(&bytes))
    }

    fn to_torch_bytes(&self) -> Result<Vec<u8>> {
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

/// The pickle of a dictionary of matrices, each in a storage of its own: "0", "1", …
fn pickle(tensors: &[(String, Tensor)]) -> Result<Vec<u8>> {
    fn text(out: &mut Vec<u8>, s: &str) {
        out.push(b'X');
        out.extend((s.len() as u32).to_le_bytes());
        out.extend(s.as_bytes());
    }
    fn integer(out: &mut Vec<u8>, x: usize) {
        match i32::try_from(x) {
            Ok(x) => {
                out.push(b'J');
                out.extend(x.to_le_bytes());
            }
            Err(_) => {
                out.extend([0x8a, 8]); // LONG1 of eight bytes
                out.extend((x as u64).to_le_bytes());
            }
        }
    }
    fn global(out: &mut Vec<u8>, name: &str) {
        let (module, name) = name.rsplit_once('.').expect("a dotted name");
        out.extend(format!("c{module}\n{name}\n").bytes());
    }
    let mut out = vec![0x80, 2, b'}', b'('];
    for (i, (key, t)) in tensors.iter().enumerate() {
        let (storage, _) = GLOBALS
            .into_iter()
            .find(|(_, g)| *g == Global::Storage(t.dtype()))
            .ok_or_else(|| Error::dtype(key, "f64, f32, f16 or bf16", t.dtype()))?;
        text(&mut out, key);
        global(&mut out, "torch._utils._rebuild_tensor_v2");
        out.extend(b"((");
        text(&mut out, "storage");
        global(&mut out, storage);
        text(&mut out, &i.to_string());
        text(&mut out, "cpu");
        integer(&mut out, t.len());
        out.extend(b"tQ");
        integer(&mut out, 0); // offset
        integer(&mut out, t.rows());
        integer(&mut out, t.cols());
        out.push(0x86);
        integer(&mut out, t.cols()); // strides
        integer(&mut out, 1);
        out.extend([0x86, 0x89]); // no gradient
        global(&mut out, "collections.OrderedDict"); // no hooks
        out.extend(b")RtR");
    }
    out.extend(b"u.");
    Ok(out)
}

/// What a Python name stands for.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Global {
    Dict,
    Tensor,
    Parameter,
    Storage(DType),
}

/// A value on the pickle's stack; others are referred to by their number.
#[derive(Clone, Debug)]
enum Value {
    None,
    Bool,
    Integer(u64),
    Text(String),
    Tuple(Vec<usize>),
    Dict(Vec<(usize, usize)>),
    Global(Global),
    Storage { dtype: DType, key: String, len: u64 },
    Tensor(View),
}

/// A tensor: a storage by its number, and what part of it.
#[derive(Clone, Debug)]
struct View {
    storage: usize,
    offset: u64,
    size: Vec<u64>,
    stride: Vec<u64>,
}

type Parsed<T> = std::result::Result<T, String>;

/// Walks a pickle. Values are numbered and never nested, so that no input makes this recurse or copy much.
struct Unpickler<'a> {
    rest: &'a [u8],
    values: Vec<Value>,
    stack: Vec<usize>,
    marks: Vec<usize>,
    memo: HashMap<u32, usize>,
}

impl<'a> Unpickler<'a> {
    fn take(&mut self, n: usize) -> Parsed<&'a [u8]> {
        let (head, rest) = self.rest.split_at_checked(n).ok_or("the pickle is cut off")?;
        self.rest = rest;
        Ok(head)
    }
    fn byte(&mut self) -> Parsed<u8> {
        Ok(self.take(1)?[0])
    }
    fn word(&mut self) -> Parsed<u32> {
        Ok(u32::from_le_bytes(self.take(4)?.try_into().expect("four bytes")))
    }
    fn line(&mut self) -> Parsed<&'a str> {
        let end = self.rest.iter().position(|b| *b == b'\n').ok_or("the pickle is cut off")?;
        let line = self.take(end)?;
        self.take(1)?;
        std::str::from_utf8(line).map_err(|_| "a name that is not UTF-8".into())
    }
    fn push(&mut self, value: Value) {
        self.values.push(value);
        self.stack.push(self.values.len() - 1);
    }
    fn pop(&mut self) -> Parsed<usize> {
        // Nothing below the last mark may be touched.
        let floor = self.marks.last().copied().unwrap_or(0);
        if self.stack.len() <= floor {
            return Err("the pickle takes more from its stack than it put there".into());
        }
        Ok(self.stack.pop().expect("longer than the floor"))
    }
    fn top(&self) -> Parsed<usize> {
        self.stack.last().copied().ok_or_else(|| "the pickle reads an empty stack".into())
    }
    fn since_mark(&mut self) -> Parsed<Vec<usize>> {
        let mark = self.marks.pop().ok_or("the pickle lacks a mark")?;
        Ok(self.stack.split_off(mark))
    }
    fn tuple(&mut self, n: usize) -> Parsed<()> {
        let mut items = (0..n).map(|_| self.pop()).collect::<Parsed<Vec<_>>>()?;
        items.reverse();
        self.push(Value::Tuple(items));
        Ok(())
    }
    fn dict(&mut self) -> Parsed<&mut Vec<(usize, usize)>> {
        let top = self.top()?;
        match &mut self.values[top] {
            Value::Dict(items) => Ok(items),
            other => Err(format!("expected a dictionary to fill, got {}", other.kind())),
        }
    }

    /// Runs the pickle to its end and gives the number of what it made.
    fn run(&mut self) -> Parsed<usize> {
        if self.take(2)? != [0x80, 2] {
            return Err("expected a pickle of protocol 2, as torch.save writes".into());
        }
        loop {
            match self.byte()? {
                b'}' => self.push(Value::Dict(vec![])),
                b'(' => self.marks.push(self.stack.len()),
                b'X' => {
                    let n = self.word()? as usize;
                    let text = std::str::from_utf8(self.take(n)?).map_err(|_| "a string that is not UTF-8")?;
                    self.push(Value::Text(text.into()));
                }
                b'q' => {
                    let (slot, top) = (self.byte()?, self.top()?);
                    self.memo.insert(slot.into(), top);
                }
                b'r' => {
                    let (slot, top) = (self.word()?, self.top()?);
                    self.memo.insert(slot, top);
                }
                b'h' => {
                    let slot = self.byte()?.into();
                    self.recall(slot)?;
                }
                b'j' => {
                    let slot = self.word()?;
                    self.recall(slot)?;
                }
                b'c' => {
                    let name = format!("{}.{}", self.line()?, self.line()?);
                    let known = GLOBALS.into_iter().find(|(n, _)| *n == name);
                    let (_, global) = known.ok_or_else(|| {
                        format!("the pickle names {name:.200}, which dictionaries of tensors do not need; refused")
                    })?;
                    self.push(Value::Global(global));
                }
                b'K' => {
                    let x = self.byte()?;
                    self.push(Value::Integer(x.into()));
                }
                b'M' => {
                    let x = self.take(2)?;
                    self.push(Value::Integer(u16::from_le_bytes([x[0], x[1]]).into()));
                }
                b'J' => {
                    let x = u64::try_from(self.word()? as i32).map_err(|_| "a negative number")?;
                    self.push(Value::Integer(x));
                }
                0x8a => {
                    let n = self.byte()?.into();
                    let digits = self.take(n)?;
                    if digits.last().is_some_and(|d| d & 0x80 != 0) || digits.iter().skip(8).any(|d| *d != 0) {
                        return Err("a number that is negative or beyond 64 bits".into());
                    }
                    let x = digits.iter().take(8).rev().fold(0, |x, d| x << 8 | u64::from(*d));
                    self.push(Value::Integer(x));
                }
                b'N' => self.push(Value::None),
                0x88 | 0x89 => self.push(Value::Bool),
                b')' => self.push(Value::Tuple(vec![])),
                0x85 => self.tuple(1)?,
                0x86 => self.tuple(2)?,
                0x87 => self.tuple(3)?,
                b't' => {
                    let items = self.since_mark()?;
                    self.push(Value::Tuple(items));
                }
                b's' => {
                    let (value, key) = (self.pop()?, self.pop()?);
                    self.dict()?.push((key, value));
                }
                b'u' => {
                    let items = self.since_mark()?;
                    if !items.len().is_multiple_of(2) {
                        return Err("a dictionary key without a value".into());
                    }
                    self.dict()?.extend(items.chunks_exact(2).map(|pair| (pair[0], pair[1])));
                }
                b'b' => {
                    // The attributes of an OrderedDict: notes that nobody needs.
                    let state = self.pop()?;
                    if !matches!(self.values[state], Value::Dict(_)) {
                        return Err(format!("expected attributes in a dictionary, got {}", self.values[state].kind()));
                    }
                    self.dict()?;
                }
                b'Q' => {
                    let id = self.pop()?;
                    let storage = self.storage(id)?;
                    self.push(storage);
                }
                b'R' => {
                    let (arguments, function) = (self.pop()?, self.pop()?);
                    let value = self.call(function, arguments)?;
                    self.push(value);
                }
                b'.' => return self.pop(),
                other => {
                    return Err(format!(
                        "the pickle instruction {:?} (0x{other:02x}) is not one that torch.save uses; refused",
                        char::from(other)
                    ));
                }
            }
        }
    }

    fn recall(&mut self, slot: u32) -> Parsed<()> {
        let value = *self.memo.get(&slot).ok_or("the pickle recalls what it never stored")?;
        self.stack.push(value);
        Ok(())
    }

    fn items(&self, tuple: usize) -> Parsed<&[usize]> {
        match &self.values[tuple] {
            Value::Tuple(items) => Ok(items),
            other => Err(format!("expected a tuple, got {}", other.kind())),
        }
    }
    fn integer(&self, value: usize) -> Parsed<u64> {
        match &self.values[value] {
            Value::Integer(x) => Ok(*x),
            other => Err(format!("expected a number, got {}", other.kind())),
        }
    }
    fn text(&self, value: usize) -> Parsed<&str> {
        match &self.values[value] {
            Value::Text(s) => Ok(s),
            other => Err(format!("expected a string, got {}", other.kind())),
        }
    }

    /// `("storage", type, key, location, elements)`
    fn storage(&self, id: usize) -> Parsed<Value> {
        let &[tag, class, key, location, len] = self.items(id)? else {
            return Err("expected a storage of five parts".into());
        };
        if self.text(tag)? != "storage" {
            return Err(format!("expected a storage, got {:.40}", self.text(tag)?));
        }
        self.text(location)?;
        let Value::Global(Global::Storage(dtype)) = self.values[class] else {
            return Err(format!("expected the class of a storage, got {}", self.values[class].kind()));
        };
        let key = self.text(key)?;
        if key.is_empty() || key.len() > 40 || !key.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_') {
            return Err(format!("expected the name of a storage, got {key:.40?}"));
        }
        Ok(Value::Storage { dtype, key: key.into(), len: self.integer(len)? })
    }

    /// The few constructors that occur.
    fn call(&self, function: usize, arguments: usize) -> Parsed<Value> {
        let Value::Global(global) = self.values[function] else {
            return Err(format!("expected a constructor, got {}", self.values[function].kind()));
        };
        let arguments = self.items(arguments)?;
        match (global, arguments) {
            (Global::Dict, []) => Ok(Value::Dict(vec![])),
            (Global::Parameter, &[data, _, _]) => match &self.values[data] {
                Value::Tensor(view) => Ok(Value::Tensor(view.clone())),
                other => Err(format!("expected the tensor of a parameter, got {}", other.kind())),
            },
            (Global::Tensor, &[storage, offset, size, stride, _, _]) => {
                if !matches!(self.values[storage], Value::Storage { .. }) {
                    return Err(format!("expected the storage of a tensor, got {}", self.values[storage].kind()));
                }
                let integers = |t| {
                    let items = self.items(t)?;
                    if items.len() > 8 {
                        return Err(format!("expected a matrix, got {} axes", items.len()));
                    }
                    items.iter().map(|i| self.integer(*i)).collect::<Parsed<Vec<_>>>()
                };
                Ok(Value::Tensor(View {
                    storage,
                    offset: self.integer(offset)?,
                    size: integers(size)?,
                    stride: integers(stride)?,
                }))
            }
            _ => Err(format!("{global:?} with {} arguments", arguments.len())),
        }
    }
}

impl Value {
    fn kind(&self) -> &'static str {
        match self {
            Self::None => "None",
            Self::Bool => "a truth value",
            Self::Integer(_) => "a number",
            Self::Text(_) => "a string",
            Self::Tuple(_) => "a tuple",
            Self::Dict(_) => "a dictionary",
            Self::Global(_) => "a class",
            Self::Storage { .. } => "a storage",
            Self::Tensor(_) => "a tensor",
        }
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
    let mut un = Unpickler { rest: &pickle, values: vec![], stack: vec![], marks: vec![], memo: HashMap::new() };
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
    Ok(Rotations { r1, r2: Tensor::stack(&tensors)? })
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
