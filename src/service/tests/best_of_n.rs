//! Best of n: what is drawn, what the reward model reads and when, what is chosen and reported.

use super::*;
use crate::service::best_of_n::{AnswerRule, BestOfN, BestOfRequest, Strategy};

const QUESTION: &str = "Make 24";

fn chat(prompt: &str) -> Prompt {
    Prompt::Messages(Conversation::new(vec![Message::new("user", prompt)]))
}

fn request(n: usize, best_of: usize, strategy: Option<Strategy>) -> BestOfRequest {
    let generate = GenerateRequest { prompt: chat(QUESTION), n, ..asking("") };
    BestOfRequest { strategy, ..BestOfRequest::new(generate, best_of) }
}

/// What the reward model must read for a candidate that says `answer`.
fn rewarded(answer: &str) -> f32 {
    fake::reward(&[vec![1], ids(&format!("[INST] {QUESTION} [/INST]{answer}")), vec![EOS]].concat())
}

/// Indices by falling reward.
fn by_reward(texts: &[&str]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..texts.len()).collect();
    order.sort_by(|a, b| rewarded(texts[*b]).total_cmp(&rewarded(texts[*a])));
    order
}

fn mean(text: &str) -> f64 {
    let drawn = [ids(text), vec![EOS]].concat();
    drawn.iter().map(|token| f64::from(fake::logprob(*token))).sum::<f64>() / drawn.len() as f64
}

async fn run(texts: &[&str], request: BestOfRequest) -> (Service, BestOfN) {
    let service = Setup::saying(texts).service();
    let outcome = service.best_of_n(request).await.unwrap();
    check_freed(&service);
    (service, outcome)
}

#[tokio::test]
async fn the_highest_reward_is_chosen_and_everything_reported() {
    let texts = ["24", "3*8\\boxed{24}", "I do not know", "8+8+8", "12+12"];
    let (service, outcome) = run(&texts, request(2, 5, None)).await;
    let order = by_reward(&texts);
    assert_eq!(outcome.chosen, order[..2]);
    assert_eq!((outcome.strategy, outcome.seed), (Strategy::Reward, 100));
    assert_eq!((outcome.model.name.as_str(), outcome.template.as_deref()), ("mini", Some("mini-template")));
    assert_eq!(outcome.reward_model.as_ref().map(|model| model.name.as_str()), Some("mini-rm"));
    let (mut drawn, mut read) = (0, 0);
    for (index, rated) in outcome.candidates.iter().enumerate() {
        assert_eq!((rated.candidate.index, rated.candidate.text.as_str()), (index, texts[index]));
        assert_eq!((rated.reward, rated.reward_truncated), (Some(rewarded(texts[index])), false));
        assert_eq!(rated.candidate.mean_logprob, Some(mean(texts[index])));
        assert_eq!(rated.rank, order.iter().position(|one| *one == index).unwrap());
        assert!(rated.candidate.logprobs.is_empty(), "nobody asked for them");
        drawn += ids(texts[index]).len() + 1;
        read += ids(&format!("[INST] {QUESTION} [/INST]{}", texts[index])).len() + 2;
    }
    assert_eq!(outcome.candidates[1].answer.as_deref(), Some("24"));
    assert_eq!(outcome.candidates[0].answer, None);
    assert_eq!(outcome.usage.prompt_tokens, ids("[INST] Make 24 [/INST]").len() + 1);
    assert_eq!((outcome.usage.completion_tokens, outcome.reward_usage.unwrap().prompt_tokens), (drawn, read));
    let counted = |label| service.metrics().candidates_total.with_label_values(&[label]).get();
    assert_eq!((counted("chosen"), counted("rejected")), (2, 3));
}

#[tokio::test]
async fn logprob_needs_no_reward_model() {
    let texts = ["24", "3*8\\boxed{24}", "I do not know"];
    let mut expected: Vec<usize> = (0..3).collect();
    expected.sort_by(|a, b| mean(texts[*b]).total_cmp(&mean(texts[*a])));
    let (_, outcome) = run(&texts, request(1, 3, Some(Strategy::LogProb))).await;
    assert_eq!(outcome.chosen, expected[..1]);
    assert!(outcome.reward_model.is_none() && outcome.reward_usage.is_none());
    assert!(outcome.candidates.iter().all(|rated| rated.reward.is_none()));
    // A named reward model reads them all the same, and does not decide.
    let named = BestOfRequest { reward_model: Some("mini-rm".into()), ..request(1, 3, Some(Strategy::LogProb)) };
    let (_, outcome) = run(&texts, named).await;
    assert_eq!(outcome.chosen, expected[..1]);
    assert_eq!(outcome.candidates[2].reward, Some(rewarded(texts[2])));
    // It is the default where there is none.
    let service = Setup { kinds: vec![Kind::Policy], ..Setup::saying(&texts) }.service();
    let outcome = service.best_of_n(request(1, 3, None)).await.unwrap();
    assert_eq!((outcome.strategy, &outcome.chosen), (Strategy::LogProb, &expected[..1].to_vec()));
}

