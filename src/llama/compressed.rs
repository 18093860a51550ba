//! Models of compressed-tensors: linears unpacked when they are read, and the network that `config.json` says they are.

use std::path::{Path, PathBuf};

use safetensors::tensor::Dtype;
use serde_json::{Map, Value};

use super::{Checkpoint, Linear, Llama, LlamaConfig, Merged, Placement, Source};
use crate::compressed_tensors::{Packed, Place, Quantization, Weights, words};
use crate::quant::{Online, R4, Rule, Scheme, Site};
use crate::{DType, Device, Error, Result, Tensor, io};

/// How the linears of a checkpoint are packed.
pub(super) type Packing = Weights;

/// The tensors that hold the linears of every layer: the first linear in each, and the name.
fn linears(config: &LlamaConfig) -> impl Iterator<Item = (Linear, String)> {
    (0..config.layers)
        .flat_map(|l| Linear::files(config).map(move |(file, members)| (members[0], format!("model.layers.{l}.{file}"))))
}

/// The shape of the tensor that holds a linear.
fn whole(linear: Linear, config: &LlamaConfig) -> [usize; 2] {
    [linear.rows(config).of, linear.shape(config)[1]]
}

impl Packing {
    fn groups(&self, cols: usize) -> usize {
        self.group.map_or(1, |group| cols / group.max(1))
    }

    /// The names and shapes of all scales.
    pub(super) fn scales(&self, config: &LlamaConfig) -> Vec<(String, Vec<usize>)> {
        let scale = |(linear, name): (Linear, String)| {
            let [rows, cols] = whole(linear, config);
            (format!("{name}.weight_scale"), vec![rows, self.groups(cols)])
        };
        linears(config).map(scale).collect()
    }

    /// The names, types and shapes of all tensors of whole numbers.
    pub(super) fn integers(&self, config: &LlamaConfig) -> Vec<(String, Dtype, Vec<usize>)> {
        let each = |(linear, name): (Linear, String)| {
            let [rows, cols] = whole(linear, config);
            let zero = (Dtype::I32, vec![words(rows, self.bits), self.groups(cols)]);
            let mut all = vec![
                (format!("{name}.weight_packed"), Dtype::I32, vec![rows, words(cols, self.bits)]),
                (format!("{name}.weight_shape"), Dtype::I64, vec![2]),
            ];
            all.extend((!self.symmetric).then(|| (format!("{name}.weight_zero_point"), zero.0, zero.1)));
            all
        };
        linears(config).flat_map(each).collect()
    }
}

/// A weight `[out, in]`, unpacked: rounded to the type of its scale as compressed-tensors does, then to `dtype`; columns multiplied by
/// `gain` in between, in `f64`.
pub(super) fn read(
    checkpoint: &Checkpoint,
    name: &str,
    shape: [usize; 2],
    packing: &Packing,
    dtype: DType,
    gain: Option<&[f64]>,
) -> Result<Tensor> {
    let [rows, cols] = shape;
    let (spec, groups) = (packing.spec(), packing.groups(cols));
    let integers = |what: &str, shape: [usize; 2]| -> Result<Vec<u32>> {
        Ok(bytemuck::pod_collect_to_vec(checkpoint.integers(&format!("{name}.{what}"), Dtype::I32, &shape)?))
    };
    let said: Vec<i64> = bytemuck::pod_collect_to_vec(checkpoint.integers(&format!("{name}.weight_shape"), Dtype::I64, &[2])?);
    if said != shape.map(|n| n as i64) {
        return Err(Error::format(checkpoint.dir(), format!("{name}.weight_shape: expected {shape:?}, got {said:?}")));
    }
    let weight = integers("weight_packed", [rows, words(cols, packing.bits)])?;
    let zero_point =
        (!packing.symmetric).then(|| integers("weight_zero_point", [words(rows, packing.bits), groups])).transpose()?;
    let scale = checkpoint.tensor(&format!("{name}.weight_scale"), &[rows, groups])?;
    let own = scale.dtype();
    let values = Packed { shape, weight, scale, zero_point }.quantized(name, &spec)?.dequantize()?.to_dtype(own)?;
    let Some(gain) = gain else { return values.to_dtype(dtype) };
    let mut wide = values.to_f64_vec()?;
    wide.chunks_mut(cols).for_each(|row| row.iter_mut().zip(gain).for_each(|(x, g)| *x *= g));
    Tensor::from_vec(wide, shape)?.to_dtype(dtype)
}

