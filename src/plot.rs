//! Pictures: lines over a common pair of axes, and magnitudes over tokens and channels. PNG, with a font of its own, so that they come
//! out the same on a machine without any. Needs the feature `cli`.

use std::path::Path;
use std::sync::OnceLock;

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::register_font;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::{Error, Result, Tensor, io};

/// Points under a name.
#[derive(Clone, Debug, PartialEq)]
pub struct Series {
    /// For the legend.
    pub name: String,
    /// x and y; those that are not finite, or not positive on a logarithmic axis, are left out.
    pub points: Vec<(f64, f64)>,
}

/// Some series under a title.
#[derive(Clone, Debug, PartialEq)]
pub struct Panel {
    /// Above it.
    pub title: String,
    /// Series of one index have one colour in all panels.
    pub series: Vec<Series>,
}

/// What the axes of [`lines`] say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Axes<'a> {
    /// Name and unit along x.
    pub x: &'a str,
    /// Name and unit along y.
    pub y: &'a str,
    /// A logarithmic y.
    pub log_y: bool,
}

type Area<'a> = DrawingArea<BitMapBackend<'a>, Shift>;

const FONT: &str = "sans-serif";
const COLOURS: [RGBColor; 8] = [
    RGBColor(31, 119, 180),
    RGBColor(214, 39, 40),
    RGBColor(44, 160, 44),
    RGBColor(148, 103, 189),
    RGBColor(255, 127, 14),
    RGBColor(23, 190, 207),
    RGBColor(227, 119, 194),
    RGBColor(110, 110, 110),
];
/// Low to high.
const HEAT: [(f64, f64, f64); 5] =
    [(46.0, 64.0, 120.0), (66.0, 139.0, 180.0), (240.0, 200.0, 90.0), (235.0, 110.0, 60.0), (170.0, 10.0, 40.0)];

/// Draws into a PNG of this size, whole or not at all.
fn picture<E: std::fmt::Display>(
    path: &Path,
    size: (u32, u32),
    draw: impl FnOnce(&Area<'_>) -> std::result::Result<(), E>,
) -> Result<()> {
    static REGISTERED: OnceLock<bool> = OnceLock::new();
    let font = include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/assets/fonts/DejaVuSans-subset.ttf"));
    if !REGISTERED.get_or_init(|| register_font(FONT, FontStyle::Normal, font).is_ok()) {
        return Err(Error::format(path, "the embedded font cannot be read"));
    }
    let mut pixels = vec![0; 3 * size.0 as usize * size.1 as usize];
    let bad = |e: String| Error::format(path, format!("cannot draw: {e}"));
    {
        let area = BitMapBackend::with_buffer(&mut pixels, size).into_drawing_area();
        area.fill(&WHITE).map_err(|e| bad(e.to_string()))?;
        draw(&area).map_err(|e| bad(e.to_string()))?;
        area.present().map_err(|e| bad(e.to_string()))?;
    }
    io::write_atomically(path, |out| {
        let mut encoder = png::Encoder::new(out, size.0, size.1);
        encoder.set_color(png::ColorType::Rgb);
        let mut writer = encoder.write_header().map_err(unwrapped)?;
        writer.write_image_data(&pixels).map_err(unwrapped)?;
        writer.finish().map_err(unwrapped)
    })
}

/// What the disk said, where it was the disk.
fn unwrapped(e: png::EncodingError) -> std::io::Error {
    match e {
        png::EncodingError::IoError(e) => e,
        other => std::io::Error::other(other),
    }
}

/// Panels side by side over common axes.
///
/// # Errors
/// No point to draw; a file that cannot be written.
pub fn lines(path: &Path, size: (u32, u32), panels: &[Panel], axes: Axes<'_>) -> Result<()> {
    let usable = |&(x, y): &(f64, f64)| x.is_finite() && y.is_finite() && !(axes.log_y && y <= 0.0);
    let all: Vec<_> = panels.iter().flat_map(|p| &p.series).flat_map(|s| s.points.iter().copied().filter(usable)).collect();
    let range = |of: fn(&(f64, f64)) -> f64| {
        all.iter().map(of).fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), v| (a.min(v), b.max(v)))
    };
    let (x, y) = (range(|p| p.0), range(|p| p.1));
    if all.is_empty() {
        return Err(Error::argument("plot", "expected at least one finite point"));
    }
    let pad = |(a, b): (f64, f64), part: f64| {
        let d = if b > a { (b - a) * part } else { 0.5 };
        a - d..b + d
    };
    let x = pad(x, 0.02);
    picture(path, size, |area| {
        let names = panels.iter().map(|p| &p.series).max_by_key(|s| s.len()).map_or(&[][..], Vec::as_slice);
        let longest = names.iter().map(|s| s.name.chars().count()).max().unwrap_or(0);
        let (area, legend) = area.split_horizontally(size.0 as i32 - 60 - 10 * longest as i32);
        for (i, series) in names.iter().enumerate() {
            let (y, colour) = (64 + 28 * i as i32, COLOURS[i % COLOURS.len()]);
            let text = TextStyle::from((FONT, 18).into_font()).pos(Pos::new(HPos::Left, VPos::Center));
            let drawn = legend.draw(&PathElement::new([(4, y), (28, y)], colour.stroke_width(3)));
            drawn.and_then(|()| legend.draw(&Text::new(series.name.clone(), (36, y), text))).map_err(|e| e.to_string())?;
        }
        for (panel, area) in panels.iter().zip(area.split_evenly((1, panels.len()))) {
            if axes.log_y {
                let y = (y.0 / 1.15..y.1 * 1.3).log_scale();
                draw_panel(&area, panel, axes, (x.clone(), y), usable)?;
            } else {
                draw_panel(&area, panel, axes, (x.clone(), pad(y, 0.06)), usable)?;
            }
        }
        Ok::<_, String>(())
    })
}

