//! Synthetic models.

use spinquant::llama::synthetic;
use spinquant::{DType, Device};

use crate::common::need::gpu;

#[test]
#[ignore = "needs a GPU"]
fn the_same_on_a_gpu() {
    let device = gpu();
    let config = synthetic::shape("tiny").unwrap();
    for dtype in [DType::F32, DType::BF16, DType::F16] {
        let here = synthetic::model(&config, 7, dtype, &Device::Cpu).unwrap();
        let there = synthetic::model(&config, 7, dtype, &device).unwrap();
        let pairs = here.blocks.iter().zip(&there.blocks).flat_map(|(a, b)| a.weights.tensors().zip(b.weights.tensors()));
        for (a, b) in pairs.chain([(&here.embedding, &there.embedding)]) {
            assert_eq!(a.to_f64_vec().unwrap(), b.to_f64_vec().unwrap(), "{dtype} {:?}", a.shape());
        }
    }
}
