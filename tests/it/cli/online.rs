//! `--online`: which Hadamards run, R4 in blocks, and what a rotation file was made for.

use super::*;

#[test]
fn blocks_travel_with_the_rotations() {
    let place = Place::new();
    let note = |file: &str, name: &str| Rotations::load_with(&place.path(file)).unwrap().1.get(name).cloned();
    let said = |args: &str| {
        let out = place.run(args);
        let (stdout, stderr) = (String::from_utf8(out.stdout).unwrap(), String::from_utf8(out.stderr).unwrap());
        assert!(out.status.success(), "{args}: {stderr}");
        (stdout, stderr)
    };
    let learn = |rest: &str| {
        let learn = LEARN.strip_suffix(" --out R.safetensors").unwrap();
        let out = if rest.contains("--out") { "" } else { " --out R.safetensors" };
        said(&format!("{learn} --steps 2{out} {rest}")).1
    };
    learn("--online r3,r4=block:8");
    assert_eq!(note("R.safetensors", "online").as_deref(), Some("r3,r4=block:8"));
    assert_eq!(note("R.safetensors", "r3").as_deref(), Some("8, Sylvester"));
    assert_eq!(note("R.safetensors", "r4").as_deref(), Some("7 blocks of 8, Sylvester"));

    // Unless told otherwise, what runs is what they were made for.
    let eval = format!("{EVAL} --rotations R.safetensors --json");
    let score = |rest: &str| number(&place.json(&format!("{eval} {rest}")), "perplexity");
    assert_eq!(score(""), score("--online r3,r4=block:8"));
    assert_ne!(score(""), score("--online r3,r4"));
    let (_, err) = said(&eval);
    assert!(err.contains("note: the online Hadamards are r3,r4=block:8, as R.safetensors was made for"), "{err}");
    let (_, err) = said(&format!("{eval} --online r4"));
    assert!(err.contains("note: R.safetensors was made for the online Hadamards r3,r4=block:8, and r4 run"), "{err}");

    // So they are gone on from, and searched clip ratios for.
    learn("--start R.safetensors --out again.safetensors");
    assert_eq!(note("again.safetensors", "r4").as_deref(), Some("7 blocks of 8, Sylvester"));
    said(&format!("clip {MODEL} --text text.txt --rotations R.safetensors --windows 2 --out clipped.safetensors"));
    assert_eq!(note("clipped.safetensors", "online").as_deref(), Some("r3,r4=block:8"));
    said(&format!("clip {MODEL} --text text.txt --rotations hadamard --online r3 --windows 2 --out clipped.safetensors"));
    assert_eq!((note("clipped.safetensors", "online").as_deref(), note("clipped.safetensors", "r4")), (Some("r3"), None));

    // And written, and scored as written.
    said("quantize --model model --device cpu --rotations R.safetensors --out q");
    let record: Value = serde_json::from_slice(&place.read("q/spinquant.json")).unwrap();
    assert_eq!(record["scheme"]["online"], json!({"r3": true, "r4": "block:8"}));
    assert_eq!((&record["hadamard"]["r4"]["blocks"], &record["hadamard"]["r4"]["k"]), (&7.into(), &1.into()));
    let written = format!("{} --json", EVAL.replace("--model model", "--model q"));
    assert_eq!(number(&place.json(&written), "perplexity"), score(""));
    place.fails(&format!("{written} --online r3,r4"), &["q was written with r3,r4=block:8", "got r3,r4"]);

    // A Hugging Face folder has none of it.
    let hf = "quantize --model model --device cpu --scheme W4A16 --format hf --rotations R.safetensors --out hf";
    place.fails(hf, &["expected no online rotations", "r3,r4=block:8"]);

    // An R.bin has no place for it.
    let err = learn("--online none --recipe published --out R.bin");
    assert!(err.contains("R.bin") && err.contains("--online none"), "{err}");
}

#[test]
fn blocks_leave_full_precision_alone() {
    let place = Place::new();
    let perplexity = |rest: &str| number(&place.json(&format!("{EVAL} --scheme W16A16 --json {rest}")), "perplexity");
    let plain = perplexity("");
    for online in ["r4=block:1", "r3,r4=block:2", "r4=block:4", "r4=block:28", "r4=whole", "r4=none"] {
        let rotated = perplexity(&format!("--rotations hadamard:3 --online {online}"));
        assert!((rotated / plain - 1.0).abs() <= 1e-5, "{online}: {rotated}, not {plain}");
    }
    let quantized = |online: &str| {
        let eval = format!("{EVAL} --scheme W16A4 --json --rotations hadamard:3 --online {online}");
        number(&place.json(&eval), "perplexity")
    };
    assert_eq!(quantized("r4=whole"), quantized("r4"));
    assert_eq!(quantized("r4=none,r3"), quantized("r3"));
    assert_ne!(quantized("r4=block:8"), quantized("r4"));
}

#[test]
fn blocks_that_do_not_fit_are_refused_first() {
    let place = Place::new();
    for (online, parts) in [
        ("r4=block:16", ["expected a divisor of 56", "got 16"]),
        ("r4=block:14", ["expected a power of two", "got 14"]),
        ("r4=block", ["r4=block:N", "got \"r4=block\""]),
    ] {
        // Before a text that is not there is looked for.
        place.fails(&format!("eval {MODEL} --text nowhere.txt --rotations hadamard --online {online}"), &parts);
        place.fails(&format!("{LEARN} --text nowhere.txt --online {online}").replace("--text text.txt ", ""), &parts);
    }
    let compare = format!("compare {MODEL} --calibration text.txt --text nowhere.txt --learn-online r4=block:16");
    place.fails(&compare, &["expected a divisor of 56", "got 16"]);
    // Rotations of another network.
    let rotations = Rotations::random_hadamard(24, 8, 2, 0).unwrap();
    let notes = [("online", "r4=block:16"), ("r4", "3 blocks of 16, Sylvester")].map(|(a, b)| (a.to_string(), b.to_string()));
    rotations.save_with(&place.path("R.safetensors"), &notes.into()).unwrap();
    place.fails(&format!("{EVAL} --rotations R.safetensors"), &["R.safetensors", "divisor of 56", "got 16"]);
}
