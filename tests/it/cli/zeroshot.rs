//! `zeroshot`: its table, its answers file, and what it refuses.

use std::ops::ControlFlow;

use spinquant::data::{Bos, Tokenizer};
use spinquant::eval::{answers::Answers, exam::Exam, tasks::Questions};
use spinquant::llama::Llama;
use spinquant::quant::Scheme;
use spinquant::{DType, Device};

use super::*;

const ZEROSHOT: &str = "zeroshot --model model --device cpu --tasks tasks";
const EIGHT: [&str; 8] = ["boolq", "piqa", "social_iqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa"];

/// Questions of the tiny model's words: contexts of up to `longest` words.
fn questions(count: usize, choices: usize, longest: usize) -> String {
    let words =
        |from: usize, n: usize| (0..n).map(|i| format!("w{}", (from * 7 + i * i + 3 * i) % 30)).collect::<Vec<_>>().join(" ");
    let question = |i: usize| {
        let choices: Vec<String> = (0..choices).map(|c| words(i + 11 * c, 1 + (i + c) % 3)).collect();
        json!({"context": words(i, 3 + i * 5 % longest), "choices": choices, "gold": i % choices.len()}).to_string() + "\n"
    };
    (0..count).map(question).collect()
}

/// All eight tasks in one folder.
fn eight(place: &Place) {
    std::fs::create_dir(place.path("tasks")).unwrap();
    for (i, name) in EIGHT.iter().enumerate() {
        std::fs::write(place.path(&format!("tasks/{name}.jsonl")), questions(12 + i, 2 + i % 3, 20)).unwrap();
    }
}

/// A task that takes many passes.
fn long(place: &Place) {
    std::fs::create_dir(place.path("tasks")).unwrap();
    std::fs::write(place.path("tasks/long.jsonl"), questions(1500, 2, 60)).unwrap();
}

/// What a report says, but for how long it took and how much of it was asked.
fn scores(mut report: Value) -> Value {
    ["seconds", "asked"].iter().for_each(|name| report[*name] = Value::Null);
    report
}

#[test]
fn eight_tasks_of_one_folder() {
    let place = Place::new();
    eight(&place);
    let args = format!("{ZEROSHOT} --scheme W4A4KV4 --rotations hadamard:3");
    let report = place.json(&format!("{args} --out answers.jsonl --json"));
    let tasks = report["tasks"].as_array().unwrap();
    assert_eq!(tasks.iter().map(|t| t["task"].as_str().unwrap()).collect::<Vec<_>>(), EIGHT);
    assert_eq!(
        (&report["scheme"], &report["rotations"], &report["weights"]),
        (&json!("W4A4KV4"), &json!("hadamard:3"), &json!("rtn"))
    );
    let requests: usize = (0..8).map(|i| (12 + i) * (2 + i % 3)).sum();
    assert_eq!((number(&report, "requests"), number(&report, "asked")), (requests as f64, requests as f64));
    for (i, task) in tasks.iter().enumerate() {
        assert_eq!(number(task, "questions"), (12 + i) as f64);
        assert!(number(task, "gold") < 0.0 && number(task, "gold_stderr") > 0.0, "{task}");
        let (acc, n) = (number(task, "acc"), (12 + i) as f64);
        assert!((acc * n - (acc * n).round()).abs() < 1e-9 && (0.0..=1.0).contains(&acc), "{task}");
        // Sample standard deviation over √n, of zeros and ones.
        assert!((number(task, "acc_stderr") - (acc * (1.0 - acc) / (n - 1.0)).sqrt()).abs() < 1e-12, "{task}");
        assert_eq!(task["acc_norm"].is_null(), ["boolq", "social_iqa", "winogrande"].contains(&EIGHT[i]), "{task}");
    }
    let mean = |of: &dyn Fn(&Value) -> f64| tasks.iter().map(of).sum::<f64>() / 8.0;
    assert!((number(&report["mean"], "acc") - mean(&|t| number(t, "acc"))).abs() < 1e-12);
    let norm = |t: &Value| t["acc_norm"].as_f64().unwrap_or_else(|| number(t, "acc"));
    assert!((number(&report["mean"], "acc_norm") - mean(&norm)).abs() < 1e-12);

    // The same through the library.
    let dir = place.path("model");
    let model = Llama::load(&dir, DType::F32, &Device::Cpu).unwrap();
    let rotations = Rotations::random_hadamard(24, 8, 2, 3).unwrap();
    let network = model.merge(Some(&rotations), &Scheme::new(4, 4, 4)).unwrap();
    let all = Questions::read_all(place.path("tasks")).unwrap();
    let exam = Exam::new(all, &Tokenizer::from_dir(&dir).unwrap(), Bos::Auto, &model.config).unwrap();
    let mut answers = Answers::new(exam.tasks());
    exam.ask(&network, &mut answers, |_| ControlFlow::Continue(())).unwrap();
    let ours = exam.report(&exam.marks(&answers).unwrap());
    assert_eq!((ours.acc.mean, ours.gold.mean), (number(&report["mean"], "acc"), number(&report["mean"], "gold")));
    // The file holds every log-likelihood to the bit.
    let file = String::from_utf8(place.read("answers.jsonl")).unwrap();
    let mut held = 0;
    for line in file.lines().skip(1).map(|l| serde_json::from_str::<Value>(l).unwrap()) {
        for answer in line["log_likelihoods"].as_array().unwrap() {
            let task = EIGHT.iter().position(|name| answer[0] == *name).unwrap();
            let (number, values) = (answer[1].as_u64().unwrap() as usize, answer[2].as_array().unwrap());
            let want = &answers.of_task(task).unwrap()[number * values.len()..][..values.len()];
            assert_eq!(values.iter().map(|v| v.as_f64().unwrap()).collect::<Vec<_>>(), want);
            held += values.len();
        }
    }
    assert_eq!(held, requests);

    // For people; without a file nothing is written.
    let out = place.run(&args);
    let text = String::from_utf8(out.stdout).unwrap();
    assert!(out.status.success() && text.starts_with("W4A4KV4, rotations hadamard:3, weights rtn\n"), "{text}");
    let row = text.lines().find(|l| l.starts_with("mean of 8 ")).unwrap_or_else(|| panic!("{text}"));
    assert!(row.contains(&format!("{:.4} ± ", ours.acc.mean)) && row.matches('±').count() == 3, "{row}");
    assert!(text.lines().any(|l| l.starts_with("boolq ") && l.matches('±').count() == 2), "{text}");
}

