//! Products of a few rows with a weight.

use candle_core::DType;
use eurus::ops::kernels;
use eurus::ops::linear::Linear;

use crate::emulator::Library;
use crate::samples::{Buffer, Random, TYPES, check_shapes, compare, floats, rounding};

#[test]
fn products_of_few_rows_are_the_cpu_body_s() {
    check_shapes(&TYPES, 170, |random, dtype| {
        let (rows, columns) = (random.between(1, 8), random.between(1, 70));
        let most = random.choose(&[9, 300, 2000]);
        let k = random.between(1, most);
        let k = if random.between(0, 1) == 0 { k.next_multiple_of(8) } else { k };
        let (x, weight) = (random.numbers(dtype, rows * k, 1.0), random.numbers(dtype, columns * k, 1.0));
        let y = Buffer::poisoned(rows * columns * dtype.size_in_bytes());
        let addresses = [y.address(), x.address(), weight.address()];
        Library::sound().run(&kernels::linear(dtype, addresses, [rows, columns, k]), random.seed());
        let expected = Linear::dense(weight.tensor((columns, k))).unwrap().forward(&x.tensor((rows, k))).unwrap();
        // k terms of at most 1 are added up in two orders.
        let order = 1e-8 * k as f32 + 1e-6;
        compare(&y.floats(dtype), &floats(&expected), order, rounding(dtype) + 1e-6)
    });
}

#[test]
fn a_row_has_the_same_bits_beside_others() {
    let mut random = Random::new(1);
    let (columns, k) = (37, 520);
    for dtype in TYPES {
        let (x, weight) = (random.numbers(dtype, 8 * k, 1.0), random.numbers(dtype, columns * k, 1.0));
        let run = |rows: usize, first: usize, dtype: DType| {
            let y = Buffer::poisoned(rows * columns * dtype.size_in_bytes());
            let x = x.address() + (first * k * dtype.size_in_bytes()) as u64;
            Library::sound().run(&kernels::linear(dtype, [y.address(), x, weight.address()], [rows, columns, k]), 1);
            y.floats(dtype)
        };
        let all = run(8, 0, dtype);
        for (rows, first) in [(1, 0), (1, 5), (2, 3), (3, 4), (5, 1), (7, 1)] {
            assert_eq!(run(rows, first, dtype), all[first * columns..][..rows * columns], "{dtype:?}, {rows} rows");
        }
    }
}
