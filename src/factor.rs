//! Blocked factorisations of square row-major matrices in `f64`: just what the manifold and GPTQ need, built on the matrix product.
//!
//! Not from a library: faer 0.24, without default features, takes about 100 s of processor time to compile.

use rayon::prelude::*;

use crate::device::cpu::{self, Strides};

/// Columns factored at a time.
const BLOCK: usize = 48;

/// `c += alpha a op(b)`: sizes (m, n, k), and the distances between rows of c, a and b.
#[allow(clippy::too_many_arguments)]
fn update(
    size: (usize, usize, usize),
    c: &mut [f64],
    lc: usize,
    beta: f64,
    alpha: f64,
    a: &[f64],
    la: usize,
    b: &[f64],
    lb: usize,
    tb: bool,
) {
    if size.2 > 0 {
        let s = |l| Strides::new(l, false);
        cpu::gemm(size, c, s(lc), beta, a, s(la), b, Strides::new(lb, tb), alpha, true);
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn axpy(y: &mut [f64], alpha: f64, x: &[f64]) {
    y.iter_mut().zip(x).for_each(|(y, x)| *y += alpha * x);
}

/// The transpose of an n×n matrix.
pub fn transpose(a: &[f64], n: usize) -> Vec<f64> {
    (0..n * n).map(|i| a[i % n * n + i / n]).collect()
}

/// Householder QR with a non-negative diagonal of R: (Q, R), both n×n. Unique for a matrix of full rank.
///
/// Reflections `I − τ v vᵀ` of a panel are gathered as `I − V T Vᵀ`, T upper triangular (Schreiber & Van Loan 1989). Works on
/// transposes, so that columns are contiguous.
pub fn qr(a: &[f64], n: usize) -> (Vec<f64>, Vec<f64>) {
    let mut at = transpose(a, n);
    let mut panels = vec![];
    for k in (0..n).step_by(BLOCK) {
        let (b, m) = (BLOCK.min(n - k), n - k);
        let (mut vt, mut t) = (vec![0.0; b * m], vec![0.0; b * b]);
        for j in 0..b {
            let (done, rest) = at.split_at_mut((k + j + 1) * n);
            let column = &mut done[(k + j) * n + k + j..];
            let norm = dot(column, column).sqrt();
            let v = &mut vt[j * m + j..(j + 1) * m];
            if norm > 0.0 {
                let beta = if column[0] > 0.0 { -norm } else { norm };
                v.copy_from_slice(column);
                v[0] -= beta;
                let tau = 2.0 / dot(v, v);
                column.fill(0.0);
                column[0] = beta;
                for other in rest.chunks_mut(n).take(b - j - 1) {
                    let other = &mut other[k + j..];
                    let w = tau * dot(other, v);
                    axpy(other, -w, v);
                }
                // T[..j, j] = −τ T[..j, ..j] (Vᵀ v)
                let z: Vec<f64> = (0..j).map(|i| dot(&vt[i * m + j..(i + 1) * m], &vt[j * m + j..(j + 1) * m])).collect();
                for i in 0..j {
                    t[i * b + j] = -tau * (i..j).map(|l| t[i * b + l] * z[l]).sum::<f64>();
                }
                t[j * b + j] = tau;
            }
        }
        reflect(&mut at[(k + b) * n..], n, k, &vt, &t, false);
        panels.push((k, vt, t));
    }
    // Q is the product of the panels, applied to I from the last one on.
    let mut qt = vec![0.0; n * n];
    qt.iter_mut().step_by(n + 1).for_each(|x| *x = 1.0);
    for (k, vt, t) in panels.into_iter().rev() {
        reflect(&mut qt[k * n..], n, k, &vt, &t, true);
    }
    for j in 0..n {
        if at[j * n + j] < 0.0 {
            qt[j * n..][..n].iter_mut().for_each(|x| *x = -*x);
            (j..n).for_each(|i| at[i * n + j] = -at[i * n + j]);
        }
    }
    (transpose(&qt, n), transpose(&at, n))
}

/// `C ← C (I − V T Vᵀ)`, or with Tᵀ, for the rows of c from column `k` on; `vt` is Vᵀ.
fn reflect(c: &mut [f64], n: usize, k: usize, vt: &[f64], t: &[f64], transposed: bool) {
    let (rows, m) = (c.len() / n, n - k);
    let b = vt.len() / m;
    if rows == 0 {
        return;
    }
    let (mut s, mut st) = (vec![0.0; rows * b], vec![0.0; rows * b]);
    update((rows, b, m), &mut s, b, 0.0, 1.0, &c[k..], n, vt, m, true);
    update((rows, b, b), &mut st, b, 0.0, 1.0, &s, b, t, b, transposed);
    update((rows, m, b), &mut c[k..], n, 1.0, -1.0, &st, b, vt, m, false);
}

/// `P A = L U` with partial pivoting.
pub struct Lu {
    n: usize,
    lu: Vec<f64>,
    /// Row i of P A is row `perm[i]` of A.
    perm: Vec<usize>,
    sign: f64,
}

impl Lu {
    /// Factors an n×n matrix; a singular one is noticed by [`Lu::sign`].
    pub fn new(mut a: Vec<f64>, n: usize) -> Self {
        let mut perm: Vec<usize> = (0..n).collect();
        let mut sign = 1.0;
        for k in (0..n).step_by(BLOCK) {
            let end = (k + BLOCK).min(n);
            for j in k..end {
                let pivot = (j..n).max_by(|&x, &y| a[x * n + j].abs().total_cmp(&a[y * n + j].abs())).expect("j < n");
                if pivot != j {
                    let (top, bottom) = a.split_at_mut(pivot * n);
                    top[j * n..][..n].swap_with_slice(&mut bottom[..n]);
                    perm.swap(j, pivot);
                    sign = -sign;
                }
                let p = a[j * n + j];
                if p == 0.0 || !p.is_finite() {
                    sign = 0.0;
                    continue;
                }
                sign *= p.signum();
                let (top, bottom) = a.split_at_mut((j + 1) * n);
                let u = &top[j * n + j + 1..j * n + end];
                for row in bottom.chunks_mut(n) {
                    row[j] /= p;
                    let l = row[j];
                    axpy(&mut row[j + 1..end], -l, u);
                }
            }
            // U₁₂ = L₁₁⁻¹ A₁₂, then A₂₂ −= L₂₁ U₁₂.
            for i in k + 1..end {
                let (top, row) = a.split_at_mut(i * n);
                for j in k..i {
                    let l = row[j];
                    axpy(&mut row[end..n], -l, &top[j * n + end..(j + 1) * n]);
                }
            }
            if end < n {
                let (top, bottom) = a.split_at_mut(end * n);
                let l: Vec<f64> = bottom.chunks(n).flat_map(|row| &row[k..end]).copied().collect();
                let size = (n - end, n - end, end - k);
                update(size, &mut bottom[end..], n, 1.0, -1.0, &l, end - k, &top[k * n + end..], n, false);
            }
        }
        Self { n, lu: a, perm, sign }
    }

    /// The sign of det A: 1, −1, or 0 when singular.
    pub fn sign(&self) -> f64 {
        self.sign
    }

    /// det A; 0 when singular.
    pub fn determinant(&self) -> f64 {
        // In logarithms, so that large matrices neither overflow nor vanish.
        let log: f64 = (0..self.n).map(|i| self.lu[i * self.n + i].abs().ln()).sum();
        if self.sign == 0.0 { 0.0 } else { self.sign * log.exp() }
    }

    /// `A⁻¹ B` for an n×n B.
    pub fn solve(&self, b: &[f64]) -> Vec<f64> {
        let (n, lu) = (self.n, &self.lu);
        let mut x: Vec<f64> = self.perm.iter().flat_map(|&i| &b[i * n..][..n]).copied().collect();
        for k in (0..n).step_by(BLOCK) {
            let end = (k + BLOCK).min(n);
            for i in k + 1..end {
                let (top, row) = x.split_at_mut(i * n);
                (k..i).for_each(|j| axpy(&mut row[..n], -lu[i * n + j], &top[j * n..][..n]));
            }
            if end < n {
                let (top, bottom) = x.split_at_mut(end * n);
                update((n - end, n, end - k), bottom, n, 1.0, -1.0, &lu[end * n + k..], n, &top[k * n..], n, false);
            }
        }
        for k in (0..n).step_by(BLOCK).rev() {
            let end = (k + BLOCK).min(n);
            for i in (k..end).rev() {
                let (top, bottom) = x.split_at_mut((i + 1) * n);
                let row = &mut top[i * n..];
                (i + 1..end).for_each(|j| axpy(row, -lu[i * n + j], &bottom[(j - i - 1) * n..][..n]));
                row.iter_mut().for_each(|x| *x /= lu[i * n + i]);
            }
            if k > 0 {
                let (top, bottom) = x.split_at_mut(k * n);
                update((k, n, end - k), top, n, 1.0, -1.0, &lu[k..], n, bottom, n, false);
            }
        }
        x
    }
}

/// Columns of a trailing Cholesky update that are done at once; what lies above the diagonal is left out in steps of this.
const STRIPE: usize = 256;

/// The lower triangular L with `A = L Lᵀ` of a symmetric n×n matrix, of which only the lower triangle is read; `None` where a pivot
/// is not positive.
pub fn cholesky(mut a: Vec<f64>, n: usize) -> Option<Vec<f64>> {
    // Columns [k, j) of a row are done: x ← (x − Σ l_i l_j) for its column j.
    let reduced = |row: &[f64], other: &[f64], k: usize, j: usize| row[j] - dot(&row[k..j], &other[k..j]);
    for k in (0..n).step_by(BLOCK) {
        let end = (k + BLOCK).min(n);
        for i in k..end {
            let (top, row) = a.split_at_mut(i * n);
            for j in k..i {
                let other = &top[j * n..][..n];
                row[j] = reduced(row, other, k, j) / other[j];
            }
            let pivot = row[i] - dot(&row[k..i], &row[k..i]);
            if !(pivot > 0.0 && pivot.is_finite()) {
                return None;
            }
            row[i] = pivot.sqrt();
        }
        let (top, bottom) = a.split_at_mut(end * n);
        bottom.par_chunks_mut(n).for_each(|row| {
            for j in k..end {
                let other = &top[j * n..][..n];
                row[j] = reduced(row, other, k, j) / other[j];
            }
        });
        // A₂₂ −= L₂₁ L₂₁ᵀ
        let b = end - k;
        let l: Vec<f64> = bottom.chunks(n).flat_map(|row| &row[k..end]).copied().collect();
        for s in (end..n).step_by(STRIPE) {
            let (size, l) = ((n - s, STRIPE.min(n - s), b), &l[(s - end) * b..]);
            update(size, &mut a[s * n + s..], n, 1.0, -1.0, l, b, l, b, true);
        }
    }
    for i in 0..n {
        a[i * n + i + 1..(i + 1) * n].fill(0.0);
    }
    Some(a)
}

/// The inverse of a lower triangular n×n matrix with no zero on its diagonal.
pub fn invert_lower(l: &[f64], n: usize) -> Vec<f64> {
    let mut x = vec![0.0; n * n];
    for k in (0..n).step_by(BLOCK) {
        let end = (k + BLOCK).min(n);
        // L₂₁ X₁ + L₂₂ X₂ = I₂
        let (top, bottom) = x.split_at_mut(k * n);
        if k > 0 {
            update((end - k, k, k), bottom, n, 0.0, -1.0, &l[k * n..], n, top, n, false);
        }
        for i in k..end {
            let (top, row) = x.split_at_mut(i * n);
            row[i] = 1.0;
            (k..i).for_each(|j| axpy(&mut row[..=j], -l[i * n + j], &top[j * n..][..=j]));
            row[..=i].iter_mut().for_each(|x| *x /= l[i * n + i]);
        }
    }
    x
}

/// The upper triangular U with `A⁻¹ = Uᵀ U` of a symmetric n×n matrix; `None` where it is not positive definite.
///
/// With J the reversal of the order, `J A J = L Lᵀ` and `U = J L⁻¹ J`: one factorisation, and A⁻¹ is never formed.
pub fn inverse_factor(mut a: Vec<f64>, n: usize) -> Option<Vec<f64>> {
    a.reverse();
    let mut u = invert_lower(&cholesky(a, n)?, n);
    u.reverse();
    u.iter().all(|x| x.is_finite()).then_some(u)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn product(a: &[f64], b: &[f64], n: usize) -> Vec<f64> {
        crate::ops::matmul::reference(a, false, b, false, (n, n, n))
    }
    fn distance(a: &[f64], b: &[f64]) -> f64 {
        a.iter().zip(b).fold(0.0, |m, (a, b)| f64::max(m, (a - b).abs()))
    }

    #[test]
    fn factors_multiply_back() {
        for n in [1, 2, 3, 47, 48, 49, 97, 150] {
            let a = crate::ops::randn([n, n], n as u64).into_vec::<f64>().unwrap();
            let (q, r) = qr(&a, n);
            assert!(distance(&product(&q, &r, n), &a) < 1e-12, "QR = A, n = {n}");
            let eye = crate::Tensor::eye(n, crate::DType::F64).unwrap().into_vec::<f64>().unwrap();
            assert!(distance(&product(&transpose(&q, n), &q, n), &eye) < 1e-13, "QᵀQ = I, n = {n}");
            for i in 0..n {
                assert!(r[i * n + i] > 0.0 && r[i * n..][..i].iter().all(|x| *x == 0.0), "R, n = {n}");
            }
            let lu = Lu::new(a.clone(), n);
            assert!(distance(&product(&a, &lu.solve(&eye), n), &eye) < 1e-9, "A A⁻¹ = I, n = {n}");
            let mut swapped = a.clone();
            swapped[..n].iter_mut().for_each(|x| *x = -*x);
            assert_eq!(Lu::new(swapped, n).sign(), -lu.sign());
            let det = Lu::new(q, n).determinant();
            assert!((det.abs() - 1.0).abs() < 1e-12, "|det Q| = 1, n = {n}: {det}");
        }
        assert_eq!(Lu::new(vec![1.0, 2.0, 2.0, 4.0], 2).sign(), 0.0);
        // A zero column: Q is orthogonal all the same.
        let (q, _) = qr(&[0.0, 1.0, 0.0, 2.0], 2);
        assert!((q[0] * q[1] + q[2] * q[3]).abs() < 1e-15);
    }
    #[test]
    fn positive_definite_matrices_are_factored() {
        for n in [1, 2, 3, 47, 48, 49, 97, 150, 310] {
            let b = crate::ops::randn([n, n], n as u64).into_vec::<f64>().unwrap();
            let mut a = product(&b, &transpose(&b, n), n);
            a.iter_mut().step_by(n + 1).for_each(|x| *x += 0.1 * n as f64);
            let eye = crate::Tensor::eye(n, crate::DType::F64).unwrap().into_vec::<f64>().unwrap();
            let l = cholesky(a.clone(), n).unwrap();
            assert!(distance(&product(&l, &transpose(&l, n), n), &a) < 1e-11 * n as f64, "L Lᵀ = A, n = {n}");
            assert!(distance(&product(&l, &invert_lower(&l, n), n), &eye) < 1e-12, "L L⁻¹ = I, n = {n}");
            let u = inverse_factor(a.clone(), n).unwrap();
            assert!(distance(&product(&a, &product(&transpose(&u, n), &u, n), n), &eye) < 1e-11, "A UᵀU = I, n = {n}");
            for i in 0..n {
                assert!(u[i * n + i] > 0.0 && u[i * n..][..i].iter().all(|x| *x == 0.0), "U, n = {n}");
                assert!(l[i * n + i + 1..(i + 1) * n].iter().all(|x| *x == 0.0), "L, n = {n}");
            }
            // The smallest pivot, made negative.
            a[n * n - 1] -= 1.001 * l[n * n - 1] * l[n * n - 1];
            assert!(cholesky(a.clone(), n).is_none() && inverse_factor(a, n).is_none(), "n = {n}");
        }
        assert!(cholesky(vec![f64::NAN], 1).is_none() && cholesky(vec![0.0], 1).is_none());
        assert!(cholesky(vec![], 0).is_some_and(|l| l.is_empty()));
    }
}
