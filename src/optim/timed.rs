//! What the benches time here: a Cayley step, and the audit of a rotation.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use super::{CayleySgd, Mode, Optimizer};
use crate::linalg::{gram_residual, largest};
use crate::manifold::Orthogonal;
use crate::ops::{At, Call, Case, Place, Run, exact, repeated};
use crate::{DType, Device, Error, Result, Tensor};

const SIZES: &[At] = &[(Place::Cpu, 384, 1, &[DType::F32]), (Place::Gpu, 4096, 1, &[DType::F32])];
/// The rate of the paper.
const RATE: f64 = 1.5;

/// The timed cases of this module.
pub fn cases() -> Vec<Case> {
    [Case::table(step, SIZES), Case::table(audit, SIZES)].concat()
}

/// Rotations, and a gradient for them.
fn operands(k: usize, n: usize, dtype: DType, device: &Device) -> Result<Vec<Tensor>> {
    if dtype != DType::F32 {
        return Err(Error::dtype("cayley", "f32", dtype));
    }
    let x = Orthogonal.random_hadamard(k, n, 7)?.to_dtype(dtype)?.to_device(device)?;
    Ok(vec![x, repeated([k, n, n], 8, dtype, device)?])
}

fn stepped(optimizer: &mut CayleySgd, x: &Tensor, gradient: &Tensor) -> Result<Tensor> {
    let mut params = [x.clone()];
    optimizer.step(&mut params, vec![gradient.clone()], RATE)?;
    let [x] = params;
    Ok(x)
}

/// A step of `k` matrices, stabilised and audited.
fn step(n: usize, k: usize) -> Case {
    let run = Run::Call(Arc::new(|x: &[Tensor]| {
        let (x, gradient, mut optimizer) = (x[0].clone(), x[1].clone(), CayleySgd::new(Mode::Default));
        Ok(Call::new(move || Ok(vec![stepped(&mut optimizer, &x, &gradient)?])))
    }));
    let about = "A Cayley step of so many matrices of n x n, re-orthonormalised and audited";
    Case::timed(("cayley", "cayley", about), (n, k), vec![], run, |_, y| {
        // The answer on a small problem, where f64 takes no time; at this size, that it is a rotation.
        let device = y[0].device();
        let small = |dtype, device: &Device| -> Result<Vec<f64>> {
            let small = operands(2, 128, DType::F32, &Device::Cpu)?;
            let on = |x: &Tensor| x.to_dtype(dtype)?.to_device(device);
            stepped(&mut CayleySgd::new(Mode::Default), &on(&small[0])?, &on(&small[1])?)?.to_f64_vec()
        };
        exact::close_to_largest("cayley", &small(DType::F32, &device)?, &small(DType::F64, &Device::Cpu)?, 3e-5)?;
        let drift = largest(&gram_residual(&y[0])?.1);
        if !(drift <= 1e-6) {
            return Err(Error::numeric("wrong answer", format!("cayley: max|RᵀR − I| = {drift:e} after a step")));
        }
        Ok(())
    })
    .computes(0.0)
    .holds(16.0 * k as f64 * (n as f64).powi(2))
    .drawn(move |dtype, device| operands(k, n, dtype, device))
}

/// max|XᵀX − I| of `k` rotations.
fn audit(n: usize, k: usize) -> Case {
    let run = Run::Call(Arc::new(|x: &[Tensor]| {
        let x = x[0].clone();
        let last = Rc::new(RefCell::new(None));
        let results = last.clone();
        Ok(Call {
            run: Box::new(move || {
                *last.borrow_mut() = Some(gram_residual(&x)?);
                Ok(())
            }),
            results: Box::new(move || {
                let (residual, errors) = results.borrow().clone().ok_or_else(|| Error::numeric("audit", "not run"))?;
                let count = errors.len();
                Ok(vec![residual, Tensor::from_vec(errors, [count])?])
            }),
        })
    }));
    Case::timed(("cayley", "cayley-audit", "The audit alone"), (n, k), vec![], run, |_, y| {
        // Of a rotation rounded to f32: 6e-8 for every product, at random signs.
        for errors in y {
            let error = largest(&errors.to_f64_vec()?.into_iter().map(f64::abs).collect::<Vec<_>>());
            if !(error <= 1e-6) {
                return Err(Error::numeric("wrong answer", format!("audit of a rotation: {error:e}")));
            }
        }
        Ok(())
    })
    .computes(2.0 * k as f64 * (n as f64).powi(3))
    .holds(16.0 * k as f64 * (n as f64).powi(2))
    .drawn(move |dtype, device| operands(k, n, dtype, device))
}
