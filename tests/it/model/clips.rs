//! Laws of learned clip constants: they count where something is quantised and nowhere else, their gradients are right, and every way of
//! running a network reads the same ones.

use std::ops::ControlFlow;

use spinquant::calibrate::search_clips;
use spinquant::export::{Format, Output, load_native, write_rtn};
use spinquant::learn::{ClipChoice, LearnOptions, learn};
use spinquant::llama::{LayerClips, RotatedWeights};
use spinquant::quant::{ClipRatios, Site};
use spinquant::rotation::{ClipEnds, RotationFile};
use spinquant::{Device, Error, optim};

use super::*;

/// Logarithms of about −0.2 ± 0.1 at every site.
fn random_clips(m: &Llama, seed: u64) -> ClipEnds {
    let ones = vec![ClipRatios::NONE; m.config.layers];
    let ends = ClipEnds::of_ratios(&Site::ALL, &ones, m.config.kv_heads).unwrap();
    ends.map(|site, t| {
        let noise = ops::randn(t.shape(), seed ^ (site as u64 + 31)).to_f64_vec()?;
        Tensor::from_vec(noise.into_iter().map(|x| -0.2 + 0.1 * x.clamp(-3.0, 3.0)).collect::<Vec<f64>>(), t.shape())
    })
    .unwrap()
}

proptest! {
    #![proptest_config(cases(24))]

    #[test]
    fn they_leave_full_precision_alone(config in configs(), seed: u64, online in prop::sample::select(ONLINE.to_vec())) {
        let m = model(&config, seed);
        let t = tokens(&m, 14, seed ^ 1);
        let r = orthogonal(&m, seed ^ 2);
        let clipped = r.clone().with_clips(random_clips(&m, seed ^ 3));
        let scheme = FULL.online(online);
        let merged = |r: &Rotations| bits(&m.merge(Some(r), &scheme).unwrap().logits(&t, 7).unwrap());
        prop_assert_eq!(merged(&clipped), merged(&r));
    }

    #[test]
    fn merged_as_in_the_graph(config in configs(), seed: u64, scheme in schemes()) {
        let m = model(&config, seed);
        let t = tokens(&m, 14, seed ^ 1);
        let plain = orthogonal(&m, seed ^ 2);
        let r = plain.clone().with_clips(random_clips(&m, seed ^ 3));
        let merged = m.merge(Some(&r), &scheme).unwrap().logits(&t, 7).unwrap();
        prop_assert!(relative(&in_graph(&m, &r, &t, 7, &scheme), &merged) < 1e-11);
        let without = m.merge(Some(&plain), &scheme).unwrap().logits(&t, 7).unwrap();
        prop_assert_eq!(relative(&without, &merged) > 1e-9, scheme.quantizes_activations());
    }

    /// Both ends at a site's ratio are the ratio.
    #[test]
    fn equal_ends_are_ratios(config in configs(), seed: u64, scheme in schemes()) {
        let m = model(&config, seed);
        let t = tokens(&m, 14, seed ^ 1);
        let r = orthogonal(&m, seed ^ 2);
        let ratios: ClipRatios = "activations=0.8,key=0.9,value=0.7".parse().unwrap();
        let ends = ClipEnds::of_ratios(&Site::ALL, &vec![ratios; m.config.layers], m.config.kv_heads).unwrap();
        let want = m.merge(Some(&r), &Scheme { activation_clip: ratios, ..scheme }).unwrap().logits(&t, 7).unwrap();
        let got = m.merge(Some(&r.with_clips(ends)), &scheme).unwrap().logits(&t, 7).unwrap();
        prop_assert!(relative(&got, &want) < 1e-11);
    }

    #[test]
    fn plans_agree(config in configs(), seed: u64, scheme in schemes(), straight: bool) {
        let m = model(&config, seed);
        let t = tokens(&m, 18, seed ^ 1);
        let r = orthogonal(&m, seed ^ 2).with_clips(random_clips(&m, seed ^ 3));
        let gradients = |recompute| {
            let tape = Tape::new();
            let vars = RotationVars { straight, ..RotationVars::variables(&tape, &r).unwrap() };
            let mut grads = tape.backward(m.loss(&vars, &t, 9, &scheme, recompute).unwrap()).unwrap();
            let clips = vars.clip_gradients(&mut grads).unwrap();
            clips.iter().map(|(_, t)| t.clone()).chain(vars.gradients(&mut grads).unwrap()).collect::<Vec<_>>()
        };
        let want = gradients(Recompute::None);
        let moved = want[..Site::ALL.len()].iter().any(|t| norm(t) > 0.0);
        prop_assert_eq!(moved, scheme.quantizes_activations());
        same_for_every_plan(&want, gradients)?;
    }
}

