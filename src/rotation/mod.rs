//! The rotations R1 … R4 of the paper, and the Hadamard matrices they start from.

mod clips;
mod file;
mod params;
mod pickle;
mod report;
mod scales;
mod start;
mod torch;
mod transforms;
mod weight_clips;

pub use clips::ClipEnds;
pub(crate) use clips::clip_name;
pub use file::{FileClips, RotationFile};
pub use report::{MatrixReport, TOLERANCE};
pub use scales::{Scale, Scales, Sizes};
pub use start::{Kind, Start};
pub use transforms::Transforms;
pub use weight_clips::WeightClips;

use std::collections::BTreeMap;
use std::path::Path;

use crate::linalg;
use crate::manifold;
use crate::quant::{Scheme, Site};
use crate::tensor::room;
use crate::{DType, Error, Result, Tensor, io};

/// What is learned. R1 of the residual stream, R2 of every layer's values and scales leave the network's function alone; clip constants,
/// which only count where something is quantised, do not. R3 and R4 are fixed Hadamard maps.
#[derive(Clone, Debug)]
pub struct Rotations {
    /// `[C, C]`: the residual stream is `x R1`.
    pub r1: Tensor,
    /// `[L, D, D]`: the values of a head in layer l are `v R2[l]`. Or `[L, K, D, D]`, one for each key and value head.
    pub r2: Tensor,
    /// Of the same shape, with scales [`Scale::ValuesGeneral`] alone: the values of a head are `v R2 diag(e⁻ᵃ) R2b`, and every invertible
    /// matrix is such a product.
    pub r2b: Option<Tensor>,
    /// Scales merged with them; none as published.
    pub scales: Scales,
    /// Clip constants learned with them; none as published.
    pub clips: ClipEnds,
    /// Clip ratios of weights, every row's own, learned with them; none as published.
    pub weight_clips: Option<WeightClips>,
}

const FORMAT: &str = "spinquant-rotations";
const VERSION: &str = "1";
/// Of files with more than R1 and one R2 a layer.
const SCALED_VERSION: &str = "2";
/// Of files with clip constants.
const CLIPPED_VERSION: &str = "3";
/// Of files with clip ratios of weights.
const WEIGHT_CLIPPED_VERSION: &str = "4";
const CONVENTION: &str = "row vectors: x R1, v R2[l]; Hadamard maps view a row as [K, n/K], Sylvester along the last axis, H_K from the left, over sqrt(n)";

/// The name of the second factor of values in files.
const R2B: &str = "R2b";

/// The name of logarithms of scales in files.
pub(crate) fn scale_name(kind: Scale) -> String {
    format!("scales.{kind}")
}

impl Rotations {
    /// The notes that every file has of its own.
    pub(crate) const OWN_NOTES: [&str; 4] = ["format", "format_version", "convention", "weight_clips_for"];

    /// No rotation: identities, in `f64`.
    ///
    /// # Errors
    /// A size of 0, or one too large for memory.
    pub fn identity(hidden: usize, head_dim: usize, layers: usize) -> Result<Self> {
        Self::build(hidden, head_dim, layers, |n, _| {
            let mut v = vec![0.0; n * n];
            v.iter_mut().step_by(n + 1).for_each(|x| *x = 1.0);
            Ok(v)
        })
    }

    /// Uniformly random orthogonal matrices, in `f64`. A worse start than [`Rotations::random_hadamard`].
    ///
    /// # Errors
    /// A size of 0, or one too large for memory.
    pub fn random_orthogonal(hidden: usize, head_dim: usize, layers: usize, seed: u64) -> Result<Self> {
        Self::build(hidden, head_dim, layers, |n, i| manifold::haar(n, seed, i))
    }

    /// Random Hadamard matrices `diag(±1) Hᵀ`, in `f64`: for a row vector x, the signs come first, `x R = (H (±x)ᵀ)ᵀ`, as in the
    /// published code. (With the signs last, `Hᵀ diag(±1)`, they would only flip rotated coordinates, and every seed would
    /// quantise nearly alike.)
    ///
    /// # Errors
    /// A size of 0, or one too large for memory.
    pub fn random_hadamard(hidden: usize, head_dim: usize, layers: usize, seed: u64) -> Result<Self> {
        Self::build(hidden, head_dim, layers, |n, i| manifold::signed_hadamard(n, seed, i))
    }

