//! A small world in sentences, from a seed: what the demo model is trained on.
//!
//! People have a sex, a town, a trade, an animal and a friend; towns sell certain goods; every noun has adjectives that suit it. Those are
//! facts of the world, the same in every text. Stories are drawn: who appears, what they own, how many. Numbers have to be
//! carried through a story, pronouns and verbs agree with nouns some words back, days follow one another. All words are the
//! crate's own choice; no text of others is in it.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

#[path = "words.rs"]
mod words;

use words::*;
pub use words::{tokenizer, vocabulary};

/// Random numbers, written out so that they do not hang on a library's way of drawing them.
struct Dice(ChaCha8Rng);

impl Dice {
    fn new(seed: u64, stream: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(stream);
        Self(rng)
    }
    fn below(&mut self, n: usize) -> usize {
        ((u128::from(self.0.next_u64()) * n as u128) >> 64) as usize
    }
    fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }
    /// The smaller of two: low numbers are the common ones.
    fn common(&mut self, n: usize) -> usize {
        self.below(n).min(self.below(n))
    }
    fn of<T: Copy>(&mut self, list: &[T]) -> T {
        list[self.below(list.len())]
    }
    /// One of a list whose first entries are the common ones.
    fn usual(&mut self, list: &[usize]) -> usize {
        list[self.common(list.len())]
    }
    /// 0..n in a random order.
    fn order(&mut self, n: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..n).collect();
        for i in (1..n).rev() {
            order.swap(i, self.below(i + 1));
        }
        order
    }
}

#[derive(Clone, Copy)]
struct Person {
    name: &'static str,
    woman: bool,
    town: usize,
    trade: usize,
    animal: usize,
    colour: usize,
    friend: usize,
}

/// The facts, the same for every text.
struct World {
    people: Vec<Person>,
    /// Goods of every town, most usual first.
    goods: Vec<Vec<usize>>,
    /// Adjectives of every good, place and animal, most usual first.
    suits: Vec<Vec<usize>>,
    /// What every good, place and animal does, most usual first.
    acts: Vec<Vec<usize>>,
    /// What people know by heart, word for word: nothing but memory tells how they go on.
    sayings: Vec<String>,
}

impl World {
    fn new() -> Self {
        let mut dice = Dice::new(0x5eed, 0);
        let count = HERS.len() + HIS.len();
        let person = |i: usize| {
            let woman = i.is_multiple_of(2);
            let name = if woman { HERS[i / 2] } else { HIS[i / 2] };
            Person {
                name,
                woman,
                town: dice.below(TOWNS.len()),
                trade: dice.below(TRADES.len()),
                animal: dice.below(ANIMALS.len()),
                colour: dice.below(COLOURS.len()),
                friend: (i + 1 + dice.below(count - 1)) % count,
            }
        };
        let people = (0..count).map(person).collect();
        let things = GOODS.len() + PLACES.len() + ANIMALS.len();
        Self {
            people,
            goods: TOWNS.iter().map(|_| dice.order(GOODS.len())).collect(),
            suits: (0..things).map(|_| dice.order(ADJECTIVES.len())).collect(),
            acts: (0..things).map(|_| dice.order(ACTS.len())).collect(),
            sayings: (0..SAYINGS).map(|_| saying(&mut dice, things)).collect(),
        }
    }
}

const SAYINGS: usize = 2000;

fn saying(dice: &mut Dice, things: usize) -> String {
    let clause = |dice: &mut Dice| {
        let thing = Thing(dice.below(things));
        format!("{} {} {}", dice.of(&ADJECTIVES), thing.word(true), dice.of(&ACTS)[1])
    };
    [0; 3].map(|_| clause(dice)).join(", ")
}

/// A thing of the world: a good, a place or an animal, by its number among all of them.
#[derive(Clone, Copy)]
struct Thing(usize);

impl Thing {
    fn good(i: usize) -> Self {
        Self(i)
    }
    fn place(i: usize) -> Self {
        Self(GOODS.len() + i)
    }
    fn animal(i: usize) -> Self {
        Self(GOODS.len() + PLACES.len() + i)
    }
    fn word(self, many: bool) -> &'static str {
        let all = [&GOODS[..], &PLACES, &ANIMALS];
        let (mut i, form) = (self.0, usize::from(many));
        for list in all {
            if i < list.len() {
                return list[i][form];
            }
            i -= list.len();
        }
        unreachable!("a thing of one of the lists")
    }
}

fn with_article(word: &str) -> String {
    format!("{} {word}", if word.starts_with(['a', 'e', 'i', 'o', 'u']) { "an" } else { "a" })
}

/// At least `words` words of stories; another seed, other stories about the same world.
pub fn text(seed: u64, words: usize) -> String {
    let world = World::new();
    let mut dice = Dice::new(seed, 1);
    let (mut out, mut count) = (String::new(), 0);
    while count < words {
        let story = Story::new(&world, &mut dice).tell();
        count += story.split_whitespace().count();
        out.push_str(&story);
        out.push('\n');
    }
    out
}

