//! What learning may minimise: gradients, definitions, and learning with each of them, one from outside the crate included.

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use spinquant::data::Windows;
use spinquant::learn::{ClipChoice, LearnOptions, Learned, learn};
use spinquant::llama::{Block, Llama, LlamaConfig, Merged, Recompute, RotatedWeights, RotationVars, Weights};
use spinquant::objective::{self, Batch, CrossEntropy, Kl, Local, Objective, Reconstruction};
use spinquant::ops::spread::Measure;
use spinquant::optim::{RiemannianAdam, RiemannianSgd};
use spinquant::quant::{Online, Scheme, Site};
use spinquant::rotation::Rotations;
use spinquant::{
    DType, Result, Tape, Tensor, Var, check, ops,
    outliers::{self, PlantOptions},
};

use crate::common::need::cases;
use crate::common::tiny;

const SEQ: usize = 6;

fn model(kv_heads: usize, layers: usize, seed: u64) -> Llama {
    let small = tiny::config(2, kv_heads, false);
    let config = LlamaConfig { hidden_size: 12, intermediate_size: 20, layers, head_dim: 4, vocab_size: 19, ..small };
    Llama::new(config.clone(), Weights::random(&config, seed).unwrap()).unwrap()
}

fn rotations(m: &Llama, seed: u64) -> Rotations {
    Rotations::random_orthogonal(m.config.hidden_size, m.config.head_dim, m.config.layers, seed).unwrap()
}

fn tokens(count: usize, seed: u64) -> Vec<u32> {
    ops::randn([count], seed).into_vec::<f64>().unwrap().iter().map(|x| (x.abs() * 1e6) as u32 % 19).collect()
}

fn batch<'a>(model: &'a Llama, tokens: &'a [u32], scheme: &'a Scheme) -> Batch<'a> {
    Batch { model, tokens, seq: SEQ, scheme, recompute: Recompute::None }
}

/// What the list leaves out: fewer tokens than the vocabulary has, and mixtures.
fn others() -> impl Iterator<Item = Arc<dyn Objective>> {
    let names =
        ["kl-top:3", "kl-top-partial:3", "kl-top-gathered:3", "0.5*cross-entropy+0.5*kl", "kl-top-partial:5+0.1*cross-entropy"];
    names.into_iter().map(|name| objective::by_name(name).unwrap())
}

/// The objective's value.
fn value(o: &dyn Objective, b: &Batch<'_>, r: &Rotations) -> f64 {
    let tape = Tape::new();
    o.loss(&RotationVars::constants(&tape, r).unwrap(), b).unwrap().value().item().unwrap()
}