    /// Random Hadamard matrices in blocks of `width` along the diagonal of R1, in `f64`, and whole ones for R2: outliers spread over
    /// their block only. What a runtime gets that can afford no wider transform.
    ///
    /// # Errors
    /// A width that does not divide the hidden size.
    pub fn random_block_hadamard(hidden: usize, head_dim: usize, layers: usize, width: usize, seed: u64) -> Result<Self> {
        if width == 0 || !hidden.is_multiple_of(width) {
            return Err(Error::argument("block width", format!("expected a divisor of {hidden}, got {width}")));
        }
        Self::build(hidden, head_dim, layers, |n, i| match i {
            0 => manifold::signed_block_hadamard(n, width, seed, i),
            _ => manifold::signed_hadamard(n, seed, i),
        })
    }

    /// `of(n, index)` makes the n×n matrix number `index`: 0 is R1, l + 1 is `R2[l]`.
    fn build(hidden: usize, head_dim: usize, layers: usize, of: impl Fn(usize, u64) -> Result<Vec<f64>>) -> Result<Self> {
        let r2_shape = [layers, head_dim, head_dim];
        if hidden == 0 || layers > 0 && head_dim == 0 {
            return Err(Error::argument("rotations", format!("expected sizes of at least 1, got {hidden} and {head_dim}")));
        }
        room("R1", &[hidden, hidden], DType::F64)?;
        let mut r2 = Vec::with_capacity(room("R2", &r2_shape, DType::F64)?);
        for l in 0..layers {
            r2.extend(of(head_dim, l as u64 + 1)?);
        }
        Ok(Self::new(Tensor::from_vec(of(hidden, 0)?, [hidden, hidden])?, Tensor::from_vec(r2, r2_shape)?))
    }

    /// R1 `[C, C]` and R2 `[L, D, D]` or `[L, K, D, D]` made elsewhere, without scales and clip constants.
    pub fn new(r1: Tensor, r2: Tensor) -> Self {
        Self { r1, r2, r2b: None, scales: Scales::default(), clips: ClipEnds::default(), weight_clips: None }
    }

    /// What there is.
    pub fn transforms(&self) -> Transforms {
        let kinds: Vec<Scale> = self.scales.iter().map(|(kind, _)| kind).collect();
        Transforms::new(&kinds).with_heads(self.heads().is_some())
    }

    /// The same with other scales.
    pub fn with_scales(self, scales: Scales) -> Self {
        Self { scales, ..self }
    }

    /// The same with other clip constants.
    pub fn with_clips(self, clips: ClipEnds) -> Self {
        Self { clips, ..self }
    }

    /// The same with other clip ratios of weights, or none.
    pub fn with_weight_clips(self, weight_clips: Option<WeightClips>) -> Self {
        Self { weight_clips, ..self }
    }

    /// The clip ratios of weights of a network of this scheme; none where its weights are not quantised.
    ///
    /// # Errors
    /// Those of [`WeightClips::check_grid`].
    pub fn weight_clips_for(&self, scheme: &Scheme) -> Result<Option<&WeightClips>> {
        let Some(clips) = self.weight_clips.as_ref().filter(|_| scheme.weight_bits < 16) else { return Ok(None) };
        clips.check_grid(scheme).map(|()| Some(clips))
    }

    /// Everything by its name in files, in a fixed order.
    pub fn tensors(&self) -> Vec<(String, &Tensor)> {
        let rotations = [("R1", Some(&self.r1)), ("R2", Some(&self.r2)), (R2B, self.r2b.as_ref())];
        let rotations = rotations.into_iter().filter_map(|(name, t)| Some((name.to_string(), t?)));
        let scales = self.scales.iter().map(|(kind, t)| (scale_name(kind), t));
        let clips = self.clips.iter().map(|(site, t)| (clip_name(site), t));
        rotations.chain(scales).chain(clips).chain(self.weight_clips.iter().flat_map(WeightClips::tensors)).collect()
    }

