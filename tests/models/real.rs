//! Any model: it loads, and what is written from it has its function.

use std::path::Path;

use spinquant::export::{Format, Output, load_native, write_hf, write_rtn};
use spinquant::llama::{Llama, LlamaConfig, Merged, Weights};
use spinquant::quant::{Online, Scheme};
use spinquant::rotation::Rotations;
use spinquant::{DType, Device, Tensor};

use crate::common::need::model;
use crate::common::{distance, same_weights};

const PLAIN: Scheme = Scheme { online: Online::NONE, ..Scheme::FULL_PRECISION };

#[test]
#[ignore = "needs SPINQUANT_MODEL"]
fn it_loads() {
    let dir = model();
    let c = LlamaConfig::from_file(dir.join("config.json")).unwrap();
    assert_eq!(LlamaConfig::from_json(c.to_json().as_bytes(), Path::new("written")).unwrap(), c);
    let w = Weights::load(&dir, &c, DType::F32).unwrap();
    assert_eq!((w.layers.len(), w.embedding.shape()), (c.layers, &[c.vocab_size, c.hidden_size][..]));
    let rms = |t: &Tensor| (t.to_f64_vec().unwrap().iter().map(|x| x * x).sum::<f64>() / t.len() as f64).sqrt();
    println!("embedding rms {}, head rms {}, first q rms {}", rms(&w.embedding), rms(&w.head), rms(&w.layers[0].0[0].weight));
}

#[test]
#[ignore = "needs SPINQUANT_MODEL"]
fn it_keeps_its_function() {
    let source = model();
    let config = LlamaConfig::from_file(source.join("config.json")).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let (hf, native) = (dir.path().join("hf"), dir.path().join("native"));
    let r = Rotations::random_hadamard(config.hidden_size, config.head_dim, config.layers, 1).unwrap();
    let tokens: Vec<u32> = (0..64).map(|i| (i * i * 31 + 7 * i) % config.vocab_size as u32).collect();
    let logits = |m: &Merged| m.logits(&tokens, 64).unwrap().to_f64_vec().unwrap();
    let load = |dir: &Path| Llama::load(dir, DType::F32, &Device::Cpu).unwrap();
    let plain = |dir: &Path| logits(&load(dir).merge(None, &Scheme::FULL_PRECISION).unwrap());

    write_hf(&source, Some(&r), &PLAIN, Output::new(&hf, Format::Hf), |_| {}).unwrap();
    let (want, got) = (plain(&source), plain(&hf));
    let size = want.iter().fold(0.0, |m, x| f64::max(m, x.abs()));
    println!("max|logit| {size:.2}, max|difference| {:.1e}", distance(&want, &got));
    let half = Llama::load(&hf, DType::F32, &Device::Cpu).unwrap().config.dtype.is_some_and(DType::is_half);
    assert!(distance(&want, &got) < if half { 0.05 } else { 1e-4 } * size);
    assert!(hf.join("tokenizer.json").exists());

    let (model, scheme) = (load(&source), Scheme::new(4, 4, 4));
    write_rtn(&model, Some(&r), &scheme, Output::new(&native, Format::Native), |_| {}).unwrap();
    let loaded = load_native(&native, &Device::Cpu).unwrap().model;
    let want = model.merge(Some(&r), &scheme).unwrap();
    same_weights(&loaded, &want);
    assert_eq!(logits(&loaded), logits(&want));
}
