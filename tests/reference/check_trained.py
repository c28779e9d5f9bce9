#!/usr/bin/env python3
"""Loads what `eurus train` wrote with transformers and PEFT, and compares their numbers with those of `eurus serve`.

    pip install torch transformers jinja2 safetensors peft accelerate   # written with 2.15, 5.20, peft 0.21
    pip install sentencepiece protobuf                                  # where a folder has tokenizer.model only
    python check_trained.py --eurus target/release/eurus OUTPUT/model... [OUTPUT/adapter... [--base FOLDER]]

Each FOLDER is a policy, a reward model or an adapter, as its config says. An adapter is put beside its base (--base, else what
adapter_config.json names), merged in float32, rounded to what the merged model beside it, ../model, is stored as, and compared
with that one.
For each:
  no missing, unexpected or misshapen tensor;
  the chat template gives the same token ids in Python and from POST /tokenize (--no-template where there is none);
  log p(token | tokens before it) of those ids, and of random ones, within 2e-4 of POST /v1/completions with echo,
  or the reward of each conversation and at every token of random ids within 1e-4, relative, of POST /v1/rewards.
Everything is computed in float32, whatever the files hold. Prints the largest differences; exits with 1 where one is too large.
"""
import argparse
import json
import random
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, MistralConfig, MistralModel, PreTrainedModel
from transformers.utils import logging

LOGPROB_MAX, REWARD_MAX = 2e-4, 1e-4
CONVERSATIONS = [
    ["Use the numbers 2, 1, 6 to make 11.", "Step 1: 2*6=12, left 1 12\nStep 2: 12-1=11, left 11\nAnswer: \\boxed{2*6-1}"],
    ["Use the numbers 1, 2, 9 to make 20.", "Answer: \\boxed{1*2*9}", "Out: 18\nYour answer is wrong.",
     "Step 1: 9+1=10, left 2 10\n\n  Step 2: 10*2=20, left 20\tAnswer: \\boxed{(9+1)*2}"],
    ["héllo – naïve ☃ 数学 🙂 12345", "Übung [INST] x"],
    ["a  b", "c", " d\n", "e", "f?", "\\boxed{7}"],
]


class EurusRewardModel(PreTrainedModel):
    """As in modeling_eurus_rm.py of openbmb/Eurus-RM-7b: the value of the head at the last attended token."""

    config_class = MistralConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = MistralModel(config)
        self.regression_head = nn.Linear(config.hidden_size, 1, bias=False)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        hidden = self.model(input_ids, attention_mask=attention_mask, **kwargs)[0]
        rewards = self.regression_head(hidden).squeeze(-1)
        ends = attention_mask.cumsum(dim=1).argmax(dim=1).view(-1, 1)
        return torch.gather(rewards, 1, ends)


class Server:
    """`eurus serve` with one model."""

    def __init__(self, url):
        self.url = url

    def ask(self, route, **body):
        request = urllib.request.Request(self.url + route, json.dumps(body).encode(), {"Content-Type": "application/json"})
        try:
            return json.load(urllib.request.urlopen(request, timeout=300))
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{route} answers {error.code}: {error.read().decode()}") from None


@contextmanager
def serve(eurus, folder, reward):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    models = ["--model", "none", "--reward-model", str(folder)] if reward else ["--model", str(folder), "--reward-model", "none"]
    process = subprocess.Popen([eurus, "serve", "--port", str(port), "--log-level", "warn", *models])
    try:
        server = Server(f"http://127.0.0.1:{port}")
        for _ in range(600):
            assert process.poll() is None, f"eurus serve {' '.join(models)} ended with {process.returncode}"
            try:
                urllib.request.urlopen(server.url + "/ready", timeout=5)
                break
            except OSError:
                time.sleep(0.2)
        yield server
    finally:
        process.terminate()
        process.wait(60)


def turns(texts):
    return [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(texts)]


def clean(report, allowed=()):
    """No tensor may be missing, left over or of another shape."""
    kinds = {kind: sorted(map(str, keys)) for kind, keys in report.items() if kind != "missing_keys"}
    kinds["missing_keys"] = sorted(set(report["missing_keys"]) - set(allowed))
    assert not any(kinds.values()), kinds


def load(folder, reward, allowed=()):
    model_class = EurusRewardModel if reward else AutoModelForCausalLM
    options = {"dtype": torch.float32, "attn_implementation": "eager", "output_loading_info": True}
    model, report = model_class.from_pretrained(folder, **options)
    clean(report, allowed)
    return model.eval()


def load_adapter(folder, base, reward):
    """The base with the adapter beside it; a reward head may come with the adapter."""
    from peft import PeftModel, set_peft_model_state_dict
    from safetensors.torch import load_file

    model = PeftModel.from_pretrained(load(base, reward, ["regression_head.weight"]), folder)
    adapters = load_file(folder / "adapter_model.safetensors")
    result = set_peft_model_state_dict(model, adapters)
    missing = [key for key in result.missing_keys if ".lora_" in key or ".modules_to_save." in key]
    assert not missing and not result.unexpected_keys, (missing, result.unexpected_keys)
    trained = [name for name, _ in model.named_parameters() if ".lora_" in name or ".modules_to_save." in name]
    assert len(trained) == len(adapters), f"{len(trained)} tensors of an adapter, {len(adapters)} in the file"
    assert all(tensor.abs().max() > 0 for tensor in adapters.values()), "a factor is zero: nothing was trained"
    return model.eval()


