//! The C interface of the kernels: `cuda/spinquant.h`, which says what every function does, as `libspinquant.so`.
//!
//! Every function calls the launch that [`kernels`](crate::kernels) calls, with the same checks of sizes and alignment. What a pointer cannot
//! tell, how much memory is behind it and on which GPU, is the caller's promise.

use std::cell::RefCell;
use std::ffi::{CStr, CString, c_char, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::device::cuda::Queue;
use crate::device::launch::{Kind, View};
use crate::grid::{Clip, QuantSpec};
use crate::hadamard::Hadamard;
use crate::linalg::gpu;
use crate::ops::fake_quant::Outputs;
use crate::ops::hadamard::Tables;
use crate::ops::{fake_quant, hadamard, rms_norm, rope, swiglu};
use crate::{Error, Result};

mod integers;
use integers::{spinquant_code_sums, spinquant_hadamard_codes, spinquant_integer_linear, spinquant_quantize_codes};

/// The header, as Rust declares it.
#[allow(non_camel_case_types, missing_docs)]
mod header {
    include!(concat!(env!("OUT_DIR"), "/spinquant.rs"));
}
use header::{spinquant_dtype, spinquant_quant, spinquant_status};

/// The opaque type of the header.
type Map = header::spinquant_hadamard_map;
type Stream = *mut c_void;

thread_local! {
    static LAST: RefCell<CString> = RefCell::default();
}

/// Runs a call: its status, and the message for [`spinquant_last_error`].
fn call(f: impl FnOnce() -> Result<()>) -> spinquant_status {
    let (status, message) = match catch_unwind(AssertUnwindSafe(f)) {
        Ok(Ok(())) => (header::SPINQUANT_OK, String::new()),
        Ok(Err(e @ Error::Cuda(_))) => (header::SPINQUANT_CUDA, e.to_string()),
        Ok(Err(e)) => (header::SPINQUANT_INVALID, e.to_string()),
        Err(_) => (header::SPINQUANT_INTERNAL, "the library panicked; the standard error stream says where".into()),
    };
    LAST.with_borrow_mut(|last| *last = CString::new(message.replace('\0', " ")).unwrap_or_default());
    status
}

/// Names an argument that is not as the header says.
fn wrong<T>(what: &str, expected: &str, got: impl std::fmt::Display) -> Result<T> {
    Err(Error::argument(what, format!("expected {expected}, got {got}")))
}

/// A count or size.
fn size(what: &str, n: i64) -> Result<usize> {
    usize::try_from(n).or_else(|_| wrong(what, "a number of at least 0", n))
}

/// The product of some of them.
fn count(what: &str, sizes: &[(&str, i64)]) -> Result<usize> {
    let mut product = 1usize;
    for &(name, n) in sizes {
        product = product.checked_mul(size(name, n)?).ok_or_else(|| Error::argument(what, "more values than can be counted"))?;
    }
    Ok(product)
}

fn flag(what: &str, value: i32) -> Result<bool> {
    match value {
        0 | 1 => Ok(value == 1),
        _ => wrong(what, "0 or 1", value),
    }
}

fn kind(dtype: spinquant_dtype) -> Result<Kind> {
    match dtype {
        header::SPINQUANT_F32 => Ok(Kind::F32),
        header::SPINQUANT_F16 => Ok(Kind::F16),
        header::SPINQUANT_BF16 => Ok(Kind::BF16),
        _ => wrong("dtype", "SPINQUANT_F32, SPINQUANT_F16 or SPINQUANT_BF16", dtype),
    }
}

fn spec(q: spinquant_quant) -> Result<QuantSpec> {
    let (symmetric, weight) = (flag("quant.symmetric", q.symmetric)?, flag("quant.weight", q.weight)?);
    let bits = u32::try_from(q.bits).ok().filter(|bits| (2..=8).contains(bits));
    let Some(bits) = bits else { return wrong("quant.bits", "2 to 8", q.bits) };
    if !(q.clip > 0.0 && q.clip.is_finite()) {
        return wrong("quant.clip", "a finite number above 0", q.clip);
    }
    let spec = if weight { QuantSpec::weight(bits, symmetric) } else { QuantSpec::activation(bits, symmetric) };
    let spec = spec.clipped(Clip::Ratio(q.clip.into()));
    Ok(match size("quant.group", q.group.into())? {
        0 => spec,
        group => spec.grouped(group),
    })
}

/// Groups of rows of `cols` values.
fn groups(rows: i64, cols: i64, spec: &QuantSpec) -> Result<usize> {
    let cols = size("cols", cols)?;
    let group = spec.group_size(cols)?;
    Ok(size("rows", rows)? * cols.checked_div(group).unwrap_or(0))
}

/// Memory of the caller's: `len` values at an address.
fn view<'a, T>(what: &str, address: *const T, len: usize, kind: Kind) -> Result<View<'a>> {
    if address.is_null() && len > 0 {
        return wrong(what, &format!("the address of {len} values"), "NULL");
    }
    // SAFETY: the caller promises so many values there until the stream has passed. Views of one call are of one context, its current one.
    Ok(unsafe { View::new(address as u64, len, kind, Queue::CURRENT) })
}

fn optional<'a, T>(address: *const T, len: usize, kind: Kind) -> Result<Option<View<'a>>> {
    if address.is_null() { Ok(None) } else { view("", address, len, kind).map(Some) }
}

/// The map behind a pointer.
///
/// # Safety
/// It is null, or came from [`spinquant_hadamard_create`] and is not destroyed.
unsafe fn map_of<'a>(map: *const Map) -> Result<&'a Hadamard> {
    // SAFETY: promised above.
    match unsafe { map.cast::<Hadamard>().as_ref() } {
        Some(map) => Ok(map),
        None => wrong("map", "one from spinquant_hadamard_create", "NULL"),
    }
}

#[unsafe(no_mangle)]
extern "C" fn spinquant_version() -> *const c_char {
    const VERSION: &CStr = match CStr::from_bytes_with_nul(concat!(env!("CARGO_PKG_VERSION"), "\0").as_bytes()) {
        Ok(version) => version,
        Err(_) => panic!("a version without zeros"),
    };
    VERSION.as_ptr()
}

#[unsafe(no_mangle)]
extern "C" fn spinquant_last_error() -> *const c_char {
    LAST.with_borrow(|last| last.as_ptr())
}

/// # Safety
/// `map` is null or has room for a pointer.
#[unsafe(no_mangle)]
unsafe extern "C" fn spinquant_hadamard_create(map: *mut *mut Map, n: i64, block: i64) -> spinquant_status {
    call(|| {
        let (n, block) = (size("n", n)?, size("block", block)?);
        if map.is_null() {
            return wrong("map", "room for a pointer", "NULL");
        }
        let made = if block == 0 { Hadamard::new(n)? } else { Hadamard::in_blocks(n, block)? };
        // SAFETY: not null, so there is room.
        unsafe { map.write(Box::into_raw(Box::new(made)).cast()) };
        Ok(())
    })
}

/// # Safety
/// It is null, or came from [`spinquant_hadamard_create`], and is not used again.
#[unsafe(no_mangle)]
unsafe extern "C" fn spinquant_hadamard_destroy(map: *mut Map) {
    if !map.is_null() {
        // SAFETY: made by a box, and the caller lets go of it.
        drop(unsafe { Box::from_raw(map.cast::<Hadamard>()) });
    }
}

/// # Safety
/// As [`map_of`]; `words` is null or has room for a number, `table` is null or has room for so many words.
#[unsafe(no_mangle)]
unsafe extern "C" fn spinquant_hadamard_table(map: *const Map, table: *mut u32, words: *mut i64) -> spinquant_status {
    call(|| {
        // SAFETY: the caller's promise.
        let map = unsafe { map_of(map) }?;
        let packed = if map.k() > 1 { map.packed() } else { vec![] };
        if words.is_null() {
            return wrong("words", "room for a number", "NULL");
        }
        // SAFETY: not null, so there is room.
        unsafe { words.write(packed.len() as i64) };
        if !table.is_null() {
            // SAFETY: the caller made room for so many words.
            unsafe { table.copy_from_nonoverlapping(packed.as_ptr(), packed.len()) };
        }
        Ok(())
    })
}

/// A map with its tables in device memory.
fn tables(map: &Hadamard, table: *const u32, signs: *const i8) -> Result<Tables<'_>> {
    let (k, n) = (map.k(), map.n());
    let words = if k > 1 { k * k.div_ceil(32) } else { 0 };
    let table = if k > 1 { Some(view("table", table, words, Kind::U32)?) } else { None };
    Ok(Tables { map, table, signs: optional(signs, n, Kind::I8)? })
}

