//! Output files: where a path leads, whether it can be written, and writing it whole or not at all.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{BufWriter, Error as IoError, ErrorKind, Result as IoResult, Write};
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

use crate::{Error, Result};

/// Temporary files are named `.spinquant-XXXXXX.tmp`.
const PREFIX: &str = ".spinquant-";
const SUFFIX: &str = ".tmp";
/// Links that are followed one after another, as many as Linux does.
const MOST_LINKS: usize = 40;

/// Writes a file so that a failure (no permission, full disk, an error of `write` itself) leaves what was there untouched: into
/// a temporary name in the same folder, flushed to the disk, then renamed.
///
/// Symbolic links are followed, also to a file that is not there yet; what is not a regular file (a pipe, a device) is written to
/// directly. Temporary files that a killed process left in the folder are removed.
///
/// # Errors
/// A folder, a read-only file, a folder that is absent or not writable, a full disk, an error of `write`; all name `path`.
pub fn write_atomically(path: &Path, write: impl FnOnce(&mut dyn Write) -> IoResult<()>) -> Result<()> {
    attempt(path, write).map_err(Error::io(path))
}

fn attempt(path: &Path, write: impl FnOnce(&mut dyn Write) -> IoResult<()>) -> IoResult<()> {
    let target = follow(path)?;
    match fs::metadata(&target) {
        Ok(m) if m.is_dir() => return Err(ErrorKind::IsADirectory.into()),
        Ok(m) if !m.is_file() => {
            let mut out = BufWriter::new(OpenOptions::new().write(true).open(&target)?);
            write(&mut out)?;
            return out.flush();
        }
        Ok(m) if m.permissions().readonly() => return Err(ErrorKind::PermissionDenied.into()),
        _ => {}
    }
    let folder = folder_of(&target);
    remove_abandoned(folder);
    let temporary = temporary(&target)?;
    let mut out = BufWriter::new(temporary.as_file());
    write(&mut out)?;
    out.flush()?;
    drop(out);
    temporary.as_file().sync_all()?;
    temporary.persist(&target)?;
    sync_folder(folder)
}

/// Where symbolic links lead: to something that is there, or to where it would be made.
///
/// # Errors
/// A circle of links, and whatever the file system says.
pub fn follow(path: &Path) -> IoResult<PathBuf> {
    let mut path = path.to_path_buf();
    for _ in 0..MOST_LINKS {
        match fs::symlink_metadata(&path) {
            Ok(m) if m.is_symlink() => path = folder_of(&path).join(fs::read_link(&path)?),
            Ok(_) => return Ok(path),
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(path),
            Err(e) => return Err(e),
        }
    }
    Err(IoError::other("its symbolic links lead in a circle"))
}

/// The folder that a file is in.
pub(crate) fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// A temporary file beside `target`, with its permissions, or those of a new file. It is locked as long as its writer lives.
fn temporary(target: &Path) -> IoResult<NamedTempFile> {
    let mut builder = tempfile::Builder::new();
    #[cfg(unix)]
    builder.permissions(match fs::metadata(target) {
        Ok(m) => m.permissions(),
        Err(_) => std::os::unix::fs::PermissionsExt::from_mode(0o666), // the umask applies
    });
    builder.prefix(PREFIX).suffix(SUFFIX);
    loop {
        let file = builder.tempfile_in(folder_of(target))?;
        match file.as_file().try_lock() {
            // Somebody took it for abandoned before it was locked, and is about to remove it, or has.
            Err(TryLockError::WouldBlock) => {}
            Ok(()) if !file.path().exists() => {}
            // Where files cannot be locked nobody takes this one for abandoned.
            Ok(()) | Err(TryLockError::Error(_)) => return Ok(file),
        }
    }
}

