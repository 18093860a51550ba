//! Clip ratios that follow an objective of their own, from the command line.

use super::*;

#[test]
fn clip_ratios_follow_an_objective_of_their_own() {
    let place = Place::new();
    let learn = |args: &str, out: &str| {
        place.json(&format!("{} --steps 1 --lr 0.5 --json {args}", LEARN.replace("R.safetensors", out)));
        Rotations::load_with(&place.path(out)).unwrap()
    };
    let (mixed, notes) = learn("--objective cross-entropy --clip-objective kl", "A.safetensors");
    assert_eq!((notes["objective"].as_str(), notes["clip_objective"].as_str()), ("cross-entropy", "kl"));
    let (text, notes) = learn("--objective cross-entropy", "B.safetensors");
    assert!(!notes.contains_key("clip_objective"));
    let (faithful, _) = learn("--objective kl", "C.safetensors");
    let clips = |r: &Rotations| r.clips.get(spinquant::quant::Site::Key).unwrap().to_f64_vec().unwrap();
    assert_eq!(mixed.r1.to_f64_vec().unwrap(), text.r1.to_f64_vec().unwrap());
    assert_eq!(clips(&mixed), clips(&faithful));
    assert_ne!(clips(&mixed), clips(&text));
}

/// Before anything is loaded: the folder of the model holds no weights.
#[test]
fn what_cannot_have_one_is_refused_first() {
    let place = Place::new();
    std::fs::remove_file(place.path("model/model.safetensors")).unwrap();
    let fails = |args: &str, parts: &[&str]| place.fails(&format!("{LEARN} --steps 1 {args}"), parts);
    fails("--clip-objective whip", &["clip objective", "expected one of the whole network, got whip"]);
    fails("--clip-objective mse", &["--clip-objective", "expected one of cross-entropy, ", "got \"mse\""]);
    for args in ["--clip error", "--recipe published", "--scheme W4A16KV16", "--dry-run --clip none"] {
        fails(&format!("--weight-clip search --clip-objective kl {args}"), &["clip objective", "kl has nothing to move"]);
    }
    // A plan knows both passes: the larger one's bytes, and the time of both.
    let planned = |args: &str| {
        let plan = place.json(&format!("{LEARN} --dry-run --json {args}"));
        (plan["clip_objective"].clone(), number(&plan, "peak_bytes"), number(&plan, "seconds_per_step"))
    };
    let (text, faithful) = (planned("--objective cross-entropy"), planned("--objective kl"));
    let both = planned("--objective cross-entropy --clip-objective kl");
    assert_eq!((&text.0, &both.0), (&Value::Null, &json!("kl")));
    assert_eq!((both.1, both.2), (text.1.max(faithful.1), text.2 + faithful.2));
}
