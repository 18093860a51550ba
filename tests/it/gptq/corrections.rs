//! Corrections for the full-precision stream: each against its formula, written without blocks, and what they promise.

use spinquant::quant::GridFloat;

use super::*;

fn at(t: &Tensor) -> impl Fn(usize, usize) -> f64 {
    let (v, n) = (values(t), t.cols());
    move |i, j| v[i * n + j]
}

fn multiply(a: &[f64], b: &[f64], n: usize) -> Vec<f64> {
    let rows = a.len() / n;
    let cols = b.len() / n;
    let entry = |i: usize, j: usize| (0..n).map(|k| a[i * n + k] * b[k * cols + j]).sum();
    (0..rows * cols).map(|at| entry(at / cols, at % cols)).collect()
}

/// By Gauss and Jordan.
fn inverse(a: &[f64], n: usize) -> Vec<f64> {
    let mut rows: Vec<Vec<f64>> =
        a.chunks(n).enumerate().map(|(i, row)| row.iter().copied().chain((0..n).map(|j| f64::from(i == j))).collect()).collect();
    for k in 0..n {
        let pivot = (k..n).max_by(|&i, &j| rows[i][k].abs().total_cmp(&rows[j][k].abs())).unwrap();
        rows.swap(k, pivot);
        let top: Vec<f64> = rows[k].iter().map(|x| x / rows[k][k]).collect();
        for (i, row) in rows.iter_mut().enumerate() {
            let factor = row[k];
            if i == k { *row = top.clone() } else { row.iter_mut().zip(&top).for_each(|(x, t)| *x -= factor * t) }
        }
    }
    rows.into_iter().flat_map(|row| row[n..].to_vec()).collect()
}

/// U with `A = UᵀU`.
fn upper(a: &[f64], n: usize) -> Vec<f64> {
    let mut u = vec![0.0; n * n];
    for i in 0..n {
        for j in i..n {
            let known: f64 = (0..i).map(|k| u[k * n + i] * u[k * n + j]).sum();
            u[i * n + j] = if i == j { (a[i * n + i] - known).sqrt() } else { (a[i * n + j] - known) / u[i * n + i] };
        }
    }
    u
}

/// One row's grids, and its values rounded: found on `w` in its own order, or when a group is reached.
struct Naive<'a> {
    spec: &'a QuantSpec,
    order: &'a [usize],
    act_order: bool,
    grids: Vec<spinquant::quant::Grid<f64>>,
}

impl<'a> Naive<'a> {
    /// For a row in the order of the sweep.
    fn new(spec: &'a QuantSpec, gptq: &Gptq, order: &'a [usize], row: &[f64]) -> Self {
        let mut own = vec![0.0; row.len()];
        order.iter().zip(row).for_each(|(&i, w)| own[i] = *w);
        let grids = own.chunks(spec.group.unwrap_or(row.len())).map(|g| f64::grid(spec, g)).collect();
        Self { spec, order, act_order: gptq.act_order, grids }
    }
    /// Column j of the sweep is next, of a row as it is now.
    fn reach(&mut self, row: &[f64], j: usize) {
        let group = self.spec.group.unwrap_or(row.len());
        if self.spec.group.is_some() && !self.act_order && j.is_multiple_of(group) {
            self.grids[j / group] = f64::grid(self.spec, &row[j..j + group]);
        }
    }
    /// Column j rounded, and kept within its grid.
    fn round(&self, row: &[f64], j: usize) -> (f64, f64) {
        let group = self.spec.group.unwrap_or(row.len());
        let grid = &self.grids[self.order[j] / group];
        (grid.nearest(row[j]), row[j].clamp(grid.value(grid.min), grid.value(grid.max)))
    }
}

