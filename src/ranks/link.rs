//! The connections of a rank: rank 0 has one to every other, each of these one to rank 0.
//!
//! Every connection has a thread that reads it, so that signs of life and failures are heard while the rank computes, and that nobody who
//! writes waits for one who computes. One more thread gives signs of life.

use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::place::Place;
use super::wire::{self, Kind};
use crate::{Error, Result};

/// How long ranks wait for one another at the start.
const START: Duration = Duration::from_secs(60);
/// How long an end waits for the others to have heard of it.
const END: Duration = Duration::from_secs(5);

/// The connections of a rank.
pub(super) struct Link {
    shared: Arc<Shared>,
    inbox: Mutex<Receiver<(usize, Event)>>,
    /// Collective operations so far.
    count: AtomicU64,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

/// What a connection brought.
enum Event {
    Data(Vec<u8>),
    /// A rank is lost; which, and why, is kept in [`Shared::lost`].
    Lost,
    Bye,
}

struct Shared {
    rank: usize,
    world: usize,
    /// The other ends, by rank.
    peers: BTreeMap<usize, Mutex<TcpStream>>,
    lost: Mutex<Option<(usize, String)>>,
    /// Signalled when a rank is lost and when this one ends.
    changed: Condvar,
    ended: AtomicBool,
}

type Act = Box<dyn FnOnce(&Error) + Send>;

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl fmt::Debug for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rank {} of {}", self.shared.rank, self.shared.world)
    }
}

impl Link {
    /// Meets the others.
    pub fn new(place: &Place, listener: Option<TcpListener>) -> Result<Self> {
        let streams = match place.rank {
            0 => arrivals(place, &listener.map_or_else(|| place.listen(), Ok)?)?,
            _ => [(0, arrive(place)?)].into(),
        };
        let setup = |e: io::Error| Error::argument("ranks", format!("a connection cannot be set up: {e}"));
        let mut readers = vec![];
        for (rank, stream) in &streams {
            stream.set_nodelay(true).map_err(setup)?;
            stream.set_read_timeout(Some(place.patience / 20)).map_err(setup)?;
            stream.set_write_timeout(Some(place.patience)).map_err(setup)?;
            readers.push((*rank, stream.try_clone().map_err(setup)?));
        }
        let shared = Arc::new(Shared {
            rank: place.rank,
            world: place.world,
            peers: streams.into_iter().map(|(rank, stream)| (rank, Mutex::new(stream))).collect(),
            lost: Mutex::default(),
            changed: Condvar::new(),
            ended: AtomicBool::new(false),
        });
        let (sender, inbox) = channel();
        let mut threads = vec![];
        for (rank, stream) in readers {
            let (shared, sender) = (shared.clone(), sender.clone());
            threads.push(thread::spawn(move || shared.listen(rank, stream, &sender)));
        }
        let beating = shared.clone();
        let every = place.patience / 8;
        threads.push(thread::spawn(move || beating.beat(every)));
        Ok(Self { shared, inbox: Mutex::new(inbox), count: AtomicU64::new(0), threads: Mutex::new(threads) })
    }

    pub fn rank(&self) -> usize {
        self.shared.rank
    }
    pub fn world(&self) -> usize {
        self.shared.world
    }

