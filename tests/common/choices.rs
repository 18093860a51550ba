//! The clip ratios that a search took, group by group. Two candidates of one error are a tie of another kind than that of a code: the
//! side that is taken moves the grid of a whole group. The f64 network is made to take the side that the f32 one took.

use spinquant::Tensor;
use spinquant::grid::{QuantSpec, SEARCH_NORM, reference_grid};
use spinquant::ops::fake_quant::quantize;
use spinquant::quant::Clip;

use super::follow::TIE;

/// The ratio of every group of a tensor: how much of the range its scale is for.
pub fn ratios(x: &Tensor, spec: &QuantSpec) -> Vec<f64> {
    let scale = |clip| quantize(x, &spec.clipped(clip)).unwrap().scale.to_f64_vec().unwrap();
    let (taken, whole) = (scale(spec.clip), scale(Clip::Ratio(1.0)));
    // Of the candidates 1 − i/100, as they are computed.
    taken.iter().zip(whole).map(|(s, whole)| 1.0 - (100.0 - (100.0 * s / whole).round()) / 100.0).collect()
}

/// Σ|x − x̂|^2.4 of a group that is clipped by a ratio, and x − x̂.
fn error(x: &[f64], spec: &QuantSpec, ratio: f64) -> (f64, Vec<f64>) {
    let grid = reference_grid(&spec.clipped(Clip::Ratio(ratio)), x);
    let off: Vec<f64> = x.iter().map(|&v| v - grid.nearest(v)).collect();
    (off.iter().map(|e| e.abs().powf(SEARCH_NORM)).sum(), off)
}

/// The same where ratios are searched; else there is nothing to follow.
pub fn taken(x: &Tensor, spec: &QuantSpec) -> Vec<f64> {
    if spec.clip == Clip::Search { ratios(x, spec) } else { vec![] }
}

/// How much larger the error of a ratio is than that of another, in parts of it.
pub fn excess(x: &[f64], spec: &QuantSpec, ratio: f64, than: f64) -> f64 {
    let (one, other) = (error(x, spec, ratio).0, error(x, spec, than).0);
    if one == other { 0.0 } else { one / other - 1.0 }
}

/// The group with its values moved, by as little as possible, until the excess of a ratio over another is `to`. The extremes stay:
/// the grids are those of before.
pub fn nudged(x: &[f64], spec: &QuantSpec, ratio: f64, than: f64, to: f64) -> Vec<f64> {
    let extreme = |v: f64| x.iter().all(|u| u.abs() <= v.abs()) || x.iter().all(|&u| u <= v) || x.iter().all(|&u| u >= v);
    let free: Vec<bool> = x.iter().map(|&v| !extreme(v)).collect();
    let mut moved = x.to_vec();
    // Newton's method along the gradient of the difference.
    for _ in 0..50 {
        let ((one, off_one), (other, off_other)) = (error(&moved, spec, ratio), error(&moved, spec, than));
        let left = one - other * (1.0 + to);
        if left.abs() <= 1e-3 * to.abs() * other {
            break;
        }
        let slope = |e: f64| SEARCH_NORM * e.abs().powf(SEARCH_NORM - 1.0).copysign(e);
        let gradient: Vec<f64> =
            (0..x.len()).map(|i| if free[i] { slope(off_one[i]) - (1.0 + to) * slope(off_other[i]) } else { 0.0 }).collect();
        let length: f64 = gradient.iter().map(|g| g * g).sum();
        moved.iter_mut().zip(&gradient).for_each(|(v, g)| *v -= left / length * g);
    }
    moved
}

/// Groups in which another ratio was taken than the search in f64 takes, with the ratio of that search and the one that was taken. Each
/// must be a tie: the error of what was taken is the smallest but for rounding.
pub fn others(x: &[f64], group: usize, spec: &QuantSpec, taken: &[f64], id: &str) -> Vec<(usize, f64, f64)> {
    let tensor = Tensor::from_vec(x.to_vec(), [taken.len(), group]).unwrap();
    let ours = ratios(&tensor, &QuantSpec { group: spec.group.map(|_| group), ..*spec });
    let others: Vec<_> = (0..taken.len()).filter(|&g| ours[g] != taken[g]).map(|g| (g, ours[g], taken[g])).collect();
    for &(g, ours, taken) in &others {
        let excess = excess(&x[g * group..][..group], spec, taken, ours);
        assert!(excess <= TIE, "{id}: group {g} is clipped by {taken}, {excess:e} worse than by {ours}");
    }
    others
}

/// The same values where the search in f64 takes the ratios that were taken, and in how many groups they had to be moved.
pub fn follow(x: &[f64], group: usize, spec: &QuantSpec, taken: &[f64], id: &str) -> (Vec<f64>, usize) {
    let mut moved = x.to_vec();
    if spec.clip != Clip::Search {
        return (moved, 0);
    }
    let others = others(x, group, spec, taken, id);
    for &(g, ours, taken) in &others {
        let part = &mut moved[g * group..][..group];
        let nudged = nudged(part, spec, taken, ours, -1e-9);
        part.copy_from_slice(&nudged);
    }
    (moved, others.len())
}
