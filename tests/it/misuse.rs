//! Public functions on arguments of every kind give a result or an error: sizes of 0, sizes beyond memory, wrong ranks and types,
//! another tape. None panics, none ends the process, none answers wrongly.

use std::sync::Arc;

use proptest::prelude::*;
use spinquant::grid::Quantized;
use spinquant::hadamard::Hadamard;
use spinquant::linalg::{self, Digits};
use spinquant::llama::LlamaConfig;
use spinquant::manifold::{Manifold, Orthogonal, retractions};
use spinquant::ops::kl_top::Rest;
use spinquant::ops::spread::Measure;
use spinquant::ops::{attention::attention, cross_entropy, fake_quant, hadamard, linear_cross_entropy, rope::Rope};
use spinquant::optim;
use spinquant::quant::{Clip, Gptq, Hessian, QuantSpec, Rtn, WeightQuantizer};
use spinquant::rotation::Rotations;
use spinquant::tape::{Inputs, Saved};
use spinquant::{DType, Device, Error, Result, Tape, Tensor, Var, data, ops};

use crate::common::need::cases;
use crate::common::tiny;

const TYPES: [DType; 5] = [DType::F64, DType::F32, DType::F16, DType::BF16, DType::U32];

/// Sizes that multiply to anything.
fn extents() -> impl Strategy<Value = usize> {
    prop::sample::select(vec![0, 1, 2, 3, 7, 1 << 20, 1 << 32, (1 << 33) + 1, 1 << 62, usize::MAX / 2 + 1, usize::MAX])
}

/// A small tensor of any rank and type; `U32` ones hold small numbers.
fn tensors() -> impl Strategy<Value = Tensor> {
    let extent = prop::sample::select(vec![0usize, 1, 2, 2, 3, 4, 4, 8]);
    (prop::collection::vec(extent, 0..4), prop::sample::select(TYPES.to_vec()), 0u64..1000).prop_map(|(shape, dtype, seed)| {
        let x = ops::randn(shape.clone(), seed);
        match dtype {
            DType::U32 => Tensor::from_vec((0..x.len() as u32).map(|i| i % 3).collect::<Vec<u32>>(), shape).unwrap(),
            dtype => x.to_dtype(dtype).unwrap(),
        }
    })
}

/// `[k, n, n]` or nearly.
fn batches() -> impl Strategy<Value = Tensor> {
    (0usize..3, 0usize..5, 0usize..5, any::<bool>(), prop::sample::select(TYPES.to_vec())).prop_map(|(k, n, m, square, dtype)| {
        let x = ops::randn([k, n, if square { n } else { m }], 5);
        if dtype == DType::U32 { Tensor::zeros(x.shape(), dtype, &Device::Cpu).unwrap() } else { x.to_dtype(dtype).unwrap() }
    })
}

fn specs() -> impl Strategy<Value = QuantSpec> {
    let ratio = prop::sample::select(vec![0.0, 1.0, 0.5, -1.0, f64::NAN, f64::INFINITY]);
    let clip = prop_oneof![ratio.prop_map(Clip::Ratio), Just(Clip::Search)];
    let group = prop::sample::select(vec![None, Some(0), Some(1), Some(2), Some(3), Some(usize::MAX)]);
    (prop::sample::select(vec![0u32, 1, 2, 4, 8, 9, 16, 31, 32, u32::MAX]), any::<bool>(), group, clip, any::<bool>()).prop_map(
        |(bits, symmetric, group, clip, weight)| {
            let spec = if weight { QuantSpec::weight(bits, symmetric) } else { QuantSpec::activation(bits, symmetric) };
            QuantSpec { group, ..spec.clipped(clip) }
        },
    )
}

/// Every operation, of whatever it is given.
type Operation = for<'t> fn(Vec<Var<'t>>, usize, &QuantSpec) -> Result<Var<'t>>;

