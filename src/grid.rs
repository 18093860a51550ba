//! How a tensor is quantised, and the grid that a range of values gets.
//!
//! Rounding is to nearest, ties to even. Symmetric: `maxq = 2^(bits-1) - 1`, `s = max|x| / maxq`,
//! `q = clamp(round(x/s), -(maxq+1), maxq)`, `y = s q`. Asymmetric: `maxq = 2^bits - 1`, `s = (hi - lo) / maxq`,
//! `z = round(-lo/s)`, `q = clamp(round(x/s) + z, 0, maxq)`, `y = s (q - z)`.

pub mod floating;
mod search;

use rayon::prelude::*;

use crate::device::cpu::{self, LANES, Real};
use crate::tensor::count;
use crate::{DType, Error, Result, Tensor};
use floating::{Format, snap};

/// What kind of tensor is quantised; they differ in the scale of an all-zero symmetric group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// Inputs of linear layers, keys, values: scale 1 where a group is all zero.
    Activation,
    /// Weights: the absolute maximum is clamped to at least 1e-5.
    Weight,
}

/// How much of the observed range the grid covers.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Clip {
    /// This fraction of it (1: all).
    Ratio(f64),
    /// The fraction p = 1 − i/100, i = 0…79, with the smallest Σ|x − x̂|^2.4 in each group; ties keep the larger p.
    Search,
}

/// The candidates that [`Clip::Search`] tries.
pub const SEARCH_STEPS: usize = 80;
/// The exponent of the error that [`Clip::Search`] minimises.
pub const SEARCH_NORM: f64 = 2.4;

/// How the range of a group becomes a grid, where libraries differ.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Rule {
    /// As in the published code: `s = max|x| / (2^(bits−1) − 1)` symmetric; asymmetric ranges of groups need not include 0.
    #[default]
    Published,
    /// As compressed-tensors does for activations: `s = 2 max|x| / (2^bits − 1)` symmetric, so that the largest magnitude lies half a
    /// step beyond the largest code; asymmetric ranges include 0. On a GPU the symmetric scale may differ in its last bit.
    CompressedTensors,
    /// Floating-point codes with a scale a block ([`floating`]).
    Floating(Format),
}

impl Rule {
    /// The format of floating-point codes, where they are some.
    pub fn floating(self) -> Option<Format> {
        if let Self::Floating(format) = self { Some(format) } else { None }
    }
}

/// How a tensor is quantised: along the last axis, a whole row or groups of it at a time.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct QuantSpec {
    /// 2 to 8, or 16 for "not quantised".
    pub bits: u32,
    /// Signed codes without a zero point.
    pub symmetric: bool,
    /// Columns that share a scale; `None`: the whole row. An asymmetric range includes 0 for whole rows and does not for groups,
    /// as in the published code.
    pub group: Option<usize>,
    /// The covered part of the range.
    pub clip: Clip,
    /// Activation or weight.
    pub target: Target,
    /// How a range becomes a grid.
    pub rule: Rule,
    /// For files that keep scales in this type, and zero points in as many bits as codes: a scale is rounded to the type before codes
    /// are found, and an asymmetric range includes 0 in groups too, so that the zero point is one of the codes. `None`: neither.
    pub stored: Option<DType>,
    /// What scales of blocks are multiples of, where the format has one such number a tensor ([`QuantSpec::of_tensor`]); else 1.
    pub unit: f32,
}

impl QuantSpec {
    /// Leaves its tensor alone.
    pub const NONE: Self = Self {
        bits: 16,
        symmetric: true,
        group: None,
        clip: Clip::Ratio(1.0),
        target: Target::Activation,
        rule: Rule::Published,
        stored: None,
        unit: 1.0,
    };

    /// Blocks of floating-point codes.
    pub fn floating(format: Format, target: Target) -> Self {
        let group = Some(format.block());
        Self { bits: 4, symmetric: true, group, target, rule: Rule::Floating(format), ..Self::NONE }
    }

    /// The same for a tensor whose largest magnitude is `most`, which is called where the format depends on it.
    ///
    /// # Errors
    /// Those of `most`.
    pub fn of_tensor(self, most: impl FnOnce() -> Result<f32>) -> Result<Self> {
        match self.rule {
            Rule::Floating(format) => Ok(Self { unit: format.unit(most)?, ..self }),
            _ => Ok(self),
        }
    }

    /// True where a row's grids depend on no other row ([`QuantSpec::of_tensor`]).
    pub fn is_by_row(&self) -> bool {
        self.rule.floating() != Some(Format::Nvfp4)
    }

