//! Scoring: texts, conversations or ids in, raw rewards out, in the order of the inputs.

use std::{
    collections::VecDeque,
    sync::Arc,
    time::{Duration, Instant},
};

use serde_json::{Map, Value};
use tokio::sync::mpsc::{Receiver, channel};

use super::{
    Conversation, Ending, Message, ServedModel, Service, ServiceLimits, TokenId, Usage,
    prompt::{self, Prepared},
    validate,
};
use crate::{
    engine::request::{Event, Request, ScoreRows, Task},
    error::{Error, Result},
};

/// A scored sequence answers with at most three events.
const EVENTS_MAX: usize = 4;
/// How often a full engine is asked again: about one step of a small model.
const RETRY: Duration = Duration::from_millis(5);

/// One thing to score.
#[derive(Debug, Clone, PartialEq)]
pub enum ScoreInput {
    /// A conversation that ends with the assistant's turn, rendered by the reward model's template up to the end of that
    /// turn's text; whatever the template closes the turn with is left to `append_eos`.
    Messages(Vec<Message>),
    /// A conversation that asks, and the assistant's answer.
    PromptAndCompletion {
        /// The conversation before the answer; one user message for a plain prompt.
        prompt: Vec<Message>,
        /// The answer.
        completion: String,
    },
    /// Rendered text without BOS; special tokens in it are parsed.
    Text(String),
    /// Token ids, taken as they are.
    Ids(Vec<TokenId>),
}

/// Which rewards are returned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Returns {
    /// The one at the last token.
    #[default]
    Last,
    /// The one at every token.
    All,
}

/// What happens to an input longer than the context.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Truncate {
    /// It is refused.
    #[default]
    Error,
    /// The oldest tokens after BOS are dropped.
    Left,
    /// The end is dropped.
    Right,
}

/// What to score.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct ScoreRequest {
    /// A reward model; none means the first one served.
    pub model: Option<String>,
    /// What to score.
    pub inputs: Vec<ScoreInput>,
    /// Further variables of the template.
    pub kwargs: Map<String, Value>,
    /// Whether each sequence ends with end of sequence; none means what the checkpoint says. Never doubled.
    pub append_eos: Option<bool>,
    /// Which rewards are returned.
    pub returns: Returns,
    /// What happens to inputs that are too long.
    pub truncate: Truncate,
}

/// One reward.
#[derive(Debug, Clone, PartialEq)]
pub struct Reward {
    /// Which input.
    pub index: usize,
    /// Raw value of the head at the last token.
    pub reward: f32,
    /// Raw value at every token, where asked for.
    pub all: Option<Vec<f32>>,
    /// Tokens read.
    pub tokens: usize,
    /// The token at which the reward was read.
    pub last_token_id: TokenId,
    /// Whether tokens were dropped.
    pub truncated: bool,
}

/// The rewards of one request.
#[derive(Debug, Clone)]
pub struct Rewards {
    /// The reward model.
    pub model: Arc<ServedModel>,
    /// The chat template that rendered the inputs; none where all were rendered text or ids.
    pub template: Option<String>,
    /// In the order of the inputs.
    pub data: Vec<Reward>,
    /// Tokens of all inputs.
    pub usage: Usage,
}

impl Service {
    /// Scores all inputs of a request.
    ///
    /// # Errors
    /// Invalid naming the field; NotFound for an unknown model; Overloaded if the engine takes none of the inputs;
    /// Unavailable if it is gone.
    pub async fn score(&self, request: ScoreRequest) -> Result<Rewards> {
        let model = Arc::clone(self.reward_model(request.model.as_deref())?);
        let field = request.inputs.first().map_or("input", ScoreInput::field);
        validate::count_of(field, "inputs", request.inputs.len(), self.limits().score_batch_max)?;
        let returns = request.returns;
        let sequences = self.prepare_scores(&model, request).await?;
        let template = sequences.iter().find_map(|sequence| sequence.template.clone());
        let mut scoring = Scoring::new(Arc::clone(&model), returns, Duration::ZERO);
        for (index, sequence) in sequences.into_iter().enumerate() {
            scoring.submit(index, sequence).await?;
        }
        let (data, usage) = scoring.finish().await?;
        Ok(Rewards { model, template, data, usage })
    }

