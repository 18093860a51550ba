//! Kernels without a tape give what the operations give, and refuse slices that do not fit.

use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaSlice, CudaStream};
use half::bf16;
use spinquant::grid::floating::Format;
use spinquant::grid::{SEARCH_NORM, reference_grid};
use spinquant::hadamard::Hadamard;
use spinquant::kernels::{self, HadamardMap, Sizes};
use spinquant::ops::clipped_fake_quant::ClippedFakeQuant;
use spinquant::ops::log_scale::{Along, LogScale};
use spinquant::ops::microscaling::encode;
use spinquant::ops::rope_pairs::RopePairs;
use spinquant::ops::{
    attention, bias, log_scale, randn, rms_norm, rope_pairs, scaled_rms_norm, scaled_swiglu, swap_axes, swiglu,
};
use spinquant::quant::{Clip, QuantSpec};
use spinquant::{DType, Device, Tape, Tensor};

fn values(seed: u64, len: usize) -> Vec<f32> {
    randn([len], seed).to_dtype(DType::F32).unwrap().into_vec().unwrap()
}

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}

#[track_caller]
fn close(s: &Arc<CudaStream>, got: &CudaSlice<f32>, want: &[f64], tolerance: f64) {
    let got = s.clone_dtoh(got).unwrap();
    s.synchronize().unwrap();
    assert_eq!(got.len(), want.len());
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        assert!((f64::from(*g) - w).abs() <= tolerance, "value {i}: {g}, not {w}");
    }
}

fn stream() -> Arc<CudaStream> {
    CudaContext::new(0).and_then(|c| c.new_stream()).unwrap_or_else(|e| panic!("this test needs a GPU: {e}"))
}

/// Orders beyond 192, symmetric and not, both ways, with signs.
#[test]
#[ignore = "needs a GPU"]
fn large_orders_with_signs() {
    let (s, rows) = (&stream(), 5);
    for n in [924 * 32, 924 * 16, 684 * 16, 428 * 32, 428 * 128, 204 * 256, 428 * 2] {
        let x = values(1, rows * n);
        let (gx, mut gy) = (s.clone_htod(&x).unwrap(), s.alloc_zeros::<f32>(rows * n).unwrap());
        let signs: Vec<i8> = (0..n).map(|i| if i % 3 == 0 { -1 } else { 1 }).collect();
        let map = HadamardMap::new(s, n).unwrap().with_signs(s, &signs).unwrap();
        let signed = |x: &mut [f64]| x.iter_mut().enumerate().for_each(|(i, x)| *x *= f64::from(signs[i % n]));
        for transpose in [false, true] {
            let mut want = wide(&x);
            if !transpose {
                signed(&mut want);
            }
            want.chunks_mut(n).for_each(|row| map.map().reference(row, transpose).unwrap());
            if transpose {
                signed(&mut want);
            }
            kernels::hadamard(s, &mut gy, &gx, &map, transpose).unwrap();
            close(s, &gy, &want, 1e-4);
            // Half a unit of 16 bits in what goes in, and in what comes out.
            let narrow: Vec<bf16> = x.iter().map(|&x| bf16::from_f32(x)).collect();
            let mut there = s.clone_htod(&narrow).unwrap();
            kernels::hadamard_in_place(s, &mut there, &map, transpose).unwrap();
            let (got, mut error) = (s.clone_dtoh(&there).unwrap(), 0f64);
            got.iter().zip(&want).for_each(|(g, w)| error = error.max((g.to_f64() - w).abs()));
            assert!(error < 0.05, "{n}: {error}");
        }
        // Rows that lie side by side have ranges of their own.
        let spec = QuantSpec::activation(4, false);
        let narrow: Vec<bf16> = x.iter().enumerate().map(|(i, &x)| bf16::from_f32(x * (1 + i / n) as f32)).collect();
        let there = s.clone_htod(&narrow).unwrap();
        let (mut all, mut alone) = (s.alloc_zeros::<bf16>(rows * n).unwrap(), s.alloc_zeros::<bf16>(n).unwrap());
        kernels::hadamard_fake_quant(s, &mut all, &there, &map, &spec).unwrap();
        let all = s.clone_dtoh(&all).unwrap();
        for (r, together) in all.chunks(n).enumerate() {
            kernels::hadamard_fake_quant(s, &mut alone, &there.slice(r * n..(r + 1) * n), &map, &spec).unwrap();
            assert!(s.clone_dtoh(&alone).unwrap() == together, "row {r} of {rows} x {n}");
        }
    }
    let blocks = HadamardMap::of(s, Hadamard::in_blocks(56, 8).unwrap()).unwrap();
    assert!(blocks.with_signs(s, &[1; 56]).is_err());
}

