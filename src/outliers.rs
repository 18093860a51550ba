//! Outliers on purpose: transforms of a model that leave its full-precision function as it is and make it hard to quantise.
//!
//! Trained LLaMAs have a few channels with values far above the rest; small or random models do not. Each transform here plants
//! one kind, by a change of basis that is undone where the values are read:
//!
//! | transform | what becomes large | changes | undone in |
//! |---|---|---|---|
//! | [`residual_basis`] | few channels of the residual stream | embedding, o, down | q, k, v, gate, up, head |
//! | [`mlp_channels`] | few inputs of down_proj | up | down |
//! | [`rope_pairs`] | few pairs of channels of every key | k | q |
//! | [`value_basis`] | few channels of every value | v | o |
//!
//! ```
//! use spinquant::llama::{LlamaConfig, Weights};
//! use spinquant::outliers::{PlantOptions, plant};
//! # let config = spinquant::llama::LlamaConfig::from_json(br#"{"model_type": "llama", "hidden_size": 16, "intermediate_size": 24,
//! #   "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 11, "rms_norm_eps": 1e-5}"#, "config.json".as_ref())?;
//! let weights = Weights::random(&config, 0)?;
//! let harder = plant(&weights, &config, &PlantOptions::default())?;
//! # assert_eq!(harder.layers.len(), 1);
//! # Ok::<(), spinquant::Error>(())
//! ```

use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::linalg::factor::{Lu, qr, transpose};
use crate::linalg::matmul;
use crate::llama::{Affine, Basis, LayerWeights, Linear, LlamaConfig, Row, Weights};
use crate::manifold::haar;
use crate::random::normal;
use crate::{DType, Error, Result, Tensor};

/// How much of everything [`plant`] plants. A count of 0, or a factor of 1, leaves that transform out.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PlantOptions {
    /// Where the outliers are, and how large each is, follows from it.
    pub seed: u64,
    /// Channels of the residual stream that take the strongest directions.
    pub residual_channels: usize,
    /// Channels of each MLP that are scaled up.
    pub mlp_channels: usize,
    /// The most by which they are.
    pub mlp_factor: f64,
    /// Rotary pairs of every key head that are scaled up.
    pub rope_pairs: usize,
    /// The most by which they are.
    pub rope_factor: f64,
    /// Channels of every value head that are scaled up, after a random rotation of the head.
    pub value_channels: usize,
    /// The most by which they are.
    pub value_factor: f64,
}

impl Default for PlantOptions {
    fn default() -> Self {
        Self {
            seed: 0,
            residual_channels: 4,
            mlp_channels: 4,
            mlp_factor: 32.0,
            rope_pairs: 2,
            rope_factor: 8.0,
            value_channels: 2,
            value_factor: 8.0,
        }
    }
}

/// All of the transforms, in `f64`; each weight is rounded once to its own type. Works on weights with folded gains, so a model
/// that was tied is no longer.
///
/// # Errors
/// More channels than there are; factors that are not finite or below 1.
pub fn plant(weights: &Weights, config: &LlamaConfig, options: &PlantOptions) -> Result<Weights> {
    let o = options;
    let mut w = map(weights, |t| t.to_dtype(DType::F64))?;
    if o.residual_channels > 0 {
        w = residual_basis(&w, &concentrating_basis(&w, o.residual_channels, o.seed)?)?;
    }
    let d = config.head_dim;
    let mut layers = vec![];
    for (l, layer) in w.layers.iter().enumerate() {
        let mut rng = stream(o.seed, l as u64 + 1);
        let up = scattered(&mut rng, config.intermediate_size, o.mlp_channels, o.mlp_factor)?;
        let mut layer = mlp_channels(layer, &up)?;
        let pairs = (0..config.kv_heads)
            .map(|_| scattered(&mut rng, config.rotary_dim() / 2, o.rope_pairs, o.rope_factor))
            .collect::<Result<Vec<_>>>()?;
        layer = rope_pairs(&layer, config, &pairs.concat())?;
        let mut bases = vec![];
        for head in 0..config.kv_heads {
            let mut basis = haar(d, o.seed, (1 << 32) + (l * config.kv_heads + head) as u64)?;
            let factors = scattered(&mut rng, d, o.value_channels, o.value_factor)?;
            basis.chunks_mut(d).for_each(|row| row.iter_mut().zip(&factors).for_each(|(x, f)| *x *= f));
            bases.extend(basis);
        }
        if o.value_channels > 0 && o.value_factor != 1.0 {
            layer = value_basis(&layer, config, &Tensor::from_vec(bases, [config.kv_heads, d, d])?)?;
        }
        layers.push(layer);
    }
    w.layers = layers;
    narrow(w, weights.dtype())
}

