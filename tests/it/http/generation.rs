//! Chat and text completions: shapes, streams, log-probabilities, best of n.

use serde_json::{Value, json};

use super::{
    Server,
    fake::{BROKEN_SEED, EOS, Setup, ids, logprob, reward, shown},
};

const CHAT: &str = "/v1/chat/completions";
const TEXT: &str = "/v1/completions";

fn server() -> Server {
    Server::new(&Setup::saying([(100, "the sum is 12"), (101, "the sum is 13"), (102, "it is 12")]))
}

fn chat(extra: Value) -> Value {
    merge(json!({"messages": [{"role": "user", "content": "3 + 9"}], "seed": 100}), extra)
}

fn text(extra: Value) -> Value {
    merge(json!({"prompt": "3 + 9", "seed": 100}), extra)
}

fn merge(mut body: Value, extra: Value) -> Value {
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    body
}

/// What streamed choice `index` says, by `path` of a piece.
fn streamed(chunks: &[Value], index: usize, pointer: &str) -> String {
    let pieces = chunks.iter().flat_map(|chunk| chunk["choices"].as_array().unwrap());
    pieces.filter(|piece| piece["index"] == index).filter_map(|piece| piece.pointer(pointer)?.as_str()).collect()
}

#[tokio::test]
async fn chat_has_the_known_shape() {
    let answer = server().ok(CHAT, chat(json!({"n": 2, "model": "mini"}))).await;
    assert_eq!(answer["object"], "chat.completion");
    assert!(answer["id"].as_str().unwrap().starts_with("chatcmpl-"));
    assert_eq!((&answer["model"], &answer["template"]), (&json!("org/mini"), &json!("mini-template")));
    assert_eq!(answer["seed"], 100);
    let message = json!({"role": "assistant", "content": "the sum is 12", "refusal": null});
    assert_eq!(answer["choices"][0]["message"], message);
    assert_eq!(answer["choices"][1]["message"]["content"], "the sum is 13");
    assert_eq!(answer["choices"][1]["finish_reason"], "stop");
    assert_eq!(answer["choices"][0]["logprobs"], Value::Null);
    let prompt = ids("<s>[INST] 3 + 9 [/INST]").len();
    let completion = ids("the sum is 12").len() + ids("the sum is 13").len() + 2;
    assert_eq!(answer["usage"]["prompt_tokens"], prompt);
    assert_eq!(answer["usage"]["completion_tokens"], completion);
    assert_eq!(answer["usage"]["total_tokens"], prompt + completion);
    assert!(answer["usage"]["prompt_tokens_details"]["cached_tokens"].is_u64());
}

#[tokio::test]
async fn a_seed_that_was_made_up_is_told_and_works() {
    let server = server();
    let body = json!({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}], "max_tokens": 5});
    let first = server.ok(CHAT, body.clone()).await;
    let again = server.ok(CHAT, merge(body, json!({"seed": first["seed"]}))).await;
    assert_eq!(first["choices"], again["choices"]);
    assert_eq!(first["choices"][0]["finish_reason"], "length");
    let negative = server.ok(TEXT, text(json!({"seed": -5, "max_tokens": 1}))).await;
    assert_eq!(negative["seed"], -5);
}

#[tokio::test]
async fn chat_logprobs_match_the_tokens() {
    let body = chat(json!({"logprobs": true, "top_logprobs": 2, "return_token_ids": true, "prompt_logprobs": 1}));
    let answer = server().ok(CHAT, body).await;
    let tokens: Vec<u32> = serde_json::from_value(answer["choices"][0]["token_ids"].clone()).unwrap();
    assert_eq!(tokens, [ids("the sum is 12"), vec![EOS]].concat());
    let content = answer["choices"][0]["logprobs"]["content"].as_array().unwrap();
    assert_eq!(content.len(), tokens.len());
    for (token, entry) in tokens.iter().zip(content) {
        assert_eq!(entry["logprob"], shown(logprob(*token)));
        assert_eq!(entry["top_logprobs"].as_array().unwrap().len(), 2);
        assert_eq!(entry["top_logprobs"][1]["logprob"], json!(-9999.0_f32), "token 9 is impossible");
        assert!(entry["bytes"].is_array());
    }
    let prompt = ids("<s>[INST] 3 + 9 [/INST]");
    assert_eq!(answer["prompt_token_ids"], json!(prompt));
    let lists = answer["prompt_logprobs"].as_array().unwrap();
    assert_eq!((lists.len(), &lists[0]), (prompt.len(), &Value::Null));
    assert_eq!(lists[1][prompt[1].to_string()]["logprob"], shown(logprob(prompt[1])));
}

