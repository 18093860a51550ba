//! Public checks: gradients against finite differences, fast against reference, device against device.
//!
//! They work on any function of [`Var`]s, so an operation from outside the crate gets them for free:
//!
//! ```
//! use spinquant::{check, ops};
//! check::gradients(&[ops::randn([3, 4], 0), ops::randn([5, 4], 1)], |v| {
//!     let [x, w]: [_; 2] = v.try_into().ok().unwrap();
//!     x.linear(w)
//! })?;
//! # Ok::<(), spinquant::Error>(())
//! ```

use crate::ops::{Case, randn};
use crate::tape::{Residuals, Tape, Var};
use crate::{DType, Device, Error, Result, Tensor};

/// Relative step of the central differences.
const STEP: f64 = 1e-5;
/// Largest relative disagreement of the two derivatives that passes.
pub const GRADIENT_TOLERANCE: f64 = 1e-6;

/// Checks the tape's gradient of `f` at `inputs` (`f64`): for random directions u, v, `⟨u, J v⟩` by central differences must equal
/// `⟨Jᵀ u, v⟩` from the tape, for each operand alone and for all together.
///
/// Operations that round are replaced by the surrogate they define ([`crate::tape::Op::surrogate`], the identity for fake
/// quantisation): their residual `q(x₀) − x₀` is frozen at `inputs` and `x + residual` is differentiated, so a whole quantised network can be checked exactly.
///
/// # Errors
/// [`Error::Numeric`] with both numbers where they disagree; errors of `f`.
pub fn gradients(inputs: &[Tensor], f: impl for<'t> Fn(Vec<Var<'t>>) -> Result<Var<'t>>) -> Result<()> {
    let tape = Tape::new();
    *tape.residuals.borrow_mut() = Residuals::Record(vec![]);
    let vars: Vec<_> = inputs.iter().map(|x| tape.variable(x.clone())).collect();
    let y = f(vars.clone())?;
    let u = randn(y.shape(), 0x5eed);
    let mut grads = tape.backward_from(y, u.clone())?;
    let grads = vars.iter().map(|v| grads.take(v)).collect::<Result<Vec<_>>>()?;
    let Residuals::Record(residuals) = tape.residuals.take() else { unreachable!("set above") };

    let value = |inputs: Vec<Tensor>| -> Result<f64> {
        let tape = Tape::new();
        *tape.residuals.borrow_mut() = Residuals::Replay(residuals.clone().into_iter());
        let y = f(inputs.into_iter().map(|x| tape.constant(x)).collect())?;
        dot(y.value(), &u)
    };
    let directions: Vec<_> = inputs.iter().enumerate().map(|(i, x)| randn(x.shape(), 0xd1 + i as u64)).collect();
    let norm: f64 = dot(&u, &u)?.sqrt();
    for operand in (0..inputs.len()).map(Some).chain([None]) {
        let moved = |i: usize| operand.is_none_or(|o| o == i);
        let shifted = |step: f64| -> Result<f64> {
            let at = |(i, x): (usize, &Tensor)| match moved(i) {
                true => Tensor::axpby(1.0, x.clone(), step, directions[i].clone()),
                false => Ok(x.clone()),
            };
            value(inputs.iter().enumerate().map(at).collect::<Result<_>>()?)
        };
        // Fourth-order differences: the error is in the rounding, not in the step.
        let numeric = (8.0 * (shifted(STEP)? - shifted(-STEP)?) - (shifted(2.0 * STEP)? - shifted(-2.0 * STEP)?)) / (12.0 * STEP);
        let mut tape_says = 0.0;
        let mut size = 1e-3 * norm;
        for i in (0..inputs.len()).filter(|&i| moved(i)) {
            tape_says += dot(&grads[i], &directions[i])?;
            size += dot(&grads[i], &grads[i])?.sqrt();
        }
        if !within((numeric - tape_says).abs(), GRADIENT_TOLERANCE * size.max(numeric.abs())) {
            let which = operand.map_or("all operands".into(), |i| format!("operand {i}"));
            return Err(Error::numeric("gradient check", format!("{which}: tape {tape_says:e}, differences {numeric:e}")));
        }
    }
    Ok(())
}

/// `error ≤ bound`; false for NaN.
fn within(error: f64, bound: f64) -> bool {
    error <= bound
}

fn dot(a: &Tensor, b: &Tensor) -> Result<f64> {
    Ok(a.to_f64_vec()?.iter().zip(b.to_f64_vec()?).map(|(a, b)| a * b).sum())
}

/// A function's value and its gradients for a fixed random output gradient, in one precision on one device.
#[derive(Clone, Debug)]
pub struct Evaluation {
    /// The result.
    pub value: Tensor,
    /// Gradient of `⟨u, value⟩` for each operand.
    pub gradients: Vec<Tensor>,
}

