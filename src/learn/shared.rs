//! What ranks that share a run tell one another besides gradients: that they do the same, have the same rotations, and whether to stop.

use super::{LearnOptions, Progress, Settings};
use crate::data::Windows;
use crate::llama::Llama;
use crate::ranks::Group;
use crate::rotation::Rotations;
use crate::{Error, Result, io};

/// Steps between comparisons of rotations that are on a GPU, which they are copied from.
const EVERY: usize = 8;

/// Fails unless all ranks begin, or go on, in the same way.
pub(super) fn agree(ranks: &Group, windows: &Windows, settings: &Settings, now: &Progress) -> Result<()> {
    if ranks.world() == 1 {
        return Ok(());
    }
    // How a rank runs its share is its own affair.
    let Settings { scheme, learning_rate, schedule, held_out, .. } = settings;
    let told = format!("{scheme:?} {learning_rate} {schedule:?} {held_out}");
    ranks.same("the settings of the run", told.into_bytes())?;
    ranks.same("the windows of the text", windows.checksum().into_bytes())?;
    ranks.same("the steps already done", now.step.to_le_bytes().to_vec())?;
    ranks.same("the rotations to begin with", checksum(&now.rotations)?.to_vec())
}

/// Whether all ranks run a step in the same way, and can share what does not shrink with its batch.
pub(super) fn alike(options: &LearnOptions, model: &Llama, settings: &Settings) -> Result<bool> {
    let ranks = &options.ranks;
    if !options.shares_rows(ranks.world()) {
        return Ok(false);
    }
    let Settings { micro_batch, recompute, .. } = settings;
    let how = format!("{micro_batch} {recompute:?} {:?} {}", model.placement(), model.device().is_cpu());
    let all = ranks.gather("how a step runs", how.into_bytes())?;
    Ok(all.iter().all(|of| *of == all[0]))
}

/// Fails unless all ranks have the same rotations, bit by bit; whether any of them is to stop.
pub(super) fn after_step(ranks: &Group, now: &Progress, steps: usize, stop: bool) -> Result<bool> {
    if ranks.world() == 1 {
        return Ok(stop);
    }
    let compared = now.rotations.r1.device().is_cpu() || now.step.is_multiple_of(EVERY) || now.step == steps;
    let mut told = vec![u8::from(stop)];
    if compared {
        told.extend(checksum(&now.rotations)?);
    }
    let all = ranks.gather("the end of a step", told)?;
    if let Some(rank) = all.iter().position(|of| of[1..] != all[0][1..]) {
        let message = format!("step {}: its rotations differ from those of rank 0", now.step);
        return Err(Error::Rank { rank, message });
    }
    Ok(all.iter().any(|of| of[0] == 1))
}

/// A checksum of every bit: a word after the other is mixed in by a product with an odd number (the constant of Steele & Vigna 2021), which
/// is many times faster than one of bytes.
fn checksum(rotations: &Rotations) -> Result<[u8; 8]> {
    let mut sum = 0u64;
    for (_, t) in rotations.tensors() {
        let t = t.to_device(&crate::Device::Cpu)?;
        for bytes in io::bytes(&t)?.chunks(8) {
            let mut word = [0; 8];
            word[..bytes.len()].copy_from_slice(bytes);
            sum = (sum ^ u64::from_le_bytes(word)).wrapping_mul(0xd134_2543_de82_ef95).rotate_left(29);
        }
    }
    Ok(sum.to_le_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_bit_and_one_place_change_the_checksum() {
        let rotations = Rotations::random_hadamard(8, 4, 2, 0).unwrap();
        let of = |change: &dyn Fn(&mut Vec<f64>)| {
            let mut values = rotations.r2.to_vec::<f64>().unwrap();
            change(&mut values);
            let r2 = crate::Tensor::from_vec(values, rotations.r2.shape()).unwrap();
            checksum(&Rotations::new(rotations.r1.clone(), r2)).unwrap()
        };
        let (first, one_bit) = (of(&|_| ()), of(&|v| v[5] = f64::from_bits(v[5].to_bits() ^ 1)));
        assert_eq!(first, checksum(&rotations).unwrap());
        assert_ne!(first, one_bit);
        assert_ne!(first, of(&|v| v.rotate_left(1)));
        assert_ne!(first, of(&|v| v[31] = -v[31]));
    }
}
