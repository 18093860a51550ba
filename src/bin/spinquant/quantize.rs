//! `spinquant quantize`.

use std::path::PathBuf;

use spinquant::compare::LayerWatch;
use spinquant::data::Windows;
use spinquant::export::{self, Format, Output, Provenance, Target, write_quantized};
use spinquant::llama::{LlamaConfig, Rotated, Source};
use spinquant::memory;
use spinquant::quant::{ClipRatios, Rtn, Scheme, WeightQuantizer};
use spinquant::rotation::{ClipEnds, RotationFile, Rotations, Start};
use spinquant::{DType, Error, Result};

use crate::common::{ModelArgs, Progress, note, open_model, rotations};
use crate::ranks::{self, RanksArgs};
use crate::scheme::SchemeArgs;
use crate::stop;
use crate::weights::{GptqArgs, Method};

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    ranks: RanksArgs,
    #[command(flatten)]
    scheme: SchemeArgs,
    #[command(flatten)]
    gptq: GptqArgs,
    #[arg(long, value_name = "WHICH", help = Start::usage(&[]))]
    rotations: Start,
    /// How weights are quantised: to nearest, by GPTQ, or by one of its successors, which correct for activations that are quantised
    /// (experimental).
    #[arg(long, value_name = Method::NAMES, default_value_t = Method::Rtn)]
    weights: Method,
    /// Calibration text, for all but rtn, and for --reconstruct.
    #[arg(long, value_name = "FILE")]
    calibration: Option<PathBuf>,
    /// Tokens of a calibration window.
    #[arg(long, default_value_t = 2048)]
    seq_len: usize,
    /// native: packed codes, for `spinquant eval`; hf: a Hugging Face folder for any runtime, weights as values in the
    /// type of the model's files; compressed-tensors: one with packed weights and what is known of activations, for
    /// transformers and vLLM (both with --online none; vLLM also runs r4=block:N).
    #[arg(long, value_name = "native|hf|compressed-tensors", default_value = "native")]
    format: Format,
    /// The runtime that a compressed-tensors folder is for: what it cannot run is refused.
    #[arg(long, value_name = "transformers|vllm")]
    target: Option<Target>,
    /// The folder to write; absent or empty.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Replace the quantised model that is in the folder, if spinquant wrote it.
    #[arg(long)]
    overwrite: bool,
    /// Print what memory a layer takes, and stop there.
    #[arg(long)]
    dry_run: bool,
}

pub fn run(args: &Args) -> Result<()> {
    quantize(args, &Progress::new())
}

fn quantize(args: &Args, progress: &Progress) -> Result<()> {
    let several = ranks::group().world() > 1;
    if several && (args.gptq.reconstruct().is_some() || !args.gptq.reads_text(args.weights)) {
        let message = "several processes share the calibration text of --weights gptq and its successors, without --reconstruct";
        return Err(Error::argument("--weights", format!("{message}; got {}", args.gptq.described(args.weights))));
    }
    let hf_device = match args.format {
        Format::Hf => Some(args.model.device_in_file_type("--format hf")?),
        Format::CompressedTensors => Some(args.model.device_in_file_type("--format compressed-tensors")?),
        Format::Native => None,
    };
    if args.target.is_some() && args.format != Format::CompressedTensors {
        return Err(Error::argument("--target", "is for --format compressed-tensors"));
    }
    args.format.check_codes(&args.scheme.scheme())?;
    let config = args.model.checked(&args.scheme.scheme(), args.gptq.reads_text(args.weights).then_some(args.seq_len))?;
    let rotations = rotations(&args.rotations, &config)?;
    let scheme = args.scheme.scheme_with(rotations.as_ref(), &config)?;
    let scheme = match args.format {
        Format::CompressedTensors => args.compressed(&config, &scheme)?,
        _ => scheme,
    };
    let rotations = rotations.map(|file| args.learned(&file, &scheme)).transpose()?;
    if args.dry_run {
        return args.print_plan(&config);
    }
    let text = args.gptq.text(args.weights, &args.model, (&config, &scheme), args.calibration.as_ref(), args.seq_len)?;
    args.model.one_layer(&config, args.dtype()?, args.gptq.layerwise(args.weights, args.seq_len))?;
    // A layer at a time is read or made, quantised and written.
    if let Some(device) = hf_device {
        let source = open_model(&args.model.model)?;
        write(args, &Rotated::open(&source, rotations.as_ref(), &scheme, &device)?, text.as_ref(), progress)?;
    } else {
        let supply = args.model.supply(progress)?;
        write(args, &Rotated::of(&supply, rotations.as_ref(), &scheme)?, text.as_ref(), progress)?;
    }
    let written = args.format.holds(&scheme);
    if written.to_string() != scheme.to_string() {
        note(&format!(
            "a Hugging Face folder holds weights only, so this is {written}: a runtime computes activations and the KV cache as it likes, not as {scheme} says"
        ));
    }
    out!(
        "{written}, rotations {}, weights {}: written to {}",
        args.rotations,
        args.gptq.described(args.weights),
        args.out.display()
    );
    Ok(())
}

