//! GPU kernels against the f64 reference and an equally imprecise CPU baseline, on every operation's cases.

use std::ops::ControlFlow;

use spinquant::calibrate::search_weight_clips;
use spinquant::linalg;
use spinquant::llama::synthetic::shape;
use spinquant::llama::{Llama, LlamaConfig, Recompute, RotationVars, Weights};
use spinquant::manifold::Orthogonal;
use spinquant::ops::kl_divergence::token_divergences;
use spinquant::quant::Scheme;
use spinquant::rotation::{Rotations, Scale, Scales, WeightClips};
use spinquant::{DType, Device, Tape, Tensor, check, ops};

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

/// Divergences of tokens and the likeliest of them, in every type, beside the CPU's of the same values.
#[test]
#[ignore = "needs a GPU"]
fn divergences_of_tokens() {
    let device = gpu();
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        let x = ops::randn([70, 1003], 1);
        let teacher = Tensor::axpby(1.0, x.clone(), 0.3, ops::randn([70, 1003], 2)).unwrap();
        let [x, teacher] = [x, teacher].map(|t| t.to_dtype(dtype).unwrap());
        let (want, same) = token_divergences(&x, &teacher).unwrap();
        let (got, agree) = token_divergences(&x.to_device(&device).unwrap(), &teacher.to_device(&device).unwrap()).unwrap();
        assert!(got.iter().zip(&want).all(|(a, b)| (a - b).abs() < 1e-5 * (1.0 + b)), "{dtype}");
        assert!(agree == same && same.contains(&true) && same.contains(&false), "{dtype}");
    }
}

/// Scales merged on a GPU, in f64, are those merged on the CPU.
#[test]
#[ignore = "needs a GPU"]
fn scales_merged() {
    let config = LlamaConfig { layers: 1, ..shape("tiny").unwrap() };
    let model = Llama::new(config.clone(), Weights::random(&config, 1).unwrap()).unwrap();
    let scales = Scales::ones(&Scale::ALL, &config.scale_sizes()).unwrap();
    let scales = scales.map(|kind, t| ops::randn(t.shape(), 3 + kind as u64).scale(0.3)).unwrap();
    let r = Rotations::random_hadamard(config.hidden_size, config.head_dim, 1, 2).unwrap();
    // Everything there is: an R2 and an R2b of every head too.
    let r = r.per_head(config.kv_heads, Some(5)).unwrap().with_scales(scales);
    let r = Rotations { r2b: Some(r.clone().r2), ..r };
    let scheme = Scheme::FULL_PRECISION;
    let cast = |t: &Tensor| t.to_dtype(DType::F32).unwrap();
    let layers = model.blocks.iter().map(|b| b.weights.map(|t| Ok(cast(t))).unwrap()).collect();
    let weights = Weights { embedding: cast(&model.embedding), head: cast(&model.head), layers };
    let model = Llama::new(config, weights).unwrap();
    let want = model.merge(Some(&r), &scheme).unwrap();
    let got = model.to_device(&gpu()).unwrap().merge(Some(&r), &scheme).unwrap();
    for (a, b) in got.blocks[0].weights.tensors().zip(want.blocks[0].weights.tensors()) {
        let (a, b) = (a.to_f64_vec().unwrap(), b.to_f64_vec().unwrap());
        assert!(a.iter().zip(&b).all(|(a, b)| (a - b).abs() <= 2e-7 * (b.abs() + 1e-3)));
    }
}

