//! Best of n: candidates are drawn, scored as they finish while others still generate, and the best are chosen.

use std::{sync::Arc, time::Duration};

use super::{
    Kind, Message, Prompt, ServedModel, Service, Usage,
    generate::GenerateRequest,
    generation::Generation,
    score::{Returns, Reward, ScoreInput, ScoreRequest, Scoring, Truncate},
    select::{Rated, rank},
    updates::{Candidate, Collector, TokenInfo, total_usage},
    validate,
};
use crate::{
    error::{Error, Result},
    text::answer::{Answer, Extractor},
};

/// How the best candidates are chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Strategy {
    /// Highest reward.
    Reward,
    /// Highest mean token log-probability.
    LogProb,
    /// Most frequent final answer.
    Majority,
    /// Final answer with the largest sum of sigmoid(reward).
    Weighted,
}

impl Strategy {
    /// `"reward"`, `"logprob"`, `"majority"` or `"weighted"`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Reward => "reward",
            Self::LogProb => "logprob",
            Self::Majority => "majority",
            Self::Weighted => "weighted",
        }
    }
}

/// Where the final answer of a candidate stands.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum AnswerRule {
    /// In the last `\boxed{..}`.
    #[default]
    Boxed,
    /// The last number.
    LastNumber,
    /// The first group (or the whole) of the last match of this regular expression.
    Regex(String),
}

/// What to generate and how to choose.
#[derive(Debug, Clone, PartialEq)]
pub struct BestOfRequest {
    /// The candidates; its `n` says how many are returned.
    pub generate: GenerateRequest,
    /// How many are drawn; more than `n`.
    pub best_of: usize,
    /// None: by reward where a reward model is served, else by log-probability.
    pub strategy: Option<Strategy>,
    /// A reward model; none means the first one served.
    pub reward_model: Option<String>,
    /// Where final answers stand.
    pub answer: AnswerRule,
}

/// A candidate and what is known about it.
#[derive(Debug, Clone, PartialEq)]
pub struct RatedCandidate {
    /// The candidate; its `mean_logprob` is always there.
    pub candidate: Candidate,
    /// Its raw reward, where a reward model took part.
    pub reward: Option<f32>,
    /// Whether the reward model saw only the newest tokens because its context is shorter.
    pub reward_truncated: bool,
    /// Its final answer, as written.
    pub answer: Option<String>,
    /// Its place, 0 is best.
    pub rank: usize,
}

/// The outcome of a best-of-n request.
#[derive(Debug, Clone)]
pub struct BestOfN {
    /// The policy.
    pub model: Arc<ServedModel>,
    /// The reward model, where one took part.
    pub reward_model: Option<Arc<ServedModel>>,
    /// The strategy used.
    pub strategy: Strategy,
    /// The seed of candidate 0.
    pub seed: u64,
    /// The policy's chat template; none for text and ids.
    pub template: Option<String>,
    /// Every token of the prompt where `prompt_logprobs` was asked for, else empty.
    pub prompt: Vec<TokenInfo>,
    /// The prompt as text.
    pub prompt_text: String,
    /// Indices of the `n` best candidates, best first.
    pub chosen: Vec<usize>,
    /// All candidates, by index.
    pub candidates: Vec<RatedCandidate>,
    /// Tokens of the policy, the prompt counted once.
    pub usage: Usage,
    /// Tokens of the reward model.
    pub reward_usage: Option<Usage>,
}

impl BestOfRequest {
    /// The best `generate.n` of `best_of` candidates, by the default strategy.
    pub fn new(generate: GenerateRequest, best_of: usize) -> Self {
        Self { generate, best_of, strategy: None, reward_model: None, answer: AnswerRule::Boxed }
    }
}

