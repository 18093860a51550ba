//! Runs that several processes share, on the CPU: they learn what one does, and one that dies ends all of them.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use spinquant::rotation::Rotations;

use super::*;

const LEARN: &str = "learn --model ../in/model --device cpu --seq-len 8 --text ../in/text.txt --held-out 4 --out R.safetensors";

/// The longest that an end may take.
const LONG: Duration = Duration::from_secs(30);

fn rotations(place: &Place, name: &str) -> Vec<f64> {
    let r = Rotations::load(&place.path("out").join(name)).unwrap();
    r.tensors().into_iter().flat_map(|(_, t)| t.to_f64_vec().unwrap()).collect()
}

fn furthest(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).fold(0.0, |m, (a, b)| f64::max(m, (a - b).abs()))
}

/// The processes whose parent this is.
fn children(of: u32) -> Vec<u32> {
    let all = std::fs::read_dir("/proc").unwrap().filter_map(|e| e.unwrap().file_name().to_str()?.parse::<u32>().ok());
    let parent = |pid: &u32| -> Option<u32> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        stat.rsplit(')').next()?.split_whitespace().nth(1)?.parse().ok()
    };
    all.filter(|pid| parent(pid) == Some(of)).collect()
}

/// Whether a process is there and no zombie.
fn lives(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"));
    stat.is_ok_and(|stat| !stat.rsplit(')').next().unwrap_or_default().trim_start().starts_with('Z'))
}

/// A variable of a process's environment.
fn variable(pid: u32, name: &str) -> Option<String> {
    let all = std::fs::read(format!("/proc/{pid}/environ")).ok()?;
    let all = String::from_utf8_lossy(&all).into_owned();
    all.split('\0').find_map(|one| one.strip_prefix(name)?.strip_prefix('=').map(str::to_string))
}

fn signal(pid: u32, name: &str) {
    assert!(Command::new("kill").args([format!("-{name}"), pid.to_string()]).status().unwrap().success());
}

/// Waits, and fails rather than wait for ever.
fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < LONG, "{what}: still waiting after {LONG:?}");
        thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn several_processes_score_what_one_does_to_the_same_bits() {
    let place = Place::new();
    let text: String = (0..20_000u64).map(|i| format!("w{} ", (i * i * 7 + i / 3) % 31)).collect();
    std::fs::write(place.path("in/long.txt"), text).unwrap();
    let scores = |args: &str, without: &[&str]| -> serde_json::Value {
        let out = place.run(&format!("{args} --json"));
        assert!(out.status.success(), "{args}: {}", String::from_utf8_lossy(&out.stderr));
        let mut value: serde_json::Value = serde_json::from_slice(&out.stdout).expect("one object of one process");
        without.iter().for_each(|name| drop(value.as_object_mut().unwrap().remove(*name)));
        value
    };
    let eval = "eval --model ../in/model --device cpu --seq-len 8 --text ../in/long.txt --fidelity-text ../in/long.txt";
    let one = scores(eval, &["seconds"]);
    assert!(one["windows"].as_u64().unwrap() > 3 * 4096 / 8, "several times through the network: {one}");
    for count in [2, 3] {
        assert_eq!(scores(&format!("{eval} --ranks {count}"), &["seconds"]), one);
    }
    let file = |args: &str| {
        place.succeeds(&format!(
            "clip --model ../in/model --device cpu --seq-len 8 --text ../in/text.txt --windows 4 \
                                 --scheme W4A3KV3 --rotations hadamard:0 --out C.safetensors {args}"
        ));
        place.read("C.safetensors").unwrap()
    };
    for goal in ["error", "loss"] {
        let one = file(&format!("--goal {goal}"));
        for count in [2, 5] {
            assert!(file(&format!("--goal {goal} --ranks {count}")) == one, "{goal}, {count} ranks");
        }
    }
    // A table without learning is the same too; with it, it is there.
    let compare = "compare --model ../in/model --device cpu --seq-len 8 --calibration ../in/text.txt --text ../in/long.txt \
                   --recipe published --seeds 3 --held-out 2 --batch 4 --steps 2";
    let one = scores(&format!("{compare} --learn-seeds 0"), &[]);
    for count in [2, 3, 4] {
        assert_eq!(scores(&format!("{compare} --learn-seeds 0 --ranks {count}"), &[]), one, "{count} ranks");
    }
    let two = scores(&format!("{compare} --learn-seeds 1 --ranks 2"), &[]);
    assert!(two["learned"][0]["perplexity"].as_f64().unwrap() > 1.0, "{two}");
    assert_eq!(two["hadamard"], one["hadamard"]);
}

