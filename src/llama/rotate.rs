//! A layer's weights in the bases of R1, R2 and R4, quantised, on a tape.

use crate::llama::turn::{Rotation, Share};
use crate::llama::{Affine, Basis, Block, LayerWeights, Linear, Linears};
use crate::profile::enter;
use crate::quant::{Site, Sites};
use crate::ranks::Group;
use crate::rotation::{ClipEnds, Scale, Scales};
use crate::{Error, Result, Tape, Tensor, Var};

/// A linear on a tape: its weight and its bias.
pub type LinearVars<'t> = Affine<Var<'t>, Var<'t>>;

/// The weights a layer runs with: rotated and quantised, on a tape.
#[derive(Clone)]
pub struct RotatedWeights<'t> {
    /// `Q(Bᵀ W A)` and `Bᵀ b`, with A the rotation of the basis that the linear reads and B of the one it writes ([`Linear::row`]):
    /// `Q(W_q R1)`, `Q(R2ᵀ W_v R1)` head by head, `Q(R1ᵀ W_down R4)`.
    pub linears: Linears<LinearVars<'t>>,
    /// R1 where gate and up were left unrotated: their input is taken out of R1's basis instead, `x̂ (W R1)ᵀ = (x̂ R1ᵀ) Wᵀ`. Its columns
    /// are multiplied by the scales of the norm, where there are some.
    pub leave: Option<Var<'t>>,
    /// What the layer's activations meet besides the weights.
    pub around: Around<'t>,
}

