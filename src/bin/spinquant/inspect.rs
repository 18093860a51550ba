//! `spinquant inspect`: what the quantisers see, before and after rotation, in tables and pictures. Before, R3 runs on K all the
//! same, as in the published baseline; `--online none` shows K without it.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use serde_json::json;
use spinquant::inspect::{self, SiteStats};
use spinquant::io::{check_writable, follow, write_atomically};
use spinquant::llama::Merged;
use spinquant::plot::{self, Axes, Landscape, Panel, Series};
use spinquant::quant::{Scheme, Site};
use spinquant::rotation::Start;
use spinquant::{Error, Result};

use crate::common::{ModelArgs, Progress, at_least_one, rotations};
use crate::scheme::SchemeArgs;

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    scheme: SchemeArgs,
    /// Text to run.
    #[arg(long, value_name = "FILE")]
    text: PathBuf,
    #[arg(long, value_name = "WHICH", default_value = "hadamard", help = format!("{}; `none` is looked at in any case", Start::usage(&[])))]
    rotations: Start,
    /// Folder for sites.csv, channels.csv, kurtosis.png, sqnr.png and activations.png; made where it is not there.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Tokens of a window.
    #[arg(long, default_value_t = 2048)]
    seq_len: usize,
    /// Windows to run.
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = at_least_one)]
    windows: usize,
    /// Layer of activations.png, from 0 (default: the middle one).
    #[arg(long, value_name = "N")]
    layer: Option<usize>,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// The network under one choice of rotations, and what was seen in it.
struct View {
    name: String,
    network: Merged,
    stats: Vec<SiteStats>,
}

/// What is written.
const FILES: [&str; 5] = ["sites.csv", "channels.csv", "activations.png", "kurtosis.png", "sqnr.png"];
/// Where it is made.
const STAGE: &str = ".spinquant.partial";

pub fn run(args: &Args) -> Result<()> {
    let progress = Progress::new();
    std::fs::create_dir_all(&args.out).map_err(Error::io(&args.out))?;
    match std::fs::remove_dir_all(args.out.join(STAGE)) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(Error::io(&args.out.join(STAGE))(e)),
        _ => {} // of a run that was killed
    }
    FILES.iter().try_for_each(|name| check_writable(&args.out.join(name)))?;
    let mut scheme = args.scheme.scheme();
    let config = args.model.checked(&scheme, Some(args.seq_len))?;
    let layer = args.layer.unwrap_or(config.layers / 2);
    if layer >= config.layers {
        return Err(Error::argument("--layer", format!("expected one below {}, got {layer}", config.layers)));
    }
    let file = rotations(&args.rotations, &config)?;
    scheme.online = args.scheme.scheme_online(file.as_ref(), &config)?.online;
    let rotations = file.map(|file| args.scheme.learned(&file, &scheme));
    let text = args.model.windows(&config, &args.text, args.seq_len)?;
    let plain = args.model.load_plain(&progress)?;
    let view = |name: String, network: Merged| {
        progress.say(&format!("looking at {} windows, rotations {name}", args.windows.min(text.len())));
        let stats = inspect::sites(&network, &text, args.windows, &scheme)?;
        Ok::<_, Error>(View { name, network, stats })
    };
    let mut views = vec![view("none".into(), inspect::unquantized(&plain, None, &scheme)?)?];
    drop(plain);
    if let Some(rotations) = &rotations {
        let network = inspect::unquantized(&args.model.load(&progress)?, Some(rotations), &scheme)?;
        views.push(view(args.rotations.to_string(), network)?);
    }

    // All are made before the first takes its place.
    let stage = args.out.join(STAGE);
    let made = draw(&stage, &views, text.get(0), layer);
    let moved = made.and_then(|()| {
        let there = FILES.map(|name| (stage.join(name), args.out.join(name))).into_iter().filter(|(from, _)| from.exists());
        there
            .into_iter()
            .try_for_each(|(from, to)| follow(&to).and_then(|real| std::fs::rename(&from, real)).map_err(Error::io(&to)))
    });
    let _ = std::fs::remove_dir_all(&stage);
    moved?;

    if args.json {
        let site = |v: &View, s: &SiteStats| {
            json!({"rotations": v.name, "layer": s.layer, "site": s.site.name(), "values": s.values, "absmax": s.absmax,
                "kurtosis": s.kurtosis, "sqnr_db": s.sqnr_db})
        };
        let sites: Vec<_> = views.iter().flat_map(|v| v.stats.iter().map(|s| site(v, s))).collect();
        out!("{}", json!({"scheme": scheme.to_string(), "sites": sites, "out": args.out, "starts_with": text.first_token()}));
    } else {
        print(&views, &scheme);
        out!("the text starts with {}", text.first_token());
        out!("tables and pictures written to {}", args.out.display());
    }
    Ok(())
}

