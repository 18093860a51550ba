//! Several GPUs: `cargo test --features cuda --test gpu ranks -- --include-ignored --nocapture`, on a machine with two and NCCL.

use std::net::TcpListener;
use std::process::Command;
use std::time::Instant;

use serde_json::Value;
use spinquant::ranks::{Group, Place};
use spinquant::{DType, Device, Tensor, ops};

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
