//! The tiny models that `tests/interop/families.py` made, the logits that transformers gave them, and what must be so on every device.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use spinquant::llama::{Decoder, Llama, LlamaConfig, Packed, Recompute, RotationVars, Source};
use spinquant::quant::{Online, Scheme};
use spinquant::rotation::Rotations;
use spinquant::{DType, Device, Tape, Tensor, io};
use tempfile::TempDir;

use super::distance;

/// Between logits in f32.
pub const TOLERANCE: f64 = 1e-4;
const FULL: Scheme = Scheme::FULL_PRECISION;

/// A model and what transformers makes of some tokens.
pub struct Fixture {
    pub name: String,
    /// Its folder, in f32.
    dir: TempDir,
    /// Sequences of one length, and their logits.
    pub texts: Vec<Text>,
}

/// Sequences of `seq` tokens and their logits, `[tokens, V]`.
pub struct Text {
    pub tokens: Vec<u32>,
    pub seq: usize,
    pub logits: Vec<f64>,
}

impl Fixture {
    fn open(model: &Path, variant: &str) -> Self {
        let name = format!("{}-{variant}", model.file_name().unwrap().to_str().unwrap());
        let dir = tempfile::tempdir().unwrap();
        let (tensors, metadata) = io::load_tensors(&model.join("model.safetensors")).unwrap();
        let wide = tensors.into_iter().map(|(name, t)| (name, t.to_dtype(DType::F32).unwrap())).collect();
        io::save_tensors(&dir.path().join("model.safetensors"), &wide, &metadata).unwrap();
        std::fs::copy(model.join(format!("{variant}.json")), dir.path().join("config.json")).unwrap();
        let (outcome, _) = io::load_tensors(&model.join(format!("{variant}.safetensors"))).unwrap();
        let text = |part: &str| {
            let ids = outcome.get(&format!("{part}ids"))?;
            let logits = outcome[&format!("{part}logits")].to_f64_vec().unwrap();
            Some(Text { tokens: ids.to_vec::<u32>().unwrap(), seq: ids.cols(), logits })
        };
        Self { name, dir, texts: ["", "short."].into_iter().filter_map(text).collect() }
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    pub fn load(&self, dtype: DType, device: &Device) -> Llama {
        Llama::load(self.path(), dtype, device).unwrap()
    }

    /// Checks that logits are those of transformers.
    pub fn agrees(&self, what: &str, logits: impl Fn(&Text) -> Tensor) {
        for text in &self.texts {
            let error = distance(&logits(text).to_f64_vec().unwrap(), &text.logits);
            assert!(error < TOLERANCE, "{}, {what}, {} tokens: {error:e}", self.name, text.seq);
        }
    }
}

/// Every model in every variant of its configuration.
pub fn fixtures() -> impl Iterator<Item = Fixture> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/families");
    let list = |dir: &Path| {
        let mut paths: Vec<PathBuf> = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()).collect();
        paths.sort();
        paths
    };
    list(&root).into_iter().flat_map(move |model| {
        let configs = list(&model).into_iter().filter(|path| path.extension().is_some_and(|e| e == "json"));
        let variants: Vec<String> = configs.map(|path| path.file_stem().unwrap().to_str().unwrap().to_string()).collect();
        variants.into_iter().map(move |variant| Fixture::open(&model, &variant))
    })
}

pub fn rotations(config: &LlamaConfig, seed: u64) -> [Rotations; 2] {
    let LlamaConfig { hidden_size: c, head_dim: d, layers: l, .. } = *config;
    [Rotations::random_orthogonal(c, d, l, seed).unwrap(), Rotations::random_hadamard(c, d, l, seed).unwrap()]
}

/// Logits of the network as it is.
pub fn full_precision(device: &Device) {
    for f in fixtures() {
        assert!(Source::from_dir(f.path()).unwrap().unread().is_empty(), "{}", f.name);
        let model = f.load(DType::F32, device);
        f.agrees("folded", |t| model.merge(None, &FULL).unwrap().logits(&t.tokens, t.seq).unwrap());
        let plain = Llama::load_plain(f.path(), DType::F32, device).unwrap();
        f.agrees("gains apart", |t| plain.merge(None, &FULL).unwrap().logits(&t.tokens, t.seq).unwrap());
    }
}

