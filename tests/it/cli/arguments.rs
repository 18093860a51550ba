//! What is wrong with the arguments is said at once, before a model is loaded.

use std::time::Instant;

use super::*;

/// Command, bad argument, what the error says. The model's weights are no weights: an argument that is only checked once they are
/// loaded is refused for another reason.
const REFUSED: &[(&str, &str, &str)] = &[
    ("learn", "--lr nan", "learning rate: expected a finite number above 0, got NaN"),
    ("learn", "--lr 0", "learning rate: expected a finite number above 0, got 0"),
    ("learn", "--lr inf", "learning rate: expected a finite number above 0, got inf"),
    ("learn", "--steps 0", "at least 1"),
    ("learn", "--micro-batch 0", "at least 1"),
    ("learn", "--batch 18446744073709551615", "as many as there are windows"),
    ("learn", "--held-out 18446744073709551615", "held-out windows: expected fewer"),
    ("learn", "--optimizer adam", "expected one of cayley, cayley-parity"),
    ("learn", "--objective mse", "expected one of cross-entropy, kl"),
    ("learn", "--schedule step", "expected constant, linear or cosine"),
    ("learn", "--memory garbage", "expected auto or a size such as 24GiB"),
    ("learn", "--weight-group 5", "quantisation group: 5 does not divide rows of 24"),
    ("learn", "--clip-windows 0", "at least 1"),
    ("learn", "--clip much", "expected error, loss, learned or none, got \"much\""),
    ("learn", "--start none", "nothing to learn"),
    ("learn", "--start hadamrd", "hadamard[:SEED], block-hadamard[:SEED]"),
    ("learn", "--start hadamard:x", "expected a number after the colon"),
    ("learn", "--out R.bin", "an R.bin holds R1 and R2 only"),
    ("learn", "--seq-len 18446744073709551615", "window length: expected at least 2 tokens"),
    ("learn", "--dry-run --batch 18446744073709551615", "18446744073709551615 sequences of 16 tokens a step"),
    ("learn", "--dry-run --batch 0", "at least 1"),
    ("learn", "--dry-run --lr nan", "learning rate"),
    ("learn", "--dry-run --out R.bin", "R.bin"),
    ("learn", "--dry-run --out R.bin --recipe published --clip error", "an R.bin cannot hold clip ratios"),
    ("learn", "--dry-run --out absent/R.safetensors", "absent"),
    ("learn", "--dry-run --ranks 5", "at least a sequence for each of 5 ranks, got 4"),
    ("learn", "--scheme W4AMXFP4KV4", "quantisation group: 32 does not divide rows of 24"),
    ("eval", "--engine integer", "expected a folder that `quantize` wrote in its own format"),
    ("eval", "--weight-group 5", "quantisation group: 5 does not divide rows of 24"),
    ("eval", "--scheme W4AMXFP4KV4", "quantisation group: 32 does not divide rows of 24"),
    ("clip", "--scheme W16AMXFP4KV4", "quantisation group: 32 does not divide rows of 24"),
    ("compare", "--learn-scheme W16AMXFP4KV4", "quantisation group: 32 does not divide rows of 24"),
    ("eval", "--rotations hadamrd", "there is no file \"hadamrd\""),
    ("eval", "--rotations none:1", "none has no seed"),
    ("eval", "--text absent.txt", "absent.txt: No such file"),
    ("eval", "--max-windows 0", "at least 1"),
    ("eval", "--weights gptq", "needs --calibration FILE"),
    ("eval", "--weights gptq --calibration text.txt --damping nan", "damping is 0 to"),
    ("eval", "--weights gptq --calibration text.txt --calibration-windows 100000", "expected 1 to 100 windows"),
    ("eval", "--weights gptaq", "--weights gptaq:0.25: needs --calibration FILE"),
    ("eval", "--weights gptaq:2", "expected a constant between 0 and 1, got 2"),
    ("eval", "--weights qronos:1", "takes no constant, got 1"),
    ("eval", "--weights foem:x", "expected a number, got \"x\""),
    ("eval", "--weights awq", "expected one of gptq, gptaq:0.25, qep:0.5, qronos, foem:0.2, got \"awq\""),
    ("eval", "--seq-len 0", "window length: expected at least 2 tokens"),
    ("eval", "--device tpu", "expected auto, cpu or cuda"),
    ("learn", "--read-rate soon", "expected auto, none or the bytes of a second such as 3GB, got \"soon\""),
    ("compare", "--baselines --resident 0", "learns weights, and needs every layer on the device"),
    ("compare", "--seeds 0", "--seeds: expected at least 1, got 0"),
    ("compare", "--optimizer adam", "expected one of cayley, cayley-parity"),
    ("compare", "--lr nan", "learning rate"),
    ("compare", "--batch 100", "batch: expected"),
    ("compare", "--weight-group 5", "quantisation group: 5"),
    ("compare", "--gptq --calibration-windows 100000", "expected 1 to 100 windows"),
    ("clip", "--rotations none", "none has no file"),
    ("clip", "--windows 0", "at least 1"),
    ("clip", "--out R.bin", "an R.bin cannot hold clip ratios"),
    ("inspect", "--layer 2", "expected one below 2, got 2"),
    ("inspect", "--rotations absent.safetensors", "absent.safetensors: No such file"),
    ("quantize", "--weights gptq", "needs --calibration FILE"),
    (
        "quantize",
        "--weights gptq --calibration text.txt --calibration-windows 2 --ranks 3",
        "calibration: expected at least a window for each of 3 ranks, got 2",
    ),
    ("quantize", "--weight-group 5", "quantisation group: 5"),
    ("race", "--entries cayley@nan", "expected a positive learning rate"),
    ("race", "--batch 18446744073709551615", "as many as there are windows"),
    ("race", "--held-out 1000", "held-out windows"),
    ("profile", "--steps 2", "expected at least 3"),
    ("rotations", "--tolerance nan", "expected a finite number of at least 0, got NaN"),
];

