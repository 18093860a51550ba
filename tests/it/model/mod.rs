//! Laws of whole networks: what rotations leave alone, and that gradients are right.

mod clip_objective;
mod clips;
mod engine;
mod learning;
mod ranks;
mod scales;
mod weight_clips;

use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use spinquant::llama::{
    Family, LayerWeights, Linear, Linears, Llama, LlamaConfig, Plan, Recompute, RopeScaling, RotationVars, WeightClipVars,
    Weights,
};
use spinquant::manifold::{Manifold, Orthogonal};
use spinquant::quant::{Online, R4, Scheme};
use spinquant::rotation::Rotations;
use spinquant::{DType, Tape, Tensor, Var, check, ops};

use crate::common::need::cases;
use crate::common::{distance, tiny};

const FULL: Scheme = Scheme::FULL_PRECISION;
/// Every model here has an even inner width.
const ONLINE: [Online; 5] = [
    Online::NONE,
    Online { r3: true, r4: R4::Off },
    Online { r3: false, r4: R4::Whole },
    Online::BOTH,
    Online { r3: false, r4: R4::Blocks(2) },
];

fn config(heads: [usize; 2], head_dim: usize, hidden_size: usize, intermediate_size: usize) -> LlamaConfig {
    LlamaConfig {
        hidden_size,
        intermediate_size,
        layers: 2,
        heads: heads[0],
        kv_heads: heads[1],
        head_dim,
        vocab_size: 19,
        rms_norm_eps: 1e-5,
        max_position_embeddings: 64,
        rope_theta: 10000.0,
        tie_word_embeddings: false,
        bos_token_id: None,
        eos_token_ids: vec![],
        dtype: None,
        ..LlamaConfig::default()
    }
}

prop_compose! {
    /// Every family; GQA, MHA and MQA; tied or not; with and without biases; odd widths; MLP widths K·2^m and, at 22 and 74, block-diagonal ones.
    fn configs()(
        heads in prop::sample::select(vec![[1, 1], [3, 3], [4, 4], [4, 2], [6, 2], [6, 3], [4, 1], [5, 1]]),
        half in 2usize..=8,
        hidden_size in prop::sample::select(vec![8, 12, 15, 24, 28, 33]),
        intermediate_size in prop::sample::select(vec![12, 24, 56, 40, 36, 22, 74]),
        layers in 1usize..=2,
        tie_word_embeddings: bool,
        [attention_bias, mlp_bias]: [bool; 2],
        llama3: bool,
        family in prop::sample::select(Family::ALL.to_vec()),
    ) -> LlamaConfig {
        let rope_scaling = llama3.then_some(RopeScaling::Llama3 {
            factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_max_position_embeddings: 32,
        });
        let shape = config(heads, 2 * half, hidden_size, intermediate_size);
        tiny::of_family(LlamaConfig { layers, tie_word_embeddings, attention_bias, mlp_bias, rope_scaling, ..shape }, family)
    }
}

fn model(config: &LlamaConfig, seed: u64) -> Llama {
    Llama::new(config.clone(), Weights::random(config, seed).unwrap()).unwrap()
}

/// The same model after `change` of every layer's weights, in another type.
fn changed(m: &Llama, dtype: DType, change: impl Fn(usize, LayerWeights) -> LayerWeights) -> Llama {
    let cast = |t: &Tensor| t.to_dtype(dtype);
    let layers = m.blocks.iter().map(|b| change(b.index, b.weights.map(cast).unwrap())).collect();
    let weights = Weights { embedding: cast(&m.embedding).unwrap(), head: cast(&m.head).unwrap(), layers };
    Llama::new(m.config.clone(), weights).unwrap()
}

fn cast(m: &Llama, dtype: DType) -> Llama {
    changed(m, dtype, |_, w| w)
}

fn tokens(m: &Llama, count: usize, seed: u64) -> Vec<u32> {
    let noise = ops::randn([count], seed).into_vec::<f64>().unwrap();
    noise.iter().map(|x| (x.abs() * 1e6) as u32 % m.config.vocab_size as u32).collect()
}

fn orthogonal(m: &Llama, seed: u64) -> Rotations {
    let LlamaConfig { hidden_size, head_dim, layers, .. } = m.config;
    Rotations::random_orthogonal(hidden_size, head_dim, layers, seed).unwrap()
}

fn hadamard(m: &Llama, seed: u64) -> Rotations {
    let LlamaConfig { hidden_size, head_dim, layers, .. } = m.config;
    Rotations::random_hadamard(hidden_size, head_dim, layers, seed).unwrap()
}

fn values(t: &Tensor) -> Vec<f64> {
    t.to_f64_vec().unwrap()
}

fn bits(t: &Tensor) -> Vec<u64> {
    values(t).into_iter().map(f64::to_bits).collect()
}

fn norm(t: &Tensor) -> f64 {
    values(t).iter().map(|x| x * x).sum::<f64>().sqrt()
}

