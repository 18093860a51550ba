//! Starts a process for each rank of a run, watches them, and ends all of them when one fails.
//!
//! Every rank's standard input is a connection to the launcher. Over it rank 0 says at which port it listens, and any rank why it fails; the
//! launcher passes signals on. A rank whose launcher is gone ends at once, so that none is left behind.

use std::process::ExitCode;

use serde::{Deserialize, Serialize};
use spinquant::{Error, Result};

/// What a rank tells its launcher, a line of JSON each.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Told {
    /// Where rank 0 listens.
    Port(u16),
    /// Why the rank ends.
    Error {
        text: String,
        /// Since another rank does.
        peer: bool,
        interrupted: bool,
    },
}

#[cfg(unix)]
pub use unix::{is_launched, listen_to_launcher, run, tell_launcher};

#[cfg(not(unix))]
pub fn is_launched() -> bool {
    false
}
#[cfg(not(unix))]
pub fn listen_to_launcher() -> Result<bool> {
    Ok(false)
}
#[cfg(not(unix))]
pub fn tell_launcher(_: &Told) -> bool {
    false
}
#[cfg(not(unix))]
pub fn run(_: usize) -> ExitCode {
    say!("error: --gpus, --ranks: several processes are started on Unix only");
    ExitCode::FAILURE
}

#[cfg(unix)]
mod unix {
    use std::collections::VecDeque;
    use std::io::{BufRead, BufReader, Read, Write};
    use std::os::fd::{AsFd, OwnedFd};
    use std::os::unix::net::UnixStream;
    use std::os::unix::process::ExitStatusExt;
    use std::process::{Child, Command, ExitStatus, Stdio};
    use std::sync::mpsc::{Receiver, Sender, channel};
    use std::sync::{Arc, Mutex, OnceLock, PoisonError};
    use std::thread;
    use std::time::{Duration, Instant};

    use spinquant::ranks::{Group, Place};

    use super::*;
    use crate::ranks::{GRACE, exit_now};
    use crate::stop;

    /// Says that a process was started here.
    const LAUNCHED: &str = "SPINQUANT_LAUNCHED";
    /// How much of what a rank says is kept.
    const KEPT: usize = 16 << 10;

    /// The connection to the launcher.
    static LAUNCHER: OnceLock<Mutex<UnixStream>> = OnceLock::new();

    /// Whether a launcher started this process.
    pub fn is_launched() -> bool {
        std::env::var_os(LAUNCHED).is_some()
    }

    /// Takes orders from the launcher from now on, where there is one: ends with it, and stops when it says so.
    pub fn listen_to_launcher() -> Result<bool> {
        if !is_launched() {
            return Ok(false);
        }
        let failed =
            |e: std::io::Error| Error::argument("ranks", format!("{LAUNCHED} is set, and standard input is no launcher: {e}"));
        let stream = UnixStream::from(std::io::stdin().as_fd().try_clone_to_owned().map_err(failed)?);
        let orders = stream.try_clone().map_err(failed)?;
        thread::spawn(move || {
            for line in BufReader::new(orders).lines() {
                match line.ok().and_then(|line| line.parse().ok()) {
                    Some(signal) => stop::passed_on(signal),
                    None => break,
                }
            }
            exit_now();
        });
        Ok(LAUNCHER.set(Mutex::new(stream)).is_ok())
    }

    /// Tells the launcher something; false where there is none.
    pub fn tell_launcher(told: &Told) -> bool {
        let line = serde_json::to_string(told).unwrap_or_default() + "\n";
        let write = |stream: &Mutex<UnixStream>| stream.lock().unwrap_or_else(PoisonError::into_inner).write_all(line.as_bytes());
        LAUNCHER.get().is_some_and(|stream| write(stream).is_ok())
    }

    /// What the launcher hears of.
    enum Event {
        Told(usize, Told),
        Signal(i32),
    }

    /// A rank, seen from outside.
    struct Rank {
        child: Child,
        orders: UnixStream,
        /// The end of what it said on standard error, where that is not the reader's.
        said: Arc<Mutex<VecDeque<u8>>>,
        status: Option<ExitStatus>,
        /// Ended by the launcher.
        killed: bool,
    }

    /// Why a run failed, the first cause first.
    #[derive(Default)]
    struct Causes(Vec<(usize, Cause)>);

