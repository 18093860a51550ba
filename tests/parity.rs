//! Fast CPU kernels against the f64 reference, and GPU kernels against both, on every operation's cases.

use spinquant::linalg;
use spinquant::manifold::Orthogonal;
use spinquant::optim::{self, CayleySgd, Mode, Optimizer};
use spinquant::{DType, Device, Tensor, check, ops};

fn all(device: &Device, dtypes: &[DType]) {
    for case in ops::cases() {
        for &dtype in dtypes {
            check::parity(&case, dtype, device).unwrap_or_else(|e| panic!("{e}"));
        }
    }
}

#[test]
fn cpu() {
    all(&Device::Cpu, &[DType::F32, DType::F16, DType::BF16]);
}

#[test]
fn gpu() {
    match Device::cuda(0) {
        Ok(device) => all(&device, &[DType::F32, DType::F16, DType::BF16]),
        Err(e) => println!("skipped: {e}"),
    }
}

/// A Cayley step, stabilised and audited, against the CPU's in f64.
fn cayley(device: &Device, sizes: &[(usize, usize, f64)]) {
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

const SMALL: [(usize, usize, f64); 5] = [(1, 384, 1.5), (6, 64, 1.5), (3, 33, 0.01), (1, 1, 1.0), (2, 128, 0.1)];

#[test]
fn cayley_on_the_cpu() {
    cayley(&Device::Cpu, &SMALL);
}

#[test]
fn cayley_on_the_gpu() {
    match Device::cuda(0) {
        // From 1024 on, multiples of 16 are multiplied by split operands.
        Ok(device) => cayley(&device, &[&SMALL[..], &[(1, 1040, 1.5), (2, 1024, 0.3)]].concat()),
        Err(e) => println!("skipped: {e}"),
    }
}

/// Every other optimiser against the CPU's in f64, on the manifold.
fn optimizers(device: &Device) {
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

#[test]
fn optimizers_on_the_cpu() {
    optimizers(&Device::Cpu);
}

#[test]
fn optimizers_on_the_gpu() {
    match Device::cuda(0) {
        Ok(device) => optimizers(&device),
        Err(e) => println!("skipped: {e}"),
    }
}

/// The residual of a Gram matrix from exact integer products, against f64: near a rotation, and of columns of very unequal values.
#[test]
fn gram_residual_on_the_gpu() {
    let device = match Device::cuda(0) {
        Ok(device) => device,
        Err(e) => return println!("skipped: {e}"),
    };
    let n = 1040;
    let rotation = Orthogonal.random_hadamard(1, 1024, 3).unwrap().to_dtype(DType::F32).unwrap();
    let noise = |n: usize, seed| ops::randn([2, n, n], seed);
    let mut uneven = noise(n, 5).to_f64_vec().unwrap();
    for (i, v) in uneven.iter_mut().enumerate() {
        // Columns of norm about 1, a few large values and many small.
        *v = if i % 97 == i % n % 97 { *v / 4.0 } else { *v / 256.0 };
    }
    let uneven = Tensor::from_vec(uneven, [2, n, n]).unwrap().to_dtype(DType::F32).unwrap();
    for x in [rotation, uneven] {
        let (e, worst) = linalg::gram_residual(&x.to_device(&device).unwrap()).unwrap();
        let (exact, worst_exact) = linalg::gram_residual(&x.to_dtype(DType::F64).unwrap()).unwrap();
        let (e, exact) = (e.to_device(&Device::Cpu).unwrap().to_f64_vec().unwrap(), exact.to_f64_vec().unwrap());
        // The result is f32.
        let error = e.iter().zip(&exact).map(|(a, b)| (a - b).abs() / (1.0 + b.abs() / 1.2)).fold(0f64, f64::max);
        println!("largest residual {worst_exact:?}, error {error:.1e}");
        assert!(error <= 1e-7 && e.iter().all(|v| v.is_finite()), "{error:e}");
        assert!(worst.iter().zip(&worst_exact).all(|(a, b)| (a - b).abs() <= 1e-7 * (1.0 + b)), "{worst:?} {worst_exact:?}");
    }
    let bad = Tensor::from_vec(vec![f32::NAN; 1024 * 1024], [1, 1024, 1024]).unwrap().to_device(&device).unwrap();
    assert!(linalg::gram_residual(&bad).unwrap().1[0].is_nan());
}

/// The same step twice gives the same bits on a GPU.
#[test]
fn gpu_repeats_itself() {
    let device = match Device::cuda(0) {
        Ok(device) => device,
        Err(e) => return println!("skipped: {e}"),
    };
    for case in ops::cases() {
        for dtype in [DType::F32, DType::BF16] {
            let run = || {
                let e = check::evaluate(&case, dtype, &device).unwrap();
                [vec![e.value], e.gradients].concat().iter().map(|t| t.to_f64_vec().unwrap()).collect::<Vec<_>>()
            };
            let bits = |v: Vec<Vec<f64>>| v.concat().iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            assert!(bits(run()) == bits(run()), "{case:?} in {dtype} differs between runs");
        }
    }
}
