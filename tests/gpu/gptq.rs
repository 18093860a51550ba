//! GPTQ against the CPU's.

use spinquant::calibrate::{Calibration, quantize_weights};
use spinquant::grid::Quantized;
use spinquant::linalg::matmul::product;
use spinquant::llama::Llama;
use spinquant::ops::fake_quant::quantize;
use spinquant::ops::randn;
use spinquant::quant::{Clip, Correction, Gptq, GroupScales, Moments, QuantSpec, QuantizedLinear, Rtn, Scheme, WeightQuantizer};
use spinquant::rotation::Rotations;
use spinquant::{DType, Device, Tape, Tensor};

use crate::common::distance;
use crate::common::gptq::*;
use crate::common::need::gpu;

#[test]
#[ignore = "needs a GPU"]
fn published_numbers() {
    published_in_f32(&gpu());
}

#[test]
#[ignore = "needs a GPU"]
fn awkward_hessians() {
    awkward_hessians_on(&gpu(), DType::F32);
    awkward_hessians_on(&gpu(), DType::F64); // with the weight there, but done on the CPU
}

#[test]
#[ignore = "needs a GPU"]
fn dead_columns_become_zero() {
    dead_columns_on(&gpu(), DType::F32);
}

#[test]
#[ignore = "needs a GPU"]
fn awkward_corrections() {
    awkward_corrections_on(&gpu(), DType::F32);
    awkward_corrections_on(&gpu(), DType::F64); // with the weight there, but done on the CPU
}

/// Of the same values, in f64. A difference of 16-bit inputs is rounded to 16 bits, by half a unit in the last place at most; over many rows
/// these roundings cancel: the mean of r is a few times 1/√r of one.
#[test]
#[ignore = "needs a GPU"]
fn drifts() {
    let device = gpu();
    for (rows, n) in [(9000, 150), (1, 1), (100, 33), (4097, 64)] {
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            let x = inputs(rows, n, 8);
            let [x, there] = [x.clone(), disturbed(&x, 9)].map(|t| t.to_dtype(dtype).unwrap());
            let wide = |t: &Tensor| t.to_dtype(DType::F64).unwrap();
            let exact = moments(&wide(&x), &wide(&there), 5).drift.unwrap();
            let place = |t: &Tensor| t.to_device(&device).unwrap().reshape([1, rows, n]).unwrap();
            let ours = moments(&place(&x), &place(&there), 5).drift.unwrap();
            assert_eq!((ours.device(), ours.dtype(), ours.shape()), (device.clone(), DType::F64, &[n, n][..]));
            let largest = values(&exact).iter().fold(0f64, |m, x| m.max(x.abs()));
            let error = distance(&values(&ours), &values(&exact)) / largest;
            let mean = (4.0 / (rows as f64).sqrt()).min(1.0);
            let bound = if dtype.is_half() { 0.51 * dtype.epsilon() * mean } else { 4e-6 };
            println!("{rows} x {n} {dtype}: error {error:.1e} of the largest value");
            assert!(error <= bound, "{rows} x {n} {dtype}: {error:e}");
        }
    }
}

