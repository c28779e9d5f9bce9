//! The miniature models that are part of the program, so that it runs without a download.

use super::facts::{self, TokenizerFacts};
use super::safetensors::TensorFile;
use super::shards::{SINGLE, Shards};
use super::{CONFIG, Checkpoint, Files, GENERATION_CONFIG, OpenedTokenizer, TOKENIZER_JSON, Tensors};
use crate::error::Result;
use crate::model::config::ModelConfig;

/// A built-in model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BuiltIn {
    /// Solves small sums step by step.
    MiniPolicy,
    /// Tells right solutions from wrong ones.
    MiniReward,
}

struct BuiltInFiles {
    config: &'static str,
    generation_config: Option<&'static str>,
    tokenizer: &'static str,
    tokenizer_config: &'static str,
    template: &'static str,
    tensors: &'static [u8],
}

const POLICY: BuiltInFiles = BuiltInFiles {
    config: include_str!("../../models/eurus-mini/policy/config.json"),
    generation_config: Some(include_str!("../../models/eurus-mini/policy/generation_config.json")),
    tokenizer: include_str!("../../models/eurus-mini/policy/tokenizer.json"),
    tokenizer_config: include_str!("../../models/eurus-mini/policy/tokenizer_config.json"),
    template: include_str!("../../models/eurus-mini/policy/chat_template.jinja"),
    tensors: include_bytes!("../../models/eurus-mini/policy/model.safetensors"),
};

const REWARD: BuiltInFiles = BuiltInFiles {
    config: include_str!("../../models/eurus-mini/reward/config.json"),
    generation_config: None,
    tokenizer: include_str!("../../models/eurus-mini/reward/tokenizer.json"),
    tokenizer_config: include_str!("../../models/eurus-mini/reward/tokenizer_config.json"),
    template: include_str!("../../models/eurus-mini/reward/chat_template.jinja"),
    tensors: include_bytes!("../../models/eurus-mini/reward/model.safetensors"),
};

impl BuiltIn {
    /// All there are.
    pub const ALL: [Self; 2] = [Self::MiniPolicy, Self::MiniReward];

    /// The name users give.
    pub fn name(&self) -> &'static str {
        match self {
            Self::MiniPolicy => "eurus-mini/policy",
            Self::MiniReward => "eurus-mini/reward",
        }
    }

    /// The model of that name, if there is one.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|built_in| built_in.name() == name)
    }

    /// Opens it like any other checkpoint.
    pub(super) fn open(self) -> Result<Checkpoint> {
        let files = self.files();
        let config = ModelConfig::parse(files.config, files.generation_config)?;
        let facts = TokenizerFacts::parse(Some(files.tokenizer_config), None, Some(files.template.to_owned()))?;
        let tokenizer = OpenedTokenizer { json: files.tokenizer.to_owned(), facts };
        let shards = Shards::of(vec![TensorFile::embedded(SINGLE, files.tensors)?])?;
        Ok(Checkpoint::assemble(
            self.name().to_owned(),
            config,
            tokenizer,
            Tensors::Safetensors(shards),
            Files::BuiltIn(self),
        ))
    }

    fn files(self) -> &'static BuiltInFiles {
        match self {
            Self::MiniPolicy => &POLICY,
            Self::MiniReward => &REWARD,
        }
    }

    /// The small file `name`, where it has one.
    pub(super) fn file(self, name: &str) -> Option<&'static str> {
        let files = self.files();
        match name {
            CONFIG => Some(files.config),
            GENERATION_CONFIG => files.generation_config,
            TOKENIZER_JSON => Some(files.tokenizer),
            facts::CONFIG => Some(files.tokenizer_config),
            facts::TEMPLATE => Some(files.template),
            _ => None,
        }
    }
}
