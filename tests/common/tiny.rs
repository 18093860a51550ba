//! Tiny random models in the Hugging Face layout.

use std::collections::BTreeMap;
use std::path::Path;

use spinquant::llama::{Affine, Biases, Family, Llama, LlamaConfig, Multipliers, RopeScaling, Weights, Windows};
use spinquant::ops::randn;
use spinquant::quant::Scheme;
use spinquant::{DType, Tensor, io};

/// 2 layers, hidden 16, MLP 24 (so that R4 has a table of 12), heads of 8.
pub fn config(heads: usize, kv_heads: usize, tied: bool) -> LlamaConfig {
    LlamaConfig {
        hidden_size: 16,
        intermediate_size: 24,
        layers: 2,
        heads,
        kv_heads,
        head_dim: 8,
        vocab_size: 31,
        rms_norm_eps: 1e-5,
        max_position_embeddings: 64,
        rope_theta: 10000.0,
        tie_word_embeddings: tied,
        bos_token_id: Some(1),
        eos_token_ids: vec![2],
        dtype: None,
        ..LlamaConfig::default()
    }
}

/// The same with the rotary scaling of LLaMA 3.1, made to matter within a few positions.
pub fn llama3(heads: usize, kv_heads: usize) -> LlamaConfig {
    let scaling =
        RopeScaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_max_position_embeddings: 32 };
    LlamaConfig { rope_scaling: Some(scaling), ..config(heads, kv_heads, false) }
}

/// The same with a bias in every linear.
pub fn with_biases(config: LlamaConfig) -> LlamaConfig {
    LlamaConfig { attention_bias: true, mlp_bias: true, ..config }
}

/// The same as another family, with everything that tells it from a LLaMA; its flags as they are where it may have either.
pub fn of_family(config: LlamaConfig, family: Family) -> LlamaConfig {
    let facts = family.facts();
    LlamaConfig {
        family,
        attention_bias: match facts.biases {
            Biases::Never => false,
            Biases::Qkv => true,
            Biases::Attention | Biases::All => config.attention_bias,
        },
        mlp_bias: facts.biases == Biases::All && config.mlp_bias,
        // Half of a head, where that has pairs.
        partial_rotary_factor: if facts.partial_rotary && config.head_dim.is_multiple_of(4) { 0.5 } else { 1.0 },
        // Shorter than the texts of the tests.
        sliding_window: (facts.windows != Windows::Never).then_some(4),
        full_attention_layers: if matches!(facts.windows, Windows::FromLayer | Windows::WithoutRope) && config.layers > 1 {
            vec![0]
        } else {
            vec![]
        },
        no_rope_layers: if facts.no_rope { vec![config.layers - 1] } else { vec![] },
        multipliers: match facts.multipliers {
            true => Multipliers { embedding: 3.0, residual: 0.4, attention: Some(0.7), logits: 0.25 },
            false => Multipliers::NONE,
        },
        ..config
    }
}

/// Writes `config.json` and `model.safetensors`, with random RMSNorm gains or gains of 1.
pub fn write(dir: &Path, config: &LlamaConfig, dtype: DType, seed: u64, gains: bool) {
    let w = Weights::random(config, seed).unwrap();
    let gain = |i: u64| {
        let x = randn([config.hidden_size], 1000 * seed + i).into_vec::<f64>().unwrap();
        let gain = |x: f64| if gains { 1.0 + 0.3 * x } else { 1.0 };
        Tensor::from_vec(x.into_iter().map(gain).collect::<Vec<f64>>(), [config.hidden_size]).unwrap()
    };
    let mut tensors = BTreeMap::from([("model.embed_tokens.weight".into(), w.embedding), ("model.norm.weight".into(), gain(0))]);
    if !config.tie_word_embeddings {
        tensors.insert("lm_head.weight".into(), w.head);
    }
    for (l, layer) in w.layers.into_iter().enumerate() {
        let mut add = |name: &str, t: Tensor| drop(tensors.insert(format!("model.layers.{l}.{name}"), t));
        add("input_layernorm.weight", gain(2 * l as u64 + 1));
        add("post_attention_layernorm.weight", gain(2 * l as u64 + 2));
        // q, k, v and gate, up behind one another where the family's files have them so.
        let mut joined: Vec<(&str, Vec<Tensor>)> = vec![];
        for (linear, Affine { weight, bias, norm }) in layer {
            let (name, file) = (linear.row().file, linear.rows(config).file);
            match joined.iter_mut().find(|(other, _)| *other == file) {
                Some((_, parts)) => parts.push(weight),
                None => joined.push((file, vec![weight])),
            }
            bias.into_iter().for_each(|b| add(&format!("{name}.bias"), b));
            norm.into_iter().for_each(|g| add(&format!("{}.weight", name.replace("proj", "norm")), g));
        }
        joined.into_iter().for_each(|(file, parts)| add(&format!("{file}.weight"), Tensor::concat(&parts).unwrap()));
    }
    let named = |(name, t): (String, Tensor)| (name, t.to_dtype(dtype).unwrap());
    std::fs::create_dir_all(dir).unwrap();
    let metadata = BTreeMap::from([("format".to_string(), "pt".to_string())]);
    io::save_tensors(&dir.join("model.safetensors"), &tensors.into_iter().map(named).collect(), &metadata).unwrap();
    std::fs::write(dir.join("config.json"), LlamaConfig { dtype: Some(dtype), ..config.clone() }.to_json()).unwrap();
}

/// Token ids of two sequences of 9.
pub fn tokens(config: &LlamaConfig) -> Vec<u32> {
    (0..18).map(|i| (i * i * 7 + 3 * i) % config.vocab_size as u32).collect()
}

/// Full-precision logits of [`tokens`] without rotations.
pub fn logits(model: &Llama) -> Vec<f64> {
    let merged = model.merge(None, &Scheme::FULL_PRECISION).unwrap();
    merged.logits(&tokens(&model.config), 9).unwrap().to_f64_vec().unwrap()
}
