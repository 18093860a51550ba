//! Weights of a LLaMA from safetensors files, with the RMSNorm gains folded away.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use half::{bf16, f16};
use memmap2::Mmap;
use rand::SeedableRng;
use rayon::prelude::*;
use safetensors::tensor::{Dtype, Metadata};
use sha2::{Digest, Sha256};

use super::LlamaConfig;
use crate::device::cpu;
use crate::dtype::Element;
use crate::{DType, Error, Result, Tensor, io};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// The tensors of a model directory: `model.safetensors`, or the shards that `model.safetensors.index.json` names.
///
/// Files are memory-mapped; a tensor is read when asked for. Nobody may shorten the files meanwhile.
#[derive(Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    shards: Vec<Shard>,
    /// Tensor name to shard.
    names: BTreeMap<String, usize>,
}

/// A file's bytes.
#[derive(Debug)]
enum Bytes {
    Mapped(Mmap),
    /// Part of the program.
    Static(&'static [u8]),
}

impl std::ops::Deref for Bytes {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        match self {
            Self::Mapped(map) => map,
            Self::Static(bytes) => bytes,
        }
    }
}

#[derive(Debug)]
struct Shard {
    path: PathBuf,
    map: Bytes,
    metadata: Metadata,
    /// Where the data starts, after the header.
    start: usize,
}

/// One tensor's bytes, little-endian, still in the file.
struct Entry<'a> {
    path: &'a Path,
    name: &'a str,
    dtype: DType,
    shape: &'a [usize],
    bytes: &'a [u8],
}

impl Shard {
    fn open(path: PathBuf) -> Result<Self> {
        let file = File::open(&path).map_err(Error::io(&path))?;
        // SAFETY: read-only; a file that another process shortens while mapped would fault, which the type's documentation rules out.
        let map = unsafe { Mmap::map(&file) }.map_err(Error::io(&path))?;
        Self::new(path, Bytes::Mapped(map))
    }

    fn new(path: PathBuf, map: Bytes) -> Result<Self> {
        let (start, metadata) = io::header(&map).map_err(|e| {
            let size = map.len();
            Error::format(&path, format!("expected a complete safetensors file: {e} (the file has {size} bytes)"))
        })?;
        Ok(Self { path, map, metadata, start })
    }
}

impl Checkpoint {
    /// Maps the files of a model directory and checks that every one is whole.
    ///
    /// # Errors
    /// Neither file is there, a file is truncated or not safetensors, the index names an absent shard or a tensor its shard lacks.
    pub fn open(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref();
        let (single, index) = (dir.join(SINGLE), dir.join(INDEX));
        if single.exists() {
            return Ok(Self::of(dir, Shard::open(single)?));
        }
        if index.exists() {
            let mut checkpoint = Self { dir: dir.to_path_buf(), shards: vec![], names: BTreeMap::new() };
            checkpoint.open_shards(&index)?;
            return Ok(checkpoint);
        }
        Err(Error::format(dir, format!("expected {SINGLE} or {INDEX} in this directory, found neither")))
    }

    /// The bytes of one safetensors file that is part of the program; `name` is for messages.
    ///
    /// # Errors
    /// They are not a whole safetensors file.
    pub fn from_static(name: &str, bytes: &'static [u8]) -> Result<Self> {
        Ok(Self::of(Path::new(name), Shard::new(name.into(), Bytes::Static(bytes))?))
    }

    fn of(dir: &Path, shard: Shard) -> Self {
        let names = shard.metadata.offset_keys().into_iter().map(|name| (name, 0)).collect();
        Self { dir: dir.to_path_buf(), shards: vec![shard], names }
    }

