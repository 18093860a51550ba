//! Layers of the size of LLaMA-2-7B on a GPU: does 16-bit arithmetic change the answer?

use spinquant::linalg::matmul::product;
use spinquant::llama::{Block, Llama, Recompute, RotationVars, synthetic};
use spinquant::quant::{Engine, Scheme};
use spinquant::rotation::Rotations;
use spinquant::{DType, Device, Tape, Tensor};

use crate::common::need::gpu;

/// One layer of LLaMA-2-7B in bf16, and the same weights in f32.
fn models(device: &Device) -> (Llama, Llama) {
    let config = synthetic::shape("llama-2-7b:1").unwrap();
    let narrow = synthetic::model(&config, 0, DType::BF16, device).unwrap();
    let wide = |t: &Tensor| t.to_dtype(DType::F32);
    let blocks = narrow.blocks.iter().map(|b| b.with_weights(b.weights.map(wide).unwrap()).into()).collect();
    let (embedding, head) = (wide(&narrow.embedding).unwrap(), wide(&narrow.head).unwrap());
    (Llama { config, embedding, head, blocks, engine: narrow.engine }, narrow)
}

/// As learning leaves them: dense, none of their values a round number. (Products of four random Hadamards; those of two are
/// multiples of 1/n.)
fn rotations(model: &Llama, device: &Device) -> Rotations {
    let c = &model.config;
    let make = |seed| Rotations::random_hadamard(c.hidden_size, c.head_dim, c.layers, seed).unwrap().to_device(device).unwrap();
    let times = |a: Tensor, b: &Tensor| product(&a, false, b, false, false, DType::F64).unwrap();
    let chain = |a: Rotations, b: Rotations| Rotations::new(times(a.r1, &b.r1), times(a.r2, &b.r2));
    (1..4).map(make).fold(make(0), chain).to_dtype(DType::F32).unwrap()
}

fn gradient(model: &Llama, rotations: &Rotations, scheme: &str) -> (f64, Vec<f64>) {
    let tape = Tape::new();
    let vars = RotationVars::variables(&tape, rotations).unwrap();
    let text = synthetic::text(&model.config, 2, 2048, 5).unwrap();
    let scheme: Scheme = scheme.parse().unwrap();
    let loss = model.loss(&vars, &text.batch(&[0, 1]), 2048, &scheme, Recompute::All).unwrap();
    let value = loss.value().item().unwrap();
    let mut grads = vars.gradients(&mut tape.backward(loss).unwrap()).unwrap();
    (value, grads.swap_remove(0).to_f64_vec().unwrap())
}

#[test]
#[ignore = "needs a GPU"]
fn gradients_in_bf16_point_where_those_in_f32_do() {
    let device = gpu();
    let (wide, narrow) = models(&device);
    let r = rotations(&wide, &device);
    // Quantised, a value that bf16 moves across the boundary between two codes moves by a sixteenth of its row's range, which is
    // noise of its own: no arithmetic with 8 bits comes closer, and these are bounds against something else going wrong.
    for (scheme, least) in [("W16A16KV16", 0.999), ("W16A4KV4", 0.97), ("W4A4KV4", 0.97)] {
        let ((a, x), (b, y)) = (gradient(&wide, &r, scheme), gradient(&narrow, &r, scheme));
        let dot = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(x, y)| x * y).sum::<f64>();
        let cosine = dot(&x, &y) / (dot(&x, &x) * dot(&y, &y)).sqrt();
        println!("{scheme}: loss {a:.5} in f32, {b:.5} in bf16; cosine of dR1 {cosine:.6}");
        assert!(cosine >= least, "{scheme}: cosine of dR1 {cosine}");
    }
}

/// Products of codes in the place of products of values: no further from f32 than those, and close to them.
#[test]
#[ignore = "needs a GPU"]
fn learning_on_integers_has_the_gradients_of_learning_on_values() {
    let device = gpu();
    let (wide, narrow) = models(&device);
    let r = rotations(&wide, &device);
    let integers = narrow.clone().by(Engine::Integer);
    let dot = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(x, y)| x * y).sum::<f64>();
    let cosine = |x: &[f64], y: &[f64]| dot(x, y) / (dot(x, x) * dot(y, y)).sqrt();
    for scheme in ["W4A4KV4", "W4A8KV4", "W8A8KV8"] {
        let ((a, exact), (b, values), (c, codes)) =
            (gradient(&wide, &r, scheme), gradient(&narrow, &r, scheme), gradient(&integers, &r, scheme));
        let (of_values, of_codes) = (cosine(&exact, &values), cosine(&exact, &codes));
        println!("{scheme}: loss {a:.5} in f32, {b:.5} on values, {c:.5} on codes; cosine of dR1 {of_values:.6}, {of_codes:.6}");
        assert_ne!(values, codes, "{scheme}: no product was of integers");
        assert!((b - c).abs() < 2e-3 * b, "{scheme}: loss {b} on values, {c} on codes");
        assert!(of_codes >= of_values - 0.01, "{scheme}: cosine {of_codes} on codes, {of_values} on values");
    }
}

#[test]
#[ignore = "needs a GPU"]
fn rotating_a_weight_costs_little_beside_rounding_it() {
    let device = gpu();
    let (_, model) = models(&device);
    let r = rotations(&model, &device);
    let scheme = Scheme::new(16, 4, 4);
    let sites = scheme.sites(model.config.head_dim);
    let block = &model.blocks[0];
    let rotate = |block: &Block, r: &Rotations| {
        let tape = Tape::new();
        let vars = RotationVars::constants(&tape, r).unwrap();
        let w = block.rotate(&vars.r1, &vars.r2[0], &sites, None).unwrap();
        w.into_values().tensors().map(|w| w.to_f64_vec().unwrap()).collect::<Vec<_>>()
    };
    let ours = rotate(block, &r);
    let exact =
        rotate(&block.with_weights(block.weights.map(|w| w.to_dtype(DType::F64)).unwrap()), &r.to_dtype(DType::F64).unwrap());
    for ((name, ours), exact) in spinquant::llama::Linear::ALL.iter().zip(&ours).zip(&exact) {
        let rounded =
            Tensor::from_vec(exact.clone(), [exact.len()]).unwrap().to_dtype(DType::BF16).unwrap().to_f64_vec().unwrap();
        let square = |x: &[f64]| x.iter().zip(exact).map(|(x, e)| (x - e) * (x - e)).sum::<f64>();
        let ratio = (square(ours) / square(&rounded) - 1.0).max(0.0).sqrt();
        println!("{name}: the rotation's rms error is {ratio:.3} of that of rounding to bf16");
        assert!(ratio <= 0.25, "{name}: {ratio}");
    }
}
