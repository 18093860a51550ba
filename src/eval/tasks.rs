//! Multiple-choice tasks: their questions, and the readers of the files in which they are published.
//!
//! Prompts and splitting are those of lm-evaluation-harness 0.4.13 (`lm_eval/tasks/*`): zero-shot, one space between a context and a
//! choice.

use std::path::Path;
use std::str::FromStr;

use serde_json::Value;

use crate::{Error, Result};

/// One question: the likelihood of each candidate answer is compared.
///
/// Either one context and several choices, or one context a candidate and one choice that follows all of them (WinoGrande).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// The text before the choice: one, or one a candidate.
    pub contexts: Vec<String>,
    /// The text to score: one a candidate, or one.
    pub choices: Vec<String>,
    /// The right candidate, from 0.
    pub gold: usize,
}

impl Question {
    /// One context and several choices.
    pub fn new(context: impl Into<String>, choices: impl IntoIterator<Item = impl Into<String>>, gold: usize) -> Self {
        Self { contexts: vec![context.into()], choices: choices.into_iter().map(Into::into).collect(), gold }
    }

    /// Number of candidate answers.
    pub fn candidates(&self) -> usize {
        self.contexts.len().max(self.choices.len())
    }

    /// Context and choice of candidate `i`.
    ///
    /// # Panics
    /// When `i` is not below [`candidates`](Self::candidates), or there is no context or no choice.
    pub fn candidate(&self, i: usize) -> (&str, &str) {
        assert!(i < self.candidates(), "candidate {i} of {}", self.candidates());
        (&self.contexts[i.min(self.contexts.len() - 1)], &self.choices[i.min(self.choices.len() - 1)])
    }

    /// Checks what the fields promise.
    ///
    /// # Errors
    /// Fewer than two candidates, several contexts beside several choices, an empty choice, or a gold answer that is none of them.
    pub fn check(&self) -> Result<()> {
        let bad = |message: String| Err(Error::argument("question", message));
        let (contexts, choices) = (self.contexts.len(), self.choices.len());
        if contexts == 0 || choices == 0 || self.candidates() < 2 {
            return bad(format!("expected at least two candidates, got {contexts} contexts and {choices} choices"));
        }
        if contexts > 1 && choices > 1 {
            return bad(format!("expected one context or one choice, got {contexts} contexts and {choices} choices"));
        }
        if let Some(i) = self.choices.iter().position(String::is_empty) {
            return bad(format!("expected text in every choice, but choice {i} is empty"));
        }
        if self.gold >= self.candidates() {
            return bad(format!("expected a gold answer below {}, got {}", self.candidates(), self.gold));
        }
        Ok(())
    }
}

/// The eight tasks of the paper's tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Task {
    /// BoolQ (Clark et al. 2019): yes or no about a passage.
    BoolQ,
    /// PIQA (Bisk et al. 2020): two ways to reach a goal.
    Piqa,
    /// Social IQa (Sap et al. 2019).
    SocialIqa,
    /// HellaSwag (Zellers et al. 2019): four endings.
    HellaSwag,
    /// WinoGrande (Sakaguchi et al. 2020): two names for a gap; the text behind the gap is scored.
    WinoGrande,
    /// ARC, the easy questions (Clark et al. 2018).
    ArcEasy,
    /// ARC, the others.
    ArcChallenge,
    /// OpenBookQA (Mihaylov et al. 2018).
    OpenBookQa,
}

impl Task {
    /// Every task, in the order of the paper's tables.
    pub const ALL: [Self; 8] = [
        Self::BoolQ,
        Self::Piqa,
        Self::SocialIqa,
        Self::HellaSwag,
        Self::WinoGrande,
        Self::ArcEasy,
        Self::ArcChallenge,
        Self::OpenBookQa,
    ];