    /// Dynamic per-row activation quantisation.
    pub fn activation(bits: u32, symmetric: bool) -> Self {
        Self { bits, symmetric, ..Self::NONE }
    }

    /// Per-output-channel weight quantisation.
    pub fn weight(bits: u32, symmetric: bool) -> Self {
        Self { target: Target::Weight, ..Self::activation(bits, symmetric) }
    }

    /// The same in groups of `group` columns.
    pub fn grouped(self, group: usize) -> Self {
        Self { group: Some(group), ..self }
    }

    /// The same with a clip rule.
    pub fn clipped(self, clip: Clip) -> Self {
        Self { clip, ..self }
    }

    /// The same by another rule.
    pub fn by(self, rule: Rule) -> Self {
        Self { rule, ..self }
    }

    /// What the largest magnitude of a symmetric group is divided by.
    #[inline(always)]
    pub(crate) fn steps(&self) -> f64 {
        match self.rule {
            Rule::Published => f64::from(self.max_code()),
            Rule::CompressedTensors => f64::from(self.max_code()) + 0.5,
            Rule::Floating(_) => f64::from(floating::LARGEST),
        }
    }

    /// True where asymmetric ranges include 0.
    #[inline(always)]
    pub(crate) fn includes_zero(&self) -> bool {
        self.group.is_none() || self.stored.is_some() || self.rule == Rule::CompressedTensors
    }

    /// The same for files that keep scales in this type.
    pub fn stored(self, dtype: DType) -> Self {
        Self { stored: Some(dtype), ..self }
    }

    /// A scale as it is used: rounded where it is [`stored`](Self::stored), and never to 0.
    #[inline(always)]
    pub(crate) fn scale<T: GridFloat>(&self, scale: T) -> T {
        match self.stored {
            None => scale,
            Some(dtype) => match dtype.round(scale.to_f64()) {
                0.0 => T::of(dtype.least()),
                rounded => T::of(rounded),
            },
        }
    }

    /// False when this leaves its tensor alone.
    pub fn is_active(&self) -> bool {
        self.bits < 16
    }

    /// True where a row times c > 0 has the same codes and c times the scales, up to rounding: what multiplies a row may then be applied to
    /// what the row makes instead. Not so where scales are stored in a narrow type, or are powers of 2.
    pub fn follows_rows(&self) -> bool {
        !self.is_active() || self.stored.is_none() && self.rule.floating().is_none()
    }

    /// Bits that codes can have; [`group_size`](Self::group_size) refuses most.
    fn code_bits(&self) -> u32 {
        self.bits.clamp(1, 30)
    }

    /// Largest code: 2^(bits−1) − 1 symmetric, 2^bits − 1 asymmetric.
    pub fn max_code(&self) -> i32 {
        if self.rule.floating().is_some() {
            return floating::LARGEST;
        }
        if self.symmetric { (1 << (self.code_bits() - 1)) - 1 } else { (1 << self.code_bits()) - 1 }
    }

    /// Smallest code: −2^(bits−1) symmetric, 0 asymmetric.
    pub fn min_code(&self) -> i32 {
        if self.rule.floating().is_some() {
            return -floating::LARGEST;
        }
        if self.symmetric { -(1 << (self.code_bits() - 1)) } else { 0 }
    }

    /// Columns that share a scale in rows of `cols`; checks the specification against them.
    ///
    /// # Errors
    /// Bits other than 2 to 8, a clip ratio outside (0, 1], or a group that does not divide the rows.
    pub fn group_size(&self, cols: usize) -> Result<usize> {
        if !(2..=8).contains(&self.bits) {
            return Err(Error::argument("bits", format!("expected 2 to 8, or 16 for none, got {}", self.bits)));
        }
        if let Some(format) = self.rule.floating() {
            let block = Some(format.block());
            if self.bits != 4 || !self.symmetric || self.group != block || self.stored.is_some() {
                let grid = if self.symmetric { "symmetric" } else { "asymmetric" };
                let group = self.group.map_or("whole rows".into(), |group| format!("groups of {group}"));
                let stored = self.stored.map_or(String::new(), |dtype| format!(", scales kept as {dtype}"));
                let message = format!(
                    "expected 4 symmetric bits in blocks of {}, got {} {grid} bits in {group}{stored}",
                    format.block(),
                    self.bits
                );
                return Err(Error::argument(format.name(), message));
            }
            if self.clip == Clip::Search {
                return Err(Error::argument(
                    format.name(),
                    "expected a clip ratio, got a search: scales have steps of their own",
                ));
            }
        }
        match self.clip {
            Clip::Ratio(r) if !(r > 0.0 && r <= 1.0) => {
                return Err(Error::argument("clip ratio", format!("expected a number in (0, 1], got {r}")));
            }
            _ => {}
        }
        match self.group {
            None => Ok(cols.max(1)),
            Some(g) if g > 0 && cols.is_multiple_of(g) => Ok(g),
            Some(g) => Err(Error::argument("quantisation group", format!("{g} does not divide rows of {cols}"))),
        }
    }
}

