//! From a model to an output folder: every layer rotated, quantised, written, in order.

use std::ops::ControlFlow;
use std::path::Path;

use super::compressed::WithStoredScales;
use super::{Format, Output, Stored, Writer};
use crate::calibrate::{Calibration, LayerReport, LayerStore, QuantizedLayer, quantize_layers};
use crate::llama::{Affine, Linears, Llama, LlamaConfig, Rotated, Source};
use crate::quant::{QuantizedLinear, Rtn, Scheme, WeightQuantizer};
use crate::ranks::Group;
use crate::rotation::Rotations;
use crate::{DType, Device, Error, Result};

/// Quantises a rotated model layer by layer and writes it. A run that was interrupted continues, and ends in the same bytes. Of
/// [`Calibration::ranks`] rank 0 writes.
///
/// # Errors
/// Those of [`Writer`] and [`quantize_layers`]; a model whose RMSNorm gains are not folded into its weights; clip constants to be learned
/// for a format that has none.
pub fn write_quantized(
    rotated: &Rotated<'_>,
    quantizer: &dyn WeightQuantizer,
    calibration: Option<&Calibration<'_>>,
    output: Output<'_>,
    progress: impl FnMut(&LayerReport) -> ControlFlow<()>,
) -> Result<()> {
    if !rotated.is_folded() {
        return Err(Error::argument("export", "expected a model whose RMSNorm gains are folded (Llama::load)"));
    }
    let reconstruct = calibration.and_then(|c| c.reconstruct.as_ref());
    if let Some(by) = reconstruct {
        by.check(rotated.scheme())?;
        if by.clips && output.format != Format::Native {
            let message = format!("clips: {} has no clip constants of activations; expected scales alone", output.format.name());
            return Err(Error::argument("reconstruct", message));
        }
    }
    let (dtype, rotations) = (rotated.dtype(), rotated.rotations());
    let with_stored_scales = WithStoredScales { quantizer, dtype };
    let quantizer = if output.format == Format::CompressedTensors { &with_stored_scales } else { quantizer };
    let ranks = calibration.map_or(Group::nobody(), |c| &c.ranks);
    if !ranks.is_first() {
        return quantize_layers(rotated, quantizer, calibration, &mut (), progress, drop);
    }
    let create = || Writer::create(output, rotated.config(), rotated.scheme(), dtype, rotations, &rotated.sha256()?);
    let writer = create().inspect_err(|e| ranks.fail(e))?;
    quantize_layers(rotated, quantizer, calibration, &mut Layers(&writer), progress, drop)?;
    writer.finish(&rotated.embedding()?, &rotated.head()?)
}

/// The layers of an unfinished output.
struct Layers<'a, 'w>(&'a Writer<'w>);

impl LayerStore for Layers<'_, '_> {
    fn has(&self, index: usize) -> bool {
        self.0.has_layer(index)
    }

    fn load(&mut self, index: usize, dtype: DType, device: &Device) -> Result<QuantizedLayer> {
        let mut linears = vec![];
        for (_, Affine { weight, bias, norm }) in self.0.read_layer(index)? {
            let weight = match weight {
                Stored::Codes(codes) => QuantizedLinear::from_codes(codes, dtype, device)?,
                Stored::Values(values) => QuantizedLinear::exact(&values.to_device(device)?),
            };
            let [bias, norm] = [bias, norm].map(|t| t.map(|t| t.to_device(device)).transpose());
            linears.push(Affine { weight, bias: bias?, norm: norm? });
        }
        let mut clips = self.0.read_clips(index)?;
        for t in clips.iter_mut().flatten() {
            *t = t.to_device(device)?;
        }
        Ok(QuantizedLayer { index, linears: Linears::from_vec(linears)?, clips })
    }

    fn save(&mut self, layer: &QuantizedLayer) -> Result<()> {
        let hf = self.0.output.format == Format::Hf;
        let stored = |l: &QuantizedLinear| match &l.codes {
            Some(codes) if !hf => Stored::Codes(codes.clone()),
            _ => Stored::Values(l.weight.clone()),
        };
        self.0.clipped_layer(layer.index, &layer.linears.each(|_, l| Ok(l.with_weight(stored(&l.weight))))?, &layer.clips)
    }
}

/// Merges rotations into the model at `source` and writes it in the Hugging Face layout: all in `f64`, a layer at a time, rounded
/// once to the source's element type; then, where the scheme quantises weights, to the nearest values of its grid. `progress` is
/// told how many layers are done. Other quantisers: [`Rotated::open`] and [`write_quantized`].
///
/// # Errors
/// Those of [`Source`], [`Writer`], and rotations that do not fit.
pub fn write_hf(
    source: &Path,
    rotations: Option<&Rotations>,
    scheme: &Scheme,
    output: Output<'_>,
    progress: impl FnMut(usize),
) -> Result<()> {
    let config = LlamaConfig::from_file(source.join("config.json"))?;
    let weights = Source::open(source, &config)?;
    let output = Output { format: Format::Hf, source: Some(source), ..output };
    write_rounded(&Rotated::open(&weights, rotations, scheme, &Device::Cpu)?, output, progress)
}

/// Writes what [`Llama::merge`] makes of a model, weights rounded to nearest; a native output loads to the same bits.
///
/// # Errors
/// Those of [`Writer`], and rotations that do not fit.
pub fn write_rtn(
    model: &Llama,
    rotations: Option<&Rotations>,
    scheme: &Scheme,
    output: Output<'_>,
    progress: impl FnMut(usize),
) -> Result<()> {
    write_rounded(&Rotated::new(model, rotations, scheme)?, output, progress)
}

fn write_rounded(rotated: &Rotated<'_>, output: Output<'_>, mut progress: impl FnMut(usize)) -> Result<()> {
    write_quantized(rotated, &Rtn, None, output, |report| {
        progress(report.done);
        ControlFlow::Continue(())
    })
}
