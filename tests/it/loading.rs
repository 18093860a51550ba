//! Loading models: tiny ones written here, each kind of bad input, and a real one where it is at hand.

use std::collections::HashMap;
use std::path::Path;

use half::{bf16, f16};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};
use spinquant::data::Tokenizer;
use spinquant::llama::{Checkpoint, Linear, LlamaConfig, Weights};
use spinquant::{DType, Result, Tensor};
use tempfile::TempDir;

/// Tensors of a tiny model in `f64`.
type Model = HashMap<String, (Vec<usize>, Vec<f64>)>;

const CONFIG: &str = r#"{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 6, "intermediate_size": 10,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 2, "vocab_size": 11,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "torch_dtype": "float32"}"#;

fn config() -> LlamaConfig {
    LlamaConfig::from_json(CONFIG.as_bytes(), Path::new("config.json")).unwrap()
}

/// Values that every element type holds exactly.
fn values(n: usize, salt: usize) -> Vec<f64> {
    (0..n).map(|i| ((i * 37 + salt * 11) % 61) as f64 / 16.0 - 1.75).collect()
}

fn model() -> Model {
    let mut names: Vec<(String, Vec<usize>)> = vec![
        ("model.embed_tokens.weight".into(), vec![11, 6]),
        ("lm_head.weight".into(), vec![11, 6]),
        ("model.norm.weight".into(), vec![6]),
        // Not needed, to be ignored.
        ("model.layers.0.self_attn.rotary_emb.inv_freq".into(), vec![1]),
    ];
    for l in 0..2 {
        for (part, shape) in [
            ("input_layernorm", vec![6]),
            ("post_attention_layernorm", vec![6]),
            ("self_attn.q_proj", vec![8, 6]),
            ("self_attn.k_proj", vec![4, 6]),
            ("self_attn.v_proj", vec![4, 6]),
            ("self_attn.o_proj", vec![6, 8]),
            ("mlp.gate_proj", vec![10, 6]),
            ("mlp.up_proj", vec![10, 6]),
            ("mlp.down_proj", vec![6, 10]),
        ] {
            names.push((format!("model.layers.{l}.{part}.weight"), shape));
        }
    }
    let tensor = |(i, (name, shape)): (usize, (String, Vec<usize>))| {
        let n = shape.iter().product();
        (name, (shape, values(n, i)))
    };
    names.into_iter().enumerate().map(tensor).collect()
}

/// Writes one safetensors file of a model's tensors in `dtype`.
fn write(path: &Path, model: &Model, dtype: Dtype) {
    let bytes: Vec<(&str, &[usize], Vec<u8>)> = model
        .iter()
        .map(|(name, (shape, values))| {
            let bytes = |x: &f64| match dtype {
                Dtype::F64 => x.to_le_bytes().to_vec(),
                Dtype::F32 => (*x as f32).to_le_bytes().to_vec(),
                Dtype::F16 => f16::from_f64(*x).to_le_bytes().to_vec(),
                Dtype::BF16 => bf16::from_f64(*x).to_le_bytes().to_vec(),
                Dtype::I32 => (*x as i32).to_le_bytes().to_vec(),
                Dtype::I64 => (*x as i64).to_le_bytes().to_vec(),
                _ => vec![*x as u8],
            };
            (&name[..], &shape[..], values.iter().flat_map(bytes).collect())
        })
        .collect();
    let views = bytes.iter().map(|(name, shape, bytes)| (name, TensorView::new(dtype, shape.to_vec(), bytes).unwrap()));
    safetensors::serialize_to_file(views, None, path).unwrap();
}

fn single(model: &Model, dtype: Dtype) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    write(&dir.path().join("model.safetensors"), model, dtype);
    dir
}

