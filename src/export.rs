//! Quantised models as files, in three formats.
//!
//! - [`Format::Hf`]: the standard Hugging Face layout, for any runtime, of the source's own architecture. R1 and R2 are merged into
//!   the weights, every RMSNorm gain is 1 or what scales of norms leave there (but for norms of heads), and so are a family's multipliers; nothing runs online, so the
//!   scheme must be without R3 and R4. Quantised weights are written as the values of their grid. A tied head is written out.
//! - [`Format::CompressedTensors`]: the same with quantised weights as packed integers and their scales, and how inputs of linears are
//!   quantised, for transformers and vLLM; the layout is in [`compressed_tensors`](crate::compressed_tensors).
//! - [`Format::Native`]: everything the quantised network needs and what was done, in `spinquant.json` and `model.safetensors`.
//!
//! A [`Writer`] takes one layer at a time, in any order, into a temporary folder beside the output (`.NAME.partial`) and moves it into
//! place when all are there. Where the output folder cannot be renamed, a mount point say, the temporary folder is in it
//! (`.spinquant.partial`) and its files are moved, `spinquant.json` last. A run that was killed at any point continues from the layers
//! already written, and ends in the same bytes.
//!
//! # The native layout
//! `spinquant.json`: `format` "spinquant-native", `format_version` 1, `config` (a LLaMA `config.json`), `scheme` (the fields of
//! [`Scheme`]), `dtype` (element type of unquantised weights and of the arithmetic they were made for), `weights`, `hadamard`,
//! `rotations_sha256`, `crate_version`, `provenance` ([`Provenance`]). `model.safetensors`, for layers N from 0 and the seven
//! linears LINEAR of a layer (`self_attn.q_proj`, …, `mlp.down_proj`; `[out, in]` as in y = x Wᵀ + b):
//!
//! | tensor | type, shape | what it is |
//! |---|---|---|
//! | `model.embed_tokens.weight`, `lm_head.weight` | dtype, `[V, C]` | rotated; the head with the final norm's gain |
//! | `model.layers.N.LINEAR.weight` | dtype, `[out, in]` | only at 16 bits: rotated, the norm's gain folded in |
//! | `model.layers.N.LINEAR.bias` | dtype, `[out]` | only where `config` has it (`attention_bias`, `mlp_bias`, Qwen 2): rotated |
//! | `model.layers.N.self_attn.q_norm.weight`, `k_norm` | dtype, `[D]` | only of a family with norms of heads: their gains |
//! | `model.layers.N.LINEAR.codes` | U8, `[out, bytes]` | the codes, packed as said below |
//! | `model.layers.N.LINEAR.scale` | F32 (F64 where dtype is), `[out, in/group]` | column i is of group i / `weights.group` |
//! | `model.layers.N.LINEAR.zero` | as scale | only where asymmetric |
//! | `model.layers.N.input_layernorm.weight`, `….post_attention_layernorm.weight` | dtype, `[C]` | only with `scales.norms`: the gains |
//! | `scales.NAME` | as R1 | only where learned with the rotations: logarithms, already merged ([`Scale`]) |
//! | `clips.SITE` | as R1, `[L, kinds, 2]` | only where learned with the rotations (then `format_version` is 2): logarithms a₀, a₁ of the clip ratios of the lower and the upper end of what is quantised there, one pair or one a key and value head ([`ClipEnds`](crate::rotation::ClipEnds)); they stand in place of the site's `scheme.activation_clip` |
//! | `model.layers.N.clips.SITE` | F32 (F64 where dtype is), `[kinds, 2]` | only where learned after the layer's weights were quantised (then `format_version` is 2): the same of one layer; they stand in place of `clips.SITE` |
//! | `R1`, `R2`, `R2b` | F32 or F64, `[C, C]`, `[L, D, D]` or `[L, K, D, D]`, as R2 | only where rotated: already merged, for reference |
//! | `R3.core`, `R4.core` | I8, `[K, K]` | the ±1 matrix `H_K` of an online Hadamard, where K > 1 |
//!
//! Codes are stored less `weights.min_code`, so from 0. At up to 4 bits there are two a byte, column 2j in the low half of byte j
//! of a row and column 2j + 1 in the high (0 where there is none), `bytes = ⌈in/2⌉`; else one a byte, `bytes = in`. A weight is
//! `scale · (code − zero)` in the type of the scale, rounded once to dtype. Every RMSNorm of the stream without gain here has 1. The network is that
//! of `config` (linears apart, whatever its own files do) but for `scheme.online`: with r3, every head of q and k is multiplied by a Hadamard after the rotary embedding; with r4
//! (`true`, or `"block:N"` for N values at a time), down_proj's input is. A row x of n values becomes H x: view it as `[blocks, K, n/(K·blocks)]` (`hadamard.r3`, `hadamard.r4`),
//! apply the natural-order Sylvester transform along the last axis, multiply by `H_K` from the left along the middle one, divide
//! by √(n/blocks).

