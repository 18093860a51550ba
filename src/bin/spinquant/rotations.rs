//! `spinquant rotations check|convert`.

use std::path::PathBuf;

use clap::Subcommand;
use spinquant::io::check_writable;
use spinquant::rotation::{RotationFile, TOLERANCE};
use spinquant::{Error, Result};

use crate::common::note;

#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Print size, orthogonality and determinant of every matrix, and the range of scales; fails where one is further than 1e-4 from orthogonal.
    Check {
        /// Our safetensors, or the published code's R.bin.
        file: PathBuf,
    },
    /// Translate between our safetensors and the published code's R.bin: what is read is told apart by its content, what is
    /// written by the name's ending (.bin or .pt: theirs).
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

pub fn run(args: &Args) -> Result<()> {
    match &args.command {
        Command::Check { file } => {
            let rotations = RotationFile::read(file)?.rotations;
            let report = rotations.report()?;
            report.iter().for_each(|matrix| out!("{matrix}"));
            for (kind, logarithms) in rotations.scales.iter() {
                let (all, angles) = kind.split(logarithms)?;
                let range = |all: &[f64]| [f64::min, f64::max].map(|f| all.iter().copied().reduce(f).unwrap_or(0.0));
                let ([least, most], [left, right]) = (range(&all).map(f64::exp), range(&angles));
                let turned = if angles.is_empty() { String::new() } else { format!(", angles from {left:.3} to {right:.3}") };
                out!("scales {kind:<10} {:?}  from {least:.3} to {most:.3}{turned}", logarithms.shape());
            }
            for (site, logarithms) in rotations.clips.iter() {
                let all = logarithms.to_f64_vec()?;
                let mean = |end: usize| all.iter().skip(end).step_by(2).map(|a| a.exp()).sum::<f64>() / (all.len() / 2) as f64;
                out!(
                    "clips {:<16} {:?}  lower end {:.3}, upper {:.3} on average",
                    site.name(),
                    logarithms.shape(),
                    mean(0),
                    mean(1)
                );
            }
            for (linear, logarithms) in rotations.weight_clips.iter().flat_map(|clips| clips.iter()) {
                let (all, shape) = (logarithms.to_f64_vec()?, logarithms.shape());
                let mean =
                    |end: usize| all.iter().skip(end).step_by(2).map(|a| a.exp()).sum::<f64>() / (all.len() / 2).max(1) as f64;
                out!("weight clips {linear:<9} {shape:?}  lower end {:.3}, upper {:.3} on average", mean(0), mean(1));
            }
            match report.iter().find(|m| !m.columns_error.max(m.rows_error).le(&TOLERANCE)) {
                Some(m) => Err(Error::format(file, format!("{} is not orthogonal: at most {TOLERANCE:.0e} is accepted", m.name))),
                None => Ok(()),
            }
        }
        Command::Convert { from, to, tolerance } => {
            if let Some(t) = tolerance.filter(|t| !(*t >= 0.0 && t.is_finite())) {
                return Err(Error::argument("--tolerance", format!("expected a finite number of at least 0, got {t}")));
            }
            check_writable(to)?;
            let mut file = RotationFile::read(from)?;
            let projected = file.rotations.projected(tolerance.unwrap_or(TOLERANCE));
            file.rotations = projected.map_err(|e| Error::format(from, e))?;
            if let Some(clips) = file.clips.take_if(|_| RotationFile::is_torch_name(to)) {
                let (to, ratios, bits) = (to.display(), clips.ratios, clips.bits);
                note(&format!("{to} cannot hold the clip ratios of {}, for {bits}: --activation-clip {ratios}", from.display()));
            }
            if RotationFile::is_torch_name(to) && !std::mem::take(&mut file.rotations.clips).is_empty() {
                note(&format!("{} cannot hold the clip constants that were learned with {}", to.display(), from.display()));
            }
            if RotationFile::is_torch_name(to) && file.rotations.weight_clips.take().is_some() {
                note(&format!(
                    "{} cannot hold the clip ratios of weights that were learned with {}",
                    to.display(),
                    from.display()
                ));
            }
            file.write(to)
        }
    }
}