    /// Sets what [`Rotations::tensors`] gives besides R1 and R2, from what `take` has under its names; clip ratios of weights aside, which
    /// [`WeightClips::take`] reads.
    ///
    /// # Errors
    /// Those of `take`.
    pub(crate) fn set_extras(&mut self, mut take: impl FnMut(&str) -> Result<Option<Tensor>>) -> Result<()> {
        self.r2b = take(R2B)?;
        for kind in Scale::ALL {
            self.scales.set(kind, take(&scale_name(kind))?);
        }
        for site in Site::ALL {
            self.clips.set(site, take(&clip_name(site))?);
        }
        Ok(())
    }

    /// What `f` makes of each.
    ///
    /// # Errors
    /// The first of `f`.
    pub fn map(&self, mut f: impl FnMut(&Tensor) -> Result<Tensor>) -> Result<Self> {
        let (r1, r2, r2b) = (f(&self.r1)?, f(&self.r2)?, self.r2b.as_ref().map(&mut f).transpose()?);
        let (scales, clips) = (self.scales.map(|_, t| f(t))?, self.clips.map(|_, t| f(t))?);
        let weight_clips = self.weight_clips.as_ref().map(|clips| clips.map(&mut f)).transpose()?;
        Ok(Self { r1, r2, r2b, scales, clips, weight_clips })
    }

    /// That R1 is a square matrix and R2 a list of them: fields are public.
    fn squares(&self) -> Result<()> {
        match *self.r1.shape() {
            [c, d] if c == d && c > 0 => {}
            _ => return Err(Error::shape("R1", "[C, C]", self.r1.shape())),
        }
        for (name, t) in [("R2", Some(&self.r2)), ("R2b", self.r2b.as_ref())].into_iter().filter_map(|(n, t)| Some((n, t?))) {
            match *t.shape() {
                [l, c, d] if c == d && (c > 0 || l == 0) => {}
                [_, k, c, d] if c == d && c > 0 && k > 0 => {}
                _ => return Err(Error::shape(name, "[L, D, D] or [L, K, D, D]", t.shape())),
            }
        }
        Ok(())
    }

    /// Hidden size C.
    pub fn hidden(&self) -> usize {
        self.r1.cols()
    }
    /// Head size D.
    pub fn head_dim(&self) -> usize {
        self.r2.cols()
    }
    /// Layers L.
    pub fn layers(&self) -> usize {
        self.r2.shape().first().copied().unwrap_or(0)
    }
    /// Key and value heads K, where each has an R2 of its own.
    pub fn heads(&self) -> Option<usize> {
        (self.r2.shape().len() == 4).then(|| self.r2.shape()[1])
    }

    /// The same in another element type.
    ///
    /// # Errors
    /// A type that is not floating-point; a failed launch.
    pub fn to_dtype(&self, dtype: DType) -> Result<Self> {
        self.map(|t| t.to_dtype(dtype))
    }

    /// The same on another device.
    ///
    /// # Errors
    /// A failing copy, or no memory on the device.
    pub fn to_device(&self, device: &crate::Device) -> Result<Self> {
        self.map(|t| t.to_device(device))
    }

    /// max|RᵀR − I| of R1, and of every R2 and then every R2b, head by head, in `f64`.
    ///
    /// # Errors
    /// Matrices that are not square, or integers.
    pub fn orthogonality_errors(&self) -> Result<(f64, Vec<f64>)> {
        self.squares()?;
        let of = |x: Tensor| -> Result<Vec<f64>> {
            if x.is_empty() {
                return Ok(vec![]);
            }
            let wide = x.to_dtype(DType::F64)?;
            if x.device().is_cpu() {
                return Ok(linalg::gram_residual(&wide)?.1);
            }
            let gram = crate::linalg::matmul::product(&wide, true, &wide, false, false, DType::F64)?.to_f64_vec()?;
            let n = x.cols();
            let off = |(i, g): (usize, &f64)| (g - if i % (n + 1) == 0 { 1.0 } else { 0.0 }).abs();
            // NaN is not lost: it is no number's maximum.
            let worst = |m: f64, e: f64| if e > m || e.is_nan() { e } else { m };
            Ok(gram.chunks(n * n).map(|g| g.iter().enumerate().map(off).fold(0.0, worst)).collect())
        };
        let mut all = self.as_params()?.into_iter().map(of);
        let first = all.next().map_or(Ok(vec![]), |r1| r1)?;
        Ok((first[0], all.collect::<Result<Vec<_>>>()?.concat()))
    }

