//! The native format: packing, describing, loading. The layout is in the parent module's documentation.

use std::path::Path;

use rayon::prelude::*;
use safetensors::tensor::Dtype;
use serde_json::{Map, Value, json};

use super::parts::{Part, Raw};
use super::{RECORD, SiteClips, Stored, StoredLayer};
use crate::grid::Quantized;
use crate::hadamard::Hadamard;
use crate::llama::{Affine, Block, EMBEDDING, HEAD, Linear, Linears, LlamaConfig, Merged, NORMS, Placement, Placer, layer_clips};
use crate::ops::codes::Codes;
use crate::quant::{QuantSpec, R4, Scheme, Site};
use crate::rotation::{ClipEnds, Rotations, Scale, TOLERANCE};
use crate::{DType, Device, Error, Result, Tensor, io};

pub const FORMAT: &str = "spinquant-native";
pub const VERSION: u32 = 1;
/// Of outputs with clip constants: whoever does not know them must not run the network.
pub const CLIPPED_VERSION: u32 = 2;
const HADAMARD: &str = "a row x of n values becomes H x: view it as [blocks, K, n/(K blocks)], natural-order Sylvester transform \
    along the last axis, H_K (the tensor .core) from the left along the middle axis, divided by sqrt(n/blocks)";

/// Two codes a byte.
fn halves(spec: &QuantSpec) -> bool {
    spec.bits <= 4
}

fn row_bytes(spec: &QuantSpec, cols: usize) -> usize {
    if halves(spec) { cols.div_ceil(2) } else { cols }
}

/// The type of scales and zero points.
fn grid_type(dtype: DType) -> DType {
    if dtype == DType::F64 { DType::F64 } else { DType::F32 }
}

/// The tensors that hold one weight.
pub fn pack(raws: &mut Vec<Raw>, name: &str, weight: &Stored, spec: &QuantSpec, dtype: DType) -> Result<()> {
    let q = match weight {
        Stored::Values(t) if !spec.is_active() => {
            raws.push(Raw::new(format!("{name}.weight"), &t.to_dtype(dtype)?)?);
            return Ok(());
        }
        Stored::Codes(q) if spec.is_active() => q,
        Stored::Values(_) => {
            return Err(Error::argument(name, format!("expected codes of {} bits, got values", spec.bits)));
        }
        Stored::Codes(_) => return Err(Error::argument(name, "expected values (weights of 16 bits), got codes")),
    };
    let [rows, cols] = q.shape[..] else { return Err(Error::shape(name, "[out, in]", &q.shape)) };
    let group = spec.group_size(cols)?;
    let grid = [rows, cols / group];
    if q.group != group || q.codes.len() != rows * cols || q.scale.len() != grid[0] * grid[1] || q.zero.len() != q.scale.len() {
        let message = format!(
            "expected groups of {group} and {} scales, got groups of {} and {}",
            grid[0] * grid[1],
            q.group,
            q.scale.len()
        );
        return Err(Error::argument(name, message));
    }
    let (min, max) = (spec.min_code() as i16, spec.max_code() as i16);
    if let Some(code) = q.codes.iter().find(|c| !(min..=max).contains(c)) {
        return Err(Error::argument(name, format!("expected codes from {min} to {max}, got {code}")));
    }
    let code = |c: i16| (c - min) as u8;
    let packed: Vec<u8> = if halves(spec) {
        let byte = |pair: &[i16]| code(pair[0]) | pair.get(1).map_or(0, |c| code(*c) << 4);
        q.codes.chunks(cols).flat_map(|row| row.chunks(2).map(byte)).collect()
    } else {
        q.codes.iter().map(|c| code(*c)).collect()
    };
    let shape = vec![rows, row_bytes(spec, cols)];
    raws.push(Raw { name: format!("{name}.codes"), dtype: Dtype::U8, shape, bytes: packed.into() });
    let (expected, got) = (grid_type(dtype), q.scale.dtype());
    if got != expected || q.zero.dtype() != expected {
        return Err(Error::dtype(format!("{name}.scale"), expected, got));
    }
    raws.push(Raw::new(format!("{name}.scale"), &q.scale.clone().reshape(grid)?)?);
    if !spec.symmetric {
        raws.push(Raw::new(format!("{name}.zero"), &q.zero.clone().reshape(grid)?)?);
    } else if q.zero.to_f64_vec()?.iter().any(|z| *z != 0.0) {
        return Err(Error::argument(name, "expected no zero points on a symmetric grid"));
    }
    Ok(())
}

