//! What waits: requests for the network, and whoever waits for room.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::Refusal;
use crate::Result;
use crate::eval::scores::TokenScore;

type Scores = Vec<Vec<TokenScore>>;
type Prompts = Arc<Vec<Vec<u32>>>;

/// How long the network waits before it looks whether the server stops.
const LOOK: Duration = Duration::from_millis(50);

/// Requests that wait for the network. Each holds a connection, so their number is bounded by that of connections.
#[derive(Default)]
pub(super) struct Queue {
    jobs: Mutex<VecDeque<Job>>,
    filled: Condvar,
}

/// A request's prompts, and where its answer goes.
pub(super) struct Job {
    prompts: Prompts,
    answer: SyncSender<Result<Scores, Refusal>>,
    given_up: Arc<AtomicBool>,
}

/// The other end of a job.
pub(super) struct Waiting {
    pub(super) prompts: Prompts,
    answer: Receiver<Result<Scores, Refusal>>,
    given_up: Arc<AtomicBool>,
}

impl Waiting {
    /// The answer, if it comes in time.
    pub(super) fn answer_within(&self, time: Duration) -> Option<Result<Scores, Refusal>> {
        match self.answer.recv_timeout(time) {
            Ok(answer) => Some(answer),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => Some(Err(Refusal::new(503, None, "the server stopped"))),
        }
    }

    /// Nobody wants the answer any more.
    pub(super) fn give_up(&self) {
        self.given_up.store(true, Ordering::SeqCst);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Queue {
    pub(super) fn put(&self, prompts: Vec<Vec<u32>>) -> Waiting {
        let (prompts, given_up, (sender, answer)) = (Arc::new(prompts), Arc::default(), sync_channel(1));
        let job = Job { prompts: Arc::clone(&prompts), answer: sender, given_up: Arc::clone(&given_up) };
        lock(&self.jobs).push_back(job);
        self.filled.notify_one();
        Waiting { prompts, answer, given_up }
    }

    /// The next requests for one pass, of which `fit` says how many by their lengths in tokens; none once `over` says that nothing more
    /// can come.
    pub(super) fn take(
        &self,
        fit: impl Fn(&mut dyn Iterator<Item = usize>) -> usize,
        over: impl Fn() -> bool,
    ) -> Option<Vec<Job>> {
        let mut jobs = lock(&self.jobs);
        loop {
            jobs.retain(|job| !job.given_up.load(Ordering::SeqCst));
            if !jobs.is_empty() {
                let count = fit(&mut jobs.iter().map(|job| job.prompts.iter().map(Vec::len).sum()));
                let count = count.min(jobs.len());
                return Some(jobs.drain(..count).collect());
            }
            if over() {
                return None;
            }
            jobs = self.filled.wait_timeout(jobs, LOOK).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// Answers requests by one call of `score`. Where that fails, each is asked alone, so that one does not fail another.
pub(super) fn answer(jobs: Vec<Job>, score: &dyn Fn(&[&[u32]]) -> Result<Scores>) {
    let prompts: Vec<&[u32]> = jobs.iter().flat_map(|job| job.prompts.iter().map(Vec::as_slice)).collect();
    match score(&prompts) {
        Ok(scores) => {
            let mut scores = scores.into_iter();
            for job in &jobs {
                // Nobody receives it where the client left.
                let _ = job.answer.send(Ok(scores.by_ref().take(job.prompts.len()).collect()));
            }
        }
        Err(e) if jobs.len() == 1 => drop(jobs[0].answer.send(Err(e.into()))),
        Err(_) => jobs.into_iter().for_each(|job| answer(vec![job], score)),
    }
}

/// Room for so much at once: connections, bytes.
pub(super) struct Room {
    free: Mutex<usize>,
    size: usize,
    freed: Condvar,
}

/// A part of a [`Room`] that is taken.
pub(super) struct Place<'a> {
    room: &'a Room,
    size: usize,
}

impl Room {
    pub(super) fn new(size: usize) -> Self {
        Self { free: Mutex::new(size), size, freed: Condvar::new() }
    }

    /// Waits until there is room.
    pub(super) fn enter(&self, size: usize) -> Place<'_> {
        loop {
            if let Some(place) = self.enter_within(size, Duration::from_secs(60)) {
                return place;
            }
        }
    }

    /// Waits for room no longer than this.
    pub(super) fn enter_within(&self, size: usize, time: Duration) -> Option<Place<'_>> {
        let size = size.min(self.size);
        let end = Instant::now() + time;
        let mut free = lock(&self.free);
        while *free < size {
            let left = end.checked_duration_since(Instant::now())?;
            free = self.freed.wait_timeout(free, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        *free -= size;
        Some(Place { room: self, size })
    }

    pub(super) fn is_full(&self) -> bool {
        *lock(&self.free) == 0
    }

    pub(super) fn is_unused(&self) -> bool {
        *lock(&self.free) == self.size
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        *lock(&self.room.free) += self.size;
        self.room.freed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Error;

    fn fake(prompts: &[&[u32]]) -> Result<Scores> {
        if prompts.iter().any(|prompt| prompt.contains(&9)) {
            return Err(Error::numeric("scores", "nine"));
        }
        let score =
            |likeliest: &u32| TokenScore { log_probability: -1.0, likeliest: *likeliest, likeliest_log_probability: -0.5 };
        Ok(prompts.iter().map(|prompt| prompt.iter().map(score).collect()).collect())
    }

    #[test]
    fn answers_go_to_whoever_asked() {
        let queue = Queue::default();
        let waiting = [vec![vec![1], vec![2, 3]], vec![vec![9]], vec![vec![4]], vec![vec![5]]].map(|prompts| queue.put(prompts));
        waiting[3].give_up();
        let by_two = |lengths: &mut dyn Iterator<Item = usize>| lengths.count().min(2);
        let take = || queue.take(by_two, || true);
        let first = take().unwrap();
        assert_eq!(first.len(), 2);
        answer(first, &fake);
        let second = take().unwrap();
        assert_eq!(second.len(), 1); // the fourth was given up
        answer(second, &fake);
        assert!(take().is_none());
        let got = |i: usize| waiting[i].answer_within(Duration::ZERO).unwrap();
        let ids = |scores: Scores| scores.iter().map(|s| s.iter().map(|s| s.likeliest).collect()).collect::<Vec<Vec<_>>>();
        assert_eq!(ids(got(0).unwrap()), [vec![1], vec![2, 3]]);
        assert_eq!(got(1).unwrap_err().status, 500); // and nobody else
        assert_eq!(ids(got(2).unwrap()), [[4]]);
        assert_eq!(got(3).unwrap_err().status, 503);
    }

    #[test]
    fn room_is_bounded_and_comes_back() {
        let room = Room::new(10);
        let (a, b) = (room.enter(4), room.enter(6));
        assert!(room.enter_within(1, Duration::from_millis(1)).is_none());
        drop(a);
        assert!(room.enter_within(5, Duration::from_millis(1)).is_none());
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| drop(room.enter(99))); // as much as there is
            drop(b);
            waits.join().unwrap();
        });
        assert!(room.is_unused());
    }
}
