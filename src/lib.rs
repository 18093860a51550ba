//! SpinQuant (Liu et al., arXiv 2405.16406): orthogonal matrices that leave a LLaMA's full-precision output unchanged but spread its
//! outliers, learned by back-propagating through the fake-quantised network, so that 4-bit weights, activations and KV cache keep its
//! accuracy. With its own autodiff tape and its own CUDA kernels.
//!
//! ```text
//!              R1            R2 (per head)           R3, R4: Hadamards that run online
//!  E·R1 ─► x ──┬─► norm ─ Q ─► W_q R1 ─► RoPE ─ R3 ──────────┐
//!              │          │                                  ├─► attention ─ Q ─► R1ᵀ W_o R2 ─► + ─► x
//!              │          ├──► W_k R1 ─► RoPE ─ R3 ─ Q ──────┤                                 ▲
//!              │          └──► R2ᵀ W_v R1 ─ Q ───────────────┘                                 │
//!              └───────────────────────────────────────────────────────────────────────────────┘
//!          x ──┬─► norm ─ Q ─┬─► W_gate R1 ─► silu ─┐
//!              │             └─► W_up R1 ───────────·─► R4 ─ Q ─► R1ᵀ W_down R4 ─► + ─► x ── … ──► norm ─► R1ᵀ ─► head
//!              └───────────────────────────────────────────────────────────────────┘
//! ```
//!
//! `Q` quantises an activation; every weight shown is quantised too. The layer is [`llama::Block`], the page to read first.
//!
//! ```
//! use spinquant::learn::{LearnOptions, learn};
//! use spinquant::llama::{Llama, LlamaConfig, Weights};
//! use spinquant::optim::{CayleySgd, Mode};
//! use spinquant::rotation::Rotations;
//! use spinquant::{data::Windows, eval::perplexity, quant::Scheme};
//! use std::{ops::ControlFlow::Continue, path::Path};
//!
//! let json = br#"{"architectures": ["LlamaForCausalLM"], "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
//!     "num_attention_heads": 2, "vocab_size": 32, "rms_norm_eps": 1e-5, "hidden_act": "silu"}"#;
//! let config = LlamaConfig::from_json(json, Path::new("config.json"))?;
//! let model = Llama::new(config.clone(), Weights::random(&config, 0)?)?; // or Llama::load(folder, DType::F32, &Device::Cpu)
//! let text = Windows::new((0..320u32).map(|i| i * i % 31).collect::<Vec<_>>(), 16)?;
//!
//! let start = Rotations::random_hadamard(16, 8, 1, 0)?;
//! let options = LearnOptions { scheme: Scheme::new(4, 4, 4), steps: 3, batch: 2, held_out: 4, ..LearnOptions::default() };
//! let learned = learn(&model, &text, start, &mut CayleySgd::new(Mode::Default), &options, |_| Continue(()))?;
//! assert!(learned.orthogonality_error <= 1e-6);
//!
//! let quantized = model.merge(Some(&learned.rotations), &Scheme::new(4, 4, 4))?;
//! println!("perplexity {:.2}", perplexity(&quantized, &text, |_| Continue(()))?.perplexity);
//! # Ok::<(), spinquant::Error>(())
//! ```
//!
//! | to read about | see |
//! |---|---|
//! | one layer, rotated and quantised | [`llama::Block`] |
//! | the tape, and how to write an operation | [`tape`], [`ops`] |
//! | what is quantised, and to which grid | [`quant::Scheme`], [`quant::QuantSpec`] |
//! | rotations and Hadamard matrices | [`rotation`] |
//! | optimisers on the orthogonal group | [`optim`], [`manifold`] |
//! | what learning minimises | [`objective`] |
//! | the learning loop and its checkpoints | [`learn`](mod@learn) |
//! | checks to run on your own operation, quantiser or retraction | [`check`], [`laws`] |
#![warn(missing_docs)]

pub mod check;
pub mod data;
pub mod device;
mod dtype;
mod error;
pub mod eval;
pub mod export;
mod factor;
pub mod io;
#[cfg(feature = "cuda")]
pub mod kernels;
pub mod laws;
pub mod learn;
pub mod llama;
pub mod manifold;
pub mod memory;
pub mod objective;
pub mod ops;
pub mod optim;
pub mod outliers;
pub mod quant;
pub mod rotation;
pub mod tape;
mod tensor;

pub use device::Device;
pub use dtype::{DType, Element};
pub use error::{Error, Result};
pub use tape::{Tape, Var};
pub use tensor::Tensor;
