//! One error type for the whole crate. Messages name what was expected and what came.

use std::path::{Path, PathBuf};

use crate::dtype::DType;

/// The crate's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that can go wrong. The enum is non-exhaustive: match on the variants you handle and pass the rest on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A tensor of the wrong shape.
    #[error("{what}: expected shape {expected}, got {got:?}")]
    Shape {
        /// The operation or tensor.
        what: String,
        /// The shape wanted, in words or numbers.
        expected: String,
        /// The shape that came.
        got: Vec<usize>,
    },
    /// A tensor of the wrong element type.
    #[error("{what}: expected dtype {expected}, got {got}")]
    DType {
        /// The operation or tensor.
        what: String,
        /// The type wanted.
        expected: String,
        /// The type that came.
        got: DType,
    },
    /// Tensors of one operation live on different devices, or a device lacks the operation.
    #[error("{what}: {message}")]
    Device {
        /// The operation.
        what: String,
        /// What is wrong.
        message: String,
    },
    /// The tape was misused: a value of another tape, a second playback, a gradient that was never asked for.
    #[error("tape: {0}")]
    Tape(String),
    /// An argument outside its domain.
    #[error("{what}: {message}")]
    Argument {
        /// The argument or function.
        what: String,
        /// What was expected and what came.
        message: String,
    },
    /// Reading or writing a file failed.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A file that does not hold what it should.
    #[error("{}: {message}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What was expected and what came.
        message: String,
    },
    /// A model that was given by its name and cannot be had.
    #[error("{model}: {message}")]
    Hub {
        /// `org/name`, or `org/name@revision`.
        model: String,
        /// What is wrong, and what helps.
        message: String,
    },
    /// Numbers that are not finite, or a loss that diverged.
    #[error("{what}: {message}")]
    Numeric {
        /// Where it was noticed.
        what: String,
        /// What was seen.
        message: String,
    },
    /// No GPU, no driver, or a failing call into it.
    #[error("cuda: {0}")]
    Cuda(String),
    /// Device memory ran out.
    #[error("out of device memory: {what} needs {needed} bytes, {free} bytes are free of {total}")]
    OutOfMemory {
        /// The tensor or buffer.
        what: String,
        /// Bytes asked for.
        needed: usize,
        /// Bytes free.
        free: usize,
        /// Bytes of the device.
        total: usize,
    },
    /// Another process of the group that shares the work ([`ranks`](crate::ranks)) failed, ended or was lost.
    #[error("rank {rank}: {message}")]
    Rank {
        /// Which.
        rank: usize,
        /// What it said, or what was seen of it.
        message: String,
    },
    /// The user asked to stop; what was kept until then is usable.
    #[error("interrupted after step {step}")]
    Interrupted {
        /// Steps done.
        step: usize,
    },
}

impl Error {
    /// A [`Error::Shape`].
    pub fn shape(what: impl Into<String>, expected: impl std::fmt::Display, got: &[usize]) -> Self {
        Self::Shape { what: what.into(), expected: expected.to_string(), got: got.to_vec() }
    }

    /// A [`Error::DType`].
    pub fn dtype(what: impl Into<String>, expected: impl std::fmt::Display, got: DType) -> Self {
        Self::DType { what: what.into(), expected: expected.to_string(), got }
    }

    /// A [`Error::Argument`].
    pub fn argument(what: impl Into<String>, message: impl std::fmt::Display) -> Self {
        Self::Argument { what: what.into(), message: message.to_string() }
    }

    /// A [`Error::Device`].
    pub fn device(what: impl Into<String>, message: impl std::fmt::Display) -> Self {
        Self::Device { what: what.into(), message: message.to_string() }
    }

    /// A [`Error::Numeric`].
    pub fn numeric(what: impl Into<String>, message: impl std::fmt::Display) -> Self {
        Self::Numeric { what: what.into(), message: message.to_string() }
    }

    /// A [`Error::Format`].
    pub fn format(path: &Path, message: impl std::fmt::Display) -> Self {
        Self::Format { path: path.to_path_buf(), message: message.to_string() }
    }

    /// Wraps an I/O error with its path: `.map_err(Error::io(path))`.
    pub fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Self + '_ {
        move |source| Self::Io { path: path.to_path_buf(), source }
    }
}

// Here, so that types need not know errors.
impl std::str::FromStr for DType {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        Ok(match s.to_ascii_lowercase().as_str() {
            "f64" | "float64" => Self::F64,
            "f32" | "float32" => Self::F32,
            "f16" | "float16" => Self::F16,
            "bf16" | "bfloat16" => Self::BF16,
            _ => return Err(Error::argument("dtype", format!("expected f64, f32, f16 or bf16, got {s:?}"))),
        })
    }
}
