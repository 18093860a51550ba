//! Clip ratios of quantiser sites: how they are written, what they do, and that the search finds the best of its candidates.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use spinquant::calibrate::{ClipGoal, search_clips};
use spinquant::data::Windows;
use spinquant::llama::{Llama, LlamaConfig, Rotated, Walk, Weights};
use spinquant::quant::{Clip, ClipRatios, Scheme, Site};
use spinquant::rotation::Rotations;
use spinquant::{DType, Result, Tape, Tensor, eval, ops};

use crate::common::need::cases;
use crate::common::tiny;

const SEQ: usize = 8;

fn model(seed: u64) -> Llama {
    let config = LlamaConfig { hidden_size: 32, intermediate_size: 48, vocab_size: 23, ..tiny::config(4, 2, false) };
    Llama::new(config.clone(), Weights::random(&config, seed).unwrap()).unwrap()
}

fn text(seed: u64) -> Windows {
    let x = ops::randn([12 * SEQ], seed).into_vec::<f64>().unwrap();
    Windows::new(x.iter().map(|x| (x.abs() * 1e6) as u32 % 23).collect::<Vec<u32>>(), SEQ).unwrap()
}

fn start(m: &Llama, seed: u64) -> Rotations {
    Rotations::random_hadamard(m.config.hidden_size, m.config.head_dim, m.config.layers, seed).unwrap()
}

fn ratios() -> impl Strategy<Value = ClipRatios> {
    prop::collection::vec(0.01f64..=1.0, 6)
        .prop_map(|r| Site::ALL.into_iter().zip(r).fold(ClipRatios::NONE, |all, (site, r)| all.with(site, r).unwrap()))
}

const ALL: [usize; 3] = [0, 5, 11];

fn go(_: usize, _: usize) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

/// Bits by window, layer and site.
type Bits = BTreeMap<(usize, usize, Site), Vec<u64>>;

/// What quantisers were given.
#[derive(Clone, Default)]
struct Seen(Arc<Mutex<Bits>>);

impl Seen {
    fn note(&self, window: usize, layer: usize, site: Site, x: &Tensor) -> Result<()> {
        let bits = x.to_f64_vec()?.into_iter().map(f64::to_bits).collect();
        assert!(self.0.lock().unwrap().insert((window, layer, site), bits).is_none(), "shown twice");
        Ok(())
    }
}

fn in_f32(m: &Llama) -> Llama {
    let narrow = |t: &Tensor| t.to_dtype(DType::F32);
    let weights = Weights {
        embedding: narrow(&m.embedding).unwrap(),
        head: narrow(&m.head).unwrap(),
        layers: m.blocks.iter().map(|b| b.weights.map(narrow).unwrap()).collect(),
    };
    Llama::new(m.config.clone(), weights).unwrap()
}

