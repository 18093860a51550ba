//! The rotary embedding's frequencies, as transformers computes them: in `config.json`, and in numbers.

use std::f64::consts::PI;

use serde_json::{Map, Value, json};

use super::fields::{Fields, Parsed};
use super::{Family, LlamaConfig};

/// Stretching of the rotary frequencies for contexts longer than trained on; see [`LlamaConfig::frequencies`].
#[derive(Clone, Debug, PartialEq)]
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
    /// A larger base for sequences beyond `max_position_embeddings` (NTK-aware, dynamic).
    Dynamic {
        /// At least 1.
        factor: f64,
    },
    /// YaRN (Peng et al. 2023): a ramp over the dimensions, and scores that are larger.
    Yarn {
        /// At least 1.
        factor: f64,
        /// What cosines and sines are multiplied by.
        attention_factor: f64,
        /// Dimensions that turn more often than this in the original context are kept.
        beta_fast: f64,
        /// Dimensions that turn less often than this are stretched in full.
        beta_slow: f64,
        /// The ramp begins and ends at whole dimensions.
        truncate: bool,
        /// The context before stretching.
        original_max_position_embeddings: usize,
    },
    /// LongRoPE (Ding et al. 2024): a divisor for every frequency, and others for sequences beyond the original context.
    LongRope {
        /// Divisors of the frequencies in the original context.
        short: Vec<f64>,
        /// Divisors beyond it.
        long: Vec<f64>,
        /// What cosines and sines are multiplied by.
        attention_factor: f64,
        /// The context before stretching.
        original_max_position_embeddings: usize,
    },
}

/// The rotary embedding of sequences of one length.
#[derive(Clone, Debug, PartialEq)]
pub struct Frequencies {
    /// Angle per position of each rotated pair.
    pub inverse: Vec<f64>,
    /// What cosines and sines are multiplied by.
    pub factor: f64,
}

impl LlamaConfig {
    /// Values of a head that the rotary embedding turns, the first ones: all, or `partial_rotary_factor` of them.
    pub fn rotary_dim(&self) -> usize {
        (self.head_dim as f64 * self.partial_rotary_factor) as usize
    }