mod compressed;
mod hf;
mod native;
mod parts;
mod place;
mod write;

pub use compressed::{Target, notes};
pub use native::{Native, Record, is_native, load_codes, load_native, load_native_placed, load_native_with_codes};
pub use write::{write_hf, write_quantized, write_rtn};

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use crate::compressed_tensors::Quantization;
use crate::grid::Quantized;
use crate::llama::{Affine, EMBEDDING, FINAL_NORM, HEAD, LayerWeights, Linears, LlamaConfig, NORMS, norm_gains};
use crate::ops::fake_quant::quantize;
use crate::quant::{ClipRatios, Online, QuantSpec, Scheme, Site};
use crate::rotation::{Rotations, Scale};
use crate::{DType, Device, Error, Result, Tensor, io};
use parts::{Part, Raw};
use place::{Place, RUN, copy};

/// The file that says what an output folder is.
pub const RECORD: &str = "spinquant.json";
/// What a folder of [`Format::CompressedTensors`] says to people.
const README: &str = "README.md";
/// Tensors of one shard at most, unless asked otherwise.
pub const SHARD_BYTES: u64 = 5_000_000_000;
/// Files that are copied from the source as they are, where it has them.
const COPIED: [&str; 10] = [
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
    "generation_config.json",
];

/// What an output folder is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Any Hugging Face runtime.
    Hf,
    /// This crate, and whoever reads the layout above.
    Native,
    /// Runtimes with the compressed-tensors library.
    CompressedTensors,
}

impl Format {
    fn name(self) -> &'static str {
        match self {
            Self::Hf => "spinquant-hf",
            Self::Native => native::FORMAT,
            Self::CompressedTensors => "spinquant-compressed-tensors",
        }
    }

    /// True where the folder is a model to transformers: a `config.json`, shards, norms with their gains of 1.
    pub fn is_hugging_face(self) -> bool {
        self != Self::Native
    }

    /// Checks that the format has codes of a scheme, before a model is loaded.
    ///
    /// # Errors
    /// [`Error::Argument`]: blocks of floating-point numbers, but for values of them.
    pub fn check_codes(self, scheme: &Scheme) -> Result<()> {
        let name = self.name().trim_start_matches("spinquant-");
        if self == Self::Hf { Ok(()) } else { scheme.check_integer(&format!("format {name} (hf holds values of blocks)")) }
    }

    /// What of a scheme an output in this format holds: a Hugging Face folder has weights only, and whoever runs it computes
    /// activations, K and V at 16 bits or as it likes; one of compressed-tensors says how inputs of linears are quantised, by a rule of its
    /// own.
    pub fn holds(self, scheme: &Scheme) -> Scheme {
        match self {
            Self::Native => *scheme,
            Self::CompressedTensors => compressed::holds(scheme),
            Self::Hf => Scheme { activation_clip: ClipRatios::NONE, online: Online::NONE, ..scheme.unquantized_activations() },
        }
    }
}