proptest! {
    #![proptest_config(cases(24))]

    #[test]
    fn ratios_survive_text_and_json(ratios in ratios(), one in 0.01f64..=1.0) {
        for r in [ratios, ClipRatios::uniform(one).unwrap(), ClipRatios::NONE] {
            prop_assert_eq!(r.to_string().parse::<ClipRatios>().unwrap(), r);
            let scheme = Scheme { activation_clip: r, ..Scheme::new(4, 4, 4) };
            let json = serde_json::to_string(&scheme).unwrap();
            prop_assert_eq!(serde_json::from_str::<Scheme>(&json).unwrap(), scheme);
            let sites = scheme.sites(8);
            for site in Site::ALL {
                prop_assert_eq!(sites.at(site).clip, Clip::Ratio(r.at(site)));
            }
        }
    }

    /// Every site has its own ratio and no other: lowering one changes the network exactly where that site is quantised.
    #[test]
    fn each_site_has_its_own(seed: u64, site in prop::sample::select(Site::ALL.to_vec())) {
        let (m, w) = (model(seed), text(seed));
        let logits = |scheme: Scheme| m.merge(Some(&start(&m, seed)), &scheme).unwrap().logits(w.get(0), SEQ).unwrap().to_f64_vec().unwrap();
        let clipped = |scheme: Scheme| Scheme { activation_clip: ClipRatios::NONE.with(site, 0.5).unwrap(), ..scheme };
        let (a, kv) = (Scheme::new(16, 4, 16), Scheme::new(16, 16, 4));
        let is_cache = matches!(site, Site::Key | Site::Value);
        prop_assert_eq!(logits(a) == logits(clipped(a)), is_cache);
        prop_assert_eq!(logits(kv) == logits(clipped(kv)), !is_cache);
    }

    /// By error: no other candidate is better on what the quantisers saw, measured here in another way.
    #[test]
    fn the_error_is_least_at_what_is_found(seed: u64) {
        let (m, w, scheme) = (model(seed), text(seed), Scheme::new(16, 3, 3));
        let r = start(&m, seed);
        let found = search_clips(&m, Some(&r), &scheme, &w, &ALL, ClipGoal::Error, go).unwrap();
        let network = m.merge(Some(&r), &scheme).unwrap();
        let seen = std::sync::Arc::new(std::sync::Mutex::new(vec![]));
        for i in ALL {
            let seen = seen.clone();
            let see = move |_: usize, site: Site, x: &Tensor| {
                seen.lock().unwrap().push((site, x.clone()));
                Ok(())
            };
            network.observe(w.get(i), SEQ, see).unwrap();
        }
        let seen = seen.lock().unwrap();
        let error = |site: Site, ratio: f64| -> f64 {
            let spec = scheme.sites(8).at(site).clipped(Clip::Ratio(ratio));
            seen.iter().filter(|(s, _)| *s == site).map(|(_, x)| {
                let y = Tape::new().constant(x.clone()).fake_quant(&spec).unwrap().into_value().to_f64_vec().unwrap();
                let x = x.to_f64_vec().unwrap();
                let off: f64 = x.iter().zip(y).map(|(x, y)| (x - y).powi(2)).sum();
                off / x.iter().map(|x| x * x).sum::<f64>()
            }).sum()
        };
        for site in Site::ALL {
            let ours = error(site, found.ratios.at(site));
            for i in 0..11 {
                prop_assert!(ours <= error(site, 1.0 - 0.05 * f64::from(i)) * (1.0 + 1e-9), "{}: {i}", site.name());
            }
        }
        prop_assert!(found.goal.1 <= found.goal.0);
    }

    /// A layer at a time, all windows through it, is the whole network window by window: to the bit, and so are the sums.
    #[test]
    fn walking_shows_what_the_merged_network_shows(
        seed: u64, narrow: bool, plain: bool, scheme in prop::sample::select(vec![Scheme::new(4, 4, 4), Scheme::new(16, 4, 8)]),
    ) {
        let (m, w) = (if narrow { in_f32(&model(seed)) } else { model(seed) }, text(seed));
        let r = start(&m, seed);
        let r = (!plain).then_some(&r);
        let (merged, walked) = (Seen::default(), Seen::default());
        let network = m.merge(r, &scheme).unwrap();
        for (i, part) in ALL.into_iter().enumerate() {
            let merged = merged.clone();
            network.observe(w.get(part), SEQ, move |layer, site, x| merged.note(i, layer, site, x)).unwrap();
        }
        let rotated = Rotated::new(&m, r, &scheme).unwrap();
        let mut walk = Walk::new(&rotated, &ALL.map(|i| w.get(i)), SEQ).unwrap();
        for layer in 0..m.config.layers {
            let walked = walked.clone();
            prop_assert!(walk.layer(move |i, site, x| walked.note(i, layer, site, x)).unwrap());
        }
        prop_assert!(!walk.layer(|_, _, _| Ok(())).unwrap());
        let (merged, walked) = (merged.0.lock().unwrap(), walked.0.lock().unwrap());
        prop_assert_eq!(merged.len(), ALL.len() * m.config.layers * Site::ALL.len());
        prop_assert!(*merged == *walked);

        // The mean of the relative errors before any clipping, added up in the order in which the merged network shows them.
        let mut sums = [0.0; 6];
        for ((_, _, site), bits) in merged.iter() {
            let x = Tensor::from_vec(bits.iter().map(|b| f64::from_bits(*b)).collect(), [bits.len() / m.config.head_dim, m.config.head_dim]).unwrap();
            let x = match site {
                Site::Value | Site::AttentionOutput | Site::Key => x,
                Site::AttentionInput | Site::MlpInput => x.reshape([SEQ, m.config.hidden_size]).unwrap(),
                Site::DownInput => x.reshape([SEQ, m.config.intermediate_size]).unwrap(),
            };
            let x = x.to_dtype(m.dtype()).unwrap();
            let y = Tape::new().constant(x.clone()).fake_quant(scheme.sites(8).at(*site)).unwrap().into_value();
            let off = Tensor::axpby(1.0, y, -1.0, x.clone()).unwrap();
            let square = |t: &Tensor| t.to_f64_vec().unwrap().into_iter().map(|x| x * x).sum::<f64>();
            let at = Site::ALL.iter().position(|s| s == site).unwrap();
            sums[at] += square(&off) / square(&x);
        }
        let found = search_clips(&m, r, &scheme, &w, &ALL, ClipGoal::Error, go).unwrap();
        let mean = sums.iter().fold(0.0, |mean, sum| mean + sum / (6 * ALL.len() * m.config.layers) as f64);
        prop_assert_eq!(found.goal.0.to_bits(), mean.to_bits());
    }

    /// By loss: what is found has the loss that is said, which is no worse than that of no clipping.
    #[test]
    fn the_loss_is_what_it_says(seed: u64) {
        let (m, w, scheme) = (model(seed), text(seed), Scheme::new(4, 3, 3));
        let r = start(&m, seed);
        let found = search_clips(&m, Some(&r), &scheme, &w, &ALL, ClipGoal::Loss, go).unwrap();
        let read = Windows::new(w.batch(&ALL), SEQ).unwrap();
        let loss = |ratios: ClipRatios| {
            let network = m.merge(Some(&r), &Scheme { activation_clip: ratios, ..scheme }).unwrap();
            eval::perplexity(&network, &read, |_| ControlFlow::Continue(())).unwrap().perplexity.ln()
        };
        prop_assert!((loss(ClipRatios::NONE) - found.goal.0).abs() < 1e-9);
        prop_assert!((loss(found.ratios) - found.goal.1).abs() < 1e-9);
        prop_assert!(found.goal.1 <= found.goal.0);
        prop_assert_eq!(search_clips(&m, Some(&r), &scheme, &w, &ALL, ClipGoal::Loss, go).unwrap(), found);
    }
}

