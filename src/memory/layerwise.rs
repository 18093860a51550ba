//! What quantising takes where a layer at a time is read or made, quantised and written: no more for more layers.

use super::Item;
use crate::llama::{Linear, LlamaConfig};
use crate::{DType, Error, Result};

/// How weights are quantised.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Layerwise {
    /// Tokens of calibration text; 0 where none is read.
    pub tokens: usize,
    /// Hessians are made of it.
    pub hessians: bool,
    /// The text goes through the network in full precision as well.
    pub twice: bool,
}

/// What one layer takes at the worst moment.
#[derive(Clone, Debug, PartialEq)]
pub struct OneLayer {
    /// On the card.
    pub card: Vec<Item>,
    /// In main memory beside it.
    pub host: Vec<Item>,
}

impl OneLayer {
    /// The sum on the card.
    pub fn on_card(&self) -> usize {
        self.card.iter().map(|item| item.1).sum()
    }

    /// The sum in main memory.
    pub fn in_main_memory(&self) -> usize {
        self.host.iter().map(|item| item.1).sum()
    }

    /// Checks that so many bytes of the card and of main memory are enough.
    ///
    /// # Errors
    /// Of which memory how much is missing.
    pub fn check(&self, card: usize, host: usize) -> Result<()> {
        let gib = |bytes: usize| bytes as f64 / f64::from(1 << 30);
        for (what, needs, free) in [("the card", self.on_card(), card), ("main memory", self.in_main_memory(), host)] {
            if needs > free {
                let message = format!(
                    "{what} is short by {:.1} GiB: a layer at a time needs {:.1}, {:.1} are free",
                    gib(needs - free),
                    gib(needs),
                    gib(free)
                );
                return Err(Error::argument("memory", message));
            }
        }
        Ok(())
    }
}

/// What quantising a network of this configuration takes, with weights and activations of `dtype`.
///
/// While a layer is rotated, its weights are there as read, in `f64` before and after, and rounded. While it is quantised, they are there
/// rounded and quantised, and of the widest input the Hessian, what is factored and its workspace in `f64`, and the factor in `f32`; the
/// corrections of a second pass of the text add four matrices in `f64`. The text is there in front of the layer and as the input of a linear.
pub fn layerwise(config: &LlamaConfig, dtype: DType, how: Layerwise) -> OneLayer {
    let size = dtype.size();
    let shapes = Linear::ALL.map(|l| l.shape(config));
    let weights: usize = shapes.iter().map(|[rows, inputs]| rows * inputs).sum();
    let widest = shapes.iter().map(|[_, inputs]| *inputs).max().expect("seven linears");
    let largest = shapes.iter().map(|[rows, inputs]| rows * inputs).max().expect("seven linears");
    let table = config.vocab_size * config.hidden_size;
    let (c, inner) = (config.hidden_size, (config.heads * config.head_dim).max(config.intermediate_size));
    let texts = if how.twice { 2 } else { 1 };
    let behind = how.tokens * c * size * texts;
    let text = how.tokens * (c + inner) * size * texts;
    let square = widest * widest;
    let hessian = if how.hessians { square * if how.twice { 28 + 32 } else { 28 } } else { 0 };
    // Rounded to nearest, a weight is at most five times there: as it was, widened, its codes, its values.
    let sweep = largest * 16;
    let rotating = [("weights of a layer, as read, in f64 and rotated", weights * (2 * size + 16)), (TEXT, behind)];
    let quantising =
        [("weights of a layer, and quantised", 3 * weights * size + sweep), (TEXT, text), ("Hessian and its factor", hessian)];
    // Nothing else is there but a table, in f64 before and after, and what is made of it.
    let tables = [("embedding or head, as read, in f64 and rotated", table * (2 * size + 16)), (TEXT, behind)];
    let sum = |items: &[Item]| items.iter().map(|item| item.1).sum::<usize>();
    let phases = [rotating.to_vec(), quantising.to_vec(), tables.to_vec()];
    let mut card = phases.into_iter().max_by_key(|items| sum(items)).expect("three");
    card.retain(|item| item.1 > 0);
    card.push(("workspace", WORKSPACE));
    // A layer as it is read, its codes in 16 bits and as they are packed; or both tables, as they are written.
    let host = (weights * (size + 3)).max(2 * table * size);
    OneLayer { card, host: vec![("a layer as read and its codes, or embedding and head", host)] }
}

/// Bytes of the codes of all linears of a network of this configuration, one a weight, for products of integers.
pub fn codes(config: &LlamaConfig) -> usize {
    config.layers * Linear::ALL.map(|l| l.shape(config)).iter().map(|[rows, inputs]| rows * inputs).sum::<usize>()
}

const TEXT: &str = "calibration text at a layer";
/// For the libraries, and for memory that is free but in pieces.
const WORKSPACE: usize = 2 << 30;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::llama::synthetic;

    /// The numbers that the records measured, and what is asked of the largest model.
    #[test]
    fn depth_costs_nothing_and_the_records_fit() {
        let gptq = |name: &str, twice| {
            let how = Layerwise { tokens: 128 * 2048, hessians: true, twice };
            layerwise(&synthetic::shape(name).unwrap(), DType::BF16, how)
        };
        let gib = |bytes: usize| bytes as f64 / f64::from(1 << 30);
        assert_eq!(gptq("llama-2-70b:10", false), gptq("llama-2-70b", false));
        // Measured with three layers in memory (0.8 GiB more): 12.86 GiB.
        let seven = gib(gptq("llama-2-7b", false).on_card());
        assert!((12.0..15.5).contains(&seven), "{seven}");
        let seventy = gptq("llama-2-70b", false);
        assert!((45.0..70.0).contains(&gib(seventy.on_card())) && gib(seventy.in_main_memory()) < 8.0, "{seventy:?}");
        assert!(gptq("llama-2-70b", true).on_card() > seventy.on_card());
        seventy.check(78 << 30, 120 << 30).unwrap();
        let short = seventy.check(24 << 30, 120 << 30).unwrap_err().to_string();
        assert!(short.contains("the card is short by") && short.contains("24.0 are free"), "{short}");
        let short = seventy.check(78 << 30, 1 << 30).unwrap_err().to_string();
        assert!(short.contains("main memory is short by"), "{short}");
        // Rounding to nearest needs no text.
        let nearest = layerwise(&synthetic::shape("llama-2-70b").unwrap(), DType::BF16, Layerwise::default());
        assert!(nearest.on_card() < 24 << 30 && nearest.card.iter().all(|item| item.0 != TEXT), "{nearest:?}");
    }
}
