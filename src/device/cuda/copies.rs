//! Copies from the host while the device computes: a stream beside the one that all other work runs on, and the events that order both.

use std::ffi::c_void;
use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaEvent, CudaStream, result, sys};

use super::{CudaDevice, driver_error};
use crate::device::launch::View;
use crate::{Error, Result};

/// A stream of copies into numbered slots, with two events for each: what is in it is there, and what was in it is not used any more.
pub(crate) struct Copies {
    device: CudaDevice,
    stream: Arc<CudaStream>,
    filled: Vec<CudaEvent>,
    free: Vec<CudaEvent>,
    /// Of memory that copies come from and that is written again behind them.
    read: Vec<CudaEvent>,
}

impl CudaDevice {
    /// For so many slots, whose memory was allocated before on the device's own stream, and so many parts of main memory that are written
    /// again and again.
    ///
    /// # Errors
    /// A failing call of the driver.
    pub(crate) fn copies(&self, slots: usize, stages: usize) -> Result<Copies> {
        let context = &self.0.context;
        let stream = context.new_stream().map_err(driver_error("creating a stream of copies"))?;
        let event = |_| context.new_event(None).map_err(driver_error("event"));
        let filled = (0..slots).map(event).collect::<Result<_>>()?;
        let free = (0..slots).map(event).collect::<Result<Vec<_>>>()?;
        let read = (0..stages).map(event).collect::<Result<_>>()?;
        let copies = Copies { device: self.clone(), stream, filled, free, read };
        // Memory is there once what was enqueued before its allocation has run.
        (0..slots).try_for_each(|slot| copies.free(slot))?;
        Ok(copies)
    }

    /// Locks host memory to where it is, so that copies from it are made by the card alone.
    ///
    /// # Errors
    /// What the driver reports: memory that cannot be locked, with its size.
    ///
    /// # Safety
    /// The bytes are whole pages that nothing else is locked in, and stay allocated as long as what is returned.
    pub(crate) unsafe fn pin(&self, bytes: &[u8]) -> Result<Pinned> {
        self.bind()?;
        let start = bytes.as_ptr().cast_mut().cast::<c_void>();
        // SAFETY: the range is allocated; the driver checks the rest.
        unsafe { sys::cuMemHostRegister_v2(start, bytes.len(), 0) }.result().map_err(|e| {
            let gib = bytes.len() as f64 / f64::from(1 << 30);
            Error::Cuda(format!("locking {gib:.2} GiB of main memory for copies to the GPU: {e:?}"))
        })?;
        Ok(Pinned { start: start as usize, context: self.0.context.clone() })
    }
}

impl Copies {
    /// Enqueues a copy into a slot, behind the last [`Copies::free`] of it.
    ///
    /// # Errors
    /// Other sizes; a failing call of the driver.
    ///
    /// # Safety
    /// The bytes stay where they are until [`Copies::finish`], and unwritten until then or until [`Copies::wait_read`] of a
    /// [`Copies::read`] behind this; whatever else uses `to` is enqueued between a
    /// [`Copies::filled`] and a [`Copies::free`] of this slot.
    pub(crate) unsafe fn copy(&self, bytes: &[u8], slot: usize, to: View<'_>) -> Result<()> {
        if bytes.len() != to.bytes() {
            return Err(Error::argument("copy", format!("{} bytes into {}", bytes.len(), to.bytes())));
        }
        self.device.owns("copy", &[to])?;
        self.stream.wait(&self.free[slot]).map_err(driver_error("waiting for an event"))?;
        // SAFETY: `to` is live memory of this GPU of that size, nothing enqueued uses it now, and the bytes stay, says the caller.
        unsafe { result::memcpy_htod_async(to.address(), bytes, self.stream.cu_stream()) }
            .map_err(driver_error("copy to the GPU"))?;
        self.filled[slot].record(&self.stream).map_err(driver_error("event"))
    }

    /// Work on the device from here on waits for the last copy into a slot.
    ///
    /// # Errors
    /// A failing call of the driver.
    pub(crate) fn filled(&self, slot: usize) -> Result<()> {
        self.device.0.stream.wait(&self.filled[slot]).map_err(driver_error("waiting for an event"))
    }

    /// The next copy into a slot waits for all work on the device so far.
    ///
    /// # Errors
    /// A failing call of the driver.
    pub(crate) fn free(&self, slot: usize) -> Result<()> {
        self.free[slot].record(&self.device.0.stream).map_err(driver_error("event"))
    }

    /// Marks that all copies so far from a part of main memory were enqueued.
    ///
    /// # Errors
    /// A failing call of the driver.
    pub(crate) fn read(&self, stage: usize) -> Result<()> {
        self.read[stage].record(&self.stream).map_err(driver_error("event"))
    }

    /// Waits, from any thread, until what was marked last by [`Copies::read`] has been copied; returns at once where nothing was.
    ///
    /// # Errors
    /// A copy that failed.
    pub(crate) fn wait_read(&self, stage: usize) -> Result<()> {
        self.device.bind()?;
        self.read[stage].synchronize().map_err(driver_error("a copy to the GPU failed"))
    }

    /// Waits for all copies.
    ///
    /// # Errors
    /// A copy that failed.
    pub(crate) fn finish(&self) -> Result<()> {
        self.stream.synchronize().map_err(driver_error("a copy to the GPU failed"))
    }
}

/// Host memory that stays where it is until this is dropped.
pub(crate) struct Pinned {
    start: usize,
    context: Arc<CudaContext>,
}

impl Drop for Pinned {
    fn drop(&mut self) {
        if self.context.bind_to_thread().is_ok() {
            // SAFETY: it was locked once and is unlocked once; an error has nobody to go to.
            let _ = unsafe { sys::cuMemHostUnregister(self.start as *mut c_void) };
        }
    }
}
