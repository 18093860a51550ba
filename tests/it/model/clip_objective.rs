//! Clip ratios that follow an objective of their own: each group has the gradients of its objective alone, and nothing else changes.

use std::ops::ControlFlow;
use std::path::Path;

use spinquant::data::Windows;
use spinquant::learn::{ClipChoice, LearnOptions, Learned, WeightClip, learn};
use spinquant::rotation::Transforms;
use spinquant::{Error, objective, optim};

use super::*;

fn small() -> (Llama, Rotations, Windows) {
    let m = model(&LlamaConfig { attention_bias: true, ..config([4, 2], 8, 24, 40) }, 5);
    let windows = Windows::new(tokens(&m, 16 * 40, 9), 16).unwrap();
    let start = orthogonal(&m, 6);
    (m, start, windows)
}

fn options(of_transforms: &str, of_clips: Option<&str>) -> LearnOptions {
    LearnOptions {
        steps: 1,
        batch: 4,
        micro_batch: Some(2),
        learning_rate: Some(0.5),
        held_out: Some(4),
        clip: ClipChoice::Learned,
        weight_clip: WeightClip::Learned,
        transforms: Transforms::ALL,
        objective: objective::by_name(of_transforms).unwrap(),
        clip_objective: of_clips.map(|name| objective::by_name(name).unwrap()),
        ..LearnOptions::default()
    }
}

fn run((m, start, windows): &(Llama, Rotations, Windows), options: &LearnOptions, stop: usize) -> Result<Learned, Error> {
    let mut optimizer = optim::by_name("cayley").unwrap();
    learn(m, windows, start.clone(), optimizer.as_mut(), options, |report| {
        if report.step == stop { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })
}

/// The bits of what leaves the full-precision network alone, and of clip ratios.
fn groups(r: &Rotations) -> [Vec<(String, Vec<u64>)>; 2] {
    let named = r.tensors().into_iter().map(|(name, t)| (name.to_string(), bits(t)));
    let (clips, transforms): (Vec<_>, Vec<_>) = named.partition(|(name, _)| name.contains("clip"));
    assert!(transforms.len() > 4 && clips.len() == 6 + 7, "{} {}", transforms.len(), clips.len());
    [transforms, clips]
}

/// After one step of the product of manifolds each group is where its objective alone moves it.
#[test]
fn each_group_has_the_gradients_of_its_objective_alone() {
    let place = small();
    for recompute in [Recompute::None, Recompute::All] {
        let step = |first, second| {
            let options = LearnOptions { recompute: Some(recompute), ..options(first, second) };
            let learned = run(&place, &options, usize::MAX).unwrap();
            (groups(&learned.rotations), learned.loss_first)
        };
        let (text, faithful) = (step("cross-entropy", None), step("kl", None));
        assert!(text.0[0] != faithful.0[0] && text.0[1] != faithful.0[1]);
        let mixed = step("cross-entropy", Some("kl"));
        assert_eq!(mixed.0, [text.0[0].clone(), faithful.0[1].clone()]);
        assert_eq!(mixed.1, text.1);
        assert_eq!(step("kl", Some("cross-entropy")).0, [faithful.0[0].clone(), text.0[1].clone()]);
        assert_eq!(step("reconstruction", Some("kl")).0[1], faithful.0[1]);
    }
}

/// A local objective turns rotations alone; clip ratios may follow another beside it.
#[test]
fn a_local_objective_stands_beside_one_of_clip_ratios() {
    let place = small();
    let step = |first, second| {
        let options = LearnOptions { transforms: Transforms::PUBLISHED, ..options(first, second) };
        run(&place, &options, usize::MAX).unwrap().rotations
    };
    let (mixed, faithful) = (step("whip", Some("kl")), step("kl", None));
    assert_ne!(bits(&mixed.r1), bits(&faithful.r1));
    for ((site, a), (_, b)) in mixed.clips.iter().zip(faithful.clips.iter()) {
        assert_eq!(bits(a), bits(b), "{}", site.name());
    }
}

#[test]
fn equal_objectives_are_one_and_a_stopped_run_resumes_to_the_same_bits() {
    let (place, dir) = (small(), tempfile::tempdir().unwrap());
    let of = |first, second| LearnOptions { steps: 4, ..options(first, second) };
    let whole = |options: &LearnOptions| {
        let learned = run(&place, options, usize::MAX).unwrap();
        (groups(&learned.rotations), learned.loss_last.to_bits(), learned.held_out_last.to_bits())
    };
    assert_eq!(whole(&of("kl", Some("kl"))), whole(&of("kl", None)));

    let kept = |options: LearnOptions, path: &Path| LearnOptions { checkpoint: Some((path.into(), 1)), resume: true, ..options };
    let (mixed, state) = (of("cross-entropy", Some("kl")), dir.path().join("state"));
    assert!(matches!(run(&place, &kept(mixed.clone(), &state), 2), Err(Error::Interrupted { step: 2 })));
    for other in [None, Some("reconstruction")] {
        let message = run(&place, &kept(of("cross-entropy", other), &state), usize::MAX).unwrap_err().to_string();
        assert!(message.contains("another run: clip_objective was \"kl\""), "{message}");
    }
    assert_eq!(whole(&kept(mixed.clone(), &state)), whole(&mixed));
}

#[test]
fn what_cannot_have_one_is_refused() {
    let place = small();
    let says = |options: LearnOptions, parts: &[&str]| {
        let message = run(&place, &options, usize::MAX).unwrap_err().to_string();
        assert!(parts.iter().all(|part| message.contains(part)), "{message}");
    };
    says(options("kl", Some("whip")), &["clip objective", "expected one of the whole network, got whip"]);
    let kl = || LearnOptions { weight_clip: WeightClip::Search, ..options("cross-entropy", Some("kl")) };
    says(LearnOptions { clip: ClipChoice::Auto, ..kl() }, &["clip objective", "kl has nothing to move", "W4A4KV4"]);
    says(LearnOptions { scheme: Scheme::new(4, 16, 16), ..kl() }, &["kl has nothing to move", "W4A16KV16"]);
    // A start's are moved on.
    let clips = run(&place, &kl(), usize::MAX).unwrap().rotations.clips;
    let place = (place.0, place.1.with_clips(clips.clone()), place.2);
    let more = run(&place, &LearnOptions { clip: ClipChoice::Auto, ..kl() }, usize::MAX).unwrap().rotations.clips;
    assert!(more.iter().zip(clips.iter()).any(|((_, a), (_, b))| bits(a) != bits(b)));
}
