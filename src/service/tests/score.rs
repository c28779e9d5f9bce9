//! Scoring: which tokens are read, in which order the rewards come, what is refused.

use super::*;
use std::time::Duration;

use crate::{
    engine::{Request, ScoreRows, Task},
    service::score::{Returns, Rewards, ScoreInput, ScoreRequest, Scoring, Truncate},
};

fn text(text: &str) -> ScoreInput {
    ScoreInput::Text(text.into())
}

fn request(inputs: Vec<ScoreInput>) -> ScoreRequest {
    ScoreRequest { inputs, ..ScoreRequest::default() }
}

async fn score(setup: &Setup, request: ScoreRequest) -> Rewards {
    let service = setup.service();
    let rewards = service.score(request).await.unwrap();
    check_freed(&service);
    rewards
}

#[track_caller]
fn check(rewards: &Rewards, index: usize, sequence: &[TokenId]) {
    let one = &rewards.data[index];
    assert_eq!((one.index, one.tokens, Some(&one.last_token_id)), (index, sequence.len(), sequence.last()));
    assert_eq!(one.reward, fake::reward(sequence), "input {index}");
}

#[tokio::test]
async fn three_forms_of_a_conversation_have_one_reward() {
    let question = Message::new("user", "2+2");
    let inputs = vec![
        ScoreInput::Messages(vec![question.clone(), Message::new("assistant", "4")]),
        ScoreInput::PromptAndCompletion { prompt: vec![question], completion: "4".into() },
        text("<s>[INST] 2+2 [/INST]4"),
        text("<s>[INST] 2+2 [/INST]4</s>"),
        ScoreInput::Ids([vec![1], ids("[INST] 2+2 [/INST]4")].concat()),
    ];
    let rewards = score(&Setup::default(), request(inputs)).await;
    let sequence = [vec![1], ids("[INST] 2+2 [/INST]4"), vec![EOS]].concat();
    for index in 0..5 {
        check(&rewards, index, &sequence);
        assert!(!rewards.data[index].truncated && rewards.data[index].all.is_none());
    }
    assert_eq!((rewards.template.as_deref(), rewards.model.name.as_str()), (Some("mini-template"), "mini-rm"));
    assert_eq!((rewards.usage.prompt_tokens, rewards.usage.completion_tokens), (5 * sequence.len(), 0));
}

#[tokio::test]
async fn the_checkpoint_or_the_request_says_whether_eos_ends_a_text() {
    let no_eos = Setup { append_eos: false, ..Setup::default() };
    for (setup, append_eos, appended) in [
        (Setup::default(), None, true),
        (Setup::default(), Some(false), false),
        (no_eos.clone(), None, false),
        (no_eos, Some(true), true),
    ] {
        let rewards = score(&setup, ScoreRequest { append_eos, ..request(vec![text("1+1")]) }).await;
        let eos: &[TokenId] = if appended { &[EOS] } else { &[] };
        check(&rewards, 0, &[ids("1+1").as_slice(), eos].concat());
        assert_eq!(rewards.template, None);
    }
}

#[tokio::test]
async fn a_token_may_cross_the_border_of_question_and_answer() {
    // The whole text is tokenised, not question and answer apart.
    let whole = "Use the numbers";
    let (question, answer) = whole.split_at(5);
    assert_ne!(ids(whole), [ids(question), ids(answer)].concat(), "the tokenizer merges across the border");
    let template = ChatTemplate::from_source("plain", "{% for m in messages %}{{ m.content }}{% endfor %}").unwrap();
    let metrics = Arc::new(Metrics::new().unwrap());
    let mut model = Setup::default().model(Kind::Reward, &metrics);
    model.template = Arc::new(template);
    let service = Service::new(vec![model], ServiceLimits::default(), metrics).unwrap();
    let input =
        ScoreInput::PromptAndCompletion { prompt: vec![Message::new("user", question)], completion: answer.into() };
    let rewards = service.score(request(vec![input])).await.unwrap();
    check(&rewards, 0, &[ids(whole), vec![EOS]].concat());
}

