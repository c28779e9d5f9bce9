//! Tests of the linear layer: values against f64, bits against every other way to compute them.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use super::*;
use crate::ops::parallel::set_threads;
use crate::ops::samples::{check_bits, check_close, floats, tensor};

const SIZES_IN: [usize; 8] = [1, 7, 16, 17, 64, 112, 768, 1031];
const TYPES: [DType; 3] = [DType::F32, DType::BF16, DType::F16];

fn naive(x: &Tensor, weight: &Tensor) -> Vec<f64> {
    let k = x.dim(1).unwrap();
    let (x, weight) = (floats(x), floats(weight));
    let dot = |x: &[f32], w: &[f32]| x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum();
    x.chunks(k).flat_map(|x| weight.chunks(k).map(move |w| dot(x, w))).collect()
}

fn run(body: Body, x: &Tensor, weight: &Tensor) -> Vec<f32> {
    floats(&x.apply_op2(weight, Product { body }).unwrap())
}

#[test]
fn values_are_those_of_the_formula() {
    for dtype in TYPES {
        for k in SIZES_IN {
            for (rows, columns) in [(1, 1), (1, 9), (2, 8), (5, 3), (13, 37), (70, 67)] {
                let x = tensor(1, (rows, k));
                let weight = tensor(2, (columns, k)).to_dtype(dtype).unwrap();
                let y = Linear::dense(weight.clone()).unwrap().forward(&x).unwrap();
                assert_eq!(y.dims(), [rows, columns]);
                let what = format!("{dtype:?} {rows}x{k}x{columns}");
                check_close(&what, &floats(&y), &naive(&x, &weight), 2e-6 * k as f64);
            }
        }
    }
}

#[test]
fn a_row_has_the_same_bits_in_every_batch_and_on_every_body() {
    for dtype in TYPES {
        for k in SIZES_IN {
            let (rows, columns) = (70, 75);
            let x = tensor(3, (rows, k));
            let weight = tensor(4, (columns, k)).to_dtype(dtype).unwrap();
            let expected = run(Body::best(), &x, &weight);
            for body in Body::all() {
                for count in [1, 2, 3, 4, 5, 6, 7, 12, 31, 32, 33, 64, 70] {
                    let first = rows - count;
                    let got = run(body, &x.narrow(0, first, count).unwrap(), &weight);
                    check_bits(&format!("{dtype:?} k {k}, {count} rows"), &got, &expected[first * columns..]);
                }
            }
        }
    }
}

#[test]
fn a_column_has_the_same_bits_in_every_weight() {
    let (rows, columns, k) = (70, 75, 112);
    let x = tensor(5, (rows, k));
    let weight = tensor(6, (columns, k));
    let all = Linear::dense(weight.clone()).unwrap().forward(&x).unwrap();
    for (first, count) in [(0, 1), (1, 7), (3, 8), (10, 33), (74, 1), (1, 74)] {
        for rows in [1, 5, 70] {
            let part = Linear::dense(weight.narrow(0, first, count).unwrap()).unwrap();
            let got = part.forward(&x.narrow(0, 0, rows).unwrap()).unwrap();
            let expected = all.narrow(0, 0, rows).unwrap().narrow(1, first, count).unwrap();
            check_bits(&format!("columns {first}.. of {count}"), &floats(&got), &floats(&expected));
        }
    }
}

#[test]
fn bits_do_not_depend_on_the_number_of_threads() {
    let before = crate::ops::parallel::threads();
    for rows in [1, 6, 70] {
        let (x, weight) = (tensor(7, (rows, 200)), tensor(8, (300, 200)));
        let run = |threads| {
            set_threads(threads);
            floats(&Linear::dense(weight.clone()).unwrap().forward(&x).unwrap())
        };
        let one = run(1);
        check_bits("two threads", &run(2), &one);
        check_bits("three threads", &run(3), &one);
    }
    set_threads(before);
}

#[test]
fn wrong_inputs_are_errors() {
    assert!(Linear::dense(tensor(1, 4)).is_err());
    assert!(Linear::dense(tensor(1, (4, 4)).to_dtype(DType::F64).unwrap()).is_err());
    let layer = Linear::dense(tensor(1, (4, 6))).unwrap();
    assert!(layer.forward(&tensor(1, (2, 5))).is_err());
    let turned = tensor(1, (6, 2)).t().unwrap();
    let error = layer.forward(&turned).unwrap_err().to_string();
    assert!(error.contains("contiguous"), "{error}");
    assert_eq!(layer.forward(&turned.contiguous().unwrap()).unwrap().dims(), [2, 4]);
    assert_eq!(layer.forward(&tensor(1, (0, 6))).unwrap().dims(), [0, 4]);
}
