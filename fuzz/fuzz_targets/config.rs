//! `config.json`: any bytes give a configuration that can be written and read again, or an error.
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use spinquant::llama::LlamaConfig;

fuzz_target!(|data: &[u8]| {
    if let Ok(config) = LlamaConfig::from_json(data, Path::new("config.json")) {
        assert_eq!(config.frequencies(1).inverse.len(), config.rotary_dim() / 2);
        let again = LlamaConfig::from_json(config.to_json().as_bytes(), Path::new("written")).expect("what we wrote");
        assert_eq!(again, config);
    }
});