#[tokio::test]
async fn majority_counts_answers_by_value() {
    let texts = ["x\\boxed{7}", "\\boxed{1/2}", "no", "so\\boxed{0.5}", "\\boxed{8}"];
    let (_, outcome) = run(&texts, request(2, 5, Some(Strategy::Majority))).await;
    let mut halves = vec![1, 3];
    halves.sort_by(|a, b| rewarded(texts[*b]).total_cmp(&rewarded(texts[*a])));
    assert_eq!(outcome.chosen, halves);
    assert_eq!(outcome.candidates[2].rank, 4, "without an answer it is last");
    assert_eq!(outcome.candidates[3].answer.as_deref(), Some("0.5"));
    // Without a reward model log-probabilities break ties.
    let service = Setup { kinds: vec![Kind::Policy], ..Setup::saying(&texts) }.service();
    let outcome = service.best_of_n(request(2, 5, Some(Strategy::Majority))).await.unwrap();
    halves.sort_by(|a, b| mean(texts[*b]).total_cmp(&mean(texts[*a])));
    assert_eq!((outcome.chosen, outcome.reward_usage), (halves, None));
}

#[tokio::test]
async fn weighted_sums_the_rewards_of_an_answer() {
    let texts = ["\\boxed{1}", "a\\boxed{2}", "b\\boxed{2}", "\\boxed{3}", "c\\boxed{1}", "d\\boxed{2}"];
    let (_, outcome) = run(&texts, request(1, 6, Some(Strategy::Weighted))).await;
    let sigmoid = |x: f32| 1.0 / (1.0 + (-f64::from(x)).exp());
    let weight = |group: &[usize]| group.iter().map(|index| sigmoid(rewarded(texts[*index]))).sum::<f64>();
    let groups: [&[usize]; 3] = [&[0, 4], &[1, 2, 5], &[3]];
    let heaviest = groups.iter().max_by(|a, b| weight(a).total_cmp(&weight(b))).unwrap();
    let best = heaviest.iter().max_by(|a, b| rewarded(texts[**a]).total_cmp(&rewarded(texts[**b]))).unwrap();
    assert_eq!(outcome.chosen, [*best]);
}

#[tokio::test]
async fn answers_stand_where_the_request_says() {
    let texts = ["1+2 3", "2*3", "answer: 3 of 9"];
    let answers = async |answer| {
        let (_, outcome) = run(&texts, BestOfRequest { answer, ..request(1, 3, None) }).await;
        outcome.candidates.into_iter().map(|rated| rated.answer).collect::<Vec<_>>()
    };
    let some = |text: &str| Some(text.to_string());
    assert_eq!(answers(AnswerRule::LastNumber).await, [some("3"), some("3"), some("9")]);
    assert_eq!(answers(AnswerRule::Regex("answer: (\\d)".into())).await, [None, None, some("3")]);
}

#[tokio::test]
async fn text_is_scored_as_one_rendered_text() {
    let texts = ["24", "3*8"];
    for prompt in [
        Prompt::Text("<s>[INST] Make 24 [/INST]".into()),
        Prompt::Ids([vec![1], ids("[INST] Make 24 [/INST]")].concat()),
    ] {
        let mut request = request(1, 2, None);
        request.generate.prompt = prompt.clone();
        let (_, outcome) = run(&texts, request.clone()).await;
        assert_eq!(outcome.template, None);
        for (rated, text) in outcome.candidates.iter().zip(texts) {
            assert_eq!(rated.reward, Some(rewarded(text)));
        }
        // A reward model that adds BOS itself reads the same tokens.
        let service = Setup { add_bos: Some(true), ..Setup::saying(&texts) }.service();
        let outcome = service.best_of_n(request).await.unwrap();
        assert_eq!(outcome.candidates[1].reward, Some(rewarded(texts[1])));
    }
}

