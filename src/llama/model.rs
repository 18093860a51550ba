//! A whole model, in two forms: [`Llama`], whose rotations are learned, and [`Merged`], whose rotations are part of its weights.

use std::path::Path;
use std::sync::Arc;

use rayon::prelude::*;
use sha2::{Digest, Sha256};

use crate::data;
use crate::linalg::matmul;
use crate::llama::block::{Block, Run};
use crate::llama::host::{Heading, Parked};
use crate::llama::placement::Placer;
use crate::llama::rotate::{LayerLearned, LayerTransforms};
use crate::llama::walk::observed;
use crate::llama::{
    LlamaConfig, Packed, Placement, Plan, Reader, Rotated, RotatedWeights, RotationVars, Source, Supply, Weights,
};
use crate::ops::linear_cross_entropy::linear_token_losses;
use crate::ops::rope::Rope;
use crate::profile::enter;
use crate::quant::{Engine, Scheme, Site};
use crate::ranks::Group;
use crate::rotation::Rotations;
use crate::{DType, Device, Error, Result, Tape, Tensor, Var, io};

/// Which layers keep their intermediate values for the backward pass, and which compute them again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Recompute {
    /// Keep everything: fastest.
    #[default]
    None,
    /// Keep only each layer's input.
    All,
    /// As planned.
    Planned(Plan),
}

impl Recompute {
    /// The plan of all layers that this stands for.
    pub fn plan(self) -> Plan {
        match self {
            Self::None => Plan::KEEP_ALL,
            Self::All => Plan::INPUTS,
            Self::Planned(plan) => plan,
        }
    }
}

/// A model of any [`Family`](crate::llama::Family) with frozen weights, RMSNorm gains folded into the linears that read them.
#[derive(Clone, Debug)]
pub struct Llama {
    /// Sizes.
    pub config: LlamaConfig,
    /// `[V, C]`.
    pub embedding: Tensor,
    /// `[V, C]`, the final norm's gain folded in.
    pub head: Tensor,
    /// The layers. The weights of one that is [streamed](Block::is_streamed) are in main memory.
    pub blocks: Vec<Arc<Block>>,
    /// How products are computed whose operands are both quantised ([`Llama::run`]).
    pub engine: Engine,
}

impl Llama {
    /// Loads a Hugging Face folder, folding gains in float64 and rounding once to `dtype`. Weights go to the device a tensor at a
    /// time: the host never holds more than a layer of a model that runs elsewhere.
    ///
    /// # Errors
    /// Those of [`LlamaConfig::from_dir`], [`Source::open`] and [`Llama::read`].
    pub fn load(dir: impl AsRef<Path>, dtype: DType, device: &Device) -> Result<Self> {
        Self::read(&Source::from_dir(dir)?, dtype, device)
    }

    /// The same with every gain left where it is: the model as it runs without rotations, which is what quantising without them is
    /// compared on. It cannot be rotated.
    ///
    /// # Errors
    /// Those of [`Llama::load`].
    pub fn load_plain(dir: impl AsRef<Path>, dtype: DType, device: &Device) -> Result<Self> {
        Self::read_plain(&Source::from_dir(dir)?, dtype, device)
    }

    /// [`Llama::load`] from a model that was opened.
    ///
    /// # Errors
    /// Values that are not finite or too large for `dtype`; what the device says.
    pub fn read(source: &Source, dtype: DType, device: &Device) -> Result<Self> {
        Self::read_placed(source, dtype, device, Placement::RESIDENT)
    }

    /// The same with some layers in main memory ([`Llama::streamed`]): each goes straight to its place.
    ///
    /// # Errors
    /// Those of [`Llama::read`] and [`Llama::streamed`].
    pub fn read_placed(source: &Source, dtype: DType, device: &Device, placement: Placement) -> Result<Self> {
        Self::read_among(Group::nobody(), source, dtype, device, placement)
    }

