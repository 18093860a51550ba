//! Benches: every case is checked against the reference, then timed against a copy of the same tensor.
//!
//! ```
//! use spinquant::{Device, bench};
//! let device = Device::Cpu;
//! let (case, dtype) = bench::one("rms-norm", Some(64), Some(8), None, &device)?;
//! let measured = bench::measure(&case, dtype, &device)?;
//! println!("{:.4} ms", measured.hot.median());
//! # Ok::<(), spinquant::Error>(())
//! ```

mod bare;
pub mod goldens;
pub mod growth;
mod list;
mod report;
mod run;
pub mod steps;
pub mod time;

pub use list::{cases, kernels, one, table};
pub use report::{Record, Row};
pub use run::{Caller, Measured, answer, measure, warm_up};
