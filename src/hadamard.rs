//! Hadamard matrices of every size a LLaMA needs, as a fast map rather than a dense matrix.
//!
//! A row of n = K·2^m values is viewed as `[K, n/K]`, Sylvester-transformed along the last axis, multiplied by a ±1 matrix `H_K`
//! from the left along the first, and divided by √n. This is the convention of the published code, whose tables (K = 12, 20, 28,
//! 36, 40, 44, 52, 60, 108, 140, 156, 172) are tried first and in its order. Sizes the tables miss use Paley's constructions
//! (Paley 1933) and, where none is known to us, a block-diagonal matrix of the largest size that divides n. Never zero padding:
//! padding and truncating is not orthogonal.

use std::sync::{Arc, OnceLock};

use crate::tensor::room;
use crate::{DType, Error, Result};

/// Published tables in the order of the file: bit-packed row-major, least significant bit first, a set bit is −1.
static TABLES: &[u8] = include_bytes!("hadamard_tables.bin");
const TABLE_SIZES: [usize; 12] = [12, 20, 28, 36, 40, 44, 52, 60, 108, 140, 156, 172];
/// The order in which the published code tries them.
const PUBLISHED_ORDER: [usize; 12] = [172, 156, 140, 108, 60, 52, 36, 28, 44, 40, 20, 12];
/// The largest H_K that is used.
pub const MAX_K: usize = 192;

/// An orthonormal Hadamard map of rows of length n.
#[derive(Clone, Debug)]
pub struct Hadamard {
    n: usize,
    k: usize,
    blocks: usize,
    /// K×K signs, row-major; empty when K is 1.
    signs: Arc<[i8]>,
    construction: &'static str,
}

impl PartialEq for Hadamard {
    fn eq(&self, other: &Self) -> bool {
        (self.n, self.k, self.blocks) == (other.n, other.k, other.blocks)
    }
}

impl Hadamard {
    /// The map for rows of `n` values.
    ///
    /// # Errors
    /// Only for `n = 0`: every other size has at least a block-diagonal map (of 1×1 blocks when n is odd).
    pub fn new(n: usize) -> Result<Self> {
        if n == 0 {
            return Err(Error::argument("Hadamard size", "expected at least 1, got 0"));
        }
        // The largest constructible divisor K·2^m; n itself for every published size.
        let largest = |k: usize| k << (n / k).trailing_zeros();
        let cores = (12..=MAX_K).step_by(4).filter(|&k| n.is_multiple_of(k) && core(k).is_some());
        let size = std::iter::once(1).chain(cores).map(largest).fold(1, usize::max);
        let k = Self::factor(size).unwrap_or(1);
        let (signs, construction) = core(k).unwrap_or((Arc::from([]), "Sylvester"));
        Ok(Self { n, k, blocks: n / size, signs, construction })
    }

    /// The K of `n = K·2^m`: 1 for a power of two, else the first published K, else a Paley K; `None` if there is none.
    fn factor(n: usize) -> Option<usize> {
        if n.is_power_of_two() {
            return Some(1);
        }
        let fits = |k: usize| n.is_multiple_of(k) && (n / k).is_power_of_two();
        let published = PUBLISHED_ORDER.into_iter().find(|&k| fits(k));
        published.or_else(|| (12..=MAX_K).step_by(4).find(|&k| fits(k) && core(k).is_some()))
    }

