//! The laws of `spinquant::laws` on this crate's own types, over random sizes and seeds.

use std::collections::BTreeMap;

use proptest::prelude::*;
use rayon::prelude::*;
use spinquant::linalg;
use spinquant::manifold::{Manifold, Orthogonal, Retraction, retractions};
use spinquant::optim::{
    self, CayleySgd, Mode, Optimizer, QrOrth, RiemannianAdam, RiemannianSgd, Schedule, State, gradient_through_qr,
};
use spinquant::quant::{Clip, QuantSpec};
use spinquant::rotation::Rotations;
use spinquant::{DType, Tensor, laws, ops};

use crate::common::need::cases;

fn distance(a: &Tensor, b: &Tensor) -> f64 {
    let (a, b) = (a.to_f64_vec().unwrap(), b.to_f64_vec().unwrap());
    a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum::<f64>().sqrt()
}

#[test]
fn hadamard_maps_are_orthonormal_at_every_size() {
    (1..513usize).into_par_iter().for_each(|n| {
        for dtype in [DType::F64, DType::F32] {
            laws::hadamard_is_orthonormal(n, dtype).unwrap();
        }
    });
}

proptest! {
    #![proptest_config(cases(48))]

    #[test]
    fn retractions_retract(n in 1usize..24, seed in any::<u64>()) {
        for r in retractions() {
            laws::retraction(&*r, n, seed).unwrap();
        }
    }

    #[test]
    fn geometry(n in 1usize..24, seed in any::<u64>()) {
        laws::orthogonal_geometry(n, seed).unwrap();
    }

    #[test]
    fn quantizers(
        bits in 2u32..=8, symmetric: bool, weight: bool, grouped: bool, search: bool, ratio in 0.5f64..=1.0, seed in any::<u64>(),
    ) {
        let spec = if weight { QuantSpec::weight(bits, symmetric) } else { QuantSpec::activation(bits, symmetric) };
        let spec = if grouped { spec.grouped(8) } else { spec };
        let spec = spec.clipped(if search { Clip::Search } else { Clip::Ratio(ratio) });
        let mut x = ops::randn([4, 24], seed).into_vec::<f64>().unwrap();
        x[..24].fill(0.0); // an empty row, and an outlier
        x[30] *= 1000.0;
        let x = Tensor::from_vec(x, [4, 24]).unwrap();
        for dtype in [DType::F64, DType::F32] {
            laws::quantizer(&x.to_dtype(dtype).unwrap(), &spec).unwrap();
        }
    }

    #[test]
    fn cayley_reaches_the_procrustes_optimum(n in 1usize..12, seed in any::<u64>(), momentum in prop::sample::select(vec![0.0, 0.5])) {
        let mut optimizer = CayleySgd::new(Mode::Default).with_momentum(momentum).unwrap();
        laws::procrustes(&mut optimizer, n, seed, 0.25, 3000).unwrap();
    }

    #[test]
    fn cayley_modes_agree_to_first_order(n in 2usize..24, seed in any::<u64>()) {
        let (x, g) = (Orthogonal.random_point(1, n, seed).unwrap(), ops::randn([1, n, n], !seed));
        let lr = 1e-3 / n as f64;
        let after = |mode| {
            let mut params = [x.clone()];
            CayleySgd::new(mode).step(&mut params, vec![g.clone()], lr).unwrap();
            params[0].clone()
        };
        let (parity, default) = (after(Mode::Parity), after(Mode::Default));
        let moved = distance(&default, &x);
        prop_assert!(distance(&parity, &default) <= moved * moved + 1e-7, "{} apart after {moved}", distance(&parity, &default));
        // Both moved down the Riemannian gradient: W Xᵀ transposed is −grad.
        let grad = Orthogonal.riemannian_gradient(&x, &g).unwrap();
        let down = Tensor::axpby(1.0, x.clone(), -lr, grad).unwrap();
        prop_assert!(distance(&default, &down) <= moved * moved + 1e-11);
    }

    #[test]
    fn optimizers_descend(n in 1usize..12, seed in any::<u64>()) {
        for mut optimizer in optim::all() {
            // A rate that is an angle, or one that a gradient of about 4 an entry turns into one.
            let lr = if optimizer.is_scale_free() { 0.01 } else { 1e-3 };
            laws::descends(&mut *optimizer, n, seed, lr, 8).unwrap();
        }
        laws::descends(&mut RiemannianSgd::polar().with_momentum(0.9).unwrap(), n, seed, 1e-3, 8).unwrap();
        laws::descends(&mut QrOrth::new().with_momentum(0.9).unwrap(), n, seed, 1e-3, 8).unwrap();
    }

    #[test]
    fn optimizers_reach_the_procrustes_optimum(n in 1usize..12, seed in any::<u64>()) {
        for mut optimizer in optim::all() {
            match (optimizer.name(), optimizer.is_scale_free()) {
                ("cayley-parity", _) => {} // drifts, and has goldens of its own
                // Steps that do not shorten with the gradient must be made to.
                (_, true) => laws::procrustes_scheduled(&mut *optimizer, n, seed, 0.1, Schedule::Linear, 3000).unwrap(),
                // The latent matrix grows, and steps shrink with it: on some starts most of the way is slow.
                ("qr-orth", _) => laws::procrustes(&mut *optimizer, n, seed, 0.1, 30_000).unwrap(),
                _ => laws::procrustes(&mut *optimizer, n, seed, 0.25, 3000).unwrap(),
            }
        }
        laws::procrustes(&mut RiemannianSgd::qr().with_momentum(0.5).unwrap(), n, seed, 0.25, 3000).unwrap();
        laws::procrustes(&mut QrOrth::new().with_momentum(0.5).unwrap(), n, seed, 0.1, 30_000).unwrap();
    }

    #[test]
    fn qr_has_the_gradient_it_says(n in 1usize..10, seed in any::<u64>()) {
        // d/dt ⟨G, qf(Z + tD)⟩ = ⟨dL/dZ, D⟩, in the middle of nowhere.
        let (z, g, d) = (ops::randn([1, n, n], seed), ops::randn([1, n, n], seed ^ 1), ops::randn([1, n, n], seed ^ 2));
        let inner = |a: &Tensor, b: &Tensor| -> f64 { a.to_f64_vec().unwrap().iter().zip(b.to_f64_vec().unwrap()).map(|(a, b)| a * b).sum() };
        let along = |t: f64| Orthogonal.qr(&Tensor::axpby(1.0, z.clone(), t, d.clone()).unwrap()).unwrap();
        let (x, r) = along(0.0);
        // Near a singular matrix the differences are no measure.
        let smallest = (0..n).map(|i| r.as_slice::<f64>().unwrap()[i * (n + 1)]).fold(f64::INFINITY, f64::min);
        prop_assume!(smallest > 0.1);
        let r_inverse = {
            let lower = linalg::cholesky_qr(&z).unwrap();
            prop_assert!(distance(&lower.0, &x) < 1e-6);
            lower.1
        };
        let slope = inner(&gradient_through_qr(&x, &g, &r_inverse).unwrap(), &d);
        let value = |t: f64| inner(&g, &along(t).0);
        let h = 1e-5;
        let numeric = (8.0 * (value(h) - value(-h)) - (value(2.0 * h) - value(-2.0 * h))) / (12.0 * h);
        prop_assert!((slope - numeric).abs() <= 1e-5 * (1.0 + slope.abs() + 1.0 / smallest.powi(2)), "{slope} and {numeric}");
    }

    #[test]
    fn statistics_have_no_direction_of_their_own(n in 2usize..10, seed in any::<u64>(), factor in 1e-3f64..1e3) {
        // Scaling the loss changes nothing but the bound of ε.
        for make in [|| RiemannianAdam::polar(), || RiemannianAdam::polar().elementwise()] {
            let run = |factor: f64| {
                let (mut o, mut params) = (make(), [Orthogonal.random_point(2, n, seed).unwrap()]);
                for step in 0..4u64 {
                    let g = ops::randn([2, n, n], seed ^ step).scale(factor).unwrap();
                    o.step(&mut params, vec![g], 0.02).unwrap();
                }
                params[0].clone()
            };
            prop_assert!(distance(&run(1.0), &run(factor)) < 1e-5);
        }
    }

    #[test]
    fn optimizers_resume(seed in any::<u64>(), momentum in prop::sample::select(vec![0.0, 0.9])) {
        for dtype in [DType::F64, DType::F32] {
            laws::resumes(&|| Ok(Box::new(CayleySgd::new(Mode::Default).with_momentum(momentum)?)), dtype, seed, 3).unwrap();
            laws::resumes(&|| Ok(Box::new(RiemannianSgd::qr().with_momentum(momentum)?)), dtype, seed, 3).unwrap();
            laws::resumes(&|| Ok(Box::new(QrOrth::new().with_momentum(momentum)?)), dtype, seed, 3).unwrap();
            for name in optim::all().iter().map(|o| o.name()) {
                laws::resumes(&|| optim::by_name(name), dtype, seed, 3).unwrap();
            }
        }
    }
}

