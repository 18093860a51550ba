//! `config.json` of a LLaMA and its relatives, in both generations of key names.

mod family;
mod fields;
mod parse;
mod rope;
mod write;

pub use family::{Absent, Biases, Facts, Family, Windows};
pub use rope::{Frequencies, RopeScaling};

use std::path::Path;

use serde_json::{Map, Value};

use crate::rotation::Sizes;
use crate::{DType, Error, Result, io};

/// Configurations have a thousand bytes; those that name many classes have a few hundred thousand.
const MAX_BYTES: usize = 4 << 20;

/// The shape and constants of a LLaMA or a relative of it.
#[derive(Clone, Debug, PartialEq)]
pub struct LlamaConfig {
    /// Which architecture it is.
    pub family: Family,
    /// Width C of the residual stream.
    pub hidden_size: usize,
    /// Width F of the MLP.
    pub intermediate_size: usize,
    /// Number of decoder layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width D of one head; even. `heads * head_dim` need not be `hidden_size`.
    pub head_dim: usize,
    /// Number of token ids V.
    pub vocab_size: usize,
    /// Added to the mean square inside RMSNorm's root.
    pub rms_norm_eps: f64,
    /// The context the model was made for.
    pub max_position_embeddings: usize,
    /// The base θ of the rotary embedding.
    pub rope_theta: f64,
    /// The part of a head that the rotary embedding turns, above 0 up to 1: [`LlamaConfig::rotary_dim`].
    pub partial_rotary_factor: f64,
    /// How the rotary frequencies are stretched, if at all.
    pub rope_scaling: Option<RopeScaling>,
    /// Layers without rotary embedding, ascending.
    pub no_rope_layers: Vec<usize>,
    /// Keys that a query sees, its own included, in the layers that have a window: [`LlamaConfig::window`].
    pub sliding_window: Option<usize>,
    /// Layers that see everything although there is a window, ascending.
    pub full_attention_layers: Vec<usize>,
    /// Scalars on the way through the network.
    pub multipliers: Multipliers,
    /// q, k, v and, but for [`Biases::Qkv`], o add a bias.
    pub attention_bias: bool,
    /// gate, up and down add a bias.
    pub mlp_bias: bool,
    /// The output head is the embedding (copied when loaded).
    pub tie_word_embeddings: bool,
    /// The token that starts a text.
    pub bos_token_id: Option<u32>,
    /// The tokens that end one; may be none.
    pub eos_token_ids: Vec<u32>,
    /// The element type the configuration claims. What the weight files say is what counts.
    pub dtype: Option<DType>,
}

/// Scalars of a network, folded into its weights as the gains of its norms are when they are read: into the embedding, o and down, q,
/// and the head.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Multipliers {
    /// The embedding is multiplied by it.
    pub embedding: f64,
    /// What attention and MLP add to the stream is multiplied by it.
    pub residual: f64,
    /// Scores `q kᵀ` are multiplied by it; `None`: 1/√D.
    pub attention: Option<f64>,
    /// Logits are divided by it.
    pub logits: f64,
}

impl Multipliers {
    /// Nothing is multiplied.
    pub const NONE: Self = Self { embedding: 1.0, residual: 1.0, attention: None, logits: 1.0 };
}

/// Decoder layers at most.
const MOST_LAYERS: usize = 1 << 12;

impl Default for LlamaConfig {
    /// A LLaMA 1 with sizes of 0, which [`LlamaConfig::validate`] refuses: for what a configuration made by hand leaves out.
    fn default() -> Self {
        Self {
            family: Family::Llama,
            hidden_size: 0,
            intermediate_size: 0,
            layers: 0,
            heads: 0,
            kv_heads: 0,
            head_dim: 0,
            vocab_size: 0,
            rms_norm_eps: 1e-6,
            max_position_embeddings: 2048,
            rope_theta: 1e4,
            partial_rotary_factor: 1.0,
            rope_scaling: None,
            no_rope_layers: vec![],
            sliding_window: None,
            full_attention_layers: vec![],
            multipliers: Multipliers::NONE,
            attention_bias: false,
            mlp_bias: false,
            tie_word_embeddings: false,
            bos_token_id: None,
            eos_token_ids: vec![],
            dtype: None,
        }
    }
}

