//! Fast CPU kernels against the f64 reference, on every operation's cases.

use spinquant::Device;

use crate::common::parity;

#[test]
fn cpu() {
    parity::all(&Device::Cpu);
}

#[test]
fn cayley_on_the_cpu() {
    parity::cayley(&Device::Cpu, &parity::SMALL);
}

#[test]
fn optimizers_on_the_cpu() {
    parity::optimizers(&Device::Cpu);
}
