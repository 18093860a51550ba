//! The header and data of a model's `model.safetensors`.
#![no_main]

use libfuzzer_sys::fuzz_target;
use spinquant::llama::Checkpoint;

fuzz_target!(|data: &[u8]| {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("model.safetensors"), data).unwrap();
    if let Ok(checkpoint) = Checkpoint::open(dir.path()) {
        for name in checkpoint.names() {
            for shape in [&[][..], &[1], &[2, 2]] {
                let _ = checkpoint.tensor(name, shape);
            }
        }
    }
});
