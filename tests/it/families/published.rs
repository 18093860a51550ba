//! Published models: the facts of their `config.json`, and that they give the shapes that the models have. Their number of parameters, as
//! their authors count it, checks the whole table of linears.

use std::path::Path;

use serde_json::{Value, json};
use spinquant::llama::{Family, Linear, LlamaConfig, RopeScaling};

fn parse(facts: &Value) -> LlamaConfig {
    LlamaConfig::from_json(facts.to_string().as_bytes(), Path::new("config.json")).unwrap_or_else(|e| panic!("{facts}: {e}"))
}

/// Every value that is trained.
fn parameters(c: &LlamaConfig) -> usize {
    let tables = if c.tie_word_embeddings { 1 } else { 2 };
    let of = |linear: Linear| {
        let [out, inputs] = linear.shape(c);
        let bias = if linear.has_bias(c) { out } else { 0 };
        let norm = if linear.has_norm(c) { c.head_dim } else { 0 };
        out * inputs + bias + norm
    };
    let layer: usize = Linear::ALL.into_iter().map(of).sum();
    tables * c.vocab_size * c.hidden_size + c.layers * (layer + 2 * c.hidden_size) + c.hidden_size
}

/// `[C, F, layers, H, KV, V]` of a file with these field names.
fn sizes([c, f, layers, heads, kv, vocab]: [usize; 6], kind: &str, more: Value) -> Value {
    let mut facts = json!({
        "model_type": kind, "hidden_size": c, "intermediate_size": f, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv, "vocab_size": vocab, "hidden_act": "silu", "torch_dtype": "bfloat16",
    });
    facts.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    facts
}