    /// The same at every rank, in the same way: the layers in main memory are there once for all ranks of a machine.
    ///
    /// # Errors
    /// Those of [`Llama::read_placed`]; [`Error::Rank`]; no memory that the ranks could have in common, nor for a copy each.
    pub fn read_among(ranks: &Group, source: &Source, dtype: DType, device: &Device, placement: Placement) -> Result<Self> {
        let block = |l| Ok(Block::new(source.config(), l, source.layer(l, dtype)?));
        Self::read_with(source, dtype, (ranks, device, placement), block)
    }

    /// [`Llama::load_plain`] from a model that was opened.
    ///
    /// # Errors
    /// Those of [`Llama::read`].
    pub fn read_plain(source: &Source, dtype: DType, device: &Device) -> Result<Self> {
        Self::read_plain_placed(source, dtype, device, Placement::RESIDENT)
    }

    /// The same with some layers in main memory, as by [`Llama::read_placed`].
    ///
    /// # Errors
    /// Those of [`Llama::read_placed`].
    pub fn read_plain_placed(source: &Source, dtype: DType, device: &Device, placement: Placement) -> Result<Self> {
        // The head is never quantised: folding the final gain into it changes nothing.
        Self::read_with(source, dtype, (Group::nobody(), device, placement), |l| {
            let (weights, gains) = source.plain_layer(l, dtype)?;
            Ok(Block::new(source.config(), l, weights).with_gains(gains))
        })
    }

    fn read_with(
        source: &Source,
        dtype: DType,
        (ranks, device, placement): (&Group, &Device, Placement),
        block: impl Fn(usize) -> Result<Block>,
    ) -> Result<Self> {
        let embedding = source.embedding(dtype)?.to_device(device)?;
        let head = source.head(dtype)?.to_device(device)?;
        let config = source.config().clone();
        let placer = Placer::among(ranks, device, placement, config.layers)?;
        let blocks = (0..config.layers).map(|l| Ok(Arc::new(placer.place(l, &block(l)?)?)));
        Ok(Self { embedding, head, blocks: blocks.collect::<Result<_>>()?, config, engine: Engine::default() })
    }

    /// A model whose parts come from a supply, each to its place: the model that [`Llama::read`] reads or
    /// [`synthetic::model`](crate::llama::synthetic::model) makes. The only one whose layers may be beyond main memory, as
    /// [`Placement::hosted`] says: the supply reads those again each time.
    ///
    /// # Errors
    /// Those of [`Supply`]'s parts and of [`Llama::streamed`].
    pub fn supplied(supply: &Arc<Supply>, placement: Placement) -> Result<Self> {
        Self::supplied_among(Group::nobody(), supply, placement)
    }

    /// The same at every rank: layers in main memory are there once for all ranks of a machine, and each reads the others for itself.
    ///
    /// # Errors
    /// Those of [`Llama::supplied`].
    pub fn supplied_among(ranks: &Group, supply: &Arc<Supply>, placement: Placement) -> Result<Self> {
        let (config, reader) = (supply.config().clone(), supply.clone());
        let reader: Reader = Arc::new(move |l| reader.weights(l));
        let placer = Placer::reading(ranks, supply.device(), placement, config.layers, Some(reader))?;
        let place = |l| {
            let block = if placer.shelves(l) { supply.outline(l) } else { supply.block(l)? };
            placer.place(l, &block).map(Arc::new)
        };
        let blocks = (0..config.layers).map(place).collect::<Result<_>>()?;
        Ok(Self { embedding: supply.embedding()?, head: supply.head()?, config, blocks, engine: Engine::default() })
    }

