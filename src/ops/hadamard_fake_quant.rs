//! Hadamard transform and fake quantisation in one pass: `y = Q(H x)`, `dx = Hᵀ dy` (straight through Q). On a GPU the transformed row
//! stays on chip and is not rounded to 16 bits in between; on the CPU it is the two operations one after the other.

use crate::device::Device;
use crate::grid::{Clip, QuantSpec};
use crate::hadamard::Hadamard;
use crate::ops::fake_quant::FakeQuant;
use crate::ops::hadamard::Transform;
use crate::ops::{Case, randn, widened, widened_backward};
use crate::tape::{Grads, Inputs, Op, Saved, Var};
use crate::{Error, Result, Tensor};

/// The operation.
#[derive(Clone, Debug)]
pub struct HadamardFakeQuant {
    /// The matrix; never transposed.
    pub map: Hadamard,
    /// The grid; its clip ratio is not searched.
    pub spec: QuantSpec,
}

impl HadamardFakeQuant {
    fn transform(&self) -> Transform {
        Transform { map: self.map.clone(), transpose: false }
    }
}

impl Op for HadamardFakeQuant {
    fn name(&self) -> &'static str {
        "hadamard_fake_quant"
    }
    fn forward(&self, inputs: Inputs, save: &mut Saved) -> Result<Tensor> {
        let [x] = inputs.take()?;
        if x.cols() != self.map.n() {
            return Err(Error::shape(self.name(), format!("[.., {}]", self.map.n()), x.shape()));
        }
        if self.spec.clip == Clip::Search {
            return Err(Error::argument(self.name(), "expected a clip ratio, got a search"));
        }
        self.spec.group_size(x.cols())?;
        match x.device() {
            Device::Cpu if x.dtype().is_half() => widened(self, vec![x].into(), save),
            Device::Cpu => {
                let h = self.transform().forward(vec![x].into(), save)?;
                FakeQuant(self.spec).forward(vec![h].into(), save)
            }
            // One pass needs one block a row; block-diagonal maps would quantise each block by itself.
            #[cfg(feature = "cuda")]
            Device::Cuda(_) if self.map.blocks() == 1 => {
                crate::device::cuda::ops::hadamard(x, &self.map, false, Some(&self.spec))
            }
            #[cfg(feature = "cuda")]
            Device::Cuda(_) => {
                let h = self.transform().forward(vec![x].into(), save)?;
                FakeQuant(self.spec).forward(vec![h].into(), save)
            }
        }
    }
    fn backward(&self, saved: Saved, dy: Tensor, want: &[bool]) -> Result<Grads> {
        if dy.device().is_cpu() && dy.dtype().is_half() {
            return widened_backward(self, saved, dy, want);
        }
        self.transform().backward(saved, dy, want)
    }
    fn surrogate(&self, inputs: &[Tensor]) -> Option<Result<Tensor>> {
        Some(self.transform().forward(inputs.to_vec().into(), &mut Saved::default()))
    }
}

impl Var<'_> {
    /// [`Var::hadamard`] and then [`Var::fake_quant`], in one pass where the device can.
    pub fn hadamard_fake_quant(self, spec: &QuantSpec) -> Result<Self> {
        if !spec.is_active() {
            return self.hadamard();
        }
        let map = Hadamard::new(self.value().cols())?;
        self.tape().record(HadamardFakeQuant { map, spec: *spec }, vec![self])
    }
}

/// Worked cases.
pub fn cases() -> Vec<Case> {
    let case = |rows: usize, n: usize, spec: QuantSpec, name: &str| {
        let name = format!("{rows}x{n} {name}");
        Case::new("hadamard_fake_quant", name, vec![randn([rows, n], n as u64)], move |mut v| {
            v.remove(0).hadamard_fake_quant(&spec)
        })
        .rounds()
    };
    let act = QuantSpec::activation;
    let mut all = vec![];
    for n in [1, 8, 64, 12, 28, 80, 172, 214, 344] {
        all.push(case(3, n, act(4, false), "asymmetric"));
        all.push(case(1, n, act(8, true), "symmetric"));
    }
    all.push(case(5, 64, act(4, false).grouped(16), "grouped"));
    all.push(case(5, 128, act(4, false).clipped(Clip::Ratio(0.9)), "clipped"));
    let long = [8960, 10240, 11008, 12288, 13824, 14336, 15872, 17920, 18944, 22016, 24576, 28672, 31744];
    for n in [128, 1376, 4096].into_iter().chain(long) {
        all.push(case(11, n, act(4, false), "asymmetric").large());
    }
    all.push(case(4, 11008, act(8, true), "symmetric").large());
    all
}
