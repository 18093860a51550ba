//! The layer-by-layer pipeline.

use super::*;

#[test]
fn nearest_through_the_pipeline_is_merge() {
    for dtype in [DType::F64, DType::F32, DType::BF16] {
        let model = model(dtype);
        let rotations = Rotations::random_hadamard(32, 8, 3, 1).unwrap();
        for scheme in [Scheme::new(4, 4, 4), Scheme { weight_group: Some(16), ..Scheme::new(3, 16, 16) }, Scheme::new(16, 4, 4)] {
            for rotations in [None, Some(&rotations)] {
                let merged = quantize_weights(&model, rotations, &scheme, &Rtn, None, &mut (), go_on).unwrap();
                assert_same(&merged, &model.merge(rotations, &scheme).unwrap());
                if scheme.weight_bits == 16 {
                    assert_same(&merged, &model.merge_exact(rotations, &scheme).unwrap());
                }
            }
        }
    }
}

/// The pipeline as it is described: the whole network run anew for every group of linears, the inputs taken from an observer; once more in
/// full precision where a correction asks for it.
fn by_the_book(model: &Llama, rotations: Option<&Rotations>, scheme: &Scheme, gptq: &Gptq, c: &Calibration<'_>) -> Merged {
    let exact = model.merge_exact(rotations, scheme).unwrap();
    let mut merged = exact.clone();
    let spec = merged.scheme.sites(model.config.head_dim).weight;
    let off = Scheme { activation_bits: 16, key_bits: 16, value_bits: 16, ..merged.scheme };
    let on = c.quantize_activations || gptq.correction != Correction::None;
    let running = if on { merged.scheme } else { off };
    let groups = [
        (Site::AttentionInput, vec![Linear::Q, Linear::K, Linear::V]),
        (Site::AttentionOutput, vec![Linear::O]),
        (Site::MlpInput, vec![Linear::Gate, Linear::Up]),
        (Site::DownInput, vec![Linear::Down]),
    ];
    for layer in 0..model.config.layers {
        for (wanted, members) in &groups {
            let quantized = input(model, &merged, &running, c, layer, *wanted);
            let x = input(model, &exact, &off, c, layer, *wanted);
            let m = moments(&x, &quantized, c.windows.len());
            let mut weights = merged.blocks[layer].weights.clone();
            // QEP leaves down_proj alone.
            let skips = matches!(gptq.correction, Correction::Qep(_)) && *wanted == Site::DownInput;
            let m = if skips { m.hessian.into() } else { m };
            for &linear in members {
                weights[linear].weight = corrected(gptq, &weights[linear].weight, &spec, &m).weight;
            }
            merged.blocks[layer] = Block::new(&model.config, layer, weights);
        }
    }
    merged
}

/// What goes into the linears at a site of a layer.
fn input(model: &Llama, network: &Merged, scheme: &Scheme, c: &Calibration<'_>, layer: usize, wanted: Site) -> Tensor {
    let seen = Arc::new(Mutex::new(None));
    let mut run: Run = model.run(scheme, c.text.seq_len()).unwrap();
    let sink = seen.clone();
    run.observer = Some(Arc::new(move |l, site, x: &Tensor| {
        if (l, site) == (layer, wanted) {
            *sink.lock().unwrap() = Some(x.clone());
        }
    }));
    let tape = Tape::new();
    let mut x = tape.constant(network.embedding.clone()).embedding(c.text.batch(&c.windows).into()).unwrap();
    for block in &network.blocks {
        x = block.forward(x, RotatedWeights::constants(&tape, &block.weights), &run).unwrap();
    }
    let x = seen.lock().unwrap().take().unwrap();
    // The observer sees what goes into the quantiser.
    tape.constant(x).fake_quant(run.sites.at(wanted)).unwrap().into_value()
}

#[test]
fn the_pipeline_does_what_it_says() {
    check_pipeline(&model(DType::F64));
}

