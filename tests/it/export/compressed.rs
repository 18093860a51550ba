//! Folders of compressed-tensors: what is packed, what comes back, what that library packed itself, what is refused.

use serde_json::json;
use spinquant::export::{Target, notes};
use spinquant::grid::QuantSpec;
use spinquant::ops::fake_quant::quantize;
use spinquant::quant::{Moments, QuantizedLinear, Site};

use super::*;

/// Another quantiser, with the grids that a file in this type needs.
pub struct Stored(pub DType, pub Gptq);

impl WeightQuantizer for Stored {
    fn name(&self) -> &'static str {
        "stored"
    }
    fn needs_hessian(&self) -> bool {
        true
    }
    fn wants_drift(&self, site: Site) -> bool {
        self.1.wants_drift(site)
    }
    fn reads_quantized(&self) -> bool {
        self.1.reads_quantized()
    }
    fn quantize(&self, w: &[&Tensor], spec: &QuantSpec, m: Option<&Moments>) -> Result<Vec<QuantizedLinear>> {
        self.1.quantize(w, &spec.stored(self.0), m)
    }
}

fn scheme(bits: u32, symmetric: bool, group: Option<usize>) -> Scheme {
    Scheme { symmetric_weights: symmetric, weight_group: group, ..Scheme::new(bits, 16, 16).online(Online::NONE) }
}

/// Every width, kind and type: codes by hand from the rotated weight, words by hand from the codes, the network from the folder.
#[test]
fn packed_weights_come_back() {
    let dir = tempfile::tempdir().unwrap();
    let (source, out) = (dir.path().join("source"), dir.path().join("out"));
    let config = tiny::with_biases(tiny::config(4, 2, false));
    let r = Rotations::random_hadamard(16, 8, 2, 5).unwrap();
    for dtype in [DType::F32, DType::BF16, DType::F16] {
        tiny::write(&source, &config, dtype, 8, true);
        let files = Source::open(&source, &config).unwrap();
        for (bits, symmetric, group) in
            [(4, true, None), (4, true, Some(8)), (4, false, None), (4, false, Some(4)), (8, true, Some(8)), (3, false, Some(8))]
        {
            let scheme = scheme(bits, symmetric, group);
            let rotated = Rotated::open(&files, Some(&r), &scheme, &Device::Cpu).unwrap();
            let output = Output { overwrite: true, source: Some(&source), ..Output::new(&out, Format::CompressedTensors) };
            write_quantized(&rotated, &spinquant::quant::Rtn, None, output, |_| ControlFlow::Continue(())).unwrap();

            let read = Compressed::read(&out).unwrap();
            assert_eq!(read.scheme, scheme);
            let network = read.load(dtype, &Device::Cpu).unwrap();
            let spec = scheme.sites(8).weight.stored(dtype);
            let mut blocks = vec![];
            for l in 0..2 {
                let block = rotated.block(l).unwrap();
                let weights = block.weights.each(|linear, affine| {
                    let q = quantize(&affine.weight, &spec)?;
                    let own = q.scale.to_dtype(dtype)?.to_f64_vec()?;
                    assert_eq!(own, q.scale.to_f64_vec()?, "scales are numbers of the file's type");
                    if l == 0 && linear == Linear::V {
                        let packed = words(&out, &format!("{}.weight_packed", linear.path(l)));
                        let row = packed.len() / affine.weight.rows();
                        for (i, &code) in q.codes.iter().enumerate() {
                            let (r, c) = (i / 16, i % 16);
                            let bit =
                                |b: usize| packed[r * row + (c * bits as usize + b) / 32] >> ((c * bits as usize + b) % 32) & 1;
                            let stored = (0..bits as usize).map(|b| bit(b) << b).sum::<u32>() as i32;
                            assert_eq!(stored + spec.min_code(), i32::from(code), "{bits} bits, row {r}, column {c}");
                        }
                    }
                    Ok(affine.with_weight(q.dequantize()?.to_dtype(dtype)?))
                });
                blocks.push(block.with_weights(weights.unwrap()));
            }
            let (embedding, head) = (rotated.embedding().unwrap(), rotated.head().unwrap());
            same_weights(&network, &Merged { config: config.clone(), scheme, embedding, head, blocks });
            // In a wider type: the same numbers.
            let wide = read.load(DType::F64, &Device::Cpu).unwrap();
            let numbers = |m: &Merged| m.blocks[1].weights.tensors().map(|t| t.to_f64_vec().unwrap()).collect::<Vec<_>>();
            assert_eq!(numbers(&wide), numbers(&network));
        }
    }
}

