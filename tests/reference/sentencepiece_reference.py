#!/usr/bin/env python3
"""What SentencePiece itself makes of strings, for the test of our conversion of tokenizer.model.

For each preset trains a small BPE model on invented text and writes <out>/<name>.model and <out>/<name>.json, a list of
[text, ids, decoded text] over random strings: words of the corpus, runs of one character, runs of spaces, pieces glued
together, other scripts, and look-alikes of special tokens. Deterministic.
Needs: sentencepiece (written with 0.2.3).

  python sentencepiece_reference.py --out ../fixtures/sentencepiece
"""
import argparse
import io
import json
import os
import random
import tempfile

import sentencepiece

WORDS = """the a of to and is that it was for on are as with his they be at one have this from or had by not but what some
we can out other were all there when up use your how said an each she which do their time if will way about many then
them write would like so these her long make thing see him two has look more day could go come did number sound no most
people over know water than call first who may down side been now find step answer therefore solve naïve café übung
x=3.14e-7;// for(i=0;i<10;i++){ return\t\\boxed{42} aaaa abab aaab ==== ---- привет мир 数学 定理 証明 안녕 🙂""".split()

RULES = [("ﬁ", "fi"), ("ﬀ", "ff"), ("½", "1/2"), ("…", "..."), ("A", "a"), ("B", "b"), ("ß", "ss"),
         ("\t", " "), ("\r", " "), ("\n", " "), ("\u3000", " "), ("\u0001", ""), ("\u200b", "")]

PRESETS = {
    # The options that Mistral's and Llama's models were trained with.
    "plain": dict(vocab_size=460, byte_fallback=True, normalization_rule_name="identity", add_dummy_prefix=True,
                  remove_extra_whitespaces=False, character_coverage=0.999),
    # User-defined and control symbols, pieces across words, no bytes to fall back on.
    "symbols": dict(vocab_size=330, normalization_rule_name="identity", add_dummy_prefix=False, split_by_whitespace=False,
                    remove_extra_whitespaces=True, character_coverage=0.99, user_defined_symbols=["<sep>", "[INST]", "aab", "1"],
                    control_symbols=["<ctl>"], pad_id=3),
    # A character map of its own.
    "rules": dict(vocab_size=480, byte_fallback=True, add_dummy_prefix=True, remove_extra_whitespaces=False),
}

ODD = ["<s>", "</s>", "<unk>", "<0x0A>", "▁", "▁▁", "\n", "\r\n", "\t", "[INST]", "[/INST]", "<sep>", "<ctl>", "aab", "aaab",
       "\u200b", "\x01", "\x00", "\x7f", "\u00a0", "\u3000", "\ufeff", "�", "1", "½", "ﬁ", "Straße", "…"]
SCRIPTS = [(33, 127), (0xC0, 0x180), (0x391, 0x3C9), (0x410, 0x450), (0x5D0, 0x5EA), (0x4E00, 0x4F00), (0xAC00, 0xAD00), (0x1F600, 0x1F640)]


def corpus(rng):
    for _ in range(1500):
        yield " ".join(rng.choice(WORDS) for _ in range(rng.randint(3, 14)))
    for _ in range(500):
        yield "".join(rng.choice(["a", "b", "ab", "aa", "="]) * rng.randint(1, 6) for _ in range(rng.randint(1, 9)))


def string(rng, model):
    kind = rng.randrange(6)
    if kind == 0:
        return " ".join(rng.choice(WORDS) for _ in range(rng.randint(0, 9)))
    if kind == 1:
        return "".join(rng.choice("ab= -x1") * rng.randint(1, 17) for _ in range(rng.randint(1, 7)))
    if kind == 2:
        return "".join(rng.choice([" ", "  ", "   ", "a", "ab", "the", "ing", "."]) for _ in range(rng.randint(0, 16)))
    if kind == 3:
        return "".join(rng.choice(ODD + WORDS[:40]) for _ in range(rng.randint(1, 9)))
    if kind == 4:
        return "".join(chr(rng.randrange(*rng.choice(SCRIPTS))) + " " * (rng.random() < 0.2) for _ in range(rng.randint(1, 14)))
    pieces = [model.id_to_piece(rng.randrange(model.get_piece_size())) for _ in range(rng.randint(1, 9))]
    return "".join(pieces).replace("▁", " ")


def known_to_differ(text, options):
    """What the conversion documents as different."""
    if text in options.get("user_defined_symbols", []) and options["add_dummy_prefix"]:
        return True
    return text != "" and text.strip("\u0001\u200b") == ""


def train(options, rng, folder):
    options = dict(options)
    if "normalization_rule_name" not in options:
        # The trainer notes the path in the model: a relative one is the same for everybody.
        os.chdir(folder)
        options["normalization_rule_tsv"] = "rules.tsv"
        with open(options["normalization_rule_tsv"], "w") as file:
            code = lambda text: " ".join(f"{ord(c):X}" for c in text)
            file.writelines(f"{code(source)}\t{code(target)}\n" for source, target in RULES)
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=corpus(rng), model_writer=out, model_type="bpe", num_threads=1,
                                             minloglevel=2, hard_vocab_limit=False, **options)
    return out.getvalue()


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--out", required=True)
    arguments.add_argument("--seed", type=int, default=5)
    arguments.add_argument("--count", type=int, default=300)
    arguments = arguments.parse_args()
    out = os.path.abspath(arguments.out)
    os.makedirs(out, exist_ok=True)
    for name, options in PRESETS.items():
        rng = random.Random(arguments.seed)
        with tempfile.TemporaryDirectory() as folder:
            proto = train(options, rng, folder)
        model = sentencepiece.SentencePieceProcessor(model_proto=proto)
        with open(os.path.join(out, name + ".model"), "wb") as file:
            file.write(proto)
        texts = [string(rng, model) for _ in range(arguments.count)]
        texts = [text for text in dict.fromkeys(["", *texts]) if not known_to_differ(text, options)]
        cases = [[text, model.encode(text), model.decode(model.encode(text))] for text in texts]
        with open(os.path.join(out, name + ".json"), "w") as file:
            file.write("[\n" + ",\n".join(json.dumps(case) for case in cases) + "\n]\n")


if __name__ == "__main__":
    main()
