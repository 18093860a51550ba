//! Reading `config.json`, field by field, so that every refusal names the field, what was expected and what is there.

use serde_json::{Map, Value, json};

use super::{LlamaConfig, RopeScaling};
use crate::{DType, Error, io};

/// A JSON object read field by field; `null` counts as absent. Messages name the field.
#[derive(Clone, Copy)]
struct Fields<'a> {
    map: &'a Map<String, Value>,
    prefix: &'static str,
}

type Parsed<T> = std::result::Result<T, String>;

impl<'a> Fields<'a> {
    fn get<T>(self, name: &str, expected: &str, convert: impl FnOnce(&'a Value) -> Option<T>) -> Parsed<Option<T>> {
        match self.map.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => convert(value).map(Some).ok_or_else(|| self.wrong(name, expected, value)),
        }
    }
    fn wrong(self, name: &str, expected: &str, got: &Value) -> String {
        let mut got = got.to_string();
        if let Some((cut, _)) = got.char_indices().nth(80) {
            got.replace_range(cut.., "…");
        }
        format!("{}{name}: expected {expected}, got {got}", self.prefix)
    }
    fn missing(self, name: &str) -> String {
        format!("{}{name}: a needed field is missing", self.prefix)
    }
    fn size(self, name: &str) -> Parsed<Option<usize>> {
        self.get(name, "a whole number", |v| usize::try_from(v.as_u64()?).ok())
    }
    fn need_size(self, name: &str) -> Parsed<usize> {
        self.size(name)?.ok_or_else(|| self.missing(name))
    }
    fn number(self, name: &str) -> Parsed<Option<f64>> {
        self.get(name, "a number", Value::as_f64)
    }
    fn need_number(self, name: &str) -> Parsed<f64> {
        self.number(name)?.ok_or_else(|| self.missing(name))
    }
    /// False where absent.
    fn flag(self, name: &str) -> Parsed<bool> {
        Ok(self.get(name, "true or false", Value::as_bool)?.unwrap_or(false))
    }
    fn text(self, name: &str) -> Parsed<Option<&'a str>> {
        self.get(name, "a string", Value::as_str)
    }
    fn object(self, name: &str, prefix: &'static str) -> Parsed<Option<Fields<'a>>> {
        Ok(self.get(name, "an object", Value::as_object)?.map(|map| Fields { map, prefix }))
    }
    /// Refuses any value but `only`; absent is fine.
    fn only(self, name: &str, only: Value) -> Parsed<()> {
        self.get(name, &only.to_string(), |v| (*v == only).then_some(())).map(|_| ())
    }
    fn whole_rotary(self) -> Parsed<()> {
        self.get("partial_rotary_factor", "1", |v| (v.as_f64()? == 1.0).then_some(())).map(|_| ())
    }
}

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

