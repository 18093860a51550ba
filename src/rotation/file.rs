//! A file of rotations: the matrices, the clip ratios that were found for them, and notes.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use super::{ClipEnds, Rotations, TOLERANCE, Transforms};
use crate::hadamard::Hadamard;
use crate::quant::{ClipRatios, Online, Scheme};
use crate::{Error, Result};

/// Clip ratios of activations, K and V, and what they were found for.
#[derive(Clone, Debug, PartialEq)]
pub struct FileClips {
    /// The ratios.
    pub ratios: ClipRatios,
    /// [`Scheme::activation_bits_name`] of the scheme that they were found for: the best ratio depends on the number of levels.
    pub bits: String,
}

/// What a rotation file holds. It is read once, and its faults are told with its path.
///
/// ```
/// use spinquant::quant::{ClipRatios, Scheme};
/// use spinquant::rotation::{RotationFile, Start};
/// let (folder, scheme) = (tempfile::tempdir().unwrap(), Scheme { activation_clip: ClipRatios::uniform(0.9)?, ..Scheme::new(4, 4, 4) });
/// let path = folder.path().join("R.safetensors");
/// Start::Hadamard(0).open(64, 16, 2)?.expect("not `none`").with_clips_of(&scheme).with_note("steps", 100).write(&path)?;
/// let file = RotationFile::read(&path)?;
/// file.check(64, 16, 2)?;
/// assert_eq!(file.clips_for(&scheme), Some(scheme.activation_clip));
/// assert_eq!(file.clips_for(&Scheme::new(4, 8, 8)), None); // other bits ask for other ratios
/// assert_eq!(file.notes["steps"], "100");
/// # Ok::<(), spinquant::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct RotationFile {
    /// R1 and R2.
    pub rotations: Rotations,
    /// The clip ratios that belong to them, where some were searched; of sites with learned clip constants, those they began with.
    pub clips: Option<FileClips>,
    /// Other strings by name: scheme, steps, seed, optimiser.
    pub notes: BTreeMap<String, String>,
    path: Option<PathBuf>,
}

/// The names that the ratios and their bits have in the file.
const RATIOS: &str = "activation_clip";
const BITS: &str = "activation_clip_for";
/// Those of the online rotations that R1 and R2 were made for, and of the two maps as [`Hadamard`] displays them.
const ONLINE: &str = "online";
const MAPS: [&str; 2] = ["r3", "r4"];

impl RotationFile {
    /// Rotations alone.
    pub fn new(rotations: Rotations) -> Self {
        Self { rotations, clips: None, notes: BTreeMap::new(), path: None }
    }

    /// The same with one more note.
    pub fn with_note(mut self, name: &str, value: impl fmt::Display) -> Self {
        self.notes.insert(name.to_string(), value.to_string());
        self
    }

    /// The same with a scheme's clip ratios, which are for its bits.
    pub fn with_clips_of(mut self, scheme: &Scheme) -> Self {
        self.clips = Some(FileClips { ratios: scheme.activation_clip, bits: scheme.activation_bits_name() });
        self
    }

    /// The same with the online rotations that these were made for, in a network with heads of `head_dim` and rows of `width` at
    /// down's input. What Hadamards they are is recorded too: more may become known.
    ///
    /// # Errors
    /// Blocks of R4 that do not divide the width.
    pub fn with_online(mut self, online: Online, head_dim: usize, width: usize) -> Result<Self> {
        MAPS.iter().for_each(|name| drop(self.notes.remove(*name)));
        for (name, map) in MAPS.into_iter().zip(maps(online, head_dim, width)?) {
            self.notes.extend(map.map(|map| (name.to_string(), map.to_string())));
        }
        Ok(self.with_note(ONLINE, online))
    }