/// The formulas as published, a column at a time, on dense matrices.
fn naive(w: &Tensor, m: &Moments, spec: &QuantSpec, gptq: &Gptq) -> Vec<f64> {
    let n = w.cols();
    let (h, d) = (at(&m.hessian), at(m.drift.as_ref().unwrap()));
    let dead: Vec<bool> = (0..n).map(|i| h(i, i) == 0.0).collect();
    let diagonal: Vec<f64> = (0..n).map(|i| if dead[i] { 1.0 } else { h(i, i) }).collect();
    let mut order: Vec<usize> = (0..n).collect();
    if gptq.act_order {
        order.sort_by(|&i, &j| diagonal[j].total_cmp(&diagonal[i]));
    }
    let add = gptq.damping * diagonal.iter().sum::<f64>() / n as f64;
    let gather = |f: &dyn Fn(usize, usize) -> f64| -> Vec<f64> {
        order.iter().flat_map(|&i| order.iter().map(move |&j| (i, j))).map(|(i, j)| f(i, j)).collect()
    };
    let plain = gather(&|i, j| if i == j { diagonal[i] } else { h(i, j) });
    let damped = gather(&|i, j| if i == j { diagonal[i] + add } else { h(i, j) });
    let d = gather(&d);
    let of_h = inverse(&damped, n);
    let u = upper(&of_h, n);
    let original: Vec<f64> = values(w).chunks(n).flat_map(|row| order.iter().map(|&i| row[i]).collect::<Vec<_>>()).collect();
    let bury = |mut w: Vec<f64>| {
        w.chunks_mut(n).for_each(|row| (0..n).filter(|&j| dead[order[j]]).for_each(|j| row[j] = 0.0));
        w
    };
    let sweep = |row: &mut [f64], grids: &mut Naive<'_>, u: &[f64], from: usize, p: &[f64], beta: f64| -> Vec<f64> {
        let (first, size) = (row.to_vec(), n - from);
        let mut q = vec![];
        for j in from..n {
            grids.reach(row, j);
            if j > 0 {
                row[j] -= beta * (row[j] - first[j]);
            }
            let (value, kept) = grids.round(row, j);
            let e = (row[j] - value - beta * (row[j] - first[j])) / u[(j - from) * size + j - from];
            for k in j + 1..n {
                row[k] -= e * u[(j - from) * size + k - from] - kept * p[j * n + k];
            }
            q.push(value);
        }
        q
    };
    let none = vec![0.0; n * n];
    let mut result = vec![];
    let swept: Vec<f64> = match gptq.correction {
        Correction::None => bury(original)
            .chunks(n)
            .flat_map(|row| sweep(&mut row.to_vec(), &mut Naive::new(spec, gptq, &order, row), &u, 0, &none, 0.0))
            .collect(),
        Correction::Foem(beta) => bury(original)
            .chunks(n)
            .flat_map(|row| sweep(&mut row.to_vec(), &mut Naive::new(spec, gptq, &order, row), &u, 0, &none, beta))
            .collect(),
        Correction::Gptaq(alpha) => {
            let transposed: Vec<f64> = (0..n * n).map(|i| u[i % n * n + i / n]).collect();
            let mut m = multiply(&d, &transposed, n);
            (0..n * n).filter(|i| i % n <= i / n).for_each(|i| m[i] = 0.0);
            let p: Vec<f64> = multiply(&m, &u, n).iter().map(|p| alpha * p).collect();
            bury(original)
                .chunks(n)
                .flat_map(|row| sweep(&mut row.to_vec(), &mut Naive::new(spec, gptq, &order, row), &u, 0, &p, 0.0))
                .collect()
        }
        Correction::Qep(c) => {
            let shift = multiply(&multiply(&original, &d, n), &of_h, n);
            let w = original.iter().zip(shift).map(|(w, s)| w + c * s).collect();
            bury(w)
                .chunks(n)
                .flat_map(|row| sweep(&mut row.to_vec(), &mut Naive::new(spec, gptq, &order, row), &u, 0, &none, 0.0))
                .collect()
        }
        Correction::Qronos => {
            // G with the damping, and what is left of the inverse without column 0.
            let g: Vec<f64> = (0..n * n).map(|i| damped[i] + d[i]).collect();
            let below = n - 1;
            let rest: Vec<f64> = (0..below * below)
                .map(|i| (i / below + 1, i % below + 1))
                .map(|(i, j)| of_h[i * n + j] - of_h[i * n] * of_h[j * n] / of_h[0])
                .collect();
            let l = upper(&rest, below);
            let project = |w: &[f64], q0: f64| {
                let wanted: Vec<f64> = (1..n).map(|j| (0..n).map(|i| w[i] * g[i * n + j]).sum::<f64>() - q0 * plain[j]).collect();
                multiply(&wanted, &rest, below)
            };
            original
                .chunks(n)
                .flat_map(|w| {
                    let wanted: f64 = (0..n).map(|i| w[i] * (plain[i * n] + d[i * n])).sum();
                    let v0 = (wanted - (1..n).map(|j| w[j] * plain[j]).sum::<f64>()) / plain[0];
                    // Grids are those of the weight that is the best with v0.
                    let target = bury([vec![v0], project(w, v0)].concat());
                    let mut grids = Naive::new(spec, gptq, &order, &target);
                    grids.reach(&target, 0);
                    let (q0, _) = grids.round(&target, 0);
                    let mut row = bury([vec![q0], project(w, q0)].concat());
                    [vec![q0], sweep(&mut row, &mut grids, &l, 1, &none, 0.0)].concat()
                })
                .collect()
        }
    };
    for row in swept.chunks(n) {
        let mut own = vec![0.0; n];
        order.iter().zip(row).for_each(|(&i, q)| own[i] = *q);
        result.extend(own);
    }
    result
}

