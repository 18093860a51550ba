//! What can be said of a network by its sizes, before its weights are read.

use crate::llama::LlamaConfig;
use crate::quant::Scheme;
use crate::{Error, Result};

impl LlamaConfig {
    /// Checks that a scheme's groups and blocks divide the rows of every linear, and the blocks of its R4 those of down.
    ///
    /// # Errors
    /// [`Error::Argument`] with the group or block and the first row that it does not divide; a clip ratio outside (0, 1].
    pub fn check_scheme(&self, scheme: &Scheme) -> Result<()> {
        scheme.online.r4.map(self.intermediate_size)?;
        let sites = scheme.sites(self.head_dim);
        let (hidden, attention, mlp) = (self.hidden_size, self.heads * self.head_dim, self.intermediate_size);
        let inputs = [
            (sites.attention_input, hidden),
            (sites.attention_output, attention),
            (sites.mlp_input, hidden),
            (sites.down_input, mlp),
        ];
        let weights = [hidden, attention, mlp].map(|cols| (sites.weight, cols));
        let mut active = weights.into_iter().chain(inputs).filter(|(spec, _)| spec.is_active());
        active.try_for_each(|(spec, cols)| spec.group_size(cols).map(drop))
    }

    /// Checks a length of sequences, in tokens.
    ///
    /// # Errors
    /// [`Error::Argument`] for fewer than two, which leave nothing to predict, and for more than positions can be counted.
    pub fn check_length(&self, seq_len: usize) -> Result<()> {
        if (2..=i32::MAX as usize).contains(&seq_len) {
            return Ok(());
        }
        Err(Error::argument("window length", format!("expected at least 2 tokens and at most {}, got {seq_len}", i32::MAX)))
    }

    /// A warning for sequences longer than the model was made for.
    pub fn length_warning(&self, seq_len: usize) -> Option<String> {
        let most = self.max_position_embeddings;
        (seq_len > most).then(|| {
            format!("windows of {seq_len} tokens are longer than the model's {most} positions (max_position_embeddings)")
        })
    }
}
