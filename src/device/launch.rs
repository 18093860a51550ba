//! What a launcher of `cuda/kernels.h` is given, and how that is checked: once, here, for tensors and for bare slices alike.
//!
//! A launcher is called from one function, which stands beside its formula. That function takes [`View`]s and a [`Queue`], lets a
//! [`Check`] look at every operand, and holds the one argument why the call is safe.

#![cfg_attr(not(feature = "cuda"), allow(dead_code))] // what only the real device calls

use std::fmt;
use std::marker::PhantomData;

use super::cuda::{Queue, ffi};
use crate::dtype::DType;
use crate::{Error, Result};

/// Kernels read 16 bytes at a time.
pub(crate) const ALIGNMENT: u64 = 16;

/// What kernels read and write.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Kind {
    F64,
    F32,
    F16,
    BF16,
    U32,
    I32,
    I16,
    I8,
    U8,
}

impl Kind {
    /// Bytes of one value.
    pub(crate) fn size(self) -> usize {
        match self {
            Self::F64 => 8,
            Self::F32 | Self::U32 | Self::I32 => 4,
            Self::F16 | Self::BF16 | Self::I16 => 2,
            Self::I8 | Self::U8 => 1,
        }
    }

    /// The type of a tensor of such values; `None` where tensors have no such type.
    pub(crate) fn dtype(self) -> Option<DType> {
        Some(match self {
            Self::F64 => DType::F64,
            Self::F32 => DType::F32,
            Self::F16 => DType::F16,
            Self::BF16 => DType::BF16,
            Self::U32 => DType::U32,
            Self::I32 | Self::I16 | Self::I8 | Self::U8 => return None,
        })
    }
}

impl From<DType> for Kind {
    fn from(dtype: DType) -> Self {
        match dtype {
            DType::F64 => Self::F64,
            DType::F32 => Self::F32,
            DType::F16 => Self::F16,
            DType::BF16 => Self::BF16,
            DType::U32 => Self::U32,
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&format!("{self:?}").to_lowercase())
    }
}

/// Device memory as a launcher sees it: where, how many values of which kind, in which context. It says nothing about who else reads
/// or writes there: whoever makes one knows.
#[derive(Clone, Copy, Debug)]
pub(crate) struct View<'a> {
    address: u64,
    len: usize,
    kind: Kind,
    context: usize,
    memory: PhantomData<&'a ()>,
}

impl<'a> View<'a> {
    /// `len` values at `address` in a context.
    ///
    /// # Safety
    /// They are there for `'a`, in stream order with the queues that the view is used on.
    pub(crate) unsafe fn new(address: u64, len: usize, kind: Kind, context: usize) -> Self {
        Self { address, len, kind, context, memory: PhantomData }
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn kind(&self) -> Kind {
        self.kind
    }

    pub(crate) fn bytes(&self) -> usize {
        self.len * self.kind.size()
    }

    pub(crate) fn is_aligned(&self) -> bool {
        self.address.is_multiple_of(ALIGNMENT)
    }

    pub(crate) fn context(&self) -> usize {
        self.context
    }

    pub(crate) fn address(&self) -> u64 {
        self.address
    }

    /// `len` of its values from value `first` on.
    pub(crate) fn part(self, first: usize, len: usize) -> Result<Self> {
        if first.checked_add(len).is_none_or(|end| end > self.len) {
            return Err(Error::argument("part of a buffer", format!("{len} values from {first} on, of {}", self.len)));
        }
        Ok(Self { address: self.address + (first * self.kind.size()) as u64, len, ..self })
    }
}

/// The address of a checked operand, or null for none: goes to a launcher as whatever pointer that asks for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pointer(u64);

impl Pointer {
    /// For fields of structs.
    pub(crate) fn cast<T>(self) -> *const T {
        self.0 as *const T
    }
}

/// How `ffi!` hands an argument over.
pub(crate) trait Argument<T> {
    fn pass(self) -> T;
}

impl<T> Argument<T> for T {
    fn pass(self) -> T {
        self
    }
}

impl<T> Argument<*mut T> for Pointer {
    fn pass(self) -> *mut T {
        self.0 as *mut T
    }
}

impl<T> Argument<*const T> for Pointer {
    fn pass(self) -> *const T {
        self.0 as *const T
    }
}

/// What one launch does, for profiles.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Work {
    /// The kind of work.
    pub what: &'static str,
    /// Bytes that must be moved, where that is what limits.
    pub bytes: f64,
    /// Additions and multiplications, where they are.
    pub flops: f64,
}

impl Work {
    /// Work of which only the time is of interest.
    pub(crate) fn of(what: &'static str) -> Self {
        Self { what, ..Self::default() }
    }

    /// Work that must move so many bytes.
    pub(crate) fn moving(what: &'static str, bytes: usize) -> Self {
        Self { what, bytes: bytes as f64, flops: 0.0 }
    }

