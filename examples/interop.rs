//! What the scripts of `tests/interop` compare with: random models, their Hugging Face outputs, our logits, rotations.
//!
//! ```sh
//! cargo run --release --example interop -- write DIR
//! cargo run --release --example interop -- families DIR     # rotated outputs of tests/fixtures/families
//! cargo run --release --example interop -- read DIR     # rotations that torch.save wrote into DIR
//! cargo run --release --example interop -- tokens MODEL TEXT FILE     # the text's ids, little-endian u32
//! cargo run --release --example interop -- compressed DIR     # folders of compressed-tensors
//! ```

#[path = "../tests/common/tiny.rs"]
#[allow(dead_code)] // the tests use the rest
mod tiny;

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use spinquant::calibrate::{Calibration, LayerReport};
use spinquant::data::{self, Bos, Tokenizer, Windows};
use spinquant::export::{Format, Output, write_hf, write_quantized, write_rtn};
use spinquant::llama::{Compressed, Llama, LlamaConfig, Rotated, Source};
use spinquant::ops::fake_quant::quantize;
use spinquant::quant::{Gptq, Online, R4, Rtn, Scheme};
use spinquant::rotation::Rotations;
use spinquant::{DType, Device, Error, Result, Tensor, io};

const SEQ: usize = 48;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["write", dir] => write(Path::new(dir)),
        ["families", dir] => families(Path::new(dir)),
        ["read", dir] => read(Path::new(dir)),
        ["tokens", model, text, file] => tokens(Path::new(model), Path::new(text), Path::new(file)),
        ["compressed", dir] => compressed(Path::new(dir)),
        _ => {
            let expected = "expected write DIR, families DIR, read DIR, compressed DIR or tokens MODEL TEXT FILE";
            Err(Error::argument("arguments", expected))
        }
    }
}

/// Every model of `tests/fixtures/families`, in f32 and rotated, as `FAMILY-VARIANT`, and as `FAMILY-VARIANT-own` with `config.json` written
/// anew.
fn families(dir: &Path) -> Result<()> {
    let list = |dir: &Path| -> Result<Vec<PathBuf>> {
        let error = Error::io(dir);
        let entries = std::fs::read_dir(dir).and_then(|entries| entries.map(|e| Ok(e?.path())).collect());
        entries.map_err(error)
    };
    let source = dir.join("source");
    std::fs::create_dir_all(&source).map_err(Error::io(&source))?;
    for model in list(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/families"))? {
        let (tensors, metadata) = io::load_tensors(&model.join("model.safetensors"))?;
        let wide = tensors.into_iter().map(|(name, t)| Ok((name, t.to_dtype(DType::F32)?))).collect::<Result<_>>()?;
        io::save_tensors(&source.join("model.safetensors"), &wide, &metadata)?;
        for variant in list(&model)?.into_iter().filter(|path| path.extension().is_some_and(|e| e == "json")) {
            let config = source.join("config.json");
            std::fs::copy(&variant, &config).map_err(Error::io(&config))?;
            let name = |path: &Path| path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            let out = dir.join(format!("{}-{}", name(&model), name(&variant)));
            let config = LlamaConfig::from_dir(&source)?;
            let rotations = Rotations::random_hadamard(config.hidden_size, config.head_dim, config.layers, 2)?;
            let output = Output { overwrite: true, ..Output::new(&out, Format::Hf) };
            let scheme = Scheme::FULL_PRECISION.online(Online::NONE);
            write_hf(&source, Some(&rotations), &scheme, output, |_| {})?;
            // From memory, so with a configuration of our own.
            let own = dir.join(format!("{}-{}-own", name(&model), name(&variant)));
            let output = Output { overwrite: true, ..Output::new(&own, Format::Hf) };
            write_rtn(&Llama::load(&source, DType::F32, &Device::Cpu)?, Some(&rotations), &scheme, output, |_| {})?;
            if name(&variant) == "plain" {
                pack_family(&source, &rotations, &dir.join(format!("{}-packed", name(&model))))?;
            }
            println!("{}", out.display());
        }
    }
    Ok(())
}

