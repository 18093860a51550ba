//! Rows that do not touch each other.

use spinquant::hadamard::Hadamard;
use spinquant::ops::{hadamard, randn};
use spinquant::quant::QuantSpec;
use spinquant::{DType, Device, Tape, Tensor};

/// Up to nine rows of `[rows, n]`, the first and the last among them.
pub fn some_rows(rows: usize) -> Vec<usize> {
    let mut some: Vec<usize> = (0..=8).map(|i| i * (rows - 1) / 8).collect();
    some.dedup();
    some
}

/// One row of `[rows, n]`.
pub fn row(x: &Tensor, i: usize) -> Vec<f64> {
    x.slice(i, 1).unwrap().to_device(&Device::Cpu).unwrap().to_f64_vec().unwrap()
}

/// However many rows a call has, each comes out as it does alone.
pub fn rows_alone(device: &Device, rows: usize, sizes: &[usize]) {
    for dtype in [DType::BF16, DType::F16] {
        for &n in sizes {
            let map = Hadamard::new(n).unwrap();
            let quantised = |x: Tensor| {
                let tape = Tape::new();
                let y = tape.constant(x).hadamard_fake_quant(&QuantSpec::activation(4, false)).unwrap();
                y.value().clone()
            };
            let all = |x: &Tensor| {
                let map = |transpose| hadamard::transform(x.clone(), &map, transpose).unwrap();
                [map(false), map(true), quantised(x.clone())]
            };
            let x = randn([rows, n], 24).to_dtype(dtype).unwrap().to_device(device).unwrap();
            let together = all(&x);
            for i in some_rows(rows) {
                for (what, (y, alone)) in together.iter().zip(all(&x.slice(i, 1).unwrap())).enumerate() {
                    assert!(
                        row(y, i) == row(&alone, 0),
                        "row {i} of {rows} x {n} in {dtype}, {}",
                        ["map", "transpose", "codes"][what]
                    );
                }
            }
        }
    }
}
