//! The README's program: learn rotations for the embedded model, and compare perplexities.
//!
//! `cargo run --release --example library`

use std::ops::ControlFlow::Continue;

use spinquant::learn::{LearnOptions, learn};
use spinquant::optim::{CayleySgd, Mode};
use spinquant::rotation::Rotations;
use spinquant::{Result, demo, eval::perplexity, quant::Scheme};

fn main() -> Result<()> {
    let model = demo::model()?; // or Llama::load("folder", DType::F32, &Device::Cpu)?
    let (text, test) = (demo::windows(demo::CALIBRATION, 64)?, demo::windows(&demo::TEST[..20_000], 64)?);
    let (scheme, c) = (Scheme::new(4, 4, 4), &model.config);

    let start = Rotations::random_hadamard(c.hidden_size, c.head_dim, c.layers, 0)?;
    let options = LearnOptions { scheme, steps: 10, ..LearnOptions::default() };
    let learned = learn(&model, &text, start, &mut CayleySgd::new(Mode::Default), &options, |_| Continue(()))?;

    let plain = perplexity(&model.merge(None, &scheme)?, &test, |_| Continue(()))?;
    let rotated = perplexity(&model.merge(Some(&learned.rotations), &learned.settings.scheme)?, &test, |_| Continue(()))?;
    println!("W4A4KV4 perplexity: {:.2} without rotations, {:.2} with", plain.perplexity, rotated.perplexity);
    Ok(())
}

#[cfg(test)]
mod tests {
    #[test]
    fn it_runs() {
        super::main().unwrap();
    }
}
