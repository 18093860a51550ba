//! Whole random networks in f32 against f64.

use crate::common::need::gpu;
use crate::common::networks::f32_against_f64;

#[test]
#[ignore = "needs a GPU"]
fn f32_on_a_gpu() {
    f32_against_f64(&gpu());
}
