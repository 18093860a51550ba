//! Damaged files of every kind that is read: an error or a value, never a panic. The bounded twin of the fuzz targets in `fuzz/`.

use std::path::Path;
use std::time::{Duration, Instant};

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use spinquant::eval::{marks::Marks, tasks::Questions};
use spinquant::export::{Format, Output, load_native, write_hf, write_rtn};
use spinquant::llama::{Family, Llama, LlamaConfig, RopeScaling, Weights};
use spinquant::quant::{Online, Scheme};
use spinquant::rotation::Rotations;
use spinquant::{DType, Device};

use crate::common::tiny;

/// Changes a few bytes, mostly among the first `front`; sometimes cuts, repeats or splices a piece.
fn damage(bytes: &[u8], front: usize, rng: &mut ChaCha8Rng) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for _ in 0..1 + rng.next_u32() % 4 {
        let n = bytes.len().max(1);
        let within = if rng.next_u32().is_multiple_of(4) { n } else { n.min(front) };
        let at = rng.next_u32() as usize % within;
        match rng.next_u32() % 12 {
            0 => bytes.truncate(at),
            1 => {
                let piece = bytes[at..(at + 1 + rng.next_u32() as usize % 40).min(bytes.len())].to_vec();
                let to = rng.next_u32() as usize % (bytes.len() + 1);
                bytes.splice(to..to, piece);
            }
            2 if at < bytes.len() => drop(bytes.drain(at..(at + 1 + rng.next_u32() as usize % 8).min(n))),
            3 | 4 if at < bytes.len() => bytes[at] = [0, 0xff, 0x7f, 0x80][rng.next_u32() as usize % 4],
            5..=8 if at < bytes.len() => bytes[at] = b"0123456789[]{},:\"-.eE"[rng.next_u32() as usize % 21],
            9 if at < bytes.len() => bytes[at] = rng.next_u32() as u8,
            _ if at < bytes.len() => bytes[at] ^= 1 << (rng.next_u32() % 8),
            _ => {}
        }
    }
    bytes
}

/// Runs `read` on damaged copies for a second at most; it says whether it accepted one.
fn endure(what: &str, whole: &[u8], front: usize, mut read: impl FnMut(&[u8]) -> bool) {
    let (start, mut rng, mut tried, mut accepted) = (Instant::now(), ChaCha8Rng::seed_from_u64(1), 0, 0);
    assert!(read(whole), "{what}: the undamaged file");
    while tried < 4000 && start.elapsed() < Duration::from_secs(1) {
        accepted += usize::from(read(&damage(whole, front, &mut rng)));
        tried += 1;
    }
    assert!(tried > 20 && accepted < tried, "{what}: {accepted} of {tried} accepted");
    println!("{what}: {tried} damaged files, {accepted} accepted");
}

#[test]
fn configurations() {
    let long = RopeScaling::LongRope {
        short: vec![1.0, 2.0],
        long: vec![3.0, 4.0],
        attention_factor: 1.2,
        original_max_position_embeddings: 16,
    };
    let phi3 = tiny::of_family(LlamaConfig { rope_scaling: Some(long), ..tiny::config(4, 2, false) }, Family::Phi3);
    let others = [Family::Qwen3, Family::SmolLm3, Family::Granite].map(|f| tiny::of_family(tiny::config(4, 2, false), f));
    for plain in [tiny::llama3(4, 2), phi3].into_iter().chain(others) {
        let read = |b: &[u8]| LlamaConfig::from_json(b, Path::new("config.json"));
        endure("config.json", plain.to_json().as_bytes(), usize::MAX, |b| match read(b) {
            // What is accepted can be computed with, and is written as what it is.
            Ok(c) => c.frequencies(1).inverse.len() == c.rotary_dim() / 2 && read(c.to_json().as_bytes()).unwrap() == c,
            Err(_) => false,
        });
    }
}

#[test]
fn rotation_files() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("R.safetensors");
    let r = Rotations::random_hadamard(16, 8, 3, 1).unwrap();
    r.save(&path).unwrap();
    let whole = std::fs::read(&path).unwrap();
    endure("rotations", &whole, 600, |b| {
        std::fs::write(&path, b).unwrap();
        Rotations::load(&path).is_ok_and(|r| r.check(16, 8, 3, 1e-4).is_ok())
    });
    r.save_torch(&path).unwrap();
    let whole = std::fs::read(&path).unwrap();
    endure("R.bin", &whole, 700, |b| Rotations::from_torch_bytes(b, &path).is_ok());
    let whole = std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/interop/R_parameters.bin")).unwrap();
    endure("R.bin of torch", &whole, 2400, |b| Rotations::from_torch_bytes(b, &path).is_ok());
    // The pickle itself, its checksum made right.
    let zip = |pickle: &[u8]| {
        use std::io::{Cursor, Write};
        let mut zip = zip::ZipWriter::new(Cursor::new(vec![]));
        let options = zip::write::SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
        for (name, bytes) in [("R/data.pkl", pickle), ("R/data/0", &[0; 256]), ("R/data/1", &[0; 128])] {
            zip.start_file(name, options).unwrap();
            zip.write_all(bytes).unwrap();
        }
        zip.finish().unwrap().into_inner()
    };
    let pickle = {
        let mut file = zip::ZipArchive::new(std::io::Cursor::new(&whole)).unwrap();
        let mut bytes = vec![];
        std::io::Read::read_to_end(&mut file.by_name("R_parameters/data.pkl").unwrap(), &mut bytes).unwrap();
        bytes
    };
    endure("data.pkl", &pickle, usize::MAX, |b| Rotations::from_torch_bytes(&zip(b), &path).is_ok());
}

