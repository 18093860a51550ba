//! The README's programs are those of `examples/`, which compile and run.

use std::fs::read_to_string;

/// Code blocks of a language.
fn blocks<'a>(text: &'a str, language: &str) -> Vec<&'a str> {
    let fence = format!("```{language}\n");
    text.split(fence.as_str()).skip(1).map(|rest| rest.split("```").next().unwrap()).collect()
}

#[test]
fn programs_are_those_of_the_examples() {
    let readme = read_to_string("README.md").unwrap();
    let blocks = blocks(&readme, "rust");
    assert_eq!(blocks.len(), 2);
    for (block, example) in blocks.into_iter().zip(["examples/library.rs", "examples/kernel.rs"]) {
        let example_text = read_to_string(example).unwrap();
        let mut lines = example_text.lines().map(str::trim);
        for line in block.lines().map(str::trim).filter(|l| !l.is_empty()) {
            assert!(lines.any(|l| l == line), "README.md: {line:?} is not in {example}, or not in this order");
        }
    }
}

#[test]
fn files_that_documents_name_are_there() {
    let documents = ["README.md", "docs/cli.md", "docs/results.md", "docs/memory.md", "docs/kernels.md", "docs/testing.md"];
    for document in documents {
        let folder = std::path::Path::new(document).parent().unwrap();
        let text = read_to_string(document).unwrap();
        for link in text.split("](").skip(1).map(|rest| rest.split(')').next().unwrap()) {
            let file = link.split('#').next().unwrap();
            let named = file.is_empty() || link.contains("://") || folder.join(file).exists();
            assert!(named, "{document} names {link}, which is not there");
        }
    }
}
