//! Hadamard transform and fake quantisation in one pass: `y = Q(H x)`, `dx = Hᵀ dy` (straight through Q). On a GPU the transformed row
//! stays on chip and is not rounded to 16 bits in between; on the CPU it is the two operations one after the other.

use crate::device::cuda::CudaDevice;
use crate::grid::{Clip, QuantSpec};
use crate::hadamard::Hadamard;
use crate::ops::fake_quant::FakeQuant;
use crate::ops::hadamard::{self, Transform};
use crate::ops::microscaling;
use crate::ops::{At, Case, Place, Run, exact, few_rows, normals};
use crate::tape::{Grads, Inputs, Op, Saved, Var, operands, run};
use crate::{DType, Error, Result, Tensor};

/// The operation.
#[derive(Clone, Debug)]
pub(crate) struct HadamardFakeQuant {
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
        let h = run(&self.transform(), inputs, save)?;
        run(&FakeQuant(self.spec), vec![h], save)
    }
    fn gpu(&self, device: &CudaDevice, inputs: Inputs, _: &mut Saved) -> Result<Tensor> {
        let [x] = inputs.take()?;
        if self.spec.rule.floating().is_some() {
            return microscaling::gpu(device, x, &self.spec, Some(&self.map));
        }
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
        let map = Hadamard::new(self.value().cols())?;
        self.hadamard_fake_quant_by(&map, spec)
    }

    /// [`Var::hadamard_by`] and then [`Var::fake_quant`], in one pass where the device can. Scales are those of the whole row, or of the
    /// spec's groups, also where the map is in blocks.
    ///
    /// # Errors
    /// Those of [`Var::hadamard_by`] and [`Var::fake_quant`].
    pub fn hadamard_fake_quant_by(self, map: &Hadamard, spec: &QuantSpec) -> Result<Self> {
        if !spec.is_active() {
            return self.hadamard_by(map);
        }
        self.tape().record(HadamardFakeQuant { map: map.clone(), spec: *spec }, vec![self])
    }
}

/// Worked cases.
pub(crate) fn cases() -> Vec<Case> {
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
    for n in [10944, 13696, 25600, 29568] {
        all.push(case(5, n, act(4, n % 3 == 0), "").large());
    }
    // One scale a row, whatever its blocks.
    let in_blocks = |rows: usize, n: usize, size: usize, spec: QuantSpec| {
        let name = format!("{rows}x{n} in blocks of {size}");
        Case::new("hadamard_fake_quant", name, normals(&[(&[rows, n], n as u64)]), move |mut v| {
            v.remove(0).hadamard_fake_quant_by(&Hadamard::in_blocks(n, size)?, &spec)
        })
        .rounds()
    };
    for (n, size) in [(12, 4), (56, 8), (72, 12), (224, 32)] {
        all.push(in_blocks(3, n, size, act(4, false)));
        all.push(in_blocks(2, n, size, act(8, true)));
    }
    all.push(in_blocks(3, 56, 8, act(4, false).grouped(28)));
    let widths =
        [(1536, 64), (11008, 256), (18944, 512), (27648, 1024), (14336, 2048), (28672, 4096), (24576, 8192), (29568, 4224)];
    for (n, size) in widths {
        all.push(in_blocks(5, n, size, act(4, n % 7 == 0)).large());
    }
    let mut sizes: Vec<At> = vec![(Place::Cpu, 4096, 4096, &[DType::F32]), (Place::Cpu, 11008, 1524, &[DType::F32])];
    sizes.extend([4096, 8192, 11008, 14336, 28672].map(|n| (Place::Gpu, n, (1 << 28) / n, &[DType::BF16][..])));
    sizes.extend(few_rows());
    all.extend(Case::table(timed, &sizes));
    let mut blocks: Vec<At> = vec![(Place::Cpu, 11008, 1524, &[DType::F32])];
    blocks.extend([11008, 14336, 28672].map(|n| (Place::Gpu, n, 16384, &[DType::BF16][..])));
    all.extend(Case::table(timed_blocks, &blocks));
    all
}

fn timed(n: usize, rows: usize) -> Case {
    let about = "Hadamard transform and asymmetric 4-bit quantisation of rows of n (one pass on a GPU)";
    timed_by(("hadamard-fake-quant", about), n, rows, Hadamard::new)
}

/// The blocks that other runtimes have a fast transform for.
fn timed_blocks(n: usize, rows: usize) -> Case {
    let about = "the same in blocks of the largest power of two that divides n";
    timed_by(("hadamard-blocks-fake-quant", about), n, rows, |n| Hadamard::in_blocks(n, 1 << n.trailing_zeros()))
}

fn timed_by((name, about): (&'static str, &'static str), n: usize, rows: usize, map: fn(usize) -> Result<Hadamard>) -> Case {
    let spec = QuantSpec::activation(4, false);
    let graph = Run::graph(move |mut v| v.remove(0).hadamard_fake_quant_by(&map(n)?, &spec));
    Case::timed(("hadamard_fake_quant", name, about), (n, rows), vec![vec![rows, n]], graph, move |x, y| {
        let map = map(n)?;
        exact::rows(n, x, &y[0], |_, got, x| {
            exact::quantised("hadamard_fake_quant", got, &exact::hadamard(&x[0], &map), &spec, y[0].dtype())
        })
    })
    .rounds()
}
