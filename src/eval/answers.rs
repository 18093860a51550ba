//! Answers to questions, in memory or in a file that outlives its program: an interrupted run goes on from it.
//!
//! The file holds one JSON object a line. The first says what was asked of what: `{"answers": 1, "run": {…}}`, 1 being the version of the
//! format. Every other line is `{"log_likelihoods": [[TASK, QUESTION, [one a candidate]], …]}`, questions counted from 0, and belongs to
//! requests that went through the network together. A line is written whole and reaches the disk before the next ones are asked.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::tasks::Questions;
use crate::{Error, Result};

const VERSION: u64 = 1;

/// The log-likelihoods of every candidate of every question of some tasks, as far as they are known.
#[derive(Debug)]
pub struct Answers {
    tasks: Vec<String>,
    /// Of every question of all tasks, one task after the other: its task, its number there, and the places of its candidates.
    questions: Vec<(usize, usize, Range<usize>)>,
    known: Vec<Option<f64>>,
    file: Option<(PathBuf, File)>,
}

impl Answers {
    /// None yet, kept in memory.
    pub fn new(tasks: &[Questions]) -> Self {
        let (mut questions, mut end) = (vec![], 0);
        for (t, task) in tasks.iter().enumerate() {
            for (i, question) in task.questions.iter().enumerate() {
                let start = end;
                end += question.candidates();
                questions.push((t, i, start..end));
            }
        }
        let tasks = tasks.iter().map(|t| t.name.clone()).collect();
        Self { tasks, questions, known: vec![None; end], file: None }
    }

    /// None yet, kept in a new file. `run` is what must agree for another run to go on with it.
    ///
    /// # Errors
    /// A file that is there already; whatever the file system says.
    pub fn create(tasks: &[Questions], path: &Path, run: &Map<String, Value>) -> Result<Self> {
        let mut file = OpenOptions::new().write(true).create_new(true).open(path).map_err(Error::io(path))?;
        lock(&file, path)?;
        write_line(&mut file, &json!({ "answers": VERSION, "run": run })).map_err(Error::io(path))?;
        Ok(Self { file: Some((path.into(), file)), ..Self::new(tasks) })
    }

    /// Those of a file, which further ones go into; half a line at its end, left by a run that was killed, is removed. A new file where
    /// there is none.
    ///
    /// # Errors
    /// A file that is none of answers, or of another run: the first difference is named; one that another process writes; a damaged
    /// line, which is named; whatever the file system says.
    pub fn resume(tasks: &[Questions], path: &Path, run: &Map<String, Value>) -> Result<Self> {
        if !path.exists() {
            return Self::create(tasks, path, run);
        }
        let mut file = OpenOptions::new().read(true).write(true).open(path).map_err(Error::io(path))?;
        lock(&file, path)?;
        let mut bytes = vec![];
        file.read_to_end(&mut bytes).map_err(Error::io(path))?;
        let whole = bytes.iter().rposition(|b| *b == b'\n').map_or(0, |i| i + 1);
        let text = str::from_utf8(&bytes[..whole]).map_err(|_| Error::format(path, "expected lines of JSON, got other bytes"))?;
        let saved = header(text, path)?;
        check(&saved, run, path)?;
        if let Some((name, value)) = saved.iter().find(|(name, _)| !run.contains_key(*name)) {
            return Err(differs(path, name, value, &Value::Null));
        }
        let mut answers = Self::new(tasks);
        for (number, line) in text.lines().enumerate().skip(1) {
            answers.read_line(line).map_err(|message| Error::format(path, format!("line {}: {message}", number + 1)))?;
        }
        let end = file.set_len(whole as u64).and_then(|()| file.seek(SeekFrom::End(0)));
        end.map_err(Error::io(path))?;
        Ok(Self { file: Some((path.into(), file)), ..answers })
    }

    /// Checks that a file of answers, if it is there, was written by a run that agrees with `run` in all that `run` holds; it may hold
    /// less than the whole. Finds a mistake before the model is loaded.
    ///
    /// # Errors
    /// A file that is none of answers, or of another run.
    pub fn check(path: &Path, run: &Map<String, Value>) -> Result<()> {
        if !path.exists() {
            return Ok(());
        }
        let bytes = std::fs::read(path).map_err(Error::io(path))?;
        let first = bytes.split_inclusive(|b| *b == b'\n').next().unwrap_or_default();
        check(&header(&String::from_utf8_lossy(first), path)?, run, path)
    }

    /// Number of questions of all tasks.
    pub fn questions(&self) -> usize {
        self.questions.len()
    }

    /// Number of log-likelihoods that are known.
    pub fn known(&self) -> usize {
        self.known.iter().flatten().count()
    }

