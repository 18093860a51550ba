//! The network that a command asks a model for: rotated and quantised as the arguments say, or as `quantize` wrote it.

use std::path::PathBuf;

use spinquant::calibrate::{LayerReport, quantize_weights};
use spinquant::compare::{LayerWatch, quantized};
use spinquant::data::Windows;
use spinquant::export::{Record, is_native, load_native_placed, load_native_with_codes};
use spinquant::llama::{Compressed, Llama, LlamaConfig, Merged};
use spinquant::memory;
use spinquant::quant::{Online, Rtn, Scheme};
use spinquant::rotation::{Rotations, Start};
use spinquant::{Error, Result};

use crate::common::{ModelArgs, Progress, check_length, contradicts, rotations};
use crate::scheme::SchemeArgs;
use crate::weights::{GptqArgs, Method};

/// A model, its rotations and how its weights are quantised.
#[derive(clap::Args)]
pub struct NetworkArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    scheme: SchemeArgs,
    #[arg(long, value_name = "WHICH", help = format!("{} [default: none]", Start::usage(&[])))]
    rotations: Option<Start>,
    /// How weights are quantised: to nearest, by GPTQ, or by one of its successors, which correct for activations that are quantised
    /// (experimental) [default: rtn].
    #[arg(long, value_name = Method::NAMES)]
    weights: Option<Method>,
    /// Calibration text, for all but rtn, and for --reconstruct.
    #[arg(long, value_name = "FILE")]
    calibration: Option<PathBuf>,
    #[command(flatten)]
    gptq: GptqArgs,
}

/// A network whose arguments, rotations and calibration text were checked; its weights are still to be read.
pub struct Network<'a> {
    args: &'a NetworkArgs,
    /// Sizes.
    pub config: LlamaConfig,
    /// How it is quantised.
    pub scheme: Scheme,
    /// Which rotations, in words.
    pub rotations: String,
    /// How its weights are quantised: `rtn`, `gptq`, `gptaq:0.25`, ….
    pub weights: String,
    from: From,
    /// Its products are of integers.
    integers: bool,
}

/// Where the weights come from.
enum From {
    /// A folder that `quantize` wrote.
    Written,
    /// A folder of compressed-tensors.
    Compressed(Box<Compressed>),
    /// A model's own files.
    Model { plain: bool, rotations: Option<Box<Rotations>>, calibration: Option<(Method, Windows)> },
}

impl NetworkArgs {
    /// Checks everything but the weights. `seq_len` is the length of calibration windows, and of those that are scored where
    /// `scores_windows` says that there are some.
    ///
    /// # Errors
    /// Arguments that contradict the model or each other; rotations of another model; a calibration text that cannot be used.
    pub fn checked(&self, seq_len: usize, scores_windows: bool) -> Result<Network<'_>> {
        if is_native(&self.model.model) {
            return self.written(scores_windows.then_some(seq_len));
        }
        if Compressed::is_in(&self.model.model) {
            return self.compressed(scores_windows.then_some(seq_len));
        }
        let start = self.rotations.clone().unwrap_or(Start::None);
        let weights = self.weights.unwrap_or(Method::Rtn);
        let reads = scores_windows || self.gptq.reads_text(weights);
        let config = self.model.checked(&self.scheme.scheme(), reads.then_some(seq_len))?;
        let file = rotations(&start, &config)?;
        let scheme = self.scheme.scheme_with(file.as_ref(), &config)?;
        let learned = file.map(|file| self.scheme.learned_for(&file, &scheme)).transpose()?;
        let text = self.gptq.text(weights, &self.model, (&config, &scheme), self.calibration.as_ref(), seq_len)?;
        let calibration = text.map(|text| (weights, text));
        let (plain, rotations) = (matches!(start, Start::None), learned.map(Box::new));
        Ok(Network {
            args: self,
            config,
            scheme,
            rotations: start.to_string(),
            weights: self.gptq.described(weights),
            from: From::Model { plain, rotations, calibration },
            integers: false,
        })
    }

    /// A quantised model as it was written; arguments may repeat what it was written with.
    fn written(&self, seq_len: Option<usize>) -> Result<Network<'_>> {
        let dir = &self.model.model;
        let written = Record::read(dir)?;
        self.agrees(&written.scheme, &written.rotations, &written.weights)?;
        let dtype = written.dtype.to_string();
        if let Some(given) = self.model.given_dtype().map(|given| given.to_string()).filter(|given| *given != dtype) {
            return Err(contradicts("--dtype", dir, &dtype, &given));
        }
        seq_len.map_or(Ok(()), |seq_len| check_length(&written.config, seq_len))?;
        let Record { config, scheme, rotations, weights, .. } = written;
        Ok(Network { args: self, config, scheme, rotations, weights, from: From::Written, integers: false })
    }

    /// A model of compressed-tensors, whoever packed it; arguments may repeat what it says.
    fn compressed(&self, seq_len: Option<usize>) -> Result<Network<'_>> {
        let read = Compressed::read(&self.model.model)?;
        let unknown = "what compressed-tensors does not say";
        self.agrees(&read.scheme, unknown, unknown)?;
        self.model.place()?;
        seq_len.map_or(Ok(()), |seq_len| check_length(&read.config, seq_len))?;
        let (config, scheme) = (read.config.clone(), read.scheme);
        let (rotations, weights) = ("merged".to_string(), "compressed-tensors".to_string());
        Ok(Network { args: self, config, scheme, rotations, weights, from: From::Compressed(Box::new(read)), integers: false })
    }

    /// Fails where an argument contradicts what a model was written with.
    fn agrees(&self, scheme: &Scheme, rotations: &str, weights: &str) -> Result<()> {
        let dir = &self.model.model;
        self.scheme.check_written(scheme, dir)?;
        if let Some(by) = self.gptq.reconstruct() {
            return Err(contradicts("--reconstruct", dir, "weights that are quantised", &by.to_string()));
        }
        let given = [
            ("--rotations", self.rotations.as_ref().map(Start::to_string), rotations),
            ("--weights", self.weights.map(|method| method.to_string()), weights),
        ];
        let differs = given.into_iter().find_map(|(name, given, written)| Some((name, given.filter(|g| g != written)?, written)));
        differs.map_or(Ok(()), |(name, given, written)| Err(contradicts(name, dir, written, &given)))
    }
}

