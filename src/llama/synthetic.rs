//! Models without weights at hand: the shapes of published LLaMAs filled with seeded numbers, made where they are used, so that anyone
//! can study speed, memory and the fall of the loss.
//!
//! Every weight is `unit · row[r] · col[c] · z`, z nearly normal and made by integer arithmetic (the sum of four uniform 16-bit
//! numbers), so that the CPU and a GPU make the same bits. Linears have variance 1/in, o and down 9/(L in), so that the layers
//! together outweigh the embedding in the stream; biases, where the configuration has them, are a tenth of the outputs they are added to. On top of that come outliers of the kinds that trained LLaMAs have (see [`outliers`](crate::outliers), which
//! plants them in any model):
//!
//! - four channels of the residual stream are up to 30 times the others: columns of the embedding and rows of o and down by g, columns
//!   of everything that reads the stream by 1/g. A random model in another basis of its residual stream is this model, so this is
//!   the change of basis that R1 can undo;
//! - four channels of every MLP (rows of up by f, columns of down by 1/f), two rotary pairs of every key head (k by f, q by 1/f; in the
//!   gains where heads have norms) and two channels of every value head (v by f, o by 1/f), which leave the full-precision function
//!   as it is.
//!
//! The head is fitted: row t + 1 is what the full-precision network makes of token t, so that it predicts t + 1 after t, and noise on
//! the way costs it that. In [`text`] nine tokens in ten follow that rule, the tenth is random.

use std::sync::Arc;

use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

use crate::data::Windows;
use crate::device::cuda::Queue;
use crate::device::ffi;
use crate::device::launch::{Check, Kind, View, Work};
use crate::llama::{
    Affine, Block, Family, Linear, Linears, Llama, LlamaConfig, Placement, Placer, RopeScaling, RotatedWeights, Run,
};
use crate::quant::{Engine, Scheme};
use crate::ranks::Group;
use crate::{DType, Device, Error, Result, Tape, Tensor};

/// The names that [`shape`] knows.
pub const NAMES: [&str; 11] = [
    "llama-2-7b",
    "llama-2-13b",
    "llama-2-70b",
    "llama-3-8b",
    "llama-3-70b",
    "llama-3.2-1b",
    "llama-3.2-3b",
    "mistral-7b",
    "qwen2.5-7b",
    "qwen3-8b",
    "tiny",
];

