//! Blocks of floating-point numbers from the command line.

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
    place.fails(&format!("{EVAL} --scheme MXFP4 --weight-group 8"), &["blocks of 32"]);
    place.fails(
        "quantize --model synthetic:tiny --device cpu --rotations hadamard --scheme NVFP4 --out packed",
        &["format spinquant-native", "a scheme of integers", "WNVFP4ANVFP4KV16"],
    );
}