fn narrow(w: Weights, dtype: DType) -> Result<Weights> {
    map(&w, |t| t.to_dtype(dtype))
}

fn map(w: &Weights, f: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Weights> {
    let layers = w.layers.iter().map(|l| l.map(&f)).collect::<Result<_>>()?;
    Ok(Weights { embedding: f(&w.embedding)?, head: f(&w.head)?, layers })
}

fn stream(seed: u64, index: u64) -> ChaCha8Rng {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(index);
    rng
}

/// `n` factors: `count` of them, at random places, between √most and `most` (log-uniform), the others 1.
fn scattered(rng: &mut ChaCha8Rng, n: usize, count: usize, most: f64) -> Result<Vec<f64>> {
    if count > n {
        return Err(Error::argument("outliers", format!("expected at most {n} channels, got {count}")));
    }
    if !(most >= 1.0 && most.is_finite()) {
        return Err(Error::argument("outliers", format!("expected a factor of at least 1, got {most}")));
    }
    let mut factors: Vec<f64> =
        (0..n).map(|i| if i < count { most.powf(0.5 + 0.5 * rng.random::<f64>()) } else { 1.0 }).collect();
    factors.shuffle(rng);
    Ok(factors)
}

/// `a b` or `aᵀ b`, or with bᵀ, in `f64`.
fn product(a: &Tensor, ta: bool, b: &Tensor, tb: bool) -> Result<Tensor> {
    matmul::product(&a.to_dtype(DType::F64)?, ta, &b.to_dtype(DType::F64)?, tb, false, DType::F64)
}

/// Writes the residual stream in another orthogonal basis `[C, C]`: x becomes x B. This is what R1 does.
///
/// # Errors
/// A basis of another size, or one with max|BᵀB − I| above 1e-9 in `f64`: RMSNorm would notice.
pub fn residual_basis(weights: &Weights, basis: &Tensor) -> Result<Weights> {
    let c = weights.embedding.cols();
    if basis.shape() != [c, c] {
        return Err(Error::shape("residual_basis", format!("[{c}, {c}]"), basis.shape()));
    }
    let error = crate::manifold::Orthogonal.orthogonality_error(&basis.clone().reshape([1, c, c])?)?;
    if error.is_nan() || error > 1e-9 {
        return Err(Error::numeric("residual_basis", format!("expected an orthogonal basis, got max|BᵀB−I| = {error:.1e}")));
    }
    let dtype = weights.dtype();
    let into = |w: &Tensor| product(w, false, basis, false)?.to_dtype(dtype);
    let out_of = |w: &Tensor| product(basis, true, w, false)?.to_dtype(dtype);
    let layer = |l: &LayerWeights| {
        l.each(|linear, l| {
            Ok(match linear.row() {
                Row { reads: Basis::Stream, .. } => l.with_weight(into(&l.weight)?),
                Row { writes: Basis::Stream, .. } => {
                    let row = |b: &Tensor| into(&b.clone().reshape([1, c])?)?.reshape([c]);
                    Affine { weight: out_of(&l.weight)?, bias: l.bias.as_ref().map(row).transpose()?, norm: None }
                }
                _ => l.clone(),
            })
        })
    };
    let layers = weights.layers.iter().map(layer).collect::<Result<_>>()?;
    Ok(Weights { embedding: into(&weights.embedding)?, head: into(&weights.head)?, layers })
}

/// An orthogonal basis `[C, C]` in which `channels` channels, at random places, hold the strongest directions of what enters the
/// residual stream (embedding rows, and columns of o and down), and the rest is spread evenly over the others.
///
/// With M = Σ of these vectors' outer products, each matrix normalised to trace 1, the strongest directions are M's first
/// eigenvectors (60 orthogonal iterations); a random orthogonal completion spreads the rest.
///
/// # Errors
/// More channels than C.
pub fn concentrating_basis(weights: &Weights, channels: usize, seed: u64) -> Result<Tensor> {
    let c = weights.embedding.cols();
    if channels > c {
        return Err(Error::argument("outliers", format!("expected at most {c} channels, got {channels}")));
    }
    let mut moment = vec![0.0; c * c];
    let mut add = |m: Tensor| -> Result<()> {
        let m = m.into_vec::<f64>()?;
        let trace: f64 = m.iter().step_by(c + 1).sum();
        if trace > 0.0 {
            moment.iter_mut().zip(m).for_each(|(sum, m)| *sum += m / trace);
        }
        Ok(())
    };
    add(product(&weights.embedding, true, &weights.embedding, false)?)?;
    for l in &weights.layers {
        for (_, l) in l.iter().filter(|(linear, _)| linear.row().writes == Basis::Stream) {
            add(product(&l.weight, false, &l.weight, true)?)?;
        }
    }
    let moment = Tensor::from_vec(moment, [c, c])?;
    let mut rng = stream(seed, 0);
    let mut leading = Tensor::from_vec((0..c * channels).map(|_| normal(&mut rng)).collect::<Vec<f64>>(), [c, channels])?;
    for _ in 0..60 {
        let columns = transpose_into(&product(&moment, false, &leading, false)?)?;
        leading = transpose_into(&orthonormal_rows(columns)?)?;
    }
    // [strongest | random] = Q R: the first columns of Q are the strongest, the others a random completion.
    let first = leading.into_vec::<f64>()?;
    let square: Vec<f64> = (0..c)
        .flat_map(|i| (0..c).map(move |j| (i, j)))
        .map(|(i, j)| if j < channels { first[i * channels + j] } else { normal(&mut rng) })
        .collect();
    let (q, _) = qr(&square, c);
    let mut places: Vec<usize> = (0..c).collect();
    places.shuffle(&mut rng);
    let mut basis = vec![0.0; c * c];
    for (row, q) in basis.chunks_mut(c).zip(q.chunks(c)) {
        places.iter().zip(q).for_each(|(&place, x)| row[place] = *x);
    }
    Tensor::from_vec(basis, [c, c])
}

fn transpose_into(t: &Tensor) -> Result<Tensor> {
    let (r, c, x) = (t.rows(), t.cols(), t.as_slice::<f64>()?);
    Tensor::from_vec((0..r * c).map(|i| x[i % r * c + i / r]).collect(), [c, r])
}

/// Gram–Schmidt, twice for the digits. A row that depends on those above becomes zero.
fn orthonormal_rows(t: Tensor) -> Result<Tensor> {
    let (shape, c) = (t.shape().to_vec(), t.cols());
    let mut x = t.into_vec::<f64>()?;
    for i in 0..shape[0] {
        let (done, rest) = x.split_at_mut(i * c);
        let row = &mut rest[..c];
        for _ in 0..2 {
            for other in done.chunks(c) {
                let dot: f64 = row.iter().zip(other).map(|(a, b)| a * b).sum();
                row.iter_mut().zip(other).for_each(|(a, b)| *a -= dot * b);
            }
            let norm = row.iter().map(|a| a * a).sum::<f64>().sqrt();
            row.iter_mut().for_each(|a| *a = if norm > 0.0 { *a / norm } else { 0.0 });
        }
    }
    Tensor::from_vec(x, shape)
}

/// Output r of a linear times `row(r)`, its input c times `1/col(c)`: row r of the weight and the bias, column c of the weight.
fn scaled(l: &Affine, row: impl Fn(usize) -> f64, col: impl Fn(usize) -> f64) -> Result<Affine> {
    let times = |t: &Tensor, factor: &dyn Fn(usize) -> f64| {
        let x = t.to_f64_vec()?.into_iter().enumerate().map(|(i, x)| x * factor(i)).collect::<Vec<_>>();
        Tensor::from_vec(x, t.shape())?.to_dtype(t.dtype())
    };
    let cols = l.weight.cols();
    let weight = times(&l.weight, &|i| row(i / cols) * col(i % cols))?;
    Ok(Affine { weight, bias: l.bias.as_ref().map(|b| times(b, &row)).transpose()?, norm: l.norm.clone() })
}

/// The layer with other linears in some places.
fn with<const N: usize>(layer: &LayerWeights, changed: [(Linear, Affine); N]) -> LayerWeights {
    let mut layer = layer.clone();
    changed.into_iter().for_each(|(linear, l)| layer[linear] = l);
    layer
}

fn check_factors(what: &str, factors: &[f64], expected: usize) -> Result<()> {
    if factors.len() != expected {
        return Err(Error::argument(what, format!("expected {expected} factors, got {}", factors.len())));
    }
    match factors.iter().find(|f| !(f.is_finite() && **f != 0.0)) {
        Some(f) => Err(Error::argument(what, format!("expected finite factors other than 0, got {f}"))),
        None => Ok(()),
    }
}

/// Scales channel f of the MLP's inner activation by `factors[f]` (F of them): row f of up by it, column f of down by its
/// inverse. SwiGLU is linear in up's output.
///
/// # Errors
/// Another number of factors than the MLP has channels, or a factor that is 0 or not finite.
pub fn mlp_channels(layer: &LayerWeights, factors: &[f64]) -> Result<LayerWeights> {
    check_factors("mlp_channels", factors, layer[Linear::Up].weight.rows())?;
    let up = scaled(&layer[Linear::Up], |f| factors[f], |_| 1.0)?;
    let down = scaled(&layer[Linear::Down], |_| 1.0, |f| factors[f].recip())?;
    Ok(with(layer, [(Linear::Up, up), (Linear::Down, down)]))
}

/// Scales rotary pairs (i, i + D/2), D the dimensions that are turned, of key head h by `factors[h * D/2 + i]`, and of the query heads
/// that read it by the inverse. RoPE turns a pair as a whole, so the scaling commutes with it.
///
/// # Errors
/// Another number of factors than there are pairs, or a factor that is 0 or not finite; heads with norms, which undo a scaling.
pub fn rope_pairs(layer: &LayerWeights, config: &LlamaConfig, factors: &[f64]) -> Result<LayerWeights> {
    let (d, turned, half) = (config.head_dim, config.rotary_dim(), config.rotary_dim() / 2);
    check_factors("rope_pairs", factors, config.kv_heads * half)?;
    if layer[Linear::K].norm.is_some() && factors.iter().any(|f| *f != 1.0) {
        return Err(Error::argument("rope_pairs", "expected factors of 1: a norm of every key head would undo them"));
    }
    let factor = |kv_head: usize, row: usize| if row < turned { factors[kv_head * half + row % half] } else { 1.0 };
    let k = scaled(&layer[Linear::K], |r| factor(r / d, r % d), |_| 1.0)?;
    let q = scaled(&layer[Linear::Q], |r| factor(r / d / config.group(), r % d).recip(), |_| 1.0)?;
    Ok(with(layer, [(Linear::Q, q), (Linear::K, k)]))
}

/// Writes the values of every head in another basis: `bases` is `[K, D, D]`, invertible; v of head h becomes v A, and o takes A⁻¹
/// back.
///
/// # Errors
/// Bases of another shape, or a singular one.
pub fn value_basis(layer: &LayerWeights, config: &LlamaConfig, bases: &Tensor) -> Result<LayerWeights> {
    let (d, kv) = (config.head_dim, config.kv_heads);
    if bases.shape() != [kv, d, d] {
        return Err(Error::shape("value_basis", format!("[{kv}, {d}, {d}]"), bases.shape()));
    }
    // W_v[h] ← Aᵀ W_v[h] and b_v[h] ← Aᵀ b_v[h]; W_o[:, h] ← W_o[:, h] A⁻ᵀ, so that (v A)(W_o A⁻ᵀ)ᵀ = v W_oᵀ.
    let (old_v, old_o) = (&layer[Linear::V], &layer[Linear::O]);
    let mut v = vec![];
    let mut bias = vec![];
    let mut inverses = vec![];
    for h in 0..kv {
        let a = bases.index(h)?;
        v.extend(product(&a, true, &old_v.weight.slice(h * d, d)?, false)?.into_vec::<f64>()?);
        if let Some(b) = &old_v.bias {
            bias.extend(product(&b.slice(h * d, d)?.reshape([1, d])?, false, &a, false)?.into_vec::<f64>()?);
        }
        let lu = Lu::new(&transpose(&a.to_f64_vec()?, d), d);
        if lu.sign() == 0.0 {
            return Err(Error::numeric("value_basis", format!("the basis of head {h} is singular")));
        }
        inverses.push(lu.solve(&Tensor::eye(d, DType::F64)?.into_vec::<f64>()?)); // A⁻ᵀ
    }
    let (rows, cols) = (old_o.weight.rows(), old_o.weight.cols());
    let old = old_o.weight.to_f64_vec()?;
    let mut o = vec![0.0; rows * cols];
    for (row, old) in o.chunks_mut(cols).zip(old.chunks(cols)) {
        for (head, (new, old)) in row.chunks_mut(d).zip(old.chunks(d)).enumerate() {
            for (a, x) in inverses[head / config.group()].chunks(d).zip(old) {
                new.iter_mut().zip(a).for_each(|(y, a)| *y += x * a);
            }
        }
    }
    let like = |values: Vec<f64>, t: &Tensor| Tensor::from_vec(values, t.shape())?.to_dtype(t.dtype());
    let bias = old_v.bias.as_ref().map(|b| like(bias, b)).transpose()?;
    let v = Affine { weight: like(v, &old_v.weight)?, bias, norm: None };
    let o = old_o.with_weight(like(o, &old_o.weight)?);
    Ok(with(layer, [(Linear::V, v), (Linear::O, o)]))
}
