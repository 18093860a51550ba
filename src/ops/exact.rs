//! Comparisons of results with the `f64` reference: how far they may be from it.
//!
//! A result of a model's size is compared in some rows: the first, one in the middle, the last.

use crate::grid::{Grid, QuantSpec, reference_grid};
use crate::hadamard::Hadamard;
use crate::{DType, Error, Result, Tensor};

/// The rows that are compared, of so many.
pub fn some(rows: usize) -> Vec<usize> {
    let mut some = vec![0, (rows / 2) | 1, rows.saturating_sub(1)];
    some.retain(|&r| r < rows);
    some.dedup();
    some
}

/// Row r of a tensor of rows of n, in `f64`.
///
/// # Errors
/// If there is no such row.
pub fn row(x: &Tensor, r: usize, n: usize) -> Result<Vec<f64>> {
    if n == 0 || !x.len().is_multiple_of(n) {
        return Err(Error::shape("row", format!("of whole rows of {n}"), x.shape()));
    }
    x.clone().reshape([x.len() / n, n])?.slice(r, 1)?.to_f64_vec()
}

/// Calls `compare` for some rows of n of a result, with the same rows of the operands.
///
/// # Errors
/// Those of `compare`, and operands of another size.
pub fn rows(
    n: usize,
    operands: &[Tensor],
    result: &Tensor,
    compare: impl Fn(usize, &[f64], &[Vec<f64>]) -> Result<()>,
) -> Result<()> {
    if let Some(x) = operands.iter().find(|x| x.len() != result.len()) {
        return Err(Error::shape("rows compared", format!("of {} values", result.len()), x.shape()));
    }
    for r in some(result.len() / n.max(1)) {
        let operands = operands.iter().map(|x| row(x, r, n)).collect::<Result<Vec<_>>>()?;
        compare(r, &row(result, r, n)?, &operands)?;
    }
    Ok(())
}

/// Every result is close to what `want` makes of the same rows of n of the operands: a row for each name.
///
/// # Errors
/// [`Error::Numeric`] that names the first value that is not; another number of results, operands of another size.
pub fn every(
    names: &[&str],
    n: usize,
    operands: &[Tensor],
    results: &[Tensor],
    want: impl Fn(&[Vec<f64>]) -> Vec<Vec<f64>>,
) -> Result<()> {
    if names.len() != results.len() {
        return Err(Error::numeric("wrong answer", format!("{names:?}: {} results", results.len())));
    }
    for (i, (name, result)) in names.iter().zip(results).enumerate() {
        rows(n, operands, result, |_, got, x| close(name, got, &want(x)[i], result.dtype(), 1.0))?;
    }
    Ok(())
}

/// `H x` of one row by f64 butterflies: the definition takes n² steps, too long at n = 32768.
pub fn hadamard(x: &[f64], map: &Hadamard) -> Vec<f64> {
    let (k, size) = (map.k(), map.n() / map.blocks());
    let m = size / k;
    let mut y = vec![0.0; x.len()];
    for (x, y) in x.chunks(size).zip(y.chunks_mut(size)) {
        let mut t = x.to_vec();
        for part in t.chunks_mut(m) {
            let mut half = 1;
            while half < m {
                for pair in part.chunks_mut(2 * half) {
                    let (a, b) = pair.split_at_mut(half);
                    a.iter_mut().zip(b).for_each(|(a, b)| (*a, *b) = (*a + *b, *a - *b));
                }
                half *= 2;
            }
        }
        for (i, y) in y.chunks_mut(m).enumerate() {
            for (l, t) in t.chunks(m).enumerate() {
                let sign = map.signs().get(i * k + l).map_or(1.0, |&s| f64::from(s)) / (size as f64).sqrt();
                y.iter_mut().zip(t).for_each(|(y, t)| *y += sign * t);
            }
        }
    }
    y
}

/// Within one rounding of the stored type, plus a few of f32 (or a 64th of a 16-bit one) of the largest value; `factor` times that
/// for sums of products.
///
/// # Errors
/// [`Error::Numeric`] that names the first value beyond that, or says that there are too few or too many.
pub fn close(what: &str, got: &[f64], want: &[f64], dtype: DType, factor: f64) -> Result<()> {
    let largest = want.iter().fold(0f64, |m, x| m.max(x.abs()));
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        let bound = factor * (0.5001 * dtype.epsilon() * w.abs() + (dtype.epsilon() / 64.0).max(1e-5) * largest);
        if !((g - w).abs() <= bound) {
            return Err(Error::numeric("wrong answer", format!("{what}: value {i} is {g:e}, should be {w:e} ± {bound:e}")));
        }
    }
    same_length(what, got, want)
}

