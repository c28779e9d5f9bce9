//! Finds the functions of NVIDIA's libraries that this program jumps to. They are looked for when a device is opened and not before,
//! so a program that opens none runs where they are not installed. With the feature `emulator` they can be the emulator's.
#![allow(unsafe_code)]

use std::ffi::{CStr, CString, c_void};
use std::sync::{Mutex, PoisonError};

struct Library {
    /// In the order in which they are tried.
    files: &'static [&'static CStr],
    optional: bool,
    functions: &'static [&'static CStr],
}

include!(concat!(env!("OUT_DIR"), "/imports.rs"));

unsafe extern "C" {
    /// Where the jumps go, in the order of [`LIBRARIES`]; functions that return an error until they are found.
    static mut eurus_imports: [*const c_void; COUNT];
}

/// Whose functions are called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Source {
    /// The driver and the libraries of CUDA.
    Nvidia,
    /// kernels/emulator, which computes on the CPU.
    #[cfg(feature = "emulator")]
    Emulator,
}

/// Finds the functions. Once they are found they stay those of one source.
pub(super) fn find(source: Source) -> Result<(), String> {
    static FOUND: Mutex<Option<Source>> = Mutex::new(None);
    let mut found = FOUND.lock().unwrap_or_else(PoisonError::into_inner);
    match *found {
        Some(other) if other == source => return Ok(()),
        Some(other) => return Err(format!("this process uses devices of {other:?}, and cannot use one of {source:?}")),
        None => {}
    }
    let mut functions = Vec::with_capacity(COUNT);
    for library in LIBRARIES {
        match open(source, library) {
            Ok(handle) => functions.extend(library.functions.iter().map(|&name| function(handle, name))),
            Err(_) if library.optional => functions.extend(library.functions.iter().map(|_| std::ptr::null())),
            Err(error) => return Err(error),
        }
    }
    // Others keep returning an error: not every version of a library has all of them.
    for (index, function) in functions.into_iter().enumerate().filter(|(_, function)| !function.is_null()) {
        // SAFETY: inside of the table, which nobody reads or writes at the same time: functions are called only after this one has
        // found them, and one thread at a time comes here.
        unsafe { (&raw mut eurus_imports).cast::<*const c_void>().add(index).write(function) };
    }
    *found = Some(source);
    Ok(())
}

/// The function of an open library, or null.
fn function(library: *mut c_void, name: &CStr) -> *const c_void {
    // SAFETY: the handle is open, for handles are never closed, and the name ends with a zero.
    unsafe { libc::dlsym(library, name.as_ptr()) }
}

/// Opens the first file of the library that is there; it stays open.
fn open(source: Source, library: &Library) -> Result<*mut c_void, String> {
    let files: Vec<CString> = match source {
        Source::Nvidia => library.files.iter().map(|&file| file.to_owned()).collect(),
        #[cfg(feature = "emulator")]
        Source::Emulator => vec![emulator()?],
    };
    for file in &files {
        // SAFETY: the libraries' constructors do nothing to this program's memory but their own.
        let handle = unsafe { libc::dlopen(file.as_ptr(), libc::RTLD_NOW) };
        if !handle.is_null() {
            return Ok(handle);
        }
    }
    let names: Vec<_> = files.iter().map(|file| file.to_string_lossy()).collect();
    Err(format!("{} cannot be loaded", names.join(" or ")))
}

/// The stand-in for all of the libraries, where the build script left it.
#[cfg(feature = "emulator")]
fn emulator() -> Result<CString, String> {
    CString::new(concat!(env!("OUT_DIR"), "/emulated_driver.so")).map_err(|error| error.to_string())
}
