//! Formats bit by bit, products against exact ones, and the promises about bits.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use candle_core::{Device, Tensor};

use super::formats::GROUP;
use super::*;
use crate::ops::lanes::Body;
use crate::ops::linear::Linear;
use crate::ops::parameter::Parameter;
use crate::ops::samples::{check_bits, check_close, floats, numbers, with_threads};

/// Blocks of any bits with scales of about 1/1000.
fn blocks(format: Format, seed: u64, count: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(2) | 1;
    let mut bytes = Vec::new();
    for _ in 0..count * format.block_bytes() {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        bytes.push((state >> 56) as u8);
    }
    for block in bytes.chunks_exact_mut(format.block_bytes()) {
        let scales: &[usize] = match format {
            Format::Q4_0 | Format::Q8_0 => &[0],
            Format::Q4K | Format::Q5K => &[0, 2],
            Format::Q6K => &[208],
        };
        // An exponent of 2^-10 and any mantissa; Q6_K also of either sign.
        for &at in scales {
            block[at + 1] = block[at + 1] & 3 | 5 << 2;
        }
    }
    bytes
}

fn matrix(format: Format, rows: usize, k: usize) -> Matrix {
    Matrix { format, rows, k }
}

fn weight(format: Format, rows: usize, k: usize) -> Parameter {
    let blocks = blocks(format, 7, rows * k / format.block_len());
    Parameter::quantized(matrix(format, rows, k), &blocks, &Device::Cpu).unwrap()
}

/// The numbers of every row.
fn values(weight: &Parameter) -> Vec<f32> {
    let (rows, _) = weight.dims2().unwrap();
    let ids = Tensor::arange(0, u32::try_from(rows).unwrap(), &Device::Cpu).unwrap();
    floats(&crate::ops::embed::embed(&ids, weight).unwrap())
}

/// Activations as they are rounded: codes of eight bits times a scale.
fn rounded(x: &[f32]) -> Vec<f64> {
    let mut out = Vec::new();
    for x in x.chunks(GROUP) {
        let largest = x.iter().fold(0.0_f32, |most, x| most.max(x.abs()));
        let scale = f64::from(largest) / 127.0;
        out.extend(x.iter().map(|x| if scale > 0.0 { (f64::from(*x) / scale).round_ties_even() * scale } else { 0.0 }));
    }
    out
}

#[test]
fn blocks_and_tiles_keep_every_bit() {
    for format in Format::ALL {
        // Two tiles together, then one alone.
        let (rows, k) = (39, 2 * 256);
        let blocks = blocks(format, 3, rows * k / format.block_len());
        let tiles: Vec<u8> = matrix(format, rows, k).pack(&blocks).unwrap().to_vec1().unwrap();
        let record_bytes = tiles::record_bytes(format);
        for (index, bytes) in blocks.chunks_exact(format.block_bytes()).enumerate() {
            let (row, place) = (index / (k / format.block_len()), index % (k / format.block_len()));
            let index = match row / 16 {
                2 => 2 * (k / format.block_len()) + place,
                tile => 2 * place + tile,
            };
            let record = &tiles[index * record_bytes..][..record_bytes];
            let block = tiles::get(format, record, row % 16);
            assert_eq!(block, Block::parse(format, bytes), "{format:?}");
            let mut again = vec![0; bytes.len()];
            block.write(format, &mut again);
            assert_eq!(again, bytes, "{format:?}");
        }
    }
}

#[test]
fn products_are_those_of_rounded_activations_with_the_numbers_of_the_rows() {
    for format in Format::ALL {
        for (rows, columns, k) in [(1, 16, 256), (3, 21, 512), (5, 40, 768), (17, 33, 256), (2, 1, 256)] {
            let weight = weight(format, columns, k);
            let (x, w) = (numbers(1, rows * k), values(&weight));
            let rounded = rounded(&x);
            let dot = |row: usize, column: usize| -> f64 {
                (0..k).map(|i| rounded[row * k + i] * f64::from(w[column * k + i])).sum()
            };
            let expected: Vec<f64> = (0..rows * columns).map(|i| dot(i / columns, i % columns)).collect();
            let x = Tensor::from_vec(x, (rows, k), &Device::Cpu).unwrap();
            let y = Linear::dense(weight).unwrap().forward(&x).unwrap();
            assert_eq!(y.dims(), [rows, columns]);
            check_close(&format!("{format:?} {rows}x{k}x{columns}"), &floats(&y), &expected, 2e-5 * k as f64);
        }
    }
}

#[test]
fn a_row_has_the_same_bits_in_every_batch_on_every_body_and_with_any_threads() {
    for format in Format::ALL {
        // An odd number of groups where blocks allow it, and rows that the matrix unit takes in several blocks.
        let (rows, columns, k) = (290, 50, 512 + format.block_len());
        let weight = weight(format, columns, k);
        let x = Tensor::from_vec(numbers(2, rows * k), (rows, k), &Device::Cpu).unwrap();
        let product = |body, x: &Tensor| {
            let product = Product { body, matrices: weight.matrices() };
            floats(&x.contiguous().unwrap().apply_op2_no_bwd(weight.value(), &product).unwrap())
        };
        let all = product(Body::best(), &x);
        for body in Body::all() {
            check_bits("body", &product(body, &x), &all);
        }
        for (first, count) in [(0, 1), (5, 2), (3, 7), (11, 16), (289, 1), (100, 25), (210, 40)] {
            let part = product(Body::best(), &x.narrow(0, first, count).unwrap());
            check_bits(&format!("{format:?} rows {first}+{count}"), &part, &all[first * columns..][..count * columns]);
        }
        check_bits("one thread", &with_threads(1, || product(Body::best(), &x)), &all);
    }
}

