//! The composition root: builds models, engines, service and HTTP server, and runs them until told to stop.
//! Owns the order of start and stop; decides nothing about requests.

mod check;
mod load;
mod memory;
mod progress;
pub(crate) mod signals;

use std::{net::SocketAddr, sync::Arc, thread::JoinHandle, time::Duration};

use tokio::sync::mpsc;

use crate::{
    config::{Config, NONE},
    device,
    error::{Error, Result},
    http::{
        self, AppState, HttpOptions,
        auth::{ApiKeys, MetricsAccess},
        listen::{self, Drained, Lifecycle, ListenOptions},
    },
    metrics::Metrics,
    ops::{memory::give_back, parallel},
    service::{Kind, ServedModel, Service, ServiceLimits},
};

use memory::{Memory, Needs};

pub use check::check;
pub use load::model;
pub(crate) use load::open_source;
pub(crate) use memory::host_cache_dtype;
pub use progress::ProgressLine;

/// What loading gives: the served models, and the threads of their engines by model name.
struct Loaded {
    models: Vec<ServedModel>,
    engines: Vec<(String, JoinHandle<()>)>,
}

/// Serves until SIGTERM or SIGINT, or until an engine dies.
///
/// # Errors
/// Whatever keeps the server from starting, and [`Error::Internal`] after the death of an engine.
pub async fn run(config: Config) -> Result<()> {
    let config = Arc::new(config);
    let mut signals = signals::Signals::listen()?;
    let keys = ApiKeys::new(config.api_keys()?.reveal());
    let listening = listen_options(&config);
    let address = address(&config).await?;
    // Fails before the models are loaded, which can take minutes, where the address is taken.
    drop(bind(address, &listening)?);
    warn_if_open(&address, &keys);

    let metrics = Arc::new(Metrics::new()?);
    let (config_, metrics_) = (Arc::clone(&config), Arc::clone(&metrics));
    let loading = tokio::task::spawn_blocking(move || load_all(&config_, &metrics_));
    let loaded = tokio::select! {
        loaded = loading => loaded.map_err(Error::internal)??,
        signal = signals.next() => signal.leave(),
    };

    let service = Arc::new(Service::new(loaded.models, service_limits(&config), metrics)?);
    let lifecycle = Lifecycle::default();
    let state = AppState::new(service, http_options(&config, keys), lifecycle.clone());
    let listener = bind(address, &listening)?;
    let bound = listener.local_addr().map_err(Error::internal)?;
    tracing::info!("listening on http://{bound}");

    let mut deaths = watch(loaded.engines);
    let stop = async {
        tokio::select! {
            signal = signals.next() => {
                tracing::info!("{signal}: no new requests; a second signal ends without waiting");
                tokio::spawn(async move { signals.next().await.leave() });
                None
            }
            death = deaths.recv() => death,
        }
    };
    let (sender, receiver) = tokio::sync::oneshot::channel();
    let shutdown = async move {
        // The receiver lives as long as this function.
        let _ = sender.send(stop.await);
    };
    let drained = listen::serve(listener, http::router(state), lifecycle, shutdown, &listening).await;
    match drained {
        Drained::Clean => tracing::info!("all requests answered"),
        Drained::Cut(count) => tracing::warn!(connections = count, "cut off after the drain deadline"),
    }
    match receiver.await {
        Ok(Some(name)) => Err(Error::Internal(format!("the engine of {name} died"))),
        _ => Ok(()),
    }
}

/// The models of `config`, running in this process without a server.
///
/// # Errors
/// A checkpoint that cannot be had, is damaged, of the wrong kind, or does not fit into memory.
pub fn service(config: &Config) -> Result<Arc<Service>> {
    let metrics = Arc::new(Metrics::new()?);
    let loaded = load_all(config, &metrics)?;
    Ok(Arc::new(Service::new(loaded.models, service_limits(config), metrics)?))
}

/// What `work` does with the models of `config`, which are gone from memory afterwards.
///
/// # Errors
/// As [`service`], and those of `work`.
pub(crate) fn with_service<T>(config: &Config, work: impl FnOnce(Arc<Service>) -> Result<T>) -> Result<T> {
    let metrics = Arc::new(Metrics::new()?);
    let loaded = load_all(config, &metrics)?;
    let outcome = work(Arc::new(Service::new(loaded.models, service_limits(config), metrics)?));
    // An engine ends when nobody can send to it any more.
    for (_, engine) in loaded.engines {
        let _ = engine.join();
    }
    outcome
}

