//! One function a kernel: make operands, check some rows, time it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Instant;

use spinquant::hadamard::Hadamard;
use spinquant::linalg;
use spinquant::linalg::matmul::product;
use spinquant::manifold::Orthogonal;
use spinquant::ops::add::Add;
use spinquant::ops::attention::{self, Attention, Sizes};
use spinquant::ops::cross_entropy::{self, CrossEntropy};
use spinquant::ops::embedding::Embedding;
use spinquant::ops::fake_quant::FakeQuant;
use spinquant::ops::hadamard::transform;
use spinquant::ops::randn;
use spinquant::ops::rms_norm::{self, RmsNorm};
use spinquant::ops::rope::{self, Rope, Rotate};
use spinquant::ops::swiglu::{self, Swiglu};
use spinquant::optim::{CayleySgd, Mode, Optimizer};
use spinquant::quant::{Clip, QuantSpec, SEARCH_NORM};
use spinquant::tape::{Op, Saved, run_backward};
use spinquant::{DType, Device, Error, Result, Tensor};

use super::{Job, Kernel, Measured, exact};

/// Values that are drawn; longer tensors repeat them.
pub const BLOCK: usize = 1 << 20;
/// Heads of the attention benchmark, and their size everywhere.
const HEADS: usize = 32;
const DIM: usize = 128;
const EPS: f64 = 1e-5;

