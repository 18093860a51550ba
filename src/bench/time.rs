//! The one way to time a call, on every device.

use std::time::{Duration, Instant};

use crate::device::Stamp;
use crate::{Device, Error, Result};

/// Calls on a GPU that are shorter than this are replayed, so that launching them does not count.
const SHORT_MS: f64 = 0.05;
/// Calls of one replay.
const REPLAYED: usize = 20;
/// What one measurement on a GPU may take, about.
const BUDGET_MS: f64 = 60.0;
/// The most calls that are measured.
const MOST: usize = 50;
/// The fewest.
const FEWEST: usize = 5;
/// What the calls between two events take at least, about: an event waits until all that was written has left the multiprocessors, and
/// the next kernel waits for it, which would count once a call.
const BETWEEN_MS: f64 = 1.0;
/// The most calls between two events.
const TOGETHER: usize = 20;

/// How long each of some calls took.
#[derive(Clone, Debug)]
pub struct Samples {
    /// Milliseconds, in rising order; at least one.
    ms: Vec<f64>,
    /// How that was measured.
    pub how: &'static str,
    /// The clock of the GPU's multiprocessors while it worked, in MHz.
    pub clock_mhz: Option<u32>,
}

impl Samples {
    /// From the milliseconds of each call; `None` without any.
    pub fn new(mut ms: Vec<f64>, how: &'static str) -> Option<Self> {
        ms.sort_by(f64::total_cmp);
        (!ms.is_empty()).then_some(Self { ms, how, clock_mhz: None })
    }

    /// The time that so many of 100 calls stay within.
    pub fn percentile(&self, of_100: usize) -> f64 {
        let last = self.ms.len() - 1;
        self.ms[(last * of_100.min(100) + 50) / 100]
    }

    /// The median, in milliseconds.
    pub fn median(&self) -> f64 {
        self.ms[self.ms.len() / 2]
    }

    /// The range of the middle 80 % of the calls over the median.
    pub fn spread(&self) -> f64 {
        (self.percentile(90) - self.percentile(10)) / self.median()
    }
}

/// Marks the part of a call that is timed.
pub struct Watch {
    device: Device,
    /// When so many calls began and ended.
    marks: Vec<(Stamp, Stamp, usize)>,
}

impl Watch {
    pub(super) fn new(device: &Device) -> Self {
        Self { device: device.clone(), marks: vec![] }
    }

    /// Times `f`. On a GPU that is the time that its stream takes from the end of what was started before to the end of what `f`
    /// starts.
    ///
    /// # Errors
    /// Those of `f`, and the driver's.
    pub fn time<R>(&mut self, f: impl FnOnce() -> Result<R>) -> Result<R> {
        self.time_together(1, f)
    }

    /// Times `f`, which makes so many calls: each is said to have taken its share.
    ///
    /// # Errors
    /// No calls; those of [`Watch::time`].
    pub fn time_together<R>(&mut self, calls: usize, f: impl FnOnce() -> Result<R>) -> Result<R> {
        if calls == 0 {
            return Err(Error::argument("calls", "expected one at least, got 0"));
        }
        let start = self.device.stamp()?;
        let result = f()?;
        self.marks.push((start, self.device.stamp()?, calls));
        Ok(result)
    }

    /// Milliseconds of a call, for all that was timed, and the clock meanwhile.
    fn read(&mut self) -> Result<(Vec<f64>, Option<u32>)> {
        // Before the wait, while the GPU still works.
        let clock = self.device.clock_mhz();
        self.device.synchronize()?;
        let ms = |(a, b, calls): (Stamp, Stamp, usize)| a.ms_until(&b).map(|ms| ms / calls as f64);
        Ok((self.marks.drain(..).map(ms).collect::<Result<_>>()?, clock))
    }
}

/// Calls `f` so many times.
fn laps(watch: &mut Watch, count: usize, f: &mut dyn FnMut(&mut Watch) -> Result<()>) -> Result<(Vec<f64>, Option<u32>)> {
    for _ in 0..count {
        f(watch)?;
    }
    watch.read()
}

/// Times a call that marks what counts of it with [`Watch::time`], once in every call: some calls to warm up, then up to 50.
///
/// # Errors
/// Those of the call; the driver's.
pub fn time(device: &Device, mut f: impl FnMut(&mut Watch) -> Result<()>) -> Result<Samples> {
    time_together(device, 1, |watch, _| f(watch))
}

