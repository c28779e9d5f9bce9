#!/usr/bin/env python3
"""Our speed beside llama.cpp's: the same random GGUF files, alternating runs on one machine, Markdown tables of medians and ratios.

    python compare_llama_cpp.py FOLDER --eurus target/release/eurus
    python compare_llama_cpp.py FOLDER --eurus target/release/eurus --shapes 1.1b --formats q8_0,q4_k_m --rounds 7 --server

FOLDER keeps the models between runs: each shape is made by `eurus bench make-model` and written in each format by `eurus quantize`.
A round is, for one file: the memory probe (`eurus bench memory`), then both programs, in turns which is first. Needs llama-cpp-python
and numpy; --server also an OpenAI server of llama.cpp: a `llama-server` binary, or `pip install llama-cpp-python[server]`.
"""
import argparse, ctypes, http.client, json, os, random, re, shutil, signal, socket, statistics, subprocess, sys, threading, time

SHAPES = {
    "tiny": dict(hidden=256, layers=2, heads=4, kv_heads=2, intermediate=512, vocab=512, positions=2048),
    "125m": dict(hidden=768, layers=12, heads=12, kv_heads=4, intermediate=2048, vocab=32000, positions=4096),
    "1.1b": dict(hidden=2048, layers=22, heads=32, kv_heads=4, intermediate=5632, vocab=32000, positions=4096),
}
FORMATS = ["bf16", "f16", "q8_0", "q4_0", "q4_k_m", "q5_k_m", "q6_k"]
# Bytes of a number of the embedding, of which a step reads some rows only.
EMBEDDING_BYTES = {"bf16": 2, "f16": 2, "q8_0": 34 / 32, "q4_0": 18 / 32, "q4_k_m": 144 / 256, "q5_k_m": 176 / 256, "q6_k": 210 / 256}


# For our program: what is preloaded into llama.cpp's process is not for ours.
OWN = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"}


def run(command):
    return subprocess.run(command, env=OWN, check=True, capture_output=True, text=True).stdout


def files(a, shape):
    """The file of `shape` in each format, made where it is missing."""
    os.makedirs(a.folder, exist_ok=True)
    source = os.path.join(a.folder, shape)
    if not os.path.exists(source):
        flags = [part for key, value in SHAPES[shape].items() for part in (f"--{key.replace('_', '-')}", str(value))]
        run([a.eurus, "bench", "make-model", source, *flags])
    paths = {}
    for format in a.formats.split(","):
        paths[format] = os.path.join(a.folder, f"{shape}.{format}.gguf")
        if not os.path.exists(paths[format]):
            run([a.eurus, "quantize", source, paths[format], "--format", format])
    return paths


class Peer:
    """llama.cpp through its C interface, driven as `eurus bench model` drives our runner."""

    def __init__(self, path, threads, positions):
        import llama_cpp as L
        self.L = L
        L.llama_log_set(QUIET, ctypes.c_void_p(0))
        L.llama_backend_init()
        self.model = L.llama_model_load_from_file(path.encode(), L.llama_model_default_params())
        if not self.model:
            sys.exit(f"llama.cpp does not load {path}")
        p = L.llama_context_default_params()
        p.n_ctx, p.n_batch, p.n_ubatch, p.n_threads, p.n_threads_batch, p.n_seq_max = positions, 2048, 512, threads, threads, 16
        p.kv_unified = True
        self.ctx = L.llama_init_from_model(self.model, p)
        self.memory = L.llama_get_memory(self.ctx)
        self.batch = L.llama_batch_init(2048, 0, 1)

    def close(self):
        self.L.llama_free(self.ctx)
        self.L.llama_model_free(self.model)

    def decode(self, rows):
        """rows: (token, position, sequence, wanted)"""
        b = self.batch
        b.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            b.token[i], b.pos[i], b.n_seq_id[i], b.logits[i] = token, position, 1, wanted
            b.seq_id[i][0] = sequence
        if self.L.llama_decode(self.ctx, b) != 0:
            sys.exit("llama_decode failed")
        self.L.llama_synchronize(self.ctx)

    def clear(self):
        self.L.llama_memory_clear(self.memory, False)

    def prefill(self, tokens):
        self.clear()
        rows = [(3 + i % 200, i, 0, i == tokens - 1) for i in range(tokens)]
        started = time.perf_counter()
        self.decode(rows)
        return tokens / (time.perf_counter() - started)

    def generate(self, batch, context, steps):
        self.clear()
        for s in range(batch):
            self.decode([(3 + i % 200, i, s, i == context - 1) for i in range(context)])
        started = time.perf_counter()
        for step in range(steps):
            self.decode([(3 + step, context + step, s, True) for s in range(batch)])
        return batch * steps / (time.perf_counter() - started)

    def rates(self, a, batches):
        rates = {"prompt": self.prefill(a.prefill)}
        for batch in batches:
            rates[batch] = self.generate(batch, a.context, a.steps)
        return rates


