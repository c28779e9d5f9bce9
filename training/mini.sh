#!/bin/sh
# The miniature study from nothing to figures: data, policy, its own answers, reward models, preference learning, best-of-n.
# Everything goes to runs/. A stage that is finished is not run again; one that was stopped goes on where it was.
# EURUS names the program, POLICY a policy to use in place of training one.
set -eu
cd "$(dirname "$0")/.."
eurus=${EURUS:-target/release/eurus}
policy=${POLICY:-runs/mini-sft/model}
mkdir -p runs

train() { # stage, recipe, then assignments
    stage=$1 recipe=$2
    shift 2
    "$eurus" train "$stage" --config "training/recipes/$recipe.toml" "$@"
}
curve() { # name, then flags of bon-curve
    name=$1
    shift
    [ -f "runs/$name.json" ] || "$eurus" bench bon-curve --repeats 3 --json "runs/$name.json" "$@"
}
again() { # stage, recipe, model it begins with; with another seed
    train "$1" "$2" --set "run.seed=$seed" --set "run.output=runs/$2-$seed" --set "model.from=$3"
}

[ -f runs/mini-data/trees.jsonl ] || "$eurus" bench make-trees runs/mini-data --seed 1 --solutions 300000 --trees 2000
[ -f runs/mini-single/trees.jsonl ] || "$eurus" bench make-trees runs/mini-single --seed 2 --solutions 0 --trees 60000 --turns 1
[ -n "${POLICY:-}" ] || train sft mini-sft
[ -f runs/mini-pairs.jsonl ] || "$eurus" bench sample-pairs --model "$policy" --seed 2 --problems 3000 --samples 12 --pairs 6 --out runs/mini-pairs.jsonl
for model in reward-first reward-bt reward-dr; do
    train reward "mini-$model" --set "model.from=$policy"
    curve "mini-$model" --model "$policy" --reward-model "runs/mini-$model/model"
done
train reward mini-reward
curve mini-reward --model "$policy" --reward-model runs/mini-reward/model
for stage in dpo kto nca; do
    train "$stage" "mini-$stage" --set "model.from=$policy"
    curve "mini-$stage" --model "runs/mini-$stage/model" --reward-model runs/mini-reward/model
done
# What depends on luck: the same with other seeds.
for seed in 2 3; do
    again reward mini-reward-first "$policy"
    again reward mini-reward "runs/mini-reward-first-$seed/model"
    curve "mini-reward-$seed" --model "$policy" --reward-model "runs/mini-reward-$seed/model"
    for stage in dpo kto nca; do
        again "$stage" "mini-$stage" "$policy"
        curve "mini-$stage-$seed" --model "runs/mini-$stage-$seed/model" --reward-model runs/mini-reward/model
    done
done
