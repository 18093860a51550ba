use super::search::divisors;
use super::*;
use crate::llama::Linear;
use crate::llama::synthetic::shape;
use crate::quant::Engine;
use crate::rotation::Scale;

fn work(scheme: Scheme) -> Work {
    Work::new(scheme, 8, 2048, DType::BF16)
}

#[test]
fn no_size_hangs_or_overflows() {
    let (card, start) = (Card::h100(), std::time::Instant::now());
    let sizes = [1, 2, 3, 2048, 1 << 20, 1 << 32, (1 << 53) - 111, usize::MAX - 1, usize::MAX];
    for name in ["tiny", "llama-2-7b"] {
        let config = shape(name).unwrap();
        for needs in [Needs::Network, Needs::Logits, Needs::Rows, Needs::States] {
            for (batch, seq) in sizes.iter().flat_map(|&b| sizes.iter().map(move |&s| (b, s))) {
                let work = Work { needs, batch, seq, ..work(Scheme::new(4, 4, 4)) };
                for budget in [1, 24 << 30, usize::MAX] {
                    let planned = plan(&config, &work, budget, &card);
                    assert!(planned.is_err() || planned.unwrap().bytes() <= budget, "{batch} x {seq}");
                }
            }
        }
    }
    assert!(start.elapsed().as_secs() < 20);
    let huge = Work { batch: usize::MAX, ..work(Scheme::new(4, 4, 4)) };
    let message = plan(&shape("llama-2-7b").unwrap(), &huge, 79 << 30, &card).unwrap_err().to_string();
    assert!(message.contains("18446744073709551615 sequences of 2048 tokens a step"), "{message}");
    let none = Work { seq: 0, ..huge };
    assert!(plan(&shape("tiny").unwrap(), &none, 1 << 30, &card).unwrap_err().to_string().contains("at least 1"));
    assert_eq!(divisors(12, 12), [12, 6, 4, 3, 2, 1]);
    assert_eq!(divisors(usize::MAX, 20), [17, 15, 5, 3, 1]);
}

#[test]
fn less_memory_takes_longer_until_nothing_fits() {
    let config = shape("llama-2-7b").unwrap();
    for scheme in [Scheme::new(4, 4, 4), Scheme::new(16, 4, 4)] {
        let at = |gib: usize| plan(&config, &work(scheme), gib << 30, &Card::h100());
        let (rich, lean) = (at(76).unwrap(), at(22).unwrap());
        assert!(rich.plan.recompute < 32 && rich.plan.keep_weights, "{rich:?}");
        assert!(lean.plan.recompute == 32 && !lean.plan.keep_weights, "{lean:?}");
        let mut last = f64::INFINITY;
        for gib in [20, 22, 24, 32, 40, 48, 64, 80] {
            let Ok(p) = at(gib) else { continue };
            assert!(p.bytes() <= gib << 30 && p.seconds <= last, "{gib} GiB: {p:?}");
            last = p.seconds;
        }
        let message = at(12).unwrap_err().to_string();
        assert!(message.contains("the weights alone"), "{message}");
        let message = at(14).unwrap_err().to_string();
        assert!(message.contains("--seq-len"), "{message}");
    }
}

#[test]
fn ranks_that_share_rows_take_less_time_and_not_half() {
    let config = shape("llama-2-7b").unwrap();
    let card = Card { free: 139 << 30, ..Card::h100() };
    for scheme in [Scheme::new(4, 4, 4), Scheme::new(16, 4, 4)] {
        let at = |batch, ranks| plan(&config, &Work { batch, ranks, ..work(scheme) }, 130 << 30, &card).unwrap().seconds;
        let (alone, two, four) = (at(8, 1), at(4, 2), at(2, 4));
        assert!(two < at(4, 1) && four < at(2, 1) && four < at(2, 2), "{scheme}: {two} {four}");
        assert!(alone / two < 2.0 && alone / four < 4.0, "{scheme}: {alone} {two} {four}");
        println!("{scheme}: {:.2} times as fast on two, {:.2} on four", alone / two, alone / four);
    }
}