    /// The rotary embedding of sequences of `seq` tokens, in `f64`: `rotary_dim / 2` frequencies.
    ///
    /// fᵢ = θ^(−2i/D), D the rotary dimensions, n the original context, N the model's context. Linear scaling: fᵢ / factor.
    /// LLaMA 3.1, λᵢ = 2π/fᵢ the wavelength:
    /// ```text
    /// fᵢ                                     where λᵢ < n / high_freq_factor
    /// fᵢ / factor                            where λᵢ > n / low_freq_factor
    /// (1 − s) fᵢ / factor + s fᵢ             between; s = (n/λᵢ − low_freq_factor) / (high_freq_factor − low_freq_factor)
    /// ```
    /// Dynamic, with T = max(seq, N): θ becomes θ (factor T / N − (factor − 1))^(D / (D − 2)).
    ///
    /// YaRN, with d(β) = D ln(n / 2πβ) / (2 ln θ) the dimension that turns β times in the original context, low = max(d(beta_fast), 0)
    /// and high = min(d(beta_slow), D − 1), rounded outwards where `truncate`: s fᵢ / factor + (1 − s) fᵢ,
    /// s = (i − low) / (high − low) between 0 and 1.
    ///
    /// LongRoPE: fᵢ / longᵢ where seq > n, else fᵢ / shortᵢ.
    pub fn frequencies(&self, seq: usize) -> Frequencies {
        let dim = self.rotary_dim();
        let d = dim as f64;
        let power = |theta: f64, i: usize| theta.powf(-2.0 * i as f64 / d);
        let each = |f: &dyn Fn(usize, f64) -> f64| (0..dim / 2).map(|i| f(i, power(self.rope_theta, i))).collect();
        let plain = |inverse| Frequencies { inverse, factor: 1.0 };
        match &self.rope_scaling {
            None => plain(each(&|_, f| f)),
            Some(RopeScaling::Linear { factor }) => plain(each(&|_, f| f / factor)),
            Some(RopeScaling::Llama3 {
                factor,
                low_freq_factor: low,
                high_freq_factor: high,
                original_max_position_embeddings,
            }) => {
                // n/λ: how often the wave fits in the original context. s is 1 or more for short waves, 0 or less for long ones.
                plain(each(&|_, f| {
                    let waves = *original_max_position_embeddings as f64 * f / (2.0 * PI);
                    let s = ((waves - low) / (high - low)).clamp(0.0, 1.0);
                    (1.0 - s) * f / factor + s * f
                }))
            }
            Some(RopeScaling::Dynamic { factor }) => {
                let context = self.max_position_embeddings as f64;
                let stretched = factor * (seq as f64).max(context) / context - (factor - 1.0);
                let theta = self.rope_theta * stretched.powf(d / (d - 2.0));
                plain((0..dim / 2).map(|i| power(theta, i)).collect())
            }
            Some(RopeScaling::Yarn {
                factor,
                attention_factor,
                beta_fast,
                beta_slow,
                truncate,
                original_max_position_embeddings,
            }) => {
                let n = *original_max_position_embeddings as f64;
                let at = |turns: f64| d * (n / (turns * 2.0 * PI)).ln() / (2.0 * self.rope_theta.ln());
                let whole = |x: f64, round: fn(f64) -> f64| if *truncate { round(x) } else { x };
                let low = whole(at(*beta_fast), f64::floor).max(0.0);
                let high = whole(at(*beta_slow), f64::ceil).min(d - 1.0);
                let high = if low == high { high + 0.001 } else { high };
                let inverse = each(&|i, f| {
                    let s = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
                    s * f / factor + (1.0 - s) * f
                });
                Frequencies { inverse, factor: *attention_factor }
            }
            Some(RopeScaling::LongRope { short, long, attention_factor, original_max_position_embeddings }) => {
                let divisors = if seq > *original_max_position_embeddings { long } else { short };
                let inverse = each(&|i, f| f / divisors.get(i).copied().unwrap_or(1.0));
                Frequencies { inverse, factor: *attention_factor }
            }
        }
    }

    /// What is wrong with the rotary embedding, in the file's names.
    pub(super) fn rope_problem(&self) -> Option<String> {
        if !(self.rope_theta >= 1.0 && self.rope_theta < 1e15) {
            return Some(format!("rope_theta: expected 1 up to 1e15, got {}", self.rope_theta));
        }
        let dim = self.rotary_dim();
        if !(self.partial_rotary_factor > 0.0 && self.partial_rotary_factor <= 1.0 && dim >= 2 && dim.is_multiple_of(2)) {
            let (factor, d) = (self.partial_rotary_factor, self.head_dim);
            return Some(format!("partial_rotary_factor: expected an even part of head_dim = {d}, got {factor}"));
        }
        let within = |name: &str, x: f64, least: f64, most: f64| {
            (!(least..=most).contains(&x)).then(|| format!("rope scaling {name}: expected {least} to {most:e}, got {x}"))
        };
        let stretch = |factor: &f64| within("factor", *factor, 1.0, 1e6);
        let context = |n: &usize| {
            let most = 1usize << 31;
            (!(1..=most).contains(n)).then(|| format!("original_max_position_embeddings: expected 1 to {most}, got {n}"))
        };
        match self.rope_scaling.as_ref()? {
            RopeScaling::Linear { factor } => stretch(factor),
            RopeScaling::Llama3 { factor, low_freq_factor: low, high_freq_factor: high, original_max_position_embeddings: n } => {
                let order = (!(*low > 0.0 && high > low && *high < 1e6)).then(|| {
                    format!("rope scaling: expected 0 < low_freq_factor < high_freq_factor < 1e6, got {low} and {high}")
                });
                stretch(factor).or(order).or(context(n))
            }
            RopeScaling::Dynamic { factor } => {
                let narrow = || (dim < 4).then(|| format!("rope scaling dynamic: expected a head of at least 4, got {dim}"));
                stretch(factor).or_else(narrow)
            }
            RopeScaling::Yarn { factor, attention_factor, beta_fast, beta_slow, original_max_position_embeddings: n, .. } => {
                let order = (!(*beta_slow > 0.0 && beta_fast >= beta_slow && *beta_fast < 1e6))
                    .then(|| format!("rope scaling: expected 0 < beta_slow <= beta_fast < 1e6, got {beta_slow} and {beta_fast}"));
                let theta = (self.rope_theta <= 1.0)
                    .then(|| format!("rope_theta: expected more than 1 for yarn, got {}", self.rope_theta));
                let scores = within("attention_factor", *attention_factor, 1e-6, 1e6);
                stretch(factor).or(scores).or(order).or(theta).or(context(n))
            }
            RopeScaling::LongRope { short, long, attention_factor, original_max_position_embeddings: n } => {
                let divisors = |name: &str, list: &[f64]| {
                    if list.len() != dim / 2 {
                        return Some(format!("rope scaling {name}: expected {} numbers, got {}", dim / 2, list.len()));
                    }
                    list.iter().find_map(|&x| within(name, x, 1e-6, 1e9))
                };
                let lists = || divisors("short_factor", short).or_else(|| divisors("long_factor", long));
                within("attention_factor", *attention_factor, 1e-6, 1e6).or_else(lists).or(context(n))
            }
        }
    }