/// Writes the tables and the pictures into a new folder.
fn draw(folder: &Path, views: &[View], tokens: &[u32], layer: usize) -> Result<()> {
    std::fs::create_dir(folder).map_err(Error::io(folder))?;
    let write = |name: &str, text: &str| write_atomically(&folder.join(name), |out| out.write_all(text.as_bytes()));
    write("sites.csv", &sites_csv(views))?;
    write("channels.csv", &channels_csv(views))?;
    let networks: Vec<_> = views.iter().map(|v| (titled(&v.name), &v.network)).collect();
    activations(&folder.join("activations.png"), &networks, tokens, layer)?;
    let kurtosis = Axes { x: "layer", y: "kurtosis (normal: 3)", log_y: true };
    lines(&folder.join("kurtosis.png"), views, kurtosis, |s| s.kurtosis)?;
    let sqnr = Axes { x: "layer", y: "SQNR (dB)", log_y: false };
    lines(&folder.join("sqnr.png"), views, sqnr, |s| s.sqnr_db)
}

fn titled(rotations: &str) -> String {
    if rotations == "none" { "without rotations".into() } else { format!("rotations {rotations}") }
}

/// Means over the layers.
fn print(views: &[View], scheme: &Scheme) {
    out!("{:<18} {:<28} {:>12} {:>12} {:>12}", "site", "rotations", "absmax", "kurtosis", "SQNR (dB)");
    for site in Site::ALL {
        for v in views {
            let of: Vec<_> = v.stats.iter().filter(|s| s.site == site).collect();
            let mean = |f: fn(&SiteStats) -> f64| of.iter().map(|s| f(s)).sum::<f64>() / of.len().max(1) as f64;
            let absmax = of.iter().map(|s| s.absmax).fold(0.0, f64::max);
            let (kurtosis, sqnr) = (mean(|s| s.kurtosis), mean(|s| s.sqnr_db));
            out!("{:<18} {:<28} {absmax:>12.3} {kurtosis:>12.2} {sqnr:>12.2}", site.name(), v.name);
        }
    }
    out!("absmax: the largest of all layers; kurtosis and SQNR ({scheme}): their mean");
}

fn sites_csv(views: &[View]) -> String {
    let mut csv = String::from("rotations,layer,site,values,absmax,kurtosis,sqnr_db\n");
    for v in views {
        for s in &v.stats {
            let (name, site) = (quoted(&v.name), s.site.name());
            let _ = writeln!(csv, "{name},{},{site},{},{},{},{}", s.layer, s.values, s.absmax, s.kurtosis, s.sqnr_db);
        }
    }
    csv
}

fn channels_csv(views: &[View]) -> String {
    let mut csv = String::from("rotations,layer,site,channel,absmax\n");
    for v in views {
        for s in &v.stats {
            for (channel, absmax) in s.channel_absmax.iter().enumerate() {
                let _ = writeln!(csv, "{},{},{},{channel},{absmax}", quoted(&v.name), s.layer, s.site.name());
            }
        }
    }
    csv
}

/// A field of a CSV file.
fn quoted(text: &str) -> String {
    if text.contains([',', '"', '\n']) { format!("\"{}\"", text.replace('"', "\"\"")) } else { text.to_string() }
}

fn lines(path: &Path, views: &[View], axes: Axes<'_>, of: fn(&SiteStats) -> f64) -> Result<()> {
    let series = |v: &View, site: Site| {
        let points = v.stats.iter().filter(|s| s.site == site).map(|s| (s.layer as f64, of(s))).collect();
        Series { name: site.name().replace('_', " "), points }
    };
    let panels: Vec<_> = views
        .iter()
        .map(|v| Panel { title: titled(&v.name), series: Site::ALL.iter().map(|&site| series(v, site)).collect() })
        .collect();
    match plot::lines(path, (620 * views.len() as u32, 480), &panels, axes) {
        // Nothing is quantised: there is no error to draw.
        Err(Error::Argument { .. }) => Ok(()),
        other => other,
    }
}

/// The inputs of q, k, v and of down over tokens and channels, a column for every network.
pub fn activations(path: &Path, networks: &[(String, &Merged)], tokens: &[u32], layer: usize) -> Result<()> {
    let tokens = &tokens[..tokens.len().min(64)];
    let row = |(site, what): (Site, &str)| {
        let landscape = |(name, network): &(String, &Merged)| {
            let magnitudes = inspect::magnitudes(network, tokens, layer, site)?;
            Ok(Landscape { title: format!("{what}, layer {layer}: {name}"), magnitudes })
        };
        networks.iter().map(landscape).collect::<Result<Vec<_>>>()
    };
    let rows = [(Site::AttentionInput, "input of q, k, v"), (Site::DownInput, "input of down")]
        .map(row)
        .into_iter()
        .collect::<Result<Vec<_>>>()?;
    plot::landscapes(path, (620 * networks.len() as u32, 840), &rows)
}
