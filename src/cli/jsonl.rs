//! JSON Lines in, JSON Lines out, in the same order, with a progress bar: the frame of the offline commands.
//! Knows nothing of what is done with a row.

use std::fs::File;
use std::io::{self, BufRead, BufReader, BufWriter, Write};
use std::path::PathBuf;

use futures_util::{StreamExt, TryStreamExt, stream};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::service::Message;

/// A row: one JSON object.
pub(super) type Row = Map<String, Value>;

/// Where rows come from and go to.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct Files {
    /// File of JSON objects, one a line; `-` reads standard input
    #[arg(value_name = "IN", default_value = "-")]
    input: PathBuf,
    /// File to write, one object a line in the order of IN; `-` writes standard output
    #[arg(short, long, value_name = "OUT", default_value = "-")]
    output: PathBuf,
    /// Rows worked on at the same time
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=4096))]
    concurrency: u32,
}

/// Reads every row, lets `work` turn it into the row to write, and writes them in order.
///
/// # Errors
/// Names the file and line of the row that `work` or the parser refused; rows before it are written.
pub(super) async fn process<F: Future<Output = Result<Row>>>(files: &Files, work: impl Fn(Row) -> F) -> Result<usize> {
    let (reader, bar) = open(files)?;
    let mut writer = create(files)?;
    let rows = reader.lines().enumerate().filter(|(_, line)| !line.as_ref().is_ok_and(|line| line.trim().is_empty()));
    let results = rows.map(|(index, line)| {
        let place = format!("{}:{}", files.input.display(), index + 1);
        let future = line.map_err(Error::internal).and_then(|line| parse(&line)).map(&work);
        async move {
            match future {
                Ok(future) => future.await,
                Err(error) => Err(error),
            }
            .map_err(|error| located(&place, error))
        }
    });
    let mut results = stream::iter(results).buffered(files.concurrency as usize);
    let mut count = 0;
    while let Some(row) = results.try_next().await? {
        let text = serde_json::to_string(&row).map_err(Error::internal)?;
        writeln!(writer, "{text}").map_err(|error| Error::file(&files.output, error))?;
        count += 1;
        bar.set_message(format!("{count} rows"));
    }
    writer.flush().map_err(|error| Error::file(&files.output, error))?;
    bar.finish_and_clear();
    Ok(count)
}

fn open(files: &Files) -> Result<(Box<dyn BufRead>, ProgressBar)> {
    if files.input.as_os_str() == "-" {
        return Ok((Box::new(BufReader::new(io::stdin())), ProgressBar::new_spinner()));
    }
    let file = File::open(&files.input).map_err(|error| Error::file(&files.input, error))?;
    let bar = ProgressBar::new(file.metadata().map_or(0, |metadata| metadata.len()));
    if let Ok(style) = ProgressStyle::with_template("{bar:40} {bytes}/{total_bytes} {msg}, {eta} left") {
        bar.set_style(style);
    }
    Ok((Box::new(BufReader::new(bar.wrap_read(file))), bar))
}

fn create(files: &Files) -> Result<Box<dyn Write>> {
    if files.output.as_os_str() == "-" {
        return Ok(Box::new(io::stdout()));
    }
    let file = File::create(&files.output).map_err(|error| Error::file(&files.output, error))?;
    Ok(Box::new(BufWriter::new(file)))
}

/// The row in `line`.
///
/// # Errors
/// [`Error::Invalid`] if it is no JSON object.
pub(super) fn parse(line: &str) -> Result<Row> {
    serde_json::from_str(line).map_err(|error| Error::invalid("row", format!("not a JSON object ({error})")))
}

/// The same error, saying where.
pub(super) fn located(place: &str, error: Error) -> Error {
    match error {
        Error::Invalid { message, field } => Error::Invalid { message: format!("{place}: {message}"), field },
        Error::Unavailable(message) => Error::Unavailable(format!("{place}: {message}")),
        other => Error::Internal(format!("{place}: {other}")),
    }
}

/// The conversation in `field`: a string is one user turn, a list holds objects with `role` and `content`.
///
/// # Errors
/// [`Error::Invalid`] naming `field`.
pub(super) fn conversation(row: &Row, field: &str) -> Result<Vec<Message>> {
    let wrong = |what: &str| Error::invalid(field, format!("`{field}` {what}"));
    match row.get(field) {
        Some(Value::String(text)) => Ok(vec![Message { role: "user".into(), content: text.clone() }]),
        Some(Value::Array(turns)) => turns
            .iter()
            .map(|turn| match (&turn["role"], &turn["content"]) {
                (Value::String(role), Value::String(content)) => {
                    Ok(Message { role: role.clone(), content: content.clone() })
                }
                _ => Err(wrong("must hold objects with the strings `role` and `content`")),
            })
            .collect(),
        Some(_) => Err(wrong("must be a string or a list of messages")),
        None => Err(wrong("is missing")),
    }
}

/// The string in `field`.
///
/// # Errors
/// [`Error::Invalid`] naming `field`.
pub(super) fn text(row: &Row, field: &str) -> Result<String> {
    let value = row.get(field).and_then(Value::as_str);
    value.map(str::to_string).ok_or_else(|| Error::invalid(field, format!("`{field}` must be a string")))
}
