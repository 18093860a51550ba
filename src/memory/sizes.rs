//! The bytes of a step: every tensor that is alive at the worst moment.

use super::{Item, Needs, Work};
use crate::llama::{Linear, LlamaConfig, Plan};
use crate::ops::linear_cross_entropy::rows_at_once;
use crate::quant::{Engine, QuantSpec, Site};
use crate::rotation::Scale;

/// What the bytes and the time of a step are made of.
pub(super) struct Sizes {
    pub c: usize,
    pub f: usize,
    pub vocab: usize,
    pub layers: usize,
    /// Width of all query heads, of all key heads.
    pub q: usize,
    pub kv: usize,
    /// Bytes of a value.
    pub e: usize,
    /// Weights of a layer.
    pub layer: usize,
    /// Biases of a layer, and gains of norms of its heads.
    pub biases: usize,
    /// Heads of q and k have norms.
    pub head_norms: bool,
    pub quantized: bool,
    /// Bytes of what is kept of a layer's weights and of R1 for the gradients of its scales alone.
    pub scaled: usize,
    /// Bytes in `f32` of what a layer's scales multiply of weights and of R1.
    pub multiplied: usize,
    /// Values of a token and layer in front of quantisers whose clip ratios are learned.
    pub clipping: usize,
    /// Those of them that nothing else keeps.
    pub clipped: usize,
    /// Values of R2 and R2b where there is more than one R2 a layer.
    pub r2: usize,
    /// Rows of a layer's weights, or groups of all rows, whose clip ratios are learned.
    pub weight_rows: usize,
    /// Values of a token and layer of which codes are kept, a byte each; weights of a layer alike; the linears that multiply them.
    pub coded: usize,
    pub coded_weights: usize,
    pub on_integers: Vec<Linear>,
    /// Layers that do not stay on the card, and the buffers that they pass through.
    pub streamed: usize,
    pub buffers: usize,
    /// Those of them that are read from files.
    pub read: usize,
}

/// Linears that multiply codes on a GPU that has a kernel for them (`Block::coded` says so of a layer).
fn coded(config: &LlamaConfig, work: &Work) -> Vec<Linear> {
    let sites = work.scheme.sites(config.head_dim);
    let uniform = |spec: &QuantSpec| spec.is_active() && spec.rule.floating().is_none() && spec.group.is_none();
    let all = work.engine == Engine::Integer && sites.weight.symmetric && uniform(&sites.weight) && !work.weight_clips;
    let codes = |l: &Linear| all && !work.clips && uniform(sites.at(l.row().site));
    Linear::ALL.into_iter().filter(codes).collect()
}

impl Sizes {
    pub fn new(config: &LlamaConfig, work: &Work) -> Self {
        let (c, f) = (config.hidden_size, config.intermediate_size);
        let (q, kv) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
        let layer = Linear::ALL.map(|l| l.shape(config)[0] * l.shape(config)[1]).iter().sum();
        let biases: usize = Linear::ALL.into_iter().filter(|l| l.has_bias(config)).map(|l| l.shape(config)[0]).sum();
        let gains = Linear::ALL.into_iter().filter(|l| l.has_norm(config)).count() * config.head_dim;
        let (quantized, head_norms) = (work.scheme.weight_bits < 16, config.family.facts().head_norms);
        let (vocab, layers, e) = (config.vocab_size, config.layers, work.dtype.size());
        let is = |kind: Scale| work.transforms.has(kind) && kind.refused(&config.scale_sizes()).is_none();
        let (up_down, scaled_norms) = (is(Scale::UpDown), is(Scale::Norms));
        let of = |scaled: bool, rows: usize| if scaled { 4 * c * rows } else { 0 };
        let (heads, general) = (work.transforms.heads(), is(Scale::ValuesGeneral));
        // The output of up is divided rather than its rows, where grids allow it; the scales of a norm multiply R1, once for each norm.
        let rows = if work.scheme.sites(config.head_dim).weight.follows_rows() { f } else { 2 * f };
        let turned = of(is(Scale::RopePairs), q + kv);
        // Scales of values are multiplied into R2, a head at a time.
        let multiplied = of(up_down, rows) + of(scaled_norms, 2 * c) + turned;
        // What those of up and down multiply is kept in the weights' type. R1 times those of a norm is kept where it stands for gate and up.
        let kept = if up_down { e * c * rows } else { 0 } + of(scaled_norms && !quantized, c);
        let scaled = kept + turned;
        // Those of every head; one R2 a layer is little beside R1.
        let (d, each) = (config.head_dim, if heads { config.kv_heads } else { 1 });
        let r2 = d * d * layers * each;
        let r2 = if heads { r2 } else { 0 } + if general { r2 } else { 0 };
        let width = |site| match site {
            Site::AttentionInput | Site::MlpInput => c,
            Site::Key | Site::Value => kv,
            Site::AttentionOutput => q,
            Site::DownInput => f,
        };
        let sites = if work.clips { work.scheme.active_sites() } else { vec![] };
        // Attention keeps its own output.
        let clipped = sites.iter().copied().filter(|&site| site != Site::AttentionOutput).map(width).sum();
        let clipping = sites.into_iter().map(width).sum();
        let rows = |l: Linear| {
            let [out, inputs] = l.shape(config);
            out * (inputs / work.scheme.weight_group.unwrap_or(inputs).max(1))
        };
        let weight_rows = if quantized && work.weight_clips { Linear::ALL.map(rows).iter().sum() } else { 0 };
        let codes = coded(config, work);
        let coded_weights = codes.iter().map(|l| l.shape(config)[0] * l.shape(config)[1]).sum();
        let coded = Site::ALL.into_iter().filter(|&site| codes.iter().any(|l| l.row().site == site)).map(width).sum();
        let placement = work.placement.unwrap_or_default();
        let streamed = placement.streamed(layers);
        Self {
            c,
            f,
            vocab,
            layers,
            q,
            kv,
            e,
            layer,
            biases: biases + gains,
            head_norms,
            quantized,
            scaled,
            multiplied,
            clipping,
            clipped,
            r2,
            weight_rows,
            coded,
            coded_weights,
            on_integers: codes,
            streamed,
            read: placement.read(layers),
            buffers: if streamed == 0 { 0 } else { placement.buffers.min(streamed).max(2) },
        }
    }

