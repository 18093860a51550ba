//! Folders in the format of compressed-tensors: the tensors, what is refused, the README inside. The layout is in
//! [`compressed_tensors`](crate::compressed_tensors).

use safetensors::tensor::Dtype;

use super::parts::{Part, Raw};
use super::{Provenance, Stored, StoredLayer};
use crate::compressed_tensors::{Packed, words};
use crate::grid::Quantized;
use crate::llama::{Affine, Linear, Linears, LlamaConfig};
use crate::quant::{ClipRatios, Moments, QuantSpec, QuantizedLinear, Rule, Scheme, Site, WeightQuantizer};
use crate::{DType, Error, Result, Tensor};

/// The runtime that a folder is for, where it is for one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// Hugging Face transformers with the compressed-tensors library.
    Transformers,
    /// vLLM.
    Vllm,
}

impl std::str::FromStr for Target {
    type Err = Error;
    fn from_str(s: &str) -> Result<Self> {
        match s {
            "transformers" => Ok(Self::Transformers),
            "vllm" => Ok(Self::Vllm),
            _ => Err(Error::argument("target", format!("expected transformers or vllm, got {s:?}"))),
        }
    }
}

/// What of a scheme the format holds: K and V at 16 bits, and activations on the grid of compressed-tensors.
pub(super) fn holds(scheme: &Scheme) -> Scheme {
    let activation_rule = if scheme.activation_bits < 16 { Rule::CompressedTensors } else { Rule::Published };
    Scheme { key_bits: 16, value_bits: 16, activation_clip: ClipRatios::NONE, activation_rule, ..*scheme }
}

/// Checks that the format can hold a model and a scheme.
pub(super) fn check(config: &LlamaConfig, scheme: &Scheme) -> Result<()> {
    let bad = |message: String| Err(Error::argument("format compressed-tensors", message));
    if scheme.weight_bits >= 16 {
        return bad("expected weights of 2 to 8 bits, got 16; format hf holds those".into());
    }
    if scheme.online.r3 {
        return bad(format!("expected no R3 (nothing would run it), got {}; give --online none or r4=block:N", scheme.online));
    }
    let width = config.intermediate_size;
    match scheme.online.r4.map(width)? {
        Some(map) if map.k() > 1 => bad(format!(
            "expected R4 in blocks of a power of two, the only ones that a runtime has, got {}; give --online r4=block:{}",
            scheme.online,
            1 << width.trailing_zeros()
        )),
        _ => Ok(()),
    }
}

/// The size of R4's blocks in front of down_proj.
pub(super) fn r4(config: &LlamaConfig, scheme: &Scheme) -> Result<Option<usize>> {
    let width = config.intermediate_size;
    Ok(scheme.online.r4.map(width)?.map(|map| width / map.blocks()))
}

/// Checks a scheme against the runtime that its folder is for, and says what that runtime will do otherwise than asked, a line each.
///
/// # Errors
/// A scheme that the runtime refuses, or runs as another network.
pub fn notes(config: &LlamaConfig, scheme: &Scheme, target: Option<Target>) -> Result<Vec<String>> {
    let refuse = |message: &str| Err(Error::argument("target", message));
    let mut notes = vec![];
    let r4 = scheme.online.r4.is_on();
    if target == Some(Target::Transformers) {
        if r4 {
            return refuse("transformers runs no R4, and says nothing of it: give --online none, or --target vllm");
        }
        if !scheme.symmetric_weights && scheme.activation_bits < 16 {
            return refuse(
                "transformers loads asymmetric weights by way of a dense model, whose activations it does not quantise",
            );
        }
        if !scheme.symmetric_weights {
            notes.push("transformers 5.24 loads asymmetric weights with CompressedTensorsConfig(dequantize=True) only".into());
        }
    }
    if target == Some(Target::Vllm) && r4 && config.mlp_bias {
        return refuse("vLLM runs no R4 in front of a down_proj that has a bias: give --online none");
    }
    if target == Some(Target::Vllm) && scheme.activation_bits < 16 {
        if !scheme.symmetric_activations {
            return refuse("vLLM takes symmetric activations only: give --symmetric-activations, or --target transformers");
        }
        if ![4, 8].contains(&scheme.activation_bits) {
            return refuse(&format!("vLLM takes activations of 4, 8 or 16 bits, got {}", scheme.activation_bits));
        }
        if scheme.activation_bits == 8 && scheme.weight_group.is_some() {
            notes.push(
                "vLLM runs 8-bit activations with 16 bits where weights have groups; without --weight-group it does not".into(),
            );
        }
    }
    if let Some(group) = scheme.weight_group
        && target == Some(Target::Vllm)
        && ![32, 64, 128].contains(&group)
    {
        notes.push(format!("vLLM has fast kernels for groups of 32, 64 and 128 or whole rows, not for groups of {group}"));
    }
    Ok(notes)
}

