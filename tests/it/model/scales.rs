//! Laws of all transforms beside R1 and one R2 a layer: the function stays, gradients are right, and both ways of merging agree.

use std::ops::ControlFlow;

use spinquant::export::{self, Format, Output, load_native, write_rtn};
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

/// Random values of everything that there is to learn, of what the model can have.
fn random(m: &Llama, transforms: &Transforms, seed: u64) -> Rotations {
    let transforms = Transforms::ALL.of(&m.config.scale_sizes()).unwrap().both(transforms);
    let LlamaConfig { hidden_size, head_dim: d, layers, kv_heads, .. } = m.config;
    let each = if transforms.heads() { kv_heads } else { 1 };
    let other = |seed| {
        let r2 = Rotations::random_orthogonal(hidden_size, d, layers * each, seed).unwrap().r2;
        if transforms.heads() { r2.reshape([layers, each, d, d]).unwrap() } else { r2 }
    };
    let kinds: Vec<Scale> = transforms.scales().collect();
    let r2b = transforms.has(Scale::ValuesGeneral).then(|| other(seed ^ 5));
    let r = Rotations { r2b, ..Rotations::new(orthogonal(m, seed).r1, other(seed)) };
    let r = r.with_scales(random_scales(m, &kinds, seed ^ 3));
    assert_eq!(r.transforms(), transforms);
    r
}

fn transforms() -> impl Strategy<Value = Transforms> {
    let kinds = prop::sample::subsequence(Scale::ALL.to_vec(), 1..=Scale::ALL.len());
    (kinds, any::<bool>()).prop_map(|(kinds, heads)| Transforms::new(&kinds).with_heads(heads))
}

proptest! {
    #![proptest_config(cases(24))]

    #[test]
    fn they_leave_logits_alone(config in configs(), seed: u64, online in prop::sample::select(ONLINE.to_vec()), transforms in transforms()) {
        let m = model(&config, seed);
        let (t, r) = (tokens(&m, 14, seed ^ 1), random(&m, &transforms, seed ^ 2));
        let want = m.merge(None, &FULL.online(Online::NONE)).unwrap().logits(&t, 7).unwrap();
        let scheme = FULL.online(online);
        prop_assert!(relative(&m.merge(Some(&r), &scheme).unwrap().logits(&t, 7).unwrap(), &want) < 1e-11);
        prop_assert!(relative(&in_graph(&m, &r, &t, 7, &scheme), &want) < 1e-11);
    }

    /// Weights with scales on the tape are those merged in f64, and so are the quantised networks.
    #[test]
    fn merged_as_in_the_graph(config in configs(), seed: u64, scheme in schemes(), transforms in transforms()) {
        let m = model(&config, seed);
        let (t, r) = (tokens(&m, 14, seed ^ 1), random(&m, &transforms, seed ^ 2));
        let plain = Rotations { r2b: None, ..r.clone().with_scales(Scales::default()) };
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
        let unseen = !r.transforms().scales().any(|kind| seen(&kind));
        prop_assert!(unseen || scheme.weight_bits == 16 && scheme.activation_bits == 16 || relative(&without, &merged) > 1e-9);
    }

    #[test]
    fn plans_agree(config in configs(), seed: u64, scheme in schemes()) {
        let m = model(&config, seed);
        let t = tokens(&m, 18, seed ^ 1);
        let r = random(&m, &Transforms::ALL, seed ^ 2);
        let gradients = |recompute| {
            let tape = Tape::new();
            let vars = RotationVars::variables(&tape, &r).unwrap();
            let mut grads = tape.backward(m.loss(&vars, &t, 9, &scheme, recompute).unwrap()).unwrap();
            let scales = vars.scale_gradients(&mut grads).unwrap();
            scales.iter().map(|(_, t)| t.clone()).chain(vars.gradients(&mut grads).unwrap()).collect::<Vec<_>>()
        };
        same_for_every_plan(&gradients(Recompute::None), gradients)?;
    }
}