#[test]
fn several_processes_calibrate_what_one_does_and_go_on_together() {
    let place = Place::new();
    let quantize = "quantize --model ../in/model --device cpu --seq-len 8 --rotations hadamard:0 --weights gptaq:0.25 \
                    --calibration ../in/text.txt --calibration-windows 9 --dtype f64 --out q";
    place.succeeds(quantize);
    let strip = |mut files: Contents| {
        files.retain(|name, _| name.ends_with(".safetensors"));
        files
    };
    let one = strip(place.read("q").unwrap());
    for count in [2, 3] {
        place.clear();
        place.succeeds(&format!("{quantize} --ranks {count}"));
        // In f64 the rounding of a sum moves no weight to another code.
        assert!(strip(place.read("q").unwrap()) == one, "{count} ranks");
    }
    let calls = place.calls(&format!("{quantize} --overwrite --ranks 2"));
    for at in [calls / 3, 2 * calls / 3] {
        place.clear();
        let out = place.faulty(&format!("{quantize} --ranks 2"), at, "before");
        assert!(error(&String::from_utf8_lossy(&out.stderr)).contains("rank 0: was killed by signal 9"), "{out:?}");
        place.succeeds(&format!("{quantize} --ranks 3"));
        assert!(strip(place.read("q").unwrap()) == one, "call {at} of {calls}");
    }
    for args in ["--weights rtn", "--weights gptq --reconstruct scales"] {
        let out = place.run(&format!("{} {args} --ranks 2", quantize.replace("--weights gptaq:0.25", "")));
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(!out.status.success() && error(&said).contains("share the calibration text"), "{said}");
    }
}

/// The steps of the state that is there, which is whole.
fn state(place: &Place) -> Option<u64> {
    let path = place.path("out/R.safetensors.state");
    path.exists().then(|| spinquant::optim::State::load(&path).expect("a whole state").number("step").unwrap() as u64)
}

/// A run in the background.
struct Run {
    child: Child,
    ranks: Vec<u32>,
}

impl Run {
    /// Starts a run of so many ranks, and waits until all are there and the log has a line.
    fn start(place: &Place, args: &str, count: usize) -> Self {
        Self::start_with(place, args, count, &[])
    }

    /// The same with variables in its environment.
    fn start_with(place: &Place, args: &str, count: usize, variables: &[(&str, &OsStr)]) -> Self {
        let _ = std::fs::remove_file(place.path("out/log"));
        let mut command = place.command(&format!("{args} --ranks {count} --log log"));
        command.env("SPINQUANT_RANKS_PATIENCE", "4").envs(variables.iter().copied());
        let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut ranks = vec![];
        wait_for("a first step", || {
            ranks = children(child.id());
            ranks.len() == count && std::fs::metadata(place.path("out/log")).is_ok_and(|m| m.len() > 0)
        });
        Self { child, ranks }
    }

    /// The process of a rank.
    fn rank(&self, rank: usize) -> u32 {
        let wanted = rank.to_string();
        *self.ranks.iter().find(|pid| variable(**pid, "RANK").as_ref() == Some(&wanted)).expect("a process for every rank")
    }

