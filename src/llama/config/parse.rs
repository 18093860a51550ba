//! Reading `config.json`, field by field, as transformers does.

use serde_json::{Map, Value};

use super::family::{self, Biases, Facts, Windows};
use super::fields::{Fields, Parsed};
use super::{LlamaConfig, MOST_LAYERS, Multipliers, rope};
use crate::{DType, Error, io};

/// Tokens by id; −1 and the like stand for none.
fn token_ids(v: &Value) -> Option<Vec<u32>> {
    let id = |v: &Value| match v.as_i64()? {
        id if id < 0 => Some(None),
        id => u32::try_from(id).ok().map(Some),
    };
    let ids: Option<Vec<_>> = match v {
        Value::Array(ids) => ids.iter().map(id).collect(),
        one => Some(vec![id(one)?]),
    };
    Some(ids?.into_iter().flatten().collect())
}

/// The element type, in the words of transformers and of torch.
fn dtype(f: Fields) -> Parsed<Option<DType>> {
    let name = match f.text("dtype")? {
        Some(name) => Some(name),
        None => f.text("torch_dtype")?,
    };
    Ok(match name.map(|s| s.trim_start_matches("torch.")) {
        None | Some("auto") => None,
        Some("float") => Some(DType::F32),
        Some("half") => Some(DType::F16),
        Some("double") => Some(DType::F64),
        Some(s) => Some(s.parse().map_err(|e: Error| io::short(e))?),
    })
}

/// The configuration of a JSON object, not yet checked as a whole.
pub(super) fn parse(map: &Map<String, Value>) -> Parsed<LlamaConfig> {
    let f = Fields { map, prefix: "" };
    let family = family::family(f)?;
    let facts = family.facts();
    f.get("hidden_act", "\"silu\"", |v| matches!(v.as_str(), Some("silu" | "swish")).then_some(()))?;
    let unquantised = "none (of quantised weights, only those of compressed-tensors are read, and only to run the network)";
    f.get("quantization_config", unquantised, |_| None::<()>)?;

    let hidden_size = f.need_size("hidden_size")?;
    let heads = f.need_size("num_attention_heads")?;
    let head_dim = match f.size("head_dim")?.or(facts.absent.head_dim) {
        Some(d) => d,
        None if heads > 0 && hidden_size.is_multiple_of(heads) => hidden_size / heads,
        None => return Err(format!("num_attention_heads: expected a divisor of hidden_size = {hidden_size}, got {heads}")),
    };
    let layers = f.need_size("num_hidden_layers")?;
    let kv_heads = match f.size("num_key_value_heads")? {
        Some(kv) => kv,
        None if f.states("num_key_value_heads") => heads,
        None => facts.absent.kv_heads.unwrap_or(heads),
    };
    let max_position_embeddings = f.size("max_position_embeddings")?.unwrap_or(facts.absent.context);
    let rope = rope::parse(f, family, max_position_embeddings)?;
    let no_rope_layers = if facts.no_rope { without_rope(f, layers)? } else { vec![] };
    let (sliding_window, full_attention_layers) = windows(f, facts, layers, &no_rope_layers)?;
    Ok(LlamaConfig {
        family,
        hidden_size,
        intermediate_size: f.need_size("intermediate_size")?,
        layers,
        heads,
        kv_heads,
        head_dim,
        vocab_size: f.need_size("vocab_size")?,
        rms_norm_eps: f.number("rms_norm_eps")?.unwrap_or(facts.absent.eps),
        max_position_embeddings,
        rope_theta: rope.theta,
        partial_rotary_factor: rope.partial,
        rope_scaling: rope.scaling,
        no_rope_layers,
        sliding_window,
        full_attention_layers,
        multipliers: if facts.multipliers { multipliers(f, head_dim)? } else { Multipliers::NONE },
        attention_bias: match facts.biases {
            Biases::Never => false,
            Biases::Qkv => true,
            Biases::Attention | Biases::All => f.flag("attention_bias")?,
        },
        mlp_bias: facts.biases == Biases::All && f.flag("mlp_bias")?,
        tie_word_embeddings: f.flag_or("tie_word_embeddings", facts.absent.tied)?,
        bos_token_id: f.get("bos_token_id", "a token id", token_ids)?.and_then(|ids| ids.first().copied()),
        eos_token_ids: f.get("eos_token_id", "a token id or a list of them", token_ids)?.unwrap_or_default(),
        dtype: dtype(f)?,
    })
}