proptest! {
    #![proptest_config(cases(24))]

    /// Where weights are not quantised, gate and up may stay as they are with scales too: the same values and gradients.
    #[test]
    fn scaling_activations_is_scaling_weights(config in configs(), seed: u64, online in prop::sample::select(ONLINE.to_vec()), transforms in transforms()) {
        let m = model(&config, seed);
        let (seq, scheme) = (7, Scheme::new(16, 4, 4).online(online));
        let (r, x) = (random(&m, &transforms, seed ^ 1), ops::randn([2 * seq, config.hidden_size], seed ^ 2));
        let run = m.run(&scheme, seq).unwrap();
        let layer = |tokens: Option<usize>| {
            let tape = Tape::new();
            let vars = RotationVars::variables(&tape, &r).unwrap();
            let x = tape.variable(x.clone());
            let (r1, r2, scales) = (vars.r1.clone(), vars.r2[0].clone(), vars.scales[0].clone());
            let by = LayerTransforms { r1, r2, r2b: vars.r2b.first().cloned(), scales: scales.clone() };
            let w = m.blocks[0].transform(&by, &run.sites, tokens).unwrap();
            assert_eq!(w.leave.is_some(), tokens.is_some());
            assert_eq!(w.around.up.is_some(), tokens.is_some() && scales.up_down.is_some());
            if tokens.is_some() {
                assert!([Linear::Gate, Linear::Up].into_iter().all(|l| !w.linears[l].weight.requires_grad()));
            }
            let y = m.blocks[0].forward(x.clone(), w, &run).unwrap();
            let value = y.value().clone();
            let u = ops::randn(y.shape(), seed ^ 3);
            let mut g = tape.backward_from(y, u).unwrap();
            let LayerScales { up_down, values, norms: [first, second], rope_pairs, values_general } = scales;
            let learned = [Some(x), Some(by.r1), Some(by.r2), by.r2b, up_down, values, first, second, rope_pairs, values_general];
            let grads = learned.iter().flatten().map(|v| g.take(v).unwrap()).collect::<Vec<_>>();
            (value, grads)
        };
        let ((value, ours), (wanted, want)) = (layer(Some(1)), layer(None));
        prop_assert!(relative(&value, &wanted) <= 1e-9, "{:e}", relative(&value, &wanted));
        for (i, (ours, want)) in ours.iter().zip(&want).enumerate() {
            prop_assert!(relative(ours, want) <= 1e-8, "{i}: {:e}", relative(ours, want));
        }
    }
}

proptest! {
    #![proptest_config(cases(12))]

    #[test]
    fn gradients_of_a_scaled_layer(config in configs(), seed: u64, scheme in schemes(), transforms in transforms(), leave: bool) {
        let m = model(&config, seed);
        let (r, x) = (random(&m, &transforms, seed ^ 1), ops::randn([10, config.hidden_size], seed ^ 2));
        let run = m.run(&scheme, 5).unwrap();
        let mut inputs = vec![x, r.r1.clone(), r.r2.index(0).unwrap()];
        inputs.extend(r.r2b.iter().map(|t| t.index(0).unwrap()));
        inputs.extend(r.scales.iter().map(|(kind, t)| (kind, t.index(0).unwrap())).flat_map(|(kind, t)| match kind {
            Scale::Norms => vec![t.index(0).unwrap(), t.index(1).unwrap()],
            _ => vec![t],
        }));
        check::gradients(&inputs, |v| {
            let mut v = v.into_iter();
            let mut next = || v.next().unwrap();
            let (x, r1, r2) = (next(), next(), next());
            let r2b = r.r2b.is_some().then(&mut next);
            let mut scales = LayerScales::default();
            for kind in r.transforms().scales() {
                match kind {
                    Scale::UpDown => scales.up_down = Some(next()),
                    Scale::Values => scales.values = Some(next()),
                    Scale::Norms => scales.norms = [Some(next()), Some(next())],
                    Scale::RopePairs => scales.rope_pairs = Some(next()),
                    Scale::ValuesGeneral => scales.values_general = Some(next()),
                }
            }
            let weights = m.blocks[0].transform(&LayerTransforms { r1, r2, r2b, scales }, &run.sites, leave.then_some(1))?;
            m.blocks[0].forward(x, weights, &run)
        }).unwrap();
    }
}

