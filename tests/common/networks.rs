//! Random small networks of several architectures and schemes.

use spinquant::llama::{Llama, LlamaConfig, Weights};
use spinquant::quant::{Clip, Scheme};
use spinquant::rotation::Rotations;
use spinquant::{DType, Device};

use super::follow::{Network, compare};
use super::tiny;

/// `[hidden, MLP, query heads, key heads, head]`
const SHAPES: [[usize; 5]; 4] = [[64, 256, 4, 2, 16], [48, 96, 3, 3, 16], [40, 72, 4, 1, 8], [33, 37, 2, 2, 12]];

/// A network in f64 on the CPU. Seeds are of weights, rotations and tokens.
pub fn network([hidden_size, intermediate_size, heads, kv_heads, head_dim]: [usize; 5], seed: u64) -> Network {
    let base = if seed.is_multiple_of(2) {
        tiny::config(heads, kv_heads, seed.is_multiple_of(3))
    } else {
        tiny::llama3(heads, kv_heads)
    };
    let config = LlamaConfig { hidden_size, intermediate_size, head_dim, ..base };
    let model = Llama::new(config.clone(), Weights::random(&config, seed).unwrap()).unwrap();
    let make = if seed.is_multiple_of(2) { Rotations::random_hadamard } else { Rotations::random_orthogonal };
    let rotations = make(hidden_size, head_dim, config.layers, seed).unwrap();
    let tokens = (0..48u64).map(|i| ((i * i * 7 + i * (seed + 3)) % config.vocab_size as u64) as u32).collect();
    Network { model, rotations, tokens, seq: 16 }
}

/// The same network in f32 on a device.
fn narrow(exact: &Network, device: &Device) -> Network {
    let cast = |t: &spinquant::Tensor| t.to_dtype(DType::F32)?.to_device(device);
    let m = &exact.model;
    let weights = Weights {
        embedding: cast(&m.embedding).unwrap(),
        head: cast(&m.head).unwrap(),
        layers: m.blocks.iter().map(|b| b.weights.map(cast).unwrap()).collect(),
    };
    let rotations = exact.rotations.to_dtype(DType::F32).unwrap().to_device(device).unwrap();
    let model = Llama::new(m.config.clone(), weights).unwrap();
    Network { model, rotations, tokens: exact.tokens.clone(), seq: exact.seq }
}

/// f32 on a device against f64.
pub fn f32_against_f64(device: &Device) {
    let weights = |bits, activations, kv| Scheme { weight_clip: Clip::Ratio(1.0), ..Scheme::new(bits, activations, kv) };
    let symmetric = Scheme { symmetric_activations: true, ..weights(4, 8, 8) };
    let searched = [Scheme::new(4, 8, 8), Scheme { symmetric_weights: false, ..Scheme::new(3, 8, 16) }];
    let schemes = [symmetric, weights(4, 4, 4), weights(3, 8, 16), Scheme::FULL_PRECISION].into_iter().chain(searched);
    let schemes: Vec<_> = schemes.collect();
    for (i, shape) in SHAPES.into_iter().enumerate() {
        for seed in 0..4 {
            let exact = network(shape, 10 * i as u64 + seed);
            let ours = narrow(&exact, device);
            for scheme in &schemes {
                compare(&ours, &exact, scheme, &format!("{shape:?}, seed {seed}, {scheme} on {device}"));
            }
        }
    }
}