#[test]
fn broken_laws_are_noticed() {
    struct Wrong(f64, f64);
    impl Retraction for Wrong {
        fn name(&self) -> &str {
            "wrong"
        }
        fn retract(&self, x: &Tensor, tangent: &Tensor) -> spinquant::Result<Tensor> {
            let y = Tensor::axpby(self.1, x.clone(), self.0, tangent.clone())?;
            if self.1 == 1.0 && self.0 == 1.0 { Ok(y) } else { Orthogonal.project_point(&y) }
        }
    }
    let says = |r: Wrong, part: &str| {
        let message = laws::retraction(&r, 6, 1).unwrap_err().to_string();
        assert!(message.contains(part), "{message}");
    };
    says(Wrong(1.0, 1.0), "max|YᵀY − I|"); // leaves the manifold
    says(Wrong(0.99, 1.0), "distance from the tangent"); // falls short
    says(Wrong(1.0, -1.0), "distance from the tangent after 0:"); // starts elsewhere
    // Six steps are not enough, and parity mode drifts.
    assert!(laws::procrustes(&mut CayleySgd::new(Mode::Default), 8, 1, 0.01, 6).is_err());
    assert!(laws::stays_orthogonal(&mut CayleySgd::new(Mode::Parity), 4, 1, 1.0, 1.5, 50, 1e-6).is_err());
}