    /// A collective operation: what rank 0 makes of every rank's payload, in their order.
    pub fn exchange(
        &self,
        what: &str,
        payload: Vec<u8>,
        combine: impl FnOnce(Vec<Vec<u8>>) -> Result<Vec<u8>>,
    ) -> Result<Vec<u8>> {
        let inbox = locked(&self.inbox);
        // Which operation it is, so that none is taken for another.
        let name = format!("{what} ({})", self.count.fetch_add(1, Ordering::Relaxed));
        let shared = &self.shared;
        if shared.rank != 0 {
            let named = [&(name.len() as u64).to_le_bytes()[..], name.as_bytes(), &payload].concat();
            drop(payload);
            shared.send(0, Kind::Data, &named)?;
            return shared.next(&inbox).map(|(_, reply)| reply);
        }
        let mut all: BTreeMap<usize, Vec<u8>> = [(0, payload)].into();
        let refused = |e: Error| {
            let (rank, message) = match e {
                Error::Rank { rank, message } => (rank, message),
                other => (0, other.to_string()),
            };
            shared.tell(rank, &message, None);
            shared.lose(rank, message)
        };
        while all.len() < shared.world {
            let (rank, mut data) = shared.next(&inbox)?;
            let len = data.first_chunk().map_or(usize::MAX, |len| u64::from_le_bytes(*len) as usize);
            let theirs = data.get(8..).and_then(|data| data.get(..len)).unwrap_or_default();
            if theirs != name.as_bytes() {
                let message = format!("is at {}, where rank 0 is at {name}", String::from_utf8_lossy(theirs));
                return Err(refused(Error::Rank { rank, message }));
            }
            data.drain(..8 + len);
            all.insert(rank, data);
        }
        let reply = combine(all.into_values().collect()).map_err(refused)?;
        shared.peers.keys().try_for_each(|&rank| shared.send(rank, Kind::Data, &reply))?;
        Ok(reply)
    }

    /// Tells the others that this rank cannot go on.
    pub fn fail(&self, message: &str) {
        let shared = &self.shared;
        // As good as lost itself: it may wait for a GPU that waits for the others.
        locked(&shared.lost).get_or_insert((shared.rank, message.into()));
        shared.changed.notify_all();
        shared.tell(shared.rank, message, None);
    }

    /// Acts once a rank was lost and this one has not ended so much later.
    pub fn when_lost(&self, after: Duration, act: Act) {
        let shared = self.shared.clone();
        thread::spawn(move || {
            let mut lost = locked(&shared.lost);
            while lost.is_none() && !shared.ended.load(Ordering::SeqCst) {
                lost = shared.changed.wait(lost).unwrap_or_else(PoisonError::into_inner);
            }
            let Some((rank, message)) = lost.clone() else { return };
            let end = Instant::now() + after;
            while !shared.ended.load(Ordering::SeqCst) {
                let left = end.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    drop(lost);
                    return act(&Error::Rank { rank, message });
                }
                lost = shared.changed.wait_timeout(lost, left).unwrap_or_else(PoisonError::into_inner).0;
            }
        });
    }
}

impl Drop for Link {
    /// Says good-bye, and waits until the others have heard it: what is on its way to them would be lost with an unread connection.
    fn drop(&mut self) {
        let shared = &self.shared;
        let lost = locked(&shared.lost).is_some();
        {
            let _order = locked(&shared.lost); // whoever waits for a change sees this one
            shared.ended.store(true, Ordering::SeqCst);
        }
        shared.changed.notify_all();
        for stream in shared.peers.values() {
            let mut stream = locked(stream);
            let _ = wire::write(&mut *stream, Kind::Bye, &[]);
            let _ = stream.shutdown(if lost { Shutdown::Both } else { Shutdown::Write });
        }
        let (end, mut threads) = (Instant::now() + END, std::mem::take(&mut *locked(&self.threads)));
        while !lost && Instant::now() < end && threads.iter().any(|thread| !thread.is_finished()) {
            thread::sleep(Duration::from_millis(2));
        }
        shared.peers.values().for_each(|stream| drop(locked(stream).shutdown(Shutdown::Both)));
        threads.retain(|thread| !thread.is_finished());
    }
}