    fn open_shards(&mut self, index: &Path) -> Result<()> {
        #[derive(serde::Deserialize)]
        struct Index {
            weight_map: BTreeMap<String, String>,
        }
        let bytes = std::fs::read(index).map_err(Error::io(index))?;
        let Index { weight_map } = serde_json::from_slice(&bytes)
            .map_err(|e| Error::format(index, format!("expected an object with a weight_map of tensor to file names: {e}")))?;
        let mut opened = HashMap::new();
        for (name, file) in weight_map {
            let shard = match opened.get(&file) {
                Some(&shard) => shard,
                None => {
                    let path = self.dir.join(&file);
                    if Path::new(&file).file_name() != Some(file.as_ref()) {
                        return Err(Error::format(
                            index,
                            format!("{name}: expected the name of a file in this directory, got {file:?}"),
                        ));
                    }
                    if !path.exists() {
                        return Err(Error::format(index, format!("{name}: names the shard {file}, which does not exist")));
                    }
                    self.shards.push(Shard::open(path)?);
                    opened.insert(file, self.shards.len() - 1);
                    self.shards.len() - 1
                }
            };
            let Shard { path, metadata, .. } = &self.shards[shard];
            if metadata.info(&name).is_none() {
                return Err(Error::format(path, format!("lacks the tensor {name}, which {INDEX} says is here")));
            }
            self.names.insert(name, shard);
        }
        Ok(())
    }

    /// Every tensor's name, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.names.keys().map(String::as_str)
    }

    /// Reads a tensor in the file's own element type (f64, f32, f16 or bf16).
    ///
    /// # Errors
    /// Naming file and tensor: it is absent, of another shape or element type, or holds values that are not finite.
    pub fn tensor(&self, name: &str, expected_shape: &[usize]) -> Result<Tensor> {
        let entry = self.entry(name, expected_shape)?;
        entry.read(entry.dtype, None)
    }

    fn entry(&self, name: &str, expected_shape: &[usize]) -> Result<Entry<'_>> {
        let Some((name, &shard)) = self.names.get_key_value(name) else {
            return Err(Error::format(&self.dir, format!("the tensor {name} is missing from the model's safetensors")));
        };
        let Shard { path, map, metadata, start } = &self.shards[shard];
        let info = metadata.info(name).expect("checked when opened");
        let bad = |message: String| Error::format(path, format!("{name}: {message}"));
        let dtype = match info.dtype {
            Dtype::F64 => DType::F64,
            Dtype::F32 => DType::F32,
            Dtype::F16 => DType::F16,
            Dtype::BF16 => DType::BF16,
            other => return Err(bad(format!("expected dtype F64, F32, F16 or BF16, got {other}"))),
        };
        if info.shape != expected_shape {
            return Err(bad(format!("expected shape {expected_shape:?}, got {:?}", info.shape)));
        }
        let (from, to) = info.data_offsets;
        // The header was checked against the file's length and every shape against its bytes.
        Ok(Entry { path, name, dtype, shape: &info.shape, bytes: &map[start + from..start + to] })
    }
}

impl Entry<'_> {
    /// The values in `dtype`, each row multiplied by `gain` (as long as a row) in `f64` and rounded once.
    fn read(&self, dtype: DType, gain: Option<&[f64]>) -> Result<Tensor> {
        match dtype {
            DType::F64 => self.read_as::<f64>(gain),
            DType::F32 => self.read_as::<f32>(gain),
            DType::F16 => self.read_as::<f16>(gain),
            DType::BF16 => self.read_as::<bf16>(gain),
            DType::U32 => Err(Error::dtype("weights", "f64, f32, f16 or bf16", dtype)),
        }
    }

    fn read_as<T: Element>(&self, gain: Option<&[f64]>) -> Result<Tensor> {
        let cols = self.shape.last().copied().unwrap_or(1).max(1);
        let size = self.dtype.size();
        let mut values = vec![T::default(); self.bytes.len() / size];
        let (bad, overflow) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let step = cols * cpu::rows_per_task(cols);
        values.par_chunks_mut(step).zip(self.bytes.par_chunks(step * size)).for_each_init(
            || vec![0f64; cols],
            |wide, (values, bytes)| {
                for (row, bytes) in values.chunks_mut(cols).zip(bytes.chunks(cols * size)) {
                    decode(self.dtype, bytes, wide);
                    let not_finite = wide.iter().filter(|x| !x.is_finite()).count();
                    if not_finite > 0 {
                        bad.fetch_add(not_finite, Ordering::Relaxed);
                    }
                    if let Some(gain) = gain {
                        wide.iter_mut().zip(gain).for_each(|(x, g)| *x *= g);
                    }
                    row.iter_mut().zip(&*wide).for_each(|(y, x)| *y = T::from_f64(*x));
                    let lost = row.iter().filter(|y| !y.to_f64().is_finite()).count();
                    if lost > 0 {
                        overflow.fetch_add(lost, Ordering::Relaxed);
                    }
                }
            },
        );
        let (bad, overflow) = (bad.into_inner(), overflow.into_inner());
        let count = values.len();
        let fail = |message: String| Err(Error::format(self.path, format!("{}: {message}", self.name)));
        if bad > 0 {
            return fail(format!("expected finite values, got {bad} of {count} that are NaN or infinite"));
        }
        if overflow > 0 {
            return fail(format!("{overflow} of {count} values are too large for {}", T::DTYPE));
        }
        Tensor::from_vec(values, self.shape)
    }
}

