//! Every operation's backward pass against central differences in f64, and the check itself against a wrong gradient.

use spinquant::tape::{Grads, Inputs, Op, Saved, checkpoint};
use spinquant::{DType, Device, Result, Tape, Tensor, check, ops};

#[test]
fn every_case() {
    let cases: Vec<_> = ops::cases().into_iter().filter(|c| c.size == ops::Size::Small).collect();
    assert!(cases.len() > 50, "only {} cases", cases.len());
    for case in cases {
        let operands = case.operands(DType::F64, &Device::Cpu).unwrap();
        check::gradients(&operands, |v| case.build(v)).unwrap_or_else(|e| panic!("{case:?}: {e}"));
    }
}

struct WrongSquare;

impl Op for WrongSquare {
    fn name(&self) -> &'static str {
        "wrong square"
    }
    fn cpu(&self, inputs: Inputs, save: &mut Saved) -> Result<Tensor> {
        let [x] = inputs.take()?;
        save.push(x.clone());
        let y = x.to_vec::<f64>()?.iter().map(|x| x * x).collect();
        Tensor::from_vec(y, x.shape())
    }
    fn backward(&self, saved: Saved, dy: Tensor, _: &[bool]) -> Result<Grads> {
        let [x] = saved.take()?;
        let x = x.to_vec::<f64>()?;
        let dx = x.iter().zip(dy.to_vec::<f64>()?).map(|(x, dy)| 2.001 * x * dy).collect();
        Ok(vec![Some(Tensor::from_vec(dx, dy.shape())?)])
    }
}

#[test]
fn a_wrong_gradient_is_noticed() {
    let error = check::gradients(&[ops::randn([5], 0)], |mut v| v[0].tape().record(WrongSquare, vec![v.remove(0)]));
    assert!(error.unwrap_err().to_string().contains("differences"));
}

#[test]
fn misuse_of_the_tape_is_an_error() {
    let (one, two) = (Tape::new(), Tape::new());
    let x = one.variable(Tensor::scalar(1f64));
    let y = two.variable(Tensor::scalar(1f64));
    assert!(x.clone().add(y).is_err(), "values of two tapes");
    let z = x.clone().add(x.clone()).unwrap();
    one.backward(z.clone()).unwrap();
    assert!(one.backward(z).is_err(), "second playback");
    assert!(x.clone().add(x).is_err(), "recording after playback");
    let tape = Tape::new();
    let c = tape.constant(Tensor::scalar(1f64));
    let v = tape.variable(Tensor::scalar(1f64));
    let mut g = tape.backward(c.clone().add(v).unwrap()).unwrap();
    assert!(g.take(&c).is_err(), "gradient of a constant");
    let tape = Tape::new();
    let v = tape.variable(ops::randn([3], 0));
    assert!(tape.backward(v).is_err(), "gradient of a vector");
}

#[test]
fn checkpoints_change_no_bit() {
    fn block<'t>(v: Vec<spinquant::Var<'t>>) -> Result<spinquant::Var<'t>> {
        let [x, w]: [_; 2] = v.try_into().ok().unwrap();
        x.clone().linear(w)?.hadamard()?.add(x)
    }
    let (x, w) = (ops::randn([6, 12], 1), ops::randn([12, 12], 2));
    let run = |nested: bool| {
        let tape = Tape::new();
        let (x, w) = (tape.variable(x.clone()), tape.variable(w.clone()));
        let f = |v| if nested { checkpoint(&tape, v, |_, v| block(v)) } else { block(v) };
        let y = f(vec![f(vec![x.clone(), w.clone()]).unwrap(), w.clone()]).unwrap();
        let value = y.value().to_vec::<f64>().unwrap();
        let mut g = tape.backward_from(y, ops::randn([6, 12], 3)).unwrap();
        (value, g.take(&x).unwrap().to_vec::<f64>().unwrap(), g.take(&w).unwrap().to_vec::<f64>().unwrap())
    };
    assert_eq!(run(true), run(false));
}