/// One paragraph about two people.
struct Story<'a> {
    world: &'a World,
    dice: &'a mut Dice,
    who: [Person; 2],
    /// What the story is about, and how many each of the two has.
    good: usize,
    has: [usize; 2],
    colour: &'static str,
    day: usize,
    said: String,
}

impl<'a> Story<'a> {
    fn new(world: &'a World, dice: &'a mut Dice) -> Self {
        let first = world.people[dice.common(world.people.len())];
        let second = if dice.one_in(2) { dice.below(world.people.len()) } else { first.friend };
        let second = if world.people[second].name == first.name { first.friend } else { second };
        let good = dice.usual(&world.goods[first.town]);
        let (has, colour, day) = ([10 + dice.below(90), 0], dice.of(&COLOURS), dice.below(7));
        Self { world, dice, who: [first, world.people[second]], good, has, colour, day, said: String::new() }
    }

    fn tell(mut self) -> String {
        self.introduce(0);
        self.own();
        for _ in 0..4 + self.dice.below(6) {
            match self.dice.below(20) {
                0 => self.introduce(1),
                1 | 2 => self.count(),
                3 | 4 => self.give(),
                5 | 6 => self.describe(),
                7 => self.ask(),
                8 => self.market(),
                9 => self.next_day(),
                10 => self.speak(),
                11 => self.mood(),
                12..=16 => self.quote(),
                _ => self.look_around(),
            }
        }
        self.said.trim_end().to_string()
    }

    fn say(&mut self, sentence: &str) {
        self.said.push_str(sentence);
        self.said.push(' ');
    }

