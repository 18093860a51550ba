//! Layers whose weights are in main memory and come to the device when it is their turn, through a few buffers of a layer's size.
//!
//! A [`Conveyor`] decides what is copied when. On a GPU a stream of its own copies from locked memory while the layers before are at
//! work; on the CPU the copies are plain, in the same order. Ranks of one machine have the memory in common.

use std::borrow::Cow;
use std::fmt;
use std::ops::Deref;
use std::sync::{Arc, Mutex, MutexGuard};

pub(crate) use crate::device::conveyor::Heading;
use crate::device::conveyor::{Belt, Conveyor};
use crate::device::cuda::{Copies, Pinned};
use crate::llama::common::CommonLayers;
use crate::llama::{Block, LayerWeights};
use crate::ranks::Group;
use crate::{DType, Device, Error, Result, Tensor};

/// Where the layers of a model are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placement {
    /// So many layers, from the last, stay on the device: a backward pass begins with what is there. The others are in main memory.
    pub resident: usize,
    /// Buffers on the device that those pass through: at least 2, one in use and the next one on its way.
    pub buffers: usize,
}

impl Placement {
    /// Every layer on the device.
    pub const RESIDENT: Self = Self { resident: usize::MAX, buffers: 3 };

    /// How many of so many layers are in main memory.
    pub fn streamed(&self, layers: usize) -> usize {
        layers.saturating_sub(self.resident)
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
        let resident = placement.streamed(layers);
        Ok(Self { host: HostLayers::among(ranks, device, placement, resident)?, resident })
    }

    /// Layer `l`, to main memory or to the device. In order: it is the next one in main memory.
    ///
    /// # Errors
    /// Those of [`HostLayers::park`] and [`Block::to_device`].
    pub fn place(&self, l: usize, block: &Block) -> Result<Block> {
        if l < self.resident { self.host.park(block) } else { block.to_device(&self.host.device) }
    }
}

/// Layers in main memory.
pub(crate) struct HostLayers {
    device: Device,
    buffers: usize,
    state: Mutex<State>,
}

struct State {
    /// From the first use on.
    conveyor: Option<Conveyor>,
    /// Where ranks have their memory in common.
    common: Option<CommonLayers>,
    layers: Layers,
}

/// The layers and the buffers.
struct Layers {
    device: Device,
    items: Vec<Item>,
    slots: Vec<Tensor>,
    /// On a GPU, from the first use on.
    copies: Option<Copies>,
}

struct Item {
    /// On a GPU; before the memory, so that it is unlocked first.
    _pinned: Option<Pinned>,
    /// All tensors of a layer behind one another.
    values: Tensor,
}

/// Every tensor of a layer begins at a multiple of so many bytes, as memory of its own would.
const ALIGNMENT: usize = 512;
/// Locked memory is whole pages, of whatever size the system has them.
const PAGE: usize = 64 << 10;

impl HostLayers {
    /// None yet, of so many that ranks place alike, for a device.
    fn among(ranks: &Group, device: &Device, placement: Placement, count: usize) -> Result<Arc<Self>> {
        let common = (ranks.world() > 1).then(|| CommonLayers::new(ranks, count));
        let buffers = placement.buffers;
        Conveyor::new(1, buffers)?;
        let layers = Layers { device: device.clone(), items: vec![], slots: vec![], copies: None };
        Ok(Arc::new(Self { device: device.clone(), buffers, state: Mutex::new(State { conveyor: None, common, layers }) }))
    }

