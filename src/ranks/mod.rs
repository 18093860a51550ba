//! Several processes that share the work of one run, one GPU each: a *rank* is one of them, its [`Group`] is all.
//!
//! Every rank runs the same program on the same inputs, takes its [share](Group::share) of the sequences or windows, and joins what comes of
//! it with the others': gradients by [`Group::all_reduce`], results by [`Group::gather`]. All of them call these in the same order; a rank
//! that asks for something else than the others is an error, as is one that ends, is silent for too long, or fails: every rank then gets
//! [`Error::Rank`] with the message of the one that it came from.
//!
//! Ranks talk over TCP, through rank 0: sums are made there in the order of the ranks, so that they are the same bits in every run and at
//! every rank. Tensors on GPUs are summed by NCCL instead ([`Group::attach`]), which is looked for only then.
//!
//! ```
//! use spinquant::ranks::Group;
//! let alone = Group::alone();
//! assert_eq!((alone.rank(), alone.world(), alone.share(5)), (0, 1, 0..5));
//! ```

mod link;
mod memory;
mod place;
mod rows;
mod wire;

pub use place::Place;

use std::net::TcpListener;
use std::ops::Range;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use crate::device::cuda::Communicator;
use crate::{DType, Device, Error, Result, Tensor};
use link::Link;
pub(crate) use memory::{Apart, Common};

/// The processes that share the work of a run, and which of them this one is. Clones are the same group; the default is alone.
#[derive(Clone, Debug, Default)]
pub struct Group(Option<Arc<Inner>>);

#[derive(Debug)]
struct Inner {
    /// Dropped first: it may wait for the stream that the others' failure left waiting.
    gpus: OnceLock<Communicator>,
    link: Link,
}

impl Group {
    /// One process without others.
    pub fn alone() -> Self {
        Self::default()
    }

