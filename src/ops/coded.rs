//! Fake quantisation that keeps codes in the place of values, and linears that multiply codes.
//!
//! `x.coded(spec)` is [`Var::fake_quant`] with a result of which a byte a value is kept, its codes ([`Codes`]). A linear whose input and
//! weight are both such is computed on integers ([`integer_linear`]); every other operation is given the values. What it differs by from
//! the same network on values is the rounding of products and sums: in `f64` less than 1e-12 of the largest value.
//!
//! Backward is that of the operations on values, straight through the rounding. Gradients of a linear read the values of the codes, made
//! when they are needed: `dx = dy Ŵ`, `dŴ = dyᵀ x̂`.

use std::any::Any;

use super::codes::Codes;
use super::integer_linear::integer_linear;
use crate::device::cuda::CudaDevice;
use crate::grid::{Clip, QuantSpec};
use crate::hadamard::Hadamard;
use crate::ops::clipped_fake_quant::{ClippedFakeQuant, quantize_clipped};
use crate::ops::integer_linear::on_grid;
use crate::ops::{Case, hadamard, normals, randn};
use crate::ranks::Group;
use crate::tape::{Grads, Inputs, Op, Saved, Takes, Var, operands};
use crate::tensor::Coded;
use crate::{DType, Device, Error, Result, Tensor};

/// Codes in the place of values of a type.
#[derive(Clone, Debug)]
struct Kept {
    codes: Codes,
    dtype: DType,
}

impl Coded for Kept {
    fn dtype(&self) -> DType {
        self.dtype
    }
    fn device(&self) -> Device {
        self.codes.device()
    }
    fn decode(&self) -> Result<Tensor> {
        self.codes.values(self.dtype)
    }
    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// A tensor of this type and shape of which codes are kept.
fn kept(codes: Codes, shape: &[usize], dtype: DType) -> Tensor {
    Tensor::of_codes(Kept { codes, dtype }, shape)
}

/// The type of the codes' scales beside values of a type.
fn wide(dtype: DType) -> DType {
    if dtype == DType::F64 { DType::F64 } else { DType::F32 }
}

/// `x wᵀ`, plus c, of operands of which codes are kept; `None` where one is of values.
pub(crate) fn linear(x: &Tensor, w: &Tensor, c: Option<&Tensor>) -> Option<Result<Tensor>> {
    let (of_x, of_w) = (x.codes::<Kept>()?, w.codes::<Kept>()?);
    let fits = |t: &Tensor, kept: &Kept| t.shape().len() > 1 && [t.rows(), t.cols()] == [kept.codes.rows(), kept.codes.cols()];
    if of_x.dtype != of_w.dtype || !fits(x, of_x) || !fits(w, of_w) || c.is_some_and(|c| c.dtype() != of_x.dtype) {
        return None;
    }
    let mut shape = x.shape().to_vec();
    shape.iter_mut().last().into_iter().for_each(|n| *n = w.rows());
    let y = integer_linear(&of_x.codes, &of_w.codes, None, c.cloned(), of_x.dtype);
    Some(y.and_then(|y| y.reshape(shape)))
}

/// The rows of all ranks, as many from each, of a matrix of which codes are kept, as codes; `None` where it is of values.
pub(crate) fn gathered(x: &Tensor, ranks: &Group, what: &str) -> Option<Result<Tensor>> {
    let of = x.codes::<Kept>()?;
    let shape = [ranks.world() * x.rows(), x.cols()];
    Some(of.codes.gathered(ranks, what).map(|codes| kept(codes, &shape, of.dtype)))
}

/// The operation: a Hadamard map where there is one, then fake quantisation.
#[derive(Clone, Debug)]
pub(crate) struct CodedFakeQuant {
    pub spec: QuantSpec,
    pub map: Option<Hadamard>,
}

impl CodedFakeQuant {
    fn run(&self, inputs: Inputs) -> Result<Tensor> {
        let [x] = inputs.take()?;
        let (shape, dtype) = (x.shape().to_vec(), x.dtype());
        let codes = match &self.map {
            Some(map) => Codes::transformed(&x, map, &self.spec)?,
            None => Codes::quantize(&x, &self.spec)?,
        };
        Ok(kept(codes, &shape, dtype))
    }
}

impl Op for CodedFakeQuant {
    fn name(&self) -> &'static str {
        "coded_fake_quant"
    }
    fn takes(&self) -> Takes {
        Takes::AnyType
    }
    fn check(&self, inputs: &[Tensor]) -> Result<()> {
        let [x] = operands(inputs)?;
        if let Some(map) = self.map.as_ref().filter(|map| map.n() != x.cols()) {
            return Err(Error::shape(self.name(), format!("[.., {}]", map.n()), x.shape()));
        }
        if self.map.is_some() && self.spec.clip == Clip::Search {
            return Err(Error::argument(self.name(), "expected a clip ratio behind a Hadamard map, got a search"));
        }
        self.spec.group_size(x.cols()).map(|_| ())
    }
    fn cpu(&self, inputs: Inputs, _: &mut Saved) -> Result<Tensor> {
        self.run(inputs)
    }
    fn gpu(&self, _: &CudaDevice, inputs: Inputs, _: &mut Saved) -> Result<Tensor> {
        self.run(inputs)
    }
    fn backward(&self, _: Saved, dy: Tensor, _: &[bool]) -> Result<Grads> {
        Ok(vec![Some(match &self.map {
            Some(map) => hadamard::transform(dy, map, true)?,
            None => dy,
        })])
    }
    fn surrogate(&self, inputs: &[Tensor]) -> Option<Result<Tensor>> {
        let x = inputs.first()?.clone();
        Some(match &self.map {
            Some(map) => hadamard::transform(x, map, false),
            None => Ok(x),
        })
    }
}

