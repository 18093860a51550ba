//! `config.json` of a LLaMA, in both generations of key names.

mod parse;

use std::path::Path;

use serde_json::{Map, Value, json};

use crate::{DType, Error, Result, io};

/// Configurations have a thousand bytes; those that name many classes have a few hundred thousand.
const MAX_BYTES: usize = 4 << 20;

/// The shape and constants of a LLaMA 2 or 3.
#[derive(Clone, Debug, PartialEq)]
pub struct LlamaConfig {
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
    /// How the rotary frequencies are stretched, if at all.
    pub rope_scaling: Option<RopeScaling>,
    /// q, k, v and o add a bias.
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

/// Stretching of the rotary frequencies for contexts longer than trained on; see [`LlamaConfig::inverse_frequencies`].
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum RopeScaling {
    /// Every frequency divided by `factor`.
    Linear {
        /// At least 1.
        factor: f64,
    },
    /// LLaMA 3.1: low frequencies divided by `factor`, high ones kept, a ramp between.
    Llama3 {
        /// At least 1.
        factor: f64,
        /// Wavelengths above `original_max_position_embeddings / low_freq_factor` are stretched in full.
        low_freq_factor: f64,
        /// Wavelengths below `original_max_position_embeddings / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// The context before stretching.
        original_max_position_embeddings: usize,
    },
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
    /// LLaMA this crate computes exactly: another architecture, another activation, another kind of rotary embedding.
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
            ("num_hidden_layers", self.layers, 1 << 12),
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
        if !(self.rope_theta >= 1.0 && self.rope_theta < 1e15) {
            return Some(format!("rope_theta: expected 1 up to 1e15, got {}", self.rope_theta));
        }
        let factor_is_bad = |f: f64| !(1.0..=1e6).contains(&f);
        match self.rope_scaling {
            Some(RopeScaling::Linear { factor } | RopeScaling::Llama3 { factor, .. }) if factor_is_bad(factor) => {
                return Some(format!("rope scaling factor: expected 1 to 1e6, got {factor}"));
            }
            Some(RopeScaling::Llama3 {
                low_freq_factor: low,
                high_freq_factor: high,
                original_max_position_embeddings: n,
                ..
            }) => {
                if !(low > 0.0 && high > low && high < 1e6) {
                    return Some(format!(
                        "rope scaling: expected 0 < low_freq_factor < high_freq_factor < 1e6, got {low} and {high}"
                    ));
                }
                if !(1..=1 << 31).contains(&n) {
                    return Some(format!("original_max_position_embeddings: expected 1 to {}, got {n}", 1u64 << 31));
                }
            }
            _ => {}
        }
        match self.bos_token_id {
            Some(id) if id as usize >= self.vocab_size => {
                Some(format!("bos_token_id: expected less than vocab_size = {}, got {id}", self.vocab_size))
            }
            _ => None,
        }
    }

    /// Angle per position of each rotated pair: `head_dim / 2` numbers.
    ///
    /// fᵢ = θ^(−2i/D). Linear scaling: fᵢ / factor. LLaMA 3.1, with n the original context and λᵢ = 2π/fᵢ the wavelength:
    /// ```text
    /// fᵢ                                     where λᵢ < n / high_freq_factor
    /// fᵢ / factor                            where λᵢ > n / low_freq_factor
    /// (1 − s) fᵢ / factor + s fᵢ             between; s = (n/λᵢ − low_freq_factor) / (high_freq_factor − low_freq_factor)
    /// ```
    pub fn inverse_frequencies(&self) -> Vec<f64> {
        let plain = |i: usize| self.rope_theta.powf(-2.0 * i as f64 / self.head_dim as f64);
        let scaled = |f: f64| match self.rope_scaling {
            None => f,
            Some(RopeScaling::Linear { factor }) => f / factor,
            Some(RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings }) => {
                // n/λ: how often the wave fits in the original context. s is 1 or more for short waves, 0 or less for long ones.
                let waves = original_max_position_embeddings as f64 * f / (2.0 * std::f64::consts::PI);
                let s = ((waves - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0.0, 1.0);
                (1.0 - s) * f / factor + s * f
            }
        };
        (0..self.head_dim / 2).map(|i| scaled(plain(i))).collect()
    }

    /// Query heads that share a key and value head. (Of a configuration without such heads, which [`validate`](Self::validate)
    /// refuses: all.)
    pub fn group(&self) -> usize {
        self.heads / self.kv_heads.max(1)
    }

    /// A `config.json` that this crate and the Python libraries read, old and new: the first generation's key names.
    pub fn to_json(&self) -> String {
        let scaling = match self.rope_scaling {
            None => Value::Null,
            Some(RopeScaling::Linear { factor }) => json!({"rope_type": "linear", "type": "linear", "factor": factor}),
            Some(RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings }) => json!({
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low_freq_factor,
                "high_freq_factor": high_freq_factor,
                "original_max_position_embeddings": original_max_position_embeddings,
            }),
        };
        let mut config = json!({
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
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
            "rope_scaling": scaling,
            "tie_word_embeddings": self.tie_word_embeddings,
            "hidden_act": "silu",
            "attention_bias": self.attention_bias,
            "mlp_bias": self.mlp_bias,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": match self.eos_token_ids[..] {
                [] => Value::Null,
                [id] => id.into(),
                ref ids => ids.into(),
            },
        });
        if let Some(dtype) = self.dtype {
            config["torch_dtype"] = json!(match dtype {
                DType::F64 => "float64",
                DType::F32 => "float32",
                DType::F16 => "float16",
                DType::BF16 => "bfloat16",
                DType::U32 => "uint32",
            });
        }
        format!("{config:#}\n")
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::parse::tests::{llama3, with};

    #[test]
    fn rotary_frequencies() {
        let plain = with(json!({"rope_theta": 5e5, "head_dim": 128})).unwrap().inverse_frequencies();
        assert_eq!((plain.len(), plain[0]), (64, 1.0));
        assert!((plain[32] - 5e5f64.powf(-0.5)).abs() < 1e-18);
        let half =
            with(json!({"rope_theta": 5e5, "head_dim": 128, "rope_parameters": {"rope_type": "linear", "factor": 2.0}})).unwrap();
        assert!(half.inverse_frequencies().iter().zip(&plain).all(|(a, b)| *a == b / 2.0));

        // LLaMA 3.1: the published piecewise definition, by wavelength.
        let scaled = with(json!({"rope_theta": 5e5, "head_dim": 128, "rope_scaling": llama3()})).unwrap().inverse_frequencies();
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