/// The same of calls that can be made one after the other: `f` makes as many as it is told, at most `most`, between two marks, with
/// [`Watch::time_together`]. On a GPU they are as many as take a millisecond.
///
/// # Errors
/// Those of the calls; the driver's.
pub fn time_together(device: &Device, most: usize, mut f: impl FnMut(&mut Watch, usize) -> Result<()>) -> Result<Samples> {
    let watch = &mut Watch::new(device);
    if device.is_cpu() {
        f(watch, 1)?;
        watch.marks.clear();
        let start = Instant::now();
        for i in 1..=MOST {
            f(watch, 1)?;
            if i >= FEWEST && start.elapsed().as_secs_f64() > 0.3 {
                break;
            }
        }
        let (ms, _) = watch.read()?;
        return samples(ms, None, "wall clock");
    }
    laps(watch, 2, &mut |watch| f(watch, 1))?;
    let first = laps(watch, 3, &mut |watch| f(watch, 1))?.0.into_iter().fold(f64::INFINITY, f64::min);
    let (count, calls) = plan(first, most);
    let (ms, clock) = laps(watch, count, &mut |watch| f(watch, calls))?;
    samples(ms, clock, "events")
}

/// How many laps, and how many calls of each, where a call takes so long and at most `most` can be made together.
fn plan(ms: f64, most: usize) -> (usize, usize) {
    let ms = ms.max(1e-3);
    let calls = (BETWEEN_MS / ms).ceil().clamp(1.0, most.clamp(1, TOGETHER) as f64);
    ((BUDGET_MS / (ms * calls)).clamp(FEWEST as f64, MOST as f64) as usize, calls as usize)
}

fn samples(ms: Vec<f64>, clock_mhz: Option<u32>, how: &'static str) -> Result<Samples> {
    let samples = Samples::new(ms, how).ok_or_else(|| Error::numeric("bench", "the call marked nothing to be timed"))?;
    Ok(Samples { clock_mhz, ..samples })
}

/// Times a call that allocates nothing: if it is short and the device can replay it, without the cost of launching it.
///
/// # Errors
/// Those of the call; the driver's.
pub fn time_replayed(device: &Device, f: &mut dyn FnMut() -> Result<()>) -> Result<Samples> {
    let plain = time_together(device, usize::MAX, |watch, calls| repeat(watch, calls, f))?;
    if plain.median() >= SHORT_MS {
        return Ok(plain);
    }
    // Without a replay, for whatever reason, the launches themselves are timed: the answer says so.
    Ok(replayed(device, &mut *f)?.unwrap_or(plain))
}

/// So many calls of `f`, marked together.
///
/// # Errors
/// Those of `f`, and the driver's.
pub fn repeat(watch: &mut Watch, calls: usize, f: &mut dyn FnMut() -> Result<()>) -> Result<()> {
    watch.time_together(calls, || (0..calls).try_for_each(|_| f()))
}

/// Times a call from a replay of 20; `None` where the device cannot record it.
fn replayed(device: &Device, f: &mut dyn FnMut() -> Result<()>) -> Result<Option<Samples>> {
    let Ok(replay) = device.record(|| (0..REPLAYED).try_for_each(|_| f())) else { return Ok(None) };
    replay.launch()?;
    let watch = &mut Watch::new(device);
    let (ms, clock) = laps(watch, MOST, &mut |watch| watch.time(|| replay.launch()))?;
    samples(ms.into_iter().map(|ms| ms / REPLAYED as f64).collect(), clock, "graph replay").map(Some)
}

/// Times a call that allocates nothing and finds nothing in the cache: `flush` runs before every call and is not counted. Where calls
/// can be replayed, the median of a replay of both less that of a replay of `flush` alone, else the median between events; in
/// milliseconds.
///
/// # Errors
/// Those of both; the driver's.
pub fn time_cold(device: &Device, f: &mut dyn FnMut() -> Result<()>, flush: &mut dyn FnMut() -> Result<()>) -> Result<f64> {
    let both = replayed(device, &mut || flush().and_then(|()| f()))?;
    if let (Some(both), Some(alone)) = (both, replayed(device, &mut *flush)?) {
        return Ok(both.median() - alone.median());
    }
    let cold = time(device, |watch| {
        flush()?;
        watch.time(&mut *f)
    })?;
    Ok(cold.median())
}

