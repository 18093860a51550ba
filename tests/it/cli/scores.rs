//! `eval`, `compare` and `race`.

use super::*;

#[test]
fn eval_agrees_with_itself() {
    let place = Place::new();
    let eval = |rest: &str| place.json(&format!("{EVAL} --json {rest}"));
    let full = eval("--scheme W16A16KV16 --rotations none");
    assert_eq!((number(&full, "windows"), number(&full, "tokens")), (100.0, 1600.0));
    assert!(number(&full, "seconds") > 0.0);
    let perplexity = |rest: &str| number(&eval(rest), "perplexity");
    let plain = number(&full, "perplexity");
    for rotations in ["identity", "hadamard", "hadamard:7", "orthogonal:7"] {
        for online in ["none", "r3", "r4", "r3,r4"] {
            let rotated = perplexity(&format!("--scheme W16A16KV16 --rotations {rotations} --online {online}"));
            assert!((rotated / plain - 1.0).abs() <= 1e-5, "{rotations}, {online}: {rotated}, not {plain}");
        }
    }
    assert_eq!(perplexity("--rotations hadamard"), perplexity("--rotations hadamard:0 --weights rtn"));
    assert_ne!(perplexity("--rotations hadamard:1"), perplexity("--rotations hadamard:2"));
    assert_eq!(number(&eval("--max-windows 3"), "windows"), 3.0);
    assert!(perplexity("--scheme W3A3KV3") != plain);
}

#[test]
fn compare_prints_the_table() {
    let place = Place::new();
    let args = format!(
        "compare {MODEL} --calibration text.txt --text text.txt --scheme W4A4KV4 --seeds 3 --steps 4 --batch 4 --recipe published"
    );
    let table = place.json(&format!("{args} --json"));
    let row = |name: &str| {
        let rows = table["rows"].as_array().unwrap();
        let row = rows.iter().find(|r| r["name"] == name).unwrap_or_else(|| panic!("no row {name}"));
        assert!(["scheme", "rotations", "weights"].iter().all(|f| row[*f].is_string()), "{row}");
        (row["scheme"].as_str().unwrap().to_string(), number(row, "perplexity"))
    };
    assert_eq!(row("full precision").0, "W16A16KV16");
    for name in ["rtn", "hadamard mean", "hadamard best", "hadamard worst", "learned"] {
        assert_eq!(row(name).0, "W4A4KV4", "{name}");
    }
    let [best, mean, worst] = ["best", "mean", "worst"].map(|n| row(&format!("hadamard {n}")).1);
    assert!(best <= mean && mean <= worst && best > 1.0, "{table}");
    let full = number(&place.json(&format!("{EVAL} --json --scheme W16A16KV16")), "perplexity");
    assert_eq!(row("full precision").1, full);
    let out = place.run(&args);
    assert!(out.status.success() && String::from_utf8(out.stdout).unwrap().contains("hadamard worst"));

    // GPTQ rows; rotations for a network without online Hadamards, learned with them in the graph.
    let args = format!("{args} --seeds 2 --learn-seeds 1 --gptq --calibration-windows 8 --online none").replace("--seeds 3 ", "");
    let alone = place.json(&format!("{args} --json"));
    // Another quantiser beside it changes none of its rows.
    let with = place.json(&format!("{args} --learn-online r3,r4 --json").replace("--gptq", "--weights gptq,qronos"));
    let row = |table: &serde_json::Value, name: &str| {
        let row = table["rows"].as_array().unwrap().iter().find(|r| r["name"] == name).unwrap().clone();
        (row["rotations"].as_str().unwrap().to_string(), number(&row, "perplexity"))
    };
    assert_eq!(row(&alone, "learned").0, "learned at W4A4KV4, 1 seed");
    assert_eq!(row(&with, "learned").0, "learned at W4A4KV4 with r3,r4, 1 seed");
    assert_eq!(row(&with, "learned + gptq").0, "learned at W16A4KV4 with r3,r4, 1 seed");
    let w16 = |name| with["rows"].as_array().unwrap().iter().find(|r| r["name"] == name).unwrap()["scheme"].clone();
    assert_eq!((w16("learned at W16"), w16("learned + qronos")), ("W16A4KV4".into(), "W4A4KV4".into()));
    for (a, b) in [("gptq", "qronos"), ("hadamard + gptq mean", "hadamard + qronos mean"), ("learned + gptq", "learned + qronos")]
    {
        assert_ne!(row(&with, a).1, row(&with, b).1, "{b}");
    }
    let one = number(&with["learned_qronos"][0], "perplexity");
    assert_eq!(one, row(&with, "learned + qronos").1);
    assert_eq!(number(&with["learned_w16"][0], "perplexity"), row(&with, "learned at W16").1);
    for name in ["learned", "learned at W16", "learned + gptq"] {
        assert_ne!(row(&alone, name).1, row(&with, name).1, "{name}");
    }
    for name in ["gptq", "hadamard + gptq mean", "rtn"] {
        assert_eq!(row(&alone, name), row(&with, name), "{name}");
    }
    let each = alone["hadamard_gptq"].as_array().unwrap().iter().map(|r| number(r, "perplexity")).sum::<f64>() / 2.0;
    assert!((each / row(&alone, "hadamard + gptq mean").1 - 1.0).abs() < 1e-12);
}