/// Two shards and their index.
fn sharded(model: &Model, dtype: Dtype) -> (TempDir, Value) {
    let dir = tempfile::tempdir().unwrap();
    let mut shards = [Model::new(), Model::new()];
    let mut map = serde_json::Map::new();
    for (name, tensor) in model {
        let i = usize::from(name.contains("layers.1") || name.contains("head"));
        shards[i].insert(name.clone(), tensor.clone());
        map.insert(name.clone(), format!("model-0000{}-of-00002.safetensors", i + 1).into());
    }
    for (i, shard) in shards.iter().enumerate() {
        write(&dir.path().join(format!("model-0000{}-of-00002.safetensors", i + 1)), shard, dtype);
    }
    let index = json!({"metadata": {}, "weight_map": map});
    write_index(&dir, &index);
    (dir, index)
}

fn write_index(dir: &TempDir, index: &Value) {
    std::fs::write(dir.path().join("model.safetensors.index.json"), index.to_string()).unwrap();
}

fn all(w: &Weights) -> Vec<f64> {
    let layers = w.layers.iter().flat_map(|l| l.tensors());
    [&w.embedding, &w.head].into_iter().chain(layers).flat_map(|t| t.to_f64_vec().unwrap()).collect()
}

/// The message of a failure, which must contain every part.
fn fails<T: std::fmt::Debug>(result: Result<T>, parts: &[&str]) {
    let message = result.unwrap_err().to_string();
    assert!(parts.iter().all(|p| message.contains(p)), "{message:?} lacks one of {parts:?}");
}

#[test]
fn gains_are_folded_into_their_readers() {
    let m = model();
    let w = Weights::load(single(&m, Dtype::F64).path(), &config(), DType::F64).unwrap();
    let folded = |name: &str, gain: Option<&str>| {
        let (shape, w) = &m[&format!("{name}.weight")];
        let scaled = |(i, x): (usize, &f64)| gain.map_or(*x, |g| x * m[&format!("{g}.weight")].1[i % shape[1]]);
        (shape.clone(), w.iter().enumerate().map(scaled).collect::<Vec<_>>())
    };
    let same = |t: &Tensor, name: &str, gain: Option<&str>| {
        assert_eq!((t.shape().to_vec(), t.to_vec::<f64>().unwrap()), folded(name, gain), "{name}");
    };
    same(&w.embedding, "model.embed_tokens", None);
    same(&w.head, "lm_head", Some("model.norm"));
    for (i, l) in w.layers.iter().enumerate() {
        let name = |part: &str| format!("model.layers.{i}.{part}");
        let (first, second) = (name("input_layernorm"), name("post_attention_layernorm"));
        same(&l[Linear::Q].weight, &name("self_attn.q_proj"), Some(&first));
        same(&l[Linear::K].weight, &name("self_attn.k_proj"), Some(&first));
        same(&l[Linear::V].weight, &name("self_attn.v_proj"), Some(&first));
        same(&l[Linear::O].weight, &name("self_attn.o_proj"), None);
        same(&l[Linear::Gate].weight, &name("mlp.gate_proj"), Some(&second));
        same(&l[Linear::Up].weight, &name("mlp.up_proj"), Some(&second));
        same(&l[Linear::Down].weight, &name("mlp.down_proj"), None);
    }
}

#[test]
fn files_of_every_kind_agree() {
    let (m, c) = (model(), config());
    let want = all(&Weights::load(single(&m, Dtype::F64).path(), &c, DType::F64).unwrap());
    for dtype in [Dtype::F64, Dtype::F32, Dtype::F16, Dtype::BF16] {
        assert_eq!(all(&Weights::load(single(&m, dtype).path(), &c, DType::F64).unwrap()), want, "{dtype}");
        assert_eq!(all(&Weights::load(sharded(&m, dtype).0.path(), &c, DType::F64).unwrap()), want, "{dtype} in shards");
    }
    // Rounded once: the same as rounding the double product.
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        let w = Weights::load(single(&m, Dtype::F32).path(), &c, dtype).unwrap();
        assert_eq!(w.dtype(), dtype);
        let want = Tensor::from_vec(want.clone(), [want.len()]).unwrap().to_dtype(dtype).unwrap();
        assert_eq!(all(&w), want.to_f64_vec().unwrap());
    }
}

