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

/// The pipeline as it is described: the whole network run anew for every group of linears, the inputs taken from an observer.
fn by_the_book(model: &Llama, rotations: Option<&Rotations>, scheme: &Scheme, gptq: &Gptq, c: &Calibration<'_>) -> Merged {
    let mut merged = model.merge_exact(rotations, scheme).unwrap();
    let spec = merged.scheme.sites(model.config.head_dim).weight;
    let off = Scheme { activation_bits: 16, key_bits: 16, value_bits: 16, ..merged.scheme };
    let (seq, running) = (c.text.seq_len(), if c.quantize_activations { merged.scheme } else { off });
    let groups = [
        (Site::AttentionInput, vec![Linear::Q, Linear::K, Linear::V]),
        (Site::AttentionOutput, vec![Linear::O]),
        (Site::MlpInput, vec![Linear::Gate, Linear::Up]),
        (Site::DownInput, vec![Linear::Down]),
    ];
    for layer in 0..model.config.layers {
        for (wanted, members) in &groups {
            let seen = Arc::new(Mutex::new(None));
            let mut run: Run = model.run(&running, seq).unwrap();
            let (sink, wanted) = (seen.clone(), *wanted);
            run.observer = Some(Arc::new(move |l, site, x: &Tensor| {
                if (l, site) == (layer, wanted) {
                    *sink.lock().unwrap() = Some(x.clone());
                }
            }));
            let tape = Tape::new();
            let mut x = tape.constant(merged.embedding.clone()).embedding(c.text.batch(&c.windows).into()).unwrap();
            for block in &merged.blocks {
                x = block.forward(x, RotatedWeights::constants(&tape, &block.weights), &run).unwrap();
            }
            let x = seen.lock().unwrap().take().unwrap();
            // The observer sees what goes into the quantiser.
            let x = tape.constant(x).fake_quant(run.sites.at(wanted)).unwrap().into_value();
            let h = hessian(&x, c.windows.len());
            let mut weights = merged.blocks[layer].weights.clone();
            for &linear in members {
                weights[linear].weight = gptq.quantize_one(&weights[linear].weight, &spec, &h).unwrap().weight;
            }
            merged.blocks[layer] = Block::new(&model.config, layer, weights);
        }
    }
    merged
}

#[test]
fn the_pipeline_does_what_it_says() {
    check_pipeline(&model(DType::F64));
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
    interrupted_run(model(DType::F32));
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
