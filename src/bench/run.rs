//! Checks a case's answer, then times it.

use std::time::Duration;

use super::list::{copied, fits};
use super::time::{Samples, Watch, repeat, time, time_cold, time_replayed, time_together, total};
use crate::ops::{Call, Case, Pass, Run, Timing, repeated};
use crate::tape::{Tape, Var};
use crate::{DType, Device, Error, Result, Tensor};

/// What was measured of a case.
#[derive(Clone, Debug)]
pub struct Measured {
    /// The call, repeated: what fits into a GPU's second-level cache stays there.
    pub hot: Samples,
    /// Milliseconds of a call that finds nothing in that cache; only where what it moves would fit.
    pub cold_ms: Option<f64>,
    /// Bytes that must be moved; 0 where arithmetic limits.
    pub bytes: f64,
    /// Additions and multiplications; 0 where memory limits.
    pub flops: f64,
    /// Bytes a millisecond of a copy of rows × n values, timed just before.
    pub copy_rate: Option<f64>,
    /// The kernel that ran, where there are several for one operation.
    pub ran: Option<String>,
}

/// Wakes the card up: its clocks settle under load.
///
/// # Errors
/// The driver's.
pub fn warm_up(device: &Device) -> Result<()> {
    if !device.is_cpu() {
        let start = std::time::Instant::now();
        let x = repeated([1 << 26], 0, DType::F32, device)?;
        while start.elapsed().as_secs_f64() < 1.0 {
            time(device, |watch| watch.time(|| Tensor::stack(std::slice::from_ref(&x)).map(drop)))?;
        }
    }
    Ok(())
}

/// Runs a case once: its operands (for [`Pass::Backward`] also the gradient of the result) and its results, as [`Case::check`] takes
/// them.
///
/// # Errors
/// Too little memory, sizes the case cannot have, and whatever it reports.
pub fn answer(case: &Case, dtype: DType, device: &Device) -> Result<(Vec<Tensor>, Vec<Tensor>)> {
    fits(case, dtype, device)?;
    let mut operands = case.operands(dtype, device)?;
    let results = match prepared(case, &operands)? {
        Some((mut call, _)) => {
            (call.run)()?;
            (call.results)()?
        }
        None => gradients(case, timing(case)?.pass, &mut operands)?,
    };
    Ok((operands, results))
}

fn timing(case: &Case) -> Result<&Timing> {
    case.timing.as_ref().ok_or_else(|| Error::argument("bench", format!("{case:?} is not a case for benches")))
}

/// The call made ready, and whether it allocates nothing; `None` for a graph on the tape.
fn prepared(case: &Case, operands: &[Tensor]) -> Result<Option<(Call, bool)>> {
    if let Some(call) = super::bare::call(timing(case)?.kernel, operands)? {
        return Ok(Some((call, true)));
    }
    match &case.run {
        Run::Graph(_) => Ok(None),
        Run::Call(prepare) | Run::Whole(prepare, ..) => Ok(Some((prepare(operands)?, false))),
    }
}

/// The result of a graph, or its gradients; puts the gradient of the result behind the operands.
fn gradients(case: &Case, pass: Pass, operands: &mut Vec<Tensor>) -> Result<Vec<Tensor>> {
    let tape = Tape::new();
    if pass == Pass::Forward {
        let constants = operands.iter().map(|x| tape.constant(x.clone())).collect();
        return Ok(vec![case.build(constants)?.into_value()]);
    }
    let variables: Vec<Var> = operands.iter().map(|x| tape.variable(x.clone())).collect();
    let y = case.build(variables.clone())?;
    let mut grads = match pass {
        Pass::Recorded => tape.backward(y)?,
        _ => {
            let dy = gradient_like(y.value(), operands.len())?;
            operands.push(dy.clone());
            tape.backward_from(y, dy)?
        }
    };
    variables.iter().map(|v| grads.take(v)).collect()
}

/// A gradient for a result, of a seed that no operand has.
fn gradient_like(y: &Tensor, operands: usize) -> Result<Tensor> {
    repeated(y.shape(), 1 + operands as u64, y.dtype(), &y.device())
}

