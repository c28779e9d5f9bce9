//! The accept loop on a loopback socket: slow clients, clients that leave, and the way down.

use std::{net::SocketAddr, time::Duration};

use axum::http::StatusCode;
use eurus::http::listen::{Drained, ListenOptions, bind, serve};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::oneshot,
    task::JoinHandle,
};

use super::{
    Server,
    fake::{Gate, Setup},
};

const SOON: Duration = Duration::from_millis(50);

struct Listening {
    address: SocketAddr,
    shutdown: oneshot::Sender<()>,
    served: JoinHandle<Drained>,
    server: Server,
}

impl Listening {
    fn start(setup: &Setup, options: ListenOptions) -> Self {
        let server = Server::new(setup);
        let listener = bind("127.0.0.1:0".parse().unwrap(), &options).unwrap();
        let address = listener.local_addr().unwrap();
        let (shutdown, signal) = oneshot::channel::<()>();
        let (router, lifecycle) = (server.router.clone(), server.state.lifecycle().clone());
        let served = tokio::spawn(async move {
            let signal = async move { drop(signal.await) };
            serve(listener, router, lifecycle, signal, &options).await
        });
        Self { address, shutdown, served, server }
    }

    async fn connect(&self, text: &str) -> TcpStream {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        stream.write_all(text.as_bytes()).await.unwrap();
        stream
    }

    /// Asks for a completion with these fields, on a connection that is closed afterwards.
    async fn complete(&self, fields: &str) -> TcpStream {
        let body = format!(r#"{{"prompt":"a",{fields}}}"#);
        let head = "POST /v1/completions HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-type: application/json";
        self.connect(&format!("{head}\r\ncontent-length: {}\r\n\r\n{body}", body.len())).await
    }

    /// Waits until no engine holds anything.
    async fn freed(&self) {
        for model in self.server.state.service().models() {
            let status = model.engine.status();
            while status.running() + status.queued() + status.blocks_used() > 0 {
                tokio::task::yield_now().await;
            }
        }
    }

    /// Waits until the policy runs something.
    async fn busy(&self) {
        while self.server.state.service().models()[0].engine.status().running() == 0 {
            tokio::task::yield_now().await;
        }
    }
}

async fn rest(stream: &mut TcpStream) -> String {
    let mut bytes = Vec::new();
    // A reset after the answer is as good as a close.
    let _ = stream.read_to_end(&mut bytes).await;
    String::from_utf8_lossy(&bytes).into_owned()
}

#[tokio::test]
async fn connections_are_kept_and_slow_heads_are_not() {
    let options = ListenOptions { head_timeout: SOON, ..ListenOptions::default() };
    let listening = Listening::start(&Setup::default(), options);
    let mut slow = listening.connect("GET /health HTTP/1.1\r\nhost").await;
    let mut silent = listening.connect("").await;
    let mut kept = listening.connect("GET /version HTTP/1.1\r\nhost: a\r\n\r\n").await;
    assert!(!rest(&mut slow).await.contains("200 OK"));
    assert_eq!(rest(&mut silent).await, "");
    // The same connection has been idle for longer than a head may take.
    kept.write_all(b"GET /health HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").await.unwrap();
    assert_eq!(rest(&mut kept).await.matches("200 OK").count(), 2);
}

#[tokio::test]
async fn heads_have_bounds() {
    let listening = Listening::start(&Setup::default(), ListenOptions::default());
    for lines in ["x: y\r\n".repeat(65), format!("x: {}\r\n", "y".repeat(40_000))] {
        let mut stream = listening.connect(&format!("GET /health HTTP/1.1\r\nconnection: close\r\n{lines}\r\n")).await;
        let answer = rest(&mut stream).await;
        assert!(answer.starts_with("HTTP/1.1 431"), "{} bytes: {answer}", lines.len());
    }
}

#[tokio::test]
async fn surplus_connections_wait_their_turn() {
    let options = ListenOptions { connections_max: 1, ..ListenOptions::default() };
    let listening = Listening::start(&Setup::default(), options);
    let first = listening.connect("").await;
    let mut second = listening.connect("GET /health HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").await;
    let mut byte = [0];
    assert!(tokio::time::timeout(SOON, second.peek(&mut byte)).await.is_err(), "served beyond the cap");
    drop(first);
    assert!(rest(&mut second).await.starts_with("HTTP/1.1 200"));
}

#[tokio::test]
async fn a_client_that_leaves_frees_its_blocks() {
    let gate = Gate::after(3);
    let setup = Setup { gate: gate.clone(), ..Setup::default() };
    let listening = Listening::start(&setup, ListenOptions::default());
    for fields in [r#""stream":true,"max_tokens":200"#, r#""n":8,"max_tokens":200"#, r#""best_of":4,"max_tokens":200"#]
    {
        let stream = listening.complete(fields).await;
        listening.busy().await;
        drop(stream);
        gate.release();
        listening.freed().await;
    }
}

#[tokio::test]
async fn a_client_that_stops_reading_is_dropped() {
    let options = ListenOptions { write_stall_timeout: SOON, send_buffer_bytes: 4096, ..ListenOptions::default() };
    let listening = Listening::start(&Setup::default(), options);
    // The answers do not fit into the socket buffers of both ends.
    let fields = r#""stream":true,"max_tokens":250,"n":64,"logprobs":20"#;
    let stream = listening.complete(fields).await;
    listening.busy().await;
    listening.freed().await;
    drop(stream);
}

#[tokio::test]
async fn draining_finishes_what_runs_and_takes_nothing_new() {
    let gate = Gate::after(2);
    let setup = Setup { gate: gate.clone(), ..Setup::default() };
    let listening = Listening::start(&setup, ListenOptions::default());
    let mut stream = listening.complete(r#""stream":true,"max_tokens":20"#).await;
    listening.busy().await;
    let _ = listening.shutdown.send(());
    listening.server.state.lifecycle().reached(eurus::http::listen::Stage::Draining).await;
    assert!(TcpStream::connect(listening.address).await.is_err(), "the listener is closed");
    assert_eq!(listening.server.get("/ready").await.status, StatusCode::SERVICE_UNAVAILABLE);
    gate.release();
    let answer = rest(&mut stream).await;
    assert!(answer.contains(r#""finish_reason":"length""#) && answer.contains("data: [DONE]"), "{answer}");
    assert_eq!(listening.served.await.unwrap(), Drained::Clean);
}

#[tokio::test]
async fn what_does_not_finish_in_time_is_told_so() {
    let gate = Gate::after(2);
    let setup = Setup { gate: gate.clone(), ..Setup::default() };
    let options = ListenOptions { drain_timeout: SOON, ..ListenOptions::default() };
    let listening = Listening::start(&setup, options);
    let mut stream = listening.complete(r#""stream":true,"max_tokens":20"#).await;
    listening.busy().await;
    let _ = listening.shutdown.send(());
    let answer = rest(&mut stream).await;
    assert!(answer.contains("service_unavailable_error") && answer.contains("data: [DONE]"), "{answer}");
    assert_eq!(listening.served.await.unwrap(), Drained::Cut(0));
    gate.release();
}
