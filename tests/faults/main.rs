//! Every command that writes files, with a fault at one of its system calls: a write, sync, rename, removal or the like fails, or the
//! process is killed before or behind it. What is left is the old output or the new one, or the same command makes the new one of it.
//!
//! A sample of the calls is tried; `SPINQUANT_FAULTS=all` tries all of them.
#![cfg(all(target_os = "linux", feature = "cli"))]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::LazyLock;

use spinquant::DType;
use tempfile::TempDir;

mod ranks;
mod signals;

#[path = "../common/tiny.rs"]
#[allow(dead_code)]
mod tiny;

/// The library to preload, compiled once.
static SHIM: LazyLock<PathBuf> = LazyLock::new(|| {
    let path = std::env::temp_dir().join(format!("spinquant-faults-{}.so", std::process::id()));
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/faults/faults.c");
    let compiled = Command::new("cc").args(["-O1", "-shared", "-fPIC", "-o"]).arg(&path).args([source, "-ldl"]).status();
    assert!(compiled.expect("a C compiler named cc").success(), "{source} does not compile");
    path
});

const ACTIONS: [&str; 4] = ["before", "after", "eio", "enospc"];

/// Files by name, or what a link or folder is.
type Contents = BTreeMap<String, Vec<u8>>;

/// A model and a text in `in`, and `out`, where faults happen.
struct Place(TempDir);

impl Place {
    fn new() -> Self {
        let place = Self(tempfile::tempdir().unwrap());
        let model = place.path("in/model");
        tiny::write(&model, &tiny::config(4, 2, false), DType::F32, 9, false);
        let vocab: BTreeMap<String, u32> = (0..31).map(|i| (format!("w{i}"), i)).collect();
        let tokenizer = serde_json::json!({
            "version": "1.0", "added_tokens": [], "normalizer": null, "pre_tokenizer": {"type": "WhitespaceSplit"}, "decoder": null,
            "truncation": null, "padding": null, "post_processor": null,
            "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "w1"},
        });
        std::fs::write(model.join("tokenizer.json"), tokenizer.to_string()).unwrap();
        let text: String = (0..400u32).map(|i| format!("w{} ", (i * i * 7 + i / 3) % 31)).collect();
        std::fs::write(place.path("in/text.txt"), text).unwrap();
        place.clear();
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn clear(&self) {
        let _ = std::fs::remove_dir_all(self.path("out"));
        std::fs::create_dir_all(self.path("out")).unwrap();
    }

    fn command(&self, args: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_spinquant"));
        command.args(args.split_whitespace()).current_dir(self.path("out")).env("RAYON_NUM_THREADS", "1");
        command
    }

    fn run(&self, args: &str) -> Output {
        self.command(args).output().unwrap()
    }

    fn succeeds(&self, args: &str) {
        let out = self.run(args);
        assert!(out.status.success(), "{args}: {}", String::from_utf8_lossy(&out.stderr));
    }

    /// Runs with the `at`-th call failing; no panic comes of it.
    fn faulty(&self, args: &str, at: usize, action: &str) -> Output {
        let out = self.shimmed(args).env("FAULT_AT", at.to_string()).env("FAULT_ACTION", action).output().unwrap();
        let stderr = String::from_utf8_lossy(&out.stderr);
        assert!(out.status.code() != Some(101) && !stderr.contains("panicked"), "{args}: call {at}, {action}: {stderr}");
        out
    }

    fn shimmed(&self, args: &str) -> Command {
        let mut command = self.command(args);
        command.env("LD_PRELOAD", &*SHIM).env("FAULT_PREFIX", self.path("out").canonicalize().unwrap());
        command
    }

    /// How many calls a whole run makes.
    fn calls(&self, args: &str) -> usize {
        let log = self.path("calls");
        let _ = std::fs::remove_file(&log);
        let out = self.shimmed(args).env("FAULT_LOG", &log).output().unwrap();
        assert!(out.status.success(), "{args}: {}", String::from_utf8_lossy(&out.stderr));
        let calls = std::fs::read_to_string(&log).expect("calls were counted").lines().count();
        assert!(calls > 3, "{args}: only {calls} calls were seen");
        calls
    }

    /// A file, or a folder's files, hidden ones too; `None` where there is nothing, as in an empty folder: outputs go there too.
    fn read(&self, name: &str) -> Option<Contents> {
        fn walk(path: &Path, name: String, found: &mut Contents) {
            if path.is_dir() {
                for entry in std::fs::read_dir(path).unwrap() {
                    let entry = entry.unwrap();
                    walk(&entry.path(), format!("{name}/{}", entry.file_name().to_string_lossy()), found);
                }
            } else {
                found.insert(name, std::fs::read(path).unwrap());
            }
        }
        let path = self.path("out").join(name);
        let mut found = Contents::new();
        path.exists().then(|| walk(&path, String::new(), &mut found))?;
        (!found.is_empty()).then_some(found)
    }

    /// What is in `out` besides these.
    fn others(&self, known: &[&str]) -> Vec<String> {
        let names = std::fs::read_dir(self.path("out")).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
        names.filter(|name| !known.contains(&name.as_str()) && !name.ends_with(".rescued")).collect()
    }
}

/// The calls to try, of so many: a few spread over all, each with every action in turn; or all with all.
fn chosen(calls: usize) -> Vec<(usize, &'static str)> {
    if std::env::var("SPINQUANT_FAULTS").is_ok_and(|v| v == "all") {
        return (1..=calls).flat_map(|at| ACTIONS.map(|action| (at, action))).collect();
    }
    (0..8).map(|i| (1 + i * (calls - 1) / 7, ACTIONS[i % 4])).collect()
}

/// A command and what it leaves.
struct Case<'a> {
    /// Makes the old output.
    old: Option<&'a str>,
    /// What gets the fault.
    args: &'a str,
    /// The same command for the second time.
    again: &'a str,
    /// What is compared.
    output: &'a str,
    /// What else may stay.
    known: &'a [&'a str],
    /// False where the new output may be there in part until the command was run again.
    at_once: bool,
}