#[test]
fn compare_adds_rows_with_clip_ratios() {
    let place = Place::new();
    let args = format!(
        "compare {MODEL} --calibration text.txt --text text.txt --scheme W4A3KV3 --seeds 2 --learn-seeds 2 --steps 4 --batch 4 \
         --held-out 8 --recipe published"
    );
    let plain = place.json(&format!("{args} --json"));
    assert_eq!((&plain["hadamard_clip"], &plain["learned_clip"]), (&json!([]), &json!([])));
    for goal in ["error", "loss"] {
        let table = place.json(&format!("{args} --clip {goal} --json"));
        let rows = |t: &Value| {
            let mut rows = t["rows"].as_array().unwrap().clone();
            rows.iter_mut().for_each(|row| row["training"]["seconds"] = Value::Null);
            rows
        };
        // The other rows are as they were, in their places; only what the clock said is another matter.
        let (ours, others): (Vec<_>, Vec<_>) =
            rows(&table).into_iter().partition(|r| r["name"].as_str().unwrap().contains("clip"));
        assert_eq!(others, rows(&plain));
        let names: Vec<&str> = ours.iter().map(|r| r["name"].as_str().unwrap()).collect();
        assert_eq!(names, ["hadamard + clip mean", "learned + clip"]);
        for (row, name) in ours.iter().zip(["hadamard_clip", "learned_clip"]) {
            let runs = table[name].as_array().unwrap();
            let mean = runs.iter().map(|r| number(r, "perplexity")).sum::<f64>() / 2.0;
            assert!(runs.len() == 2 && number(row, "perplexity") == mean, "{table}");
        }
        for (seed, (before, after)) in
            table["hadamard_clip"].as_array().unwrap().iter().zip(table["learned_clip"].as_array().unwrap()).enumerate()
        {
            assert_eq!((number(before, "seed"), number(after, "seed")), (seed as f64, seed as f64));
            assert!(before["clip"] == after["clip"] && before["clip"]["goal"] == goal, "{before} {after}");
            assert_eq!(after["start_perplexity"], before["perplexity"]);
            assert_ne!(before["perplexity"], plain["hadamard"][seed]["perplexity"], "{goal}: the ratios do nothing");
        }
        // It is what `learn` and `eval` do, one after the other.
        let learn = format!("{LEARN} --recipe published --scheme W4A3KV3 --steps 4 --seed 1 --clip {goal} --json");
        assert_eq!(place.json(&learn)["held_out_last"], table["learned_clip"][1]["held_out_last"]);
        let eval = place.json(&format!("{EVAL} --scheme W4A3KV3 --rotations R.safetensors --json"));
        assert_eq!(eval["perplexity"], table["learned_clip"][1]["perplexity"]);
    }
    let out = place.run(&format!("{args} --clip error"));
    let text = String::from_utf8(out.stdout).unwrap();
    assert!(text.contains("hadamard + clip mean") && text.contains("seed 1 + clip: held-out loss"), "{text}");
    place.fails(&format!("{args} --clip best"), &["expected error, loss, learned or none"]);
}

