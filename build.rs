//! Compiles kernels/*.cu: for GPUs with the feature `cuda`, for the CPU with the feature `emulator`. Does nothing without them.
#![allow(clippy::print_stdout)]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};
use std::{env, fs, thread};

/// Errors that tests must find: compiled with -DPLANT_<name>, and the sources that have them.
const PLANTS: &[(&str, &[&str])] = &[
    ("BARRIER", &["decode_attention", "prefill_attention"]),
    ("WINDOW", &["decode_attention", "prefill_attention"]),
    ("TABLE_STRIDE", &["decode_attention", "prefill_attention"]),
];

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    let feature = |name: &str| env::var_os(format!("CARGO_FEATURE_{name}")).is_some();
    let result = (|| {
        if feature("CUDA") || feature("EMULATOR") {
            println!("cargo:rerun-if-changed=kernels");
        }
        if feature("CUDA") {
            compile_for_gpus(&kernels()?, &folder("OUT_DIR")?)?;
        }
        if feature("EMULATOR") {
            compile_for_the_cpu(&kernels()?, &folder("OUT_DIR")?)?;
        }
        Ok::<(), String>(())
    })();
    if let Err(error) = result {
        eprintln!("{error}");
        std::process::exit(1);
    }
}

fn folder(variable: &str) -> Result<PathBuf, String> {
    env::var_os(variable).map(PathBuf::from).ok_or_else(|| format!("{variable} is not set"))
}

/// The names of kernels/*.cu without the ending, in order.
fn kernels() -> Result<Vec<String>, String> {
    let entries = fs::read_dir("kernels").map_err(|error| format!("kernels: {error}"))?;
    let paths = entries.filter_map(|entry| entry.ok().map(|entry| entry.path()));
    let cuda = paths.filter(|path| path.extension().is_some_and(|ending| ending == "cu"));
    let mut names: Vec<String> = cuda.filter_map(|path| Some(path.file_stem()?.to_str()?.to_owned())).collect();
    names.sort();
    Ok(names)
}

/// `<name>.fatbin` with code for Hopper and PTX for what else is as new as Ampere, `<name>.log` with what the assembler says of
/// registers, and `images.rs`, which embeds them.
fn compile_for_gpus(names: &[String], out: &Path) -> Result<(), String> {
    println!("cargo:rerun-if-env-changed=EURUS_NVCC");
    let nvcc = nvcc()?;
    println!("cargo:rustc-env=EURUS_CUDA_BIN={}", nvcc.parent().unwrap_or(Path::new("")).display());
    let commands = names.iter().map(|name| {
        let mut command = Command::new(&nvcc);
        command.args(["-std=c++17", "-O3", "-fatbin", "-Xptxas", "-v"]);
        command.args(["-gencode", "arch=compute_90a,code=sm_90a", "-gencode", "arch=compute_80,code=compute_80"]);
        command.arg("-o").arg(out.join(format!("{name}.fatbin"))).arg(format!("kernels/{name}.cu"));
        command
    });
    for (name, log) in names.iter().zip(run_all(commands.collect())?) {
        fs::write(out.join(format!("{name}.log")), log).map_err(|error| format!("{name}.log: {error}"))?;
    }
    let image = |name: &String| format!("    (\"{name}\", include_bytes!(\"{name}.fatbin\")),\n");
    let images: String = names.iter().map(image).collect();
    fs::write(out.join("images.rs"), format!("&[\n{images}]\n")).map_err(|error| format!("images.rs: {error}"))
}