#[tokio::test]
async fn a_begun_answer_is_scored_whole() {
    let mut request = request(1, 2, None);
    let messages = vec![Message::new("user", QUESTION), Message::new("assistant", "3*")];
    let begun = Conversation { ending: Ending::Continue, ..Conversation::new(messages) };
    request.generate.prompt = Prompt::Messages(begun);
    let (_, outcome) = run(&["8", "9-3"], request).await;
    assert_eq!(outcome.prompt_text, "<s>[INST] Make 24 [/INST]3*");
    assert_eq!(outcome.candidates[0].candidate.text, "8");
    assert_eq!(outcome.candidates[0].reward, Some(rewarded("3*8")));
    assert_eq!(outcome.candidates[1].reward, Some(rewarded("3*9-3")));
}

#[tokio::test]
async fn candidates_are_scored_while_others_generate() {
    let gate = Gate::after(0);
    let long = "1+2*3-4=".repeat(8);
    let setup = Setup { policy_gate: gate.clone(), ..Setup::saying(&[&long, "7", &long]) };
    let service = Arc::new(setup.service());
    let running = tokio::spawn({
        let service = Arc::clone(&service);
        async move { service.best_of_n(request(1, 3, None)).await }
    });
    let policy = service.models()[0].engine.status();
    while policy.running() + policy.queued() < 3 {
        tokio::task::yield_now().await;
    }
    // Six steps: enough for the short candidate, not for the long ones.
    gate.allow(6);
    let read = || service.metrics().reward_tokens_total.with_label_values(&["mini-rm"]).get();
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
    while read() == 0 {
        assert!(std::time::Instant::now() < deadline, "no candidate was scored while the others generate");
        tokio::task::yield_now().await;
    }
    assert!(!running.is_finished());
    gate.release();
    let outcome = running.await.unwrap().unwrap();
    assert_eq!(outcome.candidates[1].reward, Some(rewarded("7")));
    assert_eq!(outcome.candidates[0].reward, Some(rewarded(&long)));
}

#[tokio::test]
async fn a_reward_model_with_a_short_queue_is_waited_for() {
    let texts: Vec<String> = (0..12).map(|index| index.to_string()).collect();
    let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
    let setup = Setup { waiting_max: 12, running_max: 1, ..Setup::saying(&texts) };
    let metrics = Arc::new(Metrics::new().unwrap());
    let short = Setup { waiting_max: 1, ..setup.clone() };
    let models = vec![setup.model(Kind::Policy, &metrics), short.model(Kind::Reward, &metrics)];
    let service = Service::new(models, ServiceLimits::default(), metrics).unwrap();
    let outcome = service.best_of_n(request(1, 12, None)).await.unwrap();
    assert_eq!(outcome.chosen, by_reward(&texts)[..1]);
}

#[tokio::test]
async fn finished_candidates_wait_for_a_reward_model_that_others_fill() {
    let gate = Gate::after(0);
    let setup = Setup { reward_gate: gate.clone(), ..Setup::saying(&["24", "25"]) };
    let metrics = Arc::new(Metrics::new().unwrap());
    let narrow = Setup { waiting_max: 1, running_max: 1, ..setup.clone() };
    let models = vec![setup.model(Kind::Policy, &metrics), narrow.model(Kind::Reward, &metrics)];
    let service = Arc::new(Service::new(models, ServiceLimits::default(), metrics).unwrap());
    // Two sequences of others: one runs into the gate, one waits behind it.
    let (reply, _events) = tokio::sync::mpsc::channel(4);
    let engine = &service.models()[1].engine;
    let task = crate::engine::Task::Score(crate::engine::ScoreRows::Last);
    while engine.status().running() + engine.status().queued() < 2 {
        let _ = engine.submit(crate::engine::Request { prompt: ids("1"), task: task.clone(), reply: reply.clone() });
        std::thread::yield_now();
    }
    let running = tokio::spawn({
        let service = Arc::clone(&service);
        async move { service.best_of_n(request(1, 2, None)).await }
    });
    let drawn = || service.metrics().generation_tokens_total.with_label_values(&["mini"]).get();
    while drawn() < 6 {
        tokio::task::yield_now().await;
    }
    gate.release();
    let outcome = running.await.unwrap().unwrap();
    assert_eq!(outcome.chosen, by_reward(&["24", "25"])[..1]);
}

