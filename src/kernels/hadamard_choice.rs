//! Which kernel maps the rows of a Hadamard map: the launchers' own choice, asked without a device.

use std::ffi::CStr;
use std::fmt;

use crate::device::cuda::{current_gpu, ffi};
use crate::device::launch::code;
use crate::grid::QuantSpec;
use crate::hadamard::Hadamard;
use crate::{DType, Error, Result};

/// What the choice of a kernel depends on, of a card and of the code loaded for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gpu {
    /// Bytes of shared memory that a block may have.
    pub shared_bytes: i32,
    /// Whether the code is that of `sm_90a`, where kernels may use the matrix products of warpgroups.
    pub warpgroups: bool,
}

impl Gpu {
    /// An H100 or H200, by code for `sm_90a`.
    pub const SM_90A: Self = Self { shared_bytes: 232_448, warpgroups: true };
    /// An A100.
    pub const SM_80: Self = Self { shared_bytes: 166_912, warpgroups: false };

    /// The current device.
    ///
    /// # Errors
    /// CUDA's, with its code: no device, or a driver that is too old.
    pub fn current() -> Result<Self> {
        let gpu = current_gpu()?;
        Ok(Self { shared_bytes: gpu.shared_bytes, warpgroups: gpu.warpgroups != 0 })
    }
}

/// A kernel for rows of some length. Displayed as `warpgroup 172x64, 2 rows in 256 threads, 211.3 KiB`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HadamardChoice {
    /// The kernel's family; `cuda/README.md` says what each is for.
    pub family: &'static str,
    /// The row as the kernel sees it: a matrix of so many rows and columns.
    pub view: [usize; 2],
    /// Tiles of 16 along each side of the matrix that tensor cores multiply by; 0 in families without one.
    pub tiles: usize,
    /// Threads of a block.
    pub threads: usize,
    /// Rows that a block works on at a time.
    pub block_rows: usize,
    /// Dynamic shared memory of a block.
    pub shared_bytes: usize,
}

impl fmt::Display for HadamardChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ([p, m], rows) = (self.view, if self.block_rows == 1 { "row" } else { "rows" });
        write!(f, "{} {p}x{m}, {} {rows} in {} threads", self.family, self.block_rows, self.threads)?;
        if self.shared_bytes > 0 {
            write!(f, ", {:.1} KiB", self.shared_bytes as f64 / 1024.0)?;
        }
        Ok(())
    }
}

/// The kernel that [`hadamard`](super::hadamard), or with a spec [`hadamard_fake_quant`](super::hadamard_fake_quant), launches for
/// the rows of `map` on such a card. Needs no card.
///
/// # Errors
/// Where there is none: a type that kernels do not read, a specification that does not fit the rows, or groups in rows that
/// shared memory cannot hold.
pub fn hadamard_choice(map: &Hadamard, dtype: DType, spec: Option<&QuantSpec>, gpu: Gpu) -> Result<HadamardChoice> {
    let mut quant = None;
    if let Some(spec) = spec {
        // At most the size, which is checked below.
        let whole = spec.group_size(map.n())?;
        let group = spec.group.map_or(0, |_| whole as i32);
        // The target and the clip ratio do not matter here.
        quant = Some(ffi::sq_quant { bits: spec.bits as i32, symmetric: spec.symmetric.into(), weight: 0, group, clip: 1.0 });
    }
    let quant = quant.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
    let gpu = ffi::sq_gpu { shared_bytes: gpu.shared_bytes, warpgroups: gpu.warpgroups.into() };
    let mut c = ffi::sq_hadamard_choice { family: 0, m_log2: 0, tiles: 0, threads: 0, block_rows: 0, shared_bytes: 0 };
    let none = || Error::argument("Hadamard kernel", format!("there is none for rows of {map} in {dtype} on such a device"));
    let int = |n: usize| i32::try_from(n).map_err(|_| none());
    let (table, signs) = (std::ptr::null(), std::ptr::null());
    let (n, k, blocks) = (int(map.n())?, int(map.k())?, int(map.blocks())?);
    let m = ffi::sq_hadamard_map { n, k, blocks, paired: map.is_paired().into(), transpose: 0, table, signs };
    // SAFETY: c is valid for writes, quant null or valid for reads; the map's table and signs are not read.
    if unsafe { ffi::sq_hadamard_choose(&raw mut c, m, code(dtype.into())?, quant, gpu) } != 0 {
        return Err(none());
    }
    // Without quantisation a block is a row.
    let parts = if spec.is_some() { 1 } else { map.blocks() };
    // SAFETY: the name is a constant.
    let name = unsafe { CStr::from_ptr(ffi::sq_hadamard_family_name(c.family)) };
    Ok(HadamardChoice {
        family: name.to_str().unwrap_or("none"),
        view: [(map.n() / parts) >> c.m_log2, 1 << c.m_log2],
        tiles: c.tiles as usize,
        threads: c.threads as usize,
        block_rows: c.block_rows as usize,
        shared_bytes: c.shared_bytes as usize,
    })
}
