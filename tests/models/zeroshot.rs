//! Log-likelihoods of multiple-choice answers against transformers in float32: the model's name and the numbers are in
//! `tests/fixtures/zeroshot/smollm2.json`, or in `zeroshot/` of the folder that `SPINQUANT_GOLDENS` names.

use std::ops::ControlFlow;
use std::path::PathBuf;

use serde_json::Value;
use spinquant::data::{Bos, Tokenizer};
use spinquant::eval::{choices, tasks::Questions};
use spinquant::llama::Llama;
use spinquant::quant::Scheme;
use spinquant::{DType, Device};

use crate::common::need;

/// How far a log-likelihood of float32 may be from another implementation's.
const TOLERANCE: f64 = 2e-3;

#[test]
#[ignore = "needs SPINQUANT_SMOLLM2, the folder of SmolLM2-135M-Instruct, and SPINQUANT_TASKS, a folder with the eight tasks"]
fn log_likelihoods_are_those_of_transformers() {
    let (dir, tasks) = (need::folder("SPINQUANT_SMOLLM2", "config.json"), need::folder("SPINQUANT_TASKS", "boolq.jsonl"));
    let goldens = std::env::var_os("SPINQUANT_GOLDENS").map_or_else(|| PathBuf::from("tests/fixtures"), PathBuf::from);
    let golden: Value = serde_json::from_slice(&std::fs::read(goldens.join("zeroshot/smollm2.json")).unwrap()).unwrap();
    let model = Llama::load_plain(&dir, DType::F32, &Device::Cpu).unwrap();
    let model = model.merge(None, &Scheme::FULL_PRECISION).unwrap();
    let tokenizer = Tokenizer::from_dir(&dir).unwrap();
    let all = Questions::read_all(tasks).unwrap();
    for (task, want) in golden["log_likelihoods"].as_object().unwrap() {
        let questions = &all.iter().find(|q| q.name == *task).unwrap_or_else(|| panic!("no {task}")).questions;
        let want: Vec<Vec<f64>> = serde_json::from_value(want.clone()).unwrap();
        let questions = &questions[..want.len()];
        let length = model.config.max_position_embeddings;
        let requests = choices::requests(&tokenizer, questions, Bos::None, None, length).unwrap();
        let mut got = vec![None; requests.len()];
        choices::log_likelihoods(&model, &requests, &mut got, |_| ControlFlow::Continue(())).unwrap();
        let want = want.concat();
        assert_eq!(got.len(), want.len(), "{task}");
        let worst = got.iter().zip(&want).map(|(a, b)| (a.unwrap() - b).abs()).fold(0f64, f64::max);
        println!("{task}: {} log-likelihoods, worst difference {worst:.1e}", want.len());
        assert!(worst <= TOLERANCE, "{task}: {worst:e}");
    }
}