    /// Moves a layer's weights to main memory, from wherever they are. The other tensors of a block are small and go to the device.
    ///
    /// # Errors
    /// Layers of different sizes or types; a layer after others were used; no memory, or none that can be locked.
    pub fn park(self: &Arc<Self>, block: &Block) -> Result<Block> {
        let mut state = self.lock();
        if state.conveyor.is_some() {
            return Err(Error::argument("streaming", "expected all layers before the first is used"));
        }
        let first = block.weights.tensors().next().expect("a layer has seven weights");
        let dtype = first.dtype();
        if let Some(odd) = block.weights.tensors().find(|t| t.dtype() != dtype) {
            return Err(Error::dtype("streaming", dtype, odd.dtype()));
        }
        let len = whole_pages(block.weights.tensors().map(|t| padded(t.len(), dtype)).sum(), dtype);
        if let Some(other) = state.layers.items.first().map(|i| &i.values)
            && (other.len(), other.dtype()) != (len, dtype)
        {
            let size = |len: usize, dtype: DType| format!("{len} values of {dtype}");
            let (expected, got) = (size(other.len(), other.dtype()), size(len, dtype));
            return Err(Error::argument("streaming", format!("expected layers of {expected}, got {got}")));
        }
        let fill = |bytes: &mut [u8]| {
            let mut at = 0;
            block.weights.tensors().try_for_each(|t| {
                t.copy_to(&mut bytes[at..at + t.bytes()])?;
                at += padded(t.len(), dtype) * dtype.size();
                Ok(())
            })
        };
        let common = state.common.as_mut().map(|common| common.next(len, dtype, fill)).transpose()?;
        let values = match common.flatten() {
            Some(values) => values,
            None => {
                let mut values = pages(len, dtype)?;
                fill(values.bytes_mut()?)?;
                values
            }
        };
        let _pinned = match &self.device {
            // SAFETY: `values` is whole pages that nothing else is in, and lives as long as this item, which unlocks them first.
            Device::Cuda(device) => Some(unsafe { device.pin(values.as_bytes()?) }?),
            Device::Cpu => None,
        };
        let weights = cut(&values, &block.weights)?;
        let item = state.layers.items.len();
        state.layers.items.push(Item { _pinned, values });
        state.common.as_mut().map_or(Ok(()), CommonLayers::finish)?;
        block.to_device_with(&self.device, weights).map(|block| block.parked(Parked { layers: self.clone(), item }))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn take(self: &Arc<Self>, item: usize, heading: Heading) -> Result<(Lease, Tensor)> {
        let mut state = self.lock();
        let State { conveyor, layers, .. } = &mut *state;
        let conveyor = match conveyor {
            Some(conveyor) => conveyor,
            None => {
                // No more buffers than layers, and two at least.
                let buffers = self.buffers.min(layers.items.len()).max(2);
                layers.allocate(buffers)?;
                conveyor.insert(Conveyor::new(layers.items.len(), buffers)?)
            }
        };
        let slot = conveyor.take(item, heading, layers)?;
        Ok((Lease { layers: self.clone(), slot }, layers.slots[slot].clone()))
    }
}

impl fmt::Debug for HostLayers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "HostLayers({} for {})", self.lock().layers.items.len(), self.device)
    }
}

impl Layers {
    fn allocate(&mut self, buffers: usize) -> Result<()> {
        let values = &self.items[0].values;
        let slot = |_| match &self.device {
            Device::Cpu => Tensor::zeros(values.shape(), values.dtype(), &Device::Cpu),
            Device::Cuda(device) => Tensor::on(device, values.shape(), values.dtype()),
        };
        self.slots = (0..buffers).map(slot).collect::<Result<_>>()?;
        if let Device::Cuda(device) = &self.device {
            self.copies = Some(device.copies(buffers)?);
        }
        Ok(())
    }
}

impl Belt for Layers {
    fn copy(&mut self, item: usize, slot: usize) -> Result<()> {
        let (values, slot_values) = (&self.items[item].values, &mut self.slots[slot]);
        if !slot_values.is_unique() {
            return Err(Error::argument("streaming", "weights of a layer are held after its turn"));
        }
        match &self.copies {
            None => values.copy_to(slot_values.bytes_mut()?),
            // SAFETY: the values are never written and live until `drop`, which waits; nobody holds the slot's memory, so all that was
            // enqueued on it was enqueued before the lease ended.
            Some(copies) => unsafe { copies.copy(values.as_bytes()?, slot, slot_values.view()?) },
        }
    }
    fn filled(&mut self, slot: usize) -> Result<()> {
        self.copies.as_ref().map_or(Ok(()), |copies| copies.filled(slot))
    }
    fn free(&mut self, slot: usize) -> Result<()> {
        self.copies.as_ref().map_or(Ok(()), |copies| copies.free(slot))
    }
}