#[test]
fn a_race_leaves_rows_a_table_and_pictures() {
    let place = Place::new();
    let race =
        format!("race {MODEL} --calibration text.txt --text text.txt --steps 6,8 --batch 4 --held-out 4 --held-out-every 2");
    let entries = "cayley@0.5|1.5,adam-polar/whip,qr-orth/kl+loss,hadamard,hadamard+loss";
    let args = format!("{race} --entries {entries} --schemes W4A4KV4,W16A4KV4 --seeds 2 --out race --json");
    let outcome = place.json(&args);
    let runs = outcome["runs"].as_array().unwrap();
    // Two schemes, two seeds; the first seed of the first number of steps tries a second rate; Hadamards have no steps.
    assert_eq!(runs.len(), 2 * (2 * 2 * 3 + 1 + 2 * 2));
    for run in runs {
        let learns = run["optimizer"] != "hadamard";
        assert_eq!(
            run["curve"].as_array().unwrap().len(),
            if learns { number(run, "steps") as usize / 2 + 1 } else { 0 },
            "{run}"
        );
        assert!(number(run, "perplexity") > 1.0 && number(run, "recovered").is_finite(), "{run}");
        assert!(!learns || number(run, "orthogonality_error") <= 1e-6, "{run}");
        assert_eq!(run["clip"].is_null(), !run["entry"].as_str().unwrap().contains('+'), "{run}");
        if run["entry"] == "hadamard" {
            assert_eq!(number(run, "recovered"), 0.0, "{run}");
        }
    }
    // A race is what `learn` does: the same rate, seed and windows give the same held-out loss.
    let one = runs.iter().find(|r| r["entry"] == "cayley/cross-entropy" && r["learning_rate"] == 1.5 && r["scheme"] == "W4A4KV4");
    let args = "learn --model model --device cpu --seq-len 16 --text text.txt --batch 4 --held-out 4 --steps 6 --recipe published --out R.safetensors \
                --json";
    assert_eq!(one.unwrap()["curve"][3][2], place.json(args)["held_out_last"]);

    let rows = |name: &str| String::from_utf8(place.read(&format!("race/{name}"))).unwrap();
    assert_eq!(rows("runs.csv").lines().count(), 1 + runs.len());
    let points: usize = runs.iter().map(|r| r["curve"].as_array().unwrap().len()).sum();
    assert_eq!(rows("curves.csv").lines().count(), 1 + points);
    for name in ["runs.csv", "curves.csv"] {
        let text = rows(name);
        let columns = text.lines().next().unwrap().split(',').count();
        assert!(text.lines().all(|line| line.split(',').count() == columns), "{text}");
    }
    let table = rows("table.md");
    assert!(table.contains("| cayley/cross-entropy | 0.5 | 6 |") && table.contains("| hadamard+loss |"), "{table}");
    for picture in ["race/steps.png", "race/seconds.png"] {
        assert!(place.read(picture).starts_with(b"\x89PNG"));
    }
    place.fails(&format!("{race} --entries newton --out race2"), &["newton"]);
    place.fails(&format!("{race} --seeds 0 --out race2"), &["at least one seed"]);
    place.fails(&format!("{race} --out text.txt"), &["text.txt"]);
}
