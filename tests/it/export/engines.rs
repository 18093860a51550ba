//! Native folders run on integers.

use spinquant::export::{load_codes, load_native_with_codes};

use super::*;

/// The two engines differ by rounding alone: in `f64` by next to nothing, in `f32` by a few of its last bits.
#[test]
fn integer_products_are_those_of_values_up_to_rounding() {
    let dir = tempfile::tempdir().unwrap();
    let (source, out) = (dir.path().join("source"), dir.path().join("out"));
    let schemes = [
        Scheme::new(4, 4, 4),
        Scheme { symmetric_activations: true, ..Scheme::new(4, 4, 16) },
        Scheme::new(8, 8, 16),
        Scheme { weight_group: Some(8), ..Scheme::new(4, 8, 4) },
    ];
    let mut worst = 0f64;
    for config in [tiny::config(2, 2, false), tiny::config(4, 2, true), tiny::with_biases(tiny::llama3(4, 1))] {
        for (dtype, bound) in [(DType::F64, 1e-12), (DType::F32, 2e-5)] {
            tiny::write(&source, &config, dtype, 9, true);
            let model = Llama::load(&source, dtype, &Device::Cpu).unwrap();
            let r = Rotations::random_hadamard(16, 8, 2, 5).unwrap();
            for scheme in &schemes {
                let output = Output { overwrite: true, source: Some(&source), ..Output::new(&out, Format::Native) };
                write_rtn(&model, Some(&r), scheme, output, |_| {}).unwrap();
                let simulated = load_native(&out, &Device::Cpu).unwrap().model;
                let integer = simulated.clone().on_integers(load_codes(&out, &Device::Cpu).unwrap()).unwrap();
                assert_eq!(integer.integer_linears(), [14, 14]);
                // The same from a folder that is read once.
                let (read, codes) = load_native_with_codes(&out, &Device::Cpu, spinquant::llama::Placement::RESIDENT).unwrap();
                let (tokens, once) = (tiny::tokens(&config), read.model.on_integers(codes).unwrap());
                let values = |m: &Merged| m.logits(&tokens, 9).unwrap().to_f64_vec().unwrap();
                assert_eq!(values(&once), values(&integer));
                assert_eq!(simulated.integer_linears(), [0, 14]);
                let logits = |m: &Merged| m.logits(&tiny::tokens(&config), 9).unwrap().to_f64_vec().unwrap();
                let (got, want) = (logits(&integer), logits(&simulated));
                let largest = want.iter().fold(0f64, |m, x| m.max(x.abs()));
                let error = got
                    .iter()
                    .zip(&want)
                    .map(|(a, b)| (a - b).abs() / largest)
                    .fold(0f64, |m, e| if e > m || e.is_nan() { e } else { m });
                assert!(error <= bound, "{dtype} {scheme}: {error:e}");
                // The products were indeed computed in another way.
                assert!(got != want, "{dtype} {scheme}");
                if dtype == DType::F32 {
                    worst = worst.max(error);
                }
            }
        }
    }
    println!("integers and values in f32: {worst:.1e} of the largest logit");
}

#[test]
fn what_has_no_integer_products_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (source, out) = (dir.path().join("source"), dir.path().join("out"));
    let config = tiny::config(2, 2, false);
    tiny::write(&source, &config, DType::F32, 9, true);
    let model = Llama::load(&source, DType::F32, &Device::Cpu).unwrap();
    let write = |scheme: &Scheme| {
        let output = Output { overwrite: true, source: Some(&source), ..Output::new(&out, Format::Native) };
        write_rtn(&model, None, scheme, output, |_| {}).unwrap();
        let merged = load_native(&out, &Device::Cpu).unwrap().model;
        load_codes(&out, &Device::Cpu).and_then(|codes| merged.on_integers(codes))
    };
    fails(write(&Scheme::new(16, 4, 4)), &["weights in 2 to 8 bits, got 16 bits"]);
    fails(write(&Scheme::new(4, 16, 4)), &["layers.0.self_attn.q_proj", "2 to 8 bits, got 16 bits"]);
    fails(write(&Scheme { symmetric_weights: false, ..Scheme::new(4, 4, 4) }), &["symmetric weights", "q_proj"]);
    let merged = write(&Scheme::new(4, 4, 4)).unwrap();
    fails(merged.on_integers(vec![]), &["codes of 2 layers, got 0"]);
}
