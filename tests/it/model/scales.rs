//! Laws of scales: the function stays, gradients are right, and both ways of merging agree.

use std::ops::ControlFlow;

use spinquant::export::{Format, Output, load_native, write_rtn};
use spinquant::learn::{LearnOptions, learn};
use spinquant::llama::{LayerScales, LayerTransforms};
use spinquant::rotation::{RotationFile, Scale, Scales, Transforms};
use spinquant::{Device, Error, optim};

use super::*;

/// Logarithms of about ±0.3.
fn random_scales(m: &Llama, kinds: &[Scale], seed: u64) -> Scales {
    let ones = Scales::ones(kinds, &m.config.scale_sizes()).unwrap();
    ones.map(|kind, t| ops::randn(t.shape(), seed ^ (kind as u64 + 11)).scale(0.3)).unwrap()
}

fn kinds() -> impl Strategy<Value = Vec<Scale>> {
    prop::sample::subsequence(Scale::ALL.to_vec(), 1..=Scale::ALL.len())
}

/// Those of some kinds that a model can have.
fn possible(m: &Llama, kinds: &[Scale]) -> Vec<Scale> {
    kinds.iter().copied().filter(|kind| kind.refused(&m.config.scale_sizes()).is_none()).collect()
}

proptest! {
    #![proptest_config(cases(24))]

    #[test]
    fn they_leave_logits_alone(config in configs(), seed: u64, online in prop::sample::select(ONLINE.to_vec()), kinds in kinds()) {
        let m = model(&config, seed);
        let (t, kinds) = (tokens(&m, 14, seed ^ 1), possible(&m, &kinds));
        let r = orthogonal(&m, seed ^ 2).with_scales(random_scales(&m, &kinds, seed ^ 3));
        let want = m.merge(None, &FULL.online(Online::NONE)).unwrap().logits(&t, 7).unwrap();
        let scheme = FULL.online(online);
        prop_assert!(relative(&m.merge(Some(&r), &scheme).unwrap().logits(&t, 7).unwrap(), &want) < 1e-11);
        prop_assert!(relative(&in_graph(&m, &r, &t, 7, &scheme), &want) < 1e-11);
    }

    /// Weights with scales on the tape are those merged in f64, and so are the quantised networks.
    #[test]
    fn merged_as_in_the_graph(config in configs(), seed: u64, scheme in schemes(), kinds in kinds()) {
        let m = model(&config, seed);
        let (t, kinds) = (tokens(&m, 14, seed ^ 1), possible(&m, &kinds));
        let plain = orthogonal(&m, seed ^ 2);
        let r = plain.clone().with_scales(random_scales(&m, &kinds, seed ^ 3));
        let merged = m.merge(Some(&r), &scheme).unwrap().logits(&t, 7).unwrap();
        prop_assert!(relative(&in_graph(&m, &r, &t, 7, &scheme), &merged) < 1e-11);
        // And they do something: other values are rounded.
        let without = m.merge(Some(&plain), &scheme).unwrap().logits(&t, 7).unwrap();
        // (Norms and no quantised activations, pairs and neither weights nor keys quantised, or no kind at all.)
        let seen = |kind: &Scale| match kind {
            Scale::Norms => scheme.activation_bits < 16 || scheme.weight_bits < 16,
            Scale::RopePairs => scheme.weight_bits < 16 || scheme.key_bits < 16,
            _ => true,
        };
        let unseen = !kinds.iter().any(seen);
        prop_assert!(unseen || scheme.weight_bits == 16 && scheme.activation_bits == 16 || relative(&without, &merged) > 1e-9);
    }

    #[test]
    fn plans_agree(config in configs(), seed: u64, scheme in schemes()) {
        let m = model(&config, seed);
        let t = tokens(&m, 18, seed ^ 1);
        let r = orthogonal(&m, seed ^ 2).with_scales(random_scales(&m, &possible(&m, &Scale::ALL), seed ^ 3));
        let gradients = |recompute| {
            let tape = Tape::new();
            let vars = RotationVars::variables(&tape, &r).unwrap();
            let mut grads = tape.backward(m.loss(&vars, &t, 9, &scheme, recompute).unwrap()).unwrap();
            let scales = vars.scale_gradients(&mut grads).unwrap();
            scales.iter().map(|(_, t)| t.clone()).chain(vars.gradients(&mut grads).unwrap()).collect::<Vec<_>>()
        };
        let want = gradients(Recompute::None);
        for plan in [Plan::INPUTS, Plan::LEAN, Plan { recompute: 1, keep_weights: true, sequences: 1 }] {
            for (got, want) in gradients(Recompute::Planned(plan)).iter().zip(&want) {
                prop_assert!(distance(&values(got), &values(want)) < 1e-12 * (1.0 + norm(want)), "{plan:?}");
            }
        }
    }
}

