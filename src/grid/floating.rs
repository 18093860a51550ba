//! Blocks of 4-bit floating-point numbers with a scale each: MXFP4 and NVFP4.
//!
//! An element is E2M1: a sign and 0, ½, 1, 1½, 2, 3, 4 or 6, rounded to nearest, ties to the even significand, and saturating.
//!
//! | | block | scale X of a block whose largest magnitude is m | source |
//! |---|---|---|---|
//! | MXFP4 | 32 | `2^(⌊log₂ m⌋ − 2)`, E8M0: a byte, the exponent plus 127 | OCP Microscaling Formats (MX) specification 1.0 |
//! | NVFP4 | 16 | `E4M3(m / 6 / u) · u`, u = M / (6 · 448) in `f32`, M the largest magnitude of the tensor | NVIDIA, *Pretraining LLMs with NVFP4*, arXiv 2509.25149 |
//!
//! E4M3 is the type of 8 bits without infinities, to nearest even, saturating at 448; `⌊log₂ m⌋ − 2` is at least −127 and at most 127.
//! Scales are found in `f32`, whatever the type of the values. In a [`Grid`](super::Grid) codes are twice the elements, integers from −12 to
//! 12, and its scale is X / 2.

use std::fmt;
use std::str::FromStr;

use super::GridFloat;
use crate::{Error, Result};

/// Twice the largest element.
pub const LARGEST: i32 = 12;

/// A format of blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// Powers of two as scales.
    Mxfp4,
    /// Numbers of 8 bits as scales, and one more a tensor.
    Nvfp4,
}

