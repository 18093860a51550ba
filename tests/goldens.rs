//! The published code's numbers, through public functions. `SPINQUANT_GOLDENS` names another folder of the same layout.

mod common;

use common::{Golden, distance, number};
use spinquant::hadamard::Hadamard;
use spinquant::ops::{fake_quant, hadamard, randn};
use spinquant::optim::{CayleySgd, Mode, Optimizer};
use spinquant::quant::{Clip, QuantSpec};
use spinquant::{DType, Tape, Tensor};

#[test]
fn cayley_trajectories() {
    let golden = Golden::open("cayley.safetensors");
    for case in golden.list() {
        let name = case["name"].as_str().unwrap();
        let (n, lr, steps) = (number(case, "n") as usize, number(case, "lr"), number(case, "steps") as usize);
        let (grads, want) = (golden.get(&format!("{name}.grads")), golden.get(&format!("{name}.R")));
        assert_eq!(want.shape(), [steps, n, n]);
        let mut params = [golden.get(&format!("{name}.R0")).reshape([1, n, n]).unwrap()];
        let mut optimizer = CayleySgd::new(Mode::Parity);
        for step in 0..steps {
            optimizer.step(&mut params, vec![grads.slice(step, 1).unwrap()], lr).unwrap();
            let e = distance(&params[0].to_vec().unwrap(), &want.slice(step, 1).unwrap().to_vec().unwrap());
            assert!(e <= 1e-9, "{name} step {step}: off by {e:e}");
        }
    }
    println!("cayley: {} trajectories", golden.list().len());
}

#[test]
fn quantizers() {
    let golden = Golden::open("quantizers.safetensors");
    let (mut codes, mut flipped) = (0, 0);
    for case in golden.list() {
        let name = case["name"].as_str().unwrap();
        let get = |what: &str| golden.get(&format!("{name}.{what}"));
        let (bits, symmetric) = (number(case, "bits") as u32, case["symmetric"].as_bool().unwrap());
        let activation = match case["kind"].as_str().unwrap() {
            "activation" => true,
            "weight" => false,
            other => panic!("{name}: kind {other}"),
        };
        let spec = if activation { QuantSpec::activation(bits, symmetric) } else { QuantSpec::weight(bits, symmetric) };
        let spec = if number(case, "group") > 0.0 { spec.grouped(number(case, "group") as usize) } else { spec };
        let search = case["clip_search"].as_bool().unwrap_or(false);
        let ratio = case["clip_ratio"].as_f64().unwrap_or(1.0);
        let spec = spec.clipped(if search { Clip::Search } else { Clip::Ratio(ratio) });

        // f64: codes equal, values to 1e-12, straight-through gradient.
        let (x, y, scale, zero) = (get("x"), get("y").to_vec::<f64>().unwrap(), get("scale"), get("zero"));
        let (scale, zero) = (scale.to_vec::<f64>().unwrap(), zero.to_vec::<f64>().unwrap());
        let want: Vec<f64> = y.iter().zip(&scale).zip(&zero).map(|((y, s), z)| (y / s + z).round()).collect();
        let ours = fake_quant::quantize(&x, &spec).unwrap();
        let spread = |t: &Tensor| -> Vec<f64> {
            let t = t.to_f64_vec().unwrap();
            (0..x.len()).map(|i| t[i / ours.group]).collect()
        };
        assert!(distance(&spread(&ours.scale), &scale) <= 1e-12, "{name}: scales");
        assert_eq!(spread(&ours.zero), zero, "{name}: zero points");
        assert_eq!(ours.codes.iter().map(|&c| f64::from(c)).collect::<Vec<_>>(), want, "{name}: codes");
        let tape = Tape::new();
        let v = tape.variable(x.clone());
        let out = v.clone().fake_quant(&spec).unwrap();
        assert!(distance(&out.value().to_vec().unwrap(), &y) <= 1e-12, "{name}: values");
        assert_eq!(out.value().to_vec::<f64>().unwrap(), ours.dequantize().unwrap().to_vec::<f64>().unwrap());
        let dy = if activation { get("dy") } else { randn(x.shape(), 1) };
        let dx = tape.backward_from(out, dy.clone()).unwrap().take(&v).unwrap();
        if activation {
            assert_eq!(dx.to_vec::<f64>().unwrap(), get("dx").to_vec::<f64>().unwrap(), "{name}: gradient");
        }
        assert_eq!(dx.to_vec::<f64>().unwrap(), dy.to_vec::<f64>().unwrap(), "{name}: straight through");

        // f32: few codes differ, each within rounding error of a tie. Counted from the zero point, which is itself a tie in
        // all-zero rows (round(3.5) for 3 bits) and has no effect on their values.
        let narrow = fake_quant::quantize(&x.to_dtype(DType::F32).unwrap(), &spec).unwrap();
        let narrow_zero = spread(&narrow.zero);
        for (i, (&code, x)) in narrow.codes.iter().zip(x.to_vec::<f64>().unwrap()).enumerate() {
            codes += 1;
            let (level, want) = (f64::from(code) - narrow_zero[i], want[i] - zero[i]);
            if level != want {
                flipped += 1;
                let position = x / scale[i];
                let from_tie = (position - position.floor() - 0.5).abs();
                assert!((level - want).abs() == 1.0, "{name} value {i}: {level} steps for {want}");
                assert!(from_tie <= 8.0 * f64::from(f32::EPSILON) * position.abs().max(1.0), "{name} value {i}: {from_tie:e}");
            }
        }
    }
    assert!(flipped * 1000 <= codes, "{flipped} of {codes} codes differ in f32");
    println!("quantizers: {} cases, {flipped} of {codes} codes differ in f32", golden.list().len());
}