/// Removes the temporary files of writers that no longer live: nobody holds their lock. Whatever cannot be removed stays.
fn remove_abandoned(folder: &Path) {
    let ours = |name: &str| {
        let random = name.strip_prefix(PREFIX).and_then(|rest| rest.strip_suffix(SUFFIX));
        random.is_some_and(|r| r.len() == 6 && r.bytes().all(|b| b.is_ascii_alphanumeric()))
    };
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let is_file = entry.file_type().is_ok_and(|t| t.is_file());
        if is_file
            && entry.file_name().to_str().is_some_and(ours)
            && let Ok(file) = OpenOptions::new().write(true).open(entry.path())
            && file.try_lock().is_ok()
        {
            let _ = fs::remove_file(entry.path());
        }
    }
}

/// Makes renames in a folder last through a loss of power, where the system knows how.
pub(crate) fn sync_folder(folder: &Path) -> IoResult<()> {
    if cfg!(not(unix)) {
        return Ok(());
    }
    match File::open(folder).and_then(|f| f.sync_all()) {
        // A folder that may be written but not read, or a file system without the operation.
        Err(e) if matches!(e.kind(), ErrorKind::PermissionDenied | ErrorKind::InvalidInput | ErrorKind::Unsupported) => Ok(()),
        other => other,
    }
}

/// Fails where `path` cannot be written, before the work for it begins. What is there stays as it is.
///
/// # Errors
/// An absent folder, a folder in place of the file, a read-only file, a mount point, a folder in which nothing can be made or renamed.
pub fn check_writable(path: &Path) -> Result<()> {
    let target = follow(path).map_err(Error::io(path))?;
    match fs::metadata(&target) {
        Ok(m) if m.is_dir() => return Err(Error::format(path, "is a folder; expected the name of a file to write")),
        Ok(m) if !m.is_file() => return Ok(()), // a pipe or a device
        Ok(m) if m.permissions().readonly() => return Err(Error::format(path, "is read-only")),
        Ok(_) => {
            // What only this tells: a file that is marked immutable, a read-only mount.
            OpenOptions::new().write(true).open(&target).map_err(Error::io(path))?;
            if is_mount_point(&target) {
                return Err(Error::format(path, "is a mount point, which cannot be replaced; mount its folder instead"));
            }
        }
        Err(_) => {}
    }
    try_folder(&target).map_err(Error::io(path))
}

/// Makes a file beside `target` and renames it.
fn try_folder(target: &Path) -> IoResult<()> {
    let folder = folder_of(target);
    remove_abandoned(folder);
    let (one, other) = (temporary(target)?, temporary(target)?);
    #[cfg(unix)]
    if let (Ok(old), Ok(folder), Ok(ours)) = (fs::metadata(target), fs::metadata(folder), one.as_file().metadata()) {
        use std::os::unix::fs::{MetadataExt, PermissionsExt};
        let mine = |m: &fs::Metadata| m.uid() == ours.uid();
        // In a folder like /tmp only the owner of a file may replace it.
        if folder.permissions().mode() & 0o1000 != 0 && !mine(&old) && !mine(&folder) && ours.uid() != 0 {
            return Err(ErrorKind::PermissionDenied.into());
        }
    }
    // Both stay locked until the name is gone: nobody else takes either for abandoned.
    let (_locked, name) = other.into_parts();
    let _renamed = one.persist(&name)?;
    name.close()
}

/// Gives two files or folders one another's name in one step, where the system knows how.
pub(crate) fn exchange(one: &Path, other: &Path) -> IoResult<()> {
    #[cfg(target_os = "linux")]
    {
        use rustix::fs::{CWD, RenameFlags, renameat_with};
        renameat_with(CWD, one, CWD, other, RenameFlags::EXCHANGE).map_err(IoError::from)
    }
    #[cfg(not(target_os = "linux"))]
    {
        let _ = (one, other);
        Err(ErrorKind::Unsupported.into())
    }
}

