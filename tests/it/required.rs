//! What a run of the tests promises to have.

use crate::common::need;

/// `SPINQUANT_REQUIRE=gpu,models` says that this run is to include the tests that need a GPU and a model. It fails where they would be
/// left out: without the feature `cuda` there are no tests of the GPU at all, which nothing else would show.
#[test]
fn what_is_required_is_there() {
    let required = std::env::var("SPINQUANT_REQUIRE").unwrap_or_default();
    for what in required.split(',').map(str::trim).filter(|what| !what.is_empty()) {
        match what {
            "gpu" => drop(need::gpu()),
            "models" => drop((need::model(), need::text("test.txt"), need::text("train.txt"))),
            _ => panic!("SPINQUANT_REQUIRE: expected gpu, models or both, got {required:?}"),
        }
        // A runner that starts every test by itself (cargo-nextest) reports what it left out.
        let each_alone = std::env::args().any(|a| a == "--exact");
        let all = std::env::args().any(|a| a == "--include-ignored" || a == "--ignored");
        assert!(
            all || each_alone,
            "SPINQUANT_REQUIRE={required}: add `-- --include-ignored`, or the tests that need it are left out"
        );
    }
}
