//! `quantization_config` of `config.json`.

use regex::Regex;
use serde_json::{Value, json};

use crate::grid::QuantSpec;
use crate::quant::Scheme;

type Parsed<T> = std::result::Result<T, String>;

/// The name of the method in `config.json`.
const METHOD: &str = "compressed-tensors";
/// The only layout of tensors that is written and read.
const PACKED: &str = "pack-quantized";
/// The modules behind R4.
const DOWN: &str = "re:.*down_proj$";
/// The release whose layout this is.
const VERSION: &str = "0.20.0";

/// How weights are quantised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Weights {
    /// 2 to 8.
    pub bits: u32,
    /// Without zero points.
    pub symmetric: bool,
    /// Input channels that share a scale; `None`: the whole row.
    pub group: Option<usize>,
}

/// How inputs of linears are quantised while the network runs: a scale a token, but for o_proj, whose input gets a scale a token and
/// head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Activations {
    /// 2 to 8.
    pub bits: u32,
    /// Without zero points.
    pub symmetric: bool,
}

/// What `quantization_config` says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quantization {
    /// Of every linear in the layers.
    pub weights: Weights,
    /// Of their inputs.
    pub activations: Option<Activations>,
    /// The values of down_proj's input that a natural-order Sylvester Hadamard takes at a time, a power of two: the online R4, in the
    /// words of `transform_config`. Its other half is in the weight.
    pub r4: Option<usize>,
}

/// A linear of the layers, as a configuration is read for it.
#[derive(Clone, Debug)]
pub struct Place {
    /// Its name in files.
    pub name: String,
    /// Values of its input that share a scale, where it is not all of them.
    pub group: Option<usize>,
    /// Values of its input, where it is down_proj, which R4 is in front of.
    pub inner: Option<usize>,
}

impl Weights {
    /// The grid of the weights, without a rule how to find it.
    pub fn spec(&self) -> QuantSpec {
        QuantSpec { group: self.group, ..QuantSpec::weight(self.bits, self.symmetric) }
    }

    fn json(&self) -> Value {
        let (strategy, dynamic) = (if self.group.is_some() { "group" } else { "channel" }, false);
        json!({
            "num_bits": self.bits, "type": "int", "symmetric": self.symmetric, "strategy": strategy, "group_size": self.group,
            "dynamic": dynamic, "observer": "memoryless_minmax",
        })
    }
}

impl Quantization {
    /// What a scheme asks of the format: weights and inputs of linears, and R4 in blocks of `r4`. K and V are none of its business.
    pub fn of(scheme: &Scheme, r4: Option<usize>) -> Self {
        let (bits, symmetric) = (scheme.activation_bits, scheme.symmetric_activations);
        Self {
            weights: Weights { bits: scheme.weight_bits, symmetric: scheme.symmetric_weights, group: scheme.weight_group },
            activations: (bits < 16).then_some(Activations { bits, symmetric }),
            r4,
        }
    }

    /// The object in `config.json`, for layers whose o_proj reads heads of `head_dim`.
    pub fn to_json(&self, head_dim: usize) -> Value {
        let group = |targets: Value, input: Value| {
            json!({
                "targets": targets, "format": PACKED, "weights": self.weights.json(), "input_activations": input,
                "output_activations": null,
            })
        };
        let groups = match self.activations {
            None => json!({"group_0": group(json!(["Linear"]), Value::Null)}),
            Some(Activations { bits, symmetric }) => {
                let input = |strategy: &str, group: Option<usize>| {
                    json!({
                        "num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy, "group_size": group,
                        "dynamic": true,
                    })
                };
                json!({
                    "group_0": group(json!(["re:.*(q|k|v|gate|up|down)_proj$"]), input("token", None)),
                    "group_1": group(json!(["re:.*o_proj$"]), input("group", Some(head_dim))),
                })
            }
        };
        let mut said = json!({
            "quant_method": METHOD, "format": PACKED, "quantization_status": "compressed", "version": VERSION,
            "global_compression_ratio": null, "ignore": ["lm_head"], "kv_cache_scheme": null, "config_groups": groups,
        });
        if let Some(size) = self.r4 {
            let at = |location: &str, inverse: bool| json!({"targets": [DOWN], "location": location, "inverse": inverse, "ignore": []});
            said["transform_config"] = json!({"config_groups": {"R4": {
                "type": "hadamard", "apply": [at("input", false), at("weight_input", true)], "randomize": false, "requires_grad": false,
                "head_dim": size, "precision": "torch.float32",
            }}});
        }
        said
    }

