//! Every kernel of `spinquant bench`, on the CPU and on a GPU where there is one: its answer is checked, then criterion times it.
//!
//! `cargo bench --bench kernels [-- FILTER]`. The cases and the clock are those of `spinquant bench`: on a GPU the time between
//! events in its stream.

use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use spinquant::Device;
use spinquant::bench::{self, Caller};

fn kernels(c: &mut Criterion) {
    let gpu = Device::cuda(0).inspect_err(|e| println!("without a GPU: {e}")).ok();
    for device in [Some(Device::Cpu), gpu].into_iter().flatten() {
        bench::warm_up(&device).expect("the device copies");
        for (case, dtype) in bench::table(&device) {
            let Some(timing) = case.timing.clone() else { continue };
            let mut group = c.benchmark_group(timing.kernel);
            group.sample_size(10).warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(1));
            if timing.moved > 0.0 {
                group.throughput(Throughput::Bytes((timing.moved * dtype.size() as f64) as u64));
            } else if timing.flops > 0.0 {
                group.throughput(Throughput::Elements(timing.flops as u64));
            }
            // Made and checked only if the filter lets it be timed.
            let mut caller = None;
            group.bench_function(
                BenchmarkId::new(format!("{} x {}", timing.rows, timing.n), format!("{dtype} on {device}")),
                |b| {
                    let caller =
                        caller.get_or_insert_with(|| Caller::checked(&case, dtype, &device).unwrap_or_else(|e| panic!("{e}")));
                    b.iter_custom(|calls| caller.total(calls).unwrap_or_else(|e| panic!("{case:?}: {e}")));
                },
            );
            group.finish();
        }
    }
}

criterion_group!(benches, kernels);
criterion_main!(benches);
