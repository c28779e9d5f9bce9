#!/usr/bin/env python3
"""Times llama.cpp on the weights of one of our checkpoints, in the shape of `eurus bench model --json`.

  python compare_llama_cpp.py CHECKPOINT [--threads 2] [--prefill 512] [--batches 1,4,8,16] [--context 64] [--steps 64]
  python compare_llama_cpp.py CHECKPOINT --eurus target/release/eurus     alternates with our own run and prints ratios
  python compare_llama_cpp.py CHECKPOINT --formats bf16,q8_0,q4_0,q4_k_m  the same for every format

Needs: pip install llama-cpp-python gguf numpy. A GGUF file for each format is written beside the checkpoint once, and both run it.
"""
import argparse, ctypes, json, os, statistics, subprocess, sys, time
import numpy as np


def read_safetensors(path):
    with open(path, "rb") as f:
        size = int.from_bytes(f.read(8), "little")
        header = json.loads(f.read(size))
        data = np.memmap(path, dtype=np.uint8, mode="r", offset=8 + size)
        for name, info in header.items():
            if name != "__metadata__":
                begin, end = info["data_offsets"]
                yield name, info["dtype"], info["shape"], np.asarray(data[begin:end])


def permute(raw, heads, rows, columns, width):
    """Hugging Face keeps the two halves of a rotated head apart, GGUF interleaves them."""
    return np.ascontiguousarray(raw.reshape(heads, 2, rows // heads // 2, columns * width).swapaxes(1, 2)).reshape(rows, columns * width)


def to_gguf(folder, out):
    import gguf
    config = json.load(open(os.path.join(folder, "config.json")))
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    w = gguf.GGUFWriter(out, "llama")
    w.add_context_length(config["max_position_embeddings"]); w.add_embedding_length(config["hidden_size"])
    w.add_block_count(config["num_hidden_layers"]); w.add_feed_forward_length(config["intermediate_size"])
    w.add_head_count(heads); w.add_head_count_kv(kv_heads); w.add_layer_norm_rms_eps(config["rms_norm_eps"])
    w.add_rope_dimension_count(config["hidden_size"] // heads); w.add_rope_freq_base(config["rope_theta"])
    w.add_vocab_size(config["vocab_size"]); w.add_tokenizer_model("none")
    w.add_string("tokenizer.huggingface.json", open(os.path.join(folder, "tokenizer.json")).read())  # for us; llama.cpp gets ids
    names = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight", "lm_head.weight": "output.weight"}
    parts = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
             "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
    kinds = {"BF16": (gguf.GGMLQuantizationType.BF16, 2), "F16": (gguf.GGMLQuantizationType.F16, 2), "F32": (gguf.GGMLQuantizationType.F32, 4)}
    for name, dtype, shape, raw in read_safetensors(os.path.join(folder, "model.safetensors")):
        if name in names:
            target = names[name]
        else:
            _, _, layer, rest = name.split(".", 3)
            target = f"blk.{layer}.{parts[rest.removesuffix('.weight')]}.weight"
        kind, width = kinds[dtype]
        if len(shape) == 1:            # norms are float32 in GGUF
            values = {"BF16": lambda r: (r.view(np.uint16).astype(np.uint32) << 16).view(np.float32), "F16": lambda r: r.view(np.float16).astype(np.float32), "F32": lambda r: r.view(np.float32)}[dtype](raw)
            w.add_tensor(target, values)
            continue
        rows, columns = shape
        raw = raw.reshape(rows, columns * width)
        if rest_is_rotated(name):
            raw = permute(raw, heads if "q_proj" in name else kv_heads, rows, columns, width)
        if kind == gguf.GGMLQuantizationType.F32:
            w.add_tensor(target, raw.view(np.float32))
        elif kind == gguf.GGMLQuantizationType.F16:
            w.add_tensor(target, raw.view(np.float16))
        else:
            w.add_tensor(target, raw, raw_dtype=kind)
    w.write_header_to_file(); w.write_kv_data_to_file(); w.write_tensors_to_file(); w.close()


FORMATS = {"q4_0": 2, "q8_0": 7, "q4_k_m": 15, "q5_k_m": 17, "q6_k": 18}  # llama.cpp's numbers of file types


def quantised(source, format):
    """The file of `source`, which is not quantised, in `format`."""
    import llama_cpp as L
    target = source.replace("bf16.gguf", f"{format}.gguf")
    if not os.path.exists(target):
        params = L.llama_model_quantize_default_params()
        params.ftype, params.nthread = FORMATS[format], 2
        L.llama_log_set(QUIET, ctypes.c_void_p(0))
        if L.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params)) != 0:
            sys.exit(f"{target} could not be written")
    return target


def rest_is_rotated(name):
    return "q_proj" in name or "k_proj" in name


class Peer:
    def __init__(self, path, threads, positions):
        import llama_cpp as L
        self.L = L
        L.llama_log_set(QUIET, ctypes.c_void_p(0))
        L.llama_backend_init()
        self.model = L.llama_model_load_from_file(path.encode(), L.llama_model_default_params())
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
        t = time.perf_counter(); self.decode(rows)
        return tokens / (time.perf_counter() - t)

    def generate(self, batch, context, steps):
        self.clear()
        for s in range(batch):
            self.decode([(3 + i % 200, i, s, i == context - 1) for i in range(context)])
        t = time.perf_counter()
        for step in range(steps):
            self.decode([(3 + step, context + step, s, True) for s in range(batch)])
        return batch * steps / (time.perf_counter() - t)


QUIET = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)


