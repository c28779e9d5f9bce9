//! Shows how far downloads and loading have come: a bar on a terminal, a log line every tenth otherwise.

use std::io::IsTerminal;

use indicatif::{ProgressBar, ProgressStyle};

use crate::checkpoint::Progress;

/// Less is there before anybody can read about it.
const WORTH_A_LINE: u64 = 64 << 20;

/// One line of progress on stderr, for one file after the other.
#[derive(Debug)]
pub struct ProgressLine {
    bar: Option<ProgressBar>,
    what: String,
    tenths: u64,
}

impl ProgressLine {
    /// A line that shows nothing yet.
    pub fn start() -> Self {
        Self { bar: std::io::stderr().is_terminal().then(bar), what: String::new(), tenths: 0 }
    }

    /// Shows `progress`.
    pub fn show(&mut self, progress: Progress<'_>) {
        let (what, done, total) = match progress {
            Progress::Download { file, done, total } => (file, done, total),
            Progress::Load { done, total } => ("tensors", done, total),
        };
        if self.what != what {
            self.what = what.to_string();
            self.tenths = 0;
        }
        if let Some(bar) = &self.bar {
            bar.set_length(total);
            bar.set_position(done);
            bar.set_message(self.what.clone());
            return;
        }
        let tenths = done.saturating_mul(10) / total.max(1);
        if total >= WORTH_A_LINE && tenths > self.tenths {
            tracing::info!("{what}: {} of {} MiB", done >> 20, total >> 20);
        }
        self.tenths = tenths;
    }

    /// Removes the bar.
    pub fn end(self) {
        if let Some(bar) = self.bar {
            bar.finish_and_clear();
        }
    }
}

fn bar() -> ProgressBar {
    let style = ProgressStyle::with_template("{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}");
    ProgressBar::no_length().with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}
