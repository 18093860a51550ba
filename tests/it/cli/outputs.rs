//! `quantize` and `rotations`.

use super::*;

#[test]
fn quantized_models_are_written_and_read_back() {
    let place = Place::new();
    let scheme = "--scheme W4A4KV4 --rotations hadamard:3";
    let perplexity = |args: &str| number(&place.json(args), "perplexity").to_bits();
    let quantize = |rest: &str| place.run(&format!("quantize --model model --device cpu --seq-len 16 {rest}"));
    let calibration = "--calibration text.txt --calibration-windows 16";

    assert!(quantize(&format!("{scheme} --out rtn")).status.success());
    let native = perplexity("eval --model rtn --device cpu --seq-len 16 --text text.txt --json");
    assert_eq!(native, perplexity(&format!("{EVAL} {scheme} --json")), "round to nearest");

    assert!(quantize(&format!("{scheme} --weights gptq {calibration} --out gptq")).status.success());
    let native = perplexity("eval --model gptq --device cpu --seq-len 16 --text text.txt --json");
    assert_eq!(native, perplexity(&format!("{EVAL} {scheme} --weights gptq {calibration} --json")), "GPTQ");

    // A successor: the same network in the folder, which says what it was; its constant may be said again, not changed.
    assert!(quantize(&format!("{scheme} --weights qep {calibration} --out qep")).status.success());
    let written = "eval --model qep --device cpu --seq-len 16 --text text.txt --json";
    let qep = perplexity(written);
    assert_eq!(qep, perplexity(&format!("{EVAL} {scheme} --weights qep:0.5 {calibration} --json")), "QEP");
    assert_eq!(qep, perplexity(&format!("{written} --weights qep:0.5")));
    assert_ne!(qep, native);
    place.fails(&format!("{written} --weights qep:0.6"), &["qep:0.5, which cannot be changed; got qep:0.6"]);
    let record: serde_json::Value = serde_json::from_slice(&place.read("qep/spinquant.json")).unwrap();
    let provenance = &record["provenance"];
    assert_eq!((&provenance["weights"], &provenance["notes"]["calibrate_quantized"]), (&"qep:0.5".into(), &true.into()));

    assert!(quantize("--scheme W16A16KV16 --online none --rotations hadamard:3 --format hf --out hf").status.success());
    let exact = number(&place.json(&format!("{EVAL} --scheme W16A16KV16 --json")), "perplexity");
    let merged =
        number(&place.json("eval --model hf --scheme W16A16KV16 --device cpu --seq-len 16 --text text.txt --json"), "perplexity");
    assert!((merged / exact - 1.0).abs() < 1e-5, "{merged} against {exact}");

    let plain = "--scheme W4A16KV16 --online none --rotations hadamard:3";
    assert!(quantize(&format!("{plain} --weights gptq {calibration} --format hf --out hf-gptq")).status.success());
    let read = |model: &str| {
        let args = format!("eval --model {model} --scheme W16A16KV16 --device cpu --seq-len 16 --text text.txt --json");
        number(&place.json(&args), "perplexity")
    };
    let gptq = number(&place.json(&format!("{EVAL} {plain} --weights gptq {calibration} --json")), "perplexity");
    assert!((read("hf-gptq") / gptq - 1.0).abs() < 1e-3, "{} against {gptq}", read("hf-gptq"));
    let record: serde_json::Value = serde_json::from_slice(&place.read("hf-gptq/spinquant.json")).unwrap();
    let provenance = &record["provenance"];
    assert_eq!((&provenance["seeds"]["rotations"], &provenance["weights"]), (&3.into(), &"gptq".into()));
    assert_eq!((&provenance["notes"]["damping"], &provenance["notes"]["device"]), (&0.01.into(), &"cpu".into()));
    assert_eq!(provenance["calibration_sha256"].as_str().map(str::len), Some(64));
    assert!(provenance["command"].as_str().unwrap().contains("--format hf"));

    let fails =
        |rest: &str, parts: &[&str]| place.fails(&format!("quantize --model model --device cpu --seq-len 16 {rest}"), parts);
    fails(&format!("{scheme} --out rtn"), &["rtn", "not empty"]);
    fails(&format!("{scheme} --weights gptq --out new"), &["--calibration"]);
    fails(
        &format!("{scheme} --weights gptq --calibration text.txt --calibration-windows 9999 --out new"),
        &["1 to 100 windows", "9999"],
    );
    fails(&format!("{scheme} --format hf --out new"), &["format hf", "r3,r4"]);
    fails(&format!("{plain} --format hf --dtype bf16 --out new"), &["--dtype", "files"]);
    assert!(!place.path("new").exists());
}