    /// The online rotations that those of the file were made for, in a network with heads of `head_dim` and rows of `width` at down's
    /// input; `None` where it does not say. A file that records no map means the one that there was before files did.
    ///
    /// # Errors
    /// [`Error::Format`] for what is no online rotation or fits no such network, and for a map that this version makes otherwise.
    pub fn online(&self, head_dim: usize, width: usize) -> Result<Option<Online>> {
        let Some(path) = &self.path else { return Ok(None) };
        let bad = |e: Error| Error::format(path, e);
        let said = self.notes.get(ONLINE).map(|online| online.parse::<Online>()).transpose().map_err(bad)?;
        let mut online = said.unwrap_or(Online::BOTH);
        if MAPS.iter().any(|name| self.notes.contains_key(*name)) {
            for (name, map) in MAPS.into_iter().zip(maps(online, head_dim, width).map_err(bad)?) {
                let (now, was) = (map.map(|map| map.to_string()), self.notes.get(name));
                if now.as_ref() != was {
                    let or_none = |map: Option<&String>| map.map_or("none", String::as_str).to_string();
                    let message = format!("made for {name} as {}, which is {} here", or_none(was), or_none(now.as_ref()));
                    return Err(Error::format(path, message));
                }
            }
            return Ok(said);
        }
        online.r4 = online.r4.unrecorded(width)?;
        online.r4.map(width).map_err(bad)?;
        Ok(said.map(|_| online).or((online != Online::BOTH).then_some(online)))
    }