/// A list with something for every layer, which may be longer.
fn per_layer<T>(name: &str, list: Vec<T>, layers: usize) -> Parsed<Vec<T>> {
    match list.len() >= layers {
        true => Ok(list.into_iter().take(layers).collect()),
        false => Err(format!("{name}: expected one for each of {layers} layers, got {}", list.len())),
    }
}

/// The layers that `no_rope_layers` marks by 0, or every `no_rope_layer_interval`th.
fn without_rope(f: Fields, layers: usize) -> Parsed<Vec<usize>> {
    let listed =
        f.get("no_rope_layers", "a list of 0 and 1", |v| v.as_array()?.iter().map(Value::as_u64).collect::<Option<Vec<_>>>())?;
    let rope: Vec<bool> = match listed {
        Some(list) => per_layer("no_rope_layers", list, layers)?.into_iter().map(|rope| rope != 0).collect(),
        None => {
            let interval = f.size("no_rope_layer_interval")?.unwrap_or(4);
            if interval == 0 {
                return Err("no_rope_layer_interval: expected at least 1, got 0".into());
            }
            (1..=layers.min(MOST_LAYERS)).map(|l| !l.is_multiple_of(interval)).collect()
        }
    };
    Ok((0..rope.len()).filter(|&l| !rope[l]).collect())
}

/// The sliding window, and the layers that see everything all the same.
fn windows(f: Fields, facts: Facts, layers: usize, no_rope: &[usize]) -> Parsed<(Option<usize>, Vec<usize>)> {
    let switched = match facts.windows {
        Windows::Never => return Ok((None, vec![])),
        Windows::Every => true,
        Windows::FromLayer | Windows::WithoutRope => f.flag("use_sliding_window")?,
    };
    let absent = if f.states("sliding_window") { None } else { facts.absent.window };
    let Some(window) = f.size("sliding_window")?.or(absent).filter(|_| switched) else { return Ok((None, vec![])) };
    let all = 0..layers.min(MOST_LAYERS);
    let listed = if facts.windows == Windows::Every { None } else { f.texts("layer_types")? };
    let full: Vec<usize> = match (listed, facts.windows) {
        (Some(kinds), _) => {
            let kinds = per_layer("layer_types", kinds, layers)?;
            if let Some(odd) = kinds.iter().find(|kind| !["sliding_attention", "full_attention"].contains(kind)) {
                return Err(format!("layer_types: expected \"sliding_attention\" or \"full_attention\", got {odd:?}"));
            }
            all.filter(|&l| kinds[l] == "full_attention").collect()
        }
        (None, Windows::FromLayer) => {
            let first = f.size("max_window_layers")?.unwrap_or(28);
            all.filter(|l| *l < first).collect()
        }
        (None, Windows::WithoutRope) => all.filter(|l| !no_rope.contains(l)).collect(),
        (None, _) => vec![],
    };
    // A window that no layer has is none.
    Ok(if full.len() < layers { (Some(window), full) } else { (None, vec![]) })
}

/// Granite's scalars; 1 where absent, and that of the scores too.
fn multipliers(f: Fields, head_dim: usize) -> Parsed<Multipliers> {
    let number = |name: &str| Ok::<_, String>(f.number(name)?.unwrap_or(1.0));
    let attention = number("attention_multiplier")?;
    // 1/√D, rounded somewhere.
    let usual = (attention * (head_dim as f64).sqrt() - 1.0).abs() < 1e-12;
    Ok(Multipliers {
        embedding: number("embedding_multiplier")?,
        residual: number("residual_multiplier")?,
        attention: (!usual).then_some(attention),
        logits: number("logits_scaling")?,
    })
}

#[cfg(test)]
pub(crate) mod tests {
    use std::path::Path;

    use serde_json::json;

    use super::super::RopeScaling;
    use super::*;
    use crate::Result;