    /// Number of candidates of all questions.
    pub fn candidates(&self) -> usize {
        self.known.len()
    }

    /// The places of a question's candidates among those of all questions.
    ///
    /// # Panics
    /// When there is no such question.
    pub fn places(&self, question: usize) -> Range<usize> {
        self.questions[question].2.clone()
    }

    /// True where the log-likelihoods of a question are known.
    ///
    /// # Panics
    /// When there is no such question.
    pub fn has(&self, question: usize) -> bool {
        self.known[self.places(question)].iter().all(Option::is_some)
    }

    /// The log-likelihoods of all candidates of a task's questions.
    ///
    /// # Errors
    /// One of them is not known yet.
    pub fn of_task(&self, task: usize) -> Result<Vec<f64>> {
        let places = self.questions.iter().filter(|(t, ..)| *t == task).flat_map(|(.., places)| places.clone());
        let known: Option<Vec<f64>> = places.map(|place| self.known[place]).collect();
        known.ok_or_else(|| {
            Error::argument("answers", format!("expected those of all questions of {}, some are missing", self.tasks[task]))
        })
    }

    /// Keeps the log-likelihoods of questions, all their candidates one after the other.
    ///
    /// # Errors
    /// Another number of log-likelihoods than of candidates; a file that cannot be written.
    ///
    /// # Panics
    /// When there is no such question.
    pub fn keep(&mut self, questions: &[usize], values: &[f64]) -> Result<()> {
        let places: Vec<usize> = questions.iter().flat_map(|q| self.places(*q)).collect();
        if places.len() != values.len() {
            let message = format!("expected one for each of {} candidates, got {}", places.len(), values.len());
            return Err(Error::argument("log-likelihoods", message));
        }
        places.into_iter().zip(values).for_each(|(place, value)| self.known[place] = Some(*value));
        let line = |q: &usize| {
            let (task, number, places) = &self.questions[*q];
            json!([self.tasks[*task], number, self.known[places.clone()]])
        };
        let line = json!({ "log_likelihoods": questions.iter().map(line).collect::<Vec<_>>() });
        match &mut self.file {
            Some((path, file)) => write_line(file, &line).map_err(Error::io(path)),
            None => Ok(()),
        }
    }

    fn read_line(&mut self, line: &str) -> Result<(), String> {
        let wrong = |e: serde_json::Error| format!("expected log-likelihoods of questions: {e}");
        let mut object: HashMap<String, Vec<(String, usize, Vec<f64>)>> = serde_json::from_str(line).map_err(wrong)?;
        let all = object.remove("log_likelihoods").ok_or("expected log_likelihoods")?;
        for (name, number, values) in all {
            let task = self.tasks.iter().position(|task| *task == name).ok_or_else(|| format!("no task {name:?} was asked"))?;
            let first = self.questions.partition_point(|(t, ..)| *t < task);
            let question = self.questions.get(first.saturating_add(number)).filter(|(t, ..)| *t == task);
            let places = question.ok_or_else(|| format!("{name} has no question {number}"))?.2.clone();
            if places.len() != values.len() {
                let (expected, got) = (places.len(), values.len());
                return Err(format!("question {number} of {name}: expected {expected} log-likelihoods, got {got}"));
            }
            places.zip(values).for_each(|(place, value)| self.known[place] = Some(value));
        }
        Ok(())
    }
}

fn lock(file: &File, path: &Path) -> Result<()> {
    match file.try_lock() {
        Err(std::fs::TryLockError::WouldBlock) => Err(Error::format(path, "another process is writing it")),
        // Where files cannot be locked, nobody can be kept out.
        _ => Ok(()),
    }
}

fn write_line(file: &mut File, line: &Value) -> std::io::Result<()> {
    file.write_all(format!("{line}\n").as_bytes())?;
    file.sync_data()
}

/// What the first line says of the run.
fn header(text: &str, path: &Path) -> Result<Map<String, Value>> {
    let first: Value = text.lines().next().and_then(|line| serde_json::from_str(line).ok()).unwrap_or(Value::Null);
    match (first["answers"].as_u64(), first["run"].as_object()) {
        (Some(VERSION), Some(run)) => Ok(run.clone()),
        (Some(version), _) if version != VERSION => {
            Err(Error::format(path, format!("expected answers in the format of version {VERSION}, got version {version}")))
        }
        _ => Err(Error::format(path, "expected a file of answers, got something else; name another file")),
    }
}

fn check(saved: &Map<String, Value>, ours: &Map<String, Value>, path: &Path) -> Result<()> {
    match ours.iter().find(|(name, value)| saved.get(*name) != Some(value)) {
        Some((name, value)) => Err(differs(path, name, saved.get(name).unwrap_or(&Value::Null), value)),
        None => Ok(()),
    }
}