#[tokio::test]
async fn every_token_has_a_reward() {
    let rewards =
        score(&Setup::default(), ScoreRequest { returns: Returns::All, ..request(vec![text("1+12*3")]) }).await;
    let sequence = [ids("1+12*3"), vec![EOS]].concat();
    let all: Vec<f32> = (1..=sequence.len()).map(|len| fake::reward(&sequence[..len])).collect();
    assert_eq!(rewards.data[0].all.as_deref(), Some(all.as_slice()));
    assert_eq!(Some(&rewards.data[0].reward), all.last());
}

#[tokio::test]
async fn order_is_kept_beyond_what_the_engine_queues() {
    // Sixty inputs of all lengths through a queue of two, two at a time.
    let setup = Setup { waiting_max: 2, running_max: 2, ..Setup::default() };
    let texts: Vec<String> = (0..60).map(|index| format!("{}={index}", "7+".repeat(index * 7 % 60))).collect();
    let rewards = score(&setup, request(texts.iter().map(|input| text(input)).collect())).await;
    assert_eq!(rewards.data.len(), 60);
    for (index, input) in texts.iter().enumerate() {
        check(&rewards, index, &[ids(input), vec![EOS]].concat());
    }
}

#[tokio::test]
async fn an_engine_full_of_others_is_overloaded() {
    let gate = Gate::after(0);
    let setup = Setup { waiting_max: 1, running_max: 1, reward_gate: gate.clone(), ..Setup::default() };
    let service = Arc::new(setup.service());
    let others: Vec<_> = (0..3)
        .map(|_| {
            let service = Arc::clone(&service);
            tokio::spawn(async move { service.score(request(vec![text("1")])).await })
        })
        .collect();
    let mut outcomes = Vec::new();
    // One runs, one waits, and one of the three is refused while the gate is shut.
    while outcomes.is_empty() {
        tokio::task::yield_now().await;
        if others.iter().any(|other| other.is_finished()) {
            gate.release();
            outcomes.push(());
        }
    }
    let mut overloaded = 0;
    for other in others {
        match other.await.unwrap() {
            Ok(rewards) => assert_eq!(rewards.data.len(), 1),
            Err(error) => {
                assert!(matches!(error, Error::Overloaded(_)), "{error:?}");
                overloaded += 1;
            }
        }
    }
    assert!(overloaded >= 1);
    check_freed(&service);
}

#[tokio::test]
async fn patience_outlasts_an_engine_full_of_others() {
    let gate = Gate::after(0);
    let service = Setup { waiting_max: 1, running_max: 1, reward_gate: gate.clone(), ..Setup::default() }.service();
    let model = service.reward_model(None).unwrap();
    let (reply, _events) = tokio::sync::mpsc::channel(4);
    let other = || Request { prompt: ids("1"), task: Task::Score(ScoreRows::Last), reply: reply.clone() };
    while model.engine.status().running() == 0 || model.engine.submit(other()).is_ok() {
        std::thread::yield_now();
        let _ = model.engine.submit(other());
    }
    let sequence = service.prepare_scores(model, request(vec![text("1+1")])).await.unwrap().remove(0);
    let mut hasty = Scoring::new(Arc::clone(model), Returns::Last, Duration::ZERO);
    assert!(matches!(hasty.submit(0, sequence.clone()).await, Err(Error::Overloaded(_))));
    // Both are polled in this order, so the engine is asked once before the gate opens.
    let mut patient = Scoring::new(Arc::clone(model), Returns::Last, Duration::from_secs(60));
    let (submitted, ()) = tokio::join!(patient.submit(0, sequence), async { gate.release() });
    submitted.unwrap();
    let (rewards, _) = patient.finish().await.unwrap();
    assert_eq!(rewards[0].reward, fake::reward(&[ids("1+1"), vec![EOS]].concat()));
}

