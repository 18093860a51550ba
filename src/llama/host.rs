//! Layers whose weights are in main memory, or read from files, and come to the device when it is their turn, through a few buffers of a
//! layer's size.
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
use crate::llama::shelf::{Reader, STAGES, Shelf, Stage};
use crate::llama::{Block, LayerWeights, Placement};
use crate::ranks::Group;
use crate::{DType, Device, Error, Result, Tensor};

/// Layers in main memory, or read.
pub(crate) struct HostLayers {
    pub(super) device: Device,
    buffers: usize,
    reader: Option<Reader>,
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
    /// Values and type of every layer, all tensors behind one another, in whole pages.
    size: Option<(usize, DType)>,
    slots: Vec<Tensor>,
    /// On a GPU, from the first use on.
    copies: Option<Arc<Copies>>,
    /// Where some layers are read, from the first use on.
    shelf: Option<Shelf>,
}

enum Item {
    Here {
        /// On a GPU; before the memory, so that it is unlocked first.
        _pinned: Option<Pinned>,
        /// All tensors of a layer behind one another.
        values: Tensor,
    },
    /// The layer is read each time.
    Read(usize),
}

/// Every tensor of a layer begins at a multiple of so many bytes, as memory of its own would.
const ALIGNMENT: usize = 512;
/// Locked memory is whole pages, of whatever size the system has them.
const PAGE: usize = 64 << 10;

impl HostLayers {
    /// None yet, of which ranks place so many in main memory alike, for a device.
    pub fn among(
        ranks: &Group,
        device: &Device,
        placement: Placement,
        count: usize,
        reader: Option<Reader>,
    ) -> Result<Arc<Self>> {
        let common = (ranks.world() > 1).then(|| CommonLayers::new(ranks, count));
        let buffers = placement.buffers;
        Conveyor::new(1, buffers)?;
        let layers = Layers { device: device.clone(), items: vec![], size: None, slots: vec![], copies: None, shelf: None };
        let state = Mutex::new(State { conveyor: None, common, layers });
        Ok(Arc::new(Self { device: device.clone(), buffers, reader, state }))
    }

    /// The size of a layer, which must be that of the others.
    fn fits(&self, state: &mut State, weights: &LayerWeights) -> Result<(usize, DType)> {
        if state.conveyor.is_some() {
            return Err(Error::argument("streaming", "expected all layers before the first is used"));
        }
        let first = weights.tensors().next().expect("a layer has seven weights");
        let dtype = first.dtype();
        if let Some(odd) = weights.tensors().find(|t| t.dtype() != dtype) {
            return Err(Error::dtype("streaming", dtype, odd.dtype()));
        }
        let size = (whole_pages(weights.tensors().map(|t| padded(t.len(), dtype)).sum(), dtype), dtype);
        let expected = *state.layers.size.get_or_insert(size);
        if size == expected {
            return Ok(size);
        }
        let words = |(len, dtype): (usize, DType)| format!("{len} values of {dtype}");
        Err(Error::argument("streaming", format!("expected layers of {}, got {}", words(expected), words(size))))
    }

    /// A layer that will be read each time. Of its weights the shapes and types are kept.
    ///
    /// # Errors
    /// Layers of different sizes or types; a layer after others were used.
    pub fn shelve(self: &Arc<Self>, layer: usize, block: &Block) -> Result<Block> {
        let mut state = self.lock();
        self.fits(&mut state, &block.weights)?;
        let item = state.layers.items.len();
        state.layers.items.push(Item::Read(layer));
        let weights = block.weights.map(|t| Ok(Tensor::nowhere(t.shape(), t.dtype())))?;
        block.to_device_with(&self.device, weights).map(|block| block.parked(Parked { layers: self.clone(), item }))
    }

