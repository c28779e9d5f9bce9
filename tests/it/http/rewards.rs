//! Rewards in our shape and in everybody else's: always the same number.

use serde_json::{Value, json};

use super::{
    Server,
    fake::{EOS, Setup, ids, reward, shown},
};

fn server() -> Server {
    Server::new(&Setup::default())
}

/// Reward of an answer to a question, rendered by the template and closed.
fn raw(question: &str, answer: &str) -> f32 {
    reward(&[ids(&format!("<s>[INST] {question} [/INST]")), ids(answer), vec![EOS]].concat())
}

/// The same as it is written.
fn answered(question: &str, answer: &str) -> Value {
    shown(raw(question, answer))
}

#[tokio::test]
async fn three_inputs_give_one_reward() {
    let server = server();
    let conversation = json!([{"role": "user", "content": "3 + 9"}, {"role": "assistant", "content": "12"}]);
    let rendered = "[INST] 3 + 9 [/INST]12";
    for body in [
        json!({"messages": [conversation]}),
        json!({"messages": conversation}),
        json!({"prompt": "3 + 9", "completions": ["12"]}),
        json!({"prompt": [{"role": "user", "content": "3 + 9"}], "completions": "12"}),
    ] {
        let answer = server.ok("/v1/rewards", body.clone()).await;
        assert_eq!(answer["data"][0]["reward"], json!(answered("3 + 9", "12")), "{body}");
        assert_eq!(answer["data"][0]["last_token_id"], EOS);
        assert_eq!((&answer["model"], &answer["template"]), (&json!("org/mini-rm"), &json!("mini-template")));
        assert_eq!(answer["usage"]["prompt_tokens"], answer["data"][0]["tokens"]);
    }
    let text = server.ok("/v1/rewards", json!({"input": rendered, "append_eos": false})).await;
    let want = ids(&format!("<s>{rendered}"));
    assert_eq!(
        text["data"][0],
        json!({"object": "reward", "index": 0, "reward": shown(reward(&want)), "tokens": want.len(),
        "last_token_id": want.last(), "truncated": false})
    );
    let tokens = server.ok("/v1/rewards", json!({"input": [want], "append_eos": false, "return": "all"})).await;
    let all: Vec<Value> = (1..=want.len()).map(|end| shown(reward(&want[..end]))).collect();
    assert_eq!(tokens["data"][0]["rewards"], json!(all));
    assert_eq!(tokens["template"], Value::Null);
}

#[tokio::test]
async fn rewards_keep_the_order() {
    let completions = ["12", "13", "a longer answer", "14"];
    let answer = server().ok("/v1/rewards", json!({"prompt": "3 + 9", "completions": completions})).await;
    for (index, completion) in completions.iter().enumerate() {
        assert_eq!(answer["data"][index]["index"], index);
        assert_eq!(answer["data"][index]["reward"], json!(answered("3 + 9", completion)));
    }
}

#[tokio::test]
async fn inputs_are_refused_by_name() {
    let server = server();
    for (body, param) in [
        (json!({}), "messages"),
        (json!({"prompt": "a"}), "completions"),
        (json!({"completions": ["a"]}), "prompt"),
        (json!({"input": "a", "messages": []}), "messages"),
        (json!({"input": "<s>a"}), "input"),
        (json!({"input": "a", "return": "some"}), "return"),
        (json!({"input": "a", "truncate": "middle"}), "truncate"),
        (json!({"input": "a", "model": "mini"}), "model"),
        (json!({"messages": [[{"role": "user", "content": "a"}]]}), "messages"),
        (json!({"input": "long ".repeat(400)}), "input"),
        (json!({"input": vec!["a"; 257]}), "input"),
    ] {
        let got = server.refused("/v1/rewards", body.clone()).await;
        assert!(got.starts_with(param), "{got} instead of {param}");
    }
    let error = server.post("/v1/rewards", &json!({"input": "a", "model": "mini"})).await.text;
    assert!(error.contains("org/mini-rm"), "names a model that can: {error}");
    let cut = server.ok("/v1/rewards", json!({"input": "long ".repeat(400), "truncate": "left"})).await;
    assert_eq!(cut["data"][0]["truncated"], true);
}

#[tokio::test]
async fn vllm_and_sglang_shapes() {
    let server = server();
    let conversation = json!([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]);
    let answer = server.ok("/classify", json!({"messages": conversation, "model": "mini-rm"})).await;
    assert_eq!(
        answer["data"],
        json!([{"index": 0, "label": "reward", "probs": [answered("a", "b")], "num_classes": 1}])
    );
    let squashed = server.ok("/v1/classify", json!({"messages": conversation, "use_activation": true})).await;
    assert_eq!(squashed["data"][0]["probs"][0], shown(1.0 / (1.0 + (-raw("a", "b")).exp())));
    let pooled = server.ok("/pooling", json!({"input": ["a", "b"], "encoding_format": "float"})).await;
    let text = |text: &str| shown(reward(&[ids(&format!("<s>{text}")), vec![EOS]].concat()));
    assert_eq!(pooled["data"][1], json!({"index": 1, "object": "pooling", "data": [text("b")]}));
    let sglang = server.ok("/classify", json!({"text": ["a"], "rid": "1"})).await;
    assert_eq!(sglang[0]["embedding"], json!([text("a")]));
    let bare = server.ok("/classify", json!({"input": "<s>a", "add_special_tokens": false})).await;
    assert_eq!(bare["data"][0]["probs"], json!([text("a")]));
    assert_eq!(server.refused("/pooling", json!({"input": "a", "task": "embed"})).await, "task");
    assert_eq!(server.refused("/pooling", json!({"input": "a", "encoding_format": "base64"})).await, "encoding_format");
}

