//! Where the CUDA toolkit is: part of the build script, and of a test.

use std::env::{join_paths, split_paths};
use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// The toolkit's folder: `CUDA_HOME`, `CUDA_PATH` (empty ones count as unset), that of nvcc on `PATH`, the usual one.
pub fn find(variable: impl Fn(&str) -> Option<OsString>, usual: &Path) -> Result<PathBuf, String> {
    let has_nvcc = |dir: &Path| dir.join("nvcc").exists() || dir.join("nvcc.exe").exists();
    let named = ["CUDA_HOME", "CUDA_PATH"].map(|name| (name, variable(name).filter(|dir| !dir.is_empty())));
    if let Some((name, dir)) = named.into_iter().find_map(|(name, dir)| Some((name, PathBuf::from(dir?)))) {
        return match has_nvcc(&dir.join("bin")) {
            true => Ok(dir),
            false => Err(format!("{name} is {}, but there is no bin/nvcc in it", dir.display())),
        };
    }
    let found = split_paths(&variable("PATH").unwrap_or_default()).find(|dir| has_nvcc(dir));
    match found.as_deref().and_then(Path::parent) {
        Some(dir) => Ok(dir.to_path_buf()),
        None if has_nvcc(&usual.join("bin")) => Ok(usual.to_path_buf()),
        None => Err(
            "nvcc was not found, which `--features cuda` needs. Install a CUDA toolkit (12 or later) and put its bin on PATH, \
                     or set CUDA_HOME to its folder"
                .into(),
        ),
    }
}

/// `PATH` with the toolkit's `bin` first.
pub fn path_with(home: &Path, path: Option<OsString>) -> Result<OsString, String> {
    let path = path.unwrap_or_default();
    join_paths(std::iter::once(home.join("bin")).chain(split_paths(&path)))
        .map_err(|e| format!("the CUDA toolkit's folder {} cannot be put on PATH: {e}; give it another name", home.display()))
}