/// Widens little-endian values, exactly.
fn decode(dtype: DType, bytes: &[u8], wide: &mut [f64]) {
    fn each<const N: usize>(bytes: &[u8], wide: &mut [f64], f: impl Fn([u8; N]) -> f64) {
        wide.iter_mut().zip(bytes.as_chunks().0).for_each(|(x, b)| *x = f(*b));
    }
    match dtype {
        DType::F64 => each(bytes, wide, f64::from_le_bytes),
        DType::F32 => each(bytes, wide, |b| f32::from_le_bytes(b).into()),
        DType::F16 => each(bytes, wide, |b| f16::from_le_bytes(b).into()),
        DType::BF16 => each(bytes, wide, |b| bf16::from_le_bytes(b).into()),
        DType::U32 => unreachable!("entries are floating-point"),
    }
}

/// A LLaMA's linear layers, every RMSNorm gain folded in (so every norm's gain is 1) and embeddings untied.
#[derive(Clone, Debug)]
pub struct Weights {
    /// `[V, C]`.
    pub embedding: Tensor,
    /// The output layer with the final norm's gain, `[V, C]`.
    pub head: Tensor,
    /// One entry a decoder layer.
    pub layers: Vec<LayerWeights>,
}

/// The seven linear layers of a decoder layer, `[out, in]` as in `y = x Wᵀ`; H query heads, K key and value heads of width D.
#[derive(Clone, Debug)]
pub struct LayerWeights {
    /// `[H·D, C]`, with the input norm's gain.
    pub q: Tensor,
    /// `[K·D, C]`, with the input norm's gain.
    pub k: Tensor,
    /// `[K·D, C]`, with the input norm's gain.
    pub v: Tensor,
    /// `[C, H·D]`.
    pub o: Tensor,
    /// `[F, C]`, with the post-attention norm's gain.
    pub gate: Tensor,
    /// `[F, C]`, with the post-attention norm's gain.
    pub up: Tensor,
    /// `[C, F]`.
    pub down: Tensor,
}

/// A model directory whose weights are read a part at a time, folded as [`Weights::load`] says.
#[derive(Debug)]
pub struct Source {
    checkpoint: Checkpoint,
    config: LlamaConfig,
}

impl Source {
    /// Opens a model directory.
    ///
    /// # Errors
    /// Those of [`Checkpoint::open`] and [`LlamaConfig::validate`].
    pub fn open(dir: impl AsRef<Path>, config: &LlamaConfig) -> Result<Self> {
        Self::new(Checkpoint::open(dir)?, config)
    }

    /// The weights in a checkpoint.
    ///
    /// # Errors
    /// Those of [`LlamaConfig::validate`].
    pub fn new(checkpoint: Checkpoint, config: &LlamaConfig) -> Result<Self> {
        config.validate()?;
        Ok(Self { checkpoint, config: config.clone() })
    }

