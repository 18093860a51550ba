//! The house has floors: a module uses those below it, and no cycle holds any two together. And one call path leads to a kernel.
//!
//! Read from the source: every path that begins with `crate` or `super`, followed through re-exports to where the item is. Test modules
//! do not count; they may use anything.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// The floors, the lowest first. A module may use its own floor and those below. `rotation` and `quant` are below `llama`, since a layer
/// is told by them what to rotate and how to quantise; what they do to a whole model is in `calibrate`.
const FLOORS: &[(&str, &[&str])] = &[
    ("ground", &["chat", "data", "device", "dtype", "error", "hub", "io", "profile", "random", "ranks", "tensor"]),
    ("maths", &["grid", "hadamard", "linalg", "manifold"]),
    ("tape", &["tape"]),
    ("operations", &["capi", "kernels", "ops"]),
    ("what a layer is told", &["compressed_tensors", "quant", "rotation"]),
    ("model", &["llama"]),
    ("around a model", &["check", "laws", "memory", "objective", "optim", "outliers", "plot"]),
    (
        "over a model",
        &[
            "baselines",
            "bench",
            "calibrate",
            "compare",
            "demo",
            "eval",
            "export",
            "generate",
            "inspect",
            "learn",
            "race",
            "serve",
        ],
    ),
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src")
}

/// Every file of the library with its text; `bin` is another crate.
fn files() -> Vec<(PathBuf, String)> {
    fn walk(folder: &Path, files: &mut Vec<PathBuf>) {
        for entry in std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()) {
            if entry.is_dir() && entry.file_name().unwrap() != "bin" {
                walk(&entry, files);
            } else if entry.extension().is_some_and(|e| e == "rs") {
                files.push(entry);
            }
        }
    }
    let mut files = vec![];
    walk(&root(), &mut files);
    files.sort();
    files.into_iter().map(|f| (f.strip_prefix(root()).unwrap().to_path_buf(), std::fs::read_to_string(&f).unwrap())).collect()
}

/// The module that a file is.
fn module(file: &Path) -> Vec<String> {
    let mut names: Vec<String> = file.with_extension("").iter().map(|s| s.to_str().unwrap().to_string()).collect();
    if matches!(names.last().map(String::as_str), Some("mod" | "lib")) {
        names.pop();
    }
    if names == ["device", "absent"] {
        names[1] = "cuda".into();
    }
    names
}

/// Names and punctuation, without comments, strings and characters; `::` is one token.
fn tokens(text: &str) -> Vec<String> {
    let c: Vec<char> = text.chars().collect();
    let (mut tokens, mut i) = (vec![], 0);
    let starts = |i: usize, what: &str| what.chars().enumerate().all(|(j, w)| c.get(i + j) == Some(&w));
    while i < c.len() {
        if starts(i, "//") {
            while i < c.len() && c[i] != '\n' {
                i += 1;
            }
        } else if starts(i, "/*") {
            while !starts(i, "*/") {
                i += 1;
            }
            i += 2;
        } else if starts(i, "r\"") || starts(i, "r#\"") {
            let end = if c[i + 1] == '#' { "\"#" } else { "\"" };
            i += 1 + end.len();
            while !starts(i, end) {
                i += 1;
            }
            i += end.len();
        } else if c[i] == '"' {
            i += 1;
            while c[i] != '"' {
                i += if c[i] == '\\' { 2 } else { 1 };
            }
            i += 1;
        } else if c[i] == '\'' && (c.get(i + 1) == Some(&'\\') || c.get(i + 2) == Some(&'\'')) {
            i += if c[i + 1] == '\\' { 3 } else { 2 };
            while c[i] != '\'' {
                i += 1;
            }
            i += 1;
        } else if c[i].is_alphanumeric() || c[i] == '_' {
            let first = i;
            while i < c.len() && (c[i].is_alphanumeric() || c[i] == '_') {
                i += 1;
            }
            tokens.push(c[first..i].iter().collect());
        } else if starts(i, "::") {
            tokens.push("::".into());
            i += 2;
        } else {
            if !c[i].is_whitespace() {
                tokens.push(c[i].to_string());
            }
            i += 1;
        }
    }
    tokens
}

