//! What the commands make of models, texts and rotation files as users have them, and what they say about it.

use super::*;

/// The perplexity of the model in full precision, and the token that its text starts with.
fn score(place: &Place, rest: &str) -> (f64, Value) {
    let score = place.json(&format!("{EVAL} --scheme W16A16KV16 --json {rest}"));
    (number(&score, "perplexity"), score["starts_with"].clone())
}

fn stderr(place: &Place, args: &str) -> String {
    let out = place.run(args);
    let text = String::from_utf8(out.stderr).unwrap();
    assert!(out.status.success(), "{args}: {text}");
    text
}

fn change_tokenizer(place: &Place, change: impl FnOnce(&mut Value)) {
    let path = place.path("model/tokenizer.json");
    let mut tokenizer: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    change(&mut tokenizer);
    std::fs::write(path, tokenizer.to_string()).unwrap();
}

#[test]
fn the_tokenizer_decides_about_bos() {
    let place = Place::new();
    let with = |bos: Value| {
        let mut c = config();
        c["bos_token_id"] = bos;
        place.config(c);
    };
    let (adds, first) = score(&place, "");
    assert_eq!(first, json!({"id": 0, "token": "<s>"}));
    // Whatever the configuration says.
    for bos in [json!(null), json!(2), json!(-1), json!([0])] {
        with(bos.clone());
        assert_eq!(score(&place, ""), (adds, first.clone()), "{bos}");
    }
    with(json!(0));
    assert_eq!(score(&place, "--bos 0"), (adds, first.clone()));
    let (none, word) = score(&place, "--bos none");
    assert_ne!(none, adds);
    assert!(word["token"].as_str().is_some_and(|w| w.starts_with('w')), "{word}");
    let (other, second) = score(&place, "--bos 2");
    assert!(other != adds && other != none);
    assert_eq!(second, json!({"id": 2, "token": "w0"}));
    // A tokenizer that adds none, of a model whose configuration names one.
    change_tokenizer(&place, |t| t["post_processor"] = Value::Null);
    assert_eq!(score(&place, ""), (none, word.clone()));
    assert_eq!(score(&place, "--bos 0"), (adds, first));

    let out = place.run(EVAL);
    let text = String::from_utf8(out.stdout).unwrap();
    assert!(text.contains(&format!("the text starts with {} (id {})", word["token"].as_str().unwrap(), word["id"])), "{text}");
    place.fails(&format!("{EVAL} --bos <s>"), &["--bos", "expected auto, none or a token id, got \"<s>\""]);
    place.fails(&format!("{EVAL} --bos 32"), &["token 32 of the text is outside the model's vocabulary of 32"]);
    place.fails("race --out race --bos none", &["required arguments were not provided"]);

    // Every command that tokenises text says so.
    for args in [
        format!("{LEARN} --steps 1 --clip none --json --bos 0"),
        format!("clip {MODEL} --text text.txt --rotations hadamard --windows 1 --out C.safetensors --json --bos 0"),
        format!("inspect {MODEL} --text text.txt --windows 1 --out look --json --bos 0"),
        format!(
            "compare {MODEL} --calibration text.txt --text text.txt --seeds 1 --learn-seeds 0 --max-windows 1 --json --bos 0"
        ),
    ] {
        assert_eq!(place.json(&args)["starts_with"], json!({"id": 0, "token": "<s>"}), "{args}");
    }
}

#[test]
fn oddities_are_noted_once() {
    let place = Place::new();
    let compare = format!(
        "compare {MODEL} --calibration text.txt --text text.txt --seeds 1 --learn-seeds 0 --max-windows 1 --scheme W4A16"
    );
    let notes =
        |args: &str| stderr(&place, args).lines().filter(|l| l.starts_with("note: ")).map(str::to_string).collect::<Vec<_>>();
    assert!(notes(&compare).is_empty());
    let mut changed = tensors();
    changed.insert("model.layers.0.self_attn.q_proj.bias".into(), ops::randn([32], 1));
    write(&place.path("model/model.safetensors"), &changed, Dtype::F32);
    let mut tied = config();
    tied["tie_word_embeddings"] = true.into();
    place.config(tied);
    // The model is loaded twice.
    let said = notes(&compare);
    assert_eq!(said.len(), 2, "{said:?}");
    assert!(said[0].contains("lm_head.weight differs from model.embed_tokens.weight"), "{said:?}");
    assert!(said[1].contains("1 tensor is in the files and not read") && said[1].ends_with("q_proj.bias"), "{said:?}");
}