fn check(case: &Case<'_>) {
    let place = Place::new();
    let prepare = || {
        place.clear();
        case.old.into_iter().for_each(|args| place.succeeds(args));
    };
    prepare();
    let old = place.read(case.output);
    let calls = place.calls(case.args);
    let new = place.read(case.output).expect("an output");
    assert!(old.as_ref() != Some(&new), "nothing would be seen");
    let chosen = chosen(calls);
    println!("{}: {} faults at {calls} calls", case.args, chosen.len());
    for (at, action) in chosen {
        prepare();
        let what = format!("{}: call {at} of {calls}, {action}", case.args);
        let first = place.faulty(case.args, at, action);
        let left = place.read(case.output);
        let whole = left == old || left.as_ref() == Some(&new);
        assert!(!case.at_once || whole, "{what}: neither old nor new");
        assert!(!first.status.success() || left.as_ref() == Some(&new), "{what}: exit 0 without the output");
        let second = place.run(case.again);
        // What is complete needs no second run.
        let complete = left.as_ref() == Some(&new) && String::from_utf8_lossy(&second.stderr).contains("not empty");
        assert!(second.status.success() || complete, "{what}: {}", String::from_utf8_lossy(&second.stderr));
        assert!(place.read(case.output).as_ref() == Some(&new), "{what}: other bytes in the end");
        if second.status.success() {
            let known: Vec<&str> = [case.output].iter().chain(case.known).copied().collect();
            assert_eq!(place.others(&known), Vec::<String>::new(), "{what}: left behind");
        }
    }
}

const QUANTIZE: &str = "quantize --model ../in/model --device cpu --seq-len 8 --out q";

#[test]
fn quantize_to_nearest() {
    let args = format!("{QUANTIZE} --rotations hadamard:0");
    check(&Case { old: None, args: &args, again: &args, output: "q", known: &[], at_once: true });
}

#[test]
fn quantize_over_an_old_output() {
    let old = format!("{QUANTIZE} --rotations hadamard:1");
    let args = format!("{QUANTIZE} --rotations hadamard:0 --overwrite");
    check(&Case { old: Some(&old), args: &args, again: &args, output: "q", known: &[], at_once: true });
}

#[test]
fn quantize_with_gptq() {
    let gptq = format!("{QUANTIZE} --rotations hadamard:0 --weights gptq --calibration ../in/text.txt --calibration-windows 8");
    check(&Case { old: None, args: &gptq, again: &gptq, output: "q", known: &[], at_once: true });
    let hf = format!("{gptq} --format hf --scheme W4A16KV16 --online none");
    check(&Case { old: None, args: &hf, again: &hf, output: "q", known: &[], at_once: true });
}

