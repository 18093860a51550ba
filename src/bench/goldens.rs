//! Whether the crate computes what the published code does on this device, on models so small that it takes a second.

use std::path::Path;
use std::sync::Arc;

use safetensors::SafeTensors;
use serde_json::Value;

use crate::data::targets;
use crate::llama::{Llama, Recompute, RotationVars};
use crate::quant::{Clip, Scheme};
use crate::rotation::Rotations;
use crate::{DType, Device, Error, Result, Tape, Tensor};

/// How far the worst mode of any model is from the published code.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Agreement {
    /// The largest relative error of a loss.
    pub loss: f64,
    /// The smallest cosine between our gradient by R1 and theirs.
    pub cosine: f64,
}

/// The loss and dR1 of every mode of the small models against the published code's, in `f32` on a device. The models are those of
/// `folder`, by default those that are part of the crate.
///
/// # Errors
/// [`Error::Numeric`]: a loss off by more than 1e-2 or a cosine below 0.999; then nothing on this device is worth timing.
/// [`Error::Io`] and [`Error::Format`]: no goldens there. Those of the network.
pub fn check(folder: Option<&Path>, device: &Device) -> Result<Agreement> {
    match folder {
        Some(folder) => of_folder(folder, device),
        None => of_folder(embedded()?.path(), device),
    }
}

macro_rules! golden_files {
    ($($model:literal),*) => {
        [$(($model, [
            ("config.json", include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/", $model, "/config.json")) as &[u8]),
            ("model.safetensors", include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/", $model, "/model.safetensors"))),
            ("golden.safetensors", include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/", $model, "/golden.safetensors"))),
        ])),*]
    };
}

/// A file's name and bytes.
type File = (&'static str, &'static [u8]);

/// The small models and what the published code makes of them: files that are part of the crate.
const GOLDENS: [(&str, [File; 3]); 3] = golden_files!("llama_gqa", "llama_had28", "llama_had40");

/// [`GOLDENS`] in a temporary folder.
fn embedded() -> Result<tempfile::TempDir> {
    let folder = tempfile::tempdir().map_err(Error::io(&std::env::temp_dir()))?;
    for (model, files) in GOLDENS {
        let dir = folder.path().join(model);
        std::fs::create_dir(&dir).map_err(Error::io(&dir))?;
        for (name, bytes) in files {
            let path = dir.join(name);
            std::fs::write(&path, bytes).map_err(Error::io(&path))?;
        }
    }
    Ok(folder)
}

fn of_folder(folder: &Path, device: &Device) -> Result<Agreement> {
    let mut worst = Agreement { loss: 0.0, cosine: 1.0 };
    for (name, _) in GOLDENS {
        let dir = folder.join(name);
        let path = dir.join("golden.safetensors");
        if !path.exists() {
            let message = "expected the small models of the golden tests here";
            return Err(Error::format(&path, message));
        }
        let bytes = std::fs::read(&path).map_err(Error::io(&path))?;
        let bad = |e: String| Error::format(&path, e);
        let (_, header) = SafeTensors::read_metadata(&bytes).map_err(|e| bad(e.to_string()))?;
        let cases =
            header.metadata().as_ref().and_then(|m| m.get("cases")).ok_or_else(|| bad("no cases in its metadata".into()))?;
        let cases: Value = serde_json::from_str(cases).map_err(|e| bad(e.to_string()))?;
        let file = SafeTensors::deserialize(&bytes).map_err(|e| bad(e.to_string()))?;
        let get = |name: &str| -> Result<Tensor> {
            let view = file.tensor(name).map_err(|e| bad(format!("{name}: {e}")))?;
            let data = view.data();
            let values: Vec<f64> = match view.dtype() {
                safetensors::Dtype::F64 => data.as_chunks().0.iter().map(|b| f64::from_le_bytes(*b)).collect(),
                safetensors::Dtype::I64 => data.as_chunks().0.iter().map(|b| i64::from_le_bytes(*b) as f64).collect(),
                safetensors::Dtype::I32 => data.as_chunks().0.iter().map(|b| f64::from(i32::from_le_bytes(*b))).collect(),
                other => return Err(bad(format!("{name}: expected F64, I64 or I32, got {other}"))),
            };
            Tensor::from_vec(values, view.shape())
        };
        let model = Llama::load(&dir, DType::F32, device)?;
        let rotations = Rotations::new(get("R1")?, get("R2")?).to_dtype(DType::F32)?.to_device(device)?;
        let seq = get("tokens")?.cols();
        let tokens: Vec<u32> = get("tokens")?.to_f64_vec()?.iter().map(|t| *t as u32).collect();
        for mode in cases["modes"].as_array().into_iter().flatten() {
            let id = mode["name"].as_str().unwrap_or_default();
            let tape = Tape::new();
            let vars = RotationVars::variables(&tape, &rotations)?;
            let run = Arc::new(model.run(&scheme(mode)?, seq)?);
            let logits = model.logits(&vars, &tokens, run, Recompute::All)?;
            let loss = logits.cross_entropy(targets(&tokens, seq).into())?;
            let error = (loss.value().item()? / get(&format!("{id}.loss"))?.item()? - 1.0).abs();
            let ours = vars.gradients(&mut tape.backward(loss)?)?.swap_remove(0).to_f64_vec()?;
            let theirs = get(&format!("{id}.dR1"))?.to_f64_vec()?;
            let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
            let cosine = dot(&ours, &theirs) / (dot(&ours, &ours) * dot(&theirs, &theirs)).sqrt();
            // A value next to a tie may fall the other way in f32, which moves the loss of these tiny networks by up to 0.2 %; what
            // is looked for here is a kernel that computes something else.
            if error.is_nan() || error > 1e-2 || cosine.is_nan() || cosine < 0.999 {
                return Err(Error::numeric(
                    format!("golden {name} {id}"),
                    format!("loss off by {error:.1e}, cosine of dR1 {cosine}"),
                ));
            }
            worst = Agreement { loss: worst.loss.max(error), cosine: worst.cosine.min(cosine) };
        }
    }
    Ok(worst)
}

/// The scheme of one mode of a golden file, an entry of the `modes` of its metadata.
///
/// # Errors
/// A field that is missing or of another kind.
pub fn scheme(mode: &Value) -> Result<Scheme> {
    let bad = |field: &str, kind| Error::argument("mode of a golden", format!("expected {kind} in {field}, got {mode}"));
    let bits = |field: &str| {
        mode[field].as_u64().and_then(|bits| u32::try_from(bits).ok()).ok_or_else(|| bad(field, "a number of bits"))
    };
    let flag = |field: &str| mode[field].as_bool().ok_or_else(|| bad(field, "true or false"));
    Ok(Scheme {
        weight_bits: bits("w_bits")?,
        activation_bits: bits("a_bits")?,
        key_bits: bits("k_bits")?,
        value_bits: bits("v_bits")?,
        symmetric_weights: flag("symmetric_weights")?,
        symmetric_activations: flag("symmetric_activations")?,
        weight_clip: if flag("weight_clip_search")? { Clip::Search } else { Clip::Ratio(1.0) },
        ..Scheme::FULL_PRECISION
    })
}
