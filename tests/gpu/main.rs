//! Tests that need a GPU: `cargo test --features cuda -- --include-ignored`.
#![cfg(feature = "cuda")]

mod baselines;
#[path = "../common/mod.rs"]
mod common;
mod families;
mod gptq;
mod hadamard_sizes;
mod kernels;
mod networks;
mod parity;
mod reconstruct;
mod scale;
mod streaming;
mod synthetic;
