//! Learning on integers is learning: the same network, loss and gradients but for rounding.

use std::ops::ControlFlow;

use spinquant::data::Windows;
use spinquant::learn::{LearnOptions, learn};
use spinquant::quant::{Clip, Engine, Site};
use spinquant::rotation::{ClipEnds, Scale, Transforms};
use spinquant::{Error, optim};

use super::*;

/// W4A4KV4 with searched weights, 8-bit activations, all symmetric, weights in groups, blocks of R4.
fn schemes() -> Vec<Scheme> {
    let searched = Scheme { weight_clip: Clip::Search, ..Scheme::new(4, 4, 4) };
    vec![
        searched.online(Online::BOTH),
        Scheme::new(4, 8, 4).online(Online::NONE),
        Scheme { symmetric_activations: true, ..Scheme::new(8, 8, 16) }.online(Online { r3: false, r4: R4::Blocks(2) }),
        Scheme { weight_group: Some(4), ..Scheme::new(4, 4, 4) }.online(Online::BOTH),
    ]
}

fn models() -> Vec<Llama> {
    let biased = LlamaConfig { attention_bias: true, mlp_bias: true, ..config([4, 2], 8, 24, 40) };
    vec![model(&config([2, 2], 4, 8, 24), 1), model(&biased, 2)]
}

/// The loss and every gradient of learning with scales and clip ratios too.
fn all_gradients(m: &Llama, r: &Rotations, tokens: &[u32], scheme: &Scheme, recompute: Recompute) -> (Tensor, Vec<Tensor>) {
    let tape = Tape::new();
    let vars = RotationVars::variables(&tape, r).unwrap();
    let loss = m.loss(&vars, tokens, 8, scheme, recompute).unwrap();
    let value = loss.value().clone();
    let mut found = tape.backward(loss).unwrap();
    let mut grads = vars.gradients(&mut found).unwrap();
    grads.extend(vars.scale_gradients(&mut found).unwrap().iter().map(|(_, t)| t.clone()));
    grads.extend(vars.clip_gradients(&mut found).unwrap().iter().map(|(_, t)| t.clone()));
    (value, grads)
}

#[test]
fn engines_differ_by_rounding() {
    for m in models() {
        let (r, tokens) = (orthogonal(&m, 3), tokens(&m, 16, 4));
        for scheme in schemes() {
            let by = |engine| in_graph(&m.clone().by(engine), &r, &tokens, 8, &scheme);
            let (integer, simulated) = (by(Engine::Integer), by(Engine::Simulated));
            assert!(relative(&integer, &simulated) < 1e-12, "{scheme}: {}", relative(&integer, &simulated));
            assert_ne!(bits(&integer), bits(&simulated), "{scheme}: no product was of integers");
            let by = |engine| loss(&m.clone().by(engine), &r, &tokens, 8, &scheme, Recompute::None);
            let ((integer, of_integers), (simulated, of_values)) = (by(Engine::Integer), by(Engine::Simulated));
            assert!(relative(&integer, &simulated) < 1e-12, "{scheme}");
            assert_eq!(of_integers.len(), of_values.len());
            for (a, b) in of_integers.iter().zip(&of_values) {
                assert!(norm(b) > 0.0 && relative(a, b) < 1e-9, "{scheme}: {}", relative(a, b));
            }
        }
    }
}

/// In 32 and 16 bits a code may change where a value is near the middle between two; most do not.
#[test]
fn narrow_types_agree() {
    let wide = model(&config([4, 2], 8, 24, 40), 2);
    let (scheme, r, tokens) = (schemes()[0], orthogonal(&wide, 3), tokens(&wide, 16, 4));
    for (dtype, most) in [(DType::F32, 2e-2), (DType::BF16, 0.5)] {
        let m = cast(&wide, dtype);
        let by = |engine| in_graph(&m.clone().by(engine), &r.to_dtype(DType::F32).unwrap(), &tokens, 8, &scheme);
        let (integer, simulated) = (by(Engine::Integer), by(Engine::Simulated));
        assert_eq!(integer.dtype(), dtype);
        assert!(relative(&integer, &simulated) < most, "{dtype}: {}", relative(&integer, &simulated));
    }
}

