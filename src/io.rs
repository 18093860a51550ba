//! Files: written whole or not at all, and tensors by name in the safetensors format.

mod files;

pub use files::{check_writable, follow, write_atomically};
pub(crate) use files::{exchange, folder_of, is_mount_point, sync_folder};

use std::collections::BTreeMap;
use std::path::Path;

use half::{bf16, f16};
use safetensors::tensor::{Dtype, Metadata};

use crate::dtype::{DType, Element};
use crate::{Device, Error, Result, Tensor};

/// Writes tensors of any device and a string map as one safetensors file, atomically; equal contents give equal bytes.
///
/// # Errors
/// Those of [`write_atomically`]; a failing copy from a GPU.
pub fn save_tensors(path: &Path, tensors: &BTreeMap<String, Tensor>, metadata: &BTreeMap<String, String>) -> Result<()> {
    let mut order = tensors.iter().map(|(name, t)| Ok((name, t.to_device(&Device::Cpu)?))).collect::<Result<Vec<_>>>()?;
    order.sort_by_key(|(_, t)| std::cmp::Reverse(t.dtype().size())); // keeps every tensor aligned; stable, so then by name
    let mut header = BTreeMap::new();
    if !metadata.is_empty() {
        header.insert("__metadata__", serde_json::json!(metadata));
    }
    let mut end = 0;
    for (name, t) in &order {
        let dtype = t.dtype().to_string().to_uppercase();
        let info = serde_json::json!({ "dtype": dtype, "shape": t.shape(), "data_offsets": [end, end + t.bytes()] });
        header.insert(name, info);
        end += t.bytes();
    }
    let mut header = serde_json::to_string(&header).map_err(|e| Error::format(path, e))?;
    header.push_str(&" ".repeat(header.len().next_multiple_of(8) - header.len()));
    write_atomically(path, |out| {
        out.write_all(&(header.len() as u64).to_le_bytes())?;
        out.write_all(header.as_bytes())?;
        for (_, t) in &order {
            out.write_all(bytes(t).map_err(std::io::Error::other)?)?;
        }
        Ok(())
    })
}

/// Bytes in hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// The memory of a CPU tensor (little-endian machines only, as everywhere in this crate).
pub(crate) fn bytes(t: &Tensor) -> Result<&[u8]> {
    t.as_bytes()
}

/// What a safetensors file holds: tensors by name, and its string map.
pub type NamedTensors = (BTreeMap<String, Tensor>, BTreeMap<String, String>);

/// The longest safetensors header that is read, in bytes: ten times what 4096 layers take. Parsed, it may take ten times as much.
const MAX_HEADER: usize = 16 << 20;
/// The most tensors of a safetensors file: 4096 layers of codes, scales and zero points are fewer.
const MAX_TENSORS: usize = 1 << 17;

/// A message without an end is one that quotes a damaged file: cut.
pub(crate) fn short(message: impl std::fmt::Display) -> String {
    let mut text = message.to_string();
    if let Some((cut, _)) = text.char_indices().nth(200) {
        text.replace_range(cut.., "…");
    }
    text
}

/// What to say of a file that Git left in place of a large one.
pub(crate) fn lfs_pointer(bytes: &[u8]) -> Option<&'static str> {
    let pointer = bytes.starts_with(b"version https://git-lfs.github.com/spec/");
    pointer.then_some("this is a Git LFS pointer, not the file itself; `git lfs pull` in the folder fetches it")
}

/// Where a safetensors file's data starts, and what it is. Lengths are compared and never added, so no header can make them
/// overflow.
pub(crate) fn header(bytes: &[u8]) -> std::result::Result<(usize, Metadata), String> {
    let (length, rest) = bytes.split_first_chunk().ok_or("it has no header")?;
    let header = usize::try_from(u64::from_le_bytes(*length)).ok().and_then(|n| rest.get(..n)).ok_or("its header is cut off")?;
    if header.len() > MAX_HEADER {
        return Err(format!("its header has {} bytes, at most {MAX_HEADER} are read", header.len()));
    }
    let tensors = header.windows(14).filter(|w| w == b"\"data_offsets\"").count();
    if tensors > MAX_TENSORS {
        return Err(format!("its header names {tensors} tensors, at most {MAX_TENSORS} are read"));
    }
    let metadata: Metadata = serde_json::from_slice(header).map_err(|e| format!("its header is invalid: {}", short(e)))?;
    let (want, got) = (metadata.data_len(), rest.len() - header.len());
    if want != got {
        return Err(format!("its header promises {want} bytes of data, got {got}"));
    }
    Ok((bytes.len() - got, metadata))
}

