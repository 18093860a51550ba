//! `generate`: text as it comes, its record, and what it refuses.

use super::*;

const GENERATE: &str = "generate --model model --device cpu";

#[test]
fn text_and_its_record_agree() {
    let place = Place::new();
    let args = format!("{GENERATE} --prompt w3 --max-tokens 9 --scheme W4A4KV4 --rotations hadamard:1");
    let record = place.json(&format!("{args} --json"));
    let tokens = record["tokens"].as_array().unwrap();
    assert_eq!((tokens.len(), &record["ended"], &record["prompt_tokens"]), (9, &json!(false), &json!([0, 5])));
    let out = place.run(&args);
    let (text, said) = (String::from_utf8(out.stdout).unwrap(), String::from_utf8(out.stderr).unwrap());
    assert_eq!(text, format!("{}\n", record["text"].as_str().unwrap()));
    assert!(said.contains("9 tokens behind 2 in") && said.contains("W4A4KV4, rotations hadamard:1, weights rtn"), "{said}");
    // Words of the vocabulary, in order.
    let word = |id: u64| match id {
        0 => "<s>".to_string(),
        1 => "?".to_string(),
        id => format!("w{}", id - 2),
    };
    let words: Vec<String> = tokens.iter().map(|t| word(t.as_u64().unwrap())).collect();
    assert_eq!(text.trim(), words.join(" "));
    // The prompt from a file; drawn text follows its seed.
    std::fs::write(place.path("prompt.txt"), "w3").unwrap();
    let args = format!("{GENERATE} --prompt-file prompt.txt --max-tokens 12 --temperature 1 --json");
    let draw = |seed: u64| place.json(&format!("{args} --seed {seed}"))["tokens"].clone();
    assert_eq!(draw(1), draw(1));
    assert!((2..9).any(|seed| draw(seed) != draw(1)));
    // What the model ends its texts with.
    let first = tokens[0].as_u64().unwrap();
    std::fs::write(place.path("model/generation_config.json"), json!({"eos_token_id": [first]}).to_string()).unwrap();
    let args = format!("{GENERATE} --prompt w3 --max-tokens 9 --scheme W4A4KV4 --rotations hadamard:1 --json");
    let ended = place.json(&args);
    assert_eq!((&ended["tokens"], &ended["ended"]), (&json!([]), &json!(true)));
    assert_eq!(place.json(&format!("{args} --ignore-end"))["tokens"], record["tokens"]);
}

#[test]
fn a_conversation_goes_through_the_template() {
    let place = Place::new();
    let template = "{% for m in messages %}{{ m.role == 'system' and 'w1 ' or 'w2 ' }}{{ m.content }} {% endfor %}w9";
    std::fs::write(place.path("model/tokenizer_config.json"), json!({"chat_template": template}).to_string()).unwrap();
    let record = place.json(&format!("{GENERATE} --chat --system w7 --prompt w3 --max-tokens 1 --json"));
    assert_eq!(record["prompt_tokens"], json!([3, 9, 4, 5, 11]));
    let refuses = json!({"chat_template": "{{ raise_exception('No system, please') }}"});
    std::fs::write(place.path("model/tokenizer_config.json"), refuses.to_string()).unwrap();
    place.fails(&format!("{GENERATE} --chat --prompt w3"), &["tokenizer_config.json", "No system, please"]);
    std::fs::write(place.path("model/tokenizer_config.json"), "{}").unwrap();
    place.fails(&format!("{GENERATE} --chat --prompt w3"), &["tokenizer_config.json", "expected chat_template, got none"]);
}

#[test]
fn what_it_refuses() {
    let place = Place::new();
    place.fails(&format!("{GENERATE} --prompt w3 --max-tokens 0"), &["--max-tokens"]);
    place.fails(
        &format!("{GENERATE} --prompt w3 --max-tokens 100000"),
        &["prompt: its 2 tokens leave room for", "the model's context", "100000 are asked for"],
    );
    place.fails(&format!("{GENERATE} --prompt w3 --temperature nan"), &["temperature", "NaN"]);
    place.fails(&format!("{GENERATE} --prompt w3 --top-p 0"), &["top-p", "expected more than 0"]);
    place.fails(GENERATE, &["required arguments"]);
    place.fails("generate --model synthetic:tiny --prompt w3", &["--model", "tokenizer"]);
    place.fails(&format!("{GENERATE} --prompt-file nowhere.txt"), &["nowhere.txt"]);
}
