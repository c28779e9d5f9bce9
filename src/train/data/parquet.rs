//! Parquet files by the row interface of the `parquet` crate, row groups in parallel: a row becomes the JSON object that a
//! line of a JSONL file would be.

use std::fs::File;
use std::path::Path;

use parquet::errors::ParquetError;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::{Field, Row};
use serde_json::{Map, Value};

use super::parallel;
use super::read::Numbered;
use crate::error::{Error, Result};

/// Reads all rows of the file `path`, each through `parse`.
pub(super) fn read<T: Send>(
    path: &Path,
    parse: &(impl Fn(&Value) -> Result<T, String> + Sync),
) -> Result<Vec<Numbered<T>>> {
    let damaged = |error: ParquetError| Error::file(path, error);
    let metadata = open(path)?;
    let mut groups = Vec::with_capacity(metadata.num_row_groups());
    let mut first = 1;
    for index in 0..metadata.num_row_groups() {
        groups.push((index, first));
        first += usize::try_from(metadata.metadata().row_group(index).num_rows()).unwrap_or_default();
    }
    // Each group is read by a file handle of its own: handles that are clones share their place in the file.
    let read = |(index, first): &(usize, usize)| -> Result<Vec<Numbered<T>>> {
        let file = open(path)?;
        let group = file.get_row_group(*index).map_err(damaged)?;
        let mut rows = Vec::new();
        for (row, number) in group.get_row_iter(None).map_err(damaged)?.zip(*first..) {
            let row = row.map_err(|error| Error::file(path, format!("row {number}: {error}")))?;
            rows.push((number, parse(&object(row))));
        }
        Ok(rows)
    };
    let mut all = Vec::new();
    for rows in parallel::map_each(&groups, read) {
        all.extend(rows?);
    }
    Ok(all)
}

fn open(path: &Path) -> Result<SerializedFileReader<File>> {
    let file = File::open(path).map_err(|error| Error::file(path, error))?;
    SerializedFileReader::new(file).map_err(|error| Error::file(path, error))
}

fn object(row: Row) -> Value {
    Value::Object(row.into_columns().into_iter().map(|(name, field)| (name, value(field))).collect::<Map<_, _>>())
}

fn value(field: Field) -> Value {
    match field {
        Field::Str(text) => text.into(),
        Field::Bytes(bytes) => bytes.as_utf8().map_or(Value::Null, Value::from),
        Field::Bool(value) => value.into(),
        Field::Byte(number) => number.into(),
        Field::Short(number) => number.into(),
        Field::Int(number) => number.into(),
        Field::Long(number) => number.into(),
        Field::UByte(number) => number.into(),
        Field::UShort(number) => number.into(),
        Field::UInt(number) => number.into(),
        Field::ULong(number) => number.into(),
        Field::Float(number) => number.into(),
        Field::Double(number) => number.into(),
        Field::Group(row) => object(row),
        Field::ListInternal(list) => list.elements().iter().cloned().map(value).collect(),
        // No key of a schema is a date or a map; what a file has besides is not read.
        _ => Value::Null,
    }
}