    /// Checks sizes, and that every matrix is orthogonal within `tolerance`.
    ///
    /// # Errors
    /// Names the first matrix that does not fit and by how much.
    pub fn check(&self, hidden: usize, head_dim: usize, layers: usize, tolerance: f64) -> Result<()> {
        if self.r1.shape() != [hidden, hidden] {
            return Err(Error::shape("R1", format!("[{hidden}, {hidden}] for this model"), self.r1.shape()));
        }
        let one = match self.heads() {
            Some(k) => vec![layers, k, head_dim, head_dim],
            None => vec![layers, head_dim, head_dim],
        };
        for (name, t) in [("R2", Some(&self.r2)), ("R2b", self.r2b.as_ref())].into_iter().filter_map(|(n, t)| Some((n, t?))) {
            if t.shape() != one {
                return Err(Error::shape(name, format!("{one:?} for this model"), t.shape()));
            }
        }
        let (r1, others) = self.orthogonality_errors()?;
        let named = std::iter::once(("R1".to_string(), r1)).chain(self.names().into_iter().zip(others));
        for (name, error) in named {
            if error > tolerance || error.is_nan() {
                if !error.is_finite() {
                    return Err(Error::numeric(name, "holds NaN or infinite values"));
                }
                let message = format!("max|RᵀR−I| = {error:.1e}, at most {tolerance:e} is accepted");
                return Err(Error::numeric(format!("{name} is not orthogonal"), message));
            }
        }
        Ok(())
    }

    /// [`Rotations::check`] with the sizes of a model, and of everything else that there is.
    ///
    /// # Errors
    /// Those of [`Rotations::check`], [`Scales::check`], [`ClipEnds::check`] and [`WeightClips::check`]; R2 for another number of heads; R2b without its scales, or these without it.
    pub fn check_for(&self, sizes: &Sizes, tolerance: f64) -> Result<()> {
        if let Some(heads) = self.heads().filter(|&heads| heads != sizes.kv_heads) {
            let expected = format!("one for each of {} key and value heads of this model", sizes.kv_heads);
            return Err(Error::argument("R2", format!("expected {expected}, or one a layer, got {heads} a layer")));
        }
        self.check(sizes.hidden, sizes.head_dim, sizes.layers, tolerance)?;
        let (kind, has) = (Scale::ValuesGeneral, |there| if there { "one" } else { "none" });
        if self.r2b.is_some() != self.scales.get(kind).is_some() {
            let message = format!(
                "expected it together with scales {kind}, got {} and {}",
                has(self.r2b.is_some()),
                has(self.r2b.is_none())
            );
            return Err(Error::argument("R2b", message));
        }
        self.scales.check(sizes)?;
        self.clips.check(sizes.layers, sizes.kv_heads)?;
        self.weight_clips.as_ref().map_or(Ok(()), |clips| clips.check(sizes.layers))
    }

    /// Writes a safetensors file, whole or not at all.
    ///
    /// # Errors
    /// [`Error::Io`] with the path; a failing copy from a GPU.
    pub fn save(&self, path: &Path) -> Result<()> {
        self.save_with(path, &BTreeMap::new())
    }