/// So many calls of a graph; what counts of them is marked: that they follow one another. What a call finds ready is made before.
fn call_graph(case: &Case, pass: Pass, operands: &[Tensor], dy: Option<&Tensor>, watch: &mut Watch, calls: usize) -> Result<()> {
    match (pass, dy) {
        (Pass::Forward, _) => repeat(watch, calls, &mut || {
            let tape = Tape::new();
            case.build(operands.iter().map(|x| tape.constant(x.clone())).collect()).map(drop)
        }),
        (Pass::Recorded, _) => {
            let tapes: Vec<_> = (0..calls).map(|_| Tape::new()).collect();
            // Operands of its own, which the gradient takes the place of.
            let copy = |x: &Tensor| Tensor::stack(std::slice::from_ref(x))?.reshape(x.shape());
            let ready = |tape| operands.iter().map(|x| Ok(Tape::variable(tape, copy(x)?))).collect::<Result<Vec<_>>>();
            let ready = tapes.iter().map(ready).collect::<Result<Vec<_>>>()?;
            watch.time_together(calls, || ready.into_iter().try_for_each(|variables| case.build(variables).map(drop)))
        }
        (Pass::Backward, Some(dy)) => {
            let tapes: Vec<_> = (0..calls).map(|_| Tape::new()).collect();
            let forward = |tape| case.build(operands.iter().map(|x| Tape::variable(tape, x.clone())).collect());
            let ready = tapes.iter().map(forward).collect::<Result<Vec<_>>>()?;
            let mut ready = tapes.iter().zip(ready);
            watch.time_together(calls, || ready.try_for_each(|(tape, y)| tape.backward_from(y, dy.clone()).map(drop)))
        }
        (Pass::Backward, None) => Err(Error::argument("bench", "a gradient without one of the result")),
    }
}

/// A case whose answer was checked, ready to be timed.
pub struct Caller<'c> {
    case: &'c Case,
    pass: Pass,
    dtype: DType,
    device: Device,
    operands: Vec<Tensor>,
    /// The gradient of the result, for [`Pass::Backward`].
    dy: Option<Tensor>,
    /// The call and whether it allocates nothing; `None` for a graph on the tape.
    prepared: Option<(Call, bool)>,
}

impl<'c> Caller<'c> {
    /// Checks the case's answer.
    ///
    /// # Errors
    /// A wrong answer; those of [`answer`].
    pub fn checked(case: &'c Case, dtype: DType, device: &Device) -> Result<Self> {
        let pass = timing(case)?.pass;
        let (mut operands, results) = answer(case, dtype, device)?;
        case.check(&operands, &results)?;
        drop(results);
        if let Run::Whole(..) = case.run {
            operands.clear();
            return Ok(Self { case, pass, dtype, device: device.clone(), operands, dy: None, prepared: None });
        }
        let prepared = prepared(case, &operands)?;
        let backward = prepared.is_none() && pass == Pass::Backward;
        let dy = if backward { operands.pop() } else { None };
        Ok(Self { case, pass, dtype, device: device.clone(), operands, dy, prepared })
    }

    /// So many calls.
    fn call(&mut self, watch: &mut Watch, calls: usize) -> Result<()> {
        match &mut self.prepared {
            Some((call, _)) => repeat(watch, calls, &mut call.run),
            None => call_graph(self.case, self.pass, &self.operands, self.dy.as_ref(), watch, calls),
        }
    }

    /// How many calls the device has the memory for, where each needs something made ready before.
    fn most_together(&self) -> Result<usize> {
        if self.prepared.is_some() || self.pass == Pass::Forward {
            return Ok(usize::MAX);
        }
        let held = timing(self.case)?.held * self.dtype.size() as f64;
        let free = self.device.free_bytes().unwrap_or(0) as f64;
        // Half of it: so that what the calls themselves need is there too. Saturates.
        Ok((free / 2.0 / held.max(1.0)) as usize)
    }

    /// Times it, repeated.
    ///
    /// # Errors
    /// What the case reports; the driver's.
    pub fn time(&mut self) -> Result<Samples> {
        if let Run::Whole(_, whole, what) = &self.case.run {
            return Samples::new(vec![whole(self.dtype, &self.device)?], what)
                .ok_or_else(|| Error::numeric("bench", "no samples"));
        }
        let device = self.device.clone();
        match &mut self.prepared {
            Some((call, true)) => time_replayed(&device, &mut call.run),
            _ => time_together(&device, self.most_together()?, |watch, calls| self.call(watch, calls)),
        }
    }