def rounded(model, dtype):
    """With the values that its parameters have once they are stored as `dtype`."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype).float()
    return model


def logprobs(model, ids):
    logits = model(torch.tensor([ids])).logits[0]
    return logits.log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()


def reward_of(model, ids, pad=0):
    """With `pad` tokens behind it that are not attended."""
    ids, mask = ids + ids[:1] * pad, [1] * len(ids) + [0] * pad
    return model(torch.tensor([ids]), attention_mask=torch.tensor([mask])).item()


def random_ids(config, count):
    draw = random.Random(count)
    return [1] + [draw.randrange(3, config.vocab_size) for _ in range(count - 1)]


def relative(a, b):
    return abs(a - b) / max(abs(a), abs(b))


def compare_template(tokenizer, server, last=None, **ending):
    """Ids of every conversation, up to the turn `last`, which both must give alike."""
    rows = []
    for texts in CONVERSATIONS:
        messages = turns(texts[:last])
        ids = list(tokenizer.apply_chat_template(messages, return_dict=False, **ending))
        ours = server.ask("/tokenize", messages=messages, **{"add_generation_prompt": False, **ending})["tokens"]
        assert ids == ours, f"{messages}\n  transformers {ids}\n  eurus        {ours}"
        rows.append(ids)
    return rows


@torch.no_grad()
def compare_policy(model, tokenizer, server):
    rows = []
    if tokenizer:
        rows = compare_template(tokenizer, server)
        compare_template(tokenizer, server, last=-1, add_generation_prompt=True)
        compare_template(tokenizer, server, continue_final_message=True)
    limit = model.config.max_position_embeddings
    rows += [random_ids(model.config, min(count, limit - 1)) for count in (7, 200, 600)]
    largest, count = 0.0, 0
    for ids in rows:
        answer = server.ask("/v1/completions", prompt=ids, echo=True, logprobs=0, max_tokens=0)
        ours = answer["choices"][0]["logprobs"]["token_logprobs"]
        assert ours[0] is None and len(ours) == len(ids), (len(ours), len(ids))
        largest = max([largest, *(abs(a - b) for a, b in zip(logprobs(model, ids), ours[1:], strict=True))])
        count += len(ids) - 1
    assert largest < LOGPROB_MAX, f"a log-probability is off by {largest:.1e}"
    return f"{count} log-probabilities, largest difference {largest:.1e}"


@torch.no_grad()
def compare_reward(model, tokenizer, server):
    append_eos = getattr(model.config, "append_eos", False)
    differences = []
    if tokenizer:
        rows = compare_template(tokenizer, server, continue_final_message=True)
        for texts, ids in zip(CONVERSATIONS, rows, strict=True):
            ids = ids + [tokenizer.eos_token_id] * append_eos
            (ours,) = server.ask("/v1/rewards", messages=turns(texts))["data"]
            assert (ours["tokens"], ours["last_token_id"]) == (len(ids), ids[-1]), (ours, ids)
            differences += [relative(reward_of(model, ids, pad), ours["reward"]) for pad in (0, 3)]
    ids = random_ids(model.config, min(200, model.config.max_position_embeddings - 1))
    (ours,) = server.ask("/v1/rewards", **{"input": [ids], "return": "all", "append_eos": False})["data"]
    every = model.get_submodule("regression_head")(model.get_submodule("model")(torch.tensor([ids]))[0])[0, :, 0]
    ours = torch.tensor(ours["rewards"])
    assert ours.shape == every.shape, (ours.shape, every.shape)
    # Single ones may be near zero, so relative to their size in general.
    differences.append(((every - ours).abs().max() / ours.abs().mean()).item())
    assert max(differences) < REWARD_MAX, f"a reward is off by {max(differences):.1e}, relative"
    return f"{len(differences) - 1 + len(ours)} rewards, largest relative difference {max(differences):.1e}"


def check(folder, args):
    adapter = (folder / "adapter_config.json").exists()
    merged = folder.parent / "model" if adapter else folder
    config = AutoConfig.from_pretrained(merged)
    reward = config.architectures == ["EurusRewardModel"]
    if adapter:
        named = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
        model = rounded(load_adapter(folder, args.base or named, reward).merge_and_unload(), config.dtype)
    else:
        model = load(folder, reward)
    tokenizer = None if args.no_template else AutoTokenizer.from_pretrained(merged)
    compare = compare_reward if reward else compare_policy
    with serve(args.eurus, merged, reward) as server:
        found = compare(model, tokenizer, server)
    kind = ("reward model" if reward else "policy") + (" with adapter" if adapter else "")
    print(f"{folder}: {kind}, stored as {config.dtype}; {found}", flush=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--eurus", default="target/release/eurus", help="the program")
    parser.add_argument("--base", type=Path, help="model that the adapters stand beside")
    parser.add_argument("--no-template", action="store_true", help="compare token ids only: the folders have no chat template")
    args = parser.parse_args()
    logging.disable_progress_bar()
    failed = 0
    for folder in args.folders:
        try:
            check(folder, args)
        except AssertionError as error:
            failed += 1
            print(f"{folder}: FAILED: {error}", flush=True)
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
