//! Layers that neither the device nor main memory has room for: a thread reads them again each time, ahead of the work, into buffers of
//! main memory, from where they are copied as those that are there to stay.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use crate::device::cuda::Pinned;
use crate::llama::LayerWeights;
use crate::{Error, Result, Tensor};

/// Reads the weights of a layer, to main memory.
pub(crate) type Reader = Arc<dyn Fn(usize) -> Result<LayerWeights> + Send + Sync>;

/// Buffers that layers are read into: one is filled while the other is copied.
pub(super) const STAGES: usize = 2;

/// A buffer of a layer's size in main memory.
pub(super) struct Stage {
    /// On a GPU; before the memory, so that it is unlocked first.
    pub _pinned: Option<Pinned>,
    pub index: usize,
    pub values: Tensor,
}

/// A layer that was read, or not.
struct Read {
    job: u64,
    stage: Stage,
    outcome: Result<()>,
}

/// Reads layers in the order in which they are asked for.
pub(super) struct Shelf {
    jobs: Option<Sender<(u64, usize)>>,
    results: Receiver<Read>,
    emptied: Option<Sender<Stage>>,
    thread: Option<JoinHandle<()>>,
    /// What each slot waits for.
    pending: Vec<Option<u64>>,
    failed: Vec<Option<Error>>,
    asked: u64,
}

impl Shelf {
    /// For so many slots. `copied` returns once what was copied last from a buffer has left it; `fill` writes a layer to one.
    pub fn new(
        slots: usize,
        stages: Vec<Stage>,
        copied: impl Fn(usize) -> Result<()> + Send + 'static,
        fill: impl Fn(usize, &mut Tensor) -> Result<()> + Send + 'static,
    ) -> Self {
        let (jobs, wanted) = channel::<(u64, usize)>();
        let (done, results) = channel();
        let (emptied, empty) = channel::<Stage>();
        stages.into_iter().for_each(|stage| emptied.send(stage).expect("the receiver is here"));
        let thread = std::thread::spawn(move || {
            while let Ok((job, layer)) = wanted.recv() {
                let Ok(mut stage) = empty.recv() else { return };
                let outcome = copied(stage.index).and_then(|()| fill(layer, &mut stage.values));
                if done.send(Read { job, stage, outcome }).is_err() {
                    return;
                }
            }
        });
        let failed = (0..slots).map(|_| None).collect();
        let (jobs, emptied, thread) = (Some(jobs), Some(emptied), Some(thread));
        Self { jobs, results, emptied, thread, pending: vec![None; slots], failed, asked: 0 }
    }

    /// How many layers were asked for.
    pub fn asked(&self) -> usize {
        self.asked as usize
    }

    /// Asks for a layer for a slot, whatever that waited for before.
    pub fn ask(&mut self, layer: usize, slot: usize) {
        self.forget(slot);
        self.asked += 1;
        self.pending[slot] = Some(self.asked);
        // A thread that is gone is heard of where the layer is waited for.
        let _ = self.jobs.as_ref().map(|jobs| jobs.send((self.asked, layer)));
    }

    /// The slot waits for nothing.
    pub fn forget(&mut self, slot: usize) {
        self.pending[slot] = None;
        self.failed[slot] = None;
    }

    /// Gives what has been read to `copy`, with its slot; waits until that is done for the slot `until`.
    ///
    /// # Errors
    /// What failed in reading the layer of that slot; those of `copy`.
    pub fn deliver(&mut self, until: Option<usize>, mut copy: impl FnMut(&Stage, usize) -> Result<()>) -> Result<()> {
        loop {
            let waits = until.is_some_and(|slot| self.pending[slot].is_some());
            let read = if waits { self.results.recv().ok() } else { self.results.try_recv().ok() };
            let Some(Read { job, stage, outcome }) = read else {
                if waits {
                    return Err(Error::argument("streaming", "the thread that reads layers has ended"));
                }
                return until.and_then(|slot| self.failed[slot].take()).map_or(Ok(()), Err);
            };
            // Some are not waited for any more.
            if let Some(slot) = self.pending.iter().position(|pending| *pending == Some(job)) {
                self.pending[slot] = None;
                self.failed[slot] = outcome.and_then(|()| copy(&stage, slot)).err();
            }
            let _ = self.emptied.as_ref().map(|emptied| emptied.send(stage));
        }
    }
}

impl Drop for Shelf {
    fn drop(&mut self) {
        (self.jobs, self.emptied) = (None, None);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join(); // a panic was reported by the thread
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::Device;

    /// A shelf whose layer l is the number l, but for one that cannot be read.
    fn shelf(slots: usize, bad: usize) -> Shelf {
        let stage = |index| Stage { _pinned: None, index, values: Tensor::zeros([1], crate::DType::F64, &Device::Cpu).unwrap() };
        let fill = move |layer: usize, values: &mut Tensor| {
            *values = Tensor::from_vec(vec![layer as f64], [1])?;
            if layer == bad { Err(Error::argument("read", format!("layer {layer} is gone"))) } else { Ok(()) }
        };
        Shelf::new(slots, (0..STAGES).map(stage).collect(), |_| Ok(()), fill)
    }

    proptest! {
        #![proptest_config(ProptestConfig { rng_seed: proptest::test_runner::RngSeed::Fixed(16), cases: 100, ..ProptestConfig::default() })]

        /// Whatever is asked for, forgotten and asked for again: a slot that is waited for has the layer that was asked for last, or its error.
        #[test]
        fn slots_have_what_was_asked_for_last(
            steps in prop::collection::vec((0usize..6, 0usize..3, 0usize..4), 1..40),
        ) {
            let mut shelf = shelf(3, 5);
            let mut slots = [None; 3];
            let mut wanted = [None; 3];
            let deliver = |shelf: &mut Shelf, slots: &mut [Option<usize>; 3], until| shelf.deliver(until, |stage, slot| {
                slots[slot] = Some(stage.values.to_vec::<f64>()?[0] as usize);
                Ok(())
            });
            for (layer, slot, what) in steps {
                match what {
                    0 => {
                        shelf.forget(slot);
                        (slots[slot], wanted[slot]) = (None, None);
                    }
                    1 => deliver(&mut shelf, &mut slots, None).unwrap(),
                    2 => {
                        let outcome = deliver(&mut shelf, &mut slots, Some(slot));
                        if wanted[slot] == Some(5) {
                            prop_assert!(outcome.unwrap_err().to_string().contains("layer 5 is gone"));
                            (slots[slot], wanted[slot]) = (None, None);
                        } else {
                            outcome.unwrap();
                            prop_assert_eq!(slots[slot], wanted[slot]);
                        }
                    }
                    _ => {
                        shelf.ask(layer, slot);
                        (slots[slot], wanted[slot]) = (None, Some(layer));
                    }
                }
            }
            for slot in 0..3 {
                if wanted[slot] != Some(5) {
                    deliver(&mut shelf, &mut slots, Some(slot)).unwrap();
                    prop_assert_eq!(slots[slot], wanted[slot]);
                }
            }
        }
    }

    #[test]
    fn a_thread_that_ends_is_an_error() {
        let stage = Stage { _pinned: None, index: 0, values: Tensor::zeros([1], crate::DType::F64, &Device::Cpu).unwrap() };
        let mut shelf = Shelf::new(1, vec![stage], |_| Ok(()), |_, _| panic!("on purpose"));
        shelf.ask(0, 0);
        let ended = shelf.deliver(Some(0), |_, _| Ok(())).unwrap_err().to_string();
        assert!(ended.contains("the thread that reads layers has ended"), "{ended}");
    }
}
