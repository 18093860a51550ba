//! The suites of published Hadamard kernels, on ours: every power of two up to 32768 in every type, forward and backward, within
//! twice the error of a transform that rounds to the same type at every level; from 2^9 to 2^25 values; H(Hᵀx) = x; and tensors of
//! more than 2^31 values. Then rows that do not touch each other.

use half::{bf16, f16};
use spinquant::hadamard::Hadamard;
use spinquant::ops::{Case, hadamard, randn};
use spinquant::quant::QuantSpec;
use spinquant::{DType, Tape, Tensor, check};

use crate::common::need::gpu;
use crate::common::rows::{row, rows_alone, some_rows};

/// The types, and what their suites allow beside twice the error of the rounding transform.
const TYPES: [(DType, f64); 3] = [(DType::F32, 3e-3), (DType::F16, 5e-3), (DType::BF16, 5e-2)];

fn round(x: f64, dtype: DType) -> f64 {
    match dtype {
        DType::F16 => f16::from_f64(x).to_f64(),
        DType::BF16 => bf16::from_f64(x).to_f64(),
        DType::F32 => f64::from(x as f32),
        _ => x,
    }
}

/// The orthonormal transform of a row, rounded after every level; exact in f64. (The definition takes n² steps.)
fn sylvester(row: &[f64], dtype: DType) -> Vec<f64> {
    let mut y = row.to_vec();
    let mut h = 1;
    while h < y.len() {
        for i in (0..y.len()).filter(|i| i & h == 0) {
            let (a, b) = (y[i], y[i + h]);
            (y[i], y[i + h]) = (round(a + b, dtype), round(a - b, dtype));
        }
        h *= 2;
    }
    let scale = 1.0 / (y.len() as f64).sqrt();
    y.iter().map(|v| round(v * scale, dtype)).collect()
}

fn largest_difference(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    // NaN if there is one anywhere.
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, |m, e| if e > m || e.is_nan() { e } else { m })
}

#[test]
#[ignore = "needs a GPU"]
fn powers_of_two_forward_and_backward() {
    let device = gpu();
    for n in (0..16).map(|i| 1usize << i) {
        let operand = randn([15, n], 21);
        let case = Case::new("hadamard", format!("15 x {n}"), move || vec![randn([15, n], 21)], |v| v[0].clone().hadamard());
        for (dtype, beside) in TYPES {
            let ours = check::evaluate(&case, dtype, &device).unwrap();
            // The same operand and output gradient, rounded, through f64.
            let exact_of = |x: &Tensor| {
                let x = x.to_dtype(dtype).unwrap().to_f64_vec().unwrap();
                let of = |dtype| x.chunks(n).flat_map(|row| sylvester(row, dtype)).collect::<Vec<f64>>();
                (of(DType::F64), of(dtype))
            };
            let gradient = randn([15, n], 0x5eed).to_dtype(DType::BF16).unwrap().to_dtype(DType::F64).unwrap();
            for (what, got, from) in [("forward", &ours.value, &operand), ("backward", &ours.gradients[0], &gradient)] {
                let (exact, rounded) = exact_of(from);
                let got = got.to_f64_vec().unwrap();
                let (error, bound) = (largest_difference(&got, &exact), 2.0 * largest_difference(&rounded, &exact) + beside);
                assert!(error < bound, "{what} of 15 x {n} in {dtype}: error {error:e}, bound {bound:e}");
            }
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn many_sizes_and_back() {
    let device = gpu();
    let values = randn([1 << 25], 22).to_dtype(DType::F32).unwrap();
    for (dtype, beside) in TYPES {
        let all = values.to_dtype(dtype).unwrap().to_device(&device).unwrap();
        for n in (1..16).map(|i| 1usize << i) {
            let map = Hadamard::new(n).unwrap();
            for count in (9..=25).step_by(2).map(|i| 1usize << i).filter(|&count| count >= n) {
                let x = all.slice(0, count).unwrap().reshape([count / n, n]).unwrap();
                let y = hadamard::transform(x.clone(), &map, false).unwrap();
                let back = hadamard::transform(hadamard::transform(x.clone(), &map, true).unwrap(), &map, false).unwrap();
                for i in some_rows(count / n) {
                    let from = row(&x, i);
                    let rounded = sylvester(&from, dtype);
                    let exact = sylvester(&from, DType::F64);
                    let bound = 2.0 * largest_difference(&rounded, &exact) + beside;
                    let error = largest_difference(&row(&y, i), &exact);
                    assert!(error < bound, "row {i} of {count} values by {n} in {dtype}: error {error:e}, bound {bound:e}");
                    // There and back: two roundings of 16-bit values; of f32 values also those of the sums.
                    let largest = exact.iter().chain(&from).fold(0f64, |m, v| m.max(v.abs()));
                    let units = if dtype == DType::F32 { 16.0 } else { 2.0 };
                    let (error, bound) = (largest_difference(&row(&back, i), &from), units * dtype.epsilon() * largest);
                    assert!(error <= bound, "row {i} of {count} values by {n} in {dtype} and back: {error:e} of {bound:e}");
                }
            }
        }
    }
}

/// Several rows in turn for every block that fits at once, and a rest.
#[test]
#[ignore = "needs a GPU"]
fn rows_alone_on_the_gpu() {
    let device = gpu();
    let sizes = [
        10944, 13696, 14848, 25600, 29568, 1024, 4096, 5120, 6144, 8960, 10240, 11008, 13824, 14336, 15872, 16384, 17920, 18944,
        22016, 24576, 28672, 31744, 32768,
    ];
    rows_alone(&device, 1601, &sizes);
}

#[test]
#[ignore = "needs a GPU with 13 GB to spare"]
fn more_than_two_to_the_31_values() {
    let device = gpu();
    let dtype = DType::BF16;
    let part = randn([1 << 22], 23).to_dtype(dtype).unwrap().to_device(&device).unwrap();
    let parts = vec![part; (1 << 9) + 1];
    let all = Tensor::stack(&parts).unwrap();
    for n in [128, 1024, 4096, 8192, 32768] {
        let rows = all.len() / n;
        let x = all.clone().reshape([rows, n]).unwrap();
        let map = Hadamard::new(n).unwrap();
        let y = hadamard::transform(x.clone(), &map, false).unwrap();
        let spec = QuantSpec::activation(4, false);
        let tape = Tape::new();
        let quantised = tape.constant(x.clone()).hadamard_fake_quant(&spec).unwrap();
        let q = quantised.value();
        for i in [0, rows / 2, rows - 1] {
            let exact = sylvester(&row(&x, i), DType::F64);
            let largest = exact.iter().fold(0f64, |m, v| m.max(v.abs()));
            let error = largest_difference(&row(&y, i), &exact);
            assert!(error <= dtype.epsilon() * largest, "row {i} of {rows} x {n}: {error:e}");
            // Half a step, and the rounding of the result.
            let (lo, hi) = exact.iter().fold((0f64, 0f64), |(lo, hi), &v| (lo.min(v), hi.max(v)));
            let (error, bound) = (largest_difference(&row(q, i), &exact), (hi - lo) / 15.0 * 0.51 + dtype.epsilon() * largest);
            // The zero point is rounded too: values at the ends of the range are off by up to a step.
            assert!(error <= 2.0 * bound, "row {i} of {rows} x {n}, quantised: {error:e} of {bound:e}");
        }
    }
}
