//! Where a GPU's time goes: events around every launch, added up by part of the computation and kind of work.

use cudarc::driver::{CudaEvent, sys};

use super::{CudaDevice, driver_error};
use crate::Result;
use crate::device::launch::Work;
use crate::profile::part;

pub(super) struct Launch {
    part: (&'static str, &'static str),
    work: Work,
    start: CudaEvent,
    end: CudaEvent,
}

/// All launches of one kind in one part of the computation.
#[derive(Clone, Debug, PartialEq)]
pub struct Phase {
    /// `forward`, `recompute`, `backward` or `update`.
    pub pass: &'static str,
    /// The part, as [`crate::profile::enter`] named it.
    pub part: &'static str,
    /// The kind of work: `product`, `attention`, `hadamard` and so on.
    pub what: &'static str,
    /// Launches.
    pub count: usize,
    /// Milliseconds on the GPU.
    pub ms: f64,
    /// Bytes that had to be moved, where that is what limits.
    pub bytes: f64,
    /// Additions and multiplications, where they are.
    pub flops: f64,
}

impl CudaDevice {
    /// Times every launch from now on. Costs a few microseconds each.
    pub fn start_profile(&self) {
        *self.0.profile.lock().unwrap_or_else(|e| e.into_inner()) = Some(vec![]);
    }

    /// What ran since [`CudaDevice::start_profile`], the longest first.
    ///
    /// # Errors
    /// A failing call of the driver; a profile that was not started.
    pub fn stop_profile(&self) -> Result<Vec<Phase>> {
        let launches = self.0.profile.lock().unwrap_or_else(|e| e.into_inner()).take().unwrap_or_default();
        self.synchronize()?;
        let mut phases: Vec<Phase> = vec![];
        for Launch { part: (pass, part), work, start, end } in launches {
            let ms = f64::from(start.elapsed_ms(&end).map_err(driver_error("profile"))?);
            let same = |p: &&mut Phase| (p.pass, p.part, p.what) == (pass, part, work.what);
            match phases.iter_mut().find(same) {
                Some(p) => {
                    p.count += 1;
                    p.ms += ms;
                    p.bytes += work.bytes;
                    p.flops += work.flops;
                }
                None => {
                    phases.push(Phase { pass, part, what: work.what, count: 1, ms, bytes: work.bytes, flops: work.flops });
                }
            }
        }
        phases.sort_by(|a, b| b.ms.total_cmp(&a.ms));
        Ok(phases)
    }

    /// Runs a launch, between events where somebody watches.
    pub(super) fn profiled(&self, work: Work, launch: impl FnOnce() -> Result<()>) -> Result<()> {
        let event = || self.0.stream.record_event(Some(sys::CUevent_flags::CU_EVENT_DEFAULT)).map_err(driver_error("profile"));
        let watched = self.0.profile.lock().unwrap_or_else(|e| e.into_inner()).is_some();
        if !watched {
            return launch();
        }
        let start = event()?;
        launch()?;
        let end = event()?;
        if let Some(list) = &mut *self.0.profile.lock().unwrap_or_else(|e| e.into_inner()) {
            list.push(Launch { part: part(), work, start, end });
        }
        Ok(())
    }
}
