//! Metrics of a run as lines of JSON and as TensorBoard event files, the same after a crash as without one.
//! Owns both files; which metrics there are, and under which of TRL's names, is the trainer's to know.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value};

use super::events::{self, EventFile};
use crate::error::{Error, Result};

const METRICS: &str = "metrics.jsonl";
const TENSORBOARD: &str = "tensorboard";
const TRAIN: &str = "train";

/// What a record is about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// Steps of training.
    Train,
    /// An evaluation on the rows of this name; with one set of rows it is `eval`.
    Eval(String),
}

impl Kind {
    /// As files spell it.
    pub fn name(&self) -> &str {
        match self {
            Self::Train => TRAIN,
            Self::Eval(name) => name,
        }
    }
}

/// Metrics after a step.
#[derive(Debug, Clone, PartialEq)]
pub struct Record {
    /// Steps that were done.
    pub step: u64,
    /// What was measured.
    pub kind: Kind,
    /// By TRL's names: `epoch`, `loss`, `grad_norm`, `learning_rate`, `num_tokens`, `rewards/chosen`, ...
    pub values: Vec<(String, f64)>,
}

impl Record {
    /// The value called `name`.
    pub fn value(&self, name: &str) -> Option<f64> {
        self.values.iter().find(|(known, _)| known == name).map(|(_, value)| *value)
    }

    fn to_line(&self) -> String {
        let mut row = Map::new();
        row.insert("step".into(), self.step.into());
        row.insert("split".into(), self.kind.name().into());
        // JSON has no infinity and no NaN: such a value is null.
        row.extend(self.values.iter().map(|(name, value)| (name.clone(), Value::from(*value))));
        format!("{}\n", Value::Object(row))
    }

    fn from_line(line: &str) -> Option<Self> {
        let mut row: Map<String, Value> = serde_json::from_str(line).ok()?;
        let step = row.shift_remove("step")?.as_u64()?;
        let kind = match row.shift_remove("split")?.as_str()? {
            TRAIN => Kind::Train,
            name => Kind::Eval(name.to_owned()),
        };
        let value = |value: Value| if value.is_null() { Some(f64::NAN) } else { value.as_f64() };
        let values = row.into_iter().map(|(name, number)| Some((name, value(number)?)));
        Some(Self { step, kind, values: values.collect::<Option<_>>()? })
    }
}

/// Writes the metrics of a run.
#[derive(Debug)]
pub struct Recorder {
    path: PathBuf,
    lines: File,
    events: EventFile,
}

impl Recorder {
    /// Begins or goes on in the folder `output`. `resumed` is the step of the snapshot that the run goes on from: records of
    /// later steps are dropped, because they will be made again. Without it, those of an earlier run are dropped.
    ///
    /// # Errors
    /// If a file cannot be read or written.
    pub fn new(output: &Path, resumed: Option<u64>) -> Result<Self> {
        fs::create_dir_all(output).map_err(|error| Error::file(output, error))?;
        let (path, tensorboard) = (output.join(METRICS), output.join(TENSORBOARD));
        let unwritable = |error: std::io::Error| Error::file(&path, error);
        let mut lines = File::options().read(true).append(true).create(true).open(&path).map_err(unwritable)?;
        let kept = match resumed {
            Some(step) => sound_bytes(&std::io::read_to_string(&mut lines).map_err(unwritable)?, step),
            None => {
                events::clear(&tensorboard)?;
                0
            }
        };
        lines.set_len(kept).map_err(unwritable)?;
        let events = EventFile::create(&tensorboard, resumed.map_or(0, |step| step + 1), now())?;
        Ok(Self { path, lines, events })
    }

    /// Appends `record`. Steps must not go back.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn write(&mut self, record: &Record) -> Result<()> {
        self.lines.write_all(record.to_line().as_bytes()).map_err(|error| Error::file(&self.path, error))?;
        let split = record.kind.name();
        let scalars: Vec<(String, f64)> =
            record.values.iter().map(|(name, value)| (format!("{split}/{name}"), *value)).collect();
        self.events.write(record.step, now(), &scalars)
    }

    /// Waits until everything is on the disk. To be called before a snapshot is saved: what the snapshot has behind it is not
    /// recorded again.
    ///
    /// # Errors
    /// If it is not.
    pub fn sync(&self) -> Result<()> {
        self.lines.sync_all().map_err(|error| Error::file(&self.path, error))?;
        self.events.sync()
    }

    /// Ends the records.
    ///
    /// # Errors
    /// As [`Recorder::sync`].
    pub fn finish(self) -> Result<()> {
        self.sync()
    }
}