/// True where something is mounted on `path`: it can be written into, but not renamed.
pub(crate) fn is_mount_point(path: &Path) -> bool {
    #[cfg(target_os = "linux")]
    {
        use rustix::fs::{AtFlags, CWD, StatxAttributes, StatxFlags, statx};
        if let Ok(found) = statx(CWD, path, AtFlags::empty(), StatxFlags::BASIC_STATS)
            && found.stx_attributes_mask.contains(StatxAttributes::MOUNT_ROOT)
        {
            return found.stx_attributes.contains(StatxAttributes::MOUNT_ROOT);
        }
    }
    #[cfg(unix)]
    if let (Ok(inside), Ok(outside)) = (fs::metadata(path), fs::metadata(folder_of(path))) {
        return std::os::unix::fs::MetadataExt::dev(&inside) != std::os::unix::fs::MetadataExt::dev(&outside);
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_failed_write_leaves_the_old_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        write_atomically(&path, |out| out.write_all(b"old")).unwrap();
        let full = write_atomically(&path, |out| {
            out.write_all(b"half of the ne")?;
            Err(ErrorKind::StorageFull.into())
        });
        assert!(full.unwrap_err().to_string().contains("file"));
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(names(folder.path()), ["file"], "the temporary file is gone");
        assert!(write_atomically(&folder.path().join("absent/file"), |_| Ok(())).is_err());
        assert!(write_atomically(folder.path(), |_| Ok(())).is_err());
        if Path::new("/dev/full").exists() {
            assert!(write_atomically(Path::new("/dev/full"), |out| out.write_all(b"x")).is_err());
            assert!(Path::new("/dev/full").exists());
        }
    }

    #[test]
    fn only_abandoned_files_of_ours_are_removed() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let kept = [".spinquant-abc123.tmp.txt", ".spinquant-abc12.tmp", "abc123.tmp", ".spinquant-notes"];
        for name in kept.iter().chain(&[".spinquant-abc123.tmp"]) {
            fs::write(path(name), "").unwrap();
        }
        let alive = temporary(&path("other")).unwrap();
        write_atomically(&path("file"), |out| out.write_all(b"new")).unwrap();
        let mut expected: Vec<String> = kept.iter().chain(&["file"]).map(|n| n.to_string()).collect();
        expected.push(alive.path().file_name().unwrap().to_str().unwrap().into());
        expected.sort();
        assert_eq!(names(folder.path()), expected);
    }

    /// Writers side by side take each other's fresh files for abandoned in the moment before they are locked.
    #[test]
    fn writers_in_one_folder_do_not_disturb_each_other() {
        let folder = tempfile::tempdir().unwrap();
        std::thread::scope(|scope| {
            for writer in 0..8 {
                let path = folder.path().join(format!("{writer}"));
                scope.spawn(move || {
                    for i in 0..40 {
                        check_writable(&path).unwrap();
                        write_atomically(&path, |out| write!(out, "{i}")).unwrap();
                    }
                });
            }
        });
        assert_eq!(names(folder.path()), ["0", "1", "2", "3", "4", "5", "6", "7"]);
    }

    #[cfg(unix)]
    #[test]
    fn links_are_followed() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        fs::create_dir(path("far")).unwrap();
        let link = |to: &str, from: &str| std::os::unix::fs::symlink(to, path(from)).unwrap();
        link("far/file", "link");
        link("link", "again");
        link("absent/file", "dangling");
        link("circle", "circle");
        for text in ["made", "replaced"] {
            check_writable(&path("again")).unwrap();
            write_atomically(&path("again"), |out| out.write_all(text.as_bytes())).unwrap();
            assert_eq!(fs::read_to_string(path("far/file")).unwrap(), text);
            assert!(fs::symlink_metadata(path("link")).unwrap().is_symlink());
        }
        for (name, part) in [("dangling", "No such file"), ("circle", "circle"), ("far", "is a folder")] {
            let message = check_writable(&path(name)).unwrap_err().to_string();
            assert!(message.contains(part), "{name}: {message}");
        }
    }
}
