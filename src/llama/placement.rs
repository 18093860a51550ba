//! Where the layers of a model are: on the device to stay, in main memory, or read again each time.

use std::sync::Arc;

use crate::llama::Block;
use crate::llama::host::HostLayers;
use crate::llama::shelf::Reader;
use crate::ranks::Group;
use crate::{Device, Error, Result};

/// Where the layers of a model are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placement {
    /// So many layers, from the last, stay on the device: a backward pass begins with what is there.
    pub resident: usize,
    /// Of the others so many, from the last, are in main memory. The first are read again each time, from the model's files.
    pub hosted: usize,
    /// Buffers on the device that those pass through: at least 2, one in use and the next one on its way.
    pub buffers: usize,
}

impl Placement {
    /// Every layer on the device.
    pub const RESIDENT: Self = Self { resident: usize::MAX, hosted: usize::MAX, buffers: 3 };

    /// How many of so many layers do not stay on the device.
    pub fn streamed(&self, layers: usize) -> usize {
        layers.saturating_sub(self.resident)
    }

    /// How many of so many layers are read from files.
    pub fn read(&self, layers: usize) -> usize {
        self.streamed(layers).saturating_sub(self.hosted)
    }
}

impl Default for Placement {
    fn default() -> Self {
        Self::RESIDENT
    }
}

/// Puts the layers of a network where they belong, as they are made.
pub(crate) struct Placer {
    host: Arc<HostLayers>,
    /// The first that is in main memory.
    hosted: usize,
    /// The first that stays on the device.
    resident: usize,
}

impl Placer {
    /// Of so many layers for a device.
    ///
    /// # Errors
    /// Fewer than two buffers.
    pub fn new(device: &Device, placement: Placement, layers: usize) -> Result<Self> {
        Self::among(Group::nobody(), device, placement, layers)
    }

    /// The same at every rank, each of which places equal layers: those in main memory are there once for all ranks of a machine.
    ///
    /// # Errors
    /// Fewer than two buffers.
    pub fn among(ranks: &Group, device: &Device, placement: Placement, layers: usize) -> Result<Self> {
        Self::reading(ranks, device, placement, layers, None)
    }

    /// The same; `reader` reads the layers that neither the device nor main memory has.
    ///
    /// # Errors
    /// Fewer than two buffers; layers that are to be read, and no reader.
    pub fn reading(ranks: &Group, device: &Device, placement: Placement, layers: usize, reader: Option<Reader>) -> Result<Self> {
        let (hosted, resident) = (placement.read(layers), placement.streamed(layers));
        if hosted > 0 && reader.is_none() {
            let message = format!("expected all layers in main memory or on the device, got {hosted} that nothing reads again");
            return Err(Error::argument("streaming", message));
        }
        let host = HostLayers::among(ranks, device, placement, resident - hosted, reader)?;
        Ok(Self { host, hosted, resident })
    }

    /// True of a layer that will be read each time: [`Placer::place`] takes of its weights their shapes and types alone.
    pub fn shelves(&self, l: usize) -> bool {
        l < self.hosted
    }

    /// Layer `l`, to where it belongs. In order: it is the next one that does not stay on the device.
    ///
    /// # Errors
    /// Those of [`HostLayers::park`] and [`Block::to_device`].
    pub fn place(&self, l: usize, block: &Block) -> Result<Block> {
        match l {
            _ if self.shelves(l) => self.host.shelve(l, block),
            _ if l < self.resident => self.host.park(block),
            _ => block.to_device(&self.host.device),
        }
    }
}
