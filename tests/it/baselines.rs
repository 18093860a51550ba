//! What learned rotations are compared with: laws of scales in closed form, of weights trained through quantisers, of the control.

use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use spinquant::baselines::{QatOptions, adapted, generated_text, llm_qat, qat_bytes, smooth_quant};
use spinquant::data::Windows;
use spinquant::eval::{perplexity, perplexity_beside};
use spinquant::learn::LearnOptions;
use spinquant::llama::{Linear, Llama, LlamaConfig, Merged, Weights, synthetic};
use spinquant::ops::spread::Measure;
use spinquant::optim::Schedule;
use spinquant::quant::{Online, Scheme, Site};
use spinquant::rotation::Scale;
use spinquant::{DType, Error, demo, objective, ops};

use crate::common::need::cases;
use crate::common::tiny;

const SEQ: usize = 6;
const EXACT: Scheme = Scheme::FULL_PRECISION;

fn text(vocabulary: usize, windows: usize, seed: u64) -> Windows {
    let ids = ops::randn([windows * SEQ], seed).into_vec::<f64>().unwrap();
    Windows::new(ids.iter().map(|x| (x.abs() * 1e6) as u32 % vocabulary as u32).collect::<Vec<_>>(), SEQ).unwrap()
}

fn model(config: &LlamaConfig, seed: u64) -> Llama {
    Llama::new(config.clone(), Weights::random(config, seed).unwrap()).unwrap()
}

fn values(x: spinquant::Tensor) -> Vec<f64> {
    x.to_f64_vec().unwrap()
}

fn perplexity_of(network: &Merged, text: &Windows) -> f64 {
    perplexity(network, text, |_| std::ops::ControlFlow::Continue(())).unwrap().perplexity
}

/// Perplexity, and divergence from the full-precision model.
fn beside(network: &Merged, full: &Merged, text: &Windows) -> (f64, f64) {
    let (score, fidelity) = perplexity_beside(network, Some(full), text, |_| std::ops::ControlFlow::Continue(())).unwrap();
    (score.perplexity, fidelity.unwrap().divergence().mean)
}

proptest! {
    #![proptest_config(cases(12))]

    /// Scales in closed form change nothing in full precision, with biases and shared key and value heads too.
    #[test]
    fn smoothing_leaves_the_full_precision_network_alone(seed: u64, kv in 1usize..=2, biases: bool) {
        let small = tiny::config(2, kv, false);
        let config = if biases { tiny::with_biases(small) } else { small };
        let (m, w) = (model(&config, seed), text(config.vocab_size, 3, seed));
        let found = smooth_quant(&m, &Scheme::new(4, 4, 4), &w, &[0, 2], &mut ()).unwrap();
        for kind in Scale::ALL.into_iter().filter(|k| ["up-down", "values", "norms"].contains(&k.name())) {
            let most = values(found.rotations.scales.get(kind).unwrap().clone()).into_iter().fold(0f64, |m, a| m.max(a.abs()));
            prop_assert!(most > 0.1, "{kind}: {most}");
        }
        let exact = EXACT.online(Online::NONE);
        let logits = |n: &Merged| values(n.logits(w.get(1), SEQ).unwrap());
        let (a, b) = (logits(&m.merge_exact(None, &exact).unwrap()), logits(&m.merge_exact(Some(&found.rotations), &exact).unwrap()));
        for (a, b) in a.iter().zip(&b) {
            prop_assert!((a - b).abs() < 1e-9 * a.abs().max(1.0), "{a} {b}");
        }
        // Of the exponents tried, the best was taken.
        prop_assert_eq!(found.losses.len(), 11);
        let least = found.losses.iter().fold(f64::INFINITY, |m, l| m.min(l.1));
        prop_assert_eq!(found.losses.iter().find(|l| l.1 == least).unwrap().0, found.exponent);
        prop_assert_eq!((found.training.tokens, found.training.steps), (12 * 2 * SEQ, 0));
    }
}

