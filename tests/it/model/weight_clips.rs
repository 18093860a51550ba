//! Laws of learned clip ratios of weights: they count where weights are quantised and nowhere else, their gradients are right, and every way of
//! running a network reads the same ones.

use std::ops::ControlFlow;

use spinquant::calibrate::{Calibration, quantize_weights, search_weight_clips};
use spinquant::data::Windows;
use spinquant::export::{Format, Output, load_native, write_rtn};
use spinquant::learn::{LearnOptions, WeightClip, learn};
use spinquant::objective;
use spinquant::quant::{Clip, Gptq, Rtn};
use spinquant::rotation::{RotationFile, WeightClips};
use spinquant::{Device, Error, optim};

use super::*;

/// Logarithms of about −0.2 ± 0.1 for every row or group.
fn random_clips(m: &Llama, scheme: &Scheme, seed: u64) -> WeightClips {
    let linear = |linear: Linear| {
        let [out, inputs] = linear.shape(&m.config);
        let shape = [m.config.layers, out * (inputs / scheme.weight_group.unwrap_or(inputs)), 2];
        let noise = values(&ops::randn(shape, seed ^ (linear as u64 + 31)));
        Tensor::from_vec(noise.into_iter().map(|x| -0.2 + 0.1 * x.clamp(-3.0, 3.0)).collect::<Vec<f64>>(), shape).unwrap()
    };
    WeightClips::new(scheme.weight_grid_name(), Linear::ALL.map(linear))
}

fn with_clips(m: &Llama, scheme: &Scheme, r: Rotations, seed: u64) -> Rotations {
    let clips = (scheme.weight_bits < 16).then(|| random_clips(m, scheme, seed));
    r.with_weight_clips(clips)
}

proptest! {
    #![proptest_config(cases(24))]

    #[test]
    fn they_leave_unquantised_weights_alone(config in configs(), seed: u64, online in prop::sample::select(ONLINE.to_vec())) {
        let m = model(&config, seed);
        let t = tokens(&m, 14, seed ^ 1);
        let r = orthogonal(&m, seed ^ 2);
        let clipped = r.clone().with_weight_clips(Some(random_clips(&m, &Scheme::new(4, 4, 4), seed ^ 3)));
        for scheme in [FULL.online(online), Scheme::new(16, 4, 4).online(online)] {
            let merged = |r: &Rotations| bits(&m.merge(Some(r), &scheme).unwrap().logits(&t, 7).unwrap());
            prop_assert_eq!(merged(&clipped), merged(&r));
        }
    }

    #[test]
    fn merged_as_in_the_graph(config in configs(), seed: u64, scheme in schemes()) {
        let m = model(&config, seed);
        let t = tokens(&m, 14, seed ^ 1);
        let plain = orthogonal(&m, seed ^ 2);
        let r = with_clips(&m, &scheme, plain.clone(), seed ^ 3);
        let merged = m.merge(Some(&r), &scheme).unwrap().logits(&t, 7).unwrap();
        prop_assert!(relative(&in_graph(&m, &r, &t, 7, &scheme), &merged) < 1e-11);
        let without = m.merge(Some(&plain), &scheme).unwrap().logits(&t, 7).unwrap();
        prop_assert_eq!(relative(&without, &merged) > 1e-9, scheme.weight_bits < 16);
        // The quantiser of outputs makes the same network.
        let rtn = quantize_weights(&m, Some(&r), &scheme, &Rtn, None, &mut (), |_| ControlFlow::Continue(())).unwrap();
        prop_assert_eq!(bits(&rtn.logits(&t, 7).unwrap()), bits(&merged));
    }

    /// What the search finds quantises as the search does.
    #[test]
    fn they_start_as_the_search(config in configs(), seed: u64, scheme in schemes(), ratio in prop::option::of(0.6f64..1.0)) {
        prop_assume!(scheme.weight_bits < 16);
        let scheme = Scheme { weight_clip: ratio.map_or(Clip::Search, Clip::Ratio), ..scheme };
        let m = model(&config, seed);
        let t = tokens(&m, 14, seed ^ 1);
        let r = orthogonal(&m, seed ^ 2);
        let found = search_weight_clips(&m, &r, &scheme, |_, _| ControlFlow::Continue(())).unwrap();
        let want = m.merge(Some(&r), &scheme).unwrap().logits(&t, 7).unwrap();
        let got = m.merge(Some(&r.with_weight_clips(Some(found))), &scheme).unwrap().logits(&t, 7).unwrap();
        prop_assert!(relative(&got, &want) < 1e-11);
    }

    #[test]
    fn plans_agree(config in configs(), seed: u64, scheme in schemes(), straight: bool) {
        let m = model(&config, seed);
        let t = tokens(&m, 18, seed ^ 1);
        let r = with_clips(&m, &scheme, orthogonal(&m, seed ^ 2), seed ^ 3);
        let gradients = |recompute| {
            let tape = Tape::new();
            let vars = RotationVars { straight, ..RotationVars::variables(&tape, &r).unwrap() };
            let mut grads = tape.backward(m.loss(&vars, &t, 9, &scheme, recompute).unwrap()).unwrap();
            let clips = vars.weight_clip_gradients(&mut grads).unwrap();
            let clips: Vec<Tensor> = clips.iter().flat_map(|clips| clips.iter()).map(|(_, t)| t.clone()).collect();
            clips.into_iter().chain(vars.gradients(&mut grads).unwrap()).collect::<Vec<_>>()
        };
        let want = gradients(Recompute::None);
        prop_assert_eq!(want.len() > 2, scheme.weight_bits < 16);
        prop_assert!(want.iter().all(|t| norm(t) > 0.0));
        same_for_every_plan(&want, gradients)?;
    }
}