#[test]
fn a_hugging_face_folder_holds_weights_only() {
    let place = Place::new();
    let quantize = "quantize --model model --device cpu --rotations hadamard --online none --format hf --out";
    let said = |args: &str| {
        let out = place.run(args);
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        (String::from_utf8(out.stdout).unwrap(), String::from_utf8(out.stderr).unwrap())
    };
    let (out, err) = said(&format!("{quantize} q --scheme W4A4KV4"));
    assert!(out.starts_with("W4A16KV16, rotations hadamard:0, weights rtn: written to q"), "{out}");
    assert!(err.contains("note: a Hugging Face folder holds weights only, so this is W4A16KV16"), "{err}");
    let record: Value = serde_json::from_slice(&place.read("q/spinquant.json")).unwrap();
    assert_eq!((&record["scheme"]["activation_bits"], &record["scheme"]["key_bits"]), (&16.into(), &16.into()));
    assert_eq!(record["made_for"]["activation_bits"], 4);
    let (out, err) = said(&format!("{quantize} q2 --scheme W4A16"));
    assert!(out.starts_with("W4A16KV16,") && !err.contains("note"), "{out}{err}");
    // And it computes what it says.
    let full = "--scheme W16A16KV16 --json";
    let written = place.json(&format!("{} {full}", EVAL.replace("--model model", "--model q")));
    let merged = place.json(&format!("{EVAL} --scheme W4A16 --rotations hadamard --online none --json"));
    let ratio = number(&written, "perplexity") / number(&merged, "perplexity");
    assert!((ratio - 1.0).abs() < 1e-5, "{ratio}");
    place.fails(
        "quantize --model model --device cpu --rotations hadamard --format hf --out q3",
        &["no online rotations", "give --online none"],
    );
}

#[test]
fn no_windows_are_refused() {
    let place = Place::new();
    let none = "expected at least 1, got 0";
    place.fails(&format!("{EVAL} --max-windows 0"), &["--max-windows", none]);
    let texts = "--calibration text.txt --text text.txt";
    for command in [format!("compare {MODEL} {texts}"), format!("race {MODEL} {texts} --out race")] {
        place.fails(&format!("{command} --max-windows 0"), &["--max-windows", none]);
        place.fails(&format!("{command} --clip-windows 0"), &["--clip-windows", none]);
    }
    place.fails(&format!("{LEARN} --clip none --clip-windows 0"), &["--clip-windows", none]);
    place.fails(&format!("clip {MODEL} --text text.txt --rotations hadamard --out C --windows 0"), &["--windows", none]);
    place.fails(&format!("inspect {MODEL} --text text.txt --out look --windows 0"), &["--windows", none]);
    place.fails(
        &format!("{EVAL} --weights gptq --calibration text.txt --calibration-windows 0"),
        &["--calibration-windows", none],
    );
}

#[test]
fn what_people_type_by_mistake() {
    let place = Place::new();
    let eval = |model: &str, parts: &[&str]| place.fails(&EVAL.replace("--model model", &format!("--model {model}")), parts);
    eval("meta-llama/Llama-2-7b-hf", &["meta-llama/Llama-2-7b-hf: there is no such folder", "HF_HUB_OFFLINE is set"]);
    eval("model/model.safetensors", &["expected the folder of a model, got a file"]);
    std::fs::rename(place.path("model/tokenizer.json"), place.path("model/tokenizer.model")).unwrap();
    eval("model", &["tokenizer.json", "only tokenizer.model is there"]);
    std::fs::rename(place.path("model/tokenizer.model"), place.path("model/tokenizer.json")).unwrap();
    place.run("quantize --model model --device cpu --rotations hadamard --out q");
    place.fails(&LEARN.replace("--model model", "--model q"), &["q: is a quantised model in the native layout"]);
    std::fs::write(place.path("q/spinquant.json"), "{").unwrap();
    eval("q", &["q/spinquant.json: expected a JSON object"]);
}

#[test]
fn a_vocabulary_padded_beyond_the_tokenizer() {
    let place = Place::new();
    let words: String = (0..1600).map(|i| format!("w{} ", (i * i + i / 7) % 20)).collect();
    std::fs::write(place.path("text.txt"), words).unwrap();
    let whole = score(&place, "");
    // Ids 22 to 31 are rows of the model's tables that no token has.
    change_tokenizer(&place, |t| t["model"]["vocab"].as_object_mut().unwrap().retain(|_, id| id.as_u64() < Some(22)));
    assert_eq!(score(&place, ""), whole);
}