/// Finds the grids of another quantiser with scales of the file's type.
pub(super) struct WithStoredScales<'a> {
    pub quantizer: &'a dyn WeightQuantizer,
    pub dtype: DType,
}

impl WeightQuantizer for WithStoredScales<'_> {
    fn name(&self) -> &'static str {
        self.quantizer.name()
    }
    fn needs_hessian(&self) -> bool {
        self.quantizer.needs_hessian()
    }
    fn wants_drift(&self, site: Site) -> bool {
        self.quantizer.wants_drift(site)
    }
    fn reads_quantized(&self) -> bool {
        self.quantizer.reads_quantized()
    }
    fn stores_scales_as(&self) -> Option<DType> {
        Some(self.dtype)
    }
    fn quantize(&self, weights: &[&Tensor], spec: &QuantSpec, moments: Option<&Moments>) -> Result<Vec<QuantizedLinear>> {
        self.quantizer.quantize(weights, &spec.stored(self.dtype), moments)
    }
    fn quantize_clipped(
        &self,
        weights: &[&Tensor],
        spec: &QuantSpec,
        moments: Option<&Moments>,
        clips: &[&Tensor],
    ) -> Result<Vec<QuantizedLinear>> {
        self.quantizer.quantize_clipped(weights, &spec.stored(self.dtype), moments, clips)
    }
}

/// The weights of a layer, linears joined where the family's files have them joined.
pub(super) fn pack(
    raws: &mut Vec<Raw>,
    config: &LlamaConfig,
    weights: &StoredLayer,
    spec: &QuantSpec,
    layer: usize,
) -> Result<()> {
    for (file, members) in Linear::files(config) {
        let name = format!("model.layers.{layer}.{file}");
        let codes = |linear: &Linear| match &weights[*linear].weight {
            Stored::Codes(q) => Ok(q),
            Stored::Values(_) => Err(Error::argument(&name, format!("expected codes of {} bits, got values", spec.bits))),
        };
        let members = members.iter().map(codes).collect::<Result<Vec<_>>>()?;
        match members[..] {
            [only] => pack_one(raws, &name, only, spec)?,
            _ => pack_one(raws, &name, &Quantized::join(&members)?, spec)?,
        }
    }
    Ok(())
}

/// The tensors that hold one weight.
fn pack_one(raws: &mut Vec<Raw>, name: &str, q: &Quantized, spec: &QuantSpec) -> Result<()> {
    let Packed { shape: [rows, cols], weight, scale, zero_point } = Packed::new(name, q, spec)?;
    let groups = scale.cols();
    let mut integers = |what: &str, words: &[u32], shape: [usize; 2]| {
        let bytes = bytemuck::cast_slice(words).to_vec().into();
        raws.push(Raw { name: format!("{name}.{what}"), dtype: Dtype::I32, shape: shape.to_vec(), bytes });
    };
    integers("weight_packed", &weight, [rows, words(cols, spec.bits)]);
    if let Some(zero) = zero_point {
        integers("weight_zero_point", &zero, [words(rows, spec.bits), groups]);
    }
    raws.push(Raw::new(format!("{name}.weight_scale"), &scale)?);
    let shape = [rows as i64, cols as i64].map(i64::to_le_bytes).concat();
    raws.push(Raw { name: format!("{name}.weight_shape"), dtype: Dtype::I64, shape: vec![2], bytes: shape.into() });
    Ok(())
}

/// One weight, back from [`pack`].
fn unpack(part: &Part, name: &str, shape: [usize; 2], spec: &QuantSpec, dtype: DType) -> Result<Quantized> {
    let [rows, cols] = shape;
    let groups = cols / spec.group_size(cols)?;
    let integers = |what: &str, shape: [usize; 2]| -> Result<Vec<u32>> {
        Ok(bytemuck::pod_collect_to_vec(part.get(&format!("{name}.{what}"), Dtype::I32, &shape)?))
    };
    let weight = integers("weight_packed", [rows, words(cols, spec.bits)])?;
    let zero_point = (!spec.symmetric).then(|| integers("weight_zero_point", [words(rows, spec.bits), groups])).transpose()?;
    let scale = part.tensor(&format!("{name}.weight_scale"), dtype, &[rows, groups])?;
    Packed { shape, weight, scale, zero_point }.quantized(name, spec)
}