#[tokio::test]
async fn a_chat_stream_says_the_same() {
    let body = chat(json!({"n": 2, "stream": true, "stream_options": {"include_usage": true}}));
    let server = server();
    let reply = server.post(CHAT, &body).await;
    let chunks = reply.chunks();
    for (index, said) in ["the sum is 12", "the sum is 13"].iter().enumerate() {
        assert_eq!(streamed(&chunks, index, "/delta/content"), *said);
        assert_eq!(streamed(&chunks, index, "/finish_reason"), "stop");
        assert_eq!(streamed(&chunks, index, "/delta/role"), "assistant");
        let first = chunks.iter().find(|chunk| chunk["choices"][0]["index"] == index).unwrap();
        assert_eq!(first["choices"][0]["delta"], json!({"role": "assistant", "content": ""}));
        assert_eq!((&first["seed"], &first["template"]), (&json!(100), &json!("mini-template")));
    }
    let (last, others) = chunks.split_last().unwrap();
    assert_eq!(last["choices"], json!([]));
    assert!(others.iter().all(|chunk| chunk["usage"].is_null() && chunk["object"] == "chat.completion.chunk"));
    let plain = server.ok(CHAT, chat(json!({"n": 2}))).await;
    assert_eq!(last["usage"]["completion_tokens"], plain["usage"]["completion_tokens"]);
    assert_eq!(last["usage"]["prompt_tokens"], plain["usage"]["prompt_tokens"]);
}

#[tokio::test]
async fn usage_can_come_with_every_chunk() {
    let options = json!({"stream": true, "stream_options": {"continuous_usage_stats": true}});
    let chunks = server().post(CHAT, &chat(options)).await.chunks();
    assert!(chunks.iter().all(|chunk| chunk["usage"]["prompt_tokens"].is_u64()));
    assert!(!chunks.last().unwrap()["choices"].as_array().unwrap().is_empty());
}

#[tokio::test]
async fn a_failure_in_the_middle_is_an_event() {
    let body = chat(json!({"seed": BROKEN_SEED, "stream": true}));
    let mut events = server().post(CHAT, &body).await.events();
    assert_eq!(events.pop().as_deref(), Some("[DONE]"));
    let error: Value = serde_json::from_str(&events.pop().unwrap()).unwrap();
    assert_eq!(error["error"]["type"], "internal_error");
    assert!(!error.to_string().contains("secret"));
    assert!(!events.is_empty(), "what came before the failure stays");
    server().post(CHAT, &chat(json!({"seed": BROKEN_SEED}))).await.check_error(500, "internal_error");
}

#[tokio::test]
async fn what_stopped_a_choice_is_told() {
    let server = server();
    let answer = server.ok(CHAT, chat(json!({"stop": [" is"]}))).await;
    assert_eq!(answer["choices"][0]["message"]["content"], "the sum");
    assert_eq!(answer["choices"][0]["stop_reason"], " is");
    let kept = server.ok(CHAT, chat(json!({"stop": " is", "include_stop_str_in_output": true}))).await;
    assert_eq!(kept["choices"][0]["message"]["content"], "the sum is");
    let limited = server.ok(CHAT, chat(json!({"max_tokens": 9, "max_completion_tokens": 2}))).await;
    assert_eq!(
        (&limited["choices"][0]["finish_reason"], &limited["usage"]["completion_tokens"]),
        (&json!("length"), &json!(2))
    );
}

