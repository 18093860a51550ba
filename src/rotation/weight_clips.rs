//! Learned clip ratios of weights, one for every row of every linear: like those of activations they cost nothing while a network runs, for
//! only scales differ, and change its function.

use super::ClipEnds;
use crate::quant::Scheme;
use crate::{Error, Result, Tensor};

/// The clip ratios of the weights of every layer: their logarithms, `[L, kinds, 2]` a linear, where `kinds` counts its rows, or the groups of
/// all its rows one row behind the other. A row (or group) that spans [lo, hi] gets a grid over `[e^a₀ lo, e^a₁ hi]`; a symmetric grid covers
/// `e^a₁ max|w|`, and its a₀ stay as they began. They stand in place of the rule that the scheme has for weights
/// ([`Scheme::weight_clip`]), for the grid that they were learned for alone.
#[derive(Clone, Debug)]
pub struct WeightClips {
    grid: String,
    linears: [Tensor; Self::NAMES.len()],
}

impl WeightClips {
    /// The linears of a layer, in the order in which they run: that of [`Linear::ALL`](crate::llama::Linear::ALL).
    pub const NAMES: [&'static str; 7] = ["q", "k", "v", "o", "gate", "up", "down"];

    /// Logarithms `[L, kinds, 2]` of every linear, for a grid that [`Scheme::weight_grid_name`] names.
    pub fn new(grid: impl Into<String>, linears: [Tensor; Self::NAMES.len()]) -> Self {
        Self { grid: grid.into(), linears }
    }

    /// Those that `take` has under their names in files; none where it has none.
    ///
    /// # Errors
    /// Those of `take`; [`Error::Argument`] where it has some and not all, or no grid: names what is missing.
    pub(crate) fn take(grid: Option<&str>, mut take: impl FnMut(&str) -> Result<Option<Tensor>>) -> Result<Option<Self>> {
        let mut linears = vec![];
        for name in Self::NAMES.map(file_name) {
            linears.push((take(&name)?, name));
        }
        if linears.iter().all(|(t, _)| t.is_none()) {
            return Ok(None);
        }
        let missing =
            |name: &str| Error::argument("clip ratios of weights", format!("expected those of all linears, got no {name}"));
        let all = linears.into_iter().map(|(t, name)| t.ok_or_else(|| missing(&name))).collect::<Result<Vec<_>>>()?;
        let linears = all.try_into().expect("one for every name");
        let grid =
            grid.ok_or_else(|| Error::argument("clip ratios of weights", "expected what grid they are for, got nothing"))?;
        Ok(Some(Self::new(grid, linears)))
    }

    /// What grid they are for, as [`Scheme::weight_grid_name`] has it.
    pub fn grid(&self) -> &str {
        &self.grid
    }

    /// Those of a linear `[L, kinds, 2]`, by its place in [`WeightClips::NAMES`].
    pub fn get(&self, linear: usize) -> Option<&Tensor> {
        self.linears.get(linear)
    }

    /// Every linear's name and logarithms, in order.
    pub fn iter(&self) -> impl Iterator<Item = (&'static str, &Tensor)> {
        Self::NAMES.into_iter().zip(&self.linears)
    }

    /// Every linear's name in files and logarithms, in order.
    pub(crate) fn tensors(&self) -> impl Iterator<Item = (String, &Tensor)> {
        self.iter().map(|(name, t)| (file_name(name), t))
    }

    /// What `f` makes of each.
    ///
    /// # Errors
    /// The first of `f`.
    pub fn map(&self, mut f: impl FnMut(&Tensor) -> Result<Tensor>) -> Result<Self> {
        let linears = self.linears.iter().map(&mut f).collect::<Result<Vec<_>>>()?;
        Ok(Self::new(&self.grid, linears.try_into().expect("one for every name")))
    }

    /// What `f` makes of each and that of another.
    ///
    /// # Errors
    /// The first of `f`.
    pub fn with_each(&self, other: &Self, f: impl Fn(&Tensor, &Tensor) -> Result<Tensor>) -> Result<Self> {
        let mut others = other.linears.iter();
        self.map(|t| f(t, others.next().expect("one for every name")))
    }

    /// Fails where a scheme's weights have another grid than these are for.
    ///
    /// # Errors
    /// [`Error::Argument`] names both.
    pub fn check_grid(&self, scheme: &Scheme) -> Result<()> {
        let grid = scheme.weight_grid_name();
        if self.grid == grid {
            return Ok(());
        }
        let message = format!(
            "the rotations' were learned for {}, and these weights are {grid}: quantise them so, or leave the ratios out \
             (--no-clip-search; to learn on, --weight-clip search)",
            self.grid
        );
        Err(Error::argument("clip ratios of weights", message))
    }

    /// Checks that they are those of a model with so many layers, are finite, and neither far above 1 nor near 0. How many rows a linear has
    /// is checked where they meet its weight.
    ///
    /// # Errors
    /// Names the linear, what was expected and what came.
    pub fn check(&self, layers: usize) -> Result<()> {
        for (name, t) in self.tensors() {
            match *t.shape() {
                [l, kinds, 2] if l == layers && (kinds > 0 || l == 0) => {}
                _ => return Err(Error::shape(name, format!("[{layers}, rows, 2] for this model"), t.shape())),
            }
            ClipEnds::check_range(&name, t)?;
        }
        Ok(())
    }
}

/// The name of a linear's ratios in files.
fn file_name(linear: &str) -> String {
    format!("weight_clips.{linear}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(layers: usize, value: f64) -> WeightClips {
        let linear = |rows: usize| Tensor::from_vec(vec![value; layers * rows * 2], [layers, rows, 2]).unwrap();
        WeightClips::new("W4 symmetric", [4, 2, 2, 4, 6, 6, 4].map(linear))
    }

    #[test]
    fn they_are_for_one_grid() {
        let clips = of(2, -0.1);
        clips.check(2).unwrap();
        clips.check_grid(&Scheme::new(4, 8, 16)).unwrap();
        let group = |group| Scheme { weight_group: Some(group), ..Scheme::new(4, 4, 4) };
        for other in [Scheme::new(3, 4, 4), group(8), Scheme { symmetric_weights: false, ..Scheme::new(4, 4, 4) }] {
            let message = clips.check_grid(&other).unwrap_err().to_string();
            assert!(message.contains("for W4 symmetric,") && message.contains(&other.weight_grid_name()), "{message}");
        }
        let message = clips.check(3).unwrap_err().to_string();
        assert!(message.contains("weight_clips.q") && message.contains("[3, rows, 2]"), "{message}");
        for odd in [f64::NAN, 1.0, -5.0] {
            assert!(of(1, odd).check(1).unwrap_err().to_string().contains("from -4.7 to 0.7"));
        }
    }

    #[test]
    fn files_have_all_or_none() {
        let clips = of(1, -0.2);
        let named = |without: &'static str| {
            let clips = clips.clone();
            move |name: &str| Ok(clips.tensors().find(|(n, _)| n == name && n != without).map(|(_, t)| t.clone()))
        };
        let back = WeightClips::take(Some("W4 symmetric"), named("")).unwrap().unwrap();
        assert_eq!(back.get(4).unwrap().shape(), [1, 6, 2]);
        assert!(WeightClips::take(None, |_| Ok(None)).unwrap().is_none());
        let message = WeightClips::take(Some("W4 symmetric"), named("weight_clips.o")).unwrap_err().to_string();
        assert!(message.contains("no weight_clips.o"), "{message}");
        assert!(WeightClips::take(None, named("")).unwrap_err().to_string().contains("what grid"));
    }
}
