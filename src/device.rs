//! Which device models live on, and how much memory it has.
//! The only file besides the operations and the build script that names devices.

use candle_core::Device;

/// The device that models are loaded to.
pub fn open() -> Device {
    Device::Cpu
}

/// A word for logs.
pub fn name(device: &Device) -> &'static str {
    match device {
        Device::Cpu => "cpu",
        Device::Cuda(_) => "cuda",
        Device::Metal(_) => "metal",
    }
}

/// Bytes that may still be allocated: what the system reports as available, or what the control group leaves
/// if that is less. None where the system does not tell.
pub fn memory_available() -> Option<u64> {
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