#[tokio::test]
async fn long_inputs_are_refused_or_shortened_and_marked() {
    let setup = Setup { len_max: 8, add_bos: Some(true), ..Setup::default() };
    let digits = ids("1234567890");
    let ask = |truncate| ScoreRequest { truncate, ..request(vec![text("12"), text("1234567890")]) };
    let left = score(&setup, ask(Truncate::Left)).await;
    check(&left, 0, &[vec![1], ids("12"), vec![EOS]].concat());
    check(&left, 1, &[&[1], &digits[4..], &[EOS]].concat());
    let right = score(&setup, ask(Truncate::Right)).await;
    check(&right, 1, &[&[1], &digits[..6], &[EOS]].concat());
    assert_eq!([left.data[0].truncated, left.data[1].truncated, right.data[1].truncated], [false, true, true]);
    let refused = refusal(setup.service().score(ask(Truncate::Error)).await);
    let message = "input: number 1 is 12 tokens long, but the context of this model holds 8; `truncate` can shorten it";
    assert_eq!(refused, ("input".into(), message.into()));
    // Just long enough: six digits between BOS and end of sequence; without BOS seven.
    let fits = score(&setup, request(vec![text("123456"), ScoreInput::Ids(ids("1234567"))])).await;
    assert_eq!([fits.data[0].tokens, fits.data[1].tokens], [8, 8]);
    let no_bos =
        score(&setup, ScoreRequest { truncate: Truncate::Left, ..request(vec![ScoreInput::Ids(digits.clone())]) });
    check(&no_bos.await, 0, &[&digits[3..], &[EOS]].concat());
}

#[tokio::test]
async fn bos_in_rendered_text_is_refused_where_it_would_double() {
    let service = Setup { add_bos: Some(true), ..Setup::default() }.service();
    let refused = refusal(service.score(request(vec![text("1"), text("<s>[INST] 1")])).await);
    let message = "input: rendered text begins with <s>, which is added here; leave it out";
    assert_eq!(refused, ("input".into(), message.into()));
    // A template that prints BOS itself has one, not two.
    let turns = vec![Message::new("user", "1"), Message::new("assistant", "2")];
    let rewards = service.score(request(vec![ScoreInput::Messages(turns)])).await.unwrap();
    check(&rewards, 0, &[vec![1], ids("[INST] 1 [/INST]2"), vec![EOS]].concat());
}

#[tokio::test]
async fn refusals_name_the_field() {
    let service = Setup::default().service();
    let check = async |inputs: Vec<ScoreInput>, field: &str, message: &str| {
        assert_eq!(refusal(service.score(request(inputs)).await), (field.to_string(), message.to_string()));
    };
    check(vec![], "input", "input: at least one of inputs is needed").await;
    check(vec![text("1"), text("")], "input", "input: number 1 is empty").await;
    check(vec![ScoreInput::Ids(vec![])], "input", "input: number 0 is empty").await;
    let outside = "input: token id 320 is outside the vocabulary of 320 tokens";
    check(vec![ScoreInput::Ids(vec![320])], "input", outside).await;
    let many = "input holds 257 inputs, but at most 256 are allowed";
    check(vec![text("1"); 257], "input", many).await;
    let question = Message::new("user", "1");
    let open = vec![ScoreInput::Messages(vec![question.clone()])];
    assert_eq!(refusal(service.score(request(open)).await).0, "messages");
    let nothing = ScoreInput::PromptAndCompletion { prompt: vec![], completion: "1".into() };
    check(vec![nothing], "prompt", "prompt: at least one of messages is needed").await;
    let policy = ScoreRequest { model: Some("mini".into()), ..request(vec![text("1")]) };
    assert_eq!(refusal(service.score(policy).await).1, "mini has no reward head; use mini-rm");
}

#[tokio::test]
async fn a_reward_that_is_no_number_never_leaves() {
    let service = Setup::default().service();
    let broken =
        ScoreRequest { append_eos: Some(false), ..request(vec![text("1"), ScoreInput::Ids(vec![5, fake::NO_REWARD])]) };
    assert_eq!(service.score(broken).await.unwrap_err(), Error::internal("the reward head gave no finite number"));
    check_freed(&service);
}
