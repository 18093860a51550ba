//! Quantised models and rotations as files: what is written comes back, what is damaged or hostile is refused.

mod tiny;

use std::collections::BTreeMap;
use std::io::{Cursor, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use serde_json::Value;
use spinquant::data::Windows;
use spinquant::export::{
    self, Format, Output, Provenance, RECORD, Stored, Writer, load_native, write_hf, write_quantized, write_rtn,
};
use spinquant::llama::{Llama, LlamaConfig, Merged, Rotated, Source};
use spinquant::ops::fake_quant::Quantized;
use spinquant::ops::randn;
use spinquant::quant::{Calibration, Clip, Gptq, LayerReport, Online, Scheme, quantize_layers};
use spinquant::rotation::Rotations;
use spinquant::{DType, Device, Error, Result, Tensor, io};
use zip::CompressionMethod::Stored as StoredEntry;
use zip::write::SimpleFileOptions;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/interop").join(name)
}

/// The message of a failure, which must contain every part.
fn fails<T>(result: Result<T>, parts: &[&str]) {
    let message = result.err().expect("a failure").to_string();
    assert!(parts.iter().all(|p| message.contains(p)), "{message:?} lacks one of {parts:?}");
}

fn bits(r: &Rotations) -> (DType, Vec<u64>, Vec<usize>) {
    let values = [&r.r1, &r.r2].map(|t| t.to_f64_vec().unwrap()).concat();
    (r.r1.dtype(), values.iter().map(|x| x.to_bits()).collect(), r.r2.shape().to_vec())
}

// ---------------------------------------------------------------------------------------------------------------- R.bin

#[test]
fn files_of_torch_are_read_to_the_bit() {
    let want = Rotations::load(&fixture("R.safetensors")).unwrap();
    for name in ["R.bin", "R_parameters.bin"] {
        let r = Rotations::read_torch(&fixture(name)).unwrap();
        assert_eq!(bits(&r), bits(&want), "{name}");
        let exact = Rotations::load_torch(&fixture(name)).unwrap();
        assert_eq!(exact.r1.dtype(), DType::F64);
        for (report, raw) in exact.report().unwrap().iter().zip(r.report().unwrap()) {
            assert!(report.columns_error < 1e-13 && report.rows_error < 1e-13, "{report}");
            assert!(raw.columns_error < 1e-6 && raw.rows_error < 1e-6, "{raw}");
            assert!((report.determinant.abs() - 1.0).abs() < 1e-12, "{report}");
        }
    }
    assert_eq!((want.hidden(), want.head_dim(), want.layers()), (8, 4, 2));
    assert_eq!(want.report().unwrap()[2].name, "R2[1]");
}

#[test]
fn rotations_round_trip_through_torch_files() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (dir.path().join("a.bin"), dir.path().join("b.bin"));
    let r = Rotations::random_orthogonal(24, 8, 12, 3).unwrap();
    for dtype in [DType::F64, DType::F32, DType::F16, DType::BF16] {
        let r = r.to_dtype(dtype).unwrap();
        r.save_torch(&a).unwrap();
        r.save_torch(&b).unwrap();
        assert_eq!(std::fs::read(&a).unwrap(), std::fs::read(&b).unwrap());
        let back = Rotations::read_torch(&a).unwrap();
        let wide = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
        assert_eq!(bits(&back), bits(&r.to_dtype(wide).unwrap()));
    }
    // Projected only where it is needed.
    r.save_torch(&a).unwrap();
    assert_eq!(bits(&Rotations::load_torch(&a).unwrap()), bits(&r));
}

#[test]
fn rotations_that_are_not_orthogonal() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("R.bin");
    let mut r = Rotations::random_orthogonal(16, 8, 2, 3).unwrap();
    let bend = |r2: &Tensor, by: f64| {
        let mut x = r2.to_f64_vec().unwrap();
        x[64] += by;
        Tensor::from_vec(x, r2.shape()).unwrap()
    };
    let straight = r.r2.clone();
    r.r2 = bend(&straight, 1e-2);
    r.save_torch(&path).unwrap();
    let error = r.orthogonality_errors().unwrap().1[1];
    fails(Rotations::load_torch(&path), &["R2[1] is not orthogonal", &format!("{error:.1e}"), "at most 1e-4"]);
    assert!(Rotations::read_torch(&path).is_ok());
    r.r2 = bend(&straight, 3e-5);
    r.save_torch(&path).unwrap();
    let (first, others) = Rotations::load_torch(&path).unwrap().orthogonality_errors().unwrap();
    assert!(first < 1e-13 && others.iter().all(|e| *e < 1e-13), "{first} {others:?}");
    r.r2 = bend(&straight, f64::NAN);
    r.save_torch(&path).unwrap();
    fails(Rotations::read_torch(&path), &["R.bin", "model.layers.1.self_attn.R2 holds NaN"]);
}

fn archive(entries: &[(&str, &[u8])]) -> Vec<u8> {
    let mut zip = zip::ZipWriter::new(Cursor::new(vec![]));
    for (name, bytes) in entries {
        zip.start_file(*name, SimpleFileOptions::default().compression_method(StoredEntry)).unwrap();
        zip.write_all(bytes).unwrap();
    }
    zip.finish().unwrap().into_inner()
}

fn pickled(pickle: &[u8]) -> Result<Rotations> {
    let bytes = archive(&[("x/data.pkl", pickle), ("x/data/0", &[0; 64])]);
    Rotations::from_torch_bytes(&bytes, Path::new("R.bin"))
}

