//! The search for the clip ratio of a group, in single precision ([`Clip::Search`](super::Clip::Search)).
//!
//! The definition tries every candidate ([`every_candidate`]). [`search`] makes the same choice, to the bit, and computes few of those errors.
//! Each candidate first gets a number that its error cannot be below, for a twentieth of the price: in units of its step, |u|^2.4 is at least
//! u² q(|u|), with a polynomial q that stays below |u|^0.4. What the grid clips is few values far out, whose powers are computed. A sum of such terms
//! is given up once it says that the candidate has lost. The errors that are then computed are that of the candidate with the smallest bound and
//! those of candidates whose bounds are no larger than it: one or two of 80.
//!
//! **Why the choice is the same.** With t = x/s, both arithmetics differ from exact by at most 3·2⁻²⁴ (|t| + 1) steps in u: here t is off by 2⁻²³ |t| and
//! its distance to the codes by no more; the definition's code is no nearer than the nearest, and its product of code and step is off by 2⁻²⁴ |t|.
//! Let 2η = 4·2⁻²⁴ (max|t| + 1). The definition's |e| is at least (|u| − 2η) s, and (|u| − 2η)^2.4 at least |u|^2.4 (1 − 5η) − 5η. Sums of n terms
//! that are no smaller than 0 lose at most a fraction `lost` in either order, powers and their bounds 10⁻⁵. So the error is at least
//! `s^2.4 (S (1 − relative) − 5ηn)` for a sum of bounds S, and a candidate for which that is larger than an error that was computed can neither win
//! nor tie.

use super::{Grid, LANES, QuantSpec, SEARCH_NORM, SEARCH_STEPS, candidate};

/// The grid of a group that spans [lo, hi], its clip ratio searched. To be called inside [`simd`](crate::device::cpu::simd).
#[inline(always)]
pub(super) fn search(spec: &QuantSpec, x: &[f32], lo: f32, hi: f32) -> Grid<f32> {
    let grids: [Grid<f32>; SEARCH_STEPS] = std::array::from_fn(|i| Grid::new(spec, lo, hi, candidate(i) as f32));
    match Bounds::new(&grids, x, lo, hi) {
        Some(bounds) => grids[fewer(&grids, x, &bounds.all())],
        None => every_candidate(&grids, x),
    }
}

/// By the definition: the first of those with the smallest error; the first of all where no error is finite.
#[inline(always)]
fn every_candidate(grids: &[Grid<f32>; SEARCH_STEPS], x: &[f32]) -> Grid<f32> {
    let mut best = (f32::INFINITY, 0);
    for (i, grid) in grids.iter().enumerate() {
        let e = search_error(grid, x, best.0);
        if e < best.0 {
            best = (e, i);
        }
    }
    grids[best.1]
}

/// The same candidate, given numbers that their errors are not below.
#[inline(always)]
fn fewer(grids: &[Grid<f32>; SEARCH_STEPS], x: &[f32], bounds: &[f32; SEARCH_STEPS]) -> usize {
    let first = (1..SEARCH_STEPS).fold(0, |first, i| if bounds[i] < bounds[first] { i } else { first });
    let mut best = (f32::INFINITY, 0);
    for i in std::iter::once(first).chain((0..SEARCH_STEPS).filter(|&i| i != first)) {
        // A candidate whose bound is not a number is tried.
        if bounds[i] > best.0 {
            continue;
        }
        // An error that equals the smallest is wanted to the end: it wins where its candidate comes first.
        let e = search_error(&grids[i], x, best.0.next_up());
        if e < best.0 || (e == best.0 && i < best.1) {
            best = (e, i);
        }
    }
    best.1
}

/// `q(v) = v Σ COEFFICIENTS[k] vᵏ` is at most v^0.4 for all v ≥ 0, and in the mean over 0 ≤ v ≤ ½ of v² q(v) a fraction of 7·10⁻⁴ below. It meets
/// v^0.4 at 0 and touches it in the three nodes of the Gauss quadrature over [0, ½] with weight v³, as one-sided approximations do that are the
/// best in such a mean (Bojanic & DeVore 1966).
const COEFFICIENTS: [f32; 6] = [6.797_31, -43.170_2, 173.917_24, -398.365_6, 480.503_87, -237.204];
/// Beyond this many steps q stays what it is there.
const TOP: f32 = 0.5;
/// Of all powers and bounds of powers, against their rounding errors.
const LESS: f32 = 1.0 - 1e-5;
/// How much larger a bound must be than the smallest one for its sum to be given up: more than bounds are below errors.
const BEATEN: f32 = 1.002;
/// Values are outermost beyond this part of the range: candidates that clip more have lost.
const OUTER: f32 = 0.45;
/// The candidate that is bounded first.
const START: usize = 25;