/// max|a − b| relative to max|b|.
fn relative(a: &Tensor, b: &Tensor) -> f64 {
    let (a, b) = (values(a), values(b));
    distance(&a, &b) / b.iter().fold(0f64, |m, x| m.max(x.abs()))
}

fn in_graph(m: &Llama, r: &Rotations, tokens: &[u32], seq: usize, scheme: &Scheme) -> Tensor {
    let tape = Tape::new();
    let vars = RotationVars::constants(&tape, r).unwrap();
    let run = Arc::new(m.run(scheme, seq).unwrap());
    m.logits(&vars, tokens, run, Recompute::None).unwrap().into_value()
}

/// The loss, and its gradients as an optimiser gets them.
fn loss(m: &Llama, r: &Rotations, tokens: &[u32], seq: usize, scheme: &Scheme, recompute: Recompute) -> (Tensor, Vec<Tensor>) {
    let tape = Tape::new();
    let vars = RotationVars::variables(&tape, r).unwrap();
    let loss = m.loss(&vars, tokens, seq, scheme, recompute).unwrap();
    let value = loss.value().clone();
    (value, vars.gradients(&mut tape.backward(loss).unwrap()).unwrap())
}

/// Gradients of layers that are computed again, in parts or whole, are those of layers that keep everything.
fn same_for_every_plan(want: &[Tensor], gradients: impl Fn(Recompute) -> Vec<Tensor>) -> Result<(), TestCaseError> {
    for plan in [Plan::INPUTS, Plan::LEAN, Plan { recompute: 1, keep_weights: true, sequences: 1 }] {
        for (got, want) in gradients(Recompute::Planned(plan)).iter().zip(want) {
            prop_assert!(distance(&values(got), &values(want)) < 1e-12 * (1.0 + norm(want)), "{plan:?}");
        }
    }
    Ok(())
}

fn schemes() -> impl Strategy<Value = Scheme> {
    let bits = prop::sample::select(vec![(4, 4, 4), (4, 8, 8), (3, 16, 16), (16, 4, 4), (16, 16, 3), (8, 6, 16)]);
    (bits, any::<bool>(), any::<bool>(), prop::sample::select(ONLINE.to_vec())).prop_map(|((w, a, kv), weights, acts, online)| {
        Scheme { symmetric_weights: weights, symmetric_activations: acts, online, ..Scheme::new(w, a, kv) }
    })
}

