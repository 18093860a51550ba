//! Random numbers from explicit seeds.

use rand::{RngExt, SeedableRng};

use crate::Tensor;

/// Standard normal `f64` values from a seed, for cases and tests.
pub fn randn(shape: impl Into<Vec<usize>>, seed: u64) -> Tensor {
    let shape = shape.into();
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
    let values = (0..shape.iter().product()).map(|_| normal(&mut rng)).collect();
    Tensor::from_vec(values, shape).expect("as many values as the shape asks for")
}

/// One standard normal number (Box & Muller 1958).
pub fn normal(rng: &mut impl rand::Rng) -> f64 {
    let u: f64 = 1.0 - rng.random::<f64>();
    let v: f64 = rng.random();
    (-2.0 * u.ln()).sqrt() * (2.0 * std::f64::consts::PI * v).cos()
}
