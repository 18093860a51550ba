//! A layer's weights in the bases of R1, R2 and R4, quantised, on a tape.

use crate::hadamard::Hadamard;
use crate::llama::{Affine, Basis, Block, LayerWeights, Linear, Linears};
use crate::profile::enter;
use crate::quant::{Site, Sites};
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
        Self { linears: Linears(linears), leave: None }
    }

    /// Their values.
    pub fn into_values(self) -> LayerWeights {
        Linears(self.linears.0.map(|l| Affine {
            weight: l.weight.into_value(),
            bias: l.bias.map(Var::into_value),
            norm: l.norm.map(Var::into_value),
        }))
    }

    /// The seven weights in the order of [`Linear::ALL`], the biases and then the gains of norms that there are, then R1 where some
    /// weights were left unrotated.
    pub fn into_vec(self) -> Vec<Var<'t>> {
        let (mut all, mut biases, mut norms) = (vec![], vec![], vec![]);
        for l in self.linears.0 {
            all.push(l.weight);
            biases.extend(l.bias);
            norms.extend(l.norm);
        }
        all.into_iter().chain(biases).chain(norms).chain(self.leave).collect()
    }

    /// Back from [`RotatedWeights::into_vec`], for a layer that has the biases and norms of `like`.
    ///
    /// # Errors
    /// [`Error::Argument`] for another number of values.
    pub fn from_vec(vars: Vec<Var<'t>>, like: &LayerWeights) -> Result<Self> {
        let (got, biases) = (vars.len(), like.iter().filter(|(_, l)| l.bias.is_some()).count());
        let norms = like.iter().filter(|(_, l)| l.norm.is_some()).count();
        let least = 7 + biases + norms;
        if !(least..=least + 1).contains(&got) {
            let message = format!("expected those of seven linears, {biases} biases and {norms} norms (and R1), got {got}");
            return Err(Error::argument("weights", message));
        }
        let mut vars = vars.into_iter();
        let weights = Linears::from_vec(vars.by_ref().take(7).collect())?;
        let biases: Vec<_> = vars.by_ref().take(biases).collect();
        let (mut biases, mut norms) = (biases.into_iter(), vars.by_ref().take(norms).collect::<Vec<_>>().into_iter());
        let linears = weights.each(|linear, weight: &Var<'t>| {
            let bias = like[linear].bias.as_ref().and_then(|_| biases.next());
            let norm = like[linear].norm.as_ref().and_then(|_| norms.next());
            Ok(Affine { weight: weight.clone(), bias, norm })
        })?;
        Ok(Self { linears, leave: vars.next() })
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
        if self.gains().is_some() {
            return Err(Error::argument("rotation", "the gains of this layer's norms are not folded into its weights"));
        }
        let _part = enter("weights");
        let tape = r1.tape();
        let inner = self.weights[Linear::Down].weight.cols();
        let rotations = Rotation { r1, r2, r4: s.online.r4.map(inner)? };
        let out = Linear::at(Site::MlpInput).map(|l| self.weights[l].weight.rows()).sum();
        let leave = !s.weight.is_active() && tokens.is_some_and(|tokens| cheaper_outside(out, r1.value().cols(), tokens));

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
        Ok(RotatedWeights { linears, leave: leave.then(|| r1.clone()) })
    }
}

/// The rotations of one layer.
struct Rotation<'a, 't> {
    r1: &'a Var<'t>,
    r2: &'a Var<'t>,
    r4: Option<Hadamard>,
}

impl<'t> Rotation<'_, 't> {
    /// `Bᵀ W A`, R1's product first; in `f32` at least where that is not the last.
    fn weight(&self, linear: Linear, w: Var<'t>) -> Result<Var<'t>> {
        let row = linear.row();
        let [out, inputs] = [w.value().rows(), w.value().cols()];
        let dtype = w.value().dtype();
        let twice = row.reads == Basis::Values || row.writes == Basis::Values || (row.reads == Basis::Inner && self.r4.is_some());
        let between = if twice { wide(dtype) } else { dtype };
        let w = match row.reads {
            Basis::Stream => w.matmul_as(self.r1.clone(), between)?,
            _ => self.r1.clone().transpose_matmul_as(w, between)?,
        };
        let d = self.r2.value().cols();
        match (row.reads, row.writes, &self.r4) {
            (_, Basis::Values, _) => {
                let heads = w.reshape([out / d, d, inputs])?;
                self.r2.clone().transpose_matmul(heads)?.reshape([out, inputs])
            }
            (Basis::Values, ..) => w.reshape([out * inputs / d, d])?.matmul(self.r2.clone())?.reshape([out, inputs]),
            (Basis::Inner, _, Some(r4)) => w.hadamard_by(r4),
            _ => Ok(w),
        }
    }

    /// `Bᵀ b`, as the rows `bᵀ B`.
    fn bias(&self, linear: Linear, b: Var<'t>) -> Result<Var<'t>> {
        let r = match linear.row().writes {
            Basis::Stream => self.r1,
            Basis::Values => self.r2,
            Basis::Own | Basis::Inner => return Ok(b),
        };
        let (dtype, out, n) = (b.value().dtype(), b.value().len(), r.value().cols());
        b.to_dtype(wide(dtype))?.reshape([out / n, n])?.matmul(r.clone())?.reshape([out])?.to_dtype(dtype)
    }
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
