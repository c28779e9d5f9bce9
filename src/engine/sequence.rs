//! One request on its way: the only mutable state that belongs to a request. Knows what its next chunk is and what to make
//! of its outcome; when it runs, and on which blocks, is the scheduler's business.

use tokio::sync::mpsc::Sender;

use super::blocks::BlockTable;
use super::outbox::Outbox;
use super::request::{Event, Finish, Request, SamplingParams, ScoreRows, Task, TokenId, TokenLogProb, Usage};
use super::step::{Chunk, Draw, Last, Outcome, Rows, SequenceId, Want};
use crate::error::{Error, Result};

/// Positions below `computed` are in the cache; there is work while `computed < tokens.len()`.
#[derive(Debug)]
pub(super) struct Sequence {
    pub(super) id: SequenceId,
    pub(super) tokens: Vec<TokenId>,
    pub(super) computed: usize,
    pub(super) table: BlockTable,
    /// Steps in a row for which the reader has left no room for what comes next; 0 is ready.
    pub(super) parked_steps: u32,
    /// Prompt tokens found in the cache when first admitted; none before that.
    pub(super) cached: Option<usize>,
    prompt_len: usize,
    task: Task,
    reply: Sender<Event>,
    /// Read from the rows of the chunks so far.
    prompt_logprobs: Vec<TokenLogProb>,
    scores: Vec<f32>,
    prompt_sent: bool,
}

/// What became of a sequence in a step.
#[derive(Debug, PartialEq)]
pub(super) enum Fate {
    /// There is more to compute.
    Continues,
    /// `Done` is on its way.
    Finished,
    /// `Failed` is on its way.
    Failed,
}

impl Sequence {
    pub(super) fn new(id: SequenceId, request: Request) -> Self {
        let Request { prompt, task, reply } = request;
        Self {
            id,
            prompt_len: prompt.len(),
            tokens: prompt,
            computed: 0,
            table: BlockTable::default(),
            parked_steps: 0,
            cached: None,
            task,
            reply,
            prompt_logprobs: Vec::new(),
            scores: Vec::new(),
            prompt_sent: false,
        }
    }

    pub(super) fn prompt_len(&self) -> usize {
        self.prompt_len
    }

    /// Tokens that wait to be computed.
    pub(super) fn pending(&self) -> usize {
        self.tokens.len() - self.computed
    }

    /// Positions to have room for so that neither this step nor the next one asks for more blocks.
    pub(super) fn foreseeable_len(&self) -> usize {
        (self.tokens.len() + 1).min(cache_len_max(self.prompt_len, &self.task))
    }

    pub(super) fn is_cancelled(&self) -> bool {
        self.reply.is_closed()
    }

    /// Notes whether the reader has room for all that one step may send. The room for the last event is thus never used up
    /// by others.
    pub(super) fn note_reader(&mut self) {
        let ready = self.reply.capacity() >= events_max(&self.task, self.prompt_sent);
        self.parked_steps = if ready { 0 } else { self.parked_steps.saturating_add(1) };
    }

    pub(super) fn is_parked(&self) -> bool {
        self.parked_steps > 0
    }

    /// Whether every row has still to be read, so that nothing can be skipped.
    pub(super) fn needs_rows(&self) -> bool {
        match &self.task {
            Task::Generate(params) => params.prompt_logprobs.is_some() && !self.prompt_sent,
            Task::Score(rows) => *rows == ScoreRows::All,
        }
    }

    /// The sequence lost its blocks and starts again. What was sent stays sent; rows read so far are read again.
    pub(super) fn restart(&mut self) {
        self.computed = 0;
        self.prompt_logprobs.clear();
        self.scores.clear();
    }

    /// The next `len` pending tokens; the table covers them.
    pub(super) fn chunk(&self, len: usize) -> Chunk {
        let end = self.computed + len;
        Chunk {
            id: self.id,
            start: self.computed,
            tokens: self.tokens[self.computed..end].to_vec(),
            blocks: self.table.blocks().to_vec(),
            rows: self.rows(end),
            want: if end == self.tokens.len() { self.want() } else { Want::Nothing },
        }
    }

    fn rows(&self, end: usize) -> Rows {
        match &self.task {
            Task::Score(ScoreRows::All) => Rows::Scores,
            Task::Generate(params) if self.needs_rows() => {
                let targets = self.tokens[self.computed + 1..(end + 1).min(self.prompt_len)].to_vec();
                match params.prompt_logprobs {
                    Some(top) if !targets.is_empty() => Rows::LogProbs { targets, top },
                    _ => Rows::Nothing,
                }
            }
            _ => Rows::Nothing,
        }
    }