fn draw_panel<Y>(
    area: &Area<'_>,
    panel: &Panel,
    axes: Axes<'_>,
    (x, y): (std::ops::Range<f64>, Y),
    usable: impl Fn(&(f64, f64)) -> bool,
) -> std::result::Result<(), String>
where
    Y: plotters::coord::ranged1d::AsRangedCoord<Value = f64>,
    Y::CoordDescType: plotters::coord::ranged1d::ValueFormatter<f64>,
{
    let text = |e: &dyn std::fmt::Display| e.to_string();
    let mut chart = ChartBuilder::on(area)
        .caption(&panel.title, (FONT, 24))
        .margin(14)
        .x_label_area_size(56)
        .y_label_area_size(78)
        .build_cartesian_2d(x.clone(), y)
        .map_err(|e| text(&e))?;
    let number = |v: &f64| {
        if *v != 0.0 && (v.abs() < 1e-2 || v.abs() >= 1e5) { format!("{v:.0e}") } else { format!("{}", (v * 1e3).round() / 1e3) }
    };
    let span = x.end - x.start;
    let whole = panel.series.iter().flat_map(|s| &s.points).all(|p| p.0.fract() == 0.0) && span < 12.0;
    chart
        .configure_mesh()
        .x_labels(if whole { span as usize + 1 } else { 6 })
        .light_line_style(WHITE)
        .bold_line_style(RGBColor(225, 225, 225))
        .x_desc(axes.x)
        .y_desc(axes.y)
        .axis_desc_style((FONT, 20))
        .label_style((FONT, 18))
        .x_label_formatter(&number)
        .y_label_formatter(&number)
        .draw()
        .map_err(|e| text(&e))?;
    for (i, series) in panel.series.iter().enumerate() {
        let colour = COLOURS[i % COLOURS.len()];
        let points: Vec<_> = series.points.iter().copied().filter(&usable).collect();
        chart.draw_series(LineSeries::new(points.iter().copied(), colour.stroke_width(2))).map_err(|e| text(&e))?;
        if points.len() <= 64 {
            let dots = points.iter().map(|&p| Circle::new(p, 4, colour.filled()));
            chart.draw_series(dots).map_err(|e| text(&e))?;
        }
    }
    Ok(())
}

/// Magnitudes over tokens and channels, seen from above one corner, as in the paper.
#[derive(Clone, Debug)]
pub struct Landscape {
    /// Above it.
    pub title: String,
    /// |x|, `[tokens, channels]` in `f32` on the CPU.
    pub magnitudes: Tensor,
}

/// Columns and rows that are drawn at most; of more, the largest of each group is.
const COLUMNS: usize = 160;
const DEPTH: usize = 64;