/// A tensor of 32-bit words.
fn words(folder: &Path, name: &str) -> Vec<u32> {
    let bytes = std::fs::read(folder.join("model.safetensors")).unwrap();
    let tensor = safetensors::SafeTensors::deserialize(&bytes).unwrap().tensor(name).unwrap().data().to_vec();
    tensor.as_chunks().0.iter().map(|b| u32::from_le_bytes(*b)).collect()
}

/// Rows whose scale the type cannot hold, and groups without a sign change, whose zero point would lie outside the codes.
#[test]
fn stored_grids_can_be_stored() {
    for symmetric in [true, false] {
        let spec = QuantSpec::weight(8, symmetric).clipped(Clip::Ratio(0.2)).stored(DType::F16);
        let q = quantize(&Tensor::from_vec(vec![1e-9f32; 16], [2, 8]).unwrap(), &spec).unwrap();
        assert!(q.dequantize().unwrap().to_f64_vec().unwrap().iter().all(|x| x.is_finite()));
        assert!(q.scale.to_f64_vec().unwrap().iter().all(|s| *s > 0.0));
    }
    let positive: Vec<f32> = (0..16).map(|i| 1.0 + 0.01 * i as f32).collect();
    let w = Tensor::from_vec(positive, [2, 8]).unwrap();
    let spec = QuantSpec::weight(4, false).grouped(4);
    let zero = |spec: &QuantSpec| quantize(&w, spec).unwrap().zero.to_f64_vec().unwrap();
    assert!(zero(&spec).iter().any(|z| *z < 0.0), "as published");
    assert!(zero(&spec.stored(DType::BF16)).iter().all(|z| (0.0..=15.0).contains(z)));
    // The reference and the vector path agree.
    let wide = quantize(&w.to_dtype(DType::F64).unwrap(), &spec.stored(DType::BF16)).unwrap();
    let narrow = quantize(&w, &spec.stored(DType::BF16)).unwrap();
    assert_eq!((wide.codes, wide.scale.to_f64_vec().unwrap()), (narrow.codes, narrow.scale.to_f64_vec().unwrap()));
}

/// `tests/interop/make_compressed.py` wrote these with compressed-tensors, and what it unpacks from them.
#[test]
fn what_compressed_tensors_packs_is_read_to_the_bit() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/compressed");
    for (name, bits, group) in
        [("channel", 4, None), ("group-asymmetric", 4, Some(8)), ("channel-3-bits", 3, None), ("group-8-bits", 8, Some(8))]
    {
        let dir = fixtures.join(name);
        assert!(Compressed::is_in(&dir));
        let read = Compressed::read(&dir).unwrap();
        assert_eq!(read.scheme, scheme(bits, name == "channel", group), "{name}");
        let own = read.config.dtype.unwrap();
        let network = read.load(own, &Device::Cpu).unwrap();
        let (want, _) = io::load_tensors(&dir.join("weights.safetensors")).unwrap();
        for (linear, affine) in network.blocks[0].weights.iter() {
            let want = &want[&format!("{}.weight", linear.path(0))];
            assert_eq!(affine.weight.dtype(), want.dtype());
            assert_eq!(affine.weight.to_f64_vec().unwrap(), want.to_f64_vec().unwrap(), "{name}: {linear:?}");
        }
        // Other files' gains stay beside the weights, and all of it runs.
        assert!(network.blocks[0].gains().is_some());
        let logits = network.logits(&[1, 2, 3, 4], 4).unwrap().to_f64_vec().unwrap();
        assert!(logits.iter().all(|x| x.is_finite()));
    }
}