impl std::str::FromStr for Format {
    type Err = Error;
    fn from_str(s: &str) -> Result<Self> {
        match s {
            "hf" => Ok(Self::Hf),
            "native" => Ok(Self::Native),
            "compressed-tensors" => Ok(Self::CompressedTensors),
            _ => Err(Error::argument("format", format!("expected native, hf or compressed-tensors, got {s:?}"))),
        }
    }
}

/// What was done, for the record. Nothing here changes the result.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Provenance {
    /// The model that was quantised.
    pub model: String,
    /// `none`, `hadamard:SEED` or a file.
    pub rotations: String,
    /// How weights were quantised: `rtn`, `gptq`.
    pub weights: String,
    /// SHA-256 of the calibration text ([`sha256`]).
    pub calibration_sha256: Option<String>,
    /// Seeds by what they are for.
    pub seeds: BTreeMap<String, u64>,
    /// The command line. The only field that a continued run may change.
    pub command: String,
    /// Anything else.
    pub notes: BTreeMap<String, Value>,
}

/// What is written, and where.
#[derive(Clone, Debug)]
pub struct Output<'a> {
    /// The folder; must be absent or empty. Links are followed.
    pub dir: &'a Path,
    /// Its layout.
    pub format: Format,
    /// Replace the output that is in the folder, and any unfinished output beside it that belongs to another run. A folder that is or
    /// holds the source or one of the inputs, or anything that was not written here, is refused all the same.
    pub overwrite: bool,
    /// Files and folders that the run reads, besides the source.
    pub inputs: Vec<PathBuf>,
    /// The most bytes of tensors in one Hugging Face file.
    pub shard_bytes: u64,
    /// The folder whose tokenizer is copied, and whose `config.json` a Hugging Face output keeps where it can.
    pub source: Option<&'a Path>,
    /// For the record.
    pub provenance: Provenance,
}

impl<'a> Output<'a> {
    /// Into an absent or empty folder, with the usual shards.
    pub fn new(dir: &'a Path, format: Format) -> Self {
        Self {
            dir,
            format,
            overwrite: false,
            inputs: vec![],
            shard_bytes: SHARD_BYTES,
            source: None,
            provenance: Provenance::default(),
        }
    }
}

/// A weight as it is written.
#[derive(Clone, Debug)]
pub enum Stored {
    /// Not quantised, in the output's element type.
    Values(Tensor),
    /// On a grid.
    Codes(Quantized),
}

impl Stored {
    /// The weight in an element type.
    ///
    /// # Errors
    /// Codes that are not those of the grid, or a `dtype` that is not a floating-point type.
    pub fn values(&self, dtype: DType) -> Result<Tensor> {
        match self {
            Self::Values(t) => t.to_dtype(dtype),
            Self::Codes(q) => q.dequantize()?.to_dtype(dtype),
        }
    }
}

/// Clip constants of one layer, in the order of [`Site::ALL`]: logarithms `[kinds, 2]`.
pub type SiteClips = [Option<Tensor>; Site::ALL.len()];

/// A layer's linears, rotated.
pub type StoredLayer = Linears<Affine<Stored>>;

/// Rounds a layer's rotated weights to nearest: the very codes that [`Llama::merge`](crate::llama::Llama::merge)'s weights are made of.
///
/// # Errors
/// A group that does not divide the columns of a weight, or weights that cannot be quantised.
pub fn round_to_nearest(weights: &LayerWeights, spec: &QuantSpec) -> Result<StoredLayer> {
    let stored = |w: &Tensor| Ok(if spec.is_active() { Stored::Codes(quantize(w, spec)?) } else { Stored::Values(w.clone()) });
    weights.each(|_, l| Ok(l.with_weight(stored(&l.weight)?)))
}

/// SHA-256 in hexadecimal.
pub fn sha256(bytes: &[u8]) -> String {
    io::hex(&Sha256::digest(bytes))
}

