//! Main memory that several processes of a machine see: an anonymous file in memory, which is gone with the last of them.

use std::fs::File;
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;

use memmap2::{MmapOptions, MmapRaw};

/// Bytes that were made by one process and may be mapped by others.
#[derive(Debug)]
pub(crate) struct SharedBytes {
    map: MmapRaw,
    len: usize,
}

/// Where other processes find bytes, as long as this lives.
#[derive(Debug)]
pub(crate) struct Offer {
    _file: File,
    /// For [`SharedBytes::open`].
    pub address: String,
}

/// Behind the bytes: what tells them from others'.
const TOKEN: usize = 16;

fn gib(bytes: usize) -> f64 {
    bytes as f64 / f64::from(1 << 30)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

impl SharedBytes {
    /// So many zeros.
    ///
    /// # Errors
    /// Why there are none, in words.
    pub fn create(len: usize) -> Result<(Self, Offer), String> {
        let what = |e: &dyn std::fmt::Display| format!("{:.2} GiB of memory to be shared cannot be had: {e}", gib(len));
        let whole =
            len.checked_add(TOKEN).filter(|n| isize::try_from(*n).is_ok()).ok_or_else(|| what(&"more than can be addressed"))?;
        let file = anonymous(whole).map_err(|e| what(&e))?;
        let map = MmapOptions::new().len(whole).map_raw(&file).map_err(|e| what(&e))?;
        let token = [0, 1].map(|i| RandomState::new().hash_one(i).to_ne_bytes()).concat();
        // SAFETY: the last bytes of the map, which nobody else knows of yet.
        unsafe { std::slice::from_raw_parts_mut(map.as_mut_ptr().add(len), TOKEN) }.copy_from_slice(&token);
        let address = format!("{} {} {}", std::process::id(), descriptor(&file), hex(&token));
        Ok((Self { map, len }, Offer { _file: file, address }))
    }

    /// Those that another process of this machine offers.
    ///
    /// # Errors
    /// Why they cannot be mapped, in words.
    pub fn open(address: &str, len: usize) -> Result<Self, String> {
        let parts: Vec<&str> = address.split(' ').collect();
        let [process, descriptor, token] = parts[..] else { return Err(format!("{address:?} is no address of memory")) };
        let path = format!("/proc/{process}/fd/{descriptor}");
        let what = |e: &dyn std::fmt::Display| format!("memory of process {process} cannot be mapped: {path}: {e}");
        let file = File::options().read(true).write(true).open(&path).map_err(|e| what(&e))?;
        let size = file.metadata().map_err(|e| what(&e))?.len();
        if size != (len + TOKEN) as u64 {
            return Err(what(&format!("expected {} bytes, got {size}", len + TOKEN)));
        }
        let map = MmapOptions::new().len(len + TOKEN).map_raw(&file).map_err(|e| what(&e))?;
        // SAFETY: the last bytes of the map, which are not written any more.
        let found = unsafe { std::slice::from_raw_parts(map.as_ptr().add(len), TOKEN) };
        if hex(found) != token {
            return Err(what(&"it is another process's"));
        }
        Ok(Self { map, len })
    }

    fn check(&self, start: usize, len: usize) {
        assert!(start.checked_add(len).is_some_and(|end| end <= self.len), "{len} bytes from {start} on, of {}", self.len);
    }

    /// Some of them.
    ///
    /// # Safety
    /// No process writes them as long as they are seen.
    unsafe fn bytes(&self, start: usize, len: usize) -> &[u8] {
        self.check(start, len);
        // SAFETY: they are mapped as long as this lives, and not written, says the caller.
        unsafe { std::slice::from_raw_parts(self.map.as_ptr().add(start), len) }
    }

    /// Some of them, to be written.
    ///
    /// # Safety
    /// Nobody else reads or writes them meanwhile, in this process or another.
    #[allow(clippy::mut_from_ref)] // the memory is not this process's alone
    pub unsafe fn bytes_mut(&self, start: usize, len: usize) -> &mut [u8] {
        self.check(start, len);
        // SAFETY: they are mapped as long as this lives, and nobody else's, says the caller.
        unsafe { std::slice::from_raw_parts_mut(self.map.as_mut_ptr().add(start), len) }
    }
}

/// Values in memory that processes share, to be read.
#[derive(Clone, Debug)]
pub(crate) struct SharedPart {
    memory: Arc<SharedBytes>,
    start: usize,
    len: usize,
}

impl SharedPart {
    /// # Safety
    /// No process writes these bytes when any of them reads.
    pub unsafe fn new(memory: &Arc<SharedBytes>, start: usize, len: usize) -> Self {
        memory.check(start, len);
        Self { memory: memory.clone(), start, len }
    }

    pub fn bytes(&self) -> &[u8] {
        // SAFETY: nobody writes them, said whoever made this.
        unsafe { self.memory.bytes(self.start, self.len) }
    }
}

/// A file in memory of so many bytes, which are there: what is missing is an error here and not the process's end later.
#[cfg(target_os = "linux")]
fn anonymous(bytes: usize) -> std::io::Result<File> {
    use rustix::fs::{FallocateFlags, MemfdFlags, fallocate, memfd_create};
    let there = super::cpu::available_bytes().unwrap_or(u64::MAX);
    if bytes as u64 > there {
        return Err(std::io::Error::other(format!("{:.2} GiB are free", gib(there as usize))));
    }
    let file = File::from(memfd_create("spinquant", MemfdFlags::CLOEXEC)?);
    file.set_len(bytes as u64)?;
    fallocate(&file, FallocateFlags::empty(), 0, bytes as u64)?;
    Ok(file)
}

#[cfg(target_os = "linux")]
fn descriptor(file: &File) -> i32 {
    use std::os::fd::AsRawFd;
    file.as_raw_fd()
}

#[cfg(not(target_os = "linux"))]
fn anonymous(_: usize) -> std::io::Result<File> {
    Err(std::io::Error::other("processes share memory on Linux only"))
}

#[cfg(not(target_os = "linux"))]
fn descriptor(_: &File) -> i32 {
    -1
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn what_one_writes_the_other_sees_and_nothing_else_is_taken_for_it() {
        let (own, offer) = SharedBytes::create(1 << 16).unwrap();
        let other = Arc::new(SharedBytes::open(&offer.address, 1 << 16).unwrap());
        // SAFETY: nobody reads yet.
        unsafe { own.bytes_mut(100, 3) }.copy_from_slice(&[1, 2, 3]);
        // SAFETY: nobody writes any more.
        assert_eq!(unsafe { SharedPart::new(&other, 99, 5) }.bytes(), [0, 1, 2, 3, 0]);
        for (address, len, expected) in [
            (offer.address.replace(' ', "-"), 1 << 16, "no address"),
            (offer.address.clone(), 1 << 15, "expected 32784 bytes, got 65552"),
            (format!("{} 0 00", std::process::id()), 1 << 16, "cannot be mapped"),
            (format!("{}0", offer.address), 1 << 16, "another process's"),
        ] {
            let said = SharedBytes::open(&address, len).unwrap_err();
            assert!(said.contains(expected), "{said}");
        }
        let address = offer.address.clone();
        drop(offer);
        assert!(SharedBytes::open(&address, 1 << 16).is_err(), "an offer that is over");
        let said = SharedBytes::create(1 << 55).unwrap_err();
        assert!(said.contains("GiB are free"), "{said}");
    }
}