/// Every scale is `max|x|^α / max|w|^(1−α)`, by another way of finding both.
#[test]
fn scales_are_their_closed_form() {
    let config = tiny::config(4, 2, false);
    let (m, w) = (model(&config, 3), text(config.vocab_size, 2, 4));
    let found = smooth_quant(&m, &Scheme::new(4, 4, 4), &w, &[0, 1], &mut ()).unwrap();
    let seen = Arc::new(Mutex::new(vec![]));
    for window in [0, 1] {
        let seen = seen.clone();
        let see = move |layer: usize, site: Site, x: &spinquant::Tensor| {
            seen.lock().unwrap().push((layer, site, x.to_f64_vec()?));
            Ok(())
        };
        m.merge_exact(None, &EXACT.online(Online::NONE)).unwrap().observe(w.get(window), SEQ, see).unwrap();
    }
    let largest = |x: &[f64], cols: usize, j: usize| x.iter().skip(j).step_by(cols).fold(0f64, |m, x| m.max(x.abs()));
    let scale = |kind| values(found.rotations.scales.get(kind).unwrap().clone());
    let (norms, values_, up_down) = (scale(Scale::Norms), scale(Scale::Values), scale(Scale::UpDown));
    let (c, f, d, group) = (config.hidden_size, config.intermediate_size, config.head_dim, config.group());
    for layer in 0..2 {
        let check = |site: Site, linears: &[Linear], cols: usize, channels: &[usize], got: f64| {
            let of = |x: &[f64]| channels.iter().fold(0f64, |m, &j| m.max(largest(x, cols, j)));
            let seen = seen.lock().unwrap();
            let x = seen.iter().filter(|s| (s.0, s.1) == (layer, site)).fold(0f64, |m, s| m.max(of(&s.2)));
            let w = linears.iter().fold(0f64, |most, l| most.max(of(&values(m.blocks[layer].weights[*l].weight.clone()))));
            let want = (x.powf(found.exponent) / w.powf(1.0 - found.exponent)).ln();
            assert!((got - want).abs() < 1e-12, "layer {layer} {site:?} {channels:?}: {got} {want}");
        };
        for j in 0..c {
            check(Site::AttentionInput, &[Linear::Q, Linear::K, Linear::V], c, &[j], norms[2 * layer * c + j]);
            check(Site::MlpInput, &[Linear::Gate, Linear::Up], c, &[j], norms[(2 * layer + 1) * c + j]);
        }
        for j in 0..f {
            check(Site::DownInput, &[Linear::Down], f, &[j], up_down[layer * f + j]);
        }
        for j in 0..config.kv_heads * d {
            let heads: Vec<usize> = (0..group).map(|q| (j / d * group + q) * d + j % d).collect();
            check(Site::AttentionOutput, &[Linear::O], config.heads * d, &heads, values_[layer * config.kv_heads * d + j]);
        }
    }
}

/// The embedded model has outliers in single channels, which is what scales are for.
#[test]
fn smoothing_helps_where_channels_stand_out() {
    let (m, w) = (demo::model().unwrap(), demo::windows(demo::CALIBRATION, 64).unwrap());
    let test = demo::windows(&demo::TEST[..8_000], 64).unwrap();
    let scheme = Scheme::new(16, 8, 16).unrotated();
    let found = smooth_quant(&m, &scheme, &w, &w.spread(4), &mut ()).unwrap();
    let rtn = m.merge(None, &scheme).unwrap();
    let smooth = m.merge(Some(&found.rotations), &scheme).unwrap();
    let full = m.merge(None, &EXACT).unwrap();
    let (rtn, smooth) = (beside(&rtn, &full, &test).1, beside(&smooth, &full, &test).1);
    assert!(smooth < 0.5 * rtn, "{rtn} {smooth}");
}

