//! GPTQ on a device, alone and through the pipeline.

use std::ops::ControlFlow;
use std::path::Path;

use spinquant::calibrate::{Calibration, LayerReport, LayerStore, QuantizedLayer, quantize_weights};
use spinquant::data::Windows;
use spinquant::linalg::matmul::product;
use spinquant::llama::{Llama, LlamaConfig, Merged, Weights};
use spinquant::ops::randn;
use spinquant::quant::{
    Clip, Correction, Drift, Gptq, GroupScales, Hessian, Moments, QuantSpec, QuantizedLinear, Scheme, WeightQuantizer,
};
use spinquant::rotation::Rotations;
use spinquant::{DType, Device, Error, Result, Tensor};

use super::{Golden, number};

pub fn values(t: &Tensor) -> Vec<f64> {
    t.to_f64_vec().unwrap()
}

pub fn hessian(x: &Tensor, sequences: usize) -> Tensor {
    let mut h = Hessian::new(x.cols());
    h.add(x).unwrap();
    h.finish(sequences).unwrap()
}

/// H of quantised inputs, and D with those in full precision.
pub fn moments(exact: &Tensor, quantized: &Tensor, sequences: usize) -> Moments {
    let mut drift = Drift::new(exact.cols());
    drift.add(exact, quantized).unwrap();
    Moments { hessian: hessian(quantized, sequences), drift: Some(drift.finish(sequences).unwrap()) }
}

/// One linear, with a correction.
pub fn corrected(gptq: &Gptq, w: &Tensor, spec: &QuantSpec, m: &Moments) -> QuantizedLinear {
    gptq.quantize(&[w], spec, Some(m)).unwrap().remove(0)
}

/// Inputs as a quantised network might have them: rounded to 4 bits, row by row, and not those alone: a little of the others is there too.
pub fn disturbed(x: &Tensor, seed: u64) -> Tensor {
    let n = x.cols();
    let noise = values(&inputs(x.rows(), n, seed + 77));
    let exact = values(x);
    let rounded = exact.chunks(n).flat_map(|row| {
        let step = row.iter().fold(0f64, |m, x| m.max(x.abs())) / 7.0;
        row.iter().map(move |x| if step == 0.0 { 0.0 } else { step * (x / step).round() }).collect::<Vec<_>>()
    });
    let mixed = rounded.zip(noise).map(|(x, e)| 0.95 * x + 0.1 * e).collect();
    Tensor::from_vec::<f64>(mixed, x.shape()).unwrap()
}

/// `[rows, n]` inputs whose channels are correlated and of very different sizes.
pub fn inputs(rows: usize, n: usize, seed: u64) -> Tensor {
    let mix = randn([n, n], seed + 1000).into_vec::<f64>().unwrap();
    let mix = mix.iter().enumerate().map(|(i, m)| m * (1.0 + (i % n % 5) as f64)).collect();
    product(&randn([rows, n], seed), false, &Tensor::from_vec::<f64>(mix, [n, n]).unwrap(), false, false, DType::F64).unwrap()
}

/// `tr(Δ H Δᵀ)` with Δ = a − b.
pub fn loss(a: &Tensor, b: &Tensor, h: &Tensor) -> f64 {
    let d: Vec<f64> = values(a).iter().zip(values(b)).map(|(a, b)| a - b).collect();
    let d = Tensor::from_vec(d, a.shape()).unwrap();
    let dh = product(&d, false, h, false, false, DType::F64).unwrap();
    values(&dh).iter().zip(values(&d)).map(|(a, b)| a * b).sum()
}

/// The codes are in range and give the weight, bit for bit.
pub fn assert_on_grid(q: &QuantizedLinear, spec: &QuantSpec) {
    let codes = q.codes.as_ref().unwrap();
    assert!(codes.codes.iter().all(|&c| (spec.min_code()..=spec.max_code()).contains(&c.into())));
    assert_eq!(codes.shape, q.weight.shape());
    assert_eq!(codes.scale.len() * codes.group, q.weight.len());
    assert_eq!(values(&codes.dequantize().unwrap().to_dtype(q.weight.dtype()).unwrap()), values(&q.weight));
    assert!(values(&codes.scale).iter().all(|s| *s > 0.0));
}