fn specs() -> impl Strategy<Value = (QuantSpec, Gptq)> {
    let group = prop_oneof![Just(None), Just(Some(4)), Just(Some(8))];
    let strength = prop_oneof![Just(1.0), Just(0.25), Just(0.5)];
    (3u32..=4, any::<bool>(), group, any::<bool>(), 1usize..20, 0..5usize, strength).prop_map(
        |(bits, symmetric, group, act_order, block, correction, strength)| {
            let correction = Correction::ALL[correction];
            let correction = correction.constant().map_or(correction, |_| correction.with(strength).unwrap());
            let spec = QuantSpec { group, ..QuantSpec::weight(bits, symmetric).clipped(Clip::Ratio(1.0)) };
            (spec, Gptq { act_order, block, correction, ..Gptq::default() })
        },
    )
}

proptest! {
    #![proptest_config(cases(128))]

    #[test]
    fn formulas((spec, gptq) in specs(), seed in 0u64..1_000_000, some_dead in any::<bool>()) {
        let (n, w) = (16, randn([4, 16], seed));
        let (x, mut there) = (inputs(60, n, seed), values(&disturbed(&inputs(60, n, seed), seed)));
        if some_dead {
            // Rounded away in the quantised stream, there in the other.
            there.chunks_mut(n).for_each(|row| (row[0], row[9]) = (0.0, 0.0));
        }
        let m = moments(&x, &Tensor::from_vec(there, [60, n]).unwrap(), 1);
        let ours = corrected(&gptq, &w, &spec, &m);
        assert_on_grid(&ours, &spec);
        let off = distance(&values(&ours.weight), &naive(&w, &m, &spec, &gptq));
        prop_assert!(off <= 1e-8, "{}: off by {off:e}", gptq.correction);
        if some_dead {
            prop_assert!(values(&ours.weight).chunks(n).all(|row| row[0] == 0.0 && row[9] == 0.0));
        }
    }

    /// Streams that are the same, or a constant of 0: GPTQ, bit for bit.
    #[test]
    fn nothing_to_correct_is_gptq((spec, gptq) in specs(), seed in 0u64..1_000_000) {
        let x = inputs(60, 24, seed);
        let (same, apart) = (moments(&x, &x, 1), moments(&x, &disturbed(&x, seed), 1));
        prop_assert!(values(same.drift.as_ref().unwrap()).iter().all(|d| *d == 0.0));
        for dtype in [DType::F64, DType::F32, DType::BF16] {
            let w = randn([5, 24], seed).to_dtype(dtype).unwrap();
            let plain = |m: &Moments| corrected(&Gptq { correction: Correction::None, ..gptq }, &w, &spec, m);
            // FOEM does not look at D.
            if !matches!(gptq.correction, Correction::Foem(_)) {
                prop_assert_eq!(values(&corrected(&gptq, &w, &spec, &same).weight), values(&plain(&same).weight));
            }
            if gptq.correction.constant().is_some() {
                let none = Gptq { correction: gptq.correction.with(0.0).unwrap(), ..gptq };
                let q = corrected(&none, &w, &spec, &apart);
                prop_assert_eq!((values(&q.weight), q.loss), (values(&plain(&apart).weight), plain(&apart).loss));
            }
        }
    }
}

