//! The fastest way of running a step that fits.

use super::sizes::Sizes;
use super::{Planned, Room, Work, predict_checked};
use crate::device::Card;
use crate::llama::{Linear, LlamaConfig, Placement, Plan};
use crate::{DType, Error, Result};

/// The fastest way to run a step within so many bytes on this card and, where the work leaves open where the layers are, of main memory.
///
/// # Errors
/// Nothing fits: says what the leanest plan needs, of which memory how much is missing, and which setting would help. No sequence or token,
/// or sizes whose bytes a machine word cannot count.
pub fn plan(config: &LlamaConfig, work: &Work, room: impl Into<Room>, card: &Card) -> Result<Planned> {
    work.check(config, 1)?;
    let room = room.into();
    let fewest = if room.host == 0 { config.layers } else { 0 };
    let placements = match work.placement {
        Some(placement) => vec![placement],
        None => (fewest..=config.layers).rev().map(|resident| placed(config, work, resident, room)).collect(),
    };
    let (mut found, mut each) = (Found::default(), vec![]);
    for placement in placements {
        found.try_all(config, work, placement, room, card);
        each.extend(found.best.take());
    }
    let fastest = each.iter().map(|p| p.seconds).fold(f64::INFINITY, f64::min);
    // The first of those that are about as fast: it has most on the card.
    let best = each.into_iter().find(|p| p.seconds <= ABOUT * fastest);
    best.ok_or_else(|| refusal(config, work, room, found.leanest, found.shortest))
}

/// So many layers on the card, and as many of the others in main memory as it has room for, where the rest may be read.
fn placed(config: &LlamaConfig, work: &Work, resident: usize, room: Room) -> Placement {
    let all = Placement { resident, ..Placement::RESIDENT };
    let host = |placement| Sizes::new(config, &Work { placement: Some(placement), ..*work }).host();
    if !room.files || host(all) <= room.host {
        return all;
    }
    let streamed = all.streamed(config.layers);
    let some = (0..streamed).rev().map(|hosted| Placement { hosted, ..all });
    some.into_iter().find(|&placement| host(placement) <= room.host).unwrap_or(Placement { hosted: 0, ..all })
}

/// Less time than this is not worth more copies: other work on the host slows those down.
const ABOUT: f64 = 1.02;

#[derive(Default)]
struct Found {
    /// The fastest that fits, of one placement.
    best: Option<Planned>,
    /// The one that takes least of the card.
    leanest: Option<Planned>,
    /// Of those that fit the card but not main memory, the one that takes least of that.
    shortest: Option<Planned>,
}

impl Found {
    fn try_all(&mut self, config: &LlamaConfig, work: &Work, placement: Placement, room: Room, card: &Card) {
        let work = &Work { placement: Some(placement), ..*work };
        let streamed = placement.streamed(config.layers);
        // More at once than the budget has room for one row of the stream a token cannot fit.
        let most = (room.card / work.seq.saturating_mul(config.hidden_size * work.dtype.size())).clamp(1, MOST_AT_ONCE);
        for micro in divisors(work.batch, most).into_iter().filter(|&micro| work.check(config, micro).is_ok()) {
            for keep_weights in [true, false] {
                for sequences in std::iter::once(0).chain(divisors(micro, micro).into_iter().skip(1)) {
                    for recompute in streamed..=config.layers {
                        let plan = Plan { recompute, keep_weights, sequences };
                        self.see(predict_checked(config, work, plan, micro, card), room);
                    }
                }
            }
        }
    }

    fn see(&mut self, planned: Planned, room: Room) {
        let bytes = planned.bytes();
        if self.leanest.as_ref().is_none_or(|p| bytes < p.bytes()) {
            self.leanest = Some(planned.clone());
        }
        if bytes > room.card {
            return;
        }
        if planned.host > room.host && planned.host > 0 {
            if self.shortest.as_ref().is_none_or(|p| planned.host < p.host) {
                self.shortest = Some(planned);
            }
        } else if self.best.as_ref().is_none_or(|p| planned.seconds < p.seconds) {
            self.best = Some(planned);
        }
    }
}