/// The type of the model decides; the names of its classes must not say otherwise. Files name LlamaModel or LLaMAForCausalLM too.
fn check_architecture(f: Fields) -> Parsed<()> {
    let is_llama = |v: &Value| v.as_str().is_some_and(|name| name.to_ascii_lowercase().starts_with("llama"));
    let named = f.get("architectures", "[\"LlamaForCausalLM\"]", |v| match v {
        Value::Array(names) => names.iter().all(is_llama).then_some(!names.is_empty()),
        one => is_llama(one).then_some(true),
    })?;
    f.only("model_type", json!("llama"))?;
    match f.text("model_type")? {
        None if named != Some(true) => Err(f.missing("model_type")),
        _ => Ok(()),
    }
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
    check_architecture(f)?;
    f.get("hidden_act", "\"silu\"", |v| matches!(v.as_str(), Some("silu" | "swish")).then_some(()))?;
    let unquantised = "none (of quantised weights, only those of compressed-tensors are read, and only to run the network)";
    f.get("quantization_config", unquantised, |_| None::<()>)?;

    let hidden_size = f.need_size("hidden_size")?;
    let heads = f.need_size("num_attention_heads")?;
    let head_dim = match f.size("head_dim")? {
        Some(d) => d,
        None if heads > 0 && hidden_size.is_multiple_of(heads) => hidden_size / heads,
        None => return Err(format!("num_attention_heads: expected a divisor of hidden_size = {hidden_size}, got {heads}")),
    };
    let (rope_theta, rope_scaling) = rope(f)?;
    Ok(LlamaConfig {
        hidden_size,
        intermediate_size: f.need_size("intermediate_size")?,
        layers: f.need_size("num_hidden_layers")?,
        heads,
        kv_heads: f.size("num_key_value_heads")?.unwrap_or(heads),
        head_dim,
        vocab_size: f.need_size("vocab_size")?,
        // The architecture's defaults, left out by early files.
        rms_norm_eps: f.number("rms_norm_eps")?.unwrap_or(1e-6),
        max_position_embeddings: f.size("max_position_embeddings")?.unwrap_or(2048),
        rope_theta,
        rope_scaling,
        attention_bias: f.flag("attention_bias")?,
        mlp_bias: f.flag("mlp_bias")?,
        tie_word_embeddings: f.flag("tie_word_embeddings")?,
        bos_token_id: f.get("bos_token_id", "a token id", token_ids)?.and_then(|ids| ids.first().copied()),
        eos_token_ids: f.get("eos_token_id", "a token id or a list of them", token_ids)?.unwrap_or_default(),
        dtype: dtype(f)?,
    })
}

/// θ and scaling, from `rope_parameters` (second generation) or `rope_theta` and `rope_scaling` (first). θ defaults to 10000.
fn rope(f: Fields) -> Parsed<(f64, Option<RopeScaling>)> {
    let (old, new) = (f.object("rope_scaling", "rope_scaling.")?, f.object("rope_parameters", "rope_parameters.")?);
    let part = new.or(old);
    f.whole_rotary()?;
    let outer = f.number("rope_theta")?;
    let inner = part.map_or(Ok(None), |p| p.number("rope_theta"))?;
    if let (Some(outer), Some(inner)) = (outer, inner)
        && outer != inner
    {
        return Err(format!("rope_theta: expected one value, got {outer} at the top level and {inner} inside"));
    }
    let theta = inner.or(outer).unwrap_or(10000.0);
    let Some(p) = part else { return Ok((theta, None)) };
    p.whole_rotary()?;
    let scaling = match p.text("rope_type")?.or(p.text("type")?) {
        Some("default") => None,
        // A bare θ has no type.
        None if p.number("factor")?.is_none() => None,
        None => return Err(p.missing("rope_type")),
        Some("linear") => Some(RopeScaling::Linear { factor: p.need_number("factor")? }),
        Some("llama3") => Some(RopeScaling::Llama3 {
            factor: p.need_number("factor")?,
            low_freq_factor: p.need_number("low_freq_factor")?,
            high_freq_factor: p.need_number("high_freq_factor")?,
            original_max_position_embeddings: match p.size("original_max_position_embeddings")? {
                Some(n) => n,
                None => {
                    f.need_size("original_max_position_embeddings").map_err(|_| p.missing("original_max_position_embeddings"))?
                }
            },
        }),
        Some(other) => return Err(p.wrong("rope_type", "\"default\", \"linear\" or \"llama3\"", &json!(other))),
    };
    Ok((theta, scaling))
}

#[cfg(test)]
pub(crate) mod tests {
    use std::path::Path;

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
            (json!({"model_type": "qwen2"}), "model_type: expected \"llama\", got \"qwen2\""),
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
            (json!({"rope_scaling": {"type": "dynamic", "factor": 2.0}}), "rope_scaling.rope_type: expected \"default\""),
            (json!({"rope_parameters": {"rope_type": "yarn"}}), "got \"yarn\""),
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
