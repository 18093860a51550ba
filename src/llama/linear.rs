//! A decoder layer as a table of seven linears, `y = x Wᵀ + b`; behind q and k some families norm every head ([`Linear::has_norm`]).
//!
//! | | in files | `[out, in]` | reads | input in basis | output in basis | `b` with |
//! |---|---|---|---|---|---|---|
//! | q | `self_attn.q_proj` | `[H·D, C]` | first norm | R1 | its own (R3 after RoPE) | `attention_bias` |
//! | k | `self_attn.k_proj` | `[K·D, C]` | first norm | R1 | its own (R3 after RoPE) | `attention_bias` |
//! | v | `self_attn.v_proj` | `[K·D, C]` | first norm | R1 | R2 | `attention_bias` |
//! | o | `self_attn.o_proj` | `[C, H·D]` | attention | R2 | R1 | `attention_bias`, but for Qwen 2 |
//! | gate | `mlp.gate_proj` | `[F, C]` | second norm | R1 | its own | `mlp_bias` |
//! | up | `mlp.up_proj` | `[F, C]` | second norm | R1 | its own | `mlp_bias` |
//! | down | `mlp.down_proj` | `[C, F]` | SwiGLU | R4 | R1 | `mlp_bias` |
//!
//! H query heads, K key and value heads of width D; C channels in the residual stream, F in the MLP. Whatever goes over the weights of a
//! layer (loading, rotating, quantising, writing) iterates over this table, so that what differs from one architecture to the next is a
//! column of it.

use std::ops::{Index, IndexMut};

use super::{Biases, LlamaConfig};
use crate::quant::Site;
use crate::{Error, Result, Tensor};

/// One of a layer's linears.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Linear {
    /// The queries.
    Q,
    /// The keys.
    K,
    /// The values.
    V,
    /// The output of attention.
    O,
    /// The gate of the MLP.
    Gate,
    /// What the gate multiplies.
    Up,
    /// The output of the MLP.
    Down,
}

/// The basis that the input or the output of a linear is written in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Basis {
    /// No rotation is merged on this side.
    Own,
    /// That of the residual stream, R1 `[C, C]`.
    Stream,
    /// That of a layer's values, R2 `[D, D]` on every head.
    Values,
    /// That of the MLP's inner activation, the Hadamard R4 where the scheme runs it online.
    Inner,
}

/// A row of the table: what is known of a linear whatever the model.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    /// Its short name.
    pub name: &'static str,
    /// Its name in files, inside a layer and without `.weight`.
    pub file: &'static str,
    /// The norm whose gain is folded into its weight: 0 or 1, in the order of the layer.
    pub norm: Option<usize>,
    /// The quantiser of its input. Linears of one site read the same values, and share a Hessian.
    pub site: Site,
    /// The basis of its input.
    pub reads: Basis,
    /// The basis of its output, and so of its bias.
    pub writes: Basis,
}

impl Linear {
    /// All seven, in the order in which they run.
    pub const ALL: [Self; 7] = [Self::Q, Self::K, Self::V, Self::O, Self::Gate, Self::Up, Self::Down];

    /// What is known of it.
    pub const fn row(self) -> Row {
        use Basis::{Inner, Own, Stream, Values};
        use Site::{AttentionInput, AttentionOutput, DownInput, MlpInput};
        let (name, file, norm, site, reads, writes) = match self {
            Self::Q => ("q", "self_attn.q_proj", Some(0), AttentionInput, Stream, Own),
            Self::K => ("k", "self_attn.k_proj", Some(0), AttentionInput, Stream, Own),
            Self::V => ("v", "self_attn.v_proj", Some(0), AttentionInput, Stream, Values),
            Self::O => ("o", "self_attn.o_proj", None, AttentionOutput, Values, Stream),
            Self::Gate => ("gate", "mlp.gate_proj", Some(1), MlpInput, Stream, Own),
            Self::Up => ("up", "mlp.up_proj", Some(1), MlpInput, Stream, Own),
            Self::Down => ("down", "mlp.down_proj", None, DownInput, Inner, Stream),
        };
        Row { name, file, norm, site, reads, writes }
    }

    /// Its name in files, in layer `l`, without `.weight` or `.bias`.
    pub fn path(self, l: usize) -> String {
        format!("model.layers.{l}.{}", self.row().file)
    }

