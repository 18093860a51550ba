//! The weight and the bias of a linear in the bases of its layer's rotations and scales, on a tape. Rows of a weight depend on no others:
//! ranks may share them.

use crate::hadamard::Hadamard;
use crate::llama::rotate::LayerTransforms;
use crate::llama::{Basis, Linear};
use crate::ops::log_scale::{Along, Keeps};
use crate::ranks::Group;
use crate::{DType, Error, Result, Tensor, Var};

/// Which rows of a weight a process makes: one of equal parts, in the order of the ranks; all of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Share {
    part: usize,
    of: usize,
}

impl Share {
    pub const WHOLE: Self = Self { part: 0, of: 1 };

    /// That of a rank.
    pub fn of(ranks: &Group) -> Self {
        Self { part: ranks.rank(), of: ranks.world() }
    }

    /// This part, where so many units can be shared evenly; else all.
    fn of_units(self, units: usize) -> Self {
        if units.is_multiple_of(self.of) { self } else { Self::WHOLE }
    }

    /// The part of the first axis of what belongs to rows.
    pub fn rows<'t>(self, v: Var<'t>) -> Result<Var<'t>> {
        let count = v.value().shape().first().map_or(0, |n| n / self.of);
        if self == Self::WHOLE { Ok(v) } else { v.part(self.part * count, count) }
    }

    fn columns<'t>(self, v: Var<'t>) -> Result<Var<'t>> {
        let count = v.value().cols() / self.of;
        if self == Self::WHOLE { Ok(v) } else { v.part_of_columns(self.part * count, count) }
    }

    /// All rows of what has this part of them.
    pub fn gathered<'t>(self, rows: Var<'t>, ranks: &Group) -> Result<Var<'t>> {
        if self == Self::WHOLE { Ok(rows) } else { rows.gathered(ranks) }
    }
}

/// The rotations and scales of one layer.
pub(super) struct Rotation<'a, 't> {
    by: &'a LayerTransforms<'t>,
    r4: Option<Hadamard>,
    /// The rows of up are divided by its scales; otherwise its output is.
    up_scaled: bool,
    /// R1 for what reads the first and the second norm: its columns times the scales that the norm's output is divided by.
    entering: [Var<'t>; 2],
    /// The columns of R1 that make this process's rows of what writes the stream.
    leaving: Var<'t>,
    /// What turns the rows of v and the columns of o, a head at a time: R2, with its scales where there are some.
    values: [Var<'t>; 2],
    share: Share,
}

impl<'a, 't> Rotation<'a, 't> {
    /// `W R1 diag(eᵃ)` is `W (R1 diag(eᵃ))`: the scales of a norm are multiplied into R1 once, not into every weight that reads the norm,
    /// and their gradient comes from that of R1.
    ///
    /// `share` is this process's part of all weights that can be shared.
    pub fn new(by: &'a LayerTransforms<'t>, r4: Option<Hadamard>, up_scaled: bool, share: Share) -> Result<Self> {
        let enter = |a: &Option<Var<'t>>| match a {
            // Every layer keeps the same R1.
            Some(a) => by.r1.clone().log_scale_keeping(a.clone(), Along::Columns, false, Keeps::Input),
            None => Ok(by.r1.clone()),
        };
        let [first, second] = &by.scales.norms;
        let leaving = share.of_units(by.r1.value().cols()).columns(by.r1.clone())?;
        let values = [value_map(by, true)?, value_map(by, false)?];
        Ok(Self { by, r4, up_scaled, entering: [enter(first)?, enter(second)?], leaving, values, share })
    }

    /// The part of a linear's `out` rows that this process makes: of whole heads where heads are turned.
    pub fn share(&self, linear: Linear, out: usize) -> Share {
        match (linear, self.of_pairs(linear)) {
            (Linear::V, _) => self.share.of_units(out / self.d()),
            (_, Some(pairs)) => self.share.of_units(pairs.value().shape()[0]),
            _ => self.share.of_units(out),
        }
    }

    /// R1 for what reads a norm, 0 or 1: `[C, C]`, its columns times the scales of the norm.
    pub fn entering(&self, norm: usize) -> Var<'t> {
        self.entering[norm].clone()
    }
}

