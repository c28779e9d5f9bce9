#!/usr/bin/env python3
"""Reference outputs of the serving path, from Hugging Face transformers on tiny random checkpoints.

For each preset writes <out>/<name>/ (a Hugging Face checkpoint: config.json, model*.safetensors, tokenizer.model or tokenizer.json,
generation_config.json) and <out>/<name>/expected.json + expected.safetensors:
  prompts        token ids                      logprobs_<i>  f32 [len-1]      log p(token t+1 | tokens <= t)
  logits_<i>     f32 [vocab], last position     greedy_<i>    24 greedy continuation ids
  rewards        (reward presets) raw head value at the last token of each prompt, alone and in a padded batch
  text           strings with the ids the slow SentencePiece tokenizer gives them
Needs: torch, transformers, sentencepiece, safetensors (CPU is enough).

  python serve_reference.py --out fixtures/serve --seed 11
"""
import argparse, io, json, os
import numpy as np
import sentencepiece as spm
import torch, torch.nn as nn
from safetensors.torch import save_file
from transformers import (LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, MistralModel, MixtralConfig, MixtralForCausalLM)

BASE = dict(hidden_size=64, intermediate_size=112, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-5)
PRESETS = {
    # the shapes of the published family, shrunk: window shorter than the prompts, grouped heads, big rope base, experts, reward head
    "mistral-window": (MistralConfig, MistralForCausalLM, dict(sliding_window=16, rope_theta=1e4), torch.float32),
    "mistral-bf16": (MistralConfig, MistralForCausalLM, dict(sliding_window=None, rope_theta=1e4, head_dim=32), torch.bfloat16),
    "llama-eos-list": (LlamaConfig, LlamaForCausalLM, dict(num_attention_heads=8, num_key_value_heads=1, rope_theta=1e6, tie_word_embeddings=False), torch.float16),
    "mixtral": (MixtralConfig, MixtralForCausalLM, dict(num_local_experts=8, num_experts_per_tok=2, rope_theta=1e6, sliding_window=None), torch.float32),
    "reward": (MistralConfig, None, dict(sliding_window=4096, rope_theta=1e4), torch.float16),
}


class EurusRewardModel(nn.Module):
    """MistralModel + bias-free regression_head; reward = value at the last attended token."""
    def __init__(self, cfg):
        super().__init__()
        self.model = MistralModel(cfg)
        self.regression_head = nn.Linear(cfg.hidden_size, 1, bias=False)

    def forward(self, ids, mask):
        h = self.model(ids, attention_mask=mask, use_cache=False)[0]
        end = mask.cumsum(1).argmax(1).view(-1, 1)
        return self.regression_head(h).squeeze(-1).gather(1, end)[:, 0]


def config(cls, kw, vocab):
    kw = {**BASE, **kw}
    theta = kw.pop("rope_theta")
    cfg = cls(vocab_size=vocab, max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=None, **kw)
    cfg.rope_parameters = {"rope_type": "default", "rope_theta": theta}
    cfg._attn_implementation = "eager"
    return cfg


def randomise(model, gen):
    with torch.no_grad():
        for name, p in model.named_parameters():
            r = torch.randn(p.shape, generator=gen)
            p.copy_(1 + 0.2 * r if "norm" in name else r * (1.6 / p.shape[-1] ** 0.5))
    return model.eval()


def tokenizer(text, vocab, path):
    out = io.BytesIO()
    spm.SentencePieceTrainer.train(sentence_iterator=iter(text.splitlines()), model_writer=out, vocab_size=vocab, model_type="bpe", byte_fallback=True,
                                   normalization_rule_name="identity", add_dummy_prefix=True, remove_extra_whitespaces=False, character_coverage=0.9995,
                                   unk_id=0, bos_id=1, eos_id=2, pad_id=-1, num_threads=1)
    open(path, "wb").write(out.getvalue())
    return spm.SentencePieceProcessor(model_proto=out.getvalue())


STRINGS = ["[INST] What is 12*7? [/INST] Step 1: 12*7 = 84", " leading space", "two  spaces\tand\na newline", "naïve café — 数学 🙂", "x=3.14e-7;//", "", "</s>", "\\boxed{42}"]