#[test]
fn objectives_need_different_things() {
    let (card, scheme) = (Card::h100(), Scheme::new(4, 4, 4));
    for name in ["llama-2-7b", "llama-3-8b", "llama-3.2-1b"] {
        let config = shape(name).unwrap();
        for (recompute, micro) in [(0, 1), (config.layers, 1), (config.layers, 8)] {
            let step = Plan { recompute, keep_weights: true, sequences: 1 };
            let at = |needs| predict(&config, &Work { needs, ..work(scheme) }, step, micro, &card).unwrap();
            let [network, logits, rows, states] = [Needs::Network, Needs::Logits, Needs::Rows, Needs::States].map(at);
            let tokens = micro * 2048;
            // Both models' logits in 16 bits. A layer at work is not there beside them, and a few logits are there anyway.
            let both = 2 * 2 * tokens * config.vocab_size;
            let item = |p: &Planned, what: &str| p.items.iter().find(|i| i.0 == what).map_or(0, |i| i.1);
            assert!(item(&logits, "logits of both models") >= both, "{logits:?}");
            let without: usize =
                network.items.iter().filter(|i| !["a layer at work", "logits"].contains(&i.0)).map(|i| i.1).sum();
            assert!(logits.bytes() >= without + both, "{name}: {network:?} {logits:?}");
            let layer = without + item(&network, "a layer at work");
            assert!(logits.bytes() >= layer, "{name}: {network:?} {logits:?}");
            // Rows in f32 and their gradients, of every layer at once; no values, no rotated weights.
            let turned = 2 * config.hidden_size + (config.heads + config.kv_heads) * config.head_dim;
            assert_eq!(item(&rows, "captured rows and their gradients"), config.layers * tokens * turned * 8);
            assert_eq!(item(&rows, "weights"), item(&network, "weights"));
            assert_eq!(item(&rows, "values of the other layers") + item(&rows, "rotated weights"), 0);
            // Two hidden states of every layer in 16 bits.
            let both = 2 * 2 * config.layers * tokens * config.hidden_size;
            assert!(item(&states, "hidden states of both models") >= both, "{states:?}");
            assert!(states.bytes() >= layer + both, "{name}: {network:?} {states:?}");
            assert!(network.seconds < states.seconds && states.seconds < 2.0 * network.seconds, "{name}: {states:?}");
            assert!(network.seconds < logits.seconds && logits.seconds < 2.0 * network.seconds, "{name}: {logits:?}");
            assert!(rows.seconds > 0.05 * network.seconds && rows.seconds < 2.0 * network.seconds, "{name}: {rows:?}");
        }
    }
}

#[test]
fn every_objective_is_planned_within_the_budget() {
    let (config, card) = (shape("llama-2-7b").unwrap(), Card::h100());
    let at = |needs, gib: usize| plan(&config, &Work { needs, ..work(Scheme::new(4, 4, 4)) }, gib << 30, &card);
    for needs in [Needs::Network, Needs::Logits, Needs::Rows, Needs::States] {
        let mut last = f64::INFINITY;
        for gib in [24, 32, 48, 76] {
            let p = at(needs, gib).unwrap();
            assert!(p.bytes() <= gib << 30 && p.seconds <= last, "{needs:?}, {gib} GiB: {p:?}");
            last = p.seconds;
        }
        assert!(at(needs, 12).unwrap_err().to_string().contains("the weights alone"));
    }
    // Whole logits leave less for the rest; captured rows have nothing to be computed again, only fewer sequences at once.
    assert!(at(Needs::Logits, 32).unwrap().seconds > at(Needs::Network, 32).unwrap().seconds);
    let micro: Vec<usize> = [24, 48, 76].into_iter().map(|gib| at(Needs::Rows, gib).unwrap().micro_batch).collect();
    assert_eq!(micro, [1, 4, 4]);
    assert_eq!(at(Needs::Rows, 96).unwrap().micro_batch, 8);
    assert!(at(Needs::Rows, 18).unwrap_err().to_string().contains("--seq-len"));
}

/// Two passes take the time of both and the memory of the larger.
#[test]
fn an_objective_of_clip_ratios_is_planned() {
    let (config, card) = (shape("llama-2-7b").unwrap(), Card::h100());
    let step = Plan { recompute: config.layers, keep_weights: true, sequences: 1 };
    let at = |needs, clip_needs| {
        let work = Work { needs, clip_needs, clips: true, ..work(Scheme::new(4, 4, 4)) };
        predict(&config, &work, step, 4, &card).unwrap()
    };
    let all = [Needs::Network, Needs::Logits, Needs::Rows, Needs::States];
    for (first, second) in all.iter().flat_map(|&a| all[..2].iter().map(move |&b| (a, b))) {
        let (both, a, b) = (at(first, Some(second)), at(first, None), at(second, None));
        assert_eq!(both.bytes(), a.bytes().max(b.bytes()), "{first:?} {second:?}");
        assert_eq!(both.seconds, a.seconds + b.seconds, "{first:?} {second:?}");
    }
}

