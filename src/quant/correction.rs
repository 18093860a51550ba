//! What GPTQ may be told of the full-precision network: it makes `Ŵ x̃` near `W x̃`, for the input x̃ that the quantised layers before
//! give, where `W x` was wanted. Every correction is a small matrix made of H and D ([`Moments`](crate::quant::Moments)), or a number.
//!
//! Columns in the order of the sweep; H̃ is the damped H, `H̃⁻¹ = UᵀU` with U upper triangular, `striu` the part strictly above the diagonal.
//!
//! | | the sweep is given | in the sweep, at column j |
//! |---|---|---|
//! | QEP (Arai and Ichikawa 2025, arXiv 2504.09629) | `W + c W D H̃⁻¹` | |
//! | Qronos (Zhang et al. 2025, arXiv 2505.11695) | the W′ that makes `‖W x − W′ x̃‖` small, its first column being what the original others leave for it: `v₀ = w₀ + W D[:, 0] / H[0, 0]` | |
//! | GPTAQ (Li et al. 2025, arXiv 2504.02692) | W | `W[:, j+1..] += w_j P[j, j+1..]`, `P = α striu(D Uᵀ) U` |
//! | FOEM (Zheng et al. 2025, arXiv 2507.11017) | W | `w_j −= β (w_j − w⁰_j)` before it is rounded, and `e = ((w_j − q) − β (w_j − w⁰_j)) / U[j, j]` |
//!
//! w⁰ is the original column. Where D is 0, or the constant, all four are GPTQ.
//!
//! *QEP* leaves down_proj alone. With c = 1 its weight is the unquantised optimum, `W (H̃ + D) H̃⁻¹`.
//!
//! *Qronos* as published rounds v₀ to q₀, then projects: `V = (W (H̃ + D)[:, 1..] − q₀ H[0, 1..]) H̃[1.., 1..]⁻¹`, and sweeps V. That is the sweep of
//! `W′ = W + W C`, `C = D H̃⁻¹ − (D H̃⁻¹ − D / H[0, 0])[:, 0] · U[0, :] / U[0, 0]`: the best weight whose first column is v₀. GPTQ's own step then
//! makes up for q₀ − v₀. The damping is GPTQ's, a part of the mean diagonal, not of the largest eigenvalue.
//!
//! *GPTAQ*: w_j is what the sweep finds at column j, before rounding, kept within the range of its grid, for columns of the block and behind it alike. (The
//! published code uses it as it is inside a block and its rounded value behind, so that the result depends on the block size.)
//!
//! *FOEM*: the first column of a block is pulled back like any other.

use std::fmt;
use std::str::FromStr;

use crate::device::cpu::{self, Strides};
use crate::quant::Site;
use crate::{Error, Result};

/// How GPTQ corrects for the difference between the quantised network's activations and those in full precision.
///
/// Written as its name, with its constant behind a colon where it has one: `gptaq:0.25`. Experimental: on one model of 135M parameters GPTAQ and QEP
/// beat GPTQ on every seed, and Qronos and FOEM lose (`benches/record/weight-quantisers-smollm2-h100.md`). Qronos wants ten to thirty times GPTQ's damping, and
/// then beats it; FOEM wins nothing (`benches/record/weight-quantisers-wiki-llama-15m.md`).
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Correction {
    /// It does not: plain GPTQ.
    #[default]
    None,
    /// GPTAQ, with the strength α.
    Gptaq(f64),
    /// QEP, with the part c of the whole correction.
    Qep(f64),
    /// Qronos.
    Qronos,
    /// FOEM, with the strength β. It looks at weights alone, and needs no D.
    Foem(f64),
}

impl Correction {
    /// All of them, with the constants that their authors use.
    pub const ALL: [Self; 5] = [Self::None, Self::Gptaq(0.25), Self::Qep(0.5), Self::Qronos, Self::Foem(0.2)];

