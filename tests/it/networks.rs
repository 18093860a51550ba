//! Whole random networks in f32 against f64.

use spinquant::grid::QuantSpec;
use spinquant::llama::{Affine, Linear};
use spinquant::ops::fake_quant::quantize;
use spinquant::quant::{Clip, Scheme};
use spinquant::{Device, Tensor};

use crate::common::choices::{excess, nudged, ratios};
use crate::common::follow::{Network, changed, evaluate, follow, follow_weights, observe, rotated};
use crate::common::networks::{f32_against_f64, network};

#[test]
fn f32_on_the_cpu() {
    f32_against_f64(&Device::Cpu);
}

/// A weight of each linear is put on the other side of its nearest tie: the network changes, and the one that follows it is the same.
#[test]
fn ties_of_weights_are_followed() {
    let scheme = Scheme { weight_clip: Clip::Ratio(1.0), ..Scheme::new(4, 8, 8) };
    let exact = network([64, 256, 4, 2, 16], 0);
    let spec: QuantSpec = scheme.sites(exact.model.config.head_dim).weight;
    let plain = evaluate(&exact, &scheme, Default::default());
    for linear in Linear::ALL {
        let weights = rotated(&exact, 1, &scheme);
        let w = &weights[linear].weight;
        let (q, values) = (quantize(w, &spec).unwrap(), w.to_f64_vec().unwrap());
        let scale = q.scale.to_f64_vec().unwrap();
        let past = |i: usize| {
            let t = values[i] / scale[i / q.group];
            t.floor() + 0.5 - t
        };
        let inside = (0..values.len()).filter(|&i| (-6..=5).contains(&q.codes[i]));
        let i = inside.min_by(|a, b| past(*a).abs().total_cmp(&past(*b).abs())).unwrap();
        let mut change = vec![0.0; values.len()];
        change[i] = (past(i) + 1e-9f64.copysign(past(i))) * scale[i / q.group];
        let changes = weights.each(|l, w: &Affine<Tensor, Tensor>| {
            let x = if l == linear { change.clone() } else { vec![0.0; w.weight.len()] };
            Ok(Affine { weight: Tensor::from_vec(x, w.weight.shape())?, bias: None, norm: None })
        });
        let model = changed(&exact.model, &exact.rotations, 1, changes.unwrap(), &scheme);
        let other = Network { model, rotations: exact.rotations.clone(), tokens: exact.tokens.clone(), seq: exact.seq };
        let ours = evaluate(&other, &scheme, Default::default());
        let followed = follow_weights(&other, &exact, &scheme);
        assert_eq!((followed.ties, followed.drifted), (1, 0), "{linear}: {:e} of a step from a tie", past(i));
        let both = follow(observe(&other, &scheme), &exact, &scheme, &followed.model);
        assert_eq!((both.ties, both.drifted), (0, 0), "{linear}");
        assert!((both.outcome.loss - ours.loss).abs() < 1e-10, "{linear}");
        assert!((plain.loss - ours.loss).abs() > 1e-8, "{linear}: there was nothing to follow");
    }
}

/// A row of each linear is moved to where two clip ratios have one error but for 1e-7, on either side: the network changes, and the one
/// that follows it takes the same ratio, the same codes and nearly the same values.
#[test]
fn ties_of_searched_ratios_are_followed() {
    for symmetric_weights in [true, false] {
        let scheme = Scheme { symmetric_weights, ..Scheme::new(4, 8, 8) };
        let start = network([40, 72, 4, 1, 8], 0);
        let spec: QuantSpec = scheme.sites(start.model.config.head_dim).weight;
        for linear in Linear::ALL {
            let weights = rotated(&start, 1, &scheme);
            let w = &weights[linear].weight;
            let (values, cols) = (w.to_f64_vec().unwrap(), w.cols());
            let taken = ratios(w, &spec);
            // The second best ratio of every row, and of the rows the one where it is the nearest.
            let candidates = || (0..spinquant::grid::SEARCH_STEPS).map(|i| 1.0 - i as f64 / 100.0);
            let row = |r: usize| &values[r * cols..][..cols];
            let second = |r: usize| {
                let others = candidates().filter(|&p| p != taken[r]).map(|p| (excess(row(r), &spec, p, taken[r]), p));
                others.min_by(|a, b| a.0.total_cmp(&b.0)).unwrap()
            };
            let r = (0..taken.len()).min_by(|&a, &b| second(a).0.total_cmp(&second(b).0)).unwrap();
            let (distance, other) = second(r);
            let at = |to: f64| {
                let moved = nudged(row(r), &spec, other, taken[r], to);
                let changes = weights.each(|l, w: &Affine<Tensor, Tensor>| {
                    let mut x = vec![0.0; w.weight.len()];
                    if l == linear {
                        x[r * cols..][..cols].iter_mut().zip(&moved).zip(row(r)).for_each(|((x, to), from)| *x = to - from);
                    }
                    Ok(Affine { weight: Tensor::from_vec(x, w.weight.shape())?, bias: None, norm: None })
                });
                let model = changed(&start.model, &start.rotations, 1, changes.unwrap(), &scheme);
                Network { model, rotations: start.rotations.clone(), tokens: start.tokens.clone(), seq: start.seq }
            };
            let (exact, ours) = (at(1e-7), at(-1e-7));
            let chosen = |s: &Network| ratios(&rotated(s, 1, &scheme)[linear].weight, &spec)[r];
            assert_eq!((chosen(&exact), chosen(&ours)), (taken[r], other), "{linear}: the second best was {distance:e} worse");
            let followed = follow_weights(&ours, &exact, &scheme);
            assert_eq!((followed.choices, followed.drifted), (1, 0), "{linear}");
            let of = |model| Network { model, rotations: start.rotations.clone(), tokens: start.tokens.clone(), seq: start.seq };
            let (plain, ours) = (evaluate(&exact, &scheme, Default::default()), evaluate(&ours, &scheme, Default::default()));
            let followed = evaluate(&of(followed.model), &scheme, Default::default());
            let (off, before) = ((followed.loss - ours.loss).abs(), (plain.loss - ours.loss).abs());
            assert!(off < 1e-6, "{linear}: the loss is {off:e} off");
            assert!(before > 10.0 * off.max(1e-8), "{linear}: {before:e}: there was nothing to follow");
        }
    }
}
