//! Blocks of floating-point numbers: the bytes of another implementation, and networks learned for them.

use serde_json::Value;
use spinquant::grid::floating::Format;
use spinquant::grid::{QuantSpec, Target};
use spinquant::ops::microscaling::encode;
use spinquant::ops::randn;
use spinquant::quant::{Gptq, Hessian, Moments, Rtn, Scheme, WeightQuantizer};
use spinquant::{DType, Tensor};

/// What compressed-tensors packs of the same values (tests/interop/microscaling.py).
#[test]
fn bytes_are_those_of_compressed_tensors() {
    let text = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/formats/microscaling.json")).unwrap();
    let read: Value = serde_json::from_str(&text).unwrap();
    let flat = |v: &Value| -> Vec<f64> {
        let rows = v.as_array().unwrap().iter();
        rows.flat_map(|row| row.as_array().unwrap().iter().map(|x| x.as_f64().unwrap())).collect()
    };
    let x = Tensor::from_vec(flat(&read["x"]), [4, 64]).unwrap().to_dtype(DType::F32).unwrap();
    for format in Format::ALL {
        let encoded = encode(&x, format, None).unwrap();
        let want = &read[format.name()];
        let bytes = |v: &Value| flat(v).into_iter().map(|b| b as u8).collect::<Vec<_>>();
        assert_eq!(encoded.scales, bytes(&want["scales"]), "{format}");
        // Their zeros keep the sign of what was rounded.
        let signless =
            |codes: &[u8]| codes.iter().map(|&b| [b & 15, b >> 4].map(|c| if c == 8 { 0 } else { c })).collect::<Vec<_>>();
        assert_eq!(signless(&encoded.codes), signless(&bytes(&want["codes"])), "{format}");
        if format == Format::Nvfp4 {
            assert_eq!(f64::from(encoded.unit), want["unit"].as_f64().unwrap());
        }
    }
}

/// Weights to nearest and by GPTQ: what is stored is on the grid of every block, and GPTQ's output is nearer.
#[test]
fn gptq_rounds_to_blocks_too() {
    let (rows, n) = (24, 64);
    let w = randn([rows, n], 1).to_dtype(DType::F32).unwrap();
    // Inputs that depend on one another.
    let (a, b) = (randn([256, n], 2).into_vec::<f64>().unwrap(), randn([256, 1], 3).into_vec::<f64>().unwrap());
    let x: Vec<f64> = a.chunks(n).zip(&b).flat_map(|(row, b)| row.iter().map(|x| 0.3 * x + b).collect::<Vec<_>>()).collect();
    let mut hessian = Hessian::new(n);
    hessian.add(&Tensor::from_vec(x.clone(), [256, n]).unwrap()).unwrap();
    let moments = Moments::from(hessian.finish(4).unwrap());
    for format in Format::ALL {
        let spec = QuantSpec::floating(format, Target::Weight);
        let error = |q: &dyn WeightQuantizer| {
            let found = q.quantize(&[&w], &spec, Some(&moments)).unwrap().remove(0);
            let y = found.weight.to_f64_vec().unwrap();
            let codes = found.codes.unwrap();
            assert!(codes.codes.iter().all(|c| [0, 1, 2, 3, 4, 6, 8, 12].contains(&c.abs())), "{format}");
            let w = w.to_f64_vec().unwrap();
            let off = |row: usize, x: &[f64]| (0..n).map(|j| (y[row * n + j] - w[row * n + j]) * x[j]).sum::<f64>().powi(2);
            (0..rows).flat_map(|row| x.chunks(n).map(move |x| (row, x))).map(|(row, x)| off(row, x)).sum::<f64>()
        };
        let (nearest, swept) = (error(&Rtn), error(&Gptq::default()));
        assert!(swept < 0.8 * nearest, "{format}: {swept} {nearest}");
    }
}

#[test]
fn schemes_name_their_formats() {
    let scheme: Scheme = "mxfp4kv4".parse().unwrap();
    let sites = scheme.sites(64);
    assert_eq!(sites.weight, QuantSpec::floating(Format::Mxfp4, Target::Weight));
    assert_eq!(sites.attention_output, QuantSpec::floating(Format::Mxfp4, Target::Activation));
    assert_eq!((sites.key.bits, sites.key.group, sites.value.group), (4, None, Some(64)));
    for name in ["WMXFP4AMXFP4KV4", "WNVFP4ANVFP4KV16", "WMXFP4A16KV16", "W4AMXFP4KV8", "W4A4KV4"] {
        let scheme: Scheme = name.parse().unwrap();
        assert_eq!(scheme.to_string(), name);
        let json = serde_json::to_string(&scheme).unwrap();
        assert_eq!(serde_json::from_str::<Scheme>(&json).unwrap(), scheme);
        assert_eq!(scheme.check_integer("native").is_err(), name.contains("FP4"), "{name}");
    }
    assert_eq!("MXFP4".parse::<Scheme>().unwrap().activation_bits_name(), "AMXFP4KV16 asymmetric");
    assert_eq!("W4A4KV4".parse::<Scheme>().unwrap().activation_bits_name(), "A4KV4 asymmetric");
    for wrong in ["MXFP8", "WMXFP4AMXFP4sKV4", "W4AFP4", "MXFP4KVMXFP4", "FP4"] {
        let message = wrong.parse::<Scheme>().unwrap_err().to_string();
        assert!(message.contains("MXFP4KV4") && message.contains(wrong), "{message}");
    }
}
