//! A model made of a hash chain, and what it answers to a request run alone. The same few functions work on cache slots,
//! found through block tables, and on plain vectors.

use eurus::engine::{
    Chunk, Draw, Event, Executor, Finish, Last, Outcome, Rows, ScoreRows, StepOutput, StepPlan, Task, TokenId,
    TokenLogProb, Usage, Want,
};
use eurus::error::{Error, Result};

/// splitmix64 (Steele, Lea, Flood 2014).
pub(super) fn mix(mut x: u64) -> u64 {
    x = x.wrapping_add(0x9E37_79B9_7F4A_7C15);
    x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

/// What the cache holds at `position`: depends on everything before it through `previous`.
fn cached_value(previous: u64, position: usize, token: TokenId) -> u64 {
    mix(previous ^ mix(((position as u64) << 32) | u64::from(token)))
}

fn number(bits: u64) -> f32 {
    (bits >> 40) as f32
}

fn logprob(value: u64, token: TokenId, top: usize) -> TokenLogProb {
    let alternative = |rank: usize| (rank as TokenId, number(mix(value ^ rank as u64)));
    TokenLogProb {
        token,
        logprob: number(mix(value ^ (1 << 40) ^ u64::from(token))),
        top: (0..top).map(alternative).collect(),
    }
}

/// `seen` sums the cache over all positions, as attention looks at all of them.
fn draw_token(seen: u64, draw: &Draw, vocab: TokenId) -> TokenId {
    let history = draw
        .history
        .iter()
        .fold(draw.history.len() as u64 * draw.prompt_len as u64, |sum, &token| mix(sum ^ u64::from(token)));
    let bits = mix(seen ^ mix(draw.params.seed ^ mix(draw.position as u64)) ^ history);
    let token = (bits % u64::from(vocab)) as TokenId;
    let stops = draw.generated_count < draw.params.min_tokens && draw.params.stop_token_ids.contains(&token);
    if stops { (token + 1) % vocab } else { token }
}

#[derive(Clone, Copy)]
pub(super) struct Slot {
    pub(super) value: u64,
    pub(super) token: TokenId,
    /// The step that wrote it.
    step: u64,
}

const GARBAGE: Slot = Slot { value: 0xDEAD, token: TokenId::MAX, step: 0 };

/// Computes through block tables, into slots that outlive their owners as memory does.
pub(super) struct FakeModel {
    pub(super) slots: Vec<Slot>,
    pub(super) block_size: usize,
    pub(super) vocab: TokenId,
    step: u64,
    /// The next step fails, its slots in disarray.
    pub(super) fail_step: bool,
    /// This chunk of the next step fails alone.
    pub(super) fail_chunk: Option<usize>,
}

impl FakeModel {
    pub(super) fn new(block_count: usize, block_size: usize, vocab: TokenId) -> Self {
        let slots = vec![GARBAGE; block_count * block_size];
        Self { slots, block_size, vocab, step: 0, fail_step: false, fail_chunk: None }
    }

    fn slot(&mut self, chunk: &Chunk, position: usize) -> &mut Slot {
        let block = chunk.blocks[position / self.block_size].0 as usize;
        &mut self.slots[block * self.block_size + position % self.block_size]
    }

    fn write(&mut self, chunk: &Chunk) {
        let mut previous = if chunk.start == 0 { 0 } else { self.slot(chunk, chunk.start - 1).value };
        for (position, &token) in (chunk.start..).zip(&chunk.tokens) {
            previous = cached_value(previous, position, token);
            let step = self.step;
            let written = if self.fail_step { GARBAGE } else { Slot { value: previous, token, step } };
            let before = std::mem::replace(self.slot(chunk, position), written);
            assert_ne!(before.step, step, "two chunks of a step write position {position} of {:?}", chunk.id);
        }
    }

    fn read(&mut self, chunk: &Chunk) -> Outcome {
        let end = chunk.start + chunk.tokens.len();
        let mut seen = 0u64;
        let mut rows = Vec::new();
        for position in 0..end {
            let value = self.slot(chunk, position).value;
            seen = seen.wrapping_add(value);
            if position >= chunk.start && chunk.rows != Rows::Nothing {
                rows.push(value);
            }
        }
        let last = match &chunk.want {
            Want::Nothing => Last::Nothing,
            Want::Score => Last::Score(number(seen)),
            Want::Token(draw) => {
                let token = draw_token(seen, draw, self.vocab);
                Last::Token(token, draw.params.logprobs.map(|top| logprob(seen, token, top)))
            }
        };
        let (mut logprobs, mut scores) = (Vec::new(), Vec::new());
        match &chunk.rows {
            Rows::Nothing => {}
            Rows::Scores => scores = rows.into_iter().map(number).collect(),
            Rows::LogProbs { targets, top } => {
                logprobs = rows.into_iter().zip(targets).map(|(value, &target)| logprob(value, target, *top)).collect();
            }
        }
        Outcome { logprobs, scores, last }
    }
}

impl Executor for FakeModel {
    fn execute(&mut self, plan: &StepPlan, meanwhile: &mut dyn FnMut()) -> Result<StepOutput> {
        meanwhile();
        self.step += 1;
        for chunk in &plan.chunks {
            self.write(chunk);
        }
        if std::mem::take(&mut self.fail_step) {
            return Err(Error::internal("injected"));
        }
        let mut outcomes: Vec<_> = plan.chunks.iter().map(|chunk| self.read(chunk)).collect();
        if let Some(index) = self.fail_chunk.take() {
            outcomes[index] =
                Outcome { logprobs: Vec::new(), scores: Vec::new(), last: Last::Failed(Error::internal("injected")) };
        }
        Ok(StepOutput { outcomes })
    }
}

/// All events of a request run alone, without a scheduler.
pub(super) fn oracle(prompt: &[TokenId], task: &Task, vocab: TokenId) -> Vec<Event> {
    let mut tokens = prompt.to_vec();
    let mut events = Vec::new();
    let values = prompt.iter().enumerate().scan(0, |previous, (position, &token)| {
        *previous = cached_value(*previous, position, token);
        Some(*previous)
    });
    let values: Vec<u64> = values.collect();
    let mut previous = values[prompt.len() - 1];
    let mut seen = values.iter().fold(0u64, |sum, value| sum.wrapping_add(*value));
    let done = |finish, tokens: &[TokenId]| {
        let completion_tokens = tokens.len() - prompt.len();
        Event::Done(finish, Usage { prompt_tokens: prompt.len(), cached_tokens: 0, completion_tokens })
    };
    let params = match task {
        Task::Generate(params) => params,
        Task::Score(rows) => {
            if *rows == ScoreRows::All {
                events.push(Event::Scores(values.into_iter().map(number).collect()));
            }
            events.extend([Event::Score(number(seen)), done(Finish::Scored, &tokens)]);
            return events;
        }
    };
    if let Some(top) = params.prompt_logprobs {
        events.push(Event::Prompt(
            values.iter().zip(&prompt[1..]).map(|(&value, &token)| logprob(value, token, top)).collect(),
        ));
    }
    for generated_count in 0..params.max_tokens {
        let history = if params.needs_history() { tokens.clone() } else { Vec::new() };
        let draw =
            Draw { params: params.clone(), position: tokens.len(), generated_count, history, prompt_len: prompt.len() };
        let id = draw_token(seen, &draw, vocab);
        events.push(Event::Token { id, logprob: params.logprobs.map(|top| logprob(seen, id, top)) });
        previous = cached_value(previous, tokens.len(), id);
        seen = seen.wrapping_add(previous);
        tokens.push(id);
        if params.stop_token_ids.contains(&id) && generated_count >= params.min_tokens {
            events.push(done(Finish::Stop(id), &tokens));
            return events;
        }
    }
    events.push(done(Finish::Length, &tokens));
    events
}
