//! Synthetic models: they predict their own text, have outliers, lose by quantisation, and are the same on every device.

use std::ops::ControlFlow::Continue;

use spinquant::eval::perplexity;
use spinquant::llama::{Family, LlamaConfig, synthetic};
use spinquant::quant::{Scheme, Site};
use spinquant::rotation::Rotations;
use spinquant::{DType, Device, Tape};

use crate::common::{distance, tiny};

#[test]
fn names() {
    for name in synthetic::NAMES {
        let config = synthetic::shape(name).unwrap();
        assert_eq!(synthetic::shape(&format!("{name}:3")).unwrap().layers, 3, "{name}");
        assert!(config.hidden_size >= 64);
    }
    let weights = |name| {
        let c = synthetic::shape(name).unwrap();
        let (h, kv) = (c.heads * c.head_dim, c.kv_heads * c.head_dim);
        let layer = 2 * c.hidden_size * (h + kv) + 3 * c.hidden_size * c.intermediate_size;
        (c.layers * layer + c.vocab_size * c.hidden_size * if c.tie_word_embeddings { 1 } else { 2 }) as f64 / 1e9
    };
    for (name, billions) in [
        ("llama-2-7b", 6.74),
        ("llama-2-13b", 13.02),
        ("llama-2-70b", 68.98),
        ("llama-3-8b", 8.03),
        ("llama-3-70b", 70.55),
        ("llama-3.2-1b", 1.24),
        ("llama-3.2-3b", 3.21),
        ("mistral-7b", 7.24),
        ("qwen2.5-7b", 7.62),
        ("qwen3-8b", 8.19),
    ] {
        assert!((weights(name) - billions).abs() < 0.01, "{name}: {}", weights(name));
    }
    let message = synthetic::shape("gpt-2").unwrap_err().to_string();
    assert!(message.contains("llama-2-7b") && message.contains("gpt-2"), "{message}");
    assert!(synthetic::shape("tiny:none").is_err() && synthetic::shape("tiny:0").is_err());
}

/// Families have their biases, norms, joined weights and windows in memory as in files, and rotations leave them alone.
#[test]
fn of_every_family() {
    for family in Family::ALL {
        let config = tiny::of_family(synthetic::shape("tiny").unwrap(), family);
        let model = synthetic::model(&config, 7, DType::F32, &Device::Cpu).unwrap();
        for (linear, l) in model.blocks[0].weights.iter() {
            assert_eq!((l.bias.is_some(), l.norm.is_some()), (linear.has_bias(&config), linear.has_norm(&config)), "{family:?}");
        }
        let tokens: Vec<u32> = (0..32).map(|i| i * 7 % 256).collect();
        let logits = |r: Option<&Rotations>| {
            model.merge(r, &Scheme::FULL_PRECISION).unwrap().logits(&tokens, 16).unwrap().to_f64_vec().unwrap()
        };
        let r = Rotations::random_hadamard(config.hidden_size, config.head_dim, config.layers, 0).unwrap();
        let (want, most) = (logits(None), |x: &[f64]| x.iter().fold(0.0, |m, x| f64::max(m, x.abs())));
        assert!(distance(&logits(Some(&r)), &want) < 1e-3 * most(&want), "{family:?}");
    }
}

#[test]
fn predicts_its_text_and_suffers_from_quantisation() {
    let config = LlamaConfig {
        hidden_size: 512,
        intermediate_size: 1376,
        layers: 8,
        heads: 8,
        kv_heads: 8,
        head_dim: 64,
        vocab_size: 2048,
        ..synthetic::shape("tiny").unwrap()
    };
    let model = synthetic::model(&config, 7, DType::F32, &Device::Cpu).unwrap();
    let text = synthetic::text(&config, 4, 128, 1).unwrap();
    let score = |rotations: Option<&Rotations>, scheme: &str| {
        let merged = model.merge(rotations, &scheme.parse::<Scheme>().unwrap()).unwrap();
        perplexity(&merged, &text, |_| Continue(())).unwrap().perplexity.ln()
    };
    let full = score(None, "W16A16KV16");
    assert!(full < 0.8 * (config.vocab_size as f64).ln(), "loss {full} of a guess among {}", config.vocab_size);
    let r = Rotations::random_hadamard(config.hidden_size, config.head_dim, config.layers, 0).unwrap();
    let exact = score(Some(&r), "W16A16KV16");
    assert!((exact - full).abs() < 1e-3, "{exact} and {full}");
    let (rtn, rotated) = (score(None, "W4A4KV4"), score(Some(&r), "W4A4KV4"));
    assert!(rtn > full + 0.1 && rotated < rtn - 0.1, "loss {full} in full precision, rtn {rtn}, rotated {rotated}");
}

