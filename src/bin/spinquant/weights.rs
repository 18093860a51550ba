//! How weights are quantised: the arguments, and the model they make.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde_json::Value;
use spinquant::calibrate::Calibration;
use spinquant::data::Windows;
use spinquant::llama::LlamaConfig;
use spinquant::quant::{Correction, Gptq, WeightQuantizer};
use spinquant::{Error, Result};

use crate::common::{ModelArgs, at_least_one};

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
}

impl GptqArgs {
    /// The quantiser.
    pub fn quantizer(&self, correction: Correction) -> Gptq {
        Gptq { damping: self.damping, act_order: self.act_order, correction, ..Gptq::default() }
    }

    /// What it is calibrated on.
    pub fn calibration<'a>(&self, text: &'a Windows) -> Result<Calibration<'a>> {
        Ok(Calibration::first(text, self.calibration_windows)?.quantize_activations(self.calibrate_quantized))
    }

    /// The settings of a quantiser, for the record: a run that continues must have the same.
    pub fn notes(&self, quantizer: &Gptq) -> BTreeMap<String, Value> {
        BTreeMap::from([
            ("calibration_windows".into(), self.calibration_windows.into()),
            ("damping".into(), self.damping.into()),
            ("act_order".into(), self.act_order.into()),
            ("calibrate_quantized".into(), (self.calibrate_quantized || quantizer.reads_quantized()).into()),
        ])
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
        config: &LlamaConfig,
        file: Option<&PathBuf>,
        seq_len: usize,
    ) -> Result<Option<Windows>> {
        if !method.reads_text() {
            return Ok(None);
        }
        self.check()?;
        let file = file.ok_or_else(|| Error::argument(format!("--weights {method}"), "needs --calibration FILE"))?;
        let text = model.windows(config, file, seq_len)?;
        self.calibration(&text)?;
        Ok(Some(text))
    }
}
