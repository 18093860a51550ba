//! The matrices `H_K` that no power of two makes: published tables, and the constructions of Paley (1933) and of Goethals and
//! Seidel (1967).

use std::sync::{Arc, OnceLock};

use super::MAX_K;

/// Published tables in the order of the file: bit-packed row-major, least significant bit first, a set bit is −1.
static TABLES: &[u8] = include_bytes!("../hadamard_tables.bin");
const TABLE_SIZES: [usize; 12] = [12, 20, 28, 36, 40, 44, 52, 60, 108, 140, 156, 172];

/// Turyn-type sequences of lengths 36, 36, 36 and 35, from which the first Hadamard matrix of order 428 was made (Kharaghani and
/// Tayfeh-Rezaie, "A Hadamard matrix of order 428", 2005): no construction of Paley's has that order or twice it.
const TURYN_36: [&[u8]; 4] = [
    b"+++----++-+-+-----++++-++-++++----+-",
    b"+-+++++--+-+--+--++--++++-++++---++-",
    b"+-+++++-+--++++-+++-++--+++-+--+---+",
    b"+++-+-----++--+-+++--+-+-+++-++++-+",
];
const TURYN_ORDER: usize = 4 * (3 * TURYN_36[0].len() - 1);

/// The name of Paley's second construction.
pub const PALEY_TWO: &str = "Paley II";

/// Where an `H_K` comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Construction {
    Table(usize),
    PaleyOne(Field),
    PaleyTwo(Field),
    Turyn,
}

impl Construction {
    /// That of `H_K`; `None` where none is known to us.
    fn of(k: usize) -> Option<Self> {
        if let Some(i) = TABLE_SIZES.iter().position(|&size| size == k) {
            return Some(Self::Table(i));
        }
        if k < 4 || !k.is_multiple_of(4) {
            return None;
        }
        // q = 3 mod 4 follows from k = 0 mod 4.
        if let Some(field) = Field::of(k - 1) {
            return Some(Self::PaleyOne(field));
        }
        match Field::of(k / 2 - 1) {
            Some(field) if field.q % 4 == 1 => Some(Self::PaleyTwo(field)),
            _ => (k == TURYN_ORDER).then_some(Self::Turyn),
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Table(_) => "published table",
            Self::PaleyOne(_) => "Paley I",
            Self::PaleyTwo(_) => PALEY_TWO,
            Self::Turyn => "Goethals-Seidel",
        }
    }

    fn signs(self) -> Arc<[i8]> {
        match self {
            Self::Table(i) => table(i),
            Self::PaleyOne(field) => paley_one(field),
            Self::PaleyTwo(field) => paley_two(field),
            Self::Turyn => goethals_seidel(turyn()),
        }
    }
}

/// True where an `H_K` is known and at most [`MAX_K`].
pub fn exists(k: usize) -> bool {
    k <= MAX_K && Construction::of(k).is_some()
}

/// True where an `H_K` was known to versions that recorded no construction: K at most 192, Paley's over primes only.
pub fn existed_before_records(k: usize) -> bool {
    let prime = |field: Field| field.p == field.q;
    match Construction::of(k).filter(|_| k <= 192) {
        Some(Construction::Table(_)) => true,
        Some(Construction::PaleyOne(field) | Construction::PaleyTwo(field)) => prime(field),
        Some(Construction::Turyn) | None => false,
    }
}

/// `H_K`, row-major ±1, and where it comes from.
pub fn core(k: usize) -> Option<(Arc<[i8]>, &'static str)> {
    type Cache = OnceLock<Option<(Arc<[i8]>, &'static str)>>;
    static CACHE: [Cache; MAX_K + 1] = [const { OnceLock::new() }; MAX_K + 1];
    CACHE.get(k)?.get_or_init(|| Construction::of(k).map(|c| (c.signs(), c.name()))).clone()
}

fn table(i: usize) -> Arc<[i8]> {
    let (start, k) = (TABLE_SIZES[..i].iter().map(|s| (s * s).div_ceil(8)).sum::<usize>(), TABLE_SIZES[i]);
    let bit = |j: usize| TABLES[start + j / 8] >> (j % 8) & 1;
    (0..k * k).map(|j| if bit(j) == 1 { -1 } else { 1 }).collect()
}

/// The field of `q = pᵉ` elements, p an odd prime. Element a is the polynomial whose coefficients are the digits of a to the base p,
/// the lowest first, modulo the first primitive polynomial of degree e when those are counted in the same way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Field {
    p: usize,
    q: usize,
}

