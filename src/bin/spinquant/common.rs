//! What the subcommands share: arguments, loading, progress, interruption.

use std::collections::BTreeSet;
use std::io::IsTerminal;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::ranks::{self, Wanted};
use crate::{console, hub, stop};
use indicatif::{ProgressBar, ProgressStyle};
use spinquant::data::{self, Bos, Tokenizer, Windows};
use spinquant::device::Card;
use spinquant::export;
use spinquant::learn::{StepReport, Watch};
use spinquant::llama::{Llama, LlamaConfig, Placement, Source, Supply, synthetic};
use spinquant::memory::{self, Budget, Layerwise, OneLayer, Room};
use spinquant::quant::Scheme;
use spinquant::ranks::Group;
use spinquant::rotation::{RotationFile, Start, TOLERANCE};
use spinquant::{DType, Device, Error, Result};

/// The model and where it runs.
#[derive(clap::Args, Clone)]
pub struct ModelArgs {
    /// Hugging Face folder: config.json, *.safetensors, tokenizer.json. org/name or org/name@revision: a model of the Hugging Face
    /// hub, from its cache or downloaded (HF_HOME, HF_HUB_CACHE, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE). synthetic:NAME (llama-2-7b,
    /// llama-2-13b, llama-2-70b, llama-3-8b, llama-3-70b, llama-3.2-1b, llama-3.2-3b, mistral-7b, qwen2.5-7b, qwen3-8b, tiny; NAME:LAYERS
    /// for another depth): seeded weights of that shape, whose text is `synthetic` or `synthetic:WINDOWS`.
    #[arg(long, value_name = "DIR|NAME")]
    pub model: PathBuf,
    /// The name that the folder was found by.
    #[arg(skip)]
    named: Option<String>,
    /// auto takes a GPU where there is one.
    #[arg(long, value_name = "auto|cpu|cuda", default_value = "auto")]
    device: String,
    /// Arithmetic: f32, bf16, f16 (or f64 on the CPU). Default: f32 on the CPU, bf16 on a GPU.
    #[arg(long, value_name = "TYPE")]
    dtype: Option<DType>,
    /// Layers whose weights stay on the device, from the last; the others are in main memory and are copied to it when it is their turn: the
    /// same numbers with less memory. Default: all on the CPU, as many as fit on a GPU.
    #[arg(long, value_name = "LAYERS")]
    resident: Option<usize>,
    /// Of the layers that do not stay, so many, from the last, are in main memory; the first are read from the model's files (or made, of
    /// a synthetic model) each time. Default: all.
    #[arg(long, value_name = "LAYERS", requires = "resident")]
    in_main_memory: Option<usize>,
    /// The token that a text starts with: auto (what the tokenizer's post-processor adds), none, or its id.
    #[arg(long, value_name = "auto|none|ID", default_value = "auto")]
    bos: Bos,
}

/// An argument that says something else than the quantised model that it is about.
pub fn contradicts(name: &str, dir: &Path, written: &str, given: &str) -> Error {
    Error::argument(name, format!("{} was written with {written}, which cannot be changed; got {given}", dir.display()))
}

/// The device that `--device` names, among those that `--gpus` or `--ranks` leave.
pub fn device(name: &str) -> Result<Device> {
    let refused = |expected: &str| Err(Error::argument("--device", format!("expected {expected}, got {name}")));
    let gpu = match (ranks::wanted(), name) {
        (Wanted::Gpu(_), "cpu") => return refused("auto or cuda with --gpus"),
        (Wanted::Gpu(gpu), "auto" | "cuda") => return Device::cuda(gpu),
        (Wanted::Cpu, "cuda") => return refused("auto or cpu with --ranks (several GPUs: --gpus)"),
        (Wanted::Cpu, "auto") => return Ok(Device::Cpu),
        (Wanted::Any(gpu), _) | (Wanted::Gpu(gpu), _) => gpu,
        (Wanted::Cpu, _) => 0,
    };
    match name {
        "cpu" => Ok(Device::Cpu),
        "cuda" => Device::cuda(gpu),
        "auto" => Ok(Device::cuda(gpu).unwrap_or_else(|e| {
            // A build without GPU support is no news.
            if cfg!(feature = "cuda") {
                note(&format!("no GPU is used: {e}"));
            }
            Device::Cpu
        })),
        other => Err(Error::argument("--device", format!("expected auto, cpu or cuda, got {other:?}"))),
    }
}