#[test]
fn tied_head_is_a_copy_with_the_final_gain() {
    let mut m = model();
    m.remove("lm_head.weight");
    let dir = single(&m, Dtype::BF16);
    fails(Weights::load(dir.path(), &config(), DType::F64), &["lm_head.weight", "missing"]);
    let tied = LlamaConfig { tie_word_embeddings: true, ..config() };
    let w = Weights::load(dir.path(), &tied, DType::F64).unwrap();
    let (e, g) = (&m["model.embed_tokens.weight"].1, &m["model.norm.weight"].1);
    assert_eq!(&w.embedding.to_vec::<f64>().unwrap(), e);
    assert_eq!(w.head.to_vec::<f64>().unwrap(), e.iter().enumerate().map(|(i, x)| x * g[i % 6]).collect::<Vec<_>>());
}

#[test]
fn a_tensor_keeps_its_type() {
    for (stored, dtype) in
        [(Dtype::F64, DType::F64), (Dtype::F32, DType::F32), (Dtype::F16, DType::F16), (Dtype::BF16, DType::BF16)]
    {
        let dir = single(&model(), stored);
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        assert_eq!(checkpoint.names().count(), model().len());
        let t = checkpoint.tensor("model.norm.weight", &[6]).unwrap();
        assert_eq!((t.dtype(), t.to_f64_vec().unwrap()), (dtype, model()["model.norm.weight"].1.clone()));
    }
}

/// A map of a file that was cut short has no bytes behind it: reading them would be a SIGBUS.
#[test]
fn files_that_change_after_they_were_opened() {
    let model = model();
    for (change, says) in [(-64i64, "was cut short"), (0, "was written to"), (64, "was written to")] {
        let dir = single(&model, Dtype::F32);
        let path = dir.path().join("model.safetensors");
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        let (c, name) = (config(), "model.embed_tokens.weight");
        checkpoint.tensor(name, &[c.vocab_size, c.hidden_size]).unwrap();
        let length = std::fs::metadata(&path).unwrap().len();
        let file = std::fs::File::options().write(true).open(&path).unwrap();
        file.set_len(length.checked_add_signed(change).unwrap()).unwrap();
        file.set_modified(std::time::SystemTime::now() + std::time::Duration::from_secs(5)).unwrap();
        fails(checkpoint.tensor(name, &[c.vocab_size, c.hidden_size]), &["model.safetensors", name, says]);
    }
}