/// A map with its tables, and the operands y and x.
#[allow(clippy::too_many_arguments)]
fn transform(
    map: &Hadamard,
    table: *const u32,
    signs: *const i8,
    y: *mut c_void,
    x: *const c_void,
    rows: i64,
    (transpose, spec): (bool, Option<&QuantSpec>),
    dtype: spinquant_dtype,
    stream: Stream,
) -> Result<()> {
    let kind = kind(dtype)?;
    let len = count("x", &[("rows", rows), ("n", map.n() as i64)])?;
    let tables = tables(map, table, signs)?;
    let queue = Queue::raw(stream);
    hadamard::launch(queue, view("y", y, len, kind)?, view("x", x, len, kind)?, &tables, transpose, spec)
}

/// # Safety
/// As [`map_of`]; the memory is as the header says.
#[unsafe(no_mangle)]
unsafe extern "C" fn spinquant_hadamard(
    map: *const Map,
    table: *const u32,
    signs: *const i8,
    y: *mut c_void,
    x: *const c_void,
    rows: i64,
    transpose: i32,
    dtype: spinquant_dtype,
    stream: Stream,
) -> spinquant_status {
    call(|| {
        // SAFETY: the caller's promise.
        let map = unsafe { map_of(map) }?;
        transform(map, table, signs, y, x, rows, (flag("transpose", transpose)?, None), dtype, stream)
    })
}