/// Killed after its first layer, into either format.
#[test]
fn a_killed_quantize_continues_to_the_same_bytes() {
    let place = Place::new();
    for (format, scheme, weights) in [
        ("native", "--scheme W4A4KV4", "gptq"),
        ("native", "--scheme W4A4KV4", "gptaq:0.3"),
        ("hf", "--scheme W4A16KV16 --online none", "gptq"),
    ] {
        let args = |out: &str| {
            format!(
                "quantize --model model --device cpu --seq-len 16 {scheme} --rotations hadamard:3 --weights {weights} \
                 --calibration text.txt --calibration-windows 100 --format {format} --out {out}"
            )
        };
        let tensors = |out: &str| place.read(&format!("{out}/model.safetensors"));
        assert!(place.run(&args("whole")).status.success());
        let mut landed = false;
        for _ in 0..20 {
            let mut child = place.command(&args("out")).spawn().unwrap();
            let first = place.path(".out.partial/layer-00000.safetensors");
            while !first.exists() && child.try_wait().unwrap().is_none() {
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
            let _ = child.kill();
            child.wait().unwrap();
            landed = !place.path("out").exists() && first.exists();
            if landed {
                break;
            }
            let _ = std::fs::remove_dir_all(place.path("out"));
        }
        assert!(landed, "never killed between the first layer and the end");
        assert!(place.run(&args("out")).status.success());
        assert!(tensors("out") == tensors("whole"), "{format}: tensors differ after continuing");
        assert!(!place.path(".out.partial").exists());
        // Other settings do not continue it.
        let mut child = place.command(&args("other")).spawn().unwrap();
        while !place.path(".other.partial/run.json").exists() && child.try_wait().unwrap().is_none() {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        let _ = child.kill();
        child.wait().unwrap();
        if !place.path("other").exists() {
            place.fails(
                &format!("{} --damping 0.02", args("other")),
                &["unfinished output of another run", "provenance.notes.damping was 0.01, now 0.02;"],
            );
        }
        for dir in ["whole", "out", "other", ".other.partial"] {
            let _ = std::fs::remove_dir_all(place.path(dir));
        }
    }
}

#[test]
fn rotations_are_checked_and_translated() {
    let place = Place::new();
    let rotations = Rotations::random_orthogonal(24, 8, 2, 5).unwrap().to_dtype(spinquant::DType::F32).unwrap();
    rotations.save(&place.path("R.safetensors")).unwrap();
    for args in ["rotations convert R.safetensors R.bin", "rotations convert R.bin again.safetensors"] {
        assert!(place.run(args).status.success(), "{args}");
    }
    let again = Rotations::load(&place.path("again.safetensors")).unwrap();
    let error = |a: &Tensor, b: &Tensor| {
        let (a, b) = (a.to_f64_vec().unwrap(), b.to_f64_vec().unwrap());
        a.iter().zip(&b).fold(0f64, |m, (a, b)| m.max((a - b).abs()))
    };
    assert!(error(&rotations.r1, &again.r1) < 1e-6 && error(&rotations.r2, &again.r2) < 1e-6);
    let report = String::from_utf8(place.run("rotations check R.bin").stdout).unwrap();
    assert_eq!(report.lines().count(), 3, "{report}");
    assert!(report.lines().all(|l| l.contains("max|RᵀR−I|") && l.contains("det")), "{report}");

    let bent = Rotations::new(ops::randn([24, 24], 1), rotations.r2.to_dtype(spinquant::DType::F64).unwrap());
    bent.save(&place.path("bent.safetensors")).unwrap();
    let out = place.run("rotations check bent.safetensors");
    assert!(!out.status.success() && String::from_utf8_lossy(&out.stderr).contains("R1 is not orthogonal"));
    place.fails("rotations convert bent.safetensors bent.bin", &["bent.safetensors", "R1"]);
    assert!(!place.path("bent.bin").exists());
}
