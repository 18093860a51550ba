//! Whole networks against the published code: logits, loss, gradients of the rotations, and learning trajectories.

mod common;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use common::{Golden, distance, number};
use serde_json::Value;
use spinquant::grid::Quantized;
use spinquant::llama::{Llama, Recompute, RotationVars, Run};
use spinquant::ops::fake_quant::quantize;
use spinquant::optim::{CayleySgd, Mode, Optimizer};
use spinquant::quant::{Clip, Scheme, Site};
use spinquant::rotation::Rotations;
use spinquant::{DType, Device, Tape, Tensor, data};

/// Every folder of the goldens that holds a model.
fn models() -> Vec<(String, PathBuf)> {
    let mut found: Vec<_> = std::fs::read_dir(common::golden::folder())
        .unwrap()
        .filter_map(|f| f.ok().map(|f| f.path()))
        .filter(|p| p.join("golden.safetensors").exists())
        .map(|p| (p.file_name().unwrap().to_string_lossy().into_owned(), p))
        .collect();
    found.sort();
    assert!(!found.is_empty(), "no llama goldens in {}", common::golden::folder().display());
    found
}

struct Setup {
    golden: Golden,
    model: Llama,
    rotations: Rotations,
    tokens: Vec<u32>,
    seq: usize,
}

fn setup(name: &str, path: &PathBuf, dtype: DType, device: &Device) -> Setup {
    let golden = Golden::open(&format!("{name}/golden.safetensors"));
    let model = Llama::load(path, dtype, device).unwrap();
    let rotations = Rotations { r1: golden.get("R1"), r2: golden.get("R2") };
    let rotations = rotations.to_dtype(dtype).unwrap().to_device(device).unwrap();
    let tokens = golden.get("tokens");
    let seq = tokens.cols();
    Setup { model, rotations, tokens: golden.values("tokens").iter().map(|t| *t as u32).collect(), seq, golden }
}

fn scheme(mode: &Value) -> Scheme {
    let bits = |field| number(mode, field) as u32;
    let flag = |field: &str| mode[field].as_bool().unwrap();
    Scheme {
        weight_bits: bits("w_bits"),
        activation_bits: bits("a_bits"),
        key_bits: bits("k_bits"),
        value_bits: bits("v_bits"),
        symmetric_weights: flag("symmetric_weights"),
        symmetric_activations: flag("symmetric_activations"),
        weight_clip: if flag("weight_clip_search") { Clip::Search } else { Clip::Ratio(1.0) },
        ..Scheme::FULL_PRECISION
    }
}

fn modes(golden: &Golden) -> Vec<Value> {
    let modes = golden.cases["modes"].as_array().unwrap().clone();
    assert!(!modes.is_empty());
    modes
}

struct Outcome {
    logits: Vec<f64>,
    loss: f64,
    grads: [Vec<f64>; 2],
}

fn evaluate(s: &Setup, scheme: &Scheme, recompute: Recompute) -> Outcome {
    evaluate_with(s, s.model.run(scheme, s.seq).unwrap(), recompute)
}