/// # Safety
/// As [`map_of`]; the memory is as the header says.
#[unsafe(no_mangle)]
unsafe extern "C" fn spinquant_hadamard_fake_quant(
    map: *const Map,
    table: *const u32,
    signs: *const i8,
    y: *mut c_void,
    x: *const c_void,
    rows: i64,
    quant: spinquant_quant,
    dtype: spinquant_dtype,
    stream: Stream,
) -> spinquant_status {
    call(|| {
        // SAFETY: the caller's promise.
        let map = unsafe { map_of(map) }?;
        transform(map, table, signs, y, x, rows, (false, Some(&spec(quant)?)), dtype, stream)
    })
}

#[unsafe(no_mangle)]
extern "C" fn spinquant_fake_quant(
    y: *mut c_void,
    x: *const c_void,
    rows: i64,
    cols: i64,
    quant: spinquant_quant,
    dtype: spinquant_dtype,
    stream: Stream,
) -> spinquant_status {
    call(|| {
        let (len, kind) = (count("x", &[("rows", rows), ("cols", cols)])?, kind(dtype)?);
        let out = Outputs { y: Some(view("y", y, len, kind)?), ..Outputs::default() };
        fake_quant::launch(Queue::raw(stream), out, view("x", x, len, kind)?, size("cols", cols)?, &spec(quant)?)
    })
}

