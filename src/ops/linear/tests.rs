//! Tests of the linear layer: values against f64, bits against every other way to compute them.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use super::*;
use crate::ops::parallel::{set_threads, threads};
use crate::ops::samples::{check_bits, check_close, floats, numbers, tensor, with_threads};
use crate::ops::swiglu::swiglu;

const SIZES_IN: [usize; 8] = [1, 7, 16, 17, 64, 112, 768, 1031];
const TYPES: [DType; 3] = [DType::F32, DType::BF16, DType::F16];

fn naive(x: &Tensor, weight: &Tensor) -> Vec<f64> {
    let k = x.dim(1).unwrap();
    let (x, weight) = (floats(x), floats(weight));
    let dot = |x: &[f32], w: &[f32]| x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum();
    x.chunks(k).flat_map(|x| weight.chunks(k).map(move |w| dot(x, w))).collect()
}

fn run(body: Body, x: &Tensor, weight: &Tensor) -> Vec<f32> {
    floats(&x.apply_op2_no_bwd(weight, &Product { body, precision: Precision::F32 }).unwrap())
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

/// `[rows, columns]` transposed.
fn turned(x: &Tensor) -> Tensor {
    x.t().unwrap().contiguous().unwrap()
}

#[test]
fn gradients_are_products_of_the_others() {
    // The last two take more steps than a tile takes at a time.
    for (rows, columns, k) in
        [(1, 1, 1), (2, 9, 7), (70, 67, 130), (13, 64, 16), (300, 5, 100), (2100, 9, 70), (8, 2100, 70)]
    {
        let (x, dy) = (tensor(1, (rows, k)), tensor(2, (rows, columns)));
        let weight = Parameter::trained(&tensor(3, (columns, k))).unwrap();
        let dx = Linear::dense(weight.clone()).unwrap().backward(&x, &dy).unwrap();
        let what = format!("{rows}x{k}x{columns}");
        check_close(&what, &floats(&dx), &naive(&dy, &turned(weight.value())), 2e-6 * columns as f64);
        let expected = naive(&turned(&dy), &turned(&x));
        check_close(&what, &floats(weight.gradient().unwrap()), &expected, 2e-6 * rows as f64);
        let twice: Vec<f64> = expected.iter().map(|dw| 2.0 * dw).collect();
        Linear::dense(weight.clone()).unwrap().backward(&x, &dy).unwrap();
        check_close("twice", &floats(weight.gradient().unwrap()), &twice, 4e-6 * rows as f64);
        for dtype in TYPES {
            let frozen = weight.value().to_dtype(dtype).unwrap();
            let dx = Linear::dense(frozen.clone()).unwrap().backward(&x, &dy).unwrap();
            check_close("frozen", &floats(&dx), &naive(&dy, &turned(&frozen)), 2e-6 * columns as f64);
        }
    }
}

#[test]
fn gradients_have_the_same_bits_on_every_body_and_with_any_number_of_threads() {
    let (rows, columns, k) = (131, 90, 150);
    let (a, b) = (numbers(1, rows * k), numbers(2, k * columns));
    let run = |body| {
        let sizes = Sizes { rows, columns, k };
        let mut c = float::outer_product(body, &a, &b, sizes);
        float::add_outer_product(body, &mut c, &a, &b, sizes);
        c
    };
    let before = threads();
    set_threads(1);
    let expected = run(Body::best());
    for count in [1, 2, 3] {
        set_threads(count);
        for body in Body::all() {
            check_bits(&format!("{count} threads"), &run(body), &expected);
        }
    }
    set_threads(before);
}

#[test]
fn an_adapter_is_a_low_rank_change_of_the_weight() {
    let (x, dy, weight) = (tensor(1, (9, 20)), tensor(2, (9, 12)), tensor(3, (12, 20)));
    let part = |seed, shape: (usize, usize)| Parameter::trained(&tensor(seed, shape)).unwrap();
    let adapters = vec![
        Adapter::new(0..5, part(4, (3, 20)), part(5, (5, 3)), 0.5).unwrap(),
        Adapter::new(7..12, part(6, (2, 20)), part(7, (5, 2)), 2.0).unwrap(),
    ];
    let merge =
        |weight: &Tensor| adapters.iter().fold(weight.clone(), |weight, adapter| adapter.merged(&weight).unwrap());
    let merged = merge(&weight);
    let coarse = weight.to_dtype(DType::BF16).unwrap();
    let fine = floats(&merge(&coarse.to_dtype(DType::F32).unwrap()));
    check_bits("a coarse weight loses nothing", &floats(&merge(&coarse)), &fine);
    let layer = Linear::Adapted(weight.into(), adapters.clone());
    check_close("y", &floats(&layer.forward(&x).unwrap()), &naive(&x, &merged), 1e-4);
    let dx = layer.backward(&x, &dy).unwrap();
    check_close("dx", &floats(&dx), &naive(&dy, &turned(&merged)), 1e-4);
    for adapter in &adapters {
        let [a, b] = adapter.matrices();
        let dy = (dy.narrow(1, adapter.outputs.start, 5).unwrap() * f64::from(adapter.scale)).unwrap();
        let low = (x.matmul(&turned(a.value()))).unwrap();
        check_close("dB", &floats(b.gradient().unwrap()), &naive(&turned(&dy), &turned(&low)), 1e-4);
        let d_low = dy.contiguous().unwrap().matmul(b.value()).unwrap();
        check_close("dA", &floats(a.gradient().unwrap()), &naive(&turned(&d_low), &turned(&x)), 1e-4);
    }
}

#[test]
fn a_packed_weight_multiplies_rounded_activations_with_the_same_bits_in_every_batch() {
    let round = |x: &Tensor| x.to_dtype(DType::BF16).unwrap();
    for (columns, k) in [(1, 2), (64, 96), (75, 258), (130, 1030), (130, 1024)] {
        let (x, weight) = (tensor(9, (70, k)), round(&tensor(10, (columns, k))));
        let mut layer = Linear::dense(weight.clone()).unwrap();
        if !layer.pack().unwrap() {
            assert!(pairs::Pairs::detect().is_none());
            continue;
        }
        assert_eq!(layer.dims().unwrap(), (columns, k));
        let all = floats(&layer.forward(&x).unwrap());
        check_close("packed", &all, &naive(&round(&x), &weight), 1e-6 * k as f64);
        for count in [1, 2, 3, 5, 6, 7, 12, 13, 70] {
            let part = layer.forward(&x.narrow(0, 70 - count, count).unwrap()).unwrap();
            check_bits(&format!("{count} rows"), &floats(&part), &all[(70 - count) * columns..]);
        }
        check_bits("one thread", &floats(&with_threads(1, || layer.forward(&x)).unwrap()), &all);
        assert!(!layer.pack().unwrap(), "twice");
    }
    for unfit in [tensor(11, (8, 6)), round(&tensor(11, (8, 5)))] {
        assert!(!Linear::dense(unfit).unwrap().pack().unwrap());
    }
}

#[test]
fn a_gated_layer_at_once_has_the_bits_of_one_product_after_the_other() {
    let layer = |seed, columns, k| {
        let weight = (tensor(seed, (columns, k)) * 0.3).unwrap().to_dtype(DType::BF16).unwrap();
        let mut layer = Linear::dense(weight).unwrap();
        layer.pack().unwrap().then_some(layer)
    };
    // One panel and several, whole steps of down; its outputs fill their panels or not. The longest k leaves small blocks of rows.
    for (inter, k, columns) in [(64, 32, 75), (192, 64, 64), (448, 224, 75), (64, 4160, 9)] {
        let (Some(gate_up), Some(down)) = (layer(1, 2 * inter, k), layer(2, columns, inter)) else { return };
        for rows in [16, 17, 33, 70, 300] {
            let x = tensor(3, (rows, k));
            let Some(y) = gated(&x, &gate_up, &down).unwrap() else {
                assert!(rows <= 16 || matrix::Unit::detect().is_none());
                continue;
            };
            let after = down.forward(&swiglu(&gate_up.forward(&x).unwrap()).unwrap()).unwrap();
            check_bits(&format!("{rows} rows, {inter}"), &floats(&y), &floats(&after));
            let alone = with_threads(1, || gated(&x, &gate_up, &down)).unwrap().unwrap();
            check_bits("one thread", &floats(&alone), &floats(&y));
        }
    }
    // Panels with gates and ups in one.
    let (Some(gate_up), Some(down)) = (layer(1, 192, 32), layer(2, 8, 96)) else { return };
    assert!(gated(&tensor(3, (70, 32)), &gate_up, &down).unwrap().is_none());
}