#[test]
fn cayley_keeps_f32_orthogonal() {
    for (n, steps) in [(1, 5), (2, 50), (3, 50), (17, 50), (64, 30), (384, 6)] {
        for (size, lr, momentum) in [(1.0, 1.5, 0.0), (1e-4, 1.5, 0.9), (1e3, 1.5, 0.9), (1.0, 0.01, 0.0)] {
            let mut optimizer = CayleySgd::new(Mode::Default).with_momentum(momentum).unwrap();
            laws::stays_orthogonal(&mut optimizer, n, 1, size, lr, steps, 1e-6).unwrap();
        }
    }
    // Identity-like rotations have rounding errors of their own.
    let mut params = [Tensor::eye(64, DType::F32).unwrap().reshape([1, 64, 64]).unwrap()];
    let mut optimizer = CayleySgd::new(Mode::Default);
    optimizer.step(&mut params, vec![ops::randn([1, 64, 64], 2).to_dtype(DType::F32).unwrap()], 1e-3).unwrap();
    assert!(optimizer.orthogonality_error() <= 1e-6);
}

#[test]
fn optimizers_keep_f32_orthogonal() {
    for (n, steps) in [(1, 5), (2, 50), (17, 50), (64, 30), (384, 4)] {
        for (size, lr) in [(1.0, 1.5), (1e-4, 1.5), (1e3, 1.5), (1.0, 0.01), (0.0, 1.5)] {
            for mut optimizer in optim::all().into_iter().filter(|o| o.name() != "cayley-parity") {
                laws::stays_orthogonal(&mut *optimizer, n, 1, size, lr, steps, 1e-6).unwrap();
            }
            let mut optimizer = QrOrth::new().with_momentum(0.9).unwrap();
            laws::stays_orthogonal(&mut optimizer, n, 1, size, lr, steps, 1e-6).unwrap();
        }
    }
}

