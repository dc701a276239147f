//! Registers with the control plane and stays registered.

use std::time::Duration;

use tokio_stream::StreamExt;
use tokio_stream::wrappers::IntervalStream;
use warren_proto::endpoint::{Endpoint, connect};
use warren_proto::v1::fleet_service_client::FleetServiceClient;
use warren_proto::v1::{HeartbeatRequest, HeartbeatResponse};

/// Time from one heartbeat to the next.
const INTERVAL: Duration = Duration::from_secs(1);

/// Sends heartbeats for ever: `report` makes each, and `heard` gets the answers. A lost control plane
/// is looked for once a second.
pub async fn run(
    control: Endpoint,
    report: impl Fn() -> HeartbeatRequest + Clone + Send + 'static,
    heard: impl Fn(HeartbeatResponse),
) {
    let mut reachable = true;
    loop {
        let ended = stream(&control, report.clone(), &heard).await;
        if std::mem::replace(&mut reachable, ended.is_ok()) {
            let reason = ended.err().unwrap_or_else(|| "the stream ended".to_owned());
            tracing::warn!("lost the control plane, instances go on: {reason}");
        }
        tokio::time::sleep(INTERVAL).await;
    }
}

/// One stream, until it ends.
async fn stream(
    control: &Endpoint,
    report: impl Fn() -> HeartbeatRequest + Send + 'static,
    heard: impl Fn(HeartbeatResponse),
) -> Result<(), String> {
    let channel = connect(control).await.map_err(|error| error.to_string())?;
    let beats = IntervalStream::new(tokio::time::interval(INTERVAL)).map(move |_| report());
    let answer = FleetServiceClient::new(channel).heartbeat(beats).await;
    let mut answers = answer.map_err(|status| status.message().to_owned())?.into_inner();
    tracing::info!("registered with the control plane at {control}");
    while let Some(answer) = answers.next().await {
        heard(answer.map_err(|status| status.message().to_owned())?);
    }
    Ok(())
}
