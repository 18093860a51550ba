//! A layer's weights in the bases of R1, R2 and R4, quantised, on a tape.

use crate::hadamard::Hadamard;
use crate::llama::{Affine, Basis, Block, LayerWeights, Linear, Linears};
use crate::ops::log_scale::Along;
use crate::profile::enter;
use crate::quant::{Site, Sites};
use crate::rotation::{ClipEnds, Scale, Scales};
use crate::{DType, Error, Result, Tape, Tensor, Var};

/// A linear on a tape: its weight and its bias.
pub type LinearVars<'t> = Affine<Var<'t>, Var<'t>>;

/// The weights a layer runs with: rotated and quantised, on a tape.
#[derive(Clone)]
pub struct RotatedWeights<'t> {
    /// `Q(Bᵀ W A)` and `Bᵀ b`, with A the rotation of the basis that the linear reads and B of the one it writes ([`Linear::row`]):
    /// `Q(W_q R1)`, `Q(R2ᵀ W_v R1)` head by head, `Q(R1ᵀ W_down R4)`.
    pub linears: Linears<LinearVars<'t>>,
    /// R1 where gate and up were left unrotated: their input is taken out of R1's basis instead, `x̂ (W R1)ᵀ = (x̂ R1ᵀ) Wᵀ`.
    pub leave: Option<Var<'t>>,
    /// What the layer's activations meet besides the weights.
    pub around: Around<'t>,
}

/// What a layer's activations meet besides its weights, on a tape: nothing by default.
#[derive(Clone, Default)]
pub struct Around<'t> {
    /// Logarithms `[C]` of the scales that the outputs of the two norms are divided by, where there are some.
    pub norms: [Option<Var<'t>>; 2],
    /// Logarithms `[kinds, 2]` of the clip ratios of both ends of what is quantised, in the order of [`Site::ALL`]; where there are none, those of the
    /// layer ([`Block::with_clips`]), else those of the scheme.
    pub clips: LayerClips<'t>,
    /// The gradient passes straight through where a value was clamped by those clips, as it does where there are none; otherwise it stops there.
    pub straight: bool,
}

/// The clip constants of one layer, in the order of [`Site::ALL`].
pub type LayerClips<'t> = [Option<Var<'t>>; Site::ALL.len()];

/// Those of layer `l`, each made a variable or a constant by `enter`.
///
/// # Errors
/// No such layer.
pub(crate) fn clips_of<'t>(clips: &ClipEnds, l: usize, mut enter: impl FnMut(Tensor) -> Var<'t>) -> Result<LayerClips<'t>> {
    let mut of: LayerClips<'t> = Default::default();
    for (site, t) in clips.iter() {
        of[site as usize] = Some(enter(t.index(l)?));
    }
    Ok(of)
}

impl<'t> RotatedWeights<'t> {
    /// Weights that are ready to use.
    pub fn constants(tape: &'t Tape, w: &LayerWeights) -> Self {
        let constant = |t: &Tensor| tape.constant(t.clone());
        let linears = w.0.each_ref().map(|l| Affine {
            weight: constant(&l.weight),
            bias: l.bias.as_ref().map(constant),
            norm: l.norm.as_ref().map(constant),
        });
        Self { linears: Linears(linears), leave: None, around: Around::default() }
    }

    /// Their values.
    pub fn into_values(self) -> LayerWeights {
        Linears(self.linears.0.map(|l| Affine {
            weight: l.weight.into_value(),
            bias: l.bias.map(Var::into_value),
            norm: l.norm.map(Var::into_value),
        }))
    }

