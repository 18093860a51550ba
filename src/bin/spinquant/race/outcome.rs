//! What a race leaves behind: rows as they are run, a table, pictures.

use std::fmt::Write as _;
use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use spinquant::io::{check_writable, write_atomically};
use spinquant::plot::{Axes, Panel, Series, lines};
use spinquant::quant::{ClipRatios, Scheme};
use spinquant::{Error, Result};

/// A place of a curve.
#[derive(Clone, Copy, Debug)]
pub struct Point {
    pub step: usize,
    /// Since the start, scoring not included.
    pub seconds: f64,
    /// Cross entropy.
    pub held_out: f64,
}

/// One run of one entry.
#[derive(Clone, Debug)]
pub struct Run {
    pub entry: String,
    pub optimizer: String,
    pub objective: String,
    pub rate: f64,
    pub clip: Option<ClipRatios>,
    pub scheme: Scheme,
    pub steps: usize,
    pub seed: u64,
    pub curve: Vec<Point>,
    pub perplexity: f64,
    /// Of learning and of searching clip ratios; scoring not included.
    pub seconds: f64,
    pub orthogonality_error: f64,
}

impl Run {
    /// NaN without a curve: a run that diverged is not the best of any.
    pub fn held_out_last(&self) -> f64 {
        self.curve.last().map_or(f64::NAN, |p| p.held_out)
    }

    /// For people, as soon as it is known.
    pub fn line(&self, recovered: f64) -> String {
        let learning = match self.curve.first() {
            Some(first) => format!(
                "rate {}, {} steps, held out {:.4} -> {:.4}, ",
                self.rate,
                self.steps,
                first.held_out,
                self.held_out_last()
            ),
            None => String::new(),
        };
        format!(
            "{:<9} {:<32} seed {}: {learning}perplexity {:.3}, {:.1} % of the gap, {:.2} s",
            self.scheme.to_string(),
            self.entry,
            self.seed,
            self.perplexity,
            100.0 * recovered,
            self.seconds
        )
    }
}

/// What a scheme's runs are measured against.
#[derive(Clone, Debug)]
pub struct Baseline {
    pub scheme: Scheme,
    /// Perplexity in full precision.
    pub full: f64,
    /// Perplexity of the random Hadamards of this seed and the following ones.
    pub first_seed: u64,
    pub random: Vec<f64>,
}

impl Baseline {
    pub fn mean(&self) -> f64 {
        mean(&self.random)
    }
}

fn mean(x: &[f64]) -> f64 {
    x.iter().sum::<f64>() / x.len() as f64
}

/// All runs so far, and where their rows go.
pub struct Outcome {
    pub baselines: Vec<Baseline>,
    runs: Vec<Run>,
    files: [(PathBuf, File); 2],
}

/// Runs of all seeds of an entry at one scheme, number of steps and rate.
struct Group<'a> {
    first: &'a Run,
    runs: Vec<&'a Run>,
}

/// What a race leaves in its folder.
const FILES: [&str; 5] = ["runs.csv", "curves.csv", "table.md", "steps.png", "seconds.png"];

impl Outcome {
    /// Fails where a file cannot be written. Those of an earlier race stay as they are.
    pub fn check(folder: &Path) -> Result<()> {
        FILES.iter().try_for_each(|name| check_writable(&folder.join(name)))
    }

    /// Begins the tables, in place of those of an earlier race.
    pub fn create(folder: &Path) -> Result<Self> {
        let create = |name: &str, header: &str| -> Result<(PathBuf, File)> {
            let path = folder.join(name);
            let mut file = File::create(&path).map_err(Error::io(&path))?;
            writeln!(file, "{header}").map_err(Error::io(&path))?;
            Ok((path, file))
        };
        let runs = "entry,optimizer,objective,learning_rate,clip,scheme,steps,seed,held_out_first,held_out_last,perplexity,recovered,\
                    seconds,orthogonality_error";
        let curves = "entry,learning_rate,scheme,steps,seed,step,seconds,held_out";
        Ok(Self { baselines: vec![], runs: vec![], files: [create("runs.csv", runs)?, create("curves.csv", curves)?] })
    }

    /// The part of the gap from random Hadamards to full precision that a run closed.
    pub fn recovered(&self, run: &Run) -> f64 {
        let same = |b: &&Baseline| b.scheme.to_string() == run.scheme.to_string();
        self.baselines.iter().find(same).map_or(f64::NAN, |b| {
            let random = b.random.get((run.seed - b.first_seed) as usize).copied().unwrap_or(f64::NAN);
            (random - run.perplexity) / (random - b.full)
        })
    }

    /// Writes the rows of a run at once, so that an interrupted race keeps what it has.
    pub fn add(&mut self, run: Run) -> Result<()> {
        let clip = run.clip.map_or(String::new(), |c| c.to_string().replace(',', " "));
        let Run { entry, optimizer, objective, rate, scheme, steps, seed, .. } = &run;
        // What there is none of is left empty.
        let numbers = [
            run.curve.first().map_or(f64::NAN, |p| p.held_out),
            run.held_out_last(),
            run.perplexity,
            self.recovered(&run),
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
        for ((path, file), text) in self.files.iter_mut().zip([row, curve]) {
            file.write_all(text.as_bytes()).and_then(|()| file.flush()).map_err(Error::io(&*path))?;
        }
        self.runs.push(run);
        Ok(())
    }

    fn groups(&self) -> Vec<Group<'_>> {
        let key = |r: &Run| (r.entry.clone(), r.scheme.to_string(), r.steps, r.rate.to_bits());
        let mut groups: Vec<Group<'_>> = vec![];
        for run in &self.runs {
            match groups.iter_mut().find(|g| key(g.first) == key(run)) {
                Some(group) => group.runs.push(run),
                None => groups.push(Group { first: run, runs: vec![run] }),
            }
        }
        groups
    }

