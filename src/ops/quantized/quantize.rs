//! Numbers to blocks: Q8_0 and Q4_0 by the largest number of a block, as `llama-quantize` rounds them, the others by a search.

use super::Format;
use super::blocks::Block;
use super::search::Search;
use crate::ops::lanes::Body;
use crate::ops::parallel;
use half::f16;

/// Numbers beyond this have no f16, in which scales are kept.
pub const ABS_MAX: f32 = 65_504.0;

/// `weight`, finite numbers up to [`ABS_MAX`] in rows of a multiple of [`Format::block_len`], as blocks of
/// [`Format::block_bytes`] that lie row after row.
///
/// # Panics
/// If `weight` is not whole blocks.
pub fn quantize(format: Format, weight: &[f32]) -> Vec<u8> {
    let (len, bytes) = (format.block_len(), format.block_bytes());
    assert!(weight.len().is_multiple_of(len), "{} numbers in blocks of {len}", weight.len());
    // Some thousand numbers at a time: a block is too little work for a thread.
    let blocks = 8192 / len;
    let body = Body::best();
    parallel::filled(weight.len() / len * bytes, blocks * bytes, |index, out: &mut [u8]| {
        let x = &weight[index * blocks * len..];
        match format {
            Format::Q4_0 | Format::Q8_0 => {
                for (x, out) in x.chunks_exact(len).zip(out.chunks_exact_mut(bytes)) {
                    round(format, x).write(format, out);
                }
            }
            Format::Q4K | Format::Q5K | Format::Q6K => body.run(Search { format, x, out }),
        }
    })
}

/// The block of `x`: codes are numbers over the scale, moved by the code of 0 and rounded half up, as GGML does.
fn round(format: Format, x: &[f32]) -> Block {
    let largest = x.iter().fold(0.0_f32, |most, x| if x.abs() > most.abs() { *x } else { most });
    let mut block = Block::empty();
    let d = match format {
        Format::Q8_0 => largest.abs() / 127.0,
        _ => largest / -8.0,
    };
    block.d = f16::from_f32(d).to_le_bytes();
    let inverse = if d == 0.0 { 0.0 } else { 1.0 / d };
    for (x, code) in x.iter().zip(&mut block.codes) {
        *code = match format {
            Format::Q8_0 => ((x * inverse).round() + 128.0) as u8,
            _ => ((x * inverse + 8.5) as u8).min(15),
        };
    }
    block
}