/// `‖x Wᵀ − x̃ Ŵᵀ‖²`.
fn mismatch(x: &Tensor, w: &Tensor, quantized: &Tensor, q: &Tensor) -> f64 {
    let y = |x: &Tensor, w: &Tensor| values(&product(x, false, w, true, false, DType::F64).unwrap());
    y(x, w).iter().zip(y(quantized, q)).map(|(a, b)| (a - b) * (a - b)).sum()
}

/// On inputs whose channels are correlated, each of those that read D brings the output nearer to that in full precision than GPTQ.
#[test]
fn each_lowers_the_error_of_the_output() {
    let (spec, draws) = (QuantSpec::weight(4, false), 24);
    let error = |correction: Correction| {
        let one = |seed: u64| {
            let (x, w) = (inputs(200, 32, seed), randn([8, 32], seed + 9));
            let there = disturbed(&x, seed);
            let q = corrected(&Gptq { correction, ..Gptq::default() }, &w, &spec, &moments(&x, &there, 1));
            mismatch(&x, &w, &there, &q.weight).ln()
        };
        ((0..draws).map(one).sum::<f64>() / draws as f64).exp()
    };
    let plain = error(Correction::None);
    for correction in Correction::ALL {
        println!("{correction}: {:.3} of GPTQ's error", error(correction) / plain);
    }
    for correction in [Correction::Gptaq(0.25), Correction::Qep(0.5), Correction::Qep(1.0), Correction::Qronos] {
        assert!(error(correction) < plain, "{correction}");
    }
}

/// Two columns: the first is the best weight beside the original second, rounded, and the second the best beside the first's rounded
/// value, rounded. Least squares of the inputs themselves.
#[test]
fn qronos_is_least_squares() {
    let (spec, gptq) = (QuantSpec::weight(8, false), Gptq { damping: 0.0, correction: Correction::Qronos, ..Gptq::default() });
    let mut apart = 0;
    for seed in 0..20 {
        let (x, w) = (inputs(50, 2, seed), randn([1, 2], seed + 5));
        let there = disturbed(&x, seed);
        let q = corrected(&gptq, &w, &spec, &moments(&x, &there, 1));
        let (w, v) = (values(&w), values(&q.weight));
        let (x, there) = (values(&x), values(&there));
        // The multiple of column `of` of x̃ nearest to x w less the other column times `fixed`.
        let best = |of: usize, fixed: f64| {
            let rows = x.chunks(2).zip(there.chunks(2));
            let (mut dot, mut square) = (0.0, 0.0);
            for (x, t) in rows {
                dot += t[of] * (x[0] * w[0] + x[1] * w[1] - t[1 - of] * fixed);
                square += t[of] * t[of];
            }
            dot / square
        };
        let wanted = Tensor::from_vec(vec![best(0, w[1]), best(1, v[0])], [1, 2]).unwrap();
        assert_eq!(v, values(&nearest(&wanted, &q, &spec)), "seed {seed}: {wanted:?}");
        apart += usize::from(v != values(&nearest(&Tensor::from_vec(w, [1, 2]).unwrap(), &q, &spec)));
    }
    // Rounding the weight itself does not get there.
    assert!(apart > 10, "{apart}");
}

#[test]
fn drift_in_single_precision() {
    let x = inputs(2500, 50, 8);
    let there = disturbed(&x, 3);
    let exact = moments(&x, &there, 5).drift.unwrap();
    let largest = values(&exact).iter().fold(0f64, |m, x| m.max(x.abs()));
    let narrow = |t: &Tensor| t.to_dtype(DType::F32).unwrap();
    let ours = moments(&narrow(&x), &narrow(&there), 5).drift.unwrap();
    assert!(distance(&values(&exact), &values(&ours)) <= 1e-5 * largest);
    let difference = Tensor::axpby(0.4, x, -0.4, there.clone()).unwrap();
    let direct = product(&difference, true, &there, false, false, DType::F64).unwrap();
    assert!(distance(&values(&exact), &values(&direct)) <= 1e-12 * largest);
}

#[test]
fn awkward_corrections() {
    awkward_corrections_on(&Device::Cpu, DType::F64);
    awkward_corrections_on(&Device::Cpu, DType::BF16);
}