proptest! {
    #![proptest_config(cases(12))]

    #[test]
    fn gradients_of_a_clipped_layer(config in configs(), seed: u64, scheme in schemes(), straight: bool) {
        let m = model(&config, seed);
        let (r, x) = (orthogonal(&m, seed ^ 1), ops::randn([10, config.hidden_size], seed ^ 2));
        let clips = random_clips(&m, seed ^ 3);
        let run = m.run(&scheme, 5).unwrap();
        let mut inputs = vec![x, r.r1, r.r2.index(0).unwrap()];
        inputs.extend(clips.iter().map(|(_, t)| t.index(0).unwrap()));
        check::gradients(&inputs, |v| {
            let mut v = v.into_iter();
            let mut next = || v.next().unwrap();
            let (x, r1, r2) = (next(), next(), next());
            let mut w: RotatedWeights = m.blocks[0].rotate(&r1, &r2, &run.sites, Some(1))?;
            w.around.clips = LayerClips::from(std::array::from_fn(|_| Some(next())));
            w.around.straight = straight;
            m.blocks[0].forward(x, w, &run)
        }).unwrap();
    }
}

fn small() -> (Llama, Rotations, Vec<u32>) {
    let m = model(&LlamaConfig { attention_bias: true, mlp_bias: true, ..config([4, 2], 8, 24, 40) }, 5);
    let r = orthogonal(&m, 6).with_clips(random_clips(&m, 7));
    let t = tokens(&m, 32, 8);
    (m, r, t)
}

#[test]
fn files_and_native_outputs_hold_them_under_a_version_of_their_own() {
    let (m, r, t) = small();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("R.safetensors");
    let scheme = Scheme::new(4, 4, 4);
    RotationFile::new(r.clone()).with_clips_of(&scheme).write(&path).unwrap();
    assert_eq!(spinquant::io::load_tensors(&path).unwrap().1["format_version"], "3");
    let file = RotationFile::read(&path).unwrap();
    for (site, t) in r.clips.iter() {
        assert_eq!(bits(file.rotations.clips.get(site).unwrap()), bits(t), "{}", site.name());
    }
    // For other bits they are not meant.
    assert!(!file.rotations_for(&scheme).clips.is_empty());
    assert!(file.rotations_for(&Scheme::new(4, 8, 4)).clips.is_empty());
    let message = RotationFile::new(r.clone()).write(dir.path().join("R.bin")).unwrap_err().to_string();
    assert!(message.contains("clip") && message.contains("R.bin"), "{message}");

    let want = m.merge(Some(&r), &scheme).unwrap().logits(&t, 16).unwrap();
    let plain = m.merge(Some(&r.clone().with_clips(ClipEnds::default())), &scheme).unwrap().logits(&t, 16).unwrap();
    assert!(relative(&want, &plain) > 1e-6);
    let out = dir.path().join("native");
    write_rtn(&m, Some(&r), &scheme, Output::new(&out, Format::Native), |_| {}).unwrap();
    let native = load_native(&out, &Device::Cpu).unwrap();
    assert_eq!(bits(&native.model.logits(&t, 16).unwrap()), bits(&want));
    assert_eq!(native.rotations.unwrap().clips.iter().count(), Site::ALL.len());
    assert!(std::fs::read_to_string(out.join("spinquant.json")).unwrap().contains("\"format_version\": 2"));
}

#[test]
fn those_of_another_model_are_refused() {
    let (m, r, _) = small();
    let wrong = ClipEnds::of_ratios(&[Site::Key], &[ClipRatios::NONE; 2], 4).unwrap();
    let message = m.merge(Some(&r.with_clips(wrong)), &FULL).unwrap_err().to_string();
    assert!(message.contains("clips.key") && message.contains("[2, 2, 2]"), "{message}");
}

#[test]
fn learning_starts_at_the_layers_ratios_moves_them_and_resumes_to_the_same_bits() {
    let (m, r, _) = small();
    let windows = spinquant::data::Windows::new(tokens(&m, 16 * 40, 9), 16).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let options = LearnOptions {
        steps: 6,
        batch: 4,
        micro_batch: Some(2),
        learning_rate: Some(0.5),
        clip: ClipChoice::Learned,
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
    let (found, goal) = whole.clip.clone().unwrap();
    let again =
        search_clips(&m, Some(&start), &options.scheme, &windows, &windows.spread(8), goal, |_, _| ControlFlow::Continue(()));
    assert_eq!(again.unwrap(), found);
    let begun = ClipEnds::of_ratios(&Site::ALL, &found.layers, 2).unwrap();
    for (site, t) in whole.rotations.clips.iter() {
        let moved = distance(&values(t), &values(begun.get(site).unwrap()));
        assert!(moved > 1e-3 && moved < 6.0 * 0.011 * (t.len() as f64).sqrt(), "{}: {moved}", site.name());
    }
    let kept = LearnOptions { checkpoint: Some((dir.path().join("state"), 1)), resume: true, ..options.clone() };
    assert!(matches!(run(&kept, 3), Err(Error::Interrupted { step: 3 })));
    let other = run(&LearnOptions { clip_rate: 0.5, ..kept.clone() }, usize::MAX).unwrap_err().to_string();
    assert!(other.contains("another run") && other.contains("clip_rate"), "{other}");
    let resumed = run(&kept, usize::MAX).unwrap();
    for (site, t) in whole.rotations.clips.iter() {
        assert_eq!(bits(resumed.rotations.clips.get(site).unwrap()), bits(t), "{}", site.name());
    }
    assert_eq!(bits(&resumed.rotations.r1), bits(&whole.rotations.r1));
}
