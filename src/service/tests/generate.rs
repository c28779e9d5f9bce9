//! Generating: texts, stops, seeds, log-probabilities, cancellation, refusals.

use super::*;
use crate::engine::Event;
use crate::service::{
    generate::{Eos, Generation, StopText},
    updates::{Candidate, FinishReason, StopReason, Update},
};

async fn collect(service: &Service, request: GenerateRequest) -> Vec<Candidate> {
    service.generate(request).await.unwrap().collect().await.unwrap().candidates
}

async fn one(service: &Service, request: GenerateRequest) -> Candidate {
    let mut candidates = collect(service, request).await;
    assert_eq!(candidates.len(), 1);
    candidates.remove(0)
}

async fn updates(mut generation: Generation) -> Vec<Update> {
    let mut all = Vec::new();
    while let Some(update) = generation.next().await {
        all.push(update.unwrap());
    }
    all
}

#[tokio::test]
async fn candidates_say_their_scripts() {
    let texts = ["3*8=24", "", "5+1\n\\boxed{6} é🙂"];
    let service = Setup::saying(&texts).service();
    let request = GenerateRequest { n: 3, ..asking("Use 3") };
    let generation = service.generate(request).await.unwrap();
    assert_eq!((generation.seed(), generation.prompt_tokens(), generation.count()), (100, ids("Use 3").len(), 3));
    assert_eq!((generation.prompt_text(), generation.template()), ("Use 3", None));
    let candidates = generation.collect().await.unwrap().candidates;
    for (index, (candidate, text)) in candidates.iter().zip(texts).enumerate() {
        assert_eq!((candidate.index, candidate.seed, candidate.text.as_str()), (index, 100 + index as u64, text));
        // End of sequence is a drawn token without text.
        assert_eq!(candidate.ids, [ids(text), vec![EOS]].concat());
        assert_eq!((candidate.finish, candidate.stop_reason.clone()), (FinishReason::Stop, None));
        assert_eq!(candidate.usage.prompt_tokens, ids("Use 3").len());
        assert_eq!(candidate.usage.completion_tokens, candidate.ids.len());
        assert_eq!((candidate.logprobs.len(), candidate.mean_logprob), (0, None));
    }
    check_freed(&service);
}

#[tokio::test]
async fn the_stream_adds_up_to_the_whole() {
    let texts = ["é🙂é", "1+2\\boxed{3}"];
    let service = Setup::saying(&texts).service();
    let request = GenerateRequest { n: 2, logprobs: Some(0), ..asking("1") };
    let all = updates(service.generate(request).await.unwrap()).await;
    for (index, expected) in texts.iter().enumerate() {
        let (mut text, mut drawn, mut logprobs, mut finished) = (String::new(), Vec::<TokenId>::new(), 0, 0);
        for update in &all {
            match update {
                Update::Delta(delta) if delta.index == index => {
                    assert_eq!(finished, 0, "nothing follows the end");
                    text.push_str(&delta.text);
                    drawn.extend(&delta.ids);
                    logprobs += delta.logprobs.len();
                }
                Update::Finished(end) if end.index == index => finished += 1,
                _ => {}
            }
        }
        assert_eq!((text.as_str(), finished), (*expected, 1));
        assert_eq!((drawn.len(), logprobs), (ids(expected).len() + 1, drawn.len()));
    }
}

#[tokio::test]
async fn a_message_is_rendered_and_its_special_tokens_stay_text() {
    let service = Setup::saying(&["4"]).service();
    let conversation = Conversation::new(vec![Message::new("user", "2+2")]);
    let generation =
        service.generate(GenerateRequest { prompt: Prompt::Messages(conversation), ..asking("") }).await.unwrap();
    assert_eq!(generation.prompt_text(), "<s>[INST] 2+2 [/INST]");
    assert_eq!(generation.prompt_ids(), [vec![1], ids("[INST] 2+2 [/INST]")].concat());
    assert_eq!(generation.template(), Some("mini-template"));
    let conversation = Conversation::new(vec![Message::new("user", "</s>")]);
    let generation =
        service.generate(GenerateRequest { prompt: Prompt::Messages(conversation), ..asking("") }).await.unwrap();
    assert!(!generation.prompt_ids().contains(&EOS), "{:?}", generation.prompt_ids());
}

