//! Every family against transformers: tiny random models that `tests/interop/families.py` made, their logits, and what becomes of them
//! here.

mod published;

use std::ops::ControlFlow::Continue;
use std::path::Path;
use std::sync::Arc;

use spinquant::calibrate::{Calibration, quantize_weights};
use spinquant::data::Windows;
use spinquant::device::Card;
use spinquant::export::{Format, Output, load_native, write_hf, write_quantized, write_rtn};
use spinquant::llama::{
    Checkpoint, Compressed, Decoder, Family, Linear, Llama, LlamaConfig, Merged, Packed, Plan, Recompute, RopeScaling, Rotated,
    RotationVars, Source, Weights,
};
use spinquant::memory::{Work, predict};
use spinquant::ops::fake_quant::quantize;
use spinquant::quant::{Gptq, Online, Rtn, Scheme};
use spinquant::{DType, Device, Tensor, check, outliers};

use crate::common::families::{TOLERANCE, cache_and_packing, fixtures, full_precision, gradients, rotated, rotations};
use crate::common::{distance, same_weights, tiny};

const FULL: Scheme = Scheme::FULL_PRECISION;

#[test]
fn all_are_there() {
    let configs: Vec<LlamaConfig> = fixtures().map(|f| LlamaConfig::from_dir(f.path()).unwrap()).collect();
    for family in Family::ALL {
        assert!(configs.iter().any(|c| c.family == family), "{family:?}");
    }
    type Is = fn(&RopeScaling) -> bool;
    let kinds: [Is; 5] = [
        |s| matches!(s, RopeScaling::Linear { .. }),
        |s| matches!(s, RopeScaling::Llama3 { .. }),
        |s| matches!(s, RopeScaling::Dynamic { .. }),
        |s| matches!(s, RopeScaling::Yarn { .. }),
        |s| matches!(s, RopeScaling::LongRope { .. }),
    ];
    assert!(kinds.iter().all(|is| configs.iter().filter_map(|c| c.rope_scaling.as_ref()).any(is)));
    let features: [fn(&LlamaConfig) -> bool; 6] = [
        |c| c.sliding_window.is_some(),
        |c| c.tie_word_embeddings,
        |c| c.partial_rotary_factor < 1.0,
        |c| !c.no_rope_layers.is_empty(),
        |c| c.heads * c.head_dim != c.hidden_size,
        |c| c.kv_heads < c.heads,
    ];
    assert!(features.iter().all(|has| configs.iter().any(has)));
}

#[test]
fn full_precision_is_that_of_transformers() {
    full_precision(&Device::Cpu);
}

#[test]
fn rotations_leave_it_alone() {
    rotated(&Device::Cpu);
}

#[test]
fn a_cache_and_packing_change_nothing() {
    cache_and_packing(&Device::Cpu);
}

#[test]
fn gradients_in_f32() {
    gradients(&Device::Cpu);
}

#[test]
fn gradients_of_rotations_are_central_differences() {
    for f in fixtures() {
        let model = f.load(DType::F64, &Device::Cpu);
        let [r, _] = rotations(&model.config, 3);
        let inputs: Vec<Tensor> =
            std::iter::once(r.r1.clone()).chain((0..model.config.layers).map(|l| r.r2.index(l).unwrap())).collect();
        for scheme in [FULL, Scheme::new(4, 8, 8)] {
            let text = &f.texts[0];
            let (seq, tokens) = (text.seq, &text.tokens[..text.seq]);
            let run = Arc::new(model.run(&scheme, seq).unwrap());
            let outcome = check::gradients(&inputs, |mut v| {
                let vars = RotationVars::without_scales(v.remove(0), v);
                model.logits(&vars, tokens, run.clone(), Recompute::None)
            });
            assert!(outcome.is_ok(), "{}, {scheme}: {outcome:?}", f.name);
        }
    }
}

