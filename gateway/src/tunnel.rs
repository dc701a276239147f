//! A way to an instance: `CONNECT` to its host's relay.

use std::io;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// The longest head of a relay's answer, in bytes.
const HEAD_MAX: usize = 1024;

/// Why there is no way to an instance.
#[derive(Debug, thiserror::Error)]
pub enum TunnelError {
    /// The connection to the relay failed.
    #[error("cannot reach the relay at {relay}: {source}; is warren-relay running there?")]
    Io {
        /// Its address.
        relay: String,
        /// Why.
        source: io::Error,
    },
    /// The relay refused.
    #[error("the relay at {relay} has no way to instance {id}: it answered {status}")]
    Refused {
        /// Its address.
        relay: String,
        /// Id of the instance.
        id: String,
        /// Status of its answer.
        status: u16,
    },
}

/// Connects to a relay.
pub async fn dial(relay: &str) -> Result<TcpStream, TunnelError> {
    let because = |source| TunnelError::Io { relay: relay.to_owned(), source };
    let stream = TcpStream::connect(relay).await.map_err(because)?;
    stream.set_nodelay(true).map_err(because)?;
    Ok(stream)
}

/// Makes a connection to a relay one to the instance's HTTP server.
pub async fn enter(mut stream: TcpStream, relay: &str, id: &str) -> Result<TcpStream, TunnelError> {
    let because = |source| TunnelError::Io { relay: relay.to_owned(), source };
    let request = format!("CONNECT {id}:80 HTTP/1.1\r\nhost: {id}:80\r\n\r\n");
    stream.write_all(request.as_bytes()).await.map_err(because)?;
    let mut head = Vec::with_capacity(HEAD_MAX);
    let status = loop {
        let mut fields = [httparse::EMPTY_HEADER; 16];
        let mut answer = httparse::Response::new(&mut fields);
        match answer.parse(&head) {
            // The instance speaks when it is spoken to: nothing follows the head.
            Ok(httparse::Status::Complete(_)) => break answer.code.unwrap_or_default(),
            Ok(httparse::Status::Partial) if head.len() < HEAD_MAX => {}
            _ => return Err(because(io::ErrorKind::InvalidData.into())),
        }
        if stream.read_buf(&mut head).await.map_err(because)? == 0 {
            return Err(because(io::ErrorKind::UnexpectedEof.into()));
        }
    };
    match status {
        200 => Ok(stream),
        status => Err(TunnelError::Refused { relay: relay.to_owned(), id: id.to_owned(), status }),
    }
}
