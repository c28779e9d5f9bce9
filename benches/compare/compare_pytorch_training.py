#!/usr/bin/env python3
"""Times training steps of PyTorch on one of our checkpoints, in the shape of `eurus bench train --json`.

  python compare_pytorch_training.py CHECKPOINT [--threads 2] [--texts 8] [--length 256] [--steps 5] [--bf16] [--recompute]
  python compare_pytorch_training.py CHECKPOINT --eurus target/release/eurus [--rounds 5]   alternates with our own run and prints ratios

A step is forward, backward, clipping to norm 1 and fused AdamW, on the same texts. Needs: pip install torch transformers.
`eurus bench make-model m15 --hidden 384 --layers 6 --heads 6 --kv-heads 6 --intermediate 1024 --vocab 6144 --dtype f32` writes README's shape.
"""
import argparse, json, os, resource, statistics, subprocess, sys, time

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("checkpoint")
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--texts", type=int, default=8)
parser.add_argument("--length", type=int, default=256)
parser.add_argument("--steps", type=int, default=5)
parser.add_argument("--bf16", action="store_true", help="bf16 weights here, bf16 products over float32 weights there")
parser.add_argument("--recompute", action="store_true")
parser.add_argument("--eurus", help="our binary: alternate with it")
parser.add_argument("--rounds", type=int, default=5)
options = parser.parse_args()


def alternate():
    """Runs both in turn, each in a process of its own, and prints every pair."""
    shape = ["--threads", options.threads, "--texts", options.texts, "--length", options.length, "--steps", options.steps]
    shape = [str(part) for part in shape] + ["--bf16"] * options.bf16 + ["--recompute"] * options.recompute
    peer = [sys.executable, __file__, options.checkpoint, *shape]
    ours = [options.eurus, "bench", "train", "--model", options.checkpoint, "--json", *shape]
    # Whoever goes first meets another machine than who goes second, so they take turns at that too.
    pairs = []
    for turn in range(options.rounds):
        first, second = (peer, ours) if turn % 2 == 0 else (ours, peer)
        results = {command[0]: json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout) for command in (first, second)}
        pairs.append((results[peer[0]], results[ours[0]]))
        a, b = (result["tokens_per_second"] for result in pairs[-1])
        print(f"PyTorch {a:8.1f} tok/s   eurus {b:8.1f} tok/s   ratio {b / a:.2f}", flush=True)
    peers, own = zip(*pairs)
    median = lambda results, key: statistics.median(result[key] for result in results)
    a, b = (median(results, "tokens_per_second") for results in (peers, own))
    ratios = [b["tokens_per_second"] / a["tokens_per_second"] for a, b in pairs]
    print(f"medians {a:8.1f} tok/s   eurus {b:8.1f} tok/s   ratio {b / a:.2f}, of pairs {statistics.median(ratios):.2f}")
    memory = [median(results, "memory_bytes_max") / 2**20 for results in (peers, own)]
    print(f"memory  {memory[0]:8.0f} MiB     eurus {memory[1]:8.0f} MiB     share {memory[1] / memory[0]:.2f}")


def train():
    import torch
    from transformers import AutoModelForCausalLM
    torch.set_num_threads(options.threads)
    dtype = torch.bfloat16 if options.bf16 else torch.float32
    model = AutoModelForCausalLM.from_pretrained(options.checkpoint, dtype=dtype, attn_implementation="sdpa")
    model.train()
    if options.recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.config.use_cache = False
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.0, fused=True)
    vocab = model.config.vocab_size
    ids = torch.tensor([[(place * 7919 + text * 104_729) % vocab for place in range(options.length)] for text in range(options.texts)])
    seconds = []
    for _ in range(options.steps + 2):
        started = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seconds.append(time.perf_counter() - started)
    step = statistics.median(seconds[2:])
    tokens = options.texts * options.length
    print(json.dumps({
        "parameters": sum(p.numel() for p in model.parameters()), "threads": options.threads, "tokens": tokens,
        "tokens_per_second": tokens / step, "memory_bytes_max": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "torch": torch.__version__,
    }))


if options.eurus:
    options.eurus = os.path.abspath(options.eurus)
    alternate()
else:
    train()
