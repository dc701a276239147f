//! The agent's `LogService`.

use std::pin::Pin;
use std::sync::Arc;

use tokio::sync::broadcast::error::RecvError;
use tokio_stream::Stream;
use tonic::{Request, Response, Status};
use warren_proto::v1::log_service_server::LogService;
use warren_proto::v1::{LogLine, TailLogsRequest, TailLogsResponse};

use crate::host::Host;

/// Serves the logs of a host's functions.
pub struct LogServer(pub Arc<Host>);

type Lines = Pin<Box<dyn Stream<Item = Result<TailLogsResponse, Status>> + Send>>;

#[tonic::async_trait]
impl LogService for LogServer {
    type TailLogsStream = Lines;

    async fn tail_logs(
        &self,
        request: Request<TailLogsRequest>,
    ) -> Result<Response<Lines>, Status> {
        let TailLogsRequest { function, lines, follow } = request.into_inner();
        let (last, mut written) = self.0.logs().tail(&function, lines as usize);
        let stream = async_stream::stream! {
            if !last.is_empty() {
                yield Ok(TailLogsResponse { lines: last });
            }
            if !follow {
                return;
            }
            loop {
                match written.recv().await {
                    Ok((of, line)) if of == function => {
                        yield Ok(TailLogsResponse { lines: vec![line] });
                    }
                    Ok(_) => {}
                    Err(RecvError::Lagged(lines)) => {
                        let text = format!("{lines} lines of this host came faster than they were read");
                        let stream = "runtime".to_owned();
                        let line = LogLine { stream, text, ..LogLine::default() };
                        yield Ok(TailLogsResponse { lines: vec![line] });
                    }
                    Err(RecvError::Closed) => return,
                }
            }
        };
        Ok(Response::new(Box::pin(stream)))
    }
}