    /// The part of a layer's weights whose products are of integers.
    pub fn part_on_integers(&self) -> f64 {
        self.coded_weights as f64 / self.layer as f64
    }

    /// Bytes of a layer.
    fn bytes_of_layer(&self) -> usize {
        (self.layer + self.biases) * self.e
    }

    /// Bytes of the model on the card.
    pub fn weights(&self) -> usize {
        2 * self.vocab * self.c * self.e + (self.layers - self.streamed) * self.bytes_of_layer()
    }

    /// Bytes of the layers in main memory, and of what others are read into: two buffers, and the layer that is being read.
    pub fn host(&self) -> usize {
        let reading = if self.read > 0 { 3 } else { 0 };
        (self.streamed - self.read + reading) * self.bytes_of_layer()
    }

    /// Bytes that a step reads from files. Those layers come first: what is in the buffers where a step ends is there for the next one, and
    /// in the middle of a step as far as the layers in main memory leave some.
    pub fn files(&self, work: &Work, micro: usize) -> usize {
        let once = if self.streamed <= self.buffers { 0 } else { self.read };
        let begins = once.saturating_sub(self.buffers);
        let turns = once.saturating_sub(self.buffers.saturating_sub(self.streamed - self.read));
        let layers = match work.needs {
            Needs::Rows => once,
            Needs::Network => begins + turns,
            Needs::Logits | Needs::States => once + begins + turns,
        };
        work.batch.div_ceil(micro) * layers * self.bytes_of_layer()
    }

    /// Bytes that a step copies to the card. What is in the buffers where passes turn round is there already.
    pub fn moved(&self, work: &Work, micro: usize) -> usize {
        if self.streamed <= self.buffers {
            return 0;
        }
        let (once, twice) = (self.streamed, 2 * (self.streamed - self.buffers));
        let layers = match work.needs {
            Needs::Rows => once,
            Needs::Network => twice,
            Needs::Logits | Needs::States => once + twice,
        };
        work.batch.div_ceil(micro) * layers * self.bytes_of_layer()
    }

    /// Layers that are computed again: those in main memory always are.
    pub fn recomputed(&self, plan: &Plan) -> usize {
        plan.recompute.max(self.streamed).min(self.layers)
    }

    /// The buffers of layers in main memory, where there are some.
    fn ring(&self) -> Option<Item> {
        (self.buffers > 0).then(|| ("buffers of layers that do not stay", self.buffers * self.bytes_of_layer()))
    }

    /// Bytes kept of a layer by its forward pass, for so many tokens: inputs of both norms, quantised inputs of the linears, q, k, v
    /// and the output of attention, gate and up; q and k in front of their norms, everything in front of quantisers that are learned.
    fn kept(&self, tokens: usize) -> usize {
        let normed = if self.head_norms { self.q + self.kv } else { 0 };
        tokens * self.e * (4 * self.c + 3 * self.q + 2 * self.kv + 3 * self.f + normed + self.clipped)
            - tokens * (self.e - 1) * self.coded
    }

    /// Bytes of a layer's rotated weights and biases, with the products in `f32` that the gradients of R2 and of scales need, and the
    /// unquantised weights that those of their clip ratios do.
    fn rotated(&self) -> usize {
        // Unquantised gate and up stay as they are.
        let rotated = self.layer - if self.quantized { 0 } else { 2 * self.c * self.f };
        // In front of their quantisers too, where these are learned.
        let twice = if self.weight_rows > 0 { self.layer } else { 0 };
        (rotated + twice + self.biases) * self.e - (self.e - 1) * self.coded_weights
            + 4 * self.c * (self.q + self.kv)
            + self.scaled
    }

    /// Bytes of a layer's forward pass of the full-precision model, for so many tokens: the stream and its norm, gate, up and their
    /// product, or q, k, v and the output of attention.
    fn forward(&self, tokens: usize) -> usize {
        tokens * self.e * (3 * self.c + (3 * self.f).max(2 * (self.q + self.kv)))
    }