/// Evaluates a case with its operands rounded to `dtype` on `device`.
///
/// # Errors
/// Those of the operation and of its gradient; an operand that `dtype` cannot hold.
pub fn evaluate(case: &Case, dtype: DType, device: &Device) -> Result<Evaluation> {
    evaluate_from(case, &rounded(case, dtype)?, dtype, device)
}

/// The operands of a case rounded to `dtype`, as `f64`: what every precision is compared on.
fn rounded(case: &Case, dtype: DType) -> Result<Vec<Tensor>> {
    case.operands(DType::F64, &Device::Cpu)?.iter().map(|x| x.to_dtype(dtype)?.to_dtype(DType::F64)).collect()
}

fn evaluate_from(case: &Case, inputs: &[Tensor], dtype: DType, device: &Device) -> Result<Evaluation> {
    let tape = Tape::new();
    let vars = inputs.iter().map(|x| Ok(tape.variable(x.to_dtype(dtype)?.to_device(device)?))).collect::<Result<Vec<_>>>()?;
    let y = case.build(vars.clone())?;
    let value = y.value().to_device(&Device::Cpu)?;
    // Rounded to 16 bits once, so that every precision sees the same output gradient.
    let u =
        randn(y.shape(), 0x5eed).to_dtype(DType::BF16)?.to_dtype(DType::F64)?.to_dtype(y.value().dtype())?.to_device(device)?;
    let mut grads = tape.backward_from(y, u)?;
    let gradients = vars.iter().map(|v| grads.take(v)?.to_device(&Device::Cpu)).collect::<Result<_>>()?;
    Ok(Evaluation { value, gradients })
}

/// Runs a case in `dtype` on `device` and on the CPU in `f64`, on the same rounded operands, and compares.
///
/// Elsewhere than in `f64` on the CPU the error must be at most twice that of the CPU in the same precision (an equally imprecise
/// baseline), plus a few roundings of the largest value. Results that are rounded to a grid may differ by one step where the
/// baseline is within rounding of a tie, in at most one value of a thousand (one at least).
///
/// # Errors
/// Those of [`evaluate`]; [`Error::Numeric`] where the results differ by more, with the value and both results.
pub fn parity(case: &Case, dtype: DType, device: &Device) -> Result<()> {
    let inputs = rounded(case, dtype)?;
    let exact = evaluate_from(case, &inputs, DType::F64, &Device::Cpu)?;
    let ours = evaluate_from(case, &inputs, dtype, device)?;
    let baseline = if device.is_cpu() { None } else { Some(evaluate_from(case, &inputs, dtype, &Device::Cpu)?) };
    let named = |what: String| format!("parity of {case:?} in {dtype} on {device}: {what}");
    let outputs = |e: &Evaluation| [vec![e.value.clone()], e.gradients.clone()].concat();
    let base = baseline.as_ref().map(outputs);
    for (i, (exact, ours)) in outputs(&exact).iter().zip(outputs(&ours)).enumerate() {
        let what = if i == 0 { "value".to_string() } else { format!("gradient {}", i - 1) };
        if ours.shape() != exact.shape() {
            return Err(Error::shape(named(what), format!("{:?}", exact.shape()), ours.shape()));
        }
        let (exact, ours) = (exact.to_f64_vec()?, ours.to_f64_vec()?);
        let largest = exact.iter().fold(0f64, |m, x| m.max(x.abs()));
        let terms = if i == 0 { case.terms } else { case.gradient_terms };
        let terms = if baseline.is_some() { 8.0 * f64::from(f32::EPSILON) * terms } else { 0.0 };
        let slack = 8.0 * dtype.epsilon() * largest + terms + f64::MIN_POSITIVE;
        let base = base.as_ref().map(|b| b[i].to_f64_vec()).transpose()?;
        // NaN if there is one anywhere.
        let larger = |m: f64, e: f64| if e > m || e.is_nan() { e } else { m };
        let error = |x: &[f64]| x.iter().zip(&exact).map(|(a, b)| (a - b).abs()).fold(0f64, larger);
        if case.rounds && i == 0 {
            // Any difference beyond rounding is a step of the grid.
            let off = ours.iter().zip(&exact).filter(|(a, b)| !within((*a - *b).abs(), slack)).count();
            if off * 1000 > exact.len().max(1000) {
                return Err(Error::numeric(named(what), format!("{off} of {} values on another step of the grid", exact.len())));
            }
            continue;
        }
        let (e, bound) =
            (error(&ours), 2.0 * base.as_ref().map_or(0.0, |b| error(b)) + if base.is_some() { slack } else { 16.0 * slack });
        if !within(e, bound) {
            return Err(Error::numeric(named(what), format!("error {e:e} exceeds {bound:e} (largest value {largest:e})")));
        }
    }
    Ok(())
}