#[test]
fn files_hold_the_same_network() {
    for f in fixtures() {
        let out = tempfile::tempdir().unwrap();
        let (hf, native) = (out.path().join("hf"), out.path().join("native"));
        let source = LlamaConfig::from_dir(f.path()).unwrap();
        let [_, r] = rotations(&source, 5);
        let scheme = FULL.online(Online::NONE);
        write_hf(f.path(), Some(&r), &scheme, Output::new(&hf, Format::Hf), |_| {}).unwrap();
        // The same architecture: tensors of the same names and shapes, but for a head that was tied.
        let config = LlamaConfig::from_dir(&hf).unwrap();
        let dtype = Some(DType::F32);
        assert_eq!(config, LlamaConfig { tie_word_embeddings: false, dtype, ..source.folded() }, "{}", f.name);
        let names = |dir: &Path| {
            let names: Vec<String> = Checkpoint::open(dir).unwrap().names().map(str::to_string).collect();
            names.into_iter().filter(|name| name != "lm_head.weight").collect::<Vec<_>>()
        };
        assert_eq!(names(&hf), names(f.path()), "{}", f.name);
        let again = Llama::load(&hf, DType::F32, &Device::Cpu).unwrap();
        f.agrees("hf", |t| again.merge(None, &FULL).unwrap().logits(&t.tokens, t.seq).unwrap());

        // And what is ours, quantised, to the bit.
        let model = f.load(DType::F32, &Device::Cpu);
        let scheme = Scheme::new(4, 4, 4);
        write_rtn(&model, Some(&r), &scheme, Output::new(&native, Format::Native), |_| {}).unwrap();
        let (got, want) = (load_native(&native, &Device::Cpu).unwrap().model, model.merge(Some(&r), &scheme).unwrap());
        assert_eq!(got.config, want.config, "{}", f.name);
        assert_eq!(got.sha256().unwrap(), want.sha256().unwrap(), "{}", f.name);
        let text = &f.texts[0];
        let logits = |m: &Merged| m.logits(&text.tokens, text.seq).unwrap().to_f64_vec().unwrap();
        assert_eq!(logits(&got), logits(&want), "{}", f.name);
    }
}

/// Packed integers under the names of the family's own modules: what is read back is the network that was quantised.
#[test]
fn compressed_tensors_hold_them() {
    for f in fixtures().filter(|f| f.name.ends_with("plain")) {
        for scheme in [
            Scheme { weight_group: Some(8), ..Scheme::new(4, 16, 16) },
            Scheme { symmetric_weights: false, ..Scheme::new(4, 8, 16) },
        ] {
            let out = tempfile::tempdir().unwrap();
            let dir = out.path().join("out");
            let source = Source::from_dir(f.path()).unwrap();
            let [_, r] = rotations(source.config(), 5);
            let scheme = scheme.online(Online::NONE);
            let model = Rotated::open(&source, Some(&r), &scheme, &Device::Cpu).unwrap();
            let output = Output { source: Some(f.path()), ..Output::new(&dir, Format::CompressedTensors) };
            write_quantized(&model, &Rtn, None, output, |_| Continue(())).unwrap();
            let read = Compressed::read(&dir).unwrap();
            assert_eq!((read.config.family, read.scheme.weight_bits), (source.config().family, 4), "{}", f.name);
            let network = read.load(DType::F32, &Device::Cpu).unwrap();
            // To the bit what was rotated, multipliers and gains folded, and rounded to grids of f32.
            let spec = model.scheme().sites(source.config().head_dim).weight.stored(DType::F32);
            let block = |l: usize| {
                let block = model.block(l).unwrap();
                let nearest = |_, w: &Tensor| quantize(w, &spec)?.dequantize()?.to_dtype(DType::F32);
                block.with_weights(block.weights.map_weights(nearest).unwrap())
            };
            let blocks = (0..source.config().layers).map(block).collect();
            let (embedding, head) = (model.embedding().unwrap(), model.head().unwrap());
            let want = Merged { config: network.config.clone(), scheme: network.scheme, embedding, head, blocks };
            same_weights(&network, &want);
            let text = &f.texts[0];
            let [got, want] = [&network, &want].map(|m| m.logits(&text.tokens, text.seq).unwrap().to_f64_vec().unwrap());
            assert_eq!(got, want, "{}", f.name);
        }
    }
}

#[test]
fn gptq_quantises_them() {
    for f in fixtures().filter(|f| f.name.ends_with("plain")) {
        let model = f.load(DType::F64, &Device::Cpu);
        let [_, r] = rotations(&model.config, 5);
        let (text, scheme) = (&f.texts[0], Scheme::new(8, 16, 16));
        let windows = Windows::new(text.tokens.clone(), text.seq).unwrap();
        let calibration = Calibration::first(&windows, windows.len()).unwrap();
        let merged = quantize_weights(&model, Some(&r), &scheme, &Gptq::default(), Some(&calibration), &mut (), |_| {
            std::ops::ControlFlow::Continue(())
        })
        .unwrap();
        let error = |m: &Merged| {
            let got = m.logits(&text.tokens, text.seq).unwrap().to_f64_vec().unwrap();
            got.iter().zip(&text.logits).map(|(a, b)| (a - b) * (a - b)).sum::<f64>()
        };
        // On the text that it saw it is nearer than rounding, and not the network itself.
        let (gptq, nearest) = (error(&merged), error(&model.merge(Some(&r), &scheme).unwrap()));
        assert!(gptq > 1e-6 && gptq < nearest, "{}: {gptq} {nearest}", f.name);
    }
}

