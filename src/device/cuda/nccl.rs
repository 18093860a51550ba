//! Sums and gathered values over the GPUs of several processes, by NVIDIA's NCCL, which is loaded when it is first wanted.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::fmt;
use std::sync::OnceLock;

use cudarc::driver::sys::CUstream;
use libloading::Library;

use super::{CudaDevice, driver_error};
use crate::device::launch::{Kind, View, Work};
use crate::{Error, Result};

/// What its packages install. cudarc looks for `libnccl.so` alone, which is for building against it.
const NAMES: [&str; 2] = ["libnccl.so.2", "libnccl.so"];

/// `ncclUniqueId`
#[repr(C)]
#[derive(Clone, Copy)]
struct Id([c_char; 128]);

/// `ncclComm_t`
type Comm = *mut c_void;
/// `ncclUint8`, `ncclFloat16`, `ncclFloat32`, `ncclFloat64`, `ncclBfloat16` and `ncclSum`
const U8: c_int = 1;
const F16: c_int = 6;
const F32: c_int = 7;
const F64: c_int = 8;
const BF16: c_int = 9;
const SUM: c_int = 0;

/// A type that NCCL sums.
fn summed(what: &str, kind: Kind) -> Result<c_int> {
    match kind {
        Kind::F16 => Ok(F16),
        Kind::F32 => Ok(F32),
        Kind::F64 => Ok(F64),
        Kind::BF16 => Ok(BF16),
        other => Err(Error::argument(what, format!("expected floating-point values, got {other}"))),
    }
}

/// The functions of NCCL 2 that are used, with the types that its documentation gives.
struct Nccl {
    id: unsafe extern "C" fn(*mut Id) -> c_int,
    connect: unsafe extern "C" fn(*mut Comm, c_int, Id, c_int) -> c_int,
    all_reduce: unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, c_int, Comm, CUstream) -> c_int,
    all_gather: unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, Comm, CUstream) -> c_int,
    reduce_scatter: unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, c_int, Comm, CUstream) -> c_int,
    abort: unsafe extern "C" fn(Comm) -> c_int,
    words: unsafe extern "C" fn(c_int) -> *const c_char,
    /// Keeps them loaded.
    _library: Library,
}

impl Nccl {
    /// The library, loaded once.
    fn get() -> Result<&'static Self> {
        static LOADED: OnceLock<Result<Nccl, String>> = OnceLock::new();
        LOADED.get_or_init(Self::load).as_ref().map_err(|why| {
            let (first, help) =
                (NAMES[0], "install it (package libnccl2; or nvidia-nccl-cu13 of PyPI, its folder in LD_LIBRARY_PATH)");
            Error::Cuda(format!(
                "several GPUs need NVIDIA's NCCL ({first}), which cannot be loaded: {why}; {help}, or use one GPU"
            ))
        })
    }

    fn load() -> Result<Self, String> {
        // SAFETY: NCCL's initialisation has no requirements.
        let open = |name| unsafe { Library::new(name) }.map_err(|e| e.to_string());
        let library = open(NAMES[0]).or_else(|first| open(NAMES[1]).map_err(|_| first))?;
        // SAFETY: the functions have the types above, and are used while the library is loaded.
        let found = unsafe {
            (|| {
                Ok((
                    *library.get(b"ncclGetUniqueId\0")?,
                    *library.get(b"ncclCommInitRank\0")?,
                    *library.get(b"ncclAllReduce\0")?,
                    *library.get(b"ncclAllGather\0")?,
                    *library.get(b"ncclReduceScatter\0")?,
                    *library.get(b"ncclCommAbort\0")?,
                    *library.get(b"ncclGetErrorString\0")?,
                ))
            })()
        };
        let (id, connect, all_reduce, all_gather, reduce_scatter, abort, words) =
            found.map_err(|e: libloading::Error| e.to_string())?;
        Ok(Self { id, connect, all_reduce, all_gather, reduce_scatter, abort, words, _library: library })
    }

    /// An error where a call of NCCL did not succeed.
    fn check(&self, what: &str, status: c_int) -> Result<()> {
        if status == 0 {
            return Ok(());
        }
        // SAFETY: it gives a string that stays.
        let words = unsafe { CStr::from_ptr((self.words)(status)) }.to_string_lossy();
        Err(Error::Cuda(format!("NCCL: {what} failed: {words} ({status})")))
    }
}

/// Checks that NCCL is on this machine.
///
/// # Errors
/// Says what is missing.
pub fn check_nccl() -> Result<()> {
    Nccl::get().map(drop)
}