#[test]
fn a_limit_asks_the_first_questions() {
    let place = Place::new();
    eight(&place);
    let first = |name: &str, count: usize| -> String {
        let text = String::from_utf8(place.read(&format!("tasks/{name}.jsonl"))).unwrap();
        text.lines().take(count).map(|l| format!("{l}\n")).collect()
    };
    for name in ["piqa", "mine"] {
        std::fs::write(place.path(&format!("{name}.jsonl")), first("piqa", 5)).unwrap();
    }
    let run = |rest: &str| place.json(&format!("zeroshot --model model --device cpu --json --tasks {rest}"));
    let limited = run("tasks/piqa.jsonl tasks/boolq.jsonl --limit 5");
    assert_eq!(limited["tasks"][0], run("piqa.jsonl")["tasks"][0]);
    assert_eq!(limited["tasks"][1]["task"], "boolq");
    // A limit above the number of questions asks all; a task of one's own goes by its file's name.
    let mine = run("mine.jsonl --limit 1000");
    assert_eq!((&mine["tasks"][0]["task"], number(&mine["tasks"][0], "questions")), (&json!("mine"), 5.0));
    assert_eq!(mine["tasks"][0]["gold"], limited["tasks"][0]["gold"]);
    // One question has no standard error.
    let one = run("mine.jsonl --limit 1");
    assert!(one["tasks"][0]["acc_stderr"].is_null() && one["mean"]["gold_stderr"].is_null(), "{one}");
}

/// Starts a run, ends it by `end` once a few lines of answers are there, and returns what it printed.
fn end_early(place: &Place, args: &str, end: impl FnOnce(&mut std::process::Child)) -> Output {
    let mut child = place.command(args).spawn().unwrap();
    while std::fs::read(place.path("answers.jsonl")).map_or(0, |b| b.iter().filter(|b| **b == b'\n').count()) < 3 {
        assert!(child.try_wait().unwrap().is_none(), "ended by itself");
        std::thread::sleep(Duration::from_millis(1));
    }
    end(&mut child);
    let out = child.wait_with_output().unwrap();
    assert!(!out.status.success(), "the run was over before it could be ended");
    out
}