/// [`ClippedFakeQuant`] with codes kept in the place of values.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CodedClipped(pub ClippedFakeQuant);

impl CodedClipped {
    fn run(&self, inputs: Inputs, save: &mut Saved) -> Result<Tensor> {
        let [x, a] = inputs.take()?;
        self.0.keep(save, &x, &a);
        let (shape, dtype, device) = (x.shape().to_vec(), x.dtype(), x.device());
        let codes = Codes::new(&quantize_clipped(&x, &self.0.spec, &a)?, &self.0.spec)?.to_device(&device)?;
        Ok(kept(codes, &shape, dtype))
    }
}

impl Op for CodedClipped {
    fn name(&self) -> &'static str {
        "coded_clipped_fake_quant"
    }
    fn takes(&self) -> Takes {
        Takes::AnyType
    }
    fn check(&self, inputs: &[Tensor]) -> Result<()> {
        self.0.check(inputs)
    }
    fn cpu(&self, inputs: Inputs, save: &mut Saved) -> Result<Tensor> {
        self.run(inputs, save)
    }
    fn gpu(&self, _: &CudaDevice, inputs: Inputs, save: &mut Saved) -> Result<Tensor> {
        self.run(inputs, save)
    }
    fn backward(&self, saved: Saved, dy: Tensor, want: &[bool]) -> Result<Grads> {
        let dtype = dy.dtype();
        let mut widened = Saved::new(want.to_vec());
        for t in saved.into_vec() {
            widened.push(t.to_dtype(wide(t.dtype()))?);
        }
        let grads = self.0.backward(widened, dy.to_dtype(wide(dtype))?, want)?;
        let [dx, da] = <[_; 2]>::try_from(grads).map_err(|_| Error::Tape("clipped: expected two gradients".into()))?;
        Ok(vec![dx.map(|dx| dx.to_dtype(dtype)).transpose()?, da])
    }
    fn gpu_backward(&self, device: &CudaDevice, saved: Saved, dy: Tensor, want: &[bool]) -> Result<Grads> {
        self.0.gpu_backward(device, saved, dy, want)
    }
    fn surrogate_near(&self, inputs: &[Tensor], base: &[Tensor]) -> Option<Result<Tensor>> {
        self.0.surrogate_near(inputs, base)
    }
}

impl Var<'_> {
    /// [`Var::fake_quant`] with codes kept in the place of values: a linear of two such is computed on integers. 16 bits returns `self`.
    ///
    /// # Errors
    /// Those of [`Var::fake_quant`]; a grid without equal steps.
    pub fn coded(self, spec: &QuantSpec) -> Result<Self> {
        if !spec.is_active() {
            return Ok(self);
        }
        self.tape().record(CodedFakeQuant { spec: *spec, map: None }, vec![self])
    }

    /// [`Var::hadamard_fake_quant_by`] with codes kept in the place of values; 16 bits transforms alone.
    ///
    /// # Errors
    /// Those of [`Var::hadamard_fake_quant_by`]; a grid without equal steps.
    pub fn hadamard_coded_by(self, map: &Hadamard, spec: &QuantSpec) -> Result<Self> {
        if !spec.is_active() {
            return self.hadamard_by(map);
        }
        self.tape().record(CodedFakeQuant { spec: *spec, map: Some(map.clone()) }, vec![self])
    }

    /// [`Var::clipped_fake_quant`] with codes kept in the place of values; 16 bits returns `self`.
    ///
    /// # Errors
    /// Those of [`Var::clipped_fake_quant`].
    pub fn clipped_coded(self, spec: &QuantSpec, a: Self, blocked: bool) -> Result<Self> {
        let op = CodedClipped(ClippedFakeQuant { spec: *spec, blocked });
        if spec.is_active() { self.tape().record(op, vec![self, a]) } else { Ok(self) }
    }
}