    /// Work that is limited by its arithmetic.
    pub(crate) fn computing(what: &'static str, flops: f64) -> Self {
        Self { what, bytes: 0.0, flops }
    }
}

/// A kind as the launchers name it.
pub(crate) fn code(kind: Kind) -> Result<ffi::sq_dtype> {
    match kind {
        Kind::F32 => Ok(ffi::SQ_F32),
        Kind::F16 => Ok(ffi::SQ_F16),
        Kind::BF16 => Ok(ffi::SQ_BF16),
        other => match other.dtype() {
            Some(dtype) => Err(Error::dtype("a CUDA kernel", "f32, f16 or bf16", dtype)),
            None => Err(Error::argument("a CUDA kernel", format!("expected f32, f16 or bf16 values, got {other}"))),
        },
    }
}

/// A number as the launchers take small extents.
pub(crate) fn int(what: &str, n: usize) -> Result<i32> {
    i32::try_from(n).map_err(|_| Error::argument(what, format!("{n} is too large")))
}

/// The checks of one launcher's operands.
#[derive(Clone, Copy)]
pub(crate) struct Check<'a> {
    what: &'static str,
    queue: Queue<'a>,
}

impl<'a> Check<'a> {
    /// For messages about `what`, launched on `queue`.
    pub(crate) fn new(what: &'static str, queue: Queue<'a>) -> Self {
        Self { what, queue }
    }

    /// The address of exactly `len` values of a kind, aligned, on the queue's GPU.
    pub(crate) fn operand(&self, name: &str, view: View<'_>, kind: Kind, len: usize) -> Result<Pointer> {
        let what = || format!("{}: {name}", self.what);
        if view.kind != kind {
            return Err(Error::argument(what(), format!("expected {kind} values, got {}", view.kind)));
        }
        if view.len != len {
            return Err(Error::shape(what(), format!("of {len} values"), &[view.len]));
        }
        if view.context != self.queue.context() {
            return Err(Error::device(what(), "is not in the memory of the GPU whose stream the kernel runs on"));
        }
        if !view.is_aligned() && len > 0 {
            return Err(Error::argument(what(), format!("does not start on a {ALIGNMENT}-byte boundary")));
        }
        Ok(Pointer(view.address))
    }

    /// The same, or null for none.
    pub(crate) fn optional(&self, name: &str, view: Option<View<'_>>, kind: Kind, len: usize) -> Result<Pointer> {
        view.map_or(Ok(Pointer(0)), |view| self.operand(name, view, kind, len))
    }

    /// A kind as the launchers name it.
    pub(crate) fn code(&self, kind: Kind) -> Result<ffi::sq_dtype> {
        code(kind)
    }

    /// The product of some extents.
    pub(crate) fn product(&self, extents: &[usize]) -> Result<usize> {
        let product = extents.iter().try_fold(1usize, |product, &n| product.checked_mul(n));
        product.ok_or_else(|| Error::argument(self.what, format!("{extents:?} is more values than can be counted")))
    }

    /// How many rows of `cols` values `len` values are.
    pub(crate) fn rows(&self, len: usize, cols: usize) -> Result<usize> {
        match len.checked_rem(cols) {
            Some(0) => Ok(len / cols),
            None if len == 0 => Ok(0),
            _ => Err(Error::shape(self.what, format!("of whole rows of {cols}"), &[len])),
        }
    }

    /// A number as the launchers take counts.
    pub(crate) fn long(&self, n: usize) -> Result<i64> {
        i64::try_from(n).map_err(|_| Error::argument(self.what, format!("{n} is too large")))
    }

    /// A number as the launchers take small extents.
    pub(crate) fn int(&self, n: usize) -> Result<i32> {
        int(self.what, n)
    }

    /// Runs the launcher.
    pub(crate) fn launch(&self, work: Work, f: impl FnOnce(ffi::sq_stream) -> i32) -> Result<()> {
        self.queue.launch(self.what, work, f)
    }
}

/// The sizes of a (batched) product `y = op(a) op(b)`, row-major.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Shape {
    /// Rows of `op(a)`.
    pub m: usize,
    /// Columns of `op(b)`.
    pub n: usize,
    /// Values that are summed over.
    pub k: usize,
    /// Read a transposed.
    pub ta: bool,
    /// Read b transposed.
    pub tb: bool,
    /// Matrices.
    pub batch: usize,
    /// There are so many of a, too.
    pub batch_a: bool,
    /// There are so many of b, too.
    pub batch_b: bool,
}

/// `alpha` and `beta` of `y = alpha op(a) op(b) + beta c`.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Factors<'a> {
    /// Known on the host.
    Host(f64, f64),
    /// Two `f32` in device memory; for 16- and 32-bit products.
    Device(View<'a>),
}
