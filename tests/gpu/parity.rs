//! GPU kernels against the f64 reference and an equally imprecise CPU baseline, on every operation's cases.

use spinquant::linalg;
use spinquant::manifold::Orthogonal;
use spinquant::{DType, Device, Tensor, check, ops};

use crate::common::need::gpu;
use crate::common::parity;

#[test]
#[ignore = "needs a GPU"]
fn every_operation() {
    parity::all(&gpu());
}

#[test]
#[ignore = "needs a GPU"]
fn segment_attention() {
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        ops::segment_attention::check_problems(dtype, &gpu()).unwrap();
    }
}

#[test]
#[ignore = "needs a GPU"]
fn cayley() {
    // From 1024 on, multiples of 16 are multiplied by split operands.
    parity::cayley(&gpu(), &[&parity::SMALL[..], &[(1, 1040, 1.5), (2, 1024, 0.3)]].concat());
}

#[test]
#[ignore = "needs a GPU"]
fn optimizers() {
    parity::optimizers(&gpu());
}

/// The residual of a Gram matrix from exact integer products, against f64: near a rotation, and of columns of very unequal values.
#[test]
#[ignore = "needs a GPU"]
fn gram_residual_on_the_gpu() {
    let device = gpu();
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
#[ignore = "needs a GPU"]
fn gpu_repeats_itself() {
    let device = gpu();
    for case in ops::cases().into_iter().filter(|c| c.size != ops::Size::Timed) {
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