    enum Cause {
        Told {
            text: String,
            peer: bool,
            interrupted: bool,
        },
        /// It ended so, without a word.
        Ended(ExitStatus),
    }

    /// Runs this program's command in so many processes.
    pub fn run(count: usize) -> ExitCode {
        let (events, heard) = channel();
        let signals = events.clone();
        stop::pass_on(move |signal| drop(signals.send(Event::Signal(signal))));
        let mut ranks: Vec<Rank> = vec![];
        let outcome = watch(count, &mut ranks, &events, &heard);
        for rank in &mut ranks {
            if !matches!(rank.child.try_wait(), Ok(Some(_))) {
                let _ = rank.child.kill();
                let _ = rank.child.wait();
            }
        }
        match outcome {
            Ok(code) => code,
            Err(e) => {
                say!("error: {e}");
                ExitCode::FAILURE
            }
        }
    }

    fn watch(count: usize, ranks: &mut Vec<Rank>, events: &Sender<Event>, heard: &Receiver<Event>) -> Result<ExitCode> {
        let token = token();
        // Any free port, where none is named.
        let named = Place::port_of(|name| std::env::var(name).ok())?.unwrap_or(0);
        ranks.push(start(0, count, named, &token, events)?);
        let (mut causes, mut signal, mut deadline): (Causes, Option<i32>, Option<Instant>) = Default::default();
        loop {
            match heard.recv_timeout(Duration::from_millis(20)) {
                Ok(Event::Told(0, Told::Port(port))) if ranks.len() == 1 => {
                    for rank in 1..count {
                        ranks.push(start(rank, count, port, &token, events)?);
                    }
                }
                Ok(Event::Told(_, Told::Port(_))) => {}
                Ok(Event::Told(rank, Told::Error { text, peer, interrupted })) => {
                    causes.0.push((rank, Cause::Told { text, peer, interrupted }));
                }
                Ok(Event::Signal(number)) if signal.is_some() => {
                    say!("\nstopped at once");
                    return Ok(ExitCode::from(128 + number as u8));
                }
                Ok(Event::Signal(number)) => {
                    signal = Some(number);
                    for rank in ranks.iter_mut() {
                        let _ = writeln!(rank.orders, "{number}");
                    }
                }
                Err(_) => {}
            }
            for (number, rank) in ranks.iter_mut().enumerate().filter(|(_, rank)| rank.status.is_none()) {
                rank.status =
                    rank.child.try_wait().map_err(|e| Error::argument("ranks", format!("rank {number} is lost: {e}")))?;
                let Some(status) = rank.status else { continue };
                // What it said last is on its way.
                let told = heard.try_iter().chain(heard.recv_timeout(Duration::from_millis(20)));
                for event in told.collect::<Vec<_>>() {
                    let _ = events.send(event);
                }
                if !status.success() && !rank.killed {
                    causes.0.push((number, Cause::Ended(status)));
                }
                // Rank 0 ends last where all goes well, but for the time that a process takes to end.
                if !status.success() || number == 0 {
                    deadline.get_or_insert_with(|| Instant::now() + GRACE);
                }
            }
            if ranks.iter().all(|rank| rank.status.is_some()) && (ranks.len() == count || ranks[0].status.is_some()) {
                break;
            }
            if deadline.is_some_and(|end| Instant::now() > end) {
                for rank in ranks.iter_mut().filter(|rank| rank.status.is_none()) {
                    rank.killed = true;
                    let _ = rank.child.kill();
                }
            }
        }
        for event in heard.try_iter() {
            if let Event::Told(rank, Told::Error { text, peer, interrupted }) = event {
                causes.0.push((rank, Cause::Told { text, peer, interrupted }));
            }
        }
        Ok(causes.tell(ranks, signal))
    }

