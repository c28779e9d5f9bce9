//! Routes, keys, probes, models, tokenizer, documentation.

use std::collections::BTreeSet;

use axum::{
    body::Body,
    http::{Request, StatusCode, header},
};
use eurus::http::{HttpOptions, auth::MetricsAccess, listen::Stage, routes};
use serde_json::{Value, json};

use super::{
    Reply, Server,
    fake::{Gate, Setup, ids},
};

const OPEN: [&str; 4] = ["/health", "/ready", "/live", "/version"];

fn server() -> Server {
    Server::new(&Setup::default())
}

fn request(method: &str, path: &str, authorization: &[&str]) -> Request<Body> {
    let mut request = Request::builder().method(method).uri(path).header(header::CONTENT_TYPE, "application/json");
    for value in authorization {
        request = request.header(header::AUTHORIZATION, *value);
    }
    request.body(Body::from("{}")).unwrap()
}

#[tokio::test]
async fn every_route_is_documented_and_guarded() {
    let server = Server::with_key(&Setup::default());
    let paths: BTreeSet<String> = routes::table().iter().map(|route| route.documented_path()).collect();
    let document = server.send(request("GET", "/openapi.json", &["Bearer sesame"])).await.json();
    let documented: BTreeSet<String> = document["paths"].as_object().unwrap().keys().cloned().collect();
    assert_eq!(documented, paths);
    let mut operations = BTreeSet::new();
    for route in routes::table() {
        let (method, path) = (route.method.as_str(), route.path);
        let operation = &document["paths"][route.documented_path()][method.to_lowercase()];
        assert!(operation["responses"].is_object(), "{route:?} is not documented");
        assert!(operations.insert(operation["operationId"].as_str().unwrap().to_string()), "{route:?} shares its id");
        let open = OPEN.contains(&path);
        assert_eq!(operation["security"].is_array(), !open, "{route:?}");
        let path = path.replace("{*id}", "mini");
        for method in ["GET", "POST", "PUT", "DELETE", "OPTIONS"] {
            for keys in [&[][..], &["Bearer wrong"], &["sesame"], &["Bearer sesame", "Bearer sesame"]] {
                let reply = server.send(request(method, &path, keys)).await;
                assert_eq!(reply.status == StatusCode::UNAUTHORIZED, !open, "{method} {path} {keys:?}: {}", reply.text);
            }
        }
        let reply = server.send(request(method, &path, &["Bearer sesame"])).await;
        assert!(reply.status != StatusCode::UNAUTHORIZED, "{route:?}");
    }
    for path in ["/nowhere", "/docs", "/docs/", "/docs/index.html", "/v1/models/a?key=sesame"] {
        let reply = server.send(request("GET", path, &[])).await;
        reply.check_error(401, "authentication_error");
        assert_eq!(reply.headers[header::WWW_AUTHENTICATE], "Bearer");
    }
}

