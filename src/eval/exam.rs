//! An exam: several tasks, asked of a network together.
//!
//! ```
//! use std::ops::ControlFlow;
//! use spinquant::data::Bos;
//! use spinquant::eval::{answers::Answers, exam::Exam, tasks::{Question, Questions}};
//! use spinquant::{demo, quant::Scheme};
//!
//! let question = Question::new("the red fox sees", ["the blue door", "door blue the"], 0);
//! let task = Questions { name: "order".into(), task: None, questions: vec![question] };
//! let exam = Exam::new(vec![task], &demo::tokenizer()?, Bos::Auto, &demo::config()?)?;
//! let network = demo::model()?.merge(None, &Scheme::new(8, 8, 8))?;
//! let mut answers = Answers::new(exam.tasks());
//! exam.ask(&network, &mut answers, |_done| ControlFlow::Continue(()))?;
//! assert_eq!(answers.known(), 2); // one log-likelihood a candidate
//! println!("accuracy {:.2}", exam.report(&exam.marks(&answers)?).acc.mean);
//! # Ok::<(), spinquant::Error>(())
//! ```

use std::cmp::Reverse;
use std::ops::ControlFlow;

use serde_json::{Map, Value};

use super::answers::Answers;
use super::choices::{Request, log_likelihoods, requests};
use super::marks::{Marks, Mean, Scores};
use super::tasks::{Question, Questions, Task};
use super::tokens_at_once;
use crate::data::{self, Bos, Tokenizer};
use crate::llama::{LlamaConfig, Merged};
use crate::{Error, Result};

/// Tasks, encoded for a model.
#[derive(Clone, Debug)]
pub struct Exam {
    tasks: Vec<Questions>,
    bos: Bos,
    /// Those of every candidate of every question, one task after the other.
    requests: Vec<Request>,
}

/// How a network does on a task.
#[derive(Clone, Debug, PartialEq)]
pub struct TaskScores {
    /// The task's name.
    pub name: String,
    /// True where accuracy by characters is one of the task's metrics ([`Task::has_acc_norm`]; so it is with tasks of one's own).
    pub has_acc_norm: bool,
    /// Its scores.
    pub scores: Scores,
}

/// How a network does on all tasks.
#[derive(Clone, Debug, PartialEq)]
pub struct Report {
    /// Task by task.
    pub tasks: Vec<TaskScores>,
    /// Mean of the tasks' accuracies; every task weighs the same.
    pub acc: Mean,
    /// Mean of the tasks' accuracies by characters, and of the plain accuracies of tasks without.
    pub acc_norm: Mean,
    /// Mean of the tasks' log-likelihoods of the right answer, in nats a question.
    pub gold: Mean,
}

impl Exam {
    /// Encodes tasks for a model of this configuration: its context length, vocabulary, and the token that stands for an empty context.
    ///
    /// # Errors
    /// No task; two of one name; a question that cannot be encoded, with its task and number; a token outside the vocabulary.
    pub fn new(tasks: Vec<Questions>, tokenizer: &Tokenizer, bos: Bos, config: &LlamaConfig) -> Result<Self> {
        check_names(&tasks)?;
        let mut all = vec![];
        for task in &tasks {
            let at = |e: Error| Error::argument(format!("task {}", task.name), e);
            let (empty, length) = (config.bos_token_id, config.max_position_embeddings);
            all.extend(requests(tokenizer, &task.questions, bos, empty, length).map_err(at)?);
        }
        let largest = all.iter().flat_map(|r| &r.tokens).copied().max().unwrap_or(0);
        if largest as usize >= config.vocab_size {
            let message = format!("token {largest} of the tasks is outside the model's vocabulary of {}", config.vocab_size);
            return Err(Error::argument("tokenizer", message));
        }
        Ok(Self { tasks, bos, requests: all })
    }

    /// The tasks.
    pub fn tasks(&self) -> &[Questions] {
        &self.tasks
    }

    /// The requests of every candidate of every question, one task after the other.
    pub fn requests(&self) -> &[Request] {
        &self.requests
    }

    /// What is asked, for the record of a run that another one may continue ([`Answers::resume`]): the tasks, by their tokens.
    pub fn record(&self) -> Map<String, Value> {
        let mut record = Map::from_iter([("bos".to_string(), self.bos.to_string().into())]);
        let mut rest = &self.requests[..];
        for task in &self.tasks {
            let (now, later) = rest.split_at(task.questions.iter().map(Question::candidates).sum());
            rest = later;
            let numbers =
                now.iter().flat_map(|r| [r.tokens.len() as u32, r.continuation as u32].into_iter().chain(r.tokens.clone()));
            let checksum = data::checksum(numbers.flat_map(u32::to_le_bytes));
            record.insert(format!("task {}", task.name), format!("{} questions, {checksum}", task.questions.len()).into());
        }
        record
    }