QUIET = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)


def is_bf16(a, path):
    """Whether we compute in bf16, too."""
    return a.bf16 and path.endswith(".bf16.gguf")


def our_rates(a, path):
    report = json.loads(run([a.eurus, "bench", "model", "--model", path, "--threads", str(a.threads), "--prefill", str(a.prefill), "--batches",
                             a.batches, "--context", str(a.context), "--steps", str(a.steps), "--json"] + ["--bf16"] * is_bf16(a, path)))
    return {"prompt": report["prefill_tokens_per_second"], **{row["batch"]: row["tokens_per_second"] for row in report["decode"]}}


def probe(a):
    return json.loads(run([a.eurus, "bench", "memory", "--threads", str(a.threads), "--json"]))["median_gb_per_second"]


def step_bytes(path, format, shape):
    """What a step of generation reads of the weights."""
    return os.path.getsize(path) - SHAPES[shape]["vocab"] * SHAPES[shape]["hidden"] * EMBEDDING_BYTES[format]


def measure(a, path):
    """Rates of every round: theirs, ours, and the memory's."""
    batches = [int(batch) for batch in a.batches.split(",")]
    peer = Peer(path, a.threads, max(a.prefill, max(batches) * (a.context + a.steps)) + 64)
    peer.prefill(a.prefill)
    theirs, ours, memory = [], [], []
    for index in range(a.rounds):
        memory.append(probe(a))
        turns = [lambda: theirs.append(peer.rates(a, batches)), lambda: ours.append(our_rates(a, path))]
        for turn in turns if index % 2 == 0 else reversed(turns):
            turn()
    peer.close()
    return theirs, ours, memory


def ratio(theirs, ours):
    """Median of ours over median of theirs, and the range of the rounds."""
    each = [our / their for their, our in zip(theirs, ours)]
    return f"{statistics.median(ours) / statistics.median(theirs):.2f} ({min(each):.2f}–{max(each):.2f})"


def speed_table(a, shape, paths):
    formats = a.formats.split(",")
    measured = {}
    for format in formats:
        print(f"{shape} {format}: {a.rounds} rounds ...", file=sys.stderr, flush=True)
        measured[format] = measure(a, paths[format])
    lines = [f"### {shape}, {a.threads} threads, medians of {a.rounds} alternating rounds", "",
             "| tokens/s: llama.cpp, eurus, ratio (range of the rounds) | " + " | ".join(formats) + " |", "|---" * (len(formats) + 1) + "|"]
    for key in ["prompt", *(int(batch) for batch in a.batches.split(","))]:
        cells = []
        for format in formats:
            theirs, ours = ([rates[key] for rates in all] for all in measured[format][:2])
            cells.append(f"{statistics.median(theirs):.0f}, {statistics.median(ours):.0f}, {ratio(theirs, ours)}")
        name = f"prompt, {a.prefill} tokens" if key == "prompt" else f"generation, batch {key}"
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    first = int(a.batches.split(",")[0])
    if first == 1:
        cells = []
        for format in formats:
            theirs, ours, memory = measured[format]
            size = step_bytes(paths[format], format, shape) / 1e9
            part = lambda all: statistics.median(100 * rates[1] * size / limit for rates, limit in zip(all, memory))
            cells.append(f"{part(theirs):.0f}%, {part(ours):.0f}% of {statistics.median(memory):.0f} GB/s")
        lines.append("| memory read at batch 1, of the probe | " + " | ".join(cells) + " |")
    return lines, {format: dict(zip(["llama_cpp", "eurus", "memory"], measured[format])) for format in formats}


