//! wiki-llama-15m, a model of 15 million parameters: its perplexity does not see rotations, and quantised it needs them.

use std::ops::ControlFlow;
use std::path::PathBuf;

use spinquant::data::{Tokenizer, Windows};
use spinquant::eval::perplexity;
use spinquant::llama::{Llama, LlamaConfig};
use spinquant::quant::Scheme;
use spinquant::rotation::Rotations;
use spinquant::{DType, Device};

use crate::common::need::{model, text};

const CONTEXT: usize = 1024;

/// The folder of the model that these tests know the numbers of.
fn folder() -> PathBuf {
    let dir = model();
    let c = LlamaConfig::from_file(dir.join("config.json")).unwrap();
    let (ours, it) =
        ([384, 1376, 6, 6, 2, 4096], [c.hidden_size, c.intermediate_size, c.layers, c.heads, c.kv_heads, c.vocab_size]);
    assert_eq!(it, ours, "{} is not wiki-llama-15m", dir.display());
    dir
}

/// The model and the first windows of its test text.
fn setup(windows: usize) -> (Llama, Windows) {
    let dir = folder();
    let model = Llama::load(&dir, DType::F32, &Device::Cpu).unwrap();
    // Windows take some 70 KB of the text; a cut changes no token before the last words.
    let text = text("test.txt");
    let end = (0..8 * CONTEXT * windows).rev().find(|&i| text.is_char_boundary(i)).unwrap();
    let text = &text[..end];
    let tokens = Tokenizer::from_dir(&dir).unwrap().encode_stream(text, model.config.bos_token_id).unwrap();
    (model, Windows::new(&tokens[..CONTEXT * windows], CONTEXT).unwrap())
}

fn score(model: &Llama, text: &Windows, rotations: Option<&Rotations>, scheme: Scheme) -> f64 {
    let merged = model.merge(rotations, &scheme).unwrap();
    perplexity(&merged, text, |_| ControlFlow::Continue(())).unwrap().perplexity
}

fn hadamard(model: &Llama, seed: u64) -> Rotations {
    let c = &model.config;
    Rotations::random_hadamard(c.hidden_size, c.head_dim, c.layers, seed).unwrap()
}

#[test]
#[ignore = "needs SPINQUANT_MODEL (wiki-llama-15m) and SPINQUANT_TEXTS"]
fn full_precision_does_not_see_rotations() {
    let (model, text) = setup(16);
    let plain = score(&model, &text, None, Scheme::FULL_PRECISION);
    let rotated = score(&model, &text, Some(&hadamard(&model, 1)), Scheme::FULL_PRECISION);
    println!("perplexity of 16 windows {plain:.5}, rotated {rotated:.5}");
    assert!((rotated / plain - 1.0).abs() <= 1e-4, "{plain} became {rotated}");
    assert!((10.0..30.0).contains(&plain), "perplexity {plain}: not the model it should be");
}

#[test]
#[ignore = "needs SPINQUANT_MODEL (wiki-llama-15m) and SPINQUANT_TEXTS"]
fn quantised_to_four_bits_it_needs_them() {
    let (model, text) = setup(4);
    let scheme = Scheme::new(4, 4, 4);
    let plain = score(&model, &text, None, scheme);
    let rotated = score(&model, &text, Some(&hadamard(&model, 0)), scheme);
    println!("perplexity of 4 windows at {scheme}: {plain:.3}, rotated {rotated:.3}");
    assert!(plain > 1.5 * rotated, "{plain} unrotated, {rotated} rotated");
}

#[test]
#[ignore = "needs SPINQUANT_MODEL (wiki-llama-15m) and SPINQUANT_TEXTS"]
fn its_text_is_tokenised_as_published() {
    let (dir, test, train) = (folder(), text("test.txt"), text("train.txt"));
    let c = LlamaConfig::from_file(dir.join("config.json")).unwrap();
    let tokenizer = Tokenizer::from_dir(&dir).unwrap();
    let tokens = tokenizer.encode_stream(&test, c.bos_token_id).unwrap();
    assert_eq!((tokens.len(), tokens[0]), (374_676, 0));
    assert_eq!(Windows::new(tokens, 1024).unwrap().len(), 365);
    let start = std::time::Instant::now();
    let tokens = tokenizer.encode_stream(&train, c.bos_token_id).unwrap();
    println!("{} bytes of text: {} tokens in {:.1?}", train.len(), tokens.len(), start.elapsed());
}
