//! One learning step of 8 x 1024 tokens on a LLaMA of 15 million weights, and evaluation, with their peak memory.
//!
//! `cargo bench --bench step`. The model is that of SPINQUANT_MODEL (a Hugging Face folder), or random weights of the same
//! shape: time does not depend on the values. A GPU is used where there is one (bf16).

use std::ops::ControlFlow;
use std::path::PathBuf;

use rand::{RngExt, SeedableRng};
use spinquant::bench::time::{Samples, once};
use spinquant::data::Windows;
use spinquant::eval::perplexity;
use spinquant::learn::{ClipChoice, LearnOptions, learn};
use spinquant::llama::{Llama, LlamaConfig, Weights};
use spinquant::optim::{CayleySgd, Mode};
use spinquant::quant::Scheme;
use spinquant::rotation::Rotations;
use spinquant::{DType, Device, Result};

const SEQ: usize = 1024;
const BATCH: usize = 8;
/// Steps timed, after one that is not.
const STEPS: usize = 3;

fn main() -> Result<()> {
    let device = Device::cuda(0).unwrap_or(Device::Cpu);
    let dtype = if device.is_cpu() { DType::F32 } else { DType::BF16 };
    let model = model(dtype, &device)?;
    let c = &model.config;
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(0);
    let tokens: Vec<u32> = (0..24 * SEQ).map(|_| rng.random_range(0..c.vocab_size as u32)).collect();
    let windows = Windows::new(tokens, SEQ)?;
    println!("{BATCH} x {SEQ} tokens a step, {dtype} on {device}");
    for name in ["W16A4KV4", "W4A4KV4"] {
        let options = LearnOptions {
            scheme: name.parse::<Scheme>()?,
            steps: STEPS + 1,
            batch: BATCH,
            micro_batch: Some(BATCH),
            held_out: Some(0),
            clip: ClipChoice::Keep,
            ..LearnOptions::default()
        };
        let start = Rotations::random_hadamard(c.hidden_size, c.head_dim, c.layers, 0)?;
        let mut seconds = vec![];
        learn(&model, &windows, start, &mut CayleySgd::new(Mode::Default), &options, |step| {
            assert!(step.loss.is_finite(), "the loss of step {} is {}", step.step, step.loss);
            assert!(step.orthogonality_error <= 1e-6, "max|RᵀR − I| = {:e}", step.orthogonality_error);
            seconds.push(step.seconds);
            ControlFlow::Continue(())
        })?;
        let first = seconds.remove(0);
        let steps = Samples::new(seconds.iter().map(|s| s * 1e3).collect(), "wall clock").expect("several steps");
        let [least, most] = [0, 100].map(|p| steps.percentile(p) / 1e3);
        println!("{name}: {least:.2} to {most:.2} s a step (first: {first:.2}), peak memory {}", peak(&device));
    }
    let plain = model.merge(None, &Scheme::new(16, 16, 16))?;
    let score = || -> Result<f64> {
        let (score, seconds) = once(&device, || perplexity(&plain, &windows, |_| ControlFlow::Continue(())))?;
        assert!(score.perplexity.is_finite());
        Ok(score.tokens as f64 / seconds)
    };
    score()?;
    println!("full-precision evaluation: {:.0} tokens/s, peak memory {}", score()?, peak(&device));
    Ok(())
}

fn model(dtype: DType, device: &Device) -> Result<Llama> {
    if let Some(folder) = std::env::var_os("SPINQUANT_MODEL").map(PathBuf::from) {
        println!("{}", folder.display());
        return Llama::load(&folder, dtype, device);
    }
    println!("random weights");
    let config = LlamaConfig {
        hidden_size: 384,
        intermediate_size: 1376,
        layers: 6,
        heads: 6,
        kv_heads: 2,
        head_dim: 64,
        vocab_size: 4096,
        rms_norm_eps: 1e-5,
        max_position_embeddings: 2048,
        rope_theta: 1e4,
        tie_word_embeddings: false,
        bos_token_id: Some(0),
        eos_token_ids: vec![1],
        dtype: None,
        ..LlamaConfig::default()
    };
    let weights = Weights::random(&config, 0)?;
    let layers = weights.layers.iter().map(|l| l.map(|w| w.to_dtype(dtype))).collect::<Result<_>>()?;
    let (embedding, head) = (weights.embedding.to_dtype(dtype)?, weights.head.to_dtype(dtype)?);
    Llama::new(config, Weights { embedding, head, layers })?.to_device(device)
}

fn peak(device: &Device) -> String {
    device.peak_bytes().map_or("unknown".into(), |b| format!("{:.2} GiB", b as f64 / f64::from(1 << 30)))
}