    /// A model of given weights, which hold the configuration's multipliers ([`Weights`]).
    ///
    /// # Errors
    /// Those of [`LlamaConfig::validate`]; another number of layers than the configuration's.
    pub fn new(config: LlamaConfig, weights: Weights) -> Result<Self> {
        config.validate()?;
        if weights.layers.len() != config.layers {
            return Err(Error::argument("layers", format!("expected {}, got {}", config.layers, weights.layers.len())));
        }
        let layers = weights.layers.into_iter().enumerate();
        let config = config.folded();
        let blocks = layers.map(|(i, w)| Arc::new(Block::new(&config, i, w))).collect();
        Ok(Self { config, embedding: weights.embedding, head: weights.head, blocks, engine: Engine::default() })
    }

    /// The same model with its weights on another device.
    ///
    /// # Errors
    /// A failing copy, or no memory on the device.
    pub fn to_device(self, device: &Device) -> Result<Self> {
        if self.device() == *device {
            return Ok(self);
        }
        let block = |b: &Arc<Block>| Ok(Arc::new(b.to_device(device)?)); // layers that were elsewhere come to stay
        Ok(Self {
            embedding: self.embedding.to_device(device)?,
            head: self.head.to_device(device)?,
            blocks: self.blocks.iter().map(block).collect::<Result<_>>()?,
            config: self.config,
            engine: self.engine,
        })
    }

    /// The same model with another engine for quantised products.
    pub fn by(self, engine: Engine) -> Self {
        Self { engine, ..self }
    }

    /// The same model with some layers in main memory, from where they come to the device when it is their turn: the same numbers with
    /// fewer bytes on the device. Streamed layers are computed again in the backward pass, whatever a plan says ([`Plan`]).
    ///
    /// # Errors
    /// Fewer than two buffers; no main memory, or none that can be locked; a failing copy.
    pub fn streamed(self, placement: Placement) -> Result<Self> {
        let placer = Placer::new(&self.device(), placement, self.blocks.len())?;
        let place = |(l, b): (usize, Arc<Block>)| placer.place(l, &b).map(Arc::new);
        let blocks = self.blocks.into_iter().enumerate().map(place).collect::<Result<_>>()?;
        Ok(Self { blocks, ..self })
    }

    /// Where the layers are.
    pub fn placement(&self) -> Placement {
        placement(self.blocks.iter().map(|b| &**b))
    }

    /// How many layers were copied from main memory to the device so far, by this model and what shares its layers.
    pub fn copied(&self) -> usize {
        self.blocks.iter().find_map(|b| b.parking()).map_or(0, Parked::copied)
    }

    /// Why every rank of this machine has the layers in main memory for itself, where they were to have them in common
    /// ([`Llama::read_among`]).
    pub fn why_apart(&self) -> Option<String> {
        self.blocks.iter().find_map(|b| b.parking()).and_then(Parked::why_apart)
    }

    /// How many layers were read again so far, where some are neither on the device nor in main memory.
    pub fn layers_read(&self) -> usize {
        self.blocks.iter().find_map(|b| b.parking()).map_or(0, Parked::layers_read)
    }

    /// Where the weights are used.
    pub fn device(&self) -> Device {
        self.embedding.device()
    }

    /// Bytes of the weights, biases and gains.
    pub fn bytes(&self) -> usize {
        self.tensors().map(Tensor::bytes).sum()
    }

    /// Those of them that are on the device to stay.
    pub fn bytes_on_device(&self) -> usize {
        let streamed = self.blocks.iter().filter(|b| b.is_streamed()).flat_map(|b| b.weights.tensors());
        self.bytes() - streamed.map(Tensor::bytes).sum::<usize>()
    }