impl Service {
    /// Draws `best_of` candidates and chooses the `n` best; [`rank`] has the rule.
    ///
    /// The reward model reads the conversation with the candidate as the assistant's turn, rendered by its own template;
    /// for a prompt of text or ids it reads prompt and candidate as one rendered text. Where that is longer than its
    /// context, it reads the newest tokens and the candidate is marked. Without a reward model in use, none is asked:
    /// LogProb asks one only where the request names it, Majority asks one wherever there is one.
    ///
    /// # Errors
    /// As [`Service::generate`] and [`Service::score`].
    pub async fn best_of_n(&self, request: BestOfRequest) -> Result<BestOfN> {
        let plan = self.plan(&request)?;
        let returned = request.generate.n;
        let told = request.generate.logprobs.is_some();
        let generate = GenerateRequest {
            n: request.best_of,
            logprobs: Some(request.generate.logprobs.unwrap_or(0)),
            ..request.generate
        };
        let question = Question::new(&generate.prompt);
        let generation = self.start(generate).await?;
        let outcome = BestOfN {
            model: Arc::clone(generation.model()),
            reward_model: plan.reward_model.clone(),
            strategy: plan.strategy,
            seed: generation.seed(),
            template: generation.template().map(str::to_string),
            prompt: Vec::new(),
            prompt_text: generation.prompt_text().to_string(),
            chosen: Vec::new(),
            candidates: Vec::new(),
            usage: Usage::default(),
            reward_usage: None,
        };
        let drawn = self.draw(generation, &plan, &question).await?;
        let outcome = choose(outcome, drawn, &plan, returned);
        self.count(&outcome);
        Ok(if told { outcome } else { without_logprobs(outcome) })
    }

    /// Everything that can be decided, or refused, before a token is drawn.
    fn plan(&self, request: &BestOfRequest) -> Result<Plan> {
        let (n, best_of) = (request.generate.n, request.best_of);
        validate::count("n", n, self.limits().n_max)?;
        validate::count("best_of", best_of, self.limits().best_of_max)?;
        if best_of <= n {
            let message = format!("best_of is {best_of}, but must be more than n, which is {n}");
            return Err(Error::invalid("best_of", message));
        }
        if request.generate.max_tokens == Some(0) {
            return Err(Error::invalid("max_tokens", "max_tokens must be at least 1 with best_of"));
        }
        let served = self.models().iter().any(|model| model.kind == Kind::Reward);
        let strategy = request.strategy.unwrap_or(if served { Strategy::Reward } else { Strategy::LogProb });
        let named = request.reward_model.is_some();
        let asked = match strategy {
            Strategy::Reward | Strategy::Weighted => true,
            Strategy::Majority => served || named,
            Strategy::LogProb => named,
        };
        let reward_model = if asked { Some(Arc::clone(self.reranker(request, strategy)?)) } else { None };
        Ok(Plan { strategy, reward_model, extractor: request.answer.extractor()? })
    }

    fn reranker(&self, request: &BestOfRequest, strategy: Strategy) -> Result<&Arc<ServedModel>> {
        let name = request.reward_model.as_deref();
        self.of_kind(Kind::Reward, name, "rerank.model").map_err(|error| match (error, name) {
            (Error::Invalid { message, .. }, None) => {
                let message = format!("strategy {} needs a reward model; {message}", strategy.as_str());
                Error::invalid("rerank.strategy", message)
            }
            (error, _) => error,
        })
    }

    /// Reads all candidates, and hands each to the reward model once it has ended, while others go on.
    async fn draw(&self, mut generation: Generation, plan: &Plan, question: &Question) -> Result<Drawn> {
        let mut collector = Collector::new(generation.count(), generation.seed());
        let mut candidates: Vec<Candidate> = Vec::with_capacity(generation.count());
        let mut scoring = plan.reward_model.clone().map(|model| Scoring::new(model, Returns::Last, PATIENCE));
        while let Some(update) = generation.next().await {
            let Some(candidate) = collector.take(update?) else { continue };
            if let (Some(scoring), Some(model)) = (&mut scoring, &plan.reward_model) {
                let request = ScoreRequest {
                    inputs: vec![question.answered(generation.prompt_text(), model, &candidate.text)],
                    kwargs: Default::default(),
                    truncate: Truncate::Left,
                    ..ScoreRequest::default()
                };
                for sequence in self.prepare_scores(model, request).await? {
                    scoring.submit(candidate.index, sequence).await?;
                }
            }
            candidates.push(candidate);
        }
        candidates.sort_unstable_by_key(|candidate| candidate.index);
        let (rewards, reward_usage) = match scoring {
            None => (Vec::new(), None),
            Some(scoring) => {
                let (rewards, usage) = scoring.finish().await?;
                (rewards, Some(usage))
            }
        };
        Ok(Drawn { prompt: collector.into_prompt(), candidates, rewards, reward_usage })
    }

    fn count(&self, outcome: &BestOfN) {
        let chosen = outcome.chosen.len() as u64;
        let rejected = outcome.candidates.len() as u64 - chosen;
        for (label, count) in [("chosen", chosen), ("rejected", rejected)] {
            self.metrics().candidates_total.with_label_values(&[label]).inc_by(count);
        }
    }
}