    /// How it ended and what it said, once no process of it is left.
    fn ended(mut self, what: &str) -> (Option<i32>, String) {
        let start = Instant::now();
        wait_for(what, || self.child.try_wait().unwrap().is_some());
        wait_for(what, || !self.ranks.iter().any(|pid| lives(*pid)));
        assert!(start.elapsed() < LONG, "{what}: {:?}", start.elapsed());
        let (mut out, mut err) = (String::new(), String::new());
        self.child.stdout.take().unwrap().read_to_string(&mut out).unwrap();
        self.child.stderr.take().unwrap().read_to_string(&mut err).unwrap();
        assert!(out.is_empty() && !err.contains("panicked"), "{what}: {out} {err}");
        (self.child.wait().unwrap().code(), err)
    }
}

/// The one line that says why.
fn error(said: &str) -> &str {
    let all: Vec<&str> = said.lines().filter(|line| line.contains("error:")).collect();
    assert!(all.len() == 1 && all[0].starts_with("error: "), "{said}");
    all[0]
}

#[test]
fn several_processes_learn_what_one_does_and_any_number_goes_on() {
    let place = Place::new();
    let learn = format!("{LEARN} --batch 5 --steps 6 --held-out-every 2 --json");
    let report = |args: &str| -> serde_json::Value {
        let _ = std::fs::remove_file(place.path("out/log"));
        let out = place.run(&format!("{args} --log log"));
        let stderr = String::from_utf8_lossy(&out.stderr);
        assert!(out.status.success() && !stderr.contains("error:"), "{args}: {stderr}");
        assert_eq!(std::fs::read_to_string(place.path("out/log")).unwrap().lines().count(), 6, "{args}");
        serde_json::from_slice(&out.stdout).expect("one object of one process")
    };
    let one = report(&learn);
    let alone = rotations(&place, "R.safetensors");
    let mut bytes = BTreeSet::new();
    for count in [2, 3] {
        let several = report(&format!("{learn} --ranks {count}"));
        for name in ["loss_first", "loss_last", "held_out_first", "held_out_last", "kl_first", "kl_last"] {
            let (a, b) = (one[name].as_f64().unwrap(), several[name].as_f64().unwrap());
            assert!((a - b).abs() <= 1e-3 * a.abs(), "{count} ranks, {name}: {a} and {b}");
        }
        // Steps of straight-through gradients spread the rounding of the first.
        assert!(furthest(&alone, &rotations(&place, "R.safetensors")) < 2e-2, "{count} ranks");
        let first = place.read("R.safetensors").unwrap();
        report(&format!("{learn} --ranks {count}"));
        assert!(place.read("R.safetensors").unwrap() == first, "{count} ranks: two runs differ");
        bytes.insert(first);
    }
    assert_eq!(place.others(&["R.safetensors", "log"]), Vec::<String>::new());
    // Begun by one process, which is killed, and ended by three.
    let kept = format!("{LEARN} --batch 5 --steps 6 --held-out-every 2 --checkpoint-every 1");
    let calls = place.calls(&kept);
    place.clear();
    place.faulty(&kept, calls / 2, "after");
    let done = state(&place).expect("a state");
    assert!((1..6).contains(&done), "{done}");
    place.succeeds(&format!("{kept} --resume --ranks 3"));
    assert!(furthest(&alone, &rotations(&place, "R.safetensors")) < 2e-2);
    assert_eq!(place.others(&["R.safetensors"]), Vec::<String>::new());
}

