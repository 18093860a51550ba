//! `spinquant bench`: its object, comparisons with an earlier run, sizes that no machine has.

use std::collections::HashSet;

use super::*;

const SMALL: &str = "bench --device cpu --kernel add --n 32 --rows 4";

fn bench(words: &str) -> Output {
    let words: Vec<_> = words.split_whitespace().collect();
    Command::new(env!("CARGO_BIN_EXE_spinquant")).args(words).stdin(Stdio::null()).output().unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn a_run_is_compared_with_an_earlier_one() {
    let place = tempfile::tempdir().unwrap();
    let file = place.path().join("record.json");
    let first = bench(&format!("{SMALL} --json"));
    assert!(first.status.success(), "{}", stderr(&first));
    let mut record: Value = serde_json::from_slice(&first.stdout).unwrap();
    let row = &record["rows"][0];
    assert_eq!((&row["kernel"], &row["n"], &row["rows"], &row["dtype"]), (&json!("add"), &json!(32), &json!(4), &json!("f32")));
    assert!(row["ms"].as_f64().unwrap() > 0.0 && row["of_baseline"].is_null() && row["error"].is_null());
    // As slow as nothing is, and as fast as nothing is.
    for (ms, slower) in [(1e9, false), (1e-9, true)] {
        record["rows"][0]["ms"] = json!(ms);
        std::fs::write(&file, record.to_string()).unwrap();
        let compared = bench(&format!("{SMALL} --json --baseline {}", file.display()));
        assert!(compared.status.success(), "{}", stderr(&compared));
        let again: Value = serde_json::from_slice(&compared.stdout).unwrap();
        let (now, ratio) = (again["rows"][0]["ms"].as_f64().unwrap(), again["rows"][0]["of_baseline"].as_f64().unwrap());
        assert!((ratio - now / ms).abs() <= 1e-9 * ratio);
        let judged = bench(&format!("{SMALL} --baseline {} --fail-above 50", file.display()));
        assert_eq!(judged.status.code(), Some(i32::from(slower)), "{}", stderr(&judged));
        assert_eq!(stderr(&judged).contains("add 4 x 32 f32"), slower, "{}", stderr(&judged));
    }
    std::fs::write(&file, "{\"rows\": 3}").unwrap();
    let e = stderr(&bench(&format!("{SMALL} --baseline {}", file.display())));
    assert!(e.contains("record.json") && !e.contains("measured by"), "a bad file is found before the work: {e}");
}

/// The fields of the object are those that the records' README names.
#[test]
fn the_object_is_as_documented() {
    let readme = include_str!("../../../benches/record/README.md");
    let output = bench(&format!("{SMALL} --json"));
    let record: Value = serde_json::from_slice(&output.stdout).unwrap();
    let keys = |v: &Value| v.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
    let of_row = keys(&record["rows"][0]);
    for key in keys(&record).iter().chain(&of_row) {
        assert!(readme.contains(&format!("`{key}`")), "{key} is not documented");
    }
    let row =
        "kernel n rows dtype ms p10_ms p90_ms cold_ms gb_per_s of_copy tflop_per_s sm_mhz ran measured_by of_baseline error";
    assert_eq!(of_row.iter().map(String::as_str).collect::<HashSet<_>>(), row.split(' ').collect());
    assert_eq!(
        keys(&record).iter().map(String::as_str).collect::<HashSet<_>>(),
        ["device", "seconds", "rows", "peak_bytes"].into()
    );
}

#[test]
fn absurd_sizes_are_refused() {
    let huge = u64::MAX;
    for (kernel, size) in [
        ("hadamard", format!("--n {huge}")),
        ("add", format!("--rows {huge}")),
        ("attention", format!("--n {huge} --rows {huge}")),
        ("attention", "--n 20000".into()),
        ("gemm", "--n 1099511627776".into()),
        ("cayley", "--n 4294967296".into()),
        ("gptq-layer", format!("--n {huge}")),
        ("embedding", format!("--rows {huge}")),
    ] {
        let output = bench(&format!("bench --device cpu --kernel {kernel} {size}"));
        let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), stderr(&output));
        assert_eq!(output.status.code(), Some(1), "{kernel} {size}: {text}");
        assert!(text.contains("memory") || text.contains("expected at most"), "{kernel} {size}: {text}");
        assert!(!text.contains("panicked"), "{kernel} {size}: {text}");
    }
    for bad in
        ["--seconds 18446744073709551615", "--n 0 --rows 4", "--rows 0", "--fail-above 5", "--dtype f64", "--kernel hadamad"]
    {
        let output = bench(&format!("bench --device cpu --kernel add {bad}"));
        assert!(matches!(output.status.code(), Some(1 | 2)), "{bad}: {}", stderr(&output));
        assert!(!stderr(&output).contains("panicked"), "{bad}: {}", stderr(&output));
    }
}