/// SHA-256 of the shape, type and values of R1, R2, R2b, the scales and the clip constants.
///
/// # Errors
/// A failing copy from a GPU.
pub fn rotations_sha256(rotations: &Rotations) -> Result<String> {
    let mut hash = Sha256::new();
    for (_, t) in rotations.tensors() {
        let t = t.to_device(&Device::Cpu)?;
        hash.update(format!("{} {:?}\n", t.dtype(), t.shape()));
        hash.update(io::bytes(&t)?);
    }
    Ok(io::hex(&hash.finalize()))
}

/// Writes an output folder layer by layer.
#[derive(Debug)]
pub struct Writer<'a> {
    output: Output<'a>,
    config: LlamaConfig,
    scheme: Scheme,
    dtype: DType,
    rotations: Option<&'a Rotations>,
    place: Place,
    /// The record but for the command line: what must agree for a run to continue.
    record: Map<String, Value>,
}

impl<'a> Writer<'a> {
    /// Starts an output, or continues one. `dtype` is the element type of what is not quantised; `rotations` are those merged
    /// into the weights that will come; `weights` tells source models of one shape apart ([`sha256`] of something of theirs).
    ///
    /// # Errors
    /// A folder that is not empty (without `overwrite`); an unfinished output of another run; one that is being written; a scheme
    /// that the format cannot express; whatever the file system says.
    pub fn create(
        output: Output<'a>,
        config: &LlamaConfig,
        scheme: &Scheme,
        dtype: DType,
        rotations: Option<&'a Rotations>,
        weights: &str,
    ) -> Result<Self> {
        config.validate()?;
        let scheme = match (rotations, output.format) {
            (Some(_), _) => *scheme,
            (None, Format::Native) => scheme.unrotated(),
            (None, Format::Hf | Format::CompressedTensors) => scheme.online(Online::NONE),
        };
        output.format.check_codes(&scheme)?;
        if output.format == Format::CompressedTensors {
            compressed::check(config, &scheme)?;
        }
        if output.format == Format::Hf && scheme.online != Online::NONE {
            let online = scheme.online;
            return Err(Error::argument(
                "format hf",
                format!("expected no online rotations (nothing would run them), got {online}; give --online none"),
            ));
        }
        if let Some(r) = rotations {
            r.check_for(&config.scale_sizes(), crate::rotation::TOLERANCE)?;
        }
        let clipped = output.format == Format::Native && rotations.is_some_and(|r| !r.clips.is_empty());
        let version = if clipped { native::CLIPPED_VERSION } else { native::VERSION };
        let mut record = Map::from_iter([
            ("format".into(), output.format.name().into()),
            ("format_version".into(), version.into()),
            ("crate_version".into(), env!("CARGO_PKG_VERSION").into()),
            ("config".into(), serde_json::from_str(&config.to_json()).expect("JSON")),
            ("scheme".into(), serde_json::to_value(output.format.holds(&scheme)).expect("JSON")),
            ("dtype".into(), dtype.to_string().into()),
            ("rotations_sha256".into(), rotations.map(rotations_sha256).transpose()?.into()),
            ("weights_sha256".into(), weights.into()),
            ("shard_bytes".into(), output.shard_bytes.into()),
            ("provenance".into(), serde_json::to_value(&output.provenance).expect("JSON")),
        ]);
        record["provenance"]["command"] = Value::Null;
        if output.format.is_hugging_face() {
            // What weights were calibrated for: a run for another scheme does not continue this one.
            record.insert("made_for".into(), serde_json::to_value(scheme).expect("JSON"));
        }

        let place = Place::open(&output)?;
        let writer = Self { output, config: config.clone(), scheme, dtype, rotations, place, record };
        writer.start()?;
        Ok(writer)
    }

    /// Begins afresh, or checks that what is there belongs to this run.
    fn start(&self) -> Result<()> {
        let run = self.place.partial.join(RUN);
        let ours = Value::from(self.record.clone());
        // A run that cannot be read owns nothing.
        let saved: Value = fs::read(&run).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or(Value::Null);
        if saved == ours {
            return Ok(());
        }
        if !saved.is_null() && !self.output.overwrite {
            let different = difference(&saved, &ours).unwrap_or_else(|| "format differs".into());
            let message = format!("unfinished output of another run: {different}; delete the folder or overwrite");
            return Err(Error::format(&self.place.partial, message));
        }
        self.place.clear()?;
        write_text(&run, &format!("{ours:#}\n"))
    }