# --- servers ---


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Server:
    """A server process, stopped at the end."""

    def __init__(self, command, port, path, environment=None):
        self.port = port
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
        deadline = time.monotonic() + 300
        while not self.is_up(path):
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                sys.exit(f"{command[0]} does not come up: {' '.join(command)}")
            time.sleep(0.2)

    def is_up(self, path):
        try:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
            connection.request("GET", path)
            return connection.getresponse().status == 200
        except OSError:
            return False

    def resident_mib(self):
        with open(f"/proc/{self.process.pid}/status") as status:
            return int(re.search(r"VmRSS:\s+(\d+)", status.read())[1]) / 1024

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def plan(a, path, *flags):
    """MiB of weights and of the cache, and tokens in it, as `eurus check` plans them."""
    text = run([a.eurus, "check", "--model", path, "--reward-model", "none", *flags])
    weights, weights_unit, cache, cache_unit, tokens = re.search(r"weights ([\d.]+) (\w+), cache ([\d.]+) (\w+) of \w+ for (\d+) tokens", text).groups()
    unit = {"MiB": 1.0, "GiB": 1024.0}
    return float(weights) * unit[weights_unit], float(cache) * unit[cache_unit], int(tokens)


def cache_flags(a, path):
    """A cache twice as large as the clients need: blocks are reused in turns, so all of it comes to be filled."""
    _, cache, tokens = plan(a, path)
    wanted = 2 * a.clients * (a.tokens_in + a.tokens_out + 16)
    return ["--kv-cache-gib", f"{cache / 1024 * wanted / tokens:.6f}"]


def start_ours(a, path):
    port = free_port()
    flags = ["--port", str(port), "--threads", str(a.threads), *cache_flags(a, path)]
    flags += ["--compute-dtype", "bf16"] if is_bf16(a, path) else []
    return Server([a.eurus, "serve", "--model", path, "--reward-model", "none", *flags], port, "/health", OWN)


def start_theirs(a, path):
    port, threads = free_port(), str(a.threads)
    if binary := a.llama_server or shutil.which("llama-server"):
        command = [binary, "-m", path, "--port", str(port), "-t", threads, "-tb", threads, "-np", str(a.clients), "-c", str(a.clients * 512)]
        return Server(command, port, "/health")
    command = [sys.executable, "-m", "llama_cpp.server", "--model", path, "--port", str(port), "--n_threads", threads, "--n_threads_batch", threads,
               "--n_ctx", "2048"]
    return Server(command, port, "/v1/models")


def ask(port, seed, tokens_in, tokens_out):
    """Seconds to the first token, seconds in all, tokens. A letter is a token of these models."""
    text = "".join(random.Random(str(seed)).choices("abcdefghijklmnopqrstuvwxyz", k=tokens_in))
    body = {"prompt": text, "max_tokens": tokens_out, "temperature": 0.0, "stream": True}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    started = time.perf_counter()
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    if answer.status != 200:
        sys.exit(f"{answer.status}: {answer.read()[:300]}")
    first, count = None, 0
    for line in answer:
        if not line.startswith(b"data: {"):
            continue
        if any(choice.get("finish_reason") is None for choice in json.loads(line[6:]).get("choices", [])):
            first = first or time.perf_counter() - started
            count += 1
    return first or time.perf_counter() - started, time.perf_counter() - started, count