/// Rows of landscapes. Those of one row have one scale.
///
/// # Errors
/// Tensors of another kind; a file that cannot be written.
pub fn landscapes(path: &Path, size: (u32, u32), rows: &[Vec<Landscape>]) -> Result<()> {
    for l in rows.iter().flatten() {
        if l.magnitudes.shape().len() != 2 || l.magnitudes.is_empty() {
            return Err(Error::shape("landscape", "[tokens, channels]", l.magnitudes.shape()));
        }
        l.magnitudes.as_slice::<f32>()?;
    }
    picture(path, size, |area| {
        for (row, area) in rows.iter().zip(area.split_evenly((rows.len().max(1), 1))) {
            let values = row.iter().filter_map(|l| l.magnitudes.as_slice::<f32>().ok());
            let top = values.flatten().fold(0f32, |m, x| m.max(*x)).max(f32::MIN_POSITIVE);
            for (landscape, area) in row.iter().zip(area.split_evenly((1, row.len().max(1)))) {
                draw_landscape(&area, landscape, f64::from(top)).map_err(|e| e.to_string())?;
            }
        }
        Ok::<_, String>(())
    })
}

/// Groups of an extent so that at most `most` are left: how many in each, and how many of those.
fn groups(extent: usize, most: usize) -> (usize, usize) {
    let each = extent.div_ceil(most).max(1);
    (each, extent.div_ceil(each))
}

/// A round number of at least an eighth of `top`, for ticks.
fn tick(top: f64) -> f64 {
    let power = 10f64.powf((top / 5.0).log10().floor());
    [1.0, 2.0, 5.0, 10.0].into_iter().map(|f| f * power).find(|t| top / t <= 5.5).unwrap_or(10.0 * power)
}

fn heat(part: f64) -> RGBColor {
    let at = part.clamp(0.0, 1.0).sqrt() * (HEAT.len() - 1) as f64;
    let i = (at as usize).min(HEAT.len() - 2);
    let (a, b, f) = (HEAT[i], HEAT[i + 1], at - i as f64);
    let mix = |a: f64, b: f64| (a + (b - a) * f) as u8;
    RGBColor(mix(a.0, b.0), mix(a.1, b.1), mix(a.2, b.2))
}

type Drawn<'a> = std::result::Result<(), DrawingAreaErrorKind<<BitMapBackend<'a> as DrawingBackend>::ErrorType>>;

