//! Models by name: their folder, and a bar for what is downloaded.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use indicatif::{HumanBytes, ProgressBar, ProgressStyle};
use spinquant::Result;
use spinquant::hub::{self, Download};

use crate::stop;

/// The folder that `--model` means, downloaded where that is needed.
pub fn folder(model: &Path) -> Result<PathBuf> {
    let mut told = Told { terminal: std::io::stderr().is_terminal(), file: String::new(), bar: None, said: Instant::now() };
    let folder = hub::folder(model, &mut |download| told.at(download))?;
    if !told.file.is_empty() {
        say!("downloaded {} to {}", model.display(), folder.display());
        stop::kept("nothing was written");
    }
    Ok(folder)
}

/// Tells of one file after another: a bar on a terminal, lines otherwise.
struct Told {
    terminal: bool,
    file: String,
    bar: Option<ProgressBar>,
    said: Instant,
}

impl Told {
    fn at(&mut self, Download { file, done, total }: &Download) {
        if self.file != *file {
            stop::kept("what was downloaded stays, and the next start continues it");
            self.file.clone_from(file);
            self.said = Instant::now();
            self.bar = self.terminal.then(|| {
                let template = "{prefix:<24} {bar:32} {bytes}/{total_bytes}  {bytes_per_sec}, {eta} left";
                let style = ProgressStyle::with_template(template).expect("a valid template");
                // The rate is that of this connection, whatever was there before.
                ProgressBar::new(*total).with_style(style).with_prefix(file.clone()).with_position(*done)
            });
        }
        match &self.bar {
            Some(bar) if done == total => bar.finish_and_clear(),
            Some(bar) => bar.set_position(*done),
            None if done == total || self.said.elapsed() >= Duration::from_secs(5) => {
                self.said = Instant::now();
                say!("downloading {file}: {} of {}", HumanBytes(*done), HumanBytes(*total));
            }
            None => {}
        }
    }
}

impl Drop for Told {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