proptest! {
    #![proptest_config(cases(16))]

    #[test]
    fn gradients_are_those_of_the_value(seed: u64, kv_heads in 1usize..=2, layers in 1usize..=2) {
        let (m, scheme, ids) = (model(kv_heads, layers, seed), Scheme::new(4, 4, 4), tokens(2 * SEQ, seed));
        let r = rotations(&m, seed);
        let mut inputs = vec![r.r1.clone()];
        inputs.extend((0..layers).map(|l| r.r2.index(l).unwrap()));
        // Whip has a kink at 0, which differences step over now and then. Kurtosis takes the same path, and the operation's own cases
        // check both slopes.
        for o in objective::all().into_iter().filter(|o| o.name() != "whip").chain(others()) {
            check::gradients(&inputs, |mut v| {
                let r1 = v.remove(0);
                o.loss(&RotationVars::without_scales(r1, v), &batch(&m, &ids, &scheme))
            })
            .unwrap_or_else(|e| panic!("{}: {e}", o.name()));
        }
    }

    #[test]
    fn divergence_is_from_the_full_precision_model(seed: u64, kv_heads in 1usize..=2) {
        let (m, ids) = (model(kv_heads, 2, seed), tokens(3 * SEQ, seed));
        let r = rotations(&m, seed);
        let none = value(&Kl, &batch(&m, &ids, &Scheme::FULL_PRECISION), &r);
        let some = value(&Kl, &batch(&m, &ids, &Scheme::new(4, 4, 4)), &r);
        prop_assert!(none.abs() < 1e-10 && some > 1e-6, "{none:e} unquantised, {some:e} quantised");
    }

    /// What a local objective says of the unrotated model's activations is what the quantisers of the rotated network see.
    #[test]
    fn local_objectives_measure_what_quantizers_see(seed: u64, kv_heads in 1usize..=2, per_head: bool) {
        let (m, ids, scheme) = (model(kv_heads, 2, seed), tokens(2 * SEQ, seed), Scheme::FULL_PRECISION.online(Online::NONE));
        let r = rotations(&m, seed);
        let r = if per_head { r.per_head(kv_heads, Some(seed ^ 1)).unwrap() } else { r };
        let seen = Arc::new(Mutex::new(vec![]));
        let see = {
            let seen = seen.clone();
            move |_: usize, site: Site, x: &Tensor| {
                seen.lock().unwrap().push((site, x.to_f64_vec().unwrap()));
                Ok(())
            }
        };
        m.merge_exact(Some(&r), &scheme).unwrap().observe(&ids, SEQ, see).unwrap();
        let phi = |measure: Measure, x: f64| match measure {
            Measure::Whip => (-x.abs()).exp(),
            Measure::Kurtosis => x.powi(4),
        };
        for measure in [Measure::Whip, Measure::Kurtosis] {
            let mut sum = 0.0;
            for (site, x) in seen.lock().unwrap().iter() {
                let d = match site {
                    Site::AttentionInput | Site::MlpInput => m.config.hidden_size,
                    Site::Value | Site::AttentionOutput => m.config.head_dim,
                    Site::Key | Site::DownInput => continue,
                };
                let rows: Vec<f64> = x.chunks(d).map(|row| {
                    let norm = (row.iter().map(|x| x * x).sum::<f64>() / d as f64).sqrt();
                    row.iter().map(|x| phi(measure, x / norm)).sum::<f64>() / d as f64
                }).collect();
                sum += rows.iter().sum::<f64>() / rows.len() as f64;
            }
            let ours = value(&Local(measure), &batch(&m, &ids, &scheme), &r);
            prop_assert!((ours - sum / 4.0).abs() < 1e-6 * ours, "{measure:?}: {ours}, {}", sum / 4.0);
        }
    }
}

/// Hidden states behind every layer of a network, in R1's basis.
fn states(network: &Merged, m: &Llama, ids: &[u32]) -> Vec<Vec<f64>> {
    let (run, tape) = (m.run(&network.scheme, SEQ).unwrap(), Tape::new());
    let mut x = tape.constant(network.embedding.clone()).embedding(ids.into()).unwrap();
    let mut behind = |block: &Block| {
        x = block.forward(x.clone(), RotatedWeights::constants(&tape, &block.weights), &run).unwrap();
        x.value().to_f64_vec().unwrap()
    };
    network.blocks.iter().map(&mut behind).collect()
}

/// The definition, from merged networks in one basis; nothing where nothing is quantised; and no mixing.
#[test]
fn reconstruction_is_of_hidden_states() {
    let (m, ids, scheme) = (model(2, 3, 8), tokens(2 * SEQ, 9), Scheme::new(4, 4, 4));
    let r = rotations(&m, 10);
    let exact = states(&m.merge_exact(Some(&r), &Scheme::FULL_PRECISION).unwrap(), &m, &ids);
    let quantized = states(&m.merge(Some(&r), &scheme).unwrap(), &m, &ids);
    let square = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>();
    let error =
        |(x, y): (&Vec<f64>, &Vec<f64>)| square(&mut y.iter().zip(x).map(|(y, x)| y - x)) / square(&mut x.iter().copied());
    let want = exact.iter().zip(&quantized).map(error).sum::<f64>() / 3.0;
    let got = value(&Reconstruction, &batch(&m, &ids, &scheme), &r);
    assert!(want > 1e-4 && (got / want - 1.0).abs() < 1e-9, "{got} against {want}");
    let none = value(&Reconstruction, &batch(&m, &ids, &Scheme::FULL_PRECISION), &r);
    assert!(none < 1e-20, "{none:e}");
    let message = objective::by_name("reconstruction+kl").unwrap_err().to_string();
    assert!(message.contains("reconstruction does not depend on the network's predictions alone"), "{message}");
    let narrow = |t: &Tensor| t.to_dtype(DType::F16);
    let weights = Weights {
        embedding: narrow(&m.embedding).unwrap(),
        head: narrow(&m.head).unwrap(),
        layers: m.blocks.iter().map(|b| b.weights.map(narrow).unwrap()).collect(),
    };
    let half = Llama::new(m.config.clone(), weights).unwrap();
    let vars = Tape::new();
    let vars = RotationVars::constants(&vars, &r.to_dtype(DType::F16).unwrap()).unwrap();
    assert!(Reconstruction.loss(&vars, &batch(&half, &ids, &scheme)).err().unwrap().to_string().contains("got f16"));
}

