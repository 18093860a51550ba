//! Run-time element types.

use std::fmt;

use half::{bf16, f16};

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

    /// A number rounded to the nearest of this type, ties to even.
    pub fn round(self, x: f64) -> f64 {
        match self {
            Self::F64 => x,
            Self::F32 => f32::from_f64(x).into(),
            Self::F16 => f16::from_f64(x).to_f64(),
            Self::BF16 => bf16::from_f64(x).to_f64(),
            Self::U32 => u32::from_f64(x).into(),
        }
    }

    /// The smallest positive number (subnormal; 1 for integers).
    pub fn least(self) -> f64 {
        match self {
            Self::F64 => f64::from_bits(1),
            Self::F32 => f32::from_bits(1).into(),
            Self::F16 => f16::from_bits(1).into(),
            Self::BF16 => bf16::from_bits(1).into(),
            Self::U32 => 1.0,
        }
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

/// A Rust type that tensors can hold. Sealed: the set of element types is [`DType`].
pub trait Element: Copy + Default + PartialEq + fmt::Debug + Send + Sync + bytemuck::Pod + sealed::Sealed {
    /// The run-time name of this type.
    const DTYPE: DType;
    /// Widens (exactly).
    fn to_f64(self) -> f64;
    /// Rounds to nearest, ties to even.
    fn from_f64(x: f64) -> Self;
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
        }
    };
}
element!(f64, F64, |x| x, |x| x);
element!(f32, F32, f64::from, |x| x as f32);
element!(f16, F16, f64::from, |x| f16::from_f32(odd(x)));
element!(bf16, BF16, f64::from, |x| bf16::from_f32(odd(x)));
element!(u32, U32, f64::from, |x| x as u32);

/// Rounds to odd: where `x` is no `f32`, the neighbour whose last bit is set. Rounding that to a 16-bit type is rounding `x` to it
/// once. (The conversions of `half` from `f64` look at the upper 32 bits only, and take what lies just above a tie for one.)
fn odd(x: f64) -> f32 {
    let near = x as f32;
    if f64::from(near) == x || x.is_nan() {
        return near;
    }
    let towards_zero = if f64::from(near).abs() > x.abs() { near.to_bits() - 1 } else { near.to_bits() };
    f32::from_bits(towards_zero | 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every 16-bit type: beside every tie and every value, and what is beyond the largest.
    fn once<T: Element>(bits: impl Fn(u16) -> T) {
        for i in 0..u16::MAX {
            let (a, b) = (bits(i).to_f64(), bits(i + 1).to_f64());
            if !(a.is_finite() && b.is_finite() && a.abs() < b.abs()) {
                continue;
            }
            let even = if i % 2 == 0 { a } else { b };
            let tie = 0.5 * (a + b);
            for (x, want) in
                [(tie, even), (f64::from_bits(tie.to_bits() + 1), b), (f64::from_bits(tie.to_bits() - 1), a), (a, a), (b, b)]
            {
                assert_eq!(T::from_f64(x).to_f64(), want, "{x:e} between {a:e} and {b:e}");
            }
            let above = f32::from_bits((tie as f32).to_bits() + 1);
            if f64::from((tie as f32).abs()) == tie.abs() && f64::from(above).abs() < b.abs() {
                assert_eq!(T::from_f64(above.into()).to_f64(), b, "{above:e} between {a:e} and {b:e}");
            }
        }
        assert!(T::from_f64(f64::NAN).to_f64().is_nan());
        assert_eq!([T::from_f64(1e300).to_f64(), T::from_f64(-1e300).to_f64()], [f64::INFINITY, f64::NEG_INFINITY]);
        assert_eq!(T::from_f64(1e-300).to_f64(), 0.0);
    }

    #[test]
    fn narrowing_rounds_once() {
        once(f16::from_bits);
        once(bf16::from_bits);
    }
}
