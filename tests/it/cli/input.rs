//! One clear message for bad input.

use super::*;

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
    with(json!({"vocab_size": 40}));
    both(&["model.safetensors: model.embed_tokens.weight: expected shape [40, 24], got [32, 24]"]);
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
    place.fails(&format!("{EVAL} --online r5"), &["expected none, r3, r4 or r3,r4", "got \"r5\""]);
    place.fails(&format!("{EVAL} --dtype int8"), &["--dtype", "int8"]);
    place.fails(&format!("{EVAL} --weight-group 5"), &["quantisation group: 5 does not divide rows of 24"]);
    place.fails(&format!("{EVAL} --activation-clip 1.5"), &["clip ratio: expected a number in (0, 1], got 1.5"]);
    learn("--objective mse", &["objective: expected one of cross-entropy, ", "kurtosis, got \"mse\""]);
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
    crooked.r1 = crooked.r1.scale(1.01).unwrap();
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
        // Nothing is lost.
        Rotations::load(&place.path("full.rescued")).unwrap();
    }
}

#[test]
fn a_gpu_is_asked_for() {
    let place = Place::new();
    let reason = if cfg!(feature = "cuda") { "driver" } else { "no GPU support: rebuild with `--features cuda`" };
    place.fails(&EVAL.replace("cpu", "cuda"), &["error: cuda: ", reason]);
    place.json(&format!("{} --json", EVAL.replace("cpu", "auto")));
}
