//! TensorBoard's event files, written by hand: the published crates need protoc or an unsafe protobuf.
//! Owns the framing (TFRecord) and the three messages that scalars take; which scalars there are is `record`'s.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// What TensorBoard looks for in file names.
const NAME: &str = "events.out.tfevents";
/// The version that makes TensorBoard heed a start of session, after which earlier files hold nothing beyond its step.
const FILE_VERSION: &str = "brain.Event:2";

/// Field numbers of tensorboard/compat/proto/{event,summary}.proto.
mod field {
    pub(super) const WALL_TIME: u64 = 1;
    pub(super) const STEP: u64 = 2;
    pub(super) const FILE_VERSION: u64 = 3;
    pub(super) const SUMMARY: u64 = 5;
    pub(super) const SESSION_LOG: u64 = 7;
    pub(super) const SUMMARY_VALUE: u64 = 1;
    pub(super) const TAG: u64 = 1;
    pub(super) const SIMPLE_VALUE: u64 = 2;
    pub(super) const STATUS: u64 = 1;
}

/// `SessionLog.START`.
const START: u64 = 1;

/// One growing event file.
#[derive(Debug)]
pub(super) struct EventFile {
    path: PathBuf,
    file: File,
}

impl EventFile {
    /// Begins a new file in `folder`, whose name sorts behind those of earlier ones. TensorBoard forgets all records of
    /// `first_step` and later that those hold.
    ///
    /// # Errors
    /// If it cannot be written.
    pub(super) fn create(folder: &Path, first_step: u64, wall_time: f64) -> Result<Self> {
        std::fs::create_dir_all(folder).map_err(|error| Error::file(folder, error))?;
        let (path, file) = new_file(folder, wall_time as u64)?;
        let mut events = Self { path, file };
        events.append(&event(wall_time, 0, &bytes_field(field::FILE_VERSION, FILE_VERSION.as_bytes())))?;
        let session = bytes_field(field::SESSION_LOG, &number_field(field::STATUS, START));
        events.append(&event(wall_time, first_step, &session))?;
        Ok(events)
    }

    /// Appends one event with these scalars, by tag.
    ///
    /// # Errors
    /// If it cannot be written.
    pub(super) fn write(&mut self, step: u64, wall_time: f64, scalars: &[(String, f64)]) -> Result<()> {
        let summary: Vec<u8> = scalars.iter().flat_map(|(tag, value)| scalar(tag, *value)).collect();
        self.append(&event(wall_time, step, &bytes_field(field::SUMMARY, &summary)))
    }

    /// Waits until everything is on the disk.
    ///
    /// # Errors
    /// If it is not.
    pub(super) fn sync(&self) -> Result<()> {
        self.file.sync_all().map_err(|error| Error::file(&self.path, error))
    }

    fn append(&mut self, data: &[u8]) -> Result<()> {
        self.file.write_all(&framed(data)).map_err(|error| Error::file(&self.path, error))
    }
}

/// Removes the event files of an earlier run from `folder`.
///
/// # Errors
/// If one cannot be removed.
pub(super) fn clear(folder: &Path) -> Result<()> {
    for name in super::folder::names(folder)?.into_iter().filter(|name| name.starts_with(NAME)) {
        let path = folder.join(name);
        std::fs::remove_file(&path).map_err(|error| Error::file(&path, error))?;
    }
    Ok(())
}

/// Files are read in the order of their names, so a number follows the second where two begin in the same one, and a clock
/// that was set back does not go before the files there are.
fn new_file(folder: &Path, second: u64) -> Result<(PathBuf, File)> {
    let second_of = |name: &String| name.strip_prefix(NAME)?.split('.').nth(1)?.parse::<u64>().ok();
    let latest = super::folder::names(folder)?.iter().filter_map(second_of).max().unwrap_or(0);
    let second = second.max(latest);
    for number in 0..10_000 {
        let path = folder.join(format!("{NAME}.{second:010}.eurus.{number:04}"));
        match File::create_new(&path) {
            Ok(file) => return Ok((path, file)),
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(Error::file(&path, error)),
        }
    }
    Err(Error::file(folder, "holds 10000 event files of one second"))
}

fn event(wall_time: f64, step: u64, what: &[u8]) -> Vec<u8> {
    let mut message = key(field::WALL_TIME, 1);
    message.extend(wall_time.to_le_bytes());
    message.extend(number_field(field::STEP, step));
    message.extend(what);
    message
}

