//! The fast Walsh–Hadamard transform of every row: `y = H x`, `dx = Hᵀ dy`, with H orthonormal ([`Hadamard`]).
//!
//! n log n additions for the power-of-two part, a K×K product of ±1 for the rest.

use crate::device::cuda::ffi::sq_hadamard_map;
use crate::device::cuda::{CudaDevice, Queue};
use crate::device::launch::{Check, Kind, View, Work};
use crate::device::{cpu, ffi};
use crate::grid::{Clip, QuantSpec};
use crate::hadamard::Hadamard;
use crate::ops::fake_quant::launch_spec;
use crate::ops::{At, Case, Once, Place, Run, exact, few_rows, normals};
use crate::tape::{Grads, Inputs, Op, Saved, Var, operands, run};
use crate::{DType, Error, Result, Tensor};

/// The transform of the last axis, or its transpose.
#[derive(Clone, Debug)]
pub(crate) struct Transform {
    /// The matrix.
    pub map: Hadamard,
    /// Apply Hᵀ.
    pub transpose: bool,
}

impl Op for Transform {
    fn name(&self) -> &'static str {
        "hadamard"
    }
    fn check(&self, inputs: &[Tensor]) -> Result<()> {
        let [x] = operands(inputs)?;
        if x.cols() != self.map.n() {
            return Err(Error::shape("hadamard", format!("[.., {}]", self.map.n()), x.shape()));
        }
        Ok(())
    }
    fn cpu(&self, inputs: Inputs, _: &mut Saved) -> Result<Tensor> {
        let [x] = inputs.take()?;
        let shape = x.shape().to_vec();
        if x.dtype() == DType::F64 {
            let mut y = x.into_owned::<f64>()?;
            y.chunks_mut(self.map.n()).try_for_each(|row| self.map.reference(row, self.transpose))?;
            return Tensor::from_vec(y, shape);
        }
        let mut y = x.into_owned::<f32>()?;
        fast(&mut y, &self.map, self.transpose);
        Tensor::from_vec(y, shape)
    }
    fn gpu(&self, device: &CudaDevice, inputs: Inputs, _: &mut Saved) -> Result<Tensor> {
        let [x] = inputs.take()?;
        if x.dtype() == DType::F64 {
            return by_products(x, &self.map, self.transpose);
        }
        gpu(device, x, &self.map, self.transpose, None)
    }
    fn backward(&self, _: Saved, dy: Tensor, _: &[bool]) -> Result<Grads> {
        Ok(vec![Some(transform(dy, &self.map, !self.transpose)?)])
    }
}

impl Var<'_> {
    /// The orthonormal Hadamard transform of the last axis.
    ///
    /// # Errors
    /// Those of [`Tape::record`](crate::Tape::record); those of [`Hadamard::new`] for the length of a row.
    pub fn hadamard(self) -> Result<Self> {
        let map = Hadamard::new(self.value().cols())?;
        self.hadamard_by(&map)
    }

    /// The transform of the last axis by a map of its length.
    ///
    /// # Errors
    /// Those of [`Tape::record`](crate::Tape::record): rows of another length than the map's.
    pub fn hadamard_by(self, map: &Hadamard) -> Result<Self> {
        self.tape().record(Transform { map: map.clone(), transpose: false }, vec![self])
    }
}

/// `x ← H x` for every row, without a tape; in place when unshared.
///
/// # Errors
/// Rows of another length than the map's; a type that is not floating-point; a failed launch.
pub fn transform(x: Tensor, map: &Hadamard, transpose: bool) -> Result<Tensor> {
    run(&Transform { map: map.clone(), transpose }, vec![x], &mut Saved::default())
}

/// The transform as matrix products, for types that have no kernel: H = H_K ⊗ H_a ⊗ H_b, one product a factor.
fn by_products(x: Tensor, map: &Hadamard, transpose: bool) -> Result<Tensor> {
    use crate::linalg::matmul::product;
    let (shape, dtype, device) = (x.shape().to_vec(), x.dtype(), x.device());
    let (k, size) = (map.k(), map.n() / map.blocks());
    let m = size / k;
    let a = 1 << (m.ilog2() / 2);
    let rows = x.len() / size.max(1);
    let matrix = |values: Vec<f64>, n: usize| Tensor::from_vec(values, [n, n])?.to_dtype(dtype)?.to_device(&device);
    // Each factor orthonormal; those of powers of two are symmetric.
    let sylvester = |n: usize| matrix(Hadamard::new(n)?.dense()?, n);
    let mut y = product(&x.reshape([rows * size / (m / a), m / a])?, false, &sylvester(m / a)?, false, false, dtype)?;
    if a > 1 {
        y = product(&sylvester(a)?, false, &y.reshape([rows * k, a, m / a])?, false, false, dtype)?;
    }
    if k > 1 {
        let core = map.signs().iter().map(|&s| f64::from(s) / (k as f64).sqrt()).collect();
        y = product(&matrix(core, k)?, transpose, &y.reshape([rows, k, m])?, false, false, dtype)?;
    }
    y.reshape(shape)
}