fn targets(x: &Var<'_>) -> Arc<[i32]> {
    (0..x.value().rows().min(64) as i32).map(|i| i % 4 - 1).collect::<Vec<_>>().into()
}

const OPERATIONS: [(&str, Operation); 22] = [
    ("add", |v, _, _| v[0].clone().add(v[1].clone())),
    ("scale", |v, n, _| v[0].clone().scale(n as f64)),
    ("matmul", |v, _, _| v[0].clone().matmul(v[1].clone())),
    ("matmul_as", |v, n, _| v[0].clone().matmul_as(v[1].clone(), TYPES[n % 5])),
    ("transpose_matmul", |v, _, _| v[0].clone().transpose_matmul(v[1].clone())),
    ("linear", |v, _, _| v[0].clone().linear(v[1].clone())),
    ("add_linear", |v, _, _| v[2].clone().add_linear(v[0].clone(), v[1].clone())),
    ("add_linear_last", |v, _, _| v[2].clone().add_linear_last(v[0].clone(), v[1].clone())),
    ("attention", |v, n, _| attention(v[0].clone(), v[1].clone(), v[2].clone(), n, None)),
    ("embedding", |v, n, _| v[0].clone().embedding(vec![0, n as u32].into())),
    ("cross_entropy", |v, _, _| v[0].clone().cross_entropy(targets(&v[0]))),
    ("linear_cross_entropy", |v, _, _| v[0].clone().linear_cross_entropy(v[1].clone(), targets(&v[0]))),
    ("kl_divergence", |v, _, _| v[0].clone().kl_divergence(v[1].value().clone())),
    ("kl_top", |v, n, _| v[0].clone().kl_top(v[1].value().clone(), n, Rest::Event)),
    ("fake_quant", |v, _, spec| v[0].clone().fake_quant(spec)),
    ("hadamard", |v, _, _| v[0].clone().hadamard()),
    ("hadamard_fake_quant", |v, _, spec| v[0].clone().hadamard_fake_quant(spec)),
    ("rms_norm", |v, _, _| v[0].clone().rms_norm_gain(1e-5, Some(v[1].value()))),
    ("rope", |v, n, _| v[0].clone().heads(n)?.rope(&Rope::new(&[1.0, 0.5], n, DType::F32, &Device::Cpu)?)),
    ("spread", |v, _, _| v[0].clone().spread(Measure::Whip)),
    ("swiglu", |v, _, _| v[0].clone().swiglu(v[1].clone())),
    ("to_dtype", |v, n, _| v[0].clone().to_dtype(TYPES[n % 5])),
];