/// `Summary.Value` as a field of `Summary`.
fn scalar(tag: &str, value: f64) -> Vec<u8> {
    let mut message = bytes_field(field::TAG, tag.as_bytes());
    message.extend(key(field::SIMPLE_VALUE, 5));
    message.extend((value as f32).to_le_bytes());
    bytes_field(field::SUMMARY_VALUE, &message)
}

fn bytes_field(number: u64, bytes: &[u8]) -> Vec<u8> {
    [key(number, 2), varint(bytes.len() as u64), bytes.to_vec()].concat()
}

fn number_field(number: u64, value: u64) -> Vec<u8> {
    [key(number, 0), varint(value)].concat()
}

/// What precedes a field: its number and how its value is written.
fn key(number: u64, wire: u64) -> Vec<u8> {
    varint(number << 3 | wire)
}

/// Seven bits a byte, the lowest first, the highest bit set while more follow.
fn varint(mut value: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    while value >= 0x80 {
        bytes.push(value as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
    bytes
}

/// A TFRecord: length, its checksum, data, its checksum.
fn framed(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    [&length[..], &masked(&length).to_le_bytes(), data, &masked(data).to_le_bytes()].concat()
}

/// CRC-32C rotated and shifted by a constant, as TensorFlow does so that a checksum of checksums stays sound
/// (tensorflow/core/lib/hash/crc32c.h).
fn masked(data: &[u8]) -> u32 {
    crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// Castagnoli's polynomial, reversed.
const POLYNOMIAL: u32 = 0x82f6_3b78;

const TABLE: [u32; 256] = {
    let mut table = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        let (mut value, mut bit) = (byte as u32, 0);
        while bit < 8 {
            value = if value & 1 == 1 { value >> 1 ^ POLYNOMIAL } else { value >> 1 };
            bit += 1;
        }
        table[byte] = value;
        byte += 1;
    }
    table
};

fn crc32c(data: &[u8]) -> u32 {
    !data.iter().fold(!0, |crc: u32, byte| crc >> 8 ^ TABLE[usize::from(crc as u8 ^ byte)])
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[test]
    fn checksums_are_those_of_the_standard() {
        // RFC 3720, appendix B.4.
        let ascending: Vec<u8> = (0..32).collect();
        for (data, crc) in [
            (&[0u8; 32][..], 0x8a91_36aa),
            (&[0xff; 32], 0x62a8_ab43),
            (&ascending, 0x46dd_794e),
            (b"123456789", 0xe306_9283),
        ] {
            assert_eq!(crc32c(data), crc, "{data:?}");
        }
        assert_eq!(crc32c(b""), 0);
    }

    #[test]
    fn records_are_framed_as_tensorboard_reads_them() {
        // masked_crc32c of tensorboard.compat.tensorflow_stub.pywrap_tensorflow.
        assert_eq!(masked(b"123456789"), 0xc78a_b0e5);
        let hex: String = framed(b"abc").iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hex, "0300000000000000b099490e6162636e57f121");
    }

    #[test]
    fn numbers_take_seven_bits_a_byte() {
        for (value, bytes) in [(0, &[0][..]), (127, &[127]), (128, &[0x80, 1]), (300, &[0xac, 2])] {
            assert_eq!(varint(value), bytes, "{value}");
        }
        assert_eq!(varint(u64::MAX).len(), 10);
    }

    #[test]
    fn one_scalar_is_the_bytes_that_protobuf_writes() {
        // tensorboard.compat.proto: Event(wall_time=1.5, step=300, summary=Summary(value=[Value(tag="a/b", simple_value=0.25)]))
        // .SerializeToString().hex()
        let message = event(1.5, 300, &bytes_field(field::SUMMARY, &scalar("a/b", 0.25)));
        let hex: String = message.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hex, "09000000000000f83f10ac022a0c0a0a0a03612f62150000803e");
    }

    #[test]
    fn later_files_sort_behind_earlier_ones() {
        let root = tempfile::tempdir().unwrap();
        let create = |second: f64| EventFile::create(root.path(), 0, second).unwrap().path;
        // The same second, and a clock that was set back.
        let paths = [create(1000.9), create(1000.1), create(999.0), create(20_000_000_000.0)];
        assert!(paths.is_sorted(), "{paths:?}");
        clear(root.path()).unwrap();
        assert_eq!(std::fs::read_dir(root.path()).unwrap().count(), 0);
    }
}