    /// True of the `quantization_config` of this method, whether [`parse`](Self::parse) takes it or not.
    pub fn is_in(config: &Value) -> bool {
        config["quant_method"] == METHOD
    }

    /// Reads the object for all linears of the layers.
    ///
    /// # Errors
    /// What is not read, in words: another layout than packed integers, linears that are quantised differently or not at all, another kind
    /// of activations, a quantised KV cache, sparsity, transforms other than R4.
    pub fn parse(config: &Value, linears: &[Place]) -> Parsed<Self> {
        only(config, "quant_method", &[json!(METHOD)])?;
        only(config, "quantization_status", &[json!("compressed"), Value::Null])?;
        only(config, "kv_cache_scheme", &[Value::Null])?;
        only(config, "sparsity_config", &[Value::Null, json!({})])?;
        let r4 = r4(&config["transform_config"], linears).map_err(|e| format!("transform_config: {e}"))?;
        let ignored = targets(&config["ignore"])?;
        let groups = config["config_groups"].as_object().ok_or("config_groups: expected an object")?;
        let groups =
            groups.iter().map(|(name, group)| Ok((name, group, targets(&group["targets"])?))).collect::<Parsed<Vec<_>>>()?;
        let mut found: Option<Self> = None;
        for Place { name, group: input_group, .. } in linears {
            if ignored.iter().any(|t| t.matches(name)) {
                return Err(format!("ignore: expected every linear of the layers to be quantised, got {name} among the ignored"));
            }
            let by = |kind: fn(&Target) -> u8, best: u8| {
                groups.iter().find(|(_, _, targets)| targets.iter().any(|t| kind(t) == best && t.matches(name)))
            };
            // Exact names before patterns before classes.
            let group = (0..3).find_map(|kind| by(Target::kind, kind));
            let (label, group, _) = group.ok_or_else(|| format!("config_groups: expected a group for {name}, got none"))?;
            let this = Self { r4, ..scheme(config, group, *input_group).map_err(|e| format!("config_groups.{label}: {e}"))? };
            if *found.get_or_insert(this) != this {
                return Err(format!("config_groups.{label}: expected every linear to be quantised alike, {name} is not"));
            }
        }
        found.ok_or_else(|| "expected linears, got none".into())
    }
}

/// A name, a pattern or a class of modules.
enum Target {
    Name(String),
    Pattern(Regex),
    Linear,
}

impl Target {
    fn parse(text: &str) -> Parsed<Self> {
        match text.strip_prefix("re:") {
            // From the start of the name, as re.match in Python.
            Some(pattern) => Regex::new(&format!("^(?:{pattern})")).map(Self::Pattern).map_err(|e| format!("{text}: {e}")),
            None if text == "Linear" => Ok(Self::Linear),
            None => Ok(Self::Name(text.into())),
        }
    }

    fn kind(&self) -> u8 {
        match self {
            Self::Name(_) => 0,
            Self::Pattern(_) => 1,
            Self::Linear => 2,
        }
    }

    fn matches(&self, linear: &str) -> bool {
        match self {
            Self::Name(name) => name == linear,
            Self::Pattern(pattern) => pattern.is_match(linear),
            Self::Linear => true,
        }
    }
}

/// A list of targets.
fn targets(of: &Value) -> Parsed<Vec<Target>> {
    let list = of.as_array().map_or(&[][..], Vec::as_slice);
    list.iter().map(|target| Target::parse(target.as_str().unwrap_or_default())).collect()
}

