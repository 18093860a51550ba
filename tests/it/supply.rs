//! Models whose layers come one at a time: what is written of them is what is written of the whole model, in the memory of a layer.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use spinquant::calibrate::{Calibration, ClipGoal};
use spinquant::data::Windows;
use spinquant::export::{Format, Output, write_quantized};
use spinquant::learn::{self, ClipChoice, LearnOptions};
use spinquant::llama::{Llama, LlamaConfig, Placement, Recompute, Rotated, Source, Supply, synthetic};
use spinquant::optim::{CayleySgd, Mode};
use spinquant::quant::{Correction, Gptq, Rtn, Scheme, WeightQuantizer};
use spinquant::rotation::Rotations;
use spinquant::{DType, Device, Error};

use crate::common::tiny;

fn contents(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let entry = |e: std::io::Result<std::fs::DirEntry>| {
        let e = e.unwrap();
        (e.file_name().into_string().unwrap(), std::fs::read(e.path()).unwrap())
    };
    std::fs::read_dir(dir).unwrap().map(entry).collect()
}

/// Writes a model by every kind of quantiser, from memory and from a supply, which is stopped behind every layer once.
fn same_bytes(whole: &Llama, supply: &Supply, text: &Windows) {
    let dir = tempfile::tempdir().unwrap();
    let (c, layers) = (&whole.config, whole.config.layers);
    let r = Rotations::random_hadamard(c.hidden_size, c.head_dim, layers, 5).unwrap();
    let scheme = Scheme::new(4, 4, 4);
    let calibration = Calibration::first(text, 4).unwrap();
    let gptq = |correction| Gptq { correction, ..Gptq::default() };
    let (plain, corrected) = (gptq(Correction::None), gptq(Correction::Gptaq(0.25)));
    for (name, quantizer, rotations) in [
        ("rtn", &Rtn as &dyn WeightQuantizer, Some(&r)),
        ("unrotated", &Rtn, None),
        ("gptq", &plain, Some(&r)),
        ("gptaq", &corrected, Some(&r)),
    ] {
        let write = |rotated: &Rotated<'_>, dir: &Path, stop: usize| {
            write_quantized(rotated, quantizer, Some(&calibration), Output::new(dir, Format::Native), |report| {
                if report.done == stop { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            })
        };
        let (a, b) = (dir.path().join(format!("{name}-whole")), dir.path().join(format!("{name}-supplied")));
        write(&Rotated::new(whole, rotations, &scheme).unwrap(), &a, 0).unwrap();
        for stop in 1..layers {
            let supplied = Rotated::of(supply, rotations, &scheme).unwrap();
            assert!(matches!(write(&supplied, &b, stop), Err(Error::Interrupted { step }) if step == stop));
        }
        write(&Rotated::of(supply, rotations, &scheme).unwrap(), &b, 0).unwrap();
        let (a, b) = (contents(&a), contents(&b));
        for (file, bytes) in &a {
            assert!(b.get(file) == Some(bytes), "{name} in {}: {file} differs", whole.dtype());
        }
        assert_eq!(a.len(), b.len());
    }
}

#[test]
fn files_a_layer_at_a_time_are_quantised_to_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let config = LlamaConfig { layers: 3, ..tiny::config(4, 2, false) };
    let text = Windows::new((0..16 * 8).map(|i| (i * i * 7 + i / 3) % 31).collect::<Vec<u32>>(), 16).unwrap();
    // Files in one type, arithmetic in another: gains are folded and rounded as the whole model's are.
    for (files, dtype) in [(DType::BF16, DType::F32), (DType::F32, DType::BF16)] {
        tiny::write(dir.path(), &config, files, 9, true);
        let whole = Llama::load(dir.path(), dtype, &Device::Cpu).unwrap();
        let supply = Supply::files(Source::from_dir(dir.path()).unwrap(), dtype, &Device::Cpu);
        assert_eq!(supply.sha256().unwrap(), whole.sha256().unwrap());
        same_bytes(&whole, &supply, &text);
    }
}

#[test]
fn synthetic_layers_one_at_a_time_are_quantised_to_the_same_bytes() {
    let config = synthetic::shape("tiny:3").unwrap();
    let text = synthetic::text(&config, 8, 16, 5).unwrap();
    let whole = synthetic::model(&config, 0, DType::F32, &Device::Cpu).unwrap();
    same_bytes(&whole, &Supply::synthetic(&config, 0, DType::F32, &Device::Cpu).unwrap(), &text);
}