/// The paths of a use tree that starts at token `i`, each with the name it gets, and the token behind it.
fn tree(t: &[String], mut i: usize, prefix: &[String], paths: &mut Vec<(Vec<String>, String)>) -> usize {
    let mut path = prefix.to_vec();
    loop {
        match t.get(i).map(String::as_str) {
            Some("{") => {
                i += 1;
                while t[i] != "}" {
                    i = tree(t, i, &path, paths);
                    if t[i] == "," {
                        i += 1;
                    }
                }
                return i + 1;
            }
            Some(name) if name == "*" || name.chars().all(|c| c.is_alphanumeric() || c == '_') => {
                if name != "self" || path.is_empty() {
                    path.push(name.to_string());
                }
                i += 1;
            }
            _ => return i,
        }
        match t.get(i).map(String::as_str) {
            Some("::") => i += 1,
            Some("as") => {
                paths.push((path, t[i + 1].clone()));
                return i + 2;
            }
            _ => {
                let name = path.last().cloned().unwrap_or_default();
                paths.push((path, name));
                return i;
            }
        }
    }
}

/// What a file names, from the crate's root.
struct Named {
    /// The module that the file is.
    module: Vec<String>,
    /// Paths.
    uses: Vec<Vec<String>>,
    /// Re-exports of the module: the name, and the path it stands for.
    exports: Vec<(String, Vec<String>)>,
}

fn named(file: &Path, text: &str) -> Named {
    let t = tokens(text);
    let own = module(file);
    let (mut uses, mut exports) = (vec![], vec![]);
    // Inline modules around the token: name and the depth of their braces.
    let (mut inline, mut depth): (Vec<(String, usize)>, usize) = (vec![], 0);
    let mut i = 0;
    while i < t.len() {
        let test = ["#", "[", "cfg", "(", "test", ")", "]", "mod"];
        if t[i..].len() > test.len() + 1 && t[i..].iter().zip(test).all(|(a, b)| a == b) && t[i + test.len() + 1] == "{" {
            i += test.len() + 2;
            let mut open = 1;
            while open > 0 {
                open = open + usize::from(t[i] == "{") - usize::from(t[i] == "}");
                i += 1;
            }
            continue;
        }
        match t[i].as_str() {
            "{" => depth += 1,
            "}" => {
                depth -= 1;
                inline.retain(|(_, d)| *d <= depth);
            }
            "mod" if t.get(i + 2).is_some_and(|t| t == "{") => {
                inline.push((t[i + 1].clone(), depth + 1));
            }
            "use" | "crate" | "super" if t[i] == "use" || t.get(i + 1).is_some_and(|t| t == "::") => {
                let public = t[i] == "use" && i > 0 && (t[i - 1] == "pub" || t[i - 1] == ")");
                let mut paths = vec![];
                let here: Vec<String> = own.iter().cloned().chain(inline.iter().map(|(n, _)| n.clone())).collect();
                let first = i + usize::from(t[i] == "use");
                let end = tree(&t, first, &[], &mut paths);
                for (mut path, name) in paths {
                    let mut base = here.clone();
                    match path[0].as_str() {
                        "crate" => base.clear(),
                        "self" => {}
                        "super" => {}
                        // A path from outside, or one that an import of this file made known.
                        _ if own.is_empty() || public => path.insert(0, "self".into()),
                        _ => continue,
                    }
                    while let Some(first) = path.first().filter(|p| ["crate", "self", "super"].contains(&p.as_str())) {
                        if first == "super" {
                            base.pop();
                        }
                        path.remove(0);
                    }
                    let whole: Vec<String> = base.into_iter().chain(path).collect();
                    if public && inline.is_empty() {
                        exports.push((name, whole.clone()));
                    }
                    uses.push(whole);
                }
                i = end.max(i + 1);
                continue;
            }
            _ => {}
        }
        i += 1;
    }
    Named { module: own, uses, exports }
}

