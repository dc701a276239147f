//! Who calls a function: HTTP/1.1 by hand, so that it can be spoken wrongly.

use std::future::Future;
use std::io;
use std::path::Path;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::time::timeout;

/// No answer takes so long, on whatever machine.
const PATIENCE: Duration = Duration::from_mins(1);

async fn patiently<T>(what: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    timeout(PATIENCE, what).await.expect("nothing came")
}

/// A connection to a microVM's function.
pub struct Caller {
    stream: BufReader<UnixStream>,
}

/// An answer.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub fields: Vec<(String, String)>,
    pub body: Vec<u8>,
    pub trailers: Vec<(String, String)>,
}

impl Answer {
    /// The first value of a field.
    pub fn field(&self, name: &str) -> Option<&str> {
        let same = self.fields.iter().find(|(known, _)| known.eq_ignore_ascii_case(name));
        same.map(|(_, value)| value.as_str())
    }

    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.body).unwrap()
    }

    /// Fails unless it is an error of the runtime's.
    pub fn is_error(&self, status: u16, reason: &str) {
        assert_eq!((self.status, self.field("warren-error")), (status, Some(reason)), "{self:?}");
        assert!(self.text().starts_with(&format!("{reason}: ")), "{self:?}");
        assert_eq!(self.field("connection"), Some("close"));
    }
}

impl Caller {
    pub async fn new(path: &Path) -> Self {
        Self::to(path, 80).await
    }

    /// Connects to a port of a microVM's.
    pub async fn to(path: &Path, port: u32) -> Self {
        let mut stream = UnixStream::connect(path).await.unwrap();
        stream.write_all(format!("CONNECT {port}\n").as_bytes()).await.unwrap();
        let mut this = Self { stream: BufReader::new(stream) };
        let line = this.line().await.unwrap();
        assert!(line.starts_with("OK "), "{line:?}");
        this
    }

    pub async fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.stream.write_all(bytes.as_ref()).await.unwrap();
    }

    /// A line without its end, or how the connection ended before.
    pub async fn line(&mut self) -> io::Result<String> {
        let mut line = String::new();
        patiently(self.stream.read_line(&mut line)).await?;
        match line.strip_suffix('\n') {
            Some(line) => Ok(line.trim_end_matches('\r').to_owned()),
            None => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }

    async fn fields(&mut self) -> io::Result<Vec<(String, String)>> {
        let mut fields = Vec::new();
        loop {
            let line = self.line().await?;
            match line.split_once(": ") {
                Some((name, value)) => fields.push((name.to_owned(), value.to_owned())),
                None if line.is_empty() => return Ok(fields),
                None => panic!("not a field: {line:?}"),
            }
        }
    }

    async fn bytes(&mut self, length: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; length];
        patiently(self.stream.read_exact(&mut bytes)).await?;
        Ok(bytes)
    }

    /// The head of an answer, without its body.
    pub async fn head(&mut self) -> io::Result<Answer> {
        let line = self.line().await?;
        let status = line.strip_prefix("HTTP/1.1 ").and_then(|line| line.get(..3)?.parse().ok());
        let status = status.unwrap_or_else(|| panic!("not the first line of an answer: {line:?}"));
        let fields = self.fields().await?;
        Ok(Answer { status, fields, body: Vec::new(), trailers: Vec::new() })
    }

    /// A chunk of an answer's body; an empty one is the last.
    pub async fn chunk(&mut self) -> io::Result<Vec<u8>> {
        let line = self.line().await?;
        let length = usize::from_str_radix(&line, 16).unwrap();
        if length == 0 {
            return Ok(Vec::new());
        }
        let mut chunk = self.bytes(length + 2).await?;
        assert!(chunk.ends_with(b"\r\n"));
        chunk.truncate(length);
        Ok(chunk)
    }

    /// A whole answer, or how the connection ended before.
    pub async fn answer(&mut self) -> io::Result<Answer> {
        let mut answer = self.head().await?;
        if answer.field("transfer-encoding") == Some("chunked") {
            loop {
                match self.chunk().await?.as_slice() {
                    [] => break,
                    chunk => answer.body.extend_from_slice(chunk),
                }
            }
            answer.trailers = self.fields().await?;
        } else if let Some(length) = answer.field("content-length") {
            answer.body = self.bytes(length.parse().unwrap()).await?;
        }
        Ok(answer)
    }

    pub async fn get(&mut self, target: &str) -> Answer {
        self.send(request("GET", target, "")).await;
        self.answer().await.unwrap()
    }

    pub async fn post(&mut self, target: &str, body: &[u8]) -> Answer {
        let length = format!("content-length: {}\r\n", body.len());
        self.send([request("POST", target, &length).as_bytes(), body].concat()).await;
        self.answer().await.unwrap()
    }

    /// Fails unless the other side has closed the connection, or does so now.
    pub async fn ends(mut self) {
        let mut rest = Vec::new();
        // A connection that is closed before all of a request was read is reset.
        let _ = patiently(self.stream.read_to_end(&mut rest)).await;
        assert_eq!(String::from_utf8_lossy(&rest), "");
    }

    /// Both directions, each on its own.
    pub fn split(
        self,
    ) -> (BufReader<tokio::net::unix::OwnedReadHalf>, tokio::net::unix::OwnedWriteHalf) {
        assert!(self.stream.buffer().is_empty());
        let (read, write) = self.stream.into_inner().into_split();
        (BufReader::new(read), write)
    }
}

/// A request's head.
pub fn request(method: &str, target: &str, fields: &str) -> String {
    format!("{method} {target} HTTP/1.1\r\nhost: function\r\n{fields}\r\n")
}