    fn base() -> Value {
        json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
            "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 97, "rms_norm_eps": 1e-5,
        })
    }
    pub(crate) fn with(changes: Value) -> Result<LlamaConfig> {
        let mut v = base();
        for (name, value) in changes.as_object().unwrap() {
            v[name] = value.clone();
        }
        LlamaConfig::from_json(v.to_string().as_bytes(), Path::new("dir/config.json"))
    }
    pub(crate) fn llama3() -> Value {
        json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192})
    }

    #[test]
    fn defaults() {
        let c = with(json!({})).unwrap();
        assert_eq!((c.kv_heads, c.head_dim, c.max_position_embeddings, c.rope_theta), (4, 16, 2048, 10000.0));
        assert_eq!((c.rope_scaling, c.bos_token_id, c.eos_token_ids, c.dtype), (None, None, vec![], None));
        assert!(!c.tie_word_embeddings);
    }

    #[test]
    fn both_generations_say_the_same() {
        let mut new = llama3();
        new["rope_theta"] = json!(5e5);
        let rest = |v: &mut Value| {
            v["head_dim"] = json!(32);
            v["num_key_value_heads"] = json!(2);
            v["bos_token_id"] = json!(3);
        };
        let (mut old, mut second) = (json!({"rope_theta": 5e5, "rope_scaling": llama3()}), json!({"rope_parameters": new}));
        old["torch_dtype"] = json!("bfloat16");
        old["eos_token_id"] = json!(7);
        second["dtype"] = json!("bfloat16");
        second["eos_token_id"] = json!([7]);
        rest(&mut old);
        rest(&mut second);
        let (a, b) = (with(old).unwrap(), with(second).unwrap());
        assert_eq!(a, b);
        assert_eq!((a.head_dim, a.group(), a.eos_token_ids.clone(), a.dtype), (32, 2, vec![7], Some(DType::BF16)));
        assert_eq!(LlamaConfig::from_json(a.to_json().as_bytes(), Path::new("written")).unwrap(), a);
        let linear = with(json!({"rope_scaling": {"type": "linear", "factor": 2}, "eos_token_id": [1, 2]})).unwrap();
        assert_eq!(linear.rope_scaling, Some(RopeScaling::Linear { factor: 2.0 }));
        assert_eq!(LlamaConfig::from_json(linear.to_json().as_bytes(), Path::new("written")).unwrap(), linear);
    }

    #[test]
    fn spellings_are_those_of_transformers() {
        let plain = with(json!({})).unwrap();
        assert_eq!(with(json!({"rms_norm_eps": null})).unwrap().rms_norm_eps, 1e-6);
        for architectures in [
            json!(null),
            json!([]),
            json!("LlamaForCausalLM"),
            json!(["LLaMAForCausalLM"]),
            json!(["LlamaModel", "LlamaForCausalLM"]),
        ] {
            let changes = json!({"architectures": architectures, "model_type": "llama"});
            assert_eq!(with(changes).unwrap(), plain, "{architectures}");
        }
        for same in [
            json!({"head_dim": null}),
            json!({"tie_word_embeddings": null}),
            json!({"hidden_act": "swish"}),
            json!({"bos_token_id": -1, "eos_token_id": -1}),
            json!({"bos_token_id": null, "eos_token_id": []}),
        ] {
            assert_eq!(
                with(same.clone()).unwrap(),
                LlamaConfig { bos_token_id: None, eos_token_ids: vec![], ..plain.clone() },
                "{same}"
            );
        }
        let ids = with(json!({"bos_token_id": [3], "eos_token_id": [1, -1, 2]})).unwrap();
        assert_eq!((ids.bos_token_id, ids.eos_token_ids), (Some(3), vec![1, 2]));
        for (name, dtype) in [
            ("torch.bfloat16", DType::BF16),
            ("bfloat16", DType::BF16),
            ("half", DType::F16),
            ("torch.float", DType::F32),
            ("double", DType::F64),
        ] {
            for key in ["dtype", "torch_dtype"] {
                assert_eq!(with(json!({key: name})).unwrap().dtype, Some(dtype), "{key} {name}");
            }
        }
        assert_eq!(with(json!({"dtype": "auto"})).unwrap().dtype, None);
    }

    #[test]
    fn refusals_name_field_expected_and_got() {
        for (change, informative) in [
            (json!({"hidden_size": null}), "hidden_size: a needed field is missing"),
            (json!({"rms_norm_eps": "1e-5"}), "rms_norm_eps: expected a number, got \"1e-5\""),
            (json!({"hidden_size": "64"}), "hidden_size: expected a whole number, got \"64\""),
            (json!({"hidden_size": -64}), "hidden_size: expected a whole number, got -64"),
            (json!({"vocab_size": 0}), "vocab_size: expected 1 to"),
            (json!({"num_hidden_layers": 1u64 << 40}), "num_hidden_layers: expected 1 to 4096"),
            (json!({"num_attention_heads": 0}), "num_attention_heads: expected a divisor of hidden_size = 64, got 0"),
            (json!({"architectures": ["MistralForCausalLM"]}), "architectures: expected [\"LlamaForCausalLM\"], got [\"Mistral"),
            (json!({"model_type": "qwen2"}), "architectures: expected [\"Qwen2ForCausalLM\"], got [\"LlamaForCausalLM\"]"),
            (
                json!({"model_type": "bert"}),
                "model_type: expected one of llama, mistral, qwen2, qwen3, phi3, smollm3, granite, got \"bert\"",
            ),
            (
                json!({"architectures": ["BertModel"], "model_type": null}),
                "architectures: expected one of LlamaForCausalLM, Mist",
            ),
            (
                json!({"model_type": "gemma2"}),
                "model_type: gemma2 is refused: a norm with a gain behind o and down does not commute",
            ),
            (json!({"model_type": "qwen3_moe"}), "model_type: qwen3_moe is refused: it is a mixture of experts"),
            (
                json!({"architectures": ["Qwen2MoeForCausalLM"], "model_type": null}),
                "Qwen2MoeForCausalLM is refused: it is a mixture",
            ),
            (json!({"architectures": null, "model_type": null}), "model_type: a needed field"),
            (json!({"attention_bias": 1}), "attention_bias: expected true or false, got 1"),
            (json!({"mlp_bias": "yes"}), "mlp_bias: expected true or false, got \"yes\""),
            (json!({"hidden_act": "gelu"}), "hidden_act: expected \"silu\", got \"gelu\""),
            (json!({"quantization_config": {"bits": 4}}), "quantization_config: expected none"),
            (json!({"head_dim": 15}), "head_dim: expected an even number (rotary halves), got 15"),
            (json!({"num_key_value_heads": 3}), "num_key_value_heads: expected a divisor of num_attention_heads = 4, got 3"),
            (json!({"rms_norm_eps": 2.0}), "rms_norm_eps: expected 0 up to below 1, got 2"),
            (json!({"rope_theta": 0}), "rope_theta: expected 1 up to"),
            (json!({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 2e4}}), "rope_theta: expected one value"),
            (json!({"rope_scaling": {"type": "mrope", "factor": 2.0}}), "rope_scaling.rope_type: expected \"default\""),
            (json!({"rope_parameters": {"rope_type": "axial"}}), "got \"axial\""),
            (json!({"rope_scaling": {"type": "dynamic"}}), "rope_scaling.factor: a needed field is missing"),
            (json!({"rope_scaling": {"type": "yarn", "factor": 0.5}}), "factor: expected 1 to"),
            (
                json!({"rope_scaling": {"type": "yarn", "factor": 2, "beta_fast": 1, "beta_slow": 2}}),
                "0 < beta_slow <= beta_fast",
            ),
            (
                json!({"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}),
                "rope_scaling.long_factor: a needed field is missing",
            ),
            (
                json!({"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}}),
                "short_factor: expected 8 numbers, got 1",
            ),
            (json!({"rope_scaling": {"factor": 2.0}}), "rope_scaling.rope_type: a needed field is missing"),
            (json!({"rope_scaling": {"type": "linear"}}), "rope_scaling.factor: a needed field is missing"),
            (json!({"rope_scaling": {"type": "linear", "factor": 0.0}}), "factor: expected 1 to"),
            (json!({"rope_parameters": {"partial_rotary_factor": 0.5}}), "partial_rotary_factor: expected 1, got 0.5"),
            (json!({"bos_token_id": 97}), "bos_token_id: expected less than vocab_size = 97, got 97"),
            (json!({"eos_token_id": "</s>"}), "eos_token_id: expected a token id or a list"),
            (json!({"torch_dtype": "float8_e4m3fn"}), "expected f64, f32, f16 or bf16, got \"float8_e4m3fn\""),
        ] {
            let message = with(change.clone()).expect_err(&change.to_string()).to_string();
            assert!(message.starts_with("dir/config.json: ") && message.contains(informative), "{change}: {message}");
        }
        for bytes in [&b""[..], b"[1]", b"{", b"\xff\xfe", &[b'['; 100_000]] {
            let message = LlamaConfig::from_json(bytes, Path::new("c")).unwrap_err().to_string();
            assert!(message.contains("expected a JSON object"), "{message}");
        }
        let good = with(json!({})).unwrap();
        let odd = LlamaConfig { head_dim: 7, ..good };
        assert!(odd.validate().unwrap_err().to_string().contains("head_dim: expected an even number"));
    }
}