fn small() -> (Llama, Rotations, Vec<u32>) {
    let m = model(&LlamaConfig { attention_bias: true, mlp_bias: true, ..config([4, 2], 8, 24, 40) }, 5);
    let r = random(&m, &Transforms::ALL, 6);
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
    for ((name, got), (_, want)) in back.tensors().into_iter().zip(r.tensors()) {
        assert!(bits(got) == bits(want) && got.shape() == want.shape(), "{name}");
    }
    let message = RotationFile::new(r.clone()).write(dir.path().join("R.bin")).unwrap_err().to_string();
    assert!(message.contains("R1 and R2 only") && message.contains("R.bin") && message.contains("r2-heads"), "{message}");
    assert!(r.save_torch(&dir.path().join("R.bin")).unwrap_err().to_string().contains("r2-heads"));
    let version = |r: &Rotations| {
        r.save(&path).unwrap();
        assert_eq!(Rotations::load(&path).unwrap().transforms(), r.transforms());
        spinquant::io::load_tensors(&path).unwrap().1["format_version"].clone()
    };
    assert_eq!(version(&Rotations::new(r.r1.clone(), r.r2.clone())), "2");
    // A file of R1 and one R2 a layer is what it was.
    assert_eq!(version(&Rotations::new(r.r1, r.r2.reshape([4, 8, 8]).unwrap())), "1");
}

#[test]
fn scales_of_another_model_are_refused() {
    let (m, r, _) = small();
    let other = config([4, 2], 8, 24, 56);
    let wrong =
        Rotations::new(r.r1.clone(), r.r2.clone()).with_scales(Scales::ones(&[Scale::UpDown], &other.scale_sizes()).unwrap());
    let message = m.merge(Some(&wrong), &FULL).unwrap_err().to_string();
    assert!(message.contains("scales up-down") && message.contains("[2, 40]"), "{message}");
    let refused = |r: Rotations, parts: [&str; 2]| {
        let message = m.merge(Some(&r), &FULL).unwrap_err().to_string();
        assert!(parts.iter().all(|part| message.contains(part)), "{message}");
    };
    // R2b and its scales belong together; heads are those of the model.
    refused(Rotations { r2b: None, ..r.clone() }, ["R2b", "together with scales values-general"]);
    refused(r.clone().with_scales(Scales::default()), ["R2b", "together with scales values-general"]);
    let three = Rotations::random_orthogonal(24, 8, 2, 1).unwrap().per_head(3, None).unwrap();
    refused(three, ["R2", "one for each of 2 key and value heads of this model, or one a layer, got 3"]);
    let bent = Rotations { r2b: Some(ops::randn([2, 2, 8, 8], 3)), ..r };
    refused(bent, ["R2b[0, 0] is not orthogonal", "max"]);
}

