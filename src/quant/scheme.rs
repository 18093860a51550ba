//! Which tensors of a LLaMA are quantised, and how: the W·A·KV recipe.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::grid::Target;
use crate::grid::floating::Format;
use crate::quant::{Clip, ClipRatios, Engine, Online, QuantSpec, R4, Rule};
use crate::{Error, Result};

/// A quantisation recipe such as W4A4KV4. 16 bits means "not quantised". An s after the bits of activations, W4A4sKV4, means that
/// activations, K and V are symmetric. In the place of the bits of weights or of activations a format of
/// [floating-point blocks](crate::grid::floating) may stand, WMXFP4ANVFP4KV4; MXFP4 and NVFP4 alone are that of both.
///
/// ```
/// use spinquant::quant::Scheme;
/// let scheme: Scheme = "W4A8KV4".parse()?;
/// assert_eq!((scheme.weight_bits, scheme.activation_bits, scheme.key_bits), (4, 8, 4));
/// assert_eq!(scheme.to_string(), "W4A8KV4");
/// assert_eq!("W8A8".parse::<Scheme>()?, Scheme::new(8, 8, 16));
/// assert!("W4A99".parse::<Scheme>().is_err());
/// let symmetric: Scheme = "W4A4sKV4".parse()?;
/// assert_eq!(symmetric, Scheme { symmetric_activations: true, ..Scheme::new(4, 4, 4) });
/// assert_eq!((symmetric.to_string(), symmetric.bits_name()), ("W4A4sKV4".into(), "W4A4KV4".into()));
/// let blocks: Scheme = "MXFP4KV4".parse()?;
/// assert_eq!((blocks.to_string(), blocks.weight_bits), ("WMXFP4AMXFP4KV4".into(), 4));
/// assert_eq!("WNVFP4A16".parse::<Scheme>()?.to_string(), "WNVFP4A16KV16");
/// # Ok::<(), spinquant::Error>(())
/// ```
#[derive(Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scheme {
    /// Weights of the seven linears of every layer.
    pub weight_bits: u32,
    /// Inputs of those linears.
    pub activation_bits: u32,
    /// K, after RoPE and R3.
    pub key_bits: u32,
    /// V, the output of v_proj.
    pub value_bits: u32,
    /// Signed weight codes without a zero point (published: yes).
    pub symmetric_weights: bool,
    /// The same for every activation, K and V included (published: no).
    pub symmetric_activations: bool,
    /// Input channels that share a weight scale; `None`: the whole row.
    pub weight_group: Option<usize>,
    /// Clip rule of weights (published: search).
    pub weight_clip: Clip,
    /// Clip ratios of activations, K and V (published: 1).
    pub activation_clip: ClipRatios,
    /// The Hadamards that run with the network.
    pub online: Online,
    /// How ranges of activations, K and V become grids.
    #[serde(default, skip_serializing_if = "is_published")]
    pub activation_rule: Rule,
    /// Weights are blocks of floating-point numbers; `weight_bits` is 4.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weight_format: Option<Format>,
    /// So are the inputs of linears; `activation_bits` is 4. K and V are not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub activation_format: Option<Format>,
}

fn is_published(rule: &Rule) -> bool {
    *rule == Rule::Published
}

/// Without the rule where it is the published one: what states had before there were others.
impl fmt::Debug for Scheme {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut fields = f.debug_struct("Scheme");
        fields
            .field("weight_bits", &self.weight_bits)
            .field("activation_bits", &self.activation_bits)
            .field("key_bits", &self.key_bits)
            .field("value_bits", &self.value_bits)
            .field("symmetric_weights", &self.symmetric_weights)
            .field("symmetric_activations", &self.symmetric_activations)
            .field("weight_group", &self.weight_group)
            .field("weight_clip", &self.weight_clip)
            .field("activation_clip", &self.activation_clip)
            .field("online", &self.online);
        if self.activation_rule != Rule::Published {
            fields.field("activation_rule", &self.activation_rule);
        }
        for (name, format) in [("weight_format", self.weight_format), ("activation_format", self.activation_format)] {
            if let Some(format) = format {
                fields.field(name, &format);
            }
        }
        fields.finish()
    }
}

impl Scheme {
    /// Nothing quantised.
    pub const FULL_PRECISION: Self = Self {
        weight_bits: 16,
        activation_bits: 16,
        key_bits: 16,
        value_bits: 16,
        symmetric_weights: true,
        symmetric_activations: false,
        weight_group: None,
        weight_clip: Clip::Search,
        activation_clip: ClipRatios::NONE,
        online: Online::BOTH,
        activation_rule: Rule::Published,
        weight_format: None,
        activation_format: None,
    };

    /// The published settings at these bit widths.
    pub fn new(weight_bits: u32, activation_bits: u32, kv_bits: u32) -> Self {
        Self { weight_bits, activation_bits, key_bits: kv_bits, value_bits: kv_bits, ..Self::FULL_PRECISION }
    }

