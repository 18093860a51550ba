//! How weights are quantised: the arguments, and the model they make.

use std::path::PathBuf;

use spinquant::data::Windows;
use spinquant::llama::{Llama, Merged};
use spinquant::quant::{Calibration, Gptq, LayerStore, Scheme, quantize_weights};
use spinquant::rotation::Rotations;
use spinquant::{Error, Result};

use crate::common::{ModelArgs, Progress, interrupted};

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
    #[arg(long, value_name = "N", default_value_t = 128)]
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
    /// Rotates and quantises a model by GPTQ, with a progress bar.
    pub fn quantize(
        &self,
        model: &Llama,
        rotations: Option<&Rotations>,
        scheme: &Scheme,
        text: &Windows,
        store: &mut dyn LayerStore,
        progress: &Progress,
    ) -> Result<Merged> {
        let calibration = Calibration::first(text, self.calibration_windows)?.quantize_activations(self.calibrate_quantized);
        let gptq = Gptq { damping: self.damping, act_order: self.act_order, ..Gptq::default() };
        let mut task = progress.start("gptq, layers", model.config.layers);
        quantize_weights(model, rotations, scheme, &gptq, Some(&calibration), store, |report| {
            let raised = report.damping.filter(|d| *d > self.damping);
            if let Some(damping) = raised {
                progress
                    .say(&format!("layer {}: a Hessian is not positive definite; damping raised to {damping}", report.done - 1));
            }
            task.at(report.done, "");
            interrupted()
        })
    }

    /// Calibration text, which GPTQ cannot do without.
    pub fn text(&self, model: &ModelArgs, llama: &Llama, file: Option<&PathBuf>, seq_len: usize) -> Result<Windows> {
        let file = file.ok_or_else(|| Error::argument("--weights gptq", "needs --calibration FILE"))?;
        model.windows(&llama.config, file, seq_len)
    }
}
