//! The architectures that are read, a row each: what tells them from a LLaMA, and what they take for a field that is left out.

use super::fields::{Fields, Parsed};

/// Which architecture a model is: decoders of norms, grouped attention and a gated MLP, written into a residual stream.
///
/// What differs is in one table, [`Family::facts`]; the network asks the configuration.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Family {
    /// LLaMA 1 to 3, and what is published under its name: SmolLM 1 and 2, DeepSeek-R1-Distill-Llama.
    #[default]
    Llama,
    /// Mistral 7B, Nemo, Small: a sliding window.
    Mistral,
    /// Qwen 2 and 2.5, DeepSeek-R1-Distill-Qwen: biases of q, k and v.
    Qwen2,
    /// Qwen 3, dense: norms of every query and key head.
    Qwen3,
    /// Phi 3 to 4: q, k, v and gate, up in one tensor each; rotary embedding of a part of a head.
    Phi3,
    /// SmolLM 3: layers without rotary embedding.
    SmolLm3,
    /// Granite 3: scalars on the embedding, the residual branches, the scores and the logits.
    Granite,
}

/// Which linears may add a bias.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Biases {
    /// None.
    Never,
    /// q, k and v, always.
    Qkv,
    /// q, k, v and o where `attention_bias` says so.
    Attention,
    /// The same, and gate, up and down where `mlp_bias` says so.
    All,
}

/// How a configuration says which layers see a window of the last tokens only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Windows {
    /// No layer ever does.
    Never,
    /// All do where `sliding_window` is a number.
    Every,
    /// Where `use_sliding_window`, those that `layer_types` names, or else those from `max_window_layers` on.
    FromLayer,
    /// Where `use_sliding_window`, those that `layer_types` names, or else those without rotary embedding.
    WithoutRope,
}

/// What tells a family from the others.
#[derive(Clone, Copy, Debug)]
pub struct Facts {
    /// `model_type` in `config.json`.
    pub model_type: &'static str,
    /// The class that `architectures` names.
    pub class: &'static str,
    /// Which linears may add a bias.
    pub biases: Biases,
    /// RMSNorms with gains `[D]` of every head of q and k, before the rotary embedding.
    pub head_norms: bool,
    /// The files hold q, k, v behind one another as `qkv_proj`, and gate, up as `gate_up_proj`.
    pub fused: bool,
    /// `partial_rotary_factor` may be less than 1.
    pub partial_rotary: bool,
    /// `no_rope_layers` is read.
    pub no_rope: bool,
    /// `embedding_multiplier`, `residual_multiplier`, `attention_multiplier` and `logits_scaling` are read.
    pub multipliers: bool,
    /// Which layers have a sliding window.
    pub windows: Windows,
    /// What a field that is left out is.
    pub absent: Absent,
}

/// What transformers takes for a field that `config.json` leaves out.
#[derive(Clone, Copy, Debug)]
pub struct Absent {
    /// `num_key_value_heads`; none: as many as query heads.
    pub kv_heads: Option<usize>,
    /// `head_dim`; none: the hidden size over the query heads.
    pub head_dim: Option<usize>,
    /// `max_position_embeddings`.
    pub context: usize,
    /// `original_max_position_embeddings`, outside the rotary scaling.
    pub original_context: Option<usize>,
    /// `rms_norm_eps`.
    pub eps: f64,
    /// `rope_theta`.
    pub theta: f64,
    /// `tie_word_embeddings`.
    pub tied: bool,
    /// `sliding_window`.
    pub window: Option<usize>,
}

impl Family {
    /// All of them.
    pub const ALL: [Self; 7] = [Self::Llama, Self::Mistral, Self::Qwen2, Self::Qwen3, Self::Phi3, Self::SmolLm3, Self::Granite];

    /// The row of the table.
    pub const fn facts(self) -> Facts {
        let llama = Facts {
            model_type: "llama",
            class: "LlamaForCausalLM",
            biases: Biases::All,
            head_norms: false,
            fused: false,
            partial_rotary: false,
            no_rope: false,
            multipliers: false,
            windows: Windows::Never,
            absent: Absent {
                kv_heads: None,
                head_dim: None,
                context: 2048,
                original_context: None,
                eps: 1e-6,
                theta: 1e4,
                tied: false,
                window: None,
            },
        };
        let qwen = Absent { kv_heads: Some(32), context: 32_768, window: Some(4096), ..llama.absent };
        match self {
            Self::Llama => llama,
            Self::Mistral => Facts {
                model_type: "mistral",
                class: "MistralForCausalLM",
                biases: Biases::Never,
                windows: Windows::Every,
                absent: Absent { kv_heads: Some(8), context: 131_072, window: Some(4096), ..llama.absent },
                ..llama
            },
            Self::Qwen2 => Facts {
                model_type: "qwen2",
                class: "Qwen2ForCausalLM",
                biases: Biases::Qkv,
                windows: Windows::FromLayer,
                absent: qwen,
                ..llama
            },
            Self::Qwen3 => Facts {
                model_type: "qwen3",
                class: "Qwen3ForCausalLM",
                biases: Biases::Attention,
                head_norms: true,
                windows: Windows::FromLayer,
                absent: Absent { head_dim: Some(128), ..qwen },
                ..llama
            },
            Self::Phi3 => Facts {
                model_type: "phi3",
                class: "Phi3ForCausalLM",
                biases: Biases::Never,
                fused: true,
                partial_rotary: true,
                windows: Windows::Every,
                absent: Absent { context: 4096, original_context: Some(4096), eps: 1e-5, ..llama.absent },
                ..llama
            },
            Self::SmolLm3 => Facts {
                model_type: "smollm3",
                class: "SmolLM3ForCausalLM",
                no_rope: true,
                windows: Windows::WithoutRope,
                absent: Absent { kv_heads: Some(4), context: 32_768, theta: 2e6, tied: true, ..llama.absent },
                ..llama
            },
            Self::Granite => Facts { model_type: "granite", class: "GraniteForCausalLM", multipliers: true, ..llama },
        }
    }
}

