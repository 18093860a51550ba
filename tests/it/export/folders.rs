//! Folders that are begun, ended early, in the way or damaged.

use spinquant::rotation::{Scale, Transforms};

use super::*;

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
    let plain = Scheme::new(4, 16, 16).online(Online::NONE);
    for (format, scheme) in [(Format::Native, Scheme::new(4, 4, 4)), (Format::Hf, plain), (Format::CompressedTensors, plain)] {
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

/// GPTQ into any format, stopped after every layer in turn.
#[test]
fn an_interrupted_gptq_run_ends_in_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let (source, whole, out) = (dir.path().join("source"), dir.path().join("whole"), dir.path().join("out"));
    let config = LlamaConfig { layers: 3, ..tiny::config(4, 2, false) };
    let text = Windows::new((0..16 * 8).map(|i| (i * i * 7 + i / 3) % 31).collect::<Vec<u32>>(), 16).unwrap();
    let calibration = Calibration::first(&text, 8).unwrap();
    let plain = Rotations::random_hadamard(16, 8, 3, 5).unwrap();
    // All that is merged into linears. (Of norms, gains would stay beside the weights that are compared below.)
    let merged = Transforms::new(&[Scale::UpDown, Scale::Values, Scale::RopePairs, Scale::ValuesGeneral]).with_heads(true);
    let mut more = plain.clone().with_transforms(&merged, &config.scale_sizes(), Some(6)).unwrap();
    more.r2b = Some(more.r2.clone());
    more.scales = more.scales.map(|kind, t| randn(t.shape(), kind as u64).scale(0.2)).unwrap();
    for (dtype, r) in [(DType::F32, plain), (DType::BF16, more)] {
        tiny::write(&source, &config, dtype, 9, true);
        let (files, model) = (Source::open(&source, &config).unwrap(), Llama::load(&source, dtype, &Device::Cpu).unwrap());
        for (format, correction) in [
            (Format::Native, Correction::None),
            (Format::Native, Correction::Gptaq(0.25)),
            (Format::Hf, Correction::None),
            (Format::Hf, Correction::Qronos),
            (Format::CompressedTensors, Correction::None),
            (Format::CompressedTensors, Correction::Qep(0.5)),
        ] {
            let gptq = Gptq { correction, ..Gptq::default() };
            let plain = Scheme::new(3, 16, 16).online(Online::NONE);
            let scheme = match format {
                Format::Native => Scheme { weight_group: Some(8), ..Scheme::new(4, 4, 4) },
                Format::Hf => plain,
                Format::CompressedTensors => Scheme { weight_group: Some(8), symmetric_weights: false, ..plain },
            };
            let rotated = match format {
                Format::Native => Rotated::new(&model, Some(&r), &scheme),
                Format::Hf | Format::CompressedTensors => Rotated::open(&files, Some(&r), &scheme, &Device::Cpu),
            }
            .unwrap();
            let write = |dir: &Path, stop: usize| {
                let output = Output { source: Some(&source), ..Output::new(dir, format) };
                write_quantized(&rotated, &gptq, Some(&calibration), output, |report| {
                    if report.done == stop { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
                })
            };
            write(&whole, 0).unwrap();
            for stop in [1, 2] {
                assert!(matches!(write(&out, stop), Err(Error::Interrupted { step }) if step == stop));
                assert!(!out.exists());
                write(&out, 0).unwrap();
                assert_eq!(contents(&out), contents(&whole), "{format:?} {correction} {dtype}, stopped after {stop}");
                std::fs::remove_dir_all(&out).unwrap();
            }
            // What is written is what GPTQ made of the rotated layers.
            let mut blocks = vec![];
            let go_on = |_: &LayerReport| ControlFlow::Continue(());
            let stored = compressed::Stored(dtype, gptq);
            let quantizer: &dyn WeightQuantizer = if format == Format::CompressedTensors { &stored } else { &gptq };
            quantize_layers(&rotated, quantizer, Some(&calibration), &mut (), go_on, |b| blocks.push(b)).unwrap();
            let written = match format {
                Format::CompressedTensors => Compressed::read(&whole).unwrap().load(dtype, &Device::Cpu).unwrap(),
                Format::Native => load_native(&whole, &Device::Cpu).unwrap().model,
                Format::Hf => Llama::load(&whole, dtype, &Device::Cpu).unwrap().merge(None, &PLAIN).unwrap(),
            };
            let (embedding, head) = (rotated.embedding().unwrap(), rotated.head().unwrap());
            same_weights(&written, &Merged { config: config.clone(), scheme, embedding, head, blocks });
            let rounded = Rotated::new(&model, Some(&r), &scheme).unwrap();
            let nearest = export::round_to_nearest(&rounded.block(0).unwrap().weights, &scheme.sites(8).weight).unwrap();
            let gptq = written.blocks[0].weights.tensors().map(|w| w.to_f64_vec().unwrap()).collect::<Vec<_>>();
            assert_ne!(
                gptq[0],
                nearest.0[0].weight.values(dtype).unwrap().to_f64_vec().unwrap(),
                "GPTQ is not rounding to nearest"
            );
            std::fs::remove_dir_all(&whole).unwrap();
        }
    }
}

#[test]
fn folders_that_are_not_free() {
    let config = tiny::config(4, 2, false);
    let (_dir, out, model) = beside_a_model(&config);
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
    fails(write(&scheme, forced()), &["holds mine.txt, which spinquant did not write"]);
    assert_eq!(std::fs::read_to_string(out.join("mine.txt")).unwrap(), "precious");
    std::fs::remove_file(out.join("mine.txt")).unwrap();
    write(&Scheme::new(8, 4, 4), forced()).unwrap();
    write(&scheme, forced()).unwrap();
    std::fs::remove_file(out.join(RECORD)).unwrap();
    fails(write(&scheme, forced()), &["holds no spinquant.json"]);
    std::fs::remove_dir_all(&out).unwrap();
    std::fs::write(&out, "a file").unwrap();
    fails(write(&scheme, forced()), &["out"]);
    std::fs::remove_file(&out).unwrap();

    // Two at once; then an unfinished output of another scheme.
    let writer = Writer::create(plain(), &config, &scheme, DType::F32, None, "").unwrap();
    fails(Writer::create(plain(), &config, &scheme, DType::F32, None, ""), &["another process is writing"]);
    writer.layer(0, &export::round_to_nearest(&model.blocks[0].weights, &scheme.sites(8).weight).unwrap()).unwrap();
    drop(writer);
    fails(
        Writer::create(plain(), &config, &Scheme::new(8, 4, 4), DType::F32, None, ""),
        &["another run", "scheme.weight_bits was 4, now 8"],
    );
    fails(
        Writer::create(plain(), &config, &scheme, DType::F32, None, "other weights"),
        &[r#"weights_sha256 was "", now "other weights""#],
    );
    let writer = Writer::create(forced(), &config, &Scheme::new(8, 4, 4), DType::F32, None, "").unwrap();
    assert!(!writer.has_layer(0));
    fails(load_native(&out, &Device::Cpu), &[RECORD]);
}

/// Layers without the record of whose they are belong to nobody.
#[test]
fn layers_of_another_run_are_never_taken() {
    let config = tiny::config(4, 2, false);
    let (dir, out, model) = beside_a_model(&config);
    let scheme = Scheme::new(4, 4, 4);
    let hadamard = |seed| Rotations::random_hadamard(16, 8, 2, seed).unwrap();
    let write = |dir: &Path, seed| write_rtn(&model, Some(&hadamard(seed)), &scheme, Output::new(dir, Format::Native), |_| {});
    write(&dir.path().join("one"), 1).unwrap();
    for damage in [None, Some("not JSON")] {
        let partial = dir.path().join(".out.partial");
        let run =
            || write_rtn(&model, Some(&hadamard(0)), &scheme, Output::new(&out, Format::Native), |n| assert!(n != 2, "killed"));
        assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(run)).is_err());
        assert!(partial.join("layer-00000.safetensors").exists());
        std::fs::remove_file(partial.join("run.json")).unwrap();
        if let Some(text) = damage {
            std::fs::write(partial.join("run.json"), text).unwrap();
        }
        write(&out, 1).unwrap();
        assert!(contents(&out) == contents(&dir.path().join("one")), "mixed layers");
        std::fs::remove_dir_all(&out).unwrap();
    }
}