    /// The same, to borrow.
    pub fn nobody() -> &'static Self {
        static NOBODY: Group = Group(None);
        &NOBODY
    }

    /// Meets the other ranks: rank 0 waits for them, at `listener` or else where the place says, the others go there.
    ///
    /// # Errors
    /// An address that cannot be listened at or reached; ranks that do not come within a minute, or belong to another run.
    pub fn connect(place: &Place, listener: Option<TcpListener>) -> Result<Self> {
        if place.world == 1 {
            return Ok(Self::alone());
        }
        let link = Link::new(place, listener)?;
        Ok(Self(Some(Arc::new(Inner { gpus: OnceLock::new(), link }))))
    }

    /// Lets tensors of a GPU be summed where they are, by NCCL; all ranks call this. Nothing happens where there is one rank, or on the CPU.
    ///
    /// # Errors
    /// No NCCL on this machine, or one that fails to connect the GPUs.
    pub fn attach(&self, device: &Device) -> Result<()> {
        if let (Some(inner), Device::Cuda(device)) = (&self.0, device)
            && inner.gpus.get().is_none()
        {
            let mut broadcast = |id| self.broadcast("the id of NCCL's connection", id);
            let _ = inner.gpus.set(device.connect((self.rank(), self.world()), &mut broadcast)?);
        }
        Ok(())
    }

    /// This process among the ranks, from 0.
    pub fn rank(&self) -> usize {
        self.0.as_ref().map_or(0, |inner| inner.link.rank())
    }

    /// How many ranks there are.
    pub fn world(&self) -> usize {
        self.0.as_ref().map_or(1, |inner| inner.link.world())
    }

    /// Whether this is rank 0, which writes files and speaks.
    pub fn is_first(&self) -> bool {
        self.rank() == 0
    }

    /// Which of `n` things are this rank's: as many as the others', or one more.
    pub fn share(&self, n: usize) -> Range<usize> {
        self.share_of(self.rank(), n)
    }

    fn share_of(&self, rank: usize, n: usize) -> Range<usize> {
        let at = |rank: usize| (n as u128 * rank as u128 / self.world() as u128) as usize;
        at(rank)..at(rank + 1)
    }

    /// The most of `n` things that a rank gets.
    pub fn largest_share(&self, n: usize) -> usize {
        n.div_ceil(self.world())
    }

    /// What every rank gives, in their order. `what` names it in errors.
    ///
    /// # Errors
    /// [`Error::Rank`] of a rank that failed, ended or asked for something else.
    pub fn gather(&self, what: &str, bytes: Vec<u8>) -> Result<Vec<Vec<u8>>> {
        let Some(inner) = &self.0 else { return Ok(vec![bytes]) };
        wire::split(&inner.link.exchange(what, bytes, |all| Ok(wire::join(&all)))?)
    }

    /// The numbers that every rank gives, in their order.
    ///
    /// # Errors
    /// As [`Group::gather`].
    pub fn gather_numbers(&self, what: &str, values: &[f64]) -> Result<Vec<Vec<f64>>> {
        Ok(self.gather(what, wire::to_bytes(values))?.iter().map(|bytes| wire::from_bytes(bytes)).collect())
    }

    /// What rank 0 gives.
    ///
    /// # Errors
    /// As [`Group::gather`].
    pub fn broadcast(&self, what: &str, bytes: Vec<u8>) -> Result<Vec<u8>> {
        let Some(inner) = &self.0 else { return Ok(bytes) };
        let bytes = if self.is_first() { bytes } else { vec![] };
        inner.link.exchange(what, bytes, |mut all| Ok(all.swap_remove(0)))
    }

    /// Replaces numbers by their sums over ranks.
    ///
    /// # Errors
    /// As [`Group::gather`].
    pub fn sum(&self, what: &str, values: &mut [f64]) -> Result<()> {
        if let Some(inner) = &self.0 {
            let sums = inner.link.exchange(what, wire::to_bytes(values), |all| wire::sum::<f64>(what, &all))?;
            values.copy_from_slice(&wire::from_bytes(&sums));
        }
        Ok(())
    }

    /// Whether any rank says so.
    ///
    /// # Errors
    /// As [`Group::gather`].
    pub fn any(&self, what: &str, here: bool) -> Result<bool> {
        Ok(self.gather(what, vec![u8::from(here)])?.iter().any(|said| said == &[1]))
    }

    /// The sum over ranks of tensors of one shape and type, in that type: `f32` or `f64`. On GPUs by NCCL, after [`Group::attach`]; equal
    /// runs give equal bits where its algorithm is pinned ([`Group::NCCL`]).
    ///
    /// # Errors
    /// Another type; a GPU that is not attached; those of [`Group::gather`].
    pub fn all_reduce(&self, what: &str, x: Tensor) -> Result<Tensor> {
        let Some(inner) = &self.0 else { return Ok(x) };
        let device = x.device();
        match (&device, x.dtype()) {
            (Device::Cuda(device), DType::F32 | DType::F64) => {
                let mut x = x;
                let sum = x.or_new(device)?;
                self.gpus(what)?.sum(sum.view()?, x.view()?)?;
                Ok(sum)
            }
            (Device::Cpu, DType::F32) => {
                let sums = inner.link.exchange(what, wire::to_bytes(x.as_slice::<f32>()?), |all| wire::sum::<f32>(what, &all))?;
                Tensor::from_vec(wire::from_bytes::<f32>(&sums), x.shape())
            }
            (Device::Cpu, DType::F64) => {
                let sums = inner.link.exchange(what, wire::to_bytes(x.as_slice::<f64>()?), |all| wire::sum::<f64>(what, &all))?;
                Tensor::from_vec(wire::from_bytes::<f64>(&sums), x.shape())
            }
            (_, dtype) => Err(Error::dtype(what, "f32 or f64", dtype)),
        }
    }

    /// [`Group::all_reduce`] of several tensors, packed into one buffer for every type and device.
    ///
    /// # Errors
    /// Those of [`Group::all_reduce`].
    pub fn all_reduce_packed(&self, what: &str, tensors: Vec<Tensor>) -> Result<Vec<Tensor>> {
        if self.0.is_none() {
            return Ok(tensors);
        }
        let mut sums: Vec<Option<Tensor>> = vec![None; tensors.len()];
        while let Some(first) = sums.iter().position(Option::is_none) {
            let kind = |i: usize| (tensors[i].dtype(), tensors[i].device());
            let of: Vec<usize> = (first..tensors.len()).filter(|&i| sums[i].is_none() && kind(i) == kind(first)).collect();
            let flat = |&i: &usize| tensors[i].clone().reshape([tensors[i].len()]);
            let packed = Tensor::concat(&of.iter().map(flat).collect::<Result<Vec<_>>>()?)?;
            let packed = self.all_reduce(what, packed)?;
            let mut start = 0;
            for i in of {
                let sum = packed.slice(start, tensors[i].len())?.reshape(tensors[i].shape())?;
                start += tensors[i].len();
                // What launchers read begins at one of their boundaries.
                sums[i] = Some(if sum.device().is_cpu() { sum } else { sum.aligned()? });
            }
        }
        Ok(sums.into_iter().map(|sum| sum.expect("made above")).collect())
    }

    /// Fails at every rank unless all give the same bytes.
    ///
    /// # Errors
    /// [`Error::Rank`] names the first rank that has others than rank 0; those of [`Group::gather`].
    pub fn same(&self, what: &str, bytes: Vec<u8>) -> Result<()> {
        let all = self.gather(what, bytes)?;
        match all.iter().position(|of| *of != all[0]) {
            None => Ok(()),
            Some(rank) => Err(Error::Rank { rank, message: format!("{what} differ from those of rank 0") }),
        }
    }

    /// Tells the others that this rank cannot go on, and why; they get [`Error::Rank`] with its message.
    pub fn fail(&self, error: &Error) {
        if let Some(inner) = self.0.as_ref().filter(|_| !matches!(error, Error::Rank { .. })) {
            inner.link.fail(&error.to_string());
        }
    }

    /// Calls `act` with a message, on a thread of its own, once a rank was lost and this one still lives so much later: a rank that waits for
    /// a GPU, which waits for a rank that is gone, cannot end by itself. Once only.
    pub fn when_lost(&self, after: Duration, act: impl FnOnce(&Error) + Send + 'static) {
        if let Some(inner) = &self.0 {
            inner.link.when_lost(after, Box::new(act));
        }
    }

    /// Environment variables that NCCL reads when it starts, to be set where the user has not: multicast through NVLink's switches off, and
    /// one algorithm and protocol, so that equal runs give equal bits.
    pub const NCCL: [(&str, &str); 3] = [("NCCL_NVLS_ENABLE", "0"), ("NCCL_ALGO", "Ring"), ("NCCL_PROTO", "Simple")];
}

#[cfg(test)]
mod tests;