/// Where the rotary embedding depends on the length of the text.
#[test]
fn long_rope_changes_with_the_length() {
    let long = fixtures().find(|f| f.name == "phi3-longrope").unwrap();
    let merged = long.load(DType::F32, &Device::Cpu).merge(None, &FULL).unwrap();
    let mut packed = Packed::default();
    for text in &long.texts {
        packed.push(&text.tokens[..text.seq]);
    }
    let message = merged.packed_logits(&packed, 5, |_| Ok(())).unwrap_err().to_string();
    assert!(message.contains("got 12 to 24 tokens, and the model's depends on the length"), "{message}");
    // A text that grows beyond the original context is read again; what fails on the way changes nothing.
    let text = &long.texts[0];
    let mut decoder = Decoder::new(&merged, text.seq).unwrap();
    decoder.feed(&text.tokens[..14]).unwrap();
    assert!(decoder.feed(&[0, 1, 2, u32::MAX]).is_err());
    assert_eq!(decoder.read(), 14);
    let within = decoder.feed(&text.tokens[14..16]).unwrap().to_f64_vec().unwrap();
    let want = merged.logits(&text.tokens[..16], 16).unwrap().to_f64_vec().unwrap();
    assert!(distance(&within, &want[15 * 64..]) < TOLERANCE);
    let beyond = decoder.feed(&text.tokens[16..24]).unwrap().to_f64_vec().unwrap();
    assert!(distance(&beyond, &text.logits[23 * 64..24 * 64]) < TOLERANCE);
}

/// Random models of every family, from files to files.
#[test]
fn random_models_are_read_as_they_were_made() {
    for family in Family::ALL {
        let config = tiny::of_family(tiny::with_biases(tiny::config(4, 2, false)), family);
        let dir = tempfile::tempdir().unwrap();
        tiny::write(dir.path(), &config, DType::F64, 3, false);
        let source = Source::from_dir(dir.path()).unwrap();
        assert_eq!(LlamaConfig::from_dir(dir.path()).unwrap(), LlamaConfig { dtype: Some(DType::F64), ..config.clone() });
        assert!(source.unread().is_empty() && source.notes().is_empty(), "{family:?}");
        let (got, made) = (Weights::read(&source, DType::F64).unwrap(), Weights::random(&config, 3).unwrap());
        for (got, made) in got.layers.iter().zip(&made.layers) {
            for linear in Linear::ALL {
                let (a, b) = (&got[linear], &made[linear]);
                assert_eq!(a.bias.is_some(), linear.has_bias(&config), "{family:?} {linear}");
                assert_eq!(a.norm.is_some(), linear.has_norm(&config), "{family:?} {linear}");
                assert_eq!(a.norm.as_ref().map(|t| t.to_f64_vec().unwrap()), b.norm.as_ref().map(|t| t.to_f64_vec().unwrap()));
                // Multipliers are folded: into some of the weights as they were made, by one number.
                let (a, b) = (a.weight.to_f64_vec().unwrap(), b.weight.to_f64_vec().unwrap());
                let factor = match linear {
                    Linear::Q => config.multipliers.attention.map_or(1.0, |m| m * 8f64.sqrt()),
                    Linear::O | Linear::Down => config.multipliers.residual,
                    _ => 1.0,
                };
                assert!(a.iter().zip(&b).all(|(a, b)| *a == b * factor), "{family:?} {linear}");
            }
        }
        // Models in memory and quantised copies of them keep what tells them apart.
        let model = Llama::load(dir.path(), DType::F64, &Device::Cpu).unwrap();
        assert_eq!(model.config.family, family);
        let work = Work::new(Scheme::new(4, 4, 4), 1, 9, DType::F64);
        let planned = predict(&config, &work, Plan::KEEP_ALL, 1, &Card::h100()).unwrap();
        assert_eq!(planned.items.into_iter().find(|(name, _)| *name == "weights").unwrap().1, model.bytes(), "{family:?}");
        assert_eq!(
            model.bytes(),
            got.layers.iter().flat_map(|l| l.tensors()).map(Tensor::bytes).sum::<usize>() + 2 * 31 * 16 * 8
        );
    }
}

#[test]
fn norms_of_heads_refuse_what_they_would_undo() {
    let config = tiny::of_family(tiny::config(4, 2, false), Family::Qwen3);
    let weights = Weights::random(&config, 1).unwrap();
    let message = outliers::plant(&weights, &config, &outliers::PlantOptions::default()).unwrap_err().to_string();
    assert!(message.contains("a norm of every key head would undo them"), "{message}");
    let none = outliers::PlantOptions { rope_pairs: 0, ..Default::default() };
    let planted = outliers::plant(&weights, &config, &none).unwrap();
    let logits = |w: Weights| tiny::logits(&Llama::new(config.clone(), w).unwrap());
    assert!(distance(&logits(planted), &logits(weights)) < 1e-9);
}
