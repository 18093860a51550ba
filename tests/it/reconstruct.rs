//! What is free in a layer whose weights are quantised is learned: outputs come back, codes stay, files hold the result.

use std::ops::ControlFlow;
use std::path::Path;

use spinquant::calibrate::{Calibration, LayerReport, LayerStore, Reconstruct, quantize_weights};
use spinquant::export::{Format, Output, load_native, write_quantized};
use spinquant::llama::{Compressed, Llama, LlamaConfig, Merged, Rotated, Source, synthetic};
use spinquant::quant::{Correction, Gptq, Online, Rtn, Scheme, Site, WeightQuantizer};
use spinquant::rotation::Rotations;
use spinquant::{DType, Device, Error, Result, Tensor};

use crate::common::gptq::{Memory, assert_on_grid, assert_same, biased_model, go_on, model, text, values};
use crate::common::{same_weights, tiny};

const BOTH: Reconstruct = Reconstruct { clips: true, scales: true, steps: 40, rate: 5e-3, seed: 0 };

fn calibration(by: Reconstruct) -> Calibration<'static> {
    // The text lives as long as the program.
    let text = Box::leak(Box::new(text()));
    Calibration { at_once: 3, ..Calibration::first(text, 10).unwrap().reconstruct(Some(by)) }
}

fn clips(merged: &Merged) -> Vec<Option<Vec<f64>>> {
    let of = |block: &spinquant::llama::Block| Site::ALL.map(|site| block.clip_constants(site).map(values));
    merged.blocks.iter().flat_map(of).collect()
}

/// The layers' outputs are nearer to those in full precision afterwards, whatever quantised the weights and whatever is learned; codes and
/// zero points are as they were.
#[test]
fn outputs_come_back_and_codes_stay() {
    let gptq = |correction| Gptq { correction, ..Gptq::default() };
    let quantizers: [&dyn WeightQuantizer; 4] =
        [&Rtn, &gptq(Correction::None), &gptq(Correction::Gptaq(0.25)), &gptq(Correction::Qep(0.5))];
    let rotations = Rotations::random_hadamard(32, 8, 3, 2).unwrap();
    let plain = Scheme { weight_group: Some(16), symmetric_weights: false, ..Scheme::new(3, 4, 4) };
    for (model, scheme) in [(model(DType::F32), Scheme::new(4, 4, 4)), (biased_model(DType::F64), plain)] {
        let spec = scheme.sites(8).weight;
        for quantizer in quantizers {
            for what in ["clips", "scales", "clips,scales"] {
                let by = Reconstruct { steps: 40, ..what.parse().unwrap() };
                let (calibration, mut errors, mut store) = (calibration(by), vec![], Memory::default());
                let told = |r: &LayerReport| {
                    errors.push(r.reconstruction.unwrap());
                    ControlFlow::Continue(())
                };
                let run = (Some(&rotations), &scheme, quantizer, Some(&calibration));
                quantize_weights(&model, run.0, run.1, run.2, run.3, &mut store, told).unwrap();
                println!("{} {what}: {errors:?}", quantizer.name());
                let sum = errors.iter().fold((0.0, 0.0), |sum, e| (sum.0 + e.0, sum.1 + e.1));
                assert!(errors.iter().all(|(before, after)| after <= before), "{} {what}: {errors:?}", quantizer.name());
                // Weights that were corrected for the errors of whole ranges may have nothing to win by clipping.
                assert!(sum.1 < sum.0 || !by.scales && quantizer.reads_quantized(), "{} {what}: {errors:?}", quantizer.name());
                // The first layer's weights met the same text with and without.
                let without = calibration.clone().quantize_activations(true).reconstruct(None);
                let mut other = Memory::default();
                quantize_weights(&model, run.0, run.1, run.2, Some(&without), &mut other, go_on).unwrap();
                let mut changed = 0;
                for ((_, a), (_, b)) in store.0[0].linears.iter().zip(other.0[0].linears.iter()) {
                    assert_on_grid(&a.weight, &spec);
                    let (a, b) = (a.weight.codes.as_ref().unwrap(), b.weight.codes.as_ref().unwrap());
                    assert_eq!((&a.codes, values(&a.zero)), (&b.codes, values(&b.zero)));
                    changed += usize::from(values(&a.scale) != values(&b.scale));
                }
                let moved = errors[0].1 < errors[0].0;
                assert_eq!(changed, if by.scales && moved { 7 } else { 0 });
                for (layer, (before, after)) in store.0.iter().zip(&errors) {
                    let learned = layer.clips.iter().filter(|c| c.is_some()).count();
                    assert_eq!(learned, if by.clips && after < before { 6 } else { 0 });
                }
            }
        }
    }
}