/// Floating-point types with a quantisation grid: `f64` (reference) and `f32`.
pub trait GridFloat: Real + std::ops::Div<Output = Self> + std::ops::Neg<Output = Self> + PartialOrd {
    /// To nearest, ties to even.
    fn round(self) -> Self;
    /// The larger magnitude of two numbers, as a magnitude.
    fn abs(self) -> Self;
    /// Rounds from double.
    fn of(x: f64) -> Self;
    /// The grid of a group of values, its clip ratio found where the specification says so.
    fn grid(spec: &QuantSpec, group: &[Self]) -> Grid<Self>;
}

macro_rules! grid_float {
    ($t:ty, $grid:expr) => {
        impl GridFloat for $t {
            #[inline(always)]
            fn round(self) -> Self {
                self.round_ties_even()
            }
            #[inline(always)]
            fn abs(self) -> Self {
                <$t>::abs(self)
            }
            #[inline(always)]
            fn of(x: f64) -> Self {
                x as $t
            }
            fn grid(spec: &QuantSpec, group: &[Self]) -> Grid<Self> {
                $grid(spec, group)
            }
        }
    };
}
grid_float!(f32, vector_grid);
grid_float!(f64, reference_grid);

/// A grid: values `scale · (code − zero)` for codes in `[min, max]`, all integers or some of them. All arithmetic is in `T`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Grid<T> {
    /// Distance of neighbouring values where all integers are codes.
    pub scale: T,
    /// The code of 0 (0 when symmetric).
    pub zero: T,
    /// Smallest code.
    pub min: T,
    /// Largest code.
    pub max: T,
    /// Codes are twice the values of E2M1 ([`floating`]), not all integers.
    pub floating: bool,
}

impl<T: GridFloat> Grid<T> {
    /// The grid of a group whose values span `[lo, hi]`, shrunk by `clip`.
    #[inline(always)]
    pub fn new(spec: &QuantSpec, lo: T, hi: T, clip: T) -> Self {
        Self::between(spec, lo, hi, [clip; 2])
    }

    /// The grid of a group with its own ratios for the lower and the upper end of the range, and that range after clipping (symmetric:
    /// `[0, max|x|]`, clipped by the upper one).
    pub(crate) fn clipped(spec: &QuantSpec, group: &[T], ratios: [T; 2]) -> (T, T, Self) {
        let (lo, hi) = extent(group);
        let grid = Self::between(spec, lo, hi, ratios).rounded(spec);
        let (lo, hi) = spec.range(lo, hi);
        (ratios[0] * lo, ratios[1] * hi, grid)
    }

    #[inline(always)]
    fn between(spec: &QuantSpec, lo: T, hi: T, ratios: [T; 2]) -> Self {
        let (min, max) = (T::of(f64::from(spec.min_code())), T::of(f64::from(spec.max_code())));
        let (lo, hi) = spec.range(lo, hi);
        if let Some(format) = spec.rule.floating() {
            let scale = T::of(0.5 * f64::from(format.scale((ratios[1] * hi).to_f64() as f32, spec.unit)));
            return Self { scale, zero: T::ZERO, min, max, floating: true };
        }
        if spec.symmetric {
            let scale = match spec.target {
                Target::Activation if hi == T::ZERO => T::ONE,
                _ => ratios[1] * hi / T::of(spec.steps()),
            };
            return Self { scale, zero: T::ZERO, min, max, floating: false };
        }
        let (lo, hi) = (ratios[0] * lo, ratios[1] * hi);
        // After clipping: an all-zero group is given [−1, 1] whatever the ratio.
        let (lo, hi) = if lo == T::ZERO && hi == T::ZERO { (-T::ONE, T::ONE) } else { (lo, hi) };
        // A degenerate range of one non-zero value cannot give a scale.
        let scale = if hi == lo { T::ONE } else { (hi - lo) / max };
        Self { scale, zero: (-lo / scale).round(), min, max, floating: false }
    }

    /// The same with its scale as it is used ([`QuantSpec::stored`]).
    #[inline(always)]
    fn rounded(self, spec: &QuantSpec) -> Self {
        Self { scale: spec.scale(self.scale), ..self }
    }