    /// Tokenises all inputs of `request`, away from the async threads.
    pub(super) async fn prepare_scores(
        &self,
        model: &Arc<ServedModel>,
        request: ScoreRequest,
    ) -> Result<Vec<ScoreSequence>> {
        let (model, limits) = (Arc::clone(model), self.limits().clone());
        self.off_thread(move || {
            let prepare = |(index, input)| prepare(&model, &limits, &request, index, input);
            request.inputs.iter().enumerate().map(prepare).collect()
        })
        .await
    }
}

impl ScoreInput {
    /// The request field that carries it: `messages`, `completions` or `input`.
    pub fn field(&self) -> &'static str {
        match self {
            Self::Messages(_) => "messages",
            Self::PromptAndCompletion { .. } => "completions",
            Self::Text(_) | Self::Ids(_) => "input",
        }
    }
}

/// One input as the reward model sees it.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct ScoreSequence {
    ids: Vec<TokenId>,
    truncated: bool,
    template: Option<String>,
}

fn prepare(
    model: &ServedModel,
    limits: &ServiceLimits,
    request: &ScoreRequest,
    index: usize,
    input: &ScoreInput,
) -> Result<ScoreSequence> {
    let field = input.field();
    let Prepared { mut ids, template, .. } = read(model, limits, &request.kwargs, input)?;
    if ids.is_empty() {
        return Err(Error::invalid(field, format!("{field}: number {index} is empty")));
    }
    let eos = if request.append_eos.unwrap_or(model.append_eos) { Some(eos(model)?) } else { None };
    let eos = eos.filter(|eos| ids.last() != Some(eos));
    let room = model.len_max - usize::from(eos.is_some()).min(model.len_max);
    let truncated = ids.len() > room;
    if truncated {
        let len = ids.len() + usize::from(eos.is_some());
        match request.truncate {
            Truncate::Error => {
                let message = format!(
                    "{field}: number {index} is {len} tokens long, but the context of this model holds {}; \
                     `truncate` can shorten it",
                    model.len_max
                );
                return Err(Error::invalid(field, message));
            }
            Truncate::Left => drop_oldest(&mut ids, room, model.tokenizer.bos()),
            Truncate::Right => ids.truncate(room),
        }
    }
    ids.extend(eos);
    Ok(ScoreSequence { ids, truncated, template })
}

/// Tokens of an input before end of sequence and truncation. A conversation is tokenised as one text, so that a token
/// across the border between question and answer is the one the model was trained on.
fn read(
    model: &ServedModel,
    limits: &ServiceLimits,
    kwargs: &Map<String, Value>,
    input: &ScoreInput,
) -> Result<Prepared> {
    let field = input.field();
    let render = |messages: Vec<Message>| {
        let conversation = Conversation { messages, ending: Ending::Answer, kwargs: kwargs.clone() };
        prompt::render(model, &conversation, limits, field)
    };
    match input {
        ScoreInput::Messages(messages) => render(messages.clone()),
        ScoreInput::PromptAndCompletion { prompt, completion } => {
            validate::count_of("prompt", "messages", prompt.len(), limits.messages_max)?;
            let answer = Message::new("assistant", completion.clone());
            render(prompt.iter().cloned().chain([answer]).collect())
        }
        ScoreInput::Text(text) => {
            prompt::bytes(field, text.len(), limits)?;
            if text.is_empty() {
                return Ok(Prepared { ids: Vec::new(), text: String::new(), template: None });
            }
            if model.tokenizer.adds_bos() && model.tokenizer.starts_with_bos(text) {
                let bos = model.tokenizer.bos_text().unwrap_or_default();
                let message = format!("{field}: rendered text begins with {bos}, which is added here; leave it out");
                return Err(Error::invalid(field, message));
            }
            Ok(Prepared { ids: prompt::encode(model, text, field)?, text: text.clone(), template: None })
        }
        ScoreInput::Ids(ids) => {
            prompt::bytes(field, ids.len(), limits)?;
            validate::ids(field, ids.iter().copied(), model.vocab_size)?;
            Ok(Prepared { ids: ids.clone(), text: String::new(), template: None })
        }
    }
}