#[test]
#[ignore = "needs a GPU"]
fn kernels_are_the_operations() {
    let s = &stream();
    let (rows, n) = (6, 344);
    let x = values(1, rows * n);
    let (gx, mut gy) = (s.clone_htod(&x).unwrap(), s.alloc_zeros::<f32>(rows * n).unwrap());

    let map = HadamardMap::new(s, n).unwrap();
    let mut want = wide(&x);
    want.chunks_mut(n).for_each(|row| map.map().reference(row, false).unwrap());
    kernels::hadamard(s, &mut gy, &gx, &map, false).unwrap();
    close(s, &gy, &want, 1e-4);
    kernels::hadamard_in_place(s, &mut gy, &map, true).unwrap();
    close(s, &gy, &wide(&x), 1e-4);
    let signs: Vec<i8> = (0..n).map(|i| if i % 3 == 0 { -1 } else { 1 }).collect();
    let signed = HadamardMap::new(s, n).unwrap().with_signs(s, &signs).unwrap();
    kernels::hadamard(s, &mut gy, &gx, &signed, false).unwrap();
    let mut want: Vec<f64> = wide(&x).iter().enumerate().map(|(i, x)| x * f64::from(signs[i % n])).collect();
    want.chunks_mut(n).for_each(|row| map.map().reference(row, false).unwrap());
    close(s, &gy, &want, 1e-4);

    let tensor = Tensor::from_vec(x.clone(), [rows, n]).unwrap();
    for spec in [QuantSpec::activation(4, false), QuantSpec::weight(4, true).clipped(Clip::Search)] {
        let q = spinquant::ops::fake_quant::quantize(&tensor, &spec).unwrap();
        kernels::fake_quant(s, &mut gy, &gx, n, &spec).unwrap();
        let want = q.dequantize().unwrap().to_f64_vec().unwrap();
        close(s, &gy, &want, 1e-5);
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
    close(s, &gy, &want, 1e-5);
    let up = s.clone_htod(&values(2, rows * n)).unwrap();
    kernels::rms_norm_backward(s, &mut gy, &up, &gx, &inverse, n).unwrap();
    close(s, &gy, &rms_norm::reference_backward(&wide(&values(2, rows * n)), &wide(&x), &r, n), 1e-4);
    kernels::swiglu(s, &mut gy, &gx, &up).unwrap();
    close(s, &gy, &swiglu::reference(&wide(&x), &wide(&values(2, rows * n))), 1e-5);
    let b = values(6, n);
    kernels::add_bias(s, &mut gy, &gx, &s.clone_htod(&b).unwrap()).unwrap();
    close(s, &gy, &bias::reference(&wide(&x), &wide(&b)), 1e-6);
    let mut sums = s.alloc_zeros::<f32>(n).unwrap();
    kernels::column_sums(s, &mut sums, &gx).unwrap();
    close(s, &sums, &bias::reference_backward(&wide(&x), n), 1e-5);
    // Every angle a quarter turn: (a, b) becomes (−b, a).
    let (cosine, sine) = (s.alloc_zeros::<f32>(2 * 4).unwrap(), s.clone_htod(&[1f32; 2 * 4]).unwrap());
    kernels::rope(s, &mut gy, &gx, &cosine, &sine, (n / 8, 8), false).unwrap();
    let want = wide(&x).chunks(8).flat_map(|h| (0..8).map(|i| if i < 4 { -h[i + 4] } else { h[i - 4] })).collect::<Vec<_>>();
    close(s, &gy, &want, 1e-6);

    for window in [None, Some(4)] {
        attention_is_the_operation(s, Sizes { batch: 2, seq: 9, heads: 4, kv_heads: 2, dim: 16, window });
    }

    let (mut logits, mut loss) = (s.clone_htod(&x).unwrap(), s.alloc_zeros::<f32>(rows).unwrap());
    let targets = s.clone_htod(&[0i32, 1, 2, 3, -1, 343]).unwrap();
    kernels::cross_entropy(s, &mut logits, &mut loss, &targets, n, 0.2).unwrap();
    let tape = Tape::new();
    let l = tape.variable(Tensor::from_vec(wide(&x), [rows, n]).unwrap());
    let mean = l.clone().cross_entropy(vec![0, 1, 2, 3, -1, 343].into()).unwrap();
    let dl = tape.backward(mean).unwrap().take(&l).unwrap();
    close(s, &logits, &dl.to_f64_vec().unwrap(), 1e-5);

    // What does not fit is refused.
    let mut short = s.alloc_zeros::<f32>(n).unwrap();
    assert!(kernels::hadamard(s, &mut short, &gx, &map, false).is_err());
    assert!(kernels::add_bias(s, &mut gy, &gx, &s.alloc_zeros::<f32>(n - 1).unwrap()).is_err());
    assert!(kernels::swiglu(s, &mut gy.slice_mut(1..), &gx.slice(1..), &up.slice(1..)).is_err());
    assert!(kernels::fake_quant(s, &mut gy, &gx, n - 1, &QuantSpec::activation(4, false)).is_err());
}

fn attention_is_the_operation(s: &Arc<CudaStream>, sizes: Sizes) {
    let tokens = sizes.batch * sizes.seq;
    let (q_len, k_len) = (tokens * sizes.heads * sizes.dim, tokens * sizes.kv_heads * sizes.dim);
    let (q, k, v) = (values(3, q_len), values(4, k_len), values(5, k_len));
    let [gq, gk, gv] = [&q, &k, &v].map(|x| s.clone_htod(x).unwrap());
    let (mut o, mut lse) = (s.alloc_zeros::<f32>(q_len).unwrap(), s.alloc_zeros::<f32>(tokens * sizes.heads).unwrap());
    kernels::attention(s, &mut o, &mut lse, &gq, &gk, &gv, &sizes).unwrap();
    let (want, want_lse) = attention::reference(&wide(&q), &wide(&k), &wide(&v), sizes);
    close(s, &o, &want, 1e-4);
    close(s, &lse, &want_lse, 1e-4);
    let [mut dq, mut dk, mut dv] = [q_len, k_len, k_len].map(|n| s.alloc_zeros::<f32>(n).unwrap());
    let bytes = kernels::attention_workspace(&sizes, DType::F32).unwrap().max(1);
    let mut workspace = s.alloc_zeros::<u8>(bytes).unwrap();
    kernels::attention_backward(s, [&mut dq, &mut dk, &mut dv], &mut workspace, &gq, [&gq, &gk, &gv], &o, &lse, &sizes).unwrap();
    let want = attention::reference_backward(&wide(&q), &wide(&q), &wide(&k), &wide(&v), sizes);
    close(s, &dq, &want.0, 1e-3);
    close(s, &dk, &want.1, 1e-3);
    close(s, &dv, &want.2, 1e-3);
}

/// Learned scales and clip ratios, their gradients, and the likeliest of two networks.
/// Long rows are tried on few candidates: what is taken has the least error of all, but for the rounding of sums.
#[test]
#[ignore = "needs a GPU"]
fn a_search_of_long_rows_takes_the_best_candidate() {
    let s = &stream();
    for (n, bits, symmetric) in [
        (1024, 4, true),
        (1500, 3, false),
        (4096, 4, true),
        (4096, 2, false),
        (4096, 8, true),
        (11008, 4, true),
        (11008, 4, false),
    ] {
        let spec = QuantSpec::weight(bits, symmetric);
        let mut x = values(n as u64 + u64::from(bits), 6 * n);
        x[n] = 30.0; // an outlier, few different values, one sign, nothing, and a small row
        x[2 * n..3 * n].iter_mut().for_each(|v| *v = (*v * 2.0).round());
        x[3 * n..4 * n].iter_mut().for_each(|v| *v = v.abs());
        x[4 * n..5 * n].fill(0.0);
        x[5 * n..].iter_mut().for_each(|v| *v *= 1e-4);
        let (gx, mut y) = (s.clone_htod(&x).unwrap(), s.alloc_zeros::<f32>(6 * n).unwrap());
        let mut best = s.alloc_zeros::<i32>(6).unwrap();
        kernels::fake_quant_search(s, &mut y, &mut best, &gx, n, &spec).unwrap();
        for (row, &best) in x.chunks(n).zip(&s.clone_dtoh(&best).unwrap()) {
            let row = wide(row);
            let error = |i: usize| {
                let grid = reference_grid(&spec.clipped(Clip::Ratio(1.0 - i as f64 / 100.0)), &row);
                row.iter().map(|&v| (v - grid.nearest(v)).abs().powf(SEARCH_NORM)).sum::<f64>()
            };
            let least = (0..80).map(error).fold(f64::INFINITY, f64::min);
            let taken = error(best as usize);
            assert!(taken <= least * (1.0 + 1e-5), "{n} values in {bits} bits: {best} with {taken:e}, the least is {least:e}");
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn learned_kernels_are_the_operations() {
    let s = &stream();
    let (rows, cols) = (6, 40);
    let [x, dy] = [11, 12].map(|seed| values(seed, rows * cols));
    let [gx, gdy] = [&x, &dy].map(|x| s.clone_htod(x).unwrap());
    let mut y = s.alloc_zeros::<f32>(rows * cols).unwrap();
    let shaped = |v: &[f32], shape: &[usize]| Tensor::from_vec(wide(v), shape).unwrap();
    let matrix = [rows, cols];

    for (along, entries, inverse) in [(Along::Columns, cols, true), (Along::Rows, rows, false)] {
        let op = LogScale { along, inverse };
        let a = values(13, entries);
        let ga = s.clone_htod(&a).unwrap();
        kernels::log_scale(s, &mut y, &gx, &ga, op, cols).unwrap();
        close(s, &y, &log_scale::reference(op, &wide(&x), &wide(&a), cols), 1e-4);
        let mut da = s.alloc_zeros::<f32>(entries).unwrap();
        kernels::log_scale_sums(s, &mut da, (&gdy, &gx), &ga, op, cols).unwrap();
        let tape = Tape::new();
        let (vx, va) = (tape.constant(shaped(&x, &matrix)), tape.variable(shaped(&a, &[entries])));
        let out = vx.log_scale(va.clone(), along, inverse).unwrap();
        let want = tape.backward_from(out, shaped(&dy, &matrix)).unwrap().take(&va).unwrap();
        close(s, &da, &want.to_f64_vec().unwrap(), 1e-3);
        assert!(kernels::log_scale(s, &mut y, &gx, &ga.slice(..4), op, cols).is_err());
    }

    // What is scaled in passing; more parts than rows, and fewer.
    let (a, up) = (values(15, cols), values(16, rows * cols));
    let [ga, gup] = [&a, &up].map(|x| s.clone_htod(x).unwrap());
    let mut inverse = s.alloc_zeros::<f32>(rows).unwrap();
    kernels::scaled_rms_norm(s, &mut y, &mut inverse, &gx, &ga, 1e-5).unwrap();
    close(s, &y, &scaled_rms_norm::reference(&wide(&x), &wide(&a), 1e-5), 1e-4);
    let sum = |parts: &CudaSlice<f32>| {
        let parts = s.clone_dtoh(parts).unwrap();
        (0..cols).map(|j| parts.iter().skip(j).step_by(cols).map(|&p| f64::from(p)).sum::<f64>()).collect::<Vec<_>>()
    };
    let near = |got: &[f64], want: &[f64]| assert!(got.iter().zip(want).all(|(g, w)| (g - w).abs() < 1e-3), "{got:?} {want:?}");
    for workers in [2, 9] {
        let mut parts = s.clone_htod(&vec![f32::NAN; workers * cols]).unwrap();
        let [dx, da] = scaled_rms_norm::reference_backward(&wide(&dy), &wide(&x), &wide(&a), 1e-5);
        kernels::scaled_rms_norm_backward(s, &mut y, &mut parts, (&gdy, &gx), &ga, &inverse).unwrap();
        close(s, &y, &dx, 1e-3);
        near(&sum(&parts), &da);
        let mut dup = s.alloc_zeros::<f32>(rows * cols).unwrap();
        let mut parts = s.clone_htod(&vec![f32::NAN; workers * cols]).unwrap();
        kernels::scaled_swiglu_backward(s, (&mut y, &mut dup), &mut parts, (&gdy, &gx, &gup), &ga).unwrap();
        let [dgate, want, da] = scaled_swiglu::reference_backward(&wide(&dy), &wide(&x), &wide(&up), &wide(&a));
        close(s, &y, &dgate, 1e-3);
        close(s, &dup, &want, 1e-3);
        near(&sum(&parts), &da);
    }
    kernels::scaled_swiglu(s, &mut y, (&gx, &gup), &ga).unwrap();
    close(s, &y, &scaled_swiglu::reference(&wide(&x), &wide(&up), &wide(&a)), 1e-4);
    assert!(kernels::scaled_swiglu(s, &mut y, (&gx, &gup), &ga.slice(..7)).is_err());

    // Two kinds of rows.
    let a: Vec<f32> = values(14, 4).into_iter().map(|a| -0.1 - 0.2 * a.abs()).collect();
    let ga = s.clone_htod(&a).unwrap();
    let op = ClippedFakeQuant { spec: QuantSpec::activation(4, false), blocked: true };
    let narrow = |v: &[f32], shape: &[usize]| Tensor::from_vec(v.to_vec(), shape).unwrap();
    let tape = Tape::new();
    let (vx, va) = (tape.variable(narrow(&x, &matrix)), tape.variable(narrow(&a, &[2, 2])));
    let out = vx.clone().clipped_fake_quant(&op.spec, va.clone(), op.blocked).unwrap();
    kernels::clipped_fake_quant(s, &mut y, &gx, &ga, &op, cols).unwrap();
    close(s, &y, &out.value().to_f64_vec().unwrap(), 1e-5);
    let mut sums = s.alloc_zeros::<f32>(rows * 2).unwrap();
    kernels::clipped_fake_quant_backward(s, &mut y, &mut sums, (&gdy, &gx), &ga, &op, cols).unwrap();
    let mut want = tape.backward_from(out, Tensor::from_vec(dy.clone(), matrix).unwrap()).unwrap();
    close(s, &y, &want.take(&vx).unwrap().to_f64_vec().unwrap(), 1e-5);
    let mut da = s.alloc_zeros::<f32>(4).unwrap();
    kernels::column_sums(s, &mut da, &sums).unwrap();
    close(s, &da, &want.take(&va).unwrap().to_f64_vec().unwrap(), 1e-3);
    assert!(kernels::clipped_fake_quant(s, &mut y, &gx.slice(..cols), &ga, &op, cols).is_err());

    // Weights: every row is a kind of its own, and what it adds is its gradient.
    let a: Vec<f32> = values(15, 2 * rows).into_iter().map(|a| -0.1 - 0.2 * a.abs()).collect();
    let ga = s.clone_htod(&a).unwrap();
    let op = ClippedFakeQuant { spec: QuantSpec::weight(4, true), blocked: true };
    let tape = Tape::new();
    let (vx, va) = (tape.variable(narrow(&x, &matrix)), tape.variable(narrow(&a, &[rows, 2])));
    let out = vx.clone().clipped_fake_quant(&op.spec, va.clone(), op.blocked).unwrap();
    kernels::clipped_fake_quant(s, &mut y, &gx, &ga, &op, cols).unwrap();
    close(s, &y, &out.value().to_f64_vec().unwrap(), 1e-5);
    kernels::clipped_fake_quant_backward(s, &mut y, &mut sums, (&gdy, &gx), &ga, &op, cols).unwrap();
    let mut want = tape.backward_from(out, Tensor::from_vec(dy.clone(), matrix).unwrap()).unwrap();
    close(s, &y, &want.take(&vx).unwrap().to_f64_vec().unwrap(), 1e-5);
    close(s, &sums, &want.take(&va).unwrap().to_f64_vec().unwrap(), 1e-3);

    // The largest of row r is where x has it in even rows, and elsewhere in odd ones.
    let mut other = x.clone();
    other.chunks_mut(cols).enumerate().filter(|(r, _)| r % 2 == 1).for_each(|(_, row)| row.iter_mut().for_each(|x| *x = -*x));
    let mut agree = s.alloc_zeros::<i32>(rows).unwrap();
    kernels::agreement(s, &mut agree, &gx, &s.clone_htod(&other).unwrap(), cols).unwrap();
    assert_eq!(s.clone_dtoh(&agree).unwrap(), [1, 0, 1, 0, 1, 0]);
    assert!(kernels::agreement(s, &mut agree, &gx, &gdy.slice(cols..), cols).is_err());
}

/// Turned pairs of rows with their gradients, and swapped axes, of 32 and of 16 bits.
#[test]
#[ignore = "needs a GPU"]
fn turned_pairs_are_the_operations() {
    let s = &stream();
    // Whole packs, odd rows, and a head of which some rows stay.
    for (group, dim, pairs, cols) in [(1, 8, 4, 40), (3, 6, 3, 7), (2, 8, 3, 16)] {
        let (sizes, op) = (rope_pairs::Sizes { dim, group, pairs, cols }, RopePairs { dim, inverse: group == 3 });
        let (kinds, rows) = (2, 2 * group * dim);
        let [x, dy] = [21, 22].map(|seed| values(seed, rows * cols));
        let p = values(23, kinds * 2 * pairs);
        let [gx, gdy, gp] = [&x, &dy, &p].map(|v| s.clone_htod(v).unwrap());
        let (mut y, mut dp) = (s.alloc_zeros::<f32>(rows * cols).unwrap(), s.alloc_zeros::<f32>(kinds * 2 * pairs).unwrap());
        kernels::rope_pairs(s, &mut y, &gx, &gp, op, sizes).unwrap();
        close(s, &y, &rope_pairs::reference(op, &wide(&x), &wide(&p), sizes), 1e-4);
        kernels::rope_pairs_backward(s, &mut y, &mut dp, (&gdy, &gx), &gp, op, sizes).unwrap();
        let tape = Tape::new();
        let on_tape = |v: &[f32], shape: &[usize]| tape.variable(Tensor::from_vec(wide(v), shape).unwrap());
        let (vx, vp) = (on_tape(&x, &[rows, cols]), on_tape(&p, &[kinds, 2, pairs]));
        let out = vx.clone().rope_pairs(vp.clone(), dim, op.inverse).unwrap();
        let mut want = tape.backward_from(out, Tensor::from_vec(wide(&dy), [rows, cols]).unwrap()).unwrap();
        close(s, &y, &want.take(&vx).unwrap().to_f64_vec().unwrap(), 1e-4);
        close(s, &dp, &want.take(&vp).unwrap().to_f64_vec().unwrap(), 1e-3);
        assert!(kernels::rope_pairs(s, &mut y, &gx, &gp.slice(..4), op, sizes).is_err());
        assert!(kernels::rope_pairs(s, &mut y, &gx, &gp, op, rope_pairs::Sizes { group: 0, ..sizes }).is_err());
    }
    for shape in [[3, 5, 16], [4, 3, 7]] {
        let x = values(24, shape.iter().product());
        let (gx, mut y) = (s.clone_htod(&x).unwrap(), s.alloc_zeros::<f32>(x.len()).unwrap());
        kernels::swap_axes(s, &mut y, &gx, shape).unwrap();
        close(s, &y, &swap_axes::reference(&wide(&x), shape), 0.0);
        let narrow: Vec<bf16> = x.iter().map(|&x| bf16::from_f32(x)).collect();
        let (gx, mut y) = (s.clone_htod(&narrow).unwrap(), s.alloc_zeros::<bf16>(x.len()).unwrap());
        kernels::swap_axes(s, &mut y, &gx, shape).unwrap();
        let want: Vec<f64> = narrow.iter().map(|x| x.to_f64()).collect();
        let got: Vec<f64> = s.clone_dtoh(&y).unwrap().iter().map(|x| x.to_f64()).collect();
        assert_eq!(got, swap_axes::reference(&want, shape));
        assert!(kernels::swap_axes(s, &mut y, &gx, [shape[0], shape[1], 1]).is_err());
    }
}

/// Gradients of the gated activation, the rounded sum, and what Cayley steps are made of.
#[test]
#[ignore = "needs a GPU"]
fn the_other_kernels_are_the_operations() {
    use kernels::cayley;
    use spinquant::linalg;
    let s = &stream();
    let n = 1000;
    let [gate, up, dy] = [1, 2, 3].map(|seed| values(seed, n));
    let [g, u, d] = [&gate, &up, &dy].map(|x| s.clone_htod(x).unwrap());
    let (mut dgate, mut dup) = (s.alloc_zeros::<f32>(n).unwrap(), s.alloc_zeros::<f32>(n).unwrap());
    kernels::swiglu_backward(s, &mut dgate, &mut dup, &d, &g, &u).unwrap();
    let want = swiglu::reference_backward(&wide(&dy), &wide(&gate), &wide(&up));
    close(s, &dgate, &want.0, 1e-5);
    close(s, &dup, &want.1, 1e-5);
    assert!(kernels::swiglu_backward(s, &mut dgate, &mut dup, &d.slice(..8), &g, &u).is_err());

    let mut y = s.alloc_zeros::<bf16>(n).unwrap();
    kernels::axpby_bf16(s, &mut y, (0.5, &g), (-2.0, &u)).unwrap();
    let got = s.clone_dtoh(&y).unwrap();
    for ((y, a), b) in got.iter().zip(&gate).zip(&up) {
        let exact = 0.5 * f64::from(*a) - 2.0 * f64::from(*b);
        assert!((y.to_f64() - exact).abs() <= 2f64.powi(-8) * exact.abs(), "{y}, not {exact}");
    }
    assert!(kernels::axpby_bf16(s, &mut y, (0.5, &g.slice(4..)), (-2.0, &u)).is_err());

    let (k, n) = (3, 36);
    let [a, b] = [4, 5].map(|seed| randn([k, n, n], seed).to_dtype(DType::F32).unwrap());
    let [x, z] = [&a, &b].map(|t| s.clone_htod(t.as_slice::<f32>().unwrap()).unwrap());
    let (mut y, mut alpha) = (s.alloc_zeros::<f32>(k * n * n).unwrap(), s.alloc_zeros::<f32>(k).unwrap());
    let f64s = |t: Tensor| t.to_f64_vec().unwrap();
    cayley::normalize_rows(s, &mut y, &x, n).unwrap();
    close(s, &y, &f64s(linalg::normalize_rows(a.clone()).unwrap()), 1e-6);
    cayley::skew(s, &mut y, &x, n).unwrap();
    close(s, &y, &f64s(linalg::skew(&a).unwrap()), 0.0);
    cayley::transpose_axpby(s, &mut y, (0.5, &x), (2.0, &z), n).unwrap();
    close(s, &y, &f64s(linalg::transpose_axpby(0.5, &a, 2.0, Some(&b)).unwrap()), 1e-5);
    cayley::step_size(s, &mut alpha, &x, 0.01, n).unwrap();
    let steps = linalg::step_size(&a, 0.01).unwrap();
    close(s, &alpha, &f64s(steps.clone()), 1e-6);
    cayley::add_scaled(s, &mut y, &z, (0.5, &alpha), &x, n).unwrap();
    close(s, &y, &f64s(linalg::add_scaled(Some(b), &steps, 0.5, &a).unwrap()), 1e-5);
    let mut wider = s.alloc_zeros::<f64>(k * n * n).unwrap();
    cayley::widen(s, &mut wider, &x).unwrap();
    assert_eq!(s.clone_dtoh(&wider).unwrap(), f64s(a.clone()));
    // Any matrices will do as Gram matrices.
    let mut error = s.alloc_zeros::<f64>(k).unwrap();
    cayley::gram_residual(s, &mut y, &mut error, &wider, n).unwrap();
    let residual: Vec<f64> =
        f64s(a).iter().enumerate().map(|(i, g)| f64::from(u8::from(i % (n * n) % (n + 1) == 0)) - g).collect();
    close(s, &y, &residual, 1e-6);
    let largest = |r: &[f64]| r.iter().fold(0f64, |m, x| m.max(x.abs()));
    let errors = s.clone_dtoh(&error).unwrap();
    errors.iter().zip(residual.chunks(n * n)).for_each(|(e, r)| assert!((e - largest(r)).abs() < 1e-12));
    assert!(cayley::skew(s, &mut y, &x, n + 1).is_err());
    assert!(cayley::step_size(s, &mut y, &x, 0.01, n).is_err());
}

/// A linear layer on integers has the CPU's bits, whatever its shape, groups and type, alone and replayed from a graph.
#[test]
#[ignore = "needs a GPU"]
fn integer_linears_have_the_bits_of_the_cpu() {
    use spinquant::ops::codes::Codes;
    use spinquant::ops::integer_linear::integer_linear;
    let device = &Device::cuda(0).unwrap();
    let (act, weight) = (QuantSpec::activation, QuantSpec::weight);
    let whole = [
        (1, 8, 16),
        (1001, 264, 272),
        (128, 256, 128),
        (300, 520, 1040),
        (513, 1032, 4096),
        (97, 4096, 11008),
        (100, 1003, 96),
        (65, 77, 33),
        (7, 5, 5),
    ];
    let grouped = [(130, 258, 1024, Some(128), None), (70, 66, 512, Some(64), Some(128)), (33, 40, 256, None, Some(32))];
    let all = whole.into_iter().map(|(m, n, k)| (m, n, k, None, None)).chain(grouped);
    for (i, (m, n, k, group, w_group)) in all.enumerate() {
        for (bits, symmetric, far) in [(4, false, false), (8, false, false), (8, true, false), (8, false, true)] {
            for dtype in [DType::F32, DType::F16, DType::BF16] {
                let beside = (i + bits as usize).is_multiple_of(2);
                let draw = |shape: &[usize], seed| randn(shape.to_vec(), seed).to_dtype(dtype).unwrap();
                // Rows far from 0 have groups with zero points that pass 32 bits times a sum.
                let x = match far {
                    false => draw(&[m, k], 1),
                    true => Tensor::from_vec(
                        randn([m, k], 1).into_vec::<f64>().unwrap().into_iter().map(|x| 200.0 + x / 16.0).collect::<Vec<f64>>(),
                        [m, k],
                    )
                    .unwrap()
                    .to_dtype(dtype)
                    .unwrap(),
                };
                let spec = QuantSpec { group, ..act(bits, symmetric) };
                let w_spec = QuantSpec { group: w_group, ..weight(if bits == 8 { 8 } else { 4 }, true) };
                let (x, w) = (Codes::quantize(&x, &spec).unwrap(), Codes::quantize(&draw(&[n, k], 2), &w_spec).unwrap());
                let (b, r) = (beside.then(|| draw(&[n], 3)), beside.then(|| draw(&[m, n], 4)));
                let want = integer_linear(&x, &w, b.as_ref(), r.clone(), dtype).unwrap();
                let place = |t: &Tensor| t.to_device(device).unwrap();
                let (gx, gw) = (x.to_device(device).unwrap(), w.to_device(device).unwrap());
                let (b, r) = (b.as_ref().map(place), r.as_ref().map(place));
                let got = integer_linear(&gx, &gw, b.as_ref(), r, dtype).unwrap();
                let name = format!("{m}x{n}x{k} {bits} bits, symmetric {symmetric}, far {far}, {dtype}");
                assert_eq!(got.to_f64_vec().unwrap(), want.to_f64_vec().unwrap(), "{name}");
            }
        }
    }
}

/// Codes made on the GPU are those of its fake quantisation, bit for bit, and those of the CPU.
#[test]
#[ignore = "needs a GPU"]
fn codes_are_those_of_fake_quantisation() {
    use spinquant::ops::codes::Codes;
    let device = &Device::cuda(0).unwrap();
    for (rows, cols) in [(1, 1), (3, 37), (1001, 128), (65, 4096), (7, 11008), (2, 100_000)] {
        for (bits, symmetric) in [(2, true), (4, false), (4, true), (8, false), (8, true)] {
            for group in [None, Some(32)].into_iter().filter(|g| g.is_none_or(|g| cols % g == 0)) {
                for dtype in [DType::F32, DType::F16, DType::BF16] {
                    let spec = QuantSpec { group, ..QuantSpec::activation(bits, symmetric) };
                    let x = randn([rows, cols], 7).to_dtype(dtype).unwrap();
                    let got = Codes::quantize(&x.to_device(device).unwrap(), &spec).unwrap();
                    let want = Codes::quantize(&x, &spec).unwrap();
                    let grids = |c: &Codes| {
                        let zero = c.zero().map(|z| z.to_f64_vec().unwrap());
                        (c.to_vec().unwrap(), c.scale().to_f64_vec().unwrap(), zero)
                    };
                    assert_eq!(grids(&got), grids(&want), "{rows}x{cols}, {spec:?}, {dtype}");
                }
            }
        }
    }
}

/// Codes behind Hadamard maps stand for what the fused fake quantisation writes: to the bit where one kernel makes both, and but for ties where
/// another makes codes. Packed ones are the same codes.
#[test]
#[ignore = "needs a GPU"]
fn hadamard_codes_are_those_of_fake_quantisation() {
    fn check<T: kernels::Float>(s: &Arc<CudaStream>, n: usize, block: usize, rows: usize, spec: &QuantSpec, dtype: DType) {
        let group = spec.group.unwrap_or(n);
        let x: Vec<T> = randn([rows, n], n as u64).to_dtype(dtype).unwrap().into_vec().unwrap();
        let map = HadamardMap::of(s, Hadamard::in_blocks(n, block).unwrap()).unwrap();
        let (gx, mut gy) = (s.clone_htod(&x).unwrap(), s.clone_htod(&x).unwrap());
        kernels::hadamard_fake_quant(s, &mut gy, &gx, &map, spec).unwrap();
        let want = Tensor::from_vec(s.clone_dtoh(&gy).unwrap(), [rows, n]).unwrap().to_f64_vec().unwrap();
        let [mut scale, mut zero] = [0; 2].map(|_| s.alloc_zeros::<f32>(rows * n / group).unwrap());
        let mut codes = s.clone_htod(&vec![0x5ai8; rows * n]).unwrap();
        kernels::hadamard_codes(s, &mut codes, &mut scale, (!spec.symmetric).then_some(&mut zero), &gx, &map, spec).unwrap();
        let (codes, scales, zeros) = (s.clone_dtoh(&codes).unwrap(), s.clone_dtoh(&scale).unwrap(), s.clone_dtoh(&zero).unwrap());
        let values: Vec<f32> =
            codes.iter().enumerate().map(|(i, &c)| scales[i / group] * (f32::from(c) - zeros[i / group])).collect();
        let got = Tensor::from_vec(values, [rows, n]).unwrap().to_dtype(dtype).unwrap().to_f64_vec().unwrap();
        let off: Vec<usize> = (0..got.len()).filter(|&i| got[i] != want[i]).collect();
        let family = kernels::hadamard_choice(map.map(), dtype, Some(spec), kernels::Gpu::current().unwrap()).unwrap().family;
        let other = family.starts_with("tensor") || family.starts_with("core");
        let name = format!("{rows}x{n} in {block}, {spec:?}, {dtype}, {family}");
        assert!(off.len() * 1000 <= if other { got.len().max(1000) } else { 0 }, "{name}: {} off", off.len());
        for i in off {
            let step = f64::from(scales[i / group]);
            assert!((got[i] - want[i]).abs() < 1.02 * step, "{name}: value {i} is {}, not {}", got[i], want[i]);
        }
        if spec.bits <= 4 && group.is_multiple_of(2) {
            let mut packed = s.clone_htod(&vec![0x5au8; rows * n / 2]).unwrap();
            kernels::hadamard_codes(s, &mut packed, &mut scale, (!spec.symmetric).then_some(&mut zero), &gx, &map, spec).unwrap();
            let both = |b: u8| [((b << 4) as i8) >> 4, (b as i8) >> 4];
            assert!(s.clone_dtoh(&packed).unwrap().into_iter().flat_map(both).eq(codes), "{name}: packed");
            assert!(s.clone_dtoh(&scale).unwrap() == scales && s.clone_dtoh(&zero).unwrap() == zeros, "{name}: packed");
        } else {
            let mut packed = s.alloc_zeros::<u8>(rows * n / 2).unwrap();
            let error = kernels::hadamard_codes(s, &mut packed, &mut scale, Some(&mut zero), &gx, &map, spec).unwrap_err();
            assert!(error.to_string().contains("even groups"), "{error}");
        }
    }
    let s = &stream();
    let all = |n: usize, block: usize, rows: usize, specs: &[QuantSpec]| {
        for spec in specs {
            check::<f32>(s, n, block, rows, spec, DType::F32);
            check::<half::f16>(s, n, block, rows, spec, DType::F16);
            check::<bf16>(s, n, block, rows, spec, DType::BF16);
        }
    };
    let act = QuantSpec::activation;
    let specs = [act(4, false), act(4, true), act(8, false), act(3, true).clipped(Clip::Ratio(0.9))];
    for n in [1, 2, 4, 8, 64, 512, 1024, 2048, 4096, 8192, 11008, 13824, 14336, 16384, 18944, 5504, 10944, 28672] {
        all(n, n, if n > 8192 { 3 } else { 37 }, &specs);
    }
    for (n, block) in [(1536, 64), (11008, 256), (14336, 2048)] {
        all(n, block, 5, &specs);
    }
    all(128, 128, 37, &[act(4, false).grouped(16), act(4, true).grouped(32), act(8, false).grouped(64)]);
}

/// The adapters on bare slices, in a graph that is replayed, and what they refuse.
#[test]
#[ignore = "needs a GPU"]
fn integer_linears_of_slices_replay_from_a_graph() {
    use kernels::CodedRows;
    let s = &stream();
    // SAFETY: one stream does all the work. Events of the time before it cannot be waited for in a graph.
    unsafe { s.context().disable_event_tracking() };
    let (m, n, k) = (257, 264, 272);
    let (x, w) = (values(1, m * k), values(2, n * k));
    let (gx, gw) = (s.clone_htod(&x).unwrap(), s.clone_htod(&w).unwrap());
    let (mut q_x, mut q_w) = (s.alloc_zeros::<i8>(m * k).unwrap(), s.alloc_zeros::<i8>(n * k).unwrap());
    let [mut s_x, mut z_x] = [0; 2].map(|_| s.alloc_zeros::<f32>(m).unwrap());
    let (mut s_w, mut sums) = (s.alloc_zeros::<f32>(n).unwrap(), s.alloc_zeros::<i32>(n).unwrap());
    let mut y = s.alloc_zeros::<f32>(m * n).unwrap();
    let (act, weight) = (QuantSpec::activation(8, false), QuantSpec::weight(4, true));
    let mut all = |y: &mut CudaSlice<f32>| {
        kernels::quantize_codes(s, &mut q_w, &mut s_w, None, &gw, k, &weight).unwrap();
        kernels::code_sums(s, &mut sums, &q_w, k, k).unwrap();
        kernels::quantize_codes(s, &mut q_x, &mut s_x, Some(&mut z_x), &gx, k, &act).unwrap();
        let coded = CodedRows { codes: &q_x, scale: &s_x, zero: Some(&z_x), group: k };
        let weights = CodedRows { codes: &q_w, scale: &s_w, zero: None, group: k };
        kernels::integer_linear(s, y, coded, weights, Some(&sums), None, None, k).unwrap();
        // Sums are needed, and k must be that of the codes.
        assert!(kernels::integer_linear(s, y, coded, weights, None, None, None, k).is_err());
        assert!(kernels::integer_linear(s, y, coded, weights, Some(&sums), None, None, k - 1).is_err());
    };
    all(&mut y);
    let first = s.clone_dtoh(&y).unwrap();
    let tensor = |v: &[f32], rows: usize| Tensor::from_vec(v.to_vec(), [rows, k]).unwrap();
    let codes = |v: &[f32], rows, spec: &QuantSpec| spinquant::ops::codes::Codes::quantize(&tensor(v, rows), spec).unwrap();
    let (cx, cw) = (codes(&x, m, &act), codes(&w, n, &weight));
    let want = spinquant::ops::integer_linear::integer_linear(&cx, &cw, None, None, DType::F32).unwrap();
    assert_eq!(first, want.to_vec::<f32>().unwrap());

    use cudarc::driver::sys::{CUgraphInstantiate_flags_enum as Flags, CUstreamCaptureMode_enum as Mode};
    s.memset_zeros(&mut y).unwrap();
    s.synchronize().unwrap();
    s.begin_capture(Mode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).unwrap();
    all(&mut y);
    let graph = s.end_capture(Flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH).unwrap().unwrap();
    for _ in 0..3 {
        graph.launch().unwrap();
    }
    assert_eq!(s.clone_dtoh(&y).unwrap(), first);
}

/// Packed elements and scales are the CPU's: to the bit as they are, but for ties behind Hadamard matrices.
#[test]
#[ignore = "needs a GPU"]
fn encoders_are_those_of_the_cpu() {
    let s = &stream();
    for format in Format::ALL {
        for (rows, n) in [(1, 512), (37, 1024), (1001, 512)] {
            let mut x = values(5, rows * n);
            x.iter_mut().enumerate().for_each(|(i, x)| *x *= [1.0, 1e-3, 30.0, 0.0][i / 16 % 4]);
            let x: Vec<bf16> = x.into_iter().map(bf16::from_f32).collect();
            let gx = s.clone_htod(&x).unwrap();
            let host = Tensor::from_vec(x, [rows, n]).unwrap();
            let largest = host.to_f64_vec().unwrap().into_iter().fold(0f64, |m, x| m.max(x.abs()));
            for rotated in [0usize, 16, 32, 64, 128, 256, 512] {
                let want = encode(&host, format, (rotated > 0).then_some(rotated)).unwrap();
                let (mut codes, mut scales) =
                    (s.alloc_zeros::<u8>(rows * n / 2).unwrap(), s.alloc_zeros::<u8>(rows * n / format.block()).unwrap());
                // NVFP4's scales are fractions of the largest magnitude of what is encoded.
                let most = if rotated == 0 { largest as f32 } else { want.unit * (6.0 * 448.0) };
                let most = s.clone_htod(&[most]).unwrap();
                let most = (format == Format::Nvfp4).then_some(&most);
                kernels::encode(s, &mut codes, &mut scales, &gx, most, format, rotated).unwrap();
                let (codes, scales) = (s.clone_dtoh(&codes).unwrap(), s.clone_dtoh(&scales).unwrap());
                s.synchronize().unwrap();
                let off = |a: &[u8], b: &[u8]| a.iter().zip(b).filter(|(a, b)| a != b).count();
                let differ = (off(&codes, &want.codes), off(&scales, &want.scales));
                let allowed = if rotated == 0 { (0, 0) } else { (codes.len() / 200, scales.len() / 500) };
                assert!(
                    differ.0 <= allowed.0 && differ.1 <= allowed.1,
                    "{format} {rows}x{n} {rotated}: {differ:?} of {}",
                    codes.len()
                );
                let (tensor, map) = (host.to_device(&crate::common::need::gpu()).unwrap(), (rotated > 0).then_some(rotated));
                let ours = encode(&tensor, format, map).unwrap();
                assert!(off(&ours.codes, &want.codes) <= allowed.0 && off(&ours.scales, &want.scales) <= allowed.1);
            }
            let mut most = s.alloc_zeros::<f32>(1).unwrap();
            kernels::largest(s, &mut most, &gx).unwrap();
            assert_eq!(f64::from(s.clone_dtoh(&most).unwrap()[0]), largest);
        }
        let x = s.alloc_zeros::<bf16>(48).unwrap();
        let (mut codes, mut scales) = (s.alloc_zeros::<u8>(24).unwrap(), s.alloc_zeros::<u8>(3).unwrap());
        let none = None::<&CudaSlice<f32>>;
        assert!(kernels::encode(s, &mut codes, &mut scales, &x, none, format, 32).is_err());
        assert!(kernels::encode(s, &mut codes, &mut scales, &x, none, format, 48).is_err());
    }
}