impl Network<'_> {
    /// Rotations and weights in words.
    pub fn how(&self) -> String {
        match self.from {
            From::Written | From::Compressed(_) => "as written".into(),
            From::Model { .. } => format!("rotations {}, weights {}", self.rotations, self.weights),
        }
    }

    /// True of a model that was quantised before: its weights in full precision are not here.
    pub fn is_written(&self) -> bool {
        matches!(self.from, From::Written | From::Compressed(_))
    }

    /// Reads the weights, rotates and quantises them.
    ///
    /// # Errors
    /// Weights that cannot be read, merged or quantised; [`Error::Interrupted`](spinquant::Error::Interrupted).
    pub fn load(&self, progress: &Progress) -> Result<Merged> {
        match &self.from {
            From::Written | From::Compressed(_) => self.load_written(),
            From::Model { .. } => self.quantize(&self.load_model(progress)?, progress),
        }
    }

    /// The same, and the model in full precision: `full`, or else the one that is rotated and quantised here, whose weights it shares.
    /// None where the network was quantised before and `full` is not given.
    ///
    /// # Errors
    /// Those of [`Network::load`]; a `full` with another vocabulary.
    pub fn load_with_full(&self, full: Option<&PathBuf>, progress: &Progress) -> Result<(Merged, Option<Merged>)> {
        let exact = Scheme::FULL_PRECISION.online(Online::NONE);
        let files = &self.args.model;
        if let Some(dir) = full {
            let place = files.like(dir);
            let vocabulary = place.checked(&exact, None)?.vocab_size;
            if vocabulary != self.config.vocab_size {
                let message = format!("expected a vocabulary of {} tokens, got {vocabulary}", self.config.vocab_size);
                return Err(Error::argument(format!("--full-precision {}", dir.display()), message));
            }
            let full = place.load_plain(progress)?.merge_exact(None, &exact)?;
            return Ok((self.load(progress)?, Some(full)));
        }
        match &self.from {
            From::Written | From::Compressed(_) => Ok((self.load_written()?, None)),
            From::Model { .. } => {
                let model = self.load_model(progress)?;
                Ok((self.quantize(&model, progress)?, Some(model.merge_exact(None, &exact)?)))
            }
        }
    }

    /// The same network by products of integers, of the codes of its weights as they were written.
    ///
    /// # Errors
    /// A network that is not from a folder of `quantize`.
    pub fn on_integers(self) -> Result<Self> {
        if !matches!(self.from, From::Written) {
            let dir = self.args.model.model.display();
            let message = format!("expected a folder that `quantize` wrote in its own format, got {dir}");
            return Err(Error::argument("--engine integer", message));
        }
        Ok(Self { integers: true, ..self })
    }

    fn load_written(&self) -> Result<Merged> {
        let files = &self.args.model;
        if let From::Compressed(read) = &self.from {
            let (device, dtype) = files.place()?;
            let place = files.placement_like(|| Ok(self.config.clone()), Some(dtype), 1, |_| 0)?;
            return read.load_placed(dtype, &device, place);
        }
        let stored = Record::read(&files.model)?.dtype;
        // Codes stay on the device, beside the values.
        let codes = |config: &LlamaConfig| if self.integers { memory::codes(config) } else { 0 };
        let place = files.placement_like(|| Ok(self.config.clone()), Some(stored), 1, codes)?;
        if self.integers {
            let (native, codes) = load_native_with_codes(&files.model, &files.device()?, place)?;
            return native.model.on_integers(codes);
        }
        Ok(load_native_placed(&files.model, &files.device()?, place)?.model)
    }

    fn load_model(&self, progress: &Progress) -> Result<Llama> {
        let files = &self.args.model;
        let hessians = matches!(self.from, From::Model { calibration: Some((Method::Gptq(_), _)), .. });
        let place = files.placement_of(2, hessians)?;
        match self.from {
            From::Model { plain: true, .. } => files.load_plain_placed(progress, place),
            _ => files.load_placed(progress, place),
        }
    }

    fn quantize(&self, model: &Llama, progress: &Progress) -> Result<Merged> {
        let From::Model { rotations, calibration, .. } = &self.from else { return model.merge(None, &self.scheme) };
        let gptq = &self.args.gptq;
        match calibration {
            None => model.merge(rotations.as_deref(), &self.scheme),
            Some((Method::Gptq(correction), text)) => {
                let run = (&gptq.quantizer(*correction), &gptq.calibration(text)?);
                quantized(model, rotations.as_deref(), &self.scheme, run, &mut progress.watch())
            }
            Some((Method::Rtn, text)) => {
                let (mut watch, rotations) = (progress.watch(), rotations.as_deref());
                let mut layers = LayerWatch::new(&mut watch, &self.weights, self.config.layers, None);
                let told = |report: &LayerReport| layers.told(report);
                quantize_weights(model, rotations, &self.scheme, &Rtn, Some(&gptq.calibration(text)?), &mut (), told)
            }
        }
    }
}