#[tokio::test]
async fn completions_take_four_kinds_of_prompts() {
    let server = server();
    let tokens = ids("3 + 9");
    for (prompt, count) in
        [(json!("3 + 9"), 1), (json!(["3 + 9", "b"]), 2), (json!(tokens), 1), (json!([tokens, tokens, [5]]), 3)]
    {
        let answer = server.ok(TEXT, text(json!({"prompt": prompt, "n": 2}))).await;
        let choices = answer["choices"].as_array().unwrap();
        assert_eq!(choices.len(), 2 * count, "{prompt}");
        for (at, choice) in choices.iter().enumerate() {
            assert_eq!(choice["index"], at);
            assert_eq!(choice["text"], if at % 2 == 0 { "the sum is 12" } else { "the sum is 13" });
        }
        assert_eq!((&answer["object"], &answer["seed"]), (&json!("text_completion"), &json!(100)));
    }
}

#[tokio::test]
async fn echo_gives_true_prompt_logprobs() {
    let tokens = ids("<s>3 + 9 is twelve");
    for max_tokens in [0, 1] {
        let body = json!({"prompt": [tokens], "max_tokens": max_tokens, "logprobs": 1, "echo": true, "temperature": 0, "seed": 100});
        let answer = server().ok(TEXT, body).await;
        let lists = &answer["choices"][0]["logprobs"];
        let mut all = tokens.clone();
        all.extend(ids("the sum is 12").iter().take(max_tokens));
        let mut want: Vec<Value> = all.iter().map(|token| shown(logprob(*token))).collect();
        want[0] = Value::Null;
        assert_eq!(lists["token_logprobs"], json!(want), "{max_tokens}");
        for list in ["tokens", "top_logprobs", "text_offset"] {
            assert_eq!(lists[list].as_array().unwrap().len(), all.len(), "{list}");
        }
        assert_eq!(lists["top_logprobs"][0], Value::Null);
        assert!(lists["top_logprobs"][1].is_object());
        assert_eq!(answer["choices"][0]["finish_reason"], "length");
        assert!(answer["choices"][0]["text"].as_str().unwrap().contains("3 + 9 is twelve"));
        assert_eq!(answer["usage"]["completion_tokens"], max_tokens);
    }
}

#[tokio::test]
async fn a_completions_stream_says_the_same() {
    let server = server();
    let body = text(json!({"prompt": ["3 + 9", "4"], "n": 2, "echo": true, "logprobs": 1}));
    let plain = server.ok(TEXT, body.clone()).await;
    let streaming = merge(body, json!({"stream": true, "stream_options": {"include_usage": true}}));
    let chunks = server.post(TEXT, &streaming).await.chunks();
    for (index, choice) in plain["choices"].as_array().unwrap().iter().enumerate() {
        assert_eq!(streamed(&chunks, index, "/text"), choice["text"].as_str().unwrap());
        for list in ["token_logprobs", "text_offset", "tokens", "top_logprobs"] {
            let pieces = chunks.iter().flat_map(|chunk| chunk["choices"].as_array().unwrap());
            let lists =
                pieces.filter(|piece| piece["index"] == index).filter_map(|piece| piece["logprobs"][list].as_array());
            assert_eq!(json!(lists.flatten().collect::<Vec<_>>()), choice["logprobs"][list], "{list}");
        }
    }
    assert_eq!(chunks.last().unwrap()["usage"]["completion_tokens"], plain["usage"]["completion_tokens"]);
    assert_eq!(chunks.last().unwrap()["usage"]["prompt_tokens"], plain["usage"]["prompt_tokens"]);
}

#[tokio::test]
async fn text_can_do_without_bos() {
    let body = text(json!({"add_special_tokens": false, "return_token_ids": true}));
    let answer = server().ok(TEXT, body).await;
    assert_eq!(answer["choices"][0]["prompt_token_ids"], json!(ids("3 + 9")));
}

