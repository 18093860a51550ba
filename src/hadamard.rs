//! Hadamard matrices of every size a LLaMA needs, as a fast map rather than a dense matrix.
//!
//! A row of n = K·2^m values is viewed as `[K, n/K]`, Sylvester-transformed along the last axis, multiplied by a ±1 matrix `H_K`
//! from the left along the first, and divided by √n. This is the convention of the published code, whose tables (K = 12, 20, 28,
//! 36, 40, 44, 52, 60, 108, 140, 156, 172) are tried first and in its order. Sizes the tables miss use Paley's constructions over
//! primes and powers of primes (Paley 1933) and a matrix of order 428 (Kharaghani and Tayfeh-Rezaie 2005), K up to [`MAX_K`]. Where
//! none is known to us the map is block-diagonal, in blocks of the largest size that divides n. Never zero padding: padding and
//! truncating is not orthogonal.

mod core;

use std::fmt;
use std::sync::Arc;

use crate::tensor::room;
use crate::{DType, Error, Result};

/// The order in which the published code tries them.
const PUBLISHED_ORDER: [usize; 12] = [172, 156, 140, 108, 60, 52, 36, 28, 44, 40, 20, 12];
/// The largest H_K that is used.
pub const MAX_K: usize = 924;

/// An orthonormal Hadamard map of rows of length n. Displayed as `28*512, published table` or `7 blocks of 2048, Sylvester`: what a
/// file records of it.
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

impl fmt::Display for Hadamard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.blocks > 1 {
            write!(f, "{} blocks of ", self.blocks)?;
        }
        let size = self.n / self.blocks;
        match self.k {
            1 => write!(f, "{size}, {}", self.construction),
            k => write!(f, "{k}*{}, {}", size / k, self.construction),
        }
    }
}

impl Hadamard {
    /// The map for rows of `n` values.
    ///
    /// # Errors
    /// Only for `n = 0`: every other size has at least a block-diagonal map (of 1×1 blocks when n is odd).
    pub fn new(n: usize) -> Result<Self> {
        Self::in_blocks(n, largest_block(n, core::exists))
    }

    /// The block-diagonal map of rows of `n` values that transforms every `size` of them by themselves.
    ///
    /// # Errors
    /// A size that does not divide n, or that has no map of one block: no power of two, and no `H_K` that is known.
    pub fn in_blocks(n: usize, size: usize) -> Result<Self> {
        if n == 0 {
            return Err(Error::argument("Hadamard size", "expected at least 1, got 0"));
        }
        if size == 0 || !n.is_multiple_of(size) {
            return Err(Error::argument("Hadamard blocks", format!("expected a divisor of {n}, got {size}")));
        }
        let Some(k) = Self::factor(size) else {
            let message = format!("expected a power of two, or one times a known order of at most {MAX_K}, got {size}");
            return Err(Error::argument("Hadamard blocks", message));
        };
        let (signs, construction) = core::core(k).filter(|_| k > 1).unwrap_or((Arc::from([]), "Sylvester"));
        Ok(Self { n, k, blocks: n / size, signs, construction })
    }

    /// The blocks that rows of `n` values had before files recorded their Hadamards: n itself where the map was whole. Since then more
    /// orders have become known.
    ///
    /// # Errors
    /// `n = 0`.
    pub fn unrecorded(n: usize) -> Result<Self> {
        Self::in_blocks(n, largest_block(n, core::existed_before_records))
    }

    /// The K of `n = K·2^m`: 1 for a power of two, else the first published K, else the least other; `None` if there is none.
    fn factor(n: usize) -> Option<usize> {
        if n.is_power_of_two() {
            return Some(1);
        }
        let fits = |k: usize| n.is_multiple_of(k) && (n / k).is_power_of_two();
        let published = PUBLISHED_ORDER.into_iter().find(|&k| fits(k));
        published.or_else(|| (12..=MAX_K).step_by(4).find(|&k| fits(k) && core::exists(k)))
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
    /// True where `H_K` is of Paley's second kind: made of 2×2 blocks, which halves the work of a kernel.
    pub fn is_paired(&self) -> bool {
        self.construction == core::PALEY_TWO
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
    /// Where `H_K` comes from: `Sylvester`, `published table`, `Paley I`, `Paley II`, `Goethals-Seidel`.
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

/// The largest divisor K·2^m of n that a whole map exists for, the orders K being those that are `known`; n itself for every
/// published size.
fn largest_block(n: usize, known: impl Fn(usize) -> bool) -> usize {
    let largest = |k: usize| k << (n / k).trailing_zeros();
    let cores = (12..=MAX_K).step_by(4).filter(|&k| n.is_multiple_of(k) && known(k));
    std::iter::once(1).chain(cores).map(|k| if n == 0 { 1 } else { largest(k) }).fold(1, usize::max)
}

#[cfg(test)]
mod tests {
    use super::*;

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
            (107, (1, 107)),
            // Orders beyond the published code's and its kind: what larger models have.
            (25600, (100, 1)),
            (6400, (100, 1)),
            (29568, (924, 1)),
            (10944, (684, 1)),
            (13696, (428, 1)),
            (14848, (464, 1)),
            (13440, (420, 1)),
            (16896, (132, 1)),
            (17408, (68, 1)),
            (27648, (108, 1)),
            (21504, (84, 1)),
            (2880, (180, 1)),
            (53248, (52, 1)),
        ] {
            assert_eq!(map(n).unwrap(), want, "n = {n}");
        }
        let name = |n| Hadamard::new(n).unwrap().to_string();
        assert_eq!(name(18944), "148*128, Paley II");
        assert_eq!(name(6400), "100*64, Paley II");
        assert_eq!(name(13696), "428*32, Goethals-Seidel");
        assert_eq!(name(4096), "4096, Sylvester");
        assert_eq!(Hadamard::in_blocks(14336, 2048).unwrap().to_string(), "7 blocks of 2048, Sylvester");
        assert!(Hadamard::new(0).is_err());
        // Sizes that nothing could try one by one: a prime, and a power of two times one.
        assert_eq!(map((1 << 61) - 1).unwrap(), (1, (1 << 61) - 1));
        assert_eq!(map(((1 << 31) - 1) << 20).unwrap(), (1, (1 << 31) - 1));
        assert!(map(usize::MAX).is_ok());
    }

    /// Knowing more orders changes no map that was whole, and none in the blocks that there were.
    #[test]
    fn maps_before_records() {
        let was = |n| Hadamard::unrecorded(n).unwrap();
        for (n, blocks, size) in [(25600, 5, 5120), (6400, 5, 1280), (29568, 7, 4224), (13696, 107, 128), (11008, 1, 11008)] {
            assert_eq!((was(n).blocks(), n / was(n).blocks()), (blocks, size), "n = {n}");
        }
        for n in 1..40_000 {
            let (was, is) = (was(n), Hadamard::new(n).unwrap());
            assert!(is.blocks() <= was.blocks(), "n = {n}: {was}, now {is}");
            if was.blocks() == 1 || is.blocks() == was.blocks() {
                assert!(was == is && was.construction() == is.construction() && was.k() <= 192, "n = {n}: {was}, now {is}");
            }
        }
    }

    #[test]
    fn blocks_that_cannot_be() {
        for (n, size, wanted) in [(14336, 4096, "divisor of 14336"), (14336, 0, "got 0"), (14336, 7, "power of two")] {
            let message = Hadamard::in_blocks(n, size).unwrap_err().to_string();
            assert!(message.contains(wanted), "{message}");
        }
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