/// Each kind of scales takes memory and time, so that less is kept within a budget; so do clip ratios that are learned.
#[test]
fn scales_are_planned() {
    let (config, card) = (shape("llama-2-7b").unwrap(), Card::h100());
    for bits in [4, 16] {
        let none = work(Scheme::new(bits, 4, 4));
        let at = |transforms| {
            let step = Plan { recompute: config.layers, keep_weights: true, sequences: 1 };
            predict(&config, &Work { transforms, ..none }, step, 1, &card).unwrap()
        };
        let without = at(Transforms::PUBLISHED);
        assert!(at(Transforms::PUBLISHED.with_heads(true)).bytes() > without.bytes());
        for kind in Scale::ALL {
            let (one, all) = (at(Transforms::new(&[kind])), at(Transforms::ALL));
            // Scales of values are multiplied into R2, which is small; those of norms in passing, but where R1 leaves.
            let more = usize::from(matches!(kind, Scale::UpDown | Scale::RopePairs) || kind == Scale::Norms && bits == 16);
            let longer = one.seconds > without.seconds || matches!(kind, Scale::Values | Scale::ValuesGeneral);
            assert!(one.bytes() >= without.bytes() + more && longer, "{kind}");
            assert!(all.bytes() > one.bytes() && all.seconds > one.seconds, "{kind}");
        }
    }
    let at = |clips| {
        let step = Plan { recompute: config.layers, keep_weights: true, sequences: 1 };
        predict(&config, &Work { clips, ..work(Scheme::new(4, 4, 4)) }, step, 1, &card).unwrap()
    };
    assert!(at(true).bytes() > at(false).bytes() && at(true).seconds > at(false).seconds);
    // Clip ratios of weights keep the weights in front of their quantisers, and end the search; of unquantised weights there are none.
    let at = |bits, weight_clips| {
        let step = Plan { recompute: config.layers, keep_weights: true, sequences: 1 };
        predict(&config, &Work { weight_clips, ..work(Scheme::new(bits, 4, 4)) }, step, 1, &card).unwrap()
    };
    let layers: usize = Linear::ALL.map(|l| l.shape(&config)).map(|[out, inputs]| 2 * config.layers * out * inputs).iter().sum();
    let more = at(4, true).bytes() - at(4, false).bytes();
    assert!(more > layers && more < layers + layers / 100 && at(4, true).seconds < at(4, false).seconds, "{more} {layers}");
    assert_eq!(at(16, true), at(16, false));
    let planned = |transforms| {
        let work = Work { transforms, ..work(Scheme::new(4, 4, 4)) };
        plan(&config, &work, 70 << 30, &card).unwrap()
    };
    let (without, with) = (planned(Transforms::PUBLISHED), planned(Transforms::ALL));
    assert!(with.bytes() <= 70 << 30 && with.seconds > without.seconds);
}

