"""Writes tests/fixtures/gguf: one small random model in several GGUF formats, one with eight experts, and what llama.cpp computes with
each.

    python tests/reference/gguf_reference.py tests/fixtures/gguf

needs llama-cpp-python 0.3.36, gguf 0.19 and numpy 2. Besides the files it writes expected.json: for every file the logits of
llama.cpp at the last position of a prompt, all at once and token by token (its kernels for many rows and for one differ: that is
its own noise), those of a float64 implementation below on the dequantised weights, and the tokens of some texts.
"""

import ctypes
import json
import sys
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader, GGUFWriter

LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN = 1, 256, 4, 2, 64, 256
EXPERTS, EXPERTS_USED = 8, 2
EPS, THETA = 1e-5, 10000.0
PROMPT = "[INST] How many apples are left? [/INST] Step 1: 3 * 8 = 24"
TEXTS = [PROMPT, "Hello  world\nnaïve 猫 </s> x", " 12+3=15."]
MISTRAL = "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"


def vocabulary():
    """Bytes, some letters and joined pieces, in SentencePiece's manner."""
    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    pieces += [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)]
    joined = ["\u2581a", "re", "\u2581are", "le", "pp", "pple", "\u2581apple", "es", "Ste", "te", "St", "In", "\u25811"]
    # Pieces arise from two pieces each: "te" before "Ste", "pp" and "le" before "pple".
    scores = {piece: -float(index) for index, piece in enumerate(joined)}
    pieces += [(piece, scores[piece], 1) for piece in joined]
    letters = sorted(set("\u2581abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789[]/?*+=.,:-\n()"))
    pieces += [(letter, -100.0 - index, 1) for index, letter in enumerate(letters)]
    pieces += [(chr(0xC0 + index), -1000.0 - index, 1) for index in range(512 - len(pieces))]
    return pieces


