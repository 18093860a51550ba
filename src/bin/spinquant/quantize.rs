//! `spinquant quantize`.

use std::path::PathBuf;

use spinquant::export::{self, Format, Output, Provenance, Stored, StoredLayer, Writer};
use spinquant::llama::Llama;
use spinquant::quant::{LayerStore, QuantizedLayer, QuantizedLinear};
use spinquant::{Error, Result};

use crate::common::{ModelArgs, Progress, RotationChoice, SchemeArgs};
use crate::weights::{GptqArgs, Method};

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    scheme: SchemeArgs,
    #[command(flatten)]
    gptq: GptqArgs,
    /// none, identity, hadamard[:SEED], orthogonal[:SEED], or a file that `learn` wrote.
    #[arg(long, value_name = "WHICH")]
    rotations: RotationChoice,
    /// How weights are quantised.
    #[arg(long, value_enum, default_value_t = Method::Rtn)]
    weights: Method,
    /// Calibration text for GPTQ.
    #[arg(long, value_name = "FILE")]
    calibration: Option<PathBuf>,
    /// Tokens of a calibration window.
    #[arg(long, default_value_t = 2048)]
    seq_len: usize,
    /// native: packed codes, for `spinquant eval`; hf: a Hugging Face folder for any runtime (rounded to nearest, --online none).
    #[arg(long, value_name = "native|hf", default_value = "native")]
    format: Format,
    /// The folder to write; absent or empty.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Replace what is in the folder.
    #[arg(long)]
    overwrite: bool,
}

pub fn run(args: &Args) -> Result<()> {
    let progress = Progress::new();
    let scheme = args.scheme.scheme();
    let calibration = args.calibration.as_ref().filter(|_| args.weights == Method::Gptq);
    let mut output = Output::new(&args.out, args.format);
    output.overwrite = args.overwrite;
    output.source = Some(&args.model.model);
    output.provenance = Provenance {
        model: args.model.model.display().to_string(),
        rotations: args.rotations.to_string(),
        weights: args.weights.name().to_string(),
        calibration_sha256: calibration
            .map(|path| {
                std::fs::read(path).map(|bytes| export::sha256(&bytes)).map_err(|source| Error::Io { path: path.clone(), source })
            })
            .transpose()?,
        command: std::env::args().collect::<Vec<_>>().join(" "),
        ..Provenance::default()
    };
    let layers = |progress: &Progress, total| {
        let mut task = progress.start("writing, layers", total);
        move |done| task.at(done, "")
    };
    match (args.format, args.weights) {
        (Format::Hf, Method::Gptq) => {
            let message = "GPTQ is written as its codes: use --format native (or --weights rtn)";
            return Err(Error::argument("--format hf", message));
        }
        (Format::Hf, Method::Rtn) => {
            let config = spinquant::llama::LlamaConfig::from_file(args.model.model.join("config.json"))?;
            let rotations = args.rotations.load(&config)?;
            export::write_hf(&args.model.model, rotations.as_ref(), &scheme, output, layers(&progress, config.layers))?;
        }
        (Format::Native, Method::Rtn) => {
            let model = args.model.load(&progress)?;
            let rotations = args.rotations.load(&model.config)?;
            let bar = layers(&progress, model.config.layers);
            export::write_rtn(&model, rotations.as_ref(), &scheme, output, bar)?;
        }
        (Format::Native, Method::Gptq) => {
            let model = args.model.load(&progress)?;
            let rotations = args.rotations.load(&model.config)?;
            let text = args.gptq.text(&args.model, &model, args.calibration.as_ref(), args.seq_len)?;
            let identity = export::sample_sha256(&model)?;
            let writer = Writer::create(output, &model.config, &scheme, model.dtype(), rotations.as_ref(), &identity)?;
            let mut store = Store { writer: &writer, model: &model };
            let merged = args.gptq.quantize(&model, rotations.as_ref(), &scheme, &text, &mut store, &progress)?;
            writer.finish(&merged.embedding, &merged.head)?;
        }
    }
    println!("{scheme}, rotations {}, weights {}: written to {}", args.rotations, args.weights.name(), args.out.display());
    Ok(())
}

/// Keeps GPTQ's layers in the unfinished output, so that an interrupted run continues from them.
struct Store<'a, 'w> {
    writer: &'a Writer<'w>,
    model: &'a Llama,
}

impl LayerStore for Store<'_, '_> {
    fn load(&mut self, index: usize) -> Result<Option<QuantizedLayer>> {
        if !self.writer.has_layer(index) {
            return Ok(None);
        }
        let stored = self.writer.read_layer(index)?;
        let linear = |(stored, like): (Stored, &spinquant::Tensor)| match stored {
            Stored::Codes(codes) => QuantizedLinear::from_codes(codes, like),
            Stored::Values(values) => Ok(QuantizedLinear::exact(&values.to_device(&like.device())?)),
        };
        let originals = self.model.blocks[index].weights.as_array();
        let linears = stored.into_iter().zip(originals).map(linear).collect::<Result<Vec<_>>>()?;
        Ok(Some(QuantizedLayer { index, linears: linears.try_into().expect("seven of them") }))
    }

    fn save(&mut self, layer: &QuantizedLayer) -> Result<()> {
        let stored: StoredLayer = layer.linears.clone().map(|l| l.codes.map_or(Stored::Values(l.weight), Stored::Codes));
        self.writer.layer(layer.index, &stored)
    }
}
