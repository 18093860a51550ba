//! Hadamard transform and quantisation to codes in one pass: the codes of [`hadamard_fake_quant`](crate::ops::hadamard_fake_quant), of which a
//! GPU writes a byte or half a byte a value. The transformed row stays on chip and is not rounded to 16 bits in between; on the CPU it is the two
//! operations one after the other.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use super::codes::Codes;
use crate::device::cuda::ffi::sq_hadamard_map;
use crate::device::cuda::{CudaBuffer, CudaDevice, Queue};
use crate::device::launch::{Check, Kind, View, Work};
use crate::device::{Device, ffi};
use crate::grid::{Clip, QuantSpec};
use crate::hadamard::Hadamard;
use crate::ops::fake_quant::launch_spec;
use crate::ops::hadamard::{self, Tables};
use crate::ops::{At, Call, Case, Place, Run, exact};
use crate::{DType, Error, Result, Tensor};

/// Longer rows are transformed and quantised in two passes: not every card holds them on chip.
const LONGEST: usize = 24576;
/// The same where there are kernels of warpgroups.
const LONGEST_OF_WARPGROUPS: usize = 32768;

impl Codes {
    /// The codes of `H x`, on the device of x: those of [`Var::hadamard_fake_quant_by`](crate::Var::hadamard_fake_quant_by). The leading axes
    /// of x are rows.
    ///
    /// # Errors
    /// Rows of another length than the map's; those of [`Codes::quantize`].
    pub fn transformed(x: &Tensor, map: &Hadamard, spec: &QuantSpec) -> Result<Self> {
        if x.cols() != map.n() {
            return Err(Error::shape("hadamard codes", format!("[.., {}]", map.n()), x.shape()));
        }
        if let Device::Cuda(device) = x.device() {
            let longest = if device.warpgroups()? { LONGEST_OF_WARPGROUPS } else { LONGEST };
            if x.dtype() != DType::F64 && map.n() <= longest && spec.clip != Clip::Search && spec.stored.is_none() {
                let (codes, scale, zero) = on_gpu(&device, x, map, spec, Kind::I8)?;
                return Ok(Self::on_device(codes, scale, zero, [x.rows(), map.n()], spec.group_size(map.n())?));
            }
        }
        // Not rounded to 16 bits in between.
        let wide = if x.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
        Self::quantize(&hadamard::transform(x.to_dtype(wide)?, map, false)?, spec)
    }
}

/// Codes, two a byte where `kind` is `U8`, with scales and zero points.
fn on_gpu(
    device: &CudaDevice,
    x: &Tensor,
    map: &Hadamard,
    spec: &QuantSpec,
    kind: Kind,
) -> Result<(CudaBuffer, Tensor, Option<Tensor>)> {
    let x = x.clone().aligned()?;
    let shape = [x.rows(), map.n().div_ceil(spec.group_size(map.n())?)];
    let codes = device.buffer(if kind == Kind::U8 { x.len() / 2 } else { x.len() }, kind, "codes")?;
    let scale = Tensor::on(device, &shape, DType::F32)?;
    let zero = (!spec.symmetric).then(|| Tensor::on(device, &shape, DType::F32)).transpose()?;
    let zeros = zero.as_ref().map(Tensor::view).transpose()?;
    let packed = || bytemuck::cast_slice(&map.packed()).to_vec();
    let table = (map.k() > 1).then(|| device.constant("Hadamard matrices", map.k(), &packed)).transpose()?;
    let tables = Tables { map, table: table.as_ref().map(|t| t.view(Kind::U32)), signs: None };
    launch(device.queue(), (codes.view(), scale.view()?, zeros), x.view()?, &tables, spec)?;
    Ok((codes, scale, zero))
}

