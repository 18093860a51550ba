//! Writing `config.json`.

use serde_json::{Map, Value, json};

use super::{Biases, Family, LlamaConfig, Multipliers, RopeScaling, Windows};
use crate::DType;

impl LlamaConfig {
    /// A `config.json` that this crate and the Python libraries read, old and new: the first generation's key names, of the family's own
    /// architecture.
    pub fn to_json(&self) -> String {
        let facts = self.family.facts();
        let mut config = json!({
            "architectures": [facts.class],
            "model_type": facts.model_type,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab_size,
            "rms_norm_eps": self.rms_norm_eps,
            "max_position_embeddings": self.max_position_embeddings,
            "rope_theta": self.rope_theta,
            "rope_scaling": self.rope_json(),
            "tie_word_embeddings": self.tie_word_embeddings,
            "hidden_act": "silu",
            "bos_token_id": self.bos_token_id,
            "eos_token_id": match self.eos_token_ids[..] {
                [] => Value::Null,
                [id] => id.into(),
                ref ids => ids.into(),
            },
        });
        let fields = config.as_object_mut().expect("an object");
        // Said where transformers would take a token that the vocabulary may lack.
        if self.family != Family::Llama {
            fields.insert("pad_token_id".into(), Value::Null);
        }
        if matches!(facts.biases, Biases::Attention | Biases::All) {
            fields.insert("attention_bias".into(), self.attention_bias.into());
        }
        if facts.biases == Biases::All {
            fields.insert("mlp_bias".into(), self.mlp_bias.into());
        }
        if facts.partial_rotary {
            fields.insert("partial_rotary_factor".into(), self.partial_rotary_factor.into());
        }
        if let (Some(_), Some(RopeScaling::LongRope { original_max_position_embeddings, .. })) =
            (facts.absent.original_context, &self.rope_scaling)
        {
            fields.insert("original_max_position_embeddings".into(), (*original_max_position_embeddings).into());
        }
        fields.extend(self.window_json());
        fields.extend(self.multipliers_json());
        if facts.no_rope {
            let rope: Vec<u8> = (0..self.layers).map(|l| u8::from(self.has_rope(l))).collect();
            fields.insert("no_rope_layers".into(), rope.into());
        }
        if let Some(dtype) = self.dtype {
            fields.insert(
                "torch_dtype".into(),
                json!(match dtype {
                    DType::F64 => "float64",
                    DType::F32 => "float32",
                    DType::F16 => "float16",
                    DType::BF16 => "bfloat16",
                    DType::U32 => "uint32",
                }),
            );
        }
        format!("{config:#}\n")
    }

    fn window_json(&self) -> Map<String, Value> {
        let mut fields = Map::new();
        let windows = self.family.facts().windows;
        if windows != Windows::Never {
            fields.insert("sliding_window".into(), self.sliding_window.into());
        }
        if matches!(windows, Windows::FromLayer | Windows::WithoutRope) {
            fields.insert("use_sliding_window".into(), self.sliding_window.is_some().into());
            let kind = |l: usize| if self.window(l).is_some() { "sliding_attention" } else { "full_attention" };
            let kinds: Vec<&str> = (0..self.layers).map(kind).collect();
            if windows == Windows::FromLayer {
                // What versions read that know no types of layers.
                let first = kinds.iter().position(|kind| *kind == "sliding_attention").unwrap_or(self.layers);
                fields.insert("max_window_layers".into(), first.into());
            }
            fields.insert("layer_types".into(), kinds.into());
        }
        fields
    }

    /// The fields of the [`Multipliers`], of a family that has them.
    pub(crate) fn multipliers_json(&self) -> Map<String, Value> {
        if !self.family.facts().multipliers {
            return Map::new();
        }
        let Multipliers { embedding, residual, attention, logits } = self.multipliers;
        Map::from_iter([
            ("embedding_multiplier".into(), embedding.into()),
            ("residual_multiplier".into(), residual.into()),
            ("attention_multiplier".into(), attention.unwrap_or((self.head_dim as f64).sqrt().recip()).into()),
            ("logits_scaling".into(), logits.into()),
        ])
    }
}
