//! The time of a step: products at the card's rate, bytes at its bandwidth, copies from main memory as far as nothing hides them.

use super::sizes::Sizes;
use super::{Needs, Work};
use crate::device::Card;
use crate::llama::{LlamaConfig, Plan};

/// Bytes that a GPU gets from others of its host through NVLink, each second, when all gather: below the 329 GB/s that two H100 reach in sums.
const LINKS: f64 = 280e9;
/// The forward pass's part of the work on a layer that is computed again.
const FORWARD: f64 = 0.3;

/// How much faster products of codes are than those of 16-bit values (measured on an H200).
const INTEGERS: f64 = 1.55;

impl Sizes {
    /// Seconds of a step.
    pub fn seconds(&self, config: &LlamaConfig, work: &Work, plan: &Plan, micro: usize, card: &Card) -> f64 {
        let compute = self.compute(config, work, plan, micro, card);
        // A layer's copy hides behind the work on those that are in main memory like it, in the same pass.
        let hides = compute * self.streamed as f64 / self.layers as f64;
        let copies = self.moved(work, micro) as f64 / card.uploads;
        let parts: &[f64] = if work.needs == Needs::Rows { &[1.0] } else { &[FORWARD, 1.0 - FORWARD] };
        let waits = |bytes: f64, hides: f64| {
            let each = parts.iter().map(|part| (bytes / parts.len() as f64 - part * hides).max(0.0));
            each.sum::<f64>()
        };
        // What is read is copied too; the slower of both counts.
        let reads = self.files(work, micro) as f64 / card.reads;
        compute + waits(copies, hides).max(waits(reads, compute * self.read as f64 / self.layers as f64))
    }

    /// Seconds of the work on the card.
    fn compute(&self, config: &LlamaConfig, work: &Work, plan: &Plan, micro: usize, card: &Card) -> f64 {
        if work.needs == Needs::Rows {
            return self.compute_of_rows(config, work, card);
        }
        let tokens = (work.batch * work.seq) as f64;
        let rounds = work.batch.div_ceil(micro) as f64;
        let (layers, c) = (self.layers as f64, self.c as f64);
        let recomputed = self.recomputed(plan) as f64;
        let layer = self.layer as f64;
        let linear = 2.0 * tokens * layer;
        let attention = 2.0 * work.batch as f64 * (work.seq as f64).powi(2) * (config.heads * config.head_dim) as f64;
        let rotation = 2.0 * layer * c;
        // Unquantised gate and up are left alone; their input is rotated instead.
        let inside = if self.quantized { 1.0 } else { 1.0 - 2.0 * (self.c * self.f) as f64 / layer };
        let outside = if self.quantized { 0.0 } else { 2.0 * tokens * c * c };
        let again = if plan.keep_weights { self.streamed as f64 } else { recomputed };
        // Ranks make a part of the rows of weights each, gather them, and give one another the sums of their gradients.
        let ranks = work.ranks.max(1) as f64;
        let gathered = rounds * (2.0 * layers + again) * layer * inside * self.e as f64 * (1.0 - 1.0 / ranks) / LINKS;
        let products = layers * (linear * (2.0 + inside) + 3.0 * outside)
            + recomputed * (linear * (1.0 - (self.c * self.f) as f64 / layer) + outside)
            + rounds * (2.0 * layers + again) * rotation * inside / ranks
            + 4.0 * tokens * c * self.vocab as f64
            + 8.0 * tokens * c * c;
        // Forward and again, of what multiplies codes.
        let faster = (layers + recomputed) * linear * self.part_on_integers() * (1.0 - 1.0 / INTEGERS);
        let products = products - faster;
        let scores = attention * (layers * 3.5 + recomputed) * 1.4;
        // Activations read and written around the products: so many passes over [tokens, C] and [tokens, F] a layer.
        let passes = |c: f64, f: f64| tokens * self.e as f64 * (c * self.c as f64 + f * self.f as f64);
        let moved = layers * (passes(34.0, 6.0) + passes(36.0, 11.0)) + recomputed * passes(32.0, 6.0);
        let weights = rounds * (layers + again) * layer * (14.0 + 8.0);
        // Products in f32 written, scaled, and read twice on the way back; norms and the activation scale what they make in passing.
        let weights = weights + rounds * (layers + again) * 4.0 * self.multiplied as f64;
        // Quantised by a pass of their own, and read again on the way back.
        let moved = moved + (5.0 * layers + 2.0 * recomputed) * tokens * (self.e * self.clipping) as f64;
        // Values of codes are written and read again for gradients: of an input by each of up to three linears, of a weight by one.
        let codes = tokens * (2 + self.e) as f64 * 2.5 * self.coded as f64 + 2.0 * self.e as f64 * self.coded_weights as f64;
        let moved = moved + layers * codes;
        // 80 candidates a value, or by ratios that are learned one, and the unquantised weights read again on the way back.
        let weights =
            weights + if self.weight_rows > 0 { rounds * (2.0 * layers + again) * 3.0 * layer * self.e as f64 } else { 0.0 };
        // Gradients of R1 are added by every rank.
        let weights = weights / ranks + rounds * layers * 7.0 * 16.0 * c * c;
        let search = if self.quantized && self.weight_rows == 0 {
            rounds * (layers + again) * layer * 1.8e-11 * (2.8e12 / card.bandwidth) / ranks
        } else {
            0.0
        };
        let more = match work.needs {
            Needs::Logits => {
                let vocab = self.vocab as f64;
                // The full-precision model's pass; logits of both are written, read, and their gradient written and read.
                let products = layers * (linear + 1.4 * attention) + 2.0 * tokens * c * vocab;
                let moved = layers * passes(20.0, 5.0) + 6.0 * tokens * vocab * self.e as f64;
                products / card.products + moved / card.bandwidth
            }
            Needs::States => {
                // The same pass, and of each layer a product by R1 with its two gradients; states written, subtracted, squared, and back.
                let products = layers * (linear + 1.4 * attention + 4.0 * tokens * c * c);
                products / card.products + layers * (passes(30.0, 5.0)) / card.bandwidth
            }
            _ => 0.0,
        };
        (products + scores) / card.products + (moved + weights) / card.bandwidth + search + gathered + more
    }

    /// Seconds of a step of a local objective: a pass of the full-precision model, and every row turned once and multiplied by its
    /// slope once, in `f32`, which large GPUs multiply about thirteen times slower than 16-bit types.
    fn compute_of_rows(&self, config: &LlamaConfig, work: &Work, card: &Card) -> f64 {
        let (tokens, layers, c) = ((work.batch * work.seq) as f64, self.layers as f64, self.c as f64);
        let attention = 2.0 * work.batch as f64 * (work.seq as f64).powi(2) * (config.heads * config.head_dim) as f64;
        let pass = layers * (2.0 * tokens * self.layer as f64 + 1.4 * attention);
        let heads = ((self.q + self.kv) * config.head_dim) as f64;
        let turning = layers * 4.0 * tokens * (2.0 * c * c + heads);
        // Captured, widened, normalised, turned, measured, multiplied.
        let moved = layers * tokens * (self.turned() * (2 * self.e + 10 * 4) + self.e * (20 * self.c + 5 * self.f)) as f64;
        (pass + 13.0 * turning) / card.products + moved / card.bandwidth
    }
}
