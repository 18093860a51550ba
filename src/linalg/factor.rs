//! Factorisations of square row-major matrices in `f64`: those of faer, with our conventions of sign and of what is refused.
//!
//! QR and LU run on one thread: on several their sums depend on how many there are, and with them random orthogonal matrices of a seed.

use faer::dyn_stack::{MemBuffer, MemStack, StackReq};
use faer::linalg::cholesky::llt::factor as llt;
use faer::linalg::householder::{
    apply_block_householder_sequence_on_the_left_in_place_scratch as sequence_scratch,
    apply_block_householder_sequence_on_the_left_in_place_with_conj as apply_sequence,
};
use faer::linalg::lu::partial_pivoting::{factor as lu, solve};
use faer::linalg::qr::no_pivoting::factor as householder;
use faer::linalg::triangular_inverse::invert_lower_triangular;
use faer::perm::Perm;
use faer::prelude::default;
use faer::{Conj, Mat, MatRef, Par};

fn view(a: &[f64], n: usize) -> MatRef<'_, f64> {
    MatRef::from_row_major_slice(a, n, n)
}

fn rows(a: MatRef<'_, f64>) -> Vec<f64> {
    let mut out = Vec::with_capacity(a.nrows() * a.ncols());
    (0..a.nrows()).for_each(|i| out.extend(a.row(i).iter()));
    out
}

/// The transpose of an n×n matrix.
pub fn transpose(a: &[f64], n: usize) -> Vec<f64> {
    rows(view(a, n).transpose())
}

/// Memory for a routine that says what it needs.
fn stack<R>(needs: StackReq, routine: impl FnOnce(&mut MemStack) -> R) -> R {
    routine(MemStack::new(&mut MemBuffer::new(needs)))
}

/// Householder QR with a non-negative diagonal of R: (Q, R), both n×n. Unique for a matrix of full rank.
pub fn qr(a: &[f64], n: usize) -> (Vec<f64>, Vec<f64>) {
    let block = householder::recommended_block_size::<f64>(n, n);
    let (mut r, mut coefficients) = (view(a, n).to_owned(), Mat::zeros(block, n));
    stack(householder::qr_in_place_scratch::<f64>(n, n, block, Par::Seq, default()), |stack| {
        householder::qr_in_place(r.as_mut(), coefficients.as_mut(), Par::Seq, stack, default())
    });
    let mut q = Mat::identity(n, n);
    stack(sequence_scratch::<f64>(n, block, n), |stack| {
        apply_sequence(r.as_ref(), coefficients.as_ref(), Conj::No, q.as_mut(), Par::Seq, stack);
    });
    for j in 0..n {
        if r[(j, j)] < 0.0 {
            q.col_mut(j).iter_mut().for_each(|x| *x = -*x);
            r.row_mut(j).iter_mut().skip(j).for_each(|x| *x = -*x);
        }
        r.col_mut(j).iter_mut().skip(j + 1).for_each(|x| *x = 0.0);
    }
    (rows(q.as_ref()), rows(r.as_ref()))
}

/// `P A = L U` with partial pivoting.
pub struct Lu {
    n: usize,
    /// U, and below its diagonal L without its own.
    factors: Mat<f64>,
    rows: Perm<usize>,
    sign: f64,
}

impl Lu {
    /// Factors an n×n matrix; a singular one is noticed by [`Lu::sign`].
    pub fn new(a: &[f64], n: usize) -> Self {
        let mut factors = view(a, n).to_owned();
        let (mut forward, mut backward) = (vec![0; n], vec![0; n]);
        let (info, _) = stack(lu::lu_in_place_scratch::<usize, f64>(n, n, Par::Seq, default()), |stack| {
            lu::lu_in_place(factors.as_mut(), &mut forward, &mut backward, Par::Seq, stack, default())
        });
        let even = if info.transposition_count % 2 == 0 { 1.0 } else { -1.0 };
        let sign = factors.diagonal().column_vector().iter().fold(even, |sign, pivot| match *pivot {
            p if p == 0.0 || !p.is_finite() => 0.0,
            p => sign * p.signum(),
        });
        Self { n, factors, rows: Perm::new_checked(forward.into(), backward.into(), n), sign }
    }

