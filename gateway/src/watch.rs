//! Follows the control plane's changes, and keeps what is known in a file.

use std::path::PathBuf;
use std::time::Duration;

use tokio::time::Instant;
use warren_proto::endpoint::{Endpoint, connect};
use warren_proto::v1::WatchDataFlowRequest;
use warren_proto::v1::data_flow_service_client::DataFlowServiceClient;

use crate::metadata::{self, Effect, Metadata, Replica};

/// A lost control plane is looked for this often.
const AGAIN: Duration = Duration::from_secs(1);
/// Changes that come together are kept together.
const SAVE_AFTER: Duration = Duration::from_millis(100);
/// A gateway's copy may be large: 64 MiB for one message is more than any function has.
const MESSAGE_MAX: usize = 64 << 20;

/// Where to watch, and where to keep what is known.
#[derive(Clone, Debug)]
pub struct Watch {
    /// The control plane.
    pub control: Endpoint,
    /// The gateway's name, for logs.
    pub gateway: String,
    /// The file.
    pub file: PathBuf,
}

impl Watch {
    /// Watches for ever; `changed` is told what each change was about.
    pub async fn run(self, known: Metadata, changed: impl Fn(&Metadata, Effect)) {
        let mut replica = Replica::new(known);
        let mut reachable = true;
        loop {
            let ended = self.stream(&mut replica, &changed).await;
            if std::mem::replace(&mut reachable, ended.is_ok()) {
                let reason = ended.err().unwrap_or_else(|| "the stream ended".to_owned());
                tracing::warn!("lost the control plane, calls go on: {reason}");
            }
            tokio::time::sleep(AGAIN).await;
        }
    }

    /// One stream, until it ends.
    async fn stream(
        &self,
        replica: &mut Replica,
        changed: &impl Fn(&Metadata, Effect),
    ) -> Result<(), String> {
        let channel = connect(&self.control).await.map_err(|error| error.to_string())?;
        let mut client = DataFlowServiceClient::new(channel).max_decoding_message_size(MESSAGE_MAX);
        let request = WatchDataFlowRequest { gateway: self.gateway.clone() };
        let answer = client.watch_data_flow(request).await;
        let mut messages = answer.map_err(|status| status.message().to_owned())?.into_inner();
        tracing::info!("watching the control plane at {}", self.control);
        replica.begin();
        let mut save_at = None;
        loop {
            let message = tokio::select! {
                () = tokio::time::sleep_until(save_at.unwrap_or_else(Instant::now)),
                    if save_at.is_some() =>
                {
                    save_at = None;
                    self.save(replica.current().clone()).await;
                    continue;
                }
                message = messages.message() => message,
            };
            let ended = match message {
                Ok(Some(message)) => {
                    // A kind of change that this version does not know.
                    let Some(change) = message.change else { continue };
                    let effect = replica.apply(change);
                    // How full hosts are is not worth a write each second.
                    if !matches!(effect, Effect::None | Effect::Host(_)) {
                        save_at = save_at.or(Some(Instant::now() + SAVE_AFTER));
                    }
                    if effect != Effect::None {
                        changed(replica.current(), effect);
                    }
                    continue;
                }
                Ok(None) => Ok(()),
                Err(status) => Err(status.message().to_owned()),
            };
            if save_at.is_some() {
                self.save(replica.current().clone()).await;
            }
            return ended;
        }
    }

    async fn save(&self, metadata: Metadata) {
        let file = self.file.clone();
        let saved = tokio::task::spawn_blocking(move || metadata::save(&file, &metadata)).await;
        match saved {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::error!("{error}; it goes on with what is in memory"),
            Err(error) => tracing::error!("cannot keep the copy of metadata: {error}"),
        }
    }
}
