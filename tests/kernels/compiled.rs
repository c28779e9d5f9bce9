//! What the compiler made of the kernels for GPUs: symbols and parameters as in the table, registers, tensor core instructions.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::process::Command;

use eurus::ops::kernels::{FAMILIES, IMAGES};
use regex::Regex;

fn out(name: &str) -> PathBuf {
    PathBuf::from(env!("OUT_DIR")).join(name)
}

/// What cuobjdump prints of the image of kernels/`file`.cu.
fn dump(what: &str, file: &str) -> String {
    let bin = PathBuf::from(env!("EURUS_CUDA_BIN"));
    // It calls nvdisasm, which lies beside it.
    let path = std::env::join_paths(
        [bin.clone()].into_iter().chain(std::env::split_paths(&std::env::var_os("PATH").unwrap())),
    );
    let mut command = Command::new(bin.join("cuobjdump"));
    let output = command.arg(what).arg(out(&format!("{file}.fatbin"))).env("PATH", path.unwrap()).output().unwrap();
    assert!(output.status.success(), "{what} {file}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// The sources that the table names.
fn sources() -> Vec<&'static str> {
    let mut names: Vec<_> = FAMILIES.iter().map(|family| family.file).collect();
    names.sort_unstable();
    names.dedup();
    names
}

#[test]
fn an_image_of_every_source_is_embedded() {
    let embedded: Vec<_> = IMAGES.iter().map(|(name, _)| *name).collect();
    assert_eq!(embedded, sources());
    // The magic number of a fatbin.
    assert!(IMAGES.iter().all(|(_, bytes)| bytes.starts_with(&[0x50, 0xed, 0x55, 0xba])));
}

#[test]
fn symbols_and_parameters_are_those_of_the_table() {
    let entry = Regex::new(r"\.entry (\w+)\(([^)]*)\)").unwrap();
    for file in sources() {
        let text = dump("--dump-ptx", file);
        let count = |parameters: &str| parameters.matches(".param").count();
        let made: BTreeMap<String, usize> =
            entry.captures_iter(&text).map(|hit| (hit[1].to_string(), count(&hit[2]))).collect();
        let families = FAMILIES.iter().filter(|family| family.file == file);
        let wanted: BTreeMap<String, usize> =
            families.flat_map(|family| family.symbols().map(|symbol| (symbol, family.parameter_count))).collect();
        assert_eq!(made, wanted, "{file}");
    }
}

#[test]
fn images_hold_code_for_hopper_and_ptx_for_the_rest() {
    for file in sources() {
        let (code, ptx) = (dump("--list-elf", file), dump("--list-ptx", file));
        assert!(code.contains("sm_90a.cubin"), "{file}: {code}");
        assert!(ptx.contains("sm_80.ptx"), "{file}: {ptx}");
    }
}

/// Registers in local memory would cost more bandwidth than the keys and values do.
#[test]
fn attention_keeps_everything_in_registers() {
    let line = Regex::new(r"Function properties for (\w+)\s+(.*)\n[^\n]*Used (\d+) registers").unwrap();
    let mut seen = 0;
    for family in FAMILIES.iter().filter(|family| family.name.ends_with("attention")) {
        let log = fs::read_to_string(out(&format!("{}.log", family.file))).unwrap();
        for hit in line.captures_iter(&log).filter(|hit| hit[1].starts_with(family.name)) {
            println!("{}: {} registers", &hit[1], &hit[3]);
            assert!(hit[2].contains("0 bytes spill stores, 0 bytes spill loads"), "{}: {}", &hit[1], &hit[2]);
            seen += 1;
        }
    }
    assert_eq!(seen, 4 + 4 + 3);
}

#[test]
fn tensor_cores_and_wide_loads_are_used_where_promised() {
    let function = Regex::new(r"Function : (\w+)").unwrap();
    for family in FAMILIES {
        let text = dump("--dump-sass", family.file);
        let starts: Vec<_> =
            function.captures_iter(&text).map(|hit| (hit[1].to_string(), hit.get(0).unwrap().end())).collect();
        let code = |symbol: &str| {
            let index =
                starts.iter().position(|(name, _)| name == symbol).unwrap_or_else(|| panic!("{symbol} is missing"));
            &text[starts[index].1..starts.get(index + 1).map_or(text.len(), |next| next.1)]
        };
        for symbol in family.symbols() {
            let code = code(&symbol);
            let product = if symbol.contains("bf16") { "HMMA.16816.F32.BF16" } else { "HMMA.16816.F32 " };
            assert_eq!(code.contains(product), family.tensor_cores, "{symbol}: {product}");
            if family.tensor_cores {
                // Copies in the background, 16 bytes each, and matrices out of shared memory.
                for instruction in ["LDGSTS.E.BYPASS.128", "LDSM.16.M88.4", "LDSM.16.MT88.4"] {
                    assert!(code.contains(instruction), "{symbol}: {instruction}");
                }
            }
            if ["rms_norm", "add_rms_norm", "swiglu", "embed", "add_expert", "linear"].contains(&family.name) {
                assert!(code.contains("LDG.E.128"), "{symbol} loads less than 16 bytes at a time");
            }
        }
    }
}