fn evaluate_with(s: &Setup, run: Run, recompute: Recompute) -> Outcome {
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

fn relative(a: &[f64], b: &[f64]) -> f64 {
    distance(a, b) / b.iter().fold(0f64, |m, x| m.max(x.abs()))
}

#[test]
fn f64_logits_loss_and_gradients() {
    let mut count = 0;
    for (name, path) in models() {
        let s = setup(&name, &path, DType::F64, &Device::Cpu);
        for mode in modes(&s.golden) {
            let id = mode["name"].as_str().unwrap();
            let ours = evaluate(&s, &scheme(&mode), Recompute::None);
            let golden = |what: &str| s.golden.values(&format!("{id}.{what}"));
            let errors = [
                relative(&ours.logits, &golden("logits")),
                relative(&[ours.loss], &golden("loss")),
                relative(&ours.grads[0], &golden("dR1")),
                relative(&ours.grads[1], &golden("dR2")),
            ];
            println!("{name} {id}: relative errors of logits, loss, dR1, dR2: {errors:?}");
            assert!(errors.iter().all(|e| *e <= 1e-8), "{name} {id}: {errors:?}");
            let again = evaluate(&s, &scheme(&mode), Recompute::All);
            assert!(again.logits == ours.logits && again.grads == ours.grads, "{name} {id}: recomputing changed bits");
            count += 1;
        }
    }
    println!("{count} modes");
}

#[test]
fn f64_trajectories() {
    for (name, path) in models() {
        let s = setup(&name, &path, DType::F64, &Device::Cpu);
        let Some(t) = s.golden.cases.get("trajectory") else { continue };
        let mode = modes(&s.golden).into_iter().find(|m| m["name"] == t["mode"]).unwrap();
        let (scheme, lr, steps) = (scheme(&mode), number(t, "lr"), number(t, "steps") as usize);
        let (losses, r1, r2) = (s.golden.values("trajectory.loss"), s.golden.get("trajectory.R1"), s.golden.get("trajectory.R2"));
        let mut rotations = s.rotations.clone();
        let mut optimizer = CayleySgd::new(Mode::Parity);
        assert_eq!(losses.len(), steps);
        for (step, golden) in losses.iter().enumerate() {
            let tape = Tape::new();
            let vars = RotationVars::variables(&tape, &rotations).unwrap();
            let loss = s.model.loss(&vars, &s.tokens, s.seq, &scheme, Recompute::None).unwrap();
            let value = loss.value().item().unwrap();
            let grads = vars.gradients(&mut tape.backward(loss).unwrap()).unwrap();
            let mut params = rotations.as_params().unwrap();
            optimizer.step(&mut params, grads, lr).unwrap();
            rotations = Rotations::from_params(&params).unwrap();
            let wide = |t: &Tensor| t.to_f64_vec().unwrap();
            let errors = [
                (value - golden).abs(),
                distance(&wide(&rotations.r1), &wide(&r1.index(step).unwrap())),
                distance(&wide(&rotations.r2), &wide(&r2.index(step).unwrap())),
            ];
            println!("{name} step {step}: errors of loss, R1, R2: {errors:?}");
            assert!(errors.iter().all(|e| *e <= 1e-7), "{name} step {step}: {errors:?}");
        }
    }
}

/// Elementwise tolerance of full-precision logits in f32, relative to the largest.
const F32_LOGITS: f64 = 2e-5;

/// What went into the active quantisers of activations, in order: layer, site, values.
type Seen = Vec<(usize, Site, Tensor)>;

fn observe(s: &Setup, scheme: &Scheme) -> Seen {
    observe_with(s, scheme, s.model.run(scheme, s.seq).unwrap())
}

fn observe_with(s: &Setup, scheme: &Scheme, mut run: Run) -> Seen {
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

fn f32_rules(device: &Device) {
    for (name, path) in models() {
        let s = setup(&name, &path, DType::F32, device);
        let exact = setup(&name, &path, DType::F64, &Device::Cpu);
        for mode in modes(&s.golden) {
            let id = mode["name"].as_str().unwrap();
            let scheme = scheme(&mode);
            let ours = evaluate(&s, &scheme, Recompute::None);
            let golden = |what: &str| s.golden.values(&format!("{id}.{what}"));
            let error = relative(&ours.logits, &golden("logits"));
            if scheme.is_full_precision() {
                assert!(error <= F32_LOGITS, "{name} {id}: logits are off by {error:e}");
            }
            // Where no tie falls the other way the network followed is that of the goldens.
            let Followed { outcome, ties, drifted } = follow(observe(&s, &scheme), &exact, &scheme);
            let golden_loss = golden("loss")[0];
            if ties == 0 {
                assert!((outcome.loss - golden_loss).abs() <= 1e-8, "{name} {id}: {} in f64, not {golden_loss}", outcome.loss);
            }
            let loss = (ours.loss - outcome.loss).abs();
            let cosine = [0, 1].map(|i| cosine(&ours.grads[i], &outcome.grads[i]));
            let (differ, all) = codes(&s, &scheme, &format!("{name} {id}"));
            println!("{name} {id} on {device}: loss {loss:.1e}, cosines {cosine:.6?}, {differ} of {all} codes differ");
            println!(
                "  {ties} ties fell the other way, {drifted} codes drifted; the golden loss is {:.1e} off",
                (ours.loss - golden_loss).abs()
            );
            assert!(loss <= 1e-3, "{name} {id}: loss is off by {loss:e}, {ties} ties, {drifted} codes drifted");
            assert!(cosine.iter().all(|c| *c >= 0.999), "{name} {id}: cosines {cosine:?}");
            for (what, n) in [("differ", differ), ("drifted", drifted), ("are ties that fell the other way", ties)] {
                assert!(n as f64 <= 1e-3 * all as f64, "{name} {id}: {n} of {all} codes {what}");
            }
        }
    }
}

fn cosine(a: &[f64], b: &[f64]) -> f64 {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

/// Codes of every quantiser of the f32 network, weights included, that differ from those of the f64 quantiser on the same values;
/// each must be within rounding error of a tie. (Against the f64 *network* one tie changes everything after it: see `follow`.)
fn codes(s: &Setup, scheme: &Scheme, id: &str) -> (usize, usize) {
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
        let x = x.to_device(&Device::Cpu).unwrap().to_dtype(DType::F64).unwrap();
        let exact = quantize(&x, &spec).unwrap();
        let values = x.to_vec::<f64>().unwrap();
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
const TIE: f64 = 1e-5;

/// The f64 network, made to take the side that a network in f32 took wherever it is that near a tie: what a flawless f32 network with
/// those codes would compute. One tie that falls the other way moves every value after it, in f32 as in f64.
struct Followed {
    outcome: Outcome,
    /// Ties that were decided the other way.
    ties: usize,
    /// Codes that differ all the same, counted from the zero point.
    drifted: usize,
}

fn follow(seen: Seen, exact: &Setup, scheme: &Scheme) -> Followed {
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
    let mut run = exact.model.run(scheme, exact.seq).unwrap();
    run.patch = Some(Arc::new(move |layer, site, x: &Tensor| {
        let Some(wanted) = wanted.get(&(layer, site)) else { return Ok(None) };
        let spec = sites.at(site);
        let q = quantize(x, spec)?;
        let (zero, scale, mut values) = (q.zero.to_f64_vec()?, q.scale.to_f64_vec()?, x.to_f64_vec()?);
        let mut count = count.lock().unwrap();
        let before = count.0;
        for i in (0..values.len()).filter(|&i| code(&q, &zero, i) != wanted[i]) {
            let (scale, most) = (scale[i / q.group], 0.5 - 1e-9);
            let t = values[i] / scale;
            let near = t.clamp(wanted[i] - most, wanted[i] + most);
            if (t - near).abs() <= TIE * f64::from(1 << spec.bits) {
                values[i] = near * scale;
                count.0 += 1;
            } else {
                count.1 += 1;
            }
        }
        if count.0 == before { Ok(None) } else { Tensor::from_vec(values, x.shape().to_vec()).map(Some) }
    }));
    let outcome = evaluate_with(exact, run, Recompute::None);
    let (ties, drifted) = *counts.lock().unwrap();
    Followed { outcome, ties, drifted }
}

/// The value nearest to a tie is put on its other side: the network changes, and the one that follows it is the same.
#[test]
fn ties_are_followed() {
    let (mut tried, mut most) = (0, 0f64);
    for (name, path) in models() {
        let exact = setup(&name, &path, DType::F64, &Device::Cpu);
        for mode in modes(&exact.golden).iter().filter(|mode| !scheme(mode).is_full_precision()) {
            let scheme = scheme(mode);
            let sites = scheme.sites(exact.model.config.head_dim);
            let nearest = |(layer, site, x): (usize, Site, Tensor)| {
                let (q, values) = (quantize(&x, sites.at(site)).unwrap(), x.to_f64_vec().unwrap());
                let scale = q.scale.to_f64_vec().unwrap();
                let past = |i: usize| {
                    let t = values[i] / scale[i / q.group];
                    t.floor() + 0.5 - t
                };
                // Not at the ends of a range, where codes are clamped and the step is decided.
                let (lo, hi) = (q.codes.iter().min().unwrap(), q.codes.iter().max().unwrap());
                let inside = (0..values.len()).filter(|&i| (lo + 1..*hi).contains(&q.codes[i]));
                let i = inside.min_by(|a, b| past(*a).abs().total_cmp(&past(*b).abs())).unwrap();
                let over = past(i) + 1e-9f64.copysign(past(i));
                (past(i).abs(), layer, site, i, values[i] + over * scale[i / q.group])
            };
            let all = observe(&exact, &scheme).into_iter().map(nearest);
            let (from_tie, at_layer, at_site, i, value) = all.min_by(|a, b| a.0.total_cmp(&b.0)).unwrap();
            if from_tie > TIE * f64::from(1 << sites.at(at_site).bits) {
                println!("{name} {}: no value is near a tie, the nearest {from_tie:.1e} of a step", mode["name"]);
                continue;
            }
            tried += 1;
            let mut run = exact.model.run(&scheme, exact.seq).unwrap();
            run.patch = Some(Arc::new(move |layer, site, x: &Tensor| {
                if (layer, site) != (at_layer, at_site) {
                    return Ok(None);
                }
                let mut values = x.to_f64_vec()?;
                values[i] = value;
                Tensor::from_vec(values, x.shape().to_vec()).map(Some)
            }));
            let mut seen = observe_with(&exact, &scheme, run.clone());
            // Observers come before patches.
            let patched = |(layer, site, x): (usize, Site, Tensor)| {
                let x = run.patch.as_ref().unwrap()(layer, site, &x).unwrap().unwrap_or(x);
                (layer, site, x)
            };
            seen = seen.into_iter().map(patched).collect();
            let ours = evaluate_with(&exact, run.clone(), Recompute::None);
            let plain = evaluate(&exact, &scheme, Recompute::None);
            let followed = follow(seen, &exact, &scheme);
            println!("{name} {}: {from_tie:.1e} of a step, loss {} to {}", mode["name"], plain.loss, ours.loss);
            assert_eq!((followed.ties, followed.drifted), (1, 0), "{name} {}: {from_tie:e} of a step from a tie", mode["name"]);
            assert!((followed.outcome.loss - ours.loss).abs() < 1e-10, "{name} {}", mode["name"]);
            most = most.max((plain.loss - ours.loss).abs());
        }
    }
    assert!(tried == 0 || most > 0.0, "{tried} ties changed no loss: there was nothing to follow");
}

#[test]
fn f32_on_the_cpu() {
    f32_rules(&Device::Cpu);
}

#[test]
#[ignore = "needs a GPU"]
fn f32_on_the_gpu() {
    f32_rules(&common::need::gpu());
}
