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
    /// The guest accepted the connection.
    accepted: bool,
}

impl Invocation {
    /// Connects to the microVM whose socket this is. Its guest is asked together with the first
    /// call: one trip less.
    ///
    /// # Errors
    /// [`ClientError::Connect`] if there is no microVM.
    pub async fn connect(path: &Path) -> Result<Self, ClientError> {
        let stream = UnixStream::connect(path)
            .await
            .map_err(|source| ClientError::Connect { path: path.to_owned(), source })?;
        Ok(Self { stream, accepted: false })
    }

    /// Sends a request and waits for its reply. Bound it with a timeout; after one, drop the
    /// connection, because the late reply would be taken for that of the next request.
    ///
    /// # Errors
    /// [`ClientError::TooLong`], [`ClientError::ChannelClosed`] if the guest ended, or takes no
    /// call.
    pub async fn call(&mut self, request: &[u8]) -> Result<Vec<u8>, ClientError> {
        if request.len() > INVOCATION_MAX as usize {
            return Err(ClientError::TooLong(request.len() as u64));
        }
        let mut message = Vec::with_capacity(32 + request.len());
        if !self.accepted {
            message.extend_from_slice(format!("CONNECT {INVOCATION_PORT}\n").as_bytes());
        }
        message.extend_from_slice(&(request.len() as u32).to_le_bytes());
        message.extend_from_slice(request);
        self.stream.write_all(&message).await.map_err(|_| ClientError::ChannelClosed)?;
        if !self.accepted {
            self.read_acceptance().await?;
        }
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

    /// "OK <port>\n", byte by byte: the reply may follow at once.
    async fn read_acceptance(&mut self) -> Result<(), ClientError> {
        let mut line = Vec::with_capacity(32);
        while line.last() != Some(&b'\n') {
            let mut byte = [0];
            self.read(&mut byte).await?;
            line.extend(byte);
            if line.len() > 32 {
                return Err(ClientError::ChannelClosed);
            }
        }
        self.accepted = line.starts_with(b"OK ");
        if self.accepted { Ok(()) } else { Err(ClientError::ChannelClosed) }
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
pub async fn invoke(path: &Path, request: &[u8], limit: Duration) -> Result<Vec<u8>, ClientError> {
    let exchange = async { Invocation::connect(path).await?.call(request).await };
    timeout(limit, exchange).await.unwrap_or(Err(ClientError::Timeout(limit)))
}
