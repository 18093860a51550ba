//! The GPU's clock, and the kernels that are called without tensors: Hadamard, fake quantisation, both in one pass, copies.

use std::sync::Arc;

use cudarc::driver::{CudaEvent, CudaGraph, CudaSlice, CudaStream, DriverError, sys};
use half::{bf16, f16};
use spinquant::device::cuda::CudaDevice;
use spinquant::kernels::{self, Float, HadamardMap};
use spinquant::{DType, Error, Result};

use super::run::{self, BLOCK, Timed, some, spec};
use super::{Job, Kernel, Measured, exact};

/// Calls shorter than this are replayed from a graph, so that launching them does not count.
const SHORT_MS: f64 = 0.05;
/// Calls a graph.
const GRAPH: usize = 20;
/// What one measurement may take, about.
const BUDGET_MS: f64 = 60.0;

fn failed(what: &str) -> impl FnOnce(DriverError) -> Error + '_ {
    move |e| Error::Cuda(format!("{what}: {e:?}"))
}

/// The median of many calls between events. Short calls are replayed from a graph where `graph` allows it: the calls may then
/// allocate nothing.
pub fn time(device: &CudaDevice, graph: bool, mut f: impl FnMut() -> Result<()>) -> Result<Timed> {
    // SAFETY: nothing here has another stream.
    let stream = unsafe { device.stream() };
    f()?;
    f()?;
    let first = median(stream, 3, &mut f)?;
    // Without a graph, for whatever reason, the launches themselves are timed: the answer says so.
    if graph
        && first < SHORT_MS
        && let Ok(graph) = capture(stream, &mut f)
    {
        let mut replay = || graph.launch().map_err(failed("graph launch"));
        replay()?;
        let ms = median(stream, 50, &mut replay)?;
        return Ok((ms / GRAPH as f64, "graph replay"));
    }
    let count = (BUDGET_MS / first.max(1e-3)).clamp(5.0, 50.0) as usize;
    Ok((median(stream, count, &mut f)?, "events"))
}

fn median(stream: &Arc<CudaStream>, count: usize, f: &mut impl FnMut() -> Result<()>) -> Result<f64> {
    let event =
        || -> Result<CudaEvent> { stream.record_event(Some(sys::CUevent_flags::CU_EVENT_DEFAULT)).map_err(failed("event")) };
    let mut events = vec![];
    for _ in 0..count {
        let start = event()?;
        f()?;
        events.push((start, event()?));
    }
    stream.synchronize().map_err(failed("a kernel failed"))?;
    let mut ms =
        events.iter().map(|(a, b)| a.elapsed_ms(b).map(f64::from)).collect::<Result<Vec<_>, _>>().map_err(failed("event"))?;
    ms.sort_by(f64::total_cmp);
    Ok(ms[count / 2])
}

/// A graph of [`GRAPH`] calls.
fn capture(stream: &Arc<CudaStream>, f: &mut impl FnMut() -> Result<()>) -> Result<CudaGraph> {
    stream.begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED).map_err(failed("graph capture"))?;
    let calls = (0..GRAPH).try_for_each(|_| f());
    // Always ended, or nothing else could run on this stream.
    let graph = stream.end_capture(sys::CUgraphInstantiate_flags(0)).map_err(failed("graph capture"));
    calls?;
    graph?.ok_or_else(|| Error::Cuda("the captured graph is empty".into()))
}

/// Checks, then times, one of the kernels above.
pub fn run(job: &Job, device: &CudaDevice) -> Result<Measured> {
    match job.dtype {
        DType::F32 => go::<f32>(job, device),
        DType::F16 => go::<f16>(job, device),
        DType::BF16 => go::<bf16>(job, device),
        other => Err(Error::dtype("bench", "f32, f16 or bf16", other)),
    }
}

fn go<T: Float>(job: &Job, device: &CudaDevice) -> Result<Measured> {
    // SAFETY: nothing here has another stream.
    let (stream, n, dtype) = (unsafe { device.stream() }, job.n, T::DTYPE);
    let x = normal::<T>(stream, job.rows * n)?;
    let mut y = stream.clone_dtod(&x).map_err(failed("allocation"))?;
    let bytes = 2.0 * (x.len() * dtype.size()) as f64;
    let (copy, how) = time(device, true, || stream.memcpy_dtod(&x, &mut y).map_err(failed("copy")))?;
    if job.kernel == Kernel::Copy {
        return Ok(Measured { ms: copy, how, bytes, flops: 0.0, copy: Some((copy, bytes)) });
    }
    let (map, spec) = (HadamardMap::new(stream, n)?, spec());
    let call = |y: &mut CudaSlice<T>| match job.kernel {
        Kernel::FakeQuant => kernels::fake_quant(stream, y, &x, n, &spec),
        Kernel::HadamardFakeQuant => kernels::hadamard_fake_quant(stream, y, &x, &map, &spec),
        _ => kernels::hadamard(stream, y, &x, &map, false),
    };
    call(&mut y)?;
    for r in some(job.rows) {
        let row = |t: &CudaSlice<T>| -> Result<Vec<f64>> {
            let values = stream.clone_dtoh(&t.slice(r * n..(r + 1) * n)).map_err(failed("copy from the GPU"))?;
            stream.synchronize().map_err(failed("a kernel failed"))?;
            Ok(values.into_iter().map(T::to_f64).collect())
        };
        let (x, y) = (row(&x)?, row(&y)?);
        match job.kernel {
            Kernel::FakeQuant => exact::quantised("fake_quant", &y, &x, &spec, dtype)?,
            Kernel::HadamardFakeQuant => {
                exact::quantised("hadamard_fake_quant", &y, &exact::hadamard(&x, map.map()), &spec, dtype)?;
            }
            _ => exact::close("hadamard", &y, &exact::hadamard(&x, map.map()), dtype, 1.0)?,
        }
    }
    let (ms, how) = time(device, true, || call(&mut y))?;
    Ok(Measured { ms, how, bytes, flops: 0.0, copy: Some((copy, bytes)) })
}

/// `len` normal values: a block from the host, doubled until there are enough.
fn normal<T: Float>(stream: &Arc<CudaStream>, len: usize) -> Result<CudaSlice<T>> {
    let first = len.min(BLOCK);
    let block: Vec<T> = run::block(1).slice(0, first)?.as_slice::<f64>()?.iter().map(|&v| T::from_f64(v)).collect();
    // SAFETY: every value is written below before anything reads it.
    let mut x = unsafe { stream.alloc::<T>(len) }.map_err(failed("allocation"))?;
    stream.memcpy_htod(&block, &mut x.slice_mut(..first)).map_err(failed("copy to the GPU"))?;
    let mut done = first;
    while done < len {
        let more = done.min(len - done);
        let (from, mut to) = x.split_at_mut(done);
        stream.memcpy_dtod(&from.slice(..more), &mut to.slice_mut(..more)).map_err(failed("copy"))?;
        done += more;
    }
    Ok(x)
}
