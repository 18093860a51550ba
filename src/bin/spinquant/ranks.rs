//! This process among those that share a run: `--gpus` and `--ranks` start one for each GPU ([`launch`](crate::launch)); `torchrun` and its
//! like start them too, and say so in the environment.

use std::fmt;
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

use spinquant::device::cuda;
use spinquant::ranks::{Group, Place};
use spinquant::{Error, Result};

use crate::common::at_least_one;
use crate::{console, launch};

/// How long a rank that cannot go on without a lost one is given to end by itself.
pub const GRACE: Duration = Duration::from_secs(5);

/// Where the work of a command is done.
#[derive(clap::Args, Clone, Default)]
pub struct RanksArgs {
    /// GPUs that share the work, a process each: how many (2: the first two), or which (0,2; number 2 alone is 2,). Needs NCCL.
    #[arg(long, value_name = "N|LIST", conflicts_with = "ranks")]
    gpus: Option<Gpus>,
    /// Processes on the CPU that share the work.
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    ranks: Option<usize>,
}

/// Some GPUs.
#[derive(Clone, Debug, PartialEq)]
enum Gpus {
    First(usize),
    These(Vec<usize>),
}

impl Gpus {
    fn count(&self) -> usize {
        match self {
            Self::First(count) => *count,
            Self::These(all) => all.len(),
        }
    }

    /// The GPU of a rank of this machine.
    fn of(&self, local_rank: usize) -> Result<usize> {
        let found = match self {
            Self::First(count) => Some(local_rank).filter(|rank| rank < count),
            Self::These(all) => all.get(local_rank).copied(),
        };
        found.ok_or_else(|| Error::argument("--gpus", format!("expected one for rank {local_rank} of this machine, got {self}")))
    }
}

impl FromStr for Gpus {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let bad = || format!("expected how many GPUs, or their numbers with commas between them, got {s:?}");
        let number = |s: &str| s.trim().parse::<usize>().map_err(|_| bad());
        let found = match s.contains(',') {
            false => Self::First(number(s)?),
            true => Self::These(s.strip_suffix(',').unwrap_or(s).split(',').map(number).collect::<Result<_, _>>()?),
        };
        let twice = matches!(&found, Self::These(all) if (1..all.len()).any(|i| all[..i].contains(&all[i])));
        if found.count() == 0 || twice { Err(bad()) } else { Ok(found) }
    }
}

impl fmt::Display for Gpus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::First(count) => write!(f, "{count}"),
            Self::These(all) => write!(f, "{}", all.iter().map(usize::to_string).collect::<Vec<_>>().join(",")),
        }
    }
}

/// How a command shares its work.
pub enum Shared<'a> {
    /// Scores alone pass between ranks.
    Scores(&'a RanksArgs),
    /// Tensors on GPUs are summed over ranks.
    Sums(&'a RanksArgs),
}

/// What `--device` may be.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Wanted {
    /// Whatever it says; of several GPUs this one.
    Any(usize),
    /// This GPU, by `--gpus`.
    Gpu(usize),
    /// The CPU, by `--ranks`.
    Cpu,
}

static WANTED: OnceLock<Wanted> = OnceLock::new();
static GROUP: Mutex<Option<Group>> = Mutex::new(None);

/// Before any thread runs: what NCCL reads, for ranks that somebody else starts.
pub fn prepare() {
    let several = std::env::var("WORLD_SIZE").is_ok_and(|n| n.trim() != "1") && std::env::var_os("RANK").is_some();
    for (name, value) in Group::NCCL.into_iter().filter(|(name, _)| several && std::env::var_os(name).is_none()) {
        // SAFETY: the program's first act, on its only thread.
        unsafe { std::env::set_var(name, value) };
    }
}

/// What `--device` may be in this process.
pub fn wanted() -> Wanted {
    WANTED.get().copied().unwrap_or(Wanted::Any(0))
}

/// The processes that share this run.
pub fn group() -> Group {
    GROUP.lock().unwrap_or_else(PoisonError::into_inner).clone().unwrap_or_default()
}

impl RanksArgs {
    /// How many processes are asked for.
    pub fn count(&self) -> usize {
        self.gpus.as_ref().map_or(self.ranks.unwrap_or(1), Gpus::count)
    }

