//! Native folders.

use super::*;

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
        Scheme::new(16, 4, 4).online(Online { r3: false, r4: R4::Whole }),
    ];
    for config in [tiny::config(2, 2, false), tiny::config(4, 2, true), tiny::with_biases(tiny::llama3(4, 1))] {
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

/// R4 of 100 values had five blocks of 20 before an order of 100 was known: what was written then is read as it was.
#[test]
fn a_record_keeps_its_hadamard() {
    let config = LlamaConfig { intermediate_size: 100, ..tiny::config(4, 2, false) };
    let (_dir, out, model) = beside_a_model(&config);
    let r = Rotations::random_hadamard(16, 8, 2, 5).unwrap();
    let scheme = Scheme::new(4, 4, 4).online(Online { r3: true, r4: R4::Blocks(20) });
    write_rtn(&model, Some(&r), &scheme, Output::new(&out, Format::Native), |_| {}).unwrap();
    let record: Value = serde_json::from_slice(&std::fs::read(out.join(RECORD)).unwrap()).unwrap();
    let write = |change: &dyn Fn(&mut Value)| {
        let mut record = record.clone();
        change(&mut record);
        std::fs::write(out.join(RECORD), record.to_string()).unwrap();
        load_native(&out, &Device::Cpu)
    };
    let old = write(&|record| record["scheme"]["online"]["r4"] = true.into()).unwrap().model;
    let want = model.merge(Some(&r), &scheme).unwrap();
    assert_eq!(old.scheme, scheme);
    let logits = |m: &Merged| m.logits(&tiny::tokens(&config), 9).unwrap().to_f64_vec().unwrap();
    assert_eq!(logits(&old), logits(&want));
    fails(write(&|record| record["hadamard"]["r4"]["blocks"] = 4.into()), &["hadamard.r4.blocks", "[5]", "got 4"]);
    fails(write(&|record| record["scheme"]["online"]["r4"] = "block:16".into()), &["scheme", "divisor of 100"]);
}

/// Reads codes with nothing but the documented layout.
#[test]
fn native_layout_is_as_documented() {
    let config = LlamaConfig { intermediate_size: 13, ..tiny::config(4, 2, false) }; // an odd number of columns in down
    let (_dir, out, model) = beside_a_model(&config);
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
    assert_eq!(model.merge(Some(&r), &scheme).unwrap().blocks[1].weights[Linear::Down].weight.to_vec::<f32>().unwrap(), down);
}

#[test]
fn a_layer_of_codes_from_elsewhere() {
    let config = tiny::config(4, 2, false);
    let (_dir, out, model) = beside_a_model(&config);
    let scheme = Scheme::new(4, 4, 4);
    let create = || Writer::create(Output::new(&out, Format::Native), &config, &scheme, DType::F32, None, "").unwrap();
    let layer = |l: usize| export::round_to_nearest(&model.blocks[l].weights, &scheme.sites(8).weight).unwrap();
    let writer = create();
    fails(writer.layer(2, &layer(0)), &["expected less than 2, got 2"]);
    let change = |f: &dyn Fn(&mut Quantized)| {
        let mut bad = layer(0);
        if let Stored::Codes(q) = &mut bad[Linear::Down].weight {
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
    bad[Linear::Q].weight = Stored::Values(model.blocks[0].weights[Linear::Q].weight.clone());
    fails(writer.layer(0, &bad), &["q_proj", "expected codes of 4 bits, got values"]);
    let mut bad = layer(0);
    bad[Linear::O].bias = Some(randn([16], 0));
    fails(writer.layer(0, &bad), &["model.layers.0.self_attn.o_proj", "expected no bias", "got one"]);
    writer.layer(1, &layer(1)).unwrap();
    assert!(writer.has_layer(1) && !writer.has_layer(0));
    fails(writer.finish(&model.embedding, &model.head), &["layer-00000.safetensors"]);
    // What was written is there, as the network computes with it.
    let writer = create();
    let want = model.merge(None, &scheme).unwrap();
    for ((_, got), (_, want)) in writer.read_layer(1).unwrap().iter().zip(want.blocks[1].weights.iter()) {
        assert!(matches!(got.weight, Stored::Codes(_)));
        assert_eq!(got.weight.values(DType::F32).unwrap().to_vec::<f32>().unwrap(), want.weight.to_vec::<f32>().unwrap());
    }
    assert!(writer.read_layer(0).is_err());
}