#[test]
fn what_the_run_reads_is_not_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let (source, config) = (dir.path().join("source"), tiny::config(4, 2, false));
    tiny::write(&source, &config, DType::F32, 9, true);
    std::fs::write(source.join(RECORD), "{}").unwrap(); // looks like an output of ours
    let before = contents(&source);
    let model = Llama::load(&source, DType::F32, &Device::Cpu).unwrap();
    let write = |out: &Path, inputs: &[&Path]| {
        let inputs = inputs.iter().map(|p| p.to_path_buf()).collect();
        let output = Output { overwrite: true, source: Some(&source), inputs, ..Output::new(out, Format::Native) };
        write_rtn(&model, None, &Scheme::new(4, 4, 4), output, |_| {})
    };
    fails(write(&source, &[]), &["the output would replace", "source"]);
    fails(write(dir.path(), &[]), &["the output would replace", "source"]);
    let out = dir.path().join("out");
    write(&out, &[]).unwrap();
    fails(write(&out, &[&out.join("model.safetensors")]), &["the output would replace", "out/model.safetensors"]);
    write(&out, &[&source]).unwrap();
    assert!(contents(&source) == before);
}

/// A folder that cannot be renamed is filled, and a run that was killed while filling it is continued.
#[test]
fn a_folder_is_filled_where_it_cannot_be_renamed() {
    let config = tiny::config(4, 2, false);
    let (dir, out, model) = beside_a_model(&config);
    let write = |out: &Path, bits, overwrite| {
        let output = Output { overwrite, ..Output::new(out, Format::Native) };
        write_rtn(&model, None, &Scheme::new(bits, 4, 4), output, |_| {})
    };
    let (four, eight) = (dir.path().join("four"), dir.path().join("eight"));
    write(&four, 4, false).unwrap();
    write(&eight, 8, false).unwrap();
    let inside = || std::fs::create_dir_all(out.join(".spinquant.partial")).unwrap();
    inside();
    write(&out, 4, false).unwrap();
    assert_eq!(contents(&out), contents(&four));
    inside();
    fails(write(&out, 8, false), &["not empty"]);
    inside();
    write(&out, 8, true).unwrap();
    assert_eq!(contents(&out), contents(&eight));
    // Half filled: without the mark of that, the folder is somebody's.
    std::fs::remove_dir_all(&out).unwrap();
    inside();
    let run = || write_rtn(&model, None, &Scheme::new(4, 4, 4), Output::new(&out, Format::Native), |n| assert!(n != 2, "killed"));
    assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(run)).is_err());
    std::fs::write(out.join("model.safetensors"), "of whom?").unwrap();
    fails(write(&out, 4, false), &["not empty"]);
    std::fs::write(out.join(".spinquant.partial/publishing"), "").unwrap();
    write(&out, 4, false).unwrap();
    assert_eq!(contents(&out), contents(&four));
    assert!(!dir.path().join(".out.partial").exists());
}

