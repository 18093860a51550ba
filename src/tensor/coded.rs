//! Tensors of which only codes are kept: what a quantiser found, in a byte a value, until somebody asks for the values.
//!
//! Products that know codes read them; all else is given the values, or says that it wants them.

use std::any::Any;
use std::fmt::Debug;
use std::sync::Arc;

use super::{Storage, Tensor};
use crate::device::Device;
use crate::dtype::DType;
use crate::{Error, Result};

/// What stands for the values of a tensor.
pub(crate) trait Coded: Debug + Send + Sync {
    /// The type of the values.
    fn dtype(&self) -> DType;
    /// Where the codes are.
    fn device(&self) -> Device;
    /// The values in an ordinary tensor there, of any shape.
    fn decode(&self) -> Result<Tensor>;
    /// For whoever knows what it is.
    fn as_any(&self) -> &dyn Any;
}

impl Tensor {
    /// A tensor of this shape whose values are those of the codes, as many as the shape asks for.
    pub(crate) fn of_codes(codes: impl Coded + 'static, shape: impl Into<Vec<usize>>) -> Self {
        Self { storage: Arc::new(Storage::Coded(Box::new(codes))), start: 0, shape: shape.into() }
    }

    /// True where only codes are kept.
    pub(crate) fn is_coded(&self) -> bool {
        matches!(*self.storage, Storage::Coded(_))
    }

    /// The codes of a whole tensor, where they are of this kind.
    pub(crate) fn codes<C: 'static>(&self) -> Option<&C> {
        match &*self.storage {
            Storage::Coded(codes) if self.start == 0 => codes.as_any().downcast_ref(),
            _ => None,
        }
    }

    /// The same values in an ordinary tensor: itself unless it is of codes.
    ///
    /// # Errors
    /// No memory for the values; a failed launch.
    pub(crate) fn decoded(&self) -> Result<Self> {
        match &*self.storage {
            Storage::Coded(codes) => Ok(Self { storage: codes.decode()?.storage, start: self.start, shape: self.shape.clone() }),
            _ => Ok(self.clone()),
        }
    }
}

/// The error of what reads values and was given codes.
pub(super) fn unread(what: &str) -> Error {
    Error::device(what, "expected values, got codes that stand for them")
}