    /// The name that lm-evaluation-harness gives it.
    pub fn name(self) -> &'static str {
        match self {
            Self::BoolQ => "boolq",
            Self::Piqa => "piqa",
            Self::SocialIqa => "social_iqa",
            Self::HellaSwag => "hellaswag",
            Self::WinoGrande => "winogrande",
            Self::ArcEasy => "arc_easy",
            Self::ArcChallenge => "arc_challenge",
            Self::OpenBookQa => "openbookqa",
        }
    }

    /// True where the harness also reports the accuracy of likelihoods divided by the length of the choice in characters.
    pub fn has_acc_norm(self) -> bool {
        !matches!(self, Self::BoolQ | Self::SocialIqa | Self::WinoGrande)
    }

    /// The name of the file with one label a line that belongs to a release file of this task, where labels are not in it.
    fn labels(self, file: &str) -> Option<String> {
        let stem = file.strip_suffix(".jsonl")?;
        matches!(self, Self::Piqa | Self::SocialIqa).then(|| format!("{stem}-labels.lst"))
    }

    /// A question of an object of the task's release file. `label` is the line of the labels' file, where there is one.
    fn question(self, object: &Value, label: Option<&str>) -> Result<Question, String> {
        let text = |key: &str| field(object, key)?.as_str().ok_or_else(|| format!("{key}: expected text, got {}", object[key]));
        let labelled = |first: usize, count: usize| -> Result<usize, String> {
            let label = label.ok_or("expected a file with one label a line beside this one")?;
            let number = label.trim().parse::<usize>().ok().and_then(|n| n.checked_sub(first)).filter(|n| *n < count);
            number.ok_or_else(|| format!("expected a label from {first} to {}, got {label:?}", first + count - 1))
        };
        Ok(match self {
            Self::BoolQ => {
                let answer = object.get("answer").or_else(|| object.get("label"));
                let yes = match answer {
                    Some(Value::Bool(yes)) => *yes,
                    Some(Value::Number(n)) if n.as_u64().is_some_and(|n| n < 2) => n.as_u64() == Some(1),
                    other => return Err(format!("answer: expected true or false, got {}", shown(other))),
                };
                let context = format!("{}\nQuestion: {}?\nAnswer:", text("passage")?, text("question")?);
                Question::new(context, ["no", "yes"], usize::from(yes))
            }
            Self::Piqa => {
                let context = format!("Question: {}\nAnswer:", text("goal")?);
                Question::new(context, [text("sol1")?, text("sol2")?], labelled(0, 2)?)
            }
            Self::SocialIqa => {
                let context = format!("Q: {} {}\nA:", text("context")?, text("question")?);
                Question::new(context, [text("answerA")?, text("answerB")?, text("answerC")?], labelled(1, 3)?)
            }
            Self::HellaSwag => {
                let scene = format!("{} {}", text("ctx_a")?, capitalize(text("ctx_b")?));
                let endings = texts(object, "endings")?;
                let gold = match &object["label"] {
                    Value::String(s) => s.parse().map_err(|_| format!("label: expected a number, got {s:?}"))?,
                    other => other.as_u64().ok_or_else(|| format!("label: expected a number, got {other}"))? as usize,
                };
                let context = clean(&format!("{}: {scene}", text("activity_label")?));
                Question::new(context, endings.iter().map(|e| clean(e)), gold)
            }
            Self::WinoGrande => {
                let sentence = text("sentence")?;
                let (before, after) =
                    sentence.split_once('_').ok_or_else(|| format!("sentence: expected a gap (_), got {sentence:?}"))?;
                let gold = match text("answer")? {
                    "1" => 0,
                    "2" => 1,
                    other => return Err(format!("answer: expected \"1\" or \"2\", got {other:?}")),
                };
                let contexts = [text("option1")?, text("option2")?].map(|option| format!("{before}{option}"));
                Question { contexts: contexts.into(), choices: vec![after.trim().into()], gold }
            }
            Self::ArcEasy | Self::ArcChallenge | Self::OpenBookQa => {
                let question = field(object, "question")?;
                let stem = question["stem"].as_str().ok_or("question.stem: expected text")?;
                let choices = question["choices"].as_array().ok_or("question.choices: expected an array")?;
                let of = |choice: &Value, key: &str| -> Result<String, String> {
                    choice[key].as_str().map(str::to_string).ok_or_else(|| format!("question.choices.{key}: expected text"))
                };
                let labels = choices.iter().map(|c| of(c, "label")).collect::<Result<Vec<_>, _>>()?;
                let answer = text("answerKey")?;
                let gold = labels.iter().position(|label| label == answer);
                let gold = gold.ok_or_else(|| format!("answerKey: expected one of {labels:?}, got {answer:?}"))?;
                let texts = choices.iter().map(|c| of(c, "text")).collect::<Result<Vec<_>, _>>()?;
                let context = if self == Self::OpenBookQa { stem.to_string() } else { format!("Question: {stem}\nAnswer:") };
                Question::new(context, texts, gold)
            }
        })
    }

    /// The task whose release file holds objects like this one; OpenBookQA and ARC, whose objects look the same, by the file's path.
    fn detect(object: &Value, path: &Path) -> Option<Self> {
        let has = |keys: &[&str]| keys.iter().all(|key| object.get(key).is_some());
        let named = || {
            let path = path.to_string_lossy().to_ascii_lowercase();
            Self::from_str(path.rsplit(['/', '\\']).next()?.trim_end_matches(".jsonl")).ok().or_else(|| {
                let is = |part: &str| path.contains(part);
                match () {
                    () if is("arc") && is("challenge") => Some(Self::ArcChallenge),
                    () if is("arc") && is("easy") => Some(Self::ArcEasy),
                    () if is("openbook") || is("obqa") => Some(Self::OpenBookQa),
                    () => None,
                }
            })
        };
        match () {
            () if has(&["passage", "question"]) => Some(Self::BoolQ),
            () if has(&["goal", "sol1", "sol2"]) => Some(Self::Piqa),
            () if has(&["context", "question", "answerA", "answerB", "answerC"]) => Some(Self::SocialIqa),
            () if has(&["activity_label", "ctx_a", "ctx_b", "endings"]) => Some(Self::HellaSwag),
            () if has(&["sentence", "option1", "option2"]) => Some(Self::WinoGrande),
            () if has(&["question", "answerKey"]) => named(),
            () => None,
        }
    }
}

