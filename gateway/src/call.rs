//! A call: an instance is got, the request goes there, the answer comes back.

use std::sync::Arc;

use hyper::{Request, Response, Version as HttpVersion};
use tokio::time::sleep;

use crate::body::{AnswerBody, CallBody, Reuse};
use crate::dispatch::Dispatcher;
use crate::headers;
use crate::refusal::Refusal;
use crate::routes::Version;

/// How many instances a call may find closed: more than one at once means that all are.
const ATTEMPTS: usize = 3;

/// Calls a version of a function. The request has the path and the headers that the function is to
/// see, but for those of one hop, which are removed here.
///
/// A request of which an instance may have had a byte is not made again.
pub async fn call(
    dispatcher: &Arc<Dispatcher>,
    version: &Arc<Version>,
    mut request: Request<CallBody>,
) -> Result<Response<AnswerBody>, Refusal> {
    headers::remove_hop_by_hop(request.headers_mut());
    *request.version_mut() = HttpVersion::HTTP_11;
    let passed = request.body().progress();
    let limit_ms = version.timeout.as_millis() as u64;
    for _ in 0..ATTEMPTS {
        let mut lease = dispatcher.acquire(version).await?;
        let Some(instance) = lease.instance() else { continue };
        // The end of the call before may not have reached the connection's task.
        if instance.sender.ready().await.is_err() {
            continue;
        }
        let mut deadline = Box::pin(sleep(version.timeout));
        let sent = tokio::select! {
            sent = instance.sender.try_send_request(request) => sent,
            () = &mut deadline => return Err(Refusal::Timeout(limit_ms)),
        };
        match sent {
            Ok(answer) => {
                let (mut head, incoming) = answer.into_parts();
                // Another protocol, which nobody asked for.
                if head.status.is_informational() {
                    return Err(Refusal::Crashed);
                }
                let closes = headers::closes(&head.headers) || head.version == HttpVersion::HTTP_10;
                headers::remove_hop_by_hop(&mut head.headers);
                head.version = HttpVersion::HTTP_11;
                let reuse = Reuse { closes, passed };
                let body = AnswerBody::new(incoming, lease, deadline, limit_ms, reuse);
                return Ok(Response::from_parts(head, body));
            }
            Err(mut error) => {
                if let Some(unsent) = error.take_message() {
                    request = unsent;
                    continue;
                }
                let error = error.into_error();
                tracing::info!(function = %version.function, "an instance ended in a call: {error}");
                return Err(Refusal::Crashed);
            }
        }
    }
    Err(Refusal::Crashed)
}
