//! Where rotations come from: a kind by name, or a file.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use super::{RotationFile, Rotations};
use crate::{Error, Result};

/// Rotations to use or to start learning from.
///
/// ```
/// use spinquant::rotation::Start;
/// let start: Start = "hadamard:7".parse()?;
/// assert_eq!((&start, start.seed()), (&Start::Hadamard(7), Some(7)));
/// assert_eq!("hadamard".parse::<Start>()?, Start::Hadamard(0));
/// assert_eq!("R.safetensors".parse::<Start>()?, Start::File("R.safetensors".into()));
/// let rotations = start.open(64, 16, 2)?.expect("not `none`").rotations;
/// assert_eq!((rotations.hidden(), rotations.head_dim(), rotations.layers()), (64, 16, 2));
/// # Ok::<(), spinquant::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Start {
    /// No rotations: the network as its files have it, R4 left out.
    None,
    /// Identity matrices.
    Identity,
    /// [`Rotations::random_hadamard`] of this seed.
    Hadamard(u64),
    /// [`Rotations::random_block_hadamard`] of this seed, in blocks of [`Start::BLOCK_WIDTH`].
    BlockHadamard(u64),
    /// [`Rotations::random_orthogonal`] of this seed.
    Orthogonal(u64),
    /// A file: see [`RotationFile::read`].
    File(PathBuf),
}

/// A kind of rotations that has a name.
#[derive(Clone, Copy, Debug)]
pub struct Kind {
    /// What it is called on the command line.
    pub name: &'static str,
    /// True where `NAME:SEED` names a seed; `NAME` alone is seed 0.
    pub seeded: bool,
    /// One line about it.
    pub help: &'static str,
    with: fn(u64) -> Start,
}

const KINDS: [Kind; 5] = [
    Kind { name: "none", seeded: false, help: "no rotations, and no R4", with: |_| Start::None },
    Kind { name: "identity", seeded: false, help: "identity matrices", with: |_| Start::Identity },
    Kind { name: "hadamard", seeded: true, help: "random Hadamard matrices", with: Start::Hadamard },
    Kind {
        name: "block-hadamard",
        seeded: true,
        help: "random Hadamard matrices in blocks of 32 along R1's diagonal",
        with: Start::BlockHadamard,
    },
    Kind { name: "orthogonal", seeded: true, help: "uniformly random orthogonal matrices", with: Start::Orthogonal },
];

impl Kind {
    /// How it is written: `hadamard[:SEED]`.
    pub fn usage(&self) -> String {
        format!("{}{}", self.name, if self.seeded { "[:SEED]" } else { "" })
    }
}

impl Start {
    /// Channels of a block of [`Start::BlockHadamard`]: the width of the blocks of the microscaling formats.
    pub const BLOCK_WIDTH: usize = 32;

    /// Every kind that has a name, in the order of help texts.
    pub fn all() -> &'static [Kind] {
        &KINDS
    }

    /// All that can be written, in one line: every kind but those of `without`, and a file.
    pub fn usage(without: &[&str]) -> String {
        let kinds: Vec<String> = KINDS.iter().filter(|k| !without.contains(&k.name)).map(Kind::usage).collect();
        format!("{}, or a file of rotations (safetensors or R.bin)", kinds.join(", "))
    }

    /// The seed, where there is one.
    pub fn seed(&self) -> Option<u64> {
        match self {
            Self::Hadamard(seed) | Self::BlockHadamard(seed) | Self::Orthogonal(seed) => Some(*seed),
            Self::None | Self::Identity | Self::File(_) => None,
        }
    }

    /// Makes or reads the rotations of a model with hidden size C, heads of D and L layers; `None` for [`Start::None`].
    ///
    /// # Errors
    /// Sizes that the kind cannot make; whatever [`RotationFile::read`] and [`RotationFile::check`] refuse; a file that does not
    /// exist and whose name looks like a kind's: lists the kinds.
    pub fn open(&self, hidden: usize, head_dim: usize, layers: usize) -> Result<Option<RotationFile>> {
        let rotations = match self {
            Self::None => return Ok(None),
            Self::Identity => Rotations::identity(hidden, head_dim, layers)?,
            Self::Hadamard(seed) => Rotations::random_hadamard(hidden, head_dim, layers, *seed)?,
            Self::BlockHadamard(seed) => Rotations::random_block_hadamard(hidden, head_dim, layers, Self::BLOCK_WIDTH, *seed)?,
            Self::Orthogonal(seed) => Rotations::random_orthogonal(hidden, head_dim, layers, *seed)?,
            Self::File(path) => {
                if path.extension().is_none() && path.components().count() == 1 && !path.exists() {
                    let message = format!("expected {}; there is no file {:?}", Self::usage(&[]), path.display());
                    return Err(Error::argument("rotations", message));
                }
                let file = RotationFile::read(path)?;
                file.check(hidden, head_dim, layers)?;
                return Ok(Some(file));
            }
        };
        Ok(Some(RotationFile::new(rotations).with_note("start", self)))
    }
}