    fn wanted(&self, local_rank: Option<usize>) -> Result<Wanted> {
        Ok(match (&self.gpus, self.ranks) {
            (Some(gpus), _) => Wanted::Gpu(gpus.of(local_rank.unwrap_or(0))?),
            (None, Some(_)) => Wanted::Cpu,
            (None, None) => Wanted::Any(local_rank.unwrap_or(0)),
        })
    }
}

/// Finds out which process of a run this is and meets the others. The number of processes to start, where it is none of them and there are
/// to be several.
pub fn begin(shared: Option<Shared<'_>>) -> Result<Option<usize>> {
    let (args, sums) = match shared {
        Some(Shared::Scores(args)) => (args, false),
        Some(Shared::Sums(args)) => (args, true),
        None => return Ok(None),
    };
    let get = |name: &str| std::env::var(name).ok();
    // First of all, so that the launcher is told of all that is wrong.
    let launcher = get("RANK").is_some() && launch::listen_to_launcher()?;
    let Some(mut place) = Place::from_env(get)? else {
        if args.count() == 1 {
            let _ = WANTED.set(args.wanted(None)?);
            return Ok(None);
        }
        if let Some(gpus) = &args.gpus {
            check(gpus, sums)?;
        }
        return Ok(Some(args.count()));
    };
    if place.rank > 0 {
        console::silence();
    }
    let _ = WANTED.set(args.wanted(Some(place.local_rank))?);
    let listener = (place.rank == 0).then(|| place.listen()).transpose()?;
    if let (Some(listener), true) = (&listener, launcher) {
        place.port = listener.local_addr().map_or(place.port, |address| address.port());
        launch::tell_launcher(&launch::Told::Port(place.port));
    }
    let group = Group::connect(&place, listener)?;
    group.when_lost(GRACE, |e| {
        report(e);
        exit_now();
    });
    *GROUP.lock().unwrap_or_else(PoisonError::into_inner) = Some(group);
    Ok(None)
}

/// Fails where these GPUs are not there, or cannot be used together.
fn check(gpus: &Gpus, sums: bool) -> Result<()> {
    let last = (0..gpus.count()).try_fold(0, |last, rank| gpus.of(rank).map(|gpu| gpu.max(last)))?;
    let there = cuda::count()?;
    if last >= there {
        let message = format!("expected GPUs below {there}, as many as this machine has, got {gpus}");
        return Err(Error::argument("--gpus", message));
    }
    if sums { cuda::check_nccl() } else { Ok(()) }
}

/// Says why the program ends, once, to the launcher or to the reader.
pub fn report(e: &Error) {
    static REPORTED: AtomicBool = AtomicBool::new(false);
    if REPORTED.swap(true, Ordering::SeqCst) {
        return;
    }
    let peer = matches!(e, Error::Rank { .. });
    let told = launch::Told::Error { text: e.to_string(), peer, interrupted: matches!(e, Error::Interrupted { .. }) };
    if !launch::tell_launcher(&told) {
        console::speak();
        say!("error: {e}");
    }
}

/// Tells the other ranks, and then the launcher or the reader, how the command ended; waits for the others where all is well.
pub fn end(outcome: &Result<()>) {
    if let Err(e) = outcome {
        group().fail(e);
        report(e);
    }
    drop(GROUP.lock().unwrap_or_else(PoisonError::into_inner).take());
}

/// Ends the program without waiting for anything, GPUs included.
pub fn exit_now() -> ! {
    #[cfg(unix)]
    signal_hook::low_level::exit(1);
    #[cfg(not(unix))]
    std::process::exit(1);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gpus_are_counted_or_named() {
        let all = |s: &str| {
            let gpus: Gpus = s.parse().unwrap();
            (0..gpus.count()).map(|rank| gpus.of(rank).unwrap()).collect::<Vec<_>>()
        };
        assert_eq!((all("1"), all("3"), all("0,2"), all("2,")), (vec![0], vec![0, 1, 2], vec![0, 2], vec![2]));
        for odd in ["", "0", "a", "1,1", "1,,2", "-1", ","] {
            assert!(odd.parse::<Gpus>().unwrap_err().contains("expected how many GPUs"), "{odd}");
        }
        let message = "2".parse::<Gpus>().unwrap().of(2).unwrap_err().to_string();
        assert!(message.contains("rank 2") && message.contains("got 2"), "{message}");
    }
}
