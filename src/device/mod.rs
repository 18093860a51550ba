//! Where tensors live: memory, streams and launches. A device has heard of no operation; what runs on it is written beside its
//! formula, in [`ops`](crate::ops), [`linalg`](crate::linalg) and [`quant`](crate::quant).

mod clock;
pub(crate) mod conveyor;
#[cfg(not(feature = "cuda"))]
#[path = "absent.rs"]
pub mod cuda;
#[cfg(feature = "cuda")]
pub mod cuda;

pub(crate) mod cpu;
pub(crate) mod launch;
pub(crate) mod shared;

/// Calls a launcher of `cuda/kernels.h`: `unsafe { ffi!(sq_name(…)) }`. In a build without the feature `cuda` there is nothing to call,
/// and no device to call it on.
#[cfg(feature = "cuda")]
macro_rules! ffi {
    ($name:ident($($argument:expr),* $(,)?)) => {{
        $crate::device::cuda::called(stringify!($name));
        $crate::device::cuda::ffi::$name($($crate::device::launch::Argument::pass($argument)),*)
    }};
}
#[cfg(not(feature = "cuda"))]
macro_rules! ffi {
    ($name:ident($($argument:expr),* $(,)?)) => {{
        let _ = ($(&$argument,)*);
        $crate::device::cuda::ffi::launcher()
    }};
}
pub(crate) use ffi;

use std::fmt;

pub use clock::{Replay, Stamp};

use crate::Result;

/// A place for tensors.
#[derive(Clone, PartialEq)]
#[non_exhaustive]
pub enum Device {
    /// Main memory; complete in `f64` and `f32`.
    Cpu,
    /// One NVIDIA GPU and the stream this crate uses on it. There is none without the feature `cuda`.
    Cuda(cuda::CudaDevice),
}

impl Device {
    /// What the GPU can do; `None` of the CPU.
    ///
    /// # Errors
    /// Whatever the driver reports.
    pub fn card(&self) -> Result<Option<Card>> {
        match self {
            Self::Cpu => Ok(None),
            Self::Cuda(device) => device.card().map(Some),
        }
    }

    /// The most memory at once in bytes: of tensors on a GPU, of the process on the CPU; `None` where the system does not tell.
    pub fn peak_bytes(&self) -> Option<u64> {
        match self {
            Self::Cuda(d) => d.peak_bytes().ok(),
            Self::Cpu => cpu::peak_bytes(),
        }
    }

    /// GPU number `ordinal`.
    ///
    /// # Errors
    /// Without the feature `cuda`, a driver, or that GPU: says which.
    pub fn cuda(ordinal: usize) -> Result<Self> {
        #[cfg(feature = "cuda")]
        return cuda::CudaDevice::new(ordinal).map(Self::Cuda);
        #[cfg(not(feature = "cuda"))]
        Err(crate::Error::Cuda(format!(
            "GPU {ordinal} was asked for, but this build has no GPU support: rebuild with `--features cuda`"
        )))
    }

    /// True of [`Device::Cpu`].
    pub fn is_cpu(&self) -> bool {
        *self == Self::Cpu
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.pad("cpu"),
            Self::Cuda(d) => write!(f, "cuda:{}", d.ordinal()),
        }
    }
}

/// What a card can do.
#[derive(Clone, Debug, PartialEq)]
pub struct Card {
    /// Its name.
    pub name: String,
    /// Bytes that are free.
    pub free: usize,
    /// 16-bit matrix products of a layer's size, FLOP/s.
    pub products: f64,
    /// Reading and writing, bytes/s.
    pub bandwidth: f64,
    /// Copying from locked main memory, bytes/s.
    pub uploads: f64,
    /// Reading a layer from a model's files, bytes/s: of the machine, and a guess until it is measured.
    pub reads: f64,
}

/// What an H100 in a PCIe 5 slot of 16 lanes copies from locked main memory, bytes/s, measured. Drivers do not report it.
pub(crate) const UPLOADS: f64 = 55e9;

/// What a layer is read at, bytes/s, as long as nobody knows: one fast disk.
pub(crate) const READS: f64 = 2e9;

impl Card {
    /// NVIDIA H100 80GB HBM3, for planning without one: what its driver reports, computed as `CudaDevice::card` does.
    pub fn h100() -> Self {
        Self {
            name: "NVIDIA H100 80GB HBM3".into(),
            free: 79 << 30,
            products: 685e12,
            bandwidth: 3.02e12,
            uploads: UPLOADS,
            reads: READS,
        }
    }
}
