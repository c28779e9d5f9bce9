//! The comparisons notice errors: kernels compiled with one of them fail where the sound ones pass.

use candle_core::DType;

use crate::attention::{check_decode, check_prefill};
use crate::emulator::Library;
use crate::samples::Random;

const SHAPES: u64 = 24;

/// At least `least` of the shapes must fail with the error `name`, and none without it, in both attention kernels.
#[track_caller]
#[allow(clippy::print_stdout)]
fn check(name: &str, least: usize) {
    let planted = Library::planted(name);
    let failures = |check: &dyn Fn(&Library, &mut Random) -> Result<(), String>| {
        let failed =
            |library: &Library| (0..SHAPES).filter(|&seed| check(library, &mut Random::new(seed)).is_err()).count();
        [failed(Library::sound()), failed(&planted)]
    };
    for (kernel, [sound, planted]) in [
        ("decode", failures(&|library, random| check_decode(library, random, DType::BF16))),
        ("prefill", failures(&|library, random| check_prefill(library, random, DType::F16))),
    ] {
        println!("{name}, {kernel}: {planted} of {SHAPES} shapes fail");
        assert!(sound == 0 && planted >= least, "{kernel} with {name}: {sound} without and {planted} with it");
    }
}

#[test]
fn a_dropped_barrier_is_noticed() {
    check("barrier", 20);
}

/// Half of the shapes have no window, and some windows are longer than every context.
#[test]
fn a_window_off_by_one_is_noticed() {
    check("window", 4);
}

/// A third of the shapes have one sequence only.
#[test]
fn a_wrong_stride_of_block_tables_is_noticed() {
    check("table_stride", 8);
}