    /// Row length.
    pub fn n(&self) -> usize {
        self.n
    }
    /// Rows of `H_K` (1: none).
    pub fn k(&self) -> usize {
        self.k
    }
    /// Number of equal diagonal blocks (1: a full Hadamard matrix).
    pub fn blocks(&self) -> usize {
        self.blocks
    }
    /// `H_K`, row-major ±1; empty when K is 1.
    pub fn signs(&self) -> &[i8] {
        &self.signs
    }
    /// `H_K` bit-packed by rows, `ceil(K/32)` words a row, a set bit for −1: what the CUDA kernels read.
    pub fn packed(&self) -> Vec<u32> {
        let words = self.k.div_ceil(32);
        let mut packed = vec![0; self.signs.len() / self.k * words];
        for (i, _) in self.signs.iter().enumerate().filter(|(_, s)| **s < 0) {
            packed[i / self.k * words + i % self.k / 32] |= 1 << (i % self.k % 32);
        }
        packed
    }
    /// Where `H_K` comes from: `Sylvester`, `published table`, `Paley I`, `Paley II`.
    pub fn construction(&self) -> &'static str {
        self.construction
    }

    /// Transforms one row in place by the definition, in double: `row ← H row`, or `Hᵀ row`. The oracle of every fast path.
    ///
    /// # Errors
    /// A row that does not hold [`n`](Self::n) values.
    pub fn reference(&self, row: &mut [f64], transpose: bool) -> Result<()> {
        if row.len() != self.n {
            return Err(Error::shape("Hadamard::reference", format!("[{}]", self.n), &[row.len()]));
        }
        let (size, k) = (self.n / self.blocks, self.k);
        let m = size / k;
        for block in row.chunks_mut(size) {
            let mut t = vec![0.0; size];
            for i in 0..k {
                for j in 0..m {
                    for l in 0..m {
                        // Sylvester: (−1)^popcount(j & l)
                        let sign = if (j & l).count_ones() % 2 == 0 { 1.0 } else { -1.0 };
                        t[i * m + j] += sign * block[i * m + l];
                    }
                }
            }
            block.fill(0.0);
            for i in 0..k {
                for l in 0..k {
                    let sign = if k == 1 {
                        1.0
                    } else {
                        f64::from(if transpose { self.signs[l * k + i] } else { self.signs[i * k + l] })
                    };
                    for j in 0..m {
                        block[i * m + j] += sign * t[l * m + j];
                    }
                }
            }
            block.iter_mut().for_each(|x| *x /= (size as f64).sqrt());
        }
        Ok(())
    }

    /// The dense n×n matrix H, so that the map is `x ↦ x Hᵀ` on rows: `H[(i, j), (l, p)] = H_K[i, l] (−1)^popcount(j & p) / √size`
    /// in every diagonal block.
    ///
    /// # Errors
    /// An n that memory has no room for n² values of.
    pub fn dense(&self) -> Result<Vec<f64>> {
        let (n, k) = (self.n, self.k);
        let size = n / self.blocks;
        let m = size / k;
        let one = 1.0 / (size as f64).sqrt();
        let mut h = vec![0.0; room("dense Hadamard matrix", &[n, n], DType::F64)?];
        for (row, h) in h.chunks_mut(n).enumerate() {
            let (first, i, j) = (row / size * size, row % size / m, row % m);
            for (l, h) in h[first..first + size].chunks_mut(m).enumerate() {
                let core = if k == 1 { one } else { one * f64::from(self.signs[i * k + l]) };
                let sign = |p: usize| if (j & p).count_ones().is_multiple_of(2) { core } else { -core };
                h.iter_mut().enumerate().for_each(|(p, h)| *h = sign(p));
            }
        }
        Ok(h)
    }
}

