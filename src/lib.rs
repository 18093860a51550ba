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
//! use spinquant::optim::{CayleySgd, Mode};
//! use spinquant::rotation::Rotations;
//! use spinquant::{demo, eval::perplexity, quant::Scheme};
//! use std::ops::ControlFlow::Continue;
//!
//! let (model, scheme) = (demo::model()?, Scheme::new(4, 4, 4)); // or Llama::load(folder, DType::F32, &Device::Cpu)
//! let (text, test) = (demo::windows(demo::CALIBRATION, 64)?, demo::windows(&demo::TEST[..20_000], 64)?);
//! let score = |r: Option<&Rotations>, scheme| Ok(perplexity(&model.merge(r, scheme)?, &test, |_| Continue(()))?.perplexity);
//!
//! let c = &model.config;
//! let start = Rotations::random_hadamard(c.hidden_size, c.head_dim, c.layers, 0)?;
//! let options = LearnOptions { scheme, steps: 10, ..LearnOptions::default() };
//! let learned = learn(&model, &text, start.clone(), &mut CayleySgd::new(Mode::Default), &options, |step| {
//!     println!("step {}: loss {:.3}", step.step, step.loss);
//!     Continue(())
//! })?;
//!
//! let (plain, hadamard) = (score(None, &scheme)?, score(Some(&start), &scheme)?);
//! let learned = score(Some(&learned.rotations), &learned.settings.scheme)?; // with the clip ratios that were learned with
//! println!("W4A4KV4 perplexity: {plain:.2} without rotations, {hadamard:.2} with Hadamards, {learned:.2} learned");
//! assert!(learned < hadamard && hadamard < plain);
//! # Ok::<(), spinquant::Error>(())
//! ```
//!
//! The API has three tiers.
//!
//! **Use it**: load a model, learn rotations, quantise, score, export.
//!
//! | to read about | see |
//! |---|---|
//! | models: from files, by name on the Hugging Face hub, embedded in the crate | [`llama`], [`hub`](mod@hub), [`demo`] |
//! | text as windows of tokens | [`data`] |
//! | rotations, their kinds and files | [`rotation`] |
//! | the learning loop, its checkpoints, the memory that it plans | [`learn`](mod@learn), [`memory`] |
//! | what is quantised; clip ratios and weights found on calibration text | [`quant::Scheme`], [`calibrate`] |
//! | perplexity and multiple choice; scores over HTTP for an evaluation harness | [`eval`]; `serve`, with the feature of that name |
//! | quantised models as files | [`export`] |
//! | the paper's table on one model; optimisers and objectives against one another | [`compare`], [`race`] |
//! | what quantisers are given, before and after rotation | [`inspect`] |
//!
//! **Extend it**: [`extending`] says how to add each of these, inside the crate or outside.
//!
//! | to read about | see |
//! |---|---|
//! | one layer, rotated and quantised | [`llama::Block`] |
//! | the tape, operations | [`tape::Op`], [`ops`] |
//! | optimisers on the orthogonal group, retractions | [`optim::Optimizer`], [`manifold`] |
//! | what learning minimises | [`objective::Objective`] |
//! | weight quantisers, grids | [`quant::WeightQuantizer`], [`grid`] |
//! | linear algebra in batches, Hadamard matrices | [`linalg`], [`hadamard`](mod@hadamard) |
//! | kernels without the tape, on memory of cudarc | `kernels`, with the feature `cuda` |
//! | the same from C, Python and others | `cuda/spinquant.h`, with the feature `capi` |
//!
//! **Check it**: what this crate's own tests and benches use, for whatever you add.
//!
//! | to read about | see |
//! |---|---|
//! | gradients against differences | [`check`] |
//! | laws of rotations, retractions, optimisers and quantisers | [`laws`] |
//! | worked cases of every operation, exact references | [`ops::cases`], [`ops::exact`] |
//! | cases, checked and timed; where the time of learning goes and how it grows | [`bench`](mod@bench) |
//! | models with planted outliers | [`outliers`] |
#![warn(missing_docs)]

pub mod baselines;
pub mod bench;
pub mod calibrate;
#[cfg(feature = "chat")]
pub mod chat;
pub mod check;
pub mod compare;
pub mod compressed_tensors;
pub mod data;
pub mod demo;
pub mod device;
mod dtype;
mod error;
pub mod eval;
pub mod export;
#[doc = include_str!("../docs/extending.md")]
pub mod extending {}
#[cfg(feature = "capi")]
mod capi;
pub mod generate;
pub mod grid;
pub mod hadamard;
pub mod hub;
pub mod inspect;
pub mod io;
#[cfg(feature = "cuda")]
pub mod kernels;
pub mod laws;
pub mod learn;
pub mod linalg;
pub mod llama;
pub mod manifold;
pub mod memory;
pub mod objective;
pub mod ops;
pub mod optim;
pub mod outliers;
#[cfg(feature = "cli")]
pub mod plot;
pub mod profile;
pub mod quant;
pub mod race;
mod random;
pub mod ranks;
pub mod rotation;
#[cfg(feature = "serve")]
pub mod serve;
pub mod tape;
mod tensor;

pub use device::Device;
pub use dtype::{DType, Element};
pub use error::{Error, Result};
pub use tape::{Tape, Var};
pub use tensor::Tensor;
