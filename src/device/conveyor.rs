//! What moves numbered items from one memory through a few slots of another, ahead of whoever uses them: layers of a network from the
//! host to a GPU. It only decides, and knows nothing of GPUs; a [`Belt`] does what it says.
//!
//! Two queues work at once: one copies, one uses. Two kinds of marks order them. A copy into a slot waits for the last use of what was
//! there (`free`), and a use waits for the copy (`filled`). Which items come next is known from the way that the user is on ([`Heading`]),
//! so as many are on their way as there are slots beside the one in use. A slot is given to another item only if none that comes sooner
//! has it: at the end of a forward pass the last items stay for the backward pass that begins with them.

use crate::{Error, Result};

/// The way through the items.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Heading {
    /// To the last, and then from the first again: passes without gradients.
    Around,
    /// To the last, and then back.
    Forth,
    /// To the first, and then forth again.
    Back,
}

/// Does the copies, and keeps the marks of both queues.
pub(crate) trait Belt {
    /// Enqueues a copy of an item into a slot, behind the last [`Belt::free`] of that slot.
    ///
    /// # Errors
    /// A failing copy; a slot that somebody holds.
    fn copy(&mut self, item: usize, slot: usize) -> Result<()>;
    /// What is enqueued from here on, to use items, waits for the last copy into the slot.
    ///
    /// # Errors
    /// Whatever the device reports; what failed in bringing the item since [`Belt::copy`].
    fn filled(&mut self, slot: usize) -> Result<()>;
    /// What was enqueued so far is all that uses what is in the slot.
    ///
    /// # Errors
    /// Whatever the device reports.
    fn free(&mut self, slot: usize) -> Result<()>;
}

#[derive(Clone, Copy, Debug, Default)]
struct Slot {
    item: Option<usize>,
    /// How many use it.
    users: usize,
}

/// Decides which item is in which slot.
#[derive(Debug)]
pub(crate) struct Conveyor {
    items: usize,
    slots: Vec<Slot>,
    /// Copies so far.
    copies: usize,
}

impl Conveyor {
    /// For so many items, with so many slots.
    ///
    /// # Errors
    /// Fewer than two slots: nothing could be copied while something is used.
    pub fn new(items: usize, slots: usize) -> Result<Self> {
        if slots < 2 {
            return Err(Error::argument("streaming", format!("expected at least 2 buffers, got {slots}")));
        }
        Ok(Self { items, slots: vec![Slot::default(); slots], copies: 0 })
    }

    /// How many copies were enqueued.
    pub fn copies(&self) -> usize {
        self.copies
    }

    /// The slot that has `item` for what is enqueued from here on, until [`Conveyor::done`]; begins to copy those that come next.
    ///
    /// # Errors
    /// No such item; every slot in use; those of the belt, after which the slot is empty.
    pub fn take(&mut self, item: usize, heading: Heading, belt: &mut dyn Belt) -> Result<usize> {
        if item >= self.items {
            return Err(Error::argument("streaming", format!("expected an item below {}, got {item}", self.items)));
        }
        let route = self.route(item, heading);
        let slot = match self.holding(item) {
            Some(slot) => slot,
            None => {
                let all = || Error::argument("streaming", format!("all {} buffers are in use at once", self.slots.len()));
                let slot = self.victim(&route, &[]).ok_or_else(all)?;
                self.copy(item, slot, belt)?;
                slot
            }
        };
        if let Err(e) = belt.filled(slot) {
            self.slots[slot].item = None;
            return Err(e);
        }
        self.slots[slot].users += 1;
        let soon = &route[..route.len().min(self.slots.len() - 1)];
        for &next in soon {
            if self.holding(next).is_none() {
                let Some(slot) = self.victim(&route, soon) else { break };
                // Nothing waits for it yet: whoever takes it tries again and hears of the error.
                if self.copy(next, slot, belt).is_err() {
                    break;
                }
            }
        }
        Ok(slot)
    }

    /// A slot that was taken is used no longer.
    ///
    /// # Errors
    /// A slot that nobody uses; those of the belt.
    pub fn done(&mut self, slot: usize, belt: &mut dyn Belt) -> Result<()> {
        let users = self.slots.get_mut(slot).map(|s| &mut s.users).filter(|users| **users > 0);
        let users = users.ok_or_else(|| Error::argument("streaming", format!("buffer {slot} is not in use")))?;
        *users -= 1;
        if *users == 0 { belt.free(slot) } else { Ok(()) }
    }

    fn copy(&mut self, item: usize, slot: usize, belt: &mut dyn Belt) -> Result<()> {
        self.slots[slot].item = None;
        belt.copy(item, slot)?;
        self.slots[slot].item = Some(item);
        self.copies += 1;
        Ok(())
    }

    fn holding(&self, item: usize) -> Option<usize> {
        self.slots.iter().position(|s| s.item == Some(item))
    }