const POST_NORMS: &str =
    "a norm with a gain behind o and down does not commute with R1, which then cannot be merged into their weights";
const EXPERTS: &str = "it is a mixture of experts, whose routers and experts are not read";
const OTHER_NORMS: &str = "its norms are no RMSNorms with gains, so R1 does not pass through them";
const INSIDE: &str = "its language model is a part of it; expected the language model alone";

/// Architectures that people have and that are refused: `model_type`, and why.
const REFUSED: &[(&str, &str)] = &[
    ("gemma", "its MLP is gated by GELU"),
    ("gemma2", POST_NORMS),
    ("gemma3", POST_NORMS),
    ("gemma3_text", POST_NORMS),
    ("gemma3n", POST_NORMS),
    ("gemma4", POST_NORMS),
    ("olmo", OTHER_NORMS),
    ("olmo2", POST_NORMS),
    ("olmo3", POST_NORMS),
    ("phi", OTHER_NORMS),
    ("cohere", OTHER_NORMS),
    ("cohere2", OTHER_NORMS),
    ("mixtral", EXPERTS),
    ("qwen2_moe", EXPERTS),
    ("qwen3_moe", EXPERTS),
    ("qwen3_next", EXPERTS),
    ("phimoe", EXPERTS),
    ("granitemoe", EXPERTS),
    ("granitemoehybrid", EXPERTS),
    ("olmoe", EXPERTS),
    ("gpt_oss", EXPERTS),
    ("deepseek_v2", EXPERTS),
    ("deepseek_v3", EXPERTS),
    ("llama4", EXPERTS),
    ("mistral3", INSIDE),
    ("qwen2_vl", INSIDE),
    ("qwen2_5_vl", INSIDE),
    ("qwen3_vl", INSIDE),
    ("mllama", INSIDE),
    ("llava", INSIDE),
    ("phi4_multimodal", INSIDE),
];

/// The class of a family, or another head on the same network: `Qwen2Model` and `Qwen2ForCausalLM`, and not `Qwen2MoeForCausalLM`.
fn is_class_of(class: &str, model_type: &str) -> bool {
    let class = class.to_ascii_lowercase();
    let rest = class.strip_prefix(&model_type.replace('_', ""));
    rest.is_some_and(|rest| ["for", "model", "pretrained"].iter().any(|head| rest.starts_with(head)))
}

/// The family of a configuration. The type of the model decides; the names of its classes must not say otherwise.
pub(super) fn family(f: Fields) -> Parsed<Family> {
    let names: Vec<&str> = f
        .get("architectures", "a list of names", |v| match v.as_array() {
            Some(names) => names.iter().map(|name| name.as_str()).collect(),
            None => Some(vec![v.as_str()?]),
        })?
        .unwrap_or_default();
    let known = |family: &Family| family.facts().model_type;
    let found = match f.text("model_type")? {
        Some(name) => {
            if let Some((_, why)) = REFUSED.iter().find(|(refused, _)| *refused == name) {
                return Err(format!("model_type: {name} is refused: {why}"));
            }
            Family::ALL.into_iter().find(|family| known(family) == name)
        }
        None => {
            let Some(first) = names.first() else { return Err(f.missing("model_type")) };
            if let Some((_, why)) = REFUSED.iter().find(|(refused, _)| is_class_of(first, refused)) {
                return Err(format!("architectures: {first} is refused: {why}"));
            }
            Family::ALL.into_iter().find(|family| is_class_of(first, known(family)))
        }
    };
    let Some(family) = found else {
        let (field, all) = (if f.has("model_type") { "model_type" } else { "architectures" }, Family::ALL.map(|f| f.facts()));
        let expected = match field {
            "model_type" => all.map(|facts| facts.model_type),
            _ => all.map(|facts| facts.class),
        };
        return Err(f.unknown(field, &format!("one of {}", expected.join(", "))));
    };
    match names.iter().all(|name| is_class_of(name, known(&family))) {
        true => Ok(family),
        false => Err(f.unknown("architectures", &format!("[\"{}\"]", family.facts().class))),
    }
}
