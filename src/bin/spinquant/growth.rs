//! `spinquant profile --growth DIR`: how the time and the memory of a learning step grow with layers, batch, sequence length and width,
//! measured and as [`spinquant::memory`] predicts them, as CSV and as a picture.

use std::fmt::Write;
use std::ops::ControlFlow;
use std::path::Path;

use serde_json::json;
use spinquant::device::Card;
use spinquant::learn::{ClipChoice, LearnOptions, learn};
use spinquant::llama::{Plan, Recompute, synthetic};
use spinquant::memory::{Needs, Planned, Work, predict};
use spinquant::optim::{CayleySgd, Mode};
use spinquant::plot::{Axes, Panel, Series, lines};
use spinquant::quant::Scheme;
use spinquant::rotation::Rotations;
use spinquant::{DType, Device, Error, Result};

/// Every layer runs again, so that nothing but its input is kept: the plan that all sizes share.
const PLAN: Plan = Plan { recompute: usize::MAX, keep_weights: true, sequences: 0 };
const STEPS: usize = 3;

#[derive(Clone)]
struct Point {
    shape: &'static str,
    layers: usize,
    batch: usize,
    seq: usize,
}

const BASE: Point = Point { shape: "llama-2-7b", layers: 2, batch: 4, seq: 1024 };

/// What grows, its size at the base, and the points.
fn sweeps() -> Vec<(&'static str, f64, Vec<Point>)> {
    let with = |f: &dyn Fn(&mut Point, usize), sizes: &[usize]| {
        let point = |&size| {
            let mut point = BASE;
            f(&mut point, size);
            point
        };
        sizes.iter().map(point).collect()
    };
    let widths = ["llama-3.2-1b", "llama-3.2-3b", "llama-2-7b", "llama-2-13b"];
    vec![
        ("layers", 2.0, with(&|p, n| p.layers = n, &[1, 2, 4, 6, 8])),
        ("batch", 4.0, with(&|p, n| p.batch = n, &[1, 2, 4, 8, 16])),
        ("sequence length", 1024.0, with(&|p, n| p.seq = n, &[256, 512, 1024, 2048, 4096])),
        ("hidden size", 4096.0, widths.iter().map(|&shape| Point { shape, ..BASE }).collect()),
    ]
}

struct Measured {
    seconds: f64,
    bytes: f64,
    predicted: Planned,
}

fn measure(point: &Point, scheme: Scheme, device: &Device, card: &Card) -> Result<Measured> {
    let config = synthetic::shape(&format!("{}:{}", point.shape, point.layers))?;
    let work = Work { needs: Needs::Network, batch: point.batch, seq: point.seq, scheme, dtype: DType::BF16 };
    let predicted = predict(&config, &work, PLAN, point.batch, card)?;
    let model = synthetic::model(&config, 0, DType::BF16, device)?;
    let windows = synthetic::text(&config, STEPS * point.batch, point.seq, 0)?;
    let start = Rotations::random_hadamard(config.hidden_size, config.head_dim, config.layers, 0)?;
    reset_peak(device)?;
    let options = LearnOptions {
        scheme,
        steps: STEPS,
        batch: point.batch,
        micro_batch: Some(point.batch),
        held_out: Some(0),
        recompute: Some(Recompute::Planned(PLAN)),
        clip: ClipChoice::Keep,
        ..LearnOptions::default()
    };
    let mut seconds = f64::INFINITY;
    learn(&model, &windows, start, &mut CayleySgd::new(Mode::Default), &options, |step| {
        seconds = seconds.min(step.seconds);
        ControlFlow::Continue(())
    })?;
    let bytes = crate::common::peak_bytes(device).unwrap_or(0) as f64;
    Ok(Measured { seconds, bytes, predicted })
}

fn reset_peak(device: &Device) -> Result<()> {
    match device {
        Device::Cuda(d) => d.reset_peak(),
        _ => Err(Error::device("growth", "expected a GPU, got the CPU")),
    }
}

/// Measures all points, prints them and writes `growth.csv` and `growth.png`.
pub fn run(folder: &Path, scheme: Scheme, device: &Device, card: &Card, json: bool) -> Result<()> {
    let mut csv = "what,shape,layers,batch,seq_len,size,seconds,predicted_seconds,gib,predicted_gib\n".to_string();
    let gib = |bytes: f64| bytes / f64::from(1 << 30);
    std::fs::create_dir_all(folder).map_err(Error::io(folder))?;
    let base = measure(&BASE, scheme, device, card)?;
    let base = [base.seconds, base.bytes];
    let (mut panels, mut rows) = (vec![], vec![]);
    for (what, unit, points) in sweeps() {
        let mut series =
            ["time", "time, predicted", "memory", "memory, predicted"].map(|name| Series { name: name.into(), points: vec![] });
        for point in points {
            let m = measure(&point, scheme, device, card)?;
            let size = match what {
                "layers" => point.layers,
                "batch" => point.batch,
                "sequence length" => point.seq,
                _ => synthetic::shape(point.shape)?.hidden_size,
            };
            let values = [m.seconds, m.predicted.seconds, m.bytes, m.predicted.bytes() as f64];
            for (i, (series, value)) in series.iter_mut().zip(values).enumerate() {
                series.points.push((size as f64 / unit, value / base[i / 2]));
            }
            let Point { shape, layers, batch, seq } = point;
            let row = [values[0], values[1], gib(values[2]), gib(values[3])].map(|v| format!("{v:.4}")).join(",");
            let row = format!("{what},{shape},{layers},{batch},{seq},{size},{row}");
            if !json {
                out!("{row}");
            }
            let _ = writeln!(csv, "{row}");
            rows.push(json!({
                "what": what, "shape": shape, "layers": layers, "batch": batch, "seq_len": seq, "size": size,
                "seconds": values[0], "predicted_seconds": values[1], "bytes": values[2], "predicted_bytes": values[3],
            }));
        }
        panels.push(Panel { title: format!("{what} (1 = {unit})"), series: series.into() });
    }
    let path = folder.join("growth.csv");
    spinquant::io::write_atomically(&path, |out| std::io::Write::write_all(out, csv.as_bytes()))?;
    let axes = Axes { x: "size, multiples of the base", y: "multiples of the base's step", log_y: false };
    lines(&folder.join("growth.png"), (1500, 460), &panels, axes)?;
    if json {
        out!("{}", json!({"base_seconds": base[0], "base_bytes": base[1], "points": rows, "out": folder}));
        return Ok(());
    }
    out!(
        "base: {} of {} layers, {} x {} tokens: {:.3} s, {:.2} GiB",
        BASE.shape,
        BASE.layers,
        BASE.batch,
        BASE.seq,
        base[0],
        gib(base[1])
    );
    Ok(())
}
