//! The command line on a tiny model: what it prints and writes, that runs repeat and resume, and one clear message for bad input.
#![cfg(feature = "cli")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde_json::{Value, json};
use spinquant::rotation::Rotations;
use spinquant::{Device, Tensor, ops};
use tempfile::TempDir;

type Tensors = BTreeMap<String, Tensor>;

/// A model folder, a text and a place for outputs.
struct Place(TempDir);

fn config() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 24, "intermediate_size": 56,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 32,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "bos_token_id": 0, "torch_dtype": "float32",
    })
}

fn tensors() -> Tensors {
    let mut shapes: Vec<(String, Vec<usize>)> =
        vec![("model.embed_tokens".into(), vec![32, 24]), ("lm_head".into(), vec![32, 24]), ("model.norm".into(), vec![24])];
    for l in 0..2 {
        for (part, shape) in [
            ("input_layernorm", vec![24]),
            ("post_attention_layernorm", vec![24]),
            ("self_attn.q_proj", vec![32, 24]),
            ("self_attn.k_proj", vec![16, 24]),
            ("self_attn.v_proj", vec![16, 24]),
            ("self_attn.o_proj", vec![24, 32]),
            ("mlp.gate_proj", vec![56, 24]),
            ("mlp.up_proj", vec![56, 24]),
            ("mlp.down_proj", vec![24, 56]),
        ] {
            shapes.push((format!("model.layers.{l}.{part}"), shape));
        }
    }
    let tensor = |(i, (name, shape)): (usize, (String, Vec<usize>))| {
        let x = ops::randn(shape.clone(), i as u64).into_vec::<f64>().unwrap();
        let x = x.into_iter().map(|x| if shape.len() == 1 { 1.0 + 0.1 * x } else { 0.2 * x });
        (format!("{name}.weight"), Tensor::from_vec(x.collect::<Vec<_>>(), shape).unwrap())
    };
    shapes.into_iter().enumerate().map(tensor).collect()
}

fn write(path: &Path, tensors: &Tensors, dtype: Dtype) {
    let bytes = tensors.iter().map(|(name, t)| {
        let narrow = |x: &f64| if dtype == Dtype::F32 { (*x as f32).to_le_bytes().to_vec() } else { vec![*x as u8] };
        (name, t.shape(), t.as_slice::<f64>().unwrap().iter().flat_map(narrow).collect::<Vec<u8>>())
    });
    let bytes: Vec<_> = bytes.collect();
    let views = bytes.iter().map(|(name, shape, bytes)| (name, TensorView::new(dtype, shape.to_vec(), bytes).unwrap()));
    safetensors::serialize_to_file(views, None, path).unwrap();
}