#[unsafe(no_mangle)]
extern "C" fn spinquant_quantize(
    codes: *mut i16,
    scale: *mut f32,
    zero: *mut f32,
    x: *const c_void,
    rows: i64,
    cols: i64,
    quant: spinquant_quant,
    dtype: spinquant_dtype,
    stream: Stream,
) -> spinquant_status {
    call(|| {
        let (len, kind, spec) = (count("x", &[("rows", rows), ("cols", cols)])?, kind(dtype)?, spec(quant)?);
        let groups = groups(rows, cols, &spec)?;
        let out = Outputs {
            codes: Some(view("codes", codes, len, Kind::I16)?),
            scale: Some(view("scale", scale, groups, Kind::F32)?),
            zero: Some(view("zero", zero, groups, Kind::F32)?),
            ..Outputs::default()
        };
        fake_quant::launch(Queue::raw(stream), out, view("x", x, len, kind)?, size("cols", cols)?, &spec)
    })
}

#[unsafe(no_mangle)]
extern "C" fn spinquant_fake_quant_search(
    y: *mut c_void,
    best: *mut i32,
    x: *const c_void,
    rows: i64,
    cols: i64,
    quant: spinquant_quant,
    dtype: spinquant_dtype,
    stream: Stream,
) -> spinquant_status {
    call(|| {
        let (len, kind) = (count("x", &[("rows", rows), ("cols", cols)])?, kind(dtype)?);
        let spec = spec(spinquant_quant { clip: 1.0, ..quant })?.clipped(Clip::Search);
        let best = view("best", best, groups(rows, cols, &spec)?, Kind::I32)?;
        let out = Outputs { y: Some(view("y", y, len, kind)?), best: Some(best), ..Outputs::default() };
        fake_quant::launch(Queue::raw(stream), out, view("x", x, len, kind)?, size("cols", cols)?, &spec)
    })
}

#[unsafe(no_mangle)]
extern "C" fn spinquant_rms_norm(
    y: *mut c_void,
    inverse: *mut f32,
    x: *const c_void,
    rows: i64,
    cols: i64,
    eps: f32,
    dtype: spinquant_dtype,
    stream: Stream,
) -> spinquant_status {
    call(|| {
        let (len, kind) = (count("x", &[("rows", rows), ("cols", cols)])?, kind(dtype)?);
        let inverse = view("inverse", inverse, size("rows", rows)?, Kind::F32)?;
        let (y, x) = (view("y", y, len, kind)?, view("x", x, len, kind)?);
        rms_norm::launch(Queue::raw(stream), y, inverse, x, None, size("cols", cols)?, eps)
    })
}

#[unsafe(no_mangle)]
extern "C" fn spinquant_swiglu(
    y: *mut c_void,
    gate: *const c_void,
    up: *const c_void,
    count: i64,
    dtype: spinquant_dtype,
    stream: Stream,
) -> spinquant_status {
    call(|| {
        let (len, kind) = (size("count", count)?, kind(dtype)?);
        let (gate, up) = (view("gate", gate, len, kind)?, view("up", up, len, kind)?);
        swiglu::launch(Queue::raw(stream), view("y", y, len, kind)?, gate, up)
    })
}

#[unsafe(no_mangle)]
extern "C" fn spinquant_rope(
    y: *mut c_void,
    x: *const c_void,
    cosine: *const f32,
    sine: *const f32,
    tokens: i64,
    positions: i64,
    heads: i64,
    dim: i64,
    transpose: i32,
    dtype: spinquant_dtype,
    stream: Stream,
) -> spinquant_status {
    call(|| {
        let (len, kind) = (count("x", &[("tokens", tokens), ("heads", heads), ("dim", dim)])?, kind(dtype)?);
        let angles = count("cosine", &[("positions", positions), ("dim", dim / 2)])?;
        let tables = [view("cosine", cosine, angles, Kind::F32)?, view("sine", sine, angles, Kind::F32)?];
        let (heads, dim) = (size("heads", heads)?, size("dim", dim)?);
        let (y, x) = (view("y", y, len, kind)?, view("x", x, len, kind)?);
        rope::launch(Queue::raw(stream), y, x, tables, (heads, dim, dim), flag("transpose", transpose)?)
    })
}

