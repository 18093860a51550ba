//! Every launcher can be captured: in a CUDA graph it gives the bits that it gives outside. A program of its own, as nothing else may run on
//! the device's stream meanwhile: `cargo test --features cuda --test graphs -- --include-ignored`.
#![cfg(feature = "cuda")]

#[path = "../common/mod.rs"]
mod common;

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Mutex;

use spinquant::device::cuda::in_graphs;
use spinquant::ops::{Case, Place, Run, Size};
use spinquant::{DType, Device, Result, Tape, Tensor, ops};

use common::need::gpu;
use common::parity;

/// One test at a time has the stream.
static ALONE: Mutex<()> = Mutex::new(());

/// Of which operands gradients are asked for.
#[derive(Clone, Copy, Debug)]
enum Wanted {
    None,
    All,
    One(usize),
}

fn bits(t: &Tensor) -> Result<Vec<u64>> {
    Ok(t.to_f64_vec()?.into_iter().map(f64::to_bits).collect())
}

/// The bits of a graph's value and of its gradients.
fn graph(case: &Case, dtype: DType, device: &Device, wanted: Wanted) -> Result<Vec<Vec<u64>>> {
    let tape = Tape::new();
    let enter = |(i, t): (usize, Tensor)| match wanted {
        Wanted::All => tape.variable(t),
        Wanted::One(of) if of == i => tape.variable(t),
        _ => tape.constant(t),
    };
    let vars: Vec<_> = case.operands(dtype, device)?.into_iter().enumerate().map(enter).collect();
    let y = case.build(vars.clone())?;
    let mut all = vec![bits(y.value())?];
    if y.requires_grad() {
        let u = ops::randn(y.shape(), 0x5eed).to_dtype(y.value().dtype())?.to_device(device)?;
        let mut grads = tape.backward_from(y, u)?;
        for v in vars.iter().filter(|v| v.requires_grad()) {
            all.push(bits(&grads.take(v)?)?);
        }
    }
    Ok(all)
}

/// The bits of what a call without gradients gives.
fn call(case: &Case, dtype: DType, device: &Device) -> Result<Vec<Vec<u64>>> {
    let Run::Call(prepare) = &case.run else { return Ok(vec![]) };
    let mut call = prepare(&case.operands(dtype, device)?)?;
    (call.run)()?;
    (call.results)()?.iter().map(bits).collect()
}

/// What ran outside must run in graphs, with the same bits.
struct Compared {
    called: BTreeSet<&'static str>,
    failed: Vec<String>,
}

impl Compared {
    /// `may_fail`: what does not run outside is left out.
    fn compare(&mut self, name: String, may_fail: bool, run: impl Fn() -> Result<Vec<Vec<u64>>>) {
        let outside = match run() {
            Ok(outside) => outside,
            Err(_) if may_fail => return,
            Err(e) => return self.failed.push(format!("{name}: outside: {e}")),
        };
        let (inside, called) = in_graphs(run);
        self.called.extend(called);
        match inside {
            Ok(inside) if inside == outside => {}
            Ok(_) => self.failed.push(format!("{name}: other bits in a graph")),
            Err(e) => self.failed.push(format!("{name}: in a graph: {e}")),
        }
    }
}

/// The launchers that files of a folder of the library call.
fn called_by(folder: &Path, names: &mut BTreeSet<String>) {
    for path in std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()) {
        if path.is_dir() {
            called_by(&path, names);
        } else {
            let text = std::fs::read_to_string(&path).unwrap();
            let name = |rest: &str| rest.split('(').next().unwrap().to_string();
            names.extend(text.split("ffi!(").skip(1).map(name).filter(|name| name.starts_with("sq_")));
        }
    }
}

/// All cases, in every type, with and without gradients: no launcher is named here, and one that no case reaches is noticed.
#[test]
#[ignore = "needs a GPU"]
fn every_launcher_of_an_operation_works_in_a_graph() {
    let _alone = ALONE.lock().unwrap_or_else(|failed| failed.into_inner());
    let device = gpu();
    let mut compared = Compared { called: BTreeSet::new(), failed: vec![] };
    for case in ops::cases().into_iter().filter(|c| c.size != Size::Timed) {
        let operands = case.operands(DType::F64, &Device::Cpu).unwrap().len();
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            for wanted in [Wanted::None, Wanted::All].into_iter().chain((0..operands).map(Wanted::One)) {
                compared.compare(format!("{case:?} in {dtype}, {wanted:?}"), false, || graph(&case, dtype, &device, wanted));
            }
        }
        // Some operations know f64 on a GPU too.
        compared.compare(format!("{case:?} in f64"), true, || graph(&case, DType::F64, &device, Wanted::None));
    }
    // What is no graph on the tape, at a small size that most of them have.
    for case in ops::cases() {
        let Some(timing) = case.timing.as_ref().filter(|t| t.place == Place::Gpu && matches!(case.run, Run::Call(_))) else {
            continue;
        };
        for (n, rows) in [(128, 64), (4096, 8)] {
            let (small, dtypes) = ((timing.at)(n, rows), timing.dtypes);
            for &dtype in dtypes {
                compared.compare(format!("{small:?} in {dtype}"), true, || call(&small, dtype, &device));
            }
        }
    }
    let Compared { called, failed } = compared;
    assert!(failed.is_empty(), "{} of them: {}", failed.len(), failed.join("\n"));
    let mut all = BTreeSet::new();
    called_by(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src/ops"), &mut all);
    assert!(all.len() > 40, "{all:?}");
    let missed: Vec<_> = all.iter().filter(|name| !called.contains(name.as_str())).collect();
    assert!(missed.is_empty(), "no case reaches {missed:?}");
}

/// Optimisers agree with the CPU with all their launchers in graphs.
#[test]
#[ignore = "needs a GPU"]
fn optimisers_work_in_graphs() {
    let _alone = ALONE.lock().unwrap_or_else(|failed| failed.into_inner());
    let device = gpu();
    let ((), called) = in_graphs(|| {
        parity::cayley(&device, &parity::SMALL);
        parity::optimizers(&device);
    });
    assert!(called.len() > 8 && called.contains("sq_normalize_rows"), "{called:?}");
}