    impl Causes {
        /// Says why the run failed, once, and how the program ends.
        fn tell(&self, ranks: &[Rank], signal: Option<i32>) -> ExitCode {
            // Rank 0 has written what there is to write; one that only took too long to end was ended.
            if ranks[0].status.is_some_and(|status| status.success()) && self.0.is_empty() {
                return ExitCode::SUCCESS;
            }
            let code = signal.map_or(ExitCode::FAILURE, |signal| ExitCode::from(128 + signal as u8));
            let own = |of: usize| self.0.iter().any(|(rank, cause)| *rank == of && matches!(cause, Cause::Told { .. }));
            let first = self.0.iter().find(|(rank, cause)| match cause {
                Cause::Told { peer, .. } => !peer,
                // A rank that a signal ended while it was asked to end did as asked.
                Cause::Ended(status) => !(own(*rank) || signal.is_some() && status.code().is_some_and(|code| code > 128)),
            });
            // Rank 0's own words for what all ranks say, without a number.
            let same = |text: &str| {
                self.0.iter().find(|(rank, cause)| *rank == 0 && matches!(cause, Cause::Told { text: own, .. } if own == text))
            };
            match first.map(|(rank, cause)| (*rank, cause)) {
                Some((rank, Cause::Told { text, interrupted, .. })) => {
                    let plain = rank == 0 || *interrupted || same(text).is_some();
                    if plain { say!("error: {text}") } else { say!("error: rank {rank}: {text}") }
                }
                Some((rank, Cause::Ended(status))) => {
                    let said: Vec<u8> = ranks[rank].said.lock().unwrap_or_else(PoisonError::into_inner).iter().copied().collect();
                    String::from_utf8_lossy(&said).lines().for_each(|line| say!("rank {rank}: {line}"));
                    let how = match (status.code(), status.signal()) {
                        (Some(code), _) => format!("ended with exit status {code}"),
                        (_, Some(signal)) => format!("was killed by signal {signal}"),
                        _ => "ended".into(),
                    };
                    say!("error: rank {rank}: {how}");
                }
                None => {
                    if let (Some((_, Cause::Told { text, .. })), None) = (self.0.first(), signal) {
                        say!("error: {text}");
                    }
                }
            }
            code
        }
    }

    /// Starts a rank.
    fn start(rank: usize, count: usize, port: u16, token: &str, events: &Sender<Event>) -> Result<Rank> {
        let failed = |e: std::io::Error| Error::argument("ranks", format!("rank {rank} cannot be started: {e}"));
        let (orders, theirs) = UnixStream::pair().map_err(failed)?;
        let mut command = Command::new(std::env::current_exe().map_err(failed)?);
        command.args(std::env::args_os().skip(1)).stdin(Stdio::from(OwnedFd::from(theirs)));
        let place = Place::local(rank, count, port);
        for (name, value) in [
            (LAUNCHED, 1.to_string()),
            ("RANK", rank.to_string()),
            ("LOCAL_RANK", rank.to_string()),
            ("WORLD_SIZE", count.to_string()),
            ("LOCAL_WORLD_SIZE", count.to_string()),
            ("MASTER_ADDR", place.address),
            (Place::PORT, port.to_string()),
            (Place::TOKEN, token.to_string()),
        ] {
            command.env(name, value);
        }
        let threads = thread::available_parallelism().map_or(1, |n| n.get().div_ceil(count));
        let unless_set = Group::NCCL.into_iter().map(|(name, value)| (name, value.to_string()));
        for (name, value) in unless_set.chain([("RAYON_NUM_THREADS", threads.to_string())]) {
            if std::env::var_os(name).is_none() {
                command.env(name, value);
            }
        }
        if rank > 0 {
            command.stdout(Stdio::null()).stderr(Stdio::piped());
        }
        let mut child = command.spawn().map_err(failed)?;
        let said: Arc<Mutex<VecDeque<u8>>> = Arc::default();
        if let Some(mut stderr) = child.stderr.take() {
            let said = said.clone();
            thread::spawn(move || {
                let mut buffer = [0; 4096];
                while let Ok(n @ 1..) = stderr.read(&mut buffer) {
                    let mut said = said.lock().unwrap_or_else(PoisonError::into_inner);
                    said.extend(&buffer[..n]);
                    let excess = said.len().saturating_sub(KEPT);
                    said.drain(..excess);
                }
            });
        }
        let (told, events) = (BufReader::new(orders.try_clone().map_err(failed)?), events.clone());
        thread::spawn(move || {
            for told in told.lines().map_while(Result::ok).filter_map(|line| serde_json::from_str(&line).ok()) {
                let _ = events.send(Event::Told(rank, told));
            }
        });
        Ok(Rank { child, orders, said, status: None, killed: false })
    }

    /// What nobody else knows: the ranks of this run greet one another with it.
    fn token() -> String {
        use std::hash::{BuildHasher, RandomState};
        format!("{:016x}{:016x}", RandomState::new().hash_one(std::process::id()), RandomState::new().hash_one(Instant::now()))
    }
}