/// Says something once, however often it is found out.
pub fn note(line: &str) {
    static SAID: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
    if SAID.lock().unwrap_or_else(PoisonError::into_inner).insert(line.to_string()) {
        say!("note: {line}");
    }
}

/// Opens a model's files and says what is odd about them.
pub fn open_model(dir: &Path) -> Result<Source> {
    let source = Source::from_dir(dir)?;
    source.notes().iter().for_each(|line| note(line));
    Ok(source)
}

/// A count of at least one, as an argument.
pub fn at_least_one(s: &str) -> Result<usize, String> {
    match s.parse() {
        Ok(0) => Err("expected at least 1, got 0".into()),
        Ok(n) => Ok(n),
        Err(_) => Err(format!("expected a number of at least 1, got {s:?}")),
    }
}

impl ModelArgs {
    /// A model's folder and where to run it, for commands that do not need one.
    pub fn new(model: PathBuf, device: String, dtype: Option<DType>, bos: Bos) -> Self {
        Self { model, named: None, device, dtype, resident: None, in_main_memory: None, bos }
    }

    /// Another folder, read in the same way.
    pub fn like(&self, dir: &Path) -> Self {
        Self { model: dir.into(), named: None, ..self.clone() }
    }

    /// Finds the folder of a model that was given by its name, and downloads what is missing.
    pub fn resolve(&mut self) -> Result<()> {
        let folder = hub::folder(&self.model)?;
        if folder != self.model {
            self.named = Some(self.model.display().to_string());
            self.model = folder;
        }
        Ok(())
    }

    /// What to call the model: its name on the hub, or its path.
    pub fn name(&self) -> String {
        self.named.clone().unwrap_or_else(|| self.model.display().to_string())
    }

    /// What a text starts with, as asked for.
    pub fn bos(&self) -> Bos {
        self.bos
    }

    pub fn device(&self) -> Result<Device> {
        stop::reads(&self.model);
        device(&self.device)
    }

    /// The device and the element type.
    pub fn place(&self) -> Result<(Device, DType)> {
        let device = self.device()?;
        let dtype = self.dtype.unwrap_or(if device.is_cpu() { DType::F32 } else { DType::BF16 });
        if dtype == DType::F64 && !device.is_cpu() {
            return Err(Error::argument("--dtype", "f64 runs on the CPU only"));
        }
        Ok((device, dtype))
    }

    /// The device, for work that is done in the type of the model's files.
    pub fn device_in_file_type(&self, what: &str) -> Result<Device> {
        if let Some(dtype) = self.dtype {
            return Err(Error::argument("--dtype", format!("{what} keeps the type of the model's files, got {dtype}")));
        }
        if self.synthetic().is_some() {
            let message =
                format!("{what} starts from a model's files, and {} has none; use --format native", self.model.display());
            return Err(Error::argument("--model", message));
        }
        self.device()
    }

    /// Whether the model is made, not read.
    pub fn is_synthetic(&self) -> bool {
        self.synthetic().is_some()
    }

    /// The name of a synthetic model.
    fn synthetic(&self) -> Option<&str> {
        self.model.to_str()?.strip_prefix("synthetic:")
    }

    /// Sizes, without the weights.
    pub fn config(&self) -> Result<LlamaConfig> {
        match self.synthetic() {
            Some(name) => synthetic::shape(name),
            None => LlamaConfig::from_dir(&self.model),
        }
    }

    /// Sizes, once everything that can be checked without text and weights has been; `seq_len` is that of the text, if there is one.
    pub fn checked(&self, scheme: &Scheme, seq_len: Option<usize>) -> Result<LlamaConfig> {
        let config = self.config()?;
        self.place()?;
        config.check_scheme(scheme)?;
        seq_len.map_or(Ok(()), |seq_len| check_length(&config, seq_len))?;
        Ok(config)
    }

    /// The element type, where one was given.
    pub fn given_dtype(&self) -> Option<DType> {
        self.dtype
    }

