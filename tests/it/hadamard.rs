//! Hadamard transforms of many rows.

use spinquant::Device;

use crate::common::rows::rows_alone;

#[test]
fn rows_alone_on_the_cpu() {
    rows_alone(&Device::Cpu, 20, &[344, 4096, 8960]);
}