#[test]
fn layers_in_main_memory_are_there_once_and_change_nothing() {
    let place = Place::new();
    let learn = format!("{LEARN} --batch 4 --steps 3 --recompute --ranks 2");
    place.succeeds(&learn);
    let resident = place.read("R.safetensors").unwrap();
    let out = place.run(&format!("{learn} --resident 0"));
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(out.status.success() && !said.contains("own copy"), "{said}");
    assert!(place.read("R.safetensors").unwrap() == resident);
    let run = Run::start(&place, &format!("{LEARN} --batch 4 --steps 1000000 --checkpoint-every 1 --resident 0"), 3);
    // Device and inode of the file in memory.
    let memory = |pid: u32| -> Vec<String> {
        let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
        let of = |line: &str| line.split_whitespace().skip(3).take(2).collect::<Vec<_>>().join(" ");
        maps.lines().filter(|line| line.contains("memfd:spinquant")).map(of).collect()
    };
    let all: Vec<Vec<String>> = run.ranks.iter().map(|pid| memory(*pid)).collect();
    assert!(all[0].len() == 1 && all.iter().all(|of| *of == all[0]), "{all:?}");
    // What the first rank made lives on with the others, and goes with them.
    signal(run.rank(0), "KILL");
    let (code, said) = run.ended("a killed rank");
    assert_eq!((code, error(&said)), (Some(1), "error: rank 0: was killed by signal 9"), "{said}");
}

#[test]
fn ctrl_c_ends_all_ranks_after_their_step() {
    let place = Place::new();
    let args = format!("{LEARN} --batch 4 --steps 1000000 --checkpoint-every 1000000");
    let run = Run::start(&place, &args, 2);
    signal(run.child.id(), "INT");
    let (code, said) = run.ended("Ctrl-C");
    assert_eq!(code, Some(130), "{said}");
    assert!(error(&said).starts_with("error: interrupted after step "), "{said}");
    assert!(said.contains("stopping after this step") && said.contains("continue with --resume"), "{said}");
    assert!(state(&place).is_some());
}

/// How many ranks are killed.
fn times() -> usize {
    if std::env::var("SPINQUANT_FAULTS").is_ok_and(|v| v == "all") { 20 } else { 2 }
}

#[test]
fn a_rank_that_is_killed_ends_all_and_the_state_stays_good() {
    let place = Place::new();
    let args = format!("{LEARN} --batch 4 --steps 1000000 --checkpoint-every 1 --resume");
    let mut kept = 0;
    for i in 0..times() {
        let count = 2 + i % 2;
        let run = Run::start(&place, &args, count);
        let log = std::fs::read_to_string(place.path("out/log")).unwrap();
        let first: serde_json::Value = serde_json::from_str(log.lines().next().unwrap()).unwrap();
        assert_eq!(first["step"], kept + 1, "goes on where the state was");
        wait_for("a state", || state(&place).is_some_and(|step| step > kept));
        thread::sleep(Duration::from_millis((i as u64 * 37) % 300));
        let victim = (i + 1) % count;
        signal(run.rank(victim), "KILL");
        let (code, said) = run.ended("a killed rank");
        assert_eq!(code, Some(1), "{said}");
        assert_eq!(error(&said), format!("error: rank {victim}: was killed by signal 9"), "{said}");
        kept = state(&place).expect("a state");
    }
}

#[test]
fn a_rank_without_memory_ends_all_with_its_message_and_the_state_stays_good() {
    let place = Place::new();
    let args = format!("{LEARN} --batch 4 --steps 1000000 --checkpoint-every 1");
    let starve = place.path("starve");
    for rank in ["1", "0"] {
        let _ = std::fs::remove_file(&starve);
        let (shim, file) = (SHIM.as_os_str(), starve.as_os_str());
        let run =
            Run::start_with(&place, &args, 2, &[("LD_PRELOAD", shim), ("FAULT_STARVE", file), ("FAULT_RANK", OsStr::new(rank))]);
        wait_for("a state", || state(&place).is_some());
        std::fs::write(&starve, "").unwrap();
        let (code, said) = run.ended("a rank without memory");
        assert_eq!(code, Some(1), "{said}");
        assert_eq!(error(&said), format!("error: rank {rank}: was killed by signal 6"), "{said}");
        let own = if rank == "0" { "memory allocation of " } else { "rank 1: memory allocation of " };
        assert!(said.lines().any(|line| line.starts_with(own) && line.contains("bytes failed")), "{said}");
        assert!(state(&place).is_some());
        std::fs::remove_file(place.path("out/R.safetensors.state")).unwrap();
    }
}