    /// The shape of its weight, `[out, in]`.
    pub fn shape(self, config: &LlamaConfig) -> [usize; 2] {
        let (c, f) = (config.hidden_size, config.intermediate_size);
        let (q, kv) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
        match self {
            Self::Q => [q, c],
            Self::K | Self::V => [kv, c],
            Self::O => [c, q],
            Self::Gate | Self::Up => [f, c],
            Self::Down => [c, f],
        }
    }

    /// True where a model of this configuration adds a bias `[out]`.
    pub fn has_bias(self, config: &LlamaConfig) -> bool {
        match self {
            Self::O if config.family.facts().biases == Biases::Qkv => false,
            Self::Q | Self::K | Self::V | Self::O => config.attention_bias,
            Self::Gate | Self::Up | Self::Down => config.mlp_bias,
        }
    }

    /// True where a model of this configuration has an RMSNorm of every head of the output, with a gain `[D]` that all heads share. It
    /// is before the rotary embedding, and no rotation comes near it.
    pub fn has_norm(self, config: &LlamaConfig) -> bool {
        self.norm_path(0).is_some() && config.family.facts().head_norms
    }

    /// The name in files of the norm of its heads, in layer `l`, without `.weight`; of q and k alone.
    pub fn norm_path(self, l: usize) -> Option<String> {
        let name = match self {
            Self::Q => "q_norm",
            Self::K => "k_norm",
            _ => return None,
        };
        Some(format!("model.layers.{l}.self_attn.{name}"))
    }

    /// Where a model's files hold its weight: as it is, or behind others in one tensor.
    pub fn rows(self, config: &LlamaConfig) -> Rows {
        let (file, members): (_, &[Self]) = match self {
            Self::Q | Self::K | Self::V if config.family.facts().fused => ("self_attn.qkv_proj", &[Self::Q, Self::K, Self::V]),
            Self::Gate | Self::Up if config.family.facts().fused => ("mlp.gate_up_proj", &[Self::Gate, Self::Up]),
            _ => (self.row().file, &[]),
        };
        let height = |l: &Self| l.shape(config)[0];
        let of: usize = if members.is_empty() { height(&self) } else { members.iter().map(height).sum() };
        Rows { file, first: members.iter().take_while(|l| **l != self).map(height).sum(), count: height(&self), of }
    }

    /// The tensors of a layer that hold the linears, in order, each with its linears from the first row on.
    pub fn files(config: &LlamaConfig) -> impl Iterator<Item = (&'static str, Vec<Self>)> {
        let of = |file: &'static str| Self::ALL.into_iter().filter(|l| l.rows(config).file == file).collect();
        Self::ALL.into_iter().map(|l| l.rows(config)).filter(|rows| rows.first == 0).map(move |rows| (rows.file, of(rows.file)))
    }

    /// The linears whose input passes this quantiser.
    pub fn at(site: Site) -> impl Iterator<Item = Self> {
        Self::ALL.into_iter().filter(move |l| l.row().site == site)
    }
}

/// The rows of a tensor in files that hold a linear.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rows {
    /// The tensor's name inside a layer, without `.weight` or `.bias`.
    pub file: &'static str,
    /// The first row.
    pub first: usize,
    /// How many.
    pub count: usize,
    /// Rows of the whole tensor.
    pub of: usize,
}

impl std::fmt::Display for Linear {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.row().name)
    }
}

/// One thing for each linear of a layer, in the order of [`Linear::ALL`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Linears<T>(pub [T; 7]);

impl<T> Index<Linear> for Linears<T> {
    type Output = T;
    fn index(&self, linear: Linear) -> &T {
        &self.0[linear as usize]
    }
}

impl<T> IndexMut<Linear> for Linears<T> {
    fn index_mut(&mut self, linear: Linear) -> &mut T {
        &mut self.0[linear as usize]
    }
}

impl<T> Linears<T> {
    /// What `f` makes for each.
    ///
    /// # Errors
    /// The first of `f`.
    pub fn try_from_fn(f: impl FnMut(Linear) -> Result<T>) -> Result<Self> {
        Self::from_vec(Linear::ALL.into_iter().map(f).collect::<Result<_>>()?)
    }

