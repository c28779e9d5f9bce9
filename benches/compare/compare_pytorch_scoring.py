#!/usr/bin/env python3
"""Scores answers with PyTorch and with our server, in turn, and prints tokens per second and the ratio.

  python compare_pytorch_scoring.py CHECKPOINT --eurus target/release/eurus [--texts 16] [--length 256] [--threads 2] [--rounds 5] [--f32]

CHECKPOINT is a reward model, such as `eurus bench make-model rm --kind reward` writes. PyTorch runs the decoder of transformers on one batch of
texts of equal length, without padding and in bf16 weights, and reads the last hidden state of each; the server gets as many requests at the
same time, over HTTP, and computes in bf16 too. --f32: both in float32. Needs: pip install torch transformers.
"""
import argparse, json, os, socket, statistics, subprocess, sys, tempfile, time, urllib.request

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("checkpoint")
parser.add_argument("--eurus", required=True)
parser.add_argument("--texts", type=int, default=16)
parser.add_argument("--length", type=int, default=256)
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--rounds", type=int, default=5)
parser.add_argument("--f32", action="store_true")
options = parser.parse_args()


def peer():
    """A function that scores one batch and returns tokens per second."""
    import torch
    from transformers import MistralConfig, MistralModel
    torch.set_num_threads(options.threads)
    with open(os.path.join(options.checkpoint, "config.json")) as file:
        shape = json.load(file)
    config = MistralConfig(**{key: value for key, value in shape.items() if key not in ("architectures", "model_type", "torch_dtype", "dtype")})
    dtype = torch.float32 if options.f32 else torch.bfloat16
    model, head = MistralModel(config).to(dtype).eval(), torch.nn.Linear(config.hidden_size, 1, bias=False).to(dtype)

    def score():
        ids = torch.randint(3, config.vocab_size, (options.texts, options.length))
        start = time.perf_counter()
        with torch.inference_mode():
            head(model(ids, use_cache=False).last_hidden_state[:, -1])
        return options.texts * options.length / (time.perf_counter() - start)

    score()
    return score


def server():
    """Our process and its address."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    dtype = "f32" if options.f32 else "bf16"
    process = subprocess.Popen(
        [options.eurus, "serve", "--model", "none", "--reward-model", options.checkpoint, "--port", str(port), "--threads", str(options.threads),
         "--reward-compute-dtype", dtype], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(600):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/ready").read()
            return process, f"http://127.0.0.1:{port}"
        except OSError:
            if process.poll() is not None:
                break
            time.sleep(0.2)
    process.kill()
    sys.exit("our server does not come up")


def ours(url, seed):
    with tempfile.NamedTemporaryFile(suffix=".json") as report:
        subprocess.run(
            [options.eurus, "bench", "serve", "--url", url, "--work", "reward", "--concurrency", str(options.texts), "--requests", str(2 * options.texts),
             "--prompt-tokens", str(options.length), "--seed", str(seed), "--json", report.name], check=True, capture_output=True)
        return json.load(open(report.name))


def main():
    score = peer()
    process, url = server()
    rates = ([], [])
    try:
        ours(url, 1000)
        for index in range(options.rounds):
            turns = [lambda: rates[0].append(statistics.median(score() for _ in range(3))),
                     lambda: rates[1].append(ours(url, index)["prompt_tokens_per_second"])]
            for turn in turns if index % 2 == 0 else reversed(turns):
                turn()
            print(f"PyTorch {rates[0][-1]:8.1f} tok/s   eurus {rates[1][-1]:8.1f} tok/s   ratio {rates[1][-1] / rates[0][-1]:.2f}", flush=True)
    finally:
        process.terminate()
        process.wait()
    medians = [statistics.median(rate) for rate in rates]
    print(f"medians {medians[0]:8.1f} tok/s   eurus {medians[1]:8.1f} tok/s   ratio {medians[1] / medians[0]:.2f}")


main()
