//! The files that a command will write, checked before it loads anything.

use std::fs::OpenOptions;
use std::path::{Path, PathBuf};

use spinquant::io::{check_writable, follow};
use spinquant::{Error, Result};

/// Fails where one of these files cannot be written, is an input, or is named twice. Each comes with the argument that names it.
pub fn check(outputs: &[(&str, &Path)], model: Option<&Path>, inputs: &[(&str, &Path)]) -> Result<()> {
    for (i, (what, path)) in outputs.iter().enumerate() {
        check_writable(path)?;
        check_apart(what, path, &outputs[..i], model, inputs)?;
    }
    Ok(())
}

/// Fails where a file cannot be appended to, or is an input.
pub fn check_log(what: &str, path: &Path, model: Option<&Path>, inputs: &[(&str, &Path)]) -> Result<()> {
    if path.is_file() {
        OpenOptions::new().append(true).open(path).map_err(Error::io(path))?;
    } else {
        check_writable(path)?;
    }
    check_apart(what, path, &[], model, inputs)
}

fn check_apart(what: &str, path: &Path, others: &[(&str, &Path)], model: Option<&Path>, inputs: &[(&str, &Path)]) -> Result<()> {
    let real = real(path);
    if let Some((other, _)) = others.iter().chain(inputs).find(|(_, p)| self::real(p) == real) {
        return Err(Error::argument(what, format!("{} is the file of {other}; expected another", path.display())));
    }
    let name = real.file_name().and_then(|n| n.to_str()).unwrap_or_default();
    let read = ["config.json", "tokenizer.json"].contains(&name) || name.starts_with("model");
    if let Some(model) = model
        && read
        && real.parent().is_some_and(|folder| folder == self::real(model))
    {
        return Err(Error::argument(what, format!("{} is a file of the model; expected another", path.display())));
    }
    Ok(())
}

/// One name for every way to a file, whether it is there or not.
fn real(path: &Path) -> PathBuf {
    let path = follow(path).unwrap_or_else(|_| path.to_path_buf());
    path.canonicalize().unwrap_or_else(|_| {
        let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        folder.canonicalize().unwrap_or_else(|_| folder.to_path_buf()).join(path.file_name().unwrap_or_default())
    })
}
