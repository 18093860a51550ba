//! What several test programs share.
#![allow(dead_code)] // every test program uses its part

pub mod choices;
pub mod families;
pub mod follow;
pub mod golden;
pub mod gptq;
pub mod need;
pub mod networks;
pub mod parity;
pub mod rows;
pub mod tiny;

use spinquant::llama::Merged;
use spinquant::{DType, Tensor};

pub use golden::{Golden, distance, number};

/// The same bits in every weight.
pub fn same_weights(a: &Merged, b: &Merged) {
    let all = |m: &Merged| -> Vec<(DType, Vec<u64>)> {
        let layers = m.blocks.iter().flat_map(|b| b.weights.tensors());
        let of = |t: &Tensor| (t.dtype(), t.to_f64_vec().unwrap().iter().map(|x| x.to_bits()).collect());
        [&m.embedding, &m.head].into_iter().chain(layers).map(of).collect()
    };
    assert!(all(a) == all(b), "weights differ");
}