#[test]
fn a_run_that_was_ended_resumes_to_the_same_bytes() {
    let place = Place::new();
    long(&place);
    let args = format!("{ZEROSHOT} --rotations hadamard --out answers.jsonl --json");
    let whole = place.json(&args);
    let want = place.read("answers.jsonl");
    assert!(want.iter().filter(|b| **b == b'\n').count() > 8, "too few passes to be interrupted");
    std::fs::remove_file(place.path("answers.jsonl")).unwrap();

    // Killed, perhaps in the middle of a line.
    end_early(&place, &args, |child| child.kill().unwrap());
    let mut part = place.read("answers.jsonl");
    part.extend(b"{\"log_likelihoods\":[[\"lo");
    std::fs::write(place.path("answers.jsonl"), &part).unwrap();
    place.fails(&args, &["--out: answers.jsonl is there already; --resume continues"]);
    let resume = format!("{args} --resume");
    for (change, part) in [
        ("--rotations hadamard:1", "rotations was \"hadamard:0\", now \"hadamard:1\""),
        ("--scheme W8A8KV8", "bits was \"W4A4KV4\", now \"W8A8KV8\""),
        ("--limit 700", "task long was \"1500 questions, "),
        ("--bos none", "bos was \"auto\", now \"none\""),
        ("--no-clip-search", "scheme.weight_clip was"),
        ("--dtype bf16", "dtype was \"f32\", now \"bf16\""),
    ] {
        let resume = if change.starts_with("--rotations") {
            resume.replace("--rotations hadamard", change)
        } else {
            format!("{resume} {change}")
        };
        place.fails(&resume, &["answers.jsonl: answers of another run", part]);
    }
    let other = place.path("model/model.safetensors");
    let weights = std::fs::read(&other).unwrap();
    let mut changed = tensors();
    changed.insert("model.layers.1.mlp.up_proj.weight".into(), ops::randn([56, 24], 77));
    write(&other, &changed, Dtype::F32);
    place.fails(&resume, &["answers.jsonl: answers of another run: weights was"]);
    std::fs::write(&other, weights).unwrap();
    let resumed = place.json(&resume);
    assert_eq!(scores(resumed.clone()), scores(whole.clone()));
    let asked = number(&resumed, "asked");
    assert!(asked > 0.0 && asked < number(&whole, "asked"), "{resumed}");
    assert!(place.read("answers.jsonl") == want, "the files differ");
    // Nothing is left to ask.
    assert_eq!(number(&place.json(&resume), "asked"), 0.0);
    assert!(place.read("answers.jsonl") == want);

    #[cfg(unix)]
    {
        std::fs::remove_file(place.path("answers.jsonl")).unwrap();
        let interrupt = |child: &mut std::process::Child| {
            assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
        };
        let out = end_early(&place, &args, interrupt);
        let stderr = String::from_utf8_lossy(&out.stderr);
        assert!(out.status.code() == Some(130) && stderr.contains("answers.jsonl: continue with --resume"), "{stderr}");
        assert_eq!(scores(place.json(&resume)), scores(whole));
        assert!(place.read("answers.jsonl") == want);
    }
}

#[test]
fn a_written_model_is_asked_as_written() {
    let place = Place::new();
    eight(&place);
    place.run("quantize --model model --device cpu --rotations hadamard:2 --out q");
    let written = place.json(&format!("{} --json", ZEROSHOT.replace("--model model", "--model q")));
    let direct = place.json(&format!("{ZEROSHOT} --rotations hadamard:2 --json"));
    assert_eq!(scores(written), scores(direct));
}

#[test]
fn what_is_refused_before_the_model_is_read() {
    let place = Place::new();
    eight(&place);
    std::fs::write(place.path("model/model.safetensors"), "no weights").unwrap();
    std::fs::create_dir(place.path("empty")).unwrap();
    let good = "{\"context\": \"w1\", \"choices\": [\"w2\", \"w3\"], \"gold\": 1}\n";
    let file = |name: &str, text: &str| std::fs::write(place.path(name), text).unwrap();
    file("bad.jsonl", &format!("{good}{{\"context\": \"w1\", \"choices\": [\"w2\", \"w3\"], \"gold\": 2}}\n"));
    file("text.jsonl", "w1 w2\n");
    file("none.jsonl", "");
    file("boolq.jsonl", good);
    file("answers.jsonl", "a picture\n");
    file("long.jsonl", &good.replace("w2", &"w2 ".repeat(5000)));
    let zeroshot = |rest: &str, parts: &[&str]| place.fails(&format!("zeroshot --model model --device cpu {rest}"), parts);
    zeroshot("", &["--tasks: expected files or folders"]);
    zeroshot("--tasks absent", &["absent: No such file"]);
    zeroshot("--tasks empty", &["empty: expected *.jsonl files of tasks in this folder, found none"]);
    zeroshot("--tasks bad.jsonl", &["bad.jsonl: line 2: question: expected a gold answer below 2, got 2"]);
    zeroshot("--tasks text.jsonl", &["text.jsonl: line 1: expected a JSON object"]);
    zeroshot("--tasks none.jsonl", &["none.jsonl: expected one JSON object a line, got an empty file"]);
    zeroshot("--tasks tasks boolq.jsonl", &["tasks: expected every task once, got boolq twice"]);
    zeroshot("--tasks boolq.jsonl boolq.jsonl", &["got boolq twice"]);
    zeroshot("--tasks long.jsonl", &["task long: question 0: choice: expected at most 2048 tokens"]);
    zeroshot("--tasks tasks --limit 0", &["--limit", "at least 1, got 0"]);
    zeroshot("--tasks tasks --weights gptq", &["needs --calibration FILE"]);
    zeroshot("--tasks tasks --rotations absent.safetensors", &["absent.safetensors: No such file"]);
    zeroshot("--tasks tasks --out absent/answers.jsonl", &["absent/answers.jsonl", "No such file"]);
    zeroshot("--tasks tasks --out model/config.json", &["is a file of the model"]);
    zeroshot("--tasks boolq.jsonl --out boolq.jsonl --resume", &["boolq.jsonl is the file of --tasks"]);
    zeroshot("--tasks tasks --out answers.jsonl --resume", &["answers.jsonl: expected a file of answers, got something else"]);
    zeroshot("--tasks tasks --resume", &["required arguments"]);
    assert_eq!(place.read("answers.jsonl"), b"a picture\n");
    place.fails("zeroshot --model synthetic:tiny --device cpu --tasks tasks", &["synthetic:tiny, which has none"]);
    std::fs::remove_file(place.path("model/tokenizer.json")).unwrap();
    zeroshot("--tasks tasks", &["tokenizer.json", "No such file"]);
}

