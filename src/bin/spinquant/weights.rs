//! How weights are quantised: the arguments, and the model they make.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde_json::Value;
use spinquant::calibrate::{Calibration, Reconstruct};
use spinquant::data::Windows;
use spinquant::llama::LlamaConfig;
use spinquant::memory::Layerwise;
use spinquant::quant::{Correction, Gptq, Scheme, Site, WeightQuantizer};
use spinquant::ranks::Group;
use spinquant::{Error, Result};

use crate::common::{ModelArgs, at_least_one};
use crate::ranks;

/// How weights are quantised.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Method {
    /// Round to nearest.
    Rtn,
    /// Layer by layer on calibration text (Frantar et al. 2022), corrected or not.
    Gptq(Correction),
}

impl Method {
    /// For help texts.
    pub const NAMES: &str = "rtn|gptq|gptaq[:ALPHA]|qep[:PART]|qronos|foem[:BETA]";

    /// True where calibration text is read.
    pub fn reads_text(self) -> bool {
        self != Self::Rtn
    }
}

impl FromStr for Method {
    type Err = Error;
    fn from_str(s: &str) -> Result<Self> {
        if s == "rtn" { Ok(Self::Rtn) } else { s.parse().map(Self::Gptq) }
    }
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Rtn => f.pad("rtn"),
            Self::Gptq(correction) => correction.fmt(f),
        }
    }
}

/// What GPTQ needs.
#[derive(clap::Args, Clone)]
pub struct GptqArgs {
    /// Windows of calibration text for GPTQ: the first of the text.
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = at_least_one)]
    calibration_windows: usize,
    /// Part of the Hessian's mean diagonal that is added to its diagonal.
    #[arg(long, value_name = "PART", default_value_t = 0.01)]
    damping: f64,
    /// Sweep columns in descending order of the Hessian's diagonal.
    #[arg(long)]
    act_order: bool,
    /// Quantise activations while calibrating (published: no, for GPTQ; gptaq, qep, qronos and foem do in any case).
    #[arg(long)]
    calibrate_quantized: bool,
    /// After a layer's weights are quantised, learn what is free in it so that its output comes back to that in full precision: the clip
    /// constants of activations, K and V, the scales of the weights (codes stay), or both. Needs --calibration, for rtn too, and calibrates
    /// with quantised activations (experimental).
    #[arg(long, value_name = "clips|scales|clips,scales")]
    reconstruct: Option<Reconstruct>,
    /// Steps a layer of --reconstruct.
    #[arg(long, value_name = "N", default_value_t = Reconstruct::default().steps, value_parser = at_least_one, requires = "reconstruct")]
    reconstruct_steps: usize,
    /// Its learning rate for clip constants in the first step; scales are learned at a fifth of it.
    #[arg(long, value_name = "RATE", default_value_t = Reconstruct::default().rate, requires = "reconstruct")]
    reconstruct_lr: f64,
}

impl GptqArgs {
    /// The quantiser.
    pub fn quantizer(&self, correction: Correction) -> Gptq {
        Gptq { damping: self.damping, act_order: self.act_order, correction, ..Gptq::default() }
    }

    /// What it is calibrated on, and by which ranks.
    pub fn calibration<'a>(&self, text: &'a Windows) -> Result<Calibration<'a>> {
        // What is learned of a layer every rank learns by itself.
        let ranks = if self.reconstruct.is_some() { Group::alone() } else { ranks::group() };
        let calibration = Calibration::first(text, self.calibration_windows)?.among(ranks);
        calibration.check_shares()?;
        Ok(calibration.quantize_activations(self.calibrate_quantized).reconstruct(self.reconstruct()))
    }

    /// What is learned of every layer once its weights are quantised.
    pub fn reconstruct(&self) -> Option<Reconstruct> {
        let (steps, rate) = (self.reconstruct_steps, self.reconstruct_lr);
        self.reconstruct.map(|what| Reconstruct { steps, rate, ..what })
    }

    /// What decides how much memory a method takes on windows of so many tokens.
    pub fn layerwise(&self, method: Method, seq_len: usize) -> Layerwise {
        if !self.reads_text(method) {
            return Layerwise::default();
        }
        let gptq = match method {
            Method::Gptq(correction) => Some(self.quantizer(correction)),
            Method::Rtn => None,
        };
        let drifts = gptq.as_ref().is_some_and(|gptq| Site::ALL.into_iter().any(|site| gptq.wants_drift(site)));
        let ranks = if self.reconstruct.is_some() { 1 } else { ranks::group().world() };
        let tokens = self.calibration_windows.div_ceil(ranks) * seq_len;
        Layerwise { tokens, hessians: gptq.is_some(), twice: drifts || self.reconstruct.is_some() }
    }

    /// A method and what comes behind it, in words.
    pub fn described(&self, method: Method) -> String {
        self.reconstruct.map_or_else(|| method.to_string(), |by| format!("{method} + {by}"))
    }

    /// True where a method, or what comes behind it, reads calibration text.
    pub fn reads_text(&self, method: Method) -> bool {
        method.reads_text() || self.reconstruct.is_some()
    }

    /// The settings of a quantiser, where it has some, and of what comes behind it, for the record: a run that continues must have the same.
    pub fn notes(&self, quantizer: Option<&Gptq>) -> BTreeMap<String, Value> {
        let reads_quantized = quantizer.is_some_and(Gptq::reads_quantized) || self.reconstruct.is_some();
        let mut notes: BTreeMap<String, Value> = BTreeMap::from([
            ("calibration_windows".into(), self.calibration_windows.into()),
            ("calibrate_quantized".into(), (self.calibrate_quantized || reads_quantized).into()),
        ]);
        if quantizer.is_some() {
            notes.extend([("damping".into(), self.damping.into()), ("act_order".into(), self.act_order.into())]);
        }
        if let Some(by) = self.reconstruct() {
            notes.insert("reconstruct".into(), by.to_string().into());
            notes.insert("reconstruct_steps".into(), by.steps.into());
            notes.insert("reconstruct_lr".into(), by.rate.into());
        }
        notes
    }

    /// Checks the numbers.
    pub fn check(&self) -> Result<()> {
        self.quantizer(Correction::None).check()
    }

    /// The text that a method calibrates on, long enough for it; None where it reads none.
    pub fn text(
        &self,
        method: Method,
        model: &ModelArgs,
        (config, scheme): (&LlamaConfig, &Scheme),
        file: Option<&PathBuf>,
        seq_len: usize,
    ) -> Result<Option<Windows>> {
        if !self.reads_text(method) {
            return Ok(None);
        }
        self.check()?;
        self.reconstruct().map_or(Ok(()), |by| by.check(scheme))?;
        let what = || if method.reads_text() { format!("--weights {method}") } else { "--reconstruct".into() };
        let file = file.ok_or_else(|| Error::argument(what(), "needs --calibration FILE"))?;
        let text = model.windows(config, file, seq_len)?;
        self.calibration(&text)?;
        Ok(Some(text))
    }
}
