//! Numbers to blocks, as `llama-quantize` rounds them: Q8_0 and Q4_0 by the largest number of a block.

use super::Format;
use super::blocks::Block;
use crate::error::{Error, Result};
use crate::ops::parallel;
use half::f16;

/// `weight`, rows of a multiple of [`Format::block_len`] numbers, as blocks of [`Format::block_bytes`].
///
/// # Errors
/// [`Error::Unsupported`] for formats that are read but not written.
pub fn quantize(format: Format, weight: &[f32]) -> Result<Vec<u8>> {
    if !matches!(format, Format::Q4_0 | Format::Q8_0) {
        let what = format!("weights are written in Q8_0 and Q4_0; {} is only read", format.name());
        return Err(Error::Unsupported(what));
    }
    let (len, bytes) = (format.block_len(), format.block_bytes());
    // Many blocks at a time: a block is too little work for a thread.
    const BLOCKS: usize = 1024;
    Ok(parallel::filled(weight.len() / len * bytes, BLOCKS * bytes, |index, out: &mut [u8]| {
        let weight = weight[index * BLOCKS * len..].chunks_exact(len);
        for (x, out) in weight.zip(out.chunks_exact_mut(bytes)) {
            round(format, x).write(format, out);
        }
    }))
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
