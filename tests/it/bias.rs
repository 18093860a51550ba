//! Biases of the linears, from files to files. The laws of `model`, `gptq` and `export` are tried on models with them too.

use std::path::Path;
use std::sync::Arc;

use spinquant::device::Card;
use spinquant::export::{Format, Output, load_native, write_hf, write_rtn};
use spinquant::llama::{Checkpoint, Linear, Llama, LlamaConfig, Plan, Recompute, RotationVars, Source, Weights, synthetic};
use spinquant::memory::{Work, predict};
use spinquant::ops::randn;
use spinquant::quant::{Online, Scheme};
use spinquant::rotation::Rotations;
use spinquant::{DType, Device, Tape, Tensor, io};

use crate::common::{distance, tiny};

fn config() -> LlamaConfig {
    tiny::with_biases(tiny::config(4, 2, false))
}

fn model(config: &LlamaConfig) -> Llama {
    Llama::new(config.clone(), Weights::random(config, 3).unwrap()).unwrap()
}

fn rotations(config: &LlamaConfig) -> Rotations {
    Rotations::random_orthogonal(config.hidden_size, config.head_dim, config.layers, 5).unwrap()
}

/// The model after a change of one layer's linears.
fn changed(m: &Llama, change: impl Fn(&mut spinquant::llama::LayerWeights)) -> Llama {
    let mut layers: Vec<_> = m.blocks.iter().map(|b| b.weights.clone()).collect();
    change(&mut layers[1]);
    let weights = Weights { embedding: m.embedding.clone(), head: m.head.clone(), layers };
    Llama::new(m.config.clone(), weights).unwrap()
}

#[test]
fn the_configuration_says_which_linears_have_one() {
    for (attention, mlp) in [(false, false), (true, false), (false, true), (true, true)] {
        let config = LlamaConfig { attention_bias: attention, mlp_bias: mlp, ..tiny::config(4, 2, false) };
        let again = LlamaConfig::from_json(config.to_json().as_bytes(), Path::new("config.json")).unwrap();
        assert_eq!(again, config);
        let w = Weights::random(&config, 0).unwrap();
        for (linear, l) in w.layers[0].iter() {
            let is_attention = matches!(linear, Linear::Q | Linear::K | Linear::V | Linear::O);
            assert_eq!(l.bias.is_some(), if is_attention { attention } else { mlp }, "{linear}");
            assert!(l.bias.as_ref().is_none_or(|b| b.shape() == &l.weight.shape()[..1]), "{linear}");
        }
    }
}

#[test]
fn every_bias_is_read_and_counts() {
    let dir = tempfile::tempdir().unwrap();
    let config = config();
    tiny::write(dir.path(), &config, DType::F64, 3, true);
    let m = Llama::load(dir.path(), DType::F64, &Device::Cpu).unwrap();
    assert!(Source::open(dir.path(), &config).unwrap().unread().is_empty());
    let file = Checkpoint::open(dir.path()).unwrap();
    let logits = tiny::logits(&m);
    for linear in Linear::ALL {
        // A gain of the norm in front scales the weight and not the bias.
        let bias = m.blocks[1].weights[linear].bias.as_ref().unwrap();
        let stored = file.tensor(&format!("{}.bias", linear.path(1)), bias.shape()).unwrap();
        assert_eq!(bias.to_f64_vec().unwrap(), stored.to_f64_vec().unwrap(), "{linear}");
        let without = changed(&m, |w| w[linear].bias = None);
        // A bias of k adds one number to all scores of a query, but for the rotary embedding: little, and not nothing.
        assert!(distance(&tiny::logits(&without), &logits) > 1e-4, "{linear}");
        assert_ne!(without.sha256().unwrap(), m.sha256().unwrap(), "{linear}");
        let last = changed(&m, |w| {
            let mut values = bias.to_f64_vec().unwrap();
            *values.last_mut().unwrap() += 1e-3;
            w[linear].bias = Some(Tensor::from_vec(values, bias.shape()).unwrap());
        });
        assert_ne!(last.sha256().unwrap(), m.sha256().unwrap(), "{linear}");
    }
}

