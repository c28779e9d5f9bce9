//! The use cases against fake models behind real engines: scripted replies, rewards that are a checksum of the tokens.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod best_of_n;
mod fake;
mod generate;
mod lookup;
mod score;

use std::sync::Arc;

use super::{generate::GenerateRequest, *};
use crate::text::{
    ChatTemplate, Tokenizer,
    tokenizer::{Bos, Special, SpecialTokens},
};
use fake::{Fake, Gate};

/// The template of eurus-mini.
const TEMPLATE: &str = include_str!("../../../models/eurus-mini/policy/chat_template.jinja");
const EOS: TokenId = 2;

/// The tokenizer of eurus-mini, which leaves BOS to the template.
fn tokenizer(add_bos: Option<bool>) -> Arc<Tokenizer> {
    let json = include_str!("../../../models/eurus-mini/policy/tokenizer.json");
    let special =
        SpecialTokens { bos: Some("<s>".into()), eos: Some("</s>".into()), unk: Some("<unk>".into()), add_bos };
    Arc::new(Tokenizer::from_json(json, &special).unwrap())
}

/// Tokens of plain text.
fn ids(text: &str) -> Vec<TokenId> {
    tokenizer(None).encode(text, Special::Parse, Bos::Omit).unwrap()
}

/// How a test's models differ from small and ordinary ones.
#[derive(Clone)]
struct Setup {
    len_max: usize,
    running_max: usize,
    waiting_max: usize,
    /// What candidate `seed - 100` says, end of sequence included where it ends by itself.
    replies: Vec<Vec<TokenId>>,
    add_bos: Option<bool>,
    append_eos: bool,
    policy_gate: Gate,
    reward_gate: Gate,
    kinds: Vec<Kind>,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            len_max: 256,
            running_max: 16,
            waiting_max: 64,
            replies: Vec::new(),
            add_bos: None,
            append_eos: true,
            policy_gate: Gate::open(),
            reward_gate: Gate::open(),
            kinds: vec![Kind::Policy, Kind::Reward],
        }
    }
}

impl Setup {
    /// Candidates that say `texts` and end.
    fn saying(texts: &[&str]) -> Self {
        let reply = |text: &&str| [ids(text), vec![EOS]].concat();
        Self { replies: texts.iter().map(reply).collect(), ..Self::default() }
    }

    fn service(&self) -> Service {
        let metrics = Arc::new(Metrics::new().unwrap());
        let models = self.kinds.iter().map(|kind| self.model(*kind, &metrics)).collect();
        Service::new(models, ServiceLimits::default(), metrics).unwrap()
    }

    fn model(&self, kind: Kind, metrics: &Metrics) -> ServedModel {
        let (name, gate) = match kind {
            Kind::Policy => ("mini", &self.policy_gate),
            Kind::Reward => ("mini-rm", &self.reward_gate),
        };
        let fake = Fake::new(self.replies.clone(), gate.clone());
        ServedModel {
            name: name.into(),
            aliases: vec![format!("org/{name}")],
            kind,
            tokenizer: tokenizer(self.add_bos),
            template: Arc::new(ChatTemplate::from_source("mini-template", TEMPLATE).unwrap()),
            engine: fake.start(name, self, metrics),
            len_max: self.len_max,
            vocab_size: 320,
            append_eos: self.append_eos,
            eos_ids: vec![EOS],
            created: 0,
        }
    }
}

/// A request that draws from the scripts: text in, seed of the first script.
fn asking(prompt: &str) -> GenerateRequest {
    GenerateRequest { seed: Some(fake::FIRST_SEED), ..GenerateRequest::new(Prompt::Text(prompt.into())) }
}

/// Waits until an engine of `service` holds nothing; the engines run on threads of their own.
#[track_caller]
fn check_freed(service: &Service) {
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
    for model in service.models() {
        let status = model.engine.status();
        while status.running() + status.queued() + status.blocks_used() > 0 {
            assert!(std::time::Instant::now() < deadline, "{} still holds {status:?}", model.name);
            std::thread::yield_now();
        }
    }
}

/// The field and the message of a refusal.
#[track_caller]
fn refusal<T: std::fmt::Debug>(result: Result<T>) -> (String, String) {
    match result {
        Err(Error::Invalid { message, field: Some(field) }) => (field, message),
        other => panic!("not refused with a field: {other:?}"),
    }
}