/// The codes of `H x` of every row, with a scale for every group, and a zero point where the specification has some: signed bytes (`i8`), or two
/// codes of at most 4 bits a byte (`u8`), the first in the low half.
pub(crate) fn launch(
    queue: Queue<'_>,
    (codes, scale, zero): (View<'_>, View<'_>, Option<View<'_>>),
    x: View<'_>,
    tables: &Tables<'_>,
    spec: &QuantSpec,
) -> Result<()> {
    let what = "hadamard + codes";
    let c = Check::new(what, queue);
    let Tables { map, table, signs } = *tables;
    let (k, len, kind) = (map.k(), x.len(), x.kind());
    let (packed, group) = (codes.kind() == Kind::U8, spec.group_size(map.n())?);
    if let Some(dtype) = spec.stored {
        return Err(Error::argument(what, format!("expected scales as computed, got scales stored as {dtype}")));
    }
    if spec.clip == Clip::Search {
        return Err(Error::argument(what, "clip search is not available in one pass"));
    }
    if packed && (spec.bits > 4 || !group.is_multiple_of(2)) {
        let message = format!("expected at most 4 bits and even groups to pack two codes a byte, got {} and {group}", spec.bits);
        return Err(Error::argument(what, message));
    }
    if (k > 1) != table.is_some() || (signs.is_some() && map.blocks() > 1) {
        return Err(Error::argument(what, "a table for K > 1, and signs for one block only"));
    }
    let rows = c.rows(len, map.n())?;
    let groups = c.product(&[rows, map.n() / group])?;
    let work = Work::moving(what, x.bytes() + codes.bytes());
    let (of, bytes) = if packed { (Kind::U8, len / 2) } else { (Kind::I8, len) };
    let (codes, x) = (c.operand("codes", codes, of, bytes)?, c.operand("x", x, kind, len)?);
    let (scale, zero) = (c.operand("scale", scale, Kind::F32, groups)?, c.optional("zero", zero, Kind::F32, groups)?);
    let m = sq_hadamard_map {
        n: c.int(map.n())?,
        k: c.int(k)?,
        blocks: c.int(map.blocks())?,
        paired: map.is_paired().into(),
        transpose: 0,
        table: c.optional("table", table, Kind::U32, k * k.div_ceil(32))?.cast(),
        signs: c.optional("signs", signs, Kind::I8, map.n())?.cast(),
    };
    let (rows, quant, packed, dtype) = (c.long(rows)?, launch_spec(spec)?, i32::from(packed), c.code(kind)?);
    // SAFETY: x has rows · n values, codes as many bytes or half as many, scale and zero (or null) one value a group; the table has K rows
    // of ceil(K/32) words, the signs n values.
    c.launch(work, |s| unsafe { ffi!(sq_hadamard_quantise(codes, scale, zero, x, rows, m, quant, packed, dtype, s)) })
}

/// Worked cases: sizes for benches.
pub(crate) fn cases() -> Vec<Case> {
    let on_cpus: &[At] = &[(Place::Cpu, 4096, 4096, &[DType::F32])];
    let on_gpus = [4096, 8192, 11008, 14336, 28672].map(|n| (Place::Gpu, n, (1 << 28) / n, &[DType::BF16][..]));
    let sizes = [on_cpus, &on_gpus].concat();
    [Case::table(timed, &sizes), Case::table(timed_packed, &sizes)].concat()
}

fn timed(n: usize, rows: usize) -> Case {
    let spec = QuantSpec::activation(4, false);
    let call = move |x: &[Tensor]| {
        let (x, map, last) = (x[0].clone(), Hadamard::new(n)?, Rc::new(RefCell::new(None)));
        let codes = last.clone();
        Ok(Call {
            run: Box::new(move || {
                *last.borrow_mut() = Some(Codes::transformed(&x, &map, &spec)?);
                Ok(())
            }),
            results: Box::new(move || codes.borrow().iter().map(Codes::dequantize).collect()),
        })
    };
    let about = "Hadamard transform and asymmetric 4-bit quantisation of rows of n to codes of a byte (one pass on a GPU)";
    checked(("coded", "hadamard-codes", about), n, rows, Run::Call(Arc::new(call)), 1.5)
}

/// Two codes a byte, the first in the low half, where x is.
enum Packed {
    Cpu(Vec<u8>),
    Cuda(CudaBuffer),
}

impl Packed {
    /// The codes, with scales and zero points.
    fn transformed(x: &Tensor, map: &Hadamard, spec: &QuantSpec) -> Result<(Self, Tensor, Option<Tensor>)> {
        if let Device::Cuda(device) = x.device() {
            let (codes, scale, zero) = on_gpu(&device, x, map, spec, Kind::U8)?;
            return Ok((Self::Cuda(codes), scale, zero));
        }
        if !map.n().is_multiple_of(2) {
            return Err(Error::argument("hadamard codes", format!("expected rows of an even length to pack, got {}", map.n())));
        }
        let codes = Codes::transformed(x, map, spec)?;
        let bytes = codes.as_slice()?.chunks(2).map(|c| c[0] as u8 & 15 | (c[1] as u8) << 4).collect();
        Ok((Self::Cpu(bytes), codes.scale().clone(), codes.zero().cloned()))
    }

    fn unpacked(&self) -> Result<Vec<i8>> {
        let both = |&b: &u8| [((b << 4) as i8) >> 4, (b as i8) >> 4];
        match self {
            Self::Cpu(bytes) => Ok(bytes.iter().flat_map(both).collect()),
            Self::Cuda(codes) => {
                let mut bytes = vec![0u8; codes.len()];
                codes.download(0, &mut bytes)?;
                Ok(bytes.iter().flat_map(both).collect())
            }
        }
    }
}

fn timed_packed(n: usize, rows: usize) -> Case {
    let spec = QuantSpec::activation(4, false);
    let call = move |x: &[Tensor]| {
        let (x, map, last) = (x[0].clone(), Hadamard::new(n)?, Rc::new(RefCell::new(None)));
        let codes = last.clone();
        Ok(Call {
            run: Box::new(move || {
                *last.borrow_mut() = Some(Packed::transformed(&x, &map, &spec)?);
                Ok(())
            }),
            results: Box::new(move || {
                let values = |(codes, scale, zero): &(Packed, Tensor, Option<Tensor>)| {
                    Codes::on_cpu(codes.unpacked()?, scale, zero.as_ref(), [rows, n], n)?.dequantize()
                };
                codes.borrow().iter().map(values).collect()
            }),
        })
    };
    let about = "the same with two codes a byte";
    checked(("coded", "hadamard-packed-codes", about), n, rows, Run::Call(Arc::new(call)), 1.25)
}

/// `moved`: values of 16 bits that are read and written for each one.
fn checked(what: (&'static str, &'static str, &'static str), n: usize, rows: usize, run: Run, moved: f64) -> Case {
    let spec = QuantSpec::activation(4, false);
    Case::timed(what, (n, rows), vec![vec![rows, n]], run, move |x, y| {
        let map = Hadamard::new(n)?;
        exact::rows(n, x, &y[0], |_, got, x| {
            exact::quantised("hadamard codes", got, &exact::hadamard(&x[0], &map), &spec, DType::BF16)
        })
    })
    .moves(moved * n as f64 * rows as f64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Tape;
    use crate::ops::randn;

    /// What the codes stand for is what the operation makes, bit for bit.
    #[test]
    fn codes_are_those_of_the_operation() {
        for (n, block) in [(28, 28), (64, 16)] {
            let map = Hadamard::in_blocks(n, block).unwrap();
            for spec in
                [QuantSpec::activation(4, false), QuantSpec::activation(8, true), QuantSpec::activation(4, false).grouped(4)]
            {
                for dtype in [DType::F64, DType::F32] {
                    let x = randn([2, 3, n], 1).to_dtype(dtype).unwrap();
                    let want = Tape::new().constant(x.clone()).hadamard_fake_quant_by(&map, &spec).unwrap().into_value();
                    let got = Codes::transformed(&x, &map, &spec).unwrap();
                    assert_eq!((got.rows(), got.cols()), (6, n));
                    assert_eq!(got.dequantize().unwrap().to_f64_vec().unwrap(), want.to_f64_vec().unwrap());
                }
            }
            let error =
                Codes::transformed(&randn([2, n + 4], 1), &map, &QuantSpec::activation(4, false)).unwrap_err().to_string();
            assert!(error.contains(&format!("[.., {n}]")), "{error}");
        }
    }
}