    /// Values of a token and layer that R1 and R2 turn: the inputs of q, k, v and of gate, up; V and the input of o.
    pub fn turned(&self) -> usize {
        2 * self.c + self.kv + self.q
    }

    /// What rotations, their gradients and the optimiser take.
    fn rotations(&self) -> Item {
        // Clip ratios of weights, a layer's twice, and their gradients, stacked too; Adam's moments are on the host.
        let clips = 2 * 4 * 4 * self.layers * self.weight_rows;
        ("rotations, their gradients and the optimiser", (9 * 4 + 16) * (self.c * self.c + self.r2) + clips)
    }

    /// Every item of a step of a local objective that captures rows of `micro` sequences at once.
    fn items_of_rows(&self, work: &Work, micro: usize) -> Vec<Item> {
        let tokens = micro * work.seq;
        // In f32 once normalised, beside the slope of what is minimised; before that in the model's type, while it runs.
        let (rows, captured) = (self.layers * tokens * self.turned() * 8, self.layers * tokens * self.turned() * self.e);
        let turning = 8 * tokens * self.c.max(self.q);
        // Held-out windows are scored by cross entropy in between.
        let scoring = self.forward(tokens) + self.rotated() + rows_at_once(self.vocab).min(tokens) * self.vocab * self.e;
        let running = (captured + self.forward(tokens)).max(scoring).saturating_sub(rows);
        let all = [
            ("weights", self.weights()),
            self.rotations(),
            ("captured rows and their gradients", rows),
            ("a layer at work", turning.max(running)),
            ("workspace", 192 << 20),
        ];
        all.into_iter().chain(self.ring()).collect()
    }

    /// Every item of a step that runs `micro` sequences at once as planned.
    pub fn items(&self, work: &Work, plan: &Plan, micro: usize) -> Vec<Item> {
        if work.needs == Needs::Rows {
            return self.items_of_rows(work, micro);
        }
        let (tokens, c, e) = (micro * work.seq, self.c, self.e);
        let part = if plan.sequences == 0 { micro } else { plan.sequences.min(micro) } * work.seq;
        let recomputed = self.recomputed(plan);
        let kept = self.layers - recomputed;
        // Gradients of the parts add up in f32, beside one part's own.
        let gradients = self.layer * if part < tokens { e + 4 } else { e };
        let wide = if e == 2 { c * self.f.max(self.q) * (4 + 2 + 2) } else { 0 };
        // Gradients of scaled weights are in f32 on their way to the scales.
        let wide = wide + if self.scaled > 0 { 2 * 4 * c * self.f.max(self.q) } else { 0 };
        // The backward pass of a layer: gradients of gate, up and their product, and of the stream.
        let backward = |tokens: usize| tokens * e * (3 * self.f + 4 * c);
        // The values of codes that a gradient reads: those of one linear at a time.
        let decoded = |tokens: usize| if self.coded == 0 { 0 } else { e * c.max(self.f) * tokens.max(c) };
        let backward = |tokens: usize| backward(tokens) + decoded(tokens);
        // The layers that keep their values are last, and gone when the others' turn comes.
        let again = if recomputed > 0 { self.kept(part) + backward(part) } else { 0 };
        let values = kept * self.kept(tokens);
        let live = if kept > 0 { backward(tokens).max(again.saturating_sub(values)) } else { again };
        let inputs = recomputed * tokens * c * e;
        // Those of a layer in main memory are made again whatever the plan.
        let stay = self.layers - self.streamed + usize::from(self.streamed > 0);
        let rotated = if plan.keep_weights { stay } else { kept + 1 } * self.rotated();
        let layer = live + gradients + wide + 2 * tokens * c * e;
        let whole = tokens * self.vocab * e;
        let (logits, layer) = match work.needs {
            Needs::Logits => {
                // Both models' are there between the passes through the layers, the full-precision model's already during the first;
                // before that it runs itself. What is larger counts: the items add up to it.
                // Of a mixture, the gradient of cross entropy by what the head reads is kept beside them.
                let both = 2 * whole + 4 * tokens * c * e;
                let forward = whole + self.forward(part) + wide;
                let teacher = (whole + self.forward(tokens)).saturating_sub(inputs + values + rotated);
                (("logits of both models", both), layer.max(forward).max(teacher).saturating_sub(both))
            }
            Needs::States => {
                let teacher = self.forward(tokens).saturating_sub(inputs + values + rotated);
                (("hidden states of both models", (2 * self.layers + 3) * tokens * c * e), layer.max(teacher))
            }
            _ => (("logits", rows_at_once(self.vocab).min(tokens) * self.vocab * e + 3 * tokens * c * e), layer),
        };
        let all = [
            ("weights", self.weights()),
            self.rotations(),
            ("inputs of recomputed layers", inputs),
            ("values of the other layers", values),
            ("rotated weights", rotated),
            ("a layer at work", layer),
            logits,
            ("workspace", 192 << 20),
        ];
        all.into_iter().chain(self.ring()).collect()
    }
}