    fn part(&self, layer: usize) -> PathBuf {
        self.place.partial.join(format!("layer-{layer:05}.safetensors"))
    }

    /// True when a layer was written before, by this run or by one it continues.
    pub fn has_layer(&self, layer: usize) -> bool {
        Part::open(&self.part(layer)).is_ok()
    }

    /// A layer that was written before: its codes, or the values of a [`Format::Hf`] output. What a continued GPTQ run feeds the next
    /// layer with.
    ///
    /// # Errors
    /// It is missing or damaged.
    pub fn read_layer(&self, layer: usize) -> Result<StoredLayer> {
        let part = Part::open(&self.part(layer))?;
        let (config, spec) = (&self.config, self.spec());
        match self.output.format {
            Format::Native => native::read_layer(&part, config, &spec, self.dtype, layer),
            Format::Hf => hf::read_layer(&part, config, self.dtype, layer),
            Format::CompressedTensors => compressed::read_layer(&part, config, &spec, self.dtype, layer),
        }
    }

    fn spec(&self) -> QuantSpec {
        let spec = self.scheme.sites(self.config.head_dim).weight;
        if self.output.format == Format::CompressedTensors { spec.stored(self.dtype) } else { spec }
    }

    /// The clip constants of its own that a layer was written with.
    ///
    /// # Errors
    /// The layer is missing or damaged.
    pub fn read_clips(&self, layer: usize) -> Result<SiteClips> {
        native::read_clips(&Part::open(&self.part(layer))?, &self.config, self.dtype, layer)
    }

    /// Writes a layer.
    ///
    /// # Errors
    /// Shapes of another model; a bias or norm too many or too few; codes outside the scheme's grid; whatever the file system says.
    pub fn layer(&self, layer: usize, weights: &StoredLayer) -> Result<()> {
        self.clipped_layer(layer, weights, &SiteClips::default())
    }

    /// Writes a layer with clip constants of its own, which stand in place of those of the rotations.
    ///
    /// # Errors
    /// Those of [`Writer::layer`]; clip constants of another shape, or in a format that has none.
    pub fn clipped_layer(&self, layer: usize, weights: &StoredLayer, clips: &SiteClips) -> Result<()> {
        if layer >= self.config.layers {
            return Err(Error::argument("layer", format!("expected less than {}, got {layer}", self.config.layers)));
        }
        let mut raws = vec![];
        for (linear, Affine { weight: w, bias, norm }) in weights.iter() {
            let (shape, name) = (linear.shape(&self.config), linear.path(layer));
            let got = match w {
                Stored::Values(t) => t.shape(),
                Stored::Codes(q) => &q.shape[..],
            };
            if got != shape {
                return Err(Error::shape(name, format!("{shape:?}"), got));
            }
            let d = self.config.head_dim;
            let biased = linear.has_bias(&self.config);
            raws.extend(self.beside(bias.as_ref(), biased, "a bias", format!("{name}.bias"), shape[0])?);
            let norm_name = linear.norm_path(layer).unwrap_or(format!("{name}.norm"));
            let normed = linear.has_norm(&self.config);
            raws.extend(self.beside(norm.as_ref(), normed, "a norm", format!("{norm_name}.weight"), d)?);
            if self.output.format == Format::Native {
                native::pack(&mut raws, &name, w, &self.spec(), self.dtype)?;
            }
        }
        match self.output.format {
            Format::Hf => hf::pack(&mut raws, &self.config, weights, self.dtype, layer)?,
            Format::CompressedTensors => compressed::pack(&mut raws, &self.config, weights, &self.spec(), layer)?,
            Format::Native => {}
        }
        if self.output.format.is_hugging_face() {
            let ones = ones(self.config.hidden_size, self.dtype)?;
            let gains = self.gains(layer)?.unwrap_or_else(|| [ones.clone(), ones]);
            for (norm, gain) in NORMS.into_iter().zip(&gains) {
                raws.push(Raw::new(format!("model.layers.{layer}.{norm}.weight"), gain)?);
            }
        } else if let Some(gains) = self.gains(layer)? {
            for (norm, gain) in NORMS.into_iter().zip(&gains) {
                raws.push(Raw::new(format!("model.layers.{layer}.{norm}.weight"), gain)?);
            }
        }
        if clips.iter().any(Option::is_some) {
            if self.output.format != Format::Native {
                let message = format!("expected none in {}, which has no clip constants", self.output.format.name());
                return Err(Error::argument(format!("clip constants of layer {layer}"), message));
            }
            native::pack_clips(&mut raws, &self.config, clips, self.dtype, layer)?;
        }
        parts::write(&self.part(layer), &raws, &BTreeMap::new())
    }