impl Place {
    fn new() -> Self {
        let place = Self(tempfile::tempdir().unwrap());
        std::fs::create_dir(place.path("model")).unwrap();
        place.config(config());
        write(&place.path("model/model.safetensors"), &tensors(), Dtype::F32);
        let vocab: BTreeMap<String, u32> =
            (0..30).map(|i| (format!("w{i}"), i + 2)).chain([("<s>".into(), 0), ("?".into(), 1)]).collect();
        let tokenizer = json!({
            "version": "1.0", "added_tokens": [], "normalizer": null, "pre_tokenizer": {"type": "WhitespaceSplit"}, "decoder": null,
            "truncation": null, "padding": null, "post_processor": null,
            "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "?"},
        });
        std::fs::write(place.path("model/tokenizer.json"), tokenizer.to_string()).unwrap();
        // Words that mostly follow from the one before.
        let noise = ops::randn([1600], 9).into_vec::<f64>().unwrap();
        let mut word = 0;
        let text = noise.iter().map(|x| {
            word = (word * 7 + 3 + (x.abs() * 2.0) as usize) % 30;
            format!("w{word} ")
        });
        std::fs::write(place.path("text.txt"), text.collect::<String>()).unwrap();
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn config(&self, config: Value) {
        std::fs::write(self.path("model/config.json"), config.to_string()).unwrap();
    }

    fn read(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.path(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
    }

    fn command(&self, args: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_spinquant"));
        command.args(args.split_whitespace()).current_dir(self.0.path()).env("RAYON_NUM_THREADS", "2");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    fn run(&self, args: &str) -> Output {
        self.command(args).output().unwrap()
    }

    /// Runs to success and returns the one JSON object on standard output.
    fn json(&self, args: &str) -> Value {
        let out = self.run(args);
        let (stdout, stderr) = (String::from_utf8(out.stdout).unwrap(), String::from_utf8_lossy(&out.stderr));
        let complains = stderr.lines().any(|l| l.contains("error") && !l.starts_with("clip ratios by error ("));
        assert!(out.status.success() && !complains, "{args}: {stderr}");
        assert_eq!(stdout.lines().count(), 1, "{stdout}");
        let value: Value = serde_json::from_str(&stdout).unwrap();
        assert!(value.is_object(), "{stdout}");
        value
    }

    /// Runs to failure: nothing on standard output, one message with these parts.
    fn fails(&self, args: &str, parts: &[&str]) {
        let out = self.run(args);
        let stderr = String::from_utf8_lossy(&out.stderr);
        assert!(out.status.code().is_some_and(|c| c != 0), "{args}: {:?}, {stderr}", out.status);
        assert!(out.stdout.is_empty(), "{args}: {}", String::from_utf8_lossy(&out.stdout));
        let errors: Vec<_> = stderr.lines().filter(|l| l.contains("error:")).collect();
        assert!(errors.len() == 1 && errors[0].starts_with("error: ") && !stderr.contains("panicked"), "{args}: {stderr}");
        assert!(parts.iter().all(|p| errors[0].contains(p)), "{args}: {:?} lacks one of {parts:?}", errors[0]);
    }
}

const MODEL: &str = "--model model --device cpu --seq-len 16";
const LEARN: &str = "learn --model model --device cpu --seq-len 16 --text text.txt --batch 4 --held-out 8 --out R.safetensors";
const EVAL: &str = "eval --model model --device cpu --seq-len 16 --text text.txt";

fn number(v: &Value, name: &str) -> f64 {
    v[name].as_f64().unwrap_or_else(|| panic!("no number {name:?} in {v}"))
}

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
    assert_eq!(number(&lines[0], "learning_rate"), 1.5);

    let bytes = place.read("R.safetensors");
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let (r1, r2) = (file.tensor("R1").unwrap(), file.tensor("R2").unwrap());
    assert_eq!((r1.dtype(), r1.shape(), r2.shape()), (Dtype::F32, &[24, 24][..], &[2, 8, 8][..]));
    Rotations::load(&place.path("R.safetensors")).unwrap().check(24, 8, 2, 1e-6).unwrap();
    assert!(!place.path("R.safetensors.state").exists(), "the state of a finished run is gone");

    // The same again gives the same bytes; the log is a new one.
    place.json(&learn);
    assert!(place.read("R.safetensors") == bytes, "two runs differ");
    assert_eq!(String::from_utf8(place.read("steps.jsonl")).unwrap().lines().count(), 6);
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
    let args = format!("compare {MODEL} --calibration text.txt --text text.txt --scheme W4A4KV4 --seeds 3 --steps 4 --batch 4");
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
    let with = place.json(&format!("{args} --learn-online r3,r4 --json"));
    let row = |table: &serde_json::Value, name: &str| {
        let row = table["rows"].as_array().unwrap().iter().find(|r| r["name"] == name).unwrap().clone();
        (row["rotations"].as_str().unwrap().to_string(), number(&row, "perplexity"))
    };
    assert_eq!(row(&alone, "learned").0, "learned at W4A4KV4, 1 seed");
    assert_eq!(row(&with, "learned").0, "learned at W4A4KV4 with r3,r4, 1 seed");
    assert_eq!(row(&with, "learned + gptq").0, "learned at W16A4KV4 with r3,r4, 1 seed");
    for name in ["learned", "learned + gptq"] {
        assert_ne!(row(&alone, name).1, row(&with, name).1, "{name}");
    }
    for name in ["gptq", "hadamard + gptq mean", "rtn"] {
        assert_eq!(row(&alone, name), row(&with, name), "{name}");
    }
    let each = alone["hadamard_gptq"].as_array().unwrap().iter().map(|r| number(r, "perplexity")).sum::<f64>() / 2.0;
    assert!((each / row(&alone, "hadamard + gptq mean").1 - 1.0).abs() < 1e-12);
}

/// Starts a run that keeps its state, ends it after a few steps by `end`, and returns the steps its log then holds.
#[test]
fn compare_adds_rows_with_clip_ratios() {
    let place = Place::new();
    let args = format!(
        "compare {MODEL} --calibration text.txt --text text.txt --scheme W4A3KV3 --seeds 2 --learn-seeds 2 --steps 4 --batch 4 \
         --held-out 8"
    );
    let plain = place.json(&format!("{args} --json"));
    assert_eq!((&plain["hadamard_clip"], &plain["learned_clip"]), (&json!([]), &json!([])));
    for goal in ["error", "loss"] {
        let table = place.json(&format!("{args} --clip {goal} --json"));
        let rows = |t: &Value| t["rows"].as_array().unwrap().clone();
        // The other rows are as they were, in their places.
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
        let learn = format!("{LEARN} --scheme W4A3KV3 --steps 4 --seed 1 --clip {goal} --json");
        assert_eq!(place.json(&learn)["held_out_last"], table["learned_clip"][1]["held_out_last"]);
        let eval = place.json(&format!("{EVAL} --scheme W4A3KV3 --rotations R.safetensors --json"));
        assert_eq!(eval["perplexity"], table["learned_clip"][1]["perplexity"]);
    }
    let out = place.run(&format!("{args} --clip error"));
    let text = String::from_utf8(out.stdout).unwrap();
    assert!(text.contains("hadamard + clip mean") && text.contains("seed 1 + clip: held-out loss"), "{text}");
    place.fails(&format!("{args} --clip best"), &["expected error, loss or none"]);
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
    let learn = format!("{LEARN} --scheme W4A3KV3 --steps 4 --json");
    let default = place.json(&learn);
    assert_eq!(default["clip"]["goal"], "error");
    let (bytes, ratios) = (place.read("R.safetensors"), notes("R.safetensors")["activation_clip"].clone());
    assert!(ratios != "1" && notes("R.safetensors")["activation_clip_for"] == "A3KV3 asymmetric", "{ratios}");
    place.json(&format!("{learn} --clip error"));
    assert!(place.read("R.safetensors") == bytes, "the default is another search");
    // The ratios are those of `spinquant clip` on the start, and with them given nothing is searched.
    let clip = format!("clip {MODEL} --text text.txt --rotations hadamard:0 --scheme W4A3KV3 --out C.safetensors --json");
    assert_eq!(place.json(&clip)["ratios"], default["clip"]["ratios"]);
    let given = place.json(&format!("{learn} --activation-clip {ratios}"));
    assert!(given["clip"].is_null() && given["held_out_last"] == default["held_out_last"], "{given}");
    let started = place.json(&format!("{learn} --start C.safetensors"));
    assert!(started["clip"].is_null() && started["held_out_last"] == default["held_out_last"], "{started}");
    assert_eq!(notes("R.safetensors")["activation_clip"], ratios);

    // As published: nothing is clipped.
    for rest in ["--clip none", "--clip none --start C.safetensors", "--optimizer cayley-parity"] {
        let plain = place.json(&format!("{learn} {rest}"));
        assert!(plain["clip"].is_null() && !notes("R.safetensors").contains_key("activation_clip"), "{rest}: {plain}");
        assert!(rest.contains("parity") || plain["held_out_last"] != default["held_out_last"], "{plain}");
    }
    assert_eq!(place.json(&format!("{learn} --optimizer cayley-parity --clip error"))["clip"], default["clip"]);
    // There is nothing to search.
    assert!(place.json(&learn.replace("W4A3KV3", "W4A16KV16"))["clip"].is_null());
    // More windows asked for than there are.
    let few = place.json(
        &format!("{learn} --seq-len 100 --clip-windows 1000 --batch 2 --held-out 2")
            .replace("--seq-len 16 ", "")
            .replace("--batch 4 --held-out 8 ", ""),
    );
    assert!(number(&few["clip"], "after") <= number(&few["clip"], "before"), "{few}");
    place.fails(&format!("{learn} --clip best"), &["expected error, loss or none", "\"best\""]);
    place.fails(&format!("{learn} --clip-windows 0"), &["at least one window", "got 0"]);
    place.fails(&format!("{learn} --clip error --activation-clip 0.9"), &["--clip", "--activation-clip"]);
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
    let args = "learn --model model --device cpu --seq-len 16 --text text.txt --batch 4 --held-out 4 --steps 6 --clip none --out R.safetensors \
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
    place.fails(&format!("{args} --lr 0.1"), &["R.safetensors.state", "learning_rate was 1.5, now 0.1"]);
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
    assert!(out.status.code() == Some(1) && stderr.contains("continue with --resume"), "{stderr}");
    assert!(steps_of(&place).len() < 150 && !place.path("R.safetensors").exists());
    place.json(&args);
    assert!(place.read("R.safetensors") == want);
    assert_eq!(steps_of(&place), steps);
}

#[test]
fn bad_models() {
    let place = Place::new();
    let file = place.path("model/model.safetensors");
    for (name, old) in [("R.safetensors", "an earlier result"), ("steps.jsonl", "an earlier log")] {
        std::fs::write(place.path(name), old).unwrap();
    }
    let learn = format!("{LEARN} --steps 2 --log steps.jsonl");
    let both = |parts: &[&str]| {
        place.fails(EVAL, parts);
        place.fails(&learn, parts);
        assert_eq!(place.read("R.safetensors"), b"an earlier result");
        assert_eq!(place.read("steps.jsonl"), b"an earlier log");
        assert!(!place.path("R.safetensors.state").exists());
    };

    place.fails(&EVAL.replace("--model model", "--model absent"), &["absent/config.json", "No such file"]);
    let with = |changes: Value| {
        let mut c = config();
        changes.as_object().unwrap().iter().for_each(|(k, v)| c[k] = v.clone());
        place.config(c);
    };
    with(json!({"hidden_size": null}));
    both(&["config.json: hidden_size: a needed field is missing"]);
    with(json!({"architectures": ["MistralForCausalLM"]}));
    both(&["config.json: architectures: expected [\"LlamaForCausalLM\"], got [\"MistralForCausalLM\"]"]);
    with(json!({"head_dim": 7}));
    both(&["config.json: head_dim: expected an even number", "got 7"]);
    with(json!({"vocab_size": 31}));
    both(&["model.safetensors: model.embed_tokens.weight: expected shape [31, 24], got [32, 24]"]);
    std::fs::write(place.path("model/config.json"), "{").unwrap();
    both(&["config.json: expected a JSON object"]);
    place.config(config());

    let whole = std::fs::read(&file).unwrap();
    std::fs::write(&file, &whole[..whole.len() / 2]).unwrap();
    both(&["model.safetensors: expected a complete safetensors file"]);
    std::fs::write(&file, b"").unwrap();
    both(&["model.safetensors"]);
    std::fs::remove_file(&file).unwrap();
    both(&["expected model.safetensors or model.safetensors.index.json", "found neither"]);
    let index = json!({"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}});
    let index_file = place.path("model/model.safetensors.index.json");
    std::fs::write(&index_file, index.to_string()).unwrap();
    both(&["index.json: lm_head.weight: names the shard model-00001-of-00002.safetensors, which does not exist"]);
    std::fs::remove_file(index_file).unwrap();

    let name = "model.layers.1.mlp.up_proj.weight";
    let mut changed = tensors();
    changed.insert(name.into(), ops::randn([24, 56], 1));
    write(&file, &changed, Dtype::F32);
    both(&[name, "expected shape [56, 24], got [24, 56]"]);
    changed.remove(name);
    write(&file, &changed, Dtype::F32);
    both(&[name, "missing"]);
    write(&file, &tensors(), Dtype::U8);
    both(&["expected dtype F64, F32, F16 or BF16, got U8"]);
    let mut values = ops::randn([56, 24], 1).into_vec::<f64>().unwrap();
    values[77] = f64::NAN;
    changed.insert(name.into(), Tensor::from_vec(values, [56, 24]).unwrap());
    write(&file, &changed, Dtype::F32);
    both(&[name, "expected finite values, got 1 of 1344 that are NaN or infinite"]);
    write(&file, &tensors(), Dtype::F32);

    std::fs::write(place.path("model/tokenizer.json"), "{}").unwrap();
    both(&["tokenizer.json: expected a tokenizer"]);
    std::fs::remove_file(place.path("model/tokenizer.json")).unwrap();
    both(&["tokenizer.json", "No such file"]);
}

#[test]
fn bad_arguments() {
    let place = Place::new();
    std::fs::write(place.path("R.safetensors"), "an earlier result").unwrap();
    let learn = |rest: &str, parts: &[&str]| {
        place.fails(&format!("{LEARN} {rest}"), parts);
        assert_eq!(place.read("R.safetensors"), b"an earlier result");
    };
    std::fs::write(place.path("short.txt"), "w1 w2 w3").unwrap();
    place.fails(&EVAL.replace("text.txt", "short.txt"), &["short.txt", "shorter than one window: 4 tokens, 16 are needed"]);
    place.fails(&EVAL.replace("text.txt", "absent.txt"), &["absent.txt", "No such file"]);
    place.fails(&LEARN.replace("text.txt", "short.txt"), &["short.txt", "shorter than one window"]);
    std::fs::write(place.path("bytes.txt"), b"w1 \xff").unwrap();
    place.fails(&EVAL.replace("text.txt", "bytes.txt"), &["bytes.txt", "expected UTF-8 text", "byte 3"]);

    for scheme in ["W4", "W4A4KV99", "W1A4KV4", "4-4-4"] {
        learn(&format!("--scheme {scheme}"), &["--scheme", "expected W<bits>A<bits>KV<bits>", scheme]);
    }
    place.fails(&EVAL.replace("cpu", "tpu"), &["--device: expected auto, cpu or cuda, got \"tpu\""]);
    place.fails(&format!("{EVAL} --weights awq"), &["--weights", "'awq'"]);
    place.fails(&format!("{EVAL} --online r5"), &["expected none, r3, r4 or r3,r4, got \"r5\""]);
    place.fails(&format!("{EVAL} --dtype int8"), &["--dtype", "int8"]);
    place.fails(&format!("{EVAL} --weight-group 5"), &["quantisation group: 5 does not divide rows of 24"]);
    place.fails(&format!("{EVAL} --activation-clip 1.5"), &["clip ratio: expected a number in (0, 1], got 1.5"]);
    learn("--objective mse", &["objective: expected one of cross-entropy, kl, whip, kurtosis, got \"mse\""]);
    learn("--optimizer adam", &["optimizer: expected one of cayley, cayley-parity, sgd-qr, ", "qr-orth, got \"adam\""]);
    learn("--schedule step", &["expected constant, linear or cosine, got \"step\""]);
    learn("--steps 0", &["at least 1"]);
    learn("--micro-batch 0", &["at least 1"]);
    place.fails(&LEARN.replace("--batch 4", "--batch 0"), &["at least 1"]);
    place.fails(&LEARN.replace("--batch 4", "--batch 93"), &["batch", "(92), got 93"]);
    place.fails(&LEARN.replace("--held-out 8", "--held-out 100"), &["held-out windows", "(100), got 100"]);
    learn("--start none", &["--start", "nothing to learn"]);
    learn("--lr=-1", &["learning rate", "-1"]);

    let save = |r: &Rotations| r.save(&place.path("given.safetensors")).unwrap();
    let given = |parts: &[&str]| {
        let parts = [&["given.safetensors"], parts].concat();
        place.fails(&format!("{EVAL} --rotations given.safetensors"), &parts);
        learn("--start given.safetensors", &parts);
    };
    given(&["No such file"]);
    save(&Rotations::random_hadamard(28, 8, 2, 0).unwrap());
    given(&["R1: expected shape [24, 24] for this model, got [28, 28]"]);
    save(&Rotations::random_hadamard(24, 8, 3, 0).unwrap());
    given(&["R2: expected shape [2, 8, 8] for this model, got [3, 8, 8]"]);
    let mut crooked = Rotations::random_hadamard(24, 8, 2, 0).unwrap();
    crooked.r1 = ops::add::scale(1.01, crooked.r1).unwrap();
    save(&crooked);
    given(&["R1 is not orthogonal: max|RᵀR−I| = 2.0e-2, at most 1e-4 is accepted"]);
    std::fs::write(place.path("given.safetensors"), "pickle").unwrap();
    given(&["not a whole safetensors file"]);
}

#[test]
fn unwritable_outputs() {
    let place = Place::new();
    let out = |out: &str, parts: &[&str]| place.fails(&format!("{LEARN} --steps 2").replace("R.safetensors", out), parts);
    out("absent/R.safetensors", &["absent", "No such file"]);
    out("model", &["model: is a folder"]);
    place.fails(&format!("{LEARN} --steps 2 --log absent/steps.jsonl"), &["absent", "No such file"]);
    place.fails(&format!("{LEARN} --steps 2 --log model"), &["model: is a folder"]);

    // Found out at once, not after the last step.
    let locked = place.path("locked");
    std::fs::write(&locked, "an earlier result").unwrap();
    let mut permissions = locked.metadata().unwrap().permissions();
    permissions.set_readonly(true);
    std::fs::set_permissions(&locked, permissions).unwrap();
    place.fails(
        &format!("{LEARN} --steps 1000000 --checkpoint-every 1").replace("R.safetensors", "locked"),
        &["locked: is read-only"],
    );
    assert_eq!(place.read("locked"), b"an earlier result");

    #[cfg(target_os = "linux")]
    if Path::new("/dev/full").exists() {
        std::os::unix::fs::symlink("/dev/full", place.path("full")).unwrap();
        out("full", &["full: No space left on device"]);
        // Nothing is lost: the state is still there.
        assert!(place.path("full.state").exists());
    }
}

#[test]
fn a_gpu_is_asked_for() {
    if let Ok(device) = Device::cuda(0) {
        return println!("skipped: {device} is there");
    }
    let place = Place::new();
    let reason = if cfg!(feature = "cuda") { "driver" } else { "no GPU support: rebuild with `--features cuda`" };
    place.fails(&EVAL.replace("cpu", "cuda"), &["error: cuda: ", reason]);
    place.json(&format!("{} --json", EVAL.replace("cpu", "auto")));
}

#[test]
fn quantized_models_are_written_and_read_back() {
    let place = Place::new();
    let scheme = "--scheme W4A4KV4 --rotations hadamard:3";
    let perplexity = |args: &str| number(&place.json(args), "perplexity").to_bits();
    let quantize = |rest: &str| place.run(&format!("quantize --model model --device cpu --seq-len 16 {rest}"));
    let calibration = "--calibration text.txt --calibration-windows 16";

    assert!(quantize(&format!("{scheme} --out rtn")).status.success());
    let native = perplexity("eval --model rtn --device cpu --seq-len 16 --text text.txt --json");
    assert_eq!(native, perplexity(&format!("{EVAL} {scheme} --json")), "round to nearest");

    assert!(quantize(&format!("{scheme} --weights gptq {calibration} --out gptq")).status.success());
    let native = perplexity("eval --model gptq --device cpu --seq-len 16 --text text.txt --json");
    assert_eq!(native, perplexity(&format!("{EVAL} {scheme} --weights gptq {calibration} --json")), "GPTQ");

    assert!(quantize("--scheme W16A16KV16 --online none --rotations hadamard:3 --format hf --out hf").status.success());
    let exact = number(&place.json(&format!("{EVAL} --scheme W16A16KV16 --json")), "perplexity");
    let merged =
        number(&place.json("eval --model hf --scheme W16A16KV16 --device cpu --seq-len 16 --text text.txt --json"), "perplexity");
    assert!((merged / exact - 1.0).abs() < 1e-5, "{merged} against {exact}");

    let plain = "--scheme W4A16KV16 --online none --rotations hadamard:3";
    assert!(quantize(&format!("{plain} --weights gptq {calibration} --format hf --out hf-gptq")).status.success());
    let read = |model: &str| {
        let args = format!("eval --model {model} --scheme W16A16KV16 --device cpu --seq-len 16 --text text.txt --json");
        number(&place.json(&args), "perplexity")
    };
    let gptq = number(&place.json(&format!("{EVAL} {plain} --weights gptq {calibration} --json")), "perplexity");
    assert!((read("hf-gptq") / gptq - 1.0).abs() < 1e-3, "{} against {gptq}", read("hf-gptq"));
    let record: serde_json::Value = serde_json::from_slice(&place.read("hf-gptq/spinquant.json")).unwrap();
    let provenance = &record["provenance"];
    assert_eq!((&provenance["seeds"]["rotations"], &provenance["weights"]), (&3.into(), &"gptq".into()));
    assert_eq!((&provenance["notes"]["damping"], &provenance["notes"]["device"]), (&0.01.into(), &"cpu".into()));
    assert_eq!(provenance["calibration_sha256"].as_str().map(str::len), Some(64));
    assert!(provenance["command"].as_str().unwrap().contains("--format hf"));

    let fails =
        |rest: &str, parts: &[&str]| place.fails(&format!("quantize --model model --device cpu --seq-len 16 {rest}"), parts);
    fails(&format!("{scheme} --out rtn"), &["rtn", "not empty"]);
    fails(&format!("{scheme} --weights gptq --out new"), &["--calibration"]);
    fails(
        &format!("{scheme} --weights gptq --calibration text.txt --calibration-windows 9999 --out new"),
        &["1 to 100 windows", "9999"],
    );
    fails(&format!("{scheme} --format hf --out new"), &["format hf", "r3,r4"]);
    fails(&format!("{plain} --format hf --dtype bf16 --out new"), &["--dtype", "files"]);
    assert!(!place.path("new").exists());
}

/// Killed after its first layer, into either format.
#[test]
fn a_killed_quantize_continues_to_the_same_bytes() {
    let place = Place::new();
    for (format, scheme) in [("native", "--scheme W4A4KV4"), ("hf", "--scheme W4A16KV16 --online none")] {
        let args = |out: &str| {
            format!(
                "quantize --model model --device cpu --seq-len 16 {scheme} --rotations hadamard:3 --weights gptq \
                 --calibration text.txt --calibration-windows 100 --format {format} --out {out}"
            )
        };
        let tensors = |out: &str| place.read(&format!("{out}/model.safetensors"));
        assert!(place.run(&args("whole")).status.success());
        let mut landed = false;
        for _ in 0..20 {
            let mut child = place.command(&args("out")).spawn().unwrap();
            let first = place.path(".out.partial/layer-00000.safetensors");
            while !first.exists() && child.try_wait().unwrap().is_none() {
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
            let _ = child.kill();
            child.wait().unwrap();
            landed = !place.path("out").exists() && first.exists();
            if landed {
                break;
            }
            let _ = std::fs::remove_dir_all(place.path("out"));
        }
        assert!(landed, "never killed between the first layer and the end");
        assert!(place.run(&args("out")).status.success());
        assert!(tensors("out") == tensors("whole"), "{format}: tensors differ after continuing");
        assert!(!place.path(".out.partial").exists());
        // Other settings do not continue it.
        let mut child = place.command(&args("other")).spawn().unwrap();
        while !place.path(".other.partial/run.json").exists() && child.try_wait().unwrap().is_none() {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        let _ = child.kill();
        child.wait().unwrap();
        if !place.path("other").exists() {
            place
                .fails(&format!("{} --damping 0.02", args("other")), &["unfinished output of another run", "provenance differs"]);
        }
        for dir in ["whole", "out", "other", ".other.partial"] {
            let _ = std::fs::remove_dir_all(place.path(dir));
        }
    }
}

#[test]
fn rotations_are_checked_and_translated() {
    let place = Place::new();
    let rotations = Rotations::random_orthogonal(24, 8, 2, 5).unwrap().to_dtype(spinquant::DType::F32).unwrap();
    rotations.save(&place.path("R.safetensors")).unwrap();
    for args in ["rotations convert R.safetensors R.bin", "rotations convert R.bin again.safetensors"] {
        assert!(place.run(args).status.success(), "{args}");
    }
    let again = Rotations::load(&place.path("again.safetensors")).unwrap();
    let error = |a: &Tensor, b: &Tensor| {
        let (a, b) = (a.to_f64_vec().unwrap(), b.to_f64_vec().unwrap());
        a.iter().zip(&b).fold(0f64, |m, (a, b)| m.max((a - b).abs()))
    };
    assert!(error(&rotations.r1, &again.r1) < 1e-6 && error(&rotations.r2, &again.r2) < 1e-6);
    let report = String::from_utf8(place.run("rotations check R.bin").stdout).unwrap();
    assert_eq!(report.lines().count(), 3, "{report}");
    assert!(report.lines().all(|l| l.contains("max|RᵀR−I|") && l.contains("det")), "{report}");

    let bent = Rotations { r1: ops::randn([24, 24], 1), r2: rotations.r2.to_dtype(spinquant::DType::F64).unwrap() };
    bent.save(&place.path("bent.safetensors")).unwrap();
    let out = place.run("rotations check bent.safetensors");
    assert!(!out.status.success() && String::from_utf8_lossy(&out.stderr).contains("R1 is not orthogonal"));
    place.fails("rotations convert bent.safetensors bent.bin", &["bent.safetensors", "R1"]);
    assert!(!place.path("bent.bin").exists());
}