/// A tensor of little-endian bytes.
pub(crate) fn from_bytes(dtype: DType, shape: &[usize], bytes: &[u8]) -> Result<Tensor> {
    fn read<T: Element>(data: &[u8], shape: &[usize]) -> Result<Tensor> {
        Tensor::from_vec(bytemuck::pod_collect_to_vec::<u8, T>(data), shape)
    }
    match dtype {
        DType::F64 => read::<f64>(bytes, shape),
        DType::F32 => read::<f32>(bytes, shape),
        DType::F16 => read::<f16>(bytes, shape),
        DType::BF16 => read::<bf16>(bytes, shape),
        DType::U32 => read::<u32>(bytes, shape),
    }
}

/// False when a CPU tensor holds a NaN or an infinity.
pub(crate) fn is_finite(t: &Tensor) -> Result<bool> {
    fn all<T: Element>(t: &Tensor) -> Result<bool> {
        Ok(t.as_slice::<T>()?.iter().all(|x| x.to_f64().is_finite()))
    }
    match t.dtype() {
        DType::F64 => all::<f64>(t),
        DType::F32 => all::<f32>(t),
        DType::F16 => all::<f16>(t),
        DType::BF16 => all::<bf16>(t),
        DType::U32 => Ok(true),
    }
}

/// Reads every tensor (f64, f32, f16, bf16, u32) of a safetensors file into CPU memory.
///
/// # Errors
/// A file that cannot be read, is not safetensors or is truncated, or holds another element type.
pub fn load_tensors(path: &Path) -> Result<NamedTensors> {
    let buffer = std::fs::read(path).map_err(Error::io(path))?;
    let (start, metadata) = header(&buffer).map_err(|e| Error::format(path, format!("not a whole safetensors file: {e}")))?;
    let mut tensors = BTreeMap::new();
    for (name, info) in metadata.tensors() {
        let dtype = match info.dtype {
            Dtype::F64 => DType::F64,
            Dtype::F32 => DType::F32,
            Dtype::F16 => DType::F16,
            Dtype::BF16 => DType::BF16,
            Dtype::U32 => DType::U32,
            other => {
                return Err(Error::format(path, format!("{name}: expected dtype F64, F32, F16, BF16 or U32, got {other:?}")));
            }
        };
        // The header was checked against the file's length and every shape against its bytes.
        let (from, to) = info.data_offsets;
        tensors.insert(name, from_bytes(dtype, &info.shape, &buffer[start + from..start + to])?);
    }
    let strings = metadata.metadata().clone().unwrap_or_default();
    Ok((tensors, strings.into_iter().collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_contents_give_equal_bytes_and_come_back() {
        let folder = tempfile::tempdir().unwrap();
        let (a, b) = (folder.path().join("a"), folder.path().join("b"));
        let tensors: BTreeMap<_, _> = [
            ("half".to_string(), crate::ops::randn([3], 1).to_dtype(DType::BF16).unwrap()),
            ("wide".to_string(), crate::ops::randn([2, 5], 2)),
            ("none".to_string(), Tensor::zeros([0, 4], DType::F32, &Device::Cpu).unwrap()),
        ]
        .into();
        let metadata: BTreeMap<_, _> = (0..9).map(|i| (format!("key {i}"), "value \"é\"".to_string())).collect();
        save_tensors(&a, &tensors, &metadata).unwrap();
        save_tensors(&b, &tensors, &metadata).unwrap();
        assert_eq!(std::fs::read(&a).unwrap(), std::fs::read(&b).unwrap());
        let (read, strings) = load_tensors(&a).unwrap();
        assert_eq!(strings, metadata);
        for (name, t) in &tensors {
            assert_eq!((read[name].shape(), bytes(&read[name]).unwrap()), (t.shape(), bytes(t).unwrap()), "{name}");
        }
    }
}