impl FromStr for Task {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        let plain = |s: &str| s.to_ascii_lowercase().replace(['-', '_', ' '], "");
        let other =
            [("siqa", Self::SocialIqa), ("arce", Self::ArcEasy), ("arcc", Self::ArcChallenge), ("obqa", Self::OpenBookQa)];
        let all = Self::ALL.into_iter().map(|t| (t.name(), t)).chain(other);
        all.into_iter().find(|(name, _)| plain(name) == plain(s)).map(|(_, task)| task).ok_or_else(|| {
            Error::argument("task", format!("expected one of {}, got {s:?}", Self::ALL.map(Self::name).join(", ")))
        })
    }
}

/// The questions of one file.
#[derive(Clone, Debug)]
pub struct Questions {
    /// The task's name, or the file's where it is none of [`Task::ALL`].
    pub name: String,
    /// The task, where it is one of the eight.
    pub task: Option<Task>,
    /// The questions, in the file's order.
    pub questions: Vec<Question>,
}

impl Questions {
    /// Reads one file: a task's release file (the labels of PIQA and Social IQa from the `…-labels.lst` beside it), or the schema
    /// `{"context": text | [text per candidate], "choices": [text, …], "gold": number}`, one JSON object a line.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Format`] with file and line of the first object that is neither, or whose fields contradict each other.
    pub fn read(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let text = crate::data::read_text(path)?;
        let file = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        let mut objects = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()).peekable();
        let at = |line: usize, message: String| Error::format(path, format!("line {}: {message}", line + 1));
        let Some(&(line, first)) = objects.peek() else {
            return Err(Error::format(path, "expected one JSON object a line, got an empty file"));
        };
        let first = parse(first).map_err(|message| at(line, message))?;
        let schema = first.get("choices").is_some() && first.get("gold").is_some();
        let stem = file.trim_end_matches(".jsonl");
        let task = if schema { Task::from_str(stem).ok() } else { Task::detect(&first, path) };
        if !schema && task.is_none() {
            let keys: Vec<_> = first.as_object().map(|o| o.keys().cloned().collect()).unwrap_or_default();
            let message = format!(
                "expected an object with context, choices and gold, or one of a release file of {}, got the keys {keys:?}",
                Task::ALL.map(Task::name).join(", ")
            );
            return Err(at(line, message));
        }
        let labels = match task.filter(|_| !schema).and_then(|task| task.labels(&file)) {
            Some(name) => {
                let labels = path.with_file_name(name);
                crate::data::read_text(&labels)?.lines().map(str::to_string).collect()
            }
            None => vec![],
        };
        let mut questions = vec![];
        for (line, text) in objects {
            let object = parse(text).map_err(|message| at(line, message))?;
            let question = match task {
                Some(task) if !schema => task.question(&object, labels.get(questions.len()).map(String::as_str)),
                _ => schema_question(&object),
            };
            let question = question.map_err(|message| at(line, message))?;
            question.check().map_err(|e| at(line, e.to_string()))?;
            questions.push(question);
        }
        Ok(Self { name: task.map_or_else(|| stem.to_string(), |t| t.name().to_string()), task, questions })
    }

    /// Reads a file, or every `*.jsonl` of a folder in the order of the paper's tables (then by name).
    ///
    /// # Errors
    /// Those of [`Questions::read`]; a folder without such files.
    pub fn read_all(path: impl AsRef<Path>) -> Result<Vec<Self>> {
        let path = path.as_ref();
        if !path.is_dir() {
            return Ok(vec![Self::read(path)?]);
        }
        let entries = std::fs::read_dir(path).and_then(Iterator::collect::<std::io::Result<Vec<_>>>).map_err(Error::io(path))?;
        let mut files: Vec<_> =
            entries.into_iter().map(|e| e.path()).filter(|p| p.extension().is_some_and(|e| e == "jsonl")).collect();
        files.sort();
        if files.is_empty() {
            return Err(Error::format(path, "expected *.jsonl files of tasks in this folder, found none"));
        }
        let mut all = files.iter().map(Self::read).collect::<Result<Vec<_>>>()?;
        all.sort_by_key(|q| q.task.and_then(|t| Task::ALL.iter().position(|other| *other == t)).unwrap_or(usize::MAX));
        Ok(all)
    }
}

