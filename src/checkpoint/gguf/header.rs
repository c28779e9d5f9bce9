//! The header of a GGUF file (github.com/ggml-org/ggml/blob/master/docs/gguf.md), versions 2 and 3, little endian: metadata and
//! where tensors lie, every length checked against the file before memory is asked for.

use std::collections::{BTreeMap, HashSet};
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

use candle_core::DType;

use crate::checkpoint::tensor::Storage;
use crate::error::{Error, Result};
use crate::model::weights::Format;

const MAGIC: [u8; 4] = *b"GGUF";
/// Largest header that is read; vocabularies of 256,000 tokens with merges take some 10 MB.
const HEADER_BYTES_MAX: u64 = 256 << 20;
/// The tokenizer.json of the largest vocabularies, which may be a text of a header, has some 35 MB.
const TEXT_BYTES_MAX: u64 = 64 << 20;
const TENSORS_MAX: u64 = 100_000;
const KEYS_MAX: u64 = 100_000;
/// Values of all lists together; each takes more memory than its bytes in the file.
const LISTED_MAX: u64 = 1 << 23;
const ALIGNMENT_MAX: u64 = 1 << 16;
const ALIGNMENT: &str = "general.alignment";

/// A value of the metadata.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Value {
    Unsigned(u64),
    Signed(i64),
    Real(f64),
    Flag(bool),
    Text(String),
    List(Vec<Value>),
}

/// A tensor of a file, within it.
#[derive(Debug, Clone)]
pub(super) struct Entry {
    pub(super) name: String,
    pub(super) storage: Storage,
    /// Outermost dimension first, as everywhere but in the file.
    pub(super) shape: Vec<usize>,
    /// Where its data begins in the file.
    pub(super) start: u64,
    pub(super) bytes: u64,
}

/// A file whose header is sound.
#[derive(Debug, Clone)]
pub(super) struct Header {
    pub(super) path: PathBuf,
    pub(super) metadata: BTreeMap<String, Value>,
    pub(super) tensors: Vec<Entry>,
}

impl Header {
    pub(super) fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(|error| Error::file(path, error))?;
        let bytes = file.metadata().map_err(|error| Error::file(path, error))?.len();
        let (metadata, tensors) = read(BufReader::new(file), bytes).map_err(|what| Error::file(path, what))?;
        Ok(Self { path: path.to_owned(), metadata, tensors })
    }
}

/// What is wrong with a file, without its name.
type Parsed<T> = std::result::Result<T, String>;

fn read(reader: impl Read, file_bytes: u64) -> Parsed<(BTreeMap<String, Value>, Vec<Entry>)> {
    let mut input = Input { reader, at: 0, end: file_bytes, listed: 0 };
    if input.array::<4>()? != MAGIC {
        return Err("is no GGUF file".to_owned());
    }
    match input.u32()? {
        2 | 3 => {}
        version => return Err(format!("is GGUF version {version}; versions 2 and 3, little endian, are read")),
    }
    let tensor_count = input.count("tensors", TENSORS_MAX)?;
    let key_count = input.count("keys", KEYS_MAX)?;
    let mut metadata = BTreeMap::new();
    for _ in 0..key_count {
        let key = input.text()?;
        let kind = input.u32()?;
        let value = input.value(kind, 0).map_err(|what| format!("{key}: {what}"))?;
        if metadata.insert(key.clone(), value).is_some() {
            return Err(format!("has the key {key} twice"));
        }
    }
    let alignment = match metadata.get(ALIGNMENT) {
        None => 32,
        Some(Value::Unsigned(n)) if n.is_power_of_two() && *n <= ALIGNMENT_MAX => *n,
        Some(other) => return Err(format!("{ALIGNMENT} must be a power of two up to {ALIGNMENT_MAX}, not {other:?}")),
    };
    let mut tensors = Vec::new();
    for _ in 0..tensor_count {
        tensors.push(input.entry(alignment)?);
    }
    let data_start = input.at.next_multiple_of(alignment);
    place(&mut tensors, data_start, file_bytes)?;
    Ok((metadata, tensors))
}

