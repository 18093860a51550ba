//! Whole random networks in f32 against f64.

use spinquant::export::{Format, Output, load_codes, load_native, write_rtn};
use spinquant::llama::{Llama, Merged};
use spinquant::quant::Scheme;
use spinquant::rotation::Rotations;
use spinquant::{DType, Device};

use crate::common::need::gpu;
use crate::common::networks::f32_against_f64;
use crate::common::tiny;

#[test]
#[ignore = "needs a GPU"]
fn f32_on_a_gpu() {
    f32_against_f64(&gpu());
}

/// A network on integers: on a GPU all linears but o, whose input has a scale a head; the CPU's logits but for rounding.
#[test]
#[ignore = "needs a GPU"]
fn integers_on_a_gpu() {
    let (device, dir) = (gpu(), tempfile::tempdir().unwrap());
    let (source, out) = (dir.path().join("source"), dir.path().join("out"));
    let config = tiny::with_biases(tiny::config(2, 2, false));
    for (dtype, bound) in [(DType::F32, 1e-4), (DType::BF16, 0.05)] {
        tiny::write(&source, &config, dtype, 9, true);
        let model = Llama::load(&source, dtype, &Device::Cpu).unwrap();
        let r = Rotations::random_hadamard(16, 8, 2, 5).unwrap();
        for scheme in [Scheme::new(8, 8, 16), Scheme::new(4, 8, 8)] {
            let output = Output { overwrite: true, source: Some(&source), ..Output::new(&out, Format::Native) };
            write_rtn(&model, Some(&r), &scheme, output, |_| {}).unwrap();
            let on = |device: &Device| {
                load_native(&out, device).unwrap().model.on_integers(load_codes(&out, device).unwrap()).unwrap()
            };
            let (cpu, gpu) = (on(&Device::Cpu), on(&device));
            assert_eq!((cpu.integer_linears(), gpu.integer_linears()), ([14, 14], [12, 14]));
            let logits = |m: &Merged| m.logits(&tiny::tokens(&config), 9).unwrap().to_f64_vec().unwrap();
            let (got, want) = (logits(&gpu), logits(&cpu));
            let largest = want.iter().fold(0f64, |m, x| m.max(x.abs()));
            let larger = |m: f64, e: f64| if e > m || e.is_nan() { e } else { m };
            let error = got.iter().zip(&want).map(|(a, b)| (a - b).abs() / largest).fold(0f64, larger);
            assert!(error <= bound, "{dtype} {scheme}: {error:e}");
        }
    }
}