/// One weight, back from [`pack`].
fn unpack(part: &Part, name: &str, shape: [usize; 2], spec: &QuantSpec, dtype: DType) -> Result<Stored> {
    if !spec.is_active() {
        return Ok(Stored::Values(part.tensor(&format!("{name}.weight"), dtype, &shape)?));
    }
    let [rows, cols] = shape;
    let group = spec.group_size(cols)?;
    let bytes = row_bytes(spec, cols);
    let packed = part.get(&format!("{name}.codes"), Dtype::U8, &[rows, bytes])?;
    let min = spec.min_code() as i16;
    let (halves, mut codes) = (halves(spec), vec![0i16; rows * cols]);
    codes.par_chunks_mut(cols.max(1)).zip(packed.par_chunks(bytes.max(1))).for_each(|(codes, row)| {
        for (i, code) in codes.iter_mut().enumerate() {
            let unsigned = if halves { row[i / 2] >> (4 * (i % 2)) & 15 } else { row[i] };
            *code = i16::from(unsigned) + min;
        }
    });
    let max = spec.max_code() as i16;
    if let Some(code) = codes.par_iter().find_first(|c| **c > max) {
        return Err(Error::format(part.path(), format!("{name}.codes: expected codes from {min} to {max}, got {code}")));
    }
    let grid = |part_name: &str| part.tensor(&format!("{name}.{part_name}"), grid_type(dtype), &[rows, cols / group]);
    let scale = grid("scale")?;
    let zero = if spec.symmetric { Tensor::zeros(scale.shape(), scale.dtype(), &Device::Cpu)? } else { grid("zero")? };
    Ok(Stored::Codes(Quantized { shape: shape.to_vec(), group, codes, scale, zero }))
}

/// A layer's weights, biases and norms.
pub fn read_layer(part: &Part, config: &LlamaConfig, spec: &QuantSpec, dtype: DType, layer: usize) -> Result<StoredLayer> {
    Linears::try_from_fn(|linear| {
        let (shape, name) = (linear.shape(config), linear.path(layer));
        let [bias, norm] = beside(part, config, dtype, layer, linear)?;
        Ok(Affine { weight: unpack(part, &name, shape, spec, dtype)?, bias, norm })
    })
}

fn clips_name(layer: usize, site: Site) -> String {
    format!("model.layers.{layer}.clips.{}", site.name())
}

fn clips_shape(config: &LlamaConfig, site: Site) -> [usize; 2] {
    [ClipEnds::kinds(site, config.kv_heads), 2]
}

/// True of a part with clip constants of this layer.
pub fn has_clips(part: &Part, layer: usize) -> bool {
    Site::ALL.into_iter().any(|site| part.has(&clips_name(layer, site)))
}

/// The tensors that hold a layer's own clip constants.
pub fn pack_clips(raws: &mut Vec<Raw>, config: &LlamaConfig, clips: &SiteClips, dtype: DType, layer: usize) -> Result<()> {
    for (site, t) in Site::ALL.into_iter().zip(clips) {
        let Some(t) = t else { continue };
        let (name, shape) = (clips_name(layer, site), clips_shape(config, site));
        if t.shape() != shape {
            return Err(Error::shape(name, format!("{shape:?}"), t.shape()));
        }
        raws.push(Raw::new(name, &t.to_dtype(grid_type(dtype))?)?);
    }
    Ok(())
}

/// A layer's own clip constants, as far as it has some.
pub fn read_clips(part: &Part, config: &LlamaConfig, dtype: DType, layer: usize) -> Result<SiteClips> {
    let mut clips = SiteClips::default();
    for (site, slot) in Site::ALL.into_iter().zip(&mut clips) {
        let name = clips_name(layer, site);
        if !part.has(&name) {
            continue;
        }
        let t = part.tensor(&name, grid_type(dtype), &clips_shape(config, site))?;
        let mut one = ClipEnds::default();
        one.set(site, Some(t.clone().reshape([1, t.rows(), 2])?));
        one.check(1, config.kv_heads).map_err(|e| Error::format(part.path(), format!("{name}: {e}")))?;
        *slot = Some(t);
    }
    Ok(clips)
}