    fn want(&self) -> Want {
        match &self.task {
            Task::Score(_) => Want::Score,
            Task::Generate(params) if params.max_tokens == 0 => Want::Nothing,
            Task::Generate(params) => Want::Token(Draw {
                params: params.clone(),
                position: self.tokens.len(),
                generated_count: self.tokens.len() - self.prompt_len,
                history: if params.needs_history() { self.tokens.clone() } else { Vec::new() },
                prompt_len: self.prompt_len,
            }),
        }
    }

    /// Takes in what came out of `chunk`, for the reader to be told.
    pub(super) fn accept(&mut self, chunk: &Chunk, outcome: Outcome, outbox: &mut Outbox) -> Fate {
        match self.take_in(chunk, outcome, outbox) {
            Ok(None) => Fate::Continues,
            Ok(Some(finish)) => {
                let usage = Usage {
                    prompt_tokens: self.prompt_len,
                    cached_tokens: self.cached.unwrap_or(0),
                    completion_tokens: self.tokens.len() - self.prompt_len,
                };
                outbox.push(&self.reply, Event::Done(finish, usage));
                Fate::Finished
            }
            Err(error) => {
                self.fail(error, outbox);
                Fate::Failed
            }
        }
    }

    /// The reader is to be told that this is over.
    pub(super) fn fail(&self, error: Error, outbox: &mut Outbox) {
        outbox.push(&self.reply, Event::Failed(error));
    }

    fn take_in(&mut self, chunk: &Chunk, outcome: Outcome, outbox: &mut Outbox) -> Result<Option<Finish>> {
        let Outcome { logprobs, scores, last } = outcome;
        let expected = match &chunk.rows {
            Rows::Nothing => (0, 0),
            Rows::LogProbs { targets, .. } => (targets.len(), 0),
            Rows::Scores => (0, chunk.tokens.len()),
        };
        if let Last::Failed(error) = last {
            return Err(error);
        }
        if (logprobs.len(), scores.len()) != expected {
            return Err(Error::internal("the executor answered with another number of rows than asked for"));
        }
        self.computed = chunk.start + chunk.tokens.len();
        self.prompt_logprobs.extend(logprobs);
        self.scores.extend(scores);
        match (&chunk.want, last) {
            (Want::Nothing, Last::Nothing) if self.pending() > 0 => Ok(None),
            (Want::Nothing, Last::Nothing) => {
                self.push_prompt(outbox);
                Ok(Some(Finish::Length))
            }
            (Want::Token(draw), Last::Token(id, logprob)) => {
                self.push_prompt(outbox);
                outbox.push(&self.reply, Event::Token { id, logprob });
                Ok(self.append(draw, id))
            }
            (Want::Score, Last::Score(score)) => {
                if self.needs_rows() {
                    let scores = std::mem::take(&mut self.scores);
                    outbox.push(&self.reply, Event::Scores(scores));
                }
                outbox.push(&self.reply, Event::Score(score));
                Ok(Some(Finish::Scored))
            }
            _ => Err(Error::internal("the executor answered something that was not asked for")),
        }
    }

    fn append(&mut self, draw: &Draw, id: TokenId) -> Option<Finish> {
        self.tokens.push(id);
        let SamplingParams { stop_token_ids, min_tokens, max_tokens, .. } = &*draw.params;
        if stop_token_ids.contains(&id) && draw.generated_count >= *min_tokens {
            Some(Finish::Stop(id))
        } else if draw.generated_count + 1 >= *max_tokens {
            Some(Finish::Length)
        } else {
            None
        }
    }

    fn push_prompt(&mut self, outbox: &mut Outbox) {
        if self.needs_rows() {
            self.prompt_sent = true;
            let logprobs = std::mem::take(&mut self.prompt_logprobs);
            outbox.push(&self.reply, Event::Prompt(logprobs));
        }
    }
}

/// Positions that are ever cached: the last token drawn is not computed.
pub(super) fn cache_len_max(prompt_len: usize, task: &Task) -> usize {
    match task {
        Task::Generate(params) => prompt_len.saturating_add(params.max_tokens.saturating_sub(1)),
        Task::Score(_) => prompt_len,
    }
}

/// Events that one step may send at most.
pub(super) fn events_max(task: &Task, prompt_sent: bool) -> usize {
    match task {
        Task::Generate(params) => 2 + usize::from(params.prompt_logprobs.is_some() && !prompt_sent),
        Task::Score(rows) => 2 + usize::from(*rows == ScoreRows::All),
    }
}
