//! Time on a device: stamps in its stream of work, replays that cost no launch, and the clock of its cores.

use std::time::Instant;

use super::{Device, cuda};
use crate::{Error, Result};

/// A moment in a device's stream of work.
pub enum Stamp {
    /// On the CPU, where calls end when they return.
    Cpu(Instant),
    /// An event in the GPU's stream.
    Cuda(cuda::Event),
}

impl Stamp {
    /// Milliseconds from here to a later stamp of the same device, which must have been waited for ([`Device::synchronize`]).
    ///
    /// # Errors
    /// Stamps of two devices, or one that the GPU has not reached.
    pub fn ms_until(&self, later: &Self) -> Result<f64> {
        match (self, later) {
            (Self::Cpu(a), Self::Cpu(b)) => Ok((*b - *a).as_secs_f64() * 1e3),
            (Self::Cuda(a), Self::Cuda(b)) => a.ms_until(b),
            _ => Err(Error::device("stamps", "expected two of one device")),
        }
    }
}

/// Calls recorded once, to be run without the cost of launching each.
pub enum Replay {
    /// A CUDA graph.
    Cuda(cuda::Graph),
}

impl Replay {
    /// Starts the calls.
    ///
    /// # Errors
    /// The driver's.
    pub fn launch(&self) -> Result<()> {
        let Self::Cuda(graph) = self;
        graph.launch()
    }
}

impl Device {
    /// A stamp after everything that was started so far.
    ///
    /// # Errors
    /// The driver's.
    pub fn stamp(&self) -> Result<Stamp> {
        match self {
            Self::Cpu => Ok(Stamp::Cpu(Instant::now())),
            Self::Cuda(d) => d.stamp(),
        }
    }

    /// Records what `calls` starts, without running it. The calls may allocate nothing.
    ///
    /// # Errors
    /// The calls' own; a device that records nothing, which the CPU is; the driver's.
    pub fn record(&self, mut calls: impl FnMut() -> Result<()>) -> Result<Replay> {
        match self {
            Self::Cpu => Err(Error::device("replay", "the CPU records no calls")),
            Self::Cuda(d) => d.record(&mut calls),
        }
    }

    /// Waits for everything that was started.
    ///
    /// # Errors
    /// A kernel that failed.
    pub fn synchronize(&self) -> Result<()> {
        match self {
            Self::Cpu => Ok(()),
            Self::Cuda(d) => d.synchronize(),
        }
    }

    /// The card's name, or how many threads the CPU runs.
    pub fn description(&self) -> String {
        match self {
            Self::Cpu => format!("the CPU, {} threads", std::thread::available_parallelism().map_or(1, usize::from)),
            Self::Cuda(d) => d.name().unwrap_or_else(|_| "a GPU".into()),
        }
    }

    /// Bytes that can still be allocated, where that is known.
    pub fn free_bytes(&self) -> Option<u64> {
        match self {
            Self::Cpu => super::cpu::available_bytes(),
            Self::Cuda(d) => d.memory().ok().map(|(free, _)| free as u64),
        }
    }

    /// Bytes of the GPU's second-level cache; unknown for the CPU.
    pub fn cache_bytes(&self) -> Option<u64> {
        match self {
            Self::Cpu => None,
            Self::Cuda(d) => d.cache_bytes(),
        }
    }

    /// The clock of the GPU's multiprocessors now, in MHz, where NVIDIA's management library tells; unknown for the CPU.
    pub fn clock_mhz(&self) -> Option<u32> {
        match self {
            Self::Cpu => None,
            Self::Cuda(d) => d.clock_mhz(),
        }
    }
}
