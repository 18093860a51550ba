//! Rows that differ by a seed, side by side: a rank makes and scores a network whole, while others do others.

use super::{Comparison, Judged, Test};
use crate::baselines::Training;
use crate::eval::fidelity::Fidelity;
use crate::eval::marks::Marks;
use crate::learn::Watch;
use crate::ranks::Group;
use crate::{Error, Result};

/// What a seed scored, and what it took.
pub(super) type Scored = (Judged, Training);

impl Comparison<'_> {
    /// What `job` makes of seeds 0 to `count` − 1, in order: as many of them as every rank can have equally many of by one rank each, alone
    /// ([`Test::ranks`]); the rest by all ranks together.
    ///
    /// # Errors
    /// The first of `job`; those of [`Group::gather`].
    pub(super) fn seeds(
        &self,
        count: u64,
        watch: &mut dyn Watch,
        job: impl Fn(u64, Test<'_>, &mut dyn Watch) -> Result<Scored>,
    ) -> Result<Vec<Scored>> {
        let ranks = self.test.ranks;
        let (rank, world) = (ranks.rank() as u64, ranks.world() as u64);
        let alone = Test { ranks: Group::nobody(), ..self.test };
        let whole = count - count % world;
        let own = (rank..whole).step_by(world as usize).map(|seed| job(seed, alone, watch)).collect::<Result<Vec<_>>>()?;
        let told: Vec<f64> = own.iter().flat_map(numbers).collect();
        let all = ranks.gather_numbers("scores of seeds", &told)?;
        let mut all: Vec<_> = all.iter().map(|numbers| numbers.iter().copied()).collect();
        let mut scored = (0..whole as usize).map(|seed| read(&mut all[seed % world as usize])).collect::<Result<Vec<_>>>()?;
        for seed in whole..count {
            scored.push(job(seed, self.test, watch)?);
        }
        Ok(scored)
    }
}

/// Scores as numbers; every list behind its length.
fn numbers((judged, training): &Scored) -> Vec<f64> {
    let mut all = vec![judged.perplexity, training.tokens as f64, training.steps as f64, training.seconds];
    let mut list = |values: &[f64]| {
        all.push(values.len() as f64);
        all.extend(values);
    };
    for fidelity in [&judged.fidelity, &judged.other] {
        list(fidelity.as_ref().map_or(&[], |_| &[1.0]));
        let none = Fidelity::default();
        let fidelity = fidelity.as_ref().unwrap_or(&none);
        list(&fidelity.divergence);
        list(&fidelity.agreement);
    }
    for marks in &judged.marks {
        list(&[1.0]);
        list(&marks.acc);
        list(&marks.acc_norm);
        list(&marks.gold);
    }
    list(&[]);
    all
}

/// Back from [`numbers`], as many as belong to one.
fn read(from: &mut impl Iterator<Item = f64>) -> Result<Scored> {
    let mut next = || from.next().ok_or_else(|| Error::argument("scores of seeds", "expected those of every rank, got fewer"));
    let perplexity = next()?;
    let training = Training { tokens: next()? as usize, steps: next()? as usize, seconds: next()? };
    let mut list = || -> Result<Vec<f64>> { (0..next()? as usize).map(|_| next()).collect() };
    let mut fidelity = || -> Result<Option<Fidelity>> {
        let known = !list()?.is_empty();
        let (divergence, agreement) = (list()?, list()?);
        Ok(known.then_some(Fidelity { divergence, agreement }))
    };
    let (fidelity, other) = (fidelity()?, fidelity()?);
    let mut marks = vec![];
    while !list()?.is_empty() {
        marks.push(Marks { acc: list()?, acc_norm: list()?, gold: list()? });
    }
    Ok((Judged { perplexity, fidelity, other, marks }, training))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scores_cross_ranks_unchanged() {
        let fidelity = Fidelity { divergence: vec![0.1, 0.2], agreement: vec![0.5, 1.0] };
        let marks = Marks { acc: vec![1.0, 0.0], acc_norm: vec![0.0, 0.0], gold: vec![-1.5, -2.5] };
        let training = Training { tokens: 1 << 40, steps: 100, seconds: 0.3 };
        let all = [
            (Judged { perplexity: 7.1, ..Judged::default() }, Training::default()),
            (Judged { perplexity: 8.2, fidelity: Some(fidelity.clone()), other: None, marks: vec![marks.clone(); 2] }, training),
            (Judged { perplexity: f64::INFINITY, fidelity: None, other: Some(fidelity), marks: vec![marks] }, training),
        ];
        let told: Vec<f64> = all.iter().flat_map(numbers).collect();
        let mut from = told.iter().copied();
        for scored in &all {
            assert_eq!(read(&mut from).unwrap(), *scored);
        }
        assert!(from.next().is_none());
        assert!(read(&mut told[..told.len() - 1].iter().copied().skip(numbers(&all[0]).len() + numbers(&all[1]).len())).is_err());
    }
}
