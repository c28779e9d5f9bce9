//! A service over models without weights: scripted replies, rewards that are a checksum of the tokens seen.

use std::{
    collections::HashMap,
    sync::{Arc, Condvar, Mutex},
};

use eurus::{
    engine::{
        BlockId, Chunk, Engine, Executor, Last, Limits, Outcome, Rows, StepOutput, StepPlan, TokenId, TokenLogProb,
        Want,
    },
    error::{Error, Result},
    metrics::Metrics,
    service::{Kind, ServedModel, Service, ServiceLimits},
    text::{
        ChatTemplate, Tokenizer,
        tokenizer::{Bos, Special, SpecialTokens},
    },
};

pub(super) const EOS: TokenId = 2;
/// Drawn with this seed, a sequence fails at its third token.
pub(super) const BROKEN_SEED: u64 = 666;
const BLOCK_SIZE: usize = 8;
const BLOCK_COUNT: usize = 256;
const LEN_MAX: usize = 256;

/// Steps an executor may still take.
#[derive(Clone)]
pub(super) struct Gate(Arc<(Mutex<u64>, Condvar)>);

impl Gate {
    pub(super) fn after(steps: u64) -> Self {
        Self(Arc::new((Mutex::new(steps), Condvar::new())))
    }

    pub(super) fn release(&self) {
        *self.0.0.lock().unwrap() = u64::MAX;
        self.0.1.notify_all();
    }

    fn pass(&self) {
        let mut steps = self.0.1.wait_while(self.0.0.lock().unwrap(), |steps| *steps == 0).unwrap();
        if *steps != u64::MAX {
            *steps -= 1;
        }
    }
}

/// What the models of a test do.
pub(super) struct Setup {
    /// What a candidate with this seed says before it ends; others never end by themselves.
    pub(super) replies: HashMap<u64, String>,
    pub(super) gate: Gate,
    pub(super) waiting_max: usize,
    pub(super) running_max: usize,
    /// The executor panics, which ends the engine.
    pub(super) panics: bool,
}

impl Default for Setup {
    fn default() -> Self {
        let gate = Gate::after(u64::MAX);
        Self { replies: HashMap::new(), gate, waiting_max: 64, running_max: 16, panics: false }
    }
}

impl Setup {
    pub(super) fn saying<const N: usize>(replies: [(u64, &str); N]) -> Self {
        let replies = replies.into_iter().map(|(seed, text)| (seed, text.to_string())).collect();
        Self { replies, ..Self::default() }
    }

    pub(super) fn service(&self) -> Arc<Service> {
        let metrics = Arc::new(Metrics::new().unwrap());
        let models =
            vec![self.model("org/mini", Kind::Policy, &metrics), self.model("org/mini-rm", Kind::Reward, &metrics)];
        Arc::new(Service::new(models, ServiceLimits::default(), metrics).unwrap())
    }

    fn model(&self, name: &str, kind: Kind, metrics: &Metrics) -> ServedModel {
        let limits =
            Limits { step_tokens: 64, running_max: self.running_max, waiting_max: self.waiting_max, len_max: LEN_MAX };
        let tokenizer = tokenizer();
        let replies = self.replies.iter().map(|(seed, text)| (*seed, [ids(text), vec![EOS]].concat())).collect();
        let slots = vec![0; BLOCK_COUNT * BLOCK_SIZE];
        let fake = Fake { slots, replies, gate: self.gate.clone(), panics: self.panics };
        let (engine, _) = Engine::start(name, limits, BLOCK_COUNT, BLOCK_SIZE, Box::new(fake), metrics).unwrap();
        let template = include_str!("../../../models/eurus-mini/policy/chat_template.jinja");
        ServedModel {
            name: name.into(),
            aliases: vec![name.trim_start_matches("org/").into()],
            kind,
            vocab_size: tokenizer.vocab_size(),
            tokenizer,
            template: Arc::new(ChatTemplate::from_source("mini-template", template).unwrap()),
            engine,
            len_max: LEN_MAX,
            append_eos: true,
            eos_ids: vec![EOS],
            created: 1_700_000_000,
        }
    }
}