#[test]
fn a_stopped_search_is_interrupted_and_no_windows_are_an_error() {
    struct Stop;
    impl spinquant::learn::Watch for Stop {
        fn at(&mut self, done: usize) -> std::ops::ControlFlow<()> {
            if done == 2 { std::ops::ControlFlow::Break(()) } else { std::ops::ControlFlow::Continue(()) }
        }
    }
    let config = tiny::config(2, 1, false);
    let (m, w) = (model(&config, 1), text(config.vocab_size, 2, 2));
    let stopped = smooth_quant(&m, &Scheme::new(4, 4, 4), &w, &[0], &mut Stop);
    assert!(matches!(stopped, Err(Error::Interrupted { step: 2 })));
    assert!(smooth_quant(&m, &Scheme::new(4, 4, 4), &w, &[], &mut ()).unwrap_err().to_string().contains("at least one window"));
}

/// Texts begin with a random token and go on greedily; the same seed writes the same.
#[test]
fn a_model_writes_its_own_text() {
    let full = demo::model().unwrap().merge(None, &EXACT).unwrap();
    let write = |seed| generated_text(&full, 3, 24, seed, &mut ()).unwrap();
    let (a, b) = (write(1), write(1));
    assert_eq!((a.len(), a.seq_len()), (3, 24));
    assert_eq!(a.checksum(), b.checksum());
    assert_ne!(a.checksum(), write(2).checksum());
    let likeliest = |tokens: &[u32], at: usize| {
        let row = values(full.logits(tokens, tokens.len()).unwrap().index(at).unwrap());
        (0..row.len()).fold(0, |best, i| if row[i] > row[best] { i } else { best }) as u32
    };
    let mut greedy = 0;
    for i in 0..3 {
        let tokens = a.get(i);
        assert!((0..3).all(|at| tokens[at + 1] == likeliest(tokens, at)), "window {i}: {tokens:?}");
        greedy += (3..23).filter(|&at| tokens[at + 1] == likeliest(tokens, at)).count();
    }
    assert!(greedy < 60, "the rest is drawn");
    for (windows, seq) in [(0, 8), (1, 1), (1, 100_000)] {
        let message = generated_text(&full, windows, seq, 0, &mut ()).unwrap_err().to_string();
        assert!(message.contains(&format!("got {windows} of {seq}")), "{message}");
    }
}

/// A text that ends is followed by another.
#[test]
fn windows_are_filled_with_texts_that_end() {
    let mut full = demo::model().unwrap().merge(None, &EXACT).unwrap();
    full.config.eos_token_ids = (0..full.config.vocab_size as u32).collect(); // every one ends at once
    let text = generated_text(&full, 1, 40, 3, &mut ()).unwrap();
    assert!(text.get(0).iter().collect::<std::collections::BTreeSet<_>>().len() > 20, "every token is the first of a text");
}

fn qat(steps: usize, rate: f64) -> QatOptions {
    QatOptions { windows: 16, seq: 48, steps, batch: 4, rate, schedule: Schedule::Cosine, seed: 5 }
}

#[test]
fn trained_weights_begin_as_rounded_ones_and_come_nearer() {
    let (m, scheme) = (demo::model().unwrap(), Scheme::new(3, 8, 8));
    let still = llm_qat(&m, &scheme, &qat(1, 1e-30), &mut ()).unwrap();
    let rtn = m.merge(None, &scheme).unwrap();
    assert_eq!(still.network.sha256().unwrap(), rtn.sha256().unwrap());
    assert_eq!((still.training.tokens, still.training.steps), (4 * 48, 1));
    let trained = llm_qat(&m, &scheme, &qat(12, 3e-4), &mut ()).unwrap();
    assert_eq!(trained.network.scheme, rtn.scheme);
    assert_eq!((trained.training.tokens, trained.training.steps), (12 * 4 * 48, 12));
    // On text of the world that it did not write.
    let (full, test) = (m.merge(None, &EXACT).unwrap(), demo::windows(&demo::TEST[..8_000], 64).unwrap());
    let (before, after) = (beside(&rtn, &full, &test).1, beside(&trained.network, &full, &test).1);
    assert!(after < 0.9 * before, "{before} {after}");
    // What is quantised lies on its grid.
    let again = spinquant::Tape::new();
    for block in &trained.network.blocks {
        for (linear, l) in block.weights.iter() {
            let spec = scheme.sites(m.config.head_dim).weight;
            let rounded = values(again.constant(l.weight.clone()).fake_quant(&spec).unwrap().into_value());
            let worst = rounded.iter().zip(values(l.weight.clone())).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
            assert!(worst < 1e-5, "{linear}: {worst}");
        }
    }
}

