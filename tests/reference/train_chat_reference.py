#!/usr/bin/env python3
"""Writes tests/fixtures/train/chat: messages -> text, ids and the assistant's tokens by {% generation %}, as transformers has them.
   python tests/reference/train_chat_reference.py --tokenizer DIR --out tests/fixtures/train/chat"""
import argparse, json, os, shutil
from transformers import PreTrainedTokenizerFast
T = ("{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
     "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% elif m['role'] == 'assistant' %}{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}{% endif %}{% endfor %}")
C = [[("user", "Use the numbers 2, 6, 3 to make 36."), ("assistant", "Step 1: 6*2=12, left 3 12\nStep 2: 12*3=36, left 36\nAnswer: \\boxed{6*2*3}")],
     [("user", "Use the numbers 1, 2, 9 to make 20."), ("assistant", "Answer: \\boxed{1*2*9}"), ("user", "Out: 18\nYour answer is wrong. 18 is not 20."), ("assistant", "Step 1: 9+1=10, left 2 10\nStep 2: 10*2=20, left 20\nAnswer: \\boxed{(9+1)*2}")],
     [("user", "héllo – naïve ☃ 12345"), ("assistant", "")],
     [("user", "a [INST] b [/INST] </s> <s>"), ("assistant", "</s> inside"), ("user", "x"), ("assistant", "y"), ("user", "z"), ("assistant", "w")]]
a = argparse.ArgumentParser(); a.add_argument("--tokenizer", required=True); a.add_argument("--out", required=True); a = a.parse_args()
os.makedirs(a.out, exist_ok=True); tk = PreTrainedTokenizerFast.from_pretrained(a.tokenizer); tk.chat_template = T; rows = []
for c in C:
    m = [dict(role=r, content=t) for r, t in c]; o = tk.apply_chat_template(m, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    rows.append(dict(messages=m, text=tk.apply_chat_template(m, tokenize=False), input_ids=list(o["input_ids"]), assistant_mask=list(o["assistant_masks"])))
    p = tk.apply_chat_template(m[:-1], tokenize=False, add_generation_prompt=True); rows[-1]["prompt_text_without_last_turn"] = p
json.dump(dict(template=T, rows=rows), open(f"{a.out}/chat.json", "w"), indent=1, ensure_ascii=False); shutil.copy(f"{a.tokenizer}/tokenizer.json", f"{a.out}/tokenizer.json")
for r in rows: print(len(r["input_ids"]), sum(r["assistant_mask"]), repr(r["text"][:90]))
