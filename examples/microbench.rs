//! A kernel without the tape: the fast Walsh–Hadamard transform and 4-bit quantisation, timed against a copy of the same tensor.
//!
//! `cargo run --release --example microbench [-- ROWS N]`, with `--features cuda` also on the GPU. On the CPU a kernel takes tensors; on the
//! GPU (`spinquant::kernels`) it takes cudarc's slices and a stream, so that any engine can call it. `spinquant bench` does this for
//! every kernel, and checks the answers first.

use std::time::Instant;

use spinquant::hadamard::Hadamard;
use spinquant::ops::{fake_quant, hadamard, randn};
use spinquant::quant::QuantSpec;
use spinquant::{DType, Error, Result, Tensor};

const REPEATS: usize = 20;

fn main() -> Result<()> {
    let number =
        |text: String| text.parse::<usize>().map_err(|_| Error::argument("size", format!("expected a number, got {text:?}")));
    let sizes = std::env::args().skip(1).map(number).collect::<Result<Vec<_>>>()?;
    let (rows, n) = match sizes[..] {
        [] => (4096, 1024),
        [rows, n] => (rows, n),
        _ => return Err(Error::argument("sizes", "expected ROWS and N, or nothing")),
    };
    run(rows, n)?;
    #[cfg(feature = "cuda")]
    match spinquant::Device::cuda(0) {
        Ok(_) => gpu::run(rows, n)?,
        Err(e) => println!("no GPU: {e}"),
    }
    Ok(())
}

fn run(rows: usize, n: usize) -> Result<()> {
    println!("{rows} x {n}");
    let x = randn([rows, n], 0).to_dtype(DType::F32)?;
    let (map, spec) = (Hadamard::new(n)?, QuantSpec::activation(4, false));
    let bytes = 2.0 * x.bytes() as f64;
    let copy = best(|| Tensor::from_vec(x.to_vec::<f32>()?, x.shape()).map(drop))?;
    report("CPU f32", "copy", copy, copy, bytes);
    report("CPU f32", "hadamard", best(|| hadamard::transform(x.clone(), &map, false).map(drop))?, copy, bytes);
    // Codes are 16 bits wide in memory here.
    report("CPU f32", "4-bit codes", best(|| fake_quant::quantize(&x, &spec).map(drop))?, copy, 0.75 * bytes);
    Ok(())
}

/// The shortest time of some calls, in seconds.
fn best(mut call: impl FnMut() -> Result<()>) -> Result<f64> {
    let mut least = f64::INFINITY;
    for _ in 0..REPEATS {
        let start = Instant::now();
        call()?;
        least = least.min(start.elapsed().as_secs_f64());
    }
    Ok(least)
}

fn report(place: &str, what: &str, seconds: f64, copy: f64, bytes: f64) {
    println!(
        "{place:<10} {what:<20} {:>9.1} µs {:>8.1} GB/s {:>5.2} of a copy",
        seconds * 1e6,
        bytes / seconds / 1e9,
        copy / seconds
    );
}

#[cfg(feature = "cuda")]
mod gpu {
    use cudarc::driver::CudaContext;
    use half::bf16;
    use spinquant::kernels::{self, HadamardMap};

    use super::*;

    pub fn run(rows: usize, n: usize) -> Result<()> {
        let failed = |e: cudarc::driver::DriverError| Error::Cuda(e.to_string());
        let stream = CudaContext::new(0).map_err(failed)?.default_stream();
        let map = HadamardMap::new(&stream, n)?;
        let x = stream.alloc_zeros::<bf16>(rows * n).map_err(failed)?;
        let mut y = stream.alloc_zeros::<bf16>(rows * n).map_err(failed)?;
        let bytes = 4.0 * (rows * n) as f64;
        // Many launches between two waits, so that the launch itself is not what is timed.
        let mut timed = |call: &mut dyn FnMut(&mut cudarc::driver::CudaSlice<bf16>) -> Result<()>| {
            best(|| {
                for _ in 0..100 {
                    call(&mut y)?;
                }
                stream.synchronize().map_err(failed)
            })
            .map(|seconds| seconds / 100.0)
        };
        let copy = timed(&mut |y| stream.memcpy_dtod(&x, y).map_err(failed))?;
        report("GPU bf16", "copy", copy, copy, bytes);
        let seconds = timed(&mut |y| kernels::hadamard(&stream, y, &x, &map, false))?;
        report("GPU bf16", "hadamard", seconds, copy, bytes);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn it_runs() {
        super::run(64, 128).unwrap();
    }

    #[cfg(feature = "cuda")]
    #[test]
    #[ignore = "needs a GPU"]
    fn it_runs_on_a_gpu() {
        super::gpu::run(64, 128).unwrap();
    }
}