/// The bias and the norm of a linear, as far as the configuration has them.
pub fn beside(part: &Part, config: &LlamaConfig, dtype: DType, layer: usize, linear: Linear) -> Result<[Option<Tensor>; 2]> {
    let read = |name: String, n: usize| part.tensor(&name, dtype, &[n]);
    let bias = linear.has_bias(config).then(|| read(format!("{}.bias", linear.path(layer)), linear.shape(config)[0]));
    let norm = linear.norm_path(layer).filter(|_| linear.has_norm(config));
    Ok([bias.transpose()?, norm.map(|name| read(format!("{name}.weight"), config.head_dim)).transpose()?])
}

/// The online Hadamards of a scheme: name and map.
fn online(config: &LlamaConfig, scheme: &Scheme) -> Result<Vec<(&'static str, Hadamard)>> {
    let mut maps = vec![];
    if scheme.online.r3 {
        maps.push(("r3", Hadamard::new(config.head_dim)?));
    }
    if let Some(map) = scheme.online.r4.map(config.intermediate_size)? {
        maps.push(("r4", map));
    }
    Ok(maps)
}

/// What the record says beside the run itself; adds rotations and Hadamard cores to the tensors.
pub fn describe(
    raws: &mut Vec<Raw>,
    config: &LlamaConfig,
    scheme: &Scheme,
    dtype: DType,
    rotations: Option<&Rotations>,
) -> Result<Map<String, Value>> {
    if let Some(r) = rotations {
        // Clip ratios of weights are in their scales.
        for (name, t) in r.clone().with_weight_clips(None).tensors() {
            raws.push(Raw::new(name, t)?);
        }
    }
    let mut hadamard = json!({"convention": HADAMARD});
    for (name, map) in online(config, scheme)? {
        let (k, core) = (map.k(), map.signs());
        hadamard[name] = json!({"n": map.n(), "k": k, "blocks": map.blocks(), "construction": map.construction()});
        if k > 1 {
            let bytes = core.iter().map(|s| *s as u8).collect::<Vec<_>>().into();
            raws.push(Raw { name: format!("{}.core", name.to_uppercase()), dtype: Dtype::I8, shape: vec![k, k], bytes });
        }
    }
    let spec = scheme.sites(config.head_dim).weight;
    let weights = spec.is_active().then(|| {
        json!({
            "bits": spec.bits,
            "stored_bits": if halves(&spec) { 4 } else { 8 },
            "symmetric": spec.symmetric,
            "min_code": spec.min_code(),
            "group": spec.group,
            "scale_dtype": grid_type(dtype).to_string(),
        })
    });
    Ok(Map::from_iter([("weights".into(), weights.into()), ("hadamard".into(), hadamard)]))
}

/// The R4 of a record, by the blocks of its map: a row that is whole now had some where fewer orders were known.
fn recorded(r4: R4, map: &Value, width: usize) -> Result<R4, String> {
    let wrong = |e: Error| format!("scheme: {e}");
    let (was, mut here) = (&map["blocks"], vec![]);
    for r4 in [r4, r4.unrecorded(width).map_err(wrong)?] {
        match r4.map(width).map_err(wrong)?.map(|map| map.blocks()) {
            Some(blocks) if *was != blocks => here.push(blocks),
            _ => return Ok(r4),
        }
    }
    here.dedup();
    Err(format!("hadamard.r4.blocks: expected one of {here:?} for rows of {width}, got {was}"))
}

/// A native output, loaded.
#[derive(Clone, Debug)]
pub struct Native {
    /// The network, to the bit what was written.
    pub model: Merged,
    /// The rotations that its weights hold.
    pub rotations: Option<Rotations>,
    /// The whole `spinquant.json`.
    pub record: Value,
}

/// True of a folder that [`load_native`] is meant for. A record that cannot be read counts where there is no `config.json`: then
/// [`load_native`] says what is wrong with it.
pub fn is_native(dir: &Path) -> bool {
    let Ok(bytes) = std::fs::read(dir.join(RECORD)) else { return false };
    match serde_json::from_slice::<Value>(&bytes) {
        Ok(record) => record["format"] == FORMAT,
        Err(_) => !dir.join("config.json").exists(),
    }
}