impl<'t> Rotation<'_, 't> {
    /// The rows of `Bᵀ W A` that are this process's ([`Rotation::share`]), R1's product first; in `f32` at least where that is not the last.
    pub fn weight(&self, linear: Linear, w: Var<'t>) -> Result<Var<'t>> {
        let row = linear.row();
        let share = self.share(linear, w.value().rows());
        let dtype = w.value().dtype();
        let twice = row.reads == Basis::Values || row.writes == Basis::Values || (row.reads == Basis::Inner && self.r4.is_some());
        let scaled = self.of_rows(linear).is_some() || self.of_columns(linear).is_some() || self.of_pairs(linear).is_some();
        let twice = twice || scaled;
        let between = if twice { wide(dtype) } else { dtype };
        let w = match row.reads {
            Basis::Stream => {
                share.rows(w)?.matmul_as(self.entering(row.norm.expect("what reads the stream reads a norm")), between)?
            }
            // Its rows are as many as R1's columns.
            _ => self.leaving.clone().transpose_matmul_as(w, between)?,
        };
        // Nothing else of this width is kept.
        let w = self.scaled(linear, w, Keeps::Rounded(dtype), share)?;
        match (row.reads, row.writes, &self.r4) {
            (_, Basis::Values, _) => self.values_out(w, share),
            (Basis::Values, ..) => self.values_in(w),
            (Basis::Inner, _, Some(r4)) => w.hadamard_by(r4),
            _ => Ok(w),
        }
    }

    /// Width of a head.
    fn d(&self) -> usize {
        self.by.r2.value().cols()
    }

    /// The rows of v's weight `[K·D, in]` into the basis of values.
    fn values_out(&self, w: Var<'t>, share: Share) -> Result<Var<'t>> {
        let (d, [out, inputs], [by, _]) = (self.d(), [w.value().rows(), w.value().cols()], &self.values);
        let by = if by.value().shape().len() == 2 { by.clone() } else { share.rows(by.clone())? };
        by.transpose_matmul(w.reshape([out / d, d, inputs])?)?.reshape([out, inputs])
    }

    /// The columns of o's weight `[out, H·D]` into the basis of values.
    fn values_in(&self, w: Var<'t>) -> Result<Var<'t>> {
        columns_by(w, &self.values[1])
    }

    /// Rows divided or turned and columns multiplied by the scales. Both are in bases that R1 on the other side does not touch.
    fn scaled(&self, linear: Linear, w: Var<'t>, keeps: Keeps, share: Share) -> Result<Var<'t>> {
        let w = match self.of_rows(linear) {
            Some(a) => w.log_scale_keeping(share.rows(a.clone())?, Along::Rows, true, keeps)?,
            None => w,
        };
        let w = self.turned(linear, w, share)?;
        match self.of_columns(linear) {
            Some(a) => w.log_scale_keeping(a.clone(), Along::Columns, false, keeps),
            None => Ok(w),
        }
    }

    /// Pairs of rows turned: those of q are divided by the scales, those of k multiplied.
    fn turned(&self, linear: Linear, w: Var<'t>, share: Share) -> Result<Var<'t>> {
        match self.of_pairs(linear) {
            Some(p) => w.rope_pairs(share.rows(p.clone())?, self.d(), linear == Linear::Q),
            None => Ok(w),
        }
    }

    /// What turns pairs of a linear's output.
    fn of_pairs(&self, linear: Linear) -> Option<&Var<'t>> {
        self.by.scales.rope_pairs.as_ref().filter(|_| matches!(linear, Linear::Q | Linear::K))
    }

    /// The scales that divide a linear's output, but for those of values.
    fn of_rows(&self, linear: Linear) -> Option<&Var<'t>> {
        match linear {
            Linear::Up => self.by.scales.up_down.as_ref().filter(|_| self.up_scaled),
            _ => None,
        }
    }

    /// The scales that multiply a linear's input, but for those of norms ([`entering`](Self::entering)) and of values.
    fn of_columns(&self, linear: Linear) -> Option<&Var<'t>> {
        match linear {
            Linear::Down => self.by.scales.up_down.as_ref(),
            _ => None,
        }
    }

    /// `Bᵀ b`, as the rows `bᵀ B`.
    pub fn bias(&self, linear: Linear, b: Var<'t>) -> Result<Var<'t>> {
        let b = match self.of_rows(linear) {
            Some(a) => b.log_scale(a.clone(), Along::Columns, true)?,
            None => b,
        };
        let b = match self.of_pairs(linear) {
            Some(_) => {
                let n = b.value().len();
                self.turned(linear, b.reshape([n, 1])?, Share::WHOLE)?.reshape([n])?
            }
            None => b,
        };
        let (dtype, out) = (b.value().dtype(), b.value().len());
        match linear.row().writes {
            Basis::Stream => {
                b.to_dtype(wide(dtype))?.reshape([1, out])?.matmul(self.by.r1.clone())?.reshape([out])?.to_dtype(dtype)
            }
            Basis::Values => {
                let (d, [by, _]) = (self.d(), &self.values);
                let rows = if by.value().shape().len() == 2 { vec![out / d, d] } else { vec![out / d, 1, d] };
                b.to_dtype(wide(dtype))?.reshape(rows)?.matmul(by.clone())?.reshape([out])?.to_dtype(dtype)
            }
            Basis::Own | Basis::Inner => Ok(b),
        }
    }
}

/// `diag(e⁻ᵃ) R2 diag(e⁻ᵇ) R2b`, which turns the rows of v's weight (transposed) and its bias where `inverse`, else `diag(eᵃ) R2 diag(eᵇ) R2b`, which turns
/// the columns of o's: a the scales of values, b those between R2 and R2b, as far as there are some. `[D, D]`, or `[K, D, D]` where heads
/// differ. The matrices of heads are small beside the weights, which are then multiplied once.
fn value_map<'t>(by: &LayerTransforms<'t>, inverse: bool) -> Result<Var<'t>> {
    let LayerTransforms { r2, r2b, scales, .. } = by;
    let Some(some) = scales.values.as_ref().or(scales.values_general.as_ref()) else { return Ok(r2.clone()) };
    let kinds = some.value().len() / r2.value().cols().max(1);
    let scaled = |r: &Var<'t>, a: &Option<Var<'t>>| match a {
        Some(a) => of_heads(r, kinds)?.log_scale_keeping(a.clone(), Along::Rows, inverse, Keeps::Input),
        None => of_heads(r, kinds),
    };
    let first = scaled(r2, &scales.values)?;
    match r2b {
        Some(r2b) => first.matmul(scaled(r2b, &scales.values_general)?),
        None => Ok(first),
    }
}