    /// Where it was read from.
    pub fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }

    /// The file's clip ratios, where they are for the bits of `scheme`.
    pub fn clips_for(&self, scheme: &Scheme) -> Option<ClipRatios> {
        self.clips.as_ref().filter(|clips| clips.bits == scheme.activation_bits_name()).map(|clips| clips.ratios)
    }

    /// What the file holds, for a network of this scheme: clip constants that were learned are for its bits or for none.
    pub fn rotations_for(&self, scheme: &Scheme) -> Rotations {
        let fits = self.clips_for(scheme).is_some();
        if fits { self.rotations.clone() } else { self.rotations.clone().with_clips(ClipEnds::default()) }
    }

    /// Reads our safetensors or the published code's `R.bin`, told apart by what is in the file. An `R.bin` has neither clip ratios
    /// nor notes.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Format`] for another kind of file, for matrices that are not square or hold NaN or infinite values, and
    /// for clip ratios that are none. Orthogonality is for [`RotationFile::check`] to judge.
    pub fn read(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        if is_zip(path)? {
            return Ok(Self { path: Some(path.into()), ..Self::new(Rotations::read_torch(path)?) });
        }
        let (rotations, mut notes) = Rotations::load_with(path)?;
        let bits = notes.remove(BITS);
        let clips = match notes.remove(RATIOS) {
            None => None,
            Some(ratios) => {
                let ratios = ratios.parse().map_err(|e| Error::format(path, format!("{RATIOS}: {e}")))?;
                Some(FileClips { ratios, bits: bits.unwrap_or_else(|| "another scheme".into()) })
            }
        };
        Rotations::OWN_NOTES.iter().for_each(|name| drop(notes.remove(*name)));
        Ok(Self { rotations, clips, notes, path: Some(path.into()) })
    }

    /// Checks that the rotations fit a model with hidden size C, heads of D and L layers, and that each is orthogonal within
    /// [`TOLERANCE`].
    ///
    /// # Errors
    /// [`Error::Format`] with the path, the first matrix that does not fit, what was expected and what came.
    pub fn check(&self, hidden: usize, head_dim: usize, layers: usize) -> Result<()> {
        self.rotations.check(hidden, head_dim, layers, TOLERANCE).map_err(|e| match &self.path {
            Some(path) => Error::format(path, e),
            None => e,
        })
    }

    /// Writes the file, whole or not at all: an `R.bin` where the name ends in `.bin` or `.pt`, else safetensors.
    ///
    /// # Errors
    /// [`Error::Io`]; clip ratios or more than R1 and one R2 a layer, which an `R.bin` cannot hold.
    pub fn write(&self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        if Self::is_torch_name(path) {
            if self.clips.is_some() || !self.rotations.clips.is_empty() {
                Self::check_holds_clips(path)?;
            }
            if self.rotations.weight_clips.is_some() {
                Self::check_holds_weight_clips(path)?;
            }
            Self::check_holds(path, &self.rotations.transforms())?;
            return self.rotations.save_torch(path);
        }
        let mut notes = self.notes.clone();
        if let Some(clips) = &self.clips {
            notes.extend([(RATIOS.to_string(), clips.ratios.to_string()), (BITS.to_string(), clips.bits.clone())]);
        }
        self.rotations.save_with(path, &notes)
    }

    /// Checks that a file of this name can hold clip ratios: a program may do so before it searches some.
    ///
    /// # Errors
    /// [`Error::Format`] where [`RotationFile::write`] writes an `R.bin`.
    pub fn check_holds_clips(path: &Path) -> Result<()> {
        if Self::is_torch_name(path) {
            let message = "an R.bin cannot hold clip ratios: give it a name in .safetensors, or search none (--clip none)";
            return Err(Error::format(path, message));
        }
        Ok(())
    }

    /// The same for clip ratios of weights: before they are learned.
    ///
    /// # Errors
    /// [`Error::Format`] where [`RotationFile::write`] writes an `R.bin`.
    pub fn check_holds_weight_clips(path: &Path) -> Result<()> {
        if Self::is_torch_name(path) {
            let message = "an R.bin cannot hold clip ratios of weights: give it a name in .safetensors, or learn none \
                           (--weight-clip search)";
            return Err(Error::format(path, message));
        }
        Ok(())
    }

    /// The same for transforms: before they are learned.
    ///
    /// # Errors
    /// [`Error::Format`] where [`RotationFile::write`] writes an `R.bin` and there is more than R1 and one R2 a layer: names it.
    pub fn check_holds(path: &Path, transforms: &Transforms) -> Result<()> {
        if let Some(more) = transforms.more().filter(|_| Self::is_torch_name(path)) {
            let message = format!(
                "an R.bin holds R1 and R2 only, one a layer, and no {more}: give it a name in .safetensors, or learn no more \
                 (--recipe published)"
            );
            return Err(Error::format(path, message));
        }
        Ok(())
    }

    /// True where [`RotationFile::write`] writes an `R.bin`.
    pub fn is_torch_name(path: &Path) -> bool {
        path.extension().is_some_and(|e| e == "bin" || e == "pt")
    }
}

/// R3 and R4 where they run.
fn maps(online: Online, head_dim: usize, width: usize) -> Result<[Option<Hadamard>; 2]> {
    Ok([if online.r3 { Some(Hadamard::new(head_dim)?) } else { None }, online.r4.map(width)?])
}

