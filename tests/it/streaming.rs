//! Layers in main memory that come to the device when it is their turn: the same numbers, to the last bit.

use std::ops::ControlFlow;

use spinquant::calibrate::{Calibration, ClipGoal, quantize_weights, search_clips, search_weight_clips};
use spinquant::data::Windows;
use spinquant::device::Device;
use spinquant::learn::{ClipChoice, LearnOptions, Recipe, WeightClip, learn};
use spinquant::llama::{Llama, Placement, Plan, Recompute, RotationVars, synthetic};
use spinquant::objective::{self, Batch};
use spinquant::optim::{CayleySgd, Mode};
use spinquant::quant::{Gptq, Scheme};
use spinquant::rotation::{Rotations, Transforms};
use spinquant::{DType, Tape, Tensor};

const LAYERS: usize = 6;
const SEQ: usize = 12;

fn model(dtype: DType) -> Llama {
    synthetic::model(&synthetic::shape(&format!("tiny:{LAYERS}")).unwrap(), 3, dtype, &Device::Cpu).unwrap()
}

fn text(m: &Llama) -> Windows {
    synthetic::text(&m.config, 12, SEQ, 5).unwrap()
}

fn rotations(m: &Llama) -> Rotations {
    Rotations::random_hadamard(m.config.hidden_size, m.config.head_dim, m.config.layers, 7).unwrap()
}

fn streamed(m: &Llama, resident: usize, buffers: usize) -> Llama {
    m.clone().streamed(Placement { resident, buffers, ..Placement::RESIDENT }).unwrap()
}

fn bits(all: &[Tensor]) -> Vec<u64> {
    all.iter().flat_map(|t| t.to_f64_vec().unwrap()).map(f64::to_bits).collect()
}

/// A loss and the gradients of R1 and R2, as bits.
fn loss(m: &Llama, objective: &str, scheme: &Scheme, plan: Plan) -> (u64, Vec<u64>) {
    let tape = Tape::new();
    let rotations = rotations(m).to_dtype(if m.dtype() == DType::F64 { DType::F64 } else { DType::F32 }).unwrap();
    let vars = RotationVars::variables(&tape, &rotations).unwrap();
    let tokens = text(m).batch(&[0, 1, 2, 3]);
    let batch = Batch { model: m, tokens: &tokens, seq: SEQ, scheme, recompute: Recompute::Planned(plan) };
    let loss = objective::by_name(objective).unwrap().loss(&vars, &batch).unwrap();
    let value = loss.value().item().unwrap().to_bits();
    (value, bits(&vars.gradients(&mut tape.backward(loss).unwrap()).unwrap()))
}

/// What a plan is for a model whose first layers are streamed: those are computed again, in as many parts.
fn at_least(plan: Plan, streamed: usize) -> Plan {
    Plan { recompute: plan.recompute.max(streamed), ..plan }
}

#[test]
fn gradients_are_those_of_the_resident_run() {
    let m = model(DType::F32);
    let kept = Plan { recompute: 2, keep_weights: true, sequences: 0 };
    for scheme in [Scheme::new(4, 4, 4), Scheme::new(16, 4, 4)] {
        for plan in [Plan::KEEP_ALL, Plan::LEAN, kept] {
            for (resident, buffers) in [(0, 2), (1, 3), (4, 4)] {
                let want = loss(&m, "cross-entropy", &scheme, at_least(plan, LAYERS - resident));
                let got = loss(&streamed(&m, resident, buffers), "cross-entropy", &scheme, plan);
                assert!(got == want, "{scheme} {plan:?}, {resident} layers resident, {buffers} buffers");
            }
        }
    }
}

#[test]
fn every_objective_is_the_same() {
    for dtype in [DType::F32, DType::BF16] {
        let m = model(dtype);
        let scheme = Scheme::new(4, 4, 4);
        for objective in objective::all() {
            let want = loss(&m, &objective.name(), &scheme, Plan::INPUTS);
            let got = loss(&streamed(&m, 2, 2), &objective.name(), &scheme, Plan::INPUTS);
            assert!(got == want, "{} in {dtype}", objective.name());
        }
    }
}

/// Everything that is learned, with its searches and scores: the same steps, the same outcome. Between the passes of a step what turns
/// round is not copied again.
#[test]
fn learning_is_the_same() {
    let m = model(DType::F32);
    let windows = text(&m);
    let run = |m: &Llama, recompute| {
        let options = LearnOptions {
            steps: 3,
            batch: 4,
            micro_batch: Some(4),
            held_out: Some(4),
            held_out_every: 3,
            recompute: Some(recompute),
            transforms: Transforms::ALL,
            clip: ClipChoice::Learned,
            weight_clip: WeightClip::Learned,
            clip_windows: 2,
            ..Recipe::Published.options(Scheme::new(4, 4, 4))
        };
        let (mut losses, mut copied) = (vec![], vec![]);
        let learned = learn(m, &windows, rotations(m), &mut CayleySgd::new(Mode::Default), &options, |step| {
            losses.push((step.loss.to_bits(), step.held_out.map(f64::to_bits)));
            copied.push(m.copied());
            ControlFlow::Continue(())
        });
        let learned = learned.unwrap();
        let clips = learned.rotations.clips.iter().map(|(_, t)| t.clone()).collect::<Vec<_>>();
        let of_weights = learned.rotations.weight_clips.as_ref().unwrap().iter().map(|(_, t)| t.clone());
        let all = [learned.rotations.r1.clone(), learned.rotations.r2.clone()].into_iter().chain(clips).chain(of_weights);
        let fidelity = learned.fidelity_last.divergence.to_bits();
        ((losses, bits(&all.collect::<Vec<_>>()), fidelity, learned.clip.map(|(found, _)| found)), copied)
    };
    let (want, none) = run(&m, Recompute::All);
    assert_eq!(none, [0; 3]);
    let (got, copied) = run(&streamed(&m, 1, 3), Recompute::All);
    assert!(got == want);
    // Five are streamed, and the three that are in the buffers at a turn are not copied again.
    assert_eq!(copied[1] - copied[0], 2 * (5 - 3), "{copied:?}");
}