#[test]
fn a_bias_that_is_missing_or_of_another_length_is_named() {
    let dir = tempfile::tempdir().unwrap();
    tiny::write(dir.path(), &config(), DType::F32, 3, true);
    let path = dir.path().join("model.safetensors");
    let (mut tensors, metadata) = io::load_tensors(&path).unwrap();
    let name = "model.layers.1.mlp.up_proj.bias";
    let load = || Llama::load(dir.path(), DType::F32, &Device::Cpu).unwrap_err().to_string();
    let metadata = metadata.into_iter().collect();
    tensors.insert(name.into(), randn([23], 0));
    io::save_tensors(&path, &tensors, &metadata).unwrap();
    let message = load();
    assert!([name, "[24]", "[23]"].iter().all(|part| message.contains(part)), "{message}");
    tensors.remove(name);
    io::save_tensors(&path, &tensors, &metadata).unwrap();
    let message = load();
    assert!(message.contains(name) && message.contains("missing"), "{message}");
}

/// Biases of q, k and v alone, as Qwen2 has them.
#[test]
fn some_linears_may_have_one() {
    let m = model(&config());
    let m = Llama {
        blocks: m
            .blocks
            .iter()
            .map(|b| {
                let mut w = b.weights.clone();
                [Linear::O, Linear::Gate, Linear::Up, Linear::Down].into_iter().for_each(|l| w[l].bias = None);
                Arc::new(b.with_weights(w))
            })
            .collect(),
        ..m
    };
    let (r, tokens) = (rotations(&m.config), tiny::tokens(&m.config));
    let want = tiny::logits(&m);
    let rotated = m.merge(Some(&r), &Scheme::FULL_PRECISION).unwrap().logits(&tokens, 9).unwrap().to_f64_vec().unwrap();
    assert!(distance(&rotated, &want) < 1e-10);
    // Recomputed layers take their weights and biases through a list.
    let gradients = |plan: Plan| {
        let tape = Tape::new();
        let vars = RotationVars::variables(&tape, &r).unwrap();
        let loss = m.loss(&vars, &tokens, 9, &Scheme::new(4, 4, 4), Recompute::Planned(plan)).unwrap();
        let gradients = vars.gradients(&mut tape.backward(loss).unwrap()).unwrap();
        gradients.iter().flat_map(|g| g.to_f64_vec().unwrap()).collect::<Vec<_>>()
    };
    let want = gradients(Plan::KEEP_ALL);
    for keep_weights in [false, true] {
        assert_eq!(gradients(Plan { recompute: 2, keep_weights, sequences: 0 }), want);
    }
}

#[test]
fn f32_agrees_with_f64() {
    let wide = model(&config());
    let weights = |t: &Tensor| t.to_dtype(DType::F32);
    let narrow = Llama {
        embedding: weights(&wide.embedding).unwrap(),
        head: weights(&wide.head).unwrap(),
        blocks: wide.blocks.iter().map(|b| Arc::new(b.with_weights(b.weights.map(weights).unwrap()))).collect(),
        config: wide.config.clone(),
        engine: wide.engine,
    };
    let want = tiny::logits(&wide);
    assert!(distance(&tiny::logits(&narrow), &want) < 1e-4 * want.iter().fold(0.0, |m, x| f64::max(m, x.abs())));
    let loss = |m: &Llama, r: &Rotations| {
        let tape = Tape::new();
        let vars = RotationVars::variables(&tape, r).unwrap();
        let scheme = Scheme::FULL_PRECISION.online(Online::BOTH);
        let loss = m.loss(&vars, &tiny::tokens(&m.config), 9, &scheme, Recompute::All).unwrap();
        let gradients = vars.gradients(&mut tape.backward(loss).unwrap()).unwrap();
        gradients.iter().flat_map(|g| g.to_f64_vec().unwrap()).collect::<Vec<_>>()
    };
    let r = rotations(&wide.config);
    let (got, want) = (loss(&narrow, &r.to_dtype(DType::F32).unwrap()), loss(&wide, &r));
    assert!(distance(&got, &want) < 1e-3 * want.iter().fold(0.0, |m, x| f64::max(m, x.abs())));
}