/// What the record of a native output says of the network, read without its tensors.
#[derive(Clone, Debug)]
pub struct Record {
    /// The network's sizes.
    pub config: LlamaConfig,
    /// What it is quantised to.
    pub scheme: Scheme,
    /// Type of the values that are not quantised, and of arithmetic.
    pub dtype: DType,
    /// The rotations that its weights hold, as [`Provenance::rotations`](super::Provenance::rotations) names them.
    pub rotations: String,
    /// How its weights were quantised.
    pub weights: String,
    /// The whole `spinquant.json`.
    pub json: Value,
}

impl Record {
    /// Reads the `spinquant.json` of a native output.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Format`] for another format or version, or a configuration or scheme that is none.
    pub fn read(dir: &Path) -> Result<Self> {
        let path = dir.join(RECORD);
        let bytes = std::fs::read(&path).map_err(Error::io(&path))?;
        let json: Value = serde_json::from_slice(&bytes)
            .map_err(|e| Error::format(&path, format!("expected a JSON object: {}", io::short(e))))?;
        let bad = |message: String| Error::format(&path, message);
        if json["format"] != FORMAT || ![VERSION, CLIPPED_VERSION].iter().any(|known| json["format_version"] == *known) {
            let (format, version) = (&json["format"], &json["format_version"]);
            return Err(bad(format!(
                "expected format {FORMAT} version {VERSION} or {CLIPPED_VERSION}, got {format:.40} version {version:.40}"
            )));
        }
        let config = LlamaConfig::from_json(json["config"].to_string().as_bytes(), &path)?;
        let mut scheme: Scheme = serde_json::from_value(json["scheme"].clone()).map_err(|e| bad(format!("scheme: {e}")))?;
        scheme.online.r4 = recorded(scheme.online.r4, &json["hadamard"]["r4"], config.intermediate_size).map_err(bad)?;
        let dtype: DType = json["dtype"].as_str().unwrap_or("").parse().map_err(|e: Error| bad(e.to_string()))?;
        let sites = scheme.sites(config.head_dim);
        let each = Site::ALL.map(|site| (*sites.at(site), site.name()));
        for (spec, what) in each.into_iter().chain([(sites.weight, "weights")]) {
            if spec.is_active() {
                // Every width whose group is right for its place.
                spec.group_size(spec.group.unwrap_or(1)).map_err(|e| bad(format!("scheme: {what}: {e}")))?;
            } else if spec.bits != 16 {
                return Err(bad(format!("scheme: {what}: expected 2 to 8 bits or 16, got {}", spec.bits)));
            }
        }
        let text = |name: &str| json["provenance"][name].as_str().unwrap_or_default().to_string();
        Ok(Self { config, scheme, dtype, rotations: text("rotations"), weights: text("weights"), json })
    }
}

/// The codes of the weights of a native output, layer by layer: for [`Merged::on_integers`].
///
/// # Errors
/// Those of [`load_native`]; weights that are not quantised.
pub fn load_codes(dir: &Path, device: &Device) -> Result<Vec<Linears<Codes>>> {
    let Record { config, scheme, dtype, .. } = Record::read(dir)?;
    let spec = scheme.sites(config.head_dim).weight;
    check_codes(&spec)?;
    let part = Part::open(&dir.join("model.safetensors"))?;
    (0..config.layers).map(|l| codes_of(&read_layer(&part, &config, &spec, dtype, l)?, l, &spec, device)).collect()
}

/// Fails where weights are no codes.
fn check_codes(spec: &QuantSpec) -> Result<()> {
    let message = || format!("expected weights in 2 to 8 bits, got {} bits", spec.bits);
    if spec.is_active() { Ok(()) } else { Err(Error::argument("integer products", message())) }
}

/// The codes of a layer, on a device.
fn codes_of(layer: &StoredLayer, l: usize, spec: &QuantSpec, device: &Device) -> Result<Linears<Codes>> {
    layer.each(|linear, stored| match &stored.weight {
        Stored::Codes(q) => Codes::new(q, spec)?.to_device(device),
        Stored::Values(_) => Err(Error::argument("integer products", format!("{}: expected codes, got values", linear.path(l)))),
    })
}

/// A native output and the codes of its weights, of a folder that is read once: what [`load_native_placed`] and [`load_codes`] load.
///
/// # Errors
/// Those of both.
pub fn load_native_with_codes(dir: &Path, device: &Device, placement: Placement) -> Result<(Native, Vec<Linears<Codes>>)> {
    let Record { config, scheme, .. } = Record::read(dir)?;
    let spec = scheme.sites(config.head_dim).weight;
    check_codes(&spec)?;
    let mut codes = vec![];
    let native = load_seen(dir, device, placement, |l, layer| {
        codes.push(codes_of(layer, l, &spec, device)?);
        Ok(())
    })?;
    Ok((native, codes))
}

