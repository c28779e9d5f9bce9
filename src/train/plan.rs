//! What a run is going to do and take, told before it begins. The numbers are the trainer's; this is how they are shown.

use std::fmt::{self, Write};

use super::recipe::Stage;

/// A run before it has begun.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// What is trained.
    pub stage: Stage,
    /// Weights of the model.
    pub parameters: u64,
    /// Weights that move; fewer than `parameters` with adapters.
    pub trainable: u64,
    /// Rows of each file, by name, as read.
    pub files: Vec<(String, u64)>,
    /// Rows that were left out, by reason.
    pub dropped: Vec<(String, u64)>,
    /// Examples to learn from in an epoch; a pair is one.
    pub train_rows: u64,
    /// Examples held out.
    pub test_rows: u64,
    /// Tokens of an epoch.
    pub tokens: u64,
    /// Of these, tokens that are learnt.
    pub target_tokens: u64,
    /// Steps of the optimiser, all epochs together.
    pub steps: u64,
    /// Times the data are seen.
    pub epochs: u64,
    /// Bytes by what they are for: weights, gradients, moments, activations, ...
    pub memory: Vec<(String, u64)>,
    /// Bytes that the machine has free.
    pub memory_free: Option<u64>,
    /// Bytes of one snapshot.
    pub snapshot_bytes: u64,
    /// How long it will take.
    pub seconds: Option<f64>,
}

impl Plan {
    /// Bytes of all parts together.
    pub fn memory_bytes(&self) -> u64 {
        self.memory.iter().map(|(_, bytes)| bytes).sum()
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rows =
            vec![("stage".to_owned(), self.stage.name().to_owned()), ("parameters".to_owned(), self.trainable_text())];
        rows.extend(self.files.iter().map(|(name, count)| (name.clone(), format!("{} rows", grouped(*count)))));
        rows.extend(
            self.dropped.iter().map(|(reason, count)| (format!("  {reason}"), format!("-{}", grouped(*count)))),
        );
        rows.push(("train".to_owned(), format!("{} examples", grouped(self.train_rows))));
        rows.push(("held out".to_owned(), format!("{} examples", grouped(self.test_rows))));
        let tokens = format!("{} an epoch, {} of them learnt", grouped(self.tokens), grouped(self.target_tokens));
        rows.push(("tokens".to_owned(), tokens));
        rows.push(("steps".to_owned(), format!("{} in {}", grouped(self.steps), counted(self.epochs, "epoch"))));
        rows.extend(self.memory.iter().map(|(part, bytes)| (format!("memory: {part}"), size(*bytes))));
        let free = self.memory_free.map_or_else(String::new, |bytes| format!(" of {} free", size(bytes)));
        rows.push(("memory".to_owned(), format!("{}{free}", size(self.memory_bytes()))));
        rows.push(("disk".to_owned(), format!("{} for each snapshot", size(self.snapshot_bytes))));
        let time = self.seconds.map_or_else(|| "not known before the first steps".to_owned(), duration);
        rows.push(("time".to_owned(), time));
        let width = rows.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0);
        rows.iter().try_for_each(|(name, value)| writeln!(f, "{name:width$}  {value}"))
    }
}

impl Plan {
    fn trainable_text(&self) -> String {
        if self.trainable == self.parameters {
            return grouped(self.parameters);
        }
        format!("{}, of which {} are trained", grouped(self.parameters), grouped(self.trainable))
    }
}

/// `1234567` as `1,234,567`.
fn grouped(count: u64) -> String {
    let digits = count.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

fn counted(count: u64, what: &str) -> String {
    format!("{} {what}{}", grouped(count), if count == 1 { "" } else { "s" })
}

/// In the largest unit of which there is at least one.
fn size(bytes: u64) -> String {
    let units = [("GiB", 30), ("MiB", 20), ("KiB", 10)];
    let unit = units.into_iter().find(|(_, bits)| bytes >> bits > 0);
    unit.map_or_else(
        || format!("{bytes} B"),
        |(name, bits)| format!("{:.1} {name}", bytes as f64 / (1u64 << bits) as f64),
    )
}

/// `2 h 5 min`, `3 min 20 s`, `12 s`.
fn duration(seconds: f64) -> String {
    let whole = seconds.round() as u64;
    let mut text = String::from("about ");
    // Writing to a String cannot fail.
    let _ = match (whole / 3600, whole / 60 % 60, whole % 60) {
        (0, 0, seconds) => write!(text, "{seconds} s"),
        (0, minutes, seconds) => write!(text, "{minutes} min {seconds} s"),
        (hours, minutes, _) => write!(text, "{hours} h {minutes} min"),
    };
    text
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[test]
    fn a_plan_is_a_table_of_names_and_values() {
        let plan = Plan {
            stage: Stage::Reward,
            parameters: 7_241_732_096,
            trainable: 1_000,
            files: vec![("a.jsonl".into(), 219_522)],
            dropped: vec![("longer than 4096 tokens".into(), 12)],
            train_rows: 1000,
            test_rows: 0,
            tokens: 999,
            target_tokens: 10,
            steps: 1,
            epochs: 1,
            memory: vec![("weights".into(), 3 << 29), ("moments".into(), 1 << 30)],
            memory_free: Some(2047),
            snapshot_bytes: 5 << 20,
            seconds: Some(7500.0),
        };
        let expected = "\
stage                      reward
parameters                 7,241,732,096, of which 1,000 are trained
a.jsonl                    219,522 rows
  longer than 4096 tokens  -12
train                      1,000 examples
held out                   0 examples
tokens                     999 an epoch, 10 of them learnt
steps                      1 in 1 epoch
memory: weights            1.5 GiB
memory: moments            1.0 GiB
memory                     2.5 GiB of 2.0 KiB free
disk                       5.0 MiB for each snapshot
time                       about 2 h 5 min
";
        assert_eq!(plan.to_string(), expected);
        let unknown = Plan { seconds: None, trainable: 7_241_732_096, epochs: 2, ..plan };
        assert!(unknown.to_string().contains("1 in 2 epochs\n") && unknown.to_string().contains("not known"));
    }

    #[test]
    fn numbers_are_readable() {
        for (count, text) in [(0, "0"), (999, "999"), (1000, "1,000"), (123_456, "123,456"), (1_234_567, "1,234,567")] {
            assert_eq!(grouped(count), text);
        }
        for (seconds, text) in [(0.2, "0 s"), (59.4, "59 s"), (60.0, "1 min 0 s"), (3599.9, "1 h 0 min")] {
            assert_eq!(duration(seconds), format!("about {text}"));
        }
        assert_eq!((size(1023), size(1024)), ("1023 B".to_owned(), "1.0 KiB".to_owned()));
    }
}