#[tokio::test]
async fn score_shapes() {
    let server = server();
    let (one, two) = (answered("q", "a"), answered("q", "b"));
    for (left, right) in [("text_1", "text_2"), ("queries", "documents"), ("queries", "items"), ("data_1", "data_2")] {
        let answer = server.ok("/score", json!({left: "q", right: ["a", "b"]})).await;
        assert_eq!(answer["data"][1], json!({"index": 1, "object": "score", "score": two}), "{left}");
    }
    let many = server.ok("/v1/score", json!({"text_1": ["q", "r"], "text_2": ["a", "b"]})).await;
    assert_eq!(many["data"][1]["score"], json!(answered("r", "b")));
    let sglang = server.ok("/v1/score", json!({"query": "q", "items": ["a", "b"], "apply_softmax": false})).await;
    assert_eq!((&sglang["scores"], &sglang["object"]), (&json!([[one], [two]]), &json!("scoring")));
    for (body, param) in [
        (json!({"text_1": "q"}), "text_1"),
        (json!({"text_1": "q", "documents": ["a"]}), "documents"),
        (json!({"text_1": ["q", "r", "s"], "text_2": ["a", "b"]}), "text_2"),
        (json!({"query": "q", "items": ["a"], "label_token_ids": [1]}), "label_token_ids"),
    ] {
        assert_eq!(server.refused("/score", body.clone()).await, param, "{body}");
    }
}

#[tokio::test]
async fn rerank_shapes() {
    let server = server();
    let documents = ["a", "b", "c"];
    let mut order: Vec<(usize, f32)> = documents.iter().map(|answer| raw("q", answer)).enumerate().collect();
    order.sort_by(|left, right| right.1.total_cmp(&left.1));
    for path in ["/rerank", "/v1/rerank", "/v2/rerank"] {
        let body =
            json!({"query": "q", "documents": ["a", {"text": "b"}, "c"], "top_n": 2, "truncate_prompt_tokens": -1});
        let answer = server.ok(path, body).await;
        let results = answer["results"].as_array().unwrap();
        assert_eq!(results.len(), 2);
        for (result, (index, score)) in results.iter().zip(&order) {
            let want =
                json!({"index": index, "document": {"text": documents[*index]}, "relevance_score": shown(*score)});
            assert_eq!(*result, want);
        }
        assert!(answer["usage"]["total_tokens"].is_u64() && answer["id"].is_string());
    }
    let bare = server.ok("/rerank", json!({"query": "q", "documents": ["a"], "return_documents": false})).await;
    assert_eq!(bare["results"], json!([{"index": 0, "relevance_score": answered("q", "a")}]));
    let tei = json!({"query": "q", "texts": documents, "return_text": true, "raw_scores": false, "truncate": true});
    let answer = server.ok("/rerank", tei).await;
    let (best, score) = order[0];
    assert_eq!(answer[0], json!({"index": best, "score": shown(score), "text": documents[best]}));
    assert_eq!(server.refused("/rerank", json!({"query": "q"})).await, "documents");
    assert_eq!(server.refused("/rerank", json!({"query": "q", "documents": []})).await, "documents");
}

#[tokio::test]
async fn predict_get_reward_and_evaluation_shapes() {
    let server = server();
    let text = |text: &str| shown(reward(&[ids(text), vec![EOS]].concat()));
    let one = server.ok("/predict", json!({"inputs": "a"})).await;
    assert_eq!(one, json!([{"score": text("<s>a"), "label": "reward"}]));
    let pair = server.ok("/predict", json!({"inputs": ["q", "a"]})).await;
    assert_eq!(pair[0]["score"], json!(answered("q", "a")));
    let batch = server.ok("/predict", json!({"inputs": [["a"], ["q", "a"]]})).await;
    assert_eq!((&batch[0][0]["score"], &batch[1][0]["score"]), (&json!(text("<s>a")), &json!(answered("q", "a"))));
    let body = json!({"query": ["<s>a", "a"], "prompts": ["x", "y"], "labels": [null, null]});
    let answer = server.ok("/get_reward", body).await;
    let want = json!([text("<s>a"), text("a")]);
    assert_eq!(answer, json!({"rewards": want, "scores": want, "extra_logs": {"dummy_scores": want}}));
    let answer = server.ok("/v1/score/evaluation", json!({"model": "mini-rm", "messages": ["<s>a"]})).await;
    assert_eq!((&answer["object"], &answer["scores"]), (&json!("score.evaluation"), &json!([text("<s>a")])));
    let short = json!({"messages": ["a"], "max_length": 8});
    assert_eq!(server.refused("/v1/score/evaluation", short).await, "max_length");
}