/// Milliseconds a call, and how they were measured.
pub type Timed = (f64, &'static str);

/// Wakes the card up: its clocks settle under load.
pub fn warm_up(device: &Device) -> Result<()> {
    if !device.is_cpu() {
        let start = Instant::now();
        let x = random([BLOCK, 64], 0, DType::F32, device)?;
        while start.elapsed().as_secs_f64() < 1.0 {
            time(device, || Tensor::stack(std::slice::from_ref(&x)).map(drop))?;
        }
    }
    Ok(())
}

/// Checks, then times.
pub fn run(job: &Job, device: &Device) -> Result<Measured> {
    #[cfg(feature = "cuda")]
    if let Device::Cuda(d) = device
        && matches!(job.kernel, Kernel::Hadamard | Kernel::HadamardFakeQuant | Kernel::FakeQuant | Kernel::Copy)
    {
        return super::gpu::run(job, d);
    }
    match job.kernel {
        Kernel::All => Err(Error::argument("--kernel", "all is a table, not a kernel")),
        Kernel::Copy => copy_only(job, device),
        Kernel::Hadamard => hadamard(job, device),
        Kernel::FakeQuant => fake_quant(job, device, false),
        Kernel::HadamardFakeQuant => fake_quant(job, device, true),
        Kernel::ClipSearch => clip_search(job, device),
        Kernel::RmsNorm => rms_norm(job, device),
        Kernel::RmsNormBackward => rms_norm_backward(job, device),
        Kernel::Swiglu => swiglu(job, device),
        Kernel::SwigluBackward => swiglu_backward(job, device),
        Kernel::Rope => rope(job, device, false),
        Kernel::RopeBackward => rope(job, device, true),
        Kernel::Add => add(job, device),
        Kernel::Embedding => embedding(job, device),
        Kernel::CrossEntropy => cross_entropy(job, device),
        Kernel::Attention => attention_forward(job, device),
        Kernel::AttentionBackward => attention_backward(job, device),
        Kernel::Cayley => cayley(job, device),
        Kernel::CayleyAudit => cayley_audit(job, device),
        Kernel::Gemm => gemm(job, device),
        Kernel::GptqLayer | Kernel::GptqModel => super::gptq::run(job, device),
    }
}

/// [`BLOCK`] normal values from a seed in f64, drawn once.
pub fn block(seed: u64) -> Tensor {
    static BLOCKS: OnceLock<Mutex<HashMap<u64, Tensor>>> = OnceLock::new();
    let mut blocks = BLOCKS.get_or_init(Mutex::default).lock().unwrap_or_else(|e| e.into_inner());
    blocks.entry(seed).or_insert_with(|| randn([BLOCK], seed)).clone()
}

/// Normal values from a seed.
pub fn random(shape: impl Into<Vec<usize>>, seed: u64, dtype: DType, device: &Device) -> Result<Tensor> {
    let shape = shape.into();
    let len: usize = shape.iter().product();
    let block = block(seed).slice(0, len.min(BLOCK))?.to_dtype(dtype)?.to_device(device)?;
    let copies = vec![block; len.div_ceil(BLOCK).max(1)];
    let all = Tensor::stack(&copies)?;
    let values = all.len();
    all.reshape([values])?.slice(0, len)?.reshape(shape)
}

/// Rows of a tensor of rows of n: the first, one in the middle, the last.
pub fn some(rows: usize) -> Vec<usize> {
    let mut some = vec![0, (rows / 2) | 1, rows - 1];
    some.retain(|&r| r < rows);
    some.dedup();
    some
}

fn row(x: &Tensor, r: usize, n: usize) -> Result<Vec<f64>> {
    x.clone().reshape([x.len() / n, n])?.slice(r, 1)?.to_f64_vec()
}

/// Milliseconds a call of `f`: on the CPU the best of several, on a GPU the median between events.
fn time(device: &Device, mut f: impl FnMut() -> Result<()>) -> Result<Timed> {
    #[cfg(feature = "cuda")]
    if let Device::Cuda(d) = device {
        return super::gpu::time(d, false, f);
    }
    let _ = device;
    f()?;
    let mut best = f64::INFINITY;
    let start = Instant::now();
    for i in 0..50 {
        let one = Instant::now();
        f()?;
        best = best.min(one.elapsed().as_secs_f64() * 1e3);
        if i >= 4 && start.elapsed().as_secs_f64() > 0.3 {
            break;
        }
    }
    Ok((best, "best of several"))
}

/// A copy of one tensor, for comparison.
fn copy(x: &Tensor) -> Result<(f64, f64)> {
    let device = x.device();
    let bytes = 2.0 * x.bytes() as f64;
    if !device.is_cpu() {
        return Ok((time(&device, || Tensor::stack(std::slice::from_ref(x)).map(drop))?.0, bytes));
    }
    use rayon::prelude::*;
    let from = vec![1u8; x.bytes()];
    let mut to = vec![0u8; x.bytes()];
    let chunk = 1 << 18;
    let ms = time(&device, || {
        to.par_chunks_mut(chunk).zip(from.par_chunks(chunk)).for_each(|(to, from)| to.copy_from_slice(from));
        Ok(())
    })?;
    Ok((ms.0, bytes))
}

/// Times `f`, which moves `tensors` tensors like `x`.
fn against_copy(x: &Tensor, tensors: usize, f: impl FnMut() -> Result<()>) -> Result<Measured> {
    let copy = copy(x)?;
    let (ms, how) = time(&x.device(), f)?;
    Ok(Measured { ms, how, bytes: (tensors * x.bytes()) as f64, flops: 0.0, copy: Some(copy) })
}

fn copy_only(job: &Job, device: &Device) -> Result<Measured> {
    let x = random([job.rows, job.n], 1, job.dtype, device)?;
    let (ms, bytes) = copy(&x)?;
    Ok(Measured { ms, how: "best of several", bytes, flops: 0.0, copy: Some((ms, bytes)) })
}

fn hadamard(job: &Job, device: &Device) -> Result<Measured> {
    let (x, map) = (random([job.rows, job.n], 1, job.dtype, device)?, Hadamard::new(job.n)?);
    let call = || transform(x.clone(), &map, false);
    let y = call()?;
    for r in some(job.rows) {
        exact::close("hadamard", &row(&y, r, job.n)?, &exact::hadamard(&row(&x, r, job.n)?, &map), job.dtype, 1.0)?;
    }
    drop(y);
    against_copy(&x, 2, || call().map(drop))
}

/// Asymmetric 4-bit per row, as activations are quantised.
pub fn spec() -> QuantSpec {
    QuantSpec::activation(4, false)
}

fn op(op: &impl Op, inputs: Vec<Tensor>) -> Result<Tensor> {
    spinquant::tape::run(op, inputs, &mut Saved::default())
}

fn fake_quant(job: &Job, device: &Device, transformed: bool) -> Result<Measured> {
    let (x, map) = (random([job.rows, job.n], 1, job.dtype, device)?, Hadamard::new(job.n)?);
    let call = || {
        let x = if transformed { transform(x.clone(), &map, false)? } else { x.clone() };
        op(&FakeQuant(spec()), vec![x])
    };
    let y = call()?;
    for r in some(job.rows) {
        let x = row(&x, r, job.n)?;
        let x = if transformed { exact::hadamard(&x, &map) } else { x };
        exact::quantised("fake_quant", &row(&y, r, job.n)?, &x, &spec(), job.dtype)?;
    }
    drop(y);
    against_copy(&x, 2, || call().map(drop))
}

fn clip_search(job: &Job, device: &Device) -> Result<Measured> {
    let x = random([job.rows, job.n], 1, job.dtype, device)?;
    let spec = QuantSpec::weight(4, true).clipped(Clip::Search);
    let call = || op(&FakeQuant(spec), vec![x.clone()]);
    let y = call()?;
    for r in some(job.rows) {
        let (x, y) = (row(&x, r, job.n)?, row(&y, r, job.n)?);
        // Any candidate that is as good will do, so compare errors; y was rounded to its type.
        let error = |y: &dyn Fn(usize) -> f64| (0..x.len()).map(|i| (x[i] - y(i)).abs().powf(SEARCH_NORM)).sum::<f64>();
        let grid = spinquant::grid::reference_grid(&spec, &x);
        let (ours, best) = (error(&|i| y[i]), error(&|i| grid.nearest(x[i])));
        let slack = 1e-4 + 4.0 * job.dtype.epsilon();
        if !(ours <= best * (1.0 + slack)) {
            return Err(Error::numeric("wrong answer", format!("clip search: row {r}: error {ours:e}, the best is {best:e}")));
        }
    }
    drop(y);
    against_copy(&x, 2, || call().map(drop))
}

fn rms_norm(job: &Job, device: &Device) -> Result<Measured> {
    let x = random([job.rows, job.n], 1, job.dtype, device)?;
    let call = || op(&RmsNorm { eps: EPS, gain: None }, vec![x.clone()]);
    let y = call()?;
    for r in some(job.rows) {
        let want = rms_norm::reference(&row(&x, r, job.n)?, job.n, EPS).0;
        exact::close("rms_norm", &row(&y, r, job.n)?, &want, job.dtype, 1.0)?;
    }
    drop(y);
    against_copy(&x, 2, || call().map(drop))
}

/// What an operation's forward pass keeps.
fn saved(operation: &impl Op, inputs: Vec<Tensor>) -> Result<Saved> {
    let mut save = Saved::new(vec![true; inputs.len()]);
    spinquant::tape::run(operation, inputs, &mut save)?;
    Ok(save)
}

/// The gradients of an operation from what its forward pass kept.
fn backward(operation: &impl Op, kept: &Saved, dy: &Tensor, operands: usize) -> Result<Vec<Tensor>> {
    let want = vec![true; operands];
    let grads = run_backward(operation, kept.clone(), dy.clone(), &want)?;
    grads.into_iter().map(|g| g.ok_or_else(|| Error::numeric("wrong answer", "no gradient"))).collect()
}

fn rms_norm_backward(job: &Job, device: &Device) -> Result<Measured> {
    let (x, dy) = (random([job.rows, job.n], 1, job.dtype, device)?, random([job.rows, job.n], 2, job.dtype, device)?);
    let kernel = RmsNorm { eps: EPS, gain: None };
    let kept = saved(&kernel, vec![x.clone()])?;
    let call = || backward(&kernel, &kept, &dy, 1);
    let dx = call()?.remove(0);
    for r in some(job.rows) {
        let (x, dy) = (row(&x, r, job.n)?, row(&dy, r, job.n)?);
        let inverse = rms_norm::reference(&x, job.n, EPS).1;
        let want = rms_norm::reference_backward(&dy, &x, &inverse, job.n);
        exact::close("rms_norm backward", &row(&dx, r, job.n)?, &want, job.dtype, 1.0)?;
    }
    drop(dx);
    against_copy(&x, 3, || call().map(drop))
}

fn swiglu(job: &Job, device: &Device) -> Result<Measured> {
    let (gate, up) = (random([job.rows, job.n], 1, job.dtype, device)?, random([job.rows, job.n], 2, job.dtype, device)?);
    let call = || op(&Swiglu, vec![gate.clone(), up.clone()]);
    let y = call()?;
    for r in some(job.rows) {
        let want = swiglu::reference(&row(&gate, r, job.n)?, &row(&up, r, job.n)?);
        exact::close("swiglu", &row(&y, r, job.n)?, &want, job.dtype, 1.0)?;
    }
    drop(y);
    against_copy(&gate, 3, || call().map(drop))
}

fn swiglu_backward(job: &Job, device: &Device) -> Result<Measured> {
    let make = |seed| random([job.rows, job.n], seed, job.dtype, device);
    let (gate, up, dy) = (make(1)?, make(2)?, make(3)?);
    let kept = saved(&Swiglu, vec![gate.clone(), up.clone()])?;
    let call = || backward(&Swiglu, &kept, &dy, 2);
    let grads = call()?;
    for r in some(job.rows) {
        let (dgate, dup) = swiglu::reference_backward(&row(&dy, r, job.n)?, &row(&gate, r, job.n)?, &row(&up, r, job.n)?);
        for (got, want) in grads.iter().zip([dgate, dup]) {
            exact::close("swiglu backward", &row(got, r, job.n)?, &want, job.dtype, 1.0)?;
        }
    }
    drop(grads);
    against_copy(&gate, 5, || call().map(drop))
}

fn add(job: &Job, device: &Device) -> Result<Measured> {
    let (a, b) = (random([job.rows, job.n], 1, job.dtype, device)?, random([job.rows, job.n], 2, job.dtype, device)?);
    let call = || op(&Add, vec![a.clone(), b.clone()]);
    let y = call()?;
    for r in some(job.rows) {
        let want: Vec<f64> = row(&a, r, job.n)?.iter().zip(row(&b, r, job.n)?).map(|(a, b)| a + b).collect();
        exact::close("add", &row(&y, r, job.n)?, &want, job.dtype, 1.0)?;
    }
    drop(y);
    against_copy(&a, 3, || call().map(drop))
}

/// Rows of a vocabulary, spread over it.
fn spread(rows: usize, vocab: usize) -> impl Iterator<Item = usize> {
    (0..rows).map(move |i| (i * 7919 + 13) % vocab)
}

fn embedding(job: &Job, device: &Device) -> Result<Measured> {
    const VOCAB: usize = 32000;
    let table = random([VOCAB, job.n], 1, job.dtype, device)?;
    let ids: Arc<[u32]> = spread(job.rows, VOCAB).map(|id| id as u32).collect();
    let gather = Embedding { ids: ids.clone(), vocab: VOCAB };
    let call = || op(&gather, vec![table.clone()]);
    let y = call()?;
    for r in some(job.rows) {
        exact::close("embedding", &row(&y, r, job.n)?, &row(&table, ids[r] as usize, job.n)?, job.dtype, 1.0)?;
    }
    against_copy(&y, 2, || call().map(drop))
}

fn cross_entropy(job: &Job, device: &Device) -> Result<Measured> {
    let x = random([job.rows, job.n], 1, job.dtype, device)?;
    let targets: Arc<[i32]> = spread(job.rows, job.n).map(|t| t as i32).collect();
    let kernel = CrossEntropy { targets: targets.clone() };
    let gradient = saved(&kernel, vec![x.clone()])?.into_vec().remove(0);
    let count = job.rows as f64;
    for r in some(job.rows) {
        let want = cross_entropy::reference(&row(&x, r, job.n)?, &targets[r..=r], job.n).1;
        // Gradients near the smallest numbers of f16 would be measured by those: all are multiplied by what they were divided by.
        let got: Vec<f64> = row(&gradient, r, job.n)?.iter().map(|g| g * count).collect();
        exact::close("cross entropy", &got, &want, job.dtype, 1.0)?;
    }
    drop(gradient);
    let (copy, bytes) = (copy(&x)?, 2.0 * x.bytes() as f64);
    // The gradient takes the place of logits that nobody shares: it is the next call's logits.
    let mut logits = vec![x];
    let (ms, how) = time(device, || {
        logits = saved(&kernel, std::mem::take(&mut logits))?.into_vec();
        Ok(())
    })?;
    Ok(Measured { ms, how, bytes, flops: 0.0, copy: Some(copy) })
}

fn rope(job: &Job, device: &Device, transpose: bool) -> Result<Measured> {
    let seq = job.rows.min(2048);
    if !job.n.is_multiple_of(DIM) || !job.rows.is_multiple_of(seq) {
        return Err(Error::argument("rope", format!("expected rows of heads of {DIM} and whole sequences of {seq} rows")));
    }
    let x = random([job.rows, job.n / DIM, DIM], 1, job.dtype, device)?;
    let frequencies: Vec<_> = (0..DIM / 2).map(|i| 1e4f64.powf(-2.0 * i as f64 / DIM as f64)).collect();
    let kernel = Rotate { rope: Rope::new(&frequencies, seq, job.dtype, device)?, transpose };
    let call = || op(&kernel, vec![x.clone()]);
    let y = call()?;
    for r in some(job.rows) {
        let mut want = row(&x, r, job.n)?;
        let angles = |f: fn(f64) -> f64| frequencies.iter().map(|w| f((r % seq) as f64 * w)).collect::<Vec<_>>();
        rope::reference(&mut want, &angles(f64::cos), &angles(f64::sin), (1, job.n / DIM, DIM), transpose);
        exact::close("rope", &row(&y, r, job.n)?, &want, job.dtype, 1.0)?;
    }
    drop(y);
    against_copy(&x, 2, || call().map(drop))
}

fn sizes(job: &Job) -> Sizes {
    Sizes { batch: job.rows, seq: job.n, heads: HEADS, kv_heads: HEADS, dim: DIM }
}

/// Products of one pass over the causal triangle, twice: q kᵀ and p v.
fn attention_flops(n: &Sizes) -> f64 {
    4.0 * (n.batch * n.heads * n.seq * n.seq * n.dim) as f64 / 2.0
}

/// The last head of the last sequence of `[tokens, heads, dim]`.
fn last_head(x: &Tensor, n: &Sizes) -> Result<Vec<f64>> {
    let width = n.heads * n.dim;
    let x = x.clone().reshape([n.batch, n.seq * width])?.index(n.batch - 1)?.to_f64_vec()?;
    Ok(x.chunks(width).flat_map(|t| t[width - n.dim..].to_vec()).collect())
}

/// How far attention may be from the reference: tensor cores round probabilities to the operands' type.
fn attention_tolerance(dtype: DType) -> f64 {
    if dtype == DType::F32 { 1e-4 } else { 4.0 * dtype.epsilon() }
}

fn attention_forward(job: &Job, device: &Device) -> Result<Measured> {
    let n = sizes(job);
    let make = |seed| random([n.batch * n.seq, n.heads, n.dim], seed, job.dtype, device);
    let (q, k, v) = (make(1)?, make(2)?, make(3)?);
    let kernel = Attention { seq: n.seq };
    let call = || op(&kernel, vec![q.clone(), k.clone(), v.clone()]);
    let o = call()?;
    let one = Sizes { batch: 1, heads: 1, kv_heads: 1, ..n };
    let (want, _) = attention::reference(&last_head(&q, &n)?, &last_head(&k, &n)?, &last_head(&v, &n)?, one);
    exact::close_to_largest("attention", &last_head(&o, &n)?, &want, attention_tolerance(job.dtype))?;
    drop(o);
    let (ms, how) = time(device, || call().map(drop))?;
    Ok(Measured { ms, how, bytes: 0.0, flops: attention_flops(&n), copy: None })
}

fn attention_backward(job: &Job, device: &Device) -> Result<Measured> {
    let n = sizes(job);
    let make = |seed| random([n.batch * n.seq, n.heads, n.dim], seed, job.dtype, device);
    let (q, k, v) = (make(1)?, make(2)?, make(3)?);
    let dout = make(4)?.reshape([n.batch * n.seq, n.heads * n.dim])?;
    let kernel = Attention { seq: n.seq };
    let kept = saved(&kernel, vec![q.clone(), k.clone(), v.clone()])?;
    let call = || backward(&kernel, &kept, &dout, 3);
    let grads = call()?;
    let one = Sizes { batch: 1, heads: 1, kv_heads: 1, ..n };
    let at = |x: &Tensor| last_head(x, &n);
    let want = attention::reference_backward(&at(&dout)?, &at(&q)?, &at(&k)?, &at(&v)?, one);
    for (name, got, want) in [("dq", &grads[0], want.0), ("dk", &grads[1], want.1), ("dv", &grads[2], want.2)] {
        exact::close_to_largest(name, &at(got)?, &want, 2.0 * attention_tolerance(job.dtype))?;
    }
    drop(grads);
    let (ms, how) = time(device, || call().map(drop))?;
    Ok(Measured { ms, how, bytes: 0.0, flops: 2.5 * attention_flops(&n), copy: None })
}

/// A rotation, and a gradient for it.
fn rotation(k: usize, n: usize, dtype: DType, device: &Device) -> Result<(Tensor, Tensor)> {
    let x = Orthogonal.random_hadamard(k, n, 7)?.to_dtype(dtype)?.to_device(device)?;
    Ok((x, random([k, n, n], 8, dtype, device)?))
}

fn cayley_step(optimizer: &mut CayleySgd, x: &Tensor, gradient: &Tensor) -> Result<Tensor> {
    let mut params = [x.clone()];
    optimizer.step(&mut params, vec![gradient.clone()], 1.5)?;
    let [x] = params;
    Ok(x)
}

fn only_f32(job: &Job) -> Result<()> {
    if job.dtype == DType::F32 { Ok(()) } else { Err(Error::dtype("cayley", "f32", job.dtype)) }
}

fn cayley(job: &Job, device: &Device) -> Result<Measured> {
    only_f32(job)?;
    // The answer on a small problem, where f64 takes no time; at the size asked for, that it is a rotation.
    let small = |dtype, device: &Device| -> Result<Vec<f64>> {
        let (x, g) = rotation(2, 128, DType::F32, &Device::Cpu)?;
        let (x, g) = (x.to_dtype(dtype)?.to_device(device)?, g.to_dtype(dtype)?.to_device(device)?);
        cayley_step(&mut CayleySgd::new(Mode::Default), &x, &g)?.to_f64_vec()
    };
    exact::close_to_largest("cayley", &small(DType::F32, device)?, &small(DType::F64, &Device::Cpu)?, 3e-5)?;
    let (x, gradient) = rotation(job.rows, job.n, job.dtype, device)?;
    let mut optimizer = CayleySgd::new(Mode::Default);
    let timed = time(device, || cayley_step(&mut optimizer, &x, &gradient).map(drop))?;
    let drift = optimizer.orthogonality_error();
    if !(drift <= 1e-6) {
        return Err(Error::numeric("wrong answer", format!("cayley: max|RᵀR − I| = {drift:e} after a step")));
    }
    Ok(Measured { ms: timed.0, how: timed.1, bytes: 0.0, flops: 0.0, copy: None })
}

fn cayley_audit(job: &Job, device: &Device) -> Result<Measured> {
    only_f32(job)?;
    let (x, _) = rotation(job.rows, job.n, job.dtype, device)?;
    let error = linalg::largest(&linalg::gram_residual(&x)?.1);
    if !(error <= 1e-6) {
        return Err(Error::numeric("wrong answer", format!("audit of a rotation: {error:e}")));
    }
    let (ms, how) = time(device, || linalg::gram_residual(&x).map(drop))?;
    Ok(Measured { ms, how, bytes: 0.0, flops: 2.0 * (job.rows * job.n.pow(3)) as f64, copy: None })
}

fn gemm(job: &Job, device: &Device) -> Result<Measured> {
    let (a, b) = (random([job.rows, job.n], 1, job.dtype, device)?, random([job.n, job.n], 2, job.dtype, device)?);
    let call = || product(&a, false, &b, true, false, job.dtype);
    let y = call()?;
    let columns = some(job.n);
    let b_rows = columns.iter().map(|&c| row(&b, c, job.n)).collect::<Result<Vec<_>>>()?;
    for r in some(job.rows) {
        let (a, y) = (row(&a, r, job.n)?, row(&y, r, job.n)?);
        let size = (job.n as f64).sqrt();
        for (&c, b) in columns.iter().zip(&b_rows) {
            let want: f64 = a.iter().zip(b).map(|(a, b)| a * b).sum();
            // The size of a sum of n products keeps a sum that cancels from being asked for too much.
            exact::close("gemm", &[y[c], size], &[want, size], job.dtype, 2.0)?;
        }
    }
    drop(y);
    let (ms, how) = time(device, || call().map(drop))?;
    Ok(Measured { ms, how, bytes: 0.0, flops: 2.0 * (job.rows * job.n * job.n) as f64, copy: None })
}
