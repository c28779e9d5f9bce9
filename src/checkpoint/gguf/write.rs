//! Writing GGUF files, version 3: a header that says what follows, then tensors in its order.

use candle_core::DType;

use super::header::Value;
use crate::checkpoint::draft::Output;
use crate::checkpoint::tensor::{Storage, bytes};
use crate::error::{Error, Result};
use crate::model::weights::Format;

/// Tensors begin at multiples of this, in bytes: what a file that does not say otherwise has.
const ALIGNMENT: u64 = 32;

/// A tensor that is to be written.
#[derive(Debug, Clone)]
pub(super) struct Planned {
    /// Its name in the file.
    pub(super) name: String,
    pub(super) storage: Storage,
    /// Outermost dimension first.
    pub(super) shape: Vec<usize>,
}

/// Writes `metadata`, in its order, and what `tensors` says about the data that the caller then writes. Returns where that of each
/// begins, and last where all of it ends.
pub(super) fn header(output: &mut Output, metadata: &[(String, Value)], tensors: &[Planned]) -> Result<Vec<u64>> {
    let mut out = Vec::new();
    out.extend(b"GGUF");
    out.extend(3_u32.to_le_bytes());
    out.extend((tensors.len() as u64).to_le_bytes());
    out.extend((metadata.len() as u64).to_le_bytes());
    for (key, value) in metadata {
        text(&mut out, key);
        out.extend(kind(value).to_le_bytes());
        put(&mut out, value, kind(value));
    }
    let mut offsets = vec![0];
    let mut offset = 0;
    for Planned { name, storage, shape } in tensors {
        text(&mut out, name);
        out.extend((shape.len() as u32).to_le_bytes());
        shape.iter().rev().for_each(|dim| out.extend((*dim as u64).to_le_bytes()));
        out.extend(number(storage)?.to_le_bytes());
        out.extend(u64::to_le_bytes(offset));
        offset = (offset + bytes(storage, shape)).next_multiple_of(ALIGNMENT);
        offsets.push(offset);
    }
    output.write(&out)?;
    output.pad(ALIGNMENT)?;
    Ok(offsets.into_iter().map(|offset| output.at + offset).collect())
}

fn text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

/// The type of a value: the narrowest of those that llama.cpp asks for.
fn kind(value: &Value) -> u32 {
    match value {
        Value::Unsigned(number) if u32::try_from(*number).is_ok() => 4,
        Value::Unsigned(_) => 10,
        Value::Signed(number) if i32::try_from(*number).is_ok() => 5,
        Value::Signed(_) => 11,
        Value::Real(_) => 6,
        Value::Flag(_) => 7,
        Value::Text(_) => 8,
        Value::List(_) => 9,
    }
}

fn put(out: &mut Vec<u8>, value: &Value, kind: u32) {
    match value {
        Value::Unsigned(number) if kind == 4 => out.extend((*number as u32).to_le_bytes()),
        Value::Unsigned(number) => out.extend(number.to_le_bytes()),
        Value::Signed(number) if kind == 5 => out.extend((*number as i32).to_le_bytes()),
        Value::Signed(number) => out.extend(number.to_le_bytes()),
        Value::Real(number) => out.extend((*number as f32).to_le_bytes()),
        Value::Flag(flag) => out.push(u8::from(*flag)),
        Value::Text(value) => text(out, value),
        Value::List(list) => {
            // A list has one type, the widest of its values; an empty one is of texts, as lists of merges are.
            let kind = list.iter().map(self::kind).max().unwrap_or(8);
            out.extend(kind.to_le_bytes());
            out.extend((list.len() as u64).to_le_bytes());
            list.iter().for_each(|value| put(out, value, kind));
        }
    }
}

/// The number of a type in a file.
fn number(storage: &Storage) -> Result<u32> {
    match storage {
        Storage::Float(DType::F32) => Ok(0),
        Storage::Float(DType::F16) => Ok(1),
        Storage::Float(DType::BF16) => Ok(30),
        Storage::Quantized(Format::Q4_0) => Ok(2),
        Storage::Quantized(Format::Q8_0) => Ok(8),
        Storage::Quantized(Format::Q4K) => Ok(12),
        Storage::Quantized(Format::Q5K) => Ok(13),
        Storage::Quantized(Format::Q6K) => Ok(14),
        other => Err(Error::Internal(format!("{other} is not written"))),
    }
}