#[test]
fn has_outliers_in_its_stream() {
    use std::sync::{Arc, Mutex};
    let config = synthetic::shape("tiny").unwrap();
    let model = synthetic::model(&config, 3, DType::F32, &Device::Cpu).unwrap();
    let text = synthetic::text(&config, 2, 32, 1).unwrap();
    let ratio = Arc::new(Mutex::new(0f64));
    let seen = ratio.clone();
    let mut run = model.run(&Scheme::FULL_PRECISION.unrotated(), 32).unwrap();
    run.observer = Some(Arc::new(move |_, site, x| {
        if site == Site::AttentionInput {
            let (cols, x) = (x.cols(), x.to_f64_vec().unwrap());
            let mut most = vec![0f64; cols];
            x.iter().enumerate().for_each(|(i, v)| most[i % cols] = most[i % cols].max(v.abs()));
            most.sort_by(f64::total_cmp);
            *seen.lock().unwrap() = most[cols - 1] / most[cols / 2];
        }
    }));
    let tape = Tape::new();
    let r = Rotations::identity(config.hidden_size, config.head_dim, config.layers).unwrap().to_dtype(DType::F32).unwrap();
    let vars = spinquant::llama::RotationVars::constants(&tape, &r).unwrap();
    model.logits(&vars, &text.batch(&[0, 1]), Arc::new(run), Default::default()).unwrap();
    assert!(*ratio.lock().unwrap() > 5.0, "largest channel over the median {}", ratio.lock().unwrap());
}

#[cfg(feature = "cli")]
fn spinquant(arguments: &[&str]) -> (bool, String) {
    let out = std::process::Command::new(env!("CARGO_BIN_EXE_spinquant")).args(arguments).output().unwrap();
    (out.status.success(), String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr))
}

#[cfg(feature = "cli")]
#[test]
fn on_the_command_line() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("R.safetensors");
    let out = file.to_str().unwrap();
    let model = ["--model", "synthetic:tiny", "--device", "cpu"];
    let learn = ["learn", "--text", "synthetic:12", "--seq-len", "32", "--batch", "2", "--steps", "2", "--out", out];
    let (done, said) = spinquant(&[&learn[..], &model].concat());
    assert!(done && file.exists(), "{said}");
    let (done, said) =
        spinquant(&[&["eval", "--text", "synthetic:4", "--seq-len", "32", "--rotations", out], &model[..]].concat());
    assert!(done && said.contains("perplexity"), "{said}");
    let (done, said) = spinquant(&[&["eval", "--text", "README.md"], &model[..]].concat());
    assert!(!done && said.contains("synthetic:WINDOWS") && said.contains("README.md"), "{said}");
    let (done, said) = spinquant(&["eval", "--text", "synthetic", "--model", "synthetic:gpt-2"]);
    assert!(!done && said.contains("llama-3-8b"), "{said}");
    let (done, said) = spinquant(&[&["quantize", "--rotations", "none", "--format", "hf", "--out", out], &model[..]].concat());
    assert!(!done && said.contains("synthetic:tiny has none; use --format native"), "{said}");
    let (done, said) = spinquant(&[&["profile", "--steps", "2"], &model[..]].concat());
    assert!(!done && said.contains("expected at least 3") && said.contains("got 2"), "{said}");
    let (done, said) = spinquant(&[&["profile", "--goldens", "nowhere"], &model[..]].concat());
    assert!(!done && said.contains("nowhere") && said.contains("expected the small models of the golden tests"), "{said}");
    let short = ["profile", "--steps", "3", "--seq-len", "32", "--batch", "2", "--text", "synthetic:8", "--json"];
    let (done, said) = spinquant(&[&short[..], &model].concat());
    assert!(done && said.contains("\"predicted_gib\""), "{said}");
    // Nothing was measured on a CPU to compare with, and nothing is said of it.
    let (done, said) = spinquant(&[&short[..short.len() - 1], &model].concat());
    assert!(done && said.contains("s a step") && !said.contains("NaN") && !said.contains("ceilings"), "{said}");
}