    /// Where the layers are: as given, on the CPU all there, otherwise as `plan` says for a card.
    pub fn placement(&self, plan: impl FnOnce(&Card, DType) -> Result<Placement>) -> Result<Placement> {
        let (device, dtype) = self.place()?;
        match (self.given_placement(), device.card()?) {
            (Some(given), _) => Ok(given),
            (None, None) => Ok(Placement::RESIDENT),
            (None, Some(card)) => plan(&card, dtype),
        }
    }

    /// Where the layers are, if that is given.
    pub fn given_placement(&self) -> Option<Placement> {
        let hosted = self.in_main_memory.unwrap_or(usize::MAX);
        self.resident.map(|resident| Placement { resident, hosted, ..Placement::RESIDENT })
    }

    /// Where the layers are for work without gradients on `count` networks of the model's size at once; `hessians`: for quantisers that
    /// need some.
    pub fn placement_of(&self, count: usize, hessians: bool) -> Result<Placement> {
        // Those of the widest input, in f64: its factor, inverse and their workspace beside it.
        let wide = |config: &LlamaConfig| if hessians { 6 * config.intermediate_size.pow(2) * 8 } else { 0 };
        self.placement_like(|| self.config(), None, count, wide)
    }

    /// The same of networks of this configuration, and perhaps type, with so many bytes beside them on the device.
    pub fn placement_like(
        &self,
        config: impl FnOnce() -> Result<LlamaConfig>,
        stored: Option<DType>,
        count: usize,
        beside: impl FnOnce(&LlamaConfig) -> usize,
    ) -> Result<Placement> {
        self.placement(|card, dtype| {
            let (config, dtype) = (config()?, stored.unwrap_or(dtype));
            // Every rank takes its share of main memory.
            let room = Room::here(Budget::Free, card.free, Budget::Free);
            let room = Room { host: room.host / ranks::group().world(), ..room };
            memory::networks(&config, dtype, count, beside(&config) + (2 << 30), room)
        })
    }

    /// The model, for networks of its size beside it.
    pub fn load(&self, progress: &Progress) -> Result<Llama> {
        self.load_placed(progress, self.placement_of(2, false)?)
    }

    /// The model with its layers where they are to be.
    pub fn load_placed(&self, progress: &Progress, placement: Placement) -> Result<Llama> {
        self.load_among(Group::nobody(), progress, placement)
    }

    /// The same at every rank, all of which place the layers alike: those in main memory are there once for all ranks of a machine.
    pub fn load_among(&self, ranks: &Group, progress: &Progress, placement: Placement) -> Result<Llama> {
        let (device, dtype) = self.place()?;
        let beside = self.beside(placement)?;
        if placement.read(self.config()?.layers) > 0 {
            progress.say(&format!("loading {} as {dtype} on {device}{beside}", self.model.display()));
            return Llama::supplied_among(ranks, &Arc::new(self.supply_of(dtype, &device)?), placement);
        }
        if let Some(name) = self.synthetic() {
            progress.say(&format!("making {} as {dtype} on {device}{beside}", self.model.display()));
            return synthetic::placed_among(ranks, &synthetic::shape(name)?, 0, dtype, (&device, placement));
        }
        progress.say(&format!("loading {} as {dtype} on {device}{beside}", self.model.display()));
        Llama::read_among(ranks, &open_model(&self.model)?, dtype, &device, placement)
    }

    /// The model, a layer at a time.
    pub fn supply(&self, progress: &Progress) -> Result<Supply> {
        let (device, dtype) = self.place()?;
        if self.resident.is_some() {
            note("--resident changes nothing here: a layer at a time is on the device, and no other is in main memory");
        }
        let how = format!("{} as {dtype} on {device}, a layer at a time", self.model.display());
        progress.say(&format!("{} {how}", if self.is_synthetic() { "making" } else { "loading" }));
        self.supply_of(dtype, &device)
    }

    /// The model's parts, in a type and on a device.
    fn supply_of(&self, dtype: DType, device: &Device) -> Result<Supply> {
        match self.synthetic() {
            Some(name) => Supply::synthetic(&synthetic::shape(name)?, 0, dtype, device),
            None => Ok(Supply::files(open_model(&self.model)?, dtype, device)),
        }
    }

