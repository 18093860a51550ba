//! Weights of a model from safetensors files, with the RMSNorm gains and a family's scalars folded away.

use std::path::Path;

use rand::SeedableRng;
use rayon::prelude::*;

use super::checkpoint::{Checkpoint, Entry};
use super::compressed::{self, Packing};
use super::{Affine, LayerWeights, Linear, Linears, LlamaConfig, Multipliers};
use crate::{DType, Result, Tensor};

/// A model's linear layers, every RMSNorm gain of the residual stream folded in (so every such norm's gain is 1), a family's
/// [`Multipliers`] too, and embeddings untied.
#[derive(Clone, Debug)]
pub struct Weights {
    /// `[V, C]`.
    pub embedding: Tensor,
    /// The output layer with the final norm's gain, `[V, C]`.
    pub head: Tensor,
    /// One entry a decoder layer.
    pub layers: Vec<LayerWeights>,
}

/// A model directory whose weights are read a part at a time, folded as [`Weights::load`] says.
#[derive(Debug)]
pub struct Source {
    pub(super) checkpoint: Checkpoint,
    pub(super) config: LlamaConfig,
    /// The scalars that are folded.
    multipliers: Multipliers,
    /// The configuration ties the head to the embedding, and yet the files hold another.
    pub(super) own_head: bool,
    /// The linears' weights are packed integers.
    pub(super) packed: Option<Packing>,
}

impl Source {
    /// Opens a model directory.
    ///
    /// # Errors
    /// Those of [`Checkpoint::open`] and [`Source::new`].
    pub fn open(dir: impl AsRef<Path>, config: &LlamaConfig) -> Result<Self> {
        Self::new(Checkpoint::open(dir)?, config)
    }

    /// Opens a model directory with the configuration in it.
    ///
    /// # Errors
    /// Those of [`LlamaConfig::from_dir`] and [`Source::open`].
    pub fn from_dir(dir: impl AsRef<Path>) -> Result<Self> {
        Self::open(&dir, &LlamaConfig::from_dir(&dir)?)
    }

    /// The weights in a checkpoint. A head that is there although the configuration ties it is used where it differs from the
    /// embedding ([`Source::notes`] says so, [`Source::config`] ties nothing then).
    ///
    /// # Errors
    /// Those of [`LlamaConfig::validate`]; a tensor that is missing, of another shape, or not floating-point.
    pub fn new(checkpoint: Checkpoint, config: &LlamaConfig) -> Result<Self> {
        Self::of(checkpoint, config, None)
    }

    /// [`Source::new`] of a checkpoint whose linears are packed as told.
    pub(super) fn of(checkpoint: Checkpoint, config: &LlamaConfig, packed: Option<Packing>) -> Result<Self> {
        config.validate()?;
        let mut source = Self { checkpoint, config: config.folded(), multipliers: config.multipliers, own_head: false, packed };
        source.untie()?;
        source.check()?;
        Ok(source)
    }

    /// Sizes, of the weights as they are read: a tied head is untied where the files hold another, and multipliers are folded.
    pub fn config(&self) -> &LlamaConfig {
        &self.config
    }