impl LlamaConfig {
    /// Reads the `config.json` of a model's folder.
    ///
    /// # Errors
    /// Those of [`LlamaConfig::from_file`]; where there is no such file, what seems to be there instead and what to do.
    pub fn from_dir(dir: impl AsRef<Path>) -> Result<Self> {
        super::folder::check(dir.as_ref())?;
        Self::from_file(dir.as_ref().join("config.json"))
    }

    /// Reads and validates a `config.json`. What may be left out, and how things may be spelt, is as in transformers.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Format`] naming the file, the field, what was expected and what came, for anything that is not a
    /// model this crate computes exactly: another architecture ([`Family`]), another activation, another kind of rotary embedding.
    pub fn from_file(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        Self::from_json(&std::fs::read(path).map_err(Error::io(path))?, path)
    }

    /// The same from the file's bytes; `path` is for messages. Any bytes give a configuration or an error.
    ///
    /// # Errors
    /// Those of [`LlamaConfig::from_file`], without [`Error::Io`].
    pub fn from_json(bytes: &[u8], path: &Path) -> Result<Self> {
        let bad = |message: String| Error::format(path, message);
        if let Some(message) = io::lfs_pointer(bytes) {
            return Err(bad(message.into()));
        }
        if bytes.len() > MAX_BYTES {
            return Err(bad(format!("expected at most {MAX_BYTES} bytes, got {}", bytes.len())));
        }
        let map: Map<String, Value> =
            serde_json::from_slice(bytes).map_err(|e| bad(format!("expected a JSON object: {}", io::short(e))))?;
        let config = parse::parse(&map).map_err(bad)?;
        config.problem().map_or(Ok(config), |p| Err(bad(p)))
    }

    /// Checks what [`from_file`](Self::from_file) checks, for a configuration made by hand.
    ///
    /// # Errors
    /// [`Error::Argument`] naming the field, what was expected and what came.
    pub fn validate(&self) -> Result<()> {
        self.problem().map_or(Ok(()), |p| Err(Error::argument("LlamaConfig", p)))
    }

    /// The first thing wrong, in the file's names.
    fn problem(&self) -> Option<String> {
        let sizes = [
            ("hidden_size", self.hidden_size, 1 << 20),
            ("intermediate_size", self.intermediate_size, 1 << 22),
            ("num_hidden_layers", self.layers, MOST_LAYERS),
            ("num_attention_heads", self.heads, 1 << 12),
            ("num_key_value_heads", self.kv_heads, 1 << 12),
            ("head_dim", self.head_dim, 1 << 14),
            ("vocab_size", self.vocab_size, 1 << 26),
            ("max_position_embeddings", self.max_position_embeddings, 1 << 31),
        ];
        for (name, got, most) in sizes {
            if !(1..=most).contains(&got) {
                return Some(format!("{name}: expected 1 to {most}, got {got}"));
            }
        }
        if !self.head_dim.is_multiple_of(2) {
            return Some(format!("head_dim: expected an even number (rotary halves), got {}", self.head_dim));
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            let (heads, kv) = (self.heads, self.kv_heads);
            return Some(format!("num_key_value_heads: expected a divisor of num_attention_heads = {heads}, got {kv}"));
        }
        if !(self.rms_norm_eps >= 0.0 && self.rms_norm_eps < 1.0) {
            return Some(format!("rms_norm_eps: expected 0 up to below 1, got {}", self.rms_norm_eps));
        }
        if let Some(problem) = self.rope_problem().or_else(|| self.family_problem()) {
            return Some(problem);
        }
        match self.bos_token_id {
            Some(id) if id as usize >= self.vocab_size => {
                Some(format!("bos_token_id: expected less than vocab_size = {}, got {id}", self.vocab_size))
            }
            _ => None,
        }
    }