/// One R2 a layer, given to every head, is the same network; with a seed each head has another.
#[test]
fn r2_of_every_head_begins_as_that_of_the_layer() {
    let (m, r, _) = small();
    let plain = hadamard(&m, 3);
    let one = m.merge(Some(&plain), &FULL).unwrap();
    let same = |r: &Rotations| {
        let other = m.merge(Some(r), &FULL).unwrap();
        for (a, b) in one.blocks.iter().zip(&other.blocks).flat_map(|(a, b)| a.weights.tensors().zip(b.weights.tensors())) {
            assert!(relative(b, a) < 1e-14);
        }
    };
    let alike = plain.clone().per_head(2, None).unwrap();
    assert_eq!((alike.r2.shape(), plain.heads(), alike.heads()), (&[2, 2, 8, 8][..], None, Some(2)));
    same(&alike);
    let start = plain.clone().with_transforms(&Transforms::ALL, &m.config.scale_sizes(), None).unwrap();
    assert_eq!(start.transforms(), Transforms::ALL.of(&m.config.scale_sizes()).unwrap());
    same(&start);
    let other = plain.clone().per_head(2, Some(7)).unwrap();
    other.check(24, 8, 2, 1e-13).unwrap();
    for l in 0..2 {
        let layer = other.r2.index(l).unwrap();
        assert_eq!(bits(&layer.index(0).unwrap()), bits(&plain.r2.index(l).unwrap()));
        assert!(distance(&values(&layer.index(0).unwrap()), &values(&layer.index(1).unwrap())) > 0.1);
    }
    // What is there stays.
    assert_eq!(bits(&r.clone().per_head(2, Some(1)).unwrap().r2), bits(&r.r2));
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
    let sha = export::rotations_sha256;
    assert_eq!(sha(&native.rotations.unwrap()).unwrap(), sha(&r).unwrap());

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
    const LEARNED: [Scale; 4] = [Scale::UpDown, Scale::Norms, Scale::RopePairs, Scale::ValuesGeneral];
    let (m, ..) = small();
    let windows = spinquant::data::Windows::new(tokens(&m, 16 * 40, 9), 16).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    let options = LearnOptions {
        steps: 6,
        batch: 4,
        micro_batch: Some(2),
        learning_rate: Some(0.5),
        transforms: Transforms::new(&LEARNED).with_heads(true),
        ..LearnOptions::default()
    };
    let start = hadamard(&m, 4);
    let run = |options: &LearnOptions, stop: usize| {
        let mut optimizer = optim::by_name("cayley").unwrap();
        learn(&m, &windows, start.clone(), optimizer.as_mut(), options, |report| {
            if report.step == stop { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })
    };
    let whole = run(&options, usize::MAX).unwrap();
    assert!(whole.rotations.scales.get(Scale::Values).is_none());
    for kind in LEARNED {
        assert!(values(whole.rotations.scales.get(kind).unwrap()).iter().any(|a| a.abs() > 1e-3), "{kind}");
    }
    // Heads that began alike part, and R2b leaves the identity.
    let r2 = whole.rotations.r2.index(0).unwrap();
    assert!(distance(&values(&r2.index(0).unwrap()), &values(&r2.index(1).unwrap())) > 1e-4);
    let identity = start.clone().with_transforms(&options.transforms, &m.config.scale_sizes(), Some(0)).unwrap().r2b.unwrap();
    assert!(distance(&values(whole.rotations.r2b.as_ref().unwrap()), &values(&identity)) > 1e-4);
    let kept = LearnOptions { checkpoint: Some((state, 1)), resume: true, ..options.clone() };
    assert!(matches!(run(&kept, 3), Err(Error::Interrupted { step: 3 })));
    // Without the scales it is another run.
    let other = run(&LearnOptions { transforms: Transforms::PUBLISHED, ..kept.clone() }, usize::MAX).unwrap_err().to_string();
    assert!(other.contains("another run"), "{other}");
    let one = LearnOptions { transforms: options.transforms.with_heads(false), ..kept.clone() };
    assert!(run(&one, usize::MAX).unwrap_err().to_string().contains("another run"));
    let resumed = run(&kept, usize::MAX).unwrap();
    let (got, want) = (resumed.rotations.tensors(), whole.rotations.tensors());
    assert_eq!((got.len(), want.len()), (7, 7));
    for ((name, got), (_, want)) in got.into_iter().zip(want) {
        assert_eq!(bits(got), bits(want), "{name}");
    }
}