/// What a folder of compressed-tensors says of its network, read without its tensors.
#[derive(Clone, Debug)]
pub struct Compressed {
    dir: PathBuf,
    /// Sizes.
    pub config: LlamaConfig,
    /// What it is quantised to: weights as they are packed, inputs of linears on the grids of compressed-tensors, K and V at 16 bits.
    pub scheme: Scheme,
    quantization: Quantization,
}

impl Compressed {
    /// True of a folder whose `config.json` names compressed-tensors, whether it can be read or not.
    pub fn is_in(dir: impl AsRef<Path>) -> bool {
        object(dir.as_ref()).is_ok_and(|map| map.get("quantization_config").is_some_and(Quantization::is_in))
    }

    /// Reads the `config.json` of a folder.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Format`] for a network or a quantisation that is not read: what was expected, and what is there.
    pub fn read(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref();
        let path = dir.join("config.json");
        let mut map = object(dir)?;
        let Some(said) = map.remove("quantization_config") else {
            return Err(Error::format(&path, "quantization_config: a needed field is missing"));
        };
        let config = LlamaConfig::from_json(Value::from(map).to_string().as_bytes(), &path)?;
        let place = |(linear, name): (Linear, String)| {
            let site = linear.row().site;
            let group = (site == Site::AttentionOutput).then_some(config.head_dim);
            Place { name, group, inner: (site == Site::DownInput).then_some(config.intermediate_size) }
        };
        let named: Vec<_> = linears(&config).map(place).collect();
        let quantization =
            Quantization::parse(&said, &named).map_err(|e| Error::format(&path, format!("quantization_config: {e}")))?;
        for (linear, name) in linears(&config) {
            let [_, cols] = linear.shape(&config);
            let divides = quantization.weights.spec().group_size(cols);
            divides.map_err(|e| Error::format(&path, format!("quantization_config: {name}: {e}")))?;
        }
        Ok(Self { dir: dir.to_path_buf(), scheme: scheme(&quantization), config, quantization })
    }

    /// Loads the network, weights to the bit what compressed-tensors unpacks, then rounded to `dtype`.
    ///
    /// # Errors
    /// Those of [`Source::new`]; packed tensors that are missing or of other types or shapes.
    pub fn load(&self, dtype: DType, device: &Device) -> Result<Merged> {
        self.load_placed(dtype, device, Placement::RESIDENT)
    }

    /// The same with some layers in main memory ([`Llama::streamed`]): each goes straight to its place.
    ///
    /// # Errors
    /// Those of [`Compressed::load`] and [`Llama::streamed`].
    pub fn load_placed(&self, dtype: DType, device: &Device, placement: Placement) -> Result<Merged> {
        let source = Source::of(Checkpoint::open(&self.dir)?, &self.config, Some(self.quantization.weights))?;
        let model = Llama::read_plain_placed(&source, dtype, device, placement)?;
        let network = model.merge_exact(None, &self.scheme.unquantized_weights())?;
        Ok(Merged { scheme: self.scheme, ..network })
    }
}

/// The object in a folder's `config.json`.
fn object(dir: &Path) -> Result<Map<String, Value>> {
    let path = dir.join("config.json");
    let bytes = std::fs::read(&path).map_err(Error::io(&path))?;
    serde_json::from_slice(&bytes).map_err(|e| Error::format(&path, format!("expected a JSON object: {}", io::short(e))))
}

fn scheme(q: &Quantization) -> Scheme {
    let Quantization { weights, activations, r4 } = *q;
    let online = Online { r3: false, r4: r4.map_or(R4::Off, R4::Blocks) };
    let scheme = Scheme {
        symmetric_weights: weights.symmetric,
        weight_group: weights.group,
        ..Scheme::new(weights.bits, activations.map_or(16, |a| a.bits), 16).online(online)
    };
    let Some(a) = activations else { return scheme };
    Scheme { symmetric_activations: a.symmetric, activation_rule: Rule::CompressedTensors, ..scheme }
}