    /// Moves a layer's weights to main memory, from wherever they are. The other tensors of a block are small and go to the device.
    ///
    /// # Errors
    /// Layers of different sizes or types; a layer after others were used; no memory, or none that can be locked.
    pub fn park(self: &Arc<Self>, block: &Block) -> Result<Block> {
        let mut state = self.lock();
        let (len, dtype) = self.fits(&mut state, &block.weights)?;
        let fill = |bytes: &mut [u8]| join(&block.weights, bytes);
        let common = state.common.as_mut().map(|common| common.next(len, dtype, fill)).transpose()?;
        let values = match common.flatten() {
            Some(values) => values,
            None => {
                let mut values = pages(len, dtype)?;
                fill(values.bytes_mut()?)?;
                values
            }
        };
        // SAFETY: `values` is whole pages that nothing else is in, and lives as long as this item, which unlocks them first.
        let _pinned = unsafe { pinned(&self.device, &values) }?;
        let weights = cut(&values, &block.weights)?;
        let item = state.layers.items.len();
        state.layers.items.push(Item::Here { _pinned, values });
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
                layers.allocate(buffers, self.reader.as_ref())?;
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
    fn allocate(&mut self, buffers: usize, reader: Option<&Reader>) -> Result<()> {
        let (len, dtype) = self.size.expect("of the first layer");
        let slot = |_| match &self.device {
            Device::Cpu => Tensor::zeros([len], dtype, &Device::Cpu),
            Device::Cuda(device) => Tensor::on(device, &[len], dtype),
        };
        self.slots = (0..buffers).map(slot).collect::<Result<_>>()?;
        if let Device::Cuda(device) = &self.device {
            self.copies = Some(Arc::new(device.copies(buffers, STAGES)?));
        }
        if let Some(reader) = reader.filter(|_| self.items.iter().any(|item| matches!(item, Item::Read(_)))) {
            let stage = |index| {
                let values = pages(len, dtype)?;
                // SAFETY: whole pages of its own, which the stage unlocks before they go.
                let _pinned = unsafe { pinned(&self.device, &values) }?;
                Ok(Stage { _pinned, index, values })
            };
            let stages = (0..STAGES).map(stage).collect::<Result<_>>()?;
            let (copies, reader) = (self.copies.clone(), reader.clone());
            let copied = move |stage| copies.as_ref().map_or(Ok(()), |copies| copies.wait_read(stage));
            self.shelf =
                Some(Shelf::new(buffers, stages, copied, move |layer, values| join(&reader(layer)?, values.bytes_mut()?)));
        }
        Ok(())
    }

    /// Copies to their slots what was read; waits for what is to be in `until`.
    fn deliver(&mut self, until: Option<usize>) -> Result<()> {
        let Self { shelf, slots, copies, .. } = self;
        let Some(shelf) = shelf else { return Ok(()) };
        shelf.deliver(until, |stage, slot| {
            let Some(copies) = &copies else { return stage.values.copy_to(slots[slot].bytes_mut()?) };
            // SAFETY: the reader writes the stage again behind `wait_read`, and it lives until `drop`, which waits; nobody holds the
            // slot's memory, or the copy would not have been asked for.
            unsafe { copies.copy(stage.values.as_bytes()?, slot, slots[slot].view()?) }?;
            copies.read(stage.index)
        })
    }
}

impl Belt for Layers {
    fn copy(&mut self, item: usize, slot: usize) -> Result<()> {
        let slot_values = &mut self.slots[slot];
        if !slot_values.is_unique() {
            return Err(Error::argument("streaming", "weights of a layer are held after its turn"));
        }
        if let Some(shelf) = &mut self.shelf {
            shelf.forget(slot);
        }
        let values = match (&self.items[item], &mut self.shelf) {
            (Item::Here { values, .. }, _) => values,
            (Item::Read(layer), Some(shelf)) => {
                shelf.ask(*layer, slot);
                return self.deliver(None);
            }
            (Item::Read(layer), None) => return Err(Error::argument("streaming", format!("nothing reads layer {layer}"))),
        };
        match &self.copies {
            None => values.copy_to(slot_values.bytes_mut()?),
            // SAFETY: the values are never written and live until `drop`, which waits; nobody holds the slot's memory, so all that was
            // enqueued on it was enqueued before the lease ended.
            Some(copies) => unsafe { copies.copy(values.as_bytes()?, slot, slot_values.view()?) },
        }
    }
    fn filled(&mut self, slot: usize) -> Result<()> {
        self.deliver(Some(slot))?;
        self.copies.as_ref().map_or(Ok(()), |copies| copies.filled(slot))
    }
    fn free(&mut self, slot: usize) -> Result<()> {
        self.deliver(None)?;
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

/// A layer that does not stay on the device.
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

    /// How many layers were read again so far, or are being read.
    pub fn layers_read(&self) -> usize {
        self.layers.lock().layers.shelf.as_ref().map_or(0, Shelf::asked)
    }

    /// True where the layer is read each time.
    pub fn is_read(&self) -> bool {
        matches!(self.layers.lock().layers.items[self.item], Item::Read(_))
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
    /// The weights, wherever they are: those of a layer that is read each time are read.
    ///
    /// # Errors
    /// Those of reading them.
    pub(crate) fn fetched(&self) -> Result<LayerWeights> {
        let Some(Parked { layers, item }) = self.parking() else { return Ok(self.weights.clone()) };
        let Item::Read(layer) = layers.lock().layers.items[*item] else { return Ok(self.weights.clone()) };
        let none = || Error::argument("streaming", format!("nothing reads layer {layer}"));
        (layers.reader.as_ref().ok_or_else(none)?)(layer)
    }

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

/// Writes the tensors of a layer behind one another.
///
/// # Errors
/// More than there is room for; a failing copy from a GPU.
fn join(weights: &LayerWeights, bytes: &mut [u8]) -> Result<()> {
    let (room, mut at) = (bytes.len(), 0);
    weights.tensors().try_for_each(|t| {
        let short = || Error::argument("streaming", format!("expected a layer of at most {room} bytes, got more"));
        t.copy_to(bytes.get_mut(at..at + t.bytes()).ok_or_else(short)?)?;
        at += padded(t.len(), t.dtype()) * t.dtype().size();
        Ok(())
    })
}

/// Locks main memory to its place for copies to a GPU.
///
/// # Safety
/// As for [`CudaDevice::pin`](crate::device::cuda::CudaDevice::pin).
unsafe fn pinned(device: &Device, values: &Tensor) -> Result<Option<Pinned>> {
    match device {
        // SAFETY: the caller's word.
        Device::Cuda(device) => Ok(Some(unsafe { device.pin(values.as_bytes()?) }?)),
        Device::Cpu => Ok(None),
    }
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

/// Values that whole pages with room for `len` of them hold.
fn whole_pages(len: usize, dtype: DType) -> usize {
    len.next_multiple_of(PAGE / dtype.size())
}

/// `len` values in whole pages of main memory that nothing else is in.
fn pages(len: usize, dtype: DType) -> Result<Tensor> {
    let page = PAGE / dtype.size();
    let all = Tensor::zeros([len + page], dtype, &Device::Cpu)?;
    let address = all.as_bytes()?.as_ptr() as usize;
    all.slice((address.next_multiple_of(PAGE) - address) / dtype.size(), len)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::llama::placement::Placer;
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
        let m = whole.clone().streamed(Placement { resident: 1, buffers: 2, ..Placement::RESIDENT }).unwrap();
        assert_eq!(m.placement(), Placement { resident: 1, buffers: 2, ..Placement::RESIDENT });
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
        let few = m.clone().streamed(Placement { resident: 0, buffers: 1, ..Placement::RESIDENT }).unwrap_err().to_string();
        assert!(few.contains("at least 2 buffers, got 1"), "{few}");
        let place = Placement { resident: 0, buffers: 2, ..Placement::RESIDENT };
        let host = HostLayers::among(Group::nobody(), &Device::Cpu, place, 2, None).unwrap();
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
                        let placer = Placer::among(
                            &ranks,
                            &Device::Cpu,
                            Placement { resident: 1, buffers: 2, ..Placement::RESIDENT },
                            whole.blocks.len(),
                        )
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
