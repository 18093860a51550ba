//! Scales learned with the rotations, and fidelity, from the command line.

use super::*;

#[test]
fn scales_are_learned_written_read_and_scored() {
    let place = Place::new();
    let learn = format!("{LEARN} --steps 4 --lr 0.5 --scale-lr 0.01 --recipe published --clip error --json");
    let report = place.json(&format!("{learn} --transforms r1,r2,up-down,values,rope-pairs"));
    for name in ["kl_first", "kl_last", "top1_first", "top1_last"] {
        assert!(number(&report, name) > 0.0, "{name}: {report}");
    }
    let (rotations, notes) = Rotations::load_with(&place.path("R.safetensors")).unwrap();
    assert_eq!((notes["transforms"].as_str(), notes["format_version"].as_str()), ("r1,r2,up-down,values,rope-pairs", "2"));
    assert_eq!(rotations.transforms().to_string(), notes["transforms"]);
    let out = place.run("rotations check R.safetensors");
    let text = String::from_utf8(out.stdout).unwrap();
    assert!(out.status.success() && text.contains("scales up-down") && text.contains("[2, 56]"), "{text}");
    assert!(text.contains("scales rope-pairs") && text.contains("angles from"), "{text}");
    assert!(text.contains("scales values") && !text.contains("scales norms"), "{text}");

    // They change the quantised network, not the full-precision one.
    let kl = |args: &str| place.json(&format!("{EVAL} --json {args}"))["fidelity"]["kl"]["mean"].as_f64().unwrap();
    assert!(kl("--scheme W16A16KV16 --rotations R.safetensors").abs() < 1e-6);
    let scaled = kl("--rotations R.safetensors");
    Rotations::new(rotations.r1, rotations.r2).save(&place.path("plain.safetensors")).unwrap();
    assert!((scaled / kl("--rotations plain.safetensors") - 1.0).abs() > 1e-6);

    // Those of a start are kept and learned on.
    let to = |out: &str| learn.replace("--out R.safetensors", &format!("--out {out} --start R.safetensors"));
    place.json(&format!("{} --transforms r1,r2-heads,norms,values-general", to("more.safetensors")));
    let (_, notes) = Rotations::load_with(&place.path("more.safetensors")).unwrap();
    assert_eq!(notes["transforms"], "r1,r2-heads,up-down,values,norms,rope-pairs,values-general");
    let out = place.run("rotations check more.safetensors");
    let text = String::from_utf8(out.stdout).unwrap();
    assert!(out.status.success() && text.contains("R2[1, 1]") && text.contains("R2b[1, 1]"), "{text}");
    place.fails(&to("R.bin").replace("--clip error", "--clip none"), &["R.bin", "R1 and R2 only"]);
}

/// Before anything is loaded: the folder of the model holds no weights.
#[test]
fn what_cannot_be_is_refused_first() {
    let place = Place::new();
    place.json(&format!("{LEARN} --steps 1 --transforms all --json"));
    let other = |c: &mut Value| c["intermediate_size"] = json!(40);
    assert!(place.run("quantize --model model --device cpu --out packed --rotations R.safetensors").status.success());
    std::fs::remove_file(place.path("model/model.safetensors")).unwrap();
    let learn = |args: &str, parts: &[&str]| place.fails(&format!("{LEARN} --steps 1 {args}"), parts);
    let to_torch = LEARN.replace("R.safetensors", "R.bin");
    learn("--transforms up-down", &["r1 and r2 among them"]);
    learn("--transforms r1,r2,gains", &["up-down, values, norms", "gains"]);
    learn("--scale-lr 0 --transforms all", &["learning rate of scales", "above 0"]);
    learn("--transforms all --objective whip", &["whip does not depend on scales", "up-down"]);
    let parts = &["R.bin", "R1 and R2 only", "--recipe published"];
    place.fails(&format!("{to_torch} --steps 1 --transforms all --clip none"), parts);
    place.fails("rotations convert R.safetensors R.bin", &["R.bin", "R1 and R2 only"]);
    let packed = EVAL.replace("--model model", "--model packed");
    place.fails(&format!("{packed} --fidelity-text text.txt"), &["--fidelity-text", "--full-precision DIR"]);
    let mut changed = config();
    other(&mut changed);
    place.config(changed);
    place.fails(&format!("{EVAL} --rotations R.safetensors"), &["R.safetensors", "scales up-down", "[2, 40]", "[2, 56]"]);
}