    /// The same with other online rotations.
    pub fn online(self, online: Online) -> Self {
        Self { online, ..self }
    }

    /// The same for a network whose weights are not rotated: R4, whose other half is in W_down, cannot run. R3 cancels in q kᵀ by itself
    /// and stays, as in the published code, where it belongs to the quantiser of K.
    pub fn unrotated(self) -> Self {
        self.online(Online { r4: R4::Off, ..self.online })
    }

    /// The same with weights left alone, as rotations for GPTQ are learned.
    pub fn unquantized_weights(self) -> Self {
        Self { weight_bits: 16, weight_format: None, ..self }
    }

    /// The same with activations, K and V left alone.
    pub fn unquantized_activations(self) -> Self {
        Self { activation_bits: 16, key_bits: 16, value_bits: 16, activation_format: None, ..self }
    }

    /// The same with weights in blocks of floating-point numbers, whose scales have steps of their own: no ratio is searched.
    pub fn weights_in(self, format: Format) -> Self {
        Self { weight_bits: 4, weight_format: Some(format), weight_clip: Clip::Ratio(1.0), weight_group: None, ..self }
    }

    /// The same with inputs of linears in blocks of floating-point numbers.
    pub fn activations_in(self, format: Format) -> Self {
        Self { activation_bits: 4, activation_format: Some(format), ..self }
    }

    /// Checks that codes are integers, for what knows no others.
    ///
    /// # Errors
    /// [`Error::Argument`] that names the scheme.
    pub fn check_integer(&self, what: &str) -> Result<()> {
        match (self.weight_format, self.activation_format) {
            (None, None) => Ok(()),
            _ => Err(Error::argument(what, format!("expected a scheme of integers, such as W4A4KV4, got {self}"))),
        }
    }

    /// What clip ratios of activations, K and V depend on, such as `A4KV4 asymmetric`.
    pub fn activation_bits_name(&self) -> String {
        let grid = if self.symmetric_activations { "symmetric" } else { "asymmetric" };
        // No format has an A in its name.
        let name = self.bits_name();
        format!("A{} {grid}", name.split_once('A').map_or("", |(_, rest)| rest))
    }

    /// What clip ratios of weights depend on, such as `W4 symmetric` or `W4 asymmetric, groups of 128`.
    pub fn weight_grid_name(&self) -> String {
        let grid = if self.symmetric_weights { "symmetric" } else { "asymmetric" };
        let group = self.weight_group.map_or_else(String::new, |group| format!(", groups of {group}"));
        match self.weight_format {
            Some(format) => format!("W{}", format.name().to_ascii_uppercase()),
            None => format!("W{} {grid}{group}", self.weight_bits),
        }
    }

    /// The bits alone, such as `W4A4KV4`.
    pub fn bits_name(&self) -> String {
        Self { symmetric_activations: false, ..*self }.to_string()
    }

    /// True where activations, K or V are quantised, so that their clip ratios matter.
    pub fn quantizes_activations(&self) -> bool {
        [self.activation_bits, self.key_bits, self.value_bits].iter().any(|b| *b < 16)
    }

    /// The sites whose values are quantised.
    pub fn active_sites(&self) -> Vec<Site> {
        let sites = self.sites(1);
        Site::ALL.into_iter().filter(|&site| sites.at(site).is_active()).collect()
    }

    /// True when nothing is quantised.
    pub fn is_full_precision(&self) -> bool {
        [self.weight_bits, self.activation_bits, self.key_bits, self.value_bits].iter().all(|b| *b >= 16)
    }

    /// The quantiser of every site of a layer with heads of `head_dim`.
    pub fn sites(&self, head_dim: usize) -> Sites {
        let at = |site, bits| {
            QuantSpec::activation(bits, self.symmetric_activations)
                .clipped(Clip::Ratio(self.activation_clip.at(site)))
                .by(self.activation_rule)
        };
        let input = |site, group| match self.activation_format {
            Some(format) => QuantSpec::floating(format, Target::Activation).clipped(Clip::Ratio(self.activation_clip.at(site))),
            None => QuantSpec { group, ..at(site, self.activation_bits) },
        };
        let weight = match self.weight_format {
            Some(format) => {
                let blocks = QuantSpec::floating(format, Target::Weight).clipped(self.weight_clip);
                // Other groups and asymmetric weights are refused where rows are known.
                QuantSpec { symmetric: self.symmetric_weights, group: self.weight_group.or(blocks.group), ..blocks }
            }
            None => {
                let weight = QuantSpec::weight(self.weight_bits, self.symmetric_weights).clipped(self.weight_clip);
                QuantSpec { group: self.weight_group, ..weight }
            }
        };
        Sites {
            weight,
            attention_input: input(Site::AttentionInput, None),
            key: at(Site::Key, self.key_bits),
            value: at(Site::Value, self.value_bits).grouped(head_dim),
            attention_output: input(Site::AttentionOutput, Some(head_dim)),
            mlp_input: input(Site::MlpInput, None),
            down_input: input(Site::DownInput, None),
            online: self.online,
            engine: Engine::default(),
        }
    }
}