    /// The embedding, the head, and every layer's weights and biases.
    fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        let layers = self.blocks.iter().flat_map(|b| b.weights.tensors());
        [&self.embedding, &self.head].into_iter().chain(layers)
    }

    /// The weights' element type.
    pub fn dtype(&self) -> DType {
        self.embedding.dtype()
    }

    /// What the layers need to run sequences of `seq` tokens under a scheme.
    ///
    /// # Errors
    /// Those of [`Run::new`].
    pub fn run(&self, scheme: &Scheme, seq: usize) -> Result<Run> {
        let mut run = Run::new(&self.config, scheme, seq, self.dtype(), &self.device())?;
        run.sites.engine = self.engine;
        Ok(run)
    }

    /// What the head reads, `[tokens, C]`: the final hidden state of the rotated, fake-quantised network, normalised and taken out of
    /// R1's basis; `tokens` are whole sequences of `run.seq` ids.
    ///
    /// # Errors
    /// Tokens that are no whole sequences or outside the vocabulary; rotations of another model; those of the operations.
    pub fn hidden<'t>(
        &self,
        rotations: &RotationVars<'t>,
        tokens: &[u32],
        run: Arc<Run>,
        recompute: Recompute,
    ) -> Result<Var<'t>> {
        self.hidden_with(rotations, tokens, run, recompute, |_, _| Ok(()))
    }

    /// The same, and `see` is shown the hidden state `[tokens, C]` behind every layer, in R1's basis.
    ///
    /// # Errors
    /// Those of [`Llama::hidden`]; the first of `see`.
    pub fn hidden_with<'t>(
        &self,
        rotations: &RotationVars<'t>,
        tokens: &[u32],
        run: Arc<Run>,
        recompute: Recompute,
        mut see: impl FnMut(usize, &Var<'t>) -> Result<()>,
    ) -> Result<Var<'t>> {
        check_tokens(&self.config, tokens, run.seq, rotations.r2.len())?;
        let tape = rotations.r1.tape();
        let r1 = &rotations.r1;
        let part = enter("embedding");
        let mut x = tape.constant(self.embedding.clone()).embedding(tokens.into())?.matmul(r1.clone())?;
        drop(part);
        let plan = recompute.plan();
        let learned = rotations.scales.iter().zip(&rotations.clips);
        for ((l, block), (scales, clips)) in self.blocks.iter().enumerate().zip(learned) {
            // A node of their own, so that a layer's gradients are summed before they join the others' in either branch.
            let (r1, r2) = (r1.clone().fork()?, rotations.r2[l].clone().fork()?);
            let r2b = rotations.r2b.get(l).map(|r| r.clone().fork()).transpose()?;
            let transforms = LayerTransforms { r1, r2, r2b, scales: scales.clone() };
            let weight_clips = rotations.weight_clips.as_ref().and_then(|w| w.layers.get(l)).cloned();
            let (straight, rows) = (rotations.straight, rotations.rows.clone());
            let by = LayerLearned { transforms, clips: clips.clone(), weight_clips, straight, rows };
            x = plan.run(block, x, by, &run)?;
            see(l, &x)?;
        }
        let _part = enter("head");
        x.rms_norm(self.config.rms_norm_eps)?.linear(r1.clone())
    }

    /// Logits `[tokens, V]` of the rotated, fake-quantised network; `tokens` are whole sequences of `run.seq` ids.
    ///
    /// # Errors
    /// Those of [`Llama::hidden`].
    pub fn logits<'t>(
        &self,
        rotations: &RotationVars<'t>,
        tokens: &[u32],
        run: Arc<Run>,
        recompute: Recompute,
    ) -> Result<Var<'t>> {
        let head = rotations.r1.tape().constant(self.head.clone());
        self.hidden(rotations, tokens, run, recompute)?.linear(head)
    }

    /// Mean next-token cross entropy of [`Llama::logits`], of which few exist at a time.
    ///
    /// # Errors
    /// Those of [`Llama::hidden`].
    pub fn loss<'t>(
        &self,
        rotations: &RotationVars<'t>,
        tokens: &[u32],
        seq: usize,
        scheme: &Scheme,
        recompute: Recompute,
    ) -> Result<Var<'t>> {
        let hidden = self.hidden(rotations, tokens, Arc::new(self.run(scheme, seq)?), recompute)?;
        let _part = enter("head");
        hidden.linear_cross_entropy(rotations.r1.tape().constant(self.head.clone()), data::targets(tokens, seq).into())
    }

    /// Merges the rotations into the weights in float64, rounds once to the model's type, and quantises the weights to nearest.
    /// Without rotations the network is the plain one, R3 included ([`Scheme::unrotated`]). Other weight quantisers:
    /// [`quantize_weights`](crate::calibrate::quantize_weights).
    ///
    /// # Errors
    /// Rotations of another size, or not orthogonal; weights that the scheme's groups do not divide.
    pub fn merge(&self, rotations: Option<&Rotations>, scheme: &Scheme) -> Result<Merged> {
        self.merge_with(rotations, scheme, |rotated, i| rotated.nearest(i))
    }

    /// [`Llama::merge`] without quantising the weights, whatever the scheme says about them.
    ///
    /// # Errors
    /// As [`Llama::merge`].
    pub fn merge_exact(&self, rotations: Option<&Rotations>, scheme: &Scheme) -> Result<Merged> {
        if rotations.is_none() {
            // The layers as they are, wherever they are.
            return Merged::new(&Rotated::new(self, None, scheme)?, self.blocks.iter().map(|b| (**b).clone()).collect());
        }
        self.merge_with(rotations, scheme, |rotated, i| rotated.block(i))
    }

    /// Merges a layer at a time.
    fn merge_with(
        &self,
        rotations: Option<&Rotations>,
        scheme: &Scheme,
        block: impl Fn(&Rotated<'_>, usize) -> Result<Block>,
    ) -> Result<Merged> {
        let rotated = Rotated::new(self, rotations, scheme)?;
        let placer = rotated.placer()?;
        Merged::new(&rotated, (0..self.blocks.len()).map(|i| placer.place(i, &block(&rotated, i)?)).collect::<Result<_>>()?)
    }

    /// SHA-256 of every value of every weight, and of their types and shapes: what the model is.
    ///
    /// # Errors
    /// Weights that cannot be copied from their device.
    pub fn sha256(&self) -> Result<String> {
        let gains = self.blocks.iter().filter_map(|b| b.gains()).flatten();
        if self.placement().hosted == usize::MAX {
            return sha256(&self.tensors().chain(gains).collect::<Vec<_>>());
        }
        // A layer at a time, as some are read for it.
        let mut all = digests(&[&self.embedding, &self.head])?;
        for block in &self.blocks {
            all.extend(digests(&block.fetched()?.tensors().collect::<Vec<_>>())?);
        }
        all.extend(digests(&gains.collect::<Vec<_>>())?);
        Ok(digest_of(&all))
    }
}