    /// The sign of det A: 1, −1, or 0 when singular.
    pub fn sign(&self) -> f64 {
        self.sign
    }

    /// det A; 0 when singular.
    pub fn determinant(&self) -> f64 {
        // In logarithms, so that large matrices neither overflow nor vanish.
        let log: f64 = self.factors.diagonal().column_vector().iter().map(|p| p.abs().ln()).sum();
        if self.sign == 0.0 { 0.0 } else { self.sign * log.exp() }
    }

    /// `A⁻¹ B` for an n×n B.
    pub fn solve(&self, b: &[f64]) -> Vec<f64> {
        let (n, mut x) = (self.n, view(b, self.n).to_owned());
        let (factors, rows_of) = (self.factors.as_ref(), self.rows.as_ref());
        stack(solve::solve_in_place_scratch::<usize, f64>(n, n, Par::Seq), |stack| {
            solve::solve_in_place(factors, factors, rows_of, x.as_mut(), Par::Seq, stack)
        });
        rows(x.as_ref())
    }
}

/// The lower triangular L with `A = L Lᵀ` of a symmetric n×n matrix, of which only the lower triangle is read; `None` where a pivot
/// is not positive.
pub fn cholesky(a: &[f64], n: usize) -> Option<Vec<f64>> {
    let (mut l, par) = (view(a, n).to_owned(), Par::rayon(0));
    stack(llt::cholesky_in_place_scratch::<f64>(n, par, default()), |stack| {
        llt::cholesky_in_place(l.as_mut(), default(), par, stack, default())
    })
    .ok()?;
    for j in 0..n {
        l.col_mut(j).iter_mut().take(j).for_each(|x| *x = 0.0);
    }
    l.diagonal().column_vector().iter().all(|p| *p > 0.0 && p.is_finite()).then(|| rows(l.as_ref()))
}

/// The inverse of a lower triangular n×n matrix with no zero on its diagonal.
pub fn invert_lower(l: &[f64], n: usize) -> Vec<f64> {
    let mut x = Mat::zeros(n, n);
    invert_lower_triangular(x.as_mut(), view(l, n), Par::rayon(0));
    rows(x.as_ref())
}

/// The upper triangular U with `A⁻¹ = Uᵀ U` of a symmetric n×n matrix; `None` where it is not positive definite.
///
/// With J the reversal of the order, `J A J = L Lᵀ` and `U = J L⁻¹ J`: one factorisation, and A⁻¹ is never formed.
pub fn inverse_factor(mut a: Vec<f64>, n: usize) -> Option<Vec<f64>> {
    a.reverse();
    let mut u = invert_lower(&cholesky(&a, n)?, n);
    u.reverse();
    u.iter().all(|x| x.is_finite()).then_some(u)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn product(a: &[f64], b: &[f64], n: usize) -> Vec<f64> {
        crate::linalg::matmul::reference(a, false, b, false, (n, n, n))
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
            let lu = Lu::new(&a, n);
            assert!(distance(&product(&a, &lu.solve(&eye), n), &eye) < 1e-9, "A A⁻¹ = I, n = {n}");
            let mut swapped = a.clone();
            swapped[..n].iter_mut().for_each(|x| *x = -*x);
            assert_eq!(Lu::new(&swapped, n).sign(), -lu.sign());
            let det = Lu::new(&q, n).determinant();
            assert!((det.abs() - 1.0).abs() < 1e-12, "|det Q| = 1, n = {n}: {det}");
        }
        assert_eq!(Lu::new(&[1.0, 2.0, 2.0, 4.0], 2).sign(), 0.0);
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
            let l = cholesky(&a, n).unwrap();
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
            assert!(cholesky(&a, n).is_none() && inverse_factor(a, n).is_none(), "n = {n}");
        }
        assert!(cholesky(&[f64::NAN], 1).is_none() && cholesky(&[0.0], 1).is_none());
        assert!(cholesky(&[], 0).is_some_and(|l| l.is_empty()));
    }
}