#[test]
fn bad_weights() {
    let (m, c) = (model(), config());
    let load = |dir: &TempDir| Weights::load(dir.path(), &c, DType::F32);
    let name = "model.layers.1.mlp.up_proj.weight";

    let empty = tempfile::tempdir().unwrap();
    fails(load(&empty), &["expected model.safetensors or model.safetensors.index.json", "found neither"]);
    fails(Weights::load(empty.path().join("absent"), &c, DType::F32), &["absent", "found neither"]);

    let dir = single(&m, Dtype::F32);
    let file = dir.path().join("model.safetensors");
    let whole = std::fs::read(&file).unwrap();
    for cut in [0, 4, 100, whole.len() - 1] {
        std::fs::write(&file, &whole[..cut]).unwrap();
        fails(load(&dir), &["model.safetensors", "expected a complete safetensors file", &format!("the file has {cut} bytes")]);
    }
    fails(load(&dir), &["bytes of data, got"]);
    std::fs::write(&file, [0xa5; 1000]).unwrap();
    fails(load(&dir), &["model.safetensors", "expected a complete safetensors file"]);

    let mut lacking = m.clone();
    lacking.remove(name);
    fails(load(&single(&lacking, Dtype::F32)), &[name, "missing"]);

    let mut wrong = m.clone();
    wrong.get_mut(name).unwrap().0 = vec![6, 10];
    fails(load(&single(&wrong, Dtype::F32)), &["model.safetensors", name, "expected shape [10, 6], got [6, 10]"]);

    let others = [Dtype::U8, Dtype::I8, Dtype::I32, Dtype::I64, Dtype::F8_E4M3, Dtype::F8_E5M2];
    for (dtype, called) in others.into_iter().zip(["U8", "I8", "I32", "I64", "F8_E4M3", "F8_E5M2"]) {
        let error = load(&single(&m, dtype)).unwrap_err().to_string();
        let said = format!("expected dtype F64, F32, F16 or BF16, got {called}");
        assert!(error.contains("model.safetensors") && error.contains(&said) && error.lines().count() == 1, "{error}");
    }

    let mut nan = m.clone();
    nan.get_mut(name).unwrap().1[7] = f64::NAN;
    nan.get_mut(name).unwrap().1[59] = f64::NEG_INFINITY;
    for dtype in [Dtype::F64, Dtype::F32, Dtype::F16, Dtype::BF16] {
        fails(load(&single(&nan, dtype)), &["model.safetensors", name, "got 2 of 60 that are NaN or infinite"]);
    }
    nan.insert(name.into(), (vec![10, 6], vec![1e5; 60]));
    fails(Weights::load(single(&nan, Dtype::F32).path(), &c, DType::F16), &[name, "of 60 values are too large for f16"]);
    fails(Weights::load(single(&m, Dtype::F32).path(), &c, DType::U32), &["expected dtype f64, f32, f16 or bf16, got u32"]);
}

#[test]
fn bad_shards() {
    let (m, c) = (model(), config());
    let load = |dir: &TempDir| Weights::load(dir.path(), &c, DType::F32);
    let (dir, index) = sharded(&m, Dtype::F32);
    let second = dir.path().join("model-00002-of-00002.safetensors");

    let mut elsewhere = index.clone();
    elsewhere["weight_map"]["model.norm.weight"] = "model-00002-of-00002.safetensors".into();
    write_index(&dir, &elsewhere);
    fails(load(&dir), &["model-00002-of-00002.safetensors", "lacks the tensor model.norm.weight"]);
    for path in ["../model.safetensors", "/etc/hostname", "", ".."] {
        elsewhere["weight_map"]["model.norm.weight"] = path.into();
        write_index(&dir, &elsewhere);
        fails(load(&dir), &["index.json", "model.norm.weight", "expected the name of a file in this directory"]);
    }
    write_index(&dir, &json!({"weights": {}}));
    fails(load(&dir), &["index.json", "weight_map"]);

    write_index(&dir, &index);
    let bytes = std::fs::read(&second).unwrap();
    std::fs::write(&second, &bytes[..bytes.len() - 8]).unwrap();
    fails(load(&dir), &["model-00002-of-00002.safetensors", "expected a complete safetensors file"]);
    std::fs::remove_file(&second).unwrap();
    fails(load(&dir), &["index.json", "names the shard model-00002-of-00002.safetensors, which does not exist"]);
}

