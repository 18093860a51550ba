//! Several GPUs: `cargo test --features cuda --test gpus -- --include-ignored --nocapture`, on a machine with two and NCCL. A program of its
//! own, one test at a time: one of them takes all memory of a card.
#![cfg(feature = "cuda")]

use std::net::TcpListener;
use std::process::Command;
use std::sync::{Mutex, MutexGuard};
use std::time::Instant;

use serde_json::Value;
use spinquant::llama::{Llama, Plan, Recompute, RotationVars, synthetic};
use spinquant::quant::{Engine, Scheme};
use spinquant::ranks::{Group, Place};
use spinquant::rotation::Rotations;
use spinquant::{DType, Device, Tape, Tensor, ops};

/// Both GPUs are a test's own as long as it holds this.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    // A test that failed has given them back.
    ALONE.lock().unwrap_or_else(|failed| failed.into_inner())
}

/// The first two GPUs.
#[track_caller]
fn two() -> [Device; 2] {
    [0, 1].map(|gpu| Device::cuda(gpu).unwrap_or_else(|e| panic!("this test needs two GPUs: {e}")))
}

/// Runs a function on either GPU, each a rank of its own on a thread.
fn on_both<T: Send>(f: impl Fn(Group, Device) -> T + Sync) -> Vec<T> {
    let mut listener = Some(TcpListener::bind("127.0.0.1:0").unwrap());
    let port = listener.as_ref().unwrap().local_addr().unwrap().port();
    std::thread::scope(|scope| {
        let each = two().into_iter().enumerate().map(|(rank, device)| {
            let (listener, f) = (listener.take(), &f);
            scope.spawn(move || {
                let group = Group::connect(&Place::local(rank, 2, port), listener).unwrap();
                group.attach(&device).unwrap();
                f(group, device)
            })
        });
        let each: Vec<_> = each.collect();
        each.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

#[test]
#[ignore = "needs two GPUs and NCCL"]
fn sums_over_gpus_are_those_of_the_cpu() {
    let _alone = alone();
    // R1 and R2 of LLaMA-2-7B are 17.3 million numbers, those of 70B 68.4 million; odd lengths begin between boundaries.
    let of = |rank: u64, n: usize, dtype: DType| ops::randn([n], 10 * n as u64 + rank).to_dtype(dtype).unwrap();
    for dtype in [DType::F32, DType::F64] {
        for shape in [vec![1], vec![3, 1001, 7], vec![1 << 20]] {
            let want: Vec<Vec<f64>> = shape
                .iter()
                .map(|&n| {
                    let (a, b) = (of(0, n, dtype), of(1, n, dtype));
                    Tensor::axpby(1.0, a, 1.0, b).unwrap().to_f64_vec().unwrap()
                })
                .collect();
            let found = on_both(|group, device| {
                let parts = shape.iter().map(|&n| of(group.rank() as u64, n, dtype).to_device(&device).unwrap()).collect();
                let sums = group.all_reduce_packed("a sum", parts).unwrap();
                sums.iter().map(|sum| sum.to_f64_vec().unwrap()).collect::<Vec<_>>()
            });
            // Of two numbers there is one sum.
            assert!(found.iter().all(|sums| *sums == want), "{dtype}, {shape:?}");
        }
    }
    for n in [17_301_504, 68_419_584] {
        let times = on_both(|group, device| {
            let mut x = Tensor::zeros([n], DType::F32, &device).unwrap();
            let mut best = f64::INFINITY;
            for _ in 0..10 {
                group.any("a start", false).unwrap();
                let start = Instant::now();
                x = group.all_reduce("a sum", x).unwrap();
                x.slice(0, 1).unwrap().to_f64_vec().unwrap(); // waits
                best = best.min(start.elapsed().as_secs_f64());
            }
            best
        });
        println!("all-reduce of {n} f32: {:.2} ms", 1e3 * times[0]);
    }
}

#[test]
#[ignore = "needs two GPUs and NCCL"]
fn rows_over_gpus_are_those_of_the_cpu() {
    let _alone = alone();
    let of = |rank: u64, n: usize, dtype: DType| ops::randn([2 * n, 24], 10 * n as u64 + rank).to_dtype(dtype).unwrap();
    let values = |t: Tensor| t.to_f64_vec().unwrap();
    for dtype in [DType::F64, DType::F32, DType::F16, DType::BF16] {
        for n in [1, 3, 1001] {
            let found = on_both(|group, device| {
                let x = of(group.rank() as u64, n, dtype).to_device(&device).unwrap();
                let part = x.slice(0, n).unwrap();
                (values(group.all_gather("rows", part).unwrap()), values(group.reduce_scatter("sums", x).unwrap()))
            });
            let (a, b) = (of(0, n, dtype), of(1, n, dtype));
            let all = [a.slice(0, n).unwrap(), b.slice(0, n).unwrap()].map(values).concat();
            // Of two numbers there is one sum.
            let sums = values(Tensor::axpby(1.0, a, 1.0, b).unwrap());
            for (rank, (gathered, part)) in found.iter().enumerate() {
                assert!(*gathered == all, "{dtype}, {n} rows gathered at rank {rank}");
                assert!(*part == sums[24 * n * rank..][..24 * n], "{dtype}, sums of {n} rows at rank {rank}");
            }
        }
    }
    // gate of LLaMA-2-7B and of 70B.
    for [rows, cols] in [[11008, 4096], [28672, 8192]] {
        let times = on_both(|group, device| {
            let mut best = [f64::INFINITY; 2];
            let x = Tensor::zeros([rows, cols], DType::BF16, &device).unwrap();
            let mut timed = |which: usize, f: &dyn Fn(&Tensor) -> Tensor| {
                for _ in 0..10 {
                    group.any("a start", false).unwrap();
                    let start = Instant::now();
                    f(&x).slice(0, 1).unwrap().to_f64_vec().unwrap(); // waits
                    best[which] = best[which].min(start.elapsed().as_secs_f64());
                }
            };
            timed(0, &|x| group.all_gather("rows", x.slice(0, rows / 2).unwrap()).unwrap());
            timed(1, &|x| group.reduce_scatter("sums", x.clone()).unwrap());
            best
        });
        let [gather, scatter] = times[0];
        let rate = |seconds: f64| (rows * cols) as f64 / seconds / 1e9; // 2 bytes a value, of which one half comes from elsewhere
        println!(
            "[{rows}, {cols}] bf16: gathered in {:.3} ms ({:.0} GB/s), summed and shared out in {:.3} ms ({:.0} GB/s)",
            1e3 * gather,
            rate(gather),
            1e3 * scatter,
            rate(scatter)
        );
    }
}

/// Loss and gradients of R1 and R2 summed over ranks, of each rank's tokens, rows of weights shared by `rows`.
fn pass(m: &Llama, r: &Rotations, (scheme, plan): (&Scheme, Plan), (ranks, rows): (&Group, &Group)) -> (f64, Vec<Tensor>) {
    let tokens = synthetic::text(&m.config, 4, 512, 5).unwrap();
    let tape = Tape::new();
    let vars = RotationVars { rows: rows.clone(), ..RotationVars::variables(&tape, r).unwrap() };
    let loss = m.loss(&vars, &tokens.batch(&[ranks.rank(), 2 + ranks.rank()]), 512, scheme, Recompute::Planned(plan)).unwrap();
    let value = loss.value().item().unwrap();
    let grads = vars.gradients(&mut tape.backward(loss).unwrap()).unwrap();
    (value, ranks.all_reduce_packed("gradients", grads).unwrap())
}

#[test]
#[ignore = "needs two GPUs and NCCL"]
fn rows_that_gpus_share_make_the_network_and_the_gradients_of_one() {
    let _alone = alone();
    let bits = |all: &[Tensor]| all.iter().flat_map(|t| t.to_f64_vec().unwrap()).map(f64::to_bits).collect::<Vec<_>>();
    for (dtype, plan, engine) in [
        (DType::F32, Plan::KEEP_ALL, Engine::Simulated),
        (DType::BF16, Plan::KEEP_ALL, Engine::Simulated),
        (DType::BF16, Plan::KEEP_ALL, Engine::Integer),
        (DType::BF16, Plan::INPUTS, Engine::Simulated),
        (DType::BF16, Plan { recompute: 1, keep_weights: true, sequences: 1 }, Engine::Integer),
    ] {
        for scheme in [Scheme::new(4, 4, 4), Scheme::new(16, 4, 4)] {
            let found = on_both(|group, device| {
                let config = synthetic::shape("llama-3.2-1b:2").unwrap();
                let m = synthetic::model(&config, 3, dtype, &device).unwrap().by(engine);
                let r = Rotations::random_hadamard(m.config.hidden_size, m.config.head_dim, m.config.layers, 7).unwrap();
                let r = r.to_device(&device).unwrap().to_dtype(DType::F32).unwrap();
                let of = |rows| pass(&m, &r, (&scheme, plan), (&group, rows));
                let (whole, shared, again) = (of(Group::nobody()), of(&group), of(&group));
                assert!(bits(&shared.1) == bits(&again.1), "{dtype}, {scheme}: two passes differ");
                // Relative distances of the gradients.
                let far = |a: &Tensor, b: &Tensor| {
                    let (a, b) = (a.to_f64_vec().unwrap(), b.to_f64_vec().unwrap());
                    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
                    norm(&mut a.iter().zip(&b).map(|(a, b)| a - b)) / norm(&mut b.iter().copied())
                };
                let distances: Vec<f64> = shared.1.iter().zip(&whole.1).map(|(a, b)| far(a, b)).collect();
                (whole.0, shared.0, distances, bits(&shared.1))
            });
            println!(
                "{dtype}, {scheme}, {engine}, {plan:?}: loss {} and {}, gradients apart by {:?}",
                found[0].0, found[0].1, found[0].2
            );
            assert!(found[0].3 == found[1].3, "{dtype}, {scheme}: ranks have different gradients");
            for (whole, shared, distances, _) in &found {
                // A product of fewer rows may be another kernel's, whose sums have another order.
                assert!((whole - shared).abs() <= 2e-3 * whole.abs(), "{dtype}, {scheme}: {whole} and {shared}");
                let tolerance = if dtype == DType::F32 { 2e-3 } else { 2e-2 };
                assert!(distances.iter().all(|d| *d <= tolerance), "{dtype}, {scheme}: {distances:?}");
            }
        }
    }
}

/// What `spinquant learn` says and writes.
fn learn(out: &std::path::Path, args: &str) -> (Value, Vec<u8>) {
    let all = format!(
        "learn --model synthetic:llama-3.2-1b:2 --text synthetic:64 --seq-len 512 --batch 8 --steps 9 --held-out 8 --json {args}"
    );
    let ran = Command::new(env!("CARGO_BIN_EXE_spinquant")).args(all.split_whitespace()).arg("--out").arg(out).output().unwrap();
    assert!(ran.status.success(), "{args}: {}", String::from_utf8_lossy(&ran.stderr));
    (serde_json::from_slice(&ran.stdout).unwrap(), std::fs::read(out).unwrap())
}

#[test]
#[ignore = "needs two GPUs and NCCL"]
fn two_gpus_learn_what_one_does_and_repeat_it() {
    let _alone = alone();
    two();
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("R.safetensors");
    for recipe in ["--recipe published", "--recipe faithful", "--recipe faithful --scheme W16A4KV4"] {
        let (one, _) = learn(&out, recipe);
        let (first, bytes) = learn(&out, &format!("{recipe} --gpus 2"));
        let (_, again) = learn(&out, &format!("{recipe} --gpus 2"));
        assert!(bytes == again, "{recipe}: two runs on two GPUs differ");
        let (_, turned) = learn(&out, &format!("{recipe} --gpus 1,0"));
        assert!(bytes == turned, "{recipe}: it matters which GPU is which");
        for name in ["loss_first", "held_out_first", "kl_first", "loss_last", "held_out_last"] {
            let (a, b) = (one[name].as_f64().unwrap(), first[name].as_f64().unwrap());
            println!("{recipe}, {name}: {a:.6} on one GPU, {b:.6} on two");
            // What follows from the first step spreads its rounding.
            let tolerance = if name.ends_with("first") { 1e-3 } else { 2e-2 };
            assert!((a - b).abs() <= tolerance * a.abs(), "{recipe}, {name}: {a} and {b}");
        }
    }
}

#[test]
#[ignore = "needs two GPUs and NCCL"]
fn a_gpu_without_memory_ends_all_ranks_with_its_message() {
    let _alone = alone();
    let [_, second] = two();
    // All but a little of the second one is taken.
    let mut taken = vec![];
    for size in [8usize << 30, 1 << 30, 128 << 20] {
        while second.card().unwrap().unwrap().free > size + (512 << 20) {
            taken.push(Tensor::zeros([size / 4], DType::F32, &second).unwrap());
        }
    }
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("R.safetensors");
    let args = "learn --model synthetic:llama-3.2-1b --text synthetic:64 --seq-len 512 --batch 8 --micro-batch 4 --steps 9 --gpus 2 \
                --recipe published";
    let start = Instant::now();
    let ran =
        Command::new(env!("CARGO_BIN_EXE_spinquant")).args(args.split_whitespace()).arg("--out").arg(&out).output().unwrap();
    let said = String::from_utf8_lossy(&ran.stderr).into_owned();
    println!("{:.1} s: {said}", start.elapsed().as_secs_f64());
    let errors: Vec<&str> = said.lines().filter(|line| line.starts_with("error:")).collect();
    assert!(!ran.status.success() && !out.exists(), "{said}");
    assert!(errors.len() == 1 && errors[0].starts_with("error: rank 1: ") && errors[0].contains("memory"), "{said}");
    // The start of both, and no longer than the end of all may take.
    assert!(start.elapsed().as_secs() < 60, "{:?}", start.elapsed());
    drop(taken);
}