    /// The slot to overwrite: an empty one, else the one whose item comes last on the route; none that is in use or has one of `kept`.
    fn victim(&self, route: &[usize], kept: &[usize]) -> Option<usize> {
        let turn = |slot: usize| self.slots[slot].item.map_or(usize::MAX, |item| place(route, item));
        let idle = (0..self.slots.len()).filter(|&s| self.slots[s].users == 0);
        idle.filter(|&s| self.slots[s].item.is_none_or(|item| !kept.contains(&item))).max_by_key(|&s| turn(s))
    }

    /// The other items in the order in which they come after `item`, each once.
    fn route(&self, item: usize, heading: Heading) -> Vec<usize> {
        let last = self.items - 1;
        match heading {
            Heading::Around => (item + 1..self.items).chain(0..item).collect(),
            Heading::Forth => (item + 1..=last).chain((0..item).rev()).collect(),
            Heading::Back => (0..item).rev().chain(item + 1..=last).collect(),
        }
    }
}

/// When an item comes on a route; that of the one in use, and only that, is at the end of all.
fn place(route: &[usize], item: usize) -> usize {
    route.iter().position(|&i| i == item).unwrap_or(route.len())
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use proptest::prelude::*;

    use super::*;

    /// What a queue does next.
    #[derive(Clone, Copy, Debug)]
    enum Step {
        WaitFilled(usize, usize),
        WaitFree(usize, usize),
        Filled(usize, usize),
        Free(usize, usize),
        Begin(usize),
        End(usize, usize),
        Use(usize, usize),
    }

    /// Two queues that have run nothing yet, and marks as CUDA's events: waiting is for the last record so far.
    #[derive(Default)]
    struct Queues {
        uses: VecDeque<Step>,
        copies: VecDeque<Step>,
        filled: Vec<usize>,
        free: Vec<usize>,
        fail: Option<usize>,
        /// What comes into this slot is lost on the way.
        lost: Option<usize>,
    }

    impl Belt for Queues {
        fn copy(&mut self, item: usize, slot: usize) -> Result<()> {
            if self.fail == Some(item) {
                return Err(Error::argument("copy", "fails"));
            }
            self.filled[slot] += 1;
            let (begin, end) = (Step::Begin(slot), Step::End(item, slot));
            self.copies.extend([Step::WaitFree(slot, self.free[slot]), begin, end, Step::Filled(slot, self.filled[slot])]);
            Ok(())
        }
        fn filled(&mut self, slot: usize) -> Result<()> {
            if self.lost == Some(slot) {
                return Err(Error::argument("copy", "is lost"));
            }
            self.uses.push_back(Step::WaitFilled(slot, self.filled[slot]));
            Ok(())
        }
        fn free(&mut self, slot: usize) -> Result<()> {
            self.free[slot] += 1;
            self.uses.push_back(Step::Free(slot, self.free[slot]));
            Ok(())
        }
    }

    impl Queues {
        fn new(slots: usize) -> Self {
            Self { filled: vec![0; slots], free: vec![0; slots], ..Self::default() }
        }

        /// Runs both queues, one step of either at a time as `copies_first` says, and checks what every use finds.
        fn run(self, slots: usize, copies_first: &[bool]) {
            let Self { mut uses, mut copies, .. } = self;
            let (mut filled, mut free) = (vec![0; slots], vec![0; slots]);
            // What is in a slot; nothing while it is written.
            let mut memory: Vec<Option<usize>> = vec![None; slots];
            let mut turn = copies_first.iter().cycle();
            while !uses.is_empty() || !copies.is_empty() {
                let ready = |queue: &VecDeque<Step>| match queue.front() {
                    Some(&Step::WaitFilled(slot, mark)) => filled[slot] >= mark,
                    Some(&Step::WaitFree(slot, mark)) => free[slot] >= mark,
                    other => other.is_some(),
                };
                let (can_use, can_copy) = (ready(&uses), ready(&copies));
                assert!(can_use || can_copy, "both queues wait: {uses:?} {copies:?}");
                let copy = if can_use && can_copy { *turn.next().unwrap() } else { can_copy };
                match if copy { copies.pop_front() } else { uses.pop_front() }.unwrap() {
                    Step::Filled(slot, mark) => filled[slot] = mark,
                    Step::Free(slot, mark) => free[slot] = mark,
                    Step::Begin(slot) => memory[slot] = None,
                    Step::End(item, slot) => memory[slot] = Some(item),
                    Step::Use(item, slot) => assert_eq!(memory[slot], Some(item), "buffer {slot}"),
                    Step::WaitFilled(..) | Step::WaitFree(..) => {}
                }
            }
        }
    }

    /// The passes of steps: each once forth and back, or around.
    fn passes(items: usize, kinds: &[bool]) -> Vec<Vec<(usize, Heading)>> {
        let forth = |heading| (0..items).map(move |i| (i, heading)).collect::<Vec<_>>();
        let back = || (0..items).rev().map(|i| (i, Heading::Back)).collect();
        kinds
            .iter()
            .flat_map(|&learns| if learns { vec![forth(Heading::Forth), back()] } else { vec![forth(Heading::Around)] })
            .collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig { rng_seed: proptest::test_runner::RngSeed::Fixed(16), cases: 400, ..ProptestConfig::default() })]

        /// No use before arrival, no overwriting before the last use, and every item is there once a pass, whatever the speeds of the queues.
        #[test]
        fn every_use_finds_its_item(
            items in 1usize..12, slots in 2usize..5, kinds in prop::collection::vec(any::<bool>(), 1..5),
            copies_first in prop::collection::vec(any::<bool>(), 1..40), lazy in any::<bool>(),
        ) {
            let (mut conveyor, mut queues) = (Conveyor::new(items, slots).unwrap(), Queues::new(slots));
            for pass in passes(items, &kinds) {
                let mut seen = vec![0; items];
                let mut held: Option<usize> = None;
                for (item, heading) in pass {
                    let slot = conveyor.take(item, heading, &mut queues).unwrap();
                    seen[item] += 1;
                    queues.uses.extend([Step::Use(item, slot); 3]);
                    // One user that lets go late, as memory that is freed behind the next layer.
                    if let Some(slot) = held.replace(slot) {
                        conveyor.done(slot, &mut queues).unwrap();
                    }
                    if !lazy {
                        conveyor.done(held.take().unwrap(), &mut queues).unwrap();
                    }
                }
                held.map_or(Ok(()), |slot| conveyor.done(slot, &mut queues)).unwrap();
                prop_assert_eq!(seen, vec![1; items]);
            }
            queues.run(slots, &copies_first);
        }
    }

    /// After the first pass the slots' own items are not copied again; what turns round is still there; passes around copy all.
    #[test]
    fn no_more_is_copied_than_must_be() {
        for (items, slots) in [(10, 3), (10, 2), (7, 4), (3, 3), (2, 4), (1, 2)] {
            let copies = |kinds: &[bool]| {
                let (mut conveyor, mut queues) = (Conveyor::new(items, slots).unwrap(), Queues::new(slots));
                for (item, heading) in passes(items, kinds).concat() {
                    let slot = conveyor.take(item, heading, &mut queues).unwrap();
                    conveyor.done(slot, &mut queues).unwrap();
                }
                conveyor.copies()
            };
            let rest = items.saturating_sub(slots);
            assert_eq!(copies(&[true; 3]) - copies(&[true; 2]), 2 * rest, "{items} {slots}");
            assert_eq!(copies(&[true]), items + rest, "{items} {slots}");
            let around = copies(&[false; 4]) - copies(&[false; 3]);
            assert_eq!(around, if rest == 0 { 0 } else { items }, "{items} {slots}");
        }
    }

    #[test]
    fn misuse_and_failures_are_errors() {
        assert!(Conveyor::new(3, 1).unwrap_err().to_string().contains("at least 2 buffers, got 1"));
        let (mut conveyor, mut queues) = (Conveyor::new(5, 2).unwrap(), Queues::new(2));
        assert!(conveyor.take(5, Heading::Around, &mut queues).unwrap_err().to_string().contains("below 5, got 5"));
        assert!(conveyor.done(0, &mut queues).unwrap_err().to_string().contains("buffer 0 is not in use"));
        let slots = [0, 1].map(|item| conveyor.take(item, Heading::Forth, &mut queues).unwrap());
        assert!(conveyor.take(2, Heading::Forth, &mut queues).unwrap_err().to_string().contains("all 2 buffers are in use"));
        for slot in slots {
            conveyor.done(slot, &mut queues).unwrap();
        }
        // What fails while it is fetched ahead is an error where it is taken, and what was there is not taken for it.
        queues.fail = Some(3);
        conveyor.take(2, Heading::Forth, &mut queues).map(|slot| conveyor.done(slot, &mut queues).unwrap()).unwrap();
        assert!(conveyor.take(3, Heading::Forth, &mut queues).unwrap_err().to_string().contains("fails"));
        queues.fail = None;
        // What does not arrive is copied again when it is taken again, and not taken for there.
        queues.lost = conveyor.victim(&conveyor.route(3, Heading::Forth), &[]);
        assert!(conveyor.take(3, Heading::Forth, &mut queues).unwrap_err().to_string().contains("is lost"));
        queues.lost = None;
        let before = conveyor.copies();
        let slot = conveyor.take(3, Heading::Forth, &mut queues).unwrap();
        assert!(conveyor.copies() > before);
        queues.uses.push_back(Step::Use(3, slot));
        queues.run(2, &[true, false]);
    }
}
