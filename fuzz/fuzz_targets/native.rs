//! A native output: `spinquant.json`, a zero byte, `model.safetensors`. What loads must run.
#![no_main]

use libfuzzer_sys::fuzz_target;
use spinquant::Device;
use spinquant::export::load_native;

fuzz_target!(|data: &[u8]| {
    let Some(cut) = data.iter().position(|b| *b == 0) else { return };
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("spinquant.json"), &data[..cut]).unwrap();
    std::fs::write(dir.path().join("model.safetensors"), &data[cut + 1..]).unwrap();
    if let Ok(native) = load_native(dir.path(), &Device::Cpu) {
        let _ = native.model.logits(&[0, 0, 0], 3);
    }
});