/// The same with packed weights of 4 bits, and what they compute.
fn pack_family(source: &Path, rotations: &Rotations, out: &Path) -> Result<()> {
    let files = Source::from_dir(source)?;
    let scheme = Scheme { weight_group: Some(8), ..Scheme::new(4, 16, 16) }.online(Online::NONE);
    let rotated = Rotated::open(&files, Some(rotations), &scheme, &Device::Cpu)?;
    let output = Output { overwrite: true, source: Some(source), ..Output::new(out, Format::CompressedTensors) };
    write_quantized(&rotated, &Rtn, None, output, |_| ControlFlow::Continue(()))?;
    let network = Compressed::read(out)?.load(DType::F32, &Device::Cpu)?;
    let tokens: Vec<u32> = (0..24).map(|i| (i * i * 7 + 3 * i + 1) % files.config().vocab_size as u32).collect();
    let ours = BTreeMap::from([
        ("logits".to_string(), network.logits(&tokens, tokens.len())?),
        ("tokens".to_string(), Tensor::from_vec(tokens, [1, 24])?),
    ]);
    io::save_tensors(&out.with_extension("safetensors"), &ours, &BTreeMap::new())
}

fn write(dir: &Path) -> Result<()> {
    let larger = |c: LlamaConfig| LlamaConfig { hidden_size: 64, intermediate_size: 96, layers: 3, vocab_size: 97, ..c };
    let cases = [
        ("gqa", larger(tiny::config(8, 2, false))),
        ("tied", larger(tiny::config(8, 8, true))),
        ("llama3", larger(tiny::llama3(8, 4))),
        ("bias", larger(tiny::with_biases(tiny::config(8, 2, false)))),
    ];
    for (name, config) in cases {
        let (source, rotated) = (dir.join(name).join("source"), dir.join(name).join("hf"));
        tiny::write(&source, &config, DType::F32, 1, true);
        let rotations = Rotations::random_hadamard(config.hidden_size, config.head_dim, config.layers, 2)?;
        let scheme = Scheme::FULL_PRECISION.online(Online::NONE);
        let overwrite = |out| Output { overwrite: true, ..Output::new(out, Format::Hf) };
        write_hf(&source, Some(&rotations), &scheme, Output { shard_bytes: 100_000, ..overwrite(&rotated) }, |_| {})?;
        // Quantised weights as well, and what they should compute.
        let quantised = dir.join(name).join("hf-w4");
        let scheme = Scheme::new(4, 16, 16).online(Online::NONE);
        write_hf(&source, Some(&rotations), &scheme, overwrite(&quantised), |_| {})?;

        // The same by GPTQ.
        let calibrated = dir.join(name).join("hf-gptq");
        let text =
            Windows::new((0..8 * SEQ as u32).map(|i| (i * i * 5 + i / 3) % config.vocab_size as u32).collect::<Vec<_>>(), SEQ)?;
        let files = Source::open(&source, &config)?;
        let rotated = Rotated::open(&files, Some(&rotations), &scheme, &Device::Cpu)?;
        let output = Output { source: Some(&source), ..overwrite(&calibrated) };
        let go_on = |_: &LayerReport| ControlFlow::Continue(());
        write_quantized(&rotated, &Gptq::default(), Some(&Calibration::first(&text, 8)?), output, go_on)?;

        let tokens: Vec<u32> = (0..2 * SEQ as u32).map(|i| (i * i * 7 + 3 * i + 1) % config.vocab_size as u32).collect();
        let logits = |folder: &Path| {
            let model = Llama::load(folder, DType::F32, &Device::Cpu)?;
            model.merge(None, &Scheme::FULL_PRECISION)?.logits(&tokens, SEQ)
        };
        let ours = BTreeMap::from([
            ("logits".to_string(), logits(&source)?),
            ("logits-w4".to_string(), logits(&quantised)?),
            ("logits-gptq".to_string(), logits(&calibrated)?),
            ("tokens".to_string(), Tensor::from_vec(tokens.iter().map(|t| *t as f32).collect(), [2, SEQ])?),
        ]);
        io::save_tensors(&dir.join(name).join("ours.safetensors"), &ours, &BTreeMap::new())?;
        if name == "gqa" {
            let native = dir.join("native");
            let output = Output { overwrite: true, ..Output::new(&native, Format::Native) };
            write_rtn(&Llama::load(&source, DType::F32, &Device::Cpu)?, Some(&rotations), &Scheme::new(4, 4, 4), output, |_| {})?;
        }
    }
    write_seed(dir)?;
    for dtype in [DType::F32, DType::F64] {
        let r = Rotations::random_orthogonal(80, 16, 11, 3)?.to_dtype(dtype)?;
        r.save_torch(&dir.join(format!("R-{dtype}.bin")))?;
        r.save(&dir.join(format!("R-{dtype}.safetensors")))?;
    }
    println!("wrote {}", dir.display());
    Ok(())
}

