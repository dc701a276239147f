//! `warren.v1.LogService`, of all hosts: each has the lines of the instances that it runs.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_stream::{Stream, StreamExt, StreamMap};
use tonic::{Request, Response, Status, Streaming};
use warren_proto::endpoint::{Endpoint, connect};
use warren_proto::v1::log_service_client::LogServiceClient;
use warren_proto::v1::log_service_server::LogService;
use warren_proto::v1::{LogLine, TailLogsRequest, TailLogsResponse};

use crate::fleet::Fleet;

/// A host that does not answer by then is told of as one that does not.
const PATIENCE: Duration = Duration::from_secs(5);

/// The service.
pub struct LogApi {
    fleet: Arc<Fleet>,
}

type Lines = Pin<Box<dyn Stream<Item = Result<TailLogsResponse, Status>> + Send>>;

impl LogApi {
    /// Of this fleet.
    pub fn new(fleet: Arc<Fleet>) -> Self {
        Self { fleet }
    }
}

#[tonic::async_trait]
impl LogService for LogApi {
    type TailLogsStream = Lines;

    /// Asks the hosts that are alive now. One that does not answer, or breaks off, is told of in a line.
    async fn tail_logs(
        &self,
        request: Request<TailLogsRequest>,
    ) -> Result<Response<Lines>, Status> {
        let request = request.into_inner();
        let mut asked = JoinSet::new();
        for host in self.fleet.flow_hosts() {
            if !host.host.alive {
                continue;
            }
            let (name, endpoint, request) = (host.host.name, host.host.endpoint, request.clone());
            asked.spawn(async move {
                let answer = timeout(PATIENCE, tail(&endpoint, request)).await;
                let late = || format!("no answer within {} s", PATIENCE.as_secs());
                (name, answer.unwrap_or_else(|_| Err(late())))
            });
        }
        let (mut lines, mut problems) = (StreamMap::new(), Vec::new());
        for (host, answer) in asked.join_all().await {
            match answer {
                Ok(stream) => drop(lines.insert(host, stream)),
                Err(problem) => problems.push(format!("host {host}: {problem}")),
            }
        }
        if lines.is_empty() {
            let problems = problems.join("; ");
            return Err(Status::unavailable(format!("no host says what it has: {problems}")));
        }
        let problems = problems.into_iter().map(|problem| Ok(of_control(problem)));
        let lines = lines.map(|(host, message)| {
            let broken = |status: Status| of_control(format!("host {host}: {}", status.message()));
            Ok(message.unwrap_or_else(broken))
        });
        Ok(Response::new(Box::pin(tokio_stream::iter(problems).chain(lines))))
    }
}

async fn tail(
    endpoint: &str,
    request: TailLogsRequest,
) -> Result<Streaming<TailLogsResponse>, String> {
    let endpoint: Endpoint = endpoint.parse().map_err(|error| format!("{error}"))?;
    let channel = connect(&endpoint).await.map_err(|error| error.to_string())?;
    let answer = LogServiceClient::new(channel).tail_logs(request).await;
    answer.map(Response::into_inner).map_err(|status| status.message().to_owned())
}

/// A line that no instance wrote.
fn of_control(text: String) -> TailLogsResponse {
    let stream = "runtime".to_owned();
    TailLogsResponse { lines: vec![LogLine { stream, text, ..LogLine::default() }] }
}
