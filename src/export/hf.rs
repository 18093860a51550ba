//! A layer in the Hugging Face layout: one tensor a linear, or, in the files of some families, one for several.

use super::parts::{Part, Raw};
use super::{Stored, StoredLayer};
use crate::llama::{Affine, Linear, Linears, LlamaConfig};
use crate::{DType, Result, Tensor};

/// The weights of a layer, linears joined where the family's files have them joined.
pub fn pack(raws: &mut Vec<Raw>, config: &LlamaConfig, weights: &StoredLayer, dtype: DType, layer: usize) -> Result<()> {
    let values = weights.each(|_, l| l.weight.values(dtype))?;
    for (file, members) in Linear::files(config) {
        let members: Vec<Tensor> = members.into_iter().map(|linear| values[linear].clone()).collect();
        let whole = if let [only] = &members[..] { only.clone() } else { Tensor::concat(&members)? };
        raws.push(Raw::new(format!("model.layers.{layer}.{file}.weight"), &whole)?);
    }
    Ok(())
}

/// A layer that [`pack`] wrote, with its biases and norms.
pub fn read_layer(part: &Part, config: &LlamaConfig, dtype: DType, layer: usize) -> Result<StoredLayer> {
    Linears::try_from_fn(|linear| {
        let ([_, inputs], rows) = (linear.shape(config), linear.rows(config));
        let whole = part.tensor(&format!("model.layers.{layer}.{}.weight", rows.file), dtype, &[rows.of, inputs])?;
        let weight = Stored::Values(whole.slice(rows.first, rows.count)?);
        let [bias, norm] = super::native::beside(part, config, dtype, layer, linear)?;
        Ok(Affine { weight, bias, norm })
    })
}
