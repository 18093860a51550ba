//! Whole random networks in f32 against f64.

use spinquant::grid::QuantSpec;
use spinquant::llama::{Affine, Linear};
use spinquant::ops::fake_quant::quantize;
use spinquant::quant::{Clip, Scheme};
use spinquant::{Device, Tensor};

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
