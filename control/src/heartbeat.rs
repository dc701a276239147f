//! `warren.v1.FleetService`: the streams that keep hosts and proxies alive.

use std::sync::Arc;

use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};
use warren_proto::v1::fleet_service_server::FleetService;
use warren_proto::v1::{HeartbeatRequest, HeartbeatResponse};

use crate::fleet::{Fleet, Registered};

/// The service.
pub struct Heartbeats {
    fleet: Arc<Fleet>,
}

impl Heartbeats {
    /// Heartbeats of this fleet.
    pub fn new(fleet: Arc<Fleet>) -> Self {
        Self { fleet }
    }
}

#[tonic::async_trait]
impl FleetService for Heartbeats {
    type HeartbeatStream = ReceiverStream<Result<HeartbeatResponse, Status>>;

    async fn heartbeat(
        &self,
        request: Request<Streaming<HeartbeatRequest>>,
    ) -> Result<Response<Self::HeartbeatStream>, Status> {
        let fleet = self.fleet.clone();
        let mut heartbeats = request.into_inner();
        let first = next(&fleet, &mut heartbeats).await?;
        let registered = fleet.register(first).await?;
        // A task of its own: the deadline holds even if the agent never reads an answer.
        let (answers, stream) = mpsc::channel(1);
        tokio::spawn(async move {
            let Err(end) = follow(&fleet, &registered, &mut heartbeats, &answers).await;
            tracing::info!(name = registered.name(), reason = end.message(), "heartbeats ended");
            drop(registered);
            let _ = answers.send(Err(end)).await;
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }
}

/// Answers heartbeats until they end.
async fn follow(
    fleet: &Fleet,
    registered: &Registered,
    heartbeats: &mut Streaming<HeartbeatRequest>,
    answers: &mpsc::Sender<Result<HeartbeatResponse, Status>>,
) -> Result<std::convert::Infallible, Status> {
    loop {
        // Full: the agent has an answer that it did not read yet, and needs no other.
        let _ = answers.try_send(Ok(HeartbeatResponse { wanted: registered.wanted() }));
        registered.heartbeat(next(fleet, heartbeats).await?)?;
    }
}

/// The next heartbeat, or why there is none.
async fn next(
    fleet: &Fleet,
    heartbeats: &mut Streaming<HeartbeatRequest>,
) -> Result<HeartbeatRequest, Status> {
    let deadline = fleet.deadline();
    let mut closing = fleet.closing();
    tokio::select! {
        heartbeat = tokio::time::timeout(deadline, heartbeats.message()) => match heartbeat {
            Ok(Ok(Some(heartbeat))) => Ok(heartbeat),
            Ok(Ok(None)) => Err(Status::cancelled("the agent ended its heartbeats")),
            Ok(Err(status)) => Err(status),
            Err(_) => Err(Status::deadline_exceeded(format!(
                "no heartbeat for {} ms: register again with a new stream",
                deadline.as_millis()
            ))),
        },
        _ = closing.wait_for(|closing| *closing) => {
            Err(Status::unavailable("the control plane is stopping: register again later"))
        }
    }
}