impl Field {
    /// `None` where q is not a power of an odd prime.
    fn of(q: usize) -> Option<Self> {
        let p = (3..).step_by(2).take_while(|p| p * p <= q).find(|&p| q.is_multiple_of(p)).unwrap_or(q);
        let mut rest = q;
        while rest > 1 && rest.is_multiple_of(p) {
            rest /= p;
        }
        (q > 2 && q % 2 == 1 && rest == 1).then_some(Self { p, q })
    }

    /// `a − b`, digit by digit.
    fn minus(self, mut a: usize, mut b: usize) -> usize {
        let (mut difference, mut unit) = (0, 1);
        while unit < self.q {
            difference += (self.p + a % self.p - b % self.p) % self.p * unit;
            (a, b, unit) = (a / self.p, b / self.p, unit * self.p);
        }
        difference
    }

    /// `x a` modulo the monic polynomial whose other coefficients are those of `low`.
    fn times_x(self, a: usize, low: usize) -> usize {
        let (p, top) = (self.p, self.q / self.p);
        // x a without its leading term, less that coefficient times `low`.
        let (lead, shifted) = (a / top, a % top * p);
        (0..lead).fold(shifted, |sum, _| self.minus(sum, low))
    }

    /// The quadratic character: 0 at 0, 1 at squares, −1 elsewhere.
    fn character(self) -> Vec<i8> {
        let Self { p, q } = self;
        let mut chi = vec![-1; q];
        chi[0] = 0;
        if p == q {
            (1..q).for_each(|x| chi[x * x % q] = 1);
            return chi;
        }
        // Powers of x modulo a primitive polynomial are all elements but 0, and the even ones the squares.
        let powers = |low: &usize| {
            let next = |a: &usize| Some(self.times_x(*a, *low)).filter(|&b| b > 1);
            std::iter::successors(Some(1), next).take(q).collect::<Vec<_>>()
        };
        let all = (1..q).map(|low| powers(&low)).find(|powers| powers.len() == q - 1);
        all.iter().flatten().step_by(2).for_each(|&square| chi[square] = 1);
        chi
    }

    /// Bordered Jacobsthal matrix: zero corner, ones in the first row, `column` in the first column, χ(i − j) inside.
    fn bordered(self, column: i8) -> Vec<i8> {
        let (n, chi) = (self.q + 1, self.character());
        let mut m = vec![0; n * n];
        for i in 1..n {
            m[i] = 1;
            m[i * n] = column;
            (1..n).for_each(|j| m[i * n + j] = chi[self.minus(i - 1, j - 1)]);
        }
        m
    }
}

/// H = I + S for q ≡ 3 mod 4, S skew: order q + 1.
fn paley_one(field: Field) -> Arc<[i8]> {
    let mut m = field.bordered(-1);
    m.iter_mut().step_by(field.q + 2).for_each(|x| *x = 1);
    m.into()
}

