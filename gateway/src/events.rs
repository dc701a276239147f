//! Calls that nobody waits for: kept first, then delivered, at least once.

pub mod policy;
pub mod store;

use std::collections::HashSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use http_body_util::BodyExt;
use hyper::Request;
use hyper::body::{Body, Bytes};
use hyper::header::{CONTENT_LENGTH, HOST, HeaderMap, HeaderName, HeaderValue};
use jiff::Timestamp;
use tokio::sync::{Notify, Semaphore};
use uuid::Uuid;
use warren_proto::v1::EventTrigger;

use crate::body::CallBody;
use crate::call::call;
use crate::dispatch::Dispatcher;
use crate::events::policy::{Next, after_failure};
use crate::events::store::{Event, EventStore, StoreError};
use crate::headers::remove_hop_by_hop;
use crate::metrics::Counts;
use crate::refusal::{ERROR_HEADER, Refusal};
use crate::routes::Target;
use crate::shared::SharedRoutes;
use crate::start::lock;

/// Deliveries at one time.
const DELIVERIES: usize = 32;
/// After the file failed, it is tried again after this time. It is also looked at this often, as
/// the clock may be set.
const AGAIN: Duration = Duration::from_secs(1);
const ID: &str = "warren-event-id";
const FAILED: &str = "warren-event-failed";
const DEAD_LETTER_OF: &str = "warren-dead-letter-of";
const DEAD_LETTER_REASON: &str = "warren-dead-letter-reason";

/// All events of this gateway.
pub struct Events {
    store: EventStore,
    added: Notify,
    under_way: Mutex<HashSet<String>>,
    dispatcher: Arc<Dispatcher>,
    routes: SharedRoutes,
    counts: Counts,
}

impl Events {
    /// With what the file has. Nothing is delivered until [`Self::run`].
    pub fn new(
        store: EventStore,
        dispatcher: Arc<Dispatcher>,
        routes: SharedRoutes,
        counts: Counts,
    ) -> Arc<Self> {
        let (added, under_way) = (Notify::new(), Mutex::default());
        Arc::new(Self { store, added, under_way, dispatcher, routes, counts })
    }

    /// Keeps an event, and answers its id. From then on it is delivered, whatever happens.
    pub async fn accept(
        &self,
        trigger: String,
        mut headers: HeaderMap,
        body: Bytes,
    ) -> Result<String, StoreError> {
        remove_hop_by_hop(&mut headers);
        headers.remove(HOST);
        headers.remove(CONTENT_LENGTH);
        // A value that is no text cannot be kept as one; such are not known to be of use.
        let fields = headers
            .iter()
            .filter_map(|(name, value)| Some((name.to_string(), value.to_str().ok()?.to_owned())));
        let event = new_event(trigger, fields.collect(), body.into());
        let id = event.id.clone();
        self.store.add(event).await?;
        self.added.notify_one();
        Ok(id)
    }

    /// Keeps the event of a timer, and that it fired for this time.
    pub(crate) async fn fire(&self, timer: &str, at: Timestamp) -> Result<(), StoreError> {
        let headers = vec![
            ("warren-timer".to_owned(), timer.to_owned()),
            ("warren-timer-at".to_owned(), at.to_string()),
        ];
        let event = new_event(timer.to_owned(), headers, Vec::new());
        self.store.fire(event, at.as_millisecond()).await?;
        self.added.notify_one();
        Ok(())
    }

    /// The file.
    pub fn store(&self) -> &EventStore {
        &self.store
    }

    /// Delivers for ever.
    pub async fn run(self: Arc<Self>) {
        let room = Arc::new(Semaphore::new(DELIVERIES));
        loop {
            let pause = self.deliver_due(&room).await.unwrap_or_else(|error| {
                tracing::error!("{error}");
                AGAIN
            });
            // An event that comes, and a delivery that makes room, also end the pause.
            let _ = tokio::time::timeout(pause, self.added.notified()).await;
        }
    }

    /// Begins the deliveries that are due and have room; how long there is nothing else to do.
    async fn deliver_due(self: &Arc<Self>, room: &Arc<Semaphore>) -> Result<Duration, StoreError> {
        let now_ms = Timestamp::now().as_millisecond();
        for event in self.store.due(now_ms, DELIVERIES).await? {
            if lock(&self.under_way).contains(&event.id) {
                continue;
            }
            let Ok(permit) = room.clone().try_acquire_owned() else { return Ok(AGAIN) };
            lock(&self.under_way).insert(event.id.clone());
            let events = self.clone();
            tokio::spawn(async move {
                let id = event.id.clone();
                if let Err(error) = events.deliver(event).await {
                    tracing::error!(event = id, "{error}; it will be delivered again");
                    tokio::time::sleep(AGAIN).await;
                }
                lock(&events.under_way).remove(&id);
                drop(permit);
                events.added.notify_one();
            });
        }
        let next = self.store.next_due(now_ms).await?;
        let next = next.map_or(AGAIN, |due| Duration::from_millis((due - now_ms) as u64));
        Ok(next.min(AGAIN))
    }