impl Format {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Mxfp4, Self::Nvfp4];

    /// Its name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Mxfp4 => "mxfp4",
            Self::Nvfp4 => "nvfp4",
        }
    }

    /// Elements that share a scale.
    pub const fn block(self) -> usize {
        match self {
            Self::Mxfp4 => 32,
            Self::Nvfp4 => 16,
        }
    }

    /// u of a tensor: what its scales are multiples of; 1 for MXFP4, and of a tensor of zeros.
    ///
    /// # Errors
    /// Those of `most`, which is called where the format has such a number.
    pub fn unit(self, most: impl FnOnce() -> Result<f32>) -> Result<f32> {
        let unit = match self {
            Self::Mxfp4 => 1.0,
            Self::Nvfp4 => most()? / (6.0 * 448.0),
        };
        Ok(if unit > 0.0 { unit } else { 1.0 })
    }

    /// X of a block whose largest magnitude is `most`: 0 where it is too small for any scale.
    #[inline(always)]
    pub fn scale(self, most: f32, unit: f32) -> f32 {
        match self {
            Self::Mxfp4 if most == 0.0 => 0.0,
            Self::Mxfp4 => from_e8m0(e8m0(most)),
            Self::Nvfp4 => from_e4m3(e4m3(most / 6.0 / unit)) * unit,
        }
    }

    /// The byte that files keep for X of such a block.
    pub fn scale_byte(self, most: f32, unit: f32) -> u8 {
        match self {
            Self::Mxfp4 => e8m0(most),
            Self::Nvfp4 => e4m3(most / 6.0 / unit),
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Format {
    type Err = Error;
    fn from_str(s: &str) -> Result<Self> {
        let found = Self::ALL.into_iter().find(|f| f.name().eq_ignore_ascii_case(s));
        found.ok_or_else(|| Error::argument("format", format!("expected {}, got {s:?}", Self::ALL.map(Self::name).join(" or "))))
    }
}

/// Twice the element nearest to `x / 2`: one of 0, 1, 2, 3, 4, 6, 8, 12 and their negatives.
#[inline(always)]
pub(crate) fn snap<T: GridFloat>(x: T) -> T {
    let (four, eight, most) = (T::of(4.0), T::of(8.0), T::of(f64::from(LARGEST)));
    // Steps of 1 below 4, of 2 below 8, of 4 beyond; the end of each part is the begin of the next.
    let a = x.abs();
    let step = if a < four {
        T::ONE
    } else if a < eight {
        T::of(2.0)
    } else {
        four
    };
    let q = (a / step).round() * step;
    let q = if q > most { most } else { q };
    if x < T::ZERO { -q } else { q }
}

/// The four bits of an element, given twice its value: sign, two bits of exponent, one of significand.
pub fn e2m1(twice: i16) -> u8 {
    let magnitude = match twice.unsigned_abs() {
        n @ 0..4 => n as u8,
        4..6 => 4,
        6..8 => 5,
        8..12 => 6,
        _ => 7,
    };
    if twice < 0 { 8 | magnitude } else { magnitude }
}

/// Twice the value of the four bits of an element.
pub fn from_e2m1(bits: u8) -> i16 {
    let magnitude = [0, 1, 2, 3, 4, 6, 8, 12][usize::from(bits & 7)];
    if bits & 8 == 0 { magnitude } else { -magnitude }
}

/// `⌊log₂ m⌋ − 2 + 127`, from 0 to 254.
#[inline(always)]
fn e8m0(most: f32) -> u8 {
    // The exponent field; that of subnormal numbers is 0, which is no larger than what is subtracted.
    let exponent = (most.to_bits() >> 23) & 0xff;
    exponent.saturating_sub(2).min(254) as u8
}

/// The power of two of a byte.
#[inline(always)]
fn from_e8m0(byte: u8) -> f32 {
    // 2^-127 is a subnormal number.
    if byte == 0 { f32::from_bits(1 << 22) } else { f32::from_bits(u32::from(byte) << 23) }
}

/// The E4M3 nearest to a number that is not negative, as its byte.
#[inline(always)]
pub fn e4m3(x: f32) -> u8 {
    if x >= 448.0 {
        return 0x7e;
    }
    if x < 1.0 / 64.0 {
        // Multiples of 2^-9; eight of them are the first with an exponent.
        return (x * 512.0).round_ties_even() as u8;
    }
    // Three bits of significand remain; a carry goes into the exponent.
    let bits = x.to_bits();
    let rounded = bits + 0x7ffff + ((bits >> 20) & 1);
    ((rounded >> 20) - (120 << 3)) as u8
}

/// The number of a byte of E4M3 without a sign.
#[inline(always)]
pub fn from_e4m3(byte: u8) -> f32 {
    let (exponent, significand) = (u32::from(byte >> 3), u32::from(byte & 7));
    if exponent == 0 { significand as f32 / 512.0 } else { f32::from_bits((exponent + 120) << 23 | significand << 20) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::grid::{Grid, QuantSpec, Target, reference_grid};

    #[test]
    fn elements_are_the_nearest_ones_and_ties_go_to_even_significands() {
        let values: Vec<f64> = (0..16).map(|bits| f64::from(from_e2m1(bits)) / 2.0).collect();
        assert_eq!(values[..8], [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]);
        for i in -4000..=4000 {
            let x = f64::from(i) / 500.0;
            let got = snap(2.0 * x) / 2.0;
            let best = values.iter().map(|v| (v - x).abs()).fold(f64::INFINITY, f64::min);
            let nearest: Vec<usize> = (0..16).filter(|&b| (values[b] - x).abs() == best && (b < 8) == (x >= 0.0)).collect();
            let even = nearest.iter().find(|b| **b % 2 == 0).unwrap_or(&nearest[0]);
            assert_eq!(got.abs(), values[*even].abs(), "{x}: {got}");
            let twice = snap(2.0 * x) as i16;
            assert_eq!(from_e2m1(e2m1(twice)), twice, "{x}");
        }
    }

    #[test]
    fn bytes_of_scales_are_the_nearest_ones() {
        let all: Vec<f32> = (0..=0x7e).map(from_e4m3).collect();
        assert_eq!((all[1], all[8], all[0x38], all[0x7e]), (1.0 / 512.0, 1.0 / 64.0, 1.0, 448.0));
        assert!(all.is_sorted());
        for (byte, pair) in all.windows(2).enumerate() {
            let middle = 0.5 * (pair[0] + pair[1]);
            let even = if byte % 2 == 0 { byte } else { byte + 1 };
            for (x, want) in [(pair[0], byte), (middle.next_down(), byte), (middle, even), (middle.next_up(), byte + 1)] {
                assert_eq!(usize::from(e4m3(x)), want, "{x}");
            }
        }
        assert_eq!((e4m3(0.0), e4m3(1e9), e4m3(f32::INFINITY)), (0, 0x7e, 0x7e));
        for (x, want) in [(6.0, 127), (4.0, 127), (3.999, 126), (8.0, 128), (1.0, 125), (0.0, 0), (1e-45, 0), (f32::MAX, 252)] {
            assert_eq!(e8m0(x), want, "{x}");
        }
        assert_eq!(
            (from_e8m0(0).log2(), from_e8m0(1).log2(), from_e8m0(127), from_e8m0(254).log2()),
            (-127.0, -126.0, 1.0, 127.0)
        );
    }

    /// What is on a grid stays; what is beyond saturates; both types find the same.
    #[test]
    fn blocks() {
        for format in Format::ALL {
            let spec = QuantSpec::floating(format, Target::Weight);
            let x: Vec<f64> = (0..format.block()).map(|i| 0.37 * (i as f64 - 5.0)).collect();
            let most = x.iter().fold(0f64, |m, x| m.max(x.abs()));
            let spec = spec.of_tensor(|| Ok(most as f32)).unwrap();
            let grid = reference_grid(&spec, &x);
            let narrow: Vec<f32> = x.iter().map(|x| *x as f32).collect();
            let other: Grid<f32> = crate::grid::vector_grid(&spec, &narrow);
            assert_eq!(grid.scale, f64::from(other.scale), "{format}");
            for &x in &x {
                let y = grid.nearest(x);
                // At most a tie between 4 and 6, or saturation below 8.
                assert!((y - x).abs() <= (x.abs() / 4.0).max(grid.scale), "{format}: {x} {y}");
                assert_eq!(grid.nearest(y), y, "{format}: {x}");
            }
            assert_eq!(grid.nearest(1e9), 12.0 * grid.scale);
            let zeros = reference_grid(&spec, &vec![0.0; format.block()]);
            assert_eq!((zeros.nearest(0.0), zeros.nearest(-0.0)), (0.0, 0.0));
        }
        let wrong = QuantSpec { group: Some(8), ..QuantSpec::floating(Format::Mxfp4, Target::Weight) };
        assert!(wrong.group_size(64).unwrap_err().to_string().contains("blocks of 32"));
        assert!("fp4".parse::<Format>().unwrap_err().to_string().contains("mxfp4 or nvfp4"));
    }
}
