//! Quantised models and rotations as files: what is written comes back, what is damaged or hostile is refused.

mod folders;
mod hugging_face;
mod native;
mod planting;
#[path = "../tiny/mod.rs"]
mod tiny;
mod torch;

use std::collections::BTreeMap;
use std::io::{Cursor, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use serde_json::Value;
use spinquant::calibrate::{Calibration, LayerReport, quantize_layers};
use spinquant::data::Windows;
use spinquant::export::{
    self, Format, Output, Provenance, RECORD, Stored, Writer, load_native, write_hf, write_quantized, write_rtn,
};
use spinquant::grid::Quantized;
use spinquant::llama::{Llama, LlamaConfig, Merged, Rotated, Source};
use spinquant::ops::randn;
use spinquant::quant::{Clip, Gptq, Online, Scheme};
use spinquant::rotation::Rotations;
use spinquant::{DType, Device, Error, Result, Tensor, io};
use zip::CompressionMethod::Stored as StoredEntry;
use zip::write::SimpleFileOptions;

/// The message of a failure, which must contain every part.
fn fails<T>(result: Result<T>, parts: &[&str]) {
    let message = result.err().expect("a failure").to_string();
    assert!(parts.iter().all(|p| message.contains(p)), "{message:?} lacks one of {parts:?}");
}

fn bits(r: &Rotations) -> (DType, Vec<u64>, Vec<usize>) {
    let values = [&r.r1, &r.r2].map(|t| t.to_f64_vec().unwrap()).concat();
    (r.r1.dtype(), values.iter().map(|x| x.to_bits()).collect(), r.r2.shape().to_vec())
}

/// A place for an output, and a random `f32` model, which came from files beside it.
fn beside_a_model(config: &LlamaConfig) -> (tempfile::TempDir, PathBuf, Llama) {
    let dir = tempfile::tempdir().unwrap();
    let (source, out) = (dir.path().join("source"), dir.path().join("out"));
    tiny::write(&source, config, DType::F32, 9, true);
    let model = Llama::load(&source, DType::F32, &Device::Cpu).unwrap();
    (dir, out, model)
}

fn distance(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).fold(0.0, |m, (a, b)| if (a - b).is_nan() || m.is_nan() { f64::NAN } else { f64::max(m, (a - b).abs()) })
}

const PLAIN: Scheme = Scheme { online: Online::NONE, ..Scheme::FULL_PRECISION };

fn same_weights(a: &Merged, b: &Merged) {
    let all = |m: &Merged| -> Vec<(DType, Vec<u64>)> {
        let layers = m.blocks.iter().flat_map(|b| b.weights.as_array());
        let of = |t: &Tensor| (t.dtype(), t.to_f64_vec().unwrap().iter().map(|x| x.to_bits()).collect());
        [&m.embedding, &m.head].into_iter().chain(layers).map(of).collect()
    };
    assert!(all(a) == all(b), "weights differ");
}

/// A model too large to ship: `SPINQUANT_MODEL`, or beside the checkout; skipped (and said so) where it is not.
#[test]
fn a_real_model_keeps_its_function() {
    let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/models/wiki-llama-15m");
    let source = std::env::var_os("SPINQUANT_MODEL").map_or(beside, PathBuf::from);
    let Ok(config) = LlamaConfig::from_file(source.join("config.json")) else {
        println!("skipped: no model at {}", source.display());
        return;
    };
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