/// Where these layers are.
fn placement<'a>(blocks: impl Iterator<Item = &'a Block>) -> Placement {
    let (mut resident, mut here, mut read, mut buffers) = (0, 0, 0, None);
    for block in blocks {
        match block.parking() {
            Some(parked) => {
                buffers = Some(parked.buffers());
                *if parked.is_read() { &mut read } else { &mut here } += 1;
            }
            None => resident += 1,
        }
    }
    let hosted = if read > 0 { here } else { usize::MAX };
    buffers.map_or(Placement::RESIDENT, |buffers| Placement { resident, hosted, buffers })
}

/// SHA-256 of the types, shapes and values of tensors.
fn sha256(all: &[&Tensor]) -> Result<String> {
    Ok(digest_of(&digests(all)?))
}

/// SHA-256 of the type, shape and values of each of some tensors, in parallel.
///
/// # Errors
/// Weights that cannot be copied from their device.
pub(super) fn digests(all: &[&Tensor]) -> Result<Vec<[u8; 32]>> {
    let digest = |t: &&Tensor| -> Result<[u8; 32]> {
        let t = t.to_device(&Device::Cpu)?;
        let head = format!("{} {:?}\n", t.dtype(), t.shape());
        Ok(Sha256::new().chain_update(head).chain_update(io::bytes(&t)?).finalize().into())
    };
    all.par_iter().map(digest).collect()
}