/// Logits of the rotated network, merged and while it learns.
pub fn rotated(device: &Device) {
    for f in fixtures() {
        let model = f.load(DType::F32, device);
        for r in rotations(&model.config, 7) {
            for online in [Online::NONE, Online::BOTH] {
                let scheme = FULL.online(online);
                f.agrees("merged", |t| model.merge(Some(&r), &scheme).unwrap().logits(&t.tokens, t.seq).unwrap());
                let narrow = r.to_dtype(DType::F32).unwrap().to_device(device).unwrap();
                f.agrees("learning", |t| {
                    let tape = Tape::new();
                    let vars = RotationVars::constants(&tape, &narrow).unwrap();
                    let run = Arc::new(model.run(&scheme, t.seq).unwrap());
                    model.logits(&vars, &t.tokens, run, Recompute::All).unwrap().into_value()
                });
            }
        }
    }
}

/// Gradients of the loss in f32 on a device against those in f64 on the CPU.
pub fn gradients(device: &Device) {
    for f in fixtures() {
        let (wide, narrow) = (f.load(DType::F64, &Device::Cpu), f.load(DType::F32, device));
        let [r, _] = rotations(&wide.config, 3);
        let text = &f.texts[0];
        let of = |m: &Llama, r: &Rotations| {
            let tape = Tape::new();
            let vars = RotationVars::variables(&tape, r).unwrap();
            let loss = m.loss(&vars, &text.tokens, text.seq, &FULL.online(Online::BOTH), Recompute::All).unwrap();
            let grads = vars.gradients(&mut tape.backward(loss).unwrap()).unwrap();
            grads.iter().map(|g| g.to_f64_vec().unwrap()).collect::<Vec<_>>()
        };
        let got = of(&narrow, &r.to_dtype(DType::F32).unwrap().to_device(device).unwrap());
        for (name, (got, want)) in ["R1", "R2"].into_iter().zip(got.iter().zip(&of(&wide, &r))) {
            let most = want.iter().fold(0.0, |m, x| f64::max(m, x.abs()));
            let error = distance(got, want) / most;
            assert!(error < 1e-3, "{}, {name}: {error:e} of {most:e}", f.name);
        }
    }
}

/// Read at once, in parts and token by token, and packed: the same logits.
pub fn cache_and_packing(device: &Device) {
    for f in fixtures() {
        let merged = f.load(DType::F32, device).merge(None, &FULL).unwrap();
        let vocab = merged.config.vocab_size;
        for text in &f.texts {
            let seq = text.seq.min(merged.config.max_position_embeddings);
            let want = merged.logits(&text.tokens[..seq], seq).unwrap().to_f64_vec().unwrap();
            for part in [seq, 7, 1] {
                let mut decoder = Decoder::new(&merged, seq).unwrap();
                let mut last = vec![];
                for part in text.tokens[..seq].chunks(part) {
                    last = decoder.feed(part).unwrap().to_f64_vec().unwrap();
                }
                assert_eq!(decoder.read(), seq);
                let error = distance(&last, &want[(seq - 1) * vocab..]);
                assert!(error < TOLERANCE, "{}, {part} at a time: {error:e}", f.name);
            }
        }
        let text = &f.texts[0];
        let mut packed = Packed::default();
        for tokens in text.tokens.chunks(text.seq) {
            packed.push(tokens);
        }
        let mut rows = vec![];
        let all = |part: Tensor| {
            rows.extend(part.to_f64_vec()?);
            Ok(())
        };
        merged.packed_logits(&packed, 5, all).unwrap();
        let error = distance(&rows, &text.logits);
        assert!(error < TOLERANCE, "{}, packed: {error:e}", f.name);
    }
}
