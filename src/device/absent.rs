//! The GPU in a build without the feature `cuda`: the same names as in the real module, and no value of any of its types, so that code
//! for both builds is written, and checked, once.
#![allow(dead_code, unused_variables, missing_docs, non_camel_case_types)]

use std::convert::Infallible;
use std::marker::PhantomData;

use super::launch::{Factors, Kind, Shape, View, Work};
use super::{Card, Replay, Stamp};
use crate::{DType, Result};

/// A GPU. There is none without the feature `cuda`.
#[derive(Clone, PartialEq)]
pub struct CudaDevice(Infallible);

fn absent<T>() -> Result<T> {
    Err(crate::Error::Cuda("this build has no GPU support: rebuild with `--features cuda`".into()))
}

/// How many GPUs there are.
///
/// # Errors
/// Always: this build has no GPU support.
pub fn count() -> Result<usize> {
    absent()
}

/// Checks that NCCL is on this machine.
///
/// # Errors
/// Always: this build has no GPU support.
pub fn check_nccl() -> Result<()> {
    absent()
}

/// A GPU and those of other processes, connected.
#[derive(Debug)]
pub(crate) struct Communicator(Infallible);

/// Where a launcher runs.
#[derive(Clone, Copy)]
pub(crate) struct Queue<'a>(Infallible, PhantomData<&'a ()>);

/// Device memory of one tensor.
#[derive(Debug)]
pub struct CudaBuffer(Infallible);

/// See the real module.
#[derive(Clone, Debug, PartialEq)]
pub struct Phase {
    pub pass: &'static str,
    pub part: &'static str,
    pub what: &'static str,
    pub count: usize,
    pub ms: f64,
    pub bytes: f64,
    pub flops: f64,
}

/// A moment in a GPU's stream.
pub struct Event(Infallible);

/// Calls recorded on a GPU.
pub struct Graph(Infallible);

macro_rules! never {
    ($(impl $t:ty { $($vis:vis fn $name:ident(&self $(, $arg:ident: $of:ty)* $(,)?) -> $ret:ty;)* })*) => {
        $(impl $t {
            $(#[allow(clippy::too_many_arguments, clippy::len_without_is_empty, clippy::missing_errors_doc)]
            $vis fn $name(&self $(, $arg: $of)*) -> $ret { match self.0 {} })*
        })*
    };
}

