//! A network that reads a text token by token: keys and values of what it read are kept, quantised as the scheme says.

use std::sync::{Arc, Mutex};

use crate::linalg::matmul;
use crate::llama::block::{Attend, Observer, Run};
use crate::llama::model::rope;
use crate::llama::{Frequencies, Merged};
use crate::ops::rope::Rope;
use crate::ops::segment_attention::{Segment, Segments, segment_attention};
use crate::{Error, Result, Tensor};

/// A text that a network is reading, and its KV cache.
///
/// The cache holds what attention reads in the network that is evaluated: keys behind RoPE, R3 and their quantiser, values behind
/// theirs. Codes are kept as the values that they stand for, in the network's type. Where the rotary embedding depends on the length of
/// the text, and another one begins, the text is read again from its start.
pub struct Decoder<'m> {
    model: &'m Merged,
    capacity: usize,
    /// Keys and values of every layer, `[capacity, KV, D]`.
    cache: Arc<Vec<Mutex<[Tensor; 2]>>>,
    /// Of all positions, for texts of the length so far.
    rope: Rope,
    frequencies: Frequencies,
    /// The text so far.
    text: Vec<u32>,
    /// Tokens of it that are in the cache.
    cached: usize,
    observer: Option<Arc<Observer>>,
}

impl<'m> Decoder<'m> {
    /// In front of a text of at most `capacity` tokens.
    ///
    /// # Errors
    /// No capacity, or more than the model's context; no memory for the cache.
    pub fn new(model: &'m Merged, capacity: usize) -> Result<Self> {
        let config = &model.config;
        if capacity == 0 || capacity > config.max_position_embeddings {
            let message = format!("expected 1 to {} tokens, the model's context, got {capacity}", config.max_position_embeddings);
            return Err(Error::argument("capacity", message));
        }
        let (dtype, device) = (model.embedding.dtype(), model.embedding.device());
        let empty = || Tensor::zeros([capacity, config.kv_heads, config.head_dim], dtype, &device);
        let layers = (0..config.layers).map(|_| Ok(Mutex::new([empty()?, empty()?]))).collect::<Result<_>>()?;
        let rope = rope(config, 1, capacity, dtype, &device)?;
        let (frequencies, text) = (config.frequencies(1), vec![]);
        Ok(Self { model, capacity, cache: Arc::new(layers), rope, frequencies, text, cached: 0, observer: None })
    }

    /// The same, and `see` is shown the input of every quantiser: layer, site, values.
    #[must_use]
    pub fn observed(self, see: Arc<Observer>) -> Self {
        Self { observer: Some(see), ..self }
    }

    /// Tokens read so far.
    pub fn read(&self) -> usize {
        self.text.len()
    }

    /// Reads more tokens: the logits `[1, V]` of what follows the last one. After an error the text is what it was before.
    ///
    /// # Errors
    /// No tokens, more than the capacity, or one outside the vocabulary; those of the operations.
    pub fn feed(&mut self, tokens: &[u32]) -> Result<Tensor> {
        let (read, end) = (self.text.len(), self.text.len() + tokens.len());
        if tokens.is_empty() || end > self.capacity {
            let room = self.capacity - read;
            return Err(Error::argument("tokens", format!("expected 1 to {room}, got {} behind {read}", tokens.len())));
        }
        self.follow(end)?;
        let first = self.cached;
        let tokens = &[&self.text[first..], tokens].concat()[..];
        let positions: Vec<u32> = (first..end).map(|p| p as u32).collect();
        let segment = Segment { tokens: tokens.len(), prefix: 0..first, first_key: first };
        let run = Run {
            sites: self.model.scheme.sites(self.model.config.head_dim),
            rope: self.rope.at(positions.into())?,
            seq: tokens.len(),
            observer: self.observer.clone(),
            patch: None,
            attend: Some(self.attend(first, end, Segments::new([segment], &self.model.embedding.device())?)),
        };
        let hidden = self.model.hidden(tokens, &run)?.slice(tokens.len() - 1, 1)?;
        let head = &self.model.head;
        let logits = matmul::product(&hidden, false, head, true, false, head.dtype())?;
        self.text.extend(&tokens[read - first..]);
        self.cached = end;
        Ok(logits)
    }

    /// Goes over to the rotary embedding of texts of this length; what was read under another is read again.
    fn follow(&mut self, length: usize) -> Result<()> {
        let frequencies = self.model.config.frequencies(length);
        if frequencies != self.frequencies {
            let table = &self.model.embedding;
            self.rope = rope(&self.model.config, length, self.capacity, table.dtype(), &table.device())?;
            (self.frequencies, self.cached) = (frequencies, 0);
        }
        Ok(())
    }

