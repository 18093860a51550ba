//! The command line on a tiny model: what it prints and writes, that runs repeat and resume, and one clear message for bad input.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde_json::{Value, json};
use spinquant::rotation::Rotations;
use spinquant::{Tensor, ops};
use tempfile::TempDir;

mod arguments;
mod baselines;
mod bench;
mod clip_objective;
mod compressed;
mod console;
mod families;
mod formats;
mod generate;
mod hub;
mod input;
mod kept;
mod learning;
mod online;
mod outputs;
mod reading;
mod reconstruct;
mod scores;
mod serve;
mod transforms;
mod weight_clips;
mod zeroshot;

type Tensors = BTreeMap<String, Tensor>;

/// A model folder, a text and a place for outputs.
struct Place(TempDir);

fn config() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 24, "intermediate_size": 56,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 32,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "bos_token_id": 0, "torch_dtype": "float32",
    })
}

fn tensors() -> Tensors {
    let mut shapes: Vec<(String, Vec<usize>)> =
        vec![("model.embed_tokens".into(), vec![32, 24]), ("lm_head".into(), vec![32, 24]), ("model.norm".into(), vec![24])];
    for l in 0..2 {
        for (part, shape) in [
            ("input_layernorm", vec![24]),
            ("post_attention_layernorm", vec![24]),
            ("self_attn.q_proj", vec![32, 24]),
            ("self_attn.k_proj", vec![16, 24]),
            ("self_attn.v_proj", vec![16, 24]),
            ("self_attn.o_proj", vec![24, 32]),
            ("mlp.gate_proj", vec![56, 24]),
            ("mlp.up_proj", vec![56, 24]),
            ("mlp.down_proj", vec![24, 56]),
        ] {
            shapes.push((format!("model.layers.{l}.{part}"), shape));
        }
    }
    let tensor = |(i, (name, shape)): (usize, (String, Vec<usize>))| {
        let x = ops::randn(shape.clone(), i as u64).into_vec::<f64>().unwrap();
        let x = x.into_iter().map(|x| if shape.len() == 1 { 1.0 + 0.1 * x } else { 0.2 * x });
        (format!("{name}.weight"), Tensor::from_vec(x.collect::<Vec<_>>(), shape).unwrap())
    };
    shapes.into_iter().enumerate().map(tensor).collect()
}

fn write(path: &Path, tensors: &Tensors, dtype: Dtype) {
    let bytes = tensors.iter().map(|(name, t)| {
        let narrow = |x: &f64| if dtype == Dtype::F32 { (*x as f32).to_le_bytes().to_vec() } else { vec![*x as u8] };
        (name, t.shape(), t.as_slice::<f64>().unwrap().iter().flat_map(narrow).collect::<Vec<u8>>())
    });
    let bytes: Vec<_> = bytes.collect();
    let views = bytes.iter().map(|(name, shape, bytes)| (name, TensorView::new(dtype, shape.to_vec(), bytes).unwrap()));
    safetensors::serialize_to_file(views, None, path).unwrap();
}

impl Place {
    fn new() -> Self {
        let place = Self(tempfile::tempdir().unwrap());
        std::fs::create_dir(place.path("model")).unwrap();
        place.config(config());
        write(&place.path("model/model.safetensors"), &tensors(), Dtype::F32);
        let vocab: BTreeMap<String, u32> =
            (0..30).map(|i| (format!("w{i}"), i + 2)).chain([("<s>".into(), 0), ("?".into(), 1)]).collect();
        let tokenizer = json!({
            "version": "1.0", "added_tokens": [], "normalizer": null, "pre_tokenizer": {"type": "WhitespaceSplit"}, "decoder": null,
            "truncation": null, "padding": null,
            "post_processor": {"type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}}},
            "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "?"},
        });
        std::fs::write(place.path("model/tokenizer.json"), tokenizer.to_string()).unwrap();
        // Words that mostly follow from the one before.
        let noise = ops::randn([1600], 9).into_vec::<f64>().unwrap();
        let mut word = 0;
        let text = noise.iter().map(|x| {
            word = (word * 7 + 3 + (x.abs() * 2.0) as usize) % 30;
            format!("w{word} ")
        });
        std::fs::write(place.path("text.txt"), text.collect::<String>()).unwrap();
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn config(&self, config: Value) {
        std::fs::write(self.path("model/config.json"), config.to_string()).unwrap();
    }

    fn read(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.path(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
    }

    fn command(&self, args: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_spinquant"));
        command.args(args.split_whitespace()).current_dir(self.0.path()).env("RAYON_NUM_THREADS", "2");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        // Where there are GPUs, this hides them: the same tests run everywhere.
        command.env("CUDA_VISIBLE_DEVICES", "");
        // No test depends on a network, or on what is in somebody's cache.
        command.env("HF_HOME", self.path("huggingface")).env("HF_HUB_OFFLINE", "1");
        for name in
            ["HF_HUB_CACHE", "HF_ENDPOINT", "HF_TOKEN", "HF_TOKEN_PATH", "ALL_PROXY", "all_proxy", "HTTP_PROXY", "http_proxy"]
        {
            command.env_remove(name);
        }
        command
    }

    fn run(&self, args: &str) -> Output {
        self.command(args).output().unwrap()
    }

    /// Runs to success and returns the one JSON object on standard output.
    fn json(&self, args: &str) -> Value {
        let out = self.run(args);
        let (stdout, stderr) = (String::from_utf8(out.stdout).unwrap(), String::from_utf8_lossy(&out.stderr));
        let complains = stderr.lines().any(|l| l.contains("error") && !l.starts_with("clip ratios by error ("));
        assert!(out.status.success() && !complains, "{args}: {stderr}");
        assert_eq!(stdout.lines().count(), 1, "{stdout}");
        let value: Value = serde_json::from_str(&stdout).unwrap();
        assert!(value.is_object(), "{stdout}");
        value
    }

    /// Runs to failure: nothing on standard output, one message with these parts.
    fn fails(&self, args: &str, parts: &[&str]) {
        let out = self.run(args);
        let stderr = String::from_utf8_lossy(&out.stderr);
        assert!(out.status.code().is_some_and(|c| c != 0), "{args}: {:?}, {stderr}", out.status);
        assert!(out.stdout.is_empty(), "{args}: {}", String::from_utf8_lossy(&out.stdout));
        let errors: Vec<_> = stderr.lines().filter(|l| l.contains("error:")).collect();
        assert!(errors.len() == 1 && errors[0].starts_with("error: ") && !stderr.contains("panicked"), "{args}: {stderr}");
        assert!(parts.iter().all(|p| errors[0].contains(p)), "{args}: {:?} lacks one of {parts:?}", errors[0]);
    }
}

const MODEL: &str = "--model model --device cpu --seq-len 16";
const LEARN: &str = "learn --model model --device cpu --seq-len 16 --text text.txt --batch 4 --held-out 8 --out R.safetensors";
const EVAL: &str = "eval --model model --device cpu --seq-len 16 --text text.txt";

fn number(v: &Value, name: &str) -> f64 {
    v[name].as_f64().unwrap_or_else(|| panic!("no number {name:?} in {v}"))
}