#[test]
fn optimizers_go_by_their_names() {
    for o in optim::all() {
        assert_eq!(optim::by_name(o.name()).unwrap().name(), o.name());
    }
    let message = optim::by_name("lbfgs").err().unwrap().to_string();
    assert!(optim::all().iter().all(|o| message.contains(o.name())) && message.contains("\"lbfgs\""), "{message}");
    // A broken optimiser is noticed: one that climbs, one that stays.
    struct Wrong(f64, RiemannianSgd);
    impl Optimizer for Wrong {
        fn name(&self) -> &str {
            "wrong"
        }
        fn step(&mut self, params: &mut [Tensor], grads: Vec<Tensor>, lr: f64) -> spinquant::Result<()> {
            let grads = grads.into_iter().map(|g| g.scale(self.0)).collect::<spinquant::Result<_>>()?;
            self.1.step(params, grads, lr)
        }
        fn state(&self) -> State {
            self.1.state()
        }
        fn load_state(&mut self, _: State) -> spinquant::Result<()> {
            Ok(())
        }
    }
    assert!(laws::descends(&mut Wrong(-1.0, RiemannianSgd::polar()), 6, 1, 1e-3, 3).is_err());
    assert!(laws::descends(&mut Wrong(0.0, RiemannianSgd::polar()), 6, 1, 1e-3, 3).is_err());
}

#[test]
fn optimizers_refuse_what_does_not_fit() {
    let eye = || Tensor::eye(4, DType::F64).unwrap().reshape([1, 4, 4]).unwrap();
    for mut optimizer in optim::all() {
        let name = optimizer.name().to_string();
        let mut params = [eye()];
        assert!(optimizer.step(&mut params, vec![], 1.0).is_err());
        assert!(optimizer.step(&mut params, vec![ops::randn([1, 3, 3], 0)], 1.0).is_err());
        assert!(optimizer.step(&mut params, vec![ops::randn([1, 4, 4], 0).to_dtype(DType::F32).unwrap()], 1.0).is_err());
        assert!(optimizer.step(&mut params, vec![eye()], f64::NAN).is_err());
        let mut nan = ops::randn([1, 4, 4], 0).into_vec::<f64>().unwrap();
        nan[5] = f64::NAN;
        let e = optimizer.step(&mut params, vec![Tensor::from_vec(nan, [1, 4, 4]).unwrap()], 1.0);
        assert!(e.is_err(), "{name} takes NaN gradients");
        assert_eq!(params[0].to_vec::<f64>().unwrap(), eye().to_vec::<f64>().unwrap(), "a refused step changes nothing");
        assert!(optimizer.load_state(State::default()).is_err());
        for other in optim::all().iter().filter(|o| o.name() != name) {
            assert!(optimizer.load_state(other.state()).is_err(), "{name} takes a state of {}", other.name());
        }
        // Statistics of other sizes, or of more parameters.
        let mut small = optim::by_name(&name).unwrap();
        let mut three = [Tensor::eye(3, DType::F64).unwrap().reshape([1, 3, 3]).unwrap()];
        small.step(&mut three, vec![ops::randn([1, 3, 3], 0)], 0.1).unwrap();
        optimizer.load_state(small.state()).unwrap();
        if !small.state().tensors.is_empty() {
            assert!(
                optimizer.step(&mut [eye()], vec![ops::randn([1, 4, 4], 0)], 0.1).is_err(),
                "{name} takes another's statistics"
            );
        }
    }
    assert!(RiemannianSgd::qr().with_momentum(1.0).is_err() && QrOrth::new().with_momentum(-0.1).is_err());
    assert!(RiemannianAdam::qr().with_betas(0.9, 1.0).is_err());
    assert!(CayleySgd::new(Mode::Default).with_momentum(1.0).is_err());
    assert!(CayleySgd::new(Mode::Parity).with_momentum(0.9).is_err());
}