    /// Puts a layer's new keys and values behind the old ones, and attends over all.
    fn attend(&self, first: usize, end: usize, segments: Segments) -> Arc<Attend> {
        let cache = self.cache.clone();
        let config = &self.model.config;
        // A window that reaches back to the first key is none.
        let windows: Vec<_> = (0..config.layers).map(|l| config.window(l).filter(|w| *w < end)).collect();
        Arc::new(move |layer, [q, k, v]: [&Tensor; 3]| {
            let window = windows[layer];
            let mut layer = cache[layer].lock().unwrap_or_else(|e| e.into_inner());
            layer[0].put(first, k)?;
            layer[1].put(first, v)?;
            segment_attention(q.clone(), layer[0].clone(), layer[1].clone(), &segments, window)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::fake_quant::code_differences;
    use crate::quant::{Scheme, Site};
    use crate::{DType, demo};

    /// Inputs of a quantiser at one site: of every layer, rows of all tokens.
    type Seen = Arc<Mutex<Vec<Vec<f64>>>>;

    fn watch(layers: usize, which: Site) -> (Seen, Arc<Observer>) {
        let seen: Seen = Arc::new(Mutex::new(vec![vec![]; layers]));
        let note = seen.clone();
        let see = move |layer: usize, site: Site, x: &Tensor| {
            if site == which {
                note.lock().unwrap()[layer].extend(x.to_f64_vec().unwrap());
            }
        };
        (seen, Arc::new(see))
    }

    /// Read at once, in parts and token by token: the same logits, the same codes of keys and values.
    #[test]
    fn a_cache_changes_nothing() {
        let tokens = demo::windows(demo::TEST, 64).unwrap().get(3).to_vec();
        for scheme in [Scheme::FULL_PRECISION, Scheme::new(16, 4, 4)] {
            // In f64 no sum is near enough to a tie to fall elsewhere.
            let merged = demo::model_in(DType::F64).unwrap().merge(None, &scheme).unwrap();
            let layers = merged.config.layers;
            let logits = merged.logits(&tokens, tokens.len()).unwrap();
            for site in [Site::Key, Site::Value] {
                let (whole, see) = watch(layers, site);
                merged
                    .observe(&tokens, tokens.len(), move |l, s, x| {
                        see(l, s, x);
                        Ok(())
                    })
                    .unwrap();
                for part in [64, 17, 1] {
                    let (seen, see) = watch(layers, site);
                    let mut decoder = Decoder::new(&merged, 64).unwrap().observed(see);
                    for (i, part) in tokens.chunks(part).enumerate() {
                        let got = decoder.feed(part).unwrap().to_f64_vec().unwrap();
                        let want = logits.index(decoder.read() - 1).unwrap().to_f64_vec().unwrap();
                        let worst = got.iter().zip(&want).map(|(a, b)| (a - b).abs()).fold(0f64, f64::max);
                        assert!(worst < 1e-9, "{scheme} part {i}: {worst:e}");
                    }
                    let sites = scheme.sites(merged.config.head_dim);
                    for (a, b) in seen.lock().unwrap().iter().zip(&*whole.lock().unwrap()) {
                        let tensor = |v: &Vec<f64>| {
                            Tensor::from_vec(v.clone(), [v.len() / merged.config.head_dim, merged.config.head_dim]).unwrap()
                        };
                        let (a, b) = (tensor(a), tensor(b));
                        let codes =
                            |x: &Tensor| crate::ops::fake_quant::quantize(x, sites.at(site)).unwrap().dequantize().unwrap();
                        if sites.at(site).is_active() {
                            let odd = code_differences(sites.at(site), &b, &codes(&a), &codes(&b)).unwrap();
                            assert!(odd.is_empty(), "{site:?}: {odd:?}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn what_does_not_fit_is_an_error() {
        let merged = demo::model().unwrap().merge(None, &Scheme::FULL_PRECISION).unwrap();
        assert!(Decoder::new(&merged, 0).is_err());
        assert!(Decoder::new(&merged, merged.config.max_position_embeddings + 1).is_err());
        let mut decoder = Decoder::new(&merged, 4).unwrap();
        let first = decoder.feed(&[1, 2]).unwrap().to_f64_vec().unwrap();
        assert!(decoder.feed(&[]).is_err() && decoder.feed(&[1, 2, 3]).is_err());
        assert!(decoder.feed(&[u32::MAX]).is_err());
        // As if nothing had been tried.
        let again = decoder.feed(&[3]).unwrap().to_f64_vec().unwrap();
        let mut other = Decoder::new(&merged, 4).unwrap();
        assert_eq!(other.feed(&[1, 2]).unwrap().to_f64_vec().unwrap(), first);
        assert_eq!(other.feed(&[3]).unwrap().to_f64_vec().unwrap(), again);
    }
}