/// `{key: tensor}` over storage 0.
fn dictionary(key: &str, class: &str, len: i32, offset: i32, size: [i32; 2], stride: [i32; 2]) -> Vec<u8> {
    let text = |s: &str| [b"X", &(s.len() as u32).to_le_bytes()[..], s.as_bytes()].concat();
    let int = |x: i32| [b"J", &x.to_le_bytes()[..]].concat();
    let pair = |[a, b]: [i32; 2]| [int(a), int(b), vec![0x86]].concat();
    [
        b"\x80\x02}(".to_vec(),
        text(key),
        b"ctorch._utils\n_rebuild_tensor_v2\n((".to_vec(),
        text("storage"),
        format!("c{class}\n").into_bytes(),
        text("0"),
        text("cpu"),
        int(len),
        b"tQ".to_vec(),
        int(offset),
        pair(size),
        pair(stride),
        b"\x89ccollections\nOrderedDict\n)RtRu.".to_vec(),
    ]
    .concat()
}

#[test]
fn foreign_pickles_are_refused_and_named() {
    let run = b"\x80\x02cos\nsystem\nX\x04\0\0\0true\x85R.";
    fails(pickled(run), &["R.bin", "os.system", "refused"]);
    fails(pickled(b"\x80\x02cbuiltins\neval\nX\x01\0\0\x001\x85R."), &["builtins.eval"]);
    fails(pickled(b"\x80\x02ctorch\nLongStorage\n."), &["torch.LongStorage"]);
    // INST, OBJ, NEWOBJ, EXT1, STACK_GLOBAL, INT, GLOBAL by text id: instructions that nothing here needs.
    for op in [b'i', b'o', 0x81, 0x82, 0x93, b'I', b'P', b'd', b'l', b'e', b'0', b'2', 0x8c, 0x95] {
        fails(pickled(&[0x80, 2, b'}', op, b'.']), &["instruction", &format!("0x{op:02x}"), "refused"]);
    }
    fails(pickled(b"\x80\x04}."), &["protocol 2"]);
    fails(pickled(b"\x80\x02}"), &["cut off"]);
    fails(pickled(b"\x80\x02."), &["takes more from its stack"]);
    fails(pickled(b"\x80\x02(}(R."), &["takes more from its stack"]);
    fails(pickled(b"\x80\x02h\x07."), &["recalls what it never stored"]);
    fails(pickled(b"\x80\x02X\xff\xff\xff\xff."), &["cut off"]);
    fails(pickled(b"\x80\x02}q\x00h\x00h\x00s."), &["a key", "got a dictionary"]); // a dictionary inside itself
    fails(pickled(b"\x80\x02}."), &["R1 is missing"]);
    fails(pickled(b"\x80\x02K\x01."), &["expected a dictionary of tensors, got a number"]);
    fails(pickled(b"\x80\x02\x8a\x09\xff\xff\xff\xff\xff\xff\xff\xff\x01."), &["beyond 64 bits"]);
}

#[test]
fn absurd_tensors_are_refused_before_memory_is_taken() {
    let float = "torch\nFloatStorage";
    let of = |len, offset, size, stride| pickled(&dictionary("R1", float, len, offset, size, stride));
    fails(of(i32::MAX, 0, [4, 4], [4, 1]), &["R1", "claims a storage of 2147483647 f32 values", "64 bytes"]);
    fails(of(16, 0, [40000, 40000], [40000, 1]), &["R1", "do not fit its storage of 16"]);
    fails(of(16, 1, [4, 4], [4, 1]), &["R1", "do not fit"]);
    fails(of(16, 0, [4, 4], [0, 0]), &["R1", "strides [0, 0]"]);
    fails(of(16, 0, [4, 2], [4, 1]), &["R1", "square", "4x2"]);
    fails(of(16, 0, [0, 0], [0, 1]), &["R1", "0x0"]);
    fails(of(-1, 0, [4, 4], [4, 1]), &["a negative number"]);
    fails(of(16, 0, [4, 4], [4, 1]), &["model.layers.0.self_attn.R2 is missing"]);
    fails(pickled(&dictionary("R1", "torch\nDoubleStorage", 16, 0, [4, 4], [4, 1])), &["16 f64 values", "64 bytes"]);
    fails(pickled(&dictionary("R4", float, 16, 0, [4, 4], [4, 1])), &["expected R1 and", "R4"]);
    let far = format!("model.layers.{}.self_attn.R2", u64::MAX);
    fails(pickled(&dictionary(&far, float, 16, 0, [4, 4], [4, 1])), &["expected R1 and"]);
    fails(pickled(&dictionary("model.layers.0.self_attn.R2", float, 16, 0, [4, 4], [4, 1])), &["R1 is missing"]);

    // A gap in the layers.
    let both = |second: &str| {
        let first = dictionary("R1", float, 16, 0, [4, 4], [4, 1]);
        let other = dictionary(second, float, 16, 0, [4, 4], [4, 1]);
        [&first[..first.len() - 1], &other[3..]].concat()
    };
    fails(pickled(&both("model.layers.1.self_attn.R2")), &["model.layers.0.self_attn.R2 is missing"]);
    assert!(pickled(&both("model.layers.0.self_attn.R2")).is_ok());
    fails(pickled(&both("R1")), &["R1 occurs twice"]);
}

