"""Writes tests/fixtures/train/data: UltraInteract_pair rows as the released parquet has them (snappy, lists of structs,
several row groups), and the same rows as lines, plain and as Zstandard frames.

    python3 -m venv .venv && .venv/bin/pip install pyarrow==26.0.1 zstandard
    .venv/bin/python tests/reference/train_data_reference.py
"""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

OUT = Path(__file__).resolve().parents[2] / "tests" / "fixtures" / "train" / "data"
TURN = pa.struct([("from", pa.string()), ("value", pa.string())])
SCHEMA = pa.schema([
    ("task", pa.string()), ("dataset", pa.string()), ("trajectory", pa.list_(TURN)), ("chosen", pa.string()),
    ("rejected", pa.string()), ("id", pa.string()), ("parent_id", pa.string()),
])


def rows():
    for tree in range(5):
        depth = 1 + tree % 3
        instruction = f"Solve problem {tree}: naïve ☃ {tree}+{tree}"
        trajectory = [{"from": "user", "value": instruction}]
        for turn in range(depth):
            rejected = f"Step 1: guess {turn}\nAnswer: \\boxed{{{turn - 1}}}"
            yield {
                "task": "Math_CoT", "dataset": "gsm8k", "trajectory": list(trajectory),
                "chosen": f"Step 1: add {turn}\nAnswer: \\boxed{{{tree + tree}}}", "rejected": rejected,
                "id": f"{tree:08x}_{depth}_{turn}", "parent_id": f"parent-{tree}",
            }
            trajectory.append({"from": "assistant", "value": rejected})
            trajectory.append({"from": "user", "value": f"Out: {turn}\nYour answer is wrong.\nTry again."})


def main():
    OUT.mkdir(parents=True, exist_ok=True)
    data = list(rows())
    pq.write_table(pa.Table.from_pylist(data, SCHEMA), OUT / "pairs.parquet", compression="snappy", row_group_size=4)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in data]
    (OUT / "pairs.jsonl").write_text("".join(lines), encoding="utf-8")
    # Two frames with checksums and a skippable one between them, as parallel compressors write.
    compressor = zstandard.ZstdCompressor(level=19, write_checksum=True)
    halves = ["".join(lines[:4]).encode(), "".join(lines[4:]).encode()]
    skippable = (0x184D2A50).to_bytes(4, "little") + (3).to_bytes(4, "little") + b"abc"
    (OUT / "pairs.jsonl.zst").write_bytes(skippable.join(compressor.compress(half) for half in halves))


if __name__ == "__main__":
    main()
