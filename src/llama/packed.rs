//! Sequences of any lengths behind one another, without padding; what several begin with is there once.

use std::sync::Arc;

use crate::llama::Merged;
use crate::llama::block::Run;
use crate::llama::model::rope;
use crate::ops::segment_attention::{Segment, Segments, segment_attention};
use crate::{Error, Result};

/// Tokens of several sequences for one pass through a network: [`Merged::packed_losses`].
#[derive(Clone, Debug, Default)]
pub struct Packed {
    tokens: Vec<u32>,
    /// Of every token in its sequence.
    positions: Vec<u32>,
    segments: Vec<Segment>,
}

impl Packed {
    /// Adds a sequence, and says where its first token is. Nothing is added for no tokens.
    pub fn push(&mut self, tokens: &[u32]) -> usize {
        self.add(tokens, 0, 0..0)
    }

    /// Adds what follows the first `shared` tokens of the sequence that [`Packed::push`] put at `sequence`.
    ///
    /// # Errors
    /// No such sequence, or one that is shorter.
    pub fn push_behind(&mut self, sequence: usize, shared: usize, tokens: &[u32]) -> Result<usize> {
        // Segments lie behind one another, so their first keys ascend.
        let at = self.segments.binary_search_by_key(&sequence, |s| s.first_key);
        match at.ok().map(|i| &self.segments[i]) {
            Some(whole) if whole.prefix.is_empty() && shared <= whole.tokens => {
                Ok(self.add(tokens, shared, sequence..sequence + shared))
            }
            _ => {
                Err(Error::argument("packed sequences", format!("expected {shared} tokens at {sequence}, got no such sequence")))
            }
        }
    }

    fn add(&mut self, tokens: &[u32], first_position: usize, prefix: std::ops::Range<usize>) -> usize {
        let first_key = self.tokens.len();
        if !tokens.is_empty() {
            self.tokens.extend(tokens);
            self.positions.extend((first_position..).take(tokens.len()).map(|p| p as u32));
            self.segments.push(Segment { tokens: tokens.len(), prefix, first_key });
        }
        first_key
    }

    /// All tokens, in the order of the rows of the result.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// What a network needs to read them.
    pub(super) fn run(&self, model: &Merged) -> Result<Run> {
        let (dtype, device) = (model.embedding.dtype(), model.embedding.device());
        let segments = Segments::new(self.segments.clone(), &device)?;
        let lengths = self.segments.iter().map(|s| s.prefix.len() + s.tokens);
        let (shortest, longest) = (lengths.clone().min().unwrap_or(0), lengths.max().unwrap_or(0));
        if model.config.frequencies(shortest) != model.config.frequencies(longest) {
            let message = format!(
                "expected lengths with one rotary embedding, got {shortest} to {longest} tokens, and the model's depends on the length"
            );
            return Err(Error::argument("packed sequences", message));
        }
        let rope = rope(&model.config, longest, longest, dtype, &device)?.at(self.positions.as_slice().into())?;
        let sites = model.scheme.sites(model.config.head_dim);
        let windows: Vec<_> = (0..model.config.layers).map(|l| model.config.window(l).filter(|w| *w < longest)).collect();
        let attend = move |layer: usize, [q, k, v]: [&crate::Tensor; 3]| {
            segment_attention(q.clone(), k.clone(), v.clone(), &segments, windows[layer])
        };
        Ok(Run { sites, rope, seq: self.tokens.len(), observer: None, patch: None, attend: Some(Arc::new(attend)) })
    }
}