#[test]
fn compare_adds_tasks_and_paired_differences() {
    let place = Place::new();
    eight(&place);
    let args = format!("compare {MODEL} --calibration text.txt --text text.txt --seeds 2 --steps 2 --batch 4 --held-out 8");
    let plain = place.json(&format!("{args} --json"));
    assert!(plain["rows"].as_array().unwrap().iter().all(|row| row["zeroshot"].is_null()), "{plain}");
    let table = place.json(&format!("{args} --tasks tasks --limit 10 --json"));
    let rows = table["rows"].as_array().unwrap();
    let row = |name: &str| rows.iter().find(|r| r["name"] == name).unwrap_or_else(|| panic!("no row {name}"));
    // Perplexities are as they were.
    let perplexities =
        |t: &Value| -> Vec<f64> { t["rows"].as_array().unwrap().iter().map(|r| number(r, "perplexity")).collect() };
    assert_eq!(perplexities(&table), perplexities(&plain));
    let alone = |rest: &str| place.json(&format!("{ZEROSHOT} --limit 10 --json {rest}"));
    let (full, rtn) = (alone("--scheme W16A16KV16"), alone("--rotations none"));
    let seeds = [alone("--rotations hadamard:0"), alone("--rotations hadamard:1")];
    for (name, want) in [("full precision", &full), ("rtn", &rtn)] {
        let got = &row(name)["zeroshot"];
        assert_eq!((&got["tasks"], &got["mean"]), (&want["tasks"], &want["mean"]), "{name}");
    }
    for (seed, want) in seeds.iter().enumerate() {
        assert_eq!(table["hadamard"][seed]["zeroshot"]["tasks"], want["tasks"]);
    }
    // A mean over seeds, and differences question by question: their mean is the difference of the means.
    let close = |a: f64, b: f64| assert!((a - b).abs() < 1e-9, "{a}, not {b}");
    let zero = &row("full precision")["zeroshot"]["minus_full_precision"]["mean"];
    for what in ["acc", "acc_norm", "gold"] {
        let mean = |of: &Value| number(&of["mean"], what);
        let hadamard = &row("hadamard mean")["zeroshot"];
        close(mean(hadamard), (mean(&seeds[0]) + mean(&seeds[1])) / 2.0);
        close(mean(&hadamard["minus_full_precision"]), mean(hadamard) - mean(&full));
        assert_eq!((number(zero, what), number(zero, &format!("{what}_stderr"))), (0.0, 0.0));
    }
    // Networks that are nearly the same answer nearly the same: pairing tells more than the two standard errors would.
    let paired = &row("rtn")["zeroshot"]["minus_full_precision"]["mean"];
    let apart = number(&full["mean"], "gold_stderr").hypot(number(&rtn["mean"], "gold_stderr"));
    assert!(number(paired, "gold_stderr") > 0.0 && number(paired, "gold_stderr") < apart, "{paired}, not below {apart}");
    assert!(table["learned"][0]["zeroshot"]["mean"]["acc"].is_number(), "{table}");

    let out = place.run(&format!("{args} --tasks tasks/boolq.jsonl tasks/piqa.jsonl"));
    let text = String::from_utf8(out.stdout).unwrap();
    assert!(out.status.success() && text.contains("zero-shot, mean of 2 tasks"), "{text}");
    assert_eq!(text.lines().filter(|l| l.starts_with("hadamard worst ")).count(), 3, "perplexity, means, accuracies: {text}");
    std::fs::write(place.path("model/model.safetensors"), "no weights").unwrap();
    place.fails(&format!("{args} --tasks absent"), &["absent: No such file"]);
    place.fails(&format!("{args} --limit 3"), &["required arguments"]);
}
