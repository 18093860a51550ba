//! Layers in main memory that the ranks of a machine have in common: one of them fills the memory, all read.

use std::fmt;

use crate::device::cpu::CpuBuffer;
use crate::device::shared::SharedPart;
use crate::ranks::{Apart, Common, Group};
use crate::{DType, Error, Result, Tensor};

/// So many layers of one size, in order.
pub(super) struct CommonLayers {
    ranks: Group,
    layers: usize,
    done: usize,
    /// From the first layer on.
    memory: Option<std::result::Result<Common, Apart>>,
}

impl fmt::Debug for CommonLayers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {} layers of {:?}", self.done, self.layers, self.ranks)
    }
}

impl CommonLayers {
    pub fn new(ranks: &Group, layers: usize) -> Self {
        Self { ranks: ranks.clone(), layers, done: 0, memory: None }
    }

    /// The values of the next layer, which `fill` writes, at one rank; nothing where every rank has a copy of its own. All ranks call this, and
    /// then [`CommonLayers::finish`]: nobody reads values before that of the last layer has returned.
    ///
    /// # Errors
    /// Those of [`Group::gather`] and `fill`; more layers than were promised; copies that do not fit.
    pub fn next(&mut self, len: usize, dtype: DType, fill: impl FnOnce(&mut [u8]) -> Result<()>) -> Result<Option<Tensor>> {
        let layer = len * dtype.size();
        if self.done == self.layers {
            return Err(Error::argument("streaming", format!("expected {} layers in main memory, got one more", self.layers)));
        }
        let memory = match &mut self.memory {
            Some(memory) => memory,
            None => {
                let all = layer.saturating_mul(self.layers);
                let found = self.ranks.common_memory(all)?;
                if let Err(apart) = &found {
                    copies_fit(apart, all)?;
                }
                self.memory.insert(found)
            }
        };
        let Ok(common) = memory else { return Ok(None) };
        let start = self.done * layer;
        if common.fills {
            // SAFETY: every layer is filled once, by this rank, and read when all ranks have met behind the last one.
            fill(unsafe { common.bytes.bytes_mut(start, layer) })?;
        }
        // SAFETY: as above.
        let part = unsafe { SharedPart::new(&common.bytes, start, layer) };
        Tensor::from_buffer(CpuBuffer::Shared(part, dtype), &[len]).map(Some)
    }

    /// The layer is in its place. Behind the last one all ranks meet.
    ///
    /// # Errors
    /// Those of [`Group::gather`].
    pub fn finish(&mut self) -> Result<()> {
        self.done += 1;
        if self.done == self.layers {
            self.ranks.any("layers in main memory", false)?;
        }
        Ok(())
    }

    /// Why every rank has a copy of its own, where that is so.
    pub fn why_apart(&self) -> Option<&str> {
        self.memory.as_ref().and_then(|memory| memory.as_ref().err()).map(|apart| apart.why.as_str())
    }
}

/// Fails where a copy for every rank of the machine takes more than was free.
fn copies_fit(apart: &Apart, bytes: usize) -> Result<()> {
    let all = bytes.saturating_mul(apart.ranks);
    match apart.free {
        Some(free) if all > free => {
            let gib = |bytes: usize| bytes as f64 / f64::from(1 << 30);
            let message = format!(
                "expected {:.2} GiB free for a copy of the layers for each of {} ranks, got {:.2}; they cannot have one in common: {}",
                gib(all),
                apart.ranks,
                gib(free),
                apart.why
            );
            Err(Error::argument("main memory", message))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_for_all_ranks_fit_or_are_refused() {
        let apart = |free| Apart { why: "no such call".into(), ranks: 4, free };
        copies_fit(&apart(Some(4 << 30)), 1 << 30).unwrap();
        copies_fit(&apart(None), usize::MAX).unwrap();
        let message = copies_fit(&apart(Some((4 << 30) - 1)), 1 << 30).unwrap_err().to_string();
        assert!(
            message.contains("expected 4.00 GiB free") && message.contains("4 ranks") && message.contains("no such call"),
            "{message}"
        );
    }
}
