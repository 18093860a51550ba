//! `compare --baselines`: rows of other methods, and what every row took.

use super::*;

fn compare(rest: &str) -> String {
    let texts = "--calibration text.txt --text text.txt";
    format!("compare {MODEL} {texts} --seeds 1 --steps 2 --batch 4 --max-windows 4 --held-out 4 {rest}")
}

#[test]
fn rows_of_other_methods_say_what_they_took() {
    let place = Place::new();
    let table = place.json(&compare(
        "--baselines --qat-windows 5 --qat-lr 1e-3 --clip error --clip-windows 3 --gptq --calibration-windows 6 --json",
    ));
    let rows = table["rows"].as_array().unwrap();
    let names: Vec<&str> = rows.iter().map(|r| r["name"].as_str().unwrap()).collect();
    let first = ["full precision", "full precision, rotated", "full precision, adapted", "rtn", "smoothquant", "llm-qat"];
    assert_eq!(names[..6], first);
    assert_eq!(
        names[6..],
        [
            "hadamard mean",
            "hadamard best",
            "hadamard worst",
            "gptq",
            "hadamard + gptq mean",
            "hadamard + clip mean",
            "learned",
            "learned + clip",
            "learned + clip at W16",
            "learned + clip + gptq"
        ]
    );
    let seq = table["rows"][2]["training"]["tokens"].as_u64().unwrap() / 8; // 2 steps of 4 windows
    assert!(seq > 1);
    let want: [(u64, u64); 16] = [
        (0, 0),
        (0, 0),
        (8, 2),
        (0, 0),
        (12 * 3, 0),
        (8, 2),
        (0, 0),
        (0, 0),
        (0, 0),
        (6, 0),
        (6, 0),
        (3, 0),
        (8, 2),
        (8 + 3, 2),
        (8 + 3, 2),
        (8 + 3 + 6, 2),
    ];
    for (row, (windows, steps)) in rows.iter().zip(want) {
        let training = &row["training"];
        assert_eq!((training["tokens"].as_u64(), training["steps"].as_u64()), (Some(windows * seq), Some(steps)), "{row}");
        assert_eq!(number(training, "seconds") > 0.0, windows > 0, "{row}");
        assert!(number(row, "perplexity") > 1.0 && row["fidelity"]["kl"]["mean"].is_number(), "{row}");
    }
    assert!(rows[4]["rotations"].as_str().unwrap().starts_with("none, scales with α = 0."), "{}", rows[4]);
    assert_eq!((rows[5]["weights"].as_str(), rows[2]["scheme"].as_str()), (Some("qat"), rows[0]["scheme"].as_str()));

    let out = place.run(&compare("--baselines --learn-seeds 0 --objective whip"));
    let text = String::from_utf8(out.stdout).unwrap();
    assert!(out.status.success() && text.contains("tokens read") && text.contains("llm-qat"), "{text}");
    let notes = String::from_utf8(out.stderr).unwrap();
    assert!(!text.contains("adapted") && notes.contains("no row of adapted gains: whip"), "{text}{notes}");
}

#[test]
fn numbers_that_cannot_be_are_refused() {
    let place = Place::new();
    place.fails(&compare("--baselines --qat-windows 3"), &["--qat-windows: expected at least --batch, 4, got 3"]);
    place.fails(&compare("--baselines --qat-lr 0"), &["--qat-lr: expected a finite number above 0, got 0"]);
    place.fails(&compare("--qat-lr 1e-5"), &["required arguments were not provided"]);
}
