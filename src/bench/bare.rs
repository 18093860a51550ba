//! The kernels that are timed into memory that is there already, so that a short call can be replayed: as
//! `spinquant::kernels` calls them.

use std::cell::RefCell;
use std::rc::Rc;

use crate::device::launch::{Kind, View};
use crate::grid::QuantSpec;
use crate::hadamard::Hadamard;
use crate::ops::fake_quant::Outputs;
use crate::ops::hadamard::Tables;
use crate::ops::{Call, fake_quant, hadamard};
use crate::{DType, Device, Result, Tensor};

type Launch = Box<dyn Fn(View<'_>, View<'_>) -> Result<()>>;

/// A call of the kernel on a GPU's tensor; `None` for others and elsewhere.
pub fn call(kernel: &str, operands: &[Tensor]) -> Result<Option<Call>> {
    let [x] = operands else { return Ok(None) };
    let Device::Cuda(device) = x.device() else { return Ok(None) };
    if x.dtype() != DType::F32 && !x.dtype().is_half() {
        return Ok(None);
    }
    let n = x.cols();
    // Asymmetric 4-bit per row, as activations are quantised.
    let spec = QuantSpec::activation(4, false);
    let launch: Launch = match kernel {
        "copy" => Box::new(move |y, x| device.copy(y, x)),
        "fake-quant" => {
            Box::new(move |y, x| fake_quant::launch(device.queue(), Outputs { y: Some(y), ..Outputs::default() }, x, n, &spec))
        }
        "hadamard" | "hadamard-fake-quant" | "hadamard-blocks-fake-quant" => {
            let map = map_of(kernel, n)?;
            let packed = || bytemuck::cast_slice(&map.packed()).to_vec();
            let table = (map.k() > 1).then(|| device.constant("Hadamard matrices", map.k(), &packed)).transpose()?;
            let spec = (kernel != "hadamard").then_some(spec);
            Box::new(move |y, x| {
                let tables = Tables { map: &map, table: table.as_ref().map(|t| t.view(Kind::U32)), signs: None };
                hadamard::launch(device.queue(), y, x, &tables, false, spec.as_ref())
            })
        }
        _ => return Ok(None),
    };
    let x = x.clone();
    // No kernel's answer is zero, so one that writes nothing is noticed.
    let y = Rc::new(RefCell::new(Tensor::zeros(x.shape(), x.dtype(), &x.device())?));
    let results = y.clone();
    Ok(Some(Call {
        run: Box::new(move || launch(y.borrow().view()?, x.view()?)),
        // A copy: the kernel writes into the same memory again.
        results: Box::new(move || {
            let y = results.borrow();
            Ok(vec![Tensor::stack(std::slice::from_ref(&*y))?.reshape(y.shape())?])
        }),
    }))
}

/// The map of rows of n.
fn map_of(kernel: &str, n: usize) -> Result<Hadamard> {
    if kernel == "hadamard-blocks-fake-quant" { Hadamard::in_blocks(n, 1 << n.trailing_zeros()) } else { Hadamard::new(n) }
}

/// Which of its kernels a GPU runs for the rows of a case, where there are several.
#[cfg(feature = "cuda")]
pub fn ran(kernel: &str, n: usize, dtype: DType, device: &Device) -> Result<Option<String>> {
    use crate::kernels::{Gpu, hadamard_choice};
    let Device::Cuda(gpu) = device else { return Ok(None) };
    let spec = match kernel {
        "hadamard" => None,
        "hadamard-fake-quant" | "hadamard-blocks-fake-quant" => Some(QuantSpec::activation(4, false)),
        _ => return Ok(None),
    };
    // Waiting makes this card the current one.
    gpu.synchronize()?;
    let choice = hadamard_choice(&map_of(kernel, n)?, dtype, spec.as_ref(), Gpu::current()?)?;
    Ok(Some(choice.to_string()))
}

#[cfg(not(feature = "cuda"))]
pub fn ran(_: &str, _: usize, _: DType, _: &Device) -> Result<Option<String>> {
    Ok(None)
}
