//! Model folders as they are found: heads that tie and differ, tensors too many and too few, other spellings, what people give by mistake.

use std::collections::BTreeMap;
use std::path::Path;

use spinquant::export::{Format, Output, load_native, write_hf, write_rtn};
use spinquant::llama::{Checkpoint, Llama, LlamaConfig, Source};
use spinquant::quant::{Online, Scheme};
use spinquant::{DType, Device, Result, Tensor, io, ops};
use tempfile::TempDir;

use crate::common::tiny;

type Tensors = BTreeMap<String, Tensor>;

/// A model of two layers, whose tensors and configuration may be changed.
struct Folder(TempDir);

impl Folder {
    fn new(tied: bool) -> Self {
        let dir = tempfile::tempdir().unwrap();
        tiny::write(dir.path(), &tiny::config(2, 1, tied), DType::F32, 3, true);
        Self(dir)
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn change(&self, change: impl FnOnce(&mut Tensors)) {
        let file = self.path().join("model.safetensors");
        let (mut tensors, metadata) = io::load_tensors(&file).unwrap();
        change(&mut tensors);
        io::save_tensors(&file, &tensors, &metadata).unwrap();
    }

    fn logits(&self) -> Vec<f64> {
        tiny::logits(&Llama::load(self.path(), DType::F64, &Device::Cpu).unwrap())
    }

    fn source(&self) -> Source {
        Source::from_dir(self.path()).unwrap()
    }
}

/// Values that `f32` holds, of a shape.
fn values(shape: &[usize], seed: u64) -> Tensor {
    ops::randn(shape, seed).to_dtype(DType::F32).unwrap()
}

fn fails<T: std::fmt::Debug>(result: Result<T>, parts: &[&str]) {
    let message = result.unwrap_err().to_string();
    assert!(parts.iter().all(|p| message.contains(p)), "{message:?} lacks one of {parts:?}");
}

const HEAD: &str = "lm_head.weight";

#[test]
fn a_tied_configuration_with_a_head_of_its_own() {
    // The same weights once with an untied configuration, once with one that ties.
    let folder = Folder::new(false);
    let want = folder.logits();
    let tie = |tied: bool| {
        let config = LlamaConfig { tie_word_embeddings: tied, ..folder.source().config().clone() };
        std::fs::write(folder.path().join("config.json"), config.to_json()).unwrap();
    };
    assert!(folder.source().notes().is_empty());
    tie(true);
    assert_eq!(folder.logits(), want);
    let source = folder.source();
    assert!(!source.config().tie_word_embeddings);
    let notes = source.notes();
    assert!(notes.len() == 1 && notes[0].contains("lm_head.weight differs from model.embed_tokens.weight"), "{notes:?}");

    // Both exports hold that head.
    let place = tempfile::tempdir().unwrap();
    let (hf, native) = (place.path().join("hf"), place.path().join("native"));
    let full = Scheme::FULL_PRECISION.online(Online::NONE);
    write_hf(folder.path(), None, &full, Output::new(&hf, Format::Hf), |_| {}).unwrap();
    assert!(!LlamaConfig::from_dir(&hf).unwrap().tie_word_embeddings);
    let close = |got: Vec<f64>| assert!(got.iter().zip(&want).all(|(a, b)| (a - b).abs() <= 1e-4 * b.abs().max(1.0)));
    close(tiny::logits(&Llama::load(&hf, DType::F64, &Device::Cpu).unwrap()));
    let model = Llama::load(folder.path(), DType::F64, &Device::Cpu).unwrap();
    write_rtn(&model, None, &full, Output::new(&native, Format::Native), |_| {}).unwrap();
    let merged = load_native(&native, &Device::Cpu).unwrap().model;
    assert!(!merged.config.tie_word_embeddings);
    close(merged.logits(&tiny::tokens(&merged.config), 9).unwrap().to_f64_vec().unwrap());

    // A head that equals the embedding, in whatever type, is tied, and nothing is said.
    let embedding = "model.embed_tokens.weight";
    folder.change(|t| {
        let rounded = t[embedding].to_dtype(DType::BF16).unwrap();
        t.insert(embedding.into(), rounded.to_dtype(DType::F32).unwrap());
        t.insert(HEAD.into(), rounded);
    });
    let source = folder.source();
    assert!(source.config().tie_word_embeddings && source.notes().is_empty() && source.unread().is_empty());
    let tied = folder.logits();
    folder.change(|t| drop(t.remove(HEAD)));
    assert_eq!(folder.logits(), tied);
    // One value is enough to differ.
    folder.change(|t| {
        let mut head = t[embedding].to_vec::<f32>().unwrap();
        *head.last_mut().unwrap() += 1.0;
        t.insert(HEAD.into(), Tensor::from_vec(head, t[embedding].shape()).unwrap());
    });
    assert!(!folder.source().config().tie_word_embeddings);
}

#[test]
fn tensors_that_are_not_read_are_listed() {
    let folder = Folder::new(false);
    folder.change(|t| drop(t.insert("model.layers.0.self_attn.rotary_emb.inv_freq".into(), values(&[4], 1))));
    assert!(folder.source().unread().is_empty() && folder.source().notes().is_empty());
    folder.change(|t| {
        for l in 0..2 {
            for (i, (name, n)) in [("q", 16), ("k", 8), ("v", 8), ("o", 16)].into_iter().enumerate() {
                t.insert(format!("model.layers.{l}.self_attn.{name}_proj.bias"), values(&[n], i as u64));
            }
        }
    });
    let unread = folder.source().unread();
    assert_eq!((unread.len(), &unread[0][..]), (8, "model.layers.0.self_attn.k_proj.bias"));
    let notes = folder.source().notes();
    assert!(notes.len() == 1 && notes[0].contains("8 tensors are in the files and not read"), "{notes:?}");
    assert!(notes[0].ends_with("model.layers.0.self_attn.v_proj.bias and 4 more"), "{notes:?}");
    // Layers that the configuration does not count.
    let fewer = LlamaConfig { layers: 1, ..folder.source().config().clone() };
    let source = Source::open(folder.path(), &fewer).unwrap();
    assert!(source.unread().contains(&"model.layers.1.mlp.down_proj.weight".to_string()));
}

#[test]
fn what_is_not_needed_may_be_absent() {
    let folder = Folder::new(false);
    let want = folder.logits();
    let shard = "model-00001-of-00001.safetensors";
    std::fs::rename(folder.path().join("model.safetensors"), folder.path().join(shard)).unwrap();
    let (tensors, _) = io::load_tensors(&folder.path().join(shard)).unwrap();
    let index = |extra: &str| {
        let map: BTreeMap<&str, &str> = tensors.keys().map(|name| (&name[..], shard)).chain([(extra, shard)]).collect();
        let text = serde_json::json!({"metadata": {"total_size": 0}, "weight_map": map}).to_string();
        std::fs::write(folder.path().join("model.safetensors.index.json"), text).unwrap();
    };
    index("model.layers.0.self_attn.rotary_emb.inv_freq");
    assert_eq!(folder.logits(), want);
    // What is needed may not, and is missed before anything is read.
    let deeper = LlamaConfig { layers: 3, ..folder.source().config().clone() };
    index("model.layers.2.input_layernorm.weight");
    let parts =
        [shard, "lacks the tensor model.layers.2.input_layernorm.weight, which model.safetensors.index.json says is here"];
    fails(Source::open(folder.path(), &deeper), &parts);
}

#[test]
fn names_without_their_first_part() {
    let folder = Folder::new(true);
    let want = folder.logits();
    folder.change(|t| *t = std::mem::take(t).into_iter().map(|(k, v)| (k.trim_start_matches("model.").to_string(), v)).collect());
    assert_eq!(folder.logits(), want);
    assert!(folder.source().unread().is_empty());
    // Without a head of its own there is none to make up.
    let untied = LlamaConfig { tie_word_embeddings: false, ..folder.source().config().clone() };
    fails(Source::open(folder.path(), &untied), &["lm_head.weight", "missing"]);
}

/// As in the hub's cache: links to contents, and a link to the folder; with spaces in every part of the path.
#[cfg(unix)]
#[test]
fn links_and_paths_with_spaces() {
    let folder = Folder::new(false);
    let want = folder.logits();
    let place = tempfile::tempdir().unwrap();
    let cache = place.path().join("my models/models--a b--c");
    let (snapshot, blobs) = (cache.join("snapshots/0 1"), cache.join("blobs"));
    std::fs::create_dir_all(&snapshot).unwrap();
    std::fs::create_dir_all(&blobs).unwrap();
    for (i, file) in ["config.json", "model.safetensors"].into_iter().enumerate() {
        std::fs::copy(folder.path().join(file), blobs.join(format!("content {i}"))).unwrap();
        std::os::unix::fs::symlink(format!("../../blobs/content {i}"), snapshot.join(file)).unwrap();
    }
    let link = place.path().join("a link");
    std::os::unix::fs::symlink(&snapshot, &link).unwrap();
    for path in [&snapshot, &link] {
        assert_eq!(tiny::logits(&Llama::load(path, DType::F64, &Device::Cpu).unwrap()), want, "{}", path.display());
    }
    std::fs::remove_file(blobs.join("content 1")).unwrap();
    fails(Source::from_dir(&snapshot), &["model.safetensors"]);
}

#[test]
fn folders_that_are_no_models() {
    let place = tempfile::tempdir().unwrap();
    let make = |name: &str, files: &[&str]| {
        let dir = place.path().join(name);
        std::fs::create_dir_all(&dir).unwrap();
        files.iter().for_each(|file| std::fs::write(dir.join(file), "{}").unwrap());
        dir
    };
    let config = |dir: &Path| LlamaConfig::from_dir(dir);
    fails(config(Path::new("meta-llama/Llama-2-7b-hf")), &["hub::folder finds meta-llama/Llama-2-7b-hf on the hub"]);
    fails(config(&place.path().join("absent")), &["absent/config.json: No such file or directory", "there is no folder"]);
    let file = make("a", &["model.safetensors"]).join("model.safetensors");
    fails(config(&file), &["expected the folder of a model, got a file"]);
    fails(config(&make("gguf", &["m.q4.gguf"])), &["found m.q4.gguf", "GGUF files are not read"]);
    fails(config(&make("gguf", &[]).join("m.q4.gguf")), &["got a file; GGUF files are not read"]);
    let cache = make("models--a--b/snapshots/0", &["config.json"]);
    let root = cache.parent().unwrap().parent().unwrap();
    fails(config(root), &["the hub's cache; did you mean", "models--a--b/snapshots/0?"]);
    fails(config(&make("native", &["spinquant.json"])), &["is a quantised model in the native layout"]);
    fails(config(&make("lora", &["adapter_config.json"])), &["LoRA adapter"]);
    fails(config(&make("empty", &[])), &["expected the folder of a model: config.json, *.safetensors, tokenizer.json"]);

    let open = |dir: &Path| Checkpoint::open(dir);
    fails(open(&make("bin", &["pytorch_model-00001-of-00002.bin"])), &["found neither", "safe_serialization=True"]);
    fails(open(&make("pth", &["consolidated.00.pth"])), &["the original layout of LLaMA"]);
    fails(open(&make("half", &["model-00001-of-00002.safetensors"])), &["found model-00001-of-00002.safetensors", "index"]);
    let folder = make("folder", &[]);
    std::fs::create_dir(folder.join("model.safetensors")).unwrap();
    fails(open(&folder), &["model.safetensors: expected a safetensors file, got a folder"]);
    let lfs = make("lfs", &[]);
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n";
    for file in ["model.safetensors", "tokenizer.json", "config.json"] {
        std::fs::write(lfs.join(file), pointer).unwrap();
    }
    fails(open(&lfs), &["model.safetensors: this is a Git LFS pointer", "git lfs pull"]);
    fails(config(&lfs), &["config.json: this is a Git LFS pointer"]);
    let tokenizer = |dir: &Path| spinquant::data::Tokenizer::from_dir(dir);
    fails(tokenizer(&lfs), &["tokenizer.json: this is a Git LFS pointer"]);
    fails(
        tokenizer(&make("spm", &["tokenizer.model"])),
        &["spm/tokenizer.json", "only tokenizer.model is there", "save_pretrained"],
    );

    // A damaged record is told of by the loader of such folders.
    let damaged = make("damaged", &[]);
    std::fs::write(damaged.join("spinquant.json"), "{oops").unwrap();
    assert!(spinquant::export::is_native(&damaged));
    fails(load_native(&damaged, &Device::Cpu), &["spinquant.json: expected a JSON object"]);
    // Nothing is quoted at length.
    std::fs::write(lfs.join("config.json"), format!("\"{}\"", "x".repeat(100_000))).unwrap();
    let message = config(&lfs).unwrap_err().to_string();
    assert!(message.len() < 400 && message.contains("expected a JSON object"), "{} bytes", message.len());
    std::fs::write(lfs.join("config.json"), vec![b' '; 5 << 20]).unwrap();
    fails(config(&lfs), &["expected at most 4194304 bytes, got 5242880"]);
}