/// All records in the folder `output`, up to the first line that is none.
///
/// # Errors
/// If the file is there and cannot be read.
pub fn read(output: &Path) -> Result<Vec<Record>> {
    let path = output.join(METRICS);
    match fs::read_to_string(&path) {
        Ok(text) => Ok(text.lines().map_while(Record::from_line).collect()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(Error::file(&path, error)),
    }
}

/// Bytes of the lines before the first one of a step beyond `step`, or that a crash cut short.
fn sound_bytes(text: &str, step: u64) -> u64 {
    let lines = text.split_inclusive('\n');
    let sound = lines
        .take_while(|line| line.ends_with('\n') && Record::from_line(line).is_some_and(|record| record.step <= step));
    sound.map(str::len).sum::<usize>() as u64
}

/// Seconds since 1970, which TensorBoard can show in place of steps.
fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    fn record(step: u64, kind: Kind) -> Record {
        let values = [("epoch", step as f64 / 3.0), ("loss", 1.0 / step as f64), ("rewards/chosen", -1e-17)];
        Record { step, kind, values: values.map(|(name, value)| (name.to_owned(), value)).to_vec() }
    }

    fn write(output: &Path, resumed: Option<u64>, steps: std::ops::RangeInclusive<u64>) {
        let mut recorder = Recorder::new(output, resumed).unwrap();
        for step in steps {
            recorder.write(&record(step, Kind::Train)).unwrap();
            if step % 2 == 0 {
                recorder.write(&record(step, Kind::Eval("eval".into()))).unwrap();
            }
        }
        recorder.finish().unwrap();
    }

    #[test]
    fn what_was_written_is_read_back_bit_for_bit() {
        let root = tempfile::tempdir().unwrap();
        write(root.path(), None, 1..=3);
        let expected = [(1, "train"), (2, "train"), (2, "eval"), (3, "train")]
            .map(|(step, split)| record(step, if split == "train" { Kind::Train } else { Kind::Eval(split.into()) }));
        assert_eq!(read(root.path()).unwrap(), expected);
        let first = fs::read_to_string(root.path().join(METRICS)).unwrap();
        let first = first.lines().next().unwrap();
        assert_eq!(
            first,
            r#"{"step":1,"split":"train","epoch":0.3333333333333333,"loss":1.0,"rewards/chosen":-1e-17}"#
        );
        assert!(read(Path::new("/nowhere")).unwrap().is_empty());
    }

    #[test]
    fn a_resumed_run_leaves_the_same_lines_as_one_that_never_stopped() {
        for stopped in 1..=7 {
            for cut in [0, 1, 30] {
                let [whole, resumed] = [(); 2].map(|()| tempfile::tempdir().unwrap());
                write(whole.path(), None, 1..=9);
                write(resumed.path(), None, 1..=stopped);
                let path = resumed.path().join(METRICS);
                let length = path.metadata().unwrap().len();
                // The last line may be cut short where the process was killed.
                File::options().write(true).open(&path).unwrap().set_len(length.saturating_sub(cut)).unwrap();
                let snapshot = stopped - 1;
                write(resumed.path(), Some(snapshot), snapshot + 1..=9);
                let text = |root: &tempfile::TempDir| fs::read_to_string(root.path().join(METRICS)).unwrap();
                assert_eq!(text(&resumed), text(&whole), "stopped after {stopped}, {cut} bytes lost");
            }
        }
    }

    #[test]
    fn a_fresh_run_forgets_the_one_before() {
        let root = tempfile::tempdir().unwrap();
        write(root.path(), None, 1..=5);
        write(root.path(), Some(2), 3..=5);
        assert_eq!(fs::read_dir(root.path().join(TENSORBOARD)).unwrap().count(), 2);
        write(root.path(), None, 1..=1);
        assert_eq!(read(root.path()).unwrap().len(), 1);
        assert_eq!(fs::read_dir(root.path().join(TENSORBOARD)).unwrap().count(), 1);
    }

    #[test]
    fn what_is_no_number_is_null() {
        let root = tempfile::tempdir().unwrap();
        let mut recorder = Recorder::new(root.path(), None).unwrap();
        let values = vec![("loss".to_owned(), f64::NAN), ("grad_norm".to_owned(), f64::INFINITY)];
        recorder.write(&Record { step: 1, kind: Kind::Train, values }).unwrap();
        let records = read(root.path()).unwrap();
        assert!(records[0].values.iter().all(|(_, value)| value.is_nan()));
    }
}
