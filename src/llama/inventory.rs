//! What a model's files hold against what its configuration asks for.

use std::collections::BTreeSet;

use super::Linear;
use super::load::{EMBEDDING, FINAL_NORM, HEAD, NORMS, Source};
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
        let mut needed = vec![];
        let mut weight = |name: &str, shape: Vec<usize>| needed.push((format!("{name}.weight"), shape));
        weight(EMBEDDING, table.clone());
        weight(FINAL_NORM, vec![c.hidden_size]);
        if !c.tie_word_embeddings {
            weight(HEAD, table);
        }
        for l in 0..c.layers {
            NORMS.iter().for_each(|norm| weight(&format!("model.layers.{l}.{norm}"), vec![c.hidden_size]));
            for (file, members) in Linear::files(c).filter(|_| self.packed.is_none()) {
                weight(&format!("model.layers.{l}.{file}"), vec![members[0].rows(c).of, members[0].shape(c)[1]]);
            }
            let norms = Linear::ALL.into_iter().filter(|linear| linear.has_norm(c)).filter_map(|linear| linear.norm_path(l));
            norms.for_each(|norm| weight(&norm, vec![c.head_dim]));
        }
        needed.extend(self.packed.iter().flat_map(|packing| packing.scales(c)));
        let biased = Linear::ALL.into_iter().filter(|linear| linear.has_bias(c));
        needed.extend(biased.flat_map(|b| (0..c.layers).map(move |l| (format!("{}.bias", b.path(l)), vec![b.shape(c)[0]]))));
        needed
    }

    /// Fails where a tensor that will be read is not there, before any is.
    pub(super) fn check(&self) -> Result<()> {
        self.needed().iter().try_for_each(|(name, shape)| self.checkpoint.entry(name, shape).map(drop))?;
        let integers = self.packed.iter().flat_map(|packing| packing.integers(&self.config));
        integers.into_iter().try_for_each(|(name, dtype, shape)| self.checkpoint.integers(&name, dtype, &shape).map(drop))
    }

    /// The tensors that are in the files and are not read, sorted: biases that `config.json` does not mention, layers beyond
    /// `num_hidden_layers`, other networks. A tied head that equals the embedding, and the rotary frequencies that early files
    /// hold, do not count.
    pub fn unread(&self) -> Vec<String> {
        let mut known = self.needed();
        known.push((format!("{HEAD}.weight"), vec![]));
        known.extend(self.packed.iter().flat_map(|packing| packing.integers(&self.config)).map(|(name, _, shape)| (name, shape)));
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
