//! Run-time element types.

use std::fmt;

use half::{bf16, f16};

use crate::tensor::CpuBuffer;

/// The element type of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    /// IEEE double: the reference precision.
    F64,
    /// IEEE single.
    F32,
    /// IEEE half: stored in 16 bits, computed on in `f32`.
    F16,
    /// bfloat16: stored in 16 bits, computed on in `f32`.
    BF16,
    /// Token ids.
    U32,
}

impl DType {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            Self::F64 => 8,
            Self::F32 | Self::U32 => 4,
            Self::F16 | Self::BF16 => 2,
        }
    }

    /// True of the 16-bit floating-point types.
    pub fn is_half(self) -> bool {
        matches!(self, Self::F16 | Self::BF16)
    }

    /// True of every floating-point type.
    pub fn is_float(self) -> bool {
        self != Self::U32
    }

    /// The distance from 1 to the next representable number (0 for integers).
    pub fn epsilon(self) -> f64 {
        match self {
            Self::F64 => f64::EPSILON,
            Self::F32 => f64::from(f32::EPSILON),
            Self::F16 => 2f64.powi(-10),
            Self::BF16 => 2f64.powi(-7),
            Self::U32 => 0.0,
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::F64 => "f64",
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::BF16 => "bf16",
            Self::U32 => "u32",
        })
    }
}

impl std::str::FromStr for DType {
    type Err = crate::Error;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        Ok(match s.to_ascii_lowercase().as_str() {
            "f64" | "float64" => Self::F64,
            "f32" | "float32" => Self::F32,
            "f16" | "float16" => Self::F16,
            "bf16" | "bfloat16" => Self::BF16,
            _ => return Err(crate::Error::argument("dtype", format!("expected f64, f32, f16 or bf16, got {s:?}"))),
        })
    }
}

/// A Rust type that tensors can hold. Sealed: the set of element types is [`DType`].
pub trait Element: Copy + Default + PartialEq + fmt::Debug + Send + Sync + bytemuck::Pod + sealed::Sealed {
    /// The run-time name of this type.
    const DTYPE: DType;
    /// Widens (exactly).
    fn to_f64(self) -> f64;
    /// Rounds to nearest, ties to even.
    fn from_f64(x: f64) -> Self;
    #[doc(hidden)]
    fn wrap(v: Vec<Self>) -> CpuBuffer;
    #[doc(hidden)]
    fn view(b: &CpuBuffer) -> Option<&[Self]>;
    #[doc(hidden)]
    fn view_mut(b: &mut CpuBuffer) -> Option<&mut Vec<Self>>;
}

mod sealed {
    pub trait Sealed {}
}

macro_rules! element {
    ($t:ty, $variant:ident, $to:expr, $from:expr) => {
        impl sealed::Sealed for $t {}
        impl Element for $t {
            const DTYPE: DType = DType::$variant;
            #[inline(always)]
            fn to_f64(self) -> f64 {
                let to: fn($t) -> f64 = $to;
                to(self)
            }
            #[inline(always)]
            fn from_f64(x: f64) -> Self {
                let from: fn(f64) -> $t = $from;
                from(x)
            }
            fn wrap(v: Vec<Self>) -> CpuBuffer {
                CpuBuffer::$variant(v)
            }
            fn view(b: &CpuBuffer) -> Option<&[Self]> {
                match b {
                    CpuBuffer::$variant(v) => Some(v),
                    _ => None,
                }
            }
            fn view_mut(b: &mut CpuBuffer) -> Option<&mut Vec<Self>> {
                match b {
                    CpuBuffer::$variant(v) => Some(v),
                    _ => None,
                }
            }
        }
    };
}
element!(f64, F64, |x| x, |x| x);
element!(f32, F32, f64::from, |x| x as f32);
element!(f16, F16, f64::from, f16::from_f64);
element!(bf16, BF16, f64::from, bf16::from_f64);
element!(u32, U32, f64::from, |x| x as u32);