#[test]
fn hadamard_tables() {
    let golden = Golden::open("hadamard_tables.safetensors");
    let (mut tables, mut maps) = (0, 0);
    for k in [12usize, 20, 28, 36, 40, 44, 52, 60, 108, 140, 156, 172] {
        let table = golden.values(&format!("H{k}"));
        tables += 1;
        for n in (0..4).map(|m| k << m) {
            let map = Hadamard::new(n).unwrap();
            // The first published K that fits may be another (12·2 = 24 is; 20·2 is the table of 40).
            if map.k() != k {
                continue;
            }
            assert_eq!(map.blocks(), 1);
            assert_eq!(map.signs().iter().map(|&s| f64::from(s)).collect::<Vec<_>>(), table, "H{k} for n = {n}");
            let h = map.dense().unwrap();
            // The map of SPEC's formula, from the table itself.
            let m = n / k;
            for (row, h) in h.chunks(n).enumerate() {
                for (column, h) in h.iter().enumerate() {
                    let sylvester = if ((row % m) & (column % m)).count_ones() % 2 == 0 { 1.0 } else { -1.0 };
                    let want = table[row / m * k + column / m] * sylvester / (n as f64).sqrt();
                    assert!((h - want).abs() <= 1e-15, "H[{row}, {column}] for n = {n}");
                }
            }
            let x = randn([3, n], n as u64);
            for transpose in [false, true] {
                let values = x.to_vec::<f64>().unwrap();
                let want = spinquant::linalg::matmul::reference(&values, false, &h, !transpose, (3, n, n));
                let wide = hadamard::transform(x.clone(), &map, transpose).unwrap();
                assert!(distance(&wide.to_f64_vec().unwrap(), &want) <= 1e-12, "f64, n = {n}");
                let narrow = hadamard::transform(x.to_dtype(DType::F32).unwrap(), &map, transpose).unwrap();
                assert!(distance(&narrow.to_f64_vec().unwrap(), &want) <= 1e-5, "f32, n = {n}");
                maps += 1;
            }
        }
    }
    println!("hadamard_tables: {tables} tables, {maps} maps");
}
