//! A network in f32 against the one in f64. One rounding error at a tie moves a code, and with it every value after it, in f64 as
//! well: so the f64 network is made to take the sides of ties that the f32 one took, of weights and of activations, and compared then.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use spinquant::grid::Quantized;
use spinquant::llama::{Affine, Basis, LayerWeights, Llama, Recompute, RotationVars, Run};
use spinquant::ops::fake_quant::quantize;
use spinquant::ops::hadamard;
use spinquant::quant::{R4, Scheme, Site};
use spinquant::rotation::Rotations;
use spinquant::{DType, Device, Tape, Tensor, data};

use super::{choices, distance};

/// A model, its rotations and a text.
pub struct Network {
    pub model: Llama,
    pub rotations: Rotations,
    pub tokens: Vec<u32>,
    pub seq: usize,
}

pub struct Outcome {
    pub logits: Vec<f64>,
    pub loss: f64,
    pub grads: [Vec<f64>; 2],
}

pub fn evaluate(s: &Network, scheme: &Scheme, recompute: Recompute) -> Outcome {
    evaluate_with(s, s.model.run(scheme, s.seq).unwrap(), recompute)
}

pub fn evaluate_with(s: &Network, run: Run, recompute: Recompute) -> Outcome {
    let tape = Tape::new();
    let vars = RotationVars::variables(&tape, &s.rotations).unwrap();
    let run = Arc::new(run);
    let logits = s.model.logits(&vars, &s.tokens, run, recompute).unwrap();
    let values = logits.value().to_f64_vec().unwrap();
    let loss = logits.cross_entropy(data::targets(&s.tokens, s.seq).into()).unwrap();
    let value = loss.value().item().unwrap();
    let grads = vars.gradients(&mut tape.backward(loss).unwrap()).unwrap();
    let grads: Vec<_> = grads.iter().map(|g| g.to_f64_vec().unwrap()).collect();
    Outcome { logits: values, loss: value, grads: grads.try_into().unwrap() }
}

pub fn relative(a: &[f64], b: &[f64]) -> f64 {
    distance(a, b) / b.iter().fold(0f64, |m, x| m.max(x.abs()))
}

/// What went into the active quantisers of activations, in order: layer, site, values.
pub type Seen = Vec<(usize, Site, Tensor)>;

pub fn observe(s: &Network, scheme: &Scheme) -> Seen {
    observe_with(s, scheme, s.model.run(scheme, s.seq).unwrap())
}

pub fn observe_with(s: &Network, scheme: &Scheme, mut run: Run) -> Seen {
    let seen = Arc::new(Mutex::new(vec![]));
    let tape = Tape::new();
    let vars = RotationVars::constants(&tape, &s.rotations).unwrap();
    let sink = seen.clone();
    run.observer = Some(Arc::new(move |layer, site, x: &Tensor| sink.lock().unwrap().push((layer, site, x.clone()))));
    s.model.logits(&vars, &s.tokens, Arc::new(run), Recompute::None).unwrap();
    let seen = std::mem::take(&mut *seen.lock().unwrap());
    let sites = scheme.sites(s.model.config.head_dim);
    seen.into_iter().filter(|(_, site, _)| sites.at(*site).is_active()).collect()
}

