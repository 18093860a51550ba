//! The published `R.bin`: the file itself, and (first byte odd) a pickle in an archive whose checksums are right.
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use spinquant::rotation::Rotations;

fuzz_target!(|data: &[u8]| {
    let Some((kind, data)) = data.split_first() else { return };
    let read = |bytes: &[u8]| {
        if let Ok(r) = Rotations::from_torch_bytes(bytes, Path::new("R.bin")) {
            assert!(r.r1.len() + r.r2.len() < 1 << 28);
        }
    };
    match kind % 2 {
        0 => read(data),
        _ => read(&archive(&[("R/data.pkl", data), ("R/data/0", &[0; 256]), ("R/data/1", &[0; 128])])),
    }
});

/// A zip archive of stored entries.
fn archive(entries: &[(&str, &[u8])]) -> Vec<u8> {
    let (mut out, mut directory) = (vec![], vec![]);
    for (name, bytes) in entries {
        let mut common = vec![20, 0, 0, 0, 0, 0, 0, 0, 0x21, 0]; // version, flags, method, time, date
        common.extend(crc32(bytes).to_le_bytes());
        common.extend((bytes.len() as u32).to_le_bytes());
        common.extend((bytes.len() as u32).to_le_bytes());
        common.extend((name.len() as u16).to_le_bytes());
        common.extend([0, 0]); // extra field
        directory.extend(b"PK\x01\x02\x14\0".iter().chain(&common).chain(&[0; 10]));
        directory.extend((out.len() as u32).to_le_bytes());
        directory.extend(name.bytes());
        out.extend(b"PK\x03\x04".iter().chain(&common).copied().chain(name.bytes()).chain(bytes.iter().copied()));
    }
    let (start, count) = (out.len() as u32, entries.len() as u16);
    out.extend(&directory);
    out.extend(b"PK\x05\x06\0\0\0\0");
    out.extend(count.to_le_bytes());
    out.extend(count.to_le_bytes());
    out.extend((directory.len() as u32).to_le_bytes());
    out.extend(start.to_le_bytes());
    out.extend([0, 0]);
    out
}

fn crc32(bytes: &[u8]) -> u32 {
    let step = |crc: u32, byte: &u8| {
        (0..8).fold(crc ^ u32::from(*byte), |c, _| if c & 1 == 1 { c >> 1 ^ 0xedb8_8320 } else { c >> 1 })
    };
    !bytes.iter().fold(!0, step)
}