proptest! {
    #![proptest_config(cases(256))]

    #[test]
    fn shapes(shape in prop::collection::vec(extents(), 0..5), first in extents(), many in extents(), small in tensors(), t in 0usize..5) {
        let values: Option<usize> = shape.iter().try_fold(1usize, |n, &e| n.checked_mul(e));
        let fits = |n: usize| values == Some(n);
        prop_assert!(fits(2) || Tensor::from_vec(vec![1f32, 2.0], shape.clone()).is_err());
        prop_assert!(fits(small.len()) || small.clone().reshape(shape.clone()).is_err());
        // Nothing too large for any machine is given; what is small is. (What lies between would be, and take long.)
        if values.is_none_or(|n| n <= 1 << 21 || n >= 1 << 44) {
            match Tensor::zeros(shape.clone(), TYPES[t], &Device::Cpu) {
                Ok(z) => prop_assert!(fits(z.len()) && z.rows() * z.cols() == z.len()),
                Err(e) => prop_assert!(values.is_none_or(|n| n == 0 || n >= 1 << 44), "{e}"),
            }
        }
        prop_assert!(first.checked_add(many).is_some_and(|end| end <= small.shape().first().copied().unwrap_or(0)) || small.slice(first, many).is_err());
        prop_assert!(first < small.shape().first().copied().unwrap_or(0) || small.index(first).is_err());
        let _ = (small.item(), small.to_f64_vec(), small.as_slice::<f32>().map(<[f32]>::len), small.to_vec::<u32>());
        let _ = (Tensor::eye(first.min(64), TYPES[t]), Tensor::eye(first.max(1 << 26), TYPES[t]).map(drop));
    }

    #[test]
    fn tensors_together(a in tensors(), b in tensors(), to in 0usize..5) {
        let _ = (Tensor::stack(&[a.clone(), b.clone()]), Tensor::concat(&[a.clone(), b.clone()]), Tensor::concat(&[a.clone(), a.clone()]));
        let _ = (a.to_dtype(TYPES[to]), Tensor::axpby(1.0, a.clone(), 2.0, b.clone()), a.clone().scale(2.0));
        for flags in 0..8 {
            let _ = linalg::matmul::product(&a, flags & 1 > 0, &b, flags & 2 > 0, flags & 4 > 0, TYPES[to]);
        }
    }

    #[test]
    fn operations(x in prop::collection::vec(tensors(), 3..4), n in 0usize..5, spec in specs(), variable in 1usize..8) {
        for (name, operation) in OPERATIONS {
            let tape = Tape::new();
            let on = |(i, x): (usize, &Tensor)| if variable >> i & 1 > 0 { tape.variable(x.clone()) } else { tape.constant(x.clone()) };
            let v: Vec<_> = x.iter().enumerate().map(on).collect();
            let Ok(y) = operation(v.clone(), n, &spec) else { continue };
            let dy = y.value().to_dtype(y.value().dtype()).unwrap();
            let Ok(mut grads) = tape.backward_from(y, dy) else { continue };
            for (x, v) in x.iter().zip(&v).filter(|(_, v)| v.requires_grad()) {
                let g = grads.take(v).unwrap();
                prop_assert_eq!((g.shape(), g.dtype()), (x.shape(), x.dtype()), "{}", name);
                prop_assert!(grads.take(v).is_err(), "{}: a gradient was taken twice", name);
            }
        }
        let (rows, ids) = (vec![0i32; x[0].rows().min(64)], [x[0].clone(), x[1].clone()]);
        let _ = (cross_entropy::token_losses(&x[0], &rows), linear_cross_entropy::linear_token_losses(&x[0], &x[1], &rows));
        let _ = (ops::narrowest(&ids), ops::narrowest(&[]).is_err());
    }

    #[test]
    fn quantisers(w in tensors(), h in tensors(), spec in specs(), sizes in (0usize..9, 0usize..9, 0usize..9, 0usize..9)) {
        let _ = (spec.max_code(), spec.min_code(), spec.group_size(w.cols()), spec.group_size(0));
        if let Ok(q) = fake_quant::quantize(&w, &spec) {
            let exact = w.dtype() == DType::F64;
            let back = q.dequantize().unwrap();
            prop_assert_eq!((back.shape(), back.dtype() == DType::F64), (w.shape(), exact));
        }
        let _ = Rtn.quantize(&[&w], &spec, None);
        let _ = Gptq::default().quantize_one(&w, &spec, &h);
        let mut hessian = Hessian::new(sizes.0);
        let _ = hessian.add(&w).and_then(|()| hessian.finish(sizes.1));
        // Fields are public: any numbers may come together.
        let group = |n| Tensor::from_vec(vec![0.5f32; n], [n]).unwrap();
        let (codes, scales, zeros, group_size) = sizes;
        let q = Quantized { shape: w.shape().to_vec(), group: group_size, codes: vec![1; codes], scale: group(scales), zero: group(zeros) };
        let whole = codes == w.len() && group_size > 0 && codes == scales * group_size && scales == zeros;
        prop_assert_eq!(q.dequantize().is_ok(), whole, "{:?} {:?}", q, w);
        let _ = fake_quant::code_differences(&spec, &w, &h, &w);
    }

    #[test]
    fn rotations(r1 in tensors(), r2 in tensors(), a in extents(), b in extents(), c in 0usize..3) {
        let r = Rotations::new(r1, r2);
        let _ = (r.hidden(), r.head_dim(), r.layers(), r.as_params(), r.orthogonality_errors(), r.report(), r.projected(0.1));
        let _ = (r.check(2, 2, 2, f64::NAN), Rotations::from_params(&[r.r1.clone(), r.r2.clone()]), Rotations::from_params(&[]));
        // What could be made would take the machine's memory or hours.
        let (a, b) = (if a > 8 { a.max(1 << 32) } else { a }, if b > 8 { b.max(1 << 32) } else { b });
        let made = [
            Rotations::identity(a, b, c),
            Rotations::random_orthogonal(a, b, c, 1),
            Rotations::random_hadamard(a, b, c, 1),
            Rotations::random_block_hadamard(a, b, c, 2, 1),
        ];
        for r in made.into_iter().flatten() {
            prop_assert_eq!((r.hidden(), r.layers()), (a, c));
            prop_assert!(r.orthogonality_errors().is_ok() && r.report().is_ok());
        }
        let _ = (Orthogonal.random_point(c, a, 1), Orthogonal.random_hadamard(c, a, 1));
    }

    #[test]
    fn hadamards(n in any::<usize>(), x in tensors(), extent in extents()) {
        for n in [n, extent, n >> 40] {
            let Ok(map) = Hadamard::new(n) else { continue };
            prop_assert_eq!(n % map.blocks(), 0);
            let words = map.k() * map.k().div_ceil(32);
            prop_assert_eq!(map.packed().len(), words * usize::from(map.k() > 1));
            prop_assert!(n == 3 || map.reference(&mut [0.0; 3], true).is_err());
            prop_assert!(n < 1 << 24 || map.dense().is_err());
            prop_assert_eq!(hadamard::transform(x.clone(), &map, false).is_ok(), x.cols() == n && x.dtype().is_float());
        }
    }

    #[test]
    fn batches_of_matrices(x in batches(), y in batches(), alpha in tensors()) {
        let _ = (linalg::product(&x, true, &y, false), linalg::rounded_product(&x, false, &y, true, Digits::Few));
        let _ = (linalg::transpose_axpby(1.0, &x, 2.0, Some(&y)), linalg::skew(&x), linalg::normalize_rows(x.clone()));
        let _ = (linalg::step_size(&x, 1.0), linalg::add_scaled(Some(x.clone()), &alpha, 1.0, &y), linalg::gram_residual(&x));
        let _ = (linalg::orthonormalize(x.clone(), 1e-3), linalg::mean_squares(&x), linalg::strictly_lower(&x));
        let _ = (linalg::adam(&x, &x, &y, [0.9; 2], [1.0; 2], 0.0), linalg::cholesky_qr(&x), linalg::inverse_norms(&x));
        let _ = (Orthogonal.project_point(&x), Orthogonal.project_tangent(&x, &y), Orthogonal.transport(&x, &y, &x), Orthogonal.distance(&x));
        let _ = (Orthogonal.qr(&x), Orthogonal.determinant_signs(&x));
        for retraction in retractions() {
            let _ = retraction.retract(&x, &y);
        }
        for mut optimizer in optim::all() {
            let _ = optimizer.step(&mut [x.clone()], vec![y.clone()], 0.1);
            let _ = optimizer.step(&mut [x.clone()], vec![], f64::NAN);
        }
    }

    #[test]
    fn configurations(sizes in prop::collection::vec(extents(), 7..8), rate in prop::sample::select(vec![0.0, 1e-5, 1e4, f64::NAN, -1.0, f64::INFINITY])) {
        let config = LlamaConfig {
            hidden_size: sizes[0], intermediate_size: sizes[1], layers: sizes[2], heads: sizes[3], kv_heads: sizes[4],
            max_position_embeddings: sizes[5], vocab_size: sizes[6], rope_theta: rate, rms_norm_eps: rate, ..tiny::config(2, 1, false)
        };
        let _ = (config.validate(), config.group(), config.frequencies(sizes[0]), config.to_json());
        let _ = (data::targets(&[1, 2, 3], sizes[0]), data::Windows::new(vec![1u32; 9], sizes[1]).map(|w| w.len()));
    }
}

