//! Learning on whole networks: that it helps, stays orthogonal, stops, resumes and repeats, and what it refuses.

use std::ops::ControlFlow;
use std::path::Path;

use spinquant::data::Windows;
use spinquant::learn::{ClipChoice, LearnOptions, Learned, StepReport, Watch, WeightClip, learn, learn_watched};
use spinquant::llama::{Llama, LlamaConfig, Recompute, RotationVars};
use spinquant::manifold::{Manifold, Orthogonal, Qr, Retraction};
use spinquant::objective::{Batch, CrossEntropy, Kl, Objective};
use spinquant::optim::{CayleySgd, Mode, Optimizer, Schedule, State};
use spinquant::quant::Scheme;
use spinquant::{DType, Error, Result, Tensor, Var};

use super::*;

/// Riemannian descent along an average of the gradients: an optimiser from outside the crate, with a memory and without an audit.
#[derive(Default)]
pub(super) struct Averaged {
    mean: Vec<Tensor>,
    pub(super) seen: Vec<Vec<Tensor>>,
    /// Breaks at this step: with an error, or by a NaN in R1.
    pub(super) fails: Option<usize>,
    poisons: Option<usize>,
}

impl Optimizer for Averaged {
    fn name(&self) -> &str {
        "averaged"
    }
    fn step(&mut self, params: &mut [Tensor], grads: Vec<Tensor>, lr: f64) -> Result<()> {
        self.seen.push(grads.clone());
        if self.fails == Some(self.seen.len()) {
            return Err(Error::numeric("averaged", "gives up"));
        }
        for (i, (x, g)) in params.iter_mut().zip(grads).enumerate() {
            match self.mean.get_mut(i) {
                Some(m) => *m = Tensor::axpby(0.5, m.clone(), 0.5, g)?,
                None => self.mean.push(g),
            }
            let down = Orthogonal.riemannian_gradient(x, &self.mean[i])?.scale(-lr)?;
            *x = Qr.retract(x, &down)?;
        }
        if self.poisons == Some(self.seen.len()) {
            params[0] = params[0].clone().scale(f64::NAN)?;
        }
        Ok(())
    }
    fn state(&self) -> State {
        let tensors = self.mean.iter().enumerate().map(|(i, t)| (format!("mean.{i}"), t.clone()));
        State { tensors: tensors.collect(), ..State::default() }
    }
    fn load_state(&mut self, state: State) -> Result<()> {
        self.mean = state.list("mean");
        Ok(())
    }
}

const SEQ: usize = 12;

/// A model with outliers in its residual stream, and windows of text that its full-precision self wrote.
pub(super) fn learnable(dtype: DType) -> (Llama, Windows) {
    let c = LlamaConfig { vocab_size: 32, ..config([4, 2], 8, 24, 56) };
    let mut w = Weights::random(&c, 5).unwrap();
    // Channels 3 and 17 are large and say nothing, as trained models have them: they spoil the grid of all others.
    let columns = |t: &Tensor, f: &dyn Fn(usize, f64) -> f64| {
        let x = values(t).into_iter().enumerate().map(|(i, x)| f(i % 24, x));
        Tensor::from_vec(x.collect::<Vec<_>>(), t.shape()).unwrap()
    };
    let loud = |channel: usize| [3, 17].contains(&channel);
    w.embedding = columns(&w.embedding, &|i, x| if loud(i) { 1.5 } else { x });
    let read = |t: &Tensor, gain: f64| columns(t, &|i, x| if loud(i) { 0.0 } else { gain * x });
    w.head = read(&w.head, 5.0);
    for l in &mut w.layers {
        for linear in Linear::ALL.into_iter().filter(|l| l.row().norm.is_some()) {
            l[linear].weight = read(&l[linear].weight, 2.0);
        }
    }
    let m = Llama::new(c, w).unwrap();
    let plain = m.merge(None, &FULL).unwrap();
    let (windows, v) = (240, m.config.vocab_size);
    let dice = values(&ops::randn([windows * SEQ, v], 6));
    let mut text = tokens(&m, windows * SEQ, 7);
    for at in 1..SEQ {
        let logits = values(&plain.logits(&text, SEQ).unwrap());
        for row in (0..windows).map(|w| w * SEQ + at) {
            let score = |j: &usize| logits[(row - 1) * v + j] + dice[row * v + j];
            text[row] = (0..v).max_by(|a, b| score(a).total_cmp(&score(b))).unwrap() as u32;
        }
    }
    (cast(&m, dtype), Windows::new(text, SEQ).unwrap())
}

