//! `model.safetensors.index.json`, beside one good shard.
#![no_main]

use libfuzzer_sys::fuzz_target;
use spinquant::llama::Checkpoint;

fuzz_target!(|data: &[u8]| {
    let dir = tempfile::tempdir().unwrap();
    let header = br#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}  "#;
    let shard = [&(header.len() as u64).to_le_bytes()[..], header, &[0; 4]].concat();
    std::fs::write(dir.path().join("s.safetensors"), shard).unwrap();
    std::fs::write(dir.path().join("model.safetensors.index.json"), data).unwrap();
    if let Ok(checkpoint) = Checkpoint::open(dir.path()) {
        for name in checkpoint.names() {
            let _ = checkpoint.tensor(name, &[1]);
        }
    }
});
