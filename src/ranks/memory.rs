//! Main memory that the ranks of a machine have in common.

use std::sync::Arc;

use super::Group;
use crate::device::cpu::available_bytes;
use crate::device::shared::{Offer, SharedBytes};
use crate::{Error, Result};

/// Memory of the ranks of this machine.
#[derive(Clone, Debug)]
pub(crate) struct Common {
    pub bytes: Arc<SharedBytes>,
    /// This rank writes it, before all ranks [meet](Group::any); from then on all read.
    pub fills: bool,
}

/// Why the ranks of a machine have no memory in common.
#[derive(Clone, Debug)]
pub(crate) struct Apart {
    pub why: String,
    /// How many ranks are on this machine.
    pub ranks: usize,
    /// Bytes that were free before any of them took some, where the system tells.
    pub free: Option<usize>,
}

/// What tells machines apart; nothing where that is not known.
fn machine() -> Option<String> {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()
}

impl Group {
    /// So many zeros of main memory for all ranks of a machine, which the first of them makes. All ranks call this.
    ///
    /// # Errors
    /// Those of [`Group::gather`]. Where the memory cannot be had, or a rank cannot map it, every rank of the machine gets the reason.
    pub(crate) fn common_memory(&self, bytes: usize) -> Result<std::result::Result<Common, Apart>> {
        self.common_memory_by(bytes, machine(), SharedBytes::open)
    }

    fn common_memory_by(
        &self,
        bytes: usize,
        machine: Option<String>,
        open: impl Fn(&str, usize) -> std::result::Result<SharedBytes, String>,
    ) -> Result<std::result::Result<Common, Apart>> {
        let texts = |all: Vec<Vec<u8>>| -> Vec<String> { all.iter().map(|b| String::from_utf8_lossy(b).into_owned()).collect() };
        let machine = machine.unwrap_or_else(|| format!("rank {}", self.rank()));
        let all = texts(self.gather("the machines of ranks", machine.into_bytes())?);
        let here: Vec<usize> = (0..self.world()).filter(|&rank| all[rank] == all[self.rank()]).collect();
        let first = here[0];
        // Told by the first: bytes that are free, and where the memory is or why there is none.
        let mut made: Option<std::result::Result<(SharedBytes, Offer), String>> = None;
        let mut told = String::new();
        if self.rank() == first {
            let free = available_bytes().map_or(String::new(), |free| free.to_string());
            let outcome = made.insert(SharedBytes::create(bytes));
            told = match outcome {
                Ok((_, offer)) => format!("{free}\n+{}", offer.address),
                Err(why) => format!("{free}\n-{why}"),
            };
        }
        let told = texts(self.gather("memory in common", told.into_bytes())?).swap_remove(first);
        let odd = || Error::argument("ranks", format!("expected where memory is, got {told:?}"));
        let (free, place) = told.split_once('\n').ok_or_else(odd)?;
        let mapped = match (made, place.strip_prefix('+')) {
            (Some(Ok((bytes, offer))), _) => Ok((bytes, Some(offer))),
            (Some(Err(why)), _) => Err(why),
            (None, Some(address)) => open(address, bytes).map(|bytes| (bytes, None)),
            (None, None) => Err(place.trim_start_matches('-').to_string()),
        };
        let why = mapped.as_ref().err().cloned().unwrap_or_default();
        let why = texts(self.gather("memory that is mapped", why.into_bytes())?);
        match (mapped, here.iter().find(|&&rank| !why[rank].is_empty())) {
            // The offer ends here, for all have the memory.
            (Ok((bytes, _)), None) => Ok(Ok(Common { bytes: Arc::new(bytes), fills: self.rank() == first })),
            (_, odd) => {
                let why = odd.map_or_else(String::new, |&rank| why[rank].clone());
                Ok(Err(Apart { why, ranks: here.len(), free: free.parse().ok() }))
            }
        }
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;
    use crate::ranks::tests::{LONG, ranks};

    #[test]
    fn ranks_of_a_machine_have_memory_in_common() {
        // Two machines: ranks 0 and 2, and rank 1.
        let found = ranks(3, LONG, |group| {
            let machine = Some(format!("machine {}", group.rank() % 2));
            let common = group.common_memory_by(1 << 12, machine, SharedBytes::open).unwrap().unwrap();
            if common.fills {
                // SAFETY: the others read once all have met.
                let first = unsafe { common.bytes.bytes_mut(0, 1) };
                first[0] = 10 + group.rank() as u8;
            }
            group.any("all is written", false).unwrap();
            // SAFETY: it is written no more.
            let part = unsafe { crate::device::shared::SharedPart::new(&common.bytes, 0, 2) };
            (common.fills, part.bytes().to_vec())
        });
        assert_eq!(found, [(true, vec![10, 0]), (true, vec![11, 0]), (false, vec![10, 0])]);
    }

    #[test]
    fn where_one_cannot_map_it_all_of_its_machine_are_told() {
        let found = ranks(4, LONG, |group| {
            let machine = Some(format!("machine {}", group.rank() % 2));
            let open =
                |address: &str, len| if group.rank() == 3 { Err("not mine".into()) } else { SharedBytes::open(address, len) };
            group.common_memory_by(1 << 12, machine, open).unwrap().map(|_| ()).map_err(|apart| (apart.why, apart.ranks))
        });
        let apart = Err(("not mine".to_string(), 2));
        assert_eq!(found, [Ok(()), apart.clone(), Ok(()), apart]);
        let none = ranks(2, LONG, |group| group.common_memory(1 << 55).unwrap().unwrap_err());
        assert!(
            none.iter().all(|apart| apart.why.contains("GiB are free") && apart.ranks == 2 && apart.free.is_some()),
            "{none:?}"
        );
    }
}
