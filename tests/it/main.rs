//! Tests that need nothing but this repository, by subject.

mod architecture;
mod baselines;
mod bench;
mod bias;
#[cfg(feature = "capi")]
mod capi;
#[cfg(feature = "cli")]
mod cli;
mod clip;
#[path = "../common/mod.rs"]
mod common;
#[cfg(feature = "cli")]
mod demo;
mod export;
mod families;
mod formats;
mod gptq;
mod gradients;
mod hadamard;
#[cfg(feature = "cuda")]
mod hadamard_choice;
mod limits;
mod loading;
mod misuse;
mod model;
mod networks;
mod objectives;
mod odd_models;
mod parity;
mod properties;
mod readme;
mod reconstruct;
mod required;
mod robustness;
mod scale;
#[cfg(feature = "serve")]
mod serve;
mod streaming;
mod supply;
mod synthetic;
#[cfg(unix)]
mod toolkit;