    async fn deliver(&self, event: Event) -> Result<(), StoreError> {
        let (trigger, outcome) = self.attempt(&event).await;
        let Err(reason) = outcome else {
            self.counts.event("delivered");
            return self.store.remove(event.id).await;
        };
        let failed = event.failed + 1;
        let next = after_failure(&trigger, failed, event.dead_letter_of.is_some());
        tracing::info!(event = event.id, trigger = event.trigger, failed, "failed: {reason}");
        let now_ms = Timestamp::now().as_millisecond();
        let reason = Some(reason);
        match next {
            Next::Again(pause) => {
                self.counts.event("retried");
                let due_ms = now_ms + pause.as_millis() as i64;
                self.store.update(Event { failed, due_ms, reason, ..event }).await
            }
            Next::DeadLetter(target) => {
                self.counts.event("dead-letter");
                let dead_letter_of = Some(event.trigger.clone());
                let (trigger, due_ms, failed) = (target, now_ms, 0);
                let letter = Event { trigger, failed, due_ms, dead_letter_of, reason, ..event };
                self.store.update(letter).await
            }
            Next::Drop => {
                self.counts.event("dropped");
                self.store.remove(event.id).await
            }
        }
    }

    /// One delivery, which succeeds with a status of 200 to 299 and a whole body.
    async fn attempt(&self, event: &Event) -> (EventTrigger, Result<(), String>) {
        let routes = self.routes.get();
        let (target, trigger): (Option<&Target>, _) = match routes.event(&event.trigger) {
            Some((target, trigger)) => (Some(target), trigger.clone()),
            None => (routes.timer(&event.trigger), EventTrigger::default()),
        };
        let Some(target) = target else {
            return (trigger, Err(format!("there is no trigger {} any more", event.trigger)));
        };
        let version = target.version(rand::random());
        let outcome = async {
            let answer = call(&self.dispatcher, version?, request(event)).await?;
            Ok::<_, Refusal>(answer)
        };
        let answer = match outcome.await {
            Ok(answer) => answer,
            Err(refusal) => return (trigger, Err(format!("{}: {refusal}", refusal.token()))),
        };
        let (head, mut body) = answer.into_parts();
        while let Some(frame) = body.frame().await {
            if let Err(error) = frame {
                return (trigger, Err(error.to_string()));
            }
        }
        if head.status.is_success() {
            return (trigger, Ok(()));
        }
        let token = head.headers.get(ERROR_HEADER).and_then(|token| token.to_str().ok());
        let token = token.map(|token| format!(" ({token})")).unwrap_or_default();
        (trigger, Err(format!("its function answered {}{token}", head.status.as_u16())))
    }
}

fn new_event(trigger: String, headers: Vec<(String, String)>, body: Vec<u8>) -> Event {
    Event {
        id: Uuid::new_v4().to_string(),
        trigger,
        headers,
        body,
        failed: 0,
        due_ms: Timestamp::now().as_millisecond(),
        dead_letter_of: None,
        reason: None,
    }
}

/// The call that an event becomes.
fn request(event: &Event) -> Request<CallBody> {
    let body = (!event.body.is_empty()).then(|| Bytes::from(event.body.clone()));
    let body = CallBody::Whole(body);
    let length = body.size_hint().exact().unwrap_or_default();
    let mut request = Request::new(body);
    *request.method_mut() = hyper::Method::POST;
    let failed = event.failed.to_string();
    let mut own = vec![(HOST.as_str(), event.trigger.as_str()), (ID, &event.id), (FAILED, &failed)];
    if let Some(of) = &event.dead_letter_of {
        own.push((DEAD_LETTER_OF, of));
        own.push((DEAD_LETTER_REASON, event.reason.as_deref().unwrap_or_default()));
    }
    let sent = event.headers.iter().map(|(name, value)| (name.as_str(), value.as_str()));
    for (name, value) in sent.chain(own) {
        // A reason may hold what no header can.
        if let (Ok(name), Ok(value)) = (name.parse::<HeaderName>(), HeaderValue::from_str(value)) {
            request.headers_mut().append(name, value);
        }
    }
    request.headers_mut().insert(CONTENT_LENGTH, length.into());
    request
}
