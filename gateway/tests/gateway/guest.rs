//! A guest that is a task: it serves its Unix socket as `warren-vmm` does, and HTTP behind it.

use std::convert::Infallible;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;

pub type Answer = Response<BoxBody<Bytes, hyper::Error>>;

/// What all guests share with the test.
pub struct Shared {
    /// Lets calls of `/hold` go on, one for each permit.
    pub gate: Semaphore,
    /// Calls of `/hold` that have come.
    pub held: AtomicUsize,
    /// A guest had two calls at a time.
    pub overlapped: AtomicBool,
    /// While it is above 0, `/flaky` fails and takes one off.
    pub failures: AtomicUsize,
    /// Heads of all calls of `/`, where events and timers go.
    pub events: std::sync::Mutex<Vec<String>>,
}

impl Default for Shared {
    fn default() -> Self {
        Self {
            gate: Semaphore::new(0),
            held: AtomicUsize::new(0),
            overlapped: AtomicBool::new(false),
            failures: AtomicUsize::new(0),
            events: std::sync::Mutex::default(),
        }
    }
}

struct Inner {
    id: String,
    function: String,
    shared: Arc<Shared>,
    busy: AtomicUsize,
}

/// Ends with the instance.
pub struct Guest {
    task: JoinHandle<()>,
    files: [PathBuf; 2],
}

impl Guest {
    pub fn start(
        run_dir: &Path,
        id: &str,
        slot: usize,
        function: &str,
        shared: Arc<Shared>,
    ) -> Self {
        let socket = run_dir.join(format!("vm-{slot}.sock"));
        let listener = UnixListener::bind(&socket).unwrap();
        let link = run_dir.join("by-id").join(format!("{id}.sock"));
        std::os::unix::fs::symlink(&socket, &link).unwrap();
        let (id, function) = (id.to_owned(), function.to_owned());
        let inner = Arc::new(Inner { id, function, shared, busy: AtomicUsize::new(0) });
        let task = tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                connections.spawn(serve(stream, inner.clone()));
            }
        });
        Self { task, files: [link, socket] }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.task.abort();
        for file in &self.files {
            // At the end of a test, its directory may be gone already.
            let _ = std::fs::remove_file(file);
        }
    }
}

async fn serve(mut stream: UnixStream, inner: Arc<Inner>) {
    let mut line = [0; 11];
    stream.read_exact(&mut line).await.unwrap();
    assert_eq!(&line, b"CONNECT 80\n");
    stream.write_all(b"OK 1024\n").await.unwrap();
    let service = service_fn(move |request| {
        let inner = inner.clone();
        async move {
            if inner.busy.fetch_add(1, Ordering::SeqCst) > 0 {
                inner.shared.overlapped.store(true, Ordering::SeqCst);
            }
            let answer = answer(request, &inner).await;
            inner.busy.fetch_sub(1, Ordering::SeqCst);
            answer
        }
    });
    // An error is one that a test wants: `/crash`, or a gateway that went away.
    let _ = hyper::server::conn::http1::Builder::new()
        .serve_connection(TokioIo::new(stream), service)
        .await;
}

async fn answer(request: Request<Incoming>, inner: &Inner) -> Result<Answer, std::io::Error> {
    let shared = &inner.shared;
    let mut answer = text(format!("{} {}", inner.function, inner.id));
    match request.uri().path() {
        "/echo" => return Ok(Response::new(request.into_body().boxed())),
        "/head" => return Ok(text(head(&request))),
        "/hold" => {
            shared.held.fetch_add(1, Ordering::SeqCst);
            shared.gate.acquire().await.unwrap().forget();
        }
        "/hang" => std::future::pending().await,
        // The head comes, the body does not.
        "/stall" => {
            let body = http_body_util::StreamBody::new(tokio_stream::pending::<
                Result<hyper::body::Frame<Bytes>, hyper::Error>,
            >());
            return Ok(Response::new(BodyExt::boxed(body)));
        }
        // More than anybody reads.
        "/flood" => {
            let frame = || Ok(hyper::body::Frame::data(Bytes::from_static(&[b'x'; 1 << 13])));
            let body = tokio_stream::iter(std::iter::repeat_with(frame));
            return Ok(Response::new(BodyExt::boxed(http_body_util::StreamBody::new(body))));
        }
        "/crash" => return Err(std::io::Error::other("crashed")),
        "/close" => {
            answer.headers_mut().insert("connection", "close".parse().unwrap());
        }
        "/trap" => {
            *answer.status_mut() = hyper::StatusCode::INTERNAL_SERVER_ERROR;
            answer.headers_mut().insert("warren-error", "trap".parse().unwrap());
            answer.headers_mut().insert("connection", "close".parse().unwrap());
        }
        "/" => {
            let head = format!("{}\n{}", inner.function, head(&request));
            let body = request.into_body().collect().await;
            let Ok(body) = body else { return Err(std::io::Error::other("no body")) };
            let body = String::from_utf8(body.to_bytes().to_vec()).unwrap();
            shared.events.lock().unwrap().push(format!("{head}\n{body}"));
            let fails = |left: usize| left.checked_sub(1);
            if shared.failures.fetch_update(Ordering::SeqCst, Ordering::SeqCst, fails).is_ok() {
                *answer.status_mut() = hyper::StatusCode::INTERNAL_SERVER_ERROR;
            }
        }
        _ => {}
    }
    Ok(answer)
}

fn head(request: &Request<Incoming>) -> String {
    let mut lines = vec![format!("{} {}", request.method(), request.uri())];
    for (name, value) in request.headers() {
        lines.push(format!("{name}: {}", value.to_str().unwrap()));
    }
    lines.join("\n")
}

fn text(text: String) -> Answer {
    let never = |never: Infallible| match never {};
    Response::new(Full::new(Bytes::from(text)).map_err(never).boxed())
}

/// Waits for something that must come.
pub async fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let wait = async {
        while !is_so() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    assert!(tokio::time::timeout(Duration::from_secs(20), wait).await.is_ok(), "never: {what}");
}
