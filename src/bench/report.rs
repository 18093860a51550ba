//! What a run of the benches found, as a record that later runs compare themselves with.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::Measured;
use crate::ops::Case;
use crate::{DType, Error, Result};

/// One run, as its JSON object has it. The fields of `benches/record/README.md`; later versions add to them and take none away.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// What it ran on: the card's name, or the CPU and its threads.
    pub device: String,
    /// After so many seconds what was left of the table was left out.
    pub seconds: u64,
    /// The lines of the table.
    pub rows: Vec<Row>,
    /// The most bytes that lived at once: tensors on a GPU, the process on the CPU.
    pub peak_bytes: Option<u64>,
}

/// One line: a kernel at a size in a type.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// Its name.
    pub kernel: String,
    /// Values of a row.
    pub n: usize,
    /// Number of rows.
    pub rows: usize,
    /// Element type.
    pub dtype: String,
    /// Milliseconds of a call: the median.
    #[serde(default)]
    pub ms: Option<f64>,
    /// The time that a tenth of the calls stay within, in milliseconds.
    #[serde(default)]
    pub p10_ms: Option<f64>,
    /// The time that nine tenths of the calls stay within, in milliseconds.
    #[serde(default)]
    pub p90_ms: Option<f64>,
    /// Milliseconds of a call that finds nothing in the second-level cache: where what it moves would fit.
    #[serde(default)]
    pub cold_ms: Option<f64>,
    /// 10⁹ bytes a second of what must be moved; of kernels that memory limits.
    #[serde(default)]
    pub gb_per_s: Option<f64>,
    /// That over the rate of a copy of rows × n values.
    #[serde(default)]
    pub of_copy: Option<f64>,
    /// 10¹² additions and multiplications a second; of kernels that arithmetic limits.
    #[serde(default)]
    pub tflop_per_s: Option<f64>,
    /// The clock of the GPU's multiprocessors while it was measured, in MHz.
    #[serde(default)]
    pub sm_mhz: Option<u32>,
    /// The kernel that ran, where an operation has several.
    #[serde(default)]
    pub ran: Option<String>,
    /// How the time was measured.
    #[serde(default)]
    pub measured_by: Option<String>,
    /// `ms` over that of the same line of the earlier run it was compared with.
    #[serde(default)]
    pub of_baseline: Option<f64>,
    /// Why there is no measurement.
    #[serde(default)]
    pub error: Option<String>,
}

/// The columns of the table and how wide each is; negative: to the left.
const COLUMNS: [(&str, i32); 14] = [
    ("kernel", -20),
    ("n", 6),
    ("rows", 8),
    ("type", 5),
    ("ms", 9),
    ("spread", 7),
    ("cold", 9),
    ("GB/s", 7),
    ("of copy", 7),
    ("TFLOP/s", 8),
    ("MHz", 5),
    ("of base", 7),
    ("measured by", -12),
    ("ran", 0),
];

fn line(cells: [String; COLUMNS.len()]) -> String {
    let pad = |(cell, (_, width)): (String, (&str, i32))| match width {
        w @ ..=0 => format!("{cell:<0$}", w.unsigned_abs() as usize),
        w => format!("{cell:>0$}", w as usize),
    };
    cells.into_iter().zip(COLUMNS).map(pad).collect::<Vec<_>>().join(" ").trim_end().to_string()
}

impl Row {
    /// The line of a case that was measured, or of one that could not be.
    pub fn new(case: &Case, dtype: DType, outcome: Result<&Measured, String>) -> Self {
        let timing = case.timing.as_ref();
        let mut row = Self {
            kernel: timing.map_or(case.op, |t| t.kernel).into(),
            n: timing.map_or(0, |t| t.n),
            rows: timing.map_or(0, |t| t.rows),
            dtype: dtype.to_string(),
            ms: None,
            p10_ms: None,
            p90_ms: None,
            cold_ms: None,
            gb_per_s: None,
            of_copy: None,
            tflop_per_s: None,
            sm_mhz: None,
            ran: None,
            measured_by: None,
            of_baseline: None,
            error: None,
        };
        match outcome {
            Err(e) => row.error = Some(e),
            Ok(m) => {
                let ms = m.hot.median();
                row.ms = Some(ms);
                row.p10_ms = Some(m.hot.percentile(10));
                row.p90_ms = Some(m.hot.percentile(90));
                row.cold_ms = m.cold_ms;
                row.gb_per_s = (m.bytes > 0.0).then(|| m.bytes / ms / 1e6);
                row.of_copy = m.copy_rate.map(|copy| m.bytes / ms / copy);
                row.tflop_per_s = (m.flops > 0.0).then(|| m.flops / ms / 1e9);
                row.sm_mhz = m.hot.clock_mhz;
                row.ran.clone_from(&m.ran);
                row.measured_by = Some(m.hot.how.into());
            }
        }
        row
    }

    /// The names of the columns.
    pub fn title() -> String {
        line(COLUMNS.map(|(name, _)| name.to_string()))
    }

