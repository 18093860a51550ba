//! Attention by its definition, in `f64`.

use crate::ops::attention::Sizes;

/// o `[tokens, H·D]` and lse `[batch, H, seq]` by the definition.
pub fn reference(q: &[f64], k: &[f64], v: &[f64], n: Sizes) -> (Vec<f64>, Vec<f64>) {
    let (mut o, mut lse) = (vec![0.0; q.len()], vec![]);
    for (b, h) in pairs(n) {
        for t in 0..n.seq {
            let (p, l) = probabilities(q, k, n, b, h, t);
            for (j, p) in (n.first_key(t)..).zip(p) {
                for d in 0..n.dim {
                    o[n.at(b, t, h, n.heads) + d] += p * v[n.at(b, j, h / n.group(), n.kv_heads) + d];
                }
            }
            lse.push(l);
        }
    }
    (o, lse)
}

/// dq, dk, dv by the formulas above.
pub fn reference_backward(dout: &[f64], q: &[f64], k: &[f64], v: &[f64], n: Sizes) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
    let (mut dq, mut dk, mut dv) = (vec![0.0; q.len()], vec![0.0; k.len()], vec![0.0; v.len()]);
    for (b, h) in pairs(n) {
        for t in 0..n.seq {
            let (p, _) = probabilities(q, k, n, b, h, t);
            let at_q = n.at(b, t, h, n.heads);
            let at_k = |j| n.at(b, j, h / n.group(), n.kv_heads);
            let first = n.first_key(t);
            let dp: Vec<f64> = (first..=t).map(|j| (0..n.dim).map(|d| dout[at_q + d] * v[at_k(j) + d]).sum()).collect();
            let mean: f64 = p.iter().zip(&dp).map(|(p, dp)| p * dp).sum();
            for (j, (p, dp)) in (first..).zip(p.iter().zip(&dp)) {
                let ds = p * (dp - mean) * n.scale();
                for d in 0..n.dim {
                    dv[at_k(j) + d] += p * dout[at_q + d];
                    dq[at_q + d] += ds * k[at_k(j) + d];
                    dk[at_k(j) + d] += ds * q[at_q + d];
                }
            }
        }
    }
    (dq, dk, dv)
}

fn pairs(n: Sizes) -> impl Iterator<Item = (usize, usize)> {
    (0..n.batch).flat_map(move |b| (0..n.heads).map(move |h| (b, h)))
}

/// The probabilities of the keys that the query at `t` reads, and the log-sum-exp of their scores.
fn probabilities(q: &[f64], k: &[f64], n: Sizes, b: usize, h: usize, t: usize) -> (Vec<f64>, f64) {
    let score = |j| {
        let (q, k) = (&q[n.at(b, t, h, n.heads)..], &k[n.at(b, j, h / n.group(), n.kv_heads)..]);
        (0..n.dim).map(|d| q[d] * k[d]).sum::<f64>() * n.scale()
    };
    let s: Vec<f64> = (n.first_key(t)..=t).map(score).collect();
    let max = s.iter().fold(f64::NEG_INFINITY, |m, &s| m.max(s));
    let lse = max + s.iter().map(|s| (s - max).exp()).sum::<f64>().ln();
    (s.iter().map(|s| (s - lse).exp()).collect(), lse)
}