/// Windows smaller than the batch, and models that no card holds with all of Adam's copies.
#[test]
fn what_cannot_be_trained_is_known() {
    let m = demo::model().unwrap();
    let few = QatOptions { windows: 3, ..qat(1, 1e-3) };
    assert!(llm_qat(&m, &Scheme::new(4, 4, 4), &few, &mut ()).unwrap_err().to_string().contains("batch"));
    let at = |name, dtype| qat_bytes(&synthetic::shape(name).unwrap(), &Scheme::new(4, 4, 4), 2048, dtype).unwrap() >> 30;
    assert!(at("llama-2-7b", DType::BF16) > 80 && at("llama-3.2-1b", DType::BF16) < 40);
    assert!(at("llama-3.2-1b", DType::F32) > at("llama-3.2-1b", DType::BF16));
}

fn control(steps: usize, rate: f64, objective: &str) -> LearnOptions {
    let objective = objective::by_name(objective).unwrap();
    LearnOptions { steps, batch: 4, held_out: Some(4), scale_rate: rate, objective, ..LearnOptions::default() }
}

/// The control changes gains alone, and the function with them: perplexity on the text falls, and the divergence from what it was rises.
#[test]
fn gains_alone_adapt_to_a_text() {
    // Text that the model does not know: its vocabulary in another order.
    let m = demo::model().unwrap();
    let known = demo::windows(demo::CALIBRATION, 48).unwrap();
    let ids: Vec<u32> = (0..40).flat_map(|w| known.get(w).iter().map(|t| (t * 7 + 3) % 400).collect::<Vec<_>>()).collect();
    let odd = Windows::new(ids, 48).unwrap();
    let full = m.merge(None, &EXACT).unwrap();
    let still = adapted(&m, &odd, &control(1, 1e-30, "cross-entropy"), &mut ()).unwrap();
    let (logits, same) = (full.logits(odd.get(0), 48).unwrap(), still.network.logits(odd.get(0), 48).unwrap());
    assert!(values(logits).iter().zip(values(same)).all(|(a, b)| (a - b).abs() < 1e-3));
    let moved = adapted(&m, &odd, &control(10, 0.02, "cross-entropy"), &mut ()).unwrap();
    let ((before, none), (after, some)) = (beside(&full, &full, &odd), beside(&moved.network, &full, &odd));
    assert!(after < 0.8 * before && none.abs() < 1e-6 && some > 0.05, "{before} {after} {none} {some}");
    assert_eq!((moved.training.tokens, moved.training.steps), (10 * 4 * 48, 10));
    for (a, b) in moved.network.blocks.iter().zip(&full.blocks) {
        for ((_, a), (_, b)) in a.weights.iter().zip(b.weights.iter()) {
            assert_eq!(values(a.weight.clone()), values(b.weight.clone()));
        }
    }
    // By the divergence from itself there is nothing to win.
    let kept = adapted(&m, &odd, &control(5, 0.02, "kl"), &mut ()).unwrap();
    assert!(kept.losses.0.abs() < 1e-6 && (perplexity_of(&kept.network, &odd) / before - 1.0).abs() < 0.05, "{:?}", kept.losses);
    let local = LearnOptions { objective: Arc::new(objective::Local(Measure::Whip)), ..control(1, 0.02, "kl") };
    assert!(adapted(&m, &odd, &local, &mut ()).unwrap_err().to_string().contains("whip does not depend"));
}
