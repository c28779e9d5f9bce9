//! Which device models live on, and how much memory it has.
//! The only file besides the operations and the build script that names devices.

use candle_core::Device;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Where models are to live.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Choice {
    /// On a GPU where this program was built for GPUs and finds one, otherwise on the CPU.
    #[default]
    Auto,
    /// On the CPU.
    Cpu,
    /// On the first NVIDIA GPU, or not at all.
    Cuda,
    /// On the emulator of kernels/emulator: for tests.
    #[cfg(feature = "emulator")]
    #[value(hide = true)]
    Emulator,
}

impl From<Choice> for figment::value::Value {
    fn from(choice: Choice) -> Self {
        let name = match choice {
            Choice::Auto => "auto",
            Choice::Cpu => "cpu",
            Choice::Cuda => "cuda",
            #[cfg(feature = "emulator")]
            Choice::Emulator => "emulator",
        };
        name.into()
    }
}

/// A device for the tensors of one model: a GPU's work is ordered among tensors of the same opened device only.
///
/// # Errors
/// [`Error::Unavailable`] if the chosen device cannot be had, saying what is missing.
pub fn open(choice: Choice) -> Result<Device> {
    let wanted = |error: String| Error::Unavailable(format!("no GPU can be used: {error}"));
    match choice {
        Choice::Cpu => Ok(Device::Cpu),
        Choice::Cuda => open_gpu().map_err(wanted),
        Choice::Auto => Ok(open_gpu().unwrap_or_else(|error| {
            tracing::debug!("on the CPU: {error}");
            Device::Cpu
        })),
        #[cfg(feature = "emulator")]
        Choice::Emulator => open_emulator().map_err(wanted),
    }
}

/// Another device of the same kind, for the tensors of another model.
///
/// # Errors
/// As [`open`].
pub fn another(device: &Device) -> Result<Device> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(_) => {
            crate::ops::cuda::another().map_err(|error| Error::Unavailable(format!("the GPU cannot be used: {error}")))
        }
        _ => Ok(device.clone()),
    }
}

#[cfg(feature = "cuda")]
fn open_gpu() -> std::result::Result<Device, String> {
    crate::ops::cuda::open()
}

#[cfg(not(feature = "cuda"))]
fn open_gpu() -> std::result::Result<Device, String> {
    Err("this program was built for CPUs; GPUs need the feature `cuda`".to_owned())
}

#[cfg(all(feature = "cuda", feature = "emulator"))]
fn open_emulator() -> std::result::Result<Device, String> {
    crate::ops::cuda::open_emulator()
}

#[cfg(all(not(feature = "cuda"), feature = "emulator"))]
fn open_emulator() -> std::result::Result<Device, String> {
    open_gpu()
}

/// What it is, for people.
pub fn describe(device: &Device) -> String {
    match device {
        Device::Cpu => "CPU".to_owned(),
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => match crate::ops::cuda::describe(device) {
            Ok((name, [free, total])) => {
                let gib = |bytes: u64| bytes as f64 / (1u64 << 30) as f64;
                format!("{name}, {:.1} of {:.1} GiB free", gib(free), gib(total))
            }
            Err(error) => format!("a GPU that does not answer: {error}"),
        },
        _ => "a device that this program does not know".to_owned(),
    }
}

/// Bytes that may still be allocated on `device`; None where it does not tell.
pub fn memory_available(device: &Device) -> Option<u64> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => crate::ops::cuda::describe(device).ok().map(|(_, [free, _])| free),
        _ => host_memory_available(),
    }
}

/// Bytes of the host's memory that may still be allocated: what the system reports as available, or what the control group leaves
/// if that is less. None where the system does not tell.
pub fn host_memory_available() -> Option<u64> {
    let system = std::fs::read_to_string("/proc/meminfo").ok().and_then(|text| available_in_meminfo(&text));
    let read = |name: &str| std::fs::read_to_string(format!("/sys/fs/cgroup/{name}")).ok();
    let group = read("memory.max").zip(read("memory.current")).and_then(|(max, used)| left_in_group(&max, &used));
    match (system, group) {
        (Some(system), Some(group)) => Some(system.min(group)),
        (system, group) => system.or(group),
    }
}

fn available_in_meminfo(text: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// `max` is a number, or the word `max` for no limit.
fn left_in_group(max: &str, used: &str) -> Option<u64> {
    let max = max.trim().parse::<u64>().ok()?;
    Some(max.saturating_sub(used.trim().parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cpu_is_always_there() {
        assert!(open(Choice::Cpu).unwrap().is_cpu());
        assert_eq!(describe(&Device::Cpu), "CPU");
        let value = figment::value::Value::serialize(Choice::default()).unwrap();
        assert_eq!(value, figment::value::Value::from(Choice::default()));
    }

    #[cfg(not(feature = "cuda"))]
    #[test]
    fn a_program_for_cpus_says_so() {
        assert!(open(Choice::Auto).unwrap().is_cpu());
        let error = open(Choice::Cuda).unwrap_err().to_string();
        assert!(error.contains("built for CPUs"), "{error}");
    }

    #[test]
    fn memory_is_read_in_bytes() {
        let text = "MemTotal:       24000000 kB\nMemFree: 1 kB\nMemAvailable:   2048 kB\n";
        assert_eq!(available_in_meminfo(text), Some(2048 * 1024));
        assert_eq!(available_in_meminfo("MemTotal: 3 kB\n"), None);
    }

    #[test]
    fn a_control_group_may_have_no_limit() {
        assert_eq!(left_in_group("max\n", "5\n"), None);
        assert_eq!(left_in_group("100\n", "40\n"), Some(60));
        assert_eq!(left_in_group("100\n", "140\n"), Some(0));
    }
}