#[test]
fn indices_and_shards() {
    let dir = tempfile::tempdir().unwrap();
    let (source, out) = (dir.path().join("source"), dir.path().join("out"));
    let config = LlamaConfig { layers: 1, ..tiny::config(2, 1, false) };
    tiny::write(&source, &config, DType::BF16, 1, true);
    let scheme = Scheme::FULL_PRECISION.online(Online::NONE);
    write_hf(&source, None, &scheme, Output { shard_bytes: 2000, ..Output::new(&out, Format::Hf) }, |_| {}).unwrap();
    let index = out.join("model.safetensors.index.json");
    let shard = std::fs::read_dir(&out).unwrap().map(|e| e.unwrap().path());
    let shard = shard.filter(|p| p.extension().is_some_and(|e| e == "safetensors")).max().unwrap();
    for (path, front) in [(index, usize::MAX), (shard, 500)] {
        let whole = std::fs::read(&path).unwrap();
        endure(&path.display().to_string(), &whole, front, |b| {
            std::fs::write(&path, b).unwrap();
            Weights::load(&out, &config, DType::F32).is_ok()
        });
        std::fs::write(&path, whole).unwrap();
    }
}

#[test]
fn native_checkpoints() {
    let dir = tempfile::tempdir().unwrap();
    let (source, out) = (dir.path().join("source"), dir.path().join("out"));
    let config = LlamaConfig { layers: 1, ..tiny::config(2, 1, false) };
    tiny::write(&source, &config, DType::F32, 1, true);
    let model = Llama::load(&source, DType::F32, &Device::Cpu).unwrap();
    let r = Rotations::random_hadamard(16, 8, 1, 5).unwrap();
    let scheme = Scheme { symmetric_weights: false, weight_group: Some(8), ..Scheme::new(4, 4, 4) };
    write_rtn(&model, Some(&r), &scheme, Output::new(&out, Format::Native), |_| {}).unwrap();
    for (name, front) in [("spinquant.json", usize::MAX), ("model.safetensors", 1500)] {
        let path = out.join(name);
        let whole = std::fs::read(&path).unwrap();
        endure(name, &whole, front, |b| {
            std::fs::write(&path, b).unwrap();
            // What loads must also run, unless its context or sizes are no longer those of the test.
            load_native(&out, &Device::Cpu).is_ok_and(|n| {
                let _ = n.model.logits(&[1, 2, 3], 3);
                true
            })
        });
        std::fs::write(&path, whole).unwrap();
    }
}

/// A value of some kind; objects and arrays hold others.
fn any_json(rng: &mut ChaCha8Rng, depth: u32) -> serde_json::Value {
    use serde_json::{Value, json};
    const TEXTS: [&str; 12] = ["", " ", "a", "1", "2", "_", "x _ y", "[title] b", "[", "é  [x]", "A", "18446744073709551616"];
    const KEYS: [&str; 24] = [
        "context",
        "choices",
        "gold",
        "passage",
        "question",
        "answer",
        "label",
        "goal",
        "sol1",
        "sol2",
        "answerA",
        "answerB",
        "answerC",
        "activity_label",
        "ctx_a",
        "ctx_b",
        "endings",
        "sentence",
        "option1",
        "option2",
        "stem",
        "text",
        "answerKey",
        "choices",
    ];
    match rng.next_u32() % if depth == 0 { 5 } else { 9 } {
        0 => Value::Null,
        1 => json!(rng.next_u32().is_multiple_of(2)),
        2 => json!([0.0, 1.0, -1.0, 0.5, 1e300][rng.next_u32() as usize % 5]),
        3 => json!([0, 1, 2, 3, u64::MAX][rng.next_u32() as usize % 5]),
        4 => json!(TEXTS[rng.next_u32() as usize % TEXTS.len()]),
        5 | 6 => (0..rng.next_u32() % 4).map(|_| any_json(rng, depth - 1)).collect(),
        _ => {
            let key = |rng: &mut ChaCha8Rng| KEYS[rng.next_u32() as usize % KEYS.len()].to_string();
            let members: Vec<_> = (0..rng.next_u32() % 12).map(|_| (key(rng), any_json(rng, depth - 1))).collect();
            Value::Object(members.into_iter().collect())
        }
    }
}

#[test]
fn task_files() {
    let samples = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/zeroshot/release");
    let dir = tempfile::tempdir().unwrap();
    // Tasks are told apart by their objects' keys, ARC and OpenBookQA by the file's name.
    let path = dir.path().join("ARC-Easy-Test.jsonl");
    std::fs::write(dir.path().join("ARC-Easy-Test-labels.lst"), "1\n1\n1\n").unwrap();
    let read = |bytes: &[u8]| {
        std::fs::write(&path, bytes).unwrap();
        let Ok(read) = Questions::read(&path) else { return false };
        // What is read can be asked and marked.
        let candidates: Vec<_> = read.questions.iter().flat_map(|q| (0..q.candidates()).map(|i| q.candidate(i))).collect();
        Marks::of(&read.questions, &vec![-1.0; candidates.len()]).unwrap();
        true
    };
    let mut files: Vec<_> = std::fs::read_dir(samples).unwrap().map(|e| e.unwrap().path()).collect();
    files.sort();
    assert_eq!(files.len(), 8, "seven kinds of release files and the schema");
    for file in files {
        endure(&file.display().to_string(), &std::fs::read(&file).unwrap(), usize::MAX, read);
    }
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    let mut accepted = 0;
    for _ in 0..4000 {
        let value = any_json(&mut rng, 3);
        accepted += usize::from(read(value.to_string().as_bytes()));
        let mut bytes = vec![0; rng.next_u32() as usize % 64];
        rng.fill_bytes(&mut bytes);
        assert!(!read(&bytes), "{bytes:?}");
    }
    println!("{accepted} of 4000 values accepted");
}