    /// The time of so many calls in all, for harnesses that count calls themselves (criterion's `iter_custom`).
    ///
    /// # Errors
    /// What the case reports; the driver's.
    pub fn total(&mut self, calls: u64) -> Result<Duration> {
        if let Run::Whole(_, whole, _) = &self.case.run {
            let ms = (0..calls).map(|_| whole(self.dtype, &self.device)).sum::<Result<f64>>()?;
            return Ok(Duration::from_secs_f64(ms / 1e3));
        }
        total(&self.device.clone(), calls, |watch| self.call(watch, 1))
    }

    /// Milliseconds of a call that finds nothing in the second-level cache; `None` where what it moves would not fit.
    fn cold(&mut self, bytes: f64) -> Result<Option<f64>> {
        let device = self.device.clone();
        let Some(mut flush) = flush(bytes, &device)? else { return Ok(None) };
        if let Some((call, true)) = &mut self.prepared {
            return time_cold(&device, &mut call.run, &mut flush).map(Some);
        }
        let cold = time(&device, |watch| {
            flush()?;
            self.call(watch, 1)
        })?;
        Ok(Some(cold.median()))
    }
}

/// Checks a case, then times it.
///
/// # Errors
/// A wrong answer; those of [`answer`].
pub fn measure(case: &Case, dtype: DType, device: &Device) -> Result<Measured> {
    let timing = timing(case)?;
    let mut caller = Caller::checked(case, dtype, device)?;
    let copy_rate = copied(case).map(|copy| copy_rate(&copy, dtype, device)).transpose()?;
    let (bytes, flops) = (timing.moved * dtype.size() as f64, timing.flops);
    let ran = super::bare::ran(timing.kernel, timing.n, dtype, device)?;
    Ok(Measured { hot: caller.time()?, cold_ms: caller.cold(bytes)?, bytes, flops, copy_rate, ran })
}

/// Bytes a millisecond of a copy.
fn copy_rate(copy: &Case, dtype: DType, device: &Device) -> Result<f64> {
    let operands = copy.operands(dtype, device)?;
    let prepared = prepared(copy, &operands)?;
    let mut caller = Caller { case: copy, pass: Pass::Forward, dtype, device: device.clone(), operands, dy: None, prepared };
    Ok(timing(copy)?.moved * dtype.size() as f64 / caller.time()?.median())
}

type Flush = Box<dyn FnMut() -> Result<()>>;

/// Overwrites more than the second-level cache holds, where `bytes` would fit into it.
fn flush(bytes: f64, device: &Device) -> Result<Option<Flush>> {
    let Some(cache) = device.cache_bytes().filter(|&cache| bytes > 0.0 && bytes < cache as f64) else { return Ok(None) };
    // Twice the cache is read, and as much written.
    let x = Tensor::zeros([cache as usize / 2], DType::F32, device)?;
    Ok(prepared(&super::list::copy(x.len(), 1), &[x])?.map(|(call, _)| call.run))
}

#[cfg(test)]
mod tests {
    use super::super::one;
    use super::super::time::time_together;
    use super::*;

    #[test]
    fn several_calls_of_every_pass_follow_one_another() {
        for (kernel, pass) in [("rope", Pass::Forward), ("cross-entropy", Pass::Recorded), ("rms-norm-backward", Pass::Backward)]
        {
            let (case, dtype) = one(kernel, Some(128), Some(8), None, &Device::Cpu).unwrap();
            let mut caller = Caller::checked(&case, dtype, &Device::Cpu).unwrap();
            assert!(caller.pass == pass && caller.prepared.is_none(), "{kernel}");
            // Operands are the same after calls that write into their memory.
            let before: Vec<_> = caller.operands.iter().map(|x| x.to_f64_vec().unwrap()).collect();
            let samples = time_together(&Device::Cpu, 3, |watch, _| caller.call(watch, 3)).unwrap();
            assert!(samples.median() > 0.0, "{kernel}");
            let after: Vec<_> = caller.operands.iter().map(|x| x.to_f64_vec().unwrap()).collect();
            assert!(before == after, "{kernel}");
            assert!(caller.call(&mut Watch::new(&Device::Cpu), 0).is_err(), "{kernel}");
        }
    }
}