    /// Bytes a second at which a layer comes from the model's files to main memory, or is made there: of one that is tried out.
    pub fn read_rate(&self, dtype: DType) -> Result<f64> {
        let supply = self.supply_of(dtype, &Device::Cpu)?;
        let start = Instant::now();
        let block = supply.block(supply.config().layers / 2)?;
        let bytes: usize = block.weights.tensors().map(spinquant::Tensor::bytes).sum();
        Ok(bytes as f64 / start.elapsed().as_secs_f64().max(1e-9))
    }

    /// What quantising a layer at a time takes, in the type that it is done in; refuses what a card or main memory has no room for.
    pub fn one_layer(&self, config: &LlamaConfig, dtype: DType, how: Layerwise) -> Result<OneLayer> {
        let needs = memory::layerwise(config, dtype, how);
        if let Some(card) = self.device()?.card()? {
            let room = Room::here(Budget::Free, card.free, Budget::Free);
            needs.check(room.card, room.host / ranks::group().world())?;
        }
        Ok(needs)
    }

    /// The model as it is, for running it without rotations: RMSNorm gains not folded into the weights.
    pub fn load_plain(&self, progress: &Progress) -> Result<Llama> {
        self.load_plain_placed(progress, self.placement_of(2, false)?)
    }

    /// The same with its layers where they are to be.
    pub fn load_plain_placed(&self, progress: &Progress, placement: Placement) -> Result<Llama> {
        if self.synthetic().is_some() {
            return self.load_placed(progress, placement); // has no gains to fold
        }
        let (device, dtype) = self.place()?;
        let beside = self.beside(placement)?;
        progress.say(&format!("loading {} as {dtype} on {device}{beside}, unrotated", self.model.display()));
        Llama::read_plain_placed(&open_model(&self.model)?, dtype, &device, placement)
    }

    /// Which layers are elsewhere, in words.
    fn beside(&self, placement: Placement) -> Result<String> {
        let layers = self.config()?.layers;
        Ok(match (placement.streamed(layers), placement.read(layers)) {
            (0, _) => String::new(),
            (streamed, 0) => format!(", {streamed} of {layers} layers in main memory"),
            (streamed, read) => {
                let again = if self.is_synthetic() { "made" } else { "read from files" };
                format!(", {} of {layers} layers in main memory, {read} {again} each time", streamed - read)
            }
        })
    }

    /// SHA-256 of a text that [`ModelArgs::windows`] was given: of the file, or of a synthetic model's tokens.
    pub fn text_sha256(&self, text: &Path, windows: &Windows) -> Result<String> {
        if self.synthetic().is_some() {
            let tokens = windows.batch(&(0..windows.len()).collect::<Vec<_>>());
            return Ok(export::sha256(&tokens.iter().flat_map(|id| id.to_le_bytes()).collect::<Vec<u8>>()));
        }
        Ok(export::sha256(&std::fs::read(text).map_err(Error::io(text))?))
    }

    /// The model's tokenizer.
    ///
    /// # Errors
    /// A synthetic model, which has none; those of [`Tokenizer::from_dir`].
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        if self.synthetic().is_some() {
            let message = format!("expected a model with a tokenizer, got {}, which has none", self.model.display());
            return Err(Error::argument("--model", message));
        }
        Tokenizer::from_dir(&self.model)
    }

    /// Text as windows of this model's tokens.
    pub fn windows(&self, config: &LlamaConfig, text: &Path, seq_len: usize) -> Result<Windows> {
        if self.synthetic().is_some() {
            return synthetic_text(config, text, seq_len);
        }
        let windows = self.tokenizer()?.windows(&data::read_text(text)?, self.bos, seq_len);
        let windows = windows.map_err(|e| if matches!(e, Error::Argument { .. }) { Error::format(text, e) } else { e })?;
        let largest = windows.largest_token();
        if largest as usize >= config.vocab_size {
            let message = format!("token {largest} of the text is outside the model's vocabulary of {}", config.vocab_size);
            return Err(Error::format(&self.model, message));
        }
        Ok(windows)
    }
}

/// Checks a length of windows, and warns of one beyond the model's positions.
pub fn check_length(config: &LlamaConfig, seq_len: usize) -> Result<()> {
    config.check_length(seq_len)?;
    if let Some(warning) = config.length_warning(seq_len) {
        say!("warning: {warning}");
    }
    Ok(())
}

