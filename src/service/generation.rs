//! A running generation: the events of n sequences become one stream of updates, with text, stop strings and counts.
//! Memory is bounded: each sequence's channel is, and an event becomes at most a few updates.

use std::{
    collections::VecDeque,
    future::poll_fn,
    sync::Arc,
    task::{Context, Poll},
};

use tokio::sync::mpsc::Receiver;

use super::{
    Prompt, ServedModel, TokenId, Usage,
    generate::{Eos, GenerateRequest, StopText},
    prompt::Prepared,
    updates::{Candidate, Collector, Completed, Delta, FinishReason, Finished, StopReason, TokenInfo, Update},
};
use crate::{
    engine::request::{Event, Finish, TokenLogProb},
    error::{Error, Result},
    text::stream::{Position, TextStream},
};

/// A running generation. Dropping it cancels every candidate within one step.
#[derive(Debug)]
pub struct Generation {
    model: Arc<ServedModel>,
    seed: u64,
    prompt: Prepared,
    stops: Stops,
    slots: Vec<Slot>,
    /// Updates of events already read.
    ready: VecDeque<Update>,
    /// The slot asked first next time, so that a fast candidate does not hide the others.
    turn: usize,
    /// Prompt log-probabilities are due, and come before everything else.
    prompt_due: bool,
}

/// Stop tokens, by what they mean for the output.
#[derive(Debug)]
struct Stops {
    /// End a candidate and have no text.
    silent: Vec<TokenId>,
    /// Named by the request.
    named: Vec<TokenId>,
}

/// One candidate.
#[derive(Debug)]
struct Slot {
    source: Source,
    text: TextStream,
    drawn: usize,
}

/// Where a candidate's events come from.
#[derive(Debug)]
enum Source {
    /// Nothing was asked of the engine: no tokens are to be drawn.
    Unasked,
    /// A sequence in the engine.
    Running(Receiver<Event>),
    /// It has finished, or was cancelled by dropping the receiver.
    Ended,
}

impl Generation {
    /// Reads `sources`, one for each candidate; none where the engine was not asked.
    pub(super) fn new(
        model: Arc<ServedModel>,
        request: &GenerateRequest,
        seed: u64,
        prompt: Prepared,
        sources: Vec<Option<Receiver<Event>>>,
    ) -> Self {
        let position = position(&request.prompt);
        let slot = |source: Option<Receiver<Event>>| {
            let text = TextStream::new(Arc::clone(&model.tokenizer), request.stop.clone(), request.stop_text);
            let source = source.map_or(Source::Unasked, Source::Running);
            Slot { source, text: text.with_position(position), drawn: 0 }
        };
        let slots = sources.into_iter().map(slot).collect();
        let mut generation = Self {
            stops: Stops::new(request, &model.eos_ids),
            model,
            seed,
            prompt,
            slots,
            ready: VecDeque::new(),
            turn: 0,
            prompt_due: request.prompt_logprobs.is_some(),
        };
        if !generation.prompt_due {
            generation.finish_unasked();
        }
        generation
    }

    /// The policy that runs.
    pub fn model(&self) -> &Arc<ServedModel> {
        &self.model
    }

    /// The seed of candidate 0.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// How many candidates it has.
    pub fn count(&self) -> usize {
        self.slots.len()
    }

    /// Tokens of the prompt.
    pub fn prompt_tokens(&self) -> usize {
        self.prompt.ids.len()
    }

    /// The prompt as the model sees it.
    pub fn prompt_ids(&self) -> &[TokenId] {
        &self.prompt.ids
    }

    /// The prompt as text: as given, as rendered, or decoded from ids.
    pub fn prompt_text(&self) -> &str {
        &self.prompt.text
    }

    /// The chat template that rendered the prompt; none for text and ids.
    pub fn template(&self) -> Option<&str> {
        self.prompt.template.as_deref()
    }

    /// The next update of any candidate, as it happens; `None` after the last one or after an error. Nothing is lost
    /// when the future is dropped before it is ready.
    pub async fn next(&mut self) -> Option<Result<Update>> {
        loop {
            if let Some(update) = self.ready.pop_front() {
                return Some(Ok(update));
            }
            if self.slots.iter().all(|slot| !matches!(slot.source, Source::Running(_))) {
                return None;
            }
            let (index, event) = poll_fn(|context| self.poll_event(context)).await;
            if let Err(error) = self.take(index, event) {
                self.cancel();
                return Some(Err(error));
            }
        }
    }

    /// Everything, once all candidates have ended.
    ///
    /// # Errors
    /// The first failure of a candidate; the others are cancelled.
    pub async fn collect(mut self) -> Result<Completed> {
        let mut collector = Collector::new(self.slots.len(), self.seed);
        let mut candidates: Vec<Candidate> = Vec::with_capacity(self.slots.len());
        while let Some(update) = self.next().await {
            candidates.extend(collector.take(update?));
        }
        candidates.sort_unstable_by_key(|candidate| candidate.index);
        Ok(Completed { prompt: collector.into_prompt(), candidates })
    }