/// Moves tensors from the beginning of the data to that of the file; they must lie within it and apart.
fn place(tensors: &mut [Entry], data_start: u64, file_bytes: u64) -> Parsed<()> {
    let mut names = HashSet::new();
    for tensor in tensors.iter_mut() {
        let start = tensor.start.checked_add(data_start);
        let end = start.and_then(|start| start.checked_add(tensor.bytes));
        match (start, end) {
            (Some(start), Some(end)) if end <= file_bytes => tensor.start = start,
            _ => {
                let what = format!("tensor {} ends after the file of {file_bytes} bytes", tensor.name);
                return Err(format!("{what}; is it a part of a download?"));
            }
        }
        if !names.insert(tensor.name.as_str()) {
            return Err(format!("has the tensor {} twice", tensor.name));
        }
    }
    let mut order: Vec<&Entry> = tensors.iter().filter(|tensor| tensor.bytes > 0).collect();
    order.sort_by_key(|tensor| tensor.start);
    match order.windows(2).find(|pair| pair[0].start + pair[0].bytes > pair[1].start) {
        Some(pair) => Err(format!("tensors {} and {} overlap", pair[0].name, pair[1].name)),
        None => Ok(()),
    }
}

/// The bytes of a file, front to back.
struct Input<R> {
    reader: R,
    at: u64,
    end: u64,
    /// Values of lists so far.
    listed: u64,
}

impl<R: Read> Input<R> {
    /// The next `count` bytes; memory is asked for only where the file has them.
    fn bytes(&mut self, count: u64) -> Parsed<Vec<u8>> {
        let end = self.at.checked_add(count).filter(|end| *end <= self.end.min(HEADER_BYTES_MAX));
        let Some(end) = end else {
            let limit = if self.end > HEADER_BYTES_MAX { HEADER_BYTES_MAX } else { self.end };
            return Err(format!("has a header that goes on after {limit} bytes"));
        };
        let mut bytes = vec![0; usize::try_from(count).map_err(|error| error.to_string())?];
        self.reader.read_exact(&mut bytes).map_err(|error| error.to_string())?;
        self.at = end;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self) -> Parsed<[u8; N]> {
        let bytes = self.bytes(N as u64)?;
        bytes.try_into().map_err(|_| "ends within a number".to_owned())
    }

    fn u32(&mut self) -> Parsed<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Parsed<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    fn count(&mut self, what: &str, most: u64) -> Parsed<u64> {
        match self.u64()? {
            count if count <= most => Ok(count),
            count => Err(format!("says that it has {count} {what}; at most {most} are read")),
        }
    }

    fn text(&mut self) -> Parsed<String> {
        match self.u64()? {
            bytes if bytes <= TEXT_BYTES_MAX => {
                String::from_utf8(self.bytes(bytes)?).map_err(|_| "has a text that is not UTF-8".to_owned())
            }
            bytes => Err(format!("has a text of {bytes} bytes; at most {TEXT_BYTES_MAX} are read")),
        }
    }

    fn value(&mut self, kind: u32, depth: usize) -> Parsed<Value> {
        Ok(match kind {
            0 => Value::Unsigned(u64::from(u8::from_le_bytes(self.array()?))),
            1 => Value::Signed(i64::from(i8::from_le_bytes(self.array()?))),
            2 => Value::Unsigned(u64::from(u16::from_le_bytes(self.array()?))),
            3 => Value::Signed(i64::from(i16::from_le_bytes(self.array()?))),
            4 => Value::Unsigned(u64::from(self.u32()?)),
            5 => Value::Signed(i64::from(i32::from_le_bytes(self.array()?))),
            6 => Value::Real(f64::from(f32::from_le_bytes(self.array()?))),
            7 => Value::Flag(self.array::<1>()? != [0]),
            8 => Value::Text(self.text()?),
            9 if depth < 2 => {
                let (kind, count) = (self.u32()?, self.u64()?);
                self.listed = self.listed.saturating_add(count);
                if count > self.end - self.at || self.listed > LISTED_MAX {
                    return Err(format!("a list of {count} values in a file of {} bytes", self.end));
                }
                let mut list = Vec::new();
                for _ in 0..count {
                    list.push(self.value(kind, depth + 1)?);
                }
                Value::List(list)
            }
            9 => return Err("lists within lists within lists".to_owned()),
            10 => Value::Unsigned(self.u64()?),
            11 => Value::Signed(i64::from_le_bytes(self.array()?)),
            12 => Value::Real(f64::from_le_bytes(self.array()?)),
            other => return Err(format!("a value of unknown type {other}")),
        })
    }