/// The rotations that `start` names for a model, read and checked.
pub fn rotations(start: &Start, config: &LlamaConfig) -> Result<Option<RotationFile>> {
    let file = start.open(config.hidden_size, config.head_dim, config.layers)?;
    if let Some(file) = &file {
        let fits = file.rotations.check_for(&config.scale_sizes(), TOLERANCE);
        fits.map_err(|e| file.path().map_or(Error::argument("rotations", &e), |path| Error::format(path, &e)))?;
    }
    Ok(file)
}

/// Windows of text for synthetic models: `synthetic` or `synthetic:WINDOWS`. Texts of other lengths are other texts.
fn synthetic_text(config: &LlamaConfig, text: &Path, seq_len: usize) -> Result<Windows> {
    let bad = || {
        let expected = "synthetic models read `synthetic` (256 windows) or `synthetic:WINDOWS`";
        Error::argument("text", format!("{expected}, got {}", text.display()))
    };
    let count = match text.to_str().ok_or_else(bad)? {
        "synthetic" => 256,
        other => {
            other.strip_prefix("synthetic:").and_then(|n| n.parse().ok()).filter(|n| (1..=1 << 20).contains(n)).ok_or_else(bad)?
        }
    };
    synthetic::text(config, count, seq_len, count as u64)
}

/// A bar with the time left on a terminal, plain lines otherwise; all on standard error.
pub struct Progress {
    terminal: bool,
}

impl Progress {
    pub fn new() -> Self {
        Self { terminal: std::io::stderr().is_terminal() && !console::is_silent() }
    }

    pub fn say(&self, line: &str) {
        say!("{line}");
    }

    pub fn start(&self, what: &str, total: usize) -> Task {
        let bar = self.terminal.then(|| {
            let style = ProgressStyle::with_template("{prefix:<24} {bar:32} {pos}/{len}  {elapsed} so far, {eta} left  {msg}");
            let bar = ProgressBar::new(total as u64).with_style(style.expect("a valid template"));
            bar.set_prefix(what.to_string());
            bar
        });
        Task { bar, what: what.to_string(), total, start: Instant::now(), said: Instant::now() }
    }
}

/// Tells of library work: a bar for every stretch of it; stops it once the user has asked to.
pub struct Told<'a> {
    progress: &'a Progress,
    task: Option<Task>,
    held_out: String,
}

impl Progress {
    /// Tells of library work.
    pub fn watch(&self) -> Told<'_> {
        Told { progress: self, task: None, held_out: String::new() }
    }
}

impl Told<'_> {
    fn done(&mut self, done: usize, message: &str) -> ControlFlow<()> {
        if let Some(task) = &mut self.task {
            task.at(done, message);
        }
        stop::asked()
    }
}

impl Watch for Told<'_> {
    fn begin(&mut self, what: &str, total: usize) {
        self.task = None; // its bar goes first
        self.held_out.clear();
        self.task = Some(self.progress.start(what, total));
    }
    fn at(&mut self, done: usize) -> ControlFlow<()> {
        self.done(done, "")
    }
    fn step(&mut self, report: &StepReport) -> ControlFlow<()> {
        if let Some(loss) = report.held_out {
            self.held_out = format!(", held out {loss:.4}");
        }
        let message = format!("loss {:.4}{}, {:.2} s a step", report.loss, self.held_out, report.seconds);
        self.done(report.step, &message)
    }
    fn note(&mut self, line: &str) {
        self.progress.say(line);
    }
}

/// One stretch of work with a known end.
pub struct Task {
    bar: Option<ProgressBar>,
    what: String,
    total: usize,
    start: Instant,
    said: Instant,
}

impl Task {
    pub fn at(&mut self, done: usize, message: &str) {
        if let Some(bar) = &self.bar {
            bar.set_message(message.to_string());
            return bar.set_position(done as u64);
        }
        let last = done >= self.total;
        if last || self.said.elapsed() >= Duration::from_secs(5) {
            self.said = Instant::now();
            let left = self.start.elapsed().as_secs_f64() / done.max(1) as f64 * self.total.saturating_sub(done) as f64;
            let left = if last { format!("{:.1} s", self.start.elapsed().as_secs_f64()) } else { format!("{left:.0} s left") };
            say!("{}: {done}/{}, {left} {message}", self.what, self.total);
        }
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
