//! A small LLaMA that is part of the program, for demonstrations and tests: 0.8M parameters, 4 layers, 406 tokens.
//!
//! `examples/train_demo_model.rs` trained it with this crate's tape on sentences about a small made-up world, from a seed. A model so
//! small grows no outliers. **They were planted**: its embeddings started with a large part in common, and transforms that leave its
//! function as it is ([`outliers`](crate::outliers)) then gathered that in two channels of the residual stream and scaled up a few
//! channels of every MLP, key and value head.
//!
//! ```
//! use spinquant::{demo, quant::Scheme};
//! let model = demo::model()?;
//! let text = demo::windows(demo::TEST, 128)?;
//! let logits = model.merge(None, &Scheme::new(4, 4, 4))?.logits(text.get(0), 128)?;
//! assert_eq!(logits.shape(), [128, model.config.vocab_size]);
//! # Ok::<(), spinquant::Error>(())
//! ```

use std::path::Path;

use crate::data::{Tokenizer, Windows};
use crate::llama::{Checkpoint, Llama, LlamaConfig, Source, Weights};
use crate::{DType, Result};

macro_rules! asset {
    ($include:ident, $name:literal) => {
        $include!(concat!(env!("CARGO_MANIFEST_DIR"), "/assets/demo/", $name))
    };
}

/// Text to learn rotations on.
pub const CALIBRATION: &str = asset!(include_str, "calibration.txt");
/// Text to score on: other stories of the same world.
pub const TEST: &str = asset!(include_str, "test.txt");
/// The longest window the model was trained on, in tokens.
pub const CONTEXT: usize = 256;

/// Sizes of the model.
///
/// # Errors
/// None that a caller could cause.
pub fn config() -> Result<LlamaConfig> {
    LlamaConfig::from_json(asset!(include_bytes, "config.json"), Path::new("demo/config.json"))
}

/// The model in `f32` on the CPU. Its RMSNorm gains are all 1, so that it is the folded and the plain model at once.
///
/// # Errors
/// None that a caller could cause.
pub fn model() -> Result<Llama> {
    model_in(DType::F32)
}

/// The same in another type: in `f64` the order of sums changes no code of a quantiser.
///
/// # Errors
/// None that a caller could cause.
pub(crate) fn model_in(dtype: DType) -> Result<Llama> {
    let config = config()?;
    let checkpoint = Checkpoint::from_static("demo/model.safetensors", asset!(include_bytes, "model.safetensors"))?;
    let weights = Weights::read(&Source::new(checkpoint, &config)?, dtype)?;
    Llama::new(config, weights)
}

/// Its tokenizer: words, single digits and marks.
///
/// # Errors
/// None that a caller could cause.
pub fn tokenizer() -> Result<Tokenizer> {
    Tokenizer::from_bytes(asset!(include_bytes, "tokenizer.json"), Path::new("demo/tokenizer.json"))
}

/// Text, such as [`CALIBRATION`] or [`TEST`], as windows of `seq_len` of the model's tokens.
///
/// # Errors
/// A text shorter than one window, or windows of fewer than two tokens.
pub fn windows(text: &str, seq_len: usize) -> Result<Windows> {
    tokenizer()?.windows(text, config()?.bos_token_id, seq_len)
}
