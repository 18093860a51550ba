//! Tensors whose rows are shared by ranks: gathered, or summed and shared out.

use super::Group;
use crate::device::cuda::Communicator;
use crate::{DType, Device, Error, Result, Tensor};

impl Group {
    /// The rows of every rank behind one another, in the ranks' order: of as many and of one type each. On GPUs by NCCL, after
    /// [`Group::attach`].
    ///
    /// # Errors
    /// A tensor without axes; another number of bytes at another rank; a GPU that is not attached; those of [`Group::gather`].
    pub fn all_gather(&self, what: &str, x: Tensor) -> Result<Tensor> {
        if self.world() == 1 {
            return Ok(x);
        }
        let mut shape = x.shape().to_vec();
        *shape.first_mut().ok_or_else(|| Error::shape(what, "with at least one axis", x.shape()))? *= self.world();
        if let Device::Cuda(device) = x.device() {
            let all = Tensor::on(&device, &shape, x.dtype())?;
            self.gpus(what)?.gather(all.view()?, x.view()?)?;
            return Ok(all);
        }
        let mut all = Tensor::zeros(shape, x.dtype(), &Device::Cpu)?;
        all.bytes_mut()?.copy_from_slice(&self.gather_equal(what, x.as_bytes()?)?);
        Ok(all)
    }

    /// The bytes of every rank behind one another, as many from each.
    pub(crate) fn gather_equal(&self, what: &str, bytes: &[u8]) -> Result<Vec<u8>> {
        let parts = self.gather(what, bytes.to_vec())?;
        if let Some((rank, part)) = parts.iter().enumerate().find(|(_, part)| part.len() != bytes.len()) {
            let message = format!("{what}: expected {} bytes as rank {} has, got {}", bytes.len(), self.rank(), part.len());
            return Err(Error::Rank { rank, message });
        }
        Ok(parts.concat())
    }

    /// This rank's rows of the sum over ranks of tensors of one shape and type: the first rank has the first rows, each as many. 16-bit
    /// values are summed in `f32` on the CPU; NCCL, on GPUs after [`Group::attach`], rounds every sum of two.
    ///
    /// # Errors
    /// Rows that ranks do not divide; another type than floating-point; a GPU that is not attached; those of [`Group::gather`].
    pub fn reduce_scatter(&self, what: &str, x: Tensor) -> Result<Tensor> {
        if self.world() == 1 {
            return Ok(x);
        }
        let rows = x.shape().first().copied().unwrap_or(0);
        if rows == 0 || !rows.is_multiple_of(self.world()) {
            return Err(Error::shape(what, format!("a first axis that {} ranks divide", self.world()), x.shape()));
        }
        let rows = rows / self.world();
        let dtype = x.dtype();
        if let Device::Cuda(device) = x.device() {
            let mut shape = x.shape().to_vec();
            shape[0] = rows;
            let sums = Tensor::on(&device, &shape, dtype)?;
            self.gpus(what)?.scatter_sums(sums.view()?, x.view()?)?;
            return Ok(sums);
        }
        let wide = if dtype.is_half() { x.to_dtype(DType::F32)? } else { x };
        self.all_reduce(what, wide)?.slice(rows * self.rank(), rows)?.to_dtype(dtype)
    }

    /// The connection of GPUs.
    pub(crate) fn gpus(&self, what: &str) -> Result<&Communicator> {
        let gpus = self.0.as_ref().and_then(|inner| inner.gpus.get());
        gpus.ok_or_else(|| Error::device(what, "expected GPUs that were attached to the group of ranks"))
    }
}