/// Loads a native output.
///
/// # Errors
/// [`Error::Io`]; [`Error::Format`] and others for a folder that does not follow the layout: another version, missing tensors or
/// tensors of another shape, numbers that are not finite, codes off the grid, rotations that are not orthogonal.
pub fn load_native(dir: &Path, device: &Device) -> Result<Native> {
    load_native_placed(dir, device, Placement::RESIDENT)
}

/// The same with some layers in main memory ([`Llama::streamed`](crate::llama::Llama::streamed)): each goes straight to its place.
///
/// # Errors
/// Those of [`load_native`] and of [`Llama::streamed`](crate::llama::Llama::streamed).
pub fn load_native_placed(dir: &Path, device: &Device, placement: Placement) -> Result<Native> {
    load_seen(dir, device, placement, |_, _| Ok(()))
}

/// The same, and `see` is shown every layer as it is stored.
fn load_seen(
    dir: &Path,
    device: &Device,
    placement: Placement,
    mut see: impl FnMut(usize, &StoredLayer) -> Result<()>,
) -> Result<Native> {
    let Record { config, scheme, dtype, json: record, .. } = Record::read(dir)?;
    let path = dir.join(RECORD);
    let bad = |message: String| Error::format(&path, message);
    let sites = scheme.sites(config.head_dim);
    let part = Part::open(&dir.join("model.safetensors"))?;
    for (name, map) in online(&config, &scheme)? {
        let k = map.k();
        if k > 1 {
            let core = part.get(&format!("{}.core", name.to_uppercase()), Dtype::I8, &[k, k])?;
            if core.iter().zip(map.signs()).any(|(a, b)| *a as i8 != *b) {
                return Err(bad(format!("{name}: written with another Hadamard matrix of size {k}")));
            }
        }
    }
    let table = |name: &str| {
        let shape = [config.vocab_size, config.hidden_size];
        part.tensor(&format!("{name}.weight"), dtype, &shape)?.to_device(device)
    };
    let (embedding, head) = (table(EMBEDDING)?, table(HEAD)?);
    let rotations = match part.has("R1") {
        false => None,
        true => {
            let c = config.hidden_size;
            let dtype = if part.get("R1", Dtype::F64, &[c, c]).is_ok() { DType::F64 } else { DType::F32 };
            let mut r = Rotations::new(part.tensor("R1", dtype, &[c, c])?, part.of_any_shape("R2", dtype)?);
            r.set_extras(|name| part.has(name).then(|| part.of_any_shape(name, dtype)).transpose())?;
            r.check_for(&config.scale_sizes(), TOLERANCE).map_err(|e| Error::format(part.path(), e))?;
            Some(r)
        }
    };
    let mut block = |l: usize| {
        let stored = read_layer(&part, &config, &sites.weight, dtype, l)?;
        see(l, &stored)?;
        let block = Block::new(&config, l, stored.each(|_, l| Ok(l.with_weight(l.weight.values(dtype)?)))?);
        let block = match &rotations {
            Some(r) if !r.clips.is_empty() => block.with_clips(layer_clips(&r.clips, l, dtype, device)?),
            _ => block,
        };
        let mut own = read_clips(&part, &config, dtype, l)?;
        for t in own.iter_mut().flatten() {
            *t = t.to_device(device)?;
        }
        let block = if own.iter().any(Option::is_some) { block.with_clips(own) } else { block };
        if rotations.as_ref().is_none_or(|r| r.scales.get(Scale::Norms).is_none()) {
            return Ok(block);
        }
        let [first, second] = NORMS
            .map(|norm| part.tensor(&format!("model.layers.{l}.{norm}.weight"), dtype, &[config.hidden_size])?.to_device(device));
        Ok(block.with_gains([first?, second?]))
    };
    let placer = Placer::new(device, placement, config.layers)?;
    let blocks = (0..config.layers).map(|l| placer.place(l, &block(l)?)).collect::<Result<_>>()?;
    Ok(Native { model: Merged { config, scheme, embedding, head, blocks }, rotations, record })
}