proptest! {
    #![proptest_config(cases(12))]

    /// Through the whole quantised network, rotations and ratios together.
    #[test]
    fn gradients_of_a_network(config in configs(), seed: u64, scheme in schemes(), straight: bool) {
        prop_assume!(scheme.weight_bits < 16);
        let m = model(&config, seed);
        let (t, r) = (tokens(&m, 10, seed ^ 1), with_clips(&m, &scheme, orthogonal(&m, seed ^ 2), seed ^ 3));
        let clips = r.weight_clips.clone().unwrap();
        let layers = 0..config.layers;
        let mut inputs: Vec<Tensor> = std::iter::once(r.r1.clone()).chain(layers.clone().map(|l| r.r2.index(l).unwrap())).collect();
        inputs.extend(layers.flat_map(|l| clips.iter().map(move |(_, t)| t.index(l).unwrap()).collect::<Vec<_>>()));
        let run = Arc::new(m.run(&scheme, 5).unwrap());
        check::gradients(&inputs, |mut v| {
            let mut ratios = v.split_off(1 + config.layers).into_iter();
            let layers = (0..config.layers).map(|_| Linears::from_vec(ratios.by_ref().take(7).collect()));
            let weight_clips = WeightClipVars { grid: clips.grid().into(), layers: layers.collect::<Result<_, _>>()? };
            let vars = RotationVars::without_scales(v.remove(0), v);
            let vars = RotationVars { weight_clips: Some(weight_clips), straight, ..vars };
            m.logits(&vars, &t, run.clone(), Recompute::None)
        }).unwrap();
    }
}

fn small(scheme: &Scheme) -> (Llama, Rotations, Vec<u32>) {
    let m = model(&LlamaConfig { attention_bias: true, mlp_bias: true, ..config([4, 2], 8, 24, 40) }, 5);
    let r = with_clips(&m, scheme, orthogonal(&m, 6), 7);
    let t = tokens(&m, 32, 8);
    (m, r, t)
}

#[test]
fn files_hold_them_under_a_version_of_their_own_and_outputs_have_them_in_their_scales() {
    for group in [None, Some(8)] {
        let scheme = Scheme { weight_group: group, ..Scheme::new(4, 4, 4) };
        let (m, r, t) = small(&scheme);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("R.safetensors");
        RotationFile::new(r.clone()).write(&path).unwrap();
        let notes = spinquant::io::load_tensors(&path).unwrap().1;
        assert_eq!((notes["format_version"].as_str(), &notes["weight_clips_for"]), ("4", &scheme.weight_grid_name()));
        let file = RotationFile::read(&path).unwrap();
        let (back, clips) = (file.rotations.weight_clips.unwrap(), r.weight_clips.clone().unwrap());
        assert_eq!(back.grid(), scheme.weight_grid_name());
        for ((name, a), (_, b)) in back.iter().zip(clips.iter()) {
            assert_eq!((a.shape(), bits(a)), (b.shape(), bits(b)), "{name}");
        }
        assert!(!file.notes.contains_key("weight_clips_for"));
        let message = RotationFile::new(r.clone()).write(dir.path().join("R.bin")).unwrap_err().to_string();
        assert!(message.contains("clip ratios of weights") && message.contains("R.bin"), "{message}");

        let want = m.merge(Some(&r), &scheme).unwrap().logits(&t, 16).unwrap();
        let out = dir.path().join("native");
        write_rtn(&m, Some(&r), &scheme, Output::new(&out, Format::Native), |_| {}).unwrap();
        let native = load_native(&out, &Device::Cpu).unwrap();
        assert_eq!(bits(&native.model.logits(&t, 16).unwrap()), bits(&want));
    }
}