    /// Who is asked, for the same record: the quantised weights, how activations are quantised, type and device.
    ///
    /// # Errors
    /// Weights that cannot be copied from their device.
    pub fn record_of(model: &Merged) -> Result<Map<String, Value>> {
        let scheme = serde_json::to_value(model.scheme).map_err(|e| Error::argument("scheme", e))?;
        let scheme = scheme.as_object().into_iter().flatten().map(|(name, value)| (format!("scheme.{name}"), value.clone()));
        let (device, dtype) = (model.embedding.device().to_string(), model.embedding.dtype().to_string());
        let rest = [("device".to_string(), device), ("dtype".to_string(), dtype), ("weights".to_string(), model.sha256()?)];
        Ok(scheme.chain(rest.map(|(name, value)| (name, value.into()))).collect())
    }

    /// Asks a network what `answers` does not hold yet. `progress` is told how many candidates are scored, and may stop.
    ///
    /// Questions of similar length go through the network together, and are kept together: a run that continues an interrupted one
    /// puts the same requests through the network at once, and comes to the same bits.
    ///
    /// # Errors
    /// Answers to other tasks; those of [`log_likelihoods`] and [`Answers::keep`]; [`Error::Interrupted`] with the number of candidates
    /// where `progress` breaks before the end.
    pub fn ask(&self, model: &Merged, answers: &mut Answers, mut progress: impl FnMut(usize) -> ControlFlow<()>) -> Result<()> {
        if answers.candidates() != self.requests.len() {
            let message = format!("expected those of {} candidates, got {}", self.requests.len(), answers.candidates());
            return Err(Error::argument("answers", message));
        }
        for part in self.parts(answers, tokens_at_once(&model.embedding.device())) {
            if part.iter().all(|q| answers.has(*q)) {
                continue;
            }
            let asked: Vec<Request> = part.iter().flat_map(|q| &self.requests[answers.places(*q)]).cloned().collect();
            let mut known = vec![None; asked.len()];
            let before = answers.known();
            let outcome = log_likelihoods(model, &asked, &mut known, |done| progress(before + done));
            // The pass behind which it stops may be the last one of the part.
            if let Some(values) = known.into_iter().collect::<Option<Vec<f64>>>() {
                answers.keep(&part, &values)?;
            }
            match outcome {
                Err(Error::Interrupted { .. }) if answers.known() == answers.candidates() => {}
                Err(Error::Interrupted { .. }) => return Err(Error::Interrupted { step: answers.known() }),
                outcome => outcome?,
            }
        }
        Ok(())
    }

    /// Questions that are asked together, the longest first: as many as the network reads at once, tokens that candidates of a question
    /// have in common counted once.
    fn parts(&self, answers: &Answers, tokens_at_once: usize) -> Vec<Vec<usize>> {
        let longest = |q: usize| self.requests[answers.places(q)].iter().map(|r| r.tokens.len()).max();
        let tokens = |q: usize| -> usize {
            let all = &self.requests[answers.places(q)];
            let common = |a: &Request, b: &Request| a.tokens.iter().zip(&b.tokens).take_while(|(a, b)| a == b).count();
            all.iter().map(|r| r.tokens.len() - if std::ptr::eq(r, &all[0]) { 0 } else { common(r, &all[0]) }).sum()
        };
        let mut order: Vec<usize> = (0..answers.questions()).collect();
        order.sort_by_key(|q| (Reverse(longest(*q)), *q));
        let (mut parts, mut part, mut sum) = (vec![], vec![], 0);
        for question in order {
            let more = tokens(question);
            if !part.is_empty() && sum + more > tokens_at_once {
                parts.push(std::mem::take(&mut part));
                sum = 0;
            }
            part.push(question);
            sum += more;
        }
        parts.extend((!part.is_empty()).then_some(part));
        parts
    }

    /// The marks of every task.
    ///
    /// # Errors
    /// An answer that is missing; those of [`Marks::of`].
    pub fn marks(&self, answers: &Answers) -> Result<Vec<Marks>> {
        self.tasks.iter().enumerate().map(|(i, task)| Marks::of(&task.questions, &answers.of_task(i)?)).collect()
    }

    /// Asks a network everything and marks the answers.
    ///
    /// # Errors
    /// Those of [`Exam::ask`] and [`Exam::marks`].
    pub fn take(&self, model: &Merged, progress: impl FnMut(usize) -> ControlFlow<()>) -> Result<Vec<Marks>> {
        let mut answers = Answers::new(&self.tasks);
        self.ask(model, &mut answers, progress)?;
        self.marks(&answers)
    }

    /// Means with standard errors, of marks (or of differences of marks) of every task.
    pub fn report(&self, marks: &[Marks]) -> Report {
        let task = |(task, marks): (&Questions, &Marks)| TaskScores {
            name: task.name.clone(),
            has_acc_norm: task.task.is_none_or(Task::has_acc_norm),
            scores: marks.scores(),
        };
        let tasks: Vec<TaskScores> = self.tasks.iter().zip(marks).map(task).collect();
        let over = |of: fn(&TaskScores) -> Mean| Mean::over(&tasks.iter().map(of).collect::<Vec<_>>());
        let acc = over(|t| t.scores.acc);
        let acc_norm = over(|t| if t.has_acc_norm { t.scores.acc_norm } else { t.scores.acc });
        let gold = over(|t| t.scores.gold);
        Report { tasks, acc, acc_norm, gold }
    }
}