/// The digest of the digests of tensors.
pub(super) fn digest_of(digests: &[[u8; 32]]) -> String {
    io::hex(&Sha256::digest(digests.concat()))
}

/// Whole sequences, and R2 for every layer.
pub(crate) fn check_tokens(config: &LlamaConfig, tokens: &[u32], seq: usize, layers: usize) -> Result<()> {
    if seq == 0 || tokens.is_empty() || !tokens.len().is_multiple_of(seq) {
        return Err(Error::argument("tokens", format!("expected whole sequences of {seq}, got {} tokens", tokens.len())));
    }
    if layers != config.layers {
        return Err(Error::argument("rotations", format!("expected R2 for {} layers, got {layers}", config.layers)));
    }
    Ok(())
}

/// The rotary tables of the first `positions` of sequences of `seq` tokens.
pub(crate) fn rope(config: &LlamaConfig, seq: usize, positions: usize, dtype: DType, device: &Device) -> Result<Rope> {
    let frequencies = config.frequencies(seq);
    Rope::scaled(&frequencies.inverse, frequencies.factor, positions, dtype, device)
}

impl Run {
    /// Quantisers and rotary tables for sequences of `seq` tokens.
    ///
    /// # Errors
    /// No position; rotary tables that cannot be made in `dtype` or on `device`.
    pub fn new(config: &LlamaConfig, scheme: &Scheme, seq: usize, dtype: DType, device: &Device) -> Result<Self> {
        let rope = rope(config, seq, seq, dtype, device)?;
        Ok(Self { sites: scheme.sites(config.head_dim), rope, seq, observer: None, patch: None, attend: None })
    }
}

/// A model ready to run: rotations merged, weights quantised, activations fake-quantised as it runs.
#[derive(Clone, Debug)]
pub struct Merged {
    /// Sizes.
    pub config: LlamaConfig,
    /// How its activations are quantised, and its online rotations.
    pub scheme: Scheme,
    /// `E R1`.
    pub embedding: Tensor,
    /// `W_head R1`.
    pub head: Tensor,
    /// Rotated, quantised weights.
    pub blocks: Vec<Block>,
}

impl Merged {
    /// A rotated network with these layers.
    pub(crate) fn new(rotated: &Rotated<'_>, blocks: Vec<Block>) -> Result<Self> {
        let (config, scheme) = (rotated.config().clone(), *rotated.scheme());
        Ok(Self { config, scheme, embedding: rotated.embedding()?, head: rotated.head()?, blocks })
    }

    /// Where the layers are.
    pub fn placement(&self) -> Placement {
        placement(self.blocks.iter())
    }

    /// SHA-256 of every value of every weight, of their types and shapes, and of the clip constants that layers have of their own: what the
    /// network is, but for the scheme that it quantises activations by.
    ///
    /// # Errors
    /// Weights that cannot be copied from their device.
    pub fn sha256(&self) -> Result<String> {
        let beside = |b: &Block| -> Vec<Tensor> {
            let clips = Site::ALL.into_iter().filter_map(|site| b.clip_constants(site));
            b.gains().into_iter().flatten().chain(clips).cloned().collect()
        };
        let beside: Vec<Vec<Tensor>> = self.blocks.iter().map(beside).collect();
        let layers = self.blocks.iter().zip(&beside).flat_map(|(b, beside)| b.weights.tensors().chain(beside));
        sha256(&[&self.embedding, &self.head].into_iter().chain(layers).collect::<Vec<_>>())
    }

    /// Logits `[tokens, V]`; `tokens` are whole sequences of `seq` ids.
    ///
    /// # Errors
    /// Tokens that are no whole sequences or outside the vocabulary; those of the operations.
    pub fn logits(&self, tokens: &[u32], seq: usize) -> Result<Tensor> {
        matmul::product(&self.hidden(tokens, &self.run(seq)?)?, false, &self.head, true, false, self.head.dtype())
    }