fn parse(line: &str) -> Result<Value, String> {
    let value: Value = serde_json::from_str(line).map_err(|e| format!("expected a JSON object: {e}"))?;
    if value.is_object() { Ok(value) } else { Err(format!("expected a JSON object, got {}", shown(Some(&value)))) }
}

fn schema_question(object: &Value) -> Result<Question, String> {
    let contexts = match field(object, "context")? {
        Value::String(text) => vec![text.clone()],
        Value::Array(_) => texts(object, "context")?,
        other => return Err(format!("context: expected text or an array of texts, got {}", shown(Some(other)))),
    };
    let gold = field(object, "gold")?;
    let number =
        gold.as_u64().ok_or_else(|| format!("gold: expected the number of the right candidate, got {}", shown(Some(gold))))?;
    Ok(Question { contexts, choices: texts(object, "choices")?, gold: number as usize })
}

fn field<'a>(object: &'a Value, key: &str) -> Result<&'a Value, String> {
    object.get(key).ok_or_else(|| format!("expected the key {key}"))
}

fn texts(object: &Value, key: &str) -> Result<Vec<String>, String> {
    let wrong = || format!("{key}: expected an array of texts, got {}", shown(object.get(key)));
    let array = field(object, key)?.as_array().ok_or_else(wrong)?;
    array.iter().map(|v| v.as_str().map(str::to_string)).collect::<Option<Vec<_>>>().ok_or_else(wrong)
}

