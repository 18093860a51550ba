//! `spinquant zeroshot`.

use std::path::PathBuf;
use std::time::Instant;

use serde_json::{Map, Value, json};
use spinquant::eval::answers::Answers;
use spinquant::eval::exam::{Exam, Report, TaskScores, check_names};
use spinquant::eval::marks::Mean;
use spinquant::eval::tasks::Questions;
use spinquant::llama::LlamaConfig;
use spinquant::{Error, Result};

use crate::common::{ModelArgs, Progress, at_least_one};
use crate::network::NetworkArgs;
use crate::outputs;
use crate::stop;

/// Multiple-choice tasks.
#[derive(clap::Args)]
pub struct TaskArgs {
    /// Multiple-choice tasks: *.jsonl files, or folders of them (BoolQ, PIQA, Social IQa, HellaSwag, WinoGrande, ARC and OpenBookQA as
    /// released, or objects with context, choices and gold).
    #[arg(long, value_name = "DIR|FILE", num_args = 1..)]
    tasks: Vec<PathBuf>,
    /// Ask only the first so many questions of every task.
    #[arg(long, value_name = "N", value_parser = at_least_one, requires = "tasks")]
    limit: Option<usize>,
}

impl TaskArgs {
    /// The questions; none where no task is named.
    pub fn read(&self) -> Result<Vec<Questions>> {
        let mut all: Vec<Questions> =
            self.tasks.iter().map(Questions::read_all).collect::<Result<Vec<_>>>()?.into_iter().flatten().collect();
        if let Some(limit) = self.limit {
            all.iter_mut().for_each(|task| task.questions.truncate(limit));
        }
        if !all.is_empty() {
            check_names(&all)?;
        }
        Ok(all)
    }
}

/// Tasks encoded for a model.
pub fn exam(tasks: Vec<Questions>, model: &ModelArgs, config: &LlamaConfig) -> Result<Exam> {
    Exam::new(tasks, &model.tokenizer()?, model.bos(), config)
}

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    pub network: NetworkArgs,
    #[command(flatten)]
    tasks: TaskArgs,
    /// Tokens of a calibration window.
    #[arg(long, default_value_t = 2048)]
    seq_len: usize,
    /// Keep every log-likelihood in this file, as soon as it is known; what Ctrl-C interrupts can be continued from it.
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Continue from --out if it exists.
    #[arg(long, requires = "out")]
    resume: bool,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

pub fn run(args: &Args) -> Result<()> {
    let progress = Progress::new();
    check_out(args)?;
    let tasks = args.tasks.read()?;
    if tasks.is_empty() {
        return Err(Error::argument("--tasks", "expected files or folders of multiple-choice tasks, got none"));
    }
    let network = args.network.checked(args.seq_len, false)?;
    let exam = exam(tasks, &args.network.model, &network.config)?;
    let mut record = exam.record();
    record.extend([
        ("rotations".to_string(), json!(network.rotations)),
        ("quantizer".to_string(), json!(network.weights)),
        ("bits".to_string(), json!(network.scheme.to_string())),
    ]);
    if let Some(out) = &args.out {
        Answers::check(out, &record)?;
    }
    let model = network.load(&progress)?;
    let mut answers = match &args.out {
        None => Answers::new(exam.tasks()),
        Some(out) => {
            record.extend(Exam::record_of(&model)?);
            Answers::resume(exam.tasks(), out, &record)?
        }
    };
    let known = answers.known();
    let start = Instant::now();
    {
        // What is known is kept where there is a file for it.
        let _careful = args.out.as_ref().map(|_| stop::AfterStep::new());
        let mut task = progress.start(&format!("{}, answers", network.scheme), answers.candidates());
        let asked = exam.ask(&model, &mut answers, |done| {
            task.at(done, "");
            stop::asked()
        });
        drop(task);
        asked.inspect_err(|e| {
            if let (Some(out), Error::Interrupted { .. }) = (&args.out, e) {
                let (known, all) = (answers.known(), answers.candidates());
                progress.say(&format!("{known} of {all} answers are in {}: continue with --resume", out.display()));
            }
        })?;
    }
    let seconds = start.elapsed().as_secs_f64();
    let report = exam.report(&exam.marks(&answers)?);
    let asked = answers.candidates() - known;
    if args.json {
        let mut object = json(&report);
        object.extend([
            ("scheme".to_string(), json!(network.scheme.to_string())),
            ("rotations".to_string(), json!(network.rotations)),
            ("weights".to_string(), json!(network.weights)),
            ("bos".to_string(), json!(args.network.model.bos().to_string())),
            ("requests".to_string(), json!(answers.candidates())),
            ("asked".to_string(), json!(asked)),
            ("seconds".to_string(), json!(seconds)),
        ]);
        out!("{}", Value::from(object));
    } else {
        out!("{}, {}", network.scheme, network.how());
        print(&report);
        out!("{asked} answers in {seconds:.1} s");
    }
    Ok(())
}

