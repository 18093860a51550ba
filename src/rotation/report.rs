//! How orthogonal rotations are, and making them so.

use std::fmt;

use super::Rotations;
use crate::linalg::factor::{Lu, transpose};
use crate::linalg::gram_residual;
use crate::manifold::{Manifold, Orthogonal};
use crate::{DType, Device, Error, Result, Tensor};

/// max|RᵀR − I| up to which rotations are taken for orthogonal ones with rounding errors.
pub const TOLERANCE: f64 = 1e-4;
/// Below this, in `f64`, a matrix is left as it is.
const EXACT: f64 = 1e-13;

/// What [`Rotations::report`] says of one matrix.
#[derive(Clone, Debug, PartialEq)]
pub struct MatrixReport {
    /// `R1`, `R2[layer]` or `R2[layer, head]`, and R2b likewise.
    pub name: String,
    /// Rows, and columns.
    pub size: usize,
    /// max|RᵀR − I|
    pub columns_error: f64,
    /// max|RRᵀ − I|
    pub rows_error: f64,
    /// 1 for a rotation, −1 for a reflection.
    pub determinant: f64,
}

impl fmt::Display for MatrixReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, size, columns_error, rows_error, determinant } = self;
        let errors = format!("max|RᵀR−I| {columns_error:.2e}  max|RRᵀ−I| {rows_error:.2e}");
        write!(f, "{name:<8} {size}x{size}  {errors}  det {determinant:+.6}")
    }
}

impl Rotations {
    /// Size, orthogonality and determinant of R1 and every R2 and R2b, in `f64`.
    ///
    /// # Errors
    /// Matrices that are not square, or integers.
    pub fn report(&self) -> Result<Vec<MatrixReport>> {
        self.squares()?;
        let mut matrices = vec![("R1".to_string(), self.r1.clone())];
        let params = self.as_params()?;
        let others = params[1..].iter().flat_map(|t| (0..t.shape()[0]).map(|i| t.index(i)));
        for (name, t) in self.names().into_iter().zip(others) {
            matrices.push((name, t?));
        }
        let of = |(name, t): (String, Tensor)| {
            let n = t.cols();
            let values = t.to_device(&Device::Cpu)?.to_f64_vec()?;
            let error = |values: Vec<f64>| Ok::<_, Error>(gram_residual(&Tensor::from_vec(values, [1, n, n])?)?.1[0]);
            Ok(MatrixReport {
                name,
                size: n,
                rows_error: error(transpose(&values, n))?,
                columns_error: error(values.clone())?,
                determinant: Lu::new(&values, n).determinant(),
            })
        };
        matrices.into_iter().map(of).collect()
    }

    /// The nearest orthogonal matrices, in `f64`; matrices that are orthogonal already are kept to the bit.
    ///
    /// # Errors
    /// [`Error::Numeric`] naming the first matrix with max|RᵀR − I| above `tolerance`, and by how much.
    pub fn projected(&self, tolerance: f64) -> Result<Self> {
        self.squares()?;
        self.check(self.hidden(), self.head_dim(), self.layers(), tolerance)?;
        let (first, others) = self.orthogonality_errors()?;
        let project = |t: &Tensor, error: f64| {
            let t = t.to_device(&Device::Cpu)?.to_dtype(DType::F64)?;
            let n = t.cols();
            if error <= EXACT { t.reshape([1, n, n]) } else { Orthogonal.project_point(&t.reshape([1, n, n])?) }
        };
        let params = self.as_params()?;
        let r1 = project(&self.r1, first)?;
        let mut projected = vec![r1];
        let mut errors = others.into_iter();
        for t in &params[1..] {
            let mut all = vec![];
            for i in 0..t.shape()[0] {
                let error = errors.next().unwrap_or(f64::NAN);
                all.extend(project(&t.index(i)?, error)?.into_vec::<f64>()?);
            }
            projected.push(Tensor::from_vec(all, t.shape())?);
        }
        self.with_params(&projected)
    }
}
