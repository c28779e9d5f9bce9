//! Tests of written models: what was written is what opens, for every kind, type and size of file.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use candle_core::Device;

use super::*;
use crate::checkpoint::{self, HubOptions, Source};
use crate::train::data::DataFile;
use crate::train::recipe::{Recipe, Stage};

fn open(name: &str) -> Checkpoint {
    checkpoint::open(&Source::parse(name).unwrap(), &HubOptions::default(), &mut |_| {}).unwrap()
}

fn recipe(stage: Stage) -> Recipe {
    let text = "model.from = \"org/ba|se\"\nrun.output = \"out/my`model\"\ndata.source = [{ path = \"d\" }]\n";
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), text).unwrap();
    Recipe::load(stage, file.path(), &[]).unwrap()
}

/// Random tensors of the shapes that `config` asks for.
fn tensors(config: &ModelConfig) -> HashMap<String, Tensor> {
    let random = |shape: Vec<usize>| Tensor::randn(0f32, 1.0, shape, &Device::Cpu).unwrap();
    config.weight_shapes().into_iter().map(|(name, shape)| (name, random(shape))).collect()
}

/// A reward model in the shape of `config`, which is a policy's.
fn reward_tensors(config: &ModelConfig) -> HashMap<String, Tensor> {
    let mut tensors = tensors(config);
    tensors.remove("lm_head.weight");
    let head = Tensor::randn(0f32, 1.0, (1, config.hidden), &Device::Cpu).unwrap();
    tensors.insert("regression_head.weight".to_owned(), head);
    tensors
}

struct Case {
    source: Checkpoint,
    head: HeadKind,
    tensors: HashMap<String, Tensor>,
    dtype: Option<SaveDtype>,
    max_shard_bytes: u64,
}

impl Case {
    fn policy(source: &str) -> Self {
        let source = open(source);
        let tensors = tensors(&source.config);
        Self { source, head: HeadKind::Language, tensors, dtype: None, max_shard_bytes: 5_000_000_000 }
    }

    fn reward(source: &str) -> Self {
        let source = open(source);
        let tensors = reward_tensors(&source.config);
        Self { source, head: HeadKind::Reward, tensors, dtype: None, max_shard_bytes: 5_000_000_000 }
    }

    fn export(&self, folder: &Path) -> Result<()> {
        let recipe = recipe(if self.head == HeadKind::Reward { Stage::Reward } else { Stage::Sft });
        let files = [DataFile { path: "a|b.jsonl".into(), blake3: "00ff".into(), rows: 7 }];
        let metrics = [("eval/loss".to_owned(), 0.25)];
        let card = Card { recipe: &recipe, files: &files, steps: 3, metrics: &metrics };
        let parts = Export {
            source: &self.source,
            head: self.head,
            append_eos: (self.head == HeadKind::Reward).then_some(true),
            tensors: &self.tensors,
            dtype: self.dtype,
            max_shard_bytes: self.max_shard_bytes,
            chat_template: None,
            card: &card,
        };
        export(folder, &parts)
    }

    /// Writes and opens it, and compares every tensor bit for bit in the type it was written in.
    #[track_caller]
    fn check(&self) -> (tempfile::TempDir, Checkpoint) {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("model");
        self.export(&folder).unwrap();
        let opened = open(folder.to_str().unwrap());
        let dtype = self.dtype.unwrap_or_else(|| SaveDtype::of(&self.source)).dtype();
        let mut weights = opened.load_weights(&Device::Cpu, &mut |_| {}).unwrap();
        for (name, tensor) in &self.tensors {
            let found = weights.take(name, tensor.dims()).unwrap();
            assert_eq!(found.dtype(), dtype, "{name}");
            let bits = |tensor: &Tensor| {
                let tensor = tensor.to_dtype(dtype).unwrap().to_dtype(DType::F32).unwrap();
                tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap()
            };
            assert_eq!(bits(&found), bits(tensor), "{name}");
        }
        weights.finish().unwrap();
        assert_eq!((opened.config.head, opened.config.dtype), (self.head, Some(dtype)));
        assert_eq!(opened.tokenizer_json, self.source.tokenizer_json);
        assert_eq!(opened.tokenizer_config, self.source.tokenizer_config);
        (root, opened)
    }
}

