//! Trains the demo model with this crate's own tape and Adam, plants outliers, and writes `assets/demo`.
//!
//! `cargo run --release --example train_demo_model [-- OUT [STEPS]]`: 4 minutes on 4 cores; the same bytes again on the same machine.
//!
//! A LLaMA of 0.8M parameters learns the sentences of [`text`]. Its RMSNorm gains stay 1: a gain is a diagonal factor of the linears that
//! follow it, which are learned anyway. So small a model grows no outliers of its own, and is given some: its embeddings start with a
//! large part in common ([`COMMON`]), and at the end transforms that leave its function as it is (`spinquant::outliers`, [`OUTLIERS`])
//! gather that in two channels and scale up a few channels of every MLP and head. The weights are then rounded to f16.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Instant;

use spinquant::data::{self, Sampler, Tokenizer, Windows};
use spinquant::export::{Format, Output, write_rtn};
use spinquant::io::write_atomically;
use spinquant::llama::{Affine, Around, Block, Linear, LinearVars, Linears, Llama, LlamaConfig, RotatedWeights, Run, Weights};
use spinquant::ops::randn;
use spinquant::optim::{Adam, Optimizer, Schedule};
use spinquant::outliers::{PlantOptions, plant};
use spinquant::quant::{Online, Scheme};
use spinquant::{DType, Device, Error, Result, Tape, Tensor, Var, eval};

#[path = "train_demo_model/text.rs"]
mod text;

/// Seeds of the stories: to train on, to learn rotations on, to score on.
const TRAIN: u64 = 1;
const CALIBRATION: u64 = 2;
const TEST: u64 = 3;
/// Words of text to train on.
const WORDS: usize = 2_000_000;

const SEQ: usize = 256;
const BATCH: usize = 16;
const STEPS: usize = 2000;
const WARM_UP: usize = 100;
const LEARNING_RATE: f64 = 4e-3;
/// Length of what the embeddings of all tokens have in common at first; that of their own parts is 1.
const COMMON: f64 = 3.0;
/// Gradients are scaled down to this norm.
const CLIP: f64 = 1.0;

const OUTLIERS: PlantOptions = PlantOptions {
    seed: 0,
    residual_channels: 2,
    mlp_channels: 4,
    mlp_factor: 64.0,
    rope_pairs: 2,
    rope_factor: 4.0,
    value_channels: 2,
    value_factor: 4.0,
};

fn config(vocab_size: usize) -> LlamaConfig {
    LlamaConfig {
        hidden_size: 128,
        intermediate_size: 320,
        layers: 4,
        heads: 4,
        kv_heads: 2,
        head_dim: 32,
        vocab_size,
        rms_norm_eps: 1e-5,
        max_position_embeddings: SEQ,
        rope_theta: 1e4,
        tie_word_embeddings: false,
        bos_token_id: Some(0),
        eos_token_ids: vec![],
        dtype: Some(DType::F16),
        ..LlamaConfig::default()
    }
}

fn main() -> Result<()> {
    let usual = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/demo");
    let mut args = std::env::args().skip(1);
    let out = args.next().map_or_else(|| usual.clone(), PathBuf::from);
    let steps = match args.next() {
        Some(n) => n.parse().map_err(|_| Error::argument("STEPS", format!("expected a number, got {n:?}")))?,
        None => STEPS,
    };
    let vocabulary = text::vocabulary();
    let json = text::tokenizer(&vocabulary);
    let (calibration, test) = (text::text(CALIBRATION, 60_000), text::text(TEST, 30_000));

    let config = config(vocabulary.len());
    let tokenizer = Tokenizer::from_bytes(json.as_bytes(), Path::new("tokenizer.json"))?;
    let windows = |text: &str| Windows::new(tokenizer.encode_stream(text, config.bos_token_id)?, SEQ);
    let (train, test_windows) = (windows(&text::text(TRAIN, WORDS))?, windows(&test)?);
    println!("{} windows of {SEQ} to train on, {} words and marks", train.len(), vocabulary.len());

    let weights = fit(&config, &train, steps)?;
    let count: usize = parameters(&weights).iter().map(Tensor::len).sum();
    let perplexity = |weights: &Weights, scheme: &Scheme| {
        let merged = Llama::new(config.clone(), weights.clone())?.merge(None, scheme)?;
        Ok::<_, Error>(eval::perplexity(&merged, &test_windows, |_| ControlFlow::Continue(()))?.perplexity)
    };
    let full = Scheme::FULL_PRECISION;
    println!("{count} parameters; test perplexity {:.4}", perplexity(&weights, &full)?);
    let stored = map(&plant(&weights, &config, &OUTLIERS)?, |t| t.to_dtype(DType::F16))?;
    let read = map(&stored, |t| t.to_dtype(DType::F32))?;
    println!("with planted outliers, in f16: {:.4}", perplexity(&read, &full)?);
    println!("W4A4KV4 without rotations: {:.4}", perplexity(&read, &Scheme::new(4, 4, 4))?);

    // A folder that someone names must be empty.
    let output = Output { overwrite: out == usual, ..Output::new(&out, Format::Hf) };
    let full = full.online(Online::NONE);
    write_rtn(&Llama::new(config, stored)?, None, &full, output, |_| {})?;
    for (name, text) in [("tokenizer.json", json), ("calibration.txt", calibration), ("test.txt", test)] {
        write_atomically(&out.join(name), |f| f.write_all(text.as_bytes()))?;
    }
    println!("written to {}", out.display());
    Ok(())
}