#[inline(always)]
fn below_power(v: f32) -> f32 {
    let mut q = COEFFICIENTS[5];
    for k in (0..5).rev() {
        q = q.mul_add(v, COEFFICIENTS[k]);
    }
    q * v
}

/// What bounds of all candidates are computed from.
struct Bounds<'a> {
    grids: &'a [Grid<f32>; SEARCH_STEPS],
    x: &'a [f32],
    /// The outermost values, the farthest first, filled up with zeros; and how far out the first of each part is: 1 at the end of the range.
    outer: Vec<(f32, [f32; LANES])>,
    /// The largest magnitude.
    most: f32,
    /// What a sum of n terms may lose by rounding, as a fraction.
    lost: f32,
}

impl<'a> Bounds<'a> {
    /// `None` where numbers are so large, small or far from 0 that the reasoning above does not hold or says nothing.
    #[inline(always)]
    fn new(grids: &'a [Grid<f32>; SEARCH_STEPS], x: &'a [f32], lo: f32, hi: f32) -> Option<Self> {
        let most = if -lo > hi { -lo } else { hi };
        let ordinary = |g: &Grid<f32>| {
            let (scale, least, largest) = (g.scale, g.min - g.zero, g.max - g.zero);
            (1e-10..1e10).contains(&scale) && most / scale < 1e4 && least <= 0.0 && largest >= 0.0
        };
        let depth = 2.0 * (x.len() / 64 + 64) as f32;
        let lost = depth / (1 << 24) as f32;
        if lost > 0.01 || !grids.iter().all(ordinary) {
            return None;
        }
        let far = |v: f32| if v < 0.0 { v / lo } else { v / hi };
        let (below, above) = (OUTER * lo, OUTER * hi);
        let mut outer: Vec<(f32, f32)> = x.iter().filter(|&&v| v > above || v < below).map(|&v| (far(v), v)).collect();
        outer.sort_unstable_by(|a, b| b.0.total_cmp(&a.0));
        let part = |part: &[(f32, f32)]| (part[0].0, std::array::from_fn(|k| part.get(k).map_or(0.0, |v| v.1)));
        let outer = outer.chunks(LANES).map(part).collect();
        Some(Self { grids, x, outer, most, lost })
    }

    /// A number that the error of each candidate is not below.
    #[inline(always)]
    fn all(&self) -> [f32; SEARCH_STEPS] {
        let mut bounds = [0f32; SEARCH_STEPS];
        let mut least = f32::INFINITY;
        for i in std::iter::once(START).chain((0..SEARCH_STEPS).filter(|&i| i != START)) {
            let grid = &self.grids[i];
            let (unit, rounding) = (power(grid.scale), 2.0 / (1 << 24) as f32 * (self.most / grid.scale + 1.0));
            let (relative, absolute) = (self.lost + 3e-5 + 5.0 * rounding, 5.0 * rounding * self.x.len() as f32);
            let bound = |sum: f32| unit * (sum * (1.0 - relative) - absolute) * LESS;
            let stop = (least * BEATEN / unit + absolute) / (1.0 - relative);
            let (clipped, more) = self.clipped(i, stop);
            if clipped > stop {
                let bound = bound(clipped);
                bounds[i] = bound;
                // What is clipped here is clipped by smaller grids too, by as much or more.
                let rest = self.grids[i..].iter().all(|g| g.zero == grid.zero && g.scale <= grid.scale);
                if rest && i != START {
                    bounds[i..].fill(bound);
                    break;
                }
                continue;
            }
            bounds[i] = bound(self.sum(grid, more, stop));
            if bounds[i] < least {
                least = bounds[i];
            }
        }
        bounds
    }