#[tokio::test]
async fn metrics_can_be_open() {
    let options = HttpOptions { metrics_access: MetricsAccess::Open, ..HttpOptions::default() };
    let guarded = Server::with_key(&Setup::default());
    guarded.get("/metrics").await.check_error(401, "authentication_error");
    let open = Server::with(&Setup::default(), options);
    open.post("/v1/chat/completions", &json!({"messages": 3})).await;
    open.get("/nowhere?x=1").await;
    let text = open.get("/metrics").await.text;
    assert!(text.contains(r#"eurus_requests_total{route="/v1/chat/completions",status="400"} 1"#), "{text}");
    assert!(text.contains(r#"eurus_requests_total{route="other",status="404"} 1"#), "{text}");
    assert!(text.contains(r#"eurus_request_seconds_count{route="other"} 1"#), "{text}");
}

#[tokio::test]
async fn what_is_not_there_has_the_same_envelope() {
    let server = server();
    server.get("/nowhere").await.check_error(404, "not_found_error");
    let reply = server.get("/v1/chat/completions").await;
    reply.check_error(405, "invalid_request_error");
    assert_eq!(reply.headers[header::ALLOW], "POST");
    server.post("/v1/models", &json!({})).await.check_error(405, "invalid_request_error");
    for id in
        ["none", "..%2f..%2fetc%2fpasswd", "../../etc/passwd", "%2e%2e/mini", "a%00b", "/org/mini", "%ff%fe", "hf://x"]
    {
        let reply = server.get(&format!("/v1/models/{id}")).await;
        reply.check_error(404, "not_found_error");
        assert_eq!(reply.json()["error"]["code"], "model_not_found", "{id}");
    }
    for path in ["/v1/chat/completions", "/v1/completions", "/v1/rewards", "/tokenize", "/classify"] {
        let body = json!({"model": "../../etc/passwd", "messages": [{"role": "user", "content": "a"}]});
        let text = json!({"model": "\u{0}", "prompt": "a"});
        let body = if path == "/v1/completions" { text } else { body };
        let reply = server.post(path, &body).await;
        reply.check_error(404, "not_found_error");
        assert_eq!(reply.json()["error"]["code"], "model_not_found");
    }
}

#[tokio::test]
async fn models_are_listed_and_found() {
    let server = server();
    let list = server.get("/v1/models").await.json();
    assert_eq!(list["object"], "list");
    let card = json!({"id": "org/mini", "object": "model", "created": 1_700_000_000, "owned_by": "eurus",
        "kind": "policy", "max_model_len": 256, "aliases": ["mini"]});
    assert_eq!(list["data"][0], card);
    assert_eq!(list["data"][1]["kind"], "reward");
    for id in ["org/mini", "mini", "org%2Fmini"] {
        assert_eq!(server.get(&format!("/v1/models/{id}")).await.json(), card, "{id}");
    }
}

#[tokio::test]
async fn text_becomes_tokens_and_back() {
    let server = server();
    let tokens = ids("3 + 9");
    for path in ["/tokenize", "/v1/tokenize"] {
        let body = json!({"prompt": "3 + 9", "add_special_tokens": false, "return_token_strs": true});
        let answer = server.ok(path, body).await;
        assert_eq!((&answer["count"], &answer["tokens"]), (&json!(tokens.len()), &json!(tokens)));
        assert_eq!(answer["max_model_len"], 256);
        assert_eq!(answer["token_strs"].as_array().unwrap().len(), tokens.len());
    }
    let messages = json!([{"role": "user", "content": "a"}]);
    let answer = server.ok("/tokenize", json!({"messages": messages, "model": "mini-rm"})).await;
    assert_eq!(answer["tokens"], json!(ids("<s>[INST] a [/INST]")));
    for path in ["/detokenize", "/v1/detokenize"] {
        assert_eq!(server.ok(path, json!({"tokens": tokens})).await, json!({"prompt": "3 + 9"}));
    }
    assert_eq!(server.refused("/detokenize", json!({"tokens": [1, -1]})).await, "tokens[1]");
    assert_eq!(server.refused("/detokenize", json!({"tokens": [4_000_000_000_u32]})).await, "tokens");
    assert_eq!(server.refused("/tokenize", json!({})).await, "prompt");
    let info = server.get("/tokenizer_info").await.json();
    assert_eq!((&info["eos_token"], &info["bos_token"]), (&json!("</s>"), &json!("<s>")));
    server.get("/tokenizer_info?model=none").await.check_error(404, "not_found_error");
}

#[tokio::test]
async fn request_ids_are_echoed_where_they_are_harmless() {
    let server = server();
    let ask = async |id: &str| {
        let request = Request::get("/version").header("x-request-id", id).body(Body::empty()).unwrap();
        server.send(request).await.headers["x-request-id"].to_str().unwrap().to_string()
    };
    assert_eq!(ask("abc-1.2_3:4").await, "abc-1.2_3:4");
    for bad in ["", "a b", "<script>", &"a".repeat(200)] {
        let made = ask(bad).await;
        assert!(made != bad && made.len() == 36, "{made}");
    }
    let reply = server.get("/nowhere").await;
    assert_eq!(reply.headers["x-request-id"].len(), 36);
}

#[tokio::test]
async fn the_page_needs_no_network() {
    let server = server();
    assert_eq!(server.get("/").await.headers[header::LOCATION], "/docs/");
    let page = server.get("/docs/").await;
    assert_eq!(page.status, StatusCode::OK);
    assert!(page.text.contains("swagger-ui") && !page.text.contains("https://"), "{}", page.text);
    let script = server.get("/docs/swagger-initializer.js").await;
    assert!(script.text.contains("/openapi.json"), "{}", script.text);
}

#[tokio::test]
async fn health_follows_the_engines_and_the_way_down() {
    let server = server();
    for path in OPEN {
        assert_eq!(server.get(path).await.status, StatusCode::OK, "{path}");
    }
    server.state.lifecycle().advance(Stage::Draining);
    for path in ["/health", "/ready"] {
        check_unavailable(&server.get(path).await);
    }
    assert_eq!(server.get("/live").await.status, StatusCode::OK);
    check_unavailable(&server.post("/v1/completions", &json!({"prompt": "a"})).await);
}

#[track_caller]
fn check_unavailable(reply: &Reply) {
    reply.check_error(503, "service_unavailable_error");
    assert_eq!(reply.headers[header::RETRY_AFTER], "1");
}

#[tokio::test]
async fn a_dead_engine_is_told_without_its_last_words() {
    let server = Server::new(&Setup { panics: true, ..Setup::default() });
    check_unavailable(&server.post("/v1/completions", &json!({"prompt": "a"})).await);
    check_unavailable(&server.get("/health").await);
    check_unavailable(&server.get("/live").await);
    check_unavailable(&server.post("/v1/completions", &json!({"prompt": "a"})).await);
}

#[tokio::test]
async fn a_full_queue_is_429_and_a_stalled_engine_unhealthy() {
    let gate = Gate::after(0);
    let setup = Setup { gate: gate.clone(), waiting_max: 2, running_max: 1, ..Setup::default() };
    let stall_timeout = std::time::Duration::ZERO;
    let server = Server::with(&setup, HttpOptions { stall_timeout, ..HttpOptions::default() });
    let other = server.clone();
    let running = tokio::spawn(async move { other.post("/v1/completions", &json!({"prompt": "a"})).await });
    while server.get("/health").await.status == StatusCode::OK {
        tokio::task::yield_now().await;
    }
    check_unavailable(&server.get("/health").await);
    let reply = server.post("/v1/completions", &json!({"prompt": "a", "n": 16, "max_tokens": 1})).await;
    reply.check_error(429, "rate_limit_error");
    assert_eq!(reply.headers[header::RETRY_AFTER], "1");
    gate.release();
    assert_eq!(running.await.unwrap().status, StatusCode::OK);
    while server.get("/health").await.status != StatusCode::OK {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn a_late_answer_is_408() {
    let gate = Gate::after(0);
    let setup = Setup { gate: gate.clone(), ..Setup::default() };
    let request_timeout = std::time::Duration::from_millis(20);
    let server = Server::with(&setup, HttpOptions { request_timeout, ..HttpOptions::default() });
    server.post("/v1/completions", &json!({"prompt": "a"})).await.check_error(408, "timeout_error");
    let events = server.post("/v1/completions", &json!({"prompt": "a", "stream": true})).await.events();
    let error: Value = serde_json::from_str(&events[0]).unwrap();
    assert_eq!((events.len(), &error["error"]["type"]), (2, &json!("timeout_error")));
    gate.release();
}