/// The configuration of a published model, or `tiny` for tests; `name:LAYERS` is the same with fewer or more layers.
///
/// # Errors
/// Another name: lists the known ones.
pub fn shape(name: &str) -> Result<LlamaConfig> {
    let (base, layers) = match name.split_once(':') {
        Some((base, n)) => {
            let n = n.parse::<usize>().ok().filter(|n| (1..=1 << 12).contains(n));
            let expected =
                || Error::argument("synthetic model", format!("expected a number of layers after the colon, got {name:?}"));
            (base, Some(n.ok_or_else(expected)?))
        }
        None => (name, None),
    };
    let llama2 = |hidden_size, intermediate_size, layers, heads| LlamaConfig {
        hidden_size,
        intermediate_size,
        layers,
        heads,
        kv_heads: heads,
        head_dim: 128,
        vocab_size: 32_000,
        rms_norm_eps: 1e-5,
        max_position_embeddings: 4096,
        bos_token_id: Some(1),
        eos_token_ids: vec![2],
        ..LlamaConfig::default()
    };
    let llama3 = |hidden_size, intermediate_size, layers, heads, head_dim| LlamaConfig {
        kv_heads: 8,
        head_dim,
        vocab_size: 128_256,
        max_position_embeddings: 8192,
        rope_theta: 5e5,
        bos_token_id: Some(128_000),
        eos_token_ids: vec![128_001],
        ..llama2(hidden_size, intermediate_size, layers, heads)
    };
    let scaling =
        RopeScaling::Llama3 { factor: 32.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_max_position_embeddings: 8192 };
    let small = |config| LlamaConfig {
        tie_word_embeddings: true,
        max_position_embeddings: 131_072,
        rope_scaling: Some(scaling.clone()),
        ..config
    };
    let mut config = match base {
        "llama-2-7b" => llama2(4096, 11_008, 32, 32),
        "llama-2-13b" => llama2(5120, 13_824, 40, 40),
        "llama-2-70b" => LlamaConfig { kv_heads: 8, ..llama2(8192, 28_672, 80, 64) },
        "llama-3-8b" => llama3(4096, 14_336, 32, 32, 128),
        "llama-3-70b" => llama3(8192, 28_672, 80, 64, 128),
        "llama-3.2-1b" => small(llama3(2048, 8192, 16, 32, 64)),
        "llama-3.2-3b" => small(llama3(3072, 8192, 28, 24, 128)),
        "mistral-7b" => LlamaConfig {
            family: Family::Mistral,
            vocab_size: 32_000,
            rope_theta: 1e4,
            sliding_window: Some(4096),
            bos_token_id: Some(1),
            eos_token_ids: vec![2],
            ..llama3(4096, 14_336, 32, 32, 128)
        },
        "qwen2.5-7b" => LlamaConfig {
            family: Family::Qwen2,
            attention_bias: true,
            kv_heads: 4,
            vocab_size: 152_064,
            rope_theta: 1e6,
            bos_token_id: None,
            eos_token_ids: vec![151_643],
            ..llama3(3584, 18_944, 28, 28, 128)
        },
        "qwen3-8b" => LlamaConfig {
            family: Family::Qwen3,
            vocab_size: 151_936,
            rope_theta: 1e6,
            bos_token_id: None,
            eos_token_ids: vec![151_645],
            ..llama3(4096, 12_288, 36, 32, 128)
        },
        "tiny" => LlamaConfig { kv_heads: 2, head_dim: 16, vocab_size: 256, ..llama2(64, 160, 2, 4) },
        _ => {
            let known = NAMES.join(", ");
            return Err(Error::argument("synthetic model", format!("expected one of {known} (or NAME:LAYERS), got {name:?}")));
        }
    };
    config.layers = layers.unwrap_or(config.layers);
    config.validate()?;
    Ok(config)
}

/// `windows` windows of tokens that the synthetic models of this shape predict nine times in ten.
///
/// # Errors
/// Those of [`Windows::new`]; more than 2³¹ tokens.
pub fn text(config: &LlamaConfig, windows: usize, seq_len: usize, seed: u64) -> Result<Windows> {
    const MOST: usize = 1 << 31;
    if windows.checked_mul(seq_len).is_none_or(|tokens| tokens > MOST) {
        let message = format!("expected at most {MOST} tokens, got {windows} windows of {seq_len}");
        return Err(Error::argument("synthetic text", message));
    }
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let vocab = config.vocab_size as u32;
    let mut token = 0;
    let tokens: Vec<u32> = (0..windows.saturating_mul(seq_len))
        .map(|_| {
            token = if rng.random_range(0..10) == 0 { rng.random_range(0..vocab) } else { (token + 1) % vocab };
            token
        })
        .collect();
    Windows::new(tokens, seq_len)
}

/// A synthetic model of this shape.
///
/// # Errors
/// Those of [`LlamaConfig::validate`]; f64 on a GPU; out of memory.
pub fn model(config: &LlamaConfig, seed: u64, dtype: DType, device: &Device) -> Result<Llama> {
    placed(config, seed, dtype, device, Placement::RESIDENT)
}

/// The same with some layers in main memory ([`Llama::streamed`]). Each is made on the device and goes straight to its place, so that the
/// device needs room for one of them.
///
/// # Errors
/// Those of [`model`] and [`Llama::streamed`].
pub fn placed(config: &LlamaConfig, seed: u64, dtype: DType, device: &Device, placement: Placement) -> Result<Llama> {
    placed_among(Group::nobody(), config, seed, dtype, (device, placement))
}