#[tokio::test]
async fn a_reward_context_too_short_reads_the_newest_tokens_and_says_so() {
    let texts = ["1".repeat(40), "2".into()];
    let setup = Setup::saying(&[&texts[0], &texts[1]]);
    let metrics = Arc::new(Metrics::new().unwrap());
    let short = Setup { len_max: 30, ..setup.clone() };
    let models = vec![setup.model(Kind::Policy, &metrics), short.model(Kind::Reward, &metrics)];
    let service = Service::new(models, ServiceLimits::default(), metrics).unwrap();
    let outcome = service.best_of_n(request(1, 2, None)).await.unwrap();
    let newest = [vec![1], ids(&"1".repeat(28)), vec![EOS]].concat();
    assert_eq!(outcome.candidates[0].reward, Some(fake::reward(&newest)));
    assert_eq!([outcome.candidates[0].reward_truncated, outcome.candidates[1].reward_truncated], [true, false]);
}

#[tokio::test]
async fn leaving_cancels_both_models() {
    let policy = Gate::after(40);
    let reward = Gate::after(0);
    let mut setup = Setup { policy_gate: policy.clone(), reward_gate: reward.clone(), ..Setup::saying(&["7"]) };
    setup.replies.push(ids(&"1+".repeat(100)));
    let service = Arc::new(setup.service());
    let running = tokio::spawn({
        let service = Arc::clone(&service);
        async move { service.best_of_n(request(1, 2, None)).await.map(|_| ()) }
    });
    let holds = |index: usize| service.models()[index].engine.status().running() > 0;
    while !(holds(0) && holds(1)) {
        assert!(!running.is_finished());
        tokio::task::yield_now().await;
    }
    running.abort();
    assert!(running.await.unwrap_err().is_cancelled());
    policy.release();
    reward.release();
    check_freed(&service);
}

#[tokio::test]
async fn logprobs_are_kept_where_they_were_asked_for() {
    let mut request = request(1, 2, None);
    request.generate.logprobs = Some(1);
    request.generate.prompt_logprobs = Some(0);
    let (_, outcome) = run(&["24", "25"], request).await;
    let candidate = &outcome.candidates[1].candidate;
    assert_eq!((candidate.logprobs.len(), candidate.logprobs[0].top.len()), (candidate.ids.len(), 1));
    assert_eq!(outcome.prompt.len(), outcome.usage.prompt_tokens);
}

#[tokio::test]
async fn refusals_name_the_field() {
    let service = Setup::saying(&["1"]).service();
    let check = async |request: BestOfRequest, field: &str, message: &str| {
        assert_eq!(refusal(service.best_of_n(request).await), (field.to_string(), message.to_string()));
    };
    check(request(3, 3, None), "best_of", "best_of is 3, but must be more than n, which is 3").await;
    check(request(1, 65, None), "best_of", "best_of is 65, but at most 64 is allowed").await;
    check(request(0, 2, None), "n", "n must be at least 1").await;
    let mut nothing = request(1, 2, None);
    nothing.generate.max_tokens = Some(0);
    check(nothing, "max_tokens", "max_tokens must be at least 1 with best_of").await;
    let policy = BestOfRequest { reward_model: Some("mini".into()), ..request(1, 2, None) };
    check(policy, "rerank.model", "mini has no reward head; use mini-rm").await;
    let unknown = BestOfRequest { reward_model: Some("x".into()), ..request(1, 2, None) };
    let error = service.best_of_n(unknown).await.unwrap_err();
    assert_eq!(error, Error::NotFound("model x is not served; served: mini, mini-rm".into()));
    let pattern = BestOfRequest { answer: AnswerRule::Regex("(".into()), ..request(1, 2, None) };
    assert_eq!(refusal(service.best_of_n(pattern).await).0, "rerank.answer");
    let huge = BestOfRequest { answer: AnswerRule::Regex("\\w{1000}{100}".into()), ..request(1, 2, None) };
    assert_eq!(refusal(service.best_of_n(huge).await).0, "rerank.answer");
    let alone = Setup { kinds: vec![Kind::Policy], ..Setup::saying(&["1"]) }.service();
    let refused = refusal(alone.best_of_n(request(1, 2, Some(Strategy::Weighted))).await);
    let message = "strategy weighted needs a reward model; no reward model is served";
    assert_eq!(refused, ("rerank.strategy".into(), message.into()));
}