pub(super) fn options(scheme: Scheme, steps: usize) -> LearnOptions {
    let given = LearnOptions { micro_batch: Some(8), learning_rate: Some(1.5), held_out: Some(24), ..LearnOptions::default() };
    LearnOptions { scheme, steps, batch: 8, held_out_every: 2, clip: ClipChoice::Keep, ..given }
}

/// Learns from a Hadamard start and returns every step's report.
fn run(m: &Llama, w: &Windows, o: &mut dyn Optimizer, options: &LearnOptions, stop: usize) -> (Result<Learned>, Vec<StepReport>) {
    let mut reports = vec![];
    let learned = learn(m, w, hadamard(m, 1), o, options, |r| {
        reports.push(*r);
        if r.step == stop { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    (learned, reports)
}

/// With 24 channels and straight-through gradients a single run is a matter of luck; the mean of a few is not.
#[test]
fn learning_helps_text_it_has_not_seen() {
    let (m, w) = learnable(DType::F32);
    let o = LearnOptions { batch: 24, micro_batch: Some(24), learning_rate: Some(0.1), ..options(Scheme::new(16, 3, 16), 40) };
    let runs = (0..6).map(|seed| {
        let mut reports = vec![];
        let learned = learn(&m, &w, hadamard(&m, seed), &mut CayleySgd::new(Mode::Default), &o, |r| {
            reports.push(*r);
            ControlFlow::Continue(())
        });
        let learned = learned.unwrap();
        println!("held out {:.4} -> {:.4}", learned.held_out_first, learned.held_out_last);
        assert_eq!((reports.len(), reports[0].loss, reports[39].loss), (40, learned.loss_first, learned.loss_last));
        // Orthogonal after every step, by the optimiser's account and by ours.
        assert!(reports.iter().all(|r| r.orthogonality_error <= 1e-6));
        assert!(learned.orthogonality_error > 0.0 && learned.orthogonality_error <= 1e-6);
        assert_eq!(learned.rotations.r1.dtype(), DType::F32);
        learned.rotations.check(24, 8, 2, 1e-6).unwrap();
        [learned.held_out_first, learned.held_out_last]
    });
    let runs: Vec<_> = runs.collect();
    let [first, last] = [0, 1].map(|i| runs.iter().map(|r| r[i]).sum::<f64>() / runs.len() as f64);
    println!("mean {first:.4} -> {last:.4}");
    assert!(last < 0.95 * first, "held out {first} -> {last}");
}

#[test]
fn f32_stays_orthogonal_at_every_step() {
    let (m, w) = learnable(DType::F32);
    let seen = Arc::new(Mutex::new(vec![]));
    struct Watched(CayleySgd, Arc<Mutex<Vec<f64>>>);
    impl Optimizer for Watched {
        fn name(&self) -> &str {
            self.0.name()
        }
        fn step(&mut self, params: &mut [Tensor], grads: Vec<Tensor>, lr: f64) -> Result<()> {
            self.0.step(params, grads, lr)?;
            for x in params.iter() {
                self.1.lock().unwrap().push(Orthogonal.orthogonality_error(x)?);
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
    for (momentum, lr) in [(0.0, 1.5), (0.9, 1.5), (0.0, 1e-3)] {
        let mut o = Watched(CayleySgd::new(Mode::Default).with_momentum(momentum).unwrap(), seen.clone());
        let options = LearnOptions { learning_rate: Some(lr), ..options(Scheme::new(4, 4, 4), 20) };
        let learned = run(&m, &w, &mut o, &options, 0).0.unwrap();
        let seen = std::mem::take(&mut *seen.lock().unwrap());
        assert_eq!(seen.len(), 2 * 20);
        let worst = seen.into_iter().fold(0.0, f64::max);
        assert!(worst <= 1e-6, "momentum {momentum}, lr {lr}: {worst:e}");
        // Watched does not audit, so learn() does.
        assert_eq!(learned.orthogonality_error, worst);
    }
}

#[test]
fn micro_batches_give_the_whole_batch() {
    for (dtype, tolerance) in [(DType::F64, 1e-12), (DType::F32, 1e-4)] {
        let (m, w) = learnable(dtype);
        let one_step = |micro_batch, recompute| {
            let mut o = Averaged::default();
            let options =
                LearnOptions { micro_batch: Some(micro_batch), recompute: Some(recompute), ..options(Scheme::new(16, 8, 8), 1) };
            let learned = run(&m, &w, &mut o, &options, 0).0.unwrap();
            (learned.loss_first, o.seen.remove(0))
        };
        let (whole, grads) = one_step(8, Recompute::None);
        for micro_batch in [1, 3, 100] {
            let (loss, parts) = one_step(micro_batch, Recompute::All);
            assert!((loss - whole).abs() <= tolerance * whole, "{dtype}, {micro_batch} at once: loss {loss}, not {whole}");
            for (a, b) in parts.iter().zip(&grads) {
                assert!(relative(a, b) <= tolerance, "{dtype}, {micro_batch} at once: gradients differ by {:e}", relative(a, b));
            }
        }
    }
}

type Make = fn() -> Box<dyn Optimizer>;

#[test]
fn a_stopped_run_continues_to_the_same_bits() {
    let optimizers: [Make; 3] = [
        || Box::new(CayleySgd::new(Mode::Default).with_momentum(0.5).unwrap()),
        || Box::new(CayleySgd::new(Mode::Parity)),
        || Box::<Averaged>::default(),
    ];
    let folder = tempfile::tempdir().unwrap();
    for dtype in [DType::F32, DType::F64] {
        let (m, w) = learnable(dtype);
        for make in optimizers {
            let path = folder.path().join("state");
            let whole = LearnOptions { micro_batch: Some(3), learning_rate: Some(0.5), ..options(Scheme::new(4, 4, 4), 7) };
            let (want, reports) = run(&m, &w, &mut *make(), &whole, 0);
            let want = want.unwrap();
            let stopping = LearnOptions { checkpoint: Some((path.clone(), 100)), resume: true, ..whole.clone() };
            let (stopped, mut seen) = run(&m, &w, &mut *make(), &stopping, 3);
            assert!(matches!(stopped, Err(Error::Interrupted { step: 3 })), "{stopped:?}");
            let (again, more) = run(&m, &w, &mut *make(), &stopping, 5);
            assert!(matches!(again, Err(Error::Interrupted { step: 5 })), "{again:?}");
            seen.extend(more);
            let (got, more) = run(&m, &w, &mut *make(), &stopping, 0);
            let got = got.unwrap();
            seen.extend(more);
            let numbers = |l: &Learned| {
                [l.loss_first, l.loss_last, l.held_out_first, l.held_out_last, l.orthogonality_error].map(f64::to_bits)
            };
            let name = make().name().to_string();
            assert_eq!(numbers(&got), numbers(&want), "{name} in {dtype}");
            assert!(bits(&got.rotations.r1) == bits(&want.rotations.r1), "{name} in {dtype}: R1 differs");
            assert!(bits(&got.rotations.r2) == bits(&want.rotations.r2), "{name} in {dtype}: R2 differs");
            let steps = |r: &[StepReport]| r.iter().map(|r| StepReport { seconds: 0.0, ..*r }).collect::<Vec<_>>();
            assert_eq!(steps(&seen), steps(&reports), "{name} in {dtype}");
            std::fs::remove_file(path).unwrap();
        }
    }
}

fn says<T>(result: Result<T>, parts: &[&str]) {
    let message = result.err().expect("an error").to_string();
    assert!(parts.iter().all(|p| message.contains(p)), "{message:?} lacks one of {parts:?}");
}

/// A run of six steps stopped after three, with its state at `path`.
fn stopped(m: &Llama, w: &Windows, path: &Path) -> LearnOptions {
    let base = options(Scheme::new(4, 4, 4), 6);
    let options = LearnOptions { checkpoint: Some((path.to_path_buf(), 1)), resume: true, ..base };
    run(m, w, &mut CayleySgd::new(Mode::Default), &options, 3).0.unwrap_err();
    options
}

/// What is heard of a run: the stretches of work that began.
#[derive(Default)]
struct Begun(Vec<String>);

impl Watch for Begun {
    fn begin(&mut self, what: &str, _: usize) {
        self.0.push(what.into());
    }
}

/// The search of clip ratios takes minutes on a real model: what it does not decide is compared before it.
#[test]
fn a_state_of_another_run_is_refused_before_any_search() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state");
    let (m, w) = learnable(DType::F32);
    let o = LearnOptions {
        clip: ClipChoice::Learned,
        clip_windows: 2,
        weight_clip: WeightClip::Learned,
        checkpoint: Some((path.clone(), 1)),
        resume: true,
        ..options(Scheme::new(4, 4, 4), 4)
    };
    run(&m, &w, &mut CayleySgd::new(Mode::Default), &o, 2).0.unwrap_err();
    for (field, other) in [
        ("scheme", LearnOptions { scheme: Scheme::new(4, 4, 8), ..o.clone() }),
        ("seed", LearnOptions { seed: 1, ..o.clone() }),
        ("learning_rate", LearnOptions { learning_rate: Some(0.5), ..o.clone() }),
    ] {
        let mut begun = Begun::default();
        let learned = learn_watched(&m, &w, hadamard(&m, 1), &mut CayleySgd::new(Mode::Default), &other, &mut begun);
        says(learned, &["state", "saved by another run", &format!("{field} was ")]);
        assert!(begun.0.is_empty(), "{field}: {:?}", begun.0);
    }
    // The same run searches, and goes on.
    let mut begun = Begun::default();
    learn_watched(&m, &w, hadamard(&m, 1), &mut CayleySgd::new(Mode::Default), &o, &mut begun).unwrap();
    assert!(begun.0[0].contains("searching clip ratios"), "{:?}", begun.0);
}

#[test]
fn a_state_of_another_run_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state");
    let (m, w) = learnable(DType::F32);
    let o = stopped(&m, &w, &path);
    let saved = std::fs::read(&path).unwrap();
    let cayley = || CayleySgd::new(Mode::Default);
    for (field, other) in [
        ("scheme", LearnOptions { scheme: Scheme::new(4, 4, 8), ..o.clone() }),
        ("steps", LearnOptions { steps: 7, ..o.clone() }),
        ("batch", LearnOptions { batch: 4, ..o.clone() }),
        ("micro_batch", LearnOptions { micro_batch: Some(2), ..o.clone() }),
        ("learning_rate", LearnOptions { learning_rate: Some(0.5), ..o.clone() }),
        ("schedule", LearnOptions { schedule: Some(Schedule::Linear), ..o.clone() }),
        ("seed", LearnOptions { seed: 1, ..o.clone() }),
        ("held_out", LearnOptions { held_out: Some(3), ..o.clone() }),
    ] {
        says(run(&m, &w, &mut cayley(), &other, 0).0, &["state", "saved by another run", &format!("{field} was ")]);
    }
    // What was chosen is named, and not what follows from it.
    let other = LearnOptions { objective: Arc::new(Kl), ..o.clone() };
    says(run(&m, &w, &mut cayley(), &other, 0).0, &[r#"objective was "cross-entropy", now "kl""#]);
    let other = LearnOptions { transforms: "r1,r2-heads,up-down".parse().unwrap(), ..o.clone() };
    says(run(&m, &w, &mut cayley(), &other, 0).0, &["scales was none, now up-down"]);
    let half = Windows::new(w.batch(&(0..120).collect::<Vec<_>>()), SEQ).unwrap();
    says(run(&m, &half, &mut cayley(), &o, 0).0, &["saved by another run"]);
    let mut text = w.batch(&(0..w.len()).collect::<Vec<_>>());
    text[5] ^= 1;
    says(run(&m, &Windows::new(text, SEQ).unwrap(), &mut cayley(), &o, 0).0, &["text was "]);
    says(run(&m, &w, &mut Averaged::default(), &o, 0).0, &["optimizer was "]);
    says(run(&m, &w, &mut cayley().with_momentum(0.5).unwrap(), &o, 0).0, &["momentum 0", "0.5"]);
    says(learn(&m, &w, hadamard(&m, 2), &mut cayley(), &o, |_| ControlFlow::Continue(())), &["start was "]);
    says(run(&cast(&m, DType::F64), &w, &mut cayley(), &o, 0).0, &["dtype was "]);
    let other = changed(&m, DType::F32, |_, mut w| {
        w[Linear::Down].weight = w[Linear::Down].weight.clone().scale(1.001).unwrap();
        w
    });
    says(run(&other, &w, &mut cayley(), &o, 0).0, &["weights was "]);
    assert_eq!(std::fs::read(&path).unwrap(), saved, "a refusal touches nothing");

    std::fs::write(&path, &saved[..saved.len() - 4]).unwrap();
    says(run(&m, &w, &mut cayley(), &o, 0).0, &["state", "not a whole safetensors file"]);
    State::default().save(&path).unwrap();
    says(run(&m, &w, &mut cayley(), &o, 0).0, &["not a state saved while learning"]);
}

/// R4 of 100 values was in blocks of 20 when states did not say so.
#[test]
fn a_state_of_another_hadamard_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state");
    let (_, w) = learnable(DType::F32);
    let c = LlamaConfig { vocab_size: 32, ..config([4, 2], 8, 24, 100) };
    let m = cast(&model(&c, 3), DType::F32);
    let o = stopped(&m, &w, &path);
    let mut state = State::load(&path).unwrap();
    let recorded = state.scalars.get_mut("run").unwrap().as_object_mut().unwrap().remove("r4");
    assert_eq!(recorded.unwrap(), "100*1, Paley II");
    state.save(&path).unwrap();
    says(run(&m, &w, &mut CayleySgd::new(Mode::Default), &o, 0).0, &["r4 was none", "100*1, Paley II"]);
}

#[test]
fn numbers_that_are_not_finite_name_the_step_and_spare_the_state() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state");
    let (m, w) = learnable(DType::F32);
    let o = stopped(&m, &w, &path);
    let saved = std::fs::read(&path).unwrap();
    // One weight in the middle of the second layer, as a failing memory would.
    let broken = changed(&m, DType::F32, |layer, mut w| {
        let mut up = values(&w[Linear::Up].weight);
        up[500] = if layer == 1 { f64::NAN } else { up[500] };
        let up = Tensor::from_vec(up, w[Linear::Up].weight.shape()).unwrap();
        w[Linear::Up].weight = up.to_dtype(DType::F32).unwrap();
        w
    });
    let fresh = LearnOptions { resume: false, ..o.clone() };
    let cayley = || CayleySgd::new(Mode::Default);
    says(run(&broken, &w, &mut cayley(), &fresh, 0).0, &["step 1", "loss", "NaN", "from layer 1 on (down_input)"]);
    // A state of other weights is refused before the first of its steps.
    says(run(&broken, &w, &mut cayley(), &o, 0).0, &["saved by another run", "weights was"]);
    assert_eq!(std::fs::read(&path).unwrap(), saved);
    let (got, want) = (run(&m, &w, &mut cayley(), &o, 0).0, run(&m, &w, &mut cayley(), &fresh, 0).0);
    assert!(bits(&got.unwrap().rotations.r1) == bits(&want.unwrap().rotations.r1));

    // An optimiser that fails, and one that returns NaN: named, and never saved.
    let says_step_2 = |mut optimizer: Averaged, part: &str| {
        says(run(&m, &w, &mut optimizer, &fresh, 0).0, &["step 2", part]);
        assert_eq!(State::load(&path).unwrap().number("step").unwrap(), 1.0);
    };
    says_step_2(Averaged { fails: Some(2), ..Averaged::default() }, "gives up");
    says_step_2(Averaged { poisons: Some(2), ..Averaged::default() }, "R1");
}

/// Cross entropy that grows a hundredfold with every batch.
#[derive(Debug, Default)]
struct Growing(std::sync::atomic::AtomicI32);

impl Objective for Growing {
    fn name(&self) -> String {
        "growing".into()
    }
    fn loss<'t>(&self, rotations: &RotationVars<'t>, batch: &Batch<'_>) -> spinquant::Result<Var<'t>> {
        let factor = 100f64.powi(self.0.fetch_add(1, std::sync::atomic::Ordering::Relaxed));
        CrossEntropy.loss(rotations, batch)?.scale(factor)
    }
}

#[test]
fn a_loss_that_diverges_ends_the_run() {
    let (m, w) = learnable(DType::F32);
    let o = LearnOptions { objective: std::sync::Arc::new(Growing::default()), ..options(Scheme::new(4, 4, 4), 4) };
    says(run(&m, &w, &mut CayleySgd::new(Mode::Default), &o, 0).0, &["step 2", "diverges", "lower learning rate"]);
}

#[test]
fn learning_refuses_what_does_not_fit() {
    let (m, w) = learnable(DType::F32);
    let o = options(Scheme::new(4, 4, 4), 2);
    let mut cayley = CayleySgd::new(Mode::Default);
    let mut from = |r: Rotations, o: &LearnOptions| learn(&m, &w, r, &mut cayley, o, |_| ControlFlow::Continue(()));
    says(from(Rotations::identity(28, 8, 2).unwrap(), &o), &["R1", "[24, 24]"]);
    says(from(Rotations::identity(24, 8, 3).unwrap(), &o), &["R2", "[2, 8, 8]"]);
    let mut crooked = Rotations::identity(24, 8, 2).unwrap();
    crooked.r1 = crooked.r1.scale(1.01).unwrap();
    says(from(crooked, &o), &["R1 is not orthogonal", "max|RᵀR−I| = 2.0e-2"]);
    let start = || hadamard(&m, 1);
    says(from(start(), &LearnOptions { steps: 0, ..o.clone() }), &["at least 1"]);
    says(from(start(), &LearnOptions { batch: 250, ..o.clone() }), &["batch", "(216), got 250"]);
    says(from(start(), &LearnOptions { held_out: Some(240), ..o.clone() }), &["held-out windows", "(240), got 240"]);
    says(from(start(), &LearnOptions { learning_rate: Some(f64::NAN), ..o }), &["learning rate", "NaN"]);
}