    /// Everything in a fixed order: seven weights, seven biases, seven gains of norms behind linears, R1 where it leaves, the scales of the
    /// layer's norms, its clip constants.
    pub(crate) fn into_slots(self) -> Vec<Option<Var<'t>>> {
        let (mut weights, mut biases, mut gains) = (vec![], vec![], vec![]);
        for l in self.linears.0 {
            weights.push(Some(l.weight));
            biases.push(l.bias);
            gains.push(l.norm);
        }
        weights
            .into_iter()
            .chain(biases)
            .chain(gains)
            .chain([self.leave])
            .chain(self.around.norms)
            .chain(self.around.clips)
            .collect()
    }

    /// Back from [`RotatedWeights::into_slots`]; `straight` as in [`Around`].
    ///
    /// # Errors
    /// [`Error::Argument`] for another number of slots, or a weight that is missing.
    pub(crate) fn from_slots(slots: Vec<Option<Var<'t>>>, straight: bool) -> Result<Self> {
        let (got, wanted) = (slots.len(), 3 * Linear::ALL.len() + 3 + Site::ALL.len());
        if got != wanted {
            return Err(Error::argument("weights", format!("expected {wanted} slots of a layer's weights, got {got}")));
        }
        let mut slots = slots.into_iter();
        let mut seven = || slots.by_ref().take(Linear::ALL.len()).collect::<Vec<_>>();
        let (weights, biases, gains) = (seven(), seven(), seven());
        let missing = || Error::argument("weights", "a linear without a weight");
        let affine = |((weight, bias), norm): ((Option<_>, _), _)| Ok(Affine { weight: weight.ok_or_else(missing)?, bias, norm });
        let linears = Linears::from_vec(weights.into_iter().zip(biases).zip(gains).map(affine).collect::<Result<_>>()?)?;
        let mut next = || slots.next().flatten();
        let (leave, norms, clips) = (next(), [next(), next()], std::array::from_fn(|_| next()));
        Ok(Self { linears, leave, around: Around { norms, clips, straight } })
    }
}

/// What changes the weights of one layer and not the network's function, on a tape.
#[derive(Clone)]
pub struct LayerTransforms<'t> {
    /// R1 `[C, C]`.
    pub r1: Var<'t>,
    /// This layer's R2 `[D, D]`, or `[K, D, D]`: one for each key and value head.
    pub r2: Var<'t>,
    /// Its R2b, of the same shape, where there is one.
    pub r2b: Option<Var<'t>>,
    /// This layer's scales.
    pub scales: LayerScales<'t>,
}

/// A layer's transforms, and the constants that are learned with them.
#[derive(Clone)]
pub(crate) struct LayerLearned<'t> {
    pub transforms: LayerTransforms<'t>,
    pub clips: LayerClips<'t>,
    /// As in [`Around`].
    pub straight: bool,
}

/// Logarithms of the scales of one layer, where there are some; see [`Scale`](crate::rotation::Scale).
#[derive(Clone, Default)]
pub struct LayerScales<'t> {
    /// Of up's output and down's input, `[F]`.
    pub up_down: Option<Var<'t>>,
    /// Of v's output and o's input, `[K·D]`.
    pub values: Option<Var<'t>>,
    /// Of the outputs of the two norms, `[C]` each.
    pub norms: [Option<Var<'t>>; 2],
    /// Of pairs of keys and queries, with their angles, `[K, 2, P]`.
    pub rope_pairs: Option<Var<'t>>,
    /// Of values between R2 and R2b, `[K·D]`.
    pub values_general: Option<Var<'t>>,
}

impl<'t> LayerScales<'t> {
    /// Scales of layer `l`, each made a variable or a constant by `enter`.
    ///
    /// # Errors
    /// No such layer.
    pub fn of(scales: &Scales, l: usize, mut enter: impl FnMut(Tensor) -> Var<'t>) -> Result<Self> {
        let mut at = |kind| scales.get(kind).map(|t| Ok::<_, Error>(enter(t.index(l)?))).transpose();
        let (up_down, values, rope_pairs) = (at(Scale::UpDown)?, at(Scale::Values)?, at(Scale::RopePairs)?);
        let values_general = at(Scale::ValuesGeneral)?;
        let norms = match scales.get(Scale::Norms) {
            Some(t) => {
                let both = t.index(l)?;
                [Some(enter(both.index(0)?)), Some(enter(both.index(1)?))]
            }
            None => [None, None],
        };
        Ok(Self { up_down, values, norms, rope_pairs, values_general })
    }
}

impl<'t> LayerTransforms<'t> {
    /// R1 and R2 alone.
    pub fn published(r1: Var<'t>, r2: Var<'t>) -> Self {
        Self { r1, r2, r2b: None, scales: LayerScales::default() }
    }

    /// Everything in a fixed order: R1, R2, R2b, the scales.
    fn into_slots(self) -> Vec<Option<Var<'t>>> {
        let LayerScales { up_down, values, norms: [first, second], rope_pairs, values_general } = self.scales;
        vec![Some(self.r1), Some(self.r2), self.r2b, up_down, values, first, second, rope_pairs, values_general]
    }

    /// Back from [`LayerTransforms::into_slots`].
    fn from_slots(slots: Vec<Option<Var<'t>>>) -> Result<Self> {
        let wrong = || Error::Tape("layer: expected R1, R2 and the slots of scales".into());
        let [r1, r2, r2b, up_down, values, first, second, rope_pairs, values_general] =
            <[_; 9]>::try_from(slots).map_err(|_| wrong())?;
        let scales = LayerScales { up_down, values, norms: [first, second], rope_pairs, values_general };
        Ok(Self { r1: r1.ok_or_else(wrong)?, r2: r2.ok_or_else(wrong)?, r2b, scales })
    }
}