#[test]
fn damaged_archives() {
    let whole = std::fs::read(fixture("R.bin")).unwrap();
    let read = |bytes: &[u8]| Rotations::from_torch_bytes(bytes, Path::new("R.bin"));
    for cut in (0..whole.len()).step_by(13) {
        fails(read(&whole[..cut]), &["R.bin"]);
    }
    fails(read(b""), &["expected a zip archive", "0 bytes"]);
    fails(read(&archive(&[])), &["data.pkl"]);
    fails(read(&archive(&[("a/data.pkl", b""), ("b/data.pkl", b"")])), &["expected one entry NAME/data.pkl"]);
    let pickle = dictionary("R1", "torch\nFloatStorage", 16, 0, [4, 4], [4, 1]);
    fails(read(&archive(&[("x/data.pkl", &pickle)])), &["lacks the entry x/data/0"]);
    fails(read(&archive(&[("x/data.pkl", &pickle), ("x/byteorder", b"big")])), &["little-endian"]);
    fails(read(&archive(&[("x/data.pkl", &vec![b'}'; (8 << 20) + 1])])), &["data.pkl", "at most"]);
    // A changed value does not agree with its checksum.
    let (r1, _) = whole
        .windows(4)
        .enumerate()
        .find(|(_, w)| *w == Rotations::read_torch(&fixture("R.bin")).unwrap().r1.as_slice::<f32>().unwrap()[0].to_le_bytes())
        .unwrap();
    let mut changed = whole.clone();
    changed[r1] ^= 1;
    fails(read(&changed), &["data/0"]);
    // Flags in the central directory: 8 bytes from its signature the encryption bit, 10 the method.
    let patch = |at: usize, value: u8| {
        let mut bytes = whole.clone();
        let entries: Vec<usize> = (0..bytes.len() - 4).filter(|i| bytes[*i..].starts_with(b"PK\x01\x02")).collect();
        entries.into_iter().for_each(|i| bytes[i + at] |= value);
        bytes
    };
    fails(read(&patch(8, 1)), &["encrypted"]);
    fails(read(&patch(10, 8)), &["compressed"]);
    fails(Rotations::load_torch(Path::new("absent/R.bin")), &["absent"]);
}

// -------------------------------------------------------------------------------------------------------- Hugging Face

fn distance(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).fold(0.0, |m, (a, b)| if (a - b).is_nan() || m.is_nan() { f64::NAN } else { f64::max(m, (a - b).abs()) })
}

const PLAIN: Scheme = Scheme { online: Online::NONE, ..Scheme::FULL_PRECISION };

#[test]
fn hugging_face_output_is_the_same_function() {
    let dir = tempfile::tempdir().unwrap();
    let (source, out) = (dir.path().join("source"), dir.path().join("out"));
    for config in [tiny::config(2, 2, false), tiny::config(4, 2, false), tiny::config(4, 1, true), tiny::llama3(4, 2)] {
        let r = Rotations::random_orthogonal(16, 8, 2, 5).unwrap();
        for (dtype, bound) in [(DType::F64, 1e-11), (DType::F32, 2e-5), (DType::BF16, 0.3)] {
            tiny::write(&source, &config, dtype, 7, true);
            std::fs::write(source.join("tokenizer.json"), "{}").unwrap();
            let want = tiny::logits(&Llama::load(&source, DType::F64, &Device::Cpu).unwrap());
            let mut done = vec![];
            // A limit that most tensors exceed: many shards.
            for shard_bytes in [u64::MAX, 600] {
                let output = Output { overwrite: true, shard_bytes, ..Output::new(&out, Format::Hf) };
                write_hf(&source, Some(&r), &PLAIN, output, |n| done.push(n)).unwrap();
                assert_eq!(out.join("model.safetensors").exists(), shard_bytes == u64::MAX);
                assert_eq!(std::fs::read_to_string(out.join("tokenizer.json")).unwrap(), "{}");
                let got = Llama::load(&out, DType::F64, &Device::Cpu).unwrap();
                assert_eq!(got.config, LlamaConfig { tie_word_embeddings: false, dtype: Some(dtype), ..config.clone() });
                let got = tiny::logits(&got);
                assert!(distance(&got, &want) < bound, "{dtype}: {}", distance(&got, &want));
            }
            assert_eq!(done, [1, 2, 1, 2]);
            // Rounded once: the stored embedding is the rotated one to the bit.
            let checkpoint = spinquant::llama::Checkpoint::open(&source).unwrap();
            let e = checkpoint.tensor("model.embed_tokens.weight", &[31, 16]).unwrap().to_dtype(DType::F64).unwrap();
            let rotated = spinquant::ops::matmul::product(&e, false, &r.r1, false, false, DType::F64).unwrap();
            let stored =
                spinquant::llama::Checkpoint::open(&out).unwrap().tensor("model.embed_tokens.weight", &[31, 16]).unwrap();
            assert_eq!(stored.dtype(), dtype);
            assert_eq!(stored.to_f64_vec().unwrap(), rotated.to_dtype(dtype).unwrap().to_f64_vec().unwrap());
        }
    }
}

#[test]
fn hugging_face_output_of_quantised_weights() {
    let dir = tempfile::tempdir().unwrap();
    let (source, out) = (dir.path().join("source"), dir.path().join("out"));
    let config = tiny::config(4, 2, false);
    let r = Rotations::random_hadamard(16, 8, 2, 5).unwrap();
    let scheme = Scheme::new(4, 16, 16).online(Online::NONE);
    for dtype in [DType::F32, DType::BF16] {
        tiny::write(&source, &config, dtype, 8, false); // gains of 1: nothing is rounded while folding
        let model = Llama::load(&source, dtype, &Device::Cpu).unwrap();
        for rotations in [Some(&r), None] {
            let output = Output { overwrite: true, ..Output::new(&out, Format::Hf) };
            write_hf(&source, rotations, &scheme, output.clone(), |_| {}).unwrap();
            let loaded = Llama::load(&out, dtype, &Device::Cpu).unwrap().merge(None, &Scheme::FULL_PRECISION).unwrap();
            let want = model.merge(rotations, &scheme).unwrap();
            same_weights(&loaded, &want);
            write_rtn(&model, rotations, &scheme, output, |_| {}).unwrap();
            same_weights(&Llama::load(&out, dtype, &Device::Cpu).unwrap().merge(None, &Scheme::FULL_PRECISION).unwrap(), &want);
        }
    }
    let record: Value = serde_json::from_slice(&std::fs::read(out.join(RECORD)).unwrap()).unwrap();
    assert_eq!((&record["format"], &record["scheme"]["weight_bits"]), (&"spinquant-hf".into(), &4.into()));
    let output = Output { overwrite: true, ..Output::new(&out, Format::Hf) };
    fails(write_hf(&source, Some(&r), &Scheme::new(4, 4, 4), output, |_| {}), &["expected no online rotations", "r3,r4"]);
}