/// Checks that there are tasks, every one once.
///
/// # Errors
/// No task, or two of one name.
pub fn check_names(tasks: &[Questions]) -> Result<()> {
    if tasks.is_empty() {
        return Err(Error::argument("tasks", "expected at least one, got none"));
    }
    match tasks.iter().enumerate().find(|(i, t)| tasks[..*i].iter().any(|other| other.name == t.name)) {
        Some((_, twice)) => Err(Error::argument("tasks", format!("expected every task once, got {} twice", twice.name))),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::demo;
    use crate::quant::Scheme;

    /// Questions of many lengths, made of the demo's text.
    fn exam() -> Exam {
        let words: Vec<&str> = demo::TEST.split(' ').take(4000).collect();
        let question = |i: usize, n: usize| {
            let context = words[i * 37 % 3000..][..5 + i * 3 % 60].join(" ");
            Question::new(context, (0..n).map(|c| words[(i * 11 + c * 400) % 3000..][..1 + (i + c) % 7].join(" ")), i % n)
        };
        let task = |name: &str, n: usize, task| Questions {
            name: name.into(),
            task,
            questions: (0..240).map(|i| question(i, n)).collect(),
        };
        let tasks = vec![task("boolq", 2, Some(Task::BoolQ)), task("mine", 4, None)];
        Exam::new(tasks, &demo::tokenizer().unwrap(), Bos::Auto, &demo::config().unwrap()).unwrap()
    }

    #[test]
    fn a_continued_exam_comes_to_the_same_bits() {
        let (exam, dir) = (exam(), tempfile::tempdir().unwrap());
        let model = demo::model().unwrap().merge(None, &Scheme::new(4, 4, 4)).unwrap();
        let want = exam.take(&model, |_| ControlFlow::Continue(())).unwrap();
        let mut whole = Answers::new(exam.tasks());
        exam.ask(&model, &mut whole, |_| ControlFlow::Continue(())).unwrap();
        assert!(exam.parts(&whole, 4096).len() > 2, "one part cannot be continued");
        let path = dir.path().join("answers.jsonl");
        let (mut stops, mut known) = (0, 0);
        loop {
            // A new process each time, which is stopped after one pass.
            let mut answers = Answers::resume(exam.tasks(), &path, &exam.record()).unwrap();
            assert_eq!(answers.known(), known);
            let outcome = exam.ask(&model, &mut answers, |_| ControlFlow::Break(()));
            known = answers.known();
            match outcome {
                Err(Error::Interrupted { step }) => assert_eq!(step, known),
                outcome => {
                    outcome.unwrap();
                    assert_eq!(exam.marks(&answers).unwrap(), want);
                    for task in 0..2 {
                        assert_eq!(answers.of_task(task).unwrap(), whole.of_task(task).unwrap());
                    }
                    break;
                }
            }
            stops += 1;
            assert!(stops < 100, "no progress");
        }
        assert!(stops > 1);
    }

    #[test]
    fn means_of_tasks_weigh_the_same() {
        let exam = exam();
        let marks = |x: f64| Marks { acc: vec![x; 240], acc_norm: vec![x + 0.5; 240], gold: vec![-x; 240] };
        let report = exam.report(&[marks(0.25), marks(0.5)]);
        // BoolQ has no accuracy by characters: the plain one stands for it.
        assert_eq!((report.acc.mean, report.acc_norm.mean, report.gold.mean), (0.375, (0.25 + 1.0) / 2.0, -0.375));
        assert_eq!(report.tasks.iter().map(|t| t.has_acc_norm).collect::<Vec<_>>(), [false, true]);
    }

    #[test]
    fn tasks_that_cannot_be_asked() {
        let (tokenizer, config) = (demo::tokenizer().unwrap(), demo::config().unwrap());
        let task = |name: &str, choice: &str| Questions {
            name: name.into(),
            task: None,
            questions: vec![Question::new("the fox", ["sees", choice], 0)],
        };
        let fails = |tasks: Vec<Questions>, config: &LlamaConfig| {
            Exam::new(tasks, &tokenizer, Bos::Auto, config).unwrap_err().to_string()
        };
        assert!(fails(vec![], &config).contains("at least one, got none"));
        assert!(fails(vec![task("a", "door"), task("a", "door")], &config).contains("got a twice"));
        let long = "door ".repeat(config.max_position_embeddings + 1);
        let error = fails(vec![task("a", "door"), task("b", &long)], &config);
        assert!(error.contains("task b: question 0: choice: expected at most"), "{error}");
        let small = LlamaConfig { vocab_size: 3, ..config };
        assert!(fails(vec![task("a", "door")], &small).contains("outside the model's vocabulary of 3"));
    }
}