impl<'t> LayerLearned<'t> {
    /// Everything in a fixed order: the transforms, the clip constants.
    pub fn into_slots(self) -> Vec<Option<Var<'t>>> {
        self.transforms.into_slots().into_iter().chain(self.clips).collect()
    }

    /// Back from [`LayerLearned::into_slots`].
    ///
    /// # Errors
    /// [`Error::Tape`] for another number of slots, or a rotation that is missing.
    pub fn from_slots(mut slots: Vec<Option<Var<'t>>>, straight: bool) -> Result<Self> {
        let clips = slots.split_off(slots.len().saturating_sub(Site::ALL.len()));
        let clips = LayerClips::try_from(clips).map_err(|_| Error::Tape("layer: expected slots of clip constants".into()))?;
        Ok(Self { transforms: LayerTransforms::from_slots(slots)?, clips, straight })
    }

    /// The weights that a layer runs with ([`Block::transform`]), its clip constants beside them.
    ///
    /// # Errors
    /// Those of [`Block::transform`].
    pub fn weights(&self, block: &Block, s: &Sites, tokens: usize) -> Result<RotatedWeights<'t>> {
        let mut w = block.transform(&self.transforms, s, Some(tokens))?;
        (w.around.clips, w.around.straight) = (self.clips.clone(), self.straight);
        Ok(w)
    }
}

impl Block {
    /// Rotates and quantises the weights. Gradients flow to `r1` [C, C] and `r2` [D, D]. Given the number of input rows, unquantised
    /// weights may be left unrotated where rotating the input instead is cheaper ([`RotatedWeights::leave`]).
    ///
    /// What is rotated twice (v and o by R1 and R2, down by R1 and R4) is kept in `f32` in between where weights have 16 bits.
    ///
    /// # Errors
    /// [`Error::Argument`] for a layer whose norms keep their gains; rotations of another size.
    pub fn rotate<'t>(&self, r1: &Var<'t>, r2: &Var<'t>, s: &Sites, tokens: Option<usize>) -> Result<RotatedWeights<'t>> {
        self.transform(&LayerTransforms::published(r1.clone(), r2.clone()), s, tokens)
    }

    /// [`Block::rotate`] with scales too. With scales of its norm or of up, gate and up are never left unrotated.
    ///
    /// # Errors
    /// Those of [`Block::rotate`]; scales of another size.
    pub fn transform<'t>(&self, by: &LayerTransforms<'t>, s: &Sites, tokens: Option<usize>) -> Result<RotatedWeights<'t>> {
        let LayerTransforms { r1, scales, .. } = by;
        if self.gains().is_some() {
            return Err(Error::argument("rotation", "the gains of this layer's norms are not folded into its weights"));
        }
        let _part = enter("weights");
        let tape = r1.tape();
        let inner = self.weights[Linear::Down].weight.cols();
        let rotations = Rotation { by, r4: s.online.r4.map(inner)? };
        let out = Linear::at(Site::MlpInput).map(|l| self.weights[l].weight.rows()).sum();
        let scaled = scales.up_down.is_some() || scales.norms[1].is_some();
        let leave =
            !scaled && !s.weight.is_active() && tokens.is_some_and(|tokens| cheaper_outside(out, r1.value().cols(), tokens));

        // What has a rotation on its output comes first: the gradients of R1 and R2 add up in the reverse of this order.
        let mut order = Linear::ALL;
        order.sort_by_key(|l| l.row().writes == Basis::Own);
        let mut done = Linears([const { None }; 7]);
        for linear in order {
            let Affine { weight, bias, norm } = &self.weights[linear];
            let w = tape.constant(weight.clone());
            let w = match leave && linear.row().site == Site::MlpInput {
                true => w,
                false => rotations.weight(linear, w)?.to_dtype(weight.dtype())?.fake_quant(&s.weight)?,
            };
            let b = bias.as_ref().map(|b| rotations.bias(linear, tape.constant(b.clone()))).transpose()?;
            let norm = norm.as_ref().map(|g| tape.constant(g.clone()));
            done[linear] = Some(Affine { weight: w, bias: b, norm });
        }
        let linears = Linears(done.0.map(|l| l.expect("made above")));
        let around = Around { norms: scales.norms.clone(), ..Around::default() };
        Ok(RotatedWeights { linears, leave: leave.then(|| r1.clone()), around })
    }
}

