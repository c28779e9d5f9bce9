"""Reads a run's TensorBoard event files with TensorBoard's own loader and compares them with its metrics.jsonl.

    pip install tensorboard
    python read_events.py OUTPUT      # the folder run.output of a recipe

Every scalar of every line must be there with the same step and (as float32) the same value, and nothing else: also after the
run was resumed, when TensorBoard must forget what the resumed steps replace. Checks framing and checksums on the way.
"""
import json
import math
import struct
import sys
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c


def check_framing(path):
    """Lengths, checksums and messages of one file; returns the number of records."""
    data, place, count = path.read_bytes(), 0, 0
    while place < len(data):
        header = data[place : place + 8]
        (length,) = struct.unpack("<Q", header)
        body = data[place + 12 : place + 12 + length]
        sums = data[place + 8 : place + 12] + data[place + 12 + length : place + 16 + length]
        want = b"".join(struct.pack("<I", masked_crc32c(part)) for part in (header, body))
        assert sums == want, f"{path}: record {count} has checksums {sums.hex()} instead of {want.hex()}"
        event = Event.FromString(body)
        assert count or event.file_version == "brain.Event:2", f"{path} begins with {event}"
        place, count = place + 16 + length, count + 1
    return count


def same(a, b):
    b = struct.unpack("<f", struct.pack("<f", b))[0]
    return a == b or (math.isnan(a) and math.isnan(b))


def main(output):
    folder = output / "tensorboard"
    records = {path.name: check_framing(path) for path in sorted(folder.iterdir())}
    wanted = {}
    for line in (output / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        step, split = row.pop("step"), row.pop("split")
        for name, value in row.items():
            wanted.setdefault(f"{split}/{name}", []).append((step, math.nan if value is None else value))
    accumulator = EventAccumulator(str(folder), size_guidance={"tensors": 0, "scalars": 0})
    accumulator.Reload()
    found = {tag: [(e.step, e.value) for e in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]}
    assert sorted(found) == sorted(wanted), (sorted(found), sorted(wanted))
    for tag, values in wanted.items():
        assert [s for s, _ in found[tag]] == [s for s, _ in values], (tag, found[tag], values)
        assert all(same(a, b) for (_, a), (_, b) in zip(found[tag], values)), (tag, found[tag], values)
    print(f"{len(found)} tags, {sum(map(len, found.values()))} scalars agree; records by file: {records}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
