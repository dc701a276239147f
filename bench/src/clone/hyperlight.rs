//! Hyperlight's microVMs, in a program of their own (`bench/hyperlight`) that starts one of each kind
//! when it is asked to.

use std::collections::BTreeMap;
use std::process::Stdio;

use anyhow::{Context, Result, anyhow};
use serde::Deserialize;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::time::timeout;
use warren_bench::figures::Figures;
use warren_netns::fleet::built;

use super::nursery::CALL_LIMIT;

/// The program, and what it has measured.
pub struct Hyperlight {
    requests: ChildStdin,
    replies: Lines<BufReader<ChildStdout>>,
    samples: BTreeMap<String, Vec<f64>>,
    /// Ends with this.
    _program: Child,
}

/// Microseconds of a start, as the program tells them.
#[derive(Deserialize)]
struct Start {
    us: f64,
    host_us: f64,
}

impl Hyperlight {
    /// Starts the program.
    pub fn new() -> Result<Self> {
        let built = |name| {
            built(name).ok().with_context(|| format!("`cargo xtask bench clone` built no {name}"))
        };
        let mut command = Command::new(built("hyperlight-peer")?);
        command.arg(built("hyperlight-peer-guest.elf")?);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true);
        let mut program = command.spawn().with_context(|| format!("cannot run {command:?}"))?;
        let requests = program.stdin.take().context("no standard input")?;
        let replies = BufReader::new(program.stdout.take().context("no standard output")?).lines();
        Ok(Self { requests, replies, samples: BTreeMap::new(), _program: program })
    }

    /// Has it start a microVM of each kind.
    pub async fn round(&mut self) -> Result<()> {
        self.requests.write_all(b"\n").await.context("hyperlight-peer has ended")?;
        let reply = timeout(CALL_LIMIT, self.replies.next_line()).await;
        let reply = reply.context("hyperlight-peer does not reply")??;
        let reply = reply.context("hyperlight-peer has ended")?;
        let round: Result<BTreeMap<String, Start>, String> = serde_json::from_str(&reply)?;
        for (kind, Start { us, host_us }) in round.map_err(|error| anyhow!(error))? {
            self.samples.entry(format!("hyperlight_{kind}_us")).or_default().push(us);
            self.samples.entry(format!("hyperlight_{kind}_host_us")).or_default().push(host_us);
        }
        Ok(())
    }

    /// Adds `hyperlight_cold_us`, `hyperlight_clone_us` and `hyperlight_restore_us`, and the same with
    /// `_host_us`: without the time that the guest ran.
    pub fn report(self, figures: &mut Figures) {
        for (key, samples) in self.samples {
            figures.distribution(&key, samples);
        }
        if !warren_vmm::can_run_linux() {
            figures.note(
                "KVM emulates kernel-mode code on this machine, and Hyperlight's guests are nothing \
                 else: hyperlight_*_us do not hold elsewhere. hyperlight_*_host_us, without the time \
                 that the guest ran, are the least that it can take.",
            );
        }
    }
}