    /// The scaling as the first generation's `rope_scaling`.
    pub(super) fn rope_json(&self) -> Value {
        match &self.rope_scaling {
            None => Value::Null,
            Some(RopeScaling::Linear { factor }) => json!({"rope_type": "linear", "type": "linear", "factor": factor}),
            Some(RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings }) => json!({
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low_freq_factor,
                "high_freq_factor": high_freq_factor,
                "original_max_position_embeddings": original_max_position_embeddings,
            }),
            Some(RopeScaling::Dynamic { factor }) => json!({"rope_type": "dynamic", "type": "dynamic", "factor": factor}),
            Some(RopeScaling::Yarn {
                factor,
                attention_factor,
                beta_fast,
                beta_slow,
                truncate,
                original_max_position_embeddings,
            }) => {
                json!({
                    "rope_type": "yarn",
                    "type": "yarn",
                    "factor": factor,
                    "attention_factor": attention_factor,
                    "beta_fast": beta_fast,
                    "beta_slow": beta_slow,
                    "truncate": truncate,
                    "original_max_position_embeddings": original_max_position_embeddings,
                })
            }
            Some(RopeScaling::LongRope { short, long, attention_factor, original_max_position_embeddings }) => json!({
                "rope_type": "longrope",
                "type": "longrope",
                "short_factor": short,
                "long_factor": long,
                "attention_factor": attention_factor,
                "original_max_position_embeddings": original_max_position_embeddings,
            }),
        }
    }
}

/// The rotary embedding of a file.
pub(super) struct Rope {
    pub theta: f64,
    pub partial: f64,
    pub scaling: Option<RopeScaling>,
}