/// Trains from random weights.
fn fit(config: &LlamaConfig, text: &Windows, steps: usize) -> Result<Weights> {
    let mut params = parameters(&start(config)?);
    let mut adam = Adam::default().with_betas(0.9, 0.95)?;
    let sampler = Sampler::new((0..text.len()).collect(), BATCH, 0)?;
    let exact = Scheme::FULL_PRECISION.online(Online::NONE);
    let run = Run::new(config, &exact, SEQ, DType::F32, &Device::Cpu)?;
    let begin = Instant::now();
    for step in 0..steps {
        let tape = Tape::new();
        let vars: Vec<_> = params.iter().map(|p| tape.variable(p.clone())).collect();
        let tokens = text.batch(&sampler.step(step));
        let loss = logits(config, &vars, &tokens, &run)?.cross_entropy(data::targets(&tokens, SEQ).into())?;
        let value = loss.value().item()?;
        let mut grads = tape.backward(loss)?;
        let grads = vars.iter().map(|v| grads.take(v)).collect::<Result<Vec<_>>>()?;
        drop(vars);
        let warm_up = ((step + 1) as f64 / WARM_UP as f64).min(1.0);
        let rate = warm_up * Schedule::Cosine.at(step, steps, LEARNING_RATE);
        adam.step(&mut params, clipped(grads)?, rate)?;
        if (step + 1) % 100 == 0 {
            println!("step {}: loss {value:.4}, {:.0} s", step + 1, begin.elapsed().as_secs_f64());
        }
    }
    weights(params)
}

/// The network of `Llama`, with every weight a variable and no rotations: logits `[tokens, V]`.
fn logits<'t>(config: &LlamaConfig, vars: &[Var<'t>], tokens: &[u32], run: &Run) -> Result<Var<'t>> {
    let [embedding, head, layers @ ..] = vars else { return Err(Error::argument("parameters", "fewer than two")) };
    let mut x = embedding.clone().embedding(tokens.into())?;
    for (i, layer) in layers.chunks(7).enumerate() {
        let linears: Linears<LinearVars<'t>> = without_biases(layer)?;
        let block = Block::new(config, i, linears.each(|_, l| Ok(l.weight.value().clone().into()))?);
        x = block.forward(x, RotatedWeights { linears, leave: None, around: Around::default() }, run)?;
    }
    x.rms_norm(config.rms_norm_eps)?.linear(head.clone())
}

/// Random weights; what enters the residual stream is smaller the more layers there are. Every token's embedding starts with the same
/// large part besides its own: a common direction of the residual stream, as large LLaMAs grow one.
fn start(config: &LlamaConfig) -> Result<Weights> {
    let mut weights = Weights::random(config, 0)?;
    let c = config.hidden_size;
    let common = randn([1, c], 1).into_vec::<f64>()?;
    let common = common.repeat(config.vocab_size).into_iter().map(|x| COMMON * x / (c as f64).sqrt()).collect();
    let common = Tensor::from_vec::<f64>(common, [config.vocab_size, c])?;
    weights.embedding = Tensor::axpby(1.0, weights.embedding, 1.0, common)?;
    let mut weights = map(&weights, |t| t.to_dtype(DType::F32))?;
    let factor = (2.0 * config.layers as f64).sqrt().recip();
    for layer in &mut weights.layers {
        for linear in [Linear::O, Linear::Down] {
            layer[linear].weight = layer[linear].weight.clone().scale(factor)?;
        }
    }
    Ok(weights)
}

/// Gradients whose common norm is at most [`CLIP`].
fn clipped(grads: Vec<Tensor>) -> Result<Vec<Tensor>> {
    let mut square = 0.0;
    for g in &grads {
        square += g.as_slice::<f32>()?.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>();
    }
    let factor = CLIP / square.sqrt().max(CLIP);
    if factor == 1.0 { Ok(grads) } else { grads.into_iter().map(|g| g.scale(factor)).collect() }
}

/// As an optimiser sees them: embedding, head, and seven linears a layer.
fn parameters(w: &Weights) -> Vec<Tensor> {
    let layers = w.layers.iter().flat_map(|l| l.tensors().cloned());
    [w.embedding.clone(), w.head.clone()].into_iter().chain(layers).collect()
}

fn weights(params: Vec<Tensor>) -> Result<Weights> {
    let [embedding, head, layers @ ..] = &params[..] else { return Err(Error::argument("parameters", "fewer than two")) };
    let layers = layers.chunks(7).map(without_biases).collect::<Result<_>>()?;
    Ok(Weights { embedding: embedding.clone(), head: head.clone(), layers })
}

fn without_biases<T: Clone>(weights: &[T]) -> Result<Linears<Affine<T, T>>> {
    Linears::from_vec(weights.iter().cloned().map(Affine::from).collect())
}

fn map(w: &Weights, f: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Weights> {
    let layers = w.layers.iter().map(|l| l.map(&f)).collect::<Result<_>>()?;
    Ok(Weights { embedding: f(&w.embedding)?, head: f(&w.head)?, layers })
}