/// As below, with every correction: few rows differ from the CPU's in f32, and the error of the output is the same.
#[test]
#[ignore = "needs a GPU"]
fn corrected_sweeps() {
    let device = gpu();
    let (rows, n) = (70, 300);
    let x = inputs(900, n, 12);
    let x_there = disturbed(&x, 13);
    let m = moments(&x, &x_there, 3);
    let place = |t: &Tensor| t.to_device(&device).unwrap();
    let there = Moments { hessian: place(&m.hessian), drift: m.drift.as_ref().map(place) };
    let y = |x: &Tensor, w: &Tensor| {
        let w = w.to_device(&Device::Cpu).unwrap().to_dtype(DType::F64).unwrap();
        values(&product(x, false, &w, true, false, DType::F64).unwrap())
    };
    let groups = [None, Some(20), Some(75), Some(150)];
    for correction in Correction::ALL {
        for (i, group) in groups.into_iter().cycle().take(16).enumerate() {
            let (bits, symmetric, act_order) = ([4, 3, 4, 8][i / 4 % 4], i / 2 % 2 == 0, i % 3 == 0);
            let spec = QuantSpec { group, ..QuantSpec::weight(bits, symmetric).clipped(Clip::Ratio(0.95)) };
            let gptq = Gptq { act_order, block: [128, 7, 300, 64][i % 4], correction, ..Gptq::default() };
            for dtype in [DType::F32, DType::BF16] {
                let w = randn([rows, n], 100 + i as u64).to_dtype(dtype).unwrap();
                let (cpu, gpu) = (corrected(&gptq, &w, &spec, &m), corrected(&gptq, &place(&w), &spec, &there));
                assert_on_grid(&gpu, &spec);
                let codes = |q: &QuantizedLinear| q.codes.as_ref().unwrap().codes.clone();
                let moved = codes(&cpu).chunks(n).zip(codes(&gpu).chunks(n)).filter(|(a, b)| a != b).count();
                let wanted = y(&x, &w);
                let error = |q: &QuantizedLinear| -> f64 {
                    wanted.iter().zip(y(&x_there, &q.weight)).map(|(a, b)| (a - b) * (a - b)).sum()
                };
                let ratio = error(&gpu) / error(&cpu);
                let what =
                    format!("{correction} {spec:?} {gptq:?} {dtype}: {moved} of {rows} rows differ, errors are {ratio} apart");
                println!("{what}");
                // Groups' grids come from weights that f32 has rounded: more rows may differ where they are found on the way.
                assert!(moved * 4 <= rows && (ratio - 1.0).abs() < 0.01, "{what}");
                assert_eq!(codes(&corrected(&gptq, &place(&w), &spec, &there)), codes(&gpu), "{what}");
            }
        }
    }
}

/// Streams that are the same: GPTQ's codes, on the GPU too. FOEM with a constant of 0 as well.
#[test]
#[ignore = "needs a GPU"]
fn nothing_to_correct_is_gptq() {
    let x = inputs(900, 300, 12).to_dtype(DType::F32).unwrap().to_device(&gpu()).unwrap();
    let m = moments(&x, &x, 3);
    let w = randn([70, 300], 3).to_dtype(DType::BF16).unwrap().to_device(&gpu()).unwrap();
    for spec in [QuantSpec::weight(4, true), QuantSpec::weight(3, false).grouped(75)] {
        let plain = corrected(&Gptq::default(), &w, &spec, &m);
        for correction in [Correction::Gptaq(0.25), Correction::Qep(1.0), Correction::Qronos, Correction::Foem(0.0)] {
            let q = corrected(&Gptq { correction, ..Gptq::default() }, &w, &spec, &m);
            let differ = different_codes(&q, &plain);
            // GPTAQ's blocks are half as wide, which is another order of the same sums.
            let allowed = if matches!(correction, Correction::Gptaq(_)) { 70 * 300 / 50 } else { 0 };
            assert!(differ <= allowed, "{correction}: {differ} codes differ");
        }
    }
}

/// Sums of products of at most 4096 rows in f32 (exact products, for 16-bit inputs), against the same values in f64.
#[test]
#[ignore = "needs a GPU"]
fn hessians() {
    let device = gpu();
    for (rows, n) in [(9000, 150), (1, 1), (100, 33), (4097, 64)] {
        for (dtype, bound) in [(DType::F32, 4e-6), (DType::BF16, 2e-5), (DType::F16, 2e-5)] {
            let x = inputs(rows, n, 8).to_dtype(dtype).unwrap();
            let exact = values(&hessian(&x.to_dtype(DType::F64).unwrap(), 5));
            let x = x.to_device(&device).unwrap().reshape([1, rows, n]).unwrap();
            let h = hessian(&x, 5);
            assert_eq!((h.device(), h.dtype(), h.shape()), (device.clone(), DType::F64, &[n, n][..]));
            let ours = values(&h);
            let largest = exact.iter().fold(0f64, |m, x| m.max(x.abs()));
            let error = distance(&ours, &exact) / largest;
            println!("{rows} x {n} {dtype}: error {error:.1e} of the largest value");
            assert!(error <= bound, "{rows} x {n} {dtype}: {error:e}");
            assert!((0..n).all(|i| (0..i).all(|j| ours[i * n + j] == ours[j * n + i])));
        }
    }
}