#[cfg(feature = "cli")]
#[test]
fn plans_before_anything_is_allocated() {
    let of_model = |model: &str, memory: &str, more: &[&str]| {
        let model = format!("synthetic:{model}");
        let fixed = ["learn", "--dry-run", "--model", &model, "--text", "synthetic", "--out", "R", "--device", "cpu"];
        spinquant(&[&fixed[..], &["--memory", memory], more].concat())
    };
    let plan = |memory: &str| of_model("llama-2-7b", memory, &["--resident", "32"]);
    let (done, said) = plan("24GiB");
    assert!(done && said.contains("layers computed again") && said.contains("made twice") && said.contains("s a step"), "{said}");
    let (done, said) = plan("auto");
    assert!(done && said.contains("rotated weights kept"), "{said}");
    let (done, said) = plan("12GiB");
    assert!(!done && said.contains("the weights alone are 12.6 GiB"), "{said}");
    // What the card has no room for may be in main memory.
    let (done, said) = of_model("llama-2-7b", "12GiB", &["--main-memory", "64GiB"]);
    assert!(done && said.contains("GiB copied a step") && said.contains("GB/s") && said.contains("of 64.0 free"), "{said}");
    let (done, said) = of_model("llama-2-7b", "24GiB", &["--main-memory", "64GiB", "--resident", "0"]);
    assert!(done && said.contains("none on the card, layers 0 to 31 in main memory"), "{said}");
    let (done, said) = of_model("llama-2-7b", "12GiB", &["--main-memory", "1GiB"]);
    assert!(!done && said.contains("main memory is short by") && said.contains("1.0 are free"), "{said}");
    let (done, said) = of_model("llama-2-70b", "76GiB", &["--main-memory", "120GiB", "--json"]);
    assert!(done && said.contains("\"layers_in_main_memory\"") && said.contains("\"copied_bytes_per_step\""), "{said}");
    // What neither has room for is read again, at the rate that is given, or is refused.
    let small = ["--main-memory", "60GiB", "--read-rate", "5GB"];
    let (done, said) = of_model("llama-2-70b", "76GiB", &small);
    assert!(done && said.contains(" read from files again in every pass") && said.contains("at 5.00 GB/s"), "{said}");
    assert!(said.contains("of 60.0 free") && said.contains(" read from files\n") | said.contains(" read from files; "), "{said}");
    let (done, said) = of_model("llama-2-70b", "76GiB", &["--main-memory", "60GiB", "--read-rate", "none"]);
    assert!(!done && said.contains("main memory is short by") && said.contains("60.0 are free"), "{said}");
    let (done, said) = of_model("llama-2-70b", "76GiB", &["--main-memory", "60GiB", "--read-rate", "fast"]);
    assert!(!done && said.contains("fast"), "{said}");
    let (done, said) = of_model("llama-2-70b", "6GiB", &["--main-memory", "120GiB"]);
    assert!(!done && said.contains("of the card, 6.0 are allowed"), "{said}");
    // Ranks with as many sequences share the rows of weights.
    for (more, expected) in [
        (&["--ranks", "2"][..], "each of 2 ranks rotates and quantises a part of the rows of weights"),
        (&["--ranks", "3"], "each of 3 ranks rotates and quantises all weights"),
        (&["--ranks", "4", "--json"], "\"ranks_share_rows\":true"),
        (&["--json"], "\"ranks_share_rows\":false"),
    ] {
        let (done, said) = of_model("llama-2-7b", "76GiB", more);
        assert!(done && said.contains(expected), "{more:?}: {said}");
    }
    // What another objective keeps is another plan.
    let of = |objective: &str, memory: &str| of_model("llama-2-7b", memory, &["--resident", "32", "--objective", objective]);
    let (done, said) = of("kl", "32GiB");
    assert!(done && said.contains("logits of both models") && said.contains("W4A4KV4, kl, 8 x 2048"), "{said}");
    for (memory, sequences) in [("24GiB", 1), ("48GiB", 4)] {
        let (done, said) = of("whip", memory);
        assert!(done && said.contains(&format!("rows of {sequences} sequences captured at once")), "{said}");
        assert!(said.contains("captured rows and their gradients") && !said.contains("logits"), "{said}");
    }
    let (done, said) = of("kurtosis", "18GiB");
    assert!(!done && said.contains("the leanest plan needs"), "{said}");
    let (done, said) = plan("plenty");
    assert!(!done && said.contains("24GiB") && said.contains("plenty"), "{said}");
}