/// The rotations and scales of one layer.
struct Rotation<'a, 't> {
    by: &'a LayerTransforms<'t>,
    r4: Option<Hadamard>,
}

impl<'t> Rotation<'_, 't> {
    /// `Bᵀ W A`, R1's product first; in `f32` at least where that is not the last.
    fn weight(&self, linear: Linear, w: Var<'t>) -> Result<Var<'t>> {
        let row = linear.row();
        let dtype = w.value().dtype();
        let twice = row.reads == Basis::Values || row.writes == Basis::Values || (row.reads == Basis::Inner && self.r4.is_some());
        let scaled = self.of_rows(linear).is_some() || self.of_columns(linear).is_some() || self.of_pairs(linear).is_some();
        let twice = twice || scaled;
        let between = if twice { wide(dtype) } else { dtype };
        let w = match row.reads {
            Basis::Stream => w.matmul_as(self.by.r1.clone(), between)?,
            _ => self.by.r1.clone().transpose_matmul_as(w, between)?,
        };
        let w = self.scaled(linear, w)?;
        match (row.reads, row.writes, &self.r4) {
            (_, Basis::Values, _) => self.values_out(w),
            (Basis::Values, ..) => self.values_in(w),
            (Basis::Inner, _, Some(r4)) => w.hadamard_by(r4),
            _ => Ok(w),
        }
    }

    /// Width of a head.
    fn d(&self) -> usize {
        self.by.r2.value().cols()
    }

    /// The rows of v's weight `[K·D, in]` into the basis of values: `R2ᵀ W`, and where there is R2b `R2bᵀ diag(e⁻ᵃ) R2ᵀ W`.
    fn values_out(&self, w: Var<'t>) -> Result<Var<'t>> {
        let (d, [out, inputs]) = (self.d(), [w.value().rows(), w.value().cols()]);
        let by = |w: Var<'t>, r: &Var<'t>| r.clone().transpose_matmul(w.reshape([out / d, d, inputs])?)?.reshape([out, inputs]);
        let w = by(w, &self.by.r2)?;
        let w = match &self.by.scales.values_general {
            Some(a) => w.log_scale(a.clone(), Along::Rows, true)?,
            None => w,
        };
        self.by.r2b.iter().try_fold(w, by)
    }

    /// The columns of o's weight `[out, H·D]` into the basis of values: `W R2`, and where there is R2b `W R2 diag(eᵃ) R2b`.
    fn values_in(&self, w: Var<'t>) -> Result<Var<'t>> {
        let w = columns_by(w, &self.by.r2)?;
        let w = match &self.by.scales.values_general {
            Some(a) => self.scaled_columns(w, a)?,
            None => w,
        };
        self.by.r2b.iter().try_fold(w, columns_by)
    }

    /// Rows divided or turned and columns multiplied by the scales. Both are in bases that R1 on the other side does not touch.
    fn scaled(&self, linear: Linear, w: Var<'t>) -> Result<Var<'t>> {
        let w = match self.of_rows(linear) {
            Some(a) => w.log_scale(a.clone(), Along::Rows, true)?,
            None => w,
        };
        let w = self.turned(linear, w)?;
        match self.of_columns(linear) {
            Some(a) => self.scaled_columns(w, a),
            None => Ok(w),
        }
    }

    /// Columns multiplied by scales, of which the query heads of a key and value head have the same.
    fn scaled_columns(&self, w: Var<'t>, a: &Var<'t>) -> Result<Var<'t>> {
        let (entries, columns, d) = (a.value().len(), w.value().cols(), self.d());
        let a = match columns / entries {
            0 | 1 => a.clone(),
            // In f64, for merging, a GPU has no kernel that gathers.
            group if a.value().dtype() == DType::F64 && !a.requires_grad() => {
                let values = a.value().to_f64_vec()?;
                let repeated: Vec<f64> = values.chunks(d).flat_map(|head| head.repeat(group)).collect();
                a.tape().constant(Tensor::from_vec(repeated, [columns])?.to_device(&a.value().device())?)
            }
            group => {
                let heads = entries / d;
                let ids: Vec<u32> = (0..heads * group).map(|q| (q / group) as u32).collect();
                a.clone().reshape([heads, d])?.embedding(ids.into())?.reshape([columns])?
            }
        };
        w.log_scale(a, Along::Columns, false)
    }

    /// Pairs of rows turned: those of q are divided by the scales, those of k multiplied.
    fn turned(&self, linear: Linear, w: Var<'t>) -> Result<Var<'t>> {
        match self.of_pairs(linear) {
            Some(p) => w.rope_pairs(p.clone(), self.d(), linear == Linear::Q),
            None => Ok(w),
        }
    }

    /// What turns pairs of a linear's output.
    fn of_pairs(&self, linear: Linear) -> Option<&Var<'t>> {
        self.by.scales.rope_pairs.as_ref().filter(|_| matches!(linear, Linear::Q | Linear::K))
    }

    /// The scales that divide a linear's output.
    fn of_rows(&self, linear: Linear) -> Option<&Var<'t>> {
        match linear {
            Linear::Up => self.by.scales.up_down.as_ref(),
            Linear::V => self.by.scales.values.as_ref(),
            _ => None,
        }
    }

    /// The scales that multiply a linear's input.
    fn of_columns(&self, linear: Linear) -> Option<&Var<'t>> {
        match linear {
            Linear::Down => self.by.scales.up_down.as_ref(),
            Linear::O => self.by.scales.values.as_ref(),
            _ => linear.row().norm.and_then(|which| self.by.scales.norms[which].as_ref()),
        }
    }

    /// `Bᵀ b`, as the rows `bᵀ B`.
    fn bias(&self, linear: Linear, b: Var<'t>) -> Result<Var<'t>> {
        let b = match self.of_rows(linear) {
            Some(a) => b.log_scale(a.clone(), Along::Columns, true)?,
            None => b,
        };
        let b = match self.of_pairs(linear) {
            Some(_) => {
                let n = b.value().len();
                self.turned(linear, b.reshape([n, 1])?)?.reshape([n])?
            }
            None => b,
        };
        let (dtype, out) = (b.value().dtype(), b.value().len());
        match linear.row().writes {
            Basis::Stream => {
                b.to_dtype(wide(dtype))?.reshape([1, out])?.matmul(self.by.r1.clone())?.reshape([out])?.to_dtype(dtype)
            }
            Basis::Values => {
                let d = self.d();
                let by = |b: Var<'t>, r: &Var<'t>| {
                    let rows = if r.value().shape().len() == 2 { vec![out / d, d] } else { vec![out / d, 1, d] };
                    b.reshape(rows)?.matmul(r.clone())?.reshape([out])
                };
                let b = by(b.to_dtype(wide(dtype))?, &self.by.r2)?;
                let b = match &self.by.scales.values_general {
                    Some(a) => b.log_scale(a.clone(), Along::Columns, true)?,
                    None => b,
                };
                self.by.r2b.iter().try_fold(b, by)?.to_dtype(dtype)
            }
            Basis::Own | Basis::Inner => Ok(b),
        }
    }
}

/// The columns of w `[out, H·D]`, a head at a time, by R `[D, D]`, or by that of their key and value head in `[K, D, D]`.
fn columns_by<'t>(w: Var<'t>, r: &Var<'t>) -> Result<Var<'t>> {
    let (d, [out, columns]) = (r.value().cols(), [w.value().rows(), w.value().cols()]);
    if r.value().shape().len() == 2 {
        return w.reshape([out * columns / d, d])?.matmul(r.clone())?.reshape([out, columns]);
    }
    // Query heads that share a matrix lie behind one another once heads come first.
    let (heads, kinds) = (columns / d, r.value().shape()[0]);
    if kinds == 0 || !heads.is_multiple_of(kinds) {
        return Err(Error::shape("R2", format!("[a divisor of {heads}, {d}, {d}]"), r.value().shape()));
    }
    let first = w.reshape([out, heads, d])?.swap_axes()?.reshape([kinds, heads / kinds * out, d])?;
    first.matmul(r.clone())?.reshape([heads, out, d])?.swap_axes()?.reshape([out, columns])
}

/// The type that 16-bit values are multiplied in when the product is not the last.
fn wide(dtype: DType) -> DType {
    if dtype.is_half() { DType::F32 } else { dtype }
}

/// True when rotating `tokens` rows of input costs less than rotating a weight of `out` rows. Inside (`W R1`): 2·out·C² to rotate,
/// 2·tokens·out·C for dW̃ and 2·out·C² for dR1. Outside (`x R1ᵀ`): 2·tokens·C² each for the rotation, its dx and dR1.
fn cheaper_outside(out: usize, c: usize, tokens: usize) -> bool {
    3 * tokens * c < out * (tokens + 2 * c)
}