fn draw_landscape<'a>(area: &Area<'a>, landscape: &Landscape, top: f64) -> Drawn<'a> {
    let (tokens, channels) = (landscape.magnitudes.rows(), landscape.magnitudes.cols());
    let values = landscape.magnitudes.as_slice::<f32>().unwrap_or_default();
    let ((per_column, columns), (per_row, depth)) = (groups(channels, COLUMNS), groups(tokens, DEPTH));
    let (width, height) = area.dim_in_pixel();
    let (width, height) = (f64::from(width), f64::from(height));
    let (left, right, above, below) = (92.0, 40.0, 52.0, 66.0);
    let (dx, dy) = (0.26 * (width - left - right), 0.34 * (height - above - below));
    let (w, h) = (width - left - right - dx, height - above - below - dy);
    // Channel u, token v and height z, each from 0 to 1.
    let at = |u: f64, v: f64, z: f64| ((left + u * w + v * dx).round() as i32, (height - below - v * dy - z * h).round() as i32);
    let grey = RGBColor(200, 200, 200);
    let (dark, small) = (RGBColor(70, 70, 70), 18);
    let style = |h: HPos, v: VPos| TextStyle::from((FONT, small).into_font()).color(&dark).pos(Pos::new(h, v));
    let line = |a, b| area.draw(&PathElement::new([a, b], grey));

    let title = TextStyle::from((FONT, 22).into_font()).pos(Pos::new(HPos::Center, VPos::Top));
    area.draw(&Text::new(landscape.title.clone(), ((width / 2.0) as i32, 10), title))?;
    let step = tick(top);
    for i in 0..=(top / step) as usize {
        let (value, z) = (i as f64 * step, i as f64 * step / top);
        line(at(0.0, 1.0, z), at(1.0, 1.0, z))?;
        line(at(0.0, 0.0, z), at(0.0, 1.0, z))?;
        let (x, y) = at(0.0, 0.0, z);
        let digits = (-step.log10().floor()).max(0.0) as usize;
        area.draw(&Text::new(format!("{value:.digits$}"), (x - 8, y), style(HPos::Right, VPos::Center)))?;
    }
    for (a, b) in [((0.0, 0.0), (1.0, 0.0)), ((1.0, 0.0), (1.0, 1.0)), ((0.0, 0.0), (0.0, 1.0)), ((0.0, 1.0), (1.0, 1.0))] {
        line(at(a.0, a.1, 0.0), at(b.0, b.1, 0.0))?;
    }
    line(at(0.0, 0.0, 0.0), at(0.0, 0.0, 1.0))?;
    line(at(0.0, 1.0, 0.0), at(0.0, 1.0, 1.0))?;

    for r in (0..depth).rev() {
        for c in 0..columns {
            let group = (r * per_row..((r + 1) * per_row).min(tokens)).flat_map(|t| {
                let row = t * channels;
                values[row + c * per_column..row + ((c + 1) * per_column).min(channels)].iter()
            });
            let z = f64::from(group.fold(0f32, |m, x| m.max(*x))) / top;
            let v = r as f64 / depth as f64;
            let (a, b) = (at(c as f64 / columns as f64, v, 0.0), at((c + 1) as f64 / columns as f64, v, z));
            // At least as high as the row behind is away, so that small values make a floor.
            let floor = a.1 - (dy / depth as f64).ceil() as i32;
            area.draw(&Rectangle::new([(a.0, b.1.min(floor)), (b.0.max(a.0 + 1), a.1)], heat(z).filled()))?;
        }
    }

    let named = |name: &str, each: usize| match each {
        1 => name.to_string(),
        n => format!("{name} (largest of each {n})"),
    };
    for i in 0..=4 {
        let part = f64::from(i) / 4.0;
        let (x, y) = at(part, 0.0, 0.0);
        area.draw(&Text::new(format!("{}", (part * channels as f64) as usize), (x, y + 8), style(HPos::Center, VPos::Top)))?;
        let (x, y) = at(1.0, part, 0.0);
        if i > 0 {
            area.draw(&Text::new(format!("{}", (part * tokens as f64) as usize), (x + 8, y), style(HPos::Left, VPos::Center)))?;
        }
    }
    let (x, y) = at(0.5, 0.0, 0.0);
    area.draw(&Text::new(named("channel", per_column), (x, y + 34), style(HPos::Center, VPos::Top)))?;
    let (x, y) = at(1.0, 0.5, 0.0);
    area.draw(&Text::new(named("token", per_row), (x + 4, y + 34), style(HPos::Left, VPos::Center)))?;
    let upright = TextStyle::from((FONT, small).into_font().transform(FontTransform::Rotate270)).color(&dark);
    let (_, y) = at(0.0, 0.0, 0.5);
    area.draw(&Text::new("|x|", (10, y), upright.pos(Pos::new(HPos::Center, VPos::Top))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_few() {
        for top in [0.013, 0.9, 1.0, 3.7, 88.0, 1219.0] {
            let t = tick(top);
            assert!((2.0..=5.5).contains(&(top / t)), "{top}: {t}");
        }
        assert_eq!((groups(128, 160), groups(4096, 160), groups(161, 160)), ((1, 128), (26, 158), (2, 81)));
    }

    #[test]
    fn pictures_have_letters_and_bad_input_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lines.png");
        let axes = Axes { x: "step", y: "loss", log_y: true };
        let panel = |name: &str| Panel {
            title: name.into(),
            series: vec![Series { name: "held out".into(), points: vec![(0.0, 3.0), (1.0, 2.0), (2.0, -1.0), (3.0, f64::NAN)] }],
        };
        lines(&path, (640, 400), &[panel("a")], axes).unwrap();
        let first = std::fs::read(&path).unwrap();
        assert!(first.starts_with(b"\x89PNG"));
        lines(&path, (640, 400), &[panel("b")], axes).unwrap();
        assert_ne!(std::fs::read(&path).unwrap(), first, "another title, the same picture: there is no text in it");
        lines(&path, (640, 400), &[panel("a")], axes).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), first);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "no temporary file is left");
        assert!(lines(&path, (640, 400), &[], axes).is_err());
        let x = Landscape { title: "x".into(), magnitudes: crate::ops::randn([3], 0) };
        assert!(landscapes(&path, (64, 64), &[vec![x]]).is_err());
        assert!(lines(&folder.path().join("absent/x.png"), (640, 400), &[panel("a")], axes).is_err());
    }
}