/// As into a mount point.
#[test]
fn quantize_into_a_folder_that_cannot_be_renamed() {
    let place = Place::new();
    let args = format!("{QUANTIZE} --rotations hadamard:0");
    let prepare = || {
        place.clear();
        std::fs::create_dir_all(place.path("out/q/.spinquant.partial")).unwrap();
    };
    prepare();
    let calls = place.calls(&args);
    let new = place.read("q").unwrap();
    for (at, action) in chosen(calls) {
        prepare();
        let what = format!("call {at} of {calls}, {action}");
        place.faulty(&args, at, action);
        let record = place.path("out/q/spinquant.json");
        let whole = |contents: Option<Contents>| {
            let visible = contents.unwrap_or_default().into_iter().filter(|(name, _)| !name.contains(".partial"));
            visible.collect::<Contents>() == new
        };
        assert!(!record.exists() || whole(place.read("q")), "{what}: half of an output is taken for one");
        let second = place.run(&args);
        let complete = record.exists() && String::from_utf8_lossy(&second.stderr).contains("not empty");
        assert!(second.status.success() || complete, "{what}: {}", String::from_utf8_lossy(&second.stderr));
        assert!(whole(place.read("q")), "{what}: other bytes in the end");
    }
}

/// Whatever a killed run left: the next, of other rotations, has none of it.
#[test]
fn quantize_never_takes_the_layers_of_another_run() {
    let place = Place::new();
    let (first, other) = (format!("{QUANTIZE} --rotations hadamard:0"), format!("{QUANTIZE} --rotations hadamard:1 --overwrite"));
    place.succeeds(&other);
    let new = place.read("q").unwrap();
    place.clear();
    let calls = place.calls(&first);
    for (at, action) in chosen(calls) {
        place.clear();
        place.faulty(&first, at, action);
        place.succeeds(&other);
        assert!(place.read("q").as_ref() == Some(&new), "call {at} of {calls}, {action}: mixed layers");
    }
}

const TEXT: &str = "--model ../in/model --device cpu --seq-len 8 --text ../in/text.txt";

#[test]
fn learn() {
    let learn = format!("learn {TEXT} --batch 2 --held-out 2 --steps 3 --clip none --out R.safetensors");
    let old = format!("{learn} --seed 1");
    let args = format!("{learn} --checkpoint-every 1 --log log --resume");
    // The state stays where only its removal failed; the next run begins from it and removes it.
    let known = &["log", "R.safetensors.state"];
    check(&Case { old: Some(&old), args: &args, again: &args, output: "R.safetensors", known, at_once: true });
}

#[test]
fn clip() {
    let clip = format!("clip {TEXT} --windows 2 --out C.safetensors");
    let (old, args) = (format!("{clip} --rotations hadamard:1"), format!("{clip} --rotations hadamard:0"));
    check(&Case { old: Some(&old), args: &args, again: &args, output: "C.safetensors", known: &[], at_once: true });
}

#[test]
fn rotations_convert() {
    let dir = tempfile::tempdir().unwrap();
    for seed in [0, 1] {
        let rotations = spinquant::rotation::Rotations::random_hadamard(16, 8, 2, seed).unwrap();
        rotations.to_dtype(DType::F32).unwrap().save(&dir.path().join(format!("{seed}.safetensors"))).unwrap();
    }
    for to in ["R.bin", "R.safetensors"] {
        let convert = |seed| format!("rotations convert {}/{seed}.safetensors {to}", dir.path().display());
        let (old, args) = (convert(1), convert(0));
        check(&Case { old: Some(&old), args: &args, again: &args, output: to, known: &[], at_once: true });
    }
}

#[test]
fn inspect() {
    let inspect = format!("inspect {TEXT} --windows 1 --out seen");
    let (old, args) = (format!("{inspect} --rotations hadamard:1"), format!("{inspect} --rotations hadamard:0"));
    check(&Case { old: Some(&old), args: &args, again: &args, output: "seen", known: &[], at_once: false });
}

/// Its tables hold times, so no two are equal: it ends without a panic, and again leaves all files and nothing else.
#[test]
fn race() {
    let place = Place::new();
    let args = "race --model ../in/model --device cpu --seq-len 8 --calibration ../in/text.txt --text ../in/text.txt --steps 2 \
                --entries hadamard,cayley --batch 2 --held-out 2 --max-windows 4 --out raced";
    let names = |place: &Place| place.read("raced").unwrap().into_keys().collect::<Vec<_>>();
    let calls = place.calls(args);
    let all = names(&place);
    for (at, action) in chosen(calls) {
        place.clear();
        place.faulty(args, at, action);
        place.succeeds(args);
        assert_eq!(names(&place), all, "call {at} of {calls}, {action}");
    }
}