#[test]
fn networks_are_the_same() {
    let m = model(DType::F32);
    let (r, windows, scheme) = (rotations(&m), text(&m), Scheme::new(4, 4, 4));
    let place = Placement { resident: 2, buffers: 2, ..Placement::RESIDENT };
    let s = m.clone().streamed(place).unwrap();
    let logits =
        |n: &spinquant::llama::Merged| bits(&[n.logits(windows.get(0), SEQ).unwrap(), n.logits(windows.get(1), SEQ).unwrap()]);
    for rotations in [None, Some(&r)] {
        let (want, got) = (m.merge(rotations, &scheme).unwrap(), s.merge(rotations, &scheme).unwrap());
        assert_eq!(got.placement(), place);
        assert!(logits(&got) == logits(&want));
        assert_eq!(got.sha256().unwrap(), want.sha256().unwrap());
        let (want, got) = (m.merge_exact(rotations, &scheme).unwrap(), s.merge_exact(rotations, &scheme).unwrap());
        assert_eq!(got.placement(), place);
        assert!(logits(&got) == logits(&want));
    }
    let gptq = |m: &Llama| {
        let calibration = Calibration::first(&windows, 4).unwrap();
        let progress = |_: &_| ControlFlow::Continue(());
        quantize_weights(m, Some(&r), &scheme, &Gptq::default(), Some(&calibration), &mut (), progress).unwrap()
    };
    let (want, got) = (gptq(&m), gptq(&s));
    assert_eq!(got.placement(), place);
    assert!(logits(&got) == logits(&want));
    let search =
        |m: &Llama, goal| search_clips(m, Some(&r), &scheme, &windows, &[0, 1], goal, |_, _| ControlFlow::Continue(())).unwrap();
    for goal in [ClipGoal::Error, ClipGoal::Loss] {
        assert_eq!(search(&s, goal), search(&m, goal));
    }
    let of_weights = |m: &Llama| {
        let found = search_weight_clips(m, &r, &scheme, |_, _| ControlFlow::Continue(())).unwrap();
        bits(&found.iter().map(|(_, t)| t.clone()).collect::<Vec<_>>())
    };
    assert!(of_weights(&s) == of_weights(&m));
}

/// The option of every command that loads a model; what is learned and scored is the same.
#[cfg(feature = "cli")]
#[test]
fn commands_take_the_number_of_layers_that_stay() {
    let folder = tempfile::tempdir().unwrap();
    let run = |command: &str, resident: &str| {
        let args = command.split_whitespace().chain(["--model", "synthetic:tiny:6", "--device", "cpu", "--resident", resident]);
        let out =
            std::process::Command::new(env!("CARGO_BIN_EXE_spinquant")).args(args).current_dir(folder.path()).output().unwrap();
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(out.status.success(), "{command}: {said}");
        assert_eq!(said.contains("of 6 layers in main memory"), resident != "6", "{said}");
        String::from_utf8(out.stdout).unwrap()
    };
    let learn = "learn --recipe published --text synthetic:16 --seq-len 16 --steps 2 --batch 4";
    let rotations = |resident: &str| {
        run(&format!("{learn} --out R{resident}.safetensors"), resident);
        std::fs::read(folder.path().join(format!("R{resident}.safetensors"))).unwrap()
    };
    assert!(rotations("1") == rotations("6"));
    // Of the five layers that do not stay, four are in neither memory.
    let made =
        "learn --recipe published --text synthetic:16 --seq-len 16 --steps 2 --batch 4 --in-main-memory 1 --out M.safetensors";
    run(made, "1");
    assert!(std::fs::read(folder.path().join("M.safetensors")).unwrap() == rotations("6"));
    for command in [
        "eval --text synthetic:4 --seq-len 16 --rotations R1.safetensors --json",
        "eval --text synthetic:4 --seq-len 16 --weights gptq --calibration synthetic:4 --calibration-windows 4 --rotations hadamard --json",
        "clip --text synthetic:4 --seq-len 16 --rotations R1.safetensors --windows 2 --out C.safetensors --json",
    ] {
        let outcome = |resident: &str| {
            let mut outcome: serde_json::Value = serde_json::from_str(&run(command, resident)).unwrap();
            outcome["seconds"].take();
            outcome
        };
        assert_eq!(outcome("2"), outcome("6"), "{command}");
    }
    let profile = "profile --recipe published --steps 3 --seq-len 16 --batch 2 --text synthetic:8 --json";
    let said = run(profile, "1");
    let report: serde_json::Value = serde_json::from_str(&said).unwrap();
    assert_eq!(report["plan"]["layers_in_main_memory"], 5);
    assert_eq!(report["copied_bytes_per_step"], report["predicted_copied_bytes"]);
    assert!(report["copied_bytes_per_step"].as_u64().unwrap() > 0);
}