/// Damaged bytes give an error or a value, never a panic.
#[test]
fn damaged_bytes_never_panic() {
    let dir = single(&model(), Dtype::F32);
    let file = dir.path().join("model.safetensors");
    let whole = std::fs::read(&file).unwrap();
    let c = config();
    let mut rng = ChaCha8Rng::seed_from_u64(0);
    let damage = |bytes: &[u8], rng: &mut ChaCha8Rng| {
        let mut bytes = bytes.to_vec();
        for _ in 0..1 + rng.next_u32() % 4 {
            // Mostly the header: most of the rest is numbers.
            let at = rng.next_u32() as usize % if rng.next_u32().is_multiple_of(4) { bytes.len() } else { bytes.len().min(3000) };
            bytes[at] = match rng.next_u32() % 3 {
                0 => b"0123456789[]{},:\"-."[rng.next_u32() as usize % 19],
                1 => rng.next_u32() as u8,
                _ => bytes[at] ^ 1 << (rng.next_u32() % 8),
            };
        }
        bytes
    };
    let mut loaded = 0;
    for _ in 0..1000 {
        std::fs::write(&file, damage(&whole, &mut rng)).unwrap();
        loaded += usize::from(Weights::load(dir.path(), &c, DType::F32).is_ok());
        if let Ok(c) = LlamaConfig::from_json(&damage(CONFIG.as_bytes(), &mut rng), Path::new("config.json")) {
            assert_eq!(c.frequencies(1).inverse.len(), c.rotary_dim() / 2);
        }
    }
    assert!(loaded < 1000);

    // Sizes that overflow when added up.
    let huge = 1u64 << 60;
    let entry = |i: u64| json!({"dtype": "U8", "shape": [huge], "data_offsets": [i * huge, (i + 1) * huge]});
    let mut header: serde_json::Map<String, Value> = (0..15).map(|i| (format!("t{i}"), entry(i))).collect();
    header.insert("last".into(), json!({"dtype": "U8", "shape": [huge - 1], "data_offsets": [15 * huge, u64::MAX]}));
    let header = Value::from(header).to_string();
    std::fs::write(&file, [&(header.len() as u64).to_le_bytes()[..], header.as_bytes()].concat()).unwrap();
    fails(Weights::load(dir.path(), &c, DType::F32), &["promises 18446744073709551615 bytes of data, got 0"]);
}

#[test]
fn config_file_and_random_weights() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("config.json");
    fails(LlamaConfig::from_file(&path), &["config.json"]);
    std::fs::write(&path, CONFIG).unwrap();
    let c = LlamaConfig::from_file(&path).unwrap();
    assert_eq!(c, config());
    let w = Weights::random(&c, 1).unwrap();
    assert_eq!(all(&w), all(&Weights::random(&c, 1).unwrap()));
    assert_ne!(all(&w), all(&Weights::random(&c, 2).unwrap()));
    let shape = |l: usize, linear: Linear| w.layers[l][linear].weight.shape();
    assert_eq!((w.layers.len(), shape(0, Linear::K), shape(1, Linear::Down)), (2, &[4, 6][..], &[6, 10][..]));
    let tied = Weights::random(&LlamaConfig { tie_word_embeddings: true, ..c }, 1).unwrap();
    assert_eq!(tied.head.to_f64_vec().unwrap(), tied.embedding.to_f64_vec().unwrap());
}

#[test]
fn one_bos_whatever_the_tokenizer_adds() {
    let dir = tempfile::tempdir().unwrap();
    let special = json!({"id": 0, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
                         "special": true});
    let tokenizer = json!({
        "version": "1.0", "added_tokens": [special], "normalizer": null, "pre_tokenizer": {"type": "Whitespace"}, "decoder": null,
        "truncation": {"max_length": 2, "stride": 0, "strategy": "LongestFirst", "direction": "Right"},
        "padding": {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0, "pad_type_id": 0,
                    "pad_token": "<s>"},
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}}},
        "model": {"type": "WordLevel", "vocab": {"<s>": 0, "<unk>": 1, "a": 2, "b": 3}, "unk_token": "<unk>"},
    });
    std::fs::write(dir.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let t = Tokenizer::from_dir(dir.path()).unwrap();
    assert_eq!(t.vocab_size(), 4);
    assert_eq!(t.encode_stream("a b\nb c", Some(0)).unwrap(), [0, 2, 3, 3, 1]);
    assert_eq!(t.encode_stream("<s>a b", Some(0)).unwrap(), [0, 2, 3]);
    assert_eq!(t.encode_stream("a b", None).unwrap(), [2, 3]);
    assert_eq!(t.encode_stream("", Some(0)).unwrap(), [0]);
}