/// A model with outliers in its residual stream, in `f32`, and text of its own vocabulary.
fn learnable() -> (Llama, Windows) {
    let (m, w) = (model(2, 2, 3), Windows::new(tokens(120 * SEQ, 4), SEQ).unwrap());
    let weights = Weights {
        embedding: m.embedding.clone(),
        head: m.head.clone(),
        layers: m.blocks.iter().map(|b| b.weights.clone()).collect(),
    };
    let mut weights = outliers::plant(&weights, &m.config, &PlantOptions::default()).unwrap();
    let narrow = |t: &Tensor| t.to_dtype(DType::F32);
    weights.embedding = narrow(&weights.embedding).unwrap();
    weights.head = narrow(&weights.head).unwrap();
    weights.layers = weights.layers.iter().map(|l| l.map(narrow).unwrap()).collect();
    (Llama::new(m.config, weights).unwrap(), w)
}

fn options(objective: Arc<dyn Objective>, steps: usize) -> LearnOptions {
    LearnOptions {
        scheme: Scheme::new(4, 4, 4),
        steps,
        batch: 24,
        micro_batch: Some(12),
        held_out: Some(8),
        clip: ClipChoice::Keep,
        objective,
        ..LearnOptions::default()
    }
}

fn run(m: &Llama, w: &Windows, o: &LearnOptions, stop: usize) -> Result<Learned> {
    learn(m, w, rotations(m, 1), &mut RiemannianAdam::polar(), o, |r| {
        if r.step == stop { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })
}

#[test]
fn objectives_go_down() {
    let (m, w) = learnable();
    let everything = w.batch(&(0..w.len()).collect::<Vec<_>>());
    // Cross entropy learns on text that its model knows something of: tests/it/model.rs.
    let few = objective::by_name("kl-top:3").unwrap();
    for o in objective::all().into_iter().filter(|o| o.name() != "cross-entropy").chain([few]) {
        let options = LearnOptions { learning_rate: Some(0.02), ..options(o.clone(), 40) };
        let learned = run(&m, &w, &options, 0).unwrap();
        let b = Batch { tokens: &everything, ..batch(&m, &everything, &options.scheme) };
        let [before, after] = [&rotations(&m, 1), &learned.rotations].map(|r| value(&*o, &b, &r.to_dtype(DType::F32).unwrap()));
        println!(
            "{}: {before:.4} -> {after:.4}, held-out cross entropy {:.4} -> {:.4}",
            o.name(),
            learned.held_out_first,
            learned.held_out_last
        );
        assert!(after < before && learned.orthogonality_error <= 1e-6, "{}: {before} -> {after}", o.name());
    }
}

#[test]
fn objectives_go_by_their_names() {
    for o in objective::all() {
        assert_eq!(objective::by_name(&o.name()).unwrap().name(), o.name());
    }
    let names: Vec<String> = objective::all().iter().map(|o| o.name()).collect();
    for (name, want) in [
        ("mse", format!("objective: expected one of {}, got \"mse\"", names.join(", "))),
        ("kl:3", "objective: kl has no constant, got \"3\"".into()),
        ("kl-top:none", "objective: expected kl-top:K with a number of tokens above 0, got \"none\"".into()),
        ("kl-top-gathered:0", "objective: expected kl-top-gathered:K with a number of tokens above 0, got \"0\"".into()),
    ] {
        assert_eq!(objective::by_name(name).unwrap_err().to_string(), want);
    }
    assert_eq!(objective::by_name("kl-top:3").unwrap().name(), "kl-top:3");
}

/// The network runs once, and both parts see it: the value and the gradient are the sums of theirs.
#[test]
fn a_mixture_is_the_sum_of_its_parts() {
    let (m, scheme, ids) = (model(2, 2, 5), Scheme::new(4, 4, 4), tokens(2 * SEQ, 6));
    let (r, b) = (rotations(&m, 7), batch(&m, &ids, &scheme));
    let slope = |o: &dyn Objective| {
        let tape = Tape::new();
        let vars = RotationVars::variables(&tape, &r).unwrap();
        let loss = o.loss(&vars, &b).unwrap();
        vars.gradients(&mut tape.backward(loss).unwrap()).unwrap()[0].to_f64_vec().unwrap()
    };
    for name in ["kl", "kl-top:3", "kl-top-partial:3", "kl-top-gathered:3"] {
        let (mixture, part) =
            (objective::by_name(&format!("0.3*{name}+2*cross-entropy")).unwrap(), objective::by_name(name).unwrap());
        let want = 0.3 * value(&*part, &b, &r) + 2.0 * value(&CrossEntropy, &b, &r);
        assert!((value(&*mixture, &b, &r) - want).abs() < 1e-12, "{name}");
        for ((got, a), b) in slope(&*mixture).iter().zip(slope(&*part)).zip(slope(&CrossEntropy)) {
            assert!((got - (0.3 * a + 2.0 * b)).abs() < 1e-12, "{name}");
        }
    }
}

/// One from outside the crate, with a constant.
#[derive(Debug)]
struct Both(f64);

impl Objective for Both {
    fn name(&self) -> String {
        format!("cross-entropy + {} kl", self.0)
    }
    fn loss<'t>(&self, rotations: &RotationVars<'t>, batch: &Batch<'_>) -> Result<Var<'t>> {
        CrossEntropy.loss(rotations, batch)?.add(Kl.loss(rotations, batch)?.scale(self.0)?)
    }
}

#[test]
fn an_objective_from_outside_learns_and_resumes() {
    let (m, w) = learnable();
    let folder = tempfile::tempdir().unwrap();
    let path: &Path = &folder.path().join("state");
    let o = LearnOptions { learning_rate: Some(0.05), ..options(Arc::new(Both(0.5)), 6) };
    let whole = run(&m, &w, &o, 0).unwrap();
    // The sum of its parts.
    let scheme = Scheme::new(4, 4, 4);
    let ids = w.batch(&[0, 1]);
    let (b, r) = (batch(&m, &ids, &scheme), whole.rotations.to_dtype(DType::F32).unwrap());
    let sum = value(&CrossEntropy, &b, &r) + 0.5 * value(&Kl, &b, &r);
    assert!((value(&Both(0.5), &b, &r) - sum).abs() < 1e-5);

    let kept = LearnOptions { checkpoint: Some((path.into(), 100)), resume: true, ..o.clone() };
    assert!(run(&m, &w, &kept, 3).is_err_and(|e| e.to_string().contains('3')));
    for other in [Arc::new(Both(0.25)) as Arc<dyn Objective>, Arc::new(CrossEntropy)] {
        let message = run(&m, &w, &LearnOptions { objective: other, ..kept.clone() }, 0).unwrap_err().to_string();
        assert!(message.contains("objective was \"cross-entropy + 0.5 kl\""), "{message}");
    }
    let resumed = run(&m, &w, &kept, 0).unwrap();
    let bits = |l: &Learned| {
        [&l.rotations.r1, &l.rotations.r2].map(|t| t.to_f64_vec().unwrap().into_iter().map(f64::to_bits).collect::<Vec<_>>())
    };
    assert_eq!(bits(&whole), bits(&resumed));
}

#[test]
fn cross_entropy_is_the_default_and_unchanged() {
    let (m, w) = learnable();
    let default = LearnOptions::default().objective;
    assert_eq!(default.name(), "cross-entropy");
    let ids = w.batch(&[3, 4]);
    let (scheme, r) = (Scheme::new(4, 4, 4), rotations(&m, 2).to_dtype(DType::F32).unwrap());
    let tape = Tape::new();
    let vars = RotationVars::constants(&tape, &r).unwrap();
    let direct = m.loss(&vars, &ids, SEQ, &scheme, Recompute::None).unwrap().value().item().unwrap();
    assert_eq!(value(&*default, &batch(&m, &ids, &scheme), &r), direct);
    // And a gradient that is not finite is an error that names the step.
    #[derive(Debug)]
    struct Broken;
    impl Objective for Broken {
        fn name(&self) -> String {
            "broken".into()
        }
        fn loss<'t>(&self, rotations: &RotationVars<'t>, batch: &Batch<'_>) -> Result<Var<'t>> {
            CrossEntropy.loss(rotations, batch)?.scale(f64::NAN)
        }
    }
    let mut sgd = RiemannianSgd::qr();
    let outcome = learn(&m, &w, rotations(&m, 1), &mut sgd, &options(Arc::new(Broken), 3), |_| ControlFlow::Continue(()));
    assert!(outcome.unwrap_err().to_string().contains("step 1"));
}