type Graph = BTreeMap<String, BTreeSet<String>>;

/// Which module uses which, by their names under the crate's root.
fn graph(files: &[(PathBuf, String)]) -> Graph {
    let named: Vec<Named> = files.iter().map(|(file, text)| named(file, text)).collect();
    let modules: BTreeSet<Vec<String>> = named.iter().map(|n| n.module.clone()).collect();
    let mut exports: BTreeMap<(Vec<String>, String), Vec<String>> = BTreeMap::new();
    for n in &named {
        for (name, path) in &n.exports {
            let inside = path.len() == n.module.len() + 1 && path.starts_with(&n.module);
            if !inside {
                exports.insert((n.module.clone(), name.clone()), path.clone());
            }
        }
    }
    let mut graph: Graph = modules.iter().filter_map(|m| m.first()).map(|m| (m.clone(), BTreeSet::new())).collect();
    for n in named.iter().filter(|n| !n.module.is_empty()) {
        for path in &n.uses {
            // Step by step to where the item is, through re-exports; every module on the way is used.
            let (mut path, mut steps) = (path.clone(), 0);
            'follow: loop {
                steps += 1;
                assert!(steps < 20, "re-exports of {path:?} go round in circles");
                let mut at: Vec<String> = vec![];
                for (i, name) in path.iter().enumerate() {
                    if let Some(top) = at.first().filter(|top| **top != n.module[0]) {
                        graph.get_mut(&n.module[0]).unwrap().insert(top.clone());
                    }
                    // A module and a function may have one name: what is followed by more is the module.
                    let inner: Vec<String> = at.iter().chain([name]).cloned().collect();
                    if i + 1 < path.len() && modules.contains(&inner) {
                        at = inner;
                        continue;
                    }
                    if let Some(target) = exports.get(&(at.clone(), name.clone())) {
                        path = target.iter().chain(&path[i + 1..]).cloned().collect();
                        continue 'follow;
                    }
                    at.push(name.clone());
                    if !modules.contains(&at) {
                        break;
                    }
                }
                if let Some(top) = at.first().filter(|top| **top != n.module[0] && graph.contains_key(*top)) {
                    let top = top.clone();
                    graph.get_mut(&n.module[0]).unwrap().insert(top);
                }
                break;
            }
        }
    }
    graph
}

/// Modules that lie on a cycle: what is left when those that use nothing (more) are taken away, again and again.
fn cyclic(mut graph: Graph) -> Graph {
    loop {
        let free: Vec<String> = graph.iter().filter(|(_, uses)| uses.is_empty()).map(|(m, _)| m.clone()).collect();
        if free.is_empty() {
            return graph;
        }
        free.iter().for_each(|m| drop(graph.remove(m)));
        graph.values_mut().for_each(|uses| uses.retain(|u| !free.contains(u)));
    }
}

/// Arrows upwards, and modules without a floor or on two.
fn faults(graph: &Graph) -> Vec<String> {
    let floor = |module: &str| FLOORS.iter().position(|(_, modules)| modules.contains(&module));
    let mut faults = vec![];
    for (module, uses) in graph {
        if FLOORS.iter().flat_map(|f| f.1).filter(|m| *m == module).count() != 1 {
            faults.push(format!("{module} is not on one floor: give it one in FLOORS"));
        }
        for used in uses.iter().filter(|used| floor(used) > floor(module)) {
            faults.push(format!("{module} uses {used}, which is on a higher floor"));
        }
    }
    faults
}

