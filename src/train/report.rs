//! A run as one HTML page with curves, without scripts and without anything from elsewhere.
//! Reads records; which there are is the trainer's to know.

use std::fmt::Write;
use std::path::Path;

use super::data::DataFile;
use super::recipe::Recipe;
use super::record::{Kind, Record};
use crate::error::{Error, Result};

mod chart;

use chart::Curve;

/// The curves, in this order: the name of the metric and what the chart is called.
const CHARTS: [(&str, &str); 13] = [
    ("loss", "Loss"),
    ("rewards/chosen", "Reward of chosen answers"),
    ("rewards/rejected", "Reward of rejected answers"),
    ("rewards/margins", "Margin between them"),
    ("rewards/accuracies", "Pairs in the right order"),
    ("accuracy", "Pairs in the right order"),
    ("margin", "Margin of rewards"),
    ("mean_token_accuracy", "Tokens predicted right"),
    ("entropy", "Entropy"),
    ("kl", "z0, the distance from the reference"),
    ("grad_norm", "Norm of the gradient"),
    ("learning_rate", "Learning rate"),
    ("tokens_per_second", "Tokens per second"),
];

/// What the page shows.
#[derive(Debug, Clone, Copy)]
pub struct Report<'a> {
    /// The resolved recipe.
    pub recipe: &'a Recipe,
    /// The files that were read.
    pub files: &'a [DataFile],
    /// All records of the run, in order.
    pub records: &'a [Record],
}

impl Report<'_> {
    /// Writes the page to `path`.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        // Another name first: a page that is being read is never half there.
        let temporary = path.with_extension("html.tmp");
        std::fs::write(&temporary, self.render())
            .and_then(|()| std::fs::rename(&temporary, path))
            .map_err(|error| Error::file(path, error))
    }

    /// The page.
    pub fn render(&self) -> String {
        let stage = self.recipe.stage.name();
        let title = escaped(&format!("{stage} of {}", self.recipe.model.from));
        let steps = self.records.last().map_or(0, |record| record.step);
        let charts: String = CHARTS.iter().filter_map(|(name, title)| self.chart(name, title)).collect();
        format!(
            "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
             <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n<title>{title}</title>\n\
             <style>{STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n<p>{steps} steps. Points are records, \
             <span class=\"train\">train</span> and <span class=\"eval\">held out</span>.</p>\n\
             <div class=\"charts\">\n{charts}</div>\n{}{}<h2>Recipe</h2>\n<pre>{}</pre>\n</body>\n</html>\n",
            self.final_values(),
            self.data(),
            escaped(&self.recipe.to_toml())
        )
    }

    /// A chart of the metric `name`, if there is any record of it.
    fn chart(&self, name: &str, title: &str) -> Option<String> {
        let mut curves: Vec<Curve> = Vec::new();
        for record in self.records {
            // Charts cannot show what is no number; the table of final values does.
            let Some(value) = record.value(name).filter(|value| value.is_finite()) else { continue };
            let split = record.kind.name();
            let known = curves.iter().position(|curve| curve.split == split);
            let index = known.unwrap_or_else(|| {
                let class = if record.kind == Kind::Train { "train" } else { "eval" };
                curves.push(Curve { split: split.to_owned(), class, points: Vec::new() });
                curves.len() - 1
            });
            curves[index].points.push((record.step as f64, value));
        }
        if curves.is_empty() {
            return None;
        }
        let svg = chart::svg(&curves, &format!("{title}: {name} by step"));
        Some(format!(
            "<figure><figcaption>{} <code>{}</code></figcaption>{svg}</figure>\n",
            escaped(title),
            escaped(name)
        ))
    }

    /// The last value of every metric, for each set of rows.
    fn final_values(&self) -> String {
        let (mut splits, mut names): (Vec<&str>, Vec<&str>) = (Vec::new(), Vec::new());
        for record in self.records {
            push_new(&mut splits, record.kind.name());
            record.values.iter().for_each(|(name, _)| push_new(&mut names, name));
        }
        let heads: String = splits.iter().map(|split| format!("<th>{}</th>", escaped(split))).collect();
        let mut text = format!("<h2>Final values</h2>\n<table>\n<tr><th>metric</th>{heads}</tr>\n");
        for name in names {
            let last = |split: &&str| {
                let mut records = self.records.iter().rev().filter(|record| record.kind.name() == *split);
                records.find_map(|record| record.value(name)).map_or_else(String::new, number)
            };
            let cells: String = splits.iter().map(|split| format!("<td>{}</td>", last(split))).collect();
            // Writing to a String cannot fail.
            let _ = writeln!(text, "<tr><th>{}</th>{cells}</tr>", escaped(name));
        }
        text + "</table>\n"
    }

    fn data(&self) -> String {
        let mut text = String::from("<h2>Data</h2>\n<table>\n<tr><th>file</th><th>rows</th><th>blake3</th></tr>\n");
        for file in self.files {
            let path = escaped(&file.path.display().to_string());
            let hash = escaped(&file.blake3);
            let _ = writeln!(text, "<tr><th>{path}</th><td>{}</td><td><code>{hash}</code></td></tr>", file.rows);
        }
        text + "</table>\n"
    }
}

fn push_new<'a>(list: &mut Vec<&'a str>, item: &'a str) {
    if !list.contains(&item) {
        list.push(item);
    }
}

/// Five digits, with an exponent where there would be many zeros.
fn number(value: f64) -> String {
    let size = value.abs();
    if value == 0.0 || !value.is_finite() {
        format!("{value}")
    } else if (1e-3..1e6).contains(&size) {
        let digits = (4 - size.log10().floor() as i32).clamp(0, 7) as usize;
        let text = format!("{value:.digits$}");
        if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
    } else {
        format!("{value:.3e}")
    }
}

/// `text` where HTML expects text or the value of an attribute in quotes.
fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            c => out.push(c),
        }
    }
    out
}

/// Colours that are told apart by everybody (Okabe and Ito), on the reader's own light or dark.
const STYLE: &str = "
:root { color-scheme: light dark; --train: #0072b2; --eval: #d55e00; --grid: #8885; }
@media (prefers-color-scheme: dark) { :root { --train: #56b4e9; --eval: #e69f00; } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(20rem, 1fr)); gap: 1rem; }
figure { margin: 0; }
figcaption code { opacity: .7; }
svg { width: 100%; height: auto; }
svg text { fill: currentColor; font: 11px system-ui, sans-serif; opacity: .8; }
.grid { stroke: var(--grid); }
polyline { fill: none; stroke-width: 1.5; stroke-linejoin: round; }
polyline.train { stroke: var(--train); } polyline.eval { stroke: var(--eval); stroke-dasharray: 5 3; }
circle.train { fill: var(--train); } circle.eval { fill: var(--eval); }
span.train { color: var(--train); } span.eval { color: var(--eval); }
table { border-collapse: collapse; } th, td { padding: .15rem .8rem .15rem 0; text-align: left; font-weight: normal; }
td { font-variant-numeric: tabular-nums; } tr:first-child th { font-weight: bold; }
pre { overflow: auto; padding: 1rem; border: 1px solid var(--grid); }
";

#[cfg(test)]
mod tests;
