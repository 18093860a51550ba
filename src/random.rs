//! Random numbers from explicit seeds.

use std::collections::BTreeMap;
use std::sync::Mutex;

use rand::{RngExt, SeedableRng};

use crate::{DType, Device, Error, Result, Tensor};

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

/// Values that [`repeated`] draws; longer tensors repeat them.
const BLOCK: usize = 1 << 20;

/// Normal values from a seed, for benches: the first 2^20 are drawn and longer tensors repeat them, made where they are wanted.
///
/// # Errors
/// No memory for them.
pub fn repeated(shape: impl Into<Vec<usize>>, seed: u64, dtype: DType, device: &Device) -> Result<Tensor> {
    static BLOCKS: Mutex<BTreeMap<u64, Tensor>> = Mutex::new(BTreeMap::new());
    let shape = shape.into();
    let len = shape.iter().try_fold(1usize, |n, &extent| n.checked_mul(extent));
    let len = len.ok_or_else(|| Error::shape("random values", "of at most 2^64 values", &shape))?;
    let block = {
        let mut blocks = BLOCKS.lock().unwrap_or_else(|e| e.into_inner());
        blocks.entry(seed).or_insert_with(|| randn([BLOCK], seed)).clone()
    };
    let block = block.slice(0, len.min(BLOCK))?.to_dtype(dtype)?.to_device(device)?;
    let all = Tensor::stack(&vec![block; len.div_ceil(BLOCK).max(1)])?;
    let values = all.len();
    all.reshape([values])?.slice(0, len)?.reshape(shape)
}