/// Within `tolerance` times the largest value.
///
/// # Errors
/// [`Error::Numeric`] that names the first value beyond that, or says that there are too few or too many.
pub fn close_to_largest(what: &str, got: &[f64], want: &[f64], tolerance: f64) -> Result<()> {
    let largest = want.iter().fold(0f64, |m, x| m.max(x.abs()));
    // The largest difference; NaN if any is.
    let worst = got.iter().zip(want).map(|(g, w)| (g - w).abs()).fold(0f64, |m, e| if e > m || e.is_nan() { e } else { m });
    if !(worst <= tolerance * largest) {
        return Err(Error::numeric("wrong answer", format!("{what}: off by {worst:e}, the largest value is {largest:e}")));
    }
    same_length(what, got, want)
}

fn same_length(what: &str, got: &[f64], want: &[f64]) -> Result<()> {
    if got.len() != want.len() || want.is_empty() {
        return Err(Error::numeric("wrong answer", format!("{what}: {} values, not {}", got.len(), want.len())));
    }
    Ok(())
}

/// `got` is x quantised to nearest: one value of a thousand (one at least) may be on a neighbouring step, where x is near a tie.
///
/// # Errors
/// [`Error::Numeric`] that names the first value beyond that, or says that there are too few or too many.
pub fn quantised(what: &str, got: &[f64], x: &[f64], spec: &QuantSpec, dtype: DType) -> Result<()> {
    let group = spec.group_size(x.len())?;
    for (got, x) in got.chunks(group).zip(x.chunks(group)) {
        on_grid(what, got, x, &reference_grid(spec, x), dtype)?;
    }
    same_length(what, got, x)
}

/// The same with the grid given.
///
/// # Errors
/// [`Error::Numeric`] that names the first value beyond that, or says that there are too few or too many.
pub fn on_grid(what: &str, got: &[f64], x: &[f64], grid: &Grid<f64>, dtype: DType) -> Result<()> {
    let mut off = 0;
    for (i, (g, x)) in got.iter().zip(x).enumerate() {
        let want = grid.nearest(*x);
        let error = (g - want).abs();
        let rounding = 0.5001 * dtype.epsilon() * g.abs().max(want.abs()) + 1e-4 * grid.scale;
        // Where codes are not all integers, neighbours are up to four apart.
        let step = if grid.floating { 4.0 * grid.scale } else { grid.scale };
        if !(error <= step + rounding) {
            return Err(Error::numeric("wrong answer", format!("{what}: value {i} is {g:e}, should be {want:e}")));
        }
        off += usize::from(error > rounding);
    }
    if off * 1000 > got.len().max(1000) {
        return Err(Error::numeric("wrong answer", format!("{what}: {off} of {} values on another step", got.len())));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn butterflies_are_the_definition() {
        for n in [1, 2, 64, 12, 344, 1376, 214] {
            let map = Hadamard::new(n).unwrap();
            let x = crate::ops::randn([n], 5).into_vec::<f64>().unwrap();
            let mut want = x.clone();
            map.reference(&mut want, false).unwrap();
            close("hadamard", &hadamard(&x, &map), &want, DType::F64, 1e-8).unwrap();
        }
    }

    #[test]
    fn wrong_answers_are_noticed() {
        let x = [1.0, -2.0, 3.0, 0.5];
        assert!(close("x", &[1.0, -2.0, 3.01, 0.5], &x, DType::F32, 1.0).is_err());
        assert!(close("x", &[1.0, -2.0, f64::NAN, 0.5], &x, DType::BF16, 1.0).is_err());
        assert!(close_to_largest("x", &[1.0, -2.0, f64::NAN, 0.5], &x, 1.0).is_err());
        let spec = QuantSpec::activation(4, false);
        let grid = reference_grid(&spec, &x);
        let y = x.map(|x| grid.nearest(x));
        quantised("x", &y, &x, &spec, DType::F64).unwrap();
        assert!(quantised("x", &y.map(|y| y + grid.scale), &x, &spec, DType::F64).is_err());
        assert!(quantised("x", &y.map(|y| y + 0.3 * grid.scale), &x, &spec, DType::F64).is_err());
    }
}