#[test]
fn the_source_configuration_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let (source, out) = (dir.path().join("source"), dir.path().join("out"));
    tiny::write(&source, &tiny::config(4, 2, true), DType::BF16, 8, true);
    let path = source.join("config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    config["something_else"] = "kept".into();
    config.as_object_mut().unwrap().remove("torch_dtype");
    config["dtype"] = "float32".into(); // wrong: the files hold bf16
    std::fs::write(&path, config.to_string()).unwrap();
    write_hf(&source, None, &PLAIN, Output::new(&out, Format::Hf), |_| {}).unwrap();
    let mut want = config.clone();
    want["tie_word_embeddings"] = false.into();
    want["dtype"] = "bfloat16".into();
    let got: Value = serde_json::from_slice(&std::fs::read(out.join("config.json")).unwrap()).unwrap();
    assert_eq!(got, want);
}

// --------------------------------------------------------------------------------------------------------------- native

fn same_weights(a: &Merged, b: &Merged) {
    let all = |m: &Merged| -> Vec<(DType, Vec<u64>)> {
        let layers = m.blocks.iter().flat_map(|b| b.weights.as_array());
        let of = |t: &Tensor| (t.dtype(), t.to_f64_vec().unwrap().iter().map(|x| x.to_bits()).collect());
        [&m.embedding, &m.head].into_iter().chain(layers).map(of).collect()
    };
    assert!(all(a) == all(b), "weights differ");
}

#[test]
fn native_output_is_the_model_in_memory_to_the_bit() {
    let dir = tempfile::tempdir().unwrap();
    let (source, out) = (dir.path().join("source"), dir.path().join("out"));
    let grouped = |bits, group| Scheme { weight_group: Some(group), symmetric_weights: false, ..Scheme::new(bits, 4, 4) };
    let schemes = [
        Scheme::new(4, 4, 4),
        grouped(3, 8),
        grouped(4, 4),
        Scheme { weight_clip: Clip::Ratio(0.95), ..Scheme::new(8, 8, 16) },
        Scheme { symmetric_weights: false, ..Scheme::new(2, 16, 16) },
        Scheme::new(16, 4, 4).online(Online { r3: false, r4: true }),
    ];
    for config in [tiny::config(2, 2, false), tiny::config(4, 2, true), tiny::llama3(4, 1)] {
        for dtype in [DType::F64, DType::F32, DType::BF16, DType::F16] {
            tiny::write(&source, &config, dtype, 9, true);
            let model = Llama::load(&source, dtype, &Device::Cpu).unwrap();
            let r = Rotations::random_hadamard(16, 8, 2, 5).unwrap();
            for (i, scheme) in schemes.iter().enumerate() {
                let rotations = if i % 3 == 1 && dtype == DType::F32 { None } else { Some(&r) };
                let output = Output { overwrite: true, source: Some(&source), ..Output::new(&out, Format::Native) };
                write_rtn(&model, rotations, scheme, output, |_| {}).unwrap();
                assert!(export::is_native(&out) && !export::is_native(&source));
                let native = load_native(&out, &Device::Cpu).unwrap();
                let want = model.merge(rotations, scheme).unwrap();
                assert_eq!((&native.model.config, native.model.scheme), (&want.config, want.scheme));
                assert_eq!(native.rotations.as_ref().map(bits), rotations.map(bits));
                same_weights(&native.model, &want);
                let logits = |m: &Merged| m.logits(&tiny::tokens(&config), 9).unwrap().to_f64_vec().unwrap();
                assert_eq!(logits(&native.model), logits(&want), "{dtype} {scheme}");
            }
        }
    }
}