proptest! {
    #![proptest_config(cases(12))]

    #[test]
    fn gradients_of_a_scaled_layer(config in configs(), seed: u64, scheme in schemes(), kinds in kinds()) {
        let m = model(&config, seed);
        let (r, x) = (orthogonal(&m, seed ^ 1), ops::randn([10, config.hidden_size], seed ^ 2));
        let kinds = possible(&m, &kinds);
        let scales = random_scales(&m, &kinds, seed ^ 3);
        let run = m.run(&scheme, 5).unwrap();
        let mut inputs = vec![x, r.r1, r.r2.index(0).unwrap()];
        inputs.extend(scales.iter().map(|(kind, t)| (kind, t.index(0).unwrap())).flat_map(|(kind, t)| match kind {
            Scale::Norms => vec![t.index(0).unwrap(), t.index(1).unwrap()],
            _ => vec![t],
        }));
        check::gradients(&inputs, |v| {
            let mut v = v.into_iter();
            let mut next = || v.next().unwrap();
            let (x, r1, r2) = (next(), next(), next());
            let mut scales = LayerScales::default();
            for kind in &kinds {
                match kind {
                    Scale::UpDown => scales.up_down = Some(next()),
                    Scale::Values => scales.values = Some(next()),
                    Scale::Norms => scales.norms = [Some(next()), Some(next())],
                    Scale::RopePairs => scales.rope_pairs = Some(next()),
                }
            }
            let weights = m.blocks[0].transform(&LayerTransforms { r1, r2, scales }, &run.sites, Some(1))?;
            m.blocks[0].forward(x, weights, &run)
        }).unwrap();
    }
}

fn small() -> (Llama, Rotations, Vec<u32>) {
    let m = model(&LlamaConfig { attention_bias: true, mlp_bias: true, ..config([4, 2], 8, 24, 40) }, 5);
    let r = orthogonal(&m, 6).with_scales(random_scales(&m, &Scale::ALL, 7));
    let t = tokens(&m, 32, 8);
    (m, r, t)
}

#[test]
fn files_keep_them_and_an_r_bin_says_that_it_cannot() {
    let (_, r, _) = small();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("R.safetensors");
    RotationFile::new(r.clone()).write(&path).unwrap();
    let back = RotationFile::read(&path).unwrap().rotations;
    assert_eq!(back.scales.iter().count(), Scale::ALL.len());
    for (kind, t) in r.scales.iter() {
        assert_eq!(bits(back.scales.get(kind).unwrap()), bits(t), "{kind}");
    }
    let message = RotationFile::new(r.clone()).write(dir.path().join("R.bin")).unwrap_err().to_string();
    assert!(message.contains("R1 and R2 only") && message.contains("R.bin"), "{message}");
    // A file without scales is what it was.
    let plain = Rotations::new(r.r1, r.r2);
    plain.save(&path).unwrap();
    let version = |path: &std::path::Path| spinquant::io::load_tensors(path).unwrap().1["format_version"].clone();
    assert_eq!(version(&path), "1");
    assert!(Rotations::load(&path).unwrap().scales.is_empty());
}