pub(super) fn tokenizer() -> Arc<Tokenizer> {
    let json = include_str!("../../../models/eurus-mini/policy/tokenizer.json");
    let special = SpecialTokens {
        bos: Some("<s>".into()),
        eos: Some("</s>".into()),
        unk: Some("<unk>".into()),
        add_bos: Some(true),
    };
    Arc::new(Tokenizer::from_json(json, &special).unwrap())
}

/// Tokens of plain text.
pub(super) fn ids(text: &str) -> Vec<TokenId> {
    tokenizer().encode(text, Special::Parse, Bos::Omit).unwrap()
}

/// Log-probability of a token, from its id alone.
pub(super) fn logprob(token: TokenId) -> f32 {
    if token == 9 { f32::NEG_INFINITY } else { -((token % 16) as f32) / 8.0 }
}

/// Reward of a sequence: depends on every token and its place.
pub(super) fn reward(seen: &[TokenId]) -> f32 {
    let sum = seen.iter().fold(7_u64, |sum, token| (sum * 31 + u64::from(*token)) % 1_000_003);
    sum as f32 / 50_000.0 - 10.0
}

/// A number as the server writes it, with the digits of single precision.
pub(super) fn shown(number: f32) -> serde_json::Value {
    serde_json::from_str(&serde_json::to_string(&number).unwrap()).unwrap()
}

struct Fake {
    slots: Vec<TokenId>,
    replies: HashMap<u64, Vec<TokenId>>,
    gate: Gate,
    panics: bool,
}

impl Executor for Fake {
    fn execute(&mut self, plan: &StepPlan, meanwhile: &mut dyn FnMut()) -> Result<StepOutput> {
        meanwhile();
        self.gate.pass();
        assert!(!self.panics, "secret panic text");
        for chunk in &plan.chunks {
            for (offset, token) in chunk.tokens.iter().enumerate() {
                self.slots[slot(&chunk.blocks, chunk.start + offset)] = *token;
            }
        }
        Ok(StepOutput { outcomes: plan.chunks.iter().map(|chunk| self.outcome(chunk)).collect() })
    }
}

fn slot(blocks: &[BlockId], position: usize) -> usize {
    blocks[position / BLOCK_SIZE].0 as usize * BLOCK_SIZE + position % BLOCK_SIZE
}

impl Fake {
    fn outcome(&self, chunk: &Chunk) -> Outcome {
        let len = chunk.start + chunk.tokens.len();
        let seen: Vec<TokenId> = (0..len).map(|position| self.slots[slot(&chunk.blocks, position)]).collect();
        let (mut logprobs, mut scores) = (Vec::new(), Vec::new());
        match &chunk.rows {
            Rows::Nothing => {}
            Rows::LogProbs { targets, top } => logprobs = targets.iter().map(|token| row(*token, *top)).collect(),
            Rows::Scores => scores = (chunk.start..len).map(|end| reward(&seen[..=end])).collect(),
        }
        let last = match &chunk.want {
            Want::Nothing => Last::Nothing,
            Want::Score => Last::Score(reward(&seen)),
            Want::Token(draw) if draw.params.seed == BROKEN_SEED && draw.generated_count == 2 => {
                Last::Failed(Error::internal("/secret/path broke"))
            }
            Want::Token(draw) => {
                let script = self.replies.get(&draw.params.seed);
                let token = script.map_or_else(
                    || 40 + (draw.params.seed.wrapping_add(3 * draw.position as u64) % 40) as TokenId,
                    |script| script.get(draw.generated_count).copied().unwrap_or(EOS),
                );
                Last::Token(token, draw.params.logprobs.map(|top| row(token, top)))
            }
        };
        Outcome { logprobs, scores, last }
    }
}

fn row(token: TokenId, top: usize) -> TokenLogProb {
    TokenLogProb { token, logprob: logprob(token), top: (8..8 + top as TokenId).map(|id| (id, logprob(id))).collect() }
}
