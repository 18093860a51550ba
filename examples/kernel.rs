//! The README's kernel call: a Hadamard transform and 4-bit fake quantisation in one pass over cudarc's slices.
//!
//! `cargo run --release --features cuda --example kernel`

use cudarc::driver::CudaContext;
use half::bf16;
use spinquant::grid::QuantSpec;
use spinquant::kernels::{HadamardMap, hadamard_fake_quant};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let stream = CudaContext::new(0)?.default_stream();
    let (rows, n) = (4096, 11008);
    let x = stream.clone_htod(&vec![bf16::ONE; rows * n])?;
    let mut y = stream.alloc_zeros::<bf16>(rows * n)?;

    let map = HadamardMap::new(&stream, n)?; // 172 · 64
    hadamard_fake_quant(&stream, &mut y, &x, &map, &QuantSpec::activation(4, false))?;
    println!("{:?}", &stream.clone_dtoh(&y)?[..4]);
    Ok(())
}
