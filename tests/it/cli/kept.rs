//! What is there stays: outputs are tried before any work, logs are appended to, inputs are not overwritten.

use super::*;

/// Found before the model is loaded: there is none.
#[test]
fn outputs_are_tried_before_anything_is_loaded() {
    let place = Place::new();
    let absent = |args: &str| args.replace("--model model", "--model absent");
    std::fs::create_dir(place.path("folder")).unwrap();
    std::fs::create_dir(place.path("R.safetensors.state")).unwrap();
    let learn = absent(LEARN);
    place.fails(&learn, &["R.safetensors.state", "is a folder"]);
    let clip = absent(&format!("clip {MODEL} --text text.txt --rotations hadamard:1"));
    for (out, parts) in [("folder", "is a folder"), ("folder/absent/R.safetensors", "No such file")] {
        place.fails(&learn.replace("R.safetensors", out), &[out, parts]);
        place.fails(&format!("{clip} --out {out}"), &[out, parts]);
        place.fails(&format!("rotations convert absent.bin {out}"), &[out, parts]);
        place.fails(&format!("{} --log {out}", learn.replace("R.safetensors", "S.safetensors")), &[out, parts]);
    }
    #[cfg(unix)]
    {
        std::os::unix::fs::symlink("gone/R.safetensors", place.path("dangling")).unwrap();
        place.fails(&learn.replace("R.safetensors", "dangling"), &["dangling", "No such file"]);
    }
}

#[test]
fn inputs_are_not_overwritten() {
    let place = Place::new();
    let learn = LEARN.replace("--out R.safetensors", "--steps 2");
    let before = place.read("text.txt");
    for out in ["text.txt", "./model/../text.txt", "model/model.safetensors", "model/config.json"] {
        let expected = if out.ends_with("text.txt") { "is the file of --text" } else { "is a file of the model" };
        place.fails(&format!("{learn} --out {out}"), &["--out", expected]);
        place.fails(&format!("{learn} --out R.safetensors --log {out}"), &["--log", expected]);
    }
    place.fails(&format!("{learn} --out R.safetensors --log R.safetensors"), &["--log", "is the file of --out"]);
    Rotations::random_hadamard(24, 8, 2, 1).unwrap().save(&place.path("S.safetensors")).unwrap();
    place.fails(&format!("{learn} --out R.safetensors --log S.safetensors --start S.safetensors"), &["--log", "--start"]);
    assert_eq!(place.read("text.txt"), before);
    assert!(!place.path("R.safetensors").exists());
}

#[test]
fn a_log_is_appended_to() {
    let place = Place::new();
    std::fs::write(place.path("log"), "{\"step\":1}\na note").unwrap();
    let learn = format!("{LEARN} --steps 2 --log log --json");
    place.json(&learn);
    place.json(&learn);
    let log = String::from_utf8(place.read("log")).unwrap();
    let lines: Vec<&str> = log.lines().collect();
    assert_eq!(&lines[..2], ["{\"step\":1}", "a note"]);
    let steps: Vec<u64> =
        lines[2..].iter().map(|l| serde_json::from_str::<Value>(l).unwrap()["step"].as_u64().unwrap()).collect();
    assert_eq!(steps, [1, 2, 1, 2]);
}

/// The rotations are the result: no state is written that nobody asked for, and one of another run stays.
#[test]
fn a_state_is_kept_only_when_asked_for() {
    let place = Place::new();
    std::fs::write(place.path("R.safetensors.state"), "of another run").unwrap();
    place.json(&format!("{LEARN} --steps 2 --json"));
    assert_eq!(place.read("R.safetensors.state"), b"of another run");
    place.json(&format!("{LEARN} --steps 2 --checkpoint-every 1 --json"));
    assert!(!place.path("R.safetensors.state").exists(), "it has served its purpose");
}

#[test]
fn a_race_that_cannot_start_keeps_the_results_of_the_last() {
    let place = Place::new();
    std::fs::create_dir(place.path("raced")).unwrap();
    for name in ["raced/runs.csv", "raced/curves.csv"] {
        std::fs::write(place.path(name), "an earlier race").unwrap();
    }
    let race = "--device cpu --seq-len 16 --calibration text.txt --text text.txt --entries hadamard --out raced";
    place.fails(&format!("race --model absent {race}"), &["absent"]);
    place.fails(&format!("race --model model {}", race.replace("text.txt", "absent.txt")), &["absent.txt"]);
    assert_eq!(place.read("raced/runs.csv"), b"an earlier race");
    assert_eq!(place.read("raced/curves.csv"), b"an earlier race");
}

/// A picture that cannot be written costs no table.
#[test]
fn results_are_printed_where_a_picture_cannot_be_written() {
    let place = Place::new();
    let race = format!(
        "race {MODEL} --calibration text.txt --text text.txt --entries hadamard,cayley --steps 2 --batch 4 --max-windows 4 --held-out 4 \
         --out raced --json"
    );
    let mut child = place.command(&race).spawn().unwrap();
    // A folder takes the picture's place once the outputs have been tried.
    while !place.path("raced/runs.csv").exists() && child.try_wait().unwrap().is_none() {
        std::thread::sleep(Duration::from_millis(1));
    }
    std::fs::create_dir(place.path("raced/steps.png")).unwrap();
    let out = child.wait_with_output().unwrap();
    assert!(!out.status.success());
    assert!(serde_json::from_slice::<Value>(&out.stdout).unwrap()["runs"].is_array());
}