    /// The code nearest to `x`, as a float.
    #[inline(always)]
    pub fn code(&self, x: T) -> T {
        if self.floating {
            // A block of zeros, or of values that its scale cannot reach, has scale 0.
            return if self.scale == T::ZERO { T::ZERO } else { snap(x / self.scale) };
        }
        let q = (x / self.scale).round() + self.zero;
        let q = if q < self.min { self.min } else { q };
        if q > self.max { self.max } else { q }
    }

    /// The value of a code.
    #[inline(always)]
    pub fn value(&self, code: T) -> T {
        self.scale * (code - self.zero)
    }

    /// x where it is within the values of the grid, else the end nearest to it.
    #[inline(always)]
    pub(crate) fn clamp(&self, x: T) -> T {
        let (lo, hi) = (self.value(self.min), self.value(self.max));
        let x = if x < lo { lo } else { x };
        if x > hi { hi } else { x }
    }

    /// Quantise and dequantise.
    #[inline(always)]
    pub fn nearest(&self, x: T) -> T {
        self.value(self.code(x))
    }
}

impl QuantSpec {
    /// The range that a group spanning `[lo, hi]` is given before clipping: `(-, max|x|)` when symmetric.
    #[inline(always)]
    fn range<T: GridFloat>(&self, lo: T, hi: T) -> (T, T) {
        let min = |a: T, b: T| if b < a { b } else { a };
        let max = |a: T, b: T| if b > a { b } else { a };
        if self.symmetric {
            let most = max(lo.abs(), hi.abs());
            let least = self.target == Target::Weight && self.rule.floating().is_none();
            return (T::ZERO, if least { max(most, T::of(1e-5)) } else { most });
        }
        if self.includes_zero() { (min(lo, T::ZERO), max(hi, T::ZERO)) } else { (lo, hi) }
    }
}

/// A tensor as integer codes and the grid of every group.
#[derive(Clone, Debug)]
pub struct Quantized {
    /// Shape of the tensor.
    pub shape: Vec<usize>,
    /// Columns that share a scale.
    pub group: usize,
    /// Codes, as many as values.
    pub codes: Vec<i16>,
    /// Scale of every group, in the arithmetic's type (`f64` for `f64` tensors, else `f32`).
    pub scale: Tensor,
    /// Zero point of every group (0 when symmetric).
    pub zero: Tensor,
}

impl Quantized {
    /// Weights of as many columns and one group behind one another, `[out, in]` each.
    ///
    /// # Errors
    /// No weights; [`Error::Shape`] or [`Error::Argument`] where their columns, groups or types differ.
    pub fn join(parts: &[&Self]) -> Result<Self> {
        let first = parts.first().ok_or_else(|| Error::argument("quantised weights", "expected at least one, got none"))?;
        let (mut rows, mut codes, mut scales, mut zeros) = (0, vec![], vec![], vec![]);
        for part in parts {
            let [height, cols] = part.shape[..] else { return Err(Error::shape("quantised weight", "[out, in]", &part.shape)) };
            if cols != first.shape[1] || part.group != first.group {
                let message = format!(
                    "expected {} columns in groups of {}, got {cols} in groups of {}",
                    first.shape[1], first.group, part.group
                );
                return Err(Error::argument("quantised weights", message));
            }
            let grid = [height, cols / part.group.max(1)];
            rows += height;
            codes.extend_from_slice(&part.codes);
            scales.push(part.scale.clone().reshape(grid)?);
            zeros.push(part.zero.clone().reshape(grid)?);
        }
        let (scale, zero) = (Tensor::concat(&scales)?, Tensor::concat(&zeros)?);
        Ok(Self { shape: vec![rows, first.shape[1]], group: first.group, codes, scale, zero })
    }

    /// Rows `first..first + count` of a weight `[out, in]`.
    ///
    /// # Errors
    /// Rows that are not there.
    pub fn rows(&self, first: usize, count: usize) -> Result<Self> {
        let [rows, cols] = self.shape[..] else { return Err(Error::shape("quantised weight", "[out, in]", &self.shape)) };
        let grid = [rows, cols / self.group.max(1)];
        let part = |t: &Tensor| t.clone().reshape(grid)?.slice(first, count);
        let (scale, zero) = (part(&self.scale)?, part(&self.zero)?);
        let codes = self.codes.get(first * cols..(first + count) * cols);
        let codes = codes.ok_or_else(|| Error::shape("quantised weight", format!("[{rows}, {cols}]"), &[first + count, cols]))?;
        Ok(Self { shape: vec![count, cols], group: self.group, codes: codes.to_vec(), scale, zero })
    }

