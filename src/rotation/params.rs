//! Rotations as batches of matrices, and what R2 can be beside one matrix a layer.

use rand::RngExt;

use super::{Rotations, Scale, Scales, Sizes, Transforms};
use crate::manifold::generator;
use crate::{Error, Result, Tensor, linalg};

impl Rotations {
    /// R1, R2 and R2b, where there is one, as an optimiser sees them: `[1, C, C]` and `[L, D, D]`, or `[L·K, D, D]`.
    ///
    /// # Errors
    /// Matrices that are not square.
    pub fn as_params(&self) -> Result<Vec<Tensor>> {
        self.squares()?;
        let flat = |t: &Tensor| t.clone().reshape([t.len() / (t.cols() * t.cols()).max(1), t.cols(), t.cols()]);
        let c = self.hidden();
        let r1 = self.r1.clone().reshape([1, c, c]);
        let others = [Some(&self.r2), self.r2b.as_ref()].into_iter().flatten();
        std::iter::once(r1).chain(others.map(|t| if t.shape().len() == 3 { Ok(t.clone()) } else { flat(t) })).collect()
    }

    /// Back from [`Rotations::as_params`], for R1 and one R2 a layer.
    ///
    /// # Errors
    /// Another number of parameters, or shapes that are not R1's and R2's.
    pub fn from_params(params: &[Tensor]) -> Result<Self> {
        let [r1, r2] = params else {
            return Err(Error::argument("rotations", format!("expected R1 and R2, got {} tensors", params.len())));
        };
        let (1, c) = linalg::dims("R1", r1)? else {
            return Err(Error::shape("R1", "[1, C, C]", r1.shape()));
        };
        if !r2.is_empty() {
            linalg::dims("R2", r2)?;
        }
        Ok(Self::new(r1.clone().reshape([c, c])?, r2.clone()))
    }

    /// The same with other values, as [`Rotations::as_params`] has them; everything else stays.
    ///
    /// # Errors
    /// Another number of parameters, or of values.
    pub fn with_params(&self, params: &[Tensor]) -> Result<Self> {
        let expected = 2 + usize::from(self.r2b.is_some());
        if params.len() != expected {
            return Err(Error::argument("rotations", format!("expected {expected} batches of matrices, got {}", params.len())));
        }
        let like = |t: &Tensor, i: usize| params[i].clone().reshape(t.shape());
        let r2b = self.r2b.as_ref().map(|t| like(t, 2)).transpose()?;
        Ok(Self { r1: like(&self.r1, 0)?, r2: like(&self.r2, 1)?, r2b, ..self.clone() })
    }

    /// The names of the matrices after R1, in the order of [`Rotations::as_params`].
    pub(crate) fn names(&self) -> Vec<String> {
        let of = |name: &str| -> Vec<String> {
            let layer = |l: usize| match self.heads() {
                Some(k) => (0..k).map(|h| format!("{name}[{l}, {h}]")).collect(),
                None => vec![format!("{name}[{l}]")],
            };
            (0..self.layers()).flat_map(layer).collect()
        };
        let second = if self.r2b.is_some() { of("R2b") } else { vec![] };
        [of("R2"), second].concat()
    }

    /// An R2 for each of so many key and value heads. The first of a layer is the layer's; with a seed the others have random signs in
    /// front, `diag(±1) R2`, so that from a random Hadamard matrix each head gets another one. Without a seed all are alike: the network
    /// stays what it was. Where each has its own already, nothing changes.
    ///
    /// # Errors
    /// No head; more than memory has room for.
    pub fn per_head(self, heads: usize, seed: Option<u64>) -> Result<Self> {
        if self.heads().is_some() {
            return Ok(self);
        }
        if heads == 0 {
            return Err(Error::argument("R2", "expected at least one key and value head, got 0"));
        }
        let (l, d) = (self.layers(), self.head_dim());
        let spread = |t: &Tensor, seed: Option<u64>| -> Result<Tensor> {
            let (values, shape) = (t.to_f64_vec()?, [l, heads, d, d]);
            let mut all = Vec::with_capacity(crate::tensor::room("R2", &shape, crate::DType::F64)?);
            for (layer, r) in values.chunks((d * d).max(1)).enumerate() {
                for head in 0..heads {
                    let mut signs = generator(seed.unwrap_or(0), ((head as u64) << 32) + layer as u64 + 1);
                    let signed = seed.is_some() && head > 0;
                    for row in r.chunks(d) {
                        let sign = if signed && signs.random::<bool>() { -1.0 } else { 1.0 };
                        all.extend(row.iter().map(|x| sign * x));
                    }
                }
            }
            Tensor::from_vec(all, shape)?.to_dtype(t.dtype())?.to_device(&t.device())
        };
        let r2b = self.r2b.as_ref().map(|t| spread(t, None)).transpose()?;
        Ok(Self { r2: spread(&self.r2, seed)?, r2b, ..self })
    }

    /// With what else is to be learned and is not there yet: an R2 of every head ([`Rotations::per_head`] with this seed), R2b the identity,
    /// scales of 1.
    ///
    /// # Errors
    /// Those of [`Transforms::of`] and [`Scales::check`]; more than memory has room for.
    pub fn with_transforms(self, transforms: &Transforms, sizes: &Sizes, seed: Option<u64>) -> Result<Self> {
        let transforms = transforms.of(sizes)?;
        let mut all = if transforms.heads() { self.per_head(sizes.kv_heads, seed)? } else { self };
        if transforms.has(Scale::ValuesGeneral) && all.r2b.is_none() {
            let n = all.head_dim();
            let values: Vec<f64> = (0..all.r2.len()).map(|i| if i % (n * n) % (n + 1) == 0 { 1.0 } else { 0.0 }).collect();
            let identities = Tensor::from_vec(values, all.r2.shape())?;
            all.r2b = Some(identities.to_dtype(all.r2.dtype())?.to_device(&all.r2.device())?);
        }
        let kinds: Vec<Scale> = transforms.scales().collect();
        for (kind, ones) in Scales::ones(&kinds, sizes)?.iter() {
            if all.scales.get(kind).is_none() {
                all.scales.set(kind, Some(ones.to_dtype(all.r1.dtype())?.to_device(&all.r1.device())?));
            }
        }
        all.scales.check(sizes)?;
        Ok(all)
    }
}
