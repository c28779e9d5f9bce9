//! Work that a device's stream records once, as a CUDA graph, and then does again and again with one launch.
#![allow(unsafe_code)]

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::CudaGraph;
use candle_core::cuda_backend::cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use candle_core::{CudaDevice, Result};

/// Work that was recorded: the same launches on the same addresses each time. What lies there must live as long.
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
    /// Of `work`, which cannot copy from or to the host, or of the driver, where something else cannot be recorded.
    pub fn record(device: &CudaDevice, work: impl FnOnce() -> Result<()>) -> Result<Self> {
        let stream = device.cuda_stream();
        // What other threads do meanwhile on streams of their own is no business of this one.
        stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).w()?;
        let done = {
            // The driver would record a copy with the host's address, where something else lies later: candle refuses copies now.
            let _no_copies = device.enable_cuda_graph_htod_cache();
            work()
        };
        // What went wrong while tensors were dropped; it must not keep the stream from ending its record, for then it would do nothing.
        let dropped = stream.context().check_err().w();
        let graph = stream.end_capture(CUgraphInstantiate_flags(0)).w();
        done?;
        dropped?;
        match graph? {
            Some(graph) => Ok(Self(graph)),
            None => candle_core::bail!("the driver recorded no graph"),
        }
    }

    /// Puts the work in line on the stream.
    ///
    /// # Errors
    /// If there is no memory left for it, and with whatever went wrong before on the device.
    pub fn launch(&self) -> Result<()> {
        self.0.launch().w()
    }
}