#[test]
fn scales_of_another_model_are_refused() {
    let (m, r, _) = small();
    let other = config([4, 2], 8, 24, 56);
    let wrong = r.clone().with_scales(Scales::ones(&[Scale::UpDown], &other.scale_sizes()).unwrap());
    let message = m.merge(Some(&wrong), &FULL).unwrap_err().to_string();
    assert!(message.contains("scales up-down") && message.contains("[2, 40]"), "{message}");
}

/// Every output runs as the network in memory does; nothing runs that did not before, but for the norms' gains.
#[test]
fn outputs_hold_them() {
    let (m, r, t) = small();
    let dir = tempfile::tempdir().unwrap();
    let scheme = Scheme::new(4, 4, 4);
    let want = m.merge(Some(&r), &scheme).unwrap().logits(&t, 16).unwrap();
    let out = dir.path().join("native");
    write_rtn(&m, Some(&r), &scheme, Output::new(&out, Format::Native), |_| {}).unwrap();
    let native = load_native(&out, &Device::Cpu).unwrap();
    assert_eq!(bits(&native.model.logits(&t, 16).unwrap()), bits(&want));
    assert_eq!(native.rotations.unwrap().scales.iter().count(), Scale::ALL.len());

    let out = dir.path().join("hf");
    write_rtn(&m, Some(&r), &FULL.online(Online::NONE), Output::new(&out, Format::Hf), |_| {}).unwrap();
    let read = Llama::load_plain(&out, DType::F64, &Device::Cpu).unwrap();
    let full = m.merge(None, &FULL.online(Online::NONE)).unwrap().logits(&t, 16).unwrap();
    let got = read.merge(None, &FULL.online(Online::NONE)).unwrap().logits(&t, 16).unwrap();
    assert!(relative(&got, &full) < 1e-11);
    assert!(values(&read.blocks[0].gains().unwrap()[0]).iter().any(|g| (g - 1.0).abs() > 0.01));
}

#[test]
fn learning_moves_them_and_resumes_to_the_same_bits() {
    let (m, r, _) = small();
    let windows = spinquant::data::Windows::new(tokens(&m, 16 * 40, 9), 16).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    let options = LearnOptions {
        steps: 6,
        batch: 4,
        micro_batch: Some(2),
        learning_rate: Some(0.5),
        transforms: Transforms::new(&[Scale::UpDown, Scale::Norms, Scale::RopePairs]),
        ..LearnOptions::default()
    };
    let start = Rotations::new(r.r1, r.r2);
    let run = |options: &LearnOptions, stop: usize| {
        let mut optimizer = optim::by_name("cayley").unwrap();
        learn(&m, &windows, start.clone(), optimizer.as_mut(), options, |report| {
            if report.step == stop { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })
    };
    let whole = run(&options, usize::MAX).unwrap();
    assert!(whole.rotations.scales.get(Scale::Values).is_none());
    for kind in [Scale::UpDown, Scale::Norms, Scale::RopePairs] {
        assert!(values(whole.rotations.scales.get(kind).unwrap()).iter().any(|a| a.abs() > 1e-3), "{kind}");
    }
    let kept = LearnOptions { checkpoint: Some((state, 1)), resume: true, ..options.clone() };
    assert!(matches!(run(&kept, 3), Err(Error::Interrupted { step: 3 })));
    // Without the scales it is another run.
    let other = run(&LearnOptions { transforms: Transforms::PUBLISHED, ..kept.clone() }, usize::MAX).unwrap_err().to_string();
    assert!(other.contains("another run") && other.contains("scale"), "{other}");
    let resumed = run(&kept, usize::MAX).unwrap();
    for (kind, t) in whole.rotations.scales.iter() {
        assert_eq!(bits(resumed.rotations.scales.get(kind).unwrap()), bits(t), "{kind}");
    }
    assert_eq!(bits(&resumed.rotations.r1), bits(&whole.rotations.r1));
}
