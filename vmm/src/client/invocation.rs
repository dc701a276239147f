//! Calls into a guest over its invocation channel.

use std::path::Path;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::time::timeout;
use warren_abi::microvm::{INVOCATION_MAX, INVOCATION_PORT};

use super::ClientError;

/// A connection to the function in a guest, for any number of calls, one after the other.
#[derive(Debug)]
pub struct Invocation {
    stream: UnixStream,
}

impl Invocation {
    /// Connects to the function of the microVM whose socket this is.
    ///
    /// # Errors
    /// [`ClientError::Connect`] if there is no microVM; [`ClientError::ChannelClosed`] if its guest
    /// takes no call.
    pub async fn connect(path: &Path) -> Result<Self, ClientError> {
        let mut stream = UnixStream::connect(path)
            .await
            .map_err(|source| ClientError::Connect { path: path.to_owned(), source })?;
        stream.write_all(format!("CONNECT {INVOCATION_PORT}\n").as_bytes()).await?;
        // "OK <port>\n". The guest speaks only when spoken to, so nothing can follow it yet.
        let mut line = Vec::with_capacity(32);
        while line.last() != Some(&b'\n') {
            if line.len() >= 32 || stream.read_buf(&mut line).await? == 0 {
                return Err(ClientError::ChannelClosed);
            }
        }
        if !line.starts_with(b"OK ") {
            return Err(ClientError::ChannelClosed);
        }
        Ok(Self { stream })
    }

    /// Sends a request and waits for its reply. Bound it with a timeout; after one, drop the
    /// connection, because the late reply would be taken for that of the next request.
    ///
    /// # Errors
    /// [`ClientError::TooLong`], [`ClientError::ChannelClosed`] if the guest ended.
    pub async fn call(&mut self, request: &[u8]) -> Result<Vec<u8>, ClientError> {
        if request.len() > INVOCATION_MAX as usize {
            return Err(ClientError::TooLong(request.len() as u64));
        }
        let mut frame = Vec::with_capacity(4 + request.len());
        frame.extend_from_slice(&(request.len() as u32).to_le_bytes());
        frame.extend_from_slice(request);
        self.stream.write_all(&frame).await.map_err(|_| ClientError::ChannelClosed)?;
        let mut header = [0; 4];
        self.read(&mut header).await?;
        let length = u32::from_le_bytes(header);
        if length > INVOCATION_MAX {
            return Err(ClientError::TooLong(length.into()));
        }
        let mut reply = vec![0; length as usize];
        self.read(&mut reply).await?;
        Ok(reply)
    }

    async fn read(&mut self, buffer: &mut [u8]) -> Result<(), ClientError> {
        self.stream.read_exact(buffer).await.map_err(|_| ClientError::ChannelClosed)?;
        Ok(())
    }
}

/// Calls a guest's function once, on a connection of its own.
///
/// # Errors
/// As [`Invocation::connect`] and [`Invocation::call`]; [`ClientError::Timeout`].
pub async fn invoke(
    path: &Path,
    request: &[u8],
    limit: Duration,
) -> Result<Vec<u8>, ClientError> {
    let exchange = async { Invocation::connect(path).await?.call(request).await };
    timeout(limit, exchange).await.unwrap_or(Err(ClientError::Timeout(limit)))
}
