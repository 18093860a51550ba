//! Quantised models and rotations as files: what is written comes back, what is damaged or hostile is refused.

mod compressed;
mod engines;
mod folders;
mod hugging_face;
mod native;
mod planting;
mod torch;

use std::collections::BTreeMap;
use std::io::{Cursor, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use serde_json::Value;
use spinquant::calibrate::{Calibration, LayerReport, quantize_layers};
use spinquant::data::Windows;
use spinquant::export::{
    self, Format, Output, Provenance, RECORD, Stored, Writer, load_native, write_hf, write_quantized, write_rtn,
};
use spinquant::grid::Quantized;
use spinquant::llama::{Compressed, Linear, Llama, LlamaConfig, Merged, Rotated, Source};
use spinquant::ops::randn;
use spinquant::quant::{Clip, Correction, Gptq, Online, R4, Scheme, WeightQuantizer};
use spinquant::rotation::Rotations;
use spinquant::{DType, Device, Error, Result, Tensor, io};
use zip::CompressionMethod::Stored as StoredEntry;
use zip::write::SimpleFileOptions;

use crate::common::need::cases;
use crate::common::{same_weights, tiny};

/// The message of a failure, which must contain every part.
fn fails<T>(result: Result<T>, parts: &[&str]) {
    let message = result.err().expect("a failure").to_string();
    assert!(parts.iter().all(|p| message.contains(p)), "{message:?} lacks one of {parts:?}");
}

fn bits(r: &Rotations) -> (DType, Vec<u64>, Vec<usize>) {
    let values = [&r.r1, &r.r2].map(|t| t.to_f64_vec().unwrap()).concat();
    (r.r1.dtype(), values.iter().map(|x| x.to_bits()).collect(), r.r2.shape().to_vec())
}

/// A place for an output, and a random `f32` model, which came from files beside it.
fn beside_a_model(config: &LlamaConfig) -> (tempfile::TempDir, PathBuf, Llama) {
    let dir = tempfile::tempdir().unwrap();
    let (source, out) = (dir.path().join("source"), dir.path().join("out"));
    tiny::write(&source, config, DType::F32, 9, true);
    let model = Llama::load(&source, DType::F32, &Device::Cpu).unwrap();
    (dir, out, model)
}

fn distance(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).fold(0.0, |m, (a, b)| if (a - b).is_nan() || m.is_nan() { f64::NAN } else { f64::max(m, (a - b).abs()) })
}

const PLAIN: Scheme = Scheme { online: Online::NONE, ..Scheme::FULL_PRECISION };