fn listed(root: &tempfile::TempDir) -> Vec<String> {
    folder::names(&root.path().join("model")).unwrap()
}

#[test]
fn policies_open_as_they_were_written_in_every_type() {
    for dtype in [None, Some(SaveDtype::F32), Some(SaveDtype::Bf16), Some(SaveDtype::F16)] {
        let case = Case { dtype, ..Case::policy("eurus-mini/policy") };
        let (_root, opened) = case.check();
        assert_eq!(opened.config, ModelConfig { dtype: opened.config.dtype, ..case.source.config.clone() });
    }
    // Stored as bf16, with an untied head.
    let (_root, opened) = Case::policy("tests/fixtures/serve/mistral-bf16").check();
    assert_eq!(opened.config.dtype, Some(DType::BF16));
}

#[test]
fn the_files_of_the_tokenizer_are_copied_as_they_were_and_tokenizer_json_is_always_there() {
    let (root, opened) = Case::policy("tests/fixtures/serve/mistral-window").check();
    let converted = fs::read_to_string(root.path().join("model").join(TOKENIZER)).unwrap();
    assert_eq!(converted, opened.tokenizer_json);
    for name in TOKENIZER_FILES.into_iter().filter(|name| *name != TOKENIZER) {
        let original = fs::read(Path::new("tests/fixtures/serve/mistral-window").join(name)).ok();
        assert_eq!(fs::read(root.path().join("model").join(name)).ok(), original, "{name}");
    }
    assert!(listed(&root).contains(&"tokenizer.model".to_owned()));
}

#[test]
fn a_reward_model_comes_out_of_a_policy_or_of_another() {
    for source in ["eurus-mini/policy", "eurus-mini/reward", "tests/fixtures/serve/mistral-window"] {
        let (root, opened) = Case::reward(source).check();
        assert!(opened.config.append_eos, "{source}");
        assert_eq!(opened.config.head_tensor, Some("regression_head.weight"));
        assert!(!listed(&root).contains(&GENERATION_CONFIG.to_owned()));
    }
}

#[test]
fn large_models_have_several_files_and_an_index() {
    let (root, _) = Case { max_shard_bytes: 1_000_000, ..Case::policy("eurus-mini/policy") }.check();
    let files: Vec<String> = listed(&root).into_iter().filter(|name| name.ends_with(".safetensors")).collect();
    assert!(files.len() >= 5 && files[0] == format!("model-00001-of-{:05}.safetensors", files.len()), "{files:?}");
    let folder = root.path().join("model");
    assert!(files.iter().all(|name| folder.join(name).metadata().unwrap().len() < 1_010_000));
    let index: Value = serde_json::from_slice(&fs::read(folder.join(INDEX)).unwrap()).unwrap();
    let config = open("eurus-mini/policy").config;
    assert_eq!(index["metadata"]["total_size"], 4 * config.parameter_count());
    assert_eq!(index["weight_map"].as_object().unwrap().len(), config.weight_shapes().len());
}

#[test]
fn a_policy_without_generation_config_gets_its_end_tokens() {
    let mut case = Case::policy("eurus-mini/policy");
    let folder = tempfile::tempdir().unwrap();
    case.export(&folder.path().join("a")).unwrap();
    fs::remove_file(folder.path().join("a").join(GENERATION_CONFIG)).unwrap();
    case.source = open(folder.path().join("a").to_str().unwrap());
    let (root, opened) = case.check();
    assert!(listed(&root).contains(&GENERATION_CONFIG.to_owned()));
    assert_eq!(opened.config.eos, [2]);
}

