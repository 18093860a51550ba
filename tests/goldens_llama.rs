//! Whole networks against the published code: logits, loss, gradients of the rotations, and learning trajectories.

mod common;

use std::path::PathBuf;
use std::sync::Arc;

use common::follow::{Network, TIE, compare, evaluate, evaluate_with, follow, observe, observe_with, relative};
use common::{Golden, distance, number};
use serde_json::Value;
use spinquant::llama::{Llama, Recompute, RotationVars};
use spinquant::ops::fake_quant::quantize;
use spinquant::optim::{CayleySgd, Mode, Optimizer};
use spinquant::quant::{Scheme, Site};
use spinquant::rotation::Rotations;
use spinquant::{DType, Device, Tape, Tensor};

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

fn setup(name: &str, path: &PathBuf, dtype: DType, device: &Device) -> (Golden, Network) {
    let golden = Golden::open(&format!("{name}/golden.safetensors"));
    let model = Llama::load(path, dtype, device).unwrap();
    let rotations = Rotations::new(golden.get("R1"), golden.get("R2"));
    let rotations = rotations.to_dtype(dtype).unwrap().to_device(device).unwrap();
    let seq = golden.get("tokens").cols();
    let tokens = golden.values("tokens").iter().map(|t| *t as u32).collect();
    (golden, Network { model, rotations, tokens, seq })
}

fn scheme(mode: &Value) -> Scheme {
    spinquant::bench::goldens::scheme(mode).unwrap()
}

fn modes(golden: &Golden) -> Vec<Value> {
    let modes = golden.cases["modes"].as_array().unwrap().clone();
    assert!(!modes.is_empty());
    modes
}

#[test]
fn f64_logits_loss_and_gradients() {
    let mut count = 0;
    for (name, path) in models() {
        let (golden, s) = setup(&name, &path, DType::F64, &Device::Cpu);
        for mode in modes(&golden) {
            let id = mode["name"].as_str().unwrap();
            let ours = evaluate(&s, &scheme(&mode), Recompute::None);
            let golden = |what: &str| golden.values(&format!("{id}.{what}"));
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
        let (golden, s) = setup(&name, &path, DType::F64, &Device::Cpu);
        let Some(t) = golden.cases.get("trajectory") else { continue };
        let mode = modes(&golden).into_iter().find(|m| m["name"] == t["mode"]).unwrap();
        let (scheme, lr, steps) = (scheme(&mode), number(t, "lr"), number(t, "steps") as usize);
        let (losses, r1, r2) = (golden.values("trajectory.loss"), golden.get("trajectory.R1"), golden.get("trajectory.R2"));
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

fn f32_rules(device: &Device) {
    for (name, path) in models() {
        let (golden, s) = setup(&name, &path, DType::F32, device);
        let (_, exact) = setup(&name, &path, DType::F64, &Device::Cpu);
        for mode in modes(&golden) {
            let id = mode["name"].as_str().unwrap();
            let scheme = scheme(&mode);
            let compared = compare(&s, &exact, &scheme, &format!("{name} {id} on {device}"));
            let golden = |what: &str| golden.values(&format!("{id}.{what}"));
            if scheme.is_full_precision() {
                let error = relative(&compared.ours.logits, &golden("logits"));
                assert!(error <= F32_LOGITS, "{name} {id}: logits are off by {error:e}");
            }
            // Where no tie falls the other way the network followed is that of the goldens.
            let (loss, golden_loss) = (compared.followed.outcome.loss, golden("loss")[0]);
            if compared.followed.ties == 0 {
                assert!((loss - golden_loss).abs() <= 1e-8, "{name} {id}: {loss} in f64, not {golden_loss}");
            }
            println!("  the golden loss is {:.1e} off", (compared.ours.loss - golden_loss).abs());
        }
    }
}

/// The value nearest to a tie is put on its other side: the network changes, and the one that follows it is the same.
#[test]
fn ties_are_followed() {
    let (mut tried, mut most) = (0, 0f64);
    for (name, path) in models() {
        let (golden, exact) = setup(&name, &path, DType::F64, &Device::Cpu);
        for mode in modes(&golden).iter().filter(|mode| !scheme(mode).is_full_precision()) {
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
            let followed = follow(seen, &exact, &scheme, &exact.model);
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
