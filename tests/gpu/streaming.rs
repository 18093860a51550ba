//! Layers in locked main memory that a second stream copies to the GPU: the same numbers, to the last bit.

use std::ops::ControlFlow;
use std::sync::Arc;

use spinquant::data::Windows;
use spinquant::device::Device;
use spinquant::learn::{LearnOptions, Recipe, learn};
use spinquant::llama::{Llama, LlamaConfig, Placement, Plan, Recompute, RotationVars, Source, Supply, synthetic};
use spinquant::optim::{CayleySgd, Mode};
use spinquant::quant::Scheme;
use spinquant::rotation::Rotations;
use spinquant::{DType, Tape, Tensor};

use crate::common::need::gpu;
use crate::common::tiny;

fn rotations(m: &Llama) -> Rotations {
    Rotations::random_hadamard(m.config.hidden_size, m.config.head_dim, m.config.layers, 7).unwrap()
}

fn bits(all: &[Tensor]) -> Vec<u64> {
    all.iter().flat_map(|t| t.to_f64_vec().unwrap()).map(f64::to_bits).collect()
}

fn gradients(m: &Llama, windows: &Windows, scheme: &Scheme, plan: Plan) -> Vec<u64> {
    let tape = Tape::new();
    let rotations = rotations(m).to_device(&m.device()).unwrap().to_dtype(DType::F32).unwrap();
    let vars = RotationVars::variables(&tape, &rotations).unwrap();
    let loss = m.loss(&vars, &windows.batch(&[0, 1]), windows.seq_len(), scheme, Recompute::Planned(plan)).unwrap();
    let mut all = vec![loss.value().clone()];
    all.extend(vars.gradients(&mut tape.backward(loss).unwrap()).unwrap());
    bits(&all)
}

/// Loss, gradients and logits of a model, resident and streamed, several times one behind the other.
fn same(name: &str, seq: usize, dtype: DType, device: &Device) {
    let config = synthetic::shape(name).unwrap();
    let m = synthetic::model(&config, 3, dtype, device).unwrap();
    let windows = synthetic::text(&config, 4, seq, 5).unwrap();
    for scheme in [Scheme::new(4, 4, 4), Scheme::new(16, 4, 4)] {
        for plan in [Plan::INPUTS, Plan { recompute: 1, keep_weights: true, sequences: 0 }] {
            for (resident, buffers) in [(0, 2), (1, 3), (config.layers - 2, 2)] {
                let recompute = plan.recompute.max(config.layers - resident);
                let want = gradients(&m, &windows, &scheme, Plan { recompute, ..plan });
                let s = m.clone().streamed(Placement { resident, buffers, ..Placement::RESIDENT }).unwrap();
                for again in 0..3 {
                    let got = gradients(&s, &windows, &scheme, plan);
                    assert!(got == want, "{name} in {dtype}, {scheme}, {resident} resident, {buffers} buffers, pass {again}");
                }
                assert!(s.copied() > 0);
            }
        }
    }
    // Layers in neither memory, which the CPU makes again behind the GPU's back.
    let supply = Arc::new(Supply::synthetic(&config, 3, dtype, device).unwrap());
    let scheme = Scheme::new(4, 4, 4);
    for (resident, hosted, buffers) in [(0, 0, 2), (1, 1, 3), (1, 2, 2)] {
        let want = gradients(&m, &windows, &scheme, Plan::INPUTS);
        let s = Llama::supplied(&supply, Placement { resident, hosted, buffers }).unwrap();
        for again in 0..3 {
            let got = gradients(&s, &windows, &scheme, Plan::INPUTS);
            assert!(got == want, "{name} in {dtype}, {resident} resident, {hosted} in main memory, pass {again}");
        }
        assert!(s.layers_read() > config.layers - resident - hosted);
        assert_eq!(s.sha256().unwrap(), m.sha256().unwrap());
    }
    let s = m.clone().streamed(Placement { resident: 1, buffers: 2, ..Placement::RESIDENT }).unwrap();
    let r = rotations(&m);
    let logits = |m: &Llama| {
        let merged = m.merge(Some(&r), &Scheme::new(4, 4, 4)).unwrap();
        let of = |n| merged.logits(windows.get(n), seq).unwrap();
        bits(&[of(0), of(1), of(2)])
    };
    assert!(logits(&s) == logits(&m), "{name} in {dtype}: merged");
    assert_eq!(s.sha256().unwrap(), m.sha256().unwrap());
}

#[test]
#[ignore = "needs a GPU"]
fn a_tiny_model_is_the_same() {
    for dtype in [DType::F32, DType::BF16] {
        same("tiny:6", 64, dtype, &gpu());
    }
}

/// Layers of 120 MB, whose copies take as long as the work on them.
#[test]
#[ignore = "needs a GPU"]
fn wide_layers_are_the_same() {
    same("llama-3.2-1b:6", 256, DType::BF16, &gpu());
}

/// Layers that are read from files, through locked buffers.
#[test]
#[ignore = "needs a GPU"]
fn layers_from_files_are_the_same() {
    let (device, dir) = (gpu(), tempfile::tempdir().unwrap());
    let config = LlamaConfig { layers: 6, ..tiny::config(4, 2, false) };
    let windows = Windows::new((0..16 * 8).map(|i| (i * i * 7 + i / 3) % 31).collect::<Vec<u32>>(), 16).unwrap();
    for dtype in [DType::F32, DType::BF16] {
        tiny::write(dir.path(), &config, DType::BF16, 9, true);
        let m = Llama::load(dir.path(), dtype, &device).unwrap();
        let supply = Arc::new(Supply::files(Source::from_dir(dir.path()).unwrap(), dtype, &device));
        let want = gradients(&m, &windows, &Scheme::new(4, 4, 4), Plan::INPUTS);
        for (resident, hosted, buffers) in [(0, 0, 2), (1, 1, 3)] {
            let s = Llama::supplied(&supply, Placement { resident, hosted, buffers }).unwrap();
            for again in 0..4 {
                let got = gradients(&s, &windows, &Scheme::new(4, 4, 4), Plan::INPUTS);
                assert!(got == want, "{dtype}, {resident} resident, {hosted} in main memory, pass {again}");
            }
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn learning_is_the_same() {
    let device = gpu();
    let config = synthetic::shape("tiny:6").unwrap();
    let m = synthetic::model(&config, 3, DType::BF16, &device).unwrap();
    let windows = synthetic::text(&config, 24, 64, 5).unwrap();
    let run = |m: &Llama| {
        let options = LearnOptions {
            steps: 5,
            batch: 4,
            micro_batch: Some(4),
            held_out: Some(4),
            held_out_every: 2,
            recompute: Some(Recompute::All),
            ..Recipe::default().options(Scheme::new(4, 4, 4))
        };
        let mut losses = vec![];
        let learned = learn(m, &windows, rotations(m), &mut CayleySgd::new(Mode::Default), &options, |step| {
            losses.push((step.loss.to_bits(), step.held_out.map(f64::to_bits)));
            ControlFlow::Continue(())
        });
        let learned = learned.unwrap();
        (losses, bits(&[learned.rotations.r1, learned.rotations.r2]), learned.fidelity_last.divergence.to_bits())
    };
    let want = run(&m);
    assert!(run(&m.clone().streamed(Placement { resident: 1, buffers: 3, ..Placement::RESIDENT }).unwrap()) == want);
    assert!(run(&m.streamed(Placement { resident: 0, buffers: 2, ..Placement::RESIDENT }).unwrap()) == want);
}
