//! Where an output folder goes: the folder it is made in, and how that takes its place in one step, or in steps that a later run finishes.

use std::fs::{self, File, TryLockError};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use super::{COPIED, Output, README, RECORD, write_text};
use crate::{Error, Result, io};

/// What must agree for a run to continue.
pub(super) const RUN: &str = "run.json";
/// There once files are being moved into a folder that cannot be renamed.
const PUBLISHING: &str = "publishing";
const LOCK: &str = "lock";
/// The unfinished output in a folder that cannot be renamed.
const INSIDE: &str = ".spinquant.partial";
const CONFIG: &str = "config.json";

/// A folder to be written, and the unfinished output beside it or in it.
#[derive(Debug)]
pub(super) struct Place {
    /// With links followed.
    dir: PathBuf,
    /// `.NAME.partial` beside it; [`INSIDE`] it where it is a mount point or its parent cannot be written.
    pub partial: PathBuf,
    _lock: File,
}

impl Place {
    /// Finds the folder's place, tries what will be needed to publish it, and locks it.
    ///
    /// # Errors
    /// A folder that must not be replaced; another process that writes it; whatever the file system says.
    pub fn open(output: &Output<'_>) -> Result<Self> {
        let dir = real(output.dir)?;
        if dir.exists() && !dir.is_dir() {
            return Err(Error::format(output.dir, "expected a folder, or a name that is free; got a file"));
        }
        let inside = dir.join(INSIDE);
        let name = dir.file_name().map(|name| format!(".{}.partial", name.to_string_lossy()));
        let beside = name.map(|name| dir.with_file_name(name)).filter(|_| !inside.exists() && !io::is_mount_point(&dir));
        let partial = match beside.map(|path| (fs::create_dir_all(&path), path)) {
            Some((Ok(()), path)) => path,
            Some((Err(e), path)) if !dir.is_dir() => return Err(Error::io(&path)(e)),
            _ => inside,
        };
        // Another run may have finished, and removed the lock, just before it was taken here.
        let lock = loop {
            fs::create_dir_all(&partial).map_err(Error::io(&partial))?;
            let path = partial.join(LOCK);
            let lock = File::create(&path).map_err(Error::io(&path))?;
            match lock.try_lock() {
                Ok(()) if path.exists() => break lock,
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => return Err(Error::format(&partial, "another process is writing this output")),
                Err(TryLockError::Error(e)) => return Err(Error::io(&path)(e)),
            }
        };
        let place = Self { dir, partial, _lock: lock };
        if let Err(e) = place.check(output).and_then(|()| place.try_rename()) {
            place.leave();
            return Err(e);
        }
        Ok(place)
    }

    /// Removes what [`Place::open`] made, if nothing else is in it.
    fn leave(&self) {
        if fs::read_dir(&self.partial).is_ok_and(|entries| entries.count() == 1) {
            let _ = fs::remove_file(self.partial.join(LOCK));
            let _ = fs::remove_dir(&self.partial);
        }
    }

    /// Fails where the folder is not free: not empty without `overwrite`; with it, where it is or holds something that the run reads, or
    /// holds anything that was not written here.
    ///
    /// # Errors
    /// Says what is in the way.
    pub fn check(&self, output: &Output<'_>) -> Result<()> {
        let bad = |message: String| Err(Error::format(output.dir, message));
        let entries = match fs::read_dir(&self.dir) {
            Ok(entries) => entries,
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
            Err(e) => return Err(Error::io(output.dir)(e)),
        };
        let mut names = vec![];
        for entry in entries {
            let name = entry.map_err(Error::io(output.dir))?.file_name().to_string_lossy().into_owned();
            if ![INSIDE, "lost+found"].contains(&&*name) {
                names.push(name);
            }
        }
        if names.is_empty() {
            return Ok(());
        }
        let unfinished = self.partial.join(PUBLISHING).exists();
        if !output.overwrite && !unfinished {
            return bad("the output folder is not empty; choose another or overwrite it".into());
        }
        for input in output.source.into_iter().chain(output.inputs.iter().map(PathBuf::as_path)) {
            if input.canonicalize().is_ok_and(|input| input.starts_with(&self.dir)) {
                return bad(format!("the output would replace {}, which this run reads; choose another folder", input.display()));
            }
        }
        if let Some(other) = names.iter().find(|name| !is_ours(name) || self.dir.join(name).is_dir()) {
            return bad(format!(
                "holds {other}, which spinquant did not write; choose another folder, or empty this one yourself"
            ));
        }
        if !unfinished && !names.iter().any(|name| name == RECORD) {
            return bad(format!(
                "holds no {RECORD}, so spinquant did not write it; choose another folder, or empty this one yourself"
            ));
        }
        Ok(())
    }

