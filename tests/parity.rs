//! Fast CPU kernels against the f64 reference, and GPU kernels against both, on every operation's cases.

use spinquant::{DType, Device, check, ops};

fn all(device: &Device, dtypes: &[DType]) {
    for case in ops::cases() {
        for &dtype in dtypes {
            check::parity(&case, dtype, device).unwrap_or_else(|e| panic!("{e}"));
        }
    }
}

#[test]
fn cpu() {
    all(&Device::Cpu, &[DType::F32, DType::F16, DType::BF16]);
}

#[test]
fn gpu() {
    match Device::cuda(0) {
        Ok(device) => all(&device, &[DType::F32, DType::F16, DType::BF16]),
        Err(e) => println!("skipped: {e}"),
    }
}
