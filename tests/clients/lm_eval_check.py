#!/usr/bin/env python3
"""lm-evaluation-harness against the server, its log-likelihoods checked against another way to the same numbers.

The harness asks /v1/completions for the log-probabilities of a prompt. Here each answer is forced token by token instead
(`logit_bias` decides the draw, the reported log-probability is the model's own), so a prompt read at once must give
what single generated tokens give. Needs EURUS_URL, the address of a server of the built-in models; no other network.
"""
import json
import os
import pathlib
import tempfile
import urllib.request

for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
    os.environ[name] = "1"

import lm_eval
from lm_eval.tasks import TaskManager

URL = os.environ["EURUS_URL"]
POLICY = "eurus-mini/policy"
# Question, right expression, wrong expression.
QUESTIONS = [
    ("Use the numbers 3, 5, 8 to make 29.", "5+3*8", "3+5+8"),
    ("Use the numbers 2, 1, 6 to make 11.", "2*6-1", "6*6-1"),
    ("Use the numbers 7, 7, 3 to make 17.", "7+7+3", "7*7-3"),
]
TASK = """
task: countdown
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "[INST] {{{{question}}}} [/INST]Answer:"
doc_to_choice: "{{{{[right, wrong]}}}}"
doc_to_target: 0
target_delimiter: " "
metric_list:
  - metric: acc
"""


def post(path, body):
    request = urllib.request.Request(URL + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


def tokens(text):
    return post("/tokenize", {"model": POLICY, "prompt": text, "add_special_tokens": False})["tokens"]


def forced(context, continuation):
    """Sum of log p(token | everything before it), one generated token at a time."""
    before = tokens(context)
    # The harness cuts the tokens of the whole text at the context's length, even where a token spans the border.
    whole = before + tokens(context + continuation)[len(before) :]
    total = 0.0
    for position in range(len(before), len(whole)):
        body = {"model": POLICY, "prompt": whole[:position], "max_tokens": 1, "temperature": 0, "logprobs": 1}
        body |= {"logit_bias": {str(whole[position]): 100}, "return_token_ids": True, "ignore_eos": True}
        choice = post("/v1/completions", body)["choices"][0]
        total += choice["logprobs"]["token_logprobs"][0]
    return total


def harness():
    """(context, continuation) -> log-likelihood, and the harness's accuracy."""
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        data = folder / "countdown.jsonl"
        rows = [{"question": question, "right": right, "wrong": wrong} for question, right, wrong in QUESTIONS]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "countdown.yaml").write_text(TASK.format(data=data))
        results = lm_eval.simple_evaluate(
            model="local-completions",
            model_args=f"base_url={URL}/v1/completions,model={POLICY},tokenizer_backend=remote,num_concurrent=2",
            tasks=["countdown"],
            task_manager=TaskManager(include_path=str(folder), include_defaults=False),
            log_samples=True,
            bootstrap_iters=0,
        )
    found = {}
    for sample in results["samples"]["countdown"]:
        for arguments, response in zip(sample["arguments"], sample["filtered_resps"]):
            found[tuple(arguments)] = float(response[0])
    return found, results["results"]["countdown"]["acc,none"]


found, accuracy = harness()
assert len(found) == 2 * len(QUESTIONS), found.keys()
for (context, continuation), likelihood in found.items():
    want = forced(context, continuation)
    assert abs(likelihood - want) < 1e-4, (context, continuation, likelihood, want)
right = sum(found[c, x] > found[c, y] for (c, x), (_, y) in zip(list(found)[::2], list(found)[1::2]))
assert abs(accuracy - right / len(QUESTIONS)) < 1e-9, (accuracy, right)
print(f"lm-eval {lm_eval.__version__}: {len(found)} log-likelihoods agree, accuracy {accuracy:.2f}")
