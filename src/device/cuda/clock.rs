//! The GPU's side of [`Device::stamp`](crate::Device::stamp) and its neighbours.

use std::collections::HashMap;
use std::ffi::{CString, c_char, c_int, c_uint, c_void};
use std::sync::Mutex;

use cudarc::driver::{CudaEvent, CudaGraph, sys};
use libloading::Library;

use super::{CudaDevice, driver_error};
use crate::device::{Replay, Stamp};
use crate::{Error, Result};

/// A moment in the stream.
pub struct Event(CudaEvent);

impl Event {
    pub(crate) fn ms_until(&self, later: &Self) -> Result<f64> {
        self.0.elapsed_ms(&later.0).map(f64::from).map_err(driver_error("time between events"))
    }
}

/// Recorded calls.
pub struct Graph(CudaGraph);

impl Graph {
    pub(crate) fn launch(&self) -> Result<()> {
        self.0.launch().map_err(driver_error("graph launch"))
    }
}

impl CudaDevice {
    pub(crate) fn stamp(&self) -> Result<Stamp> {
        let event = self.0.stream.record_event(Some(sys::CUevent_flags::CU_EVENT_DEFAULT));
        event.map(|event| Stamp::Cuda(Event(event))).map_err(driver_error("event"))
    }

    pub(crate) fn record(&self, calls: &mut dyn FnMut() -> Result<()>) -> Result<Replay> {
        let stream = &self.0.stream;
        stream.begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED).map_err(driver_error("graph capture"))?;
        let called = calls();
        // Always ended, or nothing else could run on this stream.
        let graph = stream.end_capture(sys::CUgraphInstantiate_flags(0)).map_err(driver_error("graph capture"));
        called?;
        graph?.map(|graph| Replay::Cuda(Graph(graph))).ok_or_else(|| Error::Cuda("the captured graph is empty".into()))
    }

    pub(crate) fn cache_bytes(&self) -> Option<u64> {
        let bytes = self.0.context.attribute(sys::CUdevice_attribute_enum::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE).ok()?;
        u64::try_from(bytes).ok().filter(|&b| b > 0)
    }

    pub(crate) fn clock_mhz(&self) -> Option<u32> {
        static CLOCKS: Mutex<Option<HashMap<usize, Option<Clock>>>> = Mutex::new(None);
        let mut clocks = CLOCKS.lock().unwrap_or_else(|e| e.into_inner());
        let clock = clocks.get_or_insert_default().entry(self.ordinal()).or_insert_with(|| {
            let uuid = self.0.context.uuid().ok()?;
            Clock::open(&uuid.bytes)
        });
        clock.as_ref()?.mhz()
    }
}

/// A card as NVIDIA's management library (NVML) knows it.
struct Clock {
    /// Keeps the functions loaded.
    library: Library,
    card: usize,
}

type Init = unsafe extern "C" fn() -> c_int;
type HandleByUuid = unsafe extern "C" fn(*const c_char, *mut *mut c_void) -> c_int;
type ClockInfo = unsafe extern "C" fn(*mut c_void, c_uint, *mut c_uint) -> c_int;
/// `NVML_CLOCK_SM`
const MULTIPROCESSORS: c_uint = 1;

impl Clock {
    fn open(uuid: &[c_char; 16]) -> Option<Self> {
        let hex: String = uuid.iter().map(|b| format!("{:02x}", *b as u8)).collect();
        let parts = [0..8, 8..12, 12..16, 16..20, 20..32].map(|r| &hex[r]);
        let name = CString::new(format!("GPU-{}", parts.join("-"))).ok()?;
        let mut card = std::ptr::null_mut();
        // SAFETY: NVML's initialisation has no requirements; the functions have the types that its documentation gives.
        let library = unsafe {
            let library = Library::new("libnvidia-ml.so.1").ok()?;
            let init = library.get::<Init>(b"nvmlInit_v2\0").ok()?;
            let by_uuid = library.get::<HandleByUuid>(b"nvmlDeviceGetHandleByUUID\0").ok()?;
            if init() != 0 || by_uuid(name.as_ptr(), &mut card) != 0 {
                return None;
            }
            library
        };
        Some(Self { library, card: card as usize })
    }

    fn mhz(&self) -> Option<u32> {
        let mut mhz = 0;
        // SAFETY: as above; the handle is one that NVML gave and that stays valid.
        let status = unsafe {
            let get = self.library.get::<ClockInfo>(b"nvmlDeviceGetClockInfo\0").ok()?;
            get(self.card as *mut c_void, MULTIPROCESSORS, &mut mhz)
        };
        (status == 0).then_some(mhz)
    }
}
