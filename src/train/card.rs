//! The README of a trained model: where it comes from, what it learnt from, how good it is and how to serve it.

use std::fmt::Write;

use super::data::DataFile;
use super::recipe::{Recipe, Stage};
use crate::checkpoint::Source;

/// What the README tells.
#[derive(Debug, Clone, Copy)]
pub struct Card<'a> {
    /// The resolved recipe.
    pub recipe: &'a Recipe,
    /// The files that were read.
    pub files: &'a [DataFile],
    /// Steps that were done.
    pub steps: u64,
    /// The last metrics by name, such as `eval/loss`.
    pub metrics: &'a [(String, f64)],
}

impl Card<'_> {
    /// As Markdown, behind the block of YAML that the hub reads.
    pub fn render(&self) -> String {
        let recipe = self.recipe;
        let stage = recipe.stage;
        let name =
            recipe.run.output.file_name().map_or_else(|| "model".into(), |name| name.to_string_lossy().into_owned());
        let mut text = format!(
            "{}\n# {}\n\nTrained from `{}` by `eurus train {}` {} in {} steps.\n",
            self.front_matter(),
            plain(&name),
            code(&recipe.model.from),
            stage.name(),
            env!("CARGO_PKG_VERSION"),
            self.steps
        );
        text.push_str(&how_to_serve(recipe));
        if !self.metrics.is_empty() {
            text.push_str("\n## Metrics\n\n| metric | value |\n|---|---|\n");
            for (name, value) in self.metrics {
                // Writing to a String cannot fail.
                let _ = writeln!(text, "| {} | {value:.4} |", plain(name));
            }
        }
        text.push_str("\n## Data\n\n| file | rows | blake3 |\n|---|---|---|\n");
        for file in self.files {
            let path = code(&file.path.display().to_string());
            let _ = writeln!(text, "| `{path}` | {} | `{}` |", file.rows, file.blake3);
        }
        // A fence longer than any run of backticks that the recipe could hold.
        let _ = write!(text, "\n## Recipe\n\n``````toml\n{}``````\n", recipe.to_toml().replace("``````", "'"));
        text
    }

    fn front_matter(&self) -> String {
        let stage = self.recipe.stage;
        let task = if stage == Stage::Reward { "text-classification" } else { "text-generation" };
        let mut text =
            format!("---\nlibrary_name: transformers\npipeline_tag: {task}\ntags:\n- eurus\n- {}\n", stage.name());
        // The hub links this name, so only names on the hub may stand there.
        if let Ok(Source::Hub(repository)) = Source::parse(&self.recipe.model.from) {
            let _ = writeln!(text, "base_model: {}", repository.id);
        }
        text.push_str("---\n");
        text
    }
}

fn how_to_serve(recipe: &Recipe) -> String {
    let flags = match recipe.stage {
        Stage::Reward => "--reward-model . --model none",
        _ => "--model . --reward-model none",
    };
    format!("\nTo serve it, in its folder:\n\n```sh\neurus serve {flags}\n```\n")
}

/// `text` where a line of Markdown or a cell of a table is expected.
fn plain(text: &str) -> String {
    let special = |c: char| matches!(c, '\\' | '`' | '*' | '[' | ']' | '<' | '>' | '#' | '|');
    let line = text.chars().map(|c| if c.is_control() { ' ' } else { c });
    line.flat_map(|c| special(c).then_some('\\').into_iter().chain([c])).collect()
}

/// `text` where a piece of code is expected.
fn code(text: &str) -> String {
    text.chars().map(|c| if c.is_control() || matches!(c, '`' | '|') { '_' } else { c }).collect()
}