#[test]
fn fidelity_of_a_packed_model_is_to_what_it_was_made_from() {
    let place = Place::new();
    assert!(place.run("quantize --model model --device cpu --out packed --rotations hadamard:1").status.success());
    let packed = format!("{} --json", EVAL.replace("--model model", "--model packed"));
    assert!(place.json(&packed)["fidelity"].is_null());
    let of = |args: &str| place.json(args)["fidelity"].clone();
    let want = of(&format!("{EVAL} --rotations hadamard:1 --json"));
    let got = of(&format!("{packed} --full-precision model"));
    let kl = |f: &Value| f["kl"]["mean"].as_f64().unwrap();
    assert!((kl(&got) / kl(&want) - 1.0).abs() < 1e-4, "{got} {want}");
    assert!(of(&format!("{EVAL} --no-fidelity --json")).is_null());
    // One window has no standard error, several have.
    let lines = |args: &str| String::from_utf8(place.run(&format!("{EVAL} --rotations hadamard:1 {args}")).stdout).unwrap();
    let one = lines("--max-windows 1");
    assert!(one.contains("fidelity: KL ") && !one.contains("NaN") && !one.contains('±'), "{one}");
    assert!(lines("").contains('±'));
    let both = place.json(&format!("{EVAL} --rotations hadamard:1 --fidelity-text text.txt --json"));
    assert_eq!(both["fidelity"], both["fidelity_other"]);
}

#[test]
fn clip_constants_are_learned_written_read_and_scored() {
    let place = Place::new();
    let learn = format!("{LEARN} --steps 4 --lr 0.5 --transforms published --weight-clip search --json");
    let report = place.json(&format!("{learn} --clip learned"));
    assert!(report["clip"]["ratios"].is_object() || !report["clip"].is_null(), "{report}");
    let (rotations, notes) = Rotations::load_with(&place.path("R.safetensors")).unwrap();
    assert_eq!((notes["clips"].as_str(), notes["format_version"].as_str()), ("learned", "3"));
    let text = String::from_utf8(place.run("rotations check R.safetensors").stdout).unwrap();
    assert!(text.contains("clips key") && text.contains("lower end"), "{text}");

    // They count at their bits, and where no ratios are given.
    let perplexity = |args: &str| number(&place.json(&format!("{EVAL} --json {args}")), "perplexity");
    let learned = perplexity("--rotations R.safetensors");
    rotations.clone().with_clips(Default::default()).save(&place.path("plain.safetensors")).unwrap();
    let apart = |a: f64, b: f64| (a / b - 1.0).abs() > 1e-7;
    assert!(apart(learned, perplexity("--rotations plain.safetensors")));
    let given = "--activation-clip 0.9";
    assert!(!apart(
        perplexity(&format!("--rotations R.safetensors {given}")),
        perplexity(&format!("--rotations plain.safetensors {given}"))
    ));
    let other = "--scheme W4A8KV8";
    assert!(!apart(
        perplexity(&format!("--rotations R.safetensors {other}")),
        perplexity(&format!("--rotations plain.safetensors {other}"))
    ));

    // A native folder runs as they say; others say that they hold none; so does an R.bin, before it is learned.
    let quantize = |args: &str| place.run(&format!("quantize --model model --device cpu --rotations R.safetensors {args}"));
    assert!(quantize("--out packed").status.success());
    let packed = number(&place.json(&format!("{} --json", EVAL.replace("--model model", "--model packed"))), "perplexity");
    assert!((packed / learned - 1.0).abs() < 1e-5, "{packed} {learned}");
    let hf = quantize("--out hf --format hf --online none");
    assert!(hf.status.success());
    let said = String::from_utf8(hf.stderr).unwrap();
    assert!(said.contains("hf has no clip constants"), "{said}");
    place.fails(&format!("{} --clip learned", learn.replace("R.safetensors", "R.bin")), &["R.bin", "clip"]);
    place.fails(&format!("{learn} --clip learned --objective whip"), &["whip does not depend on clip ratios"]);
    place.fails(&format!("{learn} --clip learned --clip-lr 0"), &["learning rate of clip ratios"]);

    // A start's are learned on; searched ratios stand in their place.
    let from = |args: &str| {
        place.json(&format!("{} --start R.safetensors {args}", learn.replace("--out R.safetensors", "--out S.safetensors")))
    };
    from("");
    let more = Rotations::load(&place.path("S.safetensors")).unwrap();
    let values = |r: &Rotations| r.clips.get(spinquant::quant::Site::Key).map(|t| t.to_f64_vec().unwrap());
    assert!(values(&more).is_some() && values(&more) != values(&rotations));
    from("--clip error");
    assert!(Rotations::load(&place.path("S.safetensors")).unwrap().clips.is_empty());
}

