//! The body of a request to the scoring server: read, or refused by the name of a field.
#![no_main]

use libfuzzer_sys::fuzz_target;
use spinquant::serve::Completion;

fuzz_target!(|data: &[u8]| match Completion::parse(data) {
    Ok(completion) => assert!(!completion.prompts.is_empty() && completion.logprobs.is_none_or(|n| n < 2)),
    Err(refusal) => assert!(refusal.status == 400 && refusal.message.len() < 4096),
});
