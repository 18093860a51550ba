//! Every operation, on the CPU and on a GPU where there is one, from the same large `cases()` as the parity tests: parity first,
//! then time, then the rate as a fraction of a copy's (matrix products: GFLOP/s).
//!
//! `cargo bench --bench kernels [-- FILTER]`. What a GPU's kernels reach at a model's sizes is measured by `spinquant bench`.

use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use spinquant::ops::{self, Case};
use spinquant::{DType, Device, Result, Tape, Tensor, check};

fn devices() -> Vec<(Device, &'static [DType])> {
    let mut devices: Vec<(Device, &'static [DType])> = vec![(Device::Cpu, &[DType::F32])];
    match Device::cuda(0) {
        Ok(gpu) => devices.push((gpu, &[DType::F32, DType::BF16])),
        Err(e) => println!("without a GPU: {e}"),
    }
    devices
}

/// Waits for what was launched.
fn wait(device: &Device) {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(d) => d.synchronize().expect("no kernel failed"),
        _ => {}
    }
}

fn forward(case: &Case, inputs: &[Tensor]) -> Result<Tensor> {
    let tape = Tape::new();
    Ok((case.build)(inputs.iter().map(|x| tape.constant(x.clone())).collect())?.into_value())
}

/// Forward and backward; `dy` is the gradient of the result.
fn both(case: &Case, inputs: &[Tensor], dy: &Tensor) -> Result<()> {
    let tape = Tape::new();
    let y = (case.build)(inputs.iter().map(|x| tape.variable(x.clone())).collect())?;
    tape.backward_from(y, dy.clone()).map(drop)
}

/// Best time of several calls.
fn best(device: &Device, mut f: impl FnMut()) -> Duration {
    let one = |f: &mut dyn FnMut()| {
        let start = Instant::now();
        f();
        wait(device);
        start.elapsed()
    };
    (0..10).map(|_| one(&mut f)).min().unwrap_or_default()
}

/// Bytes a second of a copy of a tensor (read and written).
fn copy_rate(x: &Tensor) -> f64 {
    let x = x.clone().reshape([1, x.len()]).expect("the same size");
    let time = best(&x.device(), || drop(black_box(Tensor::stack(std::slice::from_ref(&x)))));
    2.0 * x.bytes() as f64 / time.as_secs_f64()
}

fn kernels(c: &mut Criterion) {
    for (device, dtypes) in devices() {
        for case in ops::cases().into_iter().filter(|case| case.large) {
            for &dtype in dtypes {
                check::parity(&case, dtype, &device).unwrap_or_else(|e| panic!("{e}"));
                let to = |x: &Tensor| x.to_dtype(dtype).and_then(|x| x.to_device(&device)).expect("a supported type");
                let inputs: Vec<_> = case.inputs.iter().map(to).collect();
                let y = forward(&case, &inputs).expect("parity ran it");
                let dy = to(&ops::randn(y.shape(), 1));
                // An embedding reads of its table what it returns.
                let read = if case.op == "embedding" { y.bytes() } else { inputs.iter().map(Tensor::bytes).sum() };
                let bytes = y.bytes() + read;
                let run = || drop(black_box(forward(&case, &inputs).expect("parity ran it")));
                let rate = bytes as f64 / best(&device, run).as_secs_f64();
                let of_copy = rate / copy_rate(inputs.iter().max_by_key(|x| x.len()).unwrap_or(&y));
                let name = format!("{}, {dtype} on {device}", case.name);
                if case.op == "matmul" {
                    // m·n·k² = (m·k)(k·n): the inner size follows from the three sizes.
                    let (a, b) = (inputs[0].len() as f64, inputs[1].len() as f64);
                    let flops = 2.0 * (a * b * y.len() as f64).sqrt();
                    println!("{} {name}: {:.0} GFLOP/s", case.op, flops * rate / bytes as f64 / 1e9);
                } else {
                    println!("{} {name}: {of_copy:.2} of a copy's rate", case.op);
                }
                let mut group = c.benchmark_group(case.op);
                group.sample_size(10).warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(1));
                group.throughput(Throughput::Bytes(bytes as u64));
                group.bench_function(BenchmarkId::new("forward", &name), |b| {
                    b.iter(|| {
                        black_box(forward(&case, &inputs).expect("parity ran it"));
                        wait(&device);
                    });
                });
                group.bench_function(BenchmarkId::new("forward and backward", &name), |b| {
                    b.iter(|| {
                        both(&case, &inputs, &dy).expect("parity ran it");
                        wait(&device);
                    });
                });
                group.finish();
            }
        }
    }
}

criterion_group!(benches, kernels);
criterion_main!(benches);