/// A text's token ids, as every command reads them.
fn tokens(model: &Path, text: &Path, file: &Path) -> Result<()> {
    let ids = Tokenizer::from_dir(model)?.encode_stream(&data::read_text(text)?, Bos::Auto)?;
    let bytes: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
    std::fs::write(file, bytes).map_err(Error::io(file))
}

/// The smallest native output, as the fuzz target `native` takes it: `fuzz/seeds/native/small`.
fn write_seed(dir: &Path) -> Result<()> {
    let (source, out) = (dir.join("seed/source"), dir.join("seed/native"));
    let small =
        LlamaConfig { hidden_size: 2, intermediate_size: 3, layers: 1, head_dim: 2, vocab_size: 3, ..tiny::config(1, 1, true) };
    tiny::write(&source, &small, DType::F32, 1, true);
    let scheme = Scheme { symmetric_weights: false, ..Scheme::new(4, 4, 4) };
    let model = Llama::load(&source, DType::F32, &Device::Cpu)?;
    let rotations = Rotations::random_hadamard(2, 2, 1, 2)?;
    write_rtn(&model, Some(&rotations), &scheme, Output { overwrite: true, ..Output::new(&out, Format::Native) }, |_| {})?;
    let read = |name: &str| std::fs::read(out.join(name)).map_err(Error::io(&out));
    let seed = [&read("spinquant.json")?, &[0][..], &read("model.safetensors")?].concat();
    let path = dir.join("seed/small");
    std::fs::write(&path, seed).map_err(Error::io(&path))
}

