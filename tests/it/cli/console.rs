//! Standard output and standard error: neither ends a run, and `--json` prints one object or nothing.

use super::*;

/// Every command that prints and is quick, with what it writes.
fn commands() -> Vec<(String, &'static str)> {
    let learn = format!("{LEARN} --steps 3 --held-out-every 1");
    vec![
        (format!("{EVAL} --max-windows 4"), ""),
        (learn.clone(), "R.safetensors"),
        (format!("{learn} --dry-run"), ""),
        (format!("clip {MODEL} --text text.txt --windows 2 --rotations hadamard:1 --out C.safetensors"), "C.safetensors"),
        (
            format!(
                "compare {MODEL} --calibration text.txt --text text.txt --seeds 1 --steps 2 --batch 4 --max-windows 4 --held-out 4"
            ),
            "",
        ),
        (
            format!(
                "race {MODEL} --calibration text.txt --text text.txt --entries hadamard,cayley --steps 2 --batch 4 \
                 --max-windows 4 --held-out 4 --out raced"
            ),
            "raced/table.md",
        ),
        (format!("inspect {MODEL} --text text.txt --windows 2 --rotations hadamard:1 --out seen"), "seen/sites.csv"),
        ("bench --kernel rms-norm --n 64 --rows 8 --device cpu".into(), ""),
    ]
}

#[test]
fn json_is_one_object() {
    let place = Place::new();
    for (command, output) in commands() {
        place.json(&format!("{command} --json"));
        assert!(output.is_empty() || place.path(output).exists(), "{command}");
    }
}

/// A reader that leaves at once, of either stream or both: the work is done and its files are there.
#[test]
fn a_closed_stream_ends_no_run() {
    let place = Place::new();
    let quantize = format!("quantize {MODEL} --rotations hadamard:3 --out q");
    let check = "rotations check R.safetensors".to_string();
    for (command, output) in commands().into_iter().chain([(quantize, "q/spinquant.json"), (check, "")]) {
        for (out, err) in [(true, false), (false, true), (true, true)] {
            for name in ["C.safetensors", "q", "seen", "raced"] {
                let path = place.path(name);
                let _ = if path.is_dir() { std::fs::remove_dir_all(path) } else { std::fs::remove_file(path) };
            }
            if output == "R.safetensors" {
                let _ = std::fs::remove_file(place.path(output));
            }
            let mut child = place.command(&command).spawn().unwrap();
            if out {
                drop(child.stdout.take());
            }
            if err {
                drop(child.stderr.take());
            }
            let result = child.wait_with_output().unwrap();
            let stderr = String::from_utf8_lossy(&result.stderr);
            assert!(result.status.success() && !stderr.contains("panicked"), "{command}: {:?} {stderr}", result.status);
            assert!(output.is_empty() || place.path(output).exists(), "{command}: {output} is missing, {stderr}");
        }
    }
}

/// A full disk behind standard output: the files are written first, then the run fails with one message.
#[cfg(target_os = "linux")]
#[test]
fn a_full_standard_output_is_an_error_once_all_is_saved() {
    let place = Place::new();
    let full = || std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    for (command, output) in [(format!("{LEARN} --steps 2"), "R.safetensors"), ("rotations check R.safetensors".into(), "")] {
        let result = place.command(&command).stdout(full()).output().unwrap();
        let stderr = String::from_utf8_lossy(&result.stderr);
        assert_eq!(result.status.code(), Some(1), "{command}: {stderr}");
        let errors: Vec<_> = stderr.lines().filter(|l| l.contains("error:")).collect();
        assert!(errors.len() == 1 && errors[0].starts_with("error: standard output: "), "{command}: {stderr}");
        assert!(output.is_empty() || place.path(output).exists(), "{command}");
        // Progress that nobody can read is no failure.
        let result = place.command(&command).stderr(full()).output().unwrap();
        assert!(result.status.success(), "{command}: {:?}", result.status);
    }
}