#[cfg(unix)]
#[test]
fn links_to_folders_are_followed() {
    let config = tiny::config(4, 2, false);
    let (dir, out, model) = beside_a_model(&config);
    let real = dir.path().join("real");
    std::os::unix::fs::symlink("real", &out).unwrap();
    for (there, overwrite) in [(false, false), (true, true)] {
        let output = Output { overwrite, ..Output::new(&out, Format::Native) };
        write_rtn(&model, None, &Scheme::new(4, 4, 4), output, |_| {}).unwrap();
        assert!(std::fs::symlink_metadata(&out).unwrap().is_symlink() && real.join(RECORD).is_file(), "{there}");
    }
}

/// A byte in the middle of one tensor tells two models apart.
#[test]
fn a_run_is_not_continued_with_another_model() {
    let dir = tempfile::tempdir().unwrap();
    let (source, out) = (dir.path().join("source"), dir.path().join("out"));
    let config = tiny::config(4, 2, false);
    tiny::write(&source, &config, DType::F32, 9, true);
    let file = source.join("model.safetensors");
    let whole = std::fs::read(&file).unwrap();
    let scheme = Scheme::new(4, 16, 16).online(Online::NONE);
    let write = |format, stop| {
        let files = Source::open(&source, &config).unwrap();
        let model = Llama::load(&source, DType::F32, &Device::Cpu).unwrap();
        let rotated = match format {
            Format::Native => Rotated::new(&model, None, &scheme),
            Format::Hf | Format::CompressedTensors => Rotated::open(&files, None, &scheme, &Device::Cpu),
        };
        write_quantized(&rotated.unwrap(), &spinquant::quant::Rtn, None, Output::new(&out, format), |report| {
            if report.done == stop { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })
    };
    for format in [Format::Native, Format::Hf, Format::CompressedTensors] {
        assert!(matches!(write(format, 1), Err(Error::Interrupted { .. })));
        let mut changed = whole.clone();
        let middle = whole.len() * 2 / 3;
        changed[middle - middle % 4] ^= 1; // the lowest bit of one value
        std::fs::write(&file, &changed).unwrap();
        fails(write(format, 0), &["unfinished output of another run", "weights_sha256 differs"]);
        std::fs::write(&file, &whole).unwrap();
        write(format, 0).unwrap();
        std::fs::remove_dir_all(&out).unwrap();
    }
}

#[test]
fn damaged_native_folders() {
    let config = tiny::config(4, 2, false);
    let (_dir, out, model) = beside_a_model(&config);
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
    fails(with("/format_version", 3.into()), &["version 1 or 2", "version 3"]);
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