#[test]
fn those_of_another_model_or_grid_are_refused() {
    let scheme = Scheme::new(4, 4, 4);
    let (m, r, t) = small(&scheme);
    for other in [Scheme::new(3, 4, 4), Scheme { weight_group: Some(8), ..scheme }, Scheme { symmetric_weights: false, ..scheme }]
    {
        let message = m.merge(Some(&r), &other).unwrap_err().to_string();
        assert!(message.contains("learned for W4 symmetric") && message.contains(&other.weight_grid_name()), "{message}");
    }
    let clips = r.weight_clips.clone().unwrap();
    let mut all: Vec<Tensor> = clips.iter().map(|(_, t)| t.clone()).collect();
    all.swap(0, 4);
    let swapped = WeightClips::new(clips.grid(), all.try_into().unwrap());
    let message = m.merge(Some(&r.clone().with_weight_clips(Some(swapped))), &scheme).unwrap_err().to_string();
    assert!(message.contains("clip ratios of weights, q") && message.contains("[2, 32, 2]"), "{message}");

    let windows = Windows::new(tokens(&m, 16 * 40, 9), 16).unwrap();
    let options = LearnOptions { weight_clip: WeightClip::Learned, ..LearnOptions::default() };
    let learned = |options: LearnOptions| {
        let mut optimizer = optim::by_name("cayley").unwrap();
        learn(&m, &windows, r.clone().with_weight_clips(None), optimizer.as_mut(), &options, |_| ControlFlow::Continue(()))
            .unwrap_err()
            .to_string()
    };
    let message = learned(LearnOptions { scheme: Scheme::new(16, 4, 4), ..options.clone() });
    assert!(message.contains("weights of 2 to 8 bits") && message.contains("W16A4KV4"), "{message}");
    let message = learned(LearnOptions { objective: objective::by_name("kurtosis").unwrap(), ..options.clone() });
    assert!(message.contains("does not depend on those of weights"), "{message}");
    assert!(learned(LearnOptions { weight_clip_rate: Some(0.0), ..options }).contains("clip ratios of weights"));
    drop(t);
}

/// GPTQ's scales are those that the ratios give, as far as its weights are those that were merged.
#[test]
fn gptq_takes_its_scales_from_them() {
    for (symmetric, act_order) in [(true, false), (false, true)] {
        let scheme = Scheme { symmetric_weights: symmetric, ..Scheme::new(4, 16, 16) };
        let (m, r, _) = small(&scheme);
        let text = Windows::new(tokens(&m, 16 * 8, 9), 16).unwrap();
        let calibration = Calibration::first(&text, 8).unwrap();
        let gptq = Gptq { act_order, ..Gptq::default() };
        let mut kept = Kept::default();
        quantize_weights(&m, Some(&r), &scheme, &gptq, Some(&calibration), &mut kept, |_| ControlFlow::Continue(())).unwrap();
        let mut rtn = Kept::default();
        quantize_weights(&m, Some(&r), &scheme, &Rtn, None, &mut rtn, |_| ControlFlow::Continue(())).unwrap();
        let mut moved = 0;
        for (ours, want) in kept.0.iter().zip(&rtn.0) {
            assert_eq!(bits(&ours.scale), bits(&want.scale));
            moved += ours.codes.iter().zip(&want.codes).filter(|(a, b)| a != b).count();
        }
        assert!(kept.0.len() == 14 && moved > 50, "{moved}");
    }
    // In groups, grids are found on the way, each with its own ratios: no range is larger than they allow.
    let scheme = Scheme { weight_group: Some(8), ..Scheme::new(4, 16, 16) };
    let (m, r, t) = small(&scheme);
    let text = Windows::new(tokens(&m, 16 * 8, 9), 16).unwrap();
    let calibration = Calibration::first(&text, 8).unwrap();
    let of = |r: &Rotations, gptq: Gptq| {
        let done = quantize_weights(&m, Some(r), &scheme, &gptq, Some(&calibration), &mut (), |_| ControlFlow::Continue(()));
        done.unwrap().logits(&t, 16).unwrap()
    };
    // Ratios that are all alike are the specification's.
    let half = r.weight_clips.as_ref().unwrap().map(|t| Tensor::from_vec(vec![0.8f64.ln(); t.len()], t.shape())).unwrap();
    let given = Scheme { weight_clip: Clip::Ratio(0.8), ..scheme };
    let plain = r.clone().with_weight_clips(None);
    let done =
        quantize_weights(&m, Some(&plain), &given, &Gptq::default(), Some(&calibration), &mut (), |_| ControlFlow::Continue(()));
    let want = done.unwrap().logits(&t, 16).unwrap();
    assert!(relative(&of(&r.clone().with_weight_clips(Some(half)), Gptq::default()), &want) < 1e-9);
    assert!(relative(&of(&r, Gptq::default()), &want) > 1e-6);
}