fn differs(path: &Path, name: &str, saved: &Value, ours: &Value) -> Error {
    Error::format(path, format!("answers of another run: {name} was {saved}, now {ours}; name another file or change back"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::tasks::Question;

    fn tasks() -> Vec<Questions> {
        let of = |name: &str, n: usize, choices: &[&str]| Questions {
            name: name.into(),
            task: None,
            questions: (0..n).map(|i| Question::new(format!("c{i}"), choices.iter().copied(), 0)).collect(),
        };
        vec![of("a", 3, &["x", "y"]), of("b", 2, &["x", "y", "z"])]
    }

    fn run() -> Map<String, Value> {
        json!({"scheme": "W4", "tasks": 2}).as_object().unwrap().clone()
    }

    #[test]
    fn a_file_holds_what_was_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("answers.jsonl");
        let mut answers = Answers::resume(&tasks(), &path, &run()).unwrap();
        assert_eq!((answers.questions(), answers.candidates(), answers.known()), (5, 12, 0));
        // Values that need every digit.
        answers.keep(&[4, 1], &[-0.1, -1.0 / 3.0, -1e-300, -5.0, -6.0]).unwrap();
        let error = Answers::resume(&tasks(), &path, &run()).unwrap_err().to_string();
        assert!(error.contains("another process is writing it"), "{error}");
        drop(answers);
        let whole = std::fs::read(&path).unwrap();
        // Half a line at the end goes; what comes next is whole again.
        std::fs::write(&path, [&whole[..], b"{\"log_likel"].concat()).unwrap();
        let mut answers = Answers::resume(&tasks(), &path, &run()).unwrap();
        assert_eq!((answers.known(), answers.has(4), answers.has(1), answers.has(0)), (5, true, true, false));
        assert_eq!(std::fs::read(&path).unwrap(), whole);
        assert!(answers.of_task(0).unwrap_err().to_string().contains("all questions of a"));
        answers.keep(&[0, 2, 3], &[-1.0, -2.0, -3.0, -4.0, -7.0, -8.0, -9.0]).unwrap();
        assert_eq!(answers.of_task(0).unwrap(), [-1.0, -2.0, -5.0, -6.0, -3.0, -4.0]);
        drop(answers);
        let answers = Answers::resume(&tasks(), &path, &run()).unwrap();
        assert_eq!(answers.of_task(1).unwrap(), [-7.0, -8.0, -9.0, -0.1, -1.0 / 3.0, -1e-300]);
        assert!(Answers::create(&tasks(), &path, &run()).is_err(), "it is there");
    }

    #[test]
    fn another_file_is_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("answers.jsonl");
        drop(Answers::create(&tasks(), &path, &run()).unwrap());
        let first = std::fs::read_to_string(&path).unwrap();
        let refused = |text: &str, run: &Map<String, Value>, message: &str| {
            std::fs::write(&path, text).unwrap();
            let error = Answers::resume(&tasks(), &path, run).unwrap_err().to_string();
            assert!(error.contains(message) && error.contains("answers.jsonl"), "{error}");
            assert_eq!(std::fs::read_to_string(&path).unwrap(), text, "it stays as it is");
        };
        let mut other = run();
        other["scheme"] = "W16".into();
        refused(&first, &other, "scheme was \"W4\", now \"W16\"");
        assert!(Answers::check(&path, &other).is_err() && Answers::check(&path, &run()).is_ok());
        let part = json!({"tasks": 2}).as_object().unwrap().clone();
        assert!(Answers::check(&path, &part).is_ok() && Answers::check(&dir.path().join("absent"), &other).is_ok());
        refused(&first, &part, "scheme was \"W4\", now null");
        for text in ["", "{\"log_likelihoods\": []}\n", "a picture\n", "{\"answers\": 1}\n"] {
            refused(text, &run(), "expected a file of answers");
        }
        refused(&first.replace("\"answers\":1", "\"answers\":2"), &run(), "version 1, got version 2");
        for (line, message) in [
            ("{}", "line 2: expected log_likelihoods"),
            ("[1]", "line 2: expected log-likelihoods of questions"),
            (r#"{"log_likelihoods": [["c", 0, [-1, -2]]]}"#, "line 2: no task \"c\""),
            (r#"{"log_likelihoods": [["a", 3, [-1, -2]]]}"#, "line 2: a has no question 3"),
            (r#"{"log_likelihoods": [["a", 2, [-1, -2, -3]]]}"#, "question 2 of a: expected 2 log-likelihoods, got 3"),
            (r#"{"log_likelihoods": [["a", 2, [-1, null]]]}"#, "line 2: expected log-likelihoods of questions"),
        ] {
            refused(&format!("{first}{line}\n"), &run(), message);
        }
    }
}
