//! Clip ratios of weights learned with the rotations, from the command line.

use spinquant::quant::{ClipRatios, Site};
use spinquant::rotation::ClipEnds;

use super::*;

#[test]
fn clip_ratios_of_weights_are_learned_written_read_and_scored() {
    let place = Place::new();
    let learn = format!("{LEARN} --recipe published --steps 4 --lr 0.5 --json");
    place.json(&format!("{learn} --weight-clip learned --weight-clip-lr 0.05"));
    let (rotations, notes) = Rotations::load_with(&place.path("R.safetensors")).unwrap();
    assert_eq!((notes["weight_clips"].as_str(), notes["format_version"].as_str()), ("learned", "4"));
    let text = String::from_utf8(place.run("rotations check R.safetensors").stdout).unwrap();
    assert!(text.contains("weight clips down") && text.contains("[2, 24, 2]"), "{text}");

    // They count for their grid, unless weights are not to be clipped; another grid is an error, weights of 16 bits have none.
    let perplexity = |args: &str| number(&place.json(&format!("{EVAL} --json {args}")), "perplexity");
    rotations.clone().with_weight_clips(None).save(&place.path("plain.safetensors")).unwrap();
    let apart = |args: &str| {
        let of = |file: &str| perplexity(&format!("--rotations {file} {args}"));
        (of("R.safetensors") / of("plain.safetensors") - 1.0).abs() > 1e-7
    };
    assert!(apart("") && !apart("--no-clip-search") && !apart("--scheme W16A4KV4"));
    place.fails(
        &format!("{EVAL} --rotations R.safetensors --weight-group 8"),
        &["W4 symmetric, and", "groups of 8", "--no-clip-search"],
    );
    place.fails(&format!("{EVAL} --rotations R.safetensors --scheme W3A4KV4"), &["W3 symmetric"]);

    // That is known before the model is loaded, and said with the file.
    std::fs::rename(place.path("model/model.safetensors"), place.path("away")).unwrap();
    for command in [
        EVAL,
        "quantize --model model --device cpu --out new",
        "quantize --model model --device cpu --out new --format hf --online none",
    ] {
        place.fails(&format!("{command} --rotations R.safetensors --scheme W3A4KV4"), &["R.safetensors: ", "W3 symmetric"]);
    }
    std::fs::rename(place.path("away"), place.path("model/model.safetensors")).unwrap();

    // Constants that do not say what bits they are for are left out, and that is said.
    let key = ClipEnds::of_ratios(&[Site::Key], &[ClipRatios::uniform(0.5).unwrap(); 2], 2).unwrap();
    rotations.clone().with_clips(key).save(&place.path("bare.safetensors")).unwrap();
    let said = String::from_utf8(place.run(&format!("{EVAL} --rotations bare.safetensors")).stderr).unwrap();
    assert!(said.contains("bare.safetensors does not say for which bits"), "{said}");

    // Every way of writing weights has them, and a packed folder scores as they do.
    let learned = perplexity("--rotations R.safetensors");
    assert!(place.run("quantize --model model --device cpu --rotations R.safetensors --out packed").status.success());
    let packed = number(&place.json(&format!("{} --json", EVAL.replace("--model model", "--model packed"))), "perplexity");
    assert!((packed / learned - 1.0).abs() < 1e-5, "{packed} {learned}");
    let tensor = |out: &str, file: &str| {
        let run = format!("quantize --model model --device cpu --rotations {file} --out {out} --format compressed-tensors");
        assert!(place.run(&format!("{run} --online none")).status.success());
        let bytes = std::fs::read(place.path(out).join("model.safetensors")).unwrap();
        let read = SafeTensors::deserialize(&bytes).unwrap();
        read.tensor("model.layers.0.self_attn.q_proj.weight_scale").unwrap().data().to_vec()
    };
    assert_ne!(tensor("ours", "R.safetensors"), tensor("theirs", "plain.safetensors"));
    assert!(apart("--weights gptq --calibration text.txt --calibration-windows 4"));

    // What was learned is a start; searched ones stand in its place.
    let from = |args: &str| {
        place.json(&format!("{} --start R.safetensors {args}", learn.replace("--out R.safetensors", "--out S.safetensors")));
        Rotations::load(&place.path("S.safetensors")).unwrap().weight_clips
    };
    let (more, before) = (from("").unwrap(), rotations.weight_clips.unwrap());
    assert_ne!(more.get(0).unwrap().to_f64_vec().unwrap(), before.get(0).unwrap().to_f64_vec().unwrap());
    assert!(from("--weight-clip search").is_none() && from("--scheme W16A4KV4").is_none());
    assert!(place.run("rotations convert R.safetensors R.bin").status.success());
}

