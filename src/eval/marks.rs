//! Marks: what every question of a task scored, and their means with standard errors.

use super::tasks::Question;
use crate::{Error, Result};

/// A mean over questions and its standard error.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Mean {
    /// The mean.
    pub mean: f64,
    /// Sample standard deviation over √n; NaN for one question.
    pub standard_error: f64,
}

impl Mean {
    /// Of independent values; NaN where there is none.
    pub fn of(values: &[f64]) -> Self {
        let n = values.len() as f64;
        let mean = values.iter().sum::<f64>() / n;
        let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (n - 1.0);
        Self { mean, standard_error: (variance / n).sqrt() }
    }

    /// The mean of means, each of which weighs the same, with the standard error of independent ones.
    pub fn over(means: &[Self]) -> Self {
        let n = means.len() as f64;
        let squares: f64 = means.iter().map(|m| m.standard_error.powi(2)).sum();
        Self { mean: means.iter().map(|m| m.mean).sum::<f64>() / n, standard_error: squares.sqrt() / n }
    }
}

/// How a model does on questions.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scores {
    /// Number of questions.
    pub questions: usize,
    /// Part of the questions whose right candidate is the likeliest; the first of equal ones counts.
    pub acc: Mean,
    /// The same for log-likelihoods divided by the number of characters of the choice.
    pub acc_norm: Mean,
    /// Log-likelihood of the right candidate, in nats a question.
    pub gold: Mean,
}

/// What every question scored, in the order of the questions.
#[derive(Clone, Debug, PartialEq)]
pub struct Marks {
    /// 1 where the right candidate is the likeliest (the first of equal ones counts), else 0.
    pub acc: Vec<f64>,
    /// The same for log-likelihoods divided by the number of characters of the choice.
    pub acc_norm: Vec<f64>,
    /// Log-likelihood of the right candidate, in nats.
    pub gold: Vec<f64>,
}

impl Marks {
    /// Marks log-likelihoods, one a candidate, in the order of [`requests`](super::choices::requests).
    ///
    /// # Errors
    /// No question; another number of log-likelihoods than of candidates; one that is NaN; those of [`Question::check`].
    pub fn of(questions: &[Question], log_likelihoods: &[f64]) -> Result<Self> {
        let candidates: usize = questions.iter().map(Question::candidates).sum();
        if questions.is_empty() || log_likelihoods.len() != candidates {
            let message = format!("expected {candidates} of {} questions, got {}", questions.len(), log_likelihoods.len());
            return Err(Error::argument("log-likelihoods", message));
        }
        if log_likelihoods.iter().any(|l| l.is_nan()) {
            return Err(Error::numeric("log-likelihoods", "one of them is NaN"));
        }
        let mut marks = Self { acc: vec![], acc_norm: vec![], gold: vec![] };
        let mut rest = log_likelihoods;
        for question in questions {
            question.check()?;
            let (now, later) = rest.split_at(question.candidates());
            rest = later;
            let characters = |i: usize| question.candidate(i).1.chars().count() as f64;
            let normalised: Vec<f64> = now.iter().enumerate().map(|(i, l)| l / characters(i)).collect();
            let right = |values: &[f64]| f64::from(u8::from(first_maximum(values) == question.gold));
            marks.acc.push(right(now));
            marks.acc_norm.push(right(&normalised));
            marks.gold.push(now[question.gold]);
        }
        Ok(marks)
    }

    fn columns(&self) -> [&[f64]; 3] {
        [&self.acc, &self.acc_norm, &self.gold]
    }

    fn from_columns([acc, acc_norm, gold]: [Vec<f64>; 3]) -> Self {
        Self { acc, acc_norm, gold }
    }

    /// Means and standard errors.
    pub fn scores(&self) -> Scores {
        let [acc, acc_norm, gold] = self.columns().map(Mean::of);
        Scores { questions: self.acc.len(), acc, acc_norm, gold }
    }

    /// Question by question, what another network's marks lack of these: their [`scores`](Self::scores) are the paired differences.
    ///
    /// # Errors
    /// Marks of another number of questions.
    pub fn minus(&self, other: &Self) -> Result<Self> {
        self.same_questions(other)?;
        let less = |(a, b): (&[f64], &[f64])| a.iter().zip(b).map(|(a, b)| a - b).collect();
        let [acc, acc_norm, gold] = self.columns();
        let [other_acc, other_norm, other_gold] = other.columns();
        Ok(Self::from_columns([(acc, other_acc), (acc_norm, other_norm), (gold, other_gold)].map(less)))
    }