/// What a layer's activations meet besides its weights, on a tape: nothing by default.
#[derive(Clone, Default)]
pub struct Around<'t> {
    /// Logarithms `[C]` of the scales that the outputs of the two norms are divided by, where there are some.
    pub norms: [Option<Var<'t>>; 2],
    /// Logarithms `[F]` of the scales that the output of up is divided by, where its rows are not.
    pub up: Option<Var<'t>>,
    /// Logarithms `[kinds, 2]` of the clip ratios of both ends of what is quantised, in the order of [`Site::ALL`]; where there are none, those of the
    /// layer ([`Block::with_clips`]), else those of the scheme.
    pub clips: LayerClips<'t>,
    /// The gradient passes straight through where a value was clamped by those clips, as it does where there are none; otherwise it stops there.
    pub straight: bool,
    /// Codes are kept of what is quantised here, in the order of [`Site::ALL`]: all linears that read it multiply codes.
    pub coded: [bool; Site::ALL.len()],
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
    /// layer's norms and of the output of up, its clip constants.
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
            .chain([self.around.up])
            .chain(self.around.clips)
            .collect()
    }

    /// Back from [`RotatedWeights::into_slots`]; `straight` as in [`Around`].
    ///
    /// # Errors
    /// [`Error::Argument`] for another number of slots, or a weight that is missing.
    pub(crate) fn from_slots(slots: Vec<Option<Var<'t>>>, straight: bool) -> Result<Self> {
        let (got, wanted) = (slots.len(), 3 * Linear::ALL.len() + 4 + Site::ALL.len());
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
        let (leave, norms, up, clips) = (next(), [next(), next()], next(), std::array::from_fn(|_| next()));
        let around = Around { norms, up, clips, straight, ..Around::default() };
        Ok(Self { linears, leave, around }.with_coded_inputs())
    }

    /// The same, whose linears' inputs are codes where their weights are.
    fn with_coded_inputs(mut self) -> Self {
        for site in Site::ALL {
            let mut linears = Linear::at(site).peekable();
            self.around.coded[site as usize] =
                linears.peek().is_some() && linears.all(|l| self.linears[l].weight.value().is_coded());
        }
        self
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
    /// Logarithms `[kinds, 2]` of the clip ratios of weights ([`WeightClips`](crate::rotation::WeightClips)).
    pub weight_clips: Option<Linears<Var<'t>>>,
    /// As in [`Around`].
    pub straight: bool,
    /// Ranks that share the rows of weights.
    pub rows: Group,
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
    /// Everything in a fixed order: the transforms, the clip constants, those of the seven weights.
    pub fn into_slots(self) -> Vec<Option<Var<'t>>> {
        let weights = match self.weight_clips {
            Some(Linears(all)) => all.map(Some),
            None => [const { None }; Linear::ALL.len()],
        };
        self.transforms.into_slots().into_iter().chain(self.clips).chain(weights).collect()
    }

    /// Back from [`LayerLearned::into_slots`].
    ///
    /// # Errors
    /// [`Error::Tape`] for another number of slots, or a rotation that is missing.
    pub fn from_slots(mut slots: Vec<Option<Var<'t>>>, straight: bool, rows: &Group) -> Result<Self> {
        let mut last = |count: usize| slots.split_off(slots.len().saturating_sub(count));
        let weights: Option<Vec<_>> = last(Linear::ALL.len()).into_iter().collect();
        let clips = last(Site::ALL.len());
        let clips = LayerClips::try_from(clips).map_err(|_| Error::Tape("layer: expected slots of clip constants".into()))?;
        let weight_clips = weights.map(Linears::from_vec).transpose()?;
        Ok(Self { transforms: LayerTransforms::from_slots(slots)?, clips, weight_clips, straight, rows: rows.clone() })
    }

    /// The weights that a layer runs with ([`Block::transform`]), on grids that learned ratios clip where there are some; its clip constants
    /// beside them.
    ///
    /// # Errors
    /// Those of [`Block::transform`].
    pub fn weights(&self, block: &Block, s: &Sites, tokens: usize) -> Result<RotatedWeights<'t>> {
        let coded = block.coded(s, &self.clips, self.weight_clips.is_some())?;
        let quantized = |linear, w: Var<'t>, share: Share| match &self.weight_clips {
            Some(a) if coded[linear] => w.clipped_coded(&s.weight, share.rows(a[linear].clone())?, !self.straight),
            Some(a) => w.clipped_fake_quant(&s.weight, share.rows(a[linear].clone())?, !self.straight),
            None if coded[linear] => w.coded(&s.weight),
            None => w.fake_quant(&s.weight),
        };
        let mut w = block.transform_by(&self.transforms, s, (Some(tokens), &self.rows), quantized)?;
        (w.around.clips, w.around.straight) = (self.clips.clone(), self.straight);
        Ok(w.with_coded_inputs())
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

    /// [`Block::rotate`] with scales too. Given the number of input rows, the output of up is divided by its scales and not its rows
    /// ([`Around::up`]), unless the grid of weights does not follow the scale of a row: the gradient of the scales is then a sum over tokens, which
    /// the activation makes in passing, and an unquantised up needs no gradient of its weight.
    ///
    /// # Errors
    /// Those of [`Block::rotate`]; scales of another size.
    pub fn transform<'t>(&self, by: &LayerTransforms<'t>, s: &Sites, tokens: Option<usize>) -> Result<RotatedWeights<'t>> {
        self.transform_by(by, s, (tokens, Group::nobody()), |_, w, _| w.fake_quant(&s.weight))
    }

    /// [`Block::transform`] with weights quantised by `quantized`. Ranks each make their rows of them and give them to one another: all ranks
    /// call this with as many tokens, and get the same bits as one.
    fn transform_by<'t>(
        &self,
        by: &LayerTransforms<'t>,
        s: &Sites,
        (tokens, ranks): (Option<usize>, &Group),
        quantized: impl Fn(Linear, Var<'t>, Share) -> Result<Var<'t>>,
    ) -> Result<RotatedWeights<'t>> {
        let LayerTransforms { r1, scales, .. } = by;
        if self.gains().is_some() {
            return Err(Error::argument("rotation", "the gains of this layer's norms are not folded into its weights"));
        }
        let _part = enter("weights");
        let tape = r1.tape();
        let inner = self.weights[Linear::Down].weight.cols();
        // A grid that depends on the whole weight is found by who has it.
        let share = if s.weight.is_by_row() { Share::of(ranks) } else { Share::WHOLE };
        let out = Linear::at(Site::MlpInput).map(|l| self.weights[l].weight.rows()).sum();
        let leave = !s.weight.is_active() && tokens.is_some_and(|tokens| cheaper_outside(out, r1.value().cols(), tokens));

        // The scales of a row go through the quantiser of its weight, so that the output of up may be divided by them as well as its rows.
        let outside = tokens.is_some() && s.weight.follows_rows();
        let rotations = Rotation::new(by, s.online.r4.map(inner)?, !outside, share)?;

        // What has a rotation on its output comes first: the gradients of R1 and R2 add up in the reverse of this order.
        let mut order = Linear::ALL;
        order.sort_by_key(|l| l.row().writes == Basis::Own);
        let mut done = Linears([const { None }; 7]);
        for linear in order {
            let Affine { weight, bias, norm } = &self.weights[linear];
            let (w, b) = (tape.constant(weight.clone()), bias.as_ref().map(|b| tape.constant(b.clone())));
            let (w, b) = match leave && linear.row().site == Site::MlpInput {
                true => (w, b),
                false => {
                    let b = b.map(|b| rotations.bias(linear, b)).transpose()?;
                    let share = rotations.share(linear, weight.rows());
                    let w = quantized(linear, rotations.weight(linear, w)?.to_dtype(weight.dtype())?, share)?;
                    (share.gathered(w, ranks)?, b)
                }
            };
            let norm = norm.as_ref().map(|g| tape.constant(g.clone()));
            done[linear] = Some(Affine { weight: w, bias: b, norm });
        }
        let linears = Linears(done.0.map(|l| l.expect("made above")));
        let up = scales.up_down.clone().filter(|_| outside);
        let around = Around { norms: scales.norms.clone(), up, ..Around::default() };
        Ok(RotatedWeights { linears, leave: leave.then(|| rotations.entering(1)), around })
    }
}

/// True when rotating `tokens` rows of input costs less than rotating a weight of `out` rows. Inside (`W R1`): 2·out·C² to rotate,
/// 2·tokens·out·C for dW̃ and 2·out·C² for dR1. Outside (`x R1ᵀ`): 2·tokens·C² each for the rotation, its dx and dR1.
fn cheaper_outside(out: usize, c: usize, tokens: usize) -> bool {
    3 * tokens * c < out * (tokens + 2 * c)
}
