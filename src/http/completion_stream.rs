//! Chunks of a streamed text completion, for several prompts with several choices each.

use serde::Serialize;
use utoipa::ToSchema;

use super::{
    choices::{Head, Origin, WireStop, WireUsage},
    completions::Report,
    logprobs::CompletionLogProbs,
    sampling::GenerationFields,
    stream::{Chunks, to_json},
};
use crate::service::{
    TokenId, Usage,
    updates::{Delta, Finished, TokenInfo, Update},
};

/// One event of a streamed completion.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct CompletionChunk {
    /// Id, kind, time, model.
    #[serde(flatten)]
    pub head: Head,
    /// Seed of choice 0 of each prompt.
    pub seed: i64,
    /// Pieces of choices; empty in the usage chunk.
    pub choices: Vec<CompletionPiece>,
    /// Token counts so far; null where they come at the end.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<WireUsage>)]
    pub usage: Option<Option<WireUsage>>,
}

/// A piece of a completion.
#[derive(Debug, Clone, Default, PartialEq, Serialize, ToSchema)]
pub struct CompletionPiece {
    /// Which choice.
    pub index: usize,
    /// Text to append.
    pub text: String,
    /// Log-probabilities of the new tokens.
    pub logprobs: Option<CompletionLogProbs>,
    /// Why the choice ended, in its last piece.
    pub finish_reason: Option<&'static str>,
    /// The request's own condition that ended it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stop_reason: Option<WireStop>,
    /// The new tokens.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_ids: Option<Vec<TokenId>>,
}

/// Makes chunks of the updates of one generation for each prompt.
pub(super) struct CompletionChunks {
    head: Head,
    origins: Vec<Origin>,
    report: Report,
    n: usize,
    usage_last: bool,
    usage_each: bool,
    /// Characters sent of each choice; `None` before its first chunk.
    sent: Vec<Option<usize>>,
    usage: Usage,
}

impl CompletionChunks {
    pub(super) fn new(origins: Vec<Origin>, report: Report, fields: &GenerationFields) -> Self {
        let (usage_last, usage_each) = fields.stream_usage();
        let n = fields.n.and_then(|n| usize::try_from(n).ok()).unwrap_or(1);
        let prompt_tokens = origins.iter().map(|origin| origin.prompt_ids.len()).sum();
        let model = origins.first().map_or("", |origin| origin.model.as_str());
        Self {
            head: Head::new("cmpl-", "text_completion", model),
            sent: vec![None; n * origins.len()],
            origins,
            report,
            n,
            usage_last,
            usage_each,
            usage: Usage { prompt_tokens, ..Usage::default() },
        }
    }

    fn chunk(&self, choices: Vec<CompletionPiece>) -> CompletionChunk {
        let usage = match (self.usage_each, self.usage_last) {
            (true, _) => Some(Some(self.usage.into())),
            (false, true) => Some(None),
            (false, false) => None,
        };
        let seed = self.origins.first().map_or(0, |origin| origin.seed);
        CompletionChunk { head: self.head.clone(), seed, choices, usage }
    }

    /// The echoed prompt, before the first other chunk of a choice.
    fn begin(&mut self, prompt: usize, index: usize) -> Option<String> {
        if self.sent[index].is_some() {
            return None;
        }
        let mut offset = 0;
        let origin = &self.origins[prompt];
        let piece = self.report.echo.then(|| {
            let logprobs = lists(&origin.prompt, self.report, &mut offset);
            CompletionPiece { index, text: origin.prompt_text.clone(), logprobs, ..CompletionPiece::default() }
        });
        let chunk = piece.map(|piece| to_json(&self.chunk(vec![piece])));
        self.sent[index] = Some(offset);
        chunk
    }

    fn delta(&mut self, index: usize, delta: Delta) -> Option<String> {
        self.usage.completion_tokens += delta.ids.len();
        if delta.text.is_empty() && delta.logprobs.is_empty() && !self.report.ids {
            return None;
        }
        let offset = self.sent[index].get_or_insert(0);
        let logprobs = lists(&delta.logprobs, self.report, offset);
        let token_ids = self.report.ids.then_some(delta.ids);
        let piece = CompletionPiece { index, text: delta.text, logprobs, token_ids, ..CompletionPiece::default() };
        Some(to_json(&self.chunk(vec![piece])))
    }

    fn finish(&mut self, index: usize, finished: Finished) -> String {
        if finished.index == 0 {
            self.usage.cached_tokens += finished.usage.cached_tokens;
        }
        to_json(&self.chunk(vec![CompletionPiece {
            index,
            finish_reason: Some(finished.reason.as_str()),
            stop_reason: finished.stop_reason.map(Into::into),
            ..CompletionPiece::default()
        }]))
    }
}

fn lists(tokens: &[TokenInfo], report: Report, offset: &mut usize) -> Option<CompletionLogProbs> {
    report.logprobs.map(|top| {
        let mut lists = CompletionLogProbs::default();
        lists.extend(tokens, top, offset);
        lists
    })
}

impl Chunks for CompletionChunks {
    fn update(&mut self, prompt: usize, update: Update) -> Vec<String> {
        let first = prompt * self.n;
        match update {
            Update::Prompt(tokens) => {
                self.origins[prompt].prompt = tokens;
                Vec::new()
            }
            Update::Delta(delta) => {
                let index = first + delta.index;
                self.begin(prompt, index).into_iter().chain(self.delta(index, delta)).collect()
            }
            Update::Finished(finished) => {
                let index = first + finished.index;
                self.begin(prompt, index).into_iter().chain([self.finish(index, finished)]).collect()
            }
        }
    }

    fn closing(&mut self) -> Vec<String> {
        if !self.usage_last {
            return Vec::new();
        }
        let mut chunk = self.chunk(Vec::new());
        chunk.usage = Some(Some(self.usage.into()));
        vec![to_json(&chunk)]
    }
}