#[test]
fn far_matrices_project_and_singular_ones_do_not() {
    // Singular values from 1e-6 to 1e3.
    let n = 20;
    let (u, v) = (Orthogonal.random_point(1, n, 1).unwrap(), Orthogonal.random_point(1, n, 2).unwrap());
    let mut scaled = u.to_vec::<f64>().unwrap();
    scaled.iter_mut().enumerate().for_each(|(i, x)| *x *= 10f64.powf(-6.0 + 9.0 * (i % n) as f64 / (n - 1) as f64));
    let x = linalg::matmul::product(&Tensor::from_vec(scaled, [1, n, n]).unwrap(), false, &v, true, false, DType::F64).unwrap();
    let want = linalg::matmul::product(&u, false, &v, true, false, DType::F64).unwrap();
    assert!(distance(&Orthogonal.project_point(&x).unwrap(), &want) < 1e-6);
    assert!(Orthogonal.project_point(&Tensor::from_vec(vec![1.0, 2.0, 2.0, 4.0], [1, 2, 2]).unwrap()).is_err());
    assert!(Orthogonal.project_point(&Tensor::from_vec(vec![f64::NAN; 4], [1, 2, 2]).unwrap()).is_err());
    // Both components of O(n) are drawn, every matrix by itself.
    let points = Orthogonal.random_point(32, 5, 3).unwrap();
    let signs = Orthogonal.determinant_signs(&points).unwrap();
    assert!(signs.contains(&1.0) && signs.contains(&-1.0));
    assert_eq!(
        points.slice(7, 1).unwrap().to_vec::<f64>().unwrap(),
        Orthogonal.random_point(8, 5, 3).unwrap().slice(7, 1).unwrap().to_vec::<f64>().unwrap()
    );
}

#[test]
fn rotations_start_orthogonal_and_depend_on_the_seed() {
    let (c, d, l) = (56, 16, 3);
    for make in [Rotations::random_orthogonal, Rotations::random_hadamard] {
        let r = make(c, d, l, 7).unwrap();
        r.check(c, d, l, 1e-13).unwrap();
        assert_eq!(distance(&r.r1, &make(c, d, l, 7).unwrap().r1), 0.0);
        assert!(distance(&r.r1, &make(c, d, l, 8).unwrap().r1) > 1.0);
        assert!(distance(&r.r2.index(0).unwrap(), &r.r2.index(1).unwrap()) > 0.1, "layers differ");
        let back = Rotations::from_params(&r.as_params().unwrap()).unwrap();
        assert_eq!((back.r1.shape(), distance(&back.r1, &r.r1), distance(&back.r2, &r.r2)), (r.r1.shape(), 0.0, 0.0));
    }
    Rotations::identity(c, d, l).unwrap().check(c, d, l, 0.0).unwrap();
    let blocks = Rotations::random_block_hadamard(c, d, l, 8, 7).unwrap();
    blocks.check(c, d, l, 1e-13).unwrap();
    let r1 = blocks.r1.to_vec::<f64>().unwrap();
    assert!((0..c * c).all(|i| (i / c / 8 == i % c / 8) == (r1[i] != 0.0)), "blocks of 8, full, and nothing else");
    let signs = |block: usize| (8 * block..8 * block + 8).map(|i| r1[i * c + 8 * block] > 0.0).collect::<Vec<_>>();
    assert!((1..7).any(|block| signs(block) != signs(0)), "every block has signs of its own");
    assert!(distance(&blocks.r1, &Rotations::random_block_hadamard(c, d, l, 8, 8).unwrap().r1) > 1.0);
    assert!(Rotations::random_block_hadamard(c, d, l, 9, 7).is_err() && Rotations::random_block_hadamard(c, d, l, 0, 7).is_err());
    // Block-diagonal: no Hadamard matrix of this size is known here.
    Rotations::random_hadamard(214, 6, 1, 0).unwrap().check(214, 6, 1, 1e-13).unwrap();
    assert!(Rotations::from_params(&[]).is_err());
}

