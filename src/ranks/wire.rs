//! What goes over a connection: frames, and numbers as the machine has them (every one that is supported has the low byte first).

use std::io::{self, Read, Write};

use crate::{Element, Error, Result};

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// A sign of life.
    Beat,
    /// Part of a collective operation.
    Data,
    /// The sender, or a rank that it speaks for, cannot go on.
    Failure,
    /// The sender ends, and all is well.
    Bye,
}

/// The most bytes that a frame may claim to have.
const MOST: u64 = 1 << 40;

/// Writes a frame.
pub(super) fn write(to: &mut impl Write, kind: Kind, payload: &[u8]) -> io::Result<()> {
    let mut head = [0; 9];
    head[0] = kind as u8;
    head[1..].copy_from_slice(&(payload.len() as u64).to_le_bytes());
    to.write_all(&head)?;
    to.write_all(payload)?;
    to.flush()
}

/// Reads a frame.
pub(super) fn read(from: &mut impl Read) -> io::Result<(Kind, Vec<u8>)> {
    let mut head = [0; 9];
    from.read_exact(&mut head)?;
    let kind = [Kind::Beat, Kind::Data, Kind::Failure, Kind::Bye].into_iter().find(|kind| *kind as u8 == head[0]);
    let len = u64::from_le_bytes(head[1..].try_into().expect("eight bytes"));
    let odd = || io::Error::new(io::ErrorKind::InvalidData, "what came is no frame of a rank");
    let (kind, len) = kind.zip(Some(len).filter(|len| *len <= MOST)).ok_or_else(odd)?;
    // Grown by what comes, not by what is claimed.
    let mut payload = vec![];
    from.take(len).read_to_end(&mut payload)?;
    if payload.len() as u64 == len { Ok((kind, payload)) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
}

/// Numbers that are added at rank 0.
pub(super) trait Number: Element + std::ops::AddAssign {}
impl Number for f32 {}
impl Number for f64 {}

/// The bytes of numbers.
pub(super) fn to_bytes<T: Element>(values: &[T]) -> Vec<u8> {
    bytemuck::cast_slice(values).to_vec()
}

/// Numbers of bytes, what is left over dropped.
pub(super) fn from_bytes<T: Element>(bytes: &[u8]) -> Vec<T> {
    let whole = bytes.len() / size_of::<T>() * size_of::<T>();
    bytemuck::pod_collect_to_vec(&bytes[..whole])
}

/// The sums of as many numbers of every rank, in the order of the ranks.
pub(super) fn sum<T: Number>(what: &str, all: &[Vec<u8>]) -> Result<Vec<u8>> {
    let mut sums: Vec<T> = from_bytes(&all[0]);
    for (rank, bytes) in all.iter().enumerate().skip(1) {
        if bytes.len() != all[0].len() {
            let (expected, got) = (all[0].len(), bytes.len());
            let message = format!("{what}: expected {expected} bytes as rank 0 has, got {got}");
            return Err(Error::Rank { rank, message });
        }
        sums.iter_mut().zip(from_bytes::<T>(bytes)).for_each(|(sum, x)| *sum += x);
    }
    Ok(to_bytes(&sums))
}

/// Several byte strings as one.
pub(super) fn join(all: &[Vec<u8>]) -> Vec<u8> {
    let mut joined = vec![];
    for bytes in all {
        joined.extend((bytes.len() as u64).to_le_bytes());
        joined.extend(bytes);
    }
    joined
}

/// Back from [`join`].
pub(super) fn split(mut joined: &[u8]) -> Result<Vec<Vec<u8>>> {
    let mut all = vec![];
    while !joined.is_empty() {
        let cut = joined.split_first_chunk().map(|(len, rest)| (u64::from_le_bytes(*len) as usize, rest));
        let (len, rest) =
            cut.filter(|(len, rest)| *len <= rest.len()).ok_or_else(|| Error::argument("ranks", "half a list came"))?;
        all.push(rest[..len].to_vec());
        joined = &rest[len..];
    }
    Ok(all)
}
