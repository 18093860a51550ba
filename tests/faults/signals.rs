//! Ctrl-C, SIGTERM and SIGBUS.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use super::*;

/// Sends a signal once the program says something; its exit status and what it said after that.
fn stopped(place: &Place, args: &str, signal: &str) -> (Option<i32>, String) {
    let mut child: Child = place.command(args).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let mut stderr = BufReader::new(child.stderr.take().unwrap());
    stderr.read_line(&mut String::new()).unwrap();
    std::thread::sleep(Duration::from_millis(300));
    assert!(Command::new("kill").args([&format!("-{signal}"), &child.id().to_string()]).status().unwrap().success());
    let start = Instant::now();
    // A program that goes on is killed: the test fails rather than wait for it.
    let (ended, watch) = mpsc::channel::<()>();
    let id = child.id().to_string();
    let watchdog = std::thread::spawn(move || {
        if watch.recv_timeout(Duration::from_secs(60)) == Err(mpsc::RecvTimeoutError::Timeout) {
            let _ = Command::new("kill").args(["-KILL", &id]).status();
        }
    });
    let mut said = String::new();
    stderr.read_to_string(&mut said).unwrap();
    let status = child.wait().unwrap();
    drop(ended);
    watchdog.join().unwrap();
    assert!(start.elapsed() < Duration::from_secs(10), "{args}: went on for {:?}", start.elapsed());
    (status.code(), said)
}

/// None of these would end by itself.
#[test]
fn every_command_ends() {
    let place = Place::new();
    let race = "race --model ../in/model --device cpu --seq-len 8 --calibration ../in/text.txt --text ../in/text.txt --steps 10000000 \
                --entries cayley --batch 2 --held-out 2 --out raced";
    let compare = "compare --model ../in/model --device cpu --seq-len 8 --calibration ../in/text.txt --text ../in/text.txt --batch 2 \
                   --held-out 2 --steps 10000000";
    let learn = format!("learn {TEXT} --batch 2 --held-out 2 --steps 10000000 --out R.safetensors");
    for (signal, status) in [("INT", 130), ("TERM", 143)] {
        for (args, says) in [
            (&*learn, "the state is in R.safetensors.state: continue with --resume"),
            (race, "stopping after this step"),
            (compare, "stopped: nothing was written"),
            ("demo --steps 10000000", "stopped: nothing was written"),
            ("bench --kernel all --device cpu --seconds 600 --json", "stopped: nothing was written"),
        ] {
            let (code, said) = stopped(&place, args, signal);
            assert_eq!(code, Some(status), "{args}: {said}");
            assert!(said.contains(says) && !said.contains("panicked"), "{args}: {said}");
        }
        assert!(place.path("out/R.safetensors.state").exists() && !place.path("out/R.safetensors").exists());
        assert!(place.path("out/raced/runs.csv").exists());
        place.clear();
    }
}

/// A file that is cut short under the map is one line, not a death without a word.
#[test]
fn a_bus_error_names_the_model() {
    let place = Place::new();
    let (code, said) =
        stopped(&place, &format!("learn {TEXT} --batch 2 --held-out 2 --steps 10000000 --out R.safetensors"), "BUS");
    assert_eq!(code, Some(135), "{said}");
    assert!(said.contains("error: ../in/model: a file was cut short while it was read"), "{said}");
}