    /// A tensor `[n]` beside a weight, which the configuration asks for or not.
    fn beside(&self, t: Option<&Tensor>, wanted: bool, what: &str, name: String, n: usize) -> Result<Option<Raw<'static>>> {
        match (t, wanted) {
            (None, false) => Ok(None),
            (Some(t), true) if t.shape() == [n] => Raw::new(name, &t.to_dtype(self.dtype)?).map(Some),
            (Some(t), true) => Err(Error::shape(name, format!("[{n}]"), t.shape())),
            (None, true) => Err(Error::argument(name, format!("expected {what} (the configuration says so), got none"))),
            (Some(_), false) => {
                Err(Error::argument(name, format!("expected no {} (the configuration says so), got one", &what[2..])))
            }
        }
    }

    /// The gains that scales leave in a layer's norms.
    fn gains(&self, layer: usize) -> Result<Option<[Tensor; 2]>> {
        let Some(logarithms) = self.rotations.and_then(|r| r.scales.get(Scale::Norms)) else { return Ok(None) };
        let [first, second] = norm_gains(logarithms, layer)?;
        Ok(Some([first.to_dtype(self.dtype)?, second.to_dtype(self.dtype)?]))
    }

    /// Adds the (rotated) embedding and head, joins the layers and moves the folder into place.
    ///
    /// # Errors
    /// A layer that is missing or damaged; an output folder that is no longer free; whatever the file system says. The layers
    /// stay.
    pub fn finish(self, embedding: &Tensor, head: &Tensor) -> Result<()> {
        let config = &self.config;
        let mut raws = vec![];
        for (name, t) in [(EMBEDDING, embedding), (HEAD, head)] {
            if t.shape() != [config.vocab_size, config.hidden_size] {
                return Err(Error::shape(name, format!("[{}, {}]", config.vocab_size, config.hidden_size), t.shape()));
            }
            raws.push(Raw::new(format!("{name}.weight"), &t.to_dtype(self.dtype)?)?);
        }
        let mut metadata: BTreeMap<&str, String> = BTreeMap::new();
        let mut record = self.record.clone();
        record["provenance"]["command"] = self.output.provenance.command.clone().into();
        let done = self.place.partial.join("done");
        if done.exists() {
            fs::remove_dir_all(&done).map_err(Error::io(&done))?; // joined, but not moved
        }
        fs::create_dir(&done).map_err(Error::io(&done))?;
        let limit = match self.output.format {
            Format::Hf | Format::CompressedTensors => {
                raws.push(Raw::new(format!("{FINAL_NORM}.weight"), &ones(config.hidden_size, self.dtype)?)?);
                metadata.insert("format", "pt".into());
                write_text(&done.join("config.json"), &self.hf_config()?)?;
                self.output.shard_bytes
            }
            Format::Native => {
                metadata.insert("format", native::FORMAT.into());
                record.extend(native::describe(&mut raws, config, &self.scheme, self.dtype, self.rotations)?);
                u64::MAX
            }
        };
        let rest = self.place.partial.join("rest.safetensors");
        parts::write(&rest, &raws, &BTreeMap::new())?;
        let files = std::iter::once(rest.clone()).chain((0..config.layers).map(|l| self.part(l)));
        let files = files.map(|path| Part::open(&path)).collect::<Result<Vec<_>>>()?;
        if files.iter().enumerate().any(|(i, part)| i > 0 && native::has_clips(part, i - 1)) {
            record.insert("format_version".into(), native::CLIPPED_VERSION.into());
        }
        parts::join(&files, &done, limit, &metadata)?;
        drop(files);
        write_text(&done.join(RECORD), &format!("{:#}\n", Value::from(record)))?;
        if self.output.format == Format::CompressedTensors {
            let r4 = compressed::r4(config, &self.scheme)?;
            write_text(&done.join(README), &compressed::readme(&self.written(), self.dtype, r4, &self.output.provenance))?;
        }
        for name in COPIED {
            let Some(from) = self.output.source.map(|s| s.join(name)).filter(|p| p.is_file()) else { continue };
            copy(&from, &done.join(name))?;
        }
        self.place.publish(&done, &self.output)
    }

    /// The scheme of the network that is written.
    fn written(&self) -> Scheme {
        self.output.format.holds(&self.scheme)
    }

    /// The source's `config.json` with what has changed, or one of our own.
    fn hf_config(&self) -> Result<String> {
        let mut config: Map<String, Value> = match self.output.source.map(|s| s.join("config.json")).filter(|p| p.is_file()) {
            Some(path) => {
                let bytes = fs::read(&path).map_err(Error::io(&path))?;
                serde_json::from_slice(&bytes).map_err(|e| Error::format(&path, format!("expected a JSON object: {e}")))?
            }
            None => serde_json::from_str(&self.config.to_json()).expect("JSON"),
        };
        config.insert("tie_word_embeddings".into(), false.into());
        config.extend(self.config.multipliers_json());
        if self.output.format == Format::CompressedTensors {
            let r4 = compressed::r4(&self.config, &self.scheme)?;
            let quantization = Quantization::of(&self.written(), r4).to_json(self.config.head_dim);
            config.insert("quantization_config".into(), quantization);
        }
        let dtype = match self.dtype {
            DType::F64 => "float64",
            DType::F16 => "float16",
            DType::BF16 => "bfloat16",
            DType::F32 | DType::U32 => "float32",
        };
        // Both generations of the key; only what is there, or the older one.
        let newer = config.contains_key("dtype");
        if newer {
            config.insert("dtype".into(), dtype.into());
        }
        if !newer || config.contains_key("torch_dtype") {
            config.insert("torch_dtype".into(), dtype.into());
        }
        Ok(format!("{:#}\n", Value::from(config)))
    }
}