    fn entry(&mut self, alignment: u64) -> Parsed<Entry> {
        let name = self.text()?;
        let wrong = |what: String| format!("tensor {name} {what}");
        let dims = self.u32()?;
        if !(1..=4).contains(&dims) {
            return Err(wrong(format!("has {dims} dimensions instead of 1 to 4")));
        }
        let mut shape = Vec::new();
        for _ in 0..dims {
            shape.push(usize::try_from(self.u64()?).map_err(|error| wrong(error.to_string()))?);
        }
        let (storage, len, bytes) = storage(self.u32()?);
        let start = self.u64()?;
        let row = shape[0] as u64;
        if !row.is_multiple_of(len) {
            return Err(wrong(format!("has rows of {row} numbers, which {storage} keeps by {len}")));
        }
        let rows = shape[1..].iter().try_fold(1_u64, |n, dim| n.checked_mul(*dim as u64));
        let bytes = rows.and_then(|rows| (row / len).checked_mul(bytes)?.checked_mul(rows));
        let Some(bytes) = bytes else { return Err(wrong(format!("has the impossible shape {shape:?}"))) };
        if !start.is_multiple_of(alignment) {
            return Err(wrong(format!("begins at {start}, which is no multiple of the alignment {alignment}")));
        }
        shape.reverse();
        Ok(Entry { name, storage, shape, start, bytes })
    }
}

