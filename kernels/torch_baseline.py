"""Times the shapes of `eurus bench kernels` with PyTorch on the same GPU: copy, matrix products, attention by its flash and cuDNN
backends. Prints lines in the same form."""

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE = 4096, 32, 8, 128, 14336


def timed(call, count=20):
    for _ in range(3):
        call()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(count):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / count * 1e-3


def show(name, seconds, work, unit):
    scale = 1e9 if unit == "GB/s" else 1e12
    print(f"{name:<44} {seconds * 1e6:>12.1f} us {work / seconds / scale:>10.1f} {unit}", flush=True)


def random(*shape):
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def attention(name, q, k, v, work, unit, causal):
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        try:
            with sdpa_kernel(backend):
                seconds = timed(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True))
            show(f"{name}, {backend.name.split('_')[0].lower()}", seconds, work, unit)
        except RuntimeError as error:
            print(f"{name}, {backend.name}: {str(error).splitlines()[0]}")


print(torch.cuda.get_device_name(), "torch", torch.__version__, "CUDA", torch.version.cuda)
x = random(1 << 29)
show("copy", timed(lambda: x.clone()), 2 * x.nbytes, "GB/s")
del x
weight = random(2 * INTERMEDIATE, HIDDEN)
for rows in (1, 2, 4, 8, 16, 128, 2048):
    x = random(rows, HIDDEN)
    work, unit = (weight.nbytes, "GB/s") if rows <= 16 else (2 * rows * weight.numel(), "TFLOP/s")
    show(f"linear, {rows} x {HIDDEN} by {HIDDEN} x {2 * INTERMEDIATE}", timed(lambda: F.linear(x, weight)), work, unit)
for length in (512, 2048, 8192):
    q = random(1, HEADS, length, HEAD_DIM)
    k, v = random(1, KV_HEADS, length, HEAD_DIM), random(1, KV_HEADS, length, HEAD_DIM)
    work = 2 * length * (length + 1) * HEADS * HEAD_DIM
    attention(f"prefill attention, {length} tokens", q, k, v, work, "TFLOP/s", True)
for sequences in (1, 8, 32, 128):
    for context in (1024, 4096):
        q = random(sequences, HEADS, 1, HEAD_DIM)
        k, v = random(sequences, KV_HEADS, context, HEAD_DIM), random(sequences, KV_HEADS, context, HEAD_DIM)
        attention(f"decode attention, {sequences} x {context} positions", q, k, v, 2 * k.nbytes, "GB/s", False)