    /// The name of the quantiser that this makes of GPTQ.
    pub fn name(&self) -> &'static str {
        match self {
            Self::None => "gptq",
            Self::Gptaq(_) => "gptaq",
            Self::Qep(_) => "qep",
            Self::Qronos => "qronos",
            Self::Foem(_) => "foem",
        }
    }

    /// Its constant, where it has one.
    pub fn constant(&self) -> Option<f64> {
        match self {
            Self::None | Self::Qronos => None,
            Self::Gptaq(constant) | Self::Qep(constant) | Self::Foem(constant) => Some(*constant),
        }
    }

    /// The same with another constant.
    ///
    /// # Errors
    /// It has none, or the constant is not between 0 and 1.
    pub fn with(&self, constant: f64) -> Result<Self> {
        let made = match self {
            Self::None | Self::Qronos => {
                return Err(Error::argument(self.name(), format!("takes no constant, got {constant}")));
            }
            Self::Gptaq(_) => Self::Gptaq(constant),
            Self::Qep(_) => Self::Qep(constant),
            Self::Foem(_) => Self::Foem(constant),
        };
        made.check()?;
        Ok(made)
    }

    /// Checks the constant.
    ///
    /// # Errors
    /// [`Error::Argument`]: not between 0 and 1.
    pub fn check(&self) -> Result<()> {
        match self.constant() {
            Some(c) if !(0.0..=1.0).contains(&c) => {
                Err(Error::argument(self.name(), format!("expected a constant between 0 and 1, got {c}")))
            }
            _ => Ok(()),
        }
    }

    /// True where it changes nothing: plain GPTQ.
    pub fn is_none(&self) -> bool {
        *self == Self::None || self.constant() == Some(0.0)
    }

    /// True where it needs D for the linears at a site.
    pub fn wants_drift(&self, site: Site) -> bool {
        match self {
            _ if self.is_none() => false,
            Self::Gptaq(_) | Self::Qronos => true,
            Self::Qep(_) => site != Site::DownInput,
            Self::None | Self::Foem(_) => false,
        }
    }

    /// How far FOEM pulls a column back.
    pub(super) fn pull(&self) -> Option<f64> {
        match *self {
            Self::Foem(beta) if beta != 0.0 => Some(beta),
            _ => None,
        }
    }

    /// Its terms on the CPU, from D and U `[n, n]` in the order of the sweep and the first entry of H.
    pub(super) fn terms(&self, drift: &[f64], u: &[f64], first: f64, n: usize) -> Terms<Vec<f64>> {
        let product = |a: &[f64], b: &[f64], transposed: bool| {
            let (mut c, plain) = (vec![0.0; n * n], Strides::new(n, false));
            cpu::gemm((n, n, n), &mut c, plain, 0.0, a, plain, b, Strides::new(n, transposed), 1.0, true);
            c
        };
        let scaled = |mut c: Vec<f64>, factor: f64| {
            c.iter_mut().for_each(|c| *c *= factor);
            c
        };
        if self.is_none() || n == 0 {
            return Terms::NONE;
        }
        match *self {
            Self::None | Self::Foem(_) => Terms::NONE,
            Self::Qep(part) => Terms { target: Some(scaled(product(&product(drift, u, true), u, false), part)), forward: None },
            Self::Qronos => {
                let mut c = product(&product(drift, u, true), u, false);
                for (c, d) in c.chunks_mut(n).zip(drift.chunks(n)) {
                    let left = (c[0] - d[0] / first) / u[0];
                    c.iter_mut().zip(&u[..n]).for_each(|(c, u)| *c -= left * u);
                }
                Terms { target: Some(c), forward: None }
            }
            Self::Gptaq(strength) => {
                let mut m = product(drift, u, true);
                m.chunks_mut(n).enumerate().for_each(|(i, row)| row[..=i].fill(0.0));
                Terms { target: None, forward: Some(scaled(product(&m, u, false), strength)) }
            }
        }
    }
}

/// What a sweep needs of a correction that reads D.
#[derive(Clone, Debug)]
pub(super) struct Terms<M> {
    /// C `[n, n]`: W + W C is swept instead of W.
    pub target: Option<M>,
    /// P `[n, n]`, strictly upper triangular, in the order of the sweep.
    pub forward: Option<M>,
}

impl<M> Terms<M> {
    pub const NONE: Self = Self { target: None, forward: None };
}

impl fmt::Display for Correction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.constant() {
            Some(constant) => f.pad(&format!("{}:{constant}", self.name())),
            None => f.pad(self.name()),
        }
    }
}

impl FromStr for Correction {
    type Err = Error;
    /// ```
    /// use spinquant::quant::Correction;
    /// assert_eq!("gptaq".parse::<Correction>()?, Correction::Gptaq(0.25));
    /// assert_eq!("qep:0.75".parse::<Correction>()?.to_string(), "qep:0.75");
    /// assert!("qronos:1".parse::<Correction>().is_err() && "foem:2".parse::<Correction>().is_err());
    /// # Ok::<(), spinquant::Error>(())
    /// ```
    fn from_str(s: &str) -> Result<Self> {
        let (name, constant) = s.split_once(':').map_or((s, None), |(name, constant)| (name, Some(constant)));
        let known = Self::ALL.into_iter().find(|c| c.name() == name).ok_or_else(|| {
            let names = Self::ALL.map(|c| c.to_string()).join(", ");
            Error::argument("weight quantiser", format!("expected one of {names}, got {s:?}"))
        })?;
        match constant {
            None => Ok(known),
            Some(text) => {
                let number =
                    text.parse::<f64>().map_err(|_| Error::argument(name, format!("expected a number, got {text:?}")))?;
                known.with(number)
            }
        }
    }
}
