//! Planted outliers.

use super::*;
use spinquant::llama::{LayerWeights, Weights};
use spinquant::outliers::{self, PlantOptions, plant};

fn logits(config: &LlamaConfig, w: &Weights) -> Vec<f64> {
    tiny::logits(&Llama::new(config.clone(), w.clone()).unwrap())
}

fn each_layer(w: &Weights, f: impl Fn(&LayerWeights) -> Result<LayerWeights>) -> Weights {
    Weights { layers: w.layers.iter().map(|l| f(l).unwrap()).collect(), ..w.clone() }
}

proptest! {
    #![proptest_config(cases(24))]
    #[test]
    fn leaves_the_function_unchanged(
        shape in prop::sample::select(vec![(2, 2), (4, 2), (4, 1), (6, 3)]),
        tied in any::<bool>(),
        biases in any::<bool>(),
        seed in 0u64..1000,
    ) {
        let config = tiny::config(shape.0, shape.1, tied);
        let config = if biases { tiny::with_biases(config) } else { config };
        let w = Weights::random(&config, seed).unwrap();
        let want = logits(&config, &w);
        let factors = |n: usize, salt: u64| -> Vec<f64> {
            randn([n], seed + salt).into_vec::<f64>().unwrap().iter().map(|x| (2.0 * x).exp()).collect()
        };
        let (f, pairs) = (factors(24, 1), factors(4 * shape.1, 2));
        let bases = randn([shape.1, 8, 8], seed + 3);
        let basis = outliers::concentrating_basis(&w, 3, seed).unwrap();
        for (name, changed, bound) in [
            ("residual", outliers::residual_basis(&w, &basis).unwrap(), 1e-9),
            ("mlp", each_layer(&w, |l| outliers::mlp_channels(l, &f)), 1e-9),
            ("rope", each_layer(&w, |l| outliers::rope_pairs(l, &config, &pairs)), 1e-9),
            // A Gaussian basis may be near singular: 1e-9 times a condition number of up to about 1e3.
            ("value", each_layer(&w, |l| outliers::value_basis(l, &config, &bases)), 1e-7),
            ("all", plant(&w, &config, &PlantOptions { seed, ..Default::default() }).unwrap(), 1e-9),
        ] {
            let got = distance(&logits(&config, &changed), &want);
            prop_assert!(got < bound, "{name}: {got:e}");
        }
    }
}

#[test]
fn outliers_appear() {
    // A model with strong directions to concentrate.
    let config = LlamaConfig { hidden_size: 32, ..tiny::config(4, 2, false) };
    let mut w = Weights::random(&config, 1).unwrap();
    let e: Vec<f64> = w.embedding.to_f64_vec().unwrap();
    let strong = randn([32], 5).into_vec::<f64>().unwrap();
    w.embedding =
        Tensor::from_vec(e.iter().enumerate().map(|(i, x)| x + strong[i % 32]).collect::<Vec<f64>>(), [31, 32]).unwrap();
    let kurtosis = |t: &Tensor| {
        let x = t.to_f64_vec().unwrap();
        let moment = |p: i32| x.iter().map(|v| v.powi(p)).sum::<f64>() / x.len() as f64;
        moment(4) / moment(2).powi(2)
    };
    let options = PlantOptions { residual_channels: 1, ..Default::default() };
    let planted = plant(&w, &config, &options).unwrap();
    assert!(kurtosis(&planted.embedding) > 3.0 * kurtosis(&w.embedding));
    let max_row = |t: &Tensor| {
        let x = t.to_f64_vec().unwrap();
        let norms = x.chunks(t.cols()).map(|r| r.iter().map(|v| v * v).sum::<f64>().sqrt());
        norms.fold(0.0, f64::max)
    };
    let (old, new) = (&w.layers[0], &planted.layers[0]);
    for name in [Linear::Up, Linear::K, Linear::V] {
        let (a, b) = (&old[name].weight, &new[name].weight);
        assert!(max_row(b) > 2.0 * max_row(a), "{name}: {} {}", max_row(a), max_row(b));
    }
    // Reproducible, other seeds differ; the element type stays.
    let again = plant(&w, &config, &options).unwrap();
    assert_eq!(again.head.to_f64_vec().unwrap(), planted.head.to_f64_vec().unwrap());
    let other = plant(&w, &config, &PlantOptions { seed: 1, ..options }).unwrap();
    assert_ne!(other.head.to_f64_vec().unwrap(), planted.head.to_f64_vec().unwrap());
    // Nothing asked for, nothing done.
    let none = PlantOptions { residual_channels: 0, mlp_channels: 0, rope_pairs: 0, value_channels: 0, ..options };
    let same = plant(&w, &config, &none).unwrap();
    let all = |w: &Weights| w.layers[1].tensors().flat_map(|t| t.to_f64_vec().unwrap()).collect::<Vec<_>>();
    assert_eq!(all(&same), all(&w));
}

#[test]
fn misuse() {
    let config = tiny::config(4, 2, false);
    let w = Weights::random(&config, 1).unwrap();
    let with = |o: PlantOptions| plant(&w, &config, &o);
    let d = PlantOptions::default();
    fails(with(PlantOptions { residual_channels: 17, ..d }), &["at most 16 channels, got 17"]);
    fails(with(PlantOptions { rope_pairs: 5, ..d }), &["at most 4 channels, got 5"]);
    fails(with(PlantOptions { mlp_factor: 0.5, ..d }), &["at least 1, got 0.5"]);
    let layer = &w.layers[0];
    fails(outliers::mlp_channels(layer, &[1.0]), &["expected 24 factors, got 1"]);
    fails(outliers::mlp_channels(layer, &[0.0; 24]), &["other than 0"]);
    fails(outliers::rope_pairs(layer, &config, &[f64::NAN; 8]), &["finite"]);
    fails(outliers::value_basis(layer, &config, &Tensor::zeros([2, 8, 8], DType::F64, &Device::Cpu).unwrap()), &["singular"]);
    fails(outliers::residual_basis(&w, &randn([16, 16], 1)), &["expected an orthogonal basis"]);
    fails(outliers::residual_basis(&w, &randn([8, 8], 1)), &["[16, 16]"]);
}