pub fn different_codes(a: &QuantizedLinear, b: &QuantizedLinear) -> usize {
    let codes = |q: &QuantizedLinear| q.codes.as_ref().unwrap().codes.clone();
    codes(a).iter().zip(codes(b)).filter(|(a, b)| **a != *b).count()
}

/// A case of the published code: inputs, weight, Hessian, quantised weight.
pub struct Published {
    pub name: String,
    pub spec: QuantSpec,
    pub gptq: Gptq,
    pub x: Tensor,
    pub w: Tensor,
    pub h: Tensor,
    pub q: Tensor,
}

pub fn published() -> Vec<Published> {
    let golden = Golden::open("gptq.safetensors");
    let read = |case: &serde_json::Value| {
        let name = case["name"].as_str().unwrap().to_string();
        let get = |what: &str| golden.get(&format!("{name}.{what}"));
        let flag = |field: &str| case[field].as_bool().unwrap();
        let clip = if flag("clip_search") { Clip::Search } else { Clip::Ratio(1.0) };
        let group = usize::try_from(case["group"].as_i64().unwrap()).ok();
        let spec = QuantSpec { group, ..QuantSpec::weight(number(case, "bits") as u32, flag("symmetric")).clipped(clip) };
        let gptq = Gptq {
            damping: number(case, "percdamp"),
            act_order: flag("act_order"),
            block: number(case, "block") as usize,
            group_scales: GroupScales::FinishedBlocks,
            ..Gptq::default()
        };
        let (x, w, h, q) = (get("X"), get("W"), get("H"), get("Q"));
        Published { name, spec, gptq, x, w, h, q }
    };
    golden.list().iter().map(read).collect()
}

/// Published weights and Hessians in single precision: a tie may fall the other way, and moves the rest of its row.
pub fn published_in_f32(device: &Device) {
    for p in published() {
        let exact = p.gptq.quantize_one(&p.w, &p.spec, &p.h).unwrap();
        let narrow = p.w.to_dtype(DType::F32).unwrap().to_device(device).unwrap();
        let narrow = p.gptq.quantize_one(&narrow, &p.spec, &p.h).unwrap();
        assert_on_grid(&narrow, &p.spec);
        let differ = different_codes(&exact, &narrow);
        println!("{} on {device}: {differ} codes differ", p.name);
        assert!(differ <= 8, "{}: {differ} codes differ in f32 on {device}", p.name);
    }
}

/// Singular, indefinite, infinite and misshapen Hessians.
pub fn awkward_hessians_on(device: &Device, dtype: DType) {
    let place = |t: Tensor| t.to_dtype(dtype).unwrap().to_device(device).unwrap();
    let (spec, gptq, w) = (QuantSpec::weight(4, true), Gptq::default(), place(randn([3, 8], 1)));
    let matrix = |v: Vec<f64>| Tensor::from_vec(v, [8, 8]).unwrap();
    // Fewer tokens than channels, no damping: singular, so damped and reported.
    let singular = hessian(&inputs(3, 8, 2), 1);
    let q = Gptq { damping: 0.0, ..gptq }.quantize_one(&w, &spec, &singular).unwrap();
    assert!(q.damping.unwrap() > 0.0 && q.damping.unwrap() < 0.01, "{:?}", q.damping);
    assert_on_grid(&q, &spec);
    assert_eq!(gptq.quantize_one(&w, &spec, &singular).unwrap().damping, Some(0.01));
    // Indefinite: an eigenvalue of −0.5 next to a mean diagonal of 1.
    let mut v = values(&Tensor::eye(8, DType::F64).unwrap());
    (v[1], v[8]) = (1.5, 1.5);
    assert_eq!(gptq.quantize_one(&w, &spec, &matrix(v.clone())).unwrap().damping, Some(1.0));
    (v[1], v[8]) = (1e6, 1e6);
    let error = gptq.quantize_one(&w, &spec, &matrix(v.clone())).unwrap_err();
    assert!(matches!(error, Error::Numeric { .. }) && error.to_string().contains("positive definite"), "{error}");
    v[3] = f64::NAN;
    assert!(matches!(gptq.quantize_one(&w, &spec, &matrix(v)), Err(Error::Numeric { .. })));
    // Nothing comes in at all: every column is dead.
    let q = gptq.quantize_one(&w, &spec, &matrix(vec![0.0; 64])).unwrap();
    assert!(values(&q.weight).iter().all(|w| *w == 0.0));

    let h = hessian(&inputs(40, 8, 3), 1);
    assert!(matches!(gptq.quantize_one(&place(randn([3, 7], 1)), &spec, &h), Err(Error::Shape { .. })));
    assert!(matches!(gptq.quantize_one(&w, &spec.grouped(3), &h), Err(Error::Argument { .. })));
    assert!(matches!(Gptq { block: 0, ..gptq }.quantize_one(&w, &spec, &h), Err(Error::Argument { .. })));
    assert!(matches!(Gptq { damping: -1.0, ..gptq }.quantize_one(&w, &spec, &h), Err(Error::Argument { .. })));
    assert!(matches!(gptq.quantize(&[&w], &spec, None), Err(Error::Argument { .. })));
    let mut odd = values(&w);
    odd[0] = f64::INFINITY;
    assert!(gptq.quantize_one(&place(Tensor::from_vec(odd, [3, 8]).unwrap()), &spec, &h).is_err());
    assert!(hessian(&randn([0, 8], 1), 1).to_vec::<f64>().unwrap().iter().all(|h| *h == 0.0));
    assert!(Hessian::new(2).add(&randn([4, 3], 1)).is_err());
    let mut nan = Hessian::new(1);
    nan.add(&place(Tensor::from_vec(vec![f32::NAN], [1, 1]).unwrap())).unwrap();
    assert!(matches!(nan.finish(1), Err(Error::Numeric { .. })));
}