/// The time of so many calls in all, for harnesses that count calls themselves (criterion's `iter_custom`).
///
/// # Errors
/// Those of the call; the driver's.
pub fn total(device: &Device, calls: u64, mut f: impl FnMut(&mut Watch) -> Result<()>) -> Result<Duration> {
    let watch = &mut Watch::new(device);
    let mut ms = 0.0;
    for i in 0..calls {
        f(watch)?;
        // Stamps are few, so that as many are open at a time.
        if i % 64 == 63 {
            ms += watch.read()?.0.iter().sum::<f64>();
        }
    }
    ms += watch.read()?.0.iter().sum::<f64>();
    Ok(Duration::from_secs_f64(ms / 1e3))
}

/// The seconds that a call takes once, everything it started included.
///
/// # Errors
/// Those of the call; a kernel that failed.
pub fn once<R>(device: &Device, f: impl FnOnce() -> Result<R>) -> Result<(R, f64)> {
    device.synchronize()?;
    let start = Instant::now();
    let result = f()?;
    device.synchronize()?;
    Ok((result, start.elapsed().as_secs_f64()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_ordered() {
        let s = Samples::new((1..=11).rev().map(f64::from).collect(), "test").unwrap();
        assert_eq!(
            (s.percentile(0), s.percentile(10), s.median(), s.percentile(90), s.percentile(100)),
            (1.0, 2.0, 6.0, 10.0, 11.0)
        );
        assert!((s.spread() - 8.0 / 6.0).abs() < 1e-12);
        let one = Samples::new(vec![2.0], "test").unwrap();
        assert_eq!((one.percentile(10), one.median(), one.percentile(90), one.spread()), (2.0, 2.0, 2.0, 0.0));
        assert!(Samples::new(vec![], "test").is_none());
    }

    #[test]
    fn only_what_is_marked_counts() {
        let pause = Duration::from_millis(4);
        let sleep = |time| {
            std::thread::sleep(time);
            Ok(())
        };
        let timed = time(&Device::Cpu, |watch| {
            sleep(5 * pause)?;
            watch.time(|| sleep(pause))
        });
        let ms = timed.unwrap().percentile(0);
        assert!((4.0..20.0).contains(&ms), "{ms}");
        assert!(time(&Device::Cpu, |_| Ok(())).is_err(), "nothing marked");
        let all = total(&Device::Cpu, 3, |watch| watch.time(|| sleep(pause))).unwrap();
        assert!(all >= 3 * pause, "{all:?}");
    }

    #[test]
    fn calls_that_were_timed_together_share_the_time() {
        let pause = Duration::from_millis(40);
        let watch = &mut Watch::new(&Device::Cpu);
        let sleep = || {
            std::thread::sleep(pause);
            Ok(())
        };
        watch.time_together(4, sleep).unwrap();
        watch.time(sleep).unwrap();
        let mut calls = 0;
        repeat(watch, 3, &mut || {
            calls += 1;
            Ok(())
        })
        .unwrap();
        let (ms, _) = watch.read().unwrap();
        assert!((10.0..40.0).contains(&ms[0]) && ms[1] >= 40.0 && ms.len() == 3 && calls == 3, "{ms:?} {calls}");
        assert!(watch.time_together(0, || Ok(())).unwrap_err().to_string().contains("got 0"));
    }

    #[test]
    fn short_calls_are_timed_several_at_a_time() {
        // (laps, calls of each)
        assert_eq!(plan(0.1, usize::MAX), (50, 10));
        assert_eq!(plan(0.4, usize::MAX), (49, 3));
        assert_eq!(plan(0.4, 2), (50, 2), "no more than there is memory for");
        assert_eq!(plan(0.002, usize::MAX), (50, 20));
        assert_eq!(plan(3.0, usize::MAX), (20, 1));
        assert_eq!(plan(0.1, 0), (50, 1));
        for (ms, most) in [(0.1, usize::MAX), (0.4, usize::MAX), (0.9, usize::MAX), (5.0, 3)] {
            let (_, calls) = plan(ms, most);
            assert!(calls as f64 * ms >= BETWEEN_MS, "{calls} calls of {ms} ms");
        }
    }
}
