//! Bodies on their way through: a request's to an instance, an answer's back.

use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, ready};

use hyper::body::{Body, Bytes, Frame, Incoming, SizeHint};
use tokio::task::AbortHandle;
use tokio::time::Sleep;

use crate::dispatch::Lease;
use crate::refusal::Refusal;
use crate::start::lock;

/// The body of a call to an instance.
pub enum CallBody {
    /// A caller's, as it comes.
    Streamed {
        /// What comes.
        incoming: Incoming,
        /// Set when all of it was passed on.
        passed: Arc<AtomicBool>,
    },
    /// All of it.
    Whole(Option<Bytes>),
}

impl CallBody {
    /// A caller's body.
    pub fn streamed(incoming: Incoming) -> Self {
        if incoming.is_end_stream() {
            return Self::Whole(None);
        }
        Self::Streamed { incoming, passed: Arc::default() }
    }

    /// Tells whether all of it was passed on.
    pub fn progress(&self) -> Option<Arc<AtomicBool>> {
        match self {
            Self::Streamed { passed, .. } => Some(passed.clone()),
            Self::Whole(_) => None,
        }
    }
}

impl Body for CallBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        match self.get_mut() {
            Self::Streamed { incoming, passed } => {
                let frame = ready!(Pin::new(&mut *incoming).poll_frame(context));
                if frame.is_none() || incoming.is_end_stream() {
                    passed.store(true, Ordering::Release);
                }
                Poll::Ready(frame)
            }
            Self::Whole(bytes) => Poll::Ready(bytes.take().map(|bytes| Ok(Frame::data(bytes)))),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Streamed { incoming, .. } => incoming.is_end_stream(),
            Self::Whole(bytes) => bytes.is_none(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Streamed { incoming, .. } => incoming.size_hint(),
            Self::Whole(bytes) => {
                SizeHint::with_exact(bytes.as_ref().map_or(0, |bytes| bytes.len() as u64))
            }
        }
    }
}

/// Why an answer broke off.
#[derive(Debug, thiserror::Error)]
pub enum AnswerError {
    /// The call's time was over.
    #[error("{0}")]
    Refused(Refusal),
    /// The connection to the instance broke.
    #[error("the instance's answer broke off: {0}")]
    Broken(#[from] hyper::Error),
}

/// The body of an instance's answer. At its end the instance is free; dropped before, it is ended.
pub struct AnswerBody {
    incoming: Incoming,
    lease: Arc<Mutex<Option<Lease>>>,
    deadline: Pin<Box<Sleep>>,
    /// Ends the instance at the deadline also if nobody polls this, because the caller does not read.
    guard: Option<AbortHandle>,
    limit_ms: u64,
    reuse: Reuse,
}

/// Whether an instance can be used again after a call.
pub struct Reuse {
    /// It said that it cannot.
    pub closes: bool,
    /// Tells whether the request was passed on whole; none: it was, from the beginning.
    pub passed: Option<Arc<AtomicBool>>,
}

impl AnswerBody {
    /// Of an answer that must be over at `deadline`, `limit_ms` after its call began.
    pub fn new(
        incoming: Incoming,
        lease: Lease,
        deadline: Pin<Box<Sleep>>,
        limit_ms: u64,
        reuse: Reuse,
    ) -> Self {
        let lease = Arc::new(Mutex::new(Some(lease)));
        let mut body = Self { incoming, lease, deadline, guard: None, limit_ms, reuse };
        if body.incoming.is_end_stream() {
            body.finish();
        } else {
            let (at, lease) = (body.deadline.deadline(), body.lease.clone());
            let guard = tokio::spawn(async move {
                tokio::time::sleep_until(at).await;
                drop(lock(&lease).take());
            });
            body.guard = Some(guard.abort_handle());
        }
        body
    }

    fn finish(&mut self) {
        let passed = self.reuse.passed.as_ref().is_none_or(|passed| passed.load(Ordering::Acquire));
        if let Some(lease) = self.take_lease()
            && passed
            && !self.reuse.closes
        {
            lease.release();
        }
    }

    fn take_lease(&self) -> Option<Lease> {
        lock(&self.lease).take()
    }
}

impl Body for AnswerBody {
    type Data = Bytes;
    type Error = AnswerError;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, AnswerError>>> {
        let body = self.get_mut();
        match Pin::new(&mut body.incoming).poll_frame(context) {
            Poll::Ready(Some(Ok(frame))) => {
                if body.incoming.is_end_stream() {
                    body.finish();
                }
                Poll::Ready(Some(Ok(frame)))
            }
            Poll::Ready(Some(Err(error))) => {
                drop(body.take_lease());
                Poll::Ready(Some(Err(error.into())))
            }
            Poll::Ready(None) => {
                body.finish();
                Poll::Ready(None)
            }
            Poll::Pending => {
                ready!(body.deadline.as_mut().poll(context));
                drop(body.take_lease());
                let refusal = Refusal::Timeout(body.limit_ms);
                Poll::Ready(Some(Err(AnswerError::Refused(refusal))))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.incoming.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.incoming.size_hint()
    }
}

impl Drop for AnswerBody {
    fn drop(&mut self) {
        // The guard has the lease, too.
        drop(self.take_lease());
        if let Some(guard) = &self.guard {
            guard.abort();
        }
    }
}