    /// The powers of what candidate i clips by more than half a step, as far as `stop`; and by how much they are larger than what
    /// [`sum`](Self::sum) counts for these values.
    #[inline(always)]
    fn clipped(&self, i: usize, stop: f32) -> (f32, f32) {
        let grid = &self.grids[i];
        let (inverse, least, most, ratio) = (1.0 / grid.scale, grid.min - grid.zero, grid.max - grid.zero, candidate(i) as f32);
        let (mut clipped, mut more, top) = (0f32, 0f32, below_power(TOP));
        for (far, part) in &self.outer {
            if *far < ratio || clipped > stop {
                break;
            }
            let (mut powers, mut counted) = ([0f32; LANES], [0f32; LANES]);
            for k in 0..LANES {
                let t = part[k] * inverse;
                let u = (t - nearest(t, least, most)).abs();
                powers[k] = if u > TOP { power(u) * LESS } else { 0.0 };
                counted[k] = if u > TOP { u * u * top } else { 0.0 };
            }
            let powers = powers.iter().sum::<f32>();
            clipped += powers;
            more += powers - counted.iter().sum::<f32>();
        }
        (clipped, if more > 0.0 { more } else { 0.0 })
    }

    /// `more` and Σ u² q(u) of all values, as far as `stop`.
    #[inline(always)]
    fn sum(&self, grid: &Grid<f32>, more: f32, stop: f32) -> f32 {
        let (inverse, least, most) = (1.0 / grid.scale, grid.min - grid.zero, grid.max - grid.zero);
        let add = |sum: f32, x: f32| {
            let t = x * inverse;
            let u = (t - nearest(t, least, most)).abs();
            let v = if u < TOP { u } else { TOP };
            (u * u).mul_add(below_power(v), sum)
        };
        let mut total = more;
        for block in self.x.chunks(8 * LANES) {
            let (chunks, tail) = block.as_chunks::<LANES>();
            let mut sum = [0f32; LANES];
            for c in chunks {
                for i in 0..LANES {
                    sum[i] = add(sum[i], c[i]);
                }
            }
            total += sum.iter().sum::<f32>() + tail.iter().fold(0f32, |sum, &v| add(sum, v));
            if total > stop {
                break;
            }
        }
        total
    }
}

/// The code nearest to t steps, less the zero point.
#[inline(always)]
fn nearest(t: f32, least: f32, most: f32) -> f32 {
    let c = t.round_ties_even();
    let c = if c < least { least } else { c };
    if c > most { most } else { c }
}

/// Σ|x − x̂|^2.4, or anything at least `bound` once the partial sum has passed it.
#[inline(always)]
fn search_error(grid: &Grid<f32>, x: &[f32], bound: f32) -> f32 {
    let mut total = 0f32;
    for block in x.chunks(8 * LANES) {
        let (chunks, tail) = block.as_chunks::<LANES>();
        let mut sum = [0f32; LANES];
        for c in chunks {
            for i in 0..LANES {
                sum[i] += power(c[i] - grid.nearest(c[i]));
            }
        }
        total += sum.iter().sum::<f32>() + tail.iter().map(|&v| power(v - grid.nearest(v))).sum::<f32>();
        if total >= bound {
            break;
        }
    }
    total
}