impl Shared {
    /// The next part of a collective operation, and whose it is.
    fn next(&self, inbox: &Receiver<(usize, Event)>) -> Result<(usize, Vec<u8>)> {
        loop {
            // A loss may have been found by whoever writes.
            match inbox.recv_timeout(Duration::from_millis(200)) {
                Ok((rank, Event::Data(data))) => return Ok((rank, data)),
                Ok((rank, Event::Bye)) => return Err(self.lose(rank, "has ended, while others wait for it".into())),
                Ok((_, Event::Lost)) | Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                    if let Some((rank, message)) = locked(&self.lost).clone() {
                        return Err(Error::Rank { rank, message });
                    }
                }
            }
        }
    }

    fn send(&self, rank: usize, kind: Kind, payload: &[u8]) -> Result<()> {
        if let Some((rank, message)) = locked(&self.lost).clone() {
            return Err(Error::Rank { rank, message });
        }
        let written = wire::write(&mut *locked(&self.peers[&rank]), kind, payload);
        written.map_err(|e| {
            // What it said last counts more than that it no longer listens.
            thread::sleep(Duration::from_millis(200));
            self.lose(rank, gone(&e))
        })
    }

    /// Keeps the first loss, tells the others of it, and returns it.
    fn lose(&self, rank: usize, message: String) -> Error {
        let mut lost = locked(&self.lost);
        let first = lost.is_none();
        let (rank, message) = lost.get_or_insert((rank, message)).clone();
        drop(lost);
        self.changed.notify_all();
        if first {
            self.tell(rank, &message, Some(rank));
        }
        Error::Rank { rank, message }
    }

    /// Tells all but one of a loss.
    fn tell(&self, rank: usize, message: &str, except: Option<usize>) {
        let payload = [&(rank as u64).to_le_bytes()[..], message.as_bytes()].concat();
        for (_, stream) in self.peers.iter().filter(|(peer, _)| Some(**peer) != except) {
            let _ = wire::write(&mut *locked(stream), Kind::Failure, &payload);
        }
    }

    /// Reads a connection until it ends.
    fn listen(&self, rank: usize, stream: TcpStream, sender: &Sender<(usize, Event)>) {
        let mut stream = Patient { stream, ended: &self.ended };
        let event = loop {
            match wire::read(&mut stream) {
                Ok((Kind::Beat, _)) => {}
                Ok((Kind::Data, data)) => drop(sender.send((rank, Event::Data(data)))),
                Ok((Kind::Bye, _)) => {
                    let stream = locked(&self.peers[&rank]);
                    let _ = stream.shutdown(Shutdown::Write);
                    break Event::Bye;
                }
                Ok((Kind::Failure, payload)) => {
                    let of = payload.first_chunk().map_or(rank, |of| u64::from_le_bytes(*of) as usize);
                    let message = String::from_utf8_lossy(payload.get(8..).unwrap_or_default()).into_owned();
                    self.lose(of, message);
                    break Event::Lost;
                }
                Err(e) => {
                    if !self.ended.load(Ordering::SeqCst) {
                        self.lose(rank, gone(&e));
                    }
                    break Event::Lost;
                }
            }
        };
        let _ = sender.send((rank, event));
    }

    /// Gives signs of life.
    fn beat(&self, every: Duration) {
        let mut lost = locked(&self.lost);
        let over = |lost: &Option<_>| self.ended.load(Ordering::SeqCst) || lost.is_some();
        while !over(&lost) {
            lost = self.changed.wait_timeout(lost, every).unwrap_or_else(PoisonError::into_inner).0;
            if over(&lost) {
                return;
            }
            drop(lost);
            for (rank, stream) in &self.peers {
                // Who is being written to hears that this rank lives.
                let failed = stream.try_lock().ok().and_then(|mut stream| wire::write(&mut *stream, Kind::Beat, &[]).err());
                // One that ended well is no loss; the reader knows.
                if failed.is_some_and(|e| e.kind() == io::ErrorKind::WouldBlock) {
                    self.lose(*rank, gone(&io::ErrorKind::TimedOut.into()));
                }
            }
            lost = locked(&self.lost);
        }
    }
}