/// `batch` matrices of n × n.
fn matrices(batch: i64, n: i64) -> Result<(usize, usize)> {
    Ok((count("matrices", &[("batch", batch), ("n", n), ("n", n)])?, size("n", n)?))
}

#[unsafe(no_mangle)]
extern "C" fn spinquant_normalize_rows(y: *mut f32, x: *const f32, batch: i64, n: i64, stream: Stream) -> spinquant_status {
    call(|| {
        let (len, n) = matrices(batch, n)?;
        gpu::launch_normalize_rows(Queue::raw(stream), view("y", y, len, Kind::F32)?, view("x", x, len, Kind::F32)?, n)
    })
}

#[unsafe(no_mangle)]
extern "C" fn spinquant_skew(w: *mut f32, a: *const f32, batch: i64, n: i64, stream: Stream) -> spinquant_status {
    call(|| {
        let (len, n) = matrices(batch, n)?;
        gpu::launch_skew(Queue::raw(stream), view("w", w, len, Kind::F32)?, view("a", a, len, Kind::F32)?, n)
    })
}

#[unsafe(no_mangle)]
extern "C" fn spinquant_step_size(
    alpha: *mut f32,
    w: *const f32,
    rate: f32,
    batch: i64,
    n: i64,
    stream: Stream,
) -> spinquant_status {
    call(|| {
        let (len, n) = matrices(batch, n)?;
        let alpha = view("alpha", alpha, size("batch", batch)?, Kind::F32)?;
        gpu::launch_step_size(Queue::raw(stream), alpha, view("w", w, len, Kind::F32)?, rate, n)
    })
}

#[unsafe(no_mangle)]
extern "C" fn spinquant_add_scaled(
    y: *mut f32,
    a: *const f32,
    alpha: *const f32,
    factor: f32,
    x: *const f32,
    batch: i64,
    n: i64,
    stream: Stream,
) -> spinquant_status {
    call(|| {
        let (len, n) = matrices(batch, n)?;
        let (y, a) = (view("y", y, len, Kind::F32)?, optional(a, len, Kind::F32)?);
        let (alpha, x) = (view("alpha", alpha, size("batch", batch)?, Kind::F32)?, view("x", x, len, Kind::F32)?);
        gpu::launch_add_scaled(Queue::raw(stream), y, a, (factor, alpha), x, n)
    })
}

/// Does not compile unless every function is what the header declares.
macro_rules! as_declared {
    ($($name:ident($($argument:ident),*)),* $(,)?) => {
        const _: () = { $( let _ = [header::$name as unsafe extern "C" fn($(as_declared!(@ $argument)),*) -> _, $name as _]; )* };
    };
    (@ $argument:ident) => { _ };
}
as_declared! {
    spinquant_version(), spinquant_last_error(),
    spinquant_hadamard_create(a, b, c), spinquant_hadamard_destroy(a), spinquant_hadamard_table(a, b, c),
    spinquant_hadamard(a, b, c, d, e, f, g, h, i), spinquant_hadamard_fake_quant(a, b, c, d, e, f, g, h, i),
    spinquant_fake_quant(a, b, c, d, e, f, g), spinquant_quantize(a, b, c, d, e, f, g, h, i),
    spinquant_fake_quant_search(a, b, c, d, e, f, g, h), spinquant_quantize_codes(a, b, c, d, e, f, g, h, i),
    spinquant_hadamard_codes(a, b, c, d, e, f, g, h, i, j, k, l), spinquant_code_sums(a, b, c, d, e, f),
    spinquant_integer_linear(a, b, c, d, e, f, g, h, i, j, k),
    spinquant_rms_norm(a, b, c, d, e, f, g, h), spinquant_swiglu(a, b, c, d, e, f),
    spinquant_rope(a, b, c, d, e, f, g, h, i, j, k),
    spinquant_normalize_rows(a, b, c, d, e), spinquant_skew(a, b, c, d, e), spinquant_step_size(a, b, c, d, e, f),
    spinquant_add_scaled(a, b, c, d, e, f, g, h),
}