/// Where two records differ first, in words; of one field with its values, if those are short.
fn difference(saved: &Value, ours: &Value) -> Option<String> {
    if saved == ours {
        return None;
    }
    let (Value::Object(a), Value::Object(b)) = (saved, ours) else {
        let short = |v: &Value| Some(v.to_string()).filter(|text| text.len() <= 40 && !v.is_object());
        return Some(match (short(saved), short(ours)) {
            (Some(a), Some(b)) => format!(" was {a}, now {b}"),
            _ => " differs".into(),
        });
    };
    let names = b.keys().chain(a.keys().filter(|name| !b.contains_key(*name)));
    let fields = names.filter_map(|name| {
        let of = |record: &Map<String, Value>| record.get(name).cloned().unwrap_or(Value::Null);
        let inner = difference(&of(a), &of(b))?;
        Some(format!("{name}{}{inner}", if inner.starts_with(' ') { "" } else { "." }))
    });
    fields.into_iter().next()
}

fn ones(n: usize, dtype: DType) -> Result<Tensor> {
    Tensor::from_vec(vec![1f64; n], [n])?.to_dtype(dtype)
}

fn write_text(path: &Path, text: &str) -> Result<()> {
    io::write_atomically(path, |out| out.write_all(text.as_bytes()))
}
