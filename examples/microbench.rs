//! A kernel without the tape: the fast Walsh–Hadamard transform and 4-bit quantisation, timed against a copy of the same tensor.
//!
//! `cargo run --release --example microbench [-- ROWS N]`, with `--features cuda` also on the GPU. On the CPU a kernel takes tensors; on the
//! GPU (`spinquant::kernels`) it takes cudarc's slices and a stream, so that any engine can call it. `spinquant bench` does this for
//! every kernel, and checks the answers first.

use spinquant::bench::time::{Samples, time};
use spinquant::hadamard::Hadamard;
use spinquant::ops::{fake_quant, hadamard, randn};
use spinquant::quant::QuantSpec;
use spinquant::{DType, Device, Error, Result, Tensor};

fn main() -> Result<()> {
    let number =
        |text: String| text.parse::<usize>().map_err(|_| Error::argument("size", format!("expected a number, got {text:?}")));
    let sizes = std::env::args().skip(1).map(number).collect::<Result<Vec<_>>>()?;
    let (rows, n) = match sizes[..] {
        [] => (4096, 1024),
        [rows, n] => (rows, n),
        _ => return Err(Error::argument("sizes", "expected ROWS and N, or nothing")),
    };
    run(rows, n)
}

fn run(rows: usize, n: usize) -> Result<()> {
    println!("{rows} x {n}");
    let x = randn([rows, n], 0).to_dtype(DType::F32)?;
    let (map, spec) = (Hadamard::new(n)?, QuantSpec::activation(4, false));
    let bytes = 2.0 * x.bytes() as f64;
    let timed = |call: &dyn Fn() -> Result<()>| time(&Device::Cpu, |watch| watch.time(call));
    let copy = timed(&|| Tensor::from_vec(x.to_vec::<f32>()?, x.shape()).map(drop))?;
    report("CPU f32", "copy", &copy, &copy, bytes);
    report("CPU f32", "hadamard", &timed(&|| hadamard::transform(x.clone(), &map, false).map(drop))?, &copy, bytes);
    // Codes are 16 bits wide in memory here.
    report("CPU f32", "4-bit codes", &timed(&|| fake_quant::quantize(&x, &spec).map(drop))?, &copy, 0.75 * bytes);
    #[cfg(feature = "cuda")]
    match Device::cuda(0) {
        Ok(device) => gpu::run(rows, n, &device)?,
        Err(e) => println!("no GPU: {e}"),
    }
    Ok(())
}

fn report(place: &str, what: &str, samples: &Samples, copy: &Samples, bytes: f64) {
    println!(
        "{place:<10} {what:<20} {:>9.1} µs (middle 80 %: {:.1} to {:.1}) {:>8.1} GB/s {:>5.2} of a copy",
        samples.median() * 1e3,
        samples.percentile(10) * 1e3,
        samples.percentile(90) * 1e3,
        bytes / samples.median() / 1e6,
        copy.median() / samples.median()
    );
}

#[cfg(feature = "cuda")]
mod gpu {
    use half::bf16;
    use spinquant::bench::time::time_replayed;
    use spinquant::kernels::{self, HadamardMap};

    use super::*;

    pub fn run(rows: usize, n: usize, device: &Device) -> Result<()> {
        let Device::Cuda(gpu) = device else { return Err(Error::device("microbench", "expected a GPU")) };
        // A kernel takes any stream; the events that time it are of the device's own.
        // SAFETY: what is allocated here is used on no other stream.
        let stream = unsafe { gpu.stream() }.clone();
        let failed = |e: cudarc::driver::DriverError| Error::Cuda(e.to_string());
        let map = HadamardMap::new(&stream, n)?;
        let x = stream.alloc_zeros::<bf16>(rows * n).map_err(failed)?;
        let mut y = stream.alloc_zeros::<bf16>(rows * n).map_err(failed)?;
        let bytes = 4.0 * (rows * n) as f64;
        let copy = time_replayed(device, &mut || stream.memcpy_dtod(&x, &mut y).map_err(failed))?;
        report("GPU bf16", "copy", &copy, &copy, bytes);
        let samples = time_replayed(device, &mut || kernels::hadamard(&stream, &mut y, &x, &map, false))?;
        report("GPU bf16", "hadamard", &samples, &copy, bytes);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn it_runs() {
        super::run(64, 128).unwrap();
    }
}