/// The sweep on the GPU against the one on the CPU in f32, from the same Hessian: codes differ only where a rounding moved a value
/// across a tie, which moves the rest of its row.
#[test]
#[ignore = "needs a GPU"]
fn sweeps() {
    let device = gpu();
    let (rows, n) = (70, 300);
    let h = hessian(&inputs(900, n, 12), 3);
    let there = h.to_device(&device).unwrap();
    let groups = [None, Some(20), Some(75), Some(150)];
    let mut worst = 0.0f64;
    for (i, group) in groups.into_iter().cycle().take(32).enumerate() {
        let (bits, symmetric, act_order, fresh) = ([4, 3, 2, 8][i / 4 % 4], i / 2 % 2 == 0, i % 3 == 0, i % 5 != 0);
        let clip = if i % 2 == 0 { Clip::Search } else { Clip::Ratio(0.95) };
        let spec = QuantSpec { group, ..QuantSpec::weight(bits, symmetric).clipped(clip) };
        let group_scales = if fresh { GroupScales::Updated } else { GroupScales::FinishedBlocks };
        let gptq = Gptq { act_order, block: [128, 7, 300, 64][i % 4], group_scales, ..Gptq::default() };
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            let w = randn([rows, n], 100 + i as u64).to_dtype(dtype).unwrap();
            let cpu = gptq.quantize_one(&w, &spec, &h).unwrap();
            let w_there = w.to_device(&device).unwrap();
            let gpu = gptq.quantize_one(&w_there, &spec, &there).unwrap();
            assert_on_grid(&gpu, &spec);
            assert_eq!((gpu.weight.device(), gpu.weight.dtype()), (device.clone(), dtype));
            assert_eq!((gpu.damping, gpu.codes.as_ref().unwrap().group), (cpu.damping, cpu.codes.as_ref().unwrap().group));
            let codes = |q: &QuantizedLinear| q.codes.as_ref().unwrap().codes.clone();
            let (a, b) = (codes(&cpu), codes(&gpu));
            let moved = a.chunks(n).zip(b.chunks(n)).filter(|(a, b)| a != b).count();
            let (l, m) = (cpu.loss.unwrap(), gpu.loss.unwrap());
            worst = worst.max((l / m - 1.0).abs());
            let what = format!("{spec:?} {gptq:?} {dtype}: {moved} of {rows} rows differ, losses {l} and {m}");
            assert!(moved * 5 <= rows && (l / m - 1.0).abs() < 0.01, "{what}");
            // The loss it reports is that of its codes.
            let hv = values(&h);
            let mean = (0..n).map(|i| hv[i * n + i]).sum::<f64>() / n as f64;
            let damped = hv.iter().enumerate().map(|(i, h)| h + if i % (n + 1) == 0 { 0.01 * mean } else { 0.0 }).collect();
            let written = gpu.codes.as_ref().unwrap().dequantize().unwrap();
            let exact = loss(&w, &written, &Tensor::from_vec::<f64>(damped, [n, n]).unwrap());
            assert!((m / exact - 1.0).abs() < 1e-3, "{what}: is {exact}");
            // The same bits again.
            let again = gptq.quantize_one(&w_there, &spec, &there).unwrap();
            assert_eq!((codes(&again), again.loss), (b, gpu.loss), "{what}");
        }
    }
    println!("losses agree within {worst:.1e}");
}