/// A layer's weights, biases and norms.
pub(super) fn read_layer(part: &Part, config: &LlamaConfig, spec: &QuantSpec, dtype: DType, layer: usize) -> Result<StoredLayer> {
    Linears::try_from_fn(|linear| {
        let ([_, cols], rows) = (linear.shape(config), linear.rows(config));
        let [bias, norm] = super::native::beside(part, config, dtype, layer, linear)?;
        let whole = unpack(part, &format!("model.layers.{layer}.{}", rows.file), [rows.of, cols], spec, dtype)?;
        let own = if rows.count == rows.of { whole } else { whole.rows(rows.first, rows.count)? };
        Ok(Affine { weight: Stored::Codes(own), bias, norm })
    })
}

/// The folder's README: what it is, and what runs it.
pub(super) fn readme(scheme: &Scheme, dtype: DType, r4: Option<usize>, made: &Provenance) -> String {
    let Provenance { model, weights, rotations, .. } = made;
    let Scheme { weight_bits, activation_bits, symmetric_weights, symmetric_activations, weight_group, .. } = *scheme;
    let kind = |symmetric: bool| if symmetric { "symmetric" } else { "asymmetric" };
    let scales = weight_group.map_or("one scale an output channel".to_string(), |g| format!("one scale for {g} input channels"));
    let inputs = match activation_bits {
        16.. => "not quantised".to_string(),
        bits => format!(
            "{bits} bits, {}, found while the network runs: a scale a token, and in front of o_proj a scale a token and head",
            kind(symmetric_activations)
        ),
    };
    let vllm = match (activation_bits, symmetric_activations) {
        (16.., _) => "yes: `vllm serve DIR`".to_string(),
        (_, false) => "no: it takes symmetric activations only".to_string(),
        (8, true) if weight_group.is_some() => {
            "`vllm serve DIR --linear-backend humming`; weights in groups make it compute inputs with 16 bits".to_string()
        }
        (4, true) => "`vllm serve DIR --linear-backend humming` (other backends leave inputs at 16 bits without a word); GPUs from compute \
            capability 9.0 (H100) on compute inputs of 4 bits with 8"
            .to_string(),
        (8, true) => "`vllm serve DIR --linear-backend humming` (other backends may leave inputs at 16 bits without a word); the inputs of \
            o_proj, which have a scale a head, stay at 16 bits"
            .to_string(),
        (bits, true) => format!("no: it takes activations of 4, 8 or 16 bits, not {bits}"),
    };
    let transformers = match (activation_bits, symmetric_weights) {
        _ if r4.is_some() => "no: it ignores `transform_config` without a word and computes another network",
        (16.., true) => "yes, on CPUs too: weights are unpacked when they are first used",
        (16.., false) => "yes, on CPUs too, with `quantization_config=CompressedTensorsConfig(dequantize=True)`",
        (_, false) => {
            "weights only, with `quantization_config=CompressedTensorsConfig(dequantize=True)`; inputs are then not quantised"
        }
        (_, true) => {
            "yes, on CPUs too: weights are unpacked when they are first used, inputs are rounded to their grids and computed with in the model's type"
        }
    };
    format!(
        "# {scheme}, compressed-tensors\n\n\
        Made from `{model}` by spinquant {version}; rotations ({rotations}) are merged into the weights. `spinquant.json` says how.\n\n\
        | | |\n|---|---|\n\
        | weights of the decoder layers | {weight_bits} bits, {}, {scales} ({dtype}), by {weights}; `pack-quantized` |\n\
        | inputs of those linears | {inputs} |\n\
        | input of down_proj | {online} |\n\
        | embedding, head, norms | {dtype}, not quantised |\n\
        | KV cache | not quantised; runtimes have flags of their own |\n\n\
        | runtime | |\n|---|---|\n\
        | transformers with compressed-tensors | {transformers} |\n\
        | vLLM | {vllm} |\n\
        | spinquant | `spinquant eval --model DIR --text FILE` |\n",
        kind(symmetric_weights),
        online = r4
            .map_or("as it is".into(), |n| format!("a Hadamard on every {n} values while the network runs (`transform_config`)")),
        version = env!("CARGO_PKG_VERSION"),
    )
}