impl Args {
    /// How the work is shared; a plan is made by one process.
    pub fn shared(&self) -> Option<&RanksArgs> {
        (!self.dry_run).then_some(&self.ranks)
    }

    /// The element type of the arithmetic.
    fn dtype(&self) -> Result<DType> {
        if self.format.is_hugging_face() { Source::from_dir(&self.model.model)?.dtype() } else { Ok(self.model.place()?.1) }
    }

    /// Says what a layer takes.
    fn print_plan(&self, config: &LlamaConfig) -> Result<()> {
        let (dtype, how) = (self.dtype()?, self.gptq.layerwise(self.weights, self.seq_len));
        let needs = memory::layerwise(config, dtype, how);
        let gib = |bytes: usize| bytes as f64 / f64::from(1 << 30);
        let method = self.gptq.described(self.weights);
        out!("{} in {dtype}, {method}, {} layers one at a time", self.model.name(), config.layers);
        for (what, items, sum) in
            [("on the device", &needs.card, needs.on_card()), ("in main memory", &needs.host, needs.in_main_memory())]
        {
            out!("{what}, at the worst moment: {:.2} GiB", gib(sum));
            items.iter().for_each(|(name, bytes)| out!("  {:8.2} GiB  {name}", gib(*bytes)));
        }
        self.model.one_layer(config, dtype, how).map(drop)
    }

    /// The rotations of a file, with clip constants where the format holds them.
    fn learned(&self, file: &RotationFile, scheme: &Scheme) -> Result<Rotations> {
        let rotations = self.scheme.learned_for(file, scheme)?;
        if self.format == Format::Native || rotations.clips.is_empty() {
            return Ok(rotations);
        }
        note(&format!(
            "a folder of --format {} has no clip constants of activations: those of the rotations' file are not used",
            if self.format == Format::Hf { "hf" } else { "compressed-tensors" }
        ));
        Ok(rotations.with_clips(ClipEnds::default()))
    }

    /// What a folder of compressed-tensors makes of a scheme, its departures said.
    fn compressed(&self, config: &LlamaConfig, scheme: &Scheme) -> Result<Scheme> {
        let held = self.format.holds(scheme);
        for line in export::notes(config, &held, self.target)? {
            note(&line);
        }
        if scheme.activation_clip != ClipRatios::NONE {
            let clip = scheme.activation_clip;
            if self.scheme.given_clip(None).is_some() {
                let message = format!("expected 1: compressed-tensors has no clip ratios of activations, got {clip}");
                return Err(Error::argument("--activation-clip", message));
            }
            note(&format!(
                "compressed-tensors has no clip ratios of activations: those of the rotations' file are not used: {clip}"
            ));
        }
        if (scheme.key_bits, scheme.value_bits) != (16, 16) {
            note(&format!("the KV cache is none of a compressed-tensors folder's business, so this is {held}, not {scheme}"));
        }
        Ok(held)
    }
}

fn write(args: &Args, rotated: &Rotated<'_>, text: Option<&Windows>, progress: &Progress) -> Result<()> {
    let layers = rotated.config().layers;
    let mut output = Output::new(&args.out, args.format);
    output.overwrite = args.overwrite;
    output.source = Some(&args.model.model);
    output.inputs.extend(args.calibration.clone());
    if let Start::File(path) = &args.rotations {
        output.inputs.push(path.clone());
    }
    output.provenance = Provenance {
        model: args.model.name(),
        rotations: args.rotations.to_string(),
        weights: args.weights.to_string(),
        seeds: args.rotations.seed().map(|seed| ("rotations".to_string(), seed)).into_iter().collect(),
        command: std::env::args().collect::<Vec<_>>().join(" "),
        notes: [("device".to_string(), rotated.device().to_string().into())].into(),
        ..Provenance::default()
    };
    stop::kept("the layers done are kept: the same command goes on from there");
    let gptq = match args.weights {
        Method::Gptq(correction) => Some(args.gptq.quantizer(correction)),
        Method::Rtn => None,
    };
    let Some(text) = text else {
        let mut task = progress.start("writing, layers", layers);
        return write_quantized(rotated, &Rtn, None, output, |report| {
            task.at(report.done, "");
            stop::asked()
        });
    };
    let calibration = args.gptq.calibration(text)?;
    output.provenance.notes.extend(args.gptq.notes(gptq.as_ref()));
    output.provenance.notes.insert("seq_len".into(), args.seq_len.into());
    output.provenance.notes.insert("bos".into(), args.model.bos().to_string().into());
    let file = args.calibration.as_ref().expect("just read");
    output.provenance.calibration_sha256 = Some(args.model.text_sha256(file, text)?);
    let mut watch = progress.watch();
    let damping = gptq.as_ref().map(|gptq| gptq.damping);
    let mut watched = LayerWatch::new(&mut watch, &args.gptq.described(args.weights), layers, damping);
    let quantizer: &dyn WeightQuantizer = gptq.as_ref().map_or(&Rtn, |gptq| gptq);
    write_quantized(rotated, quantizer, Some(&calibration), output, |report| watched.told(report))
}
