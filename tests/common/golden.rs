//! Golden files: numbers of the published code, as safetensors with a JSON list of cases in their metadata.

use std::collections::HashMap;
use std::path::PathBuf;

use safetensors::{Dtype, SafeTensors};
use serde_json::Value;
use spinquant::Tensor;

/// The folder of goldens: `SPINQUANT_GOLDENS`, or the repository's own copy.
pub fn folder() -> PathBuf {
    let own = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures");
    let folder = std::env::var_os("SPINQUANT_GOLDENS").map_or(own.into(), PathBuf::from);
    assert!(folder.is_dir(), "no goldens at {}", folder.display());
    folder
}

/// One golden file: integers and floats alike, widened to `f64`.
pub struct Golden {
    /// The metadata's `cases` (null where there are none).
    pub cases: Value,
    name: String,
    tensors: HashMap<String, Tensor>,
}

impl Golden {
    /// Reads `name`, relative to [`folder`].
    pub fn open(name: &str) -> Self {
        let path = folder().join(name);
        let bytes = std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let metadata = SafeTensors::read_metadata(&bytes).unwrap().1;
        let cases = metadata.metadata().as_ref().and_then(|m| m.get("cases"));
        let cases = cases.map_or(Value::Null, |text| serde_json::from_str(text).unwrap());
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let tensors = file.iter().map(|(k, view)| {
            let data = view.data();
            fn wide<const N: usize>(data: &[u8], f: impl Fn([u8; N]) -> f64) -> Vec<f64> {
                data.as_chunks().0.iter().map(|c| f(*c)).collect()
            }
            let values = match view.dtype() {
                Dtype::F64 => wide(data, f64::from_le_bytes),
                Dtype::F32 => wide(data, |b| f64::from(f32::from_le_bytes(b))),
                Dtype::I64 => wide(data, |b| i64::from_le_bytes(b) as f64),
                Dtype::I32 => wide(data, |b| f64::from(i32::from_le_bytes(b))),
                Dtype::I8 => wide(data, |b| f64::from(i8::from_le_bytes(b))),
                other => panic!("{k}: unexpected {other:?}"),
            };
            (k.to_string(), Tensor::from_vec(values, view.shape()).unwrap())
        });
        Self { cases, name: name.to_string(), tensors: tensors.collect() }
    }

    /// The cases, where they are a list; at least one.
    pub fn list(&self) -> &[Value] {
        let list = self.cases.as_array().unwrap_or_else(|| panic!("{}: no list of cases", self.name));
        assert!(!list.is_empty(), "{}: no cases", self.name);
        list
    }

    /// A tensor by name, in `f64`.
    pub fn get(&self, name: &str) -> Tensor {
        self.tensors.get(name).unwrap_or_else(|| panic!("{}: no tensor {name}", self.name)).clone()
    }

    /// The values of a tensor by name.
    pub fn values(&self, name: &str) -> Vec<f64> {
        self.get(name).into_vec().unwrap()
    }
}

/// A field of a case.
pub fn number(case: &Value, field: &str) -> f64 {
    case[field].as_f64().unwrap_or_else(|| panic!("case {case}: no number {field:?}"))
}

/// max|a − b|; NaN if there is one anywhere, so that `assert!(distance(..) < ..)` fails.
pub fn distance(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).fold(0.0, |m, (a, b)| if (a - b).is_nan() || m.is_nan() { f64::NAN } else { f64::max(m, (a - b).abs()) })
}
