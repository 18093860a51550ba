//! Kernels and optimisers on a device against the f64 reference.

use spinquant::manifold::Orthogonal;
use spinquant::optim::{self, CayleySgd, Mode, Optimizer};
use spinquant::{DType, Device, check, ops};

/// Every operation's cases; says of all that differ.
pub fn all(device: &Device) {
    let mut failed = vec![];
    for case in ops::cases().into_iter().filter(|c| c.size != ops::Size::Timed) {
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            failed.extend(check::parity(&case, dtype, device).err().map(|e| e.to_string()));
        }
    }
    assert!(failed.is_empty(), "{} cases: {}", failed.len(), failed.join("\n"));
}

/// A Cayley step, stabilised and audited, against the CPU's in f64.
pub fn cayley(device: &Device, sizes: &[(usize, usize, f64)]) {
    for &(k, n, lr) in sizes {
        for mode in [Mode::Parity, Mode::Default] {
            let start = Orthogonal.random_hadamard(k, n, 7).unwrap().to_dtype(DType::F32).unwrap();
            let gradient = ops::randn([k, n, n], 8).to_dtype(DType::F32).unwrap();
            let step = |dtype: DType, device: &Device| {
                let mut params = [start.to_dtype(dtype).unwrap().to_device(device).unwrap()];
                let mut optimizer = CayleySgd::new(mode);
                for _ in 0..3 {
                    let g = gradient.to_dtype(dtype).unwrap().to_device(device).unwrap();
                    optimizer.step(&mut params, vec![g], lr).unwrap();
                }
                let [x] = params;
                (x.to_device(&Device::Cpu).unwrap().to_f64_vec().unwrap(), optimizer.orthogonality_error())
            };
            let (exact, _) = step(DType::F64, &Device::Cpu);
            let (ours, audit) = step(DType::F32, device);
            let larger = |m: f64, e: f64| if e > m || e.is_nan() { e } else { m };
            let error = ours.iter().zip(&exact).map(|(a, b)| (a - b).abs()).fold(0f64, larger);
            println!("{k} x {n}, lr {lr}, {mode:?} on {device}: error {error:.1e}, drift {audit:.1e}");
            assert!(error <= 1e-5, "{k} x {n}, lr {lr}, {mode:?} on {device}: error {error:e}");
            assert!(mode == Mode::Parity || audit <= 1e-6, "{k} x {n} on {device}: drift {audit:e}");
        }
    }
}

/// Count, size and rate.
pub const SMALL: [(usize, usize, f64); 5] = [(1, 384, 1.5), (6, 64, 1.5), (3, 33, 0.01), (1, 1, 1.0), (2, 128, 0.1)];

/// Every other optimiser against the CPU's in f64, on the manifold.
pub fn optimizers(device: &Device) {
    for (k, n) in [(1, 384), (6, 64), (3, 33), (1, 1)] {
        for name in optim::all().iter().map(|o| o.name()).filter(|name| !name.starts_with("cayley")) {
            let start = Orthogonal.random_hadamard(k, n, 7).unwrap().to_dtype(DType::F32).unwrap();
            let run = |dtype: DType, device: &Device| {
                let mut params = [start.to_dtype(dtype).unwrap().to_device(device).unwrap()];
                let mut optimizer = optim::by_name(name).unwrap();
                for step in 0..3 {
                    let g = ops::randn([k, n, n], 8 + step).to_dtype(DType::F32).unwrap();
                    optimizer.step(&mut params, vec![g.to_dtype(dtype).unwrap().to_device(device).unwrap()], 0.02).unwrap();
                }
                let [x] = params;
                (x.to_device(&Device::Cpu).unwrap().to_f64_vec().unwrap(), optimizer.orthogonality_error())
            };
            let ((exact, _), (ours, audit)) = (run(DType::F64, &Device::Cpu), run(DType::F32, device));
            let larger = |m: f64, e: f64| if e > m || e.is_nan() { e } else { m };
            let error = ours.iter().zip(&exact).map(|(a, b)| (a - b).abs()).fold(0f64, larger);
            println!("{k} x {n}, {name} on {device}: error {error:.1e}, drift {audit:.1e}");
            assert!(error <= 1e-5 && audit <= 1e-6, "{k} x {n}, {name} on {device}: error {error:e}, drift {audit:e}");
        }
    }
}
