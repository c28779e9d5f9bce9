//! Tests of recipes: precedence, values on the command line, unknown and foreign keys, ranges, echo, differences.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::io::Write;

use super::*;

const BARE: &str = "model.from = \"m\"\nrun.output = \"out\"\n";
const LEAST: &str = "model.from = \"m\"\nrun.output = \"out\"\ndata.source = [{ path = \"d\" }]\n";

fn load(stage: Stage, text: &str, assignments: &[&str]) -> Result<Recipe> {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    let assignments: Vec<String> = assignments.iter().map(|text| (*text).to_owned()).collect();
    Recipe::load(stage, file.path(), &assignments)
}

#[track_caller]
fn least(stage: Stage, assignments: &[&str]) -> Recipe {
    load(stage, LEAST, assignments).unwrap()
}

#[track_caller]
fn check_refused(stage: Stage, text: &str, assignments: &[&str], parts: &[&str]) {
    let message = load(stage, &format!("{LEAST}{text}"), assignments).unwrap_err().to_string();
    for part in parts {
        assert!(message.contains(part), "{message:?} lacks {part:?}");
    }
}

#[test]
fn defaults_are_the_papers() {
    for (stage, rate) in
        [(Stage::Sft, 2e-5), (Stage::Dpo, 5e-7), (Stage::Kto, 5e-7), (Stage::Nca, 5e-7), (Stage::Reward, 1e-5)]
    {
        let recipe = least(stage, &[]);
        assert_eq!((recipe.optimizer.learning_rate, recipe.run.epochs), (rate, 1), "{stage:?}");
        assert_eq!((recipe.optimizer.schedule, recipe.optimizer.warmup_ratio), (Schedule::Cosine, Some(0.1)));
        assert_eq!((recipe.objective.beta, recipe.objective.desirable_weight), (0.1, 1.33));
    }
}

#[test]
fn the_command_line_beats_the_file_beats_the_default() {
    let text = format!("{LEAST}[optimizer]\nlearning_rate = 3e-4\neps = 1e-6\n");
    let recipe = load(Stage::Sft, &text, &["optimizer.eps=1e-7"]).unwrap();
    assert_eq!((recipe.optimizer.learning_rate, recipe.optimizer.eps), (3e-4, 1e-7));
    assert_eq!(recipe.optimizer.betas, [0.9, 0.999]);
}

#[test]
fn values_are_toml_and_bare_words_are_strings() {
    let assignments = [
        "optimizer.schedule=linear",
        "optimizer.betas=[0.8, 0.9]",
        "run.recompute=true",
        "run.steps_max = 7",
        "run.max_shard_bytes=\"2MB\"",
        "model.from=org/name@main",
        "run.output=\"a b\"",
        "lora.targets=[\"q_proj\"]",
        "lora.rank=4",
    ];
    let recipe = least(Stage::Sft, &assignments);
    assert_eq!((recipe.optimizer.schedule, recipe.optimizer.betas), (Schedule::Linear, [0.8, 0.9]));
    assert_eq!((recipe.run.recompute, recipe.run.steps_max), (true, Some(7)));
    assert_eq!((recipe.run.max_shard_bytes, recipe.run.output.as_path()), (2_000_000, Path::new("a b")));
    assert_eq!(recipe.model.from, "org/name@main");
    let lora = recipe.lora.unwrap();
    assert_eq!((lora.rank, lora.targets, lora.alpha), (4, vec!["q_proj".to_owned()], 32.0));
    check_refused(Stage::Sft, "", &["optimizer.betas=[0.8, 0.9"], &["--set optimizer.betas=[0.8", "not TOML"]);
    check_refused(Stage::Sft, "", &["nonsense"], &["--set nonsense", "key=value"]);
    // A line break must not smuggle in another key.
    check_refused(Stage::Sft, "", &["run.seed=1\nmodel.from=2"], &["run.seed"]);
}

#[test]
fn entries_of_lists_are_reached_by_number() {
    let text = format!("{BARE}[[data.source]]\npath = \"a\"\n[[data.source]]\npath = \"b\"\n");
    let recipe = load(Stage::Sft, &text, &["data.source.1.path=c", "data.source.0.path=d"]).unwrap();
    let paths: Vec<&Path> = recipe.data.source.iter().map(|source| source.path.as_path()).collect();
    assert_eq!(paths, [Path::new("d"), Path::new("c")]);
    let refused = |key: &str| load(Stage::Sft, &text, &[key]).unwrap_err().to_string();
    assert!(refused("data.source.2.path=c").contains("`data.source` has 2 entries"));
    assert!(refused("data.3.path=c").contains("`data` is not a list"));
}

#[test]
fn unknown_keys_come_with_the_nearest_known_one() {
    let sft = Stage::Sft;
    check_refused(
        sft,
        "[optimizer]\nlearning_rte = 1\n",
        &[],
        &["`optimizer.learning_rte`", "`optimizer.learning_rate`?"],
    );
    check_refused(sft, "[optimiser]\neps = 1\n", &[], &["unknown key `optimiser`", "`optimizer`?"]);
    check_refused(sft, "", &["run.sed=1"], &["`run.sed` in the command line", "`run.seed`?"]);
    check_refused(sft, "", &["data.source=[{pth=\"a\"}]"], &["pth", "path"]);
    check_refused(sft, "", &["data.max_len=3"], &["`data.max_len`", "`data.max_length`?"]);
    check_refused(sft, "[lora]\nrnk = 3\n", &[], &["`lora.rnk`", "`lora.rank`?"]);
    check_refused(sft, "", &["run.seed=x"], &["`run.seed` in the command line"]);
}

