//! The layer-by-layer pipeline.

use crate::*;

const CONFIG: &str = r#"{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 40,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "torch_dtype": "float32"}"#;

fn model(dtype: DType) -> Llama {
    let config = LlamaConfig::from_json(CONFIG.as_bytes(), Path::new("config.json")).unwrap();
    let weights = Weights::random(&config, 1).unwrap();
    let narrow = |t: &Tensor| t.to_dtype(dtype);
    let weights = Weights {
        embedding: narrow(&weights.embedding).unwrap(),
        head: narrow(&weights.head).unwrap(),
        layers: weights.layers.iter().map(|l| l.map(narrow).unwrap()).collect(),
    };
    Llama::new(config, weights).unwrap()
}

fn text() -> Windows {
    Windows::new((0..16 * 10).map(|i| (i * i * 7 + i / 3) % 40).collect::<Vec<u32>>(), 16).unwrap()
}

fn linears(w: &LayerWeights) -> [&Tensor; 7] {
    [&w.q, &w.k, &w.v, &w.o, &w.gate, &w.up, &w.down]
}

fn assert_same(a: &Merged, b: &Merged) {
    for (a, b) in a.blocks.iter().zip(&b.blocks) {
        for (i, (a, b)) in linears(&a.weights).into_iter().zip(linears(&b.weights)).enumerate() {
            assert_eq!(values(a), values(b), "{}", LayerWeights::NAMES[i]);
        }
    }
    assert_eq!((values(&a.embedding), values(&a.head), a.scheme), (values(&b.embedding), values(&b.head), b.scheme));
}

fn go_on(_: &LayerReport) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

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
        (Site::AttentionInput, vec![0, 1, 2]),
        (Site::AttentionOutput, vec![3]),
        (Site::MlpInput, vec![4, 5]),
        (Site::DownInput, vec![6]),
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
            let mut weights = linears(&merged.blocks[layer].weights).map(Tensor::clone);
            for &i in members {
                weights[i] = gptq.quantize_one(&weights[i], &spec, &h).unwrap().weight;
            }
            merged.blocks[layer] = Block::new(&model.config, layer, LayerWeights::from_array(weights));
        }
    }
    merged
}

#[test]
fn the_pipeline_does_what_it_says() {
    let (model, text) = (model(DType::F64), text());
    let rotations = Rotations::random_hadamard(32, 8, 3, 1).unwrap();
    let scheme = Scheme { weight_clip: Clip::Ratio(1.0), ..Scheme::new(4, 4, 4) };
    for rotations in [None, Some(&rotations)] {
        for on in [false, true] {
            // One pass, so that sums are in one order.
            let calibration = Calibration { at_once: 8, ..Calibration::first(&text, 8).unwrap().quantize_activations(on) };
            let gptq = Gptq::default();
            let ours = quantize_weights(&model, rotations, &scheme, &gptq, Some(&calibration), &mut (), go_on).unwrap();
            assert_same(&ours, &by_the_book(&model, rotations, &scheme, &gptq, &calibration));
            let tokens = text.batch(&[8, 9]);
            assert!(ours.logits(&tokens, 16).unwrap().to_f64_vec().unwrap().iter().all(|x| x.is_finite()));
        }
    }
}

#[derive(Default)]
struct Memory(Vec<QuantizedLayer>);

impl LayerStore for Memory {
    fn has(&self, index: usize) -> bool {
        index < self.0.len()
    }
    fn load(&mut self, index: usize, _: DType, _: &Device) -> Result<QuantizedLayer> {
        Ok(self.0[index].clone())
    }
    fn save(&mut self, layer: &QuantizedLayer) -> Result<()> {
        assert_eq!(layer.index, self.0.len());
        self.0.push(layer.clone());
        Ok(())
    }
}

#[test]
fn an_interrupted_run_continues_to_the_same_bits() {
    interrupted_run(model(DType::F32));
    if let Some(device) = gpu() {
        for dtype in [DType::F32, DType::BF16] {
            interrupted_run(model(dtype).to_device(&device).unwrap());
        }
    }
}

/// The first layer's linears meet the same Hessians but for rounding.
#[test]
fn the_pipeline_on_the_gpu() {
    let Some(device) = gpu() else { return };
    let (model, text) = (model(DType::F32), text());
    let there = model.clone().to_device(&device).unwrap();
    let rotations = Rotations::random_hadamard(32, 8, 3, 2).unwrap();
    let calibration = Calibration::first(&text, 10).unwrap();
    for (scheme, act_order) in
        [(Scheme::new(4, 4, 4), false), (Scheme { weight_group: Some(16), ..Scheme::new(3, 16, 16) }, true)]
    {
        let gptq = Gptq { act_order, ..Gptq::default() };
        let run = |model: &Llama| {
            let mut store = Memory::default();
            quantize_weights(model, Some(&rotations), &scheme, &gptq, Some(&calibration), &mut store, go_on).unwrap();
            store.0.remove(0)
        };
        let (cpu, gpu) = (run(&model), run(&there));
        for ((a, b), name) in cpu.linears.iter().zip(&gpu.linears).zip(LayerWeights::NAMES) {
            let (differ, all) = (different_codes(a, b), a.codes.as_ref().unwrap().codes.len());
            println!("{scheme} {name}: {differ} of {all} codes differ");
            assert!(differ * 20 <= all, "{scheme} {name}: {differ} of {all} codes differ");
        }
    }
}

fn interrupted_run(model: Llama) {
    let text = text();
    let rotations = Rotations::random_hadamard(32, 8, 3, 2).unwrap();
    let calibration = Calibration { at_once: 3, ..Calibration::random(&text, 10, 1).unwrap() };
    let run = |store: &mut dyn LayerStore, stop: usize, reports: &mut Vec<LayerReport>| {
        quantize_weights(&model, Some(&rotations), &Scheme::new(4, 4, 4), &Gptq::default(), Some(&calibration), store, |r| {
            reports.push(r.clone());
            if r.done == stop { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })
    };
    let whole = run(&mut (), 0, &mut vec![]).unwrap();
    for stop in 1..=3 {
        let (mut store, mut reports) = (Memory::default(), vec![]);
        match run(&mut store, stop, &mut vec![]) {
            Err(Error::Interrupted { step }) => assert_eq!(step, stop),
            finished => assert!(stop == 3 && finished.is_ok(), "nothing is left to interrupt after the last layer"),
        }
        assert_eq!(store.0.len(), stop);
        assert_same(&run(&mut store, 0, &mut reports).unwrap(), &whole);
        assert_eq!(reports.iter().map(|r| r.loaded).collect::<Vec<_>>(), (1..=3).map(|i| i <= stop).collect::<Vec<_>>());
        assert!(reports.iter().all(|r| r.layers == 3 && r.damping == Some(0.01)));
        for (layer, block) in store.0.iter().zip(&whole.blocks) {
            for (l, w) in layer.linears.iter().zip(linears(&block.weights)) {
                assert_on_grid(l, &QuantSpec::weight(4, true));
                assert_eq!(values(&l.weight), values(w));
            }
        }
    }
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
