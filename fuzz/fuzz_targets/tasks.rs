//! Files of multiple-choice questions: release files of the eight tasks, and the schema.
#![no_main]

use libfuzzer_sys::fuzz_target;
use spinquant::eval::{marks::Marks, tasks::Questions};

fuzz_target!(|data: &[u8]| {
    let dir = tempfile::tempdir().unwrap();
    // Tasks are told apart by their objects' keys, ARC and OpenBookQA by the file's name.
    let file = dir.path().join("ARC-Easy-Test.jsonl");
    std::fs::write(&file, data).unwrap();
    std::fs::write(dir.path().join("ARC-Easy-Test-labels.lst"), "1\n1\n1\n").unwrap();
    if let Ok(read) = Questions::read(&file) {
        let candidates: usize = read.questions.iter().map(|q| q.candidates()).sum();
        Marks::of(&read.questions, &vec![-1.0; candidates]).expect("what was read");
    }
});
