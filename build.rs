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
            link_without_libraries(&folder("OUT_DIR")?)?;
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
    println!("cargo:rerun-if-env-changed=NVCC");
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

/// The compiler: NVCC, which .cargo/config.toml sets to that of `make cuda-toolchain`, or that of CUDA_HOME, or of the search path.
fn nvcc() -> Result<PathBuf, String> {
    let mut found: Vec<PathBuf> = env::var_os("NVCC").into_iter().map(PathBuf::from).collect();
    found.extend(env::var_os("CUDA_HOME").map(|home| Path::new(&home).join("bin/nvcc")));
    found.extend(env::var_os("PATH").iter().flat_map(env::split_paths).map(|folder| folder.join("nvcc")));
    let found = found.into_iter().find(|path| path.is_file()).ok_or(
        "the feature `cuda` needs nvcc: run `make cuda-toolchain`, or set NVCC or CUDA_HOME to CUDA 13.0 or later",
    )?;
    fs::canonicalize(&found).map_err(|error| format!("{}: {error}", found.display()))
}

/// A library of kernels/imports.txt.
#[derive(Default)]
struct Library<'a> {
    files: &'a str,
    /// What its functions return until it is found.
    code: &'a str,
    optional: bool,
    functions: Vec<&'a str>,
}

/// Gives candle's calls of NVIDIA's libraries somewhere to go: a jump for each function of kernels/imports.txt, through a table that
/// the program fills when it opens a device (`imports.rs`). What candle asks the linker for is empty, so neither linking nor starting
/// needs a driver. Only the runtime library, which candle's compiled kernels use, is linked in, from where nvcc lies.
fn link_without_libraries(out: &Path) -> Result<(), String> {
    let listed = fs::read_to_string("kernels/imports.txt").map_err(|error| format!("kernels/imports.txt: {error}"))?;
    let mut libraries: Vec<Library> = Vec::new();
    for line in listed.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
        match (line.strip_prefix('[').and_then(|line| line.split_once("] ")), libraries.last_mut()) {
            (Some((files, rest)), _) => {
                let (code, optional) = rest.strip_suffix(" optional").map_or((rest, false), |code| (code, true));
                libraries.push(Library { files, code, optional, functions: Vec::new() });
            }
            (None, Some(library)) => library.functions.push(line),
            (None, None) => return Err(format!("kernels/imports.txt: {line} is in no section")),
        }
    }
    let write = |name: &str, text: &[u8]| {
        fs::write(out.join(name), text).map_err(|error| format!("{}: {error}", out.join(name).display()))
    };
    write("imports.s", jumps(&libraries).as_bytes())?;
    write("imports.rs", table(&libraries).as_bytes())?;
    let mut assemble = Command::new("g++");
    assemble.arg("-c").arg(out.join("imports.s")).arg("-o").arg(out.join("imports.o"));
    run(assemble)?;
    println!("cargo:rustc-link-arg={}", out.join("imports.o").display());

    fs::create_dir_all(out.join("link")).map_err(|error| format!("link: {error}"))?;
    for name in ["cuda", "cublas", "cublasLt", "curand", "nvrtc"] {
        write(&format!("link/lib{name}.a"), b"!<arch>\n")?;
    }
    let nvcc = nvcc()?;
    let toolkit = nvcc.parent().and_then(Path::parent).unwrap_or(Path::new("/"));
    let places =
        ["lib64", "lib", "targets/x86_64-linux/lib"].map(|place| toolkit.join(place).join("libcudart_static.a"));
    let Some(runtime) = places.iter().find(|path| path.is_file()) else {
        return Err(format!("{} lacks lib64/libcudart_static.a", toolkit.display()));
    };
    fs::copy(runtime, out.join("link/libcudart.a")).map_err(|error| format!("{}: {error}", runtime.display()))?;
    println!("cargo:rustc-link-search=native={}", out.join("link").display());
    Ok(())
}

/// The jumps, their table, and what stands in it before a library is found: functions that return the library's error.
fn jumps(libraries: &[Library]) -> String {
    let functions =
        || libraries.iter().enumerate().flat_map(|(of, library)| library.functions.iter().map(move |f| (of, f)));
    let mut text = String::from("    .text\n");
    for (of, library) in libraries.iter().enumerate() {
        text += &format!("missing_{of}:\n    movl ${}, %eax\n    ret\n", library.code);
    }
    for (index, (_, name)) in functions().enumerate() {
        text += &format!("    .globl {name}\n    .hidden {name}\n    .type {name},@function\n");
        text += &format!("{name}:\n    jmp *eurus_imports+{}(%rip)\n", 8 * index);
    }
    text += "    .data\n    .balign 8\n    .globl eurus_imports\n    .hidden eurus_imports\neurus_imports:\n";
    for (of, _) in functions() {
        text += &format!("    .quad missing_{of}\n");
    }
    text + "    .section .note.GNU-stack,\"\",@progbits\n"
}

/// `LIBRARIES` and `COUNT` for src/ops/cuda/imports.rs.
fn table(libraries: &[Library]) -> String {
    let texts = |names: &mut dyn Iterator<Item = &str>| names.map(|name| format!("c\"{name}\", ")).collect::<String>();
    let mut text = String::from("const LIBRARIES: &[Library] = &[\n");
    for Library { files, optional, functions, .. } in libraries {
        let (files, functions) = (texts(&mut files.split(' ')), texts(&mut functions.iter().copied()));
        text += &format!("Library {{ files: &[{files}], optional: {optional}, functions: &[{functions}] }},\n");
    }
    let count: usize = libraries.iter().map(|library| library.functions.len()).sum();
    text + &format!("];\nconst COUNT: usize = {count};\n")
}

/// `emulator.so` with all kernels, `plant_<name>.so` with each planted error, and `emulated_driver.so`, which calls all kernels as a
/// driver does. EURUS_EMULATOR_FLAGS: further compiler flags.
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
    commands.push(object("kernels/emulator/driver.cpp", None, "emulator-driver.o"));
    for (plant, sources) in PLANTS {
        let library = format!("plant_{}", plant.to_lowercase());
        for name in *sources {
            commands.push(object(&format!("kernels/{name}.cu"), Some(plant), &format!("{library}-{name}.o")));
        }
        libraries.push((library, sources.iter().map(|&name| name.to_owned()).collect()));
    }
    run_all(commands)?;
    let link = |library: &str, objects: &mut dyn Iterator<Item = String>| {
        let mut command = Command::new("g++");
        command.args(["-shared", "-Wl,-Bsymbolic", "-o"]).arg(out.join(format!("{library}.so")));
        command.args(flags.split_whitespace()).arg(out.join("emulator.o"));
        command.args(objects.map(|object| out.join(object)));
        command
    };
    let links = libraries
        .iter()
        .map(|(library, names)| link(library, &mut names.iter().map(|name| format!("{library}-{name}.o"))));
    let of_kernels = names.iter().map(String::as_str).chain(["driver"]);
    let driver = link("emulated_driver", &mut of_kernels.map(|name| format!("emulator-{name}.o")));
    run_all(links.chain([driver]).collect()).map(drop)
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
