//! Work that a device's stream records once, as a CUDA graph, and then does again and again with one launch.
#![allow(unsafe_code)]

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::CudaGraph;
use candle_core::cuda_backend::cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use candle_core::{CudaDevice, Result};

/// Work that was recorded: the same launches on the same addresses each time.
pub struct Graph(CudaGraph);

// SAFETY: the driver lets any thread use a graph, one at a time, and a graph has one owner.
unsafe impl Send for Graph {}

impl std::fmt::Debug for Graph {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Graph")
    }
}

impl Graph {
    /// Records what `work` asks the device for, without doing it. Memory that it allocates and frees becomes the graph's; it must leave
    /// none allocated, free none that was there before, and neither wait for the device nor copy from or to the host.
    ///
    /// # Errors
    /// Of `work`, or of the driver, which says so where something cannot be recorded.
    pub fn record(device: &CudaDevice, work: impl FnOnce() -> Result<()>) -> Result<Self> {
        let stream = device.cuda_stream();
        // What other threads do meanwhile on streams of their own is no business of this one.
        stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).w()?;
        let done = work();
        // In any case: a stream that keeps recording does nothing.
        let graph = stream.end_capture(CUgraphInstantiate_flags(0)).w();
        done?;
        match graph? {
            Some(graph) => Ok(Self(graph)),
            None => candle_core::bail!("the driver recorded no graph"),
        }
    }

    /// Puts the work in line on the stream.
    ///
    /// # Errors
    /// If there is no memory left for it.
    pub fn launch(&self) -> Result<()> {
        self.0.launch().w()
    }
}
