"""Draws training/figure5.svg: implicit rewards of chosen and rejected answers and their margin under DPO, KTO and NCA.

  python3 training/plot.py [runs] [training/figure5.svg]

Reads the metrics.jsonl of runs/mini-dpo, mini-kto and mini-nca; the standard library only."""
import json
import sys

RUNS = sys.argv[1] if len(sys.argv) > 1 else "runs"
OUT = sys.argv[2] if len(sys.argv) > 2 else "training/figure5.svg"
STAGES = {"dpo": "#c0392b", "kto": "#2471a3", "nca": "#1e8449"}
PANELS = {"rewards/chosen": "chosen", "rewards/rejected": "rejected", "rewards/margins": "margin"}
WIDTH, HEIGHT, LEFT, TOP, GAP = 230, 170, 46, 30, 62
WINDOW = 15


def smooth(points):
    """Running means over WINDOW steps."""
    for i, (step, _) in enumerate(points):
        near = [value for _, value in points[max(0, i - WINDOW + 1):i + 1]]
        yield step, sum(near) / len(near)


def curves():
    found = {}
    for stage in STAGES:
        with open(f"{RUNS}/mini-{stage}/metrics.jsonl", encoding="utf-8") as lines:
            rows = [row for row in map(json.loads, lines) if row["split"] == "train"]
        for key in PANELS:
            found[stage, key] = list(smooth([(row["step"], row[key]) for row in rows if key in row]))
    return found


def panel(found, number, key):
    x0 = LEFT + number * (WIDTH + GAP)
    lines = {stage: found[stage, key] for stage in STAGES}
    values = [value for line in lines.values() for _, value in line] + [0.0]
    low, high = min(values), max(values)
    steps = max(step for line in lines.values() for step, _ in line)
    x = lambda step: x0 + WIDTH * step / steps
    y = lambda value: TOP + HEIGHT * (high - value) / (high - low)
    out = [f'<text x="{x0 + WIDTH / 2}" y="18" text-anchor="middle" font-weight="bold">{PANELS[key]}</text>',
           f'<rect x="{x0}" y="{TOP}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#bbb"/>',
           f'<line x1="{x0}" x2="{x0 + WIDTH}" y1="{y(0):.1f}" y2="{y(0):.1f}" stroke="#888" stroke-dasharray="3 3"/>']
    for value in (low, 0.0, high):
        out.append(f'<text x="{x0 - 5}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.2f}</text>')
    out.append(f'<text x="{x0 + WIDTH}" y="{TOP + HEIGHT + 15}" text-anchor="end">{steps} steps</text>')
    for stage, line in lines.items():
        points = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in line)
        out.append(f'<polyline points="{points}" fill="none" stroke="{STAGES[stage]}" stroke-width="1.5"/>')
    return out


def main():
    found, width, height = curves(), LEFT + 3 * (WIDTH + GAP), TOP + HEIGHT + 45
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="11">',
           f'<rect width="{width}" height="{height}" fill="#fff"/>']
    for number, key in enumerate(PANELS):
        out += panel(found, number, key)
    for number, (stage, colour) in enumerate(STAGES.items()):
        out.append(f'<text x="{LEFT + 60 * number}" y="{height - 10}" fill="{colour}" font-weight="bold">{stage.upper()}</text>')
    with open(OUT, "w", encoding="utf-8") as file:
        file.write("\n".join(out + ["</svg>\n"]))


main()