/// The same at every rank, as by [`Llama::read_among`].
///
/// # Errors
/// Those of [`placed`] and [`Llama::read_among`].
pub fn placed_among(
    ranks: &Group,
    config: &LlamaConfig,
    seed: u64,
    dtype: DType,
    (device, placement): (&Device, Placement),
) -> Result<Llama> {
    let maker = Maker::new(config, seed, dtype, device)?;
    let config = maker.config();
    let embedding = maker.embedding()?;
    let placer = Placer::among(ranks, device, placement, config.layers)?;
    let mut vocabulary = Vocabulary::new(config, &embedding)?;
    let place = |l| {
        let block = maker.block(l)?;
        vocabulary.pass(&block)?;
        placer.place(l, &block).map(Arc::new)
    };
    let blocks = (0..config.layers).map(place).collect::<Result<_>>()?;
    let head = vocabulary.head(&maker.stream)?;
    Ok(Llama { config: config.clone(), embedding, head, blocks, engine: Engine::default() })
}

/// The parts of a synthetic model, each made when asked for and the same every time.
#[derive(Clone, Debug)]
pub(crate) struct Maker {
    config: LlamaConfig,
    seed: u64,
    dtype: DType,
    device: Device,
    /// Factors of the channels of the residual stream.
    stream: Vec<f32>,
    readers: Vec<f32>,
}

impl Maker {
    /// Of a model of this shape.
    ///
    /// # Errors
    /// Those of [`LlamaConfig::validate`].
    pub fn new(config: &LlamaConfig, seed: u64, dtype: DType, device: &Device) -> Result<Self> {
        config.validate()?;
        let stream = outliers(config.hidden_size, 4, 30.0, seed, 0);
        let readers = inverse(&stream);
        Ok(Self { config: config.folded(), seed, dtype, device: device.clone(), stream, readers })
    }

    /// Sizes.
    pub fn config(&self) -> &LlamaConfig {
        &self.config
    }

    /// The same, made on another device: the same bits, but for the head.
    pub fn on(&self, device: &Device) -> Self {
        Self { device: device.clone(), ..self.clone() }
    }

    /// Weight number `tensor`.
    fn make(&self, shape: [usize; 2], tensor: u64, std: f64, row: Option<&[f32]>, col: Option<&[f32]>) -> Result<Tensor> {
        random(shape, (self.seed, tensor), std, row, col, self.dtype, &self.device)
    }

    /// `[V, C]`.
    ///
    /// # Errors
    /// f64 on a GPU; out of memory.
    pub fn embedding(&self) -> Result<Tensor> {
        self.make([self.config.vocab_size, self.config.hidden_size], 0, 1.0, None, Some(&self.stream))
    }

    /// `[V, C]`: every token of the vocabulary goes through every layer, one of which is there at a time.
    ///
    /// # Errors
    /// Those of [`Maker::block`] and of running it.
    pub fn head(&self) -> Result<Tensor> {
        let mut vocabulary = Vocabulary::new(&self.config, &self.embedding()?)?;
        (0..self.config.layers).try_for_each(|l| vocabulary.pass(&self.block(l)?))?;
        vocabulary.head(&self.stream)
    }