fn refusal(config: &LlamaConfig, work: &Work, room: Room, leanest: Option<Planned>, shortest: Option<Planned>) -> Error {
    let gib = |bytes: usize| bytes as f64 / f64::from(1 << 30);
    if let Some(p) = shortest {
        let streamed = p.placement.streamed(config.layers);
        return Error::argument(
            "memory",
            format!(
                "main memory is short by {:.1} GiB: {streamed} of {} layers do not fit the card, {:.1} GiB, and {:.1} are free; more of \
                 either, or a shorter --seq-len than {}, would help",
                gib(p.host - room.host),
                config.layers,
                gib(p.host),
                gib(room.host),
                work.seq
            ),
        );
    }
    let needed = leanest.map_or(0, |p| p.bytes());
    let weights = Sizes::new(config, work).weights();
    let streams = work.placement.is_none() && room.host > 0;
    let help = if weights > room.card && !streams {
        format!("the weights alone are {:.1} GiB; use a smaller model or a card with more memory", gib(weights))
    } else {
        format!("a shorter --seq-len than {} would help, or --memory {}GiB if the card has it", work.seq, gib(needed).ceil())
    };
    let layers = if streams { ", with layers in main memory" } else { "" };
    let short = gib(needed.saturating_sub(room.card));
    Error::argument(
        "memory",
        format!(
            "the leanest plan{layers} needs {:.1} GiB of the card, {:.1} are allowed, {short:.1} are missing: {help}",
            gib(needed),
            gib(room.card)
        ),
    )
}

/// Where the layers of a model are for work without gradients: as many on the card as leave room for `count` networks of its size at once,
/// for a layer in `f64` twice, and for `beside` bytes.
///
/// # Errors
/// What does not fit: of which memory how much is missing.
pub fn networks(config: &LlamaConfig, dtype: DType, count: usize, beside: usize, room: Room) -> Result<Placement> {
    let weights: usize = Linear::ALL.map(|l| l.shape(config)[0] * l.shape(config)[1]).iter().sum();
    let (layer, tables) = (weights * dtype.size(), 2 * config.vocab_size * config.hidden_size * dtype.size());
    let fixed = count * tables + 2 * weights * 8 + beside;
    let at = |resident: usize| {
        let placement = Placement { resident, ..Placement::RESIDENT };
        let streamed = placement.streamed(config.layers);
        let buffers = if streamed == 0 { 0 } else { placement.buffers.min(streamed).max(2) };
        (fixed + count * layer * (resident + buffers), count * layer * streamed)
    };
    let gib = |bytes: usize| bytes as f64 / f64::from(1 << 30);
    let short = |what: &str, needed: usize, has: usize| {
        let missing = gib(needed - has);
        let message = format!("{what} is short by {missing:.1} GiB: {:.1} are needed, {:.1} are free", gib(needed), gib(has));
        Err(Error::argument("memory", message))
    };
    match (0..=config.layers).rev().map(|resident| (resident, at(resident))).find(|(_, (card, _))| *card <= room.card) {
        Some((_, (_, host))) if host > room.host => short("main memory", host, room.host),
        Some((resident, _)) if resident == config.layers => Ok(Placement::RESIDENT),
        Some((resident, _)) => Ok(Placement { resident, ..Placement::RESIDENT }),
        None => short("the card", at(0).0, room.card),
    }
}

/// Sequences at once beyond which nothing gets faster.
const MOST_AT_ONCE: usize = 1 << 16;

/// The divisors of n up to `most`, the largest first.
pub(super) fn divisors(n: usize, most: usize) -> Vec<usize> {
    (1..=n.min(most)).rev().filter(|d| n.is_multiple_of(*d)).collect()
}
