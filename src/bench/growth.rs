//! How the time and the memory of a learning step grow with layers, batch, sequence length and width: measured, and as
//! [`memory`](crate::memory) predicts them.

use std::fmt;
use std::ops::ControlFlow;

use crate::learn::{ClipChoice, LearnOptions, learn};
use crate::llama::{Plan, Recompute, synthetic};
use crate::memory::{Planned, Work, predict};
use crate::optim::{CayleySgd, Mode};
use crate::quant::Scheme;
use crate::rotation::Rotations;
use crate::{DType, Device, Error, Result};

/// Every layer runs again, so that nothing but its input is kept: the plan that all sizes share.
const PLAN: Plan = Plan { recompute: usize::MAX, keep_weights: true, sequences: 0 };
const STEPS: usize = 3;

/// What grows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Axis {
    /// Decoder layers.
    Layers,
    /// Sequences a step.
    Batch,
    /// Tokens of a sequence.
    Sequence,
    /// The hidden size, from model to model.
    Width,
}

impl fmt::Display for Axis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Layers => "layers",
            Self::Batch => "batch",
            Self::Sequence => "sequence length",
            Self::Width => "hidden size",
        })
    }
}

/// A step's size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// A model of [`synthetic::shape`].
    pub shape: &'static str,
    /// Its decoder layers.
    pub layers: usize,
    /// Sequences a step.
    pub batch: usize,
    /// Tokens of each.
    pub seq: usize,
}

/// The size that all others are compared with.
pub const BASE: Size = Size { shape: "llama-2-7b", layers: 2, batch: 4, seq: 1024 };

/// What a step took.
#[derive(Clone, Debug, PartialEq)]
pub struct Measured {
    /// Wall-clock seconds of the fastest step.
    pub seconds: f64,
    /// The most bytes of tensors at once.
    pub bytes: u64,
    /// The same as predicted.
    pub predicted: Planned,
}

/// One point of a curve.
#[derive(Clone, Debug, PartialEq)]
pub struct Point {
    /// What grows.
    pub axis: Axis,
    /// The size.
    pub size: Size,
    /// How large it is along the axis.
    pub along: usize,
    /// What its step took.
    pub measured: Measured,
}

impl Point {
    fn new(axis: Axis, size: Size, measured: Measured) -> Result<Self> {
        Ok(Self { axis, size, along: axis.of(&size)?, measured })
    }

    /// Time and memory, each measured and predicted.
    fn values(&self) -> [f64; 4] {
        let m = &self.measured;
        [m.seconds, m.predicted.seconds, m.bytes as f64, m.predicted.bytes() as f64]
    }

    /// A row of [`Growth::csv`]; memory in GiB.
    pub fn csv(&self) -> String {
        let Size { shape, layers, batch, seq } = self.size;
        let [seconds, predicted, bytes, predicted_bytes] = self.values();
        let gib = |bytes: f64| bytes / f64::from(1 << 30);
        let row = [seconds, predicted, gib(bytes), gib(predicted_bytes)].map(|v| format!("{v:.4}")).join(",");
        format!("{},{shape},{layers},{batch},{seq},{},{row}", self.axis, self.along)
    }
}

/// Every curve.
#[derive(Clone, Debug, PartialEq)]
pub struct Growth {
    /// What a step of [`BASE`] took.
    pub base: Measured,
    /// The points, curve by curve.
    pub points: Vec<Point>,
}

impl Axis {
    /// Every axis.
    pub const ALL: [Self; 4] = [Self::Layers, Self::Batch, Self::Sequence, Self::Width];

    /// How large a size is along this axis.
    fn of(self, size: &Size) -> Result<usize> {
        Ok(match self {
            Self::Layers => size.layers,
            Self::Batch => size.batch,
            Self::Sequence => size.seq,
            Self::Width => synthetic::shape(size.shape)?.hidden_size,
        })
    }

    /// The sizes that are measured: [`BASE`] but for what grows.
    pub fn sizes(self) -> Vec<Size> {
        let each = |counts: [usize; 5], of: fn(usize) -> Size| counts.map(of).to_vec();
        match self {
            Self::Layers => each([1, 2, 4, 6, 8], |layers| Size { layers, ..BASE }),
            Self::Batch => each([1, 2, 4, 8, 16], |batch| Size { batch, ..BASE }),
            Self::Sequence => each([256, 512, 1024, 2048, 4096], |seq| Size { seq, ..BASE }),
            Self::Width => {
                ["llama-3.2-1b", "llama-3.2-3b", "llama-2-7b", "llama-2-13b"].map(|shape| Size { shape, ..BASE }).to_vec()
            }
        }
    }
}

