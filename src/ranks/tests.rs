use std::net::{TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use super::*;
use crate::random::randn;

/// Runs a function at every rank of a group, each on a thread.
pub(super) fn ranks<T: Send>(world: usize, patience: Duration, f: impl Fn(Group) -> T + Sync) -> Vec<T> {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut listener = Some(listener);
    thread::scope(|scope| {
        let each: Vec<_> = (0..world)
            .map(|rank| {
                let (place, listener, f) = (Place { patience, ..Place::local(rank, world, port) }, listener.take(), &f);
                scope.spawn(move || f(Group::connect(&place, listener).unwrap()))
            })
            .collect();
        each.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

pub(super) const LONG: Duration = Duration::from_secs(20);

#[test]
fn sums_are_those_in_the_order_of_ranks_everywhere() {
    for world in [1, 2, 3, 5] {
        let of = |rank: usize, seed: u64| randn([7, 3], 10 * rank as u64 + seed);
        let found = ranks(world, LONG, |group| {
            let (a, b) = (of(group.rank(), 0), of(group.rank(), 1));
            let parts = vec![a.clone().to_dtype(DType::F32).unwrap(), b.clone(), a.reshape([21]).unwrap()];
            let sums = group.all_reduce_packed("a sum", parts).unwrap();
            let mut numbers = [group.rank() as f64, 0.1];
            group.sum("numbers", &mut numbers).unwrap();
            assert_eq!(numbers[0], (world * (world - 1) / 2) as f64);
            assert_eq!(group.broadcast("a word", format!("from {}", group.rank()).into()).unwrap(), b"from 0");
            assert_eq!(group.any("a word", group.rank() == 1).unwrap(), world > 1);
            let all = group.gather("a word", vec![group.rank() as u8; group.rank()]).unwrap();
            assert!(all.iter().enumerate().all(|(rank, of)| *of == vec![rank as u8; rank]) && all.len() == world);
            group.same("words", b"one".to_vec()).unwrap();
            sums
        });
        // In order, in the type of the tensors.
        let mut narrow = of(0, 0).to_dtype(DType::F32).unwrap().to_vec::<f32>().unwrap();
        for rank in 1..world {
            let x = of(rank, 0).to_dtype(DType::F32).unwrap().to_vec::<f32>().unwrap();
            narrow.iter_mut().zip(x).for_each(|(sum, x)| *sum += x);
        }
        for sums in found {
            assert_eq!(sums[0].to_vec::<f32>().unwrap(), narrow);
            assert_eq!((sums[1].shape(), sums[1].dtype()), (&[7, 3][..], DType::F64));
            let whole: f64 = (0..world).map(|rank| of(rank, 1).to_f64_vec().unwrap()[4]).fold(0.0, |sum, x| sum + x);
            assert!((sums[1].to_f64_vec().unwrap()[4] - whole).abs() < 1e-15);
            assert_eq!(sums[2].shape(), [21]);
        }
    }
}

#[test]
fn shares_cover_everything_once_and_evenly() {
    for (world, n) in [(1, 5), (2, 8), (3, 8), (4, 3), (5, 0)] {
        let shares = ranks(world, LONG, |group| (group.share(n), group.largest_share(n)));
        let all: Vec<usize> = shares.iter().flat_map(|(share, _)| share.clone()).collect();
        assert_eq!(all, (0..n).collect::<Vec<_>>());
        assert_eq!(shares.iter().map(|(share, _)| share.len()).max(), Some(shares[0].1));
        assert!(shares.iter().all(|(share, most)| share.len() + 1 >= *most), "{shares:?}");
    }
}

/// The error of every rank.
fn errors(world: usize, patience: Duration, f: impl Fn(Group) -> Result<()> + Sync) -> Vec<String> {
    let start = Instant::now();
    let found = ranks(world, patience, |group| f(group).map_or_else(|e| e.to_string(), |()| "none".into()));
    assert!(start.elapsed() < Duration::from_secs(15), "{:?}", start.elapsed());
    found
}

#[test]
fn the_failure_of_one_rank_is_the_error_of_all() {
    for failing in [0, 1, 2] {
        let found = errors(3, LONG, |group| {
            group.any("a question", false)?;
            if group.rank() == failing {
                let error = Error::argument("learn", "gives up");
                group.fail(&error);
                return Err(error);
            }
            (0..1000).try_for_each(|_| group.any("a question", false).map(drop))
        });
        for (rank, message) in found.iter().enumerate() {
            let expected = if rank == failing { "learn: gives up".into() } else { format!("rank {failing}: learn: gives up") };
            assert_eq!(*message, expected);
        }
    }
}

#[test]
fn a_rank_that_ends_before_the_others_is_an_error_and_one_that_ends_with_them_is_none() {
    let found = errors(3, LONG, |group| match group.rank() {
        1 => Ok(()),
        _ => group.any("a question", false).map(drop),
    });
    assert_eq!(found[1], "none");
    assert!(found[0] == "rank 1: has ended, while others wait for it" && found[2] == found[0], "{found:?}");
    assert_eq!(errors(3, LONG, |group| group.any("a question", true).map(drop)), ["none"; 3]);
}

#[test]
fn ranks_that_ask_for_different_things_are_told_so() {
    let found = errors(2, LONG, |group| group.any(&format!("question {}", group.rank()), true).map(drop));
    assert!(found.iter().all(|e| e == "rank 1: is at question 1 (0), where rank 0 is at question 0 (0)"), "{found:?}");
    let found = errors(2, LONG, |group| group.sum("numbers", &mut vec![1.0; 1 + group.rank()]));
    assert!(found.iter().all(|e| e.contains("expected 8 bytes as rank 0 has, got 16")), "{found:?}");
    let found = errors(3, LONG, |group| group.same("rotations", vec![u8::from(group.rank() == 2)]));
    assert!(found.iter().all(|e| e == "rank 2: rotations differ from those of rank 0"), "{found:?}");
}

/// A rank that speaks the greeting and then does as it likes.
fn stranger(place: &Place) -> TcpStream {
    use std::io::{Read, Write};
    let mut stream = TcpStream::connect(("127.0.0.1", place.port)).unwrap();
    stream.write_all(&[&1u64.to_le_bytes()[..], &place.greeting()].concat()).unwrap();
    stream.read_exact(&mut [0; 32]).unwrap();
    stream
}

#[test]
fn a_closed_connection_and_a_silent_rank_are_seen() {
    for (silent, expected) in [(false, "rank 1: went away without a word"), (true, "rank 1: gives no sign of life")] {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let place = Place { patience: Duration::from_secs(2), ..Place::local(0, 2, port) };
        let (told, heard) = std::sync::mpsc::channel();
        let other = thread::spawn({
            let place = place.clone();
            move || {
                let stream = stranger(&place);
                if silent {
                    heard.recv().unwrap();
                }
                drop(stream);
            }
        });
        let group = Group::connect(&place, Some(listener)).unwrap();
        let (acted, act) = std::sync::mpsc::channel();
        group.when_lost(Duration::from_millis(100), move |e| acted.send(e.to_string()).unwrap());
        let start = Instant::now();
        let error = group.any("a question", false).unwrap_err().to_string();
        assert_eq!(error, expected);
        assert!(start.elapsed() < Duration::from_secs(10));
        // Whoever cannot end by itself is told in another way.
        assert_eq!(act.recv_timeout(Duration::from_secs(5)).unwrap(), expected);
        told.send(()).unwrap_or_default();
        other.join().unwrap();
    }
}

#[test]
fn strangers_are_not_let_in() {
    use std::io::Write;
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let place = |rank, token: &str| Place { token: token.into(), ..Place::local(rank, 2, port) };
    let first = thread::spawn({
        let place = place(0, "ours");
        move || Group::connect(&place, Some(listener)).and_then(|group| group.any("a question", true))
    });
    let mut odd = TcpStream::connect(("127.0.0.1", port)).unwrap();
    odd.write_all(&[b'x'; 64]).unwrap();
    let message = Group::connect(&place(1, "theirs"), None).unwrap_err().to_string();
    assert!(message.contains(&format!("127.0.0.1:{port}")) && message.contains("another run"), "{message}");
    let group = Group::connect(&place(1, "ours"), None).unwrap();
    assert!(group.any("a question", false).unwrap() && first.join().unwrap().unwrap());
}

#[test]
fn the_environment_of_a_launcher_is_understood() {
    let from =
        |all: &[(&str, &str)]| Place::from_env(|name| all.iter().find(|(n, _)| *n == name).map(|(_, value)| value.to_string()));
    assert!(from(&[]).unwrap().is_none() && from(&[("RANK", "0"), ("WORLD_SIZE", "1")]).unwrap().is_none());
    let torchrun = [("RANK", "3"), ("WORLD_SIZE", "4"), ("LOCAL_RANK", "1"), ("MASTER_ADDR", "node0"), ("MASTER_PORT", "29500")];
    let place = from(&torchrun).unwrap().unwrap();
    assert_eq!((place.rank, place.world, place.local_rank, place.address.as_str(), place.port), (3, 4, 1, "node0", 29500));
    let agent = [&torchrun[..], &[("TORCHELASTIC_USE_AGENT_STORE", "True"), ("TORCHELASTIC_RUN_ID", "a run")]].concat();
    let place = from(&agent).unwrap().unwrap();
    assert_eq!((place.port, place.token.as_str()), (29501, "a run"));
    assert_eq!(from(&[&agent[..], &[(Place::PORT, "7")]].concat()).unwrap().unwrap().port, 7);
    let hurried = [&torchrun[..], &[(Place::PATIENCE, "3")]].concat();
    assert_eq!(from(&hurried).unwrap().unwrap().patience, Duration::from_secs(3));
    assert!(from(&[&torchrun[..], &[(Place::PATIENCE, "0")]].concat()).unwrap_err().to_string().contains(Place::PATIENCE));
    for (name, value, part) in [
        ("RANK", "4", "less than WORLD_SIZE"),
        ("RANK", "-1", "RANK"),
        ("MASTER_PORT", "70000", "MASTER_PORT"),
        ("WORLD_SIZE", "", "WORLD_SIZE"),
    ] {
        let changed: Vec<_> = torchrun.iter().map(|(n, v)| (*n, if *n == name { value } else { *v })).collect();
        assert!(from(&changed).unwrap_err().to_string().contains(part), "{name}={value}");
    }
    let without: Vec<_> = torchrun.iter().copied().filter(|(n, _)| *n != "MASTER_ADDR").collect();
    assert!(from(&without).unwrap_err().to_string().contains("MASTER_ADDR"));
}

#[test]
fn other_types_are_refused() {
    let found =
        ranks(2, LONG, |group| group.all_reduce("a sum", Tensor::from_vec(vec![1u32], [1]).unwrap()).unwrap_err().to_string());
    assert!(found.iter().all(|e| e.contains("expected dtype f32 or f64")), "{found:?}");
}