/// Of a type's number in a file: what it is, numbers in a block and bytes of a block. Types that are not read are taken for one
/// byte, and refused by name where a model needs them.
fn storage(kind: u32) -> (Storage, u64, u64) {
    let quantized =
        |format: Format| (Storage::Quantized(format), format.block_len() as u64, format.block_bytes() as u64);
    let other = |name: &str, len, bytes| (Storage::Other(name.to_owned()), len, bytes);
    match kind {
        0 => (Storage::Float(DType::F32), 1, 4),
        1 => (Storage::Float(DType::F16), 1, 2),
        30 => (Storage::Float(DType::BF16), 1, 2),
        2 => quantized(Format::Q4_0),
        8 => quantized(Format::Q8_0),
        12 => quantized(Format::Q4K),
        13 => quantized(Format::Q5K),
        14 => quantized(Format::Q6K),
        3 => other("Q4_1", 32, 20),
        6 => other("Q5_0", 32, 22),
        7 => other("Q5_1", 32, 24),
        10 => other("Q2_K", 256, 84),
        11 => other("Q3_K", 256, 110),
        number => other(&format!("type {number}"), 1, 0),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    fn text(text: &str) -> Vec<u8> {
        [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat()
    }

    /// A tensor's entry: name, dimensions as in the file, type, offset.
    fn entry(name: &str, dims: &[u64], kind: u32, offset: u64) -> Vec<u8> {
        let mut bytes = text(name);
        bytes.extend((dims.len() as u32).to_le_bytes());
        dims.iter().for_each(|dim| bytes.extend(dim.to_le_bytes()));
        bytes.extend(kind.to_le_bytes());
        bytes.extend(offset.to_le_bytes());
        bytes
    }

    fn key(name: &str, kind: u32, value: &[u8]) -> Vec<u8> {
        [text(name), kind.to_le_bytes().to_vec(), value.to_vec()].concat()
    }

    fn file(keys: &[Vec<u8>], entries: &[Vec<u8>], data: usize) -> Vec<u8> {
        let mut bytes = [&MAGIC[..], &3_u32.to_le_bytes()].concat();
        bytes.extend((entries.len() as u64).to_le_bytes());
        bytes.extend((keys.len() as u64).to_le_bytes());
        bytes.extend(keys.concat());
        bytes.extend(entries.concat());
        bytes.resize(bytes.len().next_multiple_of(32) + data, 1);
        bytes
    }

    fn parsed(bytes: &[u8]) -> Parsed<(BTreeMap<String, Value>, Vec<Entry>)> {
        read(bytes, bytes.len() as u64)
    }

    #[track_caller]
    fn refused(bytes: &[u8], part: &str) {
        let what = parsed(bytes).unwrap_err();
        assert!(what.contains(part), "{what}");
    }

    fn sound() -> Vec<u8> {
        let list = [&8_u32.to_le_bytes()[..], &2_u64.to_le_bytes(), &text("<s>"), &text("a")].concat();
        let keys = [key("a.size", 4, &7_u32.to_le_bytes()), key("a.list", 9, &list)];
        file(&keys, &[entry("x", &[32, 3], 8, 0), entry("y", &[3], 0, 128)], 140)
    }

    #[test]
    fn a_sound_file_is_read() {
        let (metadata, tensors) = parsed(&sound()).unwrap();
        assert_eq!(metadata["a.size"], Value::Unsigned(7));
        assert_eq!(metadata["a.list"], Value::List(vec![Value::Text("<s>".to_owned()), Value::Text("a".to_owned())]));
        let start = sound().len() as u64 - 140;
        let found: Vec<_> =
            tensors.iter().map(|tensor| (&*tensor.name, &*tensor.shape, tensor.start, tensor.bytes)).collect();
        assert_eq!(found, [("x", &[3, 32][..], start, 102), ("y", &[3][..], start + 128, 12)]);
        assert_eq!(tensors[0].storage, Storage::Quantized(Format::Q8_0));
    }

    #[test]
    fn lying_headers_are_refused() {
        let one = |dims: &[u64], kind, offset, data| file(&[], &[entry("x", dims, kind, offset)], data);
        refused(b"", "goes on after 0 bytes");
        refused(b"GGML", "no GGUF");
        refused(&[&MAGIC[..], &1_u32.to_le_bytes()].concat(), "version 1");
        refused(&[&MAGIC[..], &3_u32.to_be_bytes()].concat(), "little endian");
        let counts = |tensors: u64, keys: u64| {
            [&MAGIC[..], &3_u32.to_le_bytes(), &tensors.to_le_bytes(), &keys.to_le_bytes()].concat()
        };
        refused(&counts(u64::MAX, 0), "18446744073709551615 tensors");
        refused(&counts(0, u64::MAX), "18446744073709551615 keys");
        refused(&counts(1, 0), "goes on after 24 bytes");
        for alignment in [0, 3, 1 << 17] {
            refused(&file(&[key(ALIGNMENT, 4, &u32::to_le_bytes(alignment))], &[], 0), "general.alignment must be");
        }
        refused(&file(&[key(ALIGNMENT, 8, &text("x"))], &[], 0), "general.alignment must be");
        refused(&one(&[1 << 32, 1 << 20], 0, 0, 0), "ends after the file");
        refused(&one(&[1 << 32, 1 << 32], 0, 0, 0), "impossible shape");
        refused(&one(&[1 << 32, 1 << 32, 1 << 2], 0, 0, 0), "impossible shape");
        refused(&one(&[(1 << 62) + 1, 4], 0, 0, 16), "impossible shape");
        refused(&one(&[4], 0, 32, 47), "ends after the file");
        refused(&one(&[4], 0, u64::MAX - 31, 64), "ends after the file");
        refused(&one(&[4], 0, 4, 64), "no multiple of the alignment 32");
        refused(&one(&[16, 2], 2, 0, 64), "rows of 16 numbers");
        refused(&one(&[], 0, 0, 64), "0 dimensions");
        refused(&one(&[1; 5], 0, 0, 64), "5 dimensions");
        refused(&file(&[], &[entry("x", &[4], 0, 0), entry("x", &[4], 0, 32)], 64), "tensor x twice");
        refused(&file(&[], &[entry("x", &[12], 0, 0), entry("y", &[4], 0, 32)], 64), "x and y overlap");
        let size = key("k", 4, &[0; 4]);
        refused(&file(&[size.clone(), size], &[], 0), "key k twice");
        refused(&file(&[key("k", 13, &[0; 8])], &[], 0), "k: a value of unknown type 13");
        let many = [&0_u32.to_le_bytes()[..], &u64::MAX.to_le_bytes()].concat();
        refused(&file(&[key("k", 9, &many)], &[], 0), "k: a list of 18446744073709551615");
        let long = [&0_u32.to_le_bytes()[..], &(LISTED_MAX + 1).to_le_bytes(), &vec![0; 1 << 24]].concat();
        refused(&file(&[key("k", 9, &long)], &[], 0), "k: a list of 8388609 values");
        refused(&file(&[key("k", 8, &u64::MAX.to_le_bytes())], &[], 0), "a text of 18446744073709551615 bytes");
        let nested = [9_u32, 1, 0].map(u32::to_le_bytes).concat().repeat(50);
        refused(&file(&[key("k", 9, &nested)], &[], 0), "lists within lists");
        refused(&file(&[key("k", 8, &[&2_u64.to_le_bytes()[..], &[0xff; 2]].concat())], &[], 0), "not UTF-8");
    }

    #[test]
    fn no_damaged_bit_and_no_cut_panics_or_reads_beyond_the_file() {
        let sound = sound();
        for bit in 0..(sound.len() - 140) * 8 {
            let mut bytes = sound.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            if let Ok((_, tensors)) = parsed(&bytes) {
                assert!(tensors.iter().all(|tensor| tensor.start + tensor.bytes <= bytes.len() as u64));
            }
        }
        for cut in 0..sound.len() {
            assert!(parsed(&sound[..cut]).is_err(), "{cut}");
        }
    }
}