#[test]
fn gaussian_rows_are_clipped_and_uniform_ones_are_not() {
    // The reason for it all: at 4 bits a Gaussian row of 384 has less error with its tails cut off.
    let error = |x: &[f64], ratio: f64| -> f64 {
        let t = Tensor::from_vec(x.to_vec(), [x.len() / 384, 384]).unwrap();
        let spec = Scheme::new(16, 4, 4).sites(64).attention_input.clipped(Clip::Ratio(ratio));
        let y = Tape::new().constant(t).fake_quant(&spec).unwrap().into_value().to_f64_vec().unwrap();
        x.iter().zip(y).map(|(x, y)| (x - y).powi(2)).sum()
    };
    let gaussian = ops::randn([64, 384], 1).into_vec::<f64>().unwrap();
    assert!(error(&gaussian, 0.85) < 0.95 * error(&gaussian, 1.0));
    let uniform: Vec<f64> = (0..64 * 384).map(|i| f64::from(i * 7919 % 1009) / 504.0 - 1.0).collect();
    assert!(error(&uniform, 0.85) > error(&uniform, 1.0));
}

#[test]
fn what_is_not_quantised_is_not_searched() {
    let (m, w) = (model(1), text(1));
    for goal in [ClipGoal::Error, ClipGoal::Loss] {
        let found = search_clips(&m, Some(&start(&m, 1)), &Scheme::new(4, 16, 16), &w, &[0], goal, go).unwrap();
        assert_eq!(found.ratios, ClipRatios::NONE);
        let found = search_clips(&m, Some(&start(&m, 1)), &Scheme::new(16, 16, 3), &w, &ALL, goal, go).unwrap();
        assert!(Site::ALL.into_iter().all(|s| matches!(s, Site::Key | Site::Value) || found.ratios.at(s) == 1.0));
    }
    // In f32 as well, and without rotations.
    let found = search_clips(&in_f32(&m), None, &Scheme::new(4, 4, 4), &w, &[3], ClipGoal::Error, go).unwrap();
    assert!(found.tried > 0 && found.goal.1 <= found.goal.0);
}

#[test]
fn bad_ratios_and_windows_are_named() {
    let says = |text: &str, part: &str| {
        let message = text.parse::<ClipRatios>().unwrap_err().to_string();
        assert!(message.contains(part), "{text}: {message}");
    };
    says("0", "expected a number in (0, 1], got 0");
    says("1.01", "expected a number in (0, 1], got 1.01");
    says("NaN", "got NaN");
    says("much", "expected a number, got \"much\"");
    says(
        "key=0.9,query=0.5",
        "expected activations or one of attention_input, key, value, attention_output, mlp_input, down_input, got \"query=0.5\"",
    );
    says("key=0.9,0.5", "got \"0.5\"");
    assert!(serde_json::from_str::<ClipRatios>("7").unwrap_err().to_string().contains("(0, 1]"));
    assert_eq!("best".parse::<ClipGoal>().unwrap_err().to_string(), "clip search: expected error or loss, got \"best\"");
    let (m, w) = (model(1), text(1));
    let search = |windows: &[usize]| search_clips(&m, None, &Scheme::new(4, 4, 4), &w, windows, ClipGoal::Loss, go);
    assert!(search(&[]).unwrap_err().to_string().contains("expected at least one window to search on, got 0"));
    assert!(search(&[12]).unwrap_err().to_string().contains("got [12]"));
    for goal in [ClipGoal::Error, ClipGoal::Loss] {
        let stopped = search_clips(&m, None, &Scheme::new(4, 4, 4), &w, &[0], goal, |_, _| ControlFlow::Break(()));
        assert!(matches!(stopped, Err(spinquant::Error::Interrupted { step: 1 })));
    }
}