/// A value for a message, cut where it is long.
fn shown(value: Option<&Value>) -> String {
    let text = value.map_or_else(|| "nothing".to_string(), Value::to_string);
    match text.char_indices().nth(60) {
        Some((cut, _)) => format!("{}…", &text[..cut]),
        None => text,
    }
}

/// Python's `str.capitalize`: the first character in upper case, the others in lower case.
fn capitalize(text: &str) -> String {
    let mut chars = text.chars();
    chars.next().map_or_else(String::new, |first| first.to_uppercase().chain(chars.flat_map(char::to_lowercase)).collect())
}

/// HellaSwag's texts without the traces of WikiHow's markup: `[title]` ends a sentence, other brackets and double spaces go.
fn clean(text: &str) -> String {
    let text = text.trim().replace(" [title]", ". ");
    let (mut plain, mut rest) = (String::new(), text.as_str());
    while let Some(open) = rest.find('[') {
        // A bracket that is not closed on its line is text.
        let length = rest[open..].find(']').filter(|l| !rest[open..open + l].contains('\n'));
        plain.push_str(&rest[..open + usize::from(length.is_none())]);
        rest = &rest[open + length.unwrap_or(0) + 1..];
    }
    plain.push_str(rest);
    plain.replace("  ", " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(name: &str, text: &str, labels: Option<(&str, &str)>) -> Result<Questions> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, text).unwrap();
        if let Some((name, text)) = labels {
            std::fs::write(dir.path().join(name), text).unwrap();
        }
        Questions::read(path)
    }

    #[test]
    fn release_files() {
        let one = |name: &str, text: &str, labels: Option<(&str, &str)>| {
            let mut all = read(name, text, labels).unwrap();
            (all.task.unwrap(), all.questions.remove(0))
        };
        let boolq = r#"{"question": "is it so", "title": "T", "answer": true, "passage": "It is."}"#;
        let want = Question::new("It is.\nQuestion: is it so?\nAnswer:", ["no", "yes"], 1);
        assert_eq!(one("dev.jsonl", boolq, None), (Task::BoolQ, want.clone()));
        let super_glue = r#"{"question": "is it so", "passage": "It is.", "idx": 0, "label": false}"#;
        assert_eq!(one("val.jsonl", super_glue, None), (Task::BoolQ, Question { gold: 0, ..want }));

        let piqa = r#"{"goal": "dresser", "sol1": "replace it", "sol2": "eat it"}"#;
        let want = Question::new("Question: dresser\nAnswer:", ["replace it", "eat it"], 1);
        assert_eq!(one("valid.jsonl", piqa, Some(("valid-labels.lst", "1\n"))), (Task::Piqa, want));

        let siqa = r#"{"context": "Tracy left.", "question": "Why?", "answerA": "a", "answerB": "b", "answerC": "c"}"#;
        let want = Question::new("Q: Tracy left. Why?\nA:", ["a", "b", "c"], 2);
        assert_eq!(one("dev.jsonl", siqa, Some(("dev-labels.lst", "3\n"))), (Task::SocialIqa, want));

        let hellaswag = r#"{"activity_label": "Roof", "ctx_a": "A man [title] sits.", "ctx_b": "he IS", "label": 3,
            "endings": ["[header] one  two", " b ", "c [step] d", "e"]}"#;
        let want = Question::new("Roof: A man.  sits. He is", [" one two", "b", "c d", "e"], 3);
        let want = Question { contexts: vec![want.contexts[0].replace("  ", " ")], ..want };
        assert_eq!(one("hellaswag_val.jsonl", &hellaswag.replace('\n', " "), None), (Task::HellaSwag, want));

        let winogrande = r#"{"qID": "1", "sentence": "Sarah beat Maria so _ won the cup.", "option1": "Sarah", "option2": "Maria",
            "answer": "1"}"#;
        let contexts = vec!["Sarah beat Maria so Sarah".into(), "Sarah beat Maria so Maria".into()];
        let want = Question { contexts, choices: vec!["won the cup.".into()], gold: 0 };
        assert_eq!(one("dev.jsonl", &winogrande.replace('\n', " "), None), (Task::WinoGrande, want));

        let arc = r#"{"id": "x", "question": {"stem": "Which?", "choices": [{"text": "this", "label": "1"}, {"text": "that",
            "label": "2"}]}, "answerKey": "2"}"#
            .replace('\n', " ");
        let want = Question::new("Question: Which?\nAnswer:", ["this", "that"], 1);
        assert_eq!(one("ARC-Easy-Test.jsonl", &arc, None), (Task::ArcEasy, want.clone()));
        assert_eq!(one("ARC-Challenge/test.jsonl", &arc, None), (Task::ArcChallenge, want.clone()));
        let want = Question { contexts: vec!["Which?".into()], ..want };
        assert_eq!(one("OpenBookQA/Main/test.jsonl", &arc, None), (Task::OpenBookQa, want));
    }

    #[test]
    fn the_schema() {
        let text = "{\"context\": \"a\", \"choices\": [\"b\", \"c\"], \"gold\": 1}\n\n{\"context\": [\"x\", \"y\"], \"choices\": [\"z\"], \"gold\": 0}\n";
        let all = read("mine.jsonl", text, None).unwrap();
        assert_eq!((all.name.as_str(), all.task), ("mine", None));
        assert_eq!(all.questions[1].candidate(1), ("y", "z"));
        assert_eq!(all.questions[0].candidate(1), ("a", "c"));
        assert_eq!(read("arc_easy.jsonl", text, None).unwrap().task, Some(Task::ArcEasy));
    }

    #[test]
    fn what_is_wrong_and_where() {
        let good = r#"{"context": "a", "choices": ["b", "c"], "gold": 1}"#;
        for (line, message) in [
            (r#"{"context": "a", "choices": ["b", "c"], "gold": 2}"#, "line 2: question: expected a gold answer below 2, got 2"),
            (r#"{"context": "a", "choices": ["b", 3], "gold": 0}"#, "line 2: choices: expected an array of texts, got [\"b\",3]"),
            (r#"{"context": 7, "choices": ["b"], "gold": 0}"#, "line 2: context: expected text or an array of texts, got 7"),
            (r#"{"choices": ["b"], "gold": 0}"#, "line 2: expected the key context"),
            (r#"{"context": "a", "choices": ["b", ""], "gold": 0}"#, "choice 1 is empty"),
            (r#"{"context": ["a", "b"], "choices": ["b", "c"], "gold": 0}"#, "expected one context or one choice"),
            ("[1]", "line 2: expected a JSON object, got [1]"),
            ("{", "line 2: expected a JSON object: EOF"),
        ] {
            let error = read("t.jsonl", &format!("{good}\n{line}\n"), None).unwrap_err().to_string();
            assert!(error.contains(message) && error.contains("t.jsonl"), "{error}");
        }
        assert!(read("t.jsonl", "", None).unwrap_err().to_string().contains("empty file"));
        let error = read("t.jsonl", r#"{"text": "a"}"#, None).unwrap_err().to_string();
        assert!(error.contains("line 1: expected an object with context, choices and gold"), "{error}");
        let piqa = r#"{"goal": "dresser", "sol1": "replace it", "sol2": "eat it"}"#;
        assert!(read("valid.jsonl", piqa, None).unwrap_err().to_string().contains("valid-labels.lst"));
        let error = read("valid.jsonl", piqa, Some(("valid-labels.lst", "2\n"))).unwrap_err().to_string();
        assert!(error.contains("expected a label from 0 to 1, got \"2\""), "{error}");
    }
}
