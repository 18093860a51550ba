//! Codes and zero points as bits in 32-bit words.

use crate::grid::{QuantSpec, Quantized};
use crate::{DType, Error, Result, Tensor};

/// Words that hold `count` values of `bits`.
pub fn words(count: usize, bits: u32) -> usize {
    (count * bits as usize).div_ceil(32)
}

/// A quantised weight as the files hold it.
#[derive(Clone, Debug)]
pub struct Packed {
    /// Rows and columns of the weight.
    pub shape: [usize; 2],
    /// `[out, words(in)]`.
    pub weight: Vec<u32>,
    /// `[out, groups]` in the type of the file.
    pub scale: Tensor,
    /// `[words(out), groups]`; none where symmetric.
    pub zero_point: Option<Vec<u32>>,
}

impl Packed {
    /// Packs a weight whose grids were found with [`QuantSpec::stored`].
    ///
    /// # Errors
    /// A weight that is not `[out, in]`, codes or zero points outside the grid, a scale that is none of the stored type.
    pub fn new(name: &str, q: &Quantized, spec: &QuantSpec) -> Result<Self> {
        let dtype = spec.stored.ok_or_else(|| Error::argument(name, "expected scales of the type of a file, got none"))?;
        let [rows, cols] = q.shape[..] else { return Err(Error::shape(name, "[out, in]", &q.shape)) };
        let group = spec.group_size(cols)?;
        let groups = cols / group;
        if q.group != group || q.codes.len() != rows * cols || q.scale.len() != rows * groups || q.zero.len() != q.scale.len() {
            let (want, got) = (rows * groups, q.scale.len());
            let message = format!("expected groups of {group} and {want} scales, got groups of {} and {got}", q.group);
            return Err(Error::argument(name, message));
        }
        let (min, max) = (spec.min_code(), spec.max_code());
        let stored = |what: &str, x: f64| match x {
            x if x.fract() == 0.0 && (f64::from(min)..=f64::from(max)).contains(&x) => Ok((x as i32 - min) as u32),
            x => Err(Error::argument(name, format!("expected {what} from {min} to {max}, got {x}"))),
        };
        let codes = q.codes.iter().map(|&c| stored("codes", c.into())).collect::<Result<Vec<_>>>()?;
        let scale = q.scale.to_dtype(dtype)?.reshape([rows, groups])?;
        if scale.to_f64_vec()? != q.scale.to_f64_vec()? {
            return Err(Error::argument(name, format!("expected scales that are {dtype}, got others")));
        }
        let zero = q.zero.to_f64_vec()?;
        let zero_point = match spec.symmetric {
            true if zero.iter().any(|z| *z != 0.0) => {
                return Err(Error::argument(name, "expected no zero points on a symmetric grid"));
            }
            true => None,
            false => {
                let zero = zero.into_iter().map(|z| stored("zero points", z)).collect::<Result<Vec<_>>>()?;
                Some(transpose(&pack(&transpose(&zero, groups), rows, spec.bits), words(rows, spec.bits)))
            }
        };
        Ok(Self { shape: [rows, cols], weight: pack(&codes, cols, spec.bits), scale, zero_point })
    }

    /// The codes and grids back, scales in `f32` (`f64` where they are stored so).
    ///
    /// # Errors
    /// Numbers of words or scales that do not fit the shape.
    pub fn quantized(&self, name: &str, spec: &QuantSpec) -> Result<Quantized> {
        let [rows, cols] = self.shape;
        let group = spec.group_size(cols)?;
        let groups = cols / group;
        let check = |what: &str, want: usize, got: usize| match want == got {
            true => Ok(()),
            false => Err(Error::argument(name, format!("expected {want} {what}, got {got}"))),
        };
        check("words of codes", rows * words(cols, spec.bits), self.weight.len())?;
        check("scales", rows * groups, self.scale.len())?;
        let wide = if self.scale.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
        let min = spec.min_code();
        let codes = unpack(&self.weight, cols, spec.bits).into_iter().map(|c| (c as i32 + min) as i16).collect();
        let zero = match &self.zero_point {
            Some(zero) => {
                check("words of zero points", words(rows, spec.bits) * groups, zero.len())?;
                let zero = transpose(&unpack(&transpose(zero, groups), rows, spec.bits), rows);
                zero.into_iter().map(|z| f64::from(z as i32 + min)).collect()
            }
            None if spec.symmetric => vec![0.0; rows * groups],
            None => return Err(Error::argument(name, "expected zero points of an asymmetric grid, got none")),
        };
        let grid = [rows, groups];
        Ok(Quantized {
            shape: self.shape.to_vec(),
            group,
            codes,
            scale: self.scale.to_dtype(wide)?.reshape(grid)?,
            zero: Tensor::from_vec(zero, grid)?.to_dtype(wide)?,
        })
    }
}

/// Rows of `count` values, each below 2^bits, as rows of words.
fn pack(values: &[u32], count: usize, bits: u32) -> Vec<u32> {
    let row = |row: &[u32]| {
        let mut packed = vec![0u32; words(count, bits)];
        for (i, &value) in row.iter().enumerate() {
            let (word, shift) = (i * bits as usize / 32, (i * bits as usize % 32) as u32);
            packed[word] |= value << shift;
            if shift + bits > 32 {
                packed[word + 1] |= value >> (32 - shift);
            }
        }
        packed
    };
    values.chunks(count.max(1)).flat_map(row).collect()
}

/// Rows of `count` values back from [`pack`].
fn unpack(packed: &[u32], count: usize, bits: u32) -> Vec<u32> {
    let row = |row: &[u32]| -> Vec<u32> {
        let value = |i: usize| {
            let (word, shift) = (i * bits as usize / 32, (i * bits as usize % 32) as u32);
            let high = if shift + bits > 32 { row[word + 1] << (32 - shift) } else { 0 };
            (row[word] >> shift | high) & ((1 << bits) - 1)
        };
        (0..count).map(value).collect()
    };
    packed.chunks(words(count, bits).max(1)).flat_map(row).collect()
}

/// Rows of `cols` values as columns.
fn transpose(values: &[u32], cols: usize) -> Vec<u32> {
    (0..cols).flat_map(|c| values.iter().skip(c).step_by(cols.max(1)).copied()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every width, rows that end inside a word, values over the boundary of two.
    #[test]
    fn what_is_packed_comes_back() {
        for bits in 2..=8u32 {
            for cols in [1, 7, 8, 31, 32, 33, 100] {
                let values: Vec<u32> = (0..3 * cols as u32).map(|i| (i * i * 7 + 5 * i) % (1 << bits)).collect();
                let packed = pack(&values, cols, bits);
                assert_eq!(packed.len(), 3 * words(cols, bits));
                assert_eq!(unpack(&packed, cols, bits), values, "{bits} bits, rows of {cols}");
            }
        }
        // By hand: eight nibbles a word, the first the lowest; 3 bits run over the end of a word at value 10.
        assert_eq!(pack(&[1, 2, 3, 4, 5, 6, 7, 8, 9], 9, 4), [0x8765_4321, 9]);
        assert_eq!(pack(&[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7], 11, 3), [3 << 30, 1]);
        assert_eq!(transpose(&[1, 2, 3, 4, 5, 6], 3), [1, 4, 2, 5, 3, 6]);
    }
}