/// R `[D, D]` once for each of so many heads, `[K, D, D]`; what is there for every head already stays.
fn of_heads<'t>(r: &Var<'t>, kinds: usize) -> Result<Var<'t>> {
    let t = r.value();
    let &[rows, cols] = t.shape() else { return Ok(r.clone()) };
    if t.dtype() == DType::F64 && !r.requires_grad() {
        // For merging: a GPU has no kernel that gathers in f64.
        let all = Tensor::from_vec(t.to_f64_vec()?.repeat(kinds), [kinds, rows, cols])?;
        return Ok(r.tape().constant(all.to_device(&t.device())?));
    }
    r.clone().reshape([1, rows * cols])?.embedding(vec![0u32; kinds].into())?.reshape([kinds, rows, cols])
}

/// The columns of w `[out, H·D]`, a head at a time, by R `[D, D]`, or by that of their key and value head in `[K, D, D]`.
fn columns_by<'t>(w: Var<'t>, r: &Var<'t>) -> Result<Var<'t>> {
    let (d, [out, columns]) = (r.value().cols(), [w.value().rows(), w.value().cols()]);
    if r.value().shape().len() == 2 {
        return w.reshape([out * columns / d, d])?.matmul(r.clone())?.reshape([out, columns]);
    }
    // Query heads that share a matrix lie behind one another once heads come first.
    let (heads, kinds) = (columns / d, r.value().shape()[0]);
    if kinds == 0 || !heads.is_multiple_of(kinds) {
        return Err(Error::shape("R2", format!("[a divisor of {heads}, {d}, {d}]"), r.value().shape()));
    }
    let first = w.reshape([out, heads, d])?.swap_axes()?.reshape([kinds, heads / kinds * out, d])?;
    first.matmul(r.clone())?.reshape([heads, out, d])?.swap_axes()?.reshape([out, columns])
}

/// The type that 16-bit values are multiplied in when the product is not the last.
fn wide(dtype: DType) -> DType {
    if dtype.is_half() { DType::F32 } else { dtype }
}
