//! The files of a race: rows as runs end, then a table and pictures.

use std::fmt::Write as _;
use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use super::{Outcome, Run};
use crate::io::{check_writable, write_atomically};
use crate::{Error, Result};

/// What a race leaves in its folder.
const FILES: [&str; 5] = ["runs.csv", "curves.csv", "table.md", "steps.png", "seconds.png"];

const RUNS: &str = "entry,optimizer,objective,learning_rate,clip,scheme,steps,seed,held_out_first,held_out_last,perplexity,recovered,\
                    kl,top1,seconds,orthogonality_error";
const CURVES: &str = "entry,learning_rate,scheme,steps,seed,step,seconds,held_out";

/// A race's folder: `runs.csv` and `curves.csv` while it runs, then `table.md` and, with the feature `cli`, `steps.png` and `seconds.png`.
#[derive(Debug)]
pub struct Files {
    folder: PathBuf,
    rows: [(PathBuf, File); 2],
}

impl Files {
    /// Checks that every file can be written. Those of an earlier race stay as they are.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn check(folder: &Path) -> Result<()> {
        FILES.iter().try_for_each(|name| check_writable(&folder.join(name)))
    }

    /// Begins the rows, in place of those of an earlier race.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn create(folder: &Path) -> Result<Self> {
        let create = |name: &str, header: &str| -> Result<(PathBuf, File)> {
            let path = folder.join(name);
            let mut file = File::create(&path).map_err(Error::io(&path))?;
            writeln!(file, "{header}").map_err(Error::io(&path))?;
            Ok((path, file))
        };
        Ok(Self { folder: folder.into(), rows: [create("runs.csv", RUNS)?, create("curves.csv", CURVES)?] })
    }

    /// Writes the rows of a run at once, so that an interrupted race keeps what it has.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn add(&mut self, run: &Run, recovered: f64) -> Result<()> {
        let clip = run.clip.map_or(String::new(), |c| c.to_string().replace(',', " "));
        let Run { entry, optimizer, objective, rate, scheme, steps, seed, .. } = run;
        // What there is none of is left empty.
        let numbers = [
            run.curve.first().map_or(f64::NAN, |p| p.held_out),
            run.held_out_last(),
            run.perplexity,
            recovered,
            run.divergence(),
            run.fidelity.as_ref().map_or(f64::NAN, |f| f.agreement().mean),
            run.seconds,
            run.orthogonality_error,
        ];
        let number = |x: f64| if x.is_nan() { String::new() } else { x.to_string() };
        let numbers = numbers.map(number).join(",");
        let row = format!("{entry},{optimizer},{objective},{},{clip},{scheme},{steps},{seed},{numbers}\n", number(*rate));
        let mut curve = String::new();
        for p in &run.curve {
            let _ = writeln!(curve, "{entry},{rate},{scheme},{steps},{seed},{},{},{}", p.step, p.seconds, p.held_out);
        }
        for ((path, file), text) in self.rows.iter_mut().zip([row, curve]) {
            file.write_all(text.as_bytes()).and_then(|()| file.flush()).map_err(Error::io(&*path))?;
        }
        Ok(())
    }

    /// Writes the table, and the pictures where anything learned; `name` is the model's.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn finish(&self, outcome: &Outcome, name: &str) -> Result<()> {
        write_atomically(&self.folder.join("table.md"), |out| out.write_all(outcome.table(name).as_bytes()))?;
        #[cfg(feature = "cli")]
        {
            outcome.draw(&self.folder.join("steps.png"), "steps", |p| p.step as f64)?;
            outcome.draw(&self.folder.join("seconds.png"), "seconds of learning", |p| p.seconds)?;
        }
        Ok(())
    }
}