/// v by R2 of its head, o and down by R1, the others not at all.
#[test]
fn files_hold_rotated_biases() {
    let dir = tempfile::tempdir().unwrap();
    let (source, hf, native) = (dir.path().join("source"), dir.path().join("hf"), dir.path().join("native"));
    let config = config();
    tiny::write(&source, &config, DType::F64, 3, true);
    let r = rotations(&config);
    let scheme = Scheme::FULL_PRECISION.online(Online::NONE);
    write_hf(&source, Some(&r), &scheme, Output::new(&hf, Format::Hf), |_| {}).unwrap();
    let m = Llama::load(&source, DType::F64, &Device::Cpu).unwrap();
    write_rtn(&m, Some(&r), &Scheme::new(4, 4, 4), Output::new(&native, Format::Native), |_| {}).unwrap();
    let (old, new) = (Checkpoint::open(&source).unwrap(), Checkpoint::open(&hf).unwrap());
    let native = load_native(&native, &Device::Cpu).unwrap().model;
    for linear in Linear::ALL {
        let read = |c: &Checkpoint| {
            let name = format!("{}.bias", linear.path(1));
            c.tensor(&name, &linear.shape(&config)[..1]).unwrap().to_f64_vec().unwrap()
        };
        let (b, got) = (read(&old), read(&new));
        let rotation = match linear {
            Linear::V => Some(r.r2.index(1).unwrap()),
            Linear::O | Linear::Down => Some(r.r1.clone()),
            _ => None,
        };
        let want: Vec<f64> = match &rotation {
            None => b,
            Some(r) => {
                let (n, r) = (r.cols(), r.to_f64_vec().unwrap());
                let entry = |i: usize| (0..n).map(|k| r[k * n + i % n] * b[i - i % n + k]).sum();
                (0..b.len()).map(entry).collect()
            }
        };
        assert!(distance(&got, &want) < 1e-14, "{linear}");
        assert_eq!(native.blocks[1].weights[linear].bias.as_ref().unwrap().to_f64_vec().unwrap(), got, "{linear}");
    }
}

#[test]
fn a_plan_counts_them() {
    let work = Work::new(Scheme::new(4, 4, 4), 1, 9, DType::F64);
    for config in [tiny::config(4, 2, false), config()] {
        let planned = predict(&config, &work, Plan::KEEP_ALL, 1, &Card::h100()).unwrap();
        let (_, weights) = planned.items.into_iter().find(|(name, _)| *name == "weights").unwrap();
        assert_eq!(weights, model(&config).bytes());
    }
}

#[test]
fn synthetic_models_have_them_where_asked_for() {
    let plain = synthetic::shape("tiny").unwrap();
    let with = tiny::with_biases(plain.clone());
    let [plain, biased] = [&plain, &with].map(|c| synthetic::model(c, 7, DType::F32, &Device::Cpu).unwrap());
    for ((linear, a), (_, b)) in plain.blocks[1].weights.iter().zip(biased.blocks[1].weights.iter()) {
        assert_eq!(a.weight.to_f64_vec().unwrap(), b.weight.to_f64_vec().unwrap(), "{linear}");
        let bias = b.bias.as_ref().unwrap().to_f64_vec().unwrap();
        assert!(a.bias.is_none() && bias.iter().filter(|x| **x != 0.0).count() > bias.len() / 2, "{linear}");
    }
    let (r, tokens) = (rotations(&with), tiny::tokens(&with));
    let logits = |r: Option<&Rotations>| {
        biased.merge(r, &Scheme::FULL_PRECISION).unwrap().logits(&tokens, 9).unwrap().to_f64_vec().unwrap()
    };
    let want = logits(None);
    assert!(distance(&logits(Some(&r)), &want) < 1e-3 * want.iter().fold(0.0, |m, x| f64::max(m, x.abs())));
}