/// Constants, and what a correction cannot do without.
pub fn awkward_corrections_on(device: &Device, dtype: DType) {
    let place = |t: Tensor| t.to_dtype(dtype).unwrap().to_device(device).unwrap();
    let (spec, w, x) = (QuantSpec::weight(4, true), place(randn([3, 8], 1)), inputs(40, 8, 3));
    let m = moments(&x, &disturbed(&x, 4), 1);
    let with = |correction, m: &Moments| Gptq { correction, ..Gptq::default() }.quantize(&[&w], &spec, Some(m));
    for correction in Correction::ALL {
        let q = with(correction, &m).unwrap().remove(0);
        assert_on_grid(&q, &spec);
        assert_eq!((q.weight.dtype(), q.weight.device(), q.loss.is_some()), (dtype, device.clone(), correction.is_none()));
        let alone = with(correction, &m.hessian.clone().into());
        match correction {
            Correction::Gptaq(_) | Correction::Qronos => {
                let error = alone.unwrap_err().to_string();
                assert!(error.contains(correction.name()) && error.contains("drift"), "{error}");
            }
            _ => assert_on_grid(&alone.unwrap()[0], &spec),
        }
        let misshapen = Moments { drift: Some(randn([7, 8], 1)), ..m.clone() };
        assert!(matches!(with(correction, &misshapen), Err(Error::Shape { .. })), "{correction}");
        let mut odd = values(m.drift.as_ref().unwrap());
        odd[3] = f64::NAN;
        let odd = Moments { drift: Some(Tensor::from_vec(odd, [8, 8]).unwrap()), ..m.clone() };
        assert_eq!(with(correction, &odd).is_err(), !correction.is_none(), "{correction}");
        if correction.constant().is_some() {
            for constant in [-0.1, 1.5, f64::NAN] {
                assert!(matches!(correction.with(constant), Err(Error::Argument { .. })), "{correction}");
            }
        }
    }
    assert!(matches!(with(Correction::Qep(2.0), &m), Err(Error::Argument { .. })));
    let (mut drift, other) = (Drift::new(8), place(randn([40, 8], 1)));
    assert!(drift.add(&other, &place(randn([39, 8], 1))).is_err());
    assert!(drift.add(&place(randn([40, 7], 1)), &place(randn([40, 7], 1))).is_err());
    drift.add(&place(Tensor::from_vec(vec![f64::INFINITY; 8], [1, 8]).unwrap()), &place(randn([1, 8], 1))).unwrap();
    assert!(matches!(drift.finish(1), Err(Error::Numeric { .. })));
    assert!(values(&Drift::new(3).finish(1).unwrap()).iter().all(|d| *d == 0.0));
}