#[test]
fn bad_arguments_are_refused_before_anything_is_loaded() {
    let place = Place::new();
    std::fs::write(place.path("model/model.safetensors"), "no weights").unwrap();
    Rotations::random_hadamard(24, 8, 2, 0).unwrap().save(&place.path("given.safetensors")).unwrap();
    let text = format!("{MODEL} --text text.txt");
    for (command, bad, part) in REFUSED {
        let rest = match *command {
            "learn" => format!("{text} --batch 4 --held-out 8 --out R.safetensors"),
            "compare" => format!("{text} --calibration text.txt --batch 4"),
            "clip" => format!("{text} --rotations identity --out C.safetensors"),
            "inspect" => format!("{text} --out seen"),
            "quantize" => format!("{MODEL} --rotations identity --out written"),
            "race" => format!("{text} --calibration text.txt --out raced"),
            "rotations" => "convert given.safetensors R.safetensors".into(),
            _ => text.clone(),
        };
        // An argument given twice is refused for that.
        let mut words: Vec<&str> = rest.split_whitespace().collect();
        for name in bad.split_whitespace().filter(|word| word.starts_with("--")) {
            if let Some(at) = words.iter().position(|word| *word == name) {
                words.drain(at..at + 2);
            }
        }
        let start = Instant::now();
        place.fails(&format!("{command} {} {bad}", words.join(" ")), &[part]);
        let seconds = start.elapsed();
        assert!(seconds < Duration::from_secs(2), "{command} {bad}: {seconds:?}");
    }
    assert!(!place.path("R.safetensors").exists() && !place.path("written").exists());
}

#[test]
fn sizes_beyond_memory_are_refused_by_arithmetic() {
    let place = Place::new();
    let huge = u64::MAX.to_string();
    for seq in [huge.as_str(), "1099511627776", "2147483647"] {
        place.fails(&format!("eval --model synthetic:tiny --device cpu --text synthetic --seq-len {seq}"), &[seq]);
    }
}

#[cfg(unix)]
#[test]
fn a_rank_that_cannot_begin_says_why_once() {
    let place = Place::new();
    let output = place.command(&format!("{EVAL} --ranks 2")).env("SPINQUANT_RANKS_PATIENCE", "x").output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success() && said.matches("error:").count() == 1, "{said}");
    assert!(said.contains("SPINQUANT_RANKS_PATIENCE: expected a number from 0 on, got \"x\""), "{said}");
}

#[test]
fn a_written_model_is_scored_as_written() {
    let place = Place::new();
    place.run(&format!("quantize {} --rotations hadamard --out q", MODEL.replace(" --seq-len 16", "")));
    let eval = EVAL.replace("--model model", "--model q");
    let score = |rest: &str| number(&place.json(&format!("{eval} --json {rest}")), "perplexity");
    let plain = score("");
    // What it was written with may be said again.
    assert_eq!(
        plain,
        score("--scheme W4A4KV4 --rotations hadamard:0 --weights rtn --dtype f32 --online r3,r4 --activation-clip 1")
    );
    for (bad, part) in [
        ("--scheme W8A8KV8", "W4A4KV4, which cannot be changed; got W8A8KV8"),
        ("--rotations none", "hadamard:0, which cannot be changed; got none"),
        ("--weights gptq", "rtn, which cannot be changed; got gptq"),
        ("--dtype f16", "f32, which cannot be changed; got f16"),
        ("--activation-clip 0.5", "1, which cannot be changed; got 0.5"),
        ("--online r3", "r3,r4, which cannot be changed; got r3"),
        ("--weight-group 8", "none, which cannot be changed; got 8"),
        ("--symmetric-activations", "false, which cannot be changed; got true"),
        ("--asymmetric-weights", "false, which cannot be changed; got true"),
        ("--no-clip-search", "false, which cannot be changed; got true"),
    ] {
        let name = bad.split_whitespace().next().unwrap();
        place.fails(&format!("{eval} {bad}"), &["q was written with", name, part]);
    }
}

#[test]
fn windows_beyond_the_models_positions_are_warned_of() {
    let place = Place::new();
    let mut c = config();
    c["max_position_embeddings"] = json!(8);
    place.config(c);
    let out = place.run(EVAL);
    let stderr = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(
        out.status.success() && stderr.contains("warning: windows of 16 tokens are longer than the model's 8 positions"),
        "{stderr}"
    );
}