    fn poll_event(&mut self, context: &mut Context<'_>) -> Poll<(usize, Option<Event>)> {
        let readable = if self.prompt_due { 1 } else { self.slots.len() };
        for step in 0..readable {
            let index = (self.turn + step) % readable;
            let Source::Running(events) = &mut self.slots[index].source else { continue };
            if let Poll::Ready(event) = events.poll_recv(context) {
                self.turn = index + 1;
                return Poll::Ready((index, event));
            }
        }
        Poll::Pending
    }

    fn take(&mut self, index: usize, event: Option<Event>) -> Result<()> {
        match event {
            None => return Err(Error::Unavailable("the engine stopped before all candidates were finished".into())),
            Some(Event::Failed(error)) => return Err(error),
            Some(Event::Prompt(rows)) => self.take_prompt(&rows),
            Some(Event::Token { id, logprob }) => self.take_token(index, id, logprob.as_ref()),
            Some(Event::Done(finish, usage)) => self.take_done(index, finish, usage)?,
            Some(Event::Scores(_) | Event::Score(_)) => return Err(Error::internal("a reward where a token was due")),
        }
        Ok(())
    }

    /// `rows` begin with the second token: the first has nothing before it that could predict it.
    fn take_prompt(&mut self, rows: &[TokenLogProb]) {
        if !std::mem::take(&mut self.prompt_due) {
            return;
        }
        let tokenizer = &self.model.tokenizer;
        let first = self.prompt.ids.first().map(|&id| TokenInfo::unknown(tokenizer, id));
        let others = rows.iter().map(|row| TokenInfo::new(tokenizer, row));
        self.ready.push_back(Update::Prompt(first.into_iter().chain(others).collect()));
    }

    fn take_token(&mut self, index: usize, id: TokenId, logprob: Option<&TokenLogProb>) {
        self.take_prompt(&[]);
        let slot = &mut self.slots[index];
        slot.drawn += 1;
        let (text, stopped) = if self.stops.silent.contains(&id) {
            (String::new(), None)
        } else {
            let piece = slot.text.push(id);
            (piece.text, piece.stopped)
        };
        let logprobs = logprob.map(|row| TokenInfo::new(&self.model.tokenizer, row)).into_iter().collect();
        self.ready.push_back(Update::Delta(Delta { index, text, ids: vec![id], logprobs }));
        if let Some(stop) = stopped {
            let usage = Usage { prompt_tokens: self.prompt.ids.len(), cached_tokens: 0, completion_tokens: slot.drawn };
            slot.source = Source::Ended;
            self.finished(index, FinishReason::Stop, Some(StopReason::Text(stop)), usage);
        }
    }

    fn take_done(&mut self, index: usize, finish: Finish, usage: Usage) -> Result<()> {
        self.take_prompt(&[]);
        let slot = &mut self.slots[index];
        slot.source = Source::Ended;
        let rest = slot.text.finish();
        let (reason, stop_reason) = match (finish, rest.stopped) {
            (Finish::Scored, _) => return Err(Error::internal("a reward where tokens were due")),
            (_, Some(stop)) => (FinishReason::Stop, Some(StopReason::Text(stop))),
            (Finish::Stop(id), None) => {
                (FinishReason::Stop, self.stops.named.contains(&id).then_some(StopReason::Token(id)))
            }
            (Finish::Length, None) => (FinishReason::Length, None),
        };
        if !rest.text.is_empty() {
            self.ready.push_back(Update::Delta(Delta {
                index,
                text: rest.text,
                ids: Vec::new(),
                logprobs: Vec::new(),
            }));
        }
        self.finished(index, reason, stop_reason, usage);
        self.finish_unasked();
        Ok(())
    }

    /// Ends the candidates that need no engine.
    fn finish_unasked(&mut self) {
        for index in 0..self.slots.len() {
            if matches!(self.slots[index].source, Source::Unasked) {
                self.slots[index].source = Source::Ended;
                let usage = Usage { prompt_tokens: self.prompt.ids.len(), ..Usage::default() };
                self.finished(index, FinishReason::Length, None, usage);
            }
        }
    }

    fn finished(&mut self, index: usize, reason: FinishReason, stop_reason: Option<StopReason>, usage: Usage) {
        self.ready.push_back(Update::Finished(Finished { index, reason, stop_reason, usage }));
    }

    fn cancel(&mut self) {
        self.ready.clear();
        for slot in &mut self.slots {
            slot.source = Source::Ended;
        }
    }
}

impl Stops {
    fn new(request: &GenerateRequest, eos_ids: &[TokenId]) -> Self {
        let named = request.stop_token_ids.clone();
        let eos = if request.eos == Eos::Stops { eos_ids } else { &[] };
        let cut = if request.stop_text == StopText::Cut { named.as_slice() } else { &[] };
        Self { silent: [eos, cut].concat(), named }
    }
}

/// An answer is a text of its own; what goes on from other text keeps the space it begins with.
fn position(prompt: &Prompt) -> Position {
    match prompt {
        Prompt::Messages(conversation) if !conversation.is_begun() => Position::Beginning,
        Prompt::Messages(_) | Prompt::Text(_) | Prompt::Ids(_) => Position::AfterText,
    }
}