    pub(super) fn entry(&self, name: &str, shape: &[usize]) -> Result<Entry<'_>> {
        self.checkpoint.entry(&format!("{name}.weight"), shape)
    }

    fn gain(&self, name: &str) -> Result<Vec<f64>> {
        self.entry(name, &[self.config.hidden_size])?.read(DType::F64, None)?.into_vec()
    }

    pub(super) fn table(&self, name: &str) -> Result<Entry<'_>> {
        self.entry(name, &[self.config.vocab_size, self.config.hidden_size])
    }

    /// The element type the embedding is stored in.
    ///
    /// # Errors
    /// Those of [`Checkpoint::tensor`](super::Checkpoint::tensor).
    pub fn dtype(&self) -> Result<DType> {
        Ok(self.table(EMBEDDING)?.dtype)
    }

    /// SHA-256 of every tensor's name, type, shape and bytes: what the model is.
    pub fn sha256(&self) -> String {
        self.checkpoint.sha256()
    }

    /// The embedding with its multiplier, `[V, C]`.
    ///
    /// # Errors
    /// Those of [`Checkpoint::tensor`](super::Checkpoint::tensor).
    pub fn embedding(&self, dtype: DType) -> Result<Tensor> {
        self.table(EMBEDDING)?.read(dtype, times(None, self.multipliers.embedding, self.config.hidden_size).as_deref())
    }

    /// The output layer with the final norm's gain and the scaling of logits, `[V, C]`.
    ///
    /// # Errors
    /// Those of [`Checkpoint::tensor`](super::Checkpoint::tensor).
    pub fn head(&self, dtype: DType) -> Result<Tensor> {
        let name = if self.config.tie_word_embeddings { EMBEDDING } else { HEAD };
        let gain = self.gain(FINAL_NORM)?;
        let gain = times(Some(&gain), self.multipliers.logits.recip(), gain.len());
        self.table(name)?.read(dtype, gain.as_deref())
    }

    /// What a linear's weight and bias are multiplied by: scores by way of the queries, a branch by way of what ends it.
    fn multiplier(&self, linear: Linear) -> f64 {
        match linear {
            Linear::Q => self.multipliers.attention.map_or(1.0, |m| m * (self.config.head_dim as f64).sqrt()),
            Linear::O | Linear::Down => self.multipliers.residual,
            _ => 1.0,
        }
    }

    /// The linears of layer `l`, read in parallel.
    ///
    /// # Errors
    /// Those of [`Checkpoint::tensor`](super::Checkpoint::tensor).
    pub fn layer(&self, l: usize, dtype: DType) -> Result<LayerWeights> {
        Ok(self.read_layer(l, dtype, true)?.0)
    }

    /// The linears of layer `l` as they are, and the gains of its two norms, `[C]` each, that [`Source::layer`] would fold.
    ///
    /// # Errors
    /// Those of [`Checkpoint::tensor`](super::Checkpoint::tensor).
    pub fn plain_layer(&self, l: usize, dtype: DType) -> Result<(LayerWeights, [Tensor; 2])> {
        self.read_layer(l, dtype, false)
    }

    fn read_layer(&self, l: usize, dtype: DType, fold: bool) -> Result<(LayerWeights, [Tensor; 2])> {
        let [first, second] = NORMS.map(|norm| self.gain(&format!("model.layers.{l}.{norm}")));
        let gains = [first?, second?];
        let bias = |name: &str, out: usize, factor: f64| {
            self.checkpoint.entry(&format!("{name}.bias"), &[out])?.read(dtype, times(None, factor, out).as_deref())
        };
        let read = |linear: Linear| {
            let (row, [out, inputs], rows) = (linear.row(), linear.shape(&self.config), linear.rows(&self.config));
            let (name, factor) = (format!("model.layers.{l}.{}", rows.file), self.multiplier(linear));
            let gain = times(row.norm.filter(|_| fold).map(|i| &gains[i][..]), factor, inputs);
            let weight = match &self.packed {
                Some(packing) => {
                    let whole = compressed::read(&self.checkpoint, &name, [rows.of, inputs], packing, dtype, gain.as_deref())?;
                    if rows.count == rows.of { whole } else { Tensor::concat(&[whole.slice(rows.first, rows.count)?])? }
                }
                None => self.entry(&name, &[rows.of, inputs])?.rows(rows.first, rows.count).read(dtype, gain.as_deref())?,
            };
            let bias = linear.has_bias(&self.config).then(|| bias(&name, out, factor)).transpose()?;
            let norm = linear.norm_path(l).filter(|_| linear.has_norm(&self.config));
            let norm = norm.map(|name| self.entry(&name, &[self.config.head_dim])?.read(dtype, None)).transpose()?;
            Ok(Affine { weight, bias, norm })
        };
        let weights = Linears::from_vec(Linear::ALL.into_par_iter().map(read).collect::<Result<_>>()?)?;
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

/// Standard deviation of random biases, beside outputs of about 1.
const BIAS: f64 = 0.5;
/// Standard deviation of the gains of random norms, around 1.
const GAIN: f64 = 0.3;

/// A gain of `n` columns times a factor; none where nothing changes.
fn times(gain: Option<&[f64]>, factor: f64, n: usize) -> Option<Vec<f64>> {
    match gain {
        Some(gain) => Some(gain.iter().map(|g| g * factor).collect()),
        None => (factor != 1.0).then(|| vec![factor; n]),
    }
}

impl Weights {
    /// Reads a model directory: gains folded in `f64`, each weight rounded once to `dtype`; a tied head becomes a copy of the
    /// embedding, and only the copy takes the final norm's gain. Tensors that the model does not need are not read ([`Source::unread`]).
    ///
    /// # Errors
    /// Those of [`Checkpoint`] and [`LlamaConfig::validate`]; a value too large for `dtype`.
    pub fn load(dir: impl AsRef<Path>, config: &LlamaConfig, dtype: DType) -> Result<Self> {
        Self::read(&Source::open(dir, config)?, dtype)
    }

    /// [`Weights::load`] from a model that was opened.
    ///
    /// # Errors
    /// Those of reading a tensor.
    pub fn read(source: &Source, dtype: DType) -> Result<Self> {
        let layers = (0..source.config.layers).map(|l| source.layer(l, dtype)).collect::<Result<_>>()?;
        Ok(Self { embedding: source.embedding(dtype)?, head: source.head(dtype)?, layers })
    }

    /// Random `f64` weights for tests: normal, variance 1/in, so that every linear keeps the scale of a normalised input
    /// (0.016 for a width of 4096, which is what trained ones have); biases, where the configuration has them, of half that scale; gains
    /// of the norms of heads around 1; a head of its own unless the configuration ties it.
    ///
    /// # Errors
    /// Those of [`LlamaConfig::validate`].
    pub fn random(config: &LlamaConfig, seed: u64) -> Result<Self> {
        config.validate()?;
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
        let mut normal = |shape: &[usize], std: f64| {
            let values = (0..shape.iter().product()).map(|_| std * crate::random::normal(&mut rng)).collect();
            Tensor::from_vec::<f64>(values, shape)
        };
        let std = |inputs: usize| (inputs as f64).sqrt().recip();
        let table = [config.vocab_size, config.hidden_size];
        let embedding = normal(&table, std(table[1]))?;
        let head = if config.tie_word_embeddings { embedding.clone() } else { normal(&table, std(table[1]))? };
        let mut linear = |linear: Linear| {
            let shape = linear.shape(config);
            let weight = normal(&shape, std(shape[1]))?;
            let bias = linear.has_bias(config).then(|| normal(&shape[..1], BIAS)).transpose()?;
            let gain = linear.has_norm(config).then(|| normal(&[config.head_dim], GAIN)).transpose()?;
            let around_1 = |t: Tensor| {
                let values: Vec<f64> = t.to_f64_vec()?.into_iter().map(|x| 1.0 + x).collect();
                Tensor::from_vec(values, t.shape())
            };
            Ok(Affine { weight, bias, norm: gain.map(around_1).transpose()? })
        };
        let layers = (0..config.layers).map(|_| Linears::try_from_fn(&mut linear)).collect::<Result<_>>()?;
        Ok(Self { layers, embedding, head })
    }

    /// The element type.
    pub fn dtype(&self) -> DType {
        self.embedding.dtype()
    }
}