/// The answers of another run are not overwritten.
fn check_out(args: &Args) -> Result<()> {
    let Some(out) = &args.out else { return Ok(()) };
    let inputs: Vec<_> = args.tasks.tasks.iter().map(|path| ("--tasks", path.as_path())).collect();
    outputs::check(&[("--out", out)], Some(&args.network.model.model), &inputs)?;
    if out.exists() && !args.resume {
        let message = format!("{} is there already; --resume continues with its answers", out.display());
        return Err(Error::argument("--out", message));
    }
    Ok(())
}

/// Means and standard errors by task and over all, for programs. What is not a number is null.
pub fn json(report: &Report) -> Map<String, Value> {
    let task = |t: &TaskScores| {
        let s = t.scores;
        let mut object =
            means([("acc", Some(s.acc)), ("acc_norm", t.has_acc_norm.then_some(s.acc_norm)), ("gold", Some(s.gold))]);
        object.extend([("task".to_string(), json!(t.name)), ("questions".to_string(), json!(s.questions))]);
        object
    };
    let mean = means([("acc", Some(report.acc)), ("acc_norm", Some(report.acc_norm)), ("gold", Some(report.gold))]);
    let tasks: Vec<_> = report.tasks.iter().map(task).collect();
    Map::from_iter([("tasks".to_string(), tasks.into()), ("mean".to_string(), mean.into())])
}

fn means(all: [(&str, Option<Mean>); 3]) -> Map<String, Value> {
    let both = |(name, mean): (&str, Option<Mean>)| {
        [(name.to_string(), json!(mean.map(|m| m.mean))), (format!("{name}_stderr"), json!(mean.map(|m| m.standard_error)))]
    };
    all.into_iter().flat_map(both).collect()
}

/// The table.
pub fn print(report: &Report) {
    let width = report.tasks.iter().map(|t| t.name.chars().count()).max().unwrap_or(0).max(14);
    out!("{:<width$} {:>9} {:>17} {:>17} {:>19}", "task", "questions", "acc", "acc_norm", "gold log-likelihood");
    for t in &report.tasks {
        let s = t.scores;
        let norm = if t.has_acc_norm { shown(s.acc_norm, 4) } else { String::new() };
        out!("{:<width$} {:>9} {:>17} {norm:>17} {:>19}", t.name, s.questions, shown(s.acc, 4), shown(s.gold, 3));
    }
    let (acc, norm, gold) = (shown(report.acc, 4), shown(report.acc_norm, 4), shown(report.gold, 3));
    out!("{:<width$} {:>9} {acc:>17} {norm:>17} {gold:>19}", format!("mean of {}", report.tasks.len()), "");
}

/// A mean and its standard error, where there is one.
pub fn shown(m: Mean, digits: usize) -> String {
    match m.standard_error.is_nan() {
        true => format!("{:.digits$}", m.mean),
        false => format!("{:.digits$} ± {:.digits$}", m.mean, m.standard_error),
    }
}
