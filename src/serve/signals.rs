//! SIGTERM and SIGINT as values.

use std::fmt;

use tokio::signal::unix::{Signal as Stream, SignalKind, signal};

use crate::error::{Error, Result};

/// Both signals, from now on no longer deadly.
pub(crate) struct Signals {
    terminate: Stream,
    interrupt: Stream,
}

/// One of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Signal {
    /// SIGTERM: a supervisor wants us to stop.
    Terminate,
    /// SIGINT: Ctrl-C.
    Interrupt,
}

impl Signals {
    /// Takes both signals over.
    ///
    /// # Errors
    /// [`Error::Internal`] if the system does not allow it.
    pub(crate) fn listen() -> Result<Self> {
        let open = |kind| signal(kind).map_err(Error::internal);
        Ok(Self { terminate: open(SignalKind::terminate())?, interrupt: open(SignalKind::interrupt())? })
    }

    /// Waits for the next one.
    pub(crate) async fn next(&mut self) -> Signal {
        tokio::select! {
            Some(()) = self.terminate.recv() => Signal::Terminate,
            Some(()) = self.interrupt.recv() => Signal::Interrupt,
            else => std::future::pending().await,
        }
    }
}

impl Signal {
    /// Ends the process at once, with the exit code of a process that the signal killed.
    pub(crate) fn leave(self) -> ! {
        tracing::warn!("{self}: leaving at once");
        std::process::exit(self.exit_code())
    }

    /// The exit code of a process that the signal killed.
    pub(crate) fn exit_code(self) -> i32 {
        128 + self.number()
    }

    fn number(self) -> i32 {
        match self {
            Self::Terminate => 15,
            Self::Interrupt => 2,
        }
    }
}

impl fmt::Display for Signal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Terminate => "SIGTERM",
            Self::Interrupt => "SIGINT",
        })
    }
}