/// Loads the policy, then the reward model.
fn load_all(config: &Config, metrics: &Metrics) -> Result<Loaded> {
    if let Some(count) = config.engine.threads {
        parallel::set_threads(count);
    }
    if config.engine.pin_threads {
        parallel::pin_workers();
    }
    let first = device::open(config.device)?;
    let on = device::describe(&first);
    tracing::info!(threads = parallel::threads(), device = on, "eurus {}", env!("CARGO_PKG_VERSION"));
    let wanted = [(Kind::Policy, &config.model), (Kind::Reward, &config.reward_model)];
    let wanted = wanted.into_iter().filter(|(_, source)| *source != NONE);
    let opened = wanted.map(|(kind, _)| load::opened(kind, config, metrics)).collect::<Result<Vec<_>>>()?;
    let needs = opened.iter().map(|opened| Needs::new(&opened.checkpoint, opened.numbers, &first, &config.engine));
    let mut memory = Memory::new(&first, needs.collect::<Result<Vec<_>>>()?);
    let mut loaded = Loaded { models: Vec::new(), engines: Vec::new() };
    for opened in opened {
        let plan = memory.plan(&opened.checkpoint.config, &config.engine)?;
        let device = if loaded.models.is_empty() { first.clone() } else { device::another(&first)? };
        let (model, engine) = load::load(opened, &plan, &device, config, metrics)?;
        loaded.engines.push((model.name.clone(), engine));
        loaded.models.push(model);
    }
    give_back();
    Ok(loaded)
}

/// Reports the name of an engine whose thread has ended, which none does while its model is served.
fn watch(engines: Vec<(String, JoinHandle<()>)>) -> mpsc::UnboundedReceiver<String> {
    let (sender, receiver) = mpsc::unbounded_channel();
    for (name, engine) in engines {
        let sender = sender.clone();
        std::thread::spawn(move || {
            let _ = engine.join();
            // Nobody listens once the server has stopped for another reason.
            let _ = sender.send(name);
        });
    }
    receiver
}

async fn address(config: &Config) -> Result<SocketAddr> {
    let (host, port) = (config.server.host.as_str(), config.server.port);
    let wrong = |error: &dyn std::fmt::Display| Error::invalid("server.host", format!("server.host {host}: {error}"));
    let mut found = tokio::net::lookup_host((host, port)).await.map_err(|error| wrong(&error))?;
    found.next().ok_or_else(|| wrong(&"no such address"))
}

fn bind(address: SocketAddr, options: &ListenOptions) -> Result<tokio::net::TcpListener> {
    listen::bind(address, options)
        .map_err(|error| Error::invalid("server.port", format!("cannot listen on {address}: {error}")))
}

fn warn_if_open(address: &SocketAddr, keys: &ApiKeys) {
    if keys.is_empty() && !address.ip().is_loopback() {
        tracing::warn!("no API keys: everyone who reaches {address} can use this server");
    }
}

fn listen_options(config: &Config) -> ListenOptions {
    let server = &config.server;
    ListenOptions {
        connections_max: server.connections_max,
        head_timeout: Duration::from_secs(server.header_seconds_max),
        keep_alive_timeout: Duration::from_secs(server.keep_alive_seconds_max),
        write_stall_timeout: Duration::from_secs(server.stall_seconds_max),
        drain_timeout: Duration::from_secs(server.drain_seconds_max),
        headers_max: server.headers_max,
        head_bytes_max: server.header_bytes_max as usize,
        ..ListenOptions::default()
    }
}

fn http_options(config: &Config, keys: ApiKeys) -> HttpOptions {
    let server = &config.server;
    HttpOptions {
        keys,
        metrics_access: if server.metrics_open { MetricsAccess::Open } else { MetricsAccess::Guarded },
        body_bytes_max: server.body_bytes_max as usize,
        body_timeout: Duration::from_secs(server.body_seconds_max),
        request_timeout: Duration::from_secs(server.request_seconds_max),
        stall_timeout: Duration::from_secs(config.engine.step_seconds_max),
        prompts_max: config.limits.prompts_max,
    }
}

fn service_limits(config: &Config) -> ServiceLimits {
    let limits = &config.limits;
    ServiceLimits {
        n_max: limits.n_max,
        best_of_max: limits.best_of_max,
        prompt_bytes_max: limits.prompt_bytes_max as usize,
        messages_max: limits.messages_max,
        stop_max: limits.stop_max,
        stop_bytes_max: limits.stop_bytes_max,
        logit_bias_max: limits.logit_bias_max,
        top_logprobs_max: limits.top_logprobs_max,
        score_batch_max: limits.score_batch_max,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_of_the_settings_are_the_defaults_of_the_parts() {
        let config = Config::default();
        assert_eq!(listen_options(&config), ListenOptions::default());
        assert_eq!(service_limits(&config), ServiceLimits::default());
        let options = http_options(&config, ApiKeys::default());
        let own = HttpOptions::default();
        assert_eq!((options.body_bytes_max, options.prompts_max), (own.body_bytes_max, own.prompts_max));
        assert_eq!((options.body_timeout, options.request_timeout), (own.body_timeout, own.request_timeout));
    }
}
