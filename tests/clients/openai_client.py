#!/usr/bin/env python3
"""The server as openai-python sees it: chat, streams, several choices, completions, models, typed errors.

Needs EURUS_URL, the address of a server of the built-in models. Fails with an AssertionError.
"""
import os

import openai

URL = os.environ["EURUS_URL"]
POLICY, REWARD = "eurus-mini/policy", "eurus-mini/reward"
QUESTION = [{"role": "user", "content": "Use the numbers 3, 5, 8 to make 29."}]

client = openai.OpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0)


def chat():
    answer = client.chat.completions.create(model=POLICY, messages=QUESTION, max_tokens=128, temperature=0, logprobs=True, top_logprobs=2)
    choice = answer.choices[0]
    assert answer.object == "chat.completion" and choice.message.role == "assistant"
    assert choice.finish_reason == "stop", choice
    assert "\\boxed{" in choice.message.content, choice.message.content
    usage = answer.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    tokens = choice.logprobs.content
    assert "".join(token.token for token in tokens).startswith(choice.message.content)
    for token in tokens:
        assert len(token.top_logprobs) == 2
        # Greedy: the token drawn is the most probable one.
        assert token.logprob == token.top_logprobs[0].logprob >= token.top_logprobs[1].logprob
    return choice.message.content


def stream(want):
    text, reasons, usages = "", [], []
    for chunk in client.chat.completions.create(
        model=POLICY, messages=QUESTION, max_completion_tokens=128, temperature=0, stream=True, stream_options={"include_usage": True}
    ):
        if chunk.usage:
            assert chunk.choices == []
            usages.append(chunk.usage)
        for choice in chunk.choices:
            text += choice.delta.content or ""
            reasons += [choice.finish_reason] if choice.finish_reason else []
    assert text == want, (text, want)
    assert reasons == ["stop"], reasons
    assert len(usages) == 1 and usages[0].completion_tokens > 0


def several_choices():
    def texts():
        answer = client.chat.completions.create(model=POLICY, messages=QUESTION, n=3, temperature=1, seed=5, max_tokens=48)
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        return [choice.message.content for choice in answer.choices]

    first = texts()
    assert len(set(first)) > 1, first
    assert texts() == first, "a seed did not reproduce"


def completions():
    prompts = ["[INST] Use the numbers 3, 5, 8 to make 29. [/INST]", "[INST] Use the numbers 1, 2, 3 to make 7. [/INST]"]
    answer = client.completions.create(model=POLICY, prompt=prompts, max_tokens=1, temperature=0, echo=True, logprobs=1)
    assert [choice.index for choice in answer.choices] == [0, 1]
    for prompt, choice in zip(prompts, answer.choices):
        assert choice.text.startswith(prompt), choice.text
        found = choice.logprobs
        assert found.token_logprobs[0] is None and all(value <= 0 for value in found.token_logprobs[1:])
        assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == len(found.text_offset)
        # The most probable alternative is never less probable than the token that stands there.
        for value, top in zip(found.token_logprobs[1:], found.top_logprobs[1:]):
            assert max(top.values()) >= value


def models():
    listed = client.models.list().data
    assert [model.id for model in listed] == [POLICY, REWARD]
    assert client.models.retrieve(REWARD).id == REWARD


def expect(error, parameter, call):
    try:
        call()
    except error as caught:
        assert caught.body["message"], caught.body
        assert caught.param == parameter, (caught.param, parameter)
    else:
        raise AssertionError(f"no {error.__name__}")


def errors():
    create = client.chat.completions.create
    expect(openai.NotFoundError, "model", lambda: create(model="nobody", messages=QUESTION))
    expect(openai.BadRequestError, "temperature", lambda: create(model=POLICY, messages=QUESTION, temperature=-1))
    expect(openai.BadRequestError, "messages", lambda: create(model=POLICY, messages=[]))
    expect(openai.BadRequestError, "model", lambda: create(model=REWARD, messages=QUESTION))
    expect(openai.BadRequestError, "nonsense", lambda: create(model=POLICY, messages=QUESTION, extra_body={"nonsense": 1}))


def best_of_n():
    answer = client.chat.completions.create(
        model=POLICY, messages=QUESTION, temperature=1, seed=1, max_tokens=96, extra_body={"best_of": 4, "rerank": {"strategy": "reward"}}
    )
    rewards = [candidate["reward"] for candidate in answer.best_of["candidates"]]
    assert len(rewards) == 4 and len(answer.choices) == 1
    assert answer.choices[0].reward == max(rewards), (answer.choices[0].reward, rewards)


text = chat()
stream(text)
several_choices()
completions()
models()
errors()
best_of_n()
print(f"openai {openai.__version__}: ok")
