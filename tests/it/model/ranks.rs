//! Ranks that share a run, each on a thread: they have the gradients of one, and the same rotations.

use std::net::TcpListener;
use std::ops::ControlFlow;

use spinquant::calibrate::search_weight_clips;
use spinquant::grid::floating::Format;
use spinquant::learn::{LearnOptions, Learned, Recipe, learn};
use spinquant::optim::{CayleySgd, Mode, Optimizer, State};
use spinquant::quant::Engine;
use spinquant::ranks::{Group, Place};
use spinquant::rotation::Transforms;
use spinquant::{Error, Result};

use super::learning::{Averaged, learnable, options};
use super::*;

/// Runs a function at every rank of a group.
fn at_each<T: Send>(world: usize, f: impl Fn(Group) -> T + Sync) -> Vec<T> {
    let mut listener = Some(TcpListener::bind("127.0.0.1:0").unwrap());
    let port = listener.as_ref().unwrap().local_addr().unwrap().port();
    std::thread::scope(|scope| {
        let each: Vec<_> = (0..world)
            .map(|rank| {
                let (listener, f) = (listener.take(), &f);
                scope.spawn(move || f(Group::connect(&Place::local(rank, world, port), listener).unwrap()))
            })
            .collect();
        each.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

fn whole_run(m: &Llama, w: &spinquant::data::Windows, o: &mut dyn Optimizer, options: &LearnOptions) -> Result<Learned> {
    learn(m, w, hadamard(m, 1), o, options, |_| ControlFlow::Continue(()))
}

#[test]
fn shares_of_a_batch_give_the_gradients_of_the_whole() {
    for (dtype, tolerance) in [(DType::F64, 1e-12), (DType::F32, 1e-4)] {
        let (m, w) = learnable(dtype);
        let one_step = |ranks: Group| {
            let mut o = Averaged::default();
            let options = LearnOptions { micro_batch: None, ranks, ..options(Scheme::new(16, 8, 8), 1) };
            let learned = whole_run(&m, &w, &mut o, &options).unwrap();
            // Those who have as many sequences.
            assert_eq!(learned.settings.share_rows, [2, 8].contains(&options.ranks.world()));
            (learned.loss_first, learned.held_out_first, learned.fidelity_first.divergence, o.seen.remove(0))
        };
        let whole = one_step(Group::alone());
        for world in [2, 3, 8] {
            let all = at_each(world, one_step);
            for of in &all {
                for (a, b) in [(of.0, whole.0), (of.1, whole.1), (of.2, whole.2)] {
                    assert!((a - b).abs() <= tolerance * b.abs().max(1.0), "{dtype}, {world} ranks: {a}, not {b}");
                }
                for ((a, b), first) in of.3.iter().zip(&whole.3).zip(&all[0].3) {
                    assert!(relative(a, b) <= tolerance, "{dtype}, {world} ranks: gradients differ by {:e}", relative(a, b));
                    assert!(bits(a) == bits(first), "{dtype}, {world} ranks have different gradients");
                }
            }
        }
    }
}

/// The loss of some tokens and the gradients of everything that is learned, summed over ranks; rows of weights are shared by `rows`.
fn pass(
    m: &Llama,
    r: &Rotations,
    run: (&Scheme, Recompute),
    tokens: &[u32],
    (ranks, rows): (&Group, &Group),
) -> (f64, Vec<Tensor>) {
    let tape = Tape::new();
    let vars = RotationVars { rows: rows.clone(), ..RotationVars::variables(&tape, r).unwrap() };
    let loss = m.loss(&vars, tokens, SEQ, run.0, run.1).unwrap();
    let value = loss.value().item().unwrap();
    let mut found = tape.backward(loss).unwrap();
    let mut all = vars.gradients(&mut found).unwrap();
    all.extend(vars.scale_gradients(&mut found).unwrap().iter().map(|(_, t)| t.clone()));
    all.extend(vars.clip_gradients(&mut found).unwrap().iter().map(|(_, t)| t.clone()));
    all.extend(vars.weight_clip_gradients(&mut found).unwrap().iter().flat_map(|w| w.iter().map(|(_, t)| t.clone())));
    (value, ranks.all_reduce_packed("gradients", all).unwrap())
}

const SEQ: usize = 12;

/// Rows depend on no others: a network of shared ones has the bits of one that was made whole, and the gradients of all ranks' tokens.
#[test]
fn rows_that_ranks_share_are_those_of_one() {
    let plans = [Recompute::None, Recompute::All, Recompute::Planned(Plan { recompute: 1, keep_weights: true, sequences: 1 })];
    let c = config([4, 2], 8, 32, 64);
    let (simulated, integer) = (Engine::Simulated, Engine::Integer);
    for (dtype, scheme, engine, tolerance) in [
        (DType::F64, Scheme::new(4, 4, 4), simulated, 1e-12),
        (DType::F64, Scheme::new(4, 4, 4), integer, 1e-12),
        (DType::F32, Scheme::new(4, 16, 16), simulated, 1e-4),
        (DType::F32, Scheme { weight_group: Some(8), ..Scheme::new(4, 8, 16) }, integer, 1e-4),
        (DType::BF16, Scheme::new(4, 16, 16), simulated, 2e-2),
        (DType::F32, Scheme::new(4, 16, 16).weights_in(Format::Nvfp4), simulated, 1e-4),
    ] {
        let m = cast(&model(&c, 5), dtype).by(engine);
        let wide = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
        let mut starts = vec![hadamard(&m, 1).to_dtype(wide).unwrap()];
        if scheme.weight_format.is_none() {
            let sizes = m.config.scale_sizes();
            let full = hadamard(&m, 1).with_transforms(&Transforms::ALL.of(&sizes).unwrap(), &sizes, Some(3)).unwrap();
            let clips = search_weight_clips(&m, &full, &scheme, |_, _| ControlFlow::Continue(())).unwrap();
            starts.push(full.with_weight_clips(Some(clips)).to_dtype(wide).unwrap());
        }
        for (r, plan) in starts.iter().flat_map(|r| plans.map(|plan| (r, plan))) {
            for world in [2, 4] {
                let found = at_each(world, |ranks| {
                    let tokens = tokens(&m, 2 * SEQ, ranks.rank() as u64);
                    let whole = pass(&m, r, (&scheme, plan), &tokens, (&ranks, Group::nobody()));
                    (whole, pass(&m, r, (&scheme, plan), &tokens, (&ranks, &ranks)))
                });
                for (rank, (whole, shared)) in found.iter().enumerate() {
                    let which = format!("{dtype}, {scheme}, {engine}, {plan:?}, rank {rank} of {world}");
                    assert_eq!(whole.0.to_bits(), shared.0.to_bits(), "{which}: another network");
                    assert_eq!(whole.1.len(), shared.1.len());
                    for (i, (a, b)) in whole.1.iter().zip(&shared.1).enumerate() {
                        let off = relative(b, a);
                        assert!(off <= tolerance, "{which}: gradient {i} differs by {off:e}");
                        assert!(bits(b) == bits(&found[0].1.1[i]), "{which}: gradient {i} is not that of rank 0");
                    }
                }
            }
        }
    }
}

/// A rank that runs the network while another does not is named, as every other operation is.
#[test]
fn rows_are_shared_by_all_ranks_or_none() {
    let (m, w) = learnable(DType::F32);
    let r = hadamard(&m, 1).to_dtype(DType::F32).unwrap();
    let found = at_each(2, |ranks| {
        let tape = Tape::new();
        let rows = if ranks.is_first() { ranks.clone() } else { Group::alone() };
        let vars = RotationVars { rows, ..RotationVars::variables(&tape, &r).unwrap() };
        let loss = m.loss(&vars, &w.batch(&[0]), SEQ, &Scheme::new(4, 16, 16), Recompute::None);
        loss.and_then(|_| ranks.any("a question", true)).unwrap_err().to_string()
    });
    let expected = "rank 1: is at a question (0), where rank 0 is at rows of all ranks (0)";
    assert!(found.iter().all(|e| e == expected), "{found:?}");
}

/// Everything that is learned crosses ranks: scales, heads' R2, clip ratios, those of weights, by two objectives.
#[test]
fn ranks_learn_the_same_in_every_run_and_what_one_learns() {
    let (m, w) = learnable(DType::F64);
    let recipe = Recipe::Faithful.options(Scheme::new(4, 4, 4));
    let objective = Some(std::sync::Arc::new(spinquant::objective::CrossEntropy) as _);
    let options = |ranks| LearnOptions {
        steps: 3,
        batch: 5,
        learning_rate: Some(0.05),
        held_out: Some(5),
        clip_objective: objective.clone(),
        ranks,
        ..recipe.clone()
    };
    let run = |ranks: Group| whole_run(&m, &w, &mut CayleySgd::new(Mode::Default), &options(ranks)).unwrap();
    let tensors =
        |l: &Learned| -> Vec<(String, Tensor)> { l.rotations.tensors().into_iter().map(|(name, t)| (name, t.clone())).collect() };
    let (one, first, again) = (run(Group::alone()), at_each(2, run), at_each(2, run));
    assert_eq!(first[0].rotations.transforms(), recipe.transforms.of(&m.config.scale_sizes()).unwrap());
    assert!(first[0].rotations.weight_clips.is_some() && !first[0].rotations.clips.is_empty());
    for of in first.iter().chain(&again) {
        for ((name, a), (_, b)) in tensors(of).iter().zip(tensors(&first[0])) {
            assert!(bits(a) == bits(&b), "{name}");
        }
        for ((name, a), (_, b)) in tensors(of).iter().zip(tensors(&one)) {
            assert!(relative(a, &b) < 1e-9, "{name}: {:e}", relative(a, &b));
        }
    }
    let scheme = Scheme::new(4, 4, 4);
    let alone = search_weight_clips(&m, &hadamard(&m, 1), &scheme, |_, _| ControlFlow::Continue(())).unwrap();
    let shared = at_each(3, |ranks| {
        let found = spinquant::calibrate::search_weight_clips_among(&ranks, &m, &hadamard(&m, 1), &scheme, |_, _| {
            ControlFlow::Continue(())
        });
        found.unwrap()
    });
    for of in shared {
        assert!(of.iter().zip(alone.iter()).all(|((_, a), (_, b))| bits(a) == bits(b)), "clip ratios of weights differ");
    }
}

/// An optimiser that goes another way at one rank after a step.
struct Astray(CayleySgd, Option<u64>);

impl Optimizer for Astray {
    fn name(&self) -> &str {
        self.0.name()
    }
    fn step(&mut self, params: &mut [Tensor], grads: Vec<Tensor>, lr: f64) -> Result<()> {
        self.0.step(params, grads, lr)?;
        if let Some(left) = &mut self.1 {
            if *left == 0 {
                params[0] = params[0].clone().scale(1.0 + 1e-15)?;
            }
            *left = left.wrapping_sub(1);
        }
        Ok(())
    }
    fn state(&self) -> State {
        self.0.state()
    }
    fn load_state(&mut self, state: State) -> Result<()> {
        self.0.load_state(state)
    }
}

#[test]
fn ranks_that_drift_apart_or_begin_apart_are_named_with_the_step() {
    let (m, w) = learnable(DType::F64);
    let found = at_each(3, |ranks| {
        let mut o = Astray(CayleySgd::new(Mode::Default), (ranks.rank() == 2).then_some(1));
        whole_run(&m, &w, &mut o, &LearnOptions { ranks, ..options(Scheme::new(16, 8, 8), 5) }).unwrap_err().to_string()
    });
    assert!(found.iter().all(|e| e == "rank 2: step 2: its rotations differ from those of rank 0"), "{found:?}");
    let found = at_each(2, |ranks| {
        let start = hadamard(&m, ranks.rank() as u64);
        let o = &mut CayleySgd::new(Mode::Default);
        let options = LearnOptions { ranks, ..options(Scheme::new(16, 8, 8), 5) };
        learn(&m, &w, start, o, &options, |_| ControlFlow::Continue(())).unwrap_err().to_string()
    });
    assert!(found.iter().all(|e| e == "rank 1: the rotations to begin with differ from those of rank 0"), "{found:?}");
}

#[test]
fn one_rank_that_stops_or_fails_ends_all() {
    let (m, w) = learnable(DType::F32);
    let run = |ranks: Group, o: &mut dyn Optimizer, stops: bool| {
        let options = LearnOptions { ranks, ..options(Scheme::new(16, 8, 8), 50) };
        let learned = learn(&m, &w, hadamard(&m, 1), o, &options, |r| match r.step {
            4 if stops => ControlFlow::Break(()),
            _ => ControlFlow::Continue(()),
        });
        learned.unwrap_err()
    };
    let found = at_each(3, |ranks| {
        let stops = ranks.rank() == 1;
        run(ranks, &mut CayleySgd::new(Mode::Default), stops)
    });
    assert!(found.iter().all(|e| matches!(e, Error::Interrupted { step: 4 })), "{found:?}");
    let found = at_each(2, |ranks| {
        let mut o = Averaged::default();
        o.fails = (ranks.rank() == 1).then_some(3);
        run(ranks, &mut o, false).to_string()
    });
    assert_eq!(found, ["rank 1: step 3: averaged: gives up", "step 3: averaged: gives up"]);
    let found = at_each(9, |ranks| run(ranks, &mut CayleySgd::new(Mode::Default), false).to_string());
    assert!(found.iter().all(|e| e == "batch: expected at least a sequence for each of 9 ranks, got 8"), "{found:?}");
}
