//! Greedy text against transformers in float32, and a 4-bit KV cache against the network without one: the model's name and the texts are
//! in `tests/fixtures/generation/smollm2.json`, or in `generation/` of the folder that `SPINQUANT_GOLDENS` names.

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use serde_json::Value;
use spinquant::data::{Bos, Tokenizer};
use spinquant::generate::{Sampling, generate};
use spinquant::llama::{Decoder, Llama, LlamaConfig};
use spinquant::ops::fake_quant::{code_differences, quantize};
use spinquant::quant::{Scheme, Site};
use spinquant::rotation::Rotations;
use spinquant::{DType, Device, Tensor};

use crate::common::need;

/// What a quantiser was given, in parts.
type Seen = Arc<Mutex<Vec<Vec<Tensor>>>>;
const WATCHED: [Site; 2] = [Site::Key, Site::Value];

fn golden() -> Value {
    let goldens = std::env::var_os("SPINQUANT_GOLDENS").map_or_else(|| PathBuf::from("tests/fixtures"), PathBuf::from);
    serde_json::from_slice(&std::fs::read(goldens.join("generation/smollm2.json")).unwrap()).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).unwrap()
}

#[test]
#[ignore = "needs SPINQUANT_SMOLLM2, the folder of SmolLM2-135M-Instruct"]
fn greedy_text_is_that_of_transformers() {
    let dir = need::folder("SPINQUANT_SMOLLM2", "config.json");
    let model = Llama::load_plain(&dir, DType::F32, &Device::Cpu).unwrap().merge(None, &Scheme::FULL_PRECISION).unwrap();
    let tokenizer = Tokenizer::from_dir(&dir).unwrap();
    for case in golden()["cases"].as_array().unwrap() {
        let prompt = tokenizer.encode_stream(case["prompt"].as_str().unwrap(), Bos::Auto).unwrap();
        assert_eq!(prompt, ids(&case["prompt_tokens"]));
        let want = ids(&case["tokens"]);
        let mut text = vec![];
        generate(&model, &prompt, want.len(), &Sampling::GREEDY, &[], |token| {
            text.push(token);
            Ok(ControlFlow::Continue(()))
        })
        .unwrap();
        assert_eq!(text, want, "{}", case["prompt"]);
    }
}

/// Codes of keys and values read token by token, beside those of the network that reads all at once. Where a sum is rounded otherwise a
/// value near a tie takes the other code, and what follows differs; until then the logits are the same but for rounding.
#[test]
#[ignore = "needs SPINQUANT_SMOLLM2, the folder of SmolLM2-135M-Instruct"]
fn a_cache_of_4_bits_has_the_codes_of_the_network() {
    let dir = need::folder("SPINQUANT_SMOLLM2", "config.json");
    let case = golden()["cases"][1].clone();
    let tokens: Vec<u32> = [ids(&case["prompt_tokens"]), ids(&case["tokens"])].concat()[..64].to_vec();
    // Only keys and values: a code of another activation that falls the other way would change them too.
    let scheme = Scheme::new(16, 16, 4);
    let sites = scheme.sites(LlamaConfig::from_dir(&dir).unwrap().head_dim);
    for dtype in [DType::F64, DType::F32] {
        let model = Llama::load(&dir, dtype, &Device::Cpu).unwrap();
        let config = model.config.clone();
        let rotations = Rotations::random_hadamard(config.hidden_size, config.head_dim, config.layers, 0).unwrap();
        let merged = model.merge_exact(Some(&rotations), &scheme).unwrap();
        // Inputs of the quantisers of keys and values, `[tokens · KV, D]`, of every layer.
        let watch = || {
            let seen: Seen = Arc::new(Mutex::new(vec![vec![]; 2 * config.layers]));
            let note = seen.clone();
            let see = move |layer: usize, site: Site, x: &Tensor| {
                if let Some(which) = WATCHED.iter().position(|s| *s == site) {
                    note.lock().unwrap()[2 * layer + which].push(x.clone());
                }
            };
            (seen, see)
        };
        let (whole, see) = watch();
        merged
            .observe(&tokens, tokens.len(), move |layer, site, x| {
                see(layer, site, x);
                Ok(())
            })
            .unwrap();
        let logits = merged.logits(&tokens, tokens.len()).unwrap().index(tokens.len() - 1).unwrap().to_f64_vec().unwrap();
        let (cached, see) = watch();
        let mut decoder = Decoder::new(&merged, tokens.len()).unwrap().observed(Arc::new(see));
        let mut last = vec![];
        for token in &tokens {
            last = decoder.feed(&[*token]).unwrap().to_f64_vec().unwrap();
        }
        let rows = |parts: &[Tensor]| {
            let x = Tensor::concat(parts).unwrap();
            let n = x.len() / config.head_dim;
            x.reshape([n, config.head_dim]).unwrap()
        };
        let (whole, cached) = (whole.lock().unwrap(), cached.lock().unwrap());
        let (mut odd, mut of_first) = (0, None);
        for (i, (a, b)) in whole.iter().zip(cached.iter()).enumerate() {
            let (a, b, spec) = (rows(a), rows(b), sites.at(WATCHED[i % 2]));
            let values = |x: &Tensor| quantize(x, spec).unwrap().dequantize().unwrap();
            let differences = code_differences(spec, &a, &values(&a), &values(&b)).unwrap();
            odd += differences.len();
            if !differences.is_empty() && of_first.is_none() {
                of_first = Some(i / 2);
            }
            // What is in front of the first layer with another code is the same but for rounding: there, only ties fall otherwise.
            if of_first == Some(i / 2) {
                let wide = quantize(&a.to_dtype(DType::F64).unwrap(), spec).unwrap();
                let [x, scale, zero] = [&a, &wide.scale, &wide.zero].map(|t| t.to_f64_vec().unwrap());
                for (place, one, other) in differences {
                    let group = place / wide.group;
                    let from_tie = (x[place] / scale[group] + zero[group] - (one.min(other).round() + 0.5)).abs();
                    let what = format!("{dtype}: value {place} of layer {}: codes {one} and {other}", i / 2);
                    assert!((one - other).abs() < 1.5 && from_tie < 1e-3, "{what}, {from_tie} from a tie");
                }
            }
        }
        let largest = logits.iter().fold(0f64, |m, x| m.max(x.abs()));
        let worst = logits.iter().zip(&last).map(|(a, b)| (a - b).abs()).fold(0f64, f64::max) / largest;
        let all = tokens.len() * config.kv_heads * config.head_dim * 2 * config.layers;
        println!(
            "{dtype}: {odd} of {all} codes differ, first in layer {of_first:?}; logits differ by {worst:.1e} of the largest"
        );
        let rounding = if dtype == DType::F64 { 1e-12 } else { 1e-5 };
        assert!(odd > 0 || worst < rounding, "{dtype}: equal codes, and logits that differ by {worst:e}");
        assert!(dtype == DType::F32 || odd == 0, "{dtype}: {odd} codes differ");
    }
}