    /// `scale · (code − zero)`, in the type of the scale.
    ///
    /// # Errors
    /// Codes, groups, scales and zero points whose numbers do not belong together.
    pub fn dequantize(&self) -> Result<Tensor> {
        let wrong = |what: &str, expected: usize, got: usize| {
            Err(Error::argument(
                format!("quantised tensor of shape {:?}", self.shape),
                format!("expected {expected} {what}, got {got}"),
            ))
        };
        let values = count("quantised tensor", &self.shape)?;
        if self.codes.len() != values {
            return wrong("codes", values, self.codes.len());
        }
        if self.group == 0 || !values.is_multiple_of(self.group) {
            return Err(Error::argument("quantisation group", format!("{} does not divide {values} values", self.group)));
        }
        for (what, t) in [("scales", &self.scale), ("zero points", &self.zero)] {
            if t.len() != values / self.group {
                return wrong(what, values / self.group, t.len());
            }
        }
        fn go<T: GridFloat>(q: &Quantized) -> Result<Tensor> {
            let (scale, zero) = (q.scale.as_slice::<T>()?, q.zero.as_slice::<T>()?);
            let mut values = vec![T::ZERO; q.codes.len()];
            let groups = values.par_chunks_mut(q.group).zip(q.codes.par_chunks(q.group)).zip(scale.par_iter().zip(zero));
            groups.with_min_len(cpu::rows_per_task(q.group)).for_each(|((values, codes), (&scale, &zero))| {
                values.iter_mut().zip(codes).for_each(|(v, &c)| *v = scale * (T::of(f64::from(c)) - zero));
            });
            Tensor::from_vec(values, q.shape.clone())
        }
        if self.scale.dtype() == DType::F64 { go::<f64>(self) } else { go::<f32>(self) }
    }
}

/// Smallest and largest value; 0 of none.
fn extent<T: GridFloat>(x: &[T]) -> (T, T) {
    let first = x.first().copied().unwrap_or(T::ZERO);
    x.iter().fold((first, first), |(lo, hi), &v| (if v < lo { v } else { lo }, if v > hi { v } else { hi }))
}

/// The ratio of candidate `i` of the search.
pub(crate) fn candidate(i: usize) -> f64 {
    1.0 - i as f64 / 100.0
}

/// The grid of one group by the definition, in double.
pub fn reference_grid(spec: &QuantSpec, x: &[f64]) -> Grid<f64> {
    let (lo, hi) = extent(x);
    let grid = match spec.clip {
        Clip::Ratio(p) => Grid::new(spec, lo, hi, p),
        Clip::Search => {
            let error = |g: &Grid<f64>| x.iter().map(|&v| (v - g.nearest(v)).abs().powf(SEARCH_NORM)).sum::<f64>();
            let mut best = (f64::INFINITY, Grid::new(spec, lo, hi, 1.0));
            for grid in (0..SEARCH_STEPS).map(|i| Grid::new(spec, lo, hi, candidate(i))) {
                let e = error(&grid);
                if e < best.0 {
                    best = (e, grid);
                }
            }
            best.1
        }
    };
    grid.rounded(spec)
}

/// The grid of one group in single precision.
pub(crate) fn vector_grid(spec: &QuantSpec, x: &[f32]) -> Grid<f32> {
    cpu::simd(|| fast_grid(spec, x))
}

/// [`vector_grid`], to be called inside [`cpu::simd`].
#[inline(always)]
pub(crate) fn fast_grid(spec: &QuantSpec, x: &[f32]) -> Grid<f32> {
    let (lo, hi) = fast_extent(x);
    let grid = match spec.clip {
        Clip::Ratio(p) => Grid::new(spec, lo, hi, p as f32),
        Clip::Search => search::search(spec, x, lo, hi),
    };
    grid.rounded(spec)
}

/// [`extent`] in lanes, which the compiler turns into vector minima and maxima.
#[inline(always)]
fn fast_extent(x: &[f32]) -> (f32, f32) {
    let (chunks, tail) = x.as_chunks::<LANES>();
    let first = x.first().copied().unwrap_or(0.0);
    let (mut lo, mut hi) = ([first; LANES], [first; LANES]);
    for c in chunks {
        for i in 0..LANES {
            lo[i] = if c[i] < lo[i] { c[i] } else { lo[i] };
            hi[i] = if c[i] > hi[i] { c[i] } else { hi[i] };
        }
    }
    let (a, b) = (extent(&lo), extent(&hi));
    tail.iter().fold((a.0, b.1), |(lo, hi), &v| (if v < lo { v } else { lo }, if v > hi { v } else { hi }))
}
