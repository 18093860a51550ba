//! Every family against transformers, as on the CPU.

use crate::common::families::{cache_and_packing, full_precision, gradients, rotated};
use crate::common::need::gpu;

#[test]
#[ignore = "needs a GPU"]
fn full_precision_on_a_gpu() {
    full_precision(&gpu());
}

#[test]
#[ignore = "needs a GPU"]
fn rotated_on_a_gpu() {
    rotated(&gpu());
}

#[test]
#[ignore = "needs a GPU"]
fn gradients_on_a_gpu() {
    gradients(&gpu());
}

#[test]
#[ignore = "needs a GPU"]
fn cache_and_packing_on_a_gpu() {
    cache_and_packing(&gpu());
}