/// θ, the part of a head and the scaling, from `rope_parameters` (second generation) or `rope_theta` and `rope_scaling` (first).
pub(super) fn parse(f: Fields, family: Family, context: usize) -> Parsed<Rope> {
    let facts = family.facts();
    let some = |part: Option<Fields<'_>>| part.is_some_and(|p| !p.map.is_empty());
    let (old, new) = (f.object("rope_scaling", "rope_scaling.")?, f.object("rope_parameters", "rope_parameters.")?);
    let part = if some(old) { old } else { new };
    let none = Map::new();
    let p = part.unwrap_or(Fields { map: &none, prefix: "rope_parameters." });
    let (outer, inner) = (f.number("rope_theta")?, p.number("rope_theta")?);
    if let (Some(outer), Some(inner)) = (outer, inner)
        && outer != inner
    {
        return Err(format!("rope_theta: expected one value, got {outer} at the top level and {inner} inside"));
    }
    let theta = inner.or(outer).unwrap_or(facts.absent.theta);
    let part_of_head = |f: Fields| match facts.partial_rotary {
        true => f.number("partial_rotary_factor"),
        false => f.get("partial_rotary_factor", "1", |v| (v.as_f64()? == 1.0).then_some(1.0)),
    };
    let (inner, outer) = (part_of_head(p)?, part_of_head(f)?);
    let partial = inner.or(outer).unwrap_or(1.0);
    // What is outside the scaling goes before what is in it.
    let original = || -> Parsed<usize> {
        let name = "original_max_position_embeddings";
        Ok(f.size(name)?.or(facts.absent.original_context).or(p.size(name)?).unwrap_or(context))
    };
    let kind = match p.text("rope_type")?.or(p.text("type")?) {
        Some("su" | "yarn") if family == Family::Phi3 => "longrope",
        Some(kind) => kind,
        // A bare θ has no type.
        None if p.number("factor")?.is_none() => "default",
        None => return Err(p.missing("rope_type")),
    };
    let scaling = match kind {
        "default" => None,
        "linear" => Some(RopeScaling::Linear { factor: p.need_number("factor")? }),
        "dynamic" => Some(RopeScaling::Dynamic { factor: p.need_number("factor")? }),
        "llama3" => Some(RopeScaling::Llama3 {
            factor: p.need_number("factor")?,
            low_freq_factor: p.need_number("low_freq_factor")?,
            high_freq_factor: p.need_number("high_freq_factor")?,
            original_max_position_embeddings: original()?,
        }),
        "yarn" => Some(yarn(p, original()?, context)?),
        "longrope" => Some(long_rope(p, original()?, context)?),
        other => {
            let known = "\"default\", \"linear\", \"dynamic\", \"llama3\", \"yarn\" or \"longrope\"";
            return Err(p.wrong("rope_type", known, &json!(other)));
        }
    };
    Ok(Rope { theta, partial, scaling })
}

/// The ratio of the contexts where no factor is given.
fn ratio(context: usize, original: usize) -> f64 {
    context as f64 / original.max(1) as f64
}

fn yarn(p: Fields, original: usize, context: usize) -> Parsed<RopeScaling> {
    let factor = p.number("factor")?.unwrap_or(ratio(context, original));
    let scale = |m: f64| if factor <= 1.0 { 1.0 } else { 0.1 * m * factor.ln() + 1.0 };
    let not_zero = |x: Option<f64>| x.filter(|x| *x != 0.0);
    let inferred = match (not_zero(p.number("mscale")?), not_zero(p.number("mscale_all_dim")?)) {
        (Some(above), Some(below)) => scale(above) / scale(below),
        _ => scale(1.0),
    };
    Ok(RopeScaling::Yarn {
        factor,
        attention_factor: p.number("attention_factor")?.unwrap_or(inferred),
        beta_fast: not_zero(p.number("beta_fast")?).unwrap_or(32.0),
        beta_slow: not_zero(p.number("beta_slow")?).unwrap_or(1.0),
        truncate: p.flag_or("truncate", true)?,
        original_max_position_embeddings: original,
    })
}

fn long_rope(p: Fields, original: usize, context: usize) -> Parsed<RopeScaling> {
    let list = |name: &str| p.numbers(name)?.ok_or_else(|| p.missing(name));
    let factor = p.number("factor")?.unwrap_or(ratio(context, original));
    let inferred = if factor <= 1.0 { 1.0 } else { (1.0 + factor.ln() / (original as f64).ln()).sqrt() };
    Ok(RopeScaling::LongRope {
        short: list("short_factor")?,
        long: list("long_factor")?,
        attention_factor: p.number("attention_factor")?.unwrap_or(inferred),
        original_max_position_embeddings: original,
    })
}