/// The size of R4's blocks: a Hadamard in front of every down_proj, and nothing else that runs online.
fn r4(config: &Value, linears: &[Place]) -> Parsed<Option<usize>> {
    let groups = match &config["config_groups"] {
        Value::Null => return only(config, "config_groups", &[Value::Null]).map(|()| None),
        groups => groups.as_object().ok_or("config_groups: expected an object")?,
    };
    let mut found = None;
    for (label, group) in groups {
        let bad = |e: String| format!("config_groups.{label}: {e}");
        only(group, "type", &[json!("hadamard")]).map_err(bad)?;
        only(group, "randomize", &[json!(false), Value::Null]).map_err(bad)?;
        for apply in group["apply"].as_array().map_or(&[][..], Vec::as_slice) {
            let (targets, ignored) = (targets(&apply["targets"]).map_err(bad)?, targets(&apply["ignore"]).map_err(bad)?);
            let hit =
                |place: &Place| targets.iter().any(|t| t.matches(&place.name)) && !ignored.iter().any(|t| t.matches(&place.name));
            if let Some(place) = linears.iter().find(|place| hit(place) != place.inner.is_some()) {
                return Err(bad(format!("targets: expected every down_proj and no other linear, {} is otherwise", place.name)));
            }
            match apply["location"].as_str() {
                Some("weight_input") => {} // merged
                Some("input") if found.is_none() => {
                    let width = linears.iter().find_map(|place| place.inner).ok_or("expected a down_proj, got none")?;
                    let size = if group["head_dim"].is_null() { Some(width as u64) } else { group["head_dim"].as_u64() };
                    let size = size.filter(|s| s.is_power_of_two() && (width as u64).is_multiple_of(*s));
                    let said = &group["head_dim"];
                    let size =
                        size.ok_or_else(|| bad(format!("head_dim: expected a power of two that divides {width}, got {said}")))?;
                    found = Some(size as usize);
                }
                _ => return Err(bad(format!("location: expected input once, and weight_input, got {:.40}", apply["location"]))),
            }
        }
    }
    Ok(found)
}

/// A group's quantisation of one linear.
fn scheme(config: &Value, group: &Value, input_group: Option<usize>) -> Parsed<Quantization> {
    let format = if group["format"].is_null() { &config["format"] } else { &group["format"] };
    if format != PACKED {
        return Err(format!("format: expected {PACKED}, got {format:.60}"));
    }
    only(group, "output_activations", &[Value::Null])?;
    let w = &group["weights"];
    let (bits, symmetric) = integers(w).map_err(|e| format!("weights: {e}"))?;
    only(w, "dynamic", &[json!(false), Value::Null]).map_err(|e| format!("weights: {e}"))?;
    let size = w["group_size"].as_u64().map(|g| g as usize);
    let group_of = match (w["strategy"].as_str(), size) {
        (Some("channel"), _) => None,
        (Some("group") | None, Some(size)) if size > 0 => Some(size),
        _ => {
            return Err(format!(
                "weights: expected strategy channel or group, got {:.60} of {:.60}",
                w["strategy"], w["group_size"]
            ));
        }
    };
    let weights = Weights { bits, symmetric, group: group_of };
    let input = &group["input_activations"];
    let activations = match input.is_null() {
        true => None,
        false => Some(activations(input, input_group).map_err(|e| format!("input_activations: {e}"))?),
    };
    Ok(Quantization { weights, activations, r4: None })
}

fn activations(input: &Value, group: Option<usize>) -> Parsed<Activations> {
    let (bits, symmetric) = integers(input)?;
    only(input, "dynamic", &[json!(true)])?;
    match group {
        None => only(input, "strategy", &[json!("token")])?,
        Some(size) => {
            only(input, "strategy", &[json!("group")])?;
            only(input, "group_size", &[json!(size)])?;
        }
    }
    Ok(Activations { bits, symmetric })
}

/// Bits and symmetry of whole numbers.
fn integers(args: &Value) -> Parsed<(u32, bool)> {
    only(args, "type", &[json!("int"), Value::Null])?;
    let bits = args["num_bits"].as_u64().filter(|b| (2..=8).contains(b));
    let bits = bits.ok_or_else(|| format!("num_bits: expected 2 to 8, got {:.60}", args["num_bits"]))?;
    Ok((bits as u32, args["symmetric"].as_bool().unwrap_or(true)))
}

/// Refuses any value of a field but these.
fn only(object: &Value, name: &str, values: &[Value]) -> Parsed<()> {
    if values.contains(&object[name]) {
        return Ok(());
    }
    let wanted: Vec<String> = values.iter().map(|v| if v.is_null() { "none".into() } else { v.to_string() }).collect();
    Err(format!("{name}: expected {}, got {:.80}", wanted.join(" or "), object[name].to_string()))
}