/// Folders of compressed-tensors, each with the weights that it stands for, its activations with their codes, and its logits in f32.
fn compressed(dir: &Path) -> Result<()> {
    let base = LlamaConfig { hidden_size: 64, intermediate_size: 96, layers: 3, vocab_size: 97, ..tiny::config(8, 2, false) };
    let rotations = Rotations::random_hadamard(base.hidden_size, base.head_dim, base.layers, 2)?;
    let scheme = |weights, activations| Scheme::new(weights, activations, 16).online(Online::NONE);
    let grouped = |scheme| Scheme { weight_group: Some(32), ..scheme };
    let zeros = |scheme| Scheme { symmetric_weights: false, ..scheme };
    let symmetric = |scheme| Scheme { symmetric_activations: true, ..scheme };
    let cases = [
        ("channel", scheme(4, 16), false),
        ("group", grouped(scheme(4, 16)), false),
        ("channel-asymmetric", zeros(scheme(4, 16)), false),
        ("group-asymmetric", zeros(grouped(scheme(4, 16))), false),
        ("group-gptq", grouped(scheme(4, 16)), true),
        ("group-8-bits", grouped(scheme(8, 16)), false),
        ("channel-3-bits", scheme(3, 16), false),
        ("w4a8", symmetric(scheme(4, 8)), false),
        ("w4a4", symmetric(scheme(4, 4)), false),
        ("w4a4-group", symmetric(grouped(scheme(4, 4))), true),
        ("w4a4-asymmetric", scheme(4, 4), false),
        ("group-r4", grouped(scheme(4, 16)).online(Online { r3: false, r4: R4::Blocks(32) }), false),
    ];
    for (name, scheme, gptq) in cases {
        for dtype in [DType::F32, DType::BF16] {
            let config = if name == "channel" { tiny::with_biases(base.clone()) } else { base.clone() };
            let folder = dir.join(format!("{name}-{dtype}"));
            let (source, out) = (folder.join("source"), folder.join("compressed"));
            tiny::write(&source, &config, dtype, 1, true);
            let files = Source::open(&source, &config)?;
            let scheme = Format::CompressedTensors.holds(&scheme);
            let rotated = Rotated::open(&files, Some(&rotations), &scheme, &Device::Cpu)?;
            let output = Output { overwrite: true, source: Some(&source), ..Output::new(&out, Format::CompressedTensors) };
            let ids = |n: u32| (0..n).map(|i| (i * i * 5 + i / 3) % config.vocab_size as u32).collect::<Vec<_>>();
            let text = Windows::new(ids(8 * SEQ as u32), SEQ)?;
            let go_on = |_: &LayerReport| ControlFlow::Continue(());
            match gptq {
                true => write_quantized(&rotated, &Gptq::default(), Some(&Calibration::first(&text, 8)?), output, go_on)?,
                false => write_quantized(&rotated, &Rtn, None, output, go_on)?,
            }
            let network = Compressed::read(&out)?.load(DType::F32, &Device::Cpu)?;
            let tokens: Vec<u32> = (0..2 * SEQ as u32).map(|i| (i * i * 7 + 3 * i + 1) % config.vocab_size as u32).collect();
            let mut ours = BTreeMap::from([
                ("logits".to_string(), network.logits(&tokens, SEQ)?),
                ("tokens".to_string(), Tensor::from_vec(tokens.iter().map(|t| *t as f32).collect(), [2, SEQ])?),
            ]);
            for (l, block) in network.blocks.iter().enumerate() {
                ours.extend(block.weights.iter().map(|(linear, w)| (format!("{}.weight", linear.path(l)), w.weight.clone())));
            }
            let seen = Arc::new(Mutex::new(BTreeMap::new()));
            let (into, sites) = (seen.clone(), scheme.sites(config.head_dim));
            network.observe(&tokens, SEQ, move |layer, site, x| {
                let spec = sites.at(site);
                if spec.is_active() {
                    let codes = quantize(x, spec)?.codes.into_iter().map(f32::from).collect();
                    let shape = [2, SEQ, x.len() / (2 * SEQ)];
                    let codes = Tensor::from_vec(codes, shape)?;
                    let values = x.to_dtype(DType::F32)?.reshape(shape)?;
                    let mut into = into.lock().expect("no panic");
                    into.insert(format!("{layer}.{}.codes", site.name()), codes);
                    into.insert(format!("{layer}.{}.values", site.name()), values);
                }
                Ok(())
            })?;
            ours.append(&mut seen.lock().expect("no panic"));
            io::save_tensors(&folder.join("ours.safetensors"), &ours, &BTreeMap::new())?;
        }
    }
    println!("wrote {}", dir.display());
    Ok(())
}

/// `torch-*.bin` must hold what the `.safetensors` of the same name does, bit for bit.
fn read(dir: &Path) -> Result<()> {
    for dtype in [DType::F32, DType::F64] {
        let path = dir.join(format!("torch-{dtype}.bin"));
        let (ours, theirs) = (Rotations::read_torch(&path)?, Rotations::load(&path.with_extension("safetensors"))?);
        let bits = |r: &Rotations| -> Result<Vec<u64>> {
            Ok([r.r1.to_f64_vec()?, r.r2.to_f64_vec()?].concat().iter().map(|x| x.to_bits()).collect())
        };
        let same = ours.r1.dtype() == dtype && ours.r2.shape() == theirs.r2.shape() && bits(&ours)? == bits(&theirs)?;
        if !same {
            return Err(Error::format(&path, "differs from its safetensors twin"));
        }
        println!("{}: the same bits", path.display());
        for line in ours.report()? {
            println!("  {line}");
        }
    }
    Ok(())
}