/// Both streams: the first layer's drift is that of its own quantisers, and later ones' of all before.
#[test]
fn corrections_go_through_the_pipeline() {
    let (model, text) = (model(DType::F64), text());
    let rotations = Rotations::random_hadamard(32, 8, 3, 1).unwrap();
    let scheme = Scheme { weight_clip: Clip::Ratio(1.0), ..Scheme::new(4, 4, 4) };
    let calibration = Calibration { at_once: 8, ..Calibration::first(&text, 8).unwrap() };
    let run = |correction| {
        let gptq = Gptq { correction, ..Gptq::default() };
        let ours = quantize_weights(&model, Some(&rotations), &scheme, &gptq, Some(&calibration), &mut (), go_on).unwrap();
        assert_same(&ours, &by_the_book(&model, Some(&rotations), &scheme, &gptq, &calibration));
        values(&ours.blocks[2].weights[Linear::Down].weight)
    };
    let all = Correction::ALL.map(run);
    for (i, a) in all.iter().enumerate() {
        assert!(all[..i].iter().all(|b| a != b), "{}", Correction::ALL[i]);
    }
}

/// Calibration in full precision leaves activations in blocks of floating-point numbers alone too.
#[test]
fn blocks_are_not_quantised_while_calibrating_in_full_precision() {
    let (model, text) = (model(DType::F64), text());
    let calibration = Calibration::first(&text, 8).unwrap().quantize_activations(false);
    let run = |scheme: Scheme| {
        let ours = quantize_weights(&model, None, &scheme, &Gptq::default(), Some(&calibration), &mut (), go_on).unwrap();
        ours.blocks.iter().flat_map(|block| values(&block.weights[Linear::Down].weight)).collect::<Vec<_>>()
    };
    let plain = Scheme::new(4, 16, 16);
    assert_eq!(run(plain.activations_in(Format::Nvfp4)), run(plain));
}

#[test]
fn biases_go_through_the_pipeline_as_they_are() {
    check_pipeline(&biased_model(DType::F64));
}

fn check_pipeline(model: &Llama) {
    let text = text();
    let rotations = Rotations::random_hadamard(32, 8, 3, 1).unwrap();
    let scheme = Scheme { weight_clip: Clip::Ratio(1.0), ..Scheme::new(4, 4, 4) };
    for rotations in [None, Some(&rotations)] {
        for on in [false, true] {
            // One pass, so that sums are in one order.
            let calibration = Calibration { at_once: 8, ..Calibration::first(&text, 8).unwrap().quantize_activations(on) };
            let gptq = Gptq::default();
            let ours = quantize_weights(model, rotations, &scheme, &gptq, Some(&calibration), &mut (), go_on).unwrap();
            assert_same(&ours, &by_the_book(model, rotations, &scheme, &gptq, &calibration));
            let tokens = text.batch(&[8, 9]);
            assert!(ours.logits(&tokens, 16).unwrap().to_f64_vec().unwrap().iter().all(|x| x.is_finite()));
        }
    }
}

#[test]
fn an_interrupted_run_continues_to_the_same_bits() {
    interrupted_runs(&model(DType::F32));
}

#[test]
fn too_little_calibration_text() {
    let text = text();
    for calibration in [Calibration::first(&text, 11), Calibration::random(&text, 11, 0), Calibration::first(&text, 0)] {
        let error = calibration.unwrap_err().to_string();
        assert!(error.contains("10 windows of 16 tokens"), "{error}");
    }
    let mut drawn = Calibration::random(&text, 10, 3).unwrap().windows;
    assert_ne!(drawn, Calibration::random(&text, 10, 4).unwrap().windows);
    drawn.sort_unstable();
    assert_eq!(drawn, (0..10).collect::<Vec<_>>());
    let error = quantize_weights(&model(DType::F32), None, &Scheme::new(4, 4, 4), &Gptq::default(), None, &mut (), go_on);
    assert!(matches!(error, Err(Error::Argument { .. })));
}
