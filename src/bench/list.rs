//! Every case that is timed: those of the operations, and work that is no operation of the tape.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use rayon::prelude::*;

use crate::ops::{At, Call, Case, Place, Run, exact};
use crate::{DType, Device, Element, Error, Result, Tensor, calibrate, ops, optim};

/// Every timed case, in the order of the table. The slow ones come last.
pub fn cases() -> Vec<Case> {
    let timed = |c: &Case| c.timing.is_some();
    let mut all = Case::table(copy, COPIES);
    let order = |kernel: &str| ORDER.iter().position(|k| *k == kernel).unwrap_or(ORDER.len());
    let mut of_ops: Vec<Case> = ops::cases().into_iter().filter(timed).collect();
    // Stable: sizes stay in the order of their table.
    of_ops.sort_by_key(|c| c.timing.as_ref().map(|t| order(t.kernel)));
    all.extend(of_ops);
    all.extend(optim::cases());
    all.extend(calibrate::cases());
    all
}

/// Operations whose check or whose call is quick; the others follow as `ops::cases` has them.
const ORDER: &[&str] = &[
    "hadamard",
    "fake-quant",
    "hadamard-fake-quant",
    "hadamard-blocks-fake-quant",
    "mxfp4",
    "nvfp4",
    "mxfp4-encode",
    "nvfp4-encode",
    "hadamard-mxfp4-encode",
    "hadamard-nvfp4-encode",
    "quantize-codes",
    "rms-norm",
    "rms-norm-backward",
    "scaled-rms-norm",
    "scaled-rms-norm-backward",
    "rope",
    "rope-backward",
    "swiglu",
    "swiglu-backward",
    "scaled-swiglu",
    "scaled-swiglu-backward",
    "add",
    "add-bias",
    "embedding",
    "cross-entropy",
    "kl-divergence",
    "agreement",
    "log-scale",
    "rope-pairs",
    "swap-axes",
    "clipped-fake-quant",
    "whip",
    "kurtosis",
    "clip-search",
    "gemm",
    "integer-linear",
];

const COPIES: &[At] = &[
    (Place::Cpu, 4096, 4096, &[DType::F32]),
    (Place::Cpu, 11008, 1524, &[DType::F32]),
    (Place::Gpu, 4096, 1 << 16, &[DType::BF16, DType::F32]),
];

/// Copying rows of n: what every other kernel is compared with.
pub(super) fn copy(n: usize, rows: usize) -> Case {
    let run = Run::Call(Arc::new(|x: &[Tensor]| match (x[0].device(), x[0].dtype()) {
        (Device::Cpu, DType::F64) => copy_on_cpu::<f64>(&x[0]),
        (Device::Cpu, DType::F32) => copy_on_cpu::<f32>(&x[0]),
        (Device::Cpu, DType::F16) => copy_on_cpu::<half::f16>(&x[0]),
        (Device::Cpu, DType::BF16) => copy_on_cpu::<half::bf16>(&x[0]),
        (Device::Cpu, dtype) => Err(Error::dtype("copy", "a float type", dtype)),
        #[allow(unreachable_patterns)] // without `cuda`
        _ => {
            let x = x[0].clone();
            Ok(Call::new(move || Ok(vec![Tensor::stack(std::slice::from_ref(&x))?])))
        }
    }));
    Case::timed(("copy", "copy", "Copy of rows of n on one device"), (n, rows), vec![vec![rows, n]], run, move |x, y| {
        exact::rows(n, x, &y[0], |r, got, x| match got == x[0] {
            true => Ok(()),
            false => Err(Error::numeric("wrong answer", format!("copy: row {r} differs"))),
        })
    })
}

/// Into memory that is there already, on all threads.
fn copy_on_cpu<T: Element>(x: &Tensor) -> Result<Call> {
    const CHUNK: usize = 1 << 16;
    let x = x.clone();
    let y = Rc::new(RefCell::new(vec![T::default(); x.len()]));
    let (results, shape) = (y.clone(), x.shape().to_vec());
    Ok(Call {
        run: Box::new(move || {
            let from = x.as_slice::<T>()?;
            y.borrow_mut().par_chunks_mut(CHUNK).zip(from.par_chunks(CHUNK)).for_each(|(y, x)| y.copy_from_slice(x));
            Ok(())
        }),
        results: Box::new(move || Ok(vec![Tensor::from_vec(results.borrow().clone(), shape.clone())?])),
    })
}

/// The kernels one can name, and what n and rows are of each.
pub fn kernels() -> Vec<(&'static str, &'static str)> {
    let mut all: Vec<(&str, &str)> = vec![];
    for t in cases().iter().filter_map(|c| c.timing.as_ref()) {
        if !all.iter().any(|(kernel, _)| *kernel == t.kernel) {
            all.push((t.kernel, t.about));
        }
    }
    all
}