/// `H x` of every row (or `Hᵀ x`) in place when unshared, then fake quantisation in the same pass where a spec is given.
pub(super) fn gpu(device: &CudaDevice, x: Tensor, map: &Hadamard, transpose: bool, spec: Option<&QuantSpec>) -> Result<Tensor> {
    let mut x = x.aligned()?;
    let y = x.or_new(device)?;
    let packed = || bytemuck::cast_slice(&map.packed()).to_vec();
    let table = (map.k() > 1).then(|| device.constant("Hadamard matrices", map.k(), &packed)).transpose()?;
    let tables = Tables { map, table: table.as_ref().map(|t| t.view(Kind::U32)), signs: None };
    launch(device.queue(), y.view()?, x.view()?, &tables, transpose, spec)?;
    Ok(y)
}

/// A map, and what of it is on the device.
#[derive(Clone, Copy)]
pub(crate) struct Tables<'a> {
    pub map: &'a Hadamard,
    /// [`Hadamard::packed`] in `u32`, where K > 1.
    pub table: Option<View<'a>>,
    /// n values of ±1 in `i8`, applied before H and after Hᵀ; for maps of one block.
    pub signs: Option<View<'a>>,
}

/// `y = H x` of every row (or `Hᵀ x`), then, where there is a spec, fake quantisation in the same pass; y may be x.
pub(crate) fn launch(
    queue: Queue<'_>,
    y: View<'_>,
    x: View<'_>,
    tables: &Tables<'_>,
    transpose: bool,
    spec: Option<&QuantSpec>,
) -> Result<()> {
    let what = if spec.is_some() { "hadamard + quantise" } else { "hadamard" };
    let c = Check::new(what, queue);
    let Tables { map, table, signs } = *tables;
    let (k, len, kind) = (map.k(), x.len(), x.kind());
    if spec.is_some_and(|spec| spec.clip == Clip::Search) {
        return Err(Error::argument(what, "clip search is not available in one pass"));
    }
    if (k > 1) != table.is_some() || (signs.is_some() && map.blocks() > 1) {
        return Err(Error::argument(what, "a table for K > 1, and signs for one block only"));
    }
    let _ = spec.map(|spec| spec.group_size(map.n())).transpose()?;
    let (rows, work) = (c.long(c.rows(len, map.n())?)?, Work::moving(what, 2 * x.bytes()));
    let (y, x, dtype) = (c.operand("y", y, kind, len)?, c.operand("x", x, kind, len)?, c.code(kind)?);
    let m = sq_hadamard_map {
        n: c.int(map.n())?,
        k: c.int(k)?,
        blocks: c.int(map.blocks())?,
        paired: map.is_paired().into(),
        transpose: transpose.into(),
        table: c.optional("table", table, Kind::U32, k * k.div_ceil(32))?.cast(),
        signs: c.optional("signs", signs, Kind::I8, map.n())?.cast(),
    };
    let quant = spec.map(launch_spec).transpose()?;
    // SAFETY: x and y have rows · n values and may be the same; the table has K rows of ceil(K/32) words, the signs n values.
    c.launch(work, |s| unsafe {
        match quant {
            None => ffi!(sq_hadamard(y, x, rows, m, dtype, s)),
            Some(quant) => ffi!(sq_hadamard_fake_quant(y, x, rows, m, quant, dtype, s)),
        }
    })
}

fn fast(x: &mut [f32], map: &Hadamard, transpose: bool) {
    use rayon::prelude::*;
    let k = map.k();
    let size = map.n() / map.blocks();
    let scale = 1.0 / (size as f64).sqrt() as f32;
    let codes = codes(map, transpose);
    x.par_chunks_mut(cpu::rows_per_task(size) * size).for_each_init(
        || vec![[0f32; LANES]; if k > 1 { 16 * k / 4 } else { 0 }],
        |table, rows| {
            cpu::simd(
                #[inline(always)]
                || {
                    for row in rows.chunks_mut(size) {
                        row.chunks_mut(size / k).for_each(sylvester);
                        if k > 1 {
                            mix(row, &codes, table, k, scale);
                        } else {
                            row.iter_mut().for_each(|x| *x *= scale);
                        }
                    }
                },
            )
        },
    );
}

const LANES: usize = 8;