/// Columns that nothing comes into are zero in the quantised weight.
pub fn dead_columns_on(device: &Device, dtype: DType) {
    let mut x = inputs(60, 16, 4).into_vec::<f64>().unwrap();
    x.chunks_mut(16).for_each(|row| (row[3], row[10]) = (0.0, 0.0));
    let h = hessian(&Tensor::from_vec(x, [60, 16]).unwrap(), 1);
    let w = randn([5, 16], 5).to_dtype(dtype).unwrap().to_device(device).unwrap();
    for act_order in [false, true] {
        for spec in [QuantSpec::weight(4, true), QuantSpec::weight(4, false), QuantSpec::weight(3, true).grouped(4)] {
            let gptq = Gptq { act_order, ..Gptq::default() };
            let q = gptq.quantize_one(&w, &spec, &h).unwrap();
            assert_on_grid(&q, &spec);
            for row in values(&q.weight).chunks(16) {
                assert!(row[3] == 0.0 && row[10] == 0.0, "{spec:?}");
            }
        }
    }
}

const CONFIG: &str = r#"{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 40,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "torch_dtype": "float32"}"#;

pub fn model(dtype: DType) -> Llama {
    model_of(&LlamaConfig::from_json(CONFIG.as_bytes(), Path::new("config.json")).unwrap(), dtype)
}

/// The same with a bias in every linear.
pub fn biased_model(dtype: DType) -> Llama {
    model_of(&LlamaConfig { attention_bias: true, mlp_bias: true, ..model(dtype).config }, dtype)
}

fn model_of(config: &LlamaConfig, dtype: DType) -> Llama {
    let weights = Weights::random(config, 1).unwrap();
    let narrow = |t: &Tensor| t.to_dtype(dtype);
    let weights = Weights {
        embedding: narrow(&weights.embedding).unwrap(),
        head: narrow(&weights.head).unwrap(),
        layers: weights.layers.iter().map(|l| l.map(narrow).unwrap()).collect(),
    };
    Llama::new(config.clone(), weights).unwrap()
}

pub fn text() -> Windows {
    Windows::new((0..16 * 10).map(|i| (i * i * 7 + i / 3) % 40).collect::<Vec<u32>>(), 16).unwrap()
}

pub fn assert_same(a: &Merged, b: &Merged) {
    for (a, b) in a.blocks.iter().zip(&b.blocks) {
        for ((linear, a), (_, b)) in a.weights.iter().zip(b.weights.iter()) {
            assert_eq!(values(&a.weight), values(&b.weight), "{linear}");
            assert_eq!(a.bias.as_ref().map(values), b.bias.as_ref().map(values), "{linear}");
        }
    }
    assert_eq!((values(&a.embedding), values(&a.head), a.scheme), (values(&b.embedding), values(&b.head), b.scheme));
}

pub fn go_on(_: &LayerReport) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

#[derive(Default)]
pub struct Memory(pub Vec<QuantizedLayer>);

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

/// Runs that stop after each layer, and go on.
pub fn interrupted_runs(model: &Llama) {
    Correction::ALL.into_iter().for_each(|correction| interrupted_run(model, &Gptq { correction, ..Gptq::default() }));
}

fn interrupted_run(model: &Llama, gptq: &Gptq) {
    let text = text();
    let rotations = Rotations::random_hadamard(32, 8, 3, 2).unwrap();
    let calibration = Calibration { at_once: 3, ..Calibration::random(&text, 10, 1).unwrap() };
    let run = |store: &mut dyn LayerStore, stop: usize, reports: &mut Vec<LayerReport>| {
        quantize_weights(model, Some(&rotations), &Scheme::new(4, 4, 4), gptq, Some(&calibration), store, |r| {
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
            for ((_, l), (_, w)) in layer.linears.iter().zip(block.weights.iter()) {
                assert_on_grid(&l.weight, &QuantSpec::weight(4, true));
                assert_eq!(values(&l.weight.weight), values(&w.weight));
            }
        }
    }
}
