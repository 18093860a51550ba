//! The C interface as far as it goes without a GPU: sizes and tables, and what is refused before a launch. `examples/torch` calls the rest.

use std::ffi::{CStr, c_char, c_void};
use std::process::Command;
use std::ptr::{null, null_mut};

use spinquant::hadamard::Hadamard;

#[repr(C)]
#[derive(Clone, Copy)]
struct Quant {
    bits: i32,
    symmetric: i32,
    weight: i32,
    group: i32,
    clip: f32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Codes {
    codes: *const i8,
    scale: *const f32,
    zero: *const f32,
    group: i32,
}

unsafe extern "C" {
    fn spinquant_integer_linear(
        y: *mut c_void,
        x: Codes,
        w: Codes,
        sums: *const i32,
        bias: *const c_void,
        residual: *const c_void,
        m: i64,
        n: i64,
        k: i64,
        dtype: u32,
        stream: *mut c_void,
    ) -> u32;
    fn spinquant_code_sums(sums: *mut i32, codes: *const i8, rows: i64, cols: i64, part: i64, stream: *mut c_void) -> u32;
    fn spinquant_version() -> *const c_char;
    fn spinquant_last_error() -> *const c_char;
    fn spinquant_hadamard_create(map: *mut *mut c_void, n: i64, block: i64) -> u32;
    fn spinquant_hadamard_destroy(map: *mut c_void);
    fn spinquant_hadamard_table(map: *const c_void, table: *mut u32, words: *mut i64) -> u32;
    fn spinquant_hadamard(
        map: *const c_void,
        table: *const u32,
        signs: *const i8,
        y: *mut c_void,
        x: *const c_void,
        rows: i64,
        transpose: i32,
        dtype: u32,
        stream: *mut c_void,
    ) -> u32;
    fn spinquant_fake_quant(
        y: *mut c_void,
        x: *const c_void,
        rows: i64,
        cols: i64,
        quant: Quant,
        dtype: u32,
        stream: *mut c_void,
    ) -> u32;
}

fn last_error() -> String {
    // SAFETY: the library's string lives until this thread's next call.
    unsafe { CStr::from_ptr(spinquant_last_error()) }.to_str().unwrap().into()
}

#[test]
fn maps_have_the_tables_of_the_library() {
    // SAFETY: version is a constant string.
    assert_eq!(unsafe { CStr::from_ptr(spinquant_version()) }.to_str().unwrap(), env!("CARGO_PKG_VERSION"));
    for (n, block) in [(4096, 0), (11008, 0), (14336, 0), (11008, 256), (768, 96)] {
        let (mut map, mut words) = (null_mut(), -1);
        // SAFETY: all pointers are to room of the right size; the map is used between create and destroy.
        unsafe {
            assert_eq!(spinquant_hadamard_create(&raw mut map, n, block), 0, "{}", last_error());
            assert_eq!(spinquant_hadamard_table(map, null_mut(), &raw mut words), 0);
            let mut table = vec![0u32; words as usize];
            assert_eq!(spinquant_hadamard_table(map, table.as_mut_ptr(), &raw mut words), 0);
            let ours = match block {
                0 => Hadamard::new(n as usize),
                block => Hadamard::in_blocks(n as usize, block as usize),
            };
            let ours = ours.unwrap();
            assert_eq!(table, if ours.k() > 1 { ours.packed() } else { vec![] });
            spinquant_hadamard_destroy(map);
        }
    }
    // SAFETY: null is allowed.
    unsafe { spinquant_hadamard_destroy(null_mut()) };
}

#[test]
fn arguments_that_cannot_be_are_refused_with_words() {
    let mut map = null_mut();
    let quant = Quant { bits: 4, symmetric: 0, weight: 0, group: 0, clip: 1.0 };
    let refused = |status: u32, parts: &[&str]| {
        let message = last_error();
        assert!(status == 1 && parts.iter().all(|part| message.contains(part)), "{status}: {message}");
    };
    let at = 4096 as *mut c_void; // never read: what is wrong is found before
    // SAFETY: nothing is launched, and pointers that are read are to room of the right size.
    unsafe {
        refused(spinquant_hadamard_create(&raw mut map, 0, 0), &["at least 1", "got 0"]);
        refused(spinquant_hadamard_create(&raw mut map, -1, 0), &["n: ", "got -1"]);
        refused(spinquant_hadamard_create(&raw mut map, 1000, 300), &["divisor of 1000", "got 300"]);
        refused(spinquant_hadamard_create(null_mut(), 64, 0), &["map", "NULL"]);
        refused(spinquant_hadamard(null(), null(), null(), at, at, 1, 0, 0, null_mut()), &["map", "NULL"]);
        assert_eq!(spinquant_hadamard_create(&raw mut map, 11008, 0), 0);
        assert_eq!(last_error(), "");
        refused(spinquant_hadamard(map, null(), null(), at, at, 1, 0, 0, null_mut()), &["table", "NULL"]);
        refused(spinquant_hadamard(map, at.cast(), null(), null_mut(), at, 1, 0, 0, null_mut()), &["y: ", "NULL"]);
        refused(spinquant_hadamard(map, at.cast(), null(), at, at, -1, 0, 0, null_mut()), &["rows", "got -1"]);
        refused(spinquant_hadamard(map, at.cast(), null(), at, at, 1, 2, 0, null_mut()), &["transpose", "0 or 1"]);
        refused(spinquant_hadamard(map, at.cast(), null(), at, at, 1, 0, 9, null_mut()), &["dtype", "got 9"]);
        refused(spinquant_hadamard(map, at.cast(), null(), at, at, i64::MAX, 0, 0, null_mut()), &["counted"]);
        let odd = at.cast::<u8>().wrapping_add(4).cast();
        refused(spinquant_hadamard(map, at.cast(), null(), at, odd, 1, 0, 0, null_mut()), &["x", "16-byte boundary"]);
        spinquant_hadamard_destroy(map);
        let x = Codes { codes: at.cast(), scale: at.cast(), zero: at.cast(), group: 0 };
        let w = Codes { zero: null(), ..x };
        let linear = |x, w, sums, k| spinquant_integer_linear(at, x, w, sums, null(), null(), 4, 8, k, 0, null_mut());
        refused(linear(x, x, at.cast(), 64), &["no zero points of w"]);
        refused(linear(x, w, null(), 64), &["sums where x has some"]);
        refused(linear(Codes { group: 48, ..x }, w, at.cast(), 64), &["x.group", "a divisor of 64", "got 48"]);
        refused(linear(Codes { group: 16, ..x }, w, at.cast(), 64), &["in 32s", "got 16 and 64"]);
        refused(linear(Codes { scale: null(), ..x }, w, at.cast(), 64), &["x.scale", "NULL"]);
        refused(linear(x, w, at.cast(), 1 << 17), &["1 to 65536 columns"]);
        refused(spinquant_code_sums(at.cast(), at.cast(), 4, 64, 48, null_mut()), &["part", "a divisor of 64"]);
        let fake = |cols, quant| spinquant_fake_quant(at, at, 2, cols, quant, 0, null_mut());
        refused(fake(64, Quant { bits: 9, ..quant }), &["quant.bits", "2 to 8", "got 9"]);
        refused(fake(64, Quant { group: 48, ..quant }), &["48", "64"]);
        refused(fake(64, Quant { clip: f32::NAN, ..quant }), &["quant.clip", "above 0", "NaN"]);
        refused(fake(64, Quant { symmetric: 7, ..quant }), &["quant.symmetric", "got 7"]);
    }
}

/// C and C++ compilers read the header by itself, with every warning an error.
#[test]
fn the_header_is_c_and_cpp() {
    for language in ["c", "c++"] {
        let header = concat!(env!("CARGO_MANIFEST_DIR"), "/cuda/spinquant.h");
        let compiler = Command::new("c++")
            .args(["-fsyntax-only", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-x", language, header])
            .output();
        let out = compiler.expect("a C++ compiler, which the feature cuda needs to build");
        assert!(out.status.success(), "{language}: {}", String::from_utf8_lossy(&out.stderr));
    }
}