#[tokio::test]
async fn the_best_of_n_come_first() {
    let body = chat(json!({"n": 2, "best_of": 3, "rerank": {"return_candidates": true}}));
    let answer = server().ok(CHAT, body).await;
    let conversation = |said: &str| reward(&[ids("<s>[INST] 3 + 9 [/INST]"), ids(said), vec![EOS]].concat());
    let account = &answer["best_of"];
    assert_eq!((&account["strategy"], &account["model"]), (&json!("reward"), &json!("org/mini-rm")));
    let candidates = account["candidates"].as_array().unwrap();
    assert_eq!(candidates.len(), 3);
    let mut rewards = Vec::new();
    for (at, said) in ["the sum is 12", "the sum is 13", "it is 12"].iter().enumerate() {
        let candidate = &candidates[at];
        assert_eq!((&candidate["text"], &candidate["seed"]), (&json!(said), &json!(100 + at)));
        assert!(candidate["completion_tokens"].as_u64().unwrap() > 1 && candidate["finish_reason"] == "stop");
        rewards.push(candidate["reward"].as_f64().unwrap() as f32);
    }
    assert_eq!(rewards[0], conversation("the sum is 12"));
    rewards.sort_by(f32::total_cmp);
    for (at, choice) in answer["choices"].as_array().unwrap().iter().enumerate() {
        assert_eq!((&choice["index"], &choice["rank"]), (&json!(at), &json!(at)));
        assert_eq!(choice["reward"], shown(rewards[2 - at]));
    }
    assert_eq!(answer["choices"].as_array().unwrap().len(), 2);
    assert!(answer["usage"]["reward_tokens"].as_u64().unwrap() > 0);
}

#[tokio::test]
async fn strategies_are_named_and_obeyed() {
    let server = server();
    let rerank = json!({"strategy": "logprob"});
    let answer = server.ok(TEXT, text(json!({"best_of": 3, "rerank": rerank}))).await;
    assert_eq!((&answer["best_of"]["strategy"], &answer["best_of"]["model"]), (&json!("logprob"), &Value::Null));
    assert_eq!(answer["choices"][0]["reward"], Value::Null);
    let rerank = json!({"strategy": "majority", "answer": {"regex": "is (\\d+)"}});
    let answer = server.ok(CHAT, chat(json!({"best_of": 3, "rerank": rerank}))).await;
    assert_eq!(answer["choices"][0]["answer"], "12");
    let plain = server.ok(CHAT, chat(json!({"best_of": 1}))).await;
    assert_eq!(plain["best_of"], Value::Null);
}

#[tokio::test]
async fn contradictions_are_refused_by_name() {
    let server = server();
    for (extra, param) in [
        (json!({"stream_options": {"include_usage": true}}), "stream_options"),
        (json!({"top_logprobs": 2}), "top_logprobs"),
        (json!({"logprobs": true, "top_logprobs": 21}), "top_logprobs"),
        (json!({"max_completion_tokens": 0}), "max_completion_tokens"),
        (json!({"max_completion_tokens": 9999}), "max_completion_tokens"),
        (json!({"best_of": 3, "stream": true}), "stream"),
        (json!({"best_of": 65}), "best_of"),
        (json!({"prompt_logprobs": 1, "stream": true}), "prompt_logprobs"),
        (json!({"add_generation_prompt": true, "continue_final_message": true}), "continue_final_message"),
        (json!({"tools": [{"type": "function"}]}), "tools"),
        (json!({"response_format": {"type": "json_object"}}), "response_format"),
        (json!({"tool_choice": "required"}), "tool_choice"),
        (json!({"messages": []}), "messages"),
        (json!({"messages": [{"role": "tool", "content": "a"}]}), "messages[0].role"),
        (json!({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}), "messages[0].content[0].type"),
        (json!({"model": "mini-rm"}), "model"),
    ] {
        assert_eq!(server.refused(CHAT, chat(extra.clone())).await, param, "{extra}");
    }
    for (extra, param) in [
        (json!({"suffix": "x"}), "suffix"),
        (json!({"max_tokens": 0}), "max_tokens"),
        (json!({"n": 3, "best_of": 2}), "best_of"),
        (json!({"prompt": []}), "prompt"),
        (json!({"prompt": ""}), "prompt"),
        (json!({"prompt": ["a", "b"], "best_of": 3}), "prompt"),
        (json!({"prompt": [[99999]]}), "prompt"),
        (json!({"rerank": {"strategy": "reward"}}), "rerank"),
        (json!({"logprobs": 21}), "logprobs"),
    ] {
        assert_eq!(server.refused(TEXT, text(extra.clone())).await, param, "{extra}");
    }
}
