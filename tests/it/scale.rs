//! What 16 bits hold of a rotation.

use spinquant::linalg::matmul::product;
use spinquant::rotation::Rotations;
use spinquant::{DType, Tensor, ops};

/// Products of a rotation and 16-bit weights take both as f16, scaled to use its range. The same rounding on the CPU.
#[test]
fn halves_hold_enough_of_a_rotation() {
    let n = 512;
    let r = Rotations::random_orthogonal(n, 2, 1, 0).unwrap().r1;
    let w = ops::randn([256, n], 3).to_dtype(DType::BF16).unwrap();
    // The largest value between 2^14 and 2^15.
    let halves = |t: &Tensor, dtype: DType| {
        let x = t.to_f64_vec().unwrap();
        let scale = 2f64.powi(14 - x.iter().fold(0f64, |m, x| m.max(x.abs())).log2().floor() as i32);
        let scaled = x.iter().map(|x| x * scale).collect::<Vec<_>>();
        let rounded = Tensor::from_vec(scaled, t.shape()).unwrap().to_dtype(dtype).unwrap().to_f64_vec().unwrap();
        Tensor::from_vec(rounded.into_iter().map(|x| x / scale).collect::<Vec<_>>(), t.shape()).unwrap()
    };
    let wide = w.to_dtype(DType::F64).unwrap();
    assert_eq!(halves(&w, DType::F16).to_f64_vec().unwrap(), wide.to_f64_vec().unwrap(), "bf16 weights lose nothing");
    let times = |r: &Tensor| product(&wide, false, r, false, false, DType::F64).unwrap().to_f64_vec().unwrap();
    let exact = times(&r);
    let distance = |x: &[f64]| x.iter().zip(&exact).map(|(x, e)| (x - e) * (x - e)).sum::<f64>().sqrt();
    let rounding =
        distance(&Tensor::from_vec(exact.clone(), [exact.len()]).unwrap().to_dtype(DType::BF16).unwrap().to_f64_vec().unwrap());
    let ratio = |dtype| distance(&times(&halves(&r, dtype))) / rounding;
    println!("beside rounding the product to bf16: R in f16 {:.3}, R in bf16 {:.3}", ratio(DType::F16), ratio(DType::BF16));
    assert!(ratio(DType::F16) <= 0.25 && ratio(DType::BF16) > 0.5);
}