#[test]
fn what_a_folder_says_and_brings_along() {
    let dir = tempfile::tempdir().unwrap();
    let (source, out) = (dir.path().join("source"), dir.path().join("out"));
    let config = tiny::config(4, 2, true);
    tiny::write(&source, &config, DType::BF16, 8, true);
    for name in ["tokenizer.json", "generation_config.json", "chat_template.jinja"] {
        std::fs::write(source.join(name), name).unwrap();
    }
    let files = Source::open(&source, &config).unwrap();
    let r = Rotations::random_hadamard(16, 8, 2, 5).unwrap();
    let four = Scheme { symmetric_activations: true, ..Scheme { activation_bits: 4, ..scheme(4, true, Some(8)) } };
    let written = |scheme: &Scheme, shard_bytes| {
        let output =
            Output { overwrite: true, shard_bytes, source: Some(&source), ..Output::new(&out, Format::CompressedTensors) };
        let rotated = Rotated::open(&files, Some(&r), scheme, &Device::Cpu).unwrap();
        write_quantized(&rotated, &spinquant::quant::Rtn, None, output, |_| ControlFlow::Continue(()))
    };
    written(&four, 600).unwrap();
    assert!(out.join("model.safetensors.index.json").exists() && !out.join("model.safetensors").exists());
    for name in ["tokenizer.json", "generation_config.json", "chat_template.jinja"] {
        assert_eq!(std::fs::read_to_string(out.join(name)).unwrap(), name);
    }
    let readme = std::fs::read_to_string(out.join("README.md")).unwrap();
    assert!(readme.contains("4 bits, symmetric") && readme.contains("--linear-backend humming"), "{readme}");
    let said: Value = serde_json::from_slice(&std::fs::read(out.join("config.json")).unwrap()).unwrap();
    assert_eq!(said["tie_word_embeddings"], false);
    let groups = &said["quantization_config"]["config_groups"];
    assert_eq!(groups["group_0"]["input_activations"]["strategy"], "token");
    assert_eq!(
        (&groups["group_1"]["targets"][0], &groups["group_1"]["input_activations"]["group_size"]),
        (&json!("re:.*o_proj$"), &json!(8))
    );
    let read = Compressed::read(&out).unwrap();
    assert_eq!(read.scheme, Format::CompressedTensors.holds(&four));
    let input = read.scheme.sites(8).mlp_input;
    let q = quantize(&Tensor::from_vec(vec![-7.5f32, 7.5, 7.0, 1.0], [1, 4]).unwrap(), &input).unwrap();
    assert_eq!((q.codes, q.scale.to_f64_vec().unwrap()), (vec![-8, 7, 7, 1], vec![1.0]), "max|x| / 7.5, not max|x| / 7");
    let asymmetric = Scheme { symmetric_activations: false, ..read.scheme }.sites(8).attention_output;
    let q = quantize(&Tensor::from_vec((0..8).map(|i| 8.0 + i as f32).collect(), [1, 8]).unwrap(), &asymmetric).unwrap();
    assert_eq!((q.scale.to_f64_vec().unwrap(), q.zero.to_f64_vec().unwrap()), (vec![1.0], vec![0.0]), "0 is in the range");
    let sharded = read.load(DType::BF16, &Device::Cpu).unwrap();
    written(&four, u64::MAX).unwrap();
    same_weights(&Compressed::read(&out).unwrap().load(DType::BF16, &Device::Cpu).unwrap(), &sharded);

    let online = |text: &str| four.online(text.parse().unwrap());
    fails(written(&four.online(Online::BOTH), 1 << 20), &["format compressed-tensors", "expected no R3", "r3,r4"]);
    fails(written(&online("r4"), 1 << 20), &["blocks of a power of two", "--online r4=block:8"]);
    fails(written(&Scheme { weight_bits: 16, ..four }, 1 << 20), &["weights of 2 to 8 bits"]);
    let vllm = Some(Target::Vllm);
    assert!(notes(&config, &four, vllm).unwrap()[0].contains("groups of 8"));
    fails(notes(&config, &Scheme { symmetric_activations: false, ..four }, vllm), &["symmetric activations only"]);
    assert!(notes(&config, &Scheme { symmetric_activations: false, ..four }, Some(Target::Transformers)).unwrap().is_empty());
    let eight = Scheme { activation_bits: 8, weight_group: Some(128), ..four };
    assert!(notes(&config, &eight, vllm).unwrap()[0].contains("16 bits where weights have groups"));
}

