//! Blocks as GGUF files have them (ggml-common.h of llama.cpp), taken apart and put together.

use super::Format;

/// Numbers in the largest block.
pub(super) const LEN_MAX: usize = 256;

/// A block of one row. Number i is `d * scales[j] * (codes[i] - zero) - d_min * mins[j]` where j counts the groups that share
/// a scale; formats without scales and minimums have one of 1 and 0.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Block {
    /// Unsigned.
    pub(super) codes: [u8; LEN_MAX],
    /// f16, little endian.
    pub(super) d: [u8; 2],
    /// f16, little endian; Q4_K and Q5_K.
    pub(super) d_min: [u8; 2],
    /// Of 32 numbers unsigned (Q4_K, Q5_K), of 16 signed (Q6_K).
    pub(super) scales: [u8; 16],
    /// Of 32 numbers (Q4_K, Q5_K).
    pub(super) mins: [u8; 8],
}

impl Block {
    pub(super) fn empty() -> Self {
        Self { codes: [0; LEN_MAX], d: [0; 2], d_min: [0; 2], scales: [0; 16], mins: [0; 8] }
    }

    /// The block in `bytes`, which are as many as the format has.
    pub(super) fn parse(format: Format, bytes: &[u8]) -> Self {
        let mut block = Self::empty();
        match format {
            Format::Q4_0 => {
                block.d = [bytes[0], bytes[1]];
                for (i, byte) in bytes[2..].iter().enumerate() {
                    (block.codes[i], block.codes[i + 16]) = (byte & 15, byte >> 4);
                }
            }
            Format::Q8_0 => {
                block.d = [bytes[0], bytes[1]];
                block.codes.iter_mut().zip(&bytes[2..]).for_each(|(code, byte)| *code = byte ^ 0x80);
            }
            Format::Q4K | Format::Q5K => {
                block.d = [bytes[0], bytes[1]];
                block.d_min = [bytes[2], bytes[3]];
                (block.scales, block.mins) = six_bits(&bytes[4..16]);
                let (high, low) = bytes[16..].split_at(if format == Format::Q5K { 32 } else { 0 });
                for (pair, low) in low.chunks_exact(32).enumerate() {
                    for (i, byte) in low.iter().enumerate() {
                        let fifth = |group: usize| high.get(i).map_or(0, |high| (high >> group & 1) << 4);
                        block.codes[64 * pair + i] = byte & 15 | fifth(2 * pair);
                        block.codes[64 * pair + 32 + i] = byte >> 4 | fifth(2 * pair + 1);
                    }
                }
            }
            Format::Q6K => {
                let (low, rest) = bytes.split_at(128);
                let (high, rest) = rest.split_at(64);
                block.scales.copy_from_slice(&rest[..16]);
                block.d = [rest[16], rest[17]];
                for (i, code) in block.codes.iter_mut().enumerate() {
                    let (half, quarter, place) = (i / 128, i % 128 / 32, i % 32);
                    let low = low[64 * half + 32 * (quarter % 2) + place] >> (4 * (quarter / 2)) & 15;
                    let high = high[32 * half + place] >> (2 * quarter) & 3;
                    *code = low | high << 4;
                }
            }
        }
        block
    }

    /// The block as a file has it: the inverse of [`Block::parse`].
    pub(super) fn write(&self, format: Format, bytes: &mut [u8]) {
        bytes.fill(0);
        match format {
            Format::Q4_0 => {
                bytes[..2].copy_from_slice(&self.d);
                for (i, byte) in bytes[2..].iter_mut().enumerate() {
                    *byte = self.codes[i] | self.codes[i + 16] << 4;
                }
            }
            Format::Q8_0 => {
                bytes[..2].copy_from_slice(&self.d);
                bytes[2..].iter_mut().zip(&self.codes).for_each(|(byte, code)| *byte = code ^ 0x80);
            }
            Format::Q4K | Format::Q5K => {
                bytes[..2].copy_from_slice(&self.d);
                bytes[2..4].copy_from_slice(&self.d_min);
                put_six_bits(&self.scales, &self.mins, &mut bytes[4..16]);
                let (high, low) = bytes[16..].split_at_mut(if format == Format::Q5K { 32 } else { 0 });
                for (i, code) in self.codes.iter().enumerate() {
                    let (group, place) = (i / 32, i % 32);
                    low[group / 2 * 32 + place] |= (code & 15) << (4 * (group % 2));
                    if let Some(high) = high.get_mut(place) {
                        *high |= (code >> 4) << group;
                    }
                }
            }
            Format::Q6K => {
                let (low, rest) = bytes.split_at_mut(128);
                let (high, rest) = rest.split_at_mut(64);
                rest[..16].copy_from_slice(&self.scales);
                rest[16..].copy_from_slice(&self.d);
                for (i, code) in self.codes.iter().enumerate() {
                    let (half, quarter, place) = (i / 128, i % 128 / 32, i % 32);
                    low[64 * half + 32 * (quarter % 2) + place] |= (code & 15) << (4 * (quarter / 2));
                    high[32 * half + place] |= (code >> 4) << (2 * quarter);
                }
            }
        }
    }
}

/// Eight scales and eight minimums of six bits in twelve bytes: the first four of each in the low bits of bytes 0 to 3 and 4 to 7,
/// whose high bits hold those of the others.
fn six_bits(bytes: &[u8]) -> ([u8; 16], [u8; 8]) {
    let (mut scales, mut mins) = ([0; 16], [0; 8]);
    for i in 0..4 {
        scales[i] = bytes[i] & 63;
        mins[i] = bytes[i + 4] & 63;
        scales[i + 4] = bytes[i + 8] & 15 | bytes[i] >> 6 << 4;
        mins[i + 4] = bytes[i + 8] >> 4 | bytes[i + 4] >> 6 << 4;
    }
    (scales, mins)
}

fn put_six_bits(scales: &[u8; 16], mins: &[u8; 8], bytes: &mut [u8]) {
    for i in 0..4 {
        bytes[i] = scales[i] | scales[i + 4] >> 4 << 6;
        bytes[i + 4] = mins[i] | mins[i + 4] >> 4 << 6;
        bytes[i + 8] = scales[i + 4] & 15 | mins[i + 4] << 4;
    }
}
