//! Where tensors live. The only code that knows how many backends exist.

pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;

use std::fmt;

use crate::Result;

/// A place for tensors.
#[derive(Clone, PartialEq)]
#[non_exhaustive]
pub enum Device {
    /// Main memory; complete in `f64` and `f32`.
    Cpu,
    /// One NVIDIA GPU and the stream this crate uses on it.
    #[cfg(feature = "cuda")]
    Cuda(cuda::CudaDevice),
}

impl Device {
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
            #[cfg(feature = "cuda")]
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
}

impl Card {
    /// NVIDIA H100 80GB HBM3, for planning without one: what its driver says, reckoned as `CudaDevice::card` does.
    pub fn h100() -> Self {
        Self { name: "NVIDIA H100 80GB HBM3".into(), free: 79 << 30, products: 685e12, bandwidth: 3.02e12 }
    }
}
