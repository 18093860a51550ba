//! `learn`, and what it keeps: rotations, clip ratios, a log, a state to go on from.

use super::*;

#[test]
fn learn_writes_rotations_a_log_and_one_object() {
    let place = Place::new();
    let learn = format!("{LEARN} --scheme W4A4KV4 --steps 6 --held-out-every 2 --log steps.jsonl --json");
    let report = place.json(&learn);
    for name in ["loss_first", "loss_last", "held_out_first", "held_out_last", "seconds_per_step", "peak_bytes"] {
        assert!(number(&report, name) > 0.0, "{report}");
    }
    assert!(number(&report, "orthogonality_error") <= 1e-6, "{report}");

    let log = String::from_utf8(place.read("steps.jsonl")).unwrap();
    let lines: Vec<Value> = log.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert_eq!(lines.iter().map(|l| number(l, "step")).collect::<Vec<_>>(), [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
    assert_eq!(number(&lines[0], "loss"), number(&report, "loss_first"));
    assert_eq!(number(&lines[5], "loss"), number(&report, "loss_last"));
    assert_eq!(number(&lines[5], "held_out"), number(&report, "held_out_last"));
    assert!(lines[0]["held_out"].is_null() && lines[1]["held_out"].is_number());
    assert_eq!(number(&lines[0], "learning_rate"), 9.75); // of kl

    let bytes = place.read("R.safetensors");
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let (r1, r2) = (file.tensor("R1").unwrap(), file.tensor("R2").unwrap());
    assert_eq!((r1.dtype(), r1.shape(), r2.shape()), (Dtype::F32, &[24, 24][..], &[2, 2, 8, 8][..]));
    Rotations::load(&place.path("R.safetensors")).unwrap().check(24, 8, 2, 1e-6).unwrap();
    assert!(!place.path("R.safetensors.state").exists(), "the state of a finished run is gone");

    // The same again gives the same bytes; the log goes on.
    place.json(&learn);
    assert!(place.read("R.safetensors") == bytes, "two runs differ");
    assert_eq!(String::from_utf8(place.read("steps.jsonl")).unwrap().lines().count(), 12);
    place.json(&format!("{learn} --seed 1"));
    assert!(place.read("R.safetensors") != bytes, "two seeds agree");

    // What was learned can be scored, and is not the start.
    let score = |rotations: &str| number(&place.json(&format!("{EVAL} --json --rotations {rotations}")), "perplexity");
    assert!((score("R.safetensors") / score("hadamard:1") - 1.0).abs() > 1e-6);
}

#[test]
fn without_json_people_read_it() {
    let place = Place::new();
    let out = place.run(&format!("{LEARN} --steps 2"));
    assert!(out.status.success());
    let text = String::from_utf8(out.stdout).unwrap();
    assert!(["loss", "held-out loss", "max|RᵀR − I|", "R.safetensors"].iter().all(|p| text.contains(p)), "{text}");
    let out = place.run(&format!("{EVAL} --rotations R.safetensors"));
    assert!(String::from_utf8(out.stdout).unwrap().contains("W4A4KV4, rotations R.safetensors, weights rtn: perplexity "));
}

#[test]
fn clip_ratios_travel_with_the_rotations() {
    let place = Place::new();
    let ratios = |file: &str| -> String {
        let (_, notes) = Rotations::load_with(&place.path(file)).unwrap();
        notes["activation_clip"].clone()
    };
    for goal in ["error", "loss"] {
        let args = format!(
            "clip {MODEL} --text text.txt --rotations hadamard:3 --scheme W4A3KV3 --goal {goal} --out C.safetensors --json"
        );
        let found = place.json(&args);
        assert!(number(&found, "after") <= number(&found, "before"), "{found}");
        assert!(ratios("C.safetensors").contains('='), "{found}");
        // Used where the file is, unless others are asked for or the number of levels is another.
        let score = |args: &str| number(&place.json(&format!("{EVAL} --scheme {args} --json")), "perplexity");
        let plain = score("W4A3KV3 --rotations hadamard:3");
        let clipped = score("W4A3KV3 --rotations C.safetensors");
        assert!(clipped != plain, "{goal}: the ratios do nothing");
        assert_eq!(score("W4A3KV3 --rotations C.safetensors --activation-clip 1"), plain);
        let spelt = format!("W4A3KV3 --rotations hadamard:3 --activation-clip {}", ratios("C.safetensors"));
        assert_eq!(score(&spelt), clipped);
        assert_eq!(score("W4A4KV4 --rotations C.safetensors"), score("W4A4KV4 --rotations hadamard:3"));
        // And written into a quantised model.
        let quantize = "quantize --model model --device cpu --rotations C.safetensors --scheme W4A3KV3 --overwrite --out Q";
        assert!(place.run(quantize).status.success());
        let args = "eval --model Q --device cpu --seq-len 16 --text text.txt --json";
        std::fs::copy(place.path("model/tokenizer.json"), place.path("Q/tokenizer.json")).unwrap();
        assert!((number(&place.json(args), "perplexity") - clipped).abs() < 1e-3 * clipped);
    }
    place.fails(
        &format!("clip {MODEL} --text text.txt --rotations none --out C2.safetensors"),
        &["--rotations", "none has no file"],
    );
    place.fails(
        &format!("clip {MODEL} --text text.txt --rotations hadamard --goal best --out C2.safetensors"),
        &["error or loss"],
    );
    place.fails(&format!("{EVAL} --activation-clip key=2"), &["(0, 1]"]);
    assert!(!place.path("C2.safetensors").exists());
}

/// A scheme that quantises nothing leaves nothing to learn, and that is said; of another nothing is said.
#[test]
fn a_scheme_without_anything_to_learn_is_named() {
    let place = Place::new();
    for (scheme, idle) in [("W16A16KV16", true), ("W16A4KV16", false)] {
        let said = place.run(&format!("{LEARN} --scheme {scheme} --steps 1 --recipe published"));
        let said = String::from_utf8_lossy(&said.stderr).into_owned();
        assert_eq!(said.contains(&format!("{scheme} quantises nothing")), idle, "{said}");
    }
}

#[test]
fn learning_with_clip_ratios_resumes_to_the_same_bytes() {
    let place = Place::new();
    let args = format!(
        "{LEARN} --scheme W4A3KV3 --steps 100 --clip loss --optimizer adam-polar --objective kl --checkpoint-every 1 \
         --log steps.jsonl --resume --json"
    );
    let whole = place.json(&args);
    assert!(number(&whole["clip"], "after") <= number(&whole["clip"], "before"), "{whole}");
    let wanted = place.read("R.safetensors");
    std::fs::remove_file(place.path("steps.jsonl")).unwrap();
    let done = end_early(&place, &args, |child| child.kill().unwrap());
    assert!(done < 100, "killed too late");
    place.fails(&args.replace("--clip loss", "--clip none"), &["R.safetensors.state", "scheme was"]);
    place.fails(&args.replace("kl", "cross-entropy"), &["objective was \"kl\", now \"cross-entropy\""]);
    assert_eq!(place.json(&args)["clip"], whole["clip"]);
    assert!(place.read("R.safetensors") == wanted, "rotations differ after resuming");
}

#[test]
fn learning_searches_clip_ratios_unless_told_not_to() {
    let place = Place::new();
    let notes = |file: &str| -> BTreeMap<String, String> {
        let bytes = place.read(file);
        SafeTensors::read_metadata(&bytes).unwrap().1.metadata().clone().unwrap().into_iter().collect()
    };
    let learn = format!("{LEARN} --recipe published --scheme W4A3KV3 --steps 4 --json");
    let default = place.json(&format!("{learn} --clip error"));
    assert_eq!(default["clip"]["goal"], "error");
    let ratios = notes("R.safetensors")["activation_clip"].clone();
    assert!(ratios != "1" && notes("R.safetensors")["activation_clip_for"] == "A3KV3 asymmetric", "{ratios}");
    // The best recipe begins with the same search, an objective that sees no clip ratios ends with it.
    let free = learn.replace("--recipe published ", "");
    assert_eq!(place.json(&free)["clip"]["goal"], "error");
    assert_eq!(notes("R.safetensors")["clips"], "learned");
    assert_eq!(place.json(&format!("{free} --objective whip"))["clip"], default["clip"]);
    assert_eq!(notes("R.safetensors")["clips"], "ratios");
    // The ratios are those of `spinquant clip` on the start, and with them given nothing is searched.
    let clip = format!("clip {MODEL} --text text.txt --rotations hadamard:0 --scheme W4A3KV3 --out C.safetensors --json");
    assert_eq!(place.json(&clip)["ratios"], default["clip"]["ratios"]);
    let given = place.json(&format!("{learn} --activation-clip {ratios}"));
    assert!(given["clip"].is_null() && given["held_out_last"] == default["held_out_last"], "{given}");
    let started = place.json(&format!("{learn} --start C.safetensors"));
    assert!(started["clip"].is_null() && started["held_out_last"] == default["held_out_last"], "{started}");
    assert_eq!(notes("R.safetensors")["activation_clip"], ratios);

    // As published: nothing is clipped.
    for rest in ["", "--clip none", "--clip none --start C.safetensors", "--optimizer cayley-parity"] {
        let plain = place.json(&format!("{learn} {rest}"));
        assert!(plain["clip"].is_null() && !notes("R.safetensors").contains_key("activation_clip"), "{rest}: {plain}");
        assert!(rest.contains("parity") || plain["held_out_last"] != default["held_out_last"], "{plain}");
    }
    assert_eq!(place.json(&format!("{learn} --optimizer cayley-parity --clip error"))["clip"], default["clip"]);
    // There is nothing to search.
    assert!(place.json(&format!("{} --clip error", learn.replace("W4A3KV3", "W4A16KV16")))["clip"].is_null());
    // More windows asked for than there are.
    let few = place.json(
        &format!("{learn} --clip error --seq-len 100 --clip-windows 1000 --batch 2 --held-out 2")
            .replace("--seq-len 16 ", "")
            .replace("--batch 4 --held-out 8 ", ""),
    );
    assert!(number(&few["clip"], "after") <= number(&few["clip"], "before"), "{few}");
    place.fails(&format!("{learn} --clip best"), &["expected error, loss, learned or none", "\"best\""]);
    place.fails(&format!("{learn} --clip-windows 0"), &["at least 1", "got 0"]);
    place.fails(&format!("{learn} --clip error --activation-clip 0.9"), &["--clip", "--activation-clip"]);
}

/// Starts a run that keeps its state, ends it after a few steps by `end`, and returns the steps its log then holds.
fn end_early(place: &Place, args: &str, end: impl FnOnce(&mut std::process::Child)) -> usize {
    let mut child = place.command(args).spawn().unwrap();
    let logged = || std::fs::read_to_string(place.path("steps.jsonl")).map_or(0, |s| s.lines().count());
    while !(logged() >= 4 && place.path("R.safetensors.state").exists()) {
        assert!(child.try_wait().unwrap().is_none(), "ended by itself");
        std::thread::sleep(Duration::from_millis(2));
    }
    end(&mut child);
    let out = child.wait_with_output().unwrap();
    assert!(!out.status.success(), "the run was over before it could be ended");
    logged()
}

fn steps_of(place: &Place) -> Vec<(u64, f64)> {
    let log = String::from_utf8(place.read("steps.jsonl")).unwrap();
    let lines = log.lines().map(|l| serde_json::from_str::<Value>(l).unwrap());
    lines.map(|l| (l["step"].as_u64().unwrap(), number(&l, "loss"))).collect()
}

#[test]
fn a_killed_run_resumes_to_the_same_bytes() {
    let place = Place::new();
    let args = format!("{LEARN} --scheme W4A4KV4 --steps 150 --checkpoint-every 1 --log steps.jsonl --resume --json");
    let whole = place.json(&args);
    let (want, steps) = (place.read("R.safetensors"), steps_of(&place));
    std::fs::remove_file(place.path("steps.jsonl")).unwrap();
    std::fs::write(place.path("R.safetensors"), b"an earlier result").unwrap();

    let done = end_early(&place, &args, |child| child.kill().unwrap());
    assert!(done < 150, "killed too late");
    assert_eq!(place.read("R.safetensors"), b"an earlier result", "a run that is killed leaves outputs alone");
    place.fails(&format!("{args} --lr 0.1"), &["R.safetensors.state", "learning_rate was 9.75, now 0.1"]);
    let resumed = place.json(&args);
    assert!(place.read("R.safetensors") == want, "rotations differ after resuming");
    for name in ["loss_first", "loss_last", "held_out_first", "held_out_last", "orthogonality_error"] {
        assert_eq!(number(&resumed, name), number(&whole, name), "{name}");
    }
    assert_eq!(steps_of(&place), steps, "one line a step, however often it was run");
    assert!(!place.path("R.safetensors.state").exists());
}

#[cfg(unix)]
#[test]
fn an_interrupted_run_says_how_to_go_on() {
    let place = Place::new();
    let args = format!("{LEARN} --steps 150 --checkpoint-every 2 --log steps.jsonl --resume --json");
    place.json(&args);
    let (want, steps) = (place.read("R.safetensors"), steps_of(&place));
    std::fs::remove_file(place.path("steps.jsonl")).unwrap();
    std::fs::remove_file(place.path("R.safetensors")).unwrap();
    let mut child = place.command(&args).spawn().unwrap();
    while !place.path("R.safetensors.state").exists() {
        assert!(child.try_wait().unwrap().is_none(), "ended by itself");
        std::thread::sleep(Duration::from_millis(2));
    }
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    let out = child.wait_with_output().unwrap();
    let stderr = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.code() == Some(130) && stderr.contains("continue with --resume"), "{stderr}");
    assert!(steps_of(&place).len() < 150 && !place.path("R.safetensors").exists());
    place.json(&args);
    assert!(place.read("R.safetensors") == want);
    assert_eq!(steps_of(&place), steps);
}

/// `--scheme W4A4sKV4` is `--scheme W4A4KV4 --symmetric-activations`, wherever a scheme is asked for.
#[test]
fn symmetric_activations_are_learned_searched_written_and_raced() {
    let place = Place::new();
    let score = |args: &str| number(&place.json(&format!("{EVAL} --json {args}")), "perplexity");
    let hadamard = score("--rotations hadamard --scheme W4A3sKV3");
    assert_eq!(hadamard, score("--rotations hadamard --scheme W4A3KV3 --symmetric-activations"));
    assert_ne!(hadamard, score("--rotations hadamard --scheme W4A3KV3"));

    // Learned with ratios that are for a symmetric grid, and used with no other.
    place.json(&format!("{LEARN} --scheme W4A3sKV3 --steps 3 --clip error --json"));
    let (_, notes) = Rotations::load_with(&place.path("R.safetensors")).unwrap();
    assert_eq!((notes["scheme"].as_str(), notes["activation_clip_for"].as_str()), ("W4A3sKV3", "A3KV3 symmetric"));
    let learned = score("--rotations R.safetensors --scheme W4A3sKV3");
    assert_eq!(learned, score("--rotations R.safetensors --scheme W4A3KV3 --symmetric-activations"));
    assert_ne!(learned, score("--rotations R.safetensors --scheme W4A3sKV3 --activation-clip 1"));
    let asymmetric = format!("{EVAL} --rotations R.safetensors --scheme W4A3KV3");
    let out = place.run(&asymmetric);
    let said = String::from_utf8(out.stderr).unwrap();
    assert!(said.contains("the clip ratios of R.safetensors are for A3KV3 symmetric, not used for W4A3KV3"), "{said}");

    // Written, and scored as written.
    let quantize = "quantize --model model --device cpu --rotations R.safetensors --scheme W4A3sKV3 --out q";
    assert!(place.run(quantize).status.success());
    let record: Value = serde_json::from_slice(&place.read("q/spinquant.json")).unwrap();
    assert_eq!(record["scheme"]["symmetric_activations"], true);
    let written = |rest: &str| format!("{} --json {rest}", EVAL.replace("--model model", "--model q"));
    assert_eq!(number(&place.json(&written("--scheme W4A3sKV3")), "perplexity"), learned);

    // A race tells the two grids apart, and so does a comparison's table.
    let texts = "--calibration text.txt --text text.txt";
    let race = format!("race {MODEL} {texts} --steps 2 --batch 4 --held-out 4 --entries cayley@1.5 --seeds 1 --out race --json");
    let result = place.json(&format!("{race} --schemes W4A3KV3,W4A3sKV3"));
    let baselines = result["baselines"].as_array().unwrap();
    assert_eq!(baselines.iter().map(|b| b["scheme"].as_str().unwrap()).collect::<Vec<_>>(), ["W4A3KV3", "W4A3sKV3"]);
    assert_eq!(baselines[1]["random"][0], hadamard, "{result}");
    let compare = format!("compare {MODEL} {texts} --seeds 1 --learn-seeds 0 --scheme W4A3sKV3 --json");
    let table = place.json(&compare);
    let row = table["rows"].as_array().unwrap().iter().find(|row| row["name"] == "hadamard mean").unwrap();
    assert_eq!((row["scheme"].as_str(), number(row, "perplexity")), (Some("W4A3sKV3"), hadamard));
}

#[test]
fn either_engine_learns_and_says_so() {
    let place = Place::new();
    let learn =
        |args: &str| place.json(&format!("{LEARN} --json --recipe published --steps 2 --start orthogonal:1 --dtype f64 {args}"));
    let (integer, simulated) = (learn("--engine integer"), learn("--engine simulated"));
    for key in ["loss_first", "loss_last", "held_out_last"] {
        let (a, b) = (number(&integer, key), number(&simulated, key));
        assert!((a - b).abs() < 1e-6 * b && b > 0.0, "{key}: {a} {b}");
    }
    place.fails(&format!("{LEARN} --engine fast"), &["expected simulated or integer, got \"fast\""]);
    let planned = |args: &str| place.json(&format!("{LEARN} --dry-run --json --recipe published {args}"));
    let linears = |args: &str| planned(args)["integer_linears"].as_u64().unwrap();
    assert_eq!((linears("--engine integer"), linears(""), linears("--engine integer --scheme W16A4KV4")), (6, 0, 0));
    assert_eq!(planned("--engine integer")["engine"], "integer");
}
