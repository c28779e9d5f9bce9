//! `eurus chat`: a conversation in the terminal, without a server. Ctrl-C stops an answer, Ctrl-D ends the conversation.

use std::io::{BufRead, IsTerminal, Write};

use clap::Args;

use super::settings::{Models, SamplingArgs, SettingArgs};
use crate::error::{Error, Result};
use crate::service::generate::GenerateRequest;
use crate::service::updates::Update;
use crate::service::{Conversation, Message, Prompt, Service};

/// Flags of `eurus chat`.
#[derive(Debug, Args)]
pub(super) struct ChatArgs {
    #[command(flatten)]
    settings: SettingArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
    /// Say this and end after the answer
    #[arg(value_name = "MESSAGE")]
    message: Option<String>,
}

/// Talks until the input ends.
///
/// # Errors
/// If the model cannot be started or an answer fails.
pub(super) fn run(args: &ChatArgs) -> Result<()> {
    super::runtime()?.block_on(async {
        let service = args.settings.start(Models::Policy)?;
        let mut messages = Vec::new();
        if let Some(message) = &args.message {
            messages.push(Message { role: "user".into(), content: message.clone() });
            return answer(&service, args, &messages).await.map(drop);
        }
        while let Some(content) = read_line()? {
            messages.push(Message { role: "user".into(), content });
            let content = answer(&service, args, &messages).await?;
            messages.push(Message { role: "assistant".into(), content });
        }
        Ok(())
    })
}

/// The next line that says something; `None` at the end of the input.
fn read_line() -> Result<Option<String>> {
    let stdin = std::io::stdin();
    loop {
        if stdin.is_terminal() {
            eprint!("> ");
        }
        let mut line = String::new();
        if stdin.lock().read_line(&mut line).map_err(Error::internal)? == 0 {
            return Ok(None);
        }
        if !line.trim().is_empty() {
            return Ok(Some(line.trim().to_string()));
        }
    }
}

/// Streams the answer to standard output and returns it whole.
async fn answer(service: &Service, args: &ChatArgs, messages: &[Message]) -> Result<String> {
    let mut request = GenerateRequest::new(Prompt::Messages(Conversation::new(messages.to_vec())));
    args.sampling.apply(&mut request);
    let mut generation = service.generate(request).await?;
    let mut text = String::new();
    loop {
        let update = tokio::select! {
            update = generation.next() => update,
            _ = tokio::signal::ctrl_c() => None,
        };
        match update {
            Some(Ok(Update::Delta(delta))) => {
                write_out(&delta.text)?;
                text.push_str(&delta.text);
            }
            Some(Ok(_)) => {}
            Some(Err(error)) => return Err(error),
            None => break,
        }
    }
    write_out("\n")?;
    Ok(text)
}

fn write_out(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(Error::internal)
}