/// Clip ratios that were learned, a pair for every row or group: grids are the CPU's, for rounding to nearest and for the sweep, and codes
/// differ where a rounding moved a value across a tie.
#[test]
#[ignore = "needs a GPU"]
fn learned_ratios() {
    let device = gpu();
    let (rows, n) = (70, 300);
    let h = hessian(&inputs(900, n, 12), 3);
    let place = |t: &Tensor| t.to_device(&device).unwrap();
    let (moments, there): (Moments, Moments) = (h.clone().into(), place(&h).into());
    for (i, group) in [None, Some(20), Some(75)].into_iter().cycle().take(12).enumerate() {
        let (symmetric, act_order, stored) = (i / 3 % 2 == 0, i % 2 == 0, i >= 6);
        let kinds = rows * n / group.unwrap_or(n);
        let a = randn([kinds, 2], 300).to_f64_vec().unwrap().into_iter().map(|a| -0.15 - 0.05 * a.clamp(-2.0, 2.0)).collect();
        let a = Tensor::from_vec::<f64>(a, [kinds, 2]).unwrap().to_dtype(DType::F32).unwrap();
        for dtype in [DType::F32, DType::BF16] {
            let spec = QuantSpec { group, ..QuantSpec::weight(4, symmetric) };
            let spec = if stored { spec.stored(dtype) } else { spec };
            let w = randn([rows, n], 100 + i as u64).to_dtype(dtype).unwrap();
            let (w_there, a_there) = (place(&w), place(&a));
            let apart = |a: &QuantizedLinear, b: &QuantizedLinear| {
                let (a, b) = (a.codes.as_ref().unwrap(), b.codes.as_ref().unwrap());
                let (x, y) = (a.scale.to_f64_vec().unwrap(), b.scale.to_f64_vec().unwrap());
                let scale = x.iter().zip(&y).map(|(a, b)| (a / b - 1.0).abs()).fold(0f64, f64::max);
                (scale, a.codes.chunks(n).zip(b.codes.chunks(n)).filter(|(a, b)| a != b).count())
            };
            let rtn = |w: &Tensor, a: &Tensor| Rtn.quantize_clipped(&[w], &spec, None, &[a]).unwrap().remove(0);
            let (cpu, gpu) = (rtn(&w, &a), rtn(&w_there, &a_there));
            // Both compute scales in f32; those that are stored in 16 bits may fall on two sides of a rounding.
            let step = if stored && dtype.is_half() { dtype.epsilon() } else { 1e-6 };
            let (scale, moved) = apart(&gpu, &cpu);
            assert!(scale <= step && moved <= rows / 10, "{spec:?} {dtype}: scales {scale:e} apart, {moved} rows differ");
            // A network that is merged there has the same weights.
            let tape = Tape::new();
            let on_tape = tape.constant(w_there.clone()).clipped_fake_quant(&spec, tape.constant(a_there.clone()), true);
            if stored {
                assert!(on_tape.is_err());
            } else {
                let [x, y] = [&gpu.weight, on_tape.unwrap().value()].map(|t| values(&t.to_device(&Device::Cpu).unwrap()));
                let far = x.iter().zip(&y).filter(|(x, y)| (*x - *y).abs() > 2.0 * dtype.epsilon() * x.abs().max(1e-3)).count();
                assert!(far <= x.len() / 1000, "{spec:?} {dtype}: {far} weights differ");
            }

            let gptq = Gptq { act_order, ..Gptq::default() };
            let cpu = gptq.quantize_clipped(&[&w], &spec, Some(&moments), &[&a]).unwrap().remove(0);
            let gpu = gptq.quantize_clipped(&[&w_there], &spec, Some(&there), &[&a_there]).unwrap().remove(0);
            assert_on_grid(&gpu, &spec);
            let (moved, ratio) = (apart(&gpu, &cpu).1, gpu.loss.unwrap() / cpu.loss.unwrap());
            assert!(moved * 5 <= rows && (ratio - 1.0).abs() < 0.01, "{spec:?} {dtype}: {moved} of {rows} rows, losses {ratio}");
            let others = place(&a.clone().scale(2.0).unwrap());
            let other = gptq.quantize_clipped(&[&w_there], &spec, Some(&there), &[&others]).unwrap().remove(0);
            assert!(apart(&other, &gpu).0 > 1e-3);
        }
    }
}