/// A recipe stands for its options, and options stand in place of a recipe's.
#[test]
fn recipes_are_options_that_go_together() {
    let place = Place::new();
    let learn = |args: &str, out: &str| {
        let learn = LEARN.replace("R.safetensors", out);
        place.json(&format!("{learn} --steps 2 --lr 0.5 --json {args}"));
        Rotations::load_with(&place.path(out)).unwrap()
    };
    let bits = |r: &Rotations| r.tensors().into_iter().map(|(name, t)| (name, t.to_f64_vec().unwrap())).collect::<Vec<_>>();
    let same = [
        ("--recipe published", "--transforms published --objective cross-entropy --clip none --weight-clip search"),
        (
            "--recipe faithful",
            "--objective kl --clip learned --clip-lr 0.03 --scale-lr 0.01 --transforms r1,r2-heads,up-down,values,rope-pairs",
        ),
        ("", "--recipe faithful"),
        ("--recipe perplexity", "--recipe faithful --objective cross-entropy"),
        ("--optimizer cayley-parity", "--recipe published --optimizer cayley-parity"),
        ("--objective whip", "--recipe published --clip error --objective whip"),
    ];
    for (recipe, options) in same {
        let ((ours, notes), (want, others)) = (learn(recipe, "A.safetensors"), learn(options, "B.safetensors"));
        assert_eq!(bits(&ours), bits(&want), "{recipe}");
        assert_eq!(notes, others, "{recipe}");
    }
    // Clip ratios that are learned take memory, and plans say so.
    let planned = |args: &str| number(&place.json(&format!("{LEARN} --dry-run --json {args}")), "peak_bytes");
    assert!(planned("--clip learned") > planned("--clip error"));
    for command in ["learn", "demo"] {
        let help = String::from_utf8(place.run(&format!("{command} --help")).stdout).unwrap();
        assert!(help.contains("[default: faithful; of demo: published]"), "{help}");
    }
    // What is given counts more, also where the recipe's own would be refused.
    place.json(&format!(
        "{LEARN} --steps 2 --json --recipe faithful --transforms published --clip none --weight-clip search --objective whip"
    ));
    let compare = "compare --model model --device cpu --seq-len 16 --calibration text.txt --text text.txt --seeds 1 --learn-seeds 1 --steps 2";
    let table = place.json(&format!("{compare} --batch 4 --held-out 8 --gptq --calibration-windows 8 --json"));
    let rows = table["rows"].as_array().unwrap();
    assert!(rows.iter().any(|row| row["name"] == "learned + learned clip + gptq"), "{table}");
    place.fails(&format!("{LEARN} --recipe best"), &["--recipe", "published", "faithful"]);
}
