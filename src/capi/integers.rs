//! Linear layers on integers.

use std::ffi::c_void;

use super::header::{spinquant_codes, spinquant_dtype, spinquant_quant, spinquant_status};
use super::{Map, Stream, call, count, flag, groups, kind, map_of, optional, size, spec, tables, view, wrong};
use crate::Result;
use crate::device::cuda::Queue;
use crate::device::launch::{Kind, View};
use crate::ops::integer_linear::{self, Coded, Operands};
use crate::ops::{codes, hadamard_codes};

#[unsafe(no_mangle)]
pub(super) extern "C" fn spinquant_quantize_codes(
    codes: *mut i8,
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
        let zero: Option<View<'_>> = match spec.symmetric {
            true => optional(zero, groups, Kind::F32)?,
            false => Some(view("zero", zero, groups, Kind::F32)?),
        };
        let (codes, scale) = (view("codes", codes, len, Kind::I8)?, view("scale", scale, groups, Kind::F32)?);
        codes::launch_quantize(Queue::raw(stream), codes, scale, zero, view("x", x, len, kind)?, size("cols", cols)?, &spec)
    })
}

/// # Safety
/// As [`map_of`]; the memory is as the header says.
#[unsafe(no_mangle)]
pub(super) unsafe extern "C" fn spinquant_hadamard_codes(
    map: *const Map,
    table: *const u32,
    signs: *const i8,
    codes: *mut c_void,
    scale: *mut f32,
    zero: *mut f32,
    x: *const c_void,
    rows: i64,
    quant: spinquant_quant,
    packed: i32,
    dtype: spinquant_dtype,
    stream: Stream,
) -> spinquant_status {
    call(|| {
        // SAFETY: the caller's promise.
        let map = unsafe { map_of(map) }?;
        let (n, kind, spec) = (map.n() as i64, kind(dtype)?, spec(quant)?);
        let (len, groups) = (count("x", &[("rows", rows), ("n", n)])?, groups(rows, n, &spec)?);
        let zero: Option<View<'_>> = match spec.symmetric {
            true => optional(zero, groups, Kind::F32)?,
            false => Some(view("zero", zero, groups, Kind::F32)?),
        };
        let (bytes, of) = if flag("packed", packed)? { (len / 2, Kind::U8) } else { (len, Kind::I8) };
        let out = (view("codes", codes, bytes, of)?, view("scale", scale, groups, Kind::F32)?, zero);
        let tables = tables(map, table, signs)?;
        hadamard_codes::launch(Queue::raw(stream), out, view("x", x, len, kind)?, &tables, &spec)
    })
}

#[unsafe(no_mangle)]
pub(super) extern "C" fn spinquant_code_sums(
    sums: *mut i32,
    codes: *const i8,
    rows: i64,
    cols: i64,
    part: i64,
    stream: Stream,
) -> spinquant_status {
    call(|| {
        let (len, cols, part) = (count("codes", &[("rows", rows), ("cols", cols)])?, size("cols", cols)?, size("part", part)?);
        if part == 0 || cols % part != 0 {
            return wrong("part", &format!("a divisor of {cols}"), part);
        }
        let sums = view("sums", sums, len / part, Kind::I32)?;
        codes::launch_sums(Queue::raw(stream), sums, view("codes", codes, len, Kind::I8)?, cols, part)
    })
}

/// Codes of `rows` rows of k columns, and the columns that share a scale.
fn coded<'a>(what: &str, of: &spinquant_codes, rows: i64, k: i64) -> Result<Coded<'a>> {
    let (len, cols, group) = (count(what, &[("rows", rows), ("k", k)])?, size("k", k)?, size("group", of.group.into())?);
    let group = if group == 0 { cols } else { group };
    if group == 0 || cols % group != 0 {
        return wrong(&format!("{what}.group"), &format!("a divisor of {cols}"), group);
    }
    Ok(Coded {
        codes: view(what, of.codes, len, Kind::I8)?,
        scale: view(&format!("{what}.scale"), of.scale, len / group, Kind::F32)?,
        zero: optional(of.zero, len / group, Kind::F32)?,
        group,
    })
}

#[unsafe(no_mangle)]
pub(super) extern "C" fn spinquant_integer_linear(
    y: *mut c_void,
    x: spinquant_codes,
    w: spinquant_codes,
    w_sums: *const i32,
    bias: *const c_void,
    residual: *const c_void,
    m: i64,
    n: i64,
    k: i64,
    dtype: spinquant_dtype,
    stream: Stream,
) -> spinquant_status {
    call(|| {
        let (len, kind) = (count("y", &[("m", m), ("n", n)])?, kind(dtype)?);
        let (x, w) = (coded("x", &x, m, k)?, coded("w", &w, n, k)?);
        let sums = size("n", n)? * (size("k", k)? / x.group.min(w.group));
        let operands = Operands {
            x,
            w,
            sums: optional(w_sums, sums, Kind::I32)?,
            bias: optional(bias, size("n", n)?, kind)?,
            residual: optional(residual, len, kind)?,
        };
        integer_linear::launch(Queue::raw(stream), view("y", y, len, kind)?, &operands, size("k", k)?)
    })
}
