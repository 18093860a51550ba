//! Rotations merged into weights: in float64, a layer at a time, rounded once.

use crate::llama::{
    Block, LayerScales, LayerTransforms, LayerWeights, Linears, Llama, LlamaConfig, Placement, Placer, Source, Supply,
    weight_clips,
};
use crate::quant::{Scheme, Site};
use crate::rotation::{ClipEnds, Rotations, Scale, TOLERANCE};
use crate::{DType, Device, Error, Result, Tape, Tensor};

/// A model in the basis of its rotations, whose layers are made when asked for. One layer is in memory at a time, besides what
/// they are made from.
#[derive(Debug)]
pub struct Rotated<'a> {
    from: From<'a>,
    config: &'a LlamaConfig,
    scheme: Scheme,
    rotations: Option<&'a Rotations>,
    /// `rotations` in `f64`.
    wide: Option<Rotations>,
    dtype: DType,
    device: Device,
}

#[derive(Debug)]
enum From<'a> {
    Memory(&'a Llama),
    Files(&'a Source),
    Supply(&'a Supply),
}

impl<'a> Rotated<'a> {
    /// Of a model in memory: in its type, on its device. Without rotations it is the plain network ([`Scheme::unrotated`]).
    ///
    /// # Errors
    /// Rotations of another size, or not orthogonal.
    pub fn new(model: &'a Llama, rotations: Option<&'a Rotations>, scheme: &Scheme) -> Result<Self> {
        let place = (model.dtype(), model.device());
        Self::from(From::Memory(model), &model.config, rotations, scheme, place)
    }

    /// Of a model in files: gains folded and rotations merged in float64, then rounded once to the files' own type.
    ///
    /// # Errors
    /// Those of [`Rotated::new`], and of reading.
    pub fn open(source: &'a Source, rotations: Option<&'a Rotations>, scheme: &Scheme, device: &Device) -> Result<Self> {
        let place = (source.dtype()?, device.clone());
        Self::from(From::Files(source), source.config(), rotations, scheme, place)
    }

    /// Of a model whose parts come when asked for, in its type, on its device: the values of [`Rotated::new`] of the whole model.
    ///
    /// # Errors
    /// Those of [`Rotated::new`].
    pub fn of(supply: &'a Supply, rotations: Option<&'a Rotations>, scheme: &Scheme) -> Result<Self> {
        let place = (supply.dtype(), supply.device().clone());
        Self::from(From::Supply(supply), supply.config(), rotations, scheme, place)
    }

    fn from(
        from: From<'a>,
        config: &'a LlamaConfig,
        rotations: Option<&'a Rotations>,
        scheme: &Scheme,
        (dtype, device): (DType, Device),
    ) -> Result<Self> {
        let wide = match rotations {
            Some(r) => {
                let wide = r.to_device(&device)?.to_dtype(DType::F64)?;
                wide.check_for(&config.scale_sizes(), TOLERANCE)?;
                weight_clips::check(&wide, config, scheme)?;
                Some(wide)
            }
            None => None,
        };
        let scheme = if rotations.is_some() { *scheme } else { scheme.unrotated() };
        Ok(Self { from, config, scheme, rotations, wide, dtype, device })
    }

    /// Sizes.
    pub fn config(&self) -> &'a LlamaConfig {
        self.config
    }

    /// The scheme of the rotated network.
    pub fn scheme(&self) -> &Scheme {
        &self.scheme
    }

    /// The rotations.
    pub fn rotations(&self) -> Option<&'a Rotations> {
        self.rotations
    }

    /// The element type that is rounded to.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Where the layers are made.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// False where the model's RMSNorm gains are beside its weights rather than in them ([`Llama::load_plain`]).
    pub fn is_folded(&self) -> bool {
        !matches!(self.from, From::Memory(model) if model.blocks.iter().any(|b| b.gains().is_some()))
    }

    /// Puts layers where those of the model are; those of a model in files go to the device.
    ///
    /// # Errors
    /// Those of [`Placer::new`].
    pub(crate) fn placer(&self) -> Result<Placer> {
        let placement = match self.from {
            // Nothing reads the layers that are made here: those that do not stay on the device are in main memory.
            From::Memory(model) => Placement { hosted: usize::MAX, ..model.placement() },
            From::Files(_) | From::Supply(_) => Placement::RESIDENT,
        };
        Placer::new(&self.device, placement, self.config.layers)
    }

    /// What the model is: a SHA-256 of all its weights, as files or as loaded.
    ///
    /// # Errors
    /// Weights that cannot be copied from their device.
    pub fn sha256(&self) -> Result<String> {
        match self.from {
            From::Memory(model) => model.sha256(),
            From::Files(source) => Ok(source.sha256()),
            From::Supply(supply) => supply.sha256(),
        }
    }

    /// `E R1`, `[V, C]`.
    ///
    /// # Errors
    /// Those of reading the model's files; a layer or token that is not there; a failing copy or launch.
    pub fn embedding(&self) -> Result<Tensor> {
        match self.from {
            From::Memory(model) => self.table(&model.embedding),
            From::Files(source) => self.table(&source.embedding(DType::F64)?),
            From::Supply(supply) => self.table(&supply.embedding()?),
        }
    }

    /// `E R1` of these tokens alone, `[tokens, C]`.
    ///
    /// # Errors
    /// Those of reading the model's files; a layer or token that is not there; a failing copy or launch.
    pub fn embed(&self, tokens: &[u32]) -> Result<Tensor> {
        let rows = |table: Tensor| Ok(Tape::new().constant(table).embedding(tokens.into())?.into_value());
        match self.from {
            From::Memory(model) => self.table(&rows(model.embedding.clone())?),
            From::Files(source) => self.table(&rows(source.embedding(DType::F64)?)?),
            From::Supply(supply) => self.table(&rows(supply.embedding()?)?),
        }
    }

    /// `W_head R1`, `[V, C]`.
    ///
    /// # Errors
    /// Those of reading the model's files; a layer or token that is not there; a failing copy or launch.
    pub fn head(&self) -> Result<Tensor> {
        match self.from {
            From::Memory(model) => self.table(&model.head),
            From::Files(source) => self.table(&source.head(DType::F64)?),
            From::Supply(supply) => self.table(&supply.head()?),
        }
    }

    /// Layer `i` with its weights rotated, not quantised.
    ///
    /// # Errors
    /// Those of reading the model's files; a layer or token that is not there; a failing copy or launch.
    pub fn block(&self, i: usize) -> Result<Block> {
        match self.from {
            From::Memory(model) => {
                let block = &model.blocks[i];
                self.complete(i, block.with_weights(self.rotate(i, &block.fetched()?)?))
            }
            From::Files(source) => self.complete(i, Block::new(self.config, i, self.rotate(i, &source.layer(i, DType::F64)?)?)),
            From::Supply(supply) => {
                let block = supply.block(i)?;
                self.complete(i, block.with_weights(self.rotate(i, &block.weights)?))
            }
        }
    }

    /// A rotated layer with its clip constants and what the scales leave in its norms.
    fn complete(&self, i: usize, block: Block) -> Result<Block> {
        let block = match &self.wide {
            Some(r) if !r.clips.is_empty() => block.with_clips(layer_clips(&r.clips, i, self.dtype, &self.device)?),
            _ => block,
        };
        match self.wide.as_ref().and_then(|r| r.scales.get(Scale::Norms)) {
            None => Ok(block),
            Some(logarithms) => {
                let [first, second] = norm_gains(logarithms, i)?;
                Ok(block.with_gains([self.narrow(&first)?, self.narrow(&second)?]))
            }
        }
    }

    /// Logarithms `[kinds, 2]` of the clip ratios that were learned for the weights of layer `i`, where there are some and weights are
    /// quantised: in the type that weights are quantised in, beside them.
    ///
    /// # Errors
    /// No such layer; a failing copy.
    pub fn weight_clips(&self, i: usize) -> Result<Option<Linears<Tensor>>> {
        let clips = self.wide.as_ref().and_then(|r| r.weight_clips.as_ref()).filter(|_| self.scheme.weight_bits < 16);
        let dtype = if self.dtype == DType::F64 { DType::F64 } else { DType::F32 };
        let place = |_, t: &Tensor| t.to_dtype(dtype)?.to_device(&self.device);
        clips.map(|clips| weight_clips::layer_of(clips, i)?.each(place)).transpose()
    }

    /// Layer `i` with its weights rotated, and quantised to nearest as the scheme says, or as ratios that were learned do.
    ///
    /// # Errors
    /// Those of reading the model's files; a layer or token that is not there; a failing copy or launch.
    pub fn nearest(&self, i: usize) -> Result<Block> {
        let spec = self.scheme.sites(self.config.head_dim).weight;
        let block = self.block(i)?;
        let clips = self.weight_clips(i)?;
        let nearest = |linear, w: &Tensor| {
            let (tape, w) = (Tape::new(), w.clone());
            let quantized = match &clips {
                Some(a) => tape.constant(w).clipped_fake_quant(&spec, tape.constant(a[linear].clone()), false)?,
                None => tape.constant(w).fake_quant(&spec)?,
            };
            Ok(quantized.into_value())
        };
        Ok(block.with_weights(block.weights.map_weights(nearest)?))
    }

    /// Layer `i` with weights that were made from it before.
    ///
    /// # Errors
    /// A failing copy or launch.
    pub fn block_of(&self, i: usize, weights: LayerWeights) -> Result<Block> {
        match self.from {
            From::Memory(model) => self.complete(i, model.blocks[i].with_weights(weights)),
            From::Files(_) | From::Supply(_) => self.complete(i, Block::new(self.config, i, weights)),
        }
    }

    fn rotate(&self, i: usize, weights: &LayerWeights) -> Result<LayerWeights> {
        let Some(rotations) = &self.wide else { return weights.map(|w| self.narrow(w)) };
        let sites = Scheme::FULL_PRECISION.online(self.scheme.online).sites(self.config.head_dim);
        let tape = Tape::new();
        let (r1, r2) = (tape.constant(rotations.r1.clone()), tape.constant(rotations.r2.index(i)?));
        let r2b = rotations.r2b.as_ref().map(|t| Ok::<_, Error>(tape.constant(t.index(i)?))).transpose()?;
        let scales = LayerScales::of(&rotations.scales, i, |t| tape.constant(t))?;
        let block = Block::new(self.config, i, weights.map(|w| self.widen(w))?);
        let w = block.transform(&LayerTransforms { r1, r2, r2b, scales }, &sites, None)?;
        w.into_values().map(|w| self.narrow(w))
    }

    fn table(&self, t: &Tensor) -> Result<Tensor> {
        let Some(rotations) = &self.wide else { return self.narrow(t) };
        let tape = Tape::new();
        self.narrow(&tape.constant(self.widen(t)?).matmul(tape.constant(rotations.r1.clone()))?.into_value())
    }

    fn widen(&self, t: &Tensor) -> Result<Tensor> {
        t.to_device(&self.device)?.to_dtype(DType::F64)
    }

    fn narrow(&self, t: &Tensor) -> Result<Tensor> {
        t.to_dtype(self.dtype)?.to_device(&self.device)
    }
}

/// The clip constants of layer `i` as a network of `dtype` reads them.
///
/// # Errors
/// No such layer; a failing copy.
pub(crate) fn layer_clips(
    clips: &ClipEnds,
    i: usize,
    dtype: DType,
    device: &Device,
) -> Result<[Option<Tensor>; Site::ALL.len()]> {
    let dtype = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
    let mut of = [const { None }; Site::ALL.len()];
    for (site, t) in clips.iter() {
        of[site as usize] = Some(t.index(i)?.to_dtype(dtype)?.to_device(device)?);
    }
    Ok(of)
}

/// The gains `[C]` of the two norms of layer `i`, `exp(−a)` of the logarithms `[L, 2, C]`, in `f64` on the CPU.
///
/// # Errors
/// No such layer.
pub(crate) fn norm_gains(logarithms: &Tensor, i: usize) -> Result<[Tensor; 2]> {
    let both = logarithms.index(i)?;
    let gain = |which: usize| {
        let a = both.index(which)?.to_f64_vec()?;
        let n = a.len();
        Tensor::from_vec(a.into_iter().map(|a| (-a).exp()).collect::<Vec<f64>>(), [n])
    };
    Ok([gain(0)?, gain(1)?])
}