    /// Layer `l`.
    ///
    /// # Errors
    /// f64 on a GPU; out of memory.
    pub fn block(&self, l: usize) -> Result<Block> {
        let Self { config, seed, stream, readers, .. } = self;
        let (seed, f, d) = (*seed, config.intermediate_size, config.head_dim);
        let std = |inputs: usize| 1.0 / (inputs as f64).sqrt();
        let out = |inputs: usize| 3.0 / ((config.layers * inputs) as f64).sqrt();
        let per = |index: u64| 1 + 4 * l as u64 + index;
        let inner = outliers(f, 4, 32.0, seed, per(0));
        let pairs = (0..config.kv_heads as u64).flat_map(|h| {
            let half = outliers(config.rotary_dim() / 2, 2, 8.0, seed ^ (h << 32), per(1));
            [half.clone(), half, vec![1.0; d - config.rotary_dim()]].concat()
        });
        let keys: Vec<f32> = pairs.collect();
        let values: Vec<f32> = (0..config.kv_heads as u64).flat_map(|h| outliers(d, 2, 8.0, seed ^ (h << 32), per(2))).collect();
        // A query head undoes what its key head does, and o what its value head does.
        let spread = |v: &[f32]| -> Vec<f32> { inverse(v).chunks(d).flat_map(|h| h.repeat(config.group())).collect() };
        let (queries, outputs, after) = (spread(&keys), spread(&values), inverse(&inner));
        let weights = Linears::try_from_fn(|linear| {
            let [rows, inputs] = linear.shape(config);
            // A norm of heads undoes what comes before it: there its gain, which all heads share, has the outliers.
            let normed = linear.has_norm(config);
            let (std, row, col) = match linear {
                Linear::Q | Linear::K if normed => (std(inputs), None, readers),
                Linear::Q => (std(inputs), Some(&queries), readers),
                Linear::K => (std(inputs), Some(&keys), readers),
                Linear::V => (std(inputs), Some(&values), readers),
                Linear::O => (out(inputs), Some(stream), &outputs),
                Linear::Gate => (std(inputs), None, readers),
                Linear::Up => (std(inputs), Some(&inner), readers),
                Linear::Down => (out(inputs), Some(stream), &after),
            };
            let (tensor, row) = (1 + 7 * l as u64 + linear as u64, row.map(|v| &v[..]));
            let weight = self.make([rows, inputs], tensor, std, row, Some(col))?;
            let size = BIAS * std * (inputs as f64).sqrt();
            let bias = || self.make([rows, 1], BIASES + tensor, size, row, None)?.reshape([rows]);
            let gain = || {
                let of_heads = if linear == Linear::Q { &queries } else { &keys };
                Tensor::from_vec(of_heads[..d].to_vec(), [d])?.to_dtype(self.dtype)?.to_device(&self.device)
            };
            Ok(Affine { weight, bias: linear.has_bias(config).then(bias).transpose()?, norm: normed.then(gain).transpose()? })
        })?;
        Ok(Block::new(config, l, weights))
    }
}

/// Standard deviation of biases, beside the outputs that they are added to.
const BIAS: f64 = 0.1;
/// Added to a weight's number for the random numbers of its bias.
const BIASES: u64 = 1 << 32;

/// Tokens whose rows of the head are made at once.
const TOKENS_AT_ONCE: usize = 2048;

/// Every token of the vocabulary on its way through the full-precision network, in parts, all of them through a layer before the next.
struct Vocabulary<'a> {
    config: &'a LlamaConfig,
    parts: Vec<(Tensor, Run)>,
}

impl<'a> Vocabulary<'a> {
    fn new(config: &'a LlamaConfig, embedding: &Tensor) -> Result<Self> {
        let vocab = config.vocab_size;
        let part = |first| {
            let tokens = TOKENS_AT_ONCE.min(vocab - first);
            let scheme = Scheme::FULL_PRECISION.unrotated();
            let run = Run::new(config, &scheme, tokens, embedding.dtype(), &embedding.device())?;
            Ok((embedding.slice(first, tokens)?, run))
        };
        Ok(Self { config, parts: (0..vocab).step_by(TOKENS_AT_ONCE).map(part).collect::<Result<_>>()? })
    }

    fn pass(&mut self, block: &Block) -> Result<()> {
        for (x, run) in &mut self.parts {
            let tape = Tape::new();
            let y = block.forward(tape.constant(x.clone()), RotatedWeights::constants(&tape, &block.weights), run)?;
            *x = y.into_value();
        }
        Ok(())
    }

    /// Row t + 1: the final hidden state of token t, read by a channel as far as the channel is no outlier, and of a size that gives the
    /// token that follows a logit of ln V.
    fn head(self, stream: &[f32]) -> Result<Tensor> {
        let (c, vocab, eps) = (self.config.hidden_size, self.config.vocab_size, self.config.rms_norm_eps);
        let energy = stream.iter().map(|g| f64::from(g * g)).sum::<f64>() / c as f64;
        let size = (vocab as f64).ln() * energy / c as f64;
        let gain: Vec<f64> = stream.iter().map(|g| size / f64::from(g * g)).collect();
        let normed = |(x, _): &(Tensor, Run)| {
            let gain = Tensor::from_vec(gain.clone(), [c])?.to_dtype(x.dtype())?.to_device(&x.device())?;
            Ok(Tape::new().constant(x.clone()).rms_norm_gain(eps, Some(&gain))?.into_value())
        };
        let rows = Tensor::concat(&self.parts.iter().map(normed).collect::<Result<Vec<_>>>()?)?;
        Tensor::concat(&[rows.slice(vocab - 1, 1)?, rows.slice(0, vocab - 1)?])
    }
}

