#!/usr/bin/env python3
"""How far our log-probabilities and llama.cpp's are from exact ones, on the same GGUF files.

  python compare_llama_cpp_logprobs.py --eurus target/release/eurus MODEL.gguf ... [--tokens 64] [--threads 2]

For each file: the log-probability of every token of a random prompt but the first, from our server (`echo`), from llama.cpp with the prompt
at once and token by token (its kernels for many rows and for one differ, and so does what they round: that is its own noise), and in float64
from the weights as they are stored. Printed are root mean squares of differences, in nats. Dense models of architecture llama only.
Needs llama-cpp-python, gguf and numpy.
"""
import argparse, json, os, random, socket, subprocess, sys, time, urllib.request

import gguf
import llama_cpp
import numpy as np

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("files", nargs="+")
parser.add_argument("--eurus", required=True)
parser.add_argument("--tokens", type=int, default=64)
parser.add_argument("--threads", type=int, default=2)
options = parser.parse_args()


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def picked(logits, tokens):
    """Of every token but the first, from logits `[tokens, vocab]`."""
    return log_softmax(np.asarray(logits, np.float64)[:-1])[np.arange(len(tokens) - 1), tokens[1:]]


def exact(path, tokens):
    reader = gguf.GGUFReader(path)
    if "llama.expert_count" in reader.fields:
        sys.exit(f"{path} is a mixture of experts; this compares dense models")
    number = lambda key: reader.fields[f"llama.{key}"].contents()
    weights = {tensor.name: tensor for tensor in reader.tensors}
    take = lambda name: gguf.quants.dequantize(weights[name].data, weights[name].tensor_type).astype(np.float64)
    heads, kv_heads, eps = number("attention.head_count"), number("attention.head_count_kv"), number("attention.layer_norm_rms_epsilon")
    width = number("embedding_length") // heads
    norm = lambda x, name: x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * take(name)
    angles = np.arange(len(tokens))[:, None] * number("rope.freq_base") ** (-np.arange(0, width, 2) / width)

    def rope(x):
        even, odd, cos, sin = x[..., ::2], x[..., 1::2], np.cos(angles)[:, None], np.sin(angles)[:, None]
        return np.stack([even * cos - odd * sin, even * sin + odd * cos], -1).reshape(x.shape)

    x = take("token_embd.weight")[tokens]
    future = np.triu(np.full((len(tokens), len(tokens)), -np.inf), 1)
    for layer in range(number("block_count")):
        part = lambda name: f"blk.{layer}.{name}.weight"
        h = norm(x, part("attn_norm"))
        split = lambda name: (h @ take(part(name)).T).reshape(len(tokens), -1, width)
        q, k, v = rope(split("attn_q")), rope(split("attn_k")), split("attn_v")
        k, v = (np.repeat(x, heads // kv_heads, 1) for x in (k, v))
        scores = np.exp(log_softmax(np.einsum("qhd,khd->hqk", q, k) / np.sqrt(width) + future))
        x = x + np.einsum("hqk,khd->qhd", scores, v).reshape(len(tokens), -1) @ take(part("attn_output")).T
        h = norm(x, part("ffn_norm"))
        gate = h @ take(part("ffn_gate")).T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ take(part("ffn_up")).T)) @ take(part("ffn_down")).T
    return norm(x, "output_norm.weight") @ take("output.weight" if "output.weight" in weights else "token_embd.weight").T


def theirs(path, tokens, batch):
    model = llama_cpp.Llama(path, n_ctx=512, n_batch=batch, n_ubatch=batch, n_threads=options.threads, n_threads_batch=options.threads,
                            logits_all=True, verbose=False, type_k=0, type_v=0, flash_attn=False)
    model.eval(tokens)
    return model.scores[: len(tokens)]


def ours(path, tokens, *flags):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [options.eurus, "serve", "--model", path, "--reward-model", "none", "--port", str(port), "--threads", str(options.threads), *flags]
    # What is preloaded into llama.cpp's process is not for ours.
    environment = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/ready").read()
                break
            except OSError:
                if process.poll() is not None:
                    sys.exit(f"the server ended: {' '.join(command)}")
                time.sleep(0.2)
        body = {"prompt": tokens, "max_tokens": 0, "echo": True, "logprobs": 0}
        request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
        answer = json.load(urllib.request.urlopen(request))
        return np.array(answer["choices"][0]["logprobs"]["token_logprobs"][1:], np.float64)
    finally:
        process.terminate()
        process.wait()


print("| file | ours | llama.cpp, at once | llama.cpp, one by one | at once from one by one | ours from llama.cpp | spread of the log-probabilities |")
print("|---|---|---|---|---|---|---|")
for path in options.files:
    vocab = next(tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name == "token_embd.weight").shape[1]
    tokens = [1] + random.Random(7).choices(range(3, int(vocab)), k=options.tokens - 1)
    true, whole, single = (picked(logits, tokens) for logits in (exact(path, tokens), theirs(path, tokens, 512), theirs(path, tokens, 1)))
    rms = lambda a, b: f"{np.sqrt(((a - b) ** 2).mean()):.1e}"
    variants = [("", [])]
    if path.endswith(("bf16.gguf",)):
        variants.append((", bf16 products", ["--compute-dtype", "bf16"]))
    for name, flags in variants:
        mine = ours(path, tokens, *flags)
        cells = [rms(mine, true), rms(whole, true), rms(single, true), rms(whole, single), rms(mine, whole), f"{true.std():.2f}"]
        print(f"| {os.path.basename(path)}{name} | " + " | ".join(cells) + " |", flush=True)
