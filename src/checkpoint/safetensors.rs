//! The safetensors format: headers checked before any data is read, tensors read into memory of their own (a file that
//! shrinks while it is mapped would kill the process), and a writer. Which files belong together is `shards`' to know.

use std::collections::HashMap;
use std::fs::File;
use std::io::{Cursor, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use candle_core::{DType, Tensor};
use safetensors::Dtype;
use safetensors::tensor::Metadata;

use super::read_exactly;
use super::tensor::{Storage, Take, TensorInfo};
use crate::error::{Error, Result};

/// Largest header that is parsed; the largest published ones are below 1 MB.
const HEADER_BYTES_MAX: u64 = 16 << 20;
/// Most tensors one file may hold.
const TENSORS_MAX: usize = 100_000;
/// The length of the header comes first.
const LENGTH_BYTES: u64 = 8;

fn storage(dtype: Dtype) -> Storage {
    match dtype {
        Dtype::F32 => Storage::Float(DType::F32),
        Dtype::F16 => Storage::Float(DType::F16),
        Dtype::BF16 => Storage::Float(DType::BF16),
        other => Storage::Other(other.to_string()),
    }
}

/// One safetensors file with a checked header: every tensor lies within the file, and none overlap.
#[derive(Debug, Clone)]
pub(super) struct TensorFile {
    /// How messages call it.
    pub(super) label: String,
    /// In the order of their data.
    pub(super) tensors: Vec<TensorInfo>,
    origin: Origin,
    data_start: u64,
}

#[derive(Debug, Clone)]
enum Origin {
    File(PathBuf),
    Embedded(&'static [u8]),
}

impl TensorFile {
    /// Reads and checks the header of the file at `path`.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let mut file = File::open(path).map_err(|error| Error::file(path, error))?;
        let bytes = file.metadata().map_err(|error| Error::file(path, error))?.len();
        let label = path.file_name().map_or_else(|| path.display().to_string(), |name| name.display().to_string());
        let (tensors, data_start) = read_header(&mut file, bytes, &label)?;
        Ok(Self { label, tensors, origin: Origin::File(path.to_owned()), data_start })
    }

    /// A file that is part of the program.
    pub(super) fn embedded(label: &str, bytes: &'static [u8]) -> Result<Self> {
        let (tensors, data_start) = read_header(&mut Cursor::new(bytes), bytes.len() as u64, label)?;
        Ok(Self { label: label.to_owned(), tensors, origin: Origin::Embedded(bytes), data_start })
    }

    /// Reads one tensor after the other, those whose names `wanted` accepts, and gives `take` its data. `on_bytes` hears of every
    /// portion read, in bytes.
    pub(super) fn visit(
        &self,
        wanted: &dyn Fn(&str) -> bool,
        on_bytes: &mut dyn FnMut(u64),
        take: &mut Take<'_>,
    ) -> Result<()> {
        match &self.origin {
            Origin::Embedded(bytes) => self.visit_in(Cursor::new(bytes), wanted, on_bytes, take),
            Origin::File(path) => {
                let file = File::open(path).map_err(|error| Error::file(path, error))?;
                self.visit_in(file, wanted, on_bytes, take)
            }
        }
    }

    fn visit_in(
        &self,
        mut reader: impl Read + Seek,
        wanted: &dyn Fn(&str) -> bool,
        on_bytes: &mut dyn FnMut(u64),
        take: &mut Take<'_>,
    ) -> Result<()> {
        let mut start = self.data_start;
        for info in &self.tensors {
            let place = start;
            start += info.bytes;
            if !wanted(&info.name) {
                continue;
            }
            let damaged =
                |error: std::io::Error| Error::Checkpoint(format!("{}: reading {}: {error}", self.label, info.name));
            reader.seek(SeekFrom::Start(place)).map_err(damaged)?;
            let data = read_exactly(&mut reader, info.bytes, on_bytes).map_err(damaged)?;
            take(info, data)?;
        }
        Ok(())
    }
}

/// The tensors in the order of their data, and where the data begins.
fn read_header(reader: &mut impl Read, file_bytes: u64, label: &str) -> Result<(Vec<TensorInfo>, u64)> {
    let damaged = |what: String| Error::Checkpoint(format!("{label}: {what}"));
    let mut length = [0; LENGTH_BYTES as usize];
    reader.read_exact(&mut length).map_err(|_| damaged("too short for a safetensors file".to_owned()))?;
    let header_bytes = u64::from_le_bytes(length);
    let data_start = header_bytes.saturating_add(LENGTH_BYTES);
    if header_bytes > HEADER_BYTES_MAX {
        let what = format!("says that its header has {header_bytes} bytes; at most {HEADER_BYTES_MAX} are read");
        return Err(damaged(what));
    }
    if data_start > file_bytes {
        return Err(damaged(format!("ends within its header ({file_bytes} bytes of at least {data_start})")));
    }
    let header = read_exactly(reader, header_bytes, &mut |_| {}).map_err(|error| damaged(error.to_string()))?;
    // The crate checks that shapes, types and offsets agree, without overflow, gap or overlap.
    let metadata: Metadata =
        serde_json::from_slice(&header).map_err(|error| damaged(format!("damaged header: {error}")))?;
    let data_bytes = metadata.data_len() as u64;
    if data_start.checked_add(data_bytes) != Some(file_bytes) {
        let found = file_bytes - data_start;
        return Err(damaged(format!("holds {found} bytes of data where its header says {data_bytes}")));
    }
    let mut tensors: Vec<_> = metadata.tensors().into_iter().collect();
    if tensors.len() > TENSORS_MAX {
        return Err(damaged(format!("holds {} tensors; at most {TENSORS_MAX} are read", tensors.len())));
    }
    tensors.sort_by_key(|(_, info)| info.data_offsets);
    let infos = tensors.into_iter().map(|(name, info)| TensorInfo {
        name,
        storage: storage(info.dtype),
        shape: info.shape.clone(),
        bytes: (info.data_offsets.1 - info.data_offsets.0) as u64,
    });
    Ok((infos.collect(), data_start))
}

/// Writes `tensors` to one new file at `path`, in the form that transformers reads.
///
/// # Errors
/// [`Error::Checkpoint`] if the file cannot be written.
pub fn write(path: &Path, tensors: &HashMap<String, Tensor>) -> Result<()> {
    let format = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    safetensors::serialize_to_file(tensors, Some(format), path).map_err(|error| Error::file(path, error))?;
    // The crate writes through a temporary file that only its owner may read.
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        let readable = std::fs::Permissions::from_mode(0o644);
        std::fs::set_permissions(path, readable).map_err(|error| Error::file(path, error))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    fn file(header: &str, data_bytes: usize) -> Vec<u8> {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.resize(bytes.len() + data_bytes, 1);
        bytes
    }

    fn header_of(bytes: &[u8]) -> Result<Vec<TensorInfo>> {
        read_header(&mut Cursor::new(bytes), bytes.len() as u64, "x.safetensors").map(|(tensors, _)| tensors)
    }

    #[track_caller]
    fn check_refused(bytes: &[u8], part: &str) {
        match header_of(bytes) {
            Err(Error::Checkpoint(message)) => {
                assert!(message.starts_with("x.safetensors: ") && message.contains(part), "{message}");
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn lying_headers_are_refused() {
        let one = |shape: &str, dtype: &str, offsets: &str| {
            format!(r#"{{"a":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}"#)
        };
        let good = one("[2,3]", "F32", "[0,24]");
        assert_eq!(header_of(&file(&good, 24)).unwrap()[0].shape, [2, 3]);
        check_refused(b"", "too short");
        check_refused(b"1234567", "too short");
        check_refused(&u64::MAX.to_le_bytes(), "says that its header has 18446744073709551615");
        check_refused(&(HEADER_BYTES_MAX + 1).to_le_bytes(), "at most 16777216");
        check_refused(&file(&good, 24)[..40], "ends within its header");
        check_refused(&file(&good, 23), "holds 23 bytes of data where its header says 24");
        check_refused(&file(&good, 25), "holds 25 bytes of data where its header says 24");
        check_refused(&file(&one("[2,3]", "F32", "[0,20]"), 20), "damaged header");
        check_refused(&file(&one("[2,3]", "F32", "[24,0]"), 24), "damaged header");
        check_refused(&file(&one("[2,3]", "F32", "[4,28]"), 28), "damaged header");
        check_refused(&file(&one("[4294967296,4294967296,4]", "F32", "[0,0]"), 0), "damaged header");
        check_refused(&file(&one("[4611686018427387905,4]", "F32", "[0,16]"), 16), "damaged header");
        check_refused(&file(&one("[2,3]", "F33", "[0,24]"), 24), "damaged header");
        check_refused(&file(&one("[2,-3]", "F32", "[0,24]"), 24), "damaged header");
        let twice = format!("{},{}", good.trim_end_matches('}'), good.trim_start_matches('{'));
        check_refused(&file(&twice, 24), "damaged header");
        let overlapping = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},
            "b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}"#;
        check_refused(&file(overlapping, 12), "damaged header");
        check_refused(&file(&"[".repeat(100_000), 0), "damaged header");
        check_refused(&file("\u{feff}{}", 0), "damaged header");
        let mut not_text = file(&good, 24);
        not_text[10] = 0xff;
        check_refused(&not_text, "damaged header");
    }

    #[test]
    fn more_tensors_than_any_model_has_are_refused() {
        let mut header = String::from("{");
        for i in 0..=TENSORS_MAX {
            header += &format!(r#""{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}},"#);
        }
        header.pop();
        header.push('}');
        check_refused(&file(&header, 0), "holds 100001 tensors");
    }

    #[test]
    fn no_damaged_bit_of_a_header_panics_or_reads_beyond_the_file() {
        let header = r#"{"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},
            "b":{"dtype":"BF16","shape":[5],"data_offsets":[24,34]}}"#;
        let sound = file(header, 34);
        for bit in 0..(sound.len() - 34) * 8 {
            let mut bytes = sound.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            if let Ok(tensors) = header_of(&bytes) {
                assert_eq!(tensors.iter().map(|info| info.bytes).sum::<u64>(), 34);
            }
        }
        for cut in 0..sound.len() {
            assert!(header_of(&sound[..cut]).is_err());
        }
    }
}