/// Measures [`BASE`] and all sizes of every axis; `told` hears of each point.
///
/// # Errors
/// Those of [`measure_one`].
pub fn measure(scheme: Scheme, device: &Device, mut told: impl FnMut(&Point)) -> Result<Growth> {
    let mut growth = Growth { base: measure_one(&BASE, scheme, device)?, points: vec![] };
    for axis in Axis::ALL {
        for size in axis.sizes() {
            let point = Point::new(axis, size, measure_one(&size, scheme, device)?)?;
            told(&point);
            growth.points.push(point);
        }
    }
    Ok(growth)
}

/// Takes a few steps of one size, in bf16, with seeded weights and text.
///
/// # Errors
/// [`Error::Device`] for the CPU, whose memory is not counted; a shape that is none; those of predicting and learning.
pub fn measure_one(size: &Size, scheme: Scheme, device: &Device) -> Result<Measured> {
    let Device::Cuda(gpu) = device else {
        return Err(Error::device("growth", "expected a GPU, got the CPU"));
    };
    let config = synthetic::shape(&format!("{}:{}", size.shape, size.layers))?;
    let work = Work::new(scheme, size.batch, size.seq, DType::BF16);
    let predicted = predict(&config, &work, PLAN, size.batch, &gpu.card()?)?;
    let model = synthetic::model(&config, 0, DType::BF16, device)?;
    let windows = synthetic::text(&config, STEPS * size.batch, size.seq, 0)?;
    let start = Rotations::random_hadamard(config.hidden_size, config.head_dim, config.layers, 0)?;
    gpu.reset_peak()?;
    let options = LearnOptions {
        scheme,
        steps: STEPS,
        batch: size.batch,
        micro_batch: Some(size.batch),
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
    Ok(Measured { seconds, bytes: gpu.peak_bytes()?, predicted })
}

impl Growth {
    /// All points, a row each, under a header.
    pub fn csv(&self) -> String {
        let header = "what,shape,layers,batch,seq_len,size,seconds,predicted_seconds,gib,predicted_gib";
        let rows = self.points.iter().map(|point| point.csv() + "\n");
        format!("{header}\n") + &rows.collect::<String>()
    }

    /// A picture: a panel for each axis, sizes and values as multiples of the base's.
    ///
    /// # Errors
    /// [`Error::Io`].
    #[cfg(feature = "cli")]
    pub fn draw(&self, path: &std::path::Path) -> Result<()> {
        use crate::plot::{Axes, Panel, Series, lines};
        let base = [self.base.seconds, self.base.bytes as f64];
        let panel = |axis: Axis| -> Result<Panel> {
            let unit = axis.of(&BASE)?;
            let points = || self.points.iter().filter(|point| point.axis == axis);
            let curve = |i: usize| points().map(|p| (p.along as f64 / unit as f64, p.values()[i] / base[i / 2])).collect();
            let names = ["time", "time, predicted", "memory", "memory, predicted"].into_iter().enumerate();
            let series = names.map(|(i, name)| Series { name: name.into(), points: curve(i) }).collect();
            Ok(Panel { title: format!("{axis} (1 = {unit})"), series })
        };
        let axes = Axes { x: "size, multiples of the base", y: "multiples of the base's step", log_y: false };
        lines(path, (1500, 460), &Axis::ALL.into_iter().map(panel).collect::<Result<Vec<_>>>()?, axes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_and_pictures_have_every_point() {
        let items = vec![("model", 3 << 29)];
        let placement = crate::llama::Placement::RESIDENT;
        let predicted =
            Planned { plan: PLAN, micro_batch: 4, placement, items, host: 0, moved: 0, read: 0, seconds: 0.25, on_integers: 0 };
        let measured = Measured { seconds: 0.5, bytes: 1 << 30, predicted };
        let sizes = Axis::ALL.into_iter().flat_map(|axis| axis.sizes().into_iter().map(move |size| (axis, size)));
        let points = sizes.map(|(axis, size)| Point::new(axis, size, measured.clone()).unwrap()).collect();
        let growth = Growth { base: measured.clone(), points };
        let csv = growth.csv();
        assert_eq!(csv.lines().count(), 1 + 3 * 5 + 4);
        assert!(csv.lines().any(|line| line == "sequence length,llama-2-7b,2,4,256,256,0.5000,0.2500,1.0000,1.5000"), "{csv}");
        assert!(csv.lines().any(|line| line == "hidden size,llama-2-13b,2,4,1024,5120,0.5000,0.2500,1.0000,1.5000"), "{csv}");
        #[cfg(feature = "cli")]
        {
            let folder = tempfile::tempdir().unwrap();
            growth.draw(&folder.path().join("growth.png")).unwrap();
            assert!(std::fs::read(folder.path().join("growth.png")).unwrap().starts_with(b"\x89PNG"));
        }
        // A CPU is refused before a model is made.
        assert!(measure(Scheme::new(4, 4, 4), &Device::Cpu, |_| {}).unwrap_err().to_string().contains("expected a GPU"));
    }
}