    /// Question by question, the mean of several networks' marks (of several seeds, say).
    ///
    /// # Errors
    /// No marks, or marks of different numbers of questions.
    pub fn mean(all: &[Self]) -> Result<Self> {
        let first = all.first().ok_or_else(|| Error::argument("marks", "expected those of at least one network, got none"))?;
        all.iter().try_for_each(|marks| first.same_questions(marks))?;
        let column = |c: usize| {
            let at = |i: usize| all.iter().map(|marks| marks.columns()[c][i]).sum::<f64>() / all.len() as f64;
            (0..first.acc.len()).map(at).collect()
        };
        Ok(Self::from_columns([0, 1, 2].map(column)))
    }

    fn same_questions(&self, other: &Self) -> Result<()> {
        let (expected, got) = (self.acc.len(), other.acc.len());
        let wrong = || Error::argument("marks", format!("expected those of {expected} questions, got {got}"));
        if expected == got { Ok(()) } else { Err(wrong()) }
    }
}

fn first_maximum(values: &[f64]) -> usize {
    values.iter().enumerate().fold(0, |best, (i, v)| if *v > values[best] { i } else { best })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn score(questions: &[Question], log_likelihoods: &[f64]) -> Result<Scores> {
        Ok(Marks::of(questions, log_likelihoods)?.scores())
    }

    #[test]
    fn counting() {
        let q = |gold| Question::new("c", ["ab", "abcd"], gold);
        // The second is likelier a character; equal candidates: the first.
        let s = score(&[q(0), q(1), q(0), q(1)], &[-2.0, -3.0, -2.0, -3.0, -1.0, -1.0, -1.0, -1.0]).unwrap();
        assert_eq!((s.questions, s.acc.mean, s.acc_norm.mean), (4, 0.5, 0.5));
        assert!((s.acc.standard_error - (1.0f64 / 3.0).sqrt() / 2.0).abs() < 1e-12);
        assert_eq!(s.gold.mean, -7.0 / 4.0);
        // Characters, not bytes.
        let s = score(&[Question::new("c", ["éééé", "abcde"], 1)], &[-4.0, -4.9]).unwrap();
        assert_eq!((s.acc.mean, s.acc_norm.mean), (0.0, 1.0));
        assert!(s.acc.standard_error.is_nan());
        assert!(score(&[q(0)], &[1.0]).is_err() && score(&[], &[]).is_err() && score(&[q(0)], &[f64::NAN, 0.0]).is_err());
        assert!(score(&[q(2)], &[0.0, 0.0]).is_err());
    }

    /// Two networks that fail on the same questions differ for certain by what is left; their accuracies alone do not say so.
    #[test]
    fn differences_are_paired() {
        let marks = |acc: &[f64], gold: &[f64]| Marks { acc: acc.to_vec(), acc_norm: acc.to_vec(), gold: gold.to_vec() };
        let a = marks(&[1.0, 0.0, 1.0, 0.0], &[-1.0, -9.0, -2.0, -7.0]);
        let b = marks(&[1.0, 0.0, 0.0, 0.0], &[-1.5, -9.5, -2.5, -7.5]);
        let d = a.minus(&b).unwrap().scores();
        assert_eq!((d.acc.mean, d.gold), (0.25, Mean { mean: 0.5, standard_error: 0.0 }));
        assert!(a.scores().gold.standard_error > 1.0);
        let both = Marks::mean(&[a.clone(), b.clone()]).unwrap();
        assert_eq!((both.acc, both.gold), (vec![1.0, 0.0, 0.5, 0.0], vec![-1.25, -9.25, -2.25, -7.25]));
        assert_eq!(Marks::mean(std::slice::from_ref(&a)).unwrap(), a);
        let other = marks(&[1.0], &[-1.0]);
        assert!(a.minus(&other).is_err() && Marks::mean(&[a, other]).is_err() && Marks::mean(&[]).is_err());
    }

    #[test]
    fn means_of_means() {
        let m = |mean, standard_error| Mean { mean, standard_error };
        assert_eq!(Mean::over(&[m(1.0, 3.0), m(2.0, 4.0)]), m(1.5, 2.5));
    }
}