    /// The table in Markdown.
    pub fn table(&self, name: &str) -> String {
        let mut table = String::new();
        for b in &self.baselines {
            let (scheme, full, random) = (b.scheme, b.full, b.mean());
            let _ = writeln!(table, "\n{name}, {scheme}: full precision {full:.3}, random Hadamard {random:.3}\n");
            let _ = writeln!(
                table,
                "| entry | rate | steps | seeds | perplexity (mean, range) | gap recovered | seconds |\n|---|---|---|---|---|---|---|"
            );
            let mut groups = self.groups();
            groups.retain(|g| g.first.scheme.to_string() == scheme.to_string());
            let score = |g: &Group<'_>| mean(&g.runs.iter().map(|r| r.perplexity).collect::<Vec<_>>());
            groups.sort_by(|a, b| score(a).total_cmp(&score(b)));
            for g in &groups {
                let of = |f: &dyn Fn(&Run) -> f64| g.runs.iter().map(|r| f(r)).collect::<Vec<f64>>();
                let perplexity = of(&|r| r.perplexity);
                let range = [f64::min, f64::max].map(|f| perplexity.iter().copied().reduce(f).unwrap_or(f64::NAN));
                let rate = if g.first.rate.is_nan() { String::new() } else { g.first.rate.to_string() };
                let _ = writeln!(
                    table,
                    "| {} | {rate} | {} | {} | {:.3} ({:.3}–{:.3}) | {:.1} % | {:.2} |",
                    g.first.entry,
                    g.first.steps,
                    g.runs.len(),
                    mean(&perplexity),
                    range[0],
                    range[1],
                    100.0 * mean(&of(&|r| self.recovered(r))),
                    mean(&of(&|r| r.seconds)),
                );
            }
        }
        table
    }

    /// Writes the table and the pictures.
    pub fn write(&self, folder: &Path, table: &str) -> Result<()> {
        write_atomically(&folder.join("table.md"), |out| out.write_all(table.as_bytes()))?;
        self.draw(&folder.join("steps.png"), "steps", |p| p.step as f64)?;
        self.draw(&folder.join("seconds.png"), "seconds of learning", |p| p.seconds)
    }

    /// Held-out loss against something, a panel a scheme: of every entry the rate and the number of steps that ended best.
    fn draw(&self, path: &Path, x: &str, of: fn(&Point) -> f64) -> Result<()> {
        let last = |g: &Group<'_>| mean(&g.runs.iter().map(|r| r.held_out_last()).collect::<Vec<_>>());
        let panel = |b: &Baseline| {
            let mut best: Vec<Group<'_>> = vec![];
            for g in self.groups().into_iter().filter(|g| g.first.scheme.to_string() == b.scheme.to_string()) {
                match best.iter_mut().find(|old| old.first.entry == g.first.entry) {
                    Some(old) if last(&g) < last(old) => *old = g,
                    Some(_) => {}
                    None => best.push(g),
                }
            }
            // One that diverged stays, without points, so that an entry has one colour in all panels.
            best.retain(|g| g.first.steps > 0);
            let series = best.iter().map(|g| {
                // The mean over seeds, as far as all have a point.
                let points = g.runs.iter().map(|r| r.curve.len()).min().unwrap_or(0);
                let at = |i: usize, f: fn(&Point) -> f64| mean(&g.runs.iter().map(|r| f(&r.curve[i])).collect::<Vec<_>>());
                let points = (0..points).map(|i| (at(i, of), at(i, |p| p.held_out))).collect();
                Series { name: g.first.entry.clone(), points }
            });
            Panel { title: b.scheme.to_string(), series: series.collect() }
        };
        let finite = |s: &Series| s.points.iter().any(|(x, y)| x.is_finite() && y.is_finite());
        let panels: Vec<Panel> = self.baselines.iter().map(panel).filter(|p| p.series.iter().any(finite)).collect();
        if panels.is_empty() {
            return Ok(()); // nothing learned, nothing to draw
        }
        let axes = Axes { x, y: "held-out cross entropy (nats a token)", log_y: false };
        lines(path, (560 * panels.len() as u32 + 380, 560), &panels, axes)
    }

    /// Everything, for programs.
    pub fn json(&self) -> Value {
        let runs = self.runs.iter().map(|r| {
            let curve: Vec<Value> = r.curve.iter().map(|p| json!([p.step, p.seconds, p.held_out])).collect();
            json!({
                "entry": r.entry, "optimizer": r.optimizer, "objective": r.objective, "learning_rate": r.rate,
                "clip": r.clip, "scheme": r.scheme.to_string(), "steps": r.steps, "seed": r.seed, "perplexity": r.perplexity,
                "recovered": self.recovered(r), "seconds": r.seconds, "orthogonality_error": r.orthogonality_error, "curve": curve,
            })
        });
        let baselines =
            self.baselines.iter().map(|b| json!({"scheme": b.scheme.to_string(), "full": b.full, "random": b.random}));
        json!({"baselines": baselines.collect::<Vec<_>>(), "runs": runs.collect::<Vec<_>>()})
    }
}