pub fn cosine(a: &[f64], b: &[f64]) -> f64 {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

/// Codes of every quantiser of the f32 network, weights included, that differ from those of the f64 quantiser on the same values;
/// each must be within rounding error of a tie. (Against the f64 *network* one tie changes everything after it: see `follow`.)
pub fn codes(s: &Network, scheme: &Scheme, id: &str) -> (usize, usize) {
    let sites = scheme.sites(s.model.config.head_dim);
    let named = |(layer, site, x): (usize, Site, Tensor)| (format!("layer {layer} {}", site.name()), *sites.at(site), x);
    let mut all: Vec<_> = observe(s, scheme).into_iter().map(named).collect();
    if sites.weight.is_active() {
        let tape = Tape::new();
        let vars = RotationVars::constants(&tape, &s.rotations).unwrap();
        let exact = scheme.unquantized_weights().sites(s.model.config.head_dim);
        for (l, block) in s.model.blocks.iter().enumerate() {
            let w = block.rotate(&vars.r1, &vars.r2[l], &exact, None).unwrap();
            for (linear, w) in w.linears {
                all.push((format!("layer {l} {linear}"), sites.weight, w.weight.into_value()));
            }
        }
    }
    let (mut differ, mut count) = (0, 0);
    for (name, spec, x) in all {
        let ours = quantize(&x, &spec).unwrap();
        let taken = choices::taken(&x, &spec);
        let x = x.to_device(&Device::Cpu).unwrap().to_dtype(DType::F64).unwrap();
        let values = x.to_vec::<f64>().unwrap();
        // The same candidate of the search where two have one error.
        let (chosen, _) = choices::follow(&values, ours.group, &spec, &taken, &format!("{id} {name}"));
        let exact = quantize(&Tensor::from_vec(chosen, x.shape()).unwrap(), &spec).unwrap();
        let scale = exact.scale.as_slice::<f64>().unwrap();
        for i in (0..values.len()).filter(|&i| ours.codes[i] != exact.codes[i]) {
            let t = values[i] / scale[i / ours.group];
            let from_tie = ((t - t.floor()) - 0.5).abs();
            assert!(from_tie <= 1e-5 * t.abs().max(1.0), "{id} {name}: code {i} differs {from_tie:e} from a tie");
            differ += 1;
        }
        count += values.len();
    }
    (differ, count)
}

/// How far from a tie a value may be, in parts of the range that its row's codes span, for arithmetic in f32 to take the other side.
pub const TIE: f64 = 1e-5;

/// The f64 network, made to take the side that a network in f32 took wherever it is that near a tie: what a flawless f32 network with
/// those codes would compute. One tie that falls the other way moves every value after it, in f32 as in f64.
pub struct Followed {
    pub outcome: Outcome,
    /// Ties that were decided the other way.
    pub ties: usize,
    /// Codes that differ all the same, counted from the zero point.
    pub drifted: usize,
}

pub fn follow(seen: Seen, exact: &Network, scheme: &Scheme, model: &Llama) -> Followed {
    let sites = scheme.sites(exact.model.config.head_dim);
    let code = |q: &Quantized, zero: &[f64], i: usize| f64::from(q.codes[i]) - zero[i / q.group];
    let coded = |(layer, site, x): (usize, Site, Tensor)| {
        let q = quantize(&x, sites.at(site)).unwrap();
        let zero = q.zero.to_f64_vec().unwrap();
        ((layer, site), (0..q.codes.len()).map(|i| code(&q, &zero, i)).collect::<Vec<f64>>())
    };
    let wanted: HashMap<_, _> = seen.into_iter().map(coded).collect();
    let counts = Arc::new(Mutex::new((0, 0)));
    let count = counts.clone();
    let mut run = model.run(scheme, exact.seq).unwrap();
    run.patch = Some(Arc::new(move |layer, site, x: &Tensor| {
        let Some(wanted) = wanted.get(&(layer, site)) else { return Ok(None) };
        let spec = sites.at(site);
        let q = quantize(x, spec)?;
        let (zero, scale, mut values) = (q.zero.to_f64_vec()?, q.scale.to_f64_vec()?, x.to_f64_vec()?);
        let mut count = count.lock().unwrap();
        let before = count.0;
        for i in (0..values.len()).filter(|&i| code(&q, &zero, i) != wanted[i]) {
            let scale = scale[i / q.group];
            let t = values[i] / scale;
            match nearest_on(t, wanted[i], spec.bits) {
                Some(near) => {
                    values[i] = near * scale;
                    count.0 += 1;
                }
                None => count.1 += 1,
            }
        }
        if count.0 == before { Ok(None) } else { Tensor::from_vec(values, x.shape().to_vec()).map(Some) }
    }));
    let followed =
        Network { model: model.clone(), rotations: exact.rotations.clone(), tokens: exact.tokens.clone(), seq: exact.seq };
    let outcome = evaluate_with(&followed, run, Recompute::None);
    let (ties, drifted) = *counts.lock().unwrap();
    Followed { outcome, ties, drifted }
}

/// The f32 network's own outcome, and that of the f64 network that follows it.
pub struct Compared {
    pub ours: Outcome,
    pub followed: Followed,
}

/// Checks a network in f32 against the same in f64: loss, gradients, and that codes differ at ties only, and few.
pub fn compare(s: &Network, exact: &Network, scheme: &Scheme, id: &str) -> Compared {
    let ours = evaluate(s, scheme, Recompute::None);
    let weights = follow_weights(s, exact, scheme);
    let mut followed = follow(observe(s, scheme), exact, scheme, &weights.model);
    followed.ties += weights.ties;
    followed.drifted += weights.drifted;
    let loss = (ours.loss - followed.outcome.loss).abs();
    let cosine = [0, 1].map(|i| cosine(&ours.grads[i], &followed.outcome.grads[i]));
    let (differ, all) = codes(s, scheme, id);
    println!("{id}: loss {loss:.1e}, cosines {cosine:.6?}, {differ} of {all} codes differ");
    println!("  {} ties fell the other way, {} of weights; {} codes drifted", followed.ties, weights.ties, followed.drifted);
    println!("  {} groups of weights are clipped by another ratio of the same error", weights.choices);
    let (ties, drifted) = (followed.ties, followed.drifted);
    assert!(loss <= 1e-3, "{id}: loss is off by {loss:e}, {ties} ties, {drifted} codes drifted");
    assert!(cosine.iter().all(|c| *c >= 0.999), "{id}: cosines {cosine:?}");
    for (what, n) in [("differ", differ), ("drifted", drifted), ("are ties that fell the other way", ties)] {
        assert!(n as f64 <= 1e-3 * all as f64, "{id}: {n} of {all} codes {what}");
    }
    Compared { ours, followed }
}

/// The f64 model with weights on the sides of ties that those of another network are on.
pub struct FollowedWeights {
    pub model: Llama,
    pub ties: usize,
    pub drifted: usize,
    /// Groups whose search took another of two candidates with one error.
    pub choices: usize,
}

/// The weights of a layer as they are rotated, before they are quantised.
pub fn rotated(s: &Network, layer: usize, scheme: &Scheme) -> LayerWeights {
    let tape = Tape::new();
    let vars = RotationVars::constants(&tape, &s.rotations).unwrap();
    let smooth = scheme.unquantized_weights().sites(s.model.config.head_dim);
    s.model.blocks[layer].rotate(&vars.r1, &vars.r2[layer], &smooth, None).unwrap().into_values()
}

pub fn follow_weights(s: &Network, exact: &Network, scheme: &Scheme) -> FollowedWeights {
    let spec = scheme.sites(exact.model.config.head_dim).weight;
    let mut followed = FollowedWeights { model: exact.model.clone(), ties: 0, drifted: 0, choices: 0 };
    if !spec.is_active() {
        return followed;
    }
    for layer in 0..exact.model.blocks.len() {
        let (theirs, ours) = (rotated(s, layer, scheme), rotated(exact, layer, scheme));
        let before = (followed.ties, followed.choices);
        let changes = ours.each(|linear, w: &Affine<Tensor, Tensor>| {
            let wanted = quantize(&theirs[linear].weight, &spec)?;
            let (taken, unmoved) = (choices::taken(&theirs[linear].weight, &spec), w.weight.to_f64_vec()?);
            let (values, others) = choices::follow(&unmoved, wanted.group, &spec, &taken, &format!("layer {layer} {linear}"));
            followed.choices += others;
            let q = quantize(&Tensor::from_vec(values.clone(), w.weight.shape())?, &spec)?;
            let code = |q: &Quantized, zero: &[f64], i: usize| f64::from(q.codes[i]) - zero[i / q.group];
            let (wanted_zero, zero) = (wanted.zero.to_f64_vec()?, q.zero.to_f64_vec()?);
            let scale = q.scale.to_f64_vec()?;
            let mut change: Vec<f64> = values.iter().zip(&unmoved).map(|(to, from)| to - from).collect();
            for i in 0..values.len() {
                let (to, scale) = (code(&wanted, &wanted_zero, i), scale[i / q.group]);
                if code(&q, &zero, i) == to {
                    continue;
                }
                match nearest_on(values[i] / scale, to, spec.bits) {
                    Some(near) => {
                        change[i] += near * scale - values[i];
                        followed.ties += 1;
                    }
                    None => followed.drifted += 1,
                }
            }
            Ok(Affine { weight: Tensor::from_vec(change, w.weight.shape())?, bias: None, norm: None })
        });
        let changes = changes.unwrap();
        if (followed.ties, followed.choices) != before {
            followed.model = changed(&followed.model, &exact.rotations, layer, changes, scheme);
        }
    }
    followed
}

/// The nearest number that rounds to the code `to`, where `t` (both from the zero point) is that near to it.
fn nearest_on(t: f64, to: f64, bits: u32) -> Option<f64> {
    let most = 0.5 - 1e-9;
    let near = t.clamp(to - most, to + most);
    ((t - near).abs() <= TIE * f64::from(1 << bits)).then_some(near)
}

/// An f64 model with changes added to one layer's *rotated* weights. Rotations are linear and orthogonal: the changes are rotated back
/// by the transposes, and added to the weights as they are.
pub fn changed(model: &Llama, rotations: &Rotations, layer: usize, changes: LayerWeights, scheme: &Scheme) -> Llama {
    let smooth = scheme.unquantized_weights().sites(model.config.head_dim);
    let changes = changes
        .each(|linear, change: &Affine<Tensor, Tensor>| {
            let weight = change.weight.clone();
            let r4 = smooth.online.r4.map(model.config.intermediate_size)?.filter(|_| linear.row().reads == Basis::Inner);
            let weight = if let Some(r4) = r4 { hadamard::transform(weight, &r4, true)? } else { weight };
            Ok(Affine { weight, bias: None, norm: None })
        })
        .unwrap();
    let mut back = smooth;
    back.online.r4 = R4::Off;
    let transposed = |t: &Tensor| {
        let (n, x) = (t.cols(), t.to_f64_vec().unwrap());
        let at = |i: usize| x[i / (n * n) * n * n + i % n * n + i / n % n];
        Tensor::from_vec((0..x.len()).map(at).collect::<Vec<f64>>(), t.shape()).unwrap()
    };
    let transposes = Rotations::new(transposed(&rotations.r1), transposed(&rotations.r2));
    let tape = Tape::new();
    let vars = RotationVars::constants(&tape, &transposes).unwrap();
    let block = &model.blocks[layer];
    let changes = block.with_weights(changes).rotate(&vars.r1, &vars.r2[layer], &back, None).unwrap().into_values();
    let sum = block.weights.each(|linear, w: &Affine<Tensor, Tensor>| {
        let weight = Tensor::axpby(1.0, w.weight.clone(), 1.0, changes[linear].weight.clone())?;
        Ok(Affine { weight, bias: w.bias.clone(), norm: w.norm.clone() })
    });
    let mut model = model.clone();
    model.blocks[layer] = block.with_weights(sum.unwrap()).into();
    model
}