/// True of a file that begins like a zip archive, as `torch.save` writes.
fn is_zip(path: &Path) -> Result<bool> {
    let mut start = vec![];
    File::open(path).and_then(|file| file.take(4).read_to_end(&mut start)).map_err(Error::io(path))?;
    Ok(start == b"PK\x03\x04")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::R4;
    use crate::rotation::Start;

    #[test]
    fn both_formats_by_content() {
        let folder = tempfile::tempdir().unwrap();
        let file = Start::Hadamard(3).open(24, 8, 2).unwrap().unwrap();
        for name in ["R.bin", "R.pt", "R.safetensors", "R"] {
            let path = folder.path().join(name);
            file.write(&path).unwrap();
            // The name says what is written, the content what is read.
            let moved = folder.path().join("moved.dat");
            std::fs::rename(&path, &moved).unwrap();
            let back = RotationFile::read(&moved).unwrap();
            back.check(24, 8, 2).unwrap();
            let bits = |r: &Rotations| r.r1.to_f64_vec().unwrap();
            assert_eq!(bits(&back.rotations), bits(&file.rotations), "{name}");
            assert_eq!(
                back.notes.get("start").map(String::as_str),
                (!name.contains('.') || name.ends_with('s')).then_some("hadamard:3")
            );
            let message = back.check(28, 8, 2).unwrap_err().to_string();
            assert!(message.contains("moved.dat") && message.contains("[28, 28]"), "{message}");
        }
        let message = file.with_clips_of(&Scheme::new(4, 4, 4)).write(folder.path().join("R.bin")).unwrap_err().to_string();
        assert!(message.contains("R.bin") && message.contains("clip ratios"), "{message}");
    }

    #[test]
    fn online_rotations_and_their_maps() {
        let folder = tempfile::tempdir().unwrap();
        let (path, rotations) = (folder.path().join("R.safetensors"), Rotations::identity(8, 8, 1).unwrap());
        let of = |file: RotationFile, width| {
            file.write(&path).unwrap();
            RotationFile::read(&path).unwrap().online(8, width).map_err(|e| e.to_string())
        };
        let file = || RotationFile::new(rotations.clone());
        let (whole, blocks) = (Online::BOTH, |size| Online { r3: true, r4: R4::Blocks(size) });
        for (online, width) in [(whole, 29568), (blocks(128), 29568), (Online::NONE, 29568), (whole, 11008)] {
            let written = file().with_online(online, 8, width).unwrap();
            assert_eq!(of(written.clone(), width).unwrap(), Some(online), "{:?}", written.notes);
        }
        // Before maps were recorded, the whole rows of some widths had blocks.
        let old = |online: &str| file().with_note(ONLINE, online);
        assert_eq!(of(old("r3,r4"), 29568).unwrap(), Some(blocks(4224)));
        assert_eq!(of(old("r3,r4"), 11008).unwrap(), Some(whole));
        assert_eq!(of(old("none"), 29568).unwrap(), Some(Online::NONE));
        assert_eq!(of(file(), 29568).unwrap(), Some(blocks(4224)));
        assert_eq!(of(file(), 11008).unwrap(), None);
        // What was not read from a file was made for whatever it is used with.
        assert_eq!(file().with_online(whole, 8, 11008).unwrap().online(8, 29568).unwrap(), None);
        // Another model's, another version's, nobody's.
        for (file, width, wanted) in [
            (file().with_online(blocks(128), 8, 29568).unwrap(), 8 * 11, &["R.safetensors", "divisor of 88", "128"][..]),
            (file().with_online(whole, 8, 29568).unwrap(), 11008, &["R.safetensors", "r4 as 924*32, Paley II", "172*64"]),
            (
                file().with_online(whole, 8, 64).unwrap().with_note("r4", "2 blocks of 32"),
                64,
                &["as 2 blocks of 32", "64, Sylvester"],
            ),
            (old("r7"), 64, &["R.safetensors", "got \"r7\""]),
        ] {
            let message = of(file, width).unwrap_err();
            assert!(wanted.iter().all(|part| message.contains(part)), "{message}");
        }
    }

    #[test]
    fn clip_ratios_that_are_none() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("R.safetensors");
        let rotations = Rotations::identity(8, 8, 1).unwrap();
        rotations.save_with(&path, &[(RATIOS.to_string(), "2".to_string())].into()).unwrap();
        let message = RotationFile::read(&path).unwrap_err().to_string();
        assert!(
            message.contains("R.safetensors") && message.contains("activation_clip") && message.contains("got 2"),
            "{message}"
        );
        rotations.save_with(&path, &[(RATIOS.to_string(), "0.9".to_string())].into()).unwrap();
        // Ratios for nobody knows which bits are used for none.
        assert_eq!(RotationFile::read(&path).unwrap().clips_for(&Scheme::new(4, 4, 4)), None);
    }
}