fn eos(model: &ServedModel) -> Result<TokenId> {
    model
        .tokenizer
        .eos()
        .ok_or_else(|| Error::invalid("append_eos", format!("append_eos: {} has no end-of-sequence token", model.name)))
}

/// Keeps BOS, where there is one, and the newest tokens, `room` in all.
fn drop_oldest(ids: &mut Vec<TokenId>, room: usize, bos: Option<TokenId>) {
    let kept = usize::from(bos.is_some() && ids.first() == bos.as_ref()).min(room);
    let dropped = ids.len() - room;
    ids.drain(kept..kept + dropped);
}

/// Sequences that one reward model is reading.
pub(super) struct Scoring {
    model: Arc<ServedModel>,
    returns: Returns,
    /// How long a sequence may stand before an engine that others keep full.
    patience: Duration,
    waiting: VecDeque<Waiting>,
    done: Vec<Reward>,
    usage: Usage,
}

struct Waiting {
    events: Receiver<Event>,
    reward: Reward,
}

impl Scoring {
    /// Nothing submitted yet.
    pub(super) fn new(model: Arc<ServedModel>, returns: Returns, patience: Duration) -> Self {
        Self { model, returns, patience, waiting: VecDeque::new(), done: Vec::new(), usage: Usage::default() }
    }

    /// Submits one sequence. When the engine is full, waits for the oldest own one, so that a batch larger than the
    /// engine's queue passes; with none of its own under way, others fill the engine, and it is Overloaded once
    /// patience has run out.
    pub(super) async fn submit(&mut self, index: usize, sequence: ScoreSequence) -> Result<()> {
        let ScoreSequence { ids, truncated, .. } = sequence;
        let reward = Reward {
            index,
            reward: 0.0,
            all: None,
            tokens: ids.len(),
            last_token_id: ids.last().copied().unwrap_or_default(),
            truncated,
        };
        let rows = match self.returns {
            Returns::Last => ScoreRows::Last,
            Returns::All => ScoreRows::All,
        };
        let arrival = Instant::now();
        loop {
            let (reply, events) = channel(EVENTS_MAX);
            match self.model.engine.submit(Request { prompt: ids.clone(), task: Task::Score(rows), reply }) {
                Ok(()) => {
                    self.waiting.push_back(Waiting { events, reward });
                    return Ok(());
                }
                Err(Error::Overloaded(message)) => match self.waiting.pop_front() {
                    Some(oldest) => self.read(oldest).await?,
                    None if arrival.elapsed() < self.patience => tokio::time::sleep(RETRY).await,
                    None => return Err(Error::Overloaded(message)),
                },
                Err(error) => return Err(error),
            }
        }
    }

    /// All rewards by index, and the tokens they took.
    pub(super) async fn finish(mut self) -> Result<(Vec<Reward>, Usage)> {
        while let Some(oldest) = self.waiting.pop_front() {
            self.read(oldest).await?;
        }
        self.done.sort_unstable_by_key(|reward| reward.index);
        Ok((self.done, self.usage))
    }

    async fn read(&mut self, waiting: Waiting) -> Result<()> {
        let Waiting { mut events, mut reward } = waiting;
        let mut last = None;
        while let Some(event) = events.recv().await {
            match event {
                Event::Scores(all) => reward.all = Some(all),
                Event::Score(value) => last = Some(value),
                Event::Failed(error) => return Err(error),
                Event::Done(_, usage) => {
                    reward.reward = last.filter(|value| value.is_finite()).ok_or_else(no_reward)?;
                    self.usage.prompt_tokens += usage.prompt_tokens;
                    self.usage.cached_tokens += usage.cached_tokens;
                    self.done.push(reward);
                    return Ok(());
                }
                Event::Prompt(_) | Event::Token { .. } => return Err(no_reward()),
            }
        }
        Err(Error::Unavailable("the engine stopped before all rewards were read".into()))
    }
}

fn no_reward() -> Error {
    Error::internal("the reward head gave no finite number")
}
