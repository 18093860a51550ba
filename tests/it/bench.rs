//! Every timed case at a small size: its answer passes its check, and an answer with one wrong value does not.

use std::collections::HashSet;

use spinquant::bench::{self, Row};
use spinquant::ops::{Case, Size};
use spinquant::{DType, Device, Tensor, ops};

/// A small size of every kernel.
fn small() -> impl Iterator<Item = Case> {
    bench::kernels().into_iter().map(|(kernel, _)| {
        let (n, rows) = match kernel {
            "attention" | "attention-backward" => (33, 2),
            "cayley" | "cayley-audit" => (24, 2),
            "gptq-layer" | "gptq-model" => (32, 64),
            "rope" | "rope-backward" | "swap-axes" => (256, 5),
            "rope-pairs" | "rope-pairs-backward" => (24, 128),
            _ => (96, 5),
        };
        bench::one(kernel, Some(n), Some(rows), None, &Device::Cpu).unwrap().0
    })
}

#[test]
fn every_kernel_is_checked_and_timed() {
    for case in small() {
        let measured = bench::measure(&case, DType::F32, &Device::Cpu).unwrap_or_else(|e| panic!("{case:?}: {e}"));
        let row = Row::new(&case, DType::F32, Ok(&measured));
        println!("{}", row.text());
        let [low, ms, high] = [row.p10_ms, row.ms, row.p90_ms].map(Option::unwrap);
        assert!(0.0 < low && low <= ms && ms <= high && row.error.is_none(), "{row:?}");
        assert!(row.gb_per_s.is_some() == row.of_copy.is_some(), "{row:?}");
    }
}

#[test]
fn one_wrong_value_is_noticed() {
    for case in small() {
        let (operands, results) = bench::answer(&case, DType::F32, &Device::Cpu).unwrap();
        case.check(&operands, &results).unwrap_or_else(|e| panic!("{case:?}: {e}"));
        for i in 0..results.len() {
            for wrong in [f64::NAN, 37.5] {
                let mut values = results[i].to_f64_vec().unwrap();
                // The last row is one of those that every check compares.
                *values.last_mut().unwrap() += wrong;
                let poisoned = Tensor::from_vec(values, results[i].shape()).unwrap().to_dtype(results[i].dtype()).unwrap();
                let mut results = results.clone();
                results[i] = poisoned;
                assert!(case.check(&operands, &results).is_err(), "{case:?}: {wrong} in result {i} passed");
            }
        }
    }
}

#[test]
fn sixteen_bits_pass_too() {
    let exempt = ["cayley", "cayley-audit", "gptq-layer", "gptq-model"];
    for case in small().filter(|c| !exempt.contains(&c.timing.as_ref().unwrap().kernel)) {
        for dtype in [DType::F16, DType::BF16] {
            let (operands, results) = bench::answer(&case, dtype, &Device::Cpu).unwrap();
            case.check(&operands, &results).unwrap_or_else(|e| panic!("{case:?} in {dtype}: {e}"));
        }
    }
}

/// Every operation with a kernel of its own is timed, and every timed case of an operation is in its list.
#[test]
fn every_operation_has_a_timed_case() {
    let cases = ops::cases();
    let of = |size: Size| cases.iter().filter(|c| c.size == size).map(|c| c.op).collect::<HashSet<_>>();
    let (small, timed) = (of(Size::Small), of(Size::Timed));
    let mut missing: Vec<_> = small.difference(&timed).collect();
    missing.sort();
    // Made of matrix products and cross entropies, and of copies.
    assert_eq!(missing, [&"linear_cross_entropy", &"mean_square", &"part"]);
    assert!(cases.iter().all(|c| (c.size == Size::Timed) == c.timing.is_some()));
}

/// Every line of benches/record/kernels-h100.md is still one of the table: kernel, n, rows, type.
#[test]
fn recorded_lines_are_still_measured() {
    let record = include_str!("../../benches/record/kernels-h100.md");
    let lines: HashSet<_> = bench::cases()
        .iter()
        .filter_map(|c| c.timing.as_ref())
        .filter(|t| t.place == ops::Place::Gpu)
        .flat_map(|t| t.dtypes.iter().map(|d| (t.kernel.to_string(), t.n.to_string(), t.rows.to_string(), d.to_string())))
        .collect();
    let mut found = 0;
    for words in record.lines().map(|l| l.split_whitespace().collect::<Vec<_>>()) {
        if let [kernel, n, rows, dtype @ ("f16" | "bf16" | "f32"), ..] = words[..] {
            let line = (kernel.to_string(), n.to_string(), rows.to_string(), dtype.to_string());
            assert!(lines.contains(&line), "{line:?} is no longer in the table");
            found += 1;
        }
    }
    assert_eq!(found, 115);
}
