//! What a model's files hold against what its configuration asks for.

use std::collections::BTreeSet;

use super::load::{EMBEDDING, FINAL_NORM, HEAD, LINEARS, NORMS, Source};
use crate::Result;

/// Names that a note lists before it only counts.
const LISTED: usize = 4;
/// Saved by early versions of transformers, and made from the configuration ever since.
const NOT_MISSED: &str = "rotary_emb.inv_freq";

impl Source {
    /// Compares a head that the configuration ties with the embedding, where the files hold both.
    pub(super) fn untie(&mut self) -> Result<()> {
        if self.config.tie_word_embeddings && self.checkpoint.resolve(&format!("{HEAD}.weight")).is_some() {
            self.own_head = !self.table(HEAD)?.equals(&self.table(EMBEDDING)?);
            self.config.tie_word_embeddings = !self.own_head;
        }
        Ok(())
    }

    /// Every tensor that is read, with its shape.
    fn needed(&self) -> Vec<(String, Vec<usize>)> {
        let c = &self.config;
        let table = vec![c.vocab_size, c.hidden_size];
        let mut needed = vec![(EMBEDDING.to_string(), table.clone()), (FINAL_NORM.to_string(), vec![c.hidden_size])];
        if !c.tie_word_embeddings {
            needed.push((HEAD.to_string(), table));
        }
        for l in 0..c.layers {
            needed.extend(NORMS.iter().map(|norm| (format!("model.layers.{l}.{norm}"), vec![c.hidden_size])));
            let linears = LINEARS.iter().zip(c.linear_shapes());
            needed.extend(linears.map(|((name, _), shape)| (format!("model.layers.{l}.{name}"), shape.to_vec())));
        }
        needed.into_iter().map(|(name, shape)| (format!("{name}.weight"), shape)).collect()
    }

    /// Fails where a tensor that will be read is not there, before any is.
    pub(super) fn check(&self) -> Result<()> {
        self.needed().iter().try_for_each(|(name, shape)| self.checkpoint.entry(name, shape).map(drop))
    }

    /// The tensors that are in the files and are not read, sorted: biases that `config.json` does not mention, layers beyond
    /// `num_hidden_layers`, other networks. A tied head that equals the embedding, and the rotary frequencies that early files
    /// hold, do not count.
    pub fn unread(&self) -> Vec<String> {
        let mut known = self.needed();
        known.push((format!("{HEAD}.weight"), vec![]));
        let known: BTreeSet<&str> = known.iter().filter_map(|(name, _)| self.checkpoint.resolve(name)).collect();
        let unread = self.checkpoint.names().filter(|name| !known.contains(name) && !name.ends_with(NOT_MISSED));
        unread.map(str::to_string).collect()
    }

    /// What a user should know of these files, a line each: a head of its own where the configuration ties it, and tensors that
    /// are not read.
    pub fn notes(&self) -> Vec<String> {
        let dir = self.checkpoint.dir().display();
        let mut notes = vec![];
        if self.own_head {
            notes.push(format!(
                "{dir}: tie_word_embeddings is true, but {HEAD}.weight differs from {EMBEDDING}.weight: the head is used, and not tied"
            ));
        }
        let unread = self.unread();
        if !unread.is_empty() {
            let (what, more) =
                if unread.len() == 1 { ("tensor is", 0) } else { ("tensors are", unread.len().saturating_sub(LISTED)) };
            let mut names = unread[..unread.len().min(LISTED)].join(", ");
            if more > 0 {
                names += &format!(" and {more} more");
            }
            notes.push(format!(
                "{dir}: {} {what} in the files and not read, because config.json does not ask for them: {names}",
                unread.len()
            ));
        }
        notes
    }
}
