//! Which transforms there are, as a list on the command line.

use std::fmt;
use std::str::FromStr;

use super::{Scale, Sizes};
use crate::{Error, Result};

/// The name of an R2 for each key and value head.
const HEADS: &str = "r2-heads";

/// What is learned and leaves the network's function alone, as the command line has it: `published` (R1 and R2), `all` that a model can
/// have, or a list of `r1`, `r2`, `r2-heads` (an R2 for each key and value head) and kinds of scales. R1 and R2 are always learned;
/// `r2-heads` says it of R2.
///
/// ```
/// use spinquant::rotation::{Scale, Transforms};
/// let some: Transforms = "r1,r2,up-down".parse()?;
/// assert_eq!(some, Transforms::new(&[Scale::UpDown]));
/// assert_eq!(some.to_string(), "r1,r2,up-down");
/// assert_eq!("published".parse::<Transforms>()?, Transforms::PUBLISHED);
/// assert_eq!("all".parse::<Transforms>()?, Transforms::ALL);
/// assert!("up-down".parse::<Transforms>().is_err());
/// # Ok::<(), spinquant::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Transforms {
    scales: [bool; Scale::ALL.len()],
    /// An R2 for each key and value head.
    heads: bool,
    /// Those that a model cannot have are left out, where they are an error otherwise.
    where_possible: bool,
}

impl Transforms {
    /// R1 and R2.
    pub const PUBLISHED: Self = Self { scales: [false; Scale::ALL.len()], heads: false, where_possible: false };
    /// All that a model can have.
    pub const ALL: Self = Self { scales: [true; Scale::ALL.len()], heads: true, where_possible: true };

    /// R1, R2 and these scales.
    pub fn new(scales: &[Scale]) -> Self {
        let mut transforms = Self::PUBLISHED;
        scales.iter().for_each(|&kind| transforms.scales[kind as usize] = true);
        transforms
    }

    /// The same with an R2 for each key and value head, or with one a layer.
    pub fn with_heads(self, heads: bool) -> Self {
        Self { heads, ..self }
    }

    /// The same, those left out that a model cannot have.
    pub fn where_possible(self) -> Self {
        Self { where_possible: true, ..self }
    }

    /// Whether each key and value head has an R2 of its own.
    pub fn heads(&self) -> bool {
        self.heads
    }

    /// Whether scales of this kind are among them.
    pub fn has(&self, kind: Scale) -> bool {
        self.scales[kind as usize]
    }

    /// The kinds of scales, in the order of [`Scale::ALL`].
    pub fn scales(&self) -> impl Iterator<Item = Scale> {
        let Self { scales, .. } = *self;
        Scale::ALL.into_iter().filter(move |kind| scales[*kind as usize])
    }

    /// The first of them besides R1 and R2, by name.
    pub fn more(&self) -> Option<&'static str> {
        self.heads.then_some(HEADS).or(self.scales().next().map(Scale::name))
    }

    /// These and others.
    pub fn with(&self, others: &Self) -> Self {
        let scales = Scale::ALL.map(|kind| self.has(kind) || others.has(kind));
        Self { scales, heads: self.heads || others.heads, where_possible: self.where_possible || others.where_possible }
    }

    /// What is among these and among others.
    pub fn both(&self, others: &Self) -> Self {
        let scales = Scale::ALL.map(|kind| self.has(kind) && others.has(kind));
        Self { scales, heads: self.heads && others.heads, where_possible: self.where_possible && others.where_possible }
    }

    /// What they come to for a model: those that it can have, of [`Transforms::ALL`] and others [where possible](Self::where_possible). Where there is one key and value head, one R2 a
    /// layer is one a head.
    ///
    /// # Errors
    /// Names one that was asked for by name and that the model cannot have, and why.
    pub fn of(&self, sizes: &Sizes) -> Result<Self> {
        if !self.where_possible
            && let Some((kind, why)) = self.scales().find_map(|kind| Some((kind, kind.refused(sizes)?)))
        {
            return Err(Error::argument("transforms", format!("expected no {kind}: {why}")));
        }
        let scales = Scale::ALL.map(|kind| self.has(kind) && kind.refused(sizes).is_none());
        Ok(Self { scales, heads: self.heads && sizes.kv_heads > 1, where_possible: false })
    }
}

impl FromStr for Transforms {
    type Err = Error;
    fn from_str(s: &str) -> Result<Self> {
        let list: Vec<&str> = match s {
            "published" => return Ok(Self::PUBLISHED),
            "all" => return Ok(Self::ALL),
            _ => s.split(',').map(str::trim).collect(),
        };
        let kinds = Scale::ALL.map(Scale::name).join(", ");
        let known = |name: &str| ["r1", "r2", HEADS].contains(&name) || name.parse::<Scale>().is_ok();
        if let Some(odd) = list.iter().find(|name| !known(name)) {
            let message = format!("expected published, all, or a list of r1, r2, {HEADS}, {kinds}, got {odd:?}");
            return Err(Error::argument("transforms", message));
        }
        let heads = list.contains(&HEADS);
        if !list.contains(&"r1") || !(list.contains(&"r2") || heads) {
            return Err(Error::argument("transforms", format!("expected r1 and r2 among them, got {s:?}")));
        }
        Ok(Self { scales: Scale::ALL.map(|kind| list.contains(&kind.name())), heads, where_possible: false })
    }
}

impl fmt::Display for Transforms {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if *self == Self::ALL {
            return f.pad("all");
        }
        let names: Vec<&str> =
            ["r1", if self.heads { HEADS } else { "r2" }].into_iter().chain(self.scales().map(Scale::name)).collect();
        f.pad(&names.join(","))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_are_those_that_a_model_can_have() {
        let sizes = Sizes { layers: 2, hidden: 8, intermediate: 12, kv_heads: 2, head_dim: 4, pairs: 2, head_norms: false };
        let normed = Sizes { head_norms: true, ..sizes };
        let names = |t: Transforms| t.to_string();
        let every = Transforms::ALL.of(&sizes).unwrap();
        assert!(
            Scale::ALL.into_iter().all(|kind| every.has(kind))
                && names(every) == "r1,r2-heads,up-down,values,norms,rope-pairs,values-general"
        );
        assert_eq!((names(Transforms::ALL), every.to_string().parse::<Transforms>().unwrap()), ("all".into(), every));
        let fewer = Transforms::ALL.of(&normed).unwrap();
        assert_eq!(names(fewer), "r1,r2-heads,up-down,values,norms,values-general");
        let one = Transforms::ALL.of(&Sizes { kv_heads: 1, ..sizes }).unwrap();
        assert_eq!(names(one), "r1,r2,up-down,values,norms,rope-pairs,values-general");
        // By name it is an error.
        let message = Transforms::new(&[Scale::RopePairs]).of(&normed).unwrap_err().to_string();
        assert!(message.contains("no rope-pairs") && message.contains("norms every head"), "{message}");
        // A start that has it is not excused by `all`.
        assert_eq!(Transforms::PUBLISHED.with(&Transforms::ALL), Transforms::ALL);
        assert_eq!(Transforms::PUBLISHED.more(), None);
        assert_eq!((every.more(), one.more()), (Some("r2-heads"), Some("up-down")));
        assert_eq!("r1,r2,r2-heads".parse::<Transforms>().unwrap(), Transforms::PUBLISHED.with_heads(true));
        assert!("r2-heads".parse::<Transforms>().unwrap_err().to_string().contains("r1 and r2 among them"));
    }
}
