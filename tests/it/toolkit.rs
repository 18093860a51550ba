//! The build script's search for the CUDA toolkit.

#[path = "../../build/toolkit.rs"]
mod search;

use std::collections::BTreeMap;
use std::path::Path;

use search::{find, path_with};

#[test]
fn toolkits_are_found_by_name_then_on_path() {
    let place = tempfile::tempdir().unwrap();
    for name in ["a", "b"] {
        std::fs::create_dir_all(place.path().join(name).join("bin")).unwrap();
        std::fs::write(place.path().join(name).join("bin/nvcc"), "").unwrap();
    }
    let dir = |name: &str| place.path().join(name).display().to_string();
    let look = |variables: &[(&str, String)], usual: &str| {
        let variables: BTreeMap<_, _> = variables.iter().cloned().collect();
        find(|name| variables.get(name).map(Into::into), &place.path().join(usual))
    };
    let path = ("PATH", format!("/nowhere:{}", dir("b/bin")));
    assert_eq!(look(&[("CUDA_HOME", dir("a")), path.clone()], "none").unwrap(), place.path().join("a"));
    assert_eq!(look(&[("CUDA_PATH", dir("a")), path.clone()], "none").unwrap(), place.path().join("a"));
    // Empty is unset.
    assert_eq!(look(&[("CUDA_HOME", "".into()), path.clone()], "none").unwrap(), place.path().join("b"));
    assert_eq!(look(&[("CUDA_HOME", "".into()), ("CUDA_PATH", dir("a"))], "none").unwrap(), place.path().join("a"));
    assert_eq!(look(&[], "a").unwrap(), place.path().join("a"));
    let message = look(&[("CUDA_HOME", dir("absent")), path], "a").unwrap_err();
    assert!(message.starts_with("CUDA_HOME is ") && message.contains("no bin/nvcc in it"), "{message}");
    assert!(look(&[], "none").unwrap_err().contains("nvcc was not found"));
}

#[test]
fn a_toolkit_that_path_cannot_hold_is_refused() {
    assert_eq!(path_with(Path::new("/cuda"), Some("/usr/bin:/bin".into())).unwrap(), "/cuda/bin:/usr/bin:/bin");
    assert_eq!(path_with(Path::new("/cuda 13"), None).unwrap(), "/cuda 13/bin:");
    let message = path_with(Path::new("/cuda:13"), Some("/bin".into())).unwrap_err();
    assert!(message.contains("/cuda:13 cannot be put on PATH"), "{message}");
}
