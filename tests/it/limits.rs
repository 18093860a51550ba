//! What damaged files can make us allocate: a few times their own size, and no more than a fixed amount where they only claim a lot.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::io::{Cursor, Write};
use std::path::Path;

use spinquant::llama::{Checkpoint, LlamaConfig};
use spinquant::rotation::Rotations;
use zip::write::SimpleFileOptions;

/// The system's allocator, which counts what each thread holds.
struct Counting;

thread_local! {
    static HELD: Cell<isize> = const { Cell::new(0) };
    static MOST: Cell<isize> = const { Cell::new(0) };
}

fn count(bytes: isize) {
    let held = HELD.get() + bytes;
    HELD.set(held);
    MOST.set(MOST.get().max(held));
}

// SAFETY: every request goes to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: as above.
        unsafe { System.alloc(layout) }
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }
    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }
    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(size as isize - layout.size() as isize);
        // SAFETY: as above.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The most bytes that `f` held at once on this thread, and what it made.
fn peak<T>(f: impl FnOnce() -> T) -> (usize, T) {
    let before = HELD.get();
    MOST.set(before);
    let made = f();
    ((MOST.get() - before) as usize, made)
}

const MIB: usize = 1 << 20;

#[test]
fn a_pickle_of_nothing_but_tuples() {
    // Tuples of one in one another, empty ones beside one another, marks, and the same value again and again.
    for instruction in [&b"\x85"[..], b")", b"(", b"h\x01", b"q\x01", b"}", b"K\x01"] {
        let mut pickle = b"\x80\x02)q\x01".to_vec();
        while pickle.len() < 7 * MIB {
            pickle.extend(instruction);
        }
        let mut file = zip::ZipWriter::new(Cursor::new(vec![]));
        let stored = SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
        file.start_file("R/data.pkl", stored).unwrap();
        file.write_all(&pickle).unwrap();
        let bytes = file.finish().unwrap().into_inner();
        let (held, read) = peak(|| Rotations::from_torch_bytes(&bytes, Path::new("R.bin")));
        assert!(read.unwrap_err().to_string().starts_with("R.bin: data.pkl: "), "{instruction:?}");
        assert!(held < 64 * MIB, "{instruction:?}: {} MiB", held / MIB);
    }
}

#[test]
fn a_header_of_nothing_but_empty_tensors() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    let open = |header: &str| {
        std::fs::write(&path, [&(header.len() as u64).to_le_bytes()[..], header.as_bytes()].concat()).unwrap();
        let (held, opened) = peak(|| Checkpoint::open(dir.path()));
        let message = opened.unwrap_err().to_string();
        assert!(held < 8 * MIB && message.len() < 500, "{} MiB, {message:.300}", held / MIB);
        message
    };
    let tensors = |n: usize| {
        let all: Vec<String> = (0..n).map(|i| format!(r#""{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}"#)).collect();
        format!("{{{}}}", all.join(","))
    };
    assert!(open(&tensors(200_000)).contains("names 200000 tensors, at most 131072 are read"));
    assert!(open(&tensors(400_000)).contains("at most 16777216 are read"));
    assert!(open(&" ".repeat(20 * MIB)).contains("its header has 20971520 bytes, at most 16777216 are read"));
    // As many as are read take a bounded multiple of their header.
    let header = tensors(1 << 17);
    std::fs::write(&path, [&(header.len() as u64).to_le_bytes()[..], header.as_bytes()].concat()).unwrap();
    let (held, opened) = peak(|| Checkpoint::open(dir.path()));
    assert_eq!(opened.unwrap().names().count(), 1 << 17);
    assert!(held < 256 * MIB, "{} MiB", held / MIB);
}

#[test]
fn a_configuration_of_nothing_but_zeros() {
    let zeros = format!("{{\"a\":[{}0]}}", "0,".repeat(4 * MIB));
    let (held, read) = peak(|| LlamaConfig::from_json(zeros.as_bytes(), Path::new("config.json")));
    assert!(read.unwrap_err().to_string().contains("expected at most 4194304 bytes"));
    assert!(held < MIB, "{held}");
}