    fn she(&self, i: usize) -> &'static str {
        if self.who[i].woman { "she" } else { "he" }
    }

    fn her(&self, i: usize) -> &'static str {
        if self.who[i].woman { "her" } else { "his" }
    }

    fn suited(&mut self, thing: Thing) -> &'static str {
        ADJECTIVES[self.dice.usual(&self.world.suits[thing.0])]
    }

    fn introduce(&mut self, i: usize) {
        let p = self.who[i];
        let (name, town, trade, animal) = (p.name, TOWNS[p.town], TRADES[p.trade], ANIMALS[p.animal][0]);
        let (she, her, colour) = (self.she(i), self.her(i), COLOURS[p.colour]);
        let sentence = match self.dice.below(4) {
            0 => format!("{name} is a {trade} from {town}."),
            1 => format!("{name} lives in {town} with {her} {colour} {animal}."),
            2 => format!("{name}, who works in {town}, is a {trade}, and {she} has {} {animal}.", with_article(colour)),
            _ => format!("in {town} lives a {trade} called {name}; {her} {animal} is {colour}."),
        };
        self.say(&sentence);
    }

    fn own(&mut self) {
        let goods = GOODS[self.good][1];
        let adjective = self.suited(Thing::good(self.good));
        let (name, n, colour) = (self.who[0].name, self.has[0], self.colour);
        let sentence = match self.dice.below(3) {
            0 => format!("{name} has {n} {adjective} {colour} {goods}."),
            1 => format!("on {} {name} buys {n} {colour} {goods}.", DAYS[self.day]),
            _ => format!("{name} knows that there are {n} {adjective} {goods} at home, all {colour}."),
        };
        self.say(&sentence);
    }

    fn count(&mut self) {
        let i = usize::from(self.has[1] > 0 && self.dice.one_in(2));
        let (name, she, her, n, goods) = (self.who[i].name, self.she(i), self.her(i), self.has[i], GOODS[self.good][1]);
        let colour = self.colour;
        let sentence = match self.dice.below(4) {
            0 => format!("{name} counts {her} {colour} {goods}: {n}."),
            1 => format!("how many {goods} does {name} have? {n}."),
            2 => format!("{name} knows that {she} has {n} {colour} {goods}."),
            _ => {
                let m = n.min(97);
                format!("{she} counts: {}, {}, {}.", m, m + 1, m + 2)
            }
        };
        self.say(&sentence);
    }

    fn give(&mut self) {
        if self.has[0] < 3 {
            return self.count();
        }
        let tens = self.has[0] / 10 * 10;
        // Mostly whole tens, which a small model can learn to take away.
        let n = if tens > 0 && !self.dice.one_in(3) { 10 * (1 + self.dice.below(tens / 10)) } else { 1 + self.dice.below(3) };
        let n = if n >= self.has[0] { 1 } else { n };
        if self.has[1] + n > 99 {
            return self.count();
        }
        self.has = [self.has[0] - n, self.has[1] + n];
        let ([a, b], goods, [left, got]) = ([self.who[0].name, self.who[1].name], GOODS[self.good][1], self.has);
        let sentence = match self.dice.below(3) {
            0 => format!("{a} gives {n} {goods} to {b}. now {a} has {left} and {b} has {got}."),
            1 => format!("{b} takes {n} of the {} {goods}, so {left} are left.", self.colour),
            _ => format!("{b} buys {n} {goods} from {a}; {} has {left} now.", self.she(0)),
        };
        self.say(&sentence);
    }

    /// A verb that agrees with a noun some words before it.
    fn describe(&mut self) {
        let thing = match self.dice.below(3) {
            0 => Thing::good(self.good),
            1 => Thing::place(self.dice.common(PLACES.len())),
            _ => Thing::animal(self.who[0].animal),
        };
        let many = self.dice.one_in(2);
        let mut phrase = format!("the {} {}", self.suited(thing), thing.word(many));
        for _ in 0..self.dice.below(3) {
            let (near, other) = (Thing::place(self.dice.below(PLACES.len())), self.dice.one_in(2));
            let adjective = self.suited(near);
            phrase.push_str(&format!(" {} the {adjective} {}", self.dice.of(&["near", "at", "in"]), near.word(other)));
        }
        if self.dice.one_in(2) {
            let i = self.dice.below(2);
            phrase.push_str(&format!(" that {} {}", self.who[i].name, self.dice.of(&DEEDS)));
        }
        let act = ACTS[self.dice.usual(&self.world.acts[thing.0])][usize::from(many)];
        let end = if self.dice.one_in(2) { format!(" {}", self.dice.of(&WHEN)) } else { String::new() };
        self.say(&format!("{phrase} {act}{end}."));
    }

    fn quote(&mut self) {
        let name = self.who[self.dice.below(2)].name;
        let quoted = &self.world.sayings[self.dice.below(SAYINGS)];
        let sentence =
            if self.dice.one_in(2) { format!("{name} says: {quoted}.") } else { format!("\"{quoted},\" says {name}.") };
        self.say(&sentence);
    }

    fn look_around(&mut self) {
        let i = self.dice.below(2);
        let (name, deed) = (self.who[i].name, self.dice.of(&DEEDS));
        let mut seen = vec![];
        for _ in 0..2 + self.dice.below(3) {
            let (thing, many) = (Thing(self.dice.below(self.world.suits.len())), self.dice.one_in(2));
            let adjective = self.suited(thing);
            let owner =
                if self.dice.one_in(4) { format!(" of {}", self.dice.of(&self.world.people).name) } else { String::new() };
            let article = if many { format!("{} {adjective}", 2 + self.dice.common(8)) } else { with_article(adjective) };
            seen.push(format!("{article} {}{owner}", thing.word(many)));
        }
        let last = seen.pop().unwrap_or_default();
        self.say(&format!("{name} {deed} {} and {last}.", seen.join(", ")));
    }

    fn ask(&mut self) {
        let i = self.dice.below(2);
        let p = self.who[i];
        let (name, her) = (p.name, self.her(i));
        let sentence = match self.dice.below(5) {
            0 => format!("where does {name} live? in {}.", TOWNS[p.town]),
            1 => format!("what is the trade of {name}? {}.", TRADES[p.trade]),
            2 => format!("what does {name} have at home? {} {}.", with_article(COLOURS[p.colour]), ANIMALS[p.animal][0]),
            3 => format!("who is the friend of {name}? {}.", self.world.people[p.friend].name),
            _ => format!("is {her} {} {}? yes.", ANIMALS[p.animal][0], COLOURS[p.colour]),
        };
        self.say(&sentence);
    }

    fn market(&mut self) {
        let town = self.who[self.dice.below(2)].town;
        let goods = &self.world.goods[town];
        let [a, b, c] = [0; 3].map(|_| GOODS[self.dice.usual(goods)][1]);
        let name = TOWNS[town];
        let sentence = if self.dice.one_in(2) {
            format!("in {name} they sell {a}, {b} and {c}.")
        } else {
            format!("{} goes to {name} to buy {a} and {b}.", self.who[0].name)
        };
        self.say(&sentence);
    }

    fn next_day(&mut self) {
        let before = DAYS[self.day % 7];
        self.day += 1;
        let (day, p) = (DAYS[self.day % 7], self.who[1]);
        let sentence = if self.dice.one_in(2) {
            format!("after {before} comes {day}.")
        } else {
            format!("{before} goes, and on {day} {} meets {} in {}.", self.who[0].name, p.name, TOWNS[p.town])
        };
        self.say(&sentence);
    }

    fn speak(&mut self) {
        let i = self.dice.below(2);
        let (speaker, other) = (self.who[i], self.who[1 - i]);
        let thing = Thing::animal(other.animal);
        let adjective = self.suited(thing);
        let sentence = format!("\"your {} is {adjective},\" says {} to {}.", thing.word(false), speaker.name, other.name);
        self.say(&sentence);
    }

    fn mood(&mut self) {
        let i = self.dice.below(2);
        let (name, her, mood) = (self.who[i].name, self.her(i), self.dice.of(&MOODS));
        let sentence = if self.dice.one_in(2) {
            format!("{name} is {mood} because {her} {} is {}.", ANIMALS[self.who[i].animal][0], self.dice.of(&MOODS))
        } else {
            format!("{name} is {mood} now.")
        };
        self.say(&sentence);
    }
}