/// A network whose weights have learned clip ratios: loss, gradients and what is merged, on a GPU and on the CPU in f32. Every layer that is
/// computed again gives the same bits.
#[test]
#[ignore = "needs a GPU"]
fn learned_clip_ratios_of_weights() {
    let config = LlamaConfig { layers: 2, ..shape("tiny").unwrap() };
    let wide = Llama::new(config.clone(), Weights::random(&config, 1).unwrap()).unwrap();
    let cast = |t: &Tensor| t.to_dtype(DType::F32).unwrap();
    let layers = wide.blocks.iter().map(|b| b.weights.map(|t| Ok(cast(t))).unwrap()).collect();
    let model = Llama::new(config.clone(), Weights { embedding: cast(&wide.embedding), head: cast(&wide.head), layers }).unwrap();
    let there = model.clone().to_device(&gpu()).unwrap();
    let scheme = Scheme::new(4, 16, 16);
    let start = Rotations::random_hadamard(config.hidden_size, config.head_dim, 2, 2).unwrap();
    let search = |m: &Llama| search_weight_clips(m, &start, &scheme, |_, _| ControlFlow::Continue(())).unwrap();
    let (found, found_there) = (search(&model), search(&there));
    let all = |clips: &WeightClips| clips.iter().flat_map(|(_, t)| t.to_f64_vec().unwrap()).collect::<Vec<f64>>();
    let differ = all(&found).iter().zip(&all(&found_there)).filter(|(a, b)| a != b).count();
    assert!(differ <= all(&found).len() / 20, "{differ} ratios differ");
    let r = start.with_weight_clips(Some(found)).to_dtype(DType::F32).unwrap();
    let tokens: Vec<u32> = (0..64).map(|i| (i * 7 % config.vocab_size) as u32).collect();
    let step = |m: &Llama, recompute| {
        let (tape, r) = (Tape::new(), r.to_device(&m.device()).unwrap());
        let vars = RotationVars::variables(&tape, &r).unwrap();
        let loss = m.loss(&vars, &tokens, 32, &scheme, recompute).unwrap();
        let value = loss.value().item().unwrap();
        let mut grads = tape.backward(loss).unwrap();
        let clips = all(&vars.weight_clip_gradients(&mut grads).unwrap().unwrap());
        let rotations = vars.gradients(&mut grads).unwrap();
        (value, clips, rotations.iter().flat_map(|t| t.to_f64_vec().unwrap()).collect::<Vec<_>>())
    };
    let (cpu, gpu) = (step(&model, Recompute::None), step(&there, Recompute::None));
    assert!((cpu.0 / gpu.0 - 1.0).abs() < 1e-3, "{} {}", cpu.0, gpu.0);
    let norm = |x: &[f64]| x.iter().map(|x| x * x).sum::<f64>().sqrt();
    for (name, a, b) in [("ratios", &cpu.1, &gpu.1), ("rotations", &cpu.2, &gpu.2)] {
        let apart: Vec<f64> = a.iter().zip(b).map(|(a, b)| a - b).collect();
        println!("{name}: {:.1e} apart", norm(&apart) / norm(a));
        // A weight at a tie may take another code.
        assert!(norm(&apart) < 0.02 * norm(a), "{name}: {:e}", norm(&apart) / norm(a));
    }
    assert_eq!(step(&there, Recompute::All), gpu);
    // A pass for one group alone forms the same bits.
    let r_there = r.to_device(&there.device()).unwrap();
    let backward = |vars: &RotationVars<'_>, tape: &Tape, recompute| {
        let loss = there.loss(vars, &tokens, 32, &scheme, recompute).unwrap();
        tape.backward(loss).unwrap()
    };
    for recompute in [Recompute::None, Recompute::All] {
        let tape = Tape::new();
        let vars = RotationVars::of_clips(&tape, &r_there).unwrap();
        let mut grads = backward(&vars, &tape, recompute);
        assert_eq!(all(&vars.weight_clip_gradients(&mut grads).unwrap().unwrap()), gpu.1);
        let tape = Tape::new();
        let vars = RotationVars::of_transforms(&tape, &r_there).unwrap();
        let mut grads = backward(&vars, &tape, recompute);
        let rotations = vars.gradients(&mut grads).unwrap();
        assert_eq!(rotations.iter().flat_map(|t| t.to_f64_vec().unwrap()).collect::<Vec<_>>(), gpu.2);
    }
    let merged = |m: &Llama| m.merge(Some(&r), &scheme).unwrap();
    let (a, b) = (merged(&model), merged(&there));
    for (a, b) in a.blocks.iter().zip(&b.blocks).flat_map(|(a, b)| a.weights.tensors().zip(b.weights.tensors())) {
        let (a, b) = (a.to_f64_vec().unwrap(), b.to_f64_vec().unwrap());
        let apart: Vec<f64> = a.iter().zip(&b).map(|(a, b)| a - b).collect();
        assert!(norm(&apart) < 0.01 * norm(&a), "{:e}", norm(&apart) / norm(&a));
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