impl AnswerRule {
    fn extractor(&self) -> Result<Extractor> {
        Ok(match self {
            Self::Boxed => Extractor::Boxed,
            Self::LastNumber => Extractor::LastNumber,
            Self::Regex(pattern) => {
                Extractor::regex(pattern).map_err(|error| Error::invalid("rerank.answer", error.to_string()))?
            }
        })
    }
}

/// How long a finished candidate waits for a reward model that others keep full: drawing it again would cost more.
const PATIENCE: Duration = Duration::from_secs(10);
/// How a request will be decided.
struct Plan {
    strategy: Strategy,
    reward_model: Option<Arc<ServedModel>>,
    extractor: Extractor,
}

/// What the candidates answer, as far as the reward model must see it.
enum Question {
    /// Turns before the candidate's.
    Conversation(Vec<Message>),
    /// Turns, the last of which the candidate goes on writing.
    Begun(Vec<Message>),
    /// Text that the candidate goes on writing.
    Text,
}

impl Question {
    fn new(prompt: &Prompt) -> Self {
        match prompt {
            Prompt::Messages(conversation) if conversation.is_begun() => Self::Begun(conversation.messages.clone()),
            Prompt::Messages(conversation) => Self::Conversation(conversation.messages.clone()),
            Prompt::Text(_) | Prompt::Ids(_) => Self::Text,
        }
    }

    fn answered(&self, prompt_text: &str, model: &ServedModel, answer: &str) -> ScoreInput {
        match self {
            Self::Conversation(messages) => {
                ScoreInput::PromptAndCompletion { prompt: messages.clone(), completion: answer.to_string() }
            }
            Self::Begun(messages) => {
                let mut messages = messages.clone();
                if let Some(last) = messages.last_mut() {
                    last.content.push_str(answer);
                }
                ScoreInput::Messages(messages)
            }
            Self::Text => {
                // Ids decode to text with BOS in it; the reward model gets its own.
                let bos = model.tokenizer.bos_text().filter(|_| model.tokenizer.adds_bos());
                let bare = bos.and_then(|bos| prompt_text.strip_prefix(bos)).unwrap_or(prompt_text);
                ScoreInput::Text(format!("{bare}{answer}"))
            }
        }
    }
}

/// Everything that was drawn and read, by index.
struct Drawn {
    prompt: Vec<TokenInfo>,
    candidates: Vec<Candidate>,
    rewards: Vec<Reward>,
    reward_usage: Option<Usage>,
}

fn choose(mut outcome: BestOfN, drawn: Drawn, plan: &Plan, returned: usize) -> BestOfN {
    let Drawn { prompt, candidates, rewards, reward_usage } = drawn;
    let answers: Vec<Option<Answer>> =
        candidates.iter().map(|candidate| plan.extractor.extract(&candidate.text)).collect();
    let classes = classes(&answers);
    let reward = |index| rewards.iter().find(|reward| reward.index == index);
    let rated: Vec<Rated> = candidates
        .iter()
        .zip(classes)
        .map(|(candidate, answer)| Rated {
            reward: reward(candidate.index).map(|reward| reward.reward),
            mean_logprob: candidate.mean_logprob,
            answer,
        })
        .collect();
    let order = rank(plan.strategy, &rated);
    outcome.usage = total_usage(&candidates);
    outcome.reward_usage = reward_usage;
    outcome.prompt = prompt;
    outcome.candidates = candidates
        .into_iter()
        .zip(answers)
        .map(|(candidate, answer)| RatedCandidate {
            rank: order.iter().position(|&index| index == candidate.index).unwrap_or(order.len()),
            reward: rated[candidate.index].reward,
            reward_truncated: reward(candidate.index).is_some_and(|reward| reward.truncated),
            answer: answer.map(|answer| answer.text().to_string()),
            candidate,
        })
        .collect();
    outcome.chosen = order;
    outcome.chosen.truncate(returned);
    outcome
}

/// Numbers equal answers alike: each gets the index of the first answer it equals.
fn classes(answers: &[Option<Answer>]) -> Vec<Option<usize>> {
    let first = |answer: &Answer| answers.iter().flatten().position(|earlier| earlier.same(answer));
    answers.iter().map(|answer| answer.as_ref().and_then(first)).collect()
}

/// The choice needed log-probabilities; a request that did not ask for them gets none.
fn without_logprobs(mut outcome: BestOfN) -> BestOfN {
    for rated in &mut outcome.candidates {
        rated.candidate.logprobs = Vec::new();
    }
    outcome
}