#[test]
fn tensors_that_do_not_fit_are_named_and_nothing_changes() {
    let root = tempfile::tempdir().unwrap();
    let folder = root.path().join("model");
    let mut case = Case::policy("eurus-mini/policy");
    case.export(&folder).unwrap();
    let before = fs::read(folder.join(SINGLE)).unwrap();
    case.tensors.remove("model.norm.weight").unwrap();
    case.tensors.insert("extra".to_owned(), Tensor::zeros(1, DType::F32, &Device::Cpu).unwrap());
    let message = case.export(&folder).unwrap_err().to_string();
    assert!(message.contains("model.norm.weight") && message.contains("extra"), "{message}");
    assert_eq!(fs::read(folder.join(SINGLE)).unwrap(), before);
    let mut policy_of_reward = Case::reward("eurus-mini/reward");
    policy_of_reward.head = HeadKind::Language;
    assert!(matches!(policy_of_reward.export(&folder), Err(Error::Unsupported(_))));
}

#[test]
fn a_model_is_replaced_and_given_back_after_a_crash_in_between() {
    let root = tempfile::tempdir().unwrap();
    let folder = root.path().join("model");
    let case = Case::policy("eurus-mini/policy");
    case.export(&folder).unwrap();
    Case { dtype: Some(SaveDtype::Bf16), ..case }.export(&folder).unwrap();
    assert_eq!(folder::names(root.path()).unwrap(), ["model"]);
    assert_eq!(open(folder.to_str().unwrap()).config.dtype, Some(DType::BF16));
    fs::rename(&folder, root.path().join(".old-model")).unwrap();
    fs::create_dir(root.path().join(".tmp-model")).unwrap();
    recover(&folder).unwrap();
    assert_eq!(folder::names(root.path()).unwrap(), ["model"]);
}

#[test]
fn the_card_tells_where_the_model_comes_from() {
    let (root, _) = Case::policy("eurus-mini/policy").check();
    let card = fs::read_to_string(root.path().join("model").join(README)).unwrap();
    for part in [
        "pipeline_tag: text-generation",
        "# my\\`model",
        "`org/ba_se`",
        "| eval/loss | 0.2500 |",
        "| `a_b.jsonl` | 7 | `00ff` |",
        "eurus serve --model .",
        "learning_rate = 0.00002",
    ] {
        assert!(card.contains(part), "{card}\nlacks {part}");
    }
    assert!(!card.contains("base_model"), "{card}");
    let (root, _) = Case::reward("eurus-mini/policy").check();
    let card = fs::read_to_string(root.path().join("model").join(README)).unwrap();
    assert!(card.contains("text-classification") && card.contains("--reward-model ."), "{card}");
}

#[test]
fn adapters_are_written_as_peft_has_them() {
    let root = tempfile::tempdir().unwrap();
    let lora = crate::train::recipe::LoraRecipe { rank: 4, alpha: 8.0, ..Default::default() };
    let name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight";
    let tensors = HashMap::from([(name.to_owned(), Tensor::randn(0f32, 1.0, (4, 64), &Device::Cpu).unwrap())]);
    let adapter = Adapter { base: "org/name", head: HeadKind::Language, lora: &lora, tensors: &tensors };
    let folder = root.path().join("adapter");
    export_adapter(&folder, &adapter).unwrap();
    assert_eq!(folder::names(&folder).unwrap(), ["adapter_config.json", "adapter_model.safetensors"]);
    let config: Value = serde_json::from_slice(&fs::read(folder.join("adapter_config.json")).unwrap()).unwrap();
    for (key, value) in [
        ("peft_type", json!("LORA")),
        ("task_type", json!("CAUSAL_LM")),
        ("r", json!(4)),
        ("lora_alpha", json!(8)),
        ("target_modules", json!(crate::train::recipe::LORA_TARGETS)),
        ("use_rslora", json!(false)),
        ("bias", json!("none")),
        ("modules_to_save", json!([])),
    ] {
        assert_eq!(config[key], value, "{key}");
    }
    let reward = Adapter { head: HeadKind::Reward, ..adapter };
    export_adapter(&folder, &reward).unwrap();
    let config: Value = serde_json::from_slice(&fs::read(folder.join("adapter_config.json")).unwrap()).unwrap();
    assert_eq!((&config["modules_to_save"], &config["task_type"]), (&json!(["regression_head"]), &Value::Null));
    let read = candle_core::safetensors::load(folder.join("adapter_model.safetensors"), &Device::Cpu).unwrap();
    let values = |tensor: &Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    assert!(read.len() == 1 && values(&read[name]) == values(&tensors[name]));
}