/// The cases of a device's table with their element types.
pub fn table(device: &Device) -> Vec<(Case, DType)> {
    let place = Place::of(device);
    let at = |case: Case| {
        let dtypes = case.timing.as_ref().filter(|t| t.place == place).map_or(&[][..], |t| t.dtypes);
        dtypes.iter().map(move |&dtype| (case.clone(), dtype))
    };
    cases().into_iter().flat_map(at).collect()
}

/// A kernel at a size: where n, rows or the type are not given, those of its table on this device. Rows are then as many as keep the
/// number of values, if memory limits the kernel.
///
/// # Errors
/// No such kernel.
pub fn one(kernel: &str, n: Option<usize>, rows: Option<usize>, dtype: Option<DType>, device: &Device) -> Result<(Case, DType)> {
    let place = Place::of(device);
    let mut here: Vec<_> =
        cases().into_iter().filter_map(|c| c.timing).filter(|t| t.kernel == kernel && t.place == place).collect();
    let usual = here.iter().position(|t| t.n == 4096).unwrap_or(0);
    if here.is_empty() {
        let mut names: Vec<_> =
            cases().into_iter().filter_map(|c| c.timing).filter(|t| t.place == place).map(|t| t.kernel).collect();
        names.dedup();
        return Err(Error::argument("--kernel", format!("expected one of {}, got {kernel:?}", names.join(", "))));
    }
    let usual = here.swap_remove(usual);
    let n = n.unwrap_or(usual.n);
    let kept = match usual.moved > 0.0 {
        true => {
            let rows = (usual.n.saturating_mul(usual.rows) / n.max(1)).max(1);
            // Whole sequences of 2048 for the rotary embedding.
            if rows > 2048 { rows.next_multiple_of(2048) } else { rows }
        }
        false => usual.rows,
    };
    let case = (usual.at)(n, rows.unwrap_or(if n == usual.n { usual.rows } else { kept }));
    let usual = usual.dtypes.first().copied().unwrap_or(if device.is_cpu() { DType::F32 } else { DType::BF16 });
    Ok((case, dtype.unwrap_or(usual)))
}

/// That the device has the memory for a case.
///
/// # Errors
/// [`Error::OutOfMemory`] with both numbers.
pub(super) fn fits(case: &Case, dtype: DType, device: &Device) -> Result<()> {
    let Some(timing) = &case.timing else { return Ok(()) };
    let needed = timing.held * dtype.size() as f64;
    let free = device.free_bytes().unwrap_or(1 << 46);
    if !(needed <= free as f64) {
        // Saturates.
        let (needed, free) = (needed as usize, free as usize);
        return Err(Error::OutOfMemory { what: format!("{case:?} in {dtype}"), needed, free, total: free });
    }
    Ok(())
}

/// A case's results are compared with the reference where something is at hand that a call moves.
pub(super) fn copied(case: &Case) -> Option<Case> {
    let timing = case.timing.as_ref().filter(|t| t.moved > 0.0)?;
    Some(copy(timing.n, timing.rows))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn absurd_sizes_are_refused_by_arithmetic() {
        let huge = [usize::MAX, usize::MAX / 2, 1 << 62, 1 << 45];
        for (kernel, _) in kernels() {
            for n in huge {
                for (n, rows) in [(Some(n), None), (None, Some(n)), (Some(n), Some(n))] {
                    // Attention's rows multiply the tokens of a sequence, and so on: every one is beyond memory.
                    let (case, dtype) = one(kernel, n, rows, None, &Device::Cpu).unwrap();
                    let e = fits(&case, dtype, &Device::Cpu).unwrap_err();
                    assert!(matches!(e, Error::OutOfMemory { .. }), "{kernel} {n:?} {rows:?}: {e}");
                }
            }
        }
    }

    #[test]
    fn sizes_not_given_are_those_of_the_table() {
        let of = |kernel, n, rows| {
            let t = one(kernel, n, rows, None, &Device::Cpu).unwrap().0.timing.unwrap();
            (t.n, t.rows)
        };
        assert_eq!(of("hadamard", None, None), (4096, 4096));
        assert_eq!(of("hadamard", Some(1024), None), (1024, 16384));
        assert_eq!(of("hadamard", None, Some(3)), (4096, 3));
        assert_eq!(of("attention", Some(128), None), (128, 1));
        assert_eq!(of("rope", Some(128), None), (128, 131_072));
        let e = one("hadamad", None, None, None, &Device::Cpu).unwrap_err().to_string();
        assert!(e.contains("hadamad") && e.contains("hadamard-fake-quant"), "{e}");
    }
}