impl Drop for Layers {
    fn drop(&mut self) {
        if let Some(copies) = &self.copies {
            // Before the memory at both ends goes; an error would be the device's end, and is reported by whatever comes next.
            let _ = copies.finish();
        }
    }
}

/// A layer that is in main memory.
#[derive(Clone, Debug)]
pub(crate) struct Parked {
    layers: Arc<HostLayers>,
    item: usize,
}

impl Parked {
    /// Buffers that it and its neighbours pass through.
    pub fn buffers(&self) -> usize {
        self.layers.buffers
    }

    /// Why every rank of this machine has these layers for itself, where they were to have them in common.
    pub fn why_apart(&self) -> Option<String> {
        self.layers.lock().common.as_ref().and_then(|common| common.why_apart().map(str::to_string))
    }

    /// How many layers were copied to the device so far, of all that share its buffers.
    pub fn copied(&self) -> usize {
        self.layers.lock().conveyor.as_ref().map_or(0, Conveyor::copies)
    }
}

/// A buffer that is in use.
struct Lease {
    layers: Arc<HostLayers>,
    slot: usize,
}

impl Drop for Lease {
    fn drop(&mut self) {
        let mut state = self.layers.lock();
        let State { conveyor, layers, .. } = &mut *state;
        // A mark that cannot be set means a device that reports the same error to whatever comes next.
        let _ = conveyor.as_mut().map(|conveyor| conveyor.done(self.slot, layers));
    }
}

/// A layer whose weights are on the device as long as this lives.
pub(crate) struct AtWork<'a> {
    block: Cow<'a, Block>,
    /// Behind the block, whose memory it is.
    _lease: Option<Lease>,
}

impl Deref for AtWork<'_> {
    type Target = Block;
    fn deref(&self) -> &Block {
        &self.block
    }
}

impl Block {
    /// This layer with its weights on the device, on the way of a pass. What is made of it must not outlive it, but for results.
    ///
    /// # Errors
    /// No memory for buffers; a failing copy; weights of another layer that are held after their turn.
    pub(crate) fn at_work(&self, heading: Heading) -> Result<AtWork<'_>> {
        let Some(Parked { layers, item }) = self.parking() else {
            return Ok(AtWork { block: Cow::Borrowed(self), _lease: None });
        };
        let (lease, values) = layers.take(*item, heading)?;
        let weights = cut(&values, &self.weights)?;
        Ok(AtWork { block: Cow::Owned(self.with_weights(weights)), _lease: Some(lease) })
    }
}

/// Values that a tensor of `len` takes among others.
fn padded(len: usize, dtype: DType) -> usize {
    (len * dtype.size()).next_multiple_of(ALIGNMENT) / dtype.size()
}

/// The tensors of a layer, which are behind one another in `values`.
fn cut(values: &Tensor, like: &LayerWeights) -> Result<LayerWeights> {
    let mut first = 0;
    like.map(|t| {
        let part = values.slice(first, t.len())?.reshape(t.shape())?;
        first += padded(t.len(), t.dtype());
        Ok(part)
    })
}

/// At least so many values that fill whole pages.
fn whole_pages(len: usize, dtype: DType) -> usize {
    len.next_multiple_of(PAGE / dtype.size())
}