/// Reads codes with nothing but the documented layout.
#[test]
fn native_layout_is_as_documented() {
    let dir = tempfile::tempdir().unwrap();
    let (source, out) = (dir.path().join("source"), dir.path().join("out"));
    let config = LlamaConfig { intermediate_size: 13, ..tiny::config(4, 2, false) }; // an odd number of columns in down
    tiny::write(&source, &config, DType::F32, 9, true);
    let model = Llama::load(&source, DType::F32, &Device::Cpu).unwrap();
    let provenance = Provenance {
        model: "source".into(),
        rotations: "hadamard:5".into(),
        weights: "rtn".into(),
        calibration_sha256: Some(export::sha256(b"text")),
        seeds: [("rotations".to_string(), 5)].into(),
        command: "spinquant quantize".into(),
        ..Default::default()
    };
    let r = Rotations::random_hadamard(16, 8, 2, 5).unwrap();
    let scheme = Scheme { symmetric_weights: false, ..Scheme::new(4, 4, 4) };
    write_rtn(&model, Some(&r), &scheme, Output { provenance, ..Output::new(&out, Format::Native) }, |_| {}).unwrap();
    let record: Value = serde_json::from_slice(&std::fs::read(out.join(RECORD)).unwrap()).unwrap();
    assert_eq!(record["weights"]["min_code"], 0);
    assert_eq!(record["hadamard"]["r4"]["n"], 13);
    assert_eq!(record["rotations_sha256"], export::rotations_sha256(&r).unwrap());
    assert_eq!(record["crate_version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(record["provenance"]["calibration_sha256"], "982d9e3eb996f559e633f4d194def3761d909f5a3b647d1a851fead67c32c9d1");
    assert_eq!(record["provenance"]["command"], "spinquant quantize");

    let bytes = std::fs::read(out.join("model.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let name = |part: &str| file.tensor(&format!("model.layers.1.mlp.down_proj.{part}")).unwrap();
    let floats = |part: &str| -> Vec<f32> { name(part).data().as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect() };
    let (codes, scale, zero) = (name("codes"), floats("scale"), floats("zero"));
    assert_eq!((codes.shape(), name("scale").shape()), (&[16, 7][..], &[16, 1][..]));
    let mut down = vec![];
    for row in 0..16 {
        for col in 0..13 {
            let byte = codes.data()[row * 7 + col / 2];
            let code = f32::from(if col % 2 == 0 { byte & 15 } else { byte >> 4 });
            down.push(scale[row] * (code - zero[row]));
        }
        assert_eq!(codes.data()[row * 7 + 6] >> 4, 0);
    }
    assert_eq!(model.merge(Some(&r), &scheme).unwrap().blocks[1].weights.down.to_vec::<f32>().unwrap(), down);
}

#[test]
fn a_layer_of_codes_from_elsewhere() {
    let dir = tempfile::tempdir().unwrap();
    let (source, out) = (dir.path().join("source"), dir.path().join("out"));
    let config = tiny::config(4, 2, false);
    tiny::write(&source, &config, DType::F32, 9, true);
    let model = Llama::load(&source, DType::F32, &Device::Cpu).unwrap();
    let scheme = Scheme::new(4, 4, 4);
    let create = || Writer::create(Output::new(&out, Format::Native), &config, &scheme, DType::F32, None, "").unwrap();
    let layer = |l: usize| export::round_to_nearest(&model.blocks[l].weights, &scheme.sites(8).weight).unwrap();
    let writer = create();
    fails(writer.layer(2, &layer(0)), &["expected less than 2, got 2"]);
    let change = |f: &dyn Fn(&mut Quantized)| {
        let mut bad = layer(0);
        if let Stored::Codes(q) = &mut bad[6] {
            f(q);
        }
        writer.layer(0, &bad)
    };
    fails(change(&|q| q.codes[5] = 8), &["model.layers.0.mlp.down_proj", "codes from -8 to 7, got 8"]);
    fails(change(&|q| q.shape = vec![24, 16]), &["down_proj", "[16, 24]", "[24, 16]"]);
    fails(change(&|q| q.group = 8), &["down_proj", "groups of 24"]);
    fails(change(&|q| q.zero = q.scale.clone()), &["no zero points"]);
    fails(change(&|q| q.scale = q.scale.to_dtype(DType::F64).unwrap()), &["expected dtype f32, got f64"]);
    let mut bad = layer(0);
    bad[0] = Stored::Values(model.blocks[0].weights.q.clone());
    fails(writer.layer(0, &bad), &["q_proj", "expected codes of 4 bits, got values"]);
    writer.layer(1, &layer(1)).unwrap();
    assert!(writer.has_layer(1) && !writer.has_layer(0));
    fails(writer.finish(&model.embedding, &model.head), &["layer-00000.safetensors"]);
    // What was written is there, as the network computes with it.
    let writer = create();
    let want = model.merge(None, &scheme).unwrap();
    for (got, want) in writer.read_layer(1).unwrap().iter().zip(want.blocks[1].weights.as_array()) {
        assert!(matches!(got, Stored::Codes(_)));
        assert_eq!(got.values(DType::F32).unwrap().to_vec::<f32>().unwrap(), want.to_vec::<f32>().unwrap());
    }
    assert!(writer.read_layer(0).is_err());
}

// --------------------------------------------------------------------------------------------------- folders and resuming

fn contents(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let entry = |e: std::io::Result<std::fs::DirEntry>| {
        let e = e.unwrap();
        (e.file_name().into_string().unwrap(), std::fs::read(e.path()).unwrap())
    };
    std::fs::read_dir(dir).unwrap().map(entry).collect()
}

#[test]
fn a_killed_run_ends_in_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let (source, whole, out) = (dir.path().join("source"), dir.path().join("whole"), dir.path().join("out"));
    let config = LlamaConfig { layers: 4, ..tiny::config(4, 2, false) };
    tiny::write(&source, &config, DType::BF16, 9, true);
    let model = Llama::load(&source, DType::BF16, &Device::Cpu).unwrap();
    let r = Rotations::random_hadamard(16, 8, 4, 5).unwrap();
    for (format, scheme) in [(Format::Native, Scheme::new(4, 4, 4)), (Format::Hf, Scheme::new(4, 16, 16).online(Online::NONE))] {
        let named = |dir| {
            let provenance = Provenance { command: "quantize".into(), ..Default::default() };
            Output { overwrite: true, source: Some(&source), provenance, ..Output::new(dir, format) }
        };
        write_rtn(&model, Some(&r), &scheme, named(&whole), |_| {}).unwrap();
        for killed_after in [1, 3] {
            let run = || write_rtn(&model, Some(&r), &scheme, named(&out), |n| assert!(n != killed_after, "killed"));
            assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(run)).is_err());
            let partial = dir.path().join(".out.partial");
            assert!(partial.join("layer-00000.safetensors").exists());
            let stamp = || std::fs::metadata(partial.join("layer-00000.safetensors")).unwrap().modified().unwrap();
            let before = stamp();
            let mut first = true;
            let look = |_| {
                if std::mem::take(&mut first) {
                    assert_eq!(stamp(), before, "written again");
                }
            };
            write_rtn(&model, Some(&r), &scheme, named(&out), look).unwrap();
            assert_eq!(contents(&out), contents(&whole));
            assert!(!partial.exists());
            std::fs::remove_dir_all(&out).unwrap();
        }
        // A damaged layer is written again.
        let run = || write_rtn(&model, Some(&r), &scheme, named(&out), |n| assert!(n != 2, "killed"));
        assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(run)).is_err());
        std::fs::write(dir.path().join(".out.partial/layer-00001.safetensors"), b"cut").unwrap();
        write_rtn(&model, Some(&r), &scheme, named(&out), |_| {}).unwrap();
        assert_eq!(contents(&out), contents(&whole));
    }
}

