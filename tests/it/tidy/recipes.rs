//! The recipes in training/recipes: each loads, writes to its own folder, and those of the paper have its numbers.

use eurus::train::recipe::{Init, Recipe, Schedule, Stage};

use super::{files, root};

fn recipes() -> Vec<(String, Recipe)> {
    let load = |path: String| {
        let recipe = Recipe::load_any(&root().join(&path), &[]).unwrap_or_else(|error| panic!("{path}: {error}"));
        let name = path.trim_start_matches("training/recipes/").trim_end_matches(".toml").to_string();
        (name, recipe)
    };
    files("training/recipes", &[".toml"]).into_iter().map(load).collect()
}

#[test]
fn every_recipe_loads_and_is_named_after_what_it_does() {
    let recipes = recipes();
    for stage in Stage::ALL {
        for prefix in ["eurus-7b", "mini"] {
            let name = format!("{prefix}-{}", stage.name());
            assert!(recipes.iter().any(|(known, recipe)| *known == name && recipe.stage == stage), "{name}");
        }
    }
    for (name, recipe) in &recipes {
        assert_eq!(recipe.run.output.to_str(), Some(format!("runs/{name}").as_str()));
        if let Some(template) = &recipe.model.chat_template {
            assert!(root().join(template).is_file(), "{name}: {template:?}");
        }
        // What one recipe writes, another begins with.
        if let Some(before) = recipe.model.from.strip_prefix("runs/") {
            let before = before.strip_suffix("/model").unwrap();
            assert!(recipes.iter().any(|(known, _)| known == before), "{name} begins with {before}");
        }
    }
}

#[test]
fn the_recipes_of_the_paper_have_its_numbers() {
    // arXiv 2404.02078, section 3 and appendix B.
    let rates = [(Stage::Sft, 2e-5), (Stage::Dpo, 5e-7), (Stage::Kto, 5e-7), (Stage::Nca, 5e-7), (Stage::Reward, 1e-5)];
    let recipes = recipes();
    for (stage, rate) in rates {
        let name = format!("eurus-7b-{}", stage.name());
        let (_, recipe) = recipes.iter().find(|(known, _)| *known == name).unwrap();
        let optimizer = &recipe.optimizer;
        assert_eq!((optimizer.learning_rate, optimizer.schedule), (rate, Schedule::Cosine), "{name}");
        assert_eq!((optimizer.warmup_ratio, optimizer.min_ratio), (Some(0.1), 0.0), "{name}");
        assert_eq!((recipe.run.epochs, recipe.run.steps_max, recipe.model.init), (1, None, Init::Checkpoint), "{name}");
        let objective = &recipe.objective;
        assert_eq!((objective.beta, objective.label_smoothing), (0.1, 0.0), "{name}");
        assert_eq!(objective.desirable_weight / objective.undesirable_weight, 1.33, "{name}");
        assert_eq!((objective.bradley_terry, objective.margin, objective.centre), (true, false, 0.0), "{name}");
        for source in &recipe.data.source {
            let trees = source.path.starts_with("data/UltraInteract_pair");
            assert_eq!(source.augment, trees && stage == Stage::Reward, "{name}: {:?}", source.path);
            let expected = (stage == Stage::Reward).then_some(trees);
            assert_eq!(source.absolute, expected, "{name}: {:?}", source.path);
        }
    }
}