def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("checkpoint"); a.add_argument("--threads", type=int, default=2); a.add_argument("--prefill", type=int, default=512)
    a.add_argument("--batches", default="1,4,8,16"); a.add_argument("--context", type=int, default=64); a.add_argument("--steps", type=int, default=64)
    a.add_argument("--eurus", help="our binary, for ratios"); a.add_argument("--rounds", type=int, default=5)
    a.add_argument("--formats", default="bf16", help=f"bf16 (or what the checkpoint has), {', '.join(FORMATS)}")
    a = a.parse_args()
    source = os.path.join(a.checkpoint, "bf16.gguf")
    if not os.path.exists(source):
        to_gguf(a.checkpoint, source)
    for format in a.formats.split(","):
        path = source if format == "bf16" else quantised(source, format)
        print(f"{format} ({os.path.getsize(path) / 2**20:.0f} MiB)", flush=True)
        compare(a, path)


def compare(a, path):
    batches = [int(b) for b in a.batches.split(",")]
    peer = Peer(path, a.threads, max(a.prefill, max(batches) * (a.context + a.steps)) + 64)
    peer.prefill(a.prefill)
    theirs, ours = {}, {}
    for _ in range(a.rounds):
        theirs.setdefault("prefill", []).append(peer.prefill(a.prefill))
        for b in batches:
            theirs.setdefault(f"decode {b}", []).append(peer.generate(b, a.context, a.steps))
        if a.eurus:
            out = subprocess.run([a.eurus, "bench", "model", "--model", path, "--threads", str(a.threads), "--prefill", str(a.prefill), "--batches", a.batches,
                                  "--context", str(a.context), "--steps", str(a.steps), "--json"], check=True, capture_output=True, text=True).stdout
            report = json.loads(out)
            ours.setdefault("prefill", []).append(report["prefill_tokens_per_second"])
            for row in report["decode"]:
                ours.setdefault(f"decode {row['batch']}", []).append(row["tokens_per_second"])
    peer.close()
    for key, values in theirs.items():
        median = statistics.median(values)
        line = f"  {key:<10} llama.cpp {median:9.1f} tok/s"
        if a.eurus:
            mine = statistics.median(ours[key]); line += f"   eurus {mine:9.1f} tok/s   ratio {mine / median:5.2f}"
        print(line, flush=True)


if __name__ == "__main__":
    main()