/// The most main memory that a command of the program took, in bytes, as far as looking every few milliseconds shows it.
#[cfg(all(feature = "cli", target_os = "linux"))]
fn peak_of(args: &[&str], dir: &Path) -> usize {
    let mut child = std::process::Command::new(env!("CARGO_BIN_EXE_spinquant"))
        .args(args)
        .env("RAYON_NUM_THREADS", "2")
        .current_dir(dir)
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let mut peak = 0;
    loop {
        let status = std::fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap_or_default();
        let kib = status.lines().find_map(|l| l.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB")?.parse::<usize>().ok());
        peak = kib.map_or(peak, |kib| peak.max(kib << 10));
        if let Some(done) = child.try_wait().unwrap() {
            assert!(done.success(), "{args:?}");
            return peak;
        }
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
}

/// A model of 100 layers (17 MB of weights as f32) takes the memory of one of 10, but for what is written, which is mapped at the end.
#[cfg(all(feature = "cli", target_os = "linux"))]
#[test]
fn quantising_takes_the_memory_of_a_layer() {
    let dir = tempfile::tempdir().unwrap();
    let of = |layers: usize| {
        let (model, out) = (format!("synthetic:tiny:{layers}"), format!("out-{layers}"));
        let args = "quantize --device cpu --dtype f32 --scheme W4A4KV4 --rotations hadamard";
        let args: Vec<&str> = args.split_whitespace().chain(["--model", &model, "--out", &out]).collect();
        let written = || std::fs::metadata(dir.path().join(&out).join("model.safetensors")).unwrap().len() as usize;
        (peak_of(&args, dir.path()), written())
    };
    let config = synthetic::shape("tiny:100").unwrap();
    let weights = synthetic::model(&synthetic::shape("tiny:1").unwrap(), 0, DType::F32, &Device::Cpu).unwrap();
    let a_layer = weights.blocks[0].weights.tensors().map(|t| t.bytes()).sum::<usize>();
    let ((few, little), (many, much)) = (of(10), of(config.layers));
    let (grown, weights) = ((many - few).saturating_sub(much - little), 90 * a_layer);
    assert!(weights > 14 << 20 && grown < weights / 3, "{grown} bytes more for {weights} bytes of weights more ({few}, {many})");
}

#[cfg(feature = "cli")]
#[test]
fn a_dry_run_says_what_a_layer_takes() {
    let dir = tempfile::tempdir().unwrap();
    let said = |model: &str| {
        let args = "quantize --dry-run --device cpu --dtype bf16 --rotations hadamard --weights gptq --calibration synthetic:128 --out out";
        let out = std::process::Command::new(env!("CARGO_BIN_EXE_spinquant"))
            .args(args.split_whitespace().chain(["--model", model]))
            .current_dir(dir.path())
            .output()
            .unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8(out.stdout).unwrap()
    };
    let (all, ten) = (said("synthetic:llama-2-70b"), said("synthetic:llama-2-70b:10"));
    assert!(all.contains("80 layers one at a time") && all.contains("Hessian and its factor"), "{all}");
    assert_eq!(all.lines().skip(1).collect::<Vec<_>>(), ten.lines().skip(1).collect::<Vec<_>>());
    assert!(!dir.path().join("out").exists());
}

/// Rotations of a model, learned in two steps with clip ratios searched by error, and what else tells models apart, as bits.
fn learned(m: &Llama, text: &Windows) -> Vec<u64> {
    let c = &m.config;
    let r = Rotations::random_hadamard(c.hidden_size, c.head_dim, c.layers, 5).unwrap();
    let options = LearnOptions {
        steps: 2,
        batch: 4,
        micro_batch: Some(2),
        held_out: Some(2),
        recompute: Some(Recompute::All),
        clip: ClipChoice::Search(ClipGoal::Error),
        clip_windows: 2,
        ..learn::Recipe::Published.options(Scheme::new(4, 4, 4))
    };
    let mut bits = vec![];
    let go_on = |step: &learn::StepReport| {
        bits.push(step.loss.to_bits());
        ControlFlow::Continue(())
    };
    let out = learn::learn(m, text, r.clone(), &mut CayleySgd::new(Mode::Default), &options, go_on).unwrap();
    bits.push(out.fidelity_last.divergence.to_bits());
    let merged = m.merge(Some(&r), &Scheme::new(4, 4, 4)).unwrap().logits(text.get(0), text.seq_len()).unwrap();
    let tensors = [out.rotations.r1, out.rotations.r2, merged];
    bits.extend(tensors.iter().flat_map(|t| t.to_f64_vec().unwrap()).map(f64::to_bits));
    bits
}

/// A layer on the device, one in main memory, and four that are read from files or made each time: the numbers of the whole model.
#[test]
fn layers_that_are_read_each_time_change_no_bit() {
    let dir = tempfile::tempdir().unwrap();
    let config = LlamaConfig { layers: 6, ..tiny::config(4, 2, false) };
    let text = Windows::new((0..16 * 8).map(|i| (i * i * 7 + i / 3) % 31).collect::<Vec<u32>>(), 16).unwrap();
    tiny::write(dir.path(), &config, DType::BF16, 9, true);
    let files = || Supply::files(Source::from_dir(dir.path()).unwrap(), DType::F32, &Device::Cpu);
    let (whole, shape) = (Llama::load(dir.path(), DType::F32, &Device::Cpu).unwrap(), synthetic::shape("tiny:6").unwrap());
    let made = Supply::synthetic(&shape, 0, DType::F32, &Device::Cpu).unwrap();
    let synthetic = synthetic::model(&shape, 0, DType::F32, &Device::Cpu).unwrap();
    let its_text = synthetic::text(&shape, 8, 16, 5).unwrap();
    for (supply, whole, text) in [(files(), &whole, &text), (made, &synthetic, &its_text)] {
        let (supply, want) = (Arc::new(supply), learned(whole, text));
        for (resident, hosted, buffers) in [(1, 1, 2), (1, 1, 3), (0, 0, 2), (2, 3, 3)] {
            let place = Placement { resident, hosted, buffers };
            let m = Llama::supplied(&supply, place).unwrap();
            assert_eq!((m.placement(), m.sha256().unwrap()), (place, whole.sha256().unwrap()));
            assert!(learned(&m, text) == want, "{place:?}");
            assert!(m.layers_read() >= 4 * place.read(6), "{place:?}: {}", m.layers_read());
        }
        // What fits is what it is without a supply.
        let all = Llama::supplied(&supply, Placement::RESIDENT).unwrap();
        assert_eq!((all.placement(), all.layers_read()), (Placement::RESIDENT, 0));
        assert!(learned(&all, text) == want);
        // A network that is made of it is where there is room.
        let m = Llama::supplied(&supply, Placement { resident: 1, hosted: 1, buffers: 2 }).unwrap();
        let merged = m.merge(None, &Scheme::new(4, 4, 4)).unwrap();
        assert_eq!(merged.placement(), Placement { resident: 1, buffers: 2, ..Placement::RESIDENT });
    }
}

/// A file that is written to while its layers are read is no other model: the error names file and tensor.
#[test]
fn files_that_change_under_a_run_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let config = LlamaConfig { layers: 4, ..tiny::config(4, 2, false) };
    tiny::write(dir.path(), &config, DType::F32, 9, true);
    let supply = Arc::new(Supply::files(Source::from_dir(dir.path()).unwrap(), DType::F32, &Device::Cpu));
    let m = Llama::supplied(&supply, Placement { resident: 1, hosted: 1, buffers: 2 }).unwrap();
    let network = |m: &Llama| m.merge_exact(None, &Scheme::FULL_PRECISION)?.logits(&[1, 2, 3, 4], 4);
    network(&m).unwrap();
    let file = std::fs::read_dir(dir.path())
        .unwrap()
        .map(|e| e.unwrap().path())
        .find(|p| p.extension().is_some_and(|e| e == "safetensors"));
    let file = file.unwrap();
    let later = std::fs::metadata(&file).unwrap().modified().unwrap() + std::time::Duration::from_secs(5);
    std::fs::File::options().append(true).open(&file).unwrap().set_modified(later).unwrap();
    for _ in 0..2 {
        let message = network(&m).unwrap_err().to_string();
        let name = file.file_name().unwrap().to_str().unwrap();
        assert!(message.contains(name) && message.contains("model.layers.") && message.contains("was written to"), "{message}");
    }
}
