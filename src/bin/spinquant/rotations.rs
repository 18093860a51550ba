//! `spinquant rotations check|convert`.

use std::path::{Path, PathBuf};

use clap::Subcommand;
use spinquant::rotation::{Rotations, TOLERANCE};
use spinquant::{Error, Result};

use spinquant::io::check_writable;

#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Print size, orthogonality and determinant of every matrix; fails where one is further than 1e-4 from orthogonal.
    Check {
        /// Our safetensors, or the published code's R.bin.
        file: PathBuf,
    },
    /// Translate between our safetensors and the published code's R.bin, by the names' endings (.bin or .pt: theirs).
    Convert {
        /// What to read.
        from: PathBuf,
        /// What to write.
        to: PathBuf,
        /// Accept matrices this far from orthogonal, max|RᵀR − I|, and project them (the published iterates drift).
        #[arg(long, value_name = "ERROR")]
        tolerance: Option<f64>,
    },
}

fn is_torch(path: &Path) -> bool {
    path.extension().is_some_and(|e| e == "bin" || e == "pt")
}

fn read(path: &Path) -> Result<Rotations> {
    if is_torch(path) { Rotations::read_torch(path) } else { Rotations::load(path) }
}

pub fn run(args: &Args) -> Result<()> {
    match &args.command {
        Command::Check { file } => {
            let report = read(file)?.report()?;
            report.iter().for_each(|matrix| out!("{matrix}"));
            match report.iter().find(|m| !m.columns_error.max(m.rows_error).le(&TOLERANCE)) {
                Some(m) => Err(Error::format(file, format!("{} is not orthogonal: at most {TOLERANCE:.0e} is accepted", m.name))),
                None => Ok(()),
            }
        }
        Command::Convert { from, to, tolerance } => {
            check_writable(to)?;
            let rotations = match tolerance {
                Some(t) => read(from)?.projected(*t),
                None if is_torch(from) => Rotations::load_torch(from),
                None => read(from)?.projected(TOLERANCE),
            };
            let rotations = rotations.map_err(|e| Error::format(from, e))?;
            if is_torch(to) { rotations.save_torch(to) } else { rotations.save(to) }
        }
    }
}
