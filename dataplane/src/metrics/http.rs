//! Serves metrics to Prometheus.

use std::net::SocketAddr;
use std::sync::Arc;

use axum::Router;
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use prometheus_client::encoding::text::encode;
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;

/// The text format's name and version.
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Why metrics cannot be served.
#[derive(Debug, thiserror::Error)]
#[error("cannot serve metrics at {address}: {source}; set `metrics` to another address")]
pub struct BindError {
    address: SocketAddr,
    source: std::io::Error,
}

/// An address that Prometheus can connect to.
pub struct Exporter {
    listener: TcpListener,
}

impl Exporter {
    /// Takes the address; port 0 takes any.
    pub async fn bind(address: SocketAddr) -> Result<Self, BindError> {
        let listener = TcpListener::bind(address).await;
        let listener = listener.map_err(|source| BindError { address, source })?;
        Ok(Self { listener })
    }

    /// The address that was taken.
    pub fn address(&self) -> std::io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Answers `GET /metrics`, for ever.
    pub async fn serve(self, registry: Registry) {
        let registry = Arc::new(registry);
        let router = Router::new().route("/metrics", get(move || scrape(registry.clone())));
        // It goes on after whatever fails on one connection.
        if let Err(error) = axum::serve(self.listener, router).await {
            tracing::error!("metrics are no longer served: {error}");
        }
    }
}

async fn scrape(registry: Arc<Registry>) -> Response {
    // Counters are read from the kernel meanwhile.
    let text = tokio::task::spawn_blocking(move || {
        let mut text = String::new();
        encode(&mut text, &registry).map(|()| text)
    });
    match text.await {
        Ok(Ok(text)) => ([(CONTENT_TYPE, OPEN_METRICS)], text).into_response(),
        // Text is written to memory, which does not fail; a panic is in the log.
        Ok(Err(_)) | Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;

    use super::*;
    use crate::metrics::{Snapshot, registry};

    async fn get(address: SocketAddr, path: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[tokio::test]
    async fn metrics_are_scraped_over_http() {
        let exporter = Exporter::bind(([127, 0, 0, 1], 0).into()).await.unwrap();
        let address = exporter.address().unwrap();
        let taken = Exporter::bind(address).await.err().unwrap().to_string();
        assert!(taken.contains(&address.to_string()) && taken.contains("`metrics`"), "{taken}");

        tokio::spawn(exporter.serve(registry("proxy", Snapshot::default)));
        let answer = get(address, "/metrics").await;
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
        assert!(answer.contains(&format!("content-type: {OPEN_METRICS}\r\n")), "{answer}");
        assert!(answer.contains("\nwarren_build_info{"), "{answer}");
        assert!(answer.ends_with("# EOF\n"), "{answer}");
        assert!(get(address, "/").await.starts_with("HTTP/1.1 404 "));
    }
}