/// Worked cases: linears of codes, and codes alone.
pub(crate) fn cases() -> Vec<Case> {
    let linear = |name: &str, [m, n, k]: [usize; 3], spec: QuantSpec, w_spec: QuantSpec, added: bool| {
        let operands = move || {
            let mut all = vec![on_grid(m, k, &spec, 1), on_grid(n, k, &w_spec, 2)];
            all.extend(added.then(|| randn([m, n], 3)));
            all
        };
        Case::new("coded", format!("{m}x{n}x{k} {name}"), operands, move |v| {
            let mut v = v.into_iter();
            let (Some(x), Some(w)) = (v.next(), v.next()) else { return Err(Error::Tape("two operands at least".into())) };
            let (x, w) = (x.coded(&spec)?, w.coded(&w_spec)?);
            match v.next() {
                Some(c) => c.add_linear(x, w),
                None => x.linear(w),
            }
        })
    };
    let alone = |name: &str, [rows, cols]: [usize; 2], spec: QuantSpec| {
        // Values of a 16-bit type, so that every precision quantises the same numbers; not around 0, as a range from −x to x has its zero point
        // half way between two codes.
        let operands = move || {
            let values = randn([rows, cols], 7).into_vec::<f64>().expect("f64");
            let values = values.into_iter().map(|x| half::bf16::from_f64(x + 1.0).to_f64()).collect();
            vec![Tensor::from_vec::<f64>(values, [rows, cols]).expect("rows x cols")]
        };
        Case::new("coded", format!("{rows}x{cols} {name}"), operands, move |mut v| v.remove(0).coded(&spec)).rounds()
    };
    let turned = |name: &str, [rows, n]: [usize; 2], spec: QuantSpec| {
        let operands = normals(&[(&[rows, n], 8)]);
        Case::new("coded", format!("{rows}x{n} turned, {name}"), operands, move |mut v| {
            v.remove(0).hadamard_coded_by(&Hadamard::new(n)?, &spec)
        })
        .rounds()
    };
    let (act, weight) = (QuantSpec::activation, QuantSpec::weight);
    let search = |bits, symmetric| weight(bits, symmetric).clipped(Clip::Search);
    let clipped = Case::new("coded", "clipped, a kind a row", normals(&[(&[6, 40], 9)]), move |mut v| {
        let x = v.remove(0);
        let wide = wide(x.value().dtype());
        let a = Tensor::from_vec(vec![-0.25f64; 12], [6, 2])?.to_dtype(wide)?.to_device(&x.value().device())?;
        let a = x.tape().constant(a);
        x.clipped_coded(&weight(4, true), a, true)
    });
    vec![
        linear("4 bits", [5, 8, 16], act(4, false), weight(4, true), false),
        linear("8 bits, added", [17, 24, 48], act(8, false), weight(8, true), true),
        linear("odd", [3, 7, 37], act(4, false), weight(4, true), true),
        linear("groups", [3, 8, 96], act(4, false).grouped(32), weight(4, true), false),
        linear("4 bits, added", [256, 384, 1376], act(4, false), weight(4, true), true).large(),
        linear("8 bits", [300, 520, 1040], act(8, true), weight(4, true), false).large(),
        alone("asymmetric", [5, 24], act(4, false)),
        alone("symmetric, odd", [3, 37], act(8, true)),
        alone("grouped", [5, 24], act(4, false).grouped(8)),
        alone("searched", [4, 40], search(4, true)),
        alone("searched, asymmetric, in groups", [4, 40], QuantSpec { group: Some(8), ..search(3, false) }),
        alone("searched", [384, 1376], search(4, true)).large(),
        clipped.rounds(),
        turned("asymmetric", [3, 28], act(4, false)),
        turned("symmetric", [2, 64], act(8, true)),
        turned("asymmetric", [11, 1376], act(4, false)).large(),
        turned("asymmetric", [5, 11008], act(4, false)).large(),
    ]
}
