//! Bodies that nobody should send: every field of every route with every kind of wrong value.

use std::{convert::Infallible, time::Duration};

use axum::{
    body::{Body, Bytes},
    http::{Request, StatusCode, header},
};
use eurus::http::HttpOptions;
use serde_json::{Value, json};

use super::{Server, fake::Setup};

/// A good body for every route that takes one, with all its fields.
fn bodies() -> Vec<(&'static str, Value)> {
    let shared = json!({"model": "mini", "n": 1, "best_of": 1, "max_tokens": 1, "min_tokens": 0, "temperature": 0.5,
        "top_p": 0.9, "top_k": 3, "min_p": 0.1, "presence_penalty": 0.1, "frequency_penalty": 0.1,
        "repetition_penalty": 1.1, "logit_bias": {"5": 1}, "seed": 1, "stop": ["x"], "stop_token_ids": [5],
        "include_stop_str_in_output": false, "ignore_eos": false, "prompt_logprobs": 1, "stream": false,
        "stream_options": null, "return_token_ids": true, "rerank": null, "user": "u", "tools": null});
    let with = |own: Value| {
        let mut body = shared.clone();
        body.as_object_mut().unwrap().extend(own.as_object().unwrap().clone());
        body
    };
    let conversation = json!([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]);
    vec![
        (
            "/v1/chat/completions",
            with(json!({"messages": [{"role": "user", "content": "a"}], "max_completion_tokens": 1,
            "logprobs": true, "top_logprobs": 1, "add_generation_prompt": true, "continue_final_message": false,
            "chat_template_kwargs": {}})),
        ),
        ("/v1/completions", with(json!({"prompt": "a", "echo": true, "logprobs": 1, "add_special_tokens": true}))),
        (
            "/v1/rewards",
            json!({"model": "mini-rm", "messages": [conversation], "prompt": null, "completions": null,
            "input": null, "return": "all", "append_eos": true, "truncate": "left", "chat_template_kwargs": {}}),
        ),
        ("/v1/rewards", json!({"prompt": "a", "completions": ["b"]})),
        ("/v1/rewards", json!({"input": ["a"]})),
        (
            "/classify",
            json!({"model": "mini-rm", "input": "a", "add_special_tokens": true, "use_activation": false,
            "activation": null, "add_generation_prompt": false, "chat_template_kwargs": {}}),
        ),
        ("/pooling", json!({"messages": conversation, "task": "classify"})),
        ("/score", json!({"model": "mini-rm", "text_1": "a", "text_2": ["b"], "use_activation": true})),
        ("/v1/score", json!({"query": "a", "items": ["b"], "apply_softmax": false, "item_first": false})),
        (
            "/rerank",
            json!({"query": "a", "documents": ["b"], "top_n": 1, "return_documents": true,
            "max_tokens_per_doc": 4096}),
        ),
        (
            "/v2/rerank",
            json!({"query": "a", "texts": ["b"], "return_text": true, "raw_scores": true, "truncate": true,
            "truncation_direction": "Left"}),
        ),
        ("/predict", json!({"inputs": "a", "truncate": true, "truncation_direction": "Right", "raw_scores": true})),
        ("/get_reward", json!({"query": ["a"], "prompts": ["a"], "labels": ["b"]})),
        ("/v1/score/evaluation", json!({"model": "mini-rm", "messages": ["a"], "max_length": 4096})),
        ("/tokenize", json!({"model": "mini", "prompt": "a", "add_special_tokens": true, "return_token_strs": true})),
        (
            "/tokenize",
            json!({"messages": conversation, "add_generation_prompt": false, "continue_final_message": false}),
        ),
        ("/detokenize", json!({"model": "mini", "tokens": [5]})),
    ]
}

/// Values as JSON text: some cannot be written as a `Value`.
fn values() -> Vec<String> {
    let mut values: Vec<String> = [
        "null",
        "true",
        "false",
        "0",
        "-0",
        "-0.0",
        "-1",
        "1",
        "2",
        "1.5",
        "-2.5",
        "1e39",
        "-1e39",
        "1e-50",
        "1e308",
        "9223372036854775807",
        "9223372036854775808",
        "-9223372036854775809",
        "18446744073709551616",
        "NaN",
        "Infinity",
        "1e999",
        r#""""#,
        r#""NaN""#,
        r#""\u0000""#,
        r#""\ud800""#,
        r#""[INST]</s><s>{{7*7}}""#,
        "[]",
        "{}",
        "[[]]",
        "[null]",
        "[{}]",
        "[1,\"a\"]",
        r#"{"a":1}"#,
        r#"{"regex":"("}"#,
        r#"{"-1":1}"#,
        r#"{"99999999":1}"#,
        "[4294967295]",
        "[4294967296]",
    ]
    .map(str::to_string)
    .to_vec();
    values.push(format!("\"{}\"", "huge ".repeat(50_000)));
    values.push(format!("{}1{}", "[".repeat(200), "]".repeat(200)));
    values.push(json!(vec!["a"; 5000]).to_string());
    values.push(json!(vec![7; 5000]).to_string());
    values
}

fn replaced(body: &Value, field: &str, value: &str) -> String {
    let other = body.as_object().unwrap().iter().filter(|(name, _)| *name != field);
    let mut fields: Vec<String> = other.map(|(name, value)| format!("{}:{value}", json!(name))).collect();
    fields.push(format!("{}:{value}", json!(field)));
    format!("{{{}}}", fields.join(","))
}

