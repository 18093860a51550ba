//! What some tests need and a machine may lack: a GPU, a model, texts. A test that calls one of these is marked
//! `#[ignore = "needs …"]`. Asked to run all the same, it fails where the thing is missing: it never passes by doing nothing.

use std::path::PathBuf;

use proptest::test_runner::{Config, RngSeed};
use spinquant::Device;

/// The seed of every property test, unless `PROPTEST_RNG_SEED` gives another.
const SEED: u64 = 20_241_127;

/// `count` cases a property from a fixed seed, which a failing test shows. `PROPTEST_RNG_SEED` and `PROPTEST_CASES` override both.
pub fn cases(count: u32) -> Config {
    let given = |name: &str| {
        std::env::var(name).ok().map(|text| text.parse::<u64>().unwrap_or_else(|e| panic!("{name}: a number, not {text:?}: {e}")))
    };
    let seed = given("PROPTEST_RNG_SEED").unwrap_or(SEED);
    let cases = given("PROPTEST_CASES").map_or(count, |n| n.try_into().expect("PROPTEST_CASES: at most 2^32 − 1"));
    println!("{cases} cases from PROPTEST_RNG_SEED={seed}");
    Config { cases, rng_seed: RngSeed::Fixed(seed), failure_persistence: None, ..Config::default() }
}

/// The first GPU.
#[track_caller]
pub fn gpu() -> Device {
    Device::cuda(0).unwrap_or_else(|e| panic!("this test needs a GPU: {e}"))
}

/// The Hugging Face folder that `SPINQUANT_MODEL` names.
#[track_caller]
pub fn model() -> PathBuf {
    folder("SPINQUANT_MODEL", "config.json")
}

/// A file of the folder that `SPINQUANT_TEXTS` names, which holds WikiText-2 as `train.txt` and `test.txt`.
#[track_caller]
pub fn text(name: &str) -> String {
    spinquant::data::read_text(folder("SPINQUANT_TEXTS", name).join(name)).unwrap()
}

/// The folder that an environment variable names; `file` must be in it.
#[track_caller]
pub fn folder(variable: &str, file: &str) -> PathBuf {
    let Some(folder) = std::env::var_os(variable).map(PathBuf::from) else {
        panic!("this test needs {variable}, a folder with {file}");
    };
    assert!(folder.join(file).is_file(), "{variable}: no {file} in {}", folder.display());
    folder
}