/// `H_K` from the published tables or a construction of Paley's.
fn core(k: usize) -> Option<(Arc<[i8]>, &'static str)> {
    type Cache = OnceLock<Option<(Arc<[i8]>, &'static str)>>;
    static CACHE: [Cache; MAX_K + 1] = [const { OnceLock::new() }; MAX_K + 1];
    CACHE.get(k)?.get_or_init(|| build_core(k)).clone()
}

fn build_core(k: usize) -> Option<(Arc<[i8]>, &'static str)> {
    if let Some(i) = TABLE_SIZES.iter().position(|&s| s == k) {
        let start: usize = TABLE_SIZES[..i].iter().map(|s| (s * s).div_ceil(8)).sum();
        let bit = |j: usize| TABLES[start + j / 8] >> (j % 8) & 1;
        return Some(((0..k * k).map(|j| if bit(j) == 1 { -1 } else { 1 }).collect(), "published table"));
    }
    if k >= 4 && prime(k - 1) && (k - 1) % 4 == 3 {
        return Some((paley_one(k - 1), "Paley I"));
    }
    if k >= 12 && k.is_multiple_of(4) && prime(k / 2 - 1) && (k / 2 - 1) % 4 == 1 {
        return Some((paley_two(k / 2 - 1), "Paley II"));
    }
    None
}

fn prime(q: usize) -> bool {
    q > 1 && (2..).take_while(|d| d * d <= q).all(|d| !q.is_multiple_of(d))
}

/// The quadratic character of GF(q): 0 at 0, 1 at squares, −1 elsewhere.
fn character(q: usize) -> Vec<i8> {
    let mut chi = vec![-1; q];
    chi[0] = 0;
    (1..q).for_each(|x| chi[x * x % q] = 1);
    chi
}

/// Bordered Jacobsthal matrix: zero corner, ones in the first row, `column` in the first column, χ(i − j) inside.
fn bordered(q: usize, column: i8) -> Vec<i8> {
    let (n, chi) = (q + 1, character(q));
    let mut m = vec![0; n * n];
    for i in 1..n {
        m[i] = 1;
        m[i * n] = column;
        (1..n).for_each(|j| m[i * n + j] = chi[(q + i - j) % q]);
    }
    m
}

/// H = I + S for q ≡ 3 mod 4, S skew: order q + 1.
fn paley_one(q: usize) -> Arc<[i8]> {
    let mut m = bordered(q, -1);
    m.iter_mut().step_by(q + 2).for_each(|x| *x = 1);
    m.into()
}

/// For q ≡ 1 mod 4 the bordered matrix S is symmetric: replace 0 by [[1, −1], [−1, −1]] and ±1 by ±[[1, 1], [1, −1]]: order 2(q + 1).
fn paley_two(q: usize) -> Arc<[i8]> {
    let (s, n) = (bordered(q, 1), q + 1);
    let mut h = vec![0; 4 * n * n];
    for i in 0..n {
        for j in 0..n {
            let block = match s[i * n + j] {
                0 => [1, -1, -1, -1],
                x => [x, x, x, -x],
            };
            for (t, value) in block.into_iter().enumerate() {
                h[(2 * i + t / 2) * 2 * n + 2 * j + t % 2] = value;
            }
        }
    }
    h.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_core_is_a_hadamard_matrix() {
        let mut sizes = vec![];
        for k in 2..=MAX_K {
            let Some((h, _)) = core(k) else { continue };
            sizes.push(k);
            for i in 0..k {
                for j in 0..k {
                    let dot: i32 = (0..k).map(|l| i32::from(h[i * k + l]) * i32::from(h[j * k + l])).sum();
                    assert_eq!(dot, if i == j { k as i32 } else { 0 }, "H_{k} rows {i}, {j}");
                }
            }
        }
        assert!(TABLE_SIZES.iter().chain(&[76, 148]).all(|k| sizes.contains(k)), "{sizes:?}");
    }

    #[test]
    fn dense_is_the_reference() {
        for n in [1, 2, 12, 56, 80, 107, 148, 214, 344] {
            let map = Hadamard::new(n).unwrap();
            let h = map.dense().unwrap();
            for i in 0..n {
                let mut row = vec![0.0; n];
                row[i] = 1.0;
                map.reference(&mut row, true).unwrap(); // Hᵀ eᵢ is row i of H
                assert_eq!(row, h[i * n..][..n], "row {i} of {n}");
            }
        }
    }

    #[test]
    fn published_choices() {
        let map = |n| Hadamard::new(n).map(|h| (h.k(), h.blocks()));
        for (n, want) in [
            (1, (1, 1)),
            (64, (1, 1)),
            (1376, (172, 1)),
            (11008, (172, 1)),
            (13824, (108, 1)),
            (14336, (28, 1)),
            (5120, (40, 1)),
            (6144, (12, 1)),
            (8960, (140, 1)),
            (28672, (28, 1)),
            (18944, (148, 1)),
            (4864, (76, 1)),
            (13696, (1, 107)),
            (107, (1, 107)),
        ] {
            assert_eq!(map(n).unwrap(), want, "n = {n}");
        }
        assert_eq!(Hadamard::new(18944).unwrap().construction(), "Paley II");
        assert!(Hadamard::new(0).is_err());
        // Sizes that nothing could try one by one: a prime, and a power of two times one.
        assert_eq!(map((1 << 61) - 1).unwrap(), (1, (1 << 61) - 1));
        assert_eq!(map(((1 << 31) - 1) << 20).unwrap(), (1, (1 << 31) - 1));
        assert!(map(usize::MAX).is_ok());
    }

    /// The largest of all divisors that a map of one block exists for.
    #[test]
    fn blocks_are_the_fewest() {
        for n in 1..5000 {
            let fewest = (1..=n).find(|&b| n % b == 0 && Hadamard::factor(n / b).is_some()).unwrap();
            let map = Hadamard::new(n).unwrap();
            assert_eq!((map.blocks(), map.k()), (fewest, Hadamard::factor(n / fewest).unwrap()), "n = {n}");
        }
    }
}
