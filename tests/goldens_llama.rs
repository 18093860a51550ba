//! Whole networks against the published code: logits, loss, gradients of the rotations, and learning trajectories.

mod common;

use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use common::{Golden, distance, number};
use serde_json::Value;
use spinquant::llama::{Llama, Recompute, RotationVars};
use spinquant::ops::fake_quant::quantize;
use spinquant::optim::{CayleySgd, Mode, Optimizer};
use spinquant::quant::{Clip, Scheme, Site};
use spinquant::rotation::Rotations;
use spinquant::{DType, Device, Tape, Tensor, data};

/// Every folder of the goldens that holds a model.
fn models() -> Vec<(String, PathBuf)> {
    let mut found: Vec<_> = std::fs::read_dir(common::folder())
        .unwrap()
        .filter_map(|f| f.ok().map(|f| f.path()))
        .filter(|p| p.join("golden.safetensors").exists())
        .map(|p| (p.file_name().unwrap().to_string_lossy().into_owned(), p))
        .collect();
    found.sort();
    assert!(!found.is_empty(), "no llama goldens in {}", common::folder().display());
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
    let tape = Tape::new();
    let vars = RotationVars::variables(&tape, &s.rotations).unwrap();
    let run = Arc::new(s.model.run(scheme, s.seq).unwrap());
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

/// Input of every quantiser, in order.
fn observe(s: &Setup, scheme: &Scheme) -> Vec<(String, Site, Tensor)> {
    let seen = Arc::new(Mutex::new(vec![]));
    let tape = Tape::new();
    let vars = RotationVars::constants(&tape, &s.rotations).unwrap();
    let mut run = s.model.run(scheme, s.seq).unwrap();
    let sink = seen.clone();
    run.observer = Some(Arc::new(move |layer, site, x: &Tensor| sink.lock().unwrap().push((layer, site, x.clone()))));
    s.model.logits(&vars, &s.tokens, Arc::new(run), Recompute::None).unwrap();
    let seen = std::mem::take(&mut *seen.lock().unwrap());
    let sites = scheme.sites(s.model.config.head_dim);
    let active = seen.into_iter().filter(|(_, site, _)| sites.at(*site).is_active());
    active.map(|(layer, site, x)| (format!("layer {layer} {}", site.name()), site, x)).collect()
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
            let loss = (ours.loss - golden("loss")[0]).abs();
            let cosine = [cosine(&ours.grads[0], &golden("dR1")), cosine(&ours.grads[1], &golden("dR2"))];
            let (differ, all) = codes(&s, &scheme, &format!("{name} {id}"));
            let (drifted, from_tie) = drift(&s, &exact, &scheme);
            println!("{name} {id} on {device}: loss {loss:.1e}, cosines {cosine:.6?}, {differ} of {all} codes differ");
            println!("  {drifted} codes drifted from the f64 network's, the first {from_tie:.1e} of a step from a tie");
            assert!(from_tie <= 1e-3, "{name} {id}: a code differs {from_tie:e} of a step from a tie");
            assert!(loss <= 1e-3, "{name} {id}: loss is off by {loss:e}, {drifted} codes drifted");
            assert!(cosine.iter().all(|c| *c >= 0.999), "{name} {id}: cosines {cosine:?}");
            assert!(differ as f64 <= 1e-3 * all as f64, "{name} {id}: {differ} of {all} codes differ");
        }
    }
}

fn cosine(a: &[f64], b: &[f64]) -> f64 {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

/// Codes of every quantiser of the f32 network, weights included, that differ from those of the f64 quantiser on the same values;
/// each must be within rounding error of a tie. (Against the f64 *network* one tie changes everything after it: see `drift`.)
fn codes(s: &Setup, scheme: &Scheme, id: &str) -> (usize, usize) {
    let sites = scheme.sites(s.model.config.head_dim);
    let mut all: Vec<_> = observe(s, scheme).into_iter().map(|(name, site, x)| (name, *sites.at(site), x)).collect();
    if sites.weight.is_active() {
        let tape = Tape::new();
        let vars = RotationVars::constants(&tape, &s.rotations).unwrap();
        let exact = scheme.unquantized_weights().sites(s.model.config.head_dim);
        for (l, block) in s.model.blocks.iter().enumerate() {
            let w = block.rotate(&vars.r1, &vars.r2[l], &exact, None).unwrap();
            for (name, w) in [("q", w.q), ("k", w.k), ("v", w.v), ("o", w.o), ("gate", w.gate), ("up", w.up), ("down", w.down)] {
                all.push((format!("layer {l} {name}"), sites.weight, w.into_value()));
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

/// Activation codes (counted from the zero point) that differ between the f32 and the f64 network, and how far from a tie, in steps of
/// the grid, the f64 values of the first of them are. One tie that falls the other way moves every value after it.
fn drift(s: &Setup, exact: &Setup, scheme: &Scheme) -> (usize, f64) {
    let sites = scheme.sites(s.model.config.head_dim);
    let (mut count, mut first) = (0, 0f64);
    for ((_, site, x), (_, _, y)) in observe(s, scheme).into_iter().zip(observe(exact, scheme)) {
        let (a, b) = (quantize(&x, sites.at(site)).unwrap(), quantize(&y, sites.at(site)).unwrap());
        let (za, zb) = (a.zero.to_f64_vec().unwrap(), b.zero.to_f64_vec().unwrap());
        let differ = |i: &usize| f64::from(a.codes[*i]) - za[i / a.group] != f64::from(b.codes[*i]) - zb[i / b.group];
        let at: Vec<usize> = (0..a.codes.len()).filter(differ).collect();
        if count == 0 && !at.is_empty() {
            let (values, scale) = (y.to_f64_vec().unwrap(), b.scale.to_f64_vec().unwrap());
            let from_tie = |i: &usize| {
                let t = values[*i] / scale[i / b.group];
                (t - t.floor() - 0.5).abs()
            };
            first = at.iter().map(from_tie).fold(0.0, f64::max);
        }
        count += at.len();
    }
    (count, first)
}

#[test]
fn f32_on_the_cpu() {
    f32_rules(&Device::Cpu);
}

#[test]
fn f32_on_the_gpu() {
    match Device::cuda(0) {
        Ok(device) => f32_rules(&device),
        Err(e) => println!("skipped: {e}"),
    }
}