#[test]
fn gradients_of_other_things() {
    let (a, b) = (Tape::new(), Tape::default());
    let x = |tape| Tape::variable(tape, Tensor::from_vec(vec![1f64, 2.0], [2]).unwrap());
    let (of_a, of_b) = (x(&a), x(&b));
    let unused = a.variable(Tensor::scalar(3f32));
    let twice = of_a.clone().scale(2.0).unwrap();
    let y = twice.clone().scale(3.0).unwrap();
    let mut grads = a.backward_from(y, Tensor::from_vec(vec![1f64, 1.0], [2]).unwrap()).unwrap();
    let refused = |grads: &mut spinquant::tape::Gradients, v: &Var<'_>, part: &str| {
        let error = grads.take(v).unwrap_err();
        assert!(matches!(&error, Error::Tape(m) if m.contains(part)), "{error}");
    };
    refused(&mut grads, &of_b, "another tape");
    refused(&mut grads, &twice, "result of an operation");
    refused(&mut grads, &b.constant(Tensor::scalar(1f64)), "constant");
    assert_eq!(grads.take(&of_a).unwrap().to_f64_vec().unwrap(), [6.0, 6.0]);
    refused(&mut grads, &of_a, "second time");
    assert_eq!(grads.take(&unused).unwrap().item().unwrap(), 0.0);
    refused(&mut grads, &unused, "second time");
}

