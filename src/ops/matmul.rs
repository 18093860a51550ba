//! Matrix products `op(A) op(B)`, with transposes as flags and an optional leading batch axis.
//!
//! Backward (both flags off): `dA = dY Bᵀ`, `dB = Aᵀ dY`; an operand without a batch axis sums over the batch.
//! Operands may mix `f32` with a 16-bit type (a rotation in `f32` and a weight in bf16); the result then has the 16-bit type and
//! every gradient the type of its operand.

use crate::device::Device;
use crate::linalg::matmul::{linear_add, product};
use crate::ops::{At, Case, Place, Run, coded, exact, narrowest, normals};
use crate::tape::{Grads, Inputs, Op, Saved, Takes, Var};
use crate::{DType, Error, Result, Tensor};

/// `op(A) op(B)`.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Matmul {
    /// Read the last two axes of A transposed.
    pub ta: bool,
    /// Read the last two axes of B transposed.
    pub tb: bool,
    /// The type of the result; `None`: the 16-bit type among the operands, if any.
    pub dtype: Option<DType>,
}

impl Op for Matmul {
    fn name(&self) -> &'static str {
        "matmul"
    }

    fn takes(&self) -> Takes {
        Takes::Anything
    }
    fn cpu(&self, inputs: Inputs, save: &mut Saved) -> Result<Tensor> {
        let [a, b] = inputs.take()?;
        let dtype = match self.dtype {
            Some(dtype) => dtype,
            None => narrowest(&[a.clone(), b.clone()])?,
        };
        let mut shape = a.shape().to_vec();
        if !self.ta
            && self.tb
            && dtype == a.dtype()
            && let Some(y) = coded::linear(&a, &b, None)
        {
            self.keep(&a, &b, save)?;
            return y;
        }
        let flat = self.flatten(&a, &b)?;
        let y = product(&flat, self.ta, &b, self.tb, false, dtype)?;
        if flat.shape() != a.shape() {
            *shape.last_mut().expect("flattened from more than two axes") = y.cols();
        } else {
            shape = y.shape().to_vec();
        }
        self.keep(&a, &b, save)?;
        y.reshape(shape)
    }

    fn backward(&self, saved: Saved, dy: Tensor, want: &[bool]) -> Result<Grads> {
        let [a, b] = saved.take()?;
        let (ta, tb) = (self.ta, self.tb);
        // What was not saved still knows its rank and type.
        let (batched_a, batched_b) = (a.shape().len() > 2 && (ta || b.shape().len() > 2), b.shape().len() > 2);
        let flat = !batched_a && a.shape().len() > 2;
        let shape_y = dy.shape().to_vec();
        let dy = if flat { dy.clone().reshape([dy.rows(), dy.cols()])? } else { dy };
        let da = if want[0] {
            let reduce = !batched_a && batched_b;
            let g = match ta {
                false => product(&dy, false, &b, !tb, reduce, a.dtype())?,
                true => product(&b, tb, &dy, true, reduce, a.dtype())?,
            };
            let cols = g.cols();
            Some(if flat {
                // Only the last axis differs.
                let mut shape = shape_y;
                *shape.last_mut().expect("flattened from more than two axes") = cols;
                g.reshape(shape)?
            } else {
                g
            })
        } else {
            None
        };
        let db = if want[1] {
            let a = if flat { a.clone().reshape([a.rows(), a.cols()])? } else { a };
            let reduce = batched_a && !batched_b;
            Some(match tb {
                false => product(&a, !ta, &dy, false, reduce, b.dtype())?,
                true => product(&dy, true, &a, ta, reduce, b.dtype())?,
            })
        } else {
            None
        };
        Ok(vec![da, db])
    }
}

/// `c + x Wᵀ`: a linear layer and the sum it goes into, rounded once.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct LinearAdd;

impl LinearAdd {
    const PRODUCT: Matmul = Matmul { ta: false, tb: true, dtype: None };
}

