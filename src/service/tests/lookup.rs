//! Which model a name means, and what the service refuses to serve.

use super::*;

fn names(kinds: &[Kind]) -> Service {
    Setup { kinds: kinds.to_vec(), ..Setup::default() }.service()
}

#[track_caller]
fn check_missing<T: std::fmt::Debug>(result: Result<T>, message: &str) {
    assert_eq!(result.unwrap_err(), Error::NotFound(message.into()));
}

#[test]
fn a_name_an_alias_or_nothing_finds_a_model() {
    let service = names(&[Kind::Policy, Kind::Reward]);
    assert_eq!(service.model(None).unwrap().name, "mini");
    assert_eq!(service.model(Some("mini-rm")).unwrap().name, "mini-rm");
    assert_eq!(service.policy(None).unwrap().name, "mini");
    assert_eq!(service.policy(Some("org/mini")).unwrap().name, "mini");
    assert_eq!(service.reward_model(None).unwrap().name, "mini-rm");
    assert_eq!(service.reward_model(Some("org/mini-rm")).unwrap().name, "mini-rm");
}

#[test]
fn an_unknown_name_is_answered_with_those_served() {
    let service = names(&[Kind::Policy, Kind::Reward]);
    let message = "model gpt-4 is not served; served: mini, mini-rm";
    check_missing(service.policy(Some("gpt-4")), message);
    check_missing(service.reward_model(Some("gpt-4")), message);
    check_missing(service.model(Some("")), "model \"\" is not served; served: mini, mini-rm");
    check_missing(service.model(Some("../x\n\u{1b}[31m")), "model ../x[31m is not served; served: mini, mini-rm");
    let long = service.model(Some(&"x".repeat(4096))).unwrap_err().to_string();
    assert_eq!(long, format!("model {} is not served; served: mini, mini-rm", "x".repeat(80)));
}

#[test]
fn the_wrong_kind_is_told_the_right_model() {
    let both = names(&[Kind::Policy, Kind::Reward]);
    let no_head = ("model".into(), "mini has no reward head; use mini-rm".into());
    assert_eq!(refusal(both.reward_model(Some("mini"))), no_head);
    let no_text = ("model".into(), "mini-rm only gives rewards and cannot generate; use mini".into());
    assert_eq!(refusal(both.policy(Some("mini-rm"))), no_text);
    let policy = names(&[Kind::Policy]);
    assert_eq!(refusal(policy.reward_model(None)), ("model".into(), "no reward model is served".into()));
    let alone = ("model".into(), "mini has no reward head; no reward model is served".into());
    assert_eq!(refusal(policy.reward_model(Some("mini"))), alone);
    let reward = names(&[Kind::Reward]);
    assert_eq!(refusal(reward.policy(None)), ("model".into(), "no policy is served".into()));
}

#[test]
fn two_models_never_share_a_name() {
    let metrics = Arc::new(Metrics::new().unwrap());
    let setup = Setup::default();
    let models = vec![setup.model(Kind::Policy, &metrics), setup.model(Kind::Policy, &metrics)];
    let refused = refusal(Service::new(models, ServiceLimits::default(), Arc::clone(&metrics)));
    let message = "models: two of them are called mini; set model_name or reward_model_name";
    assert_eq!(refused, ("models".into(), message.into()));
    let mut alias = vec![setup.model(Kind::Policy, &metrics), setup.model(Kind::Reward, &metrics)];
    alias[1].aliases = vec!["mini".into()];
    let refused = refusal(Service::new(alias, ServiceLimits::default(), Arc::clone(&metrics)));
    assert_eq!(refused.1, message);
    assert_eq!(refusal(Service::new(Vec::new(), ServiceLimits::default(), metrics)).0, "models");
}

#[tokio::test]
async fn text_becomes_tokens_and_text_again() {
    let service = Setup { add_bos: Some(true), ..Setup::default() }.service();
    let text = Prompt::Text("3*8+5 é".into());
    let tokens = service.tokenize(None, text.clone(), tokens::SpecialTokens::Omit).await.unwrap();
    assert_eq!(tokens.ids, ids("3*8+5 é"));
    assert_eq!(tokens.texts[..3], ["3", "*", "8"]);
    assert_eq!(service.detokenize(None, &tokens.ids).unwrap(), "3*8+5 é");
    let with_bos = service.tokenize(Some("mini-rm"), text, tokens::SpecialTokens::Add).await.unwrap();
    assert_eq!(with_bos.ids, [vec![1], ids("3*8+5 é")].concat());
    let empty = service.tokenize(None, Prompt::Text(String::new()), tokens::SpecialTokens::Add).await.unwrap();
    assert_eq!(empty.ids, [1]);
    assert_eq!(refusal(service.detokenize(None, &[3, 9999])).0, "tokens");
    let info = service.tokenizer_info(None).unwrap();
    assert_eq!((info.bos_token.as_deref(), info.eos_token.as_deref()), (Some("<s>"), Some("</s>")));
    assert_eq!((info.adds_bos, info.vocab_size, info.len_max), (true, 320, 256));
}

#[tokio::test]
async fn a_panic_while_reading_a_request_fails_that_request_only() {
    let service = Setup::default().service();
    for _ in 0..2 * std::thread::available_parallelism().unwrap().get() {
        let result: Result<()> = service.off_thread(|| panic!("planted")).await;
        assert_eq!(result, Err(Error::internal("reading the request failed")));
    }
    assert_eq!(service.off_thread(|| Ok(7)).await, Ok(7));
}
