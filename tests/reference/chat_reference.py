"""Writes tests/fixtures/chat: small tokenizers and what transformers renders and encodes with them.

    python3 -m venv .venv && .venv/bin/pip install transformers==5.23.0 jinja2 tokenizers
    .venv/bin/python tests/reference/chat_reference.py
"""

import itertools
import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "tests" / "fixtures" / "chat"
CHATML = ["<|im_start|>", "<|im_end|>"]
LLAMA3 = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]

CORPUS = [
    "Solve the following math problem step-by-step. Present your final answer as \\boxed{Your Answer}.",
    "Step 1: 12*7 = 84. Step 2: the answer is 84. Therefore x = 3/4 and y = 0.75.",
    "[INST] What is the capital of France? [/INST] Paris is the capital of France.",
    "Write Python code to solve the task.\ndef add(a, b):\n    return a + b\n",
    "You are a helpful assistant. system user assistant think tools documents",
    "naive cafe, two  spaces,\ta tab and a new\nline: user says hello to the assistant.",
] * 4


def sentencepiece_like(normalizer, pre_tokenizer):
    """BPE with byte fallback, as converted Llama tokenizers have it: ids 0 to 2 special, then 256 byte tokens."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    control = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=520, special_tokens=control + [f"<0x{byte:02X}>" for byte in range(256)])
    tokenizer.train_from_iterator(CORPUS, trainer)
    data = json.loads(tokenizer.to_str())
    data["added_tokens"] = data["added_tokens"][:3]
    tokenizer = Tokenizer.from_str(json.dumps(data))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in CHATML])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in ["<think>", "</think>"]])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def byte_level():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in LLAMA3 + CHATML])
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(
                single="<|begin_of_text|> $A",
                special_tokens=[("<|begin_of_text|>", tokenizer.token_to_id("<|begin_of_text|>"))],
            ),
        ]
    )
    return tokenizer


def tokenizers():
    prepend = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    first = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return {
        "prepend": (sentencepiece_like(prepend, None), "<s>", "</s>", "<unk>"),
        "metaspace-first": (sentencepiece_like(None, first), "<s>", "</s>", "<unk>"),
        "byte-level": (byte_level(), "<|begin_of_text|>", "<|eot_id|>", None),
    }


ALTERNATE = "roles must alternate"
TEMPLATES = {
    # Turns with BOS, [INST] and EOS, no space before the answer: how Mistral's first instruct models ask.
    "instruct": "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('" + ALTERNATE + "') }}{% endif %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ message['content'] + eos_token }}{% else %}{{ raise_exception('unknown role') }}{% endif %}{% endfor %}",
    # The same with the space that the reward model's card has.
    "instruct-space": "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}",
    "chatml": "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}"
    "{% endif %}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' "
    "+ '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}\n",
    # Block tags on lines of their own, namespaces, slices, methods, loop controls, generation marks, tojson, kwargs.
    "thinking": """\
{%- set ns = namespace(last=-1) %}
{%- for message in messages[::-1] %}
    {%- if message.role == 'user' %}
        {%- set ns.last = messages|length - 1 - loop.index0 %}
        {%- break %}
    {%- endif %}
{%- endfor %}
{% if tools is not none %}
# tools
{{ tools | tojson }}
{{ tools | tojson(indent=2) }}
{% endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' and '</think>' in message.content and loop.index0 < ns.last %}
        {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}
    {%- else %}
        {%- set content = message.content %}
    {%- endif %}
<|im_start|>{{ message.role }}
    {% generation %}
{{ content }}<|im_end|>
    {% endgeneration %}
{%- endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{%- if enable_thinking is defined and enable_thinking is false %}

<think>

</think>
{%- endif %}
{% endif %}
{{ undefined_name }}{{ none }} {{ true }} {{ 1.0 }} {{ 'ab'.upper() }} {{ ['a', 'b'] | join('-') }} {{ strftime_later is defined }}
""",
    "llama3": "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}",
}
FITS = {
    "mini": ["own"],
    "prepend": ["instruct", "instruct-space", "chatml", "thinking"],
    "metaspace-first": ["instruct", "instruct-space", "chatml"],
    "byte-level": ["llama3", "chatml", "thinking"],
}


# Expressions that published templates use, rendered with one message and no tools.
SNIPPETS = [
    "{{ messages | tojson }}|{{ {'b': 1.5, 'a': [none, true, 'é<\\u2028\\x01\\\\\"']} | tojson(indent=2) }}|{{ [] | tojson(indent=2) }}",
    "{{ {'b': 1, 'a': {'d': 2, 'c': 3}} | tojson(sort_keys=true) }}|{{ [1, 2] | string }}|{{ {'a': [1, none, true, 'x']} }}",
    "{{ 'x' ~ none ~ true }} {{ 7 // 2 }} {{ 7 / 2 }} {{ 7 % 4 }} {{ 2 ** 3 }} {{ 'abc'[-1] }} {{ 'abc'[1:] }} {{ 'a,b'.split(',') }}",
    "{{ messages[0].get('x') }}|{{ messages[0].get('x', 'y') }}|{{ messages[0].keys() | list }}|{{ messages[0].x }}|{{ 'x' in messages[0] }}",
    "{%- macro f(x, y='z') -%}{{ x }}{{ y }}!{%- endmacro -%}{{ f('a') }}{{ f('a', y='b') }}"
    "{% for k, v in {'a': 1, 'b': 2}.items() %}{{ k }}{{ v }}{{ ',' if not loop.last }}{% endfor %}",
    "{% set x %}abc{% endset %}{{ x | trim }}{{ 'A' if x is string and messages is sequence and messages[0] is mapping else 'B' }}"
    "{{ x | length }}{{ dict(a=1) }}{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ 'ab' in 'cabd' }}",
    "{{ messages | map(attribute='role') | join(',') }}{{ (messages | first).role }}{{ messages[-1]['content'] | default('d') }}{{ q | default('d') }}",
    "{% for i in range(5) %}{% if i == 1 %}{% continue %}{% endif %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{{ loop.length }}{% endfor %}",
    "{{ '  ab '.strip() }}|{{ 'ab'.startswith('a') }}|{{ 'aXbX'.replace('X', '-') }}|{{ 'a b'.title() }}|{{ 'abcabc'.rfind('c') }}|{{ '\\n\\nx\\n'.strip('\\n') }}",
    "a\n  {% if true %}\n  b\n  {%- generation %}\n c\n  {%+ endgeneration -%}\n\n d\n  {% endif %}\ne\n\n",
    "{% set ns = namespace(a=1) %}{% for i in [1, 2] %}{% set ns.a = ns.a + i %}{% endfor %}{{ ns.a }}{{ '%s-%d' | format('x', 3) }}{{ 'a' if none is none }}",
    "{%- if tools is not none and tools %}t{% endif %}{% if not tools %}none{% endif %}{{ documents is none }}{{ add_generation_prompt }}{{ [1, 2] + [3] }}",
    "{# gone #}\n  {# gone #}\nx {{- ' y' -}} \n z\n{%- for c in 'ab' %}\n{{ c }}\n{%- endfor %}\n\n",
]


def turns(*contents, system=None):
    roles = itertools.cycle(["user", "assistant"])
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents)]
    return ([{"role": "system", "content": system}] if system else []) + messages


CONVERSATIONS = [
    turns("What is 12*7?"),
    turns("What is 12*7?", "Step 1: 12*7 = 84"),
    turns("  two  spaces \n", " lead and trail  "),
    turns("naïve café — 数学 🙂", "Here: 数", "again?\n\n", "\\boxed{\\frac{3}{4}}"),
    turns("Use the numbers 2, 5, 8 to make 36.", "(2 + 5) * 8", "No."),
    turns("Q", "<think>\nhm\n</think>\n\nA", "R", "<think>\nhm\n</think>\n\nB"),
    turns("hello", "hi", system="You are terse."),
    turns("<b>&'\"{{ 7*7 }}{% if x %}", "{# no #} 'quoted'"),
]
TOOLS = [{"type": "function", "function": {"name": "add", "description": "a < b & 'c' é", "parameters": {"z": 1, "a": [1.5, None, True, {}]}}}]


def endings(messages):
    yield "prompt", {"add_generation_prompt": True}
    yield "complete", {}
    if messages[-1]["role"] == "assistant":
        yield "continue", {"continue_final_message": True}


def cases(name, tokenizer, templates):
    for template in FITS[name]:
        variants = [{}]
        if template == "thinking":
            variants += [{"tools": TOOLS}, {"enable_thinking": False}]
        for (index, messages), kwargs in itertools.product(enumerate(CONVERSATIONS), variants):
            if messages[0]["role"] == "system" and template not in ("chatml", "thinking", "llama3"):
                continue
            for ending, options in endings(messages):
                text = tokenizer.apply_chat_template(
                    messages, chat_template=templates[template], tokenize=False, **options, **kwargs
                )
                ids = tokenizer(text, add_special_tokens=False)["input_ids"]
                case = {"template": template, "conversation": index, "ending": ending, "text": text, "ids": ids}
                yield case | ({"kwargs": kwargs} if kwargs else {})


def main():
    OUT.mkdir(parents=True, exist_ok=True)
    mini = AutoTokenizer.from_pretrained(ROOT / "models" / "eurus-mini" / "policy")
    templates = TEMPLATES | {"own": (ROOT / "models/eurus-mini/policy/chat_template.jinja").read_text()}
    loaded = {"mini": mini}
    for name, (tokenizer, bos, eos, unk) in tokenizers().items():
        (OUT / f"{name}.tokenizer.json").write_text(tokenizer.to_str() + "\n")
        loaded[name] = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, unk_token=unk)
    expected = {
        "templates": TEMPLATES,
        "conversations": CONVERSATIONS,
        "snippets": [
            {"template": text, "text": mini.apply_chat_template(turns("Hi"), chat_template=text, tokenize=False)}
            for text in SNIPPETS
        ],
        "tokenizers": {
            name: {
                "bos": tokenizer.bos_token,
                "eos": tokenizer.eos_token,
                "unk": tokenizer.unk_token,
                "cases": list(cases(name, tokenizer, templates)),
                "plain": [
                    {"text": text, "ids": tokenizer(text)["input_ids"], "decoded": tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"], skip_special_tokens=True)}
                    for text in ["", " ", "Paris", " Paris", "naïve 数🙂\n\n x", "a</s> b", "[INST] q [/INST] a", "<s>", "<think> x"]
                ],
            }
            for name, tokenizer in loaded.items()
        },
    }
    text = json.dumps(expected, ensure_ascii=False, indent=None, separators=(",", ":"))
    (OUT / "expected.json").write_text(text.replace('{"template"', '\n{"template"') + "\n")


main()
