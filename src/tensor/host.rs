//! The bytes of tensors in main memory.

use std::sync::Arc;

use rayon::prelude::*;

use super::{Storage, Tensor, nowhere};
use crate::device::cpu::CpuBuffer;
use crate::{Error, Result};

/// Bytes that one thread copies at a time.
const AT_ONCE: usize = 4 << 20;

impl Tensor {
    /// The bytes of values in main memory (little-endian machines only, as everywhere in this crate).
    ///
    /// # Errors
    /// A tensor on a GPU.
    pub(crate) fn as_bytes(&self) -> Result<&[u8]> {
        let size = self.dtype().size();
        let range = self.start * size..(self.start + self.len()) * size;
        match &*self.storage {
            Storage::Cpu(b) => Ok(&match b {
                CpuBuffer::F64(v) => bytemuck::cast_slice::<_, u8>(v),
                CpuBuffer::F32(v) => bytemuck::cast_slice(v),
                CpuBuffer::F16(v) => bytemuck::cast_slice(v),
                CpuBuffer::BF16(v) => bytemuck::cast_slice(v),
                CpuBuffer::U32(v) => bytemuck::cast_slice(v),
                CpuBuffer::Shared(part, _) => part.bytes(),
            }[range]),
            Storage::Cuda(_) => Err(Error::device("bytes", "expected a CPU tensor, got one on a GPU (use to_device)")),
            Storage::Coded(_) => Err(super::coded::unread("bytes")),
            Storage::Nowhere(_) => Err(nowhere("bytes", self)),
        }
    }

    /// The same of memory that nobody else holds, to be written.
    ///
    /// # Errors
    /// A tensor on a GPU, or memory that somebody else holds too.
    pub(crate) fn bytes_mut(&mut self) -> Result<&mut [u8]> {
        let size = self.dtype().size();
        let range = self.start * size..(self.start + self.len()) * size;
        match Arc::get_mut(&mut self.storage) {
            Some(Storage::Cpu(b)) => Ok(&mut match b {
                CpuBuffer::F64(v) => bytemuck::cast_slice_mut::<_, u8>(v),
                CpuBuffer::F32(v) => bytemuck::cast_slice_mut(v),
                CpuBuffer::F16(v) => bytemuck::cast_slice_mut(v),
                CpuBuffer::BF16(v) => bytemuck::cast_slice_mut(v),
                CpuBuffer::U32(v) => bytemuck::cast_slice_mut(v),
                CpuBuffer::Shared(..) => return Err(Error::argument("bytes", "expected memory of this process alone")),
            }[range]),
            Some(Storage::Cuda(_)) => Err(Error::device("bytes", "expected a CPU tensor, got one on a GPU")),
            Some(Storage::Coded(_)) => Err(super::coded::unread("bytes")),
            Some(Storage::Nowhere(dtype)) => {
                let dtype = *dtype;
                Err(nowhere("bytes", &Self::nowhere(&self.shape, dtype)))
            }
            None => Err(Error::argument("bytes", "expected memory that nobody else holds")),
        }
    }

    /// Copies the values, from any device, to as many bytes of main memory; pages that nobody has touched are touched by all cores.
    ///
    /// # Errors
    /// Another number of bytes; a failing copy from a GPU.
    pub(crate) fn copy_to(&self, bytes: &mut [u8]) -> Result<()> {
        if bytes.len() != self.bytes() {
            return Err(Error::argument("copy", format!("{} bytes into {}", self.bytes(), bytes.len())));
        }
        if let Storage::Cuda(b) = &*self.storage {
            bytes.par_chunks_mut(AT_ONCE).for_each(|part| part.fill(0));
            return b.download(self.start, bytes);
        }
        let from = self.as_bytes()?;
        bytes.par_chunks_mut(AT_ONCE).zip(from.par_chunks(AT_ONCE)).for_each(|(to, from)| to.copy_from_slice(from));
        Ok(())
    }
}