#[tokio::test]
async fn bos_stands_once_before_text_and_nothing_before_ids() {
    let service = Setup { add_bos: Some(true), ..Setup::saying(&["4"]) }.service();
    let prompt_ids = async |prompt| {
        let generation = service.generate(GenerateRequest { prompt, ..asking("") }).await.unwrap();
        generation.prompt_ids().to_vec()
    };
    assert_eq!(prompt_ids(Prompt::Text("2".into())).await, [vec![1], ids("2")].concat());
    assert_eq!(prompt_ids(Prompt::Text("<s>2".into())).await, [vec![1], ids("2")].concat());
    assert_eq!(prompt_ids(Prompt::Ids(ids("2"))).await, ids("2"));
    let generation = service.generate(GenerateRequest { prompt: Prompt::Ids(vec![1, EOS]), ..asking("") });
    assert_eq!(generation.await.unwrap().prompt_text(), "<s></s>");
}

#[tokio::test]
async fn an_answer_begins_without_the_space_of_its_first_token() {
    // A vocabulary in SentencePiece's manner, where a word carries the space before it.
    let json = r#"{"version": "1.0", "added_tokens": [], "normalizer": null, "post_processor": null,
        "pre_tokenizer": {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": true},
        "decoder": {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": true},
        "model": {"type": "WordLevel", "unk_token": "?", "vocab": {"?": 0, "\u2581so": 1, "</s>": 2, "\u2581it": 3}}}"#;
    let metrics = Arc::new(Metrics::new().unwrap());
    let mut model = Setup { replies: vec![vec![1, 3, EOS]], ..Setup::default() }.model(Kind::Policy, &metrics);
    model.tokenizer = Arc::new(Tokenizer::from_json(json, &SpecialTokens::default()).unwrap());
    model.template = Arc::new(ChatTemplate::from_source("plain", "{{ messages[0].content }}").unwrap());
    let service = Service::new(vec![model], ServiceLimits::default(), metrics).unwrap();
    let talk = Conversation::new(vec![Message::new("user", "it")]);
    let begun = Conversation { ending: Ending::Continue, ..talk.clone() };
    for (prompt, text) in [
        (Prompt::Messages(talk), "so it"),
        (Prompt::Messages(begun), " so it"),
        (Prompt::Text("it".into()), " so it"),
        (Prompt::Ids(vec![3]), " so it"),
    ] {
        assert_eq!(
            one(&service, GenerateRequest { prompt: prompt.clone(), ..asking("") }).await.text,
            text,
            "{prompt:?}"
        );
    }
}

#[tokio::test]
async fn length_ends_a_candidate() {
    let service = Setup::saying(&["123456"]).service();
    let short = one(&service, GenerateRequest { max_tokens: Some(3), ..asking("1") }).await;
    assert_eq!((short.text.as_str(), short.finish, short.usage.completion_tokens), ("123", FinishReason::Length, 3));
    // Without max_tokens the context is the limit.
    let endless = one(&service, GenerateRequest { seed: Some(7), ..asking("1+1") }).await;
    assert_eq!((endless.finish, endless.usage.completion_tokens), (FinishReason::Length, 256 - 3));
    check_freed(&service);
}

#[track_caller]
fn check_end(candidate: &Candidate, text: &str, stop: Option<StopReason>, drawn: usize) {
    let seen = (candidate.text.as_str(), candidate.finish, candidate.stop_reason.clone(), candidate.ids.len());
    assert_eq!(seen, (text, FinishReason::Stop, stop, drawn));
    assert_eq!(candidate.usage.completion_tokens, drawn);
}

#[tokio::test]
async fn a_stop_string_across_tokens_ends_a_candidate() {
    let service = Setup::saying(&["12+34"]).service();
    let stop = |text: &str| Some(StopReason::Text(text.into()));
    let ask = |stops: &[&str], stop_text| GenerateRequest {
        stop: stops.iter().map(|stop| stop.to_string()).collect(),
        stop_text,
        ..asking("1")
    };
    check_end(&one(&service, ask(&["2+3"], StopText::Cut)).await, "1", stop("2+3"), 4);
    check_end(&one(&service, ask(&["2+3"], StopText::Keep)).await, "12+3", stop("2+3"), 4);
    check_end(&one(&service, ask(&["+4", "12"], StopText::Cut)).await, "", stop("12"), 2);
    // A prefix of a stop string that never completes is not lost.
    check_end(&one(&service, ask(&["345"], StopText::Cut)).await, "12+34", None, 6);
    check_freed(&service);
}

#[tokio::test]
async fn a_stop_string_cancels_its_own_sequence_only() {
    // Candidate 0 would never end by itself: it draws with a seed without script.
    let mut setup = Setup::saying(&["12+34"]);
    setup.replies[0] = ids(&"12+34".repeat(100));
    setup.replies.push([ids("999"), vec![EOS]].concat());
    let service = setup.service();
    let request = GenerateRequest { n: 2, stop: vec!["+".into()], ..asking("1") };
    let candidates = collect(&service, request).await;
    check_end(&candidates[0], "12", Some(StopReason::Text("+".into())), 3);
    check_end(&candidates[1], "999", None, 4);
    check_freed(&service);
}

#[tokio::test]
async fn stop_tokens_have_no_text_unless_kept() {
    let service = Setup::saying(&["12+34"]).service();
    let plus = ids("+")[0];
    let ask = |stop_text| GenerateRequest { stop_token_ids: vec![plus], stop_text, ..asking("1") };
    check_end(&one(&service, ask(StopText::Cut)).await, "12", Some(StopReason::Token(plus)), 3);
    check_end(&one(&service, ask(StopText::Keep)).await, "12+", Some(StopReason::Token(plus)), 3);
    // End of sequence has no text even then, and is no stop of the request's own.
    let keep = GenerateRequest { stop_text: StopText::Keep, ..asking("1") };
    check_end(&one(&service, keep).await, "12+34", None, 6);
}

#[tokio::test]
async fn end_of_sequence_can_be_ignored() {
    let mut setup = Setup::saying(&["12"]);
    setup.replies[0].extend(ids("34"));
    let service = setup.service();
    let request = GenerateRequest { eos: Eos::Ignored, max_tokens: Some(5), ..asking("1") };
    let candidate = one(&service, request).await;
    assert_eq!((candidate.text.as_str(), candidate.finish), ("1234", FinishReason::Length));
    assert_eq!(candidate.ids.len(), 5);
}

#[tokio::test]
async fn candidates_draw_with_consecutive_seeds() {
    let service = Setup::default().service();
    let ask = |seed, n| GenerateRequest { seed: Some(seed), n, max_tokens: Some(20), ..asking("1+1") };
    let four = collect(&service, ask(7, 4)).await;
    for (index, candidate) in four.iter().enumerate() {
        let alone = one(&service, ask(7 + index as u64, 1)).await;
        assert_eq!((&alone.ids, alone.seed), (&candidate.ids, candidate.seed));
        assert!(four[..index].iter().all(|other| other.ids != candidate.ids), "{index} repeats another");
    }
    let last = collect(&service, ask(u64::MAX, 2)).await;
    assert_eq!((last[0].seed, last[1].seed), (u64::MAX, 0));
}

#[tokio::test]
async fn a_request_without_a_seed_gets_one_and_can_be_repeated() {
    let service = Setup::default().service();
    let ask = |seed| GenerateRequest { seed, max_tokens: Some(8), ..asking("1") };
    let first = service.generate(ask(None)).await.unwrap();
    let seed = first.seed();
    assert!(seed < 1 << 53, "{seed} is not exact in a double");
    let first = first.collect().await.unwrap();
    assert_ne!(service.generate(ask(None)).await.unwrap().seed(), seed);
    assert_eq!(one(&service, ask(Some(seed))).await.ids, first.candidates[0].ids);
}

#[tokio::test]
async fn logprobs_carry_token_texts_and_finite_numbers() {
    let mut setup = Setup::saying(&["1+é"]);
    setup.replies[0].insert(1, 9);
    let service = setup.service();
    let candidate = one(&service, GenerateRequest { logprobs: Some(2), ..asking("1") }).await;
    assert_eq!(candidate.logprobs.len(), candidate.ids.len());
    let infos = &candidate.logprobs;
    assert_eq!((infos[0].token.text.as_str(), infos[0].token.bytes.as_slice()), ("1", b"1".as_slice()));
    assert_eq!(infos[1].logprob, Some(-9999.0));
    assert_eq!(infos[2].logprob, Some(fake::logprob(infos[2].token.id)));
    for info in infos {
        let top: Vec<(u32, f32)> = info.top.iter().map(|(token, logprob)| (token.id, *logprob)).collect();
        assert_eq!(top, [(8, -1.0), (9, -9999.0)]);
    }
    let bytes: Vec<u8> = infos[2..].iter().flat_map(|info| info.token.bytes.clone()).collect();
    assert_eq!(bytes, "+é</s>".as_bytes());
    let sum: f64 = infos.iter().map(|info| f64::from(info.logprob.unwrap())).sum();
    assert_eq!(candidate.mean_logprob, Some(sum / infos.len() as f64));
}

#[tokio::test]
async fn prompt_logprobs_come_first_and_once() {
    let service = Setup::saying(&["1", "2", "3"]).service();
    for max_tokens in [None, Some(0)] {
        let request =
            GenerateRequest { n: 3, max_tokens, prompt_logprobs: Some(1), logprobs: Some(0), ..asking("1+2") };
        let all = updates(service.generate(request).await.unwrap()).await;
        let Update::Prompt(tokens) = &all[0] else { panic!("{:?} came first", all[0]) };
        let logprobs: Vec<Option<f32>> = tokens.iter().map(|info| info.logprob).collect();
        let prompt = ids("1+2");
        assert_eq!(logprobs, [None, Some(fake::logprob(prompt[1])), Some(fake::logprob(prompt[2]))]);
        assert_eq!((tokens[0].top.len(), tokens[1].top.len()), (0, 1));
        assert_eq!(tokens.iter().map(|info| info.token.text.as_str()).collect::<String>(), "1+2");
        assert_eq!(all.iter().filter(|update| matches!(update, Update::Prompt(_))).count(), 1);
        assert_eq!(all.iter().filter(|update| matches!(update, Update::Finished(_))).count(), 3);
    }
    // A prompt of one token has nothing to predict it.
    let request = GenerateRequest { max_tokens: Some(0), prompt_logprobs: Some(0), ..asking("1") };
    let completed = service.generate(request).await.unwrap().collect().await.unwrap();
    assert_eq!((completed.prompt.len(), completed.prompt[0].logprob), (1, None));
}

#[tokio::test]
async fn a_candidate_that_is_ahead_waits_for_the_prompt() {
    let service = Setup::default().service();
    let model = Arc::clone(service.policy(None).unwrap());
    let request = GenerateRequest { n: 2, prompt_logprobs: Some(0), ..asking("1") };
    let prepared = prompt::prepare(&model, &request.prompt, service.limits()).unwrap();
    let (first, first_events) = tokio::sync::mpsc::channel(4);
    let (second, second_events) = tokio::sync::mpsc::channel(4);
    let mut generation = Generation::new(model, &request, 0, prepared, vec![Some(first_events), Some(second_events)]);
    second.try_send(Event::Token { id: 7, logprob: None }).unwrap();
    tokio::select! {
        biased;
        update = generation.next() => panic!("{update:?} came before the prompt"),
        () = std::future::ready(()) => {}
    }
    first.try_send(Event::Prompt(Vec::new())).unwrap();
    assert!(matches!(generation.next().await, Some(Ok(Update::Prompt(tokens))) if tokens.len() == 1));
    assert!(matches!(generation.next().await, Some(Ok(Update::Delta(delta))) if delta.index == 1));
    // An engine that goes away without a word is noticed.
    drop(second);
    assert!(matches!(generation.next().await, Some(Err(Error::Unavailable(_)))));
    assert!(first.is_closed() && generation.next().await.is_none());
}

#[tokio::test]
async fn zero_tokens_need_no_engine() {
    let setup = Setup { policy_gate: Gate::after(0), ..Setup::default() };
    let service = setup.service();
    let candidates = collect(&service, GenerateRequest { n: 2, max_tokens: Some(0), ..asking("1+2") }).await;
    assert_eq!(candidates.len(), 2);
    for candidate in candidates {
        assert_eq!((candidate.text.as_str(), candidate.finish), ("", FinishReason::Length));
        assert_eq!((candidate.usage.prompt_tokens, candidate.usage.completion_tokens), (3, 0));
    }
    setup.policy_gate.release();
}

#[tokio::test]
async fn dropping_a_generation_frees_every_block() {
    let service = Setup::default().service();
    let request = || GenerateRequest { n: 4, seed: Some(7), ..asking("1+1") };
    // Before anything is read, in the middle, and while the engine waits for a reader that lags.
    for reads in [0, 5, 120] {
        let mut generation = service.generate(request()).await.unwrap();
        for _ in 0..reads {
            generation.next().await.unwrap().unwrap();
        }
        drop(generation);
        check_freed(&service);
    }
}

#[tokio::test]
async fn a_reader_that_stops_reading_stops_its_own_sequences_only() {
    let service = Setup::saying(&["1+1"]).service();
    let mut lagging = service.generate(GenerateRequest { n: 2, seed: Some(7), ..asking("1") }).await.unwrap();
    lagging.next().await.unwrap().unwrap();
    assert_eq!(one(&service, asking("2")).await.text, "1+1");
    // Nothing was lost meanwhile.
    let rest = updates(lagging).await;
    assert_eq!(rest.iter().filter(|update| matches!(update, Update::Finished(_))).count(), 2);
    let drawn = |index| rest.iter().filter(|update| matches!(update, Update::Delta(d) if d.index == index)).count();
    assert!(drawn(0) + drawn(1) >= 2 * 255 - 1, "{} + {}", drawn(0), drawn(1));
}

#[tokio::test]
async fn too_many_candidates_are_refused_together() {
    let gate = Gate::after(0);
    let service = Setup { running_max: 1, waiting_max: 2, policy_gate: gate.clone(), ..Setup::default() }.service();
    let refused = service.generate(GenerateRequest { n: 5, seed: Some(7), ..asking("1") }).await;
    assert!(matches!(refused, Err(Error::Overloaded(_))), "{:?}", refused.err());
    gate.release();
    check_freed(&service);
    assert_eq!(collect(&service, GenerateRequest { max_tokens: Some(2), ..asking("1") }).await.len(), 1);
}

#[tokio::test]
async fn a_failed_candidate_ends_the_others() {
    let service = Setup::default().service();
    let request = GenerateRequest { n: 3, seed: Some(fake::BROKEN_SEED - 1), ..asking("1") };
    let mut generation = service.generate(request).await.unwrap();
    let error = loop {
        match generation.next().await {
            Some(Err(error)) => break error,
            Some(Ok(_)) => {}
            None => panic!("no error"),
        }
    };
    assert_eq!(error, Error::internal("broken"));
    assert!(generation.next().await.is_none());
    check_freed(&service);
}

#[tokio::test]
async fn refusals_name_the_field() {
    let service = Setup { len_max: 16, ..Setup::default() }.service();
    let check = async |request: GenerateRequest, field: &str, message: &str| {
        assert_eq!(refusal(service.generate(request).await), (field.to_string(), message.to_string()));
    };
    check(asking(""), "prompt", "prompt is empty").await;
    check(GenerateRequest { prompt: Prompt::Ids(vec![]), ..asking("") }, "prompt", "prompt is empty").await;
    let none = Conversation::new(Vec::new());
    let no_messages = "messages: at least one of messages is needed";
    check(GenerateRequest { prompt: Prompt::Messages(none), ..asking("") }, "messages", no_messages).await;
    let outside = "prompt: token id 320 is outside the vocabulary of 320 tokens";
    check(GenerateRequest { prompt: Prompt::Ids(vec![5, 320]), ..asking("") }, "prompt", outside).await;
    let long = "prompt is 17 tokens long, but the context of this model holds 16 tokens";
    check(asking(&"1".repeat(17)), "prompt", long).await;
    let together =
        "max_tokens is 15 and prompt is 2 tokens long, together 17, but the context of this model holds 16 tokens";
    check(GenerateRequest { max_tokens: Some(15), ..asking("12") }, "max_tokens", together).await;
    check(GenerateRequest { n: 0, ..asking("1") }, "n", "n must be at least 1").await;
    check(GenerateRequest { n: 65, ..asking("1") }, "n", "n is 65, but at most 64 is allowed").await;
    let hot = GenerateRequest { temperature: f32::INFINITY, ..asking("1") };
    check(hot, "temperature", "temperature must be between 0 and 2, not inf").await;
    let bytes = format!("prompt holds {} bytes, but at most {} are allowed", (1 << 20) + 1, 1 << 20);
    check(asking(&"1".repeat((1 << 20) + 1)), "prompt", &bytes).await;
    let talk = Conversation::new(vec![Message::new("user", "1"); 1025]);
    let messages = "messages holds 1025 messages, but at most 1024 are allowed";
    check(GenerateRequest { prompt: Prompt::Messages(talk), ..asking("") }, "messages", messages).await;
    assert_eq!(service.models()[0].engine.status().queued(), 0);
}
