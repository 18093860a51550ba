//! Every family through the commands: learned, quantised, written, read back, generated with; and what is refused.

use spinquant::DType;
use spinquant::llama::{Family, LlamaConfig};

use super::*;
use crate::common::tiny;

#[test]
fn every_family_goes_all_the_way() {
    let place = Place::new();
    for family in Family::ALL {
        let config = tiny::of_family(LlamaConfig { vocab_size: 32, ..tiny::with_biases(tiny::config(4, 2, false)) }, family);
        tiny::write(&place.path("model"), &config, DType::F32, 5, true);
        let perplexity = |args: &str| number(&place.json(args), "perplexity");
        place.json(&format!("{LEARN} --scheme W4A4KV4 --steps 2 --json"));

        let quantize = |rest: &str| place.run(&format!("quantize {MODEL} --overwrite {rest}"));
        let out = quantize("--scheme W4A4KV4 --rotations R.safetensors --out native");
        assert!(out.status.success(), "{family:?}: {}", String::from_utf8_lossy(&out.stderr));
        let native = perplexity("eval --model native --device cpu --seq-len 16 --text text.txt --json");
        let memory = perplexity(&format!("{EVAL} --scheme W4A4KV4 --rotations R.safetensors --json"));
        assert_eq!(native.to_bits(), memory.to_bits(), "{family:?}");

        let out = quantize("--scheme W16A16KV16 --online none --rotations R.safetensors --format hf --out hf");
        assert!(out.status.success(), "{family:?}: {}", String::from_utf8_lossy(&out.stderr));
        let exact = perplexity(&format!("{EVAL} --scheme W16A16KV16 --json"));
        let merged = perplexity("eval --model hf --scheme W16A16KV16 --device cpu --seq-len 16 --text text.txt --json");
        assert!((merged / exact - 1.0).abs() < 1e-5 && memory != exact, "{family:?}: {merged} against {exact}");

        // Further than the windows reach.
        let text = place.json("generate --model model --device cpu --prompt w3 --max-tokens 9 --ignore-end --json");
        assert_eq!(text["tokens"].as_array().unwrap().len(), 9, "{family:?}");
    }
}

#[test]
fn others_are_refused_in_one_line() {
    let place = Place::new();
    for (kind, why) in [
        ("gemma2", "a norm with a gain behind o and down does not commute with R1"),
        ("gemma3_text", "a norm with a gain behind o and down does not commute with R1"),
        ("olmo2", "a norm with a gain behind o and down does not commute with R1"),
        ("mixtral", "it is a mixture of experts"),
        ("gpt_oss", "it is a mixture of experts"),
        ("mistral3", "its language model is a part of it"),
        ("mamba", "expected one of llama, mistral, qwen2, qwen3, phi3, smollm3, granite"),
    ] {
        let mut c = config();
        (c["model_type"], c["architectures"]) = (json!(kind), Value::Null);
        place.config(c);
        for command in [LEARN, EVAL, "generate --model model --device cpu --prompt w3"] {
            place.fails(command, &["config.json: model_type: ", kind, why]);
        }
    }
}
