//! Blocks of floating-point numbers from the command line.

use spinquant::export::Format;

use super::*;

#[test]
fn rotations_are_learned_for_blocks_of_floating_point_numbers() {
    let place = Place::new();
    let learn = "learn --model synthetic:tiny --text synthetic --device cpu --seq-len 16 --batch 4 --held-out 8 --json";
    let learned = place.json(&format!("{learn} --scheme MXFP4KV4 --steps 4 --out R.safetensors"));
    let loss = |name: &str| number(&learned, name);
    assert!(loss("held_out_last") < loss("held_out_first") + 0.05, "{learned}");
    let (_, notes) = Rotations::load_with(&place.path("R.safetensors")).unwrap();
    assert_eq!(notes["scheme"].as_str(), "WMXFP4AMXFP4KV4");
    place.fails(
        &format!("{learn} --scheme MXFP4 --clip learned --out other.safetensors"),
        &["ratios are learned of grids of integers, got mxfp4"],
    );
    // Rows of 24 are no blocks.
    place.fails(&format!("{EVAL} --scheme MXFP4"), &["32 does not divide rows of 24"]);
    place.fails(&format!("{EVAL} --scheme MXFP4 --weight-group 8"), &["blocks of 32, got 4 symmetric bits in groups of 8"]);
}

#[test]
fn what_knows_integers_alone_refuses_blocks_before_a_model_is_loaded() {
    let place = Place::new();
    let network = "--model synthetic:tiny --rotations hadamard --device cpu";
    let refused = |args: &str, parts: &[&str]| {
        let args = format!("{args} {network}");
        place.fails(&args, parts);
        assert!(!String::from_utf8_lossy(&place.run(&args).stderr).contains("making"), "{args}");
    };
    refused("quantize --scheme NVFP4 --out packed", &["format native", "a scheme of integers", "WNVFP4ANVFP4KV16"]);
    let eval = "eval --text synthetic --seq-len 16 --calibration synthetic --calibration-windows 2 --reconstruct";
    refused(&format!("{eval} clips --scheme W4AMXFP4KV4"), &["clips: expected activations of integers", "W4AMXFP4KV4"]);
    refused(&format!("{eval} scales --scheme WNVFP4A16"), &["scales: expected weights of integers", "WNVFP4A16"]);
    // A Hugging Face folder has weights alone.
    let held = Format::Hf.holds(&"MXFP4KV4".parse().unwrap());
    assert_eq!((held.to_string().as_str(), held.sites(8).mlp_input.is_active()), ("WMXFP4A16KV16", false));
    // What is learned at integers searches their weights' clip ratios.
    let compare = "compare --model synthetic:tiny --device cpu --text synthetic --calibration synthetic --seq-len 16 --batch 4 --held-out 8 \
        --seeds 1 --steps 2 --recipe published --json";
    let loss = |schemes: &str| place.json(&format!("{compare} {schemes}"))["learned"][0]["held_out_first"].clone();
    let learned = loss("--scheme MXFP4KV4 --learn-scheme W3A4KV4");
    assert!(learned.is_number());
    assert_eq!(learned, loss("--scheme W3A4KV4"));
}