    /// The line as text under [`Row::title`].
    pub fn text(&self) -> String {
        let number = |x: Option<f64>, digits: usize| x.map_or_else(String::new, |x| format!("{x:.digits$}"));
        let ms = |x: Option<f64>| number(x, if x.is_some_and(|x| x < 0.1) { 5 } else { 3 });
        let spread = match (self.ms, self.p10_ms, self.p90_ms) {
            (Some(ms), Some(low), Some(high)) => format!("{:.1}%", 100.0 * (high - low) / ms),
            _ => String::new(),
        };
        let last = match &self.error {
            Some(e) => format!("error: {e}"),
            None => self.measured_by.clone().unwrap_or_default(),
        };
        line([
            self.kernel.clone(),
            self.n.to_string(),
            self.rows.to_string(),
            self.dtype.clone(),
            ms(self.ms),
            spread,
            ms(self.cold_ms),
            number(self.gb_per_s, 0),
            number(self.of_copy, 2),
            number(self.tflop_per_s, if self.tflop_per_s.is_some_and(|x| x > 10.0) { 1 } else { 3 }),
            self.sm_mhz.map_or_else(String::new, |mhz| mhz.to_string()),
            number(self.of_baseline, 3),
            last,
            self.ran.clone().unwrap_or_default(),
        ])
    }
}

impl Record {
    /// Reads the JSON object of an earlier run.
    ///
    /// # Errors
    /// No such file, or another kind of file.
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
        let wrong = |e| Error::format(path, format!("expected what `spinquant bench --json` prints: {e}"));
        serde_json::from_str(&text).map_err(wrong)
    }

    /// How much longer a line takes than the same line here: 1 for as long.
    pub fn ratio(&self, row: &Row) -> Option<f64> {
        let same = |r: &&Row| (&r.kernel, r.n, r.rows, &r.dtype) == (&row.kernel, row.n, row.rows, &row.dtype);
        let before = self.rows.iter().find(same)?.ms?;
        row.ms.map(|ms| ms / before).filter(|ratio| ratio.is_finite())
    }

    /// The lines that take more than so many percent longer than in the run they were compared with.
    pub fn slower(&self, percent: f64) -> Vec<&Row> {
        self.rows.iter().filter(|r| r.of_baseline.is_some_and(|ratio| ratio > 1.0 + percent / 100.0)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Device;
    use crate::bench::{measure, one};

    fn record() -> Record {
        let (case, dtype) = one("add", Some(32), Some(4), None, &Device::Cpu).unwrap();
        let measured = measure(&case, dtype, &Device::Cpu).unwrap();
        let rows = vec![Row::new(&case, dtype, Ok(&measured)), Row::new(&case, DType::BF16, Err("no \"luck\"".into()))];
        Record { device: "here".into(), seconds: 1, rows, peak_bytes: Some(7) }
    }

    #[test]
    fn a_record_survives_its_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("record.json");
        let record = record();
        std::fs::write(&path, serde_json::to_string(&record).unwrap()).unwrap();
        assert_eq!(Record::read(&path).unwrap(), record);
        // As the first version wrote it.
        let old = r#"{"device":"NVIDIA H100 80GB HBM3","peak_bytes":null,"seconds":60,"rows":[
            {"kernel":"add","n":32,"rows":4,"dtype":"f32","ms":0.5,"measured_by":"events","gb_per_s":1.0,"of_copy":0.9,"tflop_per_s":null},
            {"kernel":"add","n":32,"rows":4,"dtype":"bf16","error":"left out: out of time"}]}"#;
        std::fs::write(&path, old).unwrap();
        let old = Record::read(&path).unwrap();
        let ratio = old.ratio(&record.rows[0]).unwrap();
        assert!((ratio - record.rows[0].ms.unwrap() / 0.5).abs() < 1e-12);
        assert_eq!(old.ratio(&record.rows[1]), None);
        std::fs::write(&path, "{}").unwrap();
        let e = Record::read(&path).unwrap_err().to_string();
        assert!(e.contains("record.json") && e.contains("--json"), "{e}");
        assert!(Record::read(&folder.path().join("absent")).is_err());
    }

    #[test]
    fn slower_lines_are_found() {
        let mut record = record();
        record.rows[0].of_baseline = Some(1.04);
        assert_eq!((record.slower(5.0).len(), record.slower(3.0).len()), (0, 1));
    }

    #[test]
    fn columns_line_up() {
        let record = record();
        let (title, text) = (Row::title(), record.rows[0].text());
        let end = |line: &str, what: &str| line.find(what).map(|at| at + what.len());
        assert_eq!(end(&title, "of copy"), Some(COLUMNS[..9].iter().map(|c| c.1.unsigned_abs() as usize + 1).sum::<usize>() - 1));
        assert_eq!(&text[title.find("measured by").unwrap()..], "wall clock");
        assert!(record.rows[1].text().ends_with("error: no \"luck\""));
    }
}