impl FromStr for Scheme {
    type Err = Error;
    fn from_str(s: &str) -> Result<Self> {
        let bad = || {
            let expected = "expected W<bits>A<bits>KV<bits> or W<bits>A<bits>, bits 2 to 8 or 16, such as W4A4KV4 or W8A8, \
                an s after the bits of A where activations, K and V are symmetric, such as W4A4sKV4, \
                MXFP4 or NVFP4 in the place of the bits of weights or activations, such as WMXFP4AMXFP4KV4, or of both, such as MXFP4KV4";
            Error::argument("quantisation scheme", format!("{expected}, got {s:?}"))
        };
        let upper = s.to_ascii_uppercase();
        // One format stands for both.
        let both = Format::ALL.into_iter().map(|f| f.name().to_ascii_uppercase()).find(|f| upper.starts_with(f));
        let upper = both.map_or(upper.clone(), |f| format!("W{f}A{upper}"));
        let rest = upper.strip_prefix('W').ok_or_else(bad)?;
        let (w, rest) = rest.split_once('A').ok_or_else(bad)?;
        // As others write it: a KV cache that is not named is not quantised.
        let (a, kv) = rest.split_once("KV").unwrap_or((rest, "16"));
        let (a, symmetric_activations) = a.strip_suffix('S').map_or((a, false), |a| (a, true));
        let bits = |t: &str| t.parse::<u32>().ok().filter(|b| (2..=8).contains(b) || *b == 16).ok_or_else(bad);
        let part =
            |t: &str| t.parse::<Format>().map_or_else(|_| Ok((bits(t)?, None)), |format| Ok::<_, Error>((4, Some(format))));
        let ((w, weights), (a, activations)) = (part(w)?, part(a)?);
        if activations.is_some() && symmetric_activations {
            return Err(bad());
        }
        let scheme = Self { symmetric_activations, ..Self::new(w, a, bits(kv)?) };
        let scheme = weights.map_or(scheme, |format| scheme.weights_in(format));
        Ok(activations.map_or(scheme, |format| scheme.activations_in(format)))
    }
}

impl fmt::Display for Scheme {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kv = match (self.key_bits, self.value_bits) {
            (k, v) if k == v => format!("KV{k}"),
            (k, v) => format!("K{k}V{v}"),
        };
        let grid = if self.symmetric_activations && self.quantizes_activations() { "s" } else { "" };
        let part = |format: Option<Format>, bits: u32| format.map_or(bits.to_string(), |f| f.name().to_ascii_uppercase());
        let (w, a) = (part(self.weight_format, self.weight_bits), part(self.activation_format, self.activation_bits));
        f.pad(&format!("W{w}A{a}{grid}{kv}"))
    }
}

/// The quantisers of one layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sites {
    /// The seven weights.
    pub weight: QuantSpec,
    /// Input of q, k and v.
    pub attention_input: QuantSpec,
    /// K, every head a row.
    pub key: QuantSpec,
    /// V, a head at a time.
    pub value: QuantSpec,
    /// Input of o, a head at a time.
    pub attention_output: QuantSpec,
    /// Input of gate and up.
    pub mlp_input: QuantSpec,
    /// Input of down, after R4.
    pub down_input: QuantSpec,
    /// The Hadamards that run with the network.
    pub online: Online,
    /// How products are computed whose operands are both quantised; values, unless set otherwise.
    pub engine: Engine,
}

/// A place in a layer where an activation is quantised.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Site {
    /// The input of q, k and v.
    AttentionInput,
    /// K after RoPE and R3.
    Key,
    /// The output of v.
    Value,
    /// The input of o.
    AttentionOutput,
    /// The input of gate and up.
    MlpInput,
    /// The input of down, after R4.
    DownInput,
}

impl Site {
    /// All of them, in the order a layer meets them.
    pub const ALL: [Self; 6] =
        [Self::AttentionInput, Self::Key, Self::Value, Self::AttentionOutput, Self::MlpInput, Self::DownInput];

    /// A name for tables and files.
    pub fn name(self) -> &'static str {
        match self {
            Self::AttentionInput => "attention_input",
            Self::Key => "key",
            Self::Value => "value",
            Self::AttentionOutput => "attention_output",
            Self::MlpInput => "mlp_input",
            Self::DownInput => "down_input",
        }
    }
}

impl Sites {
    /// The quantiser of a site.
    pub fn at(&self, site: Site) -> &QuantSpec {
        match site {
            Site::AttentionInput => &self.attention_input,
            Site::Key => &self.key,
            Site::Value => &self.value,
            Site::AttentionOutput => &self.attention_output,
            Site::MlpInput => &self.mlp_input,
            Site::DownInput => &self.down_input,
        }
    }
}
