//! Hugging Face folders.

use super::*;

#[test]
fn hugging_face_output_is_the_same_function() {
    let dir = tempfile::tempdir().unwrap();
    let (source, out) = (dir.path().join("source"), dir.path().join("out"));
    let biased = tiny::with_biases(tiny::config(4, 2, false));
    for config in [tiny::config(2, 2, false), tiny::config(4, 2, false), tiny::config(4, 1, true), tiny::llama3(4, 2), biased] {
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
            let rotated = spinquant::linalg::matmul::product(&e, false, &r.r1, false, false, DType::F64).unwrap();
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