/// A rank that stands still, as one does whose machine hangs.
#[test]
fn a_rank_that_gives_no_sign_of_life_ends_all() {
    let place = Place::new();
    let run = Run::start(&place, &format!("{LEARN} --batch 4 --steps 1000000 --checkpoint-every 1"), 2);
    wait_for("a state", || state(&place).is_some());
    signal(run.rank(1), "STOP");
    let (code, said) = run.ended("a silent rank");
    assert_eq!(code, Some(1), "{said}");
    assert_eq!(error(&said), "error: rank 1: gives no sign of life", "{said}");
    assert!(state(&place).is_some());
}

#[test]
fn no_rank_outlives_its_launcher() {
    let place = Place::new();
    let mut run = Run::start(&place, &format!("{LEARN} --batch 4 --steps 100000"), 2);
    signal(run.child.id(), "KILL");
    run.child.wait().unwrap();
    wait_for("orphans", || !run.ranks.iter().any(|pid| lives(*pid)));
}

/// A rank that somebody else started: only the environment says so.
fn rank(place: &Place, args: &str, (rank, world): (usize, usize), port: u16) -> Child {
    let mut command = place.command(args);
    for (name, value) in [("RANK", rank.to_string()), ("LOCAL_RANK", rank.to_string()), ("WORLD_SIZE", world.to_string())] {
        command.env(name, value);
    }
    command.env("MASTER_ADDR", "127.0.0.1").env("MASTER_PORT", port.to_string());
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

#[test]
fn ranks_meet_at_the_port_that_is_named() {
    let place = Place::new();
    let args = format!("{LEARN} --batch 4 --steps 1 --ranks 2");
    let run = |port: &str| place.command(&args).env("SPINQUANT_MASTER_PORT", port).output().unwrap();
    let out = run(&free_port().to_string());
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    for (given, expected) in [(port.as_str(), format!("cannot listen at 127.0.0.1:{port}")), ("x", "got \"x\"".into())] {
        let out = run(given);
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        let one = error(&said);
        assert!(!out.status.success() && one.contains("SPINQUANT_MASTER_PORT") && one.contains(&expected), "{said}");
    }
}

#[test]
fn ranks_that_another_launcher_starts_find_one_another() {
    let place = Place::new();
    let args = format!("{LEARN} --batch 4 --steps 4");
    place.succeeds(&format!("{args} --ranks 2"));
    let expected = place.read("R.safetensors").unwrap();
    place.clear();
    let port = free_port();
    let both = [1, 0].map(|r| rank(&place, &args, (r, 2), port)).map(|child| child.wait_with_output().unwrap());
    for out in &both {
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    }
    assert!(both[0].stdout.is_empty() && both[0].stderr.is_empty(), "rank 1 speaks");
    assert!(String::from_utf8_lossy(&both[1].stdout).contains("rotations written"));
    assert!(place.read("R.safetensors").unwrap() == expected);
    // A port that somebody else has.
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let out = rank(&place, &args, (0, 2), taken.local_addr().unwrap().port()).wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(!out.status.success() && error(&said).contains("SPINQUANT_MASTER_PORT sets another port"), "{said}");
    // Texts that differ are seen before anything is learned.
    std::fs::write(place.path("in/other.txt"), "w1 w2 w3 ".repeat(200)).unwrap();
    let other = args.replace("text.txt", "other.txt");
    let port = free_port();
    let both = [(1, &other), (0, &args)].map(|(r, args)| rank(&place, args, (r, 2), port));
    for out in both.map(|child| child.wait_with_output().unwrap()) {
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(!out.status.success() && error(&said).contains("rank 1: the windows of the text differ"), "{said}");
    }
}

/// Passes everything on between rank 1 and rank 0 until it is told to stop.
fn cable(to: u16) -> (u16, std::sync::mpsc::Sender<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let (cut, told) = std::sync::mpsc::channel();
    thread::spawn(move || {
        let near = listener.accept().unwrap().0;
        let mut far = None;
        wait_for("rank 0", || {
            far = TcpStream::connect(("127.0.0.1", to)).ok();
            far.is_some()
        });
        let far = far.unwrap();
        for (from, to) in [(&near, &far), (&far, &near)] {
            let (mut from, mut to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
            thread::spawn(move || {
                let mut buffer = [0; 4096];
                while let Ok(n @ 1..) = from.read(&mut buffer) {
                    if to.write_all(&buffer[..n]).is_err() {
                        break;
                    }
                }
                let _ = to.shutdown(std::net::Shutdown::Write);
            });
        }
        let _ = told.recv();
        for stream in [near, far] {
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }
    });
    (port, cut)
}

#[test]
fn a_cut_connection_ends_both_ranks() {
    let place = Place::new();
    let args = format!("{LEARN} --batch 4 --steps 100000 --checkpoint-every 1");
    let port = free_port();
    let (through, cut) = cable(port);
    let both = [rank(&place, &args, (0, 2), port), rank(&place, &args, (1, 2), through)];
    wait_for("a state", || state(&place).is_some());
    cut.send(()).unwrap();
    let start = Instant::now();
    for (r, child) in both.into_iter().enumerate() {
        let out = child.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(!out.status.success() && start.elapsed() < LONG, "{said}");
        assert!(error(&said).ends_with(&format!("rank {}: went away without a word", 1 - r)), "{said}");
    }
    assert!(state(&place).is_some());
}

#[test]
fn a_full_disk_of_rank_0_ends_all_with_its_message() {
    let place = Place::new();
    let args = format!("{LEARN} --batch 4 --steps 20 --checkpoint-every 1 --ranks 2");
    let calls = place.calls(&args);
    for at in [calls / 3, calls / 2] {
        place.clear();
        let start = Instant::now();
        let out = place.faulty(&args, at, "enospc");
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(start.elapsed() < LONG && out.status.code() == Some(1), "call {at} of {calls}: {said}");
        assert!(error(&said).contains("No space left on device"), "{said}");
        place.succeeds(&format!("{args} --resume"));
    }
}

#[test]
fn what_several_ranks_cannot_do_is_said_in_one_line() {
    let place = Place::new();
    for (args, parts) in [
        ("--batch 2 --ranks 3", &["batch", "3 ranks", "got 2"][..]),
        ("--batch 4 --ranks 2 --device cuda", &["--device", "--gpus"]),
        ("--batch 4 --ranks 2 --text ../in/none.txt", &["none.txt"]),
        ("--batch 4 --gpus 2 --device auto", &["cuda: "]),
    ] {
        let learn = match args.contains("--device") || args.contains("--text") {
            true => LEARN
                .replace("--device cpu", "")
                .replace("--text ../in/text.txt", if args.contains("--text") { "" } else { "--text ../in/text.txt" }),
            false => LEARN.to_string(),
        };
        let out = place.command(&format!("{learn} {args}")).env("CUDA_VISIBLE_DEVICES", "").output().unwrap();
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert_eq!(out.status.code(), Some(1), "{args}: {said}");
        assert!(parts.iter().all(|part| error(&said).contains(part)), "{args}: {said}");
        assert!(!error(&said).contains("rank 0: ") && out.stdout.is_empty(), "{args}: {said}");
    }
    let out = place.run(&format!("{LEARN} --gpus 1,1"));
    assert!(out.status.code() == Some(2) && String::from_utf8_lossy(&out.stderr).contains("how many GPUs"), "{out:?}");
}