/// Scales that a file keeps in 16 bits are numbers of that type, zero points are codes; GPTQ is as good as on the CPU.
#[test]
#[ignore = "needs a GPU"]
fn stored_scales() {
    let device = gpu();
    let (rows, n) = (70, 300);
    let h = hessian(&inputs(900, n, 12), 3);
    let there = h.to_device(&device).unwrap();
    let w = randn([rows, n], 200).to_dtype(DType::F32).unwrap();
    let w_there = w.to_device(&device).unwrap();
    let stored = |q: &Quantized, spec: &QuantSpec, dtype: DType| {
        let scales = q.scale.to_f64_vec().unwrap();
        assert!(scales.iter().all(|&s| s > 0.0 && dtype.round(s) == s), "{spec:?}");
        let codes = f64::from(spec.min_code())..=f64::from(spec.max_code());
        assert!(q.zero.to_f64_vec().unwrap().iter().all(|z| codes.contains(z)), "{spec:?}");
        scales
    };
    for (symmetric, group, clip) in [
        (true, None, Clip::Ratio(1.0)),
        (true, Some(75), Clip::Search),
        (false, None, Clip::Search),
        (false, Some(20), Clip::Ratio(0.9)),
    ] {
        for dtype in [DType::BF16, DType::F16] {
            let spec = QuantSpec { group, ..QuantSpec::weight(4, symmetric).clipped(clip) }.stored(dtype);
            let (cpu, gpu) = (quantize(&w, &spec).unwrap(), quantize(&w_there, &spec).unwrap());
            let (a, b) = (stored(&cpu, &spec, dtype), stored(&gpu, &spec, dtype));
            let zeros = [&cpu, &gpu].map(|q| q.zero.to_f64_vec().unwrap());
            // Another last bit of a scale before it is rounded, or of an error in the search.
            let same: Vec<bool> = (0..a.len()).map(|i| a[i] == b[i] && zeros[0][i] == zeros[1][i]).collect();
            let moved = same.iter().filter(|same| !**same).count();
            assert!(moved * 50 <= a.len(), "{spec:?}: {moved} of {} grids differ", a.len());
            for (i, (a, b)) in cpu.codes.chunks(cpu.group).zip(gpu.codes.chunks(gpu.group)).enumerate() {
                assert!(!same[i] || a == b, "{spec:?}: codes of group {i}");
            }

            let gptq = Gptq::default();
            let here = gptq.quantize_one(&w, &spec, &h).unwrap();
            let theirs = gptq.quantize_one(&w_there, &spec, &there).unwrap();
            stored(theirs.codes.as_ref().unwrap(), &spec, dtype);
            assert_on_grid(&theirs, &spec);
            let (l, m) = (here.loss.unwrap(), theirs.loss.unwrap());
            assert!((l / m - 1.0).abs() < 0.01, "{spec:?}: losses {l} and {m}");
        }
    }
    // A scale that the type cannot hold is its least number.
    let small = Tensor::from_vec(vec![1e-9f32; 16], [2, 8]).unwrap().to_device(&device).unwrap();
    let spec = QuantSpec::weight(8, true).clipped(Clip::Ratio(0.2)).stored(DType::F16);
    assert!(quantize(&small, &spec).unwrap().scale.to_f64_vec().unwrap().iter().all(|&s| s == DType::F16.least()));
}

#[test]
#[ignore = "needs a GPU"]
fn an_interrupted_run_continues_to_the_same_bits() {
    for dtype in [DType::F32, DType::BF16] {
        interrupted_runs(&model(dtype).to_device(&gpu()).unwrap());
    }
}

/// The first layer's linears meet the same Hessians but for rounding.
#[test]
#[ignore = "needs a GPU"]
fn the_pipeline() {
    let device = gpu();
    let (model, text) = (model(DType::F32), text());
    let there = model.clone().to_device(&device).unwrap();
    let rotations = Rotations::random_hadamard(32, 8, 3, 2).unwrap();
    let calibration = Calibration::first(&text, 10).unwrap();
    let grouped = Scheme { weight_group: Some(16), ..Scheme::new(3, 16, 16) };
    let plain = [(Scheme::new(4, 4, 4), false, Correction::None), (grouped, true, Correction::None)];
    // Of the first layer D is that of its own quantisers alone, which round as the CPU's but for ties.
    let corrected = Correction::ALL.map(|correction| (Scheme::new(4, 8, 8), false, correction));
    for (scheme, act_order, correction) in plain.into_iter().chain(corrected) {
        let gptq = Gptq { act_order, correction, ..Gptq::default() };
        let run = |model: &Llama| {
            let mut store = Memory::default();
            quantize_weights(model, Some(&rotations), &scheme, &gptq, Some(&calibration), &mut store, go_on).unwrap();
            store.0.remove(0)
        };
        let (cpu, gpu) = (run(&model), run(&there));
        for ((name, a), (_, b)) in cpu.linears.iter().zip(gpu.linears.iter()) {
            let (a, b) = (&a.weight, &b.weight);
            let (differ, all) = (different_codes(a, b), a.codes.as_ref().unwrap().codes.len());
            println!("{scheme} {correction} {name}: {differ} of {all} codes differ");
            assert!(differ * 20 <= all, "{scheme} {correction} {name}: {differ} of {all} codes differ");
        }
    }
}