impl Op for LinearAdd {
    fn name(&self) -> &'static str {
        "linear_add"
    }
    fn takes(&self) -> Takes {
        Takes::Anything
    }
    fn cpu(&self, inputs: Inputs, save: &mut Saved) -> Result<Tensor> {
        let [c, x, w] = inputs.take()?;
        self.save_only(&[c.clone(), x.clone(), w.clone()], save).unwrap_or(Ok(()))?;
        if c.shape().len() != 2 || w.shape().len() != 2 || c.shape() != [x.rows(), w.rows()] {
            return Err(Error::shape("linear_add", format!("[{}, {}]", x.rows(), w.rows()), c.shape()));
        }
        match coded::linear(&x, &w, Some(&c)) {
            Some(y) => y,
            None => linear_add(c, &x, &w),
        }
    }
    fn save_only(&self, inputs: &[Tensor], save: &mut Saved) -> Option<Result<()>> {
        let [_, x, w] = inputs else { return None };
        let keep = |wanted: bool, t: &Tensor| if wanted { Ok(t.clone()) } else { placeholder(t) };
        Some((|| {
            let (x, w) = (keep(save.wants(2), x)?, keep(save.wants(1), w)?);
            save.push(x);
            save.push(w);
            Ok(())
        })())
    }
    fn backward(&self, saved: Saved, dy: Tensor, want: &[bool]) -> Result<Grads> {
        let [dx, dw]: [_; 2] = match Self::PRODUCT.backward(saved, dy.clone(), &want[1..])?.try_into() {
            Ok(grads) => grads,
            Err(_) => return Err(Error::Tape("linear_add: expected two gradients".into())),
        };
        Ok(vec![want[0].then_some(dy), dx, dw])
    }
}

/// A tensor of the same rank, inner axes and type that holds no values: what is left of an operand nobody needs.
fn placeholder(t: &Tensor) -> Result<Tensor> {
    let mut shape = t.shape().to_vec();
    if let Some(first) = shape.first_mut() {
        *first = 0;
    }
    Tensor::zeros(shape, t.dtype(), &Device::Cpu)
}

impl Matmul {
    /// Each operand is needed for the other's gradient.
    fn keep(&self, a: &Tensor, b: &Tensor, save: &mut Saved) -> Result<()> {
        let (first, second) = (save.wants(1), save.wants(0));
        save.push(if first { a.clone() } else { placeholder(a)? });
        save.push(if second { b.clone() } else { placeholder(b)? });
        Ok(())
    }

    /// More than two axes of A times a matrix is one product with their rows stacked.
    fn flatten(&self, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        if a.shape().len() > 2 && b.shape().len() == 2 && !self.ta {
            return a.clone().reshape([a.rows(), a.cols()]);
        }
        Ok(a.clone())
    }
}

impl<'t> Var<'t> {
    /// `self · other`: [.., m, k] × [k, n], or with a batch axis on both.
    ///
    /// # Errors
    /// Those of [`Tape::record`](crate::Tape::record); shapes that do not fit; operands of different types or devices.
    pub fn matmul(self, other: Self) -> Result<Self> {
        self.tape().record(Matmul { ta: false, tb: false, dtype: None }, vec![self, other])
    }
    /// [`Var::matmul`] with a result of another type than the operands': the sums are not rounded to 16 bits.
    ///
    /// # Errors
    /// Those of [`Tape::record`](crate::Tape::record); shapes that do not fit; operands of different types or devices.
    pub fn matmul_as(self, other: Self, dtype: DType) -> Result<Self> {
        self.tape().record(Matmul { ta: false, tb: false, dtype: Some(dtype) }, vec![self, other])
    }
    /// The same of [`Var::transpose_matmul`].
    ///
    /// # Errors
    /// Those of [`Tape::record`](crate::Tape::record); shapes that do not fit; operands of different types or devices.
    pub fn transpose_matmul_as(self, other: Self, dtype: DType) -> Result<Self> {
        self.tape().record(Matmul { ta: true, tb: false, dtype: Some(dtype) }, vec![self, other])
    }
    /// A linear layer: `self · Wᵀ` with `W: [out, in]`.
    ///
    /// # Errors
    /// Those of [`Tape::record`](crate::Tape::record); shapes that do not fit; operands of different types or devices.
    pub fn linear(self, weight: Self) -> Result<Self> {
        self.tape().record(Matmul { ta: false, tb: true, dtype: None }, vec![self, weight])
    }
    /// `self + x Wᵀ` with self [tokens, out], x [tokens, in], W [out, in].
    ///
    /// # Errors
    /// Those of [`Tape::record`](crate::Tape::record); shapes that do not fit; operands of different types or devices.
    pub fn add_linear(self, x: Self, weight: Self) -> Result<Self> {
        self.tape().record(LinearAdd, vec![self, x, weight])
    }
    /// The same as the last operation of a checkpointed function, where it is not computed a second time.
    ///
    /// # Errors
    /// Those of [`Tape::record`](crate::Tape::record); shapes that do not fit; operands of different types or devices.
    pub fn add_linear_last(self, x: Self, weight: Self) -> Result<Self> {
        let shape = self.shape().to_vec();
        self.tape().record_last(LinearAdd, vec![self, x, weight], &shape)
    }
    /// `selfᵀ · other`: [k, m] and [k, n] (or [b, k, n]: each batch entry is multiplied by the same matrix).
    ///
    /// # Errors
    /// Those of [`Tape::record`](crate::Tape::record); shapes that do not fit; operands of different types or devices.
    pub fn transpose_matmul(self, other: Self) -> Result<Self> {
        self.tape().record(Matmul { ta: true, tb: false, dtype: None }, vec![self, other])
    }
}