def load(a, server, seed):
    """Tokens a second of all clients, and the median time to the first token."""
    results, lock = [], threading.Lock()

    def client(index):
        for turn in range(a.requests):
            result = ask(server.port, (seed, index, turn), a.tokens_in, a.tokens_out)
            with lock:
                results.append(result)

    started = time.perf_counter()
    clients = [threading.Thread(target=client, args=(index,)) for index in range(a.clients)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join()
    # Both are counted alike: text may come in fewer portions than tokens.
    tokens = a.clients * a.requests * a.tokens_out
    return tokens / (time.perf_counter() - started), statistics.median(first for first, _, _ in results)


def server_table(a, shape, paths):
    lines = [f"### {shape}: servers, {a.clients} clients, {a.tokens_in} tokens in, {a.tokens_out} out, medians of {a.rounds} alternating rounds", "",
             "| format | tokens/s: llama.cpp, eurus, ratio | first token, ms: llama.cpp, eurus | our memory, of weights + cache |", "|---|---|---|---|"]
    record = {}
    for format, path in paths.items():
        print(f"{shape} {format}: servers ...", file=sys.stderr, flush=True)
        ours, theirs = [], []
        for index in range(a.rounds):
            turns = [(start_theirs, theirs), (start_ours, ours)]
            for start, results in turns if index % 2 == 0 else reversed(turns):
                server = start(a, path)
                try:
                    load(a, server, -1 - index)
                    results.append((*load(a, server, index), server.resident_mib()))
                finally:
                    server.stop()
        median = lambda all, place: statistics.median(result[place] for result in all)
        rates = [[result[0] for result in all] for all in (theirs, ours)]
        planned, resident = sum(plan(a, path, *cache_flags(a, path))[:2]), median(ours, 2)
        lines.append(f"| {format} | {median(theirs, 0):.0f}, {median(ours, 0):.0f}, {ratio(*rates)} | {1e3 * median(theirs, 1):.0f}, "
                     f"{1e3 * median(ours, 1):.0f} | {resident:.0f} MiB, {100 * resident / planned:.0f}% of {planned:.0f} |")
        record[format] = {"llama_cpp": theirs, "eurus": ours, "planned_mib": planned}
    return lines, record


def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("folder", help="where models are kept")
    a.add_argument("--eurus", required=True, help="our binary")
    a.add_argument("--shapes", default="125m,1.1b", help=", ".join(SHAPES))
    a.add_argument("--formats", default="bf16,q8_0,q4_0,q4_k_m", help=", ".join(FORMATS))
    a.add_argument("--rounds", type=int, default=5)
    a.add_argument("--threads", type=int, default=2)
    a.add_argument("--prefill", type=int, default=512)
    a.add_argument("--batches", default="1,4,8,16")
    a.add_argument("--context", type=int, default=64)
    a.add_argument("--steps", type=int, default=64)
    a.add_argument("--bf16", action="store_true", help="ours multiplies bf16 weights in bf16, as llama.cpp does, not in float32")
    a.add_argument("--server", action="store_true", help="compare servers, too")
    a.add_argument("--server-only", action="store_true", help="compare nothing but servers")
    a.add_argument("--llama-server", help="the binary; else one on the path, else llama_cpp.server")
    a.add_argument("--clients", type=int, default=8)
    a.add_argument("--requests", type=int, default=4, help="of each client")
    a.add_argument("--tokens-in", type=int, default=64)
    a.add_argument("--tokens-out", type=int, default=64)
    a.add_argument("--json", help="also write every round to this file")
    a = a.parse_args()
    import llama_cpp
    print(f"llama-cpp-python {llama_cpp.__version__}, {run([a.eurus, '--version']).strip()}, {time.strftime('%d %B %Y')}\n")
    record = {}
    for shape in a.shapes.split(","):
        paths = files(a, shape)
        tables = [] if a.server_only else [speed_table]
        tables += [server_table] if a.server or a.server_only else []
        for table in tables:
            lines, rounds = table(a, shape, paths)
            record[f"{shape} {table.__name__}"] = rounds
            print("\n".join(lines) + "\n", flush=True)
    if a.json:
        with open(a.json, "w") as file:
            json.dump(record, file, indent=1)


if __name__ == "__main__":
    main()
