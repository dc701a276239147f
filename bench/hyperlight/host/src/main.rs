//! `hyperlight-peer GUEST`: for each line on standard input, one start of each kind, and a line of
//! JSON with what they took, or with the error that ended it.

mod guest_time;

use std::borrow::BorrowMut;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use hyperlight_host::sandbox::snapshot::Snapshot;
use hyperlight_host::{Sandbox, SandboxBuilder};
use serde::Serialize;

/// Microseconds of a start, until the guest's function has replied.
#[derive(Serialize)]
struct Start {
    us: f64,
    /// Without the time that the guest ran.
    host_us: f64,
}

/// One start of each kind.
#[derive(Serialize)]
struct Round {
    /// A microVM is made from the guest's file and initialised.
    cold: Start,
    /// Another microVM is made from a snapshot in memory.
    clone: Start,
    /// A microVM is reset to its snapshot.
    restore: Start,
}

fn main() -> Result<()> {
    let guest = std::env::args_os().nth(1).context("usage: hyperlight-peer GUEST")?;
    let mut peer = Peer::new(guest.as_ref());
    for (number, line) in (0..).zip(std::io::stdin().lines()) {
        line?;
        let round = match &mut peer {
            Ok(peer) => peer.round(guest.as_ref(), number).map_err(|error| sentence(&error)),
            Err(error) => Err(sentence(error)),
        };
        println!("{}", serde_json::to_string(&round)?);
        std::io::stdout().flush()?;
    }
    Ok(())
}

/// What was tried, and Hyperlight's error, which itself repeats its causes.
fn sentence(error: &anyhow::Error) -> String {
    error.chain().take(2).map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

/// A microVM that lives on, and its snapshot from after one call.
struct Peer {
    sandbox: Sandbox,
    snapshot: Arc<Snapshot>,
}

impl Peer {
    fn new(guest: &Path) -> Result<Self> {
        let mut sandbox = SandboxBuilder::from_file(guest).build().context("the first start")?;
        call(&mut sandbox, 0, 0).context("the first call")?;
        let snapshot = sandbox.snapshot().context("the snapshot")?;
        // So that there is something to reset.
        call(&mut sandbox, 0, 1).context("the second call")?;
        Ok(Self { sandbox, snapshot })
    }

    fn round(&mut self, guest: &Path, number: i32) -> Result<Round> {
        let Self { sandbox, snapshot } = self;
        let cold = start(number, 0, || Ok(SandboxBuilder::from_file(guest).build()?));
        let clone =
            start(number, 1, || Ok(SandboxBuilder::from_snapshot(snapshot.clone()).build()?));
        let restore = start(number, 1, || {
            sandbox.restore(snapshot.clone())?;
            Ok(sandbox)
        });
        Ok(Round {
            cold: cold.context("a cold start")?,
            clone: clone.context("a clone")?,
            restore: restore.context("a restore")?,
        })
    }
}

/// Times what makes a microVM ready, and a call to it.
fn start<S: BorrowMut<Sandbox>>(
    number: i32,
    calls_before: i32,
    ready: impl FnOnce() -> Result<S>,
) -> Result<Start> {
    let guest_before = guest_time::total_us();
    let began = Instant::now();
    let mut sandbox = ready()?;
    call(sandbox.borrow_mut(), number, calls_before)?;
    let us = began.elapsed().as_secs_f64() * 1e6;
    let guest_us = guest_time::total_us() - guest_before;
    ensure!(guest_us > 0.0, "the time that the guest ran was not counted");
    Ok(Start { us, host_us: us - guest_us })
}

/// Calls the guest's function, whose reply tells how often the microVM was called before.
fn call(sandbox: &mut Sandbox, number: i32, calls_before: i32) -> Result<()> {
    let (reply, expected) = (sandbox.call::<i32>("Call", number)?, number + calls_before);
    ensure!(reply == expected, "the guest replied {reply} instead of {expected}");
    Ok(())
}