    /// [`Rotations::save`] with notes of the caller's: scheme, seed, steps.
    ///
    /// # Errors
    /// [`Error::Io`] with the path; a failing copy from a GPU.
    pub fn save_with(&self, path: &Path, notes: &BTreeMap<String, String>) -> Result<()> {
        let tensors = self.tensors().into_iter().map(|(name, t)| (name, t.clone())).collect();
        let mut metadata = notes.clone();
        // Whoever knows no more than R1 and R2 must not read a file that has more; nor clip constants.
        let version = match (self.clips.is_empty(), self.transforms() == Transforms::PUBLISHED) {
            (true, true) => VERSION,
            (true, false) => SCALED_VERSION,
            (false, _) => CLIPPED_VERSION,
        };
        let version = if self.weight_clips.is_some() { WEIGHT_CLIPPED_VERSION } else { version };
        let own = [FORMAT, version, CONVENTION].into_iter().chain(self.weight_clips.as_ref().map(WeightClips::grid));
        let own = Self::OWN_NOTES.iter().zip(own);
        metadata.extend(own.map(|(k, v)| (k.to_string(), v.to_string())));
        io::save_tensors(path, &tensors, &metadata)
    }

    /// Reads rotations; their values must be finite, and near orthogonal where [`Rotations::check`] says so.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Format`] naming file and tensor.
    pub fn load(path: &Path) -> Result<Self> {
        Ok(Self::load_with(path)?.0)
    }

    /// [`Rotations::load`] with the file's string map.
    ///
    /// # Errors
    /// As [`Rotations::load`].
    pub fn load_with(path: &Path) -> Result<(Self, BTreeMap<String, String>)> {
        let (mut tensors, metadata) = io::load_tensors(path)?;
        let known = [VERSION, SCALED_VERSION, CLIPPED_VERSION, WEIGHT_CLIPPED_VERSION];
        if let Some(version) = metadata.get("format_version").filter(|v| !known.contains(&v.as_str())) {
            let expected = format!("expected rotations of format version {}", known.join(", "));
            return Err(Error::format(path, format!("{expected}, got {version:?}")));
        }
        let matrices = |name: &str, t: Tensor, dtype: Option<DType>| -> Result<Tensor> {
            let (ranks, wanted) = if name == "R1" { (2..=2, "[C, C]") } else { (3..=4, "[L, D, D] or [L, K, D, D]") };
            let rank = t.shape().len();
            let square = ranks.contains(&rank) && t.shape()[rank - 1] == t.shape()[rank - 2];
            if !square || t.is_empty() && (rank != 3 || t.cols() == 0) {
                return Err(Error::format(path, format!("{name}: expected shape {wanted}, got {:?}", t.shape())));
            }
            if !matches!(t.dtype(), DType::F32 | DType::F64) {
                return Err(Error::format(path, format!("{name}: expected dtype f32 or f64, got {}", t.dtype())));
            }
            if let Some(r1) = dtype.filter(|r1| *r1 != t.dtype()) {
                return Err(Error::format(path, format!("R1 is {r1}, {name} is {}: expected one dtype", t.dtype())));
            }
            if !io::is_finite(&t)? {
                return Err(Error::format(path, format!("{name} holds NaN or infinite values")));
            }
            Ok(t)
        };
        let mut take = |name: &str, dtype| match tensors.remove(name) {
            Some(t) => matrices(name, t, dtype),
            None => Err(Error::format(path, format!("holds no {name}"))),
        };
        let r1 = take("R1", None)?;
        let dtype = r1.dtype();
        let r2 = take("R2", Some(dtype))?;
        let mut all = Self::new(r1, r2);
        let mut take = |name: &str| {
            let Some(t) = tensors.remove(name) else { return Ok(None) };
            if name == R2B {
                return matrices(name, t, Some(dtype)).map(Some);
            }
            if !matches!(t.dtype(), DType::F32 | DType::F64) || !io::is_finite(&t)? {
                return Err(Error::format(path, format!("{name}: expected finite f32 or f64 values")));
            }
            Ok(Some(t))
        };
        all.set_extras(&mut take)?;
        let grid = metadata.get(Self::OWN_NOTES[3]).map(String::as_str);
        all.weight_clips = WeightClips::take(grid, take).map_err(|e| Error::format(path, e))?;
        Ok((all, metadata))
    }
}
