//! The words of the made-up world, and the tokenizer that knows them.

pub const HERS: [&str; 20] = [
    "Ada", "Bea", "Cora", "Dana", "Ella", "Fay", "Gwen", "Hana", "Ida", "June", "Kira", "Lena", "Mara", "Nora", "Olga", "Pia",
    "Rosa", "Sara", "Tess", "Vera",
];
pub const HIS: [&str; 20] = [
    "Abel", "Boris", "Carl", "Dirk", "Emil", "Felix", "Gus", "Hugo", "Ivan", "Jonas", "Karl", "Leo", "Max", "Nils", "Otto",
    "Paul", "Rolf", "Sam", "Tom", "Viktor",
];
pub const TOWNS: [&str; 16] = [
    "Arlen", "Brook", "Corby", "Dunmore", "Elmham", "Ferris", "Garth", "Holm", "Inver", "Kelso", "Lund", "Morley", "Norden",
    "Ostrow", "Penn", "Rye",
];
pub const TRADES: [&str; 16] = [
    "baker",
    "smith",
    "tailor",
    "farmer",
    "miller",
    "doctor",
    "teacher",
    "painter",
    "sailor",
    "judge",
    "weaver",
    "carpenter",
    "printer",
    "gardener",
    "hunter",
    "singer",
];
pub const COLOURS: [&str; 10] = ["red", "blue", "green", "yellow", "white", "black", "brown", "grey", "orange", "purple"];
pub const DAYS: [&str; 7] = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"];
/// One, many.
pub const ANIMALS: [[&str; 2]; 10] = [
    ["dog", "dogs"],
    ["cat", "cats"],
    ["horse", "horses"],
    ["goat", "goats"],
    ["hen", "hens"],
    ["duck", "ducks"],
    ["sheep", "sheep"],
    ["cow", "cows"],
    ["rabbit", "rabbits"],
    ["pony", "ponies"],
];
pub const GOODS: [[&str; 2]; 24] = [
    ["apple", "apples"],
    ["pear", "pears"],
    ["plum", "plums"],
    ["egg", "eggs"],
    ["loaf", "loaves"],
    ["cheese", "cheeses"],
    ["hat", "hats"],
    ["coat", "coats"],
    ["boot", "boots"],
    ["shirt", "shirts"],
    ["lamp", "lamps"],
    ["candle", "candles"],
    ["chair", "chairs"],
    ["table", "tables"],
    ["barrel", "barrels"],
    ["basket", "baskets"],
    ["book", "books"],
    ["map", "maps"],
    ["pen", "pens"],
    ["coin", "coins"],
    ["knife", "knives"],
    ["pot", "pots"],
    ["rope", "ropes"],
    ["nail", "nails"],
];
pub const PLACES: [[&str; 2]; 14] = [
    ["mill", "mills"],
    ["bridge", "bridges"],
    ["market", "markets"],
    ["church", "churches"],
    ["school", "schools"],
    ["tower", "towers"],
    ["garden", "gardens"],
    ["river", "rivers"],
    ["hill", "hills"],
    ["forest", "forests"],
    ["harbour", "harbours"],
    ["field", "fields"],
    ["barn", "barns"],
    ["well", "wells"],
];
pub const ADJECTIVES: [&str; 32] = [
    "old", "new", "small", "large", "fine", "plain", "heavy", "light", "clean", "dusty", "broken", "strong", "warm", "cold",
    "bright", "dark", "round", "long", "short", "wide", "narrow", "quiet", "loud", "proud", "gentle", "wild", "cheap", "costly",
    "sweet", "dry", "smooth", "rough",
];
/// One does, many do.
pub const ACTS: [[&str; 2]; 16] = [
    ["sleeps", "sleep"],
    ["waits", "wait"],
    ["stands", "stand"],
    ["rests", "rest"],
    ["shines", "shine"],
    ["falls", "fall"],
    ["moves", "move"],
    ["stays", "stay"],
    ["turns", "turn"],
    ["sinks", "sink"],
    ["grows", "grow"],
    ["breaks", "break"],
    ["looks", "look"],
    ["lies", "lie"],
    ["seems", "seem"],
    ["costs", "cost"],
];
pub const DEEDS: [&str; 16] = [
    "bought", "sold", "found", "lost", "saw", "made", "kept", "liked", "painted", "cleaned", "carried", "hid", "built", "drew",
    "wanted", "forgot",
];
pub const MOODS: [&str; 12] =
    ["happy", "sad", "tired", "angry", "calm", "hungry", "busy", "late", "ready", "lucky", "sorry", "glad"];
pub const WHEN: [&str; 8] = ["today", "often", "again", "slowly", "quickly", "well", "alone", "outside"];
/// Words and marks that the sentences below use besides.
pub const OTHERS: &str = "a an the is are was has have had lives live from in on at near with and or but so of to for that who what where \
    how many does do did not no yes now then later there here he she his her him they it its one says asks answers counts count \
    gives give gets get takes take buys sells buy sell sees meets meet knows know friend trade town called every both too more less \
    than left all some day next before after if when because goes go home comes come back I you my your works . , : ? \" ' - \
    ; !";

/// The start of a text, and what is not in the language.
const SPECIAL: [&str; 2] = ["<s>", "<unk>"];

/// Every token in the order of their ids: the special ones, digits, words, marks, the end of a line.
pub fn vocabulary() -> Vec<String> {
    let pairs = [&ANIMALS[..], &GOODS, &PLACES, &ACTS].concat();
    let lists: [&[&str]; 10] = [&HERS, &HIS, &TOWNS, &TRADES, &COLOURS, &DAYS, &ADJECTIVES, &DEEDS, &MOODS, &WHEN];
    let mut words: Vec<String> = SPECIAL.map(String::from).into_iter().chain((0..10).map(|d| d.to_string())).collect();
    let rest = lists.concat().into_iter().chain(pairs.into_iter().flatten()).chain(OTHERS.split_whitespace());
    for word in rest {
        if !words.iter().any(|w| w == word) {
            words.push(word.to_string());
        }
    }
    words.push("\n".into());
    words
}

/// A Hugging Face tokenizer: words, single digits and marks are tokens, spaces are not; a text starts with `<s>`.
pub fn tokenizer(vocabulary: &[String]) -> String {
    let ids: serde_json::Map<_, _> = vocabulary.iter().enumerate().map(|(id, word)| (word.clone(), id.into())).collect();
    let json = serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": {
            "type": "Split", "pattern": {"Regex": "[A-Za-z]+|[0-9]|[^A-Za-z0-9 ]"}, "behavior": "Removed", "invert": true,
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": SPECIAL[0], "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {SPECIAL[0]: {"id": SPECIAL[0], "ids": [0], "tokens": [SPECIAL[0]]}},
        },
        "decoder": null,
        "model": {"type": "WordLevel", "vocab": ids, "unk_token": SPECIAL[1]},
    });
    format!("{json:#}\n")
}