    /// Moves an empty folder to where the output will go, and away again.
    fn try_rename(&self) -> Result<()> {
        if self.dir.exists() {
            return Ok(()); // it will be exchanged, or filled
        }
        let probe = self.partial.join("probe");
        fs::create_dir_all(&probe).map_err(Error::io(&probe))?;
        fs::rename(&probe, &self.dir).and_then(|()| fs::remove_dir(&self.dir)).map_err(Error::io(&self.dir))
    }

    /// Removes everything but the lock: the files of another run.
    pub fn clear(&self) -> Result<()> {
        let mut last = vec![];
        for entry in fs::read_dir(&self.partial).map_err(Error::io(&self.partial))? {
            let entry = entry.map_err(Error::io(&self.partial))?;
            match entry.file_name().to_str() {
                Some(LOCK) => {}
                // As long as this says whose the others are, they can be continued.
                Some(RUN) => last.push(entry.path()),
                _ => remove(&entry.path())?,
            }
        }
        last.iter().try_for_each(|path| remove(path))
    }

    /// Moves the finished folder into place and removes the unfinished one.
    ///
    /// # Errors
    /// A folder that is no longer free; whatever the file system says. A later run goes on from there.
    pub fn publish(&self, done: &Path, output: &Output<'_>) -> Result<()> {
        self.check(output)?;
        io::sync_folder(done).map_err(Error::io(done))?;
        if !self.partial.starts_with(&self.dir) && self.swap(done).is_ok() {
            io::sync_folder(io::folder_of(&self.dir)).map_err(Error::io(&self.dir))?;
        } else {
            self.fill(done)?;
            // First: what is complete is nobody's to replace.
            remove(&self.partial.join(PUBLISHING))?;
        }
        self.clear()?;
        remove(&self.partial.join(LOCK))?;
        fs::remove_dir(&self.partial).map_err(Error::io(&self.partial))
    }

    /// In one step: old or new, never half of both.
    fn swap(&self, done: &Path) -> std::io::Result<()> {
        let Ok(old) = fs::metadata(&self.dir) else { return fs::rename(done, &self.dir) };
        fs::set_permissions(done, old.permissions())?;
        io::exchange(done, &self.dir)
    }

    /// File by file. Whatever tells readers that the folder is a model goes first and comes last.
    fn fill(&self, done: &Path) -> Result<()> {
        let marker = self.partial.join(PUBLISHING);
        write_text(&marker, "this output is being moved into place\n")?;
        let list = |dir: &Path| -> Result<Vec<String>> {
            let names = fs::read_dir(dir)
                .and_then(|entries| {
                    entries.map(|e| Ok(e?.file_name().to_string_lossy().into())).collect::<std::io::Result<Vec<String>>>()
                })
                .map_err(Error::io(dir))?;
            let mut names: Vec<_> = names.into_iter().filter(|name| is_ours(name)).collect();
            names.sort_by_key(|name| [RECORD, CONFIG].iter().position(|first| first == name).unwrap_or(2));
            Ok(names)
        };
        let sync = || io::sync_folder(&self.dir).map_err(Error::io(&self.dir));
        for name in list(&self.dir)? {
            remove(&self.dir.join(name))?;
        }
        sync()?;
        for name in list(done)?.iter().rev() {
            let (from, to) = (done.join(name), self.dir.join(name));
            match fs::rename(&from, &to) {
                Err(e) if e.kind() == ErrorKind::CrossesDevices => copy(&from, &to)?,
                other => other.map_err(Error::io(&to))?,
            }
            if [CONFIG, RECORD].contains(&&**name) {
                sync()?;
            }
        }
        sync()
    }
}

/// Copies a file, whole or not at all.
pub(super) fn copy(from: &Path, to: &Path) -> Result<()> {
    let mut file = File::open(from).map_err(Error::io(from))?;
    io::write_atomically(to, |out| std::io::copy(&mut file, out).map(drop))
}

/// The folder that a path leads to, whether it is there or not.
fn real(path: &Path) -> Result<PathBuf> {
    let path = io::follow(path).map_err(Error::io(path))?;
    match path.canonicalize() {
        Ok(real) => Ok(real),
        Err(_) if path.file_name().is_none() => Err(Error::argument("output folder", format!("{} has no name", path.display()))),
        Err(_) => Ok(path),
    }
}

/// The name of a file that an output folder may hold.
fn is_ours(name: &str) -> bool {
    let shard = name.strip_prefix("model-").and_then(|rest| rest.strip_suffix(".safetensors"));
    [RECORD, CONFIG, README, "model.safetensors", "model.safetensors.index.json"].contains(&name)
        || COPIED.contains(&name)
        || shard.is_some_and(|s| s.bytes().all(|b| b.is_ascii_digit() || b"-of".contains(&b)))
}

/// Removes a file, or a folder and what is in it; nothing there is right too.
fn remove(path: &Path) -> Result<()> {
    let removed = if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
    match removed {
        Err(e) if e.kind() != ErrorKind::NotFound => Err(Error::io(path)(e)),
        _ => Ok(()),
    }
}
