//! How weights are quantised: the arguments, and the model they make.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde_json::Value;
use spinquant::calibrate::Calibration;
use spinquant::data::Windows;
use spinquant::llama::LlamaConfig;
use spinquant::quant::Gptq;
use spinquant::{Error, Result};

use crate::common::{ModelArgs, at_least_one};

/// How weights are quantised.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Method {
    /// Round to nearest.
    Rtn,
    /// Layer by layer on calibration text (Frantar et al. 2022).
    Gptq,
}

impl Method {
    pub fn name(self) -> &'static str {
        match self {
            Self::Rtn => "rtn",
            Self::Gptq => "gptq",
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
    /// Quantise activations while calibrating (published: no).
    #[arg(long)]
    calibrate_quantized: bool,
}

impl GptqArgs {
    /// The quantiser.
    pub fn quantizer(&self) -> Gptq {
        Gptq { damping: self.damping, act_order: self.act_order, ..Gptq::default() }
    }

    /// What it is calibrated on.
    pub fn calibration<'a>(&self, text: &'a Windows) -> Result<Calibration<'a>> {
        Ok(Calibration::first(text, self.calibration_windows)?.quantize_activations(self.calibrate_quantized))
    }

    /// The settings, for the record: a run that continues must have the same.
    pub fn notes(&self) -> BTreeMap<String, Value> {
        BTreeMap::from([
            ("calibration_windows".into(), self.calibration_windows.into()),
            ("damping".into(), self.damping.into()),
            ("act_order".into(), self.act_order.into()),
            ("calibrate_quantized".into(), self.calibrate_quantized.into()),
        ])
    }

    /// Checks the numbers.
    pub fn check(&self) -> Result<()> {
        self.quantizer().check()
    }

    /// Calibration text, which GPTQ cannot do without, long enough for it.
    pub fn text(&self, model: &ModelArgs, config: &LlamaConfig, file: Option<&PathBuf>, seq_len: usize) -> Result<Windows> {
        self.check()?;
        let file = file.ok_or_else(|| Error::argument("--weights gptq", "needs --calibration FILE"))?;
        let text = model.windows(config, file, seq_len)?;
        self.calibration(&text)?;
        Ok(text)
    }
}