#[test]
fn keys_of_another_stage_are_refused() {
    check_refused(
        Stage::Dpo,
        "[objective]\ndesirable_weight = 1.0\n",
        &[],
        &["`objective.desirable_weight`", "is a key of kto", "the objective of dpo has beta, label_smoothing"],
    );
    check_refused(Stage::Sft, "", &["objective.beta=0.1"], &["objective.beta", "dpo, kto, nca", "sft has no keys"]);
    check_refused(Stage::Reward, "[objective]\nbeta = 0.1\n", &[], &["objective.beta"]);
    check_refused(Stage::Nca, "[objective]\nbta = 0.1\n", &[], &["unknown key `objective.bta`", "beta"]);
    check_refused(Stage::Dpo, "stage = \"kto\"\n", &[], &["\"kto\"", "eurus train dpo"]);
    check_refused(Stage::Sft, "[model]\nreference = \"x\"\n", &[], &["model"]);
    check_refused(Stage::Reward, "", &["model.reference=x"], &["model.reference", "reward"]);
    check_refused(Stage::Kto, "", &["model.init=random"], &["model.init"]);
    check_refused(Stage::Sft, "", &["model.append_eos=true"], &["model.append_eos"]);
}

#[test]
fn warm_up_is_a_share_or_a_number() {
    let both = "[optimizer]\nwarmup_ratio = 0.2\nwarmup_steps = 3\n";
    check_refused(Stage::Sft, both, &[], &["optimizer.warmup_ratio", "optimizer.warmup_steps"]);
    let text = format!("{LEAST}[optimizer]\nwarmup_ratio = 0.2\n");
    let optimizer = load(Stage::Sft, &text, &["optimizer.warmup_steps=3"]).unwrap().optimizer;
    assert_eq!((optimizer.warmup_ratio, optimizer.warmup_steps), (None, Some(3)));
    let both = ["optimizer.warmup_steps=3", "optimizer.warmup_ratio=0.1"];
    check_refused(Stage::Sft, "", &both, &["optimizer.warmup_ratio"]);
}

#[test]
fn values_out_of_range_are_all_told_at_once() {
    let wrong = ["objective.beta=0", "optimizer.learning_rate=-1", "optimizer.betas=[1.0, 0.9]", "run.keep=0"];
    let parts = ["objective.beta = 0", "optimizer.learning_rate = -1", "optimizer.betas[0] = 1", "run.keep = 0"];
    check_refused(Stage::Dpo, "", &wrong, &parts);
    for (stage, assignment, part) in [
        (Stage::Dpo, "objective.beta=nan", "objective.beta"),
        (Stage::Dpo, "objective.label_smoothing=0.5", "objective.label_smoothing"),
        (Stage::Kto, "objective.undesirable_weight=-1", "objective.undesirable_weight"),
        (Stage::Kto, "batch.examples=1", "batch.examples"),
        (Stage::Reward, "objective.centre=-1", "objective.centre"),
        (Stage::Sft, "optimizer.decay_ratio=0.1", "optimizer.decay_ratio"),
        (Stage::Sft, "optimizer.warmup_ratio=1.5", "optimizer.warmup_ratio"),
        (Stage::Sft, "run.output=\"\"", "run.output"),
        (Stage::Sft, "data.source=[]", "data.source"),
        (Stage::Sft, "batch.tokens=0", "batch.tokens"),
        (Stage::Sft, "model.from=\"\"", "model.from"),
        (Stage::Sft, "lora.targets=[\"q_prj\"]", "did you mean q_proj"),
        (Stage::Sft, "lora.targets=[\"q_proj\", \"q_proj\"]", "twice"),
        (Stage::Sft, "lora.rank=0", "lora.rank"),
    ] {
        check_refused(stage, "", &[assignment], &[part]);
    }
}

#[test]
fn the_echo_reads_back_as_the_same_recipe() {
    let text =
        format!("{BARE}[[data.source]]\npath = \"a\\u007f\\\"b\"\n[[data.source]]\npath = \"c\"\nweight = 0.5\n");
    for stage in Stage::ALL {
        let recipe = load(stage, &text, &["optimizer.schedule=wsd", "lora.rank=3", "run.threads=2"]).unwrap();
        let echo = recipe.to_toml();
        assert_eq!(load(stage, &echo, &[]).unwrap(), recipe, "{echo}");
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(echo.as_bytes()).unwrap();
        assert_eq!(Recipe::load_any(file.path(), &[]).unwrap(), recipe);
    }
    assert!(least(Stage::Kto, &[]).to_toml().contains("desirable_weight = 1.33"));
}

#[test]
fn only_what_changes_the_weights_counts_as_a_difference() {
    let before = least(Stage::Dpo, &[]);
    let free = ["run.output=x", "run.threads=2", "run.save_every=3", "run.keep=9", "run.save_dtype=bf16"];
    assert_eq!(least(Stage::Dpo, &free).differences(&before), []);
    let other = least(Stage::Dpo, &["objective.beta=0.2", "run.steps_max=3", "run.keep=9"]);
    let told: Vec<String> = other.differences(&before).iter().map(ToString::to_string).collect();
    assert_eq!(told, ["objective.beta: 0.1 before, 0.2 now", "run.steps_max: not set before, 3 now"]);
}
