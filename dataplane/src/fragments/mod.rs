//! What the programs leave to the daemon of fragments: those that come before their datagram's
//! first one wait here, and what does not fit the tunnel, but may be divided, is.
//!
//! Frames come and go by a TAP of their own, tagged by where they came from
//! ([`Tag`](warren_abi::fragment::Tag)); the program at its ingress takes them as if they had just
//! come from there. Nothing is dropped here but what is no fragment: one that waited in vain is
//! written back, and the program counts it.

mod divide;
mod waiting;

use std::io;
use std::time::Instant;

use tokio_tun::Tun;
use warren_abi::fragment::Tag;

use self::divide::divide;
use self::waiting::Waiting;

/// Why fragments cannot be dealt with.
#[derive(Debug, thiserror::Error)]
#[error("cannot open the device for fragments {device}: {source}")]
pub struct FragmentsError {
    device: String,
    source: tokio_tun::Error,
}

/// The fragments of a host or a proxy. They are dealt with while [`Fragments::run`] does.
pub struct Fragments {
    tap: Tun,
    mtu: u16,
    waiting: Waiting,
}

impl Fragments {
    /// Opens the device, in the network namespace of the calling thread. Needs a runtime. `mtu` is
    /// that of the tunnel, in bytes.
    pub fn open(device: &str, mtu: u16) -> Result<Self, FragmentsError> {
        let error = |source| FragmentsError { device: device.to_owned(), source };
        let taps = Tun::builder().name(device).tap().build().map_err(error)?;
        let tap =
            taps.into_iter().next().ok_or_else(|| error(io::Error::other("no queue").into()))?;
        Ok(Self { tap, mtu, waiting: Waiting::default() })
    }

    /// Deals with them, for ever.
    pub async fn run(mut self) {
        let mut frame = vec![0; usize::from(u16::MAX)];
        loop {
            let received = match self.waiting.next() {
                Some(due) => {
                    let received = self.tap.recv(&mut frame);
                    tokio::time::timeout_at(due.into(), received).await.ok()
                }
                None => Some(self.tap.recv(&mut frame).await),
            };
            match received {
                Some(Ok(length)) => self.take(&frame[..length]),
                Some(Err(error)) => {
                    tracing::error!("cannot read the device for fragments: {error}");
                    tokio::time::sleep(std::time::Duration::from_secs(1)).await;
                }
                None => {}
            }
            let now = Instant::now();
            while let Some(frame) = self.waiting.due(now) {
                self.put(&frame);
            }
        }
    }

    fn take(&mut self, frame: &[u8]) {
        let Some(tag) = Tag::of_frame(frame) else { return };
        if frame.len() > 14 + usize::from(self.mtu) {
            for part in divide(frame, self.mtu).unwrap_or_default() {
                self.put(&part);
            }
        } else if let Some(frame) = self.waiting.push(Instant::now(), tag, frame.to_vec()) {
            self.put(&frame);
        }
    }

    /// What the device does not take is lost, as on any wire.
    fn put(&self, frame: &[u8]) {
        let _ = self.tap.try_send(frame);
    }
}