/// Values in whole pages of main memory that nothing else is in.
fn pages(len: usize, dtype: DType) -> Result<Tensor> {
    let page = PAGE / dtype.size();
    let all = Tensor::zeros([len + page], dtype, &Device::Cpu)?;
    let address = all.as_bytes()?.as_ptr() as usize;
    all.slice((address.next_multiple_of(PAGE) - address) / dtype.size(), len)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::llama::{Llama, synthetic};

    fn model() -> Llama {
        let config = synthetic::shape("tiny:4").unwrap();
        synthetic::model(&config, 1, DType::F32, &Device::Cpu).unwrap()
    }

    fn values(block: &Block) -> Vec<f64> {
        block.weights.tensors().flat_map(|t| t.to_f64_vec().unwrap()).collect()
    }

    #[test]
    fn layers_come_as_they_were_and_must_be_let_go() {
        let whole = model();
        let m = whole.clone().streamed(Placement { resident: 1, buffers: 2 }).unwrap();
        assert_eq!(m.placement(), Placement { resident: 1, buffers: 2 });
        assert_eq!(m.sha256().unwrap(), whole.sha256().unwrap());
        for (a, b) in m.blocks.iter().zip(&whole.blocks) {
            assert_eq!(values(&a.at_work(Heading::Around).unwrap()), values(b));
            let aligned = |t: &Tensor| (t.as_bytes().unwrap().as_ptr() as usize).is_multiple_of(ALIGNMENT);
            assert!(!a.is_streamed() || a.weights.tensors().all(aligned));
        }
        // Weights that somebody keeps are not overwritten under their hands.
        let kept = m.blocks[0].at_work(Heading::Around).unwrap().weights.clone();
        let errors: Vec<String> =
            (0..3).filter_map(|l| m.blocks[l].at_work(Heading::Around).err()).map(|e| e.to_string()).collect();
        assert!(errors.iter().any(|e| e.contains("held after its turn")), "{errors:?}");
        let first: Vec<f64> = kept.tensors().flat_map(|t| t.to_f64_vec().unwrap()).collect();
        assert_eq!(first, values(&whole.blocks[0]));
        drop(kept);
        assert_eq!(values(&m.blocks[2].at_work(Heading::Around).unwrap()), values(&whole.blocks[2]));
    }

    #[test]
    fn what_cannot_be_streamed_is_refused() {
        let m = model();
        let few = m.clone().streamed(Placement { resident: 0, buffers: 1 }).unwrap_err().to_string();
        assert!(few.contains("at least 2 buffers, got 1"), "{few}");
        let host = HostLayers::among(Group::nobody(), &Device::Cpu, Placement { resident: 0, buffers: 2 }, 2).unwrap();
        let first = host.park(&m.blocks[0]).unwrap();
        let wide = m.blocks[1].with_weights(m.blocks[1].weights.map(|t| t.to_dtype(DType::F64)).unwrap());
        assert!(host.park(&wide).unwrap_err().to_string().contains("expected layers of"));
        first.at_work(Heading::Around).unwrap();
        let late = host.park(&m.blocks[1]).unwrap_err().to_string();
        assert!(late.contains("before the first is used"), "{late}");
    }

    /// The memory is filled by rank 0 alone: what the others read is in common.
    #[test]
    fn ranks_of_a_machine_have_layers_in_common() {
        use crate::ranks::Place;
        let whole = model();
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let mut listener = Some(listener);
        std::thread::scope(|scope| {
            let each: Vec<_> = (0..3)
                .map(|rank| {
                    let (listener, whole) = (listener.take(), &whole);
                    scope.spawn(move || {
                        let ranks = Group::connect(&Place::local(rank, 3, port), listener).unwrap();
                        let placer =
                            Placer::among(&ranks, &Device::Cpu, Placement { resident: 1, buffers: 2 }, whole.blocks.len())
                                .unwrap();
                        let other = |b: &Block| b.with_weights(b.weights.map(|t| t.clone().scale(0.0)).unwrap());
                        for (l, block) in whole.blocks.iter().enumerate() {
                            let own = if rank == 0 || l == 3 { (**block).clone() } else { other(block) };
                            let placed = placer.place(l, &own).unwrap();
                            if l == 2 {
                                assert_eq!(values(&placed.at_work(Heading::Around).unwrap()), values(block));
                                assert!(placed.parking().unwrap().why_apart().is_none());
                            }
                        }
                    })
                })
                .collect();
            each.into_iter().for_each(|thread| thread.join().unwrap());
        });
    }
}
