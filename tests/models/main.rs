//! Tests that need a trained model and texts, too large to ship: `SPINQUANT_MODEL=DIR SPINQUANT_TEXTS=DIR cargo test --test models --
//! --include-ignored`.

#[path = "../common/mod.rs"]
mod common;
mod generation;
mod real;
mod wiki_llama;
mod zeroshot;