#[test]
fn rotations_survive_a_file_and_bad_files_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("R.safetensors");
    for dtype in [DType::F64, DType::F32] {
        let r = Rotations::random_orthogonal(24, 8, 2, 1).unwrap().to_dtype(dtype).unwrap();
        let notes: BTreeMap<_, _> = [("scheme".to_string(), "W4A4KV4".to_string())].into();
        r.save_with(&path, &notes).unwrap();
        let (back, metadata) = Rotations::load_with(&path).unwrap();
        assert_eq!((back.r1.dtype(), distance(&back.r1, &r.r1), distance(&back.r2, &r.r2)), (dtype, 0.0, 0.0));
        assert_eq!(metadata["scheme"], "W4A4KV4");
    }
    let says = |result: spinquant::Result<Rotations>, part: &str| {
        let message = result.expect_err(part).to_string();
        assert!(message.contains(part) && message.contains("safetensors"), "{message}");
    };
    let good = std::fs::read(&path).unwrap();
    let bad = folder.path().join("bad.safetensors");
    says(Rotations::load(&bad), "No such file");
    std::fs::write(&bad, &good[..good.len() - 5]).unwrap();
    says(Rotations::load(&bad), "not a whole safetensors file");
    std::fs::write(&bad, b"pickle").unwrap();
    says(Rotations::load(&bad), "not a whole safetensors file");
    let write = |tensors: &[(&str, Tensor)]| {
        let tensors = tensors.iter().map(|(k, t)| (k.to_string(), t.clone())).collect();
        spinquant::io::save_tensors(&bad, &tensors, &BTreeMap::new()).unwrap();
        Rotations::load(&bad)
    };
    let (r1, r2) = (ops::randn([4, 4], 1), ops::randn([2, 2, 2], 2));
    says(write(&[("R2", r2.clone())]), "holds no R1");
    says(write(&[("R1", r1.clone())]), "holds no R2");
    says(write(&[("R1", ops::randn([4, 5], 1)), ("R2", r2.clone())]), "R1: expected shape [C, C], got [4, 5]");
    says(write(&[("R1", r1.to_dtype(DType::BF16).unwrap()), ("R2", r2.clone())]), "expected dtype f32 or f64, got bf16");
    let nan = Tensor::from_vec(vec![f64::NAN; 8], [2, 2, 2]).unwrap();
    says(write(&[("R1", r1), ("R2", nan)]), "R2 holds NaN");

    let r = Rotations::random_orthogonal(24, 8, 4, 1).unwrap();
    let says = |result: spinquant::Result<()>, parts: [&str; 2]| {
        let message = result.unwrap_err().to_string();
        assert!(parts.iter().all(|p| message.contains(p)), "{message}");
    };
    says(r.check(32, 8, 4, 1e-4), ["R1", "[32, 32]"]);
    says(r.check(24, 8, 5, 1e-4), ["R2", "[5, 8, 8]"]);
    let mut off = r.r2.to_vec::<f64>().unwrap();
    off[3 * 64] += 0.01;
    let off = Rotations::new(r.r1.clone(), Tensor::from_vec(off, [4, 8, 8]).unwrap());
    says(off.check(24, 8, 4, 1e-4), ["R2[3] is not orthogonal: max|RᵀR−I| =", "at most 1e-4 is accepted"]);
}