/// Whatever is computed again, codes are found again.
#[test]
fn plans_change_no_bit() {
    let (m, scheme) = (model(&config([4, 2], 8, 24, 40), 2).by(Engine::Integer), schemes()[0]);
    let (r, tokens) = (orthogonal(&m, 3), tokens(&m, 16, 4));
    let of = |plan| loss(&m, &r, &tokens, 8, &scheme, Recompute::Planned(plan));
    let (want, gradients) = of(Plan::KEEP_ALL);
    for keep_weights in [false, true] {
        let (got, again) = of(Plan { recompute: 1, keep_weights, sequences: 0 });
        assert_eq!(bits(&got), bits(&want));
        for (a, b) in again.iter().zip(&gradients) {
            assert_eq!(bits(a), bits(b), "weights kept: {keep_weights}");
        }
        let (got, again) = of(Plan { recompute: 2, keep_weights, sequences: 1 });
        assert!(relative(&got, &want) < 1e-12);
        again.iter().zip(&gradients).for_each(|(a, b)| assert!(relative(a, b) < 1e-9));
    }
}

/// Clip ratios, of weights too, and scales, whose gradients read what was quantised.
#[test]
fn learned_ratios_are_of_codes_too() {
    let m = model(&config([4, 2], 8, 24, 40), 5);
    let (scheme, tokens) = (Scheme::new(4, 4, 4).online(Online::BOTH), tokens(&m, 16, 4));
    let transforms = Transforms::new(&[Scale::UpDown, Scale::Norms]);
    let r = orthogonal(&m, 3).with_transforms(&transforms, &m.config.scale_sizes(), None).unwrap();
    let ratios = vec![scheme.activation_clip; m.config.layers];
    let r = r.with_clips(ClipEnds::of_ratios(&Site::ALL, &ratios, m.config.kv_heads).unwrap());
    let by = |engine| all_gradients(&m.clone().by(engine), &r, &tokens, &scheme, Recompute::All);
    let ((integer, of_integers), (simulated, of_values)) = (by(Engine::Integer), by(Engine::Simulated));
    assert!(relative(&integer, &simulated) < 1e-12);
    assert_ne!(of_integers.iter().map(bits).collect::<Vec<_>>(), of_values.iter().map(bits).collect::<Vec<_>>());
    for (a, b) in of_integers.iter().zip(&of_values) {
        assert!(norm(b) > 0.0 && relative(a, b) < 1e-9, "{}", relative(a, b));
    }
}

/// Schemes whose operands are not both integers stay as they are, to the bit.
#[test]
fn what_has_no_codes_stays_on_values() {
    let m = model(&config([4, 2], 8, 24, 40), 2);
    let (r, tokens) = (orthogonal(&m, 3), tokens(&m, 16, 4));
    for scheme in ["W16A4KV4", "W4A16KV4", "W16A16KV16", "MXFP4KV4"] {
        let scheme = scheme.parse::<Scheme>().unwrap();
        let m = if scheme.weight_format.is_some() { model(&config([4, 2], 32, 64, 64), 2) } else { m.clone() };
        let r = if scheme.weight_format.is_some() { orthogonal(&m, 3) } else { r.clone() };
        let by = |engine| in_graph(&m.clone().by(engine), &r, &tokens, 8, &scheme);
        assert_eq!(bits(&by(Engine::Integer)), bits(&by(Engine::Simulated)), "{scheme}");
    }
}

/// Numbers differ by rounding, so a run is not gone on with by the other engine.
#[test]
fn a_state_belongs_to_its_engine() {
    let m = model(&config([2, 2], 4, 8, 24), 1);
    let state = std::env::temp_dir().join(format!("spinquant-engine-{}", std::process::id()));
    let windows = Windows::new(tokens(&m, 256, 9), 8).unwrap();
    let run = |engine, stop: bool| {
        let checkpoint = Some((state.clone(), 1));
        let options = LearnOptions { steps: 3, batch: 2, engine, checkpoint, resume: !stop, ..LearnOptions::default() };
        let mut optimizer = optim::by_name("cayley").unwrap();
        learn(&m, &windows, orthogonal(&m, 3), optimizer.as_mut(), &options, |_| {
            if stop { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })
    };
    assert!(matches!(run(Engine::Integer, true), Err(Error::Interrupted { step: 1 })));
    let message = run(Engine::Simulated, false).unwrap_err().to_string();
    assert!(message.contains("engine"), "{message}");
    let whole = run(Engine::Integer, false).unwrap();
    std::fs::remove_file(&state).unwrap();
    let other = run(Engine::Simulated, false).unwrap();
    let _ = std::fs::remove_file(&state);
    assert!((whole.loss_last - other.loss_last).abs() < 1e-6 * other.loss_last);
    assert!(relative(&whole.rotations.r1, &other.rotations.r1) < 1e-6);
}