impl FromStr for Start {
    type Err = Error;
    fn from_str(s: &str) -> Result<Self> {
        let (name, seed) = s.split_once(':').map_or((s, None), |(name, seed)| (name, Some(seed)));
        let Some(kind) = KINDS.iter().find(|k| k.name == name) else { return Ok(Self::File(s.into())) };
        match seed {
            None => Ok((kind.with)(0)),
            Some(_) if !kind.seeded => Err(Error::argument("rotations", format!("{name} has no seed, got {s:?}"))),
            Some(seed) => seed
                .parse()
                .map(kind.with)
                .map_err(|_| Error::argument("rotations", format!("expected a number after the colon, got {seed:?}"))),
        }
    }
}

impl fmt::Display for Start {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = match self {
            Self::None => "none".into(),
            Self::Identity => "identity".into(),
            Self::Hadamard(seed) => format!("hadamard:{seed}"),
            Self::BlockHadamard(seed) => format!("block-hadamard:{seed}"),
            Self::Orthogonal(seed) => format!("orthogonal:{seed}"),
            Self::File(path) => path.display().to_string(),
        };
        f.pad(&text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_is_read_printed_and_made() {
        for kind in Start::all() {
            let start: Start = kind.name.parse().unwrap();
            assert_eq!(start.to_string().parse::<Start>().unwrap(), start);
            assert_eq!(start.seed(), kind.seeded.then_some(0), "{}", kind.name);
            let made = start.open(64, 32, 2).unwrap();
            assert_eq!(made.is_none(), kind.name == "none");
            if let Some(file) = made {
                file.rotations.check(64, 32, 2, 1e-12).unwrap();
                assert_eq!(file.notes["start"], start.to_string());
            }
            assert!(Start::usage(&[]).contains(&kind.usage()) && !kind.help.is_empty());
            let seed = format!("{}:3", kind.name).parse::<Start>();
            assert_eq!(seed.is_ok(), kind.seeded);
            assert_eq!(seed.ok().and_then(|s| s.seed()), kind.seeded.then_some(3));
        }
        assert!(!Start::usage(&["none"]).contains("none"));
    }

    #[test]
    fn mistakes_are_named() {
        let says = |result: Result<Option<RotationFile>>, part: &str| {
            let message = result.map(drop).unwrap_err().to_string();
            assert!(message.contains(part), "{message}");
        };
        assert!("hadamard:x".parse::<Start>().unwrap_err().to_string().contains("number after the colon, got \"x\""));
        assert!("none:1".parse::<Start>().unwrap_err().to_string().contains("none has no seed"));
        says("hadamrd".parse::<Start>().unwrap().open(64, 32, 2), "block-hadamard[:SEED]");
        says("absent.safetensors".parse::<Start>().unwrap().open(64, 32, 2), "absent.safetensors: No such file");
        says(Start::BlockHadamard(0).open(40, 8, 1), "expected a divisor of 40");
    }
}
