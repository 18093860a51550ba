//! Hadamard transform and fake quantisation in one pass: `y = Q(H x)`, `dx = Hᵀ dy` (straight through Q). On a GPU the transformed row
//! stays on chip and is not rounded to 16 bits in between; on the CPU it is the two operations one after the other.

use crate::device::cuda::CudaDevice;
use crate::grid::{Clip, QuantSpec};
use crate::hadamard::Hadamard;
use crate::ops::fake_quant::FakeQuant;
use crate::ops::hadamard::{self, Transform};
use crate::ops::{At, Case, Place, Run, exact, few_rows, normals};
use crate::tape::{Grads, Inputs, Op, Saved, Var, operands, run};
use crate::{DType, Error, Result, Tensor};

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

    fn one_after_the_other(&self, inputs: Inputs, save: &mut Saved) -> Result<Tensor> {
        let h = run(&self.transform(), inputs, save)?;
        run(&FakeQuant(self.spec), vec![h], save)
    }
}

impl Op for HadamardFakeQuant {
    fn name(&self) -> &'static str {
        "hadamard_fake_quant"
    }
    fn check(&self, inputs: &[Tensor]) -> Result<()> {
        let [x] = operands(inputs)?;
        if x.cols() != self.map.n() {
            return Err(Error::shape(self.name(), format!("[.., {}]", self.map.n()), x.shape()));
        }
        if self.spec.clip == Clip::Search {
            return Err(Error::argument(self.name(), "expected a clip ratio, got a search"));
        }
        self.spec.group_size(x.cols()).map(|_| ())
    }
    fn cpu(&self, inputs: Inputs, save: &mut Saved) -> Result<Tensor> {
        self.one_after_the_other(inputs, save)
    }
    fn gpu(&self, device: &CudaDevice, inputs: Inputs, save: &mut Saved) -> Result<Tensor> {
        // One pass needs one block a row; block-diagonal maps would quantise each block by itself.
        if self.map.blocks() > 1 {
            return self.one_after_the_other(inputs, save);
        }
        let [x] = inputs.take()?;
        hadamard::gpu(device, x, &self.map, false, Some(&self.spec))
    }
    fn backward(&self, _: Saved, dy: Tensor, _: &[bool]) -> Result<Grads> {
        Ok(vec![Some(hadamard::transform(dy, &self.map, true)?)])
    }
    fn surrogate(&self, inputs: &[Tensor]) -> Option<Result<Tensor>> {
        Some(run(&self.transform(), inputs.to_vec(), &mut Saved::default()))
    }
}

impl Var<'_> {
    /// [`Var::hadamard`] and then [`Var::fake_quant`], in one pass where the device can.
    ///
    /// # Errors
    /// Those of [`Var::hadamard`] and [`Var::fake_quant`].
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
        Case::new("hadamard_fake_quant", name, normals(&[(&[rows, n], n as u64)]), move |mut v| {
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
    let mut sizes: Vec<At> = vec![(Place::Cpu, 4096, 4096, &[DType::F32]), (Place::Cpu, 11008, 1524, &[DType::F32])];
    sizes.extend([4096, 8192, 11008, 14336, 28672].map(|n| (Place::Gpu, n, (1 << 28) / n, &[DType::BF16][..])));
    sizes.extend(few_rows());
    all.extend(Case::table(timed, &sizes));
    all
}

fn timed(n: usize, rows: usize) -> Case {
    let spec = QuantSpec::activation(4, false);
    let graph = Run::graph(move |mut v| v.remove(0).hadamard_fake_quant(&spec));
    let about = "Hadamard transform and asymmetric 4-bit quantisation of rows of n (one pass on a GPU)";
    Case::timed(("hadamard_fake_quant", "hadamard-fake-quant", about), (n, rows), vec![vec![rows, n]], graph, move |x, y| {
        let map = Hadamard::new(n)?;
        exact::rows(n, x, &y[0], |_, got, x| {
            exact::quantised("hadamard_fake_quant", got, &exact::hadamard(&x[0], &map), &spec, y[0].dtype())
        })
    })
    .rounds()
}
