//! The Hadamard map on the CPU.

use spinquant::hadamard::Hadamard;
use spinquant::ops::{hadamard, randn};
use spinquant::{DType, Device, Tensor};

use crate::common::rows::rows_alone;

/// Several rows in turn for every thread, and a rest.
#[test]
fn rows_alone_on_the_cpu() {
    rows_alone(&Device::Cpu, 20, &[344, 4096, 8960]);
}

/// MLP widths and head sizes of published models with the order that each has: none is in blocks.
const WIDTHS: [(usize, usize); 38] = [
    (2880, 180),
    (3072, 12),
    (3584, 28),
    (4864, 76),
    (5376, 84),
    (5632, 44),
    (6144, 12),
    (6400, 100),
    (6912, 108),
    (8192, 1),
    (8960, 140),
    (9216, 36),
    (9728, 76),
    (10944, 684),
    (11008, 172),
    (12288, 12),
    (13440, 420),
    (13696, 428),
    (13824, 108),
    (14336, 28),
    (14848, 464),
    (15360, 60),
    (16896, 132),
    (17408, 68),
    (17920, 140),
    (18944, 148),
    (21504, 84),
    (25600, 100),
    (27648, 108),
    (28672, 28),
    (29568, 924),
    (36864, 36),
    (53248, 52),
    (64, 1),
    (80, 40),
    (96, 12),
    (128, 1),
    (192, 12),
];

/// Orthogonal, and no other than the definition says. (That `H_K H_Kᵀ` is K times the identity is tested beside the constructions.)
#[test]
fn widths_of_models_have_whole_maps() {
    for (n, k) in WIDTHS {
        let map = Hadamard::new(n).unwrap();
        assert_eq!((map.k(), map.blocks()), (k, 1), "{n}: {map}");
        let x = randn([1, n], n as u64).to_dtype(DType::F32).unwrap();
        let values = |t: &Tensor| t.to_f64_vec().unwrap();
        let far = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        for transpose in [false, true] {
            let y = hadamard::transform(x.clone(), &map, transpose).unwrap();
            let back = hadamard::transform(y.clone(), &map, !transpose).unwrap();
            assert!(far(&values(&back), &values(&x)) < 1e-5, "{n}: {map}, there and back");
            let mut want = values(&x);
            map.reference(&mut want, transpose).unwrap();
            assert!(far(&values(&y), &want) < 1e-5, "{n}: {map}, by the definition");
        }
    }
}