/// A GPU and those of other processes, connected.
pub(crate) struct Communicator {
    nccl: &'static Nccl,
    comm: Comm,
    world: usize,
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
        let nccl = Nccl::get()?;
        let mut id = Id([0; 128]);
        if rank == 0 {
            // SAFETY: writes one id.
            nccl.check("making an id", unsafe { (nccl.id)(&mut id) })?;
        }
        let bytes = broadcast(id.0.map(|c| c as u8).to_vec())?;
        if bytes.len() != id.0.len() {
            return Err(Error::argument("NCCL", format!("expected an id of {} bytes, got {}", id.0.len(), bytes.len())));
        }
        id.0.iter_mut().zip(bytes).for_each(|(to, from)| *to = from as c_char);
        self.bind()?;
        let mut comm = std::ptr::null_mut();
        // SAFETY: writes one pointer; this rank's GPU is current, and the id is rank 0's.
        nccl.check("connecting the GPUs", unsafe { (nccl.connect)(&mut comm, world as c_int, id, rank as c_int) })?;
        Ok(Communicator { nccl, comm, world, device: self.clone() })
    }
}

impl Communicator {
    /// `to ←` the sum over ranks of `from`, as many values of one kind, `f32` or `f64`; both may be the same.
    ///
    /// # Errors
    /// Other kinds or lengths, memory of another GPU, or a failing call of NCCL.
    pub(crate) fn sum(&self, to: View<'_>, from: View<'_>) -> Result<()> {
        let what = "sum over ranks";
        fits(what, to, from, from.len())?;
        let (n, kind) = (from.len(), summed(what, from.kind())?);
        self.enqueue("a sum", "sum over ranks", to, from, |nccl, (to, from), comm, stream| {
            // SAFETY: both are n values of the type, live and on this GPU, equal or apart, and are released in the order of the stream.
            unsafe { (nccl.all_reduce)(from, to, n, kind, SUM, comm, stream) }
        })
    }

    /// `to ←` the values of every rank's `from` behind one another, in the order of the ranks; of one kind, apart.
    ///
    /// # Errors
    /// Other kinds or lengths, memory of another GPU, or a failing call of NCCL.
    pub(crate) fn gather(&self, to: View<'_>, from: View<'_>) -> Result<()> {
        fits("values of all ranks", to, from, self.world * from.len())?;
        let bytes = from.bytes();
        self.enqueue("gathering", "gather over ranks", to, from, |nccl, (to, from), comm, stream| {
            // SAFETY: `from` is so many bytes and `to` as many of every rank, live and on this GPU, apart, released in the stream's order.
            unsafe { (nccl.all_gather)(from, to, bytes, U8, comm, stream) }
        })
    }

    /// `to ←` this rank's part, of equal ones in the order of the ranks, of the sum over ranks of `from`; floating-point values of one
    /// kind, in which every sum of two is rounded; apart.
    ///
    /// # Errors
    /// Other kinds or lengths, memory of another GPU, or a failing call of NCCL.
    pub(crate) fn scatter_sums(&self, to: View<'_>, from: View<'_>) -> Result<()> {
        let what = "parts of a sum over ranks";
        fits(what, from, to, self.world * to.len())?;
        let (n, kind) = (to.len(), summed(what, from.kind())?);
        self.enqueue("parts of a sum", "sum over ranks", to, from, |nccl, (to, from), comm, stream| {
            // SAFETY: `to` is n values and `from` as many for every rank, live and on this GPU, apart, released in the stream's order.
            unsafe { (nccl.reduce_scatter)(from, to, n, kind, SUM, comm, stream) }
        })
    }

    /// Enqueues a call of NCCL on the device's stream, timed where somebody watches.
    fn enqueue(
        &self,
        what: &str,
        work: &'static str,
        to: View<'_>,
        from: View<'_>,
        call: impl FnOnce(&Nccl, (*mut c_void, *const c_void), Comm, CUstream) -> c_int,
    ) -> Result<()> {
        self.device.owns(what, &[to, from])?;
        if from.len() == 0 {
            return Ok(());
        }
        self.device.bind()?;
        let _alone = self.device.libraries();
        let stream = self.device.0.stream.cu_stream();
        let memory = (to.address() as *mut c_void, from.address() as *const c_void);
        self.device.profiled(Work::moving(work, to.bytes().max(from.bytes())), || {
            self.nccl.check(what, call(self.nccl, memory, self.comm, stream))
        })
    }
}

/// Fails unless `long` has so many values, of the kind of `short`.
fn fits(what: &str, long: View<'_>, short: View<'_>, len: usize) -> Result<()> {
    if (long.len(), long.kind()) == (len, short.kind()) {
        return Ok(());
    }
    let message = format!("expected {len} values of {}, got {} of {}", short.kind(), long.len(), long.kind());
    Err(Error::argument(what, message))
}

impl Drop for Communicator {
    /// Sums that are under way are waited for, unless a failure left some that never end: the stream then has an error, or the program is
    /// ending by force.
    fn drop(&mut self) {
        let _ = self.device.0.stream.synchronize().map_err(driver_error("a kernel failed"));
        // SAFETY: the communicator was made by NCCL, and this is its last use.
        let _ = unsafe { (self.nccl.abort)(self.comm) };
    }
}