/// Unnormalised natural-order butterflies in place.
#[inline(always)]
fn sylvester(x: &mut [f32]) {
    let (chunks, tail) = x.as_chunks_mut::<LANES>();
    // A power of two: all chunks or all tail.
    butterflies(tail, |a, b| (*a, *b) = (*a + *b, *a - *b));
    for c in chunks.iter_mut() {
        within::<1>(c);
        within::<2>(c);
        within::<4>(c);
    }
    butterflies(
        chunks,
        #[inline(always)]
        |a, b| {
            for i in 0..LANES {
                (a[i], b[i]) = (a[i] + b[i], a[i] - b[i]);
            }
        },
    );
}

/// Calls `f` on every pair of every stage.
#[inline(always)]
fn butterflies<T>(x: &mut [T], f: impl Fn(&mut T, &mut T)) {
    let mut half = 1;
    while half < x.len() {
        for pair in x.chunks_mut(2 * half) {
            let (a, b) = pair.split_at_mut(half);
            a.iter_mut().zip(b).for_each(|(a, b)| f(a, b));
        }
        half *= 2;
    }
}

/// One stage inside a vector.
#[inline(always)]
fn within<const HALF: usize>(x: &mut [f32; LANES]) {
    let (mut partner, mut signed) = (*x, *x);
    for i in 0..LANES {
        partner[i] = x[i ^ HALF];
        signed[i] = if i & HALF == 0 { x[i] } else { -x[i] };
    }
    for i in 0..LANES {
        x[i] = partner[i] + signed[i];
    }
}

/// `H_K` for [`mix`]: for every four rows i and four columns g, which of the four columns row i subtracts, as bits, the first
/// row's lowest.
fn codes(map: &Hadamard, transpose: bool) -> Vec<u16> {
    let k = map.k();
    let negative = |i: usize, j: usize| map.signs()[if transpose { j * k + i } else { i * k + j }] < 0;
    let code = |i: usize, g: usize| (0..4).fold(0, |code, bit| code | u16::from(negative(i, 4 * g + bit)) << bit);
    match map.signs() {
        [] => vec![],
        _ => (0..k / 4)
            .flat_map(|i| (0..k / 4).map(move |g| (0..4).fold(0, |codes, r| codes | code(4 * i + r, g) << (4 * r))))
            .collect(),
    }
}

/// `x[i, :] ← scale Σ_j H[i, j] x[j, :]` with x `[k, m]`: all sixteen signed sums of four rows are made once, so that an output
/// is a sum of k/4 of them (the "four Russians" of Arlazarov et al. 1970). K is a multiple of 4.
#[inline(always)]
fn mix(x: &mut [f32], codes: &[u16], table: &mut [[f32; LANES]], k: usize, scale: f32) {
    let m = x.len() / k;
    let (tables, _) = table.as_chunks_mut::<16>();
    for first in (0..m).step_by(LANES) {
        // Narrower columns (m = 1, 2, 4) run the same loop over fewer lanes.
        let lanes = LANES.min(m - first);
        for (g, t) in tables.iter_mut().enumerate() {
            let mut v = [[0f32; LANES]; 4];
            for (r, v) in v.iter_mut().enumerate() {
                let row = &x[(4 * g + r) * m + first..];
                match row.first_chunk::<LANES>() {
                    Some(row) if lanes == LANES => *v = *row,
                    _ => v[..lanes].copy_from_slice(&row[..lanes]),
                }
            }
            *t = signed_sums(v);
        }
        for (i, codes) in codes.chunks(k / 4).enumerate() {
            let mut sum = [Lanes::default(); 4];
            for (t, &code) in tables.iter().zip(codes) {
                for r in 0..4 {
                    sum[r] = sum[r].plus(&t[usize::from(code >> (4 * r) & 15)]);
                }
            }
            for r in 0..4 {
                let y = sum[r].times(scale);
                let row = &mut x[(4 * i + r) * m + first..];
                match row.first_chunk_mut::<LANES>() {
                    Some(row) if lanes == LANES => *row = y.0,
                    _ => row[..lanes].copy_from_slice(&y.0[..lanes]),
                }
            }
        }
    }
}

/// A vector that stays in one register.
#[derive(Clone, Copy, Default)]
#[repr(align(32))]
struct Lanes([f32; LANES]);

impl Lanes {
    #[inline(always)]
    fn plus(mut self, other: &[f32; LANES]) -> Self {
        self.0.iter_mut().zip(other).for_each(|(x, y)| *x += y);
        self
    }
    #[inline(always)]
    fn times(mut self, factor: f32) -> Self {
        self.0.iter_mut().for_each(|x| *x *= factor);
        self
    }
}

