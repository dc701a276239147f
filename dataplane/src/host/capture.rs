//! Captures of a host's instances.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;
use warren_proto::v1;

use super::{Host, HostError, Instance};
use crate::capture::{Capture, CaptureError, Filter, Subject};
use crate::datapath;

/// Captures at a time: each holds up to 10 MB of the kernel's memory, and 2 MB of the daemon's.
pub(super) const CAPTURES: usize = 8;
/// Messages that wait for a slow receiver; then packets wait in the kernel, and are lost at last.
const MESSAGES: usize = 4;

/// The packets of a capture.
pub type Captured = ReceiverStream<Result<v1::CapturePacketsResponse, Status>>;

impl Host {
    /// Begins a capture, which goes on until it has ended or its packets are dropped.
    pub async fn capture(
        self: &Arc<Self>,
        request: v1::CapturePacketsRequest,
    ) -> Result<Captured, HostError> {
        let v1::CapturePacketsRequest { instance, filter, count, seconds } = request;
        let permit = self.captures.clone().try_acquire_owned();
        let permit = permit.map_err(|_| HostError::Captures(CAPTURES))?;
        // Names of hosts in a filter are looked up.
        let filter = tokio::task::spawn_blocking(move || Filter::compile(&filter));
        let filter = filter.await.unwrap_or_else(|e| std::panic::resume_unwind(e.into_panic()));
        let filter = filter.map_err(CaptureError::from)?;
        let (slot, attachment) = self.attached(&instance)?;
        let time = u64::from(seconds);
        let subject = Subject {
            slot,
            attachment,
            filter,
            count: (count > 0).then_some(count),
            time: (time > 0).then_some(Duration::from_secs(time)),
        };
        let capture = Capture::open(self.datapath.clone(), subject, permit)?;
        tracing::info!(instance, slot, "capture begins");
        let (sender, messages) = mpsc::channel(MESSAGES);
        tokio::spawn(async move {
            capture.run(sender).await;
            tracing::info!(instance, slot, "capture ended");
        });
        Ok(ReceiverStream::new(messages))
    }

    /// The slot of an instance that runs, and its attachment.
    fn attached(&self, instance: &str) -> Result<(u32, datapath::Attachment), HostError> {
        let id = self.known(instance)?;
        let gone = || HostError::NoInstance(instance.to_owned());
        // The lock is held until the attachment is read: an instance that is listed may be about
        // to go, but its slot is no other's while it is listed.
        let state = self.state();
        let slot = match state.instances.get(&id).ok_or_else(gone)? {
            Instance { failed: Some(reason), .. } => {
                return Err(HostError::Ended { id, reason: reason.clone() });
            }
            Instance { slot, .. } => slot.number,
        };
        let attachment = self.datapath.attachment(slot)?.ok_or_else(gone)?;
        Ok((slot, attachment))
    }
}