    /// Sizes.
    pub fn config(&self) -> &LlamaConfig {
        &self.config
    }

    fn entry(&self, name: &str, shape: &[usize]) -> Result<Entry<'_>> {
        self.checkpoint.entry(&format!("{name}.weight"), shape)
    }

    fn gain(&self, name: &str) -> Result<Vec<f64>> {
        self.entry(name, &[self.config.hidden_size])?.read(DType::F64, None)?.into_vec()
    }

    fn table(&self, name: &str) -> Result<Entry<'_>> {
        self.entry(name, &[self.config.vocab_size, self.config.hidden_size])
    }

    /// The element type the embedding is stored in.
    pub fn dtype(&self) -> Result<DType> {
        Ok(self.table(EMBEDDING)?.dtype)
    }

    /// SHA-256 of every tensor's name, type, shape and first 4 KiB: tells models of one shape apart without reading them whole.
    pub fn sha256(&self) -> String {
        let mut hash = Sha256::new();
        for (name, &shard) in &self.checkpoint.names {
            let Shard { map, metadata, start, .. } = &self.checkpoint.shards[shard];
            let info = metadata.info(name).expect("checked when opened");
            let (from, to) = info.data_offsets;
            hash.update(format!("{name} {} {:?}\n", info.dtype, info.shape));
            hash.update(&map[start + from..start + to.min(from + 4096)]);
        }
        io::hex(&hash.finalize())
    }

    /// The embedding, `[V, C]`.
    pub fn embedding(&self, dtype: DType) -> Result<Tensor> {
        self.table(EMBEDDING)?.read(dtype, None)
    }

    /// The output layer with the final norm's gain, `[V, C]`.
    pub fn head(&self, dtype: DType) -> Result<Tensor> {
        let name = if self.config.tie_word_embeddings { EMBEDDING } else { HEAD };
        self.table(name)?.read(dtype, Some(&self.gain(FINAL_NORM)?))
    }

    /// The linears of layer `l`, read in parallel.
    pub fn layer(&self, l: usize, dtype: DType) -> Result<LayerWeights> {
        Ok(self.read_layer(l, dtype, true)?.0)
    }

    /// The linears of layer `l` as they are, and the gains of its two norms, `[C]` each, that [`Source::layer`] would fold.
    pub fn plain_layer(&self, l: usize, dtype: DType) -> Result<(LayerWeights, [Tensor; 2])> {
        self.read_layer(l, dtype, false)
    }

    fn read_layer(&self, l: usize, dtype: DType, fold: bool) -> Result<(LayerWeights, [Tensor; 2])> {
        let [first, second] = NORMS.map(|norm| self.gain(&format!("model.layers.{l}.{norm}")));
        let gains = [first?, second?];
        let read = |(&(part, norm), shape): (&(&str, Option<usize>), [usize; 2])| {
            let gain = norm.filter(|_| fold).map(|i| &gains[i][..]);
            self.entry(&format!("model.layers.{l}.{part}"), &shape)?.read(dtype, gain)
        };
        let tensors = LINEARS.par_iter().zip(self.config.linear_shapes()).map(read).collect::<Result<Vec<_>>>()?;
        let weights = LayerWeights::from_array(tensors.try_into().expect("seven of them"));
        let [first, second] = gains.map(|g| Tensor::from_vec(g, [self.config.hidden_size])?.to_dtype(dtype));
        Ok((weights, [first?, second?]))
    }
}

/// Names of the tensors outside the layers, without `.weight`.
pub(crate) const EMBEDDING: &str = "model.embed_tokens";
pub(crate) const HEAD: &str = "lm_head";
pub(crate) const FINAL_NORM: &str = "model.norm";
/// The two norms of a layer, whose gains are folded.
pub(crate) const NORMS: [&str; 2] = ["input_layernorm", "post_attention_layernorm"];
/// The linears of a layer, in the order of [`LayerWeights`]' fields: the name in the file, and the norm whose gain it takes.
pub(crate) const LINEARS: [(&str, Option<usize>); 7] = [
    ("self_attn.q_proj", Some(0)),
    ("self_attn.k_proj", Some(0)),
    ("self_attn.v_proj", Some(0)),
    ("self_attn.o_proj", None),
    ("mlp.gate_proj", Some(1)),
    ("mlp.up_proj", Some(1)),
    ("mlp.down_proj", None),
];