/// R4 in blocks is said in `transform_config`, and runs when the folder is read.
#[test]
fn an_online_rotation_is_said() {
    let dir = tempfile::tempdir().unwrap();
    let (source, out) = (dir.path().join("source"), dir.path().join("out"));
    let config = tiny::config(4, 2, false);
    tiny::write(&source, &config, DType::F32, 8, true);
    let files = Source::open(&source, &config).unwrap();
    let r = Rotations::random_hadamard(16, 8, 2, 5).unwrap();
    // Of weights that are nearly exact, the logits are those of the model only where both halves of R4 are there.
    let scheme = Scheme { weight_group: Some(4), ..scheme(8, true, None) }.online("r4=block:8".parse().unwrap());
    let rotated = Rotated::open(&files, Some(&r), &scheme, &Device::Cpu).unwrap();
    let output = Output::new(&out, Format::CompressedTensors);
    write_quantized(&rotated, &spinquant::quant::Rtn, None, output, |_| ControlFlow::Continue(())).unwrap();
    let read = Compressed::read(&out).unwrap();
    assert_eq!(read.scheme, scheme);
    let tokens = tiny::tokens(&config);
    let logits = |network: &Merged| network.logits(&tokens, 9).unwrap().to_f64_vec().unwrap();
    let want = tiny::logits(&Llama::load(&source, DType::F32, &Device::Cpu).unwrap());
    let network = read.load(DType::F32, &Device::Cpu).unwrap();
    assert!(distance(&logits(&network), &want) < 0.05, "{}", distance(&logits(&network), &want));
    let without = Merged { scheme: scheme.online(Online::NONE), ..network };
    assert!(distance(&logits(&without), &want) > 0.3, "{}", distance(&logits(&without), &want));

    let path = out.join("config.json");
    let said: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let with = |field: &str, value: Value| {
        let mut changed = said.clone();
        *changed["quantization_config"]["transform_config"]["config_groups"]["R4"].pointer_mut(field).unwrap() = value;
        std::fs::write(&path, changed.to_string()).unwrap();
        Compressed::read(&out).map(|read| read.scheme.online.to_string())
    };
    assert_eq!(with("/head_dim", json!(4)).unwrap(), "r4=block:4");
    fails(with("/head_dim", json!(3)), &["head_dim: expected a power of two that divides 24, got 3"]);
    fails(with("/type", json!("random-matrix")), &["transform_config", "R4: type", "random-matrix"]);
    fails(with("/apply/0/location", json!("output")), &["location", "output"]);
    fails(with("/apply/0/targets", json!(["re:.*up_proj"])), &["every down_proj", "up_proj"]);
    for (online, target, parts) in [
        (scheme.online, Target::Transformers, &["transformers runs no R4"][..]),
        (Online::NONE, Target::Transformers, &["by way of a dense model"]),
    ] {
        let scheme = Scheme { activation_bits: 4, symmetric_weights: false, ..scheme.online(online) };
        fails(notes(&config, &scheme, Some(target)), parts);
    }
    fails(notes(&tiny::with_biases(config.clone()), &scheme, Some(Target::Vllm)), &["has a bias"]);
}

#[test]
fn compressed_folders_that_are_not_read() {
    let dir = tempfile::tempdir().unwrap();
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/compressed/group-asymmetric");
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(fixture.join(name), dir.path().join(name)).unwrap();
    }
    let path = dir.path().join("config.json");
    let config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let with = |field: &str, value: Value| {
        let mut changed = config.clone();
        *changed["quantization_config"].pointer_mut(field).unwrap_or_else(|| panic!("{field}")) = value;
        std::fs::write(&path, changed.to_string()).unwrap();
        Compressed::read(dir.path()).and_then(|read| read.load(DType::F32, &Device::Cpu))
    };
    let group = "/config_groups/group_0";
    with("/ignore", json!(["lm_head"])).unwrap();
    fails(with("/ignore", json!(["re:.*down_proj"])), &["config.json", "ignore", "layers.0.mlp.down_proj"]);
    fails(with("/kv_cache_scheme", json!({"num_bits": 8})), &["kv_cache_scheme: expected none", "8"]);
    fails(with("/quantization_status", json!("frozen")), &["quantization_status", "compressed", "frozen"]);
    fails(with(&format!("{group}/format"), json!("int-quantized")), &["expected pack-quantized", "int-quantized"]);
    fails(with(&format!("{group}/targets"), json!(["re:.*mlp.*"])), &["expected a group for model.layers.0.self_attn.q_proj"]);
    fails(with(&format!("{group}/targets"), json!(["re:("])), &["re:("]);
    fails(with(&format!("{group}/weights/type"), json!("float")), &["group_0: weights: type", "float"]);
    fails(with(&format!("{group}/weights/num_bits"), json!(16)), &["num_bits: expected 2 to 8, got 16"]);
    fails(with(&format!("{group}/weights/strategy"), json!("block")), &["strategy channel or group"]);
    fails(with(&format!("{group}/weights/group_size"), json!(5)), &["5 does not divide"]);
    fails(with(&format!("{group}/weights/num_bits"), json!(8)), &["weight_packed: expected I32 [16, 4], got I32 [16, 2]"]);
    let input = json!({"num_bits": 8, "type": "int", "symmetric": true, "strategy": "token", "dynamic": true});
    fails(with(&format!("{group}/input_activations"), input), &["input_activations: strategy: expected \"group\"", "token"]);
    // A shape that contradicts the network.
    with("/ignore", json!(["lm_head"])).unwrap();
    let file = dir.path().join("model.safetensors");
    let mut bytes = std::fs::read(&file).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let shape = tensors.tensor("model.layers.0.mlp.up_proj.weight_shape").unwrap().data();
    let at = shape.as_ptr() as usize - bytes.as_ptr() as usize;
    bytes[at] ^= 1;
    std::fs::write(&file, bytes).unwrap();
    fails(with("/ignore", json!([])), &["mlp.up_proj.weight_shape: expected [24, 16], got [25, 16]"]);
    // Not this format at all.
    assert!(!Compressed::is_in(dir.path().join("nowhere")));
}
