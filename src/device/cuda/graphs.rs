//! Launchers inside CUDA graphs, each in one of its own: what shows that all of them can be captured.

use std::cell::RefCell;
use std::collections::BTreeSet;

use cudarc::driver::{CudaStream, result, sys};

use super::{driver_error, ffi};
use crate::Result;

thread_local! {
    /// Launchers that were called, while that is asked for.
    static CALLED: RefCell<Option<BTreeSet<&'static str>>> = const { RefCell::new(None) };
}

/// Runs `f` with every launcher of `kernels.h` that this thread calls captured: in a CUDA graph of its own, which is then launched once and
/// waited for. What else `f` does is done as ever. With what `f` gives come the names of the launchers.
///
/// Within one another the outer one hears of nothing that the inner one heard of.
pub fn in_graphs<T>(f: impl FnOnce() -> T) -> (T, BTreeSet<&'static str>) {
    CALLED.set(Some(BTreeSet::new()));
    let result = f();
    (result, CALLED.take().unwrap_or_default())
}

/// Notes a launcher by its name.
pub(crate) fn called(name: &'static str) {
    CALLED.with_borrow_mut(|called| called.as_mut().map(|called| called.insert(name)));
}

/// True inside [`in_graphs`].
pub(super) fn wanted() -> bool {
    CALLED.with_borrow(Option::is_some)
}

/// The status of a launcher that is captured alone, launched when it succeeds, and waited for.
pub(super) fn captured(stream: &CudaStream, f: impl FnOnce(ffi::sq_stream) -> i32) -> Result<i32> {
    let of = stream.cu_stream();
    // SAFETY: the stream lives; nothing else is enqueued on it before the capture ends. What was captured is launched once, on memory that the
    // launcher's caller holds, and is over when the stream has been waited for; then the graph and its executable form are let go.
    unsafe {
        result::stream::begin_capture(of, sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED)
            .map_err(driver_error("graph capture"))?;
        let status = f(of.cast());
        // Always ended, or nothing else could run on this stream.
        let graph = result::stream::end_capture(of).map_err(driver_error("graph capture"))?;
        let run = || {
            let ready = result::graph::instantiate(graph, sys::CUgraphInstantiate_flags(0))?;
            let launched = result::graph::launch(ready, of).and_then(|()| stream.synchronize());
            result::graph::exec_destroy(ready)?;
            launched
        };
        let done = if status == 0 { run() } else { Ok(()) };
        result::graph::destroy(graph).map_err(driver_error("graph"))?;
        done.map_err(driver_error("a captured launcher")).map(|()| status)
    }
}