/// |e|^2.4 as e² · 2^(0.4 log₂|e|), relative error below 1e-6, in code that vectorises.
#[inline(always)]
fn power(e: f32) -> f32 {
    let bits = e.to_bits() & 0x7fff_ffff;
    // |e| = 2^exponent · m with m in [√½, √2); log₂ m = 2/ln 2 · artanh((m − 1)/(m + 1)).
    let shifted = bits.wrapping_add(0x3f80_0000 - 0x3f35_04f3);
    let exponent = (shifted >> 23) as i32 - 127;
    let m = f32::from_bits((shifted & 0x007f_ffff) + 0x3f35_04f3);
    let t = (m - 1.0) / (m + 1.0);
    let t2 = t * t;
    let log = t * (2.885_39 + t2 * (0.961_796_7 + t2 * (0.577_078 + t2 * 0.412_198_6)));
    let y = ((SEARCH_NORM - 2.0) as f32) * (exponent as f32 + log);
    // 2^y = 2^whole · e^(f ln 2), f in [−½, ½].
    let whole = y.round_ties_even();
    let f = (y - whole) * std::f32::consts::LN_2;
    let exp = 1.0 + f * (1.0 + f * (0.5 + f * (1.0 / 6.0 + f * (1.0 / 24.0 + f * (1.0 / 120.0 + f * (1.0 / 720.0))))));
    let scale = f32::from_bits(((whole as i32 + 127) << 23) as u32);
    e * e * (exp * scale)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::device::cpu;
    use crate::grid::fast_extent;
    use crate::ops::randn;

    fn both(spec: &QuantSpec, x: &[f32]) -> [Grid<f32>; 2] {
        cpu::simd(|| {
            let (lo, hi) = fast_extent(x);
            let grids = std::array::from_fn(|i| Grid::new(spec, lo, hi, candidate(i) as f32));
            [search(spec, x, lo, hi), every_candidate(&grids, x)]
        })
    }

    fn bits(g: &Grid<f32>) -> [u32; 4] {
        [g.scale, g.zero, g.min, g.max].map(f32::to_bits)
    }

    /// Rows of several kinds: normal, of few different values (errors tie), with outliers, one-sided, and empty.
    fn row(n: usize, kind: usize, seed: u64) -> Vec<f32> {
        let mut x: Vec<f32> = randn([n], seed).to_f64_vec().unwrap().into_iter().map(|v| v as f32).collect();
        match kind {
            0 => {}
            1 => x.iter_mut().for_each(|v| *v = (*v * 2.0).round()),
            2 => x[0] = 40.0,
            3 => x.iter_mut().for_each(|v| *v = v.abs()),
            4 => x.iter_mut().for_each(|v| *v = *v * *v * *v),
            5 => x.iter_mut().for_each(|v| *v += 3.0),
            6 => x.fill(0.0),
            _ => x.iter_mut().enumerate().for_each(|(i, v)| *v = (i % 16) as f32 - 7.5),
        }
        x
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 512, rng_seed: proptest::test_runner::RngSeed::Fixed(7), ..ProptestConfig::default() })]

        #[test]
        fn the_choice_is_that_among_all_candidates(
            n in 1usize..900, kind in 0usize..8, bits_of in 2u32..=8, symmetric: bool, weight: bool, grouped: bool, exponent in -42i32..38,
            ordinary: bool, seed: u64,
        ) {
            let spec = if weight { QuantSpec::weight(bits_of, symmetric) } else { QuantSpec::activation(bits_of, symmetric) };
            let spec = if grouped { spec.grouped(n) } else { spec };
            let size = if ordinary { 0.02 } else { 10f32.powi(exponent) };
            let x: Vec<f32> = row(n, kind, seed).into_iter().map(|v| v * size).collect();
            let [fewer, all] = both(&spec, &x);
            prop_assert_eq!(bits(&fewer), bits(&all));
        }
    }

    #[test]
    fn numbers_that_are_not_finite_change_no_choice() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for (at, symmetric) in [(0, true), (0, false), (77, true), (77, false)] {
                let mut x = row(200, 0, 3);
                x[at] = bad;
                let [fewer, all] = both(&QuantSpec::weight(4, symmetric), &x);
                assert_eq!(bits(&fewer), bits(&all), "{bad} at {at}");
            }
        }
    }

    /// On rows as weights have them few errors are computed.
    #[test]
    fn few_candidates_are_left() {
        for (n, bits) in [(576, 4), (4096, 4), (1536, 3), (1536, 8)] {
            let spec = QuantSpec::weight(bits, true);
            let mut left = 0;
            for seed in 0..20 {
                let x = row(n, 0, seed);
                let (lo, hi) = fast_extent(&x);
                let grids = std::array::from_fn(|i| Grid::new(&spec, lo, hi, candidate(i) as f32));
                let bounds = Bounds::new(&grids, &x, lo, hi).unwrap().all();
                let errors = grids.each_ref().map(|g| search_error(g, &x, f32::INFINITY));
                let least = errors.into_iter().fold(f32::INFINITY, f32::min);
                assert!(bounds.iter().zip(&errors).all(|(bound, error)| bound <= error), "{n} values in {bits} bits");
                left += bounds.iter().filter(|&&bound| bound <= least).count();
            }
            assert!(left <= if bits < 8 { 40 } else { 80 }, "{n} values in {bits} bits: {left} of 20 rows");
        }
    }

    #[test]
    fn the_polynomial_stays_below_the_power() {
        for i in 1..=1_000_000u32 {
            let v = i as f32 * 5e-7;
            let (below, power) = (f64::from(below_power(v)), f64::from(v).powf(0.4));
            assert!(below * f64::from(LESS) <= power, "{v}: {below} and {power}");
        }
    }

    #[test]
    fn powers_are_close_to_exact() {
        for i in 0..2_000_000u32 {
            // 7e-15 to 9e14.
            let e = f32::from_bits(0x2800_0000 + i * 404);
            let exact = f64::from(e).powf(SEARCH_NORM);
            assert!((f64::from(power(e)) / exact - 1.0).abs() < 2e-6, "{e}");
        }
    }
}