/// Worked cases.
pub(crate) fn cases() -> Vec<Case> {
    let case = |name: &str, a: &[usize], ta, b: &[usize], tb| {
        Case::new("matmul", name, normals(&[(a, 11), (b, 12)]), move |v| v[0].tape().record(Matmul { ta, tb, dtype: None }, v))
    };
    let mut all = vec![
        case("one row", &[1, 5], false, &[5, 3], false),
        case("odd", &[3, 7], false, &[7, 5], false),
        case("linear", &[5, 7], false, &[3, 7], true),
        case("left transposed", &[7, 3], true, &[7, 5], false),
        case("both transposed", &[7, 3], true, &[5, 7], true),
        case("stacked rows", &[2, 3, 7], false, &[5, 7], true),
        case("batch", &[2, 3, 7], false, &[2, 7, 5], false),
        case("batch, shared left", &[7, 3], true, &[4, 7, 5], false),
        case("batch, shared right", &[4, 7, 3], true, &[7, 5], false),
        Case::new("matmul", "linear added", normals(&[(&[5, 3], 13), (&[5, 7], 11), (&[3, 7], 12)]), |v| {
            let [c, x, w]: [Var; 3] = v.try_into().map_err(|_| Error::Tape("three operands".into()))?;
            c.add_linear(x, w)
        }),
        case("square 256", &[256, 256], false, &[256, 256], false).large(),
        case("linear 1024x384x1376", &[1024, 384], false, &[1376, 384], true).large(),
    ];
    all.extend(Case::table(timed, SIZES));
    all
}

const SIZES: &[At] = &[
    (Place::Cpu, 1024, 1024, &[DType::F32]),
    (Place::Gpu, 8192, 8192, &[DType::BF16]),
    (Place::Gpu, 4096, 16384, &[DType::BF16]),
    (Place::Gpu, 11008, 16384, &[DType::BF16]),
    (Place::Gpu, 4096, 4096, &[DType::F32]),
];

fn timed(n: usize, rows: usize) -> Case {
    let graph = Run::graph(|v| {
        let [x, w]: [Var; 2] = v.try_into().map_err(|_| Error::Tape("two operands".into()))?;
        x.linear(w)
    });
    let what = ("matmul", "gemm", "[rows, n] times [n, n]");
    Case::timed(what, (n, rows), vec![vec![rows, n], vec![n, n]], graph, move |x, y| {
        let columns = exact::some(n);
        let weights = columns.iter().map(|&c| exact::row(&x[1], c, n)).collect::<Result<Vec<_>>>()?;
        // The size of a sum of n products keeps a sum that cancels from being held to more than its terms allow.
        let size = (n as f64).sqrt();
        exact::rows(n, &x[..1], &y[0], |_, got, x| {
            for (&c, w) in columns.iter().zip(&weights) {
                let want: f64 = x[0].iter().zip(w).map(|(a, b)| a * b).sum();
                exact::close("gemm", &[got[c], size], &[want, size], y[0].dtype(), 2.0)?;
            }
            Ok(())
        })
    })
    .computes(2.0 * rows as f64 * (n as f64).powi(2))
}