/// `n` factors, 1 but for `count` of them, log-uniform between √most and `most`, at random places.
fn outliers(n: usize, count: usize, most: f64, seed: u64, stream: u64) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(stream);
    let mut factors: Vec<f32> =
        (0..n).map(|i| if i < count { most.powf(0.5 + 0.5 * rng.random::<f64>()) as f32 } else { 1.0 }).collect();
    factors.shuffle(&mut rng);
    factors
}

fn inverse(factors: &[f32]) -> Vec<f32> {
    factors.iter().map(|f| 1.0 / f).collect()
}

/// Standard deviation of the centred sum of four uniform 16-bit integers: √(4 (2^32 − 1) / 12).
const SUM_STD: f64 = 37_837.227;

/// A weight of standard deviation `std`, times its row's and column's factors.
fn random(
    shape: [usize; 2],
    (seed, tensor): (u64, u64),
    std: f64,
    row: Option<&[f32]>,
    col: Option<&[f32]>,
    dtype: DType,
    device: &Device,
) -> Result<Tensor> {
    let unit = (std / SUM_STD) as f32;
    if let Device::Cuda(device) = device {
        let upload = |v: Option<&[f32]>| v.map(|v| device.upload(bytemuck::cast_slice(v), Kind::F32)).transpose();
        let (row, col, y) = (upload(row)?, upload(col)?, Tensor::on(device, &shape, dtype)?);
        let factors = [row.as_ref().map(|v| v.view()), col.as_ref().map(|v| v.view())];
        launch(device.queue(), y.view()?, shape, (seed, tensor), unit, factors)?;
        return Ok(y);
    }
    let [rows, cols] = shape;
    let key = mix(mix(seed.wrapping_add(1)).wrapping_add(tensor).wrapping_add(1));
    let mut values = vec![0f32; rows * cols];
    values.par_chunks_mut(cols.max(1)).enumerate().for_each(|(r, values)| {
        for (c, x) in values.iter_mut().enumerate() {
            let z = mix(key.wrapping_add(0x9e37_79b9_7f4a_7c15u64.wrapping_mul((r * cols + c + 1) as u64)));
            let sum: i32 = (0..4).map(|i| (z >> (16 * i) & 0xffff) as i32).sum();
            *x = (sum - 131_070) as f32 * unit * row.map_or(1.0, |f| f[r]) * col.map_or(1.0, |f| f[c]);
        }
    });
    Tensor::from_vec(values, shape)?.to_dtype(dtype)?.to_device(device)
}

/// The same on a GPU: y `[rows, cols]`, and the factors (`f32`) of rows and columns, 1 for none.
fn launch(
    queue: Queue<'_>,
    y: View<'_>,
    [rows, cols]: [usize; 2],
    (seed, tensor): (u64, u64),
    unit: f32,
    [row, col]: [Option<View<'_>>; 2],
) -> Result<()> {
    let c = Check::new("random weights", queue);
    let kind = y.kind();
    let y = c.operand("y", y, kind, c.product(&[rows, cols])?)?;
    let row = c.optional("factors of rows", row, Kind::F32, rows)?;
    let col = c.optional("factors of columns", col, Kind::F32, cols)?;
    let (rows, cols, dtype) = (c.long(rows)?, c.long(cols)?, c.code(kind)?);
    // SAFETY: y has rows · cols values; the factors are null or as many as rows and columns.
    c.launch(Work::of("random weights"), |s| unsafe {
        ffi!(sq_random_weights(y, rows, cols, seed, tensor, unit, row, col, dtype, s))
    })
}

/// The finaliser of SplitMix64 (Steele, Lea & Flood 2014).
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
