//! The command line: `spinquant demo`, `learn`, `clip`, `eval`, `zeroshot`, `serve`, `generate`, `compare`, `inspect`, `quantize`, `rotations`, `race`, `bench`.

// Both panic when the stream is closed or full.
#![deny(clippy::print_stdout, clippy::print_stderr)]

#[macro_use]
mod console;

mod bench;
mod clip;
mod common;
mod compare;
mod demo;
mod eval;
mod generate;
mod hub;
mod inspect;
mod launch;
mod learn;
mod network;
mod outputs;
mod profile;
mod quantize;
mod race;
mod ranks;
mod recipe;
mod rotations;
mod scheme;
mod serve;
mod stop;
mod weights;
mod zeroshot;

use std::path::Path;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use spinquant::Error;

/// SpinQuant: LLM quantisation with learned rotations (arXiv 2405.16406).
#[derive(Parser)]
#[command(version, about, max_term_width = 110)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Learn rotations on calibration text and write them to a file.
    Learn(learn::Args),
    /// Search the clip ratios of activations, K and V for given rotations, and write both to a file.
    Clip(clip::Args),
    /// Perplexity of a model, rotated and quantised as asked.
    Eval(eval::Args),
    /// Zero-shot accuracy of a model on multiple-choice tasks, rotated and quantised as asked.
    Zeroshot(zeroshot::Args),
    /// Score prompts over HTTP for an evaluation harness: the part of OpenAI's /v1/completions that returns log-probabilities.
    Serve(Box<serve::Args>),
    /// Continue a text, or answer, with a quantised model and a quantised KV cache.
    Generate(generate::Args),
    /// The paper's table on one model: full precision, plain rounding, random Hadamards, learned rotations.
    Compare(Box<compare::Args>),
    /// That table on a small embedded model, with a picture: what all this is about, in a minute.
    Demo(demo::Args),
    /// What every quantiser is given: outliers, kurtosis, error; tables and pictures, before and after rotation.
    Inspect(inspect::Args),
    /// Write a quantised model.
    Quantize(Box<quantize::Args>),
    /// Check rotation files, or translate them.
    Rotations(rotations::Args),
    /// Check the small goldens, then time learning steps and say where their time goes.
    Profile(profile::Args),
    /// Race optimisers and objectives on one model: held-out loss against steps and seconds, tables and pictures.
    Race(race::Args),
    /// Check a kernel's answer, then time it against a copy.
    Bench(bench::Args),
}

impl Command {
    /// Finds the folder of a model that was given by its name.
    fn resolve(&mut self) -> spinquant::Result<()> {
        match self {
            Self::Learn(args) => args.model.resolve(),
            Self::Clip(args) => args.model.resolve(),
            Self::Eval(args) => args.network.model.resolve(),
            Self::Zeroshot(args) => args.network.model.resolve(),
            Self::Serve(args) => args.network.model.resolve(),
            Self::Generate(args) => args.network.model.resolve(),
            Self::Compare(args) => args.model.resolve(),
            Self::Inspect(args) => args.model.resolve(),
            Self::Quantize(args) => args.model.resolve(),
            Self::Profile(args) => args.model.resolve(),
            Self::Race(args) => {
                if let Some(model) = &mut args.model {
                    *model = hub::folder(model)?;
                }
                Ok(())
            }
            Self::Demo(_) | Self::Rotations(_) | Self::Bench(_) => Ok(()),
        }
    }

    /// How the work is shared, where it can be.
    fn ranks(&self) -> Option<ranks::Shared<'_>> {
        use ranks::Shared;
        match self {
            Self::Learn(args) => args.shared().map(Shared::Sums),
            Self::Clip(args) => Some(Shared::Scores(&args.ranks)),
            Self::Eval(args) => Some(Shared::Scores(&args.ranks)),
            Self::Compare(args) => Some(Shared::Sums(&args.ranks)),
            Self::Quantize(args) => args.shared().map(Shared::Sums),
            _ => None,
        }
    }

    fn run(self) -> spinquant::Result<()> {
        match self {
            Self::Learn(args) => learn::run(&args),
            Self::Clip(args) => clip::run(&args),
            Self::Eval(args) => eval::run(&args),
            Self::Zeroshot(args) => zeroshot::run(&args),
            Self::Serve(args) => serve::run(&args),
            Self::Generate(args) => generate::run(&args),
            Self::Compare(args) => compare::run(&args),
            Self::Demo(args) => demo::run(&args),
            Self::Inspect(args) => inspect::run(&args),
            Self::Quantize(args) => quantize::run(&args),
            Self::Rotations(args) => rotations::run(&args),
            Self::Profile(args) => profile::run(&args),
            Self::Race(args) => race::run(&args),
            Self::Bench(args) => bench::run(&args),
        }
    }
}

fn main() -> ExitCode {
    ranks::prepare();
    stop::listen();
    let mut command = Cli::parse().command;
    let outcome = match command.resolve().and_then(|()| ranks::begin(command.ranks())) {
        Ok(Some(count)) => return launch::run(count),
        Ok(None) => command.run(),
        Err(e) => Err(e),
    };
    ranks::end(&outcome);
    let printed = console::finish();
    match outcome.and_then(|()| printed.map_err(Error::io(Path::new("standard output")))) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            ranks::report(&e); // what `end` has not
            if matches!(e, Error::Interrupted { .. }) { stop::status() } else { ExitCode::FAILURE }
        }
    }
}