/// GPTQ into either format, stopped after every layer in turn.
#[test]
fn an_interrupted_gptq_run_ends_in_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let (source, whole, out) = (dir.path().join("source"), dir.path().join("whole"), dir.path().join("out"));
    let config = LlamaConfig { layers: 3, ..tiny::config(4, 2, false) };
    let text = Windows::new((0..16 * 8).map(|i| (i * i * 7 + i / 3) % 31).collect::<Vec<u32>>(), 16).unwrap();
    let calibration = Calibration::first(&text, 8).unwrap();
    let r = Rotations::random_hadamard(16, 8, 3, 5).unwrap();
    for dtype in [DType::F32, DType::BF16] {
        tiny::write(&source, &config, dtype, 9, true);
        let (files, model) = (Source::open(&source, &config).unwrap(), Llama::load(&source, dtype, &Device::Cpu).unwrap());
        for format in [Format::Native, Format::Hf] {
            let scheme = match format {
                Format::Native => Scheme { weight_group: Some(8), ..Scheme::new(4, 4, 4) },
                Format::Hf => Scheme::new(3, 16, 16).online(Online::NONE),
            };
            let rotated = match format {
                Format::Native => Rotated::new(&model, Some(&r), &scheme),
                Format::Hf => Rotated::open(&files, Some(&r), &scheme, &Device::Cpu),
            }
            .unwrap();
            let write = |dir: &Path, stop: usize| {
                let output = Output { source: Some(&source), ..Output::new(dir, format) };
                write_quantized(&rotated, &Gptq::default(), Some(&calibration), output, |report| {
                    if report.done == stop { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
                })
            };
            write(&whole, 0).unwrap();
            for stop in [1, 2] {
                assert!(matches!(write(&out, stop), Err(Error::Interrupted { step }) if step == stop));
                assert!(!out.exists());
                write(&out, 0).unwrap();
                assert_eq!(contents(&out), contents(&whole), "{format:?} {dtype}, stopped after {stop}");
                std::fs::remove_dir_all(&out).unwrap();
            }
            // What is written is what GPTQ made of the rotated layers.
            let mut blocks = vec![];
            let go_on = |_: &LayerReport| ControlFlow::Continue(());
            quantize_layers(&rotated, &Gptq::default(), Some(&calibration), &mut (), go_on, |b| blocks.push(b)).unwrap();
            let written = match format {
                Format::Native => load_native(&whole, &Device::Cpu).unwrap().model,
                Format::Hf => Llama::load(&whole, dtype, &Device::Cpu).unwrap().merge(None, &PLAIN).unwrap(),
            };
            let (embedding, head) = (rotated.embedding().unwrap(), rotated.head().unwrap());
            same_weights(&written, &Merged { config: config.clone(), scheme, embedding, head, blocks });
            let rounded = Rotated::new(&model, Some(&r), &scheme).unwrap();
            let nearest = export::round_to_nearest(&rounded.block(0).unwrap().weights, &scheme.sites(8).weight).unwrap();
            let gptq = written.blocks[0].weights.as_array().map(|w| w.to_f64_vec().unwrap());
            assert_ne!(gptq[0], nearest[0].values(dtype).unwrap().to_f64_vec().unwrap(), "GPTQ is not rounding to nearest");
            std::fs::remove_dir_all(&whole).unwrap();
        }
    }
}

#[test]
fn folders_that_are_not_free() {
    let dir = tempfile::tempdir().unwrap();
    let (source, out) = (dir.path().join("source"), dir.path().join("out"));
    let config = tiny::config(4, 2, false);
    tiny::write(&source, &config, DType::F32, 9, true);
    let model = Llama::load(&source, DType::F32, &Device::Cpu).unwrap();
    let scheme = Scheme::new(4, 4, 4);
    let write = |scheme: &Scheme, output| write_rtn(&model, None, scheme, output, |_| {});
    let plain = || Output::new(&out, Format::Native);
    let forced = || Output { overwrite: true, ..plain() };

    std::fs::create_dir(&out).unwrap();
    write(&scheme, plain()).unwrap(); // empty
    fails(write(&scheme, plain()), &["out", "not empty"]);
    std::fs::write(out.join("mine.txt"), "precious").unwrap();
    fails(write(&scheme, plain()), &["not empty"]);
    assert!(out.join("mine.txt").exists());
    write(&scheme, forced()).unwrap();
    assert!(!out.join("mine.txt").exists());
    std::fs::remove_dir_all(&out).unwrap();
    std::fs::write(&out, "a file").unwrap();
    fails(write(&scheme, forced()), &["out"]);
    std::fs::remove_file(&out).unwrap();

    // Two at once; then an unfinished output of another scheme.
    let writer = Writer::create(plain(), &config, &scheme, DType::F32, None, "").unwrap();
    fails(Writer::create(plain(), &config, &scheme, DType::F32, None, ""), &["another process is writing"]);
    writer.layer(0, &export::round_to_nearest(&model.blocks[0].weights, &scheme.sites(8).weight).unwrap()).unwrap();
    drop(writer);
    fails(Writer::create(plain(), &config, &Scheme::new(8, 4, 4), DType::F32, None, ""), &["another run", "scheme differs"]);
    fails(Writer::create(plain(), &config, &scheme, DType::F32, None, "other weights"), &["weights_sha256 differs"]);
    let writer = Writer::create(forced(), &config, &Scheme::new(8, 4, 4), DType::F32, None, "").unwrap();
    assert!(!writer.has_layer(0));
    fails(load_native(&out, &Device::Cpu), &[RECORD]);
}

