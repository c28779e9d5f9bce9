//! The server's parts around a device: settings, memory plan, both engines on one device, best of n.

use eurus::bench::kernels;
use eurus::config::{Config, Overrides};
use eurus::device::Choice;
use eurus::service::best_of_n::{BestOfN, BestOfRequest};
use eurus::service::generate::GenerateRequest;
use eurus::service::{Conversation, Message, Prompt};

use crate::{choice, device};

fn config(device: Choice) -> Config {
    let mut overrides = Overrides::default();
    overrides.set("device", Some(device));
    overrides.set("engine.kv_cache_gib", Some(0.05));
    Config::from_sources(None, [], &overrides).unwrap()
}

async fn best_of_three(device: Choice) -> BestOfN {
    let service = eurus::serve::service(&config(device)).unwrap();
    let message = Message::new("user", "Use the numbers 3, 5, 7 to make 22.");
    let generate = GenerateRequest {
        max_tokens: Some(10),
        seed: Some(5),
        ..GenerateRequest::new(Prompt::Messages(Conversation::new(vec![message])))
    };
    service.best_of_n(BestOfRequest::new(generate, 3)).await.unwrap()
}

/// Two engines with a thread each share the device.
#[tokio::test]
async fn best_of_n_chooses_as_on_the_cpu() {
    if device().is_none() {
        return;
    }
    let [on, off] = [best_of_three(choice()).await, best_of_three(Choice::Cpu).await];
    assert_eq!(on.chosen, off.chosen);
    for (on, off) in on.candidates.iter().zip(&off.candidates) {
        assert_eq!(on.candidate.text, off.candidate.text);
        let (on, off) = (on.reward.unwrap(), off.reward.unwrap());
        assert!((on - off).abs() < 1e-3, "reward {on} instead of {off}");
    }
}

#[test]
fn every_timed_operation_runs() {
    if device().is_none() {
        return;
    }
    let report = kernels::run(&kernels::Options { device: choice(), tiny: true, json: false }).unwrap();
    println!("{report}");
    assert!(report.rows.len() > 10, "{report}");
}

#[test]
fn the_plan_counts_the_memory_of_the_device() {
    if device().is_none() {
        return;
    }
    let (report, outcome) = eurus::serve::check(&config(choice()));
    outcome.unwrap();
    println!("{report}");
    assert!(report.starts_with("device "), "{report}");
    assert!(report.contains("work "), "{report}");
}