def main():
    a = argparse.ArgumentParser()
    a.add_argument("--out", required=True); a.add_argument("--seed", type=int, default=11)
    a.add_argument("--text", default=os.path.join(os.path.dirname(__file__), "..", "..", "README.md"), help="corpus of the tokenizer"); a.add_argument("--vocab", type=int, default=512)
    a = a.parse_args()
    gen = torch.Generator().manual_seed(a.seed); rng = np.random.default_rng(a.seed)
    for name, (ccls, mcls, kw, dtype) in PRESETS.items():
        d = os.path.join(a.out, name); os.makedirs(d, exist_ok=True)
        sp = tokenizer(open(a.text, encoding="utf8").read(), a.vocab, os.path.join(d, "tokenizer.model"))
        cfg = config(ccls, kw, a.vocab)
        prompts = [[1] + rng.integers(3, a.vocab, n - 1).tolist() for n in (1, 2, 7, 16, 17, 33, 61)]
        want, tensors = {"prompts": prompts, "dtype": str(dtype)}, {}
        if mcls is None:
            model = randomise(EurusRewardModel(cfg), gen).to(dtype).float()      # weights rounded to dtype, arithmetic in float32
            state = {k: v.to(dtype).contiguous() for k, v in model.state_dict().items()}
            half = len(state) // 2
            shards = [dict(list(state.items())[:half]), dict(list(state.items())[half:])]
            index = {"metadata": {"total_size": sum(v.numel() * v.element_size() for v in state.values())}, "weight_map": {}}
            for i, s in enumerate(shards, 1):
                f = f"model-{i:05d}-of-{len(shards):05d}.safetensors"; save_file(s, os.path.join(d, f), metadata={"format": "pt"})
                index["weight_map"].update({k: f for k in s})
            json.dump(index, open(os.path.join(d, "model.safetensors.index.json"), "w"))
            js = {**cfg.to_dict(), "architectures": ["EurusRewardModel"], "rope_theta": kw["rope_theta"], "torch_dtype": "float16",
                  "auto_map": {"AutoModel": "modeling_eurus_rm.EurusRewardModel"}}
            json.dump(js, open(os.path.join(d, "config.json"), "w"), indent=1, default=str)
            with torch.no_grad():
                want["rewards"] = [model(torch.tensor([p]), torch.ones(1, len(p), dtype=torch.long)).item() for p in prompts]
                n = max(map(len, prompts))
                ids = torch.tensor([p + [2] * (n - len(p)) for p in prompts]); mask = torch.tensor([[1] * len(p) + [0] * (n - len(p)) for p in prompts])
                want["rewards_padded"] = model(ids, mask).tolist()
        else:
            model = randomise(mcls(cfg), gen).to(dtype)
            model.save_pretrained(d)
            js = json.load(open(os.path.join(d, "config.json")))
            js["rope_theta"] = kw["rope_theta"]; js.pop("rope_parameters", None)      # the published files carry rope_theta at the top level
            json.dump(js, open(os.path.join(d, "config.json"), "w"), indent=1)
            eos = [2, 7] if name == "llama-eos-list" else 2
            json.dump({"bos_token_id": 1, "eos_token_id": eos}, open(os.path.join(d, "generation_config.json"), "w"))
            model = model.float()
            for i, p in enumerate(prompts):
                with torch.no_grad():
                    z = model(torch.tensor([p])).logits[0]
                    lp = torch.log_softmax(z, -1)
                    tensors[f"logits_{i}"] = z[-1].contiguous()
                    if len(p) > 1:
                        tensors[f"logprobs_{i}"] = lp[:-1].gather(1, torch.tensor(p[1:])[:, None])[:, 0].contiguous()
                    ids = list(p)
                    for _ in range(24):
                        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
                    tensors[f"greedy_{i}"] = torch.tensor(ids[len(p):], dtype=torch.int64)
            save_file(tensors, os.path.join(d, "expected.safetensors"))
        want["text"] = [{"text": s, "ids": sp.encode(s)} for s in STRINGS]
        json.dump(want, open(os.path.join(d, "expected.json"), "w"), ensure_ascii=False)
        print(name, "ok")


if __name__ == "__main__":
    main()
