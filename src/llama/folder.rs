//! What is in a folder that is no model, in words: people type the wrong thing in the same few ways.

use std::path::{Path, PathBuf};

use crate::hub::Name;
use crate::{Error, Result};

/// Names of a folder's entries, sorted; none where it cannot be read.
fn entries(dir: &Path) -> Vec<String> {
    let names = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let mut names: Vec<String> = names.map(|e| e.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

/// The first entry whose name ends so.
fn ending<'a>(entries: &'a [String], end: &str) -> Option<&'a String> {
    entries.iter().find(|name| name.to_ascii_lowercase().ends_with(end))
}

/// Says why `dir` cannot be the folder of a model, where its `config.json` is not there.
///
/// # Errors
/// [`Error::Format`], unless `config.json` is a file.
pub(super) fn check(dir: &Path) -> Result<()> {
    let config = dir.join("config.json");
    if config.is_file() {
        return Ok(());
    }
    if dir.is_file() {
        let hint = if ending(&[dir.display().to_string()], ".gguf").is_some() { "; GGUF files are not read" } else { "" };
        return Err(Error::format(dir, format!("expected the folder of a model, got a file{hint}")));
    }
    let absent = |hint: String| Err(Error::format(&config, format!("No such file or directory: {hint}")));
    if !dir.exists() {
        let name = dir.to_str().and_then(|text| text.parse::<Name>().ok());
        return absent(match name {
            Some(name) => format!("there is no such folder; spinquant::hub::folder finds {name} on the hub"),
            None => format!("there is no folder {}", dir.display()),
        });
    }
    if dir.join("spinquant.json").exists() {
        let message = "is a quantised model in the native layout, which only eval reads; expected the folder of the model that it was made from";
        return Err(Error::format(dir, message));
    }
    let entries = entries(dir);
    let mut snapshots: Vec<PathBuf> =
        std::fs::read_dir(dir.join("snapshots")).into_iter().flatten().flatten().map(|e| e.path()).collect();
    snapshots.sort();
    if let Some(snapshot) = snapshots.iter().find(|path| path.join("config.json").exists()) {
        return absent(format!("this is the root of a model in the hub's cache; did you mean {}?", snapshot.display()));
    }
    if dir.join("adapter_config.json").exists() {
        return absent("this is a LoRA adapter; expected a whole model, so merge it into its model first".into());
    }
    absent(match ending(&entries, ".gguf") {
        Some(file) => format!("found {file}, and GGUF files are not read; expected the folder that it was made from"),
        None => "expected the folder of a model: config.json, *.safetensors, tokenizer.json".into(),
    })
}

/// What a folder without safetensors holds, and what to do about it.
pub(super) fn instead_of_weights(dir: &Path) -> Option<String> {
    let entries = entries(dir);
    let begins = |start: &str, end: &str| entries.iter().find(|name| name.starts_with(start) && name.ends_with(end));
    if let Some(file) = begins("pytorch_model", ".bin") {
        return Some(format!(
            "found {file}: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(OTHER, safe_serialization=True) in transformers writes safetensors"
        ));
    }
    if let Some(file) = begins("consolidated.", "") {
        return Some(format!("found {file}, the original layout of LLaMA; expected the layout of transformers"));
    }
    if begins("adapter_model.", "").is_some() {
        return Some("found a LoRA adapter: merge it into its model first".into());
    }
    if let Some(file) = ending(&entries, ".gguf") {
        return Some(format!("found {file}, and GGUF files are not read; expected the folder that it was made from"));
    }
    let file = ending(&entries, ".safetensors")?;
    Some(format!("found {file}, which the index would name; download the index as well"))
}
