//! Sums over the GPUs of several processes, by NVIDIA's NCCL, which is loaded when it is first wanted.

use std::ffi::{c_char, c_void};
use std::fmt;

use cudarc::nccl::{result, sys};

use super::{CudaDevice, driver_error};
use crate::device::launch::{Kind, View};
use crate::{Error, Result};

/// A GPU and those of other processes, connected.
pub(crate) struct Communicator {
    comm: sys::ncclComm_t,
    device: CudaDevice,
}

// SAFETY: a communicator may be used by any thread, by one at a time; sums are enqueued under the lock of the device's libraries.
unsafe impl Send for Communicator {}
// SAFETY: as above.
unsafe impl Sync for Communicator {}

impl fmt::Debug for Communicator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NCCL on cuda:{}", self.device.ordinal())
    }
}

/// An error of NCCL, by its own name.
fn failed(what: &'static str) -> impl FnOnce(result::NcclError) -> Error {
    move |e| Error::Cuda(format!("NCCL: {what} failed ({:?}); NCCL_DEBUG=WARN says more", e.0))
}

/// Checks that NCCL is on this machine.
///
/// # Errors
/// Says what is missing.
pub fn check_nccl() -> Result<()> {
    // cudarc panics when it cannot load a library, so look first.
    // SAFETY: loads a shared library and looks at it.
    if unsafe { sys::is_culib_present() } {
        return Ok(());
    }
    let message = "several GPUs need NVIDIA's NCCL (libnccl.so.2), which was not found: install it (package libnccl2; or \
                   nvidia-nccl-cu13 of PyPI, with its folder in LD_LIBRARY_PATH), or use one GPU";
    Err(Error::Cuda(message.into()))
}

impl CudaDevice {
    /// Connects this GPU with those of the other ranks, which all do the same; `broadcast` gives all of them the bytes that rank 0 has.
    ///
    /// # Errors
    /// No NCCL, or one that cannot connect them; those of `broadcast`.
    pub(crate) fn connect(
        &self,
        (rank, world): (usize, usize),
        broadcast: &mut dyn FnMut(Vec<u8>) -> Result<Vec<u8>>,
    ) -> Result<Communicator> {
        check_nccl()?;
        let id = match rank {
            0 => result::get_uniqueid().map_err(failed("making an id"))?.internal.map(|c| c as u8).to_vec(),
            _ => vec![],
        };
        let id = broadcast(id)?;
        let mut internal: [c_char; 128] = [0; 128];
        if id.len() != internal.len() {
            return Err(Error::argument("NCCL", format!("expected an id of {} bytes, got {}", internal.len(), id.len())));
        }
        internal.iter_mut().zip(id).for_each(|(to, from)| *to = from as c_char);
        self.bind()?;
        let mut comm = std::ptr::null_mut();
        // SAFETY: writes one pointer; this rank's GPU is current, and the id is rank 0's.
        unsafe { result::comm_init_rank(&mut comm, world as i32, sys::ncclUniqueId { internal }, rank as i32) }
            .map_err(failed("connecting the GPUs"))?;
        Ok(Communicator { comm, device: self.clone() })
    }
}

impl Communicator {
    /// `to ←` the sum over ranks of `from`, as many values of one kind, `f32` or `f64`; both may be the same.
    ///
    /// # Errors
    /// Other kinds or lengths, memory of another GPU, or a failing call of NCCL.
    pub(crate) fn sum(&self, to: View<'_>, from: View<'_>) -> Result<()> {
        let dtype = match (from.kind(), to.kind()) {
            (Kind::F32, Kind::F32) => sys::ncclDataType_t::ncclFloat32,
            (Kind::F64, Kind::F64) => sys::ncclDataType_t::ncclFloat64,
            (from, to) => return Err(Error::argument("sum over ranks", format!("expected f32 or f64, got {from} into {to}"))),
        };
        if from.len() != to.len() {
            return Err(Error::argument("sum over ranks", format!("{} values into {}", from.len(), to.len())));
        }
        self.device.owns("sum over ranks", &[to, from])?;
        if from.len() == 0 {
            return Ok(());
        }
        self.device.bind()?;
        let _alone = self.device.libraries();
        let stream = self.device.0.stream.cu_stream();
        let (to, from, n) = (to.address() as *mut c_void, from.address() as *const c_void, from.len());
        // SAFETY: both are n values of the type, live and on this GPU, equal or apart, and are released in the order of the stream.
        unsafe { result::all_reduce(from, to, n, dtype, sys::ncclRedOp_t::ncclSum, self.comm, stream.cast()) }
            .map(drop)
            .map_err(failed("a sum"))
    }
}

impl Drop for Communicator {
    /// Sums that are under way are waited for, unless a failure left some that never end: the stream then has an error, or the program is
    /// ending by force.
    fn drop(&mut self) {
        let _ = self.device.0.stream.synchronize().map_err(driver_error("a kernel failed"));
        // SAFETY: the communicator was made by NCCL, and this is its last use.
        let _ = unsafe { result::comm_abort(self.comm) };
    }
}
