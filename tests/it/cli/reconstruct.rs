//! `--reconstruct`: what is learned behind a quantiser is what a folder holds.

use super::*;

#[test]
fn what_is_learned_is_scored_written_and_read_back() {
    let place = Place::new();
    let scheme = "--scheme W4A4KV4 --rotations hadamard:3";
    let learn = "--calibration text.txt --calibration-windows 16 --reconstruct-steps 5";
    let perplexity = |args: &str| number(&place.json(args), "perplexity").to_bits();
    let mut seen = vec![perplexity(&format!("{EVAL} {scheme} --json"))];
    for (weights, what) in [("rtn", "clips,scales"), ("gptq", "clips"), ("gptaq:0.25", "scales")] {
        let args = format!("{scheme} --weights {weights} {learn} --reconstruct {what}");
        let out = place.run(&format!("quantize --model model --device cpu --seq-len 16 {args} --out {weights}"));
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(out.status.success() && said.contains("reconstruction of 2 layers"), "{said}");
        let read = format!("eval --model {weights} --device cpu --seq-len 16 --text text.txt --json");
        let native = perplexity(&read);
        assert_eq!(native, perplexity(&format!("{EVAL} {args} --json")), "{weights} {what}");
        assert!(!seen.contains(&native), "{weights} {what}");
        seen.push(native);
        let record: Value = serde_json::from_slice(&place.read(&format!("{weights}/spinquant.json"))).unwrap();
        let notes = &record["provenance"]["notes"];
        assert_eq!((&notes["reconstruct"], &notes["reconstruct_steps"]), (&what.into(), &5.into()));
        assert_eq!((&record["provenance"]["weights"], &notes["calibrate_quantized"]), (&weights.into(), &true.into()));
        place.fails(&format!("{read} --reconstruct clips"), &["--reconstruct", "cannot be changed"]);
    }
    // A Hugging Face folder holds scales, and no clip constants.
    let hf = "quantize --model model --device cpu --seq-len 16 --rotations none --scheme W4A4KV16 --online none --format hf --weights gptq";
    assert!(place.run(&format!("{hf} {learn} --reconstruct scales --out hf")).status.success());
    place.fails(&format!("{hf} {learn} --reconstruct clips --out new"), &["spinquant-hf has no clip constants"]);
    place.fails(&format!("{EVAL} {scheme} --reconstruct clips"), &["--reconstruct", "--calibration"]);
    place.fails(&format!("{EVAL} {learn} --reconstruct clips --scheme W4A16KV16"), &["clips", "W4A16KV16"]);
    place.fails(&format!("{EVAL} {scheme} {learn} --reconstruct codes"), &["expected clips, scales or clips,scales"]);
    place.fails(&format!("{EVAL} {scheme} {learn} --reconstruct clips --reconstruct-lr 0"), &["rate above 0"]);
    assert!(!place.path("new").exists());
}

#[test]
fn compare_has_a_row_with_and_one_without() {
    let place = Place::new();
    let args = "--device cpu --seq-len 16 --calibration text.txt --text text.txt --seeds 1 --learn-seeds 0";
    let compare =
        format!("compare --model model {args} --calibration-windows 16 --reconstruct clips,scales --reconstruct-steps 30");
    let value = place.json(&format!("{compare} --weights gptq,gptaq:0.25 --json"));
    let rows = value["rows"].as_array().unwrap();
    let scored = |name: &str| {
        let row = rows.iter().find(|row| row["name"] == name).unwrap_or_else(|| panic!("no row {name}"));
        number(row, "perplexity")
    };
    for name in ["gptq", "gptaq:0.25"] {
        assert_ne!(scored(name), scored(&format!("{name}+clips+scales")));
        assert_ne!(scored(&format!("hadamard + {name} mean")), scored(&format!("hadamard + {name}+clips+scales mean")));
    }
    place.fails(&compare, &["--reconstruct", "needs --weights"]);
}