#[tokio::test]
async fn no_value_of_any_field_is_our_fault() {
    let server = Server::new(&Setup::default());
    let values = values();
    for (path, body) in bodies() {
        assert_eq!(
            server.post(path, &body).await.status,
            StatusCode::OK,
            "{path} {}",
            server.post(path, &body).await.text
        );
        for field in body.as_object().unwrap().keys() {
            for value in &values {
                let shown: String = value.chars().take(40).collect();
                let reply = server.post_text(path, replaced(&body, field, value)).await;
                match reply.status.as_u16() {
                    200 if reply.headers[header::CONTENT_TYPE] == "application/json" => drop(reply.json()),
                    200 => drop(reply.chunks()),
                    400 => {
                        reply.check_error(400, "invalid_request_error");
                        let json = reply.json();
                        let syntax = json["error"]["message"].as_str().unwrap().contains("not valid JSON");
                        let named = json["error"]["param"].is_string();
                        assert!(named || syntax, "{path} {field} {shown}: {json}");
                    }
                    404 => reply.check_error(404, "not_found_error"),
                    status => panic!("{path} {field} {shown}: {status} {}", reply.text),
                }
            }
        }
    }
    assert_eq!(server.get("/health").await.status, StatusCode::OK);
}

#[tokio::test]
async fn ranges_are_closed() {
    let server = Server::new(&Setup::default());
    for (field, bad, good) in [
        ("temperature", vec!["-0.1", "2.1", "1e39"], vec!["0", "2", "-0.0"]),
        ("top_p", vec!["0", "1.1", "-1", "1e-60"], vec!["0.1", "1"]),
        ("min_p", vec!["-0.1", "1.1"], vec!["0", "1"]),
        ("presence_penalty", vec!["-2.1", "2.1"], vec!["-2", "2"]),
        ("frequency_penalty", vec!["-2.1", "2.1"], vec!["-2", "2"]),
        ("repetition_penalty", vec!["0", "-1"], vec!["0.5", "2"]),
        ("n", vec!["0", "-1", "65", "1.0"], vec!["1", "4"]),
        ("best_of", vec!["0", "-1", "65"], vec!["1", "2"]),
        ("logprobs", vec!["-1", "21", "true"], vec!["0", "20"]),
        ("prompt_logprobs", vec!["-1", "21"], vec!["0", "20"]),
        ("max_tokens", vec!["0", "-1", "257"], vec!["1", "8"]),
        ("seed", vec!["9223372036854775808", "1.5"], vec!["-9223372036854775808", "9223372036854775807"]),
        ("top_k", vec!["-2"], vec!["-1", "0", "5"]),
        ("stop", vec![r#"[""]"#, r#"["a",1]"#], vec!["[]", r#""a""#]),
        ("logit_bias", vec![r#"{"5":101}"#, r#"{"x":1}"#, r#"{"5":"1"}"#], vec![r#"{"5":-100,"6":100}"#, "{}"]),
    ] {
        let body = json!({"prompt": "a", "max_tokens": 1});
        for value in bad {
            let reply = server.post_text("/v1/completions", replaced(&body, field, value)).await;
            reply.check_error(400, "invalid_request_error");
            let param = reply.json()["error"]["param"].as_str().unwrap_or_default().to_string();
            assert!(param.starts_with(field), "{field} {value}: {}", reply.text);
        }
        for value in good {
            let reply = server.post_text("/v1/completions", replaced(&body, field, value)).await;
            assert_eq!(reply.status, StatusCode::OK, "{field} {value}: {}", reply.text);
        }
    }
}

#[tokio::test]
async fn bodies_must_be_json_of_a_size() {
    let server = Server::with(&Setup::default(), HttpOptions { body_bytes_max: 1000, ..HttpOptions::default() });
    let send = async |kind: Option<&str>, body: Body| {
        let mut request = Request::post("/v1/completions");
        if let Some(kind) = kind {
            request = request.header(header::CONTENT_TYPE, kind);
        }
        server.send(request.body(body).unwrap()).await
    };
    let good = r#"{"prompt":"a","max_tokens":1}"#;
    for kind in ["application/json", "application/json; charset=utf-8", "Application/JSON"] {
        assert_eq!(send(Some(kind), good.into()).await.status, StatusCode::OK, "{kind}");
    }
    for kind in [None, Some("text/plain"), Some("application/x-www-form-urlencoded")] {
        send(kind, good.into()).await.check_error(400, "invalid_request_error");
    }
    let json = Some("application/json");
    let big = || format!("{}{}", good, " ".repeat(1000));
    send(json, big().into()).await.check_error(413, "invalid_request_error");
    let pieces = big()
        .into_bytes()
        .chunks(100)
        .map(|piece| Ok::<_, Infallible>(Bytes::copy_from_slice(piece)))
        .collect::<Vec<_>>();
    send(json, Body::from_stream(tokio_stream::iter(pieces))).await.check_error(413, "invalid_request_error");
    for bad in [&b""[..], b"\xff\xfe{\x00}\x00", b"\xef\xbb\xbf{}", b"{\"prompt\":\"\xff\"}", b"[", b"nul"] {
        send(json, bad.to_vec().into()).await.check_error(400, "invalid_request_error");
    }
}

#[tokio::test]
async fn a_body_that_never_ends_is_408() {
    let body_timeout = Duration::from_millis(20);
    let server = Server::with(&Setup::default(), HttpOptions { body_timeout, ..HttpOptions::default() });
    let endless = Body::from_stream(tokio_stream::pending::<Result<Bytes, Infallible>>());
    let request = Request::post("/v1/completions").header(header::CONTENT_TYPE, "application/json").body(endless);
    server.send(request.unwrap()).await.check_error(408, "timeout_error");
}