/// A card that the weights do not fit is no refusal while main memory has room: the lack of either is named, with how much.
#[test]
fn layers_go_to_main_memory() {
    let card = Card::h100();
    let gib = |n: usize| n << 30;
    let at = |name: &str, scheme, card_gib, host_gib| {
        let room = Room { card: gib(card_gib), host: gib(host_gib), files: false };
        plan(&shape(name).unwrap(), &work(scheme), room, &card)
    };
    for scheme in [Scheme::new(4, 4, 4), Scheme::new(16, 4, 4)] {
        // Where all fits, it stays, and more memory makes it no slower, but for what counts as about as fast.
        let p = at("llama-2-7b", scheme, 76, 120).unwrap();
        assert_eq!((p.placement.streamed(32), p.host, p.moved), (0, 0, 0), "{p:?}");
        let mut last = f64::INFINITY;
        for card_gib in [12, 16, 20, 24, 32, 48, 64, 79] {
            let p = at("llama-2-7b", scheme, card_gib, 64).unwrap();
            assert!(p.bytes() <= gib(card_gib) && p.host <= gib(64) && p.seconds <= 1.02 * last, "{card_gib} GiB: {p:?}");
            last = p.seconds;
        }
        let p = at("llama-2-70b", scheme, 76, 120).unwrap();
        assert!(p.bytes() <= gib(76) && p.seconds < if scheme.weight_bits < 16 { 25.0 } else { 20.0 }, "{p:?}");
        let streamed = p.placement.streamed(80);
        let layer = 1_711_276_032;
        assert!(streamed < 80 && p.host == streamed * layer && p.host <= gib(120), "{p:?}");
        assert_eq!(p.moved, 8 / p.micro_batch * 2 * (streamed - p.placement.buffers) * layer);
        let message = at("llama-2-70b", scheme, 76, 20).unwrap_err().to_string();
        assert!(message.contains("main memory is short by") && message.contains("20.0 are free"), "{message}");
        let message = at("llama-2-70b", scheme, 8, 120).unwrap_err().to_string();
        assert!(message.contains("of the card, 8.0 are allowed"), "{message}");
    }
    // What main memory has no room for either is read, if it may be: more slowly, less the more memory there is.
    let reading = |host_gib, reads: f64| {
        let room = Room { card: gib(76), host: gib(host_gib), files: true };
        plan(&shape("llama-2-70b").unwrap(), &work(Scheme::new(4, 4, 4)), room, &Card { reads, ..card.clone() }).unwrap()
    };
    let mut last = f64::INFINITY;
    for host_gib in [10, 30, 60, 90, 120] {
        let p = reading(host_gib, 2e9);
        assert!(p.bytes() <= gib(76) && p.host <= gib(host_gib) && p.seconds <= 1.02 * last, "{host_gib} GiB: {p:?}");
        let files = p.placement.read(80);
        assert_eq!(p.read == 0, files == 0, "{p:?}");
        assert_eq!(files == 0, host_gib == 120, "{p:?}");
        // What is there at the turns is not read again; the copies are those of layers in main memory.
        let layer = 1_711_276_032;
        assert!(p.read <= 8 / p.micro_batch * 2 * files * layer && p.read <= p.moved, "{p:?}");
        last = p.seconds;
    }
    assert!(reading(60, 1e9).seconds > 1.2 * reading(60, 4e9).seconds);
    // As given: fewer on the card are slower, once their copies hide behind nothing.
    let config = shape("llama-2-7b").unwrap();
    let given = |resident| {
        let placement = Some(Placement { resident, ..Placement::RESIDENT });
        let step = Plan { recompute: 32, keep_weights: false, sequences: 1 };
        predict(&config, &Work { placement, batch: 1, ..work(Scheme::new(16, 4, 4)) }, step, 1, &card).unwrap()
    };
    let (all, none) = (given(32), given(0));
    assert!(none.seconds > all.seconds && none.bytes() < all.bytes() && none.host > 0, "{all:?} {none:?}");
    assert!(none.seconds > none.moved as f64 / card.uploads, "{none:?}");
}

#[test]
fn networks_are_placed() {
    let config = shape("llama-2-70b").unwrap();
    let at = |count, card: usize, host: usize| {
        networks(&config, DType::BF16, count, 0, Room { card: card << 30, host: host << 30, files: false })
    };
    let one = at(1, 78, 128).unwrap();
    assert!((20..40).contains(&one.resident), "{one:?}");
    assert!(at(2, 78, 256).unwrap().resident < one.resident);
    let message = at(2, 78, 128).unwrap_err().to_string();
    assert!(message.contains("main memory is short by") && message.contains("128.0 are free"), "{message}");
    assert!(at(1, 12, 256).unwrap_err().to_string().contains("the card is short by"));
    assert_eq!(networks(&shape("llama-2-7b").unwrap(), DType::BF16, 2, 0, Room::from(78 << 30)).unwrap(), Placement::RESIDENT);
}

/// What keeps codes takes less memory and time, and only where both operands are integers without learned ratios.
#[test]
fn codes_take_less() {
    let config = shape("llama-2-7b").unwrap();
    let card = Card::h100();
    let at = |work: Work| predict(&config, &work, Plan { recompute: 16, keep_weights: true, sequences: 0 }, 8, &card).unwrap();
    let on = |scheme: &str, engine| at(Work { engine, ..work(scheme.parse().unwrap()) });
    for (scheme, linears) in [("W4A4KV4", 6), ("W8A8", 6), ("W16A4KV4", 0), ("W4A16KV4", 0), ("MXFP4KV4", 0)] {
        let (integer, simulated) = (on(scheme, Engine::Integer), on(scheme, Engine::Simulated));
        assert_eq!((integer.on_integers, simulated.on_integers), (linears, 0), "{scheme}");
        assert_eq!(integer.bytes() < simulated.bytes(), linears > 0, "{scheme}");
        assert_eq!(integer.seconds < simulated.seconds, linears > 0, "{scheme}");
    }
    let learned = |clips, weight_clips| at(Work { engine: Engine::Integer, clips, weight_clips, ..work(Scheme::new(4, 4, 4)) });
    assert!(learned(false, false).on_integers > 0);
    assert_eq!([learned(true, false).on_integers, learned(false, true).on_integers], [0, 0]);
}