impl LlamaConfig {
    /// Shapes of a layer's linears, in the order of [`LayerWeights`]' fields.
    pub(crate) fn linear_shapes(&self) -> [[usize; 2]; 7] {
        let (c, f) = (self.hidden_size, self.intermediate_size);
        let (q, kv) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        [[q, c], [kv, c], [kv, c], [c, q], [f, c], [f, c], [c, f]]
    }
}

impl Weights {
    /// Reads a model directory: gains folded in `f64`, each weight rounded once to `dtype`; a tied head becomes a copy of the
    /// embedding, and only the copy takes the final norm's gain. Tensors that a LLaMA does not need are ignored.
    ///
    /// # Errors
    /// Those of [`Checkpoint`] and [`LlamaConfig::validate`]; a value too large for `dtype`.
    pub fn load(dir: impl AsRef<Path>, config: &LlamaConfig, dtype: DType) -> Result<Self> {
        Self::read(&Source::open(dir, config)?, dtype)
    }

    /// [`Weights::load`] from a model that was opened.
    pub fn read(source: &Source, dtype: DType) -> Result<Self> {
        let layers = (0..source.config.layers).map(|l| source.layer(l, dtype)).collect::<Result<_>>()?;
        Ok(Self { embedding: source.embedding(dtype)?, head: source.head(dtype)?, layers })
    }

    /// Random `f64` weights for tests: normal, variance 1/in, so that every linear keeps the scale of a normalised input
    /// (0.016 for a width of 4096, which is what trained ones have); a head of its own unless the configuration ties it.
    ///
    /// # Errors
    /// Those of [`LlamaConfig::validate`].
    pub fn random(config: &LlamaConfig, seed: u64) -> Result<Self> {
        config.validate()?;
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
        let mut random = |shape: [usize; 2]| {
            let std = (shape[1] as f64).sqrt().recip();
            let values = (0..shape[0] * shape[1]).map(|_| std * crate::ops::normal(&mut rng)).collect();
            Tensor::from_vec::<f64>(values, shape).expect("as many values as the shape asks for")
        };
        let table = [config.vocab_size, config.hidden_size];
        let embedding = random(table);
        let head = if config.tie_word_embeddings { embedding.clone() } else { random(table) };
        let layers = (0..config.layers).map(|_| LayerWeights::from_array(config.linear_shapes().map(&mut random)));
        Ok(Self { layers: layers.collect(), embedding, head })
    }

    /// The element type.
    pub fn dtype(&self) -> DType {
        self.embedding.dtype()
    }
}

impl LayerWeights {
    /// The names of the fields, in their order.
    pub const NAMES: [&str; 7] = ["q", "k", "v", "o", "gate", "up", "down"];

    /// The seven in the order of [`LayerWeights::NAMES`].
    pub fn from_array([q, k, v, o, gate, up, down]: [Tensor; 7]) -> Self {
        Self { q, k, v, o, gate, up, down }
    }

    /// The seven linears in the order of the fields.
    pub fn as_array(&self) -> [&Tensor; 7] {
        [&self.q, &self.k, &self.v, &self.o, &self.gate, &self.up, &self.down]
    }

    /// The same with every linear replaced.
    pub fn map(&self, mut f: impl FnMut(&Tensor) -> Result<Tensor>) -> Result<Self> {
        Ok(Self {
            q: f(&self.q)?,
            k: f(&self.k)?,
            v: f(&self.v)?,
            o: f(&self.o)?,
            gate: f(&self.gate)?,
            up: f(&self.up)?,
            down: f(&self.down)?,
        })
    }
}