#[test]
fn stacked_matrices_of_different_formats_compute_side_by_side() {
    let parts = [weight(Format::Q4K, 40, 256), weight(Format::Q4K, 5, 256), weight(Format::Q6K, 24, 256)];
    let x = Tensor::from_vec(numbers(4, 3 * 256), (3, 256), &Device::Cpu).unwrap();
    let stacked = Linear::dense(Parameter::stack(&parts).unwrap()).unwrap();
    assert_eq!(stacked.dims().unwrap(), (69, 256));
    let each: Vec<Tensor> =
        parts.iter().map(|part| Linear::dense(part.clone()).unwrap().forward(&x).unwrap()).collect();
    check_bits("stack", &floats(&stacked.forward(&x).unwrap()), &floats(&Tensor::cat(&each, 1).unwrap()));
    let mixed = [parts[0].clone(), Tensor::zeros((4, 256), candle_core::DType::F32, &Device::Cpu).unwrap().into()];
    assert!(Parameter::stack(&mixed).unwrap_err().to_string().contains("partly quantised"));
}

#[test]
fn what_is_no_number_stays_none() {
    let layer = Linear::dense(weight(Format::Q8_0, 16, 256)).unwrap();
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut x = numbers(5, 512);
        x[300] = bad;
        let y = layer.forward(&Tensor::from_vec(x, (2, 256), &Device::Cpu).unwrap()).unwrap();
        let y = floats(&y);
        assert!(y[..16].iter().all(|y| y.is_finite()) && y[16..].iter().all(|y| !y.is_finite()), "{bad}: {y:?}");
    }
    let zeros = Tensor::zeros((1, 256), candle_core::DType::F32, &Device::Cpu).unwrap();
    assert!(floats(&layer.forward(&zeros).unwrap()).iter().all(|y| *y == 0.0));
}

#[test]
fn quantising_is_off_by_half_a_step_at_most() {
    let x = numbers(6, 4096);
    for (format, steps) in [(Format::Q8_0, 127.0), (Format::Q4_0, 8.0)] {
        let blocks = quantize(format, &x);
        let weight = Parameter::quantized(matrix(format, 16, 256), &blocks, &Device::Cpu).unwrap();
        for (x, got) in x.chunks(32).zip(values(&weight).chunks(32)) {
            let largest = x.iter().fold(0.0_f32, |most, x| most.max(x.abs()));
            // Half a step, and 127 times the rounding of the scale to f16. Q4_0 has codes from -8 to 7, so the number opposite
            // to the largest may be off by a whole step.
            let most = if format == Format::Q4_0 { 1.01 } else { 0.57 } * largest / steps;
            assert!(x.iter().zip(got).all(|(x, got)| (x - got).abs() <= most), "{format:?}");
        }
    }
}

/// The root mean square of what uniform numbers of -1 to 1 are off by, where every code is a step of the range.
#[test]
fn searched_scales_are_as_good_as_their_codes_allow() {
    let x = numbers(8, 64 * 256);
    for (format, steps) in [(Format::Q4K, 15.0), (Format::Q5K, 31.0), (Format::Q6K, 63.0)] {
        let blocks = quantize(format, &x);
        let weight = Parameter::quantized(matrix(format, 64, 256), &blocks, &Device::Cpu).unwrap();
        let squares: f64 = x.iter().zip(values(&weight)).map(|(x, got)| f64::from(x - got).powi(2)).sum();
        let off = (squares / x.len() as f64).sqrt();
        assert!(off < 1.02 * 2.0 / steps / 12.0_f64.sqrt(), "{format:?}: {off}");
    }
}

#[test]
fn blocks_of_one_kind_of_number_come_back() {
    let line: Vec<f32> = (0..256).map(|i| 0.5 - (i % 16) as f32 / 15.0).collect();
    let lone: Vec<f32> = (0..256).map(|i| if i == 77 { -3.0 } else { 0.0 }).collect();
    for format in [Format::Q4K, Format::Q5K, Format::Q6K] {
        for (what, x, tolerance) in [
            ("zeros", vec![0.0; 256], 0.0),
            ("ones", vec![1.0; 256], 1e-3),
            ("negative", vec![-0.25; 256], 1e-3),
            ("tiny", vec![1e-30; 256], 1e-30),
            ("large", vec![6e4; 256], 60.0),
            ("an even line", line.clone(), 0.03),
            ("a lone number", lone.clone(), 3e-3),
        ] {
            let blocks = quantize(format, &x);
            let weight = Parameter::quantized(matrix(format, 1, 256), &blocks, &Device::Cpu).unwrap();
            let off = x.iter().zip(values(&weight)).map(|(x, got)| (x - got).abs()).fold(0.0, f32::max);
            assert!(off <= tolerance, "{format:?}, {what}: off by {off}");
        }
    }
}

#[test]
fn a_block_is_the_same_on_every_processor_and_with_any_threads() {
    let x = numbers(9, 100 * 256);
    for format in [Format::Q4K, Format::Q5K, Format::Q6K] {
        let all = quantize(format, &x);
        for body in Body::all() {
            let mut out = vec![0; all.len()];
            body.run(super::search::Search { format, x: &x, out: &mut out });
            assert_eq!(out, all, "{format:?}");
        }
        assert_eq!(with_threads(1, || quantize(format, &x)), all, "{format:?}");
    }
}

#[test]
fn rows_of_half_a_block_and_missing_bytes_are_refused() {
    let refused = |k: usize, bytes: usize, part: &str| {
        let error = matrix(Format::Q4K, 2, k).pack(&vec![0; bytes]).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    };
    refused(128, 144, "Q4_K needs rows of a multiple of 256 numbers, not 128");
    refused(256, 287, "287 bytes where 2 rows in Q4_K have 144 each");
    refused(0, 0, "not 0");
}