/// `±a ± b ± c ± d`; a set bit of the index subtracts, a being the lowest.
#[inline(always)]
fn signed_sums([a, b, c, d]: [[f32; LANES]; 4]) -> [[f32; LANES]; 16] {
    let mut t = [[0f32; LANES]; 16];
    for l in 0..LANES {
        let low = [a[l] + b[l], b[l] - a[l], a[l] - b[l], -a[l] - b[l]];
        let high = [c[l] + d[l], d[l] - c[l], c[l] - d[l], -c[l] - d[l]];
        for i in 0..16 {
            t[i][l] = low[i % 4] + high[i / 4];
        }
    }
    t
}

/// Worked cases.
pub(crate) fn cases() -> Vec<Case> {
    let case = |rows: usize, n: usize, transpose: bool| {
        let name = format!("{rows}x{n}{}", if transpose { " transposed" } else { "" });
        Case::new("hadamard", name, normals(&[(&[rows, n], n as u64)]), move |mut v| {
            let op = Transform { map: Hadamard::new(n)?, transpose };
            v[0].tape().record(op, vec![v.remove(0)])
        })
    };
    let mut all = vec![];
    // Powers of two; K·2^m with symmetric (28, 36) and unsymmetric H_K; Paley; block-diagonal.
    for n in [1, 2, 8, 64, 12, 24, 28, 36, 40, 80, 148, 172, 344, 107, 214, 200, 428] {
        all.extend([case(3, n, false), case(1, n, true)]);
    }
    for n in [256, 1024, 1376, 2048, 4096, 5120, 11008, 13824, 14336, 17920, 18944, 20480, 22016, 24576, 28672] {
        all.push(case(9, n, false).large());
    }
    // Orders beyond 192, and powers of primes.
    for n in [10944, 13440, 13696, 14848, 25600, 29568] {
        all.push(case(5, n, n % 3 == 0).large());
    }
    let in_blocks = |rows: usize, n: usize, size: usize| {
        let name = format!("{rows}x{n} in blocks of {size}");
        Case::new("hadamard", name, normals(&[(&[rows, n], n as u64)]), move |mut v| {
            v.remove(0).hadamard_by(&Hadamard::in_blocks(n, size)?)
        })
    };
    all.extend([(12, 1), (12, 4), (56, 8), (72, 12)].map(|(n, size)| in_blocks(3, n, size)));
    all.extend([(11008, 256), (14336, 2048), (29568, 4224)].map(|(n, size)| in_blocks(5, n, size).large()));
    all.extend(Case::table(timed, &sizes()));
    all
}

/// Powers of two and the widths of models, and the few rows of a network that generates.
fn sizes() -> Vec<At> {
    const ALL: &[DType] = &[DType::F16, DType::BF16, DType::F32];
    let mut sizes: Vec<At> = vec![(Place::Cpu, 4096, 4096, &[DType::F32]), (Place::Cpu, 11008, 1524, &[DType::F32])];
    sizes.extend((6..16).map(|m| (Place::Gpu, 1 << m, 1 << (28 - m), ALL)));
    let widths = [5120, 6144, 8960, 10944, 11008, 13696, 13824, 14336, 18944, 25600, 28672, 29568];
    sizes.extend(widths.map(|n| (Place::Gpu, n, 16384, ALL)));
    sizes.extend(few_rows());
    sizes
}

fn timed(n: usize, rows: usize) -> Case {
    let maps = Once::new();
    let graph = Run::graph(move |mut v| {
        let map = maps.get(v[0].value(), || Hadamard::new(n))?;
        v[0].tape().record(Transform { map, transpose: false }, vec![v.remove(0)])
    });
    let what = ("hadamard", "hadamard", "Hadamard transform of rows of n");
    Case::timed(what, (n, rows), vec![vec![rows, n]], graph, move |x, y| {
        let map = Hadamard::new(n)?;
        exact::every(&["hadamard"], n, x, y, |x| vec![exact::hadamard(&x[0], &map)])
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::randn;

    #[test]
    fn products_make_the_same_map() {
        for n in [1, 2, 8, 64, 128, 12, 24, 28, 40, 80, 148, 172, 344, 214] {
            let map = Hadamard::new(n).unwrap();
            for transpose in [false, true] {
                let x = randn([3, n], n as u64);
                let mut want = x.to_vec::<f64>().unwrap();
                want.chunks_mut(n).for_each(|row| map.reference(row, transpose).unwrap());
                let got = by_products(x, &map, transpose).unwrap().to_vec::<f64>().unwrap();
                let error = got.iter().zip(&want).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
                assert!(error < 1e-13, "n = {n}, transposed {transpose}: {error:e}");
            }
        }
    }
}
