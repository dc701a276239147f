//! `warren function logs`.

use std::io::Write;

use clap::Args;
use jiff::Timestamp;
use serde_json::json;
use warren_proto::v1::{LogLine, TailLogsRequest};

use crate::args::Output;
use crate::client::Client;
use crate::commands::unless_closed;
use crate::error::Error;

#[derive(Debug, Args)]
pub struct Logs {
    /// Function.
    pub name: String,
    /// Go on with lines that come.
    #[arg(short, long)]
    pub follow: bool,
    /// How many lines that are there already, of each host.
    #[arg(short = 'n', long, value_name = "NUMBER", default_value_t = 100)]
    pub lines: u32,
}

/// Prints what the instances of a function wrote: one line each, or one object of JSON on each line.
pub async fn run(mut client: Client, output: Output, logs: Logs) -> Result<(), Error> {
    let Logs { name: function, follow, lines } = logs;
    let mut tail = client.tail_logs(TailLogsRequest { function, lines, follow }).await?;
    while let Some(message) = tail.message().await.map_err(|status| client.refused(status))? {
        for line in message.lines {
            let text = match output {
                Output::Table => text(&line),
                Output::Json => json(&line),
            };
            let mut stdout = std::io::stdout().lock();
            let written = writeln!(stdout, "{text}").and_then(|()| stdout.flush());
            if written.as_ref().is_err_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe) {
                return Ok(());
            }
            unless_closed(written)?;
        }
    }
    Ok(())
}

fn time(line: &LogLine) -> Option<Timestamp> {
    let known = i128::from(line.unix_ns) > 0;
    Timestamp::from_nanosecond(line.unix_ns.into()).ok().filter(|_| known)
}

fn text(line: &LogLine) -> String {
    let time = time(line).map_or("-".to_owned(), |time| format!("{time:.6}"));
    let instance = line.instance.get(..8).unwrap_or("-");
    format!("{time} {instance} v{} {}: {}", line.version, line.stream, line.text)
}

fn json(line: &LogLine) -> String {
    let time = time(line).map(|time| time.to_string());
    let LogLine { instance, version, stream, text, .. } = line;
    json!({
        "time": time, "instance": instance, "version": version, "stream": stream, "text": text,
    })
    .to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_has_its_time_and_its_origin() {
        let line = LogLine {
            unix_ns: 1_764_352_800_000_001_000,
            instance: "0123456789".to_owned(),
            version: 3,
            stream: "stderr".to_owned(),
            text: "a \"b\"".to_owned(),
        };
        assert_eq!(text(&line), "2025-11-28T18:00:00.000001Z 01234567 v3 stderr: a \"b\"");
        assert!(json(&line).contains(r#""text":"a \"b\"""#), "{}", json(&line));
        let of_control = LogLine { stream: "runtime".to_owned(), ..LogLine::default() };
        assert_eq!(text(&of_control), "- - v0 runtime: ");
    }
}