/// A rate at which learning only does harm leaves layers as they were.
#[test]
fn nothing_worse_than_the_start_is_kept() {
    let (model, rotations) = (model(DType::F32), Rotations::random_hadamard(32, 8, 3, 2).unwrap());
    let mut kept = 0;
    let calibration = calibration(Reconstruct { rate: 1e3, steps: 1, ..BOTH });
    let told = |r: &LayerReport| {
        let (before, after) = r.reconstruction.unwrap();
        assert!(after <= before);
        kept += usize::from(after == before);
        ControlFlow::Continue(())
    };
    let merged =
        quantize_weights(&model, Some(&rotations), &Scheme::new(4, 4, 4), &Rtn, Some(&calibration), &mut (), told).unwrap();
    assert_eq!(kept, 3);
    same_weights(&merged, &model.merge(Some(&rotations), &Scheme::new(4, 4, 4)).unwrap());
    assert!(clips(&merged).iter().all(Option::is_none));
}

/// The shape of a layer of SmolLM2-135M, with a few of its tokens.
#[test]
fn a_layer_of_a_real_size_learns() {
    let llama = synthetic::shape("tiny:1").unwrap();
    let config = LlamaConfig { hidden_size: 576, intermediate_size: 1536, heads: 9, kv_heads: 3, head_dim: 64, ..llama };
    let model = synthetic::model(&config, 1, DType::F32, &Device::Cpu).unwrap();
    let text = synthetic::text(&config, 4, 32, 1).unwrap();
    let rotations = Rotations::random_hadamard(576, 64, 1, 1).unwrap();
    let by = Reconstruct { steps: 8, ..BOTH };
    let calibration = Calibration { at_once: 2, ..Calibration::first(&text, 4).unwrap().reconstruct(Some(by)) };
    let mut errors = vec![];
    quantize_weights(&model, Some(&rotations), &Scheme::new(4, 4, 4), &Rtn, Some(&calibration), &mut (), |r| {
        errors.extend(r.reconstruction);
        ControlFlow::Continue(())
    })
    .unwrap();
    assert!(errors.len() == 1 && errors[0].1 < 0.97 * errors[0].0, "{errors:?}");
}

