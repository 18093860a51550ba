//! Our rotation files.
#![no_main]

use libfuzzer_sys::fuzz_target;
use spinquant::rotation::Rotations;

fuzz_target!(|data: &[u8]| {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), data).unwrap();
    if let Ok(r) = Rotations::load(file.path()) {
        let _ = r.check(r.hidden(), r.head_dim(), r.layers(), 1e-4);
        if r.hidden() <= 64 && r.head_dim() <= 64 && r.layers() <= 64 {
            let _ = (r.report(), r.projected(1e-4));
        }
    }
});