/// The codes of every linear, in order.
#[derive(Default)]
struct Kept(Vec<spinquant::quant::Quantized>);

impl spinquant::calibrate::LayerStore for Kept {
    fn has(&self, _: usize) -> bool {
        false
    }
    fn load(&mut self, _: usize, _: DType, _: &Device) -> spinquant::Result<spinquant::calibrate::QuantizedLayer> {
        unreachable!("it has none")
    }
    fn save(&mut self, layer: &spinquant::calibrate::QuantizedLayer) -> spinquant::Result<()> {
        self.0.extend(layer.linears.iter().filter_map(|(_, l)| l.weight.codes.clone()));
        Ok(())
    }
}

#[test]
fn learning_starts_at_the_search_moves_them_and_resumes_to_the_same_bits() {
    let scheme = Scheme::new(4, 4, 4);
    let (m, r, _) = small(&scheme);
    let windows = Windows::new(tokens(&m, 16 * 40, 9), 16).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let options = LearnOptions {
        steps: 6,
        batch: 4,
        micro_batch: Some(2),
        learning_rate: Some(0.5),
        clip_rate: 0.02,
        weight_clip: WeightClip::Learned,
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
    let clips = |learned: &spinquant::learn::Learned| learned.rotations.weight_clips.clone().unwrap();
    let begun = search_weight_clips(&m, &start, &scheme, |_, _| ControlFlow::Continue(())).unwrap();
    assert_eq!(clips(&whole).grid(), "W4 symmetric");
    for ((name, t), (_, from)) in clips(&whole).iter().zip(begun.iter()) {
        let moved: Vec<f64> = values(t).iter().zip(values(from)).map(|(a, b)| (a - b).abs()).collect();
        let lower = moved.iter().step_by(2).fold(0f64, |m, x| m.max(*x));
        let upper = moved.iter().skip(1).step_by(2).fold(0f64, |m, x| m.max(*x));
        assert!(lower < 1e-6 && upper > 0.02 && upper < 6.0 * 0.025, "{name}: {lower} {upper}");
    }
    let kept = LearnOptions { checkpoint: Some((dir.path().join("state"), 1)), resume: true, ..options.clone() };
    assert!(matches!(run(&kept, 3), Err(Error::Interrupted { step: 3 })));
    let other = run(&LearnOptions { weight_clip_rate: Some(0.5), ..kept.clone() }, usize::MAX).unwrap_err().to_string();
    assert!(other.contains("another run") && other.contains("weight_clip_rate"), "{other}");
    let other = run(&LearnOptions { weight_clip: WeightClip::Search, ..kept.clone() }, usize::MAX).unwrap_err().to_string();
    assert!(other.contains("another run"), "{other}");
    let resumed = run(&kept, usize::MAX).unwrap();
    for ((name, a), (_, b)) in clips(&resumed).iter().zip(clips(&whole).iter()) {
        assert_eq!(bits(a), bits(b), "{name}");
    }
    assert_eq!(bits(&resumed.rotations.r1), bits(&whole.rotations.r1));
    // What was learned is a start of its own, for the same grid alone.
    let mut optimizer = optim::by_name("cayley").unwrap();
    let more = |scheme| LearnOptions { scheme, steps: 1, weight_clip: WeightClip::Search, ..options.clone() };
    let on = |options: LearnOptions, optimizer: &mut dyn optim::Optimizer| {
        learn(&m, &windows, whole.rotations.clone(), optimizer, &options, |_| ControlFlow::Continue(()))
    };
    assert!(on(more(scheme), optimizer.as_mut()).unwrap().rotations.weight_clips.is_some());
    assert!(on(more(Scheme::new(16, 4, 4)), optimizer.as_mut()).unwrap().rotations.weight_clips.is_none());
    assert!(on(more(Scheme::new(3, 4, 4)), optimizer.as_mut()).unwrap_err().to_string().contains("learned for W4 symmetric"));
}
