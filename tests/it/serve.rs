//! The reader of requests to the scoring server: whatever comes is read, or refused by name.

use proptest::prelude::*;
use serde_json::{Value, json};
use spinquant::serve::{Completion, Prompts};

use crate::common::need::cases;

/// Any JSON, not deep.
fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        (0_u32..3).prop_map(Value::from),
        ".{0,8}".prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 24, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::btree_map("[a-z]{0,4}", inner, 0..4).prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

fn fields() -> impl Strategy<Value = String> {
    const NAMES: [&str; 12] = [
        "prompt",
        "echo",
        "max_tokens",
        "logprobs",
        "model",
        "stream",
        "n",
        "best_of",
        "temperature",
        "suffix",
        "logit_bias",
        "x",
    ];
    prop::sample::select(NAMES.to_vec()).prop_map(String::from)
}

fn check(body: &[u8]) {
    match Completion::parse(body) {
        Ok(completion) => {
            assert!(!completion.prompts.is_empty() && completion.logprobs.is_none_or(|n| n < 2));
            // It said as much.
            let value: Value = serde_json::from_slice(body).unwrap();
            assert_eq!(value["echo"], true);
            assert_eq!(value["max_tokens"].as_u64(), Some(u64::from(completion.next)));
            if let Prompts::Tokens(lists) = &completion.prompts {
                assert!(value["prompt"] == json!(lists) || value["prompt"] == json!(lists[0]));
            }
        }
        Err(refusal) => {
            assert_eq!(refusal.status, 400);
            assert!(refusal.field.is_none_or(|field| refusal.message.starts_with(field)), "{refusal:?}");
            assert!(refusal.message.chars().count() < 600, "{refusal:?}");
        }
    }
}

proptest! {
    #![proptest_config(cases(2000))]

    #[test]
    fn any_bytes(body in prop::collection::vec(any::<u8>(), 0..200)) {
        check(&body);
    }

    #[test]
    fn any_fields(changes in prop::collection::vec((fields(), any_json()), 0..4)) {
        let mut body = json!({"prompt": [[1, 2]], "echo": true, "max_tokens": 1, "logprobs": 1});
        for (name, value) in changes {
            body[name] = value;
        }
        check(body.to_string().as_bytes());
    }

    #[test]
    fn damaged_requests(at in 0_usize..100, byte in any::<u8>(), cut in 0_usize..100) {
        let good = br#"{"model": "m", "prompt": [[1, 450], [7]], "temperature": 0, "max_tokens": 1, "logprobs": 1, "echo": true}"#;
        let mut body = good.to_vec();
        body[at % good.len()] = byte;
        check(&body);
        body.truncate(cut);
        check(&body);
    }
}