/// The last operation of a function that runs for its gradients alone is checked like any other.
#[test]
fn last_operations_of_other_tapes() {
    let (ours, other) = (Tape::for_gradients(), Tape::new());
    let matrix = |seed| ops::randn([2, 2], seed);
    let c = ours.variable(matrix(1));
    for (x, w) in [(ours.variable(matrix(2)), other.variable(matrix(3))), (other.constant(matrix(2)), ours.variable(matrix(3)))] {
        let refused = c.clone().add_linear_last(x, w);
        assert!(matches!(&refused.map(drop), Err(Error::Tape(m)) if m.contains("another tape")));
    }
    let y = c.clone().add_linear_last(ours.variable(matrix(2)), ours.variable(matrix(3))).unwrap();
    ours.backward_from(y, matrix(4)).unwrap();
    assert!(matches!(c.clone().add_linear_last(c.clone(), c), Err(Error::Tape(_))), "the tape is spent");
}

/// Empty operands have empty gradients.
#[test]
fn backward_of_nothing() {
    for (shape, other) in [(vec![2, 0, 3], [3, 4]), (vec![0, 2, 3], [3, 4]), (vec![0, 3], [3, 4]), (vec![2, 0], [0, 4])] {
        let tape = Tape::new();
        let (a, b) = (tape.variable(ops::randn(shape.clone(), 1)), tape.variable(ops::randn(other, 2)));
        let y = a.clone().matmul(b.clone()).unwrap();
        let dy = y.value().clone();
        let mut grads = tape.backward_from(y, dy).unwrap();
        assert_eq!(grads.take(&a).unwrap().shape(), shape);
        assert_eq!(grads.take(&b).unwrap().to_f64_vec().unwrap(), vec![0.0; other[0] * other[1]]);
    }
    let huge = Tensor::zeros([1 << 33, 0], DType::F32, &Device::Cpu).unwrap();
    let wide = Tensor::zeros([0, 1 << 33], DType::F32, &Device::Cpu).unwrap();
    assert!(matches!(linalg::matmul::product(&huge, false, &wide, false, false, DType::F32), Err(Error::Shape { .. })));
    let _ = (Inputs::from(vec![]), Saved::default());
}
