//! A real model of 15 million parameters, where it is at hand: its perplexity does not see rotations, and quantised it needs them.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use spinquant::data::{Tokenizer, Windows, read_text};
use spinquant::eval::perplexity;
use spinquant::llama::Llama;
use spinquant::quant::Scheme;
use spinquant::rotation::Rotations;
use spinquant::{DType, Device};

const CONTEXT: usize = 1024;

/// The model and the first windows of its test text; `None` (said so) where one is missing.
fn setup(windows: usize) -> Option<(Llama, Windows)> {
    let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared");
    let dir = std::env::var_os("SPINQUANT_MODEL").map_or(beside.join("models/wiki-llama-15m"), PathBuf::from);
    let text = beside.join("data/wikitext2/test.txt");
    for path in [&dir.join("config.json"), &text] {
        if !path.exists() {
            println!("skipped: no {}", path.display());
            return None;
        }
    }
    if !dir.ends_with("wiki-llama-15m") {
        println!("skipped: {} is another model", dir.display());
        return None;
    }
    let model = Llama::load(&dir, DType::F32, &Device::Cpu).unwrap();
    // Windows take some 70 KB of the text; a cut changes no token before the last words.
    let text = read_text(text).unwrap();
    let end = (0..8 * CONTEXT * windows).rev().find(|&i| text.is_char_boundary(i)).unwrap();
    let text = &text[..end];
    let tokens = Tokenizer::from_dir(&dir).unwrap().encode_stream(text, model.config.bos_token_id).unwrap();
    Some((model, Windows::new(&tokens[..CONTEXT * windows], CONTEXT).unwrap()))
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
fn full_precision_does_not_see_rotations() {
    let Some((model, text)) = setup(16) else { return };
    let plain = score(&model, &text, None, Scheme::FULL_PRECISION);
    let rotated = score(&model, &text, Some(&hadamard(&model, 1)), Scheme::FULL_PRECISION);
    println!("perplexity of 16 windows {plain:.5}, rotated {rotated:.5}");
    assert!((rotated / plain - 1.0).abs() <= 1e-4, "{plain} became {rotated}");
    assert!((10.0..30.0).contains(&plain), "perplexity {plain}: not the model it should be");
}

#[test]
fn quantised_to_four_bits_it_needs_them() {
    let Some((model, text)) = setup(4) else { return };
    let scheme = Scheme::new(4, 4, 4);
    let plain = score(&model, &text, None, scheme);
    let rotated = score(&model, &text, Some(&hadamard(&model, 0)), scheme);
    println!("perplexity of 4 windows at {scheme}: {plain:.3}, rotated {rotated:.3}");
    assert!(plain > 1.5 * rotated, "{plain} unrotated, {rotated} rotated");
}
