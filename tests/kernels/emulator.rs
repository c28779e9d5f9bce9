//! Loads kernels that were compiled for the CPU and runs launches on them; what the emulator itself must refuse.
#![allow(unsafe_code)]

use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::process::Command;
use std::sync::OnceLock;

use eurus::ops::kernels::{Argument, FAMILIES, Launch};

use crate::samples::Buffer;

type RunGrid = unsafe extern "C" fn(*const c_char, *const c_uint, c_uint, usize, u64, *mut *mut c_void) -> c_int;
type Parameters = unsafe extern "C" fn(*const c_char) -> *const c_char;

/// Kernels compiled for the CPU.
pub(crate) struct Library {
    run_grid: RunGrid,
    parameters: Parameters,
}

impl Library {
    /// The library `name` that the build script made.
    fn open(name: &str) -> Self {
        let path = CString::new(format!("{}/{name}.so", env!("OUT_DIR"))).unwrap();
        let load = |symbol: &CStr| {
            // SAFETY: the library's constructors only fill a table of its own; it stays loaded for good.
            let address = unsafe { libc::dlsym(libc::dlopen(path.as_ptr(), libc::RTLD_NOW), symbol.as_ptr()) };
            assert!(!address.is_null(), "{path:?} lacks {symbol:?}");
            address
        };
        // SAFETY: kernels/emulator/emulator.cpp defines both with these types.
        #[allow(clippy::missing_transmute_annotations)]
        unsafe {
            Self {
                run_grid: std::mem::transmute(load(c"emulator_launch")),
                parameters: std::mem::transmute(load(c"emulator_parameters")),
            }
        }
    }

    /// All kernels, as they are.
    pub(crate) fn sound() -> &'static Self {
        static LIBRARY: OnceLock<Library> = OnceLock::new();
        LIBRARY.get_or_init(|| Self::open("emulator"))
    }

    /// Those that were compiled with a planted error.
    pub(crate) fn planted(name: &str) -> Self {
        Self::open(&format!("plant_{name}"))
    }

    /// A for an address, N for a number; None where there is no such kernel.
    fn parameters(&self, kernel: &str) -> Option<String> {
        let name = CString::new(kernel).unwrap();
        // SAFETY: only reads a table, whose texts stay.
        unsafe {
            let found = (self.parameters)(name.as_ptr());
            (!found.is_null()).then(|| CStr::from_ptr(found).to_str().unwrap().to_owned())
        }
    }

    /// Runs a launch whose addresses are those of [`Buffer`]s; `seed` decides in which order its warps run.
    #[track_caller]
    pub(crate) fn run(&self, launch: &Launch, seed: u64) {
        let kinds = launch.arguments.iter().map(|argument| match argument {
            Argument::Address(_) => 'A',
            Argument::Count(_) | Argument::Real(_) => 'N',
        });
        assert_eq!(self.parameters(&launch.kernel), Some(kinds.collect()), "parameters of {}", launch.kernel);
        let mut words: Vec<u64> = launch.arguments.iter().map(word).collect();
        let mut arguments: Vec<*mut c_void> = words.iter_mut().map(|word| std::ptr::from_mut(word).cast()).collect();
        let name = CString::new(&*launch.kernel).unwrap();
        let (threads, shared_bytes) = (launch.threads, launch.shared_bytes as usize);
        // SAFETY: as many arguments as parameters (checked), each with at least as many bytes; what kernels do with addresses
        // is what the tests are for.
        let status = unsafe {
            (self.run_grid)(name.as_ptr(), launch.grid.as_ptr(), threads, shared_bytes, seed, arguments.as_mut_ptr())
        };
        assert_eq!(status, 0, "no GPU runs {launch:?}");
    }
}

/// The argument's bytes, in the lowest ones of a word.
fn word(argument: &Argument) -> u64 {
    match *argument {
        Argument::Address(address) => address,
        Argument::Count(count) => count as u32 as u64,
        Argument::Real(x) => x.to_bits().into(),
    }
}

fn probe(kernel: &str, threads: u32, arguments: Vec<Argument>) -> Launch {
    Launch { kernel: format!("probe_{kernel}"), grid: [1, 1, 1], threads, shared_bytes: 128, arguments }
}

#[test]
fn kernels_and_parameters_are_those_of_the_table() {
    for family in FAMILIES {
        for symbol in family.symbols() {
            let parameters = Library::sound().parameters(&symbol).unwrap_or_default();
            assert_eq!(parameters.len(), family.parameter_count, "{symbol}");
        }
    }
    assert_eq!(Library::sound().parameters("rms_norm"), None);
}

#[test]
fn barriers_hold_and_warps_drift() {
    let library = Library::sound();
    for seed in 0..20 {
        let out = Buffer::poisoned(4 * 4 * 256);
        library.run(&probe("neighbour", 256, vec![Argument::Address(out.address())]), seed);
        let expected: Vec<u32> = (0..4).flat_map(|round| (0..256).map(move |i| (i + 32) % 256 + round)).collect();
        assert_eq!(out.numbers::<u32>(), expected);
    }
}

#[test]
fn shared_memory_begins_as_no_number() {
    let out = Buffer::poisoned(4 * 64);
    Library::sound().run(&probe("unwritten", 32, vec![Argument::Address(out.address())]), 1);
    assert!(out.numbers::<f32>().iter().all(|x| x.is_nan()));
}

/// The emulator ends the process, so the kernel runs in another one: this test itself, told by a variable what to do.
#[test]
fn divergence_is_refused_with_the_place() {
    if let Ok(kernel) = std::env::var("EURUS_PROBE") {
        let out = Buffer::poisoned(4 * 64);
        Library::sound().run(&probe(&kernel, 64, vec![Argument::Address(out.address())]), 1);
        return;
    }
    for (kernel, message) in [("divergent_barrier", "a divergent barrier"), ("divergent_warp", "a divergent warp")] {
        let mut child = Command::new(std::env::current_exe().unwrap());
        child
            .args(["--exact", "emulator::divergence_is_refused_with_the_place", "--nocapture"])
            .env("EURUS_PROBE", kernel);
        let output = child.output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && text.contains(message), "{kernel}: {text}");
        assert!(text.contains("probes.cu:"), "{kernel}: {text}");
    }
}