    /// What this family's files cannot say.
    fn family_problem(&self) -> Option<String> {
        let facts = self.family.facts();
        let refuse = |wrong: bool, field: &str, expected: &str| {
            wrong.then(|| format!("{field}: expected {expected} in a model of type {}", facts.model_type))
        };
        let Multipliers { embedding, residual, attention, logits } = self.multipliers;
        let numbers = [embedding, residual, attention.unwrap_or(1.0), logits];
        let (qkv, never) = (facts.biases == Biases::Qkv, facts.biases == Biases::Never);
        refuse(qkv && !self.attention_bias, "attention_bias", "true")
            .or_else(|| refuse(never && self.attention_bias, "attention_bias", "false"))
            .or_else(|| refuse(facts.biases != Biases::All && self.mlp_bias, "mlp_bias", "false"))
            .or_else(|| refuse(!facts.partial_rotary && self.partial_rotary_factor != 1.0, "partial_rotary_factor", "1"))
            .or_else(|| refuse(!facts.no_rope && !self.no_rope_layers.is_empty(), "no_rope_layers", "none"))
            .or_else(|| refuse(facts.windows == Windows::Never && self.sliding_window.is_some(), "sliding_window", "none"))
            .or_else(|| refuse(!facts.multipliers && self.multipliers != Multipliers::NONE, "multipliers", "none"))
            .or_else(|| refuse(self.sliding_window == Some(0), "sliding_window", "at least 1"))
            .or_else(|| refuse(!numbers.iter().all(|x| (1e-6..1e6).contains(x)), "multipliers", "1e-6 to 1e6"))
    }

    /// The sizes that [scales](crate::rotation::Scale) depend on.
    pub fn scale_sizes(&self) -> Sizes {
        let Self { layers, hidden_size: hidden, intermediate_size: intermediate, kv_heads, head_dim, .. } = *self;
        let (pairs, head_norms) = (self.rotary_dim() / 2, self.family.facts().head_norms);
        Sizes { layers, hidden, intermediate, kv_heads, head_dim, pairs, head_norms }
    }

    /// Query heads that share a key and value head. (Of a configuration without such heads, which [`validate`](Self::validate)
    /// refuses: all.)
    pub fn group(&self) -> usize {
        self.heads / self.kv_heads.max(1)
    }

    /// Keys that a query of layer `l` sees, its own included: those of positions p − window + 1 to p.
    pub fn window(&self, l: usize) -> Option<usize> {
        self.sliding_window.filter(|_| !self.full_attention_layers.contains(&l))
    }

    /// True where layer `l` turns its queries and keys by their positions.
    pub fn has_rope(&self, l: usize) -> bool {
        !self.no_rope_layers.contains(&l)
    }

    /// The configuration of the network whose weights hold the [`Multipliers`], which are none then.
    #[must_use]
    pub fn folded(&self) -> Self {
        Self { multipliers: Multipliers::NONE, ..self.clone() }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::parse::tests::{llama3, with};

    #[test]
    fn rotary_frequencies() {
        let plain = with(json!({"rope_theta": 5e5, "head_dim": 128})).unwrap().frequencies(1).inverse;
        assert_eq!((plain.len(), plain[0]), (64, 1.0));
        assert!((plain[32] - 5e5f64.powf(-0.5)).abs() < 1e-18);
        let half =
            with(json!({"rope_theta": 5e5, "head_dim": 128, "rope_parameters": {"rope_type": "linear", "factor": 2.0}})).unwrap();
        assert!(half.frequencies(1).inverse.iter().zip(&plain).all(|(a, b)| *a == b / 2.0));

        // LLaMA 3.1: the published piecewise definition, by wavelength.
        let scaled = with(json!({"rope_theta": 5e5, "head_dim": 128, "rope_scaling": llama3()})).unwrap().frequencies(1).inverse;
        let (mut kept, mut ramp, mut stretched) = (0, 0, 0);
        for (got, f) in scaled.iter().zip(&plain) {
            let wavelength = 2.0 * std::f64::consts::PI / f;
            let want = if wavelength < 8192.0 / 4.0 {
                kept += 1;
                *f
            } else if wavelength > 8192.0 / 1.0 {
                stretched += 1;
                f / 8.0
            } else {
                ramp += 1;
                let s = (8192.0 / wavelength - 1.0) / (4.0 - 1.0);
                (1.0 - s) * f / 8.0 + s * f
            };
            assert!((got - want).abs() <= 1e-15 * want, "{got} {want}");
        }
        assert_eq!((kept, ramp, stretched), (29, 6, 29));
    }
}
