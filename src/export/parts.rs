//! Safetensors files of raw bytes: written a layer at a time, joined at the end.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use safetensors::tensor::{Dtype, Metadata, TensorInfo};
use serde_json::{Value, json};

use crate::{DType, Device, Error, Result, Tensor, io};

/// A tensor of any element type as bytes.
pub struct Raw<'a> {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub bytes: Cow<'a, [u8]>,
}

impl Raw<'_> {
    pub fn new(name: String, t: &Tensor) -> Result<Self> {
        let t = t.to_device(&Device::Cpu)?;
        let bytes = io::bytes(&t)?.to_vec();
        Ok(Self { name, dtype: file_type(t.dtype()), shape: t.shape().to_vec(), bytes: bytes.into() })
    }
}

/// An element type in the file's terms.
pub fn file_type(dtype: DType) -> Dtype {
    match dtype {
        DType::F64 => Dtype::F64,
        DType::F32 => Dtype::F32,
        DType::F16 => Dtype::F16,
        DType::BF16 => Dtype::BF16,
        DType::U32 => Dtype::U32,
    }
}

/// Writes one file, whole or not at all: wider types first, so that every tensor is aligned, else in the order given.
pub fn write(path: &Path, tensors: &[Raw], metadata: &BTreeMap<&str, String>) -> Result<()> {
    let mut order: Vec<&Raw> = tensors.iter().collect();
    order.sort_by_key(|t| std::cmp::Reverse(t.dtype.bitsize()));
    let mut header = serde_json::Map::new();
    if !metadata.is_empty() {
        header.insert("__metadata__".into(), json!(metadata));
    }
    let mut end = 0;
    for t in &order {
        let info = json!({"dtype": t.dtype, "shape": t.shape, "data_offsets": [end, end + t.bytes.len()]});
        header.insert(t.name.clone(), info);
        end += t.bytes.len();
    }
    let mut header = Value::from(header).to_string();
    header.push_str(&" ".repeat(header.len().next_multiple_of(8) - header.len()));
    io::write_atomically(path, |out| {
        out.write_all(&(header.len() as u64).to_le_bytes())?;
        out.write_all(header.as_bytes())?;
        order.iter().try_for_each(|t| out.write_all(&t.bytes))
    })
}

/// A mapped file. Nobody may shorten it meanwhile.
#[derive(Debug)]
pub struct Part {
    path: PathBuf,
    map: Mmap,
    metadata: Metadata,
    start: usize,
}

impl Part {
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(Error::io(path))?;
        // SAFETY: read-only; a file shortened while mapped would fault, which the type's documentation rules out.
        let map = unsafe { Mmap::map(&file) }.map_err(Error::io(path))?;
        let (start, metadata) =
            io::header(&map).map_err(|e| Error::format(path, format!("expected a complete safetensors file: {e}")))?;
        Ok(Self { path: path.to_path_buf(), map, metadata, start })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    fn bytes(&self, info: &TensorInfo) -> &[u8] {
        &self.map[self.start + info.data_offsets.0..self.start + info.data_offsets.1]
    }

    /// Its tensors in the file's order.
    pub fn tensors(&self) -> Vec<Raw<'_>> {
        let mut infos: Vec<_> = self.metadata.tensors().into_iter().collect();
        infos.sort_by_key(|(name, info)| (info.data_offsets, name.clone()));
        let raw = |(name, info): (String, &TensorInfo)| {
            let bytes = self.bytes(info).into();
            Raw { name, dtype: info.dtype, shape: info.shape.clone(), bytes }
        };
        infos.into_iter().map(raw).collect()
    }

    pub fn has(&self, name: &str) -> bool {
        self.metadata.info(name).is_some()
    }

    /// The bytes of a tensor that must have this type and shape.
    pub fn get(&self, name: &str, dtype: Dtype, shape: &[usize]) -> Result<&[u8]> {
        let bad = |message: String| Error::format(&self.path, format!("{name}: {message}"));
        let info = self.metadata.info(name).ok_or_else(|| bad("the tensor is missing".into()))?;
        if info.dtype != dtype || info.shape != shape {
            return Err(bad(format!("expected {dtype} {shape:?}, got {} {:?}", info.dtype, info.shape)));
        }
        Ok(self.bytes(info))
    }

    /// A finite floating-point tensor of whatever shape it has.
    pub fn of_any_shape(&self, name: &str, dtype: DType) -> Result<Tensor> {
        let shape = self.metadata.info(name).map(|info| info.shape.clone()).unwrap_or_default();
        self.tensor(name, dtype, &shape)
    }

    /// A finite floating-point tensor.
    pub fn tensor(&self, name: &str, dtype: DType, shape: &[usize]) -> Result<Tensor> {
        let t = io::from_bytes(dtype, shape, self.get(name, file_type(dtype), shape)?)?;
        if !io::is_finite(&t)? {
            return Err(Error::format(&self.path, format!("{name} holds NaN or infinite values")));
        }
        Ok(t)
    }
}

/// Joins parts in their order into `model.safetensors` in `dir`, or into shards of at most `limit` bytes of tensors (a larger
/// tensor gets one of its own) with an index.
pub fn join(parts: &[Part], dir: &Path, limit: u64, metadata: &BTreeMap<&str, String>) -> Result<()> {
    let mut shards: Vec<Vec<Raw>> = vec![vec![]];
    let (mut size, mut total) = (0, 0);
    for t in parts.iter().flat_map(Part::tensors) {
        let bytes = t.bytes.len() as u64;
        if size > 0 && size + bytes > limit {
            shards.push(vec![]);
            size = 0;
        }
        size += bytes;
        total += bytes;
        shards.last_mut().expect("one at least").push(t);
    }
    if let [only] = &shards[..] {
        return write(&dir.join("model.safetensors"), only, metadata);
    }
    let mut map = BTreeMap::new();
    for (i, shard) in shards.iter().enumerate() {
        let file = format!("model-{:05}-of-{:05}.safetensors", i + 1, shards.len());
        write(&dir.join(&file), shard, metadata)?;
        map.extend(shard.iter().map(|t| (t.name.clone(), file.clone())));
    }
    let index = json!({"metadata": {"total_size": total}, "weight_map": map});
    let path = dir.join("model.safetensors.index.json");
    io::write_atomically(&path, |out| out.write_all(format!("{index:#}\n").as_bytes()))
}