#[test]
fn damaged_native_folders() {
    let dir = tempfile::tempdir().unwrap();
    let (source, out) = (dir.path().join("source"), dir.path().join("out"));
    let config = tiny::config(4, 2, false);
    tiny::write(&source, &config, DType::F32, 9, true);
    let model = Llama::load(&source, DType::F32, &Device::Cpu).unwrap();
    let r = Rotations::random_hadamard(16, 8, 2, 5).unwrap();
    write_rtn(&model, Some(&r), &Scheme::new(3, 4, 4), Output::new(&out, Format::Native), |_| {}).unwrap();
    let (json, tensors) = (out.join(RECORD), out.join("model.safetensors"));
    let record: Value = serde_json::from_slice(&std::fs::read(&json).unwrap()).unwrap();
    let with = |field: &str, value: Value| {
        let mut changed = record.clone();
        *changed.pointer_mut(field).unwrap() = value;
        std::fs::write(&json, changed.to_string()).unwrap();
        load_native(&out, &Device::Cpu)
    };
    fails(with("/format_version", 2.into()), &["version 1", "version 2"]);
    fails(with("/format", "other".into()), &["spinquant-native"]);
    fails(with("/scheme/weight_bits", 9.into()), &["scheme: weights", "expected 2 to 8"]);
    fails(with("/scheme/weight_bits", 40.into()), &["scheme: weights", "40"]);
    fails(with("/scheme/weight_bits", 8.into()), &["codes", "expected"]);
    fails(with("/scheme/weight_group", 5.into()), &["5 does not divide"]);
    fails(with("/scheme/weight_group", 0.into()), &["0 does not divide"]);
    fails(with("/scheme/activation_clip", 7.into()), &["clip"]);
    fails(with("/scheme", Value::Null), &["scheme"]);
    fails(with("/dtype", "u32".into()), &["expected f64"]);
    fails(with("/config/num_hidden_layers", 3.into()), &["R2"]);
    fails(with("/config/intermediate_size", 28.into()), &["R4.core"]);
    with("/format_version", 1.into()).unwrap();

    let whole = std::fs::read(&tensors).unwrap();
    std::fs::write(&tensors, &whole[..whole.len() - 1]).unwrap();
    fails(load_native(&out, &Device::Cpu), &["model.safetensors", "complete"]);
    // Code bytes come last; 3 bits leave none above 7.
    let mut off = whole.clone();
    *off.last_mut().unwrap() = 0xff;
    std::fs::write(&tensors, &off).unwrap();
    let message = load_native(&out, &Device::Cpu).err().map(|e| e.to_string()).unwrap_or_default();
    assert!(message.contains("expected codes from -4 to 3") || message.contains("core"), "{message}");
    std::fs::remove_file(&tensors).unwrap();
    fails(load_native(&out, &Device::Cpu), &["model.safetensors"]);
}

// ------------------------------------------------------------------------------------------------------------- outliers

mod planting {
    use super::*;
    use spinquant::llama::{LayerWeights, Weights};
    use spinquant::outliers::{self, PlantOptions, plant};

    fn logits(config: &LlamaConfig, w: &Weights) -> Vec<f64> {
        tiny::logits(&Llama::new(config.clone(), w.clone()).unwrap())
    }

    fn each_layer(w: &Weights, f: impl Fn(&LayerWeights) -> Result<LayerWeights>) -> Weights {
        Weights { layers: w.layers.iter().map(|l| f(l).unwrap()).collect(), ..w.clone() }
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(24) })]
        #[test]
        fn leaves_the_function_unchanged(
            shape in prop::sample::select(vec![(2, 2), (4, 2), (4, 1), (6, 3)]),
            tied in any::<bool>(),
            seed in 0u64..1000,
        ) {
            let config = tiny::config(shape.0, shape.1, tied);
            let w = Weights::random(&config, seed).unwrap();
            let want = logits(&config, &w);
            let factors = |n: usize, salt: u64| -> Vec<f64> {
                randn([n], seed + salt).into_vec::<f64>().unwrap().iter().map(|x| (2.0 * x).exp()).collect()
            };
            let (f, pairs) = (factors(24, 1), factors(4 * shape.1, 2));
            let bases = randn([shape.1, 8, 8], seed + 3);
            let basis = outliers::concentrating_basis(&w, 3, seed).unwrap();
            for (name, changed, bound) in [
                ("residual", outliers::residual_basis(&w, &basis).unwrap(), 1e-9),
                ("mlp", each_layer(&w, |l| outliers::mlp_channels(l, &f)), 1e-9),
                ("rope", each_layer(&w, |l| outliers::rope_pairs(l, &config, &pairs)), 1e-9),
                // A Gaussian basis may be near singular: 1e-9 times a condition number of up to about 1e3.
                ("value", each_layer(&w, |l| outliers::value_basis(l, &config, &bases)), 1e-7),
                ("all", plant(&w, &config, &PlantOptions { seed, ..Default::default() }).unwrap(), 1e-9),
            ] {
                let got = distance(&logits(&config, &changed), &want);
                prop_assert!(got < bound, "{name}: {got:e}");
            }
        }
    }

    #[test]
    fn outliers_appear() {
        // A model with strong directions to concentrate.
        let config = LlamaConfig { hidden_size: 32, ..tiny::config(4, 2, false) };
        let mut w = Weights::random(&config, 1).unwrap();
        let e: Vec<f64> = w.embedding.to_f64_vec().unwrap();
        let strong = randn([32], 5).into_vec::<f64>().unwrap();
        w.embedding =
            Tensor::from_vec(e.iter().enumerate().map(|(i, x)| x + strong[i % 32]).collect::<Vec<f64>>(), [31, 32]).unwrap();
        let kurtosis = |t: &Tensor| {
            let x = t.to_f64_vec().unwrap();
            let moment = |p: i32| x.iter().map(|v| v.powi(p)).sum::<f64>() / x.len() as f64;
            moment(4) / moment(2).powi(2)
        };
        let options = PlantOptions { residual_channels: 1, ..Default::default() };
        let planted = plant(&w, &config, &options).unwrap();
        assert!(kurtosis(&planted.embedding) > 3.0 * kurtosis(&w.embedding));
        let max_row = |t: &Tensor| {
            let x = t.to_f64_vec().unwrap();
            let norms = x.chunks(t.cols()).map(|r| r.iter().map(|v| v * v).sum::<f64>().sqrt());
            norms.fold(0.0, f64::max)
        };
        let (old, new) = (&w.layers[0], &planted.layers[0]);
        for (name, a, b) in [("up", &old.up, &new.up), ("k", &old.k, &new.k), ("v", &old.v, &new.v)] {
            assert!(max_row(b) > 2.0 * max_row(a), "{name}: {} {}", max_row(a), max_row(b));
        }
        // Reproducible, other seeds differ; the element type stays.
        let again = plant(&w, &config, &options).unwrap();
        assert_eq!(again.head.to_f64_vec().unwrap(), planted.head.to_f64_vec().unwrap());
        let other = plant(&w, &config, &PlantOptions { seed: 1, ..options }).unwrap();
        assert_ne!(other.head.to_f64_vec().unwrap(), planted.head.to_f64_vec().unwrap());
        // Nothing asked for, nothing done.
        let none = PlantOptions { residual_channels: 0, mlp_channels: 0, rope_pairs: 0, value_channels: 0, ..options };
        let same = plant(&w, &config, &none).unwrap();
        let all = |w: &Weights| w.layers[1].as_array().map(|t| t.to_f64_vec().unwrap()).concat();
        assert_eq!(all(&same), all(&w));
    }

    #[test]
    fn misuse() {
        let config = tiny::config(4, 2, false);
        let w = Weights::random(&config, 1).unwrap();
        let with = |o: PlantOptions| plant(&w, &config, &o);
        let d = PlantOptions::default();
        fails(with(PlantOptions { residual_channels: 17, ..d }), &["at most 16 channels, got 17"]);
        fails(with(PlantOptions { rope_pairs: 5, ..d }), &["at most 4 channels, got 5"]);
        fails(with(PlantOptions { mlp_factor: 0.5, ..d }), &["at least 1, got 0.5"]);
        let layer = &w.layers[0];
        fails(outliers::mlp_channels(layer, &[1.0]), &["expected 24 factors, got 1"]);
        fails(outliers::mlp_channels(layer, &[0.0; 24]), &["other than 0"]);
        fails(outliers::rope_pairs(layer, &config, &[f64::NAN; 8]), &["finite"]);
        fails(outliers::value_basis(layer, &config, &Tensor::zeros([2, 8, 8], DType::F64, &Device::Cpu).unwrap()), &["singular"]);
        fails(outliers::residual_basis(&w, &randn([16, 16], 1)), &["expected an orthogonal basis"]);
        fails(outliers::residual_basis(&w, &randn([8, 8], 1)), &["[16, 16]"]);
    }
}