/// For q ≡ 1 mod 4 the bordered matrix S is symmetric: replace 0 by [[1, −1], [−1, −1]] and ±1 by ±[[1, 1], [1, −1]]: order 2(q + 1).
fn paley_two(field: Field) -> Arc<[i8]> {
    let (s, n) = (field.bordered(1), field.q + 1);
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

/// Four sequences of 3n − 1 signs whose periodic autocorrelations add up to nothing, by way of T-sequences (Turyn 1974):
/// X, Y, Z, W become Z, W, (X + Y)/2 and (X − Y)/2 in places of their own, which are added with the signs of a 4×4 Hadamard matrix.
fn turyn() -> [Vec<i8>; 4] {
    let [x, y, z, w] = TURYN_36.map(|s| s.iter().map(|c| if *c == b'+' { 1 } else { -1 }).collect::<Vec<i8>>());
    let n = x.len();
    let mut t = [const { [0i8; TURYN_ORDER / 4] }; 4];
    t[0][..n].copy_from_slice(&z);
    t[1][n..2 * n - 1].copy_from_slice(&w);
    for (i, (x, y)) in x.into_iter().zip(y).enumerate() {
        (t[2][2 * n - 1 + i], t[3][2 * n - 1 + i]) = ((x + y) / 2, (x - y) / 2);
    }
    let sum = |signs: [i8; 4]| (0..t[0].len()).map(|i| signs.iter().zip(&t).map(|(s, t)| s * t[i]).sum()).collect();
    [[1, 1, 1, 1], [-1, 1, 1, -1], [-1, -1, 1, 1], [-1, 1, -1, 1]].map(sum)
}

/// Goethals and Seidel's array of four circulant matrices A, B, C, D, R the reversal of columns:
/// `[[A, BR, CR, DR], [−BR, A, DᵀR, −CᵀR], [−CR, −DᵀR, A, BᵀR], [−DR, CᵀR, −BᵀR, A]]`.
fn goethals_seidel(first_rows: [Vec<i8>; 4]) -> Arc<[i8]> {
    // Which matrix a block has, 4 + i the transpose of the i-th, and its sign.
    const ARRAY: [[(usize, i8); 4]; 4] = [
        [(0, 1), (1, 1), (2, 1), (3, 1)],
        [(1, -1), (0, 1), (7, 1), (6, -1)],
        [(2, -1), (7, -1), (0, 1), (5, 1)],
        [(3, -1), (6, 1), (5, -1), (0, 1)],
    ];
    let n = first_rows[0].len();
    let mut h = vec![0; 16 * n * n];
    for (at, value) in h.iter_mut().enumerate() {
        let (row, col) = (at / (4 * n), at % (4 * n));
        let ((which, sign), i, j) = (ARRAY[row / n][col / n], row % n, col % n);
        let j = if which == 0 { j } else { n - 1 - j };
        let place = if which < 4 { (n + j - i) % n } else { (n + i - j) % n };
        *value = sign * first_rows[which % 4][place];
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
            // Rows as bits: the dot product of two is k less twice the number of places where they differ.
            let bits =
                |row: &[i8]| row.chunks(64).map(|c| c.iter().fold(0, |b, s| b << 1 | u64::from(*s < 0))).collect::<Vec<u64>>();
            assert!(h.len() == k * k && h.iter().all(|s| s.abs() == 1), "H_{k}");
            let rows: Vec<Vec<u64>> = h.chunks(k).map(bits).collect();
            for (i, a) in rows.iter().enumerate() {
                for (j, b) in rows[..i].iter().enumerate() {
                    let differ: u32 = a.iter().zip(b).map(|(a, b)| (a ^ b).count_ones()).sum();
                    assert_eq!(2 * differ as usize, k, "H_{k} rows {i}, {j}");
                }
            }
        }
        // Tables; Paley over primes; over 49, 121, 243, 343, 529 and 729; order 428.
        let wanted = [76, 148, 200, 420, 464, 684, 924, 100, 244, 344, 428, 724];
        assert!(TABLE_SIZES.iter().chain(&wanted).all(|k| sizes.contains(k)), "{sizes:?}");
        assert!(sizes.iter().all(|&k| exists(k)) && !exists(MAX_K + 4) && !exists(92));
    }

    /// Squares are the squares, and differences belong to the same field: `(a − b) x = a x − b x`.
    #[test]
    fn fields_of_prime_powers() {
        for q in [9, 25, 27, 49, 243, 343, 361, 625] {
            let field = Field::of(q).unwrap();
            let chi = field.character();
            assert_eq!(chi.iter().filter(|&&c| c == 1).count(), (q - 1) / 2, "GF({q})");
            // χ(−1) = 1 just where q = 1 mod 4.
            let minus_one = chi[field.minus(0, 1)];
            assert_eq!(minus_one, if q % 4 == 1 { 1 } else { -1 }, "GF({q})");
            // Σ χ(a) χ(a + c) = −1 for every c but 0: what Paley's constructions rest on, true of no other set of so many.
            for c in 1..q {
                let sum: i32 = (0..q).map(|a| i32::from(chi[a]) * i32::from(chi[field.minus(a, c)])).sum();
                assert_eq!(sum, -1, "GF({q}), shift {c}");
            }
        }
        assert_eq!([1, 2, 4, 15, 21, 45, 427].map(Field::of), [None; 7]);
    }
}
