//! Kernels without a tape give what the operations give, and refuse slices that do not fit.

use cudarc::driver::CudaSlice;
use spinquant::device::cuda::CudaDevice;
use spinquant::kernels::{self, HadamardMap, Sizes};
use spinquant::ops::{attention, bias, randn, rms_norm, swiglu};
use spinquant::quant::{Clip, QuantSpec};
use spinquant::{DType, Tape, Tensor};

fn values(seed: u64, len: usize) -> Vec<f32> {
    randn([len], seed).to_dtype(DType::F32).unwrap().into_vec().unwrap()
}

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}

#[track_caller]
fn close(d: &CudaDevice, got: &CudaSlice<f32>, want: &[f64], tolerance: f64) {
    let got = d.stream().clone_dtoh(got).unwrap();
    d.synchronize().unwrap();
    assert_eq!(got.len(), want.len());
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        assert!((f64::from(*g) - w).abs() <= tolerance, "value {i}: {g}, not {w}");
    }
}

fn device() -> CudaDevice {
    CudaDevice::new(0).unwrap_or_else(|e| panic!("this test needs a GPU: {e}"))
}

#[test]
#[ignore = "needs a GPU"]
fn kernels_are_the_operations() {
    let d = device();
    let s = d.stream();
    let (rows, n) = (6, 344);
    let x = values(1, rows * n);
    let (gx, mut gy) = (s.clone_htod(&x).unwrap(), s.alloc_zeros::<f32>(rows * n).unwrap());

    let map = HadamardMap::new(s, n).unwrap();
    let mut want = wide(&x);
    want.chunks_mut(n).for_each(|row| map.map().reference(row, false).unwrap());
    kernels::hadamard(s, &mut gy, &gx, &map, false).unwrap();
    close(&d, &gy, &want, 1e-4);
    kernels::hadamard_in_place(s, &mut gy, &map, true).unwrap();
    close(&d, &gy, &wide(&x), 1e-4);
    let signs: Vec<i8> = (0..n).map(|i| if i % 3 == 0 { -1 } else { 1 }).collect();
    let signed = HadamardMap::new(s, n).unwrap().with_signs(s, &signs).unwrap();
    kernels::hadamard(s, &mut gy, &gx, &signed, false).unwrap();
    let mut want: Vec<f64> = wide(&x).iter().enumerate().map(|(i, x)| x * f64::from(signs[i % n])).collect();
    want.chunks_mut(n).for_each(|row| map.map().reference(row, false).unwrap());
    close(&d, &gy, &want, 1e-4);

    let tensor = Tensor::from_vec(x.clone(), [rows, n]).unwrap();
    for spec in [QuantSpec::activation(4, false), QuantSpec::weight(4, true).clipped(Clip::Search)] {
        let q = spinquant::ops::fake_quant::quantize(&tensor, &spec).unwrap();
        kernels::fake_quant(s, &mut gy, &gx, n, &spec).unwrap();
        let want = q.dequantize().unwrap().to_f64_vec().unwrap();
        close(&d, &gy, &want, 1e-5);
        let mut codes = s.alloc_zeros::<i16>(rows * n).unwrap();
        let (mut scale, mut zero) = (s.alloc_zeros::<f32>(rows).unwrap(), s.alloc_zeros::<f32>(rows).unwrap());
        kernels::quantize(s, &mut codes, &mut scale, &mut zero, &gx, n, &spec).unwrap();
        assert_eq!(s.clone_dtoh(&codes).unwrap(), q.codes);
        let mut best = s.alloc_zeros::<i32>(rows).unwrap();
        kernels::fake_quant_search(s, &mut gy, &mut best, &gx, n, &spec).unwrap();
        assert!(s.clone_dtoh(&best).unwrap().iter().all(|b| (0..80).contains(b)));
    }

    let mut inverse = s.alloc_zeros::<f32>(rows).unwrap();
    kernels::rms_norm(s, &mut gy, &mut inverse, &gx, n, 1e-5).unwrap();
    let (want, r) = rms_norm::reference(&wide(&x), n, 1e-5);
    close(&d, &gy, &want, 1e-5);
    let up = s.clone_htod(&values(2, rows * n)).unwrap();
    kernels::rms_norm_backward(s, &mut gy, &up, &gx, &inverse, n).unwrap();
    close(&d, &gy, &rms_norm::reference_backward(&wide(&values(2, rows * n)), &wide(&x), &r, n), 1e-4);
    kernels::swiglu(s, &mut gy, &gx, &up).unwrap();
    close(&d, &gy, &swiglu::reference(&wide(&x), &wide(&values(2, rows * n))), 1e-5);
    let b = values(6, n);
    kernels::add_bias(s, &mut gy, &gx, &s.clone_htod(&b).unwrap()).unwrap();
    close(&d, &gy, &bias::reference(&wide(&x), &wide(&b)), 1e-6);
    let mut sums = s.alloc_zeros::<f32>(n).unwrap();
    kernels::column_sums(s, &mut sums, &gx).unwrap();
    close(&d, &sums, &bias::reference_backward(&wide(&x), n), 1e-5);
    // Every angle a quarter turn: (a, b) becomes (−b, a).
    let (cosine, sine) = (s.alloc_zeros::<f32>(2 * 4).unwrap(), s.clone_htod(&[1f32; 2 * 4]).unwrap());
    kernels::rope(s, &mut gy, &gx, &cosine, &sine, (n / 8, 8), false).unwrap();
    let want = wide(&x).chunks(8).flat_map(|h| (0..8).map(|i| if i < 4 { -h[i + 4] } else { h[i - 4] })).collect::<Vec<_>>();
    close(&d, &gy, &want, 1e-6);

    let sizes = Sizes { batch: 2, seq: 9, heads: 4, kv_heads: 2, dim: 16 };
    let (q_len, k_len) = (2 * 9 * 4 * 16, 2 * 9 * 2 * 16);
    let (q, k, v) = (values(3, q_len), values(4, k_len), values(5, k_len));
    let [gq, gk, gv] = [&q, &k, &v].map(|x| s.clone_htod(x).unwrap());
    let (mut o, mut lse) = (s.alloc_zeros::<f32>(q_len).unwrap(), s.alloc_zeros::<f32>(2 * 4 * 9).unwrap());
    kernels::attention(s, &mut o, &mut lse, &gq, &gk, &gv, &sizes).unwrap();
    let (want, want_lse) = attention::reference(&wide(&q), &wide(&k), &wide(&v), sizes);
    close(&d, &o, &want, 1e-4);
    close(&d, &lse, &want_lse, 1e-4);
    let [mut dq, mut dk, mut dv] = [q_len, k_len, k_len].map(|n| s.alloc_zeros::<f32>(n).unwrap());
    let bytes = kernels::attention_workspace(&sizes, DType::F32).unwrap().max(1);
    let mut workspace = s.alloc_zeros::<u8>(bytes).unwrap();
    kernels::attention_backward(s, [&mut dq, &mut dk, &mut dv], &mut workspace, &gq, [&gq, &gk, &gv], &o, &lse, &sizes).unwrap();
    let want = attention::reference_backward(&wide(&q), &wide(&q), &wide(&k), &wide(&v), sizes);
    close(&d, &dq, &want.0, 1e-3);
    close(&d, &dk, &want.1, 1e-3);
    close(&d, &dv, &want.2, 1e-3);

    let (mut logits, mut loss) = (s.clone_htod(&x).unwrap(), s.alloc_zeros::<f32>(rows).unwrap());
    let targets = s.clone_htod(&[0i32, 1, 2, 3, -1, 343]).unwrap();
    kernels::cross_entropy(s, &mut logits, &mut loss, &targets, n, 0.2).unwrap();
    let tape = Tape::new();
    let l = tape.variable(Tensor::from_vec(wide(&x), [rows, n]).unwrap());
    let mean = l.clone().cross_entropy(vec![0, 1, 2, 3, -1, 343].into()).unwrap();
    let dl = tape.backward(mean).unwrap().take(&l).unwrap();
    close(&d, &logits, &dl.to_f64_vec().unwrap(), 1e-5);

    // What does not fit is refused.
    let mut short = s.alloc_zeros::<f32>(n).unwrap();
    assert!(kernels::hadamard(s, &mut short, &gx, &map, false).is_err());
    assert!(kernels::add_bias(s, &mut gy, &gx, &s.alloc_zeros::<f32>(n - 1).unwrap()).is_err());
    assert!(kernels::swiglu(s, &mut gy.slice_mut(1..), &gx.slice(1..), &up.slice(1..)).is_err());
    assert!(kernels::fake_quant(s, &mut gy, &gx, n - 1, &QuantSpec::activation(4, false)).is_err());
}
