//! `quantize --format compressed-tensors`, and the folders that it writes.

use super::*;

#[test]
fn compressed_folders_are_written_and_read() {
    let place = Place::new();
    let quantize = |rest: &str| place.run(&format!("quantize --model model --device cpu --seq-len 16 {rest}"));
    let perplexity = |model: &str, rest: &str| {
        let args = format!("eval --model {model} --device cpu --seq-len 16 --text text.txt --json {rest}");
        number(&place.json(&args), "perplexity")
    };
    let format = "--rotations hadamard:3 --online none --format compressed-tensors";
    let calibration = "--weights gptq --calibration text.txt --calibration-windows 16";
    // f32 files hold the scales that are found: the same network as without files.
    for (scheme, out) in [("--scheme W4A16", "w4a16"), ("--scheme W4A16 --weight-group 8", "grouped")] {
        for (how, out) in [("", out.to_string()), (calibration, format!("{out}-gptq"))] {
            let written = quantize(&format!("{format} {scheme} {how} --out {out}"));
            assert!(written.status.success());
            let want = perplexity("model", &format!("{scheme} {how} --rotations hadamard:3 --online none"));
            let got = perplexity(&out, "");
            assert!((got / want - 1.0).abs() < 1e-3, "{out}: {got}, not {want}");
        }
    }
    let written = quantize(&format!("{format} --scheme W4A4KV4 --symmetric-activations --target transformers --out w4a4"));
    assert!(written.status.success());
    let said = String::from_utf8(written.stderr).unwrap();
    assert!(said.contains("KV cache") && said.contains("W4A4sKV16, not W4A4sKV4"), "{said}");
    let want = perplexity(
        "model",
        "--scheme W4A4 --symmetric-activations --activation-clip 0.9333333333333333 --rotations hadamard:3 --online none",
    );
    let got = perplexity("w4a4", "--scheme W4A4");
    // A weight's code that rounds the other way moves the codes of activations behind it.
    assert!((got / want - 1.0).abs() < 2e-2, "{got}, not {want}");
    assert_ne!(got.to_bits(), perplexity("w4a16", "").to_bits(), "activations are quantised");

    let fails = |args: &str, parts: &[&str]| place.fails(args, parts);
    let quantize = |rest: &str| format!("quantize --model model --device cpu {rest}");
    fails(&quantize("--rotations none --format native --target vllm --out q"), &["--target", "compressed-tensors"]);
    fails(&quantize(&format!("{format} --target vllm --scheme W4A4 --out q")), &["target", "--symmetric-activations"]);
    fails(&quantize(&format!("{format} --target tgi --out q")), &["expected transformers or vllm", "tgi"]);
    fails(&quantize(&format!("{format} --scheme W4A4 --activation-clip 0.9 --out q")), &["--activation-clip", "no clip ratios"]);
    fails(&quantize(&format!("{format} --scheme W16A16 --out q")), &["weights of 2 to 8 bits"]);
    fails(
        &quantize("--rotations hadamard --scheme W4A16 --format compressed-tensors --out q"),
        &["expected no R3", "r4=block:N"],
    );
    fails(&quantize(&format!("{format} --dtype bf16 --out q")), &["--dtype", "files"]);
    assert!(!place.path("q").exists());
    let read = "--device cpu --seq-len 16 --text text.txt";
    fails(&format!("eval --model w4a16 {read} --scheme W4A4"), &["--scheme", "W4A16", "W4A4"]);
    fails(&format!("eval --model w4a16 {read} --rotations hadamard"), &["--rotations", "cannot be changed"]);
    fails(&format!("compare --model w4a16 {read} --calibration text.txt"), &["quantization_config: expected none"]);
    // The folder alone says it all: without our record, with the model's own file names.
    std::fs::remove_file(place.path("w4a4/spinquant.json")).unwrap();
    assert_eq!(perplexity("w4a4", "").to_bits(), got.to_bits());
}