/// Why a connection ended, in words.
fn gone(e: &io::Error) -> String {
    use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, TimedOut, UnexpectedEof, WouldBlock};
    match e.kind() {
        UnexpectedEof | ConnectionReset | ConnectionAborted | BrokenPipe => "went away without a word".into(),
        TimedOut | WouldBlock => "gives no sign of life".into(),
        _ => format!("the connection failed: {e}"),
    }
}

/// A connection whose reads time out after twenty times without anything to read. A process that was stopped for a while in between, all of
/// it, has not waited meanwhile.
struct Patient<'a> {
    stream: TcpStream,
    ended: &'a AtomicBool,
}

impl Read for Patient<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut waited = 0;
        loop {
            match self.stream.read(buffer) {
                Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                    waited += 1;
                    if waited >= 20 || self.ended.load(Ordering::SeqCst) {
                        return Err(io::ErrorKind::TimedOut.into());
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                read => return read,
            }
        }
    }
}

/// Rank 0: the connections of all others.
fn arrivals(place: &Place, listener: &TcpListener) -> Result<BTreeMap<usize, TcpStream>> {
    let failed = |e: io::Error| Error::argument("ranks", format!("rank 0 cannot listen: {e}"));
    listener.set_nonblocking(true).map_err(failed)?;
    let (mut found, end) = (BTreeMap::new(), Instant::now() + START);
    while found.len() + 1 < place.world {
        match listener.accept() {
            Ok((stream, _)) => {
                // Whoever does not belong here is let go.
                if let Ok(rank) = greeted(place, &stream) {
                    found.entry(rank).or_insert(stream);
                }
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                if Instant::now() > end {
                    let missing = (1..place.world).find(|rank| !found.contains_key(rank)).unwrap_or_default();
                    let message = format!("did not come to {}:{} within {} s", place.address, place.port, START.as_secs());
                    return Err(Error::Rank { rank: missing, message });
                }
                thread::sleep(Duration::from_millis(5));
            }
            Err(e) => return Err(failed(e)),
        }
    }
    for stream in found.values_mut() {
        stream.write_all(&place.greeting()).map_err(failed)?;
    }
    Ok(found)
}

/// Rank 0: which rank has come, if it belongs to this run.
fn greeted(place: &Place, mut stream: &TcpStream) -> io::Result<usize> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(Duration::from_secs(2)))?;
    let mut hello = [0; 40];
    stream.read_exact(&mut hello)?;
    let rank = u64::from_le_bytes(*hello.first_chunk().expect("eight bytes")) as usize;
    let belongs = hello[8..] == place.greeting() && (1..place.world).contains(&rank);
    if belongs { Ok(rank) } else { Err(io::ErrorKind::InvalidData.into()) }
}

/// Another rank: the connection to rank 0.
fn arrive(place: &Place) -> Result<TcpStream> {
    let end = Instant::now() + START;
    let failed = |e: &dyn fmt::Display| Error::Rank { rank: 0, message: format!("at {}:{}: {e}", place.address, place.port) };
    let mut stream = loop {
        let reached = place.addresses().and_then(|all| TcpStream::connect(&*all));
        match reached {
            Ok(stream) => break stream,
            Err(e) if Instant::now() > end => return Err(failed(&format!("{e}, for {} s", START.as_secs()))),
            Err(_) => thread::sleep(Duration::from_millis(50)),
        }
    };
    let greet = |stream: &mut TcpStream| -> io::Result<[u8; 32]> {
        stream.set_read_timeout(Some(START))?;
        let mut reply = [0; 32];
        stream.write_all(&[&(place.rank as u64).to_le_bytes()[..], &place.greeting()].concat())?;
        stream.read_exact(&mut reply)?;
        Ok(reply)
    };
    match greet(&mut stream) {
        Ok(reply) if reply == place.greeting() => Ok(stream),
        Err(e) if !matches!(e.kind(), io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset) => Err(failed(&e)),
        _ => Err(failed(&"who listens there belongs to another run, or has another version or number of ranks")),
    }
}