    /// Runs whole sequences of `seq` ids as far as the head, and shows `see` the input of every quantiser: layer, site, values.
    ///
    /// # Errors
    /// Those of [`Merged::logits`], and the first error of `see`.
    pub fn observe(
        &self,
        tokens: &[u32],
        seq: usize,
        see: impl Fn(usize, Site, &Tensor) -> Result<()> + Send + Sync + 'static,
    ) -> Result<()> {
        observed(&self.run(seq)?, see, |run| self.hidden(tokens, run)).map(drop)
    }

    /// The cross entropy of every token's prediction, 0 at the last of each sequence; few logits exist at a time.
    ///
    /// # Errors
    /// As [`Merged::logits`].
    pub fn token_losses(&self, tokens: &[u32], seq: usize) -> Result<Vec<f64>> {
        linear_token_losses(&self.hidden(tokens, &self.run(seq)?)?, &self.head, &data::targets(tokens, seq))
    }

    /// What the head reads, `[tokens, C]`: the final hidden state, normalised; `tokens` are whole sequences of `seq` ids.
    ///
    /// # Errors
    /// As [`Merged::logits`].
    pub fn last_hidden(&self, tokens: &[u32], seq: usize) -> Result<Tensor> {
        self.hidden(tokens, &self.run(seq)?)
    }

    /// The cross entropy of `targets` at `rows` of packed sequences; rows may repeat. Logits of other rows are not made.
    ///
    /// # Errors
    /// As [`Merged::logits`]; no tokens; a row outside the sequences; as many targets as rows are expected; a target outside the
    /// vocabulary.
    pub fn packed_losses(&self, packed: &Packed, rows: &[u32], targets: &[u32]) -> Result<Vec<f64>> {
        let hidden = self.hidden(packed.tokens(), &packed.run(self)?)?;
        let hidden = Tape::new().constant(hidden).embedding(rows.into())?.into_value();
        let targets =
            targets.iter().map(|&t| i32::try_from(t).map_err(|_| Error::argument("target", format!("{t} is no token id"))));
        linear_token_losses(&hidden, &self.head, &targets.collect::<Result<Vec<_>>>()?)
    }

    /// Shows `see` the logits of packed sequences, a few rows `[rows, V]` at a time, in order.
    ///
    /// # Errors
    /// As [`Merged::logits`]; no tokens; the first error of `see`.
    pub fn packed_logits(&self, packed: &Packed, rows: usize, mut see: impl FnMut(Tensor) -> Result<()>) -> Result<()> {
        let hidden = self.hidden(packed.tokens(), &packed.run(self)?)?;
        for first in (0..hidden.rows()).step_by(rows.max(1)) {
            let part = hidden.slice(first, rows.max(1).min(hidden.rows() - first))?;
            see(matmul::product(&part, false, &self.head, true, false, self.head.dtype())?)?;
        }
        Ok(())
    }

    fn run(&self, seq: usize) -> Result<Run> {
        Run::new(&self.config, &self.scheme, seq, self.embedding.dtype(), &self.embedding.device())
    }

    /// What the head reads, `[tokens, C]`.
    pub(super) fn hidden(&self, tokens: &[u32], run: &Run) -> Result<Tensor> {
        check_tokens(&self.config, tokens, run.seq, self.config.layers)?;
        let tape = Tape::new();
        let mut x = tape.constant(self.embedding.clone()).embedding(tokens.into())?;
        for block in &self.blocks {
            let block = block.at_work(Heading::Around)?;
            x = block.forward(x, RotatedWeights::constants(&tape, &block.weights), run)?;
        }
        Ok(x.rms_norm(self.config.rms_norm_eps)?.into_value())
    }
}