def permute(weight, heads):
    """As llama.cpp's converter."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def tensors(vocab, experts=None):
    rng = np.random.default_rng(7)
    draw = lambda *shape: (rng.standard_normal(shape) * 0.08).astype(np.float32)
    norm = lambda: (1 + 0.2 * rng.standard_normal(HIDDEN)).astype(np.float32)
    out = {"token_embd.weight": draw(vocab, HIDDEN) * 4, "output.weight": draw(vocab, HIDDEN) * 2, "output_norm.weight": norm()}
    for layer in range(LAYERS):
        part = lambda name: f"blk.{layer}.{name}.weight"
        out[part("attn_norm")], out[part("ffn_norm")] = norm(), norm()
        out[part("attn_q")] = permute(draw(HEADS * HEAD_DIM, HIDDEN), HEADS)
        out[part("attn_k")] = permute(draw(KV_HEADS * HEAD_DIM, HIDDEN), KV_HEADS)
        out[part("attn_v")] = draw(KV_HEADS * HEAD_DIM, HIDDEN)
        out[part("attn_output")] = draw(HIDDEN, HEADS * HEAD_DIM)
        if experts is None:
            out[part("ffn_gate")], out[part("ffn_up")], out[part("ffn_down")] = draw(FFN, HIDDEN), draw(FFN, HIDDEN), draw(HIDDEN, FFN)
        else:
            out[part("ffn_gate_inp")] = draw(experts, HIDDEN) * 4
            out[part("ffn_gate_exps")], out[part("ffn_up_exps")] = draw(experts, FFN, HIDDEN), draw(experts, FFN, HIDDEN)
            out[part("ffn_down_exps")] = draw(experts, HIDDEN, FFN)
    return out


def write(path, weights, pieces, kind, experts=None):
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    if experts is not None:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(EXPERTS_USED)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(EPS)
    writer.add_rope_freq_base(THETA)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_vocab_size(len(pieces))
    writer.add_tokenizer_model("llama")
    writer.add_token_list([text for text, _, _ in pieces])
    writer.add_token_scores([score for _, score, _ in pieces])
    writer.add_token_types([kind for _, _, kind in pieces])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_chat_template(MISTRAL)
    for name, weight in weights.items():
        dtype = Type.F32 if weight.ndim == 1 else kind
        writer.add_tensor(name, gguf.quants.quantize(weight, dtype), raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantize(source, target, ftype):
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = ftype
    params.nthread = 2
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params)) != 0:
        raise SystemExit(f"{target} could not be made")


def llama(path, tokens, batch):
    model = llama_cpp.Llama(
        str(path), n_ctx=256, n_batch=batch, n_ubatch=batch, n_threads=2, n_threads_batch=2, logits_all=True, verbose=False,
        type_k=0, type_v=0, flash_attn=False,
    )
    model.eval(tokens)
    return np.array(model.scores[len(tokens) - 1])


def exact(path, tokens):
    """Logits of the last token in float64, of the weights as they are stored."""
    weights = {t.name: gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float64) for t in GGUFReader(path).tensors}
    norm = lambda x, w: x / np.sqrt((x * x).mean(-1, keepdims=True) + EPS) * w
    angles = np.arange(len(tokens))[:, None] * THETA ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM)

    def rope(x):
        even, odd, cos, sin = x[..., ::2], x[..., 1::2], np.cos(angles)[:, None], np.sin(angles)[:, None]
        return np.stack([even * cos - odd * sin, even * sin + odd * cos], -1).reshape(x.shape)

    x = weights["token_embd.weight"][tokens]
    future = np.triu(np.full((len(tokens), len(tokens)), -np.inf), 1)
    for layer in range(LAYERS):
        part = lambda name: weights[f"blk.{layer}.{name}.weight"]
        h = norm(x, part("attn_norm"))
        heads = lambda name: (h @ part(name).T).reshape(len(tokens), -1, HEAD_DIM)
        q, k, v = rope(heads("attn_q")), rope(heads("attn_k")), heads("attn_v")
        k, v = (np.repeat(x, HEADS // KV_HEADS, 1) for x in (k, v))
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(HEAD_DIM) + future
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        attended = np.einsum("hqk,khd->qhd", scores / scores.sum(-1, keepdims=True), v)
        x = x + attended.reshape(len(tokens), -1) @ part("attn_output").T
        h = norm(x, part("ffn_norm"))
        silu = lambda x: x / (1 + np.exp(-x))
        if f"blk.{layer}.ffn_gate.weight" in weights:
            x = x + (silu(h @ part("ffn_gate").T) * (h @ part("ffn_up").T)) @ part("ffn_down").T
            continue
        shares = np.exp(h @ part("ffn_gate_inp").T)
        for row, chosen in enumerate(np.argsort(-shares, -1)[:, :EXPERTS_USED]):
            for expert in chosen:
                gate, up, down = (part(f"ffn_{name}_exps")[expert] for name in ("gate", "up", "down"))
                x[row] += shares[row, expert] / shares[row, chosen].sum() * (silu(h[row] @ gate.T) * (h[row] @ up.T)) @ down.T
    return norm(x, weights["output_norm.weight"])[-1] @ weights["output.weight"].T


def main():
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    pieces = vocabulary()
    weights = tensors(len(pieces))
    write(folder / "bf16.gguf", weights, pieces, Type.BF16)
    full = folder / "f32.tmp"
    write(full, weights, pieces, Type.F32)
    kinds = {"q8_0": 7, "q4_0": 2, "q4_k_m": 15, "q5_k_m": 17}
    for name, ftype in kinds.items():
        quantize(full, folder / f"{name}.gguf", ftype)
    write(full, tensors(len(pieces), EXPERTS), pieces, Type.F32, EXPERTS)
    kinds["experts_q4_k_m"] = kinds["q4_k_m"]
    quantize(full, folder / "experts_q4_k_m.gguf", kinds["q4_k_m"])
    full.unlink()
    expected = {"prompt": PROMPT, "files": {}}
    for name in ["bf16", *kinds]:
        path = folder / f"{name}.gguf"
        model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
        tokens = [model.tokenize(text.encode(), add_bos=True, special=True) for text in TEXTS]
        whole, single, true = llama(path, tokens[0], 256), llama(path, tokens[0], 1), exact(path, tokens[0])
        kinds_used = sorted({t.tensor_type.name for t in GGUFReader(path).tensors})
        off = lambda a, b: float(np.sqrt(((a - b) ** 2).mean()) / true.std())
        print(f"{name:7} {path.stat().st_size:8} {kinds_used} std {true.std():.3f} relative rms: llama.cpp - exact {off(whole, true):.2e},",
              f"at once - one by one {off(whole, single):.2e}, one by one - exact {off(single, true):.2e}")
        expected["texts"] = [{"text": text, "ids": ids} for text, ids in zip(TEXTS, tokens)]
        rounded = lambda x: [round(float(v), 6) for v in x]
        expected["files"][f"{name}.gguf"] = {"llama_cpp": rounded(whole), "llama_cpp_one_by_one": rounded(single), "exact": rounded(true)}
    (folder / "expected.json").write_text(json.dumps(expected) + "\n")


main()