/// Name, facts, width of a head and parameters.
fn table() -> Vec<(&'static str, Value, usize, usize)> {
    let no_rope: Vec<u8> = (1..=36).map(|l| u8::from(l % 4 != 0)).collect();
    let long = |count: usize| json!({"type": "longrope", "short_factor": vec![1.0; count], "long_factor": vec![2.0; count]});
    let qwen = |layers: usize, tied: bool, window: usize| {
        json!({
            "architectures": ["Qwen2ForCausalLM"], "rope_theta": 1e6, "tie_word_embeddings": tied, "rms_norm_eps": 1e-6,
            "use_sliding_window": false, "sliding_window": window, "max_window_layers": layers, "max_position_embeddings": 131_072,
        })
    };
    let qwen3 = |tied: bool| {
        json!({
            "architectures": ["Qwen3ForCausalLM"], "head_dim": 128, "attention_bias": false, "rope_theta": 1_000_000,
            "tie_word_embeddings": tied, "use_sliding_window": false, "sliding_window": null, "max_position_embeddings": 40_960,
        })
    };
    let granite = |attention: f64, logits: f64, theta: f64| {
        json!({
            "architectures": ["GraniteForCausalLM"], "attention_bias": false, "mlp_bias": false, "tie_word_embeddings": true,
            "embedding_multiplier": 12.0, "attention_multiplier": attention, "residual_multiplier": 0.22, "logits_scaling": logits,
            "rope_theta": theta, "rms_norm_eps": 1e-5, "rope_scaling": null,
        })
    };
    let llama3 = json!({
        "rope_theta": 5e5, "max_position_embeddings": 131_072,
        "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    });
    let mistral = |head: Value, theta: f64, window: Value| {
        json!({"architectures": ["MistralForCausalLM"], "head_dim": head, "rope_theta": theta, "sliding_window": window,
               "rms_norm_eps": 1e-5, "tie_word_embeddings": false})
    };
    let phi = |window: Value, more: Value| {
        let mut facts = json!({"architectures": ["Phi3ForCausalLM"], "sliding_window": window, "rope_scaling": null});
        facts.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        facts
    };
    vec![
        ("Llama-2-7b", sizes([4096, 11008, 32, 32, 32, 32000], "llama", json!({"rms_norm_eps": 1e-5})), 128, 6_738_415_616),
        ("Llama-3.1-8B", sizes([4096, 14336, 32, 32, 8, 128_256], "llama", llama3.clone()), 128, 8_030_261_248),
        ("DeepSeek-R1-Distill-Llama-70B", sizes([8192, 28672, 80, 64, 8, 128_256], "llama", llama3), 128, 70_553_706_496),
        (
            "SmolLM2-135M",
            sizes([576, 1536, 30, 9, 3, 49152], "llama", json!({"tie_word_embeddings": true, "rope_theta": 1e5})),
            64,
            134_515_008,
        ),
        (
            "Mistral-7B-v0.1",
            sizes([4096, 14336, 32, 32, 8, 32000], "mistral", mistral(Value::Null, 1e4, json!(4096))),
            128,
            7_241_732_096,
        ),
        (
            "Mistral-Nemo-Base-2407",
            sizes([5120, 14336, 40, 32, 8, 131_072], "mistral", mistral(json!(128), 1e6, Value::Null)),
            128,
            12_247_782_400,
        ),
        (
            "Mistral-Small-24B-Base-2501",
            sizes([5120, 32768, 40, 32, 8, 131_072], "mistral", mistral(json!(128), 1e8, Value::Null)),
            128,
            23_572_403_200,
        ),
        ("Qwen2-0.5B", sizes([896, 4864, 24, 14, 2, 151_936], "qwen2", qwen(24, true, 131_072)), 64, 494_032_768),
        ("Qwen2.5-7B", sizes([3584, 18944, 28, 28, 4, 152_064], "qwen2", qwen(28, false, 131_072)), 128, 7_615_616_512),
        ("Qwen2.5-32B", sizes([5120, 27648, 64, 40, 8, 152_064], "qwen2", qwen(64, false, 131_072)), 128, 32_763_876_352),
        ("Qwen2.5-72B", sizes([8192, 29568, 80, 64, 8, 152_064], "qwen2", qwen(80, false, 131_072)), 128, 72_706_203_648),
        (
            "DeepSeek-R1-Distill-Qwen-1.5B",
            sizes([1536, 8960, 28, 12, 2, 151_936], "qwen2", qwen(21, false, 4096)),
            128,
            1_777_088_000,
        ),
        ("Qwen3-0.6B", sizes([1024, 3072, 28, 16, 8, 151_936], "qwen3", qwen3(true)), 128, 596_049_920),
        ("Qwen3-8B", sizes([4096, 12288, 36, 32, 8, 151_936], "qwen3", qwen3(false)), 128, 8_190_735_360),
        ("Qwen3-32B", sizes([5120, 25600, 64, 64, 8, 151_936], "qwen3", qwen3(false)), 128, 32_762_123_264),
        (
            "Phi-3-mini-4k-instruct",
            sizes([3072, 8192, 32, 32, 32, 32064], "phi3", phi(json!(2047), json!({"rope_theta": 1e4}))),
            96,
            3_821_079_552,
        ),
        (
            "Phi-3.5-mini-instruct",
            sizes(
                [3072, 8192, 32, 32, 32, 32064],
                "phi3",
                phi(
                    json!(262_144),
                    json!({"rope_scaling": long(48), "max_position_embeddings": 131_072, "original_max_position_embeddings": 4096}),
                ),
            ),
            96,
            3_821_079_552,
        ),
        (
            "phi-4",
            sizes([5120, 17920, 40, 40, 10, 100_352], "phi3", phi(Value::Null, json!({"rope_theta": 250_000}))),
            128,
            14_659_507_200,
        ),
        (
            "Phi-4-mini-instruct",
            sizes(
                [3072, 8192, 32, 24, 8, 200_064],
                "phi3",
                phi(
                    json!(262_144),
                    json!({"rope_scaling": long(48), "max_position_embeddings": 131_072, "original_max_position_embeddings": 4096,
                           "partial_rotary_factor": 0.75, "tie_word_embeddings": true}),
                ),
            ),
            128,
            3_836_021_760,
        ),
        (
            "SmolLM3-3B",
            sizes(
                [2048, 11008, 36, 16, 4, 128_256],
                "smollm3",
                json!({"architectures": ["SmolLM3ForCausalLM"], "no_rope_layers": no_rope, "no_rope_layer_interval": 4,
                       "rope_theta": 5e6, "use_sliding_window": false, "sliding_window": null, "max_position_embeddings": 65_536}),
            ),
            128,
            3_075_098_624,
        ),
        (
            "granite-3.0-8b-base",
            sizes([4096, 12800, 40, 32, 8, 49155], "granite", granite(0.0078125, 16.0, 1e4)),
            128,
            8_170_848_256,
        ),
        ("granite-3.0-2b-base", sizes([2048, 8192, 40, 32, 8, 49155], "granite", granite(0.015625, 8.0, 1e4)), 64, 2_533_531_648),
    ]
}

#[test]
fn published_models_have_their_shapes() {
    for (name, facts, head_dim, count) in table() {
        let c = parse(&facts);
        assert_eq!(c.head_dim, head_dim, "{name}");
        assert_eq!(parameters(&c), count, "{name}");
        // What is written means the same.
        assert_eq!(LlamaConfig::from_json(c.to_json().as_bytes(), Path::new("written")).unwrap(), c, "{name}");
        assert_eq!(c.rotary_dim() / 2, c.frequencies(1).inverse.len(), "{name}");
    }
}

#[test]
fn published_models_have_their_features() {
    let all = table();
    let of = |wanted: &str| all.iter().find(|(name, ..)| *name == wanted).map(|(_, facts, ..)| parse(facts)).unwrap();
    let windows = |c: &LlamaConfig| (0..c.layers).filter_map(|l| c.window(l)).collect::<Vec<_>>();
    let (mistral, nemo, qwen, phi) =
        (of("Mistral-7B-v0.1"), of("Mistral-Nemo-Base-2407"), of("Qwen2.5-7B"), of("Phi-4-mini-instruct"));
    assert_eq!((windows(&mistral), windows(&nemo), windows(&qwen)), (vec![4096; 32], vec![], vec![]));
    assert_eq!(Linear::O.shape(&nemo), [5120, 4096]);
    let biased = |c: &LlamaConfig| Linear::ALL.into_iter().filter(|l| l.has_bias(c)).collect::<Vec<_>>();
    assert_eq!(biased(&qwen), [Linear::Q, Linear::K, Linear::V]);
    assert!(biased(&mistral).is_empty() && biased(&phi).is_empty());
    // Phi-4-mini: 96 of 128 values are turned, by other angles beyond 4096 tokens, and the scores grow by a factor.
    assert_eq!((phi.rotary_dim(), phi.tie_word_embeddings), (96, true));
    let [near, far] = [4096, 4097].map(|seq| phi.frequencies(seq));
    assert!(near.inverse.iter().zip(&far.inverse).all(|(a, b)| (a / b - 2.0).abs() < 1e-12));
    assert!((near.factor - (1.0 + 32f64.ln() / 4096f64.ln()).sqrt()).abs() < 1e-15);
    let joined = [Linear::Q, Linear::K, Linear::V, Linear::Gate, Linear::Up].map(|l| l.rows(&phi));
    assert_eq!(
        joined.map(|r| (r.file, r.first, r.count, r.of)),
        [
            ("self_attn.qkv_proj", 0, 3072, 5120),
            ("self_attn.qkv_proj", 3072, 1024, 5120),
            ("self_attn.qkv_proj", 4096, 1024, 5120),
            ("mlp.gate_up_proj", 0, 8192, 16384),
            ("mlp.gate_up_proj", 8192, 8192, 16384),
        ]
    );
    let smol = of("SmolLM3-3B");
    assert!(smol.tie_word_embeddings && smol.no_rope_layers == [3, 7, 11, 15, 19, 23, 27, 31, 35]);
    // The scores' multiplier of Granite 8B is 1/D, not 1/√D; of none of the others is there one.
    let granite = of("granite-3.0-8b-base");
    assert_eq!(granite.multipliers.attention, Some(1.0 / 128.0));
    assert!(all.iter().map(|(_, facts, ..)| parse(facts)).all(|c| c.family == Family::Granite || c == c.folded()));
}

/// A file of the other generation, or one that leaves out what transformers has defaults for.
#[test]
fn fields_that_are_left_out_are_those_of_transformers() {
    let with = |kind: &str, more: Value| parse(&sizes([64, 96, 4, 8, 8, 99], kind, more));
    let without = |kind: &str, field: &str| {
        let mut facts = sizes([64, 96, 4, 8, 8, 99], kind, json!({}));
        facts.as_object_mut().unwrap().remove(field);
        parse(&facts)
    };
    let kv = |kind: &str| without(kind, "num_key_value_heads").kv_heads;
    assert_eq!(["llama", "mistral", "phi3", "smollm3", "granite"].map(kv), [8, 8, 8, 4, 8]);
    let none = with("mistral", json!({"num_key_value_heads": null, "num_attention_heads": 16}));
    assert_eq!((none.kv_heads, none.sliding_window), (16, Some(4096)));
    assert_eq!(with("mistral", json!({"sliding_window": null})).sliding_window, None);
    assert_eq!((with("qwen3", json!({})).head_dim, with("qwen2", json!({})).head_dim), (128, 8));
    assert_eq!((with("smollm3", json!({})).rope_theta, with("phi3", json!({})).rms_norm_eps), (2e6, 1e-5));
    assert_eq!(with("granite", json!({})).multipliers.attention, Some(1.0));
    assert_eq!(with("granite", json!({"attention_multiplier": 8f64.sqrt().recip()})).multipliers.attention, None);
    // Windows of some layers.
    let window = json!({"use_sliding_window": true, "sliding_window": 7, "max_window_layers": 3});
    assert_eq!(with("qwen2", window.clone()).full_attention_layers, [0, 1, 2]);
    let mut typed = window.clone();
    typed["layer_types"] = json!(["sliding_attention", "full_attention", "full_attention", "sliding_attention"]);
    assert_eq!(with("qwen3", typed).full_attention_layers, [1, 2]);
    assert_eq!(with("smollm3", window).full_attention_layers, [0, 1, 2]);
    let every = json!({"use_sliding_window": true, "sliding_window": 7, "max_window_layers": 4});
    assert_eq!(with("qwen2", every).sliding_window, None);
    // The context before stretching: outside the scaling, in it, or the model's.
    let yarn = |more: Value| {
        let mut facts = json!({"max_position_embeddings": 4096, "rope_scaling": {"type": "yarn", "factor": 4.0}});
        for (field, value) in more.as_object().unwrap() {
            match field.as_str() {
                "inside" => facts["rope_scaling"]["original_max_position_embeddings"] = value.clone(),
                _ => facts["original_max_position_embeddings"] = value.clone(),
            }
        }
        match with("qwen2", facts).rope_scaling {
            Some(RopeScaling::Yarn { original_max_position_embeddings: n, .. }) => n,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!([json!({}), json!({"inside": 5}), json!({"inside": 5, "outside": 6})].map(yarn), [4096, 5, 6]);
    // What early files of Phi 3 call by other names.
    for kind in ["su", "yarn", "longrope"] {
        let scaling = json!({"type": kind, "short_factor": [1, 1, 1, 1], "long_factor": [2, 2, 2, 2]});
        let c = with("phi3", json!({"rope_scaling": scaling}));
        assert!(matches!(c.rope_scaling, Some(RopeScaling::LongRope { original_max_position_embeddings: 4096, .. })), "{kind}");
    }
}