never! {
    impl CudaDevice {
        pub fn ordinal(&self) -> usize;
        pub fn name(&self) -> Result<String>;
        pub fn synchronize(&self) -> Result<()>;
        pub fn memory(&self) -> Result<(usize, usize)>;
        pub fn card(&self) -> Result<Card>;
        pub(crate) fn warpgroups(&self) -> Result<bool>;
        pub fn peak_bytes(&self) -> Result<u64>;
        pub fn reset_peak(&self) -> Result<()>;
        pub fn start_profile(&self) -> ();
        pub fn stop_profile(&self) -> Result<Vec<Phase>>;
        pub(crate) fn queue(&self) -> Queue<'_>;
        pub(crate) fn stamp(&self) -> Result<Stamp>;
        pub(crate) fn record(&self, calls: &mut dyn FnMut() -> Result<()>) -> Result<Replay>;
        pub(crate) fn cache_bytes(&self) -> Option<u64>;
        pub(crate) fn clock_mhz(&self) -> Option<u32>;
        pub(crate) fn buffer(&self, len: usize, kind: Kind, what: &str) -> Result<CudaBuffer>;
        pub(crate) fn zeros(&self, len: usize, kind: Kind) -> Result<CudaBuffer>;
        pub(crate) fn upload(&self, bytes: &[u8], kind: Kind) -> Result<CudaBuffer>;
        pub(crate) fn constant(&self, name: &'static str, key: usize, bytes: &dyn Fn() -> Vec<u8>) -> Result<Constant>;
        pub(crate) fn copy(&self, to: View<'_>, from: View<'_>) -> Result<()>;
        pub(crate) fn copy_columns(&self, to: Columns<'_>, from: Columns<'_>, count: usize) -> Result<()>;
        pub(crate) fn multiply(
            &self, s: Shape, y: View<'_>, a: View<'_>, b: View<'_>, c: Option<View<'_>>, factors: Factors<'_>
        ) -> Result<()>;
        pub(crate) fn add_product(
            &self, w: View<'_>, from: usize, e: View<'_>, u: View<'_>, row: usize, size: [usize; 3]
        ) -> Result<()>;
        pub(crate) fn copies(&self, slots: usize, stages: usize) -> Result<Copies>;
        pub(crate) fn connect(
            &self, rank: (usize, usize), broadcast: &mut dyn FnMut(Vec<u8>) -> Result<Vec<u8>>
        ) -> Result<Communicator>;
        pub(crate) fn invert_cholesky(&self, a: View<'_>, n: usize) -> Result<Option<bool>>;
    }
    impl Communicator {
        pub(crate) fn sum(&self, to: View<'_>, from: View<'_>) -> Result<()>;
        pub(crate) fn gather(&self, to: View<'_>, from: View<'_>) -> Result<()>;
        pub(crate) fn scatter_sums(&self, to: View<'_>, from: View<'_>) -> Result<()>;
    }
    impl Queue<'_> {
        pub(crate) fn context(&self) -> usize;
        pub(crate) fn launch(&self, what: &'static str, work: Work, f: impl FnOnce(ffi::sq_stream) -> i32) -> Result<()>;
    }
    impl Event {
        pub(crate) fn ms_until(&self, later: &Event) -> Result<f64>;
    }
    impl Graph {
        pub(crate) fn launch(&self) -> Result<()>;
    }
    impl CudaBuffer {
        pub(crate) fn dtype(&self) -> DType;
        pub(crate) fn len(&self) -> usize;
        pub(crate) fn device(&self) -> &CudaDevice;
        pub(crate) fn view(&self) -> View<'_>;
        pub(crate) fn download(&self, start: usize, bytes: &mut [u8]) -> Result<()>;
    }
    impl Copies {
        pub(crate) fn filled(&self, slot: usize) -> Result<()>;
        pub(crate) fn free(&self, slot: usize) -> Result<()>;
        pub(crate) fn read(&self, stage: usize) -> Result<()>;
        pub(crate) fn wait_read(&self, stage: usize) -> Result<()>;
        pub(crate) fn finish(&self) -> Result<()>;
    }
    impl Constant {
        pub(crate) fn view(&self, kind: Kind) -> View<'_>;
    }
}

impl CudaDevice {
    /// # Safety
    /// Never called.
    pub(crate) unsafe fn pin(&self, bytes: &[u8]) -> Result<Pinned> {
        match self.0 {}
    }
}

impl Copies {
    /// # Safety
    /// Never called.
    pub(crate) unsafe fn copy(&self, bytes: &[u8], slot: usize, to: View<'_>) -> Result<()> {
        match self.0 {}
    }
}

/// A stream of copies from the host.
pub(crate) struct Copies(Infallible);

/// Host memory that stays where it is.
pub(crate) struct Pinned(Infallible);

/// A table on the device.
#[derive(Clone)]
pub(crate) struct Constant(Infallible);

/// Columns of a row-major matrix: the matrix, its width, and the first of them.
pub(crate) type Columns<'a> = (View<'a>, usize, usize);

/// What `cuda/kernels.h` declares besides launchers.
pub(crate) mod ffi {
    use std::ffi::c_void;

    pub type sq_stream = *mut c_void;
    pub type sq_dtype = u32;
    pub const SQ_F32: sq_dtype = 0;
    pub const SQ_F16: sq_dtype = 1;
    pub const SQ_BF16: sq_dtype = 2;
    pub const SQ_F64: sq_dtype = 3;

    #[derive(Clone, Copy, Debug)]
    pub struct sq_quant {
        pub bits: i32,
        pub symmetric: i32,
        pub weight: i32,
        pub group: i32,
        pub clip: f32,
    }

    #[derive(Clone, Copy, Debug)]
    pub struct sq_codes {
        pub codes: *const i8,
        pub scale: *const f32,
        pub zero: *const f32,
        pub group: i32,
    }

    #[derive(Clone, Copy, Debug)]
    pub struct sq_hadamard_map {
        pub n: i32,
        pub k: i32,
        pub blocks: i32,
        pub paired: i32,
        pub transpose: i32,
        pub table: *const u32,
        pub signs: *const i8,
    }

    /// Stands for every launcher.
    ///
    /// # Safety
    /// Never called: there is no queue to launch on.
    pub unsafe fn launcher<R>() -> R {
        unreachable!("a launcher in a build without GPU support")
    }
}