/// Who says that no ratios of weights are to be searched gets none from a recipe: the same flag would leave them out of every score.
#[test]
fn a_recipe_learns_none_where_weights_keep_their_range() {
    let place = Place::new();
    let learned = |args: &str| {
        place.json(&format!("{LEARN} --steps 2 --json {args}"));
        Rotations::load(&place.path("R.safetensors")).unwrap().weight_clips.is_some()
    };
    assert!(learned("") && learned("--no-clip-search --weight-clip learned"));
    assert!(!learned("--no-clip-search") && !learned("--no-clip-search --recipe perplexity"));
}

/// Before anything is loaded: the folder of the model holds no weights.
#[test]
fn what_cannot_have_them_is_refused_first() {
    let place = Place::new();
    std::fs::remove_file(place.path("model/model.safetensors")).unwrap();
    let fails = |args: &str, parts: &[&str]| place.fails(&format!("{LEARN} --steps 1 --weight-clip learned {args}"), parts);
    fails("--scheme W16A4KV4", &["weights of 2 to 8 bits", "W16A4KV4"]);
    fails("--objective whip", &["whip does not depend on those of weights"]);
    fails("--weight-clip-lr 0", &["learning rate of clip ratios of weights", "above 0"]);
    let torch = LEARN.replace("R.safetensors", "R.bin");
    place.fails(&format!("{torch} --recipe published --weight-clip learned"), &["R.bin", "clip ratios of weights"]);
    place.fails(&format!("{LEARN} --weight-clip error"), &["expected search or learned"]);
    // A plan knows what they take, and that no search is left.
    let planned = |args: &str| place.json(&format!("{LEARN} --dry-run --json {args}"));
    let (with, without) = (planned("--weight-clip learned"), planned("--weight-clip search"));
    assert!(number(&with, "peak_bytes") > number(&without, "peak_bytes"), "{with} {without}");
}

#[test]
fn tables_have_them() {
    let place = Place::new();
    let compare = "compare --model model --device cpu --seq-len 16 --calibration text.txt --text text.txt --seeds 1 --learn-seeds 1 --steps 2";
    let compare = format!("{compare} --batch 4 --held-out 8 --recipe published --json --weight-clip learned");
    let table = place.json(&format!("{compare} --gptq --calibration-windows 4"));
    let row = |name: &str| table["rows"].as_array().unwrap().iter().find(|row| row["name"] == name).unwrap()["rotations"].clone();
    assert_eq!(row("learned"), "learned at W4A4KV4, clip ratios of weights too, 1 seed");
    assert_eq!(row("learned + gptq"), "learned at W16A4KV4, 1 seed");
    place.fails(&format!("{compare} --learn-scheme W16A4KV4"), &["W4 symmetric, got W16 symmetric"]);
    // A recipe learns them only where they can be scored.
    let faithful = compare.replace(" --recipe published --json --weight-clip learned", "");
    for other in ["W16A4KV4", "W8A4KV4"] {
        let table = place.json(&format!("{faithful} --json --learn-scheme {other}"));
        let learned = table["rows"].as_array().unwrap().iter().find(|row| row["name"] == "learned").unwrap();
        assert_eq!(learned["rotations"], format!("learned at {other}, 1 seed"));
    }
    // The columns stay below one another, however long a name is.
    let table = String::from_utf8(place.run(&faithful).stdout).unwrap();
    let rows: Vec<usize> = table.lines().skip(1).take_while(|l| !l.starts_with("KL to")).map(|l| l.chars().count()).collect();
    assert!(table.contains("clip ratios of weights too") && rows.len() > 6, "{table}");
    assert!(rows.iter().all(|n| *n == rows[0]), "{table}");
    let race = "race --model model --device cpu --seq-len 16 --calibration text.txt --text text.txt --seeds 1 --entries cayley+weights --out race";
    place.fails(&format!("{race} --schemes W4A4KV4,W16A4KV4"), &["weights of 2 to 8 bits", "W16A4KV4"]);
}