#[test]
fn no_module_uses_one_above_it_and_none_lies_on_a_cycle() {
    let graph = graph(&files());
    assert!(graph.len() > 20 && graph["llama"].contains("tensor") && graph["ops"].contains("device"), "{graph:?}");
    let faults = faults(&graph);
    assert!(faults.is_empty(), "{}", faults.join("\n"));
    let cyclic = cyclic(graph);
    assert!(cyclic.is_empty(), "these use one another: {cyclic:#?}");
    for module in FLOORS.iter().flat_map(|f| f.1) {
        assert!(root().join(module).is_dir() || root().join(format!("{module}.rs")).is_file(), "there is no {module}");
    }
}

#[test]
fn a_cycle_and_an_arrow_upwards_are_seen() {
    let with = |file: &str, line: &str| {
        let mut files = files();
        let (_, text) = files.iter_mut().find(|(f, _)| f == Path::new(file)).unwrap();
        text.push_str(line);
        graph(&files)
    };
    // Straight, in a list, by `super`, and through a re-export at the root.
    for line in ["\nuse crate::ops::Case;\n", "\nuse crate::{Error, ops::add::Add};\n", "\nfn f() { super::ops::cases(); }\n"] {
        let graph = with("grid.rs", line);
        assert!(faults(&graph).iter().any(|f| f == "grid uses ops, which is on a higher floor"), "{line}");
        assert!(cyclic(graph).contains_key("grid"), "{line}");
    }
    let graph = with("dtype.rs", "\nuse crate::Tape;\n");
    assert!(faults(&graph).iter().any(|f| f == "dtype uses tape, which is on a higher floor"));
    let graph =
        with("dtype.rs", "\n// use crate::Tape;\n/// [`crate::Tape`]\n#[cfg(test)]\nmod more {\n    use crate::Tape;\n}\n");
    assert!(faults(&graph).is_empty());
}

/// Every launcher of the contract is called from one place, and the feature `cuda` is asked for where it must be.
#[test]
fn one_call_path_leads_to_a_kernel() {
    let header = std::fs::read_to_string(root().join("../cuda/kernels.h")).unwrap();
    let header = header.split("*/").map(|part| part.split("/*").next().unwrap()).collect::<String>();
    let prototype =
        |line: &str| Some(line.strip_prefix("int64_t ").or(line.strip_prefix("int "))?.split('(').next()?.to_string());
    let launchers: BTreeSet<String> = header.lines().filter_map(prototype).collect();
    assert!(launchers.len() > 40 && launchers.contains("sq_hadamard"), "{launchers:?}");
    let files = files();
    let calls = |name: &str| -> Vec<String> {
        let ways = [format!("ffi!({name}("), format!("ffi::{name}(")];
        let count = |text: &str| ways.iter().map(|way| text.matches(way.as_str()).count()).sum::<usize>();
        files.iter().flat_map(|(f, text)| vec![f.display().to_string(); count(text)]).collect()
    };
    let odd: Vec<_> = launchers.iter().map(|name| (name, calls(name))).filter(|(_, calls)| calls.len() != 1).collect();
    assert!(odd.is_empty(), "not called exactly once: {odd:?}");

    let all = |folder: &str| std::fs::read_dir(root().join(folder)).into_iter().flatten().map(|e| e.unwrap().path());
    let bin = all("bin/spinquant").chain(all("bin/spinquant/bench")).filter(|f| f.is_file());
    let bin = bin.map(|f| (f.strip_prefix(root()).unwrap().to_path_buf(), std::fs::read_to_string(&f).unwrap()));
    let elsewhere = files
        .iter()
        .cloned()
        .chain(bin)
        .filter(|(f, _)| !["device", "ops", "kernels", "kernels.rs"].iter().any(|d| f.starts_with(d)));
    let asked: Vec<(PathBuf, usize)> =
        elsewhere.map(|(f, text)| (f, text.matches("feature = \"cuda\"").count())).filter(|(_, n)| *n > 0).collect();
    assert!(asked.iter().map(|a| a.1).sum::<usize>() <= 5, "{asked:?}");
}
