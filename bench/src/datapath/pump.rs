//! What a VMM's network device does, and no more: moves frames with their virtio-net headers
//! between a guest's TAP and the host's.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use anyhow::Result;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::tap::{VNET_HEADER, offload};

/// A header and the largest frame.
const BUFFER: usize = VNET_HEADER + 14 + 65_535;
/// How long a pump waits before it looks whether it is to end, in milliseconds.
const TICK_MS: u16 = 50;

/// Two threads, one each way, until this value is dropped; both TAPs are closed then.
pub struct Pump {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Pump {
    /// Connects two TAPs, both with offloads.
    pub fn start(guest: &File, host: &File) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let mut threads = Vec::new();
        for (from, to) in [(guest, host), (host, guest)] {
            offload(from)?;
            let (from, to, stop) = (from.try_clone()?, to.try_clone()?, stop.clone());
            threads.push(std::thread::spawn(move || pump(&from, &to, &stop)));
        }
        Ok(Self { stop, threads })
    }
}

impl Drop for Pump {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        for thread in self.threads.drain(..) {
            thread.join().ok();
        }
    }
}

fn pump(mut from: &File, mut to: &File, stop: &AtomicBool) {
    let mut buffer = vec![0; BUFFER];
    while !stop.load(Ordering::Relaxed) {
        match from.read(&mut buffer) {
            Ok(length) => {
                // What the other side refuses (its queue is full, it is down) is lost, as on a
                // wire.
                let _ = to.write(&buffer[..length]);
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                let mut fds = [PollFd::new(from.as_fd(), PollFlags::POLLIN)];
                let _ = poll(&mut fds, PollTimeout::from(TICK_MS));
            }
            Err(error) => {
                tracing::error!("a pump ended: {error}");
                return;
            }
        }
    }
}