/// The compiler: EURUS_NVCC, or that of `make cuda-toolchain`, or of CUDA_HOME, or of the search path.
fn nvcc() -> Result<PathBuf, String> {
    if let Some(path) = env::var_os("EURUS_NVCC") {
        return Ok(path.into());
    }
    let mut found = Vec::new();
    for entry in fs::read_dir(".cuda/lib").into_iter().flatten().flatten() {
        found.push(entry.path().join("site-packages/nvidia/cu13/bin/nvcc"));
    }
    found.extend(env::var_os("CUDA_HOME").map(|home| Path::new(&home).join("bin/nvcc")));
    found.extend(env::var_os("PATH").iter().flat_map(env::split_paths).map(|folder| folder.join("nvcc")));
    let found = found.into_iter().find(|path| path.is_file()).ok_or(
        "the feature `cuda` needs nvcc: run `make cuda-toolchain`, or set EURUS_NVCC or CUDA_HOME to CUDA 13.0 or later",
    )?;
    fs::canonicalize(&found).map_err(|error| format!("{}: {error}", found.display()))
}

/// `emulator.so` with all kernels, and `plant_<name>.so` with each planted error. EURUS_EMULATOR_FLAGS: further compiler flags.
fn compile_for_the_cpu(names: &[String], out: &Path) -> Result<(), String> {
    println!("cargo:rerun-if-env-changed=EURUS_EMULATOR_FLAGS");
    let flags = env::var("EURUS_EMULATOR_FLAGS").unwrap_or_default();
    let object = |source: &str, define: Option<&str>, to: &str| {
        let mut command = Command::new("g++");
        command.args(["-std=c++17", "-O2", "-g1", "-fPIC", "-fno-gnu-unique", "-fno-omit-frame-pointer", "-Wall"]);
        command.args(["-Wno-unknown-pragmas", "-Wno-sign-compare", "-c", "-x", "c++", source, "-o"]).arg(out.join(to));
        command.args(define.map(|name| format!("-DPLANT_{name}"))).args(flags.split_whitespace());
        command
    };
    let mut libraries = vec![("emulator".to_owned(), names.to_vec())];
    let mut commands = vec![object("kernels/emulator/emulator.cpp", None, "emulator.o")];
    commands
        .extend(names.iter().map(|name| object(&format!("kernels/{name}.cu"), None, &format!("emulator-{name}.o"))));
    commands.push(object("kernels/emulator/probes.cu", None, "emulator-probes.o"));
    libraries[0].1.push("probes".to_owned());
    for (plant, sources) in PLANTS {
        let library = format!("plant_{}", plant.to_lowercase());
        for name in *sources {
            commands.push(object(&format!("kernels/{name}.cu"), Some(plant), &format!("{library}-{name}.o")));
        }
        libraries.push((library, sources.iter().map(|&name| name.to_owned()).collect()));
    }
    run_all(commands)?;
    let links = libraries.iter().map(|(library, names)| {
        let mut command = Command::new("g++");
        command.args(["-shared", "-Wl,-Bsymbolic", "-o"]).arg(out.join(format!("{library}.so")));
        command.args(flags.split_whitespace()).arg(out.join("emulator.o"));
        command.args(names.iter().map(|name| out.join(format!("{library}-{name}.o"))));
        command
    });
    run_all(links.collect()).map(drop)
}

/// Runs commands on all processors and returns what each wrote to its error stream; the first that fails is the error.
fn run_all(commands: Vec<Command>) -> Result<Vec<String>, String> {
    let results: Vec<_> = commands.iter().map(|_| Mutex::new(Ok(String::new()))).collect();
    let commands = Mutex::new(commands.into_iter().enumerate());
    let next = || commands.lock().unwrap_or_else(PoisonError::into_inner).next();
    thread::scope(|scope| {
        for _ in 0..thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                while let Some((index, command)) = next() {
                    *results[index].lock().unwrap_or_else(PoisonError::into_inner) = run(command);
                }
            });
        }
    });
    results.into_iter().map(|result| result.into_inner().unwrap_or_else(PoisonError::into_inner)).collect()
}

fn run(mut command: Command) -> Result<String, String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.output().map_err(|error| format!("{program}: {error}"))?;
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    if output.status.success() { Ok(text) } else { Err(format!("{command:?}\n{text}")) }
}