    /// Seven things in the order of [`Linear::ALL`].
    ///
    /// # Errors
    /// [`Error::Argument`] for another number of them.
    pub fn from_vec(values: Vec<T>) -> Result<Self> {
        let wrong = |v: Vec<T>| Error::argument("linears", format!("expected those of seven, got {}", v.len()));
        values.try_into().map(Self).map_err(wrong)
    }

    /// Each with its linear.
    pub fn iter(&self) -> impl Iterator<Item = (Linear, &T)> {
        Linear::ALL.into_iter().zip(&self.0)
    }

    /// What `f` makes of each.
    ///
    /// # Errors
    /// The first of `f`.
    pub fn each<U>(&self, mut f: impl FnMut(Linear, &T) -> Result<U>) -> Result<Linears<U>> {
        Linears::try_from_fn(|linear| f(linear, &self[linear]))
    }
}

impl<T> IntoIterator for Linears<T> {
    type Item = (Linear, T);
    type IntoIter = std::iter::Zip<std::array::IntoIter<Linear, 7>, std::array::IntoIter<T, 7>>;
    fn into_iter(self) -> Self::IntoIter {
        Linear::ALL.into_iter().zip(self.0)
    }
}

/// What a linear is made of: the weight in some form, the bias of those that have one, and the gain of a norm of its output's heads.
#[derive(Clone, Debug, PartialEq)]
pub struct Affine<W = Tensor, B = Tensor> {
    /// `W`, `[out, in]`.
    pub weight: W,
    /// `b`, `[out]`.
    pub bias: Option<B>,
    /// The gain `[D]` of the RMSNorm of every head behind it ([`Linear::has_norm`]).
    pub norm: Option<B>,
}

impl<W, B> From<W> for Affine<W, B> {
    fn from(weight: W) -> Self {
        Self { weight, bias: None, norm: None }
    }
}

impl<W, B: Clone> Affine<W, B> {
    /// Another form of the weight, with the same bias and norm.
    pub fn with_weight<V>(&self, weight: V) -> Affine<V, B> {
        Affine { weight, bias: self.bias.clone(), norm: self.norm.clone() }
    }
}

/// The weights and biases of a layer.
pub type LayerWeights = Linears<Affine>;

impl LayerWeights {
    /// Every tensor: seven weights, then the biases that there are, then the gains of norms.
    pub fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        let (biases, norms) = (self.0.iter().filter_map(|l| l.bias.as_ref()), self.0.iter().filter_map(|l| l.norm.as_ref()));
        self.0.iter().map(|l| &l.weight).chain(biases).chain(norms)
    }

    /// The same with every tensor replaced, biases and gains too.
    ///
    /// # Errors
    /// The first of `f`.
    pub fn map(&self, mut f: impl FnMut(&Tensor) -> Result<Tensor>) -> Result<Self> {
        self.each(|_, l| {
            let mut optional = |t: &Option<Tensor>| t.as_ref().map(&mut f).transpose();
            let (bias, norm) = (optional(&l.bias)?, optional(&l.norm)?);
            Ok(Affine { weight: f(&l.weight)?, bias, norm })
        })
    }

    /// The same with every weight replaced, and biases and norms kept.
    ///
    /// # Errors
    /// The first of `f`.
    pub fn map_weights(&self, mut f: impl FnMut(Linear, &Tensor) -> Result<Tensor>) -> Result<Self> {
        self.each(|linear, l| Ok(l.with_weight(f(linear, &l.weight)?)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_reads_the_stream_is_what_a_norm_is_folded_into() {
        for linear in Linear::ALL {
            let row = linear.row();
            assert_eq!(row.norm.is_some(), row.reads == Basis::Stream, "{linear}");
            assert_ne!(row.reads, row.writes, "{linear}");
        }
        let at = |site| Linear::at(site).collect::<Vec<_>>();
        assert_eq!(at(Site::AttentionInput), [Linear::Q, Linear::K, Linear::V]);
        assert_eq!(at(Site::Value), []);
    }

    #[test]
    fn linears_are_found_by_name() {
        let mut all = Linears::try_from_fn(|l| Ok(l.row().name)).unwrap();
        assert!(all.iter().all(|(l, name)| l.to_string() == *name && all[l] == *name));
        all[Linear::O] = "other";
        assert_eq!(all.0[3], "other");
        assert!(Linears::from_vec(vec![1, 2]).unwrap_err().to_string().contains("expected those of seven, got 2"));
    }
}
