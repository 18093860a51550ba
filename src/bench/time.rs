//! The one way to time a call, on every device.

use std::time::{Duration, Instant};

use crate::device::Stamp;
use crate::{Device, Result};

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
    marks: Vec<(Stamp, Stamp)>,
}

impl Watch {
    fn new(device: &Device) -> Self {
        Self { device: device.clone(), marks: vec![] }
    }

    /// Times `f`. On a GPU that is the time that its stream takes from the end of what was started before to the end of what `f`
    /// starts.
    ///
    /// # Errors
    /// Those of `f`, and the driver's.
    pub fn time<R>(&mut self, f: impl FnOnce() -> Result<R>) -> Result<R> {
        let start = self.device.stamp()?;
        let result = f()?;
        self.marks.push((start, self.device.stamp()?));
        Ok(result)
    }

    /// Milliseconds of what was timed, and the clock meanwhile.
    fn read(&mut self) -> Result<(Vec<f64>, Option<u32>)> {
        // Before the wait, while the GPU still works.
        let clock = self.device.clock_mhz();
        self.device.synchronize()?;
        Ok((self.marks.drain(..).map(|(a, b)| a.ms_until(&b)).collect::<Result<_>>()?, clock))
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
    let watch = &mut Watch::new(device);
    if device.is_cpu() {
        f(watch)?;
        watch.marks.clear();
        let start = Instant::now();
        for i in 1..=MOST {
            f(watch)?;
            if i >= FEWEST && start.elapsed().as_secs_f64() > 0.3 {
                break;
            }
        }
        let (ms, _) = watch.read()?;
        return samples(ms, None, "wall clock");
    }
    laps(watch, 2, &mut f)?;
    let first = laps(watch, 3, &mut f)?.0.into_iter().fold(f64::INFINITY, f64::min);
    let count = (BUDGET_MS / first.max(1e-3)).clamp(FEWEST as f64, MOST as f64) as usize;
    let (ms, clock) = laps(watch, count, &mut f)?;
    samples(ms, clock, "events")
}

fn samples(ms: Vec<f64>, clock_mhz: Option<u32>, how: &'static str) -> Result<Samples> {
    let samples = Samples::new(ms, how).ok_or_else(|| crate::Error::numeric("bench", "the call marked nothing to be timed"))?;
    Ok(Samples { clock_mhz, ..samples })
}

/// Times a call that allocates nothing: if it is short and the device can replay it, without the cost of launching it.
///
/// # Errors
/// Those of the call; the driver's.
pub fn time_replayed(device: &Device, f: &mut dyn FnMut() -> Result<()>) -> Result<Samples> {
    let plain = time(device, |watch| watch.time(&mut *f))?;
    if plain.median() >= SHORT_MS {
        return Ok(plain);
    }
    // Without a replay, for whatever reason, the launches themselves are timed: the answer says so.
    Ok(replayed(device, &mut *f)?.unwrap_or(plain))
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
}