proptest! {
    #![proptest_config(cases(24))]

    #[test]
    fn full_precision_does_not_see_rotations(config in configs(), seed: u64, sequences in 1usize..=4) {
        let m = model(&config, seed);
        let seq = 9;
        let t = tokens(&m, sequences * seq, seed ^ 1);
        let plain = m.merge(None, &FULL).unwrap().logits(&t, seq).unwrap();
        for r in [orthogonal(&m, seed ^ 2), hadamard(&m, seed ^ 3)] {
            for online in ONLINE {
                let scheme = FULL.online(online);
                let learning = relative(&in_graph(&m, &r, &t, seq, &scheme), &plain);
                let merged = relative(&m.merge(Some(&r), &scheme).unwrap().logits(&t, seq).unwrap(), &plain);
                prop_assert!(learning <= 1e-9 && merged <= 1e-9, "{online}: in the graph {learning:e}, merged {merged:e}");
            }
        }
    }

    #[test]
    fn merging_is_what_was_learned(config in configs(), seed: u64, scheme in schemes(), sequences in 1usize..=4) {
        let m = model(&config, seed);
        let seq = 9;
        let (t, r) = (tokens(&m, sequences * seq, seed ^ 1), orthogonal(&m, seed ^ 2));
        let learning = in_graph(&m, &r, &t, seq, &scheme);
        let error = relative(&m.merge(Some(&r), &scheme).unwrap().logits(&t, seq).unwrap(), &learning);
        prop_assert!(error <= 1e-9, "{error:e}");
        // And it is quantised at all.
        let plain = m.merge(None, &FULL).unwrap().logits(&t, seq).unwrap();
        prop_assert!(relative(&learning, &plain) > 1e-6);
    }

    #[test]
    fn plans_change_memory_not_results(config in configs(), seed: u64, scheme in schemes(), recompute in 0usize..=3, keep_weights: bool, sequences in 0usize..=4) {
        let m = model(&config, seed);
        let seq = 9;
        let (t, r) = (tokens(&m, 4 * seq, seed ^ 1), orthogonal(&m, seed ^ 2));
        let plan = Plan { recompute, keep_weights, sequences };
        // Products of fewer rows may round otherwise, and a value at a tie then takes another code: parts are compared without codes.
        let scheme = if sequences == 0 { scheme } else { FULL.online(scheme.online) };
        let (value, grads) = loss(&m, &r, &t, seq, &scheme, Recompute::None);
        let (other, parts) = loss(&m, &r, &t, seq, &scheme, Recompute::Planned(plan));
        prop_assert!(relative(&other, &value) <= 1e-12);
        for (a, b) in parts.iter().zip(&grads) {
            prop_assert!(relative(a, b) <= 1e-9, "{plan:?}: {:e}", relative(a, b));
        }
    }

    #[test]
    fn rotating_the_input_is_rotating_the_weights(config in configs(), seed: u64, online in prop::sample::select(ONLINE.to_vec())) {
        let m = model(&config, seed);
        let (seq, scheme) = (7, Scheme::new(16, 4, 4).online(online));
        let (r, x) = (orthogonal(&m, seed ^ 1), ops::randn([2 * seq, config.hidden_size], seed ^ 2));
        let run = m.run(&scheme, seq).unwrap();
        let layer = |tokens: Option<usize>| {
            let tape = Tape::new();
            let vars = RotationVars::variables(&tape, &r).unwrap();
            let x = tape.variable(x.clone());
            let w = m.blocks[0].rotate(&vars.r1, &vars.r2[0], &run.sites, tokens).unwrap();
            assert_eq!(w.leave.is_some(), tokens.is_some());
            let y = m.blocks[0].forward(x.clone(), w, &run).unwrap();
            let value = y.value().clone();
            let u = ops::randn(y.shape(), seed ^ 3);
            let mut g = tape.backward_from(y, u).unwrap();
            [value, g.take(&x).unwrap(), g.take(&vars.r1).unwrap(), g.take(&vars.r2[0]).unwrap()]
        };
        for (ours, want) in layer(Some(1)).iter().zip(&layer(None)) {
            prop_assert!(relative(ours, want) <= 1e-9, "{:e}", relative(ours, want));
        }
    }

    #[test]
    fn full_precision_has_no_slope_along_the_manifold(config in configs(), seed: u64) {
        let m = model(&config, seed);
        let (t, r) = (tokens(&m, 18, seed ^ 1), orthogonal(&m, seed ^ 2));
        let (_, grads) = loss(&m, &r, &t, 9, &FULL, Recompute::None);
        for (x, g) in r.as_params().unwrap().iter().zip(&grads) {
            for i in 0..x.shape()[0] {
                let (x, g) = (x.slice(i, 1).unwrap(), g.slice(i, 1).unwrap());
                let along = norm(&Orthogonal.riemannian_gradient(&x, &g).unwrap());
                prop_assert!(norm(&g) > 1e-6 && along <= 1e-9 * norm(&g), "Euclidean {:e}, Riemannian {along:e}", norm(&g));
            }
        }
    }

    #[test]
    fn recomputing_changes_no_bit(config in configs(), seed: u64, scheme in schemes()) {
        let exact = model(&config, seed);
        let (t, r) = (tokens(&exact, 18, seed ^ 1), hadamard(&exact, seed ^ 2));
        for dtype in [DType::F64, DType::F32] {
            let (m, r) = (cast(&exact, dtype), r.to_dtype(dtype).unwrap());
            let run = |recompute| {
                let (value, grads) = loss(&m, &r, &t, 9, &scheme, recompute);
                [vec![value], grads].concat().iter().map(bits).collect::<Vec<_>>()
            };
            prop_assert!(run(Recompute::None) == run(Recompute::All), "{dtype}");
        }
    }
}

proptest! {
    #![proptest_config(cases(12))]

    /// The frozen-residual surrogate of a whole quantised layer.
    #[test]
    fn gradients_of_a_layer(config in configs(), seed: u64, scheme in schemes(), leave: bool) {
        let m = model(&config, seed);
        let (r, x) = (orthogonal(&m, seed ^ 1), ops::randn([10, config.hidden_size], seed ^ 2));
        let run = m.run(&scheme, 5).unwrap();
        check::gradients(&[x, r.r1, r.r2.index(0).unwrap()], |v| {
            let [x, r1, r2]: [Var<'_>; 3] = v.try_into().ok().unwrap();
            m.blocks[0].forward(x, m.blocks[0].rotate(&r1, &r2, &run.sites, leave.then_some(1))?, &run)
        }).unwrap();
    }

    #[test]
    fn gradients_of_a_network(config in configs(), seed: u64, scheme in schemes()) {
        let m = model(&config, seed);
        let (t, r) = (tokens(&m, 10, seed ^ 1), orthogonal(&m, seed ^ 2));
        let inputs = std::iter::once(r.r1.clone()).chain((0..config.layers).map(|l| r.r2.index(l).unwrap()));
        let run = Arc::new(m.run(&scheme, 5).unwrap());
        check::gradients(&inputs.collect::<Vec<_>>(), |mut v| {
            let vars = RotationVars::without_scales(v.remove(0), v);
            m.logits(&vars, &t, run.clone(), Recompute::None)
        }).unwrap();
    }
}