#[test]
fn headers_with_overflowing_sizes() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("R.safetensors");
    let huge = 1u64 << 60;
    let entry = |i: u64| serde_json::json!({"dtype": "U8", "shape": [huge], "data_offsets": [i * huge, (i + 1) * huge]});
    let mut header: serde_json::Map<String, Value> = (0..15).map(|i| (format!("t{i}"), entry(i))).collect();
    let last = serde_json::json!({"dtype": "U8", "shape": [huge - 1], "data_offsets": [15 * huge, u64::MAX]});
    header.insert("last".into(), last);
    let header = Value::from(header).to_string();
    std::fs::write(&path, [&(header.len() as u64).to_le_bytes()[..], header.as_bytes()].concat()).unwrap();
    fails(io::load_tensors(&path), &["not a whole safetensors file"]);
    fails(Rotations::load(&path), &["not a whole safetensors file"]);
}

/// A model too large to ship: `SPINQUANT_MODEL`, or beside the checkout; skipped (and said so) where it is not.
#[test]
fn a_real_model_keeps_its_function() {
    let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/models/wiki-llama-15m");
    let source = std::env::var_os("SPINQUANT_MODEL").map_or(beside, PathBuf::from);
    let Ok(config) = LlamaConfig::from_file(source.join("config.json")) else {
        println!("skipped: no model at {}", source.display());
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let (hf, native) = (dir.path().join("hf"), dir.path().join("native"));
    let r = Rotations::random_hadamard(config.hidden_size, config.head_dim, config.layers, 1).unwrap();
    let tokens: Vec<u32> = (0..64).map(|i| (i * i * 31 + 7 * i) % config.vocab_size as u32).collect();
    let logits = |m: &Merged| m.logits(&tokens, 64).unwrap().to_f64_vec().unwrap();
    let load = |dir: &Path| Llama::load(dir, DType::F32, &Device::Cpu).unwrap();
    let plain = |dir: &Path| logits(&load(dir).merge(None, &Scheme::FULL_PRECISION).unwrap());

    write_hf(&source, Some(&r), &PLAIN, Output::new(&hf, Format::Hf), |_| {}).unwrap();
    let (want, got) = (plain(&source), plain(&hf));
    let size = want.iter().fold(0.0, |m, x| f64::max(m, x.abs()));
    println!("max|logit| {size:.2}, max|difference| {:.1e}", distance(&want, &got));
    let half = Llama::load(&hf, DType::F32, &Device::Cpu).unwrap().config.dtype.is_some_and(DType::is_half);
    assert!(distance(&want, &got) < if half { 0.05 } else { 1e-4 } * size);
    assert!(hf.join("tokenizer.json").exists());

    let (model, scheme) = (load(&source), Scheme::new(4, 4, 4));
    write_rtn(&model, Some(&r), &scheme, Output::new(&native, Format::Native), |_| {}).unwrap();
    let loaded = load_native(&native, &Device::Cpu).unwrap().model;
    let want = model.merge(Some(&r), &scheme).unwrap();
    same_weights(&loaded, &want);
    assert_eq!(logits(&loaded), logits(&want));
}