#[test]
fn an_interrupted_run_continues_to_the_same_bits() {
    let (model, rotations) = (model(DType::F32), Rotations::random_hadamard(32, 8, 3, 2).unwrap());
    let quantizers: [&dyn WeightQuantizer; 2] = [&Rtn, &Gptq { correction: Correction::Gptaq(0.25), ..Gptq::default() }];
    for quantizer in quantizers {
        let run = |seed: u64, store: &mut dyn LayerStore, stop: usize| {
            let calibration = calibration(Reconstruct { seed, steps: 10, ..BOTH });
            quantize_weights(&model, Some(&rotations), &Scheme::new(4, 4, 4), quantizer, Some(&calibration), store, |r| {
                if r.done == stop { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            })
        };
        let whole = run(0, &mut (), 0).unwrap();
        for stop in 1..=2 {
            let mut store = Memory::default();
            assert!(matches!(run(0, &mut store, stop), Err(Error::Interrupted { step }) if step == stop));
            let again = run(0, &mut store, 0).unwrap();
            assert_same(&again, &whole);
            assert_eq!(clips(&again), clips(&whole));
        }
        assert_ne!(clips(&run(1, &mut (), 0).unwrap()), clips(&whole), "the seed is that of the order");
    }
}

fn logits(merged: &Merged) -> Vec<u64> {
    let tokens: Vec<u32> = (0..32).map(|i| (i * i + 3 * i) % 31).collect();
    merged.logits(&tokens, 16).unwrap().to_f64_vec().unwrap().iter().map(|x| x.to_bits()).collect()
}

/// What a folder holds is the network that was learned, a stopped run ends in it too, and what a format cannot hold is refused.
#[test]
fn folders_hold_what_was_learned() {
    let dir = tempfile::tempdir().unwrap();
    let (source, out) = (dir.path().join("source"), dir.path().join("out"));
    let config = LlamaConfig { layers: 3, ..tiny::config(4, 2, false) };
    let text = spinquant::data::Windows::new((0..16 * 8).map(|i| (i * i * 7 + i / 3) % 31).collect::<Vec<u32>>(), 16).unwrap();
    let rotations = Rotations::random_hadamard(16, 8, 3, 5).unwrap();
    let by = |what: &str| Reconstruct { steps: 10, ..what.parse().unwrap() };
    let plain = Scheme::new(4, 16, 16).online(Online::NONE);
    for (format, what, scheme, dtype, rotated) in [
        (Format::Native, "clips,scales", Scheme::new(4, 4, 4), DType::F32, true),
        (Format::Native, "clips", Scheme::new(4, 4, 4), DType::BF16, true),
        (Format::Native, "clips", Scheme::new(16, 4, 4), DType::F32, false),
        (Format::Hf, "scales", plain, DType::F32, true),
        (Format::CompressedTensors, "scales", Scheme { weight_group: Some(8), ..plain }, DType::BF16, true),
    ] {
        tiny::write(&source, &config, dtype, 9, true);
        let files = Source::open(&source, &config).unwrap();
        let model = Llama::load(&source, dtype, &Device::Cpu).unwrap();
        let r = rotated.then_some(&rotations);
        let rotated = match format {
            Format::Native => Rotated::new(&model, r, &scheme),
            _ => Rotated::open(&files, r, &scheme, &Device::Cpu),
        }
        .unwrap();
        let calibration = Calibration::first(&text, 8).unwrap().reconstruct(Some(by(what)));
        let write = |dir: &Path, stop: usize| -> Result<()> {
            let output = Output { source: Some(&source), ..Output::new(dir, format) };
            write_quantized(&rotated, &Gptq::default(), Some(&calibration), output, |report| {
                assert!(report.loaded || report.reconstruction.is_some_and(|(before, after)| after <= before));
                if report.done == stop { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            })
        };
        assert!(matches!(write(&out, 1), Err(Error::Interrupted { step: 1 })));
        write(&out, 0).unwrap();
        let whole = dir.path().join("whole");
        write(&whole, 0).unwrap();
        let bytes = |dir: &Path| std::fs::read(dir.join("model.safetensors")).unwrap();
        assert!(bytes(&out) == bytes(&whole), "{format:?} {what}: a stopped run ends elsewhere");
        let version = std::fs::read_to_string(out.join("spinquant.json")).unwrap();
        assert_eq!(version.contains("\"format_version\": 2"), what.contains("clips"), "{format:?} {what}");
        let read = match format {
            Format::Native => load_native(&out, &Device::Cpu).unwrap().model,
            Format::Hf => Llama::load(&out, dtype, &Device::Cpu).unwrap().merge(None, &plain.unquantized_weights()).unwrap(),
            Format::CompressedTensors => Compressed::read(&out).unwrap().load(dtype, &Device::Cpu).unwrap(),
        };
        let without = calibration.clone().quantize_activations(true).reconstruct(None);
        let learn =
            |c: &Calibration<'_>| quantize_weights(&model, r, &scheme, &Gptq::default(), Some(c), &mut (), go_on).unwrap();
        if format == Format::Native {
            let learned = learn(&calibration);
            same_weights(&read, &learned);
            assert_eq!(clips(&read), clips(&learned));
            assert_eq!(logits(&read), logits(&learned));
        }
        assert_ne!(logits(&read), logits(&learn(&without)), "{format:?} {what}");
        for dir in [&out, &whole, &source] {
            std::fs::remove_dir_all(dir).unwrap();
        }
    }

    // Refused before anything is written.
    tiny::write(&source, &config, DType::F32, 9, true);
    let files = Source::open(&source, &config).unwrap();
    let scheme = Scheme::new(4, 4, 16).online(Online::NONE);
    let rotated = Rotated::open(&files, Some(&rotations), &scheme, &Device::Cpu).unwrap();
    for format in [Format::Hf, Format::CompressedTensors] {
        let calibration = Calibration::first(&text, 8).unwrap().reconstruct(Some(by("clips")));
        let message =
            write_quantized(&rotated, &Rtn, Some(&calibration), Output::new(&out, format), go_on).unwrap_err().to_string();
        assert!(message.contains("has no clip constants of activations; expected scales alone"), "{message}");
        assert!(!out.exists());
    }
}

#[test]
fn nothing_to_learn_is_said_before_the_work() {
    let model = model(DType::F32);
    for (what, scheme, said) in [
        ("clips", Scheme::new(4, 16, 16), "clips: expected activations, K or V of less than 16 bits, got W4A16KV16"),
        ("scales", Scheme::new(16, 4, 4), "scales: expected weights of less than 16 bits, got W16A4KV4"),
    ] {
        let calibration = calibration(what.parse().unwrap());
        let error = quantize_weights(&model, None, &scheme, &Rtn, Some(&calibration), &mut (), |_| panic!("no layer"));
        assert!(error.unwrap_err().to_string().contains(said));
    }
}

/// Scores of one network are never continued with another that differs in its clip constants alone.
#[test]
fn a_network_is_known_by_its_clip_constants() {
    let merged = model(DType::F32).merge(None, &Scheme::new(4, 4, 4)).unwrap();
    let with = |a: f32| {
        let mut clips: [Option<Tensor>; 6] = Default::default();
        clips[Site::MlpInput as usize] = Some(Tensor::from_vec(vec![a, 0.0], [1, 2]).unwrap());
        let mut other = merged.clone();
        other.blocks[1] = other.blocks[1].clone().with_clips(clips);
        other.sha256().unwrap()
    };
    assert_eq!(with(-0.1), with(-0.1));
    assert!(with(-0.1) != with(-0.2) && with(0.0) != merged.sha256().unwrap());
}
