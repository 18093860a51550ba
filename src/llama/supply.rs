//! A model that is nowhere as a whole: its parts are read from files, or made, when they are asked for.

use std::sync::OnceLock;

use crate::llama::model::{digest_of, digests};
use crate::llama::synthetic::Maker;
use crate::llama::{Affine, Block, LayerWeights, Linear, Linears, LlamaConfig, Source};
use crate::{DType, Device, Result, Tensor};

/// A model whose layers come one at a time, in one element type and to one device: the values of the
/// [`Llama`](crate::llama::Llama) that is read or made in the same way, without the memory for all of them.
#[derive(Debug)]
pub struct Supply {
    from: From,
    dtype: DType,
    device: Device,
    /// Of a synthetic model: making it takes a pass through all layers.
    head: OnceLock<Tensor>,
}

#[derive(Debug)]
enum From {
    Files(Source),
    Made(Maker),
}

impl Supply {
    /// Of a model's files, as [`Llama::read`](crate::llama::Llama::read) loads them.
    pub fn files(source: Source, dtype: DType, device: &Device) -> Self {
        Self { from: From::Files(source), dtype, device: device.clone(), head: OnceLock::new() }
    }

    /// Of a synthetic model, as [`synthetic::model`](crate::llama::synthetic::model) makes it.
    ///
    /// # Errors
    /// Those of [`LlamaConfig::validate`].
    pub fn synthetic(config: &LlamaConfig, seed: u64, dtype: DType, device: &Device) -> Result<Self> {
        let maker = Maker::new(config, seed, dtype, device)?;
        Ok(Self { from: From::Made(maker), dtype, device: device.clone(), head: OnceLock::new() })
    }

    /// Sizes.
    pub fn config(&self) -> &LlamaConfig {
        match &self.from {
            From::Files(source) => source.config(),
            From::Made(maker) => maker.config(),
        }
    }

    /// The element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Where the parts come to.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// `[V, C]`.
    ///
    /// # Errors
    /// Those of reading or making it; a failing copy to the device.
    pub fn embedding(&self) -> Result<Tensor> {
        match &self.from {
            From::Files(source) => source.embedding(self.dtype)?.to_device(&self.device),
            From::Made(maker) => maker.embedding(),
        }
    }

    /// `[V, C]`, the final norm's gain folded in.
    ///
    /// # Errors
    /// Those of reading or making it; a failing copy to the device.
    pub fn head(&self) -> Result<Tensor> {
        let maker = match &self.from {
            From::Files(source) => return source.head(self.dtype)?.to_device(&self.device),
            From::Made(maker) => maker,
        };
        if let Some(head) = self.head.get() {
            return Ok(head.clone());
        }
        let head = maker.head()?;
        Ok(self.head.get_or_init(|| head).clone())
    }

    /// Layer `l`.
    ///
    /// # Errors
    /// No such layer; those of reading or making it; a failing copy to the device.
    pub fn block(&self, l: usize) -> Result<Block> {
        match &self.from {
            From::Files(source) => Block::new(source.config(), l, source.layer(l, self.dtype)?).to_device(&self.device),
            From::Made(maker) => maker.block(l),
        }
    }

    /// The weights of layer `l` in main memory, for the thread that reads layers ahead.
    ///
    /// # Errors
    /// No such layer; those of reading or making it.
    pub(crate) fn weights(&self, l: usize) -> Result<LayerWeights> {
        match &self.from {
            From::Files(source) => source.layer(l, self.dtype),
            From::Made(maker) => Ok(maker.on(&Device::Cpu).block(l)?.weights),
        }
    }

    /// Layer `l` with the shapes of its weights, and no values.
    pub(crate) fn outline(&self, l: usize) -> Block {
        let config = self.config();
        let nowhere = |shape: &[usize]| Tensor::nowhere(shape, self.dtype);
        let weights = Linears(Linear::ALL.map(|linear| {
            let [out, inputs] = linear.shape(config);
            Affine {
                weight: nowhere(&[out, inputs]),
                bias: linear.has_bias(config).then(|| nowhere(&[out])),
                norm: linear.has_norm(config).then(|| nowhere(&[config.head_dim])),
            }
        }));
        Block::new(config, l, weights)
    }

    /// What [`Llama::sha256`](crate::llama::Llama::sha256) is of the whole model: every layer is read or made for it, one at a time.
    ///
    /// # Errors
    /// Those of reading and making the parts; a failing copy from the device.
    pub fn sha256(&self) -> Result<String> {
        let mut all = digests(&[&self.embedding()?, &self.head()?])?;
        for l in 0..self.config().layers {
            all.extend(digests(&self.block(l)?.weights.tensors().collect::<Vec<_>>())?);
        }
        Ok(digest_of(&all))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::llama::{Llama, synthetic};

    /// A supply is the model that is made as a whole, part by part and by its SHA-256.
    #[test]
    fn parts_are_those_of_the_whole() {
        for name in ["tiny:3", "tiny:1"] {
            let config = synthetic::shape(name).unwrap();
            for dtype in [DType::F32, DType::BF16] {
                let whole: Llama = synthetic::model(&config, 3, dtype, &Device::Cpu).unwrap();
                let supply = Supply::synthetic(&config, 3, dtype, &Device::Cpu).unwrap();
                let same = |a: &Tensor, b: &Tensor| assert_eq!(a.as_bytes().unwrap(), b.as_bytes().unwrap());
                same(&supply.embedding().unwrap(), &whole.embedding);
                same(&supply.head().unwrap(), &whole.head);
                for l in (0..config.layers).rev() {
                    let block = supply.block(l).unwrap();
                    block.weights.tensors().zip(whole.blocks[l].weights.tensors()).for_each(|(a, b)| same(a, b));
                }
                assert_eq!(supply.sha256().unwrap(), whole.sha256().unwrap());
            }
        }
    }
}
